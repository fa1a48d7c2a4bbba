"""Ctrl-C and SIGTERM end a run at the end of a batch, when its state can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """A signal ended the run. Its state is saved."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received


class SignalWatch:
    """While it is entered, the first SIGINT or SIGTERM is only kept, in `received`.

    It gives the handlers back, so that a second signal ends the program at once, as it would have before. What is
    ignored, as under nohup, stays ignored. Outside the main thread Python allows no handlers, and nothing is kept.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # None stands for a handler that is not Python's and could not be given back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.previous[number] = signal.signal(number, self.keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()

    def keep(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.give_back()

    def give_back(self) -> None:
        while self.previous:
            number, handler = self.previous.popitem()
            signal.signal(number, handler)
