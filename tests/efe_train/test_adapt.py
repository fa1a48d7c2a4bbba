from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from efe_kernels import EFELoss
from efe_train import adapt as module
from efe_train.adapt import Lesson, Weights, adapt, batches, changes
from efe_train.agent import Agent
from efe_train.config import PROMPT_DIM
from efe_train.data import collate, training_examples
from efe_train.tasks import Pair, Task
from efe_train.train import Trainer

STEPS = 6


def task(seed: int, pairs: int, side: int) -> Task:
    """Cells become the colour of the cell above, which no look-up of single colours tells."""
    generator = np.random.default_rng(seed)
    grids = [generator.integers(0, 4, size=(side, generator.integers(2, side + 1))) for _ in range(pairs)]
    return Task(f"task{seed}", tuple(Pair(grid, np.roll(grid, 1, 0)) for grid in grids), ())


def lesson(of: Task) -> Lesson:
    examples = training_examples([of])
    return Lesson(examples, torch.randn(len(examples), PROMPT_DIM, generator=torch.manual_seed(len(examples))))


@pytest.fixture
def lessons() -> list[Lesson]:
    return [lesson(task(*numbers)) for numbers in ((0, 2, 3), (1, 4, 5), (2, 3, 4))]


@pytest.fixture
def agent(trainer: Trainer) -> Agent:
    """With a head that does something: a planner's first one is zero."""
    torch.nn.init.normal_(trainer.agent.planner.head.weight, std=0.1)
    return trainer.agent.eval()


@pytest.fixture
def efe_loss() -> EFELoss:
    torch.manual_seed(1)
    loss = EFELoss(reduction="none")
    torch.nn.init.normal_(loss.preference_logits, std=0.1)
    return loss.requires_grad_(False)


def plans(agent: Agent, weights: Weights, of: Lesson) -> Tensor:
    """The logits, [cells, C], of the lesson's own queries."""
    batch = collate([example.query for example in of.examples])
    with torch.no_grad():
        logits: Tensor = functional_call(agent.planner, weights, (batch.observation, of.prompts))
    return logits.transpose(0, 1)[:, batch.valid].flatten(0, 1)


def plain_loop(agent: Agent, efe_loss: EFELoss, of: Lesson, steps: int) -> Weights:
    """The same adaptation of one task as anyone would write it."""
    planner = copy.deepcopy(agent.planner)
    optimizer = torch.optim.AdamW(planner.parameters(), lr=module.RATE, weight_decay=module.WEIGHT_DECAY)
    queries, answers = [each.query for each in of.examples], [each.answer for each in of.examples]
    for step, change in enumerate(changes(steps)):
        optimizer.param_groups[0]["lr"] = module.RATE * min(1, (step + 1) / module.WARMUP) * (1 - step / steps)
        batch = collate(queries, answers, [change] * len(queries))
        assert batch.target is not None
        logits = planner(batch.observation, of.prompts, planner.num_steps + step % 2)
        optimizer.zero_grad()
        efe_loss(logits, batch.target, prompt=of.prompts, valid=batch.valid).total.mean().backward()
        torch.nn.utils.clip_grad_norm_(planner.parameters(), module.MAX_GRAD_NORM)
        optimizer.step()
    return dict(planner.named_parameters())


def test_a_task_alone_is_adapted_to_as_in_a_plain_loop(agent: Agent, efe_loss: EFELoss, lessons: list[Lesson]) -> None:
    (weights,) = adapt(agent, efe_loss, lessons[:1], STEPS)
    expected = plans(agent, plain_loop(agent, efe_loss, lessons[0], STEPS), lessons[0])
    torch.testing.assert_close(plans(agent, weights, lessons[0]), expected, rtol=1e-3, atol=1e-3)
    assert (expected - plans(agent, {}, lessons[0])).abs().max() > 0.1


def test_what_becomes_of_a_task_does_not_depend_on_those_beside_it(
    agent: Agent, efe_loss: EFELoss, lessons: list[Lesson]
) -> None:
    together = adapt(agent, efe_loss, lessons, STEPS)
    alone = [adapt(agent, efe_loss, [each], STEPS)[0] for each in lessons]
    for found, expected, of in zip(together, alone, lessons, strict=True):
        torch.testing.assert_close(plans(agent, found, of), plans(agent, expected, of), rtol=1e-3, atol=1e-3)


def wrong(agent: Agent, efe_loss: EFELoss, weights: Weights, of: Lesson) -> float:
    batch = collate([each.query for each in of.examples], [each.answer for each in of.examples])
    assert batch.target is not None
    with torch.no_grad():
        logits = functional_call(agent.planner, weights, (batch.observation, of.prompts))
        return float(efe_loss(logits, batch.target, prompt=of.prompts, valid=batch.valid).mask_ratio.mean())


def test_an_adapted_planner_gets_more_of_the_demonstrations_right(
    agent: Agent, efe_loss: EFELoss, lessons: list[Lesson]
) -> None:
    for weights, of in zip(adapt(agent, efe_loss, lessons, 40), lessons, strict=True):
        assert wrong(agent, efe_loss, weights, of) < wrong(agent, efe_loss, {}, of)


def test_agent_and_loss_stay_as_they_are(agent: Agent, efe_loss: EFELoss, lessons: list[Lesson]) -> None:
    before = copy.deepcopy([*agent.state_dict().values(), *efe_loss.state_dict().values()])
    adapt(agent, efe_loss, lessons, 2)
    for now, then in zip([*agent.state_dict().values(), *efe_loss.state_dict().values()], before, strict=True):
        assert torch.equal(now, then)
    assert all(parameter.grad is None for parameter in agent.parameters())


def shapes(found: Sequence[Sequence[Task]]) -> list[list[str]]:
    return [[each.id for each in batch] for batch in found]


def test_tasks_share_a_batch_up_to_a_number_of_tasks_and_of_cells() -> None:
    large, small, smaller, other = task(0, 3, 9), task(1, 3, 4), task(2, 3, 3), task(3, 2, 4)
    tasks = [large, small, smaller, other]
    order = ["task2", "task3", "task1", "task0"]
    assert shapes(batches(tasks, 3, 10_000)) == [order[:3], order[3:]]
    assert shapes(batches(tasks, 9, 10_000)) == [order]
    # Three tasks of three demonstrations of four by four cells, and no fourth one of nine by nine.
    assert shapes(batches(tasks, 9, 3 * 3 * 16)) == [order[:3], order[3:]]
    assert shapes(batches(tasks, 9, 1)) == [[name] for name in order]
