"""Every public function of the library. Each checks its arguments once and hands them to its op.

Shapes are written as in the mathematics: B episodes, T planning steps, H x W grid cells, C outcomes, D the dimension
of a prompt.
"""

from efe_kernels.advantage.functional import rl_advantage
from efe_kernels.efe_loss.functional import EFELossOutput, EFEWeights, efe_loss
from efe_kernels.policy_efe.functional import PolicyEFE, policy_efe, rollout_states
from efe_kernels.policy_loss.functional import PolicyLossOutput, policy_gradient_loss
from efe_kernels.prompt.functional import RefinedPrompt, masked_mean_pool, refine_prompt, squashed_log_prob
from efe_kernels.returns.functional import gae, next_values, td_lambda, vtrace
from efe_kernels.reward.functional import RewardOutput, RewardWeights, grid_reward

__all__ = [
    "EFELossOutput",
    "EFEWeights",
    "PolicyEFE",
    "PolicyLossOutput",
    "RefinedPrompt",
    "RewardOutput",
    "RewardWeights",
    "efe_loss",
    "gae",
    "grid_reward",
    "masked_mean_pool",
    "next_values",
    "policy_efe",
    "policy_gradient_loss",
    "refine_prompt",
    "rl_advantage",
    "rollout_states",
    "squashed_log_prob",
    "td_lambda",
    "vtrace",
]
