"""What the socket costs: latency and throughput against calling the policy directly, and a long run with 8 clients.

    python -m benchmarks.speed.serving                                       # ours alone
    LARA_GR00T_SRC=PATH python -m benchmarks.speed.serving                   # beside GR00T's own server and client
    python -m benchmarks.speed.serving --soak 600                            # 8 clients for ten minutes

The observation is that of a robot: two uint8 views of 256 x 256 and a state of 8 numbers; the answer is a chunk of 16
actions of 7. Server and client are processes of their own. The arms take turns in each round, so that what else the
machine does meets all of them; a ratio is the median of the rounds' ratios. Results: benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import RESULTS, markdown
from benchmarks.checkout import add_checkout
from lara_adapter.errors import ServingError, ServingTimeout
from lara_adapter.serving import PolicyClient, PolicyServer
from lara_adapter.storage.files import read_json, write_json

RESULT = RESULTS / "serving.json"
TOKEN = "benchmark"
THINKS = 0.05  # seconds of the policy that is not instant: about what a GPU takes for a chunk of a 3B policy


class Policy:
    """Answers at once, or after `seconds`; the answer is made of the observation."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def get_action(
        self, observation: dict[str, Any], options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A chunk [1, 16, 7] that holds the first number of the state."""
        time.sleep(self.seconds + (options or {}).get("sleep", 0.0))
        return {"action": np.full((1, 16, 7), observation["state"]["state"].flat[0], np.float32)}, {}

    def reset(self, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """GR00T's server wants one."""
        return {}


def observation(value: float = 0.0) -> dict[str, Any]:
    """Two views and a state."""
    random = np.random.default_rng(0)
    return {
        "video": {view: random.integers(0, 255, (1, 1, 256, 256, 3), dtype=np.uint8) for view in ("front", "wrist")},
        "state": {"state": np.full((1, 1, 8), value, np.float32)},
        "language": {"task": [["put the red block on the plate"]]},
    }


# ---------------------------------------------------------------------- processes


def serve(arm: str, seconds: float) -> None:
    """The server's process; prints its port."""
    if arm == "gr00t":
        from gr00t.policy.server_client import PolicyServer as Theirs

        theirs = Theirs(Policy(seconds), host="127.0.0.1", port="*", api_token=TOKEN)
        sys.stdout.write(theirs.socket.getsockopt_string(32).rpartition(":")[2] + "\n")  # 32: ZMQ_LAST_ENDPOINT
        sys.stdout.flush()
        with contextlib.redirect_stdout(sys.stderr):
            theirs.run()
        return
    with PolicyServer(Policy(seconds), port=0, api_token=TOKEN, allow_kill=True) as server:
        sys.stdout.write(f"{server.port}\n")
        sys.stdout.flush()
        server.run()


@contextlib.contextmanager
def server_process(arm: str, seconds: float = 0.0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server in a process of its own, and its port."""
    command = [sys.executable, "-m", "benchmarks.speed.serving", "--serve", arm, "--seconds", str(seconds)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    try:
        yield child, int(child.stdout.readline())
    finally:
        child.kill()
        child.wait()


def connect(arm: str, port: int) -> Any:
    """The client that belongs to a server."""
    if arm == "gr00t":
        from gr00t.policy.server_client import PolicyClient as Theirs

        return Theirs("127.0.0.1", port, api_token=TOKEN)
    return PolicyClient(port=port, api_token=TOKEN)


# ---------------------------------------------------------------------- latency and throughput


def timed(call: Callable[[Any], Any], requests: int) -> list[float]:
    """Milliseconds of each call."""
    given, took = observation(), []
    for _ in range(requests):
        begin = time.perf_counter()
        call(given)
        took.append(1000 * (time.perf_counter() - begin))
    return took


def latency(arms: list[str], rounds: int, requests: int, seconds: float) -> dict[str, Any]:
    """One client after the other; p50 and p99 over all rounds, ratios as medians over rounds."""
    import psutil

    servers: dict[str, psutil.Process] = {}
    spent = dict.fromkeys(["direct", *arms], 0.0)  # CPU seconds of client and server

    def clock(arm: str) -> float:
        of_server = sum(servers[arm].cpu_times()[:2]) if arm in servers else 0.0
        return time.process_time() + of_server

    with contextlib.ExitStack() as stack:
        calls: dict[str, Callable[[Any], Any]] = {"direct": Policy(seconds).get_action}
        for arm in arms:
            child, port = stack.enter_context(server_process(arm, seconds))
            servers[arm] = psutil.Process(child.pid)
            calls[arm] = connect(arm, port).get_action
        for call in calls.values():
            timed(call, 5)
        took: dict[str, list[list[float]]] = {arm: [] for arm in calls}
        for number in range(rounds):
            order = list(calls)
            for arm in order[number % len(order) :] + order[: number % len(order)]:
                begin = clock(arm)
                took[arm].append(timed(calls[arm], requests))
                spent[arm] += clock(arm) - begin
    result: dict[str, Any] = {
        arm: {
            "p50_ms": round(float(np.percentile(np.concatenate(rows), 50)), 3),
            "p99_ms": round(float(np.percentile(np.concatenate(rows), 99)), 3),
            "cpu_ms_per_request": round(1000 * spent[arm] / (rounds * requests), 3),
            "requests_per_second": round(1000 / float(np.mean(np.concatenate(rows))), 1),
        }
        for arm, rows in took.items()
    }
    for arm in arms:
        result[arm]["p50_over_direct"] = _ratio(took[arm], took["direct"])
    if "gr00t" in arms:
        result["ours"]["p50_over_gr00t"] = _ratio(took["ours"], took["gr00t"])
        result["ours"]["cpu_over_gr00t"] = round(spent["ours"] / spent["gr00t"], 3)
    return result


def _ratio(rows: list[list[float]], others: list[list[float]]) -> list[float]:
    """Median, smallest and largest of the rounds' ratios of medians."""
    ratios = sorted(statistics.median(a) / statistics.median(b) for a, b in zip(rows, others))
    return [round(value, 4) for value in (statistics.median(ratios), ratios[0], ratios[-1])]


def throughput(arms: list[str], clients: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Requests a second of several clients of an instant policy, each in a thread."""
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    with contextlib.ExitStack() as stack:
        ports = {arm: stack.enter_context(server_process(arm))[1] for arm in arms}
        for _ in range(rounds):
            for arm in arms:
                counts = [0] * clients
                end = time.monotonic() + seconds

                def ask(index: int, arm: str = arm, counts: list[int] = counts, end: float = end) -> None:
                    client, given = connect(arm, ports[arm]), observation()
                    while time.monotonic() < end:
                        client.get_action(given)
                        counts[index] += 1

                threads = [threading.Thread(target=ask, args=(index,)) for index in range(clients)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                rates[arm].append(sum(counts) / seconds)
    result: dict[str, Any] = {
        arm: {"requests_per_second": round(statistics.median(row), 1)} for arm, row in rates.items()
    }
    if "gr00t" in arms:
        ratios = sorted(a / b for a, b in zip(rates["ours"], rates["gr00t"]))
        result["ours"]["over_gr00t"] = [round(value, 4) for value in (statistics.median(ratios), ratios[0], ratios[-1])]
    return result


# ---------------------------------------------------------------------- the long run


def soak(seconds: float, clients: int, pause: float) -> dict[str, Any]:
    """Clients for a long time: 0 gives up now and then, 1 sends an invalid observation, 2 comes back as a new client."""
    import psutil

    done, expected, problems = [0] * clients, {"gave_up": 0, "refused": 0, "new_clients": 0}, list[str]()
    end = time.monotonic() + seconds
    with server_process("ours") as (child, port):

        def act(index: int) -> None:
            client, turn = connect("ours", port), 0
            while time.monotonic() < end:
                turn += 1
                value = float(100_000 * index + turn % 1000)
                given = observation(value)
                if index == 0 and turn % 20 == 0:
                    try:
                        slow = {"observation": given, "options": {"sleep": 0.02}}
                        client.call_endpoint("get_action", slow, timeout_ms=5)
                    except ServingTimeout:
                        expected["gave_up"] += 1
                if index == 1 and turn % 20 == 0:
                    try:
                        client.get_action({"state": "rubbish"})
                        problems.append("rubbish was answered")
                    except ServingError:
                        expected["refused"] += 1
                if index == 2 and turn % 50 == 0:
                    client.close()
                    client = connect("ours", port)
                    expected["new_clients"] += 1
                if client.get_action(given)[0]["action"][0, 0, 0] != value:
                    problems.append("the answer to another request")
                done[index] += 1
                time.sleep(pause)
            client.close()

        def guarded(index: int) -> None:
            try:
                act(index)
            except Exception as error:
                problems.append(f"client {index}: {type(error).__name__}: {error}"[:300])

        threads = [threading.Thread(target=guarded, args=(index,)) for index in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(0.1 * seconds)  # warm-up
        server, memory = psutil.Process(child.pid), list[int]()
        while time.monotonic() < end:
            memory.append(server.memory_info().rss)
            time.sleep(min(1.0, seconds / 50))
        for thread in threads:
            thread.join(60)
        hanging = sum(thread.is_alive() for thread in threads)
        return {
            "seconds": seconds,
            "clients": clients,
            "pause_between_requests_s": pause,
            "requests": sum(done),
            "requests_of_each_client": [min(done), max(done)],
            **expected,
            "unexpected_errors": problems[:10],
            "hanging_clients": hanging,
            "server_rss_mb": {
                "after_warm_up": round(memory[0] / 2**20, 2),
                "at_the_end": round(memory[-1] / 2**20, 2),
                "largest": round(max(memory) / 2**20, 2),
            },
            "server_open_files": server.num_fds(),
        }


def section() -> str:
    """The table and sentences of the committed record."""
    record = read_json(RESULT)
    slow, instant, soaked = record["policy_of_50_ms"], record["instant_policy"], record["soak"]
    p99 = slow["ours"]["p99_ms"] / slow["direct"]["p99_ms"]
    rate = slow["ours"]["requests_per_second"] / slow["direct"]["requests_per_second"]
    memory = soaked["server_rss_mb"]

    def beside_gr00t(ours: dict[str, Any]) -> tuple[str, str]:
        return markdown.spread(*ours["p50_over_gr00t"]), f"{ours['cpu_over_gr00t']:.2f}"

    rows = [
        ("takes 50 ms", markdown.spread(*slow["ours"]["p50_over_direct"]), f"{p99:.2f}", *beside_gr00t(slow["ours"])),
        ("answers at once", "", "", *beside_gr00t(instant["ours"])),
    ]
    head = ("policy", "p50, our socket / called directly", "p99, likewise", "p50, ours / GR00T's own pair",
            "CPU time, ours / GR00T's")  # fmt: skip
    reading = markdown.paragraph(
        f"""So ours is a little slower than GR00T's, which checks less. One client of the policy that takes 50 ms
        gets {rate:.2f} of the requests a second that it gets without a socket. Requests a second for eight clients:
        {markdown.spread(*record["eight_clients"]["ours"]["over_gr00t"])} of GR00T's, too noisy to tell. Eight
        clients, of which one gives up now and then, one sends rubbish and one comes and goes:
        {soaked["requests"]:,} requests in {soaked["seconds"] / 60:.0f} minutes, {len(soaked["unexpected_errors"])}
        errors; the server's memory: {memory["after_warm_up"]:.0f} MB after warm-up, {memory["at_the_end"]:.0f} MB
        at the end."""
    )
    return f"{markdown.table(head, rows)}\n\n{reading}"


SECTIONS = {"docs/serve.md": {"serving": section}}


def problems() -> Iterator[str]:
    """A long run that was too short, or not clean."""
    soaked = read_json(RESULT)["soak"]
    memory = soaked["server_rss_mb"]
    clean = not soaked["unexpected_errors"] and not soaked["hanging_clients"]
    busy = soaked["seconds"] >= 600 and min(soaked[key] for key in ("gave_up", "refused", "new_clients")) > 50
    if not (clean and busy and soaked["clients"] == 8 and memory["largest"] < 1.03 * memory["after_warm_up"]):
        yield f"{RESULT.name}: the long run: {soaked}"


def main() -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="only the long run with 8 clients")
    parser.add_argument("--pause", type=float, default=0.02, help="of each client of the long run, between requests")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--requests", type=int, default=150, help="of each arm in each round")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if checkout := os.environ.get("LARA_GR00T_SRC"):
        add_checkout(checkout, "NVIDIA Isaac GR00T", contains="gr00t/__init__.py")
    if given.serve:
        serve(given.serve, given.seconds)
        return 0
    results = read_json(given.output) if given.output.is_file() else {}
    if given.soak:
        results["soak"] = soak(given.soak, 8, given.pause)
        print(results["soak"])
    else:
        arms = ["ours", "gr00t"] if checkout else ["ours"]
        results["machine"] = {
            "cpu_cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__,
            "pyzmq": __import__("zmq").__version__, "msgpack": ".".join(map(str, __import__("msgpack").version)),
            "load_average": round(os.getloadavg()[0], 1),
            "note": "shared with other work: the milliseconds are not those of a quiet machine",
        }  # fmt: skip
        results["settings"] = {"rounds": given.rounds, "requests": given.requests, "policy_seconds": THINKS}
        results["instant_policy"] = latency(arms, given.rounds, given.requests, 0.0)
        results["policy_of_50_ms"] = latency(arms, given.rounds, max(10, given.requests // 5), THINKS)
        results["eight_clients"] = throughput(arms, 8, 3.0, given.rounds)
        for name in ("instant_policy", "policy_of_50_ms", "eight_clients"):
            print(name, results[name])
    write_json(given.output, results)
    return 1 if given.soak and (results["soak"]["unexpected_errors"] or results["soak"]["hanging_clients"]) else 0


if __name__ == "__main__":
    sys.exit(main())
