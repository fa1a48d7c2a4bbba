"""Time against T and against B of the ops on [B, T], from 1 to 100 000: a cliff would show as a step.

    python -m bench.sweep [--into RECORD.json] [--small] [--jobs N] [--minutes M]

Points are powers of two, and the first size beyond those at which a tile of a kernel may end. What does not compute the
right thing is not timed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from bench.check import in_double, least_bytes, prepared, relative_error, upstream_of
from bench.measure import DEVICE, add_to_record, device_times, host_seconds, host_times, in_parallel
from bench.ops import OPS, problem
from bench.ops.entry import Case, Inputs, Problem

POINTS = (
    1, 2, 4, 8, 16, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 1025, 2048, 4096, 4097, 8192, 16384, 32768,
    65536, 100_000,
)  # fmt: skip
FIXED = 128 if DEVICE == "cuda" else 16  # of B while T varies, and of T while B does
PASSES = ("forward", "both")
LONGEST, MOST_ROUNDS, FEWEST_ROUNDS = 0.03, 50, 5  # seconds and calls that one time is made of
# The points are gone through so many times and the quicker time is kept: what else the machine did at one moment would
# look like a cliff.
VISITS = 2
# Steps of a trace that the reference, a loop over them, is asked for.
CHECKED_STEPS = 128


def points(largest: int) -> list[tuple[str, Case]]:
    """The dimension that varies, and the case."""
    found = []
    for op in (name for name, entry in OPS.items() if entry.swept):
        found += [("T", Case(op, "sweep", (FIXED, steps))) for steps in POINTS if steps <= largest]
        found += [("B", Case(op, "sweep", (batch, FIXED))) for batch in POINTS if batch <= largest]
    # Two elements whitened are ±1/√2 whatever they were: the gradient is rounding alone.
    return [(axis, case) for axis, case in found if (case.op, case.sizes[1]) != ("rl_advantage", 2)]


def check(case: Case, given: Problem) -> None:
    """Against the reference in float64; of a long trace the last results and the first gradients.

    The result at a step depends on no earlier one, and the gradient at a step on none later. The step at which the
    first ones are cut off is an end for the reference, where TD(lambda) takes all of the next value: it is left out.
    """
    inputs, leaves = given.inputs, list(given.leaves.values())
    results = given.implementations["kernel"](inputs)
    upstream = upstream_of(results)
    gradients = torch.autograd.grad(results, leaves, upstream)
    last, first, whole = slice(None), slice(None), slice(None)
    if OPS[case.op].trace and case.sizes[1] > CHECKED_STEPS:
        last, first, whole = slice(-CHECKED_STEPS, None), slice(CHECKED_STEPS), slice(CHECKED_STEPS - 1)
    with torch.no_grad():
        expected_results = given.reference(part_of(inputs, last))
    early = part_of(inputs, first)
    early_leaves = [early[name] for name in given.leaves]
    expected_gradients = torch.autograd.grad(
        given.reference(early), early_leaves, [cut(tensor, first).double() for tensor in upstream]
    )
    pairs = [(cut(result.detach(), last), wanted) for result, wanted in zip(results, expected_results, strict=True)]
    pairs += [
        (cut(gradient, whole), cut(wanted, whole))
        for gradient, wanted in zip(gradients, expected_gradients, strict=True)
    ]
    for found, expected in pairs:
        error = relative_error(found, expected)
        assert error <= OPS[case.op].tolerance[case.dtype], f"{case.name} is off by {error:.1e}"


def cut(tensor: torch.Tensor, steps: slice) -> torch.Tensor:
    """Some columns of [B, T]; a loss has none."""
    return tensor if tensor.dim() == 0 else tensor[:, steps]


def part_of(inputs: Inputs, steps: slice) -> Inputs:
    """Some steps of every input, in float64."""
    found = {}
    for name, value in inputs.items():
        part = None if value is None else value.detach()[:, steps].requires_grad_(value.requires_grad)
        found[name] = in_double(part)
    return found


def measure(axis: str, case: Case) -> list[dict[str, Any]]:
    given = problem(case, DEVICE)
    kernel = given.implementations["kernel"]
    check(case, given)
    with torch.no_grad():
        results = kernel(given.inputs)
    rows = []
    for which in PASSES:
        setup = prepared(kernel, given, which)
        once = host_seconds(setup())
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(LONGEST / once)))
        times = (device_times if DEVICE == "cuda" else host_times)(setup, rounds)
        rows.append({
            "op": case.op, "axis": axis, "sizes": case.sizes, "which": which, "seconds": times.median,
            "low": times.low, "high": times.high, "least_bytes": least_bytes(given, results, which),
        })  # fmt: skip
    return rows


def compile_point(point: tuple[str, Case]) -> None:
    """Run it once, for Triton's cache."""
    _, case = point
    check(case, problem(case, DEVICE))


def main() -> int:
    """Returns 1 where a kernel computes the wrong thing."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--into", type=Path, metavar="RECORD.json", help="add the rows to a recording of the suite")
    parser.add_argument("--small", action="store_true", help="no further than 128")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that compile before the timing")
    parser.add_argument("--minutes", type=float, default=5.0, help="leave out what is not begun after so many minutes")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    chosen = points(128 if options.small else POINTS[-1])
    if options.jobs > 1:
        in_parallel(compile_point, chosen, options.jobs)
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    wrong: dict[str, None] = {}
    for axis, case in chosen * VISITS:
        if time.monotonic() > end:
            print(f"out of time before {case.name}")
            break
        try:
            for row in measure(axis, case):
                key = (case, axis, row["which"])
                best[key] = min(best.get(key, row), row, key=lambda found: found["seconds"])
        except AssertionError as error:
            wrong[str(error)] = None
    print("\n".join([*(f"WRONG  {line}" for line in wrong), f"{len(best)} times, {len(wrong)} points wrong"]))
    if options.into is not None:
        add_to_record(options.into, "sweep", list(best.values()))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
