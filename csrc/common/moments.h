// Sums over the members of a group, in double: which elements are members, count, mean and squared deviations.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "common/sums.h"

namespace efe {

// A mask [N] as bytes from its element `begin` on; null where every element counts.
EFE_INLINE const uint8_t* mask_from(const uint8_t* mask, int64_t begin) {
    return mask == nullptr ? nullptr : mask + begin;
}

// x [count] = 0 where it does not count.
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

// Sum of term(i) over the members of [0, count).
template <class Term>
EFE_INLINE double sum_members(const uint8_t* mask, int64_t count, const Term& term) {
    if (mask == nullptr) return sum(count, term);
    return sum(count, [&](int64_t i) EFE_SIMD_BODY {
        const double value = term(i);
        return mask[i] != 0 ? value : 0.0;
    });
}

template <class A>
EFE_INLINE Moments moments_of(const A* x, const uint8_t* mask, int64_t count) {
    const int64_t members = count_members(mask, count);
    if (members == 0) return {};
    const double shift = x[first_member(mask, count)];  // sums are relative to one of the members
    const auto shifted = [&](int64_t i) EFE_SIMD_BODY { return difference(x[i], shift); };
    const double mean = sum_members(mask, count, shifted) / members;
    const double squares = sum_members(mask, count, [&](int64_t i) EFE_SIMD_BODY {
        const double deviation = shifted(i) - mean;
        return deviation * deviation;
    });
    return {static_cast<double>(members), shift + mean, squares};
}

}  // namespace efe
