# Triton's language is not Python's: its functions take and give whatever the compiler traces.
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the library is compared with that is written in Triton: the usual ways to write these kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.baselines import stops
from efe_kernels.common.triton import launch_guard
from efe_kernels.efe_loss.reference import counted_cells, log_preference


@triton.jit
def padded_tile_kernel(
    logits_ptr,  # [B, T, CELLS, C] contiguous
    log_preference_ptr,  # [CELLS, C] contiguous
    target_ptr,  # [B, CELLS]
    loss_ptr,  # [B, T, CELLS] float32, written
    wrong_ptr,  # [B, CELLS] float32, written
    grad_ptr,  # [B, T, CELLS, C] float32 or the logits' dtype, written
    rows,
    weight_risk,
    weight_agreement,
    weight_consistency,
    T: tl.constexpr,
    CELLS: tl.constexpr,
    C: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Loss and gradient of each (episode, step, cell), before scale, upstream gradient and mean: the usual tile of
    [rows, C padded to a power of two] with reductions along the outcomes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    episode = row // (T * CELLS)
    step = (row // CELLS) % T
    cell = row % CELLS
    c = tl.arange(0, PADDED)[None, :]
    mask = ok[:, None] & (c < C)
    partner = (episode * T + T - 1 - step) * CELLS + cell
    x = tl.load(logits_ptr + row[:, None] * C + c, mask=mask, other=float("-inf")).to(tl.float32)
    y = tl.load(logits_ptr + partner[:, None] * C + c, mask=mask, other=float("-inf")).to(tl.float32)
    log_c = tl.load(log_preference_ptr + cell[:, None] * C + c, mask=mask, other=0.0)
    x = tl.where(ok[:, None], x, 0.0)
    y = tl.where(ok[:, None], y, 0.0)
    top = tl.max(x, axis=1)[:, None]
    p = tl.exp(x - top)
    total = tl.sum(p, axis=1)[:, None]
    log_p = tl.where(mask, x - top - tl.log(total), 0.0)
    p = p / total
    top = tl.max(y, axis=1)[:, None]
    r = tl.exp(y - top)
    total = tl.sum(r, axis=1)[:, None]
    log_r = tl.where(mask, y - top - tl.log(total), 0.0)
    r = r / total
    log_mean = tl.where(mask, tl.log(0.5 * (p + r)), 0.0)
    loss = weight_risk * tl.sum(p * (log_p - log_c), axis=1)
    loss += weight_agreement * 0.5 * tl.sum(p * (log_p - log_mean) + r * (log_r - log_mean), axis=1)
    f = weight_risk * (log_p - log_c) + weight_agreement * (log_p - log_mean)
    grad = p * (f - tl.sum(p * f, axis=1)[:, None])
    target = tl.load(target_ptr + episode * CELLS + cell, mask=ok, other=0)
    hit = c == target[:, None]
    last = step == T - 1
    loss -= tl.where(last, weight_consistency * T * tl.sum(tl.where(hit, log_p, 0.0), axis=1), 0.0)
    grad += tl.where(last[:, None], weight_consistency * T * (p - tl.where(hit, 1.0, 0.0)), 0.0)
    wrong = tl.where(tl.argmax(x, axis=1) != target, 1.0, 0.0)
    tl.store(loss_ptr + row, loss, mask=ok)
    tl.store(wrong_ptr + episode * CELLS + cell, wrong, mask=ok & last)
    tl.store(grad_ptr + row[:, None] * C + c, grad.to(grad_ptr.dtype.element_ty), mask=mask)


class PaddedTileLoss(torch.autograd.Function):
    """Risk, agreement with the reversed plan and consistency, hard-cell scaled; mean over episodes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, log_c: Tensor, counted: Tensor, weights: Any) -> Tensor:
        batch, steps, height, width, outcomes = logits.shape
        cells = height * width
        logits = logits.contiguous()
        loss = logits.new_empty(batch, steps, cells, dtype=torch.float32)
        wrong = logits.new_empty(batch, cells, dtype=torch.float32)
        grad = torch.empty_like(logits)
        rows = loss.numel()
        with launch_guard(logits):
            padded_tile_kernel[(triton.cdiv(rows, 64),)](
                logits, log_c.contiguous(), target, loss, wrong, grad, rows, weights.risk, weights.agreement,
                weights.consistency, T=steps, CELLS=cells, C=outcomes, PADDED=triton.next_power_of_2(outcomes), ROWS=64,
                num_warps=4,
            )  # fmt: skip
        counted = counted.flatten(1)
        number = counted.sum(1).clamp_min(1)
        scale = 0.5 + 0.5 * (wrong * counted).sum(1) / number
        share = (scale / (number * steps * batch))[:, None] * counted
        ctx.save_for_backward(grad, share.view(batch, 1, height, width, 1))
        return (loss * share[:, None]).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad, share = ctx.saved_tensors
        return (grad * (share * grad_output)).to(grad.dtype), None, None, None, None


def padded_tile_loss(inputs: dict[str, Any], weights: Any) -> tuple[Tensor]:
    log_c = log_preference(inputs["preference_logits"].float(), None)[0]
    counted = counted_cells(inputs["target"], inputs["valid"], -100)
    return (PaddedTileLoss.apply(inputs["logits"], inputs["target"], log_c, counted, weights),)


@triton.jit
def row_gae_kernel(
    reward_ptr,  # [N, T] contiguous
    value_ptr,  # [N, T] contiguous
    next_value_ptr,  # [N, T] contiguous
    terminated_ptr,  # [N, T] contiguous uint8
    stop_ptr,  # [N, T] contiguous uint8
    advantage_ptr,  # [N, T] contiguous, written
    target_ptr,  # [N, T] contiguous, written
    rows,
    steps,
    gamma,
    lam,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    carried = tl.zeros((ROWS,), tl.float32)
    for i in range(steps):
        offset = row * steps + (steps - 1 - i)
        alive = 1.0 - tl.load(terminated_ptr + offset, mask=ok, other=0).to(tl.float32)
        going_on = 1.0 - tl.load(stop_ptr + offset, mask=ok, other=0).to(tl.float32)
        value = tl.load(value_ptr + offset, mask=ok, other=0.0)
        delta = tl.load(reward_ptr + offset, mask=ok, other=0.0) - value
        delta += gamma * alive * tl.load(next_value_ptr + offset, mask=ok, other=0.0)
        carried = delta + gamma * lam * going_on * carried
        tl.store(advantage_ptr + offset, carried, mask=ok)
        tl.store(target_ptr + offset, carried + value, mask=ok)


def row_gae(inputs: dict[str, Any], gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """One thread walks one row: what reinforcement-learning libraries ship as their CUDA kernel. No gradient."""
    reward = inputs["reward"]
    rows, steps = reward.shape
    advantage, target = torch.empty_like(reward), torch.empty_like(reward)
    with launch_guard(reward):
        row_gae_kernel[(triton.cdiv(rows, 64),)](
            reward, inputs["value"], inputs["next_value"], inputs["terminated"].view(torch.uint8),
            stops(inputs).view(torch.uint8), advantage, target, rows, steps, gamma, lam, ROWS=64, num_warps=2,
        )  # fmt: skip
    return advantage, target
