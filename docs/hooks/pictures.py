"""What each term of the loss does to a small grid, drawn from the loss itself when the site is built.

A cell is a stack of bands, one for each outcome, as high as the outcome is probable. What a term says of one cell comes
from `efe_loss` with that cell alone valid; what it does, from gradient steps on that term alone. The pictures are SVG
within the page, so that they take the colours of its theme.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from efe_kernels import EFELossOutput, efe_loss

SIDE, OUTCOMES, STEPS = 4, 4, 3
CELL = 32  # units of a drawing
COLOURS = ("#3f7fd0", "#d1483f", "#4b9e52", "#e0b13c")
DESCENT_STEPS, DESCENT_RATE = 40, 0.15


def random_logits(*shape: int, seed: int) -> Tensor:
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PLAN = random_logits(STEPS, SIDE, SIDE, OUTCOMES, seed=1)
PREFERENCE = random_logits(SIDE, SIDE, OUTCOMES, seed=2)
TARGET = torch.tensor([[0, 0, 1, 1], [0, 2, 2, 1], [3, 2, 2, 1], [3, 3, 0, 0]])


def loss_of(plan: Tensor, preference: Tensor = PREFERENCE, **options: Any) -> EFELossOutput:
    return efe_loss(plan, TARGET, preference, **options)


def by_cell(term: str, plan: Tensor, preference: Tensor = PREFERENCE, **options: Any) -> Tensor:
    """The term of each cell, [H, W]: an episode for each, in which that cell alone is valid."""
    cells = SIDE * SIDE
    valid = torch.eye(cells, dtype=torch.bool).view(cells, SIDE, SIDE)
    plans, targets = plan.expand(cells, *plan.shape), TARGET.expand(cells, SIDE, SIDE)
    return efe_loss(plans, targets, preference, valid=valid, **options).terms[term].view(SIDE, SIDE)


def descend(term: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where gradient steps on the term alone lead."""
    leaf = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=DESCENT_RATE)
    for _ in range(DESCENT_STEPS):
        optimizer.zero_grad()
        term(leaf).backward()
        optimizer.step()
    return leaf.detach()


def drawing(parts: Sequence[str], width: float, height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}" {style}/>'


def distributions(probs: Tensor, label: str, wrong: Tensor | None = None) -> str:
    """probs [H, W, C]. wrong: [H, W], cells to mark."""
    parts = []
    for row in range(SIDE):
        for column in range(SIDE):
            top, left = row * CELL + 1, column * CELL + 1
            for colour, share in zip(COLOURS, probs[row, column].tolist(), strict=True):
                height = share * (CELL - 2)
                parts.append(rectangle(left, top, CELL - 2, height, f'fill="{colour}"'))
                top += height
            if wrong is not None and wrong[row, column]:
                centre = (column + 0.5) * CELL, (row + 0.5) * CELL
                parts.append(f'<circle cx="{centre[0]:g}" cy="{centre[1]:g}" r="6" class="wrong"/>')
    return drawing(parts, SIDE * CELL, SIDE * CELL, label)


def values(table: Tensor, label: str) -> str:
    """table [H, W], each number on a tint as strong as it is large."""
    parts, largest = [], max(table.max().item(), 1e-6)
    for row in range(SIDE):
        for column in range(SIDE):
            value = table[row, column].item()
            tint = f'class="tint" fill-opacity="{max(0.6 * value / largest, 0):.2f}"'
            parts.append(rectangle(column * CELL + 1, row * CELL + 1, CELL - 2, CELL - 2, tint))
            place = f'x="{(column + 0.5) * CELL:g}" y="{(row + 0.5) * CELL + 4:g}"'
            parts.append(f'<text {place} class="value">{max(value, 0):.2f}</text>')
    return drawing(parts, SIDE * CELL, SIDE * CELL, label)


def bars(vector: Tensor, label: str) -> str:
    """vector [C], scaled to its largest magnitude."""
    size, width = SIDE * CELL, SIDE * CELL / OUTCOMES
    parts = [f'<line x1="0" x2="{size}" y1="{size / 2}" y2="{size / 2}" class="axis"/>']
    for place, value in enumerate((vector / vector.abs().max()).tolist()):
        height = abs(value) * (size / 2 - 6)
        top = size / 2 - (height if value > 0 else 0)
        parts.append(rectangle(place * width + 4, top, width - 8, height, f'fill="{COLOURS[place]}"'))
    return drawing(parts, size, size, label)


def row(*panels: tuple[str, str]) -> str:
    """Drawings beside each other, with a caption below each. One line: a blank one would end the HTML in Markdown."""
    figures = [f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in panels]
    return f'<div class="panels">{"".join(figures)}</div>'


def told(name: str, before: Tensor, after: Tensor) -> str:
    return f"after {DESCENT_STEPS} steps on {name} alone: {before.item():.2f} → {after.item():.2f}"


def risk() -> str:
    plan = PLAN[:1]
    after = descend(lambda logits: loss_of(logits).terms["risk"], plan)
    change = told("risk", loss_of(plan).terms["risk"], loss_of(after).terms["risk"])
    return row(
        (distributions(plan[0].softmax(-1), "the plan"), "the plan q"),
        (distributions(PREFERENCE.softmax(-1), "the preference"), "the preference c"),
        (values(by_cell("risk", plan), "risk of each cell"), "KL(q ‖ c) of each cell"),
        (distributions(after[0].softmax(-1), "the plan afterwards"), f"the plan {change}"),
    )


def ambiguity() -> str:
    plan = PLAN[:1]
    after = descend(lambda logits: loss_of(logits).terms["ambiguity"], plan)
    change = told("ambiguity", loss_of(plan).terms["ambiguity"], loss_of(after).terms["ambiguity"])
    return row(
        (distributions(plan[0].softmax(-1), "the plan"), "the plan q"),
        (values(by_cell("ambiguity", plan), "ambiguity of each cell"), "H(q) of each cell"),
        (distributions(after[0].softmax(-1), "the plan afterwards"), f"the plan {change}"),
    )


def consistency() -> str:
    plan = PLAN[:1]
    after = descend(lambda logits: loss_of(logits).terms["consistency"], plan)
    change = told("consistency", loss_of(plan).terms["consistency"], loss_of(after).terms["consistency"])
    return row(
        (distributions(plan[0].softmax(-1), "the last step"), "the last step of the plan"),
        (distributions(one_hot(TARGET, OUTCOMES).float(), "the target"), "the target"),
        (values(by_cell("consistency", plan), "cross-entropy of each cell"), "cross-entropy of each cell"),
        (distributions(after[0].softmax(-1), "the last step afterwards"), f"the last step {change}"),
    )


def agreement() -> str:
    after = descend(lambda logits: loss_of(logits).terms["agreement"], PLAN)
    change = told("agreement", loss_of(PLAN).terms["agreement"], loss_of(after).terms["agreement"])

    def steps(plan: Tensor, when: str) -> list[tuple[str, str]]:
        return [
            (distributions(plan[t].softmax(-1), f"step {t + 1} {when}"), f"step {t + 1} {when}") for t in range(STEPS)
        ]

    return row(
        *steps(PLAN, "of the plan"),
        (values(by_cell("agreement", PLAN), "agreement of each cell"), "JS(q ‖ r) of each cell, mean over the steps"),
    ) + row(
        *steps(after, "afterwards"),
        (values(by_cell("agreement", after), "agreement of each cell afterwards"), change),
    )


def anchor() -> str:
    running = 0.75 * one_hot(TARGET, OUTCOMES).float() + 0.25 / OUTCOMES
    plan = PLAN[:1]

    def term(preference: Tensor) -> Tensor:
        return loss_of(plan, preference, target_preference=running).terms["anchor"]

    after = descend(term, PREFERENCE)
    return row(
        (distributions(PREFERENCE.softmax(-1), "the preference"), "the preference c"),
        (distributions(running, "the running target preference"), "the running target preference ĉ"),
        (values(by_cell("anchor", plan, target_preference=running), "anchor of each cell"), "KL(c ‖ ĉ) of each cell"),
        (
            distributions(after.softmax(-1), "the preference afterwards"),
            f"the preference {told('anchor', term(PREFERENCE), term(after))}",
        ),
    )


def prompt() -> str:
    plan, embedding = PLAN[:1], random_logits(8, seed=5)
    projection = random_logits(OUTCOMES, 8, seed=6)

    def term(logits: Tensor) -> Tensor:
        return loss_of(logits, prompt=embedding, projection=projection).terms["prompt"]

    def mean_logits(logits: Tensor) -> Tensor:
        return (logits[0] - logits[0].mean(-1, keepdim=True)).mean((0, 1))

    after = descend(term, plan)
    return row(
        (bars(mean_logits(plan), "mean logits"), "mean logits z of the plan above"),
        (bars(projection @ embedding, "projected prompt"), "the projected prompt W e"),
        (bars(mean_logits(after), "mean logits afterwards"), f"z {told('prompt', term(plan), term(after))}"),
        (distributions(after[0].softmax(-1), "the plan afterwards"), "the plan afterwards"),
    )


def hard_cell() -> str:
    target = one_hot(TARGET, OUTCOMES).float()
    panels = []
    for right in (0.0, 2.0, 3.5, 8.0):
        plan = (PLAN[:1] + right * target)[:1]
        output, wrong = loss_of(plan), plan[0].argmax(-1) != TARGET
        caption = f"mask_ratio {output.mask_ratio.item():.2f}, scale {output.hard_cell_scale.item():.2f}"
        panels.append((distributions(plan[0].softmax(-1), caption, wrong), caption))
    return row(*panels)


PICTURES = {
    "risk": risk,
    "ambiguity": ambiguity,
    "consistency": consistency,
    "agreement": agreement,
    "anchor": anchor,
    "prompt": prompt,
    "hard_cell": hard_cell,
}
