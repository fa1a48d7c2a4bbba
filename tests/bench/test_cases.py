"""Every case of the benchmarks, made small: what is timed computes the right thing."""

from __future__ import annotations

import pytest

from bench.ops import CASES
from bench.ops.entry import Case
from bench.smoke import checked, small


@pytest.mark.parametrize("case", dict.fromkeys(map(small, CASES)), ids=lambda case: case.name)
def test_every_implementation_is_right(case: Case) -> None:
    assert checked(case) == []
