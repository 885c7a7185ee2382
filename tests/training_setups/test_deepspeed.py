"""DeepSpeed ZeRO-2 and ZeRO-3 on two CPU ranks: the same weights as one process, and files that hold whole tensors."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys

import pytest
import torch
from helpers.models import FixedDit, build
from helpers.ranks import restart_ranks, run_ranks
from helpers.toys import make_batch

from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara, load_lara
from lara_adapter.lam.image_encoder import describe_image_encoder
from lara_adapter.storage.files import read_tensors

_COMPILES = 700  # seconds: on a busy machine the compiler takes minutes
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.timeout(_COMPILES),
    pytest.mark.skipif(shutil.which("g++") is None, reason="deepspeed compiles an operator for the CPU: needs g++"),
]

RATE = 0.1
STEPS = {"own": 1, "latent": 4}  # the quantiser: warm-up, initialisation from data, quantised


class Bf16Dit(FixedDit):
    """As GR00T: the host casts its inputs to its own dtype."""

    def forward(self, batch):
        return super().forward({name: x.to(self.position.dtype) for name, x in batch.items() if x.is_floating_point()})


def _engine(policy, stage: int, **changes):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo")
    settings = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        **changes,
    }  # fmt: skip
    optimizer = torch.optim.SGD(policy.parameters(), lr=RATE)
    return deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)[0]


def _train_and_save(rank: int, folder: str):
    """For each stage and LAM: train, save the adapter, and return the whole weights."""
    import deepspeed

    os.environ["LOCAL_RANK"] = str(rank)  # deepspeed insists
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]  # where pip puts ninja
    after = {}
    for stage in (2, 3):
        for lam, steps in STEPS.items():
            policy, lara = build(lam=lam)
            engine = _engine(policy, stage)
            for _ in range(steps):
                engine.backward(engine(make_batch(4, seed=rank))["loss"])
                engine.step()
            lara.save_pretrained(f"{folder}/{stage}-{lam}")
            with deepspeed.zero.GatheredParameters([p for p in policy.parameters() if hasattr(p, "ds_id")]):
                after[stage, lam] = {name: p.detach().clone().numpy() for name, p in policy.named_parameters()}
    return after


def _all_jobs(rank: int, folder: str):
    after = _train_and_save(rank, folder)
    return {**after, **{(stage, "bf16"): _train_in_bf16(rank, stage, folder) for stage in (2, 3)}}


def _train_in_bf16(rank: int, stage: int, folder: str):
    """GR00T's default precision: DeepSpeed casts every registered parameter, and the frozen image encoder stays float32."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    transformers.ViTMAEModel(config).save_pretrained(f"{folder}/mae-{rank}")
    described = describe_image_encoder(f"{folder}/mae-{rank}")
    policy = Bf16Dit().train()
    lam = LatentActionModel(LatentActionConfig.tiny(image_size=32, vq_warmup_steps=2, **described))
    lara = attach_lara(policy, lam, align_weight=0.3, lam_weight=0.2)
    engine = _engine(policy, stage, bf16={"enabled": True})
    losses = []
    for step in range(4):
        engine.backward(engine(make_batch(4, seed=step))["loss"])
        engine.step()
        losses.append(lara.losses.total.item())
    return losses, {str(p.dtype) for p in lara.parameters()}, str(lam.image_encoder.network.dtype)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What each rank has after training, and where the adapters are; DeepSpeed keeps process groups in globals."""
    folder = tmp_path_factory.mktemp("deepspeed")
    restart_ranks()
    with pytest.MonkeyPatch.context() as patch:
        # in the usual folder a build that was killed leaves a lock, for which every later one waits for ever
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        results = run_ranks(_all_jobs, str(folder), patience=_COMPILES)
    yield results, folder
    restart_ranks()


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_takes_the_step_of_one_process(stage, trained):
    policy, _ = build()
    sum(policy(make_batch(4, seed=rank))["loss"] for rank in (0, 1)).div(2).backward()
    torch.optim.SGD(policy.parameters(), lr=RATE).step()
    for name, wanted in policy.named_parameters():
        for of_rank in trained[0]:
            ours = torch.from_numpy(of_rank[stage, "own"][name])
            torch.testing.assert_close(ours, wanted.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_saves_whole_tensors_that_load_again(stage, trained):
    after, folder = trained[0][0][stage, "latent"], trained[1] / f"{stage}-latent"
    saved = {f"lara.lam.{k}": v for k, v in read_tensors(folder / "lam/model.safetensors").items()}
    saved |= {f"lara.{k}": v for k, v in read_tensors(folder / "lara_adapter.safetensors").items()}
    ours = [name for name in after if name.startswith("lara.")]
    assert len(ours) > 20
    for name in ours:
        assert torch.equal(saved[name], torch.from_numpy(after[name])), name
    policy, _ = build(lam="latent")
    policy.lara.detach()
    again = load_lara(policy, folder)
    assert again.step == STEPS["latent"]
    assert all(torch.equal(p.detach(), torch.from_numpy(after[f"lara.{name}"])) for name, p in again.named_parameters())


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_takes_bf16_with_a_frozen_image_encoder(stage, trained):
    for of_rank in trained[0]:
        losses, dtypes, encoder = of_rank[stage, "bf16"]
        assert all(math.isfinite(loss) and loss > 0 for loss in losses)
        assert dtypes == {"torch.bfloat16"}  # float32 masters are in the optimizer
        assert encoder == "torch.float32"
