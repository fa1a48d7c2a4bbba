"""What only a GPU can show of each op: parity with the reference, capture, streams, devices, and no synchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from efe_kernels import info
from efe_kernels.common import library
from tests.gpu.ops import OPS, Op, in_double, step, upstream_of

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


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
def test_results_and_gradients_are_those_of_the_reference_in_float64(op: Op) -> None:
    inputs = op.make("cuda")
    for found, expected in zip(step(op, inputs), step(op, in_double(inputs)), strict=True):
        # float32 arithmetic with the approximate logarithm, whose error is 2^-22, summed over up to 5000 elements.
        error = (found.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error <= 2e-5


@every_op
def test_an_op_never_waits_for_the_device(op: Op) -> None:
    inputs = op.make("cuda")
    upstream = upstream_of(op.run(**inputs))
    step(op, inputs, upstream)  # compiles the kernels, which may wait
    with no_synchronisation():
        step(op, inputs, upstream)


@every_op
def test_a_captured_step_replays_on_new_inputs(op: Op) -> None:
    inputs, others = op.make("cuda"), op.make("cuda")
    upstream = upstream_of(op.run(**inputs))
    expected = step(op, others, upstream)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(op, inputs, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(op, inputs, upstream)
    with torch.no_grad():
        for name, value in others.items():
            inputs[name].copy_(value)
    graph.replay()
    for found, wanted in zip(captured, expected, strict=True):
        assert torch.equal(found, wanted)


@every_op
def test_kernels_run_on_the_current_stream(op: Op) -> None:
    """The inputs arrive late on the stream; a kernel on another stream would read what was there before."""
    inputs, others = op.make("cuda"), op.make("cuda")
    expected = step(op, others)
    step(op, inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for name, value in others.items():
                inputs[name].copy_(value)
        found = step(op, inputs)
    stream.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@every_op
def test_two_runs_give_the_same_bits(op: Op) -> None:
    inputs = op.make("cuda")
    for first, second in zip(step(op, inputs), step(op, inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_op
def test_tensors_may_lie_on_a_device_that_is_not_the_current_one(op: Op) -> None:
    inputs = op.make("cuda:1")
    expected = step(op, in_double(inputs))
    for found, wanted in zip(step(op, inputs), expected, strict=True):
        assert found.device == torch.device("cuda:1")
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-3, atol=1e-4)
    assert torch.cuda.current_device() == 0


def test_a_synchronisation_would_be_noticed() -> None:
    one = torch.ones((), device="cuda")
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        one.item()
