"""Every function inside the transforms of torch.func, and with one tensor given twice under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import efe_kernels
from efe_kernels import EFELoss
from efe_kernels.arc_efe import EFELoss as ArcEFELoss

COPIES = 3


@dataclass(frozen=True)
class Case:
    """call: a scalar of the differentiable arguments, whose shapes are `shapes`."""

    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def squares(results: tuple[Tensor, ...]) -> Tensor:
    return sum((result.square().sum() for result in results), torch.zeros(()))


CONSTANT = torch.linspace(-2, 2, 20).sin().view(4, 5)
FLAGS = CONSTANT > 0.9
TARGET = torch.arange(40).view(2, 4, 5) % 10
GRID = torch.linspace(0, 9, 400).cos().view(2, 4, 5, 10)


def every_term(logits: Tensor, preference: Tensor, prompt: Tensor, projection: Tensor) -> Tensor:
    return efe_kernels.efe_loss(
        logits, TARGET, preference, backward_logits=logits.flip(0), final_logits=logits[:, 0],
        observation_probs=logits.softmax(-1), prompt=prompt, projection=projection,
        target_preference=torch.full((4, 5, 10), 0.1), valid=TARGET > 2,
    ).total  # fmt: skip


CASES = {
    "efe_loss": Case(lambda x, p: efe_kernels.efe_loss(x, TARGET, p).total, ((2, 3, 4, 5, 10), (4, 5, 10))),
    "efe_loss, every term": Case(every_term, ((2, 3, 4, 5, 10), (4, 5, 10), (2, 12), (10, 12))),
    "gae": Case(lambda v, n: squares(efe_kernels.gae(CONSTANT, v, n, FLAGS)), ((4, 5), (4, 5))),
    "td_lambda": Case(lambda n: squares((efe_kernels.td_lambda(CONSTANT, n, FLAGS),)), ((4, 5),)),
    "vtrace": Case(lambda v, n: squares(efe_kernels.vtrace(CONSTANT, CONSTANT, v, n, FLAGS)), ((4, 5), (4, 5))),
    "rl_advantage": Case(
        lambda v: squares((efe_kernels.rl_advantage(CONSTANT, v, whiten=True, group_size=10),)), ((4, 5),)
    ),
    "policy_gradient_loss": Case(
        lambda log_prob, v, e: (
            efe_kernels.policy_gradient_loss(log_prob, CONSTANT, v, CONSTANT, e, old_log_prob=CONSTANT).total
        ),
        ((4, 5), (4, 5), (4, 5)),
    ),
    "policy_gradient_loss, every term": Case(
        lambda log_prob, v, e: (
            efe_kernels.policy_gradient_loss(
                log_prob,
                CONSTANT[:, 0],
                v,
                CONSTANT,
                e,
                old_log_prob=CONSTANT,
                old_value=CONSTANT,
                value_clip=0.2,
                ref_log_prob=CONSTANT,
                kl_coef=0.3,
                dual_clip=3.0,
                aggregation="sequence_mean",
                mask=FLAGS,
            ).total
        ),
        ((4, 5), (4, 5), (4, 5)),
    ),
    "policy_gradient_loss of sequences": Case(
        lambda log_prob, e: (
            efe_kernels.policy_gradient_loss(
                log_prob, CONSTANT[:, 0], entropy=e, old_log_prob=CONSTANT, level="sequence", mask=FLAGS
            ).total
        ),
        ((4, 5), (4, 5)),
    ),
    "masked_mean_pool": Case(lambda h: squares((efe_kernels.masked_mean_pool(h, FLAGS),)), ((4, 5, 6),)),
    "refine_prompt": Case(
        lambda p, m, s: squares(efe_kernels.refine_prompt(p, m, s, noise=CONSTANT)), ((4, 4), (4, 5), (5,))
    ),
    "refine_prompt of a seed": Case(
        lambda p, m, s: squares(efe_kernels.refine_prompt(p, m, s, seed=3)), ((4, 4), (4, 5), (5,))
    ),
    "squashed_log_prob": Case(
        lambda u, m, s: squares(efe_kernels.squashed_log_prob(u, m, s)), ((4, 5), (4, 5), (4, 5))
    ),
}


def drop_in() -> ArcEFELoss:
    module = ArcEFELoss(prompt_dim=12)
    module.ensure_preference(4, 5)
    return module


ARC = drop_in()
CASES["arc_efe.EFELoss"] = Case(
    lambda plan, prompt: ARC(
        plan, plan.flip(0), plan, plan.softmax(-1), plan[-1], TARGET[0], 3, prompt, (TARGET[0] > 2).float()
    )["total"],
    ((3, 4, 5, 10), (12,)),
)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def arguments(case: Case) -> list[Tensor]:
    return [torch.randn(COPIES, *shape) for shape in case.shapes]


def one_by_one(case: Case, stacked: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Results and gradients, outside of any transform."""
    leaves = [tensor.detach().requires_grad_() for tensor in stacked]
    results = torch.stack([case.call(*(leaf[i] for leaf in leaves)) for i in range(COPIES)])
    return results.detach(), torch.autograd.grad(results.sum(), leaves)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """A kernel and the reference sum in another order: 64 units in the last place of the largest, in float32."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=64 * 2**-24 * max(1.0, other.abs().max().item()))


@every_case
def test_vmap_gives_results_and_gradients_of_each(case: Case) -> None:
    stacked = arguments(case)
    results, gradients = one_by_one(case, stacked)
    leaves = [tensor.detach().requires_grad_() for tensor in stacked]
    found = vmap(case.call)(*leaves)
    assert_same((found.detach(), *torch.autograd.grad(found.sum(), leaves)), (results, *gradients))


@every_case
def test_grad_and_jacrev_inside_and_outside_of_vmap(case: Case) -> None:
    stacked = arguments(case)
    numbers = tuple(range(len(stacked)))
    _, gradients = one_by_one(case, stacked)
    assert_same(vmap(grad(case.call, argnums=numbers))(*stacked), gradients)
    jacobians = jacrev(vmap(case.call), argnums=numbers)(*stacked)
    diagonal = tuple(torch.stack([jacobian[i, i] for i in range(COPIES)]) for jacobian in jacobians)
    assert_same(diagonal, gradients)


@every_case
def test_vmap_over_one_argument_alone(case: Case) -> None:
    first, *rest = arguments(case)
    shared = [tensor[0] for tensor in rest]
    in_dims = (0,) + (None,) * len(rest)
    found = vmap(grad(case.call), in_dims=in_dims)(first, *shared)
    _, (expected, *_) = one_by_one(case, [first, *(tensor.expand(COPIES, *tensor.shape) for tensor in shared)])
    assert_same((found,), (expected,))


@every_case
def test_jvp_is_the_gradient_along_the_tangent(case: Case) -> None:
    primals = tuple(tensor[0] for tensor in arguments(case))
    tangents = tuple(torch.randn_like(primal) for primal in primals)
    _, found = jvp(case.call, primals, tangents)
    gradients = grad(case.call, argnums=tuple(range(len(primals))))(*primals)
    expected = sum((gradient * tangent).sum() for gradient, tangent in zip(gradients, tangents, strict=True))
    scale = sum((gradient * tangent).abs().sum().item() for gradient, tangent in zip(gradients, tangents, strict=True))
    # PyTorch widens the tangents of some of its own functions.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=64 * 2**-24 * max(1.0, scale))


def test_vmap_of_a_reward() -> None:
    logits = torch.randn(COPIES, 2, 4, 5, 10)
    found = vmap(lambda prediction: efe_kernels.grid_reward(prediction, GRID, TARGET).reward)(logits)
    expected = [efe_kernels.grid_reward(prediction, GRID, TARGET).reward for prediction in logits]
    assert torch.equal(found, torch.stack(expected))


def test_an_ensemble_of_modules() -> None:
    modules = [EFELoss(max_grid_size=5, prompt_dim=12) for _ in range(COPIES)]
    for module in modules:
        torch.nn.init.normal_(module.preference_logits)
    parameters, buffers = stack_module_state(modules)
    logits, prompt = torch.randn(2, 3, 4, 5, 10), torch.randn(2, 12)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        state = {**parameters, **buffers}
        return functional_call(modules[0], state, (logits, TARGET), {"prompt": prompt}).total

    found = vmap(grad(loss))(parameters, buffers)
    for i, module in enumerate(modules):
        expected = torch.autograd.grad(module(logits, TARGET, prompt=prompt).total, list(module.parameters()))
        assert_same(tuple(found[name][i] for name, _ in module.named_parameters()), expected)


X = torch.randn(2, 3, 4, 5, 10)
SEVERAL_TIMES: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "efe_loss": lambda x: (
        efe_kernels.efe_loss(
            x, TARGET, x[0, 0], backward_logits=x, observation_probs=x, target_preference=x[0, 0]
        ).total,
    ),
    "gae": lambda x: efe_kernels.gae(x, x, x, x > 0, x > 0),
    "vtrace": lambda x: efe_kernels.vtrace(x, x, x, x, x > 0),
    "rl_advantage": lambda x: (efe_kernels.rl_advantage(x, x),),
    "policy_gradient_loss": lambda x: (efe_kernels.policy_gradient_loss(x, x, x, x, x, old_log_prob=x).total,),
    "masked_mean_pool": lambda x: (efe_kernels.masked_mean_pool(x[0, 0], x[0, 0, ..., 0]),),
    "refine_prompt": lambda x: tuple(efe_kernels.refine_prompt(x[0, 0, 0][:, 1:], *[x[0, 0, 0]] * 2, noise=x[0, 0, 0])),
    "squashed_log_prob": lambda x: efe_kernels.squashed_log_prob(*[x[0, 0, 0]] * 3),
}


@pytest.mark.parametrize("call", SEVERAL_TIMES.values(), ids=SEVERAL_TIMES.keys())
def test_one_tensor_in_several_places_compiles(call: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    leaf = X.clone().requires_grad_()
    expected, found = call(leaf), torch.compile(call, fullgraph=True, backend="aot_eager")(leaf)
    gradients = [torch.autograd.grad(squares(results), leaf)[0] for results in (expected, found)]
    assert_same((*found, gradients[1]), (*expected, gradients[0]))


@pytest.mark.parametrize("name", ["efe_loss", "gae", "policy_gradient_loss"])
def test_a_transform_inside_of_a_compiled_function(name: str) -> None:
    case = CASES[name]
    stacked = arguments(case)
    results, _ = one_by_one(case, stacked)
    found = torch.compile(lambda *given: vmap(case.call)(*given), fullgraph=True, backend="aot_eager")(*stacked)
    assert_same((found,), (results,))


@pytest.mark.parametrize("setting", ["entropy_coef", "value_coef", "clip", "clip_high"])
def test_a_setting_that_changes_is_compiled_once_and_for_all(setting: str) -> None:
    """torch.compile makes a number symbolic when it meets a second value."""
    torch._dynamo.reset()  # which counts how often one function was compiled, over all tests

    def call(x: Tensor, value: float) -> Tensor:
        return efe_kernels.policy_gradient_loss(x, x, x, x, x, old_log_prob=x, **{setting: value}).total

    compiled, x = torch.compile(call, fullgraph=True, backend="eager"), torch.randn(5)
    for value in (0.1, 0.2, 0.3, 1.0):
        torch.testing.assert_close(compiled(x, value), call(x, value))


def test_a_discount_that_changes_compiles() -> None:
    def call(x: Tensor, gamma: float, scale: float) -> Tensor:
        return efe_kernels.gae(x, x, x, x > 1, gamma=gamma, lam=gamma, reward_scale=scale)[0]

    compiled, x = torch.compile(call, fullgraph=True, backend="eager"), torch.randn(2, 5)
    for value in (0.9, 0.95, 0.99, 1.0):
        torch.testing.assert_close(compiled(x, value, 5 * value), call(x, value, 5 * value))
