// Rows of the policy on the CPU, a tile at a time: loaded into arrays of A (float, or double for double tensors),
// padded with zeros, and computed whole, because loops of a constant length over local arrays are what the compiler
// vectorises best. Only loads, stores and sums look at how full a tile is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/inline.h"
#include "common/math.h"
#include "common/philox.h"
#include "common/sums.h"
#include "prompt/kernels.h"
#include "prompt/noise.h"

namespace efe::prompt {

constexpr int kTile = 128;  // components, a multiple of the 4 of one Philox call

// Full: the usual count, for which there is a loop of a constant length, without a call or a remainder.
template <int Full = kTile, class From, class To>
EFE_INLINE void convert(const From* __restrict__ from, int count, To* __restrict__ to) {
    if (count == Full) {
        for (int i = 0; i < Full; ++i) to[i] = static_cast<To>(from[i]);
    } else {
        for (int i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
    }
}

// Elements [begin, begin + count) of a row as A, then zeros up to the end of the tile; zeros where the row is absent.
template <class T, class A>
EFE_INLINE void load_tile(const Row<T>& row, int64_t begin, int count, A* __restrict__ out) {
    if (row.data == nullptr) {
        count = 0;
    } else if (row.stride != 1) {
        for (int i = 0; i < count; ++i) out[i] = static_cast<A>(row.data[(begin + i) * row.stride]);
    } else {
        convert(row.data + begin, count, out);
    }
    std::fill(out + count, out + kTile, A(0));
}

// Sum over the tiles of a row, in interleaved lanes and then by halves (sums.h). Tiles are added whole, so what pads
// them must be 0. More lanes than 16, up to which GCC unrolls the loop over them and then keeps each lane as a scalar.
template <class A>
struct TileSum {
    static constexpr int kLanes = kTile / 4;
    A lanes[kLanes] = {};

    EFE_INLINE void add(const A* tile) {
        for (int i = 0; i < kLanes; ++i)
            lanes[i] += (tile[i] + tile[i + kLanes]) + (tile[i + 2 * kLanes] + tile[i + 3 * kLanes]);
    }

    EFE_INLINE A total() { return sum_by_halves<kLanes>(lanes); }
};

// Sum of log tanh' over the tiles of a row. A product costs less than a logarithm, so one is taken of the product of
// four factors.
template <class A>
struct LogSlopeSum {
    static constexpr int kLanes = TileSum<A>::kLanes;
    TileSum<A> sum;

    EFE_INLINE void add(A* log_part, A* factor, int count) {
        std::fill(log_part + count, log_part + kTile, A(0));
        std::fill(factor + count, factor + kTile, A(1));
        sum.add(log_part);
        for (int i = 0; i < kLanes; ++i)
            sum.lanes[i] -= math::log_normal_range(
                (factor[i] * factor[i + kLanes]) * (factor[i + 2 * kLanes] * factor[i + 3 * kLanes]));
    }

    EFE_INLINE A total() { return A(2) * sum.total(); }
};

// The noise of elements [begin, begin + count), begin being a multiple of 4. One array per word, so that quads lie side
// by side.
template <class A>
EFE_INLINE void load_tile(const Noise<A>& noise, int64_t begin, int count, A* __restrict__ out) {
    if (noise.is_given()) return load_tile(noise.given, begin, count, out);
    constexpr int kQuads = kTile / 4;
    uint32_t words[4][kQuads];
    A normals[4][kQuads];
    for (int q = 0; q < kQuads; ++q) {
        const Words4 drawn = philox_noise_words(noise.seed, noise.row, begin / 4 + q);
        words[0][q] = drawn.x0;
        words[1][q] = drawn.x1;
        words[2][q] = drawn.x2;
        words[3][q] = drawn.x3;
    }
    for (int k = 0; k < 4; k += 2)
        for (int q = 0; q < kQuads; ++q)
            box_muller(words[k][q], words[k + 1][q], &normals[k][q], &normals[k + 1][q]);
    for (int q = 0; q < kQuads; ++q)
        for (int k = 0; k < 4; ++k) out[4 * q + k] = normals[k][q];
    std::fill(out + count, out + kTile, A(0));
}

}  // namespace efe::prompt
