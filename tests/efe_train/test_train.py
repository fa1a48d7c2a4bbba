from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from efe_kernels import EFEWeights, squashed_log_prob
from efe_train.agent import Plan
from efe_train.config import NUM_COLORS, PROMPT_DIM, TrainConfig, term_weights
from efe_train.data import Batch, Example, Observation, Query, Share, collate
from efe_train.policy import Policy, Rollout
from efe_train.qwen import Prompter, Prompts
from efe_train.schedule import POLICY_RATES, epoch_weight, rate_factor
from efe_train.tasks import Pair
from efe_train.train import EFE_WEIGHT, REWARD_WEIGHT, Trainer
from tests.efe_train.conftest import stirred
from tests.on_meta import META, only_on_meta


@pytest.fixture
def batch(examples: list[Example]) -> Batch:
    return collate([example.query for example in examples[:6]], [example.answer for example in examples[:6]])


def new_trainer(prompter: Prompter, batches: int | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(TrainConfig(**settings), prompter, torch.device("cpu"), torch.float32, batches)


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def gradients_at_the_step(trainer: Trainer) -> list[Tensor | None]:
    """Filled when the main optimizer steps, with what it steps on."""
    seen: list[Tensor | None] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            seen.extend(None if p.grad is None else p.grad.clone() for p in group["params"])

    trainer.optimizer.register_step_pre_hook(look)
    return seen


def test_the_efe_loss_leaves_the_policy_alone_and_the_policy_comes_after_the_step(
    trainer: Trainer, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = copy_of(trainer.agent.planner)
    policy = copy_of(trainer.agent.policy)
    update = Policy.update
    seen: dict[str, Any] = {}

    def spy(self: Policy, rollout: Rollout, *args: Any) -> Any:
        seen["gradients"] = [parameter.grad for parameter in self.parameters()]
        seen["planner moved"] = not same(planner, trainer.agent.planner.state_dict())
        seen["policy unmoved"] = all(torch.equal(policy[name], part) for name, part in self.named_parameters())
        seen["graphs"] = [tensor.requires_grad for tensor in (rollout.state, rollout.action, rollout.lesson)]
        return update(self, rollout, *args)

    monkeypatch.setattr(Policy, "update", spy)
    trainer.step(Share.all_of(batch), 0)
    assert all(gradient is None for gradient in seen["gradients"])
    assert seen["planner moved"]
    assert seen["policy unmoved"]
    assert seen["graphs"] == [False, False, False]
    assert not same(policy, trainer.agent.policy.state_dict())


def test_updating_the_policy_before_the_main_backward_changes_no_main_gradient(
    prompter: Prompter, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, descend = Policy.update, Trainer.descend
    rollouts: list[Rollout] = []

    def one_step() -> tuple[list[Tensor | None], dict[str, Tensor], dict[str, Tensor]]:
        trainer = new_trainer(copy.deepcopy(prompter))
        seen = gradients_at_the_step(trainer)
        trainer.step(Share.all_of(batch), 0)
        return seen, copy_of(trainer.agent.planner), copy_of(trainer.agent.policy)

    def late(self: Policy, rollout: Rollout, *args: Any) -> Any:
        rollouts.append(rollout)
        return update(self, rollout, *args)

    def early(self: Trainer, *args: Any) -> Any:
        done = update(self.agent.policy, rollouts[0], self.policy_optimizer)
        monkeypatch.setattr(Policy, "update", lambda *_: done)
        return descend(self, *args)

    monkeypatch.setattr(Policy, "update", late)
    gradients, planner, policy = one_step()
    monkeypatch.setattr(Trainer, "descend", early)
    swapped_gradients, swapped_planner, swapped_policy = one_step()
    assert len(gradients) == len(swapped_gradients) > 0
    for expected, found in zip(gradients, swapped_gradients, strict=True):
        assert (expected is None) == (found is None)
        assert expected is None or (found is not None and torch.equal(expected, found))
    assert same(planner, swapped_planner)
    assert same(policy, swapped_policy)


def test_the_main_backward_does_not_touch_the_gradients_of_the_policys_last_update(
    trainer: Trainer, batch: Batch
) -> None:
    trainer.step(Share.all_of(batch), 0)
    left = [parameter.grad for parameter in trainer.agent.policy.parameters()]
    copies = [gradient.clone() for gradient in left if gradient is not None]
    assert len(copies) == len(left)
    seen: list[Tensor | None] = []
    trainer.optimizer.register_step_post_hook(lambda *_: seen.extend(p.grad for p in trainer.agent.policy.parameters()))
    trainer.step(Share.all_of(batch), 0)
    for found, gradient, copied in zip(seen, left, copies, strict=True):
        assert gradient is not None and found is gradient and torch.equal(gradient, copied)


def test_qwen_trains_on_refresh_batches_and_only_there(trainer: Trainer, batch: Batch) -> None:
    moved = []
    for _ in range(6):
        before = copy_of(trainer.agent.prompter)
        metrics = trainer.step(Share.all_of(batch), 0)
        moved.append(not same(before, trainer.agent.prompter.state_dict()))
        assert metrics["qwen_grad"] > 0
    assert moved == [True, False, False, False, True, False]  # prompt_refresh is 4


def test_the_gradient_of_the_loss_reaches_qwens_first_layer(trainer: Trainer, batch: Batch) -> None:
    trainer.step(Share.all_of(batch), 0)
    model: Any = trainer.agent.prompter.language_model
    first_layer = [model.embed_tokens.weight, *model.layers[0].parameters()]
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in first_layer)
    assert all(parameter.grad is not None for parameter in trainer.agent.prompter.projection.parameters())


def test_over_two_steps_a_gradient_arrives_at_qwens_first_layer(prompter: Prompter, batch: Batch) -> None:
    trainer = new_trainer(prompter, prompt_refresh=1)
    model: Any = prompter.language_model
    arrived: list[float] = []
    model.layers[0].register_full_backward_hook(lambda _, __, grads: arrived.append(grads[0].norm().item()))
    for _ in range(2):
        trainer.step(Share.all_of(batch), 0)
    assert len(arrived) == 2
    assert all(0 < norm < math.inf for norm in arrived)


def test_the_prompt_cache_is_part_of_a_checkpoint(trainer: Trainer, prompter: Prompter, batch: Batch) -> None:
    trainer.step(Share.all_of(batch), 0)
    assert not trainer.cache.missing(batch.queries)
    expected = trainer.cache.read(batch.queries)
    other = Trainer(trainer.config, copy.deepcopy(prompter), trainer.device, torch.float32)
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    # Qwen has taken a step since it gave these prompts: computed again, they would be others.
    other.agent.prompter.register_forward_pre_hook(lambda *_: pytest.fail("the cached prompts were computed again"))
    other.step(Share.all_of(batch), 0)
    assert torch.equal(other.cache.read(batch.queries), expected)


@pytest.mark.parametrize("closing", [False, True])
def test_an_update_evaluates_the_probability_with_which_the_step_drew_its_action(
    closing: bool, prompter: Prompter, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_trainer(prompter, 4, policy_samples=3)
    trainer.batches_done = 3 if closing else 0
    drawn: dict[tuple[float, ...], Tensor] = {}
    evaluated: list[tuple[Tensor, Tensor]] = []
    refine_prompt = trainer.agent.policy.refine_prompt

    def draw(*args: Any) -> Any:
        refined = refine_prompt(*args)
        for action, log_prob in zip(refined.action, refined.log_prob, strict=True):
            drawn[tuple(action.tolist())] = log_prob.detach()
        return refined

    def evaluate(action: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        log_prob, entropy = squashed_log_prob(action, *args)
        evaluated.extend(zip(action, log_prob.detach(), strict=True))
        return log_prob, entropy

    monkeypatch.setattr(trainer.agent.policy, "refine_prompt", draw)
    monkeypatch.setattr("efe_train.policy.squashed_log_prob", evaluate)
    for _ in range(2):
        trainer.step(Share.all_of(batch), 0)
    # Three of six queries in each step, or three samples of all six.
    assert len(evaluated) == (2 * 3 * 6 if closing else 2 * 3)
    for action, log_prob in evaluated:
        # The sum of 257 terms of a few nats each, in float32, from the noise and from u = mean + std · noise.
        torch.testing.assert_close(log_prob, drawn[tuple(action.tolist())], rtol=1e-5, atol=1e-3)


def test_qwen_is_in_train_mode_and_every_parameter_has_an_optimizer(trainer: Trainer) -> None:
    assert all(module.training for module in trainer.agent.prompter.modules())
    optimizers = (trainer.optimizer, trainer.policy_optimizer)
    groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    owned = [id(parameter) for group in groups for parameter in group]
    wanted = [id(parameter) for module in trainer.modules().values() for parameter in module.parameters()]
    assert sorted(owned) == sorted(wanted)
    assert all(parameter.dtype == torch.float32 for group in groups for parameter in group)


@pytest.mark.parametrize(("epoch", "weight"), [(0, 0.6), (1, 0.3), (7, 0.3)])
def test_the_loss_is_the_weighted_efe_minus_the_reward(
    trainer: Trainer, batch: Batch, epoch: int, weight: float
) -> None:
    assert epoch_weight(epoch) == weight
    metrics = trainer.step(Share.all_of(batch), epoch)
    expected = 0.7 * weight * metrics["efe"] - 0.3 * metrics["reward"]
    torch.testing.assert_close(metrics["loss"], expected)
    assert (EFE_WEIGHT, REWARD_WEIGHT) == (0.7, 0.3)


def test_metrics_stay_on_the_device_without_a_graph(trainer: Trainer, batch: Batch) -> None:
    metrics = trainer.step(Share.all_of(batch), 0)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    assert 0 < metrics["mask_ratio"] <= 1


def test_gradients_are_clipped_and_zero_switches_clipping_off(prompter: Prompter, batch: Batch) -> None:
    def norm_at_the_step(max_grad_norm: float) -> tuple[float, float]:
        trainer = new_trainer(copy.deepcopy(prompter), max_grad_norm=max_grad_norm)
        seen = gradients_at_the_step(trainer)
        reported = trainer.step(Share.all_of(batch), 0)["grad_norm"]
        return nn.utils.get_total_norm([g for g in seen if g is not None]).item(), reported.item()

    clipped, reported = norm_at_the_step(0.01)
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert reported > 0.01
    free, reported_free = norm_at_the_step(0)
    assert free == pytest.approx(reported_free, rel=1e-5) == pytest.approx(reported, rel=1e-5)


def test_padding_changes_nothing(trainer: Trainer, examples: list[Example]) -> None:
    """A batch whose target holds anything in its padding gives the same loss."""
    batch = collate([example.query for example in examples[:6]], [example.answer for example in examples[:6]])
    assert batch.target is not None and not batch.valid.all()
    state = copy.deepcopy(trainer.state_dict())
    expected = trainer.step(Share.all_of(batch), 0)
    trainer.load_state_dict(state)
    batch.target[~batch.valid] = 7
    found = trainer.step(Share.all_of(batch), 0)
    assert {name: value.item() for name, value in found.items()} == {
        name: value.item() for name, value in expected.items()
    }


def test_an_overflow_under_loss_scaling_skips_the_step_and_lowers_the_scale(prompter: Prompter, batch: Batch) -> None:
    trainer = Trainer(TrainConfig(prompt_refresh=1), prompter, torch.device("cpu"), torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy_of(trainer.agent.planner)
    metrics = trainer.step(Share.all_of(batch), 0)
    assert metrics["loss"].isfinite() and not metrics["grad_norm"].isfinite()
    assert same(before, trainer.agent.planner.state_dict())
    assert trainer.scaler.get_scale() == 2.0**39
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    metrics = trainer.step(Share.all_of(batch), 0)
    assert metrics["grad_norm"].isfinite()
    assert not same(before, trainer.agent.planner.state_dict())


def test_loss_scaling_does_not_change_the_reported_gradient(prompter: Prompter, batch: Batch) -> None:
    norms = []
    for scale in (1.0, 2.0**10):
        trainer = new_trainer(copy.deepcopy(prompter))
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        norms.append(trainer.step(Share.all_of(batch), 0)["qwen_grad"].item())
    # a power of two scales every product exactly
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_bf16_runs_the_same_step_with_float32_weights(prompter: Prompter, batch: Batch) -> None:
    trainer = Trainer(TrainConfig(), prompter, torch.device("cpu"), torch.bfloat16)
    seen: list[torch.dtype] = []
    trainer.agent.planner.head.register_forward_hook(lambda _, __, found: seen.append(found.dtype))
    metrics = trainer.step(Share.all_of(batch), 0)
    assert set(seen) == {torch.bfloat16}
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["qwen_grad"] > 0
    assert not trainer.scaler.is_enabled()
    assert all(
        parameter.dtype == torch.float32 for module in trainer.modules().values() for parameter in module.parameters()
    )


def test_the_rates_rise_then_fall_to_nothing_and_stay_there() -> None:
    factors = [rate_factor(done, 100) for done in range(110)]
    peak = factors.index(max(factors))
    assert 0 < factors[0] < 0.1 and factors[peak] > 0.9
    assert all(earlier < later for earlier, later in pairwise(factors[: peak + 1]))
    assert all(later < earlier for earlier, later in pairwise(factors[peak:101]))
    assert factors[50] == pytest.approx(0.5)
    assert factors[100:] == [0.0] * 10


def test_the_rates_of_a_constant_schedule_rise_and_stay_until_the_closing_phase() -> None:
    factors = [rate_factor(done, 10, "constant", 4) for done in range(12)]
    assert factors == [0.25, 0.5, 0.75] + [1.0] * 7 + [0.0] * 2
    assert rate_factor(0, 10, "constant", 0) == 1


@pytest.mark.parametrize("batches", [1, 2, 3, 30])
def test_the_planner_learns_in_every_batch_that_is_its_own(batches: int) -> None:
    assert all(0 < rate_factor(done, batches) <= 1 for done in range(batches))
    assert rate_factor(batches, batches) == 0
    assert rate_factor(0, 0) == 0


def test_the_optimizer_steps_at_the_rates_of_its_batch(prompter: Prompter, batch: Batch) -> None:
    trainer = new_trainer(prompter, 8, policy_share=0.5, agent_lr=0.01, qwen_lr=0.02)
    seen: list[tuple[float, ...]] = []
    policy: list[tuple[float, ...]] = []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(lrs(optimizer)))
    trainer.policy_optimizer.register_step_pre_hook(lambda optimizer, *_: policy.append(lrs(optimizer)))
    for _ in range(8):
        trainer.step(Share.all_of(batch), 0)
    assert seen == [(rate_factor(done, 4) * 0.01, rate_factor(done, 4) * 0.02) for done in range(4)]
    moving, standing = POLICY_RATES
    assert policy == [(moving * 0.01,)] * 4 + [(standing * 0.01,)] * 4


def lrs(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    return tuple(group["lr"] for group in optimizer.param_groups)


def test_in_the_closing_phase_only_the_policy_moves(prompter: Prompter, batch: Batch) -> None:
    trainer = new_trainer(prompter, 8, policy_share=0.25, prompt_refresh=2, policy_samples=3)
    assert trainer.planner_batches == 6
    states = []
    for _ in range(8):
        metrics = trainer.step(Share.all_of(batch), 0)
        states.append({name: copy_of(module) for name, module in trainer.modules().items()})
    for name in ("planner", "prompter", "efe_loss"):
        assert not same(states[3][name], states[5][name])
        assert same(states[5][name], states[7][name])
    assert "target_preference" in states[7]["efe_loss"]
    assert not same(states[5]["policy"], states[6]["policy"]) and not same(states[6]["policy"], states[7]["policy"])
    assert metrics["grad_norm"] == 0
    assert all(value.isfinite() for value in metrics.values())


def plans_of(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Filled with the plan of each step."""
    plans: list[Plan] = []
    plan = trainer.agent.plan

    def kept(*args: Any) -> Plan:
        plans.append(plan(*args))
        return plans[-1]

    monkeypatch.setattr(trainer.agent, "plan", kept)
    return plans


def test_half_of_the_queries_are_planned_unrefined_by_turns_and_all_of_them_teach_qwen(
    prompter: Prompter, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_trainer(prompter, prompt_refresh=1)
    stirred(trainer.agent.planner)
    plans = plans_of(trainer, monkeypatch)
    prompts: list[Tensor] = []
    ask = trainer.agent.ask

    def asked(queries: Any) -> Prompts:
        found = ask(queries)
        found.prompt.retain_grad()
        prompts.append(found.prompt)
        return found

    monkeypatch.setattr(trainer.agent, "ask", asked)
    for _ in range(2):
        trainer.step(Share.all_of(batch), 0)
    for done, plan in enumerate(plans):
        unrefined = (plan.used == plan.prompt).all(1).tolist()
        assert unrefined == [(row + done) % 2 == 1 for row in range(6)]
        assert torch.equal(plan.used[done::2], plan.refined.prompt[done::2])
    assert all(prompt.grad is not None and (prompt.grad.norm(dim=1) > 0).all() for prompt in prompts)


def test_in_the_closing_phase_the_policy_learns_from_samples_of_every_query(
    prompter: Prompter, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_trainer(prompter, 4, policy_samples=3)
    trainer.batches_done = 3
    plans = plans_of(trainer, monkeypatch)
    update = trainer.agent.policy.update
    rollouts: list[Rollout] = []

    def keep(rollout: Rollout, *args: Any) -> Any:
        rollouts.append(rollout)
        return update(rollout, *args)

    monkeypatch.setattr(trainer.agent.policy, "update", keep)
    trainer.step(Share.all_of(batch), 0)
    assert torch.equal(plans[0].used, plans[0].refined.prompt)
    (rollout,) = rollouts
    assert rollout.action.shape[:2] == rollout.lesson.shape == (6, 3)
    first, second, third = rollout.action.unbind(1)
    assert torch.equal(first, plans[0].refined.action)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize("closing", [False, True])
def test_a_batch_of_one_query_is_learned_from(closing: bool, prompter: Prompter, examples: list[Example]) -> None:
    trainer = new_trainer(prompter, 4)
    trainer.batches_done = 3 if closing else 0
    alone = collate([examples[0].query], [examples[0].answer])
    for _ in range(2):
        metrics = trainer.step(Share.all_of(alone), 0)
        assert all(value.isfinite() for value in metrics.values())


class Parrot(nn.Module):
    """A planner that copies the input where it is given Qwen's prompt, and says 7 everywhere where that is refined."""

    def __init__(self, prompts: Tensor) -> None:
        super().__init__()
        self.prompts = prompts
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, seen: Observation, prompt: Tensor) -> Tensor:
        refined = (prompt[:, None] != self.prompts).any(-1).all(1)
        grid = torch.where(refined[:, None, None], 7, seen.views[:, 0] % NUM_COLORS)
        return self.scale * nn.functional.one_hot(grid, NUM_COLORS).float()[:, None]


def test_accuracies_are_shares_of_cells_of_the_plan_of_copying_and_of_the_look_up(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    grids = [generator.integers(4, size=size) for size in ((4, 5), (6, 3), (5, 5))]
    shown = tuple(Pair(grid, grid + 1) for grid in grids)
    # Of 4 cells: copying gets 1, 0 and 2 right, the demonstrations tell 3, 4 and 3, and 1, 0 and 2 are 7.
    cases = [
        ([[1, 2, 3, 7]], [[2, 3, 9, 7]]),
        ([[0, 1], [2, 3]], [[1, 2], [3, 4]]),
        ([[0, 7], [7, 2]], [[1, 7], [7, 9]]),
    ]
    queries = [Query(f"query{n}", shown, np.array(source), np.shape(source)) for n, (source, _) in enumerate(cases)]
    batch = collate(queries, [np.array(answer) for _, answer in cases])
    with torch.no_grad():
        asked = trainer.agent.ask(queries)
    monkeypatch.setattr(trainer.agent, "ask", lambda _: asked)
    monkeypatch.setattr(trainer.agent, "planner", Parrot(asked.prompt))
    # The first and the third query are refined in the first batch, the second one in the second batch.
    for copying, look_up, after in (((1 + 2) / 8, (3 + 3) / 8, (1 + 2) / 8), (0, 1, 0)):
        metrics = trainer.step(Share.all_of(batch), 0)
        assert metrics["acc_copying"] == metrics["acc_before"] == pytest.approx(copying)
        assert metrics["acc_look_up"] == pytest.approx(look_up)
        assert metrics["acc_after"] == pytest.approx(after)


def test_the_first_plan_of_an_untrained_agent_is_what_the_demonstrations_say(trainer: Trainer, batch: Batch) -> None:
    metrics = trainer.step(Share.all_of(batch), 0)
    assert metrics["acc_before"] == metrics["acc_after"] == metrics["acc_look_up"]


def test_without_the_prompt_qwen_has_no_say(prompter: Prompter, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = new_trainer(prompter, without="prompt")
    plans = plans_of(trainer, monkeypatch)
    before = copy_of(trainer.agent.prompter.language_model)
    metrics = trainer.step(Share.all_of(batch), 0)
    assert not plans[0].prompt.any()
    assert metrics["qwen_grad"] == 0
    assert same(before, trainer.agent.prompter.language_model.state_dict())


@pytest.mark.parametrize("closing", [False, True])
def test_without_refinement_every_plan_is_unrefined(
    closing: bool, prompter: Prompter, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_trainer(prompter, 4, without="refinement")
    trainer.batches_done = 3 if closing else 0
    plans = plans_of(trainer, monkeypatch)
    metrics = trainer.step(Share.all_of(batch), 0)
    assert torch.equal(plans[0].used, plans[0].prompt)
    assert metrics["acc_after"] == metrics["acc_before"]
    assert metrics["reward"] == 0
    assert all(value.isfinite() for value in metrics.values())


def test_the_weights_of_the_terms_and_the_hard_cell_are_those_that_were_asked_for(prompter: Prompter) -> None:
    trainer = new_trainer(prompter, efe_weights="risk=0.25,step=0", without="hard_cell")
    kept = term_weights(TrainConfig.efe_weights)
    assert trainer.efe_loss.weights == EFEWeights(**{**kept, "risk": 0.25, "step": 0})
    assert not trainer.efe_loss.hard_cell
    assert new_trainer(prompter).efe_loss.hard_cell


def test_a_trainer_that_goes_on_from_a_state_ends_as_one_that_never_stopped(
    prompter: Prompter, examples: list[Example]
) -> None:
    """From the planner's last batches into the closing phase, with refreshes in both."""
    parts = [examples[first : first + 6] for first in (0, 6)] * 4
    batches = [collate([each.query for each in part], [each.answer for each in part]) for part in parts]
    settings = {"prompt_refresh": 3, "policy_samples": 2}
    straight = new_trainer(copy.deepcopy(prompter), 8, **settings)
    for done, batch in enumerate(batches):
        if done == 4:
            state = copy.deepcopy(straight.state_dict())
        straight.step(Share.all_of(batch), 0)
    resumed = new_trainer(copy.deepcopy(prompter), 8, **settings)
    resumed.load_state_dict(state)
    for batch in batches[4:]:
        resumed.step(Share.all_of(batch), 0)
    for name, module in straight.modules().items():
        assert same(module.state_dict(), resumed.modules()[name].state_dict())


def test_a_step_with_prompts_at_hand_never_waits_for_the_device(
    prompter: Prompter, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(TrainConfig(prompt_refresh=2), prompter, META, torch.float32)
    trainer.batches_done = 1  # Qwen is asked in every other batch
    share = Share.all_of(batch).to(META)
    trainer.cache.store(share.queries, torch.empty(len(share.queries), PROMPT_DIM, device=META))
    with only_on_meta(monkeypatch):
        assert all(value.device == META for value in trainer.step(share, 0).values())
