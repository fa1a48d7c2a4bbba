from __future__ import annotations

import pytest

from efe_kernels.advantage.policy_gradient_loss import ops as policy_gradient_loss
from efe_kernels.advantage.rl_advantage import ops as rl_advantage
from efe_kernels.advantage.trace import ops as trace

NAMES = {
    rl_advantage: ("rl_advantage_forward", "rl_advantage_backward"),
    trace: ("gae_forward", "gae_backward", "vtrace_forward", "vtrace_backward"),
    policy_gradient_loss: ("policy_gradient_loss_forward", "policy_gradient_loss_backward"),
}


@pytest.fixture(params=["kernel", "reference"])
def served_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes: what the dispatcher picks for the device, and the reference behind the same autograd Functions."""
    if request.param == "reference":
        for module, names in NAMES.items():
            for name in names:
                monkeypatch.setattr(module, name, getattr(module.reference, name))
    return request.param
