"""Post-train pi0 or pi0.5 with openpi's own PyTorch training loop, together with a latent action model (LARA).

The command line is that of openpi's scripts/train_pytorch.py (a config's name, then flags that change it), plus --lara.*:

    python examples/openpi_posttrain.py pi05_libero --exp-name lara --pytorch-weight-path BASE --lara.lam my-lam
    torchrun --standalone --nproc_per_node 8 examples/openpi_posttrain.py pi05_libero ...      # DDP
    python examples/openpi_posttrain.py pi05_libero --exp-name lara --resume            # resumes with its own LAM
    python examples/openpi_posttrain.py --smoke            # the whole path on a tiny model, on a CPU, without downloads

openpi's loop is a script of its repository. It is found if openpi is installed from a checkout; otherwise pass one with
--openpi PATH or LARA_OPENPI_SRC. Each checkpoint's model.safetensors is stock openpi's, for its policy server and
its trainer; LARA's part is in lara/ beside it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lara_adapter.integrations.old_names import current_flags
from lara_adapter.integrations.openpi import INSTALL, OpenpiLaraSettings, find_training_script, run
from lara_adapter.integrations.settings import describe_error

from lara_adapter import LaraError

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # openpi's PyTorch code only handles trees with it; else it asks for TPUs
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))


@dataclass
class Flags:
    """The flags beside openpi's own command line."""

    lara: OpenpiLaraSettings = field(default_factory=OpenpiLaraSettings)
    """Latent action representation alignment."""

    openpi: str | None = None
    """Checkout of openpi with scripts/train_pytorch.py; default: LARA_OPENPI_SRC, or where openpi is installed."""

    smoke: bool = False
    """Run the whole path on a tiny pi0.5 and generated demonstrations (config `tiny`)."""


def parse(arguments: list[str]) -> tuple[Flags, Any]:
    """Parse LARA's flags, and openpi's TrainConfig from the rest of the command line."""
    import tyro
    from openpi.training import config as configs

    ours = [argument for argument in current_flags(arguments) if argument not in ("-h", "--help")]
    flags, theirs = tyro.cli(Flags, args=ours, return_unknown_args=True)
    if len(ours) < len(arguments):
        with contextlib.suppress(SystemExit):
            tyro.cli(Flags, args=["--help"], description=__doc__)
        theirs = [*theirs, "--help"]
    before, sys.argv = sys.argv, [sys.argv[0], *theirs]
    try:
        return flags, configs.cli()
    finally:
        sys.argv = before


def prepare_smoke(folder: Path, stack: contextlib.ExitStack) -> list[str]:
    """Write a tiny base model, demonstrations and LAM, and return the flags for them; the user's flags override these."""
    import openpi_tiny

    openpi_tiny.use_folder(folder)
    stack.enter_context(openpi_tiny.tiny_models())
    if RANK > 0:
        while not (folder / "ready").exists():  # written by rank 0
            time.sleep(0.2)
    elif not (folder / "ready").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "lerobot", ignore_errors=True)  # left by an interrupted run
        openpi_tiny.write_all(folder)
        (folder / "ready").touch()
    steps = {"num_train_steps": 12, "save_interval": 6, "batch_size": 4 * WORLD_SIZE}
    openpi_tiny.register(openpi_tiny.train_config(folder, **steps))
    return ["tiny", "--lara.lam", str(folder / "lam"), "--lara.align-weight", "0.3", "--lara.lam-weight", "1.0"]


def list_steps(config: Any) -> list[int]:
    """The steps of the run's checkpoints."""
    folder = Path(config.checkpoint_dir)
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []


def act_once(config: Any, checkpoint: Path) -> list[int]:
    """Load a checkpoint as openpi's policy server does, and act once. Returns the shape [T, A] of the actions."""
    import numpy as np
    import torch
    from openpi.policies import libero_policy, policy_config

    policy = policy_config.create_trained_policy(config, checkpoint)
    torch.compiler.set_stance("force_eager")  # openpi compiles its sampling with max-autotune, which takes minutes
    actions = policy.infer(libero_policy.make_libero_example())["actions"]
    return list(np.asarray(actions).shape)


def report(flags: Flags, config: Any, metrics: dict[str, float]) -> None:
    """Print the results."""
    steps = list_steps(config)
    print("\nLast LARA metrics: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    if not steps:
        print(f"No checkpoint: --save-interval {config.save_interval} was never reached")
        return
    checkpoint = config.checkpoint_dir / str(max(steps))
    print(f"Policy without LARA: {checkpoint}/model.safetensors, LARA: {checkpoint}/lara")
    if flags.smoke:
        print(f"openpi's policy acts on it: actions {act_once(config, checkpoint)}")


def main(arguments: list[str]) -> int:
    """Run; returns the exit status, 2 for errors that the user can fix."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with contextlib.ExitStack() as stack:
        try:
            if "--smoke" in arguments:
                find_training_script()  # before demonstrations are written for nothing
                folder = Path(os.environ.get("LARA_SMOKE_DIR", "outputs/openpi_smoke")).resolve()
                smoke = prepare_smoke(folder, stack)
                named = [argument for argument in arguments if argument != "--smoke"]
                anew = [] if "--resume" in named else ["--overwrite"]
                arguments = ["--smoke", *smoke, *anew, *named]
            flags, config = parse(arguments)
            lara = run(config, flags.lara, flags.openpi)
            if RANK == 0:
                report(flags, config, lara.metrics())
        except LaraError as error:
            print(describe_error(error), file=sys.stderr)
            return 2
        except ModuleNotFoundError as error:
            if error.name != "openpi" and not str(error.name).startswith("openpi."):
                raise
            print(INSTALL, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
