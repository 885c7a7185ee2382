"""The LeRobot policy of lerobot_posttrain.py and its processors: a new small one, or a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_policy, make_policy_config, make_pre_post_processors

CHUNK = 16  # actions that a new policy predicts; also the distance of LARA's two frames


def make_tiny_clip(folder: Path, texts: list[str], image_size: int) -> Path:
    """Write a small CLIP with random weights, and a tokenizer of the words in `texts`; nothing is downloaded.

    Args:
        folder: where to write; LeRobot requires "clip" in the name.
        texts: the dataset's instructions.
        image_size: side of the frames in pixels, a multiple of 8.

    Returns:
        `folder`, for `vision_encoder_name` and `text_encoder_name`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    layers = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"vocab_size": len(words), "max_position_embeddings": 77, "eos_token_id": 2, "bos_token_id": 1,
            "pad_token_id": 0}  # fmt: skip
    vision = {"image_size": image_size, "patch_size": image_size // 8}
    config = CLIPConfig(projection_dim=96, text_config={**layers, **text}, vision_config={**layers, **vision})
    CLIPModel(config).save_pretrained(folder)
    return folder


def choose_policy(settings: Any, accelerator: Any, meta: Any) -> PreTrainedConfig:
    """The configuration of the policy that the command line selects.

    Args:
        settings: of lerobot_posttrain.py.
        accelerator: of this process.
        meta: of the dataset.
    """
    options = {"device": accelerator.device.type, "lr": settings.lr}
    if settings.policy_path is not None:
        return pretrained_config(settings.policy_path, **options)
    if not settings.tiny:
        return new_policy_config(clip=settings.clip, image_size=224, random_clip=False, **options)
    size = meta.features[meta.camera_keys[0]]["shape"][0]
    clip = settings.output.resolve() / "tiny-clip"
    if accelerator.is_main_process and not clip.is_dir():
        set_seed(settings.seed)
        make_tiny_clip(clip, list(meta.tasks.index), size)
    accelerator.wait_for_everyone()
    return new_policy_config(clip=str(clip), image_size=size, random_clip=True, **options)


def new_policy_config(
    *, clip: str, image_size: int, random_clip: bool, device: str, lr: float | None
) -> PreTrainedConfig:
    """The default policy: LeRobot's Multi-Task DiT with flow matching.

    Args:
        clip: folder or Hub id of the CLIP whose encoders are used.
        image_size: side in pixels of this CLIP's input.
        random_clip: whether the CLIP has random weights.
        device: of the policy.
        lr: peak learning rate; None: LeRobot's for this policy, or 5e-4 with a random CLIP.
    """
    size = {"hidden_dim": 128, "num_layers": 4, "num_heads": 4, "timestep_embed_dim": 64} if random_clip else {}
    if lr is None and random_clip:
        lr = 5e-4
    return make_policy_config(
        "multi_task_dit",
        device=device,
        objective="flow_matching",
        num_integration_steps=10,
        n_obs_steps=1,
        horizon=CHUNK,
        n_action_steps=CHUNK // 2,
        do_mask_loss_for_padding=True,
        drop_n_last_frames=0,  # train on the ends of episodes, with their padding masked
        vision_encoder_name=clip,
        text_encoder_name=clip,
        vision_encoder_lr_multiplier=1.0 if random_clip else 0.1,
        image_resize_shape=(image_size, image_size),
        # no random crops: the camera is fixed, so a shifted picture means a shifted object
        image_crop_shape=None,
        push_to_hub=False,
        **size,
        **({} if lr is None else {"optimizer_lr": lr}),
    )


def pretrained_config(folder: str, device: str, lr: float | None) -> PreTrainedConfig:
    """The configuration of a saved policy of any type, to start from its weights."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path, config.device = folder, device
    if lr is not None:
        config.optimizer_lr = lr
    return config


def build(config: PreTrainedConfig, meta: Any) -> tuple[Any, Any, Any]:
    """Make the policy and its processors, which normalise by the dataset's statistics.

    Args:
        config: of a new policy, or with `pretrained_path`.
        meta: of the dataset.

    Returns:
        Policy, preprocessor, postprocessor.
    """
    policy = make_policy(config, ds_meta=meta)
    if not config.pretrained_path:
        return policy, *make_pre_post_processors(config, dataset_stats=meta.stats, dataset_meta=meta)
    statistics = {"stats": meta.stats, "norm_map": config.normalization_mapping}
    features = {**config.input_features, **config.output_features}
    processors = make_pre_post_processors(
        config,
        pretrained_path=str(config.pretrained_path),
        dataset_stats=meta.stats,
        dataset_meta=meta,
        preprocessor_overrides={
            "device_processor": {"device": config.device},
            "normalizer_processor": {**statistics, "features": features},
        },
        postprocessor_overrides={"unnormalizer_processor": {**statistics, "features": config.output_features}},
    )
    return policy, *processors
