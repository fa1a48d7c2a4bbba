// The pybind11 module efe_kernels._C. Importing it runs the static registrations of the other files, which hand
// their kernels to torch's dispatcher; the schemas are declared in Python (efe_kernels/common/library.py).
#include <torch/extension.h>

#include <cstdint>
#include <string>

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ and CUDA kernels of efe_kernels, registered with torch's dispatcher on import.";
    module.attr("torch_version") = TORCH_VERSION;
#ifdef EFE_WITH_CUDA
    module.attr("with_cuda") = true;
#else
    module.attr("with_cuda") = false;
#endif
}
