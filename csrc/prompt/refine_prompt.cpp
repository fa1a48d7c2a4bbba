// refine_prompt on the CPU. The derivation of the gradient stands in gaussian.h.
#include <algorithm>

#include "common/math.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "prompt/cpu.h"
#include "prompt/gaussian.h"
#include "prompt/kernels.h"
#include "prompt/noise.h"
#include "prompt/tile.h"

namespace efe::prompt {
namespace {

template <class T>
void forward(const RefinePromptForward& args) {
    using A = Arithmetic<T>;
    const int64_t dimension = args.dimension;
    const A delta_scale = static_cast<A>(args.delta_scale);
    parallel(args.batch, 8 * dimension, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t b = first; b < last; ++b) {
            const Row<T> prompt = row_of<T>(args.prompt, b);
            const Row<A> mean = row_of<A>(args.mean, b), log_std = row_of<A>(args.log_std, b);
            const Noise<A> noise{row_of<A>(args.noise, b), args.seed, b};
            T* refined = static_cast<T*>(args.refined) + b * dimension;
            A* action = static_cast<A*>(args.action) + b * (dimension + 1);

            const Blend<A> blend = blend_of(element(mean, dimension), element(log_std, dimension), noise.at(dimension));
            action[dimension] = blend.u;

            TileSum<A> noise_squared, log_stds;
            LogSlopeSum<A> log_slopes;
            for (int64_t begin = 0; begin < dimension; begin += kTile) {
                const int count = static_cast<int>(std::min<int64_t>(kTile, dimension - begin));
                A p[kTile], m[kTile], s[kTile], n[kTile], u[kTile], n2[kTile], log_part[kTile], factor[kTile];
                load_tile(prompt, begin, count, p);
                load_tile(mean, begin, count, m);
                load_tile(log_std, begin, count, s);
                load_tile(noise, begin, count, n);
                for (int i = 0; i < kTile; ++i) u[i] = m[i] + math::exp(s[i]) * n[i];
                for (int i = 0; i < kTile; ++i) {
                    const TanhParts<A> squashed = squash_tanh_in_parts(u[i]);
                    p[i] += blend.alpha.value * (delta_scale * squashed.value);
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
            const RowSums<A> sums{noise_squared.total() + blend.noise * blend.noise, log_stds.total() + blend.log_std,
                                  log_slopes.total() + blend.alpha.log_slope};
            store_score(score(sums, dimension, args.log_delta_scale), b, args.log_prob, args.entropy);
        }
    });
}

template <class T>
void backward(const RefinePromptBackward& args) {
    using A = Arithmetic<T>;
    const int64_t dimension = args.dimension;
    const A delta_scale = static_cast<A>(args.delta_scale);
    parallel(args.batch, 8 * dimension, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t b = first; b < last; ++b) {
            const Row<T> grad_refined = row_of<T>(args.grad_refined, b);
            const Row<A> grad_action = row_of<A>(args.grad_action, b);
            const Row<A> action = row_of<A>(args.action, b), log_std = row_of<A>(args.log_std, b);
            const Noise<A> noise{row_of<A>(args.noise, b), args.seed, b};
            const A grad_determinant = element(row_of<A>(args.grad_entropy, b), 0) -
                                       element(row_of<A>(args.grad_log_prob, b), 0);
            A* grad_mean = result_row<A>(args.grad_mean, b, dimension + 1);
            A* grad_log_std = result_row<A>(args.grad_log_std, b, dimension + 1);

            const Squashed<A> alpha = squash_sigmoid(element(action, dimension));
            const A delta_weight = alpha.value * delta_scale;
            TileSum<A> grad_alpha;
            for (int64_t begin = 0; begin < dimension; begin += kTile) {
                const int count = static_cast<int>(std::min<int64_t>(kTile, dimension - begin));
                A g[kTile], ga[kTile], u[kTile], s[kTile], n[kTile], mean[kTile], std[kTile], delta[kTile];
                load_tile(grad_refined, begin, count, g);
                load_tile(grad_action, begin, count, ga);
                load_tile(action, begin, count, u);
                load_tile(log_std, begin, count, s);
                load_tile(noise, begin, count, n);
                for (int i = 0; i < kTile; ++i) {
                    const Squashed<A> squashed = squash_tanh(u[i]);
                    const RefinePromptGradient<A> gradient =
                        refine_prompt_gradient(squashed, g[i] * delta_weight, ga[i], grad_determinant, s[i], n[i]);
                    mean[i] = gradient.mean;
                    std[i] = gradient.log_std;
                    delta[i] = g[i] * squashed.value;
                }
                grad_alpha.add(delta);
                if (grad_mean != nullptr) convert(mean, count, grad_mean + begin);
                if (grad_log_std != nullptr) convert(std, count, grad_log_std + begin);
            }
            const RefinePromptGradient<A> last_gradient = refine_prompt_gradient(
                alpha, grad_alpha.total() * delta_scale, element(grad_action, dimension), grad_determinant,
                element(log_std, dimension), noise.at(dimension));
            if (grad_mean != nullptr) grad_mean[dimension] = last_gradient.mean;
            if (grad_log_std != nullptr) grad_log_std[dimension] = last_gradient.log_std;
        }
    });
}

}  // namespace

void Cpu::refine_prompt_forward(const RefinePromptForward& args) {
    for_dtype(args.dtype, [&](auto zero) { forward<decltype(zero)>(args); });
}

void Cpu::refine_prompt_backward(const RefinePromptBackward& args) {
    for_dtype(args.dtype, [&](auto zero) { backward<decltype(zero)>(args); });
}

}  // namespace efe::prompt
