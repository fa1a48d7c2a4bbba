"""A recording is kept in a line for each thing that was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import measure, record


def entry(**extra_info: Any) -> dict[str, Any]:
    """As pytest-benchmark writes it."""
    return {"name": "test_op[a]", "group": "a", "extra_info": extra_info, "stats": {"rounds": 7, "data": [0.1] * 7}}


def test_a_recording_holds_what_was_measured_and_no_samples() -> None:
    found = {"machine_info": {"cpu": "x"}, "benchmarks": [entry(op="gae", seconds=0.25), entry()], "datetime": "2026"}
    assert record.compact(found) == {
        "datetime": "2026",
        "machine": {"cpu": "x"},
        "entries": [{"op": "gae", "seconds": 0.25, "rounds": 7}],
    }


def test_every_row_is_written_on_a_line_of_its_own(tmp_path: Path) -> None:
    rows = [{"op": "gae", "sizes": [1, 2], "seconds": 0.1 + 0.2}, {"op": "vtrace", "sizes": [], "seconds": None}]
    kept = {"datetime": "2026", "machine": {"cpu": "x"}, "entries": rows, "sweep": []}
    path = tmp_path / "record.json"
    record.write(path, kept)
    assert record.read(path) == kept
    assert [json.loads(line.rstrip(",")) for line in path.read_text().splitlines() if line.startswith('{"op"')] == rows


def test_rows_are_added_to_a_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "machine", lambda: {"cpu": "x"})
    path = tmp_path / "record.json"
    measure.add_to_record(path, "sweep", [{"op": "gae"}])
    measure.add_to_record(path, "training", [{"batch": 1}])
    found = record.read(path)
    assert (found["machine"], found["entries"]) == ({"cpu": "x"}, [])
    assert (found["sweep"], found["training"]) == ([{"op": "gae"}], [{"batch": 1}])
