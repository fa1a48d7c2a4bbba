// The CPU kernels of prompt refinement. Rows are shared out to threads; within a row a tile at a time is loaded into
// arrays of A (float, or double for double tensors), padded with zeros, and computed whole: loops of a constant length
// over local arrays are what the compiler vectorises best. Only loads, stores and sums look at how full the tile is.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>

#include "common/huge_pages.h"
#include "common/math.h"
#include "common/philox.h"
#include "common/simd.h"
#include "prompt/gaussian.h"
#include "prompt/kernels.h"
#include "prompt/ops.h"

namespace efe::prompt {
namespace {

constexpr int kTile = 128;            // components of a policy row at a time, a multiple of the 4 of one Philox call
constexpr int kPoolTile = 1024;       // columns of a hidden state at a time
constexpr int64_t kPoolChunk = 64;    // tokens whose gradients one task writes
constexpr int64_t kGrain = 16384;     // elements for which a further thread pays

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class Body>
void for_dtype(Dtype dtype, const Body& body) {
    switch (dtype) {
        case Dtype::float32:
            return body(float{});
        case Dtype::float64:
            return body(double{});
        case Dtype::float16:
            return body(c10::Half{});
        case Dtype::bfloat16:
            return body(c10::BFloat16{});
    }
}

// body(begin, end) over ranges of [0, count), each item being `cost` elements of work.
template <class Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        vectorized([&]() EFE_SIMD_BODY { body(begin, end); });
    });
}

template <class From, class To>
EFE_INLINE void convert(const From* __restrict__ from, int count, To* __restrict__ to) {
    if (count == kTile) {  // of a constant length, hence without a call or a remainder
        for (int i = 0; i < kTile; ++i) to[i] = static_cast<To>(from[i]);
    } else {
        for (int i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
    }
}

// Elements [begin, begin + count) of a row as A, then zeros up to the end of the tile; zeros where the row is absent.
template <class T, class A>
EFE_INLINE void load(const Row<T>& row, int64_t begin, int count, A* __restrict__ out) {
    if (row.data == nullptr) {
        count = 0;
    } else if (row.column != 1) {
        for (int i = 0; i < count; ++i) out[i] = static_cast<A>(row.data[(begin + i) * row.column]);
    } else {
        convert(row.data + begin, count, out);
    }
    std::fill(out + count, out + kTile, A(0));
}

template <class T, class A>
EFE_INLINE A element(const Row<T>& row, int64_t index) {
    return row.data == nullptr ? A(0) : static_cast<A>(row.data[index * row.column]);
}

// Sum over the tiles of a row, in interleaved lanes and then by halves: an order that vectorises and is the same on every
// run. Tiles are added whole, so what pads them must be 0. More lanes than 16, up to which GCC unrolls the loop over them
// and then keeps each lane as a scalar.
template <class A>
struct TileSum {
    static constexpr int kLanes = kTile / 4;
    A lanes[kLanes] = {};

    EFE_INLINE void add(const A* tile) {
        for (int i = 0; i < kLanes; ++i)
            lanes[i] += (tile[i] + tile[i + kLanes]) + (tile[i + 2 * kLanes] + tile[i + 3 * kLanes]);
    }

    EFE_INLINE A total() {
        EFE_UNROLL
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        return lanes[0];
    }
};

// Sum of log tanh' over the tiles of a row. A product costs less than a logarithm, so one is taken of the product of
// four factors.
template <class A>
struct LogSlopeSum {
    static constexpr int kLanes = TileSum<A>::kLanes;
    TileSum<A> sum;

    EFE_INLINE void add(A* log_part, A* factor, int count) {
        std::fill(log_part + count, log_part + kTile, A(0));
        std::fill(factor + count, factor + kTile, A(1));
        sum.add(log_part);
        for (int i = 0; i < kLanes; ++i)
            sum.lanes[i] -= math::log_normal_range(
                (factor[i] * factor[i + kLanes]) * (factor[i + 2 * kLanes] * factor[i + 3 * kLanes]));
    }

    EFE_INLINE A total() { return A(2) * sum.total(); }
};

// The noise of one row: as given, or from the seed.
template <class A>
struct Noise {
    Row<A> given;
    uint64_t seed;
    int64_t row;

    // begin is a multiple of 4. One array per word, so that quads lie side by side.
    EFE_INLINE void load(int64_t begin, int count, A* __restrict__ out) const {
        if (given.data != nullptr) return prompt::load(given, begin, count, out);
        constexpr int kQuads = kTile / 4;
        uint32_t words[4][kQuads];
        A normals[4][kQuads];
        for (int q = 0; q < kQuads; ++q) {
            const Words4 drawn = philox_noise_words(seed, row, begin / 4 + q);
            words[0][q] = drawn.x0;
            words[1][q] = drawn.x1;
            words[2][q] = drawn.x2;
            words[3][q] = drawn.x3;
        }
        for (int k = 0; k < 4; k += 2)
            for (int q = 0; q < kQuads; ++q)
                box_muller(words[k][q], words[k + 1][q], &normals[k][q], &normals[k + 1][q]);
        for (int q = 0; q < kQuads; ++q)
            for (int k = 0; k < 4; ++k) out[4 * q + k] = normals[k][q];
        std::fill(out + count, out + kTile, A(0));
    }

    EFE_INLINE A at(int64_t index) const {
        if (given.data != nullptr) return given.data[index * given.column];
        const Normals4<A> noise = philox_normal4<A>(seed, row, index / 4);
        const A values[4] = {noise.n0, noise.n1, noise.n2, noise.n3};
        return values[index % 4];
    }
};

template <class T>
void pool_forward(const PoolForward& args) {
    using A = Accumulate<T>;
    // At least one tile, whose task writes the scale.
    const int64_t tiles = std::max<int64_t>(1, (args.width + kPoolTile - 1) / kPoolTile);
    parallel(args.rows * tiles, args.length * kPoolTile, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t task = first; task < last; ++task) {
            const int64_t n = task / tiles, begin = task % tiles * kPoolTile;
            const int count = static_cast<int>(std::min<int64_t>(kPoolTile, args.width - begin));
            const Row<bool> mask = row_of<bool>(args.mask, n);
            const T* hidden = static_cast<const T*>(args.hidden) + n * args.row + begin * args.column;
            A sum[kPoolTile];
            std::fill_n(sum, count, A(0));
            int64_t tokens = 0;
            for (int64_t l = 0; l < args.length; ++l) {
                if (!mask.data[l * mask.column]) continue;
                ++tokens;
                const T* token = hidden + l * args.token;
                if (args.column == 1) {
                    for (int i = 0; i < count; ++i) sum[i] += static_cast<A>(token[i]);
                } else {
                    for (int i = 0; i < count; ++i) sum[i] += static_cast<A>(token[i * args.column]);
                }
            }
            const A scale = tokens > 0 ? A(1) / static_cast<A>(tokens) : A(0);
            for (int i = 0; i < count; ++i) sum[i] *= scale;
            convert(sum, count, static_cast<T*>(args.pooled) + n * args.width + begin);
            if (begin == 0) static_cast<A*>(args.scale)[n] = scale;
        }
    });
}

template <class T>
void pool_backward(const PoolBackward& args) {
    using A = Accumulate<T>;
    prefer_huge_pages(args.grad_hidden, sizeof(T) * static_cast<size_t>(args.rows * args.length * args.width));
    const int64_t chunks = (args.length + kPoolChunk - 1) / kPoolChunk;
    parallel(args.rows * chunks, kPoolChunk * args.width, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t task = first; task < last; ++task) {
            const int64_t n = task / chunks, from = task % chunks * kPoolChunk;
            const int64_t to = std::min(args.length, from + kPoolChunk);
            const Row<bool> mask = row_of<bool>(args.mask, n);
            const A scale = static_cast<const A*>(args.scale)[n];
            T* out = static_cast<T*>(args.grad_hidden) + n * args.length * args.width;
            for (int64_t begin = 0; begin < args.width; begin += kPoolTile) {
                const int count = static_cast<int>(std::min<int64_t>(kPoolTile, args.width - begin));
                A values[kPoolTile];
                T gradient[kPoolTile];
                const Row<T> grad = row_of<T>(args.grad, n);
                for (int i = 0; i < count; ++i)
                    values[i] = scale * static_cast<A>(grad.data[(begin + i) * grad.column]);
                convert(values, count, gradient);
                for (int64_t l = from; l < to; ++l) {
                    T* token = out + l * args.width + begin;
                    if (mask.data[l * mask.column])
                        std::memcpy(static_cast<void*>(token), gradient, count * sizeof(T));
                    else
                        std::memset(static_cast<void*>(token), 0, count * sizeof(T));
                }
            }
        }
    });
}

template <class T>
void refine_forward(const RefineForward& args) {
    using A = Accumulate<T>;
    const int64_t dimension = args.dimension;
    const A delta_scale = static_cast<A>(args.delta_scale);
    parallel(args.batch, 8 * dimension, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t b = first; b < last; ++b) {
            const Row<T> prompt = row_of<T>(args.prompt, b);
            const Row<A> mean = row_of<A>(args.mean, b), log_std = row_of<A>(args.log_std, b);
            const Noise<A> noise{row_of<A>(args.noise, b), args.seed, b};
            T* refined = static_cast<T*>(args.refined) + b * dimension;
            A* action = static_cast<A*>(args.action) + b * (dimension + 1);

            const A last_noise = noise.at(dimension), last_log_std = element<A, A>(log_std, dimension);
            const A last_u = element<A, A>(mean, dimension) + math::exp(last_log_std) * last_noise;
            const Squashed<A> alpha = squash_sigmoid(last_u);
            action[dimension] = last_u;

            TileSum<A> noise_squared, log_stds;
            LogSlopeSum<A> log_slopes;
            for (int64_t begin = 0; begin < dimension; begin += kTile) {
                const int count = static_cast<int>(std::min<int64_t>(kTile, dimension - begin));
                A p[kTile], m[kTile], s[kTile], n[kTile], u[kTile], n2[kTile], log_part[kTile], factor[kTile];
                load(prompt, begin, count, p);
                load(mean, begin, count, m);
                load(log_std, begin, count, s);
                noise.load(begin, count, n);
                for (int i = 0; i < kTile; ++i) u[i] = m[i] + math::exp(s[i]) * n[i];
                for (int i = 0; i < kTile; ++i) {
                    const TanhParts<A> squashed = squash_tanh_in_parts(u[i]);
                    p[i] += alpha.value * (delta_scale * squashed.value);
                    n2[i] = n[i] * n[i];
                    log_part[i] = squashed.log_part;
                    factor[i] = squashed.factor;
                }
                convert(u, count, action + begin);
                convert(p, count, refined + begin);
                noise_squared.add(n2);
                log_stds.add(s);
                log_slopes.add(log_part, factor, count);
            }
            const Score<A> result = score<A>(
                {noise_squared.total() + last_noise * last_noise, log_stds.total() + last_log_std,
                 log_slopes.total() + alpha.log_slope},
                dimension, args.log_delta_scale);
            static_cast<A*>(args.log_prob)[b] = result.log_prob;
            static_cast<A*>(args.entropy)[b] = result.entropy;
        }
    });
}

template <class T>
void refine_backward(const RefineBackward& args) {
    using A = Accumulate<T>;
    const int64_t dimension = args.dimension;
    const A delta_scale = static_cast<A>(args.delta_scale);
    parallel(args.batch, 8 * dimension, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t b = first; b < last; ++b) {
            const Row<T> grad_refined = row_of<T>(args.grad_refined, b);
            const Row<A> grad_action = row_of<A>(args.grad_action, b);
            const Row<A> action = row_of<A>(args.action, b), log_std = row_of<A>(args.log_std, b);
            const Noise<A> noise{row_of<A>(args.noise, b), args.seed, b};
            const A grad_determinant = element<A, A>(row_of<A>(args.grad_entropy, b), 0) -
                                       element<A, A>(row_of<A>(args.grad_log_prob, b), 0);
            A* grad_mean = static_cast<A*>(args.grad_mean);
            A* grad_log_std = static_cast<A*>(args.grad_log_std);
            if (grad_mean != nullptr) grad_mean += b * (dimension + 1);
            if (grad_log_std != nullptr) grad_log_std += b * (dimension + 1);

            const Squashed<A> alpha = squash_sigmoid(element<A, A>(action, dimension));
            const A delta_weight = alpha.value * delta_scale;
            TileSum<A> grad_alpha;
            for (int64_t begin = 0; begin < dimension; begin += kTile) {
                const int count = static_cast<int>(std::min<int64_t>(kTile, dimension - begin));
                A g[kTile], ga[kTile], u[kTile], s[kTile], n[kTile], mean[kTile], std[kTile], delta[kTile];
                load(grad_refined, begin, count, g);
                load(grad_action, begin, count, ga);
                load(action, begin, count, u);
                load(log_std, begin, count, s);
                noise.load(begin, count, n);
                for (int i = 0; i < kTile; ++i) {
                    const Squashed<A> squashed = squash_tanh(u[i]);
                    const PolicyGradient<A> gradient =
                        refine_gradient(squashed, g[i] * delta_weight, ga[i], grad_determinant, s[i], n[i]);
                    mean[i] = gradient.mean;
                    std[i] = gradient.log_std;
                    delta[i] = g[i] * squashed.value;
                }
                grad_alpha.add(delta);
                if (grad_mean != nullptr) convert(mean, count, grad_mean + begin);
                if (grad_log_std != nullptr) convert(std, count, grad_log_std + begin);
            }
            const PolicyGradient<A> last_gradient = refine_gradient(
                alpha, grad_alpha.total() * delta_scale, element<A, A>(grad_action, dimension), grad_determinant,
                element<A, A>(log_std, dimension), noise.at(dimension));
            if (grad_mean != nullptr) grad_mean[dimension] = last_gradient.mean;
            if (grad_log_std != nullptr) grad_log_std[dimension] = last_gradient.log_std;
        }
    });
}

template <class A>
void log_prob_forward(const LogProbForward& args) {
    const int64_t dimension = args.dimension;
    parallel(args.batch, 4 * dimension, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t b = first; b < last; ++b) {
            const Row<A> action = row_of<A>(args.action, b), mean = row_of<A>(args.mean, b);
            const Row<A> log_std = row_of<A>(args.log_std, b);
            TileSum<A> noise_squared, log_stds;
            LogSlopeSum<A> log_slopes;
            for (int64_t begin = 0; begin < dimension; begin += kTile) {
                const int count = static_cast<int>(std::min<int64_t>(kTile, dimension - begin));
                A u[kTile], m[kTile], s[kTile], n2[kTile], log_part[kTile], factor[kTile];
                load(action, begin, count, u);
                load(mean, begin, count, m);
                load(log_std, begin, count, s);
                for (int i = 0; i < kTile; ++i) {
                    const A n = (u[i] - m[i]) * math::exp(-s[i]);
                    const TanhParts<A> squashed = squash_tanh_in_parts(u[i]);
                    n2[i] = n * n;
                    log_part[i] = squashed.log_part;
                    factor[i] = squashed.factor;
                }
                noise_squared.add(n2);
                log_stds.add(s);
                log_slopes.add(log_part, factor, count);
            }
            const A u = element<A, A>(action, dimension), s = element<A, A>(log_std, dimension);
            const A n = (u - element<A, A>(mean, dimension)) * math::exp(-s);
            const Score<A> result = score<A>(
                {noise_squared.total() + n * n, log_stds.total() + s, log_slopes.total() + squash_sigmoid(u).log_slope},
                dimension, args.log_delta_scale);
            static_cast<A*>(args.log_prob)[b] = result.log_prob;
            static_cast<A*>(args.entropy)[b] = result.entropy;
        }
    });
}

template <class A>
void log_prob_backward(const LogProbBackward& args) {
    const int64_t dimension = args.dimension;
    parallel(args.batch, 4 * dimension, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t b = first; b < last; ++b) {
            const Row<A> action = row_of<A>(args.action, b), mean = row_of<A>(args.mean, b);
            const Row<A> log_std = row_of<A>(args.log_std, b);
            const A grad_log_prob = element<A, A>(row_of<A>(args.grad_log_prob, b), 0);
            const A grad_entropy = element<A, A>(row_of<A>(args.grad_entropy, b), 0);
            A* out[3] = {static_cast<A*>(args.grad_action), static_cast<A*>(args.grad_mean),
                         static_cast<A*>(args.grad_log_std)};
            for (A*& row : out)
                if (row != nullptr) row += b * (dimension + 1);
            for (int64_t begin = 0; begin < dimension; begin += kTile) {
                const int count = static_cast<int>(std::min<int64_t>(kTile, dimension - begin));
                A u[kTile], m[kTile], s[kTile], gradient[3][kTile];
                load(action, begin, count, u);
                load(mean, begin, count, m);
                load(log_std, begin, count, s);
                for (int i = 0; i < kTile; ++i) {
                    const ActionGradient<A> at_u = log_prob_gradient(
                        squash_tanh(u[i]).log_slope_slope, u[i], m[i], s[i], grad_log_prob, grad_entropy);
                    gradient[0][i] = at_u.action;
                    gradient[1][i] = at_u.mean;
                    gradient[2][i] = at_u.log_std;
                }
                for (int k = 0; k < 3; ++k)
                    if (out[k] != nullptr) convert(gradient[k], count, out[k] + begin);
            }
            const A u = element<A, A>(action, dimension);
            const ActionGradient<A> at_u =
                log_prob_gradient(squash_sigmoid(u).log_slope_slope, u, element<A, A>(mean, dimension),
                                  element<A, A>(log_std, dimension), grad_log_prob, grad_entropy);
            const A last_gradient[3] = {at_u.action, at_u.mean, at_u.log_std};
            for (int k = 0; k < 3; ++k)
                if (out[k] != nullptr) out[k][dimension] = last_gradient[k];
        }
    });
}

struct Cpu {
    static int64_t pool_chunks(const PoolForward&) { return 1; }
    static void pool_forward(const PoolForward& args) {
        for_dtype(args.dtype, [&](auto zero) { prompt::pool_forward<decltype(zero)>(args); });
    }
    static void pool_backward(const PoolBackward& args) {
        for_dtype(args.dtype, [&](auto zero) { prompt::pool_backward<decltype(zero)>(args); });
    }
    static void refine_forward(const RefineForward& args) {
        for_dtype(args.dtype, [&](auto zero) { prompt::refine_forward<decltype(zero)>(args); });
    }
    static void refine_backward(const RefineBackward& args) {
        for_dtype(args.dtype, [&](auto zero) { prompt::refine_backward<decltype(zero)>(args); });
    }
    static void log_prob_forward(const LogProbForward& args) {
        args.dtype == Dtype::float64 ? prompt::log_prob_forward<double>(args) : prompt::log_prob_forward<float>(args);
    }
    static void log_prob_backward(const LogProbBackward& args) {
        args.dtype == Dtype::float64 ? prompt::log_prob_backward<double>(args) : prompt::log_prob_backward<float>(args);
    }
};

}  // namespace

TORCH_LIBRARY_IMPL(efe, CPU, library) {
    register_ops<Cpu>(library);
}

}  // namespace efe::prompt
