"""The Triton kernels of gae and vtrace and their launchers.

Both are one recurrence backward in time, x_t = delta_t + coefficient_t x_{t+1}. Short rows are walked by one lane each.
Long rows are a scan over the affine maps of their steps: time is cut into chunks, each chunk scanned by a tile
[ROWS, TIME], and the state handed from chunk to chunk.

The tensors come to a kernel in the tuples below and those of the reference; all are [N, T], with the same strides but
for gammas and lams, which have their own.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.common.launch import PreparedLaunch, cdiv, kept, next_power_of_2, signature
from efe_kernels.common.triton import OPTIONS, as_bytes, launch_guard, load, store
from efe_kernels.returns.reference import Ends, Settings, Transitions, given

SERIAL_STEPS = 32
SCAN_STEPS = 512  # longest chunk
SCAN_TILE = 1024  # elements of a tile


class Values(NamedTuple):
    reward: Any  # [N, T]
    value: Any  # [N, T]
    next_value: Any  # [N, T]


class Outputs(NamedTuple):
    """Or the upstream gradients, of which one may be None."""

    advantage: Any  # [N, T]
    target: Any  # [N, T]


class Gradients(NamedTuple):
    """None where a gradient is not asked for."""

    value: Any  # [N, T]
    next_value: Any  # [N, T]
    reward: Any  # [N, T]


class Rows(NamedTuple):
    """How [N, T] lies in memory."""

    count: int
    steps: Any  # a constant where they are few
    stride_row: int
    stride_time: int
    gamma_row: int  # strides of gammas and lams
    gamma_time: int
    lam_row: int
    lam_time: int


class At(NamedTuple):
    """Offsets of elements of [N, T], and of their gammas and lams."""

    offset: Any
    gamma: Any
    lam: Any


@triton.jit
def at_step(rows, row, t):
    t = tl.cast(t, tl.int64)
    return At(
        row * rows.stride_row + t * rows.stride_time,
        row * rows.gamma_row + t * rows.gamma_time,
        row * rows.lam_row + t * rows.lam_time,
    )


@triton.jit
def advance(factor, term, x):
    """term + factor · x, where a factor of 0 lets nothing through: no NaN of another episode either."""
    return term + tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def chain(first_factor, first_term, second_factor, second_term):
    """The affine map that applies the first one, then the second."""
    factor = tl.where(second_factor == 0.0, 0.0, first_factor * second_factor)
    return factor, advance(second_factor, second_term, first_term)


@triton.jit
def importance(transitions, at, ok, settings):
    """rho and c of vtrace, 1 in gae."""
    if transitions.log_ratio is None:
        rho = tl.full(ok.shape, 1.0, tl.float32)
        c = rho
    else:
        ratio = tl.exp(load(transitions.log_ratio, at.offset, ok))
        rho = tl.where(ratio > settings.rho_clip, settings.rho_clip, ratio)
        c = tl.where(ratio > settings.c_clip, settings.c_clip, ratio)
    return rho, c


@triton.jit
def is_set(
    flag_ptr,  # [N, T]
    offset,
    ok,
):
    """Whether the flag is set; it is where not ok."""
    return tl.load(flag_ptr + offset, mask=ok, other=1) != 0


@triton.jit
def ended(ends, at, ok):
    """Where the next state's value does not count, and where the trace does not go on; both where not ok."""
    terminated = is_set(ends.terminated, at.offset, ok)
    stop = terminated
    if ends.truncated is not None:
        stop = stop | is_set(ends.truncated, at.offset, ok)
    return terminated, stop


@triton.jit
def gamma_and_lam(ends, at, ok, settings):
    """The settings, or in their place those of each step."""
    gamma = settings.gamma
    if ends.gammas is not None:
        gamma = load(ends.gammas, at.gamma, ok)
    lam = settings.lam
    if ends.lams is not None:
        lam = load(ends.lams, at.lam, ok)
    return gamma, lam


@triton.jit
def discounts(ends, at, ok, settings):
    """Of the next state's value, and of what follows; 0 where the one or the other ends."""
    terminated, stop = ended(ends, at, ok)
    gamma, lam = gamma_and_lam(ends, at, ok, settings)
    return tl.where(terminated, 0.0, gamma), tl.where(stop, 0.0, gamma * lam)


@triton.jit
def weighted(trace, weight):
    """Their product, but 0 where the trace stops: a weight of NaN or infinity must not reach another episode."""
    return tl.where(trace == 0.0, 0.0, weight * trace)


@triton.jit
def load_step(values, transitions, at, ok, settings):
    """delta, the coefficient of x_{t+1} in x_t, that in the advantage of vtrace, and the value; 0 where not ok."""
    bootstrap, trace = discounts(transitions, at, ok, settings)
    rho, c = importance(transitions, at, ok, settings)
    value = load(values.value, at.offset, ok)
    next_value = load(values.next_value, at.offset, ok)
    reward = load(values.reward, at.offset, ok) * settings.reward_scale
    delta = rho * (advance(bootstrap, reward, next_value) - value)
    return delta, weighted(trace, c), weighted(trace, rho), value


@triton.jit
def trace_serial_kernel(values, transitions, outputs, rows, settings, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows.count
    x = tl.zeros((ROWS,), tl.float32)
    for step in tl.static_range(rows.steps):
        at = at_step(rows, row, rows.steps - 1 - step)
        delta, coefficient, pull, value = load_step(values, transitions, at, ok, settings)
        following = x
        x = advance(coefficient, delta, following)
        advantage = x if transitions.log_ratio is None else advance(pull, delta, following)
        target = x + value
        store(outputs.advantage, at.offset, advantage, ok)
        store(outputs.target, at.offset, target, ok)


@triton.jit
def tile_of_chunk(chunk, rows, ROWS: tl.constexpr, TIME: tl.constexpr):
    """The rows [ROWS, 1] and positions in the order of the scan [1, TIME] of a chunk."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    position = chunk * TIME + tl.arange(0, TIME)[None, :]
    return row, row < rows.count, position


@triton.jit
def last_of(x, TIME: tl.constexpr):
    """The last column of [ROWS, TIME]."""
    last = tl.arange(0, TIME)[None, :] == TIME - 1
    return tl.sum(tl.where(last, x, 0.0), axis=1)


@triton.jit
def trace_scan_kernel(
    values, transitions, outputs, rows, settings, ROWS: tl.constexpr, TIME: tl.constexpr, CHUNKS: tl.constexpr
):
    state = tl.zeros((ROWS,), tl.float32)
    for chunk in range(CHUNKS):
        row, row_ok, position = tile_of_chunk(chunk, rows, ROWS, TIME)
        t = rows.steps - 1 - position
        ok = row_ok & (t >= 0)
        at = at_step(rows, row, t)
        delta, coefficient, pull, value = load_step(values, transitions, at, ok, settings)
        if transitions.log_ratio is None:
            factor, term = tl.associative_scan((coefficient, delta), 1, chain)
            x = advance(factor, term, state[:, None])
            advantage = x
        else:
            # The state after each step: a scan over the steps t + 1, whose first column hands the state on as it is.
            later = ok & (position > chunk * TIME)
            later_at = at_step(rows, row, t + 1)
            later_delta, later_coefficient, _, _ = load_step(values, transitions, later_at, later, settings)
            later_coefficient = tl.where(position > chunk * TIME, later_coefficient, 1.0)
            factor, term = tl.associative_scan((later_coefficient, later_delta), 1, chain)
            following = advance(factor, term, state[:, None])
            x = advance(coefficient, delta, following)
            advantage = advance(pull, delta, following)
        target = x + value
        store(outputs.advantage, at.offset, advantage, ok)
        store(outputs.target, at.offset, target, ok)
        state = last_of(x, TIME)


# With u_t = reward_scale reward_t + gamma (1 - terminated_t) next_value_t - value_t, delta_t = rho_t u_t,
# d_t = gamma lam or, where the trace stops, 0, k_t = c_t d_t and x_t = delta_t + k_t x_{t+1}, the results are
# target_t = value_t + x_t and
#   gae     s_t = V_t + A_t + k_{t-1} s_{t-1},                        du_t = s_t
#   vtrace  s_t = V_t + rho_{t-1} d_{t-1} A_{t-1} + k_{t-1} s_{t-1},  du_t = rho_t (s_t + A_t)
# and dvalue_t = V_t - du_t, dnext_value_t = gamma (1 - terminated_t) du_t, dreward_t = reward_scale du_t.
@triton.jit
def load_arrival(upstream, transitions, offset, ok, previous, previous_ok, settings):
    """k_{t-1} and the rest of s_t; 0 where not ok. previous: where t - 1 is."""
    arrival = load(upstream.target, offset, ok)
    _, trace = discounts(transitions, previous, previous_ok, settings)
    rho, c = importance(transitions, previous, previous_ok, settings)
    if transitions.log_ratio is None:
        arrival += load(upstream.advantage, offset, ok)
    else:
        arrival = advance(weighted(trace, rho), arrival, load(upstream.advantage, previous.offset, previous_ok))
    return weighted(trace, c), arrival


@triton.jit
def store_gradients(upstream, transitions, gradients, at, ok, s, settings):
    grad_error = s
    if transitions.log_ratio is not None:
        rho, _ = importance(transitions, at, ok, settings)
        grad_error = rho * (s + load(upstream.advantage, at.offset, ok))
    if gradients.value is not None:
        store(gradients.value, at.offset, load(upstream.target, at.offset, ok) - grad_error, ok)
    if gradients.next_value is not None:
        gamma, _ = gamma_and_lam(transitions, at, ok, settings)
        bootstrap = tl.where(is_set(transitions.terminated, at.offset, ok), 0.0, gamma)
        store(gradients.next_value, at.offset, advance(bootstrap, 0.0, grad_error), ok)
    if gradients.reward is not None:
        store(gradients.reward, at.offset, settings.reward_scale * grad_error, ok)


@triton.jit
def trace_serial_backward_kernel(upstream, transitions, gradients, rows, settings, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows.count
    s = tl.zeros((ROWS,), tl.float32)
    for t in tl.static_range(rows.steps):
        at, previous = at_step(rows, row, t), at_step(rows, row, t - 1)
        coefficient, arrival = load_arrival(upstream, transitions, at.offset, ok, previous, ok & (t > 0), settings)
        s = advance(coefficient, arrival, s)
        store_gradients(upstream, transitions, gradients, at, ok, s, settings)


@triton.jit
def trace_scan_backward_kernel(
    upstream, transitions, gradients, rows, settings, ROWS: tl.constexpr, TIME: tl.constexpr, CHUNKS: tl.constexpr
):
    state = tl.zeros((ROWS,), tl.float32)
    for chunk in range(CHUNKS):
        row, row_ok, t = tile_of_chunk(chunk, rows, ROWS, TIME)
        ok = row_ok & (t < rows.steps)
        at, previous = at_step(rows, row, t), at_step(rows, row, t - 1)
        coefficient, arrival = load_arrival(upstream, transitions, at.offset, ok, previous, ok & (t > 0), settings)
        factor, term = tl.associative_scan((coefficient, arrival), 1, chain)
        s = advance(factor, term, state[:, None])
        store_gradients(upstream, transitions, gradients, at, ok, s, settings)
        state = last_of(s, TIME)


def aligned(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """tensor with the strides of `like`, copied where it has others."""
    if tensor is None or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def form(tensor: Tensor | None) -> Hashable:
    """What Triton compiles differently for, of an aligned tensor."""
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16)


def strides(factor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if factor is None else factor.stride()


# By what the tensors have in common: common.launch, which looks at every argument, takes a quarter longer.
LAUNCHES: dict[Hashable, tuple[PreparedLaunch, Rows]] = {}


def prepared(
    serial: Any, scan: Any, like: Tensor, gammas: Tensor | None, lams: Tensor | None
) -> tuple[PreparedLaunch, Rows]:
    """Of the kernel that suits the number of steps, and how its tensors lie."""
    count, steps = like.shape
    if steps <= SERIAL_STEPS:
        constants = {"ROWS": 64, "num_warps": 2}
        kernel, length = serial, tl.constexpr(steps)
    else:
        time = min(next_power_of_2(steps), SCAN_STEPS)
        constants = {"ROWS": SCAN_TILE // time, "TIME": time, "CHUNKS": cdiv(steps, time), "num_warps": 4}
        kernel, length = scan, steps
    grid = (cdiv(count, constants["ROWS"]),)
    rows = Rows(count, length, *like.stride(), *strides(gammas), *strides(lams))
    return PreparedLaunch(kernel, grid, {**constants, **OPTIONS}), rows


def launch(serial: Any, scan: Any, read: Any, ends: Transitions | Ends, written: Any, settings: Any) -> None:
    """Launch the kernel that suits the number of steps. read: gets the strides of what is written."""
    like = next(tensor for tensor in written if tensor is not None)
    *others, gammas, lams = ends
    read = type(read)(*[aligned(tensor, like) for tensor in read])
    others = [aligned(tensor, like) for tensor in others]
    forms = tuple([form(tensor) for tensor in (*read, *others, *written)])
    tile = (SERIAL_STEPS, SCAN_STEPS, SCAN_TILE)
    key = (serial.__name__, like.shape, like.stride(), like.device, forms, signature(gammas), signature(lams), tile)
    run, rows = kept(LAUNCHES, key, lambda: prepared(serial, scan, like, gammas, lams))
    if run.launch is None:  # what compiles looks at the dtype of flags
        others = [
            as_bytes(tensor) if tensor is not None and tensor.dtype == torch.bool else tensor for tensor in others
        ]
    with launch_guard(like):
        run(read, type(ends)(*others, gammas, lams), written, rows, settings)


def trace_forward(
    value: Tensor, next_value: Tensor, reward: Tensor, transitions: Transitions, settings: Settings
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    outputs = Outputs(torch.empty_like(reward), torch.empty_like(reward))
    if reward.numel() > 0:
        values = Values(reward, value, next_value)
        launch(trace_serial_kernel, trace_scan_kernel, values, transitions, outputs, settings)
    return outputs


def trace_backward(
    grad_advantage: Tensor | None,
    grad_target: Tensor | None,
    needs: list[bool],
    transitions: Transitions,
    settings: Settings,
) -> list[Tensor]:
    """See the reference."""
    dtype = given(grad_advantage, grad_target).dtype
    found = Gradients(*[torch.empty_like(transitions.terminated, dtype=dtype) if need else None for need in needs])
    gradients = [gradient for gradient in found if gradient is not None]
    if gradients and gradients[0].numel() > 0:
        upstream = Outputs(grad_advantage, grad_target)
        launch(trace_serial_backward_kernel, trace_scan_backward_kernel, upstream, transitions, found, settings)
    return gradients
