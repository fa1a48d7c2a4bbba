"""The planner: a small convolutional network that drafts the output grid and improves the draft step by step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efe_train.config import NUM_COLORS, PLANNING_STEPS, PROMPT_DIM


class PlanningStep(nn.Module):
    """One residual update of the cells' state, steered by the prompt and by the mean state of the grid."""

    def __init__(self, channels: int, prompt_dim: int, dilation: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.steer = nn.Linear(prompt_dim + channels, 2 * channels)
        self.update = nn.Conv2d(channels, channels, 1)

    def forward(self, state: Tensor, prompt: Tensor, valid: Tensor, cells: Tensor) -> Tensor:
        """state: [B, K, H, W], zero outside the grid. valid: [B, 1, H, W]. cells: [B, 1], how many are valid."""
        overview = state.sum((2, 3)) / cells
        gain, shift = self.steer(torch.cat([prompt, overview], 1))[:, :, None, None].chunk(2, 1)
        seen = self.look(nn.functional.silu(state)) * (1 + gain) + shift
        return (state + self.update(nn.functional.silu(seen))) * valid


class Planner(nn.Module):
    """Predicts the output grid in T steps from the input grid and a prompt.

    The state of a cell starts as an embedding of the input's colour there, so that what stays the same is easily kept.
    Cells outside the grid are held at zero: the plan of a grid does not depend on the padding around it.
    """

    def __init__(self, channels: int = 64, steps: int = PLANNING_STEPS, prompt_dim: int = PROMPT_DIM) -> None:
        super().__init__()
        # One channel per colour and one for cells outside, for each of the two views.
        self.embed = nn.Conv2d(2 * (NUM_COLORS + 1), channels, 1)
        self.steps = nn.ModuleList(
            PlanningStep(channels, prompt_dim, dilation=1 << (step % 4)) for step in range(steps)
        )
        self.head = nn.Conv2d(channels, NUM_COLORS, 1)

    def forward(self, views: Tensor, valid: Tensor, prompt: Tensor) -> Tensor:
        """Logits [B, T, H, W, C] in the memory order [B, T, C, H, W], the loss's fast path.

        views: [B, 2, H, W] integers. valid: [B, H, W] bool. prompt: [B, D].
        """
        inside = valid[:, None].to(prompt.dtype)
        cells = inside.sum((2, 3)).clamp_min(1)
        colours = nn.functional.one_hot(views, NUM_COLORS + 1).permute(0, 1, 4, 2, 3).flatten(1, 2)
        state = self.embed(colours.to(prompt.dtype)) * inside
        drafts = []
        for step in self.steps:
            state = step(state, prompt, inside, cells)
            drafts.append(self.head(state))
        return torch.stack(drafts, dim=1).permute(0, 1, 3, 4, 2)
