// What both directions of the EFE loss on the CPU share: the inputs as the kernels read them, the walk over them, and
// the preference. The loss is fused as in efe_kernels/efe_loss/kernels.py, where the derivation of the gradient stands.
//
// Work is split into (block of cells, chunk of episodes), whose number depends on the shape alone. Each writes partial
// sums of its own, which are added up in a fixed order: the same bits with any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "common/math.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"
#include "efe_loss/cells.h"
#include "efe_loss/outcomes.h"
#include "efe_loss/product.h"

namespace efe::efe_loss {

constexpr int64_t kTerms = 7;
enum Term { risk, ambiguity, consistency, agreement, anchor, prompt_term, step_term };

// Numbers of outcomes with which cells are computed in registers, in float arithmetic.
constexpr int64_t kFewestInRegisters = 2, kMostInRegisters = 16;
// Cells of a task in registers, multiples of every register's lanes: many, because memory is read the faster the longer
// its pieces are, but fewer where a small batch would leave threads without a task.
constexpr int64_t kMostCells = 1024, kFewestCells = 256, kTasks = 8;

constexpr double kPromptLogitRange = 9984;  // a number in every dtype
constexpr double kTargetPreferenceFloor = 1e-8;

// The tensors and the settings of the ops, as in efe_kernels/efe_loss/reference.py.
struct Inputs {
    const Tensor& logits;                     // [B, T, H, W, C]
    const OptionalTensor& backward_logits;    // [B, T, H, W, C]
    const OptionalTensor& final_logits;       // [B, H, W, C]
    const OptionalTensor& observation_probs;  // [B, T, H, W, C]
    const Tensor& preference_logits;          // [H, W, C] or [B, H, W, C]
    const OptionalTensor& prompt;             // [B, E]
    const OptionalTensor& projection;         // [C, E]
    const Tensor& target;                     // [B, H, W]
    const OptionalTensor& target_preference;  // [H, W, C]
    const OptionalTensor& valid;              // [B, H, W]

    bool has_direction() const { return prompt.has_value() && projection.has_value(); }
};

struct Settings {
    const std::vector<double>& weights;  // [kTerms]
    bool hard_cell;
    double hard_cell_min_ratio;
    int64_t max_cells, ignore_index;
    const std::string& reduction;  // "none", "sum" or "mean" over the episodes

    bool reduces() const { return reduction != "none"; }
    // d result / d total of one episode.
    double share(int64_t batch) const { return reduction == "mean" && batch > 0 ? 1.0 / batch : 1.0; }
};

// An x86 CPU without AVX2 goes the way of many outcomes: to compile for it, too, would take half as long again.
template <class A>
bool fits_registers(int64_t outcomes) {
#if defined(__x86_64__)
    if (cpu_capability() == Capability::baseline) return false;
#endif
    return std::is_same_v<A, float> && outcomes >= kFewestInRegisters && outcomes <= kMostInRegisters;
}

inline int64_t cells_in_registers(int64_t batch, int64_t num_cells) {
    int64_t cells = kMostCells;
    while (cells > kFewestCells && batch * ((num_cells + cells - 1) / cells) < kTasks) cells /= 2;
    return cells;
}

// The inputs as the kernels read them. Small tensors are converted once: log-free copies, one row of cells per outcome.
template <class A>
struct Problem {
    static constexpr int64_t kMaxChunks = 16;

    int64_t batch, steps, num_cells, outcomes, block_size, blocks, chunks, pairs;
    CellView logits, backward_logits, final_logits, observation_probs, preference_logits;
    Tensor target;                                                    // [B, H * W]
    std::unique_ptr<bool[]> counted;                                  // [B, H * W]
    std::unique_ptr<A[]> scales;                                      // [B, C] of the preference logits; null without a prompt
    std::unique_ptr<A[]> target_preference, log_target_preference;    // [C, H * W], or null
    bool preference_per_episode;

    Problem(const Inputs& inputs, int64_t ignore_index);

    int64_t chunk_size() const { return (batch + chunks - 1) / chunks; }
    bool in_registers() const { return block_size != kCells; }
    bool has_target_preference() const { return target_preference != nullptr; }
    // Whether the preference of a cell is another one in another episode.
    bool preference_varies() const { return preference_per_episode || scales != nullptr; }
    const A* scales_of(int64_t episode) const {  // [C], or null
        return scales != nullptr ? scales.get() + episode * outcomes : nullptr;
    }
    const int64_t* targets_of(int64_t episode, const Block<A>& block) const {  // [block.count]
        return target.template data<int64_t>() + episode * num_cells + block.first;
    }
};

// Which cells count; those must hold one of the outcomes.
inline std::unique_ptr<bool[]> counted_cells_of(const Tensor& target, const OptionalTensor& valid, int64_t outcomes,
                                                int64_t ignore_index) {
    const int64_t* const targets = target.data<int64_t>();
    const int64_t count = target.numel();
    const Tensor marks = contiguous_as(valid, ScalarType::Bool);
    const bool* const marked = marks.data<bool>();
    std::unique_ptr<bool[]> counted(new bool[count]);
    const auto is_outcome = [&](int64_t i) EFE_SIMD_BODY { return targets[i] >= 0 && targets[i] < outcomes; };
    std::atomic<bool> all_are_outcomes{true};
    parallel(count, 1, [&](int64_t begin, int64_t end) EFE_SIMD_BODY {
        bool found = true;
        for (int64_t i = begin; i < end; ++i) {
            counted[i] = targets[i] != ignore_index && (marked == nullptr || marked[i]);
            found &= !counted[i] | is_outcome(i);
        }
        if (!found) all_are_outcomes = false;
    });
    for (int64_t i = 0; !all_are_outcomes && i < count; ++i)
        if (counted[i] && !is_outcome(i))
            refuse_value("target must be in [0, ", outcomes, ") or ignore_index where a cell counts, it was ",
                         targets[i], ".");
    return counted;
}

template <class A>
Problem<A>::Problem(const Inputs& inputs, int64_t ignore_index)
    : batch(inputs.logits.size(0)),
      steps(inputs.logits.size(1)),
      num_cells(inputs.logits.size(2) * inputs.logits.size(3)),
      outcomes(inputs.logits.size(4)),
      block_size(fits_registers<A>(outcomes) ? cells_in_registers(batch, num_cells) : kCells),
      blocks((num_cells + block_size - 1) / block_size),
      chunks(std::min(batch, kMaxChunks)),
      pairs(inputs.backward_logits.has_value() ? steps : (steps + 1) / 2),
      logits(view_of(inputs.logits)),
      backward_logits(view_of(inputs.backward_logits)),
      final_logits(view_of(inputs.final_logits)),
      observation_probs(view_of(inputs.observation_probs)),
      preference_logits(view_of(inputs.preference_logits)),
      target(contiguous_as(inputs.target, ScalarType::Long)),
      counted(counted_cells_of(target, inputs.valid, outcomes, ignore_index)),
      preference_per_episode(inputs.preference_logits.dim() == 4) {
    if (inputs.prompt.has_value()) {
        Table prompt = table_of(*inputs.prompt);
        prompt.columns = outcomes;
        scales = values_of<A>(prompt);
        for (int64_t i = 0; i < batch * outcomes; ++i) scales[i] = A(1) / (A(1) + std::exp(-scales[i]));
    }
    if (inputs.target_preference.has_value()) {
        const Tensor given = contiguous_as(*inputs.target_preference, CppTypeToScalarType<A>::value);
        const Table table{given.data(), dtype_of(given.scalar_type()), outcomes, num_cells, 1, outcomes};
        target_preference = values_of<A>(table);
        log_target_preference.reset(new A[outcomes * num_cells]);
        parallel(outcomes * num_cells, 1, [&](int64_t begin, int64_t end) EFE_SIMD_BODY {
            constexpr A kFloor = static_cast<A>(kTargetPreferenceFloor);
            const A* const x = target_preference.get();
            for (int64_t i = begin; i < end; ++i)
                log_target_preference[i] = math::log_normal_range(x[i] < kFloor ? kFloor : x[i]);
        });
    }
}

// What is summed over cells, beside the direction of the plan: the first five terms, wrong cells, counted cells.
constexpr int64_t kSums = 7;
enum Sum { wrong_cells = 5, counted_cells = 6 };

// What the blocks of each episode have added: values [B, blocks, width], the sums and then the direction.
struct Partials {
    int64_t blocks, width;
    std::vector<double> values;

    Partials(int64_t batch, int64_t blocks, int64_t width)
        : blocks(blocks), width(width), values(batch * blocks * width) {}

    bool has_direction() const { return width > kSums; }

    double* of(int64_t episode, int64_t block) { return values.data() + (episode * blocks + block) * width; }

    std::vector<double> total(int64_t episode) {
        std::vector<double> sums(width);
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t i = 0; i < width; ++i) sums[i] += of(episode, block)[i];
        return sums;
    }
};

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

// The sums of every block of every episode, and all gradients that cells write: forward_in_registers.cpp and
// backward_in_registers.cpp.
void forward_in_registers(const Problem<float>& p, Partials& partials);
void backward_in_registers(const Problem<float>& p, const std::vector<Upstream<float>>& upstream,
                           const Gradients<float>& out);

// The preference of a block [C, kCells]: its logits as given and times the scales of the prompt, its probabilities c.
template <class A>
struct Preference {
    A *logits, *scaled_logits, *c, *log_c;
};

// One step of a block: its logits and what `softmax` makes of them.
template <class A>
struct Step {
    A *logits, *p, *d;               // [C, kCells]
    A l[kCells], information[kCells];
};

// Room for one block of one episode: arrays [C, kCells].
template <class A>
struct Scratch {
    int64_t size;
    std::vector<A> storage;
    Step<A> one, other;  // two steps between which there is agreement
    A* observation;      // the probabilities of a step
    A* p_sums;           // the sum of the probabilities of all steps
    A* preference_sum;   // the gradient of the preference, summed over the episodes of a chunk
    A* unread;
    Preference<A> preference;

    explicit Scratch(int64_t outcomes) : size(outcomes * kCells) {
        A** const arrays[] = {
            &one.logits,      &one.p,  &one.d,          &other.logits,      &other.p,
            &other.d,         &unread, &observation,    &p_sums,            &preference_sum,
            &preference.c,    &preference.log_c,        &preference.logits, &preference.scaled_logits};
        storage.resize(size * std::size(arrays));
        A* free = storage.data();
        for (A** array : arrays) {
            *array = free;
            free += size;
        }
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

template <class A>
void load_step(const CellView& view, int64_t episode, int64_t step, const Block<A>& block, Step<A>& out) {
    load(view, episode, step, block, out.logits);
    softmax(out.logits, view.outcomes, out.p, out.d, out.l, out.information);
}

template <class A>
void mark_counted(const Problem<A>& p, int64_t episode, Block<A>& block) {
    const bool* counted = p.counted.get() + episode * p.num_cells + block.first;
    for (int64_t i = 0; i < kCells; ++i) block.counted[i] = i < block.count && counted[i] ? A(1) : A(0);
}

template <class A>
void load_preference(const Problem<A>& p, int64_t episode, const Block<A>& block, const Preference<A>& preference) {
    A *const logits = preference.logits, *const scaled_logits = preference.scaled_logits;
    A* const log_c = preference.log_c;
    load(p.preference_logits, episode, 0, block, logits);
    const A* scales = p.scales_of(episode);
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t k = 0; k < p.outcomes; ++k) {
            const A scale = scales != nullptr ? scales[k] : A(1);
            for (int64_t i = k * kCells; i < (k + 1) * kCells; ++i) {
                logits[i] = finite_logit(logits[i]);
                scaled_logits[i] = logits[i] * scale;
            }
        }
    });
    A l[kCells], unread[kCells];
    softmax(scaled_logits, p.outcomes, preference.c, log_c, l, unread);
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t k = 0; k < p.outcomes; ++k)
            for (int64_t i = 0; i < kCells; ++i) log_c[k * kCells + i] -= l[i];
    });
}

// KL(c || target preference) per cell, 0 where it is not set; is_set as 0 or 1.
template <class A>
void anchor_divergence(const Problem<A>& p, const Block<A>& block, const Preference<A>& preference, A* divergence,
                       A* is_set) {
    const A *c = preference.c, *log_c = preference.log_c;
    const A* anchors = p.target_preference.get() + block.first;
    const A* logs = p.log_target_preference.get() + block.first;
    vectorized([&]() EFE_SIMD_BODY {
        for (int64_t i = 0; i < kCells; ++i) divergence[i] = is_set[i] = 0;
        for (int64_t first = 0; first < p.outcomes; first += kOutcomesInRun) {
            A run[kCells] = {};
            for (int64_t k = first; k < std::min(first + kOutcomesInRun, p.outcomes); ++k)
                for (int64_t i = 0; i < block.count; ++i) {
                    is_set[i] += anchors[k * p.num_cells + i];
                    run[i] += c[k * kCells + i] * (log_c[k * kCells + i] - logs[k * p.num_cells + i]);
                }
            for (int64_t i = 0; i < kCells; ++i) divergence[i] += run[i];
        }
        for (int64_t i = 0; i < kCells; ++i) {
            is_set[i] = is_set[i] != 0 ? A(1) : A(0);
            divergence[i] = is_set[i] != 0 ? divergence[i] : A(0);
        }
    });
}

// Runs body(block, episode, chunk, scratch), the preference being loaded, for every block and every episode of each
// chunk, and between(block, chunk, scratch) after the episodes of a chunk.
template <class A, class Body, class Between>
void for_each_block(const Problem<A>& p, const Body& body, const Between& between) {
    torch::stable::parallel_for(0, p.blocks * p.chunks, 1, [&](int64_t begin, int64_t end) {
        Scratch<A> scratch(p.outcomes);
        for (int64_t task = begin; task < end; ++task) {
            Block<A> block{task / p.chunks * kCells, 0, {}};
            block.count = std::min(kCells, p.num_cells - block.first);
            const int64_t chunk = task % p.chunks, first = chunk * p.chunk_size();
            for (int64_t episode = first; episode < std::min(first + p.chunk_size(), p.batch); ++episode) {
                mark_counted(p, episode, block);
                load_preference(p, episode, block, scratch.preference);
                body(block, episode, chunk, scratch);
            }
            between(block, chunk, scratch);
        }
    });
}

}  // namespace efe::efe_loss
