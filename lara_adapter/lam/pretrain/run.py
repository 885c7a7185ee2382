"""Stage 1: pre-training a latent action model on unlabelled video (LARA, Eq. 3 alone).

    accelerate launch -m lara_adapter.cli train-lam VIDEOS --output RUN        any number of processes

The order of the pairs and the learning rate are functions of the step and the seed, and a forward draws no random
numbers: a run that was interrupted and resumed on the same machine ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...data import PairBatch
from ...data.decode import require_decoder
from ...data.gap import parse_gap
from ...errors import LaraArgumentError, NonFiniteError
from ...storage.files import replace_file, write_json, write_tensors
from ..checkpoint import CONFIG, WEIGHTS
from ..measure import LatentHealth
from ..model import LatentActionOutput
from .augment import augment
from .labelled import read_labelled
from .pictures import write_predictions
from .settings import PretrainSettings
from .setup import make_accelerator, make_model, make_optimizer, make_trained, move, progress_bar
from .shared_frames import share_frames
from .state import MeanWeights, list_checkpoints, load_checkpoint, read_state, save_checkpoint
from .videos import Videos, find_videos

__all__ = ["PretrainResult", "PretrainSettings", "pretrain_lam", "rate_at"]

logger = logging.getLogger(__name__)


class PretrainResult(NamedTuple):
    """What a run ends with.

    output: folder that :meth:`LatentActionModel.from_pretrained` loads.
    steps: optimiser steps done in all.
    pairs_per_second: of this call, over all processes; 0 if there was nothing left to do.
    health: on held-out pairs; None without any.
    """

    output: Path
    steps: int
    pairs_per_second: float
    health: LatentHealth | None


def pretrain_lam(settings: PretrainSettings, *, backbone: nn.Module | None = None) -> PretrainResult:
    """Pre-train a latent action model on video. Under `accelerate launch` every process calls this.

    Args:
        settings: see :class:`PretrainSettings`.
        backbone: an already loaded frozen vision backbone to use instead of loading `image_encoder`.

    Returns:
        The result; the LAM itself is in the output folder.

    Raises:
        LaraArgumentError: no usable video, settings that do not go together, or others than those of the run in the
            output folder; accelerate, tqdm or the tracker is missing.
        DatasetError: PyAV is not installed, or torchcodec was asked for and cannot be used; all episodes are damaged;
            a video changed while it was read.
        AdapterFormatError: `init` or a checkpoint is damaged.
        NonFiniteError: the loss is NaN or infinite; the checkpoints are from before.
    """
    return _Run(settings.filled(), backbone).train()


def rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Learning rate of step number `step` (from 0): linear warm-up over `warmup * steps`, then a cosine to 0."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class _Run:
    """One call of :func:`pretrain_lam`."""

    def __init__(self, settings: PretrainSettings, backbone: nn.Module | None) -> None:
        self.settings, self.output = settings, settings.output
        require_decoder(settings.decoder)
        self.accelerator = make_accelerator(settings)
        self.main = self.accelerator.is_main_process
        left = list_checkpoints(self.output)
        if left and settings.resume == "never":
            raise LaraArgumentError(f"output={self.output} holds a run already, and resume is 'never'")
        if left:  # before hours of indexing; "index" is settled there
            read_state(left[-1], {name: value for name, value in settings.to_dict().items() if name != "index"})
        sources = find_videos(settings)  # before an image encoder is downloaded for a folder that is not there
        self.model = make_model(settings, backbone)
        self.model.config = dataclasses.replace(self.model.config, gap=settings.gap)
        size = self.model.config.image_size
        self.labelled = None
        if settings.actions is not None:
            self.labelled = read_labelled(
                settings.actions, parse_gap(settings.gap), settings.cameras, size, settings.seed
            )
            self.model.config = dataclasses.replace(self.model.config, labelled_by=self.labelled.fingerprint)
        self.videos = Videos(settings, sources, self.accelerator, fresh=not left)
        self.record = settings.to_dict() | {"index": self.videos.mode}  # of the checkpoints
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.stream = self.videos.stream(size)
        self.held_out = self.videos.held_out(size)
        self.trained = make_trained(self.model, self.labelled, settings.seed)
        self.optimizer = make_optimizer(self.trained, settings, self.accelerator.device)
        self.wrapped = self.accelerator.prepare(self.trained)
        self.mean = MeanWeights(self.model, settings.ema) if settings.ema else None
        self.step = 0
        if left:
            self.step, random = load_checkpoint(
                left[-1], self.trained, self.optimizer, self.mean, self.record, rank=rank, ranks=ranks
            )
            if random is not None and self.accelerator.device.type == "cuda":
                torch.cuda.set_rng_state(random, self.accelerator.device)
            elif random is not None:
                torch.set_rng_state(random)
            self._say("resumed from %s", left[-1])
        self._trim_health()
        self.epoch = 0
        self.health: LatentHealth | None = None

    def _precision(self) -> torch.autocast:
        # not accelerate's: that is fixed for the life of the process
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def _say(self, message: str, *values: Any) -> None:
        if self.main:
            logger.info(message, *values)

    # ------------------------------------------------------------------ steps

    def train(self) -> PretrainResult:
        """From the step that was reached to the last."""
        steps, per_step = _filled(self.settings.steps), self.stream.batch * self.settings.accumulate
        per_step *= self.accelerator.num_processes
        first, start = self.step, time.perf_counter()
        sums, counted, since = None, 0, start
        batches = self.stream.batches(self.step * self.settings.accumulate)
        total, done = steps * per_step, first * per_step
        bar = progress_bar(self.main, total=total, initial=done, unit="pair", unit_scale=True, desc="LAM")
        with bar, contextlib.closing(self.videos), contextlib.closing(batches):
            while self.step < steps:
                values = self._advance(batches)
                sums, counted = values if sums is None else sums + values, counted + 1
                bar.update(per_step)
                saves = self.step % self.settings.save_every == 0 or self.step == steps
                # before each checkpoint too: the log is what stops at a loss that is not finite
                if saves or self.step % self.settings.log_every == 0 or self.step == first + 1:
                    seconds = time.perf_counter() - since
                    shown = self._log(sums / counted, per_step * counted / seconds)
                    bar.set_postfix(shown, refresh=False)
                    sums, counted, since = None, 0, time.perf_counter()
                if self.step % self.settings.health_every == 0 or self.step == steps:
                    self._measure()
                if saves:
                    self._save()
        speed = (self.step - first) * per_step / (time.perf_counter() - start) if self.step > first else 0.0
        if first == steps:  # nothing was left to do
            self._measure()
        self.accelerator.end_training()
        return PretrainResult(self.output, self.step, speed, self.health)

    def _advance(self, batches: Iterator[PairBatch]) -> Tensor:
        """One optimiser step; returns what is logged, float32 [8 or 9], on the device, without waiting for it."""
        settings, accelerator = self.settings, self.accelerator
        rate = rate_at(self.step, _filled(settings.steps), _filled(settings.lr), settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        values: list[Tensor] = []
        for part in range(settings.accumulate):
            batch = move(next(batches), accelerator.device)
            last = part + 1 == settings.accumulate
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                loss, output, errors = self._forward(batch, self.step * settings.accumulate + part)
                accelerator.backward(loss / settings.accumulate)
            values.append(
                torch.stack([loss, output.reconstruction_loss, output.copy_loss, output.codebook_loss,
                             output.perceptual_loss, output.codes_used, output.perplexity, *errors]).detach()
            )  # fmt: skip
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), settings.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.epoch = batch.epoch
        if self.mean is not None:
            self.mean.update(self.step)
        return torch.cat([torch.stack(values).mean(0), norm.detach().float().view(1)])

    def _forward(self, batch: PairBatch, number: int) -> tuple[Tensor, LatentActionOutput, list[Tensor]]:
        """The loss of batch number `number`, what the LAM gave, and the error of the actions if there are any."""
        settings, labelled, rank = self.settings, self.labelled, self.accelerator.process_index
        options: dict[str, Any] = {"reconstruct": settings.reconstruct, "draw": settings.seed + number}
        if settings.augment:
            frames = augment(batch.frames, (settings.seed, number, rank))
            options["seen"] = frames[batch.present], frames[batch.future]
        with self._precision():
            if labelled is None:
                with share_frames(self.model, batch):
                    output = self.wrapped(*batch.pair(), **options)
                return output.loss, output, []
            known = labelled.draw(len(batch.present), number, rank, self.accelerator.device, augmented=settings.augment)
            output, error = self.wrapped(*batch.pair(), labelled=known, shared=batch, **options)
            return output.loss + settings.action_weight * error, output, [error]

    def _log(self, values: Tensor, speed: float) -> dict[str, str]:
        values = self.accelerator.reduce(values, reduction="mean")
        names = ["loss", "reconstruction", "copy", "codebook", "perceptual", "codes_used", "perplexity", "grad_norm"]
        if self.labelled is not None:
            names.insert(-1, "action_error")
        record = dict(zip(names, values.tolist(), strict=True))
        if not math.isfinite(record["loss"]) or not math.isfinite(record["grad_norm"]):
            raise NonFiniteError(
                f"step {self.step}: loss {record['loss']}, norm of the gradient {record['grad_norm']}. The checkpoints in "
                f"{self.output / 'checkpoints'} are from before; use a smaller lr or a longer warmup, with --init"
            )
        record["ratio"] = record["reconstruction"] / record["copy"] if record["copy"] else math.nan
        record |= {"lr": self.optimizer.param_groups[0]["lr"], "pairs_per_second": speed, "epoch": self.epoch}
        self._say(
            "step %d: loss %.4f, reconstruction / copy %.3f, %.0f codes, %.1f pairs/s, epoch %d%s",
            self.step, record["loss"], record["ratio"], record["codes_used"], speed, self.epoch,
            f", action error {record['action_error']:.3f} (1: their mean)" if self.labelled is not None else "",
        )  # fmt: skip
        self.accelerator.log({f"train/{name}": value for name, value in record.items()}, step=self.step)
        self.videos.report()
        return {"loss": f"{record['loss']:.3f}", "ratio": f"{record['ratio']:.3f}", "epoch": str(self.epoch)}

    def _measure(self) -> None:
        """Health and pictures on held-out pairs, of the mean weights where there are; the main process does it."""
        if self.held_out:
            weights = contextlib.nullcontext() if self.mean is None else self.mean.in_place()
            with weights, self._precision():
                self.health = self.model.health(self.held_out)
                write_predictions(self.model, self.held_out, self.output / "pictures" / f"step-{self.step:08d}.png")
            self._say(
                "step %d held out: reconstruction / copy %.3f, %d codes, perplexity %.1f, latent std %.3f, "
                "mean direction %.2f (%d pairs)", self.step, self.health.ratio, self.health.codes_used,
                self.health.perplexity, self.health.latent_std, self.health.mean_direction, self.health.pairs,
            )  # fmt: skip
            with (self.output / "health.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **self.health._asdict()}) + "\n")
            self.accelerator.log({f"held_out/{k}": v for k, v in self.health._asdict().items()}, step=self.step)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------ files

    def _save(self) -> None:
        """A checkpoint, and the LAM itself."""
        if self.accelerator.device.type == "cuda":
            state = torch.cuda.get_rng_state(self.accelerator.device)
        else:
            state = torch.get_rng_state()
        gathered = self.accelerator.gather(state.to(self.accelerator.device)[None])
        if self.main:
            save_checkpoint(
                self.output, self.step, self.trained, self.optimizer, self.mean, self.record,
                keep=self.settings.keep, random=list(gathered.cpu()), device=str(self.accelerator.device),
            )  # fmt: skip
            # file by file: replacing the folder would copy the checkpoints
            write_json(self.output / CONFIG, self.model.config.to_dict())
            write_tensors(self.output / WEIGHTS, self.model.state_dict() if self.mean is None else self.mean.tensors)
        self.accelerator.wait_for_everyone()

    def _trim_health(self) -> None:
        """Forget what was measured after the checkpoint that the run goes on from."""
        path = self.output / "health.jsonl"
        if self.main and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # of a run that is finished the last one is made again
            until = self.step - (self.step == self.settings.steps)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= until]
            with replace_file(path) as fresh:
                fresh.write_text("".join(kept), encoding="utf-8")


def _filled(value: Any) -> Any:
    """A value that :meth:`PretrainSettings.filled` has set."""
    assert value is not None
    return value
