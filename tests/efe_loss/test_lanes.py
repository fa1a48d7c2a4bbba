"""The blocks of assembly that a warp executes together, executed here for its 32 lanes side by side.

What an instruction does is taken from NVIDIA's PTX reference, the places of a matrix's elements in the lanes from its
section on mma.m16n8k16.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from efe_kernels.common.library import triton_module
from efe_kernels.efe_loss.reference import PROMPT_LOGIT_RANGE

lanes: Any = triton_module("efe_kernels.efe_loss.lanes")
LANE = np.arange(32, dtype=np.uint32)


def float_bits(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def as_float(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


def halves(words: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 [..., 2]: the lower and the upper number of each word."""
    numbers = torch.from_numpy(np.ascontiguousarray(words)).view(dtype).float().numpy()
    return numbers.reshape(*words.shape, 2)


def words_of(numbers: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype).view(torch.int32).numpy().view(np.uint32)[..., 0]


class Warp:
    """Registers of 32 lanes as uint32, predicates as bool; what is stored, by lane and place."""

    def __init__(self, operands: list[np.ndarray], results: int, dtype: torch.dtype) -> None:
        self.found = {f"${i + results}": operand for i, operand in enumerate(operands)}
        self.dtype = dtype
        self.stored: list[tuple[int, float]] = []

    def value(self, name: str) -> np.ndarray:
        if name in self.found:
            return self.found[name]
        if name == "%laneid":
            return LANE
        if name.startswith("0f"):
            return np.full(32, int(name[2:], 16), np.uint32)
        if name.startswith("{"):
            low, high = (self.value(part) for part in name.strip("{} ").split(", "))
            return low & 0xFFFF | high << 16
        return np.full(32, int(name) & 0xFFFFFFFF, np.uint32)

    def run(self, block: str) -> None:
        for statement in block.strip("{}\n ").replace("\n", " ").split(";"):
            if statement.strip() and not statement.strip().startswith(".reg"):
                self.execute(statement.strip())

    def execute(self, statement: str) -> None:
        if statement.startswith("@p st.global.f32"):
            writers = np.flatnonzero(self.found["p"])
            self.stored += [(int(self.found["place"][i]), float(as_float(self.value("v0"))[i])) for i in writers]
            return
        name, rest = statement.split(" ", 1)
        target, *sources = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        if name.startswith("mma"):
            self.multiply(target, *sources)
            return
        self.found[target] = self.result(name, [self.value(source) for source in sources])

    def result(self, name: str, given: list[np.ndarray]) -> np.ndarray:
        kind = name.split(".")[0]
        if name.startswith("shfl.sync.bfly"):
            return given[0][LANE ^ given[1][0]]
        if kind in ("min", "max"):
            chosen = (np.minimum if kind == "min" else np.maximum)(*(halves(words, self.dtype) for words in given))
            return words_of(chosen, self.dtype)
        operations: dict[str, Callable[..., np.ndarray]] = {
            "mov.b32": lambda a: a,
            "mov.b16": lambda a: a,
            "mov.u32": lambda a: a,
            "mov.f32": lambda a: a,
            "and.b32": np.bitwise_and,
            "shr.u32": np.right_shift,
            "shl.b32": np.left_shift,
            "add.u32": np.add,
            "add.f32": lambda a, b: float_bits(as_float(a) + as_float(b)),
            "mad.wide.u32": lambda a, b, c: a * b + c,
            "setp.eq.u32": np.equal,
            "setp.ne.u32": np.not_equal,
            "setp.lt.and.u32": lambda a, b, p: (a < b) & p,
            "selp.b32": lambda a, b, p: np.where(p, a, b),
            "selp.f32": lambda a, b, p: np.where(p, a, b),
        }
        return operations[name](*given)

    def multiply(self, target: str, a_words: str, b_words: str, _sums: str) -> None:
        """D [16, 8] += A [16, 16] B [16, 8] from their places in the lanes."""
        names = [[part.strip() for part in text.strip("{}").split(",")] for text in (target, a_words, b_words)]
        sums, a_names, b_names = names
        group, place = LANE // 4, LANE % 4
        a, b, d = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float32)
        for i, name in enumerate(a_names):
            for k in range(2):
                a[group + 8 * (i % 2), 2 * place + k + 8 * (i // 2)] = halves(self.value(name), self.dtype)[:, k]
        for i, name in enumerate(b_names):
            for k in range(2):
                b[2 * place + k + 8 * i, group] = halves(self.value(name), self.dtype)[:, k]
        for i, name in enumerate(sums):
            d[group + 8 * (i // 2), 2 * place + i % 2] = as_float(self.value(name))
        d = d + a @ b
        for i, name in enumerate(sums):
            self.found[name] = float_bits(d[group + 8 * (i // 2), 2 * place + i % 2])


def sums_of(warp: Warp, count: int) -> list[float]:
    """What was stored, each number once and nothing beside them."""
    assert sorted(place for place, _ in warp.stored) == [4 * i for i in range(count)]
    return [value for _, value in sorted(warp.stored)]


@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 7, 10, 16])
def test_exchanged_sums(count: int, pack: int) -> None:
    values = np.random.default_rng(count).integers(-100, 100, (count, pack, 32)).astype(np.float32)
    operands = [np.zeros(32, np.uint32)] * pack + [float_bits(each) for value in values for each in value]
    warp = Warp(operands, pack, torch.float16)
    warp.run(lanes.exchanged_sums(count, pack))
    assert sums_of(warp, count) == values.sum((1, 2)).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("count", [2, 3, 10, 16])
def test_tensor_core_sums(count: int, pack: int, dtype: torch.dtype) -> None:
    """Of the elements that count, clamped; the others may hold anything."""
    generator = np.random.default_rng(count)
    values = generator.integers(-100, 100, (count, 32, 2)).astype(np.float32)
    values[0, 3, 0], values[-1, 4, 0] = np.inf, -np.inf
    counted = generator.random((32, 2)) < 0.7
    counted[3:5, 0] = True
    values[:, ~counted] = np.nan
    if pack == 1:
        counted[:, 1] = False
    masks = (counted * np.uint32(0xFFFF) << np.array([0, 16], np.uint32)).sum(-1, dtype=np.uint32)
    stored = words_of(values, dtype) if pack == 2 else words_of(values, dtype) & 0xFFFF
    operands = [np.zeros(32, np.uint32)] * pack + [*stored, masks]
    name, bounds, ones = {
        torch.bfloat16: ("bf16", lanes.BF16_BOUNDS, lanes.BF16_ONES),
        torch.float16: ("f16", lanes.F16_BOUNDS, lanes.F16_ONES),
    }[dtype]
    warp = Warp(operands, pack, dtype)
    warp.run(lanes.tensor_core_sums(count, pack, name, bounds.value, ones.value))
    expected = np.where(counted, values.clip(-PROMPT_LOGIT_RANGE, PROMPT_LOGIT_RANGE), 0).sum((1, 2))
    assert sums_of(warp, count) == expected.tolist()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_the_clamp_is_a_number_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    word = torch.tensor([lanes.twice(PROMPT_LOGIT_RANGE, name)]).to(torch.int32)
    assert word.view(dtype).tolist() == [PROMPT_LOGIT_RANGE] * 2
