"""The public functions of returns along trajectories: what they take and give, and their checks."""

from __future__ import annotations

import math

from torch import Tensor

from efe_kernels.common import checks
from efe_kernels.common.arguments import constant, promoted
from efe_kernels.returns import ops


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    reward_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation along the last dimension, which is time.

        delta_t = reward_scale * reward_t + gamma * next_value_t * (1 - terminated_t) - value_t
        advantage_t = delta_t + gamma * lam * (1 - terminated_t) * (1 - truncated_t) * advantage_{t+1}
        value_target_t = advantage_t + value_t

    Differentiable in value and next_value, as these formulas are; detach the results to use them as constants.

    Args:
        reward: [..., T] float32, float16, bfloat16 or float64.
        value: [..., T], value of the state in which step t begins.
        next_value: [..., T], value of the state in which step t ends: of the last observation of an episode where it
            is truncated, read nowhere where it is terminated.
        terminated: [..., T] bool, the episode ends in a terminal state: no bootstrap, and the trace stops.
        truncated: [..., T] bool, the episode is cut here: the bootstrap stays, and the trace stops. None: nowhere.
            After the last step the trace stops in any case.
        gamma: discount.
        lam: decay of the trace.
        reward_scale: factor on the reward.

    Without leading dimensions one trajectory [T] is taken. Any strides; [T, B] buffers transposed to [B, T] are read
    and written as they lie, without a copy. On CUDA an input whose strides are not those of reward is copied first.

    Returns:
        (advantage, value_target), [..., T] in the dtype to which reward, value and next_value promote. Arithmetic is
        float32, float64 for float64.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, gamma or lam.

    Source: Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation".
    """
    check_trajectories(terminated, truncated, reward=reward, value=value, next_value=next_value)
    gamma, lam = checks.number("gamma", gamma, 0, 1), checks.number("lam", lam, 0, 1)
    reward_scale = checks.number("reward_scale", reward_scale)
    value, next_value, reward = promoted(value, next_value, constant(reward))
    advantage, target = ops.gae(
        rows_of(value), rows_of(next_value), rows_of(reward), rows_of(terminated),
        None if truncated is None else rows_of(truncated), None, gamma, lam, 1.0, 1.0, reward_scale,
    )  # fmt: skip
    return like(advantage, reward), like(target, reward)


def vtrace(
    log_ratio: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    *,
    gamma: float = 0.99,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    reward_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace along the last dimension, which is time: value targets and advantages corrected for off-policy data.

    With ratio = exp(log_ratio), rho = min(rho_clip, ratio), c = min(c_clip, ratio) and delta_t as in `gae`:

        value_target_t = value_t + rho_t * delta_t
                         + gamma * c_t * (1 - terminated_t) * (1 - truncated_t) * (value_target_{t+1} - value_{t+1})
        advantage_t = rho_t * (reward_scale * reward_t + gamma * (1 - terminated_t) * next_target_t - value_t)

    next_target_t is next_value_t + value_target_{t+1} - value_{t+1}, that is value_target_{t+1} where next_value_t is
    value_{t+1}, and the bare next_value_t where step t is truncated or the last one.

    Differentiable in value and next_value, as these formulas are with constant importance weights; detach the results
    to use them as constants.

    Args:
        log_ratio: [..., T] log-probability of the action under the learner's policy less that under the behaviour
            policy; a constant for autograd.
        reward, value, next_value, terminated, truncated, gamma, reward_scale: as in `gae`.
        rho_clip: limit of the weight of a step; math.inf sets none.
        c_clip: limit of the weight with which later steps count.

    Returns:
        (advantage, value_target), [..., T] in the dtype to which log_ratio, reward, value and next_value promote.
        Arithmetic is float32, float64 for float64.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, gamma or limit.

    Source: Espeholt et al. 2018, "IMPALA: scalable distributed deep-RL with importance weighted actor-learner
    architectures".
    """
    check_trajectories(terminated, truncated, reward=reward, log_ratio=log_ratio, value=value, next_value=next_value)
    gamma, reward_scale = checks.number("gamma", gamma, 0, 1), checks.number("reward_scale", reward_scale)
    rho_clip = checks.number("rho_clip", rho_clip, 0, finite=False)
    c_clip = checks.number("c_clip", c_clip, 0, finite=False)
    value, next_value, reward, log_ratio = promoted(value, next_value, constant(reward), constant(log_ratio))
    advantage, target = ops.vtrace(
        rows_of(value), rows_of(next_value), rows_of(reward), rows_of(terminated),
        None if truncated is None else rows_of(truncated), rows_of(log_ratio), gamma, 1.0, rho_clip, c_clip,
        reward_scale,
    )  # fmt: skip
    return like(advantage, reward), like(target, reward)


def td_lambda(
    reward: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    reward_scale: float = 1.0,
) -> Tensor:
    """TD(lambda) returns along the last dimension, which is time: what a critic is trained towards.

        return_t = reward_scale * reward_t
                   + gamma * (1 - terminated_t) * ((1 - lam) * next_value_t + lam * return_{t+1})

    Where step t is truncated or the last one, next_value_t stands in for return_{t+1}. With lam=1 this is the
    discounted Monte-Carlo return, bootstrapped where an episode is cut; with lam=0 it is the target of one step.

    Differentiable in next_value, as the formula is; detach the result to use it as a constant.

    Args:
        reward: [..., T] float32, float16, bfloat16 or float64; a constant for autograd.
        next_value, terminated, truncated, gamma, lam, reward_scale: as in `gae`.

    Without leading dimensions one trajectory [T] is taken. Strides as in `gae`.

    Returns:
        [..., T] in the dtype to which reward and next_value promote. Arithmetic is float32, float64 for float64.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, gamma or lam.

    Source: Sutton 1988, "Learning to predict by the methods of temporal differences".
    """
    check_trajectories(terminated, truncated, reward=reward, next_value=next_value)
    gamma, lam = checks.number("gamma", gamma, 0, 1), checks.number("lam", lam, 0, 1)
    reward_scale = checks.number("reward_scale", reward_scale)
    next_value, reward = promoted(next_value, constant(reward))
    flags = (rows_of(terminated), None if truncated is None else rows_of(truncated))
    return like(ops.td_lambda(rows_of(next_value), rows_of(reward), *flags, gamma, lam, reward_scale), reward)


def check_trajectories(terminated: Tensor, truncated: Tensor | None, **tensors: Tensor) -> None:
    """Floating-point tensors [..., T] and flags of the same shape."""
    checks.check_alike(**tensors)
    name, first = next(iter(tensors.items()))
    if first.dim() == 0:
        raise ValueError(f"{name} must have the shape [..., T], it was [].")
    checks.check_tensor("terminated", terminated)
    checks.check_mask("terminated", terminated, name, first)
    checks.check_mask("truncated", truncated, name, first)


def rows_of(tensor: Tensor) -> Tensor:
    """[..., T] as [N, T]."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def like(rows: Tensor, tensor: Tensor) -> Tensor:
    """rows [N, T] in the shape of tensor."""
    return rows if tensor.dim() == 2 else rows.view(tensor.shape)
