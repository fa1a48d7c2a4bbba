"""policy_gradient_loss: values and gradients against PyTorch's formula in float64, masks, diagnostics, and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from efe_kernels import PolicyLossOutput, policy_gradient_loss

NAMES = ("log_prob", "advantage", "value", "value_target", "entropy")
# Inputs are exact and the arithmetic is float32: sums of n terms of size 1, added pairwise, divided by n. Gradients are
# rounded once to the inputs' dtype: one unit in the last place.
LOSS_TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}
GRADIENT_TOLERANCES = [(torch.float32, 2e-6), (torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float64, 1e-12)]


def batch(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = {name: torch.randn(shape, device=device).to(dtype) for name in NAMES}
    tensors["old_log_prob"] = (tensors["log_prob"].float() + 0.3 * torch.randn(shape, device=device)).to(dtype)
    return tensors


def definition(
    log_prob: Tensor,
    advantage: Tensor,
    value: Tensor,
    value_target: Tensor,
    entropy: Tensor,
    old_log_prob: Tensor | None = None,
    clip: float = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.01,
    mask: Tensor | None = None,
) -> PolicyLossOutput:
    """As training scripts write it; the elements that count are picked out first."""
    mask = torch.ones_like(log_prob, dtype=torch.bool) if mask is None else mask
    log_prob, advantage, value, target, entropy = (
        tensor[mask] for tensor in (log_prob, advantage, value, value_target, entropy)
    )
    zero = torch.zeros((), dtype=log_prob.dtype, device=log_prob.device)
    policy, clip_fraction, approx_kl = -(log_prob * advantage).mean(), zero, zero
    if old_log_prob is not None:
        ratio = (log_prob - old_log_prob[mask]).exp()
        policy = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
        clip_fraction = ((ratio - 1).abs() > clip).to(ratio.dtype).mean()
        approx_kl = (ratio - 1 - ratio.log()).mean()
    value_loss = torch.nn.functional.mse_loss(value, target)
    total = policy + value_coef * value_loss - entropy_coef * entropy.mean()
    explained = 1 - (target - value).var(correction=0) / target.var(correction=0)
    return PolicyLossOutput(total, policy, value_loss, entropy.mean(), clip_fraction, approx_kl, explained)


def exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().double() for name, tensor in tensors.items()}


def leaves(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[name].requires_grad_() for name in ("log_prob", "value", "entropy")]


def assert_close(found: PolicyLossOutput, expected: PolicyLossOutput, rtol: float, atol: float) -> None:
    for name, one, other in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(
            one.double(), other.double(), rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize(("dtype", "rtol"), GRADIENT_TOLERANCES)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2,), (7, 13), (3, 1500), (9000,)])
def test_value_and_gradient(
    dtype: torch.dtype, rtol: float, old: bool, masked: bool, shape: tuple[int, ...], device: str
) -> None:
    """Few elements, one tile, a ragged tile, several tiles."""
    tensors = batch(*shape, device=device, dtype=dtype)
    if not old:
        del tensors["old_log_prob"]
    mask = torch.rand(shape, device=device) > 0.3 if masked else None
    if mask is not None:
        mask.view(-1)[:2] = True
    tensors64 = exact(tensors)
    inputs, inputs64 = leaves(tensors), leaves(tensors64)
    found, expected = policy_gradient_loss(**tensors, mask=mask), definition(**tensors64, mask=mask)
    assert found.total.shape == ()
    tight = dtype == torch.float64
    assert_close(found, expected, **({"rtol": 1e-12, "atol": 1e-12} if tight else LOSS_TOLERANCE))
    gradients = torch.autograd.grad(found.total, inputs)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.total, inputs64), strict=True):
        assert gradient.dtype == dtype
        # Below float16's normal range, which starts at 6e-5, the unit in the last place is 6e-8.
        atol = 1e-15 if tight else 6e-8 if dtype == torch.float16 else 1e-8
        torch.testing.assert_close(gradient.double(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("numel", [1024, 1025, 2900])
def test_partial_sums_of_very_many_parts(numel: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8, 9 and 23 parts, of which the second launch takes 4 at a time."""
    kernels = pytest.importorskip("efe_kernels.policy_loss.kernels")
    monkeypatch.setattr(kernels, "TILE_LIMIT", 128)
    monkeypatch.setattr(kernels, "PARTS_LIMIT", 4)
    tensors = batch(numel, device=device)
    mask = torch.rand(numel, device=device) > 0.3
    mask[256:512] = False  # whole parts without an element
    found, expected = policy_gradient_loss(**tensors, mask=mask), definition(**exact(tensors), mask=mask)
    assert_close(found, expected, **LOSS_TOLERANCE)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("numel", [50, 5000])
def test_every_output_has_its_gradient(numel: int, device: str) -> None:
    tensors = batch(numel, device=device)
    tensors64 = exact(tensors)
    inputs, inputs64 = leaves(tensors), leaves(tensors64)
    settings = {"clip": 0.1, "value_coef": 0.7, "entropy_coef": 0.3}
    found, expected = policy_gradient_loss(**tensors, **settings), definition(**tensors64, **settings)
    for factors in ((1.0, 0.0, 0.0, 0.0), (0.0, 2.0, 0.0, 0.0), (0.0, 0.0, -3.0, 0.5), (65536.0, 0.1, 0.2, 0.3)):
        losses, losses64 = (
            sum(factor * part for factor, part in zip(factors, output[:4], strict=True) if factor)
            for output in (found, expected)
        )
        gradients = torch.autograd.grad(losses, inputs, retain_graph=True, allow_unused=True)
        wanted = torch.autograd.grad(losses64, inputs64, retain_graph=True, allow_unused=True)
        for one, other in zip(gradients, wanted, strict=True):
            assert one is not None
            torch.testing.assert_close(one.double(), torch.zeros_like(one) if other is None else other,
                                       rtol=2e-6, atol=1e-8 * max(map(abs, factors)), check_dtype=False)  # fmt: skip


def test_the_clip_stops_the_gradient_on_one_side_only(device: str) -> None:
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1, 0.5], device=device)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0], device=device)
    log_prob = log_ratio.clone().requires_grad_()
    zero = torch.zeros(6, device=device)
    output = policy_gradient_loss(log_prob, advantage, zero, zero, zero, old_log_prob=zero)
    (gradient,) = torch.autograd.grad(output.policy, log_prob)
    assert (gradient != 0).tolist() == [False, True, True, False, True, False]
    assert output.clip_fraction.item() == pytest.approx(5 / 6)


@pytest.mark.usefixtures("served_by")
def test_masked_elements_may_hold_anything(device: str) -> None:
    tensors = batch(8, device=device)
    mask = torch.arange(8, device=device) % 2 == 0
    clean = policy_gradient_loss(**tensors, mask=mask)
    for i, tensor in enumerate(tensors.values()):
        tensor[~mask] = (torch.nan, torch.inf, -torch.inf)[i % 3]
    inputs = leaves(tensors)
    output = policy_gradient_loss(**tensors, mask=mask)
    assert all(torch.equal(one, other) for one, other in zip(output, clean, strict=True))
    for gradient in torch.autograd.grad(output.total, inputs):
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("numel", [0, 6, 5000])
def test_without_an_element_everything_is_zero(numel: int, device: str) -> None:
    tensors = batch(numel, device=device)
    inputs = leaves(tensors)
    output = policy_gradient_loss(**tensors, mask=torch.zeros(numel, dtype=torch.bool, device=device))
    assert all(value.item() == 0 for value in output)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(output.total, inputs))


@pytest.mark.usefixtures("served_by")
def test_diagnostics_of_known_cases(device: str) -> None:
    ones, ramp = torch.ones(5, device=device), torch.arange(5.0, device=device)
    constant = policy_gradient_loss(ones, ones, ones, ones, ones, old_log_prob=ones)
    assert (constant.clip_fraction.item(), constant.approx_kl.item()) == (0, 0)
    assert constant.explained_variance.item() == 0
    for numel in (7, 5000):
        tenth, noise = torch.full((numel,), 0.1, device=device), torch.randn(numel, device=device)
        assert policy_gradient_loss(tenth, tenth, noise, tenth, tenth).explained_variance.item() == 0
    shifted = policy_gradient_loss(ones, ones, ramp + 1e4, ramp, ones)
    assert shifted.explained_variance.item() == pytest.approx(1, abs=1e-6)
    assert policy_gradient_loss(ones, ones, -ramp, ramp, ones).explained_variance.item() == pytest.approx(-3)
    moved = policy_gradient_loss(ones + 1e-3, ones, ones, ones, ones, old_log_prob=ones)
    # log_ratio is 1e-3 to the rounding of 1.001, 6e-8, and its square twice that.
    assert moved.approx_kl.item() == pytest.approx(math.expm1(1e-3) - 1e-3, rel=3e-4)
    assert not moved.approx_kl.requires_grad


def test_kl_of_almost_equal_policies_is_not_negative(device: str) -> None:
    old, zero = torch.zeros(1000, device=device), torch.zeros(1000, device=device)
    for size in (1e-7, 1e-4, 0.1):
        log_prob = size * torch.randn(1000, device=device)
        output = policy_gradient_loss(log_prob, zero, zero, zero, zero, old_log_prob=old)
        assert output.approx_kl.item() >= 0


def test_mixed_dtypes_and_strides(device: str) -> None:
    tensors = batch(6, 4, device=device)
    expected = policy_gradient_loss(**tensors)
    strided = {name: tensor.T.contiguous().T for name, tensor in tensors.items()}
    assert all(torch.equal(one, other) for one, other in zip(policy_gradient_loss(**strided), expected, strict=True))
    value = tensors["value"].bfloat16().requires_grad_()
    output = policy_gradient_loss(**{**tensors, "value": value})
    assert output.total.dtype == torch.float32
    assert torch.autograd.grad(output.total, value)[0].dtype == torch.bfloat16


def test_only_requested_gradients(device: str) -> None:
    tensors = batch(6, device=device)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in ("value", "advantage", "value_target", "old_log_prob"):
        tensors[name].requires_grad_()
    policy_gradient_loss(**tensors).total.backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == {"value"}
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("old", [False, True])
def test_gradcheck(old: bool, device: str) -> None:
    tensors = batch(6, device=device, dtype=torch.float64)
    mask = torch.arange(6, device=device) != 3
    constants = {name: tensors[name] for name in ("advantage", "value_target")}
    if old:
        constants["old_log_prob"] = tensors["old_log_prob"]

    def losses(log_prob: Tensor, value: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        return policy_gradient_loss(log_prob=log_prob, value=value, entropy=entropy, mask=mask, **constants)[:4]

    torch.autograd.gradcheck(losses, leaves(tensors))


def test_second_derivative_is_a_clear_error(device: str) -> None:
    tensors = batch(6, device=device)
    (value,) = [tensors["value"].requires_grad_()]
    (gradient,) = torch.autograd.grad(policy_gradient_loss(**tensors).total, value, create_graph=True)
    with pytest.raises(RuntimeError, match="policy_gradient_loss has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("numel", [40, 10000])
def test_two_runs_give_the_same_bits(numel: int, device: str) -> None:
    tensors = batch(numel, device=device)
    inputs = leaves(tensors)
    outputs = [policy_gradient_loss(**tensors) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    gradients = [torch.autograd.grad(output.total, inputs) for output in outputs]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_number_of_threads_does_not_change_the_bits() -> None:
    tensors = batch(100_000, device="cpu")
    inputs = leaves(tensors)
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        output = policy_gradient_loss(**tensors)
        found.append((*output, *torch.autograd.grad(output.total, inputs)))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_the_loss_may_be_changed_in_place(device: str) -> None:
    tensors = batch(6, device=device)
    value = tensors["value"].requires_grad_()
    loss = policy_gradient_loss(**tensors).total
    loss += 1.0
    loss.backward()
    assert value.grad is not None


def test_opcheck(device: str) -> None:
    tensors = batch(2, 3, device=device)
    mask = torch.rand(2, 3, device=device) > 0.5
    forward = torch.ops.efe.policy_gradient_loss_forward.default
    backward = torch.ops.efe.policy_gradient_loss_backward.default
    scalar, diagnostics = torch.ones((), device=device), torch.ones(4, device=device)
    inputs = tuple(tensors[name] for name in ("log_prob", "value", "advantage", "value_target"))
    for optional in ((tensors["old_log_prob"], mask), (None, None)):
        arguments = (*inputs, *optional, 0.2, 0.5, 0.01)
        torch.library.opcheck(forward, (tensors["entropy"], *arguments))
        torch.library.opcheck(backward, (scalar, None, scalar, None, [True, False, True], diagnostics, *arguments))


def test_compiles_as_one_graph(device: str) -> None:
    tensors = batch(6, device=device)
    inputs = leaves(tensors)

    def loss(log_prob: Tensor, value: Tensor, entropy: Tensor) -> Tensor:
        output = policy_gradient_loss(**{**tensors, "log_prob": log_prob, "value": value, "entropy": entropy})
        return output.total + output.policy + output.approx_kl

    expected = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_clear_errors(device: str) -> None:
    tensors = batch(6, device=device)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "log_prob must be float32, .*, it was torch.int64", {"log_prob": tensors["log_prob"].long()}),
        (TypeError, "entropy must be a tensor, it was float", {"entropy": 0.0}),
        (TypeError, "mask must be a bool tensor", {"mask": tensors["value"]}),
        (ValueError, r"value must have the shape of log_prob = \[6\], it was \[5\]", {"value": tensors["value"][:5]}),
        (ValueError, r"mask must have the shape of log_prob = \[6\]", {"mask": tensors["value"][:5] > 0}),
        (ValueError, "value_target must be on the device of log_prob", {"value_target": tensors["value"].to("meta")}),
        (ValueError, "advantage must have the shape of log_prob", {"advantage": tensors["value"][:, None]}),
        (ValueError, "old_log_prob must have the shape of log_prob", {"old_log_prob": tensors["value"][:1]}),
        (ValueError, "clip must be positive and not NaN, it was 0", {"clip": 0}),
        (ValueError, "clip must be positive and not NaN, it was nan", {"clip": math.nan}),
    ]
    for error, message, replaced in wrong:
        with pytest.raises(error, match=message):
            policy_gradient_loss(**{**tensors, **replaced})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("old_log_prob", [-800.0, -math.inf])
def test_a_ratio_that_overflows_leaves_an_advantage_of_0_at_0(
    old_log_prob: float, dtype: torch.dtype, device: str
) -> None:
    """A group of equal rewards has advantages of exactly 0; a gain above the clip is a constant."""
    log_prob = torch.zeros(5, dtype=dtype, device=device, requires_grad=True)
    advantage = torch.tensor([0.0, -0.0, 2.0, 0.0, 1.0], dtype=dtype, device=device)
    old = torch.full_like(advantage, old_log_prob)
    old[-1] = 0
    zero = torch.zeros_like(advantage)
    output = policy_gradient_loss(log_prob, advantage, zero, zero, zero, old_log_prob=old)
    (gradient,) = torch.autograd.grad(output.total, log_prob)
    torch.testing.assert_close(output.policy, -(torch.tensor(1.2 * 2 + 1, dtype=dtype, device=device)) / 5)
    torch.testing.assert_close(gradient, torch.tensor([0, 0, 0, 0, -0.2], dtype=dtype, device=device))
    assert output.approx_kl == math.inf
    assert output.clip_fraction == torch.tensor(0.8, dtype=dtype)


def test_a_score_that_is_impossible_leaves_an_advantage_of_0_at_0(device: str) -> None:
    log_prob = torch.tensor([-math.inf, -1.0], device=device, requires_grad=True)
    advantage, zero = torch.tensor([0.0, 2.0], device=device), torch.zeros(2, device=device)
    output = policy_gradient_loss(log_prob, advantage, zero, zero, zero)
    assert output.policy == 1
    (gradient,) = torch.autograd.grad(output.total, log_prob)
    assert gradient.tolist() == [0, -1]


def test_a_coefficient_of_0_removes_a_part_that_diverges(device: str) -> None:
    zero = torch.zeros(2, device=device)
    leaves = [torch.tensor([math.inf, 0.0], device=device, requires_grad=True) for _ in range(2)]
    output = policy_gradient_loss(zero, zero, leaves[0], zero, leaves[1], value_coef=0, entropy_coef=0)
    assert output.total == 0
    for gradient in torch.autograd.grad(output.total, leaves):
        assert not gradient.any()


@pytest.mark.parametrize("value", [1e20, float("inf")])
def test_a_critic_that_diverges_costs_infinity(value: float, device: str) -> None:
    zeros = torch.zeros(4, device=device)
    values = torch.tensor([1.0, value, 1.0, 1.0], device=device)
    output = policy_gradient_loss(zeros, zeros, values, zeros, zeros)
    assert output.value == float("inf") and output.total == float("inf")


@pytest.mark.usefixtures("served_by")
def test_a_single_action_without_a_dimension(device: str) -> None:
    tensors = batch(1, device=device)
    expected = policy_gradient_loss(**tensors)
    found = policy_gradient_loss(**{name: tensor[0] for name, tensor in tensors.items()})
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.usefixtures("served_by")
def test_a_weight_of_zero_removes_an_infinite_term_but_hides_no_nan(device: str) -> None:
    tensors = batch(6, device=device)
    expected = policy_gradient_loss(**tensors, value_coef=0.0, entropy_coef=0.0).total
    for value, removed in ((math.inf, True), (math.nan, False)):
        tensors["entropy"][2] = value
        total = policy_gradient_loss(**tensors, value_coef=0.0, entropy_coef=0.0).total
        assert torch.equal(total, expected) if removed else total.isnan()
