"""How a call is measured: device time with a cold cache, host time, peak memory, and the copy that sets the scale."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COPY_BYTES = (1 << 30) if DEVICE == "cuda" else (1 << 28)
# Written before each timed call, so that no input is still in the L2 cache; larger than that of any GPU so far.
FLUSH_BYTES = 1 << 28
LONGEST = 0.1 if DEVICE == "cuda" else 0.15  # seconds that one measurement may take, unless few calls take longer
MOST_ROUNDS = 200
LOAD = round(os.getloadavg()[0], 2)  # of the machine before the run, which adds to it
FEWEST_ROUNDS = 4

Task = TypeVar("Task")
Result = TypeVar("Result")
Call = Callable[[], object]
Setup = Callable[[], Call]


@dataclass(frozen=True)
class Quantiles:
    """Seconds."""

    median: float
    low: float  # 20 % of the rounds were faster
    high: float  # 80 % were

    @staticmethod
    def of(seconds: Sequence[float]) -> Quantiles:
        if len(seconds) < 2:
            return Quantiles(seconds[0], seconds[0], seconds[0])
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return Quantiles(statistics.median(seconds), fifths[0], fifths[3])


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def host_seconds(call: Call) -> float:
    """One call from outside, until the device is done."""
    synchronize()
    begun = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begun


def rounds_for(seconds: float) -> int:
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(LONGEST / max(seconds, 1e-9))))


@cache
def flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)


def device_times(setup: Setup, rounds: int) -> Quantiles:
    """Time between two events around the call, on an L2 cache that holds none of its inputs."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for before, after in events:
        call = setup()
        flush_buffer().zero_()
        before.record()
        call()
        after.record()
    synchronize()
    return Quantiles.of([before.elapsed_time(after) / 1e3 for before, after in events])


def host_times(setup: Setup, rounds: int) -> Quantiles:
    return Quantiles.of([host_seconds(setup()) for _ in range(rounds)])


def graph_times(call: Call, rounds: int) -> Quantiles:
    """Device time of the call replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return device_times(lambda: graph.replay, rounds)


def peak_bytes(call: Call) -> int:
    """The most memory that the call holds beyond what was held before it."""
    if DEVICE == "cuda":
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@cache
def copy_bandwidth() -> float:
    """Bytes per second of a large copy on this device, bytes read plus bytes written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)

    def copy() -> Call:
        return lambda: target.copy_(source)

    host_times(copy, 3)
    times = device_times(copy, 20) if DEVICE == "cuda" else host_times(copy, 20)
    return 2 * COPY_BYTES / times.median


def in_parallel(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> list[Result]:
    """function of each task, in that many processes of their own."""
    if workers <= 1:
        return [function(task) for task in tasks]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, tasks))


@cache
def machine() -> dict[str, Any]:
    """What a record must say about where it was made."""
    found: dict[str, Any] = {
        "device": DEVICE,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": LOAD,
        "load_after": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "copy_gb_per_s": round(copy_bandwidth() / 1e9, 1),
    }
    for package in ("triton", "liger-kernel", "torchrl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def add_to_record(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Put rows beside the entries of a recording, which is begun here where there is none."""
    if path.exists():
        found = record.read(path)
    else:
        found = {"datetime": datetime.now(timezone.utc).isoformat(), "machine": machine(), "entries": []}
    record.write(path, {**found, name: rows})


def cpu_name() -> str:
    """With the widest instruction set that torch uses, because virtual machines hide the model."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    found = output_of("git", "rev-parse", "--short=12", "HEAD")
    # Where recordings are written, this one among them.
    changed = output_of("git", "status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
    return f"{found}, changed" if found and changed else found


def output_of(*command: str) -> str:
    """Standard output of a command, empty where it cannot run."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> int:
    """Print the machine and the speed of a copy."""
    for name, value in machine().items():
        print(f"{name:<16}{value}")
    if DEVICE == "cuda":
        tiny = torch.zeros(1, device=DEVICE)
        launch = host_times(lambda: lambda: tiny.add_(1), 100).median
        print(f"{'launch':<16}{launch * 1e6:.1f} us for an op on one element, from the host until it is done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
