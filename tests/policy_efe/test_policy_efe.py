"""policy_efe and rollout_states: against pymdp, against their definitions state by state, and in their limits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from efe_kernels import policy_efe, rollout_states

POLICIES, STEPS, STATES, ACTIONS = 5, 3, 4, 2


def distributions(*shape: int, dim: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).mul(2).softmax(dim)


def world(outcomes: tuple[int, ...], *, per_step: bool = False) -> dict[str, Any]:
    """A random world: what the functions take, float64."""
    preference = [(one, STEPS)[::-1] if per_step else (one,) for one in outcomes]
    return {
        "initial": distributions(STATES),
        "transition": distributions(STATES, STATES, ACTIONS),
        "policies": torch.randint(ACTIONS, (POLICIES, STEPS)),
        "likelihood": [distributions(one, STATES) for one in outcomes],
        "preference_logits": [torch.randn(shape, dtype=torch.float64) for shape in preference],
    }


def efe_of(world: dict[str, Any]) -> Any:
    states = rollout_states(world["initial"], world["transition"], world["policies"])
    return policy_efe(states, world["likelihood"], world["preference_logits"])


@pytest.mark.parametrize("per_step", [False, True], ids=["one preference", "a preference per step"])
@pytest.mark.parametrize("outcomes", [(3,), (2, 3), (3, 2, 4)], ids=str)
def test_the_numbers_are_those_of_pymdp(outcomes: tuple[int, ...], per_step: bool) -> None:
    control = pytest.importorskip("pymdp.control", reason='pymdp is not installed: ".[bench]"')
    arguments = world(outcomes, per_step=per_step)
    found = efe_of(arguments)

    def objects(tensors: list[Tensor]) -> Any:
        array = np.empty(len(tensors), dtype=object)
        for index, tensor in enumerate(tensors):
            array[index] = tensor.numpy()
        return array

    likelihood, transition = objects(arguments["likelihood"]), objects([arguments["transition"]])
    preference = objects([wish.T if per_step else wish for wish in arguments["preference_logits"]])
    policies = [policy[:, None].numpy() for policy in arguments["policies"]]
    _, negative = control.update_posterior_policies(
        objects([arguments["initial"]]), likelihood, transition, preference, policies
    )
    # pymdp takes log(p + e^-16), which moves p log p by at most e^-16: three sums of them, over the joint outcomes.
    off = 3 * STEPS * math.prod(outcomes) * math.exp(-16)
    torch.testing.assert_close(found.efe, -torch.as_tensor(negative), rtol=0, atol=off)
    for index, policy in enumerate(policies):
        states = control.get_expected_states(objects([arguments["initial"]]), transition, policy)
        utility = control.calc_expected_utility(control.get_expected_obs(states, likelihood), preference)
        gain = control.calc_states_info_gain(likelihood, states)
        assert found.utility[index].item() == pytest.approx(utility, abs=off)
        assert found.information_gain[index].item() == pytest.approx(gain, abs=off)


def test_every_part_is_its_definition() -> None:
    """Two modalities, their outcomes and the states one by one."""
    arguments = world((2, 3))
    found = efe_of(arguments)
    states = rollout_states(arguments["initial"], arguments["transition"], arguments["policies"])
    first, second = arguments["likelihood"]
    wishes = [logits.softmax(0) for logits in arguments["preference_logits"]]
    risk, ambiguity, gain = (torch.zeros(POLICIES, dtype=torch.float64) for _ in range(3))
    for policy, step in itertools.product(range(POLICIES), range(STEPS)):
        prior = states[policy, step]
        for i, j in itertools.product(range(2), range(3)):
            given = first[i] * second[j]  # [S]
            observed = (given * prior).sum()
            risk[policy] += observed * (observed / (wishes[0][i] * wishes[1][j])).log()
            ambiguity[policy] -= (prior * given * given.log()).sum()
            gain[policy] += (prior * given * (given / observed).log()).sum()
    for part, expected in {"risk": risk, "ambiguity": ambiguity, "information_gain": gain}.items():
        torch.testing.assert_close(getattr(found, part), expected)
    torch.testing.assert_close(found.efe, risk + ambiguity)
    torch.testing.assert_close(found.efe, -(found.utility + gain))


def test_a_policy_leads_where_its_actions_lead() -> None:
    """Action 0 stays, action 1 moves on to the next of four states."""
    transition = torch.stack([torch.eye(4), torch.eye(4).roll(1, 0)], -1)
    states = rollout_states(torch.eye(4)[0], transition, torch.tensor([[1, 1, 0], [0, 0, 1]]))
    assert states.argmax(-1).tolist() == [[1, 2, 2], [0, 0, 1]]
    assert (states.amax(-1) == 1).all()


def test_batches_of_beliefs_are_each_as_alone() -> None:
    arguments = world((3,))
    beliefs = distributions(2, 3, STATES, dim=-1)
    states = rollout_states(beliefs, arguments["transition"], arguments["policies"])
    assert states.shape == (2, 3, POLICIES, STEPS, STATES)
    together = policy_efe(states, arguments["likelihood"], arguments["preference_logits"])
    for place in itertools.product(range(2), range(3)):
        alone = efe_of({**arguments, "initial": beliefs[place]})
        for part, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(part[place], expected)


def test_a_policy_without_steps_costs_nothing() -> None:
    arguments = world((3,))
    states = rollout_states(arguments["initial"], arguments["transition"], torch.empty(POLICIES, 0, dtype=torch.long))
    assert states.shape == (POLICIES, 0, STATES)
    assert all((part == 0).all() for part in policy_efe(states, arguments["likelihood"], [torch.zeros(3)]))
    with torch.no_grad():
        belief = arguments["initial"].detach().requires_grad_()
        none = rollout_states(belief, arguments["transition"], torch.empty(POLICIES, 0, dtype=torch.long))
    assert not none.requires_grad


def test_certain_worlds_have_finite_gradients() -> None:
    """Probabilities of 0 and 1, as in most worlds that are written by hand."""
    states = torch.eye(3)[None, :2].requires_grad_()
    likelihood = torch.eye(3).requires_grad_()
    found = policy_efe(states, likelihood, torch.tensor([2.0, 0.0, -1.0]))
    assert found.ambiguity.item() == found.information_gain.item() == 0
    found.efe.sum().backward()
    assert states.grad is not None and states.grad.isfinite().all()
    assert likelihood.grad is not None and likelihood.grad.isfinite().all()


def test_a_forbidden_outcome_forbids_the_policies_that_may_meet_it() -> None:
    states = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]], requires_grad=True)  # two policies of one step
    found = policy_efe(states, torch.eye(2), torch.tensor([0.0, -math.inf]))
    assert found.efe.tolist() == [0, math.inf]
    assert found.utility.tolist() == [0, -math.inf]
    (gradient,) = torch.autograd.grad(found.efe[0], states)
    assert gradient[0].isfinite().all()


def test_gradients_are_those_of_finite_differences() -> None:
    arguments = world((2, 3), per_step=True)
    leaves = [arguments["initial"], arguments["transition"], *arguments["likelihood"], *arguments["preference_logits"]]

    def efe(initial: Tensor, transition: Tensor, *tensors: Tensor) -> Tensor:
        states = rollout_states(initial, transition, arguments["policies"])
        return policy_efe(states, tensors[:2], tensors[2:]).efe

    assert torch.autograd.gradcheck(efe, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    states, likelihood = distributions(2, 3, 4, dim=-1).to(dtype), distributions(5, 4).to(dtype)
    logits = torch.randn(5).to(dtype)
    for part, expected in zip(
        policy_efe(states, likelihood, logits),
        policy_efe(states.float(), likelihood.float(), logits.float()),
        strict=True,
    ):
        assert part.dtype == torch.float32
        assert torch.equal(part, expected)


def test_autocast_changes_nothing() -> None:
    arguments = {name: to_float32(value) for name, value in world((2, 3)).items()}
    expected = efe_of(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = efe_of(arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_torch_compile_traces_it_whole() -> None:
    arguments = {name: to_float32(value) for name, value in world((2, 3)).items()}
    found = torch.compile(efe_of, fullgraph=True, backend="aot_eager")(arguments)
    torch.testing.assert_close(tuple(found), tuple(efe_of(arguments)))


def test_shapes_are_told_without_data() -> None:
    states = rollout_states(*(torch.empty(shape, device="meta") for shape in ((4,), (4, 4, 2))),
                            torch.empty(3, 2, dtype=torch.long, device="meta"))  # fmt: skip
    assert states.shape == (3, 2, 4)
    assert policy_efe(states, torch.empty(5, 4, device="meta"), torch.empty(5, device="meta")).efe.shape == (3,)


def to_float32(value: Any) -> Any:
    if isinstance(value, list):
        return [to_float32(one) for one in value]
    return value.float() if value.is_floating_point() else value


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"likelihood": torch.ones(3, 5)}, ValueError, r"likelihood\[0\] must have the shape \[O, S\] = "),
        ({"preference_logits": torch.ones(4)}, ValueError, r"preference_logits\[0\] must have the shape \[O\] = \[3\]"),
        ({"preference_logits": torch.ones(2, 3)}, ValueError, r"preference_logits\[0\] must have the shape \[T, O\]"),
        ({"preference_logits": torch.ones(3).long()}, TypeError, r"preference_logits\[0\] must be float32"),
        ({"likelihood": [torch.ones(3, 4)] * 2}, ValueError, "as many of one as of the other, they were 2 and 1"),
        ({"likelihood": [], "preference_logits": []}, ValueError, "they were 0 and 0"),
        ({"state_probs": torch.ones(2, 4)}, ValueError, r"state_probs must have the shape \[..., P, T, S\]"),
        ({"likelihood": [None]}, TypeError, r"likelihood\[0\] must be a tensor, it was NoneType"),
        ({"likelihood": None}, TypeError, "likelihood must be a tensor or a sequence of tensors, it was NoneType"),
        ({"preference_logits": [3.0]}, TypeError, r"preference_logits\[0\] must be a tensor, it was float"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], error: type[Exception], told: str) -> None:
    arguments = {
        "state_probs": torch.ones(1, 3, 4), "likelihood": torch.ones(3, 4), "preference_logits": torch.ones(3)
    }  # fmt: skip
    with pytest.raises(error, match=told):
        policy_efe(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"initial": torch.ones(())}, ValueError, r"initial must have the shape \[..., S\]"),
        ({"transition": torch.ones(4, 3, 2)}, ValueError, r"transition must have the shape \[S, S, A\]"),
        ({"policies": torch.zeros(3, dtype=torch.long)}, ValueError, r"policies must have the shape \[P, T\]"),
        ({"policies": torch.zeros(3, 2)}, TypeError, "policies must have an integer dtype"),
    ],
)
def test_a_wrong_argument_of_a_rollout_is_named(change: dict[str, Any], error: type[Exception], told: str) -> None:
    arguments = {
        "initial": torch.ones(4), "transition": torch.ones(4, 4, 2), "policies": torch.zeros(3, 2, dtype=torch.long)
    }  # fmt: skip
    with pytest.raises(error, match=told):
        rollout_states(**{**arguments, **change})
