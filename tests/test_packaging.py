"""The wheel holds every module, integrations/ among them: a forgotten sub-package shows only there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_holds_every_module(tmp_path):
    pytest.importorskip("setuptools", minversion="70.1")
    source = tmp_path / "source"  # setuptools keeps a build/ with modules of earlier builds beside the sources
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    for name in ("lara_adapter", "integrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("lara_adapter-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.endswith(".py")}
        assert "lara_adapter/py.typed" in archive.namelist()
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
        scripts = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "lara = lara_adapter.cli:main" in scripts
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "lara_adapter").rglob("*.py")}
    wanted |= {f"lara_adapter/{path.relative_to(ROOT)}" for path in (ROOT / "integrations").rglob("*.py")}
    assert found == wanted
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line]
    assert sorted(line.split()[1].rstrip(";").partition(">")[0] for line in core) == [
        "huggingface-hub", "numpy", "safetensors", "torch",
    ]  # fmt: skip
