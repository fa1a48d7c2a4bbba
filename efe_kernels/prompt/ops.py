"""The ops of prompt refinement. Their CPU and CUDA kernels are in csrc/prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from efe_kernels.common.library import accumulate_dtype
from efe_kernels.common.op import differentiable_op
from efe_kernels.prompt import reference


class Pooled(NamedTuple):
    pooled: Tensor  # [N, E]
    scale: Tensor  # [N], one over the number of tokens


class Refined(NamedTuple):
    refined: Tensor  # [B, D]
    action: Tensor  # [B, D+1]
    log_prob: Tensor  # [B]
    entropy: Tensor  # [B]


class Scored(NamedTuple):
    log_prob: Tensor  # [B]
    entropy: Tensor  # [B]


def pool_forward(hidden: Tensor, mask: Tensor) -> Pooled:
    dtype = accumulate_dtype(hidden)
    return Pooled(reference.masked_mean_pool(hidden, mask), reference.reciprocal_count(mask, dtype))


def pool_fake(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, _, width = hidden.shape
    return hidden.new_empty(rows, width), hidden.new_empty(rows, dtype=accumulate_dtype(hidden))


def pool_backward_fake(grad_pooled: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    return grad_pooled.new_empty(*mask.shape, grad_pooled.shape[1])


def noise_of(noise: Tensor | None, seed: Tensor | None, like: Tensor) -> Tensor:
    """The given noise, or that of the seed. like [B, D+1]."""
    if noise is not None:
        return noise
    assert seed is not None
    return reference.philox_normal(seed, like.shape[0], like.shape[1], dtype=like.dtype, device=like.device)


def refine_forward(
    prompt: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor | None, seed: Tensor | None, delta_scale: float
) -> Refined:
    return Refined(*reference.refine_prompt(prompt, mean, log_std, noise_of(noise, seed, mean), delta_scale))


def refine_fake(
    prompt: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor | None, seed: Tensor | None, delta_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, width = mean.shape
    return prompt.new_empty(prompt.shape), mean.new_empty(batch, width), mean.new_empty(batch), mean.new_empty(batch)


def refine_backward(
    grad_refined: Tensor | None,
    grad_action: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    action: Tensor,
    log_std: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    delta_scale: float,
    needs: list[bool],
) -> list[Tensor]:
    gradients = reference.refine_prompt_backward(
        or_zeros(grad_refined, action[:, :-1]),
        or_zeros(grad_action, action),
        or_zeros(grad_log_prob, action[:, 0]),
        or_zeros(grad_entropy, action[:, 0]),
        action, log_std, noise_of(noise, seed, action), delta_scale,
    )  # fmt: skip
    return wanted(gradients, needs)


def log_prob_forward(action: Tensor, mean: Tensor, log_std: Tensor, delta_scale: float) -> Scored:
    return Scored(*reference.squashed_log_prob(action, mean, log_std, delta_scale))


def log_prob_fake(action: Tensor, mean: Tensor, log_std: Tensor, delta_scale: float) -> tuple[Tensor, Tensor]:
    batch = action.shape[0]
    return action.new_empty(batch), action.new_empty(batch)


def log_prob_backward(
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    action: Tensor,
    mean: Tensor,
    log_std: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    grad_log_prob, grad_entropy = (or_zeros(grad, action[:, 0]) for grad in (grad_log_prob, grad_entropy))
    return wanted(reference.squashed_log_prob_backward(grad_log_prob, grad_entropy, action, mean, log_std), needs)


def or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def wanted(tensors: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor]:
    return [tensor for tensor, need in zip(tensors, needs, strict=True) if need]


masked_mean_pool = differentiable_op(
    "masked_mean_pool",
    forward=pool_forward,
    backward=reference.masked_mean_pool_backward,
    wrt=("hidden",),
    fake=pool_fake,
    fake_backward=pool_backward_fake,
)
refine_prompt = differentiable_op(
    "refine_prompt",
    forward=refine_forward,
    backward=refine_backward,
    wrt=("prompt", "mean", "log_std"),
    fake=refine_fake,
    like={"mean": "action"},
    passes={"prompt": "refined"},  # refined = prompt + α·Δ
)
squashed_log_prob = differentiable_op(
    "squashed_log_prob",
    forward=log_prob_forward,
    backward=log_prob_backward,
    wrt=("action", "mean", "log_std"),
    fake=log_prob_fake,
)
