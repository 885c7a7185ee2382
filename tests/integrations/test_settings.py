"""The settings that every host's command line shows: attach_lara's arguments, and the names of the previous release."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from dataclasses import dataclass, fields

import pytest
from helpers.toys import DitPolicy, OwnLam
from lara_adapter.integrations import old_names
from lara_adapter.integrations.old_names import accept_old_names, current_flags
from lara_adapter.integrations.openpi import FramePlan, OpenpiLaraSettings
from lara_adapter.integrations.settings import LaraSettings, describe_error

from lara_adapter import HostNotInstalled, LaraArgumentError, LatentActionConfig, LatentActionModel, attach_lara

SIGNATURE = inspect.signature(attach_lara).parameters


@pytest.fixture(autouse=True)
def _no_warning_yet():
    old_names._warn.cache_clear()


def test_the_defaults_are_those_of_attach_lara():
    settings = LaraSettings()
    shared = {field.name for field in fields(settings)} & SIGNATURE.keys() - {"lam"}
    assert shared == {
        "layer", "token", "projector", "alignment", "align_weight", "lam_weight", "lam_grad_scale", "reconstruct",
        "train_lam",
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in shared} == {name: SIGNATURE[name].default for name in shared}
    differs = {name for name in shared if getattr(OpenpiLaraSettings(), name) != getattr(settings, name)}
    assert differs == {"layer"}


def test_attach_passes_on_every_setting():
    chosen = {
        "layer": 2, "token": "last", "projector": "linear", "align_weight": 0.5, "lam_weight": 0.25,
        "lam_grad_scale": 0.0, "train_lam": False,
    }  # fmt: skip
    assert LaraSettings(reconstruct=0.5, train_lam=False).attach(DitPolicy(), OwnLam()).config.reconstruct == 0.5
    config = LaraSettings(**chosen, alignment="contrastive", temperature=0.3).attach(DitPolicy(), OwnLam()).config
    assert {name: getattr(config, name) for name in chosen} == chosen
    assert (config.alignment["name"], config.alignment["temperature"]) == ("contrastive", 0.3)
    assert LaraSettings().attach(DitPolicy(), OwnLam(), layer=1, add_to_loss=False).config.layer == 1


def test_what_is_set_on_the_lam(tmp_path):
    lam = LatentActionModel(LatentActionConfig.tiny())
    LaraSettings(lam_checkpointing=True).attach(DitPolicy(), lam)
    parts = [part.checkpointing for part in lam.modules() if hasattr(part, "checkpointing")]
    assert parts
    assert all(parts)
    with pytest.raises(LaraArgumentError, match=r"lam_checkpointing=True, but a OwnLam"):
        LaraSettings(lam_checkpointing=True).attach(DitPolicy(), OwnLam())
    with pytest.raises(LaraArgumentError, match="no frozen image encoder"):
        LaraSettings(feature_cache=str(tmp_path)).attach(DitPolicy(), LatentActionModel(LatentActionConfig.tiny()))


@pytest.mark.parametrize("settings", [LaraSettings, OpenpiLaraSettings])
def test_every_flag_has_help(settings, capsys):
    tyro = pytest.importorskip("tyro")
    with pytest.raises(SystemExit):
        tyro.cli(settings, args=["--help"])
    shown = capsys.readouterr().out
    for field in fields(settings):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert any(f" {field.name}: " in (cls.__doc__ or "") for cls in settings.__mro__), field.name


# ---------------------------------------------------------------------- names of the previous release


@accept_old_names("camera", "horizon", "size")
def function(*, views=None, gap=None, frame_size=None):
    return views, gap, frame_size


def test_old_arguments_are_passed_on_with_one_warning(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert function(camera="top", horizon=3, size=8) == ("top", 3, 8)
            assert LaraSettings(horizon=3) == LaraSettings(gap=3)
            assert OpenpiLaraSettings(horizon=3, after_norm=True) == OpenpiLaraSettings(gap=3, after_norm=True)
            assert FramePlan(cameras="top", horizon=3, size=8) == FramePlan("top", 3, 8)
    assert sorted(caplog.messages) == [
        f"{old} is now {new}; the old name will be removed in the next release"
        for old, new in (("camera", "views"), ("cameras", "views"), ("horizon", "gap"), ("size", "frame_size"))
    ]


def test_an_old_and_a_new_name_together_are_refused():
    with pytest.raises(LaraArgumentError, match="horizon is the old name of gap, and both are given"):
        function(horizon=3, gap=4)
    with pytest.raises(TypeError, match="camera"):
        LaraSettings(camera="top")  # never was an argument


def test_old_flags_are_replaced_with_one_warning(caplog):
    given = ["--lara.horizon", "8", "--lara.camera=top,size=3", "--horizon=2", "--lara.size=24x16", "--lara.horizon=9"]
    assert current_flags(given) == [
        "--lara.gap", "8", "--lara.views=top,size=3", "--horizon=2", "--lara.frame_size=24x16", "--lara.gap=9",
    ]  # fmt: skip
    assert [message.partition(" is now")[0] for message in caplog.messages] == [
        "--lara.horizon", "--lara.camera", "--lara.size",
    ]  # fmt: skip


# ---------------------------------------------------------------------- a host that is missing


@pytest.mark.skipif(importlib.util.find_spec("lerobot") is not None, reason="LeRobot is installed here")
@pytest.mark.parametrize("module", ["", ".dataset", ".train", ".checkpoints"])
def test_importing_what_needs_lerobot_says_how_to_install_it(module):
    with pytest.raises(HostNotInstalled, match=r"lerobot cannot be imported here .*pip install 'lerobot\["):
        importlib.import_module(f"lara_adapter.integrations.lerobot{module}")


def test_an_error_names_the_flags_that_were_typed():
    error = LaraArgumentError("attach_lara: lam_weight=-1.0, but a number >= 0 is expected; --lara.gap=3 is fine")
    typed = "attach_lara: --lara.lam-weight=-1.0, but a number >= 0 is expected; --lara.gap=3 is fine"
    assert describe_error(error) == f"LaraArgumentError: {typed}"

    @dataclass
    class MoreSettings(LaraSettings):
        blocks: str | None = None

    error = LaraArgumentError("blocks=x and lam_weight=y")
    assert describe_error(error).endswith("blocks=x and --lara.lam-weight=y")
    assert describe_error(error, MoreSettings, hyphens=False).endswith("--lara.blocks=x and --lara.lam_weight=y")
