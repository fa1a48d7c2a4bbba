// Sums over many elements, in double and in a fixed order: the same bits with any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/simd.h"

namespace efe::advantage {

constexpr int64_t kChunk = 4096;  // elements whose sums are one partial result
constexpr int kLanes = 8;         // doubles that one sum is spread over

// The elements in runs: groups where there are groups, else chunks.
struct Runs {
    int64_t numel, size;

    Runs(int64_t numel, int64_t group_size) : numel(numel), size(group_size > 0 ? group_size : kChunk) {}
    int64_t count() const { return (numel + size - 1) / size; }
    int64_t length(int64_t run) const { return std::min(size, numel - run * size); }
};

// Sum of term(i) over [0, count) in interleaved lanes, which vectorises without reordering a sum.
template <class Term>
EFE_INLINE double sum(int64_t count, const Term& term) {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
    for (int lane = 0; i + lane < count; ++lane) lanes[lane] += term(i + lane);
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    return total;
}

// A mask [N] as bytes, null where every element counts.
EFE_INLINE const uint8_t* at_offset(const uint8_t* mask, int64_t begin) {
    return mask == nullptr ? nullptr : mask + begin;
}

// x = 0 where it does not count.
template <class A>
EFE_INLINE void clear_others(const uint8_t* mask, int64_t count, A* x) {
    if (mask == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
        const A kept = x[i];
        x[i] = mask[i] != 0 ? kept : A(0);
    }
}

EFE_INLINE int64_t count_members(const uint8_t* mask, int64_t count) {
    if (mask == nullptr) return count;
    int64_t members = 0;
    for (int64_t i = 0; i < count; ++i) members += mask[i];
    return members;
}

EFE_INLINE int64_t first_member(const uint8_t* mask, int64_t count) {
    int64_t i = 0;
    while (mask != nullptr && i + 1 < count && mask[i] == 0) ++i;
    return i;
}

// a - b, and 0 where they are equal, infinities too.
EFE_INLINE double difference(double a, double b) { return a == b ? 0.0 : a - b; }

// Count, mean and sum of squared deviations, which merge (Chan et al. 1979): exactly 0 deviation where all are equal.
struct Moments {
    double count = 0, mean = 0, squares = 0;

    void merge(const Moments& other) {
        if (other.count == 0) return;
        const double total = count + other.count, step = count == 0 ? 0.0 : difference(other.mean, mean);
        mean = count == 0 ? other.mean : mean + step * other.count / total;
        squares += other.squares + step * step * count * other.count / total;
        count = total;
    }
};

// Sum of term(x_i) over the members of x[0..count).
template <class A, class Term>
EFE_INLINE double sum_members(const A* x, const uint8_t* mask, int64_t count, const Term& term) {
    if (mask == nullptr) return sum(count, [&](int64_t i) EFE_SIMD_BODY { return term(x[i]); });
    return sum(count, [&](int64_t i) EFE_SIMD_BODY {
        const double value = term(x[i]);
        return mask[i] != 0 ? value : 0.0;
    });
}

// Summed relative to one of the members.
template <class A>
EFE_INLINE Moments moments_of(const A* x, const uint8_t* mask, int64_t count) {
    const int64_t members = count_members(mask, count);
    if (members == 0) return {};
    const double shift = x[first_member(mask, count)];
    const double mean = sum_members(x, mask, count, [&](A value) EFE_SIMD_BODY { return difference(value, shift); }) / members;
    const double squares = sum_members(x, mask, count, [&](A value) EFE_SIMD_BODY {
        const double deviation = difference(value, shift) - mean;
        return deviation * deviation;
    });
    return {static_cast<double>(members), shift + mean, squares};
}

}  // namespace efe::advantage
