"""Mistakes that a CUDA kernel may have, one by one in csrc/prompt, and the mode that catches each.

`python -m tests.emulated.mutations` prints what every mode says to every mutation.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.emulated.build import ADDRESS, KERNELS, MODES, PLAIN, THREAD, Mode, Workshop, missing, workers


@dataclass(frozen=True)
class Mutation:
    name: str
    caught_by: Mode  # the cheapest that does
    old: str  # stands in the source exactly once, together with what follows it
    new: str
    before: str = ""

    def apply(self, source: str) -> str:
        place = self.old + self.before
        count = source.count(place)
        if count != 1:
            raise ValueError(f"{self.name!r} must find its place exactly once, it found {count}: {place!r}")
        return source.replace(place, self.new + self.before)


BARRIERS = [
    Mutation(
        "block_sum without the barrier before its writes",
        THREAD, "__syncthreads();", "", before="  // sums may still be read from the call before",
    ),
    Mutation(
        "block_sum without the barrier after its writes", PLAIN, "__syncthreads();", "", before="\n    A total = 0;"
    ),
    Mutation(
        "masked_mean_pool_forward without the barrier after its writes",
        PLAIN, "__syncthreads();", "", before="\n\n        int total",
    ),
    Mutation(
        "masked_mean_pool_forward without the barrier before its next block",
        PLAIN, "__syncthreads();", "", before="\n    }\n}\n\n// Adds the chunks up",
    ),
    Mutation(
        "masked_mean_pool_forward exits before its barrier",
        PLAIN, "continue;", "return;", before="\n            A value",
    ),
    Mutation("block_sum shuffles from half a warp", PLAIN, "offset = kWarp / 2;", "offset = kWarp / 4;"),
    Mutation("block_sum leaves a shuffle out", PLAIN, "offset > 0;", "offset > 1;"),
    Mutation("block_sum reads one warp too many", PLAIN, "warp < blockDim.x / kWarp;", "warp <= blockDim.x / kWarp;"),
    Mutation("block_sum has one place too few", ADDRESS, "kRowThreads / kWarp];", "kRowThreads / kWarp - 1];"),
    Mutation("rows start with part of a warp", PLAIN, "kWarp * divide_up(", "divide_up("),
]  # fmt: skip

ALIGNMENT = [
    Mutation("aligned forgets the address", ADDRESS, "reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && ", ""),
    Mutation("aligned forgets the stride", ADDRESS, " && stride * size % 16 == 0", ""),
    Mutation(
        "masked_mean_pool_forward forgets the stride of rows",
        ADDRESS, "aligned(args.hidden, args.stride_row, sizeof(T)) &&", "",
    ),
    Mutation(
        "masked_mean_pool_forward forgets that of tokens",
        ADDRESS, "aligned(args.hidden, args.stride_token, sizeof(T));", "true;",
    ),
    Mutation("masked_mean_pool_forward forgets that of columns", PLAIN, "args.stride_column == 1 && ", ""),
    Mutation("masked_mean_pool_forward is wide at any width", ADDRESS, "args.width % kVector == 0 &&", ""),
    Mutation(
        "masked_mean_pool_backward is always wide",
        ADDRESS, "aligned(args.grad_hidden, args.width, sizeof(T));", "true;",
    ),
    Mutation(
        "load4 forgets the address", ADDRESS, " && reinterpret_cast<uintptr_t>(data) % alignof(Pack<T, 4>) == 0;", ";"
    ),
    Mutation("load4 forgets the stride", PLAIN, "row.stride == 1 && ", ""),
    Mutation(
        "store4 forgets the address", ADDRESS, " && reinterpret_cast<uintptr_t>(data) % alignof(Pack<T, 4>) == 0)", ")"
    ),
]  # fmt: skip

BOUNDS = [
    Mutation(
        "masked_mean_pool_forward reads one column too many",
        ADDRESS, "inside = column < args", "inside = column <= args",
    ),
    Mutation("masked_mean_pool_forward writes one column too many", ADDRESS, "c >= args.width", "c > args.width"),
    Mutation(
        "masked_mean_pool_forward reads one token too many",
        PLAIN, "keep[k] = at < place.end", "keep[k] = at <= place.end",
    ),
    Mutation("the last chunk has no end", PLAIN, "end(min(length, (chunk + 1) * tokens))", "end((chunk + 1) * tokens)"),
    Mutation(
        "masked_mean_pool_combine writes one element too many",
        ADDRESS, "at < elements", "at <= elements", before="; at += stride) {\n        const int64_t row",
    ),
    Mutation(
        "masked_mean_pool_backward writes one column too many",
        PLAIN, "column >= args.width", "column > args.width",
    ),
    Mutation(
        "masked_mean_pool_backward writes one token too many",
        PLAIN, "l < place.end", "l <= place.end", before="; l += kPoolWarps)",
    ),
    Mutation("load4 is wide past the end", ADDRESS, "vector && begin + 4 <= count", "vector"),
    Mutation("load4 reads past the end", ADDRESS, " && begin + i < count ?", " ?"),
    Mutation("store4 is wide past the end", ADDRESS, "begin + 4 <= count && ", "", before="reinterpret_cast"),
    Mutation("store4 writes past the end", ADDRESS, "if (begin + i < count) data", "data"),
    Mutation("refine_prompt_forward sums up past the end", PLAIN, "if (begin + i < dimension) {", "{"),
    Mutation(
        "squashed_log_prob_forward leaves the last component out",
        PLAIN, "d <= args.dimension;", "d < args.dimension;",
    ),
    Mutation(
        "squashed_log_prob_backward writes one element too many",
        ADDRESS, "at < elements", "at <= elements", before="; at += stride) {\n        const int64_t b",
    ),
]  # fmt: skip

GRIDS = [
    Mutation(
        "masked_mean_pool_forward starts no block without a column",
        PLAIN, "std::max<int64_t>(1, ", "(", before="divide_up(args.width, kWarp",
    ),
    Mutation("masked_mean_pool_chunks splits rows without a column", PLAIN, "if (args.width == 0) return 1;", ""),
    Mutation("grids are not limited", PLAIN, "std::min(blocks, kMaxGrid)", "blocks"),
    Mutation(
        "masked_mean_pool_forward does not stride",
        PLAIN, "block += gridDim.x", "block = blocks", before=") {\n        const PoolPlace place(block, tiles, args",
    ),
    Mutation(
        "masked_mean_pool_combine does not stride",
        PLAIN, "at += stride", "at = elements", before=") {\n        const int64_t row",
    ),
    Mutation(
        "masked_mean_pool_backward does not stride",
        PLAIN, "block += gridDim.x", "block = blocks", before=") {\n        const PoolPlace place(block, tiles, chunks",
    ),
    Mutation(
        "refine_prompt_forward does not stride",
        PLAIN, "b += gridDim.x", "b = args.batch", before=") {\n        const Row<T> prompt",
    ),
    Mutation(
        "refine_prompt_backward does not stride",
        PLAIN, "b += gridDim.x", "b = args.batch", before=") {\n        const Row<T> grad_refined",
    ),
    Mutation(
        "squashed_log_prob_forward does not stride",
        PLAIN, "b += gridDim.x", "b = args.batch", before=") {\n        const Row<A> action",
    ),
    Mutation(
        "squashed_log_prob_backward does not stride",
        PLAIN, "at += stride", "at = elements", before=") {\n        const int64_t b",
    ),
]  # fmt: skip

ALL = [*BARRIERS, *ALIGNMENT, *BOUNDS, *GRIDS]


def main() -> int:
    """Markdown; exits with 1 where no mode catches a mutation."""
    modes = [mode for mode in MODES if missing(mode) is None]
    with tempfile.TemporaryDirectory() as folder, workers() as pool:
        workshop = Workshop(Path(folder), modes)

        def said(index: int) -> list[str]:
            return [workshop.drive(mode, ALL[index].apply(KERNELS), f"mutation{index}") for mode in modes]

        print(" | ".join(["", "mutation", *(mode.name for mode in modes), ""]).strip())
        print("|---" * (1 + len(modes)) + "|")
        missed = 0
        for mutation, complaints in zip(ALL, pool.map(said, range(len(ALL))), strict=True):
            print(" | ".join(["", mutation.name, *(found or "-" for found in complaints), ""]).strip(), flush=True)
            missed += not any(complaints)
    print(f"\n{len(ALL)} mutations, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
