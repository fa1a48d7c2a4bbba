// rl_advantage on the CPU. The derivation of the gradient stands in efe_kernels/advantage/kernels.py.
// Arithmetic is A: double for double tensors, else float.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "common/moments.h"
#include "common/math.h"

namespace efe::advantage {
namespace {

enum class Normalize { none, tanh, clamp };
constexpr double kWhitenEps = 1e-4;

Normalize normalize_of(const std::optional<c10::string_view>& name) {
    return !name.has_value() ? Normalize::none : *name == "tanh" ? Normalize::tanh : Normalize::clamp;
}

template <class A>
struct Advantage {
    const A *reward, *value, *grad;
    const uint8_t* mask;
    A reward_scale;
    Normalize normalize;

    // Normalised reward minus value of elements [begin, begin + count); 0 where they do not count.
    EFE_INLINE void load(int64_t begin, int64_t count, A* __restrict__ out) const {
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
        clear_others(at_offset(mask, begin), count, out);
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
    return {static_cast<A>(moments.count), static_cast<A>(moments.mean), static_cast<A>(std)};
}

// x -> (x - mean) / (std + eps) of the members, 0 of a group of equal ones.
template <class A>
EFE_INLINE void whiten(const Statistics<A>& statistics, const uint8_t* mask, int64_t size, A* x) {
    if (statistics.std == 0) {
        std::fill_n(x, size, A(0));
        return;
    }
    const A mean = statistics.mean, scale = A(1) / (statistics.std + static_cast<A>(kWhitenEps));
    for (int64_t i = 0; i < size; ++i) x[i] = (x[i] - mean) * scale;
    clear_others(mask, size, x);
}

std::tuple<at::Tensor, at::Tensor> rl_advantage_forward(
    const at::Tensor& reward, const at::Tensor& value, const OptionalTensor& mask, double reward_scale,
    std::optional<c10::string_view> normalize, int64_t group_size) {
    const at::ScalarType type = arithmetic_type(reward) == at::kDouble ? at::kDouble : arithmetic_type(value);
    const Runs runs(reward.numel(), group_size);
    const at::Tensor out = at::empty(reward.sizes(), reward.options().dtype(type));
    const at::Tensor statistics = at::empty({group_size > 0 ? runs.count() : 0, 3}, out.options());
    const at::Tensor r = reward.to(type).contiguous(), v = value.to(type).contiguous();
    const at::Tensor m = mask.has_value() ? mask->contiguous() : at::Tensor();
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const Advantage<A> p{data_of<A>(r), data_of<A>(v), nullptr, bytes_of(m), static_cast<A>(reward_scale),
                             normalize_of(normalize)};
        A* const advantage = out.mutable_data_ptr<A>();
        auto* const found = reinterpret_cast<Statistics<A>*>(statistics.mutable_data_ptr<A>());
        parallel(runs.count(), runs.size, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
            for (int64_t run = first; run < last; ++run) {
                const int64_t begin = run * runs.size, length = runs.length(run);
                p.load(begin, length, advantage + begin);
                if (group_size == 0) continue;
                const uint8_t* members = at_offset(p.mask, begin);
                found[run] = group_statistics(advantage + begin, members, length);
                whiten(found[run], members, length, advantage + begin);
            }
        });
    });
    return {out.to(c10::promoteTypes(reward.scalar_type(), value.scalar_type())), statistics};
}

template <class A>
EFE_INLINE void backward_group(const Advantage<A>& p, const Statistics<A>& statistics, int64_t begin, int64_t size,
                               A* __restrict__ out) {
    if (statistics.std == 0) {
        std::fill_n(out, size, A(0));
        return;
    }
    p.load(begin, size, out);
    const uint8_t* mask = at_offset(p.mask, begin);
    whiten(statistics, mask, size, out);
    const A* grad = p.grad + begin;
    const double grad_sum = sum_members(grad, mask, size, [](A value) EFE_SIMD_BODY { return double(value); });
    const auto product = [&](int64_t i) EFE_SIMD_BODY { return double(grad[i]) * out[i]; };
    const double product_sum = mask == nullptr ? sum(size, product) : sum(size, [&](int64_t i) EFE_SIMD_BODY {
        const double value = product(i);
        return mask[i] != 0 ? value : 0.0;
    });
    const A mean = static_cast<A>(grad_sum / statistics.count);
    const A slope = static_cast<A>(product_sum / ((statistics.count - 1) * statistics.std));
    const A scale = A(1) / (statistics.std + static_cast<A>(kWhitenEps));
    for (int64_t i = 0; i < size; ++i) out[i] = out[i] * slope - (grad[i] - mean) * scale;
    clear_others(mask, size, out);
}

at::Tensor rl_advantage_backward(
    const at::Tensor& grad, const at::Tensor& reward, const at::Tensor& value, const OptionalTensor& mask,
    const at::Tensor& statistics, double reward_scale, std::optional<c10::string_view> normalize, int64_t group_size) {
    const at::ScalarType type = statistics.scalar_type();
    const Runs runs(reward.numel(), group_size);
    const at::Tensor out = at::empty(reward.sizes(), reward.options().dtype(type));
    const at::Tensor g = grad.to(type).contiguous(), r = reward.to(type).contiguous(), v = value.to(type).contiguous();
    const at::Tensor m = mask.has_value() ? mask->contiguous() : at::Tensor(), s = statistics.contiguous();
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const Advantage<A> p{data_of<A>(r), data_of<A>(v), data_of<A>(g), bytes_of(m),
                             static_cast<A>(reward_scale), normalize_of(normalize)};
        A* const gradient = out.mutable_data_ptr<A>();
        const auto* const found = reinterpret_cast<const Statistics<A>*>(data_of<A>(s));
        parallel(runs.count(), runs.size, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
            for (int64_t run = first; run < last; ++run) {
                const int64_t begin = run * runs.size, length = runs.length(run);
                if (group_size > 0) {
                    backward_group(p, found[run], begin, length, gradient + begin);
                } else {
                    for (int64_t i = begin; i < begin + length; ++i) gradient[i] = -p.grad[i];
                    clear_others(at_offset(p.mask, begin), length, gradient + begin);
                }
            }
        });
    });
    return out.to(value.scalar_type());
}

TORCH_LIBRARY_IMPL(efe, CPU, library) {
    library.impl("rl_advantage_forward", rl_advantage_forward);
    library.impl("rl_advantage_backward", rl_advantage_backward);
}

}  // namespace
}  // namespace efe::advantage
