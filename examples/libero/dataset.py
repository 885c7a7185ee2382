"""A folder in LeRobot's dataset format, written episode by episode with pyarrow and PyAV.

Two layouts: "v3.0", which LeRobot reads, and "v2.1", which GR00T N1.6 and openpi read. Both hold one data file and one
video per view for each episode, so a finished episode is never touched again, and GR00T's `meta/modality.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.libero import metadata
from lara_adapter.storage.files import read_json, replace_file, write_json

JOURNAL = "meta/recording.json"
FPS = 20  # LIBERO's control frequency
VIEWS = {"image": "observation.images.image", "wrist_image": "observation.images.image2"}  # LeRobot's LIBERO names
STATE = ("x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper_left", "gripper_right")
ACTION = ("x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper")


@dataclasses.dataclass
class Episode:
    """One episode; T is the number of actions.

    Attributes:
        views: key of VIEWS -> uint8 [T, H, W, 3].
        states: float32 [T, 8]: hand position in metres, axis-angle in radians, finger positions in metres.
        actions: float32 [T, 7] in [-1, 1]; None for video without actions.
        task: instruction.
    """

    views: Mapping[str, NDArray[np.uint8]]
    states: NDArray[np.float32]
    actions: NDArray[np.float32] | None
    task: str


class Recording:
    """A dataset that grows; a context manager, which writes the metadata of what there is when it closes.

    `meta/recording.json` lists the finished episodes and the starts that failed. It is written last, so a recording that
    was killed goes on with the next start.
    """

    def __init__(self, root: Path, layout: str, size: int, actions: bool, settings: Mapping[str, Any]) -> None:
        """Begin a dataset, or go on with one.

        Args:
            root: its folder.
            layout: "v3.0" or "v2.1".
            size: side of the frames in pixels.
            actions: whether there is a column of actions.
            settings: what else decides its content; must be the same when it goes on.

        Raises:
            ValueError: the folder is something else, or a recording with other settings.
        """
        self.root, self.layout = root, metadata.LAYOUTS[layout]
        self.features = _features(size, actions)
        fixed = {"layout": layout, "size": size, "actions": actions, **settings}
        self.journal: dict[str, Any] = {"settings": fixed, "episodes": [], "failed": {}}
        if (root / JOURNAL).is_file():
            self.journal = read_json(root / JOURNAL)
            changed = {key: value for key, value in self.journal["settings"].items() if fixed.get(key) != value}
            if changed or len(fixed) != len(self.journal["settings"]):
                raise ValueError(f"{root} was recorded with other settings, {changed}; choose another folder")
        elif root.exists() and any(root.iterdir()):
            raise ValueError(f"{root} exists and is not a recording; choose another folder")

    def tried(self, key: str) -> tuple[int, int]:
        """Finished episodes of a task and failed starts; their sum is the number of the next start."""
        return sum(entry["key"] == key for entry in self.journal["episodes"]), self.journal["failed"].get(key, 0)

    def fail(self, key: str) -> None:
        """Note that a start of a task failed."""
        self.journal["failed"][key] = self.tried(key)[1] + 1
        write_json(self.root / JOURNAL, self.journal)

    def add(self, key: str, episode: Episode, **facts: Any) -> None:
        """Write an episode.

        Args:
            key: of its task, for :meth:`tried`.
            episode: the episode.
            facts: numbers and words to note about it.
        """
        number, length = len(self.journal["episodes"]), len(episode.states)
        first = sum(entry["length"] for entry in self.journal["episodes"])
        tasks = [*self.tasks(), *([] if episode.task in self.tasks() else [episode.task])]
        vectors = {"observation.state": episode.states}
        if episode.actions is not None:
            vectors["action"] = episode.actions
        columns: dict[str, NDArray[Any]] = {
            **{name: values.astype(np.float32) for name, values in vectors.items()},
            "timestamp": (np.arange(length) / FPS).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "index": first + np.arange(length),
            "task_index": np.full(length, tasks.index(episode.task)),
        }
        with replace_file(self.root / self.layout.data(number)) as path:
            metadata.write_columns(path, columns)
        for view, name in VIEWS.items():
            with replace_file(self.root / self.layout.video(name, number)) as path:
                write_video(path, episode.views[view])
        stats = {name: metadata.vector_stats(values) for name, values in vectors.items()}
        stats |= {name: metadata.image_stats(episode.views[view]) for view, name in VIEWS.items()}
        entry = {"key": key, "task": episode.task, "length": length, "stats": stats, "facts": facts}
        self.journal["episodes"].append(entry)
        write_json(self.root / JOURNAL, self.journal)

    def tasks(self) -> list[str]:
        """Instructions so far, in the order of their index."""
        return list(dict.fromkeys(entry["task"] for entry in self.journal["episodes"]))

    def close(self) -> None:
        """Write the metadata, if there are episodes."""
        if self.journal["episodes"]:
            metadata.write(self.root, self.layout, self.features, self.journal["episodes"], self.tasks(), FPS)
            write_json(self.root / "meta/modality.json", modality("action" in self.features))

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _features(size: int, actions: bool) -> dict[str, Any]:
    """The features of `meta/info.json`."""
    video = {
        "video.height": size, "video.width": size, "video.codec": "h264", "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False, "video.fps": FPS, "video.channels": 3, "has_audio": False,
    }  # fmt: skip
    features: dict[str, Any] = {
        name: {"dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channels"], "info": video}
        for name in VIEWS.values()
    }
    features["observation.state"] = {"dtype": "float32", "shape": [len(STATE)], "names": list(STATE)}
    if actions:
        features["action"] = {"dtype": "float32", "shape": [len(ACTION)], "names": list(ACTION)}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
    return features


def modality(actions: bool) -> dict[str, Any]:
    """GR00T's `meta/modality.json`, with the names of its own LIBERO embodiment ("libero_panda")."""
    pose = {name: {"start": i, "end": i + 1} for i, name in enumerate(("x", "y", "z", "roll", "pitch", "yaw"))}
    result: dict[str, Any] = {
        "state": {**pose, "gripper": {"start": 6, "end": 8}},
        "video": {view: {"original_key": name} for view, name in VIEWS.items()},
        "annotation": {"human.action.task_description": {"original_key": "task_index"}},
    }
    if actions:
        result["action"] = {**pose, "gripper": {"start": 6, "end": 7}}
    return result


def write_video(path: Path, frames: NDArray[np.uint8]) -> None:
    """Encode frames [T, H, W, 3] as H.264 with a key frame every two, as LeRobot does for random access."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options={"crf": "18", "g": "2", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.time_base = Fraction(1, FPS)
        stream.thread_count = 1
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
