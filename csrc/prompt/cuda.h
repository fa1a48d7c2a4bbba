// Launchers of the CUDA kernels (cuda_*.cu) on a stream of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "prompt/kernels.h"

namespace efe::prompt::cuda {

// Into how many parts the tokens of a row are split: from the shape alone.
int64_t masked_mean_pool_chunks(const MaskedMeanPoolForward& args);

void masked_mean_pool_forward(const MaskedMeanPoolForward& args, cudaStream_t stream);
void masked_mean_pool_backward(const MaskedMeanPoolBackward& args, cudaStream_t stream);
void refine_prompt_forward(const RefinePromptForward& args, cudaStream_t stream);
void refine_prompt_backward(const RefinePromptBackward& args, cudaStream_t stream);
void squashed_log_prob_forward(const SquashedLogProbForward& args, cudaStream_t stream);
void squashed_log_prob_backward(const SquashedLogProbBackward& args, cudaStream_t stream);

}  // namespace efe::prompt::cuda
