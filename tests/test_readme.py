"""The README's code is run, not only read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.toys import DitPolicy, make_batch

from lara_adapter import LatentActionConfig, LatentActionModel, load_lara

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        LatentActionModel, "from_pretrained", lambda name: LatentActionModel(LatentActionConfig.tiny())
    )  # the Hub is out of reach
    policy = DitPolicy().train()
    names = set(policy.state_dict())
    scope = {"policy": policy, "loader": [make_batch(seed=0), make_batch(seed=1)]}
    exec(BLOCKS[0], scope)
    assert isinstance(scope["loss"], torch.Tensor)
    assert scope["loss"].requires_grad
    assert set(policy.state_dict()) == names
    monkeypatch.undo()
    assert load_lara(policy, tmp_path / "my-policy-lara").step == 2


def test_the_arguments_of_the_table_are_those_of_attach_lara():
    import inspect

    from lara_adapter import attach_lara

    section = README.split("## Arguments")[1].split("## ")[0]
    named = set(
        re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `")))
    )
    assert named == set(inspect.signature(attach_lara).parameters) - {"policy"}
    defaults = {name: p.default for name, p in inspect.signature(attach_lara).parameters.items()}
    for line in section.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            for name in re.findall(r"`(\w+)`", cells[0]):
                if cells[1]:
                    assert cells[1].strip("`").strip('"') == str(defaults[name]), name


def test_every_error_of_the_table_exists_and_every_error_is_in_it():
    from lara_adapter import errors

    section = README.split("## What goes wrong")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    assert named == set(errors.__all__) - {"LaraError", "LaraArgumentError"}


def test_the_printed_example_is_what_lara_inspect_prints(capsys, monkeypatch):
    pytest.importorskip("tyro")
    from lara_adapter import cli

    block = README.split("<!-- inspect: begin -->\n```text\n")[1].split("```\n<!-- inspect: end -->")[0]
    command, _, printed = block.partition("\n")
    program, *arguments = command.removeprefix("$ ").split()
    assert program == "lara"
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == printed
