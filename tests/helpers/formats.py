"""Small robomimic, RLDS and WebDataset datasets of numbered frames, written with the libraries that people use."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from helpers.videos import number_of, numbered, png


def jpeg(frame: np.ndarray) -> bytes:
    """The frame as a JPEG file."""
    memory = io.BytesIO()
    with av.open(memory, "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = frame.shape[1], frame.shape[0], "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return memory.getvalue()


def numbers_of(dataset: Any, camera: str, episode: Any = None) -> list[tuple[int, int]]:
    """(video, number) of every frame of one episode, or of all."""
    episodes = dataset.episodes if episode is None else [episode]
    return [number_of(frame) for _, frames in dataset.frames(camera, episodes) for frame in frames]


def counted(video: int, length: int) -> list[tuple[int, int]]:
    """What `numbers_of` gives for an episode of `numbered` frames."""
    return [(video, number) for number in range(length)]


# ---------------------------------------------------------------------- robomimic

ENV_ARGS = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20, "camera_names": ["agentview"]}}


def write_hdf5(
    path: Path, lengths: Sequence[int], kind: str = "plain", first: int = 0, env_args: Any = ENV_ARGS
) -> Path:
    """A file of robomimic's layout; "plain", "gzip", "planes" [T, 3, H, W], "vlen" or "padded" JPEG per frame."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(env_args)
        for number, length in enumerate(lengths):
            demo = data.create_group(f"demo_{number}")
            for camera, name in enumerate(("agentview_image", "robot0_eye_in_hand_image")):
                _add_frames(demo, f"obs/{name}", list(numbered(length, video=first + number + 8 * camera)), kind)
            demo["obs/agentview_depth"] = np.zeros((length, 16, 16, 1), np.float32)
            demo["obs/robot0_eef_pos"] = np.zeros((length, 3))
            demo["actions"] = actions_of(first + number, length).astype(np.float64)
            demo.attrs["num_samples"] = length
    return path


def _add_frames(demo: Any, name: str, frames: list[np.ndarray], kind: str) -> None:
    import h5py

    if kind in ("vlen", "padded"):
        files = [np.frombuffer(jpeg(frame), np.uint8) for frame in frames]
        if kind == "vlen":
            dataset = demo.create_dataset(name, (len(files),), h5py.vlen_dtype(np.uint8))
            for place, content in enumerate(files):
                dataset[place] = content
        else:
            longest = max(map(len, files))
            demo[name] = np.stack([np.pad(content, (0, longest - len(content))) for content in files])
        return
    array = np.stack(frames)
    if kind == "planes":
        array = array.transpose(0, 3, 1, 2)
    options = {"compression": "gzip", "chunks": (4, *array.shape[1:])} if kind == "gzip" else {}
    demo.create_dataset(name, data=array, **options)


def actions_of(video: int, length: int) -> np.ndarray:
    """[length, 7] float32 that say which episode and step they are of."""
    return np.stack([np.full(7, video) + np.arange(7) / 8 + 100 * step for step in range(length)]).astype(np.float32)


# ---------------------------------------------------------------------- RLDS


class Leaf(dict[str, Any]):
    """One feature in features.json."""


TEXT = Leaf(text={})


def tensor(dtype: str, *shape: int) -> Leaf:
    dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
    return Leaf(tensor={"dtype": dtype, "encoding": "none", "shape": dimensions})


def image(kind: str, channels: int = 3, dtype: str = "uint8") -> Leaf:
    return Leaf(image={"dtype": dtype, "encodingFormat": kind, "shape": {"dimensions": ["-1", "-1", str(channels)]}})


STEP = {
    "observation": {
        "image": image("jpeg"), "wrist_image": image("png"), "depth": image("png", 1, "uint16"),
        "state": tensor("float32", 8),
    },
    "action": {"world_vector": tensor("float32", 3), "gripper": tensor("bool"), "terminate": tensor("int32", 3)},
    "is_first": tensor("bool"),
    "language_instruction": TEXT,
}  # fmt: skip


def nested(features: Any) -> dict[str, Any]:
    """Features as features.json nests them."""
    if isinstance(features, Leaf):
        return features
    return {"featuresDict": {"features": {name: nested(inner) for name, inner in features.items()}}}


def step_values(video: int, length: int) -> dict[str, tuple[Any, str]]:
    """The features of an episode, flat, as tensorflow-datasets stores them."""
    steps = range(length)
    return {
        "steps/observation/image": ([jpeg(frame) for frame in numbered(length, video)], "byte"),
        "steps/observation/wrist_image": ([png(frame) for frame in numbered(length, video + 8)], "byte"),
        "steps/observation/depth": ([b"\x89PNG"] * length, "byte"),
        "steps/observation/state": (np.zeros(8 * length), "float"),
        "steps/action/world_vector": ([value for step in steps for value in (video, step, -0.5)], "float"),
        "steps/action/gripper": ([step % 2 for step in steps], "int"),
        "steps/action/terminate": ([value for step in steps for value in (0, -1, 300 + step)], "int"),
        "steps/is_first": ([int(step == 0) for step in steps], "int"),
        "steps/language_instruction": ([b"open the drawer"] * length, "byte"),
        "episode_metadata/file_path": ([b"x"], "byte"),
    }


def write_rlds(
    folder: Path, splits: dict[str, Sequence[Sequence[dict[str, Any]]]], step: Any = STEP, name: str = "toy"
) -> Path:
    """A dataset: split -> shards -> episodes (see `step_values`), by the package `tfrecord`."""
    from tfrecord.writer import TFRecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    stated = []
    for split, shards in splits.items():
        for number, episodes in enumerate(shards):
            writer = TFRecordWriter(str(folder / f"{name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"))
            for episode in episodes:
                writer.write(episode)
            writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        lengths = [str(len(shard)) for shard in shards]
        stated.append({"name": split, "shardLengths": lengths, "filepathTemplate": template})
    info = {"name": name, "fileFormat": "tfrecord", "splits": stated, "version": "1.0.0"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    features = {
        "steps": Leaf(sequence={"feature": nested(step), "length": "-1"}),
        "episode_metadata": {"file_path": TEXT},
    }
    (folder / "features.json").write_text(json.dumps(nested(features)))
    return folder


def write_with_tensorflow(folder: Path, lengths: Sequence[int]) -> Path:
    """The same by tensorflow-datasets itself, in a process of its own: TensorFlow and `tfrecord` cannot be in one."""
    program = f"""
        import sys
        sys.path[:0] = {sys.path!r}
        import numpy as np
        import tensorflow_datasets as tfds
        from helpers.videos import numbered

        class Toy(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = {str(folder)!r}

            def _info(self):
                f = tfds.features
                return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict({{"steps": f.Dataset({{
                    "observation": {{
                        "image": f.Image(shape=(64, 64, 3), encoding_format="jpeg"),
                        "wrist_image": f.Image(shape=(64, 64, 3), encoding_format="png"),
                        "depth": f.Image(shape=(16, 16, 1), dtype=np.uint16, encoding_format="png"),
                        "raw": f.Tensor(shape=(32, 32, 3), dtype=np.uint8),
                    }},
                    "action": {{
                        "world_vector": f.Tensor(shape=(3,), dtype=np.float32), "gripper": f.Scalar(np.bool_),
                        "terminate": f.Tensor(shape=(3,), dtype=np.int32),
                        "packed": f.Tensor(shape=(2,), dtype=np.float64, encoding="zlib"),
                    }},
                    "is_first": f.Scalar(np.bool_), "language_instruction": f.Text(),
                }}), "episode_metadata": {{"steps": f.Scalar(np.int64)}}}}))

            def _split_generators(self, manager):
                return {{"train": self._generate_examples()}}

            def _generate_examples(self):
                for video, length in enumerate({list(lengths)!r}):
                    frames = zip(numbered(length, video), numbered(length, video + 8))
                    yield video, {{"steps": [{{
                        "observation": {{"image": first, "wrist_image": second, "depth": np.ones((16, 16, 1), np.uint16),
                                         "raw": np.full((32, 32, 3), 200, np.uint8)}},
                        "action": {{"world_vector": np.float32([video, step, -0.5]), "gripper": bool(step % 2),
                                    "terminate": np.int32([0, -1, 300 + step]), "packed": np.float64([step, 0.1])}},
                        "is_first": step == 0, "language_instruction": "open the drawer",
                    }} for step, (first, second) in enumerate(frames)], "episode_metadata": {{"steps": length}}}}

        Toy(data_dir={str(folder)!r}).download_and_prepare()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "toy"


# ---------------------------------------------------------------------- WebDataset


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> Path:
    """A shard by the package `webdataset`; a sample has "__key__", and extensions with bytes."""
    import webdataset

    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def folder_samples(clip: str, video: int, length: int) -> list[dict[str, Any]]:
    """The pictures of a clip, each a sample."""
    return [{"__key__": f"{clip}{number}", "jpg": jpeg(frame)} for number, frame in enumerate(numbered(length, video))]
