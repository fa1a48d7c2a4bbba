// policy_gradient_loss on the CPU. The derivation of the gradients stands in
// efe_kernels/policy_loss/kernels.py. Arithmetic is A: double for double tensors, else float.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/library.h"
#include "common/math.h"
#include "common/moments.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace efe::policy_loss {
namespace {

template <class A>
struct Inputs {
    const A *log_prob, *value, *advantage, *value_target;  // [N]
    const A *entropy, *old_log_prob;                       // [N] or null: backward reads no entropy
    const uint8_t* mask;                                   // [N] or null
    A clip;
};

// Sums over the elements that count.
struct Partial {
    double policy = 0, squared_error = 0, entropy = 0, outside = 0, divergence = 0;
    Moments error, target;

    void merge(const Partial& other) {
        policy += other.policy;
        squared_error += other.squared_error;
        entropy += other.entropy;
        outside += other.outside;
        divergence += other.divergence;
        error.merge(other.error);
        target.merge(other.target);
    }
};

// x · weight, and 0 where the weight is 0, also for an infinite x: an advantage of 0 asks for nothing.
template <class A>
EFE_INLINE A times(A x, A weight) {
    return weight == 0 && !std::isnan(x) ? A(0) : x * weight;
}

template <class A>
EFE_INLINE void load_log_ratio(const Inputs<A>& p, int64_t begin, int64_t count, A* __restrict__ out) {
    const A *log_prob = p.log_prob + begin, *old_log_prob = p.old_log_prob + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = log_prob[i] - old_log_prob[i];
}

template <class A>
EFE_INLINE Partial sum_span(const Inputs<A>& p, int64_t begin, int64_t count) {
    constexpr int64_t kSize = Spans::kPiece;
    A loss[kSize], error[kSize], log_ratio[kSize], outside[kSize], divergence[kSize];
    const A *log_prob = p.log_prob + begin, *advantage = p.advantage + begin;
    const A *target = p.value_target + begin, *value = p.value + begin;
    const uint8_t* mask = mask_from(p.mask, begin);
    const auto total = [&](const A* x) EFE_SIMD_BODY {
        return sum_members(mask, count, [&](int64_t i) EFE_SIMD_BODY { return double(x[i]); });
    };
    Partial partial;
    for (int64_t i = 0; i < count; ++i) error[i] = target[i] - value[i];
    if (p.old_log_prob == nullptr) {
        for (int64_t i = 0; i < count; ++i) loss[i] = times(-log_prob[i], advantage[i]);
    } else {
        const A clip = p.clip, low = A(1) - clip, high = A(1) + clip;
        load_log_ratio(p, begin, count, log_ratio);
        for (int64_t i = 0; i < count; ++i) {
            const math::Exponential<A> exponential = math::exponential(log_ratio[i]);
            const A ratio = exponential.value, distance = std::fabs(exponential.minus_one);
            const A limited = ratio > high ? high : ratio < low ? low : ratio;
            const A free_term = times(ratio, advantage[i]), limited_term = times(limited, advantage[i]);
            loss[i] = limited_term < free_term ? -limited_term : -free_term;
            outside[i] = distance > clip ? A(1) : A(0);
            divergence[i] = std::isinf(ratio) ? ratio : exponential.minus_one - log_ratio[i];
        }
        partial.outside = total(outside);
        partial.divergence = total(divergence);
    }
    partial.policy = total(loss);
    partial.entropy = total(p.entropy + begin);
    partial.error = moments_of(error, mask, count);
    partial.target = moments_of(target, mask, count);
    partial.squared_error =
        sum_members(mask, count, [&](int64_t i) EFE_SIMD_BODY { return double(error[i]) * error[i]; });
    return partial;
}

// What both directions read: tensors that stay alive, and pointers into them.
struct Tensors {
    Tensor log_prob, value, advantage, value_target, entropy, old_log_prob, mask;

    Tensors(const Tensor& log_prob, const Tensor& value, const Tensor& advantage, const Tensor& value_target,
            Tensor entropy, const OptionalTensor& old_log_prob, const OptionalTensor& mask, ScalarType type)
        : log_prob(contiguous_as(log_prob, type)),
          value(contiguous_as(value, type)),
          advantage(contiguous_as(advantage, type)),
          value_target(contiguous_as(value_target, type)),
          entropy(std::move(entropy)),
          old_log_prob(contiguous_as(old_log_prob, type)),
          mask(contiguous_as(mask, ScalarType::Bool)) {}

    template <class A>
    Inputs<A> inputs(double clip) const {
        return {log_prob.data<A>(), value.data<A>(),        advantage.data<A>(), value_target.data<A>(),
                entropy.data<A>(),  old_log_prob.data<A>(), bytes_of(mask),      static_cast<A>(clip)};
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_gradient_loss_forward(
    const Tensor& entropy, const Tensor& log_prob, const Tensor& value, const Tensor& advantage,
    const Tensor& value_target, const OptionalTensor& old_log_prob, const OptionalTensor& mask, double clip,
    double value_coef, double entropy_coef) {
    const ScalarType type = arithmetic_type(log_prob);
    const Tensors tensors(log_prob, value, advantage, value_target, contiguous_as(entropy, type), old_log_prob, mask,
                          type);
    const Spans spans(log_prob.numel(), 0);
    std::vector<Partial> partials(spans.count());
    for_arithmetic(type, [&](auto zero) {
        const auto inputs = tensors.inputs<decltype(zero)>(clip);
        spans.for_each([&](int64_t span, int64_t begin, int64_t size) EFE_SIMD_BODY {
            partials[span] = sum_span(inputs, begin, size);
        });
    });
    Partial all;
    for (const Partial& partial : partials) all.merge(partial);
    const double count = all.error.count, some = std::max(count, 1.0);
    const double policy = all.policy / some, value_loss = all.squared_error / some, mean_entropy = all.entropy / some;
    const double explained = all.target.squares == 0 ? 0 : 1 - all.error.squares / all.target.squares;
    const auto tensor = [&](std::initializer_list<int64_t> sizes, std::initializer_list<double> numbers) {
        Tensor out = empty(sizes, type, log_prob);
        for_arithmetic(type, [&](auto zero) {
            std::copy(numbers.begin(), numbers.end(), out.mutable_data<decltype(zero)>());
        });
        return out;
    };
    const double total = policy + times(value_loss, value_coef) - times(mean_entropy, entropy_coef);
    return {tensor({}, {total}), tensor({}, {policy}), tensor({}, {value_loss}), tensor({}, {mean_entropy}),
            tensor({4}, {all.outside / some, all.divergence / some, explained, count})};
}

template <class A>
struct Gradients {
    A *entropy, *log_prob, *value;  // [N], or null where it is not asked for
};

// What arrives at each element: upstream gradients over the number of those that count.
template <class A>
struct Upstream {
    A policy, value, entropy;
};

template <class A>
EFE_INLINE void differentiate_span(const Inputs<A>& p, const Upstream<A>& upstream, const Gradients<A>& gradients,
                                   int64_t begin, int64_t count) {
    const uint8_t* mask = mask_from(p.mask, begin);
    if (gradients.log_prob != nullptr) {
        A* const __restrict__ out = gradients.log_prob + begin;
        const A* advantage = p.advantage + begin;
        for (int64_t i = 0; i < count; ++i) out[i] = times(advantage[i], -upstream.policy);
        if (p.old_log_prob != nullptr) {
            A log_ratio[Spans::kPiece];
            load_log_ratio(p, begin, count, log_ratio);
            const A low = A(1) - p.clip, high = A(1) + p.clip;
            for (int64_t i = 0; i < count; ++i) {
                const A ratio = math::exp(log_ratio[i]), slope = times(ratio, out[i]);
                // The clamp is the minimum above high for a gain, and below low for a loss.
                const A limit = advantage[i] < 0 ? -low : high;
                const A signed_ratio = advantage[i] < 0 ? -ratio : ratio;
                out[i] = signed_ratio > limit ? A(0) : slope;
            }
        }
        clear_others(mask, count, out);
    }
    if (gradients.value != nullptr) {
        A* const __restrict__ out = gradients.value + begin;
        const A *target = p.value_target + begin, *found = p.value + begin;
        for (int64_t i = 0; i < count; ++i) out[i] = times(A(2) * (found[i] - target[i]), upstream.value);
        clear_others(mask, count, out);
    }
    if (gradients.entropy != nullptr) {
        std::fill_n(gradients.entropy + begin, count, upstream.entropy);
        clear_others(mask, count, gradients.entropy + begin);
    }
}

std::vector<Tensor> policy_gradient_loss_backward(
    const OptionalTensor& grad_total, const OptionalTensor& grad_policy, const OptionalTensor& grad_value,
    const OptionalTensor& grad_entropy, const std::vector<bool>& needs, const Tensor& diagnostics,
    const Tensor& log_prob, const Tensor& value, const Tensor& advantage, const Tensor& value_target,
    const OptionalTensor& old_log_prob, const OptionalTensor& mask, double clip, double value_coef,
    double entropy_coef) {
    const ScalarType type = diagnostics.scalar_type();
    const Tensors tensors(log_prob, value, advantage, value_target, {}, old_log_prob, mask, type);
    const double share = 1 / std::max(number_in(diagnostics, 3), 1.0);
    const auto number = [](const OptionalTensor& grad) { return grad.has_value() ? number_in(*grad) : 0.0; };
    const double total = number(grad_total);
    Tensor found[3];
    for (int i = 0; i < 3; ++i)
        if (needs[i]) found[i] = empty(log_prob, type);
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const Inputs<A> inputs = tensors.inputs<A>(clip);
        const Gradients<A> gradients{found[0].mutable_data<A>(), found[1].mutable_data<A>(),
                                     found[2].mutable_data<A>()};
        const Upstream<A> upstream{static_cast<A>((total + number(grad_policy)) * share),
                                   static_cast<A>((total * value_coef + number(grad_value)) * share),
                                   static_cast<A>((number(grad_entropy) - total * entropy_coef) * share)};
        Spans(log_prob.numel(), 0).for_each([&](int64_t, int64_t begin, int64_t size) EFE_SIMD_BODY {
            differentiate_span(inputs, upstream, gradients, begin, size);
        });
    });
    std::vector<Tensor> wanted;
    for (Tensor& gradient : found)
        if (gradient.defined()) wanted.push_back(result_as(std::move(gradient), log_prob.scalar_type()));
    return wanted;
}

STABLE_TORCH_LIBRARY_IMPL(efe, CPU, library) {
    implement<policy_gradient_loss_forward>(library, "policy_gradient_loss_forward");
    implement<policy_gradient_loss_backward>(library, "policy_gradient_loss_backward");
}

}  // namespace
}  // namespace efe::policy_loss
