// The squashed Gaussian, one component at a time: what the CPU and the CUDA kernels compute, in A = float or double.
// With u = mean + std n: delta = s tanh(u) for the first D components, alpha = sigmoid(u) for the last one.
#pragma once

#include <cmath>

#include "common/inline.h"
#include "common/math.h"

namespace efe::prompt {

// log(sqrt(2 pi)), and that of sqrt(2 pi e).
constexpr double kLogNormalizer = 0.91893853320467274178;
constexpr double kEntropyConstant = kLogNormalizer + 0.5;

// A squashing function at u: its value, its derivative and the logarithm of that, and the derivative of that logarithm.
template <class A>
struct Squashed {
    A value, slope, log_slope, log_slope_slope;
};

// tanh, from e = exp(-2|u|): |tanh| = (1 - e) / (1 + e), tanh' = 4 e / (1 + e)^2,
// log tanh' = 2 (ln 2 - |u| - log(1 + e)), derivative -2 tanh.
template <class A>
EFE_INLINE Squashed<A> squash_tanh(A u) {
    const A magnitude = std::abs(u);
    const math::Exponential<A> e = math::exponential(A(-2) * magnitude);
    const A inverse = A(1) / (A(1) + e.value);
    const A value = std::copysign(-e.minus_one * inverse, u);
    const A log_slope = A(2) * (A(math::kLn2) - magnitude - math::log1p_unit(e.value));
    return {value, A(4) * e.value * inverse * inverse, log_slope, A(-2) * value};
}

// tanh for a sum of log tanh' over many u, which takes the logarithms of all factors together:
// log tanh' = 2 (log_part - log(factor)), with the factor in [1, 2].
template <class A>
struct TanhParts {
    A value, log_part, factor;
};

template <class A>
EFE_INLINE TanhParts<A> squash_tanh_in_parts(A u) {
    const A magnitude = std::abs(u);
    const math::Exponential<A> e = math::exponential(A(-2) * magnitude);
    const A factor = A(1) + e.value;
    return {std::copysign(-e.minus_one / factor, u), A(math::kLn2) - magnitude, factor};
}

// sigmoid, from e = exp(-|u|): sigmoid' = e / (1 + e)^2, log sigmoid' = -|u| - 2 log(1 + e), derivative -tanh(u / 2).
template <class A>
EFE_INLINE Squashed<A> squash_sigmoid(A u) {
    const A magnitude = std::abs(u);
    const math::Exponential<A> e = math::exponential(-magnitude);
    const A inverse = A(1) / (A(1) + e.value);
    const A value = (u < A(0) ? e.value : A(1)) * inverse;
    const A log_slope = -magnitude - A(2) * math::log1p_unit(e.value);
    return {value, e.value * inverse * inverse, log_slope, std::copysign(e.minus_one * inverse, -u)};
}

// x / std. By the root of 1 / std, twice: 1 / std itself is below the smallest number before the quotient is.
template <class A>
EFE_INLINE A over_std(A x, A log_std) {
    const A root = math::exp(A(-0.5) * log_std);
    return x * root * root;
}

// The last component of a row: alpha, what it is made of, and its noise.
template <class A>
struct Blend {
    A noise, log_std, u;
    Squashed<A> alpha;
};

template <class A>
EFE_INLINE Blend<A> blend_of(A mean, A log_std, A noise) {
    const A u = mean + math::exp(log_std) * noise;
    return {noise, log_std, u, squash_sigmoid(u)};
}

// Per row: sums over all D + 1 components (log_slope includes that of alpha) -> log_prob and entropy of (delta, alpha).
template <class A>
struct RowSums {
    A noise_squared, log_std, log_slope;
};

template <class A>
struct Score {
    A log_prob, entropy;
};

template <class A>
EFE_INLINE Score<A> score(const RowSums<A>& sums, int64_t dimension, double log_delta_scale) {
    const A components = static_cast<A>(dimension + 1);
    const A log_determinant = sums.log_slope + static_cast<A>(dimension) * static_cast<A>(log_delta_scale);
    const A log_normal = A(-0.5) * sums.noise_squared - sums.log_std - components * A(kLogNormalizer);
    return {log_normal - log_determinant, sums.log_std + components * A(kEntropyConstant) + log_determinant};
}

// log_prob, entropy: [B].
template <class A>
EFE_INLINE void store_score(const Score<A>& score, int64_t row, void* log_prob, void* entropy) {
    static_cast<A*>(log_prob)[row] = score.log_prob;
    static_cast<A*>(entropy)[row] = score.entropy;
}

// refine_prompt backward. With the noise fixed, u = mean + std n is the only way to the mean, and
// log N(u) = -n^2/2 - log_std - const does not depend on u. With J the log-determinant, the gradient arriving at u is
//     g_u = grad_refined . d refined / du + grad_action + (grad_entropy - grad_log_prob) J'(u)
// and then d mean = g_u, d log_std = g_u std n + (grad_entropy - grad_log_prob). The caller gives `grad_squashed`, the
// gradient of the squashed value: grad_refined alpha s for tanh, sum_d grad_refined_d s tanh(u_d) for sigmoid.
template <class A>
struct RefinePromptGradient {
    A mean, log_std;
};

template <class A>
EFE_INLINE RefinePromptGradient<A> refine_prompt_gradient(
    const Squashed<A>& at_u, A grad_squashed, A grad_action, A grad_determinant, A log_std, A noise) {
    const A mean = grad_squashed * at_u.slope + grad_action + grad_determinant * at_u.log_slope_slope;
    return {mean, mean * math::exp(log_std) * noise + grad_determinant};
}

// squashed_log_prob backward. With n = (u - mean) / std: d mean = grad_log_prob n / std,
// d u = -d mean + (grad_entropy - grad_log_prob) J'(u), d log_std = grad_log_prob (n^2 - 1) + grad_entropy.
template <class A>
struct SquashedLogProbGradient {
    A action, mean, log_std;
};

template <class A>
EFE_INLINE SquashedLogProbGradient<A> squashed_log_prob_gradient(
    A log_slope_slope, A action, A mean, A log_std, A grad_log_prob, A grad_entropy) {
    const A noise = over_std(action - mean, log_std);
    const A grad_mean = over_std(grad_log_prob * noise, log_std);
    return {(grad_entropy - grad_log_prob) * log_slope_slope - grad_mean, grad_mean,
            grad_log_prob * (noise * noise - A(1)) + grad_entropy};
}

}  // namespace efe::prompt
