// The gradients of efe_loss_backward that cells have of their own, N cells at once.
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "efe_loss/problem.h"
#include "efe_loss/registers.h"

namespace efe::efe_loss {
namespace {

template <int C, int N>
struct Backward : Registers<C, N> {
    using R = Registers<C, N>;
    using typename R::I;
    using typename R::Preference;
    using typename R::Rows;
    using typename R::Step;
    using typename R::Target;
    using typename R::V;

    // What the gradient of one step multiplies log p, log c and log p - log(p + q) with; of a plan to compare with, the
    // last one alone.
    struct Weights {
        V own, risk, agreement;
    };

    // N cells of an episode, and what all their steps share.
    struct Place {
        int64_t episode, first, count;
        I counted;
        V target;
        Rows log_c;
        float* room;  // where gradients are staged
    };

    // p (f - sum p f) with f = own d - risk log c + agreement (d - log(p + q)), where sum p f comes from the sums of
    // the softmax and from both_mean, the sum of p (d - log(p + q)); then what the other terms add.
    static EFE_INLINE void step_gradient(const Problem<float>& p, const CellView& view, const Upstream<float>& up,
                                         const Place& at, int64_t t, bool is_plan, const Rows& x, const Step& s,
                                         const V* log_both, V both_mean, const Weights& w, V lowest) {
        const Target to(view, at.episode, t, at.first, at.count, at.room);
        V mean = w.agreement * both_mean;
        if (is_plan) mean += w.own * s.d_mean - w.risk * s.cross;
        EFE_UNROLL
        for (int c = 0; c < C; ++c) {
            const V d = R::shifted(x[c], s.top, lowest);
            V f = w.agreement * (d - log_both[c]) - mean;
            if (is_plan) f = f + w.own * d - w.risk * at.log_c[c];
            to.set(c, R::where(at.counted, s.e[c] * f));
        }
        if (is_plan && up.direction != nullptr) add_direction(x, up.direction + t * C, up.direction_weight, at, to);
        if (is_plan && t == p.steps - 1 && !p.final_logits) add_cross_entropy(s, up.consistency, at, to);
        to.finish();
    }

    // The prompt term: one gradient for all cells of a step, 0 where the logit was clamped.
    static EFE_INLINE void add_direction(const Rows& x, const float* direction, float weight, const Place& at,
                                         const Target& to) {
        EFE_UNROLL
        for (int c = 0; c < C; ++c) {
            const V size = reinterpret_cast<V>(reinterpret_cast<I>(x[c]) & 0x7fffffff);
            const V own = size <= static_cast<float>(kPromptLogitRange) ? R::all(weight * direction[c]) : V{};
            to.add(c, R::where(at.counted, own));
        }
    }

    // s: with its probabilities in e.
    static EFE_INLINE void add_cross_entropy(const Step& s, float weight, const Place& at, const Target& to) {
        EFE_UNROLL
        for (int c = 0; c < C; ++c) {
            const V index = R::all(static_cast<float>(c));
            to.add(c, R::where(at.counted, weight * (at.target == index ? s.e[c] - 1.0f : s.e[c])));
        }
    }

    static EFE_INLINE void normalize(Step& s) {
        EFE_UNROLL
        for (int c = 0; c < C; ++c) s.e[c] *= s.inverse;
    }

    // Gradients of the plans; p_sums [C]: the sum of the probabilities of all steps.
    static EFE_INLINE void plan_gradients(const Problem<float>& p, const Upstream<float>& up,
                                          const Gradients<float>& out, const Place& at, V lowest, float* staged,
                                          V* p_sums) {
        const bool separate = static_cast<bool>(p.backward_logits);
        const float own = up.risk - up.own_ambiguity, js = (separate ? 0.5f : 1.0f) * up.agreement;
        EFE_UNROLL
        for (int c = 0; c < C; ++c) p_sums[c] = V{};
        for (int64_t pair = 0; pair < p.pairs; ++pair) {
            const int64_t t = p.steps - 1 - pair, partner = separate ? t : pair;
            const bool alone = !separate && t == partner;
            const Rows x = R::rows_of(p.logits, at.episode, t, at.first, at.count, staged);
            Step a = R::softmax(x, at.log_c, lowest);
            normalize(a);
            V log_both[C], a_mean{}, b_mean{};
            const Weights plan{R::all(own), R::all(up.risk), R::all(alone ? 0.0f : js)};
            if (alone) {
                EFE_UNROLL
                for (int c = 0; c < C; ++c) {
                    log_both[c] = V{};
                    p_sums[c] += a.e[c];
                }
                if (out.logits) step_gradient(p, out.logits, up, at, t, true, x, a, log_both, a_mean, plan, lowest);
                continue;
            }
            const CellView& other = separate ? p.backward_logits : p.logits;
            const Rows y = R::rows_of(other, at.episode, partner, at.first, at.count, staged + R::kSize);
            Step b = R::softmax(y, at.log_c, lowest);
            normalize(b);
            EFE_UNROLL
            for (int c = 0; c < C; ++c) {
                const V both = a.e[c] + b.e[c];
                log_both[c] = R::log_finite(both);
                a_mean += a.e[c] * (R::shifted(x[c], a.top, lowest) - log_both[c]);
                b_mean += b.e[c] * (R::shifted(y[c], b.top, lowest) - log_both[c]);
                p_sums[c] += separate ? a.e[c] : both;
            }
            // A NaN of the one reaches the gradient of the other.
            a_mean += 0.0f * b.inverse;
            b_mean += 0.0f * a.inverse;
            if (out.logits) step_gradient(p, out.logits, up, at, t, true, x, a, log_both, a_mean, plan, lowest);
            const Weights backward_plan{V{}, V{}, R::all(js)};
            const CellView& written = separate ? out.backward_logits : out.logits;
            if (written)
                step_gradient(p, written, up, at, partner, !separate, y, b, log_both, b_mean,
                              separate ? backward_plan : plan, lowest);
        }
    }

    static EFE_INLINE void final_gradient(const Problem<float>& p, const Upstream<float>& up,
                                          const Gradients<float>& out, const Place& at, V lowest, float* staged) {
        const Rows z = R::rows_of(p.final_logits, at.episode, 0, at.first, at.count, staged);
        Step s = R::softmax(z, at.log_c, lowest);
        normalize(s);
        const Target to(out.final_logits, at.episode, 0, at.first, at.count, at.room);
        EFE_UNROLL
        for (int c = 0; c < C; ++c) to.set(c, V{});
        add_cross_entropy(s, up.consistency, at, to);
        to.finish();
    }

    static EFE_INLINE void observation_gradients(const Problem<float>& p, const Upstream<float>& up,
                                                 const Gradients<float>& out, const Place& at, float* staged) {
        constexpr float kSmallest = std::numeric_limits<float>::min();
        for (int64_t t = 0; t < p.steps; ++t) {
            const Rows probs = R::rows_of(p.observation_probs, at.episode, t, at.first, at.count, staged);
            const Target to(out.observation_probs, at.episode, t, at.first, at.count, at.room);
            EFE_UNROLL
            for (int c = 0; c < C; ++c) {
                const V floored = R::at_least(R::all(kSmallest), probs[c]);
                const V log_p = floored < std::numeric_limits<float>::infinity() ? R::log_finite(floored) : floored;
                const V gradient = -up.observed_ambiguity * (probs[c] >= kSmallest ? log_p + 1.0f : log_p);
                to.set(c, R::where(at.counted, gradient));
            }
            to.finish();
        }
    }

    // Through the preference. shared: rows [C, N] of the sum over episodes; by_scale: rows of the gradient times the
    // logits; either may be null.
    static EFE_INLINE void preference_gradient(const Problem<float>& p, const Upstream<float>& up,
                                               const Gradients<float>& out, const Place& at,
                                               const Preference& preference, const V* p_sums, float* staged,
                                               float* shared, float* by_scale) {
        const float* const scales = p.scales_of(at.episode);
        const Rows logits = R::rows_of(p.preference_logits, at.episode, 0, at.first, at.count, staged);
        typename R::Anchor anchored{};
        if (p.has_target_preference()) anchored = R::anchor_of(p, at.first, at.count, preference);
        float* const rows = at.room;
        EFE_UNROLL
        for (int c = 0; c < C; ++c) {
            const V probability = R::load(preference.c + c * N);
            V row = up.risk * (static_cast<float>(p.steps) * probability - p_sums[c]);
            if (p.has_target_preference()) {
                const V log_anchor = R::load_row(p.log_target_preference.get(), p, c, at.first, at.count);
                const V distance = R::load(preference.log_c + c * N) - anchored.divergence;
                row += R::where(anchored.is_set, up.anchor * probability * (distance - log_anchor));
            }
            row = R::where(at.counted, row);
            if (by_scale != nullptr)
                R::store(by_scale + c * N, R::load(by_scale + c * N) +
                                               R::where(at.counted, row * R::preference_logit(logits, c)));
            if (scales != nullptr) row = R::where(at.counted, row * scales[c]);
            if (shared != nullptr) R::store(shared + c * N, R::load(shared + c * N) + row);
            R::store(rows + c * N, row);
        }
        if (out.preference_per_episode)
            R::unstage(out.preference_per_episode, at.episode, 0, at.first, at.count, rows);
    }

    static EFE_INLINE void run(const Problem<float>& p, int64_t chunk, int64_t block, int64_t begin, int64_t cells,
                               const std::vector<Upstream<float>>& upstream, const Gradients<float>& out) {
        const V lowest = R::lowest_exponent();
        const std::unique_ptr<float[]> shared(
            out.preference != nullptr ? new float[R::registers_of(cells) * R::kSize]() : nullptr);
        alignas(64) float staged[3 * R::kSize], by_scale[R::kSize] = {};
        double scale_sums[C] = {};
        R::for_each_register(
            p, chunk, begin, cells, lowest, staged,
            [&](int64_t episode, int64_t k, int64_t first, int64_t count, const Preference& preference) EFE_SIMD_BODY {
                const Upstream<float>& up = upstream[episode];
                const Place at{episode,
                               first,
                               count,
                               R::counted_of(p, episode, first, count),
                               R::target_of(p, episode, first, count),
                               Rows{preference.log_c, N},
                               staged + 2 * R::kSize};
                R::prefetch(p, p.logits, episode, first);
                if (out.logits) R::prefetch(p, out.logits, episode, first);
                V p_sums[C];
                plan_gradients(p, up, out, at, lowest, staged, p_sums);
                if (out.final_logits) final_gradient(p, up, out, at, lowest, staged);
                if (out.observation_probs) observation_gradients(p, up, out, at, staged);
                if (out.any_of_preference())
                    preference_gradient(p, up, out, at, preference, p_sums, staged,
                                        shared == nullptr ? nullptr : shared.get() + k * R::kSize,
                                        out.scales == nullptr ? nullptr : by_scale);
            },
            [&](int64_t episode, bool last) EFE_SIMD_BODY {
                if (out.scales == nullptr) return;
                R::hand_on(by_scale, C, scale_sums);
                if (!last) return;
                for (int c = 0; c < C; ++c) {
                    out.scales[(episode * p.blocks + block) * C + c] = static_cast<float>(scale_sums[c]);
                    scale_sums[c] = 0;
                }
            });
        if (out.preference == nullptr) return;
        for (int64_t i = 0; i < cells; ++i)
            for (int c = 0; c < C; ++c)
                out.preference[(chunk * p.num_cells + begin + i) * C + c] = shared[i / N * R::kSize + c * N + i % N];
    }
};

}  // namespace

void backward_in_registers(const Problem<float>& p, const std::vector<Upstream<float>>& upstream,
                           const Gradients<float>& out) {
    run_in_registers<Backward>(p, upstream, out);
}

}  // namespace efe::efe_loss
