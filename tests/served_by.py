"""The fixture `served_by`: each op by what the dispatcher picks, and by its reference."""

from __future__ import annotations

import pytest

from efe_kernels import functional
from efe_kernels.advantage import ops as rl_advantage
from efe_kernels.policy_loss import ops as policy_gradient_loss
from efe_kernels.returns import ops as trace
from efe_kernels.reward import ops as grid_reward

REFERENCES = {
    (functional, "grid_reward_op"): grid_reward.grid_reward_reference,
    (rl_advantage, "rl_advantage_forward"): rl_advantage.reference.rl_advantage_forward,
    (rl_advantage, "rl_advantage_backward"): rl_advantage.reference.rl_advantage_backward,
    (trace, "trace_forward"): trace.forward_reference,
    (trace, "trace_backward"): trace.backward_reference,
    (policy_gradient_loss, "policy_gradient_loss_forward"): policy_gradient_loss.forward_reference,
    (policy_gradient_loss, "policy_gradient_loss_backward"): policy_gradient_loss.backward_reference,
}


@pytest.fixture(params=["kernel", "reference"])
def served_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes: what the dispatcher picks for the device, and the reference behind the same functions."""
    if request.param == "reference":
        for (module, name), reference in REFERENCES.items():
            monkeypatch.setattr(module, name, reference)
    return request.param
