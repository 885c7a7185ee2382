"""Mutual information of a latent action model's codes and the action, corrected for chance."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.demo.data import Table
from lara_adapter import LatentActionModel

KINDS = 8  # kinds of movement per task


@torch.no_grad()
def encode(lam: Path, table: Table) -> dict[str, Tensor]:
    """Encode every pair of frames of a table.

    Args:
        lam: folder of the model.
        table: F rows as `load_table` returns them.

    Returns:
        `z` [F, N * D] float32 and `codes` [F, N] int64; zeros in rows without a future frame.
    """
    model = LatentActionModel.from_pretrained(lam).eval()
    tokens, dim = model.latent_shape
    frames = len(table["valid"])
    z, codes = torch.zeros(frames, tokens * dim), torch.zeros(frames, tokens, dtype=torch.long)
    for rows in table["valid"].nonzero().squeeze(1).split(128):
        latent = model.encode(table["image"][rows], table["image"][table["future"][rows]])
        z[rows], codes[rows] = latent.continuous.flatten(1), latent.indices
    return {"z": z, "codes": codes}


def movement_kinds(movement: Tensor, kinds: int = KINDS, rounds: int = 50) -> Tensor:
    """Cluster movements by k-means, started from rows spread over the data; it draws no random numbers.

    Args:
        movement: [N, A] float.
        kinds: number of clusters.
        rounds: iterations of Lloyd's algorithm.

    Returns:
        [N] int64 in 0 .. kinds - 1.
    """
    order = torch.linspace(0, len(movement) - 1, min(kinds, len(movement))).long()
    centres = movement[movement.norm(dim=1).argsort()[order]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(movement, centres).argmin(1)
        for kind in range(len(centres)):
            if (mine := nearest == kind).any():
                centres[kind] = movement[mine].mean(0)
    return torch.cdist(movement, centres).argmin(1)


def plug_in_information(codes: Tensor, kinds: Tensor) -> float:
    """Plug-in estimate of the mutual information of two discrete variables, in bits; biased upwards for few samples.

    Args:
        codes: [N] int64.
        kinds: [N] int64.
    """
    joint = torch.zeros(int(codes.max()) + 1, int(kinds.max()) + 1, dtype=torch.double)
    joint.index_put_((codes, kinds), torch.ones(len(codes), dtype=torch.double), accumulate=True)
    joint /= joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    positive = joint > 0
    return float((joint[positive] * (joint[positive] / independent[positive]).log2()).sum())


def permuted_information(codes: Tensor, kinds: Tensor, draws: int = 20, seed: int = 0) -> float:
    """Plug-in information by chance: the mean over random pairings of the rows, in bits."""
    random = torch.Generator().manual_seed(seed)
    shuffled = [plug_in_information(codes, kinds[torch.randperm(len(kinds), generator=random)]) for _ in range(draws)]
    return sum(shuffled) / draws


def held_out_information(codes: Tensor, kinds: Tensor, episodes: Tensor, folds: int = 5, prior: float = 8.0) -> float:
    """A lower bound of the mutual information that is not raised by chance, in bits.

    The table p(kind | code) is estimated on some episodes and evaluated on others: the mean of
    log2 p(kind | code) / p(kind). Rows of one episode are correlated, so pairing rows at random corrects too little;
    holding out whole episodes avoids this.

    Args:
        codes: [N] int64.
        kinds: [N] int64.
        episodes: [N] int64.
        folds: number of groups of held-out episodes.
        prior: weight of p(kind) in p(kind | code), in samples.

    Returns:
        The bound; below 0 if the codes carry no information, because the estimated table is then noise.
    """
    size = int(codes.max()) + 1, int(kinds.max()) + 1
    names, gain = episodes.unique(), 0.0
    for fold in range(folds):
        test = torch.isin(episodes, names[fold::folds])
        if not test.any() or test.all():
            continue
        counts = torch.zeros(size, dtype=torch.double)
        counts.index_put_((codes[~test], kinds[~test]), torch.ones(int((~test).sum())).double(), accumulate=True)
        marginal = (counts.sum(0) + 1) / (counts.sum() + size[1])
        conditional = (counts + prior * marginal) / (counts.sum(1, keepdim=True) + prior)
        gain += float((conditional[codes[test], kinds[test]] / marginal[kinds[test]]).log2().sum())
    return gain / len(codes)


def code_action_information(codes: Tensor, table: Table) -> dict[str, float]:
    """Measure how much one code tells about the kind of movement within a task.

    Args:
        codes: [F, N] int64, a row for each row of the table.
        table: demonstrations with their true actions; only rows with a pair count.

    Returns:
        Mean over the N tokens and, by rows, over tasks, in bits: `held_out`, `plug_in`, `permuted`,
        `corrected` (plug_in - permuted); `best_token`: the largest `held_out` of a token; `entropy` of the kinds.
    """
    per_task, weights = [], []
    for task in table["task"].unique():
        rows = (table["valid"] & (table["task"] == task)).nonzero().squeeze(1)
        kinds = movement_kinds(table["action"][rows, :, :3].mean(1))
        own, episodes = codes[rows], table["episode"][rows]
        values = [
            (
                held_out_information(column, kinds, episodes),
                plug_in_information(column, kinds),
                permuted_information(column, kinds),
            )
            for column in own.T
        ]
        entropy = plug_in_information(kinds, kinds)
        tokens = torch.tensor(values, dtype=torch.double)
        per_task.append(torch.cat([tokens, torch.full((len(tokens), 1), entropy).double()], 1))
        weights.append(len(rows))
    share = torch.tensor(weights, dtype=torch.double) / sum(weights)
    tokens = (torch.stack(per_task) * share[:, None, None]).sum(0)
    held_out, plug_in, permuted, entropy = tokens.mean(0).tolist()
    return {
        "held_out": held_out,
        "plug_in": plug_in,
        "permuted": permuted,
        "corrected": plug_in - permuted,
        "best_token": float(tokens[:, 0].max()),
        "entropy": entropy,
    }
