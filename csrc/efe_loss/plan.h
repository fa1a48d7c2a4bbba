// Tensors of cells with C values each, read and written in blocks of kLanes cells: value c of lane l is at [c * kLanes + l],
// so that every loop over lanes vectorises whatever the memory order of the tensor.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "common/simd.h"

namespace efe::efe_loss {

constexpr int64_t kLanes = 64;

// A block of cells of one grid: the lanes that exist and, as 0 or 1 per lane, those that count.
template <class A>
struct Block {
    int64_t first, count;
    A counted[kLanes];
};

// [B, T, H, W, C] of any dtype and strides; data is null for an absent tensor.
struct Plan {
    void* data = nullptr;
    at::ScalarType type = at::kFloat;
    int64_t episode = 0, step = 0, row = 0, cell = 0, outcome = 0, width = 1, outcomes = 0;

    explicit operator bool() const { return data != nullptr; }
};

inline Plan plan_of(const at::Tensor& tensor) {
    return {tensor.data_ptr(), tensor.scalar_type(), tensor.stride(0), tensor.stride(1), tensor.stride(2),
            tensor.stride(3),  tensor.stride(4),     tensor.size(3),   tensor.size(4)};
}

template <class Body>
EFE_INLINE void for_each_cell(const Plan& plan, int64_t first, int64_t count, const Body& body) {
    if (plan.row == plan.width * plan.cell) {
        for (int64_t l = 0; l < count; ++l) body(l, (first + l) * plan.cell);
        return;
    }
    for (int64_t l = 0; l < count; ++l) {
        const int64_t cell = first + l;
        body(l, cell / plan.width * plan.row + cell % plan.width * plan.cell);
    }
}

template <class A, class T>
void load_as(const T* source, const Plan& plan, const Block<A>& block, A* values) {
    vectorized([&]() EFE_SIMD_BODY {
        if (plan.cell == 1 && plan.row == plan.width) {
            for (int64_t c = 0; c < plan.outcomes; ++c) {
                const T* from = source + c * plan.outcome + block.first;
                A* to = values + c * kLanes;
                EFE_INDEPENDENT
                for (int64_t l = 0; l < block.count; ++l) to[l] = static_cast<A>(from[l]);
            }
        } else {
            for_each_cell(plan, block.first, block.count, [&](int64_t l, int64_t offset) EFE_SIMD_BODY {
                for (int64_t c = 0; c < plan.outcomes; ++c)
                    values[c * kLanes + l] = static_cast<A>(source[offset + c * plan.outcome]);
            });
        }
        // What lies under a cell that does not count, NaN perhaps, is replaced before anything is computed from it.
        for (int64_t c = 0; c < plan.outcomes; ++c)
            for (int64_t l = 0; l < kLanes; ++l)
                values[c * kLanes + l] = block.counted[l] != 0 ? values[c * kLanes + l] : A(0);
    });
}

template <class A, class T>
void store_as(T* target, const Plan& plan, const Block<A>& block, const A* values) {
    vectorized([&]() EFE_SIMD_BODY {
        if (plan.cell == 1 && plan.row == plan.width) {
            for (int64_t c = 0; c < plan.outcomes; ++c) {
                T* to = target + c * plan.outcome + block.first;
                const A* from = values + c * kLanes;
                EFE_INDEPENDENT
                for (int64_t l = 0; l < block.count; ++l) to[l] = static_cast<T>(from[l] * block.counted[l]);
            }
        } else {
            for_each_cell(plan, block.first, block.count, [&](int64_t l, int64_t offset) EFE_SIMD_BODY {
                for (int64_t c = 0; c < plan.outcomes; ++c)
                    target[offset + c * plan.outcome] = static_cast<T>(values[c * kLanes + l] * block.counted[l]);
            });
        }
    });
}

// Calls body with a typed pointer to one step of one episode.
template <class Body>
void with_pointer(const Plan& plan, int64_t episode, int64_t step, const Body& body) {
    const int64_t offset = episode * plan.episode + step * plan.step;
    switch (plan.type) {
        case at::kFloat:
            return body(static_cast<float*>(plan.data) + offset);
        case at::kDouble:
            return body(static_cast<double*>(plan.data) + offset);
        case at::kBFloat16:
            return body(static_cast<c10::BFloat16*>(plan.data) + offset);
        case at::kHalf:
            return body(static_cast<c10::Half*>(plan.data) + offset);
        default:
            return;
    }
}

// Values of the block's cells at one step; 0 in lanes that do not count.
template <class A>
void load(const Plan& plan, int64_t episode, int64_t step, const Block<A>& block, A* values) {
    with_pointer(plan, episode, step, [&](const auto* source) { load_as(source, plan, block, values); });
}

// The reverse: 0 is written where a lane does not count.
template <class A>
void store(const Plan& plan, int64_t episode, int64_t step, const Block<A>& block, const A* values) {
    with_pointer(plan, episode, step, [&](auto* target) { store_as(target, plan, block, values); });
}

}  // namespace efe::efe_loss
