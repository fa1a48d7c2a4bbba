"""Argument checks. Each raises one sentence that names the argument, what it was and what it should be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, it was {type(value).__name__}.")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, it was {tensor.dtype}.")


def check_integer(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in INTEGER:
        raise TypeError(f"{name} must have an integer dtype, it was {tensor.dtype}.")


def check_bool(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, it was {tensor.dtype}.")


def check_dim(name: str, tensor: torch.Tensor, dims: str) -> None:
    """dims: what the dimensions mean, such as "[B, T, H, W, C]"."""
    check_tensor(name, tensor)
    if tensor.dim() != dims.count(",") + 1:
        raise ValueError(f"{name} must have the shape {dims}, it was {list(tensor.shape)}.")


def check_shape(name: str, tensor: torch.Tensor, dims: str, shape: Sequence[int]) -> None:
    """dims: what the dimensions mean; shape: the sizes they must have."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape {dims} = {list(shape)}, it was {list(tensor.shape)}.")


def check_same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, it was on {tensor.device}.")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, it was {value!r}.")
