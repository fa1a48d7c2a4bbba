"""The public function `policy_gradient_loss`: what it takes and gives, and its checks."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from efe_kernels.common import checks
from efe_kernels.common.arguments import constant, promoted
from efe_kernels.common.library import accumulate_dtype
from efe_kernels.policy_loss import ops
from efe_kernels.policy_loss.reference import Inputs, Outputs, Settings

Aggregation = Literal["mean", "sequence_mean", "constant"]
Level = Literal["token", "sequence"]
AGGREGATIONS, LEVELS = get_args(Aggregation), get_args(Level)


class PolicyLossOutput(NamedTuple):
    """What `policy_gradient_loss` returns: 0-d tensors, float32, or float64 for float64 inputs.

    The losses are aggregated as `aggregation` says. Those of parts that are not there are 0. The other fields are
    plain means over the elements that count, constants for autograd; of the ratio they are 0 without old_log_prob, and
    with level="sequence" the rows are its elements.

    Attributes:
        total: policy + value_coef * value - entropy_coef * entropy + kl_coef * kl. Differentiable.
        policy: the surrogate, minimised. Differentiable.
        value: squared error of the critic. Differentiable.
        entropy: entropy, which the total maximises. Differentiable.
        clip_fraction: share of elements whose ratio is below 1 - clip or above 1 + clip_high.
        approx_kl: mean of ratio - 1 - log(ratio), an estimate of KL(old || new) that is never negative.
        explained_variance: 1 - variance of the critic's error / variance of its target; 0 for a constant target.
        kl: estimate of KL(new || reference) that is never negative. Differentiable.
        clip_fraction_low: share of elements with a ratio below 1 - clip and a negative advantage: the clip holds them.
        clip_fraction_high: the same for a ratio above 1 + clip_high and a positive advantage.
    """

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    explained_variance: Tensor
    kl: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor


def policy_gradient_loss(
    log_prob: Tensor,
    advantage: Tensor,
    value: Tensor | None = None,
    value_target: Tensor | None = None,
    entropy: Tensor | None = None,
    *,
    old_log_prob: Tensor | None = None,
    clip: float = 0.2,
    clip_high: float | None = None,
    value_clip: float | None = None,
    old_value: Tensor | None = None,
    value_coef: float = 0.5,
    entropy_coef: float = 0.01,
    ref_log_prob: Tensor | None = None,
    kl_coef: float = 0.0,
    dual_clip: float | None = None,
    aggregation: Aggregation = "mean",
    normalizer: float | None = None,
    level: Level = "token",
    mask: Tensor | None = None,
) -> PolicyLossOutput:
    """Policy-gradient loss: the clipped surrogate of PPO, and where asked for a critic's error, entropy bonus and KL.

    With A the advantage, ratio = exp(log_prob - old_log_prob) and d = ref_log_prob - log_prob, as means over the
    elements that count, or as `aggregation` says:

        policy = mean(-min(ratio * A, clamp(ratio, 1 - clip, 1 + clip_high) * A))
        value = mean((value - value_target)²)
        kl = mean(exp(d) - 1 - d)
        total = policy + value_coef * value - entropy_coef * mean(entropy) + kl_coef * kl

    Without old_log_prob the policy term is the plain score function, mean(-log_prob * A), and the settings of the ratio
    are not read. With dual_clip, min(...) is at least dual_clip * A where A < 0. With value_clip, the squared error is
    the larger one of value and of old_value + clamp(value - old_value, -value_clip, value_clip).

    Differentiable in log_prob, value and entropy; the other tensors are constants. What is left out costs nothing.

    Args:
        log_prob: log-probability of the action taken, any shape; float32, float16, bfloat16 or float64. The shape is
            that of every other tensor. Rows are those of its last dimension, such as the tokens of an answer.
        advantage: advantage of the action, whitened by the caller where that is wanted; for log_prob [..., L] of at
            least two dimensions also one for each row, [...] or [..., 1].
        value: the critic's estimate.
        value_target: what it should be; given with value.
        entropy: entropy of the policy.
        old_log_prob: log_prob as it was when the action was taken.
        clip: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1; None: clip.
        value_clip: how far value may move from old_value, in units of the value; None: any distance.
        old_value: value as it was when the action was taken; read only with value_clip.
        value_coef: weight of the critic's error.
        entropy_coef: weight of the entropy.
        ref_log_prob: log-probability of the action under the policy that this one is to stay near.
        kl_coef: weight of the KL divergence from that policy; other than 0 it needs ref_log_prob.
        dual_clip: above 1, the ratio from which on a loss grows no further; None: it grows.
        aggregation: "mean" over the elements that count; "sequence_mean": over those of each row, then over the rows
            that have one; "constant": the sum divided by `normalizer`. Of policy, value, entropy and kl alike.
        normalizer: positive; with aggregation="constant" only.
        level: "sequence": every element of a row has the ratio exp(mean of log_prob - old_log_prob over the row's
            elements that count). Needs old_log_prob and an advantage for each row. Such a ratio stays close to 1: its
            authors clip at some 1e-4.
        mask: bool; elements that are False count nowhere and get gradient 0, whatever they hold. Without an element
            that counts every result is 0.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device, a setting out of range, or one argument without another that it needs.

    Source: Schulman et al. 2017, "Proximal policy optimization algorithms"; Williams 1992 without old_log_prob;
    value_clip as in the code of PPO by Dhariwal et al. 2017, "OpenAI Baselines"; clip_high: Yu et al. 2025, "DAPO";
    dual_clip: Ye et al. 2020, "Mastering complex control in MOBA games with deep reinforcement learning"; kl: k3 of
    Schulman 2020, "Approximating KL divergence"; "sequence_mean": Shao et al. 2024, "DeepSeekMath"; "constant": Liu et
    al. 2025, "Understanding R1-Zero-like training"; level="sequence": Zheng et al. 2025, "Group sequence policy
    optimization".
    """
    if (value is None) != (value_target is None):
        given, missing = ("value", "value_target") if value_target is None else ("value_target", "value")
        raise ValueError(f"{missing} must be given with {given}, it was None.")
    tensors = {
        "value": value, "entropy": entropy, "value_target": value_target, "old_log_prob": old_log_prob,
        "old_value": old_value, "ref_log_prob": ref_log_prob,
    }  # fmt: skip
    checks.check_alike(log_prob=log_prob, **{name: tensor for name, tensor in tensors.items() if tensor is not None})
    checks.check_mask("mask", mask, "log_prob", log_prob)
    check_advantage(advantage, log_prob)
    clip = limit("clip", clip, 0)
    settings = Settings(
        1 - clip,
        1 + (clip if clip_high is None else limit("clip_high", clip_high, 0)),
        math.inf if dual_clip is None else limit("dual_clip", dual_clip, 1),
        math.inf if value_clip is None else limit("value_clip", value_clip, 0),
        checks.number("value_coef", value_coef),
        checks.number("entropy_coef", entropy_coef),
        checks.number("kl_coef", kl_coef),
        normalizer_of(aggregation, normalizer),
    )
    checks.check_choice("level", level, LEVELS)
    if settings.kl_coef != 0 and ref_log_prob is None:
        raise ValueError("ref_log_prob must be given with kl_coef, it was None.")
    if value_clip is None:
        old_value = None
    elif value is not None and old_value is None:
        raise ValueError("old_value must be given with value_clip, it was None.")
    # In the order of Inputs.
    constants = (advantage, value_target, old_log_prob, old_value, ref_log_prob)
    entropy, log_prob, value, advantage, value_target, old_log_prob, old_value, ref_log_prob = promoted(
        entropy, log_prob, value, *[None if tensor is None else constant(tensor) for tensor in constants]
    )
    inputs = Inputs(log_prob, advantage, value, value_target, old_log_prob, old_value, ref_log_prob, mask, None)
    outputs = (sequence_level if level == "sequence" else token_level)(entropy, inputs, settings, aggregation)
    total, policy, value_loss, mean_entropy, kl, diagnostics = outputs
    clip_fraction, approx_kl, explained_variance, low, high, _ = diagnostics.unbind()
    return PolicyLossOutput(
        total, policy, value_loss, mean_entropy, clip_fraction, approx_kl, explained_variance, kl, low, high
    )


def limit(name: str, value: float, low: float) -> float:
    """A number above `low`, perhaps infinite."""
    return checks.number(name, value, low, above=True, finite=False)


def check_advantage(advantage: Tensor, log_prob: Tensor) -> None:
    """One for each element, or for each row."""
    checks.check_floating("advantage", advantage)
    if advantage.shape != log_prob.shape and not is_of_rows(advantage, log_prob):
        of_rows = f" or one for each row, {list(log_prob.shape[:-1])}" if log_prob.dim() > 1 else ""
        raise ValueError(
            f"advantage must have the shape of log_prob = {list(log_prob.shape)}{of_rows}, it was "
            f"{list(advantage.shape)}."
        )
    checks.check_device("advantage", advantage, "log_prob", log_prob.device)


def is_of_rows(advantage: Tensor, log_prob: Tensor) -> bool:
    rows = log_prob.shape[:-1]
    return log_prob.dim() > 1 and advantage.shape in (rows, (*rows, 1))


def normalizer_of(aggregation: str, normalizer: float | None) -> float:
    """As Settings has it."""
    checks.check_choice("aggregation", aggregation, AGGREGATIONS)
    if aggregation == "constant":
        if normalizer is None:
            raise ValueError("normalizer must be given with aggregation='constant', it was None.")
        return checks.number("normalizer", normalizer, 0, above=True)
    if normalizer is not None:
        raise ValueError(
            f"normalizer must be None with aggregation={aggregation!r}, it was {checks.described(normalizer)}."
        )
    return 0.0


def token_level(entropy: Tensor | None, inputs: Inputs, settings: Settings, aggregation: str) -> Outputs:
    mask = inputs.mask
    if aggregation == "sequence_mean" and mask is not None:  # without a mask all rows are equally long
        count = mask.sum(-1, dtype=accumulate_dtype(inputs.log_prob))
        weight = (count.clamp_min(1) * count.count_nonzero()).reciprocal()
        inputs, settings = inputs._replace(weight=weight), settings._replace(normalizer=1.0)
    return Outputs(*ops.policy_gradient_loss(entropy, *inputs, *settings))


def sequence_level(entropy: Tensor | None, inputs: Inputs, settings: Settings, aggregation: str) -> Outputs:
    """The surrogate of the rows, and with a term beside it those terms of their elements."""
    log_prob, advantage, old_log_prob, mask = inputs.log_prob, inputs.advantage, inputs.old_log_prob, inputs.mask
    if old_log_prob is None:
        raise ValueError("old_log_prob must be given with level='sequence', it was None.")
    rows = log_prob.shape[:-1]
    if log_prob.dim() < 2:
        raise ValueError(
            f"log_prob must have at least two dimensions with level='sequence', its shape was {list(log_prob.shape)}."
        )
    if not is_of_rows(advantage, log_prob):
        raise ValueError(
            f"advantage must have the shape {list(rows)}, one for each row of log_prob, with level='sequence', it was "
            f"{list(advantage.shape)}."
        )
    dtype, length = accumulate_dtype(log_prob), log_prob.shape[-1]
    log_ratio, weight, some = log_prob.to(dtype) - old_log_prob.to(dtype), None, None
    row_settings = settings
    if mask is None and length > 0:
        log_ratio, row_settings = log_ratio.mean(-1), settings._replace(normalizer=settings.normalizer / length)
    else:
        mask = torch.ones_like(log_prob, dtype=torch.bool) if mask is None else mask
        count = mask.sum(-1, dtype=dtype)
        log_ratio, some = torch.where(mask, log_ratio, 0).sum(-1) / count.clamp_min(1), count > 0
        if aggregation == "constant":
            weight = count
        elif aggregation == "mean":
            weight, row_settings = count / count.sum(), settings._replace(normalizer=1.0)
    row_inputs = Inputs(
        log_ratio, advantage.reshape(rows).to(dtype), None, None, torch.zeros_like(log_ratio), None, None, some, weight
    )
    found = Outputs(*ops.policy_gradient_loss(None, *row_inputs, *row_settings))
    if entropy is None and inputs.value is None and inputs.ref_log_prob is None:
        return found
    rest = token_level(
        entropy, inputs._replace(advantage=advantage.new_zeros(1), old_log_prob=None), settings, aggregation
    )
    clip_fraction, approx_kl, _, low, high, count = found.diagnostics.unbind()
    diagnostics = torch.stack([clip_fraction, approx_kl, rest.diagnostics[2], low, high, count])
    return rest._replace(total=found.total + rest.total, policy=found.policy, diagnostics=diagnostics)
