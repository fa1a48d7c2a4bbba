// The ops over torch tensors, the same for every backend: allocate the results, describe the tensors, call the kernel.
// A Backend has one static function per kernel, which takes the structs of kernels.h, `sum_rows`, which adds up the rows
// of a contiguous matrix, and a Device, which makes that of a tensor the current one while it lives. functional.py has
// checked shapes.
#pragma once

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "common/library.h"
#include "common/tensor.h"
#include "prompt/kernels.h"

namespace efe::prompt {

// tensor [rows, columns]; a vector is one row for every index (log_std [W]).
inline Matrix matrix(const Tensor& tensor, ScalarType type) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, "efe: expected ", type, ", got ", tensor.scalar_type(), ".");
    const bool shared = tensor.dim() == 1;
    return {tensor.data(), shared ? 0 : tensor.stride(0), shared ? tensor.stride(0) : tensor.stride(1)};
}

inline Matrix matrix(const OptionalTensor& tensor, ScalarType type) {
    return tensor.has_value() ? matrix(*tensor, type) : Matrix{};
}

// A vector [rows] as a column.
inline Matrix column(const OptionalTensor& tensor, ScalarType type) {
    const Matrix row = matrix(tensor, type);
    return {row.data, row.stride_column, 0};
}

inline uint64_t seed_of(const OptionalTensor& seed) {
    int64_t number = 0;
    if (seed.has_value()) check(aoti_torch_item_int64(seed->handle(), &number));
    return static_cast<uint64_t>(number);
}

template <class Backend>
struct Ops {
    using Device = typename Backend::Device;

    static std::tuple<Tensor, Tensor> masked_mean_pool_forward(const Tensor& hidden, const Tensor& mask) {
        const Device device(hidden);
        const int64_t rows = hidden.size(0), length = hidden.size(1), width = hidden.size(2);
        Tensor pooled = empty({rows, width}, hidden.scalar_type(), hidden);
        Tensor scale = empty({rows}, arithmetic_type(hidden), hidden);
        MaskedMeanPoolForward args{
            dtype_of(hidden.scalar_type()), rows, length, width, hidden.data(), hidden.stride(0), hidden.stride(1),
            hidden.stride(2), matrix(mask, ScalarType::Bool), pooled.mutable_data(), scale.mutable_data(), 1, nullptr,
            nullptr};
        args.chunks = Backend::masked_mean_pool_chunks(args);
        Tensor sums, counts;
        if (args.chunks > 1) {
            sums = empty({rows, args.chunks, width}, scale.scalar_type(), hidden);
            counts = empty({rows, args.chunks}, ScalarType::Int, hidden);
            args.partial_sums = sums.mutable_data();
            args.partial_counts = counts.mutable_data<int32_t>();
        }
        Backend::masked_mean_pool_forward(args);
        return {std::move(pooled), std::move(scale)};
    }

    static Tensor masked_mean_pool_backward(const Tensor& grad, const Tensor& mask, const Tensor& scale) {
        const Device device(grad);
        const int64_t rows = mask.size(0), length = mask.size(1), width = grad.size(1);
        Tensor grad_hidden = empty({rows, length, width}, grad.scalar_type(), grad);
        Backend::masked_mean_pool_backward(
            {dtype_of(grad.scalar_type()), rows, length, width, matrix(grad, grad.scalar_type()),
             matrix(mask, ScalarType::Bool), contiguous_as(scale, scale.scalar_type()).data(),
             grad_hidden.mutable_data()});
        return grad_hidden;
    }

    static std::tuple<Tensor, Tensor, Tensor, Tensor> refine_prompt_forward(
        const Tensor& prompt, const Tensor& mean, const Tensor& log_std, const OptionalTensor& noise,
        const OptionalTensor& seed, double delta_scale) {
        const Device device(prompt);
        const ScalarType type = arithmetic_type(prompt);
        const int64_t batch = prompt.size(0), dimension = prompt.size(1);
        Tensor refined = empty({batch, dimension}, prompt.scalar_type(), prompt);
        Tensor action = empty({batch, dimension + 1}, type, prompt);
        Tensor log_prob = empty({batch}, type, prompt), entropy = empty({batch}, type, prompt);
        Backend::refine_prompt_forward(
            {dtype_of(prompt.scalar_type()), batch, dimension, delta_scale, std::log(delta_scale), seed_of(seed),
             matrix(prompt, prompt.scalar_type()), matrix(mean, type), matrix(log_std, type), matrix(noise, type),
             refined.mutable_data(), action.mutable_data(), log_prob.mutable_data(), entropy.mutable_data()});
        return {std::move(refined), std::move(action), std::move(log_prob), std::move(entropy)};
    }

    static std::vector<Tensor> refine_prompt_backward(
        const OptionalTensor& grad_refined, const OptionalTensor& grad_action, const OptionalTensor& grad_log_prob,
        const OptionalTensor& grad_entropy, const Tensor& action, const Tensor& log_std,
        const OptionalTensor& noise, const OptionalTensor& seed, double delta_scale, const std::vector<bool>& needs) {
        const Device device(action);
        const ScalarType type = action.scalar_type();
        const ScalarType refined_type = grad_refined.has_value() ? grad_refined->scalar_type() : type;
        const int64_t batch = action.size(0), dimension = action.size(1) - 1;
        RowGradients gradients(batch, dimension + 1, action, needs);
        Backend::refine_prompt_backward(
            {dtype_of(refined_type), batch, dimension, delta_scale, seed_of(seed),
             matrix(grad_refined, refined_type), matrix(grad_action, type), column(grad_log_prob, type),
             column(grad_entropy, type), matrix(action, type), matrix(log_std, type), matrix(noise, type),
             gradients.data(0), gradients.data(1)});
        return gradients.take(log_std);
    }

    static std::tuple<Tensor, Tensor> squashed_log_prob_forward(
        const Tensor& action, const Tensor& mean, const Tensor& log_std, double delta_scale) {
        const Device device(action);
        const ScalarType type = action.scalar_type();
        const int64_t batch = action.size(0);
        Tensor log_prob = empty({batch}, type, action), entropy = empty({batch}, type, action);
        Backend::squashed_log_prob_forward(
            {dtype_of(action.scalar_type()), batch, action.size(1) - 1, std::log(delta_scale), matrix(action, type),
             matrix(mean, type), matrix(log_std, type), log_prob.mutable_data(), entropy.mutable_data()});
        return {std::move(log_prob), std::move(entropy)};
    }

    static std::vector<Tensor> squashed_log_prob_backward(
        const OptionalTensor& grad_log_prob, const OptionalTensor& grad_entropy, const Tensor& action,
        const Tensor& mean, const Tensor& log_std, const std::vector<bool>& needs) {
        const Device device(action);
        const ScalarType type = action.scalar_type();
        const int64_t batch = action.size(0), dimension = action.size(1) - 1;
        RowGradients gradients(batch, dimension + 1, action, needs);
        Backend::squashed_log_prob_backward(
            {dtype_of(action.scalar_type()), batch, dimension, column(grad_log_prob, type), column(grad_entropy, type),
             matrix(action, type), matrix(mean, type), matrix(log_std, type), gradients.data(0), gradients.data(1),
             gradients.data(2)});
        return gradients.take(log_std);
    }

private:
    // Gradients [B, W], only those that are needed; the last belongs to log_std.
    struct RowGradients {
        std::vector<Tensor> tensors;

        RowGradients(int64_t batch, int64_t width, const Tensor& like, const std::vector<bool>& needs) {
            for (const bool need : needs)
                tensors.push_back(need ? empty({batch, width}, like.scalar_type(), like) : Tensor());
        }

        void* data(size_t index) const { return tensors[index].mutable_data(); }

        // The rows are added up for a shared log_std [W].
        std::vector<Tensor> take(const Tensor& log_std) {
            if (tensors.back().defined() && log_std.dim() == 1) tensors.back() = Backend::sum_rows(tensors.back());
            std::vector<Tensor> wanted;
            for (Tensor& tensor : tensors)
                if (tensor.defined()) wanted.push_back(std::move(tensor));
            return wanted;
        }
    };
};

template <class Backend>
void implement_ops(Library& library) {
    implement<&Ops<Backend>::masked_mean_pool_forward>(library, "masked_mean_pool_forward");
    implement<&Ops<Backend>::masked_mean_pool_backward>(library, "masked_mean_pool_backward");
    implement<&Ops<Backend>::refine_prompt_forward>(library, "refine_prompt_forward");
    implement<&Ops<Backend>::refine_prompt_backward>(library, "refine_prompt_backward");
    implement<&Ops<Backend>::squashed_log_prob_forward>(library, "squashed_log_prob_forward");
    implement<&Ops<Backend>::squashed_log_prob_backward>(library, "squashed_log_prob_backward");
}

}  // namespace efe::prompt
