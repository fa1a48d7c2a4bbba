"""`efe_loss` on whatever serves the device: C++ on the CPU, Triton on CUDA and under TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from efe_kernels import EFEWeights, efe_loss
from efe_kernels.common.library import INTERPRET
from efe_kernels.efe_loss import reference
from efe_kernels.efe_loss.reference import Inputs, Settings
from tests.efe_loss.cases import WEIGHTS, Case, in_double, run

# Largest error over the largest value of the tensor. float32: sums of 10^3 addends rounded at 2^-24 each. Half
# precision: one rounding of a result that was computed in float32, which Triton's interpreter does by truncation.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SMALLEST_HALF = 2**-24

CASES = {
    "plan read backwards": Case(),
    "even steps": Case(steps=4),
    "one step, one cell": Case(batch=1, steps=1, height=1, width=1),
    "no options": Case(prompt=False, anchor=False, valid=False),
    "two plans": Case(steps=3, backward=True),
    "everything": Case(steps=2, backward=True, final=True, observation=True, preference_per_episode=True),
    "observations of a plan read backwards": Case(steps=3, observation=True, final=True),
    "prompt scales the preference only": Case(steps=2, projection=False),
    "channel-last": Case(steps=3, height=7, width=13, layout="channel-last"),
    "odd strides": Case(steps=3, layout="strided"),
    "few outcomes": Case(steps=2, outcomes=3),
    "tail of a tile": Case(batch=1, steps=2, height=17, width=19),
}


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (actual.cpu().double() - expected).abs().max().item()
    # No smaller than float32 can tell at the magnitude of the addends, which is about 1.
    scale = max(expected.abs().max().item(), 1e-3 if actual.dtype == torch.float32 else 0.0)
    floor = SMALLEST_HALF if actual.dtype == torch.float16 else 0.0
    assert error <= tolerance * scale + floor, f"{name}: error {error:.2e}, largest value {scale:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_reference_in_double(case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = case.inputs(dtype, device)
    output, gradients = run(inputs, use_terms=True)
    expected, expected_gradients = run(in_double(inputs), use_terms=True)
    fp32 = TOLERANCE[torch.float32]
    for name, term in output.terms.items():
        assert term.dtype == torch.float32
        assert_close(name, term, expected.terms[name], fp32)
    assert_close("total", output.total, expected.total, fp32)
    assert_close("mask_ratio", output.mask_ratio, expected.mask_ratio, fp32)
    assert_close("hard_cell_scale", output.hard_cell_scale, expected.hard_cell_scale, fp32)
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        assert_close(name, gradient, expected_gradients[name], TOLERANCE[gradient.dtype])


def errors(
    case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[float, float, float]]:
    """Of the total and of each gradient: our largest error, that of plain PyTorch in the inputs' own dtype, and a
    rounding of the largest result.
    """
    inputs = case.inputs(dtype, device)
    preference = inputs["preference_logits"].detach()[: case.height, : case.width]
    inputs["preference_logits"] = preference.clone().requires_grad_()
    arguments = Inputs(*(inputs.get(name) for name in Inputs._fields))
    settings = Settings([*vars(WEIGHTS).values()], True, 0.0, 900, -100, "none")
    names = [name for name, value in inputs.items() if value.requires_grad]
    leaves = [inputs[name] for name in names]
    with monkeypatch.context() as patch:
        patch.setattr(reference, "accumulate_dtype", lambda tensor: tensor.dtype)
        patch.setattr(reference, "LOWEST_LOGIT", torch.finfo(dtype).min)
        plain, *_ = reference.efe_loss(arguments, settings)
        plain_gradients = torch.autograd.grad(plain.sum(), leaves)
    total = efe_loss(**inputs, weights=WEIGHTS, reduction="none").total
    gradients = torch.autograd.grad(total.sum(), leaves)
    doubles = in_double(inputs)
    expected = efe_loss(**doubles, weights=WEIGHTS, reduction="none").total
    expected_gradients = torch.autograd.grad(expected.sum(), [doubles[name] for name in names])
    compared = zip(
        ["total", *names],
        [total, *gradients],
        [plain, *plain_gradients],
        [expected, *expected_gradients],
        strict=True,
    )

    def largest(x: Tensor) -> float:
        return x.abs().max().item()

    return {
        name: (
            largest(ours.cpu().double() - exact),
            largest(other.cpu().double() - exact),
            torch.finfo(ours.dtype).eps * largest(exact),
        )
        for name, ours, other, exact in compared
    }


@pytest.mark.parametrize("outcomes", [10, 300, 3200])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_error_budget(dtype: torch.dtype, outcomes: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from float64 than plain PyTorch is that computes in the inputs' own dtype, up to a rounding.

    Over several draws: in one alone, either of the two is the better by chance.
    """
    side = 4 if outcomes == 10 else 2
    case = Case(
        backward=True,
        observation=True,
        anchor=False,
        outcomes=outcomes,
        prompt_dim=outcomes + 6,
        height=side,
        width=side,
    )
    draws = [errors(replace(case, seed=seed), dtype, device, monkeypatch) for seed in range(2 if INTERPRET else 4)]
    for name in draws[0]:
        error, allowed, rounding = map(max, zip(*(draw[name] for draw in draws), strict=True))
        # The interpreter has no fused multiply-add: it rounds twice where the GPU rounds once.
        rounding *= 2 if INTERPRET else 1
        assert error <= allowed + rounding, f"{name}: {error:.2e}, plain PyTorch {allowed:.2e}"


@pytest.mark.skipif(INTERPRET, reason="only the C++ kernels have threads")
@pytest.mark.parametrize("threads", [2, 3, 4])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    inputs = Case(batch=70, prompt_dim=200).inputs()
    leaves = [value for value in inputs.values() if value.requires_grad]
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            total = efe_loss(**inputs, weights=WEIGHTS).total
            found.append((total.detach(), *torch.autograd.grad(total, leaves)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_half_precision_gradients_survive_a_large_mean(device: str) -> None:
    """With a loss scale, float16 gradients of a mean over very many cells do not flush to zero on the way."""
    inputs = Case(batch=4, height=7, width=13, prompt=False, anchor=False).inputs(torch.float16, device)
    share, scale = 2.0**-18, 2.0**16  # as if the mean were over 2^18 times as many episodes
    (gradient,) = torch.autograd.grad(efe_loss(**inputs).total * share * scale, inputs["logits"])
    doubles = in_double(inputs)
    (expected,) = torch.autograd.grad(efe_loss(**doubles).total * share * scale, doubles["logits"])
    assert (gradient.cpu() != 0)[expected.abs() > 2 * SMALLEST_HALF].all()
    assert (expected.abs() / scale).max() < SMALLEST_HALF  # without the scale none of them would exist


def test_more_episodes_than_chunks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a shared preference adds several episodes per chunk, and the last chunk is not full.

    One preference per episode is not shared, even where all of them lie in the same memory.
    """
    launch = pytest.importorskip("efe_kernels.efe_loss.launch")
    monkeypatch.setattr(launch, "MAX_CHUNKS", 2)
    monkeypatch.setattr(launch, "LAYOUTS", {})
    inputs = Case(batch=5, steps=2, height=2, width=3).inputs(device=device)
    each = inputs["preference_logits"].detach().expand(5, -1, -1, -1).requires_grad_()
    for preference in (inputs["preference_logits"], each):
        inputs["preference_logits"] = preference
        _, gradients = run(inputs)
        _, expected = run(in_double(inputs))
        for name, gradient in gradients.items():
            assert_close(name, gradient, expected[name], TOLERANCE[torch.float32])


def test_many_episodes_read_a_copy_of_what_they_share(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as from the preferences where they lie."""
    launch = pytest.importorskip("efe_kernels.efe_loss.launch")
    inputs = Case(anchor=True).inputs(device=device)
    expected, expected_gradients = run(inputs)
    monkeypatch.setattr(launch, "MANY_EPISODES", 1)
    monkeypatch.setattr(launch, "LAYOUTS", {})
    output, gradients = run(inputs)
    torch.testing.assert_close(output.total, expected.total, rtol=0, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_channel_last_plans_of_16_bits_may_lie_anywhere(dtype: torch.dtype, device: str) -> None:
    """Two outcomes are read and written as one word where they are aligned so, else one by one: to the same bits."""
    inputs = Case(layout="channel-last").inputs(dtype, device)
    expected, expected_gradients = run(inputs)
    for name, gradient in run(in_double(inputs))[1].items():
        assert_close(name, expected_gradients[name], gradient, TOLERANCE[dtype])
    memory = torch.empty(inputs["logits"].numel() + 1, dtype=dtype, device=device)
    moved = memory[1:].view_as(inputs["logits"]).copy_(inputs["logits"].detach())
    output, gradients = run(inputs | {"logits": moved.detach().requires_grad_()})
    torch.testing.assert_close(output.total, expected.total, rtol=0, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_lies_under_invalid_cells_is_harmless(value: float, device: str) -> None:
    case = Case(steps=3, backward=True, final=True, observation=True)
    inputs = case.inputs(device=device)
    clean, clean_gradients = run(inputs)
    counted = inputs["valid"] & (inputs["target"] != -100)
    dirty = dict(inputs)
    for name in ("logits", "backward_logits", "final_logits", "observation_probs"):
        cells = counted[:, None, ..., None] if inputs[name].dim() == 5 else counted[..., None]
        dirty[name] = torch.where(cells, inputs[name].detach(), value).requires_grad_()
    output, gradients = run(dirty)
    torch.testing.assert_close(output.total, clean.total, rtol=0, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, clean_gradients[name], rtol=0, atol=0)
        if name in ("logits", "backward_logits", "observation_probs"):
            assert (gradient.movedim(1, 0)[:, ~counted] == 0).all()


def test_episode_without_a_counted_cell(device: str) -> None:
    inputs = Case(steps=3).inputs(device=device)
    inputs["valid"][1] = False
    output, gradients = run(inputs)
    assert output.total[1] == 0
    assert all(term[1] == 0 for term in output.terms.values())
    assert output.mask_ratio[1] == 0
    assert (gradients["logits"][1] == 0).all() and (gradients["prompt"][1] == 0).all()
    assert (gradients["logits"][0] != 0).any()


def test_extreme_logits(device: str) -> None:
    """Logits of 1e4 and -inf: finite, and as exact as float32 is."""
    case = Case(steps=3, anchor=False)
    inputs = case.inputs(device=device)
    with torch.no_grad():
        inputs["logits"][0] = inputs["logits"][0].sign() * 1e4
        inputs["logits"][1, ..., 1] = float("-inf")
        inputs["target"][1] = torch.where(inputs["target"][1] == 1, 2, inputs["target"][1])
    output, gradients = run(inputs)
    expected, expected_gradients = run(in_double(inputs))
    for name, term in output.terms.items():
        assert_close(name, term, expected.terms[name], TOLERANCE[torch.float32])
    for name, gradient in gradients.items():
        assert_close(name, gradient, expected_gradients[name], TOLERANCE[torch.float32])
    assert (gradients["logits"][1, ..., 1] == 0).all()


def test_impossible_target_costs_infinity(device: str) -> None:
    inputs = Case(valid=False).inputs(device=device)
    inputs["target"][0, 1, 1] = 3
    with torch.no_grad():
        inputs["logits"][0, -1, 1, 1, 3] = float("-inf")
    output, _ = run(inputs)
    assert output.terms["consistency"][0] == float("inf")
    assert output.terms["consistency"][1].isfinite()


def test_nan_in_a_counted_cell_is_not_hidden(device: str) -> None:
    inputs = Case(valid=False).inputs(device=device)
    with torch.no_grad():
        inputs["logits"][0, 0, 1, 1, 3] = float("nan")
    output, _ = run(inputs)
    assert output.total[0].isnan() and output.total[1].isfinite()


def test_flat_plan_has_a_finite_gradient(device: str) -> None:
    """Equal logits have no direction: the cosine of the prompt term is 0 there, and so is its gradient."""
    inputs = Case(steps=2, anchor=False).inputs(device=device)
    inputs["logits"] = torch.zeros_like(inputs["logits"]).requires_grad_()
    output, gradients = run(inputs)
    assert (output.terms["prompt"] == 0).all()
    assert gradients["logits"].isfinite().all() and gradients["logits"].abs().max() < 10


def test_only_requested_gradients(device: str) -> None:
    inputs = Case(steps=2, backward=True).inputs(device=device)
    for name, value in inputs.items():
        if value.requires_grad:
            alone = {key: other.detach() for key, other in inputs.items()}
            alone[name] = value
            _, gradients = run(alone)
            assert list(gradients) == [name]
            torch.testing.assert_close(gradients[name], run(inputs)[1][name], rtol=0, atol=0)
    output = efe_loss(**{name: value.detach() for name, value in inputs.items()})
    assert not output.total.requires_grad


def test_same_bits_and_untouched_inputs(device: str) -> None:
    inputs = Case().inputs(device=device)
    before = {name: value.detach().clone() for name, value in inputs.items()}
    first, first_gradients = run(inputs)
    second, second_gradients = run(inputs)
    assert torch.equal(first.total, second.total)
    assert all(torch.equal(gradient, second_gradients[name]) for name, gradient in first_gradients.items())
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())


def test_gradients_keep_the_memory_order(device: str) -> None:
    """Also where it is not the default one: torch.compile relies on what the fake kernels say of it."""
    inputs = Case().inputs(device=device)
    for name in ("prompt", "projection"):
        transposed = inputs[name].detach().transpose(0, 1).contiguous().transpose(0, 1)
        inputs[name] = transposed.requires_grad_()
    _, gradients = run(inputs)
    for name in ("logits", "prompt", "projection"):
        assert gradients[name].stride() == inputs[name].stride(), name


def test_autocast_around_backward_changes_nothing(device: str) -> None:
    inputs = Case(steps=2).inputs(device=device)
    _, expected = run(inputs)
    with torch.autocast(device, torch.bfloat16):
        _, gradients = run(inputs)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def test_preference_under_invalid_cells_is_harmless(device: str) -> None:
    inputs = Case(steps=2, preference_per_episode=True).inputs(device=device)
    _, expected = run(inputs)
    counted = inputs["valid"] & (inputs["target"] != -100)
    preference = inputs["preference_logits"].detach().clone()
    preference[:, : counted.shape[1], : counted.shape[2]][~counted] = float("nan")
    _, gradients = run({**inputs, "preference_logits": preference.requires_grad_()})
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_integer_targets_of_any_dtype(dtype: torch.dtype, device: str) -> None:
    inputs = Case(steps=2).inputs(device=device)
    ignored = inputs["target"] == -100
    inputs["valid"] = inputs["valid"] & ~ignored
    inputs["target"] = torch.where(ignored, 0, inputs["target"])
    expected, _ = run(inputs)
    output, _ = run({**inputs, "target": inputs["target"].to(dtype)})
    assert torch.equal(output.total, expected.total)


def test_unbatched_equals_a_batch_of_one(device: str) -> None:
    inputs = Case(batch=1, backward=True, final=True, observation=True).inputs(device=device)
    expected, expected_gradients = run(inputs)
    shared = ("preference_logits", "projection", "target_preference")
    alone = {name: value if name in shared else value.detach()[0] for name, value in inputs.items()}
    alone["logits"].requires_grad_()
    output = efe_loss(**alone, weights=EFEWeights(ambiguity=0.7))
    assert output.total.shape == output.mask_ratio.shape == output.terms["risk"].shape == ()
    torch.testing.assert_close(output.total, expected.total[0], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(output.total, alone["logits"])
    torch.testing.assert_close(gradient, expected_gradients["logits"][0] / 0.5, rtol=1e-6, atol=1e-9)


def test_reductions(device: str) -> None:
    inputs = Case(batch=3, steps=2).inputs(device=device)
    each = efe_loss(**inputs, reduction="none").total
    assert each.shape == (3,)
    torch.testing.assert_close(efe_loss(**inputs).total, each.mean())
    torch.testing.assert_close(efe_loss(**inputs, reduction="sum").total, each.sum())


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("batch", [1, 2])
def test_the_total_may_be_changed_in_place(batch: int, device: str) -> None:
    """As by a loop that divides it by the number of parts of a batch."""
    inputs = Case(batch=batch, steps=2).inputs(device=device)
    (expected,) = torch.autograd.grad(efe_loss(**inputs).total, inputs["logits"])
    total = efe_loss(**inputs).total
    total /= 4
    (gradient,) = torch.autograd.grad(total, inputs["logits"])
    torch.testing.assert_close(gradient, expected / 4, rtol=1e-6, atol=0)
    with torch.no_grad():
        total = efe_loss(**inputs).total
    total += inputs["preference_logits"].sum()


def test_hard_cell_scale(device: str) -> None:
    inputs = Case(steps=2).inputs(device=device)
    output = efe_loss(**inputs, reduction="none")
    torch.testing.assert_close(output.hard_cell_scale, 0.5 + 0.5 * output.mask_ratio)
    off = efe_loss(**inputs, reduction="none", hard_cell=False)
    assert (off.hard_cell_scale == 1).all()
    torch.testing.assert_close(off.total * output.hard_cell_scale, output.total)
    below = efe_loss(**inputs, reduction="none", hard_cell_min_ratio=1.1)
    assert (below.hard_cell_scale == 1).all()


def leaves_of(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in inputs.values() if value.requires_grad]


def test_hooks_may_lay_out_saved_tensors_anew(device: str) -> None:
    """As `torch.autograd.graph.save_on_cpu` does, which keeps no strides."""
    inputs = Case(batch=3, steps=2, height=8, width=10, projection=False).inputs(device=device)
    doubles = in_double(inputs)
    expected = torch.autograd.grad(efe_loss(**doubles, reduction="sum").total, leaves_of(doubles))
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda tensor: tensor):
        total = efe_loss(**inputs, reduction="sum").total
        gradients = torch.autograd.grad(total, leaves_of(inputs))
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_close("gradient", gradient, wanted, TOLERANCE[torch.float32])


def test_weight_of_zero_removes_a_term(device: str) -> None:
    """Even one that is infinite."""
    inputs = Case(valid=False).inputs(device=device)
    inputs["target"][:] = 3
    with torch.no_grad():
        inputs["logits"][..., 3] = float("-inf")
    output, gradients = run(inputs, weights=EFEWeights(consistency=0.0))
    assert output.terms["consistency"].isinf().all()
    assert output.total.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_compiles_without_a_graph_break(device: str) -> None:
    inputs = Case(steps=3).inputs(device=device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kwargs: efe_loss(**kwargs).total, fullgraph=True, backend="aot_eager")
    expected = efe_loss(**inputs).total
    total = compiled(**inputs)
    torch.testing.assert_close(total, expected, rtol=0, atol=0)
    leaves = leaves_of(inputs)
    gradients, expected_gradients = (torch.autograd.grad(value, leaves) for value in (total, expected))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)


@pytest.mark.skipif(INTERPRET, reason="Triton's interpreter reads tensors that opcheck replaces by fake ones")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ops_are_declared_truthfully(batch: int, reduction: str, device: str) -> None:
    forward, backward = torch.ops.efe.efe_loss_forward.default, torch.ops.efe.efe_loss_backward.default
    case = Case(batch=batch, steps=3, backward=True, final=True, observation=True)
    inputs = {name: value.detach() for name, value in case.inputs(device=device).items()}
    inputs["preference_logits"] = inputs["preference_logits"][: case.height, : case.width]
    arguments = [inputs[name] for name in Inputs._fields]
    settings = ([1.0, 0.5, 2.0, 0.5, 0.2, 0.3, 0.1], True, 0.0, 900, -100, reduction)
    torch.library.opcheck(forward, (*arguments, *settings))
    total, terms, _, scale, saved = forward(*arguments, *settings)
    needs = [True] * 7
    upstream = (torch.ones_like(total), torch.ones_like(terms))
    torch.library.opcheck(backward, (*upstream, *arguments, *settings, scale, saved, needs))


def test_second_derivative_is_refused(device: str) -> None:
    inputs = Case(steps=2, projection=False).inputs(device=device)
    total = efe_loss(**inputs).total
    (gradient,) = torch.autograd.grad(total, inputs["logits"], create_graph=True)
    with pytest.raises(RuntimeError, match="efe_loss has no second derivative"):
        gradient.sum().backward()


WRONG = {
    "logits of integers": (lambda i: {"logits": i["logits"].detach().long()}, TypeError, "logits must be float32"),
    "logits of 3 dimensions": (
        lambda i: {"logits": i["logits"][0, 0]},
        ValueError,
        r"logits must have the shape \[B, T, H, W, C\] or \[T, H, W, C\]",
    ),
    "NaN target": (
        lambda i: {"target": i["target"] * float("nan")},
        TypeError,
        "target must have an integer dtype, it was torch.float32",
    ),
    "target of another size": (
        lambda i: {"target": i["target"][:, :-1]},
        ValueError,
        r"target must have the shape \[B, H, W\] = \[2, 4, 5\]",
    ),
    "valid of integers": (lambda i: {"valid": i["valid"].int()}, TypeError, "valid must be a bool tensor"),
    "preference too small": (
        lambda i: {"preference_logits": i["preference_logits"][:2]},
        ValueError,
        "preference_logits must cover a grid of 4 x 5",
    ),
    "preference of other outcomes": (
        lambda i: {"preference_logits": i["preference_logits"][..., :4]},
        ValueError,
        "preference_logits must have the shape",
    ),
    "plans of different length": (
        lambda i: {"backward_logits": i["logits"][:, :1]},
        ValueError,
        "backward_logits must have the shape",
    ),
    "final of a plan": (lambda i: {"final_logits": i["logits"]}, ValueError, "final_logits must have the shape"),
    "short prompt": (lambda i: {"prompt": i["prompt"][:, :4]}, ValueError, "prompt must have D >= C = 10 dimensions"),
    "projection transposed": (
        lambda i: {"projection": i["projection"].T},
        ValueError,
        "projection must have the shape",
    ),
    "target elsewhere": (
        lambda i: {"target": i["target"].to("meta")},
        ValueError,
        "target must be on the device of logits",
    ),
    "unknown reduction": (
        lambda i: {"reduction": "average"},
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none'",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(change, error, message, device: str) -> None:  # type: ignore[no-untyped-def]
    inputs = Case().inputs(device=device)
    with pytest.raises(error, match=message):
        efe_loss(**{**inputs, **change(inputs)})


@pytest.mark.parametrize("value", [10, -1, 300])
def test_target_out_of_range(value: int, device: str) -> None:
    inputs = Case(valid=False).inputs(device=device)
    inputs["target"][1, 2, 3] = value
    if device == "cpu" and not INTERPRET:
        with pytest.raises(ValueError, match=rf"target must be in \[0, 10\) .* it was {value}"):
            efe_loss(**inputs)
    else:
        total = efe_loss(**inputs, reduction="none").total
        assert total[1].isnan() and total[0].isfinite()


@pytest.mark.usefixtures("served_by")
def test_nan_beside_the_target_is_not_hidden(device: str) -> None:
    """Where the consistency alone reads it, and the target's own logit is finite."""
    inputs = Case(valid=False, final=True).inputs(device=device)
    with torch.no_grad():
        inputs["target"][0, 1, 1] = 4
        inputs["final_logits"][0, 1, 1, 3] = float("nan")
    output, _ = run(inputs)
    assert output.total[0].isnan() and output.terms["consistency"][0].isnan()
    assert output.total[1].isfinite()


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("outcomes", [3, 10])
def test_the_most_probable_outcome_is_the_first_of_the_largest_and_never_nan(outcomes: int, device: str) -> None:
    lowest = torch.finfo(torch.float32).min
    values = torch.tensor([lowest, -torch.inf, torch.nan, 0.0, 1.0, 1.0, torch.inf], device=device)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (20, 20, outcomes), generator=generator)
    chosen[:7] = torch.arange(7)[:, None, None]  # rows of one value alone
    chosen[7:10, :, 1:] = 1  # one value among impossible outcomes
    final = values[chosen.to(device)][None]
    target = torch.randint(outcomes, (1, 20, 20), generator=generator).to(device)
    expected = (final.nan_to_num(-torch.inf, torch.inf, lowest).where(~final.isneginf(), -torch.inf)).argmax(-1)
    grid = torch.zeros(20, 20, outcomes, device=device)
    output = efe_loss(grid.expand(1, 2, -1, -1, -1), target, grid, final_logits=final, reduction="none")
    assert output.mask_ratio == (expected != target).float().mean()


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("steps", [1, 3])
def test_nan_in_the_middle_step_is_not_hidden(steps: int, device: str) -> None:
    """Which a plan that is read backwards compares with itself."""
    inputs = Case(valid=False, steps=steps, prompt=False, anchor=False).inputs(device=device)
    with torch.no_grad():
        inputs["logits"][0, steps // 2, 1, 1, 3] = float("nan")
    output, _ = run(inputs, weights=EFEWeights(risk=0, consistency=0, anchor=0, prompt=0, step=0))
    assert output.total[0].isnan() and output.total[1].isfinite()


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize(("name", "term"), [("logits", "prompt"), ("target_preference", "anchor")])
def test_nan_is_not_hidden_from_the_only_term_that_counts(name: str, term: str, device: str) -> None:
    inputs = Case(valid=False).inputs(device=device)
    with torch.no_grad():
        inputs[name][..., 1, 1, 3] = float("nan")
    weights = {each: float(each == term) for each in vars(WEIGHTS)}
    output, _ = run(inputs, weights=EFEWeights(**weights))
    assert output.total.isnan().all() and output.terms[term].isnan().all()


@pytest.mark.usefixtures("served_by")
def test_nan_of_one_plan_reaches_the_gradient_of_the_other(device: str) -> None:
    inputs = Case(valid=False, backward=True, steps=2, prompt=False, anchor=False).inputs(device=device)
    with torch.no_grad():
        inputs["backward_logits"][0, 0, 1, 1, 3] = float("nan")
    _, gradients = run(inputs)
    broken = gradients["logits"].isnan()
    assert broken[0, 0, 1, 1].all() and broken.sum() == 10


@pytest.mark.usefixtures("served_by")
def test_a_prompt_of_nan_reaches_no_cell_that_does_not_count(device: str) -> None:
    inputs = Case(preference_per_episode=True, anchor=False).inputs(device=device)
    with torch.no_grad():
        inputs["prompt"][0, 2] = float("nan")
    _, gradients = run(inputs)
    gradient = gradients["preference_logits"][:, :4, :5]
    assert (gradient[~inputs["valid"]] == 0).all() and gradient[0].isnan().any() and gradient[1].isfinite().all()


@pytest.mark.usefixtures("served_by")
def test_what_all_outcomes_of_a_cell_share_is_no_direction(device: str) -> None:
    inputs = Case(valid=False).inputs(device=device)
    expected = run(inputs)[0].terms["prompt"]
    with torch.no_grad():
        inputs["logits"][:, :, 0, 0] = 3e4  # beyond the range that is read
    left_out = run(inputs)[0].terms["prompt"]
    with torch.no_grad():
        inputs["logits"][:, :, 0, 0] = 0
    assert_close("prompt", left_out, run(inputs)[0].terms["prompt"], TOLERANCE[torch.float32])
    assert not torch.equal(left_out, expected)


@pytest.mark.usefixtures("served_by")
def test_the_length_of_a_prompt_is_no_direction(device: str) -> None:
    inputs = Case(valid=False, anchor=False).inputs(device=device)
    expected, gradients = run(inputs)
    with torch.no_grad():
        inputs["projection"] *= 2.0**120
    output, longer = run(inputs)
    assert_close("prompt", output.terms["prompt"], expected.terms["prompt"].double().cpu(), TOLERANCE[torch.float32])
    assert_close("logits", longer["logits"], gradients["logits"].double().cpu(), TOLERANCE[torch.float32])


@pytest.mark.usefixtures("served_by")
def test_an_episode_without_a_counted_cell_reads_no_prompt(device: str) -> None:
    inputs = Case(steps=3, backward=True).inputs(device=device)
    inputs["valid"][1] = False
    with torch.no_grad():
        inputs["prompt"][1, -1] = float("nan")
        inputs["prompt"][1, 0] = float("inf")
    output, gradients = run(inputs)
    assert output.total[1] == 0 and all(term[1] == 0 for term in output.terms.values())
    for name in ("logits", "backward_logits", "prompt"):
        assert (gradients[name][1] == 0).all(), name


@pytest.mark.usefixtures("served_by")
def test_a_target_preference_is_not_read_where_no_cell_counts(device: str) -> None:
    inputs = Case(steps=3).inputs(device=device)
    inputs["valid"][:, 1, 2] = False
    inputs["target_preference"][1, 2] = float("nan")
    output, gradients = run(inputs)
    assert output.total.isfinite().all()
    assert gradients["prompt"].isfinite().all()
    assert (gradients["preference_logits"][1, 2] == 0).all() and gradients["preference_logits"].isfinite().all()


@pytest.mark.usefixtures("served_by")
def test_nan_is_never_the_most_probable_outcome(device: str) -> None:
    inputs = Case(valid=False, final=True).inputs(device=device)
    with torch.no_grad():
        inputs["final_logits"].copy_(torch.nn.functional.one_hot(inputs["target"].clamp_min(0), 10))
        other = (inputs["target"][0, 1, 1] + 1) % 10
        inputs["final_logits"][0, 1, 1, other] = float("nan")
    output, _ = run(inputs)
    assert (output.mask_ratio == 0).all()


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_more_outcomes_than_a_narrow_target_can_hold(dtype: torch.dtype, device: str) -> None:
    logits, target = torch.randn(1, 2, 2, 2, 300, device=device), torch.full((1, 2, 2), 100, device=device)
    preference = torch.zeros(2, 2, 300, device=device)
    found, expected = (efe_loss(logits, one, preference).total for one in (target.to(dtype), target))
    assert torch.equal(found, expected)
