from __future__ import annotations

import pytest
import torch

from efe_kernels import squashed_log_prob
from efe_train.config import NUM_COLORS, PROMPT_DIM
from efe_train.data import Example, collate
from efe_train.facts import NUM_FEATURES
from efe_train.policy import NUM_CONTROLS, Policy, Rollout, policy_state

STATE = PROMPT_DIM + NUM_CONTROLS + NUM_FEATURES


def rollout(policy: Policy, state: torch.Tensor, seed: int = 0) -> Rollout:
    refined = policy.refine_prompt(state[:, :PROMPT_DIM], state, seed)
    return Rollout(state, refined.action, torch.randn(len(state)))


def adam(policy: Policy, learning_rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(policy.parameters(), lr=learning_rate)


@pytest.mark.parametrize("part", ["body", "mean", "log_std", "value"])
def test_every_part_of_the_policy_learns(part: str) -> None:
    policy = Policy()
    before = {name: parameter.detach().clone() for name, parameter in getattr(policy, part).named_parameters()}
    policy.update(rollout(policy, torch.randn(6, STATE)), adam(policy))
    for name, parameter in getattr(policy, part).named_parameters():
        assert (parameter != before[name]).any(), f"{part}.{name} did not move"


def test_the_policy_comes_to_prefer_what_is_rewarded() -> None:
    """A bandit: a blend α above one half is rewarded, one below it is punished."""
    policy = Policy()
    optimizer = adam(policy, 3e-3)
    state = torch.randn(64, STATE)
    start = policy(state).mean[:, -1].mean().item()
    for seed in range(60):
        refined = policy.refine_prompt(state[:, :PROMPT_DIM], state, seed)
        reward = torch.where(refined.action[:, -1] > 0, 0.2, -0.2)
        policy.update(Rollout(state, refined.action, reward), optimizer)
    mean, _, value = policy(state)
    assert mean[:, -1].mean().item() > start + 0.5
    # tanh(5 * 0.2) = 0.76 is the value of always being rewarded
    assert 0.3 < value.mean().item() < 0.9


def test_the_policy_finds_the_best_refinement_of_a_bandit() -> None:
    """The reward falls with the squared distance of Δ from a target that the policy never sees."""
    dimension, delta_scale = 2, 0.2
    target = torch.tensor([0.12, -0.08])
    policy = Policy(prompt_dim=dimension, hidden=16)
    optimizer = adam(policy, 1e-2)
    state = torch.randn(1, dimension + NUM_CONTROLS + NUM_FEATURES).expand(256, -1)

    def distance() -> float:
        best = delta_scale * torch.tanh(policy(state[:1]).mean[0, :dimension])
        return (best - target).norm().item()

    begun = distance()
    for seed in range(300):
        action = policy.refine_prompt(state[:, :dimension], state, seed).action
        delta = delta_scale * torch.tanh(action[:, :dimension])
        policy.update(Rollout(state, action, -10 * (delta - target).square().sum(1)), optimizer)
    # From across the range of Δ, which is [-0.2, 0.2], to a fortieth of it.
    assert begun > 0.1
    assert distance() < 0.01


def test_the_stored_action_has_the_probability_with_which_it_was_drawn() -> None:
    policy = Policy()
    state = torch.randn(5, STATE)
    refined = policy.refine_prompt(state[:, :PROMPT_DIM], state, seed=3)
    mean, log_std, _ = policy(state)
    log_prob, _ = squashed_log_prob(refined.action, mean, log_std)
    # a sum of 257 terms of a few nats each, in float32
    torch.testing.assert_close(log_prob, refined.log_prob, rtol=1e-5, atol=1e-3)


def test_a_refinement_passes_gradients_to_the_prompt_and_not_to_the_policy() -> None:
    policy = Policy()
    state = torch.randn(5, STATE)
    prompt = torch.randn(5, PROMPT_DIM, requires_grad=True)
    policy.refine_prompt(prompt, state, seed=3).prompt.sum().backward()
    assert torch.equal(prompt.grad, torch.ones(5, PROMPT_DIM))
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_without_a_seed_the_mean_refines() -> None:
    policy = Policy()
    state = torch.randn(5, STATE)
    refined = policy.refine_prompt(state[:, :PROMPT_DIM], state, seed=None)
    assert torch.equal(refined.action, policy(state).mean)


def test_the_reward_is_the_gain_of_the_refined_plan_over_the_unrefined_one() -> None:
    target = torch.tensor([[[1, 2], [3, 4]]])
    valid = torch.tensor([[[True, True], [True, False]]])
    right = torch.nn.functional.one_hot(target, NUM_COLORS).float()
    wrong = right.clone()
    wrong[0, 0, 0] = wrong[0, 1, 1] = torch.nn.functional.one_hot(torch.tensor(7), NUM_COLORS).float()
    wrong.requires_grad_()
    gain = Policy.compute_reward(wrong, right, target, valid)
    # One of three valid cells in accuracy, and half of two thirds of a tenth in the histograms of ten colours.
    torch.testing.assert_close(gain, torch.tensor([1 / 3 + 0.5 * (2 / 3) / 10]))
    torch.testing.assert_close(Policy.compute_reward(right, wrong, target, valid), -gain)
    assert not gain.requires_grad


def test_an_update_leaves_no_trace_on_what_it_was_given() -> None:
    policy = Policy()
    given = rollout(policy, torch.randn(4, STATE))
    copies = [tensor.clone() for tensor in (given.state, given.action, given.reward)]
    result = policy.update(given, adam(policy))
    for tensor, copied in zip((given.state, given.action, given.reward), copies, strict=True):
        assert torch.equal(tensor, copied)
    assert not result.loss.requires_grad
    assert result.grad_norm > 0


def test_the_state_has_no_graph_and_ignores_padding(examples: list[Example]) -> None:
    queries = [example.query for example in examples]
    together = collate(queries)
    prompt = torch.randn(len(queries), PROMPT_DIM, requires_grad=True)
    logits = torch.randn(*together.valid.shape, NUM_COLORS, requires_grad=True)
    state = policy_state(prompt, logits, together.views, together.valid, together.features)
    assert state.shape == (len(queries), STATE)
    assert not state.requires_grad
    for row, query in enumerate(queries):
        alone = collate([query])
        height, width = query.size
        expected = policy_state(
            prompt[row : row + 1], logits[row : row + 1, :height, :width], alone.views, alone.valid, alone.features
        )
        torch.testing.assert_close(state[row : row + 1], expected, rtol=1e-5, atol=1e-6)
