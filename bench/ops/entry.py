"""What an entry of the registry is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Results = tuple[Tensor, ...]
Sizes = tuple[int, ...]
Implementation = Callable[[Inputs], Results]
Passes = tuple[str, ...]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES: Passes = ("forward", "backward", "both")
FORWARD: Passes = ("forward",)
EAGER = ("eager",)
COMPILED = ("eager", "compile")
REFERENCE = "reference"
UPSTREAM = 1024.0
"""The gradient that arrives at a loss: a loss scale, without which fp16 gradients of a mean are flushed to zero."""
# Relative error in norm against float64: the arithmetic is float32, a result or gradient is rounded once to its dtype
# (2^-9 in bf16, 2^-12 in fp16), and fp16 gradients far below the largest are subnormal.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}


@dataclass(frozen=True)
class Case:
    """One op on one named workload.

    workload: `seed` is a single episode, `train` a batch of 64, `throughput` one of 4096, `update` a buffer of 256
        rollouts. `ragged` has sizes that divide by nothing and cells or steps that do not count, `scattered` has these
        anywhere, `full` has none of them.
    sizes: B and what follows it, as the op's shapes name them.
    terms: what of the op is asked for, in the words of its entry.
    opponents: peers beside the kernel.
    """

    op: str
    workload: str
    sizes: Sizes
    dtype: str = "fp32"
    layout: str = ""
    terms: str = ""
    opponents: tuple[str, ...] = EAGER
    gpu_only: bool = False

    @property
    def name(self) -> str:
        details = (self.op, self.terms, self.workload, "x".join(map(str, self.sizes)), self.dtype, self.layout)
        return " ".join(detail for detail in details if detail)


Run = Callable[[Case, Inputs], Results]


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    passes: those it has, and those that are not too slow to be timed three times.
    compiled: it is timed through torch.compile.
    gpu: it is timed on a GPU only. module: a package that it needs.
    triton: it has Triton kernels, which the smoke run checks.
    """

    run: Run
    passes: Passes = PASSES
    compiled: bool = False
    gpu: bool = False
    module: str = ""
    triton: bool = False


def plain(run: Run, reference: Run | None = None, compiled: Passes = PASSES) -> dict[str, Peer]:
    """Plain PyTorch written for speed, as it stands and through torch.compile, and the reference, which serves where no
    kernel does. compiled: the passes of torch.compile. reference: where it is not itself written for speed."""
    fallback = {} if reference is None else {REFERENCE: Peer(reference)}
    return {"eager": Peer(run), "compile": Peer(run, compiled, compiled=True), **fallback}


@dataclass(frozen=True)
class Example:
    """Small float32 inputs with tails, each a tensor or None, for tests that treat all ops alike."""

    case: Case

    @property
    def name(self) -> str:
        return ", ".join(detail for detail in (self.case.op, self.case.terms) if detail)


@dataclass(frozen=True)
class Variant:
    """Launches of one forward and backward for the compile report, on a problem of these sizes.

    launch: calls the launchers of the Triton kernels on CPU tensors; begins the passes after the first one by name.
    """

    sizes: Sizes
    launch: Callable[[Callable[[str], None]], None]


def at_most_33(sizes: Sizes) -> Sizes:
    return tuple(min(size, 33) for size in sizes)


@dataclass(frozen=True)
class Op:
    """One entry.

    inputs: of a case, on the default device. kernel: our public function. reference: the definition, in whatever dtype
        its inputs have. peers: other implementations, by the names that cases call them.
    reads: the least bytes of inputs that forward and backward must read.
    headline: cases that goals are set on, measured first in case the time runs out; cases: the others.
    examples: for tests that treat all ops alike.
    passes: those that the op has. tolerance: relative error in norm against float64, by dtype.
    small: sizes of the smoke run for those of a case; they are small and divide by nothing.
    triton: Triton kernels serve it: its launches are counted, compiled, projected.
    variants: of the compile report; `aot_budgets.json` holds what each may cost.
    loops: of a kernel by its name, how many more trips its loops make after the first, a loop after those inside it;
        `launch.constant` gives the constants that they depend on. A kernel that is not named has no such loop, or one
        whose trips depend on the program.
    host: cases beside `seed` whose time on the host is measured.
    swept: takes [B, T] and is timed against both. trace: no result at a step depends on an earlier one.
    """

    name: str
    inputs: Callable[[Case], Inputs]
    kernel: Run
    reference: Run
    peers: dict[str, Peer]
    reads: Callable[[Inputs], tuple[int, int]]
    headline: tuple[Case, ...] = ()
    cases: tuple[Case, ...] = ()
    examples: tuple[Example, ...] = ()
    passes: Passes = PASSES
    tolerance: dict[str, float] = field(default_factory=lambda: TOLERANCE)
    small: Callable[[Sizes], Sizes] = at_most_33
    triton: bool = False
    variants: dict[str, Variant] = field(default_factory=dict)
    loops: dict[str, Callable[[Any], tuple[int, ...]]] = field(default_factory=dict)
    host: tuple[Case, ...] = ()
    swept: bool = False
    trace: bool = False


@dataclass(frozen=True)
class Problem:
    """One case's inputs, and what computes on them. implementations: by name; "kernel" is ours."""

    inputs: Inputs
    reference: Implementation
    implementations: dict[str, Implementation]
    forward_reads: int
    backward_reads: int
    leaves: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaves", leaves_of(self.inputs))


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    """What a gradient is asked for: inputs that require one, and parameters of modules among the inputs."""
    found = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    for value in inputs.values():
        if isinstance(value, nn.Module):
            found |= {name: parameter for name, parameter in value.named_parameters() if parameter.requires_grad}
    return found


def size_of(inputs: Inputs, *names: str) -> int:
    """Bytes of the named inputs, of all tensors without names."""
    tensors = (inputs[name] for name in names or inputs)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def everything_twice(inputs: Inputs) -> tuple[int, int]:
    """Both passes read all inputs."""
    return size_of(inputs), size_of(inputs)


def laid_out(layout: str, *shape: int) -> Tensor:
    """Random [..., H, W, C] in the memory order of the layout."""
    *outer, height, width, outcomes = shape
    if layout == "channel-first":
        return torch.randn(*outer, outcomes, height, width).movedim(-3, -1)
    return torch.randn(shape)


def valid_cells(workload: str, batch: int, height: int, width: int) -> Tensor:
    """bool [B, H, W]: all, on the ragged workload a top-left rectangle of its own for each episode."""
    if workload == "scattered":
        return torch.rand(batch, height, width) < 0.7
    if workload != "ragged":
        return torch.ones(batch, height, width, dtype=torch.bool)
    heights = torch.randint(1, height + 1, (batch, 1, 1))
    widths = torch.randint(1, width + 1, (batch, 1, 1))
    return (torch.arange(height)[:, None] < heights) & (torch.arange(width) < widths)


def flags(case: Case, share: float) -> Tensor | None:
    """bool of the case's sizes, true for that share of them, where something does not count; else None."""
    return torch.rand(case.sizes) < share if case.workload in ("ragged", "scattered") else None


def empties(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors of their own memory, because what two arguments share is counted once."""
    return [torch.empty(shape, dtype=dtype) for _ in range(count)]
