"""Reading JSON that may be damaged, and writing files that a power cut leaves whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from efe_train.config import UserError

REMEDY = "put a copy of it back, or begin a new run in another folder"
"""For a file that a run cannot go on without."""


def parse_json(data: bytes) -> Any:
    """The value that UTF-8 text holds, with or without a byte order mark.

    Raises:
        ValueError: it is no JSON, or a name stands twice in an object, where one of the two would be lost.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
        return values

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def read_json(file: Path, remedy: str = "") -> Any:
    """The value that a file holds. remedy: what the user can do where it cannot be read.

    Raises:
        UserError: it cannot.
    """
    try:
        return parse_json(file.read_bytes())
    except OSError as error:
        reason = error.strerror
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{file} cannot be read as JSON ({reason}){remedy and ': ' + remedy}.")


def read_lines(file: Path) -> Iterator[Any]:
    """The values of a file of JSON lines, up to the first line that is damaged; none where there is no file."""
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            yield parse_json(line)
        except ValueError:
            return


@contextmanager
def written(file: Path, mode: str = "wb") -> Iterator[IO[bytes]]:
    """A stream into a file, which is on the disk afterwards.

    Raises:
        UserError: the file cannot be written, as when the disk is full.
    """
    try:
        with file.open(mode) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}).") from None


@contextmanager
def replaced(file: Path) -> Iterator[IO[bytes]]:
    """A stream whose content replaces that of a file at once: a crash or a power cut leaves the old or the new one."""
    temporary = file.with_name(f".{file.name}.new")
    try:
        with written(temporary) as stream:
            yield stream
        os.replace(temporary, file)
        flush(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have what was written to a file or a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
