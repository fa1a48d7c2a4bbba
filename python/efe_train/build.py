"""The agent and the loss that the settings of a run ask for."""

from __future__ import annotations

import torch

from efe_kernels import EFELoss, EFEWeights
from efe_train.agent import Agent
from efe_train.config import TrainConfig, term_weights
from efe_train.planner import Planner
from efe_train.policy import Policy
from efe_train.qwen import Prompter


def build_agent(config: TrainConfig, prompter: Prompter, device: torch.device, dtype: torch.dtype) -> Agent:
    # The order in which first weights are drawn: in another one, a seed would give another run.
    planner, policy = Planner(look_up=config.has("look_up")), Policy()
    has = {"reads": config.has("prompt"), "refines": config.has("refinement")}
    return Agent(prompter, planner, policy, device, dtype, **has)


def build_loss(config: TrainConfig) -> EFELoss:
    weights = EFEWeights(**{**term_weights(TrainConfig.efe_weights), **term_weights(config.efe_weights)})
    return EFELoss(weights=weights, hard_cell=config.has("hard_cell"), reduction="none")
