"""The ops of prompt refinement, served by C++ and CUDA, and two of them in a row."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import efe_kernels
from bench import baselines
from bench import plain as by_hand
from bench.ops.entry import (
    COMPILED,
    DTYPES,
    REFERENCE,
    Case,
    Example,
    Inputs,
    Op,
    Peer,
    Results,
    everything_twice,
    plain,
    size_of,
)
from efe_kernels.common.library import accumulate_dtype
from efe_kernels.prompt import reference as prompt_reference

DELTA_SCALE = 0.2


def pool_inputs(case: Case) -> Inputs:
    """Half of the tokens count, on the ragged workload a length of its own for each row."""
    rows, length, _ = case.sizes
    hidden = torch.randn(case.sizes, dtype=DTYPES[case.dtype]).requires_grad_()
    if case.workload == "scattered":
        return {"hidden": hidden, "mask": torch.rand(rows, length) < 0.6}
    lengths = (
        torch.randint(1, length + 1, (rows, 1)) if case.workload == "ragged" else torch.full((rows, 1), length // 2)
    )
    return {"hidden": hidden, "mask": torch.arange(length) < lengths}


def masked_mean_pool(_: Case, inputs: Inputs) -> tuple[Tensor]:
    return (efe_kernels.masked_mean_pool(**inputs),)


def pool_reference(_: Case, inputs: Inputs) -> tuple[Tensor]:
    return (prompt_reference.masked_mean_pool(**inputs),)


def pool_reads(inputs: Inputs) -> tuple[int, int]:
    mask = inputs["mask"]
    tokens = size_of(inputs, "hidden") * int(mask.sum()) // mask.numel()
    return tokens + size_of(inputs, "mask"), size_of(inputs, "mask")


def refine_inputs(case: Case) -> Inputs:
    batch, width = case.sizes
    dtype = DTYPES[case.dtype]
    return {
        "prompt": torch.randn(batch, width, dtype=dtype).requires_grad_(),
        "mean": torch.randn(batch, width + 1, dtype=dtype).requires_grad_(),
        "log_std": (0.1 * torch.randn(batch, width + 1, dtype=dtype)).requires_grad_(),
        "noise": torch.randn(batch, width + 1, dtype=dtype),
    }


def wide(tensors: Iterable[Tensor]) -> list[Tensor]:
    """In the dtype of the arithmetic, which the reference of the prompt ops leaves to its caller."""
    return [tensor.to(accumulate_dtype(tensor)) for tensor in tensors]


def refine_prompt(_: Case, inputs: Inputs) -> Results:
    refined = efe_kernels.refine_prompt(**inputs, delta_scale=DELTA_SCALE)
    return refined.prompt, refined.log_prob, refined.entropy


def refine_reference(_: Case, inputs: Inputs) -> Results:
    prompt, *policy = inputs.values()
    mean, log_std, noise = wide(policy)
    found = prompt_reference.refine_prompt(prompt, mean, log_std, noise, DELTA_SCALE)
    return found[0], *found[2:]


def score_inputs(case: Case) -> Inputs:
    """terms: `action` asks for its gradient as well."""
    inputs = refine_inputs(case)
    inputs["noise"].requires_grad_(case.terms == "action")
    return {name: inputs[source] for name, source in (("action", "noise"), ("mean", "mean"), ("log_std", "log_std"))}


def squashed_log_prob(_: Case, inputs: Inputs) -> Results:
    return efe_kernels.squashed_log_prob(**inputs, delta_scale=DELTA_SCALE)


def score_reference(_: Case, inputs: Inputs) -> Results:
    action, mean, log_std = wide(inputs.values())
    return prompt_reference.squashed_log_prob(action, mean, log_std, DELTA_SCALE)


def refine_and_score(_: Case, inputs: Inputs) -> Results:
    """A refined prompt, and the log-probability and entropy of the action taken, as `policy.update` evaluates them."""
    refined = efe_kernels.refine_prompt(**inputs, delta_scale=DELTA_SCALE)
    policy = (inputs["mean"], inputs["log_std"])
    return refined.prompt, *efe_kernels.squashed_log_prob(refined.action.detach(), *policy, delta_scale=DELTA_SCALE)


def refine_and_score_reference(_: Case, inputs: Inputs) -> Results:
    prompt, *policy = inputs.values()
    mean, log_std, noise = wide(policy)
    refined, action = prompt_reference.refine_prompt(prompt, mean, log_std, noise, DELTA_SCALE)[:2]
    return refined, *prompt_reference.squashed_log_prob(action.detach(), mean, log_std, DELTA_SCALE)


def refine_and_score_reads(inputs: Inputs) -> tuple[int, int]:
    """The action goes out of the one op and into the other."""
    action, policy = 2 * size_of(inputs, "noise"), size_of(inputs, "mean", "log_std")
    return size_of(inputs) + action + policy, action + 2 * policy + size_of(inputs, "noise")


def pool_case(workload: str, sizes: tuple[int, ...], dtype: str = "fp32", gpu_only: bool = False) -> Case:
    return Case("masked_mean_pool", workload, sizes, dtype, opponents=("eager", "sum over mask"), gpu_only=gpu_only)


def cases(op: str) -> tuple[Case, ...]:
    return (
        Case(op, "update", (256, 256), opponents=COMPILED),
        *(Case(op, workload, (batch, 256)) for workload, batch in (("seed", 1), ("train", 64), ("throughput", 4096))),
        Case(op, "ragged", (33, 243)),
        *(Case(op, "train", (64, 256), dtype) for dtype in ("bf16", "fp16")),
    )


MASKED_MEAN_POOL = Op(
    name="masked_mean_pool",
    inputs=pool_inputs,
    kernel=masked_mean_pool,
    reference=pool_reference,
    peers={
        **plain(lambda _, inputs: by_hand.masked_mean_pool(inputs), pool_reference),
        "sum over mask": Peer(lambda _, inputs: baselines.naive_mean_pool(inputs)),
    },
    reads=pool_reads,
    headline=(Case("masked_mean_pool", "train", (64, 512, 1024), opponents=(*COMPILED, REFERENCE, "sum over mask")),),
    cases=(
        pool_case("seed", (1, 512, 1024)),
        pool_case("ragged", (33, 509, 1019)),
        *(pool_case("train", (64, 512, 1024), dtype) for dtype in ("bf16", "fp16")),
        pool_case("throughput", (4096, 128, 1024), "bf16", gpu_only=True),
    ),
    examples=(Example(Case("masked_mean_pool", "scattered", (7, 65, 130))),),
    small=lambda sizes: (2, 5, 9),
)
REFINE_PROMPT = Op(
    name="refine_prompt",
    inputs=refine_inputs,
    kernel=refine_prompt,
    reference=refine_reference,
    peers=plain(refine_reference),
    reads=lambda inputs: (size_of(inputs), size_of(inputs, "mean", "log_std", "noise")),
    cases=cases("refine_prompt"),
    examples=(Example(Case("refine_prompt", "full", (33, 100))),),
)
SQUASHED_LOG_PROB = Op(
    name="squashed_log_prob",
    inputs=score_inputs,
    kernel=squashed_log_prob,
    reference=score_reference,
    peers=plain(score_reference),
    reads=everything_twice,
    cases=cases("squashed_log_prob"),
    examples=(Example(Case("squashed_log_prob", "full", (33, 100), terms="action")),),
)
REFINE_AND_SCORE = Op(
    name="refine_and_score",
    inputs=refine_inputs,
    kernel=refine_and_score,
    reference=refine_and_score_reference,
    peers=plain(refine_and_score_reference),
    reads=refine_and_score_reads,
    headline=(Case("refine_and_score", "update", (256, 256), opponents=COMPILED),),
)
