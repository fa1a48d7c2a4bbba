"""policy_gradient_loss: values and gradients against PyTorch's formula in float64, masks, diagnostics, and errors."""

from __future__ import annotations

import math
from fractions import Fraction
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
    value: Tensor | None = None,
    value_target: Tensor | None = None,
    entropy: Tensor | None = None,
    *,
    old_log_prob: Tensor | None = None,
    clip: float = 0.2,
    clip_high: float | None = None,
    value_clip: float | None = None,
    old_value: Tensor | None = None,
    value_coef: float = 0.5,
    entropy_coef: float = 0.01,
    ref_log_prob: Tensor | None = None,
    kl_coef: float = 0.0,
    dual_clip: float | None = None,
    aggregation: str = "mean",
    normalizer: float | None = None,
    level: str = "token",
    mask: Tensor | None = None,
) -> PolicyLossOutput:
    """As the papers and training scripts write it; the elements that count are picked out row by row."""
    length = log_prob.shape[-1]
    mask = torch.ones_like(log_prob, dtype=torch.bool) if mask is None else mask
    rows = [row.nonzero()[:, 0] for row in mask.view(-1, length)]

    def picked(tensor: Tensor) -> list[Tensor]:
        if tensor.shape != log_prob.shape:
            tensor = tensor.reshape(-1, 1).expand(-1, length)
        return [row[places] for row, places in zip(tensor.reshape(-1, length), rows, strict=True) if len(places)]

    def aggregate(parts: list[Tensor]) -> Tensor:
        if aggregation == "sequence_mean":
            return torch.stack([part.mean() for part in parts]).mean()
        return torch.cat(parts).sum() / normalizer if aggregation == "constant" else torch.cat(parts).mean()

    zero = torch.zeros((), dtype=log_prob.dtype, device=log_prob.device)
    value_loss = mean_entropy = kl = clip_fraction = approx_kl = explained = low = high = zero
    new, gains = picked(log_prob), picked(advantage)
    if old_log_prob is None:
        policy = aggregate([-one * gain for one, gain in zip(new, gains, strict=True)])
    else:
        up = 1 + (clip if clip_high is None else clip_high)
        ratios = [(one - old).exp() for one, old in zip(new, picked(old_log_prob), strict=True)]
        if level == "sequence":
            ratios = [ratio.log().mean().exp().expand_as(ratio) for ratio in ratios]
        objectives = []
        for ratio, gain in zip(ratios, gains, strict=True):
            objective = torch.min(ratio * gain, ratio.clamp(1 - clip, up) * gain)
            if dual_clip is not None:
                objective = torch.where(gain < 0, torch.max(objective, dual_clip * gain), objective)
            objectives.append(objective)
        policy = aggregate([-objective for objective in objectives])
        if level == "sequence":
            ratios, gains = [ratio[:1] for ratio in ratios], [gain[:1] for gain in gains]
        ratio, gain = torch.cat(ratios), torch.cat(gains)
        low, high = ((ratio < 1 - clip) & (gain < 0)).to(zero).mean(), ((ratio > up) & (gain > 0)).to(zero).mean()
        clip_fraction = ((ratio < 1 - clip) | (ratio > up)).to(zero).mean()
        approx_kl = (ratio - 1 - ratio.log()).mean()
    if value is not None:
        values, targets = picked(value), picked(value_target)
        errors = [(one - goal).square() for one, goal in zip(values, targets, strict=True)]
        if value_clip is not None:
            moved = [old + (one - old).clamp(-value_clip, value_clip)
                     for one, old in zip(values, picked(old_value), strict=True)]  # fmt: skip
            held = [(one - goal).square() for one, goal in zip(moved, targets, strict=True)]
            errors = [torch.max(*pair) for pair in zip(errors, held, strict=True)]
        value_loss = aggregate(errors)
        value, target = torch.cat(values), torch.cat(targets)
        explained = 1 - (target - value).var(correction=0) / target.var(correction=0)
    if entropy is not None:
        mean_entropy = aggregate(picked(entropy))
    if ref_log_prob is not None:
        away = [ref - one for one, ref in zip(new, picked(ref_log_prob), strict=True)]
        kl = aggregate([one.exp() - 1 - one for one in away])
    total = policy + value_coef * value_loss - entropy_coef * mean_entropy + kl_coef * kl
    return PolicyLossOutput(total, policy, value_loss, mean_entropy, clip_fraction, approx_kl, explained, kl, low, high)


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


COMBINATIONS: dict[str, dict[str, Any]] = {
    "clip_high": {"old_log_prob": 0.5, "clip": 0.1, "clip_high": 0.4},
    "dual_clip": {"old_log_prob": 1.5, "dual_clip": 3.0},
    "value_clip": {"old_value": 0.5, "value_clip": 0.3, "value_coef": 0.7},
    "kl": {"ref_log_prob": 0.5, "kl_coef": 0.3},
    "kl beside the ratio": {"old_log_prob": 0.5, "ref_log_prob": 0.5, "kl_coef": 0.3},
    "everything": {
        "old_log_prob": 1.0, "clip": 0.1, "clip_high": 0.4, "dual_clip": 2.0, "old_value": 0.5, "value_clip": 0.3,
        "ref_log_prob": 0.5, "kl_coef": 0.3, "entropy_coef": 0.2,
    },
    "sequences": {"level": "sequence", "old_log_prob": 1.5, "clip": 0.1, "clip_high": 0.4, "dual_clip": 1.5},
    "sequences with everything": {
        "level": "sequence", "old_log_prob": 1.5, "ref_log_prob": 0.5, "kl_coef": 0.3, "entropy_coef": 0.2,
        "old_value": 0.5, "value_clip": 0.3,
    },
}  # fmt: skip
AGGREGATIONS: list[dict[str, Any]] = [
    {"aggregation": "mean"}, {"aggregation": "sequence_mean"}, {"aggregation": "constant", "normalizer": 50.0},
]  # fmt: skip
PAST = {"old_log_prob": "log_prob", "ref_log_prob": "log_prob", "old_value": "value"}


def combined(
    name: str, shape: tuple[int, ...], per_row: bool, critic: bool, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Tensors and settings; a number in place of a past tensor is how far it lies from the present one."""
    tensors: dict[str, Any] = batch(*shape, device=device, dtype=dtype)
    del tensors["old_log_prob"]
    for setting, given in COMBINATIONS[name].items():
        now = tensors.get(PAST.get(setting, ""))
        tensors[setting] = given if now is None else now + given * torch.randn(shape, device=device).to(dtype)
    if per_row:
        tensors["advantage"] = tensors["advantage"][..., :1] if shape[-1] % 2 else tensors["advantage"][..., 0]
    if not critic:
        for missing in ("value", "value_target", "entropy", "old_value", "value_clip"):
            tensors.pop(missing, None)
    return tensors


def lengths_mask(shape: tuple[int, ...], device: str) -> Tensor:
    """Answers of other lengths, the second of which is empty."""
    lengths = torch.randint(1, shape[-1] + 1, (*shape[:-1], 1), device=device)
    lengths.view(-1)[1] = 0
    return torch.arange(shape[-1], device=device) < lengths


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda found: found["aggregation"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 400)])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations(
    name: str, shape: tuple[int, ...], critic: bool, masked: bool, aggregation: dict[str, Any], dtype: torch.dtype,
    device: str,
) -> None:  # fmt: skip
    """One tile and several, with an advantage for each row in half of the cases and in all of sequences."""
    torch.manual_seed(len(name))
    per_row = critic == masked or name.startswith("sequences")
    arguments = combined(name, shape, per_row, critic, dtype, device) | aggregation
    arguments["mask"] = lengths_mask(shape, device) if masked else None
    tensors64 = {key: one.double() if isinstance(one, Tensor) and key != "mask" else one
                 for key, one in arguments.items()}  # fmt: skip
    differentiable = [key for key in ("log_prob", "value", "entropy") if key in arguments]
    for given in (arguments, tensors64):
        for key in differentiable:
            given[key].requires_grad_()
    found, expected = policy_gradient_loss(**arguments), definition(**tensors64)
    # Ratios and divergences of size 10 come from differences of size 5, each rounded in float32.
    tight = dtype == torch.float64
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if tight else {"rtol": 1e-5, "atol": 1e-5}
    assert_close(found, expected, **tolerance)
    upstream = sum(factor * part for factor, part in zip((1.0, 0.5, 0.3, -0.2), (*found[:3], found.kl), strict=True))
    wanted = sum(
        factor * part for factor, part in zip((1.0, 0.5, 0.3, -0.2), (*expected[:3], expected.kl), strict=True)
    )
    gradients = torch.autograd.grad(upstream, [arguments[key] for key in differentiable], allow_unused=True)
    exacts = torch.autograd.grad(wanted, [tensors64[key] for key in differentiable], allow_unused=True)
    for one, other in zip(gradients, exacts, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-12 if tight else 1e-5, atol=1e-14 if tight else 1e-7)


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


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-7, 1e-4, -1e-4, 1e-2, -0.09, 0.11, -0.5, 2.0])
def test_the_kl_of_a_small_step_keeps_its_digits(size: float, dtype: torch.dtype, device: str) -> None:
    one, zero = torch.full((8,), size, dtype=dtype, device=device), torch.zeros(8, dtype=dtype, device=device)
    output = policy_gradient_loss(one, zero, old_log_prob=zero, ref_log_prob=2 * one, kl_coef=1.0)
    x = Fraction(one[0].item())
    exact = float(sum(x**k / math.factorial(k) for k in range(2, 40)))
    # A few roundings; from 0.1 on exp(x) - 1 and x cancel down to about x / 2 of either.
    ulps = 4 if abs(size) < 0.1 else 4 * max(1, 2 / abs(size))
    for found in (output.approx_kl, output.kl):
        assert found.item() == pytest.approx(exact, rel=ulps * torch.finfo(dtype).eps, abs=0)


@pytest.mark.usefixtures("served_by")
def test_a_limited_value_of_which_nothing_is_known_is_not_hidden(device: str) -> None:
    """inf - inf, beside an error of the value itself that is infinite."""
    zero = torch.zeros(3, device=device)
    infinite = torch.tensor([0.0, torch.inf, 0.0], device=device)
    output = policy_gradient_loss(zero, zero, zero, infinite, old_value=infinite, value_clip=0.2)
    assert output.value.isnan() and output.total.isnan()


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


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda found: found["aggregation"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck_of_everything(level: str, aggregation: dict[str, Any], device: str) -> None:
    name = "everything" if level == "token" else "sequences with everything"
    arguments = combined(name, (3, 4), True, True, torch.float64, device) | aggregation
    arguments["mask"] = torch.arange(12, device=device).view(3, 4) % 5 != 3
    inputs = [arguments.pop(key).requires_grad_() for key in ("log_prob", "value", "entropy")]

    def losses(log_prob: Tensor, value: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        found = policy_gradient_loss(log_prob, value=value, entropy=entropy, **arguments)
        return *found[:4], found.kl

    torch.autograd.gradcheck(losses, inputs)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda found: found["aggregation"])
def test_padding_may_hold_anything(aggregation: dict[str, Any], level: str, device: str) -> None:
    name = "everything" if level == "token" else "sequences with everything"
    arguments = combined(name, (4, 6), True, True, torch.float32, device) | aggregation
    arguments["mask"] = mask = lengths_mask((4, 6), device)
    clean = policy_gradient_loss(**arguments)
    for i, tensor in enumerate(arguments.values()):
        if isinstance(tensor, Tensor) and tensor.shape == mask.shape and tensor is not mask:
            tensor[~mask] = (torch.nan, torch.inf, -torch.inf)[i % 3]
    arguments["advantage"][1] = torch.nan  # of a row without an element
    inputs = leaves(arguments)
    found = policy_gradient_loss(**arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, clean, strict=True))
    for gradient in torch.autograd.grad(found.total, inputs):
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3)])
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda found: found["aggregation"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_answers_of_nothing_are_zero(
    level: str, aggregation: dict[str, Any], shape: tuple[int, ...], device: str
) -> None:
    tensors = batch(*shape, device=device)
    tensors["advantage"] = torch.ones(shape[0], device=device)
    inputs = leaves(tensors)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for absent in (mask, None) if 0 in shape else (mask,):
        output = policy_gradient_loss(**tensors, **aggregation, level=level, mask=absent)
        assert all(value.item() == 0 for value in output)
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(output.total, inputs))


@pytest.mark.usefixtures("served_by")
def test_what_is_absent_is_as_if_it_were_zero(device: str) -> None:
    tensors = batch(5, 40, device=device)
    zero = torch.zeros(5, 40, device=device)
    log_prob, advantage, old = (tensors[name] for name in ("log_prob", "advantage", "old_log_prob"))
    log_prob.requires_grad_()
    outputs = [
        policy_gradient_loss(log_prob, advantage, old_log_prob=old),
        policy_gradient_loss(log_prob, advantage, zero, zero, zero, old_log_prob=old),
    ]
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    assert torch.equal(*(torch.autograd.grad(output.total, log_prob)[0] for output in outputs))


@pytest.mark.usefixtures("served_by")
def test_the_sides_of_the_clip_are_told_apart(device: str) -> None:
    old = torch.zeros(8, device=device)
    log_prob = torch.tensor([0.5, 0.5, 0.5, -0.5, -0.5, 0.0, 0.25, -0.15], device=device)
    advantage = torch.tensor([1.0, -1.0, 2.0, -1.0, 1.0, 1.0, 1.0, -1.0], device=device)
    output = policy_gradient_loss(log_prob, advantage, old_log_prob=old, clip=0.1, clip_high=0.4)
    assert output.clip_fraction.item() == pytest.approx(6 / 8)
    assert output.clip_fraction_low.item() == pytest.approx(2 / 8)
    assert output.clip_fraction_high.item() == pytest.approx(2 / 8)
    assert not output.clip_fraction_low.requires_grad and output.kl.item() == 0


@pytest.mark.usefixtures("served_by")
def test_clips_hold_the_gradient_where_they_hold_the_objective(device: str) -> None:
    old = torch.zeros(4, device=device)
    log_prob = torch.tensor([1.0, 1.5, 1.5, -1.0], device=device, requires_grad=True)  # ratios 2.7, 4.5, 4.5, 0.4
    advantage = torch.tensor([-1.0, -1.0, 1.0, 1.0], device=device)
    value = torch.tensor([1.0, 1.0, 1.0, 0.1], device=device, requires_grad=True)
    target = torch.tensor([2.0, 0.0, 0.9, 0.0], device=device)  # limited, the first three values are 0.2
    output = policy_gradient_loss(
        log_prob, advantage, value, target, old_log_prob=old, dual_clip=3.0, old_value=old, value_clip=0.2
    )
    assert output.policy.item() == pytest.approx((math.e + 3 - 1.2 - math.exp(-1)) / 4)
    assert output.value.item() == pytest.approx((1.8**2 + 1 + 0.7**2 + 0.1**2) / 4)
    to_log_prob, to_value = torch.autograd.grad(output.total, (log_prob, value))
    assert (to_log_prob != 0).tolist() == [True, False, False, True]
    assert (to_value != 0).tolist() == [False, True, False, True]


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
    scalar, diagnostics = torch.ones((), device=device), torch.ones(6, device=device)
    log_prob, value, target, old = (tensors[name] for name in ("log_prob", "value", "value_target", "old_log_prob"))
    rows = torch.ones(2, device=device)
    settings = (0.8, 1.2, 3.0, 0.2, 0.5, 0.01, 0.1, 2.0)
    everything = (log_prob, rows, value, target, old, old, old, mask, rows, *settings)
    torch.library.opcheck(forward, (tensors["entropy"], *everything))
    torch.library.opcheck(backward, (scalar, None, scalar, None, scalar, [True, False, True], diagnostics, *everything))
    little = (log_prob, tensors["advantage"], *[None] * 7, *settings)
    torch.library.opcheck(forward, (None, *little))
    torch.library.opcheck(backward, (None, scalar, *[None] * 3, [False, True, False], diagnostics, *little))


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
        (ValueError, "ref_log_prob must have the shape of log_prob", {"ref_log_prob": tensors["value"][:1]}),
    ]
    for error, message, replaced in wrong:
        with pytest.raises(error, match=message):
            policy_gradient_loss(**{**tensors, **replaced})


def test_one_argument_asks_for_another(device: str) -> None:
    tensors = batch(3, 4, device=device)
    rows = {**tensors, "advantage": tensors["advantage"][:, 0]}
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("value_target must be given with value, it was None", {**tensors, "value_target": None}),
        ("value must be given with value_target, it was None", {**tensors, "value": None}),
        ("old_value must be given with value_clip, it was None", {**tensors, "value_clip": 0.2}),
        (r"old_value must have the shape of log_prob = \[3, 4\], it was \[3\]",
         {**tensors, "old_value": rows["advantage"]}),
        ("ref_log_prob must be given with kl_coef, it was None", {**tensors, "kl_coef": 0.1}),
        (r"advantage must have the shape of log_prob = \[3, 4\] or one for each row, \[3\], it was \[4\]",
         {**tensors, "advantage": tensors["advantage"][0]}),
        ("normalizer must be given with aggregation='constant', it was None", {**tensors, "aggregation": "constant"}),
        ("normalizer must be None with aggregation='mean', it was 3", {**tensors, "normalizer": 3}),
        ("normalizer must be positive", {**tensors, "aggregation": "constant", "normalizer": 0}),
        ("aggregation must be one of 'mean', 'sequence_mean', 'constant', it was 0", {**tensors, "aggregation": 0}),
        ("level must be one of 'token', 'sequence', it was 'row'", {**tensors, "level": "row"}),
        ("dual_clip must be above 1 and not NaN, it was 1", {**tensors, "dual_clip": 1}),
        (r"advantage must have the shape \[3\], one for each row of log_prob, .*it was \[3, 4\]",
         {**tensors, "level": "sequence"}),
        ("old_log_prob must be given with level='sequence'", {**rows, "old_log_prob": None, "level": "sequence"}),
        (r"log_prob must have at least two dimensions with level='sequence', its shape was \[4\]",
         {**{name: tensor[0] for name, tensor in tensors.items()}, "level": "sequence"}),
    ]  # fmt: skip
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            policy_gradient_loss(**arguments)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("name", ["value", "old_value", "value_target"])
def test_nan_in_the_critics_term_is_not_hidden(name: str, device: str) -> None:
    """Whichever of the two errors is the larger."""
    tensors = {which: torch.ones(3, device=device) for which in ("value", "old_value", "value_target")}
    tensors[name][1] = torch.nan
    nothing = torch.zeros(3, device=device)
    assert policy_gradient_loss(nothing, nothing, **tensors, value_clip=0.2).value.isnan()


def test_diagnostics_are_constants_of_the_transforms_too(device: str) -> None:
    tensors = {name: tensor.detach() for name, tensor in batch(6, device=device).items()}

    def diagnostics(log_prob: Tensor, value: Tensor) -> Tensor:
        output = policy_gradient_loss(**{**tensors, "log_prob": log_prob, "value": value})
        return output.approx_kl + output.explained_variance

    gradients = torch.func.grad(diagnostics, (0, 1))(tensors["log_prob"], tensors["value"])
    assert not any(gradient.any() for gradient in gradients)


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
