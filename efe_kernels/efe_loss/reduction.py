"""The Triton kernels that add up what the walk over the cells has left in parts, in a fixed order.

From the sums over tiles to the terms and the total of each episode; from sums over tiles and over chunks of episodes to
the gradients of a shared preference, of the prompt and of the projection.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from efe_kernels.common.triton import LOG2_E
from efe_kernels.efe_loss import reference
from efe_kernels.efe_loss.cells import cell_offset
from efe_kernels.efe_loss.kernels import COUNTED, MISSED, NUM_SUMS, NUM_TERMS, weighted

SHORTEST_DIRECTION = tl.constexpr(reference.SHORTEST_DIRECTION)
PROMPT = tl.constexpr(reference.TERMS.index("prompt"))


class Outputs(NamedTuple):
    """Pointers to the results, float32, as in `reference.Outputs`."""

    total: Any  # [B]
    terms: Any  # [B, NUM_TERMS]
    mask_ratio: Any  # [B]
    hard_cell_scale: Any  # [B]
    saved: Any  # [B, SAVED]


@triton.jit
def efe_loss_episode_kernel(
    sums_ptr,  # [B, TILES, NUM_SUMS] float32
    direction_ptr,  # [B, TILES, T, C] float32, or None without a prompt term
    prompt,  # [B, D]
    projection,  # [C, D]
    outputs,
    weights,
    min_ratio,
    max_cells,
    shape,
    HARD_CELL: tl.constexpr,
    TILES: tl.constexpr,
    C_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
):
    """Terms and total of one episode."""
    episode = tl.program_id(0).to(tl.int64)
    # The last slot is padding that no program writes.
    sums = sum_over_tiles(sums_ptr + episode * TILES * NUM_SUMS, NUM_TERMS, NUM_SUMS, TILES, NUM_SUMS, TILE_BLOCK)
    saved_ptr = outputs.saved + episode * shape.SAVED
    cells = pick(sums, COUNTED)
    share = 1.0 / tl.maximum(cells, 1.0)
    risk = pick(sums, 0) * share / shape.T
    ambiguity = pick(sums, 1) * share / shape.T
    consistency = pick(sums, 2) * share
    # Rounding can take a divergence of 0 below it.
    agreement = tl.maximum(pick(sums, 3), 0.0, propagate_nan=tl.PropagateNan.ALL) * share / shape.T
    anchor = pick(sums, 4) * share
    mask_ratio = pick(sums, MISSED) * share
    step = cells * shape.T / max_cells
    direction = 0.0
    if direction_ptr is not None:
        direction_ptr += episode * TILES * shape.T * shape.C
        direction = prompt_term(
            direction_ptr, prompt, projection, episode, saved_ptr, share, shape, TILES, C_BLOCK, D_BLOCK, TILE_BLOCK
        )
    scale = 1.0
    if HARD_CELL:
        scale = tl.where(mask_ratio < min_ratio, 1.0, 0.5 + 0.5 * mask_ratio)
    total = weighted(weights.risk, risk) + weighted(weights.ambiguity, ambiguity)
    total += weighted(weights.consistency, consistency) + weighted(weights.agreement, agreement)
    total += weighted(weights.anchor, anchor) + weighted(weights.prompt, direction) + weighted(weights.step, step)
    tl.store(outputs.total + episode, total * scale)
    tl.store(outputs.mask_ratio + episode, mask_ratio)
    tl.store(outputs.hard_cell_scale + episode, scale)
    tl.store(saved_ptr, cells)
    terms_ptr = outputs.terms + episode * NUM_TERMS
    tl.store(terms_ptr + 0, risk)
    tl.store(terms_ptr + 1, ambiguity)
    tl.store(terms_ptr + 2, consistency)
    tl.store(terms_ptr + 3, agreement)
    tl.store(terms_ptr + 4, anchor)
    tl.store(terms_ptr + 5, direction)
    tl.store(terms_ptr + 6, step)


@triton.jit
def sum_over_tiles(
    ptr,  # [TILES, STRIDE]
    count,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
):
    """Sum of the rows, of which the first `count` columns are read; the other columns are 0."""
    column = tl.arange(0, COLUMNS)
    sums = tl.zeros((TILE_BLOCK, COLUMNS), tl.float32)
    for first in range(0, TILES, TILE_BLOCK):
        tile = first + tl.arange(0, TILE_BLOCK)
        mask = (tile < TILES)[:, None] & (column < count)[None, :]
        sums += tl.load(ptr + tile[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def pick(vector, INDEX: tl.constexpr):
    """One entry of a small vector as a scalar."""
    return tl.sum(tl.where(tl.arange(0, vector.shape[0]) == INDEX, vector, 0.0))


@triton.jit
def prompt_term(
    direction_ptr,  # [TILES, T, C] sums over a tile of the clamped logits, or of these less that of outcome 0
    prompt,
    projection,
    episode,
    saved_ptr,  # [SAVED] of this episode, written after the first
    share,
    shape,
    TILES: tl.constexpr,
    C_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
):
    """Minus the mean over steps of cos(z, u), u = W e, and its gradient.

    With unit vectors z' and u': d cos / d z = (u' - cos z') / |z|. z is the centred sum over cells times share, so the
    gradient that reaches a logit is the centred d / d z times share.
    """
    T: tl.constexpr = shape.T
    C: tl.constexpr = shape.C
    outcome = tl.arange(0, C_BLOCK)
    real = outcome < C
    prompt_ptr = prompt.ptr + episode * prompt.b
    u = tl.zeros((C_BLOCK,), tl.float32)
    for start in range(0, shape.D, D_BLOCK):
        d = start + tl.arange(0, D_BLOCK)
        e = tl.load(prompt_ptr + d * prompt.d, mask=d < shape.D, other=0.0).to(tl.float32)
        offset = outcome[:, None] * projection.c + d[None, :] * projection.d
        mask = real[:, None] & (d[None, :] < shape.D)
        w = tl.load(projection.ptr + offset, mask=mask, other=0.0).to(tl.float32)
        u += tl.sum(w * e[None, :], axis=1)
    size = tl.maximum(tl.max(tl.abs(u)), 1.0)
    u = u / size  # so that no square overflows
    u_norm = tl.sqrt(tl.sum(u * u))
    total = 0.0
    grad_u = tl.zeros((C_BLOCK,), tl.float32)
    for t in range(T):
        sums = sum_over_tiles(direction_ptr + t * C, C, T * C, TILES, C_BLOCK, TILE_BLOCK)
        sums = tl.where(real, sums - pick(sums, 0), 0.0)
        z = tl.where(real, sums - tl.sum(sums) / C, 0.0) * share
        z_norm = tl.sqrt(tl.sum(z * z))
        defined = (z_norm > SHORTEST_DIRECTION) & (u_norm > SHORTEST_DIRECTION)
        z_inverse = tl.where(defined, 1.0 / tl.where(defined, z_norm, 1.0), 0.0)
        u_inverse = tl.where(defined, 1.0 / tl.where(defined, u_norm, 1.0), 0.0)
        # A vector too short for a direction has a cosine of 0 with whatever the other one holds.
        short = (z_norm <= SHORTEST_DIRECTION) | (u_norm <= SHORTEST_DIRECTION)
        cosine = tl.where(short, 0.0, tl.sum(z * u) * z_inverse * u_inverse)
        total -= cosine / T
        grad_u -= tl.where(short, 0.0, (z * z_inverse - cosine * u * u_inverse) * u_inverse / T)
        grad_z = tl.where(short, 0.0, -(u * u_inverse - cosine * z * z_inverse) * z_inverse / T)
        grad_z = (grad_z - tl.sum(tl.where(real, grad_z, 0.0)) / C) * share
        tl.store(saved_ptr + 1 + t * C + outcome, grad_z, mask=real)
    tl.store(saved_ptr + 1 + T * C + outcome, grad_u / size, mask=real)
    return total


@triton.jit(do_not_specialize=["num_episodes", "num_chunks"])
def efe_loss_gradients_kernel(
    prompt,
    projection,
    upstream,
    gradients,  # of what many cells share; None for the others
    weight_prompt,
    num_episodes,
    num_chunks,
    shape,
    PREFERENCE_PROGRAMS: tl.constexpr,
    PROJECTION_PROGRAMS: tl.constexpr,
    TILES: tl.constexpr,
    CELL_BLOCK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    EPISODE_BLOCK: tl.constexpr,
    PROMPT_BLOCK: tl.constexpr,
):
    """The gradients that many cells share, in one launch: of a shared preference, of the projection and of the prompt.

    The first programs take an outcome of a block of cells each, the next ones a row of a block of the projection, and
    the others one prompt each. With u = W e: d / d W = (d / d u) e^T, d / d e = W^T (d / d u), and
    sigmoid' = s (1 - s).
    """
    program = tl.program_id(0)
    if PREFERENCE_PROGRAMS > 0:
        if program < PREFERENCE_PROGRAMS:
            preference_gradient(
                gradients.partial, gradients.preference_logits, program // shape.C, program % shape.C, num_chunks,
                shape, CELL_BLOCK, CHUNK_BLOCK,
            )  # fmt: skip
    program -= PREFERENCE_PROGRAMS
    if PROJECTION_PROGRAMS > 0:
        if (program >= 0) & (program < PROJECTION_PROGRAMS):
            projection_gradient(
                prompt, upstream, gradients.projection, program // shape.C, program % shape.C, weight_prompt,
                num_episodes, shape, D_BLOCK, EPISODE_BLOCK,
            )  # fmt: skip
    program -= PROJECTION_PROGRAMS
    if gradients.prompt is not None:
        if program >= 0:
            episode = program.to(tl.int64)
            prompt_gradient(prompt, projection, upstream, gradients, episode, weight_prompt, shape, TILES, PROMPT_BLOCK)


@triton.jit
def prompt_gradient(
    prompt, projection, upstream, gradients, episode, weight, shape, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """d loss / d prompt of one episode: through its direction, and for the first C through the preference."""
    C: tl.constexpr = shape.C
    for start in tl.static_range(0, shape.D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        grad = tl.zeros((BLOCK,), tl.float32)
        if projection is not None:
            direction = upstream_of_direction(upstream, episode, True, weight)
            grad_u_ptr = upstream.saved + (episode + 1) * shape.SAVED - C
            for c in tl.static_range(C):
                offset = c * projection.c + d * projection.d
                w = tl.load(projection.ptr + offset, mask=d < shape.D, other=0.0)
                grad += direction * tl.load(grad_u_ptr + c) * w.to(tl.float32)
        if start == 0:
            scales = tl.zeros((BLOCK,), tl.float32)
            for tile in range(TILES):
                scales += tl.load(gradients.scales + (episode * TILES + tile) * C + d, mask=d < C, other=0.0)
            offset = episode * prompt.b + d * prompt.d
            e = tl.load(prompt.ptr + offset, mask=d < C, other=0.0).to(tl.float32)
            s = 1.0 / (1.0 + tl.exp2(-e * LOG2_E))
            grad += scales * s * (1.0 - s)
        ptr = gradients.prompt.ptr + episode * gradients.prompt.b + d * gradients.prompt.d
        tl.store(ptr, grad.to(gradients.prompt.ptr.dtype.element_ty), mask=d < shape.D)


@triton.jit
def upstream_of_direction(upstream, episode, mask, weight):
    """d loss / d prompt term of one episode or of several."""
    grad = 0.0
    if upstream.grad_total is not None:
        total = tl.load(upstream.grad_total.ptr + episode * upstream.grad_total.b, mask=mask)
        grad += weighted(weight, total * tl.load(upstream.hard_cell_scale + episode, mask=mask))
    if upstream.grad_terms is not None:
        grad += tl.load(upstream.grad_terms + episode * NUM_TERMS + PROMPT, mask=mask)
    return grad


@triton.jit
def preference_gradient(
    partial_ptr,  # [CHUNKS, C, CELLS] float32
    gradient,  # [H, W, C]
    block,
    outcome,
    num_chunks,
    shape,
    CELL_BLOCK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
):
    """d loss / d preference logits of one outcome of a block of cells, from the sums over chunks of episodes."""
    cell = block * CELL_BLOCK + tl.arange(0, CELL_BLOCK)
    inside = cell < shape.CELLS
    sums = tl.zeros((CHUNK_BLOCK, CELL_BLOCK), tl.float32)
    for first in range(0, num_chunks, CHUNK_BLOCK):
        chunk = (first + tl.arange(0, CHUNK_BLOCK)).to(tl.int64)
        mask = (chunk < num_chunks)[:, None] & inside[None, :]
        offset = (chunk[:, None] * shape.C + outcome) * shape.CELLS + cell[None, :]
        sums += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    offset = cell_offset(cell, shape.WIDTH, gradient.h, gradient.w) + outcome * gradient.c
    tl.store(gradient.ptr + offset, tl.sum(sums, axis=0).to(gradient.ptr.dtype.element_ty), mask=inside)


@triton.jit
def projection_gradient(
    prompt,
    upstream,
    gradient,  # [C, D]
    block,
    outcome,
    weight,
    num_episodes,
    shape,
    D_BLOCK: tl.constexpr,
    EPISODE_BLOCK: tl.constexpr,
):
    """A block of one row of d loss / d projection."""
    d = block * D_BLOCK + tl.arange(0, D_BLOCK)
    sums = tl.zeros((EPISODE_BLOCK, D_BLOCK), tl.float32)
    for first in range(0, num_episodes, EPISODE_BLOCK):
        episode = (first + tl.arange(0, EPISODE_BLOCK)).to(tl.int64)
        mask = episode < num_episodes
        grad = upstream_of_direction(upstream, episode, mask, weight)
        grad_u_ptr = upstream.saved + (episode + 1) * shape.SAVED - shape.C + outcome
        grad_u = tl.load(grad_u_ptr, mask=mask, other=0.0)
        offset = episode[:, None] * prompt.b + d[None, :] * prompt.d
        e = tl.load(prompt.ptr + offset, mask=mask[:, None] & (d < shape.D)[None, :], other=0.0).to(tl.float32)
        sums += tl.where(mask, grad * grad_u, 0.0)[:, None] * e
    row = tl.sum(sums, axis=0).to(gradient.ptr.dtype.element_ty)
    tl.store(gradient.ptr + outcome * gradient.c + d * gradient.d, row, mask=d < shape.D)
