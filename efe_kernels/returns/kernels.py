"""The Triton kernels of gae and vtrace and their launchers.

Both are one recurrence backward in time, x_t = delta_t + coefficient_t x_{t+1}. Short rows are walked by one lane each.
Long rows are a scan over the affine maps of their steps: time is cut into chunks, each chunk scanned by a tile
[ROWS, TIME], and the state handed from chunk to chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.common.triton import OPTIONS, as_bytes, launch_guard
from efe_kernels.returns.reference import Settings, Transitions, given

SERIAL_STEPS = 32
SCAN_STEPS = 512  # longest chunk
SCAN_TILE = 1024  # elements of a tile


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
def importance(
    log_ratio_ptr,  # [N, T] or None: gae
    offset,
    ok,
    lam,
    rho_clip,
    c_clip,
):
    """rho and c of vtrace, 1 and lam of gae."""
    if log_ratio_ptr is None:
        rho = tl.full(offset.shape, 1.0, tl.float32)
        c = rho * lam
    else:
        ratio = tl.exp(tl.load(log_ratio_ptr + offset, mask=ok, other=0.0).to(tl.float32))
        rho = tl.where(ratio > rho_clip, rho_clip, ratio)
        c = tl.where(ratio > c_clip, c_clip, ratio)
    return rho, c


@triton.jit
def discount(
    terminated_ptr,  # [N, T]
    truncated_ptr,  # [N, T] or None
    offset,
    ok,
    gamma,
):
    """gamma where the next state's value counts and where the trace goes on, 0 elsewhere."""
    terminated = tl.load(terminated_ptr + offset, mask=ok, other=1) != 0
    stop = terminated
    if truncated_ptr is not None:
        stop = stop | (tl.load(truncated_ptr + offset, mask=ok, other=1) != 0)
    return tl.where(terminated, 0.0, gamma), tl.where(stop, 0.0, gamma)


@triton.jit
def load_step(
    reward_ptr,  # [N, T]
    value_ptr,  # [N, T]
    next_value_ptr,  # [N, T]
    terminated_ptr,  # [N, T]
    truncated_ptr,  # [N, T] or None
    log_ratio_ptr,  # [N, T] or None: gae
    offset,
    ok,
    gamma,
    lam,
    rho_clip,
    c_clip,
    reward_scale,
):
    """delta, the coefficient of x_{t+1} in x_t, that in the advantage of vtrace, and the value; 0 where not ok."""
    bootstrap_discount, trace_discount = discount(terminated_ptr, truncated_ptr, offset, ok, gamma)
    rho, c = importance(log_ratio_ptr, offset, ok, lam, rho_clip, c_clip)
    value = tl.load(value_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    next_value = tl.load(next_value_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    reward = tl.load(reward_ptr + offset, mask=ok, other=0.0).to(tl.float32) * reward_scale
    delta = rho * (advance(bootstrap_discount, reward, next_value) - value)
    return delta, c * trace_discount, rho * trace_discount, value


@triton.jit
def finish_step(delta, pull, value, following, x, VTRACE: tl.constexpr):
    """Advantage and value target of a step with the state `following` after it and `x` in it."""
    if VTRACE:
        advantage = advance(pull, delta, following)
    else:
        advantage = x
    return advantage, x + value


@triton.jit
def trace_serial_kernel(
    reward_ptr,  # [N, T]
    value_ptr,  # [N, T]
    next_value_ptr,  # [N, T]
    terminated_ptr,  # [N, T]
    truncated_ptr,  # [N, T] or None
    log_ratio_ptr,  # [N, T] or None: gae
    advantage_ptr,  # [N, T]
    target_ptr,  # [N, T]
    rows,
    stride_row,
    stride_time,
    gamma,
    lam,
    rho_clip,
    c_clip,
    reward_scale,
    T: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    x = tl.zeros((ROWS,), tl.float32)
    for step in tl.static_range(T):
        offset = row * stride_row + tl.cast(T - 1 - step, tl.int64) * stride_time
        delta, coefficient, pull, value = load_step(
            reward_ptr, value_ptr, next_value_ptr, terminated_ptr, truncated_ptr, log_ratio_ptr, offset, ok,
            gamma, lam, rho_clip, c_clip, reward_scale,
        )  # fmt: skip
        following = x
        x = advance(coefficient, delta, following)
        advantage, target = finish_step(delta, pull, value, following, x, log_ratio_ptr is not None)
        tl.store(advantage_ptr + offset, advantage.to(advantage_ptr.dtype.element_ty), mask=ok)
        tl.store(target_ptr + offset, target.to(target_ptr.dtype.element_ty), mask=ok)


@triton.jit
def tile_of_chunk(chunk, rows, stride_row, stride_time, ROWS: tl.constexpr, TIME: tl.constexpr):
    """Offsets of the rows [ROWS, 1] and positions in the order of the scan [1, TIME] of a chunk."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    position = chunk * TIME + tl.arange(0, TIME)[None, :]
    return row * stride_row, row < rows, position


@triton.jit
def last_of(x, TIME: tl.constexpr):
    """The last column of [ROWS, TIME]."""
    last = tl.arange(0, TIME)[None, :] == TIME - 1
    return tl.sum(tl.where(last, x, 0.0), axis=1)


@triton.jit
def trace_scan_kernel(
    reward_ptr,  # [N, T]
    value_ptr,  # [N, T]
    next_value_ptr,  # [N, T]
    terminated_ptr,  # [N, T]
    truncated_ptr,  # [N, T] or None
    log_ratio_ptr,  # [N, T] or None: gae
    advantage_ptr,  # [N, T]
    target_ptr,  # [N, T]
    rows,
    steps,
    stride_row,
    stride_time,
    gamma,
    lam,
    rho_clip,
    c_clip,
    reward_scale,
    ROWS: tl.constexpr,
    TIME: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    VTRACE: tl.constexpr = log_ratio_ptr is not None
    state = tl.zeros((ROWS,), tl.float32)
    for chunk in range(CHUNKS):
        row_offset, row_ok, position = tile_of_chunk(chunk, rows, stride_row, stride_time, ROWS, TIME)
        t = steps - 1 - position
        ok = row_ok & (t >= 0)
        offset = row_offset + t.to(tl.int64) * stride_time
        delta, coefficient, pull, value = load_step(
            reward_ptr, value_ptr, next_value_ptr, terminated_ptr, truncated_ptr, log_ratio_ptr, offset, ok,
            gamma, lam, rho_clip, c_clip, reward_scale,
        )  # fmt: skip
        if VTRACE:
            # The state after each step: a scan over the steps t + 1, whose first column hands the state on as it is.
            later = ok & (position > chunk * TIME)
            later_delta, later_coefficient, _, _ = load_step(
                reward_ptr, value_ptr, next_value_ptr, terminated_ptr, truncated_ptr, log_ratio_ptr,
                offset + stride_time, later, gamma, lam, rho_clip, c_clip, reward_scale,
            )  # fmt: skip
            later_coefficient = tl.where(position > chunk * TIME, later_coefficient, 1.0)
            factor, term = tl.associative_scan((later_coefficient, later_delta), 1, chain)
            following = advance(factor, term, state[:, None])
            x = advance(coefficient, delta, following)
        else:
            factor, term = tl.associative_scan((coefficient, delta), 1, chain)
            x = advance(factor, term, state[:, None])
            following = x
        advantage, target = finish_step(delta, pull, value, following, x, VTRACE)
        tl.store(advantage_ptr + offset, advantage.to(advantage_ptr.dtype.element_ty), mask=ok)
        tl.store(target_ptr + offset, target.to(target_ptr.dtype.element_ty), mask=ok)
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
def load_arrival(
    grad_advantage_ptr,  # [N, T] or None
    grad_target_ptr,  # [N, T] or None
    terminated_ptr,  # [N, T]
    truncated_ptr,  # [N, T] or None
    log_ratio_ptr,  # [N, T] or None: gae
    offset,
    ok,
    previous_offset,
    previous_ok,
    gamma,
    lam,
    rho_clip,
    c_clip,
):
    """k_{t-1} and the rest of s_t; 0 where not ok."""
    arrival = load_gradient(grad_target_ptr, offset, ok)
    _, trace_discount = discount(terminated_ptr, truncated_ptr, previous_offset, previous_ok, gamma)
    rho, c = importance(log_ratio_ptr, previous_offset, previous_ok, lam, rho_clip, c_clip)
    if log_ratio_ptr is None:
        arrival += load_gradient(grad_advantage_ptr, offset, ok)
    else:
        earlier = load_gradient(grad_advantage_ptr, previous_offset, previous_ok)
        arrival = advance(rho * trace_discount, arrival, earlier)
    return c * trace_discount, arrival


@triton.jit
def load_gradient(
    ptr,  # [N, T] or None
    offset,
    ok,
):
    if ptr is None:
        gradient = tl.zeros(offset.shape, tl.float32)
    else:
        gradient = tl.load(ptr + offset, mask=ok, other=0.0).to(tl.float32)
    return gradient


@triton.jit
def store_value_gradients(
    grad_advantage_ptr,  # [N, T] or None
    grad_target_ptr,  # [N, T] or None
    log_ratio_ptr,  # [N, T] or None: gae
    terminated_ptr,  # [N, T]
    grad_value_ptr,  # [N, T] or None
    grad_next_value_ptr,  # [N, T] or None
    offset,
    ok,
    s,
    gamma,
    lam,
    rho_clip,
    c_clip,
):
    grad_error = s
    if log_ratio_ptr is not None:
        rho, _ = importance(log_ratio_ptr, offset, ok, lam, rho_clip, c_clip)
        grad_error = rho * (s + load_gradient(grad_advantage_ptr, offset, ok))
    if grad_value_ptr is not None:
        grad_value = load_gradient(grad_target_ptr, offset, ok) - grad_error
        tl.store(grad_value_ptr + offset, grad_value.to(grad_value_ptr.dtype.element_ty), mask=ok)
    if grad_next_value_ptr is not None:
        bootstrap_discount, _ = discount(terminated_ptr, None, offset, ok, gamma)
        grad_next_value = advance(bootstrap_discount, 0.0, grad_error)
        tl.store(grad_next_value_ptr + offset, grad_next_value.to(grad_next_value_ptr.dtype.element_ty), mask=ok)


@triton.jit
def trace_serial_backward_kernel(
    grad_advantage_ptr,  # [N, T] or None
    grad_target_ptr,  # [N, T] or None
    terminated_ptr,  # [N, T]
    truncated_ptr,  # [N, T] or None
    log_ratio_ptr,  # [N, T] or None: gae
    grad_value_ptr,  # [N, T] or None
    grad_next_value_ptr,  # [N, T] or None
    rows,
    stride_row,
    stride_time,
    gamma,
    lam,
    rho_clip,
    c_clip,
    T: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    s = tl.zeros((ROWS,), tl.float32)
    for t in tl.static_range(T):
        offset = row * stride_row + tl.cast(t, tl.int64) * stride_time
        coefficient, arrival = load_arrival(
            grad_advantage_ptr, grad_target_ptr, terminated_ptr, truncated_ptr, log_ratio_ptr, offset, ok,
            offset - stride_time, ok & (t > 0), gamma, lam, rho_clip, c_clip,
        )  # fmt: skip
        s = advance(coefficient, arrival, s)
        store_value_gradients(
            grad_advantage_ptr, grad_target_ptr, log_ratio_ptr, terminated_ptr, grad_value_ptr, grad_next_value_ptr,
            offset, ok, s, gamma, lam, rho_clip, c_clip,
        )  # fmt: skip


@triton.jit
def trace_scan_backward_kernel(
    grad_advantage_ptr,  # [N, T] or None
    grad_target_ptr,  # [N, T] or None
    terminated_ptr,  # [N, T]
    truncated_ptr,  # [N, T] or None
    log_ratio_ptr,  # [N, T] or None: gae
    grad_value_ptr,  # [N, T] or None
    grad_next_value_ptr,  # [N, T] or None
    rows,
    steps,
    stride_row,
    stride_time,
    gamma,
    lam,
    rho_clip,
    c_clip,
    ROWS: tl.constexpr,
    TIME: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    state = tl.zeros((ROWS,), tl.float32)
    for chunk in range(CHUNKS):
        row_offset, row_ok, t = tile_of_chunk(chunk, rows, stride_row, stride_time, ROWS, TIME)
        ok = row_ok & (t < steps)
        offset = row_offset + t.to(tl.int64) * stride_time
        coefficient, arrival = load_arrival(
            grad_advantage_ptr, grad_target_ptr, terminated_ptr, truncated_ptr, log_ratio_ptr, offset, ok,
            offset - stride_time, ok & (t > 0), gamma, lam, rho_clip, c_clip,
        )  # fmt: skip
        factor, term = tl.associative_scan((coefficient, arrival), 1, chain)
        s = advance(factor, term, state[:, None])
        store_value_gradients(
            grad_advantage_ptr, grad_target_ptr, log_ratio_ptr, terminated_ptr, grad_value_ptr, grad_next_value_ptr,
            offset, ok, s, gamma, lam, rho_clip, c_clip,
        )  # fmt: skip
        state = last_of(s, TIME)


def aligned(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """tensor with the strides of `like`, copied where it has others; bool as bytes."""
    if tensor is None:
        return None
    if tensor.stride() != like.stride():
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return as_bytes(tensor) if tensor.dtype == torch.bool else tensor


def launch(serial: Any, scan: Any, like: Tensor, tensors: tuple[Tensor | None, ...], **settings: float) -> None:
    """Launch the kernel that suits the number of steps. like: [N, T], whose strides all tensors have."""
    rows, steps = like.shape
    strides = {"stride_row": like.stride(0), "stride_time": like.stride(1)}
    with launch_guard(like):
        if steps <= SERIAL_STEPS:
            grid = (triton.cdiv(rows, 64),)
            serial[grid](*tensors, rows, **strides, **settings, T=steps, ROWS=64, num_warps=2, **OPTIONS)
        else:
            time = min(triton.next_power_of_2(steps), SCAN_STEPS)
            tile = {"ROWS": SCAN_TILE // time, "TIME": time, "CHUNKS": triton.cdiv(steps, time)}
            grid = (triton.cdiv(rows, tile["ROWS"]),)
            scan[grid](*tensors, rows, steps, **strides, **settings, **tile, num_warps=4, **OPTIONS)


def trace_forward(
    value: Tensor, next_value: Tensor, reward: Tensor, transitions: Transitions, settings: Settings
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    advantage, target = torch.empty_like(reward), torch.empty_like(reward)
    if reward.numel() > 0:
        inputs = (reward, value, next_value, *transitions)
        tensors = (*(aligned(tensor, advantage) for tensor in inputs), advantage, target)
        launch(trace_serial_kernel, trace_scan_kernel, advantage, tensors, **settings._asdict())
    return advantage, target


def trace_backward(
    grad_advantage: Tensor | None,
    grad_target: Tensor | None,
    needs: list[bool],
    transitions: Transitions,
    settings: Settings,
) -> list[Tensor]:
    """See the reference."""
    dtype = given(grad_advantage, grad_target).dtype
    found = [torch.empty_like(transitions.terminated, dtype=dtype) if need else None for need in needs]
    gradients = [gradient for gradient in found if gradient is not None]
    if gradients and gradients[0].numel() > 0:
        inputs = (grad_advantage, grad_target, *transitions)
        tensors = (*(aligned(tensor, gradients[0]) for tensor in inputs), *found)
        discounts = {name: value for name, value in settings._asdict().items() if name != "reward_scale"}
        launch(trace_serial_backward_kernel, trace_scan_backward_kernel, gradients[0], tensors, **discounts)
    return gradients
