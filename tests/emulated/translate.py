"""Makes C++ for the emulator of CUDA sources: launches, shared memory and launch bounds are rewritten, all else stays.

What looks like CUDA and is not known here is refused with its line: the emulator does not guess.
"""

from __future__ import annotations

import re
from pathlib import Path

# The header that holds device code: it must be translated with the sources that include it.
HEADER = "prompt/cuda_device.h"
# What device.h and the headers in include/ define as CUDA has it, and the emulator's own namespace.
KNOWN = {
    "__CUDACC__", "__global__", "__device__", "__forceinline__", "__syncthreads", "__shfl_xor_sync",
    "__half", "__half2float", "__float2half_rn", "__nv_bfloat16", "__bfloat162float", "__float2bfloat16_rn",
    "cudaStream_t", "cuda_emulator",
}  # fmt: skip
REWRITTEN = {"__shared__", "__launch_bounds__"}
# The namespace of our own launchers is called `cuda`; an index stands with the component that is asked for.
LOOKS_LIKE_CUDA = re.compile(
    r"\b(?:__\w+|cuda\w+|cu[A-Z]\w*|cu(?:rand|blas|dnn|fft)\w*|nvcuda|cub|cooperative_groups|atomic\w*|asm"
    r"|(?:tex|surf)[123]D\w*|clock(?:64)?|warpSize|dim3|(?:(?:thread|block)Idx|(?:block|grid)Dim)(?:\s*\.\s*\w+)?)\b"
)
INDEX = re.compile(r"(?:threadIdx|blockIdx|blockDim|gridDim)\.x")
# A comment, a literal or an include: no place for a construct.
OPAQUE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|#\s*include[^\n]*', re.DOTALL)
SHARED = re.compile(r"(?<!extern )__shared__ ([\w:<>]+ )(\w+)((?:\[[^\];]+\])*);")
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(([^()]*)\)\s+)?(\w+)\([^()]*\)\s*\{")
LAUNCH = re.compile(r"\b(\w+)(<[^<>;]*>)?\s*<<<")
PART = re.compile(r'#line 1 "(.+)"')
GRID_LIMIT = re.compile(r"constexpr int64_t kMaxGrid = ([^;]+);")


def join(csrc: Path) -> str:
    """All CUDA sources in one, so that a place in the text is one in the library: the header, then what includes it."""
    include = f'#include "{HEADER}"'
    parts = [(csrc / HEADER).read_text().replace("#pragma once", "")]
    names = [HEADER]
    for path in sorted(csrc.glob("*/*.cu")):
        names.append(str(path.relative_to(csrc)))
        parts.append(path.read_text().replace(include, ""))
    return "".join(f'#line 1 "csrc/{name}"\n{part}' for name, part in zip(names, parts, strict=True))


def translate(source: str, name: str) -> str:
    """C++ in which every line keeps its number; `name` is what compilers and the emulator call the source."""
    blank = OPAQUE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)
    refuse_unknown(blank, source, name)
    edits = [*shared_memory(blank), *launch_bounds(blank), *launches(blank), *grid_limit(blank)]
    text = apply(source, edits)
    for construct in (*REWRITTEN, "<<<", ">>>"):
        at = apply(blank, edits).find(construct)
        if at >= 0:
            raise unknown(construct, apply(blank, edits), at, source, name)
    return f'#include "device.h"\n#line 1 "{name}"\n{text}'


def kernels(source: str) -> list[str]:
    """The names of the kernels in a CUDA source."""
    return [found[2] for found in KERNEL.finditer(source)]


Edit = tuple[int, int, str]  # begin, end, what comes there instead


def apply(text: str, edits: list[Edit]) -> str:
    for begin, end, new in sorted(edits, reverse=True):
        text = text[:begin] + new + text[end:]
    return text


def unknown(construct: str, text: str, at: int, source: str, name: str) -> ValueError:
    """at: where the construct stands in the text, whose lines are those of the source."""
    begin, line = 0, text.count("\n", 0, at) + 1
    for number, found in enumerate(source.splitlines()[:line], 1):
        if part := PART.fullmatch(found):
            begin, name = number, part[1]
    line -= begin
    return ValueError(f"{name}:{line}: the emulator does not know {construct!r} in this form; teach it or do without.")


def refuse_unknown(blank: str, source: str, name: str) -> None:
    for found in LOOKS_LIKE_CUDA.finditer(blank):
        construct = re.sub(r"\s", "", found[0])
        if not INDEX.fullmatch(construct) and construct not in KNOWN | REWRITTEN:
            raise unknown(construct, blank, found.start(), source, name)


def shared_memory(blank: str) -> list[Edit]:
    """Blocks run one after another, so that static memory is shared by the threads of one."""
    return [
        (
            *found.span(),
            f"static {found[1]}{found[2]}{found[3]}; cuda_emulator::poison(&{found[2]}, sizeof {found[2]});",
        )
        for found in SHARED.finditer(blank)
    ]


def launch_bounds(blank: str) -> list[Edit]:
    """Bounds move into the body, where the emulator checks them."""
    edits: list[Edit] = []
    for found in KERNEL.finditer(blank):
        if found[1] is not None:
            edits.append((blank.index("__launch_bounds__", found.start()), found.end(1) + 1, ""))
            edits.append((found.end(), found.end(), f" cuda_emulator::launch_bounds({found[1]});"))
    return edits


def launches(blank: str) -> list[Edit]:
    """kernel<...><<<configuration>>>(arguments) -> launch("kernel", kernel<...>, configuration)(arguments)."""
    edits: list[Edit] = []
    for found in LAUNCH.finditer(blank):
        end = blank.find(">>>", found.end())
        if end >= 0 and ";" not in blank[found.end() : end]:
            kernel = found[1] + (found[2] or "")
            edits.append(
                (*found.span(), re.sub(r"[^\n]", "", found[0]) + f'cuda_emulator::launch("{found[1]}", {kernel}, ')
            )
            edits.append((end, end + 3, ")"))
    return edits


def grid_limit(blank: str) -> list[Edit]:
    """The largest grid becomes a variable, so that a test sees grid-stride loops loop."""
    return [
        (*found.span(), f"int64_t& kMaxGrid = (cuda_emulator::grid_limit = {found[1]});")
        for found in GRID_LIMIT.finditer(blank)
    ]
