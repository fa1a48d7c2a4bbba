// Matrices as the small steps around the kernels take them, and their product, whose bits do not depend on the number of
// threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "common/parallel.h"
#include "common/tensor.h"

namespace efe::efe_loss {

// A matrix of any dtype and strides.
struct Table {
    const void* data;
    Dtype dtype;
    int64_t rows, columns, stride_row, stride_column;

    Table transposed() const { return {data, dtype, columns, rows, stride_column, stride_row}; }
};

inline Table table_of(const Tensor& matrix) {
    return {matrix.data(),  dtype_of(matrix.scalar_type()), matrix.size(0), matrix.size(1),
            matrix.stride(0), matrix.stride(1)};
}

// Its values in row-major order.
template <class A>
std::unique_ptr<A[]> values_of(const Table& table) {
    std::unique_ptr<A[]> values(new A[table.rows * table.columns]);
    for_dtype(table.dtype, [&](auto zero) {
        const auto* const data = static_cast<const decltype(zero)*>(table.data);
        parallel(table.rows, table.columns, [&](int64_t begin, int64_t end) EFE_SIMD_BODY {
            for (int64_t i = begin; i < end; ++i)
                for (int64_t j = 0; j < table.columns; ++j)
                    values[i * table.columns + j] =
                        static_cast<A>(data[i * table.stride_row + j * table.stride_column]);
        });
    });
    return values;
}

// out [I, J] = a [I, K] times b [K, J], added up in double over K in order: in a BLAS the number of threads chooses the
// bits.
template <class A>
void product(const Table& a, const Table& b, A* out) {
    const auto left = values_of<double>(a), right = values_of<double>(b);
    const int64_t rows = a.rows, inner = a.columns, columns = b.columns;
    constexpr int64_t kColumns = 64;  // of one task, which keeps their sums in registers
    const int64_t parts = (columns + kColumns - 1) / kColumns;
    parallel(rows * parts, inner * kColumns, [&](int64_t begin, int64_t end) EFE_SIMD_BODY {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t i = task / parts, first = task % parts * kColumns;
            const int64_t count = std::min(kColumns, columns - first);
            double sums[kColumns] = {};
            for (int64_t k = 0; k < inner; ++k) {
                const double factor = left[i * inner + k];
                const double* row = right.get() + k * columns + first;
                if (count == kColumns)
                    for (int64_t j = 0; j < kColumns; ++j) sums[j] += factor * row[j];
                else
                    for (int64_t j = 0; j < count; ++j) sums[j] += factor * row[j];
            }
            for (int64_t j = 0; j < count; ++j) out[i * columns + first + j] = static_cast<A>(sums[j]);
        }
    });
}

}  // namespace efe::efe_loss
