"""The EFE loss kernels side by side: cells per lane, a limit of registers, chunks of episodes, both layouts.

The launcher chooses these from the shape alone; here other choices are timed, and checked against its own.

    python -m bench.variants [--json FILE] [--jobs N]
    TRITON_INTERPRET=1 python -m bench.variants --small     without a GPU: checked on a tiny grid, not timed
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from bench.check import everything, least_bytes, outcome, prepared
from bench.measure import DEVICE, copy_bandwidth, device_times, in_parallel, synchronize
from bench.ops import problem
from bench.ops.efe_loss import plan
from bench.ops.entry import Case
from bench.render import columns
from efe_kernels.efe_loss import launch
from efe_kernels.efe_loss.reference import Inputs

CELLS_PER_LANE = (1, 2)
REGISTERS = (None, 168, 128)
CHUNKS = (128, 512, 2048)
ROUNDS = 20
SMALL = (2, 3, 9, 9, 10)  # several tiles at one cell per lane, and a tail
# Two variants sum the cells in another order, and bf16 gradients are rounded to 2^-9.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Variant:
    """cells_per_lane 0: as the launcher chooses. registers: of a lane at most."""

    case: Case
    cells_per_lane: int = 0
    registers: int | None = None
    chunks: int = launch.MAX_CHUNKS

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Inside, the launchers do as the variant says."""
        if not self.cells_per_lane:
            yield
            return
        cells_per_lane = self.cells_per_lane

        class Chosen(launch.Layout):
            def __init__(self, inputs: Inputs) -> None:
                super().__init__(inputs)
                self.backward_options = {}

            def tile_of(self, _cells_per_lane: int) -> int:
                return super().tile_of(cells_per_lane)

        options = {} if self.registers is None or not launch.APPROXIMATE else {"maxnreg": self.registers}
        layout = patch.multiple(launch, Layout=Chosen, MAX_CHUNKS=self.chunks)
        with layout, patch.dict(launch.OPTIONS, options), patch.dict(launch.LAYOUTS, clear=True):
            yield

    @property
    def name(self) -> str:
        limit = f"at most {self.registers} registers" if self.registers else "no limit"
        choice = f"{self.cells_per_lane} cells per lane, {limit}, {self.chunks} chunks"
        return f"{self.case.terms} {self.case.dtype} {self.case.layout}: " + (
            choice if self.cells_per_lane else "as launched"
        )


def variants(sizes: tuple[int, ...]) -> list[Variant]:
    found = []
    for dtype, layout, terms in (
        ("bf16", "channel-first", "core"),
        ("bf16", "channel-last", "core"),
        ("bf16", "channel-first", "all"),
        ("bf16", "channel-last", "all"),
        ("fp32", "channel-first", "all"),
    ):
        case = Case("efe_loss", "variants", sizes, dtype, layout, terms)
        found += [Variant(case), *(Variant(case, *choice) for choice in product(CELLS_PER_LANE, REGISTERS))]
        found += [Variant(case, 1, chunks=chunks) for chunks in CHUNKS if chunks != launch.MAX_CHUNKS]
    return found


def compile_variant(variant: Variant) -> None:
    """Run it once, for Triton's cache. One that does not compile is found again when it is measured."""
    given = problem(variant.case, DEVICE)
    try:
        with variant.chosen():
            outcome(given.implementations["kernel"], given.inputs)
        synchronize()
    except Exception as error:
        print(f"{variant.name}: {type(error).__name__}", flush=True)


def measure(variant: Variant) -> dict[str, Any]:
    """Whether it is right, and on a GPU its times."""
    given = problem(variant.case, DEVICE)
    kernel = given.implementations["kernel"]
    expected = everything(kernel, given.inputs)
    row: dict[str, Any] = {"variant": variant.name}
    try:
        with variant.chosen():
            found = everything(kernel, given.inputs)
            row["right"] = all(map(close, found, expected))
            for which in ("forward", "both") if DEVICE == "cuda" else ():
                times = device_times(prepared(kernel, given, which), ROUNDS)
                share = least_bytes(given, (expected[0],), which) / times.median / copy_bandwidth()
                row |= {f"{which} us": round(times.median * 1e6, 1), f"{which} of copy": round(share, 3)}
    except Exception as error:  # a variant that does not compile is a finding, not the end of the table
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row


def close(found: Tensor, expected: Tensor) -> bool:
    difference = (found.float() - expected.float()).norm()
    return bool(difference <= TOLERANCE * expected.float().norm())


def main() -> int:
    """Returns 1 where a variant computes the wrong thing."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.variants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes that compile before the timing begins"
    )
    parser.add_argument("--small", action="store_true", help="a tiny grid, for Triton's interpreter")
    options = parser.parse_args()
    chosen = variants(SMALL if options.small else plan(4096))
    if options.jobs > 1:
        in_parallel(compile_variant, chosen, options.jobs)
    rows: list[dict[str, Any]] = []
    try:
        for variant in chosen:
            rows.append(measure(variant))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    finally:  # what was measured before an interruption is kept
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    print("\n" + columns([names, *([str(row.get(name, "")) for name in names] for row in rows)], False))
    return 1 if any(row.get("right") is False for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
