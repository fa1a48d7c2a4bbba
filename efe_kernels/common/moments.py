"""Sums and moments of many elements in Triton kernels, in a fixed order.

Where one program does not see all elements, each part of them leaves a row of values in memory; rows are loaded one to
a lane and joined.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Moments(NamedTuple):
    """Of sets of elements, one set to a lane."""

    count: Any
    mean: Any
    squares: Any  # sum of squared deviations from the mean


NUM_MOMENTS = tl.constexpr(len(Moments._fields))


@triton.jit
def difference(a, b):
    """a - b, and 0 where they are equal, infinities too."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def moments(x, member):
    """Moments along axis 1, summed relative to the largest: see the reference."""
    count = tl.sum(member.to(tl.int32), axis=1).to(tl.float32)
    shift = tl.where(count > 0, tl.max(tl.where(member, x, float("-inf")), axis=1), 0.0)
    offset = tl.where(member, difference(x, shift[:, None]), 0.0)
    mean = tl.sum(offset, axis=1) / tl.maximum(count, 1.0)
    deviation = tl.where(member, offset - mean[:, None], 0.0)
    return Moments(count, shift + mean, tl.sum(deviation * deviation, axis=1))


@triton.jit
def join_moments(some, more):
    """Moments of two sets together (Chan et al. 1979): exactly 0 deviation where all are equal."""
    total = some.count + more.count
    share = more.count / tl.maximum(total, 1.0)
    step = tl.where((some.count > 0) & (more.count > 0), difference(more.mean, some.mean), 0.0)
    squares = some.squares + (more.squares + step * step * some.count * share)
    return Moments(total, tl.where(some.count == 0, more.mean, some.mean + step * share), squares)


@triton.jit
def merge_moments(parts):
    """Moments along axis 1 from those of its parts, in a fixed order."""
    total = tl.sum(parts.count, axis=1)
    some = tl.maximum(total, 1.0)
    shift = tl.where(total > 0, tl.max(tl.where(parts.count > 0, parts.mean, float("-inf")), axis=1), 0.0)
    offset = tl.where(parts.count > 0, difference(parts.mean, shift[:, None]), 0.0)
    centre = tl.sum(parts.count * offset, axis=1) / some
    deviation = offset - centre[:, None]
    squares = tl.sum(parts.squares + parts.count * deviation * deviation, axis=1)
    return Moments(total, shift + centre, squares)


@triton.jit
def load_rows(
    ptr,  # [rows, WIDTH]
    row,
    rows,
    WIDTH: tl.constexpr,
):
    """The values of some rows, a tuple of WIDTH; 0 past the last row."""
    base = ptr + row.to(tl.int64) * WIDTH
    values = ()
    for i in tl.static_range(WIDTH):
        values = values + (tl.load(base + i, mask=row < rows, other=0.0),)
    return values


@triton.jit
def store_row(
    ptr,  # [len(values)], or a block of such
    values,
    ok=None,
):
    for i in tl.static_range(len(values)):
        tl.store(ptr + i, values[i], mask=ok)


@triton.jit
def add_rows(sums, more):
    """The sums of two tuples, value by value."""
    added = ()
    for i in tl.static_range(len(sums)):
        added = added + (sums[i] + more[i],)
    return added


@triton.jit
def load_moments(
    ptr,  # [parts, NUM_MOMENTS]
    part,
    parts,
):
    """Moments of some parts; no element past the last one."""
    count, mean, squares = load_rows(ptr, part, parts, NUM_MOMENTS)
    return Moments(count, mean, squares)


@triton.jit
def store_moments(
    ptr,  # [NUM_MOMENTS]
    found,
):
    """Moments of a single set, [1]."""
    store_row(ptr, (tl.sum(found.count, axis=0), tl.sum(found.mean, axis=0), tl.sum(found.squares, axis=0)))
