"""What a step does on a GPU that a CPU would not notice, found on the meta device, where a tensor has no values.

There, reading a number raises, as does whatever has a shape that depends on one: a step that runs on it never waits for
its device, and records as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class NothingOnTheHost(TorchDispatchMode):
    """Inside, an op on the host raises, a copy from there included. Numbers in 0-d tensors may be there."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in tree_leaves((args, kwargs, result)):
            assert not isinstance(found, Tensor) or found.device == META or found.dim() == 0, f"{func} is on the host"
        return result


class NoAutocast:
    """In place of torch.autocast, which has no kind "meta"."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@contextmanager
def only_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "autocast", NoAutocast)
    with NothingOnTheHost():
        yield
