"""The ops torch.ops.efe.rl_advantage_forward and _backward, and the autograd Function over them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from efe_kernels.advantage import reference
from efe_kernels.common.autograd import apply, first_order, needs_function
from efe_kernels.common.library import define_op, triton_module

kernels: Any = triton_module("efe_kernels.advantage.kernels")


def is_double(*tensors: Tensor) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def rl_advantage_forward_triton(reward: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    serve = reference if is_double(reward, value) else kernels
    return serve.rl_advantage_forward(reward, value, *rest)


def rl_advantage_backward_triton(grad: Tensor, reward: Tensor, value: Tensor, *rest: Any) -> Tensor:
    serve = reference if is_double(reward, value) else kernels
    return serve.rl_advantage_backward(grad, reward, value, *rest)


def rl_advantage_forward_fake(
    reward: Tensor, value: Tensor, mask: Tensor | None, reward_scale: float, normalize: str | None, group_size: int
) -> tuple[Tensor, Tensor]:
    groups = reward.numel() // group_size if group_size else 0
    dtype = torch.float64 if is_double(reward, value) else torch.float32
    advantage = reward.new_empty(reward.shape, dtype=torch.promote_types(reward.dtype, value.dtype))
    return advantage, reward.new_empty(groups, 3, dtype=dtype)


def rl_advantage_backward_fake(grad: Tensor, reward: Tensor, value: Tensor, *_: Any) -> Tensor:
    return value.new_empty(value.shape)


rl_advantage_forward = define_op(
    "rl_advantage_forward(Tensor reward, Tensor value, Tensor? mask, float reward_scale, str? normalize, "
    "SymInt group_size) -> (Tensor advantage, Tensor statistics)",
    reference=reference.rl_advantage_forward,
    fake=rl_advantage_forward_fake,
    triton=rl_advantage_forward_triton if kernels else None,
)
rl_advantage_backward = define_op(
    "rl_advantage_backward(Tensor grad, Tensor reward, Tensor value, Tensor? mask, Tensor statistics, "
    "float reward_scale, str? normalize, SymInt group_size) -> Tensor",
    reference=reference.rl_advantage_backward,
    fake=rl_advantage_backward_fake,
    triton=rl_advantage_backward_triton if kernels else None,
)


class RLAdvantageFunction(torch.autograd.Function):
    """reward, value -> advantage, differentiable in value, and the statistics of the groups."""

    plain = staticmethod(reference.rl_advantage_forward)

    # Not split into forward and setup_context, which costs the call an inspection of its signature.
    @staticmethod
    def forward(ctx: Any, reward: Tensor, value: Tensor, mask: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
        advantage, statistics = rl_advantage_forward(reward, value, mask, *settings)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(reward, value, mask, statistics)
        ctx.settings = settings
        return advantage, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        grad_value = None
        if grad is not None and ctx.needs_input_grad[1]:
            tensors = (grad, *ctx.saved_tensors)
            (grad_value,) = first_order("rl_advantage", rl_advantage_backward_one, *tensors, *ctx.settings)
        return None, grad_value, None, None, None, None


def rl_advantage_backward_one(*args: Any) -> tuple[Tensor]:
    return (rl_advantage_backward(*args),)


def rl_advantage(reward: Tensor, value: Tensor, *settings: Any) -> Tensor:
    """The advantage of rl_advantage_forward, differentiable in value."""
    call = partial(apply, RLAdvantageFunction) if needs_function(value) else rl_advantage_forward
    advantage: Tensor = call(reward, value, *settings)[0]
    return advantage
