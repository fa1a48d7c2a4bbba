"""Fused kernels for training planners with an Expected Free Energy loss."""

from efe_kernels.common import extension as _extension  # noqa: F401  (its import registers the C++ kernels)
from efe_kernels.functional import (
    EFELossOutput,
    EFEWeights,
    PolicyLossOutput,
    RefinedPrompt,
    RewardOutput,
    RewardWeights,
    efe_loss,
    gae,
    grid_reward,
    masked_mean_pool,
    policy_gradient_loss,
    refine_prompt,
    rl_advantage,
    squashed_log_prob,
    td_lambda,
    vtrace,
)
from efe_kernels.modules import EFELoss

__all__ = [
    "EFELoss",
    "EFELossOutput",
    "EFEWeights",
    "PolicyLossOutput",
    "RefinedPrompt",
    "RewardOutput",
    "RewardWeights",
    "efe_loss",
    "gae",
    "grid_reward",
    "masked_mean_pool",
    "policy_gradient_loss",
    "refine_prompt",
    "rl_advantage",
    "squashed_log_prob",
    "td_lambda",
    "vtrace",
]
