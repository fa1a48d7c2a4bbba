"""The host's part of a call on CUDA, measured without a GPU: launches, and the time until the last one is on its way.

    python -m bench.host

The launchers of the Triton kernels run on CPU tensors, compile as for an H100, and hand their launches to a driver that
executes none. What is timed is all of Python, autograd and the dispatcher at batch 1, where nothing else counts; what
the CUDA runtime takes for a launch, a few microseconds each, is not in it.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.check import prepared
from bench.launches import serve_cpu
from bench.measure import host_times
from bench.ops import CASES, OPS, problem
from bench.ops.entry import Case
from bench.render import columns

ROUNDS = 2000
WORKLOAD = "seed"


class Idle:
    """As Triton sees a driver. It stands in for the driver's utilities as well."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """Module, function, registers, spills and the most threads of a block."""
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, *_: Any) -> Any:
        return self.launch

    def launch(self, *_: Any) -> None:
        self.launches += 1


def measure(case: Case, idle: Idle) -> list[str]:
    given = problem(case, "cpu")
    row = [case.op, case.terms]
    for which in ("forward", "both") if given.leaves else ("forward",):
        setup = prepared(given.implementations["kernel"], given, which)
        setup()()  # compiles
        before = idle.launches
        setup()()
        launches = idle.launches - before
        row += [str(launches), f"{host_times(setup, ROUNDS).median * 1e6:.0f} us"]
    return row


def main() -> int:
    idle = Idle()
    driver.set_active(idle)
    serve_cpu()
    torch.set_num_threads(1)
    rows = [["op", "terms", "launches of forward", "time", "of forward and backward", "time"]]
    cases = [case for case in CASES if case.workload == WORKLOAD and OPS[case.op].triton]
    cases += [case for op in OPS.values() for case in op.host]
    rows += [measure(case, idle) for case in cases]
    width = max(map(len, rows))
    print(columns([row + [""] * (width - len(row)) for row in rows], False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
