"""The ops torch.ops.efe.policy_gradient_loss_forward and _backward, and the autograd Function over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efe_kernels.advantage.policy_gradient_loss import reference
from efe_kernels.common.autograd import first_order, spread
from efe_kernels.common.library import accumulate_dtype, define_op, triton_module

kernels: Any = triton_module("efe_kernels.advantage.policy_gradient_loss.kernels")

SETTINGS = "float clip, float value_coef, float entropy_coef"


def serve(log_prob: Tensor) -> Any:
    """Who serves tensors on a device that Triton knows: the reference where they are float64."""
    return reference if log_prob.dtype == torch.float64 else kernels


def forward_triton(log_prob: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return serve(log_prob).policy_gradient_loss_forward(log_prob, *rest)


def backward_triton(
    grad_total: Tensor | None,
    grad_policy: Tensor | None,
    grad_value: Tensor | None,
    grad_entropy: Tensor | None,
    log_prob: Tensor,
    *rest: Any,
) -> list[Tensor]:
    grads = (grad_total, grad_policy, grad_value, grad_entropy)
    return serve(log_prob).policy_gradient_loss_backward(*grads, log_prob, *rest)


def forward_fake(log_prob: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(log_prob)
    losses = [log_prob.new_empty((), dtype=dtype) for _ in range(4)]
    return *losses, log_prob.new_empty(4, dtype=dtype)


def backward_fake(
    grad_total: Tensor | None,
    grad_policy: Tensor | None,
    grad_value: Tensor | None,
    grad_entropy: Tensor | None,
    log_prob: Tensor,
    *rest: Any,
) -> list[Tensor]:
    return [log_prob.new_empty(log_prob.shape) for need in rest[-1] if need]


policy_gradient_loss_forward = define_op(
    "policy_gradient_loss_forward(Tensor log_prob, Tensor value, Tensor entropy, Tensor advantage, "
    f"Tensor value_target, Tensor? old_log_prob, Tensor? mask, {SETTINGS}) "
    "-> (Tensor total, Tensor policy, Tensor value_loss, Tensor mean_entropy, Tensor diagnostics)",
    reference=reference.policy_gradient_loss_forward,
    fake=forward_fake,
    triton=forward_triton if kernels else None,
)
policy_gradient_loss_backward = define_op(
    "policy_gradient_loss_backward(Tensor? grad_total, Tensor? grad_policy, Tensor? grad_value, Tensor? grad_entropy, "
    "Tensor log_prob, Tensor value, Tensor advantage, Tensor value_target, Tensor? old_log_prob, Tensor? mask, "
    f"Tensor diagnostics, {SETTINGS}, bool[] needs) -> Tensor[]",
    reference=reference.policy_gradient_loss_backward,
    fake=backward_fake,
    triton=backward_triton if kernels else None,
)


class PolicyGradientLossFunction(torch.autograd.Function):
    """Total, policy loss, value loss, entropy: differentiable in log_prob, value and entropy; and the diagnostics."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return policy_gradient_loss_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        log_prob, value, _, advantage, value_target, old_log_prob, mask, *settings = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[4])
        ctx.save_for_backward(log_prob, value, advantage, value_target, old_log_prob, mask, output[4])
        ctx.settings = settings

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        if all(grad is None for grad in grads[:4]):
            needs = [False, False, False]
        gradients: tuple[Tensor, ...] = ()
        if any(needs):
            gradients = first_order(
                "policy_gradient_loss", policy_gradient_loss_backward, *grads[:4], *ctx.saved_tensors, *ctx.settings,
                needs,
            )  # fmt: skip
        return spread(gradients, needs, len(ctx.needs_input_grad))
