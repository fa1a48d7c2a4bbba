"""The sizes that can be read off a grid: of its panels, of its content, of its largest object, and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import groupby

import numpy as np
import numpy.typing as npt

from efe_train.config import NUM_COLORS
from efe_train.objects import Mask, Parts, crop, label, measure_parts
from efe_train.tasks import Grid

Size = tuple[int, int]

ABSENT = (0, 0)
"""What a measure takes from a grid that has nothing of the kind. No output has this size."""


class View:
    """A grid, and what its measures share."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.splits: dict[tuple[str, int], Parts] = {}
        self.measured: dict[str, Size] = {}

    @cached_property
    def counts(self) -> Grid:
        """Cells of each colour."""
        return np.bincount(self.grid.ravel(), minlength=NUM_COLORS)

    @cached_property
    def colours(self) -> int:
        return int(np.count_nonzero(self.counts))

    @cached_property
    def commonest(self) -> int:
        return int(self.counts.argmax())

    @cached_property
    def panels(self) -> tuple[list[int], list[int]]:
        """Heights and widths of the panels between full lines of one colour, if possible not the commonest."""
        colours = {int(line[0]) for side in (self.grid, self.grid.T) for line in side if (line == line[0]).all()}
        for colour in sorted(colours, key=lambda colour: (colour == self.commonest, colour)):
            heights, widths = (between((self.grid == colour).all(axis)) for axis in (1, 0))
            if len(heights) * len(widths) > 1:
                return heights, widths
        return [], []

    def content(self, background: int) -> Grid:
        return crop(self.grid, self.grid != background)

    def split(self, kind: str, background: int) -> Parts:
        """What is not background, by "colour", or as objects, each "plain" (of one colour) or "mixed"."""
        if (kind, background) not in self.splits:
            if kind == "colour":
                labels = np.where(self.grid == background, 0, self.grid + 1)
            else:
                labels = label(self.grid, by_colour=kind == "plain", background=background)
            self.splits[kind, background] = measure_parts(self.grid, labels)
        return self.splits[kind, background]

    def measure(self, name: str) -> Size:
        if name not in self.measured:
            self.measured[name] = MEASURES[name](self)
        return self.measured[name]


def between(lines: Mask) -> list[int]:
    """The lengths of the runs between the marked lines."""
    return [len(list(run)) for line, run in groupby(lines.tolist()) if not line]


def panel(view: View) -> Size:
    """That of the panels, where they are all alike."""
    heights, widths = view.panels
    return (heights[0], widths[0]) if len(set(heights)) == len(set(widths)) == 1 else ABSENT


def halved(grid: Grid) -> Size:
    """Half of the longer side."""
    height, width = grid.shape
    return (height // 2 if height > width else height, width // 2 if width > height else width)


def shape(grid: Grid) -> Size:
    return grid.shape[0], grid.shape[1]


def by_axis(count: Callable[[Grid], int], grid: Grid) -> Size:
    return count(grid), count(grid.T)


def period(grid: Grid) -> int:
    """By how many rows the grid can be moved so that it matches itself, all of them where nothing matches."""
    return next(step for step in range(1, len(grid) + 1) if (grid[step:] == grid[:-step]).all())


def unlike_rows(grid: Grid) -> int:
    """Rows without those that equal the row before."""
    return min(len(grid), 1) + int((grid[1:] != grid[:-1]).any(1).sum())


QUALITIES: dict[str, Callable[[Parts], npt.NDArray[np.number]]] = {
    "cells": lambda parts: parts.cells,
    "box": lambda parts: parts.heights * parts.widths,
    "filling": lambda parts: parts.cells / (parts.heights * parts.widths),
    "colours": lambda parts: parts.colours,
    "odd cells": lambda parts: parts.odd_cells,
}
"""What a part can have the most or the least of."""

PLAIN_QUALITIES = ("cells", "box", "filling")
"""Those that can tell parts of one colour apart."""


def extreme(parts: Parts, quality: str, most: bool) -> Size:
    """The bounding box of the part with the most or the least; parts of unlike sizes that tie for it are no choice."""
    if not len(parts.cells):
        return ABSENT
    values = QUALITIES[quality](parts)
    chosen = values == (values.max() if most else values.min())
    sizes = set(zip(parts.heights[chosen].tolist(), parts.widths[chosen].tolist(), strict=True))
    return sizes.pop() if len(sizes) == 1 else ABSENT


Measure = Callable[[View], Size]
Number = Callable[[View], int]

BACKGROUNDS: dict[str, Number] = {"0": lambda view: 0, "commonest": lambda view: view.commonest}

NUMBERS: dict[str, Number] = {
    "colours": lambda view: view.colours,
    "colours but one": lambda view: view.colours - 1,
    "objects": lambda view: len(view.split("plain", 0).cells),
    "cells on 0": lambda view: view.grid.size - int(view.counts[0]),
    "cells of 0": lambda view: int(view.counts[0]),
    "cells of the commonest": lambda view: int(view.counts.max()),
}


def grid_measures() -> dict[str, Measure]:
    """Of the grid as a whole."""
    measures: dict[str, Measure] = {
        "input": lambda view: shape(view.grid),
        "panel": panel,
        "panels": lambda view: (len(view.panels[0]), len(view.panels[1])),
        "half": lambda view: halved(view.grid),
        "period": lambda view: by_axis(period, view.grid),
        "unlike lines": lambda view: by_axis(unlike_rows, view.grid),
    }

    def add(on: str, ground: Number) -> None:
        measures[f"content on {on}"] = lambda view: shape(view.content(ground(view)))
        measures[f"unlike lines on {on}"] = lambda view: by_axis(unlike_rows, view.content(ground(view)))

    for on, ground in BACKGROUNDS.items():
        add(on, ground)
    return measures


def part_measures(kind: str, qualities: Iterable[str]) -> dict[str, Measure]:
    """Of the part that stands out, for each way to stand out."""

    def measure(ground: Number, quality: str, most: bool) -> Measure:
        return lambda view: extreme(view.split(kind, ground(view)), quality, most)

    return {
        f"{kind} part on {on} with {'most' if most else 'least'} {quality}": measure(ground, quality, most)
        for on, ground in BACKGROUNDS.items()
        for quality in qualities
        for most in (True, False)
    }


def colour_measure(colour: int) -> Measure:
    return lambda view: shape(crop(view.grid, view.grid == colour))


def number_measures() -> dict[str, Measure]:
    """Sides as long as a number of things, and the input so many times."""

    def square(number: Number) -> Measure:
        return lambda view: (number(view), number(view))

    def product(number: Number) -> Measure:
        return lambda view: (view.grid.shape[0] * number(view), view.grid.shape[1] * number(view))

    return {f"number of {name}": square(number) for name, number in NUMBERS.items()} | {
        f"input times {name}": product(number) for name, number in NUMBERS.items()
    }


LOOKS = (
    grid_measures()
    | part_measures("colour", PLAIN_QUALITIES)
    | {f"colour {colour}": colour_measure(colour) for colour in range(NUM_COLORS)}
)
"""Measures of the grid and of its colours by their names, the simplest first."""

COUNTS = part_measures("plain", PLAIN_QUALITIES) | part_measures("mixed", QUALITIES) | number_measures()
"""Measures of objects and of numbers: there are so many that some agree with a few demonstrations by chance."""

MEASURES = LOOKS | COUNTS
