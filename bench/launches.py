"""Records what the Triton launchers launch, without a GPU: the launchers run on CPU tensors and nothing is executed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.check import upstream_of
from bench.ops import CASES, OPS, problem
from bench.ops.entry import Case, Variant
from efe_kernels.common import library

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
    """One recorded kernel launch. which: the pass of the op that it belongs to."""

    function: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    which: str
    sizes: tuple[int, ...]

    def constant(self, name: str) -> Any:
        """A constant by its name, be it an argument or in the tuple `shape`."""
        found = self.arguments[name] if name in self.arguments else getattr(self.arguments["shape"], name)
        return getattr(found, "value", found)


class Recording(list[Launch]):
    """Launches on a problem of these sizes, in their order."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        self.which = "forward"

    def begin(self, which: str) -> None:
        """What is launched from here on belongs to this pass."""
        self.which = which


@contextmanager
def recorded_launches(*sizes: int) -> Iterator[Recording]:
    """Inside, kernel launches are recorded and not executed; sizes as in the name of a case."""
    launches = Recording(sizes)

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        launches.append(Launch(self, tuple(grid), arguments, options, launches.which, sizes))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


def serve_cpu() -> None:
    """From here on the launchers of the Triton kernels serve CPU tensors."""
    for name, served in library.OPS.items():
        if served.triton is not None:
            library.LIBRARY.impl(name, served.triton, "CPU", allow_override=True)


def variant_launches(variant: Variant) -> list[Launch]:
    """Those of a variant of the compile report, through the launchers."""
    with recorded_launches(*variant.sizes) as launches:
        variant.launch(launches.begin)
    return launches


def case_launches(case: Case) -> list[Launch]:
    """Those of a case of the benchmark suite, through the public function."""
    serve_cpu()
    given = problem(case, "cpu")
    with recorded_launches(*case.sizes) as launches:
        results = given.implementations["kernel"](given.inputs)
        if given.leaves:
            launches.begin("backward")
            torch.autograd.grad(results, list(given.leaves.values()), upstream_of(results))
    return launches


VARIANTS = {name: partial(variant_launches, variant) for op in OPS.values() for name, variant in op.variants.items()}
# The large cases of the suite, by the names that they have there: for the projection, not for the budgets.
SUITE = {
    f"{case.name}: kernel": partial(case_launches, case)
    for case in CASES
    if case.workload == "throughput" and OPS[case.op].triton
}


def source(launch: Launch) -> ASTSource:
    """The launch as Triton would compile it: 1 and None as constants, pointers and multiples of 16 aligned, tuples
    element by element."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def type_of(value: Any, place: tuple[int, ...], specialised: bool) -> Any:
        if isinstance(value, tuple):
            types = [type_of(element, (*place, index), specialised) for index, element in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, tl.constexpr) or value is None or (is_int and specialised and value == 1):
            constants[place] = getattr(value, "value", value)
            return "constexpr"
        if isinstance(value, Tensor) or (is_int and specialised and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        return ("i32" if value < 2**31 else "i64") if is_int else "fp32"

    signature = {}
    for index, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        value = tl.constexpr(value) if parameter.is_constexpr else value
        signature[parameter.name] = type_of(value, (index,), not parameter.do_not_specialize)
    return ASTSource(launch.function, signature=signature, constexprs=constants, attrs=attributes)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those of an argument, which may be a tuple of tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for element in value:
            yield from tensors_in(element)


def least_bytes(launch: Launch) -> int:
    """Every element of every tensor once: of a view only its own, of what several share at most the whole of it."""
    views: dict[int, dict[Any, int]] = defaultdict(dict)
    whole: dict[int, int] = {}
    for tensor in tensors_in(tuple(launch.arguments.values())):
        memory = tensor.untyped_storage()
        shared = memory._cdata  # not its address: a meta tensor has none
        elements = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        place = (tensor.storage_offset(), tensor.shape, tensor.stride())
        views[shared][place] = elements * tensor.element_size()
        whole[shared] = memory.nbytes()
    return sum(min(whole[memory], sum(found.values())) for memory, found in views.items())


def loop_trips(launch: Launch) -> list[int]:
    """Trips of the kernel's loops that go on after the first, a loop after those inside it; all are constants of it.

    The compilers leave these loops as they are or unroll them entirely.
    """
    name = launch.function.__name__
    trips = [op.loops[name](launch) for op in OPS.values() if name in op.loops]
    return [count for count in (trips[0] if trips else ()) if count > 1]
