"""`masked_mean_pool` on whatever serves the device: C++ on the CPU, CUDA on the GPU, else the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efe_kernels import masked_mean_pool
from efe_kernels.prompt import reference
from tests.prompt.close import assert_close

# Of the largest value. float32: a sum of up to 300 addends of about 1, each addition rounded at 2^-24 of the running
# sum, which is up to ten times the mean. The others: one rounding of such a sum, at most 2^-11 and 2^-8 of the value.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPES = [(1, 1, 1), (3, 7, 13), (33, 5, 8), (2, 200, 264), (2, 3, 1030), (1, 300, 24)]


def contiguous(rows: int, length: int, width: int, **options: Any) -> Tensor:
    return torch.randn(rows, length, width, **options)


def transposed(rows: int, length: int, width: int, **options: Any) -> Tensor:
    return torch.randn(length, rows, width, **options).transpose(0, 1)


def columns_first(rows: int, length: int, width: int, **options: Any) -> Tensor:
    return torch.randn(rows, width, length, **options).transpose(1, 2)


def unaligned(rows: int, length: int, width: int, **options: Any) -> Tensor:
    return torch.randn(rows, length, width + 1, **options)[..., 1:]


def every_second(rows: int, length: int, width: int, **options: Any) -> Tensor:
    return torch.randn(rows, length, 2 * width, **options)[..., ::2]


def expanded(rows: int, length: int, width: int, **options: Any) -> Tensor:
    return torch.randn(1, length, width, **options).expand(rows, length, width)


LAYOUTS = [contiguous, transposed, columns_first, unaligned, every_second, expanded]


def ragged_mask(rows: int, length: int) -> Tensor:
    """Left-padded, with a hole; the first row of several has no token."""
    mask = torch.arange(length) >= torch.randint(0, length, (rows, 1))
    mask[:, length // 2] = False
    if rows > 1:
        mask[0] = False
    return mask


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference_in_double(
    layout: Callable[..., Tensor], shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    rows, length, width = shape
    hidden = layout(*shape, dtype=dtype, device=device).requires_grad_()
    mask = ragged_mask(rows, length)
    upstream = torch.randn(rows, width, dtype=torch.float64).to(dtype)
    pooled = masked_mean_pool(hidden, mask.to(device))
    (gradient,) = torch.autograd.grad(pooled, hidden, upstream.to(device))

    exact = hidden.detach().cpu().double().requires_grad_()
    expected = reference.masked_mean_pool(exact, mask)
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    assert pooled.dtype == gradient.dtype == dtype
    assert_close("pooled", pooled.detach(), expected.detach(), TOLERANCE[dtype], scale=0.1)
    assert_close("gradient", gradient, expected_gradient, TOLERANCE[dtype])


# The last one's gradient is larger than 32 MiB, for which the CPU kernel asks for huge pages, and ends inside of one.
@pytest.mark.parametrize(
    "shape", [(1, 8192, 16), (1, 3, 8192), (2, 0, 5), (0, 4, 5), (2, 4, 0), (9, 1024, 1001)], ids=str
)
def test_long_and_empty_dimensions(shape: tuple[int, int, int], device: str) -> None:
    hidden = torch.randn(shape, device=device, requires_grad=True)
    mask = torch.rand(shape[:2], device=device) < 0.5
    pooled = masked_mean_pool(hidden, mask)
    upstream = torch.randn_like(pooled)
    (gradient,) = torch.autograd.grad(pooled, hidden, upstream)
    expected = reference.masked_mean_pool(hidden.detach().double(), mask)
    assert_close("pooled", pooled.detach(), expected, 1e-5, scale=0.1)
    scale = reference.reciprocal_count(mask, torch.float64)
    expected_gradient = reference.masked_mean_pool_backward(upstream.double(), mask, scale)
    assert_close("gradient", gradient, expected_gradient, TOLERANCE[torch.float32])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_masked_is_not_read_and_gets_exactly_no_gradient(poison: float, device: str) -> None:
    hidden = torch.randn(3, 9, 40, device=device)
    mask = ragged_mask(3, 9).to(device)
    clean = masked_mean_pool(hidden, mask)
    poisoned = hidden.masked_fill(~mask[..., None], poison).requires_grad_()
    pooled = masked_mean_pool(poisoned, mask)
    assert torch.equal(pooled, clean)
    assert torch.equal(pooled[0], torch.zeros_like(pooled[0]))
    pooled.square().sum().backward()
    assert poisoned.grad is not None
    assert torch.equal(poisoned.grad[~mask], torch.zeros_like(poisoned.grad[~mask]))
    assert poisoned.grad[mask].isfinite().all()
    assert poisoned.grad[mask].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_mask_of_any_dtype_counts_what_is_not_zero(dtype: torch.dtype, device: str) -> None:
    hidden = torch.randn(3, 9, 5, device=device)
    mask = ragged_mask(3, 9).to(device)
    assert torch.equal(masked_mean_pool(hidden, (mask * 3).to(dtype)), masked_mean_pool(hidden, mask))


def test_strided_mask_and_expanded_upstream(device: str) -> None:
    hidden = torch.randn(4, 6, 5, device=device, requires_grad=True)
    mask = (torch.rand(6, 4, device=device) < 0.6).t()
    pooled = masked_mean_pool(hidden, mask)
    expected = masked_mean_pool(hidden, mask.contiguous())
    assert_close("pooled", pooled.detach(), expected.detach(), 1e-6)
    (dense,) = torch.autograd.grad(expected, hidden, torch.ones_like(pooled))
    (from_expanded,) = torch.autograd.grad(pooled.sum(), hidden)
    assert_close("gradient", from_expanded, dense, 1e-6)


def test_unbatched_is_one_row(device: str) -> None:
    hidden, mask = torch.randn(2, 7, 12, device=device), ragged_mask(2, 7).to(device)
    assert torch.equal(masked_mean_pool(hidden[1], mask[1]), masked_mean_pool(hidden, mask)[1])


def test_two_runs_give_the_same_bits_and_leave_the_arguments_alone(device: str) -> None:
    hidden, mask = torch.randn(3, 150, 520, device=device, requires_grad=True), ragged_mask(3, 150).to(device)
    before = hidden.detach().clone(), mask.clone()

    def run() -> tuple[Tensor, Tensor]:
        pooled = masked_mean_pool(hidden, mask)
        return pooled.detach(), torch.autograd.grad(pooled.square().sum(), hidden)[0]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(hidden, before[0]) and torch.equal(mask, before[1])


def test_gradcheck(device: str) -> None:
    hidden = torch.randn(3, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    mask = ragged_mask(3, 5).to(device)
    assert torch.autograd.gradcheck(lambda h: masked_mean_pool(h, mask), hidden)


def test_written_out_reference_gradient(device: str) -> None:
    hidden = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = ragged_mask(3, 5)
    upstream = torch.randn(3, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(reference.masked_mean_pool(hidden, mask), hidden, upstream)
    written = reference.masked_mean_pool_backward(upstream, mask, reference.reciprocal_count(mask, torch.float64))
    assert_close("gradient", written, expected, 1e-15)


def test_second_derivative_is_a_clear_error(device: str) -> None:
    hidden = torch.randn(2, 3, 4, device=device, requires_grad=True)
    pooled = masked_mean_pool(hidden, torch.ones(2, 3, dtype=torch.bool, device=device))
    (gradient,) = torch.autograd.grad(pooled.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_mean_pool has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor, it was list"),
        ({"hidden": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "hidden must be float32"),
        ({"hidden": torch.zeros(2, 3, 4, 5)}, ValueError, r"hidden must have the shape \[N, L, E\]"),
        ({"hidden": torch.zeros(3)}, ValueError, "hidden must have the shape"),
        ({"mask": None}, TypeError, "mask must be a tensor, it was NoneType"),
        ({"mask": torch.ones(3, 2)}, ValueError, r"mask must have the shape \[N, L\] = \[2, 3\], it was \[3, 2\]"),
        ({"mask": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "mask must be bool, integer or floating"),
        ({"mask": torch.ones(2, 3, device="meta")}, ValueError, "mask must be on the device of hidden"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"hidden": torch.zeros(2, 3, 4), "mask": torch.ones(2, 3)} | change
    with pytest.raises(error, match=message):
        masked_mean_pool(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    hidden, mask = torch.randn(3, 5, 16, device=device).to(dtype), ragged_mask(3, 5).to(device)
    torch.library.opcheck(torch.ops.efe.masked_mean_pool_forward.default, (hidden, mask))
    _, scale = torch.ops.efe.masked_mean_pool_forward(hidden, mask)
    grad = torch.randn(3, 16, device=device).to(dtype)
    torch.library.opcheck(torch.ops.efe.masked_mean_pool_backward.default, (grad, mask, scale))
