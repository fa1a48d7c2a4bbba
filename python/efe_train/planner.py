"""The planner: what the demonstrations say as a first draft, and a small network that corrects it step by step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efe_train.config import NUM_COLORS, PLANNING_STEPS, PROMPT_DIM
from efe_train.data import Observation
from efe_train.lookup import KEPT, STATISTICS, table_names
from efe_train.views import WATCHED

DILATIONS = (1, 2)
"""Of the steps in turn: two weights are shared by all steps."""

GIST = 8
"""Numbers that the planner reads of a prompt: a policy that learns from rewards alone has few directions to search."""

DECISIVENESS = 20.0
"""How much the tables' scores decide: a table that gets a tenth more of the cells right counts seven times as much."""

FLOOR = 0.01
"""Probability that the first draft leaves to colours which the demonstrations rule out."""


class Recall(nn.Module):
    """The first draft: what the tables of a look-up say, each as far as it is to be trusted.

    A table counts by which one it is, by how reliable it has been on the demonstrations, by how often they show the
    pattern of a cell, and by what the prompt makes of its reliability. Untrained this is a fixed rule of reliability.
    """

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(len(table_names()) + 1, 1)
        self.worth = nn.Linear(STATISTICS, 1, bias=False)
        self.judge = nn.Linear(STATISTICS, hidden)
        self.steer = nn.Linear(GIST, 2 * hidden)
        self.verdict = nn.Linear(hidden, 1, bias=False)
        self.doubt = nn.Parameter(torch.tensor(0.3).log())
        with torch.no_grad():
            self.table.weight.zero_()
            self.worth.weight.copy_(torch.tensor([1.0, 1.0, 0.3, 0.1, 0.0, 0.0]))
            self.verdict.weight.zero_()

    def forward(self, seen: Observation, gist: Tensor) -> Tensor:
        """Probabilities [B, 10, H, W]. gist: [B, GIST], of the prompt."""
        gain, shift = self.steer(gist)[:, None].chunk(2, -1)
        judged = nn.functional.silu(self.judge(seen.statistics) * (1 + gain) + shift)
        score = self.table(seen.tables) + self.worth(seen.statistics) + self.verdict(judged)
        trust = (DECISIVENESS * (score - score.amax(1, keepdim=True))).exp()[..., None]
        known = seen.counts.sum(2)
        weight = trust / (known + self.doubt.exp())
        votes = (weight[:, :, None] * seen.counts).sum(1)
        # Where no table knows the pattern, the colour stays.
        votes = votes + 1e-4 * unchanged(seen) + 1e-9
        return votes / votes.sum(1, keepdim=True)


class PlanningStep(nn.Module):
    """One residual update of the cells' state, steered by the prompt and by the mean state of the grid."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.steer = nn.Linear(GIST + channels, 2 * channels)
        self.update = nn.Conv2d(channels, channels, 1)

    def forward(self, state: Tensor, gist: Tensor, valid: Tensor, cells: Tensor) -> Tensor:
        """state: [B, K, H, W], zero outside the grid. gist: [B, GIST], of the prompt. valid: [B, 1, H, W]. cells:
        [B, 1], how many are valid.
        """
        overview = state.sum((2, 3)) / cells
        gain, shift = self.steer(torch.cat([gist, overview], 1))[:, :, None, None].chunk(2, 1)
        seen = self.look(nn.functional.silu(state)) * (1 + gain) + shift
        return (state + self.update(nn.functional.silu(seen))) * valid


class Planner(nn.Module):
    """Predicts the output grid in T steps from what is seen of a query and from a prompt.

    The steps share their weights, and each sees the draft of the one before it: at evaluation more of them can be run.
    Cells outside the grid are held at zero: the plan of a grid does not depend on the padding around it.
    """

    def __init__(
        self,
        channels: int = 48,
        steps: int = PLANNING_STEPS,
        prompt_dim: int = PROMPT_DIM,
        *,
        look_up: bool = True,
    ) -> None:
        """look_up: whether it sees what the demonstrations say."""
        super().__init__()
        self.num_steps = steps
        self.look_up = look_up
        self.gist = nn.Linear(prompt_dim, GIST)
        self.balance = nn.Linear(GIST, 3)
        self.recall = Recall()
        self.embed = nn.Conv2d(len(WATCHED) * (NUM_COLORS + 1) + KEPT * (NUM_COLORS + 1), channels, 1)
        self.draft = nn.Conv2d(NUM_COLORS, channels, 1)
        self.steps = nn.ModuleList(PlanningStep(channels, dilation) for dilation in DILATIONS)
        self.head = nn.Conv2d(channels, NUM_COLORS, 1)
        self.confidence = nn.Linear(STATISTICS, 1)
        # Untrained, the plan is the first draft.
        for parameter in (*self.confidence.parameters(), *self.head.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, seen: Observation, prompt: Tensor, steps: int | None = None) -> Tensor:
        """Logits [B, T, H, W, 10] in the memory order [B, T, 10, H, W], the loss's fast path.

        prompt: [B, D]. steps: T, instead of the number that the planner was built with.
        """
        if not self.look_up:
            seen = seen.without_look_up()
        with torch.autocast(prompt.device.type, enabled=False):
            gist = self.gist(prompt.float())
            # The prompt weighs the first draft, the corrections to it, and the colours of the input against each other.
            trust, boldness, keep = self.balance(gist)[..., None, None, None].unbind(1)
            logits = first = self.first_draft(seen, gist, trust, keep)
            boldness = boldness.exp()
        inside = seen.valid[:, None].to(prompt.dtype)
        cells = inside.sum((2, 3)).clamp_min(1)
        known = seen.counts.sum(2)
        shares = seen.counts / (known + 0.1)[:, :, None]
        colours = torch.cat([one_hot(seen.views), shares.flatten(1, 2), known / (known + 3)], 1)
        evidence = self.embed(colours) * inside
        state = torch.zeros_like(evidence)
        drafts = []
        for number in range(steps or self.num_steps):
            state = state + evidence + self.draft(logits.softmax(1)) * inside
            state = self.steps[number % len(DILATIONS)](state, gist, inside, cells)
            correction = self.head(state)
            logits = (first + boldness * correction).to(correction.dtype)
            drafts.append(logits)
        return torch.stack(drafts, dim=1).permute(0, 1, 3, 4, 2)

    def first_draft(self, seen: Observation, gist: Tensor, trust: Tensor, keep: Tensor) -> Tensor:
        """Logits [B, 10, H, W] before any correction. trust: [B, 1, 1, 1], how sure of the look-up to be beside what
        its best table says of itself. keep: [B, 1, 1, 1], what the colours of the input count for.
        """
        confidence = (self.confidence(seen.statistics[:, 0])[..., None, None] + trust).exp()
        return confidence * (self.recall(seen, gist) + FLOOR).log() + keep * unchanged(seen)


def unchanged(seen: Observation) -> Tensor:
    """[B, 10, H, W], 1 at the colour of the scaled input and 0 elsewhere."""
    return one_hot(seen.views[:, :1])[:, :NUM_COLORS]


def one_hot(views: Tensor) -> Tensor:
    """[B, V * 11, H, W], a plane for each view and colour. views: [B, V, H, W]."""
    flags = views[:, :, None] == torch.arange(NUM_COLORS + 1, device=views.device)[:, None, None]
    return flags.flatten(1, 2).float()
