// masked_mean_pool on the CPU.
#include <algorithm>
#include <cstring>

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "prompt/cpu.h"
#include "prompt/kernels.h"
#include "prompt/tile.h"

namespace efe::prompt {
namespace {

constexpr int kPoolTile = 1024;     // columns of a hidden state at a time
constexpr int64_t kPoolChunk = 64;  // tokens whose gradients one task writes

template <class T>
void forward(const MaskedMeanPoolForward& args) {
    using A = Arithmetic<T>;
    // At least one tile, whose task writes the scale.
    const int64_t tiles = std::max<int64_t>(1, (args.width + kPoolTile - 1) / kPoolTile);
    parallel(args.rows * tiles, args.length * kPoolTile, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t task = first; task < last; ++task) {
            const int64_t n = task / tiles, begin = task % tiles * kPoolTile;
            const int count = static_cast<int>(std::min<int64_t>(kPoolTile, args.width - begin));
            const Row<bool> mask = row_of<bool>(args.mask, n);
            const T* hidden = static_cast<const T*>(args.hidden) + n * args.stride_row + begin * args.stride_column;
            A sum[kPoolTile];
            std::fill_n(sum, count, A(0));
            int64_t tokens = 0;
            for (int64_t l = 0; l < args.length; ++l) {
                if (!mask.data[l * mask.stride]) continue;
                ++tokens;
                const T* token = hidden + l * args.stride_token;
                if (args.stride_column == 1) {
                    for (int i = 0; i < count; ++i) sum[i] += static_cast<A>(token[i]);
                } else {
                    for (int i = 0; i < count; ++i) sum[i] += static_cast<A>(token[i * args.stride_column]);
                }
            }
            const A scale = tokens > 0 ? A(1) / static_cast<A>(tokens) : A(0);
            for (int i = 0; i < count; ++i) sum[i] *= scale;
            convert<kPoolTile>(sum, count, static_cast<T*>(args.pooled) + n * args.width + begin);
            if (begin == 0) static_cast<A*>(args.scale)[n] = scale;
        }
    });
}

template <class T>
void backward(const MaskedMeanPoolBackward& args) {
    using A = Arithmetic<T>;
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
                    values[i] = scale * static_cast<A>(grad.data[(begin + i) * grad.stride]);
                convert<kPoolTile>(values, count, gradient);
                for (int64_t l = from; l < to; ++l) {
                    T* token = out + l * args.width + begin;
                    if (mask.data[l * mask.stride])
                        std::memcpy(static_cast<void*>(token), gradient, count * sizeof(T));
                    else
                        std::memset(static_cast<void*>(token), 0, count * sizeof(T));
                }
            }
        }
    });
}

}  // namespace

void Cpu::masked_mean_pool_forward(const MaskedMeanPoolForward& args) {
    for_dtype(args.dtype, [&](auto zero) { forward<decltype(zero)>(args); });
}

void Cpu::masked_mean_pool_backward(const MaskedMeanPoolBackward& args) {
    for_dtype(args.dtype, [&](auto zero) { backward<decltype(zero)>(args); });
}

}  // namespace efe::prompt
