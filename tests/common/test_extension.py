"""What is said when the C++ extension is missing or does not fit the torch at hand."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import efe_kernels
from efe_kernels.common import extension, library


def negated(x: torch.Tensor) -> torch.Tensor:
    return -x


def pretend(monkeypatch: pytest.MonkeyPatch, file: Path | None) -> list[str]:
    """torch 2.12.1+cu128 and this extension, or none. What is imported is recorded and not loaded."""
    imported: list[str] = []
    spec = None if file is None else SimpleNamespace(origin=str(file))
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu128")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "efe_kernels._C" else object())
    monkeypatch.setattr(importlib, "import_module", imported.append)
    return imported


ASK_NO_GPU = """
import torch

def refuse(*_, **__):
    raise AssertionError("a GPU was asked for")

for module, names in {
    torch.cuda: ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"),
    torch._C: ("_cuda_init", "_cuda_getDeviceCount", "_cuda_getDevice", "_cuda_isInBadFork"),
}.items():
    for name in names:
        setattr(module, name, refuse)
"""


@pytest.mark.parametrize("imports", ["efe_kernels, efe_kernels.arc_efe", "efe_train.train, efe_train.evaluate"])
def test_an_import_leaves_cuda_alone(imports: str) -> None:
    """A process that has set CUDA up cannot be forked any more: an import must not decide that."""
    done = subprocess.run([sys.executable, "-c", f"{ASK_NO_GPU}import {imports}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def cuda_torch(monkeypatch: pytest.MonkeyPatch, *, hip: str | None = None) -> None:
    """A torch for GPUs, and an extension without CUDA sources."""
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(extension, "PROBLEM", None)
    monkeypatch.setattr(extension, "file_of", lambda name: None)
    monkeypatch.setattr(extension, "CUDA_PROBLEM", extension.load_cuda())
    extension.warn_of_missing_on_cuda.cache_clear()


def test_the_reference_says_once_why_it_serves_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_torch(monkeypatch)
    serve = library.in_place_of_kernels(torch.neg)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serve(torch.ones(1))
    with FakeTensorMode():
        tensor = torch.ones(1, device="cuda")
        with pytest.warns(UserWarning, match="Install the CUDA toolkit of torch 13.0") as caught:
            assert serve(tensor).device == serve(tensor).device == tensor.device
    assert len(caught) == 1


def test_every_op_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the dispatcher calls where a device has no kernel is the wrapped reference."""
    implemented: dict[str, Any] = {}

    class Recording:
        def define(self, *_: Any, **__: Any) -> None: ...

        def impl(self, name: str, function: Any, key: str) -> None:
            implemented[key] = function

    monkeypatch.setattr(library, "LIBRARY", Recording())
    monkeypatch.setattr(torch.library, "register_fake", lambda *_, **__: None)
    monkeypatch.setattr(library, "OPS", {})
    monkeypatch.setattr(torch.ops.efe, "an_op", None, raising=False)
    cuda_torch(monkeypatch)
    library.define_op("an_op", reference=negated, fake=negated)
    with FakeTensorMode(), pytest.warns(UserWarning, match="without its CUDA sources"):
        implemented["CompositeExplicitAutograd"](torch.ones(1, device="cuda"))


def test_what_is_missing_on_cuda_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_torch(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton, sources = extension.missing_on_cuda()
    assert "pip install triton" in triton
    assert "EFE_KERNELS_CUDA=1" in sources and extension.REBUILD in sources


def test_on_rocm_nothing_is_said_to_be_installable(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_torch(monkeypatch, hip="6.4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (sentence,) = extension.missing_on_cuda()
    assert "not built for ROCm" in sentence and "nothing to install" in sentence
    assert "toolkit" not in sentence and "None" not in sentence


def test_a_torch_for_the_cpu_misses_nothing_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_torch(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert extension.missing_on_cuda() == []


def test_cuda_kernels_that_do_not_load_leave_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a torch for another CUDA, whose libraries the file does not find."""

    def import_module(name: str) -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    cuda_torch(monkeypatch)
    monkeypatch.setattr(extension, "file_of", lambda name: f"{name}.so")
    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(extension, "CUDA_PROBLEM", extension.load_cuda())
    sentence = extension.missing_on_cuda()[-1]
    assert "CUDA 13.0 (libcudart.so.13: cannot open shared object file)" in sentence
    assert f"EFE_KERNELS_CUDA=1 {extension.REBUILD}" in sentence


def test_a_torch_for_the_cpu_does_not_load_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(extension, "file_of", lambda name: f"{name}.so")
    monkeypatch.setattr(importlib, "import_module", imported.append)
    assert extension.load_cuda() is None
    assert not imported


def built_with(release: str, folder: Path) -> Path:
    file = folder / "_C.so"
    text = f"efe_kernels was built with torch {release} for torch {extension.OLDEST_TORCH} and newer"
    file.write_bytes(b"\x7fELF\0" + text.encode() + b"\0more")
    return file


@pytest.mark.parametrize("release", ["2.9.1+cu128", "1.13.0"])
def test_a_torch_before_the_stable_interface_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str
) -> None:
    imported = pretend(monkeypatch, built_with("2.13.0", tmp_path))
    monkeypatch.setattr(torch, "__version__", release)
    problem = extension.load()
    assert problem is not None
    assert f"needs torch {extension.OLDEST_TORCH} or newer, so with torch {release}" in problem
    assert "plain PyTorch" in problem
    assert not imported


@pytest.mark.parametrize("text", [b"efe_kernels was built with torch 2.12.1", b""])
def test_an_extension_that_does_not_keep_to_the_stable_interface_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: bytes
) -> None:
    file = tmp_path / "_C.so"
    file.write_bytes(b"\x7fELF\0" + text + b"\0more")
    imported = pretend(monkeypatch, file)
    problem = extension.load()
    assert problem is not None
    assert "built from other sources than these and is not loaded" in problem and extension.REBUILD in problem
    assert not imported


@pytest.mark.parametrize("release", ["2.10.0", "2.12.1+cpu", "2.14.1+cu130", "3.0.0a0+git"])
def test_an_extension_of_any_torch_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str) -> None:
    imported = pretend(monkeypatch, built_with(release, tmp_path))
    assert extension.load() is None
    assert imported == ["efe_kernels._C"]


@pytest.mark.parametrize(("sources", "remedy"), [(False, extension.REBUILD), (True, "Run from another folder")])
def test_an_extension_that_was_not_built_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sources: bool, remedy: str
) -> None:
    pretend(monkeypatch, None)
    monkeypatch.setattr(extension, "SOURCE_FOLDER", tmp_path)
    if sources:
        (tmp_path / "setup.py").touch()
    problem = extension.load()
    assert problem is not None
    assert "was not built" in problem and remedy in problem


def test_the_extension_knows_the_torch_that_it_was_built_with() -> None:
    module = pytest.importorskip("efe_kernels._C")
    release = extension.built_with(module.__file__)
    assert release is not None
    assert extension.release(release) >= extension.release(extension.OLDEST_TORCH)


def test_a_call_keeps_none_of_its_tensors() -> None:
    """Given, optional, in a tuple or in a list: a kernel takes over what the stack that it is called with owns."""
    given = [torch.randn(4, 6), torch.randn(4, 6), torch.rand(4, 6) < 0.5]
    reward, value, mask = given
    advantage, statistics = torch.ops.efe.rl_advantage_forward(reward, value, mask, 1.0, "tanh", 6, False)
    transitions = (mask, mask, None, None, None)
    settings = (0.9, 0.9, 1.0, 1.0, 1.0)
    gradients = torch.ops.efe.trace_backward(advantage, None, [True, True, False], *transitions, *settings)
    alive = [weakref.ref(tensor) for tensor in (*given, advantage, statistics, *gradients)]
    del given, reward, value, mask, transitions, advantage, statistics, gradients
    assert [tensor() for tensor in alive] == [None] * 7


USE_IT = """
import torch, efe_kernels
pooled = efe_kernels.masked_mean_pool(torch.ones(1, 2, 3), torch.tensor([[True, False]]))
assert pooled.tolist() == [[1, 1, 1]]
print(torch._C._dispatch_has_kernel_for_dispatch_key("efe::masked_mean_pool_forward", "CPU"))
"""


OTHER_SOURCES = "built from other sources than these"
DOES_NOT_LOAD = f"does not load with torch {torch.__version__}"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b" and newer\0", b" and older\0", OTHER_SOURCES),
        (b"torch_parallel_for\0", b"torch_parallel_of\0\0", DOES_NOT_LOAD),
        (b"", b"", None),
    ],
    ids=["other sources", "undefined symbol", "as it is"],
)
def test_a_package_whose_extension_does_not_fit_works_without_it(
    tmp_path: Path, old: bytes, new: bytes, told: str | None
) -> None:
    """A copy of the package, with what its extension says of itself changed, or a symbol that it needs from torch."""
    pytest.importorskip("efe_kernels._C")
    package = Path(efe_kernels.__file__).parent
    copied = shutil.copytree(package, tmp_path / "efe_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (file,) = copied.glob("_C.*")
    content = file.read_bytes()
    assert old in content
    file.unlink()
    file.write_bytes(content.replace(old, new))
    done = subprocess.run(
        [sys.executable, "-c", USE_IT], capture_output=True, text=True, cwd=tmp_path, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.strip() == str(told is None)
    assert (extension.REBUILD in done.stderr) == (told is not None)
    assert told is None or told in done.stderr


def test_an_extension_of_other_sources_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are registered for an op that takes other arguments, which the dispatcher would not notice."""
    monkeypatch.setattr(library, "schemas_of", lambda name: ["(Tensor) -> Tensor", "(Tensor, float) -> Tensor"])
    with pytest.raises(ImportError, match="its op an_op takes other arguments") as caught:
        library.define_op("an_op", reference=negated, fake=negated)
    assert extension.REBUILD in str(caught.value)
