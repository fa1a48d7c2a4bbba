"""Hooks of the benchmark suite: its one option, and where it runs. `bench.record` keeps what it writes."""

from __future__ import annotations

import time
from typing import Any

import pytest

from bench import measure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-minutes", type=float, default=None, metavar="M", help="leave out what is not begun after M minutes"
    )


@pytest.fixture(scope="session")
def deadline(pytestconfig: pytest.Config) -> float:
    minutes = pytestconfig.getoption("--bench-minutes")
    return float("inf") if minutes is None else time.monotonic() + 60 * minutes


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(measure.machine())
