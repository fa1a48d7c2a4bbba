// The glue of the CUDA kernels as it stands, registered for CPU tensors. Torch's headers come first: only the glue's own
// word CUDA shall become CPU.
#include "common/module.h"
#include "prompt/ops.h"

#define CUDA CPU
#include "prompt/cuda_ops.cpp"
