"""What is said when the C++ extension is missing or does not fit the torch at hand."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
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
    """torch 2.9.1+cu128 and this extension, or none. What is imported is recorded and not loaded."""
    imported: list[str] = []

    def import_module(name: str) -> Any:
        imported.append(name)
        return SimpleNamespace(with_cuda=True)

    spec = None if file is None else SimpleNamespace(origin=str(file))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "efe_kernels._C" else object())
    monkeypatch.setattr(importlib, "import_module", import_module)
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
    monkeypatch.setattr(extension, "has_cuda_sources", lambda: False)
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


def built_with(release: str, folder: Path) -> Path:
    file = folder / "_C.so"
    file.write_bytes(b"\x7fELF\0efe_kernels was built with torch " + release.encode() + b"\0more")
    return file


@pytest.mark.parametrize("release", ["2.8.0", "3.9.1", "2.10.0a0+git"])
def test_an_extension_of_another_torch_is_named_with_its_remedy_and_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str
) -> None:
    imported = pretend(monkeypatch, built_with(release, tmp_path))
    problem = extension.load()
    assert problem is not None
    assert f"built with torch {release} and is not loaded with torch 2.9.1+cu128" in problem
    assert extension.REBUILD in problem
    assert not imported


@pytest.mark.parametrize("release", ["2.9.1", "2.9.0", "2.9.1+cpu"])
def test_a_patch_release_or_another_build_of_the_same_torch_is_fine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str
) -> None:
    imported = pretend(monkeypatch, built_with(release, tmp_path))
    assert extension.load() is None
    assert imported == ["efe_kernels._C"]


def test_an_extension_that_was_not_built_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    problem = extension.load()
    assert problem is not None
    assert "was not built" in problem and extension.REBUILD in problem


def test_the_extension_knows_the_torch_that_it_was_built_with() -> None:
    module = pytest.importorskip("efe_kernels._C")
    release = extension.built_with(module.__file__)
    assert extension.minor_release(release) == extension.minor_release(torch.__version__)


USE_IT = """
import torch, efe_kernels
pooled = efe_kernels.masked_mean_pool(torch.ones(1, 2, 3), torch.tensor([[True, False]]))
assert pooled.tolist() == [[1, 1, 1]]
print(torch._C._dispatch_has_kernel_for_dispatch_key("efe::masked_mean_pool_forward", "CPU"))
"""


@pytest.mark.parametrize("case", ["another torch", "undefined symbol", "as it is"])
def test_a_package_whose_extension_does_not_fit_works_without_it(tmp_path: Path, case: str) -> None:
    """A copy of the package, with the version in its extension changed, or a symbol that it needs from torch."""
    pytest.importorskip("efe_kernels._C")
    package = Path(efe_kernels.__file__).parent
    copied = shutil.copytree(package, tmp_path / "efe_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (file,) = copied.glob("_C.*")
    content = file.read_bytes()
    release = extension.built_with(str(file)).encode()
    if case == "another torch":
        content = content.replace(b"built with torch " + release, b"built with torch " + b"1" + release[1:])
    elif case == "undefined symbol":
        content = content.replace(b"get_num_threads", b"get_no_threads_")
    file.unlink()
    file.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", USE_IT], capture_output=True, text=True, cwd=tmp_path, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.strip() == str(case == "as it is")
    remedy = {
        "another torch": f"is not loaded with torch {torch.__version__}",
        "undefined symbol": f"does not load with torch {torch.__version__}",
    }
    if case in remedy:
        assert remedy[case] in done.stderr and extension.REBUILD in done.stderr
    else:
        assert extension.REBUILD not in done.stderr


def test_an_extension_of_other_sources_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are registered for an op that takes other arguments, and the dispatcher refuses the declaration."""

    class Refusing:
        def define(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("Inferred operator schema for a C++ kernel function doesn't match")

    monkeypatch.setattr(library, "LIBRARY", Refusing())
    with pytest.raises(ImportError, match="its op an_op takes other arguments") as caught:
        library.define_op("an_op", reference=negated, fake=negated)
    assert extension.REBUILD in str(caught.value)
