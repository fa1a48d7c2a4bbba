"""The policy-gradient loss in plain PyTorch: the definition, and what serves where no kernel exists.

Tensors have the shape of log_prob and one floating dtype; mask is bool. Rows are consecutive elements: `advantage` may
have one element for each of equally long rows in place of one for each element, and `weight` always has.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from efe_kernels.common.clamp import clamp
from efe_kernels.common.library import accumulate_dtype


class Inputs(NamedTuple):
    """What both passes read. The entropy, whose mean is all that counts, is no part of it."""

    log_prob: Tensor
    advantage: Tensor  # or one for each row
    value: Tensor | None
    value_target: Tensor | None
    old_log_prob: Tensor | None
    old_value: Tensor | None
    ref_log_prob: Tensor | None
    mask: Tensor | None
    weight: Tensor | None  # of the elements of each row


class Settings(NamedTuple):
    low: float  # of the ratio, below and above which a loss and a gain are constant
    high: float
    dual_clip: float  # of the ratio, above which a loss is constant
    value_clip: float
    value_coef: float
    entropy_coef: float
    kl_coef: float
    normalizer: float  # what sums are divided by; 0: the number of elements that count


class Outputs(NamedTuple):
    """The losses are 0-d."""

    total: Tensor
    policy: Tensor
    value_loss: Tensor
    mean_entropy: Tensor
    kl: Tensor
    diagnostics: Tensor  # [6], in the order of DIAGNOSTICS


DIAGNOSTICS = ("clip_fraction", "approx_kl", "explained_variance", "clip_fraction_low", "clip_fraction_high", "count")
COUNT = DIAGNOSTICS.index("count")


class Upstream(NamedTuple):
    """The gradients that arrive at the losses."""

    grad_total: Tensor | None
    grad_policy: Tensor | None
    grad_value_loss: Tensor | None
    grad_mean_entropy: Tensor | None
    grad_kl: Tensor | None


def policy_gradient_loss_forward(entropy: Tensor | None, inputs: Inputs, settings: Settings) -> Outputs:
    dtype = accumulate_dtype(inputs.log_prob)
    members = torch.ones_like(inputs.log_prob, dtype=torch.bool) if inputs.mask is None else inputs.mask
    count = members.sum().to(dtype)
    some = count.clamp(min=1)

    def counted(tensor: Tensor) -> Tensor:
        return torch.where(members, of_elements(tensor, members).to(dtype), 0)

    def mean(x: Tensor) -> Tensor:
        return torch.where(members, x, 0).sum() / some

    def aggregate(x: Tensor) -> Tensor:
        weighted = x if inputs.weight is None else x * counted(inputs.weight)
        return torch.where(members, weighted, 0).sum() / (settings.normalizer or some)

    log_prob, advantage = counted(inputs.log_prob), counted(inputs.advantage)
    value_loss, mean_entropy, kl, clip_fraction, low, high, approx_kl, explained = [
        torch.zeros_like(count) for _ in range(8)
    ]
    if inputs.old_log_prob is None:
        policy = aggregate(-times(log_prob, advantage))
    else:
        log_ratio = log_prob - counted(inputs.old_log_prob)
        ratio = log_ratio.exp()
        policy = aggregate(-times(limited_ratio(log_ratio, advantage, settings), advantage))
        below, above = ratio < settings.low, ratio > settings.high
        clip_fraction = mean((below | above).to(dtype))
        low, high = mean((below & (advantage < 0)).to(dtype)), mean((above & (advantage > 0)).to(dtype))
        approx_kl = mean(excess_exponential(log_ratio))
    if inputs.value is not None and inputs.value_target is not None:
        value, target = counted(inputs.value), counted(inputs.value_target)
        old_value = None if inputs.old_value is None else counted(inputs.old_value)
        value_loss = aggregate(value_error(value, target, old_value, settings.value_clip).square())
        variance = variance_of(target, members, count)
        explained = torch.where(variance == 0, 0, 1 - variance_of(target - value, members, count) / variance)
    if entropy is not None:
        mean_entropy = aggregate(counted(entropy))
    if inputs.ref_log_prob is not None:
        kl = aggregate(excess_exponential(counted(inputs.ref_log_prob) - log_prob))
    total = policy + times(value_loss, settings.value_coef) - times(mean_entropy, settings.entropy_coef)
    total = total + times(kl, settings.kl_coef)
    diagnostics = torch.stack([clip_fraction, approx_kl, explained, low, high, count]).detach()
    return Outputs(total, policy, value_loss, mean_entropy, kl, diagnostics)


def policy_gradient_loss_backward(
    grads: Upstream, needs: list[bool], diagnostics: Tensor, inputs: Inputs, settings: Settings
) -> list[Tensor]:
    """Gradients of entropy, log_prob and value, those of them that are needed; the derivation is beside the kernel."""
    grad_total, grad_policy, grad_value, grad_entropy, grad_kl = grads
    dtype, count = diagnostics.dtype, diagnostics[COUNT]

    def read(tensor: Tensor) -> Tensor:
        return of_elements(tensor, inputs.log_prob).to(dtype)

    share = 1 / (torch.full_like(count, settings.normalizer) if settings.normalizer else count.clamp(min=1))
    if inputs.weight is not None:
        share = read(inputs.weight) * share
    log_prob, found = read(inputs.log_prob), []
    if needs[0]:
        found.append(upstream(grad_total, -settings.entropy_coef, grad_entropy, share).expand_as(log_prob))
    if needs[1]:
        slope = read(inputs.advantage)
        if inputs.old_log_prob is not None:
            ratio = (log_prob - read(inputs.old_log_prob)).exp()
            held = torch.where(
                slope < 0, (ratio < settings.low) | (ratio > settings.dual_clip), (slope > 0) & (ratio > settings.high)
            )
            slope = torch.where(held, 0, times(ratio, slope))
        gradient = -times(slope, upstream(grad_total, 1.0, grad_policy, share))
        if inputs.ref_log_prob is not None:
            slope = (read(inputs.ref_log_prob) - log_prob).expm1()
            gradient = gradient - times(slope, upstream(grad_total, settings.kl_coef, grad_kl, share))
        found.append(gradient)
    if needs[2] and inputs.value is not None and inputs.value_target is not None:
        value, target = read(inputs.value), read(inputs.value_target)
        error = value - target
        if inputs.old_value is not None:
            error = torch.where(is_held(value, target, read(inputs.old_value), settings.value_clip), 0, error)
        found.append(times(2 * error, upstream(grad_total, settings.value_coef, grad_value, share)))
    if inputs.mask is not None:
        found = [torch.where(inputs.mask, gradient, 0) for gradient in found]
    return [gradient.to(inputs.log_prob.dtype).contiguous() for gradient in found]


def of_elements(tensor: Tensor, like: Tensor) -> Tensor:
    """What is given for each element or for each row, for each element of `like`."""
    if tensor.shape == like.shape:
        return tensor
    rows = max(tensor.numel(), 1)
    return tensor.reshape(-1, 1).expand(-1, like.numel() // rows).reshape(like.shape)


def limited_ratio(log_ratio: Tensor, advantage: Tensor, settings: Settings) -> Tensor:
    """What the advantage is multiplied by: the ratio, constant where min(ratio A, clamp(ratio) A) is."""
    low, high, dual_clip = settings.low, settings.high, settings.dual_clip
    # Where it is constant, autograd must not reach an exponential that overflows.
    largest = math.log(torch.finfo(log_ratio.dtype).max) - 1
    gain, loss = (largest if limit < math.inf else math.inf for limit in (high, dual_clip))
    ratio = torch.minimum(log_ratio, torch.where(advantage < 0, loss, gain).to(log_ratio.dtype)).exp()
    return torch.where(advantage < 0, clamp(ratio, low, dual_clip), clamp(ratio, high=high))


def limited_value(value: Tensor, old_value: Tensor, value_clip: float) -> Tensor:
    """value, at most value_clip away from old_value; NaN where one of them is."""
    step = value - old_value
    inside = torch.where(step.isnan(), step, value)
    return torch.where(
        step > value_clip, old_value + value_clip, torch.where(step < -value_clip, old_value - value_clip, inside)
    )


def is_held(value: Tensor, target: Tensor, old_value: Tensor, value_clip: float) -> Tensor:
    """Where the larger error is that of the limited value, which does not follow value."""
    return (limited_value(value, old_value, value_clip) - target).abs() > (value - target).abs()


def value_error(value: Tensor, target: Tensor, old_value: Tensor | None, value_clip: float) -> Tensor:
    """What is squared: the error of value, or of the limited one where that is larger."""
    if old_value is None:
        return value - target
    limited = limited_value(value, old_value, value_clip).detach()
    held = is_held(value, target, old_value, value_clip) | (limited - target).isnan()
    return torch.where(held, limited, value) - target


def variance_of(x: Tensor, members: Tensor, count: Tensor) -> Tensor:
    """Of the elements that count, relative to the largest, so that a constant has a variance of exactly 0."""
    # The padding stands in for no element.
    largest = F.pad(torch.where(members, x, -torch.inf).flatten(), (0, 1), value=-torch.inf).amax()
    offset = torch.where(members & (x != largest), x - torch.where(count > 0, largest, 0), 0)
    some = count.clamp(min=1)
    return torch.where(members, (offset - offset.sum() / some).square(), 0).sum() / some


def excess_exponential(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, the estimate k3 of a KL divergence, by its series where the difference would cancel."""
    near = x.abs() < 0.1
    small = torch.where(near, x, 0)
    series = torch.ones_like(x)
    for k in range(12 if x.dtype == torch.float64 else 6, 2, -1):
        series = 1 + small / k * series
    series = small * small / 2 * series
    return torch.where(near, series, torch.where(x.exp() == math.inf, math.inf, x.expm1() - x))


def times(x: Tensor, weight: Tensor | float) -> Tensor:
    """x · weight, and 0 where the weight is 0, also for an infinite x: an advantage of 0 asks for nothing."""
    return torch.where((weight == 0) & ~x.isnan(), 0, x) * weight


def upstream(grad_total: Tensor | None, weight: float, grad_part: Tensor | None, share: Tensor) -> Tensor:
    """Gradient of one element of a part from those of the total, in which it has a weight, and of the part itself."""
    gradient = share.new_zeros(())
    if grad_total is not None:
        gradient = gradient + weight * grad_total
    if grad_part is not None:
        gradient = gradient + grad_part
    return gradient * share
