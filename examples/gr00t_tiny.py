"""A tiny GR00T N1.6 on disk and tiny demonstrations for it, for `gr00t_posttrain.py --smoke` and the tests.

The action head, the processor, the collator, the dataset code and the trainer are GR00T's own. Only the vision-language
backbone is a stand-in, because the real one needs flash-attn and a GPU: it embeds the real token ids and marks the
real image tokens.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers.feature_extraction_utils import BatchFeature

from lara_adapter import LatentActionConfig, LatentActionModel

FPS = 10
IMAGE_SIZE = 64
STATE, ACTION = 2, 2  # position of a square, and its velocity
HORIZON, MODEL_HORIZON = 16, 50  # of the demonstrations, and of the model, which pads to its own
VOCABULARY = 4096

MODALITY_CONFIG = '''"""The modalities of the tiny demonstrations; GR00T imports this file (--modality-config-path)."""

from gr00t.configs.data.embodiment_configs import MODALITY_CONFIGS
from gr00t.data.types import ActionConfig, ActionFormat, ActionRepresentation, ActionType, ModalityConfig

ABSOLUTE = ActionConfig(ActionRepresentation.ABSOLUTE, ActionType.NON_EEF, ActionFormat.DEFAULT)
MODALITY_CONFIGS["{tag}"] = {{
    "video": ModalityConfig(delta_indices=[0], modality_keys=["front", "wrist"]),
    "state": ModalityConfig(delta_indices=[0], modality_keys=["position"]),
    "action": ModalityConfig(list(range({horizon})), ["velocity"], action_configs=[ABSOLUTE]),
    "language": ModalityConfig(delta_indices=[0], modality_keys=["annotation.human.task_description"]),
}}
'''


class TinyBackbone(nn.Module):
    """Stand-in for Eagle: maps real token ids and image tokens to features of the right shape."""

    def __init__(self, dim: int, image_token_index: int = 151669, **ignored: Any) -> None:
        super().__init__()
        self.image_token_index = image_token_index
        self.embedding, self.pixels = nn.Embedding(VOCABULARY, dim), nn.Linear(3, dim)

    def prepare_input(self, batch: dict) -> BatchFeature:
        """Keep the whole batch, like the real backbone."""
        return BatchFeature(data=batch)

    def forward(self, inputs: BatchFeature) -> BatchFeature:
        """Features [B, S, D] and masks [B, S]; the mean colour of each image is added to every token of its sample."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        images = torch.stack(
            [image.float().mean(dim=(-2, -1)).reshape(-1, 3).mean(0) for image in inputs["pixel_values"]]
        )
        colour = self.pixels(images.to(self.pixels.weight)).unflatten(0, (len(ids), -1)).mean(1)
        return BatchFeature(
            data={
                "backbone_features": self.embedding(ids % VOCABULARY) + colour[:, None],
                "backbone_attention_mask": mask == 1,
                "image_mask": ids == self.image_token_index,
            }
        )


def tiny_config(layers: int = 6, heads: int = 4, dim: int = 32, dropout: float = 0.2, **changes: Any) -> Any:
    """A Gr00tN1d6Config with the released model's padding (50 steps of 128 numbers) and a small head."""
    from gr00t.configs.model.gr00t_n1d6 import Gr00tN1d6Config

    settings: dict[str, Any] = {
        "diffusion_model_cfg": {
            "positional_embeddings": None, "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 16,
            "norm_type": "ada_norm", "dropout": dropout, "final_dropout": True, "output_dim": 64,
            "interleave_self_attention": True,
        },
        "input_embedding_dim": heads * 16, "hidden_size": 64, "backbone_embedding_dim": dim,
        "max_state_dim": 128, "max_action_dim": 128, "action_horizon": MODEL_HORIZON,
    }  # fmt: skip
    return Gr00tN1d6Config(**{**settings, **changes})


@contextmanager
def tiny_backbone() -> Iterator[None]:
    """Context in which GR00T builds and loads models with the tiny backbone."""
    from gr00t.model.gr00t_n1d6 import gr00t_n1d6

    original = gr00t_n1d6.get_backbone_cls
    gr00t_n1d6.get_backbone_cls = lambda config: lambda **kw: TinyBackbone(config.backbone_embedding_dim)
    try:
        yield
    finally:
        gr00t_n1d6.get_backbone_cls = original


def write_demonstrations(
    folder: Path, *, lengths: tuple[int, ...] = (40, 30, 30), seed: int = 0, size: int = IMAGE_SIZE
) -> Path:
    """Write demonstrations in GR00T's LeRobot v2 layout: a red square moved by the actions, seen by two cameras."""
    generator = np.random.default_rng(seed)
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": [STATE], "names": ["x", "y"]},
        "action": {"dtype": "float32", "shape": [ACTION], "names": ["dx", "dy"]},
    }
    for view in ("front", "wrist"):
        features[f"observation.images.{view}"] = {
            "dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channel"],
        }  # fmt: skip
    (folder / "meta").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    first = 0
    for episode, length in enumerate(lengths):
        actions = _wander(generator, length)
        states = np.clip(np.cumsum(actions, 0), -0.7, 0.7).astype(np.float32)
        table = pd.DataFrame(
            {
                "observation.state": list(states), "action": list(actions),
                "timestamp": np.arange(length, dtype=np.float32) / FPS, "frame_index": np.arange(length),
                "episode_index": episode, "index": first + np.arange(length), "task_index": 0,
            }
        )  # fmt: skip
        table.to_parquet(folder / f"data/chunk-000/episode_{episode:06d}.parquet")
        for view in ("front", "wrist"):
            video = folder / f"videos/chunk-000/observation.images.{view}/episode_{episode:06d}.mp4"
            _write_video(video, [_frame(state, view, size) for state in states])
        first += length
    info = {
        "codebase_version": "v2.1", "robot_type": "square", "total_episodes": len(lengths), "total_frames": first,
        "total_tasks": 1, "chunks_size": 1000, "fps": FPS, "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }  # fmt: skip
    modality = {
        "state": {"position": {"start": 0, "end": STATE}},
        "action": {"velocity": {"start": 0, "end": ACTION}},
        "video": {view: {"original_key": f"observation.images.{view}"} for view in ("front", "wrist")},
        "annotation": {"human.task_description": {"original_key": "task_index"}},
    }
    task = "move the square"
    episodes = [{"episode_index": i, "tasks": [task], "length": length} for i, length in enumerate(lengths)]
    (folder / "meta/info.json").write_text(json.dumps(info, indent=2))
    (folder / "meta/modality.json").write_text(json.dumps(modality, indent=2))
    (folder / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": task}) + "\n")
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in episodes))
    return folder


def _wander(generator: np.random.Generator, length: int) -> np.ndarray:
    velocity = np.repeat(generator.uniform(-0.06, 0.06, (length // 10 + 1, ACTION)), 10, axis=0)[:length]
    return velocity.astype(np.float32)


def _frame(state: np.ndarray, view: str, size: int) -> np.ndarray:
    image = np.full((size, size, 3), 40 if view == "front" else 90, np.uint8)
    half = size // 8
    x, y = ((state + 1) / 2 * (size - 2 * half)).astype(int)
    image[y : y + 2 * half, x : x + 2 * half] = (220, 40, 40)
    return image


def _write_video(path: Path, frames: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate, stream.gop_size = "yuv420p", 4_000_000, 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_base_model(folder: Path, tag: str = "new_embodiment", **changes: Any) -> Path:
    """Write a "pre-trained" checkpoint with its processor, in the layout of GR00T-N1.6-3B on the Hub.

    The modality configuration of `tag` must be registered with GR00T.
    """
    from gr00t.configs.data.embodiment_configs import MODALITY_CONFIGS
    from gr00t.model.gr00t_n1d6.gr00t_n1d6 import Gr00tN1d6
    from gr00t.model.gr00t_n1d6.processing_gr00t_n1d6 import Gr00tN1d6Processor

    config = tiny_config(**changes)
    with tiny_backbone(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gr00tN1d6(config)
    model.save_pretrained(folder)
    spread = {
        "min": [-1.0] * 2,
        "q01": [-1.0] * 2,
        "max": [1.0] * 2,
        "q99": [1.0] * 2,
        "mean": [0.0] * 2,
        "std": [1.0] * 2,
    }
    statistics = {"state": {"position": spread}, "action": {"velocity": spread}}
    processor = Gr00tN1d6Processor(
        modality_configs={tag: MODALITY_CONFIGS[tag]}, statistics={tag: statistics}, max_state_dim=config.max_state_dim,
        max_action_dim=config.max_action_dim, max_action_horizon=config.action_horizon, model_name=config.model_name,
        shortest_image_edge=config.shortest_image_edge, crop_fraction=config.crop_fraction, use_albumentations=True,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder


def write_modality_config(path: Path, tag: str = "new_embodiment", horizon: int = HORIZON) -> Path:
    """Write the modality file for --modality-config-path."""
    path.write_text(MODALITY_CONFIG.format(tag=tag, horizon=horizon))
    return path


def write_lam(folder: Path) -> Path:
    """Write an untrained latent action model for 32 x 32 frames; `lara train-lam` trains real ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LatentActionModel(LatentActionConfig.tiny(image_size=32)).save_pretrained(folder)
    return folder


def import_file(path: Path) -> None:
    """Import a modality configuration, as GR00T does with --modality-config-path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # type: ignore[union-attr, arg-type]
