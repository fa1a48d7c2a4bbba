// masked_mean_pool in CUDA.
#include <algorithm>

#include "prompt/cuda.h"
#include "prompt/cuda_device.h"

namespace efe::prompt::cuda {
namespace {

constexpr int kPoolWarps = 8;           // walk the tokens of a pool block, one token each at a time
constexpr int kPoolThreads = kWarp * kPoolWarps;
constexpr int kPoolUnroll = 4;          // tokens in flight per warp
constexpr int64_t kPoolBlocks = 512;    // fill the largest GPUs; a constant, so that bits depend on shapes alone
constexpr int64_t kPoolMinTokens = 64;  // per chunk in the forward
constexpr int64_t kPoolTokens = 64;     // per block in the backward
constexpr int64_t kPoolColumns = 256;   // per block, about, for the count of chunks

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
    masked_mean_pool_forward_kernel(MaskedMeanPoolForward args, int64_t blocks, int64_t tiles) {
    using A = Arithmetic<T>;
    __shared__ A sums[kPoolWarps][kWarp * N];
    __shared__ int counts[kPoolWarps];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t tokens = (args.length + args.chunks - 1) / args.chunks;
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        const PoolPlace place(block, tiles, args.chunks, tokens, args.length, kWarp * N);
        const bool* mask = row_of<bool>(args.mask, place.row).data;
        const int64_t column = place.column + lane * N;
        const bool inside = column < args.width;
        const T* hidden =
            static_cast<const T*>(args.hidden) + place.row * args.stride_row + column * args.stride_column;

        A sum[N] = {};
        int count = 0;
        for (int64_t l = place.begin + warp; l < place.end; l += kPoolWarps * kPoolUnroll) {
            Pack<T, N> token[kPoolUnroll];
            bool keep[kPoolUnroll];
#pragma unroll
            for (int k = 0; k < kPoolUnroll; ++k) {
                const int64_t at = l + k * kPoolWarps;
                keep[k] = at < place.end && mask[at * args.mask.stride_column];
                if (keep[k] && inside) token[k].load(hidden + at * args.stride_token);
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
__global__ void __launch_bounds__(kRowThreads) masked_mean_pool_combine_kernel(MaskedMeanPoolForward args) {
    using A = Arithmetic<T>;
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
    masked_mean_pool_backward_kernel(MaskedMeanPoolBackward args, int64_t blocks, int64_t tiles) {
    using A = Arithmetic<T>;
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
            gradient.values[i] = narrow<T>(widen(grad.data[(column + i) * grad.stride]) * scale);
        T* out = static_cast<T*>(args.grad_hidden) + place.row * args.length * args.width + column;
        for (int64_t l = place.begin + warp; l < place.end; l += kPoolWarps)
            gradient.store(out + l * args.width, mask[l * args.mask.stride_column]);
    }
}

bool aligned(const void* pointer, int64_t stride, int64_t size) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * size % 16 == 0;
}

}  // namespace

int64_t masked_mean_pool_chunks(const MaskedMeanPoolForward& args) {
    if (args.width == 0) return 1;  // nothing to sum: the one pass over the mask writes the scale
    const int64_t blocks = std::max<int64_t>(1, args.rows * divide_up(args.width, kPoolColumns));
    return std::max<int64_t>(1, std::min(kPoolBlocks / blocks, args.length / kPoolMinTokens));
}

void masked_mean_pool_forward(const MaskedMeanPoolForward& args, cudaStream_t stream) {
    if (args.rows == 0) return;
    for_dtype<__half, __nv_bfloat16>(args.dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int kVector = 16 / sizeof(T);
        const bool vector = args.stride_column == 1 && args.width % kVector == 0 &&
                            aligned(args.hidden, args.stride_row, sizeof(T)) &&
                            aligned(args.hidden, args.stride_token, sizeof(T));
        // At least one tile, whose block writes the scale.
        const int64_t tiles = std::max<int64_t>(1, divide_up(args.width, kWarp * (vector ? kVector : 1)));
        const int64_t blocks = args.rows * args.chunks * tiles;
        if (vector)
            masked_mean_pool_forward_kernel<T, kVector><<<grid(blocks), kPoolThreads, 0, stream>>>(args, blocks, tiles);
        else
            masked_mean_pool_forward_kernel<T, 1><<<grid(blocks), kPoolThreads, 0, stream>>>(args, blocks, tiles);
        if (args.chunks > 1)
            masked_mean_pool_combine_kernel<T>
                <<<grid(divide_up(args.rows * args.width, kRowThreads)), kRowThreads, 0, stream>>>(args);
    });
}

void masked_mean_pool_backward(const MaskedMeanPoolBackward& args, cudaStream_t stream) {
    if (args.rows == 0 || args.width == 0 || args.length == 0) return;
    for_dtype<__half, __nv_bfloat16>(args.dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int kVector = 16 / sizeof(T);
        const bool vector = aligned(args.grad_hidden, args.width, sizeof(T));
        const int64_t tiles = divide_up(args.width, kWarp * (vector ? kVector : 1));
        const int64_t blocks = args.rows * divide_up(args.length, kPoolTokens) * tiles;
        if (vector)
            masked_mean_pool_backward_kernel<T, kVector>
                <<<grid(blocks), kPoolThreads, 0, stream>>>(args, blocks, tiles);
        else
            masked_mean_pool_backward_kernel<T, 1><<<grid(blocks), kPoolThreads, 0, stream>>>(args, blocks, tiles);
    });
}

}  // namespace efe::prompt::cuda
