"""The exponential and the logarithm of the CPU kernel, over the whole range that it gives them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# Every 101st float of a range, its error in units of the last place of the exact result, and the largest printed. What
# is below the smallest normal number may be flushed to 0.
PROGRAM = """
#include <cstdio>
#include "efe_loss/registers.h"

using namespace efe;
using namespace efe::efe_loss;

double error(float found, double exact) {
    const double smallest = std::ldexp(1.0, -126), size = std::max(std::abs(exact), smallest);
    if (std::abs(exact) < smallest && std::abs(found - exact) <= smallest) return 0;
    return std::abs(found - exact) / std::ldexp(1.0, std::ilogb(size) - 23);
}

float number(uint64_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits);
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
}

template <bool kLog>
double largest(uint32_t first, uint32_t last) {
    double found = 0;
    with_lanes([&](auto lanes) EFE_SIMD_BODY {
        constexpr int N = decltype(lanes)::value;
        using R = Registers<2, N>;
        float x[N], y[N];
        for (uint64_t bits = first; bits + 101 * N < last; bits += 101 * N) {
            for (int i = 0; i < N; ++i) x[i] = number(bits + 101 * i);
            R::store(y, kLog ? R::log_finite(R::load(x)) : R::exp_nonpositive(R::load(x)));
            for (int i = 0; i < N; ++i)
                found = std::max(found, error(y[i], kLog ? std::log(double(x[i])) : std::exp(double(x[i]))));
        }
    });
    return found;
}

int main() {  // from -0 to -88; every normal number
    std::printf("%f %f", largest<false>(0x80000000u, 0xC2B00000u), largest<true>(0x00800000u, 0x7F800000u));
}
"""


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_exp_and_log_are_right_to_about_one_unit_of_the_last_place(capability: str, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "largest.cpp", tmp_path / "largest"
    source.write_text(PROGRAM)
    folders = (CSRC, sysconfig.get_path("include"), *cpp_extension.include_paths())
    includes = [f"-I{folder}" for folder in folders]
    command = [compiler, "-std=c++20", "-O2", "-Wno-psabi", *includes, str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    told = subprocess.run([program], check=True, capture_output=True, text=True, env=environment).stdout
    exponential, logarithm = map(float, told.split())
    assert 0 < exponential < 1.2
    assert 0 < logarithm < 1.0
