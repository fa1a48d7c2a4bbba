"""Compiles the extension: `efe_kernels._C`, and from the CUDA sources `efe_kernels._C_cuda`, which loads where torch
has CUDA. Everything else about the distribution stands in pyproject.toml.

EFE_KERNELS_CUDA=0|1|auto chooses whether the CUDA sources are built. `auto`, the default, builds them where torch was
built with CUDA and nvcc is found. No GPU is asked: a wheel can be built on a machine that has none. The architectures
are those of TORCH_CUDA_ARCH_LIST, by default every one from Ampere on that nvcc knows. CFLAGS come after the flags
below, so that they win. Where no C++ can be compiled, the package is built without the extension, unless
EFE_KERNELS_REQUIRE_EXT=1.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext

# Of these commands, dist_info is the first step to a wheel: who will miss torch in the last is told before the download
# of what the wheel depends on. All other commands, such as egg_info and sdist, work without torch.
COMPILE = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}
COMPILES = __name__ != "__main__" or not COMPILE.isdisjoint(sys.argv)

if COMPILES:
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit(
            f"efe-kernels compiles against an installed PyTorch, and {error.name} cannot be imported here "
            f"({error}; build isolation, which is pip's default, hides an installed one): run these two commands "
            "instead, pip install torch 'setuptools>=77' ninja 'pybind11>=2.13' and then pip install "
            "--no-build-isolation ."
        )

ROOT = Path(__file__).resolve().parent
# The extension keeps to torch's stable interface as it is in this release: built once, it loads with every later torch.
OLDEST_TORCH = (2, 10)
TARGET = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
ARCHITECTURES_BEFORE_12_8 = "8.0;8.6;8.9;9.0+PTX"


def nvcc(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the toolkit's compiler; where there is none, exit code 127 and no output."""
    found = cpp_extension.CUDA_HOME and shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin")
    if not found:
        return subprocess.CompletedProcess(arguments, 127, "", "")
    return subprocess.run([found, *arguments], capture_output=True, text=True)


def nvcc_version() -> tuple[int, int] | None:
    """(major, minor) of the toolkit's compiler, None where there is none."""
    found = re.search(r"release (\d+)\.(\d+)", nvcc("--version").stdout)
    return (int(found[1]), int(found[2])) if found else None


def toolkit() -> str | None:
    """The folder that nvcc takes its headers from, or what torch found where CUDA_HOME is set or there is no nvcc.

    torch finds the one above the nvcc on the PATH, which may be a link or a script that stands for that of the toolkit.
    """
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return cpp_extension.CUDA_HOME
    found = re.search(r"TOP=(.*)", nvcc("--dryrun", "-x", "cu", os.devnull).stderr)
    return str(Path(found[1]).resolve()) if found else cpp_extension.CUDA_HOME


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
    release = nvcc_version()
    if release is None:
        missing.append("nvcc was not found (set CUDA_HOME)")
    elif torch.version.cuda is not None and release[0] != int(torch.version.cuda.split(".")[0]):
        missing.append(f"nvcc is {release[0]}.{release[1]} where torch was built with CUDA {torch.version.cuda}")
    if missing and wish == "1":
        sys.exit(f"EFE_KERNELS_CUDA=1 asks for the CUDA sources, but {' and '.join(missing)}.")
    if missing:
        return False, " and ".join(missing)
    return True, f"torch was built with CUDA {torch.version.cuda} and nvcc is in {cpp_extension.CUDA_HOME}"


def sources(of_cuda: bool) -> list[str]:
    """The sources of `_C` or of `_C_cuda`, relative to the root. An object is named after its source without the
    ending, so no two sources of a folder differ in the ending alone."""
    found = {*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/*/*.cpp"), *ROOT.glob("csrc/*/*.cu")}
    cuda = {*ROOT.glob("csrc/*/cuda_ops.cpp"), *ROOT.glob("csrc/*/*.cu")}
    return sorted(str(source.relative_to(ROOT)) for source in (cuda if of_cuda else found - cuda))


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def missing() -> str | None:
    """What stands in the way of compiling any C++, None where nothing does."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if shutil.which(compiler().split()[0]) is None:
        return f"no C++ compiler ({compiler()}) was found"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"the headers of this Python ({header}) are not installed"


def extensions() -> list[cpp_extension.CppExtension]:
    lacking = missing()
    if lacking and os.environ.get("EFE_KERNELS_REQUIRE_EXT", "0") != "0":
        sys.exit(f"EFE_KERNELS_REQUIRE_EXT=1 asks for the C++ extension, but {lacking}.")
    if lacking:
        print(
            f"efe-kernels: {lacking}: built without the C++ extension, plain PyTorch serves in its place.",
            file=sys.stderr,
        )
        return []
    with_cuda, reason = choose_cuda()
    print(f"efe-kernels: CUDA sources {'on' if with_cuda else 'off'}: {reason}.")
    # PyTorch is built with the same two -fno flags: without them loops over sqrt or a comparison do not vectorise.
    ours = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", TARGET]
    flags = {"cxx": ours + shlex.split(os.environ.get("CFLAGS", "")), "nvcc": ["-O3"]}
    found = [extension(cpp_extension.CppExtension, "efe_kernels._C", sources(False), flags)]
    if with_cuda:
        cpp_extension.CUDA_HOME = toolkit()
        known = ARCHITECTURES if (nvcc_version() or (0, 0)) >= (12, 8) else ARCHITECTURES_BEFORE_12_8
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", known)
        flags["cxx"].append("-DUSE_CUDA")  # shim.h then declares what is asked of CUDA
        found.append(extension(cpp_extension.CUDAExtension, "efe_kernels._C_cuda", sources(True), flags))
    return found


def extension(kind: Any, name: str, sources: list[str], flags: dict[str, list[str]]) -> Any:
    return kind(
        name,
        sources,
        depends=sorted(str(header.relative_to(ROOT)) for header in ROOT.glob("csrc/*/*.h")),
        # Before torch's: the copy of pybind11 that torch 2.11 brings refuses to be used with the stable interface.
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args={compiler: list(given) for compiler, given in flags.items()},
    )


class BuildExtension(cpp_extension.BuildExtension if COMPILES else build_ext):
    """Where the CUDA sources do not build, the last line says in a sentence what to do."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            if not any(source.endswith(".cu") for extension in self.extensions for source in extension.sources):
                raise
            traceback.print_exception(error)
            release = ".".join(map(str, nvcc_version() or ()))
            sys.exit(
                f"efe-kernels: the extension and its CUDA sources do not build with nvcc {release}, {compiler()} "
                f"and torch {torch.__version__} for the architectures "
                f"{os.environ['TORCH_CUDA_ARCH_LIST']}: {refusal_of_nvcc() or 'what the compiler says stands above'}. "
                "Name a C++ compiler that this nvcc takes (for example CC=gcc-12 CXX=g++-12), a toolkit that fits "
                "torch (CUDA_HOME) or other architectures (TORCH_CUDA_ARCH_LIST), or set EFE_KERNELS_CUDA=0 to build "
                "without the CUDA sources: plain PyTorch then serves the prompt ops on a GPU, Triton the others."
            )


def refusal_of_nvcc() -> str | None:
    """What nvcc has against a source that only includes its own header, or None where it compiles that."""
    host = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "header.cu")
        source.write_text("#include <cuda_runtime.h>\n")
        done = nvcc(*host, "-c", str(source), "-o", f"{source}.o")
    if done.returncode == 0:
        return None
    told = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return next((line for line in told if re.search("error|fatal", line)), "nvcc fails").rstrip(".")


if __name__ == "__main__":
    setup(ext_modules=extensions() if COMPILES else [], cmdclass={"build_ext": BuildExtension})
