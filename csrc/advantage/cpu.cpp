// Advantages and the policy-gradient loss on the CPU. The derivations of the gradients stand in the kernels.py of
// efe_kernels/advantage/. Arithmetic is A: double for double tensors, else float, to which half-precision tensors are
// converted on the way in and from which they are rounded on the way out. Sums over many elements are in double, in a
// fixed order: the same bits with any number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/result_type.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/math.h"
#include "common/simd.h"

namespace efe::advantage {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kGrain = 16384;  // elements for which a further thread pays
constexpr int64_t kChunk = 4096;   // elements whose sums are one partial result
constexpr int kLanes = 8;          // doubles that one sum is spread over

at::ScalarType arithmetic_type(const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class Body>
void for_arithmetic(at::ScalarType type, const Body& body) {
    type == at::kDouble ? body(double{}) : body(float{});
}

// body(begin, end) over ranges of [0, count), each item being `cost` elements of work.
template <class Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
    at::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost)), [&](int64_t begin, int64_t end) {
        vectorized([&]() EFE_SIMD_BODY { body(begin, end); });
    });
}

template <class T>
const T* data_of(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// Sum of term(i) over [0, count) in interleaved lanes, which vectorises without reordering a sum.
template <class Term>
EFE_INLINE double sum(int64_t count, const Term& term) {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
    for (int lane = 0; i + lane < count; ++lane) lanes[lane] += term(i + lane);
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    return total;
}

// A mask [N] as bytes, null where every element counts.
EFE_INLINE const uint8_t* at_offset(const uint8_t* mask, int64_t begin) {
    return mask == nullptr ? nullptr : mask + begin;
}

const uint8_t* bytes_of(const at::Tensor& mask) { return reinterpret_cast<const uint8_t*>(data_of<bool>(mask)); }

// x = 0 where it does not count.
template <class A>
EFE_INLINE void clear_others(const uint8_t* mask, int64_t count, A* x) {
    if (mask == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
        const A kept = x[i];
        x[i] = mask[i] != 0 ? kept : A(0);
    }
}

EFE_INLINE int64_t count_members(const uint8_t* mask, int64_t count) {
    if (mask == nullptr) return count;
    int64_t members = 0;
    for (int64_t i = 0; i < count; ++i) members += mask[i];
    return members;
}

EFE_INLINE int64_t first_member(const uint8_t* mask, int64_t count) {
    int64_t i = 0;
    while (mask != nullptr && i + 1 < count && mask[i] == 0) ++i;
    return i;
}

// Count, mean and sum of squared deviations, which merge (Chan et al. 1979): exactly 0 deviation where all are equal.
struct Moments {
    double count = 0, mean = 0, squares = 0;

    void merge(const Moments& other) {
        if (other.count == 0) return;
        const double total = count + other.count, difference = other.mean - mean;
        mean = count == 0 ? other.mean : mean + difference * other.count / total;
        squares += other.squares + difference * difference * count * other.count / total;
        count = total;
    }
};

// Sum of term(x_i) over the members of x[0..count).
template <class A, class Term>
EFE_INLINE double sum_members(const A* x, const uint8_t* mask, int64_t count, const Term& term) {
    if (mask == nullptr) return sum(count, [&](int64_t i) EFE_SIMD_BODY { return term(x[i]); });
    return sum(count, [&](int64_t i) EFE_SIMD_BODY {
        const double value = term(x[i]);
        return mask[i] != 0 ? value : 0.0;
    });
}

// Summed relative to one of the members.
template <class A>
EFE_INLINE Moments moments_of(const A* x, const uint8_t* mask, int64_t count) {
    const int64_t members = count_members(mask, count);
    if (members == 0) return {};
    const double shift = x[first_member(mask, count)];
    const double mean = sum_members(x, mask, count, [&](A value) EFE_SIMD_BODY { return value - shift; }) / members;
    const double squares = sum_members(x, mask, count, [&](A value) EFE_SIMD_BODY {
        const double deviation = value - shift - mean;
        return deviation * deviation;
    });
    return {static_cast<double>(members), shift + mean, squares};
}

// ---- gae and vtrace: x_t = delta_t + coefficient_t x_{t+1}

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
    const OptionalTensor& log_ratio, const at::Tensor& reward, const at::Tensor& value, const at::Tensor& next_value,
    const at::Tensor& terminated, const OptionalTensor& truncated, const Discounts<double>& settings) {
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
    const OptionalTensor& grad_advantage, const OptionalTensor& grad_target, const OptionalTensor& log_ratio,
    const at::Tensor& terminated, const OptionalTensor& truncated, const Discounts<double>& settings,
    const c10::List<bool>& needs) {
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

std::tuple<at::Tensor, at::Tensor> gae_forward(
    const at::Tensor& reward, const at::Tensor& value, const at::Tensor& next_value, const at::Tensor& terminated,
    const OptionalTensor& truncated, double gamma, double lam, double reward_scale) {
    return trace_forward(std::nullopt, reward, value, next_value, terminated, truncated, {gamma, lam, 1, 1, reward_scale});
}

std::vector<at::Tensor> gae_backward(
    const OptionalTensor& grad_advantage, const OptionalTensor& grad_target, const at::Tensor& terminated,
    const OptionalTensor& truncated, double gamma, double lam, const c10::List<bool>& needs) {
    return trace_backward(grad_advantage, grad_target, std::nullopt, terminated, truncated, {gamma, lam, 1, 1, 1}, needs);
}

std::tuple<at::Tensor, at::Tensor> vtrace_forward(
    const at::Tensor& log_ratio, const at::Tensor& reward, const at::Tensor& value, const at::Tensor& next_value,
    const at::Tensor& terminated, const OptionalTensor& truncated, double gamma, double rho_clip, double c_clip,
    double reward_scale) {
    const Discounts<double> settings{gamma, 1, rho_clip, c_clip, reward_scale};
    return trace_forward(log_ratio, reward, value, next_value, terminated, truncated, settings);
}

std::vector<at::Tensor> vtrace_backward(
    const OptionalTensor& grad_advantage, const OptionalTensor& grad_target, const at::Tensor& log_ratio,
    const at::Tensor& terminated, const OptionalTensor& truncated, double gamma, double rho_clip, double c_clip,
    const c10::List<bool>& needs) {
    const Discounts<double> settings{gamma, 1, rho_clip, c_clip, 1};
    return trace_backward(grad_advantage, grad_target, log_ratio, terminated, truncated, settings, needs);
}

// ---- rl_advantage

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

// The elements in runs: groups where there are groups, else chunks.
struct Runs {
    int64_t numel, size;

    Runs(int64_t numel, int64_t group_size) : numel(numel), size(group_size > 0 ? group_size : kChunk) {}
    int64_t count() const { return (numel + size - 1) / size; }
    int64_t length(int64_t run) const { return std::min(size, numel - run * size); }
};

std::tuple<at::Tensor, at::Tensor> rl_advantage_forward(
    const at::Tensor& reward, const at::Tensor& value, const OptionalTensor& mask, double reward_scale,
    std::optional<c10::string_view> normalize, int64_t group_size) {
    const at::ScalarType type = arithmetic_type(reward) == at::kDouble ? at::kDouble : arithmetic_type(value);
    const Runs runs(reward.numel(), group_size);
    const at::Tensor out = at::empty({reward.numel()}, reward.options().dtype(type));
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
    return {out.to(at::result_type(reward, value)), statistics};
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
    const at::Tensor out = at::empty({reward.numel()}, reward.options().dtype(type));
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

// ---- policy_gradient_loss

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
        for (int64_t i = 0; i < count; ++i) loss[i] = -log_prob[i] * advantage[i];
    } else {
        const A clip = p.clip, low = A(1) - clip, high = A(1) + clip;
        load_log_ratio(p, begin, count, log_ratio);
        for (int64_t i = 0; i < count; ++i) {
            const math::Exponential<A> exponential = math::exponential(log_ratio[i]);
            const A ratio = exponential.value, distance = std::fabs(exponential.minus_one);
            const A limited = ratio > high ? high : ratio < low ? low : ratio;
            const A free_term = ratio * advantage[i], limited_term = limited * advantage[i];
            loss[i] = limited_term < free_term ? -limited_term : -free_term;
            outside[i] = distance > clip ? A(1) : A(0);
            divergence[i] = exponential.minus_one - log_ratio[i];
        }
        partial.outside = total(outside);
        partial.divergence = total(divergence);
    }
    partial.policy = total(loss);
    partial.entropy = total(p.entropy + begin);
    partial.error = moments_of(error, mask, count);
    partial.target = moments_of(target, mask, count);
    partial.squared_error = partial.error.squares + partial.error.count * partial.error.mean * partial.error.mean;
    return partial;
}

// A tensor [N] in the arithmetic's type; undefined where there is none.
at::Tensor flat(const OptionalTensor& tensor, at::ScalarType type) {
    return tensor.has_value() ? tensor->to(type).contiguous() : at::Tensor();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> policy_gradient_loss_forward(
    const at::Tensor& log_prob, const at::Tensor& value, const at::Tensor& entropy, const at::Tensor& advantage,
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
    const auto scalar = [&](double x) { return at::full({}, x, log_prob.options().dtype(type)); };
    const at::Tensor diagnostics = at::empty({4}, log_prob.options().dtype(type));
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const double found[4] = {all.outside / some, all.divergence / some, explained, count};
        std::transform(found, found + 4, diagnostics.mutable_data_ptr<A>(), [](double x) { return static_cast<A>(x); });
    });
    return {scalar(policy + value_coef * value_loss - entropy_coef * mean_entropy), scalar(policy), scalar(value_loss),
            scalar(mean_entropy), diagnostics};
}

template <class A>
struct PolicyGradients {
    A *log_prob, *value, *entropy;
};

template <class A>
EFE_INLINE void differentiate(const Policy<A>& p, const PolicyGradients<A>& gradients, int64_t begin, int64_t count,
                              A policy, A value, A entropy) {
    const uint8_t* mask = at_offset(p.mask, begin);
    if (gradients.log_prob != nullptr) {
        A* const __restrict__ out = gradients.log_prob + begin;
        const A* advantage = p.advantage + begin;
        for (int64_t i = 0; i < count; ++i) out[i] = -policy * advantage[i];
        if (p.old_log_prob != nullptr) {
            A log_ratio[kChunk];
            load_log_ratio(p, begin, count, log_ratio);
            const A low = A(1) - p.clip, high = A(1) + p.clip;
            for (int64_t i = 0; i < count; ++i) {
                const A ratio = math::exp(log_ratio[i]), slope = out[i] * ratio;
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
        for (int64_t i = 0; i < count; ++i) out[i] = A(2) * value * (found[i] - target[i]);
        clear_others(mask, count, out);
    }
    if (gradients.entropy != nullptr) {
        std::fill_n(gradients.entropy + begin, count, entropy);
        clear_others(mask, count, gradients.entropy + begin);
    }
}

std::vector<at::Tensor> policy_gradient_loss_backward(
    const OptionalTensor& grad_total, const OptionalTensor& grad_policy, const OptionalTensor& grad_value,
    const OptionalTensor& grad_entropy, const at::Tensor& log_prob, const at::Tensor& value, const at::Tensor& advantage,
    const at::Tensor& value_target, const OptionalTensor& old_log_prob, const OptionalTensor& mask,
    const at::Tensor& diagnostics, double clip, double value_coef, double entropy_coef, const c10::List<bool>& needs) {
    const at::ScalarType type = diagnostics.scalar_type();
    const at::Tensor l = flat(log_prob, type), v = flat(value, type), a = flat(advantage, type);
    const at::Tensor t = flat(value_target, type), old = flat(old_log_prob, type), m = flat(mask, at::kBool);
    const Runs runs(l.numel(), 0);
    const double share = 1 / std::max(diagnostics[3].item<double>(), 1.0);
    const auto number = [](const OptionalTensor& grad) { return grad.has_value() ? grad->item<double>() : 0.0; };
    const double total = number(grad_total);
    at::Tensor found[3];
    for (int i = 0; i < 3; ++i)
        if (needs.get(i)) found[i] = at::empty({l.numel()}, l.options());
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
    library.impl("gae_forward", gae_forward);
    library.impl("gae_backward", gae_backward);
    library.impl("vtrace_forward", vtrace_forward);
    library.impl("vtrace_backward", vtrace_backward);
    library.impl("rl_advantage_forward", rl_advantage_forward);
    library.impl("rl_advantage_backward", rl_advantage_backward);
    library.impl("policy_gradient_loss_forward", policy_gradient_loss_forward);
    library.impl("policy_gradient_loss_backward", policy_gradient_loss_backward);
}

}  // namespace
}  // namespace efe::advantage
