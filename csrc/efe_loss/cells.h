// Tensors of cells with C values each, read and written in blocks of kCells cells: value c of cell i of the block is at
// [c * kCells + i], so that every loop over cells vectorises whatever the memory order of the tensor.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "common/tensor.h"

namespace efe::efe_loss {

constexpr int64_t kCells = 64;  // of a block

// Cells [first, first + count) of one grid, and for each of them whether it counts, as 0 or 1; 0 after the last one.
template <class A>
struct Block {
    int64_t first, count;
    A counted[kCells];
};

// [B, T, H, W, C] of any dtype and strides, of which T or B and T may be left out; data is null for an absent tensor.
struct CellView {
    void* data = nullptr;
    Dtype dtype = Dtype::float32;
    int64_t stride_episode = 0, stride_step = 0, stride_row = 0, stride_cell = 0, stride_outcome = 0;
    int64_t width = 1, outcomes = 0;

    explicit operator bool() const { return data != nullptr; }
    int64_t value_size() const { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
    // Whether the cells of one outcome lie side by side; where they are floats, as the arithmetic takes them; and whether
    // the outcomes of a cell lie side by side, cell after cell.
    bool side_by_side() const { return stride_cell == 1 && stride_row == width; }
    bool in_rows() const { return dtype == Dtype::float32 && side_by_side(); }
    bool in_cells() const { return stride_outcome == 1 && stride_cell == outcomes && stride_row == width * outcomes; }
};

inline CellView view_of(const Tensor& tensor) {
    const int64_t row = tensor.dim() - 3, cell = row + 1, outcome = row + 2;
    return {tensor.mutable_data(),      dtype_of(tensor.scalar_type()),
            row > 0 ? tensor.stride(0) : 0, row > 1 ? tensor.stride(1) : 0,
            tensor.stride(row),         tensor.stride(cell),
            tensor.stride(outcome),     tensor.size(cell),
            tensor.size(outcome)};
}

inline CellView view_of(const OptionalTensor& tensor) { return tensor.has_value() ? view_of(*tensor) : CellView{}; }

template <class Body>
EFE_INLINE void for_each_cell(const CellView& view, int64_t first, int64_t count, const Body& body) {
    if (view.stride_row == view.width * view.stride_cell) {
        for (int64_t i = 0; i < count; ++i) body(i, (first + i) * view.stride_cell);
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t cell = first + i;
        body(i, cell / view.width * view.stride_row + cell % view.width * view.stride_cell);
    }
}

template <class A, class T>
void load_as(const T* source, const CellView& view, const Block<A>& block, A* values) {
    vectorized([&]() EFE_SIMD_BODY {
        if (view.side_by_side()) {
            for (int64_t c = 0; c < view.outcomes; ++c) {
                const T* from = source + c * view.stride_outcome + block.first;
                A* to = values + c * kCells;
                EFE_INDEPENDENT
                for (int64_t i = 0; i < block.count; ++i) to[i] = static_cast<A>(from[i]);
            }
        } else {
            for_each_cell(view, block.first, block.count, [&](int64_t i, int64_t offset) EFE_SIMD_BODY {
                for (int64_t c = 0; c < view.outcomes; ++c)
                    values[c * kCells + i] = static_cast<A>(source[offset + c * view.stride_outcome]);
            });
        }
        // What lies under a cell that does not count, NaN perhaps, is replaced before anything is computed from it.
        for (int64_t c = 0; c < view.outcomes; ++c)
            for (int64_t i = 0; i < kCells; ++i)
                values[c * kCells + i] = block.counted[i] != 0 ? values[c * kCells + i] : A(0);
    });
}

template <class A, class T>
void store_as(T* target, const CellView& view, const Block<A>& block, const A* values) {
    vectorized([&]() EFE_SIMD_BODY {
        if (view.side_by_side()) {
            for (int64_t c = 0; c < view.outcomes; ++c) {
                T* to = target + c * view.stride_outcome + block.first;
                const A* from = values + c * kCells;
                EFE_INDEPENDENT
                for (int64_t i = 0; i < block.count; ++i) to[i] = static_cast<T>(block.counted[i] != 0 ? from[i] : A(0));
            }
        } else {
            for_each_cell(view, block.first, block.count, [&](int64_t i, int64_t offset) EFE_SIMD_BODY {
                T* const to = target + offset;
                for (int64_t c = 0; c < view.outcomes; ++c)
                    to[c * view.stride_outcome] = static_cast<T>(block.counted[i] != 0 ? values[c * kCells + i] : A(0));
            });
        }
    });
}

// body(typed pointer to one step of one episode).
template <class Body>
void with_step(const CellView& view, int64_t episode, int64_t step, const Body& body) {
    const int64_t offset = episode * view.stride_episode + step * view.stride_step;
    for_dtype(view.dtype, [&](auto zero) { body(static_cast<decltype(zero)*>(view.data) + offset); });
}

// The values [C, kCells] of a block at one step; 0 where a cell does not count.
template <class A>
void load(const CellView& view, int64_t episode, int64_t step, const Block<A>& block, A* values) {
    with_step(view, episode, step, [&](const auto* source) { load_as(source, view, block, values); });
}

// The reverse: 0 is written where a cell does not count.
template <class A>
void store(const CellView& view, int64_t episode, int64_t step, const Block<A>& block, const A* values) {
    with_step(view, episode, step, [&](auto* target) { store_as(target, view, block, values); });
}

}  // namespace efe::efe_loss
