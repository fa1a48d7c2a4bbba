from __future__ import annotations

import math

import pytest
import torch

from efe_kernels import PolicyLossOutput, policy_gradient_loss, squashed_log_prob
from efe_train.config import NUM_COLORS, PROMPT_DIM
from efe_train.data import Batch, Example, collate
from efe_train.facts import NUM_FEATURES
from efe_train.policy import NUM_CONTROLS, SHARPNESS, Policy, Rollout, policy_state

STATE = PROMPT_DIM + NUM_CONTROLS + NUM_FEATURES


def noise(prompt: torch.Tensor, seed: int) -> torch.Tensor:
    """[B, D+1] for prompts [B, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(prompt), prompt.shape[1] + 1, generator=generator)


def draw(policy: Policy, state: torch.Tensor, samples: int, seed: int = 0) -> torch.Tensor:
    """Actions [B, K, D+1] for states [B, S], others for each seed."""
    prompt = state[:, : -NUM_CONTROLS - NUM_FEATURES]
    seeds = range(seed * samples, (seed + 1) * samples)
    return torch.stack([policy.refine_prompt(prompt, state, noise(prompt, each)).action for each in seeds], dim=1)


def rollout(policy: Policy, state: torch.Tensor, samples: int = 3) -> Rollout:
    return Rollout(state, draw(policy, state, samples), torch.randn(len(state), samples))


def adam(policy: Policy, learning_rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(policy.parameters(), lr=learning_rate)


@pytest.mark.parametrize("part", ["read", "see", "mean", "log_std", "value"])
def test_every_part_of_the_policy_learns(part: str) -> None:
    policy = Policy()
    before = {name: parameter.detach().clone() for name, parameter in getattr(policy, part).named_parameters()}
    policy.update(rollout(policy, torch.randn(6, STATE)), adam(policy))
    for name, parameter in getattr(policy, part).named_parameters():
        assert (parameter != before[name]).any(), f"{part}.{name} did not move"


@pytest.mark.parametrize("samples", [1, 4])
def test_the_policy_comes_to_prefer_what_is_rewarded(samples: int) -> None:
    """A bandit: a blend α above one half is rewarded, one below it is punished."""
    policy = Policy()
    optimizer = adam(policy, 3e-3)
    state = torch.randn(64 // samples, STATE)
    start = policy(state).mean[:, -1].mean().item()
    for seed in range(60):
        action = draw(policy, state, samples, seed)
        policy.update(Rollout(state, action, torch.where(action[..., -1] > 0, 0.2, -0.2)), optimizer)
    mean, _, value = policy(state)
    assert mean[:, -1].mean().item() > start + 0.5
    # tanh(5 * 0.2) = 0.76 is the value of always being rewarded
    assert 0.3 < value.mean().item() < 0.9


@pytest.mark.parametrize("samples", [1, 4])
def test_the_policy_finds_the_best_refinement_of_a_bandit(samples: int) -> None:
    """The reward falls with the squared distance of Δ from a target that the policy never sees."""
    dimension, delta_scale = 2, 0.2
    target = torch.tensor([0.12, -0.08])
    policy = Policy(prompt_dim=dimension, hidden=16)
    optimizer = adam(policy, 1e-2)
    state = torch.randn(1, dimension + NUM_CONTROLS + NUM_FEATURES).expand(256 // samples, -1)

    def distance() -> float:
        best = delta_scale * torch.tanh(policy(state[:1]).mean[0, :dimension])
        return (best - target).norm().item()

    begun = distance()
    for seed in range(300):
        action = draw(policy, state, samples, seed)
        delta = delta_scale * torch.tanh(action[..., :dimension])
        policy.update(Rollout(state, action, -10 * (delta - target).square().sum(-1)), optimizer)
    # From across the range of Δ, which is [-0.2, 0.2], to a fortieth of it.
    assert begun > 0.1
    assert distance() < 0.01


def test_the_stored_action_has_the_probability_with_which_it_was_drawn() -> None:
    policy = Policy()
    state = torch.randn(5, STATE)
    refined = policy.refine_prompt(state[:, :PROMPT_DIM], state, noise(state[:, :PROMPT_DIM], 3))
    mean, log_std, _ = policy(state)
    log_prob, _ = squashed_log_prob(refined.action, mean, log_std)
    # a sum of 257 terms of a few nats each, in float32
    torch.testing.assert_close(log_prob, refined.log_prob, rtol=1e-5, atol=1e-3)


def test_a_refinement_passes_gradients_to_the_prompt_and_not_to_the_policy() -> None:
    policy = Policy()
    state = torch.randn(5, STATE)
    prompt = torch.randn(5, PROMPT_DIM, requires_grad=True)
    policy.refine_prompt(prompt, state, torch.randn(5, PROMPT_DIM + 1)).prompt.sum().backward()
    assert prompt.grad is not None and torch.equal(prompt.grad, torch.ones(5, PROMPT_DIM))
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_without_noise_the_mean_refines() -> None:
    policy = Policy()
    state = torch.randn(5, STATE)
    refined = policy.refine_prompt(state[:, :PROMPT_DIM], state, None)
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


def logits_of(grid: list[list[int]], margin: float) -> torch.Tensor:
    """[1, H, W, C]: the colours of a grid above all others by a margin."""
    return margin * torch.nn.functional.one_hot(torch.tensor([grid]), NUM_COLORS).float()


def test_the_expected_gain_is_that_of_the_sharpened_probability_of_the_right_colours() -> None:
    target, valid = torch.tensor([[[1, 2, 3]]]), torch.tensor([[[True, True, False]]])
    before, after = logits_of([[1, 5, 0]], 0.5), logits_of([[1, 2, 3]], 0.5)
    gain = Policy.expected_gain(before.requires_grad_(), after, target, valid)
    assert SHARPNESS == 4
    # One of the two cells goes from a colour that another one leads by 4 · 0.5 to the colour that leads.
    expected = (math.exp(2) - 1) / (math.exp(2) + 9) / 2
    torch.testing.assert_close(gain, torch.tensor([expected]))
    torch.testing.assert_close(Policy.expected_gain(after, before, target, valid), -gain)
    assert not gain.requires_grad


def test_being_surer_of_the_same_plan_is_no_gain() -> None:
    target, valid = torch.tensor([[[1, 2, 3]]]), torch.ones(1, 1, 3, dtype=torch.bool)
    plan = [[1, 2, 7]]
    surer = Policy.expected_gain(logits_of(plan, 2.0), logits_of(plan, 8.0), target, valid)
    assert 0 <= surer.item() < 0.005
    # Without sharpening, that would look like half of what a third cell is worth.
    right = Policy.expected_gain(logits_of(plan, 2.0), logits_of([[1, 2, 3]], 2.0), target, valid)
    assert right.item() == pytest.approx(1 / 3, abs=0.005)
    # A cell that comes nearer to its decision is one, though the reward does not see it.
    nearer = Policy.expected_gain(logits_of(plan, 0.6), logits_of(plan, 0.2), target, valid)
    assert abs(nearer.item()) > 0.05
    assert Policy.compute_reward(logits_of(plan, 0.6), logits_of(plan, 0.2), target, valid).item() == 0


def given_to_the_loss(policy: Policy, given: Rollout, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """log_prob, advantage, value, value_target and entropy of an update, [B, K] each."""
    seen: list[torch.Tensor] = []

    def look(*parts: torch.Tensor) -> PolicyLossOutput:
        seen.extend(part.detach().view(len(given.state), -1) for part in parts)
        return policy_gradient_loss(*parts)

    monkeypatch.setattr("efe_train.policy.policy_gradient_loss", look)
    policy.update(given, adam(policy))
    return seen


def test_samples_of_a_query_are_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy()
    state = torch.randn(2, STATE)
    action = draw(policy, state, samples=3)
    reward = torch.tensor([[0.0, 0.5, -0.5], [0.3, 0.3, 0.3]]).atanh() / 5
    mean, log_std, value = (part.detach() for part in policy(state))
    seen = given_to_the_loss(policy, Rollout(state, action, reward), monkeypatch)
    expected = torch.stack([squashed_log_prob(each, mean, log_std)[0] for each in action.unbind(1)], 1)
    torch.testing.assert_close(seen[0], expected)
    # The first query's mean is 0 and its deviation a half.
    torch.testing.assert_close(seen[1], torch.tensor([[0.0, 1.0, -1.0], [0.0, 0.0, 0.0]]), rtol=0, atol=1e-3)
    assert torch.equal(seen[2], value[:, None].expand(2, 3))
    torch.testing.assert_close(seen[3], torch.tensor([[0.0, 0.5, -0.5], [0.3, 0.3, 0.3]]))


def test_a_single_sample_is_compared_with_the_value_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy()
    state = torch.randn(2, STATE)
    value = policy(state).value.detach()
    reward = torch.tensor([[0.5], [-0.2]]).atanh() / 5
    seen = given_to_the_loss(policy, Rollout(state, draw(policy, state, samples=1), reward), monkeypatch)
    torch.testing.assert_close(seen[1][:, 0], torch.tensor([0.5, -0.2]) - value)
    torch.testing.assert_close(seen[3][:, 0], torch.tensor([0.5, -0.2]))


def test_the_control_sums_up_the_unrefined_plan(examples: list[Example]) -> None:
    batch: Batch = collate([examples[0].query])
    grid = batch.observation.views[0, 0].clone()
    grid[0, 0] = (grid[0, 0] + 1) % NUM_COLORS
    before = 50 * torch.nn.functional.one_hot(grid, NUM_COLORS).float()[None]
    control = policy_state(torch.zeros(1, PROMPT_DIM), before, batch)[0, PROMPT_DIM : PROMPT_DIM + NUM_CONTROLS]
    colours = torch.bincount(grid.flatten(), minlength=NUM_COLORS) / grid.numel()
    torch.testing.assert_close(control, torch.cat([colours, torch.tensor([0.0, 1 / grid.numel()])]))


def test_an_update_leaves_no_trace_on_what_it_was_given() -> None:
    policy = Policy()
    given = rollout(policy, torch.randn(4, STATE))
    copies = [tensor.clone() for tensor in (given.state, given.action, given.lesson)]
    result = policy.update(given, adam(policy))
    for tensor, copied in zip((given.state, given.action, given.lesson), copies, strict=True):
        assert torch.equal(tensor, copied)
    assert not result.loss.requires_grad
    assert result.grad_norm > 0


def test_the_state_has_no_graph_and_ignores_padding(examples: list[Example]) -> None:
    queries = [example.query for example in examples]
    together = collate(queries)
    prompt = torch.randn(len(queries), PROMPT_DIM, requires_grad=True)
    logits = torch.randn(*together.valid.shape, NUM_COLORS, requires_grad=True)
    state = policy_state(prompt, logits, together)
    assert state.shape == (len(queries), STATE)
    assert not state.requires_grad
    for row, query in enumerate(queries):
        alone = collate([query])
        height, width = query.size
        expected = policy_state(prompt[row : row + 1], logits[row : row + 1, :height, :width], alone)
        torch.testing.assert_close(state[row : row + 1], expected, rtol=1e-5, atol=1e-6)
