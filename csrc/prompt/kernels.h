// What the ops hand to a kernel: pointers, strides and sizes, without torch. The CPU (cpu.h) and CUDA (cuda.h) take the
// same. B rows, D prompt dimensions, W = D + 1 policy components; strides are counted in elements.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/inline.h"

namespace efe::prompt {

// A matrix with any strides; data is null where an optional tensor is absent (noise, gradients).
struct Matrix {
    const void* data = nullptr;
    int64_t stride_row = 0;
    int64_t stride_column = 0;
};

// A typed row of such a matrix.
template <class T>
struct Row {
    const T* data;
    int64_t stride;
};

template <class T>
EFE_INLINE Row<T> row_of(const Matrix& matrix, int64_t index) {
    const T* data = static_cast<const T*>(matrix.data);
    return {data == nullptr ? nullptr : data + index * matrix.stride_row, matrix.stride_column};
}

// 0 where the row is absent.
template <class A>
EFE_INLINE A element(const Row<A>& row, int64_t index) {
    return row.data == nullptr ? A(0) : row.data[index * row.stride];
}

// Row `index` of a contiguous result [.., width]; null where it is not asked for.
template <class T>
EFE_INLINE T* result_row(void* data, int64_t index, int64_t width) {
    return data == nullptr ? nullptr : static_cast<T*>(data) + index * width;
}

struct MaskedMeanPoolForward {
    Dtype dtype;                      // of hidden and pooled; scale is double for float64, else float
    int64_t rows, length, width;      // N, L, E
    const void* hidden;               // [N, L, E], the strides follow
    int64_t stride_row, stride_token, stride_column;
    Matrix mask;                      // [N, L] bool
    void* pooled;                     // [N, E] contiguous
    void* scale;                      // [N], 1 / tokens, 0 without a token
    int64_t chunks;                   // parts of L that are summed apart, on CUDA
    void* partial_sums;               // [N, chunks, E] workspace in the dtype of scale; null for one chunk
    int32_t* partial_counts;          // [N, chunks]; null for one chunk
};

struct MaskedMeanPoolBackward {
    Dtype dtype;
    int64_t rows, length, width;
    Matrix grad;                      // [N, E]
    Matrix mask;                      // [N, L] bool
    const void* scale;                // [N] contiguous
    void* grad_hidden;                // [N, L, E] contiguous
};

// In the next four, every tensor but the prompt is double where the prompt is, else float.
struct RefinePromptForward {
    Dtype dtype;                      // of prompt and refined
    int64_t batch, dimension;         // B, D
    double delta_scale, log_delta_scale;
    uint64_t seed;                    // read where noise is null
    Matrix prompt;                    // [B, D]
    Matrix mean, log_std, noise;      // [B, W]; a shared log_std has row stride 0
    void* refined;                    // [B, D] contiguous
    void* action;                     // [B, W] contiguous
    void* log_prob;                   // [B]
    void* entropy;                    // [B]
};

struct RefinePromptBackward {
    Dtype dtype;                      // of grad_refined
    int64_t batch, dimension;
    double delta_scale;
    uint64_t seed;
    Matrix grad_refined;              // [B, D] or null
    Matrix grad_action;               // [B, W] or null
    Matrix grad_log_prob;             // [B, 1] or null
    Matrix grad_entropy;              // [B, 1] or null
    Matrix action, log_std, noise;    // [B, W]
    void* grad_mean;                  // [B, W] contiguous, or null where it is not asked for
    void* grad_log_std;               // [B, W] contiguous, or null
};

struct SquashedLogProbForward {
    Dtype dtype;                      // float32 or float64, of everything
    int64_t batch, dimension;
    double log_delta_scale;
    Matrix action, mean, log_std;     // [B, W]
    void* log_prob;                   // [B]
    void* entropy;                    // [B]
};

struct SquashedLogProbBackward {
    Dtype dtype;
    int64_t batch, dimension;
    Matrix grad_log_prob;             // [B, 1] or null
    Matrix grad_entropy;              // [B, 1] or null
    Matrix action, mean, log_std;     // [B, W]
    void* grad_action;                // [B, W] contiguous, or null where it is not asked for
    void* grad_mean;                  // [B, W] contiguous, or null
    void* grad_log_std;               // [B, W] contiguous, or null
};

}  // namespace efe::prompt
