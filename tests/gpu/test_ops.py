"""What only a GPU can show of each op: parity with the reference, capture, streams, devices, and no synchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.check import everything, in_double, upstream_of
from bench.ops import EXAMPLES, OPS, example
from bench.ops.entry import Inputs
from efe_kernels import info
from efe_kernels.common import library

every_op = pytest.mark.parametrize("name", EXAMPLES)


def expected_of(name: str, inputs: Inputs) -> list[Tensor]:
    """Results and gradients of the reference, in float64 on the CPU."""
    case = EXAMPLES[name].case
    exact = {argument: in_double(on_cpu(value)) for argument, value in inputs.items()}
    return everything(partial(OPS[case.op].reference, case), exact)


def on_cpu(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().cpu().requires_grad_(value.requires_grad)


def replace_by(others: Inputs, inputs: Inputs) -> None:
    """Other values in the memory of the inputs, once where an input repeats what it holds."""
    with torch.no_grad():
        for argument, value in others.items():
            if value is not None:
                once = tuple(slice(None if stride else 1) for stride in value.stride())
                inputs[argument][once].copy_(value[once])


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside, host code that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", library.OPS)
def test_no_op_is_left_to_the_reference(op: str) -> None:
    """Equal results alone would not show it."""
    assert info.backend(op, "CUDA") == ("Triton" if library.OPS[op].triton else "CUDA C++")


@every_op
def test_results_and_gradients_are_those_of_the_reference_in_float64(name: str) -> None:
    run, inputs = example(name, "cuda")
    for found, expected in zip(everything(run, inputs), expected_of(name, inputs), strict=True):
        # float32 arithmetic with the approximate logarithm, whose error is 2^-22, summed over up to 5000 elements.
        error = (found.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error <= 2e-5


@every_op
def test_an_op_never_waits_for_the_device(name: str) -> None:
    run, inputs = example(name, "cuda")
    upstream = upstream_of(run(inputs))
    everything(run, inputs, upstream)  # compiles the kernels, which may wait
    with no_synchronisation():
        everything(run, inputs, upstream)


@every_op
def test_a_captured_step_replays_on_new_inputs(name: str) -> None:
    (run, inputs), (_, others) = example(name, "cuda"), example(name, "cuda")
    upstream = upstream_of(run(inputs))
    expected = everything(run, others, upstream)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            everything(run, inputs, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(run, inputs, upstream)
    replace_by(others, inputs)
    graph.replay()
    for found, wanted in zip(captured, expected, strict=True):
        assert torch.equal(found, wanted)


@every_op
def test_kernels_run_on_the_current_stream(name: str) -> None:
    """The inputs arrive late on the stream; a kernel on another stream would read what was there before."""
    (run, inputs), (_, others) = example(name, "cuda"), example(name, "cuda")
    expected = everything(run, others)
    everything(run, inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        replace_by(others, inputs)
        found = everything(run, inputs)
    stream.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@every_op
def test_two_runs_give_the_same_bits(name: str) -> None:
    run, inputs = example(name, "cuda")
    for first, second in zip(everything(run, inputs), everything(run, inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_op
def test_tensors_may_lie_on_a_device_that_is_not_the_current_one(name: str) -> None:
    run, inputs = example(name, "cuda:1")
    expected = expected_of(name, inputs)
    for found, wanted in zip(everything(run, inputs), expected, strict=True):
        assert found.device == torch.device("cuda:1")
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-3, atol=1e-4)
    assert torch.cuda.current_device() == 0


def test_a_synchronisation_would_be_noticed() -> None:
    one = torch.ones((), device="cuda")
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        one.item()
