from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from efe_train import data
from efe_train.augment import Augmentation
from efe_train.config import UserError
from efe_train.data import Example, Query
from efe_train.lookup import KEPT, STATISTICS
from efe_train.tasks import Pair, Task, load_tasks, parse_task
from efe_train.views import OUTSIDE, WATCHED
from tests.efe_train.conftest import recolouring_task


def parse(content: dict[str, Any]) -> Task:
    return parse_task("puzzle", content, "puzzle.json")


def what_the_model_sees(query: Query) -> tuple[Any, ...]:
    batch = data.collate([query])
    return (
        data.prompt_text(query, 2000),
        query.facts,
        [tensor.tolist() for tensor in batch.observation],
        batch.features.tolist(),
    )


def test_each_pair_is_held_out_of_its_own_demonstrations() -> None:
    task = parse(recolouring_task(0, pairs=4))
    examples = data.training_examples([task])
    assert len(examples) == 4
    for pair, example in zip(task.demonstrations, examples, strict=True):
        assert example.query.source is pair.input
        assert example.answer is pair.output
        assert pair not in example.query.demonstrations
        assert len(example.query.demonstrations) == 3


def test_a_task_with_one_pair_gives_no_training_query() -> None:
    single, double = parse(recolouring_task(0, pairs=1)), parse(recolouring_task(1, pairs=2))
    assert len(data.training_examples([single, double])) == 2
    with pytest.raises(UserError, match="at least two demonstration pairs"):
        data.training_examples([single])


def test_the_held_out_answer_does_not_reach_the_model_in_training() -> None:
    content = recolouring_task(0)
    seen = what_the_model_sees(data.training_examples([parse(content)])[1].query)
    content["train"][1]["output"] = [[7 for _ in row] for row in content["train"][1]["output"]]
    changed = data.training_examples([parse(content)])
    assert what_the_model_sees(changed[1].query) == seen
    # The same change is seen where that pair is a demonstration, so the comparison above can fail.
    assert what_the_model_sees(changed[0].query) != what_the_model_sees(
        data.training_examples([parse(recolouring_task(0))])[0].query
    )


def test_the_size_of_the_held_out_answer_does_not_reach_prompt_and_features() -> None:
    content = recolouring_task(0)
    query = data.training_examples([parse(content)])[1].query
    content["train"][1]["output"] = [[1] * 9] * 9
    other = data.training_examples([parse(content)])[1].query
    assert other.size == (9, 9) != query.size
    assert data.prompt_text(other, 2000) == data.prompt_text(query, 2000)
    assert other.facts == query.facts


@pytest.mark.parametrize("output", [[[5]], [[0, 1], [2, 3]], None])
def test_the_answer_does_not_reach_the_model_in_evaluation(output: list[list[int]] | None) -> None:
    content = recolouring_task(0)
    (seen,) = map(what_the_model_sees, data.evaluation_queries(parse(content)))
    content["test"][0]["output"] = output  # type: ignore[assignment]
    assert [what_the_model_sees(query) for query in data.evaluation_queries(parse(content))] == [seen]


def test_ragged_queries_are_padded_and_marked() -> None:
    small = Query("small", (), np.array([[1, 2]]), (1, 2))
    large = Query("large", (), np.array([[3], [4]]), (4, 3))
    batch = data.collate([small, large], [np.array([[5, 6]]), np.full((4, 3), 7)])
    assert batch.target is not None
    valid, views, counts, tables, statistics = batch.observation
    assert views.shape == (2, len(WATCHED), 4, 3)
    assert counts.shape == (2, KEPT, 10, 4, 3)
    assert tables.shape == (2, KEPT)
    assert statistics.shape == (2, KEPT, STATISTICS)
    assert valid is batch.valid
    assert valid[0].sum() == 2 and valid[0, 0, :2].all()
    assert valid[1].all()
    assert (views[0, :, ~valid[0]] == OUTSIDE).all()
    assert (views[:, 0][valid] < OUTSIDE).all()
    assert batch.target[0, 0, :2].tolist() == [5, 6]
    assert batch.target[1].eq(7).all()


@pytest.mark.parametrize(("size", "side"), [((1, 1), 6), ((6, 2), 6), ((7, 6), 12), ((3, 19), 24), ((30, 29), 30)])
def test_few_shapes_are_squares_of_few_sides(size: tuple[int, int], side: int) -> None:
    query, answer = Query("one", (), np.ones(size, dtype=np.int64), size), np.ones(size, dtype=np.int64)
    tight, padded = data.collate([query], [answer]), data.collate([query], [answer], few_shapes=True)
    assert padded.target is not None and tight.target is not None
    assert padded.observation.views.shape == (1, len(WATCHED), side, side)
    assert padded.valid.sum() == size[0] * size[1]
    assert torch.equal(padded.target[padded.valid], tight.target[tight.valid])
    assert torch.equal(padded.observation.views[..., : size[0], : size[1]], tight.observation.views)


def test_what_the_demonstrations_say_is_zero_in_padding() -> None:
    pair = Pair(np.array([[1, 2]]), np.array([[3, 4]]))
    narrow, high = Query("narrow", (pair, pair), pair.input, (1, 2)), Query("high", (), np.array([[5]]), (3, 1))
    batch = data.collate([narrow, high])
    assert batch.target is None
    assert np.array_equal(batch.observation.counts[0, :, :, :1, :2], narrow.lookup.counts)
    assert not batch.observation.counts[0, ..., ~batch.valid[0]].any()
    assert np.array_equal(batch.observation.statistics[0], narrow.lookup.statistics)
    assert not batch.observation.counts[1].any() and not batch.observation.statistics[1].any()


def test_a_batch_of_augmented_queries_is_the_batch_of_the_augmentations(examples: list[Example]) -> None:
    generator = np.random.default_rng(0)
    queries, answers = [example.query for example in examples], [example.answer for example in examples]
    changes = [Augmentation.drawn(generator) for _ in queries]
    batch = data.collate(queries, answers, changes, few_shapes=True)
    assert batch.target is not None
    for row, (query, answer, change) in enumerate(zip(queries, answers, changes, strict=True)):
        height, width = change.size(query.size)
        assert batch.queries[row].size == (height, width)
        assert batch.valid[row].sum() == height * width and batch.valid[row, :height, :width].all()
        assert np.array_equal(batch.target[row, :height, :width], change.grid(answer))
        seen = batch.observation.views[row, :, :height, :width]
        assert np.array_equal(seen[0], batch.queries[row].source)
        assert np.array_equal(seen, change.views(query.views))
        assert np.array_equal(batch.observation.counts[row, :, :, :height, :width], change.lookup(query.lookup).counts)
        assert np.array_equal(batch.features[row], data.collate([query]).features[0])
        for pair, turned in zip(query.demonstrations, batch.queries[row].demonstrations, strict=True):
            assert np.array_equal(turned.output, change.grid(pair.output))


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own(examples: list[Example]) -> None:
    def keys(epoch: int, seed: int = 42) -> list[list[str]]:
        return [[example.query.key for example in batch] for batch in data.epoch_batches(examples, 5, seed, epoch)]

    assert [len(batch) for batch in keys(0)].count(5) == 2
    assert sorted(key for batch in keys(0) for key in batch) == sorted(example.query.key for example in examples)
    assert keys(0) == keys(0)
    assert keys(0) != keys(1)
    assert keys(0) != keys(0, seed=43)


def test_batches_hold_grids_of_about_one_size() -> None:
    examples = data.training_examples(load_tasks("arc-agi-1"))
    padded = 0
    for batch in data.epoch_batches(examples, 32, 0, 0):
        sizes = np.array([example.query.size for example in batch])
        padded += len(batch) * int(np.prod(sizes.max(0)))
    cells = sum(example.answer.size for example in examples)
    assert padded < 2 * cells  # in random batches it is more than five times


@pytest.mark.parametrize("room", [120, 384, 2000])
def test_the_prompt_is_bounded_and_shows_every_demonstration(room: int) -> None:
    query = data.training_examples(load_tasks("arc-agi-1"))[0].query
    text = data.prompt_text(query, room)
    assert len(text) <= room
    if room >= 384:
        assert text.count(" > ") == len(query.demonstrations)
        for pair in query.demonstrations:
            assert "".join(map(str, pair.input[0])) in text
            assert "".join(map(str, pair.output[0])) in text


def test_the_rule_is_put_in_words() -> None:
    mirrored = Pair(np.array([[1, 2, 0]]), np.array([[3, 2, 3]]))
    sentence = data.rule_sentence(Query("q", (mirrored,), np.array([[5, 5, 5, 5]]), (1, 4)))
    assert "in 1x4 out 1x4" in sentence
    assert "67% of cells change" in sentence
    assert "colours 3 appear" in sentence
    assert "colours 0 1 vanish" in sentence
    assert "mirror left-right" in sentence


def test_data_that_changed_has_another_fingerprint(examples: list[Example]) -> None:
    before = data.fingerprint(examples)
    assert data.fingerprint(examples) == before
    changed = examples[3].answer.copy()
    changed[0, 0] += 1
    assert data.fingerprint([*examples[:3], Example(examples[3].query, changed), *examples[4:]]) != before


def test_a_batch_moves_as_a_whole(examples: list[Example]) -> None:
    batch = data.collate([examples[0].query], [examples[0].answer]).to(torch.device("meta"))
    assert batch.target is not None
    assert {tensor.device.type for tensor in (*batch.observation, batch.features, batch.target)} == {"meta"}
