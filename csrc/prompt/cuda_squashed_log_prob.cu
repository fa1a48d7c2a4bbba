// squashed_log_prob in CUDA: one block per row forward, one thread per element backward. The derivation of the gradient
// stands in gaussian.h.
#include "common/math.h"
#include "prompt/cuda.h"
#include "prompt/cuda_device.h"
#include "prompt/gaussian.h"

namespace efe::prompt::cuda {
namespace {

template <class A>
__global__ void __launch_bounds__(kRowThreads) squashed_log_prob_forward_kernel(SquashedLogProbForward args) {
    for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
        const Row<A> action = row_of<A>(args.action, b), mean = row_of<A>(args.mean, b);
        const Row<A> log_std = row_of<A>(args.log_std, b);
        RowSums<A> sums{0, 0, 0};
        for (int64_t d = threadIdx.x; d <= args.dimension; d += blockDim.x) {
            const A u = element(action, d), s = element(log_std, d);
            const A n = over_std(u - element(mean, d), s);
            sums.noise_squared += n * n;
            sums.log_std += s;
            sums.log_slope += d < args.dimension ? squash_tanh(u).log_slope : squash_sigmoid(u).log_slope;
        }
        sums.noise_squared = block_sum(sums.noise_squared);
        sums.log_std = block_sum(sums.log_std);
        sums.log_slope = block_sum(sums.log_slope);
        if (threadIdx.x == 0)
            store_score(score(sums, args.dimension, args.log_delta_scale), b, args.log_prob, args.entropy);
    }
}

template <class A>
__global__ void __launch_bounds__(kRowThreads) squashed_log_prob_backward_kernel(SquashedLogProbBackward args) {
    const int64_t width = args.dimension + 1, elements = args.batch * width;
    A* const grad_action = static_cast<A*>(args.grad_action);
    A* const grad_mean = static_cast<A*>(args.grad_mean);
    A* const grad_log_std = static_cast<A*>(args.grad_log_std);
    const int64_t stride = int64_t{gridDim.x} * blockDim.x;
    for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < elements; at += stride) {
        const int64_t b = at / width, d = at % width;
        const A u = element(row_of<A>(args.action, b), d);
        const A slope = d < args.dimension ? squash_tanh(u).log_slope_slope : squash_sigmoid(u).log_slope_slope;
        const SquashedLogProbGradient<A> gradient = squashed_log_prob_gradient(
            slope, u, element(row_of<A>(args.mean, b), d), element(row_of<A>(args.log_std, b), d),
            element(row_of<A>(args.grad_log_prob, b), 0), element(row_of<A>(args.grad_entropy, b), 0));
        if (grad_action != nullptr) grad_action[at] = gradient.action;
        if (grad_mean != nullptr) grad_mean[at] = gradient.mean;
        if (grad_log_std != nullptr) grad_log_std[at] = gradient.log_std;
    }
}

}  // namespace

void squashed_log_prob_forward(const SquashedLogProbForward& args, cudaStream_t stream) {
    if (args.batch == 0) return;
    const unsigned threads = row_threads(args.dimension + 1, 1);
    for_arithmetic(args.dtype, [&](auto zero) {
        squashed_log_prob_forward_kernel<decltype(zero)><<<grid(args.batch), threads, 0, stream>>>(args);
    });
}

void squashed_log_prob_backward(const SquashedLogProbBackward& args, cudaStream_t stream) {
    if (args.batch == 0) return;
    const unsigned blocks = grid(divide_up(args.batch * (args.dimension + 1), kRowThreads));
    for_arithmetic(args.dtype, [&](auto zero) {
        squashed_log_prob_backward_kernel<decltype(zero)><<<blocks, kRowThreads, 0, stream>>>(args);
    });
}

}  // namespace efe::prompt::cuda
