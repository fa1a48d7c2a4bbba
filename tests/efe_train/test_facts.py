from __future__ import annotations

import numpy as np
import pytest

from efe_train.data import collate, evaluation_queries
from efe_train.facts import NUM_FEATURES, infer_size
from efe_train.tasks import Pair, load_tasks


def shapes(*pairs: tuple[tuple[int, int], tuple[int, int]]) -> list[Pair]:
    return [Pair(np.zeros(given, np.int64), np.zeros(wanted, np.int64)) for given, wanted in pairs]


@pytest.mark.parametrize(
    ("demonstrations", "source", "expected"),
    [
        (shapes(((3, 4), (3, 4)), ((5, 2), (5, 2))), (7, 8), (7, 8)),  # as the input
        (shapes(((3, 4), (4, 3)), ((5, 2), (2, 5))), (7, 8), (8, 7)),  # transposed
        (shapes(((3, 3), (9, 6)), ((2, 4), (6, 8))), (4, 5), (12, 10)),  # a multiple on each axis
        (shapes(((6, 9), (2, 3)), ((12, 3), (4, 1))), (9, 6), (3, 2)),  # a fraction
        (shapes(((3, 3), (1, 5)), ((2, 7), (1, 5))), (9, 9), (1, 5)),  # constant
        (shapes(((3, 3), (5, 5)), ((4, 6), (6, 8))), (7, 2), (9, 4)),  # two more
        (shapes(((3, 3), (30, 30))), (4, 4), (30, 30)),  # ten times would leave the largest grid: constant
        ([], (4, 6), (4, 6)),
    ],
)
def test_the_output_size_is_inferred_from_the_demonstrations(
    demonstrations: list[Pair], source: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert infer_size(demonstrations, np.zeros(source, np.int64)) == expected


def test_the_inferred_size_is_right_for_most_of_arc() -> None:
    # 0.88 and 0.885 when this was written; the rules are no use below 0.85.
    for split in ("train", "eval"):
        right = [
            query.size == answer.shape
            for task in load_tasks("arc-agi-1", split)
            for query, (_, answer) in zip(evaluation_queries(task), task.tests, strict=True)
            if answer is not None
        ]
        assert np.mean(right) > 0.85


def test_features_tell_tasks_apart_and_stay_small() -> None:
    tasks = load_tasks("arc-agi-1", "eval")
    batch = collate([query for task in tasks for query in evaluation_queries(task)])
    assert batch.features.shape == (419, NUM_FEATURES)
    assert batch.features.isfinite().all()
    assert batch.features.abs().max() <= 1.5
    assert (batch.features.std(0) > 0).all()
