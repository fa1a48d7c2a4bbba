"""Each op as one writes it by hand for speed in plain PyTorch: what the kernels are measured against, eager and through
torch.compile. Less general than the references, which serve whatever the contract allows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from efe_kernels import EFEWeights


def efe_loss(inputs: dict[str, Any], weights: EFEWeights, hard_cell: bool) -> tuple[Tensor]:
    """Mean over the episodes, from the final step of the plan and with the entropy of the plan as its ambiguity."""
    logits = inputs["logits"].float()
    valid, target, preference_logits = inputs["valid"], inputs["target"], inputs["preference_logits"]
    if valid is None:
        valid = torch.ones_like(target, dtype=torch.bool)
    steps, cells = logits.shape[1], valid.sum((1, 2))
    counted = valid[:, None].float()
    log_q = logits.log_softmax(-1)
    q = log_q.exp()

    def mean(values: Tensor) -> Tensor:
        return (values * counted).sum((1, 2, 3)) / (cells * values.shape[1])

    total = torch.zeros_like(cells, dtype=torch.float32)
    if weights.risk or weights.anchor:
        scales = 1.0 if inputs["prompt"] is None else inputs["prompt"][:, None, None, : logits.shape[-1]].sigmoid()
        log_c = (preference_logits * scales).log_softmax(-1)
    if weights.risk:
        total = total + weights.risk * mean((q * (log_q - log_c.unsqueeze(-4))).sum(-1))
    if weights.agreement and inputs["backward_logits"] is None:
        # Over all steps both halves of the divergences from the plan read backwards are the same sum.
        log_mean = torch.logaddexp(log_q, log_q.flip(1)) - math.log(2)
        total = total + weights.agreement * mean((q * (log_q - log_mean)).sum(-1))
    elif weights.agreement:
        log_r = inputs["backward_logits"].float().log_softmax(-1)
        log_mean = torch.logaddexp(log_q, log_r) - math.log(2)
        divergence = (q * (log_q - log_mean) + log_r.exp() * (log_r - log_mean)).sum(-1)
        total = total + weights.agreement * mean(0.5 * divergence)
    if weights.consistency:
        total = total - weights.consistency * mean(log_q[:, -1:].gather(-1, target[:, None, ..., None])[..., 0])
    if weights.anchor:
        anchor = (log_c.exp() * (log_c - inputs["target_preference"].clamp_min(1e-8).log())).sum(-1)
        total = total + weights.anchor * mean(anchor.expand(target.shape)[:, None])
    if weights.prompt:
        z = torch.einsum("bthwc,bhw->btc", logits, counted[:, 0])
        u = F.linear(inputs["prompt"], inputs["projection"])
        cosine = F.cosine_similarity(z - z.mean(-1, keepdim=True), u[:, None], -1)
        total = total - weights.prompt * cosine.mean(1)
    if weights.step:
        total = total + weights.step * cells * steps / 900
    if hard_cell:
        missed = ((logits[:, -1].argmax(-1) != target) & valid).sum((1, 2)) / cells
        total = total * (0.5 + 0.5 * missed)
    return (total.mean(),)


def masked_mean_pool(inputs: dict[str, Tensor]) -> tuple[Tensor]:
    """A product of the mask and the hidden states."""
    hidden, mask = inputs["hidden"], inputs["mask"]
    return (torch.bmm(mask[:, None].to(hidden.dtype), hidden)[:, 0] / mask.sum(1, keepdim=True),)


def gae(inputs: dict[str, Any], gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    dtype = inputs["reward"].dtype
    value, delta, going_on = temporal_difference(inputs, gamma)
    advantage = backward_in_time(delta, gamma * lam * going_on)
    return advantage.to(dtype), (advantage + value).to(dtype)


def vtrace(inputs: dict[str, Any], gamma: float) -> tuple[Tensor, Tensor]:
    dtype = inputs["reward"].dtype
    value, error, going_on = temporal_difference(inputs, gamma)
    weight = inputs["log_ratio"].float().exp().clamp(max=1.0)
    delta = weight * error
    excess = backward_in_time(delta, gamma * weight * going_on)
    following = torch.cat([excess[:, 1:], torch.zeros_like(excess[:, :1])], 1)
    return (delta + gamma * weight * going_on * following).to(dtype), (excess + value).to(dtype)


def td_lambda(inputs: dict[str, Any], gamma: float, lam: float) -> tuple[Tensor]:
    """R_t = r_t + gamma ((1 - lam) v_{t+1} + lam R_{t+1}), bootstrapped where the trace stops."""
    next_value = gamma * (~inputs["terminated"]).float() * inputs["next_value"].float()
    carried = lam * (~stops(inputs)).float()
    # At the last step the trace stops, too.
    carried = torch.cat([carried[:, :-1], torch.zeros_like(carried[:, :1])], 1)
    term = inputs["reward"].float() + (1 - carried) * next_value
    return (backward_in_time(term, gamma * carried).to(inputs["reward"].dtype),)


def stops(inputs: dict[str, Any]) -> Tensor:
    """Where the trace stops."""
    terminated: Tensor = inputs["terminated"]
    truncated = inputs["truncated"]
    return terminated if truncated is None else terminated | truncated


def temporal_difference(inputs: dict[str, Any], gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """value, reward + gamma · next_value - value and, as 0 or 1, where the trace goes on; in float32."""
    value = inputs["value"].float()
    bootstrap = gamma * (~inputs["terminated"]).float() * inputs["next_value"].float()
    return value, inputs["reward"].float() + bootstrap - value, (~stops(inputs)).float()


def backward_in_time(term: Tensor, factor: Tensor) -> Tensor:
    """x_t = term_t + factor_t x_{t+1}, over columns that lie side by side in memory and without writing into slices,
    which torch.compile does not fuse."""
    terms, factors = term.t().contiguous().unbind(), factor.t().contiguous().unbind()
    following = torch.zeros_like(terms[0])
    steps = []
    for one, carried in zip(reversed(terms), reversed(factors), strict=True):
        following = torch.addcmul(one, carried, following)
        steps.append(following)
    return torch.stack(steps[::-1], 1)


def ppo_loss(inputs: dict[str, Any]) -> tuple[Tensor]:
    """The clipped surrogate with a critic and an entropy, every element counted alike."""
    ratio = (inputs["log_prob"] - inputs["old_log_prob"]).exp()
    advantage, mask = inputs["advantage"], inputs["mask"]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    each = 0.5 * (inputs["value"] - inputs["value_target"]).square() - surrogate - 0.01 * inputs["entropy"]
    return (each.mean() if mask is None else (each * mask).sum() / mask.sum(),)


def grpo_loss(inputs: dict[str, Any]) -> tuple[Tensor]:
    """The clipped surrogate with the k3 estimate of the divergence, each row counted alike."""
    log_prob, mask = inputs["log_prob"], inputs["mask"]
    ratio = (log_prob - inputs["old_log_prob"]).exp()
    advantage = inputs["advantage"][:, None]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    back = inputs["ref_log_prob"] - log_prob
    each = 0.04 * (back.exp() - back - 1) - surrogate
    return (((each * mask).sum(-1) / mask.sum(-1)).mean(),)
