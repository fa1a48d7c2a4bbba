"""The ops torch.ops.efe.efe_loss_forward and efe_loss_backward, and the autograd Function over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling as traced
from torch.nn import Parameter

from efe_kernels.common.autograd import first_order, spread
from efe_kernels.common.library import INTERPRET, accumulate_dtype, define_op, triton_module
from efe_kernels.efe_loss import reference
from efe_kernels.efe_loss.reference import Inputs, Outputs, Settings, residual_width

# The fields of reference.Inputs, then those of reference.Settings.
ARGUMENTS = (
    "Tensor logits, Tensor? backward_logits, Tensor? final_logits, Tensor? observation_probs, "
    "Tensor preference_logits, Tensor? prompt, Tensor? projection, Tensor target, Tensor? target_preference, "
    "Tensor? valid, float[] weights, bool hard_cell, float hard_cell_min_ratio, int max_cells, int ignore_index"
)
NUM_INPUTS = len(Inputs._fields)
NUM_ARGUMENTS = NUM_INPUTS + len(Settings._fields)
NUM_DIFFERENTIABLE = 7
PROJECTION = Inputs._fields.index("projection")
MAX_OUTCOMES = 32
ORDINARY_KEYS = ("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")


def grouped(arguments: tuple[Any, ...]) -> tuple[Inputs, Settings]:
    return Inputs(*arguments[:NUM_INPUTS]), Settings(*arguments[NUM_INPUTS:NUM_ARGUMENTS])


def forward_reference(*arguments: Any) -> Outputs:
    """The reference as an op. Its backward computes everything again, so it leaves the residual at zero."""
    inputs, settings = grouped(arguments)
    if inputs.target.device.type == "cpu":
        counted = reference.counted_cells(inputs.target, inputs.valid, settings.ignore_index)
        reference.check_target_range(inputs.target, counted, inputs.logits.shape[-1])
    outputs = reference.efe_loss(inputs, settings)
    return *outputs, outputs[0].new_zeros(inputs.logits.shape[0], residual_width(inputs))


def backward_reference(grad_total: Tensor | None, grad_terms: Tensor | None, *arguments: Any) -> list[Tensor]:
    inputs, settings = grouped(arguments)
    hard_cell_scale, _residual, needs = arguments[NUM_ARGUMENTS:]
    found = reference.efe_loss_backward(grad_total, grad_terms, inputs, settings, hard_cell_scale)
    return [
        torch.empty_like(tensor).copy_(found[name])
        for name, tensor, need in zip(Inputs._fields, inputs, needs, strict=False)
        if need and tensor is not None
    ]


def forward_fake(*arguments: Any) -> Outputs:
    inputs, _ = grouped(arguments)
    batch = inputs.logits.shape[0]

    def new(*shape: int) -> Tensor:
        return inputs.logits.new_empty(shape, dtype=accumulate_dtype(inputs.logits))

    return new(batch), new(batch, len(reference.TERMS)), new(batch), new(batch), new(batch, residual_width(inputs))


def backward_fake(grad_total: Tensor | None, grad_terms: Tensor | None, *arguments: Any) -> list[Tensor]:
    needs = arguments[-1]
    return [torch.empty_like(arguments[i]) for i in range(NUM_DIFFERENTIABLE) if needs[i]]


launch: Any = triton_module("efe_kernels.efe_loss.launch")


def has_kernel(logits: Tensor) -> bool:
    """The Triton kernels hold all outcomes of a cell in registers and compute in float32."""
    return logits.dtype != torch.float64 and logits.shape[-1] <= MAX_OUTCOMES


def forward_triton(*arguments: Any) -> Outputs:
    inputs, settings = grouped(arguments)
    if not has_kernel(inputs.logits):
        return forward_reference(*arguments)
    return launch.efe_loss_forward(inputs, settings)


def backward_triton(grad_total: Tensor | None, grad_terms: Tensor | None, *arguments: Any) -> list[Tensor]:
    inputs, settings = grouped(arguments)
    if not has_kernel(inputs.logits):
        return backward_reference(grad_total, grad_terms, *arguments)
    *saved, needs = arguments[NUM_ARGUMENTS:]
    grad_terms = None if grad_terms is None else grad_terms.contiguous()
    return launch.efe_loss_backward(inputs, settings, launch.Upstream(grad_total, grad_terms, *saved), needs)


efe_loss_forward = define_op(
    f"efe_loss_forward({ARGUMENTS}) "
    "-> (Tensor total, Tensor terms, Tensor mask_ratio, Tensor hard_cell_scale, Tensor residual)",
    reference=forward_reference,
    fake=forward_fake,
    triton=forward_triton if launch else None,
)
efe_loss_backward = define_op(
    f"efe_loss_backward(Tensor? grad_total, Tensor? grad_terms, {ARGUMENTS}, Tensor hard_cell_scale, Tensor residual, "
    "bool[] needs) -> Tensor[]",
    reference=backward_reference,
    fake=backward_fake,
    triton=backward_triton if launch else None,
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


def keeps_promise(promise: Tensor | None, inputs: Inputs, needs: list[bool]) -> bool:
    """Whether kernels make use of a promised upstream gradient.

    They write the gradients in forward and hand out the same memory in backward, beside the dispatcher, which a tracer
    would not see.
    """
    logits = inputs.logits
    if promise is None or launch is None or traced() or not any(needs) or not (INTERPRET or logits.is_cuda):
        return False
    return hold_their_values(promise, *inputs) and has_kernel(logits) and launch.takes_promise(inputs)


def read_by_kernels(inputs: Inputs) -> Inputs:
    """Without a prompt there is nothing to project."""
    return inputs if inputs.prompt is not None else inputs._replace(projection=None)


class EFELossFunction(torch.autograd.Function):
    """Total, terms, mask ratio, hard-cell scale, each per episode; differentiable are total and terms.

    Takes the fields of Inputs and of Settings, and as the last argument a promise: None, or the upstream gradient [] of
    every episode's total. A projection that is not read has a gradient of 0 and not none, because whoever trains on
    several devices waits for that of every parameter.
    """

    @staticmethod
    def plain(*arguments: Any) -> Outputs:
        inputs, settings = grouped(arguments)
        outputs = reference.efe_loss(read_by_kernels(inputs), settings)
        return *outputs, torch.zeros_like(outputs[0])

    # Not split into forward and setup_context, which costs the call an inspection of its signature.
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Outputs:
        tensors, ctx.settings = grouped(arguments)
        promise = arguments[NUM_ARGUMENTS]
        needs = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
        inputs = read_by_kernels(tensors)
        if keeps_promise(promise, inputs, needs):
            output, ctx.gradients = launch.efe_loss_promised_forward(promise, inputs, ctx.settings, needs)
        else:
            output, ctx.gradients, promise = efe_loss_forward(*inputs, *ctx.settings), None, None
        *_, mask_ratio, hard_cell_scale, residual = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mask_ratio, hard_cell_scale, residual)
        ctx.save_for_backward(*tensors, hard_cell_scale, residual, promise)
        return output

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_terms: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *tensors, hard_cell_scale, residual, promise = ctx.saved_tensors
        inputs = read_by_kernels(Inputs(*tensors))
        needs = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
        not_read = needs[PROJECTION] and inputs.projection is None
        needs[PROJECTION] = needs[PROJECTION] and not not_read
        gradients: Sequence[Tensor] = ()
        if grad_total is None and grad_terms is None:
            needs, not_read = [], False
        if any(needs):
            ahead = None
            if ctx.gradients is not None:
                # Handed out once: what the caller holds after this backward must not change in the next one.
                ahead, ctx.gradients = ctx.gradients, None
            first_order_only = not torch.is_grad_enabled() and not traced()
            read = (grad_total, hard_cell_scale, residual, promise, *inputs)
            if ahead is not None and grad_terms is None and first_order_only and hold_their_values(*read):
                upstream = launch.Upstream(grad_total, None, hard_cell_scale, residual)
                gradients = launch.efe_loss_promised_backward(inputs, ctx.settings, upstream, promise, ahead)
            else:
                gradients = first_order(
                    "efe_loss", efe_loss_backward, grad_total, grad_terms, *inputs, *ctx.settings, hard_cell_scale,
                    residual, needs,
                )  # fmt: skip
        found = spread(gradients, needs, len(ctx.needs_input_grad))
        if not_read:
            found = (*found[:PROJECTION], torch.zeros_like(tensors[PROJECTION]), *found[PROJECTION + 1 :])
        return found
