"""The former place of :mod:`lara_adapter.storage.files`: tests/golden, which never changes, imports it from here."""

from .storage.files import read_tensors, write_json, write_tensors

__all__ = ["read_tensors", "write_json", "write_tensors"]
