"""Put the recorded results into benchmarks/README.md, between its markers, and draw the pictures of them.

python benchmarks/readme.py            # --check: only say whether it is up to date
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "benchmarks"):
    sys.path.insert(0, str(folder))

from lara_adapter.storage.files import read_json  # noqa: E402

README = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


@functools.cache
def _summaries() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The groups of rows and their summaries, whose bootstrap takes seconds and which two sections need."""
    from benchmarks.success import report as success_report

    groups = success_report.groups_at(success_report.ROWS)
    return {name: (rows, success_report.summarise(rows)) for name, rows in groups.items()}


def success() -> str:
    """Tables of the main arms, one for each group of rows, and what difference they could have shown."""
    from benchmarks.success import report as success_report

    parts = []
    for name, (rows, summary) in _summaries().items():
        parts.append(f"**{name[0].upper()}{name[1:]}**")
        parts.append(success_report.table(summary))
        parts.append(success_report.power(rows))
    return "\n\n".join(parts)


def ablations() -> str:
    """Table of the ablations, by group of rows."""
    from benchmarks.success import report as success_report

    tables = {name: success_report.ablation_table(summary) for name, (_, summary) in _summaries().items()}
    found = [f"{name}:\n\n{table}" for name, table in tables.items() if table]
    return "\n\n".join(found) if found else "No row is recorded yet."


def overhead() -> str:
    """Table of what LARA adds to a training step."""
    from benchmarks.speed import step_overhead

    return step_overhead.table(read_json(step_overhead.RESULT)["rows"])


def growth() -> str:
    """Table of cost as the work grows."""
    from benchmarks.speed import growth

    return growth.table(read_json(growth.RESULT))


SECTIONS: dict[str, Callable[[], str]] = {
    "success": success,
    "ablations": ablations,
    "overhead": overhead,
    "growth": growth,
}


def filled(text: str) -> str:
    """The page with each section made anew from the records."""
    marks = {name: (f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->") for name in SECTIONS}
    for begin, end in marks.values():
        if end not in text.partition(begin)[2]:
            raise ValueError(f"{README.name} has no section between {begin.strip()} and {end}")
    for name, section in SECTIONS.items():
        begin, end = marks[name]
        before, _, rest = text.partition(begin)
        text = before + begin + section() + "\n" + rest[rest.index(end) :]
    return text


def main() -> int:
    """Write the page, or check it."""
    text = README.read_text()
    fresh = filled(text)
    if "--check" in sys.argv[1:]:
        if fresh != text:
            sys.stderr.write(f"{README} is not what the records say: run python benchmarks/readme.py\n")
        return int(fresh != text)
    README.write_text(fresh)
    from benchmarks.success import report as success_report

    sys.argv = sys.argv[:1]
    pictures = success_report.main()
    missing = [name for name in re.findall(r"\]\((results/[^)]+\.png)\)", fresh) if not (README.parent / name).exists()]
    if missing:
        sys.stderr.write(f"pictures that the page shows are not there: {', '.join(missing)}\n")
    return int(bool(missing)) or pictures


if __name__ == "__main__":
    sys.exit(main())
