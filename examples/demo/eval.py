"""Evaluate policies: closed-loop success, and the error of their actions on held-out demonstrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples import metaworld_sim
from examples.demo.data import Table, gather, split_seed
from examples.demo.stages import Progress
from examples.metaworld_sim import FRAME_SKIP, frame_seed
from examples.mini_vla import MiniVLA, MiniVLAConfig

FILM_SIZE = 192  # pixels


class ActionShape(Protocol):
    """The chunk that a policy returns: `horizon` actions of `action_dim` numbers."""

    action_dim: int
    horizon: int


class Policy(Protocol):
    """A policy that :func:`closed_loop` can run."""

    config: ActionShape

    def get_action(self, observation: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """Return actions [B, horizon, action_dim] for `image`, `state` and `task`, as `MiniVLA.get_action` does."""


def closed_loop(
    folder: Path,
    progress: Progress,
    *,
    task: str,
    task_index: int,
    policies: dict[str, Path],
    episodes: int,
    filmed: int,
    max_steps: int,
    execute: int,
    distractors: bool,
    seed: int,
    load: Callable[[Path], Policy] | None = None,
) -> None:
    """Run every policy on one task from the same starts, with the same distractors and sampling noise. A job.

    Args:
        folder: gets `success.pt`, {arm: [episodes] bool}, and `film.pt`, {arm: list of [N, 3, H, W] uint8}: the
            scene in a larger picture, the policy's input in the lower right corner.
        progress: called after each episode.
        task: name of the task.
        task_index: the task's number in the policy's input.
        policies: file of the trained policy of each arm.
        episodes: number of episodes of each arm.
        filmed: how many of them are filmed.
        max_steps: steps after which an episode counts as failed.
        execute: actions of a chunk that are executed before the next is sampled.
        distractors: whether the policy's frames have distractors.
        seed: of the run.
        load: reads a policy from its file; None: :func:`load_policy`.
    """
    scene = metaworld_sim.Scene(task, num_envs=min(10, episodes))
    split, success, film = split_seed("evaluation", seed), {}, {}
    for arm, file in policies.items():
        policy = (load or load_policy)(file)
        outcomes: list[bool] = []
        for first in range(0, episodes, len(scene.envs)):
            envs = range(min(len(scene.envs), episodes - first))
            runs = [Run(scene, env, split, first + env, distractors) for env in envs]
            for run in runs:
                run.film = [] if run.start < filmed else None
            for step in range(0, max_steps, execute):
                open_runs = [run for run in runs if not run.solved]
                if not open_runs:
                    break
                observation = {
                    "image": torch.from_numpy(np.stack([run.see(step) for run in open_runs])),
                    "state": torch.from_numpy(np.stack([scene.state(run.observation) for run in open_runs])),
                    "task": torch.full((len(open_runs),), task_index),
                }
                noise = torch.stack([run.noise(step, policy) for run in open_runs])
                for run, chunk in zip(open_runs, policy.get_action(observation, noise).numpy()):
                    run.act(chunk[:execute], step, max_steps)
            outcomes += [run.solved for run in runs]
            film.setdefault(arm, []).extend(torch.from_numpy(np.stack(run.film)) for run in runs if run.film)
            progress(len(runs))
        success[arm] = torch.tensor(outcomes)
    torch.save(success, folder / "success.pt")
    torch.save(film, folder / "film.pt")


@dataclasses.dataclass
class Run:
    """An episode in progress."""

    scene: metaworld_sim.Scene
    env: int
    split: int
    start: int
    distractors: bool
    solved: bool = False
    film: list[NDArray[np.uint8]] | None = None

    def __post_init__(self) -> None:
        self.observation = self.scene.reset(self.split, self.start, self.env)

    def see(self, step: int) -> NDArray[np.uint8]:
        """Return the policy's frame: [3, H, W]."""
        frame = self.scene.render(self.env)
        if not self.distractors:
            return frame
        return metaworld_sim.add_distractors(frame[None], [frame_seed(self.split, self.start, step)])[0]

    def noise(self, step: int, policy: Policy) -> Tensor:
        """Return the sampling noise [T, A] of this start at this step, the same for every arm."""
        random = torch.Generator().manual_seed(frame_seed(self.split, self.start, step))
        return torch.randn(policy.config.horizon, policy.config.action_dim, generator=random)

    def act(self, actions: NDArray[np.float32], step: int, max_steps: int) -> None:
        """Execute actions until none is left, the task is solved or the time is over."""
        for offset, action in enumerate(actions[: max_steps - step]):
            if self.film is not None and (step + offset) % (2 * FRAME_SKIP) == 0:
                picture = self.scene.render(self.env, size=FILM_SIZE)
                inset = self.see(step + offset)
                height, width = inset.shape[1:]
                picture[:, -height - 1 :, -width - 1 :] = 255  # a white edge
                picture[:, -height:, -width:] = inset
                self.film.append(picture)
            self.observation, self.solved = self.scene.step(action, self.env)
            if self.solved:
                return


def load_policy(file: Path) -> MiniVLA:
    """Load a policy for acting."""
    state = torch.load(file, weights_only=True)
    policy = MiniVLA(MiniVLAConfig.from_state_dict(state))
    policy.load_state_dict(state)
    return policy.eval()


def action_error(policy: Policy, table: Table, execute: int, seed: int) -> float:
    """Compute the mean squared error of sampled actions on held-out demonstrations.

    Args:
        policy: the policy.
        table: rows of held-out demonstrations.
        execute: number of actions of each chunk that count: those that would be executed.
        seed: of the sampling noise, which is the same for every policy.

    Returns:
        The error, without padded actions.
    """
    random = torch.Generator().manual_seed(seed)
    total = count = 0.0
    for rows in torch.arange(len(table["valid"])).split(256):
        batch = gather(table, rows)
        noise = torch.randn(batch["action"].shape, generator=random)
        error = (policy.get_action(batch, noise) - batch["action"]).square() * batch["action_mask"]
        total += float(error[:, :execute].sum())
        count += float(batch["action_mask"][:, :execute].sum())
    return total / count
