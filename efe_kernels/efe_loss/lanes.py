"""What the lanes of a warp do together, many sums over their cells at once, and what they do to two 16-bit numbers at a
time.

Triton reduces a tensor at a time, in five exchanges between lanes. Here lanes exchange halves, so that n sums take n
exchanges and not 5 n; and 16-bit logits, whose sums need no rounding before float32, are added by the tensor cores,
four outcomes of 64 cells in one instruction. What is written in assembly needs a warp of 32 lanes and a tile that
fills it, one element of a tensor in a lane or two: `PACK` says how many, 0 that the plain form must do.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from efe_kernels.efe_loss.reference import LOWEST_LOGIT, PROMPT_LOGIT_RANGE

# Sums that one round finishes.
MOST = tl.constexpr(16)


def twice(x: float, dtype: str) -> int:
    """A word of two equal 16-bit numbers."""
    bits = struct.unpack(">H", struct.pack(">f", x)[:2] if dtype == "bf16" else struct.pack(">e", x))[0]
    return int(bits << 16 | bits)


BF16_ONES, F16_ONES = tl.constexpr(twice(1.0, "bf16")), tl.constexpr(twice(1.0, "f16"))
BF16_LOWEST = tl.constexpr(twice(LOWEST_LOGIT, "bf16"))
BF16_BOUNDS, F16_BOUNDS = (tl.constexpr(twice(PROMPT_LOGIT_RANGE, dtype)) for dtype in ("bf16", "f16"))


@triton.constexpr_function
def assembly(lines: list[str]) -> str:
    """Of a block with registers of its own."""
    registers = ".reg .b32 lane, quad, w<16>, one<2>; .reg .f32 v<16>, sent, acc<4>; .reg .pred p, q; .reg .b64 place;"
    return "\n".join(["{", registers, "mov.u32 lane, %laneid;", *lines, "}"])


@triton.constexpr_function
def store_of_writers(count: int, operand: int) -> list[str]:
    """Lanes with p store v0 as float32 number w0 of the array at an operand; there are `count` numbers."""
    return [
        f"setp.lt.and.u32 p, w0, {count}, p;",
        f"mad.wide.u32 place, w0, 4, ${operand};",
        "@p st.global.f32 [place], v0;",
    ]


@triton.constexpr_function
def exchange(bit: int, low: str, high: str) -> list[str]:
    """low = the sum over both lanes that differ in `bit`: of low where the bit is 0, of high where it is 1."""
    return [
        f"and.b32 w1, lane, {bit}; setp.ne.u32 q, w1, 0;",
        f"selp.f32 sent, {low}, {high}, q; selp.f32 {low}, {high}, {low}, q;",
        f"shfl.sync.bfly.b32 sent, sent, {bit}, 31, -1; add.f32 {low}, {low}, sent;",
    ]


@triton.constexpr_function
def add_over_lanes(bit: int) -> list[str]:
    return [f"shfl.sync.bfly.b32 sent, v0, {bit}, 31, -1; add.f32 v0, v0, sent;"]


@triton.constexpr_function
def exchanged_sums(count: int, pack: int) -> str:
    """v_i = the sum over all lanes and `pack` elements of value i; after halving, lane j holds the one that j's high
    bits name."""
    width = 1 << (count - 1).bit_length()
    first = 2 * pack  # operands: what is returned, the place, the values
    lines = []
    for i in range(width):
        elements = [f"${first + i * pack + k}" for k in range(pack)] if i < count else ["0f00000000"]
        lines.append(f"mov.b32 v{i}, {elements[0]};")
        lines += [f"mov.b32 sent, {element}; add.f32 v{i}, v{i}, sent;" for element in elements[1:]]
    bit = 16  # half of the lanes
    while width > 1:
        width //= 2
        for i in range(width):
            lines += exchange(bit, f"v{i}", f"v{i + width}")
        bit //= 2
    left = bit
    while bit:
        lines += add_over_lanes(bit)
        bit //= 2
    shift = (2 * left).bit_length() - 1
    lines += [f"and.b32 w1, lane, {max(2 * left - 1, 0)}; setp.eq.u32 p, w1, 0;", f"shr.u32 w0, lane, {shift};"]
    return assembly([*lines, *store_of_writers(count, pack), *[f"mov.b32 ${k}, 0;" for k in range(pack)]])


@triton.constexpr_function
def tensor_core_sums(count: int, pack: int, dtype: str, bounds: int, ones: int) -> str:
    """The sums over all lanes and `pack` elements of `count` outcomes, clamped, of the elements that count.

    A matrix product adds up four outcomes: each fills a quarter of the left factor, upper or lower rows of its left or
    right half, and the right factor has ones where a column is to collect one of these halves. What is left is to add
    up eight rows.

    dtype: bf16 or f16, of which bounds and ones are words of two.
    """
    signs = 0x80008000
    limits = f".reg .b32 high, low; mov.b32 high, {bounds}; mov.b32 low, {bounds | signs};"
    first = 2 * pack
    lines = ["shr.u32 quad, lane, 2;", *[f"mov.f32 acc{i}, 0f00000000;" for i in range(4)]]
    for i in range((count + 3) // 4 * 4):
        if i >= count:
            lines.append(f"mov.b32 w{i}, 0;")
            continue
        # With one element to a lane the upper half is 0.
        lines.append(f"mov.b32 w{i}, ${first + i};" if pack == 2 else f"mov.b32 w{i}, {{${first + i}, zero}};")
        lines.append(f"and.b32 w{i}, w{i}, counted;")
        lines.append(f"min.NaN.{dtype}x2 w{i}, w{i}, high;")
        lines.append(f"max.NaN.{dtype}x2 w{i}, w{i}, low;")
    operand = first + count
    counted = f"mov.b32 counted, ${operand};" if pack == 2 else f"mov.b32 counted, {{${operand}, zero}};"
    lines = [limits, ".reg .b32 counted; .reg .b16 zero; mov.b16 zero, 0;", counted, *lines]
    for group in range((count + 3) // 4):
        for half in range(2):
            lines.append(f"setp.eq.u32 p, quad, {2 * group + half}; selp.b32 one{half}, {ones}, 0, p;")
        words = ", ".join(f"w{4 * group + i}" for i in range(4))
        sums = "{acc0, acc1, acc2, acc3}"
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {sums}, {{{words}}}, {{one0, one1}}, {sums};"
        )
    # Lane % 4 is the group; acc0 and acc1 are its outcomes 0 and 2, acc2 and acc3 its outcomes 1 and 3, of the row
    # lane / 4 of eight.
    lines += [f"mov.f32 v{i}, acc{i};" for i in range(4)]
    lines += [*exchange(16, "v0", "v2"), *exchange(16, "v1", "v3"), *exchange(8, "v0", "v1"), *add_over_lanes(4)]
    lines += [
        "and.b32 w1, lane, 4; setp.eq.u32 p, w1, 0;",
        "and.b32 w0, lane, 3; shl.b32 w0, w0, 2;",
        "shr.u32 w1, lane, 4; add.u32 w0, w0, w1;",
        "shr.u32 w1, lane, 2; and.b32 w1, w1, 2; add.u32 w0, w0, w1;",
    ]
    return assembly([*lines, *store_of_writers(count, pack), *[f"mov.b32 ${k}, 0;" for k in range(pack)]])


@triton.constexpr_function
def floor(bound: int) -> str:
    return f"{{ .reg .b32 low; mov.b32 low, {bound}; max.NaN.bf16x2 $0, $1, low; }}"


@triton.constexpr_function
def constraints(places: int, words: int, letter: str) -> str:
    """Of a block that returns a word and takes so many 64-bit places and words."""
    return ",".join(["=r"] * places + ["l"] * places + [letter] * words)


@triton.jit
def group_of(values, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of them, from the given one on."""
    group = ()
    for i in tl.static_range(COUNT):
        group = group + (values[FIRST + i],)
    return group


@triton.jit
def store_sums(
    ptr,  # [COUNT] float32, written
    values,
    COUNT: tl.constexpr,
    PACK: tl.constexpr,
):
    """The sums over the tile of COUNT float32 tensors."""
    if PACK == 0:
        for i in tl.static_range(COUNT):
            tl.store(ptr + i, tl.sum(values[i]))
    else:
        for first in tl.static_range(0, COUNT, MOST):
            count: tl.constexpr = MOST if COUNT - first > MOST else COUNT - first
            tl.inline_asm_elementwise(
                exchanged_sums(count, PACK), constraints(PACK, count * PACK, "r"),
                ((ptr + first).to(tl.int64),) + group_of(values, first, count),
                dtype=tl.int32, is_pure=False, pack=PACK,
            )  # fmt: skip


@triton.jit
def store_clamped_sums(
    ptr,  # [COUNT] float32, written
    values,
    counted,
    COUNT: tl.constexpr,
    PACK: tl.constexpr,
):
    """The sums over the counted elements of the tile of COUNT bfloat16 or float16 tensors, clamped to
    PROMPT_LOGIT_RANGE; a NaN stays one."""
    words = tl.where(counted, -1, 0).to(tl.int16)
    letter: tl.constexpr = "r" if PACK == 2 else "h"
    for first in tl.static_range(0, COUNT, MOST):
        count: tl.constexpr = MOST if COUNT - first > MOST else COUNT - first
        if values[0].dtype == tl.bfloat16:
            block: tl.constexpr = tensor_core_sums(count, PACK, "bf16", BF16_BOUNDS, BF16_ONES)
        else:
            block: tl.constexpr = tensor_core_sums(count, PACK, "f16", F16_BOUNDS, F16_ONES)
        args = ((ptr + first).to(tl.int64),) + group_of(values, first, count) + (words,)
        tl.inline_asm_elementwise(
            block, constraints(PACK, count + 1, letter), args, dtype=tl.int32, is_pure=False, pack=PACK
        )


@triton.jit
def largest(values, COUNT: tl.constexpr, PACK: tl.constexpr):
    """The largest of COUNT tensors as float32, a NaN passed over."""
    if PACK == 2 and values[0].dtype == tl.bfloat16:
        top = values[0]
        for c in tl.static_range(1, COUNT):
            top = tl.inline_asm_elementwise(
                "max.bf16x2 $0, $1, $2;", "=r,r,r", [top, values[c]], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        top = top.to(tl.float32)
    else:
        top = values[0].to(tl.float32)
        for c in tl.static_range(1, COUNT):
            top = tl.maximum(top, values[c].to(tl.float32))
    return top


@triton.jit
def floored(x, PACK: tl.constexpr):
    """A logit with a finite stand-in for -inf, so that 0 * log 0 is 0, as float32; a NaN stays one."""
    if PACK == 2 and x.dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise(floor(BF16_LOWEST), "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    return x.to(tl.float32)


@triton.jit
def kept(x, counted, PACK: tl.constexpr):
    """x where it counts, 0 elsewhere."""
    if PACK == 2 and x.dtype.primitive_bitwidth == 16:
        words = tl.where(counted, -1, 0).to(tl.int16)
        x = tl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [x, words], dtype=x.dtype, is_pure=True, pack=2)
    else:
        x = tl.where(counted, x, 0.0)
    return x
