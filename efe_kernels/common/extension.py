"""Loads the C++/CUDA extension, whose import registers its kernels with torch's dispatcher.

Nothing here asks for a GPU: that would set CUDA up, and a process that has done so cannot be forked any more.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import warnings
from pathlib import Path

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def load() -> str | None:
    """Import `efe_kernels._C`. Returns None where it serves the CPU, else a sentence on why not and what to do."""
    spec = importlib.util.find_spec("efe_kernels._C")
    if spec is None or spec.origin is None:
        return (
            "the C++ extension was not built, so CPU tensors and the prompt ops are served by plain PyTorch. Install a "
            f"C++ compiler, then run in the source folder: {REBUILD}"
        )
    release = built_with(spec.origin)
    if minor_release(release) != minor_release(torch.__version__):
        return (
            f"the C++ extension was built with torch {release} and is not loaded with torch {torch.__version__}, whose "
            f"C++ interface is another one; plain PyTorch serves. Rebuild it with this torch: {REBUILD} in the source "
            "folder"
        )
    try:
        importlib.import_module("efe_kernels._C")
    except ImportError as error:
        return (
            f"the C++ extension does not load with torch {torch.__version__} ({error}), so CPU tensors and the prompt "
            f"ops are served by plain PyTorch. It must be rebuilt with this torch: {REBUILD} in the source folder"
        )
    return None


def has_cuda_sources() -> bool:
    """Whether the extension, which is loaded, was built with them."""
    return bool(importlib.import_module("efe_kernels._C").with_cuda)


def has_triton() -> bool:
    """Whether it is installed: a torch for CUDA brings it, one for the CPU does not. It is not imported to find out."""
    return importlib.util.find_spec("triton") is not None


def missing_on_cuda() -> list[str]:
    """What is missing for CUDA tensors, where the extension as a whole is there: a sentence each, with what to do."""
    if torch.version.cuda is None and torch.version.hip is None:
        return []
    found = []
    if not has_triton():
        found.append("Triton is not installed, so plain PyTorch serves CUDA tensors. On Linux: pip install triton")
    if torch.version.hip is not None:
        found.append(
            "the CUDA sources of the extension are not built for ROCm, so plain PyTorch serves the prompt ops on the "
            "GPU; there is nothing to install"
        )
    elif PROBLEM is None and not has_cuda_sources():
        found.append(
            "the extension was built without its CUDA sources, so plain PyTorch serves the prompt ops on CUDA. Install "
            f"the CUDA toolkit of torch {torch.version.cuda} (set CUDA_HOME), then run in the source folder: "
            f"EFE_KERNELS_CUDA=1 {REBUILD}"
        )
    return found


@functools.cache
def warn_of_missing_on_cuda() -> None:
    """Once in a process: plain PyTorch serves a CUDA tensor."""
    for problem in missing_on_cuda():
        warnings.warn(f"efe_kernels: {problem}", stacklevel=2)


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
