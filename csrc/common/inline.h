// EFE_INLINE marks what both the C++ and the CUDA kernels call. Always inlined: on the CPU a loop is compiled once per
// instruction set (simd.h), and only what is inlined into it is compiled for that set.
#pragma once

#ifdef __CUDACC__
#define EFE_INLINE __host__ __device__ __forceinline__
#else
#define EFE_INLINE inline __attribute__((always_inline))
#endif
