"""The Triton kernels of arc_efe and their launchers.

A puzzle is small, so its launches cost more than its arithmetic. There are two forward and one backward: whatever a
program needs of other cells or steps it computes again from the logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.arc_efe import reference
from efe_kernels.arc_efe.reference import PlanTerms
from efe_kernels.common.launch import cdiv, launch, next_power_of_2
from efe_kernels.common.moments import store_row
from efe_kernels.common.triton import OPTIONS, launch_guard, load, members, store

EPS = tl.constexpr(reference.EPS)
FILL = tl.constexpr(reference.FILL)

# Elements of a tile, and the most cells of it. 30x30 cells at 5 steps then make 145 programs, about one for each
# multiprocessor.
TILE = 512
MOST_CELLS = 32
WINDOW = tl.constexpr(16)  # lanes for the 9 cells around a cell at the next step, and for itself


class Inputs(NamedTuple):
    forward: Any  # [T, H, W, C], logits
    backward: Any  # [T, H, W, C], logits
    observation: Any  # [T, H, W, C]
    preference: Any  # [C, H, W]
    mask: Any  # [H, W] or None


class Shape(NamedTuple):
    steps: int
    height: int
    width: int
    cells: int
    blocks: int  # of cells


class Sums(NamedTuple):
    """Over the plan: the scalars of PlanTerms, in their order."""

    risk: Any  # []
    bidirectional: Any  # []
    ambiguity: Any  # []
    reversal: Any  # []


NUM_SUMS = tl.constexpr(len(Sums._fields))


class Upstream(NamedTuple):
    """Gradients of the results."""

    risk: Any  # [] or None
    bidirectional: Any  # [] or None
    ambiguity: Any  # [] or None
    reversal: Any  # [] or None
    mean_logits: Any  # [T, C] or None


class Gradients(NamedTuple):
    forward: Any  # [T, H, W, C] or None
    backward: Any  # [T, H, W, C] or None
    observation: Any  # [T, H, W, C] or None
    preference: Any  # [C, H, W] or None


class Tile(NamedTuple):
    """The cells [CELLS] and the outcomes [OUTCOMES] of a program."""

    cell: Any
    here: Any  # which cells there are
    mask: Any  # of each cell, 1 without one
    outcome: Any
    ok: Any  # [CELLS, OUTCOMES]


class Step(NamedTuple):
    """A tile at one step. All but the scales are [CELLS, OUTCOMES], and all but the logits 0 where there is no outcome.

    A cell that is not there has equal probabilities, and 0 in the renormalised ones.
    """

    logits: Any  # of the forward plan
    forward: Any  # probabilities of the plans
    backward: Any
    kept_forward: Any  # these renormalised
    kept_backward: Any
    middle: Any
    scales: Any  # of the last three, three [CELLS]


@triton.jit
def tile_of(
    mask_ptr,  # [H, W] or None
    shape,
    block,
    C: tl.constexpr,
    OUTCOMES: tl.constexpr,
    CELLS: tl.constexpr,
):
    cell = block * CELLS + tl.arange(0, CELLS)
    here = cell < shape.cells
    mask = tl.full((CELLS,), 1.0, tl.float32)
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + cell, mask=here, other=0.0)
    outcome = tl.arange(0, OUTCOMES).to(tl.int64)
    return Tile(cell, here, mask, outcome, here[:, None] & (outcome < C)[None, :])


@triton.jit
def load_logits(
    plan_ptr,  # [T, H, W, C]
    tile,
    place,
    C: tl.constexpr,
):
    """Logits at the places [CELLS]; -inf where there is no outcome; finite in a cell that is not there: no NaN."""
    logits = load(plan_ptr, place[:, None] * C + tile.outcome[None, :], tile.ok)
    logits = tl.where((tile.mask == 0.0)[:, None], FILL, logits)
    return tl.where((tile.outcome < C)[None, :], logits, float("-inf"))


@triton.jit
def softmax(logits):
    """Probabilities, none above 1. NaN in the whole row if there is one, or +inf, or nothing but -inf."""
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights * tl.div_rn(1.0, tl.sum(weights, axis=1))[:, None]


@triton.jit
def clamped(probs):
    """Without the upper bound, which probabilities do not exceed. NaN stays NaN."""
    return tl.where(probs < EPS, EPS, probs)


@triton.jit
def renormalized(probs, inputs, tile):
    """R of the probabilities, and what they were multiplied with [CELLS]."""
    kept = tl.where(tile.ok, probs, 0.0)
    scale = tl.full(tile.cell.shape, 1.0, tl.float32)
    if inputs.mask is not None:
        scale = tl.div_rn(tile.mask, tl.sum(kept, axis=1) * tile.mask + EPS)
        kept = kept * scale[:, None]
    return kept, scale


@triton.jit
def step_of(inputs, tile, place, C: tl.constexpr):
    """The step that the places [CELLS] of the tile's cells in [T, H, W] belong to."""
    logits = load_logits(inputs.forward, tile, place, C)
    forward = softmax(logits)
    backward = softmax(load_logits(inputs.backward, tile, place, C))
    kept_forward, scale_forward = renormalized(clamped(forward), inputs, tile)
    kept_backward, scale_backward = renormalized(clamped(backward), inputs, tile)
    middle, scale = renormalized(0.5 * (clamped(forward) + clamped(backward)), inputs, tile)
    return Step(logits, forward, backward, kept_forward, kept_backward, middle, (scale_forward, scale_backward, scale))


@triton.jit
def log_eps(x):
    return tl.log(x + EPS)


@triton.jit
def confidence(step):
    product = step.forward * log_eps(step.forward) + step.backward * log_eps(step.backward)
    return tl.div_rn(1.0, 1.0 - 0.5 * tl.sum(product, axis=1))


@triton.jit
def load_observed(inputs, tile, place, C: tl.constexpr):
    """The clamped probabilities of the observation at the places [CELLS], and which of them it left as they were.

    1, which is no surprise, where there is no cell or outcome.
    """
    offset = place[:, None] * C + tile.outcome[None, :]
    probs = tl.load(inputs.observation + offset, mask=tile.ok, other=1.0)
    return tl.where(probs > 1.0, 1.0, clamped(probs)), (probs >= EPS) & (probs <= 1.0)


@triton.jit
def load_preference(inputs, shape, tile):
    return load(inputs.preference, tile.outcome[None, :] * shape.cells + tile.cell[:, None], tile.ok)


@triton.jit
def colour_of(inputs, shape, t, cell, ok, C: tl.constexpr):
    """Where the largest logit is, the first of them, of cells [CELLS, WINDOW] at the steps t [1, WINDOW].

    As in torch.argmax a NaN is larger than any number. 0 in masked cells.
    """
    ok = members(inputs.mask, cell, ok)
    logits_ptr = inputs.forward + (t * shape.cells + cell) * C
    colour = tl.zeros(cell.shape, tl.int32)
    best = tl.full(cell.shape, float("-inf"), tl.float32)
    for c in tl.range(C, loop_unroll_factor=5):
        logit = tl.load(logits_ptr + c, mask=ok, other=0.0)
        better = (logit > best) | ((logit != logit) & (best == best))
        colour = tl.where(better, c, colour)
        best = tl.where(better, logit, best)
    return colour


@triton.jit
def movement(inputs, shape, tile, t, C: tl.constexpr):
    """The reference's mv_t, (dy, dx), of each cell."""
    row = tile.cell // shape.width
    column = tile.cell % shape.width
    end = tl.where(t < shape.steps - 1, shape.height - 1, 0)
    inner = (row > 0) & (row < end) & (column > 0) & (column < shape.width - 1)
    lane = tl.arange(0, WINDOW)[None, :]
    around = lane < 9
    dy = tl.where(around, lane // 3 - 1, 0)
    dx = tl.where(around, lane % 3 - 1, 0)
    cell = tile.cell[:, None] + dy * shape.width + dx
    ok = inner[:, None] & (lane < 10)
    colour = colour_of(inputs, shape, tl.where(around, t + 1, t), cell, ok, C)
    before = tl.sum(tl.where(lane == 9, colour, 0), axis=1)
    found = (ok & around & (colour == before[:, None])).to(tl.int32)
    count = tl.maximum(tl.sum(found, axis=1), 1).to(tl.float32)
    rows = tl.sum(found * dy, axis=1).to(tl.float32)
    columns = tl.sum(found * dx, axis=1).to(tl.float32)
    return tl.div_rn(rows, count), tl.div_rn(columns, count)


@triton.jit
def movement_reversal(inputs, shape, tile, t, C: tl.constexpr):
    dy, dx = movement(inputs, shape, tile, t, C)
    mirrored_dy, mirrored_dx = movement(inputs, shape, tile, shape.steps - 1 - t, C)
    dy += mirrored_dy
    dx += mirrored_dx
    return tl.sqrt_rn(dy * dy + dx * dx)


@triton.jit
def certainty_of(inputs, shape, tile, C: tl.constexpr):
    """The mean over the steps of the largest probability of each cell, as the reference takes it."""
    first = largest_of(load_logits(inputs.forward, tile, tile.cell, C))
    above_first = tl.zeros(tile.cell.shape, tl.float32)
    for t in range(1, shape.steps):
        above_first += largest_of(load_logits(inputs.forward, tile, t * shape.cells + tile.cell, C)) - first
    steps = tl.full(tile.cell.shape, shape.steps, tl.float32)
    return first + tl.div_rn(above_first, steps)


@triton.jit
def largest_of(logits):
    """The largest probability of each cell. A maximum of them would drop a NaN."""
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return tl.div_rn(1.0, tl.sum(weights, axis=1))


@triton.jit
def arc_efe_forward_kernel(
    inputs,
    certainty_ptr,  # [H, W]
    turned_ptr,  # [T, H, W]
    table_ptr,  # [T * blocks, C + NUM_SUMS]
    shape,
    C: tl.constexpr,
    OUTCOMES: tl.constexpr,
    CELLS: tl.constexpr,
):
    """A program for each step of a block of cells: its sums of the logits of the forward plan, and its Sums."""
    program = tl.program_id(0).to(tl.int64)
    t = program // shape.blocks
    tile = tile_of(inputs.mask, shape, program % shape.blocks, C, OUTCOMES, CELLS)
    place = t * shape.cells + tile.cell
    step = step_of(inputs, tile, place, C)
    turned = tl.zeros((CELLS,), tl.float32)
    # Nothing turns after the last step, whose program has time for what goes through all steps.
    if t == shape.steps - 1:
        tl.store(certainty_ptr + tile.cell, certainty_of(inputs, shape, tile, C), mask=tile.here)
    else:
        turned = movement_reversal(inputs, shape, tile, t, C)
    turned = turned * tile.mask
    tl.store(turned_ptr + place, turned, mask=tile.here)
    risk = load_preference(inputs, shape, tile) * log_eps(step.kept_forward)
    bidirectional = (step.kept_forward + step.kept_backward) * log_eps(step.middle)
    observed, _inside = load_observed(inputs, tile, place, C)
    sums = Sums(
        -tl.sum(risk),
        -0.5 * tl.sum(bidirectional),
        -tl.sum(observed * tl.log(observed)),
        tl.sum(turned * confidence(step)),
    )
    row_ptr = table_ptr + program * (C + NUM_SUMS)
    # In float64, because the fill of masked cells drowns the other logits in float32.
    logits = tl.sum(tl.where(tile.ok, step.logits, 0.0).to(tl.float64), axis=0)
    tl.store(row_ptr + tile.outcome, logits, mask=tile.outcome < C)
    store_row(row_ptr + C, sums)


@triton.jit
def arc_efe_sum_kernel(
    table_ptr,  # [T * blocks, C + NUM_SUMS]
    sums,
    mean_logits_ptr,  # [T, C]
    shape,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program for the mean logits of each step, and the last one for the Sums. Rows are added in a fixed order."""
    t = tl.program_id(0).to(tl.int64)
    is_last = t == shape.steps
    table_ptr += tl.where(is_last, C, t * shape.blocks * (C + NUM_SUMS))
    rows = tl.where(is_last, t, 1) * shape.blocks
    column = tl.arange(0, COLUMNS)
    ok = column < tl.where(is_last, NUM_SUMS, C)
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        offset = row * (C + NUM_SUMS) + column[None, :]
        total += tl.load(table_ptr + offset, mask=(row < rows) & ok[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    if is_last:
        for i in tl.static_range(NUM_SUMS):
            tl.store(sums[i], tl.sum(tl.where(column == i, total, 0.0), axis=0))
    else:
        tl.store(mean_logits_ptr + t * C + column, total / shape.cells, mask=ok)


@triton.jit
def upstream_of(
    ptr,  # [] or None
):
    grad = 0.0
    if ptr is not None:
        grad = tl.load(ptr).to(tl.float32)
    return grad


@triton.jit
def renormalize_backward(grad, kept, scale, inputs):
    """See the reference."""
    if inputs.mask is not None:
        grad = (grad - tl.sum(grad * kept, axis=1)[:, None]) * scale[:, None]
    return grad


@triton.jit
def through_softmax(grad, grad_middle, grad_confidence, probs):
    """Gradient of the logits from those of clamp p, of both plans' share in M, and of the confidence [CELLS].

    Times 0 and not replaced by it, so that NaN stays NaN.
    """
    grad = (grad + grad_middle) * (probs >= EPS).to(tl.float32)
    grad += grad_confidence[:, None] * (log_eps(probs) + probs / (probs + EPS))
    return probs * (grad - tl.sum(grad * probs, axis=1)[:, None])


@triton.jit
def plan_gradients(
    upstream,
    inputs,
    turned_ptr,  # [T, H, W]
    gradients,
    shape,
    tile,
    t,
    C: tl.constexpr,
):
    place = t * shape.cells + tile.cell
    offset = place[:, None] * C + tile.outcome[None, :]
    step = step_of(inputs, tile, place, C)
    scale_forward, scale_backward, scale_middle = step.scales
    bidirectional = upstream_of(upstream.bidirectional)
    shared = -0.5 * bidirectional * log_eps(step.middle)
    grad_middle = (step.kept_forward + step.kept_backward) / (step.middle + EPS)
    grad_middle = -0.25 * bidirectional * renormalize_backward(grad_middle, step.middle, scale_middle, inputs)
    sure = confidence(step)
    grad_confidence = 0.5 * upstream_of(upstream.reversal) * load(turned_ptr, place, tile.here) * sure * sure
    if gradients.forward is not None:
        preference = upstream_of(upstream.risk) * load_preference(inputs, shape, tile)
        own = shared - preference / (step.kept_forward + EPS)
        own = renormalize_backward(own, step.kept_forward, scale_forward, inputs)
        own = through_softmax(own, grad_middle, grad_confidence, step.forward)
        if upstream.mean_logits is not None:
            mean = tl.load(upstream.mean_logits + t * C + tile.outcome, mask=tile.outcome < C, other=0.0)
            mean = (mean.to(tl.float64) / shape.cells).to(tl.float32)
            own += mean[None, :] * (tile.mask != 0.0).to(tl.float32)[:, None]
        store(gradients.forward, offset, own, tile.ok)
    if gradients.backward is not None:
        shared = renormalize_backward(shared, step.kept_backward, scale_backward, inputs)
        shared = through_softmax(shared, grad_middle, grad_confidence, step.backward)
        store(gradients.backward, offset, shared, tile.ok)


@triton.jit
def observation_gradient(upstream, inputs, gradients, shape, tile, t, C: tl.constexpr):
    place = t * shape.cells + tile.cell
    observed, inside = load_observed(inputs, tile, place, C)
    grad = -upstream_of(upstream.ambiguity) * (tl.log(observed) + 1.0) * inside.to(tl.float32)
    offset = place[:, None] * C + tile.outcome[None, :]
    store(gradients.observation, offset, grad, tile.ok)


@triton.jit
def preference_gradient(upstream, inputs, gradients, shape, tile, C: tl.constexpr):
    total = tl.zeros(tile.ok.shape, tl.float32)
    place = tile.cell
    for _ in range(shape.steps):
        probs = clamped(softmax(load_logits(inputs.forward, tile, place, C)))
        kept, _scale = renormalized(probs, inputs, tile)
        total += log_eps(kept)
        place += shape.cells
    offset = tile.outcome[None, :] * shape.cells + tile.cell[:, None]
    store(gradients.preference, offset, -upstream_of(upstream.risk) * total, tile.ok)


@triton.jit
def arc_efe_backward_kernel(
    upstream,
    inputs,
    turned_ptr,  # [T, H, W]
    gradients,
    shape,
    C: tl.constexpr,
    OUTCOMES: tl.constexpr,
    CELLS: tl.constexpr,
):
    """A program for each step of a block of cells, and one more of the block for the preference, if it is asked for."""
    program = tl.program_id(0).to(tl.int64)
    t = program // shape.blocks
    tile = tile_of(inputs.mask, shape, program % shape.blocks, C, OUTCOMES, CELLS)
    if t < shape.steps:
        if gradients.forward is not None or gradients.backward is not None:
            plan_gradients(upstream, inputs, turned_ptr, gradients, shape, tile, t, C)
        if gradients.observation is not None:
            observation_gradient(upstream, inputs, gradients, shape, tile, t, C)
    elif gradients.preference is not None:
        preference_gradient(upstream, inputs, gradients, shape, tile, C)


class Cover(NamedTuple):
    """How a launch covers the plan: its shape, and the constants of its kernels."""

    shape: Shape
    constants: dict[str, int]


def cover(plan: Tensor) -> Cover:
    steps, height, width, outcomes = plan.shape
    lanes = next_power_of_2(outcomes)
    block = min(MOST_CELLS, max(1, TILE // lanes))
    cells = height * width
    shape = Shape(steps, height, width, cells, cdiv(cells, block))
    return Cover(shape, {"C": outcomes, "OUTCOMES": lanes, "CELLS": block, "num_warps": 4, **OPTIONS})


def arc_efe_forward(
    forward_predictions: Tensor,
    backward_predictions: Tensor,
    state_predictions: Tensor,
    observation_probs: Tensor,
    preference: Tensor,
    mask: Tensor | None,
) -> PlanTerms:
    """See the reference. Two launches."""
    shape, constants = cover(forward_predictions)
    outcomes = constants["C"]
    columns = outcomes + NUM_SUMS.value
    read = (forward_predictions, backward_predictions, observation_probs, preference)
    inputs = Inputs(*[tensor.contiguous() for tensor in read], None if mask is None else mask.contiguous())
    new = inputs.forward.new_empty
    table = new(shape.steps * shape.blocks, columns, dtype=torch.float64)
    mean_logits = new(shape.steps, outcomes, dtype=torch.float64)
    certainty = new(shape.height, shape.width)
    turned = new(shape.steps, shape.height, shape.width)
    sums = Sums(*[new(()) for _ in range(NUM_SUMS.value)])
    lanes = next_power_of_2(max(outcomes, NUM_SUMS.value))
    rows = max(1, TILE // lanes)
    programs = shape.steps * shape.blocks
    with launch_guard(forward_predictions):
        launch(arc_efe_forward_kernel, (programs,), inputs, certainty, turned, table, shape, **constants)
        launch(
            arc_efe_sum_kernel, (shape.steps + 1,), table, sums, mean_logits, shape,
            C=outcomes, ROWS=rows, COLUMNS=lanes, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return PlanTerms(*sums, mean_logits, certainty, turned)


def arc_efe_backward(
    grad_risk: Tensor | None,
    grad_bidirectional: Tensor | None,
    grad_ambiguity: Tensor | None,
    grad_reversal: Tensor | None,
    grad_mean_logits: Tensor | None,
    needs: list[bool],
    forward_predictions: Tensor,
    backward_predictions: Tensor,
    state_predictions: Tensor,
    observation_probs: Tensor,
    preference: Tensor,
    mask: Tensor | None,
    turned: Tensor,
) -> list[Tensor]:
    """See the reference. One launch, beside the zeros for the plan that is not read."""
    shape, constants = cover(forward_predictions)
    read = (forward_predictions, backward_predictions, observation_probs, preference)
    inputs = Inputs(*[tensor.contiguous() for tensor in read], None if mask is None else mask.contiguous())
    upstream = Upstream(grad_risk, grad_bidirectional, grad_ambiguity, grad_reversal, grad_mean_logits)
    if grad_mean_logits is not None:
        upstream = upstream._replace(mean_logits=grad_mean_logits.contiguous())
    turned = turned.contiguous()
    forward, backward, state, observation, wanted = needs
    gradients = Gradients(
        torch.empty_like(inputs.forward) if forward else None,
        torch.empty_like(inputs.backward) if backward else None,
        torch.empty_like(inputs.observation) if observation else None,
        torch.empty_like(inputs.preference) if wanted else None,
    )
    found: list[Tensor | None] = list(gradients)
    if state:
        found.insert(2, torch.zeros_like(state_predictions, memory_format=torch.contiguous_format))
    programs = (shape.steps + wanted) * shape.blocks
    if forward or backward or observation or wanted:
        with launch_guard(forward_predictions):
            launch(arc_efe_backward_kernel, (programs,), upstream, inputs, turned, gradients, shape, **constants)
    return [gradient for gradient in found if gradient is not None]
