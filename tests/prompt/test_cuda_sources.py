"""The CUDA sources compile for every architecture without a spilled register. Needs nvcc, but no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted((CSRC / "prompt").glob("*.cu"))
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")]


def nvcc(*arguments: str) -> str:
    assert NVCC is not None
    done = subprocess.run([NVCC, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_compile_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    if architecture not in nvcc("--list-gpu-code"):
        pytest.skip(f"this nvcc does not know {architecture}")
    report = nvcc(
        "-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-Werror", "all-warnings", f"-I{CSRC}",
        "-cubin", str(source), "-o", str(tmp_path / "prompt.cubin"),
    )  # fmt: skip
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills, report
    assert set(spills) == {("0", "0")}, report


def cuda_includes() -> list[str]:
    line = re.search(r'INCLUDES="(.*?)"', nvcc("--dryrun", str(SOURCES[0])))
    assert line is not None
    return line.group(1).split()


def test_glue_compiles() -> None:
    """With the definitions of setup.py."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    pybind11 = pytest.importorskip("pybind11")
    folders = (CSRC, pybind11.get_include(), sysconfig.get_path("include"), *cpp_extension.include_paths())
    includes = [f"-I{path}" for path in folders]
    command = [
        compiler, "-std=c++20", "-fsyntax-only", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *includes, *cuda_includes(), str(CSRC / "prompt" / "cuda_ops.cpp"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
