"""The Triton kernels of policy_gradient_loss and their launchers.

One launch where all elements fit a tile; otherwise one program per tile leaves partial sums, which a second launch adds
up in a fixed order. The backward pass recomputes from the inputs in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.common.moments import difference, join_moments, load_moments, merge_moments, moments, store_moments
from efe_kernels.common.triton import OPTIONS, as_bytes, launch_guard
from efe_kernels.policy_loss.reference import Inputs, Settings

TILE_LIMIT = 4096
NUM_SUMS = 5
# Of so many parts at a time the second launch adds up the sums; its registers hold no more.
PARTS_LIMIT = 1024


@triton.jit
def total_of(x):
    """The sum of [1, TILE] as a scalar."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def load(
    ptr,  # [N]
    offset,
    member,
):
    return tl.load(ptr + offset, mask=member, other=0.0).to(tl.float32)


@triton.jit
def members_of(
    mask_ptr,  # [N] or None
    offset,
    numel,
):
    member = offset < numel
    if mask_ptr is not None:
        member = member & (tl.load(mask_ptr + offset, mask=member, other=0) != 0)
    return member


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
def surrogate(
    log_prob_ptr,  # [N]
    old_log_prob_ptr,  # [N] or None
    offset,
    member,
    advantage,
    clip,
):
    """Loss, clipped or not and KL estimate of each element; 0 where it does not count."""
    log_prob = load(log_prob_ptr, offset, member)
    if old_log_prob_ptr is None:
        loss = -times(log_prob, advantage)
        outside = tl.zeros_like(loss)
        divergence = tl.zeros_like(loss)
    else:
        log_ratio = log_prob - load(old_log_prob_ptr, offset, member)
        ratio = tl.exp(log_ratio)
        limited = tl.where(ratio > 1.0 + clip, 1.0 + clip, tl.where(ratio < 1.0 - clip, 1.0 - clip, ratio))
        loss = -tl.minimum(times(ratio, advantage), times(limited, advantage))
        outside = (tl.abs(ratio - 1.0) > clip).to(tl.float32)
        divergence = tl.where(ratio == float("inf"), ratio, excess_exponential(log_ratio))
    return tl.where(member, loss, 0.0), tl.where(member, outside, 0.0), tl.where(member, divergence, 0.0)


@triton.jit
def store_losses(
    total_ptr,  # []
    policy_ptr,  # []
    value_loss_ptr,  # []
    mean_entropy_ptr,  # []
    diagnostics_ptr,  # [4]
    policy_sum,
    square_sum,
    entropy_sum,
    outside_sum,
    divergence_sum,
    count,
    unexplained,
    variance,
    value_coef,
    entropy_coef,
):
    some = tl.maximum(count, 1.0)
    policy = policy_sum / some
    value_loss = square_sum / some
    mean_entropy = entropy_sum / some
    tl.store(total_ptr, policy + times(value_loss, value_coef) - times(mean_entropy, entropy_coef))
    tl.store(policy_ptr, policy)
    tl.store(value_loss_ptr, value_loss)
    tl.store(mean_entropy_ptr, mean_entropy)
    tl.store(diagnostics_ptr, outside_sum / some)
    tl.store(diagnostics_ptr + 1, divergence_sum / some)
    explained = 1.0 - unexplained / tl.where(variance == 0, 1.0, variance)
    tl.store(diagnostics_ptr + 2, tl.where(variance == 0, 0.0, explained))
    tl.store(diagnostics_ptr + 3, count)


@triton.jit
def policy_gradient_loss_kernel(
    entropy_ptr,  # [N]
    log_prob_ptr,  # [N]
    value_ptr,  # [N]
    advantage_ptr,  # [N]
    value_target_ptr,  # [N]
    old_log_prob_ptr,  # [N] or None
    mask_ptr,  # [N] or None
    sums_ptr,  # [parts, 5], or None where one program has everything
    moments_ptr,  # [2, parts, 3], or None where one program has everything
    total_ptr,  # []
    policy_ptr,  # []
    value_loss_ptr,  # []
    mean_entropy_ptr,  # []
    diagnostics_ptr,  # [4]
    numel,
    parts,
    clip,
    value_coef,
    entropy_coef,
    TILE: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    offset = part * TILE + tl.arange(0, TILE)[None, :]
    member = members_of(mask_ptr, offset, numel)
    advantage = load(advantage_ptr, offset, member)
    loss, outside, divergence = surrogate(log_prob_ptr, old_log_prob_ptr, offset, member, advantage, clip)
    value_target = load(value_target_ptr, offset, member)
    error = value_target - load(value_ptr, offset, member)
    count, error_mean, unexplained = moments(error, member)
    _, target_mean, variance = moments(value_target, member)
    entropy_sum = total_of(load(entropy_ptr, offset, member))
    if sums_ptr is None:
        store_losses(
            total_ptr, policy_ptr, value_loss_ptr, mean_entropy_ptr, diagnostics_ptr, total_of(loss),
            total_of(error * error), entropy_sum, total_of(outside), total_of(divergence), tl.sum(count, axis=0),
            tl.sum(unexplained, axis=0), tl.sum(variance, axis=0), value_coef, entropy_coef,
        )  # fmt: skip
    else:
        tl.store(sums_ptr + part * 5, total_of(loss))
        tl.store(sums_ptr + part * 5 + 1, total_of(error * error))
        tl.store(sums_ptr + part * 5 + 2, entropy_sum)
        tl.store(sums_ptr + part * 5 + 3, total_of(outside))
        tl.store(sums_ptr + part * 5 + 4, total_of(divergence))
        store_moments(moments_ptr + part * 3, count, error_mean, unexplained)
        store_moments(moments_ptr + (parts + part) * 3, count, target_mean, variance)


@triton.jit
def load_sums(
    sums_ptr,  # [parts, 5]
    part,
    parts,
):
    """The five sums of some parts; 0 past the last one."""
    base = sums_ptr + part.to(tl.int64) * 5
    there = part < parts
    return (
        tl.load(base, mask=there, other=0.0),
        tl.load(base + 1, mask=there, other=0.0),
        tl.load(base + 2, mask=there, other=0.0),
        tl.load(base + 3, mask=there, other=0.0),
        tl.load(base + 4, mask=there, other=0.0),
    )


# One program: each lane adds up every PARTS-th part, then the lanes are added up. A round of the loop stands for
# PARTS * TILE_LIMIT elements, which the first launch has read: beside that it is short, and saves launches of a tree.
@triton.jit
def policy_gradient_loss_finish_kernel(
    sums_ptr,  # [parts, 5]
    moments_ptr,  # [2, parts, 3]
    total_ptr,  # []
    policy_ptr,  # []
    value_loss_ptr,  # []
    mean_entropy_ptr,  # []
    diagnostics_ptr,  # [4]
    parts,
    value_coef,
    entropy_coef,
    PARTS: tl.constexpr,
):
    part = tl.arange(0, PARTS)[None, :]
    target_ptr = moments_ptr + parts.to(tl.int64) * 3
    loss, square, entropy, outside, divergence = load_sums(sums_ptr, part, parts)
    count, error_mean, unexplained = load_moments(moments_ptr, part, parts)
    target_count, target_mean, variance = load_moments(target_ptr, part, parts)
    for first in range(PARTS, parts, PARTS):
        sums = load_sums(sums_ptr, first + part, parts)
        loss += sums[0]
        square += sums[1]
        entropy += sums[2]
        outside += sums[3]
        divergence += sums[4]
        more, more_mean, more_squares = load_moments(moments_ptr, first + part, parts)
        count, error_mean, unexplained = join_moments(count, error_mean, unexplained, more, more_mean, more_squares)
        more, more_mean, more_squares = load_moments(target_ptr, first + part, parts)
        target_count, target_mean, variance = join_moments(
            target_count, target_mean, variance, more, more_mean, more_squares
        )
    total_count, _, unexplained_sum = merge_moments(count, error_mean, unexplained)
    _, _, variance_sum = merge_moments(target_count, target_mean, variance)
    store_losses(
        total_ptr, policy_ptr, value_loss_ptr, mean_entropy_ptr, diagnostics_ptr, total_of(loss), total_of(square),
        total_of(entropy), total_of(outside), total_of(divergence), tl.sum(total_count, axis=0),
        tl.sum(unexplained_sum, axis=0), tl.sum(variance_sum, axis=0), value_coef, entropy_coef,
    )  # fmt: skip


@triton.jit
def upstream(
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
    grad_total_ptr,  # [] or None
    grad_policy_ptr,  # [] or None
    grad_value_loss_ptr,  # [] or None
    grad_mean_entropy_ptr,  # [] or None
    diagnostics_ptr,  # [4]
    log_prob_ptr,  # [N]
    value_ptr,  # [N]
    advantage_ptr,  # [N]
    value_target_ptr,  # [N]
    old_log_prob_ptr,  # [N] or None
    mask_ptr,  # [N] or None
    grad_entropy_ptr,  # [N] or None
    grad_log_prob_ptr,  # [N] or None
    grad_value_ptr,  # [N] or None
    numel,
    clip,
    value_coef,
    entropy_coef,
    TILE: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < numel
    member = members_of(mask_ptr, offset, numel)
    count = tl.load(diagnostics_ptr + 3)
    if grad_log_prob_ptr is not None:
        slope = load(advantage_ptr, offset, member)
        if old_log_prob_ptr is not None:
            ratio = tl.exp(load(log_prob_ptr, offset, member) - load(old_log_prob_ptr, offset, member))
            clipped = ((slope > 0) & (ratio > 1.0 + clip)) | ((slope < 0) & (ratio < 1.0 - clip))
            slope = tl.where(clipped, 0.0, times(ratio, slope))
        gradient = -times(slope, upstream(grad_total_ptr, grad_policy_ptr, 1.0, count))
        store_gradient(grad_log_prob_ptr, offset, inside, member, gradient)
    if grad_value_ptr is not None:
        error = load(value_ptr, offset, member) - load(value_target_ptr, offset, member)
        gradient = times(2.0 * error, upstream(grad_total_ptr, grad_value_loss_ptr, value_coef, count))
        store_gradient(grad_value_ptr, offset, inside, member, gradient)
    if grad_entropy_ptr is not None:
        gradient = upstream(grad_total_ptr, grad_mean_entropy_ptr, -entropy_coef, count)
        store_gradient(grad_entropy_ptr, offset, inside, member, gradient)


@triton.jit
def store_gradient(
    ptr,  # [N]
    offset,
    inside,
    member,
    gradient,
):
    tl.store(ptr + offset, tl.where(member, gradient, 0.0).to(ptr.dtype.element_ty), mask=inside)


def flat(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, bool as bytes."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return as_bytes(tensor) if tensor.dtype == torch.bool else tensor


def policy_gradient_loss_forward(
    entropy: Tensor, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the reference."""
    numel = entropy.numel()
    tile = min(max(triton.next_power_of_2(numel), 128), TILE_LIMIT)
    parts = max(triton.cdiv(numel, tile), 1)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=entropy.device)

    outputs = (new(), new(), new(), new(), new(4))
    sums, parts_moments = (new(parts, NUM_SUMS), new(2, parts, 3)) if parts > 1 else (None, None)
    weights = (settings.value_coef, settings.entropy_coef)
    warps = 8 if tile == TILE_LIMIT else 4
    with launch_guard(entropy):
        policy_gradient_loss_kernel[(parts,)](
            flat(entropy), *map(flat, inputs), sums, parts_moments, *outputs, numel, parts, settings.clip, *weights,
            TILE=tile, num_warps=warps, **OPTIONS,
        )  # fmt: skip
        if parts > 1:
            policy_gradient_loss_finish_kernel[(1,)](
                sums, parts_moments, *outputs, parts, *weights,
                PARTS=min(triton.next_power_of_2(parts), PARTS_LIMIT), num_warps=4, **OPTIONS,
            )  # fmt: skip
    return outputs


def policy_gradient_loss_backward(
    grads: Sequence[Tensor | None], needs: list[bool], diagnostics: Tensor, inputs: Inputs, settings: Settings
) -> list[Tensor]:
    """See the reference."""
    log_prob = inputs.log_prob
    numel = log_prob.numel()
    found = [log_prob.new_empty(log_prob.shape) if need else None for need in needs]
    if numel > 0:
        with launch_guard(log_prob):
            policy_gradient_loss_backward_kernel[(triton.cdiv(numel, 1024),)](
                *grads, diagnostics, *map(flat, inputs), *found, numel, *settings, TILE=1024, num_warps=4, **OPTIONS
            )
    return [gradient for gradient in found if gradient is not None]
