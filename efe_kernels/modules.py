"""Modules: they own parameters and call `efe_kernels.functional`."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from efe_kernels.common import checks
from efe_kernels.common.library import accumulate_dtype
from efe_kernels.efe_loss.reference import REDUCTIONS, TERMS, check_target_range, counted_cells
from efe_kernels.functional import EFELossOutput, EFEWeights, efe_loss


class EFELoss(nn.Module):
    """`efe_loss` with its learned parts: preference logits, prompt projection and the running target preference.

    Args:
        max_grid_size: largest grid side; smaller grids read the top-left part of what is stored.
        num_colors: number of outcomes C.
        prompt_dim: prompt dimension D.
        weights: weight of each term.
        hard_cell, hard_cell_min_ratio, ignore_index, reduction: as in `efe_loss`.

    Attributes:
        preference_logits: parameter [max, max, C], zero at first (a uniform preference).
        projection: parameter [C, D].
        target_preference: buffer [max, max, C], zero (not set) at first.

    All three are in `state_dict` from the start.
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
        max_grid_size = checks.integer("max_grid_size", max_grid_size, low=1)
        num_colors = checks.integer("num_colors", num_colors, low=2)
        prompt_dim = checks.integer("prompt_dim", prompt_dim, low=1)
        checks.settings("weights", weights, EFEWeights, TERMS)
        checks.flag("hard_cell", hard_cell)
        checks.number("hard_cell_min_ratio", hard_cell_min_ratio)
        checks.integer("ignore_index", ignore_index)
        checks.check_choice("reduction", reduction, REDUCTIONS)
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
    ) -> EFELossOutput:
        """The loss of logits [B, T, H, W, C] against target [B, H, W]; arguments and result as in `efe_loss`.

        Without a prompt the projection gets a gradient of 0, for which DistributedDataParallel waits; weight decay then
        still shrinks it.
        """
        if prompt is not None:
            self._check_prompt(prompt)
        return efe_loss(
            logits,
            target,
            self.preference_logits,
            backward_logits=backward_logits,
            final_logits=final_logits,
            observation_probs=observation_probs,
            prompt=prompt,
            projection=self.projection,
            target_preference=self.target_preference,
            valid=valid,
            weights=self.weights,
            hard_cell=self.hard_cell,
            hard_cell_min_ratio=self.hard_cell_min_ratio,
            max_cells=self.max_grid_size**2,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def _check_prompt(self, prompt: Tensor) -> None:
        checks.check_floating("prompt", prompt)
        width = self.projection.shape[1]
        if prompt.dim() > 0 and prompt.shape[-1] != width:
            hint = f"; EFELoss(prompt_dim={prompt.shape[-1]}) takes it" if prompt.shape[-1] >= self.num_colors else ""
            raise ValueError(f"prompt must have {width} dimensions, its shape was {list(prompt.shape)}{hint}.")

    def extra_repr(self) -> str:
        size, dim = self.max_grid_size, self.projection.shape[1]
        settings = ("hard_cell", "hard_cell_min_ratio", "ignore_index", "reduction")
        told = ", ".join(f"{name}={getattr(self, name)!r}" for name in settings)
        return f"max_grid_size={size}, num_colors={self.num_colors}, prompt_dim={dim}, weights={self.weights}, {told}"

    @torch.no_grad()
    def update_target_preference(
        self, target: Tensor, valid: Tensor | None, success_rate: Tensor | float, *, synchronize: bool = True
    ) -> None:
        """Move the running target preference toward one-hot targets by the factor 0.05 + 0.15 * success_rate.

        A cell moves toward the mean of the one-hot targets of the episodes in which it counts; elsewhere it stays.
        Where torch.distributed is initialised, all ranks must call this; the episodes of all of them then move every
        rank's preference by one and the same step.

        Args:
            target: [B, H, W] or [H, W] integers in [0, C) or ignore_index.
            valid: bool of the same shape, or None.
            success_rate: number or 0-d tensor in [0, 1]; over several ranks their mean, weighted by episodes.
            synchronize: False leaves the other ranks out.

        Raises:
            TypeError, ValueError: for a wrong dtype, shape, device, colour or rate; the preference stays as it was. On
                CUDA, where looking would cost a synchronisation, a target out of range is none that counts, and a rate
                out of range moves nothing.
        """
        target = checks.integer_tensor("target", target)
        sizes = checks.Sizes("target", target, "B? H W")
        height, width = target.shape[-2:]
        if max(height, width) > self.max_grid_size:
            raise ValueError(
                f"target must be a grid of at most {self.max_grid_size} x {self.max_grid_size} cells, "
                f"its shape was {list(target.shape)}."
            )
        running = self.target_preference
        checks.check_device("target", target, "the parameters of EFELoss", running.device)
        sizes.check_optional("valid", valid, "B? H W", checks.check_bool)
        rate = self._rate(success_rate)
        target = target.reshape(-1, height, width)
        valid = None if valid is None else valid.reshape(target.shape)
        counted = counted_cells(target, valid, self.ignore_index)
        if target.device.type == "cpu":
            check_target_range(target, counted, self.num_colors)
        palette = torch.arange(self.num_colors, device=target.device)
        found = torch.zeros_like(running, dtype=accumulate_dtype(running))
        found[:height, :width] = ((target[..., None] == palette) & counted[..., None]).sum(0)
        refused = ~((rate >= 0) & (rate <= 1))
        rate = torch.stack([rate * target.shape[0], torch.full_like(rate, target.shape[0]), refused.to(rate)])
        if synchronize and distributed.is_available() and distributed.is_initialized():
            both = torch.cat([found.flatten(), rate])
            distributed.all_reduce(both)
            found, rate = both[: -len(rate)].view_as(found), both[-len(rate) :]
        episodes = found.sum(-1, keepdim=True)
        moved = running + (0.05 + 0.15 * rate[0] / rate[1]) * (found / episodes.clamp_min(1) - running)
        running.copy_(torch.where((episodes > 0) & (rate[2] == 0), moved, running))

    def _rate(self, success_rate: Tensor | float) -> Tensor:
        """The success rate, 0-d beside the parameters in the dtype of the arithmetic, checked where that costs no
        synchronisation."""
        device, dtype = self.target_preference.device, accumulate_dtype(self.target_preference)
        if not isinstance(success_rate, Tensor):
            return torch.full((), checks.number("success_rate", success_rate, 0, 1), dtype=dtype, device=device)
        if success_rate.dim() != 0:
            shape = list(success_rate.shape)
            raise ValueError(f"success_rate must be a number or a 0-d tensor, its shape was {shape}.")
        if success_rate.device.type == "cpu":
            checks.number("success_rate", success_rate.item(), 0, 1)
        return success_rate.to(device, dtype)
