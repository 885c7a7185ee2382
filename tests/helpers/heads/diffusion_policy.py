"""Diffusion Policy's transformers: low-dimensional observations (three shapes of the network) and images."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import nn

from .common import ACTION, HORIZON, Head
from .sources import checkout, imported

SOURCE = "real-stanford/diffusion_policy 5ba07ac"
_STATE, _STEPS = 5, 2


def lowdim_batch(size: int, seed: int) -> dict[str, Any]:
    return {"obs": torch.randn(size, HORIZON, _STATE), "action": torch.randn(size, HORIZON, ACTION)}


def image_batch(size: int, seed: int) -> dict[str, Any]:
    return {"obs": {"image": torch.rand(size, HORIZON, 3, 8, 8)}, "action": torch.randn(size, HORIZON, ACTION)}


def sample(policy: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    images = policy.normalizer.params_dict.keys() >= {"image"}
    obs = (image_batch if images else lowdim_batch)(2, 3)["obs"]
    with torch.no_grad():
        return policy.predict_action(obs if images else {"obs": obs})["action_pred"]


def _scheduler() -> Any:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=4, beta_schedule="squaredcos_cap_v2", clip_sample=True)


def _normalizer(batch: dict[str, Any]) -> Any:
    from diffusion_policy.model.common.normalizer import LinearNormalizer

    normalizer = LinearNormalizer()
    normalizer.fit(batch)
    return normalizer


def build(bert: bool = False, n_cond_layers: int = 0, pred_action_steps_only: bool = False) -> Head:
    """The low-dimensional policy.

    Args:
        bert: observations are inpainted and time is a token, an encoder is all there is.
        n_cond_layers: layers of the encoder of the condition; 0: an MLP.
        pred_action_steps_only: the head sees only the steps that are executed.
    """
    with imported(checkout("diffusion_policy"), empty=("zarr", "dill")):
        from diffusion_policy.model.diffusion.transformer_for_diffusion import TransformerForDiffusion
        from diffusion_policy.policy.diffusion_transformer_lowdim_policy import DiffusionTransformerLowdimPolicy

        width = ACTION + (_STATE if bert else 0)
        steps = 4 if pred_action_steps_only else HORIZON
        model = TransformerForDiffusion(
            width, width, steps, _STEPS, 0 if bert else _STATE, n_layer=4, n_head=4, n_emb=32,
            causal_attn=not bert, time_as_cond=not bert, obs_as_cond=not bert, n_cond_layers=n_cond_layers,
        )  # fmt: skip
        policy = DiffusionTransformerLowdimPolicy(
            model, _scheduler(), HORIZON, _STATE, ACTION, n_action_steps=4, n_obs_steps=_STEPS,
            obs_as_cond=not bert, pred_action_steps_only=pred_action_steps_only,
        )  # fmt: skip
        policy.set_normalizer(_normalizer(lowdim_batch(64, 0)))
    return Head(
        policy=policy.train(),
        make_batch=lowdim_batch,
        source=SOURCE,
        blocks="model.encoder.layers" if bert else "model.decoder.layers",
        length=steps + bert,
        token=steps - 1 + bert,
        entry="compute_loss",
        optimizer=lambda policy: policy.get_optimizer(1e-3, 1e-4, (0.9, 0.95)),
        sample=sample,
    )


class Encoder(nn.Module):
    """What the policy calls of robomimic's observation encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Linear(3, _STATE)

    def output_shape(self) -> list[int]:
        return [_STATE]

    def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.colour(obs["image"].mean((2, 3)))


def build_image() -> Head:
    """The image policy around a stand-in for robomimic's encoder."""
    with imported(checkout("diffusion_policy"), empty=("zarr", "dill", "robomimic")):
        import diffusion_policy.policy.diffusion_transformer_hybrid_image_policy as module

        made = mock.MagicMock()
        made.return_value.nets = {"policy": mock.MagicMock(nets={"encoder": mock.MagicMock(nets={"obs": Encoder()})})}
        with mock.patch.multiple(
            module, algo_factory=made, get_robomimic_config=mock.MagicMock(), ObsUtils=mock.MagicMock()
        ):
            policy = module.DiffusionTransformerHybridImagePolicy(
                {"action": {"shape": [ACTION]}, "obs": {"image": {"shape": [3, 8, 8], "type": "rgb"}}},
                _scheduler(), HORIZON, 4, _STEPS, crop_shape=None, n_layer=4, n_head=4, n_emb=32,
            )  # fmt: skip
        batch = image_batch(64, 0)
        policy.set_normalizer(_normalizer({**batch["obs"], "action": batch["action"]}))
    return Head(
        policy=policy.train(),
        make_batch=image_batch,
        source=SOURCE,
        blocks="model.decoder.layers",
        length=HORIZON,
        token=HORIZON - 1,
        entry="compute_loss",
        stand_in="robomimic's encoder of images",
        optimizer=lambda policy: policy.get_optimizer(1e-3, 1e-3, 1e-4, (0.9, 0.95)),
        sample=sample,
    )
