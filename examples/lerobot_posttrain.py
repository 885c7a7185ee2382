"""LARA in a training loop of your own: a LeRobotDataset, a LeRobot policy, accelerate; no lerobot-train.

    python examples/record_metaworld.py --root data/drawer --tasks drawer-open --episodes 25
    python examples/lerobot_posttrain.py --root data/drawer --tiny            # small enough for two CPU cores
    python examples/lerobot_posttrain.py --root data/drawer --tiny --no-lara  # the baseline
    python examples/lerobot_posttrain.py --root data/drawer --policy-path my/policy --lam my/lam
    python examples/lerobot_posttrain.py --smoke                              # the whole path, to see that it runs

The lines that are LARA's are marked `# LARA` in `train`. What comes out under --output is a stock LeRobot policy
(policy/), the adapter (lara/), checkpoints to --resume from, a film, and report.json. A policy that was trained on a
recording of record_metaworld.py then acts in Meta-World.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from record_metaworld import NEEDS, World, progress_bar, quieten, record, require

try:
    import torch
    import transformers
    import tyro
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, set_seed
    from lara_adapter.integrations.lerobot import LaraDataset, stock_saves
    from lara_adapter.integrations.lerobot.dataset import FRAMES, VALID
    from lara_adapter.integrations.lerobot.serve import load_stock
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
    from lerobot_policy import build, choose_policy
    from lerobot_report import table
    from metaworld_sim import GLMissing, find_gl
    from torch.utils.data import DataLoader, Subset

    from examples.demo.train import optimise_lam
    from lara_adapter import LaraAdapter, LatentActionConfig, LatentActionModel, attach_lara
    from lara_adapter.storage.files import read_json, write_json
except ImportError as problem:
    require("lerobot", "accelerate", "datasets", "tyro")
    print(f"lerobot_posttrain.py: {problem}: {NEEDS}", file=sys.stderr)
    raise SystemExit(2) from None

LOG_EVERY = 10
SHOWN = ("action_loss", "align_loss", "lam_loss", "mean_direction")  # on the progress bar
LAM_SIZE = 64  # pixels, of the small LAM that is trained here


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    root: Path | None = None
    """Folder of the dataset (needed, except with --smoke)."""
    repo_id: str = "local/metaworld"
    """Name of the dataset."""
    output: Path = Path("outputs/lerobot_posttrain")
    """Where results go."""
    policy_path: str | None = None
    """Folder or Hub id of a LeRobot policy to post-train; without it a new Multi-Task DiT."""
    clip: str = "openai/clip-vit-base-patch16"
    """CLIP whose encoders the new policy takes: a Hub id, or a folder with "clip" in its path."""
    tiny: bool = False
    """Make the new policy small, with a small random CLIP: nothing is downloaded, and two CPU cores suffice."""
    lara: bool = True
    """Train with LARA; --no-lara is the baseline: same weights, order and noise."""
    lam: str | None = None
    """Folder or Hub id of a latent action model; without it a small one learns from the dataset's own frames first."""
    lam_steps: int = 400
    """Steps of that."""
    layer: int = -3
    """Which hidden state is aligned; see attach_lara."""
    alignment: Literal["cosine", "contrastive"] = "cosine"
    """cosine: the paper's."""
    align_weight: float = 0.1
    """w1 of LARA, Eq. 7; the paper's 0.01 does little in a few hundred steps."""
    lam_weight: float = 0.1
    """w2; only its ratio to w1 counts for the LAM."""
    camera: str | None = None
    """Key of the camera that LARA looks through, if there are several."""
    horizon: int | None = None
    """Frames between the two that LARA looks at; without it the length of the action chunk."""
    steps: int = 500
    """Training steps."""
    batch: int = 32
    """Rows per step and process."""
    lr: float | None = None
    """Peak learning rate; without it the policy's own (5e-4 with --tiny)."""
    workers: int = 2
    """Processes that decode video."""
    save_every: int = 250
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the last checkpoint under --output."""
    episodes: int = 20
    """Closed-loop episodes of each task; 0: none."""
    max_steps: int = 150
    """Length of an episode that is not solved."""
    seed: int = 0
    """Of weights, data order and noise."""
    smoke: bool = False
    """Record, train, resume, export and act, all of it short; it shows that everything runs and nothing else."""


def train(settings: Settings, accelerator: Accelerator, start: Path | None = None) -> dict[str, Any]:
    """Train, and export to `settings.output`.

    Args:
        settings: the command line.
        accelerator: of this process.
        start: checkpoint to go on from; None: from the beginning.

    Returns:
        What the report says about training.
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
        horizon = settings.horizon or max(config.action_delta_indices) + 1
        size = None if settings.lam else LAM_SIZE
        dataset = LaraDataset(dataset, horizon=horizon, camera=settings.camera, size=size)  # LARA: the two frames
        lara = attach_lara(  # LARA: before the optimizer and before prepare
            policy,
            str(settings.lam or pretrain_lam(settings, accelerator, dataset)),
            layer=settings.layer,
            alignment=settings.alignment,
            align_weight=settings.align_weight,
            lam_weight=settings.lam_weight,
        )
        stock_saves(lara)  # LARA: policy.save_pretrained writes the policy alone
    set_seed(settings.seed, device_specific=True)  # again: the baseline has drawn less

    preset = config.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params())
    scheduler = config.get_scheduler_preset()
    scheduler = scheduler.build(optimizer, settings.steps) if scheduler else None
    model, optimizer, scheduler = accelerator.prepare(policy, optimizer, scheduler)

    step, history = 0, []
    if start is not None:
        accelerator.load_state(str(start))  # LARA's weights and moments are among the policy's
        step, history = (read_json(start / "progress.json")[key] for key in ("step", "history"))
    loader = accelerator.prepare(make_loader(dataset, settings, step, accelerator.num_processes))
    trained, seconds = step, time.perf_counter()
    bar = progress_bar(settings.steps, "policy", initial=step, disable=not accelerator.is_main_process)
    model.train()
    for batch in loader:
        step += 1
        loss, _ = model(preprocessor(batch))  # LARA: the loss now holds its terms
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
        "action_loss": sum(entry["action_loss"] for entry in last) / len(last),  # over the last logged steps
        "history": history,
    }


def measure(loss: torch.Tensor, lara: LaraAdapter | None) -> dict[str, float]:
    """One step in plain floats: the policy's own loss, and LARA's metrics."""
    if lara is None:
        return {"action_loss": float(loss.detach())}
    return {"action_loss": float(loss.detach() - lara.losses.total.detach()), **lara.metrics()}


def count(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def pretrain_lam(settings: Settings, accelerator: Accelerator, dataset: LaraDataset) -> Path:
    """Stage 1 of the paper in small, on the dataset's own frames; a real one saw much more video than that."""
    folder = settings.output / "lam"
    if accelerator.is_main_process and not folder.is_dir():
        set_seed(settings.seed)
        lam = LatentActionModel(LatentActionConfig.tiny(image_size=LAM_SIZE, vq_warmup_steps=settings.lam_steps // 4))
        lam.to(accelerator.device)
        wanted = dataclasses.replace(settings, steps=settings.lam_steps)
        with progress_bar(settings.lam_steps, "LAM") as bar:
            stream = frames_of(make_loader(dataset, wanted, 0, 1), accelerator.device)
            history = optimise_lam(lam, stream, 5e-4, settings.lam_steps, bar.update)
        lam.save_pretrained(folder)
        write_json(folder / "history.json", history)
    accelerator.wait_for_everyone()
    return folder


def frames_of(loader: DataLoader, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """The two frames alone, under the names that the quickstart's training of a LAM wants."""
    for batch in loader:
        yield {"lara_frames": batch[FRAMES].to(device), "lara_frames_valid": batch[VALID].to(device)}


def make_loader(dataset: Any, settings: Settings, done: int, processes: int) -> DataLoader:
    """Batches from step `done` on; the order of all of them depends on the seed alone, so a resumed run sees the rest."""
    random = torch.Generator().manual_seed(settings.seed)
    rows, count = len(dataset), settings.steps * settings.batch * processes
    order = torch.cat([torch.randperm(rows, generator=random) for _ in range(-(-count // rows))])
    rest = Subset(dataset, order[done * settings.batch * processes : count].tolist())
    # a generator of its own, since a loader draws from it when it starts
    return DataLoader(rest, settings.batch, num_workers=settings.workers, generator=torch.Generator())


def save_checkpoint(settings: Settings, accelerator: Accelerator, step: int, history: list[dict[str, Any]]) -> None:
    """All that the run needs to go on bit by bit; progress.json comes last and makes the checkpoint count."""
    folder = settings.output / "checkpoints" / f"{step:06d}"
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(folder / "progress.json", {"step": step, "history": history})


def last_checkpoint(settings: Settings) -> Path | None:
    """The newest whole checkpoint, or None."""
    whole = sorted(path.parent for path in (settings.output / "checkpoints").glob("*/progress.json"))
    return whole[-1] if whole else None


def evaluate(settings: Settings, device: str) -> dict[str, Any] | None:
    """Load the exported policy as stock LeRobot and let it act; None if the dataset is of another world."""
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
    """Train, act, and write the report."""
    start = last_checkpoint(settings) if settings.resume else None
    report = {"arm": f"LARA, {settings.alignment}" if settings.lara else "without LARA"}
    report["training"] = train(settings, accelerator, start)
    if accelerator.is_main_process:
        report["closed_loop"] = evaluate(settings, accelerator.device.type)
        report["settings"] = {name: str(value) for name, value in dataclasses.asdict(settings).items()}
        write_json(settings.output / "report.json", report)
        print(f"\n{table(report)}\n\n{settings.output}/: policy/ (stock LeRobot), report.json")


def smoke(settings: Settings, accelerator: Accelerator) -> None:
    """The whole path; and a run that was stopped in the middle must end with the same weights."""
    output = settings.output
    shutil.rmtree(output, ignore_errors=True)
    world = World(("handle-press",), seed=settings.seed)
    record(output / "data", settings.repo_id, world, episodes=3, fps=80)
    short = dataclasses.replace(
        settings, root=output / "data", tiny=True, steps=8, save_every=4, lam_steps=12, batch=8, episodes=2,
        max_steps=24, workers=0,  # no processes may be forked once OpenGL runs in this one
    )  # fmt: skip
    run(short, accelerator)
    whole = {name: value.clone() for name, value in weights(output).items()}
    stopped = output / "checkpoints" / "000004"
    train(dataclasses.replace(short, save_every=99), Accelerator(**ACCELERATOR), stopped)
    if any(not torch.equal(whole[name], value) for name, value in weights(output).items()):
        raise SystemExit("the resumed run ended with other weights than the one that was not stopped")
    print("resumed from step 4: the same weights, bit by bit")


def weights(output: Path) -> dict[str, torch.Tensor]:
    """All tensors that the export holds: the policy's and LARA's."""
    from safetensors.torch import load_file

    return {
        f"{path.name}/{key}": t for path in sorted(output.glob("*/*.safetensors")) for key, t in load_file(path).items()
    }


# as lerobot-train: one scheduler step a step whatever the number of processes; a part of CLIP is never used
ACCELERATOR: dict[str, Any] = {
    "step_scheduler_with_optimizer": False,
    "kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)],
}


def main() -> int:
    """Run; returns the exit status."""
    settings = tyro.cli(Settings, description=__doc__)
    quieten()
    transformers.utils.logging.set_verbosity_error()  # a part of CLIP is not needed, and it says so each time
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if settings.root is None and not settings.smoke:
        print(
            "--root: the folder of a dataset is expected (record_metaworld.py makes one), or --smoke", file=sys.stderr
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
    taken = settings.output.exists()
    accelerator.wait_for_everyone()  # each process has looked before one of them writes
    if taken and not settings.smoke and not settings.resume:
        print(f"{settings.output} exists; go on with --resume, or choose another --output", file=sys.stderr)
        return 2
    (smoke if settings.smoke else run)(settings, accelerator)
    return 0


if __name__ == "__main__":
    sys.exit(main())
