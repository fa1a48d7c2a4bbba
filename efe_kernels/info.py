"""Versions, GPU and CPU, which backend serves which op, and why one does not: `python -m efe_kernels.info [--json]`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import signal
import sys
from typing import Any

import torch

import efe_kernels
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
    release = extension.built_with(str(extension.file_of(extension.CPU)))
    return f"built with torch {release}, CUDA sources {'off' if extension.file_of(extension.CUDA) is None else 'on'}"


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


def facts() -> dict[str, Any]:
    """What is installed, on what it runs, who serves each op on each device, and what CUDA tensors miss."""
    return {
        "efe-kernels": efe_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "GPU": gpu(),
        "CPU": torch.backends.cpu.get_cpu_capability().lower(),
        "threads": torch.get_num_threads(),
        "extension": compiled_extension(),
        "ops": {op: {device: backend(op, device) for device in ("CPU", "CUDA")} for op in sorted(OPS)},
        "missing on CUDA": extension.missing_on_cuda(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m efe_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same facts for a program to read")
    found = facts()
    if parser.parse_args(arguments).json:
        print(json.dumps(found, indent=2))
        return 0
    ops, missing = found.pop("ops"), found.pop("missing on CUDA")
    for name, value in found.items():
        print(f"{name:<14}{value}")
    print(f"\n{'op':<32}{'CPU':<22}CUDA")
    for op, served in ops.items():
        print(f"{op:<32}{served['CPU']:<22}{served['CUDA']}")
    for problem in missing:
        print(f"\nOn CUDA: {problem}")
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        # As every Unix tool: where the reader has gone, as with `| head`, there is nothing left to do.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
