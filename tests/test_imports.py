"""The core needs torch, numpy, safetensors and huggingface-hub, and drags in nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lara_adapter"
HOSTS = ("transformers", "peft", "accelerate", "lerobot", "gr00t", "openpi", "jax", "diffusers", "lpips",
         "vector_quantize_pytorch", "matplotlib", "av", "tyro", "zmq", "msgpack")  # fmt: skip


def test_importing_drags_in_no_host_and_no_extra():
    code = f"""
import sys
for name in {HOSTS!r}:
    sys.modules[name] = None  # importing it would raise
import lara_adapter
lam = lara_adapter.LatentActionModel(lara_adapter.LatentActionConfig.tiny())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists_and_is_documented():
    import lara_adapter

    for name in lara_adapter.__all__:
        value = getattr(lara_adapter, name)
        assert value.__doc__, name
    for name in ("attach_lara", "load_lara", "LaraAdapter", "LaraConfig", "LatentActionModel", "LatentActionConfig"):
        assert name in lara_adapter.__all__


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_print_and_no_host_named_outside_the_table(path):
    tree = ast.parse(path.read_text())
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") in ("print", "eval", "exec")
    ]
    assert not calls
    imports = {
        (name.name if isinstance(node, ast.Import) else node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    assert not imports & {"lerobot", "gr00t", "openpi"}
    if path.name != "policies.py":
        names = re.findall(r"[\"'](gr00t|lerobot|openpi|smolvla|pi05?)[\"':./]", path.read_text(), re.IGNORECASE)
        assert not names


def test_version_has_one_owner():
    import lara_adapter

    text = (PACKAGE.parent / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert re.fullmatch(r"\d+\.\d+\.\d+", lara_adapter.__version__)
