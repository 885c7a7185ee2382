"""The bytes on the wire: those of GR00T N1.6's description, and nothing that harms."""

from __future__ import annotations

import base64
import io
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("msgpack")
pytest.importorskip("zmq")

import msgpack
from helpers import record_bytes

from lara_adapter import ServingError
from lara_adapter.serving import ModalityConfig, pack, protocol, unpack

RECORDED = {name: base64.b64decode(text) for name, text in json.loads(record_bytes.FILE.read_text()).items()}
OBSERVATION = {
    "video": {"front": np.arange(12, dtype=np.uint8).reshape(1, 1, 2, 2, 3)},
    "state": {"position": np.float32([[[0.25, -1.5]]])},
    "language": {"task": [["push"]]},
}
ABSOLUTE = {"rep": "ABSOLUTE", "type": "NON_EEF", "format": "DEFAULT", "state_key": None}
CONTENT = {
    "ping": {"endpoint": "ping"},
    "ping with token": {"endpoint": "ping", "api_token": "secret"},
    "get_action": {"endpoint": "get_action", "data": {"observation": OBSERVATION, "options": None}},
    "reset": {"endpoint": "reset", "data": {"options": None}},
    "get_modality_config": {"endpoint": "get_modality_config"},
    "reply to ping": {"status": "ok", "message": "Server is running"},
    "reply to get_action": [{"velocity": np.float32([[[1, 2], [3, 4]]])}, {}],
    "reply to get_modality_config": {"action": ModalityConfig([0, 1], ["velocity"], None, None, [ABSOLUTE])},
    "error": {"error": "Unauthorized: Invalid API token"},
}


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    return type(a) is type(b) and a == b


def test_the_recording_is_what_its_script_makes():
    assert RECORDED == record_bytes.MESSAGES
    assert RECORDED.keys() == CONTENT.keys()


@pytest.mark.parametrize("name", CONTENT)
def test_recorded_bytes_both_ways(name):
    assert pack(CONTENT[name]) == RECORDED[name]
    assert same(unpack(RECORDED[name]), CONTENT[name])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.int64).reshape(2, 3, 4).transpose(2, 0, 1),
        np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        np.arange(10, dtype=np.float16)[::3],
        np.array(3.5),
        np.zeros((0, 4), np.float32),
        np.array(["push", "the block"]),
        np.array([True, False]),
        np.arange(4, dtype=">i4"),
        np.array([1 + 2j]),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_arrays_are_written_as_numpy_writes_them_and_come_back_writable(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    assert msgpack.unpackb(pack(array))["as_npy"] == file.getvalue()
    back = unpack(pack(array))
    assert same(back, array)
    assert back.flags.writeable


def test_scalars_of_numpy_and_tensors():
    torch = pytest.importorskip("torch")
    assert unpack(pack({"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)})) == {"a": 0.5, "b": 3, "c": True}
    assert same(unpack(pack(torch.ones(2, requires_grad=True))), np.ones(2, np.float32))
    assert same(unpack(pack(torch.ones(2, dtype=torch.bfloat16))), np.ones(2, np.float32))


def npy(header: str, data: bytes = b"") -> bytes:
    padded = header.ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode() + data
    return msgpack.packb({"__ndarray_class__": True, "as_npy": content})


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return msgpack.packb({"__ndarray_class__": True, "as_npy": file.getvalue()})


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(100_000))
    return msgpack.packb({"__ndarray_class__": True, "as_npy": file.getvalue()})


HARMFUL = {
    "nothing": b"",
    "garbage": b"\xc1\xff\x00garbage",
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "cut off": RECORDED["get_action"][:-5],
    "two messages": RECORDED["ping"] * 2,
    "4 GB of list claimed": b"\xdd\xff\xff\xff\xff",
    "deep": b"\x91" * 5000 + b"\xc0",
    "an extension": msgpack.packb(msgpack.ExtType(1, b"x")),
    "bad utf-8": b"\xa2\xff\xfe",
    "integer keys": msgpack.packb({1: 2}),
    "array without bytes": msgpack.packb({"__ndarray_class__": True}),
    "array of text": msgpack.packb({"__ndarray_class__": True, "as_npy": "x"}),
    "pickled objects": pickled(),
    "a zip instead of npy": zipped(),
    "header of 8 TB": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"),
    "1e12 entries without bytes": npy("{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,), }"),
    "negative side": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }", bytes(8)),
    "side beyond 64 bits": npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': (0, {10**40}), }}"),
    "too many bytes": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", bytes(16)),
    "records": npy("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (1,), }", bytes(8)),
    "dates": npy("{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1,), }", bytes(8)),
    "code in the header": npy("__import__('os').abort()"),
    "a foreign modality": msgpack.packb({"__ModalityConfig_class__": True, "as_json": {"evil": 1}}),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_what_is_no_message_is_one_error(name):
    with pytest.raises(ServingError):
        unpack(HARMFUL[name])


def test_a_small_message_cannot_ask_for_much_memory(monkeypatch):
    assert protocol._MAX_ENTRIES == 2**20  # 64 MB of empty maps; a sixteenth here, since tracing them is slow
    monkeypatch.setattr(protocol, "_MAX_ENTRIES", 2**16)
    bomb = msgpack.packb([[{}] * 60_000] * 10)  # 0.6 MB on the wire, 40 MB as dictionaries
    tracemalloc.start()
    try:
        for message in (HARMFUL["header of 8 TB"], HARMFUL["1e12 entries without bytes"], bomb):
            with pytest.raises(ServingError):
                unpack(message)
        assert tracemalloc.get_traced_memory()[1] < 9e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {"a": np.array([None])},
        np.zeros(2, dtype=[("a", "f4")]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        2**70,
        {1, 2},
        Path("x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_form_is_one_error(value):
    with pytest.raises(ServingError, match="cannot be sent"):
        pack({"value": value})
