"""Loads the C++/CUDA extension, whose import registers its kernels with torch's dispatcher."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from pathlib import Path

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def load() -> str | None:
    """Import `efe_kernels._C`. Returns None where nothing is missing, else a sentence on what is and what to do."""
    spec = importlib.util.find_spec("efe_kernels._C")
    if spec is None or spec.origin is None:
        return (
            "the C++ extension was not built, so CPU tensors are served by plain PyTorch. Install a C++ compiler, "
            f"then run in the source folder: {REBUILD}"
        )
    release = built_with(spec.origin)
    if minor_release(release) != minor_release(torch.__version__):
        return (
            f"the C++ extension was built with torch {release} and is not loaded with torch {torch.__version__}, whose "
            f"C++ interface is another one; plain PyTorch serves. Rebuild it with this torch: {REBUILD} in the source "
            "folder"
        )
    try:
        module = importlib.import_module("efe_kernels._C")
    except ImportError as error:
        return (
            f"the C++ extension does not load with torch {torch.__version__} ({error}), so CPU tensors are served by "
            "plain PyTorch. It must be rebuilt with this torch: "
            f"{REBUILD} in the source folder"
        )
    if torch.cuda.is_available() and not module.with_cuda:
        return (
            "the extension was built without its CUDA sources, so the prompt ops on CUDA are served by plain PyTorch. "
            f"Install the CUDA toolkit of torch {torch.version.cuda} (set CUDA_HOME), then run in the source folder: "
            f"EFE_KERNELS_CUDA=1 {REBUILD}"
        )
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return "Triton is not installed, so CUDA tensors are served by plain PyTorch. Run: pip install triton"
    return None


def built_with(path: str) -> str:
    """The torch that the extension in this file was built with. Importing it to ask would register its kernels, and
    crash where torch's C++ interface is another one."""
    found = re.search(rb"efe_kernels was built with torch ([\w.+]+)", Path(path).read_bytes())
    return found[1].decode() if found else "of an unknown version"


def minor_release(version: str) -> list[str]:
    """Up to which torch keeps its C++ interface: ["2", "9"] of 2.9.1+cu128."""
    return version.split(".")[:2]


PROBLEM = load()
if PROBLEM is not None:
    warnings.warn(f"efe_kernels: {PROBLEM}", stacklevel=2)
