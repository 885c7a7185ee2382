"""A thread that works ahead, and leaves nothing behind."""

from __future__ import annotations

import threading

import pytest

from lara_adapter.data.prefetch import prefetch


def running() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_the_items_come_in_order_and_the_thread_ends():
    assert list(prefetch(range(1000), 3)) == list(range(1000))
    assert list(prefetch([], 3)) == []
    assert not running()


def test_it_works_ahead_and_no_further():
    made, go_on = [], threading.Event()

    def items():
        for number in range(50):
            made.append(number)
            if number == 5:
                go_on.set()
            yield number

    ahead = prefetch(items(), 4)
    assert next(ahead) == 0
    assert go_on.wait(10)  # 0 is in use, 1 to 4 wait, and 5 is made
    assert len(made) == 6
    assert list(ahead) == list(range(1, 50))


def test_an_error_is_raised_where_the_items_are_used():
    def items():
        yield 1
        raise OSError("disk gone")

    ahead = prefetch(items(), 8)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    assert not running()


def test_stopping_early_releases_the_source():
    def items():
        yield from range(1000)

    source = items()
    ahead = prefetch(source, 2)
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()
    assert not running()
    assert next(source) > 1  # nothing else is in it: a generator that runs elsewhere would raise
