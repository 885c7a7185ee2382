import os

import pytest
import torch
from torch import nn

from lara_adapter import AdapterFormatError, LaraArgumentError
from lara_adapter.storage.files import (
    check_folder,
    load_into,
    read_json,
    read_tensors,
    replace_file,
    replace_folder,
    write_json,
    write_tensors,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_as_a_whole(tmp_path):
    with replace_folder(tmp_path / "a" / "b") as fresh:
        (fresh / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert names(tmp_path / "a" / "b") == ["x"]
    assert names(tmp_path / "a") == ["b"]


def test_a_failure_leaves_the_old_folder_and_no_litter(tmp_path):
    target = tmp_path / "adapter"
    with replace_folder(target) as fresh:
        (fresh / "x").write_text("old")

    def write_and_fail():
        with replace_folder(target) as fresh:
            (fresh / "x").write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_and_fail()
    assert (target / "x").read_text() == "old"
    assert names(tmp_path) == ["adapter"]


def test_foreign_files_are_kept_and_ours_replaced(tmp_path):
    target = tmp_path / "adapter"
    (target / "notes").mkdir(parents=True)
    (target / "notes" / "mine.txt").write_text("keep")
    (target / "x").write_text("old")
    with replace_folder(target) as fresh:
        (fresh / "x").write_text("new")
    assert (target / "x").read_text() == "new"
    assert (target / "notes" / "mine.txt").read_text() == "keep"
    assert names(tmp_path) == ["adapter"]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(AdapterFormatError, match="is a file, but a folder"), replace_folder(tmp_path / "f"):
        pass


def test_replace_file_is_atomic(tmp_path):
    target = tmp_path / "f.json"
    write_json(target, {"a": 1})

    def write_and_fail():
        with replace_file(target) as fresh:
            fresh.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert read_json(target) == {"a": 1}
    assert names(tmp_path) == ["f.json"]
    assert oct(os.stat(target).st_mode & 0o777) == "0o644"


@pytest.mark.parametrize("text", ["", "{", "[1]", "nul", "\xff", "[" * 100000])
def test_json_that_is_no_object(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterFormatError, match=r"c\.json"):
        read_json(path)


def test_a_folder_of_another_kind_is_recognised(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text("{}")
    with pytest.raises(AdapterFormatError, match=r"the folder holds \['meta'\], as a LeRobot dataset does"):
        read_json(tmp_path / "c.json")
    (tmp_path / "lara_config.json").write_text("{}")
    with pytest.raises(AdapterFormatError, match=r"as a LARA adapter \(its latent action model is in lam/\) does"):
        read_json(tmp_path / "c.json")


def test_a_file_is_no_folder(tmp_path):
    check_folder("output", tmp_path / "new" / "one")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LaraArgumentError, match="file is a file, but a folder is expected"):
            check_folder("output", path)


def test_missing_files_say_what_is_there(tmp_path):
    (tmp_path / "other.bin").write_text("")
    with pytest.raises(AdapterFormatError, match=r"is missing: the folder holds \['other\.bin'\]"):
        read_json(tmp_path / "c.json")
    with pytest.raises(AdapterFormatError, match="does not exist"):
        read_tensors(tmp_path / "nowhere" / "m.safetensors")
    (tmp_path / ".gone.old-1").mkdir()
    with pytest.raises(AdapterFormatError, match="does not exist"):  # empty: nothing was left there
        read_json(tmp_path / "gone" / "c.json")
    (tmp_path / ".gone.old-1" / "c.json").write_text("{}")
    with pytest.raises(AdapterFormatError, match=r"an interrupted save left the previous content in .*old-1"):
        read_json(tmp_path / "gone" / "c.json")


def test_tensors_round_trip_with_aliases_and_views(tmp_path):
    x = torch.randn(3, 4)
    write_tensors(tmp_path / "t.safetensors", {"a": x, "b": x, "c": x.t(), "d": x[1]})
    back = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(back["a"], x)
    assert torch.equal(back["b"], x)
    assert torch.equal(back["c"], x.t())
    assert torch.equal(back["d"], x[1])


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_tensors(tmp_path, keep):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.randn(10)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterFormatError, match="truncated or not a safetensors file"):
        read_tensors(path)


def test_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"a": Bomb()}, tmp_path / "t.safetensors")
    with pytest.raises(AdapterFormatError):
        read_tensors(tmp_path / "t.safetensors")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, r"1 tensors missing \['bias'\]"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "x": torch.zeros(1)}, r"1 unexpected \['x'\]"),
        (
            {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)},
            r"weight has shape \[3, 2\], but Linear expects \[2, 3\]",
        ),
        ({"weight": torch.zeros(2, 3).long(), "bias": torch.zeros(2)}, "weight is torch.int64"),
        ({"weight": torch.full((2, 3), float("nan")), "bias": torch.zeros(2)}, "weight holds NaN"),
    ],
)
def test_load_into_checks_everything_first(tensors, message):
    module = nn.Linear(3, 2)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(AdapterFormatError, match=message):
        load_into(module, tensors, "file")
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_replaced_folder_can_leave_nothing_of_the_old(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/old").write_text("old")
    with replace_folder(tmp_path / "folder", keep_others=False) as fresh:
        (fresh / "new").write_text("new")
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["new"]
