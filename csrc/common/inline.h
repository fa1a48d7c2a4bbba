// EFE_INLINE marks what both the C++ and the CUDA kernels call. Always inlined: on the CPU a loop is compiled once per
// instruction set (simd.h), and only what is inlined into it is compiled for that set. EFE_UNROLL unrolls the loop that
// follows, of up to 16 turns.
#pragma once

#ifdef __CUDACC__
#define EFE_INLINE __device__ __forceinline__
#define EFE_UNROLL _Pragma("unroll")
#else
#define EFE_INLINE inline __attribute__((always_inline))
#define EFE_UNROLL _Pragma("GCC unroll 16")
#endif
