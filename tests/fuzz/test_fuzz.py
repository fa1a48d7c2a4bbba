"""Random calls of every public function, within the contract and one step beyond it.

EFE_FUZZ_CASES calls of each function, in EFE_FUZZ_PARTS tests, so that several processes share them; EFE_FUZZ_SEED
chooses which. A failing call is shrunk and printed.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("hypothesis")
import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, given, seed, settings

from efe_kernels.common.library import INTERPRET
from tests.fuzz.draw import Draw
from tests.fuzz.faults import with_fault
from tests.fuzz.functions import FUNCTIONS
from tests.fuzz.oracle import MODES, Case, check

CASES = int(os.environ.get("EFE_FUZZ_CASES", 8 if INTERPRET else 60))
PARTS = int(os.environ.get("EFE_FUZZ_PARTS", 1))
SEED = int(os.environ.get("EFE_FUZZ_SEED", 0))
BOUNDLESS = settings(
    deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink), max_examples=-(-CASES // PARTS),
)  # fmt: skip


@st.composite
def cases(draw: Any, name: str) -> Case:
    drawn = Draw(draw)
    FUNCTIONS[name][1](drawn)
    fault = with_fault(drawn) if drawn.rarely() else None
    return Case(
        drawn.arguments,
        fault,
        upstream=drawn.choice((1, 2, 3, 5, 255)),
        seed=drawn.seed(),
        again=drawn.choice(("plain", *MODES)),
    )


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_call_keeps_its_contract(name: str, part: int, record_property: Any) -> None:
    counts: Counter[str] = Counter()

    @seed(zlib.crc32(f"{name} {part} {SEED}".encode()))
    @BOUNDLESS
    @given(case=cases(name))
    def calls(case: Case) -> None:
        counts["calls"] += 1
        counts[check(FUNCTIONS[name][0], case)] += 1

    try:
        calls()
    finally:
        record_property("fuzz", [name, dict(counts)])
