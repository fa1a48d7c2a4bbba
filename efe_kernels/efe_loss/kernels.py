"""The Triton kernels that walk over the cells of a plan: forward and backward of the EFE loss.

The plan is read in pairs of steps: x = F_t with t = T-1-i, y = the step it is compared with. For a plan read backwards,
y = F_i, and the pair (x, y) serves both steps, so each logit is read once; with separate backward logits, y = R_t.

Forward: one program per (episode, tile of cells) writes its sums. Backward: one program per (tile of cells, chunk of
episodes), so that the gradient of the shared preference is accumulated in registers and written once per chunk. What
many programs have written their parts of is added up in reduction.py. A program is one warp: its sums need no barrier.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from efe_kernels.common.triton import LN_2
from efe_kernels.efe_loss.cells import (
    Sums,
    add_agreement,
    add_all,
    add_anchor,
    add_cross_entropy,
    add_direction,
    add_final,
    add_step,
    anchor_divergence,
    finite,
    load_direction,
    load_step,
    load_stored,
    log2_of_sum,
    log_preference,
    observation_gradient,
    preference_scales,
    repeated,
    softmax,
    softmax_gradient,
    store_step,
    tile_of,
    weighted_sum,
)
from efe_kernels.efe_loss.lanes import store_sums

NUM_TERMS = tl.constexpr(7)
# Sums that a program of the forward kernel writes for its tile, in this order: the first five terms, misses, cells.
MISSED, COUNTED = tl.constexpr(5), tl.constexpr(6)
NUM_SUMS = tl.constexpr(8)


class Weights(NamedTuple):
    """Of the terms, in the order of `reference.TERMS`."""

    risk: Any
    ambiguity: Any
    consistency: Any
    agreement: Any
    anchor: Any
    prompt: Any
    step: Any


class Upstream(NamedTuple):
    """What arrives at backward: the gradients of the results, and what forward has saved."""

    grad_total: Any  # Array [B] float32, or 0-d where the total is reduced, or None
    grad_terms: Any  # pointer [B, NUM_TERMS] float32 or None
    hard_cell_scale: Any  # pointer [B] float32
    saved: Any  # pointer [B, SAVED] float32: cells, then d prompt term / d logits [T, C] and / d (W e) [C]


class Gradients(NamedTuple):
    """What backward writes: an Array each for what is asked for, in the strides of its own, None for what is not."""

    logits: Any  # [B, T, H, W, C]
    backward_logits: Any  # [B, T, H, W, C]
    final_logits: Any  # [B, 1, H, W, C]
    observation_probs: Any  # [B, T, H, W, C]
    preference_logits: Any  # [B, 1, H, W, C], or [H, W, C] where it is shared
    prompt: Any  # [B, D]
    projection: Any  # [C, D]
    partial: Any  # pointer [CHUNKS, C, H * W] float32 or None: sums over a chunk of d loss / d shared preference logits
    scales: Any  # pointer [B, TILES, C] float32 or None: sums over a tile of d loss / d preference scale
    SHARED_PREFERENCE: Any  # a constant that comes last, as in Inputs


class Factors(NamedTuple):
    """Of the gradients in a cell; what multiplies a logarithm carries the factor from base 2 to nats."""

    own: Any  # log p of a step itself: risk and ambiguity
    risk: Any
    consistency: Any
    agreement: Any
    direction: Any


@triton.jit
def load_pair(inputs, pair, tile, shape, ALONE: tl.constexpr):
    """The logits of both steps as they are stored; none for the second where ALONE."""
    xs = load_stored(inputs.logits, shape.T - 1 - pair, tile, shape)
    ys = ()
    if not ALONE:
        if inputs.backward_logits is not None:
            ys = load_stored(inputs.backward_logits, shape.T - 1 - pair, tile, shape)
        else:
            ys = load_stored(inputs.logits, pair, tile, shape)
    return xs, ys


@triton.jit
def load_pair_after(inputs, pair, tile, shape):
    """Those of the pair that follows a given one known to the compiler, or none."""
    xs, ys = (), ()
    if pair + 1 < shape.PAIRS:
        xs, ys = load_pair(inputs, pair + 1, tile, shape, pair + 1 == shape.PAIRS - shape.ALONE)
    return xs, ys


@triton.jit
def visit_pair(
    inputs,
    gradients,
    direction_ptr,  # [T, C] float32, written, or None
    saved_ptr,  # [SAVED] of this episode, or None without a prompt term
    pair,
    xs,  # of its steps, as they are stored; none for the second where ALONE
    ys,
    tile,
    log_cs,
    factors,
    sums,
    p_sums,
    shape,
    LOSS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Both steps of one pair: with LOSS its parts are added to `sums`, and the gradients asked for are stored.
    Probabilities are added to `p_sums`; whatever is not used costs nothing.

    HAS_TARGET: the first step is the final one and is compared with the target. ALONE: the middle step of a plan read
    backwards, which is its own partner; its divergence is 0, or NaN where the step holds one.
    """
    C: tl.constexpr = shape.C
    own, risk, consistency, js, direction = factors
    step = shape.T - 1 - pair
    other = step if inputs.backward_logits is not None else pair
    # Asked for long before they are needed.
    if saved_ptr is not None:
        x_direction = load_direction(saved_ptr, step, direction, C)
        if not ALONE and inputs.backward_logits is None:
            y_direction = load_direction(saved_ptr, other, direction, C)
    ps, ds, l = softmax(xs, shape)
    p_sums = add_all(p_sums, ps, C)
    if LOSS:
        information = weighted_sum(ps, ds, C) - l
        sums = add_step(sums, xs, information, step, inputs, direction_ptr, tile, shape)
        if HAS_TARGET:
            sums = add_final(sums, xs, ds, l, tile, shape)
    fs = ()
    if ALONE:
        if LOSS:
            sums = add_agreement(sums, 0.0 * information)
        for c in tl.static_range(C):
            fs = fs + (own * ds[c] - risk * log_cs[c],)
    else:
        qs, es, k = softmax(ys, shape)
        gs = ()
        # Twice the divergence: of both steps of a pair, of one step with separate backward logits.
        divergence = tl.zeros(tile.cell.shape, tl.float32)
        for c in tl.static_range(C):
            log_sum = log2_of_sum(ps[c], qs[c], shape)
            divergence -= (ps[c] + qs[c]) * log_sum
            log_sum = js * log_sum
            preferred = risk * log_cs[c] + log_sum
            fs = fs + ((own + js) * ds[c] - preferred,)
            if inputs.backward_logits is not None:
                gs = gs + (js * es[c] - log_sum,)
            else:
                gs = gs + ((own + js) * es[c] - preferred,)
        if LOSS:
            y_information = weighted_sum(qs, es, C) - k
            divergence += information + y_information + 2.0
            if inputs.backward_logits is not None:
                divergence *= 0.5
            else:
                sums = add_step(sums, ys, y_information, other, inputs, direction_ptr, tile, shape)
            sums = add_agreement(sums, divergence)
        if inputs.backward_logits is not None:
            if gradients.backward_logits is not None:
                store_step(gradients.backward_logits, softmax_gradient(qs, gs, C), other, tile, shape)
        else:
            p_sums = add_all(p_sums, qs, C)
            if gradients.logits is not None:
                grads = softmax_gradient(qs, gs, C)
                if saved_ptr is not None:
                    grads = add_direction(grads, ys, y_direction, C)
                store_step(gradients.logits, grads, other, tile, shape)
    if gradients.logits is not None:
        grads = softmax_gradient(ps, fs, C)
        if saved_ptr is not None:
            grads = add_direction(grads, xs, x_direction, C)
        if HAS_TARGET:
            grads = add_cross_entropy(grads, ps, tile, consistency, C)
        store_step(gradients.logits, grads, step, tile, shape)
    return sums, p_sums


@triton.jit
def visit_plan(
    inputs,
    gradients,
    direction_ptr,  # as in visit_pair
    saved_ptr,  # as in visit_pair
    xs,  # of the first pair, as in visit_pair
    ys,
    tile,
    log_cs,
    factors,
    shape,
    LOSS: tl.constexpr,
):
    """All pairs of one cell's plan: the sums over its steps, and the sums of the probabilities of each outcome.

    The logits of a pair are asked for before the one ahead of it is worked on, so that they arrive meanwhile.
    """
    FINAL: tl.constexpr = inputs.final_logits is None
    PAIRED: tl.constexpr = shape.PAIRS - shape.ALONE
    zeros = tl.zeros(tile.cell.shape, tl.float32)
    sums = Sums(zeros, zeros, zeros, zeros, zeros)
    p_sums = repeated(zeros, shape.C)
    # The first pair holds the final step. The middle step of an odd plan read backwards comes last and alone.
    if PAIRED > 0:
        next_xs, next_ys = load_pair_after(inputs, 0, tile, shape)
        sums, p_sums = visit_pair(
            inputs, gradients, direction_ptr, saved_ptr, 0, xs, ys, tile, log_cs, factors, sums, p_sums, shape, LOSS,
            FINAL, False,
        )  # fmt: skip
        xs, ys = next_xs, next_ys
    for pair in range(1, PAIRED - 1):
        next_xs, next_ys = load_pair(inputs, pair + 1, tile, shape, False)
        sums, p_sums = visit_pair(
            inputs, gradients, direction_ptr, saved_ptr, pair, xs, ys, tile, log_cs, factors, sums, p_sums, shape, LOSS,
            False, False,
        )  # fmt: skip
        xs, ys = next_xs, next_ys
    if PAIRED > 1:
        next_xs, next_ys = load_pair_after(inputs, PAIRED - 1, tile, shape)
        sums, p_sums = visit_pair(
            inputs, gradients, direction_ptr, saved_ptr, PAIRED - 1, xs, ys, tile, log_cs, factors, sums, p_sums, shape,
            LOSS, False, False,
        )  # fmt: skip
        xs, ys = next_xs, next_ys
    if shape.ALONE:
        sums, p_sums = visit_pair(
            inputs, gradients, direction_ptr, saved_ptr, shape.PAIRS - 1, xs, ys, tile, log_cs, factors, sums, p_sums,
            shape, LOSS, FINAL and shape.PAIRS == 1, True,
        )  # fmt: skip
    if LOSS:
        # sum p log c is taken once, because c is the same at every step.
        risk = sums.risk - weighted_sum(p_sums, log_cs, shape.C)
        ambiguity = -sums.risk if inputs.observation_probs is None else sums.ambiguity
        sums = Sums(risk, ambiguity, sums.consistency, sums.agreement, sums.missed)
    return sums, p_sums


@triton.jit
def store_tile(
    sums_ptr,  # [NUM_SUMS] of this tile, written but for the last
    sums,
    distance,
    counted,
    shape,
):
    """The sums of one tile of one episode, in nats."""
    values = (
        tl.where(counted, sums.risk, 0.0) * LN_2,
        tl.where(counted, sums.ambiguity, 0.0) * LN_2,
        sums.consistency * LN_2,
        tl.where(counted, sums.agreement, 0.0) * LN_2,
        distance * LN_2,
        sums.missed,
        tl.where(counted, 1.0, 0.0),
    )
    store_sums(sums_ptr, values, 7, shape.PACK)


@triton.jit
def efe_loss_forward_kernel(
    inputs,
    sums_ptr,  # [B, TILES, NUM_SUMS] float32, written
    direction_ptr,  # [B, TILES, T, C] float32, written, or None without a prompt term
    shape,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sums over the cells of one tile of one episode."""
    program = tl.program_id(0).to(tl.int64)
    cell = (program % TILES).to(tl.int32) * TILE + tl.arange(0, TILE)
    tile = tile_of(inputs, program // TILES, cell, cell < shape.CELLS, shape)
    xs, ys = load_pair(inputs, 0, tile, shape, shape.PAIRS == shape.ALONE)
    log_cs = log_preference(inputs, tile, shape)
    if direction_ptr is not None:
        direction_ptr += program * shape.T * shape.C
    nothing = Gradients(None, None, None, None, None, None, None, None, None, False)
    factors = Factors(0.0, 0.0, 0.0, 0.0, 0.0)
    sums, _p_sums = visit_plan(inputs, nothing, direction_ptr, None, xs, ys, tile, log_cs, factors, shape, True)
    if inputs.final_logits is not None:
        finals = load_stored(inputs.final_logits, 0, tile, shape)
        _ps, ds, l = softmax(finals, shape)
        sums = add_final(sums, finals, ds, l, tile, shape)
    distance = tl.zeros((TILE,), tl.float32)
    if inputs.target_preference is not None:
        distance, _logs, _set = anchor_divergence(log_cs, inputs.target_preference, tile, shape)
    store_tile(sums_ptr + program * NUM_SUMS, sums, distance, tile.counted, shape)


@triton.jit
def weighted(weight, term):
    """A weight of 0 removes the term, whatever it is."""
    return tl.where(weight == 0.0, 0.0, weight * term)


@triton.jit
def upstream_of(upstream, grad_total, episode, weight, TERM: tl.constexpr):
    """d loss / d term: through the total and directly."""
    grad = 0.0
    if upstream.grad_total is not None:
        grad += weighted(weight, grad_total)
    if upstream.grad_terms is not None:
        grad += tl.load(upstream.grad_terms + episode * NUM_TERMS + TERM)
    return grad


@triton.jit(do_not_specialize=["num_episodes"])
def efe_loss_backward_kernel(
    inputs,
    upstream,
    gradients,  # those of prompt and projection are written by the reduction
    weights,
    num_episodes,
    shape,
    EPISODES: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Gradients of one tile of cells for a chunk of episodes.

    Per cell and step, with a, e, j, k the upstream gradients of risk, ambiguity, agreement and consistency over the
    number of addends of their means, p = softmax(x), q = softmax(y), c the preference:

        d KL(p || c) / d x  = p (f - sum p f),  f = log p - log c
        d H(p) / d x        = p (f - sum p f),  f = -log p
        d JS(p || q) / d x  = p (f - sum p f),  f = (log p - log (p + q)) / 2; twice that in a plan
                                                   read backwards, which meets each pair twice
        d CE(x, y) / d x    = p - onehot(y)
        d KL(p || c) / d l  = s (c - p),        c = softmax(s l), and d / d s = l (c - p)
        d KL(c || a) / d l  = s c (f - sum c f), f = log c - log a

    What is constant over the outcomes cancels in f - sum p f, so log p stands for d alone.
    """
    C: tl.constexpr = shape.C
    tile_index = tl.program_id(0) % TILES
    chunk = (tl.program_id(0) // TILES).to(tl.int64)
    cell = tile_index * TILE + tl.arange(0, TILE)
    inside = cell < shape.CELLS
    zeros = tl.zeros((TILE,), tl.float32)
    grad_shared = repeated(zeros, C)

    # Without a prompt a shared preference is the same for every episode.
    SAME: tl.constexpr = inputs.prompt is None and inputs.preference_logits.b == 0
    if SAME:
        log_cs = log_preference(inputs, tile_of(inputs, 0, cell, inside, shape), shape)
    for index in range(EPISODES):
        live = chunk * EPISODES + index < num_episodes
        episode = tl.minimum(chunk * EPISODES + index, num_episodes - 1).to(tl.int64)
        mask = cell < tl.where(live, shape.CELLS, 0)
        saved = upstream.saved + episode * shape.SAVED
        share = 1.0 / tl.maximum(tl.load(saved), 1.0)
        grad_total = 0.0
        if upstream.grad_total is not None:
            grad_total = tl.load(upstream.grad_total.ptr + episode * upstream.grad_total.b)
            grad_total = grad_total * tl.load(upstream.hard_cell_scale + episode)
        a = upstream_of(upstream, grad_total, episode, weights.risk, 0) * share / shape.T
        e = upstream_of(upstream, grad_total, episode, weights.ambiguity, 1) * share / shape.T
        k = upstream_of(upstream, grad_total, episode, weights.consistency, 2) * share
        j = upstream_of(upstream, grad_total, episode, weights.agreement, 3) * share / shape.T
        anchor = upstream_of(upstream, grad_total, episode, weights.anchor, 4) * share
        direction = upstream_of(upstream, grad_total, episode, weights.prompt, 5)
        risk = LN_2 * a
        own = risk if inputs.observation_probs is not None else LN_2 * (a - e)
        js = LN_2 * (0.5 * j if inputs.backward_logits is not None else j)

        tile = tile_of(inputs, episode, cell, mask, shape)
        xs, ys = load_pair(inputs, 0, tile, shape, shape.PAIRS == shape.ALONE)
        if not SAME:
            log_cs = log_preference(inputs, tile, shape)
        saved_direction = None
        if inputs.projection is not None:
            saved_direction = saved
        factors = Factors(own, risk, k, js, direction)
        _sums, p_sums = visit_plan(
            inputs, gradients, None, saved_direction, xs, ys, tile, log_cs, factors, shape, False
        )
        if gradients.observation_probs is not None:
            for step in range(shape.T):
                os = load_step(inputs.observation_probs, step, tile, shape)
                store_step(gradients.observation_probs, observation_gradient(os, e, shape), step, tile, shape)
        if gradients.final_logits is not None:
            finals = load_stored(inputs.final_logits, 0, tile, shape)
            ps, _ds, _l = softmax(finals, shape)
            grads = add_cross_entropy(repeated(zeros, C), ps, tile, k, C)
            store_step(gradients.final_logits, grads, 0, tile, shape)
        if inputs.target_preference is not None:
            distance, log_anchors, is_set = anchor_divergence(log_cs, inputs.target_preference, tile, shape)
        if gradients.preference_logits is not None or gradients.scales is not None:
            # c, the scales and the unscaled logits are taken up again here: kept from above, they would not fit into
            # registers.
            scales = preference_scales(inputs.prompt, episode, shape)
            grads = ()
            for c in tl.static_range(C):
                grads = grads + (a * (shape.T * tl.exp2(log_cs[c]) - p_sums[c]),)
            if inputs.target_preference is not None:
                grads = add_anchor(grads, log_cs, log_anchors, distance, is_set, anchor, C)
            scaled = ()
            for c in tl.static_range(C):
                scaled = scaled + (tl.where(tile.counted, scales[c] * grads[c], 0.0),)
            if gradients.scales is not None:
                unscaled = load_step(inputs.preference_logits, 0, tile, shape)
                parts = ()
                for c in tl.static_range(C):
                    parts = parts + (tl.where(tile.counted, finite(unscaled[c]) * grads[c], 0.0),)
                if live:
                    store_sums(gradients.scales + (episode * TILES + tile_index) * C, parts, C, shape.PACK)
            if gradients.preference_logits is not None:
                if gradients.SHARED_PREFERENCE:
                    grad_shared = add_all(grad_shared, scaled, C)
                else:
                    store_step(gradients.preference_logits, scaled, 0, tile, shape)
    if gradients.partial is not None:
        for c in tl.static_range(C):
            tl.store(gradients.partial + (chunk * C + c) * shape.CELLS + cell, grad_shared[c], mask=inside)
