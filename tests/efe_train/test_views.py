from __future__ import annotations

import numpy as np
import pytest

from efe_train.tasks import Grid
from efe_train.views import DIRECTIONS, ORIENTATIONS, OUTSIDE, WATCHED, Scene, oriented, rays, scaled

SQUARE = np.array([[1, 2], [3, 4]])

RIGHT, UP, LEFT, DOWN = 0, 2, 4, 6
"""Places in DIRECTIONS."""


def scene(grid: list[list[int]], size: tuple[int, int] | None = None) -> Scene:
    array = np.array(grid)
    return Scene(array, size or (array.shape[0], array.shape[1]))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4, 2), [[1, 2], [1, 2], [3, 4], [3, 4]]),
        ((3, 3), [[1, 1, 2], [1, 1, 2], [3, 3, 4]]),
        ((1, 2), [[1, 2]]),
        ((1, 1), [[1]]),
    ],
)
def test_a_grid_is_scaled_by_its_nearest_cells(size: tuple[int, int], expected: list[list[int]]) -> None:
    assert scaled(SQUARE, size).tolist() == expected


def test_eight_orientations_differ_and_the_first_quarter_turn_is_to_the_left() -> None:
    assert len({oriented(SQUARE, number).tobytes() for number in range(ORIENTATIONS)}) == ORIENTATIONS
    assert oriented(SQUARE, 0).tolist() == SQUARE.tolist()
    assert oriented(SQUARE, 1).tolist() == [[2, 4], [1, 3]]
    assert oriented(SQUARE, 4).tolist() == SQUARE.T.tolist()


def test_tiles_start_from_each_corner() -> None:
    assert scene([[1, 2], [3, 4]], (3, 3)).tiles.tolist() == [
        [[1, 2, 1], [3, 4, 3], [1, 2, 1]],
        [[2, 1, 2], [4, 3, 4], [2, 1, 2]],
        [[3, 4, 3], [1, 2, 1], [3, 4, 3]],
        [[4, 3, 4], [2, 1, 2], [4, 3, 4]],
    ]
    assert scene([[1, 2], [3, 4]], (1, 1)).tiles.ravel().tolist() == [1, 2, 3, 4]


def test_reflections_mirror_every_other_copy() -> None:
    found = scene([[1, 2], [3, 4]], (2, 4)).reflections.tolist()
    assert [[1, 2, 2, 1], [3, 4, 4, 3]] in found
    assert [[2, 1, 1, 2], [4, 3, 3, 4]] in found
    assert [[3, 4, 4, 3], [1, 2, 2, 1]] in found


def test_mirrors_and_turns() -> None:
    seen = scene([[1, 2], [3, 4]])
    assert seen.mirrors.tolist() == [[[2, 1], [4, 3]], [[3, 4], [1, 2]], [[4, 3], [2, 1]]]
    assert [[2, 4], [1, 3]] in seen.turns.tolist()
    assert {view.tobytes() for view in seen.turns} | {SQUARE.tobytes()} == {
        np.ascontiguousarray(oriented(SQUARE, number)).tobytes() for number in range(ORIENTATIONS)
    }
    assert scene([[1, 2, 3]], (3, 1)).turns[0].tolist() == [[3], [2], [1]]


def test_a_ray_shows_the_next_colour_on_its_way() -> None:
    grid = np.array([[0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 4, 0]])
    found = rays(grid, 0)
    o = OUTSIDE
    assert found[RIGHT].tolist() == [[1, 2, 2, o], [o, o, o, o], [4, 4, o, o]]
    assert found[LEFT].tolist() == [[o, o, 1, 1], [o, o, o, o], [o, 3, 3, 4]]
    assert found[DOWN].tolist() == [[3, o, 4, o], [3, o, 4, o], [o, o, o, o]]
    assert found[UP].tolist() == [[o, o, o, o], [o, 1, o, 2], [o, 1, o, 2]]
    assert found[DIRECTIONS.index((1, 1))].tolist() == [[4, o, o, o], [o, 4, o, o], [o, o, o, o]]
    assert found[DIRECTIONS.index((-1, 1))].tolist() == [[o, o, o, o], [1, o, 2, o], [o, 2, o, o]]


def test_rays_find_what_walking_finds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        grid = generator.choice(4, p=[0.85, 0.05, 0.05, 0.05], size=generator.integers(1, 31, 2))
        background = int(generator.integers(2))
        cell = tuple(generator.integers(grid.shape))
        found = rays(grid, background)[:, cell[0], cell[1]]
        assert found.tolist() == [walked(grid, background, cell, step) for step in DIRECTIONS]


def walked(grid: Grid, background: int, cell: tuple[int, ...], step: tuple[int, int]) -> int:
    row, column = cell[0] + step[0], cell[1] + step[1]
    if not (0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]):
        return OUTSIDE
    return int(grid[row, column]) if grid[row, column] != background else walked(grid, background, (row, column), step)


def test_cells_fall_to_each_side_in_their_order() -> None:
    falls = scene([[1, 0, 0], [0, 2, 0], [3, 0, 0]]).falls.tolist()
    assert falls == [
        [[0, 0, 0], [1, 0, 0], [3, 2, 0]],
        [[1, 0, 0], [2, 0, 0], [3, 0, 0]],
        [[1, 2, 0], [3, 0, 0], [0, 0, 0]],
        [[0, 0, 1], [0, 0, 2], [0, 0, 3]],
    ]


def test_crops_are_the_parts_that_stand_out() -> None:
    grid = [
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 2, 2, 2, 0, 0, 5, 0, 0],
        [0, 2, 3, 2, 0, 0, 0, 0, 0],
        [0, 2, 2, 2, 0, 0, 5, 0, 4],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    ring, dot = [row[1:4] for row in grid[1:4]], [[5] * 3] * 3
    content, not_black, rare, common, in_rare, in_common, largest, smallest, colourful, unlike, alike = (
        view.tolist() for view in scene(grid, (3, 3)).crops
    )
    assert content == not_black == scaled(np.array(grid)[1:4, 1:], (3, 3)).tolist()
    assert common == largest == colourful == unlike == ring
    assert rare == in_rare == [[4] * 3] * 3
    assert in_common == [[3] * 3] * 3
    assert smallest == alike == dot


def test_a_grid_of_one_colour_is_its_own_part() -> None:
    seen = scene([[7, 7], [7, 7]])
    assert (seen.crops == 7).all()
    assert (seen.constants == 7).all()
    assert (seen.falls == 7).all()
    assert (seen.rays == OUTSIDE).all()


def test_constants_are_the_background_and_the_commonest_and_the_rarest_other_colour() -> None:
    assert scene([[5, 5, 5, 5], [1, 1, 2, 2], [2, 9, 5, 5]], (1, 2)).constants.tolist() == [
        [[5, 5]],
        [[2, 2]],
        [[9, 9]],
    ]


def test_every_view_has_the_size_of_the_output() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        size = (int(generator.integers(1, 31)), int(generator.integers(1, 31)))
        seen = Scene(generator.integers(0, 10, generator.integers(1, 31, 2)), size)
        assert seen.views.shape[1:] == size
        assert seen.watched.shape == (len(WATCHED), *size)
        assert (seen.views[: len(WATCHED)] == seen.watched).all()
        assert seen.views.min() >= 0 and seen.views.max() <= OUTSIDE


def test_watched_views_are_what_their_names_say() -> None:
    seen = scene([[1, 0, 2], [0, 0, 0]], (3, 4))
    by_name = dict(zip(WATCHED, seen.watched.tolist(), strict=True))
    assert by_name["scaled", 0, 0] == seen.scaled.tolist()
    assert by_name["tile", 1, 1] == [[0, 0, 0, 0], [2, 1, 0, 2], [0, 0, 0, 0]]
    assert by_name["mirror", 0, 1] == seen.scaled[:, ::-1].tolist()
    assert by_name["mirror", 1, 0] == seen.scaled[::-1].tolist()
    assert by_name["ray", 0, -1] == rays(seen.scaled, 0)[LEFT].tolist()
