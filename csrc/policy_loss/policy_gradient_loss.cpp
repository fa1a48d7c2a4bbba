// policy_gradient_loss on the CPU. The derivation of the gradients stands in
// efe_kernels/policy_loss/kernels.py. Arithmetic is A: double for double tensors, else float.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/library.h"
#include "common/math.h"
#include "common/moments.h"
#include "common/parallel.h"
#include "common/sums.h"
#include "common/tensor.h"

namespace efe::policy_loss {
namespace {

// Elements that are computed at once: what is made of them stays in the L1 cache.
constexpr int64_t kBlock = 256;

template <class A>
struct Column {
    const A* data = nullptr;  // [N / length], or null
    int64_t length = 1;       // consecutive elements that share a value

    explicit operator bool() const { return data != nullptr; }
};

template <class A>
struct Inputs {
    Column<A> entropy, log_prob, advantage, value, value_target, old_log_prob, old_value, ref_log_prob, weight;
    const uint8_t* mask;  // [N] or null
    A low, high, dual_clip, value_clip;
};

// The elements from `begin` on, at most kBlock of them.
struct Block {
    int64_t begin, count;
    const uint8_t* mask;  // of the first of them on, or null

    bool is_whole() const { return mask == nullptr && count == kBlock; }

    // kBlock values of a column; 0 past the last element, and where one does not count.
    template <class A>
    EFE_INLINE const A* read(const Column<A>& column, A* __restrict__ buffer) const {
        if (column.length == 1) {
            if (is_whole()) return column.data + begin;
            std::copy_n(column.data + begin, count, buffer);
        } else {
            for (int64_t first = 0; first < count;) {
                const int64_t row = (begin + first) / column.length;
                const int64_t last = std::min(count, (row + 1) * column.length - begin);
                std::fill(buffer + first, buffer + last, column.data[row]);
                first = last;
            }
        }
        clear_others(mask, count, buffer);
        std::fill(buffer + count, buffer + kBlock, A(0));
        return buffer;
    }
};

// Sums over the elements that count.
struct Partial {
    double policy = 0, squared_error = 0, entropy = 0, kl = 0;  // weighted
    double outside = 0, low = 0, high = 0, divergence = 0;
    int64_t count = 0;
    Moments error, target;

    void merge(const Partial& other) {
        policy += other.policy;
        squared_error += other.squared_error;
        entropy += other.entropy;
        kl += other.kl;
        outside += other.outside;
        low += other.low;
        high += other.high;
        divergence += other.divergence;
        count += other.count;
        error.merge(other.error);
        target.merge(other.target);
    }
};

// x · weight, and 0 where the weight is 0, also for an infinite x: an advantage of 0 asks for nothing.
template <class A>
EFE_INLINE A times(A x, A weight) {
    const A product = x * weight, nothing = x == x ? A(0) : x;
    return weight == 0 ? nothing : product;
}

// exp(x) - 1 - x, by its series where the difference would cancel.
template <class A>
EFE_INLINE A excess(const math::Exponential<A>& exponential, A x) {
    constexpr int kTerms = std::is_same_v<A, float> ? 6 : 12;
    A series = 1;
    EFE_UNROLL
    for (int k = kTerms; k > 2; --k) series = A(1) + x * A(1.0 / k) * series;
    const A found = std::fabs(x) < A(0.1) ? x * x * A(0.5) * series : exponential.minus_one - x;
    return std::isinf(exponential.value) ? exponential.value : found;
}

// value, at most value_clip away from old_value; NaN where one of them is.
template <class A>
EFE_INLINE A limited_value(A value, A old_value, A value_clip) {
    const A step = value - old_value;
    const A inside = step == step ? value : step;
    return step > value_clip ? old_value + value_clip : step < -value_clip ? old_value - value_clip : inside;
}

// As moments_of in common/moments.h, in A: a block is short.
template <class A>
EFE_INLINE Moments block_moments(const A* x, const Block& block) {
    const int64_t members = count_members(block.mask, block.count);
    if (members == 0) return {};
    A values[kBlock];
    const auto sum_of_members = [&]() EFE_SIMD_BODY {
        clear_others(block.mask, block.count, values);
        std::fill(values + block.count, values + kBlock, A(0));
        return sum_of<kBlock>(values);
    };
    const A shift = x[first_member(block.mask, block.count)];
    for (int64_t i = 0; i < kBlock; ++i) values[i] = x[i] == shift ? A(0) : x[i] - shift;
    const A mean = sum_of_members() / static_cast<A>(members);
    for (int64_t i = 0; i < kBlock; ++i) {
        const A deviation = (x[i] == shift ? A(0) : x[i] - shift) - mean;
        values[i] = deviation * deviation;
    }
    return {static_cast<double>(members), static_cast<double>(shift) + mean, sum_of_members()};
}

template <class A>
EFE_INLINE void add_surrogate(const Inputs<A>& p, const Block& block, const A* log_prob, A* loss, Partial& partial) {
    A advantage_buffer[kBlock], old_buffer[kBlock], ratio[kBlock], outside[kBlock], low[kBlock], high[kBlock],
        divergence[kBlock];
    const A* const advantage = block.read(p.advantage, advantage_buffer);
    if (!p.old_log_prob) {
        for (int64_t i = 0; i < kBlock; ++i) loss[i] = times(-log_prob[i], advantage[i]);
        return;
    }
    const A* const old_log_prob = block.read(p.old_log_prob, old_buffer);
    const A floor = p.low, ceiling = p.high, dual_clip = p.dual_clip;
    for (int64_t i = 0; i < kBlock; ++i) {
        const A log_ratio = log_prob[i] - old_log_prob[i];
        const math::Exponential<A> exponential = math::exponential(log_ratio);
        ratio[i] = exponential.value;
        divergence[i] = excess(exponential, log_ratio);
    }
    // What is selected between is computed first, and no condition leaves another one out: else nothing is vectorised.
    for (int64_t i = 0; i < kBlock; ++i) {
        const A gain = advantage[i], at_least = ratio[i] < floor ? floor : ratio[i];
        const A as_loss = at_least > dual_clip ? dual_clip : at_least;
        const A as_gain = ratio[i] > ceiling ? ceiling : ratio[i];
        loss[i] = -times(gain < 0 ? as_loss : as_gain, gain);
    }
    for (int64_t i = 0; i < kBlock; ++i) {
        const A below = ratio[i] < floor ? A(1) : A(0), above = ratio[i] > ceiling ? A(1) : A(0);
        const A is_loss = advantage[i] < 0 ? A(1) : A(0), is_gain = advantage[i] > 0 ? A(1) : A(0);
        outside[i] = below + above;
        low[i] = below * is_loss;
        high[i] = above * is_gain;
    }
    partial.outside += sum_of<kBlock>(outside);
    partial.low += sum_of<kBlock>(low);
    partial.high += sum_of<kBlock>(high);
    partial.divergence += sum_of<kBlock>(divergence);
}

template <class A>
EFE_INLINE void add_block(const Inputs<A>& p, const Block& block, Partial& partial) {
    A log_prob_buffer[kBlock], buffer[kBlock], other_buffer[kBlock], old_buffer[kBlock], weight_buffer[kBlock];
    A part[kBlock], error[kBlock];
    const A* const weight = p.weight ? block.read(p.weight, weight_buffer) : nullptr;
    const auto aggregate = [&](const A* x) EFE_SIMD_BODY {
        if (weight == nullptr) return sum_of<kBlock>(x);
        A weighted[kBlock];
        for (int64_t i = 0; i < kBlock; ++i) weighted[i] = x[i] * weight[i];
        return sum_of<kBlock>(weighted);
    };
    const A* const log_prob = block.read(p.log_prob, log_prob_buffer);
    add_surrogate(p, block, log_prob, part, partial);
    partial.policy += aggregate(part);
    partial.count += count_members(block.mask, block.count);
    if (p.value) {
        const A* const value = block.read(p.value, buffer);
        const A* const target = block.read(p.value_target, other_buffer);
        for (int64_t i = 0; i < kBlock; ++i) error[i] = target[i] - value[i];
        partial.error.merge(block_moments(error, block));
        partial.target.merge(block_moments(target, block));
        for (int64_t i = 0; i < kBlock; ++i) part[i] = error[i] * error[i];
        if (p.old_value) {
            const A* const old_value = block.read(p.old_value, old_buffer);
            for (int64_t i = 0; i < kBlock; ++i) {
                const A limited = target[i] - limited_value(value[i], old_value[i], p.value_clip);
                part[i] = std::fabs(limited) <= std::fabs(error[i]) ? part[i] : limited * limited;
            }
        }
        partial.squared_error += aggregate(part);
    }
    if (p.entropy) partial.entropy += aggregate(block.read(p.entropy, buffer));
    if (p.ref_log_prob) {
        const A* const ref_log_prob = block.read(p.ref_log_prob, buffer);
        for (int64_t i = 0; i < kBlock; ++i) {
            const A log_ratio = ref_log_prob[i] - log_prob[i];
            part[i] = excess(math::exponential(log_ratio), log_ratio);
        }
        partial.kl += aggregate(part);
    }
}

// body(block) for the blocks of a span.
template <class Body>
EFE_INLINE void for_blocks(const uint8_t* mask, int64_t begin, int64_t count, const Body& body) {
    for (int64_t i = begin; i < begin + count; i += kBlock)
        body(Block{i, std::min(kBlock, begin + count - i), mask_from(mask, i)});
}

// What both directions read: tensors that stay alive, and pointers into them.
struct Tensors {
    Tensor entropy, log_prob, advantage, value, value_target, old_log_prob, old_value, ref_log_prob, mask, weight;

    template <class A>
    Column<A> column(const Tensor& tensor) const {
        if (!tensor.defined()) return {};
        return {tensor.data<A>(), std::max<int64_t>(log_prob.numel() / std::max<int64_t>(tensor.numel(), 1), 1)};
    }

    template <class A>
    Inputs<A> inputs(double low, double high, double dual_clip, double value_clip) const {
        const auto at = [&](const Tensor& tensor) { return column<A>(tensor); };
        return {at(entropy), at(log_prob), at(advantage), at(value), at(value_target), at(old_log_prob), at(old_value),
                at(ref_log_prob), at(weight), bytes_of(mask), static_cast<A>(low), static_cast<A>(high),
                static_cast<A>(dual_clip), static_cast<A>(value_clip)};
    }
};

constexpr int64_t kDiagnostics = 6, kCount = 5;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> policy_gradient_loss_forward(
    const OptionalTensor& entropy, const Tensor& log_prob, const Tensor& advantage, const OptionalTensor& value,
    const OptionalTensor& value_target, const OptionalTensor& old_log_prob, const OptionalTensor& old_value,
    const OptionalTensor& ref_log_prob, const OptionalTensor& mask, const OptionalTensor& weight, double low,
    double high, double dual_clip, double value_clip, double value_coef, double entropy_coef, double kl_coef,
    double normalizer) {
    const ScalarType type = arithmetic_type(log_prob);
    const auto as = [&](const auto& tensor) { return contiguous_as(tensor, type); };
    const Tensors tensors{as(entropy), as(log_prob), as(advantage), as(value), as(value_target), as(old_log_prob),
                          as(old_value), as(ref_log_prob), contiguous_as(mask, ScalarType::Bool), as(weight)};
    const Spans spans(log_prob.numel(), 0);
    std::vector<Partial> partials(spans.count());
    for_arithmetic(type, [&](auto zero) {
        const auto inputs = tensors.inputs<decltype(zero)>(low, high, dual_clip, value_clip);
        spans.for_each([&](int64_t span, int64_t begin, int64_t size) EFE_SIMD_BODY {
            for_blocks(inputs.mask, begin, size,
                       [&](const Block& block) EFE_SIMD_BODY { add_block(inputs, block, partials[span]); });
        });
    });
    Partial all;
    for (const Partial& partial : partials) all.merge(partial);
    const double count = static_cast<double>(all.count), some = std::max(count, 1.0);
    const double divisor = normalizer != 0 ? normalizer : some;
    const double policy = all.policy / divisor, value_loss = all.squared_error / divisor;
    const double mean_entropy = all.entropy / divisor, kl = all.kl / divisor;
    const double explained = all.target.squares == 0 ? 0 : 1 - all.error.squares / all.target.squares;
    const auto tensor = [&](std::initializer_list<int64_t> sizes, std::initializer_list<double> numbers) {
        Tensor out = empty(sizes, type, log_prob);
        for_arithmetic(type, [&](auto zero) {
            std::copy(numbers.begin(), numbers.end(), out.mutable_data<decltype(zero)>());
        });
        return out;
    };
    const double total = policy + times(value_loss, value_coef) - times(mean_entropy, entropy_coef) + times(kl, kl_coef);
    return {tensor({}, {total}), tensor({}, {policy}), tensor({}, {value_loss}), tensor({}, {mean_entropy}),
            tensor({}, {kl}),
            tensor({kDiagnostics}, {all.outside / some, all.divergence / some, explained, all.low / some,
                                    all.high / some, count})};
}

template <class A>
struct Gradients {
    A *entropy, *log_prob, *value;  // [N], or null where it is not asked for
};

// What arrives at each element of weight 1: upstream gradients over what the sums are divided by.
template <class A>
struct Upstream {
    A policy, value, entropy, kl;
};

// d/d log_prob of the surrogate, for an upstream gradient of 1 · weight.
template <class A>
EFE_INLINE void differentiate_surrogate(const Inputs<A>& p, const Block& block, const A* log_prob, A* __restrict__ out) {
    A buffer[kBlock], old_buffer[kBlock], ratio[kBlock];
    const A* const advantage = block.read(p.advantage, buffer);
    if (!p.old_log_prob) {
        for (int64_t i = 0; i < kBlock; ++i) out[i] = advantage[i];
        return;
    }
    const A* const old_log_prob = block.read(p.old_log_prob, old_buffer);
    const A floor = p.low, ceiling = p.high, dual_clip = p.dual_clip;
    for (int64_t i = 0; i < kBlock; ++i) ratio[i] = math::exp(log_prob[i] - old_log_prob[i]);
    for (int64_t i = 0; i < kBlock; ++i) {
        const A gain = advantage[i], slope = times(ratio[i], gain);
        const A as_loss = ratio[i] < floor ? A(0) : slope, as_gain = ratio[i] > ceiling ? A(0) : slope;
        const A limited = ratio[i] > dual_clip ? A(0) : as_loss;
        out[i] = gain < 0 ? limited : as_gain;
    }
}

template <class A>
EFE_INLINE void differentiate_block(const Inputs<A>& p, const Upstream<A>& upstream, const Gradients<A>& gradients,
                                    const Block& block) {
    A buffer[kBlock], other_buffer[kBlock], old_buffer[kBlock], weight_buffer[kBlock], slope[kBlock], found[kBlock];
    const A* const weight = p.weight ? block.read(p.weight, weight_buffer) : nullptr;
    const auto scale = [&](A arrives, A* __restrict__ out) EFE_SIMD_BODY {
        if (weight != nullptr)
            for (int64_t i = 0; i < kBlock; ++i) out[i] = times(slope[i], arrives * weight[i]);
        else if (arrives != 0)
            for (int64_t i = 0; i < kBlock; ++i) out[i] = slope[i] * arrives;
        else
            for (int64_t i = 0; i < kBlock; ++i) out[i] = times(slope[i], arrives);
    };
    // gradient [N] at the block = times(slope, what arrives).
    const auto store = [&](A arrives, A* gradient) EFE_SIMD_BODY {
        if (block.is_whole()) return scale(arrives, gradient + block.begin);
        scale(arrives, found);
        std::copy_n(found, block.count, gradient + block.begin);
        clear_others(block.mask, block.count, gradient + block.begin);
    };
    if (gradients.log_prob != nullptr) {
        const A* const log_prob = block.read(p.log_prob, buffer);
        differentiate_surrogate(p, block, log_prob, slope);
        if (p.ref_log_prob) {
            const A* const ref_log_prob = block.read(p.ref_log_prob, other_buffer);
            for (int64_t i = 0; i < kBlock; ++i) found[i] = math::exponential(ref_log_prob[i] - log_prob[i]).minus_one;
            for (int64_t i = 0; i < kBlock; ++i)
                slope[i] = times(slope[i], -upstream.policy) + times(found[i], -upstream.kl);
        }
        store(p.ref_log_prob ? A(1) : -upstream.policy, gradients.log_prob);
    }
    if (gradients.value != nullptr) {
        const A *value = block.read(p.value, buffer), *target = block.read(p.value_target, other_buffer);
        for (int64_t i = 0; i < kBlock; ++i) slope[i] = A(2) * (value[i] - target[i]);
        if (p.old_value) {
            const A* const old_value = block.read(p.old_value, old_buffer);
            for (int64_t i = 0; i < kBlock; ++i) {
                const A limited = limited_value(value[i], old_value[i], p.value_clip);
                slope[i] = std::fabs(limited - target[i]) > std::fabs(value[i] - target[i]) ? A(0) : slope[i];
            }
        }
        store(upstream.value, gradients.value);
    }
    if (gradients.entropy != nullptr) {
        std::fill_n(slope, kBlock, A(1));
        store(upstream.entropy, gradients.entropy);
    }
}

std::vector<Tensor> policy_gradient_loss_backward(
    const OptionalTensor& grad_total, const OptionalTensor& grad_policy, const OptionalTensor& grad_value,
    const OptionalTensor& grad_entropy, const OptionalTensor& grad_kl, const std::vector<bool>& needs,
    const Tensor& diagnostics, const Tensor& log_prob, const Tensor& advantage, const OptionalTensor& value,
    const OptionalTensor& value_target, const OptionalTensor& old_log_prob, const OptionalTensor& old_value,
    const OptionalTensor& ref_log_prob, const OptionalTensor& mask, const OptionalTensor& weight, double low,
    double high, double dual_clip, double value_clip, double value_coef, double entropy_coef, double kl_coef,
    double normalizer) {
    const ScalarType type = diagnostics.scalar_type();
    const auto as = [&](const auto& tensor) { return contiguous_as(tensor, type); };
    const Tensors tensors{{}, as(log_prob), as(advantage), as(value), as(value_target), as(old_log_prob),
                          as(old_value), as(ref_log_prob), contiguous_as(mask, ScalarType::Bool), as(weight)};
    const double share = 1 / (normalizer != 0 ? normalizer : std::max(number_in(diagnostics, kCount), 1.0));
    const auto number = [](const OptionalTensor& grad) { return grad.has_value() ? number_in(*grad) : 0.0; };
    const double total = number(grad_total);
    Tensor found[3];
    for (int i = 0; i < 3; ++i)
        if (needs[i]) found[i] = empty(log_prob, type);
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const Inputs<A> inputs = tensors.inputs<A>(low, high, dual_clip, value_clip);
        const Gradients<A> gradients{found[0].mutable_data<A>(), found[1].mutable_data<A>(),
                                     found[2].mutable_data<A>()};
        const Upstream<A> upstream{static_cast<A>((total + number(grad_policy)) * share),
                                   static_cast<A>((total * value_coef + number(grad_value)) * share),
                                   static_cast<A>((number(grad_entropy) - total * entropy_coef) * share),
                                   static_cast<A>((total * kl_coef + number(grad_kl)) * share)};
        Spans(log_prob.numel(), 0).for_each([&](int64_t, int64_t begin, int64_t size) EFE_SIMD_BODY {
            for_blocks(inputs.mask, begin, size, [&](const Block& block) EFE_SIMD_BODY {
                differentiate_block(inputs, upstream, gradients, block);
            });
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
