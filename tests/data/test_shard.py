"""The share of one machine."""

from __future__ import annotations

import pytest

from lara_adapter import LaraArgumentError
from lara_adapter.data.shard import parse_shard


def test_a_share_is_counted_from_zero():
    assert [parse_shard(text) for text in ("0/1", "7/8", " 3/10 ")] == [(0, 1), (7, 8), (3, 10)]


@pytest.mark.parametrize("text", ["", "1", "1/1", "8/8", "-1/4", "0/0", "a/b", "1/2/3", "1.0/2", "²/3", "0 / 2"])
def test_anything_else_is_refused(text):
    with pytest.raises(LaraArgumentError, match=r"shard=.*0 <= i < n"):
        parse_shard(text)
