"""Speed and peak memory of a LAM's training step: ours, ours with the feature cache, and the official implementation.

    pip install "transformers==4.51.3" accelerate lpips torchvision hydra-core omegaconf einops
    git clone https://github.com/lmy1001/LARA
    python -m benchmarks.speed.lam --official LARA/LARA_full      # or LARA_OFFICIAL_SRC; --preset paper|small

The paper's sizes (ViT-MAE-large, M-Former 4 x 768, decoder 12 x 768, 8 codes of 32, 224 pixels), random weights, the same
frames, batch and dtype for all; forward and backward of L_LAM, the optimizer left out. Arms run in turn in one process,
so that a machine that slows down slows all of them; what is reported is the median of the rounds' ratios. Without the
official checkout its arm is left out. The perceptual term is off on all sides (its VGG16 is a download).
Peak memory is the resident set of a process of its own for each arm, beyond what it had before its first step.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks import RESULTS, markdown
from benchmarks.checkout import lara_full
from benchmarks.speed.measure import environment, finish, medians, peak_mb, ranges, ratios, take_turns
from lara_adapter import LatentActionConfig, LatentActionModel
from lara_adapter.convert import config_to_official, state_to_official
from lara_adapter.storage.files import read_json, write_json, write_tensors

RESULT = RESULTS / "lam_speed.json"
RELEASE = {"legacy_token_types": True, "legacy_commitment": True, "perceptual_weight": 0.0}
LABELS = {
    "ours": "ours",
    "ours, cached": "ours with `lam.cache_features(folder)`",
    "ours, prefetched": "and `lam.prefetch_features()`",
}
GOALS = {"ours": 0.85, "ours, cached": 0.35}
SMALL = {
    "image_size": 64, "encoder_image_size": 64, "encoder_width": 64, "idm_width": 48, "idm_layers": 2, "idm_heads": 4,
    "idm_mlp": 96, "fdm_width": 48, "fdm_layers": 2, "fdm_heads": 4, "fdm_mlp": 96,
}  # fmt: skip


def make_backbone(preset: str) -> Any:
    """A frozen ViT-MAE of the preset's size with random weights."""
    from transformers import ViTMAEConfig, ViTMAEModel

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    small = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 64,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTMAEModel(ViTMAEConfig(**(large if preset == "paper" else small), mask_ratio=0.0)).eval()


def make_ours(preset: str, backbone: Any) -> LatentActionModel:
    """Our LAM in the release's settings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LatentActionConfig.paper(**RELEASE, **(SMALL if preset == "small" else {}))
        return LatentActionModel(config, backbone=backbone).train()


def make_official(ours: LatentActionModel, backbone: Any) -> Any:
    """The official tokenizer with the same weights, by its own loader; its checkout is importable."""
    import lpips
    from moto.latent_motion_tokenizer.loading import load_latent_motion_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        backbone.save_pretrained(Path(scratch) / "encoder")
        folder = Path(scratch) / "tokenizer"
        folder.mkdir()
        write_json(folder / "config.json", config_to_official(ours.config, str(Path(scratch) / "encoder")))
        write_tensors(folder / "model.safetensors", state_to_official(ours.state_dict(), ours.config))
        real, lpips.LPIPS = lpips.LPIPS, lambda net: torch.nn.Identity()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return load_latent_motion_tokenizer(folder).train()
        finally:
            lpips.LPIPS = real


def make_frames(model: LatentActionModel, batch: int, device: str) -> list[torch.Tensor]:
    """A batch of pairs in [0, 1], float32, at the model's size: no side has to convert or resize."""
    size, generator = model.config.image_size, torch.Generator().manual_seed(1)
    return [torch.rand(batch, 3, size, size, generator=generator).to(device) for _ in range(2)]


def make_arms(
    arguments: argparse.Namespace, names: list[str], cache_folder: Path
) -> dict[str, Callable[[], torch.Tensor]]:
    """Each arm's loss on the same batch."""
    backbone = make_backbone(arguments.preset)
    ours = make_ours(arguments.preset, backbone).to(arguments.device)
    present, future = make_frames(ours, arguments.batch, arguments.device)
    arms: dict[str, Callable[[], torch.Tensor]] = {}
    if "official" in names:
        theirs = make_official(ours, backbone).to(arguments.device)
        theirs.image_encoder.eval()
        arms["official"] = lambda: theirs(present, future).loss
        if names == ["official"]:
            del ours
    if "ours" in names:
        model = ours
        arms["ours"] = lambda: model(present, future).loss
    if "ours, cached" in names or "ours, prefetched" in names:
        cached = make_ours(arguments.preset, backbone).to(arguments.device)
        cached.cache_features(cache_folder)
        kind = arguments.device.partition(":")[0]
        with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            cached.encode(present, future)  # seen once before, as in the second epoch
        arms["ours, cached"] = lambda: cached(present, future).loss
    if "ours, prefetched" in names:  # by the data loader's workers, beside the step
        pairs = torch.stack([present, future], 1).cpu()
        dtype = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
        brought = cached.prefetch_features(dtype=dtype).read(pairs)
        assert brought is not None
        features = brought.flatten(0, 1).to(arguments.device)
        arms["ours, prefetched"] = lambda: cached(present, future, features=features).loss
    return arms


def step(loss_fn: Callable[[], torch.Tensor], arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds of one forward and backward, and the loss."""
    kind = arguments.device.partition(":")[0]
    wait = torch.cuda.synchronize if kind == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
        loss = loss_fn()
    loss.backward()
    wait()
    return time.perf_counter() - start, float(loss.detach())


def measure_time(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Seconds of every round and arm."""
    with tempfile.TemporaryDirectory() as folder:
        arms = make_arms(arguments, names, Path(folder))
        losses = {}

        def timed(name: str) -> float:
            seconds, losses[name] = step(arms[name], arguments)
            return seconds

        turns = {name: functools.partial(timed, name) for name in arms}
        take_turns(turns, 1)  # warms up
        seconds = take_turns(turns, arguments.rounds)
        used = sum(path.stat().st_size for path in Path(folder).rglob("*.features"))
    return {"seconds": seconds, "loss": losses, "cache_bytes": used}


def measure_memory(arguments: argparse.Namespace, name: str) -> float:
    """Peak MB of one arm beyond what stood before its first step."""
    with tempfile.TemporaryDirectory() as folder:
        arm = make_arms(arguments, [name], Path(folder))[name]
        return peak_mb(lambda: step(arm, arguments), arguments.device)


def make_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is written."""
    names = [*(["official"] if arguments.official else []), "ours", "ours, cached", "ours, prefetched"]
    timed = measure_time(arguments, names)
    base = names[0]
    relative = ratios(timed["seconds"], base)
    memory = {}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.speed.lam", "--memory", name, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[name] = float(done.stdout.split()[-1])
    return {
        "relative_to": base,
        "ratio": medians(relative),
        "ratio_range": ranges(relative),
        "loss": timed["loss"],
        "peak_mb": memory,
        "cache_kb_per_frame": timed["cache_bytes"] / max(_capacity(arguments), 1) / 1e3,
        "settings": {
            "preset": arguments.preset, "batch": arguments.batch, "dtype": arguments.dtype, "device": arguments.device,
            "rounds": arguments.rounds, "threads": torch.get_num_threads(),
        },
        "environment": environment(arguments.device, ("torch", "transformers")),
    }  # fmt: skip


def _capacity(arguments: argparse.Namespace) -> int:
    """Rows a features file is made for: it grows by whole steps, and sparse."""
    from lara_adapter.lam import feature_cache

    rows, step_ = 2 * arguments.batch, feature_cache._GROW
    return -(-rows // step_) * step_


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{'arm':<14}{'time':>8}{'range':>16}{'peak memory beyond the weights':>34}   (1 = {report['relative_to']})"
    ]
    for name, ratio in report["ratio"].items():
        low, high = report["ratio_range"][name]
        peak = report["peak_mb"][name] / report["peak_mb"][report["relative_to"]]
        lines.append(f"{name:<14}{ratio:>8.2f}{f'{low:.2f} - {high:.2f}':>16}{peak:>34.2f}")
    lines.append(f"disk per cached frame: {report['cache_kb_per_frame']:.0f} kB")
    return "\n".join(lines)


def section() -> str:
    """The table of the committed record."""
    record = read_json(RESULT)
    if (record["settings"]["preset"], record["relative_to"]) != ("paper", "official"):
        raise ValueError(f"{RESULT.name} is not relative to the official code at the paper's sizes")
    rows = [("official release", "1.00", "", "1.00")]
    for arm, label in LABELS.items():
        if arm not in record["ratio"]:
            continue
        low, high = record["ratio_range"][arm]
        peak = record["peak_mb"][arm] / record["peak_mb"]["official"]
        rows.append((label, f"{record['ratio'][arm]:.2f}", f"{low:.2f} - {high:.2f}", f"{peak:.2f}"))
    head = ("", "time, median of the rounds' ratios", "range", "peak memory beyond the weights")
    cache = markdown.paragraph(
        f"""The cache keeps what the frozen image encoder made of a frame, on disk
        ({record["cache_kb_per_frame"]:.0f} kB a frame in float32, memory-mapped, checksummed), for training on
        demonstrations, whose frames come again and again: `--lara.feature-cache FOLDER` for GR00T,
        `--lara.feature_cache=FOLDER` for LeRobot. The losses stay the same. Aimed at were {GOALS["ours"]:.2f} of the
        release's time and {GOALS["ours, cached"]:.2f} with the cache: missed. By operations the cache leaves 165 of 395
        GFLOP a pair (`benchmarks.speed.counts --lam paper`; no LPIPS), 0.42. Not measured on a GPU yet."""
    )
    return f"{markdown.table(head, rows)}\n\n{cache}"


SECTIONS = {"docs/latent-action-models.md": {"lam cost": section}}


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=lara_full, default=os.environ.get("LARA_OFFICIAL_SRC"))
    parser.add_argument("--preset", choices=["paper", "small"], default="paper")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(measure_memory(arguments, arguments.memory))
        return 0
    report = make_report(arguments)
    return finish(report, table(report), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
