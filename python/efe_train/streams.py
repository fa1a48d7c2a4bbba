"""Standard output and standard error whose reader may leave before the command ends."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any


class LastingStream:
    """A text stream that writes to nowhere once its reader has gone: a pipe's other end or a terminal.

    A training run is worth more than its display, so `efe-train | head` trains to the end; training.log has it all.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # Below the stream, because what it still holds would fail again when it is closed.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Replaces standard output and standard error, also where the command was started with them closed."""
    with open(os.devnull, "w") as nowhere:
        output: Any = LastingStream(sys.stdout or nowhere)
        errors: Any = LastingStream(sys.stderr or nowhere)
        with redirect_stdout(output), redirect_stderr(errors):
            try:
                yield
            finally:
                output.flush()
                errors.flush()
