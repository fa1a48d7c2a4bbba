// The EFE loss of N cells at once, the C outcomes of each in C vector registers: float arithmetic, few outcomes. All of
// it is inlined into one function for each instruction set and number of outcomes. Probabilities are e * inverse, and
// log p = d - log_sum.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "common/inline.h"
#include "common/math.h"
#include "common/simd.h"
#include "common/tensor.h"
#include "efe_loss/cells.h"
#include "efe_loss/outcomes.h"
#include "efe_loss/problem.h"

// Vectors wider than the baseline are passed between functions here only where all of them are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace efe::efe_loss {

constexpr float kLn2 = static_cast<float>(math::kLn2);
// Registers of cells after which the sums of their lanes are handed on in double.
constexpr int64_t kRegistersInSum = 16;

// N values in one register, with the operators, comparisons and `mask ? a : b` of GCC and Clang.
template <int N>
struct Lanes {
    typedef float V __attribute__((vector_size(4 * N)));
    typedef int32_t I __attribute__((vector_size(4 * N)));
    typedef uint32_t U __attribute__((vector_size(4 * N)));
    typedef int8_t Bytes __attribute__((vector_size(N)));
    typedef float Anywhere __attribute__((vector_size(4 * N), aligned(4), may_alias));
    typedef float Quad __attribute__((vector_size(16)));
    typedef float QuadAnywhere __attribute__((vector_size(16), aligned(4), may_alias));
};

// body(std::integral_constant<int, C>) of a number of outcomes for which there are registers.
template <int C = kFewestInRegisters, class Body>
void with_outcomes(int64_t outcomes, const Body& body) {
    if (outcomes == C) return body(std::integral_constant<int, C>{});
    if constexpr (C < kMostInRegisters) with_outcomes<C + 1>(outcomes, body);
}

// body(std::integral_constant<int, N>) as widely as this CPU can; body is a lambda marked EFE_SIMD_BODY.
template <class Body>
void with_lanes(const Body& body) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (cpu_capability() == Capability::avx512)
        run_avx512([&]() EFE_SIMD_BODY { body(std::integral_constant<int, 16>{}); });
    else
        run_avx2([&]() EFE_SIMD_BODY { body(std::integral_constant<int, 8>{}); });
#else
    body(std::integral_constant<int, 4>{});
#endif
}

// kRows rows of kColumns values in another dtype, each row at its stride.
template <int kRows, int kColumns, class From, class To>
__attribute__((noinline)) void convert(const From* from, int64_t from_stride, To* to, int64_t to_stride) {
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t row = 0; row < kRows; ++row) {
            const From* const source = from + row * from_stride;
            To* const target = to + row * to_stride;
            EFE_INDEPENDENT
            for (int64_t i = 0; i < kColumns; ++i) target[i] = static_cast<To>(source[i]);
        }
    });
}

template <int C, int N>
struct Registers {
    using V = typename Lanes<N>::V;
    using I = typename Lanes<N>::I;
    using U = typename Lanes<N>::U;
    static constexpr int64_t kSize = C * N;

    static EFE_INLINE V load(const float* from) { return *reinterpret_cast<const typename Lanes<N>::Anywhere*>(from); }
    static EFE_INLINE void store(float* to, V x) { *reinterpret_cast<typename Lanes<N>::Anywhere*>(to) = x; }
    // GCC 12 builds a vector that it knows lane by lane where it is compared or chosen, so it is not to know the zero.
    static EFE_INLINE V all(float x) {
        V zero{};
#if defined(__x86_64__) && !defined(__clang__)
        asm("" : "+v"(zero));
#endif
        return x - zero;
    }
    // member: all bits or none, as data. A mask that is the value of a comparison and is used in several places, be it
    // that two comparisons are one, is typed by GCC 12 before it knows the instruction set of the function that this is
    // inlined into, and so becomes a branch for each lane.
    static EFE_INLINE V where(I member, V x) { return reinterpret_cast<V>(reinterpret_cast<I>(x) & member); }
    // x where one of them is a NaN.
    static EFE_INLINE V at_least(V low, V x) { return low > x ? low : x; }
    static EFE_INLINE V at_most(V high, V x) { return high < x ? high : x; }

    // From where on e^x counts as 0.
    static EFE_INLINE V lowest_exponent() { return all(-88.0f); }

    static EFE_INLINE double sum(V x) {
        float lanes[N];
        std::memcpy(lanes, &x, sizeof lanes);
        double total = 0;
        for (int i = 0; i < N; ++i) total += lanes[i];
        return total;
    }

    // e^x for x in [-88, 0] to about 1 ulp, 0 at -88: x log2(e) = k + f with |f| <= 1/2, and a minimax polynomial in f.
    // Adding kShift leaves no bit for the fraction, so it rounds, and leaves k + 127, the exponent field of 2^k, in the
    // low bits; with k = -127 that field is 0, and so is the result. kLog2ERest is what float leaves out of log2(e). The
    // compilers make x * kLog2E - k one multiply-add; rounded in between it would cost 40 ulp.
    static EFE_INLINE V exp_nonpositive(V x) {
        constexpr float kLog2E = 1.44269502f, kLog2ERest = 1.92596303e-8f;
        constexpr float kShift = 12582912.0f + 127.0f;  // 1.5 * 2^23, and the bias
        const V shifted = x * kLog2E + kShift, k = shifted - kShift;
        const V f = x * kLog2ERest + (x * kLog2E - k);
        V p = f * 1.53533503e-4f + 1.33988750e-3f;
        p = p * f + 9.61843785e-3f;
        p = p * f + 5.55033237e-2f;
        p = p * f + 0.240226477f;
        p = p * f + 0.693147182f;
        p = p * f + 1.0f;
        return p * reinterpret_cast<V>(reinterpret_cast<U>(shifted) << 23);
    }

    // log(x) to below 1 ulp for normal x > 0: x = 2^e m with m in [sqrt(1/2), sqrt(2)), and log m = z + z^2 g(z) with
    // z = m - 1 and a minimax polynomial g. The exponent stays where it is in the word. Something finite for every
    // other x, so that 0 * log(0) is 0: for an infinity and a NaN, too.
    static EFE_INLINE V log_finite(V x) {
        const I bits = reinterpret_cast<I>(x), exponent = (bits - 0x3f3504f3) & static_cast<int32_t>(0xff800000);
        const V z = reinterpret_cast<V>(bits - exponent) - 1.0f;
        V g = z * -0.0762186870f + 0.129045412f;
        g = g * z - 0.132430047f;
        g = g * z + 0.141818091f;
        g = g * z - 0.166090786f;
        g = g * z + 0.200019747f;
        g = g * z - 0.250015825f;
        g = g * z + 0.333333254f;
        g = g * z - 0.499999881f;
        return __builtin_convertvector(exponent, V) * (kLn2 * 0x1p-23f) + (g * (z * z) + z);
    }

    // log of a sum that is at least 1, or a NaN, which stays one.
    static EFE_INLINE V log_of_sum(V total) { return log_finite(total) + 0.0f * total; }

    // Where outcome c of N cells lies: in the tensor itself, or staged.
    struct Rows {
        const float* data;
        ptrdiff_t stride;
        EFE_INLINE V operator[](int c) const { return load(data + c * stride); }
    };

    // The first of each four outcomes; the last four overlap those before, and are read and written twice.
    static constexpr int kGroups = (C + 3) / 4;
    static constexpr int group(int g) { return std::min(4 * g, C - 4); }  // where C is at least 4

    // Of four registers, which hold four lanes of each of the cells i, i + 4, ..., one for i = 0 to 3: the rows of the
    // four lanes, and the reverse.
    static EFE_INLINE void transpose(V& a, V& b, V& c, V& d) {
        const V ab = low_pairs(a, b), ab2 = high_pairs(a, b), cd = low_pairs(c, d), cd2 = high_pairs(c, d);
        a = low_halves(ab, cd);
        b = high_halves(ab, cd);
        c = low_halves(ab2, cd2);
        d = high_halves(ab2, cd2);
    }

    // Within each four lanes: x0 y0 x1 y1, x2 y2 x3 y3, x0 x1 y0 y1, x2 x3 y2 y3. GCC has __builtin_shufflevector from
    // 12 on.
#ifdef __clang__
#define EFE_SHUFFLED(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define EFE_SHUFFLED(x, y, ...) __builtin_shuffle(x, y, I{__VA_ARGS__})
#endif
#define EFE_LANE(i, first) ((i) < 4 ? (i) + (first) : (i) - 4 + (first) + N)
#define EFE_FOUR(i, j, k, l, first) EFE_LANE(i, first), EFE_LANE(j, first), EFE_LANE(k, first), EFE_LANE(l, first)
#define EFE_SHUFFLE(name, i, j, k, l)                                                                           \
    static EFE_INLINE V name(V x, V y) {                                                                       \
        if constexpr (N == 16)                                                                                 \
            return EFE_SHUFFLED(x, y, EFE_FOUR(i, j, k, l, 0), EFE_FOUR(i, j, k, l, 4), EFE_FOUR(i, j, k, l, 8), \
                                EFE_FOUR(i, j, k, l, 12));                                                     \
        else if constexpr (N == 8)                                                                             \
            return EFE_SHUFFLED(x, y, EFE_FOUR(i, j, k, l, 0), EFE_FOUR(i, j, k, l, 4));                        \
        else                                                                                                   \
            return EFE_SHUFFLED(x, y, EFE_FOUR(i, j, k, l, 0));                                                 \
    }
    EFE_SHUFFLE(low_pairs, 0, 4, 1, 5)
    EFE_SHUFFLE(high_pairs, 2, 6, 3, 7)
    EFE_SHUFFLE(low_halves, 0, 1, 4, 5)
    EFE_SHUFFLE(high_halves, 2, 3, 6, 7)
#undef EFE_SHUFFLE
#undef EFE_FOUR
#undef EFE_LANE
#undef EFE_SHUFFLED

    // Four values of each of the cells 0, 4, ..., which are C apart. Not through memory, from where four short stores
    // would not be handed on to a long load.
    static EFE_INLINE V load_quads(const float* from) {
        using Quad = typename Lanes<N>::Quad;
        const auto quad = [&](int cell) EFE_SIMD_BODY {
            return Quad(*reinterpret_cast<const typename Lanes<N>::QuadAnywhere*>(from + cell * C));
        };
        if constexpr (N == 4) return quad(0);
#if defined(__clang__) || __GNUC__ >= 12
        const auto low = __builtin_shufflevector(quad(0), quad(4), 0, 1, 2, 3, 4, 5, 6, 7);
        if constexpr (N == 8) {
            return low;
        } else if constexpr (N == 16) {
            const auto high = __builtin_shufflevector(quad(8), quad(12), 0, 1, 2, 3, 4, 5, 6, 7);
            return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        }
#endif
        V found{};
        for (int j = 0; j < N / 4; ++j)
            for (int i = 0; i < 4; ++i) found[4 * j + i] = quad(4 * j)[i];
        return found;
    }

    static EFE_INLINE void store_quads(float* to, V x) {
        float lanes[N];
        std::memcpy(lanes, &x, sizeof lanes);
        EFE_UNROLL
        for (int j = 0; j < N / 4; ++j) std::memcpy(to + 4 * j * C, lanes + 4 * j, 16);
    }

    // cells [N, C] as rows [C, N], and the reverse.
    static EFE_INLINE void to_rows(const float* cells, float* rows) {
        EFE_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            V part[4];
            EFE_UNROLL
            for (int i = 0; i < 4; ++i) part[i] = load_quads(cells + i * C + group(g));
            transpose(part[0], part[1], part[2], part[3]);
            EFE_UNROLL
            for (int i = 0; i < 4; ++i) store(rows + (group(g) + i) * N, part[i]);
        }
    }

    static EFE_INLINE void to_cells(const float* rows, float* cells) {
        EFE_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            V part[4];
            EFE_UNROLL
            for (int i = 0; i < 4; ++i) part[i] = load(rows + (group(g) + i) * N);
            transpose(part[0], part[1], part[2], part[3]);
            EFE_UNROLL
            for (int i = 0; i < 4; ++i) store_quads(cells + i * C + group(g), part[i]);
        }
    }

    // Both under the instruction set of N lanes.
    static void transpose_to_rows(const float* cells, float* rows) {
        with_lanes([&](auto lanes) EFE_SIMD_BODY {
            if constexpr (decltype(lanes)::value == N && C >= 4) to_rows(cells, rows);
        });
    }
    static void transpose_to_cells(const float* rows, float* cells) {
        with_lanes([&](auto lanes) EFE_SIMD_BODY {
            if constexpr (decltype(lanes)::value == N && C >= 4) to_cells(rows, cells);
        });
    }

    // The values [C, N] of `count` cells at one step, 0 after the last cell.
    static __attribute__((noinline)) void stage(const CellView& view, int64_t episode, int64_t step, int64_t first,
                                                int64_t count, float* rows) {
        with_step(view, episode, step, [&](const auto* source) {
            if (count == N && view.in_cells() && C >= 4) {
                float cells[kSize];
                convert<1, kSize>(source + first * C, 0, cells, 0);
                transpose_to_rows(cells, rows);
            } else if (count == N && view.side_by_side()) {
                convert<C, N>(source + first, view.stride_outcome, rows, N);
            } else {
                std::fill_n(rows, kSize, 0.0f);
                for_each_cell(view, first, count, [&](int64_t i, int64_t offset) {
                    for (int c = 0; c < C; ++c)
                        rows[c * N + i] = static_cast<float>(source[offset + c * view.stride_outcome]);
                });
            }
        });
    }

    static __attribute__((noinline)) void unstage(const CellView& view, int64_t episode, int64_t step, int64_t first,
                                                  int64_t count, const float* rows) {
        with_step(view, episode, step, [&](auto* target) {
            using To = std::remove_reference_t<decltype(*target)>;
            if (count == N && view.in_cells() && C >= 4) {
                float cells[kSize];
                transpose_to_cells(rows, cells);
                convert<1, kSize>(cells, 0, target + first * C, 0);
            } else if (count == N && view.side_by_side()) {
                convert<C, N>(rows, N, target + first, view.stride_outcome);
            } else {
                for_each_cell(view, first, count, [&](int64_t i, int64_t offset) {
                    for (int c = 0; c < C; ++c)
                        target[offset + c * view.stride_outcome] = static_cast<To>(rows[c * N + i]);
                });
            }
        });
    }

    static EFE_INLINE Rows rows_of(const CellView& view, int64_t episode, int64_t step, int64_t first, int64_t count,
                                   float* staged) {
        if (count == N && view.in_rows()) {
            const int64_t offset = episode * view.stride_episode + step * view.stride_step + first;
            return {static_cast<const float*>(view.data) + offset, view.stride_outcome};
        }
        stage(view, episode, step, first, count, staged);
        return {staged, N};
    }

    // Where results are written: the tensor itself, or staged rows that `finish` hands on.
    struct Target {
        const CellView& view;
        int64_t episode, step, first, count;
        float* data;
        ptrdiff_t stride;
        bool staged;

        EFE_INLINE Target(const CellView& view, int64_t episode, int64_t step, int64_t first, int64_t count,
                          float* room)
            : view(view),
              episode(episode),
              step(step),
              first(first),
              count(count),
              data(room),
              stride(N),
              staged(count != N || !view.in_rows()) {
            if (staged) return;
            data = static_cast<float*>(view.data) + episode * view.stride_episode + step * view.stride_step + first;
            stride = view.stride_outcome;
        }
        EFE_INLINE void set(int c, V x) const { store(data + c * stride, x); }
        EFE_INLINE void add(int c, V x) const { set(c, load(data + c * stride) + x); }
        EFE_INLINE void finish() const {
            if (staged) unstage(view, episode, step, first, count, data);
        }
    };

    // All bits where a cell counts.
    static EFE_INLINE I counted_of(const Problem<float>& p, int64_t episode, int64_t first, int64_t count) {
        typename Lanes<N>::Bytes bytes{};
        std::memcpy(&bytes, p.counted.get() + episode * p.num_cells + first, count == N ? N : count);
        return -__builtin_convertvector(bytes, I);
    }

    // As float numbers, which are compared as the logits are.
    static EFE_INLINE V target_of(const Problem<float>& p, int64_t episode, int64_t first, int64_t count) {
        const int64_t* from = p.target.template data<int64_t>() + episode * p.num_cells + first;
        float lanes[N] = {};
        for (int64_t i = 0; i < count; ++i) lanes[i] = static_cast<float>(static_cast<int32_t>(from[i]));
        return load(lanes);
    }

    // The rows of a plan are far apart: the hardware sees T * C streams, more than it follows. A share of the next
    // episode, in the order of memory, is fetched to L2 for every register of cells of this one. Where its steps do not
    // follow each other, that is in vain.
    static EFE_INLINE void prefetch(const Problem<float>& p, const CellView& view, int64_t episode, int64_t first) {
        if (episode + 1 >= p.batch || !(view.side_by_side() || view.in_cells())) return;
        const int64_t of_cell = p.steps * C * view.value_size();
        const char* const next = static_cast<const char*>(view.data) +
                                 (episode + 1) * view.stride_episode * view.value_size() + first * of_cell;
        for (int64_t byte = 0; byte < N * of_cell; byte += 64) __builtin_prefetch(next + byte, 0, 2);
    }

    struct Step {
        V e[C], top, inverse, log_sum, d_mean, information, cross;  // the sums of p d, of p log p and of p log c
    };

    static EFE_INLINE V shifted(V x, V top, V lowest) { return at_least(lowest, x - top); }

    static EFE_INLINE V top_of(const Rows& x) {
        V top = x[0];
        EFE_UNROLL
        for (int c = 1; c < C; ++c) top = x[c] > top ? x[c] : top;
        return top;
    }

    // d and log c are used up as they come, so that only the C registers of e live on.
    static EFE_INLINE Step softmax(const Rows& x, const Rows& log_c, V lowest) {
        Step step;
        step.top = top_of(x);
        V total{}, d_sum{}, cross{};
        EFE_UNROLL
        for (int c = 0; c < C; ++c) {
            const V d = shifted(x[c], step.top, lowest);
            step.e[c] = exp_nonpositive(d);
            total += step.e[c];
            d_sum += step.e[c] * d;
            cross += step.e[c] * log_c[c];
        }
        step.inverse = 1.0f / total;
        step.log_sum = log_of_sum(total);
        step.d_mean = d_sum * step.inverse;
        step.information = step.d_mean - step.log_sum;
        step.cross = cross * step.inverse;
        return step;
    }

    // The preference of N cells as rows of N. Its logarithm is exact however improbable an outcome is.
    struct Preference {
        float *c, *log_c;
    };

    static EFE_INLINE V preference_logit(const Rows& x, int c) { return at_least(all(kLowestLogit), x[c]); }

    static EFE_INLINE void load_preference(const Problem<float>& p, int64_t episode, int64_t first, int64_t count,
                                           V lowest, float* staged, const Preference& out) {
        const float* const scales = p.scales_of(episode);
        const Rows x = rows_of(p.preference_logits, episode, 0, first, count, staged);
        EFE_UNROLL
        for (int c = 0; c < C; ++c) store(out.log_c + c * N, preference_logit(x, c) * (scales ? scales[c] : 1.0f));
        const Rows scaled{out.log_c, N};
        const V top = top_of(scaled);
        V total{}, e[C];
        EFE_UNROLL
        for (int c = 0; c < C; ++c) {
            const V d = scaled[c] - top;
            e[c] = exp_nonpositive(at_least(lowest, d));
            total += e[c];
            store(out.log_c + c * N, d);
        }
        const V inverse = 1.0f / total, log_sum = log_of_sum(total);
        EFE_UNROLL
        for (int c = 0; c < C; ++c) {
            store(out.c + c * N, e[c] * inverse);
            store(out.log_c + c * N, scaled[c] - log_sum);
        }
    }

    // KL(c || target preference), 0 where it is not set; is_set: all bits or none.
    struct Anchor {
        V divergence;
        I is_set;
    };

    // Row c of [C, H * W].
    static EFE_INLINE V load_row(const float* rows, const Problem<float>& p, int c, int64_t first, int64_t count) {
        const float* const from = rows + c * p.num_cells + first;
        if (count == N) return load(from);
        float lanes[N] = {};
        std::memcpy(lanes, from, count * sizeof(float));
        return load(lanes);
    }

    static EFE_INLINE Anchor anchor_of(const Problem<float>& p, int64_t first, int64_t count,
                                       const Preference& preference) {
        V divergence{}, row{};
        EFE_UNROLL
        for (int c = 0; c < C; ++c) {
            const V log_anchor = load_row(p.log_target_preference.get(), p, c, first, count);
            row += load_row(p.target_preference.get(), p, c, first, count);
            divergence += load(preference.c + c * N) * (load(preference.log_c + c * N) - log_anchor);
        }
        const I is_set = row != 0.0f ? I{} - 1 : I{};
        return {where(is_set, divergence), is_set};
    }

    // Adds the lanes of `count` rows up, and clears them.
    static EFE_INLINE void hand_on(float* rows, int64_t count, double* found) {
        for (int64_t row = 0; row < count; ++row) {
            found[row] += sum(load(rows + row * N));
            store(rows + row * N, V{});
        }
    }

    static int64_t registers_of(int64_t cells) { return (cells + N - 1) / N; }

    // Runs body(episode, k, first, count, preference) for the registers k of `cells` cells from `begin` on, which hold
    // the cells [first, first + count), and after(episode, last) behind each kRegistersInSum of them and, as the last
    // one, behind every episode.
    template <class Body, class After>
    static EFE_INLINE void for_each_register(const Problem<float>& p, int64_t chunk, int64_t begin, int64_t cells,
                                             V lowest, float* staged, const Body& body, const After& after) {
        const int64_t registers = registers_of(cells);
        // A preference that varies is made anew for each register of each episode.
        const int64_t kept = p.preference_varies() ? 1 : registers;
        const std::unique_ptr<float[]> preferences(new float[2 * kept * kSize]);
        const int64_t from = chunk * p.chunk_size(), to = std::min(from + p.chunk_size(), p.batch);
        for (int64_t episode = from; episode < to; ++episode) {
            for (int64_t k = 0; k < registers; ++k) {
                const int64_t first = begin + k * N, count = std::min<int64_t>(N, cells - k * N);
                float* const c = preferences.get() + 2 * (k % kept) * kSize;
                const Preference preference{c, c + kSize};
                if (episode == from || p.preference_varies())
                    load_preference(p, episode, first, count, lowest, staged, preference);
                body(episode, k, first, count, preference);
                if (k % kRegistersInSum == kRegistersInSum - 1) after(episode, false);
            }
            after(episode, true);
        }
    }
};

// Kernel<C, N>::run(p, chunk, block, the first of its cells, their number, others...) for every block of cells and
// chunk of episodes, under the instruction set of N lanes.
template <template <int, int> class Kernel, class... Others>
void run_in_registers(const Problem<float>& p, Others&... others) {
    with_outcomes(p.outcomes, [&](auto outcomes) {
        torch::stable::parallel_for(0, p.blocks * p.chunks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t block = task / p.chunks, first = block * p.block_size;
                const int64_t cells = std::min(p.block_size, p.num_cells - first);
                with_lanes([&](auto lanes) EFE_SIMD_BODY {
                    using K = Kernel<decltype(outcomes)::value, decltype(lanes)::value>;
                    K::run(p, task % p.chunks, block, first, cells, others...);
                });
            }
        });
    });
}

}  // namespace efe::efe_loss
