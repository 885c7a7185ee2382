"""Every Python block of the documents is run, or bound to what it calls; every command is parsed."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.toys import DitPolicy, make_batch

import lara_adapter
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara, load_lara
from lara_adapter.errors import HostNotInstalled

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


# ---------------------------------------------------------------------- Python that runs


def small(name: str = "") -> LatentActionModel:
    return LatentActionModel(LatentActionConfig.tiny())


def test_the_first_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LatentActionModel, "from_pretrained", small)  # no Hub here
    policy = DitPolicy().train()
    names = set(policy.state_dict())
    scope = {"policy": policy, "loader": [make_batch(seed=0), make_batch(seed=1)]}
    exec(blocks("README.md", "python")[0], scope)
    assert isinstance(scope["loss"], torch.Tensor)
    assert scope["loss"].requires_grad
    assert set(policy.state_dict()) == names
    monkeypatch.undo()
    assert load_lara(policy, tmp_path / "my-policy-lara").step == 2


def test_the_other_blocks_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    policy, batch = DitPolicy().train(), make_batch()
    lara = attach_lara(policy, small())
    optimizer = torch.optim.AdamW(policy.parameters())
    check, save = blocks("README.md", "python")[1:]
    scope = {"policy": policy, "lara": lara, "batch": batch, "optimizer": optimizer, "load_lara": load_lara}
    exec(check, scope)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == re.findall(r"^# (\w+) ", check, re.MULTILINE)
    policy(batch)["loss"].backward()
    exec(save, scope)
    assert scope["policy"] is policy
    assert not policy.training


def test_the_quickstart_of_the_start_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    now, later = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    scope = {name: getattr(lara_adapter, name) for name in ("LatentActionModel", "LatentActionConfig", "attach_lara")}
    policy = DitPolicy().train()
    scope |= {
        "SIZE": 32, "frame_now": now, "frame_later": later, "policy": policy, "batch": make_batch(), "torch": torch,
        "load_lara": load_lara, "new_policy": DitPolicy,
    }  # fmt: skip
    for block in blocks("docs/index.md", "python"):
        exec(block, scope)
    assert not any("lara" in name for name in policy.state_dict())
    assert "mean_direction" in capsys.readouterr().out


# ---------------------------------------------------------------------- Python that is bound

KNOWN = {  # what a page calls by these names without importing them
    "attach_lara": attach_lara, "load_lara": load_lara, "lara": lara_adapter.LaraAdapter, "lam": LatentActionModel,
    "LatentActionModel": LatentActionModel, "PolicySpec": lara_adapter.PolicySpec,
    "register_policy": lara_adapter.register_policy,
}  # fmt: skip


def imported(module: str, name: str):
    """What a block imports from this library; None where its host is missing, if the name is public in the source."""
    try:
        return getattr(importlib.import_module(module), name)
    except HostNotInstalled:
        source = ROOT.joinpath(*module.removeprefix("lara_adapter.").split("."), "__init__.py").read_text()
        assert f'"{name}"' in source
        return None


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_what_a_block_imports_exists_and_takes_these_arguments(page):
    for block in blocks(page, "python"):
        tree, known = ast.parse(block), dict(KNOWN)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lara_adapter"):
                known |= {alias.name: imported(node.module, alias.name) for alias in node.names}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            function = called(call.func, known)
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            if function is None or any(isinstance(each, ast.Constant) and each.value is ... for each in given):
                continue
            arguments = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            try:
                inspect.signature(function).bind(*call.args, **arguments)
            except TypeError as error:
                pytest.fail(f"{page}: {ast.unparse(call)}: {error}")


def called(node: ast.expr, known: dict):
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and known.get(node.value.id) is not None:
        owner = known[node.value.id]
        assert hasattr(owner, node.attr), f"{node.value.id} has no {node.attr}"
        function = getattr(owner, node.attr)
        bound = inspect.ismethod(function) or not inspect.isfunction(function)
        return function if bound else function.__get__(SimpleNamespace())
    return None


# ---------------------------------------------------------------------- commands


def commands(page: str) -> list[list[str]]:
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    found = []
    for line in lines:
        while "&&" in line:
            found.append(line[: line.index("&&")])
            line = line[line.index("&&") + 1 :]
        found.append(line)
    return [line for line in found if line]


def parse_lara(words: list[str]) -> None:
    """Parse as `lara` would, without running."""
    tyro = pytest.importorskip("tyro")
    from lara_adapter.cli import load_command

    function = load_command(words[0])

    def stub(*args, **kwargs):
        return 0

    stub.__signature__, stub.__annotations__ = function.__signature__, function.__annotations__
    stub.__doc__ = function.__doc__
    try:
        tyro.cli(stub, args=words[1:])
    except SystemExit as stop:
        pytest.fail(f"lara {' '.join(words)}: does not parse ({stop.code})")


def flags_exist(words: list[str], source: Path) -> None:
    """A module or script exists, and knows the flags that are ours."""
    files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
    assert files, source
    ours = [*(ROOT / "integrations").rglob("*.py"), ROOT / "lara_adapter" / "attach.py"]
    text = "".join(file.read_text() for file in (*files, *ours))
    for word in words:
        if word.startswith("--") and (word.startswith("--lara") or "integrations" not in str(source)):
            name = word.partition("=")[0].lstrip("-").split(".")[-1].removeprefix("no-")
            if source.name.endswith("_posttrain.py") and not word.startswith("--lara"):
                continue  # the host's own
            assert name.replace("-", "_") in text or name in text, f"{source} does not know {word}"


def module_of(name: str) -> Path:
    path = ROOT.joinpath(*name.replace("lara_adapter.integrations", "integrations").split("."))
    assert path.is_dir() or path.with_suffix(".py").is_file(), name
    return path if path.is_dir() else path.with_suffix(".py")


def check_command(words: list[str]) -> None:
    program, rest = words[0].rsplit("/", 1)[-1], words[1:]
    if "=" in program:  # a variable for one command
        return check_command(rest)
    if program == "uv":  # uv pip install
        return check_command(rest)
    if program == "lara":
        return parse_lara(rest)
    if program == "make":
        for target in (word for word in rest if "=" not in word):
            assert re.search(rf"^{target}:|\.PHONY:.*\b{target}\b", MAKEFILE, re.MULTILINE), target
    elif program == "pip" or rest[:3] == ["-m", "pip", "install"]:
        for word in rest:
            assert set(re.findall(r"\w+", ",".join(re.findall(r"(?:\.|lara-adapter)\[(.*)\]", word)))) <= EXTRAS, word
    elif program in ("python", "torchrun", "accelerate"):
        if "-m" in rest:
            name, *more = rest[rest.index("-m") + 1 :]
            if name == "lara_adapter.cli":
                return parse_lara(more)
            flags_exist(more, module_of(name))
        else:
            script = next(word for word in rest if word.endswith(".py"))
            if not script.startswith("gr00t/"):  # GR00T's own
                assert (ROOT / script).is_file(), script
                flags_exist(rest[rest.index(script) + 1 :], ROOT / script)
    else:
        assert program in ("git", "cd", "cp", "hf", "lerobot-edit-dataset"), (
            f"{program} is not checked; teach this test what it is"
        )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_commands_are_those_of_the_library(page):
    for words in commands(page):
        check_command(words)


@pytest.mark.parametrize(
    "wrong",
    ["lara train-lam VIDEOS --output x --no-such 3", "lara healt my-lam data", "make tests-all", "npm install",
     "python examples/no_such.py", "python -m benchmarks.no_such", 'pip install -e ".[no_such]"',
     "python -m examples.refine_lam --no-such-flag"],
)  # fmt: skip
def test_a_wrong_command_is_noticed(wrong):
    with pytest.raises((AssertionError, KeyError, pytest.fail.Exception)):
        check_command(shlex.split(wrong))
