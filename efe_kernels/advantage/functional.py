"""The public function `rl_advantage`: what it takes and gives, and its checks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from efe_kernels.advantage import ops
from efe_kernels.common import checks
from efe_kernels.common.arguments import constant


def rl_advantage(
    reward: Tensor,
    value: Tensor,
    *,
    reward_scale: float = 5.0,
    normalize: Literal["tanh", "clamp"] | None = "tanh",
    whiten: bool | Literal["center"] = False,
    group_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Advantage of one-step episodes: normalize(reward * reward_scale) - value, optionally whitened.

    Whitening gives (advantage - mean) / (std + 1e-4) over the elements that count, all of them or those of each group,
    as in GRPO; std is torch.std's, of n - 1. A group whose advantages are all equal, such as a group of one, becomes 0;
    one with an infinite advantage beside others becomes NaN. With whiten="center" it gives advantage - mean, as in Dr.
    GRPO.

    Differentiable in value, through the mean and standard deviation too where whitened; detach the result to use it as
    the constant of a policy gradient. The reward is a constant.

    Args:
        reward: any shape, such as [B]; float32, float16, bfloat16 or float64.
        value: the shape of reward, the critic's estimate of the normalised scaled reward; zeros without a critic.
        reward_scale: factor on the reward.
        normalize: "tanh" or "clamp" bring the scaled reward to [-1, 1], None leaves it.
        whiten: whether to whiten; "center" subtracts the mean and leaves the scale.
        group_size: how many consecutive elements, in row-major order, are one group; None takes all as one group.
        mask: bool, the shape of reward; elements that are False count nowhere, and get advantage 0 and gradient 0,
            whatever reward and value hold there.

    Returns:
        The advantage, in the shape of reward and the dtype to which reward and value promote. Arithmetic is float32,
        float64 if one of them is float64.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device or choice, a group_size that does not divide the number of elements, or
            one without whiten.

    Source: Shao et al. 2024, "DeepSeekMath", for group whitening; Liu et al. 2025, "Understanding R1-Zero-like
    training: a critical perspective", for centring.
    """
    checks.check_alike(reward=reward, value=value)
    checks.check_mask("mask", mask, "reward", reward)
    checks.check_choice("normalize", normalize, ("tanh", "clamp", None))
    reward_scale = checks.number("reward_scale", reward_scale)
    center = isinstance(whiten, str)
    if center:
        checks.check_choice("whiten", whiten, (True, False, "center"))
    else:
        whiten = checks.flag("whiten", whiten)
    if group_size is not None:
        group_size = checks.integer("group_size", group_size, low=1)
        if not whiten:
            raise ValueError(f"group_size must be None unless whiten is True or 'center', it was {group_size}.")
        if reward.numel() % group_size != 0:
            raise ValueError(f"group_size must divide the {reward.numel()} elements of reward, it was {group_size}.")
    group = 0 if not whiten else reward.numel() if group_size is None else group_size
    advantage, _ = ops.rl_advantage(constant(reward), value, mask, reward_scale, normalize, group, center)
    return advantage
