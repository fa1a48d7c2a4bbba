"""Argument checks. Each raises one sentence that names the argument, what it was and what it should be."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# PyTorch computes little with these: `integer_tensor` makes them int64.
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *UNSIGNED)
INT64 = torch.iinfo(torch.int64)
SYMBOLS = (torch.SymFloat, torch.SymInt)

Kind = Callable[[str, torch.Tensor], None]
"""A check of the dtype, such as check_floating."""


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, it was {type(value).__name__}.")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided tensor, its layout was {value.layout}; .to_dense() gives one.")
    if value.is_nested:
        raise TypeError(f"{name} must be a strided tensor, it was nested.")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, it was {tensor.dtype}.")


def check_integer(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in INTEGER:
        raise TypeError(f"{name} must have an integer dtype, it was {tensor.dtype}.")


def integer_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """tensor, in a dtype that the ops take. A uint64 from 2^63 on becomes negative, and so is out of any range."""
    check_integer(name, tensor)
    return tensor.long() if tensor.dtype in UNSIGNED else tensor


def check_bool(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, it was {tensor.dtype}.")


def check_real(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.is_complex():
        raise TypeError(f"{name} must be bool, integer or floating, it was {tensor.dtype}.")


class Sizes:
    """Sizes by the letter that stands for them, each taken from the first argument that has it.

    dims: the dimensions of an argument, such as "B? T H W C". The one with a question mark is there for all arguments
        or for none, as the first has it.
    known: sizes that are known before.
    """

    def __init__(self, name: str, tensor: torch.Tensor, dims: str, **known: int) -> None:
        check_tensor(name, tensor)
        first, *others = dims.split()
        self.optional = first.removesuffix("?") if first.endswith("?") else ""
        self.leads = tensor.dim() > len(others)
        if self.optional and tensor.dim() not in (len(others), len(others) + 1):
            forms = f"{written([self.optional, *others])} or {written(others)}"
            raise ValueError(f"{name} must have the shape {forms}, it was {list(tensor.shape)}.")
        self.of, self.device, self.sizes = name, tensor.device, known
        self.meet(name, tensor, self.letters(dims))

    def check(self, name: str, tensor: torch.Tensor, dims: str, kind: Kind = check_tensor) -> None:
        """The dtype, the shape and the device of a further argument.

        A letter that is met for the first time has the size that it has here.
        """
        kind(name, tensor)
        names = self.letters(dims)
        if tensor.shape != tuple([self.sizes.get(letter) for letter in names]):
            self.meet(name, tensor, names)
        if tensor.device != self.device:
            check_device(name, tensor, self.of, self.device)

    def letters(self, dims: str) -> list[str]:
        names = dims.split()
        if names and names[0].endswith("?"):
            return [self.optional, *names[1:]] if self.leads else names[1:]
        return names

    def meet(self, name: str, tensor: torch.Tensor, names: list[str]) -> None:
        """Take the sizes of letters that are not known yet; the others must be as they are known."""
        shape = list(tensor.shape)
        pairs = zip(names, shape, strict=False)
        if len(shape) == len(names) and shape == [self.sizes.setdefault(letter, size) for letter, size in pairs]:
            return
        expected = [self.sizes.get(letter) for letter in names]
        sizes = "" if None in expected or not names else f" = {expected}"
        raise ValueError(f"{name} must have the shape {written(names)}{sizes}, it was {shape}.")

    def check_optional(self, name: str, tensor: torch.Tensor | None, dims: str, kind: Kind = check_tensor) -> None:
        """The same of an argument that may be absent."""
        if tensor is not None:
            self.check(name, tensor, dims, kind)


def written(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"


def check_device(name: str, tensor: torch.Tensor, of: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {of}, {device}, it was on {tensor.device}.")


def check_alike(**tensors: torch.Tensor) -> None:
    """Floating-point tensors with the shape and on the device of the first."""
    others = iter(tensors.items())
    first_name, first = next(others)
    check_floating(first_name, first)
    shape, device = first.shape, first.device
    for name, tensor in others:
        check_floating(name, tensor)
        if tensor.shape != shape or tensor.device != device:
            check_beside(name, tensor, first_name, first)


def check_mask(name: str, mask: torch.Tensor | None, like_name: str, like: torch.Tensor) -> None:
    """A bool tensor with the shape and on the device of `like`, or None."""
    if mask is not None:
        check_bool(name, mask)
        check_beside(name, mask, like_name, like)


def check_beside(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """The shape and the device of another argument."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name} = {list(other.shape)}, it was {list(tensor.shape)}."
        )
    check_device(name, tensor, other_name, other.device)


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False, finite: bool = True
) -> float:
    """A setting as a float in [low, high], or with `above` in (low, high]; infinite only where `finite` is False.

    A tensor is refused: to read it would wait for its device and lose its gradient.
    """
    if type(value) is float and low < value < high:  # nearly every call
        return value
    found = value if type(value) is float else as_float(name, value)
    inside = low < found <= high if above else low <= found <= high
    if not inside or (finite and not -math.inf < found < math.inf):
        raise ValueError(f"{name} must be {interval(low, high, above, finite)}, it was {value!r}.")
    return found


def as_float(name: str, value: Any) -> float:
    if isinstance(value, SYMBOLS):
        return value  # type: ignore[return-value]  # torch.compile traces it as the number that it will be
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, it was {described(value)}.")
    try:
        return float(value)
    except OverflowError:  # an int beyond the largest float
        return math.inf


def interval(low: float, high: float, above: bool, finite: bool) -> str:
    """The range of a number, in words."""
    if math.isfinite(low) and math.isfinite(high):
        return f"in {'(' if above else '['}{low:g}, {high:g}]"
    bound = f"{'above' if above else 'at least'} {low:g}"
    if math.isinf(low):
        bound = ""
    elif above and low == 0:
        bound = "positive"
    return " and ".join(word for word in (bound, "finite" if finite else "not NaN") if word)


def integer(name: str, value: Any, low: int = INT64.min, high: int = INT64.max) -> int:
    """A setting as an int in [low, high]; NumPy's integers are integers, bool is none."""
    if type(value) is int and low <= value <= high:  # nearly every call
        return value
    if isinstance(value, SYMBOLS):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, it was {described(value)}.")
    found = int(value)
    if low <= found <= high:
        return found
    bounds = f"[{'-2^63' if low == INT64.min else low}, {'2^63)' if high == INT64.max else f'{high}]'}"
    raise ValueError(
        f"{name} must be {f'at least {low}' if found < low != INT64.min else f'in {bounds}'}, it was {found}."
    )


def flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__module__ != "numpy" or type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False, it was {described(value)}.")
    return bool(value)


def described(value: Any) -> str:
    """What was given in place of a setting."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)} (.item() gives the number of one element)"
    return repr(value) if isinstance(value, str | numbers.Number) else type(value).__name__


def settings(name: str, group: object, kind: type, fields: Sequence[str]) -> list[float]:
    """The fields of a group of settings, as numbers."""
    if not isinstance(group, kind):
        raise TypeError(f"{name} must be {kind.__name__}, it was {type(group).__name__}.")
    values = [getattr(group, field) for field in fields]
    if all([type(value) is float and -math.inf < value < math.inf for value in values]):  # nearly every call
        return values
    return [number(f"{name}.{field}", value) for field, value in zip(fields, values, strict=True)]


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    # Only these kinds: an array would be compared element by element.
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, it was {value!r}.")
