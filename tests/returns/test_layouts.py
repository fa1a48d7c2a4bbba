"""gae, vtrace and td_lambda of buffers as other libraries keep them: where time stands, which dtype flags have, and
which values come next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efe_kernels import gae, next_values, td_lambda, vtrace

Buffers = dict[str, Tensor]


def buffers(*shape: int, device: str) -> Buffers:
    floats = {name: torch.randn(shape, device=device) for name in ("log_ratio", "reward", "value", "next_value")}
    flags = {name: torch.rand(shape, device=device) < 0.2 for name in ("terminated", "truncated")}
    return {**floats, **flags}


def all_returns(b: Buffers, **settings: Any) -> list[Tensor]:
    ends = (b["terminated"], b["truncated"])
    return [
        *gae(b["reward"], b["value"], b["next_value"], *ends, **settings),
        *vtrace(b["log_ratio"], b["reward"], b["value"], b["next_value"], *ends, **settings),
        td_lambda(b["reward"], b["next_value"], *ends, **settings),
    ]


def changed(b: Buffers, change: Callable[[Tensor], Tensor]) -> Buffers:
    return {name: change(tensor) for name, tensor in b.items()}


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 4, 5), (2, 3, 2, 4)], ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["stored so", "a view"])
def test_time_stands_where_it_is_named(shape: tuple[int, ...], contiguous: bool, device: str) -> None:
    b = buffers(*shape, device=device)
    expected = all_returns(b)
    for place in range(-len(shape), len(shape)):
        moved = changed(b, lambda tensor, place=place: tensor.movedim(-1, place))
        found = all_returns(changed(moved, Tensor.contiguous) if contiguous else moved, time_dim=place)
        for one, other in zip(found, expected, strict=True):
            # Rows along memory and across it are walked by other loops, whose sums of about 17 terms round otherwise.
            torch.testing.assert_close(one.movedim(place, -1), other, rtol=2e-6, atol=5e-6)


@pytest.mark.usefixtures("served_by")
def test_gradients_come_back_as_the_buffers_lie(device: str) -> None:
    b = buffers(5, 7, device=device)
    gradients = []
    for time_dim in (-1, 0):
        value, next_value = (
            b[name].movedim(-1, time_dim).detach().requires_grad_() for name in ("value", "next_value")
        )
        others = [b[name].movedim(-1, time_dim) for name in ("terminated", "truncated")]
        advantage, target = gae(b["reward"].movedim(-1, time_dim), value, next_value, *others, time_dim=time_dim)
        (advantage.square().sum() + target.sum()).backward()
        gradients.append([leaf.grad.movedim(time_dim, -1) for leaf in (value, next_value)])
    for batch_major, time_major in zip(*gradients, strict=True):
        torch.testing.assert_close(time_major, batch_major)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_a_flag_is_set_where_it_is_not_zero(dtype: torch.dtype, device: str) -> None:
    b = buffers(5, 7, device=device)
    flags = {name: 3 * b[name].to(dtype) for name in ("terminated", "truncated")}
    for one, other in zip(all_returns(b | flags), all_returns(b), strict=True):
        assert torch.equal(one, other)


def cleanrl_advantage(
    reward: Tensor, value: Tensor, done_before: Tensor, last_value: Tensor, last_done: Tensor, gamma: float, lam: float
) -> Tensor:
    """As in its ppo.py: [T, N], done_before[t] says that step t begins an episode, and a cut counts as an end."""
    advantage, carried = torch.zeros_like(reward), torch.zeros_like(last_value)
    for t in reversed(range(len(reward))):
        last = t == len(reward) - 1
        going_on = 1.0 - (last_done if last else done_before[t + 1])
        following = last_value if last else value[t + 1]
        delta = reward[t] + gamma * following * going_on - value[t]
        carried = advantage[t] = delta + gamma * lam * going_on * carried
    return advantage


def test_the_buffers_of_cleanrl() -> None:
    reward, value = torch.randn(2, 16, 4).double()
    done_before, last_done = (torch.rand(16, 4) < 0.2).double(), (torch.rand(4) < 0.5).double()
    last_value = torch.randn(4).double()
    expected = cleanrl_advantage(reward, value, done_before, last_value, last_done, 0.99, 0.95)
    done = torch.cat([done_before[1:], last_done[None]])
    next_value = next_values(value, last_value, done, time_dim=0)
    advantage, value_target = gae(reward, value, next_value, done, time_dim=0)
    torch.testing.assert_close(advantage, expected)
    torch.testing.assert_close(value_target, expected + value)
    # The same where the cuts are told apart, but what they were cut from is not known.
    cut = torch.rand(16, 4) < 0.5
    told = next_values(value, last_value, done * ~cut, done * cut, time_dim=0)
    torch.testing.assert_close(gae(reward, value, told, done * ~cut, done * cut, time_dim=0)[0], expected)


def test_the_buffers_of_stable_baselines3() -> None:
    """Its on-policy loop adds gamma times the value of the last observation to the reward where an episode is cut."""
    buffer_of = pytest.importorskip("stable_baselines3.common.buffers", reason='".[bench]" brings stable-baselines3')
    spaces = pytest.importorskip("gymnasium.spaces")
    gamma, lam, steps, environments = 0.99, 0.95, 16, 4
    reward, value, final_value = torch.randn(3, steps, environments)
    ended = torch.rand(steps, environments) < 0.3
    cut = ended & (torch.rand(steps, environments) < 0.5)
    last_value = torch.randn(environments)
    buffer = buffer_of.RolloutBuffer(
        steps, spaces.Box(0, 1, (1,)), spaces.Discrete(2), "cpu", gae_lambda=lam, gamma=gamma, n_envs=environments
    )
    begins = torch.cat([torch.ones_like(ended[:1]), ended[:-1]])
    for t in range(steps):
        handed = reward[t] + gamma * torch.where(cut[t], final_value[t], 0)
        nothing = torch.zeros(environments, 1).numpy()
        buffer.add(nothing, nothing, handed.numpy(), begins[t].numpy(), value[t], torch.zeros(environments))
    buffer.compute_returns_and_advantage(last_value, ended[-1].numpy())

    next_value = next_values(value, last_value, ended & ~cut, cut, final_value, time_dim=0)
    advantage, value_target = gae(reward, value, next_value, ended & ~cut, cut, gamma=gamma, lam=lam, time_dim=0)
    # Two float32 recurrences over sums of about 1 / (1 - gamma · lam) terms of size 1, in another order.
    torch.testing.assert_close(advantage, torch.as_tensor(buffer.advantages), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value_target, torch.as_tensor(buffer.returns), rtol=1e-5, atol=1e-5)


def test_next_values_are_those_of_the_formula_and_differentiable() -> None:
    value = torch.tensor([[1.0, 2, 3, 4]], requires_grad=True)
    last_value, final_value = torch.tensor([5.0], requires_grad=True), 10 * torch.ones(1, 4)
    terminated, truncated = torch.tensor([[0, 1, 0, 0]]), torch.tensor([[0, 0, 1, 0]])
    found = next_values(value, last_value, terminated, truncated, final_value)
    assert found.tolist() == [[2, 0, 10, 5]]
    found.sum().backward()
    assert value.grad is not None and value.grad.tolist() == [[0, 1, 0, 0]]
    assert last_value.grad is not None and last_value.grad.tolist() == [1]
    assert next_values(value[:, :0], last_value, terminated[:, :0]).shape == (1, 0)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"last_value": torch.zeros(4)}, ValueError, r"last_value must have the shape of value without time, \[3\]"),
        ({"last_value": torch.zeros(3).int()}, TypeError, "last_value must be float32"),
        ({"final_value": torch.zeros(3)}, ValueError, r"final_value must have the shape of value = \[3, 9\]"),
        ({"terminated": torch.zeros(9)}, ValueError, "terminated must have the shape of value"),
        ({"terminated": None}, TypeError, "terminated must be a tensor"),
        ({"time_dim": 5}, ValueError, "time_dim must be in"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], told: str) -> None:
    arguments = {"value": torch.zeros(3, 9), "last_value": torch.zeros(3), "terminated": torch.zeros(3, 9)}
    with pytest.raises(error, match=told):
        next_values(**arguments | change)
