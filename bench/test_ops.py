"""Every case of `bench.cases`, every implementation, every pass. What does not compute the right thing is not timed."""

from __future__ import annotations

import copy
import gc
import importlib.util
import time
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.cases import CASES, NEED_GPU, UPSTREAM, Case, Implementation, Inputs, Problem, leaves_of
from bench.measure import (
    DEVICE,
    Call,
    Quantiles,
    copy_bandwidth,
    device_times,
    graph_times,
    host_seconds,
    peak_bytes,
    rounds_for,
)

# Relative error in norm against float64: the arithmetic is float32, a result or gradient is rounded once to its dtype
# (2^-9 in bf16, 2^-12 in fp16), and fp16 gradients far below the largest are subnormal.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
# Above this many elements the reference in float64 would not fit beside its own intermediates.
LARGEST_IN_DOUBLE = 1 << 26
# Batches up to this one are also timed from a CUDA graph.
SMALL = 64
# Calls longer than this (in seconds) are loops of so many ops that a profile of their memory takes minutes.
SLOW = 0.2
MODULES = {"Liger": "liger_kernel", "torchrl": "torchrl"}


def parameters() -> list[Any]:
    found = []
    for case in CASES:
        for implementation in ("kernel", *case.opponents):
            if DEVICE == "cpu" and (case.gpu_only or implementation in NEED_GPU):
                continue
            for which in case.passes(implementation):
                found.append(pytest.param(case, implementation, which, id=f"{case.name}-{implementation}-{which}"))
    return found


@lru_cache(maxsize=1)
def problem_of(case: Case) -> Problem:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return case.problem(DEVICE)


@lru_cache(maxsize=1)
def expected_of(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of the reference in float64."""
    problem = problem_of(case)
    inputs = problem.inputs
    if sum(leaf.numel() for leaf in problem.leaves.values()) <= LARGEST_IN_DOUBLE:
        inputs = {name: in_double(value) for name, value in inputs.items()}
    return outcome(problem.reference, inputs)


def in_double(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def outcome(
    implementation: Implementation, inputs: Inputs, gradients: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    results = implementation(inputs)
    leaves = list(leaves_of(inputs).values()) if gradients else []
    found = torch.autograd.grad(results, leaves, upstream_of(results)) if leaves else ()
    return [result.detach() for result in results], [*found]


def upstream_of(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients that differ from element to element, because whitening passes no constant on; exact in every dtype."""
    return [
        torch.full_like(result, UPSTREAM)
        if result.dim() == 0
        else (1 + torch.arange(result.numel(), device=result.device) % 8 / 8).view(result.shape).to(result.dtype)
        for result in results
    ]


def runnable(problem: Problem, name: str) -> Implementation:
    if name != "compile":
        return problem.implementations[name]
    torch._dynamo.reset()
    return torch.compile(problem.implementations["eager"], dynamic=False, fullgraph=True)


@lru_cache(maxsize=1)
def implementation_of(case: Case, name: str) -> Implementation:
    """Ready to run; fails where its results or gradients are wrong."""
    implementation = runnable(problem_of(case), name)
    check(case, name, implementation)
    return implementation


def check(case: Case, name: str, implementation: Implementation) -> None:
    results, gradients = outcome(implementation, problem_of(case).inputs, case.passes(name) != ("forward",))
    expected_results, expected_gradients = expected_of(case)
    pairs = [("result", pair) for pair in zip(results, expected_results, strict=True)]
    pairs += [("gradient", pair) for pair in zip(gradients, expected_gradients, strict=bool(gradients))]
    for kind, (value, expected) in pairs:
        error = relative_error(value, expected)
        assert error <= TOLERANCE[case.dtype], f"{name}: a {kind} of {case.name} is off by {error:.1e}"


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def prepared(implementation: Implementation, problem: Problem, which: str) -> Any:
    """A setup that returns the call to be timed."""
    inputs, leaves = problem.inputs, list(problem.leaves.values())

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


def least_bytes(problem: Problem, results: tuple[Tensor, ...], which: str) -> int:
    """What must cross the memory bus: inputs once, results once, gradients once."""
    result_bytes = sum(result.numel() * result.element_size() for result in results)
    gradient_bytes = sum(leaf.numel() * leaf.element_size() for leaf in problem.leaves.values())
    if which == "forward":
        return problem.forward_reads + result_bytes
    reads = problem.backward_reads if which == "backward" else problem.forward_reads
    return reads + result_bytes + gradient_bytes


@pytest.mark.parametrize(("case", "name", "which"), parameters())
def test_op(benchmark: Any, deadline: float, case: Case, name: str, which: str) -> None:
    if name in MODULES and importlib.util.find_spec(MODULES[name]) is None:
        pytest.skip(f"{MODULES[name]} is not installed")
    if time.monotonic() > deadline:
        pytest.skip("out of time")
    problem = problem_of(case)
    implementation = implementation_of(case, name)
    setup = prepared(implementation, problem, which)
    host_seconds(setup())
    once = host_seconds(setup())
    rounds = rounds_for(once)

    benchmark.group = f"{case.name} {which}"
    benchmark.pedantic(lambda call: host_seconds(call), setup=lambda: ((setup(),), {}), rounds=rounds)
    host = Quantiles.of(benchmark.stats.stats.data)
    times = device_times(setup, rounds) if DEVICE == "cuda" else host
    with torch.no_grad():
        moved = least_bytes(problem, implementation(problem.inputs), which)
    rate = moved / times.median
    benchmark.extra_info.update(
        op=case.op, terms=case.terms, workload=case.workload, sizes=case.sizes, dtype=case.dtype, layout=case.layout,
        implementation=name, which=which, seconds=times.median, low=times.low, high=times.high,
        host_seconds=host.median, graph_seconds=None, least_bytes=moved, gb_per_s=rate / 1e9,
        copy_share=rate / copy_bandwidth(), peak_bytes=peak_bytes(setup()) if once < SLOW else None,
    )  # fmt: skip
    if DEVICE == "cuda" and which != "backward" and case.sizes[0] <= SMALL and name in ("kernel", "eager"):
        try:
            benchmark.extra_info["graph_seconds"] = graph_times(setup(), rounds).median
        except RuntimeError as error:
            benchmark.extra_info["graph_error"] = str(error).splitlines()[0]
