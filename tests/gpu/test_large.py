"""Tensors of more than 2^31 elements: an offset in 32 bits would wrap around."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import efe_kernels

pytestmark = pytest.mark.slow


def need_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes:g} GB of free GPU memory")


@pytest.mark.parametrize("channel_first", [True, False], ids=["channel-first", "channel-last"])
def test_efe_loss_of_more_than_2_31_elements(channel_first: bool) -> None:
    """The last episodes, which lie beyond element 2^31, equal a small batch of the same episodes."""
    need_memory(14)
    batch, steps, side, outcomes = 48_000, 5, 30, 10
    shape = (batch, steps, outcomes, side, side) if channel_first else (batch, steps, side, side, outcomes)
    stored = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    logits = stored.movedim(2, -1) if channel_first else stored
    assert logits.numel() > 2**31
    target = torch.randint(0, outcomes, (batch, side, side), device="cuda", dtype=torch.uint8)
    preference = torch.randn(side, side, outcomes, device="cuda")

    def totals_and_gradient(rows: slice) -> tuple[Tensor, Tensor]:
        plan = logits[rows].detach().requires_grad_()
        total = efe_kernels.efe_loss(plan, target[rows], preference, reduction="none").total
        (gradient,) = torch.autograd.grad(total.sum(), plan)
        return total.detach(), gradient

    total, gradient = totals_and_gradient(slice(None))
    for rows in (slice(0, 3), slice(batch // 2, batch // 2 + 3), slice(batch - 3, batch)):
        expected_total, expected_gradient = totals_and_gradient(rows)
        # The number of episodes is known to the compiler, so the last bit may differ.
        torch.testing.assert_close(total[rows], expected_total)
        torch.testing.assert_close(gradient[rows], expected_gradient)


def test_masked_mean_pool_of_more_than_2_31_elements() -> None:
    need_memory(10)
    rows, length, width = 4200, 512, 1024
    hidden = torch.randn(rows, length, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert hidden.numel() > 2**31
    mask = torch.rand(rows, length, device="cuda") < 0.5
    pooled = efe_kernels.masked_mean_pool(hidden, mask)
    (gradient,) = torch.autograd.grad(pooled, hidden, torch.ones_like(pooled))
    tail = hidden[-2:].detach().requires_grad_()
    expected = efe_kernels.masked_mean_pool(tail, mask[-2:])
    (expected_gradient,) = torch.autograd.grad(expected, tail, torch.ones_like(expected))
    assert torch.equal(pooled[-2:], expected)
    assert torch.equal(gradient[-2:], expected_gradient)


def test_gae_of_more_than_2_31_elements() -> None:
    need_memory(45)
    rows, steps = 2**31 // 64 + 5, 64
    reward, value, next_value = (torch.randn(rows, steps, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    terminated = torch.zeros(rows, steps, device="cuda", dtype=torch.bool)
    advantage, target = efe_kernels.gae(reward, value, next_value, terminated)
    tail = (tensor[-3:].contiguous() for tensor in (reward, value, next_value, terminated))
    expected_advantage, expected_target = efe_kernels.gae(*tail)
    assert torch.equal(advantage[-3:], expected_advantage)
    assert torch.equal(target[-3:], expected_target)
