"""Compiles the extension `efe_kernels._C`. Everything else about the distribution stands in pyproject.toml.

EFE_KERNELS_CUDA=0|1|auto chooses whether the CUDA sources are built. `auto`, the default, builds them where torch was
built with CUDA and nvcc is found. No GPU is asked: a wheel can be built on a machine that has none. The architectures
are those of TORCH_CUDA_ARCH_LIST, by default every one from Ampere on that nvcc knows. CFLAGS come after the flags
below, so that they win.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"efe-kernels compiles against the PyTorch it will run with, and torch cannot be imported here ({error}). "
        "Install torch first, then run: pip install --no-build-isolation ."
    )

ROOT = Path(__file__).resolve().parent
# at::parallel_for is a template whose threads exist only where the including file is compiled with OpenMP.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
ARCHITECTURES_BEFORE_12_8 = "8.0;8.6;8.9;9.0+PTX"


def nvcc_version() -> tuple[int, int] | None:
    """(major, minor) of the toolkit's compiler, None where there is none."""
    nvcc = Path(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if cpp_extension.CUDA_HOME is None or not nvcc.exists():
        return None
    found = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    return (int(found[1]), int(found[2])) if found else None


def choose_cuda() -> tuple[bool, str]:
    """Whether to build the CUDA sources, and why."""
    wish = os.environ.get("EFE_KERNELS_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"EFE_KERNELS_CUDA must be 0, 1 or auto, it was {wish!r}.")
    if wish == "0":
        return False, "EFE_KERNELS_CUDA=0"
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} was built without CUDA")
    nvcc = nvcc_version()
    if nvcc is None:
        missing.append("nvcc was not found (set CUDA_HOME)")
    elif torch.version.cuda is not None and nvcc[0] != int(torch.version.cuda.split(".")[0]):
        missing.append(f"nvcc is {nvcc[0]}.{nvcc[1]} where torch was built with CUDA {torch.version.cuda}")
    if missing and wish == "1":
        sys.exit(f"EFE_KERNELS_CUDA=1 asks for the CUDA sources, but {' and '.join(missing)}.")
    if missing:
        return False, " and ".join(missing)
    return True, f"torch was built with CUDA {torch.version.cuda} and nvcc is in {cpp_extension.CUDA_HOME}"


def extensions() -> list[cpp_extension.CppExtension]:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        print(f"efe-kernels: no C++ compiler ({compiler}) found: built without the extension, plain PyTorch serves.")
        return []
    with_cuda, reason = choose_cuda()
    print(f"efe-kernels: CUDA sources {'on' if with_cuda else 'off'}: {reason}.")
    cuda_only = {*ROOT.glob("csrc/*/cuda.cpp")}
    sources = sorted({*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/*/*.cpp")} - cuda_only)
    # PyTorch is built with the same two -fno flags: without them loops over sqrt or a comparison do not vectorise.
    ours = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", *OPENMP]
    flags = {"cxx": ours + shlex.split(os.environ.get("CFLAGS", ""))}
    kind = cpp_extension.CppExtension
    if with_cuda:
        known = ARCHITECTURES if (nvcc_version() or (0, 0)) >= (12, 8) else ARCHITECTURES_BEFORE_12_8
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", known)
        sources += sorted({*cuda_only, *ROOT.glob("csrc/*/*.cu")})
        flags["cxx"].append("-DEFE_WITH_CUDA")
        flags["nvcc"] = ["-O3"]
        kind = cpp_extension.CUDAExtension
    return [
        kind(
            "efe_kernels._C",
            [str(source.relative_to(ROOT)) for source in sources],
            depends=sorted(str(header.relative_to(ROOT)) for header in ROOT.glob("csrc/*/*.h")),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=flags,
            extra_link_args=OPENMP,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": cpp_extension.BuildExtension})
