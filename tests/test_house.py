"""The guards of the house's direction (pyproject.toml, [tool.importlinter]) fail when somebody goes against it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is not installed (extra test)")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as the wheel lays it out, as `make lint` sees it."""
    folder = tmp_path_factory.mktemp("tree")
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lara_adapter", folder / "lara_adapter", ignore=without_caches)
    shutil.copytree(ROOT / "integrations", folder / "lara_adapter" / "integrations", ignore=without_caches)
    return folder


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    return subprocess.run(
        [*command, str(ROOT / "pyproject.toml"), "--no-cache"], cwd=tree, capture_output=True, text=True, check=False
    )


def test_the_house_keeps_its_direction(tree):
    done = lint(tree)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


# what is appended to a module, and the line of the report that names it
AGAINST = [
    ("lam/quantizer.py", "from ..adapter import LaraAdapter", "lam.quantizer -> lara_adapter.adapter"),
    ("lam/config.py", "def hidden():\n    from .pretrain import settings", "lam.config -> lara_adapter.lam.pretrain"),
    ("check.py", "def hidden():\n    from .adapter import LaraAdapter", "check -> lara_adapter.adapter"),
    ("storage/files.py", "from . import hub", "storage.files -> lara_adapter.storage.hub"),
    (
        "data/index.py",
        "def hidden():\n    from ..integrations import loading",
        "data.index -> lara_adapter.integrations",
    ),
]


def test_what_goes_against_it_is_found(tree, tmp_path):
    wrong = tmp_path / "tree"
    shutil.copytree(tree, wrong)
    for module, code, _ in AGAINST:
        with (wrong / "lara_adapter" / module).open("a") as stream:
            stream.write(f"\n{code}\n")
    done = lint(wrong)
    assert done.returncode == 1
    assert "0 kept" in done.stdout
    for _, _, arrow in AGAINST:
        assert f"lara_adapter.{arrow}" in done.stdout


def test_a_room_that_nobody_placed_is_found(tree, tmp_path):
    wrong = tmp_path / "tree"
    shutil.copytree(tree, wrong)
    (wrong / "lara_adapter" / "a_new_room.py").write_text("import torch\n")
    done = lint(wrong)
    assert done.returncode == 1
    assert "a_new_room" in done.stdout
