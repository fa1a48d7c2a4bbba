// Hands the CUDA kernels of prompt refinement to torch's dispatcher. Compiled only where nvcc is there (setup.py).
#include "prompt/cuda.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "prompt/ops.h"

namespace efe::prompt {
namespace {

// Runs a launcher on the current stream; Ops has made the tensors' device the current one.
template <class Args>
void launch(void (*launcher)(const Args&, cudaStream_t), const Args& args) {
    launcher(args, c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Cuda {
    static int64_t pool_chunks(const PoolForward& args) { return cuda::pool_chunks(args); }
    static void pool_forward(const PoolForward& args) { launch(cuda::pool_forward, args); }
    static void pool_backward(const PoolBackward& args) { launch(cuda::pool_backward, args); }
    static void refine_forward(const RefineForward& args) { launch(cuda::refine_forward, args); }
    static void refine_backward(const RefineBackward& args) { launch(cuda::refine_backward, args); }
    static void log_prob_forward(const LogProbForward& args) { launch(cuda::log_prob_forward, args); }
    static void log_prob_backward(const LogProbBackward& args) { launch(cuda::log_prob_backward, args); }
};

}  // namespace

TORCH_LIBRARY_IMPL(efe, CUDA, library) {
    register_ops<Cuda>(library);
}

}  // namespace efe::prompt
