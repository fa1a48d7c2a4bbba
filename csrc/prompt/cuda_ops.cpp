// Hands the CUDA kernels of prompt refinement to torch's dispatcher. Compiled only where nvcc is there (setup.py).
#include "prompt/cuda.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "prompt/ops.h"

namespace efe::prompt {
namespace {

// Calls a launcher with the current stream; Ops has made the tensors' device the current one.
template <class Args, void (*launcher)(const Args&, cudaStream_t)>
void on_current_stream(const Args& args) {
    launcher(args, c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Cuda {
    static constexpr auto masked_mean_pool_chunks = cuda::masked_mean_pool_chunks;
    static constexpr auto masked_mean_pool_forward =
        on_current_stream<MaskedMeanPoolForward, cuda::masked_mean_pool_forward>;
    static constexpr auto masked_mean_pool_backward =
        on_current_stream<MaskedMeanPoolBackward, cuda::masked_mean_pool_backward>;
    static constexpr auto refine_prompt_forward =
        on_current_stream<RefinePromptForward, cuda::refine_prompt_forward>;
    static constexpr auto refine_prompt_backward =
        on_current_stream<RefinePromptBackward, cuda::refine_prompt_backward>;
    static constexpr auto squashed_log_prob_forward =
        on_current_stream<SquashedLogProbForward, cuda::squashed_log_prob_forward>;
    static constexpr auto squashed_log_prob_backward =
        on_current_stream<SquashedLogProbBackward, cuda::squashed_log_prob_backward>;
};

}  // namespace

TORCH_LIBRARY_IMPL(efe, CUDA, library) {
    register_ops<Cuda>(library);
}

}  // namespace efe::prompt
