"""The arithmetic of the projection, on reports that no compiler has made."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from bench.aot import Report
from bench.projection import TOGETHER, Projection, projections, table

# 90 % of 3.35 and of 4.8 TB/s; 132 multiprocessors of 128 lanes and of 16 special functions, at 1.98 GHz.
H100, H200 = 3.015e12, 4.32e12
ISSUED, SPECIAL = 132 * 128 * 1.98e9, 132 * 16 * 1.98e9


def report(**changes: Any) -> Report:
    made_up: dict[str, Any] = {
        "variant": "op", "kernel": "kernel", "arch": "sm_90", "registers": 32, "spill_bytes": 0, "shared_bytes": 0,
        "instructions": 100, "loads": {}, "stores": {}, "which": "forward", "sizes": (4096, 5), "launch_bytes": 10**9,
        "lane_instructions": 10**6, "special_functions": 10**5,
    }  # fmt: skip
    return Report(**made_up | changes)


def only(found: list[Projection]) -> Projection:
    assert len(found) == 1
    return found[0]


def test_a_launch_with_many_bytes_is_bound_by_them() -> None:
    launch = only(projections([report()]))
    assert launch.floor == pytest.approx({"H100": 10**9 / H100, "H200": 10**9 / H200})
    assert launch.issue == pytest.approx(10**6 / ISSUED)
    assert launch.special == pytest.approx(10**5 / SPECIAL)
    assert launch.bounds() == {"H100": "bytes", "H200": "bytes"}


def test_a_launch_with_many_instructions_is_bound_by_their_issue() -> None:
    launch = only(projections([report(lane_instructions=10**11)]))
    assert launch.issue == pytest.approx(10**11 / ISSUED)
    assert launch.bounds() == {"H100": "issue", "H200": "issue"}


def test_the_faster_memory_moves_the_bound_from_bytes_to_instructions() -> None:
    between = 10**9 * (1 / H100 + 1 / H200) / 2
    launch = only(projections([report(lane_instructions=int(between * ISSUED))]))
    assert launch.bounds() == {"H100": "bytes", "H200": "issue"}


def test_a_launch_with_many_logarithms_is_bound_by_special_functions() -> None:
    launch = only(projections([report(lane_instructions=10**11, special_functions=10**11)]))
    assert launch.bounds() == {"H100": "special functions", "H200": "special functions"}


def test_a_launch_with_loops_of_unknown_trips_has_a_floor_and_no_issue_time() -> None:
    unknown = {"lane_instructions": None, "special_functions": None, "not_projected": "loops: not projected"}
    launch = only(projections([report(**unknown)]))
    assert launch.floor["H100"] == pytest.approx(10**9 / H100)
    assert (launch.issue, launch.special, launch.bounds()) == (None, None, {})
    assert "loops: not projected" in table([launch])


def test_a_pass_adds_its_launches_up_and_names_those_that_are_missing() -> None:
    finish = report(kernel="finish", lane_instructions=None, special_functions=None, not_projected="loops")
    *_, whole = projections([report(), report(kernel="second"), finish])
    assert (whole.which, whole.kernel, whole.least_bytes) == ("forward", TOGETHER, 3 * 10**9)
    assert whole.issue == pytest.approx(2 * 10**6 / ISSUED)
    assert "finish" in whole.note
    assert "second" not in whole.note


def test_forward_and_backward_are_added_up_as_both() -> None:
    found = projections([report(), report(which="backward")])
    assert [launch.which for launch in found] == ["forward", "backward", "both"]
    assert found[-1].least_bytes == 2 * 10**9


def test_other_architectures_and_kernels_without_a_recorded_launch_are_left_out() -> None:
    assert projections([report(arch="sm_80"), report(which="")]) == []
