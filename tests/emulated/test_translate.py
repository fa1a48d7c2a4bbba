"""What the translation makes of CUDA, and that it refuses by name and line what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulated.build import KERNELS
from tests.emulated.translate import HEADER, join, kernels, translate

REFUSED = {
    "__constant__ float table[4];": "__constant__",
    "__managed__ int x;": "__managed__",
    "__device__ void f() { __syncwarp(); }": "__syncwarp",
    "__device__ void f() { __threadfence(); }": "__threadfence",
    "__device__ int f(int x) { return __ballot_sync(0xffffffffu, x); }": "__ballot_sync",
    "__device__ float f(const float* x) { return __ldg(x); }": "__ldg",
    "__device__ void f(int* x) { atomicAdd(x, 1); }": "atomicAdd",
    '__device__ void f() { asm volatile("bar.sync 0;"); }': "asm",
    "__device__ int f() { return threadIdx.y; }": "threadIdx.y",
    "__device__ int f() { return gridDim . z; }": "gridDim.z",
    "__device__ auto f() { return blockIdx; }": "blockIdx",
    "__device__ int f() { return warpSize; }": "warpSize",
    "dim3 grid(1, 2, 3);": "dim3",
    "void f(void* x) { cudaMemcpyAsync(x, x, 4, cudaMemcpyDefault); }": "cudaMemcpyAsync",
    "namespace cg = cooperative_groups;": "cooperative_groups",
    "auto f() { return cooperative_groups::this_thread_block(); }": "cooperative_groups",
    "using namespace nvcuda::wmma;": "nvcuda",
    "__device__ long long f() { return clock64(); }": "clock64",
    "__global__ void k() { extern __shared__ float memory[]; }": "__shared__",
    "__global__ void k() { __shared__ float memory[]; }": "__shared__",
    "__global__ void k() { __shared__ float a[2], b[2]; }": "__shared__",
    "__launch_bounds__(64) __global__ void k() {}": "__launch_bounds__",
    "void f() { (*kernel)<<<1, 32>>>(); }": "<<<",
    "void f() { kernel<<<1, 32; }": "<<<",
}


@pytest.mark.parametrize("source", REFUSED)
def test_a_construct_that_is_not_known_is_refused_by_name_and_line(source: str) -> None:
    with pytest.raises(ValueError) as refusal:
        translate(f"// the first line\n\n{source}\n", "some.cu")
    assert str(refusal.value).startswith(f"some.cu:3: the emulator does not know {REFUSED[source]!r}")


def test_a_refusal_names_the_source_of_several(tmp_path: Path) -> None:
    (tmp_path / "prompt").mkdir()
    (tmp_path / HEADER).write_text("#pragma once\n")
    for name, text in (("first.cu", f'#include "{HEADER}"\n'), ("second.cu", "\ndim3 grid(1);\n")):
        (tmp_path / "prompt" / name).write_text(text)
    with pytest.raises(ValueError, match=r"^csrc/prompt/second\.cu:2: the emulator does not know 'dim3'"):
        translate(join(tmp_path), "csrc")


def test_comments_literals_and_includes_are_no_constructs() -> None:
    source = (
        '#include <cuda_bf16.h>\n// atomicAdd, a <<< b\n/* __shared__\n */ const char* text = "asm \\" threadIdx.y";\n'
    )
    assert translate(source, "some.cu").endswith(source)


def test_every_line_keeps_its_number() -> None:
    before, after = KERNELS.splitlines(), translate(KERNELS, "cuda.cu").splitlines()[2:]
    assert len(before) == len(after)
    for number, (old, new) in enumerate(zip(before, after, strict=True), 1):
        rewritten = any(
            word in old + new for word in ("<<<", "__shared__", "__launch_bounds__", "kMaxGrid", "cuda_emulator")
        )
        assert rewritten or old == new or "_kernel<" in old, f"line {number}"


def test_every_kernel_and_launch_of_the_library_is_found() -> None:
    assert len(kernels(KERNELS)) == KERNELS.count("__global__")
    text = translate(KERNELS, "cuda.cu")
    assert text.count("cuda_emulator::launch(") == KERNELS.count("<<<")
    assert text.count("cuda_emulator::launch_bounds(") == KERNELS.count("__launch_bounds__")
    assert text.count("cuda_emulator::poison(") == KERNELS.count("__shared__")
    assert text.count("cuda_emulator::grid_limit") == 1


def test_a_launch_over_two_lines_keeps_both() -> None:
    text = translate("void f() {\n    kernel<int>\n        <<<grid(1), 32, 0, stream>>>(a, b);\n}\n", "some.cu")
    assert 'cuda_emulator::launch("kernel", kernel<int>, grid(1), 32, 0, stream)(a, b);' in text
    assert text.count("\n") == 2 + 4
