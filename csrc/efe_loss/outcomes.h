// What is computed for all cells of a block side by side, from arrays [C, kCells] (cells.h). Every function that loops
// over cells does so under `vectorized`, or is called from there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/math.h"
#include "common/simd.h"
#include "efe_loss/cells.h"

namespace efe::efe_loss {

constexpr double kLowestLogit = -1e30;

// -inf becomes a finite stand-in, so that 0 * log 0 is 0; a NaN stays one.
template <class A>
EFE_INLINE A finite_logit(A x) {
    return x < A(kLowestLogit) ? A(kLowestLogit) : x;
}

template <class A>
EFE_INLINE A log_floored(A x) {
    constexpr A kSmallest = std::numeric_limits<A>::min();
    return math::log_normal_range(x < kSmallest ? kSmallest : x);
}

constexpr int64_t kOutcomesInRun = 32;

// sum [kCells] over the outcomes c of term(c * kCells + i). In runs, because the rounding of one long sum grows with
// the number of outcomes.
template <class A, class Term>
EFE_INLINE void sum_outcomes(int64_t outcomes, const Term& term, A* sum) {
    for (int64_t i = 0; i < kCells; ++i) sum[i] = 0;
    for (int64_t first = 0; first < outcomes; first += kOutcomesInRun) {
        A run[kCells] = {};
        for (int64_t c = first; c < std::min(first + kOutcomesInRun, outcomes); ++c)
            for (int64_t i = 0; i < kCells; ++i) run[i] += term(c * kCells + i);
        for (int64_t i = 0; i < kCells; ++i) sum[i] += run[i];
    }
}

// sum of p x over the outcomes.
template <class A>
EFE_INLINE void weighted_sum(const A* p, const A* x, int64_t outcomes, A* sum) {
    sum_outcomes(outcomes, [&](int64_t i) EFE_SIMD_BODY { return p[i] * x[i]; }, sum);
}

// Of logits x [C, kCells]: probabilities p, d [C, kCells] and l [kCells] with log p = d - l, and sum p log p [kCells].
template <class A>
void softmax(const A* x, int64_t outcomes, A* p, A* d, A* l, A* information) {
    vectorized([&]() EFE_SIMD_BODY {
        A top[kCells], sum[kCells];
        for (int64_t i = 0; i < kCells; ++i) top[i] = x[i];
        for (int64_t c = 1; c < outcomes; ++c)
            for (int64_t i = 0; i < kCells; ++i) top[i] = x[c * kCells + i] > top[i] ? x[c * kCells + i] : top[i];
        for (int64_t c = 0; c < outcomes; ++c) {
            EFE_INDEPENDENT
            for (int64_t i = 0; i < kCells; ++i) {
                const A shifted = finite_logit(x[c * kCells + i] - top[i]);
                const A e = math::exp(shifted);
                d[c * kCells + i] = shifted;
                p[c * kCells + i] = e;
            }
        }
        sum_outcomes(outcomes, [&](int64_t i) EFE_SIMD_BODY { return p[i]; }, sum);
        for (int64_t i = 0; i < kCells; ++i) {
            l[i] = math::log_normal_range(sum[i]);
            sum[i] = A(1) / sum[i];
        }
        for (int64_t c = 0; c < outcomes; ++c)
            for (int64_t i = 0; i < kCells; ++i) p[c * kCells + i] *= sum[i];
        weighted_sum(p, d, outcomes, information);
        for (int64_t i = 0; i < kCells; ++i) information[i] -= l[i];
    });
}

}  // namespace efe::efe_loss
