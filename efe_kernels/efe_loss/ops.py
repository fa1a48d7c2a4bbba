"""The ops torch.ops.efe.efe_loss_forward and efe_loss_backward, and the autograd Function over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efe_kernels.common.autograd import first_order, spread
from efe_kernels.common.library import accumulate_dtype, define_op, triton_module
from efe_kernels.efe_loss import reference

# The floating-point inputs first: they are what a gradient can be asked for, in this order.
INPUTS = (
    "Tensor logits, Tensor? backward_logits, Tensor? final_logits, Tensor? observation_probs, "
    "Tensor preference_logits, Tensor? prompt, Tensor? projection, Tensor target, Tensor? target_preference, "
    "Tensor? valid, float[] weights, bool hard_cell, float hard_cell_min_ratio, int max_cells, int ignore_index"
)
NUM_DIFFERENTIABLE = 7


def residual_width(logits: Tensor, projection: Tensor | None) -> int:
    """Columns of the residual: the cell count, then what the prompt term needs again (see kernels.py)."""
    steps, outcomes = logits.shape[1], logits.shape[-1]
    return 1 if projection is None else 1 + (steps + 1) * outcomes


def forward_reference(
    logits: Tensor,
    backward_logits: Tensor | None,
    final_logits: Tensor | None,
    observation_probs: Tensor | None,
    preference_logits: Tensor,
    prompt: Tensor | None,
    projection: Tensor | None,
    target: Tensor,
    target_preference: Tensor | None,
    valid: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reference as an op. Its backward computes everything again, so it leaves the residual at zero."""
    if target.device.type == "cpu":
        counted = reference.counted_cells(target, valid, settings[-1])
        reference.check_target_range(target, counted, logits.shape[-1])
    outputs = reference.efe_loss(
        logits, backward_logits, final_logits, observation_probs, target, preference_logits, prompt, projection,
        target_preference, valid, *settings,
    )  # fmt: skip
    residual = outputs[0].new_zeros(logits.shape[0], residual_width(logits, projection))
    return *outputs, residual


def backward_reference(
    grad_total: Tensor | None,
    grad_terms: Tensor | None,
    logits: Tensor,
    backward_logits: Tensor | None,
    final_logits: Tensor | None,
    observation_probs: Tensor | None,
    preference_logits: Tensor,
    prompt: Tensor | None,
    projection: Tensor | None,
    target: Tensor,
    target_preference: Tensor | None,
    valid: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    weights, *_, ignore_index, hard_cell_scale, _residual, needs = rest
    found = reference.efe_loss_backward(
        grad_total, grad_terms, logits, backward_logits, final_logits, observation_probs, target, preference_logits,
        prompt, projection, target_preference, valid, weights, ignore_index, hard_cell_scale,
    )  # fmt: skip
    inputs = {
        "logits": logits, "backward_logits": backward_logits, "final_logits": final_logits,
        "observation_probs": observation_probs, "preference_logits": preference_logits, "prompt": prompt,
        "projection": projection,
    }  # fmt: skip
    return [
        torch.empty_like(tensor).copy_(found[name])
        for (name, tensor), need in zip(inputs.items(), needs, strict=True)
        if need and tensor is not None
    ]


def forward_fake(
    logits: Tensor,
    backward_logits: Tensor | None,
    final_logits: Tensor | None,
    observation_probs: Tensor | None,
    preference_logits: Tensor,
    prompt: Tensor | None,
    projection: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = logits.shape[0]
    dtype = accumulate_dtype(logits)
    terms = logits.new_empty(batch, len(reference.TERMS), dtype=dtype)
    residual = logits.new_empty(batch, residual_width(logits, projection), dtype=dtype)
    per_episode = [logits.new_empty(batch, dtype=dtype) for _ in range(3)]
    return per_episode[0], terms, per_episode[1], per_episode[2], residual


def backward_fake(grad_total: Tensor | None, grad_terms: Tensor | None, *rest: Any) -> list[Tensor]:
    needs = rest[-1]
    return [torch.empty_like(rest[i]) for i in range(NUM_DIFFERENTIABLE) if needs[i]]


kernels = triton_module("efe_kernels.efe_loss.kernels")


def forward_triton(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if logits.dtype == torch.float64 or kernels is None:
        return forward_reference(logits, *rest)
    return kernels.efe_loss_forward(logits, *rest)


def backward_triton(grad_total: Tensor | None, grad_terms: Tensor | None, logits: Tensor, *rest: Any) -> list[Tensor]:
    if logits.dtype == torch.float64 or kernels is None:
        return backward_reference(grad_total, grad_terms, logits, *rest)
    return kernels.efe_loss_backward(grad_total, grad_terms, logits, *rest)


efe_loss_forward = define_op(
    f"efe_loss_forward({INPUTS}) "
    "-> (Tensor total, Tensor terms, Tensor mask_ratio, Tensor hard_cell_scale, Tensor residual)",
    reference=forward_reference,
    fake=forward_fake,
    triton=forward_triton if kernels else None,
)
efe_loss_backward = define_op(
    f"efe_loss_backward(Tensor? grad_total, Tensor? grad_terms, {INPUTS}, Tensor hard_cell_scale, Tensor residual, "
    "bool[] needs) -> Tensor[]",
    reference=backward_reference,
    fake=backward_fake,
    triton=backward_triton if kernels else None,
)


class EFELossFunction(torch.autograd.Function):
    """Total, terms, mask ratio, hard-cell scale, each per episode; differentiable are total and terms."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return efe_loss_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, weights, hard_cell, hard_cell_min_ratio, max_cells, ignore_index = inputs
        *_, mask_ratio, hard_cell_scale, residual = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mask_ratio, hard_cell_scale, residual)
        ctx.save_for_backward(*tensors, hard_cell_scale, residual)
        ctx.settings = (weights, hard_cell, hard_cell_min_ratio, max_cells, ignore_index)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_terms: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *tensors, hard_cell_scale, residual = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
        gradients: tuple[Tensor, ...] = ()
        if grad_total is None and grad_terms is None:
            needs = []
        if any(needs):
            gradients = first_order(
                "efe_loss", efe_loss_backward, grad_total, grad_terms, *tensors, *ctx.settings, hard_cell_scale,
                residual, needs,
            )  # fmt: skip
        return spread(gradients, needs, len(ctx.needs_input_grad))
