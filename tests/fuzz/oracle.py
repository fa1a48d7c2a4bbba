"""What must hold of every call: the definition's result within the error budget, or a documented error."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.served_by import references

# How often the error that one unit in the last place of the inputs causes: sums of up to some thousand elements are
# rounded as often as there are elements to a lane.
UNITS = 64
DIRECTIONS = 4
REFUSED = (TypeError, ValueError)


@dataclass(frozen=True)
class Function:
    """A public function under test.

    call: takes the arguments of a case. definition: the same in plain PyTorch, in the dtype of its inputs; None: the
        references of the ops behind the function.
    constants: floating-point arguments through which no gradient flows.
    addends: magnitude of what is added up inside, whatever the size of the result, such as a logarithm of 10 outcomes.
    loss: its gradients say nothing where a result of it is not finite.
    plain: it is made of PyTorch's own matrix products, whose backward autocast changes, and which are folded otherwise
        where no gradient is asked.
    governs: the argument whose dtype decides on the arithmetic, where it is not that of the result.
    """

    name: str
    call: Callable[..., Any]
    definition: Callable[..., Any] | None = None
    constants: tuple[str, ...] = ()
    addends: float = 0.0
    loss: bool = False
    plain: bool = False
    governs: str = ""


@dataclass(repr=False)
class Case:
    """One call. upstream: which results get a gradient, by the bits, and the seed of its values."""

    arguments: dict[str, Any]
    fault: str | None
    upstream: int = 1
    seed: int = 0
    again: str = "plain"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a failing case."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={described(value)}" for name, value in self.arguments.items())
        return f"Case({told}, fault={self.fault!r}, upstream={self.upstream}, seed={self.seed}, again={self.again!r})"


@dataclass
class Found:
    """Results by name, and gradients by the name of the argument; None where autograd reports none."""

    results: dict[str, Tensor]
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    upstream: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        gradients = {f"gradient of {name}": tensor for name, tensor in self.gradients.items() if tensor is not None}
        return self.results | gradients


def described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    grad = ", grad" if value.requires_grad else ""
    if value.device.type == "meta" or value.layout != torch.strided:
        return f"<{value.dtype} {list(value.shape)} {value.device} {value.layout}>"
    values = f" {value.tolist()}" if value.numel() <= 8 else ""
    return f"<{str(value.dtype)[6:]} {list(value.shape)} strides {list(value.stride())}{grad}{values}>"


def check(function: Function, case: Case) -> str:
    """Fails where the call does not keep its contract. Returns "in contract" or "refused"."""
    before = {name: bits_of_memory(value) for name, value in case.arguments.items() if is_dense(value)}
    try:
        found = run(function.call, case, case.arguments)
    except REFUSED as error:
        check_refusal(function, case, error)
        return "refused"
    finally:
        for name, memory in before.items():
            assert torch.equal(memory, bits_of_memory(case.arguments[name])), f"{name} has changed"
    assert case.fault is None, f"{case.fault} was taken"
    same, exact, moved = definitions(function, case, found)
    assert found.results.keys() == exact.results.keys()
    broken = function.loss and not all(result.isfinite().all() for result in exact.results.values())
    expected, inexact = exact.tensors(), same.tensors()
    for name, gradient in found.gradients.items():
        if name in function.constants:
            assert gradient is None, f"gradient of {name}: {gradient}"
        elif gradient is None:
            assert not expected.get(f"gradient of {name}", torch.zeros(())).any(), name
    for name, tensor in found.tensors().items():
        if broken and name.startswith("gradient"):
            continue
        if name not in expected:  # what the definition is not connected to
            assert tensor.count_nonzero() == 0, f"{name} is not 0"
            continue
        spread = lambda name=name: [(m[name] - expected[name]).abs() for m in moved()]  # noqa: E731
        addends = function.addends
        if name.startswith("gradient") and addends:
            addends = max((float(g.abs().max()) for g in found.upstream.values() if g.numel()), default=0.0) / 4
        check_close(name, tensor, inexact[name], expected[name], spread, arithmetic_of(function, case, tensor), addends)
    check_repeats(function, case, found)
    return "in contract"


def is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def bits_of_memory(tensor: Tensor) -> Tensor:
    """All bytes that the tensor lies in, in between its elements, too."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


def check_refusal(function: Function, case: Case, error: Exception) -> None:
    assert case.fault is not None, f"refused: {error}"
    said = str(error)
    names = "|".join(map(re.escape, case.arguments))
    assert re.match(rf"({names})[.\w'\[\]]* must [^\n]*\.$", said), f"{case.fault}: {said}"
    if function.definition is None:
        with references():
            try:
                run(function.call, case, case.arguments)
            except REFUSED as other:
                assert (type(other), str(other)) == (type(error), said)
                return
        raise AssertionError(f"the reference takes {case.fault}")


def run(
    call: Callable[..., Any], case: Case, arguments: Mapping[str, Any], upstream: Mapping[str, Tensor] | None = None
) -> Found:
    """upstream: of another run of the case, or drawn."""
    # Not torch.manual_seed, which keeps a traceback of every call for a GPU that is not there.
    torch.default_generator.manual_seed(case.seed)
    results = flattened(call(**arguments))
    leaves = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad}
    connected = {name: result for name, result in results.items() if result.requires_grad}
    if upstream is None:
        upstream = upstream_of(case, connected)
    found = Found({name: result.detach() for name, result in results.items()}, upstream=dict(upstream))
    chosen = [name for name in upstream if name in connected]
    if leaves and chosen:
        gradients = torch.autograd.grad(
            [connected[name] for name in chosen],
            list(leaves.values()),
            [upstream[name].to(connected[name].dtype) for name in chosen],
            allow_unused=True,
        )
        found.gradients = dict(zip(leaves, gradients, strict=True))
    return found


def flattened(results: Any) -> dict[str, Tensor]:
    """Every tensor of what a function returns, by its name."""
    if isinstance(results, Tensor):
        return {"result": results}
    if hasattr(results, "_asdict"):
        results = results._asdict()
    elif not isinstance(results, Mapping):
        results = dict(enumerate(results))
    found: dict[str, Tensor] = {}
    for name, value in results.items():
        inner = flattened(value) if not isinstance(value, Tensor) else {"result": value}
        found |= {str(name) if key == "result" else f"{name}.{key}": tensor for key, tensor in inner.items()}
    return found


def upstream_of(case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of some results: of their own for each element, one for all (as sum() has it), or transposed."""
    generator = torch.Generator().manual_seed(case.seed)
    chosen = [name for place, name in enumerate(results) if case.upstream >> place & 1] or list(results)[:1]
    found = {}
    for name in chosen:
        result = results[name]
        values = torch.randn(result.shape, generator=generator).to(result.dtype)
        form = int(torch.randint(4, (), generator=generator))
        if form == 1 and values.numel() > 0:
            values = values.flatten()[0].expand(values.shape)
        elif form == 2:
            values = values.movedim(0, -1).contiguous().movedim(-1, 0) if values.dim() > 1 else values
        elif form == 3:
            values = torch.zeros_like(values)
        found[name] = values
    return found


def definitions(
    function: Function, case: Case, found: Found
) -> tuple[Found, Found, Callable[[], list[dict[str, Tensor]]]]:
    """The definition in the inputs' own dtype, in float64, and in float64 with inputs moved by a unit in the last
    place of the arithmetic, in several directions."""
    call = function.definition or function.call
    serving = contextlib.nullcontext if function.definition else references
    with serving():
        same = run(call, case, case.arguments, found.upstream)
        doubles = {name: in_double(value) for name, value in case.arguments.items()}
        upstream = {name: gradient.double() for name, gradient in found.upstream.items()}
        exact = run(call, case, doubles, upstream)

    @functools.cache
    def moved() -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(case.seed)
        single = any(is_single(value) for value in (*case.arguments.values(), *found.results.values()))
        unit = 2.0**-24 if single else 2.0**-53
        with serving():
            return [
                run(
                    call,
                    case,
                    {name: step(value, unit, direction, generator) for name, value in doubles.items()},
                    {name: step(value, unit, direction, generator) for name, value in upstream.items()},
                ).tensors()
                for direction in range(DIRECTIONS)
            ]

    return same, exact, moved


def is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def arithmetic_of(function: Function, case: Case, result: Tensor) -> torch.dtype:
    dtype = case.arguments[function.governs].dtype if function.governs else result.dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def step(value: Any, unit: float, direction: int, generator: torch.Generator) -> Any:
    """value moved by a unit relative to it: up, up away from 0, and at random."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    random = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
    moves = (value.detach().sign(), torch.ones_like(random), random.sign(), random)[direction]
    moved = value.detach() + unit * moves * value.detach().abs()
    return torch.where(value.isfinite(), moved, value.detach()).requires_grad_(value.requires_grad)


def check_close(
    name: str, found: Tensor, same: Tensor, exact: Tensor, spread: Callable[[], list[Tensor]], arithmetic: torch.dtype,
    addends: float,
) -> None:  # fmt: skip
    """found no further from float64 than the definition in the same dtype, up to some units in the last place.

    Where the exact number is beyond the dtype, found may be anything that is not finite; NaN stays NaN.
    """
    assert found.shape == exact.shape == same.shape, f"{name}: {found.shape}, {same.shape}, {exact.shape}"
    limits, eps = torch.finfo(found.dtype), torch.finfo(arithmetic).eps
    value, same = found.double(), same.double()
    nan = exact.isnan() & same.isnan()
    assert value.isnan()[nan].all(), f"{name}: NaN is lost: {told(value, same, exact, nan & ~value.isnan())}"
    infinite = exact.isinf() & (same == exact)
    assert (value == exact)[infinite].all(), f"{name}: {told(value, same, exact, infinite & (value != exact))}"
    # What the dtype does not hold, or what is a number in one of the two definitions only, such as 0 times infinity
    # where float32 has underflown.
    held = exact.abs() <= limits.max
    # Nor is a small number that a dtype of 16 bits lost to the rounding of a far larger one beside it.
    largest = exact[exact.isfinite()].abs().amax() if exact.isfinite().any() else 0
    held &= value.isfinite() | (UNITS * eps * largest <= limits.max)
    as_same = (value - same).abs() <= UNITS * eps * same.abs()
    other = ~held & ~nan & ~infinite & value.isfinite() & ~as_same
    assert not other.any(), f"{name}: {told(value, same, exact, other)}"
    judged = held & (same.isfinite() | value.isfinite())
    error = (value - exact).abs()
    # Float64 is no more exact than itself.
    rounding = UNITS * eps if found.dtype == torch.float64 else 4 * limits.eps
    smallest = max(4 * limits.smallest_normal * limits.eps, torch.finfo(arithmetic).smallest_normal)
    budget = rounding * exact.abs() + smallest + 16 * addends * eps
    wrong = judged & ~(error <= budget)
    if wrong.any() and same.isfinite().any():
        budget = budget + UNITS * (same - exact).abs()[exact.isfinite() & same.isfinite()].amax()
        wrong = judged & ~(error <= budget)
    if wrong.any():
        budget = budget + UNITS * torch.stack(spread()).nan_to_num(torch.inf).amax(0)
        wrong = judged & ~(error <= budget)
    assert not wrong.any(), f"{name}: {told(value, same, exact, wrong)}"


def told(value: Tensor, same: Tensor, exact: Tensor, where: Tensor) -> str:
    place = tuple(where.nonzero()[0].tolist())
    return f"{value[place]:.9g} at {list(place)}, in plain PyTorch {same[place]:.9g}, exactly {exact[place]:.9g}"


@contextlib.contextmanager
def under_autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": contextlib.nullcontext,
    "without gradients": torch.no_grad,
    "in inference mode": torch.inference_mode,
    "under autocast": under_autocast,
    "in another thread": contextlib.nullcontext,
    "on the meta device": contextlib.nullcontext,
}


def check_repeats(function: Function, case: Case, found: Found) -> None:
    """The same bits again, in whatever mode."""
    if case.again == "on the meta device":
        check_on_meta(function, case, found)
        return
    again: list[Found] = []

    def call() -> None:
        with MODES["plain" if function.plain and case.again == "under autocast" else case.again]():
            again.append(run(function.call, case, case.arguments, found.upstream))

    if case.again == "in another thread":
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        call()
    for name, tensor in again[0].tensors().items():
        first = found.tensors()[name]
        if function.plain and case.again in ("without gradients", "in inference mode"):
            unit = 16 * max(function.addends, 1) * torch.finfo(tensor.dtype).eps
            torch.testing.assert_close(tensor, first, rtol=unit, atol=unit, equal_nan=True)
        else:
            assert same_bits(tensor, first), f"{name} differs {case.again}"


def same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = (torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for tensor in (one, other))
    return one.dtype == other.dtype and torch.equal(bits_of_memory(one), bits_of_memory(other))


def check_on_meta(function: Function, case: Case, found: Found) -> None:
    """Shapes and dtypes without values."""
    arguments = {
        name: value.detach().to("meta").requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for name, value in case.arguments.items()
    }
    upstream = {name: gradient.to("meta") for name, gradient in found.upstream.items()}
    on_meta = run(function.call, case, arguments, upstream).tensors()
    for name, tensor in found.tensors().items():
        fake = on_meta[name]
        assert (fake.shape, fake.dtype, fake.device.type) == (tensor.shape, tensor.dtype, "meta"), name
