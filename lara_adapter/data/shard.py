"""Work that is divided among machines that do not talk to each other: "i/n" names the share of one."""

from __future__ import annotations

import re

from ..errors import LaraArgumentError

__all__ = ["parse_shard"]


def parse_shard(text: str) -> tuple[int, int]:
    """Read the name of a share.

    Args:
        text: "i/n": share number i, counted from 0, of n.

    Returns:
        (i, n), 0 <= i < n.

    Raises:
        LaraArgumentError: it has another form, or i is out of range.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    number, count = map(int, match.groups()) if match else (0, 0)
    if number >= count:
        raise LaraArgumentError(f'shard={text!r}, but "i/n" with 0 <= i < n is expected: the first of 8 is "0/8"')
    return number, count
