"""The ops torch.ops.efe.trace_forward and _backward, which are gae and vtrace, and td_lambda_forward and _backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efe_kernels.common.op import differentiable_op
from efe_kernels.returns import reference
from efe_kernels.returns.reference import Ends, Settings, TDLambdaSettings, Trace, Transitions


def laid_out(result: Tensor, like: Tensor) -> Tensor:
    """result with the memory layout that torch.empty_like gives to `like`, as the kernels write it."""
    return torch.empty_like(like, dtype=result.dtype).copy_(result)


def trace_forward(
    value: Tensor, next_value: Tensor, reward: Tensor, transitions: Transitions, settings: Settings
) -> Trace:
    found = reference.trace_forward(value, next_value, reward, transitions, settings)
    return Trace(*[laid_out(result, reward) for result in found])


def trace_backward(
    grad_advantage: Tensor | None,
    grad_value_target: Tensor | None,
    needs: list[bool],
    transitions: Transitions,
    settings: Settings,
) -> list[Tensor]:
    found = reference.trace_backward(grad_advantage, grad_value_target, needs, transitions, settings)
    return [laid_out(gradient, transitions.terminated) for gradient in found]


def trace_fake(value: Tensor, next_value: Tensor, reward: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(reward), torch.empty_like(reward)


gae = differentiable_op(
    "trace",
    forward=trace_forward,
    backward=trace_backward,
    wrt=("value", "next_value", "reward"),
    like={"value": "terminated", "next_value": "terminated", "reward": "terminated"},
    memory_format=torch.preserve_format,
    fake=trace_fake,
    triton="efe_kernels.returns.kernels",
    plain=reference.trace_forward,
).titled("gae")
vtrace = gae.titled("vtrace")


def td_lambda_forward(next_value: Tensor, reward: Tensor, ends: Ends, settings: TDLambdaSettings) -> Tensor:
    return laid_out(reference.td_lambda_forward(next_value, reward, ends, settings), reward)


def td_lambda_backward(grad_result: Tensor, needs: list[bool], ends: Ends, settings: TDLambdaSettings) -> list[Tensor]:
    found = reference.td_lambda_backward(grad_result, needs, ends, settings)
    return [laid_out(gradient, ends.terminated) for gradient in found]


def td_lambda_fake(next_value: Tensor, reward: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(reward)


td_lambda = differentiable_op(
    "td_lambda",
    forward=td_lambda_forward,
    backward=td_lambda_backward,
    wrt=("next_value", "reward"),
    like={"next_value": "terminated", "reward": "terminated"},
    memory_format=torch.preserve_format,
    fake=td_lambda_fake,
    triton="efe_kernels.returns.td_lambda_kernels",
    plain=reference.td_lambda_forward,
)
