"""Hooks of the benchmark suite: its one option, and a record that holds what a comparison needs and no more."""

from __future__ import annotations

import time
from typing import Any

import pytest

from bench import measure

KEPT = ("median", "iqr", "rounds", "iterations")


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


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.clear()  # machine_info names the commit


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for entry in output_json["benchmarks"]:
        kept = {"name": entry["name"], "group": entry["group"], "extra_info": entry["extra_info"]}
        kept["stats"] = {name: entry["stats"][name] for name in KEPT}
        entry.clear()
        entry.update(kept)
