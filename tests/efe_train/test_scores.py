from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efe_train.data import evaluation_queries
from efe_train.scores import (
    Evaluation,
    Score,
    Solution,
    commonest_colour,
    compare,
    copying,
    read_evaluation,
    read_solutions,
    score,
    score_table,
    verdict,
    write_evaluation,
    write_solutions,
)
from efe_train.tasks import Case, Grid, Pair, Task


def grid(*rows: str) -> Grid:
    return np.array([[int(cell) for cell in row] for row in rows])


ANSWER = grid("12", "34")
NEAR = grid("12", "35")
WIDE = grid("000", "000")


def test_the_score_counts_pixels_sizes_and_either_attempt() -> None:
    cases: list[Case] = [(WIDE, ANSWER)] * 3 + [(WIDE, None)]
    result = score(cases, [(NEAR, ANSWER), (NEAR, NEAR), (WIDE, WIDE), (NEAR, NEAR)])
    assert (result.test_inputs, result.exact_matches, result.right_sizes) == (3, 1, 2)
    assert result.pixel_accuracy == pytest.approx((0.75 + 0.75 + 0) / 3)
    assert result.changed_accuracy is None


def test_changed_cells_are_those_where_the_answer_differs_from_an_input_of_its_size() -> None:
    copy, half, other = grid("99", "34"), grid("19", "00"), grid("9")
    cases = [(copy, ANSWER), (copy, ANSWER), (copy, ANSWER), (copy, copy), (other, ANSWER)]
    attempts = [(copy, copy), (half, half), (WIDE, WIDE), (ANSWER, ANSWER), (ANSWER, ANSWER)]
    # Of the first: none of two changed cells. Of the second: one. The others have no changed cell to compare.
    assert score(cases, attempts).changed_accuracy == pytest.approx((0 + 0.5) / 2)


def test_a_verdict_says_what_is_wrong() -> None:
    assert verdict(NEAR, ANSWER) == "1 of 4 cells wrong"
    assert verdict(ANSWER, ANSWER) == "right"
    assert verdict(WIDE, ANSWER) == "wrong size, 2 x 3 instead of 2 x 2"
    assert verdict(NEAR, None) == ""


def task(*demonstrations: tuple[Grid, Grid], source: Grid, answer: Grid | None = None) -> Task:
    return Task("puzzle", tuple(Pair(*pair) for pair in demonstrations), ((source, answer),))


def test_copying_scales_and_tiles_the_input_to_the_inferred_size() -> None:
    (query,) = evaluation_queries(task((grid("1"), grid("11", "11")), source=grid("12")))
    scaled, tiled = copying(query)
    assert scaled.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]
    assert tiled.tolist() == [[1, 2, 1, 2], [1, 2, 1, 2]]


def test_the_commonest_colour_is_that_of_the_outputs() -> None:
    (query,) = evaluation_queries(task((grid("000"), grid("775")), (grid("000"), grid("577")), source=grid("00")))
    first, second = commonest_colour(query)
    assert (first.tolist(), second.tolist()) == ([[7, 7]], [[5, 5]])
    (alone,) = evaluation_queries(task(source=grid("44")))
    assert commonest_colour(alone)[0].shape == (1, 2)


def comparison() -> Evaluation:
    cases: list[Case] = [(NEAR, ANSWER), (WIDE, ANSWER), (grid("1"), ANSWER), (grid("1"), None)]
    right, wrong = [(ANSWER, NEAR)] * 4, [(NEAR, NEAR)] * 4
    return compare("here", "eval", cases, {"the agent, adapted to its demonstrations": right, "copying": wrong})


def test_predictors_are_compared_by_kind_of_task() -> None:
    scores = comparison().scores
    assert list(scores) == ["the agent, adapted to its demonstrations", "copying"]
    assert {kind: found.test_inputs for kind, found in scores["copying"].items()} == {
        "all": 3, "same size": 1, "smaller": 1, "larger": 1
    }  # fmt: skip
    assert [kinds["all"].exact_matches for kinds in scores.values()] == [3, 0]
    assert scores["copying"]["same size"] == Score(1, 0.75, 0.0, 1, 0)


def test_the_table_has_a_row_for_each_predictor_and_kind() -> None:
    text = score_table(comparison())
    assert "3 of 4 test inputs have a known answer" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("copying")]
    assert rows[0] == ["copying", "0.7500", "0.0000", "3", "(100.0%)", "0", "(0.0%)"]
    assert rows[2] == ["copying", "0.7500", "-", "1", "(100.0%)", "0", "(0.0%)"]
    assert len(rows) == 4
    assert max(map(len, text.splitlines())) <= 100


def test_nothing_is_scored_where_no_answer_is_known() -> None:
    blind = compare("here", "eval", [(WIDE, None)] * 2, {"agent": [(WIDE, WIDE)] * 2})
    assert score_table(blind) == "The answers to the 2 test inputs are unknown: nothing is scored."


def test_an_evaluation_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    assert read_evaluation(file) is None
    write_evaluation(file, comparison())
    assert read_evaluation(file) == comparison()


def test_an_evaluation_with_a_word_for_a_number_counts_as_none(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "evaluation.json", comparison())
    text = (tmp_path / "evaluation.json").read_text()
    (tmp_path / "evaluation.json").write_text(text.replace("0.75", '"most"'))
    assert read_evaluation(tmp_path / "evaluation.json") is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"dataset": "here", "split": "eval", "pixel_accuracy": 0.5}',
        '{"dataset": "here", "split": "eval", "test_inputs": 1, "scores": {"agent": {}}}',
        '{"dataset": "here", "split": "eval", "test_inputs": 1, "scores": {"agent": {"all": {"pixels": 1}}}}',
    ],
)
def test_an_evaluation_of_another_version_counts_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    assert read_evaluation(tmp_path / "evaluation.json") is None


def solutions() -> list[Solution]:
    puzzle = Task("puzzle", (Pair(WIDE, ANSWER),), ((WIDE, ANSWER), (NEAR, None)))
    return [Solution(puzzle, number, (WIDE, NEAR), (NEAR, ANSWER)) for number in range(2)]


def as_lists(found: list[Solution]) -> list[Any]:
    return [json.loads(json.dumps(solution.to_json())) for solution in found]


def test_solutions_are_read_back_without_a_data_set(tmp_path: Path) -> None:
    file = tmp_path / "solutions.jsonl"
    assert read_solutions(file) == []
    write_solutions(file, solutions())
    first, second = read_solutions(file)
    assert as_lists([first, second]) == as_lists(solutions())
    assert first.answer is not None and first.answer.tolist() == ANSWER.tolist()
    assert second.answer is None and second.source.tolist() == NEAR.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"test": 2},
        {"test": "0"},
        {"attempts": [[[1]]]},
        {"attempts": [[[1]], [[11]]]},
        {"plan": 3},
        {"task": {"train": []}},
        {"id": None, "task": None},
    ],
)
def test_solutions_are_read_up_to_a_damaged_line(change: dict[str, Any], tmp_path: Path) -> None:
    whole, other = as_lists(solutions())
    lines = [whole, {**other, **change}, whole]
    (tmp_path / "solutions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert as_lists(read_solutions(tmp_path / "solutions.jsonl")) == [whole]
    (tmp_path / "solutions.jsonl").write_text(json.dumps(whole) + "\n" + json.dumps(other)[:-9])
    assert as_lists(read_solutions(tmp_path / "solutions.jsonl")) == [whole]
