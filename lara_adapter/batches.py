"""What a policy is given, in whatever form: a mapping, mappings by scope, a list of samples, an object with attributes.

Entries are looked up by key, and replaced in a shallow copy: the caller's batch is never changed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["lookup", "replaced", "with_fields", "without"]


def _is_scopes(batch: Any) -> bool:
    """A mapping of batches, one for each dataset or task (CALVIN's "lang" and "vis")."""
    if not isinstance(batch, Mapping):
        return False
    values = list(batch.values())  # not bool(batch): a TensorDict has no truth value
    return len(values) > 0 and all(isinstance(value, Mapping) for value in values)


def _is_samples(batch: Any) -> bool:
    """A list of samples that the policy collates itself."""
    return isinstance(batch, (list, tuple)) and len(batch) > 0 and all(isinstance(item, Mapping) for item in batch)


def _attributes(batch: Any) -> dict[str, Any] | None:
    """The fields of a dataclass, a NamedTuple or a plain object; None for anything else."""
    if hasattr(batch, "_asdict"):
        return dict(zip(batch._fields, batch))
    if isinstance(batch, (torch.Tensor, nn.Module, np.ndarray, type)) or not hasattr(batch, "__dict__"):
        return None
    return vars(batch)


def lookup(batch: Any, keys: Iterable[str]) -> Mapping[str, Any]:
    """The entries of a batch.

    Args:
        batch: a mapping; a mapping of mappings, whose tensors are concatenated; a list of mappings, one a sample, whose
            tensors or arrays are stacked; an object with attributes. Anything else has no entries.
        keys: the entries that are asked for; a mapping is returned as it is.

    Raises:
        ValueError: the samples or scopes have tensors of different shapes under one key.
    """
    if _is_scopes(batch):
        found: dict[str, Any] = {}
        for key in keys:
            parts = [scope[key] for scope in batch.values() if isinstance(scope.get(key), torch.Tensor)]
            if parts:
                found[key] = _put_together(torch.cat, parts, key, "scopes")
        return {**batch, **found}
    if isinstance(batch, Mapping):
        return batch
    if _is_samples(batch):
        found = {}
        for key in keys:
            if all(isinstance(sample.get(key), (torch.Tensor, np.ndarray, bool, np.bool_)) for sample in batch):
                values = [torch.as_tensor(sample[key]) for sample in batch]
                found[key] = _put_together(torch.stack, values, key, "samples")
        return found
    return _attributes(batch) or {}


def _put_together(function: Any, parts: list[torch.Tensor], key: str, what: str) -> torch.Tensor:
    try:
        return function(parts)
    except RuntimeError:
        shapes = [list(part.shape) for part in parts][:4]
        raise ValueError(f"the {what} of the batch have {key!r} of different shapes: {shapes}") from None


def without(batch: Any, keys: Sequence[str]) -> Any:
    """A shallow copy of a batch that lacks some entries (None in an object); the batch itself if it has none of them."""
    if _is_scopes(batch):
        parts = {name: without(scope, keys) for name, scope in batch.items()}
        return without(_rebuilt(batch, parts), keys) if any(parts[n] is not batch[n] for n in parts) else batch
    if isinstance(batch, Mapping):
        if not any(key in batch for key in keys):
            return batch
        if type(batch) is dict or not hasattr(batch, "__delitem__"):  # read-only, as MappingProxyType
            return {name: value for name, value in batch.items() if name not in keys}
        reduced: Any = copy.copy(batch)  # keeps the type: BatchFeature, BatchEncoding, TensorDict
        for key in keys:
            if key in reduced:
                del reduced[key]
        return reduced
    if _is_samples(batch):
        samples = [without(sample, keys) for sample in batch]
        return type(batch)(samples) if any(a is not b for a, b in zip(samples, batch)) else batch
    fields = _attributes(batch)
    if not fields or not any(fields.get(key) is not None for key in keys):
        return batch
    return with_fields(batch, {key: None for key in keys if key in fields})


def replaced(batch: Any, key: str, value: torch.Tensor) -> Any:
    """A shallow copy of a batch with another tensor under `key`, which it has; see :func:`lookup` for its form."""
    if _is_scopes(batch):
        parts, start = dict(batch), 0
        for name, scope in batch.items():
            if isinstance(scope.get(key), torch.Tensor):
                rows = len(scope[key])
                parts[name] = replaced(scope, key, value[start : start + rows])
                start += rows
        return _rebuilt(batch, parts)
    if isinstance(batch, Mapping):
        if type(batch) is dict or not hasattr(batch, "__setitem__"):
            return {**batch, key: value}
        changed: Any = copy.copy(batch)
        changed[key] = value
        return changed
    if _is_samples(batch):
        samples = [
            {**sample, key: part.numpy() if isinstance(sample[key], np.ndarray) else part}
            for sample, part in zip(batch, value)
        ]
        return type(batch)(samples)
    return with_fields(batch, {key: value})


def _rebuilt(batch: Mapping[str, Any], entries: dict[str, Any]) -> Mapping[str, Any]:
    if type(batch) is dict:
        return entries
    try:
        double: Any = copy.copy(batch)
        for name, value in entries.items():
            double[name] = value
        return double
    except TypeError:
        return entries


def with_fields(batch: Any, fields: dict[str, Any]) -> Any:
    """A shallow copy of a NamedTuple, a dataclass or a plain object with other values in some fields."""
    if hasattr(batch, "_replace"):
        return batch._replace(**fields)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        double = copy.copy(batch)
        for name, value in fields.items():  # past __post_init__ and frozen
            object.__setattr__(double, name, value)
        return double
    double = copy.copy(batch)
    vars(double).update(fields)
    return double
