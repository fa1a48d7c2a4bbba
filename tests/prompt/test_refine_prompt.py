"""`refine_prompt` on whatever serves the device: C++ on the CPU, CUDA on the GPU, else the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import AffineTransform, Normal, SigmoidTransform, TanhTransform

from efe_kernels import RefinedPrompt, refine_prompt
from efe_kernels.prompt import reference
from tests.prompt.close import assert_close
from tests.served_by import recorded_calls

# Of the largest value, per dtype of the prompt. float32: about ten roundings of 2^-24 in a row, among them those of
# exp, log1p and a quotient. Half precision: one rounding of the result.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SHAPES = [(1, 1), (3, 5), (33, 4), (2, 131), (5, 256), (1, 1030)]


def arguments(batch: int, dimension: int, dtype: torch.dtype, device: str, shared: bool = True) -> dict[str, Tensor]:
    policy = torch.float64 if dtype == torch.float64 else torch.float32
    width = dimension + 1
    tensors = {
        "prompt": torch.randn(batch, dimension, device=device).to(dtype),
        "mean": torch.randn(batch, width, dtype=policy, device=device),
        "log_std": torch.randn(*(() if shared else (batch,)), width, dtype=policy, device=device) * 0.5 - 0.5,
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def in_double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in tensors.items()}


def gradients(outputs: Any, upstream: list[Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(list(outputs), list(inputs.values()), upstream)


@pytest.mark.parametrize("seeded", [False, True], ids=["noise", "seed"])
@pytest.mark.parametrize("shared", [False, True], ids=["log_std per row", "log_std shared"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_reference_in_double(
    dtype: torch.dtype, shape: tuple[int, int], shared: bool, seeded: bool, device: str
) -> None:
    batch, dimension = shape
    inputs = arguments(batch, dimension, dtype, device, shared)
    noise = torch.randn(batch, dimension + 1, dtype=inputs["mean"].dtype, device=device)
    exact_noise = noise.cpu().double()
    if seeded:
        exact_noise = reference.philox_normal(
            torch.tensor(7**20), batch, dimension + 1, dtype=torch.float64, device=torch.device("cpu")
        )
    result = refine_prompt(**inputs, seed=7**20) if seeded else refine_prompt(**inputs, noise=noise)
    upstream = [torch.randn_like(output) for output in result]
    found = gradients(result, upstream, inputs)

    exact = in_double(inputs)
    expected = reference.refine_prompt(**exact, noise=exact_noise, delta_scale=0.2)
    expected_gradients = gradients(expected, [grad.cpu().double() for grad in upstream], exact)

    policy = TOLERANCE[inputs["mean"].dtype]
    assert result.prompt.dtype == dtype
    assert_close("prompt", result.prompt.detach(), expected[0].detach(), TOLERANCE[dtype])
    assert_close("action", result.action.detach(), expected[1].detach(), policy)
    # Sums of D + 1 addends of about 1.
    assert_close("log_prob", result.log_prob.detach(), expected[2].detach(), policy, scale=dimension)
    assert_close("entropy", result.entropy.detach(), expected[3].detach(), policy, scale=dimension)
    assert torch.equal(found[0], upstream[0]), "the prompt's gradient is that of the refined prompt"
    assert_close("gradient of mean", found[1], expected_gradients[1], policy)
    assert_close("gradient of log_std", found[2], expected_gradients[2], policy)
    assert [tensor.dtype for tensor in result[1:]] == [inputs["mean"].dtype] * 3


def test_refined_prompt_is_the_blend_of_prompt_and_moved_prompt(device: str) -> None:
    inputs = arguments(3, 8, torch.float64, device)
    result = refine_prompt(**inputs, seed=1, delta_scale=0.3)
    delta, alpha = 0.3 * torch.tanh(result.action[:, :-1]), torch.sigmoid(result.action[:, -1:])
    blend = (1 - alpha) * inputs["prompt"] + alpha * (inputs["prompt"] + delta)
    assert_close("prompt", result.prompt.detach(), blend.detach(), 1e-14)


def distribution_log_prob(action: Tensor, mean: Tensor, log_std: Tensor, delta_scale: float) -> tuple[Tensor, Tensor]:
    """log_prob and entropy as torch.distributions has them, evaluated at u so that no inverse loses digits."""
    base = Normal(mean, log_std.exp())
    u, last = action[:, :-1], action[:, -1]
    tanh, scale, sigmoid = TanhTransform(), AffineTransform(0.0, delta_scale), SigmoidTransform()
    determinant = (tanh.log_abs_det_jacobian(u, tanh(u)) + scale.log_abs_det_jacobian(tanh(u), scale(tanh(u)))).sum(1)
    determinant = determinant + sigmoid.log_abs_det_jacobian(last, sigmoid(last))
    return base.log_prob(action).sum(1) - determinant, base.entropy().sum(1) + determinant


# torch's softplus drops exp(-x) past its threshold of x = 20, here by up to 2e-9 for each of 7 components.
DISTRIBUTIONS_CUT_OFF = 3e-8


@pytest.mark.parametrize("target", [0.0, 0.5, 5.0, 20.0, -20.0, 60.0])
def test_log_prob_and_entropy_are_those_of_torch_distributions(target: float, device: str) -> None:
    """u is brought to `target` by the mean: there tanh is 1 to the last digit, and its density must not be."""
    inputs = arguments(4, 6, torch.float64, device)
    with torch.no_grad():
        inputs["mean"].copy_(target + 0.1 * torch.randn_like(inputs["mean"]))
    result = refine_prompt(**inputs, seed=5)
    expected = distribution_log_prob(result.action, inputs["mean"], inputs["log_std"], 0.2)
    cut_off = DISTRIBUTIONS_CUT_OFF if abs(target) >= 10 else 1e-13
    torch.testing.assert_close((result.log_prob, result.entropy), expected, rtol=1e-13, atol=cut_off)


@pytest.mark.parametrize("u", [0.25, -1.0, 9.0, 20.0, -20.0, 60.0, -300.0])
def test_log_determinants_to_the_last_digit(u: float, device: str) -> None:
    """log_prob of n = 0 and std = 1 is that of the Normal at its mean, minus the log-determinants in 400 digits."""
    with localcontext() as context:
        context.prec = 400
        e = Decimal(2 * u).exp()
        log_tanh_slope = (4 * e / (1 + e) ** 2).ln()
        e = Decimal(u).exp()
        log_sigmoid_slope = (e / (1 + e) ** 2).ln()
        expected = float(-log_tanh_slope - log_sigmoid_slope - Decimal("0.5").ln()) - math.log(2 * math.pi)
    mean = torch.full((1, 2), u, dtype=torch.float64, device=device)
    zeros = torch.zeros_like(mean)
    result = refine_prompt(zeros[:, :1], mean, zeros, noise=zeros, delta_scale=0.5)
    assert result.log_prob.item() == pytest.approx(expected, rel=1e-15, abs=1e-15)


@pytest.mark.parametrize("magnitude", [20.0, 44.0, 100.0, 1e4])
def test_float32_is_exact_far_out(magnitude: float, device: str) -> None:
    inputs = arguments(2, 6, torch.float32, device)
    with torch.no_grad():
        inputs["mean"].copy_(magnitude * torch.sign(inputs["mean"]))
    result = refine_prompt(**inputs, seed=5)
    exact = in_double(inputs)
    noise = reference.philox_normal(torch.tensor(5), 2, 7, dtype=torch.float64, device=torch.device("cpu"))
    expected = reference.refine_prompt(**exact, noise=noise, delta_scale=0.2)
    assert_close("log_prob", result.log_prob.detach(), expected[2].detach(), 1e-6)
    assert_close("entropy", result.entropy.detach(), expected[3].detach(), 1e-6)
    found = torch.autograd.grad(result.log_prob.sum() + result.prompt.sum(), [inputs["mean"], inputs["log_std"]])
    wanted = torch.autograd.grad(expected[2].sum() + expected[0].sum(), [exact["mean"], exact["log_std"]])
    assert_close("gradient of mean", found[0], wanted[0], 2e-6)
    # exp(log_std) · n is added to u and comes back in the gradient: as exact as u, whose last digit is 2^-23 of it.
    assert_close("gradient of log_std", found[1], wanted[1], 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_policy_computes_in_float32(dtype: torch.dtype, device: str) -> None:
    low = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in arguments(3, 20, dtype, device).items()}
    high = {name: tensor.detach().float().requires_grad_() for name, tensor in low.items()}
    result, expected = refine_prompt(**low, seed=2), refine_prompt(**high, seed=2)
    assert [tensor.dtype for tensor in result] == [dtype, torch.float32, torch.float32, torch.float32]
    assert torch.equal(result.prompt, expected.prompt.to(dtype))
    assert torch.equal(result.log_prob, expected.log_prob)
    grads = torch.autograd.grad(result.log_prob.sum(), [low["mean"], low["log_std"]])
    wanted = torch.autograd.grad(expected.log_prob.sum(), [high["mean"], high["log_std"]])
    assert all(torch.equal(grad, want.to(dtype)) for grad, want in zip(grads, wanted, strict=True))


def test_double_anywhere_computes_in_double(device: str) -> None:
    inputs = arguments(3, 5, torch.float32, device)
    result = refine_prompt(inputs["prompt"], inputs["mean"].double(), inputs["log_std"], seed=2)
    exact = in_double(inputs)
    noise = reference.philox_normal(torch.tensor(2), 3, 6, dtype=torch.float64, device=torch.device("cpu"))
    expected = reference.refine_prompt(**exact, noise=noise, delta_scale=0.2)
    assert result.prompt.dtype == torch.float32
    assert result.action.dtype == torch.float64
    assert_close("log_prob", result.log_prob.detach(), expected[2].detach(), 1e-13)


def test_unbatched_is_the_first_row(device: str) -> None:
    inputs = arguments(3, 5, torch.float32, device)
    row = refine_prompt(inputs["prompt"][0], inputs["mean"][0], inputs["log_std"], seed=4)
    batch = refine_prompt(**inputs, seed=4)
    assert isinstance(row, RefinedPrompt)
    assert [list(tensor.shape) for tensor in row] == [[5], [6], [], []]
    assert all(torch.equal(a, b[0]) for a, b in zip(row, batch, strict=True))


def test_any_strides_of_inputs_and_upstream(device: str) -> None:
    dense = {name: tensor.detach() for name, tensor in arguments(4, 9, torch.float32, device, shared=False).items()}
    dense["noise"] = torch.randn(4, 10, device=device)
    strided = {name: torch.stack([tensor.t(), tensor.t()], -1)[..., 0].t() for name, tensor in dense.items()}
    strided["mean"] = torch.cat([dense["mean"], dense["mean"]], 1)[:, :10]
    for tensors in (dense, strided):
        for name in ("prompt", "mean", "log_std"):
            tensors[name].requires_grad_()
    first, second = refine_prompt(**dense), refine_prompt(**strided)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    ones = [torch.ones_like(output) for output in first]
    expected = torch.autograd.grad(list(first), [dense[name] for name in ("prompt", "mean", "log_std")], ones)
    total = sum(output.sum() for output in second)  # upstream gradients with stride 0
    found = torch.autograd.grad(total, [strided[name] for name in ("prompt", "mean", "log_std")])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("output", range(4), ids=RefinedPrompt._fields)
def test_gradient_of_each_output_alone(output: int, device: str) -> None:
    inputs = arguments(3, 7, torch.float64, device)
    noise = torch.randn(3, 8, dtype=torch.float64, device=device)
    upstream = torch.randn_like(refine_prompt(**inputs, noise=noise)[output])
    found = torch.autograd.grad(
        refine_prompt(**inputs, noise=noise)[output], list(inputs.values()), upstream, allow_unused=True
    )
    expected = torch.autograd.grad(
        reference.refine_prompt(**inputs, noise=noise, delta_scale=0.2)[output],
        list(inputs.values()), upstream, allow_unused=True,
    )  # fmt: skip
    for name, grad, want in zip(inputs, found, expected, strict=True):
        assert (grad is None) == (want is None), name
        if grad is not None and want is not None:
            assert_close(f"gradient of {name}", grad, want, 1e-13, scale=1e-3)


@pytest.mark.parametrize("name", ["prompt", "mean", "log_std"])
def test_only_the_requested_gradient_is_computed(name: str, device: str) -> None:
    inputs = {key: tensor.detach() for key, tensor in arguments(3, 7, torch.float32, device).items()}
    inputs[name].requires_grad_()
    with recorded_calls("refine_prompt_backward", device) as calls:
        sum(output.sum() for output in refine_prompt(**inputs, seed=1)).backward()
    assert inputs[name].grad is not None
    assert all(tensor.grad is None for key, tensor in inputs.items() if key != name)
    assert [needs for *_, needs in calls] == ([] if name == "prompt" else [[name == "mean", name == "log_std"]])


def test_noise_is_a_constant(device: str) -> None:
    inputs = arguments(2, 3, torch.float32, device)
    noise = torch.randn(2, 4, device=device, requires_grad=True)
    refine_prompt(**inputs, noise=noise).log_prob.sum().backward()
    assert noise.grad is None


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared: bool, device: str) -> None:
    inputs = arguments(3, 4, torch.float64, device, shared)
    assert torch.autograd.gradcheck(lambda *tensors: tuple(refine_prompt(*tensors, seed=3)), tuple(inputs.values()))


@pytest.mark.parametrize("shared", [False, True])
def test_written_out_reference_gradient(shared: bool) -> None:
    inputs = arguments(3, 6, torch.float64, "cpu", shared)
    noise = torch.randn(3, 7, dtype=torch.float64)
    outputs = reference.refine_prompt(**inputs, noise=noise, delta_scale=0.2)
    upstream = [torch.randn_like(output) for output in outputs]
    _, mean, log_std = gradients(outputs, upstream, inputs)
    written = reference.refine_prompt_backward(
        *upstream, outputs[1].detach(), inputs["log_std"].detach(), noise, delta_scale=0.2
    )
    assert_close("gradient of mean", written[0], mean, 1e-14)
    assert_close("gradient of log_std", written[1], log_std, 1e-14)


def test_nan_stays_in_its_row(device: str) -> None:
    inputs = arguments(3, 70, torch.float32, device)
    with torch.no_grad():
        inputs["mean"][1, 3] = float("nan")
    result = refine_prompt(**inputs, seed=1)
    for output in result:
        assert output[1].isnan().any()
        assert output[[0, 2]].isfinite().all()


def test_empty_batch(device: str) -> None:
    inputs = arguments(0, 4, torch.float32, device)
    result = refine_prompt(**inputs, seed=1)
    assert [list(tensor.shape) for tensor in result] == [[0, 4], [0, 5], [0], [0]]
    sum(output.sum() for output in result).backward()
    assert inputs["log_std"].grad is not None
    assert torch.equal(inputs["log_std"].grad, torch.zeros_like(inputs["log_std"]))


def run(inputs: dict[str, Tensor]) -> list[Tensor]:
    result = refine_prompt(**inputs, seed=9)
    total = result.prompt.square().sum() + result.log_prob.sum() + result.entropy.sum()
    return [*(output.detach() for output in result), *torch.autograd.grad(total, list(inputs.values()))]


def test_two_runs_give_the_same_bits_and_leave_the_arguments_alone(device: str) -> None:
    inputs = arguments(64, 257, torch.float32, device)
    before = [tensor.detach().clone() for tensor in inputs.values()]
    assert all(torch.equal(a, b) for a, b in zip(run(inputs), run(inputs), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.values(), strict=True))


def test_number_of_threads_does_not_change_a_bit() -> None:
    inputs = arguments(64, 257, torch.float32, "cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(inputs)
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(alone, run(inputs), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_second_derivative_is_a_clear_error(device: str) -> None:
    inputs = arguments(2, 3, torch.float32, device)
    (gradient,) = torch.autograd.grad(refine_prompt(**inputs, seed=1).log_prob.sum(), inputs["mean"], create_graph=True)
    with pytest.raises(RuntimeError, match="refine_prompt has no second derivative"):
        gradient.sum().backward()


def changed(**changes: Any) -> Callable[[], Any]:
    tensors = {"prompt": torch.zeros(2, 4), "mean": torch.zeros(2, 5), "log_std": torch.zeros(5)}
    return lambda: refine_prompt(**(tensors | changes))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (changed(prompt=None), TypeError, "prompt must be a tensor, it was NoneType"),
        (changed(prompt=torch.zeros(2, 4, dtype=torch.int64)), TypeError, "prompt must be float32.*it was torch.int64"),
        (
            changed(prompt=torch.zeros(2, 4, 1)),
            ValueError,
            r"prompt must have the shape \[B, D\] or \[D\], it was \[2, 4, 1\]",
        ),
        (changed(prompt=torch.zeros(2, 0)), ValueError, "prompt must have at least one prompt dimension"),
        (changed(mean=torch.zeros(2, 4)), ValueError, r"mean must have the shape \[B, D\+1\] = \[2, 5\]"),
        (changed(mean=torch.zeros(2, 5, dtype=torch.bool)), TypeError, "mean must be float32"),
        (changed(log_std=torch.zeros(4)), ValueError, r"log_std must have the shape \[D\+1\] = \[5\], it was \[4\]"),
        (changed(log_std=torch.zeros(3, 5)), ValueError, r"log_std must have the shape \[B, D\+1\] = \[2, 5\]"),
        (changed(mean=torch.zeros(2, 5, device="meta")), ValueError, "mean must be on the device of prompt, cpu"),
        (changed(noise=torch.zeros(2, 4)), ValueError, r"noise must have the shape \[B, D\+1\]"),
        (changed(noise=torch.zeros(2, 5), seed=1), ValueError, "seed must be None where noise is given, it was 1"),
        (changed(seed=1.0), TypeError, "seed must be an integer, it was 1.0"),
        (changed(seed=-1), ValueError, r"seed must be at least 0, it was -1"),
        (changed(seed=2**63), ValueError, r"seed must be in \[0, 2\^63\)"),
        (changed(delta_scale=0.0), ValueError, "delta_scale must be positive and finite, it was 0.0"),
        (changed(delta_scale=math.inf), ValueError, "delta_scale must be positive and finite, it was inf"),
        (changed(prompt=torch.zeros(4)), ValueError, r"mean must have the shape \[D\+1\] = \[5\], it was \[2, 5\]"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("seeded", [False, True], ids=["noise", "seed"])
@pytest.mark.parametrize("shared", [False, True], ids=["log_std per row", "log_std shared"])
def test_opcheck(shared: bool, seeded: bool, device: str) -> None:
    prompt, mean, log_std = (tensor.detach() for tensor in arguments(3, 5, torch.float32, device, shared).values())
    noise = None if seeded else torch.randn(3, 6, device=device)
    seed = torch.tensor(3) if seeded else None
    torch.library.opcheck(torch.ops.efe.refine_prompt_forward.default, (prompt, mean, log_std, noise, seed, 0.2))
    result = torch.ops.efe.refine_prompt_forward(prompt, mean, log_std, noise, seed, 0.2)
    grads = [torch.randn_like(output) for output in result]
    for needs in ([True, True], [False, True]):
        torch.library.opcheck(
            torch.ops.efe.refine_prompt_backward.default,
            (*grads, result[1], log_std, noise, seed, 0.2, needs),
        )
