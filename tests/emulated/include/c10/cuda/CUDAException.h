// Stands in for torch's header where kernels are emulated: a launch that fails has aborted.
#pragma once

#define C10_CUDA_KERNEL_LAUNCH_CHECK()
