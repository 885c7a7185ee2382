"""A pre-training run that is stopped in the middle."""

from __future__ import annotations

from unittest import mock

import pytest

from lara_adapter.lam.pretrain import PretrainSettings, pretrain_lam
from lara_adapter.lam.pretrain import run as pretrain

__all__ = ["interrupted"]


def interrupted(settings: PretrainSettings, step: int) -> None:
    """Run until so many steps are done, and stop as by Ctrl-C."""
    real = pretrain._Run._advance

    def advance(self, batches):
        if self.step == step:
            raise KeyboardInterrupt
        return real(self, batches)

    with mock.patch.object(pretrain._Run, "_advance", advance), pytest.raises(KeyboardInterrupt):
        pretrain_lam(settings)
