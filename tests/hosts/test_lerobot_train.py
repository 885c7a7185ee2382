"""lerobot-train with LARA, on a real dataset on disk: fresh, resumed, from a base, with LoRA, on the command line."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot", reason="LeRobot is not installed: make test-lerobot")
pytest.importorskip("datasets", reason="LeRobot's datasets are not installed: make test-lerobot")
pytest.importorskip("accelerate", reason="accelerate, which lerobot-train needs, is not installed: make test-lerobot")

from helpers.lerobot_disk import TOP, WRIST, make_dataset
from helpers.lerobot_processors import tiny_processors
from helpers.lerobot_tiny import CAMERA, HORIZON, POLICIES, clip_folder, make_policy
from lara_adapter.integrations import old_names
from lara_adapter.integrations.lerobot import train as launcher
from lara_adapter.integrations.lerobot.checkpoints import DataSettings
from lara_adapter.integrations.lerobot.options import LeRobotSettings, make_parser, parse_options
from lara_adapter.integrations.served import open_served
from lerobot.scripts import lerobot_train
from safetensors.torch import load_file

from lara_adapter import (
    AttachOrderError,
    LaraArgumentError,
    LatentActionConfig,
    LatentActionModel,
    OptimizerCoverageError,
)
from lara_adapter.lam.feature_cache import FeatureCache
from lara_adapter.lam.image_encoder import describe_image_encoder
from lara_adapter.losses import Contrastive
from lara_adapter.schedules import Warmup

MODEL, ADAPTER, LAM = "model.safetensors", "lara/lara_adapter.safetensors", "lara/lam/model.safetensors"
RUN = ["--policy.device=cpu", "--policy.push_to_hub=false", "--batch_size=4", "--log_freq=1", "--num_workers=0",
       "--wandb.enable=false", "--env_eval_freq=0"]  # fmt: skip
LORA = [r"--peft.target_modules=.*blocks\.\d+\.mlp\.[02]", "--peft.r=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Data, a CLIP, a LAM; the folder is the working directory of the command lines."""
    folder = tmp_path_factory.mktemp("train")
    make_dataset(folder / "data")
    make_dataset(folder / "cam", cameras=(CAMERA,))
    make_dataset(folder / "two", "image", cameras=(TOP, WRIST), lengths=(12, 12))
    shutil.copytree(clip_folder(), folder / "clip")
    torch.manual_seed(0)
    small = {"image_size": 32, "queries": 2, "latent_dim": 8, "codebook_size": 16, "fdm_layers": 1}
    LatentActionModel(LatentActionConfig.tiny(**small)).save_pretrained(folder / "lam")
    return folder


def flags(place: Path, *more: str, steps: int = 2, data: str = "data") -> list[str]:
    """A tiny Multi-Task DiT on the dataset."""
    return [
        "--policy.type=multi_task_dit", "--policy.objective=flow_matching", "--policy.n_obs_steps=1",
        "--policy.horizon=4", "--policy.n_action_steps=4", "--policy.drop_n_last_frames=0", "--policy.hidden_dim=32",
        "--policy.num_layers=3", "--policy.num_heads=4", "--policy.timestep_embed_dim=16",
        f"--policy.vision_encoder_name={place}/clip", f"--policy.text_encoder_name={place}/clip",
        "--policy.image_resize_shape=[32,32]", "--policy.image_crop_shape=null",
        "--dataset.repo_id=local/tiny", f"--dataset.root={place}/{data}", f"--steps={steps}", f"--save_freq={steps}",
        *RUN, *more,
    ]  # fmt: skip


LARA = ["--lara.layer", "-2", "--lara.align_weight=0.5", "--lara.lam_weight=0.5"]


@contextlib.contextmanager
def quiet_process(argv: list[str]):
    """LeRobot takes the process for its own: sys.argv, the root logger, its handlers."""
    root, before = logging.getLogger(), sys.argv
    handlers, level, text = list(root.handlers), root.level, io.StringIO()
    sys.argv = ["lerobot-train", *argv]
    try:
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
            yield text
    finally:
        sys.argv = before
        root.handlers[:] = handlers
        root.setLevel(level)


def train(argv: list[str]) -> str:
    """Our command; what it logs."""
    with quiet_process(["not", "ours"]) as text:
        launcher.main(argv)
    return text.getvalue()


def stock(argv: list[str]) -> str:
    with quiet_process(argv) as text:
        lerobot_train.main()
    return text.getvalue()


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last" / "pretrained_model"


def resume(folder: Path) -> list[str]:
    return [f"--config_path={last(folder)}/train_config.json", "--resume=true"]


def same_file(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def moved(one: Path, other: Path, part: str = "") -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and any(not torch.equal(a[key], b[key]) for key in a if part in key)


@pytest.fixture(scope="module", autouse=True)
def noise_by_step():
    """LeRobot's resume is not exact by itself: making the loader's iterator draws from the restored generator.

    A seed of each step's own, in every run here, leaves no other difference than those that would be ours.
    """
    update = lerobot_train.update_policy

    def seeded(tracker, *args, **kwargs):
        torch.manual_seed(1000 + tracker.steps)
        return update(tracker, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lerobot_train, "update_policy", seeded)
        yield


@pytest.fixture(scope="module")
def fresh(place, noise_by_step) -> tuple[Path, str]:
    """Four steps with LARA, a checkpoint after two, and LeRobot's eval_loss on a held-out episode."""
    folder = place / "fresh"
    evaluation = ["--dataset.eval_split=0.3", "--eval_steps=2"]
    run = flags(place, *evaluation, f"--output_dir={folder}", steps=4)
    return folder, train([*run, "--save_freq=2", f"--lara.lam={place}/lam", *LARA])


@pytest.fixture(scope="module")
def plain(place, noise_by_step) -> Path:
    """Two steps of lerobot-train itself."""
    stock(flags(place, f"--output_dir={place}/plain"))
    return place / "plain"


# ---------------------------------------------------------------------- one run


def test_metrics_stand_in_lerobots_own_log_lines(fresh):
    lines = [line for line in fresh[1].splitlines() if "step:" in line]
    assert len(lines) == 4
    for line in lines:
        values = dict(part.rsplit(":", 1) for part in line.split() if part.startswith("lara/"))
        assert {"lara/align_loss", "lara/lam_loss", "lara/cosine", "lara/valid_fraction", "lara/total"} <= values.keys()
        assert 0 < float(values["lara/valid_fraction"]) <= 1
    assert fresh[1].count("eval_loss=") == 2
    assert "LARA on MultiTaskDiTPolicy: layer=2/3" in fresh[1]


def test_lara_trains_and_its_checkpoints_are_stock(fresh, place):
    early, late = (fresh[0] / "checkpoints" / step / "pretrained_model" for step in ("000002", "000004"))
    for folder in (early, late):
        assert not [key for key in load_file(folder / MODEL) if "lara" in key or "lam" in key]
        assert "lara" not in (folder / "config.json").read_text()
        assert not any("lara" in key for key in json.loads((folder / "train_config.json").read_text()))
        assert DataSettings.read(folder / "lara") == DataSettings((TOP,), 4, None)
    assert moved(early / MODEL, late / MODEL)
    assert moved(early / ADAPTER, late / ADAPTER, "projector")
    assert moved(early / LAM, late / LAM, "inverse_dynamics")
    assert moved(place / "lam" / MODEL, late / LAM, "forward_dynamics")


@pytest.mark.slow
def test_the_checkpoint_loads_and_acts_in_stock_lerobot_without_lara_adapter(fresh):
    """In a process in which lara_adapter cannot be imported; strictly, with its processors."""
    program = f"""
import sys; sys.modules["lara_adapter"] = None
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
folder = {str(last(fresh[0]))!r}
config = PreTrainedConfig.from_pretrained(folder)
policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
before, after = make_pre_post_processors(config, pretrained_path=folder)
seen = {{"observation.images.top": torch.rand(3, 32, 32), "observation.state": torch.zeros(4), "task": "push the block"}}
action = after(policy.select_action(before(seen)))
assert action.shape == (1, 3) and torch.isfinite(action).all()
print("acted")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert "acted" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_the_command_line(place):
    """Nothing in process: the command as it is typed, its frames decoded in a spawned worker."""
    command = [sys.executable, "-m", "lara_adapter.integrations.lerobot.train"]
    run = flags(place, "--num_workers=1", f"--output_dir={place}/typed", steps=1)
    done = subprocess.run([*command, *run, f"--lara.lam={place}/lam", *LARA], capture_output=True, text=True, timeout=200,
                          check=False)  # fmt: skip
    assert "lara/cosine:" in done.stderr, done.stderr[-2000:]
    assert (last(place / "typed") / LAM).is_file()


def test_idle_lara_trains_bit_identically_to_lerobot_train(place, plain):
    """Both weights 0: data, noise, initialisation and saved files are LeRobot's own."""
    folder = place / "idle"
    lara = [f"--lara.lam={place}/lam", "--lara.align_weight=0", "--lara.lam_weight=0"]
    text = train([*flags(place, f"--output_dir={folder}"), *lara])
    assert same_file(last(folder) / MODEL, last(plain) / MODEL)
    assert "lara/" not in "".join(line for line in text.splitlines() if "step:" in line)


def test_several_cameras_horizon_and_size(place):
    folder = place / "views"
    lara = ["--lara.views=top,wrist", "--lara.gap=3", "--lara.frame_size=24x16", "--lara.alignment=contrastive"]
    train([*flags(place, f"--output_dir={folder}", data="two", steps=1), f"--lara.lam={place}/lam", *LARA, *lara])
    assert DataSettings.read(last(folder) / "lara") == DataSettings((TOP, WRIST), 3, (24, 16))


def test_a_subset_of_the_episodes(place):
    """--dataset.episodes: pairs of those alone, by the index that counts from the dataset's first frame."""
    folder = place / "subset"
    run = flags(place, f"--output_dir={folder}", "--dataset.episodes=[1,2]", "--batch_size=29", steps=1)
    text = train([*run, f"--lara.lam={place}/lam", *LARA])
    valid = next(part.rsplit(":", 1)[1] for part in text.split() if part.startswith("lara/valid_fraction:"))
    assert float(valid) == pytest.approx((9 - 4 + 20 - 4) / 29, abs=1e-3)  # one batch is all of the 9 + 20 frames


def test_the_feature_cache_changes_no_weight(place, tmp_path, monkeypatch):
    """A LAM with a frozen ViT-MAE; the second run reads what the first one left, the third in the loader's worker."""
    import transformers

    sides = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vit = transformers.ViTMAEModel(transformers.ViTMAEConfig(**sides, image_size=32, patch_size=8))
    vit.save_pretrained(tmp_path / "mae")
    described = describe_image_encoder(str(tmp_path / "mae"))
    LatentActionModel(LatentActionConfig.tiny(image_size=32, **described)).save_pretrained(tmp_path / "lam")
    cache = f"--lara.feature_cache={tmp_path}/cache"
    came, own = [], FeatureCache.count_prefetched
    monkeypatch.setattr(FeatureCache, "count_prefetched", lambda self, count: (came.append(count), own(self, count))[1])
    worker = [cache, "--num_workers=1"]
    for name, more in (("without", []), ("first", [cache]), ("second", [cache]), ("third", worker)):
        assert came == []
        train([*flags(place, f"--output_dir={tmp_path}/{name}"), f"--lara.lam={tmp_path}/lam", *LARA, *more])
    written = list((tmp_path / "cache").rglob("*.features"))
    assert len(written) == 1  # the other runs added none
    assert len(came) == 2
    for other in ("first", "second", "third"):
        for file in (MODEL, ADAPTER, LAM):
            a, b = load_file(last(tmp_path / "without") / file), load_file(last(tmp_path / other) / file)
            assert a.keys() == b.keys()
            for key, value in a.items():  # a frame that is new in a batch of known ones is encoded in a smaller batch
                torch.testing.assert_close(b[key], value, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- going on


def copy_of(run: Path, name: str, step: str) -> Path:
    """The run as it was after a step."""
    folder = shutil.copytree(run, run.parent / name, symlinks=True)
    for other in (folder / "checkpoints").iterdir():
        if other.name != step:
            other.unlink() if other.is_symlink() else shutil.rmtree(other)
    (folder / "checkpoints" / "last").symlink_to(step)
    return folder


def test_a_resumed_run_ends_where_the_whole_one_did(fresh):
    """No --lara flag is given again: policy, projector, LAM and the optimizer's state are those of the checkpoint."""
    folder = copy_of(fresh[0], "resumed", "000002")
    text = train([*resume(folder), f"--output_dir={folder}"])
    assert "step:3" in text
    assert "step:2 " not in text
    for name in (MODEL, ADAPTER, LAM):
        assert same_file(last(folder) / name, last(fresh[0]) / name), name
    state = "../training_state/optimizer_state.safetensors"
    assert same_file(last(folder) / state, last(fresh[0]) / state)


def test_weights_and_data_may_change_on_resume(fresh):
    folder = copy_of(fresh[0], "changed", "000002")
    text = train([*resume(folder), f"--output_dir={folder}", "--steps=3", "--lara.align_weight=0.25", "--lara.gap=2"])
    assert "lara/align_weight:0.250" in text
    assert DataSettings.read(last(folder) / "lara").gap == 2


@pytest.mark.parametrize("flag", ["--lara.lam=lam", "--lara.path=x", "--lara.layer=1", "--lara.train_lam=false"])
def test_what_would_change_the_parameters_is_refused_on_resume(fresh, flag):
    with pytest.raises(LaraArgumentError, match=r"fixed by the checkpoint that is resumed.*--policy.path="):
        train([*resume(fresh[0]), "--steps=5", flag])


def test_resuming_a_run_without_lara_is_refused(plain, place):
    with pytest.raises(AttachOrderError, match=r"saved by a run without LARA.*--policy.path="):
        train([*resume(plain), "--steps=3"])


def test_lerobot_train_does_not_resume_a_run_with_lara_unnoticed(fresh):
    with pytest.raises(ValueError, match="List length mismatch"):
        stock([*resume(fresh[0]), "--steps=5"])


def base_run(place: Path, base: Path, name: str) -> list[str]:
    return [f"--policy.path={base}", "--dataset.repo_id=local/tiny", f"--dataset.root={place}/data", "--steps=2",
            "--save_freq=2", *RUN, f"--output_dir={place}/{name}"]  # fmt: skip


def test_a_new_run_from_a_base_policy(plain, place):
    train([*base_run(place, last(plain), "from-base"), f"--lara.lam={place}/lam", *LARA])
    assert moved(last(plain) / MODEL, last(place / "from-base") / MODEL)
    assert moved(place / "lam" / MODEL, last(place / "from-base") / LAM)


def test_a_new_run_from_a_saved_adapter(fresh, place):
    """Its weights with another optimizer; with learning rate 0 the projector is that of the checkpoint."""
    base = last(fresh[0])
    train([*base_run(place, base, "adapter"), "--policy.optimizer_lr=0", f"--lara.path={base}/lara"])
    saved = last(place / "adapter")
    assert not moved(base / ADAPTER, saved / ADAPTER, "projector")
    assert same_file(base / MODEL, saved / MODEL)
    assert json.loads((saved / "lara/lara_config.json").read_text())["align_weight"] == 0.5


def served_action(folder: Path) -> np.ndarray:
    """What `lara serve` gives for one observation: [1, 4, 3]."""
    seen = {"video": {"top": np.full((1, 1, 32, 32, 3), 90, np.uint8)}, "language": {"task": [["push the block"]]}}
    state = {"state": np.full((1, 1, 4), 3, np.float32)}
    action = open_served(folder).get_action({**seen, "state": state}, {"seed": 0})[0]["action"]
    assert action.shape == (1, 4, 3)
    assert np.isfinite(action).all()
    return action


def test_lora(plain, place):
    """LARA is attached after LeRobot has put LoRA in, so it is not frozen; the checkpoint is peft's own."""
    pytest.importorskip("peft", reason="peft is not installed: make test-lerobot")
    run = base_run(place, last(plain), "lora")
    train([*run, "--save_freq=1", *LORA, f"--lara.lam={place}/lam", *LARA])
    early, late = (place / "lora/checkpoints" / step / "pretrained_model" for step in ("000001", "000002"))
    assert {path.name for path in late.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "lara"}
    assert not (late / MODEL).exists()
    assert not [key for key in load_file(late / "adapter_model.safetensors") if "lara" in key]
    for name, part in (("adapter_model.safetensors", "lora_B"), (ADAPTER, "projector"), (LAM, "inverse_dynamics")):
        assert moved(early / name, late / name, part), name
    assert not np.array_equal(served_action(late), served_action(last(plain)))  # LoRA acts, on the base that it names
    folder = copy_of(place / "lora", "lora-resumed", "000001")
    train([*resume(folder), f"--output_dir={folder}"])
    for name in ("adapter_model.safetensors", ADAPTER, LAM):
        assert same_file(last(folder) / name, late / name), name


# ---------------------------------------------------------------------- every policy, several processes


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_from_its_base(name, place, monkeypatch):
    """--policy.path=BASE with LeRobot's real processors, loading, optimizer and saving; only the sizes are not real."""
    from lerobot.policies import factory

    policy = make_policy(name, **({"tokenizer_max_length": 8} if name == "xvla" else {}))
    base, folder = place / f"base-{name}", place / f"out-{name}"

    class Loaded(type(policy)):
        def __init__(self, config, **kwargs) -> None:
            self.__dict__ = copy.deepcopy(policy).__dict__
            self.__dict__["config"] = config

    monkeypatch.setattr(factory, "get_policy_class", lambda kind: Loaded)
    with tiny_processors():
        policy.save_pretrained(base)
        for pipeline in factory.make_pre_post_processors(policy.config):
            pipeline.save_pretrained(base)
        run = [f"--policy.path={base}", "--dataset.repo_id=local/tiny", f"--dataset.root={place}/cam", "--steps=2",
               "--save_freq=1", *RUN, f"--output_dir={folder}"]  # fmt: skip
        text = train([*run, f"--lara.lam={place}/lam", *LARA])
    assert f"gap={HORIZON}" in text
    assert text.count("lara/cosine:") == 2
    early, late = (folder / "checkpoints" / step / "pretrained_model" for step in ("000001", "000002"))
    for file, part in ((MODEL, ""), (ADAPTER, "projector"), (LAM, "inverse_dynamics")):
        assert moved(early / file, late / file, part), file
    with quiet_process([]) as printed:
        loaded = Loaded.from_pretrained(late, config=copy.deepcopy(policy.config), strict=True).state_dict()
    assert "Could not load" not in printed.getvalue()
    assert all(torch.equal(loaded[key], value) for key, value in load_file(late / MODEL).items())


@pytest.mark.long
def test_two_processes(place):
    """DDP over gloo as torchrun starts it; the contrastive form gathers over the ranks."""
    port = ["--master-port", str(20000 + os.getpid() % 20000)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *port, "-m", launcher.__name__]
    run = [*flags(place, f"--output_dir={place}/two-ranks"), "--save_freq=1", "--lara.alignment=contrastive"]
    done = subprocess.run([*command, *run, f"--lara.lam={place}/lam", *LARA], capture_output=True, text=True, timeout=200,
                          check=False, env={**os.environ, "ACCELERATE_USE_CPU": "true"})  # fmt: skip
    assert "effective batch size: 8" in done.stderr, done.stderr[-2000:]
    assert done.stderr.count("lara/cosine:") == 2
    early, late = (place / "two-ranks/checkpoints" / step / "pretrained_model" for step in ("000001", "000002"))
    for file, part in ((MODEL, ""), (ADAPTER, "projector"), (LAM, "inverse_dynamics")):
        assert moved(early / file, late / file, part), file


# ---------------------------------------------------------------------- refusals


def refused(match: str, argv: list[str], error=LaraArgumentError) -> None:
    with pytest.raises(error, match=match):
        train(argv)


def test_refusals_before_anything_is_loaded(place, monkeypatch, tmp_path):
    lam, out = f"--lara.lam={place}/lam", f"--output_dir={tmp_path}/no"
    run = flags(place, out)
    refused("give either --lara.lam=FOLDER", run)
    refused("give either --lara.lam=FOLDER", [*run, lam, "--lara.path=x"])
    refused("2 colour cameras; choose one of", [*flags(place, out, data="two"), lam])
    refused("longest episode of the dataset has", [*run, lam, "--lara.gap=50"])
    refused("streams its frames .*--dataset.streaming=false", [*run, lam, "--dataset.streaming=true"])
    refused("longest episode of the dataset has 9: no pair", [*run, lam, "--dataset.episodes=[1]", "--lara.gap=10"])
    common = ["--dataset.repo_id=local/tiny", f"--dataset.root={place}/data", *RUN, out, lam]
    refused("act regresses its chunk", ["--policy.type=act", *common])
    refused("diffusion denoises with a convolutional UNet", ["--policy.type=diffusion", *common])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused("under FSDP; use DDP", [*run, lam])
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    refused("no latent action model|is missing", [*run, f"--lara.lam={place}"], ValueError)
    refused("lerobot-train, without LARA", [*run, lam, "--job.target=a10g-small"])
    assert not (tmp_path / "no").exists()


def test_another_version_of_lerobot(place, monkeypatch):
    monkeypatch.delattr(lerobot_train, "make_optimizer_and_scheduler")
    refused("no .'make_optimizer_and_scheduler'. in lerobot.scripts.lerobot_train", flags(place))


def test_an_optimizer_that_leaves_lara_out(place, monkeypatch, tmp_path):
    from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy

    monkeypatch.setattr(MultiTaskDiTPolicy, "get_optim_params", lambda self: self.noise_predictor.parameters())
    run = [*flags(place, f"--output_dir={tmp_path}/no"), f"--lara.lam={place}/lam"]
    refused("get_optim_params.. leaves LARA out", run, OptimizerCoverageError)


def test_lerobot_is_as_it_was_afterwards(fresh):
    names = ("make_train_eval_datasets", "make_optimizer_and_scheduler", "save_checkpoint", "submit_to_hf")
    assert all(getattr(lerobot_train, name).__module__.startswith("lerobot.") for name in names)


def test_flags():
    schedule = '{"schedule": "warmup", "steps": 5, "weight": 0.1}'
    options, rest = parse_options(
        ["--policy.type=x", "--lara.layer", "-3", "--a", "-1", "--lara.views=top, wrist", "--lara.frame_size=24x16", "--b",
         f"--lara.align_weight={schedule}", "--lara.train_lam=False", "--lara.token=0", "--lara.lam_weight=1e-2"]
    )  # fmt: skip
    assert rest == ["--policy.type=x", "--a", "-1", "--b"]
    assert options.values == {
        "layer": -3, "views": ["top", "wrist"], "frame_size": (24, 16), "align_weight": Warmup(0.1, 5), "train_lam": False,
        "token": 0, "lam_weight": 0.01,
    }  # fmt: skip


def test_flags_of_the_previous_release(caplog):
    old_names._warn.cache_clear()
    options, _ = parse_options(["--lara.camera=top", "--lara.horizon", "5", "--lara.size=24", "--policy.horizon=4"])
    assert options.values == {"views": "top", "gap": 5, "frame_size": 24}
    assert "--lara.horizon is now --lara.gap; the old name will be removed in the next release" in caplog.messages


def test_a_temperature_is_for_the_contrastive_alignment():
    options, _ = parse_options(["--lara.alignment=contrastive", "--lara.temperature=0.2", "--lara.layer=-1"])
    assert options.attach_arguments == {"alignment": Contrastive(0.2), "layer": -1}
    with pytest.raises(LaraArgumentError, match=r"--lara\.temperature is for --lara\.alignment"):
        _ = parse_options(["--lara.temperature=0.2"])[0].attach_arguments


def test_every_flag_is_an_argument_of_attach_lara_or_a_setting(capsys):
    make_parser().print_help()
    text = " ".join(capsys.readouterr().out.split())
    names = {setting.name for setting in fields(LeRobotSettings)} - {"lam_lr"}
    assert set(re.findall(r"--lara\.(\w+) VALUE", text)) == names
    assert {"layer", "blocks", "align_weight", "views", "gap", "frame_size", "path", "revision"} < names
    assert "--lara.layer VALUE aligned hidden state: -1 after the last block" in text
    assert "(default: -3)" in text


@pytest.mark.parametrize("wrong", ["--lara.lamb=x", "--lara.gap=ten", "--lara.frame_size=1x2x3", "--lara.align_weight={}",
                                   "--lara.train_lam=maybe", "--lara.lam", "--lara.lam_weight=much"])  # fmt: skip
def test_flags_that_cannot_be_read(wrong, capsys):
    with pytest.raises(SystemExit):
        parse_options([wrong])
    assert "--lara.lam=FOLDER [--lara.*] <the flags of lerobot-train>" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit):
        launcher.main(["--help"])
    text = capsys.readouterr().out
    assert "--lara.views" in text
    assert "--dataset.repo_id" in text
