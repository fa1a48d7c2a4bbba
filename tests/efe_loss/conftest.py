from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import torch

from efe_kernels.common import launch


def compiled_for(argument: Any) -> Hashable:
    """What Triton compiles differently for, of one argument of a kernel."""
    if isinstance(argument, torch.Tensor):
        return launch.signature(argument)
    if isinstance(argument, tuple):
        return tuple(map(compiled_for, argument))
    return argument.value if hasattr(argument, "value") else type(argument)


@pytest.fixture(autouse=True)
def _prepared_launches_meet_what_they_were_prepared_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a prepared launch is not bound anew: other arguments than at first would go to the wrong kernel.

    The interpreter binds at every call and would hide it.
    """
    call = launch.PreparedLaunch.__call__

    def watched(self: Any, *arguments: Any) -> None:
        found = [compiled_for(argument) for argument in arguments]
        assert vars(self).setdefault("met", found) == found, f"{self.function.__name__} was prepared for others"
        call(self, *arguments)

    monkeypatch.setattr(launch.PreparedLaunch, "__call__", watched)
