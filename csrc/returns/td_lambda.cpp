// td_lambda on the CPU: G_t = delta_t + coefficient_t G_{t+1}. The derivation of the gradient stands in
// efe_kernels/returns/td_lambda_kernels.py. Arithmetic is A: double for double tensors, else float.
#include <algorithm>
#include <vector>

#include "common/library.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "returns/walk.h"

namespace efe::returns {
namespace {

template <class A>
struct TDLambda {
    int64_t steps;
    Discounts<A> discounts;
    A reward_scale;
    Series terminated, truncated, reward, next_value, returns;
    Series grad_returns, grad_next_value, grad_reward;
};

// The factors of next_value_t and of G_{t+1}, for the run of outer index o.
template <bool PerStep, bool TimeInner, class A>
EFE_INLINE void load_factors(const TDLambda<A>& p, const Tile<TimeInner>& tile, int64_t o, A* __restrict__ own,
                             A* __restrict__ coefficient) {
    uint8_t flags[Tile<TimeInner>::kSize];
    load_flags(p.terminated, p.truncated, tile, o, flags);
    mark_last(tile, o, p.steps, flags);
    const DiscountRun<PerStep, TimeInner, A> d(p.discounts, tile, o);
    for (int64_t i = 0; i < tile.inner(); ++i) {
        const A gamma = d.gamma(i), lam = d.lam(i);
        own[i] = (flags[i] & kTerminated) != 0 ? A(0) : flags[i] != 0 ? gamma : gamma * (A(1) - lam);
        coefficient[i] = flags[i] != 0 ? A(0) : gamma * lam;
    }
}

template <bool PerStep, bool TimeInner, class A>
EFE_INLINE void forward_tile(const TDLambda<A>& p, const Tile<TimeInner>& tile, A* __restrict__ state) {
    using Shape = Tile<TimeInner>;
    A delta[Shape::kSize], coefficient[Shape::kSize], own[Shape::kSize], room[2][Shape::kSize];
    for (int64_t o = 0; o < tile.outer(); ++o) {
        const int64_t at = o * Shape::kInner;
        const A *reward = read_run(p.reward, tile, o, room[0]), *next_value = read_run(p.next_value, tile, o, room[1]);
        load_factors<PerStep>(p, tile, o, own, coefficient + at);
        const A scale = p.reward_scale;
        for (int64_t i = 0; i < tile.inner(); ++i) delta[at + i] = advance(own[i], reward[i] * scale, next_value[i]);
    }
    walk<false>(tile, state, [&](int64_t i, A after) EFE_SIMD_BODY {
        return delta[i] = advance(coefficient[i], delta[i], after);
    });
    for (int64_t o = 0; o < tile.outer(); ++o) {
        A* const __restrict__ out = run_to_write(p.returns, tile, o, room[0]);
        std::copy_n(delta + o * Shape::kInner, tile.inner(), out);
        store_run(p.returns, tile, o, out);
    }
}

// state is what the step before hands on: k_{t-1} s_{t-1}.
template <bool PerStep, bool TimeInner, class A>
EFE_INLINE void backward_tile(const TDLambda<A>& p, const Tile<TimeInner>& tile, A* __restrict__ state) {
    using Shape = Tile<TimeInner>;
    A arrival[Shape::kSize], coefficient[Shape::kSize], own[Shape::kSize], room[Shape::kSize];
    for (int64_t o = 0; o < tile.outer(); ++o) {
        const int64_t at = o * Shape::kInner;
        std::copy_n(read_run(p.grad_returns, tile, o, room), tile.inner(), arrival + at);
        load_factors<PerStep>(p, tile, o, own + at, coefficient + at);
    }
    walk<true>(tile, state, [&](int64_t i, A handed_on) EFE_SIMD_BODY {
        arrival[i] += handed_on;
        return advance(coefficient[i], A(0), arrival[i]);
    });
    for (int64_t o = 0; o < tile.outer(); ++o) {
        const int64_t at = o * Shape::kInner;
        if (p.grad_next_value.data != nullptr) {
            A* const __restrict__ out = run_to_write(p.grad_next_value, tile, o, room);
            for (int64_t i = 0; i < tile.inner(); ++i) out[i] = advance(own[at + i], A(0), arrival[at + i]);
            store_run(p.grad_next_value, tile, o, out);
        }
        if (p.grad_reward.data != nullptr) {
            A* const __restrict__ out = run_to_write(p.grad_reward, tile, o, room);
            const A scale = p.reward_scale;
            for (int64_t i = 0; i < tile.inner(); ++i) out[i] = scale * arrival[at + i];
            store_run(p.grad_reward, tile, o, out);
        }
    }
}

template <bool Backward, bool PerStep, class A>
void run(const TDLambda<A>& p, const ResultLayout& layout) {
    for_tiles<Backward, A>(layout, [&](const auto& tile, A* state) EFE_SIMD_BODY {
        if constexpr (Backward)
            backward_tile<PerStep>(p, tile, state);
        else
            forward_tile<PerStep>(p, tile, state);
    });
}

template <bool Backward, class A>
void run(const TDLambda<A>& p, const ResultLayout& layout) {
    p.discounts.per_step() ? run<Backward, true>(p, layout) : run<Backward, false>(p, layout);
}

// What both passes take.
struct Ends {
    const Tensor& terminated;
    const OptionalTensor &truncated, &gammas, &lams;
    double gamma, lam, reward_scale;

    template <class A>
    TDLambda<A> problem(const ResultLayout& layout) const {
        TDLambda<A> p{};
        p.steps = layout.steps;
        p.discounts = layout.discounts<A>(gamma, lam, gammas, lams);
        p.reward_scale = static_cast<A>(reward_scale);
        p.terminated = layout.series(terminated);
        p.truncated = layout.series(truncated);
        return p;
    }
};

Tensor td_lambda_forward(const Tensor& next_value, const Tensor& reward, const Tensor& terminated,
                         const OptionalTensor& truncated, const OptionalTensor& gammas, const OptionalTensor& lams,
                         double gamma, double lam, double reward_scale) {
    const Ends ends{terminated, truncated, gammas, lams, gamma, lam, reward_scale};
    Tensor returns = empty_like(reward, reward.scalar_type());
    const ResultLayout layout(returns);
    for_arithmetic(layout.type, [&](auto zero) {
        using A = decltype(zero);
        TDLambda<A> p = ends.problem<A>(layout);
        p.reward = layout.series(reward);
        p.next_value = layout.series(next_value);
        p.returns = layout.series(returns);
        run<false>(p, layout);
    });
    return returns;
}

std::vector<Tensor> td_lambda_backward(
    const Tensor& grad_returns, const std::vector<bool>& needs, const Tensor& terminated,
    const OptionalTensor& truncated, const OptionalTensor& gammas, const OptionalTensor& lams, double gamma, double lam,
    double reward_scale) {
    const Ends ends{terminated, truncated, gammas, lams, gamma, lam, reward_scale};
    std::vector<Tensor> wanted = empties_where(needs, terminated, grad_returns.scalar_type());
    if (wanted.empty()) return wanted;
    const ResultLayout layout(wanted[0]);
    for_arithmetic(layout.type, [&](auto zero) {
        using A = decltype(zero);
        TDLambda<A> p = ends.problem<A>(layout);
        p.grad_returns = layout.series(grad_returns);
        layout.series_where(needs, wanted, {&p.grad_next_value, &p.grad_reward});
        run<true>(p, layout);
    });
    return wanted;
}

STABLE_TORCH_LIBRARY_IMPL(efe, CPU, library) {
    implement<td_lambda_forward>(library, "td_lambda_forward");
    implement<td_lambda_backward>(library, "td_lambda_backward");
}

}  // namespace
}  // namespace efe::returns
