"""The public functions of returns along trajectories: what they take and give, and their checks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from efe_kernels.common import checks
from efe_kernels.common.arguments import constant, promoted, without_autocast
from efe_kernels.common.library import accumulate_dtype
from efe_kernels.returns import ops


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    *,
    gamma: float | Tensor = 0.99,
    lam: float | Tensor = 0.95,
    reward_scale: float = 1.0,
    mask: Tensor | None = None,
    time_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation along `time_dim`, the last dimension unless it is named: [..., T].

        delta_t = reward_scale * reward_t + gamma * next_value_t * (1 - terminated_t) - value_t
        advantage_t = delta_t + gamma * lam * (1 - terminated_t) * (1 - truncated_t) * advantage_{t+1}
        value_target_t = advantage_t + value_t

    Differentiable in reward, value and next_value, as these formulas are; detach the results to use them as constants.

    Args:
        reward: [..., T] float32, float16, bfloat16 or float64.
        value: [..., T], value of the state in which step t begins.
        next_value: [..., T], value of the state in which step t ends: of the last observation of an episode where it
            is truncated, read nowhere where it is terminated.
        terminated: [..., T] bool, integer or floating, nonzero where the episode ends in a terminal state: no
            bootstrap, and the trace stops.
        truncated: [..., T], likewise, where the episode is cut: the bootstrap stays, and the trace stops. None:
            nowhere. After the last step the trace stops in any case.
        gamma: discount, in [0, 1]: a number, or a floating-point tensor that broadcasts to reward, of each step or of
            each environment. The values of a tensor are not looked at, which would wait for its device, and no gradient
            flows to it: one that requires it is refused.
        lam: decay of the trace, likewise.
        reward_scale: factor on the reward.
        mask: [..., T] bool, False where a step is padding: such steps count nowhere, whatever they hold, the trace
            stops before them as at a cut, and their results and gradients are 0. None: all count.
        time_dim: which dimension of all tensors, and of the results, is time. 0 for buffers [T, B]: no shape could tell
            them from [B, T].

    `next_values` makes next_value of the buffers that most training loops keep. Without other dimensions one
    trajectory [T] is taken. Any strides; [T, B] is read and written as it lies, without a copy. [A, T, B], with time in
    between, is copied first, and so is on CUDA an input whose strides are not those of reward.

    Returns:
        (advantage, value_target), [..., T] in the dtype to which reward, value and next_value promote. Arithmetic is
        float32, float64 for float64; tensors of gamma and lam are converted to it.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, gamma or lam.

    Source: Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation".
    """
    axis = check_trajectories(time_dim, terminated, truncated, mask, reward=reward, value=value, next_value=next_value)
    gamma, gammas = factor_of("gamma", gamma, reward)
    lam, lams = factor_of("lam", lam, reward)
    reward_scale = checks.number("reward_scale", reward_scale)
    truncated, value, next_value, reward, gammas, lams = counted(
        mask, axis, truncated, value, next_value, reward, gammas, lams
    )
    value, next_value, reward = promoted(value, next_value, reward)
    advantage, target = ops.gae(
        rows_of(value, axis), rows_of(next_value, axis), rows_of(reward, axis), *flags_of(terminated, truncated, axis),
        None, *factors_of(reward, axis, gammas, lams), gamma, lam, 1.0, 1.0, reward_scale,
    )  # fmt: skip
    return like(advantage, reward, axis), like(target, reward, axis)


def vtrace(
    log_ratio: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    *,
    gamma: float | Tensor = 0.99,
    lam: float | Tensor = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    reward_scale: float = 1.0,
    mask: Tensor | None = None,
    time_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """V-trace along `time_dim`, the last dimension unless it is named: [..., T]. Corrects off-policy data.

    With ratio = exp(log_ratio), rho = min(rho_clip, ratio), c = min(c_clip, ratio) and delta_t as in `gae`:

        value_target_t = value_t + rho_t * delta_t + gamma * lam * c_t * (1 - terminated_t) * (1 - truncated_t)
                                                     * (value_target_{t+1} - value_{t+1})
        advantage_t = rho_t * (reward_scale * reward_t + gamma * (1 - terminated_t) * next_target_t - value_t)

    next_target_t is next_value_t + lam * (value_target_{t+1} - value_{t+1}), that is value_target_{t+1} where
    next_value_t is value_{t+1} and lam is 1, and the bare next_value_t where step t is truncated or the last one.

    Differentiable in reward, value and next_value, as these formulas are with constant importance weights; detach the
    results to use them as constants.

    Args:
        log_ratio: [..., T] log-probability of the action under the learner's policy less that under the behaviour
            policy; a constant for autograd.
        reward, value, next_value, terminated, truncated, gamma, lam, reward_scale, mask, time_dim: as in `gae`; lam is
            1 in the paper's algorithm.
        rho_clip: limit of the weight of a step; math.inf sets none.
        c_clip: limit of the weight with which later steps count.

    Returns:
        (advantage, value_target), [..., T] in the dtype to which log_ratio, reward, value and next_value promote.
        Arithmetic is float32, float64 for float64.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, gamma, lam or limit.

    Source: Espeholt et al. 2018, "IMPALA: scalable distributed deep-RL with importance weighted actor-learner
    architectures".
    """
    tensors = {"reward": reward, "log_ratio": log_ratio, "value": value, "next_value": next_value}
    axis = check_trajectories(time_dim, terminated, truncated, mask, **tensors)
    gamma, gammas = factor_of("gamma", gamma, reward)
    lam, lams = factor_of("lam", lam, reward)
    reward_scale = checks.number("reward_scale", reward_scale)
    rho_clip = checks.number("rho_clip", rho_clip, 0, finite=False)
    c_clip = checks.number("c_clip", c_clip, 0, finite=False)
    truncated, value, next_value, reward, log_ratio, gammas, lams = counted(
        mask, axis, truncated, value, next_value, reward, log_ratio, gammas, lams
    )
    value, next_value, reward, log_ratio = promoted(value, next_value, reward, constant(log_ratio))
    advantage, target = ops.vtrace(
        rows_of(value, axis), rows_of(next_value, axis), rows_of(reward, axis), *flags_of(terminated, truncated, axis),
        rows_of(log_ratio, axis), *factors_of(reward, axis, gammas, lams), gamma, lam, rho_clip, c_clip, reward_scale,
    )  # fmt: skip
    return like(advantage, reward, axis), like(target, reward, axis)


def td_lambda(
    reward: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    *,
    gamma: float | Tensor = 0.99,
    lam: float | Tensor = 0.95,
    reward_scale: float = 1.0,
    mask: Tensor | None = None,
    time_dim: int = -1,
) -> Tensor:
    """TD(lambda) returns along `time_dim`, the last dimension unless it is named: [..., T].

        return_t = reward_scale * reward_t
                   + gamma * (1 - terminated_t) * ((1 - lam) * next_value_t + lam * return_{t+1})

    They are what a critic is trained towards. Where step t is truncated or the last one, next_value_t stands in for
    return_{t+1}. With lam=1 this is the discounted Monte-Carlo return, bootstrapped where an episode is cut; with lam=0
    it is the target of one step.

    Differentiable in reward and next_value, as the formula is; detach the result to use it as a constant.

    Args:
        reward: [..., T] float32, float16, bfloat16 or float64.
        next_value, terminated, truncated, gamma, lam, reward_scale, mask, time_dim: as in `gae`.

    Returns:
        [..., T] in the dtype to which reward and next_value promote. Arithmetic is float32, float64 for float64.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, gamma or lam.

    Source: Sutton 1988, "Learning to predict by the methods of temporal differences".
    """
    axis = check_trajectories(time_dim, terminated, truncated, mask, reward=reward, next_value=next_value)
    gamma, gammas = factor_of("gamma", gamma, reward)
    lam, lams = factor_of("lam", lam, reward)
    reward_scale = checks.number("reward_scale", reward_scale)
    truncated, next_value, reward, gammas, lams = counted(mask, axis, truncated, next_value, reward, gammas, lams)
    next_value, reward = promoted(next_value, reward)
    returns = ops.td_lambda(
        rows_of(next_value, axis), rows_of(reward, axis), *flags_of(terminated, truncated, axis),
        *factors_of(reward, axis, gammas, lams), gamma, lam, reward_scale,
    )  # fmt: skip
    return like(returns, reward, axis)


def next_values(
    value: Tensor,
    last_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    final_value: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    time_dim: int = -1,
) -> Tensor:
    """The next_value of `gae`, `vtrace` and `td_lambda`, from the values of the states in which steps begin.

    Where a step ends no episode, that is the value with which the next step begins, after the last step last_value. At
    the end of an episode the next step begins in another one.

    Args:
        value: [..., T] along time_dim, float32, float16, bfloat16 or float64.
        last_value: [...], value without time_dim, of the state in which the last step ends.
        terminated, truncated: as in `gae`. Flags that say where an episode begins, as many buffers keep them, are those
            of the step before.
        final_value: [..., T], value of the last observation of an episode, read where a step is truncated. None: 0, so
            that a cut counts as an end.
        mask: as in `gae`. Where no later step of a row counts, a step is its last one: after it comes last_value.
        time_dim: which dimension is time.

    Returns:
        [..., T] in the dtype to which the values promote, 0 where terminated and where padding; differentiable in all
        of them.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device.
    """
    final = {} if final_value is None else {"final_value": final_value}
    axis = check_trajectories(time_dim, terminated, truncated, mask, value=value, **final)
    checks.check_floating("last_value", last_value)
    rows = [size for dim, size in enumerate(value.shape, -value.dim()) if dim != axis]
    if list(last_value.shape) != rows:
        raise ValueError(
            f"last_value must have the shape of value without time, {rows}, it was {list(last_value.shape)}."
        )
    checks.check_device("last_value", last_value, "value", value.device)
    value, last_value, final_value = promoted(value, last_value, final_value)
    with without_autocast(value):  # which refuses to cat float16 on the CPU
        following = torch.cat([value, last_value.unsqueeze(axis)], axis).narrow(axis, 1, value.shape[axis])
    if mask is not None:
        later = mask.flip(axis).cumsum(axis).flip(axis) > mask  # of those from a step on, one beside itself
        following = torch.where(later, following, last_value.unsqueeze(axis))
    if truncated is not None:
        following = torch.where(nonzero(truncated), 0 if final_value is None else final_value, following)
    stop = nonzero(terminated)
    return torch.where(stop if mask is None else stop | ~mask, 0, following)


def check_trajectories(
    time_dim: int, terminated: Tensor, truncated: Tensor | None, mask: Tensor | None, **tensors: Tensor
) -> int:
    """Floating-point tensors and flags of one shape. Returns which dimension of it is time, counted from the end."""
    checks.check_alike(**tensors)
    name, first = next(iter(tensors.items()))
    dims = first.dim()
    if dims == 0:
        raise ValueError(f"{name} must have the shape [..., T], it was [].")
    time_dim = checks.integer("time_dim", time_dim)
    if not -dims <= time_dim < dims:
        raise ValueError(f"time_dim must be in [{-dims}, {dims}) for {name} = {list(first.shape)}, it was {time_dim}.")
    flags = {"terminated": terminated} | ({} if truncated is None else {"truncated": truncated})
    for flag_name, flag in flags.items():
        checks.check_real(flag_name, flag)
        checks.check_beside(flag_name, flag, name, first)
    checks.check_mask("mask", mask, name, first)
    return time_dim if time_dim < 0 else time_dim - dims


def factor_of(name: str, factor: float | Tensor, reward: Tensor) -> tuple[float, Tensor | None]:
    """gamma or lam: a number in [0, 1], or the tensor that stands in its place."""
    if not isinstance(factor, Tensor):
        return checks.number(name, factor, 0, 1), None
    checks.check_floating(name, factor)
    if factor.requires_grad:
        raise ValueError(f"{name} must be a constant, it required a gradient; .detach() makes it one.")
    sizes = zip(reversed(factor.shape), reversed(reward.shape), strict=False)
    if factor.dim() > reward.dim() or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(
            f"{name} must broadcast to the shape of reward = {list(reward.shape)}, it was {list(factor.shape)}."
        )
    checks.check_device(name, factor, "reward", reward.device)
    return 1.0, factor


def factors_of(reward: Tensor, axis: int, *factors: Tensor | None) -> list[Tensor | None]:
    """Rows [N, T] of each of the factors that is a tensor, in the dtype of the arithmetic; views where possible."""
    dtype = accumulate_dtype(reward)
    return [None if factor is None else rows_of(factor.to(dtype).expand(reward.shape), axis) for factor in factors]


def counted(mask: Tensor | None, axis: int, truncated: Tensor | None, *tensors: Any) -> tuple[Any, ...]:
    """truncated and the tensors such that padding is steps of zeros that hand nothing on; None stays None.

    Where the next step is padding the episode is cut, so that its own next value counts. After the last step the trace
    stops in any case.
    """
    if mask is None:
        return truncated, *tensors
    padding = ~mask
    cut = padding | padding.roll(-1, axis)
    truncated = cut if truncated is None else cut | nonzero(truncated)
    return truncated, *[None if tensor is None else torch.where(mask, tensor, 0) for tensor in tensors]


def nonzero(flag: Tensor) -> Tensor:
    return flag if flag.dtype == torch.bool else flag != 0


def rows_of(tensor: Tensor, axis: int) -> Tensor:
    """tensor, time along `axis`, as [N, T]."""
    if axis != -1:
        tensor = tensor.movedim(axis, -1)
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def flags_of(terminated: Tensor, truncated: Tensor | None, axis: int) -> tuple[Tensor, Tensor | None]:
    """Both as bool rows."""
    return rows_of(nonzero(terminated), axis), None if truncated is None else rows_of(nonzero(truncated), axis)


def like(rows: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """rows [N, T] in the shape of tensor."""
    if tensor.dim() != 2:
        rows = rows.reshape(tensor.movedim(axis, -1).shape)
    return rows if axis == -1 else rows.movedim(-1, axis)
