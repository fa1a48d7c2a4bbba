from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from efe_train.agent import Agent
from efe_train.config import PROMPT_DIM
from efe_train.data import Batch, Example, collate
from efe_train.planner import Planner
from efe_train.policy import Policy
from efe_train.qwen import Prompter
from efe_train.standardise import Standardise
from tests.efe_train.conftest import stirred


@pytest.fixture
def agent(prompter: Prompter) -> Agent:
    torch.manual_seed(0)
    return Agent(prompter, stirred(Planner()), Policy(), torch.device("cpu"), torch.float32)


@pytest.fixture
def batch(examples: list[Example]) -> Batch:
    return collate([example.query for example in examples[:4]])


def noise(seed: int) -> Tensor:
    return torch.randn(4, PROMPT_DIM + 1, generator=torch.Generator().manual_seed(seed))


def test_without_a_prompt_qwen_is_asked_and_with_one_it_is_not(agent: Agent, batch: Batch) -> None:
    expected = agent.plan(batch, noise(3))
    assert torch.equal(expected.prompt, agent.ask(batch.queries).prompt)
    agent.prompter.register_forward_pre_hook(lambda *_: pytest.fail("Qwen was asked for a prompt that is known"))
    found = agent.plan(batch, noise(3), prompt=expected.prompt.detach())
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.before, expected.before)


def test_noise_draws_the_refinement_and_without_it_it_is_the_mean(agent: Agent, batch: Batch) -> None:
    mean = agent.plan(batch)
    assert torch.equal(mean.refined.action, agent.policy(mean.state).mean)
    first, again, other = (agent.plan(batch, noise(seed)).refined.action for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, mean.refined.action)


def test_evaluation_leaves_the_scale_of_what_is_standardised(agent: Agent, examples: list[Example]) -> None:
    scales = [copy.deepcopy(each.state_dict()) for each in standardised(agent)]
    agent.train().predict([example.query for example in examples[:3]], batch_size=2)
    for each, scale in zip(standardised(agent), scales, strict=True):
        assert all(torch.equal(tensor, scale[name]) for name, tensor in each.state_dict().items())


def standardised(agent: Agent) -> list[Standardise]:
    return [module for module in agent.modules() if isinstance(module, Standardise)]


def test_gradients_of_the_plan_reach_planner_and_qwen_and_not_the_policy(agent: Agent, batch: Batch) -> None:
    plan = agent.plan(batch, noise(1))
    assert not plan.before.requires_grad and not plan.state.requires_grad
    plan.logits.square().sum().backward()
    model: Any = agent.prompter.language_model
    assert model.embed_tokens.weight.grad.norm() > 0
    assert all(parameter.grad is not None for parameter in agent.planner.parameters())
    assert all(parameter.grad is None for parameter in agent.policy.parameters())


def test_the_unrefined_plan_is_the_planners_with_qwens_prompt(agent: Agent, batch: Batch) -> None:
    plan = agent.plan(batch, noise(1))
    assert torch.equal(plan.before, agent.planner(batch.observation, plan.prompt)[:, -1])
    assert torch.equal(plan.logits, agent.planner(batch.observation, plan.refined.prompt))


def test_prediction_takes_the_mean_and_gives_each_grid_in_its_own_size(agent: Agent, examples: list[Example]) -> None:
    queries = [example.query for example in examples[:7]]
    assert len({query.size for query in queries}) > 2
    agent.train()
    grids = agent.predict(queries, batch_size=3)
    assert all(module.training for module in agent.modules())
    agent.eval()
    for query, grid in zip(queries, grids, strict=True):
        ends = agent.plan(collate([query])).logits[0, -1].argmax(-1)
        assert grid.tolist() == ends.tolist()
    assert agent.predict([], batch_size=3) == []
