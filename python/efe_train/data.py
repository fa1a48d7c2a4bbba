"""The queries made of tasks, and what the model gets of them: batches and the text of the prompt.

A query is one grid to predict together with everything that the model may know about it: the demonstration pairs and
the input grid. Its answer is kept beside it, never in it. In training every demonstration pair of a task is a query
once, with the other pairs as its demonstrations (leave one out).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from efe_train.augment import AS_IT_IS, Augmentation
from efe_train.config import NUM_COLORS, UserError
from efe_train.facts import Facts, observe
from efe_train.lookup import KEPT, Lookup, look_up
from efe_train.size import infer_size
from efe_train.tasks import Grid, Pair, Task
from efe_train.views import OUTSIDE, WATCHED, Scene

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
    def views(self) -> npt.NDArray[np.uint8]:
        """What the planner sees of the input, [V, H, W]: small numbers, for they are kept for a whole run."""
        return Scene(self.source, self.size).watched.astype(np.uint8)

    @cached_property
    def lookup(self) -> Lookup:
        return look_up(self.demonstrations, self.source, self.size)

    @cached_property
    def facts(self) -> Facts:
        return observe(self.demonstrations, self.source, self.inferred_size)

    def augmented(self, change: Augmentation) -> Query:
        """The query of the augmented task, under the same key."""
        pairs = tuple(Pair(change.grid(pair.input), change.grid(pair.output)) for pair in self.demonstrations)
        return Query(self.key, pairs, change.grid(self.source), change.size(self.size))


@dataclass(frozen=True, eq=False)
class Example:
    """A query and its answer."""

    query: Query
    answer: Grid


class Observation(NamedTuple):
    """What the planner sees of B queries, beside the prompts.

    valid: [B, H, W] bool, False in padding. views: [B, V, H, W] int64, those of `views.WATCHED`; OUTSIDE in padding.
    counts: [B, K, 10, H, W] float32, tables: [B, K] int64, statistics: [B, K, S] float32: what the demonstrations say,
    as in `Lookup`.
    """

    valid: Tensor
    views: Tensor
    counts: Tensor
    tables: Tensor
    statistics: Tensor

    def without_look_up(self) -> Observation:
        return self._replace(counts=torch.zeros_like(self.counts), statistics=torch.zeros_like(self.statistics))


@dataclass(frozen=True)
class Batch:
    """Queries padded to one size. With augmentations everything but `features` is that of the augmented queries.

    features: [B, NUM_FEATURES] float32. target: [B, H, W] int64, 0 in padding; None where there is nothing to learn
    from.
    """

    queries: tuple[Query, ...]
    observation: Observation
    features: Tensor
    target: Tensor | None

    @property
    def valid(self) -> Tensor:
        return self.observation.valid

    def right(self, grids: Tensor) -> Tensor:
        """Share of its valid cells that each of the grids [B, H, W] gets right, [B]."""
        assert self.target is not None
        return ((grids == self.target) & self.valid).sum((1, 2)) / self.valid.sum((1, 2)).clamp_min(1)

    def to(self, device: torch.device) -> Batch:
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        target = None if self.target is None else move(self.target)
        return Batch(self.queries, Observation(*map(move, self.observation)), move(self.features), target)


@dataclass(frozen=True)
class Part:
    """Queries of a batch that are planned at once. rows: [n] int64, their places in the batch. weight: [n] float32,
    what each counts: 1, or 0 where a process repeats a query that is another one's.
    """

    batch: Batch
    rows: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> Part:
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Part:
        return self.moved(Tensor.pin_memory)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Part:
        return Part(self.batch.moved(move), move(self.rows), move(self.weight))


@dataclass(frozen=True)
class Share:
    """What one process does of a batch, in parts that need its memory one after another.

    queries: of the whole batch, as they are shown to Qwen.
    """

    queries: tuple[Query, ...]
    parts: tuple[Part, ...]

    @classmethod
    def all_of(cls, batch: Batch) -> Share:
        """The share of a process that is alone."""
        count = len(batch.queries)
        return cls(batch.queries, (Part(batch, torch.arange(count), torch.ones(count)),)).to(batch.valid.device)

    def to(self, device: torch.device) -> Share:
        return Share(self.queries, tuple(part.to(device) for part in self.parts))

    def pinned(self) -> Share:
        """In memory that a GPU fetches by itself, so that nothing waits for the copy."""
        return Share(self.queries, tuple(part.pinned() for part in self.parts))


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


def held_out(tasks: Sequence[Task], share: float) -> tuple[list[Task], list[Task]]:
    """The tasks to train on, and about this share of them, evenly taken, that is scored while training goes on."""

    def is_scored(number: int) -> bool:
        return int((number + 1) * share) > int(number * share)

    kept = [task for number, task in enumerate(tasks) if not is_scored(number)]
    return kept, [task for number, task in enumerate(tasks) if is_scored(number)]


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


def collate(
    queries: Sequence[Query],
    answers: Sequence[Grid] | None = None,
    augmentations: Sequence[Augmentation] | None = None,
    *,
    few_shapes: bool = False,
) -> Batch:
    """Pad queries, and where given their answers, to the largest grid among them, or to one of few shapes."""
    seen = shown(queries, augmentations)
    changes = augmentations or [AS_IT_IS] * len(queries)
    return pad(queries, answers, changes, seen, padded_shape(seen, few_shapes))


def pad(
    queries: Sequence[Query],
    answers: Sequence[Grid] | None,
    changes: Sequence[Augmentation],
    seen: tuple[Query, ...],
    shape: tuple[int, int],
) -> Batch:
    """The batch of queries, each of them changed, in a shape. seen: the queries as the changes show them."""
    height, width = shape
    valid = np.zeros((len(queries), height, width), dtype=np.bool_)
    views = np.full((len(queries), len(WATCHED), height, width), OUTSIDE, dtype=np.int64)
    counts = np.zeros((len(queries), KEPT, NUM_COLORS, height, width), dtype=np.float32)
    target = np.zeros((len(queries), height, width), dtype=np.int64)
    for row, (query, change) in enumerate(zip(queries, changes, strict=True)):
        h, w = seen[row].size
        valid[row, :h, :w] = True
        views[row, :, :h, :w] = change.views(query.views)
        counts[row, :, :, :h, :w] = change.lookup(query.lookup).counts
        if answers is not None:
            target[row, :h, :w] = change.grid(answers[row])
    tables = np.stack([query.lookup.tables for query in queries])
    statistics = np.stack([query.lookup.statistics for query in queries])
    return Batch(
        seen,
        Observation(*map(torch.from_numpy, (valid, views, counts, tables, statistics))),
        torch.tensor([query.facts.vector() for query in queries], dtype=torch.float32),
        torch.from_numpy(target) if answers is not None else None,
    )


def padded_shape(queries: Sequence[Query], few_shapes: bool) -> tuple[int, int]:
    height, width = (max(sides) for sides in zip(*(query.size for query in queries), strict=True))
    if few_shapes:
        height = width = SIDE_STEP * math.ceil(max(height, width) / SIDE_STEP)
    return height, width


def shown(queries: Sequence[Query], augmentations: Sequence[Augmentation] | None) -> tuple[Query, ...]:
    return tuple(map(Query.augmented, queries, augmentations)) if augmentations else tuple(queries)


def share_out(
    examples: Sequence[Example],
    augmentations: Sequence[Augmentation] | None = None,
    *,
    positions: Sequence[int] | None = None,
    parts: int = 1,
    few_shapes: bool = False,
) -> Share:
    """The share of one process, padded as the whole batch is: so the same shapes are planned by all of them.

    positions: its rows, counted on into repeats of the batch (`Processes.positions`); without them it is alone. parts:
    in how many parts at most.
    """
    changes = augmentations or [AS_IT_IS] * len(examples)
    seen = shown([example.query for example in examples], augmentations)
    shape = padded_shape(seen, few_shapes)

    def part(places: Sequence[int]) -> Part:
        rows = [place % len(examples) for place in places]
        queries, answers = [examples[row].query for row in rows], [examples[row].answer for row in rows]
        batch = pad(queries, answers, [changes[row] for row in rows], tuple(seen[row] for row in rows), shape)
        return Part(batch, torch.tensor(rows), torch.tensor([float(place < len(examples)) for place in places]))

    own = range(len(examples)) if positions is None else positions
    split = np.array_split(own, min(parts, len(own)))
    return Share(seen, tuple(part(places.tolist()) for places in split))


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
