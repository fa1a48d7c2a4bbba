"""The public function `efe_loss`: what it takes and gives, and its checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from efe_kernels.common import checks
from efe_kernels.common.arguments import one_episode
from efe_kernels.efe_loss import ops
from efe_kernels.efe_loss.reference import REDUCTIONS, TERMS, Inputs, Settings


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

    Attributes:
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
            the dtype of the other arguments. A finite logit further than 1e30 below the largest of its cell counts as
            1e30 below, and NaN is never the argmax. On CUDA each shape [T, H, W, C] and layout is compiled once, at its
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

    Without the batch dimension B in logits (and in every other argument that has it) results are 0-d.

    Raises:
        TypeError: for a wrong dtype, such as a floating-point target.
        ValueError: for a wrong shape, device or reduction, and on the CPU for a target out of range. On CUDA, where
            looking would cost a synchronisation, such a target makes the episode's loss NaN.

    Source: the equations of active inference with categorical outcomes (Da Costa et al., 2020, "Active inference on
    discrete state-spaces: a synthesis"), with the consistency, agreement and prompt terms of ARC-EFE planners.
    """
    checks.check_floating("logits", logits)
    sizes = checks.Sizes("logits", logits, "B? T H W C")
    height, width = logits.shape[-3:-1]
    preference_logits = top_left("preference_logits", preference_logits, height, width)
    if target_preference is not None:
        target_preference = top_left("target_preference", target_preference, height, width)
    target = checks.integer_tensor("target", target)
    check_shapes(
        sizes, logits, target, preference_logits, backward_logits, final_logits, observation_probs, prompt, projection,
        target_preference, valid,
    )  # fmt: skip
    checks.check_choice("reduction", reduction, REDUCTIONS)
    batched = logits.dim() == 5
    settings = Settings(
        checks.settings("weights", weights, EFEWeights, TERMS),
        checks.flag("hard_cell", hard_cell),
        checks.number("hard_cell_min_ratio", hard_cell_min_ratio),
        checks.integer("max_cells", max_cells, low=1),
        checks.integer("ignore_index", ignore_index),
        reduction if batched else "sum",
    )
    if not batched:
        logits, target, backward_logits, final_logits, observation_probs, prompt, valid = one_episode(
            logits, target, backward_logits, final_logits, observation_probs, prompt, valid
        )
    inputs = Inputs(
        logits, backward_logits, final_logits, observation_probs, preference_logits, prompt, projection, target,
        target_preference, valid,
    )  # fmt: skip
    total, terms, mask_ratio, scale, _ = ops.efe_loss(*inputs, *settings)
    named = dict(zip(TERMS, terms.unbind(1), strict=True))
    if not batched:
        return EFELossOutput(total, {name: term[0] for name, term in named.items()}, mask_ratio[0], scale[0])
    return EFELossOutput(total, named, mask_ratio, scale)


def top_left(name: str, tensor: Tensor, height: int, width: int) -> Tensor:
    """The top-left height x width part of [..., H', W', C], as a view."""
    checks.check_floating(name, tensor)
    if tensor.dim() < 3 or tensor.shape[-3] < height or tensor.shape[-2] < width:
        raise ValueError(f"{name} must cover a grid of {height} x {width} cells, its shape was {list(tensor.shape)}.")
    if tensor.shape[-3:-1] == (height, width):
        return tensor
    return tensor[..., :height, :width, :]


def check_shapes(
    sizes: checks.Sizes,
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
    steps, height, width, outcomes = logits.shape[-4:]
    if steps < 1 or height * width < 1 or outcomes < 2:
        shape = list(logits.shape)
        raise ValueError(f"logits must have at least 1 step, 1 cell and 2 outcomes, its shape was {shape}.")
    floating = checks.check_floating
    sizes.check("target", target, "B? H W")
    sizes.check_optional("valid", valid, "B? H W", checks.check_bool)
    sizes.check("preference_logits", preference_logits, "H W C" if preference_logits.dim() == 3 else "B? H W C")
    sizes.check_optional("backward_logits", backward_logits, "B? T H W C", floating)
    sizes.check_optional("observation_probs", observation_probs, "B? T H W C", floating)
    sizes.check_optional("final_logits", final_logits, "B? H W C", floating)
    sizes.check_optional("target_preference", target_preference, "H W C")
    sizes.check_optional("prompt", prompt, "B? D", floating)
    if prompt is not None and prompt.shape[-1] < outcomes:
        raise ValueError(f"prompt must have D >= C = {outcomes} dimensions, its shape was {list(prompt.shape)}.")
    sizes.check_optional("projection", projection, "C D" if prompt is not None else "rows D", floating)
