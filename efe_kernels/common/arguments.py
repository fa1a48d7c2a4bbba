"""Arguments of public functions in the form that ops take."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def one_episode(*tensors: Any) -> tuple[Any, ...]:
    """Unbatched arguments as batches of one; None stays None."""
    return tuple(None if tensor is None else tensor[None] for tensor in tensors)


def promoted(*tensors: Any) -> list[Any]:
    """All in the dtype to which they promote together; None stays None."""
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors if tensor is not None})
    return [tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def constant(tensor: Tensor) -> Tensor:
    """tensor, of which no gradient is asked."""
    return tensor.detach() if tensor.requires_grad else tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """What plain PyTorch computes on the tensor's device is left in the dtypes of its arguments."""
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)  # which has no kind "meta"
