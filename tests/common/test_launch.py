"""A prepared launch goes through Triton once. Triton itself is played by a stand-in: no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from efe_kernels.common import launch as launching
from efe_kernels.common.launch import PreparedLaunch, signature


class Compiled:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.calls.append(("compiled", grid, arguments))


class Function:
    """As @triton.jit makes one: compiled for a grid and arguments, or interpreted."""

    __name__ = "kernel"
    arg_names = ("x_ptr", "n", "STRIDE", "BLOCK")

    def __init__(self, interpreted: bool) -> None:
        self.calls: list[Any] = []
        self.interpreted = interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled | None]:
        def run(*arguments: Any, **constants: Any) -> Compiled | None:
            self.calls.append(("bound", grid, arguments, constants))
            return None if self.interpreted else Compiled(self.calls)

        return run


CONSTANTS = {"num_warps": 1, "BLOCK": 64, "STRIDE": (3, 1)}


def test_only_the_first_call_is_bound_by_triton() -> None:
    function = Function(interpreted=False)
    launch = PreparedLaunch(function, (5,), CONSTANTS)
    for n in (7, 8, 9):
        launch("x", n)
    first, *others = function.calls
    assert first == ("bound", (5, 1, 1), ("x", 7), CONSTANTS)
    # A compiled kernel takes every argument of the signature in its order, and no options.
    assert others == [("compiled", (5, 1, 1), ("x", n, (3, 1), 64)) for n in (8, 9)]


def test_the_interpreter_is_always_called_as_triton_is() -> None:
    function = Function(interpreted=True)
    launch = PreparedLaunch(function, (5, 2), CONSTANTS)
    for n in (7, 8):
        launch("x", n)
    assert function.calls == [("bound", (5, 2, 1), ("x", n), CONSTANTS) for n in (7, 8)]


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(4, 8, dtype=torch.bfloat16),
        torch.zeros(4, 9),
        torch.zeros(8, 4).T,
        torch.zeros(33)[1:].view(4, 8),
        torch.zeros(4, 8, device="meta"),
        None,
    ],
    ids=["dtype", "shape", "strides", "alignment", "device", "absence"],
)
def test_a_signature_tells_apart_what_triton_compiles_apart(other: torch.Tensor | None) -> None:
    assert signature(torch.zeros(4, 8)) == signature(torch.ones(4, 8))
    assert signature(other) != signature(torch.zeros(4, 8))


def test_a_launch_is_prepared_for_what_triton_compiles_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers may differ, but not in what Triton specialises on."""
    monkeypatch.setattr(launching, "PREPARED", {})
    function = Function(interpreted=False)

    def how(x: Any, n: int, block: int = 64, grid: tuple[int, ...] = (5,)) -> str:
        launching.launch(function, grid, (x, None), n, STRIDE=(3, 1), BLOCK=block, num_warps=1)
        return function.calls[-1][0]

    whole, odd = torch.zeros(64), torch.zeros(65)[1:]
    assert [how(whole, 7), how(torch.ones(32), 9), how(whole, 7)] == ["bound", "compiled", "compiled"]
    others = [(odd, 7), (whole.double(), 7), (None, 7), (whole, 16), (whole, 1), (whole, 2**31 + 1), (whole, 7, 32)]
    assert [how(*other) for other in others] == ["bound"] * len(others)
    assert [how(*other) for other in others] == ["compiled"] * len(others)
    assert how(whole, 7, grid=(6,)) == "bound" and function.calls[-1][1] == (6, 1, 1)
    assert how(whole, 7) == "compiled" and function.calls[-1][1] == (5, 1, 1)


def test_what_is_prepared_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "PREPARED", {})
    monkeypatch.setattr(launching, "MOST_KEPT", 2)
    function = Function(interpreted=False)
    for grid in range(1, 6):
        launching.launch(function, (grid,), 7, STRIDE=(3, 1), BLOCK=64)
    assert len(launching.PREPARED) <= 2
