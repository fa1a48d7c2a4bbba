"""Checkpoints: a folder of safetensors and JSON each, of which a crash leaves all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from efe_train.config import UserError
from efe_train.files import flush, read_json, written

WEIGHTS, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"
"""The weights of each module, the other tensors, and what is no tensor."""

REMEDY = "put a copy of it back, or delete the folder of that checkpoint, so that the one before serves"


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write nested dictionaries of tensors and of values that JSON has. What is under `modules` becomes WEIGHTS.

    Raises:
        UserError: they cannot be written, as when the disk is full; there is no such folder then, or the one before.
    """
    building = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(building, ignore_errors=True)
    tensors, values = dict(paths(state, Tensor)), dict(paths(state, object))
    weights = {path: tensor for path, tensor in tensors.items() if path.startswith("modules/")}
    others = {path: tensor for path, tensor in tensors.items() if path not in weights}
    try:
        building.mkdir(parents=True)
        for name, part in ((WEIGHTS, weights), (TRAINING, others)):
            save_file({path: tensor.contiguous() for path, tensor in part.items()}, building / name)
            flush(building / name)
        digests = {name: digest(building / name) for name in (WEIGHTS, TRAINING)}
        with written(building / STATE) as file:
            file.write(json.dumps({"digests": digests, "check": check(values), "values": values}).encode())
        flush(building)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{folder} cannot be written ({reason}).") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given, on the CPU.

    Raises:
        UserError: a file of it is missing, damaged or cannot be read.
    """
    digests, flat = read_state(folder)
    for name in (WEIGHTS, TRAINING):
        try:
            if digest(folder / name) != digests[name]:
                raise UserError(f"{folder / name} is damaged: {REMEDY}.")
            flat |= load_file(folder / name)
        except (OSError, KeyError, MemoryError, SafetensorError) as error:
            raise UserError(f"{folder / name} cannot be read ({error}): {REMEDY}.") from None
    return nested(flat)


def read_state(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The digests of a checkpoint's other files, and what is no tensor, each with its path "outer/inner".

    Raises:
        UserError: it is damaged or cannot be read.
    """
    about = read_json(folder / STATE, REMEDY)
    try:
        digests, values = dict(about["digests"]), dict(about["values"])
        sound = about["check"] == check(values)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError(f"{folder / STATE} is damaged: {REMEDY}.")
    return digests, values


def check(values: Mapping[str, Any]) -> str:
    """By which damage is noticed that leaves JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def paths(state: Mapping[str, Any], kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors, or what else there is, of nested dictionaries, each with its path "outer/inner"."""
    for name, value in state.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from paths(value, kind, f"{path}/")
        elif isinstance(value, Tensor) == (kind is Tensor):
            yield path, value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for path, value in flat.items():
        *outer, name = path.split("/")
        inner = state
        for each in outer:
            inner = inner.setdefault(each, {})
        inner[name] = value
    return state


def digest(file: Path) -> str:
    """SHA-256."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
