"""Finding video: folders, pictures, LeRobot datasets."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("av")

from helpers import disk_datasets as disk
from helpers.videos import number_of, numbered, png, write_v21, write_v30, write_v30_pictures, write_video

from lara_adapter import DatasetError, LaraArgumentError
from lara_adapter.data import IndexSettings, build_index, episodes, find_sources, open_dataset
from lara_adapter.data.decode import read_frames
from lara_adapter.data.gap import Gap


def pairs_of(folder, tmp_path, gap=3, **options):
    """Every pair that is trained on, as it looks: {(video, number): (video, number)}."""
    settings = IndexSettings(gap=Gap(gap), held_out=0.0, cut_threshold=0.0, still_threshold=0.0)
    clips = build_index(find_sources([folder], **options), settings, tmp_path / "index").sources
    seen = {}
    for clip in clips:
        for start in np.flatnonzero(clip.train):
            frames = read_frames(clip.source, clip.pts, clip.keys, np.array([start, clip.future[start]]), 64)
            seen[number_of(frames[0])] = number_of(frames[1])
    return seen


def wanted(episodes, first=0, gap=3):
    return {(first + n, t): (first + n, t + gap) for n, length in enumerate(episodes) for t in range(length - gap)}


def test_folders_are_searched_in_natural_order(tmp_path):
    for name in ("b/2.webm", "b/10.mp4", "a/x.MOV", "c.avi", "b/.hidden/no.mp4", "b/.no.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for number in range(2):
        (tmp_path / "b" / "walk").mkdir(exist_ok=True)
        (tmp_path / "b" / "walk" / f"{number}.JPG").write_bytes(b"")
    (tmp_path / "poster").mkdir()
    (tmp_path / "poster" / "poster.jpg").write_bytes(b"")  # one picture is no sequence
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    found = [(str(s.path.relative_to(tmp_path)), s.kind) for s in find_sources([tmp_path])]
    assert found == [
        ("c.avi", "video"), ("a/x.MOV", "video"), ("b/2.webm", "video"), ("b/10.mp4", "video"), ("b/walk", "pictures"),
    ]  # fmt: skip


def test_a_single_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(8))
    assert pairs_of(path, tmp_path) == wanted([8])


def test_pictures(tmp_path):
    folder = tmp_path / "walk"
    folder.mkdir()
    for number, frame in enumerate(numbered(12)):
        (folder / f"{number}.png").write_bytes(png(frame))
    assert pairs_of(folder, tmp_path) == wanted([12])


@pytest.mark.parametrize("write", [write_v21, write_v30, write_v30_pictures])
def test_a_lerobot_dataset_gives_the_pairs_within_its_episodes(tmp_path, write):
    pytest.importorskip("pyarrow")
    write(tmp_path / "set", [9, 3, 12])
    assert pairs_of(tmp_path / "set", tmp_path) == wanted([9, 3, 12])


@pytest.mark.parametrize("write", [write_v21, write_v30])
def test_cameras_are_chosen(tmp_path, write):
    pytest.importorskip("pyarrow")
    write(tmp_path / "deep" / "set", [9, 12], cameras=("top", "wrist"))
    both = wanted([9, 12]) | wanted([9, 12], first=8)
    assert pairs_of(tmp_path, tmp_path) == both
    assert pairs_of(tmp_path, tmp_path, cameras=["wrist"]) == wanted([9, 12], first=8)
    assert pairs_of(tmp_path, tmp_path, cameras=["observation.images.top"]) == wanted([9, 12])
    with pytest.raises(LaraArgumentError, match=r"cameras=\['front'\].*observation\.images\.wrist"):
        find_sources([tmp_path], cameras=["front"])
    with pytest.raises(LaraArgumentError, match=r"nothing here has wrst; there are .*wrist"):
        find_sources([tmp_path], cameras=["top", "wrst"])


def test_each_dataset_has_to_have_a_camera_but_not_all_of_them(tmp_path):
    pytest.importorskip("pyarrow")
    write_v30(tmp_path / "a", [9], cameras=("top",))
    write_v30(tmp_path / "b", [12], cameras=("wrist", "side"))
    found = find_sources([tmp_path], cameras=["top", "wrist"])
    assert sorted(str(source.path.relative_to(tmp_path)).split("/")[0] for source in found) == ["a", "b"]


def test_plain_videos_have_no_camera_to_name(tmp_path):
    write_video(tmp_path / "one.mp4", numbered(9))
    with pytest.raises(LaraArgumentError, match="plain videos have one camera without a name, leave it out"):
        find_sources([tmp_path], cameras=["wrist"])
    with pytest.raises(LaraArgumentError, match=r"camera='wrist', but .* of one camera without a name: leave it out"):
        open_dataset(tmp_path).camera("wrist")
    assert open_dataset(tmp_path).camera(None) == ""


def test_all_cameras_of_an_episode_are_held_out_together(tmp_path):
    pytest.importorskip("pyarrow")
    write_v30(tmp_path / "set", [9, 9, 9, 9], cameras=("top", "wrist"))
    settings = IndexSettings(gap=Gap(3), held_out=0.3, cut_threshold=0.0, still_threshold=0.0)
    clips = build_index(find_sources([tmp_path]), settings, tmp_path / "index").sources
    top, wrist = clips
    assert (top.held_out == wrist.held_out).all()
    assert 0 < top.held_out.sum() < top.train.sum() + top.held_out.sum()
    assert not (top.held_out & top.train).any()


def test_damaged_metadata_are_named(tmp_path):
    write_v21(tmp_path / "set", [9])
    info = tmp_path / "set" / "meta" / "info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps({**content, "video_path": "../../secret/{episode_index}.mp4"}))
    with pytest.raises(DatasetError, match="outside of the dataset"):
        find_sources([tmp_path])
    del content["features"]
    info.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="meta is damaged"):
        find_sources([tmp_path])


def test_a_dataset_on_the_hub(tmp_path, monkeypatch):
    known = disk.make_v3(tmp_path / "known")
    asked = []
    monkeypatch.setattr(episodes, "locate_folder", lambda source, *rest: asked.append(source) or known)
    assert len(find_sources(["user/data"])) == len(find_sources([known]))
    assert asked == ["user/data", known]


def test_a_missing_folder(tmp_path):
    with pytest.raises(LaraArgumentError, match="does not exist"):
        find_sources([tmp_path / "nothing"])
