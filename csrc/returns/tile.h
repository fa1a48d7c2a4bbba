// Tensors [N, T], read and written in tiles as they lie, whatever their strides; other dtypes than that of the
// arithmetic are converted tile by tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace efe::returns {

// A tensor [N, T] as it lies in memory; no data where there is none.
struct Series {
    void* data = nullptr;
    ScalarType type = ScalarType::Float;
    int64_t stride_row = 0, stride_time = 0;
    // The dtype is that of the arithmetic, or bool, and the strides are those of the results, or at least the inner one.
    bool dense = false, inner_contiguous = false;
};

// Tiles are 16 x 64, the longer side along the dimension that is contiguous in memory: time where TimeInner, else rows.
// Rows of at most 64 steps, which then lie one behind the other, make one run.
// Indices are int64_t: Python compiles with -fwrapv, under which the sum of two ints makes no contiguous access, and loops
// over it gather and scatter.
template <bool TimeInner>
struct Tile {
    static constexpr int64_t kInner = 64, kOuter = 16;
    static constexpr int64_t kSize = kInner * kOuter;
    static constexpr int64_t kTime = TimeInner ? kInner : kOuter;
    static constexpr int64_t kMaxRows = kInner;

    int64_t first_row = 0, first_step = 0;
    int64_t rows = 0, steps = 0;
    bool one_run = false;
    int64_t next_tile = 0;  // how many steps away the next tile of the same rows is, or 0

    // Rows that are walked together. Long rows, of which there may be few, are shared out to all threads.
    static int64_t block_rows(int64_t rows, int64_t steps) {
        if (!TimeInner) return kInner;
        if (steps <= kInner) return std::min<int64_t>(kMaxRows, kSize / steps);
        const int64_t threads = num_threads();
        return std::clamp<int64_t>((rows + threads - 1) / threads, 1, kOuter);
    }

    EFE_INLINE int64_t outer() const { return one_run ? 1 : TimeInner ? rows : steps; }
    EFE_INLINE int64_t inner() const { return one_run ? rows * steps : TimeInner ? steps : rows; }
    EFE_INLINE int64_t index(int64_t row, int64_t step) const {
        return TimeInner ? row * (one_run ? steps : kInner) + step : step * kInner + row;
    }

    // Asks for the run of the next tile, of which the hardware cannot know: too many runs are read side by side.
    template <class V>
    EFE_INLINE void prefetch(const V* run, int64_t stride_time) const {
        if (next_tile == 0) return;
        const char* next = reinterpret_cast<const char*>(run + next_tile * stride_time);
        for (size_t line = 0; line < kInner * sizeof(V); line += 64) __builtin_prefetch(next + line);
    }

    // Where the run of outer index o begins.
    EFE_INLINE int64_t offset(const Series& series, int64_t o) const {
        const int64_t row = first_row + (TimeInner ? o : 0), step = first_step + (TimeInner ? 0 : o);
        return row * series.stride_row + step * series.stride_time;
    }
};

// body(typed pointer to the first element).
template <class Body>
void with_pointer(const Series& series, const Body& body) {
    if (series.type == ScalarType::Bool) return body(static_cast<uint8_t*>(series.data));
    for_dtype(dtype_of(series.type), [&](auto zero) { body(static_cast<decltype(zero)*>(series.data)); });
}

// to[i] = from[i · stride], converted.
template <class From, class To>
void convert(const From* from, int64_t stride, int64_t count, To* __restrict__ to) {
    vectorized([&]() EFE_SIMD_BODY {
        if (stride == 1)
            for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
        else
            for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i * stride]);
    });
}

// The run of outer index o. Not inlined: it is what differs least from caller to caller.
template <class V, bool TimeInner>
void copy_run(const Series& series, const Tile<TimeInner>& tile, int64_t o, V* out) {
    with_pointer(series, [&](const auto* data) {
        const auto* from = data + tile.offset(series, o);
        if (!TimeInner) return convert(from, series.stride_row, tile.rows, out);
        const int64_t rows = tile.one_run ? tile.rows : 1;
        for (int64_t row = 0; row < rows; ++row)
            convert(from + row * series.stride_row, series.stride_time, tile.steps, out + row * tile.steps);
    });
}

// The run of outer index o: where it lies, or a copy of it in `room`; zeros where there is no tensor.
template <class V, bool TimeInner>
EFE_INLINE const V* read_run(const Series& series, const Tile<TimeInner>& tile, int64_t o, V* room) {
    if (series.dense || (series.inner_contiguous && !tile.one_run)) {
        const V* run = static_cast<const V*>(series.data) + tile.offset(series, o);
        tile.prefetch(run, series.stride_time);
        return run;
    }
    if (series.data == nullptr)
        std::fill_n(room, tile.inner(), V(0));
    else
        copy_run(series, tile, o, room);
    return room;
}

// The same, with `otherwise` where there is no tensor.
template <class V, bool TimeInner>
EFE_INLINE const V* run_or(const Series& series, V otherwise, const Tile<TimeInner>& tile, int64_t o, V* room) {
    if (series.data != nullptr) return read_run(series, tile, o, room);
    std::fill_n(room, tile.inner(), otherwise);
    return room;
}

// Where to write the run of a result: into its memory, or into `room`, from which store_run converts.
template <bool TimeInner, class A>
EFE_INLINE A* run_to_write(const Series& result, const Tile<TimeInner>& tile, int64_t o, A* room) {
    return result.dense ? static_cast<A*>(result.data) + tile.offset(result, o) : room;
}

template <bool TimeInner, class A>
void store_run(const Series& result, const Tile<TimeInner>& tile, int64_t o, const A* room) {
    if (result.dense) return;
    with_pointer(result, [&](auto* data) { convert(room, 1, tile.inner(), data + tile.offset(result, o)); });
}

}  // namespace efe::returns
