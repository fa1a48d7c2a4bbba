"""Compiles every Triton and CUDA C++ kernel ahead of time and reports what the compiler made of it. Needs no GPU.

The Triton variants are those of the registry, which the public launchers ask for: the launchers run on CPU tensors,
their launches are recorded instead of executed, and each record is compiled for each architecture. The CUDA C++ kernels
are every instance in the sources; they need nvcc and are left out with a sentence where it is missing.

    python -m bench.aot                 a table
    python -m bench.aot --json FILE     the same as JSON
    python -m bench.aot --check         fails when a kernel spills or executes more than aot_budgets.json allows
    python -m bench.aot --projection    how long the launches, and those of the suite's large cases, must take at least

See bench.projection for what is in these times. Another release of Triton is taken from its folder, as make aot-oldest
does: PYTHONPATH=build/triton-3.5 python -m bench.aot.

Thread-instructions per cell-step count what one lane executes for one of its cells at one step: the machine code of
one program, its loops as often as they are gone through, over the cells of a lane times the steps and episodes. A
branch counts as taken. Bytes per cell-step are those that a lane asks for, also where all lanes ask for the same ones
or where they come from a cache; the least is every tensor read or written once.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from bench import projection
from bench.launches import SUITE, VARIANTS, Launch, least_bytes, loop_trips, source
from bench.machine_code import LOADS, SPECIAL, STORES, Code, amd_code, nvidia_code, operations_of, tool, width_of
from bench.render import columns
from efe_kernels.efe_loss import kernels as efe_loss_kernels
from efe_kernels.efe_loss import launch as efe_loss_launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
if "amd" not in triton.backends.backends:  # not every wheel of Triton has that compiler
    del TARGETS["gfx942"]
WALKS_OVER_CELLS = (efe_loss_kernels.efe_loss_forward_kernel, efe_loss_kernels.efe_loss_backward_kernel)
BUDGETS = Path(__file__).with_name("aot_budgets.json")
CSRC = Path(__file__).resolve().parent.parent / "csrc"
CUDA_SOURCES = {str(path.relative_to(CSRC.parent)): path for path in sorted(CSRC.glob("*/*.cu"))}


@dataclass(frozen=True)
class Report:
    variant: str
    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    loads: dict[int, int]  # bytes of one access of one lane -> how many
    stores: dict[int, int]
    per_cell_step: float | None = None
    bytes_per_cell_step: float | None = None
    least_bytes: float | None = None
    # Of the whole launch; see bench.projection.
    which: str = ""
    sizes: tuple[int, ...] = ()
    launch_bytes: int = 0
    lane_instructions: int | None = None
    special_functions: int | None = None
    not_projected: str = ""


def per_cell_step(launch: Launch, code: Code, executions: list[int] | None, target: GPUTarget) -> dict[str, float]:
    """Instructions and bytes of one cell at one step, and the bytes of all tensors, each read or written once."""
    if launch.function not in WALKS_OVER_CELLS or executions is None:
        return {}
    cells = launch.constant("TILE") / (target.warp_size * launch.options["num_warps"])
    cell_steps = cells * launch.constant("T") * launch.arguments.get("EPISODES", 1)
    batch = launch.arguments["inputs"].logits.ptr.shape[0]
    accesses = LOADS[target.backend] + STORES[target.backend]
    executed = zip(code.operations, executions, strict=True)
    moved = sum(width_of(operation) * times for operation, times in executed if operation.startswith(accesses))
    found = {
        "per_cell_step": sum(executions) / cell_steps,
        "bytes_per_cell_step": moved / cell_steps,
        "least_bytes": least_bytes(launch) / (batch * launch.constant("CELLS") * launch.constant("T")),
    }
    return {name: round(value, 1) for name, value in found.items()}


def whole_launch(launch: Launch, code: Code, executions: list[int] | None, lanes: int, backend: str) -> dict[str, Any]:
    """What all programs of a launch, of so many lanes each, move at least and execute."""
    least = least_bytes(launch)
    if executions is None:
        return {"launch_bytes": least, "not_projected": "loops: not projected"}
    lanes *= math.prod(launch.grid)
    executed = zip(code.operations, executions, strict=True)
    special = sum(times for operation, times in executed if operation.startswith(SPECIAL[backend]))
    return {"launch_bytes": least, "lane_instructions": sum(executions) * lanes, "special_functions": special * lanes}


def compile_launch(variant: str, launch: Launch, arch: str) -> Report:
    target = TARGETS[arch]
    shape = launch.arguments.get("shape")
    if target.backend == "hip" and shape is not None:  # it has none of the assembly
        without = {name: tl.constexpr(0) for name in ("APPROX", "PACK") if name in shape._fields}
        launch = replace(launch, arguments={**launch.arguments, "shape": shape._replace(**without)})
    options = {name: value for name, value in launch.options.items() if target.backend == "cuda" or name != "maxnreg"}
    compiled = triton.compile(source(launch), target=target, options=options)
    code = (nvidia_code if target.backend == "cuda" else amd_code)(compiled)
    executions = code.executions(loop_trips(launch))
    lanes = compiled.metadata.num_warps * target.warp_size
    return Report(
        variant=variant,
        kernel=launch.function.__name__,
        arch=arch,
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=compiled.metadata.shared,
        instructions=len(code.operations),
        loads=code.accesses(LOADS[target.backend]),
        stores=code.accesses(STORES[target.backend]),
        **per_cell_step(launch, code, executions, target),
        which=launch.which,
        sizes=launch.sizes,
        **whole_launch(launch, code, executions, lanes, target.backend),
    )


PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:[^\n]* (\d+) bytes smem)?",
    re.DOTALL,
)


def compile_cuda(variant: str, arch: str) -> list[Report]:
    """Every kernel of a CUDA C++ source, one report for each instance of its template."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = ["nvcc", "-std=c++20", "-O3", f"-arch={arch}", "-Xptxas", "-v", f"-I{CSRC}", "-cubin", "-o", cubin]
        told = subprocess.run([*command, CUDA_SOURCES[variant]], capture_output=True, text=True, check=True).stderr
        listing = tool("nvdisasm", "-c", str(cubin))
    sections = dict(section.split(",", 1) for section in listing.split("\t.section\t.text.")[1:])
    reports = []
    for name, spill_stores, spill_loads, registers, shared in PTXAS.findall(told):
        operations, loops = operations_of(sections[name])
        code = Code(operations, loops, int(registers), int(spill_stores) + int(spill_loads))
        readable = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
        kernel = re.search(r"\w+<[^>]*>(?=\()", readable)
        report = Report(
            variant=variant,
            kernel=kernel[0] if kernel else name,
            arch=arch,
            registers=code.registers,
            spill_bytes=code.spill_bytes,
            shared_bytes=int(shared or 0),
            instructions=len(operations),
            loads=code.accesses(LOADS["cuda"]),
            stores=code.accesses(STORES["cuda"]),
        )
        reports.append(report)
    return reports


def compile_variant(task: tuple[str, str]) -> list[Report]:
    name, arch = task
    if name in CUDA_SOURCES:
        return compile_cuda(name, arch)
    lanes = patch.object(efe_loss_launch, "LANES", TARGETS[arch].warp_size)
    with lanes, patch.dict(efe_loss_launch.LAYOUTS, clear=True):
        launches = (VARIANTS | SUITE)[name]()
    return [compile_launch(name, launch, arch) for launch in launches]


def table(reports: list[Report]) -> str:
    rows = [[
        "variant", "kernel", "arch", "regs", "spill B", "shared B", "instr", "per cell-step", "bytes", "least",
        "loads", "stores",
    ]]  # fmt: skip
    for report in reports:
        figures = (
            report.registers, report.spill_bytes, report.shared_bytes, report.instructions, report.per_cell_step,
            report.bytes_per_cell_step, report.least_bytes,
        )  # fmt: skip
        widths = (
            " ".join(f"{count}x{width}B" for width, count in kind.items()) for kind in (report.loads, report.stores)
        )
        told = ("" if figure is None else str(figure) for figure in figures)
        rows.append([report.variant, report.kernel, report.arch, *told, *widths])
    return columns(rows, False)


def tasks_of(options: argparse.Namespace) -> list[tuple[str, str]]:
    """What is to be compiled, and for which architecture."""
    variants = VARIANTS | SUITE if options.projection else VARIANTS
    tasks = [(name, arch) for name in variants if options.only in name for arch in options.arch]
    if options.no_cuda:
        return tasks
    if shutil.which("nvcc") is None:
        print(f"nvcc is not on PATH: {', '.join(CUDA_SOURCES)} left out.", file=sys.stderr)
        return tasks
    cuda = [arch for arch in options.arch if TARGETS[arch].backend == "cuda"]
    return tasks + [(name, arch) for name in CUDA_SOURCES if options.only in name for arch in cuda]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.aot", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports and the projection as JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a budget is exceeded")
    parser.add_argument(
        "--projection", action="store_true", help=f"the times to expect instead of the table, for {projection.ARCH}"
    )
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS), help="only these architectures")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA C++ kernels out")
    options = parser.parse_args(argv)
    if options.projection:
        options.arch, options.no_cuda = [projection.ARCH], True
    # The compiler is not safe in one process forked from another that has used it.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        reports = [report for found in pool.map(compile_variant, tasks_of(options)) for report in found]
    expected = projection.projections(reports)
    print(f"Triton {triton.__version__}")
    print(projection.table(expected) if options.projection else table(reports))
    if options.json is not None:
        found = {
            "triton": triton.__version__,
            "reports": [asdict(report) for report in reports],
            "projection": [asdict(launch) | {"bound": launch.bounds()} for launch in expected],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    excesses = [excess for report in reports for excess in over_budget(report)]
    for excess in excesses:
        print(excess, file=sys.stderr)
    return 1 if options.check and excesses else 0


def over_budget(report: Report) -> Iterator[str]:
    """What of the report is worse than it may be, a sentence each."""
    name = f"{report.kernel} of {report.variant} on {report.arch}"
    budgets = json.loads(BUDGETS.read_text()).get(report.variant, {})
    if report.spill_bytes > budgets.get("spill_bytes", {}).get(report.arch, 0):
        yield f"{name} spills {report.spill_bytes} bytes."
    budget = budgets.get(report.kernel)
    if budget is None or report.arch != "sm_90":
        return
    if report.per_cell_step is None or report.per_cell_step > budget:
        yield f"{name} executes {report.per_cell_step} thread-instructions per cell-step, its budget is {budget}."


if __name__ == "__main__":
    sys.exit(main())
