"""What computes the right thing: results and gradients of the implementations of a case against the reference in
float64, and the calls that are timed."""

from __future__ import annotations

import copy
import gc
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import DEVICE, Call
from bench.ops import OPS, passes_of, problem
from bench.ops.entry import FORWARD, UPSTREAM, Case, Implementation, Inputs, Problem, leaves_of

# Above this many elements the reference in float64 would not fit beside its own intermediates.
LARGEST_IN_DOUBLE = 1 << 26


@lru_cache(maxsize=1)
def problem_of(case: Case) -> Problem:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return problem(case, DEVICE)


@lru_cache(maxsize=1)
def expected_of(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of the reference in float64."""
    given = problem_of(case)
    inputs = given.inputs
    if sum(leaf.numel() for leaf in given.leaves.values()) <= LARGEST_IN_DOUBLE:
        inputs = {name: in_double(value) for name, value in inputs.items()}
    return outcome(given.reference, inputs)


def in_double(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def outcome(
    implementation: Implementation, inputs: Inputs, gradients: bool = True, upstream: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients."""
    results = implementation(inputs)
    leaves = list(leaves_of(inputs).values()) if gradients else []
    if not leaves:
        return [result.detach() for result in results], []
    found = torch.autograd.grad(results, leaves, upstream_of(results) if upstream is None else upstream)
    return [result.detach() for result in results], [*found]


def everything(implementation: Implementation, inputs: Inputs, upstream: list[Tensor] | None = None) -> list[Tensor]:
    """Results and gradients, one after the other."""
    results, gradients = outcome(implementation, inputs, upstream=upstream)
    return [*results, *gradients]


def upstream_of(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients that differ from element to element, because whitening passes no constant on; exact in every dtype."""
    return [
        torch.full_like(result, UPSTREAM)
        if result.dim() == 0
        else (1 + torch.arange(result.numel(), device=result.device) % 8 / 8).view(result.shape).to(result.dtype)
        for result in results
    ]


def runnable(case: Case, given: Problem, name: str) -> Implementation:
    implementation = given.implementations[name]
    if name not in OPS[case.op].peers or not OPS[case.op].peers[name].compiled:
        return implementation
    torch._dynamo.reset()
    return torch.compile(lambda inputs: implementation(inputs), dynamic=False, fullgraph=True)


@lru_cache(maxsize=1)
def implementation_of(case: Case, name: str) -> Implementation:
    """Ready to run; fails where its results or gradients are wrong."""
    implementation = runnable(case, problem_of(case), name)
    check(case, name, implementation)
    return implementation


def check(case: Case, name: str, implementation: Implementation) -> None:
    results, gradients = outcome(implementation, problem_of(case).inputs, passes_of(case, name) != FORWARD)
    expected_results, expected_gradients = expected_of(case)
    tolerance = OPS[case.op].tolerance[case.dtype]
    pairs = [("result", pair) for pair in zip(results, expected_results, strict=True)]
    pairs += [("gradient", pair) for pair in zip(gradients, expected_gradients, strict=bool(gradients))]
    for kind, (value, expected) in pairs:
        error = relative_error(value, expected)
        assert error <= tolerance, f"{name}: a {kind} of {case.name} is off by {error:.1e}"


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def prepared(implementation: Implementation, given: Problem, which: str) -> Any:
    """A setup that returns the call to be timed."""
    inputs, leaves = given.inputs, list(given.leaves.values())

    def forward() -> object:
        with torch.no_grad():
            return implementation(inputs)

    if which == "forward":
        return lambda: forward
    upstream = upstream_of(implementation(inputs))

    def backward(results: tuple[Tensor, ...]) -> object:
        return torch.autograd.grad(results, leaves, upstream)

    def both() -> object:
        return backward(implementation(inputs))

    if which == "both":
        return lambda: both

    def setup() -> Call:
        results = implementation(inputs)
        return lambda: backward(results)

    return setup


def least_bytes(given: Problem, results: tuple[Tensor, ...], which: str) -> int:
    """What must cross the memory bus: inputs once, results once, gradients once."""
    result_bytes = sum(result.numel() * result.element_size() for result in results)
    gradient_bytes = sum(leaf.numel() * leaf.element_size() for leaf in given.leaves.values())
    if which == "forward":
        return given.forward_reads + result_bytes
    reads = given.backward_reads if which == "backward" else given.forward_reads
    return reads + result_bytes + gradient_bytes
