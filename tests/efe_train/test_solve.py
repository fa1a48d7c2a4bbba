from __future__ import annotations

import numpy as np

from efe_train.solve import attempts, votes
from efe_train.tasks import Grid


def grid(*cells: int) -> Grid:
    return np.array([cells])


A, B, C, D = grid(1, 2), grid(2, 1), grid(3, 3), grid(4, 4)


def handed_in(*panels: list[Grid], otherwise: tuple[Grid, ...] = ()) -> list[list[int]]:
    return [attempt[0].tolist() for attempt in attempts(*panels, otherwise=otherwise)]


def test_the_most_voted_grids_are_handed_in() -> None:
    assert handed_in([C, B, A, A, A, B]) == [[1, 2], [2, 1]]


def test_the_favourite_of_the_next_panel_comes_before_what_the_first_one_puts_second() -> None:
    assert handed_in([A, A, B], [C, C, B]) == [[1, 2], [3, 3]]
    assert handed_in([A, A, B], [A, A, C], otherwise=(D,)) == [[1, 2], [2, 1]]
    assert handed_in([A, A], [A, A], [C]) == [[1, 2], [3, 3]]


def test_where_all_agree_the_second_grid_is_another_guess() -> None:
    assert handed_in([A, A], [A], otherwise=(A, D)) == [[1, 2], [4, 4]]
    assert handed_in([A, A], [A], otherwise=(A,)) == [[1, 2], [1, 2]]


def test_all_orientations_together_have_a_vote_of_their_own() -> None:
    """Two of eight are sure of colour 3, and six lean to colour 1 or 2: no colour has more probability than 3."""
    drafts = np.zeros((8, 3, 10, 1, 1), dtype=np.float32)
    drafts[:3, :, 1] = 0.4
    drafts[3:6, :, 2] = 0.4
    drafts[6:, :, 3] = 1
    for ends in (1, 2):
        first, *others = (int(vote[0, 0]) for vote in votes(drafts, ends))
        assert first == 3
        assert sorted(others) == [1] * 3 * ends + [2] * 3 * ends + [3] * 2 * ends
