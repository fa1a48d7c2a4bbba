"""The torch.library namespace `efe` and the one way an op enters it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from efe_kernels.common.extension import REBUILD, warn_of_missing_on_cuda

LIBRARY = torch.library.Library("efe", "DEF")

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton's own switch. With it, the Triton kernels also serve CPU tensors: so they are tested without a GPU."""


OPS: dict[str, Callable[..., Any] | None] = {}
"""Every op of the library, and the launcher of its Triton kernels where there is one."""


def triton_module(name: str) -> ModuleType | None:
    """The module of Triton kernels `name`, or None where Triton is not installed (it exists for Linux only)."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(name)


def in_place_of_kernels(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference, which says so where it serves a CUDA tensor because a piece is missing."""

    @functools.wraps(reference)
    def serve(*arguments: Any) -> Any:
        if any(isinstance(argument, torch.Tensor) and argument.is_cuda for argument in arguments):
            warn_of_missing_on_cuda()
        return reference(*arguments)

    return serve


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
) -> Any:
    """Declare `torch.ops.efe.<name>` and say who serves it; the dispatcher picks by device.

    schema: name, arguments and results, as torch.library writes them.
    reference: plain PyTorch; serves every device that has no kernel of its own.
    fake: shapes and dtypes of the results, for torch.compile.
    triton: launcher of the Triton kernels; serves CUDA, and the CPU under Triton's interpreter.

    The C++ kernels register themselves for CPU and CUDA when `efe_kernels._C` is imported.
    """
    name = schema[: schema.index("(")]
    try:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    except RuntimeError as error:
        raise ImportError(
            f"the C++ extension was built from other sources than these: its op {name} takes other arguments. "
            f"Rebuild it: {REBUILD} in the source folder"
        ) from error
    LIBRARY.impl(name, in_place_of_kernels(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"efe::{name}", fake, lib=LIBRARY)
    OPS[name] = triton
    if triton is not None:
        LIBRARY.impl(name, triton, "CUDA")
        if INTERPRET:
            LIBRARY.impl(name, triton, "CPU", allow_override=True)
    return getattr(torch.ops.efe, name)


def accumulate_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 inputs, float32 for every other."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
