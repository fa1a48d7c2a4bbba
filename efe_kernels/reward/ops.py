"""The op torch.ops.efe.grid_reward. It has no gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from efe_kernels.common.library import define_op, triton_module
from efe_kernels.reward import reference

kernels: Any = triton_module("efe_kernels.reward.kernels")


def in_palette(grid_reward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """grid_reward after a look at the range of every colour, on the CPU only: on a GPU it would wait for the device."""

    @functools.wraps(grid_reward)
    def serve(before: Tensor, after: Tensor, target: Tensor, valid: Tensor | None, *rest: Any) -> Tensor:
        if target.device.type == "cpu":
            *_, num_colors = rest
            counted = reference.counted_cells(target, valid)
            reference.check_colours("target", target, counted, num_colors)
            for name, prediction in (("before", before), ("after", after)):
                if not prediction.is_floating_point():
                    padding = counted if prediction.shape == target.shape else None
                    reference.check_colours(name, prediction, padding, num_colors)
        return grid_reward(before, after, target, valid, *rest)

    return serve


def grid_reward_fake(before: Tensor, after: Tensor, target: Tensor, *_: Any) -> Tensor:
    return target.new_empty(14, target.shape[0], dtype=torch.float32)


grid_reward = define_op(
    "grid_reward",
    reference=in_palette(reference.grid_reward),
    fake=grid_reward_fake,
    triton=in_palette(kernels.grid_reward) if kernels else None,
    triton_takes=lambda *_: True,
)
