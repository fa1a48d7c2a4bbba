"""Rewards of grid predictions in plain PyTorch: the definition, and what serves where no kernel exists."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
REWARD_TERMS = ("accuracy", "size", "colour", "reversibility")


def resize_index(size: int, new_size: int, device: torch.device) -> Tensor:
    """Source index of each of new_size cells, nearest neighbour with the float32 arithmetic of `interpolate`."""
    steps = torch.arange(new_size, dtype=torch.float32, device=device)
    return (steps * (size / new_size)).floor().long().clamp(max=size - 1)


def resize(grid: Tensor, height: int, width: int) -> Tensor:
    """grid [..., H, W] of colours -> [..., height, width]."""
    rows = resize_index(grid.shape[-2], height, grid.device)
    columns = resize_index(grid.shape[-1], width, grid.device)
    return grid[..., rows[:, None], columns]


def colours(prediction: Tensor) -> Tensor:
    """Colour map [B, H, W] int64 of logits [B, H, W, C] or of an integer grid [B, H, W].

    The first of equal logits wins, and NaN never does: a cell of NaN alone has colour 0.
    """
    if not prediction.is_floating_point():
        return prediction.long()
    return torch.where(prediction.isnan(), -torch.inf, prediction).argmax(-1)


def counted_cells(target: Tensor, valid: Tensor | None) -> Tensor:
    counted = target.long() != IGNORE_INDEX
    return counted if valid is None else counted & valid


def histogram(grid: Tensor, counted: Tensor, num_colors: int) -> Tensor:
    """Counted cells per colour: grid [B, H, W], counted [B, H, W] bool -> [B, num_colors] int64."""
    palette = torch.arange(num_colors, device=grid.device)
    return ((grid[..., None] == palette) & counted[..., None]).sum((1, 2))


def size_score(size: tuple[int, int], target_size: tuple[int, int]) -> float:
    """1 minus half the relative differences of height and width."""
    (height, width), (target_height, target_width) = size, target_size
    differences = abs(height - target_height) / (target_height + 1e-6) + abs(width - target_width) / (
        target_width + 1e-6
    )
    return 1 - 0.5 * differences


def grid_reward(
    before: Tensor,
    after: Tensor,
    target: Tensor,
    valid: Tensor | None,
    reversibility: Tensor | None,
    weights: list[float],
    num_colors: int,
) -> Tensor:
    """The table [14, B] float32 of rewards: see `reward_table`."""
    counted = counted_cells(target, valid)
    target = target.long()
    count = counted.sum((1, 2)).clamp(min=1)
    target_histogram = histogram(target, counted, num_colors)
    in_palette = counted & (target >= 0) & (target < num_colors)
    scores = []
    for i, prediction in enumerate((before, after)):
        grid = colours(prediction)
        size = size_score((grid.shape[1], grid.shape[2]), (target.shape[1], target.shape[2]))
        grid = resize(grid, *target.shape[1:])
        equal = ((grid == target) & in_palette).sum((1, 2))
        difference = (histogram(grid, counted, num_colors) - target_histogram).abs().sum(1)
        accuracy = equal.float() / count
        colour = 1 - difference.float() / count / num_colors
        back = torch.full_like(accuracy, 0.5) if reversibility is None else reversibility[i]
        scores.append(torch.stack([accuracy, torch.full_like(accuracy, size), colour, back]))
    wrong = counted.sum((1, 2)) - equal
    return reward_table(scores[0], scores[1], wrong.float() / count, weights)


def reward_table(before: Tensor, after: Tensor, mask_ratio: Tensor, weights: list[float]) -> Tensor:
    """Rows of the result: the reward, its four deltas, the four scores before, the four after, the mask ratio.

    before, after: [4, B] in the order of REWARD_TERMS; mask_ratio: [B].
    """
    delta = (after - before).clamp(-1, 1)
    reward = weights[0] * delta[0] + weights[1] * delta[1] + weights[2] * delta[2] + weights[3] * delta[3]
    return torch.cat([reward[None], delta, before, after, mask_ratio[None]])


def reversibility(recovered: Tensor, source: Tensor) -> Tensor:
    """Share of the cells of source [H, W] that the recovered grid [h, w], resized to it, has right: 0-d float32."""
    return (resize(recovered, *source.shape) == source).float().mean()


def check_colours(name: str, grid: Tensor, counted: Tensor | None, num_colors: int) -> None:
    """Every colour of an integer grid where `counted` (everywhere without it) is in [0, num_colors)."""
    # As int64: in a narrow dtype num_colors itself would wrap around.
    outside = (grid.long() < 0) | (grid.long() >= num_colors)
    if counted is not None:
        outside = outside & counted
    if outside.any():
        found = grid[outside][0].item()
        raise ValueError(f"{name} must hold colours from 0 to {num_colors - 1}, it held {found}.")


def in_palette(grid_reward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """grid_reward after a look at the range of every colour, on the CPU only: on a GPU it would wait for the device."""

    @functools.wraps(grid_reward)
    def serve(before: Tensor, after: Tensor, target: Tensor, valid: Tensor | None, *rest: Any) -> Tensor:
        if target.device.type == "cpu":
            *_, num_colors = rest
            counted = counted_cells(target, valid)
            check_colours("target", target, counted, num_colors)
            for name, prediction in (("before", before), ("after", after)):
                if not prediction.is_floating_point():
                    padding = counted if prediction.shape == target.shape else None
                    check_colours(name, prediction, padding, num_colors)
        return grid_reward(before, after, target, valid, *rest)

    return serve
