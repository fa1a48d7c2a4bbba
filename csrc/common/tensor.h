// From torch's tensors to the pointers and types of a kernel.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <optional>

#include "common/dtype.h"

namespace efe {

using OptionalTensor = std::optional<at::Tensor>;

inline Dtype dtype_of(at::ScalarType type) {
    switch (type) {
        case at::kFloat:
            return Dtype::float32;
        case at::kDouble:
            return Dtype::float64;
        case at::kHalf:
            return Dtype::float16;
        case at::kBFloat16:
            return Dtype::bfloat16;
        default:
            TORCH_CHECK_TYPE(false, "efe: no kernel for ", type);
    }
}

// body(T{}) with the type T of a dtype, always inlined.
template <class Body>
inline __attribute__((always_inline)) void for_dtype(Dtype dtype, const Body& body) {
    for_dtype<c10::Half, c10::BFloat16>(dtype, body);
}

// The dtype that a tensor is computed in.
inline at::ScalarType arithmetic_type(const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class Body>
void for_arithmetic(at::ScalarType type, const Body& body) {
    for_arithmetic(type == at::kDouble ? Dtype::float64 : Dtype::float32, body);
}

// Row-major in a dtype; undefined where there is none.
inline at::Tensor contiguous_as(const OptionalTensor& tensor, at::ScalarType type) {
    return tensor.has_value() ? tensor->to(type).contiguous() : at::Tensor();
}

// Null for an undefined tensor, as in the next one.
template <class T>
const T* data_of(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// A mask as bytes, which are 0 or 1.
inline const uint8_t* bytes_of(const at::Tensor& mask) { return reinterpret_cast<const uint8_t*>(data_of<bool>(mask)); }

}  // namespace efe
