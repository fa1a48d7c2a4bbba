// gae (log_ratio is none) and vtrace on the CPU: x_t = delta_t + coefficient_t x_{t+1}. The derivation of the gradients stands in
// efe_kernels/advantage/trace/kernels.py. Arithmetic is A: double for double tensors, else float, to which half-precision
// tensors are converted on the way in and from which they are rounded on the way out.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "advantage/parallel.h"
#include "common/math.h"

namespace efe::advantage {
namespace {

template <class A>
struct Discounts {
    A gamma, lam, rho_clip, c_clip, reward_scale;
};

template <class A>
struct Trace {
    int64_t rows, steps;
    Discounts<A> discounts;
    const uint8_t *terminated, *truncated;
    const A *log_ratio, *reward, *value, *next_value;
    A *advantage, *target;
    const A *grad_advantage, *grad_target;
    A *grad_value, *grad_next_value;
};

// Tiles are 16 x 64, the longer side along the dimension that is contiguous in memory: time where TimeInner, else rows.
// Rows of at most 64 steps, which then lie one behind the other, make one run.
template <bool TimeInner>
struct Tile {
    static constexpr int kInner = 64, kOuter = 16;
    static constexpr int kSize = kInner * kOuter;
    static constexpr int kTime = TimeInner ? kInner : kOuter;
    static constexpr int kMaxRows = kInner;

    int64_t first_row = 0, first_step = 0;
    int rows = 0, steps = 0;
    bool one_run = false;

    static int64_t block_rows(int64_t steps) {
        if (!TimeInner) return kInner;
        return steps > kInner ? kOuter : std::min<int64_t>(kMaxRows, kSize / steps);
    }

    EFE_INLINE int outer() const { return one_run ? 1 : TimeInner ? rows : steps; }
    EFE_INLINE int inner() const { return one_run ? rows * steps : TimeInner ? steps : rows; }
    EFE_INLINE int index(int row, int step) const {
        return TimeInner ? row * (one_run ? steps : kInner) + step : step * kInner + row;
    }

    // Where the contiguous run of outer index o begins in a tensor [N, T].
    template <class P>
    EFE_INLINE int64_t run(const P& p, int o) const {
        return TimeInner ? (first_row + o) * p.steps + first_step : (first_step + o) * p.rows + first_row;
    }
};

// What a step does with the state after it. The loops below are written for the vectoriser: settings in locals, flags as
// bytes, loads without a condition.
template <class A>
struct Step {
    A rho, coefficient, pull, bootstrap;
};

template <bool VTrace, class A>
EFE_INLINE Step<A> step_of(const Discounts<A>& d, A log_ratio, int flags) {
    const A trace = flags != 0 ? A(0) : d.gamma;
    const A bootstrap = (flags & 1) != 0 ? A(0) : d.gamma;
    if constexpr (!VTrace) return {A(1), d.lam * trace, trace, bootstrap};
    const A ratio = math::exp(log_ratio);
    const A rho = ratio > d.rho_clip ? d.rho_clip : ratio;
    const A c = ratio > d.c_clip ? d.c_clip : ratio;
    return {rho, c * trace, rho * trace, bootstrap};
}

// term + factor · x, where a factor of 0 lets nothing through: no NaN of another episode either.
template <class A>
EFE_INLINE A advance(A factor, A term, A x) {
    const A through = factor * x;
    return term + (factor == 0 ? A(0) : through);
}

// A run of a tensor; zeros where there is none.
template <class A>
EFE_INLINE void load_run(const A* data, int64_t run, int count, A* out) {
    if (data == nullptr)
        std::fill_n(out, count, A(0));
    else
        std::copy_n(data + run, count, out);
}

// Bit 0: terminated, bit 1: truncated.
template <class A>
EFE_INLINE void load_flags(const Trace<A>& p, int64_t run, int count, uint8_t* __restrict__ out) {
    const uint8_t* terminated = p.terminated + run;
    for (int i = 0; i < count; ++i) out[i] = terminated[i];
    if (p.truncated == nullptr) return;
    const uint8_t* truncated = p.truncated + run;
    for (int i = 0; i < count; ++i) out[i] |= static_cast<uint8_t>(truncated[i] << 1);
}

template <bool TimeInner, bool VTrace, class A>
EFE_INLINE void forward_tile(const Trace<A>& p, const Tile<TimeInner>& tile, A* __restrict__ state) {
    using Shape = Tile<TimeInner>;
    const Discounts<A> d = p.discounts;
    const int inner = tile.inner();
    A delta[Shape::kSize], coefficient[Shape::kSize], pull[Shape::kSize], following[Shape::kSize];
    uint8_t flags[Shape::kSize];
    for (int o = 0; o < tile.outer(); ++o) {
        const int64_t run = tile.run(p, o);
        const int at = o * Shape::kInner;
        const A *reward = p.reward + run, *value = p.value + run, *next_value = p.next_value + run;
        const A* log_ratio = VTrace ? p.log_ratio + run : value;  // gae does not look at it
        load_flags(p, run, inner, flags);
        for (int i = 0; i < inner; ++i) {
            const Step<A> step = step_of<VTrace>(d, log_ratio[i], flags[i]);
            delta[at + i] = step.rho * (advance(step.bootstrap, reward[i] * d.reward_scale, next_value[i]) - value[i]);
            coefficient[at + i] = step.coefficient;
            if constexpr (VTrace) pull[at + i] = step.pull;
        }
    }
    for (int step = tile.steps - 1; step >= 0; --step) {
        for (int row = 0; row < tile.rows; ++row) {
            const int i = tile.index(row, step);
            const A x = advance(coefficient[i], delta[i], state[row]);
            if constexpr (VTrace) following[i] = state[row];
            coefficient[i] = x;
            state[row] = x;
        }
    }
    for (int o = 0; o < tile.outer(); ++o) {
        const int64_t run = tile.run(p, o);
        const int at = o * Shape::kInner;
        const A* __restrict__ value = p.value + run;
        A *__restrict__ advantage = p.advantage + run, *__restrict__ target = p.target + run;
        for (int i = 0; i < inner; ++i) {
            const A x = coefficient[at + i];
            advantage[i] = VTrace ? advance(pull[at + i], delta[at + i], following[at + i]) : x;
            target[i] = x + value[i];
        }
    }
}

// state is what the step before hands on: k_{t-1} s_{t-1}, in vtrace with rho_{t-1} d_{t-1} A_{t-1}.
template <bool TimeInner, bool VTrace, class A>
EFE_INLINE void backward_tile(const Trace<A>& p, const Tile<TimeInner>& tile, A* __restrict__ state) {
    using Shape = Tile<TimeInner>;
    const Discounts<A> d = p.discounts;
    const int inner = tile.inner();
    A arrival[Shape::kSize], coefficient[Shape::kSize], handed[Shape::kSize], rho[Shape::kSize];
    A bootstrap[Shape::kSize], advantage[Shape::kSize], target[Shape::kSize];
    uint8_t flags[Shape::kSize];
    for (int o = 0; o < tile.outer(); ++o) {
        const int64_t run = tile.run(p, o);
        const int at = o * Shape::kInner;
        load_run(p.grad_advantage, run, inner, advantage + at);
        load_run(p.grad_target, run, inner, target + at);
        const A* log_ratio = VTrace ? p.log_ratio + run : target + at;  // gae does not look at it
        load_flags(p, run, inner, flags);
        for (int i = 0; i < inner; ++i) {
            const Step<A> step = step_of<VTrace>(d, log_ratio[i], flags[i]);
            coefficient[at + i] = step.coefficient;
            bootstrap[at + i] = step.bootstrap;
            rho[at + i] = step.rho;
            arrival[at + i] = VTrace ? target[at + i] : target[at + i] + advantage[at + i];
            handed[at + i] = VTrace ? advance(step.pull, A(0), advantage[at + i]) : A(0);
        }
    }
    for (int step = 0; step < tile.steps; ++step) {
        for (int row = 0; row < tile.rows; ++row) {
            const int i = tile.index(row, step);
            const A s = arrival[i] + state[row];
            arrival[i] = s;
            state[row] = advance(coefficient[i], handed[i], s);
        }
    }
    for (int o = 0; o < tile.outer(); ++o) {
        const int64_t run = tile.run(p, o);
        const int at = o * Shape::kInner;
        A* const __restrict__ grad_error = arrival + at;
        if constexpr (VTrace)
            for (int i = 0; i < inner; ++i) grad_error[i] = rho[at + i] * (grad_error[i] + advantage[at + i]);
        if (p.grad_value != nullptr) {
            A* const __restrict__ out = p.grad_value + run;
            for (int i = 0; i < inner; ++i) out[i] = target[at + i] - grad_error[i];
        }
        if (p.grad_next_value != nullptr) {
            A* const __restrict__ out = p.grad_next_value + run;
            for (int i = 0; i < inner; ++i) out[i] = advance(bootstrap[at + i], A(0), grad_error[i]);
        }
    }
}

template <bool TimeInner, bool VTrace, bool Backward, class A>
void run_trace(const Trace<A>& p) {
    using Shape = Tile<TimeInner>;
    if (p.rows == 0 || p.steps == 0) return;
    const int64_t rows = Shape::block_rows(p.steps), blocks = (p.rows + rows - 1) / rows;
    const int64_t chunks = (p.steps + Shape::kTime - 1) / Shape::kTime;
    parallel(blocks, rows * p.steps, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t block = first; block < last; ++block) {
            A state[Shape::kMaxRows] = {};
            Shape tile;
            tile.first_row = block * rows;
            tile.rows = static_cast<int>(std::min(rows, p.rows - tile.first_row));
            tile.one_run = TimeInner && chunks == 1;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                tile.first_step = (Backward ? chunk : chunks - 1 - chunk) * Shape::kTime;
                tile.steps = static_cast<int>(std::min<int64_t>(Shape::kTime, p.steps - tile.first_step));
                if constexpr (Backward)
                    backward_tile<TimeInner, VTrace>(p, tile, state);
                else
                    forward_tile<TimeInner, VTrace>(p, tile, state);
            }
        }
    });
}

template <bool Backward, class A>
void run_trace(const Trace<A>& p, bool time_inner) {
    const bool vtrace = p.log_ratio != nullptr;
    if (time_inner)
        vtrace ? run_trace<true, true, Backward>(p) : run_trace<true, false, Backward>(p);
    else
        vtrace ? run_trace<false, true, Backward>(p) : run_trace<false, false, Backward>(p);
}

// tensor with the strides of `like` and the given type; undefined where there is none.
at::Tensor aligned(const OptionalTensor& tensor, const at::Tensor& like, at::ScalarType type) {
    if (!tensor.has_value()) return {};
    if (tensor->scalar_type() == type && tensor->strides() == like.strides()) return *tensor;
    return at::empty_like(like, like.options().dtype(type)).copy_(*tensor);
}

template <class A>
Trace<A> trace_of(const at::Tensor& like, const at::Tensor& terminated, const at::Tensor& truncated,
                  const at::Tensor& log_ratio, const Discounts<double>& settings) {
    Trace<A> p{};
    p.rows = like.size(0);
    p.steps = like.size(1);
    p.terminated = reinterpret_cast<const uint8_t*>(data_of<bool>(terminated));
    p.truncated = reinterpret_cast<const uint8_t*>(data_of<bool>(truncated));
    p.log_ratio = data_of<A>(log_ratio);
    p.discounts = {static_cast<A>(settings.gamma), static_cast<A>(settings.lam), static_cast<A>(settings.rho_clip),
                   static_cast<A>(settings.c_clip), static_cast<A>(settings.reward_scale)};
    return p;
}

// Whether time is the contiguous dimension of a dense tensor [N, T].
bool time_inner(const at::Tensor& dense) { return dense.stride(1) == 1; }

std::tuple<at::Tensor, at::Tensor> trace_forward(
    const at::Tensor& value, const at::Tensor& next_value, const at::Tensor& reward, const at::Tensor& terminated,
    const OptionalTensor& truncated, const OptionalTensor& log_ratio, double gamma, double lam, double rho_clip,
    double c_clip, double reward_scale) {
    const Discounts<double> settings{gamma, lam, rho_clip, c_clip, reward_scale};
    const at::ScalarType type = arithmetic_type(reward);
    const at::Tensor advantage = at::empty_like(reward, reward.options().dtype(type));
    const at::Tensor target = at::empty_like(advantage);
    const at::Tensor r = aligned(reward, advantage, type), v = aligned(value, advantage, type);
    const at::Tensor n = aligned(next_value, advantage, type), l = aligned(log_ratio, advantage, type);
    const at::Tensor end = aligned(terminated, advantage, at::kBool), cut = aligned(truncated, advantage, at::kBool);
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        Trace<A> p = trace_of<A>(advantage, end, cut, l, settings);
        p.reward = data_of<A>(r);
        p.value = data_of<A>(v);
        p.next_value = data_of<A>(n);
        p.advantage = advantage.mutable_data_ptr<A>();
        p.target = target.mutable_data_ptr<A>();
        run_trace<false>(p, time_inner(advantage));
    });
    return {advantage.to(reward.scalar_type()), target.to(reward.scalar_type())};
}

std::vector<at::Tensor> trace_backward(
    const OptionalTensor& grad_advantage, const OptionalTensor& grad_target, const c10::List<bool>& needs,
    const at::Tensor& terminated, const OptionalTensor& truncated, const OptionalTensor& log_ratio, double gamma,
    double lam, double rho_clip, double c_clip, double reward_scale) {
    const Discounts<double> settings{gamma, lam, rho_clip, c_clip, reward_scale};
    const at::Tensor& given = grad_advantage.has_value() ? *grad_advantage : *grad_target;
    const at::ScalarType type = arithmetic_type(given);
    const at::Tensor like = at::empty_like(terminated, terminated.options().dtype(type));
    const at::Tensor grad_value = needs.get(0) ? like : at::Tensor();
    const at::Tensor grad_next_value = needs.get(1) ? at::empty_like(like) : at::Tensor();
    const at::Tensor a = aligned(grad_advantage, like, type), t = aligned(grad_target, like, type);
    const at::Tensor l = aligned(log_ratio, like, type);
    const at::Tensor end = aligned(terminated, like, at::kBool), cut = aligned(truncated, like, at::kBool);
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        Trace<A> p = trace_of<A>(like, end, cut, l, settings);
        p.grad_advantage = data_of<A>(a);
        p.grad_target = data_of<A>(t);
        if (grad_value.defined()) p.grad_value = grad_value.mutable_data_ptr<A>();
        if (grad_next_value.defined()) p.grad_next_value = grad_next_value.mutable_data_ptr<A>();
        run_trace<true>(p, time_inner(like));
    });
    std::vector<at::Tensor> wanted;
    for (const at::Tensor& gradient : {grad_value, grad_next_value})
        if (gradient.defined()) wanted.push_back(gradient.to(given.scalar_type()));
    return wanted;
}

TORCH_LIBRARY_IMPL(efe, CPU, library) {
    library.impl("trace_forward", trace_forward);
    library.impl("trace_backward", trace_backward);
}

}  // namespace
}  // namespace efe::advantage
