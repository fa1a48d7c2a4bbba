"""gae, vtrace and td_lambda as loops over time in plain PyTorch: the definition, and what serves without a kernel.

All tensors are [N, T] of one floating dtype, and bool for terminated and truncated; gammas and lams, which stand in the
place of the settings gamma and lam, are of the dtype of the arithmetic. The forwards are differentiable by autograd and
pass through the transforms of torch.func; the backwards are the same derivatives written out.
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
    gammas: Tensor | None = None
    lams: Tensor | None = None


class Settings(NamedTuple):
    gamma: float
    lam: float
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
    bootstrap, trace = discounts(transitions, settings, dtype)
    error = reward.to(dtype) * settings.reward_scale + passed_on(bootstrap, next_value.to(dtype)) - value.to(dtype)
    if transitions.log_ratio is None:
        advantage, excess = gae(error, trace)
    else:
        advantage, excess = vtrace(error, trace, *importance(transitions.log_ratio, settings, dtype))
    return Trace(advantage.to(reward.dtype), (excess + value).to(reward.dtype))


def trace_backward(
    grad_advantage: Tensor | None,
    grad_value_target: Tensor | None,
    needs: list[bool],
    transitions: Transitions,
    settings: Settings,
) -> list[Tensor]:
    """Gradients of value, next_value and reward, those of them that are needed; the derivation stands beside the
    kernel."""
    upstream = given(grad_advantage, grad_value_target)
    dtype = accumulate_dtype(upstream)
    zero = torch.zeros_like(upstream, dtype=dtype)
    to_advantage, to_target = (zero if grad is None else grad.to(dtype) for grad in (grad_advantage, grad_value_target))
    bootstrap, trace = discounts(transitions, settings, dtype)
    if transitions.log_ratio is None:
        grad_error = gae_backward(to_advantage, to_target, trace)
    else:
        weights = importance(transitions.log_ratio, settings, dtype)
        grad_error = vtrace_backward(to_advantage, to_target, trace, *weights)
    found = (to_target - grad_error, passed_on(bootstrap, grad_error), settings.reward_scale * grad_error)
    return [gradient.to(upstream.dtype) for gradient, need in zip(found, needs, strict=True) if need]


def given(grad_advantage: Tensor | None, grad_value_target: Tensor | None) -> Tensor:
    """One of the two upstream gradients, which are alike."""
    found = grad_advantage if grad_advantage is not None else grad_value_target
    assert found is not None, "an op's backward is called with at least one gradient"
    return found


def gae(error: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
    """advantage_t = error_t + trace_t advantage_{t+1}, which value_target - value is, too."""
    advantage = backward_in_time(error, trace)
    return advantage, advantage


def gae_backward(to_advantage: Tensor, to_target: Tensor, trace: Tensor) -> Tensor:
    """Gradient of the error."""
    return forward_in_time(to_advantage + to_target, trace)


def vtrace(error: Tensor, trace: Tensor, rho: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """With x_t = v_target_t - value_t: x_t = rho_t error_t + trace_t c_t x_{t+1} within an episode.

    advantage_t = rho_t (reward_t + gamma · v_target_{t+1} - value_t), where next_value_t + lam x_{t+1} stands for
    v_target_{t+1}.
    """
    delta = rho * error
    excess = backward_in_time(delta, passed_on(trace, c))
    following = torch.cat([excess[:, 1:], torch.zeros_like(excess[:, :1])], 1)
    return delta + passed_on(passed_on(trace, rho), following), excess


def vtrace_backward(to_advantage: Tensor, to_target: Tensor, trace: Tensor, rho: Tensor, c: Tensor) -> Tensor:
    """Gradient of the error."""
    handed_on = passed_on(passed_on(trace, rho), to_advantage)
    arriving = torch.cat([torch.zeros_like(handed_on[:, :1]), handed_on[:, :-1]], 1)
    return rho * (forward_in_time(to_target + arriving, passed_on(trace, c)) + to_advantage)


class Ends(NamedTuple):
    """Where an episode ends, and how far a step within it looks ahead."""

    terminated: Tensor
    truncated: Tensor | None
    gammas: Tensor | None = None
    lams: Tensor | None = None


class TDLambdaSettings(NamedTuple):
    gamma: float
    lam: float
    reward_scale: float


def td_lambda_forward(next_value: Tensor, reward: Tensor, ends: Ends, settings: TDLambdaSettings) -> Tensor:
    """return_t = reward_t + gamma · ((1 - lam) · next_value_t + lam · return_{t+1}) within an episode.

    Its last step, and the last of all, have next_value_t alone in these brackets, and a terminal one has nothing.
    """
    dtype = accumulate_dtype(reward)
    _, trace = discounts(ends, settings, dtype)
    own = own_factor(ends, settings, dtype)
    delta = reward.to(dtype) * settings.reward_scale + passed_on(own, next_value.to(dtype))
    return backward_in_time(delta, trace).to(reward.dtype)


def td_lambda_backward(grad_result: Tensor, needs: list[bool], ends: Ends, settings: TDLambdaSettings) -> list[Tensor]:
    """Gradients of next_value and reward, those of them that are needed; the derivation stands beside the kernel."""
    dtype = accumulate_dtype(grad_result)
    _, trace = discounts(ends, settings, dtype)
    arriving = forward_in_time(grad_result.to(dtype), trace)
    found = (passed_on(own_factor(ends, settings, dtype), arriving), settings.reward_scale * arriving)
    return [gradient.to(grad_result.dtype) for gradient, need in zip(found, needs, strict=True) if need]


def own_factor(ends: Ends, settings: TDLambdaSettings, dtype: torch.dtype) -> Tensor:
    """What next_value_t counts for, [N, T]: the return stops after the last step."""
    gamma, lam = factors(ends, settings)
    terminated = ends.terminated
    last = torch.arange(terminated.shape[1], device=terminated.device) == terminated.shape[1] - 1
    alone = but_where(terminated, gamma, dtype)
    return torch.where(stops(ends) | last, alone, but_where(terminated, gamma * (1 - lam), dtype))


def backward_in_time(term: Tensor, factor: Tensor) -> Tensor:
    """x_t = term_t + factor_t x_{t+1}, [N, T]."""
    steps: list[Tensor] = []
    following = term.new_zeros(term.shape[0])
    for t in reversed(range(term.shape[1])):
        following = term[:, t] + passed_on(factor[:, t], following)
        steps.append(following)
    return along_time(steps[::-1], term)


def forward_in_time(term: Tensor, factor: Tensor) -> Tensor:
    """The adjoint of `backward_in_time`: s_t = term_t + factor_{t-1} s_{t-1}."""
    steps: list[Tensor] = []
    carried = term.new_zeros(term.shape[0])
    for t in range(term.shape[1]):
        steps.append(term[:, t] + carried)
        carried = passed_on(factor[:, t], steps[-1])
    return along_time(steps, term)


def along_time(steps: list[Tensor], like: Tensor) -> Tensor:
    """Steps [N] side by side, [N, T]; without a step `like`, which is [N, 0]."""
    return torch.stack(steps, 1) if steps else like


def passed_on(factor: Tensor, x: Tensor) -> Tensor:
    """factor · x, but 0 where the factor is 0, even for an x that is not finite."""
    return torch.where(factor == 0, 0, factor * x)


def discounts(
    ends: Transitions | Ends, settings: Settings | TDLambdaSettings, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of next_value_t and of what follows step t, [N, T]: gamma and gamma · lam, 0 where the one or the other ends."""
    gamma, lam = factors(ends, settings)
    return but_where(ends.terminated, gamma, dtype), but_where(stops(ends), gamma * lam, dtype)


def factors(ends: Transitions | Ends, settings: Settings | TDLambdaSettings) -> tuple[float | Tensor, float | Tensor]:
    """gamma and lam, those of each step where there are any."""
    gamma = settings.gamma if ends.gammas is None else ends.gammas
    return gamma, settings.lam if ends.lams is None else ends.lams


def but_where(stop: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """factor, 0 where stop."""
    if not isinstance(factor, Tensor):
        factor = torch.full((), factor, dtype=dtype, device=stop.device)
    return torch.where(stop, torch.zeros_like(factor), factor)


def stops(ends: Transitions | Ends) -> Tensor:
    """Where the trace stops."""
    return ends.terminated if ends.truncated is None else ends.terminated | ends.truncated


def importance(log_ratio: Tensor, settings: Settings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The clipped weights rho and c of vtrace."""
    ratio = log_ratio.to(dtype).exp()
    return ratio.clamp(max=settings.rho_clip), ratio.clamp(max=settings.c_clip)
