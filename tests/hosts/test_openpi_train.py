"""openpi's own training script with LARA: run, resume, files, two ranks, the example. Needs the script's repository."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("openpi", reason="openpi is not installed: make test-openpi")
pytest.importorskip("datasets", reason="LeRobot's datasets are not installed: make test-openpi")

import safetensors.torch
from helpers import openpi_disk
from lara_adapter.integrations.openpi import OpenpiLaraSettings, find_training_script, lara_training, run
from lara_adapter.integrations.openpi.script import load_training_script
from openpi.models_pytorch import pi0_pytorch as models
from torch.optim.optimizer import register_optimizer_step_post_hook

from examples import openpi_tiny
from lara_adapter import AttachOrderError, HostNotInstalled, LaraError, LatentActionModel

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "openpi_posttrain.py"
MODEL, ADAPTER, LAM = "model.safetensors", "lara/lara_adapter.safetensors", "lara/lam/model.safetensors"


def _script_is_there() -> bool:
    try:
        find_training_script()
    except HostNotInstalled:
        return False
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not _script_is_there(),
        reason="openpi's training script is in no wheel: set LARA_OPENPI_SRC to a checkout of Physical-Intelligence/openpi",
    ),
]


@pytest.fixture(scope="module")
def folder():
    return openpi_disk.written()


def settings_of(folder, **changes):
    return OpenpiLaraSettings(lam=str(folder / "lam"), align_weight=0.3, lam_weight=1.0, **changes)


def config_of(folder, tmp_path, **changes):
    steps = {"num_train_steps": 4, "save_interval": 2, "batch_size": 2, "log_interval": 1}
    return openpi_tiny.train_config(folder, checkpoint_base_dir=str(tmp_path), **{**steps, **changes})


def train(config, settings):
    with openpi_tiny.tiny_models():
        return run(config, settings)


def files_of(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: safetensors.torch.load_file(checkpoint / name) for name in (MODEL, ADAPTER, LAM)}


def assert_equal_files(one: Path, other: Path) -> None:
    for name, tensors in files_of(one).items():
        found = files_of(other)[name]
        assert found.keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(found[key], value), (name, key)


def test_a_run_its_files_and_its_log(folder, tmp_path, caplog):
    config = config_of(folder, tmp_path)
    stock = models.PI0Pytorch, torch.optim.AdamW
    with caplog.at_level("INFO"):
        lara = train(config, settings_of(folder))
    assert (models.PI0Pytorch, torch.optim.AdamW) == stock
    assert type(lara.policy) is models.PI0Pytorch
    assert lara.step == 4
    logged = [record.message for record in caplog.records if "lara/align_loss=" in record.message]
    assert [message.split()[0] for message in logged] == ["step=0", "step=1", "step=2", "step=3"]
    checkpoint = config.checkpoint_dir / "4"
    # model.safetensors is stock openpi's: strictly, by openpi's own loader, and it is what was trained
    with openpi_tiny.tiny_models():
        plain = config.model.load_pytorch(config, str(checkpoint / MODEL))
    trained = lara.policy.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in plain.state_dict().items())
    base = safetensors.torch.load_file(folder / "base" / MODEL)
    saved = files_of(checkpoint)[MODEL]
    assert saved.keys() == base.keys()
    moved = [key for key, value in base.items() if not torch.equal(saved[key], value)]
    assert len(moved) > 0.9 * len(base) - 10
    before, after = (
        LatentActionModel.from_pretrained(folder / "lam"),
        LatentActionModel.from_pretrained(checkpoint / "lara/lam"),
    )
    assert not all(torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items())
    assert (checkpoint / "assets" / "square" / "norm_stats.json").is_file()
    assert not list(config.checkpoint_dir.glob("tmp_*"))
    # the metadata names no class of ours: openpi reads it back without lara_adapter
    assert b"lara_adapter" not in (checkpoint / "metadata.pt").read_bytes()


def test_weights_of_zero_train_as_stock_openpi_does(folder, tmp_path, caplog):
    config = config_of(folder, tmp_path / "stock", num_train_steps=2)
    script = load_training_script()
    with openpi_tiny.tiny_models():
        script.train_loop(config)
    ours = dataclasses.replace(config, checkpoint_base_dir=str(tmp_path / "ours"))
    idle = OpenpiLaraSettings(lam=str(folder / "lam"), align_weight=0, lam_weight=0)
    with caplog.at_level("INFO"):
        train(ours, idle)
    assert not any("step=-" in record.message for record in caplog.records)
    stock, found = (safetensors.torch.load_file(c.checkpoint_dir / "2" / MODEL) for c in (config, ours))
    assert stock.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in stock.items())


def test_resume_goes_on_with_everything(folder, tmp_path):
    """The loop restarts its data and noise from the seed, so that steps 2 and 3 are made once more with the state that the
    first run had saved: what comes out must not depend on whether the process was stopped in between."""
    results = []
    for name in ("once", "again"):
        config = config_of(folder, tmp_path / name, num_train_steps=2)
        train(config, settings_of(folder, lam_lr=3e-4))
        resumed = dataclasses.replace(config, resume=True, num_train_steps=4)
        again = settings_of(folder, lam_lr=3e-4)
        if name == "again":  # without the flag it goes on with its own LAM
            again = dataclasses.replace(again, lam="")
        with openpi_tiny.tiny_models(), lara_training(resumed, again) as (script, adapter):
            seen = {}
            load = script.load_checkpoint

            def load_and_look(model, optimizer, *args, seen=seen, load=load, adapter=adapter):
                step = load(model, optimizer, *args)
                seen["lara"] = {key: value.clone() for key, value in adapter().state_dict().items()}
                seen["groups"] = [len(group["params"]) for group in optimizer.param_groups]
                seen["moments"] = len(optimizer.state)
                return step

            script.load_checkpoint = load_and_look
            script.train_loop(resumed)
            lara = adapter()
        assert lara.step == 4
        saved = files_of(config.checkpoint_dir / "2")
        for key, value in saved[ADAPTER].items():
            ours = seen["lara"].get(key, seen["lara"].get(f"_{key}"))
            assert torch.equal(ours, value), key
        for key, value in saved[LAM].items():
            assert torch.equal(seen["lara"][f"lam.{key}"], value), key
        assert len(seen["groups"]) == 2
        assert seen["moments"] > 100
        results.append(config.checkpoint_dir / "4")
    assert_equal_files(*results)


def test_the_lam_has_a_rate_of_its_own(folder, tmp_path):
    rates = []
    config = config_of(folder, tmp_path, num_train_steps=3)
    with openpi_tiny.tiny_models(), lara_training(config, settings_of(folder, lam_lr=1e-5)) as (script, adapter):
        handle = register_optimizer_step_post_hook(
            lambda optimizer, args, kwargs: rates.append([group["lr"] for group in optimizer.param_groups])
        )
        script.train_loop(config)
        handle.remove()
    assert len(rates) == 3
    for policy, lam in rates:
        assert lam == pytest.approx(policy * 1e-5 / 1e-3)  # the peak of the tiny config is 1e-3
    assert rates[0][0] != rates[2][0]  # warming up
    assert adapter().step == 3


def test_a_run_without_lara_is_not_resumed(folder, tmp_path):
    config = config_of(folder, tmp_path, num_train_steps=2)
    with openpi_tiny.tiny_models():
        load_training_script().train_loop(config)
    resumed = dataclasses.replace(config, resume=True, num_train_steps=4)
    with pytest.raises(AttachOrderError, match=r"saved by a run without LARA .* --pytorch-weight-path"):
        train(resumed, settings_of(folder))
    # but its weights are a start
    fresh = dataclasses.replace(
        config, exp_name="from-it", num_train_steps=1, pytorch_weight_path=str(config.checkpoint_dir / "2")
    )
    assert train(fresh, settings_of(folder)).step == 1


def test_patched_transformers_are_checked_in_a_run(folder, tmp_path, monkeypatch):
    from transformers.models.siglip import check

    monkeypatch.setattr(check, "check_whether_transformers_replace_is_installed_correctly", lambda: False)
    with pytest.raises(ValueError, match="transformers_replace is not installed correctly"):
        train(config_of(folder, tmp_path), settings_of(folder))


def test_wandb_gets_the_metrics(folder, tmp_path):
    logged = []
    config = config_of(folder, tmp_path, num_train_steps=2, wandb_enabled=True)
    with openpi_tiny.tiny_models(), lara_training(config, settings_of(folder)) as (script, _):

        class Wandb:
            Image, finish = staticmethod(lambda *args: None), staticmethod(lambda: None)

            @staticmethod
            def log(values, step=None):
                logged.append((step, set(values)))

        script.wandb, script.init_wandb = Wandb, lambda *args, **kwargs: None
        script.train_loop(config)
    ours = [(step, names) for step, names in logged if "lara/align_loss" in names]
    assert [step for step, _ in ours] == [step for step, names in logged if "learning_rate" in names] == [0, 1]
    assert all({"lara/lam_loss", "lara/cosine"} <= names for _, names in ours)


# ---------------------------------------------------------------------- the command


def launch(folder: Path, *arguments: str, ranks: int = 1, **environment: str) -> subprocess.CompletedProcess:
    program = [sys.executable]
    if ranks > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "LARA_SMOKE_DIR": str(folder),
           "OMP_NUM_THREADS": "1", **environment}  # fmt: skip
    return subprocess.run(
        [*program, str(EXAMPLE), *arguments], capture_output=True, text=True, env=env, check=False, timeout=580
    )


def test_the_smoke_run_of_the_example_and_its_resume(tmp_path):
    done = launch(tmp_path, "--smoke", "--num-train-steps", "4", "--save-interval", "2", "--batch-size", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "openpi's policy acts on it: actions [10, 7]" in done.stdout
    again = launch(
        tmp_path, "--smoke", "--num-train-steps", "5", "--save-interval", "5", "--batch-size", "2", "--resume",
        "--lara.token", "mean_valid",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Resumed training from step 4" in again.stderr
    assert (tmp_path / "checkpoints" / "tiny" / "run" / "5" / "lara" / "lara_config.json").is_file()


def test_two_ranks(tmp_path):
    done = launch(tmp_path, "--smoke", "--num-train-steps", "2", "--save-interval", "2", "--batch-size", "4", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "world_size=2" in done.stderr
    assert done.stdout.count("Last LARA metrics") == 1


def test_mistakes_on_the_command_line(folder, tmp_path):
    done = launch(tmp_path, "debug_pi05", "--lara.lam", str(folder / "lam"))
    assert done.returncode == 2
    assert "but a LeRobot dataset is expected" in done.stderr
    done = launch(tmp_path, "debug_pi05", LARA_OPENPI_SRC=str(tmp_path))
    assert done.returncode == 2
    assert "is not a checkout of openpi" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_script_of_another_kind_is_refused(tmp_path):
    (tmp_path / "train.py").write_text("def train_loop(config): ...\n")
    with pytest.raises(HostNotInstalled, match="build_datasets"):
        load_training_script(tmp_path / "train.py")
    (tmp_path / "train.py").write_text("import no_such_package_here\n")
    with pytest.raises(HostNotInstalled, match="needs no_such_package_here"):
        load_training_script(tmp_path / "train.py")
    with pytest.raises(LaraError, match="--openpi PATH"):
        _without_checkout()


def _without_checkout() -> None:
    before = os.environ.pop("LARA_OPENPI_SRC", None)
    try:
        find_training_script()
        raise HostNotInstalled("openpi is installed from its checkout here: --openpi PATH is not needed")
    finally:
        if before is not None:
            os.environ["LARA_OPENPI_SRC"] = before
