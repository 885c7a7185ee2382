"""Small real videos: numbered frames, a moving square, and LeRobot datasets written by hand. Needs av."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

SIDE, CELL = 64, 16


def numbered(count: int, video: int = 0, first: int = 0) -> Iterator[np.ndarray]:
    """Frames that say which they are: 10 bits of number and 5 of video as grey cells, pale, so that none is a cut."""
    for number in range(first, first + count):
        code = number | video << 10
        bits = np.array([code >> place & 1 for place in range(15)] + [1], np.uint8).reshape(4, 4)
        grey = (112 + 32 * bits).repeat(CELL, 0).repeat(CELL, 1)
        yield np.stack([grey] * 3, axis=2)


def number_of(frame: Any) -> tuple[int, int]:
    """(video, number) of a frame [3, S, S] or [S, S, 3]."""
    array = np.asarray(frame)
    grey = array.mean(0) if array.shape[0] == 3 else array.mean(2)
    size = grey.shape[0]
    cells = grey.reshape(4, size // 4, 4, size // 4).mean((1, 3)).ravel() > 128
    assert cells[15], "no numbered frame"
    code = sum(int(bit) << place for place, bit in enumerate(cells[:15]))
    return code >> 10, code & 1023


def square(count: int, seed: int = 0, side: int = SIDE) -> Iterator[np.ndarray]:
    """A yellow square that moves by a few pixels a frame and turns often, over one ground for all videos."""
    ground = np.random.default_rng(7).integers(0, 90, (side // 8, side // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    rng = np.random.default_rng(seed)
    place = rng.uniform(0, side - 16, 2)
    for number in range(count):
        if number % 6 == 0:
            speed = rng.uniform(-3, 3, 2)
        frame = ground.copy()
        y, x = place.astype(int)
        frame[y : y + 16, x : x + 16] = (240, 210, 40)
        yield frame
        speed = np.where((place + speed < 0) | (place + speed > side - 16), -speed, speed)
        place = place + speed


def still(count: int, shade: int = 120) -> Iterator[np.ndarray]:
    """Always the same frame."""
    for _ in range(count):
        yield np.full((SIDE, SIDE, 3), shade, np.uint8)


def write_video(
    path: Path, frames: Iterable[np.ndarray], codec: str = "mpeg4", fps: int = 30, times: Sequence[float] | None = None,
    **options: object,
) -> Path:  # fmt: skip
    """Encode frames; `times` in seconds make the rate variable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = None
        for number, image in enumerate(frames):
            if stream is None:
                stream = container.add_stream(codec, rate=fps)
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = {"mjpeg": "yuvj420p", "ffv1": "bgr0"}.get(codec, "yuv420p")
                stream.options = {name: str(value) for name, value in options.items()}
                if times is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def abandon_decoders(folder: Path) -> subprocess.CompletedProcess[str]:
    """Read a few frames of an H.264 video and put the decoder away, many times, with FFmpeg's messages going to Python."""
    code = f"""
        import av
        av.logging.set_level(av.logging.ERROR)  # as torchvision.io does when it is imported
        from pathlib import Path
        from lara_adapter.data.video import VideoFile
        for number in range(200):
            with VideoFile(Path({str(write_video(folder / "walk.mp4", square(90), "libx264"))!r})) as video:
                for place, _ in enumerate(video.all_frames()):
                    if place == number % 7:
                        break
        print("done")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def write_audio(path: Path) -> Path:
    """A file without any picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# ---------------------------------------------------------------------- LeRobot datasets


def write_v21(root: Path, episodes: Sequence[int], cameras: Sequence[str] = ("top",), fps: int = 10) -> Path:
    """Layout v2.1: a file for each episode; the camera's number is added to the video's."""
    keys = [f"observation.images.{name}" for name in cameras]
    for episode, length in enumerate(episodes):
        for camera, key in enumerate(keys):
            path = root / "videos" / "chunk-000" / key / f"episode_{episode:06d}.mp4"
            write_video(path, numbered(length, video=episode + 8 * camera), fps=fps)
    _write_info(
        root, "v2.1", keys, "video", fps, len(episodes),
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    )  # fmt: skip
    lines = [json.dumps({"episode_index": n, "tasks": ["x"], "length": length}) for n, length in enumerate(episodes)]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    return root


def write_v30(root: Path, episodes: Sequence[int], cameras: Sequence[str] = ("top",), fps: int = 10) -> Path:
    """Layout v3.0: all episodes of a camera in one file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = [f"observation.images.{name}" for name in cameras]
    ends = np.cumsum(episodes)
    table: dict[str, list[Any]] = {
        "episode_index": list(range(len(episodes))), "length": list(episodes),
        "data/chunk_index": [0] * len(episodes), "data/file_index": [0] * len(episodes),
        "stats/action/mean": [[0.0]] * len(episodes),
    }  # fmt: skip
    for camera, key in enumerate(keys):
        frames = [f for n, length in enumerate(episodes) for f in numbered(length, video=n + 8 * camera)]
        write_video(root / "videos" / key / "chunk-000" / "file-000.mp4", frames, fps=fps)
        table |= {
            f"videos/{key}/chunk_index": [0] * len(episodes), f"videos/{key}/file_index": [0] * len(episodes),
            f"videos/{key}/from_timestamp": [float(end - length) / fps for end, length in zip(ends, episodes)],
            f"videos/{key}/to_timestamp": [float(end) / fps for end in ends],
        }  # fmt: skip
    _write_info(
        root, "v3.0", keys, "video", fps, len(episodes),
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    )  # fmt: skip
    _write_table(pa, pq, table, root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    return root


def write_v30_pictures(root: Path, episodes: Sequence[int], fps: int = 10) -> Path:
    """Layout v3.0 with the pictures in the data file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = "observation.images.top"
    frames = [f for n, length in enumerate(episodes) for f in numbered(length, video=n)]
    values = [{"bytes": png(frame), "path": f"{n}.png"} for n, frame in enumerate(frames)]
    path = root / "data" / "chunk-000" / "file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    whose = np.repeat(range(len(episodes)), episodes)
    frame = np.concatenate([np.arange(length) for length in episodes])
    pq.write_table(pa.table({key: values, "episode_index": whose, "frame_index": frame}), path, row_group_size=7)
    table = {
        "episode_index": list(range(len(episodes))), "length": list(episodes),
        "data/chunk_index": [0] * len(episodes), "data/file_index": [0] * len(episodes),
    }  # fmt: skip
    _write_info(
        root, "v3.0", [key], "image", fps, len(episodes),
        video_path=None, data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    )  # fmt: skip
    _write_table(pa, pq, table, root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    return root


def _write_table(pa: Any, pq: Any, table: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)


def _write_info(root: Path, version: str, keys: list[str], dtype: str, fps: int, episodes: int, **paths: Any) -> None:
    features = {key: {"dtype": dtype, "shape": [SIDE, SIDE, 3]} for key in keys} | {"action": {"dtype": "float32"}}
    info = {
        "codebase_version": version, "fps": fps, "features": features, "total_episodes": episodes, "chunks_size": 1000,
        **paths,
    }  # fmt: skip
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))


def png(frame: np.ndarray) -> bytes:
    """The frame as a PNG file."""
    import tempfile

    from lara_adapter.data.video import write_png

    with tempfile.TemporaryDirectory() as folder:
        write_png(Path(folder) / "frame.png", frame)
        return (Path(folder) / "frame.png").read_bytes()
