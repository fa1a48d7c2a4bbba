"""The ops torch.ops.efe.{gae,vtrace}_{forward,backward}, and the autograd Functions over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efe_kernels.advantage.trace import reference
from efe_kernels.common.autograd import first_order, spread
from efe_kernels.common.library import define_op, triton_module

kernels: Any = triton_module("efe_kernels.advantage.trace.kernels")

INPUTS = "Tensor reward, Tensor value, Tensor next_value, Tensor terminated, Tensor? truncated"
BOUNDARIES = "Tensor terminated, Tensor? truncated"
UPSTREAM = "Tensor? grad_advantage, Tensor? grad_target"


def serve(*tensors: Tensor | None) -> Any:
    """Who serves tensors on a device that Triton knows: the reference where they are float64."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return reference if double else kernels


def gae_forward_triton(reward: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return serve(reward).gae_forward(reward, *rest)


def vtrace_forward_triton(log_ratio: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return serve(log_ratio).vtrace_forward(log_ratio, *rest)


def gae_backward_triton(grad_advantage: Tensor | None, grad_target: Tensor | None, *rest: Any) -> list[Tensor]:
    return serve(grad_advantage, grad_target).gae_backward(grad_advantage, grad_target, *rest)


def vtrace_backward_triton(grad_advantage: Tensor | None, grad_target: Tensor | None, *rest: Any) -> list[Tensor]:
    return serve(grad_advantage, grad_target).vtrace_backward(grad_advantage, grad_target, *rest)


def gae_forward_fake(reward: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(reward), torch.empty_like(reward)


def vtrace_forward_fake(log_ratio: Tensor, reward: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(reward), torch.empty_like(reward)


def gradients_fake(
    grad_advantage: Tensor | None, grad_target: Tensor | None, terminated: Tensor, needs: list[bool]
) -> list[Tensor]:
    given = grad_advantage if grad_advantage is not None else grad_target
    assert given is not None, "an op's backward is called with at least one gradient"
    return [torch.empty_like(terminated, dtype=given.dtype) for need in needs if need]


def gae_backward_fake(
    grad_advantage: Tensor | None, grad_target: Tensor | None, terminated: Tensor, *rest: Any
) -> list[Tensor]:
    return gradients_fake(grad_advantage, grad_target, terminated, rest[-1])


def vtrace_backward_fake(
    grad_advantage: Tensor | None, grad_target: Tensor | None, log_ratio: Tensor, terminated: Tensor, *rest: Any
) -> list[Tensor]:
    return gradients_fake(grad_advantage, grad_target, terminated, rest[-1])


gae_forward = define_op(
    f"gae_forward({INPUTS}, float gamma, float lam, float reward_scale) -> (Tensor advantage, Tensor value_target)",
    reference=reference.gae_forward,
    fake=gae_forward_fake,
    triton=gae_forward_triton if kernels else None,
)
gae_backward = define_op(
    f"gae_backward({UPSTREAM}, {BOUNDARIES}, float gamma, float lam, bool[] needs) -> Tensor[]",
    reference=reference.gae_backward,
    fake=gae_backward_fake,
    triton=gae_backward_triton if kernels else None,
)
vtrace_forward = define_op(
    f"vtrace_forward(Tensor log_ratio, {INPUTS}, float gamma, float rho_clip, float c_clip, float reward_scale) "
    "-> (Tensor advantage, Tensor value_target)",
    reference=reference.vtrace_forward,
    fake=vtrace_forward_fake,
    triton=vtrace_forward_triton if kernels else None,
)
vtrace_backward = define_op(
    f"vtrace_backward({UPSTREAM}, Tensor log_ratio, {BOUNDARIES}, float gamma, float rho_clip, float c_clip, "
    "bool[] needs) -> Tensor[]",
    reference=reference.vtrace_backward,
    fake=vtrace_backward_fake,
    triton=vtrace_backward_triton if kernels else None,
)


class GAEFunction(torch.autograd.Function):
    """value, next_value [N, T] and constants -> advantage, value target [N, T]."""

    @staticmethod
    def forward(value: Tensor, next_value: Tensor, reward: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return gae_forward(reward, value, next_value, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *_, terminated, truncated, gamma, lam, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(terminated, truncated)
        ctx.settings = (gamma, lam)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return differentiate(ctx, "gae", gae_backward, grads)


class VTraceFunction(torch.autograd.Function):
    """value, next_value [N, T] and constants -> advantage, value target [N, T]."""

    @staticmethod
    def forward(
        value: Tensor, next_value: Tensor, log_ratio: Tensor, reward: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        return vtrace_forward(log_ratio, reward, value, next_value, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, log_ratio, _, terminated, truncated, gamma, rho_clip, c_clip, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(log_ratio, terminated, truncated)
        ctx.settings = (gamma, rho_clip, c_clip)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return differentiate(ctx, "vtrace", vtrace_backward, grads)


def differentiate(ctx: Any, name: str, op: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of value and next_value, which are the first two inputs of both Functions."""
    needs = list(ctx.needs_input_grad[:2])
    if all(grad is None for grad in grads):
        needs = [False, False]
    gradients: tuple[Tensor, ...] = ()
    if any(needs):
        gradients = first_order(name, op, *grads, *ctx.saved_tensors, *ctx.settings, needs)
    return spread(gradients, needs, len(ctx.needs_input_grad))
