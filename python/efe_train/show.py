"""A task in the terminal, `efe-train show TASK`, with what a run made of it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Console
from rich.text import Text

from efe_train.commands import ShowConfig
from efe_train.config import TrainConfig, UserError
from efe_train.folder import RunFolder
from efe_train.scores import Solution, read_solutions, size_text, verdict, wrong_cells
from efe_train.tasks import COLOURS, SPLITS, Grid, Task, load_tasks, task_json

DARK = {0, 1, 9}
"""The colours on which a digit has to be white."""

STYLES = tuple(f"{'white' if colour in DARK else 'black'} on {COLOURS[colour]}" for colour in range(len(COLOURS)))


def main(config: ShowConfig) -> int:
    """Print a task. Returns the exit code.

    Raises:
        UserError: there is no such run, data set or task.
    """
    dataset, solutions = config.dataset or TrainConfig.dataset, []
    if config.checkpoint:
        folder = RunFolder.find(config.checkpoint, holding=["config.json"])
        dataset = config.dataset or folder.read_config().dataset
        found = read_solutions(folder.path / "solutions.jsonl")
        solutions = [solution for solution in found if solution.task.id == config.task]
    task = solutions[0].task if solutions and not config.dataset else find_task(config.task, dataset)
    # Another data set may have another task of that id.
    solutions = [solution for solution in solutions if task_json(solution.task) == task_json(task)]
    for line in drawings(task, solutions):
        Console().print(Columns(line, padding=(0, 3)))
    return 0


def find_task(name: str, dataset: str) -> Task:
    """The task of that id in either split of a data set.

    Raises:
        UserError: there is none, or the data set cannot be read.
    """
    tasks: dict[str, Task] = {}
    for split in SPLITS:
        tasks |= {task.id: task for task in load_tasks(dataset, split)}
        if name in tasks:
            return tasks[name]
    near = difflib.get_close_matches(name, tasks)
    hint = f"did you mean {' or '.join(near)}?" if near else f"its {len(tasks)} tasks are {min(tasks)} to {max(tasks)}."
    raise UserError(f"TASK {name!r} is not in --dataset {dataset!r}: {hint}")


def drawings(task: Task, solutions: Sequence[Solution]) -> list[list[Text]]:
    """What stands side by side: the pairs of the demonstrations, then each test input with what was made of it."""
    lines = [
        [drawn(f"input {number}", pair.input), drawn(f"output {number}", pair.output)]
        for number, pair in enumerate(task.demonstrations, 1)
    ]
    made = {solution.test: solution for solution in solutions}
    for number, (source, answer) in enumerate(task.tests):
        line = [drawn(f"test input {number + 1}", source)]
        if number in made:
            solution = made[number]
            drafts = {"last draft": solution.plan[-1]} if solution.plan else {}
            attempts = {f"attempt {place}": grid for place, grid in enumerate(solution.attempts, 1)}
            line += [drawn(name, grid, verdict(grid, answer), answer) for name, grid in (drafts | attempts).items()]
            line += [] if answer is None else [drawn("answer", answer)]
        lines.append(line)
    return lines


def drawn(name: str, grid: Grid, note: str = "", answer: Grid | None = None) -> Text:
    """A grid in its colours and digits; an x stands in the wrong cells of an attempt at the answer."""
    text = Text(f"{name}\n{note or size_text(grid)}\n", no_wrap=True)
    for colours, crosses in zip(grid.tolist(), wrong_cells(grid, answer).tolist(), strict=True):
        for colour, cross in zip(colours, crosses, strict=True):
            text.append(f"{colour}{'x' if cross else ' '}", STYLES[colour])
        text.append("\n")
    return text
