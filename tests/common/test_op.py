"""What a declaration of a differentiable op gives, on a small one of the tests' own."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from efe_kernels.common import library
from efe_kernels.common.op import DifferentiableOp, differentiable_op
from tests.served_by import recorded_calls


class Factors(NamedTuple):
    x: Tensor
    y: Tensor | None


class Results(NamedTuple):
    product: Tensor
    shifted: Tensor
    count: Tensor


def multiply(factors: Factors, offset: Tensor, scale: float) -> Results:
    """product = scale · x · y, shifted = x + offset, and the number of elements."""
    x, y = factors
    product = scale * x * (1 if y is None else y)
    return Results(product, x + offset, torch.full((), x.numel()))


def multiply_backward(
    grad_product: Tensor | None, needs: list[bool], factors: Factors, scale: float, count: Tensor
) -> list[Tensor]:
    """Of x, through the product alone, and y."""
    x, y = factors
    grad = torch.zeros_like(x) if grad_product is None else grad_product * scale
    found = (grad if y is None else grad * y, grad * x)
    return [gradient.clone() for gradient, need in zip(found, needs, strict=True) if need]


def multiply_fake(factors: Factors, *_: object) -> Results:
    x = factors.x
    return Results(torch.empty_like(x), torch.empty_like(x), x.new_empty((), dtype=torch.int64))


@pytest.fixture(scope="module")
def op() -> DifferentiableOp:
    found = differentiable_op(
        "test_multiply",
        forward=multiply,
        backward=multiply_backward,
        wrt=("x", "y", "offset"),
        passes={"offset": "shifted"},
        fake=multiply_fake_of_fields,
    )
    for name in ("test_multiply_forward", "test_multiply_backward"):
        del library.OPS[name]  # of the tests, not of the library
    return found


def multiply_fake_of_fields(factors: Factors, offset: Tensor, scale: float) -> Results:
    return multiply_fake(factors)


def leaves(count: int = 3) -> list[Tensor]:
    return [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def test_the_schemas_are_those_of_the_references(op: DifferentiableOp) -> None:
    assert str(op.forward.default._schema) == (
        "efe::test_multiply_forward(Tensor x, Tensor? y, Tensor offset, float scale) "
        "-> (Tensor product, Tensor shifted, Tensor count)"
    )
    assert str(op.backward.default._schema) == (
        "efe::test_multiply_backward(Tensor? grad_product, bool[] needs, Tensor x, Tensor? y, float scale, "
        "Tensor count) -> Tensor[]"
    )


def test_every_gradient_is_wired_to_its_argument(op: DifferentiableOp) -> None:
    x, y, offset = leaves()
    product, shifted, _ = op(x, y, offset, 3.0)
    upstream = torch.randn(2, 4, dtype=torch.float64)
    gradients = torch.autograd.grad((product, shifted), (x, y, offset), tuple(upstream))
    for found, wanted in zip(gradients, (3 * upstream[0] * y, 3 * upstream[0] * x, upstream[1]), strict=True):
        torch.testing.assert_close(found, wanted)


def test_only_what_is_needed_is_asked_for(op: DifferentiableOp) -> None:
    x, y, offset = leaves()
    library.OPS["test_multiply_backward"] = library.Served(library.with_groups(multiply_backward), None)
    try:
        with recorded_calls("test_multiply_backward", "cpu") as calls:
            op(x, y.detach(), offset, 3.0)[0].sum().backward()
            op(x.detach(), y.detach(), offset, 3.0)[1].sum().backward()
            op(x, y, offset, 3.0)[0].detach()
    finally:
        del library.OPS["test_multiply_backward"]
    assert [call[1] for call in calls] == [[True, False]]


def test_a_result_without_a_gradient_has_none(op: DifferentiableOp) -> None:
    assert not op(*leaves(), 1.0)[2].requires_grad


def test_absent_arguments_stay_absent(op: DifferentiableOp) -> None:
    x, offset = leaves(2)
    product, *_ = op(x, None, offset, 2.0)
    (gradient,) = torch.autograd.grad(product.sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 2.0))


def test_a_second_derivative_and_forward_mode_are_refused(op: DifferentiableOp) -> None:
    x, y, offset = leaves()
    (gradient,) = torch.autograd.grad(op(x, y, offset, 1.0)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="test_multiply has no second derivative"):
        gradient.sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        op(dual, y, offset, 1.0)


def test_transforms_see_through_the_reference(op: DifferentiableOp) -> None:
    x, y, offset = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    products = torch.func.vmap(lambda *given: op(*given, 2.0)[0])(x, y, offset)
    torch.testing.assert_close(products, 2 * x * y)
    hessian = torch.func.hessian(lambda x: op(x, y[0], offset[0], 2.0)[0].square().sum())(x[0])
    torch.testing.assert_close(hessian, torch.diag(8 * y[0] ** 2))


def test_compiles_without_a_graph_break(op: DifferentiableOp) -> None:
    x, y, offset = leaves()
    compiled = torch.compile(lambda *given: op(*given, 2.0)[0].sum(), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x, y, offset), x)
    torch.testing.assert_close(gradient, 2 * y)
    (twice,) = torch.autograd.grad(compiled(x, x, offset), x)
    torch.testing.assert_close(twice, 4 * x)
