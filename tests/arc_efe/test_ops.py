"""The op of the terms that look at every cell of the plan, without the module around it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from efe_kernels.arc_efe import reference
from efe_kernels.arc_efe.ops import arc_efe
from efe_kernels.arc_efe.reference import PlanTerms
from efe_kernels.common.library import INTERPRET

# Sums of float32 values that are good to a few units in the last place, 2^-24 of the largest, and are added in double.
# Where all of it cancels, what is left is that 1 + 1e-8 is 1 in float32.
TOLERANCE, LEFT = 64 * 2**-24, 1e-7
SHAPES = [(1, 1, 1, 1), (2, 2, 7, 3), (5, 3, 3, 10), (4, 12, 11, 10), (3, 5, 31, 17), (2, 9, 8, 33)]
UPSTREAM = ("risk", "bidirectional", "ambiguity", "reversal", "mean_logits")
DIFFERENTIABLE = tuple(PlanTerms._fields.index(name) for name in UPSTREAM)
WRT = (0, 1, 2, 3, 4)


def inputs_of(shape: tuple[int, ...], masked: bool, device: str = "cpu") -> list[Any]:
    """The op's tensors in float32: few logits, so that colours meet, and a mask with a weight in it."""
    _, height, width, outcomes = shape
    plans = [torch.randint(-3, 4, shape) * 1.5 + 0.1 * torch.rand(shape) for _ in range(3)]
    observation = (3 * torch.randn(shape)).softmax(-1)
    preference = torch.rand(outcomes, height, width)
    mask = torch.randint(3, (height, width)).float() / 2 if masked else None
    return [None if tensor is None else tensor.to(device) for tensor in (*plans, observation, preference, mask)]


def assert_close(name: str, found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    error = (found.double() - expected).abs().max().item()
    assert error <= TOLERANCE * scale + LEFT, f"{name}: off by {error:.3g} where the largest is {scale:.3g}"


@pytest.mark.parametrize("masked", [False, True], ids=["all cells", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_compute_the_reference(shape: tuple[int, ...], masked: bool, device: str) -> None:
    inputs = inputs_of(shape, masked, device)
    wide = [None if tensor is None else tensor.double() for tensor in inputs]
    found = PlanTerms(*arc_efe.forward(*inputs))
    expected = reference.arc_efe_forward(*wide)
    for name, value in expected._asdict().items():
        assert_close(name, getattr(found, name), value)
    upstream = [torch.randn_like(getattr(expected, name)) for name in UPSTREAM]
    narrow = [grad.to(getattr(found, name).dtype) for name, grad in zip(UPSTREAM, upstream, strict=True)]
    upstream = [grad.double() for grad in narrow]
    for only in (None, *range(len(UPSTREAM))):
        given, wanted = (
            [grad if only in (None, place) else None for place, grad in enumerate(gradients)]
            for gradients in (narrow, upstream)
        )
        gradients = arc_efe.backward(*given, [True] * 5, *inputs, found.turned)
        exact = reference.arc_efe_backward(*wanted, [True] * 5, *wide, expected.turned)
        for place in WRT:
            assert_close(f"gradient {place} of {only}", gradients[place], exact[place])


@pytest.mark.parametrize("place", WRT)
def test_each_gradient_alone_is_that_among_all(place: int, device: str) -> None:
    inputs = inputs_of((3, 5, 4, 10), True, device)
    found = arc_efe.forward(*inputs)
    upstream = [torch.ones_like(found[i]) for i in DIFFERENTIABLE]
    everything = arc_efe.backward(*upstream, [True] * 5, *inputs, found[-1])
    (alone,) = arc_efe.backward(*upstream, [other == place for other in WRT], *inputs, found[-1])
    assert torch.equal(alone, everything[place])


def test_any_memory_order_gives_the_same_bits(device: str) -> None:
    inputs = inputs_of((3, 5, 4, 10), True, device)
    scattered = [tensor.movedim(-1, 0).contiguous().movedim(0, -1) for tensor in inputs]
    found, same = (arc_efe.forward(*tensors) for tensors in (inputs, scattered))
    assert all(torch.equal(one, other) for one, other in zip(found, same, strict=True))
    upstream = [torch.ones_like(found[i]) for i in DIFFERENTIABLE]
    gradients, same = (arc_efe.backward(*upstream, [True] * 5, *tensors, found[-1]) for tensors in (inputs, scattered))
    assert all(torch.equal(one, other) and other.is_contiguous() for one, other in zip(gradients, same, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.usefixtures("served_by")
def test_what_is_not_finite_counts_unless_it_is_masked(value: float, device: str) -> None:
    forward, backward, state, observation, preference, _ = inputs_of((3, 5, 4, 10), False, device)
    mask = torch.ones(5, 4, device=device)
    clean = arc_efe.forward(forward, backward, state, observation, preference, mask)
    broken = forward.clone()
    broken[1, 2, 1] = value  # all of the cell: a softmax of nothing else is NaN
    found = PlanTerms(*arc_efe.forward(broken, backward, state, observation, preference, mask))
    assert all(getattr(found, name).isnan() for name in ("risk", "bidirectional", "reversal"))
    assert torch.equal(found.ambiguity, clean[2])
    assert found.certainty.isnan().nonzero().tolist() == [[2, 1]]
    mask[2, 1] = 0
    results = [arc_efe.forward(plan, backward, state, observation, preference, mask) for plan in (forward, broken)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_number_that_is_none_is_an_observation_of_none(device: str) -> None:
    inputs = inputs_of((2, 3, 4, 5), False, device)
    inputs[3][0, 1, 2, 3] = float("nan")
    found = PlanTerms(*arc_efe.forward(*inputs))
    assert found.ambiguity.isnan()
    assert found.risk.isfinite()


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_probabilities_are_as_certain_as_each(dtype: torch.dtype, device: str) -> None:
    """Whatever the number of steps, so that a threshold that they meet is met."""
    for steps, outcomes in ((3, 7), (8, 10), (30, 10)):
        plan = torch.zeros(steps, 2, 3, outcomes, dtype=dtype, device=device)
        found = PlanTerms(*arc_efe.forward(plan, plan, plan, plan, plan[0].movedim(-1, 0), None))
        assert torch.equal(found.certainty, torch.ones_like(found.certainty) / outcomes)


@pytest.mark.skipif(not INTERPRET, reason="who serves is asked of the Triton kernels in the interpreter")
def test_triton_serves_plans_in_float32_whatever_else_is_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("efe_kernels.arc_efe.kernels")
    launch, launched = kernels.launch, []

    def recorded(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(kernels, "launch", recorded)
    forward, backward, state, *rest = inputs_of((2, 3, 4, 5), False)
    inputs = (forward, backward, state.double(), *rest)
    found = arc_efe.forward(*inputs)
    arc_efe.backward(*[torch.ones_like(found[i]) for i in DIFFERENTIABLE], [True] * 5, *inputs, found[-1])
    assert launched == [kernels.arc_efe_forward_kernel, kernels.arc_efe_sum_kernel, kernels.arc_efe_backward_kernel]


@pytest.mark.skipif(INTERPRET, reason="Triton's interpreter reads tensors that opcheck replaces by fake ones")
@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("masked", [False, True], ids=["all cells", "masked"])
@pytest.mark.parametrize("outcomes", [1, 10])
def test_ops_are_declared_truthfully(outcomes: int, masked: bool, device: str) -> None:
    inputs = inputs_of((3, 5, 4, outcomes), masked, device)
    torch.library.opcheck(arc_efe.forward.default, tuple(inputs))
    found = arc_efe.forward(*inputs)
    for needs in ([True] * 5, [False, True, True, False, False]):
        upstream = [None if i == 1 else torch.ones_like(found[i]) for i in DIFFERENTIABLE]
        torch.library.opcheck(arc_efe.backward.default, (*upstream, needs, *inputs, found[-1]))
