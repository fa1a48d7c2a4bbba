"""A run as one page to open in a browser, `efe-train report RUN`: its curves, its scores and a sheet of its tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

from efe_train.commands import ReportConfig
from efe_train.files import replaced
from efe_train.folder import RunFolder
from efe_train.metrics import Row
from efe_train.scores import (
    COLUMNS,
    Solution,
    about,
    is_solved,
    pixel_accuracy,
    read_evaluation,
    read_solutions,
    size_text,
    table,
    verdict,
    wrong_cells,
)
from efe_train.tasks import COLOURS, Grid

Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """Curves on one scale.

    columns: those of metrics.jsonl, each with its name in the legend. noisy: their running mean tells more.
    """

    title: str
    unit: str
    columns: Mapping[str, str]
    noisy: bool = True


CHARTS = (
    Chart("Loss", "loss, with the epoch's weight", {"loss": "loss"}),
    Chart("Expected Free Energy", "EFE, unweighted", {"efe": "EFE"}),
    Chart("Mask ratio", "share of cells still wrong", {"mask_ratio": "mask ratio"}),
    Chart("Reward", "reward, no unit", {"reward": "reward"}),
    Chart(
        "Accuracy in training",
        "share of cells right",
        {"acc_after": "refined prompt", "acc_before": "Qwen's prompt", "acc_look_up": "look-up alone"},
    ),
    Chart(
        "Validation, once per epoch",
        "share of cells or of test inputs",
        {"val_pixels": "pixels", "val_changed": "changed cells", "val_exact": "exact"},
    ),
    Chart("Qwen's gradient", "L2 norm at the last refresh", {"qwen_grad": "gradient"}),
    Chart("Learning rates", "rate", {"agent_lr": "agent", "qwen_lr": "Qwen"}, noisy=False),
)

LEFT, RIGHT, TOP, BOTTOM = 50, 380, 24, 186
"""The edges of a chart's field, in a picture of 400 by 220."""

FINEST = 400
"""Points of a curve that can be told apart in it."""

FEW = 40
"""A curve of fewer points is drawn as it is, with a dot at each."""

SHOWN = 6
"""Tasks of each group on the sheet."""

LARGEST = 150
"""Pixels of a grid's longer side."""


def write_report(folder: RunFolder, file: Path | None = None) -> Path:
    """Write the page of what the folder holds by now, to report.html in it unless a file is named. Returns its path."""
    file = file or folder.path / "report.html"
    rows = folder.read_metrics()
    evaluation = read_evaluation(folder.path / "evaluation.json")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        run=str(folder.path),
        name=folder.path.resolve().name,
        settings=asdict(folder.read_config()) if (folder.path / "config.json").exists() else {},
        batches=len(rows),
        epochs=len({row.get("epoch") for row in rows}),
        charts=[drawing for chart in CHARTS if (drawing := draw_chart(chart, rows))],
        evaluation=evaluation,
        about=evaluation and about(evaluation),
        columns=COLUMNS,
        table=evaluation and table(evaluation),
        groups={
            name: [draw_solution(solution) for solution in group]
            for name, group in chosen(read_solutions(folder.path / "solutions.jsonl")).items()
        },
        colours=COLOURS,
        field={"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    )
    with replaced(file) as stream:
        stream.write(page.encode())
    return file


class Axis:
    """A scale from values to places in the picture, with marks at round values."""

    def __init__(self, values: Sequence[float], start: float, end: float, margin: float = 0.0) -> None:
        low, high = min(values), max(values)
        margin = margin * (high - low) if high > low else abs(low) / 10 or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def place(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def marks(self) -> list[tuple[float, str]]:
        """Place and text of two to five marks."""
        power = 10.0 ** math.floor(math.log10((self.high - self.low) / 5))
        step = next(power * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (power * factor) <= 5)
        numbers = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [(self.place(number * step), f"{number * step:.6g}") for number in numbers]


def draw_chart(chart: Chart, rows: Sequence[Row]) -> dict[str, Any] | None:
    """What the template needs of a chart; None where no row has one of its columns."""
    lines = {name: found for column, name in chart.columns.items() if (found := points(rows, column))}
    if not lines:
        return None
    batches, values = zip(*(point for line in lines.values() for point in line), strict=True)
    across, up = Axis(batches, LEFT, RIGHT), Axis(values, BOTTOM, TOP, margin=0.04)

    def path(line: Sequence[Point]) -> str:
        return "M" + " ".join(f"{across.place(x)},{up.place(y)}" for x, y in line)

    curves = []
    for name, line in lines.items():
        few = len(line) < FEW
        main = smoothed(line) if chart.noisy and not few else thinned(line)
        curves.append(
            {
                "name": name,
                "main": path(main),
                "values": path(thinned(line)),
                "dots": "".join(f"M{across.place(x)},{up.place(y)}h0" for x, y in line) if few else "",
                "story": f"from {main[0][1]:.4g} to {main[-1][1]:.4g}",
            }
        )
    return {
        "title": chart.title,
        "unit": chart.unit,
        "curves": curves,
        "across": across.marks(),
        "up": up.marks(),
    }


def points(rows: Sequence[Row], column: str) -> list[Point]:
    """Batch and value, of the rows that have a finite one."""
    values = ((row["batch"], row.get(column)) for row in rows)
    return [(batch, value) for batch, value in values if isinstance(value, int | float) and math.isfinite(value)]


def thinned(line: Sequence[Point]) -> list[Point]:
    """At most 2 * FINEST points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(line) <= 2 * FINEST:
        return list(line)
    stretches = np.array_split(np.array(line), FINEST)
    ends = [(part, sorted((int(part[:, 1].argmin()), int(part[:, 1].argmax())))) for part in stretches]
    return [(float(part[at, 0]), float(part[at, 1])) for part, both in ends for at in both]


def smoothed(line: Sequence[Point]) -> list[Point]:
    """The running mean over a twentieth of the curve."""
    values, window = np.array([value for _, value in line]), np.ones(len(line) // 20)
    means = np.convolve(values, window, "same") / np.convolve(np.ones(len(line)), window, "same")
    kept = np.linspace(0, len(line) - 1, min(len(line), FINEST)).round().astype(int)
    return [(line[at][0], float(means[at])) for at in kept]


def chosen(solutions: Sequence[Solution]) -> dict[str, list[Solution]]:
    """The solutions of the sheet: exact ones first, then by the pixels of the first attempt."""

    def worth(solution: Solution) -> tuple[bool, float]:
        assert solution.answer is not None
        return is_solved(solution.answer, solution.attempts), pixel_accuracy(solution.attempts[0], solution.answer)

    known = sorted((each for each in solutions if each.answer is not None), key=worth, reverse=True)
    unknown = [each for each in solutions if each.answer is None]
    few = min(SHOWN, math.ceil(len(known) / 3))
    best, rest = known[:few], known[few:]
    worst = rest[-few:] if few else []
    middle = rest[: len(rest) - len(worst)]
    start = max(0, (len(middle) - few) // 2)
    groups = {"Best": best, "Typical": middle[start : start + few], "Worst": worst, "Unscored": unknown[:SHOWN]}
    return {name: group for name, group in groups.items() if group}


def draw_solution(solution: Solution) -> dict[str, Any]:
    task, answer = solution.task, solution.answer
    drafts = {f"draft {number}": grid for number, grid in enumerate(solution.plan, 1)}
    attempts = {f"attempt {number}": grid for number, grid in enumerate(solution.attempts, 1)}
    tried = [draw_grid(name, grid, verdict(grid, answer), answer) for name, grid in (drafts | attempts).items()]
    return {
        "title": f"{task.id}, test input {solution.test + 1}" if len(task.tests) > 1 else task.id,
        "demonstrations": [
            (draw_grid(f"input {number}", pair.input), draw_grid(f"output {number}", pair.output))
            for number, pair in enumerate(task.demonstrations, 1)
        ],
        "grids": [
            draw_grid("test input", solution.source),
            *tried,
            *([] if answer is None else [draw_grid("answer", answer)]),
        ],
    }


def draw_grid(name: str, grid: Grid, note: str = "", answer: Grid | None = None) -> dict[str, Any]:
    """What the template needs of a grid. The wrong cells of an attempt at the answer get a cross."""
    height, width = grid.shape
    crosses = np.argwhere(wrong_cells(grid, answer)).tolist()
    lines = [f"M0 {y}h{width}" for y in range(1, height)] + [f"M{x} 0v{height}" for x in range(1, width)]
    return {
        "name": name,
        "note": note or size_text(grid),
        "height": height,
        "width": width,
        "pixels": width * min(18, LARGEST / max(height, width)),
        "cells": [(colour, runs(grid == colour)) for colour in np.unique(grid).tolist()],
        "lines": "".join(lines),
        "crosses": "".join(f"M{x + 0.25} {y + 0.25}l.5 .5m0-.5l-.5 .5" for y, x in crosses),
    }


def runs(mask: npt.NDArray[np.bool_]) -> str:
    """An SVG path around the cells of a mask, run by run."""
    edges = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)
    # In each row the edges come in pairs: where a run begins, and where it has ended.
    pairs = np.argwhere(edges).reshape(-1, 2, 2).tolist()
    return "".join(f"M{start} {y}h{end - start}v1h{start - end}z" for (y, start), (_, end) in pairs)


def main(config: ReportConfig) -> int:
    """Write the page and print its path. Returns the exit code.

    Raises:
        UserError: there is no such run, or the page cannot be written.
    """
    folder = RunFolder.find(config.run, holding=["metrics.jsonl"])
    print(write_report(folder, Path(config.out) if config.out else None))
    return 0
