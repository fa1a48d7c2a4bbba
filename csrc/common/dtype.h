// The dtypes of what kernels read and write. Without torch, because CUDA sources include it.
#pragma once

#include <type_traits>

namespace efe {

enum class Dtype { float32, float64, float16, bfloat16 };

// The type that values of type T are computed in.
template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

// body(T{}) with the type T of a dtype; those of the half precisions are the caller's, torch's or CUDA's. Always
// inlined, because a body under `vectorized` (simd.h) is compiled for the function that it ends up in.
template <class Float16, class BFloat16, class Body>
inline __attribute__((always_inline)) void for_dtype(Dtype dtype, const Body& body) {
    switch (dtype) {
        case Dtype::float32:
            return body(float{});
        case Dtype::float64:
            return body(double{});
        case Dtype::float16:
            return body(Float16{});
        case Dtype::bfloat16:
            return body(BFloat16{});
    }
}

// body(A{}) with the type A that values of a dtype are computed in.
template <class Body>
void for_arithmetic(Dtype dtype, const Body& body) {
    dtype == Dtype::float64 ? body(double{}) : body(float{});
}

}  // namespace efe
