"""The policy-gradient loss in plain PyTorch: the definition, and what serves where no kernel exists.

All tensors have one shape and one floating dtype; mask is bool.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from efe_kernels.common.library import accumulate_dtype


class Inputs(NamedTuple):
    """What both passes read. The entropy, whose mean is all that counts, is no part of it."""

    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    value_target: Tensor
    old_log_prob: Tensor | None
    mask: Tensor | None


class Settings(NamedTuple):
    clip: float
    value_coef: float
    entropy_coef: float


class Outputs(NamedTuple):
    """The losses are 0-d."""

    total: Tensor
    policy: Tensor
    value_loss: Tensor
    mean_entropy: Tensor
    diagnostics: Tensor  # clip_fraction, approx_kl, explained_variance, count


class Upstream(NamedTuple):
    """The gradients that arrive at the losses."""

    grad_total: Tensor | None
    grad_policy: Tensor | None
    grad_value_loss: Tensor | None
    grad_mean_entropy: Tensor | None


def policy_gradient_loss_forward(entropy: Tensor, inputs: Inputs, settings: Settings) -> Outputs:
    """The losses as means over the elements that count."""
    log_prob, value, advantage, value_target, old_log_prob, mask = inputs
    clip, value_coef, entropy_coef = settings
    dtype = accumulate_dtype(log_prob)
    members = torch.ones_like(log_prob, dtype=torch.bool) if mask is None else mask
    log_prob, value, entropy, advantage, value_target = (
        torch.where(members, tensor.to(dtype), 0) for tensor in (log_prob, value, entropy, advantage, value_target)
    )
    count = members.sum().to(dtype)

    def mean(x: Tensor) -> Tensor:
        return torch.where(members, x, 0).sum() / count.clamp(min=1)

    clip_fraction = approx_kl = torch.zeros_like(count)
    if old_log_prob is None:
        policy = mean(-times(log_prob, advantage))
    else:
        log_ratio = log_prob - torch.where(members, old_log_prob.to(dtype), 0)
        ratio = log_ratio.exp()
        # Above 1 + clip a gain is constant: autograd must not reach an exponential that overflows.
        bound = torch.where(advantage > 0, math.log(torch.finfo(dtype).max) - 1, math.inf)
        rising = torch.minimum(log_ratio, bound).exp() if clip < math.inf else ratio
        policy = mean(-torch.minimum(times(rising, advantage), times(rising.clamp(1 - clip, 1 + clip), advantage)))
        clip_fraction = mean(((ratio - 1).abs() > clip).to(dtype))
        approx_kl = mean(torch.where(ratio == math.inf, math.inf, log_ratio.expm1() - log_ratio))

    def variance_of(x: Tensor) -> Tensor:
        # Relative to the largest, so that a constant has a variance of exactly 0. The padding stands in for no element.
        largest = F.pad(torch.where(members, x, -torch.inf).flatten(), (0, 1), value=-torch.inf).amax()
        offset = torch.where(x == largest, 0, x - torch.where(count > 0, largest, 0))
        return mean((offset - mean(offset)).square())

    error = value_target - value
    value_loss, mean_entropy = mean(error.square()), mean(entropy)
    unexplained, variance = variance_of(error), variance_of(value_target)
    explained_variance = torch.where(variance == 0, 0, 1 - unexplained / variance)
    total = policy + times(value_loss, value_coef) - times(mean_entropy, entropy_coef)
    diagnostics = torch.stack([clip_fraction, approx_kl, explained_variance, count])
    return Outputs(total, policy, value_loss, mean_entropy, diagnostics)


def policy_gradient_loss_backward(
    grads: Upstream, needs: list[bool], diagnostics: Tensor, inputs: Inputs, settings: Settings
) -> list[Tensor]:
    """Gradients of entropy, log_prob and value, those of them that are needed; the derivation is beside the kernel."""
    grad_total, grad_policy, grad_value, grad_entropy = grads
    log_prob, value, advantage, value_target, old_log_prob, mask = inputs
    clip, value_coef, entropy_coef = settings
    dtype = diagnostics.dtype
    share = 1 / diagnostics[3].clamp(min=1)
    found = []
    if needs[0]:
        found.append(upstream(grad_total, -entropy_coef, grad_entropy, share).expand_as(log_prob))
    if needs[1]:
        slope = advantage.to(dtype)
        if old_log_prob is not None:
            ratio = (log_prob.to(dtype) - old_log_prob.to(dtype)).exp()
            clipped = ((slope > 0) & (ratio > 1 + clip)) | ((slope < 0) & (ratio < 1 - clip))
            slope = torch.where(clipped, 0, times(ratio, slope))
        found.append(-times(slope, upstream(grad_total, 1.0, grad_policy, share)))
    if needs[2]:
        error = value.to(dtype) - value_target.to(dtype)
        found.append(times(2 * error, upstream(grad_total, value_coef, grad_value, share)))
    if mask is not None:
        found = [torch.where(mask, gradient, 0) for gradient in found]
    return [gradient.to(log_prob.dtype).contiguous() for gradient in found]


def times(x: Tensor, weight: Tensor | float) -> Tensor:
    """x · weight, and 0 where the weight is 0, also for an infinite x: an advantage of 0 asks for nothing."""
    return torch.where((weight == 0) & ~x.isnan(), 0, x) * weight


def upstream(grad_total: Tensor | None, weight: float, grad_part: Tensor | None, share: Tensor) -> Tensor:
    """Gradient of one element of a part from those of the total, in which it has a weight, and of the part itself."""
    gradient = torch.zeros_like(share)
    if grad_total is not None:
        gradient = gradient + weight * grad_total
    if grad_part is not None:
        gradient = gradient + grad_part
    return gradient * share
