"""A recording as it is kept: where and when it was made, and one line for each thing that was measured.

`entries` holds a row for every case, implementation and pass of the suite: median and quantiles in seconds, rounds,
bytes; `sweep` and `training` hold the rows that these modules add.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


def compact(found: dict[str, Any]) -> dict[str, Any]:
    """A recording from what pytest-benchmark writes, and the rows that were added to it."""
    entries = [{**entry["extra_info"], "rounds": entry["stats"]["rounds"]} for entry in measured(found)]
    added: dict[str, Any] = {name: found[name] for name in ("sweep", "training") if name in found}
    return {"datetime": found["datetime"], "machine": found["machine_info"], "entries": entries, **added}


def measured(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Without those that failed or were left out."""
    return [entry for entry in found["benchmarks"] if entry["extra_info"]]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(path: Path, record: dict[str, Any]) -> None:
    """As JSON, every row on a line of its own."""
    fields = []
    for name, value in record.items():
        text = json.dumps(value)
        if isinstance(value, list):
            rows = ",\n".join(json.dumps(row) for row in value)
            text = f"[\n{rows}\n]" if value else "[]"
        fields.append(f"{json.dumps(name)}: {text}")
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n")


class Record:
    """A recording: where it was made, its entries, and the training runs beside them."""

    def __init__(self, path: Path) -> None:
        found = read(path)
        self.name = path.stem
        self.details = path.resolve().with_suffix(".md")
        self.figure = path.resolve().with_name(f"{path.stem}-sweep.png")
        self.date = found["datetime"][:10]
        self.machine: Row = found["machine"]
        self.entries: list[Row] = found["entries"]
        self.training: list[Row] = found.get("training", [])
        self.sweep: list[Row] = found.get("sweep", [])

    def cases(self) -> dict[tuple[Any, ...], dict[str, Row]]:
        """Entries by implementation, for each case and pass in the order of the recording."""
        found: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
        for entry in self.entries:
            found[key_of(entry)][entry["implementation"]] = entry
        return found

    def about(self) -> str:
        machine = self.machine
        where = machine["cpu"] + f", {machine['threads']} threads"
        if machine["device"] == "cuda":
            where = f"{machine['gpu']} (driver {machine['driver']}, CUDA {machine['cuda']})"
        packages = ("torch", "triton", "liger-kernel", "torchrl")
        versions = ", ".join(f"{name} {machine[name]}" for name in packages if machine.get(name))
        load = f"load {machine['load']} before the run, {machine.get('load_after', 'unknown')} at its end"
        return (
            f"{where}; {self.date}; commit {machine['commit'] or 'unknown'}; {versions}; a copy moves "
            f"{machine['copy_gb_per_s']:.0f} GB/s; {load}"
        )


def key_of(entry: Row) -> tuple[Any, ...]:
    return tuple(str(entry[name]) for name in ("op", "terms", "workload", "sizes", "dtype", "layout", "which"))


def title_of(entry: Row) -> str:
    names = [
        entry["op"],
        entry["terms"],
        entry["workload"],
        "x".join(map(str, entry["sizes"])),
        entry["dtype"],
        entry["layout"],
    ]
    return " ".join(name for name in names if name)
