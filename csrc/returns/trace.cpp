// gae (without log_ratio) and vtrace on the CPU: x_t = delta_t + coefficient_t x_{t+1}. The derivation of the gradients
// stands in efe_kernels/returns/kernels.py. Arithmetic is A: double for double tensors, else float.
#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "common/library.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "returns/walk.h"

namespace efe::returns {
namespace {

template <class A>
struct Limits {
    A rho, c;
};

template <class A>
struct Trace {
    Discounts<A> discounts;
    Limits<A> limits;
    A reward_scale;
    Series terminated, truncated, log_ratio;
    Series reward, value, next_value, advantage, target;
    Series grad_advantage, grad_target, grad_value, grad_next_value, grad_reward;
};

// What a step does with the state after it. The loops below are written for the vectoriser: settings in locals, flags as
// bytes, loads without a condition.
template <class A>
struct Step {
    A rho, coefficient, pull, bootstrap;
};

template <bool VTrace, class A>
EFE_INLINE Step<A> step_of(A gamma, A lam, const Limits<A>& limits, A log_ratio, int flags) {
    const A trace = flags != 0 ? A(0) : gamma * lam;
    const A bootstrap = (flags & kTerminated) != 0 ? A(0) : gamma;
    if constexpr (!VTrace) return {A(1), trace, trace, bootstrap};
    const A ratio = math::exp(log_ratio);
    const A rho = ratio > limits.rho ? limits.rho : ratio;
    const A c = ratio > limits.c ? limits.c : ratio;
    // Not their product where the trace stops: a weight of NaN or infinity must not reach another episode.
    return {rho, trace == 0 ? A(0) : c * trace, trace == 0 ? A(0) : rho * trace, bootstrap};
}

template <bool VTrace, bool PerStep, bool TimeInner, class A>
EFE_INLINE void forward_tile(const Trace<A>& p, const Tile<TimeInner>& tile, A* __restrict__ state) {
    using Shape = Tile<TimeInner>;
    const Limits<A> limits = p.limits;
    const A scale = p.reward_scale;
    const int64_t inner = tile.inner();
    A delta[Shape::kSize], coefficient[Shape::kSize], pull[Shape::kSize], following[Shape::kSize];
    A room[4][Shape::kSize];
    uint8_t flags[Shape::kSize];
    for (int64_t o = 0; o < tile.outer(); ++o) {
        const int64_t at = o * Shape::kInner;
        const A *reward = read_run(p.reward, tile, o, room[0]), *value = read_run(p.value, tile, o, room[1]);
        const A* next_value = read_run(p.next_value, tile, o, room[2]);
        const A* log_ratio = VTrace ? read_run(p.log_ratio, tile, o, room[3]) : value;  // gae does not look at it
        load_flags(p.terminated, p.truncated, tile, o, flags);
        const DiscountRun<PerStep, TimeInner, A> d(p.discounts, tile, o);
        for (int64_t i = 0; i < inner; ++i) {
            const Step<A> step = step_of<VTrace>(d.gamma(i), d.lam(i), limits, log_ratio[i], flags[i]);
            delta[at + i] = step.rho * (advance(step.bootstrap, reward[i] * scale, next_value[i]) - value[i]);
            coefficient[at + i] = step.coefficient;
            if constexpr (VTrace) pull[at + i] = step.pull;
        }
    }
    walk<false>(tile, state, [&](int64_t i, A after) EFE_SIMD_BODY {
        if constexpr (VTrace) following[i] = after;
        return coefficient[i] = advance(coefficient[i], delta[i], after);
    });
    for (int64_t o = 0; o < tile.outer(); ++o) {
        const int64_t at = o * Shape::kInner;
        const A* __restrict__ value = read_run(p.value, tile, o, room[0]);
        A* const __restrict__ advantage = run_to_write(p.advantage, tile, o, room[1]);
        A* const __restrict__ target = run_to_write(p.target, tile, o, room[2]);
        for (int64_t i = 0; i < inner; ++i) {
            const A x = coefficient[at + i];
            advantage[i] = VTrace ? advance(pull[at + i], delta[at + i], following[at + i]) : x;
            target[i] = x + value[i];
        }
        store_run(p.advantage, tile, o, advantage);
        store_run(p.target, tile, o, target);
    }
}

// state is what the step before hands on: k_{t-1} s_{t-1}, in vtrace with rho_{t-1} d_{t-1} A_{t-1}.
template <bool VTrace, bool PerStep, bool TimeInner, class A>
EFE_INLINE void backward_tile(const Trace<A>& p, const Tile<TimeInner>& tile, A* __restrict__ state) {
    using Shape = Tile<TimeInner>;
    const Limits<A> limits = p.limits;
    const A scale = p.reward_scale;
    const int64_t inner = tile.inner();
    A arrival[Shape::kSize], coefficient[Shape::kSize], handed[Shape::kSize], rho[Shape::kSize];
    A bootstrap[Shape::kSize], advantage[Shape::kSize], target[Shape::kSize], room[Shape::kSize];
    uint8_t flags[Shape::kSize];
    for (int64_t o = 0; o < tile.outer(); ++o) {
        const int64_t at = o * Shape::kInner;
        std::copy_n(read_run(p.grad_advantage, tile, o, room), inner, advantage + at);
        std::copy_n(read_run(p.grad_target, tile, o, room), inner, target + at);
        const A* log_ratio = VTrace ? read_run(p.log_ratio, tile, o, room) : target + at;  // gae does not look at it
        load_flags(p.terminated, p.truncated, tile, o, flags);
        const DiscountRun<PerStep, TimeInner, A> d(p.discounts, tile, o);
        for (int64_t i = 0; i < inner; ++i) {
            const Step<A> step = step_of<VTrace>(d.gamma(i), d.lam(i), limits, log_ratio[i], flags[i]);
            coefficient[at + i] = step.coefficient;
            bootstrap[at + i] = step.bootstrap;
            rho[at + i] = step.rho;
            arrival[at + i] = VTrace ? target[at + i] : target[at + i] + advantage[at + i];
            handed[at + i] = VTrace ? advance(step.pull, A(0), advantage[at + i]) : A(0);
        }
    }
    walk<true>(tile, state, [&](int64_t i, A handed_on) EFE_SIMD_BODY {
        arrival[i] += handed_on;
        return advance(coefficient[i], handed[i], arrival[i]);
    });
    for (int64_t o = 0; o < tile.outer(); ++o) {
        const int64_t at = o * Shape::kInner;
        A* const __restrict__ grad_error = arrival + at;
        if constexpr (VTrace)
            for (int64_t i = 0; i < inner; ++i) grad_error[i] = rho[at + i] * (grad_error[i] + advantage[at + i]);
        if (p.grad_value.data != nullptr) {
            A* const __restrict__ out = run_to_write(p.grad_value, tile, o, room);
            for (int64_t i = 0; i < inner; ++i) out[i] = target[at + i] - grad_error[i];
            store_run(p.grad_value, tile, o, out);
        }
        if (p.grad_next_value.data != nullptr) {
            A* const __restrict__ out = run_to_write(p.grad_next_value, tile, o, room);
            for (int64_t i = 0; i < inner; ++i) out[i] = advance(bootstrap[at + i], A(0), grad_error[i]);
            store_run(p.grad_next_value, tile, o, out);
        }
        if (p.grad_reward.data != nullptr) {
            A* const __restrict__ out = run_to_write(p.grad_reward, tile, o, room);
            for (int64_t i = 0; i < inner; ++i) out[i] = scale * grad_error[i];
            store_run(p.grad_reward, tile, o, out);
        }
    }
}

template <bool Backward, bool VTrace, bool PerStep, class A>
void run_trace(const Trace<A>& p, const ResultLayout& layout) {
    for_tiles<Backward, A>(layout, [&](const auto& tile, A* state) EFE_SIMD_BODY {
        if constexpr (Backward)
            backward_tile<VTrace, PerStep>(p, tile, state);
        else
            forward_tile<VTrace, PerStep>(p, tile, state);
    });
}

template <bool Backward, bool VTrace, class A>
void run_trace(const Trace<A>& p, const ResultLayout& layout) {
    p.discounts.per_step() ? run_trace<Backward, VTrace, true>(p, layout)
                           : run_trace<Backward, VTrace, false>(p, layout);
}

template <bool Backward, class A>
void run_trace(const Trace<A>& p, const ResultLayout& layout) {
    p.log_ratio.data != nullptr ? run_trace<Backward, true>(p, layout) : run_trace<Backward, false>(p, layout);
}

// What both passes take.
struct Transitions {
    const Tensor& terminated;
    const OptionalTensor &truncated, &log_ratio, &gammas, &lams;
    double gamma, lam, rho_clip, c_clip, reward_scale;

    template <class A>
    Trace<A> trace(const ResultLayout& layout) const {
        Trace<A> p{};
        p.discounts = layout.discounts<A>(gamma, lam, gammas, lams);
        p.limits = {static_cast<A>(rho_clip), static_cast<A>(c_clip)};
        p.reward_scale = static_cast<A>(reward_scale);
        p.terminated = layout.series(terminated);
        p.truncated = layout.series(truncated);
        p.log_ratio = layout.series(log_ratio);
        return p;
    }
};

std::tuple<Tensor, Tensor> trace_forward(
    const Tensor& value, const Tensor& next_value, const Tensor& reward, const Tensor& terminated,
    const OptionalTensor& truncated, const OptionalTensor& log_ratio, const OptionalTensor& gammas,
    const OptionalTensor& lams, double gamma, double lam, double rho_clip, double c_clip, double reward_scale) {
    const Transitions transitions{terminated, truncated, log_ratio, gammas, lams,
                                  gamma,      lam,       rho_clip,  c_clip, reward_scale};
    Tensor advantage = empty_like(reward, reward.scalar_type());
    Tensor target = empty_like(reward, reward.scalar_type());
    const ResultLayout layout(advantage);
    for_arithmetic(layout.type, [&](auto zero) {
        using A = decltype(zero);
        Trace<A> p = transitions.trace<A>(layout);
        p.reward = layout.series(reward);
        p.value = layout.series(value);
        p.next_value = layout.series(next_value);
        p.advantage = layout.series(advantage);
        p.target = layout.series(target);
        run_trace<false>(p, layout);
    });
    return {std::move(advantage), std::move(target)};
}

std::vector<Tensor> trace_backward(
    const OptionalTensor& grad_advantage, const OptionalTensor& grad_target, const std::vector<bool>& needs,
    const Tensor& terminated, const OptionalTensor& truncated, const OptionalTensor& log_ratio,
    const OptionalTensor& gammas, const OptionalTensor& lams, double gamma, double lam, double rho_clip, double c_clip,
    double reward_scale) {
    const Transitions transitions{terminated, truncated, log_ratio, gammas, lams,
                                  gamma,      lam,       rho_clip,  c_clip, reward_scale};
    const Tensor& given = grad_advantage.has_value() ? *grad_advantage : *grad_target;
    std::vector<Tensor> wanted = empties_where(needs, terminated, given.scalar_type());
    if (wanted.empty()) return wanted;
    const ResultLayout layout(wanted[0]);
    for_arithmetic(layout.type, [&](auto zero) {
        using A = decltype(zero);
        Trace<A> p = transitions.trace<A>(layout);
        p.grad_advantage = layout.series(grad_advantage);
        p.grad_target = layout.series(grad_target);
        layout.series_where(needs, wanted, {&p.grad_value, &p.grad_next_value, &p.grad_reward});
        run_trace<true>(p, layout);
    });
    return wanted;
}

STABLE_TORCH_LIBRARY_IMPL(efe, CPU, library) {
    implement<trace_forward>(library, "trace_forward");
    implement<trace_backward>(library, "trace_backward");
}

}  // namespace
}  // namespace efe::returns
