"""The EFE loss kernels side by side: cells per lane, warps, both layouts.

The launcher chooses tile and warps from the shape alone; here every choice is timed, and checked against its own.

    python -m bench.variants [--json FILE] [--jobs N]
    TRITON_INTERPRET=1 python -m bench.variants --small     without a GPU: checked on a tiny grid, not timed
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from torch import Tensor

from bench.check import everything, least_bytes, outcome, prepared
from bench.measure import DEVICE, copy_bandwidth, device_times, in_parallel, synchronize
from bench.ops import problem
from bench.ops.efe_loss import plan
from bench.ops.entry import Case
from bench.render import columns
from efe_kernels.efe_loss import launch

CELLS_PER_LANE = (1, 2, 4)
WARPS = (1, 2, 4)
ROUNDS = 20
SMALL = (2, 3, 9, 9, 10)  # several tiles at one cell per lane, and a tail
# Two variants sum the cells in another order, and bf16 gradients are rounded to 2^-9.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Variant:
    """cells_per_lane 0: as the launcher chooses."""

    case: Case
    cells_per_lane: int = 0
    num_warps: int = 0

    def chosen(self) -> AbstractContextManager[None]:
        return layout_with(self.cells_per_lane, self.num_warps) if self.cells_per_lane else nullcontext()

    @property
    def name(self) -> str:
        choice = (
            f"{self.cells_per_lane} cells per lane, {self.num_warps} warps" if self.cells_per_lane else "as launched"
        )
        return f"{self.case.terms} {self.case.dtype} {self.case.layout}: {choice}"


@contextmanager
def layout_with(cells_per_lane: int, num_warps: int) -> Iterator[None]:
    """Inside, the launchers use this many cells per lane and warps per program."""

    class Chosen(launch.Layout):
        def tile_of(self, _cells_per_lane: int) -> int:
            return min(launch.LANES * num_warps * cells_per_lane, triton.next_power_of_2(self.cells))

    options = patch.dict(launch.OPTIONS, num_warps=num_warps)
    with patch.object(launch, "Layout", Chosen), options, patch.dict(launch.LAYOUTS, clear=True):
        yield


def variants(sizes: tuple[int, ...]) -> list[Variant]:
    found = []
    for dtype, layout, terms in (
        ("bf16", "channel-first", "core"),
        ("bf16", "channel-last", "core"),
        ("bf16", "channel-first", "all"),
        ("fp32", "channel-first", "all"),
    ):
        case = Case("efe_loss", "variants", sizes, dtype, layout, terms)
        found += [Variant(case), *(Variant(case, cells, warps) for cells, warps in product(CELLS_PER_LANE, WARPS))]
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
