"""policy_gradient_loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import efe_kernels
from bench import plain as by_hand
from bench.ops.entry import (
    COMPILED,
    DTYPES,
    REFERENCE,
    Case,
    Example,
    Inputs,
    Op,
    Variant,
    empties,
    flags,
    plain,
    size_of,
)
from efe_kernels.common.library import accumulate_dtype, triton_module
from efe_kernels.policy_loss import reference as policy_reference

kernels: Any = triton_module("efe_kernels.policy_loss.kernels")
NAMES = ("log_prob", "value", "entropy", "advantage", "value_target", "old_log_prob")
ANSWERS = "answers"
"""Terms of a case without a critic: an advantage for each row, a KL, rows of other lengths that count alike."""
PPO = policy_reference.Settings(
    low=0.8, high=1.2, dual_clip=math.inf, value_clip=math.inf, value_coef=0.5, entropy_coef=0.01, kl_coef=0.0,
    normalizer=0.0,
)  # fmt: skip
GRPO = PPO._replace(kl_coef=0.04, normalizer=1.0)


def inputs_of(case: Case) -> Inputs:
    if case.terms == ANSWERS:
        return answers_of(case)
    inputs: Inputs = {name: torch.randn(case.sizes, dtype=DTYPES[case.dtype]) for name in NAMES}
    inputs["old_log_prob"].mul_(0.2).add_(inputs["log_prob"])
    for name in NAMES[:3]:
        inputs[name].requires_grad_()
    return inputs | {"mask": flags(case, 0.8)}


def answers_of(case: Case) -> Inputs:
    batch, length = case.sizes
    log_prob, old, ref = torch.randn(3, batch, length, dtype=DTYPES[case.dtype])
    return {
        "log_prob": log_prob.requires_grad_(),
        "advantage": torch.randn(batch, dtype=DTYPES[case.dtype]),
        "old_log_prob": old.mul_(0.2).add_(log_prob.detach()),
        "ref_log_prob": ref.mul_(0.2).add_(log_prob.detach()),
        "mask": torch.arange(length) < torch.randint(1, length + 1, (batch, 1)),
    }


def kernel(case: Case, inputs: Inputs) -> tuple[Tensor]:
    settings: dict[str, Any] = {"kl_coef": 0.04, "aggregation": "sequence_mean"} if case.terms == ANSWERS else {}
    return (efe_kernels.policy_gradient_loss(**inputs, **settings).total,)


def reference(case: Case, inputs: Inputs) -> tuple[Tensor]:
    read = policy_reference.Inputs(*map(inputs.get, policy_reference.Inputs._fields))
    settings = PPO
    if case.terms == ANSWERS:
        count = inputs["mask"].sum(-1)  # of each row at least 1
        read, settings = read._replace(weight=1 / (count * len(count)).to(accumulate_dtype(read.log_prob))), GRPO
    return policy_reference.policy_gradient_loss_forward(inputs.get("entropy"), read, settings)[:1]


def written_for_speed(case: Case, inputs: Inputs) -> tuple[Tensor]:
    return by_hand.grpo_loss(inputs) if case.terms == ANSWERS else by_hand.ppo_loss(inputs)


def reads(inputs: Inputs) -> tuple[int, int]:
    return size_of(inputs), size_of(inputs, *(name for name in inputs if name != "entropy"))


def launch(numel: int, kind: str, device: str, begin: Callable[[str], None]) -> None:
    half = torch.float32 if kind == "score" else torch.bfloat16
    with torch.device(device):
        entropy, log_prob, value, advantage, target, *past = empties(8, numel, dtype=half)
        mask = torch.empty(numel, dtype=torch.bool)
        by_row, weight = torch.empty(numel // 512, dtype=half), torch.empty(numel // 512)
        grads, diagnostics = empties(5), torch.empty(len(policy_reference.DIAGNOSTICS))
    given = {
        "score": (entropy, policy_reference.Inputs(log_prob, advantage, value, target, *[None] * 5), PPO),
        "clipped": (
            entropy, policy_reference.Inputs(log_prob, advantage, value, target, past[0], None, None, mask, None), PPO,
        ),
        "every term": (
            entropy, policy_reference.Inputs(log_prob, advantage, value, target, *past, mask, None), PPO,
        ),
        ANSWERS: (
            None, policy_reference.Inputs(log_prob, by_row, None, None, past[0], None, past[2], mask, weight), GRPO,
        ),
    }  # fmt: skip
    entropy, *problem = given[kind]
    needs = [entropy is not None, True, problem[0].value is not None]
    kernels.policy_gradient_loss_forward(entropy, *problem)
    total, *parts = grads
    for which, arriving in (("backward", (total, *[None] * 4)), ("backward of the parts", (None, *parts))):
        begin(which)
        kernels.policy_gradient_loss_backward(arriving, needs, diagnostics, *problem)


def variant(numel: int, kind: str, device: str = "cpu") -> Variant:
    """kind: the plain score function; clipped: the surrogate with a mask, in half precision, as the others; all that
    there is of each element; or answers. meta takes no memory."""
    return Variant((numel,), partial(launch, numel, kind, device))


OP = Op(
    name="policy_gradient_loss",
    inputs=inputs_of,
    kernel=kernel,
    reference=reference,
    peers=plain(written_for_speed, reference),
    reads=reads,
    headline=(Case("policy_gradient_loss", "throughput", (4096 * 128,), opponents=(*COMPILED, REFERENCE)),),
    cases=(
        *(Case("policy_gradient_loss", workload, (batch,))
          for workload, batch in (("seed", 1), ("train", 64), ("ragged", 33))),
        *(Case("policy_gradient_loss", "train", (64,), dtype) for dtype in ("bf16", "fp16")),
        Case("policy_gradient_loss", "train", (64, 512), terms=ANSWERS, opponents=COMPILED),
    ),
    examples=(
        Example(Case("policy_gradient_loss", "full", (5000,))),
        Example(Case("policy_gradient_loss", "ragged", (5, 1100), terms=ANSWERS)),
    ),
    triton=True,
    variants={
        "policy_gradient_loss one block": variant(64, "score"),
        "policy_gradient_loss one block clipped": variant(4096, "clipped"),
        "policy_gradient_loss": variant(100000, "score"),
        "policy_gradient_loss clipped": variant(100000, "clipped"),
        "policy_gradient_loss every term": variant(100000, "every term"),
        "policy_gradient_loss answers": variant(64 * 512, ANSWERS),
        "policy_gradient_loss 33 M": variant(2**25, "score", device="meta"),
        "policy_gradient_loss 134 M": variant(2**27, "clipped", device="meta"),
        "policy_gradient_loss 8.6 G": variant(2**33, "score", device="meta"),
    },
    swept=True,
)  # fmt: skip
