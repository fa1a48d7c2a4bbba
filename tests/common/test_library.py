"""An op that names a module of Triton kernels: when it is imported, and who serves where there is no Triton."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from efe_kernels.common import library


def negated(x: torch.Tensor) -> torch.Tensor:
    return -x


@pytest.fixture
def implemented(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an op registers, by dispatch key."""
    found: dict[str, Any] = {}
    recording = SimpleNamespace(
        define=lambda *_, **__: None, impl=lambda name, function, key, **_: found.update({key: function})
    )
    monkeypatch.setattr(library, "LIBRARY", recording)
    monkeypatch.setattr(library, "OPS", {})
    monkeypatch.setattr(torch.library, "register_fake", lambda *_, **__: None)
    monkeypatch.setattr(torch.ops.efe, "an_op", None, raising=False)
    return found


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The modules of kernels that are imported, of which each has the launcher `an_op`."""
    found: list[str] = []

    def import_module(name: str) -> Any:
        found.append(name)
        return SimpleNamespace(an_op=lambda x: 3 * x)

    monkeypatch.setattr(importlib, "import_module", import_module)
    library.triton_module.cache_clear()
    yield found
    library.triton_module.cache_clear()


def test_the_kernels_are_imported_by_the_first_call_that_they_serve(
    implemented: dict[str, Any], imports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "HAS_TRITON", True)
    library.define_op("an_op", reference=negated, fake=negated, triton="some.kernels")
    serve, ones = implemented["CUDA"], torch.ones(2)
    assert serve(ones.double()).tolist() == [-1, -1]  # float64 is the reference's
    assert imports == []
    assert [serve(ones).tolist() for _ in range(2)] == [[3, 3], [3, 3]]
    assert imports == ["some.kernels"]


def test_without_triton_the_reference_serves_cuda(
    implemented: dict[str, Any], imports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "HAS_TRITON", False)
    library.define_op("an_op", reference=negated, fake=negated, triton="some.kernels")
    assert library.OPS["an_op"].triton is None
    assert set(implemented) == {"CompositeExplicitAutograd"}
    assert implemented["CompositeExplicitAutograd"](torch.ones(1)).tolist() == [-1]
    assert imports == []
