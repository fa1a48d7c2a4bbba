"""What the library is compared with, besides its reference: the usual ways, and other libraries that do the same job.

Peers are imported where they are called, so that the suite runs without them. Those written in Triton are in
`triton_baselines.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efe_kernels.efe_loss.reference import log_preference, log_softmax


def liger_divergence(inputs: dict[str, Any], beta: float) -> tuple[Tensor]:
    """Mean divergence of the plan from the backward plan (beta 0.5) or from the preference (beta 1: KL(q || c))."""
    from liger_kernel.transformers.functional import liger_jsd

    logits = inputs["logits"]
    outcomes = logits.shape[-1]
    if beta == 1.0:
        other = log_preference(inputs["preference_logits"], None)[:, None].expand(logits.shape)
    else:
        other = log_softmax(inputs["backward_logits"])
    rows = torch.log_softmax(logits, -1).reshape(-1, outcomes)
    return (liger_jsd(rows, other.reshape(-1, outcomes), beta=beta),)


def liger_cross_entropy(inputs: dict[str, Any]) -> tuple[Tensor]:
    from liger_kernel.transformers.functional import liger_cross_entropy as cross_entropy

    final = inputs["logits"][:, -1]
    # Liger writes the gradient over the logits that it is given: it gets a copy.
    rows = final.reshape(-1, final.shape[-1]).clone()
    return (cross_entropy(rows, inputs["target"].reshape(-1).long()),)


def torchrl_gae(inputs: dict[str, Any], gamma: float, lam: float) -> tuple[Tensor, ...]:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    reward, value, next_value, done, terminated = trajectories(inputs)
    found = vec_generalized_advantage_estimate(gamma, lam, value, next_value, reward, done, terminated)
    return tuple(tensor[..., 0] for tensor in found)


def torchrl_vtrace(inputs: dict[str, Any], gamma: float) -> tuple[Tensor, ...]:
    from torchrl.objectives.value.functional import vtrace_advantage_estimate

    reward, value, next_value, done, terminated = trajectories(inputs)
    log_ratio = inputs["log_ratio"][..., None]
    found = vtrace_advantage_estimate(
        gamma, log_ratio, torch.zeros_like(log_ratio), value, next_value, reward, done, terminated
    )
    return tuple(tensor[..., 0] for tensor in found)


def torchrl_td_lambda(inputs: dict[str, Any], gamma: float, lam: float) -> tuple[Tensor, ...]:
    from torchrl.objectives.value.functional import vec_td_lambda_return_estimate

    next_value, reward, terminated = (inputs[name][..., None] for name in ("next_value", "reward", "terminated"))
    done = stops(inputs)[..., None]
    return (vec_td_lambda_return_estimate(gamma, lam, next_value, reward, done, terminated)[..., 0],)


def trajectories(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """reward, value, next_value, done and terminated as torchrl takes them, [B, T, 1]."""
    *values, terminated = (inputs[name][..., None] for name in ("reward", "value", "next_value", "terminated"))
    return *values, stops(inputs)[..., None], terminated


def stops(inputs: dict[str, Any]) -> Tensor:
    """Where the trace stops."""
    terminated: Tensor = inputs["terminated"]
    truncated = inputs["truncated"]
    return terminated if truncated is None else terminated | truncated


def naive_mean_pool(inputs: dict[str, Tensor]) -> tuple[Tensor]:
    """What everybody writes."""
    mask = inputs["mask"][..., None].to(inputs["hidden"].dtype)
    return ((inputs["hidden"] * mask).sum(1) / mask.sum(1),)


def loop_gae(inputs: dict[str, Any], gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The loop over time as one writes it for torch.compile, without assignments into slices."""
    dtype = inputs["reward"].dtype
    value, delta, going_on = temporal_difference(inputs, gamma)
    advantage = backward_in_time(delta, gamma * lam * going_on)
    return advantage.to(dtype), (advantage + value).to(dtype)


def loop_vtrace(inputs: dict[str, Any], gamma: float) -> tuple[Tensor, Tensor]:
    dtype = inputs["reward"].dtype
    value, error, going_on = temporal_difference(inputs, gamma)
    weight = inputs["log_ratio"].float().exp().clamp(max=1.0)
    delta = weight * error
    excess = backward_in_time(delta, gamma * weight * going_on)
    following = torch.cat([excess[:, 1:], torch.zeros_like(excess[:, :1])], 1)
    return (delta + gamma * weight * going_on * following).to(dtype), (excess + value).to(dtype)


def temporal_difference(inputs: dict[str, Any], gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """value, reward + gamma · next_value - value and, as 0 or 1, where the trace goes on; in float32."""
    value = inputs["value"].float()
    bootstrap = gamma * (~inputs["terminated"]).float() * inputs["next_value"].float()
    return value, inputs["reward"].float() + bootstrap - value, (~stops(inputs)).float()


def backward_in_time(term: Tensor, factor: Tensor) -> Tensor:
    """x_t = term_t + factor_t x_{t+1}."""
    following = torch.zeros_like(term[:, 0])
    steps = []
    for t in reversed(range(term.shape[1])):
        following = term[:, t] + factor[:, t] * following
        steps.append(following)
    return torch.stack(steps[::-1], 1)
