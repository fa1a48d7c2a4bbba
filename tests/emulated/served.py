"""A pytest plugin (`-p tests.emulated.served`): every emulated CUDA kernel serves what runs under it."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path

import pytest
import torch

import efe_kernels  # noqa: F401  (declares the ops and loads their kernels)
from tests.emulated.translate import join, kernels

ROOT = Path(__file__).resolve().parents[2]
OPS = ("masked_mean_pool", "refine_prompt", "squashed_log_prob")


def launches() -> dict[str, int]:
    """How often each kernel was launched on the emulator since the extension was loaded."""
    count = ctypes.CDLL(importlib.import_module("efe_kernels._C").__file__).cuda_emulator_launches
    count.argtypes, count.restype = [ctypes.c_char_p], ctypes.c_int64
    return {name: count(name.encode()) for name in kernels(join(ROOT / "csrc"))}


def pytest_sessionstart() -> None:
    for op in (f"efe::{op}_{direction}" for op in OPS for direction in ("forward", "backward")):
        lines = torch._C._dispatch_dump(op).splitlines()
        serving = next((line for line in lines if line.startswith("CPU:")), "CPU: nothing")
        if "csrc/prompt/cuda_ops.cpp" not in serving:
            pytest.exit(f"{op} is not served by the emulated CUDA kernels here, but by {serving!r}.", returncode=1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"Launches on the emulator: {launches()}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    idle = [name for name, count in launches().items() if count == 0]
    if idle:
        print(f"These kernels were never launched on the emulator: {', '.join(idle)}.")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
