"""What the library is compared with beside plain PyTorch, which is in `plain.py`: what everybody writes, and other
libraries that do the same job.

Peers are imported where they are called, so that the suite runs without them. Those written in Triton are in
`triton_baselines.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.plain import stops
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


def torchrl_gae_loop(inputs: dict[str, Any], gamma: float, lam: float) -> tuple[Tensor, ...]:
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    reward, value, next_value, done, terminated = trajectories(inputs)
    found = generalized_advantage_estimate(gamma, lam, value, next_value, reward, done, terminated)
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


def naive_mean_pool(inputs: dict[str, Tensor]) -> tuple[Tensor]:
    """What everybody writes."""
    mask = inputs["mask"][..., None].to(inputs["hidden"].dtype)
    return ((inputs["hidden"] * mask).sum(1) / mask.sum(1),)
