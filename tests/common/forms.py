"""Tensors whose memory is not simply a row of their values: what autograd and the caller may hand to any function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Wrapped(torch.Tensor):
    """A subclass without memory of its own. What is computed with it is computed with the tensor inside."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapped:
        options = {"strides": held.stride(), "dtype": held.dtype, "device": held.device}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **options)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.held, (args, kwargs or {}))
        return function(*args, **kwargs)


def conjugated(tensor: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(tensor), tensor).conj().imag


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape) if tensor.dim() else tensor


def overlapping(tensor: Tensor) -> Tensor:
    return tensor.flatten().as_strided(tensor.shape, (1,) * tensor.dim())


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "lazily negated": torch._neg_view,
    "imaginary part of a conjugate": conjugated,
    "expanded": expanded,
    "overlapping": overlapping,
    "zero without storage": lambda tensor: torch._efficientzerotensor(
        tensor.shape, dtype=tensor.dtype, device=tensor.device
    ),
    "subclass": lambda tensor: Wrapped(tensor.detach()).requires_grad_(tensor.requires_grad),
}


def as_memory(tensor: Tensor) -> Tensor:
    """The same values, one after the other."""
    values = tensor.held if isinstance(tensor, Wrapped) else tensor.detach()
    return torch.empty(values.shape, dtype=values.dtype, device=values.device).copy_(values)
