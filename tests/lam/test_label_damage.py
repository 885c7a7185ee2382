"""`lara label` on datasets with damaged, missing, unlisted and unselected episodes, and with odd metadata and columns."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq
from helpers import disk_datasets as disk
from test_label import GAP, NAMES, columns_of, lam, tree  # noqa: F401  (a fixture)
from test_label_shards import spoil

from lara_adapter import DatasetError, LaraArgumentError, cli
from lara_adapter.lam.label import job, label_dataset

ENDS = np.cumsum(disk.LENGTHS)


def parts(root):
    """The columns of each episode."""
    return {name: np.split(values, ENDS[:-1]) for name, values in columns_of(root).items()}


def record(root):
    return json.loads((root / "meta/lara.json").read_text())


def rewrite(path, change):
    """Change the table of a parquet file."""
    table = change(pq.read_table(path))
    pq.write_table(table, path)


def lines(path):
    return path.read_text().splitlines()


# ---------------------------------------------------------------------- which episodes


@pytest.mark.parametrize("make", [disk.make_v2, disk.make_v3])
def test_only_the_selected_episodes_have_labels(tmp_path, lam, make):  # noqa: F811
    root = make(tmp_path / "squares")
    whole = label_dataset(root, lam, tmp_path / "whole", gap=GAP)
    report = label_dataset(root, lam, tmp_path / "out", gap=GAP, episodes=[":2"], skip=["0"])
    assert (report.episodes, report.frames, report.left_out, report.not_selected) == (1, 9, {}, ["0", "2"])
    assert (whole.episodes, whole.not_selected) == (3, [])
    full, some = parts(tmp_path / "whole"), parts(tmp_path / "out")
    for name in NAMES:
        assert np.array_equal(some[name][1], full[name][1])
        assert not some[name][0].any()
        assert not some[name][2].any()
    assert record(tmp_path / "out")["result"] == {
        "episodes": 1, "frames": 9, "invalid": 4, "codes_used": report.codes_used, "left_out": {},
        "not_selected": ["0", "2"],
    }  # fmt: skip
    sidecar = label_dataset(root, lam, tmp_path / "x.parquet", gap=GAP, sidecar=True, episodes=["1"])
    table = pq.read_table(sidecar.output)
    assert set(table.column("episode_index").to_pylist()) == {1}
    assert table.column("index").to_pylist() == list(range(14, 23))
    for unknown in ("7", "3:"):
        with pytest.raises(LaraArgumentError, match=f"episodes: '{unknown}' names none of"):
            label_dataset(root, lam, tmp_path / "no", gap=GAP, episodes=[unknown])


def test_statistics_are_of_labelled_episodes_only(tmp_path, lam):  # noqa: F811
    for make, name in ((disk.make_v3, "v3"), (disk.make_v2, "v2")):
        label_dataset(make(tmp_path / name), lam, tmp_path / f"{name} out", gap=GAP, skip=["1"])
    latent = parts(tmp_path / "v3 out")["lara.latent"]
    kept = np.concatenate([latent[0], latent[2]]).astype(np.float64)
    whole = json.loads((tmp_path / "v3 out/meta/stats.json").read_text())["lara.latent"]
    assert whole["count"] == [34]
    for kind in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(whole[kind], getattr(kept, kind)(0), rtol=1e-9, atol=1e-12)
    # in the table of episodes something has to stand; of no frames, it changes nothing where episodes are put together
    rows = pq.read_table(tmp_path / "v3 out/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["stats/lara.latent/count"] for row in rows] == [[14], [0], [20]]
    assert rows[1]["stats/lara.latent/min"] == whole["min"]
    stats = [json.loads(line)["stats"] for line in lines(tmp_path / "v2 out/meta/episodes_stats.jsonl")]
    assert ["lara.latent" in entry for entry in stats] == [True, False, True]
    old, new = (lines(tmp_path / name / "meta/episodes_stats.jsonl")[1] for name in ("v2", "v2 out"))
    assert old == new


def test_an_unfinished_run_goes_on_with_other_episodes(tmp_path, lam, monkeypatch):  # noqa: F811
    root = disk.make_v2(tmp_path / "squares")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_copy", stop)
        with pytest.raises(KeyboardInterrupt):
            label_dataset(root, lam, tmp_path / "out", gap=GAP)
    report = label_dataset(root, lam, tmp_path / "out", gap=GAP, skip=["1"])
    assert (report.episodes, report.resumed) == (2, 2)
    assert not parts(tmp_path / "out")["lara.latent"][1].any()


def test_a_finished_output_says_how_it_was_made(tmp_path, lam, caplog):  # noqa: F811
    root = disk.make_v2(tmp_path / "squares")
    spoil(root, 2)
    first = label_dataset(root, lam, tmp_path / "out", gap=GAP, skip=["1"])
    before = tree(tmp_path / "out")
    caplog.clear()
    again = label_dataset(root, lam, tmp_path / "out", gap=GAP)
    assert "the labels of 1 episodes; damaged and left out: 2; not selected: 1" in caplog.text
    assert again == first._replace(resumed=1)
    assert tree(tmp_path / "out") == before


# ---------------------------------------------------------------------- damaged episodes


def test_damage_is_reported_and_the_others_are_labelled(tmp_path, lam, caplog, capsys):  # noqa: F811
    pytest.importorskip("tyro")
    root = disk.make_v2(tmp_path / "squares", lengths=(14, 9, 20, 5))
    clean = label_dataset(root, lam, tmp_path / "clean", gap=GAP)
    spoil(root, 0)  # seen while decoding
    next(root.rglob("episode_000002.mp4")).unlink()  # seen before
    arguments = ["label", str(root), "--lam", str(lam), "--gap", str(GAP), "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (clean.episodes, report["episodes"]) == (4, 2)
    assert list(report["left_out"]) == ["0", "2"]
    assert report["left_out"] == record(tmp_path / "out")["result"]["left_out"]
    assert str(tmp_path) not in json.dumps(report["left_out"])
    assert "episode_000000.mp4" in report["left_out"]["0"]
    assert "cannot be opened" in report["left_out"]["2"]
    said = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert [("episode 0:" in text, "episode 2:" in text) for text in said if "left out" in text] == [(0, 1), (1, 0)]
    found, expected = (columns_of(tmp_path / name)["lara.latent"] for name in ("out", "clean"))
    assert np.array_equal(found[14:23], expected[14:23])
    assert np.array_equal(found[43:], expected[43:])
    assert not found[:14].any()
    assert not found[23:43].any()
    assert cli.main(arguments) == 0
    assert "damaged and left out: episodes 0, 2" in capsys.readouterr().out


def test_where_every_episode_is_damaged_nothing_is_written(tmp_path, lam):  # noqa: F811
    root = disk.make_v2(tmp_path / "squares", lengths=(14, 9))
    spoil(root, 0)
    spoil(root, 1)
    with pytest.raises(DatasetError, match=r"squares: every episode is damaged: episode 0: .*; episode 1: "):
        label_dataset(root, lam, tmp_path / "out", gap=GAP)
    assert not (tmp_path / "out").exists()


def test_a_damaged_picture_costs_its_episode(tmp_path, lam):  # noqa: F811
    root = disk.make_v3(tmp_path / "squares", "image")

    def harm(table):
        cells = table.column(disk.CAMERA).to_pylist()
        cells[3]["bytes"] = b"not a picture"
        place = table.column_names.index(disk.CAMERA)
        return table.set_column(place, table.schema.field(place), pa.array(cells, table.schema.field(place).type))

    rewrite(root / "data/chunk-000/file-000.parquet", harm)
    report = label_dataset(root, lam, tmp_path / "out", gap=GAP)
    assert list(report.left_out) == ["0"]
    assert report.episodes == 2
    assert not parts(tmp_path / "out")["lara.latent"][0].any()
    assert parts(tmp_path / "out")["lara.latent"][1].any()


def test_a_parquet_file_that_cannot_be_read_stays_as_it_is(tmp_path, lam):  # noqa: F811
    root = disk.make_v2(tmp_path / "squares")
    torn, bare = (next(root.rglob(f"episode_00000{number}.parquet")) for number in (0, 1))
    content = torn.read_bytes()
    torn.write_bytes(content[:8] + b"\xff" * 300 + content[308:])  # its footer is sound
    rewrite(bare, lambda table: table.drop_columns(["frame_index"]))
    report = label_dataset(root, lam, tmp_path / "out", gap=GAP)
    assert list(report.left_out) == ["0", "1"]
    for path in (torn, bare):
        assert (tmp_path / "out" / path.relative_to(root)).read_bytes() == path.read_bytes()


def test_a_sidecar_needs_no_more_than_three_columns(tmp_path, lam):  # noqa: F811
    root = disk.make_v2(tmp_path / "squares")
    torn, bare = (next(root.rglob(f"episode_00000{number}.parquet")) for number in (0, 1))
    content = torn.read_bytes()
    torn.write_bytes(content[:8] + b"\xff" * 60 + content[68:])  # the actions
    rewrite(bare, lambda table: table.drop_columns(["index"]))
    report = label_dataset(root, lam, tmp_path / "x.parquet", gap=GAP, sidecar=True)
    assert list(report.left_out) == ["1"]
    assert "does not have a column index of integers" in report.left_out["1"]


# ---------------------------------------------------------------------- what metadata and rows do not agree on


def drop_line(path, number):
    """Take an episode out of a file of lines."""
    path.write_text("".join(f"{line}\n" for line in lines(path) if json.loads(line)["episode_index"] != number))


def test_an_episode_taken_out_by_hand_leaves_its_statistics(tmp_path, lam, caplog):  # noqa: F811
    root = disk.make_v2(tmp_path / "squares")
    for path in [*root.rglob("episode_000001.parquet"), *root.rglob("episode_000001.mp4")]:
        path.unlink()
    drop_line(root / "meta/episodes.jsonl", 1)
    drop_line(root / "meta/episodes_stats.jsonl", 2)
    report = label_dataset(root, lam, tmp_path / "out", gap=GAP)
    assert (report.episodes, report.left_out, report.not_selected) == (2, {}, [])
    name = "meta/episodes_stats.jsonl"
    assert caplog.text.count(f"{name} has lines of episodes that are not listed; they stay: 1") == 1
    assert caplog.text.count(f"{name} has no lines of episodes 2; none are added") == 1
    old, new = lines(root / name), lines(tmp_path / "out" / name)
    assert old[1] == new[1]
    assert "lara.valid" in json.loads(new[0])["stats"]
    assert len(new) == 2


def test_rows_of_episodes_that_are_not_listed_get_no_labels(tmp_path, lam, caplog):  # noqa: F811
    v3, v2 = disk.make_v3(tmp_path / "v3"), disk.make_v2(tmp_path / "v2")
    rewrite(v3 / "meta/episodes/chunk-000/file-000.parquet", lambda table: table.take([0, 2]))
    drop_line(v2 / "meta/episodes.jsonl", 1)
    for root in (v3, v2):
        report = label_dataset(root, lam, tmp_path / f"{root.name} out", gap=GAP)
        assert (report.episodes, report.left_out, report.not_selected) == (2, {}, [])
        assert f"{root.name}: the parquet files hold rows of episodes 1 that the metadata do not list" in caplog.text
        found = parts(tmp_path / f"{root.name} out")
        assert found["lara.latent"][0].any()
        assert found["lara.valid"][2].any()
        assert not any(found[name][1].any() for name in NAMES)


def test_missing_and_odd_statistics(tmp_path, lam):  # noqa: F811
    root = disk.make_v3(tmp_path / "null")
    empty = pa.nulls(3)
    rewrite(
        root / "meta/episodes/chunk-000/file-000.parquet",
        lambda table: table.set_column(
            table.column_names.index("stats/action/q01"), "stats/action/q01", empty
        ).append_column("stats/lara.latent/max", empty),
    )
    (root / "meta/stats.json").write_text('{"action": {"min": [NaN], "median": [1], "histogram": {}}, "version": 3}')
    label_dataset(root, lam, tmp_path / "null out", gap=GAP)
    stats = json.loads((tmp_path / "null out/meta/stats.json").read_text())
    assert stats["lara.valid"].keys() == {"min"}
    assert stats["version"] == 3
    table = pq.read_table(tmp_path / "null out/meta/episodes/chunk-000/file-000.parquet")
    assert table.column("stats/action/q01").null_count == 3
    assert table.column("stats/lara.latent/max").null_count == 0
    assert table.column("stats/lara.latent/q01").null_count == 0
    none = disk.make_v3(tmp_path / "none")
    (none / "meta/stats.json").unlink()
    path = none / "meta/episodes/chunk-000/file-000.parquet"
    rewrite(path, lambda table: table.drop_columns([name for name in table.column_names if name[:6] == "stats/"]))
    label_dataset(none, lam, tmp_path / "none out", gap=GAP)
    assert not (tmp_path / "none out/meta/stats.json").exists()
    assert (tmp_path / "none out" / path.relative_to(none)).read_bytes() == path.read_bytes()


class Doubled(pa.ExtensionType):
    """A type of somebody else's."""

    def __init__(self):
        super().__init__(pa.int64(), "test.doubled")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls()


@pytest.mark.parametrize("registered", [False, True])
def test_columns_of_any_type_stay(tmp_path, lam, registered):  # noqa: F811
    root = disk.make_v2(tmp_path / "squares", lengths=(7, 5))
    odd = {
        "text": pa.array(["a", None, "b"]),
        "nested": pa.array([[[1, 2], []], None, [[3]]], pa.list_(pa.list_(pa.int32()))),
        "struct": pa.array([{"x": 1.5, "y": ["z"]}, None, {"x": None, "y": None}]),
        "null": pa.nulls(3),
        "dictionary": pa.array(["u", "v", "u"]).dictionary_encode(),
        "extension": pa.ExtensionArray.from_storage(Doubled(), pa.array([1, 2, 3])),
        "decimal": pa.array([1, 2, None], pa.decimal128(7, 2)),
        "time": pa.array([1, 2, None], pa.timestamp("ns", "UTC")),
        "large": pa.array([b"1", b"", None], pa.large_binary()),
    }
    for path in root.rglob("*.parquet"):

        def extend(table):
            for name, array in odd.items():
                rows = pa.array([place % 3 for place in range(table.num_rows)])
                table = table.append_column(name, array.take(rows))
            return table

        rewrite(path, extend)
    if registered:
        pa.register_extension_type(Doubled())
    try:
        label_dataset(root, lam, tmp_path / "out", gap=GAP)
        for path in root.rglob("*.parquet"):
            old, new = pq.read_table(path), pq.read_table(tmp_path / "out" / path.relative_to(root))
            kept = new.select(old.column_names)
            assert kept.equals(old)
            assert kept.schema.remove_metadata().equals(old.schema.remove_metadata(), check_metadata=True)
    finally:
        if registered:
            pa.unregister_extension_type("test.doubled")


# ---------------------------------------------------------------------- before the work


def bad_line(root):
    path = root / "meta/episodes_stats.jsonl"
    path.write_text(lines(path)[0] + "\n\n{torn\n")


def line_without_number(root):
    (root / "meta/episodes_stats.jsonl").write_text('{"stats": {}}\n')


def bad_stats(root):
    (root / "meta/stats.json").write_text("[]")


def taken(root):
    rewrite(next(root.rglob("episode_000001.parquet")), lambda t: t.append_column("lara.valid", t.column("index")))


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (bad_line, DatasetError, r"episodes_stats.jsonl, line 3 is not JSON: .*; mend or delete it"),
        (line_without_number, DatasetError, "line 1 does not have the number of its episode, episode_index"),
        (bad_stats, DatasetError, "stats.json holds a JSON list, but an object is expected"),
        (taken, LaraArgumentError, r"episode_000001.parquet has lara.valid already; choose another prefix"),
    ],
    ids=["a line", "a number", "a list", "a column"],
)
def test_what_would_stop_the_writing_is_found_before_the_labelling(tmp_path, lam, monkeypatch, harm, error, message):  # noqa: F811
    root = disk.make_v2(tmp_path / "squares")
    harm(root)
    monkeypatch.setattr(job, "label_episodes", None)
    with pytest.raises(error, match=message):
        label_dataset(root, lam, tmp_path / "out", gap=GAP)
    assert [path.name for path in tmp_path.iterdir()] == ["squares"]


# ---------------------------------------------------------------------- other formats


def test_a_folder_of_videos_gets_a_sidecar(tmp_path, lam):  # noqa: F811
    for number, name in enumerate(("a", "b/c", "b/d e")):
        disk.write_video(tmp_path / f"videos/{name}.mp4", disk.scene(number, 10 + number)[0])
    (tmp_path / "videos/b/c.mp4").write_bytes(b"torn")
    with pytest.raises(LaraArgumentError, match=r"videos is not a dataset of the LeRobot format, .* add --sidecar"):
        label_dataset(tmp_path / "videos", lam, tmp_path / "out", gap=GAP)
    report = label_dataset(tmp_path / "videos", lam, tmp_path / "x.parquet", gap=GAP, sidecar=True)
    assert (report.episodes, report.frames, list(report.left_out)) == (2, 22, ["1"])
    table = pq.read_table(report.output)
    assert table.column_names == ["episode_index", "frame_index", "index", "episode", "indices", "latent", "valid"]
    assert table.column("episode").to_pylist() == ["a.mp4"] * 10 + ["b/d e.mp4"] * 12
    assert table.column("episode_index").to_pylist() == [0] * 10 + [2] * 12
    assert table.column("index").to_pylist() == list(range(22))
    assert json.loads(table.schema.metadata[b"lara_adapter"])["dataset"].keys() == {"name", "sha256"}
    # as of a dataset with the same frames
    root = disk.make_v2(tmp_path / "squares", lengths=(10,))
    label_dataset(root, lam, tmp_path / "y.parquet", gap=GAP, sidecar=True)
    same = pq.read_table(tmp_path / "y.parquet").column("latent")
    assert table.column("latent").to_pylist()[:10] == same.to_pylist()
    one = label_dataset(tmp_path / "videos/a.mp4", lam, tmp_path / "z.parquet", gap=GAP, sidecar=True)
    assert one.frames == 10
