"""A policy's own messages while LARA runs its forward several times."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.toys import DitPolicy, OwnLam, make_batch

from lara_adapter import attach_lara
from lara_adapter.hostlog import each_message_once

HOST = logging.getLogger("some_host.model")


class Talkative(DitPolicy):
    """Logs and warns in each forward."""

    forwards = 0

    def forward(self, batch):
        type(self).forwards += 1
        HOST.warning("flash attention is %s", "missing")
        HOST.info("noise %s", batch["action"].shape)
        warnings.warn("use_cache is set anew", FutureWarning, stacklevel=2)
        return super().forward(batch)


def talkative_policy():
    HOST.warning("this checkpoint is old")
    return Talkative()


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(Talkative, "forwards", 0)
    monkeypatch.setattr(HOST, "disabled", False)  # another test's logging configuration may have disabled it
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


def test_check_shows_each_once_and_training_shows_them_again(caplog):
    policy = Talkative().train()
    lara = attach_lara(policy, OwnLam(), blocks="transformer_blocks")
    with caplog.at_level(logging.INFO, "some_host"), pytest.warns(FutureWarning) as warned:
        report = lara.check(make_batch(), torch.optim.AdamW(policy.parameters()))
    assert report.proven
    assert Talkative.forwards > 3
    messages = [record.msg for record in caplog.records if record.name == HOST.name]
    assert sorted(messages) == ["flash attention is %s", "noise %s"]
    assert len([one for one in warned if one.category is FutureWarning]) == 1
    caplog.clear()
    policy(make_batch())
    policy(make_batch())
    assert [record.message for record in caplog.records].count("flash attention is missing") == 2


def test_inspect_shows_each_once():
    here = Path(__file__)
    command = [sys.executable, "-m", "lara_adapter.cli", "inspect", f"{here}:talkative_policy", "--batch"]
    done = subprocess.run(
        [*command, f"{here}:make_batch"], capture_output=True, text=True, cwd=here.parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here.parent)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "proven" in done.stdout
    for message in ("this checkpoint is old", "flash attention is missing", "FutureWarning: use_cache is set anew"):
        assert (done.stderr + done.stdout).count(message) == 1, done.stderr


def test_nothing_is_left_behind(caplog):
    show = warnings.showwarning
    with pytest.raises(ZeroDivisionError), each_message_once():
        raise ZeroDivisionError
    assert warnings.showwarning is show
    assert not any(handler.filters for handler in logging.root.handlers)
    assert not logging.lastResort.filters


def test_the_librarys_own_messages_are_not_touched(caplog):
    with each_message_once():
        for _ in range(2):
            logging.getLogger("lara_adapter.check").warning("said twice")
    assert caplog.text.count("said twice") == 2
