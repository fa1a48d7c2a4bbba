// Stands in for CUDA's header where kernels are emulated.
#pragma once

using cudaStream_t = struct CUstream_st*;
