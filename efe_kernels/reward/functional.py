"""The public function `grid_reward`: what it takes and gives, and its checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from efe_kernels.common import checks
from efe_kernels.common.arguments import one_episode
from efe_kernels.reward import ops
from efe_kernels.reward.reference import REWARD_TERMS, colours
from efe_kernels.reward.reference import reversibility as reversibility_of


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

    Attributes:
        reward: sum of weight * term.
        terms: name -> clamp(after - before, -1, 1), unweighted.
        before: name -> score of the prediction `before`.
        after: name -> score of the prediction `after`.
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
    sizes = checks.Sizes("target", target, "B? H W")
    if target.shape[-2:].numel() < 1:
        raise ValueError(f"target must have at least 1 cell, its shape was {list(target.shape)}.")
    num_colors = checks.integer("num_colors", num_colors, 1, MOST_COLORS)
    before = check_prediction("before", before, target, num_colors)
    after = check_prediction("after", after, target, num_colors)
    sizes.check_optional("valid", valid, "B? H W", checks.check_bool)
    batched = target.dim() == 3
    if inverse is not None:
        if not callable(inverse):
            raise TypeError(f"inverse must be callable, it was {checks.described(inverse)}.")
        if source is None:
            raise ValueError("source must be given with inverse, it was None.")
        source = check_grid("source", source, target)
    if not batched:
        before, after, target, valid, source = one_episode(before, after, target, valid, source)
    before, after = before.detach(), after.detach()
    reversibility = None
    if inverse is not None and source is not None:
        reversibility = torch.stack([recovered_share(prediction, source, inverse) for prediction in (before, after)])
    table = ops.grid_reward(
        before, after, target, valid, reversibility,
        checks.settings("weights", weights, RewardWeights, REWARD_TERMS), num_colors,
    )  # fmt: skip
    reward, *rows, mask_ratio = (table if batched else table[:, 0]).unbind()
    terms, scores_before, scores_after = (
        dict(zip(REWARD_TERMS, rows[first : first + 4], strict=True)) for first in (0, 4, 8)
    )
    return RewardOutput(reward, terms, scores_before, scores_after, mask_ratio)


def check_grid(name: str, grid: Tensor, target: Tensor) -> Tensor:
    """Non-empty integer grids beside target, [B, H, W] or [H, W] as target is."""
    grid = checks.integer_tensor(name, grid)
    check_beside_target(name, grid, target, "B H W")
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
    check_beside_target(name, prediction, target, "B H W C")
    if prediction.shape[-1] != num_colors:
        raise ValueError(f"{name} must have num_colors = {num_colors} logits per cell, it had {prediction.shape[-1]}.")
    return prediction


def check_beside_target(name: str, grid: Tensor, target: Tensor, dims: str) -> None:
    """A grid of a size of its own, with the batch size and on the device of target."""
    batched = target.dim() == 3
    checks.Sizes(name, grid, dims if batched else dims.removeprefix("B "))
    if batched and grid.shape[0] != target.shape[0]:
        raise ValueError(f"{name} must have the batch size of target, {target.shape[0]}, it had {grid.shape[0]}.")
    if grid.shape[batched : batched + 2].numel() < 1:
        raise ValueError(f"{name} must have at least 1 cell, its shape was {list(grid.shape)}.")
    checks.check_device(name, grid, "target", target.device)


def recovered_share(prediction: Tensor, source: Tensor, inverse: Callable[[Tensor], Tensor]) -> Tensor:
    """Reversibility of each episode, [B] float32."""
    shares = []
    for grid, original in zip(colours(prediction), source, strict=True):
        # A copy: an inverse may work in place.
        recovered = check_grid("inverse(grid)", inverse(grid.clone()), original)
        shares.append(reversibility_of(recovered, original))
    return torch.stack(shares) if shares else source.new_empty(0, dtype=torch.float32)
