"""Folders that somebody made to do harm, or that came apart: refused with the reason, nothing run, nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import tracemalloc

import pytest
import torch
from helpers.toys import DitPolicy
from helpers.trained import SMALL, build, lara_on

from lara_adapter import AdapterFormatError, LaraConfig, LaraError, LatentActionConfig, LatentActionModel, load_lara
from lara_adapter.saving.read import read_adapter
from lara_adapter.storage.files import read_json, read_tensors, write_tensors
from lara_adapter.storage.untrusted import check_tensor_file, parse_json, safe_path


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "adapter"
    torch.manual_seed(0)
    lara_on(build()).save_pretrained(folder, save_policy="trainable")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "adapter")
    return tmp_path / "adapter"


def sign(folder):
    """What somebody with bad intentions does too: make the checksums right."""
    path = folder / "lara_config.json"
    content = json.loads(path.read_text())
    content["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() if (folder / name).is_file() else digest
        for name, digest in content["files"].items()
    }
    path.write_text(json.dumps(content))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder, message, **arguments):
    policy = build()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with pytest.raises(AdapterFormatError, match=message):
        load_lara(policy, folder, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert policy.state_dict().keys() == before.keys()
    assert "forward" not in policy.__dict__


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


FILES = ["lara_adapter.safetensors", "lam/model.safetensors", "policy_weights/model.safetensors"]


@pytest.mark.parametrize("protocol", ["torch", "legacy", "pickle"])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_safetensors(folder, tmp_path, name, protocol):
    import pickle

    content = {"a": Bomb(tmp_path / "executed")}
    if protocol == "pickle":
        (folder / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, folder / name, _use_new_zipfile_serialization=protocol == "torch")
    sign(folder)
    refused(folder, "pickle of torch.save, which is never opened")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "evil.py", "setup.py"])
def test_files_that_nobody_asked_for_are_not_touched(folder, tmp_path, name):
    for place in (folder, folder / "lam", folder / "policy_weights"):
        torch.save({"a": Bomb(tmp_path / "executed")}, place / name)
    load_lara(build(), folder)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------- headers that lie


def raw(header, data=b"\x00" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**changes):
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}


NOT_TENSORS = r"is truncated or not a safetensors file \(Error while deserializing header"  # safetensors' own reason

LIES = {
    "beyond the file": (raw({"a": one(shape=[8], data_offsets=[0, 32])}), NOT_TENSORS),
    "overlap": (raw({"a": one(), "b": one()}), NOT_TENSORS),
    "hole": (raw({"a": one(shape=[2], data_offsets=[8, 16])}), NOT_TENSORS),
    "rest": (raw({"a": one(shape=[2], data_offsets=[0, 8])}), NOT_TENSORS),
    "negative": (raw({"a": one(data_offsets=[-16, 0])}), NOT_TENSORS),
    "backwards": (raw({"a": one(data_offsets=[16, 0])}), NOT_TENSORS),
    "size": (raw({"a": one(shape=[5])}), NOT_TENSORS),
    "huge shape": (raw({"a": one(shape=[2**62, 2**62])}), NOT_TENSORS),
    "shape overflow to zero": (
        raw({"a": one(shape=[2**32, 2**32], data_offsets=[0, 0])}, b""),
        NOT_TENSORS,
    ),
    "bool as a number": (raw({"a": one(shape=[True, 4])}), NOT_TENSORS),
    "dtype": (raw({"a": one(dtype="OBJECT")}), NOT_TENSORS),
    "dtype of a wrong kind": (raw({"a": one(dtype=["F32"])}), NOT_TENSORS),
    "no mapping": (raw({"a": 3}), NOT_TENSORS),
    "twice": (raw(b'{"a":' + json.dumps(one()).encode() + b',"a":' + json.dumps(one()).encode() + b"}"), "given twice"),
    "list": (raw(b"[]", b""), "an object is expected"),
    "deep": (raw(b'{"a":' * 5000 + b"1" + b"}" * 5000), "not readable JSON"),
    "metadata": (raw({"__metadata__": {"a": ["b"]}, "a": one()}), NOT_TENSORS),
    "length": (raw({"a": one()}, length=2**63), "its header does not fit in the file"),
    "length beyond": (raw({"a": one()}, length=400), "its header does not fit in the file"),
    "huge header": (raw(b"{" + b" " * (17 * 2**20) + b"}"), "its header has 17825794 bytes, the limit is 16777216"),
    "text": (raw(b'{"a": "\xff"}'), "not readable JSON"),
    "number": (raw(b'{"a": ' + b"9" * 100000 + b"}"), "not readable JSON"),
    "empty": (b"", "truncated"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(folder, lie):
    content, message = LIES[lie]
    path = folder / "lara_adapter.safetensors"
    path.write_bytes(content)
    sign(folder)
    with pytest.raises(AdapterFormatError, match=message):
        read_tensors(path)
    refused(folder, message)


def test_a_good_header_passes(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3), "b": torch.zeros(0, 4), "c": torch.zeros((), dtype=torch.int64), "d": torch.ones(5).bool(),
        "e": torch.ones(2, dtype=torch.bfloat16), "é": torch.ones(1, dtype=torch.complex64),
    }  # fmt: skip
    write_tensors(tmp_path / "t.safetensors", tensors, note="any")
    assert check_tensor_file(tmp_path / "t.safetensors") == {name: tuple(t.shape) for name, t in tensors.items()}


def test_more_fields_in_a_header_are_not_looked_at(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(raw({"a": one(code="os.mkdir")}))
    assert check_tensor_file(path) == {"a": (4,)}
    assert torch.equal(read_tensors(path)["a"], torch.zeros(4))


# ---------------------------------------------------------------------- names and links that lead out


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "..", ".", "", "a//b", "C:\\x", "a\\..\\x", "./x", "x\x00", "lam/../../x"],
)
def test_names_that_lead_out(folder, name):
    with pytest.raises(AdapterFormatError, match="not the name of a file inside"):
        safe_path(folder, name)
    files = json.loads((folder / "lara_config.json").read_text())["files"]
    edit(folder / "lara_config.json", files={**files, name: "0" * 64})
    refused(folder, "not the name of a file inside|not readable JSON")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "model.bin", "model-00001-of-00002.safetensors/..", 3, None]
)
def test_an_index_that_leads_out(folder, name):
    index = folder / "policy_weights" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={**weight_map, "action_in.weight": name})
    sign(folder)
    refused(folder, "not the name of a shard|text to text", inference=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_map": []}, "weight_map"),
        ({"ties": {"a": "b"}}, "tied to 'b', which is not stored"),
        ({"weight_map": {"a": "model.safetensors"}}, "does not hold the tensors"),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "is missing"),
    ],
)
def test_an_index_that_does_not_agree(folder, changes, message):
    edit(folder / "policy_weights" / "model.safetensors.index.json", **{"ties": {}, **changes})
    sign(folder)
    refused(folder, message, inference=True)


@pytest.mark.parametrize(
    "name", ["lara_config.json", *FILES, "lam/config.json", "policy_weights/model.safetensors.index.json"]
)
def test_a_link_to_a_file_outside(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    refused(folder, "a link out of its folder")


@pytest.mark.parametrize("name", ["lam", "policy_weights"])
def test_a_link_to_a_folder_outside(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    refused(folder, "a link out of its folder")


def test_a_link_in_a_circle(folder):
    path = folder / "lara_adapter.safetensors"
    path.unlink()
    path.symlink_to(path)
    refused(folder, "a broken link|is missing")


def test_links_inside_and_those_of_the_hubs_cache_are_as_they_should_be(original, tmp_path):
    repo = tmp_path / "models--user--adapter"
    snapshot = repo / "snapshots" / ("0" * 40)
    for path in (p for p in original.rglob("*") if p.is_file()):
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(original)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    load_lara(build(), snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    load_lara(build(), tmp_path / "link", inference=True)
    other = tmp_path / "models--user--other" / "blobs" / "x"  # of another repository
    other.parent.mkdir(parents=True)
    link = snapshot / "lara_adapter.safetensors"
    shutil.copy(link, other)
    link.unlink()
    link.symlink_to(other)
    refused(snapshot, "a link out of its folder")


def test_a_latent_action_model_that_links_outside(original, tmp_path):
    shutil.copytree(original / "lam", tmp_path / "lam")
    path = tmp_path / "lam" / "model.safetensors"
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterFormatError, match="a link out of its folder"):
        LatentActionModel.from_pretrained(tmp_path / "lam")


def test_saving_over_a_folder_with_links_writes_nothing_outside(original, tmp_path):
    """A folder of somebody else's may hold links; what they lead to is neither written to nor copied in."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "lam").symlink_to(outside)
    (target / "README.md").symlink_to(outside / "secret")
    (target / "theirs").symlink_to(outside)
    lara_on(build()).save_pretrained(target)
    assert (outside / "secret").read_text() == "secret"
    assert sorted(p.name for p in outside.iterdir()) == ["secret"]
    assert not (target / "lam").is_symlink()
    assert (target / "theirs").is_symlink()
    assert not (target / "README.md").is_symlink()


# ---------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version=2.*upgrade"),
        ({"schema_version": True}, "not an adapter of lara_adapter"),
        ({"schema_version": "1"}, "not an adapter of lara_adapter"),
        ({"layer": True}, "layer=True"),
        ({"latent_width": -1}, "below 1"),
        ({"depth": 0}, "below 1"),
        ({"projector": "os.system"}, "projector='os.system'"),
        ({"tap_kind": "exec"}, "tap_kind='exec'"),
        ({"token": "x" * 1000}, "out of range"),
        ({"alignment": {"name": "contrastive", "temperature": "hot"}}, "out of range|not an alignment"),
        ({"align_weight": -1.0}, "out of range"),
        ({"align_weight": {"schedule": "warmup", "weight": "x", "steps": 1}}, "out of range"),
        ({"align_weight": {"schedule": "warmup", "weight": 1, "steps": -5}}, "out of range"),
        ({"lam_grad_scale": -0.1}, "out of range"),
        ({"files": []}, "files is"),
        ({"files": {}}, "it was added later|sha256 differs"),
        ({"files": {"lara_adapter.safetensors": "x"}}, "the sha256 of"),
        ({"origins": []}, "origins"),
    ],
)
def test_settings_out_of_range(folder, changes, message):
    edit(folder / "lara_config.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": ' + "9" * 50 + "}", '{"a": 1, "a": 2}',
     '{"a": ' + "[" * 40 + "]" * 40 + "}", '{"a": "\\ud800"}', '{"a": "\\u0000"}', "\ufeff{}", "[" * 200_000,
     '{"a":' * 100_000],
)  # fmt: skip
def test_json_that_is_a_trap(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(AdapterFormatError, match=r"c\.json"):
        read_json(path)


def test_json_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "c.json"
    with path.open("wb") as stream:
        stream.truncate(2**34)  # takes no room on the disk
    with pytest.raises(AdapterFormatError, match="larger than"):
        read_json(path)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder):
    (folder / "lara_config.json").unlink()
    os.mkfifo(folder / "lara_config.json")
    refused(folder, "is not a file")


@pytest.mark.parametrize(
    "changes", [{"codebook_size": 10**12}, {"idm_layers": 10**9}, {"fdm_width": 2**20, "fdm_heads": 1}]
)
def test_a_latent_action_model_that_claims_to_be_huge_takes_no_memory(original, tmp_path, changes):
    shutil.copytree(original / "lam", tmp_path / "lam")
    edit(tmp_path / "lam" / "config.json", **changes)
    with pytest.raises(AdapterFormatError, match=r"describes a model|is expected"):
        LatentActionModel.from_pretrained(tmp_path / "lam")


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FILES)
def test_weights_that_are_not_finite(folder, name, value):
    tensors = read_tensors(folder / name)
    key = next(k for k, t in sorted(tensors.items()) if t.is_floating_point() and t.ndim == 2)
    tensors[key][0, 0] = value
    write_tensors(folder / name, tensors)
    sign(folder)
    refused(folder, f"{key.removeprefix('projector.')} holds NaN or infinite")


@pytest.mark.parametrize("name", FILES)
def test_weights_of_a_wrong_shape(folder, name):
    tensors = read_tensors(folder / name)
    key = next(k for k, t in sorted(tensors.items()) if t.ndim == 2 and "direction" not in k)
    write_tensors(folder / name, {**tensors, key: torch.zeros(1, 1)})
    sign(folder)
    refused(folder, "has shape")


def test_a_changed_file_is_noticed(folder):
    for name in [*FILES, "lam/config.json"]:
        copy = folder.parent / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        data = bytearray((copy / name).read_bytes())
        data[-3] ^= 1
        (copy / name).write_bytes(bytes(data))
        refused(copy, "sha256 differs")


def test_a_folder_that_was_added_is_not_used(folder):
    (folder / "policy_lora").mkdir()
    refused(folder, "policy_lora is not among the files of lara_config.json")


# ---------------------------------------------------------------------- LoRA


@pytest.fixture
def lora_folder(tmp_path):
    peft = pytest.importorskip("peft")
    lara_on(build(DitPolicy, peft.LoraConfig(target_modules=["mlp.0"], r=2))).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"}}, "names code to import"),
        ({"megatron_core": "evil", "megatron_config": {}}, "names code to import"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path"),
        ({"r": 10**9}, "a rank of 1000000000"),
        ({"r": True}, "r is True"),
        ({"r": -1}, "a rank of -1"),
        ({"rank_pattern": {"mlp": 10**9}}, "a rank of 1000000000"),
        ({"rank_pattern": {"(a+)+$": 2}}, "not a plain module name"),
        ({"alpha_pattern": {"mlp": "x"}}, "lora_alpha 'x'"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"layer_replication": [[0, 10**6]]}, "asks for"),
        ({"init_lora_weights": "loftq"}, "cannot be restored exactly"),
        ({"some_future_switch": True}, "asks for.*some_future_switch"),
        ({"modules_to_save": ["(a+)+"]}, "not a module name"),
        ({"bias": "evil"}, "bias is 'evil'"),
    ],
)
def test_settings_of_lora_that_are_a_trap(lora_folder, changes, message):
    edit(lora_folder / "policy_lora" / "adapter_config.json", **changes)
    sign(lora_folder)
    policy = build(DitPolicy)
    names = set(policy.state_dict())
    with pytest.raises(AdapterFormatError, match=message):
        load_lara(policy, lora_folder, inference=True)
    assert set(policy.state_dict()) == names


def test_what_a_stranger_says_of_the_base_is_not_followed(lora_folder):
    """A pattern that would take for ever, a base elsewhere: modules come from the weights, the base is the user's."""
    edit(
        lora_folder / "policy_lora" / "adapter_config.json", target_modules="(" * 20 + "a+" + ")+" * 20 + "$",
        base_model_name_or_path="evil/repository", exclude_modules="(a+)+$",
    )  # fmt: skip
    sign(lora_folder)
    load_lara(build(DitPolicy), lora_folder, inference=True)


def test_pickled_lora_is_not_opened(lora_folder, tmp_path):
    torch.save({"a": Bomb(tmp_path / "executed")}, lora_folder / "policy_lora" / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="pickles can run code"):
        load_lara(build(DitPolicy), lora_folder, inference=True)
    (lora_folder / "policy_lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFormatError, match="is missing"):
        load_lara(build(DitPolicy), lora_folder, inference=True)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------- fuzz


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Bytes with a few things done to them that damage or malice does."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(out) + 1)
        kind = draw.randrange(6)
        if kind == 0 and out:
            out[at % len(out)] = draw.randrange(256)
        elif kind == 1:
            del out[at : at + draw.randint(1, 40)]
        elif kind == 2:
            out[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 8)))
        elif kind == 3:
            other = draw.randrange(len(out) + 1)
            out[at:at] = out[other : other + draw.randint(1, 60)]
        elif kind == 4:
            out[at:at] = draw.choice(
                [
                    b"[" * 500,
                    b'{"a":' * 300,
                    b"9" * 400,
                    b"1e999",
                    b"-1",
                    b"null",
                    b"true",
                    b"NaN",
                    b'"\\ud800"',
                    b'"\\u0000"',
                    b"{}",
                ]
            )
        else:
            numbers = [i for i, c in enumerate(out) if 48 <= c <= 57]
            if numbers:
                out[draw.choice(numbers)] = 48 + draw.randrange(10)
    return bytes(out)


def value_mutated(content, draw):
    """JSON that stays JSON, with values of other kinds."""
    content = json.loads(json.dumps(content))
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(sorted(content))
        content[name] = draw.choice(
            [
                None,
                True,
                -1,
                0,
                2**63,
                1e300,
                "",
                "x" * 5000,
                "../..",
                [],
                {},
                [[[]]],
                {"name": []},
                {"schedule": 3},
                {"a": {"b": 1}},
            ]
        )
    return content


def test_fuzzed_configurations_give_the_one_error_or_settings(folder, original):
    draw = random.Random(0)
    path = folder / "lara_config.json"
    good = json.loads((original / "lara_config.json").read_text())
    data = path.read_bytes()
    refusals = 0
    tracemalloc.start()
    for round_ in range(300):
        path.write_bytes(mutated(data, draw) if round_ % 2 else json.dumps(value_mutated(good, draw)).encode())
        try:
            read_adapter(folder)
        except AdapterFormatError as error:
            refusals += 1
            assert len(str(error)) < 5000  # noqa: PT017
    lam = json.loads((original / "lam" / "config.json").read_text())
    for round_ in range(200):
        data = json.dumps(lam).encode()
        try:
            content = parse_json(mutated(data, draw), "x") if round_ % 2 else value_mutated(lam, draw)
            LatentActionConfig.from_dict(content)
        except LaraError:
            refusals += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refusals > 250
    assert peak < 32 * 2**20


def test_fuzzed_headers_give_the_one_error_or_what_safetensors_reads(tmp_path, original):
    draw = random.Random(1)
    good = (original / "lara_adapter.safetensors").read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    head, data = good[8 : 8 + length], good[8 + length :]
    path, refusals = tmp_path / "t.safetensors", 0
    for round_ in range(400):
        if round_ % 3 == 0:
            content = mutated(good[: 8 + length], draw) + data
        else:
            text = mutated(head, draw)
            content = struct.pack("<Q", len(text)) + text + data
        path.write_bytes(content)
        try:
            read_tensors(path)
        except AdapterFormatError as error:
            refusals += 1
            assert len(str(error)) < 5000  # noqa: PT017
    assert refusals > 300


def test_fuzzed_index_of_the_policys_weights(folder, original):
    from lara_adapter.saving import policy_weights

    draw = random.Random(2)
    path = folder / "policy_weights" / "model.safetensors.index.json"
    data = path.read_bytes()
    for _ in range(200):
        path.write_bytes(mutated(data, draw))
        try:
            policy_weights.read_index(folder)
        except AdapterFormatError:
            continue


def test_fuzzed_settings_of_lora(lora_folder):
    from lara_adapter.saving import lora

    draw = random.Random(3)
    path = lora_folder / "policy_lora" / "adapter_config.json"
    good = json.loads(path.read_text())
    for _ in range(200):
        path.write_text(json.dumps(value_mutated(good, draw)))
        try:
            lora.settings(lora_folder)
        except AdapterFormatError:
            continue


def test_the_settings_stay_settings():
    """What the fuzz starts from is read."""
    content = {
        "layer": 1,
        "depth": 2,
        "blocks": "b",
        "tap": "b.0",
        "tap_kind": "output",
        "hidden_width": 3,
        "latent_width": 4,
    }
    assert LaraConfig.from_dict({**content, "schema_version": 1}).layer == 1
    assert set(SMALL) <= set(LatentActionConfig.tiny().to_dict())
