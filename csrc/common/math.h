// exp, log, sin and cos for both kinds of kernel: CUDA's own on the device, and on the CPU branch-free polynomials for
// float, which the compiler vectorises, and the C library for double. The polynomials are Taylor series on a reduced
// range, long enough that what is cut off is below a quarter of a unit in the last place (ulp).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace efe::math {

constexpr double kPi = 3.14159265358979323846;
constexpr double kLn2 = 0.69314718055994530942;

// exp(x) and exp(x) - 1, each with a small relative error.
template <class A>
struct Exponential {
    A value, minus_one;
};

#ifdef __CUDA_ARCH__

__device__ __forceinline__ Exponential<float> exponential(float x) { return {expf(x), expm1f(x)}; }
__device__ __forceinline__ Exponential<double> exponential(double x) { return {::exp(x), ::expm1(x)}; }
__device__ __forceinline__ float exp(float x) { return expf(x); }
__device__ __forceinline__ double exp(double x) { return ::exp(x); }
__device__ __forceinline__ float log1p_unit(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_unit(double x) { return ::log1p(x); }
__device__ __forceinline__ float log_normal_range(float x) { return logf(x); }
__device__ __forceinline__ double log_normal_range(double x) { return ::log(x); }
__device__ __forceinline__ void sincos_half_turns(float t, float* s, float* c) { sincospif(t, s, c); }
__device__ __forceinline__ void sincos_half_turns(double t, double* s, double* c) { sincospi(t, s, c); }

#else

// The integer nearest to x for |x| < 2^22: adding 1.5 * 2^23 leaves no bit for the fraction.
EFE_INLINE float round_to_integer(float x) {
    constexpr float kShift = 12582912.0f;
    return (x + kShift) - kShift;
}

// 2^k for -126 <= k <= 127.
EFE_INLINE float power_of_two(int32_t k) { return __builtin_bit_cast(float, (k + 127) << 23); }

// x = k ln 2 + r with |r| <= ln(2) / 2; exp(x) = 2^k (1 + p), exp(x) - 1 = 2^k p + (2^k - 1), p = exp(r) - 1.
// 2^k is applied in two halves, so that results reach down to the subnormals and up to infinity.
EFE_INLINE Exponential<float> exponential(float x) {
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const float k = round_to_integer(x * 1.44269504f);
    const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;  // the first product is exact
    const float p =
        r + r * r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040))))));
    const int32_t exponent = static_cast<int32_t>(k);
    const int32_t half = exponent >> 1;
    const float first = power_of_two(half), second = power_of_two(exponent - half);
    const float scale = first * second;
    return {(1.0f + p) * first * second, p * first * second + (scale - 1.0f)};
}

EFE_INLINE float exp(float x) { return exponential(x).value; }

// log(1 + x) for x in [0, 1]: 2 artanh(s) with s = x / (2 + x). The square is kept out of the subnormals, on which a
// CPU takes a hundred times as long, and where it no longer counts.
EFE_INLINE float log1p_unit(float x) {
    const float s = x / (2.0f + x), root = s < 0x1p-50f ? 0x1p-50f : s, z = root * root;
    return s * (2.0f + z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9 + z * (2.0f / 11 + z * (2.0f / 13)))))));
}

// log(x) for positive normal x: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 artanh((m - 1) / (m + 1)).
EFE_INLINE float log_normal_range(float x) {
    const int32_t bits = __builtin_bit_cast(int32_t, x);
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;
    const float m = __builtin_bit_cast(float, bits - (exponent << 23));
    const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    const float log_m = s * (2.0f + z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9)))));
    return static_cast<float>(exponent) * static_cast<float>(kLn2) + log_m;
}

// sin(pi t) and cos(pi t) for |t| <= 1: t = q / 2 + r with |r| <= 1/4, then the quadrant q swaps and negates.
EFE_INLINE void sincos_half_turns(float t, float* sine, float* cosine) {
    const float q = round_to_integer(t * 2.0f);
    const float x = (t - q * 0.5f) * static_cast<float>(kPi), z = x * x;
    const float s = x - x * z * (1.0f / 6 - z * (1.0f / 120 - z * (1.0f / 5040 - z * (1.0f / 362880))));
    const float c =
        1.0f - z * (1.0f / 2 - z * (1.0f / 24 - z * (1.0f / 720 - z * (1.0f / 40320 - z * (1.0f / 3628800)))));
    const int32_t quadrant = static_cast<int32_t>(q);
    const bool swap = (quadrant & 1) != 0;
    const float a = swap ? c : s, b = swap ? s : c;
    *sine = (quadrant & 2) != 0 ? -a : a;
    *cosine = ((quadrant + 1) & 2) != 0 ? -b : b;
}

EFE_INLINE Exponential<double> exponential(double x) { return {std::exp(x), std::expm1(x)}; }
EFE_INLINE double exp(double x) { return std::exp(x); }
EFE_INLINE double log1p_unit(double x) { return std::log1p(x); }
EFE_INLINE double log_normal_range(double x) { return std::log(x); }
EFE_INLINE void sincos_half_turns(double t, double* sine, double* cosine) {
    *sine = std::sin(kPi * t);
    *cosine = std::cos(kPi * t);
}

#endif

}  // namespace efe::math
