"""Making documents from the records, and what is said where something is missing. `make records` checks the documents."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import ROOT, checkout, records


def test_a_section_is_replaced_and_a_missing_one_is_an_error():
    text = "a\n<!-- growth: begin -->\nold\n<!-- growth: end -->\nb\n"
    assert records.fill(text, "growth", "new") == text.replace("old", "new")
    for lacking in (text.replace("end", "END"), text.replace("growth: begin", "other: begin")):
        with pytest.raises(ValueError, match="growth"):
            records.fill(lacking, "growth", "new")


def test_links_to_missing_files_and_headings_are_reported():
    text = "[a](README.md#install) [b](README.md#no-such) [c](no/such.md) [d](https://example.com/x) [e](#install)"
    assert list(records.broken_links("README.md", text)) == [
        "README.md: README.md has no heading #no-such",
        "README.md: no/such.md does not exist",
    ]


def test_the_check_fails_with_a_diff_where_a_document_or_a_record_is_wrong(monkeypatch, tmp_path, capsys):
    (tmp_path / "page.md").write_text("<!-- one: begin -->\n1.0\n<!-- one: end -->\n")
    maker = type(sys)("maker")
    maker.SECTIONS, maker.problems = {"page.md": {"one": lambda: "2.0"}}, lambda: ["not paired"]
    monkeypatch.setitem(sys.modules, "maker", maker)
    monkeypatch.setattr(records, "MAKERS", ("maker",))
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["records", "--check"])
    assert records.main() == 1
    assert {"-1.0", "+2.0", "not paired"} <= set(capsys.readouterr().out.splitlines())
    (tmp_path / "page.md").write_text("<!-- one: begin -->\n2.0\n<!-- one: end -->\n")
    assert records.main() == 1
    maker.problems = lambda: []
    assert records.main() == 0
    (tmp_path / "record.json").write_text(json.dumps({"file": "/home/somebody/x"}))
    assert records.main() == 1


def test_a_case_that_does_not_pass_is_reported(monkeypatch):
    from benchmarks.parity import reading

    assert list(reading.problems()) == []
    for change in (
        lambda result: result.update(codes_that_differ=1),
        lambda result: result["values"]["total"].update(rel=1e-3),
        lambda result: result["left_out"].update(total=["a tensor"]),
        lambda result: result.update(trainable_tensors=1),
    ):
        wrong = json.loads(json.dumps(reading.GR00T))
        change(wrong["cases"]["legacy=False on both sides"]["float32"])
        monkeypatch.setattr(reading, "GR00T", wrong)
        assert list(reading.problems()) == ["parity_official.json: legacy=False on both sides, float32: does not pass"]


@pytest.mark.parametrize(
    ("module", "release"), [("official", "LARA_full"), ("openpi", "LARA_posttrain_openpi")], ids=["official", "openpi"]
)
def test_without_the_official_code_parity_says_so(module, release, monkeypatch, capsys, tmp_path):
    import importlib

    benchmark = importlib.import_module(f"benchmarks.parity.{module}")
    monkeypatch.delenv("LARA_OFFICIAL_SRC", raising=False)
    monkeypatch.delenv("LARA_OFFICIAL_OPENPI_SRC", raising=False)
    before = benchmark.RESULT.read_bytes()
    assert benchmark.main([]) == 2
    assert "git clone" in capsys.readouterr().err
    assert benchmark.main(["--official", str(tmp_path)]) == 2
    assert f"is not a checkout of {release}" in capsys.readouterr().err
    assert benchmark.RESULT.read_bytes() == before


def test_a_checkout_is_importable_and_something_else_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "src" / "theirs").mkdir(parents=True)
    root = checkout.add_checkout(tmp_path, "theirs", contains="src/theirs", folders=("src", ""))
    assert sys.path[:2] == [str(root / "src"), str(root)]
    with pytest.raises(checkout.Missing, match=r"not a checkout of theirs: it has no src/ours"):
        checkout.add_checkout(tmp_path, "theirs", contains="src/ours")


@pytest.mark.parametrize("module", ["speed.lam", "success.report"])
def test_a_script_runs_as_a_module_from_the_root(module):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--help"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
