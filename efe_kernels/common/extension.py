"""Loads the C++/CUDA extension, whose import registers its kernels with torch's dispatcher."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

import torch


def load() -> str | None:
    """Import `efe_kernels._C`. Returns None where that worked, else a sentence that says why not and what to do."""
    if importlib.util.find_spec("efe_kernels._C") is None:
        return (
            "the C++ extension was not built, so CPU tensors are served by plain PyTorch. Install a C++ compiler, "
            "then run: pip install --no-build-isolation --force-reinstall --no-deps efe-kernels"
        )
    try:
        importlib.import_module("efe_kernels._C")
    except ImportError as error:
        return (
            f"the C++ extension does not load with torch {torch.__version__} ({error}), so CPU tensors are served by "
            "plain PyTorch. It must be rebuilt with this torch: "
            "pip install --no-build-isolation --force-reinstall --no-deps efe-kernels"
        )
    return None


PROBLEM = load()
if PROBLEM is not None:
    warnings.warn(f"efe_kernels: {PROBLEM}", stacklevel=2)
