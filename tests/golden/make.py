"""Write the golden adapters of this version: `python tests/golden/make.py` in an environment with peft.

What a released version wrote is never written again: every later version must load it (tests/golden/test_golden.py). A new
format adds folders of its own under a new name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from golden_policy import Policy, batch, losses  # noqa: E402

from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara, load_lara  # noqa: E402
from lara_adapter.files import write_json, write_tensors  # noqa: E402
from lara_adapter.schedules import Cosine, Warmup  # noqa: E402

SIZES = {"image_size": 16, "encoder_width": 16, "idm_width": 16, "idm_mlp": 16, "fdm_width": 16, "fdm_mlp": 16,
         "fdm_layers": 1, "idm_layers": 1, "queries": 2, "latent_dim": 8, "codebook_size": 16,
         "vq_warmup_steps": 1}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "cosine-mlp": {"alignment": "cosine", "projector": "mlp"},
    "contrastive-linear": {"alignment": "contrastive", "projector": "linear", "token": "mean_valid",
                           "align_weight": Warmup(0.1, 10), "lam_weight": Cosine(0.2, 0.1, 20)},
    "lora": {"projector": "linear"},
    "trainable": {"projector": "linear", "train_lam": False},
}  # fmt: skip


def main() -> None:
    """Write everything."""
    torch.manual_seed(0)
    base = Policy()
    write_tensors(HERE / "base.safetensors", base.state_dict())
    expected: dict[str, Any] = {}
    for name, settings in CASES.items():
        torch.manual_seed(1)
        policy: Any = Policy()
        policy.load_state_dict(base.state_dict())
        if name == "lora":
            import peft

            policy = peft.get_peft_model(policy, peft.LoraConfig(target_modules=["mlp.0"], r=2))
        lara = attach_lara(
            policy.train(),
            LatentActionModel(LatentActionConfig.tiny(**SIZES)),
            layer=-2,
            blocks="transformer_blocks",
            **settings,
        )
        optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            policy(batch())["loss"].backward()
            optimizer.step()
        lara.save_pretrained(HERE / name, save_policy="trainable" if name == "trainable" else None)
        if name in (
            "cosine-mlp",
            "contrastive-linear",
        ):  # nothing of the policy is in these: LARA on the base is compared
            policy = Policy().train()
            policy.load_state_dict(base.state_dict())
            lara = load_lara(policy, HERE / name)
        with lara.disabled(), torch.no_grad():
            acting = policy(batch())["loss"].item()
        expected[name] = losses(policy, lara)
        if name in ("lora", "trainable"):  # what a base policy with it must give
            expected[name]["acting"] = acting
    lam = LatentActionModel(LatentActionConfig.tiny(**SIZES))
    lam.save_pretrained(HERE / "lam-alone")
    frames = batch()["lara_frames"]
    expected["lam-alone"] = {"loss": lam(frames[:, 0], frames[:, 1]).loss.item()}
    write_json(HERE / "expected.json", expected)


if __name__ == "__main__":
    main()
