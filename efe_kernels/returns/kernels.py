"""The Triton kernels of gae and vtrace and their launchers.

Both are one recurrence backward in time, x_t = delta_t + coefficient_t x_{t+1}. Short rows are walked by one lane each.
Long rows are a scan over the affine maps of their steps: time is cut into chunks, each chunk scanned by a tile
[ROWS, TIME], and the state handed from chunk to chunk.

The tensors come to a kernel in the tuples below and those of the reference; all are [N, T] with the same strides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.common.triton import OPTIONS, as_bytes, launch_guard, load, store
from efe_kernels.returns.reference import Settings, Transitions, given

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


class Rows(NamedTuple):
    """How [N, T] lies in memory."""

    count: int
    steps: Any  # a constant where they are few
    stride_row: int
    stride_time: int


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
def importance(transitions, offset, ok, settings):
    """rho and c of vtrace, 1 and lam of gae."""
    if transitions.log_ratio is None:
        rho = tl.full(offset.shape, 1.0, tl.float32)
        c = rho * settings.lam
    else:
        ratio = tl.exp(load(transitions.log_ratio, offset, ok))
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
def discount(transitions, offset, ok, gamma):
    """gamma where the next state's value counts and where the trace goes on, 0 elsewhere."""
    terminated = is_set(transitions.terminated, offset, ok)
    stop = terminated
    if transitions.truncated is not None:
        stop = stop | is_set(transitions.truncated, offset, ok)
    return tl.where(terminated, 0.0, gamma), tl.where(stop, 0.0, gamma)


@triton.jit
def weighted(trace_discount, weight):
    """Their product, but 0 where the trace stops: a weight of NaN or infinity must not reach another episode."""
    return tl.where(trace_discount == 0.0, 0.0, weight * trace_discount)


@triton.jit
def load_step(values, transitions, offset, ok, settings):
    """delta, the coefficient of x_{t+1} in x_t, that in the advantage of vtrace, and the value; 0 where not ok."""
    bootstrap_discount, trace_discount = discount(transitions, offset, ok, settings.gamma)
    rho, c = importance(transitions, offset, ok, settings)
    value = load(values.value, offset, ok)
    next_value = load(values.next_value, offset, ok)
    reward = load(values.reward, offset, ok) * settings.reward_scale
    delta = rho * (advance(bootstrap_discount, reward, next_value) - value)
    return delta, weighted(trace_discount, c), weighted(trace_discount, rho), value


@triton.jit
def trace_serial_kernel(values, transitions, outputs, rows, settings, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows.count
    x = tl.zeros((ROWS,), tl.float32)
    for step in tl.static_range(rows.steps):
        offset = row * rows.stride_row + tl.cast(rows.steps - 1 - step, tl.int64) * rows.stride_time
        delta, coefficient, pull, value = load_step(values, transitions, offset, ok, settings)
        following = x
        x = advance(coefficient, delta, following)
        advantage = x if transitions.log_ratio is None else advance(pull, delta, following)
        target = x + value
        store(outputs.advantage, offset, advantage, ok)
        store(outputs.target, offset, target, ok)


@triton.jit
def tile_of_chunk(chunk, rows, ROWS: tl.constexpr, TIME: tl.constexpr):
    """Offsets of the rows [ROWS, 1] and positions in the order of the scan [1, TIME] of a chunk."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    position = chunk * TIME + tl.arange(0, TIME)[None, :]
    return row * rows.stride_row, row < rows.count, position


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
        row_offset, row_ok, position = tile_of_chunk(chunk, rows, ROWS, TIME)
        t = rows.steps - 1 - position
        ok = row_ok & (t >= 0)
        offset = row_offset + t.to(tl.int64) * rows.stride_time
        delta, coefficient, pull, value = load_step(values, transitions, offset, ok, settings)
        if transitions.log_ratio is None:
            factor, term = tl.associative_scan((coefficient, delta), 1, chain)
            x = advance(factor, term, state[:, None])
            advantage = x
        else:
            # The state after each step: a scan over the steps t + 1, whose first column hands the state on as it is.
            later = ok & (position > chunk * TIME)
            later_offset = offset + rows.stride_time
            later_delta, later_coefficient, _, _ = load_step(values, transitions, later_offset, later, settings)
            later_coefficient = tl.where(position > chunk * TIME, later_coefficient, 1.0)
            factor, term = tl.associative_scan((later_coefficient, later_delta), 1, chain)
            following = advance(factor, term, state[:, None])
            x = advance(coefficient, delta, following)
            advantage = advance(pull, delta, following)
        target = x + value
        store(outputs.advantage, offset, advantage, ok)
        store(outputs.target, offset, target, ok)
        state = last_of(x, TIME)


# With u_t = reward_t + gamma (1 - terminated_t) next_value_t - value_t, delta_t = rho_t u_t, d_t = gamma or, where the
# trace stops, 0, k_t = c_t d_t and x_t = delta_t + k_t x_{t+1}, the results are target_t = value_t + x_t and
#   gae (rho = 1, c = lam)  advantage_t = x_t
#   vtrace                  advantage_t = delta_t + rho_t d_t x_{t+1}
# For upstream gradients A of the advantage and V of the target, the adjoint s_t of x_t runs forward in time:
#   gae     s_t = V_t + A_t + k_{t-1} s_{t-1},                        du_t = s_t
#   vtrace  s_t = V_t + rho_{t-1} d_{t-1} A_{t-1} + k_{t-1} s_{t-1},  du_t = rho_t (s_t + A_t)
# and dvalue_t = V_t - du_t, dnext_value_t = gamma (1 - terminated_t) du_t.
@triton.jit
def load_arrival(upstream, transitions, offset, ok, previous_offset, previous_ok, settings):
    """k_{t-1} and the rest of s_t; 0 where not ok."""
    arrival = load(upstream.target, offset, ok)
    _, trace_discount = discount(transitions, previous_offset, previous_ok, settings.gamma)
    rho, c = importance(transitions, previous_offset, previous_ok, settings)
    if transitions.log_ratio is None:
        arrival += load(upstream.advantage, offset, ok)
    else:
        arrival = advance(
            weighted(trace_discount, rho), arrival, load(upstream.advantage, previous_offset, previous_ok)
        )
    return weighted(trace_discount, c), arrival


@triton.jit
def store_gradients(upstream, transitions, gradients, offset, ok, s, settings):
    grad_error = s
    if transitions.log_ratio is not None:
        rho, _ = importance(transitions, offset, ok, settings)
        grad_error = rho * (s + load(upstream.advantage, offset, ok))
    if gradients.value is not None:
        store(gradients.value, offset, load(upstream.target, offset, ok) - grad_error, ok)
    if gradients.next_value is not None:
        bootstrap_discount = tl.where(is_set(transitions.terminated, offset, ok), 0.0, settings.gamma)
        store(gradients.next_value, offset, advance(bootstrap_discount, 0.0, grad_error), ok)


@triton.jit
def trace_serial_backward_kernel(upstream, transitions, gradients, rows, settings, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows.count
    s = tl.zeros((ROWS,), tl.float32)
    for t in tl.static_range(rows.steps):
        offset = row * rows.stride_row + tl.cast(t, tl.int64) * rows.stride_time
        previous = offset - rows.stride_time
        coefficient, arrival = load_arrival(upstream, transitions, offset, ok, previous, ok & (t > 0), settings)
        s = advance(coefficient, arrival, s)
        store_gradients(upstream, transitions, gradients, offset, ok, s, settings)


@triton.jit
def trace_scan_backward_kernel(
    upstream, transitions, gradients, rows, settings, ROWS: tl.constexpr, TIME: tl.constexpr, CHUNKS: tl.constexpr
):
    state = tl.zeros((ROWS,), tl.float32)
    for chunk in range(CHUNKS):
        row_offset, row_ok, t = tile_of_chunk(chunk, rows, ROWS, TIME)
        ok = row_ok & (t < rows.steps)
        offset = row_offset + t.to(tl.int64) * rows.stride_time
        previous = offset - rows.stride_time
        coefficient, arrival = load_arrival(upstream, transitions, offset, ok, previous, ok & (t > 0), settings)
        factor, term = tl.associative_scan((coefficient, arrival), 1, chain)
        s = advance(factor, term, state[:, None])
        store_gradients(upstream, transitions, gradients, offset, ok, s, settings)
        state = last_of(s, TIME)


def aligned(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """tensor with the strides of `like`, copied where it has others; bool as bytes."""
    if tensor is None:
        return None
    if tensor.stride() != like.stride():
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return as_bytes(tensor) if tensor.dtype == torch.bool else tensor


def launch(
    serial: Any, scan: Any, read: Any, transitions: Transitions, written: Any, settings: Settings, like: Tensor
) -> None:
    """Launch the kernel that suits the number of steps. like: a written tensor, whose strides the read ones get."""
    count, steps = like.shape
    read, transitions = (type(group)(*[aligned(tensor, like) for tensor in group]) for group in (read, transitions))
    with launch_guard(like):
        if steps <= SERIAL_STEPS:
            rows = Rows(count, tl.constexpr(steps), *like.stride())
            grid = (triton.cdiv(count, 64),)
            serial[grid](read, transitions, written, rows, settings, ROWS=64, num_warps=2, **OPTIONS)
        else:
            rows = Rows(count, steps, *like.stride())
            time = min(triton.next_power_of_2(steps), SCAN_STEPS)
            tile = {"ROWS": SCAN_TILE // time, "TIME": time, "CHUNKS": triton.cdiv(steps, time)}
            grid = (triton.cdiv(count, tile["ROWS"]),)
            scan[grid](read, transitions, written, rows, settings, **tile, num_warps=4, **OPTIONS)


def trace_forward(
    value: Tensor, next_value: Tensor, reward: Tensor, transitions: Transitions, settings: Settings
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    outputs = Outputs(torch.empty_like(reward), torch.empty_like(reward))
    if reward.numel() > 0:
        values = Values(reward, value, next_value)
        launch(trace_serial_kernel, trace_scan_kernel, values, transitions, outputs, settings, outputs.advantage)
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
        kernels = (trace_serial_backward_kernel, trace_scan_backward_kernel)
        launch(*kernels, upstream, transitions, found, settings, gradients[0])
    return gradients
