from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from efe_train.augment import AS_IT_IS, Augmentation
from efe_train.data import Query
from efe_train.tasks import Grid, Pair
from efe_train.views import ORIENTATIONS, OUTSIDE, WATCHED, Scene


def changes() -> list[Augmentation]:
    """Each orientation, with and without other colours."""
    generator = np.random.default_rng(0)
    colours = [np.append(generator.permutation(10), OUTSIDE) for _ in range(ORIENTATIONS)]
    return [Augmentation.turned(number) for number in range(ORIENTATIONS)] + [
        Augmentation(number, colours[number]) for number in range(ORIENTATIONS)
    ]


def random_grid(generator: np.random.Generator, sides: tuple[int, int] | None = None) -> Grid:
    """With a background that no other colour ties with."""
    grid = generator.integers(0, 10, sides or generator.integers(2, 12, 2))
    return np.where(generator.random(grid.shape) < 0.6, 4, grid)


def planes_of(grid: Grid) -> npt.NDArray[np.float32]:
    return (grid == np.arange(10)[:, None, None]).astype(np.float32)


def test_a_grid_is_turned_and_its_colours_are_replaced() -> None:
    colours = np.array([0, 5, 6, 7, 8, 1, 2, 3, 4, 9, OUTSIDE])
    assert Augmentation(1, colours).grid(np.array([[1, 2], [3, 4]])).tolist() == [[6, 8], [5, 7]]
    assert AS_IT_IS.grid(np.array([[1, 2], [3, 4]])).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("change", changes())
def test_answers_of_an_augmented_query_are_restored(change: Augmentation) -> None:
    grid = random_grid(np.random.default_rng(1), (3, 5))
    assert change.grid(grid).shape == change.size((3, 5))
    assert (change.restored(planes_of(change.grid(grid))) == planes_of(grid)).all()


def test_drawn_augmentations_reach_all_orientations_and_keep_black_as_a_rule() -> None:
    generator = np.random.default_rng(0)
    drawn = [Augmentation.drawn(generator) for _ in range(400)]
    assert {change.orientation for change in drawn} == set(range(ORIENTATIONS))
    assert 0.75 < np.mean([change.colours[0] == 0 for change in drawn]) < 0.9  # 0.8 and a tenth of the others
    for change in drawn:
        assert sorted(change.colours[:10]) == list(range(10)) and change.colours[10] == OUTSIDE
    again = Augmentation.drawn(np.random.default_rng(0))
    assert again.orientation == drawn[0].orientation and (again.colours == drawn[0].colours).all()


# Scaling to another size rounds towards one side, so that the scaled, the mirrored view and the rays of an augmented
# query are not quite what the augmentation makes of those of the query; nor are rays where two colours tie for the
# background. Training and evaluation take the augmented views as the query's own, so nothing else is ever seen.
@pytest.mark.parametrize("change", changes())
def test_views_of_the_augmented_input_are_the_augmented_views(change: Augmentation) -> None:
    generator = np.random.default_rng(2)
    for _ in range(10):
        source = random_grid(generator)
        size = (source.shape[0], source.shape[1])
        found = Scene(change.grid(source), change.size(size)).watched
        assert (change.views(Scene(source, size).watched) == found).all()


@pytest.mark.parametrize("size", [(4, 9), (2, 2), (13, 1)])
def test_tiles_of_any_size_are_augmented_exactly(size: tuple[int, int]) -> None:
    tiles = [number for number, view in enumerate(WATCHED) if view[0] == "tile"]
    source = random_grid(np.random.default_rng(3), (3, 4))
    for change in changes():
        found = Scene(change.grid(source), change.size(size)).watched
        assert (change.views(Scene(source, size).watched)[tiles] == found[tiles]).all()


def recolour(grid: Grid) -> Grid:
    return np.where(grid == 4, 4, (grid + 3) % 10)


def drop(grid: Grid) -> Grid:
    """Each cell below one of colour 7 takes that colour."""
    answer = grid.copy()
    answer[1:][grid[:-1] == 7] = 7
    return answer


def across(grid: Grid) -> Grid:
    return grid[:, ::-1]


# Where tables, outcomes or colours tie, their order decides, which an augmentation does not keep; nor are the parts of
# cells in columns by twos and threes the same from the other side. So what is compared is the best table's answer.
@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("rule", [recolour, drop, across])
def test_the_look_up_of_the_augmented_query_is_the_augmented_look_up(
    change: Augmentation, rule: Callable[[Grid], Grid]
) -> None:
    generator = np.random.default_rng(4)
    grids = [random_grid(generator, (10, 11)) for _ in range(5)]
    query = Query("q", tuple(Pair(grid, rule(grid)) for grid in grids[1:]), grids[0], (10, 11))
    found, expected = query.augmented(change).lookup, change.lookup(query.lookup)
    assert found.counts.shape[2:] == change.size(query.size)
    assert (found.counts[0] == expected.counts[0]).all()
    assert (found.statistics[0, :5] == expected.statistics[0, :5]).all()
    assert found.statistics[0, 0] > 0.8


def test_counts_follow_their_colour_and_their_cell() -> None:
    pair = Pair(np.array([[1, 2]]), np.array([[3, 2]]))
    query = Query("q", (pair, pair), np.array([[2, 1]]), (1, 2))
    colours = np.arange(OUTSIDE + 1)
    colours[[3, 5]] = 5, 3
    change = Augmentation(1, colours)
    assert query.lookup.counts[0, [2, 3], 0].tolist() == [[2, 0], [0, 2]]
    assert change.lookup(query.lookup).counts[0, [2, 5], :, 0].tolist() == [[0, 2], [2, 0]]
    assert not change.lookup(query.lookup).counts[0, 3].any()
    assert change.lookup(query.lookup).statistics is query.lookup.statistics
