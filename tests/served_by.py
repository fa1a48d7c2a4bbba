"""Ops served by their references in place of what the dispatcher picks for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from efe_kernels.common.library import OPS


@contextmanager
def recorded_calls(op: str, device: str) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of each call of an op, which its reference serves inside."""
    calls: list[tuple[Any, ...]] = []

    def serve(*arguments: Any) -> Any:
        calls.append(arguments)
        return OPS[op].reference(*arguments)

    with torch.library._scoped_library("efe", "IMPL") as library:
        library.impl(op, serve, device.upper(), allow_override=True)
        yield calls


@contextmanager
def references() -> Iterator[None]:
    """All ops are served by their references inside."""
    with torch.library._scoped_library("efe", "IMPL") as library:
        for name, served in OPS.items():
            for key in ("CPU", "CUDA"):
                library.impl(name, served.reference, key, allow_override=True)
        yield


@pytest.fixture(params=["kernel", "reference"])
def served_by(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "kernel":
        yield "kernel"
        return
    with references():
        yield "reference"
