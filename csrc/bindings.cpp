// The pybind11 module efe_kernels._C. Importing it runs the static registrations of the other files, which hand
// their kernels to torch's dispatcher; the schemas are declared in Python (efe_kernels/common/library.py).
#include "common/module.h"

PYBIND11_MODULE(_C, module) {
    efe::describe(module, "C++ kernels of efe_kernels, registered with torch's dispatcher on import.");
}
