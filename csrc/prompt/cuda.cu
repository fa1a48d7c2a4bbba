// The CUDA kernels of prompt refinement. Sums run in a fixed order (lanes, then warps, then chunks), without atomics:
// every run gives the same bits. No torch header: cuda_ops.cpp is the glue.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "common/math.h"
#include "common/philox.h"
#include "prompt/cuda.h"
#include "prompt/gaussian.h"

namespace efe::prompt::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kPoolWarps = 8;          // walk the tokens of a pool block, one token each at a time
constexpr int kPoolThreads = kWarp * kPoolWarps;
constexpr int kPoolUnroll = 4;         // tokens in flight per warp
constexpr int64_t kPoolBlocks = 512;   // fill the largest GPUs; a constant, so that bits depend on shapes alone
constexpr int64_t kPoolMinTokens = 64; // per chunk in the forward
constexpr int64_t kPoolTokens = 64;    // per block in the backward
constexpr int64_t kPoolColumns = 256;  // per block, about, for the count of chunks
constexpr int kRowThreads = 256;       // at most, for one row of the policy
constexpr int64_t kMaxGrid = 1 << 30;

template <class T>
struct AccumulateType {
    using type = float;
};
template <>
struct AccumulateType<double> {
    using type = double;
};
template <class T>
using Accumulate = typename AccumulateType<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(Accumulate<T> x) {
    return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// The widest type for one access of up to 16 bytes. Copying half types as themselves would access them one by one.
template <int Bytes>
struct WordType {
    using type = uint4;
};
template <>
struct WordType<8> {
    using type = uint2;
};
template <>
struct WordType<4> {
    using type = uint32_t;
};
template <>
struct WordType<2> {
    using type = uint16_t;
};

// N values that move together, aligned to the access that moves them.
template <class T, int N>
struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Pack {
    using Word = typename WordType<sizeof(T) * N>::type;
    static constexpr int kWords = sizeof(T) * N / sizeof(Word);

    T values[N];

    __device__ __forceinline__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(values)[i] = reinterpret_cast<const Word*>(from)[i];
    }

    // Writes the values, or zeros where they are not kept.
    __device__ __forceinline__ void store(T* to, bool keep = true) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i)
            reinterpret_cast<Word*>(to)[i] = keep ? reinterpret_cast<const Word*>(values)[i] : Word{};
    }
};

// Sum over a block whose size is a multiple of 32, the same in every thread.
template <class A>
__device__ A block_sum(A value) {
    __shared__ A sums[kRowThreads / kWarp];
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    __syncthreads();  // sums may still be read from the call before
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
    __syncthreads();
    A total = 0;
    for (int warp = 0; warp < blockDim.x / kWarp; ++warp) total += sums[warp];
    return total;
}

// ---- masked_mean_pool ----

// Which row, columns and tokens a block of a pool kernel works on.
struct PoolPlace {
    int64_t row, chunk, column, begin, end;

    __device__ PoolPlace(int64_t block, int64_t tiles, int64_t chunks, int64_t tokens, int64_t length, int columns)
        : row(block / (tiles * chunks)),
          chunk(block / tiles % chunks),
          column(block % tiles * columns),
          begin(chunk * tokens),
          end(min(length, (chunk + 1) * tokens)) {}
};

// One lane holds N columns. Each warp sums every eighth token; then the warps are added up in order.
template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads)
    pool_forward_kernel(PoolForward args, int64_t blocks, int64_t tiles) {
    using A = Accumulate<T>;
    __shared__ A sums[kPoolWarps][kWarp * N];
    __shared__ int counts[kPoolWarps];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t tokens = (args.length + args.chunks - 1) / args.chunks;
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        const PoolPlace place(block, tiles, args.chunks, tokens, args.length, kWarp * N);
        const bool* mask = row_of<bool>(args.mask, place.row).data;
        const int64_t column = place.column + lane * N;
        const bool inside = column < args.width;
        const T* hidden = static_cast<const T*>(args.hidden) + place.row * args.row + column * args.column;

        A sum[N] = {};
        int count = 0;
        for (int64_t l = place.begin + warp; l < place.end; l += kPoolWarps * kPoolUnroll) {
            Pack<T, N> token[kPoolUnroll];
            bool keep[kPoolUnroll];
#pragma unroll
            for (int k = 0; k < kPoolUnroll; ++k) {
                const int64_t at = l + k * kPoolWarps;
                keep[k] = at < place.end && mask[at * args.mask.column];
                if (keep[k] && inside) token[k].load(hidden + at * args.token);
            }
#pragma unroll
            for (int k = 0; k < kPoolUnroll; ++k) {
                count += keep[k];
#pragma unroll
                for (int i = 0; i < N; ++i)
                    if (keep[k] && inside) sum[i] += widen(token[k].values[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) sums[warp][i * kWarp + lane] = sum[i];
        if (lane == 0) counts[warp] = count;
        __syncthreads();

        int total = 0;
        for (int w = 0; w < kPoolWarps; ++w) total += counts[w];
        const A scale = total > 0 ? A(1) / A(total) : A(0);
        const bool first = threadIdx.x == 0 && place.column == 0;
        for (int slot = threadIdx.x; slot < kWarp * N; slot += kPoolThreads) {
            const int64_t c = place.column + slot % kWarp * N + slot / kWarp;
            if (c >= args.width) continue;
            A value = 0;
            for (int w = 0; w < kPoolWarps; ++w) value += sums[w][slot];
            if (args.chunks == 1)
                static_cast<T*>(args.pooled)[place.row * args.width + c] = narrow<T>(value * scale);
            else
                static_cast<A*>(args.partial_sums)[(place.row * args.chunks + place.chunk) * args.width + c] = value;
        }
        if (first && args.chunks == 1) static_cast<A*>(args.scale)[place.row] = scale;
        if (first && args.chunks > 1) args.partial_counts[place.row * args.chunks + place.chunk] = total;
        __syncthreads();
    }
}

// Adds the chunks up, one thread per column.
template <class T>
__global__ void __launch_bounds__(kRowThreads) pool_combine_kernel(PoolForward args) {
    using A = Accumulate<T>;
    const int64_t elements = args.rows * args.width;
    const int64_t stride = int64_t{gridDim.x} * blockDim.x;
    for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < elements; at += stride) {
        const int64_t row = at / args.width, column = at % args.width;
        int64_t count = 0;
        A sum = 0;
        for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
            const int64_t part = row * args.chunks + chunk;
            count += args.partial_counts[part];
            sum += static_cast<const A*>(args.partial_sums)[part * args.width + column];
        }
        const A scale = count > 0 ? A(1) / A(count) : A(0);
        static_cast<T*>(args.pooled)[at] = narrow<T>(sum * scale);
        if (column == 0) static_cast<A*>(args.scale)[row] = scale;
    }
}

// The gradient of a token is grad * scale, or 0 where it is masked: made once per lane, then written to every token.
template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads, 4)
    pool_backward_kernel(PoolBackward args, int64_t blocks, int64_t tiles) {
    using A = Accumulate<T>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t chunks = (args.length + kPoolTokens - 1) / kPoolTokens;
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        const PoolPlace place(block, tiles, chunks, kPoolTokens, args.length, kWarp * N);
        const int64_t column = place.column + lane * N;
        if (column >= args.width) continue;
        const bool* mask = row_of<bool>(args.mask, place.row).data;
        const Row<T> grad = row_of<T>(args.grad, place.row);
        const A scale = static_cast<const A*>(args.scale)[place.row];
        Pack<T, N> gradient;
#pragma unroll
        for (int i = 0; i < N; ++i)
            gradient.values[i] = narrow<T>(widen(grad.data[(column + i) * grad.column]) * scale);
        T* out = static_cast<T*>(args.grad_hidden) + place.row * args.length * args.width + column;
        for (int64_t l = place.begin + warp; l < place.end; l += kPoolWarps)
            gradient.store(out + l * args.width, mask[l * args.mask.column]);
    }
}

// ---- refine_prompt and squashed_log_prob: one block per row ----

// Elements [begin, begin + 4) of a row with `count` elements, as A; 0 past its end and where it is absent.
template <class T>
__device__ __forceinline__ void load4(const Row<T>& row, int64_t begin, int64_t count, Accumulate<T> (&out)[4]) {
    const T* data = row.data + begin * row.column;
    const bool vector = row.column == 1 && reinterpret_cast<uintptr_t>(data) % alignof(Pack<T, 4>) == 0;
    if (row.data != nullptr && vector && begin + 4 <= count) {
        Pack<T, 4> pack;
        pack.load(data);
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = widen(pack.values[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            out[i] = row.data != nullptr && begin + i < count ? widen(data[i * row.column]) : Accumulate<T>(0);
    }
}

template <class T>
__device__ __forceinline__ void store4(const Accumulate<T> (&values)[4], T* row, int64_t begin, int64_t count) {
    T* data = row + begin;
    if (begin + 4 <= count && reinterpret_cast<uintptr_t>(data) % alignof(Pack<T, 4>) == 0) {
        Pack<T, 4> pack;
#pragma unroll
        for (int i = 0; i < 4; ++i) pack.values[i] = narrow<T>(values[i]);
        pack.store(data);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (begin + i < count) data[i] = narrow<T>(values[i]);
    }
}

template <class A>
__device__ __forceinline__ A element(const Row<A>& row, int64_t index) {
    return row.data == nullptr ? A(0) : row.data[index * row.column];
}

// The noise of one row: as given, or from the seed.
template <class A>
struct Noise {
    Row<A> given;
    uint64_t seed;
    int64_t row;

    __device__ __forceinline__ void load4(int64_t begin, int64_t count, A (&out)[4]) const {
        if (given.data != nullptr) return cuda::load4(given, begin, count, out);
        const Normals4<A> noise = philox_normal4<A>(seed, row, begin / 4);
        out[0] = noise.n0;
        out[1] = noise.n1;
        out[2] = noise.n2;
        out[3] = noise.n3;
    }

    __device__ __forceinline__ A at(int64_t index) const {
        if (given.data != nullptr) return given.data[index * given.column];
        const Normals4<A> noise = philox_normal4<A>(seed, row, index / 4);
        const int place = static_cast<int>(index % 4);
        return place == 0 ? noise.n0 : place == 1 ? noise.n1 : place == 2 ? noise.n2 : noise.n3;
    }
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) refine_forward_kernel(RefineForward args) {
    using A = Accumulate<T>;
    const int64_t dimension = args.dimension;
    for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
        const Row<T> prompt = row_of<T>(args.prompt, b);
        const Row<A> mean = row_of<A>(args.mean, b), log_std = row_of<A>(args.log_std, b);
        const Noise<A> noise{row_of<A>(args.noise, b), args.seed, b};
        T* refined = static_cast<T*>(args.refined) + b * dimension;
        A* action = static_cast<A*>(args.action) + b * (dimension + 1);

        // Every thread computes the blend: cheaper than waiting for one that does.
        const A last_noise = noise.at(dimension), last_log_std = element(log_std, dimension);
        const A last_u = element(mean, dimension) + math::exp(last_log_std) * last_noise;
        const Squashed<A> alpha = squash_sigmoid(last_u);
        const A delta_weight = alpha.value * static_cast<A>(args.delta_scale);

        RowSums<A> sums{0, 0, 0};
        for (int64_t begin = 4 * int64_t{threadIdx.x}; begin < dimension; begin += 4 * int64_t{blockDim.x}) {
            A p[4], m[4], s[4], n[4], u[4];
            load4(prompt, begin, dimension, p);
            load4(mean, begin, dimension, m);
            load4(log_std, begin, dimension, s);
            noise.load4(begin, dimension, n);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                u[i] = m[i] + math::exp(s[i]) * n[i];
                const Squashed<A> squashed = squash_tanh(u[i]);
                p[i] += delta_weight * squashed.value;
                if (begin + i < dimension) {
                    sums.noise_squared += n[i] * n[i];
                    sums.log_std += s[i];
                    sums.log_slope += squashed.log_slope;
                }
            }
            store4(p, refined, begin, dimension);
            store4(u, action, begin, dimension);
        }
        sums.noise_squared = block_sum(sums.noise_squared) + last_noise * last_noise;
        sums.log_std = block_sum(sums.log_std) + last_log_std;
        sums.log_slope = block_sum(sums.log_slope) + alpha.log_slope;
        if (threadIdx.x == 0) {
            const Score<A> result = score(sums, dimension, args.log_delta_scale);
            action[dimension] = last_u;
            static_cast<A*>(args.log_prob)[b] = result.log_prob;
            static_cast<A*>(args.entropy)[b] = result.entropy;
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) refine_backward_kernel(RefineBackward args) {
    using A = Accumulate<T>;
    const int64_t dimension = args.dimension;
    const A delta_scale = static_cast<A>(args.delta_scale);
    for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
        const Row<T> grad_refined = row_of<T>(args.grad_refined, b);
        const Row<A> grad_action = row_of<A>(args.grad_action, b);
        const Row<A> action = row_of<A>(args.action, b), log_std = row_of<A>(args.log_std, b);
        const Noise<A> noise{row_of<A>(args.noise, b), args.seed, b};
        const A grad_determinant =
            element(row_of<A>(args.grad_entropy, b), 0) - element(row_of<A>(args.grad_log_prob, b), 0);
        A* grad_mean = args.grad_mean == nullptr ? nullptr : static_cast<A*>(args.grad_mean) + b * (dimension + 1);
        A* grad_log_std =
            args.grad_log_std == nullptr ? nullptr : static_cast<A*>(args.grad_log_std) + b * (dimension + 1);

        const Squashed<A> alpha = squash_sigmoid(element(action, dimension));
        A grad_alpha = 0;
        for (int64_t begin = 4 * int64_t{threadIdx.x}; begin < dimension; begin += 4 * int64_t{blockDim.x}) {
            A g[4], ga[4], u[4], s[4], n[4], mean[4], std[4];
            load4(grad_refined, begin, dimension, g);
            load4(grad_action, begin, dimension, ga);
            load4(action, begin, dimension, u);
            load4(log_std, begin, dimension, s);
            noise.load4(begin, dimension, n);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Squashed<A> squashed = squash_tanh(u[i]);
                const PolicyGradient<A> gradient =
                    refine_gradient(squashed, g[i] * alpha.value * delta_scale, ga[i], grad_determinant, s[i], n[i]);
                mean[i] = gradient.mean;
                std[i] = gradient.log_std;
                grad_alpha += g[i] * squashed.value;
            }
            if (grad_mean != nullptr) store4(mean, grad_mean, begin, dimension);
            if (grad_log_std != nullptr) store4(std, grad_log_std, begin, dimension);
        }
        grad_alpha = block_sum(grad_alpha);
        if (threadIdx.x == 0) {
            const PolicyGradient<A> gradient =
                refine_gradient(alpha, grad_alpha * delta_scale, element(grad_action, dimension), grad_determinant,
                                element(log_std, dimension), noise.at(dimension));
            if (grad_mean != nullptr) grad_mean[dimension] = gradient.mean;
            if (grad_log_std != nullptr) grad_log_std[dimension] = gradient.log_std;
        }
    }
}

template <class A>
__global__ void __launch_bounds__(kRowThreads) log_prob_forward_kernel(LogProbForward args) {
    for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
        const Row<A> action = row_of<A>(args.action, b), mean = row_of<A>(args.mean, b);
        const Row<A> log_std = row_of<A>(args.log_std, b);
        RowSums<A> sums{0, 0, 0};
        for (int64_t d = threadIdx.x; d <= args.dimension; d += blockDim.x) {
            const A u = element(action, d), s = element(log_std, d);
            const A n = (u - element(mean, d)) * math::exp(-s);
            sums.noise_squared += n * n;
            sums.log_std += s;
            sums.log_slope += d < args.dimension ? squash_tanh(u).log_slope : squash_sigmoid(u).log_slope;
        }
        sums.noise_squared = block_sum(sums.noise_squared);
        sums.log_std = block_sum(sums.log_std);
        sums.log_slope = block_sum(sums.log_slope);
        if (threadIdx.x == 0) {
            const Score<A> result = score(sums, args.dimension, args.log_delta_scale);
            static_cast<A*>(args.log_prob)[b] = result.log_prob;
            static_cast<A*>(args.entropy)[b] = result.entropy;
        }
    }
}

template <class A>
__global__ void __launch_bounds__(kRowThreads) log_prob_backward_kernel(LogProbBackward args) {
    const int64_t width = args.dimension + 1, elements = args.batch * width;
    A* const grad_action = static_cast<A*>(args.grad_action);
    A* const grad_mean = static_cast<A*>(args.grad_mean);
    A* const grad_log_std = static_cast<A*>(args.grad_log_std);
    const int64_t stride = int64_t{gridDim.x} * blockDim.x;
    for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < elements; at += stride) {
        const int64_t b = at / width, d = at % width;
        const A u = element(row_of<A>(args.action, b), d);
        const A slope = d < args.dimension ? squash_tanh(u).log_slope_slope : squash_sigmoid(u).log_slope_slope;
        const ActionGradient<A> gradient = log_prob_gradient(
            slope, u, element(row_of<A>(args.mean, b), d), element(row_of<A>(args.log_std, b), d),
            element(row_of<A>(args.grad_log_prob, b), 0), element(row_of<A>(args.grad_entropy, b), 0));
        if (grad_action != nullptr) grad_action[at] = gradient.action;
        if (grad_mean != nullptr) grad_mean[at] = gradient.mean;
        if (grad_log_std != nullptr) grad_log_std[at] = gradient.log_std;
    }
}

// ---- launchers ----

template <class Body>
void for_dtype(Dtype dtype, const Body& body) {
    switch (dtype) {
        case Dtype::float32:
            return body(float{});
        case Dtype::float64:
            return body(double{});
        case Dtype::float16:
            return body(__half{});
        case Dtype::bfloat16:
            return body(__nv_bfloat16{});
    }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned grid(int64_t blocks) { return static_cast<unsigned>(std::min(blocks, kMaxGrid)); }

// Threads for a row in which each takes `per_thread` elements at a time.
unsigned row_threads(int64_t elements, int64_t per_thread) {
    return static_cast<unsigned>(std::min<int64_t>(kRowThreads, kWarp * divide_up(elements, kWarp * per_thread)));
}

bool aligned(const void* pointer, int64_t stride, int64_t size) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * size % 16 == 0;
}

}  // namespace

int64_t pool_chunks(const PoolForward& args) {
    if (args.width == 0) return 1;  // nothing to sum: the one pass over the mask writes the scale
    const int64_t blocks = std::max<int64_t>(1, args.rows * divide_up(args.width, kPoolColumns));
    return std::max<int64_t>(1, std::min(kPoolBlocks / blocks, args.length / kPoolMinTokens));
}

void pool_forward(const PoolForward& args, cudaStream_t stream) {
    if (args.rows == 0) return;
    for_dtype(args.dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int kVector = 16 / sizeof(T);
        const bool vector = args.column == 1 && args.width % kVector == 0 &&
                            aligned(args.hidden, args.row, sizeof(T)) && aligned(args.hidden, args.token, sizeof(T));
        // At least one tile, whose block writes the scale.
        const int64_t tiles = std::max<int64_t>(1, divide_up(args.width, kWarp * (vector ? kVector : 1)));
        const int64_t blocks = args.rows * args.chunks * tiles;
        if (vector)
            pool_forward_kernel<T, kVector><<<grid(blocks), kPoolThreads, 0, stream>>>(args, blocks, tiles);
        else
            pool_forward_kernel<T, 1><<<grid(blocks), kPoolThreads, 0, stream>>>(args, blocks, tiles);
        if (args.chunks > 1)
            pool_combine_kernel<T>
                <<<grid(divide_up(args.rows * args.width, kRowThreads)), kRowThreads, 0, stream>>>(args);
    });
}

void pool_backward(const PoolBackward& args, cudaStream_t stream) {
    if (args.rows == 0 || args.width == 0 || args.length == 0) return;
    for_dtype(args.dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int kVector = 16 / sizeof(T);
        const bool vector = aligned(args.grad_hidden, args.width, sizeof(T));
        const int64_t tiles = divide_up(args.width, kWarp * (vector ? kVector : 1));
        const int64_t blocks = args.rows * divide_up(args.length, kPoolTokens) * tiles;
        if (vector)
            pool_backward_kernel<T, kVector><<<grid(blocks), kPoolThreads, 0, stream>>>(args, blocks, tiles);
        else
            pool_backward_kernel<T, 1><<<grid(blocks), kPoolThreads, 0, stream>>>(args, blocks, tiles);
    });
}

void refine_forward(const RefineForward& args, cudaStream_t stream) {
    if (args.batch == 0) return;
    for_dtype(args.dtype, [&](auto zero) {
        refine_forward_kernel<decltype(zero)><<<grid(args.batch), row_threads(args.dimension, 4), 0, stream>>>(args);
    });
}

void refine_backward(const RefineBackward& args, cudaStream_t stream) {
    if (args.batch == 0) return;
    for_dtype(args.dtype, [&](auto zero) {
        refine_backward_kernel<decltype(zero)><<<grid(args.batch), row_threads(args.dimension, 4), 0, stream>>>(args);
    });
}

void log_prob_forward(const LogProbForward& args, cudaStream_t stream) {
    if (args.batch == 0) return;
    const unsigned threads = row_threads(args.dimension + 1, 1);
    if (args.dtype == Dtype::float64)
        log_prob_forward_kernel<double><<<grid(args.batch), threads, 0, stream>>>(args);
    else
        log_prob_forward_kernel<float><<<grid(args.batch), threads, 0, stream>>>(args);
}

void log_prob_backward(const LogProbBackward& args, cudaStream_t stream) {
    if (args.batch == 0) return;
    const unsigned blocks = grid(divide_up(args.batch * (args.dimension + 1), kRowThreads));
    if (args.dtype == Dtype::float64)
        log_prob_backward_kernel<double><<<blocks, kRowThreads, 0, stream>>>(args);
    else
        log_prob_backward_kernel<float><<<blocks, kRowThreads, 0, stream>>>(args);
}

}  // namespace efe::prompt::cuda
