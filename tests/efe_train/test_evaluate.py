from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from efe_train import data
from efe_train.__main__ import main
from efe_train.evaluate import submission
from efe_train.folder import RunFolder
from efe_train.lookup import Lookup, look_up
from efe_train.scores import Solution, read_solutions
from efe_train.solve import Solver
from efe_train.tasks import Grid, Pair, Task
from tests.efe_train.conftest import recolouring_task, write_tasks


def test_the_submission_has_arc_prizes_format() -> None:
    one, two = np.array([[1]]), np.array([[2]])
    assert submission(["a", "a", "b"], [(one, two), (two, one), (one, one)]) == {
        "a": [{"attempt_1": [[1]], "attempt_2": [[2]]}, {"attempt_1": [[2]], "attempt_2": [[1]]}],
        "b": [{"attempt_1": [[1]], "attempt_2": [[1]]}],
    }


@pytest.fixture
def run_folder(arc_folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    assert main(["--dataset", str(arc_folder), "--max_batches", "2", "--batch_size", "6", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("adapt", ["0", "2"])
def test_evaluation_answers_every_test_input_and_never_looks_at_the_answers(
    adapt: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {f"task{seed}": recolouring_task(seed) for seed in range(3)}
    honest = write_tasks(tmp_path / "honest", tasks)
    for task in tasks.values():
        task["test"][0]["output"] = [[9]]
    forged = write_tasks(tmp_path / "forged", tasks)
    for task in tasks.values():
        del task["test"][0]["output"]
    blind = write_tasks(tmp_path / "blind", tasks)
    found = []
    for dataset in (honest, forged, blind):
        out = tmp_path / f"out_{dataset.name}"
        arguments = ["--checkpoint", str(run_folder), "--dataset", str(dataset), "--adapt", adapt, "--out", str(out)]
        assert main(["evaluate", *arguments]) == 0
        others = [solution.to_json()["others"] for solution in read_solutions(out / "solutions.jsonl")]
        found.append((json.loads((out / "submission.json").read_text()), others))
    assert found[0] == found[1] == found[2]
    answers, others = found[0]
    assert set(answers) == set(tasks) and len(others) == 3
    for name, task in tasks.items():
        (attempts,) = answers[name]
        assert attempts["attempt_1"] != attempts["attempt_2"]
        assert np.shape(attempts["attempt_1"]) == np.shape(attempts["attempt_2"]) == np.shape(task["test"][0]["input"])
    scores = [
        json.loads((tmp_path / f"out_{name}" / "evaluation.json").read_text())["scores"]
        for name in ("honest", "forged", "blind")
    ]
    assert [result["agent"]["all"]["right_sizes"] for result in scores] == [3, 0, 0]
    assert [result["agent"]["all"]["test_inputs"] for result in scores] == [3, 3, 0]
    assert scores[2]["agent"]["all"]["pixel_accuracy"] is None
    compared = ["agent", "agent without refinement", "look-up", "copying", "commonest colour"]
    assert list(scores[0]) == (["agent, adapted", *compared] if adapt != "0" else compared)
    printed = capsys.readouterr().out
    assert printed.count("all (3 test inputs)") == 2 and "3 of 3 test inputs have a known answer" in printed
    assert "The answers to the 3 test inputs are unknown: nothing is scored." in printed


def test_without_the_look_up_nothing_of_it_reaches_the_attempts(
    arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    arguments = ["--dataset", str(arc_folder), "--max_batches", "2", "--batch_size", "6", "--without", "look_up"]
    assert main([*arguments, "--out", str(out)]) == 0

    def misled(demonstrations: Sequence[Pair], source: Grid, size: tuple[int, int]) -> Lookup:
        found = look_up(demonstrations, source, size)
        return Lookup(np.roll(found.counts, 1, 1), found.tables, found.statistics)

    submissions = []
    for name in ("honest", "misled"):
        assert main(["evaluate", "--checkpoint", str(out), "--out", str(tmp_path / name)]) == 0
        submissions.append((tmp_path / name / "submission.json").read_text())
        monkeypatch.setattr(data, "look_up", misled)
    assert submissions[0] == submissions[1]


def recorded(monkeypatch: pytest.MonkeyPatch, stop_in: int = 0) -> list[list[str]]:
    """The ids of each batch that is solved from now on. In one of them, counted from 1, SIGTERM arrives."""
    batches: list[list[str]] = []
    solve = Solver.solve

    def solve_and_record(self: Solver, tasks: Sequence[Task]) -> list[list[Solution]]:
        batches.append([task.id for task in tasks])
        if len(batches) == stop_in:
            signal.raise_signal(signal.SIGTERM)
        return solve(self, tasks)

    monkeypatch.setattr(Solver, "solve", solve_and_record)
    return batches


def test_an_evaluation_that_a_signal_ended_goes_on_where_it_stopped(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_tasks(tmp_path / "others", {f"task{seed}": recolouring_task(seed) for seed in range(4)})
    given = ["--checkpoint", str(run_folder), "--dataset", str(dataset), "--adapt", "1", "--tasks_per_batch", "1"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(["evaluate", *given, "--out", str(whole)]) == 0
    capsys.readouterr()
    arguments = ["evaluate", *given, "--out", str(out)]
    with monkeypatch.context() as patch:
        before = recorded(patch, stop_in=3)
        assert main(arguments) == 128 + signal.SIGTERM
    assert capsys.readouterr().out.startswith("Stopped by SIGTERM; ")
    assert len(read_solutions(out / "solutions.jsonl")) == len(before) == 3
    assert not (out / "submission.json").exists()
    # The last line was only half written: the task is solved again.
    (out / "solutions.jsonl").write_bytes((out / "solutions.jsonl").read_bytes()[:-9])
    with monkeypatch.context() as patch:
        after = recorded(patch)
        assert main(arguments) == 0
    assert sorted(before[:2] + after) == [["task0"], ["task1"], ["task2"], ["task3"]]
    for name in ("submission.json", "evaluation.json"):
        assert (out / name).read_text() == (whole / name).read_text()


def test_another_evaluation_begins_anew(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {f"task{seed}": recolouring_task(seed) for seed in range(2)}
    arguments = ["evaluate", "--checkpoint", str(run_folder), "--dataset", str(write_tasks(tmp_path / "others", tasks))]
    batches = recorded(monkeypatch)

    def solved(*more: str) -> list[str]:
        batches.clear()
        assert main([*arguments, *more]) == 0
        return sorted(task for batch in batches for task in batch)

    assert solved("--max_tasks", "1") == ["task0"]
    assert solved() == ["task1"]
    assert solved() == []
    assert solved("--adapt", "1") == ["task0", "task1"]
    tasks["task0"]["test"][0]["input"] = [[1, 2], [3, 4]]
    write_tasks(tmp_path / "others", tasks)
    assert solved("--adapt", "1") == ["task0"]
    assert main(["--resume", "--out", str(run_folder), "--max_batches", "3"]) == 0
    assert solved("--adapt", "1") == ["task0", "task1"]


def test_a_task_with_one_demonstration_is_solved_without_adaptation(run_folder: Path, tmp_path: Path) -> None:
    dataset = write_tasks(tmp_path / "others", {"single": recolouring_task(1, pairs=1), "task": recolouring_task(2)})
    assert main(["evaluate", "--checkpoint", str(run_folder), "--dataset", str(dataset), "--adapt", "2"]) == 0
    single, _ = sorted(read_solutions(run_folder / "solutions.jsonl"), key=lambda solution: solution.task.id)
    assert [grid.tolist() for grid in single.attempts] == [grid.tolist() for grid in single.others["agent"]]


def test_tasks_that_the_run_was_trained_on_are_called_so(
    run_folder: Path, arc_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = (run_folder / "training.log").read_text()
    assert "(the same tasks serve evaluation)" in log
    assert "Score it on the tasks that it was trained on" in log
    capsys.readouterr()
    others = write_tasks(tmp_path / "others", {"other": recolouring_task(9)})
    for dataset, trained_on in ((arc_folder, True), (others, False)):
        assert main(["evaluate", "--checkpoint", str(run_folder), "--dataset", str(dataset)]) == 0
        assert ("which the run was trained on" in capsys.readouterr().out) == trained_on


def test_a_solution_is_recognised(run_folder: Path, tmp_path: Path) -> None:
    """Score the run on tasks whose answers are the run's own second attempts."""
    tasks = {f"other{seed}": recolouring_task(seed) for seed in range(3)}
    write_tasks(tmp_path / "others", tasks)
    arguments = ["evaluate", "--checkpoint", str(run_folder), "--dataset", str(tmp_path / "others")]
    assert main(arguments) == 0
    for name, (attempts,) in json.loads((run_folder / "submission.json").read_text()).items():
        tasks[name]["test"][0]["output"] = attempts["attempt_2"]
    write_tasks(tmp_path / "others", tasks)
    assert main(arguments) == 0
    scores = json.loads((run_folder / "evaluation.json").read_text())["scores"]
    assert scores["agent"]["all"]["exact_matches"] == scores["agent"]["same size"]["exact_matches"] == 3
    assert "3 (100.0%)" in (run_folder / "report.html").read_text()


def test_mistakes_are_explained_in_one_sentence(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()

    def complaint(*arguments: str) -> str:
        assert main(["evaluate", *arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith("efe-train: ") and message.count("\n") == 1
        return message

    assert "--checkpoint" in complaint()
    assert "is not a run folder" in complaint("--checkpoint", str(tmp_path / "nowhere"))
    assert "--split" in complaint("--checkpoint", str(run_folder), "--split", "middle")
    assert "--adapt" in complaint("--checkpoint", str(run_folder), "--adapt", "-1")
    assert "neither a folder nor a data set" in complaint("--checkpoint", str(run_folder), "--dataset", "nothing")
    (RunFolder(run_folder).checkpoint / "model.safetensors").write_bytes(b"broken")
    assert "is damaged" in complaint("--checkpoint", str(run_folder))
