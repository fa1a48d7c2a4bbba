"""The ops torch.ops.efe.policy_gradient_loss_forward and _backward, and the autograd Function over them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from efe_kernels.common.autograd import apply, first_order, needs_function, spread
from efe_kernels.common.library import accumulate_dtype, define_op, triton_module
from efe_kernels.policy_loss import reference
from efe_kernels.policy_loss.reference import Inputs, Settings

kernels: Any = triton_module("efe_kernels.policy_loss.kernels")

# The fields of reference.Inputs, then those of reference.Settings.
ARGUMENTS = (
    "Tensor log_prob, Tensor value, Tensor advantage, Tensor value_target, Tensor? old_log_prob, Tensor? mask, "
    "float clip, float value_coef, float entropy_coef"
)
NUM_INPUTS = len(Inputs._fields)
GRADS = "Tensor? grad_total, Tensor? grad_policy, Tensor? grad_value, Tensor? grad_entropy"
NUM_LOSSES = 4


def grouped(arguments: tuple[Any, ...]) -> tuple[Inputs, Settings]:
    return Inputs(*arguments[:NUM_INPUTS]), Settings(*arguments[NUM_INPUTS:])


def forward_by(module: Any, entropy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return module.policy_gradient_loss_forward(entropy, *grouped(arguments))


def backward_by(module: Any, *arguments: Any) -> list[Tensor]:
    grads, (needs, diagnostics, *rest) = arguments[:NUM_LOSSES], arguments[NUM_LOSSES:]
    return module.policy_gradient_loss_backward(grads, needs, diagnostics, *grouped(tuple(rest)))


def forward_reference(*arguments: Any) -> tuple[Tensor, ...]:
    return forward_by(reference, *arguments)


def backward_reference(*arguments: Any) -> list[Tensor]:
    return backward_by(reference, *arguments)


def forward_triton(entropy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return forward_by(reference if entropy.dtype == torch.float64 else kernels, entropy, *arguments)


def backward_triton(*arguments: Any) -> list[Tensor]:
    diagnostics = arguments[NUM_LOSSES + 1]
    return backward_by(reference if diagnostics.dtype == torch.float64 else kernels, *arguments)


def forward_fake(entropy: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(entropy)
    losses = [entropy.new_empty((), dtype=dtype) for _ in range(NUM_LOSSES)]
    return *losses, entropy.new_empty(4, dtype=dtype)


def backward_fake(*arguments: Any) -> list[Tensor]:
    needs, _, log_prob, *_ = arguments[NUM_LOSSES:]
    return [log_prob.new_empty(log_prob.shape) for need in needs if need]


policy_gradient_loss_forward = define_op(
    f"policy_gradient_loss_forward(Tensor entropy, {ARGUMENTS}) "
    "-> (Tensor total, Tensor policy, Tensor value_loss, Tensor mean_entropy, Tensor diagnostics)",
    reference=forward_reference,
    fake=forward_fake,
    triton=forward_triton if kernels else None,
)
policy_gradient_loss_backward = define_op(
    f"policy_gradient_loss_backward({GRADS}, bool[] needs, Tensor diagnostics, {ARGUMENTS}) -> Tensor[]",
    reference=backward_reference,
    fake=backward_fake,
    triton=backward_triton if kernels else None,
)


class PolicyGradientLossFunction(torch.autograd.Function):
    """Total, policy loss, value loss, entropy: differentiable in entropy, log_prob and value; and the diagnostics."""

    plain = staticmethod(forward_reference)

    # Not split into forward and setup_context, which costs the call an inspection of its signature.
    @staticmethod
    def forward(ctx: Any, entropy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, ctx.settings = grouped(arguments)
        output: tuple[Tensor, ...] = policy_gradient_loss_forward(entropy, *arguments)
        diagnostics = output[NUM_LOSSES]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(diagnostics)
        ctx.save_for_backward(diagnostics, *inputs)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        if all(grad is None for grad in grads[:NUM_LOSSES]):
            needs = [False, False, False]
        gradients: tuple[Tensor, ...] = ()
        if any(needs):
            gradients = first_order(
                "policy_gradient_loss", policy_gradient_loss_backward, *grads[:NUM_LOSSES], needs, *ctx.saved_tensors,
                *ctx.settings,
            )  # fmt: skip
        return spread(gradients, needs, len(ctx.needs_input_grad))


def policy_gradient_loss(entropy: Tensor, log_prob: Tensor, value: Tensor, *constants: Any) -> tuple[Tensor, ...]:
    """policy_gradient_loss_forward, differentiable in entropy, log_prob and value."""
    wanted = needs_function(entropy, log_prob, value)
    call = partial(apply, PolicyGradientLossFunction) if wanted else policy_gradient_loss_forward
    output: tuple[Tensor, ...] = call(entropy, log_prob, value, *constants)
    return output
