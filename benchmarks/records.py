"""Make the tables and numbers of the documents from the records, or check that they are what the records say.

    python -m benchmarks.records --check     # exit status 1, with a diff, where a document or a summary is not
    python -m benchmarks.records --write

A document holds them between `<!-- NAME: begin -->` and `<!-- NAME: end -->`. Each module of MAKERS has SECTIONS,
document -> name -> function that returns the text, and may have `problems()`, which reports what is wrong with a record
or with a file made from it.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator

from benchmarks import RESULTS, ROOT

MAKERS = (
    "benchmarks.success.report",
    "benchmarks.success.reading",
    "benchmarks.success.libero_expert",
    "benchmarks.success.libero_report",
    "benchmarks.success.motion",
    "benchmarks.success.training",
    "benchmarks.success.libero_motion",
    "benchmarks.success.libero_training",
    "benchmarks.success.video",
    "benchmarks.success.reconstruct",
    "benchmarks.parity.reading",
    "benchmarks.speed.step_overhead",
    "benchmarks.speed.counts",
    "benchmarks.speed.growth",
    "benchmarks.speed.lam",
    "benchmarks.speed.joint",
    "benchmarks.speed.optimizer",
    "benchmarks.speed.pretrain",
    "benchmarks.speed.index",
    "benchmarks.speed.label",
    "benchmarks.speed.serving",
    "benchmarks.speed.libero",
    "benchmarks.setups.table",
    "benchmarks.example_runs",
)


def sections() -> dict[str, dict[str, Callable[[], str]]]:
    """The sections of each document."""
    found: dict[str, dict[str, Callable[[], str]]] = defaultdict(dict)
    for maker in MAKERS:
        for document, own in importlib.import_module(maker).SECTIONS.items():
            found[document] |= own
    return found


def fill(text: str, name: str, body: str) -> str:
    """The text with a section in the place of the one it has.

    Raises:
        ValueError: it does not have one of that name.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"no section between {begin.strip()} and {end}")
    return f"{before}{begin}{body}\n{end}{after}"


def broken_links(document: str, text: str) -> Iterator[str]:
    """Links of a document to files or headings that do not exist."""
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        if "://" in target:
            continue
        path = (ROOT / document).parent / target if target else ROOT / document
        if not path.exists():
            yield f"{document}: {target} does not exist"
        elif anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            if anchor not in {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}:
                yield f"{document}: {target} has no heading #{anchor}"


def problems() -> Iterator[str]:
    """What is wrong with the records themselves."""
    for path in RESULTS.rglob("*.json*"):
        if re.search(r'[" ](/home|/root|/work|/tmp|/Users)/', path.read_text()):
            yield f"{path.relative_to(ROOT)} names a path of somebody's machine"
    for maker in MAKERS:
        yield from getattr(importlib.import_module(maker), "problems", lambda: ())()


def main() -> int:
    """Check or write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true")
    what.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    failed = False
    for document, own in sections().items():
        path = ROOT / document
        text = fresh = path.read_text()
        for name, make in own.items():
            fresh = fill(fresh, name, make())
        if write:
            path.write_text(fresh)
        else:
            diff = difflib.unified_diff(text.splitlines(True), fresh.splitlines(True), document, "from the records")
            sys.stdout.writelines(diff)
            failed |= fresh != text
        for problem in broken_links(document, fresh):
            print(problem)
            failed = True
    if write:
        from benchmarks.success import report

        report.write(report.ROWS, report.ROWS.parent)
    for problem in problems():
        print(problem)
        failed = True
    if failed and not write:
        print("run python -m benchmarks.records --write, or correct the record's maker")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
