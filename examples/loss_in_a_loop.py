"""EFELoss in a plain PyTorch loop: a tiny planner learns two rules on synthetic grids.

In each grid some cells are coloured. Under the first rule a colour also fills the empty cell to its right, under the
second the one below it. A learned embedding of the rule, in place of a language model's, is the prompt. Grids have
sizes of their own and are padded; `valid` says which cells are real.

    python examples/loss_in_a_loop.py             # 200 steps, some ten seconds
    python examples/loss_in_a_loop.py --steps 20

It prints the loss, its terms and the share of cells that are still wrong as training goes on, then the share of right
cells on new grids, beside that of copying the input.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efe_kernels import EFELoss

STEPS, COLORS, PROMPT_DIM, SIDE = 3, 10, 16, 8


class Batch(NamedTuple):
    source: Tensor  # [B, H, W] colours, 0 is empty
    target: Tensor  # [B, H, W]
    valid: Tensor  # [B, H, W] bool
    rule: Tensor  # [B], 0 or 1


class Result(NamedTuple):
    copied: float  # share of right cells of the input itself, on new grids
    planned: float  # the same of the plan's last step
    losses: list[float]


def new_batch(size: int = 64) -> Batch:
    colour = torch.randint(1, COLORS, (size, SIDE, SIDE))
    source = torch.where(torch.rand(size, SIDE, SIDE) < 0.25, colour, 0)
    rows = torch.arange(SIDE)[:, None] < torch.randint(4, SIDE + 1, (size, 1, 1))
    columns = torch.arange(SIDE) < torch.randint(4, SIDE + 1, (size, 1, 1))
    valid = rows & columns
    source = source.where(valid, 0)
    rule = torch.randint(2, (size,))
    from_left, from_above = F.pad(source, (1, 0))[..., :-1], F.pad(source, (0, 0, 1, 0))[:, :-1]
    moved = torch.where(rule[:, None, None] == 0, from_left, from_above)
    return Batch(source, source.where(source > 0, moved).where(valid, 0), valid, rule)


class Planner(nn.Module):
    """Shared weights turn each step of the plan into the next one; the prompt is added in every cell."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Conv2d(COLORS, width, 3, padding=1)
        self.prompt = nn.Linear(PROMPT_DIM, width)
        self.step = nn.Conv2d(width, width, 3, padding=1)
        self.read = nn.Conv2d(width, COLORS, 1)

    def forward(self, source: Tensor, prompt: Tensor) -> Tensor:
        hidden = self.embed(F.one_hot(source, COLORS).movedim(-1, 1).float()) + self.prompt(prompt)[..., None, None]
        plan = []
        for _ in range(STEPS):
            hidden = hidden + self.step(F.relu(hidden))
            plan.append(self.read(F.relu(hidden)))
        # The memory order [B, T, C, H, W], seen as [B, T, H, W, C], is what the loss reads fastest.
        return torch.stack(plan, 1).movedim(2, -1)


def right_cells(grid: Tensor, batch: Batch) -> float:
    return float((grid == batch.target)[batch.valid].float().mean())


def main(arguments: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    torch.manual_seed(settings.seed)
    planner, prompts = Planner(), nn.Embedding(2, PROMPT_DIM)
    loss = EFELoss(max_grid_size=SIDE, num_colors=COLORS, prompt_dim=PROMPT_DIM)
    # The loss learns the preferences and the projection of the prompt: its parameters belong in the optimizer.
    optimizer = torch.optim.AdamW([*planner.parameters(), *prompts.parameters(), *loss.parameters()], lr=3e-3)
    losses = []
    for step in range(settings.steps):
        batch = new_batch()
        prompt = prompts(batch.rule)
        out = loss(planner(batch.source, prompt), batch.target, prompt=prompt, valid=batch.valid)
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        losses.append(float(out.total.detach()))
        if step % 50 == 0 or step == settings.steps - 1:
            terms = " ".join(f"{name} {float(term.detach().mean()):.3f}" for name, term in out.terms.items())
            print(f"step {step:4} loss {losses[-1]:6.3f} wrong {float(out.mask_ratio.mean()):.3f} | {terms}")
    batch = new_batch(512)
    with torch.no_grad():
        plan = planner(batch.source, prompts(batch.rule))
    result = Result(right_cells(batch.source, batch), right_cells(plan[:, -1].argmax(-1), batch), losses)
    print(f"right cells on new grids: copying {result.copied:.3f}, the plan {result.planned:.3f}")
    return result


if __name__ == "__main__":
    main()
