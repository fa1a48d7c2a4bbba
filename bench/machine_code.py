"""What the machine code of one kernel says: operations, loops, registers, spills. It needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Access widths in bytes, by the part of an operation's name that tells them; 4 where NVIDIA's says nothing.
WIDTHS = {
    "U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16,
    "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2,
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip
LOADS = {"cuda": ("LDG",), "hip": ("global_load", "buffer_load")}
STORES = {"cuda": ("STG",), "hip": ("global_store", "buffer_store")}
# Exponentials, logarithms, reciprocals and roots.
SPECIAL = {"cuda": ("MUFU",), "hip": ("v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt")}


@dataclass(frozen=True)
class Code:
    """loops: the places of their operations; a loop comes after those inside it."""

    operations: list[str]
    loops: list[range]
    registers: int
    spill_bytes: int

    def accesses(self, kinds: tuple[str, ...]) -> dict[int, int]:
        """Bytes of one access of one lane -> how many there are among the operations of these kinds."""
        found = (width_of(operation) for operation in self.operations if operation.startswith(kinds))
        return dict(sorted(Counter(found).items()))

    def executions(self, trips: Sequence[int]) -> list[int] | None:
        """How often a lane executes each operation, a branch counted as taken; None where it is not known.

        trips: of the loops that the source has, a loop after those inside it. Where the code has none of them they are
        unrolled; where it has some, which ones is not known.
        """
        if self.loops and len(self.loops) != len(trips):
            return None
        counts = [1] * len(self.operations)
        for loop, times in zip(self.loops, trips, strict=False):
            for place in loop:
                counts[place] *= times
        return counts


def width_of(operation: str) -> int:
    """Bytes that one lane accesses."""
    return sum(WIDTHS.get(part, 0) for part in re.split(r"[._]", operation)) or 4


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(BINARIES / name), *arguments], capture_output=True, text=True, check=True).stdout


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9._]+)(.*)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")


def nvidia_code(compiled: Any) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = tool("nvdisasm", "-c", file.name)
        usage = tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump told no resource usage: {usage}")
    operations, loops = operations_of(listing)
    return Code(operations, loops, registers=int(found[1]), spill_bytes=int(found[2]))


def operations_of(listing: str) -> tuple[list[str], list[range]]:
    """The operations of NVIDIA's listing of one kernel, and the places of its loops."""
    operations: list[str] = []
    loops: dict[str, range] = {}
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(operations)
        elif instruction := INSTRUCTION.search(line):
            operation, operands = instruction.groups()
            if operation == "NOP":
                continue
            operations.append(operation)
            if operation.startswith("BRA"):
                loops |= loop_closed(len(operations), labels, operands)
    return operations, [*loops.values()]


def loop_closed(end: int, labels: dict[str, int], target: str) -> dict[str, range]:
    """Label and places of the loop that the operation before `end`, a branch to `target`, closes, if it does."""
    for label, place in labels.items():
        # Padding behind the end is a branch to itself.
        if re.search(rf"{re.escape(label)}\b", target) and place < end - 1:
            return {label: range(place, end)}
    return {}


def amd_code(compiled: Any) -> Code:
    listing = compiled.asm["amdgcn"]

    def told(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", listing)[0])

    operations: list[str] = []
    loops: dict[str, range] = {}
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(operations)
        elif instruction := re.match(r"\t([a-z]\w+)\s*(.*)", line):
            operation, operands = instruction.groups()
            operations.append(operation)
            if operation.startswith(("s_cbranch", "s_branch")):
                loops |= loop_closed(len(operations), labels, operands)
    return Code(operations, [*loops.values()], told("vgpr_count"), told("private_segment_fixed_size"))
