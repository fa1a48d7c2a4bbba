"""The Triton kernel of grid_reward and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.common.triton import OPTIONS, as_bytes, launch_guard, unit_clamp
from efe_kernels.reward.reference import IGNORE_INDEX, size_score

IGNORE = tl.constexpr(IGNORE_INDEX)


@triton.jit
def load_colour(
    ptr,  # [B, H, W, C] logits or [B, H, W] integers, any strides
    offset,
    ok,
    stride_c,
    C: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """Colour of each cell at ptr + offset: the argmax, which NaN never is, or the integer, -1 outside [0, C)."""
    if LOGITS:
        colour = tl.zeros(offset.shape, tl.int32)
        best = tl.full(offset.shape, float("-inf"), tl.float64 if ptr.dtype.element_ty == tl.float64 else tl.float32)
        for c in tl.static_range(C):
            logit = tl.load(ptr + offset + c * stride_c, mask=ok, other=0.0).to(best.dtype)
            colour = tl.where(logit > best, c, colour)
            best = tl.where(logit > best, logit, best)
    else:
        integer = tl.load(ptr + offset, mask=ok, other=0).to(tl.int64)
        colour = tl.where((integer >= 0) & (integer < C), integer, -1).to(tl.int32)
    return colour


@triton.jit
def resized_colour(
    ptr,  # [B, H, W, C] logits or [B, H, W] integers, any strides
    b,
    row,
    column,
    ok,
    height,
    width,
    row_scale,
    column_scale,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    C: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """Colour at the source cell of (row, column), nearest neighbour in the float32 arithmetic of `interpolate`."""
    source_row = tl.minimum((row.to(tl.float32) * row_scale).to(tl.int32), height - 1).to(tl.int64)
    source_column = tl.minimum((column.to(tl.float32) * column_scale).to(tl.int32), width - 1).to(tl.int64)
    offset = b * stride_b + source_row * stride_h + source_column * stride_w
    return load_colour(ptr, offset, ok, stride_c, C, LOGITS)


@triton.jit
def store_scores(
    out_ptr,  # [14, B]
    b,
    batch,
    equal_before,
    equal_after,
    difference_before,
    difference_after,
    counted,
    size_before,
    size_after,
    reversibility_ptr,  # [2, B] or None
    weight_accuracy,
    weight_size,
    weight_colour,
    weight_reversibility,
    C: tl.constexpr,
):
    count = tl.maximum(counted, 1).to(tl.float32)
    accuracy_before = tl.div_rn(equal_before.to(tl.float32), count)
    accuracy_after = tl.div_rn(equal_after.to(tl.float32), count)
    colours = tl.full((), C, tl.float32)
    colour_before = 1.0 - tl.div_rn(tl.div_rn(difference_before.to(tl.float32), count), colours)
    colour_after = 1.0 - tl.div_rn(tl.div_rn(difference_after.to(tl.float32), count), colours)
    back_before = 0.5
    back_after = 0.5
    if reversibility_ptr is not None:
        back_before = tl.load(reversibility_ptr + b)
        back_after = tl.load(reversibility_ptr + batch + b)
    delta_accuracy = unit_clamp(accuracy_after - accuracy_before)
    delta_size = unit_clamp(size_after - size_before)
    delta_colour = unit_clamp(colour_after - colour_before)
    delta_back = unit_clamp(back_after - back_before)
    reward = weight_accuracy * delta_accuracy + weight_size * delta_size
    reward += weight_colour * delta_colour + weight_reversibility * delta_back
    tl.store(out_ptr + b, reward)
    tl.store(out_ptr + 1 * batch + b, delta_accuracy)
    tl.store(out_ptr + 2 * batch + b, delta_size)
    tl.store(out_ptr + 3 * batch + b, delta_colour)
    tl.store(out_ptr + 4 * batch + b, delta_back)
    tl.store(out_ptr + 5 * batch + b, accuracy_before)
    tl.store(out_ptr + 6 * batch + b, size_before)
    tl.store(out_ptr + 7 * batch + b, colour_before)
    tl.store(out_ptr + 8 * batch + b, back_before)
    tl.store(out_ptr + 9 * batch + b, accuracy_after)
    tl.store(out_ptr + 10 * batch + b, size_after)
    tl.store(out_ptr + 11 * batch + b, colour_after)
    tl.store(out_ptr + 12 * batch + b, back_after)
    tl.store(out_ptr + 13 * batch + b, tl.div_rn((counted - equal_after).to(tl.float32), count))


@triton.jit
def grid_reward_kernel(
    before_ptr,  # [B, H_before, W_before, C] logits or [B, H_before, W_before] integers, any strides
    after_ptr,  # [B, H_after, W_after, C] logits or [B, H_after, W_after] integers, any strides
    target_ptr,  # [B, H, W] any strides
    valid_ptr,  # [B, H, W] any strides, or None
    reversibility_ptr,  # [2, B] or None
    out_ptr,  # [14, B]
    batch,
    height,
    width,
    before_height,
    before_width,
    before_row_scale,
    before_column_scale,
    before_stride_b,
    before_stride_h,
    before_stride_w,
    before_stride_c,
    after_height,
    after_width,
    after_row_scale,
    after_column_scale,
    after_stride_b,
    after_stride_h,
    after_stride_w,
    after_stride_c,
    target_stride_b,
    target_stride_h,
    target_stride_w,
    valid_stride_b,
    valid_stride_h,
    valid_stride_w,
    size_before,
    size_after,
    weight_accuracy,
    weight_size,
    weight_colour,
    weight_reversibility,
    LOGITS_BEFORE: tl.constexpr,
    LOGITS_AFTER: tl.constexpr,
    C: tl.constexpr,
    PALETTE: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program per episode. All counts are integers: exact, whatever the order."""
    b = tl.program_id(0).to(tl.int64)
    palette = tl.arange(0, PALETTE)[None, :]
    excess_before = tl.zeros((CELLS, PALETTE), tl.int32)  # cells of a colour, less those of the target
    excess_after = tl.zeros((CELLS, PALETTE), tl.int32)
    equal_before = tl.zeros((CELLS,), tl.int32)
    equal_after = tl.zeros((CELLS,), tl.int32)
    counted = tl.zeros((CELLS,), tl.int32)
    for block in range(BLOCKS):
        cell = block * CELLS + tl.arange(0, CELLS)
        ok = cell < height * width
        row = cell // width
        column = cell % width
        target_offset = row.to(tl.int64) * target_stride_h + column.to(tl.int64) * target_stride_w
        target = tl.load(target_ptr + b * target_stride_b + target_offset, mask=ok, other=0).to(tl.int64)
        counts = ok & (target != IGNORE)
        if valid_ptr is not None:
            valid_offset = row.to(tl.int64) * valid_stride_h + column.to(tl.int64) * valid_stride_w
            counts = counts & (tl.load(valid_ptr + b * valid_stride_b + valid_offset, mask=ok, other=0) != 0)
        target = tl.where((target >= 0) & (target < C), target, -2).to(tl.int32)
        before = resized_colour(
            before_ptr, b, row, column, counts, before_height, before_width, before_row_scale, before_column_scale,
            before_stride_b, before_stride_h, before_stride_w, before_stride_c, C, LOGITS_BEFORE,
        )  # fmt: skip
        after = resized_colour(
            after_ptr, b, row, column, counts, after_height, after_width, after_row_scale, after_column_scale,
            after_stride_b, after_stride_h, after_stride_w, after_stride_c, C, LOGITS_AFTER,
        )  # fmt: skip
        counted += counts.to(tl.int32)
        equal_before += (counts & (before == target)).to(tl.int32)
        equal_after += (counts & (after == target)).to(tl.int32)
        shade = tl.where(counts, target, -2)[:, None]
        target_counts = (shade == palette).to(tl.int32)
        excess_before += (tl.where(counts, before, -2)[:, None] == palette).to(tl.int32) - target_counts
        excess_after += (tl.where(counts, after, -2)[:, None] == palette).to(tl.int32) - target_counts
    store_scores(
        out_ptr, b, batch, tl.sum(equal_before, axis=0), tl.sum(equal_after, axis=0),
        tl.sum(tl.abs(tl.sum(excess_before, axis=0)), axis=0), tl.sum(tl.abs(tl.sum(excess_after, axis=0)), axis=0),
        tl.sum(counted, axis=0), size_before, size_after, reversibility_ptr,
        weight_accuracy, weight_size, weight_colour, weight_reversibility, C,
    )  # fmt: skip


def prediction_arguments(prediction: Tensor, height: int, width: int) -> tuple[float | int, ...]:
    """Size, resize scales and strides of a prediction, in the order of the kernel's arguments."""
    rows, columns = prediction.shape[1:3]
    stride_c = prediction.stride(3) if prediction.dim() == 4 else 0
    return (rows, columns, rows / height, columns / width, *prediction.stride()[:3], stride_c)


def grid_reward(
    before: Tensor,
    after: Tensor,
    target: Tensor,
    valid: Tensor | None,
    reversibility: Tensor | None,
    weights: list[float],
    num_colors: int,
) -> Tensor:
    batch, height, width = target.shape
    out = torch.empty(14, batch, dtype=torch.float32, device=target.device)
    if batch == 0:
        return out
    palette = triton.next_power_of_2(num_colors)
    cells = min(256, max(32, 4096 // palette))
    size = (height, width)
    with launch_guard(target):
        grid_reward_kernel[(batch,)](
            before, after, target, as_bytes(valid), reversibility, out, batch, height, width,
            *prediction_arguments(before, height, width),
            *prediction_arguments(after, height, width),
            *target.stride(),
            *((0, 0, 0) if valid is None else valid.stride()),
            size_score((before.shape[1], before.shape[2]), size),
            size_score((after.shape[1], after.shape[2]), size),
            *weights,
            LOGITS_BEFORE=before.is_floating_point(),
            LOGITS_AFTER=after.is_floating_point(),
            C=num_colors,
            PALETTE=palette,
            CELLS=cells,
            BLOCKS=triton.cdiv(height * width, cells),
            **OPTIONS,
        )  # fmt: skip
    return out
