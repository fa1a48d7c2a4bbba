"""One-step advantages in plain PyTorch: the definition, and what serves where no kernel exists."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WHITEN_EPS = 1e-4


class Inputs(NamedTuple):
    """All of one shape."""

    reward: Tensor
    value: Tensor
    mask: Tensor | None


class Settings(NamedTuple):
    reward_scale: float
    normalize: str | None
    group_size: int  # consecutive elements in row-major order that are whitened together; 0: no whitening
    center: bool  # whether whitening leaves the scale


def plain_advantage(inputs: Inputs, settings: Settings) -> Tensor:
    """Normalised reward minus value in the dtype of the arithmetic; 0 where mask is False."""
    reward, value, mask = inputs
    dtype = torch.float64 if torch.float64 in (reward.dtype, value.dtype) else torch.float32
    scaled = reward.to(dtype) * settings.reward_scale
    if settings.normalize == "tanh":
        scaled = scaled.tanh()
    elif settings.normalize == "clamp":
        scaled = scaled.clamp(-1, 1)
    advantage = scaled - value.to(dtype)
    return advantage if mask is None else torch.where(mask, advantage, 0)


def group_statistics(advantage: Tensor, mask: Tensor | None) -> Tensor:
    """advantage, mask [G, S] -> [G, 3]: members, mean, standard deviation (of n - 1) of each group.

    Summed relative to the largest member, so that equal members have a standard deviation of exactly 0. Both are NaN
    where a member is infinite and others are not.
    """
    members = torch.ones_like(advantage, dtype=torch.bool) if mask is None else mask
    count = members.sum(1).to(advantage.dtype)
    shift = torch.where(members, advantage, -torch.inf).amax(1)
    shift = torch.where(count > 0, shift, 0)
    offset = torch.where(members & (advantage != shift[:, None]), advantage - shift[:, None], 0)
    mean = offset.sum(1) / count.clamp(min=1)
    squares = torch.where(members, (offset - mean[:, None]).square(), 0).sum(1)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return torch.stack([count, torch.where(std.isnan(), std, shift + mean), std], 1)


class Advantage(NamedTuple):
    advantage: Tensor
    statistics: Tensor


def rl_advantage_forward(inputs: Inputs, settings: Settings) -> Advantage:
    """Advantage in the shape of reward and, with group_size > 0, the statistics [numel / group_size, 3] of the groups.

    Whitening: (advantage - mean) / (std + WHITEN_EPS) within each group, with `center` the difference alone; 0 in a
    group whose members are equal.
    """
    reward, value, mask = inputs
    advantage = plain_advantage(inputs, settings)
    statistics = advantage.new_empty(0, 3)
    if settings.group_size > 0:
        groups = advantage.reshape(-1, settings.group_size)
        members = None if mask is None else mask.reshape(-1, settings.group_size)
        statistics = group_statistics(groups, members)
        advantage = whiten(groups, members, statistics, settings.center).view(reward.shape)
    dtype = torch.promote_types(reward.dtype, value.dtype)
    return Advantage(advantage.to(dtype).contiguous(), statistics)


def whiten(advantage: Tensor, mask: Tensor | None, statistics: Tensor, center: bool) -> Tensor:
    """advantage, mask [G, S] and statistics [G, 3] -> [G, S]."""
    _, mean, std = statistics[:, :, None].unbind(1)
    whitened = torch.where(advantage.isinf() & (advantage == mean), 0, advantage - mean)
    if not center:
        whitened = torch.where(std == 0, 0, whitened / (std + WHITEN_EPS))
    return whitened if mask is None else torch.where(mask, whitened, 0)


def rl_advantage_backward(grad_advantage: Tensor, inputs: Inputs, statistics: Tensor, settings: Settings) -> Tensor:
    """Gradient of value; the derivation stands beside the kernel."""
    _, value, mask = inputs
    dtype, size = statistics.dtype, settings.group_size
    grad = grad_advantage.to(dtype) if mask is None else torch.where(mask, grad_advantage.to(dtype), 0)
    if size > 0:
        members = None if mask is None else mask.reshape(-1, size)
        grad_groups = grad.reshape(-1, size)
        count, _, std = statistics[:, :, None].unbind(1)
        centered = grad_groups - grad_groups.sum(1, keepdim=True) / count.clamp(min=1)
        if not settings.center:
            whitened = whiten(plain_advantage(inputs, settings).reshape(-1, size), members, statistics, False)
            product = (grad_groups * whitened).sum(1, keepdim=True)
            centered = centered / (std + WHITEN_EPS) - whitened * product / ((count - 1) * std)
            centered = torch.where(std == 0, 0, centered)
        grad = (centered if members is None else torch.where(members, centered, 0)).view(value.shape)
    return (-grad).to(value.dtype).contiguous()
