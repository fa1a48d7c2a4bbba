// efe_loss_backward on the CPU.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "common/simd.h"
#include "common/sums.h"
#include "common/tensor.h"
#include "efe_loss/cells.h"
#include "efe_loss/outcomes.h"
#include "efe_loss/problem.h"
#include "efe_loss/product.h"

namespace efe::efe_loss {
namespace {

// Upstream gradients of one episode, over the number of addends of each term's mean.
template <class A>
struct Upstream {
    A risk, own_ambiguity, observed_ambiguity, consistency, agreement, anchor;
    const A* direction;  // [T, C], or null
    A direction_weight;
};

// Where gradients are written; absent or null where they are not asked for.
template <class A>
struct Gradients {
    CellView logits, backward_logits, final_logits, observation_probs, preference_per_episode;
    A* preference = nullptr;  // [chunks, H * W, C]
    A* scales = nullptr;      // [B, blocks, C]

    bool any_of_preference() const { return preference != nullptr || scales != nullptr || preference_per_episode; }
};

// p (f - sum p f), in place of f; p is added to p_sums.
template <class A>
void softmax_gradient(const A* p, int64_t outcomes, A* f, A* p_sums) {
    vectorized([&]() EFE_SIMD_BODY {
        A mean[kCells];
        weighted_sum(p, f, outcomes, mean);
        for (int64_t c = 0; c < outcomes; ++c) {
            EFE_INDEPENDENT
            for (int64_t i = 0; i < kCells; ++i) {
                const A prob = p[c * kCells + i];
                p_sums[c * kCells + i] += prob;
                f[c * kCells + i] = prob * (f[c * kCells + i] - mean[i]);
            }
        }
    });
}

template <class A>
void add_cross_entropy_gradient(const A* p, const int64_t* target, const Block<A>& block, int64_t outcomes, A weight,
                                A* grad) {
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t i = 0; i < outcomes * kCells; ++i) grad[i] += weight * p[i];
    });
    for (int64_t i = 0; i < block.count; ++i)
        if (block.counted[i] != 0) grad[target[i] * kCells + i] -= weight;
}

// The prompt term: one gradient for all cells of a step, 0 where the logit was clamped.
template <class A>
void add_direction_gradient(const A* x, const A* direction, A weight, int64_t outcomes, A* grad) {
    constexpr A kRange = static_cast<A>(kPromptLogitRange);
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t c = 0; c < outcomes; ++c) {
            const A shared = weight * direction[c];
            for (int64_t i = c * kCells; i < (c + 1) * kCells; ++i)
                grad[i] += x[i] >= -kRange && x[i] <= kRange ? shared : A(0);
        }
    });
}

template <class A>
void observation_gradient(const A* probs, int64_t outcomes, A weight, A* grad) {
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t i = 0; i < outcomes * kCells; ++i) {
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

// Gradient of one block of one episode with respect to the preference. The sums over steps of p come in as grad
// [C, kCells]; shared [C, kCells] adds up the episodes.
template <class A>
void preference_gradient(const Problem<A>& p, int64_t episode, const Block<A>& block,
                         const Preference<A>& preference, const Upstream<A>& up, const Gradients<A>& out, A* grad,
                         A* shared) {
    const A *c = preference.c, *log_c = preference.log_c, *logits = preference.logits;
    const int64_t outcomes = p.outcomes;
    A divergence[kCells], is_set[kCells];
    if (p.has_target_preference()) anchor_divergence(p, block, preference, divergence, is_set);
    const A* logs = p.has_target_preference() ? data_of<A>(p.log_target_preference) + block.first : nullptr;
    const A* scales = p.scales_of(episode);
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t k = 0; k < outcomes; ++k) {
            A *row = grad + k * kCells, by_scale[kCells];
            const A *ck = c + k * kCells, *log_ck = log_c + k * kCells;
            for (int64_t i = 0; i < kCells; ++i) row[i] = up.risk * (static_cast<A>(p.steps) * ck[i] - row[i]);
            if (logs != nullptr)
                for (int64_t i = 0; i < block.count; ++i)
                    row[i] += up.anchor * is_set[i] * ck[i] * (log_ck[i] - logs[k * p.num_cells + i] - divergence[i]);
            const A scale = scales != nullptr ? scales[k] : A(1);
            for (int64_t i = 0; i < kCells; ++i) {
                row[i] *= block.counted[i];
                by_scale[i] = row[i] * logits[k * kCells + i];
                row[i] *= scale;
            }
            if (out.scales != nullptr)
                out.scales[(episode * p.blocks + block.first / kCells) * outcomes + k] = sum_of<kCells>(by_scale);
        }
        if (out.preference != nullptr)
            for (int64_t i = 0; i < outcomes * kCells; ++i) shared[i] += grad[i];
    });
    if (out.preference_per_episode) store(out.preference_per_episode, episode, 0, block, grad);
}

template <class A>
void backward_block(const Problem<A>& p, int64_t episode, const Block<A>& block, const Upstream<A>& up,
                    const Gradients<A>& out, Scratch<A>& scratch) {
    Step<A>&one = scratch.one, &other = scratch.other;
    const int64_t outcomes = p.outcomes;
    const int64_t* target = p.targets_of(episode, block);
    const A own = up.risk - up.own_ambiguity;
    std::fill_n(scratch.p_sums, scratch.size, A(0));

    const auto finish_step = [&](const Step<A>& values, int64_t step) {
        A* const f = values.d;
        softmax_gradient(values.p, outcomes, f, scratch.p_sums);
        if (!out.logits) return;
        if (up.direction != nullptr)
            add_direction_gradient(values.logits, up.direction + step * outcomes, up.direction_weight, outcomes, f);
        if (step == p.steps - 1 && !p.final_logits)
            add_cross_entropy_gradient(values.p, target, block, outcomes, up.consistency, f);
        store(out.logits, episode, step, block, f);
    };

    for (int64_t pair = 0; pair < p.pairs; ++pair) {
        const int64_t step = p.steps - 1 - pair, partner = p.backward_logits ? step : pair;
        // The middle step of a plan read backwards is its own partner: its divergence is 0.
        const bool alone = !p.backward_logits && step == partner;
        load_step(p.logits, episode, step, block, one);
        if (!alone) load_step(p.backward_logits ? p.backward_logits : p.logits, episode, partner, block, other);
        const A js = alone ? A(0) : p.backward_logits ? up.agreement / 2 : up.agreement;
        pair_gradient(one.p, alone ? one.p : other.p, scratch.preference.log_c, scratch.size, own, up.risk, js,
                      static_cast<bool>(p.backward_logits), one.d, other.d);
        finish_step(one, step);
        if (p.backward_logits) {
            if (!out.backward_logits) continue;
            softmax_gradient(other.p, outcomes, other.d, scratch.unread);
            store(out.backward_logits, episode, partner, block, other.d);
        } else if (!alone) {
            finish_step(other, partner);
        }
    }
    if (out.observation_probs)
        for (int64_t step = 0; step < p.steps; ++step) {
            load(p.observation_probs, episode, step, block, scratch.observation);
            observation_gradient(scratch.observation, outcomes, up.observed_ambiguity, one.d);
            store(out.observation_probs, episode, step, block, one.d);
        }
    if (out.final_logits) {
        load_step(p.final_logits, episode, 0, block, one);
        std::fill_n(one.d, scratch.size, A(0));
        add_cross_entropy_gradient(one.p, target, block, outcomes, up.consistency, one.d);
        store(out.final_logits, episode, 0, block, one.d);
    }
    if (out.any_of_preference())
        preference_gradient(p, episode, block, scratch.preference, up, out, scratch.p_sums, scratch.preference_sum);
}

// d loss / d term [B, kTerms]: through the total and directly. A weight of 0 removes a term, whatever it is.
at::Tensor upstream_of_terms(const OptionalTensor& grad_total, const OptionalTensor& grad_terms,
                             at::ArrayRef<double> weights, const at::Tensor& hard_cell_scale) {
    at::Tensor upstream = at::zeros({hard_cell_scale.size(0), kTerms}, hard_cell_scale.options());
    if (grad_total.has_value())
        for (int64_t term = 0; term < kTerms; ++term)
            if (weights[term] != 0) upstream.select(1, term).copy_(*grad_total * hard_cell_scale * weights[term]);
    if (grad_terms.has_value()) upstream.add_(*grad_terms);
    return upstream;
}

template <class A>
Upstream<A> upstream_of_episode(const Problem<A>& p, const at::Tensor& upstream_of_terms, const at::Tensor& saved,
                                bool has_direction, int64_t episode) {
    const A* terms = upstream_of_terms.const_data_ptr<A>() + episode * kTerms;
    const A* kept = saved.const_data_ptr<A>() + episode * saved.size(1);
    const A per_cell = A(1) / std::max(kept[0], A(1)), per_step = per_cell / static_cast<A>(p.steps);
    const A entropy = terms[ambiguity] * per_step;
    return {terms[risk] * per_step,
            p.observation_probs ? A(0) : entropy,
            entropy,
            terms[consistency] * per_cell,
            terms[agreement] * per_step,
            terms[anchor] * per_cell,
            has_direction ? kept + 1 : nullptr,
            terms[prompt_term]};
}

template <class A, class UpstreamOf>
void backward_blocks(const Problem<A>& p, const UpstreamOf& upstream_of, const Gradients<A>& out) {
    for_each_block(
        p,
        [&](const Block<A>& block, int64_t episode, int64_t chunk, Scratch<A>& scratch) {
            if (episode == chunk * p.chunk_size()) std::fill_n(scratch.preference_sum, scratch.size, A(0));
            backward_block(p, episode, block, upstream_of(episode), out, scratch);
        },
        [&](const Block<A>& block, int64_t chunk, Scratch<A>& scratch) {
            if (out.preference == nullptr) return;
            A* target = out.preference + (chunk * p.num_cells + block.first) * p.outcomes;
            const bool has_episodes = chunk * p.chunk_size() < p.batch;
            for (int64_t i = 0; i < block.count; ++i)
                for (int64_t k = 0; k < p.outcomes; ++k)
                    target[i * p.outcomes + k] = has_episodes ? scratch.preference_sum[k * kCells + i] : A(0);
        });
}

// upstream [B, kTerms]. Gradients come in the dtype and the memory order of what they are the gradient of, as the fake
// kernel promises.
template <class A>
std::vector<at::Tensor> backward(const Inputs& inputs, const Settings& settings, const at::Tensor& upstream,
                                 const at::Tensor& saved, const c10::List<bool>& needs) {
    const Problem<A> p(inputs, settings.ignore_index);
    const at::TensorOptions options = saved.options();
    const bool has_direction = inputs.has_direction();
    std::vector<at::Tensor> found;
    Gradients<A> out;
    const auto add_cells = [&](bool need, const OptionalTensor& like, int64_t step_dim, CellView& view) {
        if (!need || !like.has_value()) return;
        found.push_back(at::empty_like(*like));
        view = view_of(step_dim < 0 ? found.back() : found.back().unsqueeze(step_dim));
    };
    add_cells(needs[0], inputs.logits, -1, out.logits);
    add_cells(needs[1], inputs.backward_logits, -1, out.backward_logits);
    add_cells(needs[2], inputs.final_logits, 1, out.final_logits);
    add_cells(needs[3], inputs.observation_probs, -1, out.observation_probs);
    add_cells(needs[4] && p.preference_per_episode, inputs.preference_logits, 1, out.preference_per_episode);
    at::Tensor shared, scales;
    if (needs[4] && !p.preference_per_episode) {
        shared = at::empty({p.chunks, p.num_cells, p.outcomes}, options);
        out.preference = shared.data_ptr<A>();
    }
    if (needs[5]) {
        scales = at::empty({p.batch, p.blocks, p.outcomes}, options);
        out.scales = scales.data_ptr<A>();
    }
    backward_blocks(
        p, [&](int64_t b) { return upstream_of_episode(p, upstream, saved, has_direction, b); }, out);

    const auto add = [&](const at::Tensor& grad, const at::Tensor& like) {
        found.push_back(at::empty_like(like).copy_(grad));
    };
    if (shared.defined()) add(shared.sum(0).view(inputs.preference_logits.sizes()), inputs.preference_logits);
    at::Tensor grad_u;
    if (has_direction)
        grad_u = upstream.narrow(1, prompt_term, 1) * saved.narrow(1, 1 + p.steps * p.outcomes, p.outcomes);
    if (needs[5]) {
        at::Tensor grad = has_direction ? product(grad_u, *inputs.projection).to(options.dtype())
                                        : at::zeros(inputs.prompt->sizes(), options);
        grad.narrow(1, 0, p.outcomes).add_(scales.sum(1) * p.scales * (1 - p.scales));
        add(grad, *inputs.prompt);
    }
    if (needs[6])
        add(has_direction ? product(grad_u.t(), *inputs.prompt) : at::zeros_like(*inputs.projection), *inputs.projection);
    return found;
}

std::vector<at::Tensor> efe_loss_backward(
    const OptionalTensor& grad_total, const OptionalTensor& grad_terms, const at::Tensor& logits,
    const OptionalTensor& backward_logits, const OptionalTensor& final_logits, const OptionalTensor& observation_probs,
    const at::Tensor& preference_logits, const OptionalTensor& prompt, const OptionalTensor& projection,
    const at::Tensor& target, const OptionalTensor& target_preference, const OptionalTensor& valid,
    at::ArrayRef<double> weights, bool hard_cell, double hard_cell_min_ratio, int64_t max_cells, int64_t ignore_index,
    const at::Tensor& hard_cell_scale, const at::Tensor& saved, const c10::List<bool>& needs) {
    const Inputs inputs{logits, backward_logits, final_logits, observation_probs, preference_logits,
                        prompt, projection,      target,       target_preference, valid};
    const Settings settings{weights, hard_cell, hard_cell_min_ratio, max_cells, ignore_index};
    const at::Tensor upstream = upstream_of_terms(grad_total, grad_terms, weights, hard_cell_scale);
    return logits.scalar_type() == at::kDouble ? backward<double>(inputs, settings, upstream, saved, needs)
                                               : backward<float>(inputs, settings, upstream, saved, needs);
}

TORCH_LIBRARY_IMPL(efe, CPU, library) { library.impl("efe_loss_backward", efe_loss_backward); }

}  // namespace
}  // namespace efe::efe_loss
