from __future__ import annotations

import copy
import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.ops.arc_efe_definition import definition
from efe_kernels.arc_efe import EFELoss
from efe_kernels.arc_efe.ops import arc_efe

CASES = sorted((Path(__file__).parents[1] / "data" / "arc_efe").glob("*.npz"))
PLAN = ("forward_predictions", "backward_predictions", "state_predictions", "observation_probs", "final_prediction")
LOSSES = (
    *("inference_risk", "risk", "ambiguity", "efe", "step_penalty", "grid_norm", "grid_matching", "consistency"),
    *("bidirectional", "z_anchoring", "prompt_consistency", "total"),
)
# What ARC-EFE projects require of a replacement, relative to the loss and to max|gradient|.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def wired(forward: Tensor) -> tuple[Tensor, ...]:
    return forward, forward.flip(0), forward, forward.softmax(-1), forward[-1]


def gradients(module: EFELoss, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    (preference,) = module.preference_embeddings.values()
    parameters = {
        "preference_param": preference,
        "projector_weight": module.prompt_projector.weight,
        "projector_bias": module.prompt_projector.bias,
    }
    return {name: leaf.grad for name, leaf in (leaves | parameters).items()}


def assert_close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().item()
    error = (found.detach().double().cpu() - expected.cpu()).abs().max().item()
    assert error <= tolerance * scale, f"{name}: off by {error:.3g} where the largest is {scale:.3g}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prefix", ["f64p", "wired"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_losses_and_gradients_are_those_of_the_original(
    path: Path, prefix: str, dtype: torch.dtype, device: str
) -> None:
    case = np.load(path)
    meta = json.loads(str(case["meta_json"]))
    key = f"{meta['H']}x{meta['W']}"

    def read(name: str) -> Tensor | None:
        return torch.tensor(case[name], dtype=dtype, device=device) if name in case.files else None

    prompt_dim = case["projector_weight"].shape[1]
    module = EFELoss(**meta["lambdas"], max_grid_size=meta["max_grid_size"], prompt_dim=prompt_dim).to(device, dtype)
    parameters = {f"preference_embeddings.{key}": "preference_param"}
    parameters |= {f"prompt_projector.{name}": f"projector_{name}" for name in ("weight", "bias")}
    module.load_state_dict(module.state_dict() | {name: read(stored) for name, stored in parameters.items()})
    if "target_preference" in case.files:
        module.target_preferences_dict[key] = read("target_preference")
    names = [name for name in (*PLAN, "prompt_embedding") if name in case.files]
    leaves = {name: read(name).requires_grad_() for name in names}
    plan = [leaves[name] for name in PLAN] if prefix == "f64p" else wired(leaves["forward_predictions"])
    target = torch.tensor(case["target_outcome"], device=device)

    losses = module(*plan, target, meta["episode_length"], leaves.get("prompt_embedding"), read("grid_mask"))
    losses["total"].backward()

    assert tuple(losses) == LOSSES
    for name, loss in losses.items():
        assert loss.dtype == dtype
        assert_close(name, loss, torch.tensor(case[f"{prefix}_loss_{name}"]), TOLERANCE[dtype])
    for name, gradient in gradients(module, leaves).items():
        stored = f"{prefix}_grad_{name}"
        if stored not in case.files:
            assert gradient is None, name
        elif name == "state_predictions":
            assert not gradient.any()
        else:
            assert_close(f"gradient of {name}", gradient, torch.tensor(case[stored]), TOLERANCE[dtype])


class Puzzle:
    """Random arguments of a call, and a module for them, in float64 on the CPU."""

    def __init__(
        self,
        steps: int = 3,
        height: int = 5,
        width: int = 4,
        colors: int = 10,
        prompt: int | None = 6,
        mask: Tensor | None = None,
        anchored: bool = True,
        max_grid_size: int = 30,
        logits: Callable[..., Tensor] = torch.randn,
    ) -> None:
        shape = (steps, height, width, colors)
        self.leaves = {
            "forward": 2 * logits(*shape, dtype=torch.float64),
            "backward": 2 * logits(*shape, dtype=torch.float64),
            "state": torch.randn(shape, dtype=torch.float64),
            "observation": (4 * torch.randn(shape, dtype=torch.float64)).softmax(-1),
            "final": torch.randn(shape[1:], dtype=torch.float64),
        }
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self.target = torch.randint(colors, (height, width))
        self.episode_length = steps + 2
        self.prompt = None if prompt is None else torch.randn(prompt, dtype=torch.float64, requires_grad=True)
        self.mask = mask
        lambdas = {"lambda_risk": 0.7, "lambda_amb": 1.3, "lambda_cons": 2.0, "lambda_grid_norm": 0.3}
        dim = 256 if prompt is None else prompt
        self.module = EFELoss(**lambdas, max_grid_size=max_grid_size, num_colors=colors, prompt_dim=dim).double()
        torch.nn.init.normal_(self.module.ensure_preference(height, width))
        if anchored:
            self.module.update_target_preference([self.target], [(height, width)], 0.5)

    def arguments(self, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Any]:
        plan = [convert(leaf) for leaf in self.leaves.values()]
        prompt = None if self.prompt is None else convert(self.prompt)
        return [*plan, self.target, self.episode_length, prompt, self.mask]

    def losses(self) -> dict[str, Tensor]:
        return self.module(*self.arguments())

    def defined(self) -> dict[str, Tensor]:
        forward, backward, _, *rest = self.arguments()
        return definition(self.module, forward, backward, *rest)

    def gradients_of(self, loss: Tensor) -> dict[str, Tensor | None]:
        everything = self.leaves | dict(self.module.named_parameters())
        if self.prompt is not None:
            everything["prompt"] = self.prompt
        found = torch.autograd.grad(loss, list(everything.values()), allow_unused=True, retain_graph=True)
        return dict(zip(everything, found, strict=True))


def ragged(height: int = 5, width: int = 4) -> Tensor:
    mask = torch.ones(height, width, dtype=torch.float64)
    mask[:, -1] = 0
    mask[0, 0] = 0
    return mask


def colours_with_ties(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(3, shape).to(dtype)


UNUSUAL = {
    "ordinary": {},
    "ragged": {"mask": ragged()},
    "boolean mask": {"mask": ragged().bool()},
    "weighted mask": {"mask": ragged() * 0.5},
    "mask of ones": {"mask": torch.ones(5, 4)},
    "mask of zeros": {"mask": torch.zeros(5, 4, dtype=torch.float64)},
    "one step": {"steps": 1},
    "even steps": {"steps": 4, "mask": ragged()},
    "1x1": {"height": 1, "width": 1},
    "2x2": {"height": 2, "width": 2},
    "row": {"height": 1, "width": 9},
    "column": {"height": 7, "width": 2},
    "no prompt": {"prompt": None},
    "no prompt, no anchor": {"prompt": None, "anchored": False},
    "prompt of C": {"prompt": 10},
    "long prompt": {"prompt": 40},
    "four colours": {"colors": 4, "prompt": 6},
    "four colours, short prompt": {"colors": 4, "prompt": 3},
    "grid as large as allowed": {"max_grid_size": 5},
    "grid larger than allowed": {"max_grid_size": 3},
    "equal logits": {"logits": colours_with_ties, "mask": ragged()},
    "saturated": {"logits": lambda *shape, dtype: 40 * torch.randn(shape, dtype=dtype)},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_every_loss_and_its_gradients_are_those_of_the_definition(name: str) -> None:
    puzzle = Puzzle(**UNUSUAL[name])
    losses, defined = puzzle.losses(), puzzle.defined()
    # Both are in float64 and differ by the order of sums.
    for loss in LOSSES:
        torch.testing.assert_close(losses[loss], defined[loss], rtol=1e-11, atol=1e-14)
        if not losses[loss].requires_grad:
            continue
        found = puzzle.gradients_of(losses[loss])
        expected = puzzle.gradients_of(defined[loss]) if defined[loss].requires_grad else {}
        for leaf, gradient in found.items():
            wanted = expected.get(leaf)
            if gradient is None:
                assert wanted is None, f"{loss}, {leaf}"
            else:
                difference = gradient if wanted is None else gradient - wanted
                scale = 0.0 if wanted is None else wanted.abs().max().item()
                assert difference.abs().max().item() <= 1e-11 * scale + 1e-16, f"{loss}, {leaf}"


@pytest.mark.parametrize("mask", [None, ragged(4, 3), ragged(4, 3) * 0.5], ids=["none", "ragged", "weighted"])
def test_closed_form_gradient(mask: Tensor | None) -> None:
    shape = (3, 4, 3, 4)
    plan = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    observation = torch.randn(shape, dtype=torch.float64).softmax(-1).requires_grad_()
    preference = torch.randn(4, 4, 3, dtype=torch.float64).softmax(0).requires_grad_()

    def terms(forward: Tensor, backward: Tensor, observation: Tensor, preference: Tensor) -> tuple[Tensor, ...]:
        # Not the mean logits: a finite difference drowns in the fill of masked cells.
        return arc_efe(forward, backward, forward.detach(), observation, preference, mask)[:4]

    assert torch.autograd.gradcheck(terms, (*plan, observation, preference))


def test_a_sure_observation_has_the_gradient_of_its_entropy() -> None:
    """Also with a torch whose own clamp passes none at its ends."""
    shape = (2, 3, 4, 3)
    observation = torch.eye(3, dtype=torch.float64)[torch.randint(3, shape[:3])].requires_grad_()
    plan, preference = torch.zeros(2, *shape, dtype=torch.float64), torch.full((3, 3, 4), 1 / 3, dtype=torch.float64)
    for terms in (arc_efe, arc_efe.plain):
        ambiguity = terms(*plan, plan[0], observation, preference, None)[2]
        (gradient,) = torch.autograd.grad(ambiguity, observation)
        assert torch.equal(gradient, -observation.detach())


def test_nothing_under_a_masked_cell_matters() -> None:
    puzzle = Puzzle(mask=ragged())
    outside = puzzle.mask == 0
    expected = puzzle.losses()
    poisoned = Puzzle(mask=ragged())
    poisoned.module, poisoned.prompt = puzzle.module, puzzle.prompt
    poisoned.target = torch.where(outside, 99, puzzle.target)
    for name, leaf in puzzle.leaves.items():
        # The observation is not masked: its entropy counts everywhere.
        filled = leaf if name == "observation" else torch.where(outside[..., None], torch.nan, leaf)
        poisoned.leaves[name] = filled.detach().requires_grad_()
    losses = poisoned.losses()
    assert losses["total"] == expected["total"]
    for name, gradient in poisoned.gradients_of(losses["total"]).items():
        assert gradient is None or gradient.isfinite().all(), name
        if name in ("forward", "backward", "final"):
            assert not gradient[..., outside, :].any(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, device: str) -> None:
    puzzle = Puzzle(mask=ragged())
    puzzle.module.to(device, torch.float32)
    puzzle.target, puzzle.mask = puzzle.target.to(device), puzzle.mask.to(device)
    results = []
    for computed in (dtype, torch.float32):
        plan = [leaf.detach().to(device, dtype).to(computed).requires_grad_() for leaf in puzzle.arguments()[:5]]
        prompt = puzzle.prompt.detach().to(device, dtype).to(computed).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            losses = puzzle.module(*plan, puzzle.target, 3, prompt, puzzle.mask)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        results.append((losses, torch.autograd.grad(losses["total"], [*plan, prompt])))
    (losses, rounded), (exact_losses, exact) = results
    assert losses == exact_losses
    for gradient, wanted in zip(rounded, exact, strict=True):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, wanted.to(dtype))


def test_almost_sure_predictions_keep_their_loss_in_float32() -> None:
    """The cross-entropy of such cells is 1e-7 or less: a float32 log_softmax rounds it away."""
    final = torch.zeros(2, 2, 10)
    final[..., 3] = 18.0
    puzzle = Puzzle(steps=1, height=2, width=2)
    puzzle.module.float()
    plan = [leaf.detach().float() for leaf in puzzle.leaves.values()]
    losses = puzzle.module(*plan[:4], final, torch.full((2, 2), 3), 1)
    expected = torch.nn.functional.cross_entropy(final.double().view(4, 10), torch.full((4,), 3))
    torch.testing.assert_close(losses["grid_matching"].double(), expected, rtol=1e-6, atol=0)


def test_only_the_requested_gradients_are_computed() -> None:
    puzzle = Puzzle()
    for name in ("forward", "state", "final"):
        puzzle.leaves[name].requires_grad_(False)
    puzzle.losses()["total"].backward()
    given = {name for name, leaf in puzzle.leaves.items() if leaf.grad is not None}
    assert given == {"backward", "observation"}


def test_two_runs_give_the_same_bits_and_leave_the_arguments_alone(device: str) -> None:
    puzzle = Puzzle(mask=ragged().to(device), steps=4)
    puzzle.module.to(device, torch.float32)
    arguments = puzzle.arguments(lambda tensor: tensor.detach().to(device, torch.float32).requires_grad_())
    arguments[5] = puzzle.target.to(device)
    leaves = [*arguments[:5], arguments[7]]
    before = [leaf.detach().clone() for leaf in leaves]
    losses = puzzle.module(*arguments)
    first = torch.autograd.grad(losses["total"], leaves, retain_graph=True)
    again = torch.autograd.grad(losses["total"], leaves)
    rerun = puzzle.module(*arguments)
    assert rerun == losses
    for one, two, three in zip(first, again, torch.autograd.grad(rerun["total"], leaves), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    for leaf, old in zip(leaves, before, strict=True):
        assert torch.equal(leaf, old)


def test_second_derivatives_say_that_there_are_none() -> None:
    puzzle = Puzzle()
    forward = puzzle.leaves["forward"]
    (gradient,) = torch.autograd.grad(puzzle.losses()["risk"], forward, create_graph=True)
    with pytest.raises(RuntimeError, match=r"arc_efe\.EFELoss has no second derivative"):
        gradient.sum().backward()


@pytest.mark.usefixtures("served_by")
def test_compiles_in_one_graph() -> None:
    puzzle = Puzzle(mask=ragged())
    expected = puzzle.losses()
    found = torch.compile(puzzle.module, fullgraph=True, backend="aot_eager")(*puzzle.arguments())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    forward = puzzle.leaves["forward"]
    gradients = (torch.autograd.grad(losses["total"], forward)[0] for losses in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("mask", [None, ragged()], ids=["no mask", "mask"])
def test_nothing_waits_for_the_device(mask: Tensor | None) -> None:
    """A meta tensor has no values, so whatever would read one on the host raises."""
    puzzle = Puzzle(mask=mask)
    puzzle.module.to("meta")
    arguments = puzzle.arguments(lambda tensor: tensor.detach().to("meta").requires_grad_())
    arguments[5] = puzzle.target.to("meta")
    arguments[8] = None if mask is None else mask.to("meta")
    puzzle.module(*arguments)["total"].backward()
    assert arguments[0].grad.shape == puzzle.leaves["forward"].shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mask", [None, ragged()], ids=["no mask", "mask"])
def test_cuda_graph_capture(mask: Tensor | None) -> None:
    puzzle = Puzzle(mask=None if mask is None else mask.cuda())
    puzzle.module.cuda()
    arguments = [value.detach().cuda() if isinstance(value, Tensor) else value for value in puzzle.arguments()]
    arguments[0].requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = torch.autograd.grad(puzzle.module(*arguments)["total"], arguments[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = torch.autograd.grad(puzzle.module(*arguments)["total"], arguments[0])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0], expected[0])


# In the order of an optimizer's state and of a checkpoint of the class that is replaced.
PARAMETERS = (
    "prompt_projector.weight",
    "prompt_projector.bias",
    *(f"prompt_preference_mapper.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")),
)
BUFFERS = ("target_preferences_initialized", "ema_success_rate")


def test_state_is_that_of_the_original() -> None:
    module = EFELoss(prompt_dim=6)
    assert tuple(module.state_dict()) == (*BUFFERS, *PARAMETERS)
    assert [tuple(value.shape) for value in module.state_dict().values()] == [
        (), (), (10, 6), (10,), (128, 6), (128,), (128, 128), (128,),
    ]  # fmt: skip
    module.ensure_preference(3, 12)
    module.update_target_preference([torch.zeros(3, 12, dtype=torch.int64)], [(3, 12)], 1.0)
    assert tuple(name for name, _ in module.named_parameters()) == ("preference_embeddings.3x12", *PARAMETERS)
    assert module.state_dict()["preference_embeddings.3x12"].shape == (3, 12, 10)
    assert not module.target_preferences_initialized
    assert (module.ema_decay, module.inference_first_threshold, module.grid_match_history) == (0.99, 0.7, {})


def test_random_numbers_after_the_constructor_are_those_after_the_original() -> None:
    """It draws the projector, then the mapper."""
    torch.manual_seed(3)
    module = EFELoss(prompt_dim=6)
    found = torch.rand(1)
    torch.manual_seed(3)
    linears = [torch.nn.Linear(6, 10), torch.nn.Linear(6, 128), torch.nn.Linear(128, 128)]
    assert torch.equal(found, torch.rand(1))
    owned = (module.prompt_projector, module.prompt_preference_mapper[0], module.prompt_preference_mapper[2])
    for layer, expected in zip(owned, linears, strict=True):
        assert torch.equal(layer.weight, expected.weight)


def test_the_threshold_of_inference_risk_can_be_set() -> None:
    puzzle = Puzzle()
    confidence = puzzle.leaves["forward"].softmax(-1).amax(-1).mean(0)
    for threshold in (0.0, 0.4, 0.7, 1.0):
        puzzle.module.inference_first_threshold = threshold
        unsure = (confidence <= threshold).double().mean().item()
        assert puzzle.losses()["inference_risk"].item() == pytest.approx(unsure)


def test_a_mask_between_0_and_1_counts_whole_cells_in_inference_risk() -> None:
    puzzle = Puzzle(mask=torch.full((5, 4), 0.5, dtype=torch.float64))
    puzzle.module.inference_first_threshold = 1.0
    assert puzzle.losses()["inference_risk"].item() == pytest.approx(1)


def test_a_preference_that_appears_in_training_is_told() -> None:
    puzzle = Puzzle()
    module = puzzle.module = EFELoss(prompt_dim=6).double()
    with pytest.warns(UserWarning, match=r"5x4 .* ensure_preference\(5, 4\)") as caught:
        puzzle.losses()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        puzzle.losses()
        del module.preference_embeddings["5x4"]
        with torch.no_grad():
            puzzle.losses()


def test_compiles_with_one_tensor_as_state_and_forward_plan() -> None:
    """As a project calls it: the state is the forward plan, and everything else is made of it."""
    puzzle = Puzzle(mask=ragged())
    state = puzzle.leaves["forward"]

    def loss(state: Tensor) -> Tensor:
        rest = (puzzle.target, 3, puzzle.prompt, puzzle.mask)
        return puzzle.module(state, state, state, state.softmax(-1), state[-1], *rest)["total"]

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(state)
    torch.testing.assert_close(found, loss(state), rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, state)[0] for value in (found, loss(state)))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_of_unseen_sizes_loads(assign: bool) -> None:
    saved = torch.nn.Sequential(EFELoss(prompt_dim=8))
    for size in ((3, 12), (30, 30)):
        saved[0].ensure_preference(*size)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded = torch.nn.Sequential(EFELoss(prompt_dim=8))
    owned = loaded[0].ensure_preference(3, 12)
    loaded.load_state_dict(torch.load(file), assign=assign)
    assert set(loaded.state_dict()) == set(saved.state_dict())
    for name, value in saved.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    if not assign:
        assert loaded[0].preference_embeddings["3x12"] is owned


def test_state_dict_that_does_not_fit_is_refused() -> None:
    state = EFELoss().state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for preference_embeddings\.3x4"):
        EFELoss().load_state_dict(state | {"preference_embeddings.3x4": torch.zeros(4, 3, 10)})
    with pytest.raises(RuntimeError, match="Unexpected"):
        EFELoss().load_state_dict(state | {"preference_embeddings.other": torch.zeros(4, 3, 10)})


def test_training_moves_the_preferences_that_the_optimizer_owns() -> None:
    module = EFELoss(prompt_dim=8)
    preference = module.ensure_preference(5, 4)
    planner = torch.nn.Linear(10, 10)
    optimizer = torch.optim.Adam([*module.parameters(), *planner.parameters()], lr=0.05)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    state, target, prompt = torch.randn(3, 5, 4, 10), torch.randint(10, (5, 4)), torch.randn(8)
    history = []
    for _ in range(10):
        losses = module(*wired(planner(state)), target, 3, prompt)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        history.append(losses["total"].item())
    assert module.preference_embeddings["5x4"] is preference
    assert history[-1] < history[0]
    for name in ("preference_embeddings.5x4", "prompt_projector.weight", "prompt_projector.bias"):
        assert not torch.equal(module.state_dict()[name], start[name]), name


def test_preferences_made_in_inference_mode_can_be_trained() -> None:
    puzzle = Puzzle()
    module = EFELoss(prompt_dim=6).double()
    puzzle.module = module
    with torch.inference_mode():
        puzzle.losses()
    puzzle.losses()["total"].backward()
    assert module.preference_embeddings["5x4"].grad.any()


def test_running_preference_is_that_of_the_original() -> None:
    """In the stored cases two outcomes made it: the target and, at success rate 0.6, a grid that differs somewhere."""
    for path in CASES:
        case = np.load(path)
        if "target_preference" not in case.files:
            continue
        stored = torch.tensor(case["target_preference"])
        first = torch.tensor(case["target_outcome"])
        moved = (stored - 0.14).abs() < 1e-3
        second = torch.where(moved.any(-1), moved.long().argmax(-1), first)
        module = EFELoss()
        size = tuple(first.shape)
        for outcome in (first, second):
            module.update_target_preference([outcome], [size], 0.6)
        running = module.target_preferences_dict[f"{size[0]}x{size[1]}"]
        torch.testing.assert_close(running, stored, rtol=2e-7, atol=0)


def test_outcomes_of_one_size_move_the_preference_once_toward_their_mean() -> None:
    module = EFELoss(num_colors=3)
    size = (1, 2)
    grids = [torch.tensor([[0, 1]]), torch.tensor([[0, 2]])]
    module.update_target_preference([*grids, torch.tensor([[2]])], [size, size, (1, 1)])
    mean = torch.tensor([[[1, 0, 0], [0, 0.5, 0.5]]])
    running = module.target_preferences_dict
    torch.testing.assert_close(running["1x2"], mean, atol=2e-8, rtol=1e-6)
    assert module.ema_success_rate.item() == pytest.approx(0.5)
    module.update_target_preference([grids[0], grids[0]], [size, size], 1.0)
    moved = 0.8 * mean + 0.2 * torch.tensor([[[1, 0, 0], [0, 1.0, 0]]])
    torch.testing.assert_close(running["1x2"], moved, atol=2e-8, rtol=1e-6)
    assert module.ema_success_rate.item() == pytest.approx(0.99 * 0.5 + 0.01)


def test_sizes_and_rates_may_be_tensors() -> None:
    module = EFELoss()
    module.update_target_preference([torch.zeros(3, 4, dtype=torch.int64)], torch.tensor([[3, 4]]), torch.tensor(0.5))
    assert set(module.target_preferences_dict) == {"3x4"}


@pytest.mark.parametrize(
    ("outcomes", "sizes", "message"),
    [
        (None, [], "successful_outcomes must be a list, it was NoneType"),
        ([], None, "grid_sizes must be a list, it was NoneType"),
        ([torch.zeros(3, 3, dtype=torch.int64)], [3], r"grid_sizes must hold pairs \(H, W\) of integers, it held 3"),
        ([torch.zeros(3, 3, dtype=torch.int64)], [(3.0, 3.0)], r"grid_sizes must hold pairs \(H, W\) of integers"),
        ([None], [(3, 3)], "successful_outcomes must hold grids of integers, it held NoneType"),
    ],
)
def test_what_is_no_list_of_grids_is_named(outcomes: Any, sizes: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        EFELoss().update_target_preference(outcomes, sizes, 0.5)


@pytest.mark.parametrize(
    "settings", [{"lambda_risk": "x"}, {"num_colors": 0}, {"max_grid_size": 1.5}, {"prompt_dim": None}], ids=str
)
def test_a_setting_that_cannot_be_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(settings))} must be"):
        EFELoss(**settings)


def test_without_outcomes_nothing_changes() -> None:
    module = EFELoss()
    module.update_target_preference([], [], 1.0)
    assert not module.target_preferences_dict
    assert module.ema_success_rate == 0.5


def test_running_preference_reads_padded_grids_and_keeps_sizes_apart() -> None:
    module = EFELoss(num_colors=3)
    padded = torch.tensor([[1, 2, 0], [0, 0, 0]])
    module.update_target_preference([padded, torch.tensor([[2]])], [(1, 2), (1, 1)], 0.0)
    module.update_target_preference([torch.tensor([[1, 1]])], [(1, 2)], 1.0)
    running = module.target_preferences_dict
    assert set(running) == {"1x2", "1x1"}
    torch.testing.assert_close(running["1x2"], torch.tensor([[[0, 1, 0], [0, 0.2, 0.8]]]), atol=2e-8, rtol=1e-6)


def test_running_preference_follows_the_module() -> None:
    module = EFELoss()
    module.update_target_preference([torch.tensor([[2]])], [(1, 1)], 0.5)
    held = module.target_preferences_dict
    assert copy.deepcopy(module).double().target_preferences_dict["1x1"].dtype == torch.float64
    assert held["1x1"].dtype == torch.float32
    module.to("meta")
    assert held is module.target_preferences_dict
    assert held["1x1"].device.type == "meta"


@pytest.mark.parametrize(
    ("outcomes", "sizes", "error", "message"),
    [
        (
            [torch.zeros(2, 2, dtype=torch.int64)],
            [],
            ValueError,
            r"grid_sizes must have one \(H, W\) for each of the 2",
        ),
        ([torch.full((2, 2), 10)], [(2, 2)], ValueError, r"successful_outcomes must hold colours in \[0, 10\)"),
        ([torch.zeros(2, 2)], [(2, 2)], TypeError, "successful_outcomes must have an integer dtype"),
        (
            [torch.zeros(2, 2, dtype=torch.int64)],
            [(2, 3)],
            ValueError,
            r"successful_outcomes must have the shape \[H, W\]",
        ),
    ],
)
def test_update_target_preference_errors(
    outcomes: list[Tensor], sizes: list[tuple[int, int]], error: type[Exception], message: str
) -> None:
    module = EFELoss()
    with pytest.raises(error, match=message):
        module.update_target_preference([torch.zeros(3, 3, dtype=torch.int64), *outcomes], [(3, 3), *sizes], 0.9)
    assert not module.target_preferences_dict
    assert module.ema_success_rate == 0.5


@pytest.mark.parametrize("rate", [math.nan, math.inf, 95, -1, None, "0.5", torch.tensor([0.5, 0.5])])
def test_a_success_rate_out_of_range_is_named(rate: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="success_rate must be"):
        EFELoss().update_target_preference([torch.zeros(1, 1, dtype=torch.int64)], [(1, 1)], rate)


WRONG: dict[str, tuple[int, Any, type[Exception], str]] = {
    "plan without steps": (
        0,
        torch.zeros(5, 4, 10),
        ValueError,
        r"forward_predictions must have the shape \[T, H, W, C\]",
    ),
    "other number of colours": (0, torch.zeros(3, 5, 4, 9), ValueError, r"forward_predictions .* \[3, 5, 4, 10\]"),
    "integer plan": (0, torch.zeros(3, 5, 4, 10).long(), TypeError, "forward_predictions must be float32"),
    "other backward": (1, torch.zeros(2, 5, 4, 10), ValueError, r"backward_predictions .* \[3, 5, 4, 10\]"),
    "other state": (2, torch.zeros(3, 5, 4), ValueError, "state_predictions must have the shape"),
    "other observation": (3, torch.zeros(3, 4, 5, 10), ValueError, "observation_probs must have the shape"),
    "other final": (4, torch.zeros(3, 5, 4, 10), ValueError, "final_prediction must have the shape"),
    "floating target": (5, torch.zeros(5, 4), TypeError, "target_outcome must have an integer dtype"),
    "other target": (5, torch.zeros(4, 5).long(), ValueError, "target_outcome must have the shape"),
    "other prompt": (
        7,
        torch.zeros(7),
        ValueError,
        r"prompt_embedding must have the shape \[6\] or \[10\], it was \[7\]",
    ),
    "other mask": (8, torch.ones(5, 5), ValueError, "grid_mask must have the shape"),
    "length of nothing": (6, None, TypeError, "episode_length must be a number"),
    "endless": (6, math.nan, ValueError, "episode_length must be finite"),
    "complex mask": (
        8,
        torch.ones(5, 4, dtype=torch.complex64),
        TypeError,
        "grid_mask must be bool, integer or floating",
    ),
    "other device": (
        1,
        torch.zeros(3, 5, 4, 10, device="meta"),
        ValueError,
        "backward_predictions must be on the device",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_argument_errors(name: str) -> None:
    position, value, error, message = WRONG[name]
    puzzle = Puzzle(mask=ragged())
    arguments = puzzle.arguments()
    arguments[position] = value
    with pytest.raises(error, match=message):
        puzzle.module(*arguments)


def test_module_on_another_device_is_named() -> None:
    puzzle = Puzzle()
    puzzle.module.to("meta")
    with pytest.raises(ValueError, match="the parameters of EFELoss must be on the device of forward_predictions, cpu"):
        puzzle.losses()


def test_names_of_arguments_are_those_of_the_original() -> None:
    puzzle = Puzzle(mask=ragged())
    names = (*PLAN, "target_outcome", "episode_length", "prompt_embedding", "grid_mask")
    losses = puzzle.module(**dict(zip(names, puzzle.arguments(), strict=True)))
    assert losses == puzzle.losses()


def test_a_setting_of_numpy_is_a_float() -> None:
    """Which does not take the losses of a plan in float64 to its own precision."""
    module = EFELoss(lambda_step=np.float32(0.3))
    assert type(module.lambda_step) is float


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4)])
def test_a_plan_of_nothing_is_named(shape: tuple[int, int, int]) -> None:
    plans, final = torch.zeros(*shape, 10), torch.zeros(*shape[1:], 10)
    with pytest.raises(ValueError, match="forward_predictions must have at least 1 step and 1 cell"):
        EFELoss()(plans, plans, plans, plans, final, torch.zeros(shape[1:], dtype=torch.int64), 3)


@pytest.mark.parametrize("size", [(0, 3), (3, -1), ("3", 3)])
def test_a_preference_of_no_size_is_named(size: tuple[Any, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^(height|width) must be "):
        EFELoss().ensure_preference(*size)
