// Launchers of the CUDA kernels (cuda.cu) on a stream of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "prompt/kernels.h"

namespace efe::prompt::cuda {

// Into how many parts the tokens of a row are split: from the shape alone.
int64_t pool_chunks(const PoolForward& args);

void pool_forward(const PoolForward& args, cudaStream_t stream);
void pool_backward(const PoolBackward& args, cudaStream_t stream);
void refine_forward(const RefineForward& args, cudaStream_t stream);
void refine_backward(const RefineBackward& args, cudaStream_t stream);
void log_prob_forward(const LogProbForward& args, cudaStream_t stream);
void log_prob_backward(const LogProbBackward& args, cudaStream_t stream);

}  // namespace efe::prompt::cuda
