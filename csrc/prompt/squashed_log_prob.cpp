// squashed_log_prob on the CPU. The derivation of the gradient stands in gaussian.h.
#include <algorithm>

#include "common/dtype.h"
#include "common/math.h"
#include "common/parallel.h"
#include "prompt/cpu.h"
#include "prompt/gaussian.h"
#include "prompt/kernels.h"
#include "prompt/tile.h"

namespace efe::prompt {
namespace {

template <class A>
void forward(const SquashedLogProbForward& args) {
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
                load_tile(action, begin, count, u);
                load_tile(mean, begin, count, m);
                load_tile(log_std, begin, count, s);
                for (int i = 0; i < kTile; ++i) {
                    const A n = over_std(u[i] - m[i], s[i]);
                    const TanhParts<A> squashed = squash_tanh_in_parts(u[i]);
                    n2[i] = n * n;
                    log_part[i] = squashed.log_part;
                    factor[i] = squashed.factor;
                }
                noise_squared.add(n2);
                log_stds.add(s);
                log_slopes.add(log_part, factor, count);
            }
            const A u = element(action, dimension), s = element(log_std, dimension);
            const A n = over_std(u - element(mean, dimension), s);
            const RowSums<A> sums{noise_squared.total() + n * n, log_stds.total() + s,
                                  log_slopes.total() + squash_sigmoid(u).log_slope};
            store_score(score(sums, dimension, args.log_delta_scale), b, args.log_prob, args.entropy);
        }
    });
}

template <class A>
void backward(const SquashedLogProbBackward& args) {
    const int64_t dimension = args.dimension;
    parallel(args.batch, 4 * dimension, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        for (int64_t b = first; b < last; ++b) {
            const Row<A> action = row_of<A>(args.action, b), mean = row_of<A>(args.mean, b);
            const Row<A> log_std = row_of<A>(args.log_std, b);
            const A grad_log_prob = element(row_of<A>(args.grad_log_prob, b), 0);
            const A grad_entropy = element(row_of<A>(args.grad_entropy, b), 0);
            A* const out[3] = {result_row<A>(args.grad_action, b, dimension + 1),
                               result_row<A>(args.grad_mean, b, dimension + 1),
                               result_row<A>(args.grad_log_std, b, dimension + 1)};
            for (int64_t begin = 0; begin < dimension; begin += kTile) {
                const int count = static_cast<int>(std::min<int64_t>(kTile, dimension - begin));
                A u[kTile], m[kTile], s[kTile], gradient[3][kTile];
                load_tile(action, begin, count, u);
                load_tile(mean, begin, count, m);
                load_tile(log_std, begin, count, s);
                for (int i = 0; i < kTile; ++i) {
                    const SquashedLogProbGradient<A> at_u = squashed_log_prob_gradient(
                        squash_tanh(u[i]).log_slope_slope, u[i], m[i], s[i], grad_log_prob, grad_entropy);
                    gradient[0][i] = at_u.action;
                    gradient[1][i] = at_u.mean;
                    gradient[2][i] = at_u.log_std;
                }
                for (int k = 0; k < 3; ++k)
                    if (out[k] != nullptr) convert(gradient[k], count, out[k] + begin);
            }
            const A u = element(action, dimension);
            const SquashedLogProbGradient<A> at_u =
                squashed_log_prob_gradient(squash_sigmoid(u).log_slope_slope, u, element(mean, dimension),
                                  element(log_std, dimension), grad_log_prob, grad_entropy);
            const A last_gradient[3] = {at_u.action, at_u.mean, at_u.log_std};
            for (int k = 0; k < 3; ++k)
                if (out[k] != nullptr) out[k][dimension] = last_gradient[k];
        }
    });
}

}  // namespace

void Cpu::squashed_log_prob_forward(const SquashedLogProbForward& args) {
    for_arithmetic(args.dtype, [&](auto zero) { forward<decltype(zero)>(args); });
}

void Cpu::squashed_log_prob_backward(const SquashedLogProbBackward& args) {
    for_arithmetic(args.dtype, [&](auto zero) { backward<decltype(zero)>(args); });
}

}  // namespace efe::prompt
