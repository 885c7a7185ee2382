"""The wire protocol: each message is a msgpack map, arrays are .npy; nothing in a message is code.

    request   {"endpoint": str, "data": {argument: value}, "api_token": str}      the last two if needed
    reply     what the endpoint returned; get_action: [action, info]; or {"error": str}
    array     {"__ndarray_class__": true, "as_npy": the bytes of a .npy file}
    modality  {"__ModalityConfig_class__": true, "as_json": {...}}

It is the protocol of NVIDIA Isaac GR00T N1.6 (gr00t/policy/server_client.py). In addition: a .npy may hold only numbers
and strings, and its header must match the bytes that follow it, so that a short message cannot allocate gigabytes;
numpy scalars and torch tensors can be sent too.
"""

from __future__ import annotations

import dataclasses
import io
import math
import threading
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..errors import HostNotInstalled, ServingError

__all__ = ["MAX_MESSAGE_BYTES", "ModalityConfig", "pack", "require_zmq", "routing_id", "unpack"]

MAX_MESSAGE_BYTES = 64 * 2**20  # about 340 views of 256 x 256; bounds what an untrusted peer can make us hold
_MAX_ENTRIES = 2**20  # of all lists and maps of a message: an empty map is one byte on the wire and 64 in memory
_ARRAY, _MODALITY = "__ndarray_class__", "__ModalityConfig_class__"
_KINDS = "biufcSU"  # bool, integers, floats, complex, strings: never objects, records, dates
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_PARSING = threading.Lock()  # headers are parsed with ast, which two threads may not do at once (python/cpython#106905)


@dataclasses.dataclass
class ModalityConfig:
    """Entries of one input ("video", "state", "language") or of the output ("action") of a policy.

    Attributes:
        delta_indices: time steps relative to now; for an action those of the chunk, 0 ... H-1.
        modality_keys: the entries, in order.
        sin_cos_embedding_keys: entries that the policy encodes as angles, or None.
        mean_std_embedding_keys: entries that it normalises by mean and deviation, or None.
        action_configs: for an action, one mapping of strings per entry, or None.
    """

    delta_indices: list[int]
    modality_keys: list[str]
    sin_cos_embedding_keys: list[str] | None = None
    mean_std_embedding_keys: list[str] | None = None
    action_configs: list[dict[str, Any]] | None = None


def routing_id(name: str, connection: int) -> bytes:
    """The ZMQ routing id of one connection of a client."""
    return f"lara:{name}:{connection}".encode()


def client_name(address: bytes) -> bytes:
    """The part of a routing id that all connections of one client share; for a foreign client, the whole."""
    return address.rpartition(b":")[0] if address.startswith(b"lara:") else address


def require_zmq() -> tuple[Any, Any]:
    """Import (zmq, msgpack).

    Raises:
        HostNotInstalled: one of them is missing.
    """
    try:
        import msgpack
        import zmq
    except ImportError as error:
        raise HostNotInstalled(
            f"serving needs pyzmq and msgpack ({error}): pip install 'lara-adapter[serve]', "
            "tested with pyzmq 27 and msgpack 1.1 and 1.2"
        ) from error
    return zmq, msgpack


def pack(content: Any) -> bytes:
    """Encode a message.

    Args:
        content: None, bools, numbers, strings, bytes, arrays, tensors (of any device; bfloat16 becomes float32),
            ModalityConfigs (GR00T's or ours), and lists, tuples and str-keyed mappings of them.

    Raises:
        ServingError: it holds something else, for instance an array of objects.
    """
    _, msgpack = require_zmq()
    try:
        packed: bytes = msgpack.packb(content, default=_encode)
    # what msgpack raises: TypeError, ValueError (nested too deep), OverflowError (an integer above 64 bits)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ServingError(f"this cannot be sent: {error}") from error
    return packed


def unpack(message: bytes) -> Any:
    """Decode a message. Arrays are writable, tuples become lists.

    Raises:
        ServingError: it is not a complete message of this protocol.
    """
    _, msgpack = require_zmq()
    entries = 0

    def count(container: Any) -> Any:
        nonlocal entries
        entries += 1 + len(container)
        if entries > _MAX_ENTRIES:
            raise ServingError(f"a message with more than {_MAX_ENTRIES} entries is refused; send arrays")
        return container

    try:
        return msgpack.unpackb(
            message, object_hook=lambda value: _decode(count(value)), list_hook=count, ext_hook=_refuse_extension,
            max_array_len=2**16, max_map_len=2**12,
        )  # fmt: skip
    except ServingError:
        raise
    # msgpack's own exceptions derive from ValueError or Exception, depending on its version
    except Exception as error:
        detail = str(error) or type(error).__name__
        raise ServingError(f"{len(message)} bytes are not a message of this protocol: {detail}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {_ARRAY: True, "as_npy": _to_npy(value)}
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "detach") and hasattr(value, "numpy"):  # a tensor; torch itself is not needed here
        tensor = value.detach().cpu()
        return _encode((tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy())
    if dataclasses.is_dataclass(value) and type(value).__name__ == "ModalityConfig":
        return {_MODALITY: True, "as_json": to_json(dataclasses.asdict(value))}  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} cannot be encoded")


def to_json(value: Any) -> Any:
    """Plain values; enumerations become their names, which the receiver looks up."""
    if isinstance(value, dict):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    return getattr(value, "name", value)


def _to_npy(array: NDArray[Any]) -> bytes:
    """The bytes that np.save writes, with one copy of the data instead of three."""
    if array.dtype.hasobject or array.dtype.kind not in _KINDS:
        raise TypeError(f"an array of dtype {array.dtype} cannot be sent; numbers, bools or strings are expected")
    header = io.BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(array))
    order: Literal["F", "C"] = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    return b"".join((header.getvalue(), array.tobytes(order)))


def _decode(value: dict[str, Any]) -> Any:
    if _ARRAY in value:
        return _from_npy(value.get("as_npy"))
    if _MODALITY in value:
        return _modality(value.get("as_json"))
    return value


def _from_npy(content: Any) -> NDArray[Any]:
    if not isinstance(content, bytes):
        raise ServingError(f"an array without its bytes: as_npy is a {type(content).__name__}")
    file = io.BytesIO(content)
    try:
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"version {version} of .npy, but 1.0 or 2.0 is expected")
        with _PARSING:
            shape, fortran, dtype = _HEADERS[version](file)
    except Exception as error:  # a header is a Python literal: its parser may raise nearly anything
        raise ServingError(f"{len(content)} bytes are not a .npy array: {error}") from error
    if dtype.hasobject or dtype.kind not in _KINDS or dtype.subdtype is not None:
        raise ServingError(f"an array of dtype {dtype} is refused; numbers, bools or strings are expected")
    if any(side < 0 for side in shape):
        raise ServingError(f"an array of shape {shape} is refused: a side is negative")
    start, size = file.tell(), math.prod(shape) * dtype.itemsize
    if len(content) - start != size:
        raise ServingError(f"an array {shape} of {dtype} has {size} bytes, but {len(content) - start} came with it")
    if dtype.itemsize == 0:  # np.empty((10**12,), "U0") allocates although nothing was sent
        raise ServingError(f"an array of dtype {dtype}, whose entries are empty, is refused")
    flat = np.frombuffer(content, dtype, offset=start) if size else np.empty(0, dtype)
    try:
        return flat.reshape(shape, order="F" if fortran else "C").copy(order="K")
    except (ValueError, OverflowError) as error:  # (0, 10**30)
        raise ServingError(f"an array of shape {shape} is refused: {error}") from error


def _modality(content: Any) -> ModalityConfig:
    names = {field.name for field in dataclasses.fields(ModalityConfig)}
    if not isinstance(content, dict) or not {"delta_indices", "modality_keys"} <= content.keys() <= names:
        raise ServingError(
            f"a modality configuration is a mapping with the keys {sorted(names)}, but got {content!r:.200}"
        )
    return ModalityConfig(**content)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ServingError(f"msgpack extension {code} is refused")
