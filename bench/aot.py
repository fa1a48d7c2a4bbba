"""Compiles every Triton and CUDA C++ kernel ahead of time and reports what the compiler made of it. Needs no GPU.

The Triton variants are those that the public launchers ask for: the launchers run on CPU tensors, their launches are
recorded instead of executed, and each record is compiled for each architecture. The CUDA C++ kernels are every
instance in the sources; they need nvcc and are left out with a sentence where it is missing.

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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bench import projection
from bench.launches import SUITE, Launch, least_bytes, loop_trips, recorded_launches, source
from bench.machine_code import LOADS, SPECIAL, STORES, Code, amd_code, nvidia_code, operations_of, tool, width_of
from bench.render import columns
from efe_kernels.advantage import kernels as rl_advantage_kernels
from efe_kernels.efe_loss import kernels as efe_loss_kernels
from efe_kernels.efe_loss import launch as efe_loss_launch
from efe_kernels.efe_loss.reference import Inputs, Settings
from efe_kernels.policy_loss import kernels as policy_gradient_loss_kernels
from efe_kernels.policy_loss.reference import Inputs as PolicyInputs
from efe_kernels.policy_loss.reference import Settings as PolicySettings
from efe_kernels.returns import kernels as trace_kernels
from efe_kernels.returns.reference import Settings as Discounts
from efe_kernels.returns.reference import Transitions
from efe_kernels.reward import kernels as grid_reward_kernels

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
    upstream = launch.arguments.get("upstream")
    if launch.function in WALKS_OVER_CELLS and upstream is not None and upstream.grad_scale is not None:
        least = least_bytes(replace(launch, arguments={"read": (upstream.grad_total, upstream.grad_scale)}))
        return {"launch_bytes": least, "not_projected": "returns at once where grad_scale came true"}
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
    if target.backend == "hip" and hasattr(shape, "APPROX"):
        launch = replace(launch, arguments={**launch.arguments, "shape": shape._replace(APPROX=tl.constexpr(False))})
    compiled = triton.compile(source(launch), target=target, options=launch.options)
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


def empty_plan(dtype: torch.dtype, channel_first: bool, batch: int = 4096, steps: int = 5, side: int = 30) -> Tensor:
    if channel_first:
        return torch.empty(batch, steps, 10, side, side, dtype=dtype).movedim(2, -1)
    return torch.empty(batch, steps, side, side, 10, dtype=dtype)


def efe_loss_launches(
    dtype: torch.dtype,
    channel_first: bool,
    prompt_dim: int,
    separate: bool = False,
    everything: bool = False,
    grad_scale: bool = False,
) -> list[Launch]:
    """The launches of one forward and backward of the loss. prompt_dim 0: without a prompt."""
    logits = empty_plan(dtype, channel_first)
    batch, _, height, width, outcomes = logits.shape

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    inputs = Inputs(
        logits,
        empty_plan(dtype, channel_first) if separate else None,
        logits[:, -1] if everything else None,
        empty_plan(dtype, channel_first) if everything else None,
        new(height, width, outcomes),
        new(batch, prompt_dim) if prompt_dim else None,
        new(outcomes, prompt_dim) if prompt_dim else None,
        new(batch, height, width, dtype=torch.int64),
        new(height, width, outcomes) if prompt_dim else None,
        new(batch, height, width, dtype=torch.bool),
    )
    settings = Settings([1.0, 0.0, 2.0, 0.5, 0.2, 0.3, 0.1], True, 0.0, 900, -100)
    needs = [tensor is not None for tensor in inputs[:7]]
    grad = new(1).expand(batch)
    with recorded_launches(*logits.shape) as launches:
        if grad_scale:
            outputs, ahead = efe_loss_launch.fused_forward(new(), inputs, settings, needs)
            launches.begin("backward")
            efe_loss_launch.fused_backward(grad, new(), inputs, settings, *outputs[-2:], ahead)
        else:
            outputs = efe_loss_launch.efe_loss_forward(inputs, settings)
            launches.begin("backward")
            efe_loss_launch.efe_loss_backward(grad, None, inputs, settings, *outputs[-2:], needs)
    return launches


def grid_reward_launches(batch: int = 4096) -> list[Launch]:
    target = torch.empty(batch, 30, 30, dtype=torch.int64)
    channel_last = torch.empty(batch, 30, 30, 10)
    channel_first = torch.empty(batch, 10, 30, 30, dtype=torch.bfloat16).permute(0, 2, 3, 1)
    double = torch.empty(batch, 30, 30, 10, dtype=torch.float64)
    small = torch.empty(batch, 7, 13, dtype=torch.uint8)
    valid = torch.empty(batch, 30, 30, dtype=torch.bool)
    weights = [1.0, 0.5, 0.5, 0.5]
    with recorded_launches(*channel_last.shape) as launches:
        grid_reward_kernels.grid_reward(channel_last, channel_first, target, None, None, weights, 10)
        launches.begin("forward of colours")
        grid_reward_kernels.grid_reward(double, small, target, valid, torch.empty(2, batch), weights, 10)
    return launches


def empties(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors of their own memory, because what two arguments share is counted once."""
    return [torch.empty(shape, dtype=dtype) for _ in range(count)]


def rl_advantage_launches(group_size: int, normalize: str | None, masked: bool = True) -> list[Launch]:
    grad, reward, value = empties(3, 4096 if group_size == 4096 else max(60000, group_size))
    mask = torch.empty(reward.shape, dtype=torch.bool) if masked else None
    arguments = (reward, value.bfloat16() if masked else value, mask)
    with recorded_launches(*reward.shape) as launches:
        _, statistics = rl_advantage_kernels.rl_advantage_forward(*arguments, 5.0, normalize, group_size)
        launches.begin("backward")
        rl_advantage_kernels.rl_advantage_backward(grad, *arguments, statistics, 5.0, normalize, group_size)
    return launches


def trace_launches(steps: int, time_major: bool = False) -> list[Launch]:
    def new(count: int, dtype: torch.dtype) -> list[Tensor]:
        if time_major:
            return [tensor.T for tensor in empties(count, steps, 4096, dtype=dtype)]
        return empties(count, 4096, steps, dtype=dtype)

    terminated, truncated = new(2, torch.bool)
    gae = (Transitions(terminated, None, None), Discounts(0.99, 0.95, 1.0, 1.0, 1.0))
    value, next_value, reward, grad = new(4, torch.float32)
    with recorded_launches(4096, steps) as launches:
        launches.begin("gae forward")
        trace_kernels.trace_forward(value, next_value, reward, *gae)
        launches.begin("gae backward")
        trace_kernels.trace_backward(grad, None, [True, False], *gae)
        value, next_value, reward, grad, grad_target, log_ratio = new(6, torch.bfloat16)
        vtrace = (Transitions(terminated, truncated, log_ratio), Discounts(0.99, 1.0, 1.0, 1.0, 1.0))
        launches.begin("vtrace forward")
        trace_kernels.trace_forward(value, next_value, reward, *vtrace)
        launches.begin("vtrace backward")
        trace_kernels.trace_backward(grad, grad_target, [True, True], *vtrace)
    return launches


def policy_gradient_loss_launches(numel: int, clipped: bool, device: str = "cpu") -> list[Launch]:
    """clipped: the surrogate with a mask in half precision, else the plain score function. meta takes no memory."""
    with torch.device(device):
        entropy, *inputs, old_log_prob = empties(6, numel, dtype=torch.bfloat16 if clipped else torch.float32)
        options = (old_log_prob, torch.empty(numel, dtype=torch.bool)) if clipped else (None, None)
        (total, *parts), diagnostics = empties(4), torch.empty(4)
    problem = (PolicyInputs(*inputs, *options), PolicySettings(0.2, 0.5, 0.01))
    with recorded_launches(numel) as launches:
        policy_gradient_loss_kernels.policy_gradient_loss_forward(entropy, *problem)
        for which, grads in (("backward", (total, None, None, None)), ("backward of the parts", (None, *parts))):
            launches.begin(which)
            policy_gradient_loss_kernels.policy_gradient_loss_backward(grads, [True] * 3, diagnostics, *problem)
    return launches


VARIANTS: dict[str, Callable[[], list[Launch]]] = {
    "efe_loss bf16 channel-first": partial(efe_loss_launches, torch.bfloat16, True, 0),
    "efe_loss bf16 channel-first prompt": partial(efe_loss_launches, torch.bfloat16, True, 256),
    "efe_loss bf16 channel-last": partial(efe_loss_launches, torch.bfloat16, False, 0),
    "efe_loss bf16 channel-last prompt": partial(efe_loss_launches, torch.bfloat16, False, 256),
    "efe_loss bf16 channel-first grad_scale": partial(efe_loss_launches, torch.bfloat16, True, 0, grad_scale=True),
    "efe_loss bf16 channel-last grad_scale": partial(efe_loss_launches, torch.bfloat16, False, 0, grad_scale=True),
    "efe_loss fp32 channel-first prompt": partial(efe_loss_launches, torch.float32, True, 256),
    "efe_loss fp32 channel-last prompt": partial(efe_loss_launches, torch.float32, False, 256),
    "efe_loss fp16 channel-first two plans": partial(efe_loss_launches, torch.float16, True, 256, separate=True),
    "efe_loss fp32 channel-first everything": partial(
        efe_loss_launches, torch.float32, True, 256, separate=True, everything=True
    ),
    "grid_reward": grid_reward_launches,
    "rl_advantage": partial(rl_advantage_launches, 0, "tanh"),
    "rl_advantage without mask": partial(rl_advantage_launches, 0, "clamp", masked=False),
    "rl_advantage small groups": partial(rl_advantage_launches, 8, "clamp"),
    "rl_advantage one tile": partial(rl_advantage_launches, 4096, "tanh"),
    "rl_advantage several tiles": partial(rl_advantage_launches, 30000, "tanh"),
    "rl_advantage several tiles without mask": partial(rl_advantage_launches, 30000, None, masked=False),
    "rl_advantage parts": partial(rl_advantage_launches, 60000, "tanh"),
    "rl_advantage many parts": partial(rl_advantage_launches, 2**20, "tanh"),
    "gae and vtrace serial": partial(trace_launches, 8),
    "gae and vtrace serial longest": partial(trace_launches, 32),
    "gae and vtrace serial time-major": partial(trace_launches, 32, time_major=True),
    "gae and vtrace scan shortest": partial(trace_launches, 33),
    "gae and vtrace scan": partial(trace_launches, 1500),
    "gae and vtrace scan time-major": partial(trace_launches, 1500, time_major=True),
    "policy_gradient_loss one block": partial(policy_gradient_loss_launches, 64, False),
    "policy_gradient_loss one block clipped": partial(policy_gradient_loss_launches, 4096, True),
    "policy_gradient_loss": partial(policy_gradient_loss_launches, 100000, False),
    "policy_gradient_loss clipped": partial(policy_gradient_loss_launches, 100000, True),
    "policy_gradient_loss 33 M": partial(policy_gradient_loss_launches, 2**25, False, device="meta"),
    "policy_gradient_loss 134 M": partial(policy_gradient_loss_launches, 2**27, True, device="meta"),
    "policy_gradient_loss 8.6 G": partial(policy_gradient_loss_launches, 2**33, False, device="meta"),
}


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
