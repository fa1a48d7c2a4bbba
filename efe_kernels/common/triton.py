"""What the Triton kernels of several families share: options, device functions, the launch guard."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from efe_kernels.common.library import INTERPRET

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Inline assembly does not exist in Triton's interpreter: there the precise forms stand in for the approximate ones.
APPROXIMATE = not INTERPRET and torch.version.hip is None


# Triton 3.5 to 3.9 fuse unless TRITON_DEFAULT_FP_FUSION=0 is set, and 3.9 announces that 3.10 will not. The bits of a
# result must follow neither.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def log2(x, APPROX: tl.constexpr):
    """log2 of a float32; with APPROX one instruction with an absolute error of about 2^-22 near 1."""
    if APPROX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def reciprocal(x, APPROX: tl.constexpr):
    """1 / x of a float32; with APPROX one instruction with a relative error of about 2^-23."""
    if APPROX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def unit_clamp(x):
    """x in [-1, 1], NaN stays NaN."""
    return tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))


@triton.jit
def load(
    ptr,  # any shape, or None
    offset,
    ok,
):
    """float32; 0 where not ok, and everywhere for an absent tensor."""
    if ptr is None:
        x = tl.zeros(offset.shape, tl.float32)
    else:
        x = tl.load(ptr + offset, mask=ok, other=0.0).to(tl.float32)
    return x


@triton.jit
def store(
    ptr,  # any shape, or None: nothing is stored
    offset,
    x,
    ok,
):
    """x rounded to the tensor's dtype."""
    if ptr is not None:
        tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def members(
    mask_ptr,  # any shape, bytes, or None: all are
    offset,
    ok,
):
    """Which elements count: those that are ok and set in the mask."""
    member = ok
    if mask_ptr is not None:
        member = ok & (tl.load(mask_ptr + offset, mask=ok, other=0) != 0)
    return member


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool tensor as bytes, which every version of Triton loads the same way."""
    return None if mask is None else mask.view(torch.uint8)


def flat(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, bool as bytes."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return as_bytes(tensor) if tensor.dtype == torch.bool else tensor


def launch_guard(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of `tensor` current for a launch; kernels go to that device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
