// efe_loss_forward on the CPU.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/library.h"
#include "common/math.h"
#include "common/simd.h"
#include "common/sums.h"
#include "common/tensor.h"
#include "efe_loss/cells.h"
#include "efe_loss/outcomes.h"
#include "efe_loss/problem.h"
#include "efe_loss/product.h"

namespace efe::efe_loss {
namespace {

constexpr double kShortestDirection = 1e-8;

// Risk of one step, added per cell.
template <class A>
void add_risk(const A* p, const A* log_c, const A* information, int64_t outcomes, A* sum) {
    vectorized([&]() EFE_SIMD_BODY {
        A cross[kCells];
        weighted_sum(p, log_c, outcomes, cross);
        for (int64_t i = 0; i < kCells; ++i) sum[i] += information[i] - cross[i];
    });
}

template <class A>
void add_observation_entropy(const A* probs, int64_t outcomes, A* sum) {
    vectorized([&]() EFE_SIMD_BODY {
        A information[kCells];
        sum_outcomes(outcomes, [&](int64_t i) EFE_SIMD_BODY { return probs[i] * log_floored(probs[i]); }, information);
        for (int64_t i = 0; i < kCells; ++i) sum[i] -= information[i];
    });
}

// Twice the Jensen-Shannon divergence of p and q times share, added per cell; both come with their sum p log p.
template <class A>
void add_agreement(const A* p, const A* q, const A* p_information, const A* q_information, int64_t outcomes,
                   A share, A* sum) {
    vectorized([&]() EFE_SIMD_BODY {
        A information[kCells];
        const auto of_both = [&](int64_t i) EFE_SIMD_BODY { return (p[i] + q[i]) * log_floored(p[i] + q[i]); };
        sum_outcomes(outcomes, of_both, information);
        for (int64_t i = 0; i < kCells; ++i)
            sum[i] += share * (p_information[i] + q_information[i] + A(2 * math::kLn2) - information[i]);
    });
}

// Cross-entropy of the target and whether the argmax misses it, added per cell.
template <class A>
void add_cross_entropy(const A* x, const A* d, const A* l, const int64_t* target, const Block<A>& block,
                       int64_t outcomes, A* loss, A* missed) {
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    vectorized([&]() EFE_SIMD_BODY {
        A wanted[kCells] = {}, top[kCells], best[kCells] = {}, d_wanted[kCells] = {};
        for (int64_t i = 0; i < block.count; ++i) wanted[i] = static_cast<A>(static_cast<int32_t>(target[i]));
        for (int64_t i = 0; i < kCells; ++i) top[i] = -kInfinity;
        for (int64_t c = 0; c < outcomes; ++c)
            for (int64_t i = 0; i < kCells; ++i) {
                const A value = x[c * kCells + i], index = static_cast<A>(c);
                best[i] = value > top[i] ? index : best[i];
                top[i] = value > top[i] ? value : top[i];
                // An impossible outcome costs infinity, not the finite stand-in for it.
                const A exact = value == -kInfinity ? -kInfinity : d[c * kCells + i];
                d_wanted[i] = wanted[i] == index ? exact : d_wanted[i];
            }
        for (int64_t i = 0; i < kCells; ++i) {
            loss[i] += l[i] - d_wanted[i];
            missed[i] += best[i] != wanted[i] ? A(1) : A(0);
        }
    });
}

// Sums over the counted cells of the logits clamped for the prompt term.
template <class A>
void add_direction(const A* x, const Block<A>& block, int64_t outcomes, double* direction) {
    constexpr A kRange = static_cast<A>(kPromptLogitRange);
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t c = 0; c < outcomes; ++c) {
            A clamped[kCells];
            for (int64_t i = 0; i < kCells; ++i) {
                A v = x[c * kCells + i];
                v = v < -kRange ? -kRange : v;
                v = v > kRange ? kRange : v;
                clamped[i] = v * block.counted[i];
            }
            direction[c] += sum_of<kCells>(clamped);
        }
    });
}

// Everything that one block of one episode adds: sums [kSums], and direction [T, C] where the prompt term is wanted.
template <class A>
void forward_block(const Problem<A>& p, int64_t episode, const Block<A>& block, Scratch<A>& scratch, double* sums,
                   double* direction) {
    Step<A>&one = scratch.one, &other = scratch.other;
    A by_cell[kSums][kCells] = {}, is_set[kCells];
    const int64_t outcomes = p.outcomes;

    const auto add_step = [&](const Step<A>& values, int64_t step) {
        add_risk(values.p, scratch.preference.log_c, values.information, outcomes, by_cell[risk]);
        if (p.observation_probs) {
            load(p.observation_probs, episode, step, block, scratch.observation);
            add_observation_entropy(scratch.observation, outcomes, by_cell[ambiguity]);
        } else {
            for (int64_t i = 0; i < kCells; ++i) by_cell[ambiguity][i] -= values.information[i];
        }
        if (direction != nullptr) add_direction(values.logits, block, outcomes, direction + step * outcomes);
    };

    for (int64_t pair = 0; pair < p.pairs; ++pair) {
        const int64_t step = p.steps - 1 - pair, partner = p.backward_logits ? step : pair;
        load_step(p.logits, episode, step, block, one);
        add_step(one, step);
        if (p.backward_logits || step != partner) {
            load_step(p.backward_logits ? p.backward_logits : p.logits, episode, partner, block, other);
            add_agreement(one.p, other.p, one.information, other.information, outcomes,
                          p.backward_logits ? A(0.5) : A(1), by_cell[agreement]);
            if (!p.backward_logits) add_step(other, partner);
        } else {
            // The middle step is its own partner: their divergence is 0, or NaN where the step holds one.
            for (int64_t i = 0; i < kCells; ++i) by_cell[agreement][i] += A(0) * one.information[i];
        }
        if (pair == 0) {
            if (p.final_logits) load_step(p.final_logits, episode, 0, block, one);
            add_cross_entropy(one.logits, one.d, one.l, p.targets_of(episode, block), block, outcomes,
                              by_cell[consistency], by_cell[wrong_cells]);
        }
    }
    if (p.has_target_preference()) anchor_divergence(p, block, scratch.preference, by_cell[anchor], is_set);
    for (int64_t i = 0; i < kCells; ++i) by_cell[counted_cells][i] = A(1);
    for (int64_t s = 0; s < kSums; ++s) {
        for (int64_t i = 0; i < kCells; ++i) by_cell[s][i] = block.counted[i] != 0 ? by_cell[s][i] : A(0);
        sums[s] += sum_of<kCells>(by_cell[s]);
    }
}

struct Direction {
    std::vector<double> grad_z, grad_u;  // [T, C], [C]
    double term;
};

// Minus the mean over steps of cos(z, u), and its gradient with respect to each counted logit and to u = W e.
Direction prompt_direction(const double* sums, const double* u, int64_t steps, int64_t outcomes, double num_cells) {
    Direction found{std::vector<double>(steps * outcomes), std::vector<double>(outcomes), 0};
    const auto norm = [&](const double* v) {
        double square = 0;
        for (int64_t c = 0; c < outcomes; ++c) square += v[c] * v[c];
        return std::sqrt(square);
    };
    const double u_norm = norm(u);
    std::vector<double> z(outcomes);
    for (int64_t t = 0; t < steps; ++t) {
        double mean = 0, dot = 0, grad_mean = 0;
        for (int64_t c = 0; c < outcomes; ++c) mean += sums[t * outcomes + c] / outcomes;
        for (int64_t c = 0; c < outcomes; ++c) z[c] = (sums[t * outcomes + c] - mean) / num_cells;
        const double z_norm = norm(z.data());
        if (z_norm <= kShortestDirection || u_norm <= kShortestDirection) continue;
        for (int64_t c = 0; c < outcomes; ++c) dot += z[c] * u[c];
        const double cosine = dot / (z_norm * u_norm);
        found.term -= cosine / steps;
        double* grad_z = found.grad_z.data() + t * outcomes;
        for (int64_t c = 0; c < outcomes; ++c) {
            found.grad_u[c] -= (z[c] / z_norm - cosine * u[c] / u_norm) / u_norm / steps;
            grad_z[c] = -(u[c] / u_norm - cosine * z[c] / z_norm) / z_norm / steps;
            grad_mean += grad_z[c] / outcomes;
        }
        for (int64_t c = 0; c < outcomes; ++c) grad_z[c] = (grad_z[c] - grad_mean) / num_cells;
    }
    return found;
}

struct Outputs {
    Tensor total;                        // [B], or 0-d where it is reduced
    Tensor mask_ratio, hard_cell_scale;  // [B]
    Tensor terms;                        // [B, kTerms]
    // [B, ...]: the number of counted cells, then, with the prompt term, its gradients [T, C] and [C] (see Direction).
    Tensor saved;

    Outputs(int64_t batch, bool reduces, int64_t saved_width, ScalarType type, const Tensor& like)
        : total(reduces ? empty({}, type, like) : empty({batch}, type, like)),
          mask_ratio(empty({batch}, type, like)),
          hard_cell_scale(empty({batch}, type, like)),
          terms(empty({batch, kTerms}, type, like)),
          saved(empty({batch, saved_width}, type, like)) {}
};

// From the sums over all blocks of an episode to its results; u [C] is W e, null without the prompt term. Returns the
// total, which has no place of its own where it is reduced.
template <class A>
double finish_episode(const Problem<A>& p, const Settings& settings, const std::vector<double>& sums, const double* u,
                      int64_t episode, Outputs& out) {
    A* const terms = out.terms.mutable_data<A>() + episode * kTerms;
    A* const saved = out.saved.mutable_data<A>() + episode * out.saved.size(1);
    const double n = std::max(sums[counted_cells], 1.0);
    double values[kTerms] = {sums[risk] / n / p.steps,
                             sums[ambiguity] / n / p.steps,
                             sums[consistency] / n,
                             sums[agreement] < 0 ? 0.0 : sums[agreement] / n / p.steps,
                             sums[anchor] / n,
                             0,
                             sums[counted_cells] * p.steps / settings.max_cells};
    saved[0] = static_cast<A>(sums[counted_cells]);
    if (u != nullptr) {
        const Direction found = prompt_direction(sums.data() + kSums, u, p.steps, p.outcomes, n);
        values[prompt_term] = found.term;
        std::copy(found.grad_z.begin(), found.grad_z.end(), saved + 1);
        std::copy(found.grad_u.begin(), found.grad_u.end(), saved + 1 + p.steps * p.outcomes);
    }
    const double ratio = sums[wrong_cells] / n;
    const bool scaled = settings.hard_cell && !(ratio < settings.hard_cell_min_ratio);
    const double factor = scaled ? 0.5 + 0.5 * ratio : 1.0;
    double sum = 0;
    for (int64_t term = 0; term < kTerms; ++term) {
        terms[term] = static_cast<A>(values[term]);
        if (settings.weights[term] != 0) sum += settings.weights[term] * values[term];
    }
    out.mask_ratio.mutable_data<A>()[episode] = static_cast<A>(ratio);
    out.hard_cell_scale.mutable_data<A>()[episode] = static_cast<A>(factor);
    return factor * sum;
}

template <class A>
Outputs forward(const Inputs& inputs, const Settings& settings) {
    const Problem<A> p(inputs, settings.ignore_index);
    const bool has_direction = inputs.has_direction();
    Partials partials(p.batch, p.blocks, kSums + (has_direction ? p.steps * p.outcomes : 0));
    if (p.in_registers()) {
        if constexpr (std::is_same_v<A, float>) forward_in_registers(p, partials);
    } else {
        for_each_block(
            p,
            [&](const Block<A>& block, int64_t episode, int64_t, Scratch<A>& scratch) {
                double* sums = partials.of(episode, block.first / kCells);
                forward_block(p, episode, block, scratch, sums, has_direction ? sums + kSums : nullptr);
            },
            [](const Block<A>&, int64_t, Scratch<A>&) {});
    }
    std::vector<double> u(has_direction ? p.batch * p.outcomes : 0);  // [B, C]
    if (has_direction) product(table_of(*inputs.prompt), table_of(*inputs.projection).transposed(), u.data());
    Outputs out(p.batch, settings.reduces(), has_direction ? 1 + (p.steps + 1) * p.outcomes : 1,
                CppTypeToScalarType<A>::value, inputs.logits);
    A* const total = out.total.mutable_data<A>();
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
        const double* const own = has_direction ? u.data() + b * p.outcomes : nullptr;
        const double found = finish_episode(p, settings, partials.total(b), own, b, out);
        if (settings.reduces())
            sum += found;
        else
            total[b] = static_cast<A>(found);
    }
    if (settings.reduces()) *total = static_cast<A>(sum * settings.share(p.batch));
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> efe_loss_forward(
    const Tensor& logits, const OptionalTensor& backward_logits, const OptionalTensor& final_logits,
    const OptionalTensor& observation_probs, const Tensor& preference_logits, const OptionalTensor& prompt,
    const OptionalTensor& projection, const Tensor& target, const OptionalTensor& target_preference,
    const OptionalTensor& valid, const std::vector<double>& weights, bool hard_cell, double hard_cell_min_ratio,
    int64_t max_cells, int64_t ignore_index, const std::string& reduction) {
    const Inputs inputs{logits, backward_logits, final_logits, observation_probs, preference_logits,
                        prompt, projection,      target,       target_preference, valid};
    const Settings settings{weights, hard_cell, hard_cell_min_ratio, max_cells, ignore_index, reduction};
    Outputs out = logits.scalar_type() == ScalarType::Double ? forward<double>(inputs, settings)
                                                             : forward<float>(inputs, settings);
    return {std::move(out.total), std::move(out.terms), std::move(out.mask_ratio), std::move(out.hard_cell_scale),
            std::move(out.saved)};
}

STABLE_TORCH_LIBRARY_IMPL(efe, CPU, library) { implement<efe_loss_forward>(library, "efe_loss_forward"); }

}  // namespace
}  // namespace efe::efe_loss
