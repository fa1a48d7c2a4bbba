"""Every op writes all of its results for sizes of 0, too. What torch.empty gives holds NaN here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import efe_kernels
from bench.ops import EXAMPLES, example
from bench.ops.entry import leaves_of


@pytest.fixture(autouse=True)
def _uninitialised_memory_holds_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def without_elements(inputs: dict[str, Any], shared: tuple[str, ...]) -> dict[str, Any]:
    """The first dimension of every input cut to 0, but for those that belong to no episode."""
    return {
        name: value if value is None or name in shared else value.detach()[:0].requires_grad_(value.requires_grad)
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_batch_of_nothing(name: str, device: str) -> None:
    """Gradients of what all episodes share are 0."""
    run, inputs = example(name, device)
    inputs = without_elements(inputs, ("preference_logits", "projection", "target_preference"))
    results = run(inputs)
    per_row = [result for result in results if result.dim()]
    assert all(result.numel() == 0 for result in per_row)
    leaves = list(leaves_of(inputs).values())
    if per_row and leaves:
        gradients = torch.autograd.grad(per_row, leaves, [torch.ones_like(result) for result in per_row])
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (3, 700, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pooling_nothing(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Rows, tokens or columns may be missing: what remains is right, the scale of each row included."""
    hidden, mask = torch.ones(shape, dtype=dtype, device=device), torch.ones(shape[:2], dtype=torch.bool, device=device)
    pooled, scale = torch.ops.efe.masked_mean_pool_forward(hidden, mask)
    assert torch.equal(pooled, torch.full_like(pooled, 1.0 if shape[1] else 0.0))
    assert torch.equal(scale, torch.full_like(scale, 1 / shape[1] if shape[1] else 0.0))
    gradient = torch.ops.efe.masked_mean_pool_backward(torch.ones_like(pooled), mask, scale)
    assert gradient.shape == shape and gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (0, 7), (7, 0)])
def test_trajectories_of_nothing(shape: tuple[int, ...], device: str) -> None:
    x = torch.ones(shape, device=device).requires_grad_()
    for result in efe_kernels.gae(x, x, x, x > 0, x > 0):
        (gradient,) = torch.autograd.grad(result, x, torch.ones_like(result), retain_graph=True)
        assert result.shape == gradient.shape == shape


@pytest.mark.parametrize("whiten", [False, True])
def test_rl_advantage_of_nothing(whiten: bool, device: str) -> None:
    x = torch.ones(0, 8, device=device).requires_grad_()
    advantage = efe_kernels.rl_advantage(x, x, whiten=whiten, group_size=8 if whiten else None)
    (gradient,) = torch.autograd.grad(advantage, x, torch.ones_like(advantage))
    assert advantage.shape == gradient.shape == (0, 8)


@pytest.mark.parametrize("masked", [False, True])
def test_a_policy_loss_of_nothing_is_zero(masked: bool, device: str) -> None:
    def tensors() -> dict[str, Tensor]:
        names = ("log_prob", "advantage", "value", "value_target", "entropy", "old_log_prob")
        return {name: torch.ones(0, device=device).requires_grad_() for name in names}

    mask = torch.ones(0, dtype=torch.bool, device=device) if masked else None
    assert all(result == 0 for result in efe_kernels.policy_gradient_loss(**tensors(), mask=mask))
