"""Tables and printed examples of the documents are what the code says."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from lara_adapter import attach_lara, errors

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_the_arguments_of_the_table_are_those_of_attach_lara():
    lines = [
        line for line in read("README.md").split("## Arguments")[1].split("\n## ")[0].splitlines() if "| `" in line
    ]
    parameters = inspect.signature(attach_lara).parameters
    named = []
    for line in lines:
        first, default, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", first):
            named.append(name)
            assert not default or default.strip("`").strip('"') == str(parameters[name].default), name
    assert set(named) == set(parameters) - {"policy"}


def test_every_error_is_on_the_page_and_in_its_table():
    page = read("docs/troubleshooting.md")
    names = set(errors.__all__) - {"LaraError"}
    for pattern in (r"^\| \[`(\w+)`\]", r"^## (\w+)$", r"^<!-- messages: (\w+) -->$"):
        assert set(re.findall(pattern, page, re.MULTILINE)) == names


def test_the_printed_example_is_what_lara_inspect_prints(capsys, monkeypatch):
    pytest.importorskip("tyro")
    from lara_adapter import cli

    page = read("docs/your-policy.md")
    block = page.split("<!-- inspect: begin -->\n```text\n")[1].split("```\n<!-- inspect: end -->")[0]
    command, _, printed = block.partition("\n")
    program, *arguments = command.removeprefix("$ ").split()
    assert program == "lara"
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == printed
