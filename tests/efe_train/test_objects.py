from __future__ import annotations

import numpy as np
import pytest

from efe_train.objects import crop, label, measure_parts, measure_shapes
from efe_train.tasks import Grid

GRID = np.array([[1, 0, 2, 2], [0, 1, 0, 2], [3, 0, 0, 0], [3, 3, 0, 1]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[1, 0, 2, 2], [0, 1, 0, 2], [3, 0, 0, 0], [3, 3, 0, 4]]),
        ({"connectivity": 4}, [[1, 0, 2, 2], [0, 3, 0, 2], [4, 0, 0, 0], [4, 4, 0, 5]]),
        ({"by_colour": False}, [[1, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 2]]),
        ({"background": 1}, [[0, 1, 2, 2], [1, 0, 1, 2], [3, 1, 1, 1], [3, 3, 1, 0]]),
        ({"background": None}, [[1, 2, 3, 3], [2, 1, 2, 3], [4, 2, 2, 2], [4, 4, 2, 5]]),
    ],
)
def test_cells_that_touch_share_a_number(settings: dict[str, bool | int | None], expected: list[list[int]]) -> None:
    assert label(GRID, **settings).tolist() == expected


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("by_colour", [True, False])
def test_every_object_is_found_by_walking_from_cell_to_cell(connectivity: int, by_colour: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        grid = generator.integers(0, generator.integers(2, 5), generator.integers(1, 31, 2))
        assert (label(grid, connectivity, by_colour) == walked(grid, connectivity, by_colour)).all()


def walked(grid: Grid, connectivity: int, by_colour: bool) -> Grid:
    """The labels by flood fill."""
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)] + [(1, 1), (1, -1), (-1, 1), (-1, -1)] * (connectivity == 8)
    labels = np.zeros_like(grid)
    for start in zip(*np.nonzero(grid), strict=True):
        if labels[start]:
            continue
        number = labels.max() + 1
        labels[start] = number
        ahead = [start]
        while ahead:
            row, column = ahead.pop()
            for down, right in steps:
                cell = (row + down, column + right)
                if not (0 <= cell[0] < grid.shape[0] and 0 <= cell[1] < grid.shape[1]) or labels[cell]:
                    continue
                if grid[cell] and (grid[cell] == grid[row, column] or not by_colour):
                    labels[cell] = number
                    ahead.append(cell)
    return labels


def test_an_object_as_long_as_it_can_be_stays_one() -> None:
    snake = np.ones((29, 30), np.int64)
    snake[1::4, :-1] = 0
    snake[3::4, 1:] = 0
    assert (label(snake, connectivity=4) == snake).all()


def test_a_grid_of_background_has_no_objects() -> None:
    empty = np.zeros((3, 4), np.int64)
    assert (label(empty) == 0).all()
    assert len(measure_parts(empty, label(empty)).cells) == 0
    assert crop(empty, empty != 0).size == 0


def test_parts_are_measured_one_by_one() -> None:
    parts = measure_parts(GRID, label(GRID, by_colour=False))
    assert parts.heights.tolist() == [4, 1]
    assert parts.widths.tolist() == [4, 1]
    assert parts.cells.tolist() == [8, 1]
    assert parts.colours.tolist() == [3, 1]
    assert parts.odd_cells.tolist() == [5, 0]


def test_a_crop_is_the_bounding_box() -> None:
    assert crop(GRID, GRID == 2).tolist() == [[2, 2], [0, 2]]


def test_shapes_tell_each_cell_about_its_object() -> None:
    grid = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 2, 2], [0, 0, 0, 0, 2], [3, 0, 0, 0, 0], [0, 0, 4, 4, 0]])
    shapes = measure_shapes(label(grid, 4), grid == 0)
    assert shapes.size.tolist() == [
        [3, 16, 16, 16, 16],
        [3, 3, 16, 3, 3],
        [16, 16, 16, 16, 3],
        [1, 16, 16, 16, 16],
        [16, 16, 2, 2, 16],
    ]
    assert (shapes.touches == 1).all()
    assert (shapes.solid == (grid > 2)).all()
    assert (shapes.largest == np.isin(grid, (1, 2))).all()
    assert (shapes.smallest == (grid == 3)).all()
    assert (shapes.alike == np.where(np.isin(grid, (1, 2)), 2, 1)).all()
    assert shapes.row[grid == 2].tolist() == [0, 0, 1]
    assert shapes.column[grid == 2].tolist() == [0, 1, 1]
    assert shapes.height[grid == 4].tolist() == [1, 1]
    assert shapes.width[grid == 4].tolist() == [2, 2]
    inner = np.pad(np.array([[1, 0], [1, 1]]), 1)
    assert (measure_shapes(label(inner), inner == 0).touches == (inner == 0)).all()


def test_shapes_are_alike_in_all_orientations_and_are_counted_up_to_three() -> None:
    corner = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    line = np.array([[1, 1, 1], [0, 0, 1], [0, 1, 0]])
    turned = [np.pad(np.rot90(corner, turns), 1) for turns in range(4)]
    grid = np.concatenate([*turned, np.pad(np.rot90(corner.T), 1), np.pad(line, 1)], 1)
    shapes = measure_shapes(label(grid), grid == 0)
    assert shapes.alike[grid == 1].tolist().count(3) == 5 * 4
    assert (shapes.alike[:, -5:] == 1).all()


def test_a_grid_that_is_all_background_has_no_largest_object() -> None:
    grid = np.zeros((2, 3), dtype=np.int64)
    shapes = measure_shapes(label(grid, background=None), grid == 0)
    assert not shapes.largest.any() and not shapes.smallest.any()
    assert (shapes.size == 6).all() and shapes.solid.all()
