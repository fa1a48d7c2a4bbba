from __future__ import annotations

import pytest
import torch

from efe_kernels.common.library import INTERPRET
from tests.served_by import served_by

__all__ = ["served_by"]


@pytest.fixture
def device() -> str:
    """Where the op under test runs: the GPU where there is one, else the CPU, interpreted if that is switched on."""
    return "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
