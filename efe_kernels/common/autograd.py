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


def transformed() -> bool:
    """Whether the call is inside a transform of torch.func, such as vmap, grad or jacrev."""
    depth: int = torch._C._functorch.get_dynamic_layer_stack_depth()  # of this torch.compile knows what it says
    return depth > 0


def apply(function: Any, *arguments: Any) -> Any:
    """The autograd Function of an op on these arguments.

    Inside a transform of torch.func the plain PyTorch of `function.plain` computes the same, because the transforms see
    through that and not through a kernel. torch.compile refuses a tensor that is given twice: there every further time
    it is given as a view of itself.
    """
    if transformed():
        return function.plain(*arguments)
    if torch.compiler.is_compiling():
        given: list[Any] = []
        for argument in arguments:
            twice = isinstance(argument, Tensor) and any(argument is other for other in given)
            given.append(argument.view_as(argument) if twice else argument)
        arguments = tuple(given)
    return function.apply(*arguments)


def needs_function(*tensors: Tensor) -> bool:
    """Whether a call must go through `apply`: for a gradient, for a transform, or to be refused in forward mode.

    An op alone would know nothing of forward mode and give tangents of 0.
    """
    in_forward_mode: bool = forward_ad._current_level >= 0
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return in_forward_mode or wanted or transformed()


def spread(gradients: Sequence[Tensor], needs: list[bool], num_inputs: int) -> tuple[Tensor | None, ...]:
    """What `backward` returns for num_inputs inputs: the gradients where `needs` is true, None elsewhere."""
    found = iter(gradients)
    wanted = tuple(next(found) if need else None for need in needs)
    return wanted + (None,) * (num_inputs - len(needs))
