"""What is said when the C++ extension is missing or does not fit the torch at hand."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from efe_kernels.common import extension


def pretend(monkeypatch: pytest.MonkeyPatch, torch_version: str, built_with: str | Exception | None) -> None:
    """This torch version, and an extension built with another one, one that fails to load, or none."""

    def import_module(_: str) -> Any:
        if isinstance(built_with, Exception):
            raise built_with
        return SimpleNamespace(torch_version=built_with, with_cuda=True)

    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None if built_with is None else SimpleNamespace())
    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize("built_with", ["2.8.0", "3.9.1", "2.10.0a0+git"])
def test_an_extension_of_another_torch_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, built_with: str
) -> None:
    pretend(monkeypatch, "2.9.1+cu128", built_with)
    problem = extension.load()
    assert problem is not None
    assert f"built with torch {built_with} and runs with torch 2.9.1+cu128" in problem
    assert extension.REBUILD in problem


@pytest.mark.parametrize("built_with", ["2.9.1", "2.9.0", "2.9.1+cpu"])
def test_a_patch_release_or_another_build_of_the_same_torch_is_fine(
    monkeypatch: pytest.MonkeyPatch, built_with: str
) -> None:
    pretend(monkeypatch, "2.9.1+cu128", built_with)
    assert extension.load() is None


def test_an_extension_that_does_not_load_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "2.9.1", ImportError("undefined symbol: _ZN3c10"))
    problem = extension.load()
    assert problem is not None
    assert "does not load with torch 2.9.1 (undefined symbol: _ZN3c10)" in problem
    assert extension.REBUILD in problem


def test_an_extension_that_was_not_built_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "2.9.1", None)
    problem = extension.load()
    assert problem is not None
    assert "was not built" in problem and extension.REBUILD in problem


def test_the_extension_knows_the_torch_that_it_was_built_with() -> None:
    module = pytest.importorskip("efe_kernels._C")
    assert extension.minor_release(module.torch_version) == extension.minor_release(torch.__version__)
