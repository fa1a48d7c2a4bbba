"""The objects of a grid: cells that touch each other, and what they measure, each by itself or cell by cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from efe_train.config import MAX_GRID_SIZE, NUM_COLORS
from efe_train.tasks import Grid

Mask = npt.NDArray[np.bool_]
Window = tuple[slice, slice]


def label(grid: Grid, connectivity: int = 8, by_colour: bool = True, background: int | None = 0) -> Grid:
    """The number of the object that each cell belongs to, from 1 in reading order, and 0 for the background.

    connectivity: 4 where cells touch along sides alone, 8 where corners count as well. by_colour: whether an object has
    one colour. background: the colour that belongs to no object, None where every colour does.
    """
    inside = np.ones(grid.shape, dtype=np.bool_) if background is None else grid != background
    colours = grid if by_colour else inside
    cells = np.arange(grid.size).reshape(grid.shape)
    neighbours: list[tuple[Window, Window]] = [(np.s_[:-1, :], np.s_[1:, :]), (np.s_[:, :-1], np.s_[:, 1:])]
    if connectivity == 8:
        neighbours += [(np.s_[:-1, :-1], np.s_[1:, 1:]), (np.s_[:-1, 1:], np.s_[1:, :-1])]
    joined = [inside[a] & (colours[a] == colours[b]) for a, b in neighbours]
    first = np.concatenate([cells[a][touch] for (a, _), touch in zip(neighbours, joined, strict=True)])
    second = np.concatenate([cells[b][touch] for (_, b), touch in zip(neighbours, joined, strict=True)])
    # Every cell points at a cell of its object that is not after it in reading order, in the end at the first one.
    leader = cells.ravel()
    while (apart := leader[first] != leader[second]).any():
        first, second = first[apart], second[apart]
        one, other = leader[first], leader[second]
        np.minimum.at(leader, np.maximum(one, other), np.minimum(one, other))
        while ((further := leader[leader]) != leader).any():
            leader = further
    leads = inside.ravel() & (leader == np.arange(grid.size))
    return np.where(inside, leads.cumsum()[leader].reshape(grid.shape), 0)


@dataclass(frozen=True, eq=False)
class Parts:
    """One entry for each part of a grid: its bounding box, its cells, and those not of its main colour."""

    heights: Grid
    widths: Grid
    cells: Grid
    colours: Grid
    odd_cells: Grid


def measure_parts(grid: Grid, labels: Grid) -> Parts:
    """labels: the number of the part that each cell belongs to, 0 where it belongs to none."""
    rows, columns = np.nonzero(labels)
    numbers, part = np.unique(labels[rows, columns], return_inverse=True)
    shades = np.bincount(part * NUM_COLORS + grid[rows, columns], minlength=len(numbers) * NUM_COLORS)
    shades = shades.reshape(-1, NUM_COLORS)

    (_, heights), (_, widths) = extent(part, rows), extent(part, columns)
    cells = shades.sum(1)
    return Parts(heights, widths, cells, np.count_nonzero(shades, axis=1), cells - shades.max(1))


def extent(part: Grid, places: Grid) -> tuple[Grid, Grid]:
    """The first place and the length of each part along an axis. part: the part of each cell. places: where it lies."""
    first = np.full(part.max(initial=-1) + 1, MAX_GRID_SIZE)
    last = np.zeros_like(first)
    np.minimum.at(first, part, places)
    np.maximum.at(last, part, places)
    return first, last - first + 1


def crop(grid: Grid, mask: Mask) -> Grid:
    """The bounding box of a mask, empty where the mask is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return grid[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else grid[:0, :0]


@dataclass(frozen=True, eq=False)
class Shapes:
    """Of the object that each cell belongs to, [H, W] int64 each.

    size: its cells. touches: whether it lies on the grid's edge. solid: whether it fills its box. largest, smallest:
    among all objects that are not background. alike: how many objects have its shape in some orientation, at most 3.
    row, column: of the cell in the object's box. height, width: of that box.
    """

    size: Grid
    touches: Grid
    solid: Grid
    largest: Grid
    smallest: Grid
    alike: Grid
    row: Grid
    column: Grid
    height: Grid
    width: Grid


def measure_shapes(labels: Grid, background: Mask) -> Shapes:
    """labels: [H, W], as `label` gives them; its background is one more object. background: [H, W], which cells are."""
    part = labels - labels.min()
    cells = np.bincount(part.ravel())
    rows, columns = np.indices(labels.shape)
    top, heights = extent(part.ravel(), rows.ravel())
    left, widths = extent(part.ravel(), columns.ravel())

    def marked(of_cells: Grid) -> Mask:
        marks = np.zeros(len(cells), dtype=np.bool_)
        marks[of_cells] = True
        return marks

    on_edge = marked(np.concatenate([part[0], part[-1], part[:, 0], part[:, -1]]))
    counted = ~marked(part[background])
    largest = counted & (cells == cells.max(initial=0, where=counted))
    smallest = counted & (cells == cells.min(initial=labels.size + 1, where=counted))
    row, column, height, width = rows - top[part], columns - left[part], heights[part], widths[part]
    prints = fingerprints(row, column, height, width, part)
    _, shape, alike = np.unique(prints, return_inverse=True, return_counts=True)
    measures = (cells, on_edge, heights * widths == cells, largest, smallest, np.minimum(alike[shape], 3))
    return Shapes(*[values.astype(np.int64)[part] for values in measures] + [row, column, height, width])


def fingerprints(row: Grid, column: Grid, height: Grid, width: Grid, part: Grid) -> npt.NDArray[np.uint64]:
    """One number for each part that tells its shape, the same in all eight orientations. [H, W] each, as in Shapes."""
    up, back = height - 1 - row, width - 1 - column
    corners = ((row, column), (up, column), (row, back), (up, back))
    found = []
    for first, second in (*corners, *((across, down) for down, across in corners)):
        sums = np.zeros(part.max() + 1, dtype=np.uint64)
        np.add.at(sums, part.ravel(), scrambled((64 * first + second + 1).ravel()))
        found.append(sums)
    return np.minimum.reduce(found)


def scrambled(values: Grid) -> npt.NDArray[np.uint64]:
    """Each value as another one that looks random: sums of such values tell what was summed."""
    mixed = values.astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(29))
