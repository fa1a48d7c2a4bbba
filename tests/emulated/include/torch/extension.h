// Stands in for torch's header, which takes most of a minute to compile: csrc/bindings.cpp uses these two of it.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/version.h>
