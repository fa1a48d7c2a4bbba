// What the CUDA kernels of prompt refinement share. Sums run in a fixed order (lanes, then warps, then chunks), without
// atomics: every run gives the same bits. No torch header: cuda_ops.cpp is the glue.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "common/dtype.h"
#include "common/philox.h"
#include "prompt/kernels.h"
#include "prompt/noise.h"

namespace efe::prompt::cuda {

constexpr int kWarp = 32;
constexpr int kRowThreads = 256;  // at most, for one row of the policy
constexpr int64_t kMaxGrid = 1 << 30;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(Arithmetic<T> x) {
    return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// The widest type for one access of up to 16 bytes. Copying half types as themselves would access them one by one.
template <int Bytes>
struct WordType {
    using type = uint4;
};
template <>
struct WordType<8> {
    using type = uint2;
};
template <>
struct WordType<4> {
    using type = uint32_t;
};
template <>
struct WordType<2> {
    using type = uint16_t;
};

// N values that move together, aligned to the access that moves them.
template <class T, int N>
struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Pack {
    using Word = typename WordType<sizeof(T) * N>::type;
    static constexpr int kWords = sizeof(T) * N / sizeof(Word);

    T values[N];

    __device__ __forceinline__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(values)[i] = reinterpret_cast<const Word*>(from)[i];
    }

    // Writes the values, or zeros where they are not kept.
    __device__ __forceinline__ void store(T* to, bool keep = true) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i)
            reinterpret_cast<Word*>(to)[i] = keep ? reinterpret_cast<const Word*>(values)[i] : Word{};
    }
};

// Elements [begin, begin + 4) of a row with `count` elements, as A; 0 past its end and where it is absent.
template <class T>
__device__ __forceinline__ void load4(const Row<T>& row, int64_t begin, int64_t count, Arithmetic<T> (&out)[4]) {
    const T* data = row.data + begin * row.stride;
    const bool vector = row.stride == 1 && reinterpret_cast<uintptr_t>(data) % alignof(Pack<T, 4>) == 0;
    if (row.data != nullptr && vector && begin + 4 <= count) {
        Pack<T, 4> pack;
        pack.load(data);
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = widen(pack.values[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            out[i] = row.data != nullptr && begin + i < count ? widen(data[i * row.stride]) : Arithmetic<T>(0);
    }
}

// The noise of elements [begin, begin + 4), begin being a multiple of 4; given noise is 0 past its end.
template <class A>
__device__ __forceinline__ void load4(const Noise<A>& noise, int64_t begin, int64_t count, A (&out)[4]) {
    if (noise.is_given()) return load4(noise.given, begin, count, out);
    const Normals4<A> drawn = philox_normal4<A>(noise.seed, noise.row, begin / 4);
    out[0] = drawn.n0;
    out[1] = drawn.n1;
    out[2] = drawn.n2;
    out[3] = drawn.n3;
}

template <class T>
__device__ __forceinline__ void store4(const Arithmetic<T> (&values)[4], T* row, int64_t begin, int64_t count) {
    T* data = row + begin;
    if (begin + 4 <= count && reinterpret_cast<uintptr_t>(data) % alignof(Pack<T, 4>) == 0) {
        Pack<T, 4> pack;
#pragma unroll
        for (int i = 0; i < 4; ++i) pack.values[i] = narrow<T>(values[i]);
        pack.store(data);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (begin + i < count) data[i] = narrow<T>(values[i]);
    }
}

// Sum over a block whose size is a multiple of 32, the same in every thread.
template <class A>
__device__ A block_sum(A value) {
    __shared__ A sums[kRowThreads / kWarp];
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    __syncthreads();  // sums may still be read from the call before
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
    __syncthreads();
    A total = 0;
    for (int warp = 0; warp < blockDim.x / kWarp; ++warp) total += sums[warp];
    return total;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned grid(int64_t blocks) { return static_cast<unsigned>(std::min(blocks, kMaxGrid)); }

// Threads for a row in which each takes `per_thread` elements at a time.
inline unsigned row_threads(int64_t elements, int64_t per_thread) {
    return static_cast<unsigned>(std::min<int64_t>(kRowThreads, kWarp * divide_up(elements, kWarp * per_thread)));
}

}  // namespace efe::prompt::cuda
