"""What the autograd Functions of all families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(op(*args))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"{ctx.name} has no second derivative; call backward without create_graph=True.")


def first_order(name: str, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    """The gradients op(*args). Differentiating them again raises a sentence that names the function `name`."""
    if torch.is_grad_enabled():
        return tuple(_FirstOrder.apply(name, op, *args))
    return tuple(op(*args))


def needs_function(*tensors: Tensor) -> bool:
    """Whether a call must go through its autograd Function: for a gradient, or to be refused in forward mode.

    An op alone would know nothing of forward mode and give tangents of 0.
    """
    in_forward_mode: bool = forward_ad._current_level >= 0
    return in_forward_mode or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def spread(gradients: Sequence[Tensor], needs: list[bool], num_inputs: int) -> tuple[Tensor | None, ...]:
    """What `backward` returns for num_inputs inputs: the gradients where `needs` is true, None elsewhere."""
    found = iter(gradients)
    wanted = tuple(next(found) if need else None for need in needs)
    return wanted + (None,) * (num_inputs - len(needs))
