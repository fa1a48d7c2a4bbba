"""The Triton kernels of policy_gradient_loss and their launchers.

One launch where all elements fit a tile; otherwise one program per tile leaves partial sums, which a second launch adds
up in a fixed order. The backward pass recomputes from the inputs in one launch.

The tensors come to a kernel in the tuples below and in the reference's Inputs, whose tensors are [N]; its advantage and
weight may be those of rows, and have one element for each so many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.common.launch import cdiv, launch, next_power_of_2
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
from efe_kernels.policy_loss.reference import COUNT, DIAGNOSTICS, Inputs, Settings

TILE_LIMIT = 4096
BACKWARD_TILE = 1024
# Of so many parts at a time the second launch adds up the sums; its registers hold no more.
PARTS_LIMIT = 1024


class Losses(NamedTuple):
    """Or their upstream gradients, None where there is none."""

    total: Any  # []
    policy: Any  # []
    value: Any  # []
    entropy: Any  # []
    kl: Any  # []


class Gradients(NamedTuple):
    """None where a gradient is not asked for."""

    entropy: Any  # [N]
    log_prob: Any  # [N]
    value: Any  # [N]


class Sizes(NamedTuple):
    """How many elements there are, and how many share an advantage and a weight."""

    numel: int
    advantage: int
    weight: int


class Sums(NamedTuple):
    """Over the elements that count; the first four weighted."""

    policy: Any
    value: Any
    entropy: Any
    kl: Any
    clipped: Any
    low: Any
    high: Any
    divergence: Any
    count: Any


NUM_SUMS = tl.constexpr(len(Sums._fields))
COUNT_PLACE = tl.constexpr(COUNT)


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
    """exp(x) - 1 - x, the estimate of a KL divergence, by its series where the difference would cancel."""
    series = 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = (series * x + 0.5) * x * x
    exponential = tl.exp(x)
    found = tl.where(tl.abs(x) < 0.1, series, exponential - 1.0 - x)
    return tl.where(exponential == float("inf"), exponential, found)


@triton.jit
def exponential_minus_one(x):
    return tl.where(tl.abs(x) < 0.1, excess_exponential(x) + x, tl.exp(x) - 1.0)


@triton.jit
def times(x, weight):
    """x · weight, and 0 where the weight is 0, also for an infinite x: an advantage of 0 asks for nothing."""
    return tl.where(weight == 0.0, difference(x, x), x * weight)


@triton.jit
def load_of_row(
    ptr,  # [N / length]
    offset,
    length,
    ok,
):
    """What each element at the offset shares with the others of its row; 0 where not ok."""
    return load(ptr, offset // length, ok)


@triton.jit
def limited_value(value, old_value, value_clip):
    """value, at most value_clip away from old_value; NaN where one of them is."""
    step = value - old_value
    inside = tl.where(step == step, value, step)
    return tl.where(
        step > value_clip, old_value + value_clip, tl.where(step < -value_clip, old_value - value_clip, inside)
    )


@triton.jit
def aggregate(x, weight, member):
    return total_of(tl.where(member, x * weight, 0.0))


@triton.jit
def squared_error(inputs, offset, member, value, target, value_clip):
    error = value - target
    error *= error
    if inputs.old_value is not None:
        held = limited_value(value, load(inputs.old_value, offset, member), value_clip) - target
        held *= held
        error = tl.where(held <= error, error, held)
    return error


@triton.jit
def sums_of(
    entropy_ptr,  # [N] or None
    inputs,
    offset,
    member,
    squares,
    sizes,
    settings,
):
    """The Sums of a tile. squares: of the critic's errors."""
    zero = tl.zeros(offset.shape, tl.float32)
    weight = zero + 1.0
    if inputs.weight is not None:
        weight = load_of_row(inputs.weight, offset, sizes.weight, member)
    log_prob = load(inputs.log_prob, offset, member)
    advantage = load_of_row(inputs.advantage, offset, sizes.advantage, member)
    factor, clipped, low, high, divergence = log_prob, zero, zero, zero, zero
    if inputs.old_log_prob is not None:
        log_ratio = log_prob - load(inputs.old_log_prob, offset, member)
        ratio = tl.exp(log_ratio)
        below = ratio < settings.low
        above = ratio > settings.high
        as_loss = tl.where(below, settings.low, tl.where(ratio > settings.dual_clip, settings.dual_clip, ratio))
        factor = tl.where(advantage < 0.0, as_loss, tl.where(above, settings.high, ratio))
        clipped = tl.where(member & (below | above), 1.0, 0.0)
        low = tl.where(member & below & (advantage < 0.0), 1.0, 0.0)
        high = tl.where(member & above & (advantage > 0.0), 1.0, 0.0)
        divergence = tl.where(member, excess_exponential(log_ratio), 0.0)
    kl = zero
    if inputs.ref_log_prob is not None:
        kl = excess_exponential(load(inputs.ref_log_prob, offset, member) - log_prob)
    return Sums(
        -aggregate(times(factor, advantage), weight, member),
        aggregate(squares, weight, member),
        aggregate(load(entropy_ptr, offset, member), weight, member),
        aggregate(kl, weight, member),
        total_of(clipped),
        total_of(low),
        total_of(high),
        total_of(divergence),
        total_of(member.to(tl.float32)),
    )


@triton.jit
def explained_variance(error, target):
    """Of the Moments [1] of the critic's error and of its target."""
    unexplained = tl.sum(error.squares, axis=0)
    variance = tl.sum(target.squares, axis=0)
    explained = 1.0 - unexplained / tl.where(variance == 0, 1.0, variance)
    return tl.where(variance == 0, 0.0, explained)


@triton.jit
def store_losses(
    losses,
    diagnostics_ptr,  # [6]
    sums,
    explained,
    settings,
):
    """explained: what share of the variance of the critic's target it explains."""
    some = tl.maximum(sums.count, 1.0)
    divisor = tl.where(settings.normalizer > 0.0, settings.normalizer, some)
    policy = sums.policy / divisor
    value = sums.value / divisor
    entropy = sums.entropy / divisor
    kl = sums.kl / divisor
    total = policy + times(value, settings.value_coef) - times(entropy, settings.entropy_coef)
    tl.store(losses.total, total + times(kl, settings.kl_coef))
    tl.store(losses.policy, policy)
    tl.store(losses.value, value)
    tl.store(losses.entropy, entropy)
    tl.store(losses.kl, kl)
    store_row(
        diagnostics_ptr,
        (sums.clipped / some, sums.divergence / some, explained, sums.low / some, sums.high / some, sums.count),
    )


@triton.jit
def policy_gradient_loss_kernel(
    entropy_ptr,  # [N] or None
    inputs,
    partial,  # or None: one program has everything
    losses,
    diagnostics_ptr,  # [6]
    sizes,
    settings,
    TILE: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    offset = part * TILE + tl.arange(0, TILE)[None, :]
    member = members(inputs.mask, offset, offset < sizes.numel)
    explained = 0.0
    squares = tl.zeros(offset.shape, tl.float32)
    if inputs.value is not None:
        value = load(inputs.value, offset, member)
        value_target = load(inputs.value_target, offset, member)
        squares = squared_error(inputs, offset, member, value, value_target, settings.value_clip)
        error = moments(value_target - value, member)
        target = moments(value_target, member)
        explained = explained_variance(error, target)
    sums = sums_of(entropy_ptr, inputs, offset, member, squares, sizes, settings)
    if partial is None:
        store_losses(losses, diagnostics_ptr, sums, explained, settings)
    else:
        store_row(partial.sums + part * NUM_SUMS, sums)
        if inputs.value is not None:
            store_moments(partial.moments + part * NUM_MOMENTS, error)
            store_moments(partial.moments + (partial.parts + part) * NUM_MOMENTS, target)


# One program: each lane adds up every PARTS-th part, then the lanes are added up. A round of the loop stands for
# PARTS * TILE_LIMIT elements, which the first launch has read: beside that it is short, and saves launches of a tree.
@triton.jit
def policy_gradient_loss_finish_kernel(
    partial,
    losses,
    diagnostics_ptr,  # [6]
    settings,
    CRITIC: tl.constexpr,
    PARTS: tl.constexpr,
):
    parts = partial.parts
    part = tl.arange(0, PARTS)[None, :]
    sums = load_rows(partial.sums, part, parts, NUM_SUMS)
    for first in range(PARTS, parts, PARTS):
        sums = add_rows(sums, load_rows(partial.sums, first + part, parts, NUM_SUMS))
    policy, value, entropy, kl, clipped, low, high, divergence, count = sums
    sums = Sums(
        total_of(policy), total_of(value), total_of(entropy), total_of(kl), total_of(clipped), total_of(low),
        total_of(high), total_of(divergence), total_of(count),
    )  # fmt: skip
    if not CRITIC:
        store_losses(losses, diagnostics_ptr, sums, 0.0, settings)
    else:
        target_ptr = partial.moments + parts.to(tl.int64) * NUM_MOMENTS
        error = load_moments(partial.moments, part, parts)
        target = load_moments(target_ptr, part, parts)
        for first in range(PARTS, parts, PARTS):
            error = join_moments(error, load_moments(partial.moments, first + part, parts))
            target = join_moments(target, load_moments(target_ptr, first + part, parts))
        explained = explained_variance(merge_moments(error), merge_moments(target))
        store_losses(losses, diagnostics_ptr, sums, explained, settings)


@triton.jit
def gradient_of(
    grad_total_ptr,  # [] or None
    grad_part_ptr,  # [] or None
    coefficient,
    scale,
):
    """Gradient of an element of a part from those of the total, in which it has a coefficient, and of the part."""
    gradient = 0.0
    if grad_total_ptr is not None:
        gradient += coefficient * tl.load(grad_total_ptr)
    if grad_part_ptr is not None:
        gradient += tl.load(grad_part_ptr)
    return gradient * scale


@triton.jit
def policy_slope(inputs, offset, member, log_prob, sizes, settings):
    """-d/d log_prob of the surrogate of each element."""
    slope = load_of_row(inputs.advantage, offset, sizes.advantage, member)
    if inputs.old_log_prob is not None:
        ratio = tl.exp(log_prob - load(inputs.old_log_prob, offset, member))
        held_gain = (slope > 0.0) & (ratio > settings.high)
        held_loss = (slope < 0.0) & ((ratio < settings.low) | (ratio > settings.dual_clip))
        slope = tl.where(held_gain | held_loss, 0.0, times(ratio, slope))
    return slope


# Sums over the elements that count, each times the weight of its row, over a divisor: their number or a constant. With
# ratio = exp(log_prob - old_log_prob), so d ratio = ratio d log_prob, and s = weight / divisor:
#   policy  = sum of -f A s, where f is the ratio, or constant: for A > 0 above `high` and for A < 0 below `low` and
#             above `dual_clip`: -A ratio s, or 0; without old_log_prob f = log_prob: -A s
#   value   = sum of (value - target)² s: 2 (value - target) s, or 0 where the larger error is that of the limited value
#   entropy = sum of entropy s: s
#   kl      = sum of (exp(d) - 1 - d) s with d = ref_log_prob - log_prob: -(exp(d) - 1) s
# each times the gradient of its own output and of the total, in which the coefficients are 1, value_coef, -entropy_coef
# and kl_coef.
@triton.jit
def policy_gradient_loss_backward_kernel(
    upstream,
    diagnostics_ptr,  # [6]
    inputs,
    gradients,
    sizes,
    settings,
    TILE: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < sizes.numel
    member = members(inputs.mask, offset, inside)
    count = tl.maximum(tl.load(diagnostics_ptr + COUNT_PLACE), 1.0)
    scale = 1.0 / tl.where(settings.normalizer > 0.0, settings.normalizer, count)
    if inputs.weight is not None:
        scale *= load_of_row(inputs.weight, offset, sizes.weight, member)
    if gradients.log_prob is not None:
        log_prob = load(inputs.log_prob, offset, member)
        slope = policy_slope(inputs, offset, member, log_prob, sizes, settings)
        gradient = -times(slope, gradient_of(upstream.total, upstream.policy, 1.0, scale))
        if inputs.ref_log_prob is not None:
            slope = exponential_minus_one(load(inputs.ref_log_prob, offset, member) - log_prob)
            gradient -= times(slope, gradient_of(upstream.total, upstream.kl, settings.kl_coef, scale))
        store(gradients.log_prob, offset, tl.where(member, gradient, 0.0), inside)
    if gradients.value is not None:
        value = load(inputs.value, offset, member)
        target = load(inputs.value_target, offset, member)
        slope = 2.0 * (value - target)
        if inputs.old_value is not None:
            limited = limited_value(value, load(inputs.old_value, offset, member), settings.value_clip)
            slope = tl.where(tl.abs(limited - target) > tl.abs(value - target), 0.0, slope)
        gradient = times(slope, gradient_of(upstream.total, upstream.value, settings.value_coef, scale))
        store(gradients.value, offset, tl.where(member, gradient, 0.0), inside)
    if gradients.entropy is not None:
        gradient = gradient_of(upstream.total, upstream.entropy, -settings.entropy_coef, scale)
        store(gradients.entropy, offset, tl.where(member, gradient, 0.0), inside)


def sizes_of(inputs: Inputs) -> Sizes:
    numel = inputs.log_prob.numel()

    def length(tensor: Tensor | None) -> int:
        return 1 if tensor is None else max(numel // max(tensor.numel(), 1), 1)

    return Sizes(numel, length(inputs.advantage), length(inputs.weight))


def tiles_of(numel: int) -> tuple[int, int]:
    """Elements of a tile, a power of two, and how many tiles there are."""
    tile = min(max(next_power_of_2(numel), 128), TILE_LIMIT)
    return tile, max(cdiv(numel, tile), 1)


def policy_gradient_loss_forward(
    entropy: Tensor | None, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the reference."""
    entropy, inputs, sizes = flat(entropy), Inputs(*map(flat, inputs)), sizes_of(inputs)
    device = inputs.log_prob.device
    tile, parts = tiles_of(sizes.numel)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    losses, diagnostics = Losses(new(), new(), new(), new(), new()), new(len(DIAGNOSTICS))
    partial = None
    if parts > 1:
        # Without a critic its moments are not written. Triton 3.5 compares no tuple that holds None with None.
        partial = Partial(new(parts, NUM_SUMS.value), new(2, parts, NUM_MOMENTS.value), parts)
    with launch_guard(inputs.log_prob):
        launch(
            policy_gradient_loss_kernel, (parts,), entropy, inputs, partial, losses, diagnostics, sizes, settings,
            TILE=tile, num_warps=8 if tile == TILE_LIMIT else 4, **OPTIONS,
        )  # fmt: skip
        if partial is not None:
            lanes = min(next_power_of_2(parts), PARTS_LIMIT)
            launch(
                policy_gradient_loss_finish_kernel, (1,), partial, losses, diagnostics, settings,
                CRITIC=inputs.value is not None, PARTS=lanes, num_warps=4, **OPTIONS,
            )  # fmt: skip
    return *losses, diagnostics


def policy_gradient_loss_backward(
    grads: Sequence[Tensor | None], needs: list[bool], diagnostics: Tensor, inputs: Inputs, settings: Settings
) -> list[Tensor]:
    """See the reference."""
    log_prob = inputs.log_prob
    found = Gradients(*[log_prob.new_empty(log_prob.shape) if need else None for need in needs])
    inputs, sizes = Inputs(*map(flat, inputs)), sizes_of(inputs)
    if sizes.numel > 0:
        with launch_guard(log_prob):
            launch(
                policy_gradient_loss_backward_kernel, (cdiv(sizes.numel, BACKWARD_TILE),), Losses(*grads), diagnostics,
                inputs, found, sizes, settings, TILE=BACKWARD_TILE, num_warps=4, **OPTIONS,
            )  # fmt: skip
    return [gradient for gradient in found if gradient is not None]
