"""gae and vtrace: values and gradients against the sums of their papers in float64, episode boundaries, and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from efe_kernels import gae, policy_gradient_loss, rl_advantage, vtrace
from efe_kernels.common.library import HAS_TRITON, INTERPRET
from efe_kernels.returns import ops, reference
from efe_kernels.returns.reference import Settings, Transitions

# Inputs are exact and results rounded once to their dtype: one unit in the last place. In float32 the sums of about
# 1 / (1 - gamma · lam) = 17 terms of size 1 leave that many roundings of 2^-24.
TOLERANCES = [
    (torch.float32, 2e-6, 5e-6),
    (torch.float16, 2**-10, 5e-6),
    (torch.bfloat16, 2**-7, 5e-6),
    (torch.float64, 1e-12, 1e-12),
]
Trajectories = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter combines the elements of a scan one by one."""
    if INTERPRET:
        monkeypatch.setattr("efe_kernels.returns.kernels.SCAN_TILE", 128)


def trajectories(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Trajectories:
    floats = {
        name: torch.randn(shape, device=device).to(dtype) for name in ("log_ratio", "reward", "value", "next_value")
    }
    flags = {name: torch.rand(shape, device=device) < 0.15 for name in ("terminated", "truncated")}
    return {**floats, **flags}


def call_gae(t: Trajectories, **settings: Any) -> tuple[Tensor, Tensor]:
    return gae(t["reward"], t["value"], t["next_value"], t["terminated"], t["truncated"], **settings)


def call_vtrace(t: Trajectories, **settings: Any) -> tuple[Tensor, Tensor]:
    return vtrace(t["log_ratio"], t["reward"], t["value"], t["next_value"], t["terminated"], t["truncated"], **settings)


def changed(t: Trajectories, change: Callable[[Tensor], Tensor]) -> Trajectories:
    return {name: change(tensor) for name, tensor in t.items()}


def exact(t: Trajectories) -> Trajectories:
    return changed(t, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def sums(t: Trajectories, weights: Tensor, gamma: float, reward_scale: float) -> Tensor:
    """x_s = sum over t >= s of (product of weights s..t-1) · delta_t, up to where the episode of s ends."""
    delta = reward_scale * t["reward"] + gamma * torch.where(t["terminated"], 0, t["next_value"]) - t["value"]
    going_on = (~(t["terminated"] | t["truncated"])).to(delta.dtype)
    steps = delta.shape[1]
    columns = []
    for start in range(steps):
        factor, x = torch.ones_like(delta[:, 0]), torch.zeros_like(delta[:, 0])
        for step in range(start, steps):
            x = x + factor * t.get("rho", torch.ones_like(delta))[:, step] * delta[:, step]
            factor = factor * weights[:, step] * going_on[:, step]
        columns.append(x)
    return torch.stack(columns, 1)


def gae_definition(t: Trajectories, gamma: float, lam: float, reward_scale: float) -> tuple[Tensor, Tensor]:
    advantage = sums(t, torch.full_like(t["reward"], gamma * lam), gamma, reward_scale)
    return advantage, advantage + t["value"]


def vtrace_definition(
    t: Trajectories, gamma: float, rho_clip: float, c_clip: float, reward_scale: float, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    ratio = t["log_ratio"].exp()
    rho = ratio.clamp(max=rho_clip)
    target = t["value"] + sums({**t, "rho": rho}, gamma * lam * ratio.clamp(max=c_clip), gamma, reward_scale)
    excess = torch.cat([target - t["value"], torch.zeros_like(target[:, :1])], 1)[:, 1:]
    next_target = t["next_value"] + lam * torch.where(t["truncated"], 0, excess)
    advantage = rho * (reward_scale * t["reward"] + gamma * torch.where(t["terminated"], 0, next_target) - t["value"])
    return advantage, target


CASES = [
    (call_gae, gae_definition, {"gamma": 0.99, "lam": 0.95, "reward_scale": 1.0}),
    (call_gae, gae_definition, {"gamma": 0.9, "lam": 0.0, "reward_scale": 5.0}),
    (call_vtrace, vtrace_definition, {"gamma": 0.97, "rho_clip": 1.0, "c_clip": 1.0, "reward_scale": 1.0}),
    (call_vtrace, vtrace_definition, {"gamma": 0.97, "rho_clip": 1.5, "c_clip": 0.9, "reward_scale": 0.1}),
    (call_vtrace, vtrace_definition, {"gamma": 0.97, "rho_clip": 1.0, "c_clip": 1.0, "reward_scale": 1.0, "lam": 0.9}),
]
BOTH = pytest.mark.parametrize("call", [call_gae, call_vtrace])


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize(("call", "definition", "settings"), CASES)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33)])
def test_value_and_gradient(
    call: Any, definition: Any, settings: dict[str, float], dtype: torch.dtype, rtol: float, atol: float,
    shape: tuple[int, int], device: str,
) -> None:  # fmt: skip
    t = trajectories(*shape, device=device, dtype=dtype)
    t64 = exact(t)
    leaves, leaves64 = ([one[name].requires_grad_() for name in ("reward", "value", "next_value")] for one in (t, t64))
    results, expected = call(t, **settings), definition(t64, **settings)
    upstream = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
    gradients = torch.autograd.grad(results, leaves, upstream)
    expected_gradients = torch.autograd.grad(expected, leaves64, [grad.double() for grad in upstream])
    for found, wanted in zip((*results, *gradients), (*expected, *expected_gradients), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("steps", "chunk"), [(40, 512), (600, 512)] if not INTERPRET else [(40, 512), (70, 32)])
@pytest.mark.parametrize("truncated", [True, False])
@BOTH
def test_long_rows_match_the_loop(
    call: Any, steps: int, chunk: int, truncated: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one chunk and of several, with one result used and then the other."""
    if HAS_TRITON:
        monkeypatch.setattr("efe_kernels.returns.kernels.SCAN_STEPS", chunk)
    t = trajectories(9, steps, device=device)
    if not truncated:
        t["truncated"] = torch.zeros_like(t["truncated"])
    t64 = exact(t)
    leaves, leaves64 = ([one[name].requires_grad_() for name in ("value", "next_value")] for one in (t, t64))
    results, expected = call(t), call(t64)
    for i in range(2):
        torch.testing.assert_close(results[i].double(), expected[i], rtol=2e-6, atol=1e-5)
        upstream = torch.randn(9, steps, device=device)
        found = torch.autograd.grad(results[i], leaves, upstream, retain_graph=True)
        wanted = torch.autograd.grad(expected[i], leaves64, upstream.double(), retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("steps", [6, 40])
@BOTH
def test_time_major_buffers_stay_time_major(call: Any, steps: int, device: str) -> None:
    t = trajectories(3, steps, device=device)
    expected = call(t)
    for found, wanted in zip(call(changed(t, lambda tensor: tensor.T.contiguous().T)), expected, strict=True):
        assert found.stride() == (1, 3)
        # The order of the loop is the same; a scan may be split over lanes in another way.
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=5e-6)


def everything(call: Any, t: Trajectories) -> list[Tensor]:
    """Results, and the gradients of their sums."""
    leaves = {name: t[name].detach().requires_grad_() for name in ("value", "next_value")}
    results = call({**t, **leaves})
    return [*results, *torch.autograd.grad([result.sum() for result in results], [*leaves.values()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [6, 140])
@BOTH
def test_every_input_may_have_strides_of_its_own(call: Any, steps: int, dtype: torch.dtype, device: str) -> None:
    """Views of longer buffers, of every other element, transposed, expanded: with gradients that are expanded, too."""
    if INTERPRET:
        steps = min(steps, 40)
    t = trajectories(70 if not INTERPRET else 5, steps, device=device, dtype=dtype)
    t["truncated"][:] = t["truncated"][:, :1]
    views: list[Callable[[Tensor], Tensor]] = [
        lambda tensor: torch.cat([tensor, tensor[:, :1]], 1)[:, :-1],
        lambda tensor: tensor.repeat_interleave(2, 1)[:, ::2],
        lambda tensor: tensor.T.contiguous().T,
        lambda tensor: tensor.repeat_interleave(3, 0)[::3],
    ]
    for shift in range(len(views)):
        strided = {name: views[(i + shift) % len(views)](tensor) for i, (name, tensor) in enumerate(t.items())}
        strided["truncated"] = t["truncated"][:, :1].expand(-1, steps)
        for one, other in zip(everything(call, strided), everything(call, t), strict=True):
            assert one.dtype == dtype
            tolerance = 2**-7 if dtype == torch.bfloat16 else 5e-6
            torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=5e-6)


@BOTH
def test_leading_dimensions(call: Any, device: str) -> None:
    t = trajectories(2, 3, 5, device=device)
    advantage, target = call(t)
    assert advantage.shape == target.shape == (2, 3, 5)
    row = call(changed(t, lambda tensor: tensor[1, 2]))
    assert row[0].shape == (5,)
    torch.testing.assert_close(row[0], advantage[1, 2], rtol=2e-6, atol=5e-6)
    for shape in ((0, 4), (3, 0), (2, 0, 4)):
        assert call(trajectories(*shape, device=device))[1].shape == shape


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("steps", [4, 40])
@BOTH
def test_nothing_crosses_the_end_of_an_episode(call: Any, steps: int, device: str) -> None:
    """NaN after an end, in the next_value of a terminal state, and in another row stay where they are."""
    t = trajectories(2, steps, device=device)
    end = steps // 2
    t["terminated"][:], t["truncated"][:] = False, False
    t["terminated"][0, end] = True
    expected = call(changed(t, lambda tensor: tensor[:, : end + 1].clone()))
    t["next_value"][0, end] = torch.nan
    for name in ("reward", "value", "log_ratio"):
        t[name][0, end + 1 :] = torch.nan
    t["reward"][1] = torch.inf
    value, next_value = t["value"].requires_grad_(), t["next_value"].requires_grad_()
    results = call(t)
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found[0, : end + 1], wanted[0], rtol=2e-6, atol=5e-6)
    upstream = torch.ones(2, steps, device=device)
    upstream[0, end + 1 :] = torch.nan
    gradients = torch.autograd.grad(results, (value, next_value), [upstream, upstream])
    assert all(gradient[0, : end + 1].isfinite().all() for gradient in gradients)
    assert gradients[1][0, end] == 0


def test_terminated_and_truncated_differ_in_the_bootstrap(device: str) -> None:
    no, yes = torch.zeros(1, 2, dtype=torch.bool, device=device), torch.tensor([[True, False]], device=device)
    reward, value, next_value = (torch.tensor([row], device=device) for row in ([1.0, 2.0], [0.5, 0.25], [4.0, 8.0]))
    settings = {"gamma": 0.5, "lam": 0.5}
    last = 2.0 + 0.5 * 8.0 - 0.25
    for terminated, truncated, first in (
        (no, None, 1 + 2 - 0.5 + 0.25 * last),
        (yes, no, 1 - 0.5),
        (no, yes, 1 + 2 - 0.5),
        (yes, yes, 1 - 0.5),
    ):
        advantage, target = gae(reward, value, next_value, terminated, truncated, **settings)
        assert advantage.tolist() == [[first, last]]
        assert target.tolist() == [[first + 0.5, last + 0.25]]


def test_vtrace_on_policy_is_the_return_of_n_steps(device: str) -> None:
    """With log_ratio 0 the target is the discounted return, bootstrapped at the end: gae with lam = 1."""
    t = trajectories(4, 9, device=device)
    t["log_ratio"].zero_()
    _, target = call_vtrace(t)
    _, expected = gae(t["reward"], t["value"], t["next_value"], t["terminated"], t["truncated"], lam=1.0)
    torch.testing.assert_close(target, expected, rtol=2e-6, atol=5e-6)


def test_vtrace_with_extreme_ratios(device: str) -> None:
    t = trajectories(2, 6, device=device)
    t["log_ratio"] = torch.tensor([[1e4, -1e4, math.inf, -math.inf, 0.0, 100.0]] * 2, device=device)
    assert all(result.isfinite().all() for result in call_vtrace(t))
    advantage, target = call_vtrace(t, rho_clip=0.0)
    assert (advantage == 0).all()
    assert torch.equal(target, t["value"])
    t["log_ratio"].clamp_(-3, 3)
    unlimited = call_vtrace(t, rho_clip=math.inf, c_clip=math.inf)
    expected = call_vtrace(t, rho_clip=1e3, c_clip=1e3)
    for found, wanted in zip(unlimited, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_mixed_dtypes_promote(device: str) -> None:
    t = trajectories(2, 5, device=device, dtype=torch.bfloat16)
    value = t["value"].requires_grad_()
    advantage, _ = gae(t["reward"].float(), value, t["next_value"], t["terminated"])
    assert advantage.dtype == torch.float32
    (gradient,) = torch.autograd.grad(advantage.sum(), value)
    assert gradient.dtype == torch.bfloat16


@BOTH
def test_only_requested_gradients(call: Any, device: str) -> None:
    t = trajectories(2, 5, device=device)
    copies = changed(t, torch.clone)
    for name in ("reward", "log_ratio", "next_value"):
        t[name].requires_grad_()
    call(t)[0].sum().backward()
    assert t["log_ratio"].grad is None and t["value"].grad is None
    assert t["reward"].grad is not None and t["next_value"].grad is not None
    assert all(torch.equal(t[name], copies[name]) for name in t)
    assert not call(copies)[0].requires_grad


@pytest.mark.usefixtures("served_by")
@BOTH
def test_gradcheck(call: Any, device: str) -> None:
    t = trajectories(2, 5, device=device, dtype=torch.float64)
    leaves = t["value"].requires_grad_(), t["next_value"].requires_grad_()
    torch.autograd.gradcheck(lambda value, next_value: call({**t, "value": value, "next_value": next_value}), leaves)


@BOTH
def test_second_derivative_is_a_clear_error(call: Any, device: str) -> None:
    t = trajectories(2, 5, device=device)
    value = t["value"].requires_grad_()
    (gradient,) = torch.autograd.grad(call(t)[0].square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("steps", [7, 40])
@BOTH
def test_two_runs_give_the_same_bits(call: Any, steps: int, device: str) -> None:
    t = trajectories(70, steps, device=device) if steps == 7 else trajectories(3, steps, device=device)
    leaves = t["value"].requires_grad_(), t["next_value"].requires_grad_()
    first, second = call(t), call(t)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    found = [torch.autograd.grad([result.sum() for result in results], leaves) for results in (first, second)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.skipif(INTERPRET, reason="about the threads of the C++ kernels")
@BOTH
def test_the_number_of_threads_does_not_change_the_bits(call: Any) -> None:
    """Nor do the rows beside a row, with which it may share a tile."""
    t = trajectories(16, 3000, device="cpu")
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(everything(call, t))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.skipif(INTERPRET, reason="the interpreter would take minutes")
@BOTH
def test_a_hundred_thousand_steps(call: Any, device: str) -> None:
    """The end of the row is that of the loop over it alone, and so is the beginning for the gradient."""
    t = trajectories(2, 100_000, device=device)
    leaves = [t[name].requires_grad_() for name in ("value", "next_value")]
    results = call(t)
    end = exact(changed(t, lambda tensor: tensor.detach()[:, -200:]))
    for found, wanted in zip(results, call(end), strict=True):
        torch.testing.assert_close(found[:, -200:].double(), wanted, rtol=2e-6, atol=1e-5)
    upstream = torch.randn(2, 100_000, device=device)
    gradients = torch.autograd.grad(results, leaves, [upstream, upstream])
    begin = exact(changed(t, lambda tensor: tensor.detach()[:, :200].clone()))
    begin_leaves = [begin[name].requires_grad_() for name in ("value", "next_value")]
    upstream = upstream[:, :200].double()
    for found, wanted in zip(gradients, torch.autograd.grad(call(begin), begin_leaves, [upstream] * 2), strict=True):
        # The last step of the cut row hands nothing on, so that its own gradient is another one.
        torch.testing.assert_close(found[:, :199].double(), wanted[:, :199], rtol=2e-6, atol=1e-5)


def test_opcheck(device: str) -> None:
    t = trajectories(3, 4, device=device)
    forward, backward = torch.ops.efe.trace_forward.default, torch.ops.efe.trace_backward.default
    values = (t["value"], t["next_value"], t["reward"])
    discounts = (0.9, 0.8, 1.0, 1.0, 1.0)
    for truncated in (t["truncated"], None):
        for log_ratio in (t["log_ratio"], None):
            for factors in ((None, None), (t["reward"].sigmoid(), t["value"][:1].sigmoid().expand(3, 4))):
                transitions = (t["terminated"], truncated, log_ratio, *factors)
                torch.library.opcheck(forward, (*values, *transitions, *discounts))
                for needs in ([True, True, True], [False, True, False]):
                    torch.library.opcheck(backward, (t["reward"], None, needs, *transitions, *discounts))
    transposed = [value.T.contiguous().T for value in values]
    transitions = (t["terminated"].T.contiguous().T, None, None, None, None)
    torch.library.opcheck(forward, (*transposed, *transitions, *discounts))


@BOTH
def test_compiles_as_one_graph(call: Any, device: str) -> None:
    t = trajectories(3, 4, device=device)

    def loss(value: Tensor) -> Tensor:
        advantage, target = call({**t, "value": value})
        return advantage.square().sum() + target.sum()

    value = t["value"].requires_grad_()
    expected = torch.autograd.grad(loss(value), value)[0]
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(value), value)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_loops_lay_results_out_like_the_reward() -> None:
    like = torch.zeros(4, 3).T
    assert ops.laid_out(torch.ones(3, 4), like).stride() == (1, 3)


def test_clear_errors(device: str) -> None:
    t = trajectories(2, 5, device=device)
    wrong: list[tuple[type[Exception], str, Trajectories, dict[str, Any]]] = [
        (TypeError, "reward must be float32, .*, it was torch.int64", {"reward": t["reward"].long()}, {}),
        (
            TypeError,
            "terminated must be bool, integer or floating, it was torch.complex64",
            {"terminated": t["reward"].cfloat()},
            {},
        ),
        (TypeError, "time_dim must be an integer, it was 0.5", {}, {"time_dim": 0.5}),
        (
            ValueError,
            r"value must have the shape of reward = \[2, 5\], it was \[2, 4\]",
            {"value": t["value"][:, :4]},
            {},
        ),
        (ValueError, r"truncated must have the shape of reward", {"truncated": t["truncated"][0]}, {}),
        (ValueError, "next_value must be on the device of reward", {"next_value": t["next_value"].to("meta")}, {}),
        (ValueError, r"gamma must be in \[0, 1\], it was 1.5", {}, {"gamma": 1.5}),
        (ValueError, r"gamma must be in \[0, 1\], it was nan", {}, {"gamma": math.nan}),
    ]
    for error, message, replaced, settings in wrong:
        for call in (call_gae, call_vtrace):
            with pytest.raises(error, match=message):
                call({**t, **replaced}, **settings)
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], it was -0.1"):
        call_gae(t, lam=-0.1)
    with pytest.raises(ValueError, match=r"rho_clip must be at least 0 and not NaN, it was -1"):
        call_vtrace(t, rho_clip=-1)
    with pytest.raises(ValueError, match=r"c_clip must be at least 0 and not NaN, it was nan"):
        call_vtrace(t, c_clip=math.nan)
    with pytest.raises(ValueError, match=r"log_ratio must have the shape of reward = \[2, 5\], it was \[5\]"):
        call_vtrace({**t, "log_ratio": t["log_ratio"][0]})
    with pytest.raises(TypeError, match=r"log_ratio must be float32, .*, it was torch.bool"):
        call_vtrace({**t, "log_ratio": t["terminated"]})
    with pytest.raises(ValueError, match=r"reward must have the shape \[..., T\], it was \[\]"):
        call_gae(changed(t, lambda tensor: tensor[0, 0]))


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.0), (0.0, 0.95)])
def test_a_factor_of_zero_passes_nothing_on(gamma: float, lam: float, device: str) -> None:
    """Not even what is not finite. The kernels say so, and the definition."""
    reward = torch.tensor([[0.0, 1.0, float("nan")]], device=device)
    zeros, terminated = torch.zeros_like(reward), torch.zeros_like(reward, dtype=torch.bool)
    transitions, settings = Transitions(terminated, None, None), Settings(gamma, lam, 1.0, 1.0, 1.0)
    defined = reference.trace_forward(zeros, zeros, reward, transitions, settings)
    for found in (*gae(reward, zeros, zeros, terminated, gamma=gamma, lam=lam), *defined):
        assert found[0, :2].tolist() == [0.0, 1.0] and found[0, 2].isnan()


def test_forward_mode_outside_a_transform_is_refused(device: str) -> None:
    """Rather than answered with tangents of 0. torch.func.jvp is a transform: see test_transforms.py."""
    x, terminated = torch.randn(1, 4, device=device), torch.zeros(1, 4, dtype=torch.bool, device=device)
    for function in (
        lambda value: gae(x, value, x, terminated)[0],
        lambda value: rl_advantage(x, value),
        lambda value: policy_gradient_loss(x, x, value, x, x).total,
    ):
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
            function(forward_ad.make_dual(x, x))


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("ratio", [math.nan, math.inf])
@pytest.mark.parametrize("steps", [6, 40])
def test_a_weight_without_a_value_stays_in_its_episode(ratio: float, steps: int, device: str) -> None:
    """Neither way in time, whatever limits there are."""
    t = trajectories(2, steps, device=device)
    t["terminated"][:, 3] = True
    clean = {name: tensor.clone() for name, tensor in t.items()}
    t["log_ratio"][:, 3] = ratio
    settings = {"rho_clip": math.inf, "c_clip": math.inf}
    found, gradients = [], []
    for one in (t, clean):
        leaves = [one[name].requires_grad_() for name in ("value", "next_value")]
        results = call_vtrace(one, **settings)
        found.append(results)
        gradients.append(torch.autograd.grad(results, leaves, [torch.ones_like(result) for result in results]))
    for one, other in zip((*found[0], *gradients[0]), (*found[1], *gradients[1]), strict=True):
        torch.testing.assert_close(one[:, 4:], other[:, 4:], rtol=0, atol=0)


@pytest.mark.usefixtures("served_by")
@BOTH
def test_without_a_discount_the_next_value_is_not_read(call: Any, device: str) -> None:
    t = trajectories(2, 6, device=device)
    expected = call(t, gamma=0.0)
    t["next_value"] = torch.full_like(t["next_value"], math.nan).requires_grad_()
    found = call(t, gamma=0.0)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    (gradient,) = torch.autograd.grad(found, t["next_value"], [torch.ones_like(result) for result in found])
    assert (gradient == 0).all()
