from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from efe_train.profile import PARTS, part, parts_table, phases, profiling


def train(folder: Path, batches: int, planned: int | None = None, enabled: bool = True) -> list[str]:
    """What a run of so many batches, each with a plan and two losses, says of its profile."""
    said: list[str] = []
    weight = torch.ones(8, 8, requires_grad=True)
    with profiling(folder, enabled, planned or batches, said.append) as profile:
        for _ in range(batches):
            with part("plan"):
                plan = weight @ weight
            for _ in range(2):
                with part("loss"):
                    plan.sum()
            with part("backward"):
                plan.sum().backward()
            profile.step()
    return said


def table(folder: Path) -> dict[str, list[str]]:
    rows = (line.split() for line in (folder / "profile" / "parts.txt").read_text().splitlines()[3:])
    return {name: values for name, *values in rows}


@pytest.mark.parametrize(
    ("batches", "expected"),
    [(1, (0, 0, 1)), (2, (0, 1, 1)), (3, (1, 1, 1)), (6, (2, 1, 3)), (15, (2, 1, 5)), (16, (10, 1, 5))],
)
def test_the_first_batches_are_left_out_where_there_are_enough(batches: int, expected: tuple[int, int, int]) -> None:
    assert phases(batches) == expected


def test_the_table_says_how_often_and_how_long_each_part_ran(tmp_path: Path) -> None:
    (said,) = train(tmp_path, 18)
    rows = table(tmp_path)
    assert list(rows) == ["plan", "loss", "backward", "step"]
    assert [values[2] for values in rows.values()] == ["5", "10", "5", "5"]
    times, shares = ([float(values[at].rstrip("%")) for values in rows.values()] for at in (0, 1))
    assert all(time > 0 for time in times) and sum(times[:3]) <= times[3]
    assert shares == pytest.approx([100 * time / times[3] for time in times], abs=1)
    for file in ("parts.txt", "trace.json"):
        assert str(tmp_path / "profile" / file) in said


def test_the_trace_can_be_opened_and_has_the_parts(tmp_path: Path) -> None:
    train(tmp_path, 4)
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("plan") == 1 and names.count("loss") == 2  # of the one batch after two and the warm-up


def test_kernels_count_where_they_were_launched() -> None:
    """On a GPU: by the part itself, by an op in it, and by autograd's own thread."""

    def event(name: str, start: int, end: int, thread: int = 1, device: str = "CPU") -> FunctionEvent:
        return FunctionEvent(1, name, thread, start, end, device_type=getattr(DeviceType, device))

    step, backward, node, copy = (
        event("ProfilerStep*", 0, 10_000),
        event("backward", 4_000, 9_000),
        event("MmBackward0", 5_000, 6_000, thread=2),
        event("backward", 6_000, 14_000, device="CUDA"),
    )
    plan, op = event("plan", 0, 4_000), event("aten::mm", 1_000, 2_000)
    backward.append_kernel("backward", 0, 8_000)  # the copy of the range, not a kernel
    plan.append_kernel("triton_kernel", 0, 250)
    op.append_kernel("gemm", 0, 500)
    node.append_kernel("gemm", 0, 7_000)
    lines = parts_table([step, plan, op, backward, node, copy], 1).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["part", "total", "ms", "share", "calls", "CUDA", "ms"],
        ["plan", "4.00", "40.0%", "1", "0.75"],
        ["backward", "5.00", "50.0%", "1", "7.00"],
        ["step", "10.00", "100.0%", "1", "7.75"],
    ]


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_short_run_has_a_profile_too(batches: int, tmp_path: Path) -> None:
    train(tmp_path, batches)
    assert table(tmp_path)["plan"][2] == table(tmp_path)["step"][2] == "1"


def test_a_run_that_is_cut_short_has_the_profile_of_what_it_recorded(tmp_path: Path) -> None:
    (said,) = train(tmp_path, 13, planned=100)
    assert said.startswith("Profile of 2 batches")
    assert table(tmp_path)["plan"][2] == table(tmp_path)["step"][2] == "2"


def test_a_run_that_is_cut_shorter_says_that_there_is_none(tmp_path: Path) -> None:
    (said,) = train(tmp_path, 11, planned=100)
    assert "No profile was written" in said and "batch 12" in said
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_profiled_unless_that_is_asked_for(tmp_path: Path) -> None:
    assert train(tmp_path, 18, enabled=False) == []
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_a_decorator_too(tmp_path: Path) -> None:
    @part("optimizer")
    def step() -> torch.Tensor:
        return torch.ones(3).sum()

    with profiling(tmp_path, True, 1, lambda text: None) as profile:
        step()
        step()
        profile.step()
    assert table(tmp_path)["optimizer"][2] == "2"
    assert "optimizer" in PARTS
