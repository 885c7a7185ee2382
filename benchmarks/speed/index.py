"""What the index of `lara train-lam` costs as a collection grows: memory of a process, and what the first step waits for.

    git worktree add ../before 2ce8ee7      # an index that held every frame of every episode
    python -m benchmarks.speed.index --before ../before        # --table prints the record

A made-up dataset of episodes of 300 frames, a file each; their scans are made up too, so that nothing is decoded. Each
measurement is a process of its own that indexes, draws one batch and then looks at its memory: resident beyond what it
was with everything imported, and the highest on the way. Frames scanned before the first batch are those that would have
had to be decoded. A line of the record is one measurement; those that are there are not made again.

    before   the release before: whole, every frame of every episode in memory
    whole    --index whole
    ahead    --index ahead: what is needed first
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT, markdown
from benchmarks.speed.measure import environment

RESULT = RESULTS / "index.jsonl"
FRAMES = 300
CHILD = """
import ctypes, gc, importlib, json, sys, tempfile, threading, time
from pathlib import Path
import numpy as np, torch
from lara_adapter.data import IndexSettings, PairStream, Segment, Source, build_index
from lara_adapter.data import pairs
from lara_adapter.data.scan import Scan

arm, count, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
where = importlib.import_module("lara_adapter.data." + ("index" if arm == "before" else "indexed"))
frames, scanned, lock = np.arange(length), 0, threading.Lock()

def scan():
    nothing = np.zeros(length, np.float32)
    future = np.where(frames + 5 < length, frames + 5, -1).astype(np.int32)
    keys = frames % 30 == 0
    return Scan(frames * 512, frames / 30, keys, np.zeros(length, bool), nothing, future, nothing + 1)

def load_scan(source, gap, folder, key=""):
    global scanned
    with lock:
        scanned += length
    return scan(), 0

def read_frames(source, pts, keys, numbers, size, decoder="av"):
    return np.zeros((len(numbers), size, size, 3), np.uint8)

where.load_scan, pairs.read_frames = load_scan, read_frames
if arm != "before":
    where.read_scan = lambda folder, key: scan()

def resident(field):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines[field].split()[0]) / 1e3

root = Path("/data/set")
def make(number):
    path = root / f"videos/chunk-{number // 1000:03d}/observation.images.top/episode_{number:06d}.mp4"
    return Source(path, segments=(Segment(f"{root}#{number}", number, 0.0, length / 30, length),), root=root)

folder = Path(tempfile.mkdtemp())
torch.zeros(1)
Path("/proc/self/clear_refs").write_text("5")
begin = resident("VmRSS")
sources = [make(number) for number in range(count)]
listed = resident("VmRSS")
start = time.perf_counter()
settings = IndexSettings()
if arm == "ahead":
    from lara_adapter.data.ahead import AheadIndex
    index = AheadIndex(sources, settings, folder)
    stream = PairStream(index.sources, 8, 8, order=index)
else:
    index = build_index(sources, settings, folder)
    stream = PairStream(index.sources, 8, 8)
del sources
batches = stream.batches()
next(batches)
seconds, looked_at = time.perf_counter() - start, scanned
batches.close()
print(json.dumps({
    "resident_mb": resident("VmRSS") - begin, "peak_mb": resident("VmHWM") - begin, "sources_alone_mb": listed - begin,
    "seconds": seconds, "frames_scanned": looked_at,
}))
"""


def measure(arm: str, episodes: int, checkout: Path) -> dict[str, Any]:
    """One line of the record."""
    command = [sys.executable, "-c", CHILD, arm, str(episodes), str(FRAMES)]
    variables = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=checkout)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = {name: round(value, 2) for name, value in json.loads(done.stdout).items()}
    return {"arm": arm, "episodes": episodes, "frames": FRAMES, **found, "environment": environment("cpu")}


def read() -> list[dict[str, Any]]:
    """The lines of the record."""
    return [json.loads(line) for line in RESULT.read_text().splitlines()] if RESULT.is_file() else []


def section() -> str:
    """The table of the committed record."""
    rows = [
        (f"{line['episodes']:,}", line["arm"], f"{line['resident_mb']:.0f}", f"{line['peak_mb']:.0f}",
         f"{line['frames_scanned']:,}", f"{line['seconds']:.1f}")
        for line in sorted(read(), key=lambda line: line["episodes"])
    ]  # fmt: skip
    head = ["episodes", "index", "resident MB", "peak MB", "frames scanned before the first batch", "seconds besides"]
    return markdown.table(head, rows)


SECTIONS = {"benchmarks/README.md": {"index": section}}


def main() -> int:
    """Measure what is missing, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of an earlier release to measure as well")
    parser.add_argument("--episodes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--table", action="store_true", help="print the record")
    arguments = parser.parse_args()
    if arguments.table:
        print(section())
        return 0
    known = {(line["arm"], line["episodes"]) for line in read()}
    checkouts = {"whole": ROOT, "ahead": ROOT}
    if arguments.before is not None:
        checkouts["before"] = arguments.before.resolve()
    for episodes in arguments.episodes:
        for arm, checkout in checkouts.items():
            if (arm, episodes) not in known:
                line = measure(arm, episodes, checkout)
                with RESULT.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    print(section())
    return 0


if __name__ == "__main__":
    sys.exit(main())
