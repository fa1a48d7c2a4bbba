"""gae, vtrace and td_lambda with a gamma and a lam of each step or environment, with padding, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efe_kernels import gae, next_values, td_lambda, vtrace
from efe_kernels.common.library import INTERPRET
from tests.returns.test_trace import TOLERANCES

Buffers = dict[str, Tensor]
FLOATS = ("log_ratio", "reward", "value", "next_value")
LEAVES = ("reward", "value", "next_value")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter combines the elements of a scan one by one."""
    if INTERPRET:
        monkeypatch.setattr("efe_kernels.returns.kernels.SCAN_TILE", 128)


def buffers(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Buffers:
    floats = {name: torch.randn(shape, device=device).to(dtype) for name in FLOATS}
    flags = {name: torch.rand(shape, device=device) < 0.15 for name in ("terminated", "truncated")}
    return floats | flags


def call_gae(b: Buffers, **settings: Any) -> tuple[Tensor, ...]:
    return gae(b["reward"], b["value"], b["next_value"], b["terminated"], b["truncated"], **settings)


def call_vtrace(b: Buffers, **settings: Any) -> tuple[Tensor, ...]:
    return vtrace(b["log_ratio"], b["reward"], b["value"], b["next_value"], b["terminated"], b["truncated"], **settings)


def call_td_lambda(b: Buffers, **settings: Any) -> tuple[Tensor, ...]:
    return (td_lambda(b["reward"], b["next_value"], b["terminated"], b["truncated"], **settings),)


Call = Callable[..., tuple[Tensor, ...]]
CALLS: list[Call] = [call_gae, call_vtrace, call_td_lambda]
ALL = pytest.mark.parametrize("call", CALLS)


def formula(call: Call, b: Buffers, gamma: Tensor, lam: Tensor, reward_scale: float = 1.0) -> tuple[Tensor, ...]:
    """The docstring's, step by step, of [N, T] in float64."""
    shape = b["reward"].shape
    gamma, lam = (factor.double().expand(shape) for factor in (gamma, lam))
    reward, value, next_value = (b[name].double() for name in LEAVES)
    going_on, alive = (~(b["terminated"] | b["truncated"])).double(), (~b["terminated"]).double()
    ratio = b["log_ratio"].double().exp().clamp(max=1.0) if call is call_vtrace else torch.ones_like(reward)
    error = reward_scale * reward + gamma * next_value * alive - value
    first, second = [], []
    after = torch.zeros_like(reward[:, 0])
    for t in reversed(range(shape[1])):
        handed = lam[:, t] * gamma[:, t] * going_on[:, t] * after
        if call is call_td_lambda:
            last = (1 - going_on[:, t]) if t < shape[1] - 1 else torch.ones_like(after)
            own = gamma[:, t] * alive[:, t] * (last + (1 - last) * (1 - lam[:, t]))
            after = reward_scale * reward[:, t] + own * next_value[:, t] + handed
            first.append(after)
        else:
            first.append(ratio[:, t] * (error[:, t] + handed))
            after = ratio[:, t] * error[:, t] + ratio[:, t] * handed
            second.append(after + value[:, t])
    return tuple(torch.stack(steps[::-1], 1) for steps in (first, second) if steps)


def leaves_of(b: Buffers, call: Call) -> list[Tensor]:
    return [b[name].requires_grad_() for name in LEAVES if name != "value" or call is not call_td_lambda]


@pytest.mark.usefixtures("served_by")
@ALL
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [TOLERANCES[0], TOLERANCES[-1]])
@pytest.mark.parametrize("shape", [(3, 7), (2, 45)], ids=str)
@pytest.mark.parametrize("sizes", ["one", "of each step", "of each environment", "of both"])
def test_values_and_gradients_are_those_of_the_formula(
    call: Call, dtype: torch.dtype, rtol: float, atol: float, shape: tuple[int, int], sizes: str, device: str
) -> None:
    """In float64 to 1e-12, which no step in float32 on the way would leave."""
    kept = {"one": (), "of each step": shape[1:], "of each environment": (shape[0], 1), "of both": shape}[sizes]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    gamma, lam = (0.8 + 0.2 * torch.rand(2, *kept, device=device, dtype=torch.float64)).to(exact)
    b = buffers(*shape, device=device, dtype=dtype)
    b64 = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in b.items()}
    leaves, leaves64 = leaves_of(b, call), leaves_of(b64, call)
    found, expected = call(b, gamma=gamma, lam=lam, reward_scale=0.5), formula(call, b64, gamma, lam, 0.5)
    upstream = [torch.randn(shape, device=device).to(dtype) for _ in found]
    gradients = torch.autograd.grad(found, leaves, upstream)
    wanted = torch.autograd.grad(expected, leaves64, [grad.double() for grad in upstream])
    for one, other in zip((*found, *gradients), (*expected, *wanted), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("served_by")
@ALL
@pytest.mark.parametrize("steps", [6, 40])
def test_a_tensor_of_one_number_is_that_number(call: Call, steps: int, device: str) -> None:
    b = buffers(2, 3, steps, device=device)
    factors = {"gamma": 0.75, "lam": 0.5}  # exact in every dtype
    expected = call(b, **factors)
    for dtype in (torch.float16, torch.float32, torch.float64):
        for shape in ((), (1,), (steps,), (3, 1), (2, 1, 1), (2, 3, steps)):
            tensors = {name: torch.full(shape, x, dtype=dtype, device=device) for name, x in factors.items()}
            for given in (tensors, {**factors, "lam": tensors["lam"]}, {**factors, "gamma": tensors["gamma"]}):
                for one, other in zip(call(b, **given), expected, strict=True):
                    assert torch.equal(one, other)


@pytest.mark.usefixtures("served_by")
@ALL
def test_time_major_buffers_take_factors_in_their_own_order(call: Call, device: str) -> None:
    b = buffers(5, 40, device=device)
    gamma, lam = torch.rand(40, device=device), torch.rand(5, 1, device=device)
    time_major = {name: tensor.t().contiguous() for name, tensor in b.items()}
    found = call(time_major, gamma=gamma[:, None], lam=lam.t(), time_dim=0)
    for one, other in zip(found, call(b, gamma=gamma, lam=lam), strict=True):
        torch.testing.assert_close(one.t(), other, rtol=2e-6, atol=5e-6)


@pytest.mark.usefixtures("served_by")
@ALL
@pytest.mark.parametrize("steps", [6, 40])
@pytest.mark.parametrize("name", ["gamma", "lam"])
def test_a_factor_of_zero_at_a_step_passes_nothing_on(call: Call, steps: int, name: str, device: str) -> None:
    b = buffers(2, steps, device=device)
    b["terminated"][:, 2:], b["truncated"][:, 2:] = False, False
    factors = {"gamma": torch.full((steps,), 0.9, device=device), "lam": torch.full((steps,), 0.9, device=device)}
    factors[name][3] = 0.0
    expected = call(b, **factors)
    for tensor in (b["reward"], b["value"]):
        tensor[:, 4:] = torch.nan
    found = call(b, **factors)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[:, :4], other[:, :4])
        assert one[:, -1].isnan().all()


def padded(b: Buffers, lengths: list[int]) -> Buffers:
    """b, with NaN and flags of all kinds where the mask of these lengths is False."""
    steps = b["reward"].shape[1]
    mask = torch.arange(steps, device=b["reward"].device) < torch.tensor(lengths, device=b["reward"].device)[:, None]
    floats = {name: torch.where(mask, b[name], torch.nan) for name in FLOATS}
    flags = {name: torch.where(mask, b[name], torch.rand(mask.shape, device=mask.device) < 0.5)
             for name in ("terminated", "truncated")}  # fmt: skip
    return {**floats, **flags, "mask": mask}


@pytest.mark.usefixtures("served_by")
@ALL
@pytest.mark.parametrize("steps", [7, 40])
def test_padding_counts_nowhere(call: Call, steps: int, device: str) -> None:
    """Each row is what it is alone and without padding."""
    lengths = [steps, 1, steps - 3, 0]
    b = buffers(4, steps, device=device)
    with_padding = padded(b, lengths)
    mask = with_padding.pop("mask")
    gamma, lam = torch.rand(2, 4, steps, device=device)
    factors = {"gamma": torch.where(mask, gamma, torch.nan), "lam": torch.where(mask, lam, torch.nan)}
    leaves = leaves_of(with_padding, call)
    found = call(with_padding, mask=mask, **factors)
    upstream = [torch.where(mask, torch.randn_like(result), torch.nan) for result in found]
    gradients = torch.autograd.grad(found, leaves, upstream)
    for row, length in enumerate(lengths):
        alone = {name: tensor[row : row + 1, :length].clone() for name, tensor in b.items()}
        own = leaves_of(alone, call)
        results = call(alone, gamma=gamma[row, :length], lam=lam[row, :length])
        wanted = torch.autograd.grad(results, own, [grad[row : row + 1, :length] for grad in upstream])
        for one, other in zip((*found, *gradients), (*results, *wanted), strict=True):
            torch.testing.assert_close(one[row, :length], other[0], rtol=2e-6, atol=5e-6)
            assert (one[row, length:] == 0).all()


@ALL
def test_what_follows_padding_is_another_episode(call: Call, device: str) -> None:
    b = buffers(3, 9, device=device)
    mask = torch.ones(3, 9, dtype=torch.bool, device=device)
    mask[:, 4] = False
    found = call(b, mask=mask)
    for steps in (slice(0, 4), slice(5, 9)):
        expected = call({name: tensor[:, steps] for name, tensor in b.items()})
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[:, steps], other, rtol=2e-6, atol=5e-6)


def test_the_last_step_before_padding_looks_ahead_to_the_last_value() -> None:
    value, last_value, nowhere = torch.tensor([[1.0, 2, 3, 4]] * 3), torch.tensor([7.0, 8, 9]), torch.zeros(3, 4)
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    found = next_values(value.masked_fill(~mask, torch.nan), last_value, nowhere, mask=mask)
    assert found.tolist() == [[2, 7, 0, 0], [2, 3, 4, 8], [0, 0, 0, 0]]
    time_major = next_values(value.t(), last_value, nowhere.t(), mask=mask.t(), time_dim=0)
    assert torch.equal(time_major.t(), found)


def test_a_step_before_a_gap_looks_ahead_to_the_step_in_it() -> None:
    """Not to last_value: that belongs to another state."""
    value, nowhere = torch.tensor([1.0, 2, 3, 4, 5]), torch.zeros(5)
    mask = torch.tensor([True, True, False, True, True])
    assert next_values(value, torch.tensor(9.0), nowhere, mask=mask).tolist() == [2, 3, 0, 5, 9]


@pytest.mark.usefixtures("served_by")
@ALL
def test_gradcheck(call: Call, device: str) -> None:
    b = buffers(3, 9, device=device, dtype=torch.float64)
    gamma, lam = torch.rand(2, 3, 9, device=device, dtype=torch.float64)
    mask = torch.rand(3, 9, device=device) < 0.8
    names = [name for name in LEAVES if name != "value" or call is not call_td_lambda]
    torch.autograd.gradcheck(
        lambda *leaves: call({**b, **dict(zip(names, leaves, strict=True))}, gamma=gamma, lam=lam, mask=mask),
        leaves_of(b, call),
    )


@ALL
def test_only_the_gradients_that_are_asked_for(call: Call, device: str) -> None:
    b = buffers(2, 40, device=device)
    every = leaves_of(b, call)
    expected = torch.autograd.grad(sum(result.sum() for result in call(b)), every)
    for place, leaf in enumerate(every):
        alone = {name: tensor.detach() for name, tensor in b.items()}
        name = next(name for name, tensor in b.items() if tensor is leaf)
        alone[name].requires_grad_()
        sum(result.sum() for result in call(alone)).backward()
        torch.testing.assert_close(alone[name].grad, expected[place])
        assert all(tensor.grad is None for other, tensor in alone.items() if other != name)


@ALL
def test_compiles_as_one_graph(call: Call, device: str) -> None:
    b = buffers(3, 9, device=device)
    mask = torch.rand(3, 9, device=device) < 0.8
    gamma, lam = torch.rand(9, device=device), torch.rand((), device=device)

    def loss(reward: Tensor) -> Tensor:
        results = call({**b, "reward": reward}, gamma=gamma, lam=lam, mask=mask)
        return torch.stack([result.square().sum() for result in results]).sum()

    leaf = b["reward"].requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(*(torch.autograd.grad(call(leaf), leaf)[0] for call in (loss, compiled)))


@ALL
@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (
            {"gamma": torch.tensor(0.9, requires_grad=True)},
            ValueError,
            r"gamma must be a constant, it required a gradient; \.detach\(\) makes it one\.",
        ),
        ({"lam": torch.tensor(1)}, TypeError, "lam must be float32, float16, bfloat16 or float64, it was torch.int64"),
        ({"lam": torch.zeros(3)}, ValueError, r"lam must broadcast to the shape of reward = \[2, 5\], it was \[3\]"),
        ({"gamma": torch.zeros(1, 2, 5)}, ValueError, r"gamma must broadcast .*, it was \[1, 2, 5\]"),
        ({"gamma": torch.zeros(5, device="meta")}, ValueError, "gamma must be on the device of reward, cpu"),
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], it was 1.5"),
        ({"lam": "x"}, TypeError, "lam must be a number, it was 'x'"),
        ({"mask": torch.ones(2, 5)}, TypeError, "mask must be a bool tensor, it was torch.float32"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask must have the shape of \w+ = \[2, 5\]"),
    ],
)
def test_wrong_arguments_are_named(call: Call, change: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        call(buffers(2, 5, device="cpu"), **change)
