"""rl_advantage, whitened in groups, which are the last of the sizes; one episode alone has nothing to whiten with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import efe_kernels
from bench.ops.entry import (
    COMPILED,
    DTYPES,
    Case,
    Example,
    Inputs,
    Op,
    Variant,
    empties,
    everything_twice,
    flags,
    plain,
)
from efe_kernels.advantage import reference as advantage_reference
from efe_kernels.common.library import triton_module

kernels: Any = triton_module("efe_kernels.advantage.kernels")


def inputs_of(case: Case) -> Inputs:
    dtype = DTYPES[case.dtype]
    return {
        "reward": torch.randn(case.sizes, dtype=dtype),
        "value": torch.randn(case.sizes, dtype=dtype).requires_grad_(),
        "mask": flags(case, 0.8),
    }


def group_of(case: Case) -> int | None:
    return case.sizes[-1] if case.sizes[-1] > 1 else None


def kernel(case: Case, inputs: Inputs) -> tuple[Tensor]:
    group = group_of(case)
    return (efe_kernels.rl_advantage(**inputs, whiten=group is not None, group_size=group),)


def reference(case: Case, inputs: Inputs) -> tuple[Tensor]:
    reward, value, mask = inputs["reward"], inputs["value"], inputs["mask"]
    group = group_of(case)
    advantage = advantage_reference.plain_advantage(
        advantage_reference.Inputs(reward, value, mask), advantage_reference.Settings(5.0, "tanh", group or 0, False)
    )
    if group is not None:
        groups = advantage.view(-1, group)
        members = None if mask is None else mask.view(-1, group)
        statistics = advantage_reference.group_statistics(groups, members)
        advantage = advantage_reference.whiten(groups, members, statistics, False).view(case.sizes)
    return (advantage.to(reward.dtype),)


def launch(
    numel: int, group_size: int, normalize: str | None, masked: bool, center: bool, begin: Callable[[str], None]
) -> None:
    grad, reward, value = empties(3, numel)
    mask = torch.empty(reward.shape, dtype=torch.bool) if masked else None
    inputs = advantage_reference.Inputs(reward, value.bfloat16() if masked else value, mask)
    settings = advantage_reference.Settings(5.0, normalize, group_size, center)
    _, statistics = kernels.rl_advantage_forward(inputs, settings)
    begin("backward")
    kernels.rl_advantage_backward(grad, inputs, statistics, settings)


def variant(group_size: int, normalize: str | None, masked: bool = True, center: bool = False) -> Variant:
    """group_size 0: not whitened."""
    numel = 4096 if group_size == 4096 else max(60000, group_size)
    return Variant((numel,), partial(launch, numel, group_size, normalize, masked, center))


OP = Op(
    name="rl_advantage",
    inputs=inputs_of,
    kernel=kernel,
    reference=reference,
    peers=plain(reference),
    reads=everything_twice,
    cases=(
        *(Case("rl_advantage", workload, (batch,)) for workload, batch in (("seed", 1), ("train", 64), ("ragged", 33))),
        Case("rl_advantage", "throughput", (4096,), opponents=COMPILED),
        *(Case("rl_advantage", "train", (64,), dtype) for dtype in ("bf16", "fp16")),
    ),
    examples=(Example(Case("rl_advantage", "full", (12, 8))),),
    triton=True,
    variants={
        "rl_advantage": variant(0, "tanh"),
        "rl_advantage without mask": variant(0, "clamp", masked=False),
        "rl_advantage small groups": variant(8, "clamp"),
        "rl_advantage small groups centred": variant(8, None, center=True),
        "rl_advantage one tile": variant(4096, "tanh"),
        "rl_advantage several tiles": variant(30000, "tanh"),
        "rl_advantage several tiles without mask": variant(30000, None, masked=False),
        "rl_advantage parts": variant(60000, "tanh"),
        "rl_advantage many parts": variant(2**20, "tanh"),
    },
    loops={"rl_advantage_kernel": lambda launch: (launch.constant("TILES") - 1,) * 2},
    swept=True,
)
