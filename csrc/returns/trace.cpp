// gae (without log_ratio) and vtrace on the CPU: x_t = delta_t + coefficient_t x_{t+1}. The derivation of the gradients
// stands in efe_kernels/returns/kernels.py. Arithmetic is A: double for double tensors, else float. Inputs are
// read as they lie, whatever their strides; half-precision tensors are converted tile by tile.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "common/math.h"

namespace efe::advantage {
namespace {

template <class A>
struct Discounts {
    A gamma, lam, rho_clip, c_clip, reward_scale;
};

// A tensor [N, T] as it lies in memory; no data where there is none.
struct Matrix {
    void* data = nullptr;
    at::ScalarType type = at::kFloat;
    int64_t stride_row = 0, stride_time = 0;
    // The dtype is that of the arithmetic, or bool, and the strides are those of the results, or at least the inner one.
    bool dense = false, runs = false;
};

template <class A>
struct Trace {
    int64_t rows, steps;
    Discounts<A> discounts;
    Matrix terminated, truncated, log_ratio;
    Matrix reward, value, next_value, advantage, target;
    Matrix grad_advantage, grad_target, grad_value, grad_next_value;
};

// Tiles are 16 x 64, the longer side along the dimension that is contiguous in memory: time where TimeInner, else rows.
// Rows of at most 64 steps, which then lie one behind the other, make one run.
// Indices are int64_t: Python compiles with -fwrapv, under which the sum of two ints makes no contiguous access, and loops
// over it gather and scatter.
template <bool TimeInner>
struct Tile {
    static constexpr int64_t kInner = 64, kOuter = 16;
    static constexpr int64_t kSize = kInner * kOuter;
    static constexpr int64_t kTime = TimeInner ? kInner : kOuter;
    static constexpr int64_t kMaxRows = kInner;

    int64_t first_row = 0, first_step = 0;
    int64_t rows = 0, steps = 0;
    bool one_run = false;
    int64_t next_tile = 0;  // where the next tile of the same rows lies, in elements, or 0

    // Rows that are walked together. Long rows, of which there may be few, are shared out to all threads.
    static int64_t block_rows(int64_t rows, int64_t steps) {
        if (!TimeInner) return kInner;
        if (steps <= kInner) return std::min<int64_t>(kMaxRows, kSize / steps);
        const int64_t threads = at::get_num_threads();
        return std::clamp<int64_t>((rows + threads - 1) / threads, 1, kOuter);
    }

    EFE_INLINE int64_t outer() const { return one_run ? 1 : TimeInner ? rows : steps; }
    EFE_INLINE int64_t inner() const { return one_run ? rows * steps : TimeInner ? steps : rows; }
    EFE_INLINE int64_t index(int64_t row, int64_t step) const {
        return TimeInner ? row * (one_run ? steps : kInner) + step : step * kInner + row;
    }

    // Asks for the run of the next tile, of which the hardware cannot know: too many rows are read side by side.
    template <class V>
    EFE_INLINE void prefetch(const V* run) const {
        if (next_tile == 0) return;
        const char* next = reinterpret_cast<const char*>(run + next_tile);
        for (size_t line = 0; line < kInner * sizeof(V); line += 64) __builtin_prefetch(next + line);
    }

    // Where the run of outer index o begins.
    EFE_INLINE int64_t offset(const Matrix& matrix, int64_t o) const {
        const int64_t row = first_row + (TimeInner ? o : 0), step = first_step + (TimeInner ? 0 : o);
        return row * matrix.stride_row + step * matrix.stride_time;
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
    const A through = factor == 0 ? A(0) : x;
    return term + factor * through;
}

// body(typed pointer to the first element).
template <class Body>
void with_pointer(const Matrix& matrix, const Body& body) {
    switch (matrix.type) {
        case at::kDouble:
            return body(static_cast<double*>(matrix.data));
        case at::kHalf:
            return body(static_cast<c10::Half*>(matrix.data));
        case at::kBFloat16:
            return body(static_cast<c10::BFloat16*>(matrix.data));
        case at::kBool:
            return body(static_cast<uint8_t*>(matrix.data));
        default:
            return body(static_cast<float*>(matrix.data));
    }
}

// to[i] = from[i · stride], converted.
template <class From, class To>
void convert(const From* from, int64_t stride, int64_t count, To* __restrict__ to) {
    vectorized([&]() EFE_SIMD_BODY {
        if (stride == 1)
            for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
        else
            for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i * stride]);
    });
}

// The run of outer index o. Not inlined: it is what differs least from caller to caller.
template <class V, bool TimeInner>
void copy_run(const Matrix& matrix, const Tile<TimeInner>& tile, int64_t o, V* out) {
    with_pointer(matrix, [&](const auto* data) {
        const auto* from = data + tile.offset(matrix, o);
        if (!TimeInner) return convert(from, matrix.stride_row, tile.rows, out);
        const int64_t rows = tile.one_run ? tile.rows : 1;
        for (int64_t row = 0; row < rows; ++row)
            convert(from + row * matrix.stride_row, matrix.stride_time, tile.steps, out + row * tile.steps);
    });
}

// The run of outer index o: where it lies, or a copy of it in `room`; zeros where there is no tensor.
template <class V, bool TimeInner>
EFE_INLINE const V* read_run(const Matrix& matrix, const Tile<TimeInner>& tile, int64_t o, V* room) {
    if (matrix.dense || (matrix.runs && !tile.one_run)) {
        const V* run = static_cast<const V*>(matrix.data) + tile.offset(matrix, o);
        tile.prefetch(run);
        return run;
    }
    if (matrix.data == nullptr)
        std::fill_n(room, tile.inner(), V(0));
    else
        copy_run(matrix, tile, o, room);
    return room;
}

// Where to write the run of a result: into its memory, or into `room`, from which store_run converts.
template <bool TimeInner, class A>
EFE_INLINE A* run_to_write(const Matrix& result, const Tile<TimeInner>& tile, int64_t o, A* room) {
    return result.dense ? static_cast<A*>(result.data) + tile.offset(result, o) : room;
}

template <bool TimeInner, class A>
void store_run(const Matrix& result, const Tile<TimeInner>& tile, int64_t o, const A* room) {
    if (result.dense) return;
    with_pointer(result, [&](auto* data) { convert(room, 1, tile.inner(), data + tile.offset(result, o)); });
}

// Bit 0: terminated, bit 1: truncated.
template <bool TimeInner, class A>
EFE_INLINE void load_flags(const Trace<A>& p, const Tile<TimeInner>& tile, int64_t o, uint8_t* __restrict__ out) {
    uint8_t room[Tile<TimeInner>::kSize];
    const uint8_t* terminated = read_run(p.terminated, tile, o, room);
    for (int64_t i = 0; i < tile.inner(); ++i) out[i] = terminated[i];
    if (p.truncated.data == nullptr) return;
    const uint8_t* truncated = read_run(p.truncated, tile, o, room);
    for (int64_t i = 0; i < tile.inner(); ++i) out[i] |= static_cast<uint8_t>(truncated[i] << 1);
}

// state = step(element, state) along the steps of Rows rows, which do not wait for each other.
template <int Rows, bool Forward, bool TimeInner, class A, class Step>
EFE_INLINE void walk_rows(const Tile<TimeInner>& tile, int64_t row, A* state, const Step& step) {
    A x[Rows];
    std::copy_n(state + row, Rows, x);
    for (int64_t n = 0; n < tile.steps; ++n) {
        const int64_t i = tile.index(row, Forward ? n : tile.steps - 1 - n);
        const int64_t stride = tile.index(1, 0);
        EFE_UNROLL
        for (int64_t r = 0; r < Rows; ++r) x[r] = step(i + r * stride, x[r]);
    }
    std::copy_n(x, Rows, state + row);
}

// The same for all rows: side by side in a register where they lie so, else a few at a time in registers of their own.
template <bool Forward, bool TimeInner, class A, class Step>
EFE_INLINE void walk(const Tile<TimeInner>& tile, A* __restrict__ state, const Step& step) {
    if constexpr (TimeInner) {
        int64_t row = 0;
        for (; row + 8 <= tile.rows; row += 8) walk_rows<8, Forward>(tile, row, state, step);
        for (; row < tile.rows; ++row) walk_rows<1, Forward>(tile, row, state, step);
    } else {
        for (int64_t n = 0; n < tile.steps; ++n)
            for (int64_t row = 0; row < tile.rows; ++row)
                state[row] = step(tile.index(row, Forward ? n : tile.steps - 1 - n), state[row]);
    }
}

template <bool TimeInner, bool VTrace, class A>
EFE_INLINE void forward_tile(const Trace<A>& p, const Tile<TimeInner>& tile, A* __restrict__ state) {
    using Shape = Tile<TimeInner>;
    const Discounts<A> d = p.discounts;
    const int64_t inner = tile.inner();
    A delta[Shape::kSize], coefficient[Shape::kSize], pull[Shape::kSize], following[Shape::kSize];
    A room[4][Shape::kSize];
    uint8_t flags[Shape::kSize];
    for (int64_t o = 0; o < tile.outer(); ++o) {
        const int64_t at = o * Shape::kInner;
        const A *reward = read_run(p.reward, tile, o, room[0]), *value = read_run(p.value, tile, o, room[1]);
        const A* next_value = read_run(p.next_value, tile, o, room[2]);
        const A* log_ratio = VTrace ? read_run(p.log_ratio, tile, o, room[3]) : value;  // gae does not look at it
        load_flags(p, tile, o, flags);
        for (int64_t i = 0; i < inner; ++i) {
            const Step<A> step = step_of<VTrace>(d, log_ratio[i], flags[i]);
            delta[at + i] = step.rho * (advance(step.bootstrap, reward[i] * d.reward_scale, next_value[i]) - value[i]);
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
template <bool TimeInner, bool VTrace, class A>
EFE_INLINE void backward_tile(const Trace<A>& p, const Tile<TimeInner>& tile, A* __restrict__ state) {
    using Shape = Tile<TimeInner>;
    const Discounts<A> d = p.discounts;
    const int64_t inner = tile.inner();
    A arrival[Shape::kSize], coefficient[Shape::kSize], handed[Shape::kSize], rho[Shape::kSize];
    A bootstrap[Shape::kSize], advantage[Shape::kSize], target[Shape::kSize], room[Shape::kSize];
    uint8_t flags[Shape::kSize];
    for (int64_t o = 0; o < tile.outer(); ++o) {
        const int64_t at = o * Shape::kInner;
        std::copy_n(read_run(p.grad_advantage, tile, o, room), inner, advantage + at);
        std::copy_n(read_run(p.grad_target, tile, o, room), inner, target + at);
        const A* log_ratio = VTrace ? read_run(p.log_ratio, tile, o, room) : target + at;  // gae does not look at it
        load_flags(p, tile, o, flags);
        for (int64_t i = 0; i < inner; ++i) {
            const Step<A> step = step_of<VTrace>(d, log_ratio[i], flags[i]);
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
    }
}

template <bool TimeInner, bool VTrace, bool Backward, class A>
void run_trace(const Trace<A>& p) {
    using Shape = Tile<TimeInner>;
    if (p.rows == 0 || p.steps == 0) return;
    const int64_t rows = Shape::block_rows(p.rows, p.steps), blocks = (p.rows + rows - 1) / rows;
    const int64_t chunks = (p.steps + Shape::kTime - 1) / Shape::kTime;
    parallel(blocks, rows * p.steps, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t block = first; block < last; ++block) {
            A state[Shape::kMaxRows] = {};
            Shape tile;
            tile.first_row = block * rows;
            tile.rows = std::min(rows, p.rows - tile.first_row);
            tile.one_run = TimeInner && chunks == 1;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                tile.first_step = (Backward ? chunk : chunks - 1 - chunk) * Shape::kTime;
                tile.steps = std::min<int64_t>(Shape::kTime, p.steps - tile.first_step);
                tile.next_tile = TimeInner && chunk + 1 < chunks ? (Backward ? Shape::kTime : -Shape::kTime) : 0;
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
    const bool vtrace = p.log_ratio.data != nullptr;
    if (time_inner)
        vtrace ? run_trace<true, true, Backward>(p) : run_trace<true, false, Backward>(p);
    else
        vtrace ? run_trace<false, true, Backward>(p) : run_trace<false, false, Backward>(p);
}

// How the results lie, which is dense, and the dtype of the arithmetic on them.
struct Layout {
    int64_t rows, steps, stride_row, stride_time;
    at::ScalarType type;

    explicit Layout(const at::Tensor& result)
        : rows(result.size(0)), steps(result.size(1)), stride_row(result.stride(0)), stride_time(result.stride(1)),
          type(arithmetic_type(result)) {}

    Matrix matrix(const OptionalTensor& tensor) const {
        if (!tensor.has_value() || !tensor->defined()) return {};
        const int64_t row = rows == 1 ? stride_row : tensor->stride(0);
        const int64_t time = steps == 1 ? stride_time : tensor->stride(1);
        const bool as_it_is = tensor->scalar_type() == type || tensor->scalar_type() == at::kBool;
        const bool runs = as_it_is && (time_inner() ? time == 1 : row == 1);
        const bool dense = runs && row == stride_row && time == stride_time;
        return {const_cast<void*>(tensor->const_data_ptr()), tensor->scalar_type(), row, time, dense, runs};
    }

    template <class A>
    Trace<A> trace(const Discounts<double>& d, const at::Tensor& terminated, const OptionalTensor& truncated,
                   const OptionalTensor& log_ratio) const {
        Trace<A> p{};
        p.rows = rows;
        p.steps = steps;
        p.discounts = {static_cast<A>(d.gamma), static_cast<A>(d.lam), static_cast<A>(d.rho_clip),
                       static_cast<A>(d.c_clip), static_cast<A>(d.reward_scale)};
        p.terminated = matrix(terminated);
        p.truncated = matrix(truncated);
        p.log_ratio = matrix(log_ratio);
        return p;
    }

    bool time_inner() const { return stride_time == 1; }
};

std::tuple<at::Tensor, at::Tensor> trace_forward(
    const at::Tensor& value, const at::Tensor& next_value, const at::Tensor& reward, const at::Tensor& terminated,
    const OptionalTensor& truncated, const OptionalTensor& log_ratio, double gamma, double lam, double rho_clip,
    double c_clip, double reward_scale) {
    const at::Tensor advantage = at::empty_like(reward), target = at::empty_like(reward);
    const Layout layout(advantage);
    for_arithmetic(layout.type, [&](auto zero) {
        using A = decltype(zero);
        const Discounts<double> discounts{gamma, lam, rho_clip, c_clip, reward_scale};
        Trace<A> p = layout.trace<A>(discounts, terminated, truncated, log_ratio);
        p.reward = layout.matrix(reward);
        p.value = layout.matrix(value);
        p.next_value = layout.matrix(next_value);
        p.advantage = layout.matrix(advantage);
        p.target = layout.matrix(target);
        run_trace<false>(p, layout.time_inner());
    });
    return {advantage, target};
}

std::vector<at::Tensor> trace_backward(
    const OptionalTensor& grad_advantage, const OptionalTensor& grad_target, const c10::List<bool>& needs,
    const at::Tensor& terminated, const OptionalTensor& truncated, const OptionalTensor& log_ratio, double gamma,
    double lam, double rho_clip, double c_clip, double reward_scale) {
    const at::Tensor& given = grad_advantage.has_value() ? *grad_advantage : *grad_target;
    std::vector<at::Tensor> wanted;
    for (int64_t i = 0; i < 2; ++i)
        if (needs.get(i)) wanted.push_back(at::empty_like(terminated, given.options()));
    if (wanted.empty()) return wanted;
    const Layout layout(wanted[0]);
    for_arithmetic(layout.type, [&](auto zero) {
        using A = decltype(zero);
        const Discounts<double> discounts{gamma, lam, rho_clip, c_clip, reward_scale};
        Trace<A> p = layout.trace<A>(discounts, terminated, truncated, log_ratio);
        p.grad_advantage = layout.matrix(grad_advantage);
        p.grad_target = layout.matrix(grad_target);
        if (needs.get(0)) p.grad_value = layout.matrix(wanted.front());
        if (needs.get(1)) p.grad_next_value = layout.matrix(wanted.back());
        run_trace<true>(p, layout.time_inner());
    });
    return wanted;
}

TORCH_LIBRARY_IMPL(efe, CPU, library) {
    library.impl("trace_forward", trace_forward);
    library.impl("trace_backward", trace_backward);
}

}  // namespace
}  // namespace efe::advantage
