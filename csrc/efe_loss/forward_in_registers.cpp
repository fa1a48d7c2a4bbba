// The sums of efe_loss_forward on the CPU, N cells at once.
#include <cstdint>
#include <memory>

#include "efe_loss/problem.h"
#include "efe_loss/registers.h"

namespace efe::efe_loss {
namespace {

template <int C, int N>
struct Forward : Registers<C, N> {
    using R = Registers<C, N>;
    using typename R::I;
    using typename R::Preference;
    using typename R::Rows;
    using typename R::Step;
    using typename R::V;

    struct Sums {
        V of[kSums];
    };

    static EFE_INLINE V observation_entropy(const Rows& probs) {
        const V smallest = R::all(std::numeric_limits<float>::min());
        V total{};
        EFE_UNROLL
        for (int c = 0; c < C; ++c) total -= probs[c] * R::log_finite(R::at_least(smallest, probs[c]));
        return total;
    }

    // Cross-entropy of the target, and whether the argmax misses it, of the logits x and what softmax makes of them.
    static EFE_INLINE void add_final(const Rows& x, V step_top, V log_sum, V target, I counted, Sums& sums) {
        // The first of several, and outcome 0 where none is finite: an impossible one equals no finite number.
        V top = R::all(std::numeric_limits<float>::lowest()), wanted{}, best{};
        EFE_UNROLL
        for (int c = 0; c < C; ++c) top = x[c] > top ? x[c] : top;
        EFE_UNROLL
        for (int c = C - 1; c >= 0; --c) {
            const V value = x[c], index = R::all(static_cast<float>(c));
            best = value == top ? index : best;
            wanted = target == index ? value : wanted;
        }
        // The target's own logit, not its d: an impossible outcome costs infinity.
        sums.of[consistency] += R::where(counted, log_sum - (wanted - step_top));
        sums.of[wrong_cells] += R::where(counted, best != target ? R::all(1) : V{});
    }

    // direction: rows [C, N] of one step. What all outcomes of a cell share is no direction.
    static EFE_INLINE void add_direction(const Rows& x, I counted, float* direction) {
        const V range = R::all(kPromptLogitRange);
        const V shared = R::at_least(-range, R::at_most(range, x[0]));
        EFE_UNROLL
        for (int c = 1; c < C; ++c) {
            const V own = R::at_least(-range, R::at_most(range, x[c])) - shared;
            R::store(direction + c * N, R::load(direction + c * N) + R::where(counted, own));
        }
    }

    // direction: rows [T, C, N], or null.
    static EFE_INLINE void add_cells(const Problem<float>& p, int64_t episode, int64_t first, int64_t count,
                                     const Preference& preference, V lowest, float* staged, float* direction,
                                     Sums& sums) {
        const I counted = R::counted_of(p, episode, first, count);
        const Rows log_c{preference.log_c, N};
        R::prefetch(p, p.logits, episode, first);
        V risk_sum{}, ambiguity_sum{}, agreement_sum{};
        const auto add_step = [&](const Rows& x, const Step& step, int64_t t) EFE_SIMD_BODY {
            risk_sum += step.information - step.cross;
            if (p.observation_probs)
                ambiguity_sum += observation_entropy(
                    R::rows_of(p.observation_probs, episode, t, first, count, staged + 2 * R::kSize));
            else
                ambiguity_sum -= step.information;
            if (direction != nullptr) add_direction(x, counted, direction + t * R::kSize);
        };
        for (int64_t pair = 0; pair < p.pairs; ++pair) {
            const int64_t t = p.steps - 1 - pair, partner = p.backward_logits ? t : pair;
            const Rows x = R::rows_of(p.logits, episode, t, first, count, staged);
            const Step a = R::softmax(x, log_c, lowest);
            add_step(x, a, t);
            if (pair == 0) {
                const V target = R::target_of(p, episode, first, count);
                Rows final = x;
                V top = a.top, log_sum = a.log_sum;
                if (p.final_logits) {
                    final = R::rows_of(p.final_logits, episode, 0, first, count, staged + R::kSize);
                    const Step step = R::softmax(final, log_c, lowest);
                    top = step.top;
                    log_sum = step.log_sum;
                }
                add_final(final, top, log_sum, target, counted, sums);
            }
            if (!p.backward_logits && t == partner) {
                // The middle step is its own partner: their divergence is 0, or NaN where the step holds one.
                agreement_sum += 0.0f * a.information;
                continue;
            }
            const Rows y = R::rows_of(p.backward_logits ? p.backward_logits : p.logits, episode, partner, first, count,
                                      staged + R::kSize);
            const Step b = R::softmax(y, log_c, lowest);
            V divergence = a.information + b.information + 2 * kLn2;
            EFE_UNROLL
            for (int c = 0; c < C; ++c) {
                const V both = a.e[c] * a.inverse + b.e[c] * b.inverse;
                divergence -= both * R::log_finite(both);
            }
            agreement_sum += p.backward_logits ? 0.5f * divergence : divergence;
            if (!p.backward_logits) add_step(y, b, partner);
        }
        sums.of[risk] += R::where(counted, risk_sum);
        sums.of[ambiguity] += R::where(counted, ambiguity_sum);
        sums.of[agreement] += R::where(counted, agreement_sum);
        sums.of[counted_cells] += R::where(counted, R::all(1));
        if (p.has_target_preference())
            sums.of[anchor] += R::where(counted, R::anchor_of(p, first, count, preference).divergence);
    }

    static EFE_INLINE void run(const Problem<float>& p, int64_t chunk, int64_t block, int64_t begin, int64_t cells,
                               Partials& partials) {
        const V lowest = R::lowest_exponent();
        const std::unique_ptr<float[]> direction(partials.has_direction() ? new float[p.steps * R::kSize]() : nullptr);
        alignas(64) float staged[3 * R::kSize];
        Sums sums{};
        R::for_each_register(
            p, chunk, begin, cells, lowest, staged,
            [&](int64_t episode, int64_t, int64_t first, int64_t count, const Preference& preference) EFE_SIMD_BODY {
                add_cells(p, episode, first, count, preference, lowest, staged, direction.get(), sums);
            },
            [&](int64_t episode, bool) EFE_SIMD_BODY {
                double* const found = partials.of(episode, block);
                for (int64_t s = 0; s < kSums; ++s) {
                    found[s] += R::sum(sums.of[s]);
                    sums.of[s] = V{};
                }
                if (direction != nullptr) R::hand_on(direction.get(), p.steps * C, found + kSums);
            });
    }
};

}  // namespace

void forward_in_registers(const Problem<float>& p, Partials& partials) {
    run_in_registers<Forward>(p, partials);
}

}  // namespace efe::efe_loss
