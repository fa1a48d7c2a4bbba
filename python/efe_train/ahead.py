"""Work done ahead of time: what a loop needs next is made while it is busy with what it has."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def ahead(items: Iterator[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """The items, of which a thread makes up to `depth` in advance. An error in making one is raised where it is due."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    left = threading.Event()

    def put(item: T | None, error: BaseException | None = None) -> None:
        while not left.is_set():
            try:
                made.put((item, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item)
                if left.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:  # whatever it is, it is raised in the thread that asked for the items
            put(None, error)

    def take() -> Iterator[T]:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    maker = threading.Thread(target=make, name="ahead", daemon=True)
    maker.start()
    try:
        yield take()
    finally:
        left.set()
        maker.join()
