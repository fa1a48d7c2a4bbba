"""What a call is drawn from: sizes, values, dtypes and the ways in which they lie in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

from efe_kernels.common.checks import FLOATING, INTEGER
from efe_kernels.common.library import INTERPRET

# Of one tensor. The interpreter takes milliseconds for a block.
MOST_ELEMENTS = 300 if INTERPRET else 6000
# The first is the simplest, to which a failing case shrinks; 0, primes, and what lies around vectors and tiles.
SIZES = (
    1,
    2,
    3,
    0,
    5,
    7,
    4,
    8,
    9,
    13,
    15,
    16,
    17,
    31,
    32,
    33,
    37,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    257,
    511,
    513,
    1025,
    4097,
)
VALUES = (
    "normal",
    "normal",
    "normal",
    "small integers",
    "zeros",
    "equal",
    "tiny",
    "large",
    "huge",
    "inf",
    "nan",
    "everything",
)
LAYOUTS = ("contiguous", "permuted", "sliced", "offset", "expanded")


@dataclass
class Parameter:
    """What a drawn argument may be.

    kind: floating, integer, bool, mask (of any dtype but complex), number, count (an integer setting), flag or other.
    dims: the letters of its sizes. low, high, above, finite: the range of a setting, as in `checks.number`.
    tensor: a constant tensor may stand in the place of a number.
    """

    kind: str
    optional: bool = False
    dims: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    finite: bool = True
    tensor: bool = False


@dataclass
class Draw:
    """The arguments of one call, drawn one after the other."""

    draw: Callable[[Any], Any]
    sizes: dict[str, int] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    batched: bool = True
    last_seed: int = 0

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.draw(below(len(options)))]

    def often(self) -> bool:
        """False in one case of four."""
        return self.choice((True, True, True, False))

    def rarely(self) -> bool:
        return not self.often()

    def seed(self) -> int:
        self.last_seed = self.draw(below(2**16))
        return self.last_seed

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed())

    def size(self, letter: str, *, least: int = 0, most: int = MOST_ELEMENTS) -> int:
        """The size that the letter stands for, such that all sizes together keep within MOST_ELEMENTS."""
        if letter not in self.sizes:
            others = math.prod(max(size, 1) for size in self.sizes.values())
            most = min(most, max(MOST_ELEMENTS // others, least))
            self.sizes[letter] = self.choice([size for size in SIZES if least <= size <= most] or [least])
        return self.sizes[letter]

    def shape(self, dims: str) -> tuple[int, ...]:
        """The sizes of "B? T C"; the dimension with the question mark is left out of an unbatched call."""
        return tuple(self.size(letter) for letter in self.letters(dims))

    def letters(self, dims: str) -> tuple[str, ...]:
        letters = dims.split()
        if letters and letters[0].endswith("?"):
            letters = [letters[0][:-1], *letters[1:]] if self.batched else letters[1:]
        return tuple(letters)

    def floating(
        self, name: str, dims: str, *, shape: tuple[int, ...] | None = None, optional: bool = False, grad: bool = True,
        change: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:  # fmt: skip
        """A floating-point tensor. change: what its float64 values are put through."""
        self.parameters[name] = Parameter("floating", optional, self.letters(dims))
        if optional and self.rarely():
            self.arguments[name] = None
            return
        shape = self.shape(dims) if shape is None else shape
        dtype = self.choice((torch.float32, torch.float32, *FLOATING))
        values = change(values_of(self.choice(VALUES), shape, dtype, self.generator()))
        tensor = self.laid_out(values.to(dtype))
        self.arguments[name] = tensor.requires_grad_(grad and self.often())

    def integers(
        self, name: str, dims: str, low: int, high: int, *, shape: tuple[int, ...] | None = None,
        optional: bool = False, ignored: int | None = None,
    ) -> None:  # fmt: skip
        """A tensor of integers in [low, high), some of them `ignored`."""
        self.parameters[name] = Parameter("integer", optional, self.letters(dims))
        if optional and self.rarely():
            self.arguments[name] = None
            return
        shape = self.shape(dims) if shape is None else shape
        generator = self.generator()
        values = torch.randint(low, max(high, low + 1), shape, generator=generator)
        if ignored is not None:
            share = self.choice((0.0, 0.0, 0.2, 1.0))
            values = torch.where(torch.rand(shape, generator=generator) < share, ignored, values)
        smallest, largest = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
        fitting = [t for t in INTEGER if torch.iinfo(t).min <= smallest and largest <= torch.iinfo(t).max]
        self.arguments[name] = self.laid_out(values.to(self.choice((torch.int64, *fitting))))

    def mask(self, name: str, dims: str, *, optional: bool = False, any_dtype: bool = False) -> None:
        """bool: none, some or all are set, or none of the first row."""
        self.parameters[name] = Parameter("mask" if any_dtype else "bool", optional, self.letters(dims))
        if optional and self.rarely():
            self.arguments[name] = None
            return
        shape = self.shape(dims)
        values = torch.rand(shape, generator=self.generator()) < self.choice((0.7, 0.1, 0.0, 1.0))
        if values.dim() > 0 and values.shape[0] > 0 and self.rarely():
            values[0] = False
        if any_dtype:
            values = values.to(self.choice((torch.bool, torch.bool, torch.int64, torch.uint8, *FLOATING)))
        self.arguments[name] = self.laid_out(values)

    def laid_out(self, values: Tensor) -> Tensor:
        """The values, in memory that need not be a row of them."""
        return LAID_OUT[self.choice(LAYOUTS)](values, self.last_seed)

    def number(
        self, name: str, usual: Sequence[float], low: float = -math.inf, high: float = math.inf, *, above: bool = False,
        finite: bool = True, optional: bool = False,
    ) -> None:  # fmt: skip
        """A setting, often left at its default. usual: values within the contract."""
        self.parameters[name] = Parameter("number", optional, low=low, high=high, above=above, finite=finite)
        if self.rarely():
            self.arguments[name] = self.choice([*usual, np.float32(usual[0])])

    def factor(self, name: str, usual: Sequence[float], dims: str) -> None:
        """A number in [0, 1], or a constant tensor of them that broadcasts to the dims."""
        if self.often():
            self.number(name, usual, 0, 1)
            self.parameters[name].tensor = True
            return
        self.parameters[name] = Parameter("other")
        whole = self.shape(dims)
        shape = tuple([size if self.often() else 1 for size in whole])[self.choice(range(len(whole) + 1)) :]
        generator = self.generator()
        values = torch.rand(shape, generator=generator, dtype=torch.float64)
        values = torch.where(torch.rand(shape, generator=generator) < 0.1, values.round(), values)
        self.arguments[name] = self.laid_out(values.to(self.choice((torch.float32, torch.float32, *FLOATING))))

    def count(
        self, name: str, usual: Sequence[int], low: int = -(2**63), high: int = 2**63 - 1, optional: bool = False
    ) -> None:
        self.parameters[name] = Parameter("count", optional, low=low, high=high)
        if self.rarely():
            self.arguments[name] = self.choice([*usual, np.int64(usual[0])])

    def flag(self, name: str) -> None:
        self.parameters[name] = Parameter("flag")
        if self.rarely():
            self.arguments[name] = self.choice((True, False, np.bool_(True)))

    def other(self, name: str, usual: Sequence[Any]) -> None:
        self.parameters[name] = Parameter("other")
        if self.rarely():
            self.arguments[name] = self.choice(usual)


@functools.cache
def below(count: int) -> Any:
    """Integers in [0, count): one strategy for all draws, because making one takes longer than drawing from it."""
    return st.integers(0, count - 1)


def values_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float64 values of one kind, in the range of float32: so float64 is exact where float32 overflows."""
    limits = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "small integers":
        return values.round()
    if kind == "zeros":
        return values * 0
    if kind == "equal":
        return torch.full(shape, float(torch.randn((), generator=generator)), dtype=torch.float64)
    if kind == "tiny":
        return values * limits.smallest_normal
    if kind == "large":
        return values * min(1e4, limits.max / 8)
    special = {
        "huge": (limits.max, limits.min, limits.max / 4),
        "inf": (math.inf, -math.inf),
        "nan": (math.nan,),
        "everything": (math.inf, -math.inf, math.nan, limits.max, limits.smallest_normal, 0.0, -0.0, limits.eps),
    }.get(kind)
    if special is not None:
        share = 0.5 if kind == "everything" else 0.1
        chosen = torch.tensor(special, dtype=torch.float64)[torch.randint(len(special), shape, generator=generator)]
        values = torch.where(torch.rand(shape, generator=generator) < share, chosen, values)
    return values


def permuted(values: Tensor, how: int) -> Tensor:
    order = list(range(values.dim()))
    for place in range(len(order), 0, -1):
        how, chosen = divmod(how, place)
        order.append(order.pop(chosen))
    return values.permute(order).contiguous().permute([order.index(dim) for dim in range(values.dim())])


def sliced(values: Tensor, how: int) -> Tensor:
    """Every second element of every dimension, from the second on; NaN or the largest integer lies between."""
    between = math.nan if values.is_floating_point() else True if values.dtype == torch.bool else 127
    memory = torch.full([2 * size + 1 for size in values.shape], between, dtype=values.dtype)
    view = memory[tuple(slice(1, None, 2) for _ in values.shape)]
    return view.copy_(values)


def offset(values: Tensor, how: int) -> Tensor:
    """From the second element of the memory on, where no vector is aligned."""
    memory = values.new_zeros(values.numel() + 1)
    return memory[1:].view(values.shape).copy_(values)


def expanded(values: Tensor, how: int) -> Tensor:
    """One dimension is a stride of 0."""
    if values.dim() == 0 or values.numel() == 0:
        return values
    dim = how % values.dim()
    return values.narrow(dim, 0, 1).clone().expand(values.shape)


LAID_OUT: dict[str, Callable[[Tensor, int], Tensor]] = {
    "contiguous": lambda values, how: values.contiguous(),
    "permuted": permuted,
    "sliced": sliced,
    "offset": offset,
    "expanded": expanded,
}
