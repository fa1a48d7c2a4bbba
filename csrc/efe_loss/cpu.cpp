// The EFE loss on the CPU, fused as in efe_kernels/efe_loss/kernels.py, where the derivation of the gradient stands.
//
// Work is split into (block of cells, chunk of episodes), whose number depends on the shape alone. Each writes partial
// sums of its own, which are added up in a fixed order: the same bits with any number of threads.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/math.h"
#include "common/simd.h"
#include "efe_loss/plan.h"

namespace efe::efe_loss {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kTerms = 7;
enum Term { risk, ambiguity, consistency, agreement, anchor, prompt_term, step_term };
// What forward sums over cells, beside the direction of the plan: the first five terms, wrong cells, cells.
constexpr int64_t kSums = 7;
enum Sum { wrong = 5, cells = 6 };
constexpr int64_t kChunks = 16;
constexpr int64_t kRun = 32;  // outcomes that are added up before they join a sum

constexpr double kLowestLogit = -1e30;
constexpr double kPromptLogitRange = 1e4;
constexpr double kTargetPreferenceFloor = 1e-8;
constexpr double kShortestDirection = 1e-8;

// The inputs as the kernels read them. Small tensors are converted once: log-free copies, one row of cells per outcome.
template <class A>
struct Problem {
    int64_t batch, steps, num_cells, outcomes, blocks, chunks, pairs;
    Plan logits, backward, final, observation, preference;
    at::Tensor target, counted, scales, target_preference, log_target_preference;
    bool has_prompt, preference_per_episode, has_target_preference;

    int64_t chunk_size() const { return (batch + chunks - 1) / chunks; }
};

void check_range(const at::Tensor& target, const at::Tensor& counted, int64_t outcomes) {
    const int64_t* targets = target.const_data_ptr<int64_t>();
    const bool* counts = counted.const_data_ptr<bool>();
    for (int64_t i = 0; i < target.numel(); ++i)
        TORCH_CHECK_VALUE(!counts[i] || (targets[i] >= 0 && targets[i] < outcomes), "target must be in [0, ", outcomes,
                          ") or ignore_index where a cell counts, it was ", targets[i], ".");
}

template <class A>
Problem<A> problem_of(const at::Tensor& logits, const OptionalTensor& backward_logits,
                      const OptionalTensor& final_logits, const OptionalTensor& observation_probs,
                      const at::Tensor& preference_logits, const OptionalTensor& prompt, const at::Tensor& target,
                      const OptionalTensor& target_preference, const OptionalTensor& valid, int64_t ignore_index) {
    constexpr at::ScalarType type = c10::CppTypeToScalarType<A>::value;
    Problem<A> p{};
    p.batch = logits.size(0);
    p.steps = logits.size(1);
    p.num_cells = logits.size(2) * logits.size(3);
    p.outcomes = logits.size(4);
    p.blocks = (p.num_cells + kLanes - 1) / kLanes;
    p.chunks = std::min(p.batch, kChunks);
    p.pairs = backward_logits.has_value() ? p.steps : (p.steps + 1) / 2;
    p.logits = plan_of(logits);
    if (backward_logits.has_value()) p.backward = plan_of(*backward_logits);
    if (final_logits.has_value()) p.final = plan_of(final_logits->unsqueeze(1));
    if (observation_probs.has_value()) p.observation = plan_of(*observation_probs);
    p.preference_per_episode = preference_logits.dim() == 4;
    const at::Tensor preference = p.preference_per_episode ? preference_logits : preference_logits.unsqueeze(0);
    p.preference = plan_of(preference.unsqueeze(1));
    if (!p.preference_per_episode) p.preference.episode = 0;
    p.target = target.to(at::kLong).contiguous();
    p.counted = p.target.ne(ignore_index);
    if (valid.has_value()) p.counted.logical_and_(*valid);
    check_range(p.target, p.counted, p.outcomes);
    p.has_prompt = prompt.has_value();
    if (p.has_prompt) p.scales = prompt->narrow(1, 0, p.outcomes).to(type).sigmoid().contiguous();
    p.has_target_preference = target_preference.has_value();
    if (p.has_target_preference) {
        p.target_preference = target_preference->to(type).flatten(0, 1).t().contiguous();
        p.log_target_preference = p.target_preference.clamp_min(kTargetPreferenceFloor).log();
    }
    return p;
}

template <class A>
struct Scratch {
    explicit Scratch(int64_t outcomes) : size(outcomes * kLanes), storage(size * 12) {}
    A* row(int index) { return storage.data() + index * size; }
    int64_t size;
    std::vector<A> storage;
};

// Every function below that loops over lanes does so under `vectorized`; what lies between them is cheap.
template <class A>
void count_cells(const Problem<A>& p, int64_t episode, Block<A>& block) {
    const bool* counted = p.counted.template const_data_ptr<bool>() + episode * p.num_cells + block.first;
    for (int64_t i = 0; i < kLanes; ++i) block.counted[i] = i < block.count && counted[i] ? A(1) : A(0);
}

// sum over the outcomes of term(i), i from c kLanes to (c + 1) kLanes. In runs, because the rounding of one long sum
// grows with the number of outcomes.
template <class A, class Term>
EFE_INLINE void sum_outcomes(int64_t outcomes, const Term& term, A* sum) {
    for (int64_t i = 0; i < kLanes; ++i) sum[i] = 0;
    for (int64_t first = 0; first < outcomes; first += kRun) {
        A run[kLanes] = {};
        for (int64_t c = first; c < std::min(first + kRun, outcomes); ++c)
            for (int64_t i = 0; i < kLanes; ++i) run[i] += term(c * kLanes + i);
        for (int64_t i = 0; i < kLanes; ++i) sum[i] += run[i];
    }
}

// sum of p x over the outcomes.
template <class A>
EFE_INLINE void weighted_sum(const A* p, const A* x, int64_t outcomes, A* sum) {
    sum_outcomes(outcomes, [&](int64_t i) EFE_SIMD_BODY { return p[i] * x[i]; }, sum);
}

// Probabilities, d and l with log p = d - l, and sum p log p.
template <class A>
void softmax(const A* x, int64_t outcomes, A* p, A* d, A* l, A* information) {
    vectorized([&]() EFE_SIMD_BODY {
        A top[kLanes], sum[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) top[i] = x[i];
        for (int64_t c = 1; c < outcomes; ++c)
            for (int64_t i = 0; i < kLanes; ++i) top[i] = x[c * kLanes + i] > top[i] ? x[c * kLanes + i] : top[i];
        for (int64_t c = 0; c < outcomes; ++c) {
            EFE_INDEPENDENT
            for (int64_t i = 0; i < kLanes; ++i) {
                A shifted = x[c * kLanes + i] - top[i];
                // -inf is kept finite, so that 0 * log 0 is 0; a NaN stays one.
                shifted = shifted < A(kLowestLogit) ? A(kLowestLogit) : shifted;
                const A e = math::exp(shifted);
                d[c * kLanes + i] = shifted;
                p[c * kLanes + i] = e;
            }
        }
        sum_outcomes(outcomes, [&](int64_t i) EFE_SIMD_BODY { return p[i]; }, sum);
        for (int64_t i = 0; i < kLanes; ++i) {
            l[i] = math::log_normal_range(sum[i]);
            sum[i] = A(1) / sum[i];
        }
        for (int64_t c = 0; c < outcomes; ++c)
            for (int64_t i = 0; i < kLanes; ++i) p[c * kLanes + i] *= sum[i];
        weighted_sum(p, d, outcomes, information);
        for (int64_t i = 0; i < kLanes; ++i) information[i] -= l[i];
    });
}

template <class A>
EFE_INLINE A log_floored(A x) {
    constexpr A kSmallest = std::numeric_limits<A>::min();
    return math::log_normal_range(x < kSmallest ? kSmallest : x);
}

template <class A>
EFE_INLINE A lane_sum(const A* values) {
    LaneSum<A> sum;
    sum.add(values, kLanes);
    return sum.total();
}

// c, log c and the unscaled preference logits of the block.
template <class A>
void log_preference(const Problem<A>& p, int64_t episode, const Block<A>& block, A* scaled, A* c, A* log_c, A* logits) {
    load(p.preference, episode, 0, block, logits);
    const A* scales = p.has_prompt ? p.scales.template const_data_ptr<A>() + episode * p.outcomes : nullptr;
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t k = 0; k < p.outcomes; ++k) {
            const A scale = scales != nullptr ? scales[k] : A(1);
            for (int64_t i = k * kLanes; i < (k + 1) * kLanes; ++i) {
                logits[i] = logits[i] < A(kLowestLogit) ? A(kLowestLogit) : logits[i];
                scaled[i] = logits[i] * scale;
            }
        }
    });
    A l[kLanes], unused[kLanes];
    softmax(scaled, p.outcomes, c, log_c, l, unused);
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t k = 0; k < p.outcomes; ++k)
            for (int64_t i = 0; i < kLanes; ++i) log_c[k * kLanes + i] -= l[i];
    });
}

// KL(c || target preference) per lane, 0 where it is not set; is_set as 0 or 1.
template <class A>
void anchor_divergence(const Problem<A>& p, const Block<A>& block, const A* c, const A* log_c, A* divergence,
                       A* is_set) {
    const A* anchors = p.target_preference.template const_data_ptr<A>() + block.first;
    const A* logs = p.log_target_preference.template const_data_ptr<A>() + block.first;
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t i = 0; i < kLanes; ++i) divergence[i] = is_set[i] = 0;
        for (int64_t first = 0; first < p.outcomes; first += kRun) {
            A run[kLanes] = {};
            for (int64_t k = first; k < std::min(first + kRun, p.outcomes); ++k)
                for (int64_t i = 0; i < block.count; ++i) {
                    is_set[i] += anchors[k * p.num_cells + i];
                    run[i] += c[k * kLanes + i] * (log_c[k * kLanes + i] - logs[k * p.num_cells + i]);
                }
            for (int64_t i = 0; i < kLanes; ++i) divergence[i] += run[i];
        }
        for (int64_t i = 0; i < kLanes; ++i) {
            is_set[i] = is_set[i] != 0 ? A(1) : A(0);
            divergence[i] = is_set[i] != 0 ? divergence[i] : A(0);
        }
    });
}

// Risk of one step, added per lane.
template <class A>
void add_risk(const A* p, const A* log_c, const A* information, int64_t outcomes, A* sum) {
    vectorized([&]() EFE_SIMD_BODY {
        A cross[kLanes];
        weighted_sum(p, log_c, outcomes, cross);
        for (int64_t i = 0; i < kLanes; ++i) sum[i] += information[i] - cross[i];
    });
}

template <class A>
void add_observation_entropy(const A* probs, int64_t outcomes, A* sum) {
    vectorized([&]() EFE_SIMD_BODY {
        A information[kLanes];
        sum_outcomes(outcomes, [&](int64_t i) EFE_SIMD_BODY { return probs[i] * log_floored(probs[i]); }, information);
        for (int64_t i = 0; i < kLanes; ++i) sum[i] -= information[i];
    });
}

// Twice the Jensen-Shannon divergence of p and q times share, added per lane; both come with their sum p log p.
template <class A>
void add_agreement(const A* p, const A* q, const A* p_information, const A* q_information, int64_t outcomes,
                   A share, A* sum) {
    vectorized([&]() EFE_SIMD_BODY {
        A information[kLanes];
        const auto of_both = [&](int64_t i) EFE_SIMD_BODY { return (p[i] + q[i]) * log_floored(p[i] + q[i]); };
        sum_outcomes(outcomes, of_both, information);
        for (int64_t i = 0; i < kLanes; ++i)
            sum[i] += share * (p_information[i] + q_information[i] + A(2 * math::kLn2) - information[i]);
    });
}

// Cross-entropy of the target and whether the argmax misses it, added per lane.
template <class A>
void add_cross_entropy(const A* x, const A* d, const A* l, const int64_t* target, const Block<A>& block,
                       int64_t outcomes, A* loss, A* missed) {
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    vectorized([&]() EFE_SIMD_BODY {
        A wanted[kLanes] = {}, top[kLanes], best[kLanes] = {}, d_wanted[kLanes] = {};
        for (int64_t i = 0; i < block.count; ++i) wanted[i] = static_cast<A>(static_cast<int32_t>(target[i]));
        for (int64_t i = 0; i < kLanes; ++i) top[i] = -kInfinity;
        for (int64_t c = 0; c < outcomes; ++c)
            for (int64_t i = 0; i < kLanes; ++i) {
                const A value = x[c * kLanes + i], index = static_cast<A>(c);
                best[i] = value > top[i] ? index : best[i];
                top[i] = value > top[i] ? value : top[i];
                // An impossible outcome costs infinity, not the finite stand-in for it.
                const A exact = value == -kInfinity ? -kInfinity : d[c * kLanes + i];
                d_wanted[i] = wanted[i] == index ? exact : d_wanted[i];
            }
        for (int64_t i = 0; i < kLanes; ++i) {
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
            A clamped[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                A v = x[c * kLanes + i];
                v = v < -kRange ? -kRange : v;
                v = v > kRange ? kRange : v;
                clamped[i] = v * block.counted[i];
            }
            direction[c] += lane_sum(clamped);
        }
    });
}

// Everything that one block of one episode adds: sums [kSums], and direction [T, C] where the prompt term is wanted.
template <class A>
void forward_block(const Problem<A>& p, int64_t episode, const Block<A>& block, const A* c, const A* log_c,
                   Scratch<A>& scratch, double* sums, double* direction) {
    A *x = scratch.row(0), *d = scratch.row(1), *ps = scratch.row(2);
    A *y = scratch.row(3), *e = scratch.row(4), *qs = scratch.row(5), *probs = scratch.row(6);
    A l[kLanes], k[kLanes], x_information[kLanes], y_information[kLanes], is_set[kLanes];
    A lanes[kSums][kLanes] = {};
    const int64_t outcomes = p.outcomes;

    const auto add_step = [&](const A* logits, int64_t step, const A* prob, const A* information) {
        add_risk(prob, log_c, information, outcomes, lanes[risk]);
        if (p.observation) {
            load(p.observation, episode, step, block, probs);
            add_observation_entropy(probs, outcomes, lanes[ambiguity]);
        } else {
            for (int64_t i = 0; i < kLanes; ++i) lanes[ambiguity][i] -= information[i];
        }
        if (direction != nullptr) add_direction(logits, block, outcomes, direction + step * outcomes);
    };

    for (int64_t pair = 0; pair < p.pairs; ++pair) {
        const int64_t step = p.steps - 1 - pair, other = p.backward ? step : pair;
        load(p.logits, episode, step, block, x);
        softmax(x, outcomes, ps, d, l, x_information);
        add_step(x, step, ps, x_information);
        if (p.backward || step != other) {
            load(p.backward ? p.backward : p.logits, episode, other, block, y);
            softmax(y, outcomes, qs, e, k, y_information);
            add_agreement(ps, qs, x_information, y_information, outcomes, p.backward ? A(0.5) : A(1), lanes[agreement]);
            if (!p.backward) add_step(y, other, qs, y_information);
        }
        if (pair == 0) {
            const int64_t* target = p.target.template const_data_ptr<int64_t>() + episode * p.num_cells + block.first;
            if (p.final) {
                load(p.final, episode, 0, block, x);
                softmax(x, outcomes, ps, d, l, x_information);
            }
            add_cross_entropy(x, d, l, target, block, outcomes, lanes[consistency], lanes[wrong]);
        }
    }
    if (p.has_target_preference) anchor_divergence(p, block, c, log_c, lanes[anchor], is_set);
    for (int64_t i = 0; i < kLanes; ++i) lanes[cells][i] = A(1);
    for (int64_t s = 0; s < kSums; ++s) {
        for (int64_t i = 0; i < kLanes; ++i) lanes[s][i] = block.counted[i] != 0 ? lanes[s][i] : A(0);
        sums[s] += lane_sum(lanes[s]);
    }
}

// Runs body(block, episode, c, log c, unscaled preference logits, scratch) for every block and every episode of each
// chunk, and between(block, chunk, scratch) after the episodes of a chunk.
template <class A, class Body, class Between>
void for_each_block(const Problem<A>& p, const Body& body, const Between& between) {
    at::parallel_for(0, p.blocks * p.chunks, 1, [&](int64_t begin, int64_t end) {
        Scratch<A> scratch(p.outcomes);
        A *scaled = scratch.row(8), *c = scratch.row(9), *log_c = scratch.row(10), *logits = scratch.row(11);
        for (int64_t task = begin; task < end; ++task) {
            Block<A> block{task / p.chunks * kLanes, 0, {}};
            block.count = std::min(kLanes, p.num_cells - block.first);
            const int64_t chunk = task % p.chunks, first = chunk * p.chunk_size();
            for (int64_t episode = first; episode < std::min(first + p.chunk_size(), p.batch); ++episode) {
                count_cells(p, episode, block);
                log_preference(p, episode, block, scaled, c, log_c, logits);
                body(block, episode, chunk, c, log_c, logits, scratch);
            }
            between(block, chunk, scratch);
        }
    });
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

template <class A>
void finish_episode(const Problem<A>& p, const double* partial, int64_t width, const double* direction_u,
                    const std::vector<double>& weights, bool hard_cell, double min_ratio, int64_t max_cells,
                    A* total, A* terms, A* mask_ratio, A* scale, A* residual) {
    std::vector<double> sums(width);
    for (int64_t block = 0; block < p.blocks; ++block)
        for (int64_t i = 0; i < width; ++i) sums[i] += partial[block * width + i];
    const double n = std::max(sums[cells], 1.0);
    double values[kTerms] = {sums[risk] / n / p.steps,
                             sums[ambiguity] / n / p.steps,
                             sums[consistency] / n,
                             sums[agreement] < 0 ? 0.0 : sums[agreement] / n / p.steps,
                             sums[anchor] / n,
                             0,
                             sums[cells] * p.steps / max_cells};
    residual[0] = static_cast<A>(sums[cells]);
    if (direction_u != nullptr) {
        const Direction found = prompt_direction(sums.data() + kSums, direction_u, p.steps, p.outcomes, n);
        values[prompt_term] = found.term;
        std::copy(found.grad_z.begin(), found.grad_z.end(), residual + 1);
        std::copy(found.grad_u.begin(), found.grad_u.end(), residual + 1 + p.steps * p.outcomes);
    }
    const double ratio = sums[wrong] / n;
    const double factor = hard_cell && !(ratio < min_ratio) ? 0.5 + 0.5 * ratio : 1.0;
    double sum = 0;
    for (int64_t term = 0; term < kTerms; ++term) {
        terms[term] = static_cast<A>(values[term]);
        if (weights[term] != 0) sum += weights[term] * values[term];
    }
    *total = static_cast<A>(factor * sum);
    *mask_ratio = static_cast<A>(ratio);
    *scale = static_cast<A>(factor);
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class A>
Outputs forward_as(const Problem<A>& p, const at::Tensor& direction_u, const std::vector<double>& weights,
                   bool hard_cell, double min_ratio, int64_t max_cells, const at::TensorOptions& options) {
    const bool has_direction = direction_u.defined();
    const int64_t width = kSums + (has_direction ? p.steps * p.outcomes : 0);
    const int64_t residual_width = has_direction ? 1 + (p.steps + 1) * p.outcomes : 1;
    std::vector<double> partial(p.batch * p.blocks * width);
    for_each_block(
        p,
        [&](const Block<A>& block, int64_t episode, int64_t, const A* c, const A* log_c, const A*,
            Scratch<A>& scratch) {
            double* sums = partial.data() + (episode * p.blocks + block.first / kLanes) * width;
            forward_block(p, episode, block, c, log_c, scratch, sums, has_direction ? sums + kSums : nullptr);
        },
        [](const Block<A>&, int64_t, Scratch<A>&) {});
    at::Tensor total = at::empty({p.batch}, options), mask_ratio = at::empty({p.batch}, options);
    at::Tensor scale = at::empty({p.batch}, options), terms = at::empty({p.batch, kTerms}, options);
    at::Tensor residual = at::empty({p.batch, residual_width}, options);
    for (int64_t b = 0; b < p.batch; ++b)
        finish_episode(p, partial.data() + b * p.blocks * width, width,
                       has_direction ? direction_u.const_data_ptr<double>() + b * p.outcomes : nullptr, weights,
                       hard_cell, min_ratio, max_cells, total.data_ptr<A>() + b, terms.data_ptr<A>() + b * kTerms,
                       mask_ratio.data_ptr<A>() + b, scale.data_ptr<A>() + b,
                       residual.data_ptr<A>() + b * residual_width);
    return {total, terms, mask_ratio, scale, residual};
}

// a [I, K] times b [K, J] in double, added up over K in order: in a BLAS the number of threads chooses the bits.
at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
    const at::Tensor left = a.to(at::kDouble).contiguous(), right = b.to(at::kDouble).contiguous();
    const int64_t rows = left.size(0), inner = left.size(1), columns = right.size(1);
    const at::Tensor out = at::zeros({rows, columns}, left.options());
    const double *l = left.const_data_ptr<double>(), *r = right.const_data_ptr<double>();
    double* const o = out.mutable_data_ptr<double>();
    constexpr int64_t kColumns = 64;  // of one task, which keeps their sums in registers
    const int64_t parts = (columns + kColumns - 1) / kColumns;
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, inner * kColumns));
    at::parallel_for(0, rows * parts, grain, [&](int64_t begin, int64_t end) {
        vectorized([&]() EFE_SIMD_BODY {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t i = task / parts, first = task % parts * kColumns;
                const int64_t count = std::min(kColumns, columns - first);
                double sums[kColumns] = {};
                for (int64_t k = 0; k < inner; ++k) {
                    const double factor = l[i * inner + k];
                    const double* row = r + k * columns + first;
                    if (count == kColumns)
                        for (int64_t j = 0; j < kColumns; ++j) sums[j] += factor * row[j];
                    else
                        for (int64_t j = 0; j < count; ++j) sums[j] += factor * row[j];
                }
                std::copy_n(sums, count, o + i * columns + first);
            }
        });
    });
    return out;
}

at::Tensor direction_of(const OptionalTensor& prompt, const OptionalTensor& projection) {
    if (!prompt.has_value() || !projection.has_value()) return {};
    return product(*prompt, projection->t());
}

Outputs efe_loss_forward(const at::Tensor& logits, const OptionalTensor& backward_logits,
                         const OptionalTensor& final_logits, const OptionalTensor& observation_probs,
                         const at::Tensor& preference_logits, const OptionalTensor& prompt,
                         const OptionalTensor& projection, const at::Tensor& target,
                         const OptionalTensor& target_preference, const OptionalTensor& valid,
                         c10::ArrayRef<double> weights, bool hard_cell, double hard_cell_min_ratio, int64_t max_cells,
                         int64_t ignore_index) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        const auto p = problem_of<A>(logits, backward_logits, final_logits, observation_probs, preference_logits,
                                     prompt, target, target_preference, valid, ignore_index);
        return forward_as(p, direction_of(prompt, projection), weights.vec(), hard_cell, hard_cell_min_ratio,
                          max_cells, logits.options().dtype(c10::CppTypeToScalarType<A>::value));
    };
    return logits.scalar_type() == at::kDouble ? run(double{}) : run(float{});
}

// Upstream gradients of one episode, over the number of addends of each term's mean.
template <class A>
struct Upstream {
    A risk, own_ambiguity, observed_ambiguity, consistency, agreement, anchor;
    const A* direction;  // [T, C], or null
    A direction_weight;
};

template <class A>
struct Gradients {
    Plan logits, backward, final, observation, preference_per_episode;
    A* preference = nullptr;  // [chunks, H * W, C]
    A* scales = nullptr;      // [B, blocks, C]
};

// p (f - sum p f), in place of f; p is added to p_sums.
template <class A>
void softmax_gradient(const A* p, int64_t outcomes, A* f, A* p_sums) {
    vectorized([&]() EFE_SIMD_BODY {
        A mean[kLanes];
        weighted_sum(p, f, outcomes, mean);
        for (int64_t c = 0; c < outcomes; ++c) {
            EFE_INDEPENDENT
            for (int64_t i = 0; i < kLanes; ++i) {
                const A prob = p[c * kLanes + i];
                p_sums[c * kLanes + i] += prob;
                f[c * kLanes + i] = prob * (f[c * kLanes + i] - mean[i]);
            }
        }
    });
}

template <class A>
void add_cross_entropy_gradient(const A* p, const int64_t* target, const Block<A>& block, int64_t outcomes, A weight,
                                A* grad) {
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t i = 0; i < outcomes * kLanes; ++i) grad[i] += weight * p[i];
    });
    for (int64_t i = 0; i < block.count; ++i)
        if (block.counted[i] != 0) grad[target[i] * kLanes + i] -= weight;
}

// The prompt term: one gradient for all cells of a step, 0 where the logit was clamped.
template <class A>
void add_direction_gradient(const A* x, const A* direction, A weight, int64_t outcomes, A* grad) {
    constexpr A kRange = static_cast<A>(kPromptLogitRange);
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t c = 0; c < outcomes; ++c) {
            const A shared = weight * direction[c];
            for (int64_t i = c * kLanes; i < (c + 1) * kLanes; ++i)
                grad[i] += x[i] >= -kRange && x[i] <= kRange ? shared : A(0);
        }
    });
}

template <class A>
void observation_gradient(const A* probs, int64_t outcomes, A weight, A* grad) {
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t i = 0; i < outcomes * kLanes; ++i) {
            const A one = probs[i] >= std::numeric_limits<A>::min() ? A(1) : A(0);
            grad[i] = -weight * (log_floored(probs[i]) + one);
        }
    });
}

// f of both steps of a pair in place of their d; see the derivation.
template <class A>
void pair_gradient(const A* p, const A* q, const A* log_c, int64_t size, A own, A risk_weight, A js, bool separate,
                   A* d, A* e) {
    const A q_own = separate ? A(0) : own, q_risk = separate ? A(0) : risk_weight;
    vectorized([&]() EFE_SIMD_BODY {
        EFE_INDEPENDENT
        for (int64_t i = 0; i < size; ++i) {
            const A log_sum = js * log_floored(p[i] + q[i]);
            d[i] = (own + js) * d[i] - risk_weight * log_c[i] - log_sum;
            e[i] = (q_own + js) * e[i] - q_risk * log_c[i] - log_sum;
        }
    });
}

// Gradient of one block of one episode with respect to the preference; the sums over steps of p come in as grad.
template <class A>
void preference_gradient(const Problem<A>& p, int64_t episode, const Block<A>& block, const A* c, const A* log_c,
                         const A* logits, const Upstream<A>& up, const Gradients<A>& out, A* grad, A* shared) {
    const int64_t outcomes = p.outcomes;
    A divergence[kLanes], is_set[kLanes];
    if (p.has_target_preference) anchor_divergence(p, block, c, log_c, divergence, is_set);
    const A* logs = p.has_target_preference ? p.log_target_preference.template const_data_ptr<A>() + block.first : nullptr;
    const A* scales = p.has_prompt ? p.scales.template const_data_ptr<A>() + episode * outcomes : nullptr;
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t k = 0; k < outcomes; ++k) {
            A *row = grad + k * kLanes, by_scale[kLanes];
            const A *ck = c + k * kLanes, *log_ck = log_c + k * kLanes;
            for (int64_t i = 0; i < kLanes; ++i) row[i] = up.risk * (static_cast<A>(p.steps) * ck[i] - row[i]);
            if (logs != nullptr)
                for (int64_t i = 0; i < block.count; ++i)
                    row[i] += up.anchor * is_set[i] * ck[i] * (log_ck[i] - logs[k * p.num_cells + i] - divergence[i]);
            const A scale = scales != nullptr ? scales[k] : A(1);
            for (int64_t i = 0; i < kLanes; ++i) {
                row[i] *= block.counted[i];
                by_scale[i] = row[i] * logits[k * kLanes + i];
                row[i] *= scale;
            }
            if (out.scales != nullptr)
                out.scales[(episode * p.blocks + block.first / kLanes) * outcomes + k] = lane_sum(by_scale);
        }
        if (out.preference != nullptr)
            for (int64_t i = 0; i < outcomes * kLanes; ++i) shared[i] += grad[i];
    });
    if (out.preference_per_episode) store(out.preference_per_episode, episode, 0, block, grad);
}

template <class A>
void backward_block(const Problem<A>& p, int64_t episode, const Block<A>& block, const A* c, const A* log_c,
                    const A* preference_logits, const Upstream<A>& up, const Gradients<A>& out, Scratch<A>& scratch) {
    A *x = scratch.row(0), *d = scratch.row(1), *ps = scratch.row(2);
    A *y = scratch.row(3), *e = scratch.row(4), *qs = scratch.row(5), *p_sums = scratch.row(6);
    A l[kLanes], information[kLanes];
    const int64_t outcomes = p.outcomes, size = outcomes * kLanes;
    const int64_t* target = p.target.template const_data_ptr<int64_t>() + episode * p.num_cells + block.first;
    const A own = up.risk - up.own_ambiguity;
    std::fill_n(p_sums, size, A(0));

    const auto finish_step = [&](const A* logits, int64_t step, const A* prob, A* f) {
        softmax_gradient(prob, outcomes, f, p_sums);
        if (!out.logits) return;
        if (up.direction != nullptr)
            add_direction_gradient(logits, up.direction + step * outcomes, up.direction_weight, outcomes, f);
        if (step == p.steps - 1 && !p.final)
            add_cross_entropy_gradient(prob, target, block, outcomes, up.consistency, f);
        store(out.logits, episode, step, block, f);
    };

    for (int64_t pair = 0; pair < p.pairs; ++pair) {
        const int64_t step = p.steps - 1 - pair, other = p.backward ? step : pair;
        // The middle step of a plan read backwards is its own partner: its divergence is 0.
        const bool alone = !p.backward && step == other;
        load(p.logits, episode, step, block, x);
        softmax(x, outcomes, ps, d, l, information);
        if (!alone) {
            load(p.backward ? p.backward : p.logits, episode, other, block, y);
            softmax(y, outcomes, qs, e, l, information);
        }
        const A js = alone ? A(0) : p.backward ? up.agreement / 2 : up.agreement;
        pair_gradient(ps, alone ? ps : qs, log_c, size, own, up.risk, js, static_cast<bool>(p.backward), d, e);
        finish_step(x, step, ps, d);
        if (p.backward) {
            if (!out.backward) continue;
            softmax_gradient(qs, outcomes, e, scratch.row(8));
            store(out.backward, episode, other, block, e);
        } else if (!alone) {
            finish_step(y, other, qs, e);
        }
    }
    if (out.observation)
        for (int64_t step = 0; step < p.steps; ++step) {
            load(p.observation, episode, step, block, x);
            observation_gradient(x, outcomes, up.observed_ambiguity, d);
            store(out.observation, episode, step, block, d);
        }
    if (out.final) {
        load(p.final, episode, 0, block, x);
        softmax(x, outcomes, ps, d, l, information);
        std::fill_n(d, size, A(0));
        add_cross_entropy_gradient(ps, target, block, outcomes, up.consistency, d);
        store(out.final, episode, 0, block, d);
    }
    if (out.preference != nullptr || out.preference_per_episode || out.scales != nullptr)
        preference_gradient(p, episode, block, c, log_c, preference_logits, up, out, p_sums, scratch.row(7));
}

// d loss / d term [B, kTerms]: through the total and directly. A weight of 0 removes a term, whatever it is.
at::Tensor upstream_of_terms(const OptionalTensor& grad_total, const OptionalTensor& grad_terms,
                             const std::vector<double>& weights, const at::Tensor& hard_cell_scale) {
    at::Tensor upstream = at::zeros({hard_cell_scale.size(0), kTerms}, hard_cell_scale.options());
    if (grad_total.has_value())
        for (int64_t term = 0; term < kTerms; ++term)
            if (weights[term] != 0) upstream.select(1, term).copy_(*grad_total * hard_cell_scale * weights[term]);
    if (grad_terms.has_value()) upstream.add_(*grad_terms);
    return upstream;
}

template <class A>
void backward_as(const Problem<A>& p, const at::Tensor& upstream, const at::Tensor& residual, bool has_direction,
                 const Gradients<A>& out) {
    const auto episode_upstream = [&](int64_t episode) {
        const A* terms = upstream.const_data_ptr<A>() + episode * kTerms;
        const A* kept = residual.const_data_ptr<A>() + episode * residual.size(1);
        const A per_cell = A(1) / std::max(kept[0], A(1)), per_step = per_cell / static_cast<A>(p.steps);
        const A entropy = terms[ambiguity] * per_step;
        return Upstream<A>{terms[risk] * per_step,
                           p.observation ? A(0) : entropy,
                           entropy,
                           terms[consistency] * per_cell,
                           terms[agreement] * per_step,
                           terms[anchor] * per_cell,
                           has_direction ? kept + 1 : nullptr,
                           terms[prompt_term]};
    };
    for_each_block(
        p,
        [&](const Block<A>& block, int64_t episode, int64_t chunk, const A* c, const A* log_c, const A* logits,
            Scratch<A>& scratch) {
            if (episode == chunk * p.chunk_size()) std::fill_n(scratch.row(7), scratch.size, A(0));
            backward_block(p, episode, block, c, log_c, logits, episode_upstream(episode), out, scratch);
        },
        [&](const Block<A>& block, int64_t chunk, Scratch<A>& scratch) {
            if (out.preference == nullptr) return;
            A* target = out.preference + (chunk * p.num_cells + block.first) * p.outcomes;
            for (int64_t i = 0; i < block.count; ++i)
                for (int64_t k = 0; k < p.outcomes; ++k)
                    target[i * p.outcomes + k] =
                        chunk * p.chunk_size() < p.batch ? scratch.row(7)[k * kLanes + i] : A(0);
        });
}

std::vector<at::Tensor> efe_loss_backward(
    const OptionalTensor& grad_total, const OptionalTensor& grad_terms, const at::Tensor& logits,
    const OptionalTensor& backward_logits, const OptionalTensor& final_logits, const OptionalTensor& observation_probs,
    const at::Tensor& preference_logits, const OptionalTensor& prompt, const OptionalTensor& projection,
    const at::Tensor& target, const OptionalTensor& target_preference, const OptionalTensor& valid,
    c10::ArrayRef<double> weights, bool /*hard_cell*/, double /*hard_cell_min_ratio*/, int64_t /*max_cells*/,
    int64_t ignore_index, const at::Tensor& hard_cell_scale, const at::Tensor& residual,
    const c10::List<bool>& needs) {
    const auto run = [&](auto zero) {
        using A = decltype(zero);
        const auto p = problem_of<A>(logits, backward_logits, final_logits, observation_probs, preference_logits,
                                     prompt, target, target_preference, valid, ignore_index);
        const at::TensorOptions options = residual.options();
        const at::Tensor upstream = upstream_of_terms(grad_total, grad_terms, weights.vec(), hard_cell_scale);
        const auto grad_of = [&](int64_t index, const OptionalTensor& like) {
            return needs[index] && like.has_value() ? at::empty_like(*like) : at::Tensor();
        };
        const at::Tensor plans[4] = {grad_of(0, logits), grad_of(1, backward_logits), grad_of(2, final_logits),
                                     grad_of(3, observation_probs)};
        at::Tensor preference, shared, scales;
        Gradients<A> out;
        if (plans[0].defined()) out.logits = plan_of(plans[0]);
        if (plans[1].defined()) out.backward = plan_of(plans[1]);
        if (plans[2].defined()) out.final = plan_of(plans[2].unsqueeze(1));
        if (plans[3].defined()) out.observation = plan_of(plans[3]);
        if (needs[4] && p.preference_per_episode) {
            preference = at::empty_like(preference_logits);
            out.preference_per_episode = plan_of(preference.unsqueeze(1));
        } else if (needs[4]) {
            shared = at::empty({p.chunks, p.num_cells, p.outcomes}, options);
            out.preference = shared.data_ptr<A>();
        }
        if (needs[5]) {
            scales = at::empty({p.batch, p.blocks, p.outcomes}, options);
            out.scales = scales.data_ptr<A>();
        }
        const bool has_direction = prompt.has_value() && projection.has_value();
        backward_as(p, upstream, residual, has_direction, out);

        std::vector<at::Tensor> found;
        for (const at::Tensor& plan : plans)
            if (plan.defined()) found.push_back(plan);
        // In the dtype and the memory order of what it is the gradient of, as the fake kernel promises.
        const auto add = [&](const at::Tensor& grad, const at::Tensor& like) {
            found.push_back(at::empty_like(like).copy_(grad));
        };
        if (preference.defined()) found.push_back(preference);
        if (shared.defined()) add(shared.sum(0).view(preference_logits.sizes()), preference_logits);
        at::Tensor grad_u;
        if (has_direction)
            grad_u = upstream.select(1, prompt_term).unsqueeze(1) * residual.narrow(1, 1 + p.steps * p.outcomes, p.outcomes);
        if (needs[5]) {
            at::Tensor grad = has_direction ? product(grad_u, *projection).to(options.dtype())
                                            : at::zeros(prompt->sizes(), options);
            grad.narrow(1, 0, p.outcomes).add_(scales.sum(1) * p.scales * (1 - p.scales));
            add(grad, *prompt);
        }
        if (needs[6]) add(has_direction ? product(grad_u.t(), *prompt) : at::zeros_like(*projection), *projection);
        return found;
    };
    return logits.scalar_type() == at::kDouble ? run(double{}) : run(float{});
}

TORCH_LIBRARY_IMPL(efe, CPU, m) {
    m.impl("efe_loss_forward", &efe_loss_forward);
    m.impl("efe_loss_backward", &efe_loss_backward);
}

}  // namespace
}  // namespace efe::efe_loss
