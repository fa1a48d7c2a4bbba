"""The Triton kernels of rl_advantage and their launchers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.advantage.reference import WHITEN_EPS
from efe_kernels.common.moments import join_moments, load_moments, merge_moments, moments, store_moments
from efe_kernels.common.triton import OPTIONS, as_bytes, launch_guard, unit_clamp

EPS = tl.constexpr(WHITEN_EPS)

NO_WHITENING = tl.constexpr(0)
WHOLE_GROUPS = tl.constexpr(1)
PARTS_OF_GROUPS = tl.constexpr(2)
TILE_LIMIT = 4096
# A group of up to so many tiles is gone through twice by one program: cheaper than a second launch.
MOST_TILES = 8
# What up to so many parts of a group leave behind is merged by every program that needs it: 1.5 KB beside a tile of
# 32 KB. More parts are made one by a launch of its own, MERGED_AT_ONCE of them at a time.
MOST_PARTS = 128
MERGED_AT_ONCE = 1024


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
def load_advantage(
    reward_ptr,  # [N]
    value_ptr,  # [N]
    mask_ptr,  # [N] or None
    offset,
    ok,
    reward_scale,
    NORMALIZE: tl.constexpr,
):
    """Normalised reward minus value, and which elements count.

    Those that do not count are loaded and dropped: loads under the bounds alone are 16 bytes wide.
    """
    member = ok
    if mask_ptr is not None:
        member = ok & (tl.load(mask_ptr + offset, mask=ok, other=0) != 0)
    scaled = tl.load(reward_ptr + offset, mask=ok, other=0.0).to(tl.float32) * reward_scale
    if NORMALIZE == "tanh":
        scaled = tanh(scaled)
    if NORMALIZE == "clamp":
        scaled = unit_clamp(scaled)
    return tl.where(member, scaled - tl.load(value_ptr + offset, mask=ok, other=0.0).to(tl.float32), 0.0), member


@triton.jit
def tile_offset(groups, group_size, parts, tile, GROUPS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Groups of this program, its part of them, and the positions and bounds of a tile [GROUPS, TILE] of the part."""
    pid = tl.program_id(0).to(tl.int64)
    part = pid % parts
    group = (pid // parts) * GROUPS + tl.arange(0, GROUPS)
    member = (part * TILES + tile) * TILE + tl.arange(0, TILE)
    offset = group[:, None] * group_size + member[None, :]
    ok = (group[:, None] < groups) & (member[None, :] < group_size)
    return group, part, offset, ok


@triton.jit
def rl_advantage_moments_kernel(
    reward_ptr,  # [groups * group_size]
    value_ptr,  # [groups * group_size]
    mask_ptr,  # [groups * group_size] or None
    partial_ptr,  # [groups, parts, 3]
    groups,
    group_size,
    parts,
    reward_scale,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    group, part, offset, ok = tile_offset(groups, group_size, parts, 0, GROUPS, TILE, TILES)
    advantage, member = load_advantage(reward_ptr, value_ptr, mask_ptr, offset, ok, reward_scale, NORMALIZE)
    count, mean, squares = moments(advantage, member)
    base = partial_ptr + (group * parts + part) * 3
    tl.store(base, count, mask=group < groups)
    tl.store(base + 1, mean, mask=group < groups)
    tl.store(base + 2, squares, mask=group < groups)


@triton.jit
def rl_advantage_merge_moments_kernel(
    partial_ptr,  # [groups, parts, 3]
    merged_ptr,  # [groups, 1, 3]
    parts,
    PARTS: tl.constexpr,
):
    """Each lane joins every PARTS-th part of a group, then the lanes are merged."""
    group = tl.program_id(0).to(tl.int64)
    group_ptr = partial_ptr + group * parts * 3
    part = tl.arange(0, PARTS)[None, :]
    count, mean, squares = load_moments(group_ptr, part, parts)
    for first in range(PARTS, parts, PARTS):
        more, more_mean, more_squares = load_moments(group_ptr, first + part, parts)
        count, mean, squares = join_moments(count, mean, squares, more, more_mean, more_squares)
    count, mean, squares = merge_moments(count, mean, squares)
    store_moments(merged_ptr + group * 3, count, mean, squares)


@triton.jit
def rl_advantage_kernel(
    reward_ptr,  # [groups * group_size]
    value_ptr,  # [groups * group_size]
    mask_ptr,  # [groups * group_size] or None
    partial_ptr,  # [groups, partials, 3], or None unless MODE is PARTS_OF_GROUPS
    out_ptr,  # [groups * group_size]
    statistics_ptr,  # [groups, 3], or None without whitening
    groups,
    group_size,
    parts,
    partials,
    reward_scale,
    NORMALIZE: tl.constexpr,
    MODE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    group, part, offset, ok = tile_offset(groups, group_size, parts, 0, GROUPS, TILE, TILES)
    advantage, member = load_advantage(reward_ptr, value_ptr, mask_ptr, offset, ok, reward_scale, NORMALIZE)
    if MODE != NO_WHITENING:
        if MODE == WHOLE_GROUPS:
            count, mean, squares = moments(advantage, member)
            for tile in range(1, TILES):
                _, _, further, inside = tile_offset(groups, group_size, parts, tile, GROUPS, TILE, TILES)
                x, counts = load_advantage(reward_ptr, value_ptr, mask_ptr, further, inside, reward_scale, NORMALIZE)
                more, more_mean, more_squares = moments(x, counts)
                count, mean, squares = join_moments(count, mean, squares, more, more_mean, more_squares)
        else:
            group_ptr = partial_ptr + (tl.program_id(0) // parts).to(tl.int64) * partials * 3
            count, mean, squares = load_moments(group_ptr, tl.arange(0, PARTIALS)[None, :], partials)
            count, mean, squares = merge_moments(count, mean, squares)
        std = tl.sqrt_rn(squares / tl.maximum(count - 1.0, 1.0))
        advantage = whiten(advantage, member, mean, std)
        first = group < tl.where(part == 0, groups, 0)  # one program of each group writes
        tl.store(statistics_ptr + group * 3, count, mask=first)
        tl.store(statistics_ptr + group * 3 + 1, mean, mask=first)
        tl.store(statistics_ptr + group * 3 + 2, std, mask=first)
    tl.store(out_ptr + offset, advantage.to(out_ptr.dtype.element_ty), mask=ok)
    if TILES > 1:
        for tile in range(1, TILES):
            _, _, offset, ok = tile_offset(groups, group_size, parts, tile, GROUPS, TILE, TILES)
            advantage, member = load_advantage(reward_ptr, value_ptr, mask_ptr, offset, ok, reward_scale, NORMALIZE)
            advantage = whiten(advantage, member, mean, std)
            tl.store(out_ptr + offset, advantage.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def whiten(advantage, member, mean, std):
    whitened = (advantage - mean[:, None]) / (std[:, None] + EPS)
    return tl.where(member & (std[:, None] != 0), whitened, 0.0)


@triton.jit
def load_whitened_gradient(
    grad_ptr,  # [groups * group_size]
    reward_ptr,  # [groups * group_size]
    value_ptr,  # [groups * group_size]
    mask_ptr,  # [groups * group_size] or None
    statistics_ptr,  # [groups, 3]
    group,
    offset,
    ok,
    groups,
    reward_scale,
    NORMALIZE: tl.constexpr,
):
    """Upstream gradient, whitened advantage, members, count and standard deviation of a tile."""
    advantage, member = load_advantage(reward_ptr, value_ptr, mask_ptr, offset, ok, reward_scale, NORMALIZE)
    count = tl.load(statistics_ptr + group * 3, mask=group < groups, other=0.0)
    mean = tl.load(statistics_ptr + group * 3 + 1, mask=group < groups, other=0.0)
    std = tl.load(statistics_ptr + group * 3 + 2, mask=group < groups, other=0.0)
    grad = tl.where(member, tl.load(grad_ptr + offset, mask=ok, other=0.0).to(tl.float32), 0.0)
    return grad, whiten(advantage, member, mean, std), member, count, std


@triton.jit
def rl_advantage_sums_kernel(
    grad_ptr,  # [groups * group_size]
    reward_ptr,  # [groups * group_size]
    value_ptr,  # [groups * group_size]
    mask_ptr,  # [groups * group_size] or None
    statistics_ptr,  # [groups, 3]
    partial_ptr,  # [groups, parts, 2]
    groups,
    group_size,
    parts,
    reward_scale,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of the upstream gradient g and of g times the whitened advantage over each part of each group."""
    group, part, offset, ok = tile_offset(groups, group_size, parts, 0, GROUPS, TILE, 1)
    grad, whitened, _, _, _ = load_whitened_gradient(
        grad_ptr, reward_ptr, value_ptr, mask_ptr, statistics_ptr, group, offset, ok, groups, reward_scale, NORMALIZE
    )
    base = partial_ptr + (group * parts + part) * 2
    tl.store(base, tl.sum(grad, axis=1), mask=group < groups)
    tl.store(base + 1, tl.sum(grad * whitened, axis=1), mask=group < groups)


@triton.jit
def load_sums(
    partial_ptr,  # [parts, 2]
    part,
    parts,
):
    """The two sums of some parts; 0 past the last one."""
    base = partial_ptr + part.to(tl.int64) * 2
    there = part < parts
    return tl.load(base, mask=there, other=0.0), tl.load(base + 1, mask=there, other=0.0)


@triton.jit
def rl_advantage_merge_sums_kernel(
    partial_ptr,  # [groups, parts, 2]
    merged_ptr,  # [groups, 1, 2]
    parts,
    PARTS: tl.constexpr,
):
    """Each lane adds up every PARTS-th part of a group, then the lanes are added up."""
    group = tl.program_id(0).to(tl.int64)
    group_ptr = partial_ptr + group * parts * 2
    part = tl.arange(0, PARTS)
    grad_sum, product_sum = load_sums(group_ptr, part, parts)
    for first in range(PARTS, parts, PARTS):
        more_grad, more_product = load_sums(group_ptr, first + part, parts)
        grad_sum += more_grad
        product_sum += more_product
    tl.store(merged_ptr + group * 2, tl.sum(grad_sum, axis=0))
    tl.store(merged_ptr + group * 2 + 1, tl.sum(product_sum, axis=0))


# Whitening is y_i = k c_i with c_i = x_i - mean, k = 1 / (s + eps) and s² = sum c² / (n - 1), where sum c = 0 gives
# ds/dx_i = c_i / ((n - 1) s). So for an upstream gradient g
#   dx_i = k (g_i - mean(g)) - k² c_i (sum_j g_j c_j) / ((n - 1) s)
#        = k (g_i - mean(g)) - y_i (sum_j g_j y_j) / ((n - 1) s),
# and x = normalised reward - value gives dvalue_i = -dx_i. A group with s = 0 is whitened to the constant 0.
@triton.jit
def rl_advantage_backward_kernel(
    grad_ptr,  # [groups * group_size]
    reward_ptr,  # [groups * group_size]
    value_ptr,  # [groups * group_size]
    mask_ptr,  # [groups * group_size] or None
    statistics_ptr,  # [groups, 3]
    partial_ptr,  # [groups, partials, 2], or None unless MODE is PARTS_OF_GROUPS
    out_ptr,  # [groups * group_size]
    groups,
    group_size,
    parts,
    partials,
    reward_scale,
    NORMALIZE: tl.constexpr,
    MODE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    group, _, offset, ok = tile_offset(groups, group_size, parts, 0, GROUPS, TILE, 1)
    if MODE == NO_WHITENING:
        member = ok
        if mask_ptr is not None:
            member = ok & (tl.load(mask_ptr + offset, mask=ok, other=0) != 0)
        grad = tl.load(grad_ptr + offset, mask=member, other=0.0).to(tl.float32)
    else:
        grad, whitened, member, count, std = load_whitened_gradient(
            grad_ptr,
            reward_ptr,
            value_ptr,
            mask_ptr,
            statistics_ptr,
            group,
            offset,
            ok,
            groups,
            reward_scale,
            NORMALIZE,
        )
        if MODE == WHOLE_GROUPS:
            grad_sum = tl.sum(grad, axis=1)
            product_sum = tl.sum(grad * whitened, axis=1)
        else:
            group_ptr = partial_ptr + (tl.program_id(0) // parts).to(tl.int64) * partials * 2
            grad_sum, product_sum = load_sums(group_ptr, tl.arange(0, PARTIALS)[None, :], partials)
            grad_sum, product_sum = tl.sum(grad_sum, axis=1), tl.sum(product_sum, axis=1)
        varied = std != 0
        mean_grad = grad_sum / tl.maximum(count, 1.0)
        slope = tl.where(varied, product_sum / tl.where(varied, (count - 1.0) * std, 1.0), 0.0)
        grad = (grad - mean_grad[:, None]) / (std[:, None] + EPS) - whitened * slope[:, None]
        grad = tl.where(member & varied[:, None], grad, 0.0)
    tl.store(out_ptr + offset, (-grad).to(out_ptr.dtype.element_ty), mask=ok)


def forward_tiles(numel: int, group_size: int) -> tuple[int, dict[str, Any]]:
    """advantage_tiles, and the tiles of a program: all of a group where they are few, which saves a launch."""
    programs, tiles = advantage_tiles(numel, group_size)
    count = tiles["parts"]
    if group_size == 0 or count == 1 or count > MOST_TILES:
        return programs, {**tiles, "TILES": 1}
    return programs // count, {**tiles, "parts": 1, "TILES": count, "num_warps": 16}


def advantage_tiles(numel: int, group_size: int) -> tuple[int, dict[str, Any]]:
    """Programs of a launch, and how they cover the groups: several groups side by side, or one group in parts.

    Without whitening (group_size 0) everything is one group. Shapes alone decide, so that the bits of a result do too.
    """
    whole = group_size or numel
    tile = min(triton.next_power_of_2(whole), TILE_LIMIT if group_size else 1024)
    parts = triton.cdiv(whole, tile)
    groups = numel // whole
    side_by_side = max(1, 1024 // tile)
    tiles = {"groups": groups, "group_size": whole, "parts": parts, "GROUPS": side_by_side, "TILE": tile}
    return triton.cdiv(groups, side_by_side) * parts, {**tiles, **OPTIONS, "num_warps": 8 if tile > 1024 else 4}


def whitening_mode(group_size: int, parts: int) -> int:
    return (NO_WHITENING if group_size == 0 else WHOLE_GROUPS if parts == 1 else PARTS_OF_GROUPS).value


def merged(partial: Tensor, kernel: Any) -> Tensor:
    """partial [groups, parts, ...] as it is, or merged to [groups, 1, ...] where there are too many parts."""
    groups, parts, width = partial.shape
    if parts <= MOST_PARTS:
        return partial
    whole = partial.new_empty(groups, 1, width)
    kernel[(groups,)](partial, whole, parts, PARTS=MERGED_AT_ONCE, num_warps=4, **OPTIONS)
    return whole


def rl_advantage_forward(
    reward: Tensor, value: Tensor, mask: Tensor | None, reward_scale: float, normalize: str | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """See the reference. One launch; two where a group is larger than MOST_TILES tiles, three beyond MOST_PARTS."""
    numel = reward.numel()
    out = reward.new_empty(reward.shape, dtype=torch.promote_types(reward.dtype, value.dtype))
    statistics = torch.empty(numel // group_size if group_size else 0, 3, dtype=torch.float32, device=reward.device)
    if numel == 0:
        return out, statistics
    inputs = (reward.contiguous(), value.contiguous(), as_bytes(mask if mask is None else mask.contiguous()))
    programs, tiles = forward_tiles(numel, group_size)
    mode = whitening_mode(group_size, tiles["parts"])
    partial, partials = None, 1
    with launch_guard(reward):
        if mode == PARTS_OF_GROUPS.value:
            partial = torch.empty(tiles["groups"], tiles["parts"], 3, dtype=torch.float32, device=reward.device)
            rl_advantage_moments_kernel[(programs,)](
                *inputs, partial, reward_scale=reward_scale, NORMALIZE=normalize, **tiles
            )
            partial = merged(partial, rl_advantage_merge_moments_kernel)
            partials = partial.shape[1]
        rl_advantage_kernel[(programs,)](
            *inputs,
            partial,
            out,
            statistics if group_size else None,
            partials=partials,
            reward_scale=reward_scale,
            NORMALIZE=normalize,
            MODE=mode,
            PARTIALS=triton.next_power_of_2(partials),
            **tiles,
        )
    return out, statistics


def rl_advantage_backward(
    grad: Tensor,
    reward: Tensor,
    value: Tensor,
    mask: Tensor | None,
    statistics: Tensor,
    reward_scale: float,
    normalize: str | None,
    group_size: int,
) -> Tensor:
    """See the reference. One launch; two where a group is larger than a tile, three beyond MOST_PARTS of them."""
    numel = reward.numel()
    out = value.new_empty(value.shape)
    if numel == 0:
        return out
    inputs = (
        grad.contiguous(),
        reward.contiguous(),
        value.contiguous(),
        as_bytes(mask if mask is None else mask.contiguous()),
        statistics if group_size else None,
    )
    programs, tiles = advantage_tiles(numel, group_size)
    mode = whitening_mode(group_size, tiles["parts"])
    partial, partials = None, 1
    with launch_guard(reward):
        if mode == PARTS_OF_GROUPS.value:
            partial = torch.empty(tiles["groups"], tiles["parts"], 2, dtype=torch.float32, device=reward.device)
            rl_advantage_sums_kernel[(programs,)](
                *inputs, partial, reward_scale=reward_scale, NORMALIZE=normalize, **tiles
            )
            partial = merged(partial, rl_advantage_merge_sums_kernel)
            partials = partial.shape[1]
        rl_advantage_backward_kernel[(programs,)](
            *inputs,
            partial,
            out,
            partials=partials,
            reward_scale=reward_scale,
            NORMALIZE=normalize,
            MODE=mode,
            PARTIALS=triton.next_power_of_2(partials),
            **tiles,
        )
    return out
