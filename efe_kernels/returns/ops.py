"""The ops torch.ops.efe.trace_forward and _backward, which are gae and vtrace, and the autograd Function over them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from efe_kernels.common.autograd import apply, first_order, needs_function, spread
from efe_kernels.common.library import define_op, triton_module
from efe_kernels.returns import reference
from efe_kernels.returns.reference import Settings, Transitions

kernels: Any = triton_module("efe_kernels.returns.kernels")

# The fields of reference.Transitions, then those of reference.Settings.
ARGUMENTS = (
    "Tensor terminated, Tensor? truncated, Tensor? log_ratio, float gamma, float lam, float rho_clip, float c_clip, "
    "float reward_scale"
)
NUM_TRANSITIONS = len(Transitions._fields)


def grouped(arguments: tuple[Any, ...]) -> tuple[Transitions, Settings]:
    return Transitions(*arguments[:NUM_TRANSITIONS]), Settings(*arguments[NUM_TRANSITIONS:])


def forward_plain(value: Tensor, next_value: Tensor, reward: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return reference.trace_forward(value, next_value, reward, *grouped(arguments))


def forward_reference(value: Tensor, next_value: Tensor, reward: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    advantage, target = forward_plain(value, next_value, reward, *arguments)
    return laid_out(advantage, reward), laid_out(target, reward)


def backward_reference(
    grad_advantage: Tensor | None, grad_target: Tensor | None, needs: list[bool], *arguments: Any
) -> list[Tensor]:
    found = reference.trace_backward(grad_advantage, grad_target, needs, *grouped(arguments))
    return [laid_out(gradient, arguments[0]) for gradient in found]


def laid_out(result: Tensor, like: Tensor) -> Tensor:
    """result with the memory layout that torch.empty_like gives to `like`, as the kernels write it."""
    return torch.empty_like(like, dtype=result.dtype).copy_(result)


def forward_triton(value: Tensor, next_value: Tensor, reward: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if reward.dtype == torch.float64:
        return forward_reference(value, next_value, reward, *arguments)
    return kernels.trace_forward(value, next_value, reward, *grouped(arguments))


def backward_triton(
    grad_advantage: Tensor | None, grad_target: Tensor | None, needs: list[bool], *arguments: Any
) -> list[Tensor]:
    if reference.given(grad_advantage, grad_target).dtype == torch.float64:
        return backward_reference(grad_advantage, grad_target, needs, *arguments)
    return kernels.trace_backward(grad_advantage, grad_target, needs, *grouped(arguments))


def forward_fake(value: Tensor, next_value: Tensor, reward: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(reward), torch.empty_like(reward)


def backward_fake(
    grad_advantage: Tensor | None, grad_target: Tensor | None, needs: list[bool], terminated: Tensor, *_: Any
) -> list[Tensor]:
    dtype = reference.given(grad_advantage, grad_target).dtype
    return [torch.empty_like(terminated, dtype=dtype) for need in needs if need]


trace_forward = define_op(
    f"trace_forward(Tensor value, Tensor next_value, Tensor reward, {ARGUMENTS}) "
    "-> (Tensor advantage, Tensor value_target)",
    reference=forward_reference,
    fake=forward_fake,
    triton=forward_triton if kernels else None,
)
trace_backward = define_op(
    f"trace_backward(Tensor? grad_advantage, Tensor? grad_target, bool[] needs, {ARGUMENTS}) -> Tensor[]",
    reference=backward_reference,
    fake=backward_fake,
    triton=backward_triton if kernels else None,
)


class TraceFunction(torch.autograd.Function):
    """value, next_value [N, T] and constants -> advantage, value target [N, T]."""

    plain = staticmethod(forward_plain)

    # Not split into forward and setup_context, which costs the call an inspection of its signature.
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        transitions, ctx.settings = grouped(arguments[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*transitions)
        output: tuple[Tensor, Tensor] = trace_forward(*arguments)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:2])
        if all(grad is None for grad in grads):
            needs = [False, False]
        gradients: tuple[Tensor, ...] = ()
        if any(needs):
            transitions = Transitions(*ctx.saved_tensors)
            name = "gae" if transitions.log_ratio is None else "vtrace"
            gradients = first_order(name, trace_backward, *grads, needs, *transitions, *ctx.settings)
        return spread(gradients, needs, len(ctx.needs_input_grad))


def trace(value: Tensor, next_value: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    """trace_forward, differentiable in value and next_value."""
    call = partial(apply, TraceFunction) if needs_function(value, next_value) else trace_forward
    output: tuple[Tensor, Tensor] = call(value, next_value, *constants)
    return output
