"""What setup.py hands to the compilers, and what it says where they refuse."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from setuptools import Distribution

import efe_kernels
from efe_kernels.common import extension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("efe_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_two_sources_share_an_object(setup: ModuleType) -> None:
    objects = [Path(source).with_suffix(".o") for source in (*setup.sources(False), *setup.sources(True))]
    assert len(objects) == len(set(objects))


def test_every_source_is_built_and_only_cuda_needs_cuda(setup: ModuleType) -> None:
    everything = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.c*")}
    assert {*setup.sources(False), *setup.sources(True)} == everything
    for source in everything:
        needs_cuda = source.endswith(".cu") or "common/cuda.h" in (ROOT / source).read_text()
        assert (source in setup.sources(True)) == needs_cuda, source


def test_only_the_headers_that_hide_torch_include_it() -> None:
    hiding = {f"csrc/common/{name}.h" for name in ("tensor", "library", "parallel", "cuda", "module")}
    includes = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*.*")
        if re.search(r"#include <(torch|ATen|c10)/", path.read_text())
    }
    assert includes == hiding


def test_the_extension_is_built_for_the_torch_that_it_asks_for(setup: ModuleType) -> None:
    assert extension.release(extension.OLDEST_TORCH) == setup.OLDEST_TORCH
    assert setup.TARGET == "-DTORCH_TARGET_VERSION=0x020a000000000000"


# nm alone reads what the file needs without loading it, which _C_cuda would not do beside a torch for the CPU.
@pytest.mark.skipif(shutil.which("nm") is None, reason="without nm")
@pytest.mark.parametrize("name", [extension.CPU, extension.CUDA])
def test_of_torch_the_extension_needs_its_c_interface_alone(name: str) -> None:
    """No C++ symbol of torch, whose names change from release to release."""
    file = extension.file_of(name)
    if file is None:
        pytest.skip(f"{name} was not built")
    done = subprocess.run(["nm", "-D", "--undefined-only", file], capture_output=True, text=True, check=True)
    needed = re.findall(r"^ *[Uw] (\S+)", done.stdout, re.MULTILINE)
    assert any(symbol.startswith("aoti_torch_") for symbol in needed)
    assert [symbol for symbol in needed if re.match(r"_Z\w*?(2at|3c10|5torch)", symbol)] == []


def put_nvcc(folder: Path, script: str) -> None:
    """A stand-in for nvcc, a shell script, where a toolkit in this folder has it."""
    file = folder / "bin" / "nvcc"
    file.parent.mkdir(parents=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_the_toolkit_is_where_nvcc_says_that_it_is(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nvcc on the PATH may be a script in a folder that has no CUDA headers beside it."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    put_nvcc(tmp_path / "local", f"echo '#$ TOP={tmp_path}/toolkit/bin/..' >&2")
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", str(tmp_path / "local"))
    assert setup.toolkit() == str(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "local"))
    assert setup.toolkit() == str(tmp_path / "local")


def test_without_nvcc_there_is_no_compiler_to_tell_its_version(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", str(tmp_path))
    assert setup.nvcc_version() is None


REFUSES = """
case "$*" in
    --version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;
    *) echo 'host_config.h:128: error: unsupported GNU version! gcc later than 15 is not supported.' >&2; exit 1
esac
"""
TAKES = "case \"$*\" in --version) echo 'Cuda compilation tools, release 13.0, V13.0.88';; esac"


@pytest.mark.parametrize(
    ("nvcc", "cause"),
    [(REFUSES, "unsupported GNU version"), (TAKES, "what the compiler says stands above")],
    ids=["nvcc refuses the host's compiler", "another reason"],
)
def test_where_the_cuda_sources_do_not_build_the_last_line_says_what_to_do(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvcc: str, cause: str
) -> None:
    put_nvcc(tmp_path, nvcc)
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    build = failing_build(setup, monkeypatch, ["csrc/prompt/cuda.cu"])
    with pytest.raises(SystemExit) as caught:
        build.build_extensions()
    told = str(caught.value.code)
    for needed in (cause, "nvcc 13.0", f"torch {torch.__version__}", "CXX=", "CUDA_HOME", "EFE_KERNELS_CUDA=0"):
        assert needed in told


def test_a_failure_of_the_cpp_sources_is_not_blamed_on_cuda(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    build = failing_build(setup, monkeypatch, ["csrc/bindings.cpp"])
    with pytest.raises(RuntimeError, match="compiling objects"):
        build.build_extensions()


def without_torch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """setup.py with these arguments, where `import torch` fails."""
    (folder / "torch.py").write_text("raise ImportError('hidden')")
    command = [sys.executable, str(ROOT / "setup.py"), "--quiet", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_metadata_need_no_torch(tmp_path: Path) -> None:
    told = without_torch(tmp_path, "--version")
    assert told.returncode == 0, told.stderr
    assert told.stdout.split()[-1] == efe_kernels.__version__
    made = without_torch(tmp_path, "egg_info", "--egg-base", str(tmp_path))
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "efe_kernels.egg-info" / "PKG-INFO").exists()


@pytest.mark.parametrize("command", ["dist_info", "build_ext"])
def test_without_torch_the_last_line_says_what_to_do(tmp_path: Path, command: str) -> None:
    """dist_info is where pip begins: what it would download for nothing comes after."""
    failed = without_torch(tmp_path, command)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert "isolation" in last and "hidden" in last
    assert re.search(r"pip install torch .* and then pip install --no-build-isolation \.$", last)


def no_headers(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda _: str(folder))


def no_compiler(_: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CXX", f"{folder}/no-compiler -O2")


@pytest.mark.parametrize(
    ("lack", "named"), [(no_compiler, "no-compiler"), (no_headers, "Python.h")], ids=["compiler", "headers"]
)
def test_where_no_cpp_compiles_the_build_says_what_it_leaves_out_or_refuses(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    lack: Any, named: str,
) -> None:  # fmt: skip
    lack(setup, monkeypatch, tmp_path)
    monkeypatch.delenv("EFE_KERNELS_REQUIRE_EXT", raising=False)
    assert setup.extensions() == []
    told = capsys.readouterr().err
    assert named in told and "without the C++ extension" in told
    monkeypatch.setenv("EFE_KERNELS_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit) as caught:
        setup.extensions()
    assert named in str(caught.value.code) and "EFE_KERNELS_REQUIRE_EXT=1" in str(caught.value.code)


def failing_build(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, sources: list[str]) -> Any:
    def fail(_: object) -> None:
        raise RuntimeError("Error compiling objects for extension")

    monkeypatch.setattr(setup.cpp_extension.BuildExtension, "build_extensions", fail)
    build = setup.BuildExtension(Distribution())
    build.extensions = [SimpleNamespace(sources=sources)]
    return build
