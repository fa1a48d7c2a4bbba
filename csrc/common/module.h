// What the pybind11 modules of the extension have in common.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "common/library.h"

namespace efe {

static_assert(TORCH_TARGET_VERSION == (2ULL << 56 | 10ULL << 48), "the oldest torch that is named below");

// efe_kernels/common/extension.py looks for this in the file, which it must not load before it knows the versions.
[[gnu::used]] static constexpr char kVersions[] =
    "efe_kernels was built with torch " TORCH_VERSION " for torch 2.10 and newer";

inline void describe(pybind11::module_& module, const char* text) {
    module.doc() = text;
    module.attr("schemas") = schemas();
}

}  // namespace efe
