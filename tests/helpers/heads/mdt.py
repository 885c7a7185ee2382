"""MDT-V: the real Lightning module, diffusion transformer and perceiver; stand-ins for Voltron and CLIP."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from .common import ACTION, HORIZON, Head, calvin_scope
from .sources import checkout, imported

_WIDTH = 32
_OPTIMIZER = SimpleNamespace(
    transformer_weight_decay=0.05, obs_encoder_weight_decay=0.05, learning_rate=1e-4, betas=(0.9, 0.95)
)


class Voltron(nn.Module):
    """What MDT-V calls of Voltron: 4 tokens of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, _WIDTH, 8, 8)

    def forward(self, images: torch.Tensor, mode: str) -> torch.Tensor:
        return self.patches(images).flatten(2).mT


class Goal(nn.Module):
    """In place of CLIP, for the goal image or the sentence."""

    def __init__(self, words: bool) -> None:
        super().__init__()
        self.words, self.encode = words, nn.Linear(3, _WIDTH)

    def forward(self, goal: Any) -> torch.Tensor:
        if self.words:
            goal = torch.tensor([[float(len(word)) for word in (text.split() * 3)[:3]] for text in goal]) / 8
            return self.encode(goal)
        return self.encode(goal.mean((2, 3)))


def make_batch(size: int, seed: int) -> dict[str, Any]:
    """CALVIN's two scopes: one sample with a goal image, the rest with language."""
    return {"vis": calvin_scope(1, images=2), "lang": calvin_scope(size - 1, images=2)}


def sample(policy: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    obs = calvin_scope(1, images=2)
    obs["rgb_obs"] = {name: images[:, :1] for name, images in obs["rgb_obs"].items()}
    with torch.no_grad():
        return policy(obs, {"lang": True, "lang_text": obs["lang_text"]})


def _alone(agent: type) -> type:
    """The agent, which asks its trainer for the rank, also where it has no trainer."""

    class Alone(agent):
        trainer = property(lambda self: self._trainer or SimpleNamespace(global_rank=0), agent.trainer.fset)

    return Alone


def build() -> Head:
    import pytorch_lightning  # noqa: F401  # sees that matplotlib is missing

    with imported(checkout("mdt"), empty=("wandb", "voltron", "clip", "matplotlib")):
        import hydra
        from mdt.models import mdtv_agent
        from mdt.models.edm_diffusion.score_wrappers import GCDenoiser
        from mdt.models.perceptual_encoders import voltron_encoder
        from mdt.models.perceptual_encoders.no_encoder import NoEncoder

        inner = {
            "_target_": "mdt.models.networks.mdtv_transformer.MDTVTransformer",
            "action_dim": ACTION, "obs_dim": _WIDTH, "goal_dim": _WIDTH, "proprio_dim": 8, "goal_conditioned": True,
            "embed_dim": 32, "n_dec_layers": 4, "n_enc_layers": 2, "n_obs_token": 3, "goal_seq_len": 1, "obs_seq_len": 1,
            "action_seq_len": HORIZON, "embed_pdrob": 0, "goal_drop": 0, "attn_pdrop": 0.3, "resid_pdrop": 0.1,
            "mlp_pdrop": 0.05, "n_heads": 4, "device": "cpu", "use_ada_conditioning": True, "use_modality_encoder": True,
            "use_mlp_goal": True,
        }  # fmt: skip
        made = {"img_gen": NoEncoder, "visual": lambda: Goal(False), "language": lambda: Goal(True)}
        instantiate = hydra.utils.instantiate
        with (
            mock.patch.object(voltron_encoder, "load", return_value=(Voltron(), nn.Identity())),
            mock.patch.object(
                mdtv_agent.hydra.utils,
                "instantiate",
                lambda config: made[config["of"]]() if "of" in config else instantiate(config),
            ),
        ):
            policy = _alone(mdtv_agent.MDTVAgent)(
                {"of": "language"}, {"of": "visual"}, {"of": "img_gen"},
                {"_target_": f"{GCDenoiser.__module__}.GCDenoiser", "_recursive_": False, "inner_model": inner},
                optimizer=_OPTIMIZER, lr_scheduler={}, use_lr_scheduler=False, voltron_cache="",
                latent_dim=_WIDTH, num_sampling_steps=2,
                act_window_size=HORIZON, use_text_not_embedding=True, perceiver_depth=1, perceiver_heads=2,
                perceiver_dim_head=16, perceiver_dim=_WIDTH,
            ).train()  # fmt: skip
    return Head(
        policy=policy,
        make_batch=make_batch,
        source="intuitive-robots/mdt_policy e7a78e7",
        blocks="model.inner_model.decoder.blocks",
        length=HORIZON,
        token=HORIZON - 1,
        entry="training_step",
        action="actions",
        more=(0,),
        stand_in="Voltron, CLIP; no decoder of images",
        optimizer=lambda policy: policy.configure_optimizers(),
        sample=sample,
    )
