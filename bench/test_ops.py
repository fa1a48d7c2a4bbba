"""Every case of the registry, every implementation, every pass. What does not compute the right thing is not timed."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import pytest
import torch

from bench.check import implementation_of, least_bytes, prepared, problem_of
from bench.measure import (
    DEVICE,
    Quantiles,
    copy_bandwidth,
    device_times,
    graph_times,
    host_seconds,
    peak_bytes,
    rounds_for,
)
from bench.ops import CASES, OPS, passes_of
from bench.ops.entry import Case

# Batches up to this one are also timed from a CUDA graph.
SMALL = 64
# Calls longer than this (in seconds) are loops of so many ops that a profile of their memory takes minutes.
SLOW = 0.2


def parameters() -> list[Any]:
    found = []
    for case in CASES:
        for implementation in ("kernel", *case.opponents):
            peer = OPS[case.op].peers.get(implementation)
            if DEVICE == "cpu" and (case.gpu_only or (peer is not None and peer.gpu)):
                continue
            for which in passes_of(case, implementation):
                found.append(pytest.param(case, implementation, which, id=f"{case.name}-{implementation}-{which}"))
    return found


@pytest.mark.parametrize(("case", "name", "which"), parameters())
def test_op(benchmark: Any, deadline: float, case: Case, name: str, which: str) -> None:
    peer = OPS[case.op].peers.get(name)
    if peer is not None and peer.module and importlib.util.find_spec(peer.module) is None:
        pytest.skip(f"{peer.module} is not installed")
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
