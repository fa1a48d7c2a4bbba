"""The plugin under which `make emulate` runs tests/prompt does not let other kernels serve."""

from __future__ import annotations

import subprocess
import sys

from tests.emulated.build import CSRC


def test_the_plugin_refuses_kernels_that_are_not_emulated() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.emulated.served", "--collect-only", "tests/prompt"]
    done = subprocess.run(command, cwd=CSRC.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "masked_mean_pool_forward is not served by the emulated CUDA kernels here" in done.stdout + done.stderr
