"""Loads the C++/CUDA extension, whose import registers its kernels with torch's dispatcher.

Nothing here asks for a GPU: that would set CUDA up, and a process that has done so cannot be forked any more.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
import warnings
from pathlib import Path

import torch

OLDEST_TORCH = "2.10"
"""Whose stable interface the extension is built on: it loads with this torch and every later one (setup.py)."""
CPU, CUDA = "efe_kernels._C", "efe_kernels._C_cuda"
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
SOURCE_FOLDER = Path(__file__).parents[2]


def load() -> str | None:
    """Import `efe_kernels._C`. Returns None where it serves the CPU, else a sentence on why not and what to do."""
    if release(torch.__version__) < release(OLDEST_TORCH):
        return (
            f"the C++ extension needs torch {OLDEST_TORCH} or newer, so with torch {torch.__version__} CPU tensors and "
            "the prompt ops are served by plain PyTorch. Install a newer torch, then run in the source folder: "
            f"{REBUILD}"
        )
    file = file_of(CPU)
    if file is None and (SOURCE_FOLDER / "setup.py").exists():
        return (
            "the C++ extension was not built in the source folder, where Python finds the sources before what is "
            "installed, so CPU tensors and the prompt ops are served by plain PyTorch. Run from another folder, or "
            "with a C++ compiler build it there: pip install --no-build-isolation --editable ."
        )
    if file is None:
        return (
            "the C++ extension was not built, so CPU tensors and the prompt ops are served by plain PyTorch. Install a "
            f"C++ compiler, then run in the source folder: {REBUILD}"
        )
    if built_with(file) is None:
        return (
            "the C++ extension was built from other sources than these and is not loaded, so CPU tensors and the "
            f"prompt ops are served by plain PyTorch. Rebuild it: {REBUILD} in the source folder"
        )
    error = error_of(CPU)
    if error is None:
        return None
    return (
        f"the C++ extension does not load with torch {torch.__version__} ({error}), so CPU tensors and the prompt ops "
        f"are served by plain PyTorch. It must be rebuilt with this torch: {REBUILD} in the source folder"
    )


def load_cuda() -> str | None:
    """The same of `efe_kernels._C_cuda` and CUDA; None too where torch has no CUDA, and so needs none of it."""
    if torch.version.cuda is None:
        return None
    if file_of(CUDA) is None:
        return (
            "the extension was built without its CUDA sources, so plain PyTorch serves the prompt ops on CUDA. Install "
            f"the CUDA toolkit of torch {torch.version.cuda} (set CUDA_HOME), then run in the source folder: "
            f"EFE_KERNELS_CUDA=1 {REBUILD}"
        )
    error = error_of(CUDA)
    if error is None:
        return None
    return (
        f"the CUDA kernels of the extension do not load with torch {torch.__version__} and CUDA {torch.version.cuda} "
        f"({error}), so plain PyTorch serves the prompt ops on CUDA. They must be rebuilt with this torch: "
        f"EFE_KERNELS_CUDA=1 {REBUILD} in the source folder"
    )


def file_of(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.origin


def error_of(name: str) -> ImportError | None:
    """Why a module does not load, None where it does."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return error
    return None


def schemas_of(op: str) -> list[str]:
    """The schema of an op, without names, as each loaded module has it that holds a kernel for it."""
    modules = [sys.modules[name] for name in (CPU, CUDA) if sys.modules.get(name) is not None]
    return [module.schemas[op] for module in modules if op in module.schemas]


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
    elif PROBLEM is None and CUDA_PROBLEM is not None:
        found.append(CUDA_PROBLEM)
    return found


@functools.cache
def warn_of_missing_on_cuda() -> None:
    """Once in a process: plain PyTorch serves a CUDA tensor."""
    for problem in missing_on_cuda():
        warnings.warn(f"efe_kernels: {problem}", stacklevel=2)


def built_with(path: str) -> str | None:
    """The torch that the extension in this file was built with; None of one that does not keep to the stable interface,
    whose import could crash."""
    text = rb"efe_kernels was built with torch ([\w.+]+) for torch %s and newer" % re.escape(OLDEST_TORCH).encode()
    found = re.search(text, Path(path).read_bytes())
    return found[1].decode() if found else None


def release(version: str) -> tuple[int, ...]:
    """(2, 10) of 2.10.0+cu128."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


PROBLEM = load()
CUDA_PROBLEM = load_cuda() if PROBLEM is None else None
if PROBLEM is not None:
    warnings.warn(f"efe_kernels: {PROBLEM}", stacklevel=2)
