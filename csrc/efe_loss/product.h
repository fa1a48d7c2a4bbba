// The product of small matrices whose bits do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>

#include "common/parallel.h"
#include "common/tensor.h"

namespace efe::efe_loss {

// a [I, K] times b [K, J] in double, added up over K in order: in a BLAS the number of threads chooses the bits.
inline at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
    const at::Tensor left = contiguous_as(a, at::kDouble), right = contiguous_as(b, at::kDouble);
    const int64_t rows = left.size(0), inner = left.size(1), columns = right.size(1);
    const at::Tensor out = at::zeros({rows, columns}, left.options());
    const double *l = left.const_data_ptr<double>(), *r = right.const_data_ptr<double>();
    double* const o = out.mutable_data_ptr<double>();
    constexpr int64_t kColumns = 64;  // of one task, which keeps their sums in registers
    const int64_t parts = (columns + kColumns - 1) / kColumns;
    parallel(rows * parts, inner * kColumns, [&](int64_t begin, int64_t end) EFE_SIMD_BODY {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t i = task / parts, first = task % parts * kColumns;
            const int64_t count = std::min(kColumns, columns - first);
            double sums[kColumns] = {};
            for (int64_t k = 0; k < inner; ++k) {
                const double factor = l[i * inner + k];
                const double* row = r + k * columns + first;
                if (count == kColumns)
                    for (int64_t j = 0; j < kColumns; ++j) sums[j] += factor * row[j];
                else
                    for (int64_t j = 0; j < count; ++j) sums[j] += factor * row[j];
            }
            std::copy_n(sums, count, o + i * columns + first);
        }
    });
    return out;
}

}  // namespace efe::efe_loss
