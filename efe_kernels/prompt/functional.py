"""The public functions of prompt refinement: what they take and give, and their checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from efe_kernels.common import checks
from efe_kernels.common.arguments import one_episode
from efe_kernels.prompt import ops


def masked_mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the token vectors of each row, over the tokens that the mask keeps.

    Args:
        hidden: [N, L, E] hidden states, float32, float16, bfloat16 or float64, any strides; no copy is made.
        mask: [N, L], bool, integer or floating (a tokenizer's attention mask as it is): nonzero means token. It is not
            a weight: 0.5 counts as much as 1.

    Returns:
        [N, E] in the dtype of hidden, accumulated in float32 (float64 for float64). A row without a token gives 0. What
        is masked is not read, so NaN there is harmless, and its gradient is exactly 0.

    Without the batch dimension, [L, E] and [L], the result is [E].

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device.
    """
    checks.check_floating("hidden", hidden)
    sizes = checks.Sizes("hidden", hidden, "N? L E")
    sizes.check("mask", mask, "N? L", checks.check_real)
    batched = hidden.dim() == 3
    if not batched:
        hidden, mask = one_episode(hidden, mask)
    if mask.dtype != torch.bool:
        mask = mask != 0
    pooled, _ = ops.masked_mean_pool(hidden, mask)
    return pooled if batched else pooled[0]


class RefinedPrompt(NamedTuple):
    """What `refine_prompt` returns; without the dimension B for unbatched input. Every entry is differentiable.

    Attributes:
        prompt: [B, D], the refined prompt, in the dtype of the prompt given.
        action: [B, D+1], u, the sampled action before squashing; float32, or float64 for float64 input, as the next
            two.
        log_prob: [B], log-probability density of (Δ, α), in nats.
        entropy: [B], one-sample estimate of the entropy of (Δ, α), in nats.
    """

    prompt: Tensor
    action: Tensor
    log_prob: Tensor
    entropy: Tensor


def refine_prompt(
    prompt: Tensor,
    mean: Tensor,
    log_std: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | None = None,
    delta_scale: float = 0.2,
) -> RefinedPrompt:
    """Sample a refinement of a prompt embedding from a squashed Gaussian policy.

    With s = delta_scale and n the noise, u = mean + exp(log_std)·n is sampled, squashed to Δ = s·tanh(u[:D]) in (-s, s)
    and α = sigmoid(u[D]) in (0, 1), and blended: refined = (1 - α)·prompt + α·(prompt + Δ) = prompt + α·Δ.

    log_prob is the exact density of (Δ, α): the Normal log-density of u minus the log-determinants of the squashing,
    Σ_d (log s + log(1 - tanh²u_d)) + log σ'(u_D). entropy is the closed-form Gaussian entropy plus the same
    log-determinants at u. Both are stable for any |u|.

    Args:
        prompt: [B, D], float32, float16, bfloat16 or float64.
        mean: [B, D+1], the D components of Δ and then α, before squashing.
        log_std: [D+1] or [B, D+1], logarithm of the standard deviation of u, which below 2e-38 may be taken for 0.
        noise: [B, D+1] standard normal noise, a constant to the gradient. Give it to capture a CUDA graph, which would
            replay one seed for ever.
        seed: in [0, 2^63), the key of the counter-based noise (Philox4x32-10), which takes no state: one seed gives the
            same noise in every dtype, on CPU and CUDA, up to a few units in the last place of the normal transform.
            None draws a seed from torch's default CPU generator, so torch.manual_seed governs it.
        delta_scale: s, positive.

    Gradients reach prompt (the identity), mean and log_std as reparameterised with the noise fixed, from every entry
    of the result. Arithmetic is float32, or float64 if any argument is.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device or range, or both noise and seed.

    Source: Haarnoja et al., 2018, "Soft actor-critic", appendix C, for the squashed Gaussian; Salmon et al., 2011,
    "Parallel random numbers: as easy as 1, 2, 3", for the noise.
    """
    checks.check_floating("prompt", prompt)
    sizes = checks.Sizes("prompt", prompt, "B? D", **{"D+1": prompt.shape[-1] + 1 if prompt.dim() else 0})
    delta_scale = checks.number("delta_scale", delta_scale, 0, above=True)
    check_policy(sizes, "prompt", prompt, mean, log_std)
    sizes.check_optional("noise", noise, "B? D+1", checks.check_floating)
    if noise is not None and seed is not None:
        raise ValueError(f"seed must be None where noise is given, it was {seed!r}.")
    batched = prompt.dim() == 2
    if not batched:
        prompt, mean, noise = one_episode(prompt, mean, noise)
    key = seed_tensor(seed) if noise is None else None
    dtype = common_dtype(prompt, mean, log_std, noise)
    refined, action, log_prob, entropy = ops.refine_prompt(
        prompt.double() if dtype == torch.float64 else prompt, mean.to(dtype), log_std.to(dtype),
        None if noise is None else noise.detach().to(dtype), key, delta_scale,
    )  # fmt: skip
    refined = refined.to(prompt.dtype)
    if not batched:
        return RefinedPrompt(refined[0], action[0], log_prob[0], entropy[0])
    return RefinedPrompt(refined, action, log_prob, entropy)


def squashed_log_prob(
    action: Tensor, mean: Tensor, log_std: Tensor, *, delta_scale: float = 0.2
) -> tuple[Tensor, Tensor]:
    """log_prob and entropy of `refine_prompt` for a stored action, under a policy that may have changed since.

    Args:
        action: [B, D+1], u before squashing, as `refine_prompt` returns it; any floating dtype.
        mean: [B, D+1].
        log_std: [D+1] or [B, D+1].
        delta_scale: scale of Δ, positive; the one that refine_prompt had.

    Returns:
        log_prob [B], exact density of (Δ, α) in nats, and entropy [B], the closed-form Gaussian entropy plus the
        log-determinants of the squashing at u; float32, or float64 if any argument is. Without the dimension B in
        action and mean both are 0-d.

    Gradients reach action, mean and log_std. Stable for any |u|.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device or range.

    Source: Haarnoja et al., 2018, "Soft actor-critic", appendix C.
    """
    checks.check_floating("action", action)
    sizes = checks.Sizes("action", action, "B? D+1")
    delta_scale = checks.number("delta_scale", delta_scale, 0, above=True)
    check_policy(sizes, "action", action, mean, log_std)
    batched = action.dim() == 2
    if not batched:
        action, mean = one_episode(action, mean)
    dtype = common_dtype(action, mean, log_std)
    log_prob, entropy = ops.squashed_log_prob(action.to(dtype), mean.to(dtype), log_std.to(dtype), delta_scale)
    return (log_prob, entropy) if batched else (log_prob[0], entropy[0])


def check_policy(sizes: checks.Sizes, of: str, anchor: Tensor, mean: Tensor, log_std: Tensor) -> None:
    """mean [B, D+1] and log_std, which may lack B, beside the anchor named `of`."""
    if sizes.sizes["D+1"] < 2:
        raise ValueError(f"{of} must have at least one prompt dimension, its shape was {list(anchor.shape)}.")
    sizes.check("mean", mean, "B? D+1", checks.check_floating)
    checks.check_floating("log_std", log_std)
    sizes.check("log_std", log_std, "D+1" if log_std.dim() == 1 else "B? D+1")


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic: float64 if one of the tensors has it, else float32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def seed_tensor(seed: int | None) -> Tensor:
    """The seed as 0-d int64 on the CPU, which torch.compile can trace where an int would have to be baked in."""
    if seed is None:
        return torch.randint(2**63 - 1, (), device="cpu")
    seed = checks.integer("seed", seed, low=0)
    return torch.tensor(seed, dtype=torch.int64, device="cpu")
