// Hands the CPU kernels of prompt refinement to torch's dispatcher.
#include "prompt/cpu.h"
#include "prompt/ops.h"

TORCH_LIBRARY_IMPL(efe, CPU, library) { efe::prompt::register_ops<efe::prompt::Cpu>(library); }
