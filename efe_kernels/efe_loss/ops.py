"""The ops torch.ops.efe.efe_loss_forward and efe_loss_backward."""

from __future__ import annotations

import torch
from torch import Tensor

from efe_kernels.common.library import accumulate_dtype
from efe_kernels.common.op import differentiable_op
from efe_kernels.efe_loss import reference
from efe_kernels.efe_loss.reference import DIFFERENTIABLE, Inputs, Outputs, Settings, saved_width

MAX_OUTCOMES = 32


def efe_loss_forward(inputs: Inputs, settings: Settings) -> Outputs:
    """The reference, which on the CPU looks at the targets, too."""
    if inputs.target.device.type == "cpu":
        counted = reference.counted_cells(inputs.target, inputs.valid, settings.ignore_index)
        reference.check_target_range(inputs.target, counted, inputs.logits.shape[-1])
    return reference.efe_loss(inputs, settings)


def efe_loss_backward(
    grad_total: Tensor | None,
    grad_terms: Tensor | None,
    inputs: Inputs,
    settings: Settings,
    hard_cell_scale: Tensor,
    saved: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    found = reference.efe_loss_backward(grad_total, grad_terms, inputs, settings, hard_cell_scale)
    return [
        torch.empty_like(tensor).copy_(found[name])
        for name, tensor, need in zip(Inputs._fields, inputs, needs, strict=False)
        if need and tensor is not None
    ]


def efe_loss_fake(inputs: Inputs, settings: Settings) -> Outputs:
    batch = inputs.logits.shape[0]

    def new(*shape: int) -> Tensor:
        return inputs.logits.new_empty(shape, dtype=accumulate_dtype(inputs.logits))

    total = new(batch) if settings.reduction == "none" else new()
    return Outputs(total, new(batch, len(reference.TERMS)), new(batch), new(batch), new(batch, saved_width(inputs)))


def has_kernel(logits: Tensor) -> bool:
    """The Triton kernels hold all outcomes of a cell in registers and compute in float32."""
    return logits.dtype != torch.float64 and logits.shape[-1] <= MAX_OUTCOMES


efe_loss = differentiable_op(
    "efe_loss",
    forward=efe_loss_forward,
    backward=efe_loss_backward,
    wrt=Inputs._fields[:DIFFERENTIABLE],
    memory_format=torch.preserve_format,
    fake=efe_loss_fake,
    triton="efe_kernels.efe_loss.launch",
    triton_takes=lambda *arguments: has_kernel(next(a for a in arguments if isinstance(a, Tensor) and a.dim() == 5)),
    plain=reference.efe_loss,
)
