"""The op torch.ops.efe.grid_reward. It has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efe_kernels.common.library import define_op, triton_module
from efe_kernels.reward import reference

kernels: Any = triton_module("efe_kernels.reward.kernels")


def check_grid_colours(before: Tensor, after: Tensor, target: Tensor, valid: Tensor | None, num_colors: int) -> None:
    """Range of every colour, on the CPU only: on a GPU it would wait for the device."""
    if target.device.type != "cpu":
        return
    counted = reference.counted_cells(target, valid)
    reference.check_colours("target", target, counted, num_colors)
    for name, prediction in (("before", before), ("after", after)):
        if not prediction.is_floating_point():
            padding = counted if prediction.shape == target.shape else None
            reference.check_colours(name, prediction, padding, num_colors)


def grid_reward_reference(
    before: Tensor,
    after: Tensor,
    target: Tensor,
    valid: Tensor | None,
    reversibility: Tensor | None,
    weights: list[float],
    num_colors: int,
) -> Tensor:
    check_grid_colours(before, after, target, valid, num_colors)
    return reference.grid_reward(before, after, target, valid, reversibility, weights, num_colors)


def grid_reward_triton(
    before: Tensor,
    after: Tensor,
    target: Tensor,
    valid: Tensor | None,
    reversibility: Tensor | None,
    weights: list[float],
    num_colors: int,
) -> Tensor:
    check_grid_colours(before, after, target, valid, num_colors)
    return kernels.grid_reward(before, after, target, valid, reversibility, weights, num_colors)


def grid_reward_fake(before: Tensor, after: Tensor, target: Tensor, *_: Any) -> Tensor:
    return target.new_empty(14, target.shape[0], dtype=torch.float32)


grid_reward = define_op(
    "grid_reward(Tensor before, Tensor after, Tensor target, Tensor? valid, Tensor? reversibility, float[] weights, "
    "int num_colors) -> Tensor",
    reference=grid_reward_reference,
    fake=grid_reward_fake,
    triton=grid_reward_triton if kernels else None,
)
