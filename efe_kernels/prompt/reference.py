"""Prompt refinement in plain PyTorch: the definition, used by tests and benchmarks and where no kernel exists.

Every forward is differentiable by autograd; the backwards below it are the same derivatives written out, which is what
the ops fall back to. Arithmetic is float64 for float64 tensors and float32 otherwise.

Notation: u the action before squashing, n standard normal noise, s = delta_scale, D the prompt dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from efe_kernels.common.library import accumulate_dtype

UINT32 = 0xFFFFFFFF
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10


def masked_mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each row; a row without a token gives 0. hidden [N, L, E], mask [N, L] bool -> [N, E]."""
    tokens = torch.where(mask[..., None], hidden.to(accumulate_dtype(hidden)), 0)
    return (tokens.sum(1) * reciprocal_count(mask, tokens.dtype)[:, None]).to(hidden.dtype)


def reciprocal_count(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / tokens of each row, 0 for a row without a token. mask [N, L] bool -> [N]."""
    count = mask.sum(1)
    return torch.where(count > 0, 1 / count.clamp_min(1).to(dtype), 0)


def masked_mean_pool_backward(grad_pooled: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """grad_pooled [N, E], mask [N, L] bool, scale [N] = reciprocal_count -> gradient of hidden [N, L, E]."""
    row = (grad_pooled.to(scale.dtype) * scale[:, None]).to(grad_pooled.dtype)
    return torch.where(mask[..., None], row[:, None, :], 0)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011), the counter-based generator. Every word is an int64 tensor in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = multiply_words(c0, PHILOX_MULTIPLIERS[0])
        high1, low1 = multiply_words(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + PHILOX_KEY_STEPS[0]) & UINT32
        k1 = (k1 + PHILOX_KEY_STEPS[1]) & UINT32
    return c0, c1, c2, c3


def multiply_words(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word · factor, in halves because the product of two 32-bit words overflows int64."""
    low = (word & 0xFFFF) * factor
    high = (word >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_normal(seed: Tensor, rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal noise [rows, width] from `seed`, a 0-d int64 tensor.

    Element (b, d) is output d % 4 of Philox with the seed as key and (d // 4, 0, low word of b, high word of b) as
    counter, so it depends on the seed and its place alone, not on how many rows or columns there are. Of each word the
    upper 24 bits are used: such uniforms are exact in float32, so every dtype and device sees the same ones, and the
    Box-Muller transform of them agrees to the rounding of log, sqrt, sin and cos. |n| is at most 5.77.
    """
    seed = seed.to(device)
    quad = torch.arange((width + 3) // 4, device=device).expand(rows, -1)
    row = torch.arange(rows, device=device)[:, None].expand_as(quad)
    x0, x1, x2, x3 = philox4x32(
        (quad, torch.zeros_like(quad), row & UINT32, row >> 32), (seed & UINT32, (seed >> 32) & UINT32)
    )
    quads = torch.stack([*box_muller(x0, x1), *box_muller(x2, x3)], dim=-1)
    return quads.flatten(1)[:, :width].to(dtype)


def box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two words of 32 random bits -> two independent standard normals, in float64."""
    uniform = ((first >> 8) + 1).double() * 2.0**-24
    half_turns = (((second >> 8) ^ 2**23) - 2**23).double() * 2.0**-23  # as a signed number, in [-1, 1)
    radius = torch.sqrt(-2 * torch.log(uniform))
    return radius * torch.cos(math.pi * half_turns), radius * torch.sin(math.pi * half_turns)


def log_tanh_slope(u: Tensor) -> Tensor:
    """log(1 - tanh(u)^2) = 2 (ln 2 - u - softplus(-2u)), written for |u| so that nothing cancels on either side."""
    return 2 * (math.log(2) - u.abs() - F.softplus(-2 * u.abs()))


def log_sigmoid_slope(u: Tensor) -> Tensor:
    """log σ'(u) = -u - 2 softplus(-u), written for |u|: σ' is even."""
    return -u.abs() - 2 * F.softplus(-u.abs())


def log_determinant(action: Tensor, delta_scale: float) -> Tensor:
    """log |det| of the Jacobian of u -> (Δ, α). action [B, D+1] -> [B]."""
    dimension = action.shape[1] - 1
    slopes = log_tanh_slope(action[:, :-1]).sum(1) + log_sigmoid_slope(action[:, -1])
    return slopes + dimension * math.log(delta_scale)


def log_determinant_slope(action: Tensor) -> Tensor:
    """Derivative of log_determinant by u: -2 tanh(u) for Δ, 1 - 2σ(u) = -tanh(u / 2) for α."""
    return torch.cat([-2 * torch.tanh(action[:, :-1]), -torch.tanh(action[:, -1:] / 2)], 1)


def score(noise: Tensor, log_std: Tensor, action: Tensor, delta_scale: float) -> tuple[Tensor, Tensor]:
    """log_prob and entropy [B] of (Δ, α) from n = (u - mean) / std, log_std [B, D+1] and u."""
    determinant = log_determinant(action, delta_scale)
    log_normal = (-0.5 * noise * noise - log_std - 0.5 * math.log(2 * math.pi)).sum(1)
    gaussian_entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(1)
    return log_normal - determinant, gaussian_entropy + determinant


def refine_prompt(
    prompt: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor, delta_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prompt [B, D]; mean, noise [B, D+1]; log_std [D+1] or [B, D+1]; the last three in one dtype, float32 or float64.

    Returns refined [B, D] in the dtype of prompt, and action [B, D+1], log_prob [B], entropy [B] in the dtype of mean.
    """
    log_std = log_std.expand_as(mean)
    action = mean + torch.exp(log_std) * noise
    delta = delta_scale * torch.tanh(action[:, :-1])
    alpha = torch.sigmoid(action[:, -1:])
    refined = (prompt.to(mean.dtype) + alpha * delta).to(prompt.dtype)
    return refined, action, *score(noise, log_std, action, delta_scale)


def refine_prompt_backward(
    grad_refined: Tensor,
    grad_action: Tensor,
    grad_log_prob: Tensor,
    grad_entropy: Tensor,
    action: Tensor,
    log_std: Tensor,
    noise: Tensor,
    delta_scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of mean [B, D+1] and log_std (its shape). That of prompt is grad_refined itself.

    With the noise fixed, u = mean + std·n is the only way to the mean, and log N(u) = -n²/2 - log_std - const does not
    depend on u. With J = log_determinant, the gradient that arrives at u is
        g_u = grad_refined · ∂refined/∂u + grad_action + (grad_entropy - grad_log_prob) · J'(u)
    and then ∂mean = g_u, ∂log_std = g_u · std · n + (grad_entropy - grad_log_prob).
    """
    tanh = torch.tanh(action[:, :-1])
    alpha = torch.sigmoid(action[:, -1:])
    grad_refined = grad_refined.to(action.dtype)
    grad_delta = grad_refined * alpha * delta_scale * torch.exp(log_tanh_slope(action[:, :-1]))
    grad_alpha = (grad_refined * tanh).sum(1, keepdim=True) * delta_scale * torch.exp(log_sigmoid_slope(action[:, -1:]))
    grad_determinant = (grad_entropy - grad_log_prob)[:, None]
    grad_mean = torch.cat([grad_delta, grad_alpha], 1) + grad_action + grad_determinant * log_determinant_slope(action)
    grad_log_std = grad_mean * torch.exp(log_std) * noise + grad_determinant
    return grad_mean, grad_log_std.sum_to_size(log_std.shape)


def squashed_log_prob(action: Tensor, mean: Tensor, log_std: Tensor, delta_scale: float) -> tuple[Tensor, Tensor]:
    """log_prob and entropy [B] of (Δ, α) at u. action, mean [B, D+1], log_std [D+1] or [B, D+1], in one dtype."""
    log_std = log_std.expand_as(mean)
    return score((action - mean) * torch.exp(-log_std), log_std, action, delta_scale)


def squashed_log_prob_backward(
    grad_log_prob: Tensor, grad_entropy: Tensor, action: Tensor, mean: Tensor, log_std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of action, mean [B, D+1] and log_std (its shape).

    With n = (u - mean) / std: ∂mean = grad_log_prob · n / std, ∂u = -∂mean + (grad_entropy - grad_log_prob) · J'(u),
    ∂log_std = grad_log_prob · (n² - 1) + grad_entropy.
    """
    grad_log_prob, grad_entropy = grad_log_prob[:, None], grad_entropy[:, None]
    inverse_std = torch.exp(-log_std)
    noise = (action - mean) * inverse_std
    grad_mean = grad_log_prob * noise * inverse_std
    grad_action = (grad_entropy - grad_log_prob) * log_determinant_slope(action) - grad_mean
    grad_log_std = grad_log_prob * (noise * noise - 1) + grad_entropy
    return grad_action, grad_mean, grad_log_std.sum_to_size(log_std.shape)
