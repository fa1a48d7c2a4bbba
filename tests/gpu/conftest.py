from __future__ import annotations

import pytest
import torch

from efe_kernels.common.library import INTERPRET


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a GPU."""
    if torch.cuda.is_available() and not INTERPRET:
        return
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
