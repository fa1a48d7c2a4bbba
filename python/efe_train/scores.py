"""What attempts are worth: solutions and their file, scores, what is easily had without a model, and their table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efe_train.config import NUM_COLORS, UserError
from efe_train.data import Query
from efe_train.files import read_json, read_lines, replaced, written
from efe_train.tasks import Case, Grid, Task, parse_grid, parse_task, task_json
from efe_train.views import Scene

Attempts = tuple[Grid, Grid]

ALL = "all"
KINDS = ("same size", "smaller", "larger")
"""Of tasks, by the answer's size beside the input's: its shape; fewer cells; any other."""

COLUMNS = ("pixels", "changed cells", "right sizes", "exact")


@dataclass(frozen=True, eq=False)
class Solution:
    """What was made of one test input.

    test: its number in task.tests. plan: the drafts of the planning steps, each cut to the predicted size. others: the
    attempts of the predictors that these are compared with. evaluation: which one this belongs to.
    """

    task: Task
    test: int
    plan: tuple[Grid, ...]
    attempts: Attempts
    others: Mapping[str, Attempts] = field(default_factory=dict)
    evaluation: str = ""

    @property
    def source(self) -> Grid:
        return self.task.tests[self.test][0]

    @property
    def answer(self) -> Grid | None:
        return self.task.tests[self.test][1]

    def to_json(self) -> dict[str, Any]:
        """With the whole task in ARC's own JSON, so that it can be read where there is no data set."""
        grids = {name: [grid.tolist() for grid in getattr(self, name)] for name in ("plan", "attempts")}
        others = {name: [grid.tolist() for grid in attempts] for name, attempts in self.others.items()}
        about = {"id": self.task.id, "test": self.test, "evaluation": self.evaluation, "task": task_json(self.task)}
        return {**about, **grids, "others": others}

    @classmethod
    def from_json(cls, content: Any) -> Solution:
        """
        Raises:
            UserError: it is no solution.
        """
        try:
            task = parse_task(content["id"], content["task"], "the solution")

            def grids(values: Any, name: str) -> tuple[Grid, ...]:
                return tuple(parse_grid(grid, f"task {task.id}, {name}") for grid in values)

            plan, (first, second) = (grids(content[name], name) for name in ("plan", "attempts"))
            pairs = {str(name): grids(pair, name) for name, pair in content.get("others", {}).items()}
            others = {name: (one, other) for name, (one, other) in pairs.items()}
            number = range(len(task.tests))[content["test"]]
            return cls(task, number, plan, (first, second), others, str(content.get("evaluation", "")))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"It should be a solution, as `to_json` makes it ({error}).") from None


def write_solutions(file: Path, solutions: Sequence[Solution]) -> None:
    with replaced(file) as stream:
        stream.write(solution_lines(solutions))


def append_solutions(file: Path, solutions: Sequence[Solution]) -> None:
    """Add to a file whose last line is whole, as `write_solutions` leaves it."""
    with written(file, "ab") as stream:
        stream.write(solution_lines(solutions))


def solution_lines(solutions: Sequence[Solution]) -> bytes:
    return "".join(json.dumps(solution.to_json()) + "\n" for solution in solutions).encode()


def read_solutions(file: Path) -> list[Solution]:
    """The solutions in a file, up to the first line that is damaged; none where there is no file."""
    solutions = []
    for content in read_lines(file):
        try:
            solutions.append(Solution.from_json(content))
        except UserError:
            break
    return solutions


@dataclass(frozen=True)
class Score:
    """Of the test inputs whose answers are known. The accuracies are means over test inputs, of the first attempt."""

    test_inputs: int
    pixel_accuracy: float | None  # 0 where the size is wrong
    changed_accuracy: float | None  # of the cells where the answer differs from an input of its size
    right_sizes: int
    exact_matches: int  # test inputs that one of the two attempts solves


@dataclass(frozen=True)
class Evaluation:
    """What evaluation.json holds.

    test_inputs: with known answers and without. scores: by predictor, then for ALL and by kind of task.
    """

    dataset: str
    split: str
    test_inputs: int
    scores: dict[str, dict[str, Score]]

    @property
    def answered(self) -> int:
        """Test inputs with a known answer."""
        return max((kinds[ALL].test_inputs for kinds in self.scores.values()), default=0)


def score(cases: Sequence[Case], attempts: Sequence[Attempts]) -> Score:
    pixels, changed, exact, sizes = [], [], 0, 0
    for (source, answer), pair in zip(cases, attempts, strict=True):
        if answer is None:
            continue
        pixels.append(pixel_accuracy(pair[0], answer))
        exact += is_solved(answer, pair)
        if pair[0].shape == answer.shape:
            sizes += 1
            if source.shape == answer.shape and (source != answer).any():
                changed.append(float((pair[0] == answer)[source != answer].mean()))
    return Score(len(pixels), mean(pixels), mean(changed), sizes, exact)


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def pixel_accuracy(attempt: Grid, answer: Grid) -> float:
    return float((attempt == answer).mean()) if attempt.shape == answer.shape else 0.0


def wrong_cells(attempt: Grid, answer: Grid | None) -> npt.NDArray[np.bool_]:
    """Where the attempt is wrong; nowhere where that cannot be told: the answer is unknown or has another size."""
    comparable = answer is not None and attempt.shape == answer.shape
    return attempt != answer if comparable else np.zeros(attempt.shape, np.bool_)


def verdict(attempt: Grid, answer: Grid | None) -> str:
    """What is wrong with an attempt, in words; empty where the answer is unknown."""
    if answer is None:
        return ""
    if attempt.shape != answer.shape:
        return f"wrong size, {size_text(attempt)} instead of {size_text(answer)}"
    wrong = int(wrong_cells(attempt, answer).sum())
    return f"{wrong} of {attempt.size} cells wrong" if wrong else "right"


def size_text(grid: Grid) -> str:
    return f"{grid.shape[0]} x {grid.shape[1]}"


def is_solved(answer: Grid, attempts: Attempts) -> bool:
    return any(np.array_equal(attempt, answer) for attempt in attempts)


def kind_of(source: Grid, answer: Grid) -> str:
    if source.shape == answer.shape:
        return "same size"
    return "smaller" if answer.size < source.size else "larger"


def copying(query: Query) -> Attempts:
    """The input, scaled and tiled to the size that the demonstrations suggest."""
    scene = Scene(query.source, query.inferred_size)
    return scene.scaled, scene.tiles[0]


def commonest_colour(query: Query) -> Attempts:
    """A grid of the colour that the demonstrations' outputs have most of, and one of the next colour."""
    counts = sum(np.bincount(pair.output.ravel(), minlength=NUM_COLORS) for pair in query.demonstrations)
    # Without a demonstration all colours are equally frequent.
    first, second, *_ = np.argsort(-(counts + np.zeros(NUM_COLORS, np.int64)), kind="stable").tolist()
    return np.full(query.inferred_size, first), np.full(query.inferred_size, second)


BASELINES: dict[str, Callable[[Query], Attempts]] = {"copying": copying, "commonest colour": commonest_colour}
"""Predictors that learn nothing: demonstrations and input are all that they see, as of the model."""


def compare(
    dataset: str, split: str, cases: Sequence[Case], predictors: Mapping[str, Sequence[Attempts]]
) -> Evaluation:
    """The scores of each predictor, whose attempts are in the order of the cases."""
    kinds = [None if answer is None else kind_of(source, answer) for source, answer in cases]
    parts = {ALL: list(range(len(cases)))}
    parts |= {kind: [number for number, found in enumerate(kinds) if found == kind] for kind in KINDS}
    scores = {
        name: {
            kind: score([cases[number] for number in part], [attempts[number] for number in part])
            for kind, part in parts.items()
            if part
        }
        for name, attempts in predictors.items()
    }
    return Evaluation(dataset, split, len(cases), scores)


def write_evaluation(file: Path, evaluation: Evaluation) -> None:
    with replaced(file) as stream:
        stream.write((json.dumps(asdict(evaluation), indent=2) + "\n").encode())


def read_evaluation(file: Path) -> Evaluation | None:
    """The evaluation in a file; None where there is none that fits, as when another version wrote it."""
    try:
        values = read_json(file)
        # ALL has to be there; it is read twice where it is.
        scores = {
            name: {kind: Score(**kinds[kind]) for kind in (ALL, *kinds)} for name, kinds in values["scores"].items()
        }
        evaluation = Evaluation(**{**values, "scores": scores})
    except (AttributeError, LookupError, TypeError, UserError):
        return None
    numbers = [number for kinds in scores.values() for score in kinds.values() for number in vars(score).values()]
    return evaluation if all(number is None or isinstance(number, int | float) for number in numbers) else None


def about(evaluation: Evaluation) -> str:
    """What was scored, and what the columns of the table are."""
    if not evaluation.answered:
        return f"The answers to the {evaluation.test_inputs} test inputs are unknown: nothing is scored."
    return (
        f"{evaluation.answered} of {evaluation.test_inputs} test inputs have a known answer.\n"
        "Pixels, changed cells: accuracy of the first attempt. Right sizes: of the first attempt.\n"
        "A wrong size counts 0 in pixels. Exact: one of two attempts is the answer."
    )


def table(evaluation: Evaluation) -> dict[str, dict[str, tuple[str, ...]]]:
    """By kind of task and by predictor, what stands in COLUMNS. Empty where nothing is scored."""
    rows: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, kinds in evaluation.scores.items():
        for kind, score in kinds.items():
            if score.test_inputs:
                heading = f"{kind} ({score.test_inputs} test input{'s' * (score.test_inputs != 1)})"
                rows.setdefault(heading, {})[name] = cells(score)
    return rows


def cells(score: Score) -> tuple[str, ...]:
    accuracies = ("-" if value is None else f"{value:.4f}" for value in (score.pixel_accuracy, score.changed_accuracy))
    counts = (f"{count} ({count / score.test_inputs:.1%})" for count in (score.right_sizes, score.exact_matches))
    return *accuracies, *counts


def score_table(evaluation: Evaluation) -> str:
    """The table as text, at most 100 columns wide with names of up to 36 letters."""
    lines, parts = [about(evaluation)], table(evaluation)
    width = max((len(name) for heading, rows in parts.items() for name in (heading, *rows)), default=0)
    for heading, rows in parts.items():
        for name, values in {heading: COLUMNS, **rows}.items():
            lines.append(f"{name:{width}}" + "".join(f"{value:>15}" for value in values))
        lines.append("")
    return "\n".join(lines).rstrip()
