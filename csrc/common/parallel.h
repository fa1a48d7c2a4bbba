// How work is shared out to threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "common/simd.h"

namespace efe {

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

constexpr int64_t kGrain = 16384;  // elements for which a further thread pays

// body(begin, end) under `vectorized` over ranges of [0, count), each item being `cost` elements of work.
template <class Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        vectorized([&]() EFE_SIMD_BODY { body(begin, end); });
    });
}

// Elements in spans that are computed apart: groups where there are groups, else pieces of a constant size. They depend
// on the shape alone, and with them the bits of sums over spans.
struct Spans {
    static constexpr int64_t kPiece = 4096;

    int64_t numel, size;

    Spans(int64_t numel, int64_t group_size) : numel(numel), size(group_size > 0 ? group_size : kPiece) {}
    int64_t count() const { return (numel + size - 1) / size; }

    // body(span, index of its first element, number of elements) for every span.
    template <class Body>
    void for_each(const Body& body) const {
        parallel(count(), size, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
            for (int64_t span = first; span < last; ++span)
                body(span, span * size, std::min(size, numel - span * size));
        });
    }
};

// out [size] = the sum over parts [count, size], in double.
template <class A>
void add_up(const A* parts, int64_t count, int64_t size, A* out) {
    constexpr int64_t kSize = 64;  // of one task
    parallel((size + kSize - 1) / kSize, count * kSize, [&](int64_t begin, int64_t end) EFE_SIMD_BODY {
        for (int64_t first = begin * kSize; first < std::min(size, end * kSize); first += kSize) {
            const int64_t width = std::min(kSize, size - first);
            double sums[kSize] = {};
            for (int64_t k = 0; k < count; ++k)
                for (int64_t i = 0; i < width; ++i) sums[i] += parts[k * size + first + i];
            for (int64_t i = 0; i < width; ++i) out[first + i] = static_cast<A>(sums[i]);
        }
    });
}

}  // namespace efe
