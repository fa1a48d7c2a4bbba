"""Modules: they own parameters and call `efe_kernels.functional`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efe_kernels.common import checks
from efe_kernels.efe_loss.reference import counted_cells
from efe_kernels.functional import EFELossOutput, EFEWeights, efe_loss


class EFELoss(nn.Module):
    """`efe_loss` with its learned parts: preference logits, prompt projection and the running target preference.

    Args:
        max_grid_size: largest grid side; smaller grids read the top-left part of what is stored.
        num_colors: number of outcomes C.
        prompt_dim: prompt dimension D.
        weights: weight of each term.
        hard_cell, hard_cell_min_ratio, ignore_index, reduction: as in `efe_loss`.

    Parameters: `preference_logits` [max, max, C], zero at first (a uniform preference), and `projection` [C, D].
    Buffer: `target_preference` [max, max, C], zero (not set) at first. All are in `state_dict` from the start.
    """

    target_preference: Tensor

    def __init__(
        self,
        max_grid_size: int = 30,
        num_colors: int = 10,
        prompt_dim: int = 256,
        weights: EFEWeights = EFEWeights(),  # noqa: B008  (frozen)
        *,
        hard_cell: bool = True,
        hard_cell_min_ratio: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.max_grid_size = max_grid_size
        self.num_colors = num_colors
        self.weights = weights
        self.hard_cell = hard_cell
        self.hard_cell_min_ratio = hard_cell_min_ratio
        self.ignore_index = ignore_index
        self.reduction = reduction
        grid = (max_grid_size, max_grid_size, num_colors)
        self.preference_logits = nn.Parameter(torch.zeros(grid))
        self.projection = nn.Parameter(torch.empty(num_colors, prompt_dim))
        nn.init.xavier_uniform_(self.projection)
        self.register_buffer("target_preference", torch.zeros(grid))

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        prompt: Tensor | None = None,
        backward_logits: Tensor | None = None,
        final_logits: Tensor | None = None,
        observation_probs: Tensor | None = None,
        valid: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> EFELossOutput:
        """The loss of logits [B, T, H, W, C] against target [B, H, W]; arguments and result as in `efe_loss`."""
        return efe_loss(
            logits,
            target,
            self.preference_logits,
            backward_logits=backward_logits,
            final_logits=final_logits,
            observation_probs=observation_probs,
            prompt=prompt,
            projection=None if prompt is None else self.projection,
            target_preference=self.target_preference,
            valid=valid,
            weights=self.weights,
            hard_cell=self.hard_cell,
            hard_cell_min_ratio=self.hard_cell_min_ratio,
            max_cells=self.max_grid_size**2,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            grad_scale=grad_scale,
        )

    @torch.no_grad()
    def update_target_preference(self, target: Tensor, valid: Tensor | None, success_rate: Tensor | float) -> None:
        """Move the running target preference toward one-hot targets by the factor 0.05 + 0.15 * success_rate.

        target: [B, H, W] or [H, W] integers. valid: bool of the same shape, or None. success_rate: in [0, 1].
        A cell moves toward the mean of the one-hot targets of the episodes in which it counts; elsewhere it stays.
        """
        checks.check_integer("target", target)
        if max(target.shape[-2:]) > self.max_grid_size:
            raise ValueError(
                f"target must be a grid of at most {self.max_grid_size} x {self.max_grid_size} cells, "
                f"its shape was {list(target.shape)}."
            )
        if target.dim() == 2:
            target = target[None]
            valid = None if valid is None else valid[None]
        height, width = target.shape[-2:]
        counted = counted_cells(target, valid, self.ignore_index)
        one_hot = nn.functional.one_hot(torch.where(counted, target, 0).long(), self.num_colors)
        episodes = counted.sum(0)[..., None]
        running = self.target_preference[:height, :width]
        observed = (one_hot * counted[..., None]).sum(0) / episodes.clamp_min(1).to(running)
        moved = running + (0.05 + 0.15 * success_rate) * (observed - running)
        running.copy_(torch.where(episodes > 0, moved, running))
