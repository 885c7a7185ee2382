"""The joint training step beside the official one: the same GR00T N1.5 policy, the authors' LARA in it or ours attached.

    pip install "transformers==4.51.3" "diffusers==0.35.1" torchvision accelerate lpips
    pip install hydra-core omegaconf einops dm-tree
    git clone https://github.com/lmy1001/LARA
    python -m benchmarks.speed.joint --official LARA/LARA_full      # or LARA_OFFICIAL_SRC; --depth 0.25, --tiny

One policy object of the official code, one batch, one frozen image encoder, float32: GR00T N1.5's action head at its own
sizes, and the LAM at the paper's (ViT-MAE-large, M-Former, decoder, LPIPS), with random weights. A linear layer stands in
for the Eagle VLM, so the policy's part of a step is smaller than in training, and a ratio says more about LARA.
`--depth 0.25` keeps a quarter of the layers of every transformer, at full widths and full numbers of tokens, so that their
shares of a step stay what they are; LPIPS, which cannot be cut so, is then left out on both sides.

In every round each way to train takes its turn (forward of all losses, the official trainer's own sum of them, backward;
no optimizer), in turn and in reverse; reported are medians of the rounds' ratios to the official step. On a CPU it is
processor time of one thread, which other work on the machine enters little. The record is written after every round.
`reconstruct=0.25` is measured from four pairs on (`--batch 4`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import RESULTS, markdown
from benchmarks.checkout import Missing
from benchmarks.parity.sides import import_official, official_policy, perceptual_stand_in, take_weights
from benchmarks.speed.lam import SMALL
from benchmarks.speed.measure import environment, finish, medians, ranges, ratios
from lara_adapter import FramePair, LatentActionConfig, LatentActionModel, attach_lara
from lara_adapter.convert import config_to_official, state_to_official
from lara_adapter.storage.files import read_json, write_json, write_tensors

RESULT = RESULTS / "joint_speed.json"
WAYS = {
    "alone": "the policy alone",
    "official": "official LARA_full",
    "ours": "`attach_lara`",
    "ours/4": "`attach_lara(reconstruct=0.25)`",
    "cached": "with the feature cache",
    "cached/4": "both",
}
GOAL = 0.80
GOALS = {"ours": "all as the paper has it", "ours/4": "with `reconstruct=0.25`", "cached": "with the feature cache"}
VLM_TOKENS, VLM_WIDTH, EMBODIMENTS = 300, 2048, 2
RELEASE = {"legacy_token_types": True, "legacy_commitment": True}


def layers(count: int, depth: float) -> int:
    """A part of a transformer's layers."""
    return max(1, round(count * depth))


def head_settings(depth: float, tiny: bool) -> dict[str, Any]:
    """GR00T N1.5's action head; that of the parity run if tiny."""
    if tiny:
        return {}
    blocks = max(3, layers(16, depth))  # layer=-3 needs three
    return {
        "diffusion_model_cfg": {"num_attention_heads": 32, "attention_head_dim": 48, "num_layers": blocks,
                                "output_dim": 1024, "cross_attention_dim": VLM_WIDTH},
        "vl_self_attention_cfg": {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": layers(4, depth)},
        "input_embedding_dim": 1536, "backbone_embedding_dim": VLM_WIDTH, "hidden_size": 1024, "max_seq_len": 1024,
        "max_num_embodiments": EMBODIMENTS,
    }  # fmt: skip


def lam_settings(arguments: argparse.Namespace) -> tuple[LatentActionConfig, dict[str, Any]]:
    """The LAM's configuration, and its image encoder's."""
    depth, weight = arguments.depth, 0.0 if arguments.depth < 1 else 1.0
    if arguments.tiny:
        encoder = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
                   "image_size": 64}  # fmt: skip
        sizes = SMALL
    else:
        encoder = {"hidden_size": 1024, "num_hidden_layers": layers(24, depth), "num_attention_heads": 16,
                   "intermediate_size": 4096}  # fmt: skip
        full = LatentActionConfig.paper()
        sizes = {"idm_layers": layers(full.idm_layers, depth), "fdm_layers": layers(full.fdm_layers, depth)}
    return LatentActionConfig.paper(**RELEASE, perceptual_weight=weight, **sizes), encoder


def add_official_lara(official: types.SimpleNamespace, policy: Any, config: LatentActionConfig, encoder: Any) -> None:
    """Put the official tokenizer into the policy by its own loader; LPIPS with a VGG16 of random weights, or none."""
    settings = official.transformers.ViTMAEConfig(**encoder, mask_ratio=0.0)
    backbone = official.transformers.ViTMAEModel(settings)
    real = official.lpips.LPIPS
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        backbone.save_pretrained(Path(scratch) / "encoder")
        folder = Path(scratch) / "tokenizer"
        folder.mkdir()
        state = LatentActionModel(config, backbone=backbone).state_dict()
        write_json(folder / "config.json", config_to_official(config, str(Path(scratch) / "encoder")))
        write_tensors(folder / "model.safetensors", state_to_official(state, config))
        official.lpips.LPIPS = lambda **_: (
            perceptual_stand_in(real, kinks=True) if config.perceptual_weight else torch.nn.Identity()
        )
        try:
            policy.action_head.configure_latent_motion(tokenizer_path=str(folder), tune_tokenizer=True)
        finally:
            official.lpips.LPIPS = real


def make_batch(batch: int, tiny: bool, size: int) -> dict[str, torch.Tensor]:
    """Random features of the VLM, state, actions, and frames [B, 2, 3, S, S] in [0, 1]."""
    random = torch.Generator().manual_seed(0)
    tokens, width = (10, 48) if tiny else (VLM_TOKENS, VLM_WIDTH)
    return {
        "vlm_features": torch.randn(batch, tokens, width, generator=random),
        "state": torch.randn(batch, 1, 64, generator=random),
        "action": torch.randn(batch, 16, 32, generator=random),
        "action_mask": torch.ones(batch, 16, 32, dtype=torch.bool),
        "embodiment_id": torch.zeros(batch, dtype=torch.long),
        "frames": torch.rand(batch, 2, 3, size, size, generator=random),
    }


class Steps:
    """A step of the policy in each way; LARA is attached for the step's way and detached after it."""

    def __init__(self, arguments: argparse.Namespace, cache: Path) -> None:
        self.official = import_official(arguments.official)
        torch.manual_seed(0)
        self.device = arguments.device
        width = 48 if arguments.tiny else VLM_WIDTH
        self.policy: Any = official_policy(self.official, True, head_settings(arguments.depth, arguments.tiny), width)
        config, encoder = lam_settings(arguments)
        add_official_lara(self.official, self.policy, config, encoder)
        self.policy.to(self.device).train()
        self.head = self.policy.action_head
        self.head.latent_motion_tokenizer.image_encoder.eval()
        self.lam = take_weights(self.head.latent_motion_tokenizer, config).to(self.device)
        self.cache = cache
        batch = make_batch(arguments.batch, arguments.tiny, config.image_size)
        self.batch = {name: value.to(self.device) for name, value in batch.items()}
        self.parameters = {
            "policy": sum(p.numel() for name, p in self.policy.named_parameters() if "latent_motion" not in name),
            "lam": sum(p.numel() for p in self.lam.parameters()),
            "encoder": sum(p.numel() for p in self.lam.image_encoder.network.parameters()),  # type: ignore[union-attr]
        }

    def official_loss(self) -> torch.Tensor:
        """The official trainer's own sum of the losses, without a trainer around it."""
        inputs = {name: value for name, value in self.batch.items() if name != "frames"}
        inputs["images"] = self.batch["frames"][:, None]
        host = types.SimpleNamespace(
            accelerator=types.SimpleNamespace(unwrap_model=lambda model: model),
            args=types.SimpleNamespace(logging_steps=2),
            state=types.SimpleNamespace(global_step=1),
        )
        total: torch.Tensor = self.official.trainer.DualBrainTrainer.compute_loss(host, self.policy, inputs)
        return total

    def our_loss(self) -> torch.Tensor:
        """The policy's own loss, with the terms of what is attached."""
        loss: torch.Tensor = self.policy(dict(self.batch))["loss"]
        return loss

    def seconds(self, way: str) -> float:
        """Of one forward and backward: by the clock on a GPU, of the processor's own time on a CPU."""
        self.policy.zero_grad(set_to_none=True)
        self.head.use_latent_motion_queries = way == "official"
        if way in ("official", "alone"):
            return self._timed(self.official_loss)
        self.lam.cache_features(self.cache if way.startswith("cached") else None)
        lara = attach_lara(
            self.policy, self.lam, layer=-3, blocks="action_head.model.transformer_blocks", token="last",
            projector="linear", reconstruct=0.25 if way.endswith("/4") else 1.0,
            frames=lambda batch: FramePair.from_tensor(batch["frames"]),
        )  # fmt: skip
        try:
            if way.startswith("cached"):  # seen before, as from the second epoch on
                with torch.no_grad():
                    self.lam.encode(self.batch["frames"][:, 0], self.batch["frames"][:, 1])
            return self._timed(self.our_loss)
        finally:
            lara.detach()
            self.lam.zero_grad(set_to_none=True)

    def _timed(self, loss: Callable[[], torch.Tensor]) -> float:
        cuda = self.device.startswith("cuda")
        clock = time.perf_counter if cuda else time.process_time
        wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
        wait()
        start = clock()
        loss().backward()
        wait()
        return clock() - start


def make_report(found: dict[str, list[float]], steps: Steps, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is written."""
    relative = ratios(found, "official")
    return {
        "ratio": medians(relative),
        "ratio_range": ranges(relative),
        "rounds": len(found["official"]),
        "parameters": steps.parameters,
        "settings": {
            "depth": arguments.depth, "tiny": arguments.tiny, "batch": arguments.batch, "dtype": "float32",
            "perceptual": steps.lam.perceptual is not None, "device": arguments.device.partition(":")[0],
            "threads": torch.get_num_threads(),
        },
        "environment": environment(arguments.device, ("torch", "transformers", "diffusers")),
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    rows = []
    for way, label in WAYS.items():
        if way in report["ratio"]:
            low, high = report["ratio_range"][way]
            rows.append((label, f"{report['ratio'][way]:.2f}", "" if way == "official" else f"{low:.2f} - {high:.2f}"))
    return markdown.table(("", "a step, median of the rounds' ratios", "range"), rows)


def section() -> str:
    """The committed record and its reading."""
    if not RESULT.exists():
        return "Not timed yet."
    report = read_json(RESULT)
    settings, ratio, parameters = report["settings"], report["ratio"], report["parameters"]
    if settings["tiny"]:
        raise ValueError(f"{RESULT.name} is of tiny sizes")
    size = (
        "all layers" if settings["depth"] == 1 else f"{settings['depth']:.0%} of the layers of every transformer"
    ) + (", with LPIPS" if settings["perceptual"] else ", LPIPS left out on both sides")
    clock = "processor time of one thread" if settings["device"] == "cpu" else report["environment"]["machine"]
    policy, lam, encoder = (f"{parameters[part] / 1e6:.0f} M parameters" for part in ("policy", "lam", "encoder"))
    reached = ", ".join(
        f"{label} {'reached' if ratio[way] <= GOAL else 'not reached'} ({ratio[way]:.2f})"
        for way, label in GOALS.items() if way in ratio
    )  # fmt: skip
    reading = markdown.paragraph(
        f"""{clock[0].upper()}{clock[1:]}, float32, batch {settings["batch"]}, {report["rounds"]} rounds, full widths,
        {size}: {policy} of the policy, {lam} of the LAM, {encoder} of its frozen encoder. The policy has no VLM here (a
        linear layer stands in), so LARA is {1 - ratio["alone"]:.0%} of the official step; a VLM, which costs both sides
        the same, brings every ratio nearer to 1. The goal is {GOAL:.2f}: {reached}. For the whole step with a VLM this
        shows neither."""
    )
    return f"{table(report)}\n\n{reading}"


SECTIONS = {"benchmarks/README.md": {"joint step": section}}


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, default=os.environ.get("LARA_OFFICIAL_SRC"))
    parser.add_argument("--depth", type=float, default=1.0, help="part of the layers of every transformer")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.official is None:
        parser.error("--official: git clone https://github.com/lmy1001/LARA, then --official LARA/LARA_full")
    torch.set_num_threads(1)
    # of fewer than four pairs a quarter is one in any case
    possible = [way for way in WAYS if way in arguments.ways and (arguments.batch >= 4 or not way.endswith("/4"))]
    ways = ["official", *(way for way in possible if way != "official")]
    with tempfile.TemporaryDirectory() as folder:
        try:
            steps = Steps(arguments, Path(folder))
        except Missing as error:
            sys.stderr.write(f"{error}\n")
            return 2
        for way in ways[:2]:
            steps.seconds(way)  # warms up
        found: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(arguments.rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                found[way].append(steps.seconds(way))
            report = make_report(found, steps, arguments)
            write_json(arguments.out, report)  # a cut run loses nothing
    return finish(report, table(report), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
