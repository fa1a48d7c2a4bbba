from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from efe_train.ahead import ahead


def test_the_items_come_in_their_order_and_are_made_in_advance() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for number in range(9):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    with ahead(items(), depth=2) as taken:
        assert next(taken) == 0
        assert third.wait(timeout=10)
        assert list(taken) == list(range(1, 9))


def test_an_error_is_raised_where_its_item_is_due() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no second one")

    with ahead(items()) as taken:
        assert next(taken) == 1
        with pytest.raises(ValueError, match="no second one"):
            next(taken)


def test_what_is_left_early_ends_its_thread() -> None:
    with ahead(iter(range(1000)), depth=2) as taken:
        assert next(taken) == 0
    assert not any(thread.name == "ahead" for thread in threading.enumerate())
