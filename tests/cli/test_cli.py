"""The command line: results on stdout, refusals in one line on stderr, never a traceback."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("tyro")
import lara_adapter
from lara_adapter import LatentActionConfig, LatentActionModel, cli
from lara_adapter.cli.arguments import flags_of, replace_old_flags, takes
from lara_adapter.errors import name_flags

ROOT = Path(__file__).parents[2]
MINI_VLA = f"{ROOT / 'examples' / 'mini_vla.py'}:MiniVLA"


def run(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`lara ...` in a process of its own; `code` runs before."""
    program = f"{code}\nimport sys; from lara_adapter.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))  # not tmp_path, which a test may replace as a whole


# ---------------------------------------------------------------------- lara inspect


def test_inspect_prints_the_report():
    done = run("inspect", MINI_VLA)
    assert done.returncode == 0, done.stderr
    assert "action_head.model.transformer_blocks: 4 x DiTBlock, width 96" in done.stdout
    assert done.stderr == ""


def test_inspect_as_json(capsys, tmp_path):
    LatentActionModel(LatentActionConfig.tiny()).save_pretrained(tmp_path)
    arguments = ["--lam", str(tmp_path), "--layer", "-1", "--token", "-2", "--projector", "linear", "--json"]
    assert cli.main(["inspect", MINI_VLA, *arguments, "--no-train-lam"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["layer"], report["token"], report["projector"], report["lam"]) == (4, -2, "linear", str(tmp_path))
    assert report["added_trainable"] == 96 * 256 + 256
    assert report["lam_assumed"] is False


@pytest.mark.parametrize(("given", "layer"), [("-3", 2), ("L-1", 3), ("1", 1)])
def test_layers_are_numbers_or_counted_from_the_last(capsys, given, layer):
    assert cli.main(["inspect", MINI_VLA, "--layer", given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer"] == layer


def test_a_policy_that_lara_cannot_attach_to_is_reported_and_the_status_is_one(capsys):
    assert cli.main(["inspect", MINI_VLA, "--blocks", "backbone"]) == 1
    out, err = capsys.readouterr()
    assert "CANNOT      attach LARA" in out
    assert "candidate   action_head.model.transformer_blocks: 4 x DiTBlock" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "no/such/folder"], "is not a folder here"),
        (["inspect", "."], "has no config.json"),
        (["inspect", "no_such_module:policy"], "No module named"),
        (["inspect", MINI_VLA, "--token", "first"], "token='first'"),
        (["inspect", MINI_VLA, "--layer", "two"], "layer='two'"),
        (["inspect", MINI_VLA, "--lam", "no/such/lam"], "no/such/lam"),
        (["no-such-command"], "unknown command"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_refusal_is_one_line_and_status_two(capsys, arguments, said):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("lara: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("library", "shown"),
    [
        ("batch_size=0, but a number >= 1 is expected", "--batch-size=0, but a number >= 1 is expected"),
        ("actions: the folder x does not exist", "--actions: the folder x does not exist"),
        ("add --sidecar (sidecar=True)", "add --sidecar (sidecar=True)"),
        ("config.gap=3, f(gap=3), my-gap=3 and dataset=x", "config.gap=3, f(gap=3), my-gap=3 and dataset=x"),
    ],
)
def test_messages_of_the_library_name_flags_as_they_are_typed(library, shown):
    assert name_flags(library, flags_of(cli.load_command("label"))) == shown


def test_arguments_that_do_not_parse(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", MINI_VLA, "--projector", "conv"])
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


def test_what_a_host_prints_while_it_builds_does_not_reach_stdout(tmp_path, capsys):
    (tmp_path / "chatty_policy.py").write_text(
        "from mini_vla import MiniVLA\ndef make():\n    print('Tune backbone: False')\n    return MiniVLA()\n"
    )
    assert cli.main(["inspect", f"{tmp_path / 'chatty_policy.py'}:make", "--json"]) == 0
    json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------------- the program itself


def test_help_version_and_no_command(capsys, monkeypatch):
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(
        re.search(f"^  {name} +{re.escape(command.help)}$", usage, re.M) for name, command in cli.COMMANDS.items()
    )
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lara-adapter {lara_adapter.__version__}\n"
    monkeypatch.setattr(sys, "argv", ["lara"])
    assert cli.main() == 2
    assert capsys.readouterr().out == usage


def test_without_tyro_it_says_what_to_install():
    code = "import sys; sys.modules['tyro'] = None"
    done = run("inspect", MINI_VLA, code=code)
    assert done.returncode == 2
    assert done.stderr == "lara: the command line needs tyro: pip install 'lara-adapter[cli]'\n"


def test_help_imports_neither_torch_nor_hosts():
    names = ("torch", "numpy", "transformers", "tyro", "lerobot", "gr00t")
    code = f"import sys; sys.modules.update(dict.fromkeys({names}))"
    done = run("--help", code=code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train-lam" in done.stdout


# ---------------------------------------------------------------------- arguments


def _sources():
    """Of each command: what its arguments come from, those of them that it does not offer, and its own."""
    from lara_adapter.integrations.served import open_served

    from lara_adapter.convert.checkpoints import convert_checkpoint
    from lara_adapter.evaluation import Rollouts
    from lara_adapter.inspection import describe_policy
    from lara_adapter.lam.attention.picture import draw
    from lara_adapter.lam.attention.report import measure_attention
    from lara_adapter.lam.fill_cache import fill_cache
    from lara_adapter.lam.health.report import examine
    from lara_adapter.lam.label.run import label_dataset
    from lara_adapter.lam.pretrain.settings import PretrainSettings
    from lara_adapter.serving import PolicyClient, PolicyServer

    return {
        "convert": ([convert_checkpoint], "", "json"),
        "inspect": ([describe_policy], "policy", "source json"),
        "label": ([label_dataset], "", "json"),
        "cache": ([fill_cache], "", "json"),
        "health": ([examine], "thresholds", "html json"),
        "attention": ([measure_attention, draw], "report path", "output json"),
        "train-lam": ([PretrainSettings], "gap_frames gap_seconds", "shard index_only"),
        "serve": (
            [PolicyServer, open_served], "policy api_token description max_message_bytes",
            "source token_file max_message_mb",
        ),
        "eval": (
            [Rollouts, Rollouts.run, PolicyClient],
            "self client seeds progress timeout_ms api_token max_message_bytes",
            "tasks simulator episodes seed token_file timeout_s wait_s setting json",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_arguments_are_those_of_the_library(name, capsys):
    functions, omitted, own = _sources()[name]
    parameters = {}
    for function in functions:
        parameters |= inspect.signature(function).parameters
    given = inspect.signature(cli.load_command(name)).parameters
    assert set(given) == (set(parameters) - set(omitted.split())) | set(own.split())
    changed = {n for n, p in given.items() if n in parameters and p.default != parameters[n].default} - set(own.split())
    assert changed == {"serve": {"device"}, "eval": {"rename"}}.get(name, set())  # None there is another value here
    assert all(p.annotation.__metadata__[0].help for p in given.values())

    with pytest.raises(SystemExit):
        cli.main([name, "--help-all"])
    flags = set(re.findall(r"^[│|]? *--([a-z][a-z0-9-]*)", capsys.readouterr().out, re.MULTILINE))
    assert flags == {n.replace("_", "-") for n, p in given.items() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_fits_a_screen_and_begins_with_an_example(name, capsys):
    assert cli.main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"lara {cli.COMMANDS[name].examples[0]}"
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    parameters = inspect.signature(cli.load_command(name)).parameters
    assert set(cli.COMMANDS[name].common) <= set(parameters)


@pytest.mark.parametrize(
    ("given", "present"),
    [
        (["a", "--old", "1", "--other"], ["a", "--new", "1", "--other"]),
        (["--old=1"], ["--new=1"]),
        (["--old_seconds", "0.5", "b"], ["--new", "0.5s", "b"]),
        (["--old-seconds=2"], ["--new=2s"]),
    ],
    ids=str,
)
def test_flags_of_the_last_release_work_with_a_warning(given, present):
    renamed, warnings = {"--old": ("--new", ""), "--old-seconds": ("--new", "s")}, []
    assert replace_old_flags(given, renamed, warnings.append) == present
    assert len(warnings) == 1
    assert "is now --new" in warnings[0]


@pytest.mark.parametrize(("old", "present"), [("--gap-frames 3", "3"), ("--gap-seconds=0.5", "0.5s")])
def test_an_old_flag_is_one_line_on_stderr(old, present, capsys, monkeypatch, tmp_path):
    import lara_adapter.cli.train_lam as module

    settings = []
    result = SimpleNamespace(output=tmp_path, steps=0, health=None)
    monkeypatch.setattr(module, "pretrain_lam", lambda given: settings.append(given) or result)
    assert cli.main(["train-lam", "videos", "--output", str(tmp_path), *old.split()]) == 0
    assert settings[0].gap == present
    name = re.split("[ =]", old)[0]
    expected = f"lara: train-lam: {name} is now --gap; the old name will be removed in the next release\n"
    assert capsys.readouterr().err == expected


def test_a_parameter_without_help_is_an_error():
    def library(number: int = 1) -> None:
        """It does not document its number."""

    with pytest.raises(TypeError, match=r"\['number'\] are not documented"):
        takes(library)(lambda **arguments: 0)


def test_the_script_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'lara = "lara_adapter.cli:main"' in text
    assert 'cli = ["tyro"]' in text
