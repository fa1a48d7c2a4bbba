// The pybind11 module efe_kernels._C. Importing it runs the static registrations of the other files, which hand
// their kernels to torch's dispatcher; the schemas are declared in Python (efe_kernels/common/library.py).
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <cstdint>
#include <string>

namespace {

// efe_kernels/common/extension.py looks for this in the file, which it must not load before it knows the version.
[[gnu::used]] constexpr char kBuiltWith[] = "efe_kernels was built with torch " TORCH_VERSION;

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ and CUDA kernels of efe_kernels, registered with torch's dispatcher on import.";
#ifdef EFE_WITH_CUDA
    module.attr("with_cuda") = true;
#else
    module.attr("with_cuda") = false;
#endif
}
