"""Every public function takes inputs and upstream gradients by their values, in whatever form autograd has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.check import everything, upstream_of
from bench.ops import EXAMPLES, OPS, example
from tests.common.forms import FORMS, as_memory


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """To the rounding of sums in another order: other strides may be walked in another one."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_upstream_gradient_is_taken_by_its_values(name: str, form: Callable[[Tensor], Tensor], device: str) -> None:
    run, inputs = example(name, device)
    if "both" not in OPS[EXAMPLES[name].case.op].passes:
        pytest.skip("has no gradient")
    with torch.no_grad():
        upstream = [form(gradient) for gradient in upstream_of(run(inputs))]
    plain = [as_memory(gradient) for gradient in upstream]
    assert_same(everything(run, inputs, upstream), everything(run, inputs, plain))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_input_is_taken_by_its_values(name: str, form: Callable[[Tensor], Tensor], device: str) -> None:
    """One input after the other, each a view of what requires its gradient."""
    run, plain = example(name, device)
    for argument, value in plain.items():
        if value is not None and value.is_floating_point():
            formed = form(value)
            expected = everything(run, {**plain, argument: as_memory(formed).requires_grad_(formed.requires_grad)})
            assert_same(everything(run, {**plain, argument: formed}), expected)
