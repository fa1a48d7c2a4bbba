"""Launching the same kernel again and again at little cost to the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


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
