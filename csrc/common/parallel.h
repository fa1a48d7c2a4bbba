// What the kernels of rewards and advantages share: the dtype of the arithmetic, and how work is shared out to threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "common/simd.h"

namespace efe::advantage {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kGrain = 16384;  // elements for which a further thread pays

inline at::ScalarType arithmetic_type(const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class Body>
void for_arithmetic(at::ScalarType type, const Body& body) {
    type == at::kDouble ? body(double{}) : body(float{});
}

// body(begin, end) over ranges of [0, count), each item being `cost` elements of work.
template <class Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
    at::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost)), [&](int64_t begin, int64_t end) {
        vectorized([&]() EFE_SIMD_BODY { body(begin, end); });
    });
}

template <class T>
const T* data_of(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

inline const uint8_t* bytes_of(const at::Tensor& mask) { return reinterpret_cast<const uint8_t*>(data_of<bool>(mask)); }

}  // namespace efe::advantage
