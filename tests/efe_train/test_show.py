from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from efe_train.__main__ import main
from efe_train.config import TrainConfig
from efe_train.folder import RunFolder
from efe_train.scores import Solution, write_solutions
from efe_train.tasks import load_tasks
from tests.efe_train.conftest import recolouring_task, write_tasks


@pytest.fixture
def run(arc_folder: Path, tmp_path: Path) -> Path:
    """The folder of a run that has solved the first task but for one cell of the first attempt."""
    task = load_tasks(str(arc_folder))[0]
    answer = task.tests[0][1]
    assert answer is not None
    near = answer.copy()
    near[0, 1] = 0
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_config(TrainConfig(dataset=str(arc_folder)))
    write_solutions(folder.path / "solutions.jsonl", [Solution(task, 0, (answer[:2], answer[:1, :2]), (near, answer))])
    return folder.path


def test_a_task_is_printed_with_its_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "007bbfb7"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("input") == 6 and printed.count("output") == 5
    assert "0 7 7     0 0 0 0 7 7 0 7 7" in printed
    assert "attempt" not in printed


def test_a_task_that_the_run_solved_is_printed_with_the_attempts_and_their_wrong_cells(
    run: Path, arc_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "task0", "--checkpoint", str(run)]) == 0
    printed = capsys.readouterr().out
    answer = recolouring_task(0)["test"][0]["output"]
    assert f"1 of {np.size(answer)} cells wrong" in printed and "right" in printed
    assert f"{answer[0][0]} 0x{answer[0][2]} " in printed and printed.count("x") == printed.count(" x ") + 1
    assert f"wrong size, 1 x 2 instead of {len(answer)} x {len(answer[0])}" in printed
    assert main(["show", "task1", "--checkpoint", str(run)]) == 0
    assert "attempt" not in capsys.readouterr().out


def test_attempts_at_the_task_of_another_data_set_are_not_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tasks(tmp_path / "others", {"task0": recolouring_task(1)})
    assert main(["show", "task0", "--checkpoint", str(run), "--dataset", str(tmp_path / "others")]) == 0
    printed = capsys.readouterr().out
    assert "test input 1" in printed and "attempt" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: TASK"),
        (("007bbfb8",), "TASK '007bbfb8' is not in --dataset 'arc-agi-1': did you mean 007bbfb7"),
        (("puzzle",), "its 800 tasks are 00576224 to ff805c23."),
        (("task7", "--dataset", "tasks"), "did you mean task3 or task2 or task1?"),
        (("task0", "--dataset", "nothing"), "neither a folder nor a data set"),
        (("task0", "--checkpoint", "nothing"), "'nothing' is not a run folder: it should hold config.json."),
    ],
)
def test_mistakes_are_explained_in_one_sentence(
    arguments: tuple[str, ...], message: str, arc_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(arc_folder.parent)
    assert main(["show", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count("\n") == 1


def test_a_task_is_found_in_either_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, name in (("training", "one"), ("evaluation", "two")):
        write_tasks(tmp_path / folder, {name: recolouring_task(0)})
    for name in ("one", "two"):
        assert main(["show", name, "--dataset", str(tmp_path)]) == 0
        assert "test input 1" in capsys.readouterr().out
