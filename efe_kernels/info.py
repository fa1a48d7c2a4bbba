"""`python -m efe_kernels.info`: versions, GPU, which backend serves which op, and why one does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import signal
import sys

import torch

import efe_kernels  # noqa: F401  (declares the ops)
from efe_kernels.common import extension
from efe_kernels.common.library import OPS


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def gpu() -> str:
    if not torch.cuda.is_available():
        built = "with" if torch.version.cuda else "without"
        return f"none (torch {built} CUDA)"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}"


def compiled_extension() -> str:
    if extension.PROBLEM is not None:
        return extension.PROBLEM
    module = importlib.import_module("efe_kernels._C")
    release = extension.built_with(str(module.__file__))
    return f"built with torch {release}, CUDA sources {'on' if extension.has_cuda_sources() else 'off'}"


def registered_at(op: str, key: str) -> str | None:
    """The source file of the kernel that torch's dispatcher has for an op under a key ("CPU", "CUDA"), None where it
    falls back to the reference."""
    found = re.search(rf"^{key}: registered at (.*):\d+ ::", torch._C._dispatch_dump(f"efe::{op}"), re.MULTILINE)
    return found[1] if found else None


def backend(op: str, device: str) -> str:
    """Who serves an op on a device."""
    source = registered_at(op, device)
    if source is None:
        return "reference"
    if source.endswith(".py"):
        return "Triton" if device == "CUDA" else "Triton (interpreter)"
    return "C++" if device == "CPU" else "CUDA C++"


def main() -> int:
    rows = {
        "efe-kernels": version("efe-kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "GPU": gpu(),
        "extension": compiled_extension(),
    }
    for name, value in rows.items():
        print(f"{name:<14}{value}")
    print(f"\n{'op':<32}{'CPU':<22}CUDA")
    for op in sorted(OPS):
        print(f"{op:<32}{backend(op, 'CPU'):<22}{backend(op, 'CUDA')}")
    for problem in extension.missing_on_cuda():
        print(f"\nOn CUDA: {problem}")
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        # As every Unix tool: where the reader has gone, as with `| head`, there is nothing left to do.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
