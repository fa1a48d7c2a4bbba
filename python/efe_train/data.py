"""The queries made of tasks, and what the model gets of them: batches and the text of the prompt.

A query is one grid to predict together with everything that the model may know about it: the demonstration pairs and
the input grid. Its answer is kept beside it, never in it. In training every demonstration pair of a task is a query
once, with the other pairs as its demonstrations (leave one out).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from efe_train.config import NUM_COLORS, UserError
from efe_train.facts import Facts, infer_size, observe
from efe_train.tasks import Grid, Pair, Task

OUTSIDE = NUM_COLORS
"""What the views hold where a grid of the batch has no cell."""

POOL = 16
"""Batches whose queries are sorted by size together, so that a batch holds grids of about one size."""

SIDE_STEP = 6
"""With few shapes, a batch is padded to a square whose side is a multiple of this: 6, 12, 18, 24 or 30 cells. Triton
compiles a kernel for each shape, and planes of an even number of cells are read two cells at a time.
"""


@dataclass(frozen=True, eq=False)
class Query:
    """One grid to predict and what may be known about it.

    key: names the query within its data set. size: height and width of the grid that the planner fills: the true one
    in training, where the loss needs it, and `inferred_size` in evaluation. Prompt and features know only the latter.
    """

    key: str
    demonstrations: tuple[Pair, ...]
    source: Grid
    size: tuple[int, int]

    @cached_property
    def inferred_size(self) -> tuple[int, int]:
        return infer_size(self.demonstrations, self.source)

    @cached_property
    def facts(self) -> Facts:
        return observe(self.demonstrations, self.source, self.inferred_size)


@dataclass(frozen=True, eq=False)
class Example:
    """A query and its answer."""

    query: Query
    answer: Grid


@dataclass(frozen=True)
class Batch:
    """Queries padded to one size.

    views: [B, 2, H, W] int64, the input grid brought to the output's size by scaling and by tiling; OUTSIDE in padding.
    valid: [B, H, W] bool, False in padding. features: [B, NUM_FEATURES] float32.
    target: [B, H, W] int64, 0 in padding; None where there is nothing to learn from.
    """

    queries: tuple[Query, ...]
    views: Tensor
    valid: Tensor
    features: Tensor
    target: Tensor | None

    def to(self, device: torch.device) -> Batch:
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("views", "valid", "features")}
        return replace(self, **moved, target=None if self.target is None else self.target.to(device, non_blocking=True))


def training_examples(tasks: Sequence[Task]) -> list[Example]:
    """Every demonstration pair as a query, held out of its own demonstrations. A task with one pair gives none."""
    examples = []
    for task in tasks:
        for number, pair in enumerate(task.demonstrations):
            others = task.demonstrations[:number] + task.demonstrations[number + 1 :]
            if others:
                height, width = pair.output.shape
                query = Query(f"{task.id}/train/{number}", others, pair.input, (height, width))
                examples.append(Example(query, pair.output))
    if not examples:
        raise UserError("The data set gives nothing to train on: a task needs at least two demonstration pairs.")
    return examples


def evaluation_queries(task: Task) -> list[Query]:
    """The test inputs of a task as queries whose output size is inferred. The answers stay behind, in task.tests."""
    return [
        Query(f"{task.id}/test/{number}", task.demonstrations, source, infer_size(task.demonstrations, source))
        for number, (source, _) in enumerate(task.tests)
    ]


def fingerprint(examples: Sequence[Example]) -> str:
    """Of the training queries and their answers, to notice that the data of a run has changed."""
    digest = hashlib.sha256()
    for example in examples:
        for grid in (example.query.source, example.answer):
            digest.update(f"{example.query.key} {grid.shape}".encode() + grid.tobytes())
    return digest.hexdigest()


def epoch_batches(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[Example]]:
    """All examples in batches of about equal grid sizes, in an order that depends on seed and epoch alone."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(examples)).tolist()
    batches = []
    for start in range(0, len(order), POOL * batch_size):
        pool = sorted(order[start : start + POOL * batch_size], key=lambda index: by_longer_side(examples[index].query))
        batches += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    return [[examples[index] for index in batches[number]] for number in generator.permutation(len(batches))]


def by_longer_side(query: Query) -> tuple[int, int]:
    return max(query.size), min(query.size)


def collate(queries: Sequence[Query], answers: Sequence[Grid] | None = None, *, few_shapes: bool = False) -> Batch:
    """Pad queries, and where given their answers, to the largest grid among them, or to one of few shapes."""
    height, width = (max(query.size[axis] for query in queries) for axis in (0, 1))
    if few_shapes:
        height = width = SIDE_STEP * math.ceil(max(height, width) / SIDE_STEP)
    views = np.full((len(queries), 2, height, width), OUTSIDE, dtype=np.int64)
    valid = np.zeros((len(queries), height, width), dtype=np.bool_)
    target = np.zeros((len(queries), height, width), dtype=np.int64)
    for row, query in enumerate(queries):
        h, w = query.size
        views[row, 0, :h, :w] = scaled(query.source, h, w)
        views[row, 1, :h, :w] = tiled(query.source, h, w)
        valid[row, :h, :w] = True
        if answers is not None:
            target[row, :h, :w] = answers[row]
    return Batch(
        tuple(queries),
        torch.from_numpy(views),
        torch.from_numpy(valid),
        torch.tensor([query.facts.vector() for query in queries], dtype=torch.float32),
        torch.from_numpy(target) if answers is not None else None,
    )


def scaled(grid: Grid, height: int, width: int) -> Grid:
    """Nearest-neighbour resize."""
    rows = np.arange(height) * grid.shape[0] // height
    columns = np.arange(width) * grid.shape[1] // width
    return grid[rows][:, columns]


def tiled(grid: Grid, height: int, width: int) -> Grid:
    """The grid repeated, or its top-left part."""
    return grid[np.arange(height) % grid.shape[0]][:, np.arange(width) % grid.shape[1]]


def prompt_text(query: Query, max_chars: int) -> str:
    """The rule that the demonstrations suggest, in words, then the demonstrations, cut to at most max_chars.

    Each demonstration gets an equal part of the room, half for its input and half for its output, so that the last of
    them is shown as well as the first.
    """
    head = f"ARC puzzle. {rule_sentence(query)}\n"
    room = max_chars - len(head)
    each = room // max(len(query.demonstrations), 1)
    shown = "".join(demonstration_text(pair, each) for pair in query.demonstrations)
    return (head + shown)[:max_chars]


def rule_sentence(query: Query) -> str:
    facts = query.facts
    height, width = query.inferred_size
    parts = [f"in {query.source.shape[0]}x{query.source.shape[1]} out {height}x{width}"]
    if facts.same_size == 1:
        parts.append(f"{100 * facts.changed:.0f}% of cells change")
    if facts.recoloured == 1:
        parts.append("each colour becomes one colour")
    before = {int(colour) for pair in query.demonstrations for colour in np.unique(pair.input)}
    after = {int(colour) for pair in query.demonstrations for colour in np.unique(pair.output)}
    for verb, colours in (("appear", after - before), ("vanish", before - after)):
        if colours:
            parts.append(f"colours {' '.join(map(str, sorted(colours)))} {verb}")
    if facts.mirrored_across == 1:
        parts.append("outputs mirror left-right")
    if facts.mirrored_down == 1:
        parts.append("outputs mirror up-down")
    return "; ".join(parts) + "."


def demonstration_text(pair: Pair, room: int) -> str:
    half = (room - len(" > \n")) // 2
    return f"{grid_text(pair.input, half)} > {grid_text(pair.output, half)}\n" if half > 0 else ""


def grid_text(grid: Grid, room: int) -> str:
    """Rows of digits between bars; rows that do not fit are left out, and two dots stand for them."""
    text = "|".join("".join(map(str, row)) for row in grid.tolist())
    return text if len(text) <= room else text[: max(room - 2, 0)] + ".."[:room]
