// Sums in interleaved lanes: an order that vectorises without letting the compiler reorder a sum, hence the same bits
// on every run.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace efe {

// The sum of Lanes values, in place: the upper half is added to the lower one until one is left.
template <int Lanes, class A>
EFE_INLINE A sum_by_halves(A* lanes) {
    EFE_UNROLL
    for (int half = Lanes / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

// Sum of Count values, a multiple of 16.
template <int Count, class A>
EFE_INLINE A sum_of(const A* values) {
    constexpr int kLanes = 16;
    static_assert(Count % kLanes == 0);
    A lanes[kLanes] = {};
    for (int i = 0; i < Count; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
    return sum_by_halves<kLanes>(lanes);
}

// Sum of term(i) over [0, count), in double.
template <class Term>
EFE_INLINE double sum(int64_t count, const Term& term) {
    constexpr int kLanes = 8;
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
    for (int lane = 0; i + lane < count; ++lane) lanes[lane] += term(i + lane);
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    return total;
}

}  // namespace efe
