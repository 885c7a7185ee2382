"""`lara eval`."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from ..errors import HostNotInstalled, LaraArgumentError, ServingTimeout
from ..evaluation.page import write_report_page
from ..evaluation.report import format_report
from ..evaluation.rollout import Rollouts, check_tasks
from ..integrations.simulators import open_simulator
from ..serving import PolicyClient
from ..serving.address import parse_address
from ..storage.files import check_folder
from .arguments import split_pairs, takes
from .credentials import read_token
from .output import write_result

__all__ = ["evaluate"]

logger = logging.getLogger(__name__)


@takes(
    Rollouts.__init__, Rollouts.run, PolicyClient.__init__,
    positional=("tasks",), omit=("client", "seeds", "progress", "timeout_ms", "api_token", "max_message_bytes"),
)  # fmt: skip
def evaluate(
    tasks: tuple[str, ...],
    *,
    output: Path,
    simulator: str = "metaworld",
    episodes: int = 10,
    seed: int = 0,
    host: str,
    port: int | None,
    token_file: Path | None = None,
    timeout_s: float = 30.0,
    wait_s: float = 120.0,
    videos: int,
    workers: int,
    rename: tuple[str, ...] = (),
    setting: tuple[str, ...] = (),
    json: bool = False,
    **arguments: Any,
) -> int:
    """Let a served policy act in a simulator, and count how often it succeeds, with 95 % intervals.

    The server is `lara serve`, or GR00T N1.6's own. A second call with the same output continues the first.
    Exit status: 0; 2 if the server does not answer, fails, or does not fit the simulator.

    Args:
        tasks: of the simulator: drawer-open button-press-topdown; all: every one.
        output: folder for report.json, report.html (extra report), the episodes and videos.
        simulator: metaworld, libero (extra libero) or simpler, which you install and which is tested only with a mock.
        episodes: of each task.
        seed: of the first episode; each further one has the next. It decides the start and the policy's noise.
        timeout_s: longest wait for one answer.
        wait_s: longest wait for a server that is still loading.
        rename: POLICY=SIMULATOR, for views and states that have different names.
        setting: KEY=VALUE for the simulator: image_size=224, suite=libero_10, quality=fast, privileged=true.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it reports an accelerator that nobody needs
    if episodes < 1 or seed < 0:
        raise LaraArgumentError(f"episodes={episodes} must be at least 1, and seed={seed} at least 0")
    check_folder("output", output)
    parse_address(host, port)  # refused before the simulator is opened
    pairs = split_pairs("setting", setting).items()
    world = open_simulator(simulator, **{key: _parse(value) for key, value in pairs})
    names = check_tasks(world, world.tasks() if tasks == ("all",) else tasks)  # before a long wait for the server
    with PolicyClient(host, port, timeout_ms=int(1000 * timeout_s), api_token=read_token(token_file)) as client:
        try:
            client.wait_until_ready(min(1.0, wait_s))
        except ServingTimeout:
            logger.info("no server answers at %s yet; waiting for up to %g s", client.address, wait_s)
            client.wait_until_ready(wait_s)
        rollouts = Rollouts(client, world, output, rename=split_pairs("rename", rename), **arguments)
        with _Progress(len(names) * episodes) as progress:
            report = rollouts.run(
                names, range(seed, seed + episodes), videos=videos, workers=workers, progress=progress
            )
    written = str(output / "report.json")
    try:
        written += f"\n{write_report_page(report, output)}"
    except HostNotInstalled as error:
        logger.info("%s", error)
    write_result(report, f"{format_report(report)}\n\n{written}", json)
    return 0


def _parse(value: str) -> int | bool | str:
    return int(value) if value.isdecimal() else {"true": True, "false": False}.get(value.lower(), value)


class _Progress:
    """A tqdm bar, where tqdm is installed."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="episode", disable=None)
        self._solved = self._done = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, task: str, seed: int, result: dict[str, Any]) -> None:
        self._solved, self._done = self._solved + result["success"], self._done + 1
        if self._bar is not None:
            self._bar.set_postfix_str(f"{task}, {self._solved}/{self._done} solved", refresh=False)
            self._bar.update()
