"""The Triton kernel of grid_reward and its launcher."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.common.launch import cdiv, launch, next_power_of_2
from efe_kernels.common.triton import OPTIONS, as_bytes, launch_guard, members, unit_clamp
from efe_kernels.reward.reference import IGNORE_INDEX, in_palette, size_score

IGNORE = tl.constexpr(IGNORE_INDEX)


class Prediction(NamedTuple):
    ptr: Any  # [B, height, width, C] logits or [B, height, width] integers, any strides
    stride_b: int
    stride_h: int
    stride_w: int
    stride_c: int | None  # None: integers
    height: int
    width: int
    row_scale: float  # of a row of the target to one of the prediction
    column_scale: float
    size_score: float


class Grid(NamedTuple):
    ptr: Any  # [B, H, W], any strides
    stride_b: int
    stride_h: int
    stride_w: int


class Shape(NamedTuple):
    """Of the target."""

    batch: int
    height: int
    width: int


class Terms(NamedTuple):
    """Scores of a prediction, their differences or their weights: see REWARD_TERMS."""

    accuracy: Any
    size: Any
    colour: Any
    reversibility: Any


class Counts(NamedTuple):
    """What the scores of a prediction are made of, summed over the blocks of cells."""

    equal: Any  # [CELLS], cells that equal the target
    excess: Any  # [CELLS, PALETTE], cells of a colour, less those of the target


@triton.jit
def load_colour(prediction, offset, ok, C: tl.constexpr):
    """Colour of each cell at the offset: the argmax, which NaN never is, or the integer, -1 outside [0, C)."""
    dtype: tl.constexpr = prediction.ptr.dtype.element_ty
    if dtype.is_floating():
        colour = tl.zeros(offset.shape, tl.int32)
        best = tl.full(offset.shape, float("-inf"), tl.float64 if dtype == tl.float64 else tl.float32)
        for c in tl.static_range(C):
            logit = tl.load(prediction.ptr + offset + c * prediction.stride_c, mask=ok, other=0.0).to(best.dtype)
            colour = tl.where(logit > best, c, colour)
            best = tl.where(logit > best, logit, best)
    else:
        integer = tl.load(prediction.ptr + offset, mask=ok, other=0).to(tl.int64)
        colour = tl.where((integer >= 0) & (integer < C), integer, -1).to(tl.int32)
    return colour


@triton.jit
def source_index(index, scale, size):
    """Nearest neighbour in the float32 arithmetic of `interpolate`."""
    return tl.minimum((index.to(tl.float32) * scale).to(tl.int32), size - 1).to(tl.int64)


@triton.jit
def resized_colour(prediction, b, row, column, ok, C: tl.constexpr):
    """Colour at the cell of the prediction that stands for the target's (row, column)."""
    source_row = source_index(row, prediction.row_scale, prediction.height)
    source_column = source_index(column, prediction.column_scale, prediction.width)
    offset = b * prediction.stride_b + source_row * prediction.stride_h + source_column * prediction.stride_w
    return load_colour(prediction, offset, ok, C)


@triton.jit
def cell_offset(grid, row, column):
    return row.to(tl.int64) * grid.stride_h + column.to(tl.int64) * grid.stride_w


@triton.jit
def add_cells(counts, colour, target, target_counts, counted, palette):
    """counts and those of a block of cells."""
    equal = counts.equal + (counted & (colour == target)).to(tl.int32)
    shade = tl.where(counted, colour, -2)[:, None]
    return Counts(equal, counts.excess + ((shade == palette).to(tl.int32) - target_counts))


@triton.jit
def scores_of(counts, count, size, reversibility, C: tl.constexpr):
    """Terms from the counts of all cells. count: of the cells that count, at least 1."""
    difference = tl.sum(tl.abs(tl.sum(counts.excess, axis=0)), axis=0)
    accuracy = tl.div_rn(tl.sum(counts.equal, axis=0).to(tl.float32), count)
    colours = tl.full((), C, tl.float32)
    colour = 1.0 - tl.div_rn(tl.div_rn(difference.to(tl.float32), count), colours)
    return Terms(accuracy, size, colour, reversibility)


@triton.jit
def store_rows(
    out_ptr,  # [rows, B]
    b,
    batch,
    FIRST: tl.constexpr,
    values,
):
    """Values of the episode b in the rows from FIRST on."""
    for i in tl.static_range(len(values)):
        tl.store(out_ptr + (FIRST + i) * batch + b, values[i])


@triton.jit
def store_table(
    out_ptr,  # [14, B]
    b,
    batch,
    before,
    after,
    weights,
    mask_ratio,
):
    """The rows of the reference's reward_table from the Terms before and after."""
    delta = Terms(
        unit_clamp(after.accuracy - before.accuracy),
        unit_clamp(after.size - before.size),
        unit_clamp(after.colour - before.colour),
        unit_clamp(after.reversibility - before.reversibility),
    )
    reward = weights.accuracy * delta.accuracy + weights.size * delta.size
    reward += weights.colour * delta.colour + weights.reversibility * delta.reversibility
    store_rows(out_ptr, b, batch, 0, (reward,))
    store_rows(out_ptr, b, batch, 1, delta)
    store_rows(out_ptr, b, batch, 5, before)
    store_rows(out_ptr, b, batch, 9, after)
    store_rows(out_ptr, b, batch, 13, (mask_ratio,))


@triton.jit
def grid_reward_kernel(
    before,
    after,
    target,
    valid,  # or None
    reversibility_ptr,  # [2, B] or None
    out_ptr,  # [14, B]
    shape,
    weights,
    C: tl.constexpr,
    PALETTE: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program per episode. All counts are integers: exact, whatever the order."""
    b = tl.program_id(0).to(tl.int64)
    palette = tl.arange(0, PALETTE)[None, :]
    none = tl.zeros((CELLS,), tl.int32)
    counts_before = Counts(none, tl.zeros((CELLS, PALETTE), tl.int32))
    counts_after = counts_before
    total = none
    for block in range(BLOCKS):
        cell = block * CELLS + tl.arange(0, CELLS)
        ok = cell < shape.height * shape.width
        row = cell // shape.width
        column = cell % shape.width
        place = target.ptr + b * target.stride_b + cell_offset(target, row, column)
        colour = tl.load(place, mask=ok, other=0).to(tl.int64)
        counted = ok & (colour != IGNORE)
        if valid is not None:
            counted = counted & members(valid.ptr + b * valid.stride_b, cell_offset(valid, row, column), ok)
        colour = tl.where((colour >= 0) & (colour < C), colour, -2).to(tl.int32)
        colour_before = resized_colour(before, b, row, column, counted, C)
        colour_after = resized_colour(after, b, row, column, counted, C)
        total += counted.to(tl.int32)
        target_counts = (tl.where(counted, colour, -2)[:, None] == palette).to(tl.int32)
        counts_before = add_cells(counts_before, colour_before, colour, target_counts, counted, palette)
        counts_after = add_cells(counts_after, colour_after, colour, target_counts, counted, palette)
    counted = tl.sum(total, axis=0)
    count = tl.maximum(counted, 1).to(tl.float32)
    back_before = 0.5
    back_after = 0.5
    if reversibility_ptr is not None:
        back_before = tl.load(reversibility_ptr + b)
        back_after = tl.load(reversibility_ptr + shape.batch + b)
    scores_before = scores_of(counts_before, count, before.size_score, back_before, C)
    scores_after = scores_of(counts_after, count, after.size_score, back_after, C)
    wrong = (counted - tl.sum(counts_after.equal, axis=0)).to(tl.float32)
    store_table(out_ptr, b, shape.batch, scores_before, scores_after, weights, tl.div_rn(wrong, count))


def grid(tensor: Tensor | None) -> Grid | None:
    return None if tensor is None else Grid(tensor, *tensor.stride())


def prediction(tensor: Tensor, height: int, width: int) -> Prediction:
    """height, width: of the target."""
    rows, columns = tensor.shape[1:3]
    score = size_score((rows, columns), (height, width))
    strides = (*tensor.stride(), None)[:4]
    return Prediction(tensor, *strides, rows, columns, rows / height, columns / width, score)


@in_palette
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
    palette = next_power_of_2(num_colors)
    cells = min(256, max(32, 4096 // palette))
    with launch_guard(target):
        launch(
            grid_reward_kernel,
            (batch,),
            prediction(before, height, width),
            prediction(after, height, width),
            grid(target),
            grid(as_bytes(valid)),
            reversibility,
            out,
            Shape(batch, height, width),
            Terms(*weights),
            C=num_colors,
            PALETTE=palette,
            CELLS=cells,
            BLOCKS=cdiv(height * width, cells),
            **OPTIONS,
        )
    return out
