from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from efe_train.__main__ import main
from efe_train.evaluate import score, submission, two_best
from tests.efe_train.conftest import recolouring_task, write_tasks


def test_the_two_attempts_are_the_two_most_probable_grids() -> None:
    logits = torch.randn(2, 2, 3)
    log_probs = logits.log_softmax(-1)

    def log_prob(grid: tuple[int, ...]) -> float:
        return sum(log_probs.reshape(4, 3)[cell, colour].item() for cell, colour in enumerate(grid))

    ranked = sorted(itertools.product(range(3), repeat=4), key=log_prob, reverse=True)
    first, second = two_best(logits)
    assert tuple(first.ravel()) == ranked[0]
    assert tuple(second.ravel()) == ranked[1]


def test_the_score_counts_pixels_sizes_and_either_attempt() -> None:
    answer = np.array([[1, 2], [3, 4]])
    near = np.array([[1, 2], [3, 5]])
    wide = np.zeros((2, 3), np.int64)
    result = score([answer, answer, answer, None], [(near, answer), (near, near), (wide, wide), (near, near)])
    assert (result.test_inputs, result.exact_matches, result.right_sizes) == (3, 1, 2)
    assert result.pixel_accuracy == pytest.approx((0.75 + 0.75 + 0) / 3)


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


def test_evaluation_answers_every_test_input_and_never_looks_at_the_answers(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
        arguments = ["evaluate", "--checkpoint", str(run_folder), "--dataset", str(dataset), "--out", str(out)]
        assert main(arguments) == 0
        found.append(json.loads((out / "submission.json").read_text()))
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == set(tasks)
    for name, task in tasks.items():
        (attempts,) = found[0][name]
        assert attempts["attempt_1"] != attempts["attempt_2"]
        assert np.shape(attempts["attempt_1"]) == np.shape(attempts["attempt_2"]) == np.shape(task["test"][0]["input"])
    scores = [
        json.loads((tmp_path / f"out_{name}" / "evaluation.json").read_text()) for name in ("honest", "forged", "blind")
    ]
    assert [result["right_sizes"] for result in scores] == [3, 0, 0]
    assert [result["test_inputs"] for result in scores] == [3, 3, 0]
    assert scores[2]["pixel_accuracy"] is None
    printed = capsys.readouterr().out
    assert printed.count("Pixel accuracy") == 2 and "3 of 3 test inputs have a known answer" in printed
    assert "The answers to the 3 test inputs are unknown: nothing is scored." in printed


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
    assert json.loads((run_folder / "evaluation.json").read_text())["exact_matches"] == 3


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
    assert "neither a folder nor a data set" in complaint("--checkpoint", str(run_folder), "--dataset", "nothing")
    (run_folder / "checkpoint.pt").write_bytes(b"broken")
    assert "is damaged" in complaint("--checkpoint", str(run_folder))
