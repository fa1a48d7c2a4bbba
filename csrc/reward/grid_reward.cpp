// grid_reward on the CPU. The definition stands in efe_kernels/reward/reference.py. All counts are
// integers, so they are exact; the few operations on them are float32, as they are there.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/library.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace efe::reward {
namespace {

constexpr int64_t kIgnored = -100;
constexpr int32_t kOutside = -1;  // the colour of an integer that is none

// Integers [B, H, W], or logits [B, H, W, C] that stand for their argmax.
struct Grid {
    const char* name;
    const Tensor& tensor;
    bool logits;
    int64_t height, width, stride_b, stride_h, stride_w, stride_c;

    Grid(const char* name, const Tensor& tensor)
        : name(name), tensor(tensor), logits(is_floating(tensor.scalar_type())), height(tensor.size(1)), width(tensor.size(2)),
          stride_b(tensor.stride(0)), stride_h(tensor.stride(1)), stride_w(tensor.stride(2)),
          stride_c(logits ? tensor.stride(3) : 0) {}

    int64_t cells() const { return height * width; }
};

// body(T{}) with the type T of a grid's elements.
template <class Body>
EFE_INLINE void for_element_type(const Grid& grid, const Body& body) {
    const ScalarType type = grid.tensor.scalar_type();
    if (grid.logits) return for_dtype(dtype_of(type), body);
    switch (type) {
        case ScalarType::Byte:
            return body(uint8_t{});
        case ScalarType::Char:
            return body(int8_t{});
        case ScalarType::Short:
            return body(int16_t{});
        case ScalarType::Int:
            return body(int32_t{});
        case ScalarType::Long:
            return body(int64_t{});
        default:
            STD_TORCH_CHECK(false, grid.name, " must hold logits or integers, it was ", type, ".");
    }
}

// body(typed pointer to the first row of an episode).
template <class Body>
EFE_INLINE void with_episode(const Grid& grid, int64_t b, const Body& body) {
    const void* const data = grid.tensor.data();
    for_element_type(grid, [&](auto zero) EFE_SIMD_BODY {
        body(static_cast<const decltype(zero)*>(data) + b * grid.stride_b);
    });
}

EFE_INLINE int32_t colour_of(int64_t value, int64_t num_colors) {
    return value >= 0 && value < num_colors ? static_cast<int32_t>(value) : kOutside;
}

// The argmax of each cell of a row: the first of equal logits wins, and NaN never does. best: room for the row.
template <class T, class A>
EFE_INLINE void argmax_row(const T* row, const Grid& grid, int64_t num_colors, A* __restrict__ best,
                           int32_t* __restrict__ colours) {
    std::fill_n(best, grid.width, -std::numeric_limits<A>::infinity());
    std::fill_n(colours, grid.width, 0);
    for (int64_t c = 0; c < num_colors; ++c) {
        const T* logits = row + c * grid.stride_c;
        for (int64_t w = 0; w < grid.width; ++w) {
            const A logit = static_cast<A>(logits[w * grid.stride_w]);
            const bool better = logit > best[w];
            colours[w] = better ? static_cast<int32_t>(c) : colours[w];
            best[w] = better ? logit : best[w];
        }
    }
}

// Room for one episode.
struct Workspace {
    std::vector<int32_t> target, prediction, excess;
    std::vector<uint8_t> counted;
    std::vector<double> best;
};

// The colour of every cell of an episode of a prediction.
EFE_INLINE void read_prediction(const Grid& grid, int64_t b, int64_t num_colors, Workspace& w) {
    w.prediction.resize(grid.cells());
    w.best.resize(grid.width);
    with_episode(grid, b, [&](const auto* episode) EFE_SIMD_BODY {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(episode)>>;
        for (int64_t h = 0; h < grid.height; ++h) {
            const T* row = episode + h * grid.stride_h;
            int32_t* const colours = w.prediction.data() + h * grid.width;
            if constexpr (std::is_integral_v<T>) {
                for (int64_t i = 0; i < grid.width; ++i) colours[i] = colour_of(row[i * grid.stride_w], num_colors);
            } else {
                argmax_row(row, grid, num_colors, reinterpret_cast<Arithmetic<T>*>(w.best.data()), colours);
            }
        }
    });
}

// The colours of the target of an episode, and which of its cells count.
EFE_INLINE void read_target(const Grid& grid, const OptionalTensor& valid, int64_t b, int64_t num_colors,
                            Workspace& w) {
    w.target.resize(grid.cells());
    w.counted.resize(grid.cells());
    with_episode(grid, b, [&](const auto* episode) EFE_SIMD_BODY {
        if constexpr (std::is_integral_v<std::remove_cv_t<std::remove_pointer_t<decltype(episode)>>>) {
            for (int64_t h = 0; h < grid.height; ++h) {
                for (int64_t i = 0; i < grid.width; ++i) {
                    const int64_t value = episode[h * grid.stride_h + i * grid.stride_w];
                    w.target[h * grid.width + i] = colour_of(value, num_colors);
                    w.counted[h * grid.width + i] = value != kIgnored;
                }
            }
        }
    });
    if (!valid.has_value()) return;
    const bool* episode = valid->data<bool>() + b * valid->stride(0);
    for (int64_t h = 0; h < grid.height; ++h)
        for (int64_t i = 0; i < grid.width; ++i)
            w.counted[h * grid.width + i] &= episode[h * valid->stride(1) + i * valid->stride(2)];
}

// The source index of each of new_size cells: nearest neighbour in the float32 arithmetic of `interpolate`.
std::vector<int64_t> resize_index(int64_t size, int64_t new_size) {
    const float scale = static_cast<float>(static_cast<double>(size) / static_cast<double>(new_size));
    std::vector<int64_t> index(new_size);
    for (int64_t i = 0; i < new_size; ++i)
        index[i] = std::min(static_cast<int64_t>(static_cast<float>(i) * scale), size - 1);
    return index;
}

// What does not depend on the episode: where a prediction is read, and the score of its size.
struct Resize {
    std::vector<int64_t> rows, columns;
    float size_score;

    Resize(const Grid& from, const Grid& to)
        : rows(resize_index(from.height, to.height)), columns(resize_index(from.width, to.width)) {
        const double differences = relative(from.height, to.height) + relative(from.width, to.width);
        size_score = static_cast<float>(1 - 0.5 * differences);
    }

    static double relative(int64_t size, int64_t target_size) {
        return static_cast<double>(std::abs(size - target_size)) / (static_cast<double>(target_size) + 1e-6);
    }
};

struct Counts {
    int64_t equal = 0;
    int64_t difference = 0;  // sum over the colours of |cells of the prediction - cells of the target|
};

EFE_INLINE Counts compare(const Resize& resize, int64_t width, int64_t num_colors, Workspace& w) {
    // One more bin takes what does not count.
    w.excess.assign(num_colors + 1, 0);
    int32_t* const excess = w.excess.data() + 1;
    Counts counts;
    const int32_t* target = w.target.data();
    const uint8_t* counted = w.counted.data();
    for (const int64_t source_row : resize.rows) {
        const int32_t* const row = w.prediction.data() + source_row * width;
        for (const int64_t source_column : resize.columns) {
            const bool counts_here = *counted++ != 0;
            const int32_t found = counts_here ? row[source_column] : kOutside;
            const int32_t wanted = counts_here ? *target : kOutside;
            ++target;
            counts.equal += counts_here && found == wanted;
            ++excess[found];
            --excess[wanted];
        }
    }
    for (int64_t c = 0; c < num_colors; ++c) counts.difference += std::abs(excess[c]);
    return counts;
}

// The first cell that is no colour, among those that are marked (all, without marks); -1 where there is none.
int64_t first_outside(const std::vector<int32_t>& colours, const uint8_t* marked) {
    for (size_t i = 0; i < colours.size(); ++i)
        if (colours[i] == kOutside && (marked == nullptr || marked[i] != 0)) return static_cast<int64_t>(i);
    return -1;
}

// outside: the first cell of each episode that is no colour, or -1.
void check_colours(const Grid& grid, const std::vector<int64_t>& outside, int64_t num_colors) {
    for (size_t b = 0; b < outside.size(); ++b) {
        if (outside[b] < 0) continue;
        const int64_t row = outside[b] / grid.width, column = outside[b] % grid.width;
        with_episode(grid, static_cast<int64_t>(b), [&](const auto* episode) {
            refuse_value(grid.name, " must hold colours from 0 to ", num_colors - 1, ", it held ",
                         static_cast<int64_t>(episode[row * grid.stride_h + column * grid.stride_w]), ".");
        });
    }
}

// Accuracy, size, colour, reversibility.
using Scores = std::array<float, 4>;

// Column b of the table [14, B]: see reward_table of the reference.
void store_scores(const Scores& before, const Scores& after, float mask_ratio, const std::vector<double>& weights,
                  float* column, int64_t batch) {
    float reward = 0;
    for (int term = 0; term < 4; ++term) {
        const float delta = std::clamp(after[term] - before[term], -1.0f, 1.0f);
        reward += static_cast<float>(weights[term]) * delta;
        column[(1 + term) * batch] = delta;
        column[(5 + term) * batch] = before[term];
        column[(9 + term) * batch] = after[term];
    }
    column[0] = reward;
    column[13 * batch] = mask_ratio;
}

Tensor grid_reward(const Tensor& before, const Tensor& after, const Tensor& target, const OptionalTensor& valid,
                   const OptionalTensor& reversibility, const std::vector<double>& weights, int64_t num_colors) {
    const Grid goal("target", target);
    const Grid predictions[2] = {{"before", before}, {"after", after}};
    for (const Grid* grid : {&goal, &predictions[0], &predictions[1]})
        for_element_type(*grid, [](auto) {});  // refuses other dtypes here: threads lose what an exception says
    const int64_t batch = target.size(0);
    Tensor out = empty({14, batch}, ScalarType::Float, target);
    if (batch == 0) return out;
    const Resize resizes[2] = {{predictions[0], goal}, {predictions[1], goal}};
    const Tensor back = contiguous_as(reversibility, ScalarType::Float);
    float* const table = out.mutable_data<float>();
    std::vector<int64_t> outside[3];
    for (auto& first : outside) first.assign(batch, -1);
    const int64_t cost = (predictions[0].cells() + predictions[1].cells()) * num_colors;
    parallel(batch, cost, [&](int64_t first, int64_t last) EFE_SIMD_BODY {
        Workspace w;
        for (int64_t b = first; b < last; ++b) {
            read_target(goal, valid, b, num_colors, w);
            outside[0][b] = first_outside(w.target, w.counted.data());
            const auto counted = static_cast<int64_t>(std::count(w.counted.begin(), w.counted.end(), 1));
            const auto count = static_cast<float>(std::max<int64_t>(counted, 1));
            Scores scores[2];
            Counts counts;
            for (int i = 0; i < 2; ++i) {
                const Grid& grid = predictions[i];
                read_prediction(grid, b, num_colors, w);
                const bool padded_alike = grid.height == goal.height && grid.width == goal.width;
                if (!grid.logits)
                    outside[1 + i][b] = first_outside(w.prediction, padded_alike ? w.counted.data() : nullptr);
                counts = compare(resizes[i], grid.width, num_colors, w);
                const float difference = static_cast<float>(counts.difference) / count / static_cast<float>(num_colors);
                scores[i] = {static_cast<float>(counts.equal) / count, resizes[i].size_score, 1 - difference,
                             back.defined() ? back.data<float>()[i * batch + b] : 0.5f};
            }
            const float mask_ratio = static_cast<float>(counted - counts.equal) / count;
            store_scores(scores[0], scores[1], mask_ratio, weights, table + b, batch);
        }
    });
    check_colours(goal, outside[0], num_colors);
    for (int i = 0; i < 2; ++i) check_colours(predictions[i], outside[1 + i], num_colors);
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(efe, CPU, library) { implement<grid_reward>(library, "grid_reward"); }

}  // namespace
}  // namespace efe::reward
