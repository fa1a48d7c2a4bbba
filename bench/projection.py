"""What a GPU run is to be held against: how long the compiled kernels must take at least on an H100 and an H200.

Three times bound a launch from below. Bytes: every tensor that it is given is read or written once, at 90 % of the
nominal bandwidth. Issue: the instructions that its lanes execute, one for 32 lanes in each cycle of each scheduler.
Special functions: exponentials, logarithms, reciprocals and roots, of which a multiprocessor finishes 16 in a cycle.
The largest of the three bounds the launch. Launches follow one another, so those of a pass are added up.

Not in it: latencies, the time of a launch itself, idle multiprocessors where there are few programs, and that some
instructions take more than one cycle. A branch counts as taken, so that rare paths make the issue time too long, and
what one launch leaves in the cache for the next makes the bytes too many. A kernel with loops is projected where the
constants of the launch tell how often each of them is gone through. Kernels of CUDA C++ are left out: how often their
loops run depends on masks and strides that only a call knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from bench.render import columns

if TYPE_CHECKING:
    from bench.aot import Report

ARCH = "sm_90"
# NVIDIA's data sheets of the SXM modules, in bytes per second.
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
# An assumption: large copies are reported at 3.0 TB/s on an H100 and 4.3 TB/s on an H200. `bench.measure` measures it.
REACHABLE = 0.9
# Both have 132 multiprocessors of 4 schedulers. The clock is the boost clock that the 67 TFLOPS of fp32 of both data
# sheets imply: 132 x 128 lanes x 2 operations x 1.98 GHz. Under a power limit it is lower.
MULTIPROCESSORS, SCHEDULERS, LANES, CLOCK = 132, 4, 32, 1.98e9
# Results per cycle and multiprocessor, from the table of arithmetic throughput in NVIDIA's CUDA programming guide.
SPECIAL_RATE = 16
TOGETHER = "together"


@dataclass(frozen=True)
class Projection:
    """Seconds; None where they are not projected, and `note` says why. kernel: `TOGETHER` for a whole pass."""

    variant: str
    which: str
    kernel: str
    sizes: tuple[int, ...]
    least_bytes: int
    floor: dict[str, float]  # by GPU
    issue: float | None
    special: float | None
    note: str = ""

    def bounds(self) -> dict[str, str]:
        """Which of the three times is the longest on each GPU; empty where they are not all known."""
        found = {}
        if self.issue is not None and self.special is not None:
            for gpu, floor in self.floor.items():
                times = {"bytes": floor, "issue": self.issue, "special functions": self.special}
                found[gpu] = max(times, key=times.__getitem__)
        return found


def projections(reports: Iterable[Report]) -> list[Projection]:
    """One for each launch, and after those of a pass, where it has several, and of forward and backward one for all."""
    found = []
    projected = [project(report) for report in reports if report.arch == ARCH and report.which]
    for _, group in groupby(projected, key=lambda launch: launch.variant):
        launches = list(group)
        passes = {which: list(members) for which, members in groupby(launches, key=lambda launch: launch.which)}
        for which, members in passes.items():
            found += members if len(members) == 1 else [*members, together(members, which)]
        if [*passes] == ["forward", "backward"]:
            found.append(together(launches, "both"))
    return found


def project(report: Report) -> Projection:
    issued, special = report.lane_instructions, report.special_functions
    cycles = MULTIPROCESSORS * CLOCK
    return Projection(
        report.variant,
        report.which,
        report.kernel,
        report.sizes,
        report.launch_bytes,
        floor={gpu: report.launch_bytes / (REACHABLE * rate) for gpu, rate in BANDWIDTH.items()},
        issue=None if issued is None else issued / (SCHEDULERS * LANES * cycles),
        special=None if special is None else special / (SPECIAL_RATE * cycles),
        note=report.not_projected,
    )


def together(launches: list[Projection], which: str) -> Projection:
    """The pass of these launches; the instructions of those that are not projected are missing in it."""
    first = launches[0]
    issues = [launch.issue for launch in launches if launch.issue is not None]
    specials = [launch.special for launch in launches if launch.special is not None]
    missing = dict.fromkeys(launch.kernel for launch in launches if launch.issue is None)
    return Projection(
        first.variant,
        which,
        TOGETHER,
        first.sizes,
        sum(launch.least_bytes for launch in launches),
        floor={gpu: sum(launch.floor[gpu] for launch in launches) for gpu in BANDWIDTH},
        issue=sum(issues) if issues else None,
        special=sum(specials) if specials else None,
        note=f"without the instructions of {', '.join(missing)}" if missing else "",
    )


def table(found: list[Projection]) -> str:
    rows = [["variant", "pass", "kernel", "batch", "MB moved"]]
    rows[0] += [*(f"floor {gpu} us" for gpu in BANDWIDTH), "issue us", "special us"]
    rows[0] += [*(f"{gpu} bound by" for gpu in BANDWIDTH), "note"]
    for launch in found:
        times = (*launch.floor.values(), launch.issue, launch.special)
        rows.append([
            launch.variant,
            launch.which,
            launch.kernel,
            "x".join(map(str, launch.sizes)),
            figure(launch.least_bytes / 1e6),
            *("" if time is None else figure(time * 1e6) for time in times),
            *(launch.bounds().get(gpu, "") for gpu in BANDWIDTH),
            launch.note,
        ])  # fmt: skip
    return columns(rows, False)


def figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
