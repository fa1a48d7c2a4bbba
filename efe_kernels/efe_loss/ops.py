"""The ops torch.ops.efe.efe_loss_forward and efe_loss_backward, and the call that takes a grad_scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling as traced
from torch.nn import Parameter

from efe_kernels.common.library import INTERPRET, accumulate_dtype, triton_module
from efe_kernels.common.op import differentiable_op, first_order, spread
from efe_kernels.efe_loss import reference
from efe_kernels.efe_loss.reference import Inputs, Outputs, Settings, saved_width

DIFFERENTIABLE = Inputs._fields[:7]
MAX_OUTCOMES = 32
ORDINARY_KEYS = ("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")


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

    return Outputs(
        new(batch), new(batch, len(reference.TERMS)), new(batch), new(batch), new(batch, saved_width(inputs))
    )


def has_kernel(logits: Tensor) -> bool:
    """The Triton kernels hold all outcomes of a cell in registers and compute in float32."""
    return logits.dtype != torch.float64 and logits.shape[-1] <= MAX_OUTCOMES


efe_loss = differentiable_op(
    "efe_loss",
    forward=efe_loss_forward,
    backward=efe_loss_backward,
    wrt=DIFFERENTIABLE,
    memory_format=torch.preserve_format,
    fake=efe_loss_fake,
    triton="efe_kernels.efe_loss.launch",
    triton_takes=lambda *arguments: has_kernel(next(a for a in arguments if isinstance(a, Tensor) and a.dim() == 5)),
    plain=reference.efe_loss,
)


def key_bits(names: Sequence[str]) -> int:
    keys = torch._C.DispatchKeySet.from_raw_repr(0)
    for name in names:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    bits: int = keys.raw_repr()
    return bits


DENSE = key_bits(ORDINARY_KEYS)


def hold_their_values(*tensors: Tensor | None) -> bool:
    """Whether the memory of each tensor is what it stands for.

    That of a subclass, of a lazily negated tensor, of a zero without storage and of one under vmap is not: only the
    dispatcher knows what to do with them.
    """
    return all(
        type(tensor) in (Tensor, Parameter) and not torch._C._dispatch_keys(tensor).raw_repr() & ~DENSE
        for tensor in tensors
        if tensor is not None
    )


def launch() -> Any:
    """The module of the Triton kernels' launchers, None without Triton."""
    return triton_module("efe_kernels.efe_loss.launch")


def takes_grad_scale(grad_scale: Tensor, inputs: Inputs) -> bool:
    """Whether kernels make use of it.

    They write the gradients in forward and hand out the same memory in backward, beside the dispatcher, which a tracer
    would not see.
    """
    if traced() or not (INTERPRET or inputs.logits.is_cuda) or launch() is None:
        return False
    wanted = any(tensor is not None and tensor.requires_grad for tensor in inputs[: len(DIFFERENTIABLE)])
    possible = has_kernel(inputs.logits) and launch().takes_grad_scale(inputs)
    return wanted and possible and hold_their_values(grad_scale, *inputs)


class FusedFunction(torch.autograd.Function):
    """efe_loss whose forward computes the gradients as well, for the upstream gradient `grad_scale` [] of every total.

    Takes grad_scale, the fields of Inputs and those of Settings.
    """

    @staticmethod
    def forward(ctx: Any, grad_scale: Tensor, *arguments: Any) -> Outputs:
        inputs = Inputs(*arguments[: len(Inputs._fields)])
        ctx.settings = Settings(*arguments[len(Inputs._fields) :])
        needs = list(ctx.needs_input_grad[1 : 1 + len(DIFFERENTIABLE)])
        outputs, ctx.gradients = launch().fused_forward(grad_scale, inputs, ctx.settings, needs)
        *_, mask_ratio, hard_cell_scale, saved = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mask_ratio, hard_cell_scale, saved)
        ctx.save_for_backward(grad_scale, hard_cell_scale, saved, *inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_terms: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grad_scale, hard_cell_scale, saved, *tensors = ctx.saved_tensors
        inputs = Inputs(*tensors)
        if grad_total is None and grad_terms is None:
            return (None,) * len(ctx.needs_input_grad)
        # Handed out once: what the caller holds after this backward must not change in the next one.
        ahead, ctx.gradients = ctx.gradients, None
        needs = list(ctx.needs_input_grad[1 : 1 + len(DIFFERENTIABLE)])
        plain = not torch.is_grad_enabled() and not traced() and hold_their_values(grad_total, *ctx.saved_tensors)
        if ahead is not None and grad_terms is None and plain:
            fused_backward = launch().fused_backward
            found = fused_backward(grad_total, grad_scale, inputs, ctx.settings, hard_cell_scale, saved, ahead)
        else:
            arguments = (grad_total, grad_terms, *inputs, *ctx.settings, hard_cell_scale, saved, needs)
            found = first_order("efe_loss", efe_loss.backward, *arguments)
        constants = len(ctx.needs_input_grad) - 1 - len(needs)
        return None, *spread(found, needs), *(None,) * constants


def efe_loss_with(grad_scale: Tensor | None, inputs: Inputs, settings: Settings) -> Outputs:
    """efe_loss, whose gradients are computed in forward where the upstream gradient `grad_scale` [] is known."""
    if grad_scale is not None and takes_grad_scale(grad_scale, inputs):
        return Outputs(*FusedFunction.apply(grad_scale, *inputs, *settings))
    return Outputs(*efe_loss(*inputs, *settings))
