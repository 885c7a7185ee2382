"""`lara label` on hand-made datasets of the LeRobot format: what is written, and what survives a kill."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("pyarrow")

import av
import pyarrow.parquet as pq
from helpers import disk_datasets as disk
from test_model import save_distinct, small

from lara_adapter import AdapterFormatError, DatasetError, FrameError, LaraArgumentError, LatentActionModel, cli
from lara_adapter.data.gap import parse_gap
from lara_adapter.data.video import VideoFile
from lara_adapter.lam.label import label_dataset
from lara_adapter.lam.sequence import encode_sequence

GAP = 4
NAMES = ("lara.indices", "lara.latent", "lara.valid")
MAKERS = {
    "v3": disk.make_v3,
    "v3, one row group": lambda root: disk.make_v3(root, groups=False, per_file=3),
    "v3, pictures": lambda root: disk.make_v3(root, "image"),
    "v2.1": disk.make_v2,
    "v2.0": lambda root: disk.make_v2(root, "v2.0"),
}


@pytest.fixture(scope="module")
def lam(tmp_path_factory) -> Path:
    return save_distinct(tmp_path_factory.mktemp("models") / "lam")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return disk.make_v3(tmp_path_factory.mktemp("source") / "squares")


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def frames_of(root: Path) -> list[np.ndarray]:
    """The frames of each episode, read in another way than the library's."""
    info = json.loads((root / "meta/info.json").read_text())
    if info["features"][disk.CAMERA]["dtype"] == "image":
        return [disk.scene(number, length)[0] for number, length in enumerate(disk.LENGTHS)]
    every = np.concatenate([decoded(path) for path in sorted(root.rglob("*.mp4"))])
    return np.split(every, np.cumsum(disk.LENGTHS)[:-1])


def rows_of(root: Path):
    return [pq.read_table(path) for path in sorted((root / "data").rglob("*.parquet"))]


def columns_of(root: Path) -> dict[str, np.ndarray]:
    tables = rows_of(root)
    return {name: np.concatenate([np.array(table.column(name).to_pylist()) for table in tables]) for name in NAMES}


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("kind", MAKERS)
def test_the_labels_are_what_encode_gives_on_the_decoded_frames(kind, tmp_path, lam):
    root = MAKERS[kind](tmp_path / "squares")
    before = tree(root)
    report = label_dataset(root, lam, tmp_path / "copy", gap=GAP, batch_size=5)
    assert tree(root) == before
    found, start = columns_of(tmp_path / "copy"), 0
    model = LatentActionModel.from_pretrained(lam)
    for frames in frames_of(root):
        images, last = torch.from_numpy(frames).permute(0, 3, 1, 2), len(frames) - 1
        future = torch.arange(len(frames)) + GAP
        expected = model.encode(images, images[future.clamp(max=last)])
        part = slice(start, start + len(frames))
        torch.testing.assert_close(
            torch.from_numpy(found["lara.latent"][part]).float(), expected.continuous.flatten(1), rtol=1e-5, atol=1e-6
        )
        assert np.array_equal(found["lara.indices"][part], expected.indices.numpy())
        assert np.array_equal(found["lara.valid"][part], (future <= last).numpy())
        start += len(frames)
    assert start == sum(disk.LENGTHS) == report.frames
    assert report.invalid == sum(min(GAP, length) for length in disk.LENGTHS)
    assert report.codes_used == len(np.unique(found["lara.indices"][found["lara.valid"]])) > 3
    assert found["lara.latent"].std(0).min() > 1e-3  # the labels differ from frame to frame


@pytest.mark.parametrize("kind", MAKERS)
def test_everything_else_stays(kind, tmp_path, lam):
    root = MAKERS[kind](tmp_path / "squares")
    (root / "README.md").write_text("a card")
    (root / ".cache").mkdir()
    (root / ".cache/left").write_text("of a download")
    label_dataset(root, lam, tmp_path / "copy", gap=GAP)
    for old, new in zip(rows_of(root), rows_of(tmp_path / "copy")):
        assert new.column_names == [*old.column_names, *NAMES]
        assert new.select(old.column_names).replace_schema_metadata(None).equals(old.replace_schema_metadata(None))
        assert new.schema.metadata[b"own"] == b"kept"
        known = json.loads(new.schema.metadata[b"huggingface"])["info"]["features"]
        assert known["lara.indices"] == {"feature": {"dtype": "int64", "_type": "Value"}, "length": 3, "_type": "List"}
        assert known["lara.valid"] == {"dtype": "bool", "_type": "Value"}
    for path in (root / "data").rglob("*.parquet"):
        old, new = (pq.ParquetFile(base / path.relative_to(root)) for base in (root, tmp_path / "copy"))
        rows = [[file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] for file in (old, new)]
        assert rows[0] == rows[1]
        assert new.metadata.row_group(0).column(0).compression == old.metadata.row_group(0).column(0).compression
    old, new = tree(root), tree(tmp_path / "copy")
    assert old.keys() - {".cache/left"} | {"meta/lara.json"} == new.keys()
    changed = {name for name in old if name != ".cache/left" and old[name] != new[name]}
    assert all(name.startswith(("data/", "meta/")) for name in changed)
    assert not {"meta/tasks.parquet", "meta/tasks.jsonl", "meta/episodes.jsonl", "README.md"} & changed
    assert not list(tmp_path.glob(".copy*"))


def test_the_metadata_describe_the_new_features(tmp_path, source, lam):
    label_dataset(source, lam, tmp_path / "copy", gap=GAP, latent_dtype="float16")
    old, new = (json.loads((root / "meta/info.json").read_text()) for root in (source, tmp_path / "copy"))
    features = new["features"]
    assert {name: features.pop(name) for name in NAMES} == {
        "lara.indices": {"dtype": "int64", "shape": [3], "names": ["token_0", "token_1", "token_2"]},
        "lara.latent": {
            "dtype": "float16", "shape": [12], "names": [f"token_{n}.{d}" for n in range(3) for d in range(4)],
        },
        "lara.valid": {"dtype": "bool", "shape": [1], "names": None},
    }  # fmt: skip
    assert new == old
    schema = rows_of(tmp_path / "copy")[0].schema
    assert str(schema.field("lara.latent").type).startswith("fixed_size_list<")
    assert "halffloat" in str(schema.field("lara.latent").type)
    assert str(schema.field("lara.valid").type) == "bool"


def test_one_token_is_a_plain_number(tmp_path, source):
    small(queries=1).save_pretrained(tmp_path / "lam")
    label_dataset(source, tmp_path / "lam", tmp_path / "copy", gap=GAP)
    assert str(rows_of(tmp_path / "copy")[0].schema.field("lara.indices").type) == "int64"


def test_provenance_names_the_model_and_how(tmp_path, source, lam):
    label_dataset(source, lam, tmp_path / "copy", gap="0.4s")
    record = json.loads((tmp_path / "copy/meta/lara.json").read_text())
    assert record["lam"]["weights_sha256"] == hashlib.sha256((lam / "model.safetensors").read_bytes()).hexdigest()
    assert (record["lam"]["source"], record["lam"]["revision"]) == ("lam", None)
    assert (record["camera"], record["gap_frames"], record["gap_seconds"]) == (disk.CAMERA, 4, 0.4)
    assert "24 x 24" in record["preprocessing"]
    assert str(tmp_path) not in json.dumps(record)
    assert json.loads(rows_of(tmp_path / "copy")[0].schema.metadata[b"lara_adapter"]) == record


def test_the_commit_of_a_model_in_the_hubs_cache_is_recorded(tmp_path, source, lam):
    snapshot = tmp_path / "models--user--lam/snapshots/0123abc"
    shutil.copytree(lam, snapshot)
    label_dataset(source, snapshot, tmp_path / "copy", gap=GAP)
    assert json.loads((tmp_path / "copy/meta/lara.json").read_text())["lam"]["revision"] == "0123abc"


def test_statistics_per_episode_and_whole(tmp_path, lam):
    for make, name in ((disk.make_v3, "v3"), (disk.make_v2, "v2")):
        label_dataset(make(tmp_path / name), lam, tmp_path / f"{name} copy", gap=GAP)
    columns = columns_of(tmp_path / "v3 copy")
    parts = np.split(columns["lara.latent"], np.cumsum(disk.LENGTHS)[:-1])
    rows = pq.read_table(tmp_path / "v3 copy/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    lines = (tmp_path / "v2 copy/meta/episodes_stats.jsonl").read_text().splitlines()
    for row, line, part in zip(rows, map(json.loads, lines), parts):
        for kind in ("min", "max", "mean", "std"):
            expected = getattr(part.astype(np.float64), kind)(0)
            np.testing.assert_allclose(row[f"stats/lara.latent/{kind}"], expected, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(line["stats"]["lara.latent"][kind], expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(row["stats/lara.latent/q01"], np.quantile(part, 0.01, axis=0), atol=1e-7)
        assert row["stats/lara.valid/count"] == line["stats"]["lara.valid"]["count"] == [len(part)]
        assert "q01" not in line["stats"]["lara.latent"]  # this dataset keeps no quantiles
        assert "action" in line["stats"]
    whole = json.loads((tmp_path / "v3 copy/meta/stats.json").read_text())
    assert whole["lara.latent"].keys() == whole["action"].keys()
    for name in NAMES:
        values = columns[name].astype(np.float64).reshape(sum(disk.LENGTHS), -1)
        for kind in ("min", "max", "mean", "std"):
            np.testing.assert_allclose(whole[name][kind], getattr(values, kind)(0), rtol=1e-9, atol=1e-12)
    assert whole["lara.valid"]["count"] == [sum(disk.LENGTHS)]


def test_the_sidecar_holds_the_same_and_no_copy_is_made(tmp_path, source, lam):
    label_dataset(source, lam, tmp_path / "copy", gap=GAP)
    report = label_dataset(source, lam, tmp_path / "labels.parquet", gap=GAP, sidecar=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "labels.parquet"]
    table, columns = pq.read_table(report.output), columns_of(tmp_path / "copy")
    assert table.column_names == ["episode_index", "frame_index", "index", "indices", "latent", "valid"]
    for name in ("indices", "latent", "valid"):
        assert np.array_equal(np.array(table.column(name).to_pylist()), columns[f"lara.{name}"])
    assert table.column("index").to_pylist() == list(range(sum(disk.LENGTHS)))
    assert table.column("frame_index").to_pylist() == [t for length in disk.LENGTHS for t in range(length)]
    assert table.column("episode_index").to_pylist() == [e for e, n in enumerate(disk.LENGTHS) for _ in range(n)]
    record = json.loads(table.schema.metadata[b"lara_adapter"])
    assert record == json.loads((tmp_path / "copy/meta/lara.json").read_text())


# ---------------------------------------------------------------------- how


@pytest.mark.parametrize(("difference", "still"), [(False, False), (True, False), (False, True)])
def test_batches_do_not_matter_and_a_frame_is_encoded_once(difference, still):
    model = small(difference_input=difference, subtract_still=still, initializer_range=0.3).eval()
    frames, seen = disk.scene(3, 23)[0], []
    model.image_encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    results = []
    for batch_size in (1, 3, 64):
        seen.clear()
        results.append(encode_sequence(model, iter(frames), GAP, batch_size=batch_size))
        assert sum(seen) == 23 * (1 + difference)  # a difference image per pair, where the model reads it
    for other in results[1:]:
        torch.testing.assert_close(other.latent, results[0].latent, rtol=1e-4, atol=1e-5)
        assert torch.equal(other.indices, results[0].indices)
        assert torch.equal(other.valid, results[0].valid)


@pytest.mark.parametrize("difference", [False, True])
def test_a_sequence_is_encoded_as_its_pairs_are_where_the_still_pair_is_subtracted(difference):
    model = small(difference_input=difference, subtract_still=True, initializer_range=0.3).eval()
    frames = disk.scene(3, 12)[0]
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    expected = model.encode(images[:-GAP], images[GAP:])
    found = encode_sequence(model, frames, GAP, batch_size=5)
    torch.testing.assert_close(found.latent[:-GAP], expected.continuous, rtol=1e-4, atol=1e-5)
    assert not found.latent[-1].round(decimals=4).any()  # its future is itself


def test_reduced_precision_is_near_and_not_the_same():
    model, frames = small(initializer_range=0.3).eval(), disk.scene(3, 12)[0]
    full = encode_sequence(model, frames, GAP)
    reduced = encode_sequence(model, frames, GAP, dtype="bfloat16")
    assert reduced.latent.dtype == torch.float32
    assert not torch.equal(reduced.latent, full.latent)
    assert (reduced.latent - full.latent).norm() < 0.1 * full.latent.norm()


def test_frames_of_another_layout_are_refused():
    with pytest.raises(FrameError, match=r"uint8 \[3, 8, 8\], but a numpy array \[H, W, 3\] uint8"):
        encode_sequence(small().eval(), np.zeros((5, 3, 8, 8), np.uint8), GAP)


def test_another_gap_than_that_of_its_training_is_said(tmp_path, source, caplog):
    for gap, said in (("16", True), (str(GAP), False), ("9s", True), (None, False)):
        model = LatentActionModel(dataclasses.replace(small().config, gap=gap))
        model.save_pretrained(tmp_path / "lam")
        caplog.clear()
        label_dataset(source, tmp_path / "lam", tmp_path / f"copy-{gap}", gap=GAP)
        assert (f"gap={GAP} frames, but the LAM learnt with gap={gap}" in caplog.text.replace("9.0s", "9s")) == said


@pytest.mark.parametrize("length", [1, 3, GAP, GAP + 1])
def test_an_episode_shorter_than_the_gap_has_no_valid_pair(length):
    model, frames = small().eval(), disk.scene(1, length)[0]
    found = encode_sequence(model, frames, GAP)
    assert found.latent.shape == (length, 3, 4)
    assert int(found.valid.sum()) == max(0, length - GAP)
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    expected = model.encode(images[-1:], images[-1:])
    torch.testing.assert_close(found.latent[-1:], expected.continuous, rtol=1e-4, atol=1e-6)


def test_each_frame_is_decoded_once_in_one_sweep(tmp_path, lam, source, monkeypatch):
    steps, seeks = [], []
    decode, seek = VideoFile.decode, VideoFile._jump

    def counted(self, *arguments, **keywords):
        for item in decode(self, *arguments, **keywords):
            steps.append(item[0])
            yield item

    monkeypatch.setattr(VideoFile, "decode", counted)
    monkeypatch.setattr(VideoFile, "_jump", lambda self, start: (seeks.append(start), seek(self, start))[1])
    label_dataset(source, lam, tmp_path / "copy", gap=GAP)
    assert len(steps) == sum(disk.LENGTHS)
    assert len(seeks) == 2  # files


def test_reading_after_a_jump_in_a_video(source):
    frames = np.concatenate(frames_of(source)[:2])
    with VideoFile(source / f"videos/{disk.CAMERA}/chunk-000/file-000.mp4") as video:
        for start, count in ((14, 9), (3, 5), (8, 4), (0, 2), (20, 3)):
            found = np.stack(list(video.read(start / disk.FPS, count, disk.FPS)))
            assert np.array_equal(found, frames[start : start + count]), start


def test_videos_are_linked_by_default(tmp_path, source, lam):
    for link in (True, False):
        label_dataset(source, lam, tmp_path / str(link), gap=GAP, link=link)
        video = next((tmp_path / str(link)).rglob("*.mp4"))
        same = os.path.samefile(video, source / video.relative_to(tmp_path / str(link)))
        assert same is link


def test_a_download_of_the_hub_is_labelled_through_its_links(tmp_path, source, lam):
    """The Hub's cache keeps every file of a snapshot as a link to a blob; the copy holds the files themselves."""
    snapshot = tmp_path / "datasets--user--squares/snapshots/0123abc"
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        blob = tmp_path / f"blobs/{number}"
        blob.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    label_dataset(snapshot, lam, tmp_path / "copy", gap=GAP)
    label_dataset(source, lam, tmp_path / "plain", gap=GAP)
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))
    assert (
        columns_of(tmp_path / "copy")["lara.latent"].tolist() == columns_of(tmp_path / "plain")["lara.latent"].tolist()
    )


def test_gaps_in_frames_and_seconds():
    assert [parse_gap(gap).in_frames(10) for gap in (3, "3", "0.5s", "0.1s")] == [3, 3, 5, 1]
    for wrong in (0, "-1", "0.01s", "five", "nans", "infs", "2.5"):
        with pytest.raises(LaraArgumentError, match="gap="):
            parse_gap(wrong).in_frames(10)


# ---------------------------------------------------------------------- kills


# MODULE NAME CALLS ARGUMENTS: `lara` with these; the process dies when that function has been called so many times
DYING = """
import importlib, os, signal, sys
module, name, calls, *arguments = sys.argv[1:]
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
function, left = getattr(owner, name), int(calls)
def dying(*arguments, **keywords):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **keywords)
setattr(owner, name, dying)
from lara_adapter import cli
sys.exit(cli.main(arguments))
"""


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number rounds differently


def killed(at: str, calls: int, *arguments) -> None:
    """`lara` in a process of its own that kills itself when a function has been called so many times."""
    command = [sys.executable, "-c", DYING, *at.split(":"), str(calls), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("sidecar", [False, True])
def test_a_killed_run_resumes_and_gives_the_same_bytes(tmp_path, lam, source, sidecar):
    pytest.importorskip("tyro")
    outputs = [
        tmp_path / folder / "out.parquet" if sidecar else tmp_path / folder / "out" for folder in ("one go", "killed")
    ]
    first = label_dataset(source, lam, outputs[0], gap=GAP, sidecar=sidecar, link=False)
    assert first.resumed == 0
    again = ["label", source, "--lam", lam, "--output", outputs[1], "--gap", GAP, "--no-link"]
    again += ["--sidecar"] if sidecar else []
    killed("lara_adapter.lam.label.work:write_tensors", 2, *again)  # the third episode's labels are never written
    work = outputs[1].parent / f".{outputs[1].name}.labelling"
    assert len(list((work / "episodes").iterdir())) == 2
    assert not outputs[1].exists()
    (work / "episodes/000001.safetensors").write_bytes(b"torn by a power cut")
    killed("pyarrow.parquet:ParquetWriter.write_table", 1, *again)  # in the middle of a file of the output
    assert len(list((work / "episodes").iterdir())) == 3
    assert not outputs[1].exists()
    killed("shutil:rmtree", 0, *again)  # the output is there, and the work folder still is
    assert outputs[1].exists()
    assert work.exists()
    last = label_dataset(source, lam, outputs[1], gap=GAP, sidecar=sidecar, link=False)
    assert last.resumed == 3
    assert tree(outputs[1].parent) == tree(outputs[0].parent)


def test_an_unfinished_run_with_other_settings_is_not_mixed_in(tmp_path, lam, source, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lara_adapter.lam.label.job.write_copy", stop)
        with pytest.raises(KeyboardInterrupt):
            label_dataset(source, lam, tmp_path / "copy", gap=GAP)
    with pytest.raises(LaraArgumentError, match=r"unfinished labelling.*gap_frames 4 \(now 5\)"):
        label_dataset(source, lam, tmp_path / "copy", gap=GAP + 1)
    small().save_pretrained(tmp_path / "lam")
    with pytest.raises(LaraArgumentError, match=r"unfinished labelling.*lam\.weights_sha256"):
        label_dataset(source, tmp_path / "lam", tmp_path / "copy", gap=GAP)
    assert label_dataset(source, lam, tmp_path / "copy", gap=GAP).resumed == 3


# ---------------------------------------------------------------------- refusals


def test_refusals_name_what_is_wrong(tmp_path, lam, source):
    def refused(kind, message, **changes):
        arguments = {"dataset": source, "lam": lam, "output": tmp_path / "copy", "gap": GAP, **changes}
        with pytest.raises(kind, match=message):
            label_dataset(**arguments)

    two = disk.make_v3(tmp_path / "two", cameras=(disk.CAMERA, disk.WRIST), lengths=(5,))
    refused(LaraArgumentError, "camera=None, but two has observation.images.top, observation.images.wrist", dataset=two)
    refused(LaraArgumentError, "camera='side', but", dataset=two, camera="side")
    refused(DatasetError, "does not exist", dataset=tmp_path / "none")
    refused(
        DatasetError, "^actions: the folder .* does not exist; the folder of a LeRobot dataset is", actions="./none"
    )
    refused(LaraArgumentError, f"the longest episode of .* has {max(disk.LENGTHS)}: no pair", gap=max(disk.LENGTHS))
    refused(AdapterFormatError, "is not a latent action model: .* as a LeRobot dataset does", lam=source)
    (tmp_path / "file").write_text("")
    refused(LaraArgumentError, "file is a file, but a folder is expected", output=tmp_path / "file" / "copy")
    (tmp_path / "empty").mkdir()
    refused(DatasetError, "holds nothing that can be read. Expected: meta/info.json", dataset=tmp_path / "empty")
    refused(DatasetError, "nothing that can be read; it is a latent action model. Expected", dataset=lam)
    refused(LaraArgumentError, "is, holds or lies in the dataset", output=source / "copy")
    refused(LaraArgumentError, "is, holds or lies in the dataset", output=source)
    refused(LaraArgumentError, "is, holds or lies in the dataset", output=source.parent)
    refused(LaraArgumentError, "ends in .parquet", sidecar=True)
    refused(LaraArgumentError, "gap='soon'", gap="soon")
    refused(LaraArgumentError, "device='warp'", device="warp")
    refused(LaraArgumentError, "dtype='int8'", dtype="int8")
    refused(LaraArgumentError, "latent_dtype='int8'", latent_dtype="int8")
    refused(LaraArgumentError, "batch_size=0", batch_size=0)
    refused(LaraArgumentError, "prefix='a/b'", prefix="a/b")
    assert not (tmp_path / ".copy.labelling").exists()  # nothing was begun
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("keep")
    refused(LaraArgumentError, "exists, and is not a labelling of ours", output=tmp_path / "taken")
    assert (tmp_path / "taken/mine.txt").read_text() == "keep"
    label_dataset(source, lam, tmp_path / "copy", gap=GAP)
    refused(LaraArgumentError, r"exists and was made otherwise: gap_frames 4 \(now 5\)", gap=GAP + 1)
    refused(LaraArgumentError, "has lara.indices, .* already", dataset=tmp_path / "copy", output=tmp_path / "twice")
    again = label_dataset(tmp_path / "copy", lam, tmp_path / "twice", gap=GAP, prefix="other")
    assert again.features == ("other.indices", "other.latent", "other.valid")
    label_dataset(two, lam, tmp_path / "wrist", gap=1, camera="wrist")
    assert json.loads((tmp_path / "wrist/meta/lara.json").read_text())["camera"] == disk.WRIST


def edited(root: Path, **changes) -> Path:
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return root


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: edited(root, codebase_version="v1.6"), "codebase_version 'v1.6', but v2.0, v2.1, v3.0"),
        (lambda root: edited(root, video_path="../{video_key}.mp4"), "outside of the dataset"),
        (lambda root: edited(root, features=None), "meta is damaged"),
        (lambda root: next(root.rglob("*.mp4")).unlink(), "cannot be opened as a video"),
        (lambda root: next(root.rglob("*.mp4")).write_bytes(b"\0" * 4000), "cannot be opened as a video"),
        (
            lambda root: next(root.rglob("*.mp4")).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "a pointer of Git LFS, not the video; fetch it with",
        ),
        (lambda root: disk.write_video(next(root.rglob("*.mp4")), disk.scene(0, 5)[0]), "ends after 0.500 s, but it needs"),
        (lambda root: next(root.rglob("episode_*.parquet")).write_bytes(b"PAR1"), "parquet"),
    ],
    ids=["version", "traversal", "features", "no video", "no video inside", "git lfs", "short video", "no parquet"],
)  # fmt: skip
def test_a_damaged_dataset_is_refused(tmp_path, lam, harm, message):
    root = disk.make_v2(tmp_path / "squares", lengths=(9,))
    harm(root)
    with pytest.raises(DatasetError, match=message):
        label_dataset(root, lam, tmp_path / "copy", gap=GAP)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("package", "message"), [("av", "needs PyAV: pip install"), ("pyarrow", "need pyarrow: pip install")]
)
def test_a_missing_package_is_named(tmp_path, lam, source, monkeypatch, package, message):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DatasetError, match=message):
        label_dataset(source, lam, tmp_path / "copy", gap=GAP)


def test_a_full_disk_is_noticed_before_the_work(tmp_path, lam, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(LaraArgumentError, match=r"GB are needed, but 0\.0 GB are free"):
        label_dataset(source, lam, tmp_path / "copy", gap=GAP)
    assert not list((tmp_path / ".copy.labelling/episodes").iterdir())


def test_a_diverged_model_is_noticed(tmp_path, source):
    model = small()
    torch.nn.init.constant_(model.inverse_dynamics.down[0].bias, 10.0)
    torch.nn.init.constant_(model.inverse_dynamics.down[2].weight, 3e38)
    model.save_pretrained(tmp_path / "lam")
    with pytest.raises(DatasetError, match="NaN or infinite"):
        label_dataset(source, tmp_path / "lam", tmp_path / "copy", gap=GAP)


# ---------------------------------------------------------------------- the command


def test_the_command(tmp_path, lam, source, capsys):
    pytest.importorskip("tyro")
    arguments = ["label", str(source), "--lam", str(lam), "--output", str(tmp_path / "copy")]
    assert cli.main([*arguments, "--gap", "0.4s"]) == 0
    out = capsys.readouterr().out
    assert "lara.indices, lara.latent, lara.valid of 43 frames in 3 episodes" in out
    assert "12 frames without a future within the episode" in out
    assert cli.main([*arguments, "--gap", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == 3
    assert cli.main([*arguments, "--gap", "7"]) == 2
    assert "gap_frames 4 (now 7)" in capsys.readouterr().err
    arguments[-1] = str(tmp_path / "x.parquet")
    assert cli.main([*arguments, "--gap", "4", "--sidecar"]) == 0
    assert pq.read_metadata(tmp_path / "x.parquet").num_rows == 43
