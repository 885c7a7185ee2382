"""Makes wire.json: messages of GR00T N1.6's protocol, built byte by byte from its description, without our code.

    python tests/helpers/record_bytes.py

A message is a msgpack map; an array is {"__ndarray_class__": true, "as_npy": <.npy, version 1.0>}. It uses only
`struct` and `bytes`, so that an error in our packing cannot hide in the recording.
"""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

FILE = Path(__file__).with_name("wire.json")


def text(value: str) -> bytes:
    raw = value.encode()
    return (bytes([0xA0 | len(raw)]) if len(raw) < 32 else b"\xd9" + bytes([len(raw)])) + raw


def binary(value: bytes) -> bytes:
    return (b"\xc4" + bytes([len(value)]) if len(value) < 256 else b"\xc5" + struct.pack(">H", len(value))) + value


def mapping(*pairs: tuple[str, bytes]) -> bytes:
    return bytes([0x80 | len(pairs)]) + b"".join(text(key) + value for key, value in pairs)


def listing(*values: bytes) -> bytes:
    return bytes([0x90 | len(values)]) + b"".join(values)


def npy(descr: str, shape: tuple[int, ...], data: bytes, fortran: bool = False) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}"
    # numpy leaves room for an axis to grow, and pads to a multiple of 64
    header += " " * max(0, 21 - len(str(shape[-1] if fortran else shape[0]))) if shape else ""
    padding = -(10 + len(header) + 1) % 64
    header += " " * padding + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def array(*arguments: object) -> bytes:
    return mapping(("__ndarray_class__", b"\xc3"), ("as_npy", binary(npy(*arguments))))  # type: ignore[arg-type]


IMAGE = array("|u1", (1, 1, 2, 2, 3), bytes(range(12)))
STATE = array("<f4", (1, 1, 2), struct.pack("<2f", 0.25, -1.5))
ACTION = array("<f4", (1, 2, 2), struct.pack("<4f", 1, 2, 3, 4))
OBSERVATION = mapping(
    ("video", mapping(("front", IMAGE))),
    ("state", mapping(("position", STATE))),
    ("language", mapping(("task", listing(listing(text("push")))))),
)
MODALITY = mapping(
    ("__ModalityConfig_class__", b"\xc3"),
    (
        "as_json",
        mapping(
            ("delta_indices", listing(b"\x00", b"\x01")),
            ("modality_keys", listing(text("velocity"))),
            ("sin_cos_embedding_keys", b"\xc0"),
            ("mean_std_embedding_keys", b"\xc0"),
            (
                "action_configs",
                listing(
                    mapping(
                        ("rep", text("ABSOLUTE")), ("type", text("NON_EEF")), ("format", text("DEFAULT")),
                        ("state_key", b"\xc0"),
                    )
                ),
            ),
        ),
    ),
)  # fmt: skip

MESSAGES = {
    "ping": mapping(("endpoint", text("ping"))),
    "ping with token": mapping(("endpoint", text("ping")), ("api_token", text("secret"))),
    "get_action": mapping(
        ("endpoint", text("get_action")), ("data", mapping(("observation", OBSERVATION), ("options", b"\xc0")))
    ),
    "reset": mapping(("endpoint", text("reset")), ("data", mapping(("options", b"\xc0")))),
    "get_modality_config": mapping(("endpoint", text("get_modality_config"))),
    "reply to ping": mapping(("status", text("ok")), ("message", text("Server is running"))),
    "reply to get_action": listing(mapping(("velocity", ACTION)), mapping()),
    "reply to get_modality_config": mapping(("action", MODALITY)),
    "error": mapping(("error", text("Unauthorized: Invalid API token"))),
}

if __name__ == "__main__":
    content = {name: base64.b64encode(message).decode() for name, message in MESSAGES.items()}
    FILE.write_text(json.dumps(content, indent=1) + "\n")
