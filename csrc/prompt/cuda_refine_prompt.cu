// refine_prompt in CUDA: one block per row. The derivation of the gradient stands in gaussian.h.
#include "common/math.h"
#include "prompt/cuda.h"
#include "prompt/cuda_device.h"
#include "prompt/gaussian.h"
#include "prompt/noise.h"

namespace efe::prompt::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) refine_prompt_forward_kernel(RefinePromptForward args) {
    using A = Arithmetic<T>;
    const int64_t dimension = args.dimension;
    for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
        const Row<T> prompt = row_of<T>(args.prompt, b);
        const Row<A> mean = row_of<A>(args.mean, b), log_std = row_of<A>(args.log_std, b);
        const Noise<A> noise{row_of<A>(args.noise, b), args.seed, b};
        T* refined = static_cast<T*>(args.refined) + b * dimension;
        A* action = static_cast<A*>(args.action) + b * (dimension + 1);

        // Every thread computes the blend: cheaper than waiting for one that does.
        const Blend<A> blend = blend_of(element(mean, dimension), element(log_std, dimension), noise.at(dimension));
        const A delta_weight = blend.alpha.value * static_cast<A>(args.delta_scale);

        RowSums<A> sums{0, 0, 0};
        for (int64_t begin = 4 * int64_t{threadIdx.x}; begin < dimension; begin += 4 * int64_t{blockDim.x}) {
            A p[4], m[4], s[4], n[4], u[4];
            load4(prompt, begin, dimension, p);
            load4(mean, begin, dimension, m);
            load4(log_std, begin, dimension, s);
            load4(noise, begin, dimension, n);
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
        sums.noise_squared = block_sum(sums.noise_squared) + blend.noise * blend.noise;
        sums.log_std = block_sum(sums.log_std) + blend.log_std;
        sums.log_slope = block_sum(sums.log_slope) + blend.alpha.log_slope;
        if (threadIdx.x == 0) {
            action[dimension] = blend.u;
            store_score(score(sums, dimension, args.log_delta_scale), b, args.log_prob, args.entropy);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) refine_prompt_backward_kernel(RefinePromptBackward args) {
    using A = Arithmetic<T>;
    const int64_t dimension = args.dimension;
    const A delta_scale = static_cast<A>(args.delta_scale);
    for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
        const Row<T> grad_refined = row_of<T>(args.grad_refined, b);
        const Row<A> grad_action = row_of<A>(args.grad_action, b);
        const Row<A> action = row_of<A>(args.action, b), log_std = row_of<A>(args.log_std, b);
        const Noise<A> noise{row_of<A>(args.noise, b), args.seed, b};
        const A grad_determinant =
            element(row_of<A>(args.grad_entropy, b), 0) - element(row_of<A>(args.grad_log_prob, b), 0);
        A* grad_mean = result_row<A>(args.grad_mean, b, dimension + 1);
        A* grad_log_std = result_row<A>(args.grad_log_std, b, dimension + 1);

        const Squashed<A> alpha = squash_sigmoid(element(action, dimension));
        A grad_alpha = 0;
        for (int64_t begin = 4 * int64_t{threadIdx.x}; begin < dimension; begin += 4 * int64_t{blockDim.x}) {
            A g[4], ga[4], u[4], s[4], n[4], mean[4], std[4];
            load4(grad_refined, begin, dimension, g);
            load4(grad_action, begin, dimension, ga);
            load4(action, begin, dimension, u);
            load4(log_std, begin, dimension, s);
            load4(noise, begin, dimension, n);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Squashed<A> squashed = squash_tanh(u[i]);
                const RefinePromptGradient<A> gradient = refine_prompt_gradient(
                    squashed, g[i] * alpha.value * delta_scale, ga[i], grad_determinant, s[i], n[i]);
                mean[i] = gradient.mean;
                std[i] = gradient.log_std;
                grad_alpha += g[i] * squashed.value;
            }
            if (grad_mean != nullptr) store4(mean, grad_mean, begin, dimension);
            if (grad_log_std != nullptr) store4(std, grad_log_std, begin, dimension);
        }
        grad_alpha = block_sum(grad_alpha);
        if (threadIdx.x == 0) {
            const RefinePromptGradient<A> gradient = refine_prompt_gradient(
                alpha, grad_alpha * delta_scale, element(grad_action, dimension), grad_determinant,
                element(log_std, dimension), noise.at(dimension));
            if (grad_mean != nullptr) grad_mean[dimension] = gradient.mean;
            if (grad_log_std != nullptr) grad_log_std[dimension] = gradient.log_std;
        }
    }
}

}  // namespace

void refine_prompt_forward(const RefinePromptForward& args, cudaStream_t stream) {
    if (args.batch == 0) return;
    for_dtype<__half, __nv_bfloat16>(args.dtype, [&](auto zero) {
        refine_prompt_forward_kernel<decltype(zero)>
            <<<grid(args.batch), row_threads(args.dimension, 4), 0, stream>>>(args);
    });
}

void refine_prompt_backward(const RefinePromptBackward& args, cudaStream_t stream) {
    if (args.batch == 0) return;
    for_dtype<__half, __nv_bfloat16>(args.dtype, [&](auto zero) {
        refine_prompt_backward_kernel<decltype(zero)>
            <<<grid(args.batch), row_threads(args.dimension, 4), 0, stream>>>(args);
    });
}

}  // namespace efe::prompt::cuda
