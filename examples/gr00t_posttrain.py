"""Post-train NVIDIA Isaac GR00T N1.6 on a robot's demonstrations together with a latent action model (LARA).

The flags are those of GR00T's own gr00t/experiment/launch_finetune.py, plus --lara.* and --lora.*:

    accelerate launch --num_processes 1 examples/gr00t_posttrain.py --base-model-path nvidia/GR00T-N1.6-3B \
        --dataset-path DEMONSTRATIONS --embodiment-tag NEW_EMBODIMENT --modality-config-path my_modality.py \
        --lara.lam my-lam --output-dir outputs/posttrained

    python examples/gr00t_posttrain.py --smoke          # the whole path on a tiny model, on a CPU, without downloads

It resumes from the last checkpoint in the output folder. At the end it writes the policy alone to <output-dir>/policy,
for GR00T's server and Gr00tPolicy, which do not need lara_adapter.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
if WORLD_SIZE == 1:
    # transformers' Trainer would spread one process over all visible GPUs by nn.DataParallel, which LARA refuses
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from lara_adapter.integrations.gr00t import INSTALL, LaraSettings, LoraSettings, export_policy, run  # noqa: E402
from lara_adapter.integrations.old_names import current_flags  # noqa: E402
from lara_adapter.integrations.settings import describe_error  # noqa: E402

from lara_adapter import LaraArgumentError, LaraError  # noqa: E402

try:
    from gr00t.configs.finetune_config import FinetuneConfig
except ModuleNotFoundError as missing:
    if missing.name != "gr00t":
        raise
    print(INSTALL, file=sys.stderr)
    sys.exit(2)

# GR00T's video backends in its order of preference, and the module that must import
VIDEO_BACKENDS = {"torchcodec": "torchcodec.decoders", "decord": "decord", "opencv": "cv2"}


@dataclass
class PosttrainConfig(FinetuneConfig):
    """GR00T's fine-tuning flags, and LARA's."""

    lara: LaraSettings = field(default_factory=LaraSettings)
    """Latent action representation alignment."""

    lora: LoraSettings = field(default_factory=LoraSettings)
    """LoRA on the diffusion transformer."""

    video_backend: str = "torchcodec"
    """How GR00T decodes videos: torchcodec, decord, ffmpeg or opencv."""

    use_ddp: bool = False
    """Several GPUs: plain DDP instead of DeepSpeed."""

    deepspeed_stage: int = 2
    """Several GPUs: ZeRO stage, 2 or 3."""

    logging_steps: int = 10
    """Steps between log lines."""

    seed: int = 42
    """Of the data order, the noise and LARA's projector."""

    export: bool = True
    """Write the policy without LARA to <output-dir>/policy at the end."""

    smoke: bool = False
    """Run the whole path on a tiny model and generated demonstrations."""


def gr00t_config(flags: Any) -> Any:
    """Build GR00T's Config from the flags, with the same assignments as its launch_finetune.py."""
    import torch
    from gr00t.configs.base_config import get_default_config
    from gr00t.experiment.launch_finetune import load_modality_config

    if flags.num_gpus not in (1, WORLD_SIZE):
        raise LaraArgumentError(
            f"--num-gpus {flags.num_gpus}, but {WORLD_SIZE} process(es) run: start one for each GPU, with "
            f"accelerate launch --num_processes {flags.num_gpus} or torchrun --nproc_per_node {flags.num_gpus}"
        )
    if not (Path(flags.dataset_path) / "meta" / "info.json").is_file():
        raise LaraArgumentError(f"--dataset-path {flags.dataset_path}: the folder of a LeRobot v2 dataset is expected")
    if flags.base_model_path.startswith(("/", ".", "~")) and not Path(flags.base_model_path).expanduser().is_dir():
        raise LaraArgumentError(
            f"--base-model-path {flags.base_model_path} does not exist; a folder or Hub id is expected"
        )
    if flags.modality_config_path is not None and not Path(flags.modality_config_path).is_file():
        raise LaraArgumentError(f"--modality-config-path {flags.modality_config_path} is not a file")
    if flags.modality_config_path is not None:
        load_modality_config(flags.modality_config_path)
    tag = flags.embodiment_tag.value
    dataset = {"dataset_paths": [flags.dataset_path], "mix_ratio": 1.0, "embodiment_tag": tag}
    config = get_default_config().load_dict({"data": {"download_cache": False, "datasets": [dataset]}})
    config.load_config_path = None

    model, training, data = config.model, config.training, config.data
    for name in ("tune_llm", "tune_visual", "tune_projector", "tune_diffusion_model", "state_dropout_prob",
                 "random_rotation_angle", "color_jitter_params"):  # fmt: skip
        setattr(model, name, getattr(flags, name))
    model.load_bf16, model.reproject_vision, model.eagle_collator = True, False, True
    model.model_name = "nvidia/Eagle-Block2A-2B-v2"
    model.backbone_trainable_params_fp32, model.use_relative_action = True, True

    for name in ("global_batch_size", "dataloader_num_workers", "learning_rate", "gradient_accumulation_steps",
                 "output_dir", "save_steps", "save_total_limit", "use_wandb", "max_steps", "weight_decay",
                 "warmup_ratio", "use_ddp", "deepspeed_stage", "logging_steps"):  # fmt: skip
        setattr(training, name, getattr(flags, name))
    training.start_from_checkpoint, training.optim = flags.base_model_path, "adamw_torch"
    training.num_gpus = WORLD_SIZE
    training.wandb_project = "posttrain-gr00t-n1d6-lara"
    # GR00T always trains in bf16 with tf32, which need a GPU
    training.bf16 = training.tf32 = torch.cuda.is_available()
    training.fp16 = False
    if not torch.cuda.is_available():
        training.use_ddp = True  # GR00T's DeepSpeed settings are for GPUs

    data.shard_size, data.episode_sampling_rate = flags.shard_size, flags.episode_sampling_rate
    data.num_shards_per_epoch, data.video_backend, data.seed = (
        flags.num_shards_per_epoch, flags.video_backend, flags.seed,
    )  # fmt: skip
    return config


def smoke_arguments(folder: Path) -> list[str]:
    """Write a tiny base model, demonstrations and LAM, and return the flags for them; the user's flags override these."""
    import gr00t_tiny

    if WORLD_SIZE > 1 and int(os.environ["RANK"]) > 0:
        while not (folder / "ready").exists():  # written by rank 0
            time.sleep(0.2)
    elif not (folder / "ready").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "demonstrations", ignore_errors=True)  # left by an interrupted run
        gr00t_tiny.write_demonstrations(folder / "demonstrations")
        modality = gr00t_tiny.write_modality_config(folder / "tiny_modality.py")
        gr00t_tiny.import_file(modality)
        gr00t_tiny.write_base_model(folder / "base-model")
        gr00t_tiny.write_lam(folder / "lam")
        (folder / "ready").touch()
    backend = next(name for name in VIDEO_BACKENDS if backend_error(name) is None)
    return [
        "--base-model-path", str(folder / "base-model"), "--dataset-path", str(folder / "demonstrations"),
        "--embodiment-tag", "NEW_EMBODIMENT", "--modality-config-path", str(folder / "tiny_modality.py"),
        "--lara.lam", str(folder / "lam"), "--lara.align-weight", "0.3", "--lara.lam-weight", "1.0",
        "--output-dir", str(folder / "run"), "--max-steps", "20", "--save-steps", "10", "--logging-steps", "2",
        "--global-batch-size", str(4 * WORLD_SIZE), "--dataloader-num-workers", "0", "--learning-rate", "1e-3",
        "--shard-size", "32", "--num-shards-per-epoch", "50", "--video-backend", backend,
    ]  # fmt: skip


def backend_error(name: str) -> str | None:
    """Why a video backend of GR00T cannot be used, or None. An installed torchcodec may lack FFmpeg's libraries."""
    if name == "ffmpeg":
        return None if shutil.which("ffmpeg") else "there is no ffmpeg on the PATH"
    try:
        importlib.import_module(VIDEO_BACKENDS.get(name, "gr00t"))  # other names are GR00T's to refuse
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def act_once(policy_folder: Path, tag: Any) -> dict[str, Any]:
    """Load the exported policy as GR00T's server does, and act once. Returns arrays [1, T, D]."""
    import numpy as np
    from gr00t.policy.gr00t_policy import Gr00tPolicy

    policy = Gr00tPolicy(embodiment_tag=tag, model_path=str(policy_folder), device="cpu")
    modality = policy.get_modality_config()
    observation = {
        "video": {name: np.zeros((1, 1, 64, 64, 3), np.uint8) for name in modality["video"].modality_keys},
        "state": {name: np.zeros((1, 1, 2), np.float32) for name in modality["state"].modality_keys},
        "language": {modality["language"].modality_keys[0]: [["move the square"]]},
    }
    actions, _ = policy.get_action(observation)
    return dict(actions)


def main(arguments: list[str]) -> int:
    """Run; returns the exit status, 2 for errors that the user can fix."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("transformers", "transformers_modules"):  # each processor is logged whole, at every load
        logging.getLogger(name).setLevel(logging.WARNING)
    import torch
    import tyro

    with contextlib.ExitStack() as stack:
        if "--smoke" in arguments:
            import gr00t_tiny

            stack.enter_context(gr00t_tiny.tiny_backbone())
            folder = Path(os.environ.get("LARA_SMOKE_DIR", "outputs/gr00t_smoke"))
            arguments = smoke_arguments(folder) + arguments
        flags = tyro.cli(PosttrainConfig, args=current_flags(arguments), description=__doc__)
        try:
            config = gr00t_config(flags)
            if (problem := backend_error(flags.video_backend)) is not None:
                usable = [name for name in (*VIDEO_BACKENDS, "ffmpeg") if backend_error(name) is None]
                raise LaraArgumentError(
                    f"--video-backend {flags.video_backend} cannot be used ({problem}); usable here: {', '.join(usable)}"
                )
            metrics: dict[str, float] = {}
            if not is_done(flags):
                if WORLD_SIZE > 1 and not torch.cuda.is_available():
                    stack.enter_context(ranks_on_cpus())
                metrics = run(config, flags.lara, flags.lora if flags.lora.rank else None).metrics()
                _leave_ranks()
            if int(os.environ.get("RANK", "0")) == 0:
                report(flags, metrics)
        except LaraError as error:
            print(describe_error(error), file=sys.stderr)
            return 2
    return 0


def is_done(flags: Any) -> bool:
    """Whether the last checkpoint is that of the last step; transformers' Trainer would then train one step more."""
    output = Path(flags.output_dir)
    if not output.is_dir():
        return False
    last = _last_checkpoint(output)
    step = last.name.rpartition("checkpoint-")[2]
    return step.isdigit() and int(step) >= flags.max_steps and (last / "lara").is_dir()


def report(flags: Any, metrics: dict[str, float]) -> None:
    """Export the policy without LARA, and print the results."""
    lines = ["", "Last LARA metrics: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())]
    if not metrics:
        lines = [
            "",
            f"No LARA step was taken: all --max-steps {flags.max_steps} were done already, or both weights are 0",
        ]
    output = Path(flags.output_dir)
    if flags.export:
        target = export_policy(_last_checkpoint(output), output / "policy", base_model=flags.base_model_path)
        lines.append(f"Policy without LARA: {target}")
        if flags.smoke:
            shapes = {name: list(value.shape) for name, value in act_once(target, flags.embodiment_tag).items()}
            lines.append(f"Gr00tPolicy acts on it: {shapes}")
    print("\n".join(lines))


def _last_checkpoint(output: Path) -> Path:
    from transformers.trainer_utils import get_last_checkpoint

    return Path(get_last_checkpoint(str(output)) or output)


@contextlib.contextmanager
def ranks_on_cpus() -> Iterator[None]:
    """Context in which processes on CPUs are the ranks of one training.

    GR00T initialises nccl unless there is a process group already, and without `use_cpu` transformers would let each
    process train alone.
    """
    import torch
    from gr00t.experiment import experiment

    stock = experiment.TrainingArguments
    torch.distributed.init_process_group("gloo")
    experiment.TrainingArguments = functools.partial(stock, use_cpu=True)
    try:
        yield
    finally:
        experiment.TrainingArguments = stock


def _leave_ranks() -> None:
    """End distributed training: one rank does the rest, and must not wait for the others."""
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # otherwise from_pretrained partitions the weights over ranks
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
