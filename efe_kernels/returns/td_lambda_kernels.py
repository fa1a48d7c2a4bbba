"""The Triton kernels of td_lambda and their launchers.

G_t = delta_t + k_t G_{t+1} with k_t = gamma lam and delta_t = reward_t + gamma (1 - lam) next_value_t where the return
goes on, and k_t = 0 and delta_t = reward_t + gamma next_value_t where it stops: after the last step, and at an end, of
which a terminal one has no next value. For the upstream gradient g_t the adjoint runs forward in time,
s_t = g_t + k_{t-1} s_{t-1}, and d / d next_value_t is s_t times the factor of next_value_t in delta_t.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.common.triton import load, store
from efe_kernels.returns.kernels import advance, chain, discount, last_of, launch, tile_of_chunk
from efe_kernels.returns.reference import Ends, TDLambdaSettings


class Rewards(NamedTuple):
    reward: Any  # [N, T]
    next_value: Any  # [N, T]


class Written(NamedTuple):
    """The returns, or the gradient of next_value; read by backward, the gradient of the returns."""

    tensor: Any  # [N, T]


@triton.jit
def factors(ends, offset, ok, last, settings):
    """Of next_value_t, and k_t."""
    bootstrap_discount, trace_discount = discount(ends, offset, ok, settings.gamma)
    own = tl.where(last | (trace_discount == 0.0), bootstrap_discount, bootstrap_discount * (1.0 - settings.lam))
    return own, settings.lam * trace_discount


@triton.jit
def load_step(rewards, ends, offset, ok, last, settings):
    """delta_t and k_t; 0 where not ok."""
    own, coefficient = factors(ends, offset, ok, last, settings)
    reward = load(rewards.reward, offset, ok) * settings.reward_scale
    return advance(own, reward, load(rewards.next_value, offset, ok)), coefficient


@triton.jit
def td_lambda_serial_kernel(rewards, ends, written, rows, settings, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows.count
    x = tl.zeros((ROWS,), tl.float32)
    for step in tl.static_range(rows.steps):
        offset = row * rows.stride_row + tl.cast(rows.steps - 1 - step, tl.int64) * rows.stride_time
        delta, coefficient = load_step(rewards, ends, offset, ok, ok & (step == 0), settings)
        x = advance(coefficient, delta, x)
        store(written.tensor, offset, x, ok)


@triton.jit
def td_lambda_scan_kernel(
    rewards, ends, written, rows, settings, ROWS: tl.constexpr, TIME: tl.constexpr, CHUNKS: tl.constexpr
):
    state = tl.zeros((ROWS,), tl.float32)
    for chunk in range(CHUNKS):
        row_offset, row_ok, position = tile_of_chunk(chunk, rows, ROWS, TIME)
        t = rows.steps - 1 - position
        ok = row_ok & (t >= 0)
        offset = row_offset + t.to(tl.int64) * rows.stride_time
        delta, coefficient = load_step(rewards, ends, offset, ok, ok & (position == 0), settings)
        factor, term = tl.associative_scan((coefficient, delta), 1, chain)
        x = advance(factor, term, state[:, None])
        store(written.tensor, offset, x, ok)
        state = last_of(x, TIME)


@triton.jit
def load_arrival(upstream, ends, offset, ok, previous_offset, previous_ok, settings):
    """k_{t-1} and g_t; 0 where not ok."""
    _, coefficient = factors(ends, previous_offset, previous_ok, ok & False, settings)
    return coefficient, load(upstream.tensor, offset, ok)


@triton.jit
def store_gradient(written, ends, offset, ok, last, s, settings):
    own, _ = factors(ends, offset, ok, last, settings)
    store(written.tensor, offset, advance(own, 0.0, s), ok)


@triton.jit
def td_lambda_serial_backward_kernel(upstream, ends, written, rows, settings, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows.count
    s = tl.zeros((ROWS,), tl.float32)
    for t in tl.static_range(rows.steps):
        offset = row * rows.stride_row + tl.cast(t, tl.int64) * rows.stride_time
        previous = offset - rows.stride_time
        coefficient, arrival = load_arrival(upstream, ends, offset, ok, previous, ok & (t > 0), settings)
        s = advance(coefficient, arrival, s)
        store_gradient(written, ends, offset, ok, ok & (t == rows.steps - 1), s, settings)


@triton.jit
def td_lambda_scan_backward_kernel(
    upstream, ends, written, rows, settings, ROWS: tl.constexpr, TIME: tl.constexpr, CHUNKS: tl.constexpr
):
    state = tl.zeros((ROWS,), tl.float32)
    for chunk in range(CHUNKS):
        row_offset, row_ok, t = tile_of_chunk(chunk, rows, ROWS, TIME)
        ok = row_ok & (t < rows.steps)
        offset = row_offset + t.to(tl.int64) * rows.stride_time
        previous = offset - rows.stride_time
        coefficient, arrival = load_arrival(upstream, ends, offset, ok, previous, ok & (t > 0), settings)
        factor, term = tl.associative_scan((coefficient, arrival), 1, chain)
        s = advance(factor, term, state[:, None])
        store_gradient(written, ends, offset, ok, ok & (t == rows.steps - 1), s, settings)
        state = last_of(s, TIME)


def td_lambda_forward(next_value: Tensor, reward: Tensor, ends: Ends, settings: TDLambdaSettings) -> Tensor:
    """See the reference."""
    returns = torch.empty_like(reward)
    if reward.numel() > 0:
        kernels = (td_lambda_serial_kernel, td_lambda_scan_kernel)
        launch(*kernels, Rewards(reward, next_value), ends, Written(returns), settings, returns)
    return returns


def td_lambda_backward(grad_result: Tensor, ends: Ends, settings: TDLambdaSettings) -> Tensor:
    """See the reference."""
    gradient = torch.empty_like(ends.terminated, dtype=grad_result.dtype)
    if gradient.numel() > 0:
        kernels = (td_lambda_serial_backward_kernel, td_lambda_scan_backward_kernel)
        launch(*kernels, Written(grad_result), ends, Written(gradient), settings, gradient)
    return gradient
