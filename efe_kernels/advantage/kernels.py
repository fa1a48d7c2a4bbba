"""What the Triton kernels of rewards and advantages share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton 3.10 changes the default, and with it the bits of every result.
OPTIONS = {"enable_fp_fusion": True}


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool tensor as bytes, which every version of Triton loads the same way."""
    return None if mask is None else mask.view(torch.uint8)


@triton.jit
def unit_clamp(x):
    """x in [-1, 1], NaN stays NaN."""
    return tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))


@triton.jit
def moments(x, member):
    """Count, mean and sum of squared deviations along axis 1, summed relative to the largest: see the reference."""
    count = tl.sum(member.to(tl.int32), axis=1).to(tl.float32)
    shift = tl.where(count > 0, tl.max(tl.where(member, x, float("-inf")), axis=1), 0.0)
    offset = tl.where(member, x - shift[:, None], 0.0)
    mean = tl.sum(offset, axis=1) / tl.maximum(count, 1.0)
    deviation = tl.where(member, offset - mean[:, None], 0.0)
    return count, shift + mean, tl.sum(deviation * deviation, axis=1)


@triton.jit
def join_moments(count, mean, squares, more, more_mean, more_squares):
    """Moments of two sets together (Chan et al. 1979): exactly 0 deviation where all are equal."""
    total = count + more
    share = more / tl.maximum(total, 1.0)
    difference = more_mean - mean
    squares += more_squares + difference * difference * count * share
    return total, tl.where(count == 0, more_mean, mean + difference * share), squares


@triton.jit
def merge_moments(
    partial_ptr,  # [groups, parts, 3]
    group,
    parts,
    PARTS: tl.constexpr,
):
    """Count, mean and sum of squared deviations [1] of a group from those of its parts, in a fixed order."""
    part = tl.arange(0, PARTS)[None, :]
    base = partial_ptr + (group * parts + part) * 3
    count = tl.load(base, mask=part < parts, other=0.0)
    mean = tl.load(base + 1, mask=part < parts, other=0.0)
    squares = tl.load(base + 2, mask=part < parts, other=0.0)
    total = tl.sum(count, axis=1)
    some = tl.maximum(total, 1.0)
    shift = tl.where(total > 0, tl.max(tl.where(count > 0, mean, float("-inf")), axis=1), 0.0)
    offset = tl.where(count > 0, mean - shift[:, None], 0.0)
    centre = tl.sum(count * offset, axis=1) / some
    deviation = offset - centre[:, None]
    return total, shift + centre, tl.sum(squares + count * deviation * deviation, axis=1)
