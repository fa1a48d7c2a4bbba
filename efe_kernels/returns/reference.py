"""gae, vtrace and td_lambda as loops over time in plain PyTorch: the definition, and what serves without a kernel.

All tensors are [N, T] of one floating dtype, and bool for terminated and truncated. The forwards are differentiable by
autograd and pass through the transforms of torch.func; the backwards are the same derivatives written out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from efe_kernels.common.library import accumulate_dtype


class Transitions(NamedTuple):
    """What says how far a step looks ahead."""

    terminated: Tensor
    truncated: Tensor | None
    log_ratio: Tensor | None  # None: gae, else vtrace


class Settings(NamedTuple):
    gamma: float
    lam: float  # 1 in vtrace
    rho_clip: float  # of vtrace
    c_clip: float  # of vtrace
    reward_scale: float


class Trace(NamedTuple):
    advantage: Tensor
    value_target: Tensor


def trace_forward(
    value: Tensor, next_value: Tensor, reward: Tensor, transitions: Transitions, settings: Settings
) -> Trace:
    """Advantage and value target, from the errors reward + gamma · next_value · (1 - terminated) - value."""
    dtype = accumulate_dtype(reward)
    bootstrap = passed_on(settings.gamma, transitions.terminated, next_value.to(dtype))
    error = reward.to(dtype) * settings.reward_scale + bootstrap - value.to(dtype)
    loop = gae if transitions.log_ratio is None else vtrace
    advantage, excess = loop(error, transitions, settings)
    return Trace(advantage.to(reward.dtype), (excess + value).to(reward.dtype))


def trace_backward(
    grad_advantage: Tensor | None,
    grad_value_target: Tensor | None,
    needs: list[bool],
    transitions: Transitions,
    settings: Settings,
) -> list[Tensor]:
    """Gradients of value and next_value, those of them that are needed; the derivation stands beside the kernel."""
    upstream = given(grad_advantage, grad_value_target)
    zero = torch.zeros_like(upstream, dtype=accumulate_dtype(upstream))
    to_advantage, to_target = (
        zero if grad is None else grad.to(zero.dtype) for grad in (grad_advantage, grad_value_target)
    )
    loop = gae_backward if transitions.log_ratio is None else vtrace_backward
    grad_error = loop(to_advantage, to_target, transitions, settings)
    terminated, found = transitions.terminated, []
    if needs[0]:
        found.append((to_target - grad_error).to(upstream.dtype))
    if needs[1]:
        found.append(passed_on(settings.gamma, terminated, grad_error).to(upstream.dtype))
    return found


def given(grad_advantage: Tensor | None, grad_value_target: Tensor | None) -> Tensor:
    """One of the two upstream gradients, which are alike."""
    found = grad_advantage if grad_advantage is not None else grad_value_target
    assert found is not None, "an op's backward is called with at least one gradient"
    return found


def gae(error: Tensor, transitions: Transitions, settings: Settings) -> tuple[Tensor, Tensor]:
    """advantage_t = error_t + gamma · lam · advantage_{t+1} within an episode, which value_target - value is, too."""
    stop = boundaries(transitions)
    advantages: list[Tensor] = []
    following = error.new_zeros(error.shape[0])
    for t in reversed(range(error.shape[1])):
        following = error[:, t] + passed_on(settings.gamma * settings.lam, stop[:, t], following)
        advantages.append(following)
    advantage = along_time(advantages[::-1], error)
    return advantage, advantage


def gae_backward(to_advantage: Tensor, to_target: Tensor, transitions: Transitions, settings: Settings) -> Tensor:
    """Gradient of the error."""
    stop = boundaries(transitions)
    grad_error: list[Tensor] = []
    carried = to_advantage.new_zeros(to_advantage.shape[0])
    for t in range(to_advantage.shape[1]):
        carried = to_advantage[:, t] + to_target[:, t] + carried
        grad_error.append(carried)
        carried = passed_on(settings.gamma * settings.lam, stop[:, t], carried)
    return along_time(grad_error, to_advantage)


def vtrace(error: Tensor, transitions: Transitions, settings: Settings) -> tuple[Tensor, Tensor]:
    """With x_t = v_target_t - value_t: x_t = rho_t error_t + gamma c_t x_{t+1} within an episode.

    advantage_t = rho_t (reward_t + gamma · v_target_{t+1} - value_t), where v_target_{t+1} is next_value_t + x_{t+1}.
    """
    rho, c = importance(transitions, settings, error.dtype)
    stop = boundaries(transitions) | (settings.gamma == 0)
    delta = rho * error
    advantages: list[Tensor] = []
    excesses: list[Tensor] = []
    following = delta.new_zeros(delta.shape[0])
    for t in reversed(range(delta.shape[1])):
        advantages.append(delta[:, t] + passed_on(settings.gamma * rho[:, t], stop[:, t], following))
        following = delta[:, t] + passed_on(settings.gamma * c[:, t], stop[:, t], following)
        excesses.append(following)
    return along_time(advantages[::-1], delta), along_time(excesses[::-1], delta)


def vtrace_backward(to_advantage: Tensor, to_target: Tensor, transitions: Transitions, settings: Settings) -> Tensor:
    """Gradient of the error."""
    rho, c = importance(transitions, settings, to_advantage.dtype)
    stop = boundaries(transitions) | (settings.gamma == 0)
    grad_error: list[Tensor] = []
    carried = to_advantage.new_zeros(to_advantage.shape[0])
    for t in range(to_advantage.shape[1]):
        carried = to_target[:, t] + carried
        grad_error.append(rho[:, t] * (carried + to_advantage[:, t]))
        carried = passed_on(settings.gamma * c[:, t], stop[:, t], carried)
        carried = carried + passed_on(settings.gamma * rho[:, t], stop[:, t], to_advantage[:, t])
    return along_time(grad_error, to_advantage)


class Ends(NamedTuple):
    """Where an episode ends."""

    terminated: Tensor
    truncated: Tensor | None


class TDLambdaSettings(NamedTuple):
    gamma: float
    lam: float
    reward_scale: float


def td_lambda_forward(next_value: Tensor, reward: Tensor, ends: Ends, settings: TDLambdaSettings) -> Tensor:
    """return_t = reward_t + gamma · ((1 - lam) · next_value_t + lam · return_{t+1}) within an episode.

    Its last step, and the last of all, have next_value_t alone in these brackets, and a terminal one has nothing.
    """
    dtype = accumulate_dtype(reward)
    stop = boundaries(ends)
    steps = reward.shape[1]
    bootstrap = passed_on(own_factor(stop, settings).to(dtype), ends.terminated, next_value.to(dtype))
    delta = reward.to(dtype) * settings.reward_scale + bootstrap
    returns: list[Tensor] = []
    following = delta.new_zeros(delta.shape[0])
    for t in reversed(range(steps)):
        following = delta[:, t] + passed_on(settings.gamma * settings.lam, stop[:, t], following)
        returns.append(following)
    return along_time(returns[::-1], delta).to(reward.dtype)


def td_lambda_backward(grad_result: Tensor, ends: Ends, settings: TDLambdaSettings) -> Tensor:
    """Gradient of next_value; the derivation stands beside the kernel."""
    dtype = accumulate_dtype(grad_result)
    stop = boundaries(ends)
    arriving: list[Tensor] = []
    carried = grad_result.new_zeros(grad_result.shape[0], dtype=dtype)
    for t in range(grad_result.shape[1]):
        carried = grad_result[:, t].to(dtype) + carried
        arriving.append(carried)
        carried = passed_on(settings.gamma * settings.lam, stop[:, t], carried)
    gradient = along_time(arriving, grad_result.to(dtype))
    return passed_on(own_factor(stop, settings).to(dtype), ends.terminated, gradient).to(grad_result.dtype)


def own_factor(stop: Tensor, settings: TDLambdaSettings) -> Tensor:
    """What next_value_t counts for where it counts, [N, T] float64: the return stops after the last step."""
    stop = stop | (torch.arange(stop.shape[1], device=stop.device) == stop.shape[1] - 1)
    whole = torch.full((), settings.gamma, dtype=torch.float64, device=stop.device)
    return torch.where(stop, whole, settings.gamma * (1 - settings.lam))


def along_time(steps: list[Tensor], like: Tensor) -> Tensor:
    """Steps [N] side by side, [N, T]; without a step `like`, which is [N, 0]."""
    return torch.stack(steps, 1) if steps else like


def passed_on(factor: float | Tensor, stop: Tensor, x: Tensor) -> Tensor:
    """factor · x, but 0 where the trace stops or the factor is 0, even for an x that is not finite."""
    return torch.where(stop | (factor == 0), 0, factor * x)


def boundaries(ends: Transitions | Ends) -> Tensor:
    """Where the trace stops."""
    return ends.terminated if ends.truncated is None else ends.terminated | ends.truncated


def importance(transitions: Transitions, settings: Settings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The clipped weights rho and c of vtrace."""
    assert transitions.log_ratio is not None, "gae has no importance weights"
    ratio = transitions.log_ratio.to(dtype).exp()
    return ratio.clamp(max=settings.rho_clip), ratio.clamp(max=settings.c_clip)
