"""The entries fit together, and are there without Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench
from bench.ops import CASES, OPS

BUDGETS = Path(bench.__file__).with_name("aot_budgets.json")
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from bench.check import everything
from bench.ops import EXAMPLES, example
for name in EXAMPLES:
    everything(*example(name, "cpu"))
"""


def test_cases_name_implementations_of_their_op() -> None:
    for case in CASES:
        assert set(case.opponents) <= set(OPS[case.op].peers)


@pytest.mark.parametrize("name", OPS)
def test_an_entry_names_its_own_op(name: str) -> None:
    op = OPS[name]
    cases = (*op.headline, *op.cases, *op.host, *(example.case for example in op.examples))
    assert cases
    assert {case.op for case in cases} == {name}


def test_budgets_are_those_of_variants() -> None:
    variants = [name for op in OPS.values() for name in op.variants]
    assert len(set(variants)) == len(variants)
    assert set(json.loads(BUDGETS.read_text())) <= set(variants)


def test_examples_run_without_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_TRITON],
        capture_output=True,
        text=True,
        cwd=BUDGETS.parent.parent,
    )
    assert done.returncode == 0, done.stderr
