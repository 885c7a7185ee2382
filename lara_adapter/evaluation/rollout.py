"""Episodes of a served policy in a simulator."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LaraArgumentError
from ..serving import PolicyClient
from ..storage.files import write_json
from .chunking import ChunkExecutor
from .environment import Environment, Layout, Observation, Simulator
from .episodes import Episode, run_episodes, run_in_processes
from .film import Film
from .report import EpisodeStore, make_report

__all__ = ["Rollouts"]

logger = logging.getLogger(__name__)


class Rollouts:
    """Evaluates the policy behind a client.

    Each episode is saved when it ends. A second run with the same folder and settings runs only the missing ones, even
    after the server or this process was killed.
    """

    def __init__(
        self, client: PolicyClient, simulator: Simulator, output: Path, *, execute: int | None = None,
        ensemble: float | None = None, rename: Mapping[str, str] | None = None, max_steps: int | None = None,
    ) -> None:  # fmt: skip
        """Ask the server for its policy, and open the folder.

        Args:
            client: connected to the server.
            simulator: where the policy acts.
            output: folder of episodes, videos and report.
            execute: actions of each chunk that are executed before the policy is called again; None: all.
            ensemble: m of ACT's temporal ensemble over chunks, for example 0.01; None: no ensemble.
            rename: policy's name -> simulator's name, of views and states.
            max_steps: most steps of an episode; None: the simulator's limit.

        Raises:
            LaraArgumentError: an argument is out of range, or the folder holds episodes of other settings.
            ServingError: the server does not answer.
        """
        if max_steps is not None and max_steps < 1:
            raise LaraArgumentError(f"max_steps={max_steps} must be at least 1")
        self.client, self.simulator = client, simulator
        self.executor = ChunkExecutor(execute, ensemble)
        self.rename, self.max_steps = dict(rename or {}), max_steps
        self.config = client.get_modality_config()
        described = client.describe()
        # GR00T's own server does not describe itself; it accepts and ignores options, and its policy keeps no state
        self.sends_seed = bool(described.get("options", True))
        self.stateful = bool(described.get("stateful", False))
        self.settings: dict[str, Any] = {
            "policy": described.get("policy", "not told by the server"),
            "server": described.get("server", "not told by the server"),
            "sampling_seed": "sent with every request" if self.sends_seed else "the server's own",
            "simulator": simulator.name,
            "simulator_settings": simulator.settings,
            "execute": self.executor.execute,
            "ensemble": ensemble,
            "rename": self.rename,
            "max_steps": max_steps,
        }
        self.store = EpisodeStore(output, self.settings)

    def run(
        self, tasks: Sequence[str], seeds: Sequence[int], *, videos: int = 0, workers: int = 1, progress: Any = None
    ) -> dict[str, Any]:
        """Run the episodes that have not been run.

        Args:
            tasks: names of tasks.
            seeds: one episode of each task per seed, which decides its start and the policy's sampling noise.
            videos: film this many episodes of each task, from the first on (needs PyAV), except those that an earlier run
                finished without a film; this is logged.
            workers: processes with a simulator each; the report is the same for any number. The policy must not keep
                anything between requests: it gets those of all workers.
            progress: called with (task, seed, result) after each episode, including those of an earlier run.

        Returns:
            The report, which is also written to report.json. How long an episode took is only in its own file.

        Raises:
            LaraArgumentError: an unknown task, several workers for a policy that keeps the state of an episode, or the
                simulator does not offer an input of the policy.
            ServingError: the server failed or went away; finished episodes are kept.
            WorkerDied: a worker was killed, perhaps for lack of memory; finished episodes are kept.
        """
        tasks, known = list(dict.fromkeys(tasks)), self.simulator.tasks()
        unknown = sorted(set(tasks) - set(known))
        if unknown or not tasks or not seeds:
            raise LaraArgumentError(
                f"tasks: {unknown or 'none'}, with {len(seeds)} seeds; {self.simulator.name} has {known}"
            )
        if workers < 1:
            raise LaraArgumentError(f"workers={workers} must be at least 1")
        if workers > 1 and self.stateful:
            raise LaraArgumentError(
                f"workers={workers}: {self.settings['policy']} has reset(), so it may keep an episode's state, which the "
                "episodes of several workers would mix: expected workers=1, or `stateful = False` in the policy's class"
            )
        results: dict[tuple[str, int], dict[str, Any]] = {}
        todo, unfilmed = [], 0
        for task in tasks:
            for number, seed in enumerate(seeds):
                result = self.store.finished(task, seed)
                if result is None:
                    todo.append(Episode(task, seed, number < videos))
                    continue
                results[task, seed] = result
                unfilmed += number < videos and not self.store.video(task, seed).is_file()
                if progress is not None:
                    progress(task, seed, result)
        run = run_episodes(self, todo) if min(workers, len(todo)) < 2 else run_in_processes(self, todo, workers)
        for episode, result in run:
            results[episode.task, episode.seed] = result
            if progress is not None:
                progress(episode.task, episode.seed, result)
        if unfilmed:
            logger.warning(
                "%d of the episodes to film were finished without a film and are not run again: use another output folder, "
                "or delete their files in %s", unfilmed, self.store.folder / "episodes",
            )  # fmt: skip
        report = make_report(self.settings, {task: [results[task, seed] for seed in seeds] for task in tasks})
        write_json(self.store.folder / "report.json", report)
        return report

    def layout(self, environment: Environment) -> Layout:
        """How observations become requests; the environment has been reset.

        Raises:
            LaraArgumentError: the simulator does not offer an input of the policy.
        """
        return Layout(self.config, environment.observe(), self.rename)

    def play(self, environment: Environment, seed: int, layout: Layout, film: Film | None) -> dict[str, Any]:
        """Run one episode in an environment that has been reset, and return its result."""
        begin = time.perf_counter()
        self.client.reset({"seed": seed} if self.sends_seed else None)
        self.executor.reset()
        views = sorted(set(layout.views.values()))
        past: list[Observation] = []
        limit = environment.max_steps if self.max_steps is None else min(self.max_steps, environment.max_steps)
        step, solved, requests, waited = 0, False, 0, 0.0
        while step < limit and not solved:
            call = self.executor.wants_chunk
            if call or layout.history > 1:  # rendering is slow: only when it is needed
                past = [*past, environment.observe(views)][-layout.history :]
            if call:
                since = time.perf_counter()
                options = {"seed": sampling_seed(seed, step)} if self.sends_seed else None
                action, _ = self.client.get_action(layout.request(past), options)
                waited += time.perf_counter() - since
                requests += 1
                self.executor.add(layout.chunk(action, environment.action_width))
            if film is not None:
                film.add(environment.picture)
            solved = environment.step(self.executor.next())
            step += 1
        if film is not None:
            film.add(environment.picture, last=True)
            film.write()
        return {
            "seed": seed,
            "success": solved,
            "steps": step,
            "requests": requests,
            "milliseconds_per_request": round(1000 * waited / max(1, requests), 2),
            "seconds": round(time.perf_counter() - begin, 2),
        }


def sampling_seed(seed: int, step: int) -> int:
    """The seed of the policy's noise at a step of an episode: 63 bits, different at each."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1
