"""policy_gradient_loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import efe_kernels
from bench.ops.entry import COMPILED, DTYPES, Case, Example, Inputs, Op, Variant, empties, flags, plain, size_of
from efe_kernels.common.library import triton_module
from efe_kernels.policy_loss import reference as policy_reference

kernels: Any = triton_module("efe_kernels.policy_loss.kernels")
NAMES = ("log_prob", "value", "entropy", "advantage", "value_target", "old_log_prob")


def inputs_of(case: Case) -> Inputs:
    inputs: Inputs = {name: torch.randn(case.sizes, dtype=DTYPES[case.dtype]) for name in NAMES}
    inputs["old_log_prob"].mul_(0.2).add_(inputs["log_prob"])
    for name in NAMES[:3]:
        inputs[name].requires_grad_()
    return inputs | {"mask": flags(case, 0.8)}


def kernel(_: Case, inputs: Inputs) -> tuple[Tensor]:
    return (efe_kernels.policy_gradient_loss(**inputs).total,)


def reference(_: Case, inputs: Inputs) -> tuple[Tensor]:
    read = policy_reference.Inputs(**{name: inputs[name] for name in policy_reference.Inputs._fields})
    settings = policy_reference.Settings(0.2, 0.5, 0.01)
    return policy_reference.policy_gradient_loss_forward(inputs["entropy"], read, settings)[:1]


def reads(inputs: Inputs) -> tuple[int, int]:
    return size_of(inputs), size_of(inputs, *(name for name in inputs if name != "entropy"))


def launch(numel: int, clipped: bool, device: str, begin: Callable[[str], None]) -> None:
    with torch.device(device):
        entropy, *inputs, old_log_prob = empties(6, numel, dtype=torch.bfloat16 if clipped else torch.float32)
        options = (old_log_prob, torch.empty(numel, dtype=torch.bool)) if clipped else (None, None)
        (total, *parts), diagnostics = empties(4), torch.empty(4)
    problem = (policy_reference.Inputs(*inputs, *options), policy_reference.Settings(0.2, 0.5, 0.01))
    kernels.policy_gradient_loss_forward(entropy, *problem)
    for which, grads in (("backward", (total, None, None, None)), ("backward of the parts", (None, *parts))):
        begin(which)
        kernels.policy_gradient_loss_backward(grads, [True] * 3, diagnostics, *problem)


def variant(numel: int, clipped: bool, device: str = "cpu") -> Variant:
    """clipped: the surrogate with a mask in half precision, else the plain score function. meta takes no memory."""
    return Variant((numel,), partial(launch, numel, clipped, device))


OP = Op(
    name="policy_gradient_loss",
    inputs=inputs_of,
    kernel=kernel,
    reference=reference,
    peers=plain(reference),
    reads=reads,
    headline=(Case("policy_gradient_loss", "throughput", (4096 * 128,), opponents=COMPILED),),
    cases=(
        *(Case("policy_gradient_loss", workload, (batch,))
          for workload, batch in (("seed", 1), ("train", 64), ("ragged", 33))),
        *(Case("policy_gradient_loss", "train", (64,), dtype) for dtype in ("bf16", "fp16")),
    ),
    examples=(Example(Case("policy_gradient_loss", "full", (5000,))),),
    triton=True,
    variants={
        "policy_gradient_loss one block": variant(64, False),
        "policy_gradient_loss one block clipped": variant(4096, True),
        "policy_gradient_loss": variant(100000, False),
        "policy_gradient_loss clipped": variant(100000, True),
        "policy_gradient_loss 33 M": variant(2**25, False, device="meta"),
        "policy_gradient_loss 134 M": variant(2**27, True, device="meta"),
        "policy_gradient_loss 8.6 G": variant(2**33, False, device="meta"),
    },
    swept=True,
)  # fmt: skip
