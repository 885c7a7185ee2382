import importlib.metadata
import platform

import pytest


@pytest.fixture(scope="session", autouse=True)
def _versions(record_testsuite_property):
    """The versions a result was got with, for the table in docs/training-setups.md (benchmarks/setups/table.py)."""
    record_testsuite_property("python", platform.python_version())
    for name in ("torch", "transformers", "accelerate", "peft", "numpy"):
        try:
            record_testsuite_property(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            record_testsuite_property(name, "")
