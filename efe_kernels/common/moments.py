"""Moments of many elements (count, mean, sum of squared deviations) in Triton kernels, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def difference(a, b):
    """a - b, and 0 where they are equal, infinities too."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def moments(x, member):
    """Count, mean and sum of squared deviations along axis 1, summed relative to the largest: see the reference."""
    count = tl.sum(member.to(tl.int32), axis=1).to(tl.float32)
    shift = tl.where(count > 0, tl.max(tl.where(member, x, float("-inf")), axis=1), 0.0)
    offset = tl.where(member, difference(x, shift[:, None]), 0.0)
    mean = tl.sum(offset, axis=1) / tl.maximum(count, 1.0)
    deviation = tl.where(member, offset - mean[:, None], 0.0)
    return count, shift + mean, tl.sum(deviation * deviation, axis=1)


@triton.jit
def join_moments(count, mean, squares, more, more_mean, more_squares):
    """Moments of two sets together (Chan et al. 1979): exactly 0 deviation where all are equal."""
    total = count + more
    share = more / tl.maximum(total, 1.0)
    step = tl.where((count > 0) & (more > 0), difference(more_mean, mean), 0.0)
    squares += more_squares + step * step * count * share
    return total, tl.where(count == 0, more_mean, mean + step * share), squares


@triton.jit
def load_moments(
    partial_ptr,  # [parts, 3]
    part,
    parts,
):
    """Count, mean and sum of squared deviations of some parts; 0 past the last one."""
    base = partial_ptr + part.to(tl.int64) * 3
    there = part < parts
    count = tl.load(base, mask=there, other=0.0)
    return count, tl.load(base + 1, mask=there, other=0.0), tl.load(base + 2, mask=there, other=0.0)


@triton.jit
def merge_moments(count, mean, squares):
    """Moments along axis 1 from those of its parts, in a fixed order."""
    total = tl.sum(count, axis=1)
    some = tl.maximum(total, 1.0)
    shift = tl.where(total > 0, tl.max(tl.where(count > 0, mean, float("-inf")), axis=1), 0.0)
    offset = tl.where(count > 0, difference(mean, shift[:, None]), 0.0)
    centre = tl.sum(count * offset, axis=1) / some
    deviation = offset - centre[:, None]
    return total, shift + centre, tl.sum(squares + count * deviation * deviation, axis=1)


@triton.jit
def store_moments(
    ptr,  # [3]
    count,
    mean,
    squares,
):
    """Moments [1]."""
    tl.store(ptr, tl.sum(count, axis=0))
    tl.store(ptr + 1, tl.sum(mean, axis=0))
    tl.store(ptr + 2, tl.sum(squares, axis=0))
