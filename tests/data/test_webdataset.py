"""WebDataset shards: clips as their names say, read in place, damage said."""

from __future__ import annotations

import gzip
import io
import logging
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("webdataset")
pytest.importorskip("av")

from helpers.formats import counted, folder_samples, jpeg, numbers_of, write_shard
from helpers.videos import number_of, numbered, png, write_video

from lara_adapter import DatasetError
from lara_adapter.data.decode import decode_all
from lara_adapter.data.tar import FileRange, members
from lara_adapter.data.tar_clips import Place, parse_name
from lara_adapter.data.webdataset import WebDatasetShards


def film(folder, video, length, suffix="mp4", **options):
    return write_video(folder / f"{video}.{suffix}", numbered(length, video), "libx264", **options).read_bytes()


def film_samples(folder, lengths, first=0):
    return [
        {"__key__": f"{first + video:06d}", "mp4": film(folder, first + video, length, fps=15), "json": b"{}"}
        for video, length in enumerate(lengths)
    ]


def test_videos_are_decoded_in_place(tmp_path):
    write_shard(tmp_path / "s" / "shard-000010.tar", film_samples(tmp_path, [8], first=3))
    write_shard(tmp_path / "s" / "shard-000002.tar", film_samples(tmp_path, [5, 12, 7]))
    before = set(tmp_path.rglob("*"))
    dataset = WebDatasetShards(tmp_path / "s")
    assert (dataset.cameras, dataset.fps, dataset.total_frames) == (("video",), 15, 32)
    assert dataset.episode(3).name == "000003 of shard-000010.tar"
    for video, episode in enumerate(dataset.episodes):
        assert numbers_of(dataset, "video", episode) == counted(video, episode.length)
    assert number_of(dataset.pick("video", dataset.episodes[1], [9])[9]) == (1, 9)
    sources = list(dataset.sources("video"))
    assert [len(list(decode_all(source))) for source in sources] == [5, 12, 7, 8]
    assert len({(source.path, source.inside) for source in sources}) == 4
    assert set(tmp_path.rglob("*")) == before
    assert dataset.check(["video"]) == {}
    assert dataset.actions(dataset.episodes[0]) is None


def test_pictures_in_folders_behind_prefixes_and_of_one_key(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    one = {"__key__": "d/000004"} | {f"{n}.png": png(frame) for n, frame in enumerate(numbered(11, 2))}
    samples = [*folder_samples("clip7/", 0, 12)[::-1], *folder_samples("b_", 1, 5), one]
    dataset = WebDatasetShards(write_shard(tmp_path / "a.tar", samples))
    assert [episode.name for episode in dataset.episodes] == ["clip7 of a.tar", "b of a.tar", "d/000004 of a.tar"]
    assert dataset.cameras == ("image",)
    assert numbers_of(dataset, "image") == counted(0, 12) + counted(1, 5) + counted(2, 11)
    assert list(map(number_of, dataset.pick("image", dataset.episodes[2], [10, 3, 50]).values())) == [(2, 3), (2, 10)]
    assert dataset.fps == 10
    assert "10 frames per second are assumed" in caplog.text
    assert WebDatasetShards(tmp_path / "a.tar", fps=4).sources("image").__next__().fps == 4


def test_clips_of_several_cameras_and_clips_that_alternate(tmp_path):
    samples = [
        {"__key__": f"{clip}/{number:03d}", "left.jpg": jpeg(left), "right.jpg": jpeg(right), "txt": b"grasp"}
        for number in range(6)
        for video, clip in enumerate("ab")
        for left, right in [(next(numbered(1, video, number)), next(numbered(1, video + 8, number)))]
    ]
    dataset = WebDatasetShards(write_shard(tmp_path / "a.tar", samples))
    assert dataset.cameras == ("left", "right")
    for video, episode in enumerate(dataset.episodes):
        assert numbers_of(dataset, "left", episode) == counted(video, 6)
        assert numbers_of(dataset, "right", episode) == counted(video + 8, 6)


def test_the_same_name_in_two_archives_is_two_clips(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", folder_samples("clip/", number, 4))
    assert numbers_of(WebDatasetShards(tmp_path), "image") == counted(0, 4) + counted(1, 4)


@pytest.mark.parametrize(("name", "place"), [
    ("000001.mp4", ("000001", "video", ())),
    ("a/b.left.MP4", ("a/b", "left", ())),
    ("000001.0.jpg", ("000001", "image", (0,))),
    ("000001.12.wrist.jpeg", ("000001", "wrist", (12,))),
    ("clip7/0001.png", ("clip7", "image", (1,))),
    ("clip7/frame_0001.png", ("clip7/frame", "image", (1,))),
    ("clip-7_0001.left.png", ("clip-7", "left", (1,))),
    ("v1.0/0001.png", ("v1.0", "image", (1,))),
    ("000001.jpg", ("000001", "image", (0,))),
    ("cat.jpg", ("cat", "image", (0,))),
    ("a/\u0663.jpg", ("a/\u0663", "image", (0,))),  # a digit, but no number
    ("line\nbreak_3.jpg", ("line\nbreak", "image", (3,))),
    ("000001.json", None), ("jpg", None), ("__meta__.jpg", None), (".jpg", None), ("a/", None),
])  # fmt: skip
def test_what_a_name_says(name, place):
    assert parse_name(name) == (place and Place(*place))


def test_single_pictures_are_said(tmp_path, caplog):
    singles = [{"__key__": f"{number:06d}", "jpg": jpeg(frame)} for number, frame in enumerate(numbered(4))]
    write_shard(tmp_path / "a.tar", singles)
    with pytest.raises(DatasetError, match=r"all 4 pictures belong to no clip \(the first: 000000 in a\.tar\)"):
        WebDatasetShards(tmp_path / "a.tar")
    write_shard(tmp_path / "b.tar", [*folder_samples("clip/", 1, 3), {"__key__": "cover", "jpg": singles[0]["jpg"]}])
    dataset = WebDatasetShards(tmp_path)
    assert numbers_of(dataset, "image") == counted(1, 3)
    assert "5 pictures belong to no clip" in caplog.text


def test_a_thumbnail_beside_a_video_is_no_camera(tmp_path, caplog):
    sample = {"__key__": "000001", "jpg": jpeg(next(numbered(1))), "mp4": film(tmp_path, 0, 4)}
    dataset = WebDatasetShards(write_shard(tmp_path / "a.tar", [sample]))
    assert dataset.cameras == ("video",)
    assert "1 pictures belong to no clip" in caplog.text


def test_damaged_videos_and_missing_cameras_are_named(tmp_path, caplog):
    whole = film(tmp_path, 3, 6)
    samples = [
        {"__key__": "a", "left.mp4": b"no video" * 100, "right.mp4": whole},
        {"__key__": "b", "left.mp4": whole},
        {"__key__": "c", "left.mp4": whole, "right.mp4": whole},
        {"__key__": "d"}
        | {f"left.{n}.jpg": jpeg(f) for n, f in enumerate(numbered(3))}
        | {"right.0.jpg": b"", "right.1.jpg": b""},
        {"__key__": "e", "left.mp4": whole, "right.mp4": b"no video" * 100},
    ]
    dataset = WebDatasetShards(write_shard(tmp_path / "s.tar", samples))
    assert list(dataset.left_out) == [0]
    assert "a.left.mp4 cannot be opened as a video" in dataset.left_out[0]
    assert dataset.check(["left"]) == {}
    damaged = dataset.check(["right", "left"])
    assert sorted(damaged) == [1, 3, 4]
    assert "e.right.mp4 cannot be opened as a video" in damaged[4]
    assert damaged[1] == "b of s.tar: right is missing"
    assert damaged[3] == "d of s.tar: right has 2 pictures, but the clip has 3 frames"
    with pytest.raises(DatasetError, match=r"s\.tar: episode 1 \(b\) is damaged: .*no right"):
        dataset.pick("right", dataset.episode(1), [0])
    with pytest.raises(DatasetError, match=r"s\.tar: episode 3 \(d\) is damaged: frame 0: right has 2 pictures"):
        numbers_of(dataset, "right", dataset.episode(3))


def test_a_damaged_picture_is_named_with_its_frame(tmp_path):
    samples = folder_samples("clip/", 0, 4)
    samples[2]["jpg"] = b"no picture"
    dataset = WebDatasetShards(write_shard(tmp_path / "s.tar", samples))
    with pytest.raises(DatasetError, match=r"s\.tar: episode 0 \(clip\) is damaged: frame 2 of image is not a picture"):
        numbers_of(dataset, "image")


@pytest.mark.parametrize("where", ["content", "header", "end"])
def test_what_is_before_the_end_of_a_truncated_archive_is_used(tmp_path, caplog, where):
    path = write_shard(tmp_path / "s" / "a.tar", [*folder_samples("a/", 0, 4), *folder_samples("b/", 1, 5)])
    write_shard(tmp_path / "s" / "b.tar", folder_samples("c/", 2, 3))
    with path.open("rb") as file:
        last = list(members(file))[-1]
    kept = {"content": last.start + 100, "header": last.header + 100, "end": last.stop}[where]
    path.write_bytes(path.read_bytes()[:kept])
    dataset = WebDatasetShards(tmp_path / "s")
    assert numbers_of(dataset, "image") == counted(0, 4) + counted(1, 5 if where == "end" else 4) + counted(2, 3)
    assert f"a.tar: it is truncated after {kept} bytes" in caplog.text


def test_a_truncated_video_is_left_out_by_its_number(tmp_path):
    path = write_shard(tmp_path / "s" / "a.tar", film_samples(tmp_path, [4, 6]))
    write_shard(tmp_path / "s" / "b.tar", film_samples(tmp_path, [5], first=2))
    with path.open("rb") as file:
        cut = next(member for member in members(file) if member.name == "000001.mp4")
    path.write_bytes(path.read_bytes()[: cut.start + 300])
    dataset = WebDatasetShards(tmp_path / "s")
    assert list(dataset.left_out) == [1]
    assert "within 000001.mp4" in dataset.left_out[1]
    assert numbers_of(dataset, "video") == counted(0, 4) + counted(2, 5)


def test_a_damaged_header_ends_an_archive(tmp_path, caplog):
    path = write_shard(tmp_path / "a.tar", folder_samples("a/", 0, 5))
    with path.open("rb") as file:
        header, start = list(members(file))[3][1:3]
    content = bytearray(path.read_bytes())
    content[start - 512 : start - 482] = b"\xff" * 30
    path.write_bytes(content)
    assert numbers_of(WebDatasetShards(path), "image") == counted(0, 3)
    assert f"damaged at byte {header}" in caplog.text


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar(tmp_path, style):
    names = ["a/1.jpg", "long/" * 15 + "x" * 70 + "/1.jpg", "é\u4e00/1.jpg", "a/2.jpg", "dir", "a/link.jpg", "a/3.jpg"]
    if style != tarfile.USTAR_FORMAT:
        names += ["longer/" * 30 + "y" * 200 + "/1.jpg", "odd\udcff\n/1.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w", format=style, errors="surrogateescape") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name.encode("utf-8", "surrogateescape")) + 500
            info.type = {"dir": tarfile.DIRTYPE, "a/link.jpg": tarfile.SYMTYPE}.get(name, tarfile.REGTYPE)
            info.size = info.size if info.isreg() else 0
            info.linkname = "2.jpg" if info.issym() else ""
            archive.addfile(info, io.BytesIO(bytes(range(256)) * 8))
    with (tmp_path / "a.tar").open("rb") as file, tarfile.open(tmp_path / "a.tar", errors="surrogateescape") as archive:
        known = [(info.name, info.offset, info.offset_data, info.size) for info in archive if info.isreg()]
        found = list(members(file))
    assert [member[:4] for member in found] == known
    assert len(found) == len(names) - 2
    with (tmp_path / "a.tar").open("rb") as file:
        assert list(members(file, found[2].header, found[3].stop)) == found[2:4]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar"])
def test_a_compressed_archive_is_refused(tmp_path, name):
    path = write_shard(tmp_path / "x" / "a.tar", folder_samples("a/", 0, 2))
    (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
    assert WebDatasetShards.recognises(tmp_path)
    with pytest.raises(DatasetError, match=r"a\.tar.* is compressed: unpack it"):
        WebDatasetShards(tmp_path)


def test_what_is_recognised(tmp_path):
    write_shard(tmp_path / "a.tar", [{"__key__": "a", "txt": b"x"}])
    assert WebDatasetShards.recognises(tmp_path)
    assert WebDatasetShards.recognises(tmp_path / "a.tar")
    with pytest.raises(DatasetError, match="hold no videos"):
        WebDatasetShards(tmp_path)
    (tmp_path / "b.mp4").write_bytes(b"x")  # a folder of videos that also holds an archive
    assert not WebDatasetShards.recognises(tmp_path)
    assert not WebDatasetShards.recognises(tmp_path / "b.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"holds no \.tar file"):
        WebDatasetShards(tmp_path / "empty")


def test_videos_of_different_rates_are_said(tmp_path, caplog):
    samples = [{"__key__": str(fps), "mp4": film(tmp_path, fps, 4, fps=fps)} for fps in (10, 25)]
    assert WebDatasetShards(write_shard(tmp_path / "s.tar", samples)).fps == 10
    assert "10 to 25 frames per second" in caplog.text


def test_a_stretch_of_a_file_is_a_file(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    with FileRange(tmp_path / "a", 10, 50) as part:
        assert part.read() == bytes(range(10, 60))
        assert part.read(5) == b""
        assert part.seek(-3, io.SEEK_END) == 47
        assert part.read(100) == bytes([57, 58, 59])
        assert (part.seek(5), part.seek(2, io.SEEK_CUR), part.tell()) == (5, 7, 7)
        assert part.read(2) == bytes([17, 18])
        assert (part.seek(80), part.read(1)) == (80, b"")
        file = part._file
    assert file.closed


def test_many_threads_and_another_process_can_read(tmp_path):
    samples = [sample for number in range(3) for sample in folder_samples(f"{number}/", number, 5)]
    samples += film_samples(tmp_path, [5] * 3, first=3)
    dataset = pickle.loads(pickle.dumps(WebDatasetShards(write_shard(tmp_path / "s.tar", samples))))
    cameras = ["image"] * 3 + ["video"] * 3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: numbers_of(dataset, *pair), zip(cameras, dataset.episodes)))
    assert found == [counted(number, 5) for number in range(6)]
    assert np.array_equal(dataset.episodes.numbers, np.arange(6))
