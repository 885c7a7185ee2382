"""What the README says about serving is what benchmarks/results/serving.json holds."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks/results/serving.json").read_text())


def test_the_long_run_was_clean():
    soak = RECORD["soak"]
    assert soak["seconds"] >= 600
    assert soak["clients"] == 8
    assert soak["unexpected_errors"] == []
    assert soak["hanging_clients"] == 0
    assert min(soak["gave_up"], soak["refused"], soak["new_clients"]) > 50
    memory = soak["server_rss_mb"]
    assert memory["largest"] < 1.03 * memory["after_warm_up"]


def test_both_pairs_were_measured_side_by_side():
    for name in ("instant_policy", "policy_of_50_ms"):
        assert {"direct", "ours", "gr00t"} <= RECORD[name].keys()
        for arm in ("ours", "gr00t"):
            median, low, high = RECORD[name][arm]["p50_over_direct"]
            assert low <= median <= high
            assert RECORD[name][arm]["p50_ms"] <= RECORD[name][arm]["p99_ms"]


def test_the_readme_quotes_the_record():
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Serve and evaluate")[1].split("\n## ")[0]
    for line in quoted(RECORD):
        assert line in section


def spread(values: list[float]) -> str:
    """A median and its range, as the README writes them."""
    median, low, high = values
    return f"{median:.2f} ({low:.2f} - {high:.2f})"


def quoted(record: dict) -> list[str]:
    """The sentences and rows with numbers."""
    lines = []
    slow, instant = record["policy_of_50_ms"], record["instant_policy"]
    p99 = slow["ours"]["p99_ms"] / slow["direct"]["p99_ms"]
    lines.append(
        f"| takes 50 ms | {spread(slow['ours']['p50_over_direct'])} | {p99:.2f} | "
        f"{spread(slow['ours']['p50_over_gr00t'])} | {slow['ours']['cpu_over_gr00t']:.2f} |"
    )
    lines.append(
        f"| answers at once | | | {spread(instant['ours']['p50_over_gr00t'])} | {instant['ours']['cpu_over_gr00t']:.2f} |"
    )
    rate = slow["ours"]["requests_per_second"] / slow["direct"]["requests_per_second"]
    lines.append(f"One client of the policy that takes 50 ms gets {rate:.2f} of the requests a second")
    soak, memory = record["soak"], record["soak"]["server_rss_mb"]
    lines.append(
        f"{soak['requests']:,} requests in {soak['seconds'] / 60:.0f} minutes, {len(soak['unexpected_errors'])} errors"
    )
    lines.append(f"{memory['after_warm_up']:.0f} MB after warm-up, {memory['at_the_end']:.0f} MB at the end")
    lines.append(f"for eight clients: {spread(record['eight_clients']['ours']['over_gr00t'])} of GR00T's")
    return lines


if __name__ == "__main__":
    import sys

    sys.stdout.write("\n".join(quoted(RECORD)) + "\n")
