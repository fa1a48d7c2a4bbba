from __future__ import annotations

import numpy as np

from efe_train.data import Query
from efe_train.picture import picture, plan_pictures

RED, BLUE, WHITE = (255, 65, 54), (0, 116, 217), (255, 255, 255)


def test_grids_stand_side_by_side_in_the_colours_of_arc() -> None:
    found = picture([np.array([[1, 2]]), np.array([[2], [1], [1]])], scale=4)
    assert found.dtype == np.uint8
    # Of two cells, a gap and one cell; three cells high.
    assert found.shape == (12, 16, 3)
    inner = found[1::4, 1::4]
    assert inner.tolist() == [
        [list(colour) for colour in row]
        for row in ((BLUE, RED, WHITE, RED), (WHITE, WHITE, WHITE, BLUE), (WHITE, WHITE, WHITE, BLUE))
    ]


def test_neighbours_of_one_colour_can_be_told_apart() -> None:
    found = picture([np.zeros((2, 2), np.int64)])
    assert (found[:7, :7] == 0).all() and (found[:, 7] > 0).all() and (found[8:15, 8:15] == 0).all()


def test_a_plan_stands_between_its_input_and_its_answer_where_that_is_known() -> None:
    grid = np.zeros((1, 1), np.int64)
    queries = [Query(f"task{number}/test/0", (), grid, (1, 1)) for number in range(3)]
    found = plan_pictures(queries, [grid + 1] * 3, [grid + 2, None, grid + 2], count=2)
    assert list(found) == ["task0/test/0", "task1/test/0"]
    known, unknown = (image[0, ::16].tolist() for image in found.values())
    assert known == [[0, 0, 0], list(BLUE), list(RED)]
    assert unknown == [[0, 0, 0], list(BLUE)]
