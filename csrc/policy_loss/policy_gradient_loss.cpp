// policy_gradient_loss on the CPU. The derivation of the gradients stands in
// efe_kernels/policy_loss/kernels.py. Arithmetic is A: double for double tensors, else float.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "common/moments.h"
#include "common/math.h"

namespace efe::advantage {
namespace {

template <class A>
struct Policy {
    const A *log_prob, *value, *entropy, *advantage, *value_target, *old_log_prob;
    const uint8_t* mask;
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
EFE_INLINE void load_log_ratio(const Policy<A>& p, int64_t begin, int64_t count, A* __restrict__ out) {
    const A *log_prob = p.log_prob + begin, *old_log_prob = p.old_log_prob + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = log_prob[i] - old_log_prob[i];
}

template <class A>
EFE_INLINE Partial sum_chunk(const Policy<A>& p, int64_t begin, int64_t count) {
    A loss[kChunk], error[kChunk], log_ratio[kChunk], outside[kChunk], divergence[kChunk];
    const A *log_prob = p.log_prob + begin, *advantage = p.advantage + begin;
    const A *target = p.value_target + begin, *value = p.value + begin;
    const uint8_t* mask = at_offset(p.mask, begin);
    const auto total = [&](const A* x) EFE_SIMD_BODY {
        return sum_members(x, mask, count, [](A term) EFE_SIMD_BODY { return double(term); });
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
    partial.squared_error = sum_members(error, mask, count, [](A x) EFE_SIMD_BODY { return double(x) * x; });
    return partial;
}

// A tensor, row-major, in the arithmetic's type; undefined where there is none.
at::Tensor flat(const OptionalTensor& tensor, at::ScalarType type) {
    return tensor.has_value() ? tensor->to(type).contiguous() : at::Tensor();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> policy_gradient_loss_forward(
    const at::Tensor& entropy, const at::Tensor& log_prob, const at::Tensor& value, const at::Tensor& advantage,
    const at::Tensor& value_target, const OptionalTensor& old_log_prob, const OptionalTensor& mask, double clip,
    double value_coef, double entropy_coef) {
    const at::ScalarType type = arithmetic_type(log_prob);
    const at::Tensor l = flat(log_prob, type), v = flat(value, type), e = flat(entropy, type), a = flat(advantage, type);
    const at::Tensor t = flat(value_target, type), old = flat(old_log_prob, type), m = flat(mask, at::kBool);
    const Runs runs(l.numel(), 0);
    std::vector<Partial> partials(runs.count());
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const Policy<A> p{data_of<A>(l), data_of<A>(v), data_of<A>(e), data_of<A>(a), data_of<A>(t), data_of<A>(old),
                          bytes_of(m), static_cast<A>(clip)};
        parallel(runs.count(), runs.size, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
            for (int64_t run = first; run < last; ++run) partials[run] = sum_chunk(p, run * runs.size, runs.length(run));
        });
    });
    Partial all;
    for (const Partial& partial : partials) all.merge(partial);
    const double count = all.error.count, some = std::max(count, 1.0);
    const double policy = all.policy / some, value_loss = all.squared_error / some, mean_entropy = all.entropy / some;
    const double explained = all.target.squares == 0 ? 0 : 1 - all.error.squares / all.target.squares;
    // at::full refuses a number that the dtype rounds to infinity; a loss may be one.
    const auto scalar = [&](double x) { return at::full({}, x, log_prob.options().dtype(at::kDouble)).to(type); };
    const at::Tensor diagnostics = at::empty({4}, log_prob.options().dtype(type));
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const double found[4] = {all.outside / some, all.divergence / some, explained, count};
        std::transform(found, found + 4, diagnostics.mutable_data_ptr<A>(), [](double x) { return static_cast<A>(x); });
    });
    const double total = policy + times(value_loss, value_coef) - times(mean_entropy, entropy_coef);
    return {scalar(total), scalar(policy), scalar(value_loss),
            scalar(mean_entropy), diagnostics};
}

template <class A>
struct PolicyGradients {
    A *entropy, *log_prob, *value;
};

template <class A>
EFE_INLINE void differentiate(const Policy<A>& p, const PolicyGradients<A>& gradients, int64_t begin, int64_t count,
                              A policy, A value, A entropy) {
    const uint8_t* mask = at_offset(p.mask, begin);
    if (gradients.log_prob != nullptr) {
        A* const __restrict__ out = gradients.log_prob + begin;
        const A* advantage = p.advantage + begin;
        for (int64_t i = 0; i < count; ++i) out[i] = times(advantage[i], -policy);
        if (p.old_log_prob != nullptr) {
            A log_ratio[kChunk];
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
        for (int64_t i = 0; i < count; ++i) out[i] = times(A(2) * (found[i] - target[i]), value);
        clear_others(mask, count, out);
    }
    if (gradients.entropy != nullptr) {
        std::fill_n(gradients.entropy + begin, count, entropy);
        clear_others(mask, count, gradients.entropy + begin);
    }
}

std::vector<at::Tensor> policy_gradient_loss_backward(
    const OptionalTensor& grad_total, const OptionalTensor& grad_policy, const OptionalTensor& grad_value,
    const OptionalTensor& grad_entropy, const c10::List<bool>& needs, const at::Tensor& diagnostics,
    const at::Tensor& log_prob, const at::Tensor& value, const at::Tensor& advantage, const at::Tensor& value_target,
    const OptionalTensor& old_log_prob, const OptionalTensor& mask, double clip, double value_coef,
    double entropy_coef) {
    const at::ScalarType type = diagnostics.scalar_type();
    const at::Tensor l = flat(log_prob, type), v = flat(value, type), a = flat(advantage, type);
    const at::Tensor t = flat(value_target, type), old = flat(old_log_prob, type), m = flat(mask, at::kBool);
    const Runs runs(l.numel(), 0);
    const double share = 1 / std::max(diagnostics[3].item<double>(), 1.0);
    const auto number = [](const OptionalTensor& grad) { return grad.has_value() ? grad->item<double>() : 0.0; };
    const double total = number(grad_total);
    at::Tensor found[3];
    for (int i = 0; i < 3; ++i)
        if (needs.get(i)) found[i] = at::empty(log_prob.sizes(), l.options());
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const auto out = [&](int i) { return found[i].defined() ? found[i].mutable_data_ptr<A>() : nullptr; };
        const Policy<A> p{data_of<A>(l), data_of<A>(v), nullptr, data_of<A>(a), data_of<A>(t), data_of<A>(old),
                          bytes_of(m), static_cast<A>(clip)};
        const PolicyGradients<A> gradients{out(0), out(1), out(2)};
        const A policy = static_cast<A>((total + number(grad_policy)) * share);
        const A critic = static_cast<A>((total * value_coef + number(grad_value)) * share);
        const A bonus = static_cast<A>((number(grad_entropy) - total * entropy_coef) * share);
        parallel(runs.count(), runs.size, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
            for (int64_t run = first; run < last; ++run)
                differentiate(p, gradients, run * runs.size, runs.length(run), policy, critic, bonus);
        });
    });
    std::vector<at::Tensor> wanted;
    for (const at::Tensor& gradient : found)
        if (gradient.defined()) wanted.push_back(gradient.to(log_prob.scalar_type()));
    return wanted;
}

TORCH_LIBRARY_IMPL(efe, CPU, library) {
    library.impl("policy_gradient_loss_forward", policy_gradient_loss_forward);
    library.impl("policy_gradient_loss_backward", policy_gradient_loss_backward);
}

}  // namespace
}  // namespace efe::advantage
