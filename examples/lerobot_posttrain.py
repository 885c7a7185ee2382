"""LARA in your own training loop: a LeRobotDataset, a LeRobot policy, accelerate; without lerobot-train.

    python examples/record_metaworld.py --root data/drawer --tasks drawer-open --episodes 25
    python examples/lerobot_posttrain.py --root data/drawer --tiny            # small enough for two CPU cores
    python examples/lerobot_posttrain.py --root data/drawer --tiny --no-lara  # the baseline
    python examples/lerobot_posttrain.py --root data/drawer --policy-path my/policy --lam my/lam
    python examples/lerobot_posttrain.py --smoke                              # the whole path, as a check

LARA's lines in `train` are marked `# LARA`. --output gets a stock LeRobot policy (policy/), the adapter (lara/),
checkpoints to --resume from, a film, and report.json. A policy trained on a recording of record_metaworld.py is then
evaluated in Meta-World.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from record_metaworld import NEEDS, World, progress_bar, quieten, record, require

try:
    import torch
    import transformers
    import tyro
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, set_seed
    from lam_training import optimise_lam
    from lara_adapter.integrations.lerobot import LaraDataset, stock_saves
    from lara_adapter.integrations.lerobot.dataset import FRAMES, VALID
    from lara_adapter.integrations.lerobot.serve import load_stock
    from lara_adapter.integrations.settings import describe_error
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
    from lerobot_policy import build, choose_policy
    from lerobot_report import table
    from metaworld_sim import GLMissing, find_gl
    from torch.utils.data import DataLoader, Subset

    from lara_adapter import LaraAdapter, LatentActionConfig, LatentActionModel, attach_lara
    from lara_adapter.errors import LaraArgumentError, LaraError
    from lara_adapter.inspection import describe_policy
    from lara_adapter.storage.files import read_json, write_json
except ImportError as problem:
    require("lerobot", "accelerate", "datasets", "tyro")
    print(f"lerobot_posttrain.py: {problem}: {NEEDS}", file=sys.stderr)
    raise SystemExit(2) from None

LOG_EVERY = 10
SHOWN = ("action_loss", "align_loss", "lam_loss", "mean_direction")  # on the progress bar
LAM_SIZE = 64  # pixels, of the small LAM trained here


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    root: Path | None = None
    """Folder of the dataset (required, except with --smoke)."""
    repo_id: str = "local/metaworld"
    """Name of the dataset."""
    output: Path = Path("outputs/lerobot_posttrain")
    """Where results are written."""
    policy_path: str | None = None
    """Folder or Hub id of a LeRobot policy to post-train; without it a new Multi-Task DiT."""
    clip: str = "openai/clip-vit-base-patch16"
    """CLIP whose encoders the new policy uses: a Hub id, or a folder with "clip" in its path."""
    tiny: bool = False
    """Make the new policy small, with a small random CLIP: no download, and two CPU cores suffice."""
    lara: bool = True
    """Train with LARA; --no-lara is the baseline with the same weights, order and noise."""
    lam: str | None = None
    """Folder or Hub id of a latent action model; without it a small one is first trained on the dataset's own frames."""
    lam_steps: int = 400
    """Training steps of that small one."""
    layer: int = -3
    """Which hidden state is aligned; see attach_lara."""
    alignment: Literal["cosine", "contrastive"] = "cosine"
    """cosine: the paper's."""
    align_weight: float = 0.1
    """w1 of LARA, Eq. 7; the paper's 0.01 has little effect in a few hundred steps."""
    lam_weight: float = 0.1
    """w2; only its ratio to w1 matters to the LAM."""
    views: Annotated[str | None, tyro.conf.arg(aliases=["--camera"])] = None
    """Key of LARA's camera, if there are several."""
    gap: Annotated[int | None, tyro.conf.arg(aliases=["--horizon"])] = None
    """C, frames between LARA's two frames; without it the length of the action chunk."""
    steps: int = 500
    """Training steps."""
    batch: int = 32
    """Rows per step and process."""
    lr: float | None = None
    """Peak learning rate; without it the policy's default (5e-4 with --tiny)."""
    workers: int = 2
    """Processes that decode video."""
    save_every: int = 250
    """Steps between checkpoints."""
    resume: bool = False
    """Resume from the last checkpoint in --output."""
    episodes: int = 20
    """Closed-loop episodes of each task; 0: no evaluation."""
    max_steps: int = 150
    """Steps after which an episode counts as failed."""
    seed: int = 0
    """Seed of weights, data order and noise."""
    smoke: bool = False
    """Record, train, resume, export and act, all short; it only shows that everything runs."""


def train(settings: Settings, accelerator: Accelerator, start: Path | None = None) -> dict[str, Any]:
    """Train, and export to `settings.output`.

    Args:
        settings: the command line.
        accelerator: of this process.
        start: checkpoint to resume from; None: train from the beginning.

    Returns:
        The training section of the report.
    """
    begin = time.perf_counter()
    meta = LeRobotDatasetMetadata(settings.repo_id, root=settings.root)
    config = choose_policy(settings, accelerator, meta)
    set_seed(settings.seed)
    policy, preprocessor, postprocessor = build(config, meta)
    dataset = LeRobotDataset(
        settings.repo_id, root=settings.root, delta_timestamps=resolve_delta_timestamps(config, meta)
    )
    lara = None
    if settings.lara:
        report = describe_policy(policy, layer=settings.layer)  # before a LAM is trained for a layer that is not there
        if report.error:
            raise LaraArgumentError(report.error)
        gap = max(config.action_delta_indices) + 1 if settings.gap is None else settings.gap
        size = None if settings.lam else LAM_SIZE
        dataset = LaraDataset(dataset, gap=gap, views=settings.views, frame_size=size)  # LARA: the two frames
        lara = attach_lara(  # LARA: before the optimizer and before prepare
            policy,
            str(settings.lam or pretrain_lam(settings, accelerator, dataset)),
            layer=settings.layer,
            alignment=settings.alignment,
            align_weight=settings.align_weight,
            lam_weight=settings.lam_weight,
        )
        stock_saves(lara)  # LARA: policy.save_pretrained writes the policy alone
    set_seed(settings.seed, device_specific=True)  # again, because the baseline drew fewer numbers

    preset = config.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params())
    scheduler = config.get_scheduler_preset()
    scheduler = scheduler.build(optimizer, settings.steps) if scheduler else None
    model, optimizer, scheduler = accelerator.prepare(policy, optimizer, scheduler)

    step, history = 0, []
    if start is not None:
        accelerator.load_state(str(start))  # includes LARA's weights and moments
        step, history = (read_json(start / "progress.json")[key] for key in ("step", "history"))
    loader = accelerator.prepare(make_loader(dataset, settings, step, accelerator.num_processes))
    trained, seconds = step, time.perf_counter()
    bar = progress_bar(settings.steps, "policy", initial=step, disable=not accelerator.is_main_process)
    model.train()
    for batch in loader:
        step += 1
        loss, _ = model(preprocessor(batch))  # LARA: the loss includes its terms
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), preset.grad_clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0 or step in (1, settings.steps):
            history.append({"step": step, **measure(loss, lara)})
            bar.set_postfix({name: f"{history[-1][name]:.3f}" for name in SHOWN if name in history[-1]}, refresh=False)
        bar.update()
        if step % settings.save_every == 0 or step == settings.steps:
            save_checkpoint(settings, accelerator, step, history)
    bar.close()
    seconds = time.perf_counter() - seconds

    if accelerator.is_main_process:
        for part in (policy, preprocessor, postprocessor):
            part.save_pretrained(settings.output / "policy")
        if lara is not None:
            lara.save_pretrained(settings.output / "lara")  # LARA: attach it again with load_lara
    accelerator.wait_for_everyone()
    last = history[-10:]
    return {
        "policy": config.type,
        "policy_parameters": count(policy) - (count(lara) if lara else 0),
        "dataset": {"episodes": meta.total_episodes, "frames": meta.total_frames},
        "steps": settings.steps,
        "seconds": round(time.perf_counter() - begin, 1),
        "seconds_per_step": round(seconds / max(1, settings.steps - trained), 4),
        "action_loss": sum(entry["action_loss"] for entry in last) / len(last),  # mean of the last logged steps
        "history": history,
    }


def measure(loss: torch.Tensor, lara: LaraAdapter | None) -> dict[str, float]:
    """The metrics of one step as floats: the policy's own loss, and LARA's."""
    if lara is None:
        return {"action_loss": float(loss.detach())}
    return {"action_loss": float(loss.detach() - lara.losses.total.detach()), **lara.metrics()}


def count(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def pretrain_lam(settings: Settings, accelerator: Accelerator, dataset: LaraDataset) -> Path:
    """Stage 1 of the paper at small scale, on the dataset's own frames; a real LAM needs far more video."""
    folder = settings.output / "lam"
    if accelerator.is_main_process and not folder.is_dir():
        set_seed(settings.seed)
        lam = LatentActionModel(LatentActionConfig.tiny(image_size=LAM_SIZE, vq_warmup_steps=settings.lam_steps // 4))
        lam.to(accelerator.device)
        lam_settings = dataclasses.replace(settings, steps=settings.lam_steps)
        with progress_bar(settings.lam_steps, "LAM") as bar:
            stream = iter_frames(make_loader(dataset, lam_settings, 0, 1), accelerator.device)
            history = optimise_lam(lam, stream, 5e-4, settings.lam_steps, bar.update)
        lam.save_pretrained(folder)
        write_json(folder / "history.json", history)
    accelerator.wait_for_everyone()
    return folder


def iter_frames(loader: DataLoader, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the two frames alone, under the keys of `optimise_lam`."""
    for batch in loader:
        yield {"lara_frames": batch[FRAMES].to(device), "lara_frames_valid": batch[VALID].to(device)}


def make_loader(dataset: Any, settings: Settings, done: int, processes: int) -> DataLoader:
    """Batches from step `done` on; their order depends only on the seed, so a resumed run gets the remaining ones."""
    random = torch.Generator().manual_seed(settings.seed)
    rows, count = len(dataset), settings.steps * settings.batch * processes
    order = torch.cat([torch.randperm(rows, generator=random) for _ in range(-(-count // rows))])
    rest = Subset(dataset, order[done * settings.batch * processes : count].tolist())
    # its own generator, because starting a loader draws a number
    return DataLoader(rest, settings.batch, num_workers=settings.workers, generator=torch.Generator())


def save_checkpoint(settings: Settings, accelerator: Accelerator, step: int, history: list[dict[str, Any]]) -> None:
    """Save all that a bit-identical resume needs; progress.json is written last and marks the checkpoint complete."""
    folder = settings.output / "checkpoints" / f"{step:06d}"
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(folder / "progress.json", {"step": step, "history": history})


def last_checkpoint(settings: Settings) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = sorted(path.parent for path in (settings.output / "checkpoints").glob("*/progress.json"))
    return complete[-1] if complete else None


def evaluate(settings: Settings, device: str) -> dict[str, Any] | None:
    """Evaluate the exported policy as stock LeRobot; None for a dataset that is not from record_metaworld.py."""
    world = World.read(settings.root)
    if world is None or settings.episodes == 0:
        return None
    from lerobot_rollout import closed_loop

    set_seed(settings.seed)
    begin = time.perf_counter()
    result = closed_loop(
        *load_stock(settings.output / "policy", device),
        world,
        episodes=settings.episodes,
        max_steps=settings.max_steps,
        film=settings.output,
    )
    return {**result, "seconds": round(time.perf_counter() - begin, 1)}


def run(settings: Settings, accelerator: Accelerator) -> None:
    """Train, evaluate, and write the report."""
    start = last_checkpoint(settings) if settings.resume else None
    if settings.resume and start is None and accelerator.is_main_process:
        print(f"--resume: {settings.output} has no checkpoint; the run begins at step 0", file=sys.stderr)
    report = {"arm": f"LARA, {settings.alignment}" if settings.lara else "without LARA"}
    report["training"] = train(settings, accelerator, start)
    if accelerator.is_main_process:
        report["closed_loop"] = evaluate(settings, accelerator.device.type)
        report["settings"] = {name: str(value) for name, value in dataclasses.asdict(settings).items()}
        write_json(settings.output / "report.json", report)
        print(f"\n{table(report)}\n\n{settings.output}/: policy/ (stock LeRobot), lara/, checkpoints/, report.json")


def smoke(settings: Settings, accelerator: Accelerator) -> None:
    """Run the whole path, and check that a run resumed half-way ends with the same weights."""
    output = settings.output
    shutil.rmtree(output, ignore_errors=True)
    world = World(("handle-press",), seed=settings.seed)
    record(output / "data", settings.repo_id, world, episodes=3, fps=80)
    short = dataclasses.replace(
        settings, root=output / "data", tiny=True, steps=8, save_every=4, lam_steps=12, batch=8, episodes=2,
        max_steps=24, workers=0,  # no worker processes: a fork after OpenGL was used hangs
    )  # fmt: skip
    run(short, accelerator)
    whole = {name: value.clone() for name, value in weights(output).items()}
    stopped = output / "checkpoints" / "000004"
    train(dataclasses.replace(short, save_every=99), Accelerator(**ACCELERATOR), stopped)
    if any(not torch.equal(whole[name], value) for name, value in weights(output).items()):
        raise SystemExit("the resumed run ended with other weights than the uninterrupted one")
    print("resumed from step 4: the weights are bit-identical")


def weights(output: Path) -> dict[str, torch.Tensor]:
    """All tensors of the export: the policy's and LARA's."""
    from safetensors.torch import load_file

    return {
        f"{path.name}/{key}": t for path in sorted(output.glob("*/*.safetensors")) for key, t in load_file(path).items()
    }


# as lerobot-train: one scheduler step per step for any number of processes; a part of CLIP is unused
ACCELERATOR: dict[str, Any] = {
    "step_scheduler_with_optimizer": False,
    "kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)],
}


def main() -> int:
    """Run; returns the exit status."""
    settings = tyro.cli(Settings, description=__doc__)
    quieten()
    transformers.utils.logging.set_verbosity_error()  # it warns about the unused part of CLIP each time
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not settings.smoke and not (settings.root and (settings.root / "meta/info.json").is_file()):
        print(
            f"--root {settings.root}: expected the folder of a LeRobot dataset, with meta/info.json "
            "(record_metaworld.py makes one), or --smoke",
            file=sys.stderr,
        )
        return 2
    if settings.smoke or (settings.episodes and World.read(settings.root)):
        require("metaworld", "mujoco")
        try:
            find_gl()
        except GLMissing as problem:
            print(problem, file=sys.stderr)
            return 2
    accelerator = Accelerator(**ACCELERATOR)
    there = settings.output.exists()
    taken = any((settings.output / name).exists() for name in ("checkpoints", "lam", "policy"))
    accelerator.wait_for_everyone()  # every process checks before one of them writes
    if there and settings.smoke and not (settings.output / "data").is_dir():
        print(
            f"{settings.output} exists and is not of --smoke, which would delete it; choose another --output",
            file=sys.stderr,
        )
        return 2
    if taken and not settings.smoke and not settings.resume:
        print(f"{settings.output} exists; pass --resume to resume, or choose another --output", file=sys.stderr)
        return 2
    try:
        (smoke if settings.smoke else run)(settings, accelerator)
    except LaraError as error:  # what the user can fix: no traceback
        print(describe_error(error, Settings, prefix="--"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
