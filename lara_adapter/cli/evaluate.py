"""`lara eval`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import LaraArgumentError, ServingTimeout

__all__ = ["evaluate"]

logger = logging.getLogger(__name__)


def evaluate(
    tasks: tuple[str, ...],
    /,
    *,
    output: Path,
    simulator: str = "metaworld",
    episodes: int = 10,
    seed: int = 0,
    host: str = "127.0.0.1",
    port: int = 5555,
    token_file: Path | None = None,
    timeout_s: float = 30.0,
    wait_s: float = 120.0,
    execute: int | None = None,
    ensemble: float | None = None,
    max_steps: int | None = None,
    videos: int = 0,
    rename: tuple[str, ...] = (),
    setting: tuple[str, ...] = (),
    json: bool = False,
) -> int:
    """Let a served policy act in a simulator, and count how often it succeeds, with 95 % intervals.

    The server is `lara serve`, or GR00T N1.6's own. A second call with the same output goes on where the first ended.
    Exit status: 0; 2 if the server does not answer, fails, or does not fit the simulator.

    Args:
        tasks: of the simulator: drawer-open button-press-topdown; all: every one.
        output: folder that gets report.json, the episodes and videos.
        simulator: metaworld, libero or simpler; the last two must be installed by you.
        episodes: of each task.
        seed: of the first episode; each further one has the next. It decides the start and the policy's noise.
        host: of the server.
        port: of the server.
        token_file: file with the server's token; without it LARA_API_TOKEN of the environment, if set.
        timeout_s: longest wait for one answer.
        wait_s: longest wait for a server that is still loading.
        execute: actions of each chunk that are done before the policy is asked again; without it all.
        ensemble: m of ACT's temporal ensemble over chunks, for example 0.01; without it none.
        max_steps: of an episode; without it the simulator's.
        videos: film so many episodes of each task (needs PyAV), of those that have not been run yet.
        rename: POLICY=SIMULATOR, for views and states that have different names.
        setting: KEY=VALUE for the simulator: image_size=224, suite=libero_10.
        json: print JSON instead of a table.
    """
    from ..evaluation.report import format_report
    from ..evaluation.rollout import Rollouts
    from ..integrations.simulators import open_simulator
    from ..serving import PolicyClient
    from .output import to_json, write
    from .serve import read_token

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it tells of an accelerator that nobody needs
    if episodes < 1 or seed < 0:
        raise LaraArgumentError(f"episodes={episodes} must be at least 1, and seed={seed} at least 0")
    world = open_simulator(simulator, **_settings(setting))
    with PolicyClient(host, port, timeout_ms=int(1000 * timeout_s), api_token=read_token(token_file)) as client:
        try:
            client.wait_until_ready(min(1.0, wait_s))
        except ServingTimeout:
            logger.info("no server answers at %s yet; waiting for up to %g s", client.address, wait_s)
            client.wait_until_ready(wait_s)
        rollouts = Rollouts(
            client, world, output, execute=execute, ensemble=ensemble, max_steps=max_steps,
            rename=_pairs("rename", rename),
        )  # fmt: skip
        chosen = world.tasks() if list(tasks) == ["all"] else list(tasks)
        with _bar(len(chosen) * episodes) as advance:
            report = rollouts.run(chosen, range(seed, seed + episodes), videos=videos, progress=advance)
    write(to_json(report) if json else f"{format_report(report)}\n\n{output / 'report.json'}")
    return 0


class _bar:  # noqa: N801  (used as a function)
    """A tqdm bar, where tqdm is installed."""

    def __init__(self, total: int) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(total=total, unit="episode", disable=None)
        self._solved = self._done = 0

    def __enter__(self) -> _bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, task: str, seed: int, result: dict[str, Any]) -> None:
        self._solved, self._done = self._solved + result["success"], self._done + 1
        if self._bar is not None:
            self._bar.set_postfix_str(f"{task}, {self._solved}/{self._done} solved", refresh=False)
            self._bar.update()


def _pairs(name: str, given: tuple[str, ...]) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in given]
    wrong = [entry for entry, (key, sign, value) in zip(given, pairs) if not (key and sign and value)]
    if wrong:
        raise LaraArgumentError(f"{name}: {wrong} is not of the form NAME=VALUE")
    return {key: value for key, _, value in pairs}


def _settings(given: tuple[str, ...]) -> dict[str, Any]:
    """Numbers as numbers, everything else as text."""
    return {key: int(value) if value.isdecimal() else value for key, value in _pairs("setting", given).items()}
