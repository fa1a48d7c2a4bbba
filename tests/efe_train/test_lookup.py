from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from efe_train.data import training_examples
from efe_train.lookup import KEPT, STATISTICS, Lookup, look_up, patch, table_names
from efe_train.objects import crop
from efe_train.tasks import Grid, Pair, Task
from efe_train.views import ORIENTATIONS, oriented

Rule = Callable[[Grid], Grid]
Draw = Callable[[np.random.Generator], Grid]


def of_many_colours(generator: np.random.Generator) -> Grid:
    return generator.integers(0, 10, generator.integers(6, 12, 2))


def of_lone_cells(generator: np.random.Generator) -> Grid:
    grid = np.zeros(4 * generator.integers(2, 4, 2), dtype=np.int64)
    grid[1::4, 1::4] = generator.choice([0, 2], size=grid[1::4, 1::4].shape)
    return grid


def of_three_colours_of_its_own(generator: np.random.Generator) -> Grid:
    grid = generator.permutation(10)[generator.choice(3, p=[0.6, 0.3, 0.1], size=(9, 9))]
    counts = np.bincount(grid.ravel())
    assert len(set(counts[counts > 0])) == 3
    return grid


def with_two_objects(generator: np.random.Generator) -> Grid:
    """A box of many colours, and a single cell."""
    grid = np.zeros(generator.integers(9, 13, 2), dtype=np.int64)
    top, left = generator.integers(0, 4, 2)
    grid[top : top + 3, left : left + 4] = generator.integers(1, 10, (3, 4))
    grid[-1, -1] = 1
    return grid


def recoloured(grid: Grid) -> Grid:
    return (grid * 7 + 3) % 10


def rarest_as_second(grid: Grid) -> Grid:
    """The rarest colour becomes the second commonest."""
    _, second, rarest = np.argsort(-np.bincount(grid.ravel(), minlength=10), kind="stable")[:3]
    return np.where(grid == rarest, second, grid)


def marked_below(grid: Grid) -> Grid:
    """The cell below and to the right of a full one becomes 5."""
    answer = grid.copy()
    answer[1:, 1:][grid[:-1, :-1] == 2] = 5
    return answer


def mirrored(grid: Grid) -> Grid:
    return grid[:, ::-1]


def repeated(grid: Grid) -> Grid:
    return np.tile(grid, (2, 2))


def largest_object(grid: Grid) -> Grid:
    return crop(grid[:-1, :-1], grid[:-1, :-1] != 0)


@pytest.mark.parametrize(
    ("rule", "draw"),
    [
        (recoloured, of_many_colours),
        (rarest_as_second, of_three_colours_of_its_own),
        (marked_below, of_lone_cells),
        (mirrored, of_many_colours),
        (repeated, of_many_colours),
        (largest_object, with_two_objects),
    ],
)
def test_a_rule_of_each_kind_is_found(rule: Rule, draw: Draw) -> None:
    generator = np.random.default_rng(0)
    pairs = [Pair(grid, rule(grid)) for grid in (draw(generator) for _ in range(5))]
    source = draw(generator)
    answer = rule(source)
    found = look_up(pairs, source, answer.shape)  # type: ignore[arg-type]
    told = found.counts[0].any(0)
    assert (found.counts[0].argmax(0) == answer)[told].all()
    assert told.mean() == pytest.approx(found.statistics[0, 3])
    assert found.statistics[0, :5].tolist() == pytest.approx([1, 1, 1, told.mean(), 1], abs=0.03)
    assert told.mean() > 0.97


@pytest.mark.parametrize("radius", [1, 2])
def test_patches_have_one_key_where_they_show_the_same(radius: int) -> None:
    planes = np.random.default_rng(0).integers(0, 2, (2, 9, 30))
    padded = np.pad(planes, ((0, 0), (radius, radius), (radius, radius)), constant_values=10)
    side = 2 * radius + 1
    shown = [padded[plane, row : row + side, column : column + side] for plane, row, column in np.ndindex(planes.shape)]
    exact = [window.tobytes() for window in shown]
    turned = [min(oriented(window, number).tobytes() for number in range(ORIENTATIONS)) for window in shown]
    for expected, keys in ((exact, patch(planes, radius)), (turned, patch(planes, radius, any_orientation=True))):
        assert len(set(zip(expected, keys.ravel().tolist(), strict=True))) == len(set(expected)) == len(np.unique(keys))


def single(*colours: int) -> Grid:
    return np.array([colours])


def test_statistics_by_hand() -> None:
    """Of three demonstrations of one cell two give it colour 2: the others tell these right, and the third wrong."""
    pairs = [Pair(single(1), single(2)), Pair(single(1), single(2)), Pair(single(1), single(3))]
    found = look_up(pairs, single(1), (1, 1))
    assert found.counts[0, :, 0, 0].tolist() == [0, 0, 2, 1, 0, 0, 0, 0, 0, 0]
    assert found.statistics[0, :5].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1, 1])
    # All say the same, but for those whose views never show the answer.
    assert not found.counts[1:].any() and (found.tables[1:] == len(table_names())).all()
    assert found.statistics[0, 5] == pytest.approx(math.log(sum("views" not in name for name in table_names())) / 3)


def test_a_table_may_be_right_in_part() -> None:
    """Cell 0 stays what it is, cell 1 takes another colour each time."""
    pairs = [Pair(single(1, 2), single(1, colour)) for colour in (3, 4, 5)]
    found = look_up(pairs, single(1, 2), (1, 2))
    best = found.statistics[0]
    assert best[:5].tolist() == pytest.approx([1 / 2, 0, 0, 1, 1])
    assert found.counts[0, :, 0, 0].argmax() == 1


def test_what_no_demonstration_showed_is_left_open() -> None:
    """Colours 1 and 2 are told apart, 8 was never seen."""
    pairs = [Pair(single(1, 2, 1, 2, 2), single(3, 6, 3, 6, 6)), Pair(single(2, 1, 1, 2, 2), single(6, 3, 3, 6, 6))]
    found = look_up(pairs, single(2, 2, 1, 8, 2), (1, 5))
    by_colour = [
        counts
        for counts, statistics in zip(found.counts, found.statistics, strict=True)
        if statistics[:5].tolist() == pytest.approx([1, 1, 1, 0.8, 1])
    ]
    assert any(counts[:, 0].argmax(0).tolist() == [6, 6, 3, 0, 6] and not counts[:, 0, 3].any() for counts in by_colour)


def test_counts_end_at_255() -> None:
    grid = np.zeros((20, 20), dtype=np.int64)
    found = look_up([Pair(grid, grid)], grid, (20, 20))
    assert found.counts.max() == 255


def test_the_best_tables_come_first_and_say_different_things() -> None:
    generator = np.random.default_rng(1)
    pairs = [Pair(grid, marked_below(grid)) for grid in (of_lone_cells(generator) for _ in range(4))]
    found = look_up(pairs, of_lone_cells(generator), (8, 8))
    worth = found.statistics @ np.array([1, 1, 0.3, 0.1, 0, 0])
    assert (np.diff(worth) <= 1e-6).all()
    answers = [np.where(counts.any(0), counts.argmax(0), 10).tobytes() for counts in found.counts if counts.any()]
    assert len(set(answers)) == len(answers) == KEPT


def equal(one: Lookup, other: Lookup) -> bool:
    return bool((one.counts == other.counts).all() and (one.statistics == other.statistics).all())


def test_without_demonstrations_nothing_is_said() -> None:
    found = look_up((), single(1, 2), (4, 3))
    assert found.counts.shape == (KEPT, 10, 4, 3) and not found.counts.any()
    assert found.statistics.shape == (KEPT, STATISTICS) and not found.statistics.any()


def test_one_demonstration_speaks_but_cannot_be_judged() -> None:
    found = look_up([Pair(single(1, 2), single(3, 4))], single(2, 1), (1, 2))
    assert not found.statistics[:, [0, 1, 2, 4]].any()
    assert found.statistics[0, 3] == 1
    assert any(counts[:, 0].argmax(0).tolist() == [4, 3] for counts in found.counts)


def test_the_same_question_has_the_same_answer_whatever_was_asked_before() -> None:
    generator = np.random.default_rng(2)
    pairs = [Pair(grid, mirrored(grid)) for grid in (of_many_colours(generator) for _ in range(3))]
    source = of_many_colours(generator)
    first = look_up(pairs, source, (6, 7))
    look_up(pairs, source, (7, 6))  # the same grids, seen from another output
    look_up([Pair(pair.input, pair.input) for pair in pairs], source, (6, 7))
    assert equal(look_up(pairs, source, (6, 7)), first)
    assert first.counts.dtype == np.uint8 and first.statistics.dtype == np.float32


def test_a_query_in_training_is_not_told_its_own_answer() -> None:
    """Colour 9 is in one answer alone: the query of that pair knows nothing of it, those of the other pairs do."""
    generator = np.random.default_rng(3)
    grids = [generator.integers(0, 5, (5, 5)) for _ in range(3)]

    def lookups(held_out: Grid) -> list[Lookup]:
        pairs = (Pair(grids[0], held_out), *(Pair(grid, grid) for grid in grids[1:]))
        return [example.query.lookup for example in training_examples([Task("task", pairs, ())])]

    own, *others = lookups(np.full((5, 5), 9))
    assert not own.counts[:, 9].any()
    assert all(lookup.counts[:, 9].any() for lookup in others)
    assert equal(lookups(grids[0])[0], own)
