"""What an input grid shows at each cell of the output: colours in several views, and the measures of its objects.

A view is a grid of colours of the output's size made of the input alone: the input scaled or tiled, turned, with its
cells fallen to one side, cut to one of its objects, the next colour in a direction. Many rules say no more than which
view to take, or how the colours of a few of them go together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from efe_train.config import NUM_COLORS
from efe_train.objects import Mask, Shapes, crop, label, measure_shapes
from efe_train.tasks import Grid

OUTSIDE = NUM_COLORS
"""What a view holds where there is no cell."""

ORIENTATIONS = 8
"""A square's turns and mirror images."""

DIRECTIONS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
"""Steps (down, across): to the right, then on by an eighth of a turn to the left each time."""

CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))

AXES = ((0, 1), (1, 0), (1, 1))
"""Which sides a mirror swaps: left and right, top and bottom, both."""

WATCHED = (
    ("scaled", 0, 0),
    *(("tile", *corner) for corner in CORNERS),
    *(("mirror", *axes) for axes in AXES),
    *(("ray", *direction) for direction in DIRECTIONS),
)
"""The views that the planner sees: kind, and which way each looks as a step (down, across)."""

Planes = npt.NDArray[np.int64]
"""Grids of one size, [N, H, W]."""

Element = TypeVar("Element", bound=np.generic)


def oriented(planes: npt.NDArray[Element], orientation: int) -> npt.NDArray[Element]:
    """The last two axes in one of eight orientations: `orientation % 4` quarter turns, then mirrored from 4 on."""
    turned = np.rot90(planes, orientation % 4, (-2, -1))
    return np.swapaxes(turned, -2, -1) if orientation >= 4 else turned


def scaled(grid: Grid, size: tuple[int, int]) -> Grid:
    """Nearest-neighbour resize."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, grid.shape, strict=True))
    return grid[rows][:, columns]


@dataclass(frozen=True, eq=False)
class Scene:
    """An input grid seen from the cells of an output of a size (H, W). Views are [N, H, W], `scaled` is [H, W]."""

    source: Grid
    size: tuple[int, int]

    @cached_property
    def background(self) -> int:
        """The commonest colour, the smallest of those that tie."""
        return int(np.bincount(self.source.ravel()).argmax())

    @cached_property
    def scaled(self) -> Grid:
        return scaled(self.source, self.size)

    @cached_property
    def tiles(self) -> Planes:
        """The input repeated from each of CORNERS; where the output is smaller, the input's four corners."""
        return self.picked(lambda index, old, new: (index % old, (index - new) % old))

    @cached_property
    def reflections(self) -> Planes:
        """The input repeated with every other copy mirrored, along one axis or both."""

        def choices(index: Grid, old: int, new: int) -> tuple[Grid, ...]:
            there, back = index % old, old - 1 - index % old
            odd = index // old % 2 == 1
            return there, np.where(odd, back, there), np.where(odd, there, back)

        return self.picked(choices)[1:]

    def picked(self, choices: Callable[[Grid, int, int], tuple[Grid, ...]]) -> Planes:
        """Rows and columns of the input by their indices: each choice for the rows with each for the columns."""
        rows, columns = (
            choices(np.arange(new), old, new) for new, old in zip(self.size, self.source.shape, strict=True)
        )
        return np.stack([self.source[row][:, column] for row in rows for column in columns])

    @cached_property
    def mirrors(self) -> Planes:
        """Along each of AXES."""
        return np.stack([self.scaled[:, ::-1], self.scaled[::-1], self.scaled[::-1, ::-1]])

    @cached_property
    def turns(self) -> Planes:
        """The other seven orientations."""
        return np.stack([scaled(oriented(self.source, number), self.size) for number in range(1, ORIENTATIONS)])

    @cached_property
    def rays(self) -> Planes:
        """The colour of the next cell in each direction that is not background."""
        return rays(self.scaled, self.background)

    @cached_property
    def falls(self) -> Planes:
        """All that is not background moved as far as it goes, in four directions."""
        views = []
        for turns in range(4):
            grid = np.rot90(self.scaled, turns)
            order = np.argsort(grid != self.background, axis=0, kind="stable")
            views.append(np.rot90(np.take_along_axis(grid, order, 0), -turns))
        return np.stack(views)

    @cached_property
    def crops(self) -> Planes:
        """Parts of the input that stand out, each brought to the output's size."""
        return np.stack([scaled(part, self.size) for part in parts(self.source, self.background)])

    @cached_property
    def constants(self) -> Planes:
        """The background, the commonest and the rarest other colour."""
        colours = (self.background, *other_colours(self.source, self.background))
        return np.stack([np.full(self.size, colour) for colour in colours])

    @cached_property
    def shapes(self) -> Shapes:
        """Of the regions of one colour."""
        return measure_shapes(label(self.scaled, 4, background=None), self.scaled == self.background)

    @cached_property
    def things(self) -> Shapes:
        """Of what is not background and hangs together, corners included, whatever its colours."""
        labels = label(self.scaled, 8, by_colour=False, background=self.background)
        return measure_shapes(labels, self.scaled == self.background)

    @cached_property
    def watched(self) -> Planes:
        """The views of WATCHED."""
        return np.concatenate([self.scaled[None], self.tiles, self.mirrors, self.rays])

    @cached_property
    def views(self) -> Planes:
        """All that an answer may be taken from."""
        return np.concatenate([self.watched, self.turns, self.reflections, self.crops, self.falls, self.constants])


def rays(grid: Grid, background: int) -> Planes:
    """[8, H, W]: at each cell the colour of the next one that is not background in each of DIRECTIONS, OUTSIDE where
    there is none.
    """
    padded = np.pad(grid, 1, constant_values=OUTSIDE)
    found = np.broadcast_to(padded, (len(DIRECTIONS), *padded.shape))
    direction, rows, columns = np.ix_(*map(np.arange, found.shape))
    down, across = np.array(DIRECTIONS).T[..., None, None]

    def moved(steps: int) -> Planes:
        below = (rows + steps * down).clip(0, padded.shape[0] - 1)
        beside = (columns + steps * across).clip(0, padded.shape[1] - 1)
        return found[direction, below, beside]

    # What was found within so many steps tells at once what is within twice as many.
    steps = 1
    while (empty := found == background).any():
        found = np.where(empty, moved(steps), found)
        steps *= 2
    return moved(1)[:, 1:-1, 1:-1]


def other_colours(grid: Grid, background: int) -> tuple[int, int]:
    """The commonest and the rarest colour beside the background, which stands in where there is no other."""
    counts = np.bincount(grid.ravel(), minlength=NUM_COLORS)
    others = [colour for colour in np.argsort(-counts, kind="stable").tolist() if counts[colour]]
    others = [colour for colour in others if colour != background] or [background]
    return others[0], others[-1]


def parts(grid: Grid, background: int) -> list[Grid]:
    """What is not background, what is not black, the boxes around the rarest and the commonest other colour and what is
    in them, and the objects with the most and the fewest cells, the most colours, the fewest and the most copies.
    """
    common, rare = other_colours(grid, background)
    frames = [cut(grid, grid == rare), cut(grid, grid == common)]
    inner = [frame[1:-1, 1:-1] if min(frame.shape) > 2 else frame for frame in frames]
    labels = label(grid, 8, by_colour=False, background=background)
    masks = [labels == number for number in range(1, labels.max() + 1)] or [grid == background]
    objects = [cut(grid, mask) for mask in masks]
    cells = [int(mask.sum()) for mask in masks]
    colours = [len(np.unique(thing)) for thing in objects]
    tally = Counter((thing.shape, thing.tobytes()) for thing in objects)
    copies = [tally[thing.shape, thing.tobytes()] for thing in objects]
    chosen = [np.argmax(cells), np.argmin(cells), np.argmax(colours), np.argmin(copies), np.argmax(copies)]
    content = [cut(grid, grid != background), cut(grid, grid != 0)]
    return [*content, *frames, *inner, *(objects[int(number)] for number in chosen)]


def cut(grid: Grid, mask: Mask) -> Grid:
    """The smallest rectangle around the cells of a mask; the grid itself where the mask is empty."""
    return crop(grid, mask) if mask.any() else grid
