"""The size of the output grid, inferred from the demonstrations and the input grid.

A fit is a straight line from a measure of the inputs to the sides of the outputs: as long as the measure, a multiple of
it, so many cells longer. A candidate is a fit of a measure, and the first candidate that explains every demonstration
tells the size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from efe_train.config import MAX_GRID_SIZE
from efe_train.measures import COUNTS, LOOKS, MEASURES, Size, View, shape
from efe_train.tasks import Grid, Pair

Point = tuple[int, int]
"""A measure of an input and the side of its output."""

Line = tuple[Fraction | int, Fraction | int]
"""Slope and height: side = slope * measure + height."""


def same(points: Iterable[Point]) -> Line | None:
    return (1, 0) if all(measure == side for measure, side in points) else None


def times(points: Iterable[Point]) -> Line | None:
    ratios = {Fraction(side, measure) if measure else None for measure, side in points}
    ratio = ratios.pop()
    return (ratio, 0) if ratio is not None and not ratios else None


def plus(points: Iterable[Point]) -> Line | None:
    steps = {side - measure for measure, side in points}
    return (1, steps.pop()) if len(steps) == 1 else None


def fixed(points: Iterable[Point]) -> Line | None:
    sides = {side for _, side in points}
    return (0, sides.pop()) if len(sides) == 1 else None


def affine(points: Iterable[Point]) -> Line | None:
    known = sorted(set(points))
    (low, start), (high, end) = known[0], known[-1]
    slope = Fraction(end - start, high - low) if low != high else Fraction(1)
    height = start - slope * low
    fits = slope > 0 and all(side == slope * measure + height for measure, side in known)
    return (slope, height) if fits else None


class Candidate(NamedTuple):
    """turned: whether the output's height comes from the measured width, and its width from the height."""

    fit: Callable[[Iterable[Point]], Line | None]
    measure: str
    turned: bool = False


CANDIDATES = (
    Candidate(same, "input"),
    Candidate(same, "input", turned=True),
    Candidate(times, "input"),
    *(Candidate(same, name) for name in LOOKS),
    Candidate(fixed, "input"),
    Candidate(plus, "input"),
    *(Candidate(same, name) for name in COUNTS),
    *(Candidate(fit, name) for fit in (times, plus) for name in MEASURES),
    Candidate(times, "input", turned=True),
    Candidate(affine, "input"),
)
"""In the order in which they are tried: what is simple, or seldom fits by chance, comes first."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """The inputs of the demonstrations, the sizes of their outputs, and the input whose output is wanted."""

    views: list[View]
    sizes: list[Size]
    source: View

    def side(self, candidate: Candidate, axis: int) -> int | None:
        """One side of the output by a candidate, None where it does not explain the demonstrations or cannot be."""
        fit, measure, turned = candidate
        line = fit(
            (view.measure(measure)[axis ^ turned], size[axis])
            for view, size in zip(self.views, self.sizes, strict=True)
        )
        if line is None:
            return None
        side = line[0] * self.source.measure(measure)[axis ^ turned] + line[1]
        return int(side) if side.denominator == 1 and 1 <= side <= MAX_GRID_SIZE else None

    def by_one_rule(self) -> Size | None:
        """By the first candidate that explains both sides."""
        for candidate in CANDIDATES:
            if (height := self.side(candidate, 0)) is not None and (width := self.side(candidate, 1)) is not None:
                return height, width
        return None

    def by_two_rules(self) -> Size | None:
        """Each side by the first candidate that explains it."""
        first = [
            next((side for candidate in CANDIDATES if (side := self.side(candidate, axis)) is not None), None)
            for axis in (0, 1)
        ]
        return None if first[0] is None or first[1] is None else (first[0], first[1])

    def by_majority(self) -> Size | None:
        """By the measure that is the output's size most often, and in half of the demonstrations at least."""
        hits = {
            name: sum(view.measure(name) == size for view, size in zip(self.views, self.sizes, strict=True))
            for name in MEASURES
            if all(1 <= side <= MAX_GRID_SIZE for side in self.source.measure(name))
        }
        best = max(hits, key=hits.__getitem__)
        return self.source.measure(best) if 2 * hits[best] >= len(self.sizes) else None

    def by_ratio(self) -> Size:
        """By the ratio of output to input that is in the middle, on each axis."""
        return self.scaled_side(0), self.scaled_side(1)

    def scaled_side(self, axis: int) -> int:
        ratios = sorted(
            Fraction(size[axis], view.grid.shape[axis]) for view, size in zip(self.views, self.sizes, strict=True)
        )
        return min(max(round(self.source.grid.shape[axis] * ratios[len(ratios) // 2]), 1), MAX_GRID_SIZE)


def infer_size(demonstrations: Sequence[Pair], source: Grid) -> Size:
    """The output size that the demonstrations suggest for this input."""
    if not demonstrations:
        return shape(source)
    evidence = Evidence(
        [View(pair.input) for pair in demonstrations], [shape(pair.output) for pair in demonstrations], View(source)
    )
    return evidence.by_one_rule() or evidence.by_two_rules() or evidence.by_majority() or evidence.by_ratio()
