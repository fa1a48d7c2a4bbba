"""`squashed_log_prob` on whatever serves the device: C++ on the CPU, CUDA on the GPU, else the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from efe_kernels import refine_prompt, squashed_log_prob
from efe_kernels.prompt import reference
from tests.prompt.close import assert_close
from tests.prompt.test_refine_prompt import DISTRIBUTIONS_CUT_OFF, distribution_log_prob
from tests.served_by import recorded_calls

# Of the largest value: about ten roundings in a row, and sums of D + 1 addends.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6}
SHAPES = [(1, 1), (3, 5), (33, 4), (2, 131), (5, 256), (1, 1030)]


def arguments(batch: int, dimension: int, dtype: torch.dtype, device: str, shared: bool = True) -> dict[str, Tensor]:
    width = dimension + 1
    tensors = {
        "action": torch.randn(batch, width, dtype=dtype, device=device),
        "mean": torch.randn(batch, width, dtype=dtype, device=device),
        "log_std": torch.randn(*(() if shared else (batch,)), width, dtype=dtype, device=device) * 0.3,
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def in_double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in tensors.items()}


@pytest.mark.parametrize("shared", [False, True], ids=["log_std per row", "log_std shared"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_reference_in_double(dtype: torch.dtype, shape: tuple[int, int], shared: bool, device: str) -> None:
    batch, dimension = shape
    inputs = arguments(batch, dimension, dtype, device, shared)
    outputs = squashed_log_prob(**inputs, delta_scale=0.7)
    upstream = [torch.randn_like(output) for output in outputs]
    found = torch.autograd.grad(outputs, list(inputs.values()), upstream)

    exact = in_double(inputs)
    expected = reference.squashed_log_prob(**exact, delta_scale=0.7)
    wanted = torch.autograd.grad(expected, list(exact.values()), [grad.cpu().double() for grad in upstream])
    for name, output, want in zip(("log_prob", "entropy"), outputs, expected, strict=True):
        assert output.dtype == dtype
        assert_close(name, output.detach(), want.detach(), TOLERANCE[dtype], scale=dimension)
    for name, grad, want in zip(inputs, found, wanted, strict=True):
        assert_close(f"gradient of {name}", grad, want, TOLERANCE[dtype])


@pytest.mark.parametrize("magnitude", [0.0, 3.0, 20.0, 60.0])
def test_is_what_torch_distributions_has(magnitude: float, device: str) -> None:
    inputs = {name: tensor.detach() for name, tensor in arguments(4, 6, torch.float64, device).items()}
    action = inputs["action"] + magnitude * torch.sign(inputs["action"])
    outputs = squashed_log_prob(action, inputs["mean"], inputs["log_std"])
    expected = distribution_log_prob(action, inputs["mean"], inputs["log_std"], 0.2)
    cut_off = DISTRIBUTIONS_CUT_OFF if magnitude >= 10 else 1e-13
    torch.testing.assert_close(outputs, expected, rtol=1e-13, atol=cut_off)


@pytest.mark.parametrize("magnitude", [20.0, 44.0, 100.0, 1e4])
def test_float32_is_exact_far_out(magnitude: float, device: str) -> None:
    inputs = arguments(3, 6, torch.float32, device)
    with torch.no_grad():
        inputs["action"].copy_(magnitude * torch.sign(inputs["action"]))
    outputs = squashed_log_prob(**inputs)
    exact = in_double(inputs)
    expected = reference.squashed_log_prob(**exact, delta_scale=0.2)
    found = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), list(inputs.values()))
    wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), list(exact.values()))
    for actual, want in zip((*outputs, *found), (*expected, *wanted), strict=True):
        assert_close("value or gradient", actual.detach(), want.detach(), 1e-6)


@pytest.mark.parametrize("log_std", [-60.0, 60.0, 88.0])
def test_a_very_wide_or_narrow_distribution_sees_a_far_action(log_std: float, device: str) -> None:
    """1 / std may be no normal number where (action - mean) / std is 0.7."""
    mean = torch.full((2, 5), 0.7 * math.exp(log_std), device=device, requires_grad=True)
    action, log_stds = torch.zeros(2, 5, device=device), torch.full((5,), log_std, device=device)
    found, _ = squashed_log_prob(action, mean, log_stds)
    expected, _ = squashed_log_prob(action.double(), mean.double(), log_stds.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), mean)
    torch.testing.assert_close(gradient.double(), -mean.double() * math.exp(-2 * log_std), rtol=1e-5, atol=1e-38)


def test_agrees_with_refine_prompt_at_its_own_action(device: str) -> None:
    inputs = arguments(5, 40, torch.float64, device)
    result = refine_prompt(torch.zeros_like(inputs["action"][:, 1:]), inputs["mean"], inputs["log_std"], seed=8)
    log_prob, entropy = squashed_log_prob(result.action.detach(), inputs["mean"], inputs["log_std"])
    assert_close("log_prob", log_prob.detach(), result.log_prob.detach(), 1e-12)
    assert_close("entropy", entropy.detach(), result.entropy.detach(), 1e-12)


def test_score_function_and_path_gradient_are_kept_apart(device: str) -> None:
    """For a stored action, log_prob moves the mean by n / std; the entropy of a fixed action does not see the mean."""
    inputs = arguments(2, 3, torch.float64, device)
    action = inputs["action"].detach()
    log_prob, entropy = squashed_log_prob(action, inputs["mean"], inputs["log_std"])
    (grad_mean,) = torch.autograd.grad(log_prob.sum(), inputs["mean"], retain_graph=True)
    assert_close("gradient", grad_mean, ((action - inputs["mean"]) * (-2 * inputs["log_std"]).exp()).detach(), 1e-13)
    grad_mean, grad_log_std = torch.autograd.grad(entropy.sum(), [inputs["mean"], inputs["log_std"]])
    assert torch.equal(grad_mean, torch.zeros_like(grad_mean))
    assert torch.equal(grad_log_std, torch.full_like(grad_log_std, 2.0)), "one per row"


@pytest.mark.parametrize("name", ["action", "mean", "log_std"])
def test_only_the_requested_gradient_is_computed(name: str, device: str) -> None:
    inputs = {key: tensor.detach() for key, tensor in arguments(3, 7, torch.float32, device).items()}
    inputs[name].requires_grad_()
    with recorded_calls("squashed_log_prob_backward", device) as calls:
        squashed_log_prob(**inputs)[0].sum().backward()
    assert inputs[name].grad is not None
    assert [needs for *_, needs in calls] == [[key == name for key in inputs]]


def test_half_precision_is_computed_in_float32(device: str) -> None:
    low = {name: tensor.detach().bfloat16() for name, tensor in arguments(3, 20, torch.float32, device).items()}
    outputs = squashed_log_prob(**low)
    expected = squashed_log_prob(**{name: tensor.float() for name, tensor in low.items()})
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_unbatched_and_strided(device: str) -> None:
    inputs = {name: tensor.detach() for name, tensor in arguments(3, 6, torch.float32, device).items()}
    batch = squashed_log_prob(**inputs)
    row = squashed_log_prob(inputs["action"][1], inputs["mean"][1], inputs["log_std"])
    assert all(a.dim() == 0 and torch.equal(a, b[1]) for a, b in zip(row, batch, strict=True))
    strided = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in inputs.items()}
    strided["mean"] = inputs["mean"].t().contiguous().t()
    assert all(torch.equal(a, b) for a, b in zip(squashed_log_prob(**strided), batch, strict=True))


def test_two_runs_give_the_same_bits_and_leave_the_arguments_alone(device: str) -> None:
    inputs = arguments(40, 300, torch.float32, device)
    before = [tensor.detach().clone() for tensor in inputs.values()]

    def run() -> list[Tensor]:
        log_prob, entropy = squashed_log_prob(**inputs)
        return [log_prob, entropy, *torch.autograd.grad((log_prob * entropy).sum(), list(inputs.values()))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.values(), strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared: bool, device: str) -> None:
    inputs = arguments(3, 4, torch.float64, device, shared)
    assert torch.autograd.gradcheck(squashed_log_prob, tuple(inputs.values()))


@pytest.mark.parametrize("shared", [False, True])
def test_written_out_reference_gradient(shared: bool) -> None:
    inputs = arguments(3, 6, torch.float64, "cpu", shared)
    outputs = reference.squashed_log_prob(**inputs, delta_scale=0.2)
    upstream = [torch.randn_like(output) for output in outputs]
    expected = torch.autograd.grad(outputs, list(inputs.values()), upstream)
    written = reference.squashed_log_prob_backward(*upstream, *(tensor.detach() for tensor in inputs.values()))
    for name, grad, want in zip(inputs, written, expected, strict=True):
        assert_close(f"gradient of {name}", grad, want, 1e-14)


def test_second_derivative_is_a_clear_error(device: str) -> None:
    inputs = arguments(2, 3, torch.float32, device)
    (gradient,) = torch.autograd.grad(squashed_log_prob(**inputs)[0].sum(), inputs["mean"], create_graph=True)
    with pytest.raises(RuntimeError, match="squashed_log_prob has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"action": 3.0}, TypeError, "action must be a tensor, it was float"),
        ({"action": torch.zeros(2, 5, dtype=torch.int32)}, TypeError, "action must be float32"),
        (
            {"action": torch.zeros(1, 2, 5)},
            ValueError,
            r"action must have the shape \[B, D\+1\] or \[D\+1\], it was \[1, 2, 5\]",
        ),
        ({"action": torch.zeros(2, 1)}, ValueError, "action must have at least one prompt dimension"),
        ({"action": torch.zeros(5)}, ValueError, r"mean must have the shape \[D\+1\] = \[5\], it was \[2, 5\]"),
        ({"mean": torch.zeros(5)}, ValueError, r"mean must have the shape \[B, D\+1\] = \[2, 5\], it was \[5\]"),
        ({"log_std": torch.zeros(2)}, ValueError, r"log_std must have the shape \[D\+1\] = \[5\]"),
        ({"log_std": torch.zeros(5, device="meta")}, ValueError, "log_std must be on the device of action, cpu"),
        ({"delta_scale": -1.0}, ValueError, "delta_scale must be positive and finite, it was -1.0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors = {"action": torch.zeros(2, 5), "mean": torch.zeros(2, 5), "log_std": torch.zeros(5)}
    with pytest.raises(error, match=message):
        squashed_log_prob(**(tensors | change))


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared: bool, device: str) -> None:
    tensors = tuple(tensor.detach() for tensor in arguments(3, 5, torch.float32, device, shared).values())
    torch.library.opcheck(torch.ops.efe.squashed_log_prob_forward.default, (*tensors, 0.2))
    grads = torch.randn(3, device=device), torch.randn(3, device=device)
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(torch.ops.efe.squashed_log_prob_backward.default, (*grads, *tensors, needs))
