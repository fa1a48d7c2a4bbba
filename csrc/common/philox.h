// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): counter-based random bits, the
// same on CPU and CUDA, and standard normal noise from them. efe_kernels/prompt/reference.py is the same in Python.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/inline.h"
#include "common/math.h"

namespace efe {

struct Words4 {
    uint32_t x0, x1, x2, x3;
};

EFE_INLINE uint32_t multiply_high(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

EFE_INLINE Words4 philox4x32(Words4 counter, uint64_t key) {
    constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
    constexpr uint32_t kStep0 = 0x9E3779B9u, kStep1 = 0xBB67AE85u;
    constexpr int kRounds = 10;
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    Words4 c = counter;
    EFE_UNROLL
    for (int round = 0; round < kRounds; ++round) {
        c = {multiply_high(kMultiplier1, c.x2) ^ c.x1 ^ k0, kMultiplier1 * c.x2,
             multiply_high(kMultiplier0, c.x0) ^ c.x3 ^ k1, kMultiplier0 * c.x0};
        k0 += kStep0;
        k1 += kStep1;
    }
    return c;
}

template <class A>
struct Normals4 {
    A n0, n1, n2, n3;
};

// Box-Muller from the upper 24 bits of each word: these uniforms, in (0, 1] and [0, 2), are exact in float, so float
// and double, CPU and CUDA see the same ones and differ only in the rounding of log, sqrt, sin and cos.
template <class A>
EFE_INLINE void box_muller(uint32_t first, uint32_t second, A* n0, A* n1) {
    const A uniform = static_cast<A>(static_cast<int32_t>(first >> 8) + 1) * static_cast<A>(0x1p-24);
    // The word as a signed number: half turns in [-1, 1), the same angle modulo a full turn.
    const A half_turns = static_cast<A>(static_cast<int32_t>(second) >> 8) * static_cast<A>(0x1p-23);
    const A radius = std::sqrt(static_cast<A>(-2) * math::log_normal_range(uniform));
    A sine, cosine;
    math::sincos_half_turns(half_turns, &sine, &cosine);
    *n0 = radius * cosine;
    *n1 = radius * sine;
}

// The words behind the noise of the elements 4 quad ... 4 quad + 3 of a row.
EFE_INLINE Words4 philox_noise_words(uint64_t seed, int64_t row, int64_t quad) {
    return philox4x32({static_cast<uint32_t>(quad), 0u, static_cast<uint32_t>(row),
                       static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32)},
                      seed);
}

template <class A>
EFE_INLINE Normals4<A> philox_normal4(uint64_t seed, int64_t row, int64_t quad) {
    const Words4 words = philox_noise_words(seed, row, quad);
    Normals4<A> noise;
    box_muller(words.x0, words.x1, &noise.n0, &noise.n1);
    box_muller(words.x2, words.x3, &noise.n2, &noise.n3);
    return noise;
}

}  // namespace efe
