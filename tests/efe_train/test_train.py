from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efe_kernels import squashed_log_prob
from efe_train import agent
from efe_train.config import TrainConfig
from efe_train.data import Batch, Example, collate
from efe_train.policy import Policy, Rollout, policy_state
from efe_train.qwen import Prompter
from efe_train.train import EFE_WEIGHT, REWARD_WEIGHT, Trainer, epoch_weight


@pytest.fixture
def batch(examples: list[Example]) -> Batch:
    return collate([example.query for example in examples[:6]], [example.answer for example in examples[:6]])


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

    def spy(self: Policy, rollout: Rollout, optimizer: torch.optim.Optimizer) -> Any:
        seen["gradients"] = [parameter.grad for parameter in self.parameters()]
        seen["planner moved"] = not same(planner, trainer.agent.planner.state_dict())
        seen["policy unmoved"] = same(policy, self.state_dict())
        seen["graphs"] = [tensor.requires_grad for tensor in (rollout.state, rollout.action, rollout.reward)]
        return update(self, rollout, optimizer)

    monkeypatch.setattr(Policy, "update", spy)
    trainer.step(batch, 0)
    assert all(gradient is None for gradient in seen["gradients"])
    assert seen["planner moved"]
    assert seen["policy unmoved"]
    assert seen["graphs"] == [False, False, False]
    assert not same(policy, trainer.agent.policy.state_dict())


def test_updating_the_policy_before_the_main_backward_changes_no_main_gradient(
    prompter: Prompter, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_step(policy_first: bool) -> tuple[list[Tensor | None], dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        trainer = Trainer(TrainConfig(), copy.deepcopy(prompter), torch.device("cpu"), torch.float32)
        seen = gradients_at_the_step(trainer)
        if policy_first:
            swap_order(trainer, monkeypatch)
        trainer.step(batch, 0)
        monkeypatch.undo()
        return seen, copy_of(trainer.agent.planner), copy_of(trainer.agent.policy)

    gradients, planner, policy = one_step(policy_first=False)
    swapped_gradients, swapped_planner, swapped_policy = one_step(policy_first=True)
    assert len(gradients) == len(swapped_gradients) > 0
    for expected, found in zip(gradients, swapped_gradients, strict=True):
        assert (expected is None) == (found is None)
        assert expected is None or (found is not None and torch.equal(expected, found))
    assert same(planner, swapped_planner)
    assert same(policy, swapped_policy)


def test_the_main_backward_does_not_touch_the_gradients_of_the_policys_last_update(
    trainer: Trainer, batch: Batch
) -> None:
    trainer.step(batch, 0)
    left = [parameter.grad for parameter in trainer.agent.policy.parameters()]
    copies = [gradient.clone() for gradient in left if gradient is not None]
    assert len(copies) == len(left)
    seen: list[Tensor | None] = []
    trainer.optimizer.register_step_post_hook(lambda *_: seen.extend(p.grad for p in trainer.agent.policy.parameters()))
    trainer.step(batch, 0)
    for found, gradient, copied in zip(seen, left, copies, strict=True):
        assert found is gradient and torch.equal(gradient, copied)


def swap_order(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the policy's update happen after the forward pass and before the main backward."""
    policy = trainer.agent.policy
    update, compute_reward = policy.update, policy.compute_reward
    known: dict[str, Any] = {}

    def keep(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            known[name] = function(*args, **kwargs)
            return known[name]

        return call

    def update_early(*args: Any) -> Any:
        reward = compute_reward(*args)
        known["update"] = update(
            Rollout(known["state"], known["refined"].action.detach(), reward), trainer.policy_optimizer
        )
        return reward

    monkeypatch.setattr(agent, "policy_state", keep("state", policy_state))
    monkeypatch.setattr(policy, "refine_prompt", keep("refined", policy.refine_prompt))
    monkeypatch.setattr(policy, "compute_reward", update_early)
    monkeypatch.setattr(policy, "update", lambda *_: known["update"])


def test_qwen_trains_on_refresh_batches_and_only_there(trainer: Trainer, batch: Batch) -> None:
    moved = []
    for _ in range(6):
        before = copy_of(trainer.agent.prompter)
        metrics = trainer.step(batch, 0)
        moved.append(not same(before, trainer.agent.prompter.state_dict()))
        assert metrics["qwen_grad"] > 0
    assert moved == [True, False, False, False, True, False]  # prompt_refresh is 4


def test_the_gradient_of_the_loss_reaches_qwens_first_layer(trainer: Trainer, batch: Batch) -> None:
    trainer.step(batch, 0)
    model: Any = trainer.agent.prompter.language_model
    first_layer = [model.embed_tokens.weight, *model.layers[0].parameters()]
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in first_layer)
    assert all(parameter.grad is not None for parameter in trainer.agent.prompter.projection.parameters())


def test_over_two_steps_a_gradient_arrives_at_qwens_first_layer(prompter: Prompter, batch: Batch) -> None:
    trainer = Trainer(TrainConfig(prompt_refresh=1), prompter, torch.device("cpu"), torch.float32)
    model: Any = prompter.language_model
    arrived: list[float] = []
    model.layers[0].register_full_backward_hook(lambda _, __, grads: arrived.append(grads[0].norm().item()))
    for _ in range(2):
        trainer.step(batch, 0)
    assert len(arrived) == 2
    assert all(0 < norm < math.inf for norm in arrived)


def test_the_prompt_cache_is_part_of_a_checkpoint(trainer: Trainer, prompter: Prompter, batch: Batch) -> None:
    trainer.step(batch, 0)
    expected = trainer.cache.prompts(trainer.agent.prompt, batch.queries, refresh=False)
    other = Trainer(trainer.config, copy.deepcopy(prompter), trainer.device, torch.float32)
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    # Qwen has taken a step since it gave these prompts: computed again, they would be others.
    other.agent.prompter.register_forward_pre_hook(lambda *_: pytest.fail("the cached prompts were computed again"))
    assert torch.equal(other.cache.prompts(other.agent.prompt, batch.queries, refresh=False), expected)


def test_an_update_evaluates_the_probability_with_which_the_step_drew_its_action(
    trainer: Trainer, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    evaluated: list[Tensor] = []
    refine_prompt = trainer.agent.policy.refine_prompt

    def draw(*args: Any) -> Any:
        refined = refine_prompt(*args)
        drawn.append(refined.log_prob.detach())
        return refined

    def evaluate(*args: Any) -> tuple[Tensor, Tensor]:
        log_prob, entropy = squashed_log_prob(*args)
        evaluated.append(log_prob.detach())
        return log_prob, entropy

    monkeypatch.setattr(trainer.agent.policy, "refine_prompt", draw)
    monkeypatch.setattr("efe_train.policy.squashed_log_prob", evaluate)
    for _ in range(2):
        trainer.step(batch, 0)
    assert len(drawn) == len(evaluated) == 2
    # The sum of 257 terms of a few nats each, in float32, from the noise and from u = mean + std · noise.
    torch.testing.assert_close(evaluated, drawn, rtol=1e-5, atol=1e-3)
    assert not torch.allclose(drawn[0], drawn[1], rtol=1e-5, atol=1e-3)


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
    metrics = trainer.step(batch, epoch)
    expected = 0.7 * weight * metrics["efe"] - 0.3 * metrics["reward"]
    torch.testing.assert_close(metrics["loss"], expected)
    assert (EFE_WEIGHT, REWARD_WEIGHT) == (0.7, 0.3)


def test_metrics_stay_on_the_device_without_a_graph(trainer: Trainer, batch: Batch) -> None:
    metrics = trainer.step(batch, 0)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    assert 0 < metrics["mask_ratio"] <= 1


def test_gradients_are_clipped_and_zero_switches_clipping_off(prompter: Prompter, batch: Batch) -> None:
    def norm_at_the_step(max_grad_norm: float) -> tuple[float, float]:
        torch.manual_seed(0)
        config = TrainConfig(max_grad_norm=max_grad_norm)
        trainer = Trainer(config, copy.deepcopy(prompter), torch.device("cpu"), torch.float32)
        seen = gradients_at_the_step(trainer)
        reported = trainer.step(batch, 0)["grad_norm"]
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
    expected = trainer.step(batch, 0)
    trainer.load_state_dict(state)
    batch.target[~batch.valid] = 7
    found = trainer.step(batch, 0)
    assert {name: value.item() for name, value in found.items()} == {
        name: value.item() for name, value in expected.items()
    }


def test_an_overflow_under_loss_scaling_skips_the_step_and_lowers_the_scale(prompter: Prompter, batch: Batch) -> None:
    trainer = Trainer(TrainConfig(prompt_refresh=1), prompter, torch.device("cpu"), torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy_of(trainer.agent.planner)
    metrics = trainer.step(batch, 0)
    assert metrics["loss"].isfinite() and not metrics["grad_norm"].isfinite()
    assert same(before, trainer.agent.planner.state_dict())
    assert trainer.scaler.get_scale() == 2.0**39
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    metrics = trainer.step(batch, 0)
    assert metrics["grad_norm"].isfinite()
    assert not same(before, trainer.agent.planner.state_dict())


def test_loss_scaling_does_not_change_the_reported_gradient(prompter: Prompter, batch: Batch) -> None:
    norms = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(0)
        trainer = Trainer(TrainConfig(), copy.deepcopy(prompter), torch.device("cpu"), torch.float32)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        norms.append(trainer.step(batch, 0)["qwen_grad"].item())
    # a power of two scales every product exactly
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_bf16_runs_the_same_step_with_float32_weights(prompter: Prompter, batch: Batch) -> None:
    trainer = Trainer(TrainConfig(), prompter, torch.device("cpu"), torch.bfloat16)
    seen: list[torch.dtype] = []
    trainer.efe_loss.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    metrics = trainer.step(batch, 0)
    assert seen == [torch.bfloat16]
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["qwen_grad"] > 0
    assert not trainer.scaler.is_enabled()
    assert all(
        parameter.dtype == torch.float32 for module in trainer.modules().values() for parameter in module.parameters()
    )
