// The pybind11 module efe_kernels._C_cuda, which hands the CUDA kernels of prompt refinement to torch's dispatcher.
// Compiled only where nvcc is there (setup.py).
#include "prompt/cuda.h"

#include "common/cuda.h"
#include "common/module.h"
#include "prompt/ops.h"

namespace efe::prompt {
namespace {

// Calls a launcher with the current stream; Ops has made the tensors' device the current one.
template <class Args, void (*launcher)(const Args&, cudaStream_t)>
void on_current_stream(const Args& args) {
    launcher(args, current_stream());
    check_launch();
}

struct Cuda {
    using Device = CudaDevice;

    static constexpr auto sum_rows = efe::sum_rows;
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

STABLE_TORCH_LIBRARY_IMPL(efe, CUDA, library) { implement_ops<Cuda>(library); }

}  // namespace efe::prompt

PYBIND11_MODULE(_C_cuda, module) {
    efe::describe(module, "CUDA kernels of efe_kernels, registered with torch's dispatcher on import.");
}
