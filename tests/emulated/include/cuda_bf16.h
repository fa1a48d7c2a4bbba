// Stands in for CUDA's header where kernels are emulated.
#pragma once

#include <cstdint>

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 half) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(half.bits) << 16);
}

// To nearest, ties to even; CUDA has one NaN.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    if (value != value) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
