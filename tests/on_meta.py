"""What a step does on a GPU that a CPU would not notice, found on the meta device, where a tensor has no values.

There, reading a number raises, as does whatever has a shape that depends on one: what runs on it reads nothing from its
device. The kernels themselves do not run there, nor do optimizers count on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class NothingOnTheHost(TorchDispatchMode):
    """Inside, an op on the host raises, but for numbers in 0-d tensors, and so does a copy from there."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in tree_leaves((args, kwargs, result)):
            if isinstance(found, Tensor) and found.device != META:
                assert found.dim() == 0 and func not in COPIES, f"{func} is on the host"
        return result


@contextmanager
def only_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without torch.autocast, which has no kind "meta"."""
    with monkeypatch.context() as patch, NothingOnTheHost():
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        yield
