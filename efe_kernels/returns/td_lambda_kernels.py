"""The Triton kernels of td_lambda and their launchers.

G_t = delta_t + k_t G_{t+1}. Where the return goes on, k_t = gamma lam and
delta_t = reward_scale reward_t + gamma (1 - lam) next_value_t. Where it stops, after the last step and at an end,
k_t = 0 and delta_t = reward_scale reward_t + gamma next_value_t; a terminal step has no next value. For the upstream
gradient g_t the adjoint runs forward in time, s_t = g_t + k_{t-1} s_{t-1}. d / d reward_t is reward_scale s_t, and
d / d next_value_t is s_t times the factor of next_value_t in delta_t.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.common.triton import load, store
from efe_kernels.returns.kernels import advance, at_step, chain, ended, gamma_and_lam, last_of, launch, tile_of_chunk
from efe_kernels.returns.reference import Ends, TDLambdaSettings


class Rewards(NamedTuple):
    reward: Any  # [N, T]
    next_value: Any  # [N, T]


class Array(NamedTuple):
    """The returns, or the gradient that arrives at them."""

    tensor: Any  # [N, T]


class Gradients(NamedTuple):
    """None where a gradient is not asked for."""

    next_value: Any  # [N, T]
    reward: Any  # [N, T]


@triton.jit
def factors(ends, at, ok, last, settings):
    """Of next_value_t, and k_t."""
    terminated, stop = ended(ends, at, ok)
    gamma, lam = gamma_and_lam(ends, at, ok, settings)
    own = tl.where(last | stop, gamma, gamma * (1.0 - lam))
    return tl.where(terminated, 0.0, own), tl.where(stop, 0.0, gamma * lam)


@triton.jit
def load_step(rewards, ends, at, ok, last, settings):
    """delta_t and k_t; 0 where not ok."""
    own, coefficient = factors(ends, at, ok, last, settings)
    reward = load(rewards.reward, at.offset, ok) * settings.reward_scale
    return advance(own, reward, load(rewards.next_value, at.offset, ok)), coefficient


@triton.jit
def td_lambda_serial_kernel(rewards, ends, returns, rows, settings, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows.count
    x = tl.zeros((ROWS,), tl.float32)
    for step in tl.static_range(rows.steps):
        at = at_step(rows, row, rows.steps - 1 - step)
        delta, coefficient = load_step(rewards, ends, at, ok, ok & (step == 0), settings)
        x = advance(coefficient, delta, x)
        store(returns.tensor, at.offset, x, ok)


@triton.jit
def td_lambda_scan_kernel(
    rewards, ends, returns, rows, settings, ROWS: tl.constexpr, TIME: tl.constexpr, CHUNKS: tl.constexpr
):
    state = tl.zeros((ROWS,), tl.float32)
    for chunk in range(CHUNKS):
        row, row_ok, position = tile_of_chunk(chunk, rows, ROWS, TIME)
        t = rows.steps - 1 - position
        ok = row_ok & (t >= 0)
        at = at_step(rows, row, t)
        delta, coefficient = load_step(rewards, ends, at, ok, ok & (position == 0), settings)
        factor, term = tl.associative_scan((coefficient, delta), 1, chain)
        x = advance(factor, term, state[:, None])
        store(returns.tensor, at.offset, x, ok)
        state = last_of(x, TIME)


@triton.jit
def load_arrival(upstream, ends, offset, ok, previous, previous_ok, settings):
    """k_{t-1} and g_t; 0 where not ok. previous: where t - 1 is."""
    _, coefficient = factors(ends, previous, previous_ok, ok & False, settings)
    return coefficient, load(upstream.tensor, offset, ok)


@triton.jit
def store_gradients(gradients, ends, at, ok, last, s, settings):
    if gradients.next_value is not None:
        own, _ = factors(ends, at, ok, last, settings)
        store(gradients.next_value, at.offset, advance(own, 0.0, s), ok)
    if gradients.reward is not None:
        store(gradients.reward, at.offset, settings.reward_scale * s, ok)


@triton.jit
def td_lambda_serial_backward_kernel(upstream, ends, gradients, rows, settings, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows.count
    s = tl.zeros((ROWS,), tl.float32)
    for t in tl.static_range(rows.steps):
        at, previous = at_step(rows, row, t), at_step(rows, row, t - 1)
        coefficient, arrival = load_arrival(upstream, ends, at.offset, ok, previous, ok & (t > 0), settings)
        s = advance(coefficient, arrival, s)
        store_gradients(gradients, ends, at, ok, ok & (t == rows.steps - 1), s, settings)


@triton.jit
def td_lambda_scan_backward_kernel(
    upstream, ends, gradients, rows, settings, ROWS: tl.constexpr, TIME: tl.constexpr, CHUNKS: tl.constexpr
):
    state = tl.zeros((ROWS,), tl.float32)
    for chunk in range(CHUNKS):
        row, row_ok, t = tile_of_chunk(chunk, rows, ROWS, TIME)
        ok = row_ok & (t < rows.steps)
        at, previous = at_step(rows, row, t), at_step(rows, row, t - 1)
        coefficient, arrival = load_arrival(upstream, ends, at.offset, ok, previous, ok & (t > 0), settings)
        factor, term = tl.associative_scan((coefficient, arrival), 1, chain)
        s = advance(factor, term, state[:, None])
        store_gradients(gradients, ends, at, ok, ok & (t == rows.steps - 1), s, settings)
        state = last_of(s, TIME)


def td_lambda_forward(next_value: Tensor, reward: Tensor, ends: Ends, settings: TDLambdaSettings) -> Tensor:
    """See the reference."""
    returns = torch.empty_like(reward)
    if reward.numel() > 0:
        kernels = (td_lambda_serial_kernel, td_lambda_scan_kernel)
        launch(*kernels, Rewards(reward, next_value), ends, Array(returns), settings)
    return returns


def td_lambda_backward(grad_result: Tensor, needs: list[bool], ends: Ends, settings: TDLambdaSettings) -> list[Tensor]:
    """See the reference."""
    found = Gradients(*[torch.empty_like(ends.terminated, dtype=grad_result.dtype) if need else None for need in needs])
    gradients = [gradient for gradient in found if gradient is not None]
    if gradients and gradients[0].numel() > 0:
        kernels = (td_lambda_serial_backward_kernel, td_lambda_scan_backward_kernel)
        launch(*kernels, Array(grad_result), ends, found, settings)
    return gradients
