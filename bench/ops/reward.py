"""grid_reward, which has no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import efe_kernels
from bench.ops.entry import (
    COMPILED,
    DTYPES,
    EAGER,
    FORWARD,
    Case,
    Example,
    Inputs,
    Op,
    Variant,
    laid_out,
    plain,
    size_of,
    valid_cells,
)
from efe_kernels.common.library import triton_module
from efe_kernels.reward import reference as reward_reference

kernels: Any = triton_module("efe_kernels.reward.kernels")
WEIGHTS = [1.0, 0.5, 0.5, 0.5]


def inputs_of(case: Case) -> Inputs:
    batch, height, width, outcomes = case.sizes
    return {
        "before": laid_out(case.layout, batch, height, width, outcomes).to(DTYPES[case.dtype]),
        "after": laid_out(case.layout, batch, height, width, outcomes).to(DTYPES[case.dtype]),
        "target": torch.randint(0, outcomes, (batch, height, width)),
        "valid": valid_cells(case.workload, batch, height, width),
    }


def kernel(_: Case, inputs: Inputs) -> tuple[Tensor]:
    return (efe_kernels.grid_reward(**inputs).reward,)


def reference(case: Case, inputs: Inputs) -> tuple[Tensor]:
    before, after, target, valid = inputs.values()
    return (reward_reference.grid_reward(before, after, target, valid, None, WEIGHTS, case.sizes[-1])[0],)


def launch(begin: Callable[[str], None]) -> None:
    """Logits, and then colours."""
    batch = 4096
    target = torch.zeros(batch, 30, 30, dtype=torch.int64)
    channel_last = torch.empty(batch, 30, 30, 10)
    channel_first = torch.empty(batch, 10, 30, 30, dtype=torch.bfloat16).permute(0, 2, 3, 1)
    double = torch.empty(batch, 30, 30, 10, dtype=torch.float64)
    small = torch.zeros(batch, 7, 13, dtype=torch.uint8)
    valid = torch.empty(batch, 30, 30, dtype=torch.bool)
    kernels.grid_reward(channel_last, channel_first, target, None, None, WEIGHTS, 10)
    begin("forward of colours")
    kernels.grid_reward(double, small, target, valid, torch.empty(2, batch), WEIGHTS, 10)


def grids(workload: str, batch: int, opponents: tuple[str, ...]) -> Case:
    return Case("grid_reward", workload, (batch, 30, 30, 10), "fp32", "channel-first", "", opponents, batch > 64)


OP = Op(
    name="grid_reward",
    inputs=inputs_of,
    kernel=kernel,
    reference=reference,
    peers=plain(reference),
    reads=lambda inputs: (size_of(inputs), 0),
    cases=(
        grids("seed", 1, EAGER),
        grids("train", 64, COMPILED),
        grids("throughput", 4096, EAGER),
        Case("grid_reward", "train", (64, 30, 30, 10), layout="channel-last"),
        Case("grid_reward", "ragged", (33, 29, 23, 10), layout="channel-last"),
        *(Case("grid_reward", "train", (64, 30, 30, 10), dtype, "channel-first") for dtype in ("bf16", "fp16")),
    ),
    examples=(Example(Case("grid_reward", "scattered", (5, 7, 9, 10))),),
    passes=FORWARD,
    small=lambda sizes: (2, 5, 7, 10),
    triton=True,
    variants={"grid_reward": Variant((4096, 30, 30, 10), launch)},
    loops={"grid_reward_kernel": lambda launch: (launch.constant("BLOCKS"),)},
)
