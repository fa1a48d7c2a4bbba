"""What one lane of the EFE loss's Triton kernels does with its cells: load, score, differentiate, store.

A lane holds one cell (or two) with its C outcomes in C separate registers, so that a softmax needs no exchange between
lanes. Logarithms are to base 2 inside; what the kernels write is in nats.

An absent tensor is None, and what only it needs is not compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from efe_kernels.common.triton import LN_2, LOG2_E, log2, reciprocal
from efe_kernels.efe_loss import reference
from efe_kernels.efe_loss.lanes import floored, kept, largest, store_clamped_sums, store_sums

LOWEST = tl.constexpr(reference.LOWEST_LOGIT)
PROMPT_LOGIT_RANGE = tl.constexpr(reference.PROMPT_LOGIT_RANGE)
TARGET_PREFERENCE_FLOOR = tl.constexpr(reference.TARGET_PREFERENCE_FLOOR)
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


class Array(NamedTuple):
    """A tensor and, as constants, its strides by the letters of its shape: 0 for a dimension that it lacks.

    words: whether each two outcomes of a cell lie in a word of 32 bits.
    """

    ptr: Any
    b: Any
    t: Any
    h: Any
    w: Any
    c: Any
    d: Any
    words: Any


# An Array or None for each tensor of the loss, and the target that does not count. A constant must come last: Triton
# 3.5 loses those of an Array that follows the last one.
Inputs: Any = NamedTuple("Inputs", [*((name, Any) for name in reference.Inputs._fields), ("IGNORE_INDEX", Any)])


class Shape(NamedTuple):
    """Constants of a launch; the capitals are the sizes of SPEC's shapes."""

    T: Any
    CELLS: Any  # H * W
    WIDTH: Any
    C: Any
    D: Any  # 0 without a prompt
    PAIRS: Any  # of steps, the one in which a step is alone included
    ALONE: Any  # 1 where the middle step of a plan read backwards is its own partner
    SAVED: Any  # columns of what forward saves for backward
    APPROX: Any  # whether the approximate instructions exist
    PACK: Any  # elements of a tile in each lane, 1 or 2; 0 where lanes can only be told apart by Triton


class Tile(NamedTuple):
    """Some cells of one episode."""

    episode: Any
    cell: Any  # flat index
    mask: Any  # inside the grid
    counted: Any
    target: Any  # -1 where it is out of range


class Sums(NamedTuple):
    """Of each cell over the steps, in bits; `missed` is 0 or 1."""

    risk: Any
    ambiguity: Any
    consistency: Any
    agreement: Any
    missed: Any


@triton.jit
def cell_offset(cell, WIDTH: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr):
    """Element offset of flat cell indices; grids whose rows follow each other need no division."""
    if STRIDE_H > 65536 or STRIDE_W > 65536:
        cell = cell.to(tl.int64)
    if STRIDE_H == WIDTH * STRIDE_W:
        offset = cell * STRIDE_W
    else:
        offset = (cell // WIDTH) * STRIDE_H + (cell % WIDTH) * STRIDE_W
    return offset


@triton.jit
def step_start(array, step, tile):
    """Element offset of one step of [B, T, H, W, C]."""
    return tile.episode * array.b + tl.cast(step, tl.int64) * array.t


@triton.jit
def step_offset(array, step, tile, shape):
    """Element offset of each cell at one step."""
    return step_start(array, step, tile) + cell_offset(tile.cell, shape.WIDTH, array.h, array.w)


@triton.jit
def load_outcomes(array, offset, mask, C: tl.constexpr):
    """C tensors, one per outcome, in the array's dtype.

    The mask is that of the tile, not of the cells that count: one that varies from cell to cell forbids wide loads.
    So NaN may lie in a cell that does not count, and every sum and store selects by `counted`.
    """
    xs = ()
    if array.words:
        ptr = array.ptr.to(tl.pointer_type(tl.int32)) + offset // 2
        for i in tl.static_range(C // 2):
            word = tl.load(ptr + i, mask=mask, other=0)
            low = word.to(tl.int16).to(array.ptr.dtype.element_ty, bitcast=True)
            high = (word >> 16).to(tl.int16).to(array.ptr.dtype.element_ty, bitcast=True)
            xs = xs + (low, high)
    else:
        for c in tl.static_range(C):
            xs = xs + (tl.load(array.ptr + offset + c * array.c, mask=mask, other=0.0),)
    return xs


@triton.jit
def wide(xs, C: tl.constexpr):
    """As float32."""
    found = ()
    for c in tl.static_range(C):
        found = found + (xs[c].to(tl.float32),)
    return found


@triton.jit
def load_stored(array, step, tile, shape):
    """The C values of each cell at one step of [B, T, H, W, C], as they are stored."""
    return load_outcomes(array, step_offset(array, step, tile, shape), tile.mask, shape.C)


@triton.jit
def load_step(array, step, tile, shape):
    """The same as float32."""
    return wide(load_stored(array, step, tile, shape), shape.C)


@triton.jit
def store_step(array, gradients, step, tile, shape):
    """C gradients per cell at one step of [B, T, H, W, C], rounded once; 0 in cells that do not count."""
    if array.words:
        cells = cell_offset(tile.cell, shape.WIDTH, array.h, array.w)
        store_words(array.ptr + step_start(array, step, tile), cells, gradients, tile, shape.C)
    else:
        offset = step_offset(array, step, tile, shape)
        for c in tl.static_range(shape.C):
            grad = kept(gradients[c].to(array.ptr.dtype.element_ty), tile.counted, shape.PACK)
            tl.store(array.ptr + offset + c * array.c, grad, mask=tile.mask)


@triton.jit
def side_by_side(words, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """[TILE, WIDTH] of COUNT tensors [TILE], zeros after them. WIDTH: a power of two."""
    TILE: tl.constexpr = words[0].shape[0]
    for _i in tl.static_range(COUNT, WIDTH):
        words = words + (tl.zeros_like(words[0]),)
    # What is joined last becomes neighbours.
    for level in tl.static_range(WIDTH.bit_length() - 1):
        joined = ()
        for i in tl.static_range(WIDTH >> (level + 1)):
            pair = tl.join(words[i], words[i + (WIDTH >> (level + 1))])
            joined = joined + (tl.reshape(pair, (TILE, 2 << level)),)
        words = joined
    return tl.reshape(words[0], (TILE, WIDTH))


@triton.jit
def store_words(ptr, cells, gradients, tile, C: tl.constexpr):
    """Each two gradients of a cell as a word, and the words of neighbouring cells side by side: stored as a lane holds
    them, they would be written to memory piecemeal. cells: where each begins, in elements."""
    words = ()
    for i in tl.static_range(C // 2):
        low = gradients[2 * i].to(ptr.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = gradients[2 * i + 1].to(ptr.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32) << 16
        words = words + (tl.where(tile.counted, high | low, 0),)
    WIDTH: tl.constexpr = triton.next_power_of_2(C // 2)
    index = tl.arange(0, WIDTH)
    place = (cells // 2)[:, None] + index[None, :]
    mask = tile.mask[:, None] & (index < C // 2)[None, :]
    tl.store(ptr.to(tl.pointer_type(tl.int32)) + place, side_by_side(words, C // 2, WIDTH), mask=mask)


@triton.jit
def tile_of(inputs, episode, cell, mask, shape):
    """Which of the cells count, and their targets."""
    offset = episode * inputs.target.b + cell_offset(cell, shape.WIDTH, inputs.target.h, inputs.target.w)
    target = tl.load(inputs.target.ptr + offset, mask=mask, other=0).to(tl.int64)
    counted = mask & (target != inputs.IGNORE_INDEX)
    if inputs.valid is not None:
        offset = episode * inputs.valid.b + cell_offset(cell, shape.WIDTH, inputs.valid.h, inputs.valid.w)
        counted = counted & (tl.load(inputs.valid.ptr + offset, mask=mask, other=0) != 0)
    target = tl.where((target >= 0) & (target < shape.C), target, -1).to(tl.int32)
    return Tile(episode, cell, mask, counted, target)


@triton.jit
def repeated(x, C: tl.constexpr):
    """x for each outcome."""
    xs = ()
    for _c in tl.static_range(C):
        xs = xs + (x,)
    return xs


@triton.jit
def add_all(sums, xs, C: tl.constexpr):
    added = ()
    for c in tl.static_range(C):
        added = added + (sums[c] + xs[c],)
    return added


@triton.jit
def weighted_sum(ps, xs, C: tl.constexpr):
    total = ps[0] * xs[0]
    for c in tl.static_range(1, C):
        total += ps[c] * xs[c]
    return total


@triton.jit
def finite(x):
    """x with a finite stand-in for -inf, so that 0 * log 0 is 0; a NaN stays one."""
    return tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def difference(x, top, shape):
    """x log2(e) - top, finite where x is -inf and top is not."""
    if shape.PACK == 2 and x.dtype == tl.bfloat16:
        d = floored(x, shape.PACK) * LOG2_E - top
    else:
        d = finite(x.to(tl.float32) * LOG2_E - top)
    return d


@triton.jit
def softmax(xs, shape):
    """Of logits in any dtype: probabilities p, d and l with log2 p = d - l. Shifting before the product keeps logits of
    1e4 exact."""
    top = largest(xs, shape.C, shape.PACK) * LOG2_E
    ds = ()
    es = ()
    total = tl.zeros_like(top)
    for c in tl.static_range(shape.C):
        d = difference(xs[c], top, shape)
        e = tl.exp2(d)
        ds = ds + (d,)
        es = es + (e,)
        total += e
    inverse = reciprocal(total, shape.APPROX)
    ps = ()
    for c in tl.static_range(shape.C):
        ps = ps + (es[c] * inverse,)
    return ps, ds, log2(total, shape.APPROX)


@triton.jit
def log2_of_sum(p, q, shape):
    """log2(p + q), finite where both have underflowed to 0: their weights there are 0. A NaN stays one."""
    return log2(tl.maximum(p + q, SMALLEST_NORMAL, propagate_nan=tl.PropagateNan.ALL), shape.APPROX)


@triton.jit
def preference_scales(prompt, episode, shape):
    """sigmoid(prompt[:C]) of one episode as C scalars; ones without a prompt."""
    scales = ()
    for c in tl.static_range(shape.C):
        if prompt is not None:
            e = tl.load(prompt.ptr + episode * prompt.b + c * prompt.d).to(tl.float32)
            scales = scales + (reciprocal(1.0 + tl.exp2(-e * LOG2_E), shape.APPROX),)
        else:
            scales = scales + (1.0,)
    return scales


@triton.jit
def log_preference(inputs, tile, shape):
    """log2 c of each cell."""
    scales = preference_scales(inputs.prompt, tile.episode, shape)
    loaded = load_step(inputs.preference_logits, 0, tile, shape)
    scaled = ()
    for c in tl.static_range(shape.C):
        scaled = scaled + (finite(loaded[c]) * scales[c],)
    _ps, ds, l = softmax(scaled, shape)
    logs = ()
    for c in tl.static_range(shape.C):
        logs = logs + (ds[c] - l,)
    return logs


@triton.jit
def observation_entropy(observation_probs, step, tile, shape):
    """Entropy in bits of the observation probabilities of each cell at one step."""
    total = tl.zeros(tile.cell.shape, tl.float32)
    ps = load_step(observation_probs, step, tile, shape)
    for c in tl.static_range(shape.C):
        total -= ps[c] * log2(tl.maximum(ps[c], SMALLEST_NORMAL), shape.APPROX)
    return total


@triton.jit
def observation_gradient(ps, weight, shape):
    """d H(p) / d p = -(ln p + 1), with the logarithm clamped at the smallest normal number."""
    gradients = ()
    for c in tl.static_range(shape.C):
        above = tl.where(ps[c] >= SMALLEST_NORMAL, 1.0, 0.0)
        grad = -LN_2 * log2(tl.maximum(ps[c], SMALLEST_NORMAL), shape.APPROX) - above
        gradients = gradients + (weight * grad,)
    return gradients


@triton.jit
def anchor_divergence(logs, target_preference, tile, shape):
    """KL(c || target preference) in bits per cell, 0 where it is not set, and log2 of the target preference."""
    offset = cell_offset(tile.cell, shape.WIDTH, target_preference.h, target_preference.w)
    anchors = wide(load_outcomes(target_preference, offset, tile.mask, shape.C), shape.C)
    row = anchors[0]
    for c in tl.static_range(1, shape.C):
        row += anchors[c]
    log_anchors = ()
    divergence = tl.zeros_like(row)
    for c in tl.static_range(shape.C):
        log_anchor = log2(
            tl.maximum(anchors[c], TARGET_PREFERENCE_FLOOR, propagate_nan=tl.PropagateNan.ALL), shape.APPROX
        )
        log_anchors = log_anchors + (log_anchor,)
        divergence += tl.exp2(logs[c]) * (logs[c] - log_anchor)
    is_set = tile.counted & (row != 0)
    return tl.where(is_set, divergence, 0.0), log_anchors, is_set


@triton.jit
def missed_target(xs, tile, shape):
    """1 where the argmax of a counted cell is not its target, 0 elsewhere."""
    top = largest(xs, shape.C, shape.PACK)
    best = tl.zeros(tile.target.shape, tl.int32)
    # From the last to the first: of several, argmax is the first.
    for i in tl.static_range(1, shape.C + 1):
        best = tl.where(xs[shape.C - i].to(tl.float32) == top, shape.C - i, best)
    # Outcome 0 where none is possible, be some of them NaN.
    best = tl.where(top > float("-inf"), best, 0)
    return tl.where(tile.counted & (best != tile.target), 1.0, 0.0)


@triton.jit
def cross_entropy(ds, l, tile, C: tl.constexpr):
    """Cross-entropy in bits. A target out of range gives NaN, one whose logit is -inf gives inf."""
    d_target = ds[0]
    for c in tl.static_range(1, C):
        d_target = tl.where(tile.target == c, ds[c], d_target)
    loss = tl.where(d_target <= LOWEST, float("inf"), l - d_target)
    loss = tl.where(tile.target >= 0, loss, float("nan"))
    return tl.where(tile.counted, loss, 0.0)


@triton.jit
def softmax_gradient(ps, fs, C: tl.constexpr):
    """p (f - sum p f): the gradient of sum p f(log p) for every f whose other parts cancel."""
    mean = weighted_sum(ps, fs, C)
    gradients = ()
    for c in tl.static_range(C):
        gradients = gradients + (ps[c] * (fs[c] - mean),)
    return gradients


@triton.jit
def add_cross_entropy(gradients, ps, tile, weight, C: tl.constexpr):
    added = ()
    for c in tl.static_range(C):
        added = added + (gradients[c] + weight * tl.where(tile.target == c, ps[c] - 1.0, ps[c]),)
    return added


@triton.jit
def load_direction(
    saved_ptr,  # [SAVED] of this episode
    step,
    weight,
    C: tl.constexpr,
):
    """The gradients of the prompt term, one of each outcome for all cells of a step."""
    grads = ()
    for c in tl.static_range(C):
        grads = grads + (weight * tl.load(saved_ptr + 1 + step * C + c),)
    return grads


@triton.jit
def add_direction(gradients, xs, direction, C: tl.constexpr):
    """The prompt term's gradient, 0 where the logit was clamped."""
    added = ()
    for c in tl.static_range(C):
        inside = tl.abs(xs[c].to(tl.float32)) <= PROMPT_LOGIT_RANGE
        added = added + (gradients[c] + tl.where(inside, direction[c], 0.0),)
    return added


@triton.jit
def add_anchor(gradients, logs, log_anchors, distance, is_set, weight, C: tl.constexpr):
    """d KL(c || target preference) / d (s l), where the target preference is set."""
    added = ()
    for c in tl.static_range(C):
        grad = weight * LN_2 * tl.exp2(logs[c]) * (logs[c] - log_anchors[c] - distance)
        added = added + (gradients[c] + tl.where(is_set, grad, 0.0),)
    return added


@triton.jit
def prompt_logit(x):
    """A logit as the prompt term reads it; a NaN stays one."""
    return tl.clamp(x.to(tl.float32), -PROMPT_LOGIT_RANGE, PROMPT_LOGIT_RANGE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_step(sums, xs, information, step, inputs, direction_ptr, tile, shape):
    """What each cell at one step says alone; with direction_ptr [T, C] also the sums over the tile of its logits."""
    ambiguity = sums.ambiguity
    if inputs.observation_probs is not None:
        ambiguity += observation_entropy(inputs.observation_probs, step, tile, shape)
    if direction_ptr is not None:
        store_direction(direction_ptr + step * shape.C, xs, tile, shape)
    return Sums(sums.risk + information, ambiguity, sums.consistency, sums.agreement, sums.missed)


@triton.jit
def store_direction(
    ptr,  # [C] float32, written
    xs,
    tile,
    shape,
):
    """The sums over the tile of the clamped logits at one step, or of these less that of outcome 0: what all outcomes
    of a cell share is no direction, and in float32 it would cost digits. Of 16-bit logits the sums hold it exactly."""
    if shape.PACK > 0 and xs[0].dtype.primitive_bitwidth == 16:
        store_clamped_sums(ptr, xs, tile.counted, shape.C, shape.PACK)
    else:
        shared = prompt_logit(xs[0])
        own = ()
        for c in tl.static_range(shape.C):
            own = own + (tl.where(tile.counted, prompt_logit(xs[c]) - shared, 0.0),)
        store_sums(ptr, own, shape.C, shape.PACK)


@triton.jit
def add_agreement(sums, divergence):
    return Sums(sums.risk, sums.ambiguity, sums.consistency, sums.agreement + divergence, sums.missed)


@triton.jit
def add_final(sums, xs, ds, l, tile, shape):
    """What compares the final step with the target."""
    consistency = sums.consistency + cross_entropy(ds, l, tile, shape.C)
    missed = sums.missed + missed_target(xs, tile, shape)
    return Sums(sums.risk, sums.ambiguity, consistency, sums.agreement, missed)
