"""The ops torch.ops.efe.rl_advantage_forward and _backward."""

from __future__ import annotations

import torch
from torch import Tensor

from efe_kernels.advantage import reference
from efe_kernels.advantage.reference import Inputs, Settings
from efe_kernels.common.op import differentiable_op


def rl_advantage_fake(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    reward, value, _ = inputs
    groups = reward.numel() // settings.group_size if settings.group_size else 0
    dtype = torch.float64 if torch.float64 in (reward.dtype, value.dtype) else torch.float32
    advantage = reward.new_empty(reward.shape, dtype=torch.promote_types(reward.dtype, value.dtype))
    return advantage, reward.new_empty(groups, 3, dtype=dtype)


rl_advantage = differentiable_op(
    "rl_advantage",
    forward=reference.rl_advantage_forward,
    backward=reference.rl_advantage_backward,
    wrt=("value",),
    fake=rl_advantage_fake,
    triton="efe_kernels.advantage.kernels",
)
