"""The public function `policy_gradient_loss`: what it takes and gives, and its checks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from efe_kernels.common import checks
from efe_kernels.common.arguments import constant, promoted
from efe_kernels.policy_loss import ops


class PolicyLossOutput(NamedTuple):
    """What `policy_gradient_loss` returns: 0-d tensors, float32, or float64 for float64 inputs.

    Attributes:
        total: policy + value_coef * value - entropy_coef * entropy. Differentiable.
        policy: the surrogate, minimised. Differentiable.
        value: mean squared error of the critic. Differentiable.
        entropy: mean entropy, which the total maximises. Differentiable.
        clip_fraction: share of elements whose ratio is further than clip from 1; 0 without old_log_prob.
        approx_kl: mean of ratio - 1 - log(ratio), an estimate of KL(old || new) that is never negative; 0 without
            old_log_prob.
        explained_variance: 1 - variance of the critic's error / variance of its target; 0 for a constant target.
    """

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    explained_variance: Tensor


def policy_gradient_loss(
    log_prob: Tensor,
    advantage: Tensor,
    value: Tensor,
    value_target: Tensor,
    entropy: Tensor,
    *,
    old_log_prob: Tensor | None = None,
    clip: float = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.01,
    mask: Tensor | None = None,
) -> PolicyLossOutput:
    """Actor-critic loss: the clipped surrogate of PPO, the critic's squared error and an entropy bonus.

    As means over the elements that count, with ratio = exp(log_prob - old_log_prob):

        policy = mean(-min(ratio * advantage, clamp(ratio, 1 - clip, 1 + clip) * advantage))
        value = mean((value - value_target)²)
        total = policy + value_coef * value - entropy_coef * mean(entropy)

    Without old_log_prob the policy term is the plain score function, mean(-log_prob * advantage).

    Differentiable in log_prob, value and entropy; advantage, value_target and old_log_prob are constants.

    Args:
        log_prob: log-probability of the action taken, any shape; float32, float16, bfloat16 or float64. The shape is
            that of every other tensor.
        advantage: advantage of the action; whitened by the caller where that is wanted.
        value: the critic's estimate.
        value_target: what it should be.
        entropy: entropy of the policy.
        old_log_prob: log_prob as it was when the action was taken.
        clip: how far the ratio may move from 1.
        value_coef: weight of the critic's error.
        entropy_coef: weight of the entropy.
        mask: bool; elements that are False count nowhere and get gradient 0, whatever they hold. Without an element
            that counts every result is 0.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device, or a clip that is not positive.

    Source: Schulman et al. 2017, "Proximal policy optimization algorithms"; Williams 1992 without old_log_prob.
    """
    old = {} if old_log_prob is None else {"old_log_prob": old_log_prob}
    checks.check_alike(
        log_prob=log_prob, value=value, entropy=entropy, advantage=advantage, value_target=value_target, **old
    )
    checks.check_mask("mask", mask, "log_prob", log_prob)
    clip = checks.number("clip", clip, 0, above=True, finite=False)
    value_coef = checks.number("value_coef", value_coef)
    entropy_coef = checks.number("entropy_coef", entropy_coef)
    constants = [None if tensor is None else constant(tensor) for tensor in (advantage, value_target, old_log_prob)]
    entropy, log_prob, value, *constants = promoted(entropy, log_prob, value, *constants)
    total, policy, value_loss, mean_entropy, diagnostics = ops.policy_gradient_loss(
        entropy, log_prob, value, *constants, mask, clip, value_coef, entropy_coef
    )
    return PolicyLossOutput(total, policy, value_loss, mean_entropy, *diagnostics[:3].unbind())
