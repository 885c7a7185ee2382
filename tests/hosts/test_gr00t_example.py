"""examples/gr00t_posttrain.py on GR00T's own code, as a user starts it: its flags, the smoke run, ranks, resuming, LoRA."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "gr00t",
    reason="GR00T N1.6 is on no registry: set LARA_GR00T_SRC to a checkout, or install it",
    exc_type=ImportError,
)

import tyro
from gr00t.configs.data.embodiment_configs import MODALITY_CONFIGS
from gr00t.configs.finetune_config import FinetuneConfig
from gr00t.experiment import experiment
from lara_adapter.integrations.gr00t import export_policy
from safetensors.torch import load_file

from examples import gr00t_tiny
from lara_adapter import LaraArgumentError

EXAMPLE = Path(__file__).parents[2] / "examples" / "gr00t_posttrain.py"
MINUTES = 180  # seconds that the smoke run may take

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# a value for each of GR00T's flags, none of them its default; --num-gpus is how many processes run
FLAGS = {
    "base_model_path": ["base"], "dataset_path": ["demonstrations"], "embodiment_tag": ["NEW_EMBODIMENT"],
    "modality_config_path": ["MODALITY"], "tune_llm": True, "tune_visual": True, "tune_projector": False,
    "tune_diffusion_model": False, "state_dropout_prob": ["0.3"], "random_rotation_angle": ["7"],
    "color_jitter_params": ["brightness", "0.4", "hue", "0.1"], "global_batch_size": ["12"],
    "dataloader_num_workers": ["3"], "learning_rate": ["3e-4"], "gradient_accumulation_steps": ["2"],
    "output_dir": ["elsewhere"], "save_steps": ["77"], "save_total_limit": ["2"], "num_gpus": ["1"], "use_wandb": True,
    "max_steps": ["123"], "weight_decay": ["0.01"], "warmup_ratio": ["0.1"], "shard_size": ["64"],
    "episode_sampling_rate": ["0.5"], "num_shards_per_epoch": ["99"],
}  # fmt: skip


@pytest.fixture
def example(monkeypatch):
    """The example as a module; what it puts into the environment is taken back."""
    for name in ("CUDA_VISIBLE_DEVICES", "NO_ALBUMENTATIONS_UPDATE"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    import gr00t_posttrain

    return gr00t_posttrain


def command_line(modality: Path) -> list[str]:
    words = []
    for name, value in FLAGS.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", *value]
    return [str(modality) if word == "MODALITY" else word for word in words]


@pytest.mark.parametrize("gpu", [True, False])
def test_the_flags_of_gr00ts_own_script_do_what_they_do_there(example, gpu, tmp_path, monkeypatch):
    """Both scripts with the same command line give `experiment.run` the same configuration."""
    modality = gr00t_tiny.write_modality_config(tmp_path / f"modality_for_flags_{gpu}.py")
    words = command_line(modality)
    assert {field.name for field in dataclasses.fields(FinetuneConfig)} == set(FLAGS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(MODALITY_CONFIGS, "new_embodiment", None)  # put back afterwards
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    given = []
    monkeypatch.setattr(experiment, "run", given.append)
    monkeypatch.setattr(sys, "argv", ["launch_finetune.py", *words])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # runpy: the module is imported already
        runpy.run_module("gr00t.experiment.launch_finetune", run_name="__main__")
    (theirs,) = given
    chosen = tyro.cli(example.PosttrainConfig, args=words)
    ours = example.gr00t_config(chosen)

    different = set()
    for part in ("model", "training", "data"):
        one, other = vars(getattr(theirs, part)), vars(getattr(ours, part))
        assert one.keys() == other.keys()
        different |= {f"{part}.{name}" for name, value in one.items() if other[name] != value}
    # without a GPU neither bf16 nor tf32 nor DeepSpeed's settings of GR00T can be asked for
    assert different == {"training.wandb_project"} | (
        set() if gpu else {"training.bf16", "training.tf32", "training.use_ddp"}
    )
    default = tyro.cli(FinetuneConfig, args=words[:6])
    same = [field for field in FLAGS if getattr(default, field) == getattr(chosen, field)]
    assert same == ["base_model_path", "dataset_path", "embodiment_tag", "num_gpus"]


def test_a_video_backend_counts_only_if_it_imports(example, tmp_path, monkeypatch, capsys):
    """torchcodec is installed, but its import fails because FFmpeg's libraries are missing."""
    package = tmp_path / "torchcodec"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec\\nmore lines')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.setattr(example.shutil, "which", lambda name: None)
    assert example.backend_error("torchcodec") == "RuntimeError: Could not load libtorchcodec"
    assert example.backend_error("opencv") is None
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke/ready").touch()
    words = example.smoke_arguments(tmp_path / "smoke")
    assert words[words.index("--video-backend") + 1] == "opencv"
    modality = gr00t_tiny.write_modality_config(tmp_path / "modality_for_backend.py")
    monkeypatch.setitem(MODALITY_CONFIGS, "new_embodiment", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = [word if word != "MODALITY" else str(modality) for word in command_line(modality)]
    assert example.main(arguments) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert "--video-backend torchcodec cannot be used (RuntimeError: Could not load" in refused
    assert "usable here: opencv" in refused


def test_several_gpus_want_several_processes(example):
    words = ["--base-model-path", "b", "--dataset-path", "d", "--embodiment-tag", "NEW_EMBODIMENT", "--num-gpus", "4"]
    with pytest.raises(LaraArgumentError, match=r"--num-gpus 4, but 1 process.*accelerate launch --num_processes 4"):
        example.gr00t_config(tyro.cli(example.PosttrainConfig, args=words))


# ---------------------------------------------------------------------- the command


def launch(folder: Path, *arguments: str, by: tuple[str, ...] = (), limit: int = 500) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LARA_SMOKE_DIR": str(folder),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.run(
        [sys.executable, *by, str(EXAMPLE), "--smoke", *arguments], capture_output=True, text=True, env=environment,
        check=False, timeout=limit,
    )  # fmt: skip


@pytest.fixture(scope="module")
def smoked(tmp_path_factory):
    """The folder of a smoke run by `accelerate launch`, and what it said."""
    folder = tmp_path_factory.mktemp("smoke") / "smoke"
    by = ("-m", "accelerate.commands.launch", "--num_processes", "1")
    return folder, launch(folder, by=by, limit=MINUTES)


def test_the_smoke_run_under_accelerate_goes_all_the_way(smoked):
    folder, done = smoked
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Gr00tPolicy acts on it: {'velocity': [1, 16, 2]}" in done.stdout
    logged = [line for line in done.stdout.splitlines() if "'lara/align_loss'" in line]
    assert len(logged) == 10
    assert (folder / "run/checkpoint-20/lara/lara_config.json").is_file()
    assert not any(name.startswith("lara.") for name in load_file(folder / "run/policy/model.safetensors"))


def test_the_same_command_goes_on_and_then_has_nothing_left_to_do(smoked):
    folder, first = smoked
    assert first.returncode == 0, first.stderr[-3000:]
    done = launch(folder, "--max-steps", "22", "--no-export")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-20" in done.stderr
    assert (folder / "run/checkpoint-22/lara").is_dir()
    again = launch(folder, "--max-steps", "22")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "No LARA step was taken: all --max-steps 22 were done already" in again.stdout
    assert not list((folder / "run").glob("checkpoint-23"))
    assert "Gr00tPolicy acts on it" in again.stdout


RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_two_ranks_by_torchrun(smoked, tmp_path):
    folder, _ = smoked
    done = launch(folder, "--max-steps", "4", "--output-dir", str(tmp_path / "run"), by=RANKS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Last LARA metrics") == 1
    assert done.stdout.count("Gr00tPolicy acts on it") == 1
    assert {file.name for file in (tmp_path / "run/checkpoint-4").glob("rng_state*")} == {
        "rng_state_0.pth", "rng_state_1.pth",
    }  # fmt: skip


# the example with GR00T's own DeepSpeed settings, which it asks for only where there are GPUs
RANK = """
import os, sys
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]  # where pip puts ninja
os.environ["DS_ACCELERATOR"] = "cpu"
import gr00t_posttrain as example, gr00t_tiny, torch, tyro
from lara_adapter.integrations.gr00t import run
from pathlib import Path
folder, deepspeed, *words = sys.argv[1:]
with gr00t_tiny.tiny_backbone(), example.ranks_on_cpus():
    chosen = tyro.cli(example.PosttrainConfig, args=example.smoke_arguments(Path(folder)) + words)
    config = example.gr00t_config(chosen)
    config.training.use_ddp = not int(deepspeed)
    lara = run(config, chosen.lara)
    named = {name: p.detach() for name, p in lara.policy.named_parameters()}
    torch.save({"step": lara.step, "weights": named}, f"{chosen.output_dir}/rank{os.environ['RANK']}.pt")
"""


def train_on_two_ranks(folder: Path, output: Path, scratch: Path, deepspeed: bool, steps: int) -> list[dict]:
    program = scratch / "rank.py"
    program.write_text(RANK)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLE.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
        # a build that was killed leaves a lock in the user's own folder, and the next one waits for it for ever
        "TORCH_EXTENSIONS_DIR": str(scratch / "extensions"),
    }
    words = ["--max-steps", str(steps), "--save-steps", "2", "--output-dir", str(output)]
    done = subprocess.run(
        [sys.executable, *RANKS, str(program), str(folder), str(int(deepspeed)), *words], capture_output=True, text=True,
        env=environment, check=False, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.skipif(shutil.which("g++") is None, reason="deepspeed compiles an operator for the CPU: needs g++")
def test_deepspeed_as_gr00t_sets_it_trains_like_ddp_resumes_and_exports(smoked, tmp_path):
    """ZeRO-2 by GR00T's zero2_config.json, which reduces gradients in bf16."""
    folder, _ = smoked
    base = load_file(folder / "base-model/model.safetensors")
    plain = train_on_two_ranks(folder, tmp_path / "ddp", tmp_path, False, 2)
    zero = train_on_two_ranks(folder, tmp_path / "zero", tmp_path, True, 2)
    assert (tmp_path / "zero/checkpoint-2/global_step2").is_dir()  # it was DeepSpeed
    assert not (tmp_path / "ddp/checkpoint-2/global_step2").exists()
    for ranks in (plain, zero):
        first, second = (rank["weights"] for rank in ranks)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert [rank["step"] for rank in ranks] == [2, 2]
        moved = [name for name, value in base.items() if not torch.equal(first[name], value)]
        assert len(moved) > 100
    # two steps of Adam at 1e-3: the same but for what bf16 does to small gradients
    apart = {
        name: float((zero[0]["weights"][name] - value).abs().mean()) for name, value in plain[0]["weights"].items()
    }
    assert {name: far for name, far in apart.items() if far >= 2e-4} == {}
    resumed = train_on_two_ranks(folder, tmp_path / "zero", tmp_path, True, 4)
    assert [rank["step"] for rank in resumed] == [4, 4]
    policy = load_file(export_policy(tmp_path / "zero/checkpoint-4", tmp_path / "policy") / "model.safetensors")
    assert policy.keys() == base.keys()
    assert all(torch.equal(value, resumed[0]["weights"][name]) for name, value in policy.items())
    assert not list((tmp_path / "policy").glob("zero_to_*"))


def test_lora_on_the_command_line(smoked, tmp_path):
    folder, _ = smoked
    done = launch(folder, "--max-steps", "2", "--output-dir", str(tmp_path / "run"), "--lora.rank", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/checkpoint-2/adapter_config.json").is_file()
    assert "Gr00tPolicy acts on it" in done.stdout
    merged = load_file(tmp_path / "run/policy/model.safetensors")
    assert merged.keys() == load_file(folder / "base-model/model.safetensors").keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lara.lam", "nowhere/at-all-here"], "nowhere/at-all-here"),
        (["--lara.layer", "9"], "layer=9"),
        (["--lara.views", "top"], "are not loaded"),
    ],
)
def test_mistakes_exit_with_2_and_one_error(smoked, tmp_path, arguments, said):
    folder, _ = smoked
    done = launch(folder, "--output-dir", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2, done.stderr[-3000:]
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
