"""A tiny pi0 or pi0.5 of openpi and tiny demonstrations for it, for `openpi_posttrain.py --smoke` and the tests.

The model, its patched transformers, the configurations, transforms, data loader, dataset class and training loop are
the real ones. The sizes that openpi hard-codes (SigLIP-so400m, its projection width 2048, the vocabulary of 257152) are
reduced while the model is built. The tokenizer is a SentencePiece model of single characters.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lara_adapter import LatentActionConfig, LatentActionModel

FPS = 10
IMAGE_SIZE = 64
STATE, ACTION = 8, 7  # as in LIBERO
HORIZON = 10
VOCABULARY = 512
MODEL_IMAGE = 224  # openpi's own, fixed
REPO_ID = "tiny/square"
TASKS = ("move the square", "stop the square")


# ---------------------------------------------------------------------- the model


@contextmanager
def tiny_models(image: int = MODEL_IMAGE, patch: int = 56) -> Iterator[None]:
    """Context in which openpi's hard-coded model sizes are small.

    Args:
        image: side of the pictures in pixels.
        patch: side of SigLIP's patches.
    """
    import openpi.models_pytorch.gemma_pytorch as module

    vlm, expert = module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM

    def small_vlm(config: Any) -> nn.Module:
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers = 32, 64, 1
        vision.num_attention_heads, vision.image_size, vision.patch_size = 2, image, patch
        vision.projection_dim = config.text_config.hidden_size
        config.text_config.vocab_size = VOCABULARY
        return vlm(config=config)

    def small_expert(config: Any) -> nn.Module:
        config.vocab_size = VOCABULARY
        return expert(config=config)

    module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM = small_vlm, small_expert
    try:
        yield
    finally:
        module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM = vlm, expert


def model_config(pi05: bool = True, **changes: Any) -> Any:
    """A Pi0Config of openpi's own "dummy" sizes (4 layers of width 64), in float32."""
    from openpi.models.pi0_config import Pi0Config

    settings: dict[str, Any] = {
        "pi05": pi05, "paligemma_variant": "dummy", "action_expert_variant": "dummy", "action_horizon": HORIZON,
        "max_token_len": 96, "dtype": "float32",
    }  # fmt: skip
    if "pytorch_compile_mode" in inspect.signature(Pi0Config).parameters:  # openpi's newer versions
        settings["pytorch_compile_mode"] = None
    return Pi0Config(**{**settings, **changes})


def build(pi05: bool = True, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny PI0Pytorch in train mode; weights depend on the seed alone, and no scale is left at zero."""
    from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

    with torch.random.fork_rng(devices=[]), tiny_models():
        torch.manual_seed(seed)
        policy: nn.Module = PI0Pytorch(model_config(pi05, **changes))
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "layernorm" in name or name.endswith("norm.weight") or ".norm.dense" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape))  # zero-initialised, which would hide their part
    return policy.train()


def make_batch(size: int = 2, seed: int = 0, frames: int | None = 32) -> tuple[Any, torch.Tensor]:
    """A batch as openpi's data loader yields it with LARA: an observation and actions [B, H, 32].

    Args:
        size: B.
        seed: of all values.
        frames: side of the frames in pixels; None: a stock observation.
    """
    from openpi.models.model import Observation

    g = torch.Generator().manual_seed(seed)
    keys = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    stock = Observation(
        images={key: torch.rand(size, 3, MODEL_IMAGE, MODEL_IMAGE, generator=g) * 2 - 1 for key in keys},
        image_masks={key: torch.tensor([key != keys[2]] * size) for key in keys},
        state=torch.randn(size, 32, generator=g),
        tokenized_prompt=torch.randint(0, 200, (size, 48), generator=g),
        tokenized_prompt_mask=torch.arange(48).expand(size, -1) < 12,
    )
    actions = torch.randn(size, HORIZON, 32, generator=g)
    if frames is None:
        return stock, actions
    from lara_adapter.integrations.openpi.observation import LaraObservation

    pair = torch.randint(0, 256, (size, 2, 3, frames, frames), dtype=torch.uint8, generator=g)
    return LaraObservation.around(stock, pair, torch.ones(size, dtype=torch.bool)), actions


# ---------------------------------------------------------------------- files


def use_folder(folder: Path) -> None:
    """Redirect the downloads of openpi and LeRobot to a folder; call it before importing either."""
    os.environ["OPENPI_DATA_HOME"] = str(folder / "openpi")
    os.environ["HF_LEROBOT_HOME"] = str(folder / "lerobot")
    os.environ["HF_HUB_OFFLINE"] = "1"


def write_tokenizer(folder: Path) -> Path:
    """Write a tiny character tokenizer where openpi caches PaliGemma's."""
    import sentencepiece

    path = folder / "openpi" / "big_vision" / "paligemma_tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    letters = ["".join(map(chr, range(32, 127))), "Task: State: Action: 0 1 2 3 4 5 6 7 8 9 ;", *TASKS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(letters * 20), model_prefix=str(path.with_suffix("")), model_type="char",
        vocab_size=VOCABULARY, hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return path


def picture(position: np.ndarray, colour: int) -> np.ndarray:
    """A bright square at a position in [0, 1]^2 on a dark background: uint8 [H, W, 3]."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 20, np.uint8)
    row, column = (int(value * (IMAGE_SIZE - 16)) for value in position)
    image[row : row + 16, column : column + 16, colour] = 230
    return image


def write_demonstrations(
    repo_id: str = REPO_ID, episodes: int = 4, length: int = 24, videos: bool = False, seed: int = 0
) -> Any:
    """Record demonstrations with the features of openpi's LIBERO dataset, by LeRobot itself.

    Returns:
        The LeRobotDataset, in LeRobot's own home folder.
    """
    from openpi.training import data_loader

    host = data_loader._import_lerobot_dataset() if hasattr(data_loader, "_import_lerobot_dataset") else None
    dataset_class = (host or data_loader.lerobot_dataset).LeRobotDataset
    image = {"dtype": "video" if videos else "image", "shape": (IMAGE_SIZE, IMAGE_SIZE, 3),
             "names": ["height", "width", "channel"]}  # fmt: skip
    vectors = {
        name: {"dtype": "float32", "shape": (size,), "names": [name]}
        for name, size in (("state", STATE), ("actions", ACTION))
    }
    dataset = dataset_class.create(
        repo_id, fps=FPS, features={"image": image, "wrist_image": image, **vectors}, use_videos=videos
    )
    rng = np.random.default_rng(seed)
    for episode in range(episodes):
        position, goal = rng.uniform(size=2), rng.uniform(size=2)
        for _ in range(length + episode):
            velocity = 0.15 * (goal - position)
            frame = {
                "image": picture(position, 0),
                "wrist_image": picture(1 - position, 1),
                "state": np.resize(position, STATE).astype(np.float32),
                "actions": np.resize(velocity, ACTION).astype(np.float32),
            }
            dataset.add_frame(frame, task=TASKS[episode % len(TASKS)])
            position = position + velocity
        dataset.save_episode()
    return dataset


def write_norm_stats(dataset: Any, folder: Path) -> None:
    """Save the statistics of state and actions as openpi's scripts/compute_norm_stats.py does."""
    from openpi.shared import normalize

    stats = {}
    for key in ("state", "actions"):
        running = normalize.RunningStats()
        running.update(np.stack([np.asarray(value) for value in dataset.hf_dataset[key]]))
        stats[key] = running.get_statistics()
    normalize.save(folder, stats)


def write_base_model(folder: Path, pi05: bool = True) -> None:
    """Write a checkpoint for `--pytorch-weight-path`, as openpi's convert_jax_model_to_pytorch.py does."""
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    save_model(build(pi05), str(folder / "model.safetensors"))


def write_lam(folder: Path) -> None:
    """Write a tiny latent action model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LatentActionModel(LatentActionConfig.tiny()).save_pretrained(folder)


def train_config(folder: Path, name: str = "tiny", pi05: bool = True, **changes: Any) -> Any:
    """A TrainConfig of openpi for the files that the functions above wrote to `folder`."""
    from openpi.training import config as configs
    from openpi.training.optimizer import CosineDecaySchedule

    settings: dict[str, Any] = {
        "name": name,
        "exp_name": "run",
        "model": model_config(pi05),
        "data": configs.LeRobotLiberoDataConfig(
            repo_id=REPO_ID,
            assets=configs.AssetsConfig(assets_dir=str(folder / "assets"), asset_id="square"),
            base_config=configs.DataConfig(prompt_from_task=True),
            extra_delta_transform=False,
        ),
        "pytorch_weight_path": str(folder / "base"),
        "pytorch_training_precision": "float32",
        "lr_schedule": CosineDecaySchedule(warmup_steps=2, peak_lr=1e-3, decay_steps=100, decay_lr=1e-4),
        "checkpoint_base_dir": str(folder / "checkpoints"),
        "assets_base_dir": str(folder / "assets"),
        "batch_size": 4,
        "num_workers": 0,
        "num_train_steps": 6,
        "save_interval": 3,
        "log_interval": 2,
        "wandb_enabled": False,
    }
    return configs.TrainConfig(**{**settings, **changes})


def write_all(folder: Path, pi05: bool = True, videos: bool = False) -> None:
    """Write everything that a training run reads; `use_folder(folder)` must have been called."""
    write_tokenizer(folder)
    dataset = write_demonstrations(videos=videos)
    write_norm_stats(dataset, folder / "assets" / "square")
    write_base_model(folder / "base", pi05)
    write_lam(folder / "lam")


def register(config: Any) -> None:
    """Register a TrainConfig with openpi's command line."""
    from openpi.training import config as configs

    configs._CONFIGS_DICT[config.name] = dataclasses.replace(config)
