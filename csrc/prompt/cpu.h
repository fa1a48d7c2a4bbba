// The CPU kernels, as a Backend (ops.h).
#pragma once

#include "common/tensor.h"
#include "prompt/kernels.h"

namespace efe::prompt {

struct Cpu {
    struct Device {
        explicit Device(const Tensor&) {}
    };
    static Tensor sum_rows(const Tensor& rows);
    static int64_t masked_mean_pool_chunks(const MaskedMeanPoolForward&) { return 1; }
    static void masked_mean_pool_forward(const MaskedMeanPoolForward& args);
    static void masked_mean_pool_backward(const MaskedMeanPoolBackward& args);
    static void refine_prompt_forward(const RefinePromptForward& args);
    static void refine_prompt_backward(const RefinePromptBackward& args);
    static void squashed_log_prob_forward(const SquashedLogProbForward& args);
    static void squashed_log_prob_backward(const SquashedLogProbBackward& args);
};

}  // namespace efe::prompt
