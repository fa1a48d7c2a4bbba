"""td_lambda: values and gradients against its definition in float64, episode boundaries, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from efe_kernels import gae, td_lambda
from efe_kernels.common.library import INTERPRET
from tests.returns.test_trace import TOLERANCES

SETTINGS: dict[str, float] = {"gamma": 0.97, "lam": 0.9, "reward_scale": 2.0}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter combines the elements of a scan one by one."""
    if INTERPRET:
        monkeypatch.setattr("efe_kernels.returns.kernels.SCAN_TILE", 128)


def trajectories(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    floats = {name: torch.randn(shape, device=device).to(dtype) for name in ("reward", "next_value")}
    flags = {name: torch.rand(shape, device=device) < 0.15 for name in ("terminated", "truncated")}
    return floats | flags


def definition(t: dict[str, Tensor], gamma: float, lam: float, reward_scale: float) -> Tensor:
    """The mean of the returns of n steps with the weights (1 - lam) lam^(n-1), the last of which takes what is left."""
    reward, next_value = reward_scale * t["reward"].double(), t["next_value"].double()
    rows = []
    for row in range(reward.shape[0]):
        columns = []
        for start in range(reward.shape[1]):
            found, rewards, weight, discount = reward.new_zeros(()), reward.new_zeros(()), 1.0, 1.0
            for step in range(start, reward.shape[1]):
                rewards = rewards + discount * reward[row, step]
                discount *= gamma
                terminal = bool(t["terminated"][row, step])
                n_step = rewards if terminal else rewards + discount * next_value[row, step]
                if terminal or t["truncated"][row, step] or step == reward.shape[1] - 1:
                    found = found + weight * n_step
                    break
                found = found + weight * (1 - lam) * n_step
                weight *= lam
            columns.append(found)
        rows.append(torch.stack(columns))
    return torch.stack(rows)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 32), (3, 45)])
def test_values_and_gradients_are_those_of_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, rtol: float, atol: float, device: str
) -> None:
    t = trajectories(*shape, device=device, dtype=dtype)
    leaf = t["next_value"].requires_grad_()
    found = td_lambda(**t, **SETTINGS)
    exact = {**t, "next_value": leaf.detach().double().requires_grad_()}
    expected = definition(exact, **SETTINGS)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)
    upstream = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, leaf, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, exact["next_value"], upstream.double())
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("served_by")
def test_it_is_the_value_target_of_gae_where_the_next_value_is_that_of_the_next_step(device: str) -> None:
    t = trajectories(4, 20, device=device)
    value = torch.randn(4, 20, device=device)
    stop = t["terminated"] | t["truncated"]
    t["next_value"][:, :-1] = torch.where(stop[:, :-1], t["next_value"][:, :-1], value[:, 1:])
    _, target = gae(t["reward"], value, t["next_value"], t["terminated"], t["truncated"], gamma=0.97, lam=0.9)
    torch.testing.assert_close(td_lambda(**t, gamma=0.97, lam=0.9), target, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("steps", [6, 40])
def test_nothing_passes_the_end_of_an_episode(steps: int, device: str) -> None:
    t = trajectories(2, steps, device=device)
    t["terminated"][:, 2], t["truncated"][:, 2] = True, False
    leaf = t["next_value"]
    leaf[:, 2] = torch.nan
    leaf[:, 4:] = torch.nan
    leaf.requires_grad_()
    found = td_lambda(**t)
    assert found[:, :3].isfinite().all()
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), leaf)
    assert (gradient[:, 2:] == 0).all()


def test_gradcheck(device: str) -> None:
    t = trajectories(3, 9, device=device, dtype=torch.float64)
    leaf = t.pop("next_value").requires_grad_()
    assert torch.autograd.gradcheck(lambda value: td_lambda(next_value=value, **t, **SETTINGS), (leaf,))


@pytest.mark.skipif(INTERPRET, reason="Triton's interpreter reads tensors that opcheck replaces by fake ones")
def test_ops_are_declared_truthfully(device: str) -> None:
    t = trajectories(3, 9, device=device)
    for factors in ((None, None), (t["reward"].sigmoid(), t["reward"][:1].sigmoid().expand(3, 9))):
        ends = (t["terminated"], t["truncated"], *factors, 0.97, 0.9, 1.0)
        torch.library.opcheck(torch.ops.efe.td_lambda_forward.default, (t["next_value"], t["reward"], *ends))
        for needs in ([True, True], [False, True]):
            torch.library.opcheck(torch.ops.efe.td_lambda_backward.default, (t["reward"], needs, *ends))


def test_compiles_without_a_graph_break(device: str) -> None:
    t = trajectories(3, 9, device=device)
    leaf = t["next_value"].requires_grad_()

    def loss(**given: Any) -> Tensor:
        return td_lambda(**given).square().sum()

    calls = (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))
    assert torch.equal(*(torch.autograd.grad(call(**t), leaf)[0] for call in calls))


@pytest.mark.usefixtures("served_by")
def test_time_major_buffers_are_taken_as_they_lie(device: str) -> None:
    t = trajectories(5, 11, device=device)
    strided = {name: tensor.t().contiguous().t() for name, tensor in t.items()}
    found = td_lambda(**strided)
    assert found.stride() == strided["reward"].stride()
    assert torch.equal(found, td_lambda(**t))
    assert torch.equal(td_lambda(**{name: tensor[0] for name, tensor in t.items()}), found[0])
    assert td_lambda(**{name: tensor[:, :0] for name, tensor in t.items()}).shape == (5, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], it was 1.5"),
        ({"lam": -0.1}, ValueError, r"lam must be in \[0, 1\], it was -0.1"),
        ({"next_value": torch.zeros(3, 8)}, ValueError, "next_value must have the shape of reward"),
        ({"terminated": torch.zeros(3, 9).cfloat()}, TypeError, "terminated must be bool, integer or floating"),
        ({"time_dim": 2}, ValueError, r"time_dim must be in \[-2, 2\) for reward = \[3, 9\], it was 2"),
        ({"reward": torch.zeros(3, 9, dtype=torch.int64)}, TypeError, "reward must be float32"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        td_lambda(**{**trajectories(3, 9, device="cpu"), **change})


@pytest.mark.usefixtures("served_by")
def test_a_monte_carlo_return_reads_only_the_values_at_which_it_is_cut(device: str) -> None:
    reward, terminated = torch.randn(2, 6, device=device), torch.zeros(2, 6, dtype=torch.bool, device=device)
    next_value = torch.full((2, 6), torch.nan, device=device)
    next_value[:, -1] = 1.0
    assert torch.equal(
        td_lambda(reward, next_value, terminated, lam=1.0),
        td_lambda(reward, next_value.nan_to_num(0.0), terminated, lam=1.0),
    )
