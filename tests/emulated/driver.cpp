// Drives every launcher of csrc/prompt/cuda.h, without torch: dtypes, shapes, layouts and missing tensors as they are
// drawn, in buffers of exactly the size needed, which start off alignment. Each case runs in six schedules: three orders
// of threads and blocks, with the grid limit of the source and with one that makes every grid-stride loop loop. All six
// must write every value and give the same bits, and the values must be those of a plain loop in double.
//
//     driver ROUNDS
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/philox.h"
#include "emulator.h"
#include "prompt/cuda.h"
#include "prompt/gaussian.h"

namespace {

using efe::Dtype;
using namespace efe::prompt;

constexpr int64_t kSmallGrid = 2;
// No value passes through more roundings: a thread adds at most 9 tokens or 8 components one after another, then come 5
// lanes, up to 8 warps or 3 chunks, and functions that err by a few units in the last place.
constexpr double kRoundings = 64;
constexpr double kDeltaScale = 0.2;
constexpr uint64_t kSeed = (uint64_t{1} << 40) + 7;

std::mt19937 generator;

int64_t draw(std::initializer_list<int64_t> choices) { return choices.begin()[generator() % choices.size()]; }
bool chance(unsigned one_in) { return generator() % one_in == 0; }

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "driver: %s\n", what.c_str());
    std::exit(1);
}

// ---- tensors ----

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

Dtype accumulated(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

// Half the distance of 1 to the next value.
double rounding(Dtype dtype) {
    return dtype == Dtype::float64 ? 0x1p-53 : dtype == Dtype::float32 ? 0x1p-24
         : dtype == Dtype::float16 ? 0x1p-11 : 0x1p-8;
}

// Values in memory of exactly their size, which starts `shift` values after an aligned address.
class Values {
public:
    Values(Dtype dtype, int64_t count, int64_t shift = 0)
        : dtype_(dtype), count_(count), begin_(shift * size_of(dtype)), memory_(begin_ + count * size_of(dtype), 0xff) {}

    int64_t count() const { return count_; }
    void* data() { return memory_.data() + begin_; }
    const void* data() const { return memory_.data() + begin_; }

    double operator[](int64_t index) const {
        switch (dtype_) {
            case Dtype::float32:
                return at<float>(index);
            case Dtype::float64:
                return at<double>(index);
            case Dtype::float16:
                return __half2float(at<__half>(index));
            case Dtype::bfloat16:
                return __bfloat162float(at<__nv_bfloat16>(index));
        }
        std::abort();
    }

    void set(int64_t index, double value) {
        switch (dtype_) {
            case Dtype::float32:
                return put(index, static_cast<float>(value));
            case Dtype::float64:
                return put(index, value);
            case Dtype::float16:
                return put(index, __float2half_rn(static_cast<float>(value)));
            case Dtype::bfloat16:
                return put(index, __float2bfloat16_rn(static_cast<float>(value)));
        }
    }

    bool operator==(const Values& other) const { return memory_ == other.memory_; }
    Dtype dtype() const { return dtype_; }

private:
    template <class T>
    T at(int64_t index) const {
        T value;
        std::memcpy(&value, static_cast<const T*>(data()) + index, sizeof value);
        return value;
    }

    template <class T>
    void put(int64_t index, T value) {
        std::memcpy(static_cast<T*>(data()) + index, &value, sizeof value);
    }

    Dtype dtype_;
    int64_t count_, begin_;
    std::vector<unsigned char> memory_;
};

enum Layout { contiguous, transposed, columns_first, every_second, padded, padded_rows, aligned_rows, expanded };

constexpr std::array kLayouts{contiguous, transposed,  columns_first, every_second,
                              padded,     padded_rows, aligned_rows,  expanded};

using Sizes = std::array<int64_t, 3>;

Sizes strides_of(const Sizes& size, Layout layout) {
    const auto [rows, length, width] = size;
    switch (layout) {
        case transposed:
            return {width, rows * width, 1};
        case columns_first:
            return {length * width, 1, length};
        case every_second:
            return {2 * length * width, 2 * width, 2};
        case padded:
            return {length * (width + 1), width + 1, 1};
        case padded_rows:
            return {length * width + 1, width, 1};
        case aligned_rows:
            return {length * (width + 16 - width % 16), width + 16 - width % 16, 1};
        case expanded:
            return {0, width, 1};
        default:
            return {length * width, width, 1};
    }
}

// Normal values with any strides; a matrix [rows, columns] is [rows, 1, columns], its middle stride never read.
struct Tensor {
    Sizes size, stride;
    Values values;

    Tensor(Dtype dtype, const Sizes& size, Layout layout, int64_t shift)
        : size(size), stride(strides_of(size, layout)), values(dtype, extent(), shift) {
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < values.count(); ++i) values.set(i, normal(generator));
    }

    double at(int64_t row, int64_t middle, int64_t column) const {
        return values[row * stride[0] + middle * stride[1] + column * stride[2]];
    }
    double at(int64_t row, int64_t column) const { return at(row, 0, column); }
    Matrix matrix() const { return {values.data(), stride[0], stride[2]}; }

private:
    int64_t extent() const {
        int64_t last = 0;
        for (int i = 0; i < 3; ++i) last += (size[i] - 1) * stride[i];
        return size[0] * size[1] * size[2] == 0 ? 0 : last + 1;
    }
};

Tensor matrix(Dtype dtype, int64_t rows, int64_t columns) {
    return {dtype, {rows, 1, columns}, kLayouts[generator() % kLayouts.size()], draw({0, 0, 1, 2, 3})};
}

// A tensor that may be missing: its matrix is null and its values are 0 then.
struct Optional {
    Tensor tensor;
    bool given;

    Optional(Dtype dtype, int64_t rows, int64_t columns) : tensor(::matrix(dtype, rows, columns)), given(!chance(4)) {}
    Matrix matrix() const { return given ? tensor.matrix() : Matrix{}; }
    double at(int64_t row, int64_t column) const { return given ? tensor.at(row, column) : 0.0; }
};

// ---- schedules and comparison ----

struct Output {
    const char* name;
    Values values;
    bool asked = true;  // for a gradient that may not be needed

    void* data() { return asked ? values.data() : nullptr; }
};

using Outputs = std::vector<Output>;

void check_written(const std::string& what, const Output& output) {
    for (int64_t i = 0; i < output.values.count(); ++i)
        if (output.asked && !std::isfinite(output.values[i]))
            fail(what + ": " + output.name + "[" + std::to_string(i) + "] is not written or not finite");
}

// The outputs of `launch`, which are the same in every schedule.
template <class Launch>
Outputs in_every_schedule(const std::string& what, const Outputs& empty, const Launch& launch) {
    using cuda_emulator::Order;
    static const int64_t limit = cuda_emulator::grid_limit;
    static const char* const names[] = {"forward", "reversed", "shuffled"};
    Outputs first;
    for (const int64_t grid : {limit, kSmallGrid}) {
        for (const Order order : {Order::forward, Order::reversed, Order::shuffled}) {
            cuda_emulator::order = order;
            cuda_emulator::grid_limit = grid;
            const std::string schedule =
                what + ", " + names[static_cast<int>(order)] + (grid == kSmallGrid ? " in a small grid" : "");
            Outputs found = empty;
            launch(found);
            for (const Output& output : found) check_written(schedule, output);
            if (first.empty()) first = found;
            for (size_t i = 0; i < found.size(); ++i)
                if (!(found[i].values == first[i].values))
                    fail(schedule + ": " + found[i].name + " has other bits than in the first schedule");
        }
    }
    return first;
}

// What a plain loop finds, and the sum of the magnitudes of all that it added up, which rounding errors are relative to.
struct Expected {
    double value = 0, magnitude = 0;
};

void compare(const std::string& what, const Output& output, int64_t index, const Expected& expected) {
    if (!output.asked) return;
    const Dtype dtype = output.values.dtype();
    const double tolerance = rounding(dtype) * std::abs(expected.value) +
                             kRoundings * rounding(accumulated(dtype)) * expected.magnitude +
                             (dtype == Dtype::float16 ? 0x1p-25 : 0);  // half of its smallest value
    const double found = output.values[index];
    if (!(std::abs(found - expected.value) <= tolerance))
        fail(what + ": " + output.name + "[" + std::to_string(index) + "] is " + std::to_string(found) +
             ", expected " + std::to_string(expected.value));
}

std::string describe(const char* op, Dtype dtype, std::initializer_list<int64_t> numbers) {
    static const char* const names[] = {" float32", " float64", " float16", " bfloat16"};
    std::string text = op + std::string(names[static_cast<int>(dtype)]);
    for (const int64_t number : numbers) text += " " + std::to_string(number);
    return text;
}

// ---- masked_mean_pool ----

struct Mask {
    int64_t row, column;
    std::unique_ptr<bool[]> tokens;

    Mask(int64_t rows, int64_t length)
        : row(chance(2) ? length : 1), column(row == 1 ? rows : 1), tokens(new bool[rows * length]) {
        for (int64_t i = 0; i < rows * length; ++i) tokens[i] = generator() % 3 != 0;
        for (int64_t l = 0; rows > 1 && l < length; ++l) tokens[l * column] = false;  // the first of several rows
    }
    bool at(int64_t n, int64_t l) const { return tokens[n * row + l * column]; }
    Matrix matrix() const { return {tokens.get(), row, column}; }
};

void masked_mean_pool_forward(Dtype dtype, const Sizes& size, Layout layout, const Mask& mask) {
    const auto [rows, length, width] = size;
    const Tensor hidden(dtype, size, layout, draw({0, 0, 0, 0, 1, 3}));
    const std::string what = describe("masked_mean_pool_forward", dtype, {rows, length, width, layout});
    MaskedMeanPoolForward args{dtype, rows, length, width, hidden.values.data(), hidden.stride[0], hidden.stride[1],
                     hidden.stride[2], mask.matrix(), nullptr, nullptr, 1, nullptr, nullptr};
    args.chunks = cuda::masked_mean_pool_chunks(args);
    const Outputs empty{{"pooled", {dtype, rows * width}}, {"scale", {accumulated(dtype), rows}}};
    const Outputs outputs = in_every_schedule(what, empty, [&](Outputs& out) {
        const int64_t parts = args.chunks > 1 ? rows * args.chunks : 0;
        Values sums(accumulated(dtype), parts * width);
        const std::unique_ptr<int32_t[]> counts(new int32_t[parts]);
        args.pooled = out[0].data();
        args.scale = out[1].data();
        args.partial_sums = parts > 0 ? sums.data() : nullptr;
        args.partial_counts = parts > 0 ? counts.get() : nullptr;
        cuda::masked_mean_pool_forward(args, nullptr);
    });
    for (int64_t n = 0; n < rows; ++n) {
        double tokens = 0;
        for (int64_t l = 0; l < length; ++l) tokens += mask.at(n, l);
        const double scale = tokens > 0 ? 1 / tokens : 0;
        compare(what, outputs[1], n, {scale, scale});
        for (int64_t e = 0; e < width; ++e) {
            Expected sum;
            for (int64_t l = 0; l < length; ++l) {
                if (!mask.at(n, l)) continue;
                sum.value += hidden.at(n, l, e) * scale;
                sum.magnitude += std::abs(hidden.at(n, l, e)) * scale;
            }
            compare(what, outputs[0], n * width + e, sum);
        }
    }
}

void masked_mean_pool_backward(Dtype dtype, const Sizes& size, const Mask& mask) {
    const auto [rows, length, width] = size;
    const Tensor grad = matrix(dtype, rows, width), scale(accumulated(dtype), {1, 1, rows}, contiguous, draw({0, 1}));
    const std::string what = describe("masked_mean_pool_backward", dtype, {rows, length, width});
    const Outputs empty{{"grad_hidden", {dtype, rows * length * width, draw({0, 0, 1})}}};
    const Outputs outputs = in_every_schedule(what, empty, [&](Outputs& out) {
        cuda::masked_mean_pool_backward({dtype, rows, length, width, grad.matrix(), mask.matrix(), scale.values.data(),
                                         out[0].data()}, nullptr);
    });
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t l = 0; l < length; ++l)
            for (int64_t e = 0; e < width; ++e) {
                const double value = mask.at(n, l) ? grad.at(n, e) * scale.at(0, n) : 0.0;
                compare(what, outputs[0], (n * length + l) * width + e, {value, std::abs(value)});
            }
}

Sizes pool_sizes() {
    return {draw({0, 1, 2, 3, 3}), draw({0, 1, 20, 65, 151, 200}), draw({1, 3, 8, 63, 64, 129, 264, 264})};
}

void pool(Dtype dtype, const Sizes& size, Layout layout) {
    const Mask mask(size[0], size[1]);
    masked_mean_pool_forward(dtype, size, layout, mask);
    masked_mean_pool_backward(dtype, size, mask);
}

// ---- refine_prompt and squashed_log_prob ----

struct Policy {
    int64_t batch, dimension;
    Dtype dtype;  // of prompt and refined
    Tensor mean, log_std;
    Optional noise;  // without it, that of the seed

    explicit Policy(Dtype dtype)
        : batch(draw({0, 1, 2, 5, 5})),
          dimension(draw({1, 2, 3, 4, 5, 7, 10, 63, 128, 129, 257, 1023, 1024, 1100})),
          dtype(dtype),
          mean(matrix(accumulated(dtype), batch, dimension + 1)),
          log_std(matrix(accumulated(dtype), batch, dimension + 1)),
          noise(accumulated(dtype), batch, dimension + 1) {}

    double noise_at(int64_t b, int64_t d) const {
        if (noise.given) return noise.at(b, d);
        const efe::Normals4<double> four = efe::philox_normal4<double>(kSeed, b, d / 4);
        return std::array{four.n0, four.n1, four.n2, four.n3}[d % 4];
    }

    Outputs results(std::initializer_list<const char*> rows, std::initializer_list<const char*> scalars) const {
        Outputs outputs;
        for (const char* name : rows) outputs.push_back({name, {accumulated(dtype), batch * (dimension + 1), draw({0, 1})}});
        for (const char* name : scalars) outputs.push_back({name, {accumulated(dtype), batch}});
        return outputs;
    }

    Squashed<double> squash(double u, int64_t d) const { return d < dimension ? squash_tanh(u) : squash_sigmoid(u); }
};

// log_prob and entropy from the sums over a row; `magnitude` is that of all that was added to them.
void compare_score(
    const std::string& what, const Outputs& outputs, size_t first, int64_t b, int64_t dimension,
    const RowSums<double>& sums, double magnitude) {
    const Score<double> expected = score(sums, dimension, std::log(kDeltaScale));
    magnitude += static_cast<double>(dimension + 1) * (kEntropyConstant - std::log(kDeltaScale));
    compare(what, outputs[first], b, {expected.log_prob, magnitude});
    compare(what, outputs[first + 1], b, {expected.entropy, magnitude});
}

Values refine_prompt_forward(const Policy& policy) {
    const auto& [batch, dimension, dtype, mean, log_std, noise] = policy;
    const std::string what = describe("refine_prompt_forward", dtype, {batch, dimension});
    const Tensor prompt = matrix(dtype, batch, dimension);
    Outputs empty = policy.results({"action"}, {"log_prob", "entropy"});
    empty.push_back({"refined", {dtype, batch * dimension, draw({0, 1})}});
    const Outputs outputs = in_every_schedule(what, empty, [&](Outputs& out) {
        cuda::refine_prompt_forward({dtype, batch, dimension, kDeltaScale, std::log(kDeltaScale), kSeed,
                                     prompt.matrix(), mean.matrix(), log_std.matrix(), noise.matrix(), out[3].data(),
                                     out[0].data(), out[1].data(), out[2].data()}, nullptr);
    });
    for (int64_t b = 0; b < batch; ++b) {
        RowSums<double> sums{0, 0, 0};
        std::vector<Expected> u(dimension + 1);
        double magnitude = 0;
        for (int64_t d = 0; d <= dimension; ++d) {
            const double n = policy.noise_at(b, d), std = std::exp(log_std.at(b, d));
            u[d] = {mean.at(b, d) + std * n, std::abs(mean.at(b, d)) + std * (std::abs(n) + 1)};
            compare(what, outputs[0], b * (dimension + 1) + d, u[d]);
            const double log_slope = policy.squash(u[d].value, d).log_slope;
            sums.noise_squared += n * n;
            sums.log_std += log_std.at(b, d);
            sums.log_slope += log_slope;
            magnitude += n * n + 1 + std::abs(log_std.at(b, d)) + std::abs(log_slope) + 2 * u[d].magnitude;
        }
        compare_score(what, outputs, 1, b, dimension, sums, magnitude);
        const double weight = squash_sigmoid(u[dimension].value).value * kDeltaScale;
        for (int64_t d = 0; d < dimension; ++d)
            compare(what, outputs[3], b * dimension + d,
                    {prompt.at(b, d) + weight * squash_tanh(u[d].value).value,
                     std::abs(prompt.at(b, d)) + kDeltaScale * (1 + u[d].magnitude + u[dimension].magnitude)});
    }
    return outputs[0].values;
}

struct UpstreamGradients {
    Optional refined, action, log_prob, entropy;

    explicit UpstreamGradients(const Policy& policy)
        : refined(policy.dtype, policy.batch, policy.dimension),
          action(accumulated(policy.dtype), policy.batch, policy.dimension + 1),
          log_prob(accumulated(policy.dtype), policy.batch, 1),
          entropy(accumulated(policy.dtype), policy.batch, 1) {}
};

void refine_prompt_backward(const Policy& policy, const Values& action) {
    const auto& [batch, dimension, dtype, mean, log_std, noise] = policy;
    const std::string what = describe("refine_prompt_backward", dtype, {batch, dimension});
    const UpstreamGradients grad(policy);
    Outputs empty = policy.results({"grad_mean", "grad_log_std"}, {});
    for (Output& output : empty) output.asked = !chance(4);
    const Outputs outputs = in_every_schedule(what, empty, [&](Outputs& out) {
        cuda::refine_prompt_backward({dtype, batch, dimension, kDeltaScale, kSeed, grad.refined.matrix(),
                                      grad.action.matrix(), grad.log_prob.matrix(), grad.entropy.matrix(),
                                      {action.data(), dimension + 1, 1}, log_std.matrix(), noise.matrix(),
                                      out[0].data(), out[1].data()}, nullptr);
    });
    for (int64_t b = 0; b < batch; ++b) {
        const double determinant = grad.entropy.at(b, 0) - grad.log_prob.at(b, 0);
        const double determinant_magnitude = std::abs(grad.entropy.at(b, 0)) + std::abs(grad.log_prob.at(b, 0));
        const double alpha = squash_sigmoid(action[b * (dimension + 1) + dimension]).value;
        Expected grad_alpha;
        for (int64_t d = 0; d <= dimension; ++d) {
            const int64_t at = b * (dimension + 1) + d;
            const Squashed<double> squashed = policy.squash(action[at], d);
            Expected squash;  // the gradient of the squashed value
            if (d < dimension) {
                const double change = grad.refined.at(b, d) * kDeltaScale;
                squash = {change * alpha, std::abs(change)};
                grad_alpha.value += change * squashed.value;
                grad_alpha.magnitude += std::abs(change);
            } else {
                squash = grad_alpha;
            }
            const double n = policy.noise_at(b, d), s = log_std.at(b, d), grad_action = grad.action.at(b, d);
            const RefinePromptGradient<double> expected =
                refine_prompt_gradient(squashed, squash.value, grad_action, determinant, s, n);
            const double magnitude = squash.magnitude + std::abs(grad_action) + 2 * determinant_magnitude;
            compare(what, outputs[0], at, {expected.mean, magnitude});
            compare(what, outputs[1], at,
                    {expected.log_std, magnitude * std::exp(s) * (std::abs(n) + 1) + determinant_magnitude});
        }
    }
}

void squashed_log_prob_forward(const Policy& policy, const Tensor& action) {
    const auto& [batch, dimension, dtype, mean, log_std, noise] = policy;
    const std::string what = describe("squashed_log_prob_forward", dtype, {batch, dimension});
    const Outputs outputs = in_every_schedule(what, policy.results({}, {"log_prob", "entropy"}), [&](Outputs& out) {
        cuda::squashed_log_prob_forward({dtype, batch, dimension, std::log(kDeltaScale), action.matrix(),
                                         mean.matrix(), log_std.matrix(), out[0].data(), out[1].data()}, nullptr);
    });
    for (int64_t b = 0; b < batch; ++b) {
        RowSums<double> sums{0, 0, 0};
        double magnitude = 0;
        for (int64_t d = 0; d <= dimension; ++d) {
            const double u = action.at(b, d), m = mean.at(b, d), s = log_std.at(b, d), inverse_std = std::exp(-s);
            const double n = (u - m) * inverse_std, most = (std::abs(u) + std::abs(m)) * inverse_std;
            const double log_slope = policy.squash(u, d).log_slope;
            sums.noise_squared += n * n;
            sums.log_std += s;
            sums.log_slope += log_slope;
            magnitude += most * most + std::abs(s) + std::abs(log_slope) + 2 * std::abs(u);
        }
        compare_score(what, outputs, 0, b, dimension, sums, magnitude);
    }
}

void squashed_log_prob_backward(const Policy& policy, const Tensor& action) {
    const auto& [batch, dimension, dtype, mean, log_std, noise] = policy;
    const std::string what = describe("squashed_log_prob_backward", dtype, {batch, dimension});
    const UpstreamGradients grad(policy);
    Outputs empty = policy.results({"grad_action", "grad_mean", "grad_log_std"}, {});
    for (Output& output : empty) output.asked = !chance(4);
    const Outputs outputs = in_every_schedule(what, empty, [&](Outputs& out) {
        cuda::squashed_log_prob_backward({dtype, batch, dimension, grad.log_prob.matrix(), grad.entropy.matrix(),
                                          action.matrix(), mean.matrix(), log_std.matrix(), out[0].data(),
                                          out[1].data(), out[2].data()}, nullptr);
    });
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t d = 0; d <= dimension; ++d) {
            const double u = action.at(b, d), m = mean.at(b, d), s = log_std.at(b, d), inverse_std = std::exp(-s);
            const double log_prob = grad.log_prob.at(b, 0), entropy = grad.entropy.at(b, 0);
            const SquashedLogProbGradient<double> expected =
                squashed_log_prob_gradient(policy.squash(u, d).log_slope_slope, u, m, s, log_prob, entropy);
            const double most = (std::abs(u) + std::abs(m)) * inverse_std;
            const double mean_magnitude = std::abs(log_prob) * most * inverse_std;
            const double both = std::abs(log_prob) + std::abs(entropy);
            const int64_t at = b * (dimension + 1) + d;
            compare(what, outputs[0], at, {expected.action, mean_magnitude + 2 * both});
            compare(what, outputs[1], at, {expected.mean, mean_magnitude});
            compare(what, outputs[2], at, {expected.log_std, std::abs(log_prob) * (most * most + 1) + both});
        }
}

void policy(Dtype dtype) {
    const Policy policy(dtype);
    refine_prompt_backward(policy, refine_prompt_forward(policy));
    if (dtype != accumulated(dtype)) return;
    const Tensor action = matrix(dtype, policy.batch, policy.dimension + 1);
    squashed_log_prob_forward(policy, action);
    squashed_log_prob_backward(policy, action);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) fail("expected the number of rounds");
    if (cuda_emulator::grid_limit == 0) fail("kMaxGrid was not found in the source: grid-stride loops would not loop");
    const int rounds = std::atoi(arguments[1]);
    for (int round = 0; round < rounds; ++round)
        for (const Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16}) {
            generator.seed(4 * round + static_cast<int>(dtype));
            for (const Layout layout : kLayouts) pool(dtype, pool_sizes(), layout);
            for (int repeat = 0; repeat < 4; ++repeat) policy(dtype);
            pool(dtype, {3, 200, 0}, contiguous);  // without a column there is still a scale
        }
    std::printf("%d rounds\n", rounds);
}
