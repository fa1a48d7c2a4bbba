// rl_advantage on the CPU. The derivation of the gradient stands in efe_kernels/advantage/kernels.py.
// Arithmetic is A: double for double tensors, else float.
#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "common/library.h"
#include "common/math.h"
#include "common/moments.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace efe::advantage {
namespace {

enum class Normalize { none, tanh, clamp };
constexpr double kWhitenEps = 1e-4;

Normalize normalize_of(const std::optional<std::string>& name) {
    return !name.has_value() ? Normalize::none : *name == "tanh" ? Normalize::tanh : Normalize::clamp;
}

template <class A>
struct Inputs {
    const A *reward, *value;  // [N]
    const uint8_t* mask;      // [N] or null
    A reward_scale;
    Normalize normalize;

    // Normalised reward minus value of elements [begin, begin + count); 0 where they do not count.
    EFE_INLINE void subtract_value(int64_t begin, int64_t count, A* __restrict__ out) const {
        const A scale = reward_scale;
        const A *rewards = reward + begin, *values = value + begin;
        for (int64_t i = 0; i < count; ++i) out[i] = rewards[i] * scale;
        if (normalize == Normalize::tanh) {
            for (int64_t i = 0; i < count; ++i) {
                // tanh |x| = -e / (2 + e) with e = exp(-2 |x|) - 1, which has a small relative error near 0.
                const A x = out[i];
                const A e = math::exponential(A(-2) * std::fabs(x)).minus_one;
                out[i] = std::copysign(e / (A(2) + e), x);
            }
        } else if (normalize == Normalize::clamp) {
            for (int64_t i = 0; i < count; ++i) out[i] = out[i] > 1 ? A(1) : out[i] < -1 ? A(-1) : out[i];
        }
        for (int64_t i = 0; i < count; ++i) out[i] -= values[i];
        clear_others(mask_from(mask, begin), count, out);
    }
};

template <class A>
struct Statistics {
    A count, mean, std;
};

template <class A>
EFE_INLINE Statistics<A> group_statistics(const A* x, const uint8_t* mask, int64_t size) {
    const Moments moments = moments_of(x, mask, size);
    const double std = std::sqrt(moments.squares / std::max(moments.count - 1, 1.0));
    const double mean = std == std ? moments.mean : std;  // where a member is infinite and others are not
    return {static_cast<A>(moments.count), static_cast<A>(mean), static_cast<A>(std)};
}

template <class A>
EFE_INLINE A scale_of(const Statistics<A>& statistics) {
    return A(1) / (statistics.std + static_cast<A>(kWhitenEps));
}

// x -> x - mean of the members, without `center` times the scale; 0 of a group of equal ones.
template <class A>
EFE_INLINE void whiten(const Statistics<A>& statistics, bool center, const uint8_t* mask, int64_t size, A* x) {
    const A mean = statistics.mean;
    if (center) {
        for (int64_t i = 0; i < size; ++i) x[i] = x[i] == mean ? A(0) : x[i] - mean;  // infinities that are equal, too
    } else if (statistics.std == 0) {
        std::fill_n(x, size, A(0));
    } else {
        const A scale = scale_of(statistics);
        for (int64_t i = 0; i < size; ++i) x[i] = (x[i] - mean) * scale;
    }
    clear_others(mask, size, x);
}

// What both directions read: tensors that stay alive, and pointers into them.
struct Tensors {
    Tensor reward, value, mask;

    Tensors(const Tensor& reward, const Tensor& value, const OptionalTensor& mask, ScalarType type)
        : reward(contiguous_as(reward, type)),
          value(contiguous_as(value, type)),
          mask(contiguous_as(mask, ScalarType::Bool)) {}

    template <class A>
    Inputs<A> inputs(double reward_scale, const std::optional<std::string>& normalize) const {
        return {reward.data<A>(), value.data<A>(), bytes_of(mask), static_cast<A>(reward_scale),
                normalize_of(normalize)};
    }
};

std::tuple<Tensor, Tensor> rl_advantage_forward(const Tensor& reward, const Tensor& value, const OptionalTensor& mask,
                                                double reward_scale, const std::optional<std::string>& normalize,
                                                int64_t group_size, bool center) {
    const ScalarType type = arithmetic_type(promoted(reward.scalar_type(), value.scalar_type()));
    const Spans spans(reward.numel(), group_size);
    Tensor out = empty(reward, type);
    Tensor statistics = empty({group_size > 0 ? spans.count() : 0, 3}, type, reward);
    const Tensors tensors(reward, value, mask, type);
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const Inputs<A> inputs = tensors.inputs<A>(reward_scale, normalize);
        A* const advantage = out.mutable_data<A>();
        auto* const found = reinterpret_cast<Statistics<A>*>(statistics.mutable_data<A>());
        spans.for_each([&](int64_t span, int64_t begin, int64_t size) EFE_SIMD_BODY {
            inputs.subtract_value(begin, size, advantage + begin);
            if (group_size == 0) return;
            const uint8_t* members = mask_from(inputs.mask, begin);
            found[span] = group_statistics(advantage + begin, members, size);
            whiten(found[span], center, members, size, advantage + begin);
        });
    });
    return {result_as(std::move(out), promoted(reward.scalar_type(), value.scalar_type())), std::move(statistics)};
}

// The gradient [size] of the values of a group; grad is [N].
template <class A>
EFE_INLINE void group_gradient(const Inputs<A>& inputs, const A* grad, const Statistics<A>& statistics, bool center,
                               int64_t begin, int64_t size, A* __restrict__ out) {
    if (statistics.std == 0 && !center) {
        std::fill_n(out, size, A(0));
        return;
    }
    const uint8_t* mask = mask_from(inputs.mask, begin);
    grad += begin;
    const double grad_sum = sum_members(mask, size, [&](int64_t i) EFE_SIMD_BODY { return double(grad[i]); });
    const A mean = static_cast<A>(grad_sum / std::max(double(statistics.count), 1.0));
    if (center) {
        for (int64_t i = 0; i < size; ++i) out[i] = mean - grad[i];
    } else {
        inputs.subtract_value(begin, size, out);
        whiten(statistics, false, mask, size, out);
        const double product_sum =
            sum_members(mask, size, [&](int64_t i) EFE_SIMD_BODY { return double(grad[i]) * out[i]; });
        const A scale = scale_of(statistics);
        const A slope = static_cast<A>(product_sum / ((statistics.count - 1) * statistics.std));
        for (int64_t i = 0; i < size; ++i) out[i] = out[i] * slope - (grad[i] - mean) * scale;
    }
    clear_others(mask, size, out);
}

Tensor rl_advantage_backward(const Tensor& grad, const Tensor& reward, const Tensor& value, const OptionalTensor& mask,
                             const Tensor& statistics, double reward_scale, const std::optional<std::string>& normalize,
                             int64_t group_size, bool center) {
    const ScalarType type = statistics.scalar_type();
    const Spans spans(reward.numel(), group_size);
    Tensor out = empty(reward, type);
    const Tensor upstream = contiguous_as(grad, type), found = contiguous_as(statistics, type);
    const Tensors tensors(reward, value, mask, type);
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const Inputs<A> inputs = tensors.inputs<A>(reward_scale, normalize);
        const A* const grads = upstream.data<A>();
        A* const gradient = out.mutable_data<A>();
        const auto* const groups = reinterpret_cast<const Statistics<A>*>(found.data<A>());
        spans.for_each([&](int64_t span, int64_t begin, int64_t size) EFE_SIMD_BODY {
            if (group_size > 0) return group_gradient(inputs, grads, groups[span], center, begin, size, gradient + begin);
            for (int64_t i = begin; i < begin + size; ++i) gradient[i] = -grads[i];
            clear_others(mask_from(inputs.mask, begin), size, gradient + begin);
        });
    });
    return result_as(std::move(out), value.scalar_type());
}

STABLE_TORCH_LIBRARY_IMPL(efe, CPU, library) {
    implement<rl_advantage_forward>(library, "rl_advantage_forward");
    implement<rl_advantage_backward>(library, "rl_advantage_backward");
}

}  // namespace
}  // namespace efe::advantage
