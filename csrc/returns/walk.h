// Recurrences along time over tensors [N, T]: what a walk over their tiles and steps needs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"
#include "returns/tile.h"

namespace efe::returns {

// term + factor · x, where a factor of 0 lets nothing through: no NaN of another episode either.
template <class A>
EFE_INLINE A advance(A factor, A term, A x) {
    const A through = factor == 0 ? A(0) : x;
    return term + factor * through;
}

// gamma and lam: one of each, or in its place that of each step.
template <class A>
struct Discounts {
    A gamma, lam;
    Series gammas, lams;

    bool per_step() const { return gammas.data != nullptr || lams.data != nullptr; }
};

// gamma and lam of the elements of a run. PerStep: of each its own, in `room` where they do not lie side by side.
template <bool PerStep, bool TimeInner, class A>
struct DiscountRun {
    A one_gamma, one_lam;
    const A *gammas = nullptr, *lams = nullptr;
    A room[2][PerStep ? Tile<TimeInner>::kSize : 1];

    EFE_INLINE DiscountRun(const Discounts<A>& d, const Tile<TimeInner>& tile, int64_t o)
        : one_gamma(d.gamma), one_lam(d.lam) {
        if constexpr (PerStep) {
            gammas = run_or(d.gammas, d.gamma, tile, o, room[0]);
            lams = run_or(d.lams, d.lam, tile, o, room[1]);
        }
    }

    EFE_INLINE A gamma(int64_t i) const { return PerStep ? gammas[i] : one_gamma; }
    EFE_INLINE A lam(int64_t i) const { return PerStep ? lams[i] : one_lam; }
};

constexpr uint8_t kTerminated = 1, kTruncated = 2, kLast = 4;

template <bool TimeInner>
EFE_INLINE void load_flags(const Series& terminated_series, const Series& truncated_series, const Tile<TimeInner>& tile,
                           int64_t o, uint8_t* __restrict__ out) {
    uint8_t room[Tile<TimeInner>::kSize];
    const uint8_t* terminated = read_run(terminated_series, tile, o, room);
    for (int64_t i = 0; i < tile.inner(); ++i) out[i] = terminated[i];
    if (truncated_series.data == nullptr) return;
    const uint8_t* truncated = read_run(truncated_series, tile, o, room);
    for (int64_t i = 0; i < tile.inner(); ++i) out[i] |= static_cast<uint8_t>(truncated[i] * kTruncated);
}

// Sets kLast where the run of outer index o holds the last of all steps.
template <bool TimeInner>
EFE_INLINE void mark_last(const Tile<TimeInner>& tile, int64_t o, int64_t steps, uint8_t* __restrict__ flags) {
    if (tile.first_step + tile.steps != steps) return;
    const int64_t first = TimeInner ? tile.steps - 1 : o == tile.steps - 1 ? 0 : tile.inner();
    for (int64_t i = first; i < tile.inner(); i += TimeInner ? tile.steps : 1) flags[i] |= kLast;
}

// state = update(element, state) along the steps of Rows rows, which do not wait for each other.
template <int Rows, bool Forward, bool TimeInner, class A, class Update>
EFE_INLINE void walk_rows(const Tile<TimeInner>& tile, int64_t row, A* state, const Update& update) {
    A x[Rows];
    std::copy_n(state + row, Rows, x);
    for (int64_t n = 0; n < tile.steps; ++n) {
        const int64_t i = tile.index(row, Forward ? n : tile.steps - 1 - n);
        const int64_t stride = tile.index(1, 0);
        EFE_UNROLL
        for (int64_t r = 0; r < Rows; ++r) x[r] = update(i + r * stride, x[r]);
    }
    std::copy_n(x, Rows, state + row);
}

// The same for all rows: side by side in a register where they lie so, else a few at a time in registers of their own.
template <bool Forward, bool TimeInner, class A, class Update>
EFE_INLINE void walk(const Tile<TimeInner>& tile, A* __restrict__ state, const Update& update) {
    if constexpr (TimeInner) {
        int64_t row = 0;
        for (; row + 8 <= tile.rows; row += 8) walk_rows<8, Forward>(tile, row, state, update);
        for (; row < tile.rows; ++row) walk_rows<1, Forward>(tile, row, state, update);
    } else {
        for (int64_t n = 0; n < tile.steps; ++n)
            for (int64_t row = 0; row < tile.rows; ++row)
                state[row] = update(tile.index(row, Forward ? n : tile.steps - 1 - n), state[row]);
    }
}

// One tensor for each gradient that is needed.
inline std::vector<Tensor> empties_where(const std::vector<bool>& needs, const Tensor& like, ScalarType type) {
    std::vector<Tensor> found;
    for (const bool need : needs)
        if (need) found.push_back(empty_like(like, type));
    return found;
}

// How the results lie, which is dense, and the dtype of the arithmetic on them.
struct ResultLayout {
    int64_t rows, steps, stride_row, stride_time;
    ScalarType type;

    explicit ResultLayout(const Tensor& result)
        : rows(result.size(0)), steps(result.size(1)), stride_row(result.stride(0)), stride_time(result.stride(1)),
          type(arithmetic_type(result)) {}

    Series series(const OptionalTensor& tensor) const { return tensor.has_value() ? series(*tensor) : Series{}; }

    Series series(const Tensor& tensor) const {
        const int64_t row = rows == 1 ? stride_row : tensor.stride(0);
        const int64_t time = steps == 1 ? stride_time : tensor.stride(1);
        const bool as_it_is = tensor.scalar_type() == type || tensor.scalar_type() == ScalarType::Bool;
        const bool inner_contiguous = as_it_is && (time_inner() ? time == 1 : row == 1);
        const bool dense = inner_contiguous && row == stride_row && time == stride_time;
        if (!as_it_is) dtype_of(tensor.scalar_type());  // refuses what there is no kernel for
        return {tensor.mutable_data(), tensor.scalar_type(), row, time, dense, inner_contiguous};
    }

    // Those of the places that are needed, in the order of the tensors for them.
    void series_where(const std::vector<bool>& needs, const std::vector<Tensor>& tensors,
                      std::initializer_list<Series*> places) const {
        auto tensor = tensors.begin();
        auto needed = needs.begin();
        for (Series* place : places)
            if (*needed++) *place = series(*tensor++);
    }

    bool time_inner() const { return stride_time == 1; }

    template <class A>
    Discounts<A> discounts(double gamma, double lam, const OptionalTensor& gammas, const OptionalTensor& lams) const {
        return {static_cast<A>(gamma), static_cast<A>(lam), series(gammas), series(lams)};
    }
};

// body(tile, state) for all tiles of one block of rows after the other, in the order in which their steps follow; the
// state of each row begins at 0.
template <bool TimeInner, bool Forward, class A, class Body>
void for_tiles_of(int64_t all_rows, int64_t all_steps, const Body& body) {
    using Shape = Tile<TimeInner>;
    if (all_rows == 0 || all_steps == 0) return;
    const int64_t rows = Shape::block_rows(all_rows, all_steps), blocks = (all_rows + rows - 1) / rows;
    const int64_t chunks = (all_steps + Shape::kTime - 1) / Shape::kTime;
    parallel(blocks, rows * all_steps, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t block = first; block < last; ++block) {
            A state[Shape::kMaxRows] = {};
            Shape tile;
            tile.first_row = block * rows;
            tile.rows = std::min(rows, all_rows - tile.first_row);
            tile.one_run = TimeInner && chunks == 1;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                tile.first_step = (Forward ? chunk : chunks - 1 - chunk) * Shape::kTime;
                tile.steps = std::min<int64_t>(Shape::kTime, all_steps - tile.first_step);
                tile.next_tile = chunk + 1 < chunks ? (Forward ? Shape::kTime : -Shape::kTime) : 0;
                body(tile, state);
            }
        }
    });
}

template <bool Forward, class A, class Body>
void for_tiles(const ResultLayout& layout, const Body& body) {
    if (layout.time_inner())
        for_tiles_of<true, Forward, A>(layout.rows, layout.steps, body);
    else
        for_tiles_of<false, Forward, A>(layout.rows, layout.steps, body);
}

}  // namespace efe::returns
