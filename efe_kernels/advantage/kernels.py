"""The Triton kernels of rl_advantage and their launchers.

The elements are groups of consecutive ones. A tile holds several groups side by side, or a part of one group; without
whitening everything is one group.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.advantage import reference
from efe_kernels.advantage.reference import Settings
from efe_kernels.common.launch import cdiv, launch, next_power_of_2
from efe_kernels.common.moments import (
    NUM_MOMENTS,
    Moments,
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
from efe_kernels.common.triton import OPTIONS, flat, launch_guard, load, members, store, unit_clamp

EPS = tl.constexpr(reference.WHITEN_EPS)

TILE_LIMIT = 4096
# A group of up to so many tiles is gone through twice by one program: cheaper than a second launch.
MOST_TILES = 8
# What up to so many parts of a group leave behind is merged by every program that needs it: 1.5 KB beside a tile of
# 32 KB. More parts are made one by a launch of its own, MERGED_AT_ONCE of them at a time.
MOST_PARTS = 128
MERGED_AT_ONCE = 1024


class Inputs(NamedTuple):
    """Those of the reference and what the kernels look at of its settings."""

    reward: Any  # [groups * group_size]
    value: Any  # [groups * group_size]
    mask: Any  # [groups * group_size] or None
    reward_scale: float
    normalize: Any  # a constant: "tanh", "clamp" or None
    center: Any  # a constant: whether the mean alone is taken off in whitening


class Groups(NamedTuple):
    """How the elements are cut."""

    count: int
    size: int
    parts: int  # of each group


class Partial(NamedTuple):
    """What the parts of the groups left behind, perhaps merged."""

    rows: Any  # [groups, parts, width]
    parts: int
    lanes: Any  # a constant, no less than parts


class Statistics(NamedTuple):
    """Of each group."""

    count: Any
    mean: Any
    std: Any


NUM_STATISTICS = tl.constexpr(len(Statistics._fields))
NUM_SUMS = tl.constexpr(2)  # of the upstream gradient, and of it times the whitened advantage


class Tile(NamedTuple):
    """A tile [GROUPS, TILE]: its groups, its part of them, offsets of the elements and which of them there are."""

    group: Any
    part: Any
    offset: Any
    ok: Any


@triton.jit
def tanh(x):
    """tanh of a float32 to a few ulp: a series near 0, where the exponentials would cancel."""
    square = x * x
    series = 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    series = series * square * x + x
    decay = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - decay) / (1.0 + decay)
    far = tl.where(x < 0, -ratio, ratio)
    return tl.where(tl.abs(x) < 0.25, series, far)


@triton.jit
def load_advantage(inputs, tile):
    """Normalised reward minus value, and which elements count.

    Those that do not count are loaded and dropped: loads under the bounds alone are 16 bytes wide.
    """
    member = members(inputs.mask, tile.offset, tile.ok)
    scaled = load(inputs.reward, tile.offset, tile.ok) * inputs.reward_scale
    if inputs.normalize == "tanh":
        scaled = tanh(scaled)
    if inputs.normalize == "clamp":
        scaled = unit_clamp(scaled)
    return tl.where(member, scaled - load(inputs.value, tile.offset, tile.ok), 0.0), member


@triton.jit
def tile_of(groups, index, GROUPS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Of the TILES tiles of this program's part the one of this index."""
    pid = tl.program_id(0).to(tl.int64)
    part = pid % groups.parts
    group = (pid // groups.parts) * GROUPS + tl.arange(0, GROUPS)
    member = (part * TILES + index) * TILE + tl.arange(0, TILE)
    offset = group[:, None] * groups.size + member[None, :]
    ok = (group[:, None] < groups.count) & (member[None, :] < groups.size)
    return Tile(group, part, offset, ok)


@triton.jit
def rl_advantage_moments_kernel(
    inputs,
    partial_ptr,  # [groups, parts, NUM_MOMENTS]
    groups,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tile_of(groups, 0, GROUPS, TILE, 1)
    advantage, member = load_advantage(inputs, tile)
    row = tile.group * groups.parts + tile.part
    store_row(partial_ptr + row * NUM_MOMENTS, moments(advantage, member), tile.group < groups.count)


@triton.jit
def rl_advantage_merge_moments_kernel(
    partial_ptr,  # [groups, parts, NUM_MOMENTS]
    merged_ptr,  # [groups, 1, NUM_MOMENTS]
    parts,
    PARTS: tl.constexpr,
):
    """Each lane joins every PARTS-th part of a group, then the lanes are merged."""
    group = tl.program_id(0).to(tl.int64)
    group_ptr = partial_ptr + group * parts * NUM_MOMENTS
    part = tl.arange(0, PARTS)[None, :]
    found = load_moments(group_ptr, part, parts)
    for first in range(PARTS, parts, PARTS):
        found = join_moments(found, load_moments(group_ptr, first + part, parts))
    store_moments(merged_ptr + group * NUM_MOMENTS, merge_moments(found))


@triton.jit
def load_partial(partial, groups, WIDTH: tl.constexpr):
    """The rows of this program's group, a tuple of WIDTH values [1, lanes]."""
    group = (tl.program_id(0) // groups.parts).to(tl.int64)
    part = tl.arange(0, partial.lanes)[None, :]
    return load_rows(partial.rows + group * partial.parts * WIDTH, part, partial.parts, WIDTH)


@triton.jit
def rl_advantage_kernel(
    inputs,
    partial,  # of NUM_MOMENTS, or None: a program has whole groups
    statistics_ptr,  # [groups, NUM_STATISTICS], or None: no whitening
    out_ptr,  # [groups * group_size]
    groups,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    tile = tile_of(groups, 0, GROUPS, TILE, TILES)
    advantage, member = load_advantage(inputs, tile)
    if statistics_ptr is not None:
        if partial is None:
            found = moments(advantage, member)
            for index in range(1, TILES):
                further, counted = load_advantage(inputs, tile_of(groups, index, GROUPS, TILE, TILES))
                found = join_moments(found, moments(further, counted))
        else:
            count, mean, squares = load_partial(partial, groups, NUM_MOMENTS)
            found = merge_moments(Moments(count, mean, squares))
        std = tl.sqrt_rn(found.squares / tl.maximum(found.count - 1.0, 1.0))
        statistics = Statistics(found.count, tl.where(std == std, found.mean, std), std)
        advantage = whiten(inputs, advantage, member, statistics)
        first = tile.group < tl.where(tile.part == 0, groups.count, 0)  # one program of each group writes
        store_row(statistics_ptr + tile.group * NUM_STATISTICS, statistics, first)
    store(out_ptr, tile.offset, advantage, tile.ok)
    if TILES > 1:
        for index in range(1, TILES):
            tile = tile_of(groups, index, GROUPS, TILE, TILES)
            advantage, member = load_advantage(inputs, tile)
            store(out_ptr, tile.offset, whiten(inputs, advantage, member, statistics), tile.ok)


@triton.jit
def whiten(inputs, advantage, member, statistics):
    whitened = difference(advantage, statistics.mean[:, None])
    if not inputs.center:
        std = statistics.std[:, None]
        whitened = tl.where(std == 0, 0.0, whitened / (std + EPS))
    return tl.where(member, whitened, 0.0)


@triton.jit
def load_whitened_gradient(
    grad_ptr,  # [groups * group_size]
    inputs,
    statistics_ptr,  # [groups, NUM_STATISTICS]
    tile,
    groups,
):
    """Upstream gradient, whitened advantage, members and statistics of a tile."""
    advantage, member = load_advantage(inputs, tile)
    count, mean, std = load_rows(statistics_ptr, tile.group, groups.count, NUM_STATISTICS)
    statistics = Statistics(count, mean, std)
    grad = tl.where(member, load(grad_ptr, tile.offset, tile.ok), 0.0)
    return grad, whiten(inputs, advantage, member, statistics), member, statistics


@triton.jit
def rl_advantage_sums_kernel(
    grad_ptr,  # [groups * group_size]
    inputs,
    statistics_ptr,  # [groups, NUM_STATISTICS]
    partial_ptr,  # [groups, parts, NUM_SUMS]
    groups,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of the upstream gradient g and of g times the whitened advantage over each part of each group."""
    tile = tile_of(groups, 0, GROUPS, TILE, 1)
    grad, whitened, _, _ = load_whitened_gradient(grad_ptr, inputs, statistics_ptr, tile, groups)
    row = tile.group * groups.parts + tile.part
    sums = (tl.sum(grad, axis=1), tl.sum(grad * whitened, axis=1))
    store_row(partial_ptr + row * NUM_SUMS, sums, tile.group < groups.count)


@triton.jit
def rl_advantage_merge_sums_kernel(
    partial_ptr,  # [groups, parts, NUM_SUMS]
    merged_ptr,  # [groups, 1, NUM_SUMS]
    parts,
    PARTS: tl.constexpr,
):
    """Each lane adds up every PARTS-th part of a group, then the lanes are added up."""
    group = tl.program_id(0).to(tl.int64)
    group_ptr = partial_ptr + group * parts * NUM_SUMS
    part = tl.arange(0, PARTS)
    sums = load_rows(group_ptr, part, parts, NUM_SUMS)
    for first in range(PARTS, parts, PARTS):
        sums = add_rows(sums, load_rows(group_ptr, first + part, parts, NUM_SUMS))
    store_row(merged_ptr + group * NUM_SUMS, (tl.sum(sums[0], axis=0), tl.sum(sums[1], axis=0)))


# Whitening is y_i = k c_i with c_i = x_i - mean, k = 1 / (s + eps) and s² = sum c² / (n - 1), where sum c = 0 gives
# ds/dx_i = c_i / ((n - 1) s). So for an upstream gradient g
#   dx_i = k (g_i - mean(g)) - k² c_i (sum_j g_j c_j) / ((n - 1) s)
#        = k (g_i - mean(g)) - y_i (sum_j g_j y_j) / ((n - 1) s),
# and x = normalised reward - value gives dvalue_i = -dx_i. A group with s = 0 is whitened to the constant 0. Centring
# alone is y_i = c_i, so dx_i = g_i - mean(g).
@triton.jit
def rl_advantage_backward_kernel(
    grad_ptr,  # [groups * group_size]
    inputs,
    partial,  # of NUM_SUMS, or None: a program has whole groups
    statistics_ptr,  # [groups, NUM_STATISTICS], or None: no whitening
    out_ptr,  # [groups * group_size]
    groups,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tile_of(groups, 0, GROUPS, TILE, 1)
    if statistics_ptr is None:
        grad = load(grad_ptr, tile.offset, members(inputs.mask, tile.offset, tile.ok))
    else:
        grad, whitened, member, statistics = load_whitened_gradient(grad_ptr, inputs, statistics_ptr, tile, groups)
        if partial is None:
            grad_sum = tl.sum(grad, axis=1)
            product_sum = tl.sum(grad * whitened, axis=1)
        else:
            grad_sums, product_sums = load_partial(partial, groups, NUM_SUMS)
            grad_sum, product_sum = tl.sum(grad_sums, axis=1), tl.sum(product_sums, axis=1)
        count, _, std = statistics
        mean_grad = grad_sum / tl.maximum(count, 1.0)
        grad = grad - mean_grad[:, None]
        if not inputs.center:
            varied = std != 0
            slope = tl.where(varied, product_sum / tl.where(varied, (count - 1.0) * std, 1.0), 0.0)
            grad = grad / (std[:, None] + EPS) - whitened * slope[:, None]
            member = member & varied[:, None]
        grad = tl.where(member, grad, 0.0)
    store(out_ptr, tile.offset, -grad, tile.ok)


class Cover(NamedTuple):
    """How a launch covers the groups: its programs, and the constants of its kernels."""

    programs: int
    groups: Groups
    constants: dict[str, int]
    num_warps: int


@functools.lru_cache(4096)
def cover(numel: int, group_size: int, tile_limit: int) -> Cover:
    """Several groups side by side, or one group in parts. Without whitening (group_size 0) everything is one group.

    Shapes alone decide, so that the bits of a result do too.
    """
    size = group_size or numel
    tile = min(next_power_of_2(size), tile_limit if group_size else 1024)
    groups = Groups(numel // size, size, cdiv(size, tile))
    side_by_side = max(1, 1024 // tile)
    programs = cdiv(groups.count, side_by_side) * groups.parts
    return Cover(programs, groups, {"GROUPS": side_by_side, "TILE": tile}, 8 if tile > 1024 else 4)


def merged(rows: Tensor, kernel: Any) -> Partial:
    """rows [groups, parts, width] as they are, or merged to [groups, 1, width] where there are too many parts."""
    groups, parts, width = rows.shape
    if parts > MOST_PARTS:
        whole = rows.new_empty(groups, 1, width)
        launch(kernel, (groups,), rows, whole, parts, PARTS=MERGED_AT_ONCE, num_warps=4, **OPTIONS)
        rows, parts = whole, 1
    return Partial(rows, parts, tl.constexpr(next_power_of_2(parts)))


def kernel_inputs(inputs: reference.Inputs, settings: Settings) -> Inputs:
    normalize = None if settings.normalize is None else tl.constexpr(settings.normalize)
    return Inputs(*map(flat, inputs), settings.reward_scale, normalize, tl.constexpr(settings.center))


def new_rows(like: Tensor, width: tl.constexpr, *rows: int) -> Tensor:
    """[*rows, width] float32."""
    return torch.empty(*rows, width.value, dtype=torch.float32, device=like.device)


def rl_advantage_forward(inputs: reference.Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """See the reference. One launch; two where a group is larger than MOST_TILES tiles, three beyond MOST_PARTS."""
    reward, value, _ = inputs
    numel, group_size = reward.numel(), settings.group_size
    out = reward.new_empty(reward.shape, dtype=torch.promote_types(reward.dtype, value.dtype))
    statistics = new_rows(reward, NUM_STATISTICS, numel // group_size if group_size else 0)
    if numel == 0:
        return out, statistics
    arrays = kernel_inputs(inputs, settings)
    programs, groups, constants, warps = cover(numel, group_size, TILE_LIMIT)
    tiles, partial = 1, None
    with launch_guard(value):
        if group_size and 1 < groups.parts <= MOST_TILES:
            tiles, warps = groups.parts, 16
            programs, groups = programs // tiles, groups._replace(parts=1)
        elif group_size and groups.parts > 1:
            options = {**constants, "num_warps": warps, **OPTIONS}
            rows = new_rows(reward, NUM_MOMENTS, groups.count, groups.parts)
            launch(rl_advantage_moments_kernel, (programs,), arrays, rows, groups, **options)
            partial = merged(rows, rl_advantage_merge_moments_kernel)
        launch(
            rl_advantage_kernel, (programs,), arrays, partial, statistics if group_size else None, out, groups,
            **constants, TILES=tiles, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return out, statistics


def rl_advantage_backward(grad: Tensor, inputs: reference.Inputs, statistics: Tensor, settings: Settings) -> Tensor:
    """See the reference. One launch; two where a group is larger than a tile, three beyond MOST_PARTS of them."""
    value = inputs.value
    numel, group_size = value.numel(), settings.group_size
    out = value.new_empty(value.shape)
    if numel == 0:
        return out
    arrays = kernel_inputs(inputs, settings)
    programs, groups, constants, warps = cover(numel, group_size, TILE_LIMIT)
    options = {**constants, "num_warps": warps, **OPTIONS}
    grad, partial = grad.contiguous(), None
    with launch_guard(value):
        if group_size and groups.parts > 1:
            rows = new_rows(value, NUM_SUMS, groups.count, groups.parts)
            launch(rl_advantage_sums_kernel, (programs,), grad, arrays, statistics, rows, groups, **options)
            partial = merged(rows, rl_advantage_merge_sums_kernel)
        launch(
            rl_advantage_backward_kernel, (programs,), grad, arrays, partial, statistics if group_size else None, out,
            groups, **options,
        )  # fmt: skip
    return out
