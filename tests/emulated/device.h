// What nvcc knows without an include, as far as our kernels use it. Included first in a translated source.
#pragma once

#include <algorithm>
#include <cmath>

#include "emulator.h"

#define __CUDACC__ 1
#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

inline const cuda_emulator::Index& threadIdx = cuda_emulator::thread_index;
inline const cuda_emulator::Index& blockIdx = cuda_emulator::block_index;
inline const cuda_emulator::Index& blockDim = cuda_emulator::block_size;
inline const cuda_emulator::Index& gridDim = cuda_emulator::grid_size;

using std::max;
using std::min;

inline void sincospi(double t, double* sine, double* cosine) {
    *sine = std::sin(M_PI * t);
    *cosine = std::cos(M_PI * t);
}

inline void sincospif(float t, float* sine, float* cosine) {
    *sine = static_cast<float>(std::sin(M_PI * t));
    *cosine = static_cast<float>(std::cos(M_PI * t));
}

inline void __syncthreads(const std::source_location& site = std::source_location::current()) {
    cuda_emulator::synchronize_block(site);
}

template <class T>
T __shfl_xor_sync(
    unsigned mask, T value, int lane_mask, const std::source_location& site = std::source_location::current()) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = cuda_emulator::exchange(bits, mask, lane_mask, site);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
