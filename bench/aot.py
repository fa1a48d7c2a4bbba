"""Compiles every Triton and CUDA C++ kernel ahead of time and reports what the compiler made of it. Needs no GPU.

The Triton variants are those that the public launchers ask for: the launchers run on CPU tensors, their launches are
recorded instead of executed, and each record is compiled for each architecture. The CUDA C++ kernels are every
instance in the sources; they need nvcc and are left out with a sentence where it is missing.

    python -m bench.aot                 a table
    python -m bench.aot --json FILE     the same as JSON
    python -m bench.aot --check         fails when a kernel spills or executes more than aot_budgets.json allows

Thread-instructions per cell-step count what one lane executes for one of its cells at one step: the machine code of
one program over the cells of a lane times the steps, where the only loop is the one over episodes; what lies outside of
it is shared out among them. A branch counts as taken. Bytes per cell-step are those that a lane asks for, also where
all lanes ask for the same ones or where they come from a cache; the least is every tensor read or written once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from efe_kernels.advantage.grid_reward import kernels as grid_reward_kernels
from efe_kernels.advantage.policy_gradient_loss import kernels as policy_gradient_loss_kernels
from efe_kernels.advantage.policy_gradient_loss.reference import Inputs as PolicyInputs
from efe_kernels.advantage.policy_gradient_loss.reference import Settings as PolicySettings
from efe_kernels.advantage.rl_advantage import kernels as rl_advantage_kernels
from efe_kernels.advantage.trace import kernels as trace_kernels
from efe_kernels.advantage.trace.reference import Settings as Discounts
from efe_kernels.advantage.trace.reference import Transitions
from efe_kernels.efe_loss import kernels as efe_loss_kernels
from efe_kernels.efe_loss import launch as efe_loss_launch
from efe_kernels.efe_loss.reference import Inputs, Settings

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
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    function: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


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


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel, and the parts of it that are loops."""

    operations: list[str]
    loops: list[list[str]]
    registers: int
    spill_bytes: int

    def accesses(self, *kinds: str) -> dict[int, int]:
        """Bytes of one access of one lane -> how many there are among the operations of these kinds."""
        tokens = [re.split(r"[._]", operation) for operation in self.operations if operation.startswith(kinds)]
        return dict(sorted(Counter(sum(WIDTHS.get(part, 0) for part in parts) or 4 for parts in tokens).items()))


# Access widths in bytes, by the part of an operation's name that tells them; 4 where NVIDIA's says nothing.
WIDTHS = {
    "U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16,
    "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2,
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip
LOADS = {"cuda": ("LDG",), "hip": ("global_load", "buffer_load")}
STORES = {"cuda": ("STG",), "hip": ("global_store", "buffer_store")}


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside, kernel launches are recorded and not executed."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        launches.append(Launch(self, tuple(grid), arguments, options))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


def source(launch: Launch) -> ASTSource:
    """The launch as Triton would compile it: 1 and None as constants, pointers and multiples of 16 aligned."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        is_int = isinstance(value, int) and not isinstance(value, bool)
        specialised = is_int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = ("i32" if value < 2**31 else "i64") if is_int else "fp32"
        if isinstance(value, Tensor) or (specialised and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.function, signature=signature, constexprs=constants, attrs=attributes)


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(BINARIES / name), *arguments], capture_output=True, text=True, check=True).stdout


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9._]+)(.*)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")


def nvidia_code(compiled: Any) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = tool("nvdisasm", "-c", file.name)
        usage = tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump told no resource usage: {usage}")
    operations, loops = operations_of(listing)
    return Code(operations, loops, registers=int(found[1]), spill_bytes=int(found[2]))


def operations_of(listing: str) -> tuple[list[str], list[list[str]]]:
    """The operations of NVIDIA's listing of one kernel, and those of its loops."""
    operations: list[str] = []
    loops: dict[str, list[str]] = {}
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(operations)
        elif instruction := INSTRUCTION.search(line):
            operation, operands = instruction.groups()
            if operation == "NOP":
                continue
            operations.append(operation)
            if operation.startswith("BRA"):
                loops |= loop_closed(operations, labels, operands)
    return operations, [*loops.values()]


def loop_closed(operations: list[str], labels: dict[str, int], target: str) -> dict[str, list[str]]:
    """Label and operations of the loop that the last operation, a branch to `target`, closes, if it does."""
    for label, place in labels.items():
        # Padding behind the end is a branch to itself.
        if re.search(rf"{re.escape(label)}\b", target) and place < len(operations) - 1:
            return {label: operations[place:]}
    return {}


def amd_code(compiled: Any) -> Code:
    listing = compiled.asm["amdgcn"]

    def told(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", listing)[0])

    operations: list[str] = []
    loops: dict[str, list[str]] = {}
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(operations)
        elif instruction := re.match(r"\t([a-z]\w+)\s*(.*)", line):
            operation, operands = instruction.groups()
            operations.append(operation)
            if operation.startswith(("s_cbranch", "s_branch")):
                loops |= loop_closed(operations, labels, operands)
    return Code(operations, [*loops.values()], told("vgpr_count"), told("private_segment_fixed_size"))


def per_cell_step(launch: Launch, code: Code, target: GPUTarget) -> dict[str, float]:
    """Instructions and bytes of one cell at one step, and the bytes of all tensors, each read or written once."""
    arguments = launch.arguments
    episodes = arguments.get("EPISODES", 1)
    if launch.function not in WALKS_OVER_CELLS or len(code.loops) != (episodes > 1):
        return {}
    cells = arguments["TILE"] / (target.warp_size * launch.options["num_warps"]) * arguments["T"]
    body = replace(code, operations=code.loops[0]) if code.loops else code
    outside = 1 / episodes if code.loops else 0.0

    def shared_out(count: Callable[[Code], float]) -> float:
        return (count(body) + outside * (count(code) - count(body))) / cells

    def moved(part: Code) -> float:
        accesses = [part.accesses(*kinds[target.backend]) for kinds in (LOADS, STORES)]
        return sum(width * count for kind in accesses for width, count in kind.items())

    memory = [value.untyped_storage() for value in arguments.values() if isinstance(value, Tensor)]
    least = sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())
    found = {
        "per_cell_step": shared_out(lambda part: len(part.operations)),
        "bytes_per_cell_step": shared_out(moved),
        "least_bytes": least / (arguments["logits_ptr"].shape[0] * arguments["CELLS"] * arguments["T"]),
    }
    return {name: round(value, 1) for name, value in found.items()}


def compile_launch(variant: str, launch: Launch, arch: str) -> Report:
    target = TARGETS[arch]
    if target.backend == "hip" and "APPROX" in launch.arguments:
        launch = replace(launch, arguments={**launch.arguments, "APPROX": False})
    compiled = triton.compile(source(launch), target=target, options=launch.options)
    code = (nvidia_code if target.backend == "cuda" else amd_code)(compiled)
    loads, stores = code.accesses(*LOADS[target.backend]), code.accesses(*STORES[target.backend])
    return Report(
        variant=variant,
        kernel=launch.function.__name__,
        arch=arch,
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=compiled.metadata.shared,
        instructions=len(code.operations),
        **per_cell_step(launch, code, target),
        loads=loads,
        stores=stores,
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
            loads=code.accesses(*LOADS["cuda"]),
            stores=code.accesses(*STORES["cuda"]),
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
    promised: bool = False,
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
    with recorded_launches() as launches:
        if promised:
            outputs, gradients = efe_loss_launch.efe_loss_promised_forward(new(), inputs, settings, needs)
            upstream = efe_loss_launch.Upstream(grad, None, *outputs[-2:])
            efe_loss_launch.efe_loss_promised_backward(inputs, settings, upstream, new(), gradients)
        else:
            outputs = efe_loss_launch.efe_loss_forward(inputs, settings)
            upstream = efe_loss_launch.Upstream(grad, None, *outputs[-2:])
            efe_loss_launch.efe_loss_backward(inputs, settings, upstream, needs)
    return launches


def grid_reward_launches() -> list[Launch]:
    target = torch.zeros(2, 30, 30, dtype=torch.int64)
    channel_last = torch.zeros(2, 30, 30, 10)
    channel_first = torch.zeros(2, 10, 30, 30, dtype=torch.bfloat16).permute(0, 2, 3, 1)
    small, valid = target[:, :7, :13].to(torch.uint8), torch.ones(2, 30, 30, dtype=torch.bool)
    weights = [1.0, 0.5, 0.5, 0.5]
    with recorded_launches() as launches:
        grid_reward_kernels.grid_reward(channel_last, channel_first, target, None, None, weights, 10)
        grid_reward_kernels.grid_reward(channel_last.double(), small, target, valid, torch.zeros(2, 2), weights, 10)
    return launches


def rl_advantage_launches(group_size: int, normalize: str | None, masked: bool = True) -> list[Launch]:
    reward = torch.zeros(max(60000, group_size) if group_size != 4096 else 4096)
    mask = torch.ones(reward.shape, dtype=torch.bool) if masked else None
    arguments = (reward, reward.bfloat16() if masked else reward, mask)
    with recorded_launches() as launches:
        _, statistics = rl_advantage_kernels.rl_advantage_forward(*arguments, 5.0, normalize, group_size)
        rl_advantage_kernels.rl_advantage_backward(reward, *arguments, statistics, 5.0, normalize, group_size)
    return launches


def trace_launches(steps: int, time_major: bool = False) -> list[Launch]:
    flags = torch.zeros(4096, steps, dtype=torch.bool)
    if time_major:
        flags = flags.T.contiguous().T
    with recorded_launches() as launches:
        x, gae = (
            torch.zeros_like(flags, dtype=torch.float32),
            (Transitions(flags, None, None), Discounts(0.99, 0.95, 1.0, 1.0, 1.0)),
        )
        trace_kernels.trace_forward(x, x, x, *gae)
        trace_kernels.trace_backward(x, None, [True, False], *gae)
        x = x.bfloat16()
        vtrace = (Transitions(flags, flags, x), Discounts(0.99, 1.0, 1.0, 1.0, 1.0))
        trace_kernels.trace_forward(x, x, x, *vtrace)
        trace_kernels.trace_backward(x, x, [True, True], *vtrace)
    return launches


def policy_gradient_loss_launches(numel: int, clipped: bool, device: str = "cpu") -> list[Launch]:
    """clipped: the surrogate with a mask in half precision, else the plain score function. meta takes no memory."""
    with torch.device(device):
        x, mask = torch.empty(numel), torch.empty(numel, dtype=torch.bool)
        scalar, diagnostics = torch.ones(()), torch.ones(4)
    if clipped:
        x = x.bfloat16()
    problem = (PolicyInputs(x, x, x, x, *((x, mask) if clipped else (None, None))), PolicySettings(0.2, 0.5, 0.01))
    with recorded_launches() as launches:
        policy_gradient_loss_kernels.policy_gradient_loss_forward(x, *problem)
        for grads in ((scalar, None, None, None), (None, scalar, scalar, scalar)):
            policy_gradient_loss_kernels.policy_gradient_loss_backward(grads, [True] * 3, diagnostics, *problem)
    return launches


VARIANTS: dict[str, Callable[[], list[Launch]]] = {
    "efe_loss bf16 channel-first": partial(efe_loss_launches, torch.bfloat16, True, 0),
    "efe_loss bf16 channel-first prompt": partial(efe_loss_launches, torch.bfloat16, True, 256),
    "efe_loss bf16 channel-last": partial(efe_loss_launches, torch.bfloat16, False, 0),
    "efe_loss bf16 channel-last prompt": partial(efe_loss_launches, torch.bfloat16, False, 256),
    "efe_loss bf16 channel-first promised": partial(efe_loss_launches, torch.bfloat16, True, 0, promised=True),
    "efe_loss bf16 channel-last promised": partial(efe_loss_launches, torch.bfloat16, False, 0, promised=True),
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
        launches = VARIANTS[name]()
    return [compile_launch(name, launch, arch) for launch in launches]


def table(reports: list[Report]) -> str:
    rows = [(
        "variant", "kernel", "arch", "regs", "spill B", "shared B", "instr", "per cell-step", "bytes", "least",
        "loads", "stores",
    )]  # fmt: skip
    for report in reports:
        figures = (
            report.registers, report.spill_bytes, report.shared_bytes, report.instructions, report.per_cell_step,
            report.bytes_per_cell_step, report.least_bytes,
        )  # fmt: skip
        widths = (
            " ".join(f"{count}x{width}B" for width, count in kind.items()) for kind in (report.loads, report.stores)
        )
        told = ("" if figure is None else str(figure) for figure in figures)
        rows.append((report.variant, report.kernel, report.arch, *told, *widths))
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(row, columns, strict=True)).rstrip() for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.aot", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports as JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a budget is exceeded")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS), help="only these architectures")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    options = parser.parse_args(argv)
    tasks = [(name, arch) for name in VARIANTS if options.only in name for arch in options.arch]
    if shutil.which("nvcc") is None:
        print(f"nvcc is not on PATH: {', '.join(CUDA_SOURCES)} left out.", file=sys.stderr)
    else:
        cuda = [arch for arch in options.arch if TARGETS[arch].backend == "cuda"]
        tasks += [(name, arch) for name in CUDA_SOURCES if options.only in name for arch in cuda]
    # The compiler is not safe in one process forked from another that has used it.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        reports = [report for found in pool.map(compile_variant, tasks) for report in found]
    print(table(reports))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
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
