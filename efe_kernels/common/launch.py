"""Launching the same kernel again and again at little cost to the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import triton.language as tl
from torch import Tensor


# Triton's functions of the same names are compiled into kernels, too; called here, each takes two microseconds.
def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The smallest one that is not below x, at least 1."""
    return 1 << max(x - 1, 0).bit_length()


PREPARED: dict[Hashable, PreparedLaunch] = {}
MOST_KEPT = 4096
Kept = TypeVar("Kept")


def kept(store: dict[Hashable, Kept], key: Hashable, make: Callable[[], Kept]) -> Kept:
    """store[key], made where it is not there. A full store begins anew, so that none grows without end."""
    found = store.get(key)
    if found is None:
        if len(store) >= MOST_KEPT:
            store.clear()
        found = store[key] = make()
    return found


def launch(function: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """function[grid](*arguments, **constants), prepared from the second call on that Triton would compile alike.

    function: a @triton.jit function whose constants come last in its signature.
    arguments: tensors, numbers, constants and None, alone or in tuples.
    constants: the others, and Triton's options.
    """
    key = (function.__name__, grid, specialised(arguments), *constants.values())
    kept(PREPARED, key, lambda: PreparedLaunch(function, grid, constants))(*arguments)


def specialised(arguments: tuple[Any, ...]) -> Hashable:
    """What Triton compiles differently for, of the arguments of a kernel."""
    found: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is float:  # an argument of the compiled kernel, whatever it is
            found.append(kind)
        elif kind is int:
            found.append((argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31))
        elif isinstance(argument, Tensor):
            found.append((argument.dtype, argument.device, argument.data_ptr() % 16 == 0))
        elif isinstance(argument, tuple):
            found.append(specialised(argument))
        elif kind is tl.constexpr:  # which is slow to hash and to compare
            found.append(argument.value)
        else:  # None: compiled into the kernel
            found.append(argument)
    return tuple(found)


def signature(tensor: Tensor | None) -> Hashable:
    """What Triton compiles differently for, of a tensor whose strides are constants of the kernel."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.data_ptr() % 16 == 0


class PreparedLaunch:
    """One kernel with its grid and its constants, to be called with all that may change from call to call.

    The first call goes through Triton, which compiles. The others hand their arguments to the compiled kernel: binding
    and specialising them anew takes several times as long as the launch. So whoever keeps one must call it with tensors
    of one `signature` only, and with numbers that the kernel does not specialise on.

    function: a @triton.jit function whose constants come last in its signature.
    constants: their values, and Triton's options.
    """

    def __init__(self, function: Any, grid: tuple[int, ...], constants: dict[str, Any]) -> None:
        self.function = function
        self.grid = (*grid, 1, 1)[:3]
        self.constants = constants
        self.values = tuple(constants[name] for name in function.arg_names if name in constants)
        self.launch: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        if self.launch is not None:
            self.launch(*arguments, *self.values)
            return
        compiled = self.function[self.grid](*arguments, **self.constants)
        # Triton's interpreter compiles nothing.
        if compiled is not None:
            self.launch = compiled[self.grid]
