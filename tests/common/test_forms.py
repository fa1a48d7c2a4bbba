"""Every public function takes inputs and upstream gradients by their values, in whatever form autograd has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.common.forms import FORMS, as_memory
from tests.gpu.ops import OPS, leaves_of, step, upstream_of


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """To the rounding of sums in another order: other strides may be walked in another one."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("name", OPS)
def test_an_upstream_gradient_is_taken_by_its_values(name: str, form: Callable[[Tensor], Tensor], device: str) -> None:
    op = OPS[name]
    inputs = op.make(device)
    if not leaves_of(inputs):
        pytest.skip("has no gradient")
    with torch.no_grad():
        upstream = [form(gradient) for gradient in upstream_of(op.run(**inputs))]
    assert_same(step(op, inputs, upstream), step(op, inputs, [as_memory(gradient) for gradient in upstream]))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("name", OPS)
def test_an_input_is_taken_by_its_values(name: str, form: Callable[[Tensor], Tensor], device: str) -> None:
    """One input after the other, each a view of what requires its gradient."""
    op = OPS[name]
    plain = op.make(device)
    for argument, value in plain.items():
        if value.is_floating_point():
            formed = form(value)
            expected = step(op, {**plain, argument: as_memory(formed).requires_grad_(formed.requires_grad)})
            assert_same(step(op, {**plain, argument: formed}), expected)
