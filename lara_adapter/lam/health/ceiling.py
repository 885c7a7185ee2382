"""How much of a motion can be seen at all: small networks trained with the labels on the pixels of the pairs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import LaraArgumentError
from .ridge import fold_rows

__all__ = ["Ceiling", "Training", "train_ceiling"]

_SIDE = 128  # pixels a side at most
_SHIFT = 16  # a 16th of the side: how far both frames of a pair are shifted alike
_BETTER = 0.01  # in R^2; less is no improvement


class Training(NamedTuple):
    """A network that was tried: its channels, its first learning rate, epochs until its best, R^2 in validation."""

    width: int
    rate: float
    epochs: int
    r2: float


class Ceiling(NamedTuple):
    """What networks say about each pair whose episode they have not seen.

    prediction: [R, L + S] float32, on the scale of the labels and states.
    tried: all sizes and learning rates that were compared, on the validation episodes of the first fold.
    chosen: the best of them, trained for each fold.
    """

    prediction: Tensor
    tried: list[Training]
    chosen: Training


def train_ceiling(
    now: Tensor,
    later: Tensor,
    labels: Tensor,
    episode: Tensor,
    *,
    states: Tensor | None = None,
    folds: int = 5,
    widths: Sequence[int] = (16, 32, 64),
    rates: Sequence[float] = (1e-3, 3e-4),
    epochs: int = 60,
    patience: int = 8,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Ceiling:
    """Train small convolutional networks from pairs of frames to labels, and predict each fold by one that has not seen it.

    In each fold a fifth of the other episodes is for validation: training stops where it no longer improves there. In the
    first fold learning rates are compared with the smallest width, then larger widths are tried until one brings no
    improvement. It needs many pairs: with a few hundred, :func:`~lara_adapter.lam.health.kernel.fit_kernels` sees more.
    Together they see more than either.

    Args:
        now: [R, 3, H, W] uint8; sides above 128 pixels are made smaller.
        later: the same, C frames later.
        labels: [R, L] float, without NaN: displacement, actions.
        episode: [R] int; rows of one episode are never on both sides of a split.
        states: [R, S] float, without NaN: the state at t, which helps to see how it changes. None: not known.
        folds: at most.
        widths: channels of the first convolution, tried in order until one brings no improvement.
        rates: learning rates; the best with the first width is kept for the others.
        epochs: at most, of each training.
        patience: epochs without improvement after which it stops.
        batch_size: pairs.
        device: where to train.
        seed: of weights, order and shifts.

    Raises:
        LaraArgumentError: fewer than four episodes, or labels that never change.
    """
    names = episode.unique()
    if len(names) < 4:
        raise LaraArgumentError(f"the ceiling needs pairs of at least 4 episodes, but there are {len(names)}")
    y = labels.float() if states is None else torch.cat([labels.float(), states.float()], 1)
    varies = y.std(0) > 1e-9
    if not varies.any():
        raise LaraArgumentError("the labels never change")
    middle, scale = y[:, varies].mean(0), y[:, varies].std(0)
    frames = torch.stack([_smaller(now), _smaller(later)], 1)
    prediction = y.clone()
    tried: list[Training] = []
    y = (y[:, varies] - middle) / scale
    with torch.random.fork_rng(devices=[]):
        for test in fold_rows(episode.cpu(), folds):
            rest = episode[~test].unique()
            held_out = torch.isin(episode, rest[:: min(5, len(rest))])
            fit = ~test & ~held_out
            train = functools.partial(
                _train, frames, y, fit, held_out, device=device, epochs=epochs, patience=patience, batch_size=batch_size,
                seed=seed,
            )  # fmt: skip
            if not tried:
                chosen, network = _search(train, widths, rates, tried)
            else:
                _, network = train(chosen.width, chosen.rate)
            rows = torch.zeros(int(test.sum()), y.shape[1])
            for part, place in zip(test.nonzero().squeeze(1).split(256), torch.arange(len(rows)).split(256)):
                rows[place] = network(frames[part].to(device)).detach().cpu()
            kept = prediction[test]
            kept[:, varies] = rows * scale + middle
            prediction[test] = kept
    return Ceiling(prediction, tried, chosen)


def _search(
    train: Callable[[int, float], tuple[Training, nn.Module]],
    widths: Sequence[int],
    rates: Sequence[float],
    tried: list[Training],
) -> tuple[Training, nn.Module]:
    """The best network by its validation; all that are trained are added to `tried`."""

    def attempt(width: int, rate: float) -> tuple[Training, nn.Module]:
        found = train(width, rate)
        tried.append(found[0])
        return found

    best = max((attempt(widths[0], rate) for rate in rates), key=lambda each: each[0].r2)
    for width in widths[1:]:
        new = attempt(width, best[0].rate)
        if new[0].r2 < best[0].r2 + _BETTER:
            break
        best = new
    return best


class _Network(nn.Module):
    """A pair of frames, seen by the same layers, to labels; where things are stays known up to the last layer."""

    def __init__(self, side: int, width: int, labels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, size = 3, side
        for number, out in enumerate((width, 2 * width, 2 * width)):
            layers += [nn.Conv2d(channels, out, 5 if number == 0 else 3, 2, 2 if number == 0 else 1)]
            layers += [nn.BatchNorm2d(out), nn.ReLU()]
            channels, size = out, (size + 1) // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels * size * size, 128))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(256, labels))

    def forward(self, frames: Tensor) -> Tensor:
        """[B, 2, 3, S, S] uint8 -> [B, L]."""
        now, later = self.layers(torch.cat((frames.float() / 255 - 0.5).unbind(1))).chunk(2)
        return self.head(torch.cat([now, later], 1))


def _train(
    frames: Tensor,
    y: Tensor,
    fit: Tensor,
    held_out: Tensor,
    width: int,
    rate: float,
    *,
    device: str | torch.device,
    epochs: int,
    patience: int,
    batch_size: int,
    seed: int,
) -> tuple[Training, nn.Module]:
    """Train one network; returns it as it was at its best on the rows held out."""
    torch.manual_seed(seed)
    network = _Network(frames.shape[-1], width, y.shape[1]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.05)
    rows, checked = fit.nonzero().squeeze(1), held_out.nonzero().squeeze(1)
    best, state, worse = Training(width, rate, 0, -float("inf")), copy.deepcopy(network.state_dict()), 0
    spread = (y[checked] - y[rows].mean(0)).square().sum()
    for epoch in range(1, epochs + 1):
        network.train()
        for part in rows[torch.randperm(len(rows))].split(batch_size):
            if len(part) < 2:  # BatchNorm
                continue
            loss = (network(_shifted(frames[part]).to(device)) - y[part].to(device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            error = sum(
                float((network(frames[part].to(device)).cpu() - y[part]).square().sum()) for part in checked.split(256)
            )
        r2 = 1 - error / float(spread)
        if r2 > best.r2:
            best, state, worse = Training(width, rate, epoch, r2), copy.deepcopy(network.state_dict()), 0
        else:
            worse += 1
        if worse == patience // 2:  # a smaller step first
            for group in optimizer.param_groups:
                group["lr"] *= 0.3
        if worse >= patience:
            break
    network.load_state_dict(state)
    return best, network.eval()


def _shifted(frames: Tensor) -> Tensor:
    """Pairs, each with both frames shifted alike by up to a 16th of their side: motion stays what it is."""
    count, side, reach = len(frames), frames.shape[-1], max(1, frames.shape[-1] // _SHIFT)
    move = torch.randint(-reach, reach + 1, (2, count, 1))
    rows, columns = ((torch.arange(side) + each).clamp(0, side - 1) for each in move)
    taken = frames[torch.arange(count)[:, None, None], :, :, rows[:, :, None], columns[:, None, :]]
    return taken.permute(0, 3, 4, 1, 2)


def _smaller(frames: Tensor) -> Tensor:
    if frames.shape[-1] <= _SIDE and frames.shape[-2] == frames.shape[-1]:
        return frames
    side = min(_SIDE, *frames.shape[-2:])
    parts = [nn.functional.adaptive_avg_pool2d(part.float(), side).round().to(torch.uint8) for part in frames.split(64)]
    return torch.cat(parts)
