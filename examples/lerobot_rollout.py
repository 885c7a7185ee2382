"""Closed-loop evaluation of a stock LeRobot policy in Meta-World, through LeRobot's own processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from metaworld_sim import Scene
from numpy.typing import NDArray
from PIL import Image
from record_metaworld import CAMERA, World, describe, progress_bar, splits

from lara_adapter.evaluation import wilson_interval

FILM_SIZE, FILM_SKIP = 192, 2  # pixels; steps between two pictures
SHOWN = 12  # pictures on the contact sheet


def closed_loop(
    policy: Any, preprocessor: Any, postprocessor: Any, world: World, *, episodes: int, max_steps: int, film: Path
) -> dict[str, Any]:
    """Evaluate a policy from starts that are not in its training data.

    Args:
        policy: in eval mode.
        preprocessor: the policy's own.
        postprocessor: the policy's own.
        world: what the policy was trained in.
        episodes: of each task.
        max_steps: steps after which an episode counts as failed.
        film: folder for `rollout.mp4` and `rollout.png`, the first episode of the first task.

    Returns:
        `tasks`: successes, episodes, rate and its 95 % Wilson interval of each task; `all`: the same over all tasks.
    """
    successes = {}
    _, split = splits(world.seed)
    pictures: list[NDArray[np.uint8]] = []
    with progress_bar(episodes * len(world.tasks), "closed loop", unit="episode") as bar:
        for task in world.tasks:
            scene, outcomes = Scene(task, num_envs=min(10, episodes), image_size=world.image_size), []
            for first in range(0, episodes, len(scene.envs)):
                envs = range(min(len(scene.envs), episodes - first))
                filmed = pictures if task == world.tasks[0] and first == 0 else None
                actor = _Actor(policy, preprocessor, postprocessor, describe(task))
                outcomes += _run_episodes(scene, actor, world, split, first, envs, max_steps, filmed)
                bar.update(len(envs))
            scene.close()
            successes[task] = sum(outcomes)
    _write_film(pictures, film)
    result = {task: _rate(count, episodes) for task, count in successes.items()}
    return {"tasks": result, "all": _rate(sum(successes.values()), episodes * len(world.tasks))}


class _Actor:
    """One policy acting in several environments, which share its action queue and so stay in step."""

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any, instruction: str) -> None:
        self.policy, self.preprocessor, self.postprocessor = policy, preprocessor, postprocessor
        self.instruction = instruction
        for part in (policy, preprocessor, postprocessor):
            part.reset()

    @torch.inference_mode()
    def act(self, frames: NDArray[np.uint8], states: NDArray[np.float32]) -> NDArray[np.float32]:
        """Choose one action [N, 4] for frames [N, 3, H, W] and states [N, 4]."""
        observation = {
            CAMERA: torch.from_numpy(frames).float() / 255,
            "observation.state": torch.from_numpy(states),
            "task": [self.instruction] * len(frames),
        }
        action = self.postprocessor(self.policy.select_action(self.preprocessor(observation)))
        return action.float().cpu().numpy().clip(-1, 1)


def _run_episodes(
    scene: Scene,
    actor: _Actor,
    world: World,
    split: int,
    first: int,
    envs: range,
    max_steps: int,
    film: list[NDArray[np.uint8]] | None,
) -> list[bool]:
    """Run one episode in each environment; returns whether each was solved."""
    observations = [scene.reset(split, first + env, env) for env in envs]
    frames = [scene.render(env) for env in envs]
    solved = [False for _ in envs]
    for step in range(max_steps):
        if all(solved):
            break
        for env in envs:  # a solved environment keeps its last frame in the batch
            if not solved[env]:
                frames[env] = world.see(scene.render(env)[None], split, first + env, step)[0]
        actions = actor.act(np.stack(frames), np.stack([scene.state(observation) for observation in observations]))
        if film is not None and not solved[0] and step % FILM_SKIP == 0:
            film.append(scene.render(0, size=FILM_SIZE).transpose(1, 2, 0))
        for env in envs:
            if not solved[env]:
                observations[env], solved[env] = scene.step(actions[env], env)
    if film is not None:
        film.append(scene.render(0, size=FILM_SIZE).transpose(1, 2, 0))
    return solved


def _rate(successes: int, episodes: int) -> dict[str, Any]:
    interval = wilson_interval(successes, episodes)
    return {"successes": successes, "episodes": episodes, "rate": successes / episodes, "interval_95": list(interval)}


def _write_film(pictures: list[NDArray[np.uint8]], folder: Path) -> None:
    from lerobot.utils.io_utils import write_video

    write_video(folder / "rollout.mp4", pictures, fps=20)
    stills = [pictures[i] for i in np.linspace(0, len(pictures) - 1, SHOWN).round().astype(int)]
    rows = [np.concatenate(stills[i : i + SHOWN // 2], axis=1) for i in (0, SHOWN // 2)]
    Image.fromarray(np.concatenate(rows)).save(folder / "rollout.png")
