"""The torch.library namespace `efe`, and how an op enters it: schema, reference, kernels, fake."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor

from efe_kernels.common.extension import REBUILD, has_triton, schemas_of, warn_of_missing_on_cuda

LIBRARY = torch.library.Library("efe", "DEF")

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton's own switch. With it, the Triton kernels also serve CPU tensors: so they are tested without a GPU."""

HAS_TRITON = has_triton()


@dataclass(frozen=True)
class Served:
    """By whom an op is served, as functions of its arguments: plain PyTorch, and Triton kernels where there are any."""

    reference: Callable[..., Any]
    triton: Callable[..., Any] | None


OPS: dict[str, Served] = {}
"""Every op of the library."""

SCHEMA_TYPES: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "SymInt",
    bool: "bool",
    str: "str",
    str | None: "str?",
    list[float]: "float[]",
    list[bool]: "bool[]",
    list[Tensor]: "Tensor[]",
}


@functools.cache
def triton_module(name: str) -> ModuleType | None:
    """The module of Triton kernels `name`, or None where Triton is not installed.

    To be called where the kernels are about to run: importing Triton takes longer than importing this library.
    """
    return importlib.import_module(name) if HAS_TRITON else None


def is_group(hint: object) -> bool:
    """Whether this is a NamedTuple, whose fields are arguments or results of an op, one each."""
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


@functools.cache
def fields_of(hint: Any) -> dict[str, Any]:
    """Names and types of a group."""
    hints = get_type_hints(hint)
    return {name: hints[name] for name in hint._fields}


@functools.cache
def parameters_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and types of what a function takes, with the fields of a group in its place."""
    hints = get_type_hints(function)
    found: dict[str, Any] = {}
    for name in inspect.signature(function).parameters:
        found |= fields_of(hints[name]) if is_group(hints[name]) else {name: hints[name]}
    return found


def schema_of(name: str, function: Callable[..., Any]) -> str:
    """The op `name` that takes and gives what the function does, as torch.library writes it."""
    arguments = ", ".join(f"{SCHEMA_TYPES[hint]} {field}" for field, hint in parameters_of(function).items())
    result = get_type_hints(function)["return"]
    if is_group(result):
        results = f"({', '.join(f'Tensor {field}' for field in fields_of(result))})"
    elif typing.get_origin(result) is tuple:
        results = f"({', '.join(SCHEMA_TYPES[hint] for hint in typing.get_args(result))})"
    else:
        results = SCHEMA_TYPES[result]
    return f"{name}({arguments}) -> {results}"


def without_names(schema: str) -> str:
    """(Tensor, float) -> Tensor of `name(Tensor x, float y) -> Tensor`."""
    return re.sub(r"([\w?\[\]]+) \w+(?=[,)])", r"\1", schema[schema.index("(") :])


def with_groups(function: Callable[..., Any], reference: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """function, called with the arguments of its op: the fields of its groups, which are those of `reference` or its
    own, come one by one."""
    declared = reference or function
    hints = get_type_hints(declared)
    kinds = [hints[name] for name in inspect.signature(declared).parameters]
    if not any(map(is_group, kinds)):
        return function
    places: list[tuple[Any, int, int]] = []  # the group, or None, and where its fields are
    start = 0
    for kind in kinds:
        stop = start + (len(kind._fields) if is_group(kind) else 1)
        places.append((kind if is_group(kind) else None, start, stop))
        start = stop

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return function(
            *[arguments[start] if group is None else group(*arguments[start:stop]) for group, start, stop in places]
        )

    return call


def in_place_of_kernels(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference, which says so where it serves a CUDA tensor because a piece is missing."""

    @functools.wraps(reference)
    def serve(*arguments: Any) -> Any:
        if any(isinstance(argument, Tensor) and argument.is_cuda for argument in arguments):
            warn_of_missing_on_cuda()
        return reference(*arguments)

    return serve


def in_float32(*arguments: Any) -> bool:
    """Whether the arithmetic is float32, in which all Triton kernels compute."""
    # A list is made in less time than a generator runs.
    return torch.float64 not in [argument.dtype for argument in arguments if isinstance(argument, Tensor)]


def define_op(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None = None,
    triton_takes: Callable[..., bool] = in_float32,
) -> Any:
    """Declare `torch.ops.efe.<name>` and say who serves it; the dispatcher picks by device.

    reference: plain PyTorch; its signature is the op's. Serves every device that has no kernel of its own.
    fake: shapes and dtypes of the results, for torch.compile, from the same arguments.
    triton: the module of the Triton kernels, whose launcher has the op's name. It is imported at the first call, and
        serves CUDA, and the CPU under Triton's interpreter.
    triton_takes: which arguments of the op it serves; the reference serves the others.

    The C++ kernels register themselves for CPU and CUDA when `efe_kernels._C` is imported.
    """
    schema, plain = schema_of(name, reference), with_groups(reference)
    if any(held != without_names(schema) for held in schemas_of(name)):
        raise ImportError(
            f"the C++ extension was built from other sources than these: its op {name} takes other arguments. "
            f"Rebuild it: {REBUILD} in the source folder"
        )
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, in_place_of_kernels(plain), "CompositeExplicitAutograd")
    torch.library.register_fake(f"efe::{name}", with_groups(fake), lib=LIBRARY)
    serve = None
    if triton is not None and HAS_TRITON:

        @functools.cache
        def launcher() -> Callable[..., Any]:
            return with_groups(getattr(triton_module(triton), name), reference)

        def serve(*arguments: Any) -> Any:
            return (launcher() if triton_takes(*arguments) else plain)(*arguments)

        LIBRARY.impl(name, serve, "CUDA")
        if INTERPRET:
            LIBRARY.impl(name, serve, "CPU", allow_override=True)
    OPS[name] = Served(plain, serve)
    return getattr(torch.ops.efe, name)


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 inputs, float32 for every other."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
