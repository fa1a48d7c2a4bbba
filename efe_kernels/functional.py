"""Every public function of the library.

Each checks its arguments once and hands them to the autograd Function of its family. Shapes are written as in the
mathematics: B episodes, T planning steps, H x W grid cells, C outcomes, D prompt dimension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from efe_kernels.advantage.ops import rl_advantage as rl_advantage_op
from efe_kernels.common import checks
from efe_kernels.common.autograd import apply
from efe_kernels.efe_loss.ops import EFELossFunction
from efe_kernels.efe_loss.reference import TERMS as EFE_TERMS
from efe_kernels.policy_loss.ops import policy_gradient_loss as policy_gradient_loss_op
from efe_kernels.prompt.ops import MaskedMeanPoolFunction, RefinePromptFunction, SquashedLogProbFunction
from efe_kernels.returns.ops import trace
from efe_kernels.reward.ops import grid_reward as grid_reward_op
from efe_kernels.reward.reference import REWARD_TERMS, colours
from efe_kernels.reward.reference import reversibility as reversibility_score


@dataclass(frozen=True)
class EFEWeights:
    """Weight of each term of the EFE loss. A weight of 0 removes the term from the total; it is still reported."""

    risk: float = 1.0
    ambiguity: float = 0.0
    consistency: float = 2.0
    agreement: float = 0.5
    anchor: float = 0.2
    prompt: float = 0.3
    step: float = 0.1


class EFELossOutput(NamedTuple):
    """What `efe_loss` returns; float32, or float64 for float64 logits. Unbatched input gives 0-d entries.

    total: the loss, 0-d, or [B] with reduction="none". Differentiable.
    terms: risk, ambiguity, consistency, agreement, anchor, prompt, step -> [B], unweighted. Differentiable.
    mask_ratio: [B], share of counted cells whose most probable outcome is not the target.
    hard_cell_scale: [B], the factor on the weighted sum of the terms.
    """

    total: Tensor
    terms: dict[str, Tensor]
    mask_ratio: Tensor
    hard_cell_scale: Tensor


def efe_loss(
    logits: Tensor,
    target: Tensor,
    preference_logits: Tensor,
    *,
    backward_logits: Tensor | None = None,
    final_logits: Tensor | None = None,
    observation_probs: Tensor | None = None,
    prompt: Tensor | None = None,
    projection: Tensor | None = None,
    target_preference: Tensor | None = None,
    valid: Tensor | None = None,
    weights: EFEWeights = EFEWeights(),
    hard_cell: bool = True,
    hard_cell_min_ratio: float = 0.0,
    max_cells: int = 900,
    ignore_index: int = -100,
    reduction: str = "mean",
    grad_scale: Tensor | None = None,
) -> EFELossOutput:
    """Expected Free Energy of a plan over a grid of categorical outcomes, with hard-cell masking.

    With q = softmax(logits), r = softmax(backward_logits) and c the preference distribution, per episode, in nats, as
    means over the counted cells (and over the steps):

    - risk: KL(q || c), c = softmax(preference_logits * sigmoid(prompt[:C])), or softmax(preference_logits)
    - ambiguity: entropy of observation_probs, of q where they are not given
    - consistency: cross-entropy of the final logits against the target
    - agreement: Jensen-Shannon divergence of q and r, in [0, ln 2]
    - anchor: KL(c || target_preference)
    - prompt: minus the mean cosine of z_t and projection @ prompt, z_t = mean over cells of (logits_t - their mean
      over C); 0 without prompt or projection
    - step: T * number of counted cells / max_cells, a constant

    total = hard_cell_scale * sum(weight * term). Every term is minimised. With mask_ratio the share of counted cells
    whose argmax misses the target, hard_cell_scale = 0.5 + 0.5 * mask_ratio, a constant for the gradient.

    Args:
        logits: [B, T, H, W, C] forward logits, float32, float16, bfloat16 or float64, any strides. The memory order
            [B, T, C, H, W] (a permuted view) is the fastest. Arithmetic is float32, float64 for float64, whatever
            the dtype of the other arguments. On CUDA each shape [T, H, W, C] and layout is compiled once, at its
            first use; more than 32 outcomes are served by plain PyTorch.
        target: [B, H, W], any integer dtype, in [0, C) or ignore_index.
        preference_logits: [H', W', C] or [B, H', W', C] with H' >= H and W' >= W; the top-left part is read.
        backward_logits: [B, T, H, W, C]; None reads the plan backwards, R_t = logits_{T-1-t}.
        final_logits: [B, H, W, C]; None takes the last step of logits.
        observation_probs: [B, T, H, W, C] probabilities; None takes q.
        prompt: [B, D] with D >= C.
        projection: [C, D].
        target_preference: [H', W', C], a running mean of one-hot targets; a cell whose row sums to 0 is not set.
        valid: [B, H, W] bool; cells that are False contribute nothing and get a gradient of exactly 0.
        weights: weight of each term.
        hard_cell: False switches the hard-cell scale off.
        hard_cell_min_ratio: below this mask ratio the scale is 1.
        max_cells: cells of the largest grid, the unit of the step term.
        ignore_index: the target of a cell that does not count.
        reduction: of the total over B, "mean", "sum" or "none".
        grad_scale: 0-d tensor on the device of logits, the upstream gradient of the total that the caller promises:
            the weight of this loss times the scale of a GradScaler. On CUDA one read of the logits then gives loss
            and gradients, and a backward whose upstream gradient is that very number has nothing more to compute. A
            hint for speed with large batches, on which results never depend; it is not taken where there is a prompt
            term, whose gradient in one cell depends on all others, and under torch.compile.

    Without the batch dimension B in logits (and in every other argument that has it) results are 0-d.

    Raises:
        TypeError: for a wrong dtype, such as a floating-point target.
        ValueError: for a wrong shape, device or reduction, and on the CPU for a target out of range. On CUDA, where
            looking would cost a synchronisation, such a target makes the episode's loss NaN.

    Source: the equations of active inference with categorical outcomes (Da Costa et al., 2020, "Active inference on
    discrete state-spaces: a synthesis"), with the consistency, agreement and prompt terms of ARC-EFE planners.
    """
    checks.check_floating("logits", logits)
    if logits.dim() not in (4, 5):
        raise ValueError(f"logits must have the shape [B, T, H, W, C] or [T, H, W, C], it was {list(logits.shape)}.")
    height, width = logits.shape[-3:-1]
    preference_logits = top_left("preference_logits", preference_logits, height, width)
    if target_preference is not None:
        target_preference = top_left("target_preference", target_preference, height, width)
    target = checks.integer_tensor("target", target)
    check_efe_arguments(
        logits, target, preference_logits, backward_logits, final_logits, observation_probs, prompt, projection,
        target_preference, valid,
    )  # fmt: skip
    checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    settings = (
        settings_of("weights", weights, EFEWeights, EFE_TERMS),
        checks.flag("hard_cell", hard_cell),
        checks.number("hard_cell_min_ratio", hard_cell_min_ratio),
        checks.integer("max_cells", max_cells, low=1),
        checks.integer("ignore_index", ignore_index),
    )
    batched = logits.dim() == 5
    if not batched:
        logits, target, backward_logits, final_logits, observation_probs, prompt, valid = one_episode(
            logits, target, backward_logits, final_logits, observation_probs, prompt, valid
        )
    promise = None
    if grad_scale is not None:
        checks.check_floating("grad_scale", grad_scale)
        checks.check_shape("grad_scale", grad_scale, "[]", ())
        checks.check_same_device("grad_scale", grad_scale, "logits", logits)
        if torch.is_grad_enabled():
            # A copy: what the caller does to the tensor afterwards does not change the promise.
            promise = grad_scale.detach().to(torch.float32, copy=True)
            if reduction == "mean":
                promise = promise / max(
                    logits.shape[0], 1
                )  # the very operation with which autograd differentiates the mean
    total, terms, mask_ratio, scale, _ = apply(
        EFELossFunction, logits, backward_logits, final_logits, observation_probs, preference_logits, prompt,
        projection, target, target_preference, valid,
        *settings, promise,
    )  # fmt: skip
    named = dict(zip(EFE_TERMS, terms.unbind(1), strict=True))
    if not batched:
        return EFELossOutput(total[0], {name: term[0] for name, term in named.items()}, mask_ratio[0], scale[0])
    if reduction == "mean" and total.shape[0] > 0:
        total = total.mean()
    elif reduction != "none":
        total = total.sum()
    return EFELossOutput(total, named, mask_ratio, scale)


def settings_of(name: str, group: object, kind: type, fields: Sequence[str]) -> list[float]:
    """The fields of a group of settings, as numbers."""
    if not isinstance(group, kind):
        raise TypeError(f"{name} must be {kind.__name__}, it was {type(group).__name__}.")
    values = [getattr(group, field) for field in fields]
    if all([type(value) is float and -math.inf < value < math.inf for value in values]):  # nearly every call
        return values
    return [checks.number(f"{name}.{field}", value) for field, value in zip(fields, values, strict=True)]


def one_episode(*tensors: Any) -> tuple[Any, ...]:
    """Unbatched arguments as batches of one; None stays None."""
    return tuple(None if tensor is None else tensor[None] for tensor in tensors)


def top_left(name: str, tensor: Tensor, height: int, width: int) -> Tensor:
    """The top-left height x width part of [..., H', W', C], as a view."""
    checks.check_floating(name, tensor)
    if tensor.dim() < 3 or tensor.shape[-3] < height or tensor.shape[-2] < width:
        raise ValueError(f"{name} must cover a grid of {height} x {width} cells, its shape was {list(tensor.shape)}.")
    if tensor.shape[-3:-1] == (height, width):
        return tensor
    return tensor[..., :height, :width, :]


def check_efe_arguments(
    logits: Tensor,
    target: Tensor,
    preference_logits: Tensor,
    backward_logits: Tensor | None,
    final_logits: Tensor | None,
    observation_probs: Tensor | None,
    prompt: Tensor | None,
    projection: Tensor | None,
    target_preference: Tensor | None,
    valid: Tensor | None,
) -> None:
    """Shapes, dtypes and devices, with or without the dimension B as logits have it."""
    *batch, steps, height, width, outcomes = logits.shape
    each = "B, " if batch else ""
    if steps < 1 or height * width < 1 or outcomes < 2:
        shape = list(logits.shape)
        raise ValueError(f"logits must have at least 1 step, 1 cell and 2 outcomes, its shape was {shape}.")
    cells, grid = (*batch, height, width), (height, width, outcomes)
    checks.check_shape("target", target, f"[{each}H, W]", cells)
    if valid is not None:
        checks.check_bool("valid", valid)
        checks.check_shape("valid", valid, f"[{each}H, W]", cells)
    if preference_logits.dim() == 3:
        checks.check_shape("preference_logits", preference_logits, "[H, W, C]", grid)
    else:
        checks.check_shape("preference_logits", preference_logits, f"[{each}H, W, C]", (*batch, *grid))
    plans = {"backward_logits": backward_logits, "observation_probs": observation_probs}
    for name, plan in plans.items():
        if plan is not None:
            checks.check_floating(name, plan)
            checks.check_shape(name, plan, f"[{each}T, H, W, C]", logits.shape)
    if final_logits is not None:
        checks.check_floating("final_logits", final_logits)
        checks.check_shape("final_logits", final_logits, f"[{each}H, W, C]", (*batch, *grid))
    if target_preference is not None:
        checks.check_shape("target_preference", target_preference, "[H, W, C]", grid)
    if projection is not None:
        checks.check_floating("projection", projection)
        checks.check_dim("projection", projection, "[C, D]")
    if prompt is not None:
        checks.check_floating("prompt", prompt)
        checks.check_dim("prompt", prompt, f"[{each}D]")
        checks.check_shape("prompt", prompt, f"[{each}D]", (*batch, prompt.shape[-1]))
        if prompt.shape[-1] < outcomes:
            raise ValueError(f"prompt must have D >= C = {outcomes} dimensions, its shape was {list(prompt.shape)}.")
        if projection is not None:
            checks.check_shape("projection", projection, "[C, D]", (outcomes, prompt.shape[-1]))
    others = {
        "target": target, "preference_logits": preference_logits, **plans, "final_logits": final_logits,
        "prompt": prompt, "projection": projection, "target_preference": target_preference, "valid": valid,
    }  # fmt: skip
    for name, tensor in others.items():
        if tensor is not None:
            checks.check_same_device(name, tensor, "logits", logits)


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
        TypeError: for a wrong dtype. ValueError: for a wrong shape or device.
    """
    checks.check_floating("hidden", hidden)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must have the shape [N, L, E] or [L, E], it was {list(hidden.shape)}.")
    checks.check_tensor("mask", mask)
    batched = hidden.dim() == 3
    checks.check_shape("mask", mask, "[N, L]" if batched else "[L]", hidden.shape[:-1])
    checks.check_same_device("mask", mask, "hidden", hidden)
    if mask.is_complex():
        raise TypeError(f"mask must be bool, integer or floating, it was {mask.dtype}.")
    if not batched:
        hidden, mask = one_episode(hidden, mask)
    if mask.dtype != torch.bool:
        mask = mask != 0
    pooled = apply(MaskedMeanPoolFunction, hidden, mask)
    return pooled if batched else pooled[0]


class RefinedPrompt(NamedTuple):
    """What `refine_prompt` returns; without the dimension B for unbatched input. Every entry is differentiable.

    prompt: [B, D], the refined prompt, in the dtype of the prompt given.
    action: [B, D+1], u, the sampled action before squashing; float32, or float64 for float64 input, as the next two.
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
        log_std: [D+1] or [B, D+1], logarithm of the standard deviation of u.
        noise: [B, D+1] standard normal noise, a constant to the gradient. Give it to capture a CUDA graph, which would
            replay one seed for ever.
        seed: in [0, 2^63), the key of the counter-based noise (Philox4x32-10), which takes no state: one seed gives the
            same noise in every dtype, on CPU and CUDA, up to a few units in the last place of the normal transform.
            None draws a seed from torch's default CPU generator, so torch.manual_seed governs it.
        delta_scale: s, positive.

    Gradients reach prompt (the identity), mean and log_std as reparameterised with the noise fixed, from every entry
    of the result. Arithmetic is float32, or float64 if any argument is.

    Raises:
        TypeError: for a wrong dtype. ValueError: for a wrong shape, device or range, or both noise and seed.

    Source: Haarnoja et al., 2018, "Soft actor-critic", appendix C, for the squashed Gaussian; Salmon et al., 2011,
    "Parallel random numbers: as easy as 1, 2, 3", for the noise.
    """
    checks.check_floating("prompt", prompt)
    if prompt.dim() not in (1, 2):
        raise ValueError(f"prompt must have the shape [B, D] or [D], it was {list(prompt.shape)}.")
    *batch, dimension = prompt.shape
    delta_scale = checks.number("delta_scale", delta_scale, 0, above=True)
    check_policy((*batch, dimension + 1), "prompt", prompt, mean=mean, log_std=log_std)
    if noise is not None:
        check_policy((*batch, dimension + 1), "prompt", prompt, noise=noise)
    if noise is not None and seed is not None:
        raise ValueError(f"seed must be None where noise is given, it was {seed!r}.")
    batched = prompt.dim() == 2
    if not batched:
        prompt, mean, noise = one_episode(prompt, mean, noise)
    key = seed_tensor(seed) if noise is None else None
    dtype = common_dtype(prompt, mean, log_std, noise)
    refined, action, log_prob, entropy = apply(
        RefinePromptFunction, prompt.double() if dtype == torch.float64 else prompt, mean.to(dtype), log_std.to(dtype),
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
        TypeError: for a wrong dtype. ValueError: for a wrong shape, device or range.

    Source: Haarnoja et al., 2018, "Soft actor-critic", appendix C.
    """
    checks.check_floating("action", action)
    if action.dim() not in (1, 2):
        raise ValueError(f"action must have the shape [B, D+1] or [D+1], it was {list(action.shape)}.")
    delta_scale = checks.number("delta_scale", delta_scale, 0, above=True)
    check_policy(tuple(action.shape), "action", action, mean=mean, log_std=log_std)
    batched = action.dim() == 2
    if not batched:
        action, mean = one_episode(action, mean)
    dtype = common_dtype(action, mean, log_std)
    log_prob, entropy = apply(SquashedLogProbFunction, action.to(dtype), mean.to(dtype), log_std.to(dtype), delta_scale)
    return (log_prob, entropy) if batched else (log_prob[0], entropy[0])


def check_policy(shape: tuple[int, ...], anchor_name: str, anchor: Tensor, **tensors: Tensor) -> None:
    """Tensors of the policy must have the shape [B, D+1] or [D+1] (log_std always the latter too), and the device of
    the anchor."""
    if shape[-1] < 2:
        raise ValueError(f"{anchor_name} must have at least one prompt dimension, its shape was {list(anchor.shape)}.")
    for name, tensor in tensors.items():
        checks.check_floating(name, tensor)
        if len(shape) == 1 or (name == "log_std" and tensor.dim() == 1):
            checks.check_shape(name, tensor, "[D+1]", shape[-1:])
        else:
            checks.check_shape(name, tensor, "[B, D+1]", shape)
        checks.check_same_device(name, tensor, anchor_name, anchor)


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


@dataclass(frozen=True)
class RewardWeights:
    """Weight of the change of each score in the reward of `grid_reward`."""

    accuracy: float = 1.0
    size: float = 0.5
    colour: float = 0.5
    reversibility: float = 0.5


# Each thread counts the cells of every colour.
MOST_COLORS = 2**16


class RewardOutput(NamedTuple):
    """What `grid_reward` returns: float32, [B] each, 0-d for unbatched input. The names are those of RewardWeights.

    reward: sum of weight * term.
    terms: name -> clamp(after - before, -1, 1), unweighted.
    before, after: name -> score of that prediction.
    mask_ratio: share of counted cells where `after` differs from the target.
    """

    reward: Tensor
    terms: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    mask_ratio: Tensor


def grid_reward(
    before: Tensor,
    after: Tensor,
    target: Tensor,
    *,
    valid: Tensor | None = None,
    source: Tensor | None = None,
    inverse: Callable[[Tensor], Tensor] | None = None,
    weights: RewardWeights = RewardWeights(),
    num_colors: int = 10,
) -> RewardOutput:
    """How much better the prediction `after` is than `before`, per episode.

    reward = sum of weight * clamp(score(after) - score(before), -1, 1) over four scores:

    - accuracy: share of the counted cells whose colour is that of the target
    - size: 1 - (|H' - H| / H + |W' - W| / W) / 2 for a prediction of H' x W' cells; it can be negative
    - colour: 1 - mean over colours of |difference of the normalised colour histograms of the counted cells|
    - reversibility: share of the source's cells that `inverse` recovers from the prediction, 0.5 without `inverse`

    A prediction of another size than the target's is resized to it (nearest neighbour, as `interpolate` does) for
    accuracy and colour, and a recovered grid to the source's for reversibility. A prediction in logits stands for its
    argmax: the first of equal logits wins and NaN never does, so the reward is finite whatever the logits hold. The
    reward is a constant for autograd.

    Args:
        before: [B, H', W', C] logits (float32, float16, bfloat16, float64) or [B, H', W'] colours of any integer
            dtype; any strides. H' and W' are its own.
        after: the same, of a size and kind of its own.
        target: [B, H, W] colours, any integer dtype, in [0, num_colors), or -100 for a cell that does not count.
        valid: [B, H, W] bool, which cells count. For grids of different sizes in one batch, pad the target and the
            predictions alike and mark the real cells: accuracy, colour and mask_ratio look at these alone, while size
            compares the padded shapes and so is the same for all episodes of a batch. In an episode where no cell
            counts accuracy and mask_ratio are 0 and colour is 1.
        source: [B, H_in, W_in] colours of the input grids, any integer dtype; read only with `inverse`.
        inverse: maps a predicted grid [H', W'] int64, padding included, to the input grid [h, w] it would come from,
            of any size and integer dtype on the same device. Called for each episode, before and after.
        weights: weight of each score.
        num_colors: C.

    Without the batch dimension B in target (and every other argument) the results are 0-d.

    Raises:
        TypeError: for a wrong dtype, such as a floating-point target.
        ValueError: for a wrong shape or device, `inverse` without `source`, and on the CPU for a colour out of range.
            On CUDA, where looking would cost a synchronisation, a colour out of range is wrong in accuracy and in no
            bin of the histograms.

    Source: the reward of ARC-EFE agents, which score a refined prediction against the unrefined one.
    """
    target = checks.integer_tensor("target", target)
    if target.dim() not in (2, 3):
        raise ValueError(f"target must have the shape [B, H, W] or [H, W], it was {list(target.shape)}.")
    if target.shape[-2:].numel() < 1:
        raise ValueError(f"target must have at least 1 cell, its shape was {list(target.shape)}.")
    num_colors = checks.integer("num_colors", num_colors, 1, MOST_COLORS)
    before = check_prediction("before", before, target, num_colors)
    after = check_prediction("after", after, target, num_colors)
    if valid is not None:
        checks.check_bool("valid", valid)
        checks.check_shape("valid", valid, "[B, H, W]" if target.dim() == 3 else "[H, W]", target.shape)
        checks.check_same_device("valid", valid, "target", target)
    batched = target.dim() == 3
    if inverse is not None:
        if source is None:
            raise ValueError("source must be given with inverse, it was None.")
        source = check_grid("source", source, target)
    if not batched:
        before, after, target, valid, source = one_episode(before, after, target, valid, source)
    before, after = before.detach(), after.detach()
    reversibility = None
    if inverse is not None and source is not None:
        reversibility = torch.stack([recovered_share(prediction, source, inverse) for prediction in (before, after)])
    table = grid_reward_op(
        before, after, target, valid, reversibility,
        settings_of("weights", weights, RewardWeights, REWARD_TERMS), num_colors,
    )  # fmt: skip
    if not batched:
        table = table[:, 0]
    terms, scores_before, scores_after = (
        {name: table[first + i] for i, name in enumerate(REWARD_TERMS)} for first in (1, 5, 9)
    )
    return RewardOutput(table[0], terms, scores_before, scores_after, table[13])


def check_grid(name: str, grid: Tensor, target: Tensor) -> Tensor:
    """Non-empty integer grids beside target, [B, H, W] or [H, W] as target is."""
    grid = checks.integer_tensor(name, grid)
    check_beside_target(name, grid, target, "[B, H, W]" if target.dim() == 3 else "[H, W]")
    return grid


def check_prediction(name: str, prediction: Tensor, target: Tensor, num_colors: int) -> Tensor:
    """Logits [B, H', W', num_colors] or an integer grid [B, H', W'], both without B where target has none."""
    checks.check_tensor(name, prediction)
    if not prediction.is_floating_point():
        return check_grid(name, prediction, target)
    if prediction.dim() == target.dim():
        shapes = "[B, H, W, C] or a grid [B, H, W]" if target.dim() == 3 else "[H, W, C] or a grid [H, W]"
        raise TypeError(
            f"{name} must be logits {shapes} of an integer dtype, it was {prediction.dtype} of shape "
            f"{list(prediction.shape)}."
        )
    checks.check_floating(name, prediction)
    check_beside_target(name, prediction, target, "[B, H, W, C]" if target.dim() == 3 else "[H, W, C]")
    if prediction.shape[-1] != num_colors:
        raise ValueError(f"{name} must have num_colors = {num_colors} logits per cell, it had {prediction.shape[-1]}.")
    return prediction


def check_beside_target(name: str, grid: Tensor, target: Tensor, dims: str) -> None:
    checks.check_dim(name, grid, dims)
    if target.dim() == 3 and grid.shape[0] != target.shape[0]:
        raise ValueError(f"{name} must have the batch size of target, {target.shape[0]}, it had {grid.shape[0]}.")
    first = target.dim() - 2
    if grid.shape[first : first + 2].numel() < 1:
        raise ValueError(f"{name} must have at least 1 cell, its shape was {list(grid.shape)}.")
    checks.check_same_device(name, grid, "target", target)


def recovered_share(prediction: Tensor, source: Tensor, inverse: Callable[[Tensor], Tensor]) -> Tensor:
    """Reversibility of each episode, [B] float32."""
    shares = []
    for grid, original in zip(colours(prediction), source, strict=True):
        # A copy: an inverse may work in place.
        recovered = check_grid("inverse(grid)", inverse(grid.clone()), original)
        shares.append(reversibility_score(recovered, original))
    return torch.stack(shares) if shares else source.new_empty(0, dtype=torch.float32)


def rl_advantage(
    reward: Tensor,
    value: Tensor,
    *,
    reward_scale: float = 5.0,
    normalize: Literal["tanh", "clamp"] | None = "tanh",
    whiten: bool = False,
    group_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Advantage of one-step episodes: normalize(reward * reward_scale) - value, optionally whitened.

    Whitening gives (advantage - mean) / (std + 1e-4) over the elements that count, all of them or those of each group,
    as in GRPO; std is torch.std's, of n - 1. A group whose advantages are all equal, such as a group of one, becomes 0.

    Differentiable in value, through the mean and standard deviation too where whitened; detach the result to use it as
    the constant of a policy gradient. The reward is a constant.

    Args:
        reward: any shape, such as [B]; float32, float16, bfloat16 or float64.
        value: the shape of reward, the critic's estimate of the normalised scaled reward; zeros without a critic.
        reward_scale: factor on the reward.
        normalize: "tanh" or "clamp" bring the scaled reward to [-1, 1], None leaves it.
        whiten: whether to whiten.
        group_size: how many consecutive elements, in row-major order, are one group; None takes all as one group.
        mask: bool, the shape of reward; elements that are False count nowhere, and get advantage 0 and gradient 0,
            whatever reward and value hold there.

    Returns:
        The advantage, in the shape of reward and the dtype to which reward and value promote. Arithmetic is float32,
        float64 if one of them is float64.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device or choice, a group_size that does not divide the number of elements, or
            one without whiten.

    Source: Shao et al. 2024, "DeepSeekMath", for group whitening.
    """
    check_like_first(reward=reward, value=value)
    check_mask(mask, "reward", reward)
    checks.check_choice("normalize", normalize, ("tanh", "clamp", None))
    reward_scale = checks.number("reward_scale", reward_scale)
    whiten = checks.flag("whiten", whiten)
    if group_size is not None:
        group_size = checks.integer("group_size", group_size, low=1)
        if not whiten:
            raise ValueError(f"group_size must be None unless whiten is True, it was {group_size}.")
        if reward.numel() % group_size != 0:
            raise ValueError(f"group_size must divide the {reward.numel()} elements of reward, it was {group_size}.")
    group = 0 if not whiten else reward.numel() if group_size is None else group_size
    return rl_advantage_op(constant(reward), value, mask, reward_scale, normalize, group)


def check_like_first(**tensors: Tensor) -> None:
    """Floating-point tensors with the shape and on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        checks.check_floating(name, tensor)
        checks.check_shape(name, tensor, f"of {first_name}", first.shape)
        checks.check_same_device(name, tensor, first_name, first)


def check_mask(mask: Tensor | None, like_name: str, like: Tensor, name: str = "mask") -> None:
    """A bool tensor with the shape and on the device of `like`."""
    if mask is not None:
        checks.check_bool(name, mask)
        checks.check_shape(name, mask, f"of {like_name}", like.shape)
        checks.check_same_device(name, mask, like_name, like)


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    reward_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation along the last dimension, which is time.

        delta_t = reward_scale * reward_t + gamma * next_value_t * (1 - terminated_t) - value_t
        advantage_t = delta_t + gamma * lam * (1 - terminated_t) * (1 - truncated_t) * advantage_{t+1}
        value_target_t = advantage_t + value_t

    Differentiable in value and next_value, as these formulas are; detach the results to use them as constants.

    Args:
        reward: [..., T] float32, float16, bfloat16 or float64.
        value: [..., T], value of the state in which step t begins.
        next_value: [..., T], value of the state in which step t ends: of the last observation of an episode where it
            is truncated, read nowhere where it is terminated.
        terminated: [..., T] bool, the episode ends in a terminal state: no bootstrap, and the trace stops.
        truncated: [..., T] bool, the episode is cut here: the bootstrap stays, and the trace stops. None: nowhere.
            After the last step the trace stops in any case.
        gamma: discount.
        lam: decay of the trace.
        reward_scale: factor on the reward.

    Without leading dimensions one trajectory [T] is taken. Any strides; [T, B] buffers transposed to [B, T] are read
    and written as they lie, without a copy. On CUDA an input whose strides are not those of reward is copied first.

    Returns:
        (advantage, value_target), [..., T] in the dtype to which reward, value and next_value promote. Arithmetic is
        float32, float64 for float64.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, gamma or lam.

    Source: Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation".
    """
    check_trajectories(terminated, truncated, reward=reward, value=value, next_value=next_value)
    gamma, lam = checks.number("gamma", gamma, 0, 1), checks.number("lam", lam, 0, 1)
    reward_scale = checks.number("reward_scale", reward_scale)
    value, next_value, reward = promoted(value, next_value, constant(reward))
    advantage, target = trace(
        rows_of(value), rows_of(next_value), rows_of(reward), rows_of(terminated),
        None if truncated is None else rows_of(truncated), None, gamma, lam, 1.0, 1.0, reward_scale,
    )  # fmt: skip
    return like(advantage, reward), like(target, reward)


def vtrace(
    log_ratio: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    *,
    gamma: float = 0.99,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    reward_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace along the last dimension, which is time: value targets and advantages corrected for off-policy data.

    With ratio = exp(log_ratio), rho = min(rho_clip, ratio), c = min(c_clip, ratio) and delta_t as in `gae`:

        value_target_t = value_t + rho_t * delta_t
                         + gamma * c_t * (1 - terminated_t) * (1 - truncated_t) * (value_target_{t+1} - value_{t+1})
        advantage_t = rho_t * (reward_scale * reward_t + gamma * (1 - terminated_t) * next_target_t - value_t)

    next_target_t is next_value_t + value_target_{t+1} - value_{t+1}, that is value_target_{t+1} where next_value_t is
    value_{t+1}, and the bare next_value_t where step t is truncated or the last one.

    Differentiable in value and next_value, as these formulas are with constant importance weights; detach the results
    to use them as constants.

    Args:
        log_ratio: [..., T] log-probability of the action under the learner's policy less that under the behaviour
            policy; a constant for autograd.
        reward, value, next_value, terminated, truncated, gamma, reward_scale: as in `gae`.
        rho_clip: limit of the weight of a step; math.inf sets none.
        c_clip: limit of the weight with which later steps count.

    Returns:
        (advantage, value_target), [..., T] in the dtype to which log_ratio, reward, value and next_value promote.
        Arithmetic is float32, float64 for float64.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, gamma or limit.

    Source: Espeholt et al. 2018, "IMPALA: scalable distributed deep-RL with importance weighted actor-learner
    architectures".
    """
    check_trajectories(terminated, truncated, reward=reward, log_ratio=log_ratio, value=value, next_value=next_value)
    gamma, reward_scale = checks.number("gamma", gamma, 0, 1), checks.number("reward_scale", reward_scale)
    rho_clip = checks.number("rho_clip", rho_clip, 0, finite=False)
    c_clip = checks.number("c_clip", c_clip, 0, finite=False)
    value, next_value, reward, log_ratio = promoted(value, next_value, constant(reward), constant(log_ratio))
    advantage, target = trace(
        rows_of(value), rows_of(next_value), rows_of(reward), rows_of(terminated),
        None if truncated is None else rows_of(truncated), rows_of(log_ratio), gamma, 1.0, rho_clip, c_clip,
        reward_scale,
    )  # fmt: skip
    return like(advantage, reward), like(target, reward)


class PolicyLossOutput(NamedTuple):
    """What `policy_gradient_loss` returns: 0-d tensors, float32, or float64 for float64 inputs.

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
    tensors = {
        "log_prob": log_prob, "value": value, "entropy": entropy, "advantage": advantage, "value_target": value_target,
    }  # fmt: skip
    if old_log_prob is not None:
        tensors["old_log_prob"] = old_log_prob
    check_like_first(**tensors)
    check_mask(mask, "log_prob", log_prob)
    clip = checks.number("clip", clip, 0, above=True, finite=False)
    value_coef = checks.number("value_coef", value_coef)
    entropy_coef = checks.number("entropy_coef", entropy_coef)
    log_prob, value, entropy, *constants = promoted(*tensors.values())
    advantage, value_target, *old = map(constant, constants)
    total, policy, value_loss, mean_entropy, diagnostics = policy_gradient_loss_op(
        entropy, log_prob, value, advantage, value_target, old[0] if old else None, mask, clip, value_coef, entropy_coef
    )
    return PolicyLossOutput(total, policy, value_loss, mean_entropy, *diagnostics[:3].unbind())


def check_trajectories(terminated: Tensor, truncated: Tensor | None, **tensors: Tensor) -> None:
    """Floating-point tensors [..., T] and flags of the same shape."""
    check_like_first(**tensors)
    first_name, first = next(iter(tensors.items()))
    if first.dim() == 0:
        raise ValueError(f"{first_name} must have the shape [..., T], it was [].")
    checks.check_tensor("terminated", terminated)
    check_mask(terminated, first_name, first, "terminated")
    check_mask(truncated, first_name, first, "truncated")


def promoted(*tensors: Tensor) -> list[Tensor]:
    """All in the dtype to which they promote together."""
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def constant(tensor: Tensor) -> Tensor:
    """tensor, of which no gradient is asked."""
    return tensor.detach() if tensor.requires_grad else tensor


def rows_of(tensor: Tensor) -> Tensor:
    """[..., T] as [N, T]."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def like(rows: Tensor, tensor: Tensor) -> Tensor:
    """rows [N, T] in the shape of tensor."""
    return rows if tensor.dim() == 2 else rows.view(tensor.shape)
