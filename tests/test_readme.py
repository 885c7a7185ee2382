"""The README's code is run, not only read."""

from __future__ import annotations

import json
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


def test_the_cost_table_quotes_the_record():
    record = json.loads((ROOT / "benchmarks/results/lam_speed.json").read_text())
    assert (record["settings"]["preset"], record["relative_to"]) == ("paper", "official")
    peak = {name: value / record["peak_mb"]["official"] for name, value in record["peak_mb"].items()}
    for arm, row in (("ours", "ours"), ("ours, cached", "ours with `lam.cache_features(folder)`")):
        low, high = record["ratio_range"][arm]
        numbers = f"{record['ratio'][arm]:.2f} | {low:.2f} - {high:.2f} | {peak[arm]:.2f}"
        assert f"| {row} | {numbers} |" in README
    assert f"{record['cache_kb_per_frame']:.0f} kB a frame" in README


def test_the_lam_guide_quotes_the_record_of_pretraining():
    record = json.loads((ROOT / "benchmarks/results/pretrain_speed.json").read_text())
    guide = (ROOT / "lara_adapter/lam/README.md").read_text().split("### How fast")[1].split("\n## ")[0]
    rows = {
        "official, as it is": "official", "ours, independent pairs": "ours, independent pairs",
        "ours, chains of 4 (default)": "ours, chains of 4", "ours, chains of 8": "ours, chains of 8",
    }  # fmt: skip
    for row, arm in rows.items():
        cells = []
        for preset in ("paper", "small"):
            ratio = record[preset]["pairs_per_second_ratio"].get(arm)
            low, high = record[preset]["ratio_range"].get(arm, (0, 0))
            cells.append("not measured" if ratio is None else f"{ratio:.2f} ({low:.2f} - {high:.2f})")
        assert f"| {row} | {cells[0]} | {cells[1]} |" in guide
    alone = [record[preset]["decoding_alone"] for preset in ("paper", "small")]
    ratios = [rates["ours, pairs/s"] / rates["official, plain, pairs/s"] for rates in alone]
    assert f"| decoding alone, ours over theirs | {ratios[0]:.1f} | {ratios[1]:.1f} |" in guide
    assert record["paper"]["pairs_per_second_ratio"]["ours, chains of 4"] >= 1.5
