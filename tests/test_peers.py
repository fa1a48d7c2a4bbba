"""gae, vtrace and td_lambda against torchrl; policy_gradient_loss against the formulas of other libraries, and in a
whole PPO update against one in plain torch.

torchrl comes with the `bench` extra.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.formulas import FORMULAS, Formula, deviations
from efe_kernels import gae, policy_gradient_loss, td_lambda, vtrace
from efe_kernels.common.library import INTERPRET

# Both sides are float32 recurrences over sums of about 1 / (1 - gamma · lam) terms of size 1, in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
STEPS = (1, 20, 200) if not INTERPRET else (1, 20)


@pytest.fixture(scope="module")
def torchrl() -> Any:
    return pytest.importorskip("torchrl.objectives.value.functional", reason='torchrl is not installed: ".[bench]"')


def trajectories(steps: int, device: str) -> tuple[Tensor, ...]:
    """reward, value, next_value [5, T], terminated, truncated; next_value differs from the next value at every end."""
    terminated, truncated = (torch.rand(5, steps, device=device) < share for share in (0.1, 0.1))
    reward, value, last_value = torch.randn(3, 5, steps, device=device)
    following = torch.cat([value[:, 1:], last_value[:, :1]], 1)
    next_value = torch.where(terminated | truncated, last_value, following)
    return reward, value, next_value, terminated, truncated


def with_feature(*tensors: Tensor) -> list[Tensor]:
    """[B, T] as torchrl takes it, [B, T, 1]."""
    return [tensor[..., None] for tensor in tensors]


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("name", ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"])
@pytest.mark.parametrize("steps", STEPS)
def test_gae_is_that_of_torchrl(torchrl: Any, name: str, steps: int, device: str) -> None:
    reward, value, next_value, terminated, truncated = trajectories(steps, device)
    done = terminated | truncated
    expected = getattr(torchrl, name)(0.99, 0.95, *with_feature(value, next_value, reward, done, terminated))
    found = gae(reward, value, next_value, terminated, truncated, gamma=0.99, lam=0.95)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other[..., 0], **TOLERANCE)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize(("rho_clip", "c_clip"), [(1.0, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize("steps", STEPS)
def test_vtrace_is_that_of_torchrl(torchrl: Any, rho_clip: float, c_clip: float, steps: int, device: str) -> None:
    reward, value, next_value, terminated, truncated = trajectories(steps, device)
    log_pi, log_mu = 0.5 * torch.randn(2, 5, steps, device=device)
    tensors = with_feature(log_pi, log_mu, value, next_value, reward, terminated | truncated, terminated)
    expected = torchrl.vtrace_advantage_estimate(0.99, *tensors, rho_thresh=rho_clip, c_thresh=c_clip)
    found = vtrace(log_pi - log_mu, reward, value, next_value, terminated, truncated, rho_clip=rho_clip, c_clip=c_clip)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other[..., 0], **TOLERANCE)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize(
    ("name", "lam"),
    [
        ("td_lambda_return_estimate", 0.0),
        ("td_lambda_return_estimate", 0.9),
        ("td_lambda_return_estimate", 1.0),
        ("vec_td_lambda_return_estimate", 0.9),
    ],
)
@pytest.mark.parametrize("steps", STEPS)
def test_td_lambda_is_that_of_torchrl(torchrl: Any, name: str, lam: float, steps: int, device: str) -> None:
    reward, _, next_value, terminated, truncated = trajectories(steps, device)
    expected, found = next_value.clone().requires_grad_(), next_value.clone().requires_grad_()
    done = terminated | truncated
    theirs = getattr(torchrl, name)(0.99, lam, *with_feature(expected, reward, done, terminated))[..., 0]
    ours = td_lambda(reward, found, terminated, truncated, gamma=0.99, lam=lam)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(
        *(torch.autograd.grad(*pair, upstream)[0] for pair in ((ours, found), (theirs, expected))), **TOLERANCE
    )


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize(
    "name",
    [
        "generalized_advantage_estimate",
        "vec_generalized_advantage_estimate",
        "td_lambda_return_estimate",
        "vec_td_lambda_return_estimate",
        "vtrace_advantage_estimate",
    ],
)
@pytest.mark.parametrize("steps", STEPS)
def test_a_discount_of_each_step_is_that_of_torchrl(torchrl: Any, name: str, steps: int, device: str) -> None:
    """Values, and gradients of reward, value and next_value. Its vectorised TD(lambda) takes one lambda for all."""
    reward, value, next_value, terminated, truncated = trajectories(steps, device)
    done = terminated | truncated
    gamma, lam = 0.8 + 0.2 * torch.rand(2, 5, steps, device=device)
    if name == "vec_td_lambda_return_estimate":
        lam = lam[0, 0]
    log_pi, log_mu = 0.5 * torch.randn(2, 5, steps, device=device)

    def theirs(reward: Tensor, value: Tensor, next_value: Tensor) -> Any:
        values, factors = with_feature(value, next_value, reward, done, terminated), [gamma[..., None]]
        if name.startswith("vtrace"):
            return getattr(torchrl, name)(*factors, *with_feature(log_pi, log_mu), *values)
        factors.append(lam if lam.dim() == 0 else lam[..., None])
        return getattr(torchrl, name)(*factors, *(values if "advantage" in name else values[1:]))

    def ours(reward: Tensor, value: Tensor, next_value: Tensor) -> Any:
        ends = (terminated, truncated)
        if name.startswith("vtrace"):
            return vtrace(log_pi - log_mu, reward, value, next_value, *ends, gamma=gamma)
        if "advantage" in name:
            return gae(reward, value, next_value, *ends, gamma=gamma, lam=lam)
        return td_lambda(reward, next_value, *ends, gamma=gamma, lam=lam)

    def results_and_gradients(function: Any) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (reward, value, next_value)]
        results = function(*leaves)
        results = [result.reshape(reward.shape) for result in (results if isinstance(results, tuple) else (results,))]
        # torchrl's target of vtrace says value_{t+1} where ours says next_value_t: equal, with other gradients.
        chosen = results[1:] if name.startswith("vtrace") else results
        gradients = torch.autograd.grad(sum((result * upstream).sum() for result in chosen), leaves, allow_unused=True)
        return [*results, *(gradient for gradient in gradients if gradient is not None)]

    upstream = torch.randn_like(reward)
    for one, other in zip(results_and_gradients(ours), results_and_gradients(theirs), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: f"{formula.library} {formula.name}")
def test_a_policy_loss_is_that_of_its_library(formula: Formula, dtype: torch.dtype, device: str) -> None:
    """Sums of some hundred terms of size 1, in another order."""
    for seed in range(3):
        assert max(deviations(formula, seed, dtype, device)) < (2e-6 if dtype == torch.float32 else 1e-13)


def plain_loss(
    log_prob: Tensor, old: Tensor, advantage: Tensor, value: Tensor, goal: Tensor, entropy: Tensor
) -> Tensor:
    """The loss of PPO as single-file implementations write it."""
    ratio = (log_prob - old).exp()
    surrogate = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
    return surrogate + 0.5 * ((value - goal) ** 2).mean() - 0.01 * entropy.mean()


def fused_loss(
    log_prob: Tensor, old: Tensor, advantage: Tensor, value: Tensor, goal: Tensor, entropy: Tensor
) -> Tensor:
    return policy_gradient_loss(log_prob, advantage, value, goal, entropy, old_log_prob=old, clip=0.2).total


@pytest.mark.usefixtures("served_by")
def test_a_ppo_update_is_that_of_plain_torch(device: str) -> None:
    """Twenty optimizer steps on one rollout, in which ratios leave the clip, give the same weights."""
    torch.manual_seed(1)
    state, action = torch.randn(64, 6, device=device), torch.randint(3, (64,), device=device)
    advantage, goal = torch.randn(2, 64, device=device)
    network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)  # three logits and the value
    old = torch.distributions.Categorical(logits=network(state)[:, :3]).log_prob(action).detach()

    def trained(loss: Any) -> tuple[list[Tensor], Tensor]:
        agent = copy.deepcopy(network)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.2)
        for _ in range(20):
            out = agent(state)
            policy = torch.distributions.Categorical(logits=out[:, :3])
            log_prob = policy.log_prob(action)
            optimizer.zero_grad()
            loss(log_prob, old, advantage, out[:, 3], goal, policy.entropy()).backward()
            optimizer.step()
        return [parameter.detach() for parameter in agent.parameters()], (log_prob - old).exp()

    (plain, ratio), (fused, _) = trained(plain_loss), trained(fused_loss)
    assert ((ratio - 1).abs() > 0.2).float().mean() > 0.1
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
