"""Triton kernels of the EFE loss.

One lane holds one cell (or two) with its C outcomes in C separate registers, so that a softmax needs no exchange
between lanes. Logarithms are to base 2 inside; results are in nats.

The plan is read in pairs of steps: x = F_t with t = T-1-i, y = the step it is compared with. For a plan read backwards,
y = F_i, and the pair (x, y) serves both steps, so each logit is read once; with separate backward logits, y = R_t.

Forward: one program per (episode, tile of cells) writes its sums; a second launch, one program per episode, adds them
up in a fixed order. Backward: one program per (tile of cells, chunk of episodes), so that the gradient of the shared
preference is accumulated in registers and written once per chunk; a second launch finishes the gradients that many
cells share. A program of the large launches is one warp: its sums need no barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from efe_kernels.common.triton import LN_2, LOG2_E, log2, reciprocal

LOWEST = tl.constexpr(-1e30)
PROMPT_LOGIT_RANGE = tl.constexpr(1e4)
TARGET_PREFERENCE_FLOOR = tl.constexpr(1e-8)
SHORTEST_DIRECTION = tl.constexpr(1e-8)
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)
NUM_TERMS = tl.constexpr(7)
# Sums that one forward program writes: the first five terms, wrong cells, cells.
NUM_SUMS = tl.constexpr(8)


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
def load_outcomes(ptr, offset, mask, STRIDE_C: tl.constexpr, C: tl.constexpr):
    """C float32 tensors, one per outcome.

    The mask is that of the tile, not of the cells that count: one that varies from cell to cell forbids wide loads.
    So NaN may lie in a cell that does not count, and every sum and store selects by `counted`.
    """
    xs = ()
    for c in tl.static_range(C):
        xs = xs + (tl.load(ptr + offset + c * STRIDE_C, mask=mask, other=0.0).to(tl.float32),)
    return xs


@triton.jit
def finite(x):
    """x with a finite stand-in for -inf, so that 0 * log 0 is 0; a NaN stays one."""
    return tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def softmax(xs, C: tl.constexpr, APPROX: tl.constexpr):
    """Probabilities p, d and l with log2 p = d - l. Shifting before the product keeps logits of 1e4 exact."""
    top = xs[0]
    for c in tl.static_range(1, C):
        top = tl.maximum(top, xs[c])
    top = top * LOG2_E
    ds = ()
    es = ()
    total = tl.zeros_like(top)
    for c in tl.static_range(C):
        d = finite(xs[c] * LOG2_E - top)
        e = tl.exp2(d)
        ds = ds + (d,)
        es = es + (e,)
        total += e
    inverse = reciprocal(total, APPROX)
    ps = ()
    for c in tl.static_range(C):
        ps = ps + (es[c] * inverse,)
    return ps, ds, log2(total, APPROX)


@triton.jit
def weighted_sum(ps, xs, C: tl.constexpr):
    total = ps[0] * xs[0]
    for c in tl.static_range(1, C):
        total += ps[c] * xs[c]
    return total


@triton.jit
def preference_scales(
    prompt_ptr,  # [B, D] any strides
    episode,
    PROMPT: tl.constexpr,
    C: tl.constexpr,
    HAS_PROMPT: tl.constexpr,
    APPROX: tl.constexpr,
):
    """sigmoid(prompt[:C]) of one episode as C scalars; ones without a prompt."""
    scales = ()
    for c in tl.static_range(C):
        if HAS_PROMPT:
            e = tl.load(prompt_ptr + episode * PROMPT[0] + c * PROMPT[1]).to(tl.float32)
            scales = scales + (reciprocal(1.0 + tl.exp2(-e * LOG2_E), APPROX),)
        else:
            scales = scales + (1.0,)
    return scales


@triton.jit
def log_preference(
    preference_ptr,  # [B or 1, H, W, C] any strides, at the cells' offsets
    offset,
    mask,
    scales,
    STRIDE_C: tl.constexpr,
    C: tl.constexpr,
    APPROX: tl.constexpr,
):
    """log2 c of each cell."""
    loaded = load_outcomes(preference_ptr, offset, mask, STRIDE_C, C)
    scaled = ()
    for c in tl.static_range(C):
        scaled = scaled + (finite(loaded[c]) * scales[c],)
    _ps, ds, l = softmax(scaled, C, APPROX)
    logs = ()
    for c in tl.static_range(C):
        logs = logs + (ds[c] - l,)
    return logs


@triton.jit
def counted_cells(
    target_ptr,  # [B, H, W] any integer dtype, any strides
    valid_ptr,  # [B, H, W] uint8, any strides
    episode,
    cell,
    mask,
    IGNORE_INDEX: tl.constexpr,
    TARGET_STRIDES: tl.constexpr,
    VALID_STRIDES: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Which cells count, and their targets; -1 for one that is out of range."""
    offset = episode * TARGET_STRIDES[0] + cell_offset(cell, WIDTH, TARGET_STRIDES[1], TARGET_STRIDES[2])
    target = tl.load(target_ptr + offset, mask=mask, other=0).to(tl.int64)
    counted = mask & (target != IGNORE_INDEX)
    if HAS_VALID:
        offset = episode * VALID_STRIDES[0] + cell_offset(cell, WIDTH, VALID_STRIDES[1], VALID_STRIDES[2])
        counted = counted & (tl.load(valid_ptr + offset, mask=mask, other=0) != 0)
    return counted, tl.where((target >= 0) & (target < C), target, -1).to(tl.int32)


@triton.jit
def load_step(ptr, episode, step, cell, mask, STRIDES: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """The C values of each cell at one step of [B, T, H, W, C]."""
    offset = (
        episode * STRIDES[0] + tl.cast(step, tl.int64) * STRIDES[1] + cell_offset(cell, WIDTH, STRIDES[2], STRIDES[3])
    )
    return load_outcomes(ptr, offset, mask, STRIDES[4], C)


@triton.jit
def log2_of_sum(p, q, APPROX: tl.constexpr):
    """log2(p + q), finite where both have underflowed to 0: their weights there are 0."""
    return log2(tl.maximum(p + q, SMALLEST_NORMAL), APPROX)


@triton.jit
def observation_entropy(
    observation_ptr,  # [B, T, H, W, C] any strides
    episode,
    step,
    cell,
    mask,
    STRIDES: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    APPROX: tl.constexpr,
):
    """Entropy in bits of the observation probabilities of each cell at one step."""
    total = tl.zeros(cell.shape, tl.float32)
    ps = load_step(observation_ptr, episode, step, cell, mask, STRIDES, WIDTH, C)
    for c in tl.static_range(C):
        total -= ps[c] * log2(tl.maximum(ps[c], SMALLEST_NORMAL), APPROX)
    return total


@triton.jit
def anchor_divergence(
    logs, target_preference_ptr, offset, mask, counted, STRIDE_C: tl.constexpr, C: tl.constexpr, APPROX: tl.constexpr
):
    """KL(c || target preference) in bits per cell, 0 where it is not set, and log2 of the target preference."""
    anchors = load_outcomes(target_preference_ptr, offset, mask, STRIDE_C, C)
    row = anchors[0]
    for c in tl.static_range(1, C):
        row += anchors[c]
    log_anchors = ()
    divergence = tl.zeros_like(row)
    for c in tl.static_range(C):
        log_anchor = log2(tl.maximum(anchors[c], TARGET_PREFERENCE_FLOOR), APPROX)
        log_anchors = log_anchors + (log_anchor,)
        divergence += tl.exp2(logs[c]) * (logs[c] - log_anchor)
    is_set = counted & (row != 0)
    return tl.where(is_set, divergence, 0.0), log_anchors, is_set


@triton.jit
def missed_target(xs, target, counted, C: tl.constexpr):
    """1 where the argmax of a counted cell is not its target, 0 elsewhere."""
    top = xs[0]
    best = tl.zeros(target.shape, tl.int32)
    for c in tl.static_range(1, C):
        better = xs[c] > top
        top = tl.where(better, xs[c], top)
        best = tl.where(better, c, best)
    return tl.where(counted & (best != target), 1.0, 0.0)


@triton.jit
def cross_entropy(xs, ds, l, target, counted, C: tl.constexpr):
    """Cross-entropy in bits. A target out of range gives NaN."""
    d_target = ds[0]
    x_target = xs[0]
    for c in tl.static_range(1, C):
        d_target = tl.where(target == c, ds[c], d_target)
        x_target = tl.where(target == c, xs[c], x_target)
    loss = tl.where(x_target == float("-inf"), float("inf"), l - d_target)
    loss = tl.where(target >= 0, loss, float("nan"))
    return tl.where(counted, loss, 0.0)


@triton.jit
def store_direction(
    direction_ptr,  # [C] float32, written
    xs,
    weight,
    C: tl.constexpr,
):
    """Sums over the counted cells of a tile of the clamped logits of one step, for the prompt term."""
    weighed = clamped(xs, weight, C)
    for c in tl.static_range(C):
        tl.store(direction_ptr + c, tl.sum(weighed[c]))


@triton.jit
def clamped(xs, weight, C: tl.constexpr):
    """Clamped logits times the weight of their cells. A clamped NaN is a finite number: a weight of 0 removes it."""
    weighed = ()
    for c in tl.static_range(C):
        weighed = weighed + (weight * tl.clamp(xs[c], -PROMPT_LOGIT_RANGE, PROMPT_LOGIT_RANGE),)
    return weighed


@triton.jit
def store_step(
    ptr, gradients, episode, step, cell, mask, counted, STRIDES: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr
):
    """C gradients per cell at one step of [B, T, H, W, C], rounded once; 0 in cells that do not count."""
    offset = (
        episode * STRIDES[0] + tl.cast(step, tl.int64) * STRIDES[1] + cell_offset(cell, WIDTH, STRIDES[2], STRIDES[3])
    )
    for c in tl.static_range(C):
        grad = tl.where(counted, gradients[c], 0.0)
        tl.store(ptr + offset + c * STRIDES[4], grad.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_gradient(ps, fs, C: tl.constexpr):
    """p (f - sum p f): the gradient of sum p f(log p) for every f whose other parts cancel."""
    mean = weighted_sum(ps, fs, C)
    gradients = ()
    for c in tl.static_range(C):
        gradients = gradients + (ps[c] * (fs[c] - mean),)
    return gradients


@triton.jit
def add_cross_entropy(gradients, ps, target, weight, C: tl.constexpr):
    added = ()
    for c in tl.static_range(C):
        added = added + (gradients[c] + weight * tl.where(target == c, ps[c] - 1.0, ps[c]),)
    return added


@triton.jit
def add_direction(gradients, xs, residual_ptr, step, weight, C: tl.constexpr):
    """The prompt term: one gradient for all cells of a step, 0 where the logit was clamped."""
    added = ()
    for c in tl.static_range(C):
        grad = weight * tl.load(residual_ptr + 1 + step * C + c)
        added = added + (gradients[c] + tl.where(tl.abs(xs[c]) <= PROMPT_LOGIT_RANGE, grad, 0.0),)
    return added


@triton.jit
def observation_gradient(ps, weight, C: tl.constexpr, APPROX: tl.constexpr):
    """d H(p) / d p = -(ln p + 1), with the logarithm clamped at the smallest normal number."""
    gradients = ()
    for c in tl.static_range(C):
        grad = -LN_2 * log2(tl.maximum(ps[c], SMALLEST_NORMAL), APPROX) - tl.where(ps[c] >= SMALLEST_NORMAL, 1.0, 0.0)
        gradients = gradients + (weight * grad,)
    return gradients


@triton.jit
def add_all(sums, xs, C: tl.constexpr):
    added = ()
    for c in tl.static_range(C):
        added = added + (sums[c] + xs[c],)
    return added


@triton.jit
def visit_step(
    observation_ptr,  # [B, T, H, W, C] any strides
    direction_ptr,  # [T, C] float32, written
    episode,
    step,
    cell,
    mask,
    weight,
    xs,
    information,
    sums,
    OBSERVATION: tl.constexpr,
    HAS_OBSERVATION: tl.constexpr,
    HAS_DIRECTION: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    APPROX: tl.constexpr,
):
    """Adds what each cell at one step says alone to the sums; its part of the direction is stored."""
    informations, entropies, agreement, consistency, missed = sums
    informations += information
    if HAS_OBSERVATION:
        entropies += observation_entropy(observation_ptr, episode, step, cell, mask, OBSERVATION, WIDTH, C, APPROX)
    if HAS_DIRECTION:
        store_direction(direction_ptr + step * C, xs, weight, C)
    return informations, entropies, agreement, consistency, missed


@triton.jit
def risk_and_ambiguity(sums, p_sums, log_cs, HAS_OBSERVATION: tl.constexpr, C: tl.constexpr):
    """From the sums over the steps: sum p log c is taken once, because c is the same at every step."""
    informations, entropies, agreement, consistency, missed = sums
    risk = informations - weighted_sum(p_sums, log_cs, C)
    if not HAS_OBSERVATION:
        entropies = -informations
    return risk, entropies, agreement, consistency, missed


@triton.jit
def visit_pair(
    logits_ptr,  # [B, T, H, W, C] any strides
    backward_ptr,  # [B, T, H, W, C] any strides
    observation_ptr,  # [B, T, H, W, C] any strides
    grad_logits_ptr,  # [B, T, H, W, C] own strides, written
    grad_backward_ptr,  # [B, T, H, W, C] own strides, written
    direction_ptr,  # [T, C] float32, written
    residual_ptr,  # [RESIDUAL] float32 of this episode
    episode,
    pair,
    cell,
    mask,
    counted,
    target,
    log_cs,
    factors,
    sums,
    p_sums,
    LOGITS: tl.constexpr,
    BACKWARD: tl.constexpr,
    OBSERVATION: tl.constexpr,
    GRAD_LOGITS: tl.constexpr,
    GRAD_BACKWARD: tl.constexpr,
    HAS_BACKWARD: tl.constexpr,
    HAS_OBSERVATION: tl.constexpr,
    HAS_DIRECTION: tl.constexpr,
    LOSS: tl.constexpr,
    NEED_LOGITS: tl.constexpr,
    NEED_BACKWARD: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    ALONE: tl.constexpr,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    APPROX: tl.constexpr,
):
    """Both steps of one pair: with LOSS its parts are added to `sums`, with NEED_LOGITS or NEED_BACKWARD the gradients
    are stored. Probabilities are added to `p_sums`; whatever is not used costs nothing.

    HAS_TARGET: the first step is the final one and is compared with the target. ALONE: the middle step of a plan read
    backwards, which is its own partner; its divergence is 0.
    """
    own, risk, consistency, js, direction = factors
    step = T - 1 - pair
    weight = tl.where(counted, 1.0, 0.0)
    xs = load_step(logits_ptr, episode, step, cell, mask, LOGITS, WIDTH, C)
    ps, ds, l = softmax(xs, C, APPROX)
    p_sums = add_all(p_sums, ps, C)
    if LOSS:
        information = weighted_sum(ps, ds, C) - l
        sums = visit_step(
            observation_ptr, direction_ptr, episode, step, cell, mask, weight, xs, information, sums,
            OBSERVATION, HAS_OBSERVATION, HAS_DIRECTION, WIDTH, C, APPROX,
        )  # fmt: skip
        if HAS_TARGET:
            sums = add_final(sums, xs, ds, l, target, counted, C)
    fs = ()
    if ALONE:
        for c in tl.static_range(C):
            fs = fs + (own * ds[c] - risk * log_cs[c],)
    else:
        if HAS_BACKWARD:
            other = step
            ys = load_step(backward_ptr, episode, other, cell, mask, BACKWARD, WIDTH, C)
        else:
            other = pair
            ys = load_step(logits_ptr, episode, other, cell, mask, LOGITS, WIDTH, C)
        qs, es, k = softmax(ys, C, APPROX)
        gs = ()
        # Twice the divergence: of both steps of a pair, of one step with separate backward logits.
        divergence = tl.zeros(cell.shape, tl.float32)
        for c in tl.static_range(C):
            log_sum = log2_of_sum(ps[c], qs[c], APPROX)
            divergence -= (ps[c] + qs[c]) * log_sum
            log_sum = js * log_sum
            preferred = risk * log_cs[c] + log_sum
            fs = fs + ((own + js) * ds[c] - preferred,)
            if HAS_BACKWARD:
                gs = gs + (js * es[c] - log_sum,)
            else:
                gs = gs + ((own + js) * es[c] - preferred,)
        if LOSS:
            y_information = weighted_sum(qs, es, C) - k
            divergence += information + y_information + 2.0
            if HAS_BACKWARD:
                divergence *= 0.5
            else:
                sums = visit_step(
                    observation_ptr, direction_ptr, episode, other, cell, mask, weight, ys, y_information, sums,
                    OBSERVATION, HAS_OBSERVATION, HAS_DIRECTION, WIDTH, C, APPROX,
                )  # fmt: skip
            sums = add_agreement(sums, divergence)
        if HAS_BACKWARD:
            if NEED_BACKWARD:
                grads = softmax_gradient(qs, gs, C)
                store_step(grad_backward_ptr, grads, episode, other, cell, mask, counted, GRAD_BACKWARD, WIDTH, C)
        else:
            p_sums = add_all(p_sums, qs, C)
            if NEED_LOGITS:
                grads = softmax_gradient(qs, gs, C)
                if HAS_DIRECTION:
                    grads = add_direction(grads, ys, residual_ptr, other, direction, C)
                store_step(grad_logits_ptr, grads, episode, other, cell, mask, counted, GRAD_LOGITS, WIDTH, C)
    if NEED_LOGITS:
        grads = softmax_gradient(ps, fs, C)
        if HAS_DIRECTION:
            grads = add_direction(grads, xs, residual_ptr, step, direction, C)
        if HAS_TARGET:
            grads = add_cross_entropy(grads, ps, target, consistency, C)
        store_step(grad_logits_ptr, grads, episode, step, cell, mask, counted, GRAD_LOGITS, WIDTH, C)
    return sums, p_sums


@triton.jit
def add_agreement(sums, divergence):
    informations, entropies, agreement, consistency, missed = sums
    return informations, entropies, agreement + divergence, consistency, missed


@triton.jit
def add_final(sums, xs, ds, l, target, counted, C: tl.constexpr):
    """What compares the final step with the target."""
    informations, entropies, agreement, consistency, missed = sums
    consistency += cross_entropy(xs, ds, l, target, counted, C)
    missed += missed_target(xs, target, counted, C)
    return informations, entropies, agreement, consistency, missed


@triton.jit
def visit_plan(
    logits_ptr,  # [B, T, H, W, C] any strides
    backward_ptr,  # [B, T, H, W, C] any strides
    observation_ptr,  # [B, T, H, W, C] any strides
    grad_logits_ptr,  # [B, T, H, W, C] own strides, written
    grad_backward_ptr,  # [B, T, H, W, C] own strides, written
    direction_ptr,  # [T, C] float32, written
    residual_ptr,  # [RESIDUAL] float32 of this episode
    episode,
    cell,
    mask,
    counted,
    target,
    log_cs,
    factors,
    LOGITS: tl.constexpr,
    BACKWARD: tl.constexpr,
    OBSERVATION: tl.constexpr,
    GRAD_LOGITS: tl.constexpr,
    GRAD_BACKWARD: tl.constexpr,
    HAS_BACKWARD: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    HAS_OBSERVATION: tl.constexpr,
    HAS_DIRECTION: tl.constexpr,
    LOSS: tl.constexpr,
    NEED_LOGITS: tl.constexpr,
    NEED_BACKWARD: tl.constexpr,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    ALONE: tl.constexpr,
    APPROX: tl.constexpr,
):
    """All pairs of one cell's plan: risk, ambiguity and agreement in bits, consistency in bits and misses of each
    cell, summed over the steps, and the sums of the probabilities of each outcome.
    """
    zeros = tl.zeros(cell.shape, tl.float32)
    sums = (zeros, zeros, zeros, zeros, zeros)
    p_sums = repeated(zeros, C)
    # The first pair holds the final step. The middle step of an odd plan read backwards comes last and alone.
    if PAIRS > ALONE:
        sums, p_sums = visit_pair(
            logits_ptr, backward_ptr, observation_ptr, grad_logits_ptr, grad_backward_ptr, direction_ptr, residual_ptr,
            episode, 0, cell, mask, counted, target, log_cs, factors, sums, p_sums, LOGITS, BACKWARD, OBSERVATION,
            GRAD_LOGITS, GRAD_BACKWARD, HAS_BACKWARD, HAS_OBSERVATION, HAS_DIRECTION, LOSS,
            NEED_LOGITS, NEED_BACKWARD, not HAS_FINAL, False, T, WIDTH, C, APPROX,
        )  # fmt: skip
    for pair in range(1, PAIRS - ALONE):
        sums, p_sums = visit_pair(
            logits_ptr, backward_ptr, observation_ptr, grad_logits_ptr, grad_backward_ptr, direction_ptr, residual_ptr,
            episode, pair, cell, mask, counted, target, log_cs, factors, sums, p_sums, LOGITS, BACKWARD, OBSERVATION,
            GRAD_LOGITS, GRAD_BACKWARD, HAS_BACKWARD, HAS_OBSERVATION, HAS_DIRECTION, LOSS,
            NEED_LOGITS, NEED_BACKWARD, False, False, T, WIDTH, C, APPROX,
        )  # fmt: skip
    if ALONE:
        sums, p_sums = visit_pair(
            logits_ptr, backward_ptr, observation_ptr, grad_logits_ptr, grad_backward_ptr, direction_ptr, residual_ptr,
            episode, PAIRS - 1, cell, mask, counted, target, log_cs, factors, sums, p_sums, LOGITS, BACKWARD,
            OBSERVATION, GRAD_LOGITS, GRAD_BACKWARD, HAS_BACKWARD, HAS_OBSERVATION, HAS_DIRECTION,
            LOSS, NEED_LOGITS, NEED_BACKWARD, not HAS_FINAL and PAIRS == 1, True, T, WIDTH, C, APPROX,
        )  # fmt: skip
    if LOSS:
        sums = risk_and_ambiguity(sums, p_sums, log_cs, HAS_OBSERVATION, C)
    return sums, p_sums


@triton.jit
def repeated(x, C: tl.constexpr):
    """x for each outcome."""
    xs = ()
    for _c in tl.static_range(C):
        xs = xs + (x,)
    return xs


@triton.jit
def store_sums(sums_ptr, sums, distance, counted, live):
    """The sums of one tile of one episode, in nats, in the order that the episode kernel reads."""
    risk, ambiguity, agreement, consistency, missed = sums
    tl.store(sums_ptr + 0, tl.sum(tl.where(counted, risk, 0.0)) * LN_2, mask=live)
    tl.store(sums_ptr + 1, tl.sum(tl.where(counted, ambiguity, 0.0)) * LN_2, mask=live)
    tl.store(sums_ptr + 2, tl.sum(consistency) * LN_2, mask=live)
    tl.store(sums_ptr + 3, tl.sum(tl.where(counted, agreement, 0.0)) * LN_2, mask=live)
    tl.store(sums_ptr + 4, tl.sum(distance) * LN_2, mask=live)
    tl.store(sums_ptr + 5, tl.sum(missed), mask=live)
    tl.store(sums_ptr + 6, tl.sum(tl.where(counted, 1.0, 0.0)), mask=live)


@triton.jit
def efe_loss_forward_kernel(
    logits_ptr,  # [B, T, H, W, C] any strides
    backward_ptr,  # [B, T, H, W, C] any strides
    final_ptr,  # [B, H, W, C] any strides
    observation_ptr,  # [B, T, H, W, C] any strides
    preference_ptr,  # [B or 1, H, W, C] any strides
    prompt_ptr,  # [B, D] any strides
    target_ptr,  # [B, H, W] any strides
    target_preference_ptr,  # [H, W, C] any strides
    valid_ptr,  # [B, H, W] uint8, any strides
    sums_ptr,  # [B, TILES, NUM_SUMS] float32, written
    direction_ptr,  # [B, TILES, T, C] float32, written
    IGNORE_INDEX: tl.constexpr,
    LOGITS: tl.constexpr,
    BACKWARD: tl.constexpr,
    FINAL: tl.constexpr,
    OBSERVATION: tl.constexpr,
    PREFERENCE: tl.constexpr,
    PROMPT: tl.constexpr,
    TARGET: tl.constexpr,
    TARGET_PREFERENCE: tl.constexpr,
    VALID: tl.constexpr,
    HAS_BACKWARD: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    HAS_OBSERVATION: tl.constexpr,
    HAS_PROMPT: tl.constexpr,
    HAS_DIRECTION: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    HAS_VALID: tl.constexpr,
    T: tl.constexpr,
    CELLS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    ALONE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    APPROX: tl.constexpr,
):
    """Sums over the cells of one tile of one episode."""
    program = tl.program_id(0).to(tl.int64)
    episode = program // TILES
    cell = (program % TILES).to(tl.int32) * TILE + tl.arange(0, TILE)
    mask = cell < CELLS
    counted, target = counted_cells(
        target_ptr, valid_ptr, episode, cell, mask, IGNORE_INDEX, TARGET, VALID, WIDTH, C, HAS_VALID
    )
    scales = preference_scales(prompt_ptr, episode, PROMPT, C, HAS_PROMPT, APPROX)
    offset = episode * PREFERENCE[0] + cell_offset(cell, WIDTH, PREFERENCE[1], PREFERENCE[2])
    log_cs = log_preference(preference_ptr, offset, mask, scales, PREFERENCE[3], C, APPROX)
    no_gradient = (0.0, 0.0, 0.0, 0.0, 0.0)
    sums, _p_sums = visit_plan(
        logits_ptr, backward_ptr, observation_ptr, logits_ptr, logits_ptr, direction_ptr + program * T * C, logits_ptr,
        episode, cell, mask, counted, target, log_cs, no_gradient, LOGITS, BACKWARD, OBSERVATION, (0,), (0,),
        HAS_BACKWARD, HAS_FINAL, HAS_OBSERVATION, HAS_DIRECTION, True, False, False, T, WIDTH, C, PAIRS, ALONE,
        APPROX,
    )  # fmt: skip
    if HAS_FINAL:
        finals = load_step(final_ptr, episode, 0, cell, mask, FINAL, WIDTH, C)
        _ps, ds, l = softmax(finals, C, APPROX)
        sums = add_final(sums, finals, ds, l, target, counted, C)
    distance = tl.zeros((TILE,), tl.float32)
    if HAS_ANCHOR:
        place = cell_offset(cell, WIDTH, TARGET_PREFERENCE[0], TARGET_PREFERENCE[1])
        distance, _logs, _set = anchor_divergence(
            log_cs, target_preference_ptr, place, mask, counted, TARGET_PREFERENCE[2], C, APPROX
        )
    store_sums(sums_ptr + program * NUM_SUMS, sums, distance, counted, True)


@triton.jit
def efe_loss_survey_kernel(
    final_ptr,  # [B, H, W, C] any strides
    target_ptr,  # [B, H, W] any strides
    valid_ptr,  # [B, H, W] uint8, any strides
    sums_ptr,  # [B, TILES, NUM_SUMS] float32, written
    IGNORE_INDEX: tl.constexpr,
    FINAL: tl.constexpr,
    TARGET: tl.constexpr,
    VALID: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CELLS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of what the forward kernel sums, that which the gradients depend on: misses and cells. The rest is 0."""
    program = tl.program_id(0).to(tl.int64)
    episode = program // TILES
    cell = (program % TILES).to(tl.int32) * TILE + tl.arange(0, TILE)
    mask = cell < CELLS
    counted, target = counted_cells(
        target_ptr, valid_ptr, episode, cell, mask, IGNORE_INDEX, TARGET, VALID, WIDTH, C, HAS_VALID
    )
    xs = load_step(final_ptr, episode, 0, cell, mask, FINAL, WIDTH, C)
    zeros = tl.zeros((TILE,), tl.float32)
    sums = (zeros, zeros, zeros, zeros, missed_target(xs, target, counted, C))
    store_sums(sums_ptr + program * NUM_SUMS, sums, zeros, counted, True)


@triton.jit
def efe_loss_episode_kernel(
    sums_ptr,  # [B, TILES, NUM_SUMS] float32
    direction_ptr,  # [B, TILES, T, C] float32
    prompt_ptr,  # [B, D] any strides
    projection_ptr,  # [C, D] any strides
    total_ptr,  # [B] float32, written
    terms_ptr,  # [B, NUM_TERMS] float32, written
    mask_ratio_ptr,  # [B] float32, written
    scale_ptr,  # [B] float32, written
    residual_ptr,  # [B, RESIDUAL] float32, written: cells, then d prompt term / d logits [T, C] and / d (W e) [C]
    weight_risk,
    weight_ambiguity,
    weight_consistency,
    weight_agreement,
    weight_anchor,
    weight_prompt,
    weight_step,
    min_ratio,
    max_cells,
    PROMPT: tl.constexpr,
    PROJECTION: tl.constexpr,
    HARD_CELL: tl.constexpr,
    HAS_DIRECTION: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    C_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
):
    """Terms and total of one episode."""
    episode = tl.program_id(0).to(tl.int64)
    # The last slot is padding that no program writes.
    sums = sum_over_tiles(sums_ptr + episode * TILES * NUM_SUMS, NUM_TERMS, NUM_SUMS, TILES, NUM_SUMS, TILE_BLOCK)
    residual_ptr += episode * RESIDUAL
    cells = pick(sums, 6)
    share = 1.0 / tl.maximum(cells, 1.0)
    risk = pick(sums, 0) * share / T
    ambiguity = pick(sums, 1) * share / T
    consistency = pick(sums, 2) * share
    # Rounding can take a divergence of 0 below it.
    agreement = tl.maximum(pick(sums, 3), 0.0, propagate_nan=tl.PropagateNan.ALL) * share / T
    anchor = pick(sums, 4) * share
    mask_ratio = pick(sums, 5) * share
    step = cells * T / max_cells
    prompt = 0.0
    if HAS_DIRECTION:
        prompt = prompt_term(
            direction_ptr + episode * TILES * T * C, prompt_ptr + episode * PROMPT[0], projection_ptr,
            residual_ptr, share, PROMPT[1], PROJECTION, T, C, D, TILES, C_BLOCK, D_BLOCK, TILE_BLOCK,
        )  # fmt: skip
    scale = 1.0
    if HARD_CELL:
        scale = tl.where(mask_ratio < min_ratio, 1.0, 0.5 + 0.5 * mask_ratio)
    total = weighted(weight_risk, risk) + weighted(weight_ambiguity, ambiguity)
    total += weighted(weight_consistency, consistency) + weighted(weight_agreement, agreement)
    total += weighted(weight_anchor, anchor) + weighted(weight_prompt, prompt) + weighted(weight_step, step)
    tl.store(total_ptr + episode, total * scale)
    tl.store(mask_ratio_ptr + episode, mask_ratio)
    tl.store(scale_ptr + episode, scale)
    tl.store(residual_ptr, cells)
    terms_ptr += episode * NUM_TERMS
    tl.store(terms_ptr + 0, risk)
    tl.store(terms_ptr + 1, ambiguity)
    tl.store(terms_ptr + 2, consistency)
    tl.store(terms_ptr + 3, agreement)
    tl.store(terms_ptr + 4, anchor)
    tl.store(terms_ptr + 5, prompt)
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
def weighted(weight, term):
    """A weight of 0 removes the term, whatever it is."""
    return tl.where(weight == 0.0, 0.0, weight * term)


@triton.jit
def prompt_term(
    direction_ptr,  # [TILES, T, C] sums over the cells of a tile of the clamped logits
    prompt_ptr,  # [D]
    projection_ptr,  # [C, D] any strides
    residual_ptr,  # [1 + (T + 1) * C]
    share,
    STRIDE_D: tl.constexpr,
    PROJECTION: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    C_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
):
    """Minus the mean over steps of cos(z, u), u = W e, and its gradient.

    With unit vectors z' and u': d cos / d z = (u' - cos z') / |z|. z is the centred sum over cells times share, so the
    gradient that reaches a logit is the centred d / d z times share.
    """
    outcome = tl.arange(0, C_BLOCK)
    real = outcome < C
    u = tl.zeros((C_BLOCK,), tl.float32)
    for start in range(0, D, D_BLOCK):
        d = start + tl.arange(0, D_BLOCK)
        e = tl.load(prompt_ptr + d * STRIDE_D, mask=d < D, other=0.0).to(tl.float32)
        offset = outcome[:, None] * PROJECTION[0] + d[None, :] * PROJECTION[1]
        w = tl.load(projection_ptr + offset, mask=real[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
        u += tl.sum(w * e[None, :], axis=1)
    u_norm = tl.sqrt(tl.sum(u * u))
    total = 0.0
    grad_u = tl.zeros((C_BLOCK,), tl.float32)
    for t in range(T):
        sums = sum_over_tiles(direction_ptr + t * C, C, T * C, TILES, C_BLOCK, TILE_BLOCK)
        z = tl.where(real, sums - tl.sum(sums) / C, 0.0) * share
        z_norm = tl.sqrt(tl.sum(z * z))
        defined = (z_norm > SHORTEST_DIRECTION) & (u_norm > SHORTEST_DIRECTION)
        z_inverse = tl.where(defined, 1.0 / tl.where(defined, z_norm, 1.0), 0.0)
        u_inverse = tl.where(defined, 1.0 / tl.where(defined, u_norm, 1.0), 0.0)
        cosine = tl.sum(z * u) * z_inverse * u_inverse
        total -= cosine / T
        grad_u -= (z * z_inverse - cosine * u * u_inverse) * u_inverse / T
        grad_z = -(u * u_inverse - cosine * z * z_inverse) * z_inverse / T
        grad_z = (grad_z - tl.sum(tl.where(real, grad_z, 0.0)) / C) * share
        tl.store(residual_ptr + 1 + t * C + outcome, grad_z, mask=real)
    tl.store(residual_ptr + 1 + T * C + outcome, grad_u, mask=real)
    return total


@triton.jit
def upstream(grad_total, grad_terms_ptr, weight, TERM: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_TERMS: tl.constexpr):
    """d loss / d term: through the total and directly."""
    grad = 0.0
    if HAS_TOTAL:
        grad += weighted(weight, grad_total)
    if HAS_TERMS:
        grad += tl.load(grad_terms_ptr + TERM)
    return grad


@triton.jit(do_not_specialize=["num_episodes"])
def efe_loss_backward_kernel(
    grad_total_ptr,  # [B] float32
    promise_ptr,  # [] float32
    grad_terms_ptr,  # [B, NUM_TERMS] float32
    logits_ptr,  # [B, T, H, W, C] any strides
    backward_ptr,  # [B, T, H, W, C] any strides
    final_ptr,  # [B, H, W, C] any strides
    observation_ptr,  # [B, T, H, W, C] any strides
    preference_ptr,  # [B or 1, H, W, C] any strides
    prompt_ptr,  # [B, D] any strides
    target_ptr,  # [B, H, W] any strides
    target_preference_ptr,  # [H, W, C] any strides
    valid_ptr,  # [B, H, W] uint8, any strides
    scale_ptr,  # [B] float32
    residual_ptr,  # [B, RESIDUAL] float32
    grad_logits_ptr,  # [B, T, H, W, C] own strides, written
    grad_backward_ptr,  # [B, T, H, W, C] own strides, written
    grad_final_ptr,  # [B, H, W, C] own strides, written
    grad_observation_ptr,  # [B, T, H, W, C] own strides, written
    grad_preference_ptr,  # [CHUNKS, C, H * W] float32, written; [B, H, W, C] own strides for one preference per episode
    grad_scales_ptr,  # [B, TILES, C] float32, written: sums over a tile of d loss / d preference scale
    sums_ptr,  # [B, TILES, NUM_SUMS] float32, written
    weight_risk,
    weight_ambiguity,
    weight_consistency,
    weight_agreement,
    weight_anchor,
    weight_prompt,
    num_episodes,
    IGNORE_INDEX: tl.constexpr,
    GRAD_TOTAL: tl.constexpr,
    LOGITS: tl.constexpr,
    BACKWARD: tl.constexpr,
    FINAL: tl.constexpr,
    OBSERVATION: tl.constexpr,
    PREFERENCE: tl.constexpr,
    PROMPT: tl.constexpr,
    TARGET: tl.constexpr,
    TARGET_PREFERENCE: tl.constexpr,
    VALID: tl.constexpr,
    GRAD_LOGITS: tl.constexpr,
    GRAD_BACKWARD: tl.constexpr,
    GRAD_FINAL: tl.constexpr,
    GRAD_OBSERVATION: tl.constexpr,
    GRAD_PREFERENCE: tl.constexpr,
    LOSS: tl.constexpr,
    PROMISED: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_TERMS: tl.constexpr,
    HAS_BACKWARD: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    HAS_OBSERVATION: tl.constexpr,
    HAS_PROMPT: tl.constexpr,
    HAS_DIRECTION: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SHARED_PREFERENCE: tl.constexpr,
    NEED_LOGITS: tl.constexpr,
    NEED_BACKWARD: tl.constexpr,
    NEED_FINAL: tl.constexpr,
    NEED_OBSERVATION: tl.constexpr,
    NEED_PREFERENCE: tl.constexpr,
    NEED_SCALES: tl.constexpr,
    T: tl.constexpr,
    CELLS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    ALONE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EPISODES: tl.constexpr,
    TILE: tl.constexpr,
    APPROX: tl.constexpr,
):
    """Gradients of one tile of cells for a chunk of episodes; with LOSS also what the forward kernel sums.

    PROMISED: the gradients lie there already, made for the upstream gradient `promise`. Where it came true for the
    whole chunk nothing is left to do, where it did not they are computed again.

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
    tl.static_assert(not (LOSS and HAS_DIRECTION), "the direction is a sum over all cells, known before any gradient")
    tile = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    cell = tile * TILE + tl.arange(0, TILE)
    inside = cell < CELLS
    zeros = tl.zeros((TILE,), tl.float32)
    grad_shared = repeated(zeros, C)
    if PROMISED:
        episodes = chunk * EPISODES + tl.arange(0, EPISODES)
        promise = tl.load(promise_ptr)
        truth = tl.load(grad_total_ptr + episodes * GRAD_TOTAL[0], mask=episodes < num_episodes, other=promise)
        if tl.sum((truth != promise).to(tl.int32)) == 0:
            return

    for index in range(EPISODES):
        live = chunk * EPISODES + index < num_episodes
        episode = tl.minimum(chunk * EPISODES + index, num_episodes - 1).to(tl.int64)
        mask = cell < tl.where(live, CELLS, 0)
        residual = residual_ptr + episode * RESIDUAL
        grad_terms = grad_terms_ptr + episode * NUM_TERMS
        share = 1.0 / tl.maximum(tl.load(residual), 1.0)
        grad_total = 0.0
        if HAS_TOTAL:
            grad_total = tl.load(grad_total_ptr + episode * GRAD_TOTAL[0]) * tl.load(scale_ptr + episode)
        a = upstream(grad_total, grad_terms, weight_risk, 0, HAS_TOTAL, HAS_TERMS) * share / T
        e = upstream(grad_total, grad_terms, weight_ambiguity, 1, HAS_TOTAL, HAS_TERMS) * share / T
        k = upstream(grad_total, grad_terms, weight_consistency, 2, HAS_TOTAL, HAS_TERMS) * share
        j = upstream(grad_total, grad_terms, weight_agreement, 3, HAS_TOTAL, HAS_TERMS) * share / T
        anchor = upstream(grad_total, grad_terms, weight_anchor, 4, HAS_TOTAL, HAS_TERMS) * share
        direction = upstream(grad_total, grad_terms, weight_prompt, 5, HAS_TOTAL, HAS_TERMS)
        # What multiplies a logarithm carries the factor from base 2 to nats.
        risk = LN_2 * a
        own = risk if HAS_OBSERVATION else LN_2 * (a - e)
        js = LN_2 * (0.5 * j if HAS_BACKWARD else j)

        counted, target = counted_cells(
            target_ptr, valid_ptr, episode, cell, mask, IGNORE_INDEX, TARGET, VALID, WIDTH, C, HAS_VALID
        )
        scales = preference_scales(prompt_ptr, episode, PROMPT, C, HAS_PROMPT, APPROX)
        offset = episode * PREFERENCE[0] + cell_offset(cell, WIDTH, PREFERENCE[1], PREFERENCE[2])
        log_cs = log_preference(preference_ptr, offset, mask, scales, PREFERENCE[3], C, APPROX)
        factors = (own, risk, k, js, direction)
        sums, p_sums = visit_plan(
            logits_ptr, backward_ptr, observation_ptr, grad_logits_ptr, grad_backward_ptr, logits_ptr, residual,
            episode, cell, mask, counted, target, log_cs, factors, LOGITS, BACKWARD, OBSERVATION, GRAD_LOGITS,
            GRAD_BACKWARD, HAS_BACKWARD, HAS_FINAL, HAS_OBSERVATION, HAS_DIRECTION, LOSS, NEED_LOGITS,
            NEED_BACKWARD, T, WIDTH, C, PAIRS, ALONE, APPROX,
        )  # fmt: skip
        if NEED_OBSERVATION:
            for step in range(T):
                os = load_step(observation_ptr, episode, step, cell, mask, OBSERVATION, WIDTH, C)
                grads = observation_gradient(os, e, C, APPROX)
                store_step(grad_observation_ptr, grads, episode, step, cell, mask, counted, GRAD_OBSERVATION, WIDTH, C)
        if HAS_FINAL and (NEED_FINAL or LOSS):
            finals = load_step(final_ptr, episode, 0, cell, mask, FINAL, WIDTH, C)
            ps, ds, l = softmax(finals, C, APPROX)
            if LOSS:
                sums = add_final(sums, finals, ds, l, target, counted, C)
            if NEED_FINAL:
                grads = add_cross_entropy(repeated(zeros, C), ps, target, k, C)
                store_step(grad_final_ptr, grads, episode, 0, cell, mask, counted, GRAD_FINAL, WIDTH, C)
        distance = zeros
        if HAS_ANCHOR:
            place = cell_offset(cell, WIDTH, TARGET_PREFERENCE[0], TARGET_PREFERENCE[1])
            distance, log_anchors, is_set = anchor_divergence(
                log_cs, target_preference_ptr, place, mask, counted, TARGET_PREFERENCE[2], C, APPROX
            )
        if LOSS:
            program = episode * tl.num_programs(0) + tile
            store_sums(sums_ptr + program * NUM_SUMS, sums, distance, counted, live)
        if NEED_PREFERENCE or NEED_SCALES:
            # c, the scales and the unscaled logits are taken up again here: kept from above, they would not fit into
            # registers.
            scales = preference_scales(prompt_ptr, episode, PROMPT, C, HAS_PROMPT, APPROX)
            grads = ()
            for c in tl.static_range(C):
                grads = grads + (a * (T * tl.exp2(log_cs[c]) - p_sums[c]),)
            if HAS_ANCHOR:
                added = ()
                for c in tl.static_range(C):
                    grad = anchor * LN_2 * tl.exp2(log_cs[c]) * (log_cs[c] - log_anchors[c] - distance)
                    added = added + (grads[c] + tl.where(is_set, grad, 0.0),)
                grads = added
            scaled = ()
            for c in tl.static_range(C):
                scaled = scaled + (tl.where(counted, scales[c] * grads[c], 0.0),)
            if NEED_SCALES:
                unscaled = load_outcomes(preference_ptr, offset, mask, PREFERENCE[3], C)
                for c in tl.static_range(C):
                    total = tl.sum(tl.where(counted, finite(unscaled[c]) * grads[c], 0.0))
                    tl.store(grad_scales_ptr + (episode * tl.num_programs(0) + tile) * C + c, total, mask=live)
            if NEED_PREFERENCE:
                if SHARED_PREFERENCE:
                    added = ()
                    for c in tl.static_range(C):
                        added = added + (grad_shared[c] + scaled[c],)
                    grad_shared = added
                else:
                    store_step(grad_preference_ptr, scaled, episode, 0, cell, mask, counted, GRAD_PREFERENCE, WIDTH, C)
    if NEED_PREFERENCE:
        if SHARED_PREFERENCE:
            for c in tl.static_range(C):
                tl.store(grad_preference_ptr + (chunk * C + c) * CELLS + cell, grad_shared[c], mask=inside)


@triton.jit(do_not_specialize=["num_episodes", "num_chunks"])
def efe_loss_shared_gradients_kernel(
    grad_total_ptr,  # [B] float32
    grad_terms_ptr,  # [B, NUM_TERMS] float32
    prompt_ptr,  # [B, D] any strides
    projection_ptr,  # [C, D] any strides
    scale_ptr,  # [B] float32
    residual_ptr,  # [B, RESIDUAL] float32
    partial_ptr,  # [CHUNKS, C, H * W] float32: sums over a chunk of episodes of d loss / d preference logits
    grad_scales_ptr,  # [B, TILES, C] float32
    grad_preference_ptr,  # [H, W, C] own strides, written
    grad_prompt_ptr,  # [B, D] own strides, written
    grad_projection_ptr,  # [C, D] own strides, written
    weight_prompt,
    num_episodes,
    num_chunks,
    GRAD_TOTAL: tl.constexpr,
    PROMPT: tl.constexpr,
    PROJECTION: tl.constexpr,
    GRAD_PREFERENCE: tl.constexpr,
    GRAD_PROMPT: tl.constexpr,
    GRAD_PROJECTION: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_TERMS: tl.constexpr,
    HAS_DIRECTION: tl.constexpr,
    NEED_PROMPT: tl.constexpr,
    CELLS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PREFERENCE_PROGRAMS: tl.constexpr,
    PROJECTION_PROGRAMS: tl.constexpr,
    CELL_BLOCK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    EPISODE_BLOCK: tl.constexpr,
    PROMPT_BLOCK: tl.constexpr,
):
    """What gathers the gradients of many cells: one launch for preference, projection and prompt.

    The first programs take an outcome of a block of cells each, the next ones a row of a block of the projection, and
    the others one prompt each. With u = W e: d / d W = (d / d u) e^T, d / d e = W^T (d / d u), and
    sigmoid' = s (1 - s).
    """
    program = tl.program_id(0)
    if PREFERENCE_PROGRAMS > 0:
        if program < PREFERENCE_PROGRAMS:
            preference_gradient(
                partial_ptr, grad_preference_ptr, program // C, program % C, num_chunks, GRAD_PREFERENCE, CELLS, WIDTH,
                C, CELL_BLOCK, CHUNK_BLOCK,
            )  # fmt: skip
    program -= PREFERENCE_PROGRAMS
    if PROJECTION_PROGRAMS > 0:
        if (program >= 0) & (program < PROJECTION_PROGRAMS):
            projection_gradient(
                grad_total_ptr, grad_terms_ptr, prompt_ptr, scale_ptr, residual_ptr, grad_projection_ptr, program // C,
                program % C, weight_prompt, num_episodes, GRAD_TOTAL, PROMPT, GRAD_PROJECTION, HAS_TOTAL, HAS_TERMS, C,
                D, RESIDUAL, D_BLOCK, EPISODE_BLOCK,
            )  # fmt: skip
    program -= PROJECTION_PROGRAMS
    if NEED_PROMPT:
        if program >= 0:
            prompt_gradient(
                grad_total_ptr, grad_terms_ptr, prompt_ptr, projection_ptr, scale_ptr, residual_ptr, grad_scales_ptr,
                grad_prompt_ptr, program.to(tl.int64), weight_prompt, GRAD_TOTAL, PROMPT, PROJECTION, GRAD_PROMPT,
                HAS_TOTAL, HAS_TERMS, HAS_DIRECTION, C, D, TILES, RESIDUAL, PROMPT_BLOCK,
            )  # fmt: skip


@triton.jit
def prompt_gradient(
    grad_total_ptr,  # [B] float32
    grad_terms_ptr,  # [B, NUM_TERMS] float32
    prompt_ptr,  # [B, D] any strides
    projection_ptr,  # [C, D] any strides
    scale_ptr,  # [B] float32
    residual_ptr,  # [B, RESIDUAL] float32
    grad_scales_ptr,  # [B, TILES, C] float32
    grad_prompt_ptr,  # [B, D] own strides, written
    episode,
    weight,
    GRAD_TOTAL: tl.constexpr,
    PROMPT: tl.constexpr,
    PROJECTION: tl.constexpr,
    GRAD_PROMPT: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_TERMS: tl.constexpr,
    HAS_DIRECTION: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d loss / d prompt of one episode: through its direction, and for the first C through the preference."""
    for start in tl.static_range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        grad = tl.zeros((BLOCK,), tl.float32)
        if HAS_DIRECTION:
            direction = upstream_of_direction(
                grad_total_ptr, grad_terms_ptr, scale_ptr, episode, True, weight, GRAD_TOTAL, HAS_TOTAL, HAS_TERMS
            )
            for c in tl.static_range(C):
                w = tl.load(projection_ptr + c * PROJECTION[0] + d * PROJECTION[1], mask=d < D, other=0.0)
                grad += direction * tl.load(residual_ptr + (episode + 1) * RESIDUAL - C + c) * w.to(tl.float32)
        if start == 0:
            scales = tl.zeros((BLOCK,), tl.float32)
            for tile in range(TILES):
                scales += tl.load(grad_scales_ptr + (episode * TILES + tile) * C + d, mask=d < C, other=0.0)
            e = tl.load(prompt_ptr + episode * PROMPT[0] + d * PROMPT[1], mask=d < C, other=0.0).to(tl.float32)
            s = 1.0 / (1.0 + tl.exp2(-e * LOG2_E))
            grad += scales * s * (1.0 - s)
        offset = episode * GRAD_PROMPT[0] + d * GRAD_PROMPT[1]
        tl.store(grad_prompt_ptr + offset, grad.to(grad_prompt_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def upstream_of_direction(
    grad_total_ptr,  # [B] float32
    grad_terms_ptr,  # [B, NUM_TERMS] float32
    scale_ptr,  # [B] float32
    episode,
    mask,
    weight,
    GRAD_TOTAL: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_TERMS: tl.constexpr,
):
    """d loss / d prompt term of one episode or of several."""
    grad = 0.0
    if HAS_TOTAL:
        total = tl.load(grad_total_ptr + episode * GRAD_TOTAL[0], mask=mask) * tl.load(scale_ptr + episode, mask=mask)
        grad += weighted(weight, total)
    if HAS_TERMS:
        grad += tl.load(grad_terms_ptr + episode * NUM_TERMS + 5, mask=mask)
    return grad


@triton.jit
def preference_gradient(
    partial_ptr,  # [CHUNKS, C, CELLS] float32
    grad_ptr,  # [H, W, C] own strides, written
    block,
    outcome,
    num_chunks,
    STRIDES: tl.constexpr,
    CELLS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    CELL_BLOCK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
):
    """d loss / d preference logits of one outcome of a block of cells, from the sums over chunks of episodes."""
    cell = block * CELL_BLOCK + tl.arange(0, CELL_BLOCK)
    inside = cell < CELLS
    sums = tl.zeros((CHUNK_BLOCK, CELL_BLOCK), tl.float32)
    for first in range(0, num_chunks, CHUNK_BLOCK):
        chunk = (first + tl.arange(0, CHUNK_BLOCK)).to(tl.int64)
        mask = (chunk < num_chunks)[:, None] & inside[None, :]
        sums += tl.load(partial_ptr + (chunk[:, None] * C + outcome) * CELLS + cell[None, :], mask=mask, other=0.0)
    offset = cell_offset(cell, WIDTH, STRIDES[0], STRIDES[1]) + outcome * STRIDES[2]
    tl.store(grad_ptr + offset, tl.sum(sums, axis=0).to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def projection_gradient(
    grad_total_ptr,  # [B] float32
    grad_terms_ptr,  # [B, NUM_TERMS] float32
    prompt_ptr,  # [B, D] any strides
    scale_ptr,  # [B] float32
    residual_ptr,  # [B, RESIDUAL] float32
    grad_projection_ptr,  # [C, D] own strides, written
    block,
    outcome,
    weight,
    num_episodes,
    GRAD_TOTAL: tl.constexpr,
    PROMPT: tl.constexpr,
    GRAD_PROJECTION: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_TERMS: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    D_BLOCK: tl.constexpr,
    EPISODE_BLOCK: tl.constexpr,
):
    """A block of one row of d loss / d projection."""
    d = block * D_BLOCK + tl.arange(0, D_BLOCK)
    sums = tl.zeros((EPISODE_BLOCK, D_BLOCK), tl.float32)
    for first in range(0, num_episodes, EPISODE_BLOCK):
        episode = (first + tl.arange(0, EPISODE_BLOCK)).to(tl.int64)
        mask = episode < num_episodes
        grad = upstream_of_direction(
            grad_total_ptr, grad_terms_ptr, scale_ptr, episode, mask, weight, GRAD_TOTAL, HAS_TOTAL, HAS_TERMS
        )
        grad_u = tl.load(residual_ptr + (episode + 1) * RESIDUAL - C + outcome, mask=mask, other=0.0)
        offset = episode[:, None] * PROMPT[0] + d[None, :] * PROMPT[1]
        e = tl.load(prompt_ptr + offset, mask=mask[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        sums += tl.where(mask, grad * grad_u, 0.0)[:, None] * e
    row = tl.sum(sums, axis=0).to(grad_projection_ptr.dtype.element_ty)
    tl.store(grad_projection_ptr + outcome * GRAD_PROJECTION[0] + d * GRAD_PROJECTION[1], row, mask=d < D)
