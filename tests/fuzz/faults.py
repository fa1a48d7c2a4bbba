"""One argument of a call made into something that it must not be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.draw import Draw, Parameter

NO_TENSORS = (0.5, "x", [1.0], True, object)
NO_NUMBERS = ("1", [1.0], True, 1j, torch.tensor(0.5), torch.tensor(0.5, requires_grad=True))
WRONG_DTYPES = {
    "floating": (torch.int64, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn),
    "integer": (torch.float32, torch.bool, torch.complex64, torch.float64),
    "bool": (torch.uint8, torch.int64, torch.float32, torch.complex64),
    "mask": (torch.complex64,),
}


def with_fault(draw: Draw) -> str:
    """Puts one fault into the drawn arguments. Returns what it is."""
    name = draw.choice([name for name, parameter in draw.parameters.items() if parameter.kind != "other"])
    parameter = draw.parameters[name]
    if parameter.kind in WRONG_DTYPES:
        value = draw.arguments[name]
        if value is None:
            draw.arguments[name] = wrong = draw.choice(NO_TENSORS)
            return f"{name} = {wrong!r}"
        others = {
            letter
            for other, found in draw.parameters.items()
            if other != name and draw.arguments.get(other) is not None
            for letter in found.dims
        }
        faults: dict[str, Callable[[], Any]] = {
            "no tensor": lambda: draw.choice(NO_TENSORS),
            "another dtype": lambda: value.detach().to(draw.choice(WRONG_DTYPES[parameter.kind])),
            "two dimensions more": lambda: value.detach()[None, None],
            "on the meta device": lambda: value.detach().to("meta"),
            "sparse": lambda: torch.sparse_coo_tensor(size=value.shape, dtype=value.dtype),
        }
        if not parameter.optional:
            faults["None"] = lambda: None
        if value.dim() > 0 and parameter.dims:
            faults["no dimension"] = lambda: value.detach().new_zeros(())
        shared = [dim for dim, letter in enumerate(parameter.dims) if letter in others]
        if shared:
            faults["a size more"] = lambda: longer(value.detach(), draw.choice(shared))
        told = draw.choice(list(faults))
        draw.arguments[name] = faults[told]()
        return f"{name} {told}"
    draw.arguments[name] = wrong = draw.choice(beyond(parameter))
    return f"{name} = {wrong!r}"


def longer(tensor: Tensor, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = 1
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def beyond(parameter: Parameter) -> list[Any]:
    """Settings that it must not be."""
    if parameter.kind == "flag":
        return ["yes", 2, 0.0, torch.tensor(True), None]
    found: list[Any] = [*NO_NUMBERS, math.nan]
    if parameter.tensor:
        found = [value for value in found if not isinstance(value, Tensor) or value.requires_grad]
    if not parameter.optional:
        found.append(None)
    if parameter.kind == "count":
        found += [1.5, 2.0, 2**64, -(2**64)]
    elif parameter.finite:
        found += [math.inf, 10**400]
    if parameter.low > -(2**63):
        found += [parameter.low - 1, -(2**62), *([parameter.low] if parameter.above else [])]
    if parameter.high < 2**63 - 1:
        found += [parameter.high + 1]
    return found
