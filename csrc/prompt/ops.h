// The ops over torch tensors, the same for every backend: allocate the results, describe the tensors, call the kernel.
// A Backend has one static function per kernel, which takes the structs of kernels.h. functional.py has checked shapes.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "prompt/kernels.h"

namespace efe::prompt {

// tensor [rows, columns]; a vector is one row for every index (log_std [W]).
inline Matrix matrix(const at::Tensor& tensor, at::ScalarType type) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == type, "efe: expected ", type, ", got ", tensor.scalar_type());
    const bool shared = tensor.dim() == 1;
    return {tensor.const_data_ptr(), shared ? 0 : tensor.stride(0), shared ? tensor.stride(0) : tensor.stride(1)};
}

inline Matrix matrix(const OptionalTensor& tensor, at::ScalarType type) {
    return tensor.has_value() ? matrix(*tensor, type) : Matrix{};
}

// A vector [rows] as a column.
inline Matrix column(const OptionalTensor& tensor, at::ScalarType type) {
    return tensor.has_value() ? matrix(tensor->unsqueeze(1), type) : Matrix{};
}

inline uint64_t seed_of(const OptionalTensor& seed) {
    return seed.has_value() ? static_cast<uint64_t>(seed->item<int64_t>()) : 0;
}

// One gradient per row, in the shape of the tensor that it belongs to: rows are summed for a shared log_std [W].
inline at::Tensor fold_rows(const at::Tensor& rows, const at::Tensor& like) {
    return like.dim() == 1 ? rows.sum(0) : rows;
}

template <class Backend>
struct Ops {
    static std::tuple<at::Tensor, at::Tensor> masked_mean_pool_forward(
        const at::Tensor& hidden, const at::Tensor& mask) {
        const c10::DeviceGuard guard(hidden.device());
        const int64_t rows = hidden.size(0), length = hidden.size(1), width = hidden.size(2);
        at::Tensor pooled = at::empty({rows, width}, hidden.options());
        at::Tensor scale = at::empty({rows}, hidden.options().dtype(arithmetic_type(hidden)));
        MaskedMeanPoolForward args{
            dtype_of(hidden.scalar_type()), rows, length, width, hidden.const_data_ptr(), hidden.stride(0),
            hidden.stride(1), hidden.stride(2), matrix(mask, at::kBool), pooled.mutable_data_ptr(),
            scale.mutable_data_ptr(), 1, nullptr, nullptr};
        args.chunks = Backend::masked_mean_pool_chunks(args);
        at::Tensor sums, counts;
        if (args.chunks > 1) {
            sums = at::empty({rows, args.chunks, width}, scale.options());
            counts = at::empty({rows, args.chunks}, scale.options().dtype(at::kInt));
            args.partial_sums = sums.mutable_data_ptr();
            args.partial_counts = counts.mutable_data_ptr<int32_t>();
        }
        Backend::masked_mean_pool_forward(args);
        return {pooled, scale};
    }

    static at::Tensor masked_mean_pool_backward(
        const at::Tensor& grad, const at::Tensor& mask, const at::Tensor& scale) {
        const c10::DeviceGuard guard(grad.device());
        const int64_t rows = mask.size(0), length = mask.size(1), width = grad.size(1);
        at::Tensor grad_hidden = at::empty({rows, length, width}, grad.options());
        Backend::masked_mean_pool_backward(
            {dtype_of(grad.scalar_type()), rows, length, width, matrix(grad, grad.scalar_type()),
             matrix(mask, at::kBool), scale.contiguous().const_data_ptr(), grad_hidden.mutable_data_ptr()});
        return grad_hidden;
    }

    static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> refine_prompt_forward(
        const at::Tensor& prompt, const at::Tensor& mean, const at::Tensor& log_std, const OptionalTensor& noise,
        const OptionalTensor& seed, double delta_scale) {
        const c10::DeviceGuard guard(prompt.device());
        const at::ScalarType type = arithmetic_type(prompt);
        const int64_t batch = prompt.size(0), dimension = prompt.size(1);
        at::Tensor refined = at::empty({batch, dimension}, prompt.options());
        at::Tensor action = at::empty({batch, dimension + 1}, mean.options());
        at::Tensor log_prob = at::empty({batch}, mean.options()), entropy = at::empty({batch}, mean.options());
        Backend::refine_prompt_forward(
            {dtype_of(prompt.scalar_type()), batch, dimension, delta_scale, std::log(delta_scale), seed_of(seed),
             matrix(prompt, prompt.scalar_type()), matrix(mean, type), matrix(log_std, type), matrix(noise, type),
             refined.mutable_data_ptr(), action.mutable_data_ptr(), log_prob.mutable_data_ptr(),
             entropy.mutable_data_ptr()});
        return {refined, action, log_prob, entropy};
    }

    static std::vector<at::Tensor> refine_prompt_backward(
        const OptionalTensor& grad_refined, const OptionalTensor& grad_action, const OptionalTensor& grad_log_prob,
        const OptionalTensor& grad_entropy, const at::Tensor& action, const at::Tensor& log_std,
        const OptionalTensor& noise, const OptionalTensor& seed, double delta_scale, const c10::List<bool>& needs) {
        const c10::DeviceGuard guard(action.device());
        const at::ScalarType type = action.scalar_type();
        const at::ScalarType refined_type = grad_refined.has_value() ? grad_refined->scalar_type() : type;
        const int64_t batch = action.size(0), dimension = action.size(1) - 1;
        RowGradients gradients(batch, dimension + 1, action, needs);
        Backend::refine_prompt_backward(
            {dtype_of(refined_type), batch, dimension, delta_scale, seed_of(seed),
             matrix(grad_refined, refined_type), matrix(grad_action, type), column(grad_log_prob, type),
             column(grad_entropy, type), matrix(action, type), matrix(log_std, type), matrix(noise, type),
             gradients.data(0), gradients.data(1)});
        return gradients.take(log_std);
    }

    static std::tuple<at::Tensor, at::Tensor> squashed_log_prob_forward(
        const at::Tensor& action, const at::Tensor& mean, const at::Tensor& log_std, double delta_scale) {
        const c10::DeviceGuard guard(action.device());
        const at::ScalarType type = action.scalar_type();
        const int64_t batch = action.size(0);
        at::Tensor log_prob = at::empty({batch}, action.options()), entropy = at::empty({batch}, action.options());
        Backend::squashed_log_prob_forward(
            {dtype_of(action.scalar_type()), batch, action.size(1) - 1, std::log(delta_scale), matrix(action, type),
             matrix(mean, type), matrix(log_std, type), log_prob.mutable_data_ptr(), entropy.mutable_data_ptr()});
        return {log_prob, entropy};
    }

    static std::vector<at::Tensor> squashed_log_prob_backward(
        const OptionalTensor& grad_log_prob, const OptionalTensor& grad_entropy, const at::Tensor& action,
        const at::Tensor& mean, const at::Tensor& log_std, const c10::List<bool>& needs) {
        const c10::DeviceGuard guard(action.device());
        const at::ScalarType type = action.scalar_type();
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
        std::vector<at::Tensor> tensors;

        RowGradients(int64_t batch, int64_t width, const at::Tensor& like, const c10::List<bool>& needs) {
            for (const bool need : needs)
                tensors.push_back(need ? at::empty({batch, width}, like.options()) : at::Tensor());
        }

        void* data(size_t index) const {
            return tensors[index].defined() ? tensors[index].mutable_data_ptr() : nullptr;
        }

        std::vector<at::Tensor> take(const at::Tensor& log_std) {
            if (tensors.back().defined()) tensors.back() = fold_rows(tensors.back(), log_std);
            std::vector<at::Tensor> wanted;
            for (at::Tensor& tensor : tensors)
                if (tensor.defined()) wanted.push_back(std::move(tensor));
            return wanted;
        }
    };
};

template <class Backend>
void register_ops(torch::Library& library) {
    library.impl("masked_mean_pool_forward", Ops<Backend>::masked_mean_pool_forward);
    library.impl("masked_mean_pool_backward", Ops<Backend>::masked_mean_pool_backward);
    library.impl("refine_prompt_forward", Ops<Backend>::refine_prompt_forward);
    library.impl("refine_prompt_backward", Ops<Backend>::refine_prompt_backward);
    library.impl("squashed_log_prob_forward", Ops<Backend>::squashed_log_prob_forward);
    library.impl("squashed_log_prob_backward", Ops<Backend>::squashed_log_prob_backward);
}

}  // namespace efe::prompt
