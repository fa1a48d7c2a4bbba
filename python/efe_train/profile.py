"""Where the time of a batch goes, `efe-train --profile`: a table of the parts of a step, and a trace to look into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from efe_train.config import UserError
from efe_train.files import written

T = TypeVar("T")

Part = Literal["data", "prompts", "plan", "loss", "backward", "refinements", "optimizer", "policy", "metrics"]

PARTS: tuple[Part, ...] = get_args(Part)
"""Of a step, in the order of the table."""

STEP = "ProfilerStep*"
"""The name of the profiler's own ranges, of which each batch has one."""

SKIPPED, WARM_UP, RECORDED = 10, 1, 5
"""Batches. The first ones compile kernels and fill caches; in the one before the record the profiler itself begins."""

SKIPPED_OF_FEW = 2
"""Where there are not batches enough for that."""


def part(name: Part) -> record_function:
    """A range of the profile, as a context manager or a decorator. Without a profiler it costs a few microseconds."""
    return record_function(name)


def each_timed(name: Part, items: Iterator[T]) -> Iterator[T]:
    """The items; the time that each has to be waited for is a part of the profile."""
    while True:
        try:
            with part(name):
                item = next(items)
        except StopIteration:
            return
        yield item


class StepProfile:
    """Counts the batches of a run for the profiler, where there is one."""

    def __init__(self) -> None:
        self.profiler: profile | None = None
        self.batches = 0

    def step(self) -> None:
        """A batch has ended, its metrics and all."""
        self.batches += 1
        if self.profiler is not None:
            self.profiler.step()


@contextmanager
def profiling(folder: Path, enabled: bool, batches: int, say: Callable[[str], None]) -> Iterator[StepProfile]:
    """Profile a few of the batches that are trained in this context, each of which ends with `step`.

    folder: of the run; its profile/ gets trace.json and parts.txt. batches: how many are to come. say: is told where
    the files are. A run that is cut short has a profile of what was recorded until then.

    Raises:
        UserError: the files cannot be written.
    """
    if not enabled:
        yield StepProfile()
        return
    skipped, warm_up, recorded = phases(batches)
    steps = StepProfile()

    def write(profiler: profile) -> None:
        count = min(steps.batches - skipped - warm_up, recorded)
        if count > 0:
            write_profile(folder / "profile", profiler, count)
            say(
                f"Profile of {count} batches: {folder / 'profile' / 'parts.txt'}, "
                f"and {folder / 'profile' / 'trace.json'} to open at https://ui.perfetto.dev"
            )

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    when = schedule(wait=skipped, warmup=warm_up, active=recorded, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=write) as steps.profiler:
        yield steps
    if steps.batches <= skipped + warm_up:
        say(
            f"No profile was written: it begins with batch {skipped + warm_up + 1} of a command, which was not reached."
        )


def phases(batches: int) -> tuple[int, int, int]:
    """How many batches are skipped, are warm-up and are recorded, at least one, where so many are to come."""
    skipped = SKIPPED if batches >= SKIPPED + WARM_UP + RECORDED else min(SKIPPED_OF_FEW, max(0, batches - 2))
    warm_up = min(WARM_UP, max(0, batches - 1))
    return skipped, warm_up, min(RECORDED, batches - skipped - warm_up)


def write_profile(folder: Path, profiler: profile, batches: int) -> None:
    """Make trace.json and parts.txt of a profiler that has recorded so many batches.

    Raises:
        UserError: they cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
    except OSError as error:
        raise UserError(f"{folder / 'trace.json'} cannot be written ({error.strerror}).") from None
    with written(folder / "parts.txt") as stream:
        stream.write(parts_table(profiler.events() or [], batches).encode())


def parts_table(events: Sequence[FunctionEvent], batches: int) -> str:
    """A line for each part that occurred, and one for the steps as a whole."""
    ranges: dict[str, list[FunctionEvent]] = {name: [] for name in (*PARTS, STEP)}
    for event in events:
        # A GPU has a copy of each range, around the kernels of it.
        if event.name in ranges and event.device_type.name == "CPU":
            ranges[event.name].append(event)
    total = sum(step.time_range.elapsed_us() for step in ranges[STEP])
    kernels = {name: kernel_time(found, events) for name, found in ranges.items()}
    on_gpu = kernels[STEP] > 0
    lines = [
        f"{batches} batches of {total / batches / 1000:.1f} ms. Total and share are of the time on the host"
        + (", CUDA is what the kernels took that a part launched." if on_gpu else "."),
        "",
        f"{'part':10}{'total ms':>12}{'share':>9}{'calls':>8}" + f"{'CUDA ms':>12}" * on_gpu,
    ]
    for name, found in ranges.items():
        if found:
            time, calls = sum(each.time_range.elapsed_us() for each in found), batches if name == STEP else len(found)
            line = f"{'step' if name == STEP else name:10}{time / 1000:12.2f}{time / total:9.1%}{calls:8}"
            lines.append(line + f"{kernels[name] / 1000:12.2f}" * on_gpu)
    return "\n".join(lines) + "\n"


def kernel_time(ranges: Sequence[FunctionEvent], events: Sequence[FunctionEvent]) -> float:
    """Microseconds of the kernels that were launched during some ranges, by any thread: backward has one of its own."""
    spans = [(each.time_range.start, each.time_range.end) for each in ranges]
    return sum(
        kernel.duration
        for event in events
        if event.kernels and any(start <= event.time_range.start <= end for start, end in spans)
        for kernel in event.kernels
        if kernel.name not in (*PARTS, STEP)  # the GPU's copy of a range
    )
