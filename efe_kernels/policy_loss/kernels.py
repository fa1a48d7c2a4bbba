"""The Triton kernels of policy_gradient_loss and their launchers.

One launch where all elements fit a tile; otherwise one program per tile leaves partial sums, which a second launch adds
up in a fixed order. The backward pass recomputes from the inputs in one launch.

The tensors come to a kernel in the tuples below and in the reference's Inputs, whose tensors are all [N].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.common.moments import (
    NUM_MOMENTS,
    add_rows,
    difference,
    join_moments,
    load_moments,
    load_rows,
    merge_moments,
    moments,
    store_moments,
    store_row,
)
from efe_kernels.common.triton import OPTIONS, flat, launch_guard, load, members, store
from efe_kernels.policy_loss.reference import Inputs, Settings

TILE_LIMIT = 4096
# Of so many parts at a time the second launch adds up the sums; its registers hold no more.
PARTS_LIMIT = 1024


class Losses(NamedTuple):
    """Or their upstream gradients, None where there is none."""

    total: Any  # []
    policy: Any  # []
    value: Any  # []
    entropy: Any  # []


class Gradients(NamedTuple):
    """None where a gradient is not asked for."""

    entropy: Any  # [N]
    log_prob: Any  # [N]
    value: Any  # [N]


class Sums(NamedTuple):
    """Over the elements that count."""

    policy: Any
    value: Any
    entropy: Any
    clipped: Any
    divergence: Any


NUM_SUMS = tl.constexpr(len(Sums._fields))


class Partial(NamedTuple):
    """What the parts leave to the second launch."""

    sums: Any  # [parts, NUM_SUMS]
    moments: Any  # [2, parts, NUM_MOMENTS], those of the critic's error and of its target
    parts: int


@triton.jit
def total_of(x):
    """The sum of [1, TILE] as a scalar."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def excess_exponential(x):
    """exp(x) - 1 - x, the estimate of the KL divergence, by its series where the difference would cancel."""
    series = 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = (series * x + 0.5) * x * x
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1.0 - x)


@triton.jit
def times(x, weight):
    """x · weight, and 0 where the weight is 0, also for an infinite x: an advantage of 0 asks for nothing."""
    return tl.where(weight == 0.0, difference(x, x), x * weight)


@triton.jit
def surrogate(inputs, offset, member, advantage, clip):
    """Loss, clipped or not and KL estimate of each element; 0 where it does not count."""
    log_prob = load(inputs.log_prob, offset, member)
    if inputs.old_log_prob is None:
        loss = -times(log_prob, advantage)
        clipped = tl.zeros_like(loss)
        divergence = tl.zeros_like(loss)
    else:
        log_ratio = log_prob - load(inputs.old_log_prob, offset, member)
        ratio = tl.exp(log_ratio)
        limited = tl.where(ratio > 1.0 + clip, 1.0 + clip, tl.where(ratio < 1.0 - clip, 1.0 - clip, ratio))
        loss = -tl.minimum(times(ratio, advantage), times(limited, advantage))
        clipped = (tl.abs(ratio - 1.0) > clip).to(tl.float32)
        divergence = tl.where(ratio == float("inf"), ratio, excess_exponential(log_ratio))
    return tl.where(member, loss, 0.0), tl.where(member, clipped, 0.0), tl.where(member, divergence, 0.0)


@triton.jit
def store_losses(
    losses,
    diagnostics_ptr,  # [4]
    sums,
    error,
    target,
    settings,
):
    """error, target: the Moments [1] of the critic's error and of its target."""
    count = tl.sum(error.count, axis=0)
    unexplained = tl.sum(error.squares, axis=0)
    variance = tl.sum(target.squares, axis=0)
    some = tl.maximum(count, 1.0)
    policy = sums.policy / some
    value = sums.value / some
    entropy = sums.entropy / some
    tl.store(losses.total, policy + times(value, settings.value_coef) - times(entropy, settings.entropy_coef))
    tl.store(losses.policy, policy)
    tl.store(losses.value, value)
    tl.store(losses.entropy, entropy)
    explained = 1.0 - unexplained / tl.where(variance == 0, 1.0, variance)
    explained = tl.where(variance == 0, 0.0, explained)
    store_row(diagnostics_ptr, (sums.clipped / some, sums.divergence / some, explained, count))


@triton.jit
def policy_gradient_loss_kernel(
    entropy_ptr,  # [N]
    inputs,
    partial,  # or None: one program has everything
    losses,
    diagnostics_ptr,  # [4]
    numel,
    settings,
    TILE: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    offset = part * TILE + tl.arange(0, TILE)[None, :]
    member = members(inputs.mask, offset, offset < numel)
    advantage = load(inputs.advantage, offset, member)
    loss, clipped, divergence = surrogate(inputs, offset, member, advantage, settings.clip)
    value_target = load(inputs.value_target, offset, member)
    error = value_target - load(inputs.value, offset, member)
    error_moments = moments(error, member)
    target_moments = moments(value_target, member)
    entropy_sum = total_of(load(entropy_ptr, offset, member))
    sums = Sums(total_of(loss), total_of(error * error), entropy_sum, total_of(clipped), total_of(divergence))
    if partial is None:
        store_losses(losses, diagnostics_ptr, sums, error_moments, target_moments, settings)
    else:
        store_row(partial.sums + part * NUM_SUMS, sums)
        store_moments(partial.moments + part * NUM_MOMENTS, error_moments)
        store_moments(partial.moments + (partial.parts + part) * NUM_MOMENTS, target_moments)


# One program: each lane adds up every PARTS-th part, then the lanes are added up. A round of the loop stands for
# PARTS * TILE_LIMIT elements, which the first launch has read: beside that it is short, and saves launches of a tree.
@triton.jit
def policy_gradient_loss_finish_kernel(
    partial,
    losses,
    diagnostics_ptr,  # [4]
    settings,
    PARTS: tl.constexpr,
):
    parts = partial.parts
    part = tl.arange(0, PARTS)[None, :]
    target_ptr = partial.moments + parts.to(tl.int64) * NUM_MOMENTS
    sums = load_rows(partial.sums, part, parts, NUM_SUMS)
    error = load_moments(partial.moments, part, parts)
    target = load_moments(target_ptr, part, parts)
    for first in range(PARTS, parts, PARTS):
        sums = add_rows(sums, load_rows(partial.sums, first + part, parts, NUM_SUMS))
        error = join_moments(error, load_moments(partial.moments, first + part, parts))
        target = join_moments(target, load_moments(target_ptr, first + part, parts))
    policy, value, entropy, clipped, divergence = sums
    sums = Sums(total_of(policy), total_of(value), total_of(entropy), total_of(clipped), total_of(divergence))
    store_losses(losses, diagnostics_ptr, sums, merge_moments(error), merge_moments(target), settings)


@triton.jit
def gradient_of_mean(
    grad_total_ptr,  # [] or None
    grad_part_ptr,  # [] or None
    weight,
    count,
):
    """Gradient of one element of a part from those of the total, in which it has a weight, and of the part itself."""
    gradient = 0.0
    if grad_total_ptr is not None:
        gradient += weight * tl.load(grad_total_ptr)
    if grad_part_ptr is not None:
        gradient += tl.load(grad_part_ptr)
    return gradient / tl.maximum(count, 1.0)


# Over n elements that count, with ratio = exp(log_prob - old_log_prob), so d ratio = ratio d log_prob:
#   policy  = mean of -min(ratio A, clamp(ratio) A): -A ratio / n where the minimum is not the constant clamp, which it
#             is for A > 0 above 1 + clip and for A < 0 below 1 - clip; without old_log_prob -A / n
#   value   = mean of (value - target)²: 2 (value - target) / n
#   entropy = mean of entropy: 1 / n
# each times the gradient of its own output and of the total, in which the weights are 1, value_coef and -entropy_coef.
@triton.jit
def policy_gradient_loss_backward_kernel(
    upstream,
    diagnostics_ptr,  # [4]
    inputs,
    gradients,
    numel,
    settings,
    TILE: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < numel
    member = members(inputs.mask, offset, inside)
    count = tl.load(diagnostics_ptr + 3)
    if gradients.log_prob is not None:
        slope = load(inputs.advantage, offset, member)
        if inputs.old_log_prob is not None:
            ratio = tl.exp(load(inputs.log_prob, offset, member) - load(inputs.old_log_prob, offset, member))
            clip = settings.clip
            clipped = ((slope > 0) & (ratio > 1.0 + clip)) | ((slope < 0) & (ratio < 1.0 - clip))
            slope = tl.where(clipped, 0.0, times(ratio, slope))
        gradient = -times(slope, gradient_of_mean(upstream.total, upstream.policy, 1.0, count))
        store(gradients.log_prob, offset, tl.where(member, gradient, 0.0), inside)
    if gradients.value is not None:
        error = load(inputs.value, offset, member) - load(inputs.value_target, offset, member)
        gradient = times(2.0 * error, gradient_of_mean(upstream.total, upstream.value, settings.value_coef, count))
        store(gradients.value, offset, tl.where(member, gradient, 0.0), inside)
    if gradients.entropy is not None:
        gradient = gradient_of_mean(upstream.total, upstream.entropy, -settings.entropy_coef, count)
        store(gradients.entropy, offset, tl.where(member, gradient, 0.0), inside)


def policy_gradient_loss_forward(
    entropy: Tensor, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the reference."""
    numel = entropy.numel()
    tile = min(max(triton.next_power_of_2(numel), 128), TILE_LIMIT)
    parts = max(triton.cdiv(numel, tile), 1)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=entropy.device)

    losses, diagnostics = Losses(new(), new(), new(), new()), new(4)
    partial = None
    if parts > 1:
        partial = Partial(new(parts, NUM_SUMS.value), new(2, parts, NUM_MOMENTS.value), parts)
    warps = 8 if tile == TILE_LIMIT else 4
    with launch_guard(entropy):
        policy_gradient_loss_kernel[(parts,)](
            flat(entropy), Inputs(*map(flat, inputs)), partial, losses, diagnostics, numel, settings,
            TILE=tile, num_warps=warps, **OPTIONS,
        )  # fmt: skip
        if partial is not None:
            policy_gradient_loss_finish_kernel[(1,)](
                partial, losses, diagnostics, settings,
                PARTS=min(triton.next_power_of_2(parts), PARTS_LIMIT), num_warps=4, **OPTIONS,
            )  # fmt: skip
    return *losses, diagnostics


def policy_gradient_loss_backward(
    grads: Sequence[Tensor | None], needs: list[bool], diagnostics: Tensor, inputs: Inputs, settings: Settings
) -> list[Tensor]:
    """See the reference."""
    log_prob = inputs.log_prob
    numel = log_prob.numel()
    found = Gradients(*[log_prob.new_empty(log_prob.shape) if need else None for need in needs])
    if numel > 0:
        with launch_guard(log_prob):
            policy_gradient_loss_backward_kernel[(triton.cdiv(numel, 1024),)](
                Losses(*grads), diagnostics, Inputs(*map(flat, inputs)), found, numel, settings,
                TILE=1024, num_warps=4, **OPTIONS,
            )  # fmt: skip
    return [gradient for gradient in found if gradient is not None]
