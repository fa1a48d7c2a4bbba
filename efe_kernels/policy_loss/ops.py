"""The ops torch.ops.efe.policy_gradient_loss_forward and _backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efe_kernels.common.library import accumulate_dtype
from efe_kernels.common.op import differentiable_op
from efe_kernels.policy_loss import reference


def policy_gradient_loss_fake(_: Tensor | None, log_prob: Tensor, *__: Any) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(log_prob)
    losses = [log_prob.new_empty((), dtype=dtype) for _ in range(5)]
    return *losses, log_prob.new_empty(len(reference.DIAGNOSTICS), dtype=dtype)


policy_gradient_loss = differentiable_op(
    "policy_gradient_loss",
    forward=reference.policy_gradient_loss_forward,
    backward=reference.policy_gradient_loss_backward,
    wrt=("entropy", "log_prob", "value"),
    fake=policy_gradient_loss_fake,
    like={"entropy": "log_prob"},
    triton="efe_kernels.policy_loss.kernels",
)
