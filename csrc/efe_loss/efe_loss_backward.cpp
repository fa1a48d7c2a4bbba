// efe_loss_backward on the CPU.
#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/library.h"
#include "common/simd.h"
#include "common/sums.h"
#include "common/tensor.h"
#include "efe_loss/cells.h"
#include "efe_loss/outcomes.h"
#include "efe_loss/problem.h"
#include "efe_loss/product.h"

namespace efe::efe_loss {
namespace {

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
    vectorized([&]() EFE_SIMD_BODY {
        EFE_INDEPENDENT
        for (int64_t i = 0; i < size; ++i) {
            const A log_sum = js * log_floored(p[i] + q[i]);
            d[i] = (own + js) * d[i] - risk_weight * log_c[i] - log_sum;
            e[i] = (separate ? A(0) : own * e[i] - risk_weight * log_c[i]) + js * e[i] - log_sum;
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
    const A* logs = p.has_target_preference() ? p.log_target_preference.get() + block.first : nullptr;
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
                // Not a product with 0, because a target preference may hold NaN in a cell that does not count.
                const A own = block.counted[i] != 0 ? row[i] : A(0);
                by_scale[i] = own * logits[k * kCells + i];
                row[i] = block.counted[i] != 0 ? own * scale : A(0);
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
template <class A>
std::vector<A> upstream_of_terms(const OptionalTensor& grad_total, const OptionalTensor& grad_terms,
                                 const Settings& settings, const Tensor& hard_cell_scale) {
    constexpr ScalarType type = CppTypeToScalarType<A>::value;
    const std::vector<double>& weights = settings.weights;
    const int64_t batch = hard_cell_scale.size(0);
    const A share = static_cast<A>(settings.share(batch));
    const Tensor total = contiguous_as(grad_total, type), terms = contiguous_as(grad_terms, type);
    const Tensor scale = contiguous_as(hard_cell_scale, type);
    std::vector<A> upstream(batch * kTerms);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t term = 0; term < kTerms; ++term) {
            A& found = upstream[b * kTerms + term];
            if (total.defined() && weights[term] != 0)
                found = total.data<A>()[settings.reduces() ? 0 : b] * share * scale.data<A>()[b] *
                        static_cast<A>(weights[term]);
            if (terms.defined()) found += terms.data<A>()[b * kTerms + term];
        }
    return upstream;
}

// terms [kTerms], kept: the episode's row of what forward saved.
template <class A>
Upstream<A> upstream_of_episode(const Problem<A>& p, const A* terms, const A* kept, bool has_direction) {
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

template <class A>
void backward_blocks(const Problem<A>& p, const std::vector<Upstream<A>>& upstream, const Gradients<A>& out) {
    for_each_block(
        p,
        [&](const Block<A>& block, int64_t episode, int64_t chunk, Scratch<A>& scratch) {
            if (episode == chunk * p.chunk_size()) std::fill_n(scratch.preference_sum, scratch.size, A(0));
            backward_block(p, episode, block, upstream[episode], out, scratch);
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
std::vector<Tensor> backward(const Inputs& inputs, const Settings& settings, const std::vector<A>& upstream,
                             const Tensor& saved, const std::vector<bool>& needs) {
    constexpr ScalarType type = CppTypeToScalarType<A>::value;
    const Problem<A> p(inputs, settings.ignore_index);
    const bool has_direction = inputs.has_direction();
    const Tensor all_kept = contiguous_as(saved, type);
    const auto kept = [&](int64_t b) { return all_kept.data<A>() + b * saved.size(1); };
    std::vector<Tensor> found;
    Gradients<A> out;
    const auto add_cells = [&](bool need, const Tensor& like, CellView& view) {
        if (!need) return;
        found.push_back(empty_like(like, like.scalar_type()));
        view = view_of(found.back());
    };
    add_cells(needs[0], inputs.logits, out.logits);
    if (inputs.backward_logits.has_value()) add_cells(needs[1], *inputs.backward_logits, out.backward_logits);
    if (inputs.final_logits.has_value()) add_cells(needs[2], *inputs.final_logits, out.final_logits);
    if (inputs.observation_probs.has_value()) add_cells(needs[3], *inputs.observation_probs, out.observation_probs);
    add_cells(needs[4] && p.preference_per_episode, inputs.preference_logits, out.preference_per_episode);
    std::unique_ptr<A[]> shared, scales;
    if (needs[4] && !p.preference_per_episode) {
        shared.reset(new A[p.chunks * p.num_cells * p.outcomes]);
        out.preference = shared.get();
    }
    if (needs[5]) {
        scales.reset(new A[p.batch * p.blocks * p.outcomes]);
        out.scales = scales.get();
    }
    std::vector<Upstream<A>> of_episodes;
    for (int64_t b = 0; b < p.batch; ++b)
        of_episodes.push_back(upstream_of_episode(p, upstream.data() + b * kTerms, kept(b), has_direction));
    if (p.in_registers()) {
        if constexpr (std::is_same_v<A, float>) backward_in_registers(p, of_episodes, out);
    } else {
        backward_blocks(p, of_episodes, out);
    }

    // The gradient with respect to `like`, from a row-major one that write(data) writes.
    const auto add = [&](const Tensor& like, const auto& write) {
        Tensor grad = empty(like, type);
        write(grad.mutable_data<A>());
        found.push_back(result_like(std::move(grad), like));
    };
    if (shared != nullptr)
        add(inputs.preference_logits,
            [&](A* grad) { add_up(shared.get(), p.chunks, p.num_cells * p.outcomes, grad); });
    std::vector<A> grad_u(has_direction ? p.batch * p.outcomes : 0);
    for (size_t i = 0; i < grad_u.size(); ++i) {
        const int64_t b = i / p.outcomes, k = i % p.outcomes;
        grad_u[i] = upstream[b * kTerms + prompt_term] * kept(b)[1 + p.steps * p.outcomes + k];
    }
    const Table u{grad_u.data(), dtype_of(type), p.batch, p.outcomes, p.outcomes, 1};
    if (needs[5])
        add(*inputs.prompt, [&](A* grad) {
            const int64_t width = inputs.prompt->size(1);
            if (has_direction)
                product(u, table_of(*inputs.projection), grad);
            else
                std::fill_n(grad, p.batch * width, A(0));
            std::vector<A> sums(p.outcomes);
            for (int64_t b = 0; b < p.batch; ++b) {
                const A* s = p.scales_of(b);
                add_up(out.scales + b * p.blocks * p.outcomes, p.blocks, p.outcomes, sums.data());
                for (int64_t k = 0; k < p.outcomes; ++k) grad[b * width + k] += sums[k] * s[k] * (A(1) - s[k]);
            }
        });
    if (needs[6])
        add(*inputs.projection, [&](A* grad) {
            if (has_direction)
                product(u.transposed(), table_of(*inputs.prompt), grad);
            else
                std::fill_n(grad, inputs.projection->numel(), A(0));
        });
    return found;
}

std::vector<Tensor> efe_loss_backward(
    const OptionalTensor& grad_total, const OptionalTensor& grad_terms, const Tensor& logits,
    const OptionalTensor& backward_logits, const OptionalTensor& final_logits, const OptionalTensor& observation_probs,
    const Tensor& preference_logits, const OptionalTensor& prompt, const OptionalTensor& projection,
    const Tensor& target, const OptionalTensor& target_preference, const OptionalTensor& valid,
    const std::vector<double>& weights, bool hard_cell, double hard_cell_min_ratio, int64_t max_cells,
    int64_t ignore_index, const std::string& reduction, const Tensor& hard_cell_scale, const Tensor& saved,
    const std::vector<bool>& needs) {
    const Inputs inputs{logits, backward_logits, final_logits, observation_probs, preference_logits,
                        prompt, projection,      target,       target_preference, valid};
    const Settings settings{weights, hard_cell, hard_cell_min_ratio, max_cells, ignore_index, reduction};
    std::vector<Tensor> gradients;
    for_arithmetic(arithmetic_type(logits), [&](auto zero) {
        using A = decltype(zero);
        const std::vector<A> upstream = upstream_of_terms<A>(grad_total, grad_terms, settings, hard_cell_scale);
        gradients = backward<A>(inputs, settings, upstream, saved, needs);
    });
    return gradients;
}

STABLE_TORCH_LIBRARY_IMPL(efe, CPU, library) { implement<efe_loss_backward>(library, "efe_loss_backward"); }

}  // namespace
}  // namespace efe::efe_loss
