// arc_efe on the CPU: the terms of the ARC-EFE loss that look at every cell of the plan. The definition stands in
// efe_kernels/arc_efe/reference.py, as does the derivation of the gradients. Both passes go through blocks of cells, and
// in a block through the steps, on small arrays [C, kCells].
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "common/inline.h"
#include "common/library.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/sums.h"
#include "common/tensor.h"

namespace efe::arc_efe {
namespace {

constexpr int64_t kCells = 64;
constexpr double kEps = 1e-8;
constexpr double kFill = -1e9;  // the logits of masked cells
constexpr int64_t kCost = 64;   // of an outcome of a cell at a step, in elements

// Row-major; N = H W cells.
template <class A>
struct Problem {
    const A *forward, *backward, *observation;  // [T, N, C]
    const A* preference;                        // [C, N]
    const A* mask;                              // [N], or null
    int64_t steps, height, width, outcomes;

    int64_t cells() const { return height * width; }
    int64_t blocks() const { return (cells() + kCells - 1) / kCells; }
    int64_t cost() const { return kCost * kCells * steps * outcomes; }  // of a block
    EFE_INLINE A mask_of(int64_t cell) const { return mask == nullptr ? A(1) : mask[cell]; }
};

// The cells from `first` on, and their masks, 0 after the last cell.
template <class A>
struct Block {
    int64_t first, count;
    A mask[kCells];

    EFE_INLINE Block(const Problem<A>& problem, int64_t index)
        : first(index * kCells), count(std::min(kCells, problem.cells() - first)) {
        for (int64_t i = 0; i < kCells; ++i) mask[i] = i < count ? problem.mask_of(first + i) : A(0);
    }
};

// rows [C, kCells] of cells [N, C] at one step, 0 after the last cell.
template <class A>
EFE_INLINE void load(const Problem<A>& problem, const A* cells, int64_t step, const Block<A>& block, A* rows) {
    const A* const from = cells + (step * problem.cells() + block.first) * problem.outcomes;
    for (int64_t c = 0; c < problem.outcomes; ++c) {
        A* const row = rows + c * kCells;
        for (int64_t i = 0; i < block.count; ++i) row[i] = from[i * problem.outcomes + c];
        std::fill(row + block.count, row + kCells, A(0));
    }
}

// The preference of a block, rows [C, kCells].
template <class A>
EFE_INLINE void load_preference(const Problem<A>& problem, const Block<A>& block, A* rows) {
    for (int64_t c = 0; c < problem.outcomes; ++c)
        std::copy_n(problem.preference + c * problem.cells() + block.first, block.count, rows + c * kCells);
}

template <class A>
EFE_INLINE void store(const Problem<A>& problem, const A* rows, int64_t step, const Block<A>& block, A* cells) {
    A* const to = cells + (step * problem.cells() + block.first) * problem.outcomes;
    for (int64_t i = 0; i < block.count; ++i)
        for (int64_t c = 0; c < problem.outcomes; ++c) to[i * problem.outcomes + c] = rows[c * kCells + i];
}

// A NaN stays one.
template <class A>
EFE_INLINE A clamp(A p) {
    return p < A(kEps) ? A(kEps) : p > A(1) ? A(1) : p;
}

template <class A>
EFE_INLINE A log_eps(A p) {
    return math::log_normal_range(p + A(kEps));
}

// m / (m sum + eps), where there is a mask.
template <class A>
EFE_INLINE void renormalizer(const Problem<A>& problem, const Block<A>& block, const A* sum, A* scale) {
    for (int64_t i = 0; i < kCells; ++i)
        scale[i] = problem.mask == nullptr ? A(1) : block.mask[i] / (sum[i] * block.mask[i] + A(kEps));
}

// One plan at one step of a block.
template <class A>
struct Plan {
    std::vector<A> room;
    A *x, *p, *clamped, *surprise;  // [C, kCells]; surprise is log(p + eps)
    // Largest probability, sum of what is clamped, what R multiplies it with, sum of p log(p + eps).
    A largest[kCells], sum[kCells], scale[kCells], information[kCells];

    Plan(const Plan&) = delete;
    explicit Plan(int64_t outcomes) : room(4 * outcomes * kCells) {
        A** const rows[] = {&x, &p, &clamped, &surprise};
        for (int64_t k = 0; k < 4; ++k) *rows[k] = room.data() + k * outcomes * kCells;
    }

    EFE_INLINE A kept(int64_t c, int64_t i) const { return clamped[c * kCells + i] * scale[i]; }

    EFE_INLINE void read(const Problem<A>& problem, const A* cells, int64_t step, const Block<A>& block) {
        const int64_t outcomes = problem.outcomes;
        load(problem, cells, step, block, x);
        if (problem.mask != nullptr)
            for (int64_t c = 0; c < outcomes; ++c)
                for (int64_t i = 0; i < kCells; ++i)
                    x[c * kCells + i] = block.mask[i] == A(0) ? A(kFill) : x[c * kCells + i];
        A top[kCells], total[kCells] = {};
        for (int64_t i = 0; i < kCells; ++i) top[i] = x[i];
        for (int64_t c = 1; c < outcomes; ++c)
            for (int64_t i = 0; i < kCells; ++i) top[i] = x[c * kCells + i] > top[i] ? x[c * kCells + i] : top[i];
        for (int64_t c = 0; c < outcomes; ++c) {
            EFE_INDEPENDENT
            for (int64_t i = 0; i < kCells; ++i) {
                const A e = math::exp(x[c * kCells + i] - top[i]);
                p[c * kCells + i] = e;
                total[i] += e;
            }
        }
        for (int64_t i = 0; i < kCells; ++i) {
            largest[i] = A(1) / total[i];  // where e is 1; a NaN stays one
            sum[i] = information[i] = 0;
        }
        for (int64_t c = 0; c < outcomes; ++c) {
            EFE_INDEPENDENT
            for (int64_t i = 0; i < kCells; ++i) {
                const A value = p[c * kCells + i] / total[i], log_value = log_eps(value);
                p[c * kCells + i] = value;
                clamped[c * kCells + i] = clamp(value);
                surprise[c * kCells + i] = log_value;
                sum[i] += clamp(value);
                information[i] += value * log_value;
            }
        }
        renormalizer(problem, block, sum, scale);
    }
};

// Both plans at one step of a block, and what they have in common.
template <class A>
struct Pair {
    Plan<A> forward, backward;
    std::vector<A> middle;  // R(M), [C, kCells]
    A middle_scale[kCells], confidence[kCells];

    explicit Pair(int64_t outcomes) : forward(outcomes), backward(outcomes), middle(outcomes * kCells) {}

    EFE_INLINE void read(const Problem<A>& problem, int64_t step, const Block<A>& block) {
        forward.read(problem, problem.forward, step, block);
        backward.read(problem, problem.backward, step, block);
        A sum[kCells];
        for (int64_t i = 0; i < kCells; ++i) sum[i] = A(0.5) * (forward.sum[i] + backward.sum[i]);
        renormalizer(problem, block, sum, middle_scale);
        for (int64_t c = 0; c < problem.outcomes; ++c)
            for (int64_t i = 0; i < kCells; ++i)
                middle[c * kCells + i] =
                    A(0.5) * (forward.clamped[c * kCells + i] + backward.clamped[c * kCells + i]) * middle_scale[i];
        for (int64_t i = 0; i < kCells; ++i)
            confidence[i] = A(1) / (A(1) - A(0.5) * (forward.information[i] + backward.information[i]));
    }
};

// Places of the sums of a block in a row; from kSums on the logits [T, C].
enum Sum : int64_t { risk, bidirectional, ambiguity, kSums };

// What the first pass finds for each cell.
template <class A>
struct Cells {
    std::vector<int32_t> colours;  // [T, N], for the second pass, over the movement
    std::vector<A> confidence;     // [T, N], likewise
    A* certainty;                  // [N]
};

// Argmax: the first of equal values, and a NaN before every number.
template <class A>
EFE_INLINE void find_colours(const A* x, int64_t outcomes, int32_t* colours) {
    A best[kCells];
    for (int64_t i = 0; i < kCells; ++i) {
        best[i] = x[i];
        colours[i] = 0;
    }
    for (int64_t c = 1; c < outcomes; ++c)
        for (int64_t i = 0; i < kCells; ++i) {
            const A value = x[c * kCells + i];
            const bool better = (value > best[i]) | ((value != value) & (best[i] == best[i]));
            colours[i] = better ? static_cast<int32_t>(c) : colours[i];
            best[i] = better ? value : best[i];
        }
}

// The sums of a block. preference, observed: room for [C, kCells].
template <class A>
EFE_INLINE void add_block(const Problem<A>& problem, int64_t index, Pair<A>& pair, A* preference, A* observed,
                          Cells<A>& cells, double* sums) {
    const Block<A> block(problem, index);
    const int64_t outcomes = problem.outcomes;
    const Plan<A>&one = pair.forward, &other = pair.backward;
    A by_cell[kSums][kCells] = {}, first[kCells] = {}, above_first[kCells] = {};
    load_preference(problem, block, preference);
    for (int64_t t = 0; t < problem.steps; ++t) {
        pair.read(problem, t, block);
        load(problem, problem.observation, t, block, observed);
        for (int64_t c = 0; c < outcomes; ++c) {
            EFE_INDEPENDENT
            for (int64_t i = 0; i < kCells; ++i) {
                const A both = one.kept(c, i) + other.kept(c, i), probability = clamp(observed[c * kCells + i]);
                by_cell[risk][i] -= preference[c * kCells + i] * log_eps(one.kept(c, i));
                by_cell[bidirectional][i] -= A(0.5) * both * log_eps(pair.middle[c * kCells + i]);
                by_cell[ambiguity][i] -= probability * math::log_normal_range(probability);
            }
            const A* const x = one.x + c * kCells;
            sums[kSums + t * outcomes + c] += sum(block.count, [&](int64_t i) EFE_SIMD_BODY { return double(x[i]); });
        }
        int32_t colours[kCells];
        find_colours(one.x, outcomes, colours);
        const int64_t place = t * problem.cells() + block.first;
        std::copy_n(colours, block.count, cells.colours.data() + place);
        std::copy_n(pair.confidence, block.count, cells.confidence.data() + place);
        for (int64_t i = 0; i < kCells; ++i) {
            first[i] = t == 0 ? one.largest[i] : first[i];
            above_first[i] += one.largest[i] - first[i];
        }
    }
    for (int64_t s = 0; s < kSums; ++s)
        sums[s] += sum(block.count, [&](int64_t i) EFE_SIMD_BODY { return double(by_cell[s][i]); });
    for (int64_t i = 0; i < block.count; ++i)
        cells.certainty[block.first + i] = first[i] + above_first[i] / static_cast<A>(problem.steps);
}

// mv, the mean offsets (dy, dx) [W] of the cells of a row at a step to where their colour is at the next one.
template <class A>
EFE_INLINE void movement(const Problem<A>& problem, const int32_t* colours, int64_t step, int64_t row, A* dy, A* dx) {
    std::fill_n(dy, problem.width, A(0));
    std::fill_n(dx, problem.width, A(0));
    if (step == problem.steps - 1 || row == 0 || row == problem.height - 1) return;
    const int64_t width = problem.width;
    const int32_t* const own = colours + step * problem.cells() + row * width;
    const int32_t* const next = own + problem.cells();
    EFE_INDEPENDENT
    for (int64_t w = 1; w < width - 1; ++w) {
        int32_t count = 0, down = 0, right = 0;
        EFE_UNROLL
        for (int y = -1; y <= 1; ++y)
            EFE_UNROLL
            for (int x = -1; x <= 1; ++x) {
                const int32_t same = next[y * width + w + x] == own[w] ? 1 : 0;
                count += same;
                down += y * same;
                right += x * same;
            }
        const A share = A(1) / static_cast<A>(std::max(count, 1));
        dy[w] = static_cast<A>(down) * share;
        dx[w] = static_cast<A>(right) * share;
    }
}

// turned [T, N], and the sum of it times the confidence.
template <class A>
double turn(const Problem<A>& problem, const Cells<A>& cells, A* turned) {
    const int64_t rows = problem.steps * problem.height, width = problem.width;
    std::vector<double> sums(rows);
    parallel(rows, 32 * width, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        std::vector<A> moves(4 * width);
        A *const dy = moves.data(), *const dx = dy + width, *const back_y = dx + width, *const back_x = back_y + width;
        for (int64_t r = first; r < last; ++r) {
            const int64_t step = r / problem.height, row = r % problem.height;
            A* const found = turned + r * width;
            if (step == problem.steps - 1) {
                std::fill_n(found, width, A(0));
            } else {
                movement(problem, cells.colours.data(), step, row, dy, dx);
                movement(problem, cells.colours.data(), problem.steps - 1 - step, row, back_y, back_x);
                EFE_INDEPENDENT
                for (int64_t w = 0; w < width; ++w) {
                    const A y = dy[w] + back_y[w], x = dx[w] + back_x[w];
                    found[w] = std::sqrt(y * y + x * x) * problem.mask_of(row * width + w);
                }
            }
            const A* const confidence = cells.confidence.data() + r * width;
            sums[r] = sum(width, [&](int64_t w) EFE_SIMD_BODY { return double(found[w]) * double(confidence[w]); });
        }
    });
    double total = 0;
    for (const double part : sums) total += part;
    return total;
}

Tensor row_major(const Tensor& tensor) { return contiguous_as(tensor, tensor.scalar_type()); }

// Row-major.
struct Inputs {
    Tensor forward, backward, observation, preference, mask;
    int64_t steps, height, width, outcomes;

    Inputs(const Tensor& forward_predictions, const Tensor& backward_predictions, const Tensor& observation_probs,
           const Tensor& preference_probs, const OptionalTensor& cells)
        : forward(row_major(forward_predictions)), backward(row_major(backward_predictions)),
          observation(row_major(observation_probs)), preference(row_major(preference_probs)),
          mask(cells.has_value() ? row_major(*cells) : Tensor()), steps(forward.size(0)), height(forward.size(1)),
          width(forward.size(2)), outcomes(forward.size(3)) {}

    template <class A>
    Problem<A> problem() const {
        return {forward.data<A>(), backward.data<A>(), observation.data<A>(), preference.data<A>(), mask.data<A>(),
                steps,             height,             width,                 outcomes};
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> arc_efe_forward(
    const Tensor& forward_predictions, const Tensor& backward_predictions, const Tensor&,
    const Tensor& observation_probs, const Tensor& preference, const OptionalTensor& mask) {
    const ScalarType type = forward_predictions.scalar_type();
    const Inputs inputs(forward_predictions, backward_predictions, observation_probs, preference, mask);
    const auto result = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
        return empty(sizes, dtype, forward_predictions);
    };
    Tensor scalars[] = {result({}, type), result({}, type), result({}, type), result({}, type)};
    Tensor mean_logits = result({inputs.steps, inputs.outcomes}, ScalarType::Double);
    Tensor certainty = result({inputs.height, inputs.width}, type);
    Tensor turned = result({inputs.steps, inputs.height, inputs.width}, type);
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const Problem<A> problem = inputs.problem<A>();
        const int64_t size = kSums + problem.steps * problem.outcomes;
        std::vector<double> sums(problem.blocks() * size), total(size);
        Cells<A> cells{std::vector<int32_t>(problem.steps * problem.cells()),
                       std::vector<A>(problem.steps * problem.cells()), certainty.mutable_data<A>()};
        parallel(problem.blocks(), problem.cost(), [&](int64_t first, int64_t last) EFE_SIMD_BODY {
            Pair<A> pair(problem.outcomes);
            std::vector<A> preference(problem.outcomes * kCells), observed(problem.outcomes * kCells);
            for (int64_t b = first; b < last; ++b)
                add_block(problem, b, pair, preference.data(), observed.data(), cells, sums.data() + b * size);
        });
        add_up(sums.data(), problem.blocks(), size, total.data());
        const double reversal = turn(problem, cells, turned.mutable_data<A>());
        const double found[] = {total[risk], total[bidirectional], total[ambiguity], reversal};
        for (int64_t s = 0; s < 4; ++s) *scalars[s].mutable_data<A>() = static_cast<A>(found[s]);
        for (int64_t k = kSums; k < size; ++k)
            mean_logits.mutable_data<double>()[k - kSums] = total[k] / static_cast<double>(problem.cells());
    });
    return {std::move(scalars[0]),  std::move(scalars[1]), std::move(scalars[2]), std::move(scalars[3]),
            std::move(mean_logits), std::move(certainty),  std::move(turned)};
}

// The upstream gradients, 0 for those that are absent.
template <class A>
struct Upstream {
    A risk, bidirectional, ambiguity, reversal;
    std::vector<A> mean_logits;  // of each logit, [T, C]
};

// Where the gradients go, null for those that are not needed.
template <class A>
struct Gradients {
    A *forward, *backward, *observation, *preference;
};

// grad holds dK [C, kCells] and becomes the gradient of the logits: see the reference. middle: that of clamp p by way of
// the mean of both plans; weight: ½ g_conf conf².
template <class A>
EFE_INLINE void through_softmax(const Problem<A>& problem, const Plan<A>& plan, const A* middle, const A* weight,
                                A* grad) {
    A shared[kCells] = {};
    if (problem.mask != nullptr)
        for (int64_t c = 0; c < problem.outcomes; ++c)
            for (int64_t i = 0; i < kCells; ++i) shared[i] += grad[c * kCells + i] * plan.kept(c, i);
    A mean[kCells] = {};
    for (int64_t c = 0; c < problem.outcomes; ++c) {
        EFE_INDEPENDENT
        for (int64_t i = 0; i < kCells; ++i) {
            const int64_t k = c * kCells + i;
            const A p = plan.p[k], inside = plan.clamped[k] == p ? A(1) : A(0);
            const A of_clamped = (grad[k] - shared[i]) * plan.scale[i] + middle[k];
            grad[k] = of_clamped * inside + weight[i] * (plan.surprise[k] + p / (p + A(kEps)));
            mean[i] += grad[k] * p;
        }
    }
    for (int64_t c = 0; c < problem.outcomes; ++c)
        for (int64_t i = 0; i < kCells; ++i)
            grad[c * kCells + i] = plan.p[c * kCells + i] * (grad[c * kCells + i] - mean[i]);
}

// The gradient of clamp p by way of M, for each of the two plans.
template <class A>
EFE_INLINE void through_middle(const Problem<A>& problem, const Pair<A>& pair, A bidirectional, A* grad) {
    A shared[kCells] = {};
    for (int64_t c = 0; c < problem.outcomes; ++c) {
        EFE_INDEPENDENT
        for (int64_t i = 0; i < kCells; ++i) {
            const A middle = pair.middle[c * kCells + i];
            const A both = pair.forward.kept(c, i) + pair.backward.kept(c, i), slope = both / (middle + A(kEps));
            grad[c * kCells + i] = slope;
            shared[i] += slope * middle;
        }
    }
    for (int64_t c = 0; c < problem.outcomes; ++c)
        for (int64_t i = 0; i < kCells; ++i)
            grad[c * kCells + i] = A(-0.25) * bidirectional * pair.middle_scale[i] *
                                   (grad[c * kCells + i] - (problem.mask == nullptr ? A(0) : shared[i]));
}

// Arrays [C, kCells] of the backward pass.
template <class A>
struct Workspace {
    Pair<A> pair;
    std::vector<A> preference, log_kept, own, shared, middle, observed;

    explicit Workspace(int64_t outcomes) : pair(outcomes) {
        for (std::vector<A>* rows : {&preference, &log_kept, &own, &shared, &middle, &observed})
            rows->resize(outcomes * kCells);
    }
};

template <class A>
EFE_INLINE void plan_gradients(const Problem<A>& problem, const Upstream<A>& upstream, const A* turned, int64_t step,
                               const Block<A>& block, Workspace<A>& w, const Gradients<A>& out) {
    const Plan<A>& plan = w.pair.forward;
    const int64_t outcomes = problem.outcomes;
    A weight[kCells] = {};
    for (int64_t i = 0; i < block.count; ++i) {
        const A confidence = w.pair.confidence[i];
        const A turned_here = turned[step * problem.cells() + block.first + i];
        weight[i] = A(0.5) * upstream.reversal * turned_here * confidence * confidence;
    }
    through_middle(problem, w.pair, upstream.bidirectional, w.middle.data());
    for (int64_t c = 0; c < outcomes; ++c) {
        EFE_INDEPENDENT
        for (int64_t i = 0; i < kCells; ++i) {
            const int64_t k = c * kCells + i;
            const A shared = A(-0.5) * upstream.bidirectional * log_eps(w.pair.middle[k]);
            w.shared[k] = shared;
            w.own[k] = shared - upstream.risk * w.preference[k] / (plan.kept(c, i) + A(kEps));
        }
    }
    if (out.forward != nullptr) {
        through_softmax(problem, plan, w.middle.data(), weight, w.own.data());
        for (int64_t c = 0; c < outcomes; ++c)
            for (int64_t i = 0; i < kCells; ++i)
                w.own[c * kCells + i] += block.mask[i] != 0 ? upstream.mean_logits[step * outcomes + c] : A(0);
        store(problem, w.own.data(), step, block, out.forward);
    }
    if (out.backward != nullptr) {
        through_softmax(problem, w.pair.backward, w.middle.data(), weight, w.shared.data());
        store(problem, w.shared.data(), step, block, out.backward);
    }
}

template <class A>
EFE_INLINE void block_gradients(const Problem<A>& problem, const Upstream<A>& upstream, const A* turned, int64_t index,
                                Workspace<A>& w, const Gradients<A>& out) {
    const Block<A> block(problem, index);
    const int64_t size = problem.outcomes * kCells;
    load_preference(problem, block, w.preference.data());
    std::fill(w.log_kept.begin(), w.log_kept.end(), A(0));
    for (int64_t t = 0; t < problem.steps; ++t) {
        if (out.forward != nullptr || out.backward != nullptr) {
            w.pair.read(problem, t, block);
            plan_gradients(problem, upstream, turned, t, block, w, out);
        } else if (out.preference != nullptr) {
            w.pair.forward.read(problem, problem.forward, t, block);
        }
        if (out.preference != nullptr)
            for (int64_t c = 0; c < problem.outcomes; ++c)
                for (int64_t i = 0; i < kCells; ++i)
                    w.log_kept[c * kCells + i] += log_eps(w.pair.forward.kept(c, i));
        if (out.observation != nullptr) {
            A* const observed = w.observed.data();
            load(problem, problem.observation, t, block, observed);
            EFE_INDEPENDENT
            for (int64_t k = 0; k < size; ++k) {
                const A p = clamp(observed[k]), inside = p == observed[k] ? A(1) : A(0);
                observed[k] = -upstream.ambiguity * (math::log_normal_range(p) + A(1)) * inside;
            }
            store(problem, observed, t, block, out.observation);
        }
    }
    if (out.preference != nullptr)
        for (int64_t c = 0; c < problem.outcomes; ++c)
            for (int64_t i = 0; i < block.count; ++i)
                out.preference[c * problem.cells() + block.first + i] = -upstream.risk * w.log_kept[c * kCells + i];
}

template <class A>
A number_or_zero(const OptionalTensor& grad) {
    return grad.has_value() ? static_cast<A>(number_in(*grad)) : A(0);
}

std::vector<Tensor> arc_efe_backward(const OptionalTensor& grad_risk, const OptionalTensor& grad_bidirectional,
                                     const OptionalTensor& grad_ambiguity, const OptionalTensor& grad_reversal,
                                     const OptionalTensor& grad_mean_logits, const std::vector<bool>& needs,
                                     const Tensor& forward_predictions, const Tensor& backward_predictions,
                                     const Tensor& state_predictions, const Tensor& observation_probs,
                                     const Tensor& preference, const OptionalTensor& mask, const Tensor& turned) {
    const ScalarType type = forward_predictions.scalar_type();
    const Inputs inputs(forward_predictions, backward_predictions, observation_probs, preference, mask);
    const Tensor turned_cells = row_major(turned);
    const Tensor grad_mean = contiguous_as(grad_mean_logits, ScalarType::Double);
    const Tensor* const examples[] = {&inputs.forward, &inputs.backward, &state_predictions, &inputs.observation,
                                      &inputs.preference};
    std::vector<Tensor> results;
    size_t places[5];
    for (size_t k = 0; k < 5; ++k) {
        places[k] = results.size();
        if (needs[k]) results.push_back(k == 2 ? zeros(state_predictions) : empty(*examples[k], type));
    }
    for_arithmetic(type, [&](auto zero) {
        using A = decltype(zero);
        const Problem<A> problem = inputs.problem<A>();
        Upstream<A> upstream{number_or_zero<A>(grad_risk), number_or_zero<A>(grad_bidirectional),
                             number_or_zero<A>(grad_ambiguity), number_or_zero<A>(grad_reversal),
                             std::vector<A>(problem.steps * problem.outcomes)};
        if (grad_mean.defined())
            for (size_t k = 0; k < upstream.mean_logits.size(); ++k)
                upstream.mean_logits[k] = static_cast<A>(grad_mean.data<double>()[k] / double(problem.cells()));
        const auto out = [&](size_t k) { return needs[k] ? results[places[k]].mutable_data<A>() : nullptr; };
        const Gradients<A> gradients{out(0), out(1), out(3), out(4)};
        const A* const cells = turned_cells.data<A>();
        parallel(problem.blocks(), problem.cost(), [&](int64_t first, int64_t last) EFE_SIMD_BODY {
            Workspace<A> w(problem.outcomes);
            for (int64_t b = first; b < last; ++b) block_gradients(problem, upstream, cells, b, w, gradients);
        });
    });
    return results;
}

STABLE_TORCH_LIBRARY_IMPL(efe, CPU, library) {
    implement<arc_efe_forward>(library, "arc_efe_forward");
    implement<arc_efe_backward>(library, "arc_efe_backward");
}

}  // namespace
}  // namespace efe::arc_efe
