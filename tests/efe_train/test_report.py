from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from efe_train.__main__ import main
from efe_train.config import TrainConfig
from efe_train.folder import RunFolder
from efe_train.report import CHARTS, FINEST, SHOWN, Axis, chosen, draw_chart, draw_grid, points, thinned, write_report
from efe_train.scores import Solution, compare, write_evaluation, write_solutions
from efe_train.tasks import Grid, Pair, Task

VOID = {"meta", "br"}
"""Elements of the page that HTML does not close."""


class Page(HTMLParser):
    """The elements and the words of a page, whose elements are closed as they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def headings(self) -> list[str]:
        return re.findall(
            r"^(Loss|Reward|Validation, once per epoch|Learning rates|Best|Typical|Worst)$", self.words, re.M
        )


def rows(count: int) -> list[dict[str, float]]:
    """Of an epoch of ten batches each, at whose end the run is validated."""
    return [
        {"batch": batch, "epoch": (batch - 1) // 10, "loss": 1 / batch, "reward": -batch, "agent_lr": 2e-3}
        | ({"val_pixels": batch / 100, "val_exact": 0.0} if batch % 10 == 0 else {})
        for batch in range(1, count + 1)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "<i>run & co")
    folder.path.mkdir()
    folder.append_metrics(rows(50))
    return folder


def solution(name: str, attempt: Grid, answer: Grid | None) -> Solution:
    task = Task(name, (Pair(attempt, attempt),), ((np.zeros((2, 2), np.int64), answer),))
    return Solution(task, 0, (attempt, attempt), (attempt, attempt))


def solutions(count: int) -> list[Solution]:
    """The first has no cell right, the last has all of them right."""
    answer = np.arange(30).reshape(5, 6) % 10
    flat = [
        np.where(np.arange(30) < number * 30 // max(count - 1, 1), answer.ravel(), 9 - answer.ravel())
        for number in range(count)
    ]
    return [solution(f"task{number}", cells.reshape(5, 6), answer) for number, cells in enumerate(flat)]


def test_the_page_of_a_run_that_only_has_metrics_shows_curves_and_says_what_adds_scores(folder: RunFolder) -> None:
    text = write_report(folder).read_text()
    page = Page(text)
    assert page.headings() == ["Loss", "Reward", "Validation, once per epoch", "Learning rates"]
    assert "50 batches in 5 epochs." in page.words
    assert f"efe-train evaluate --checkpoint {folder.path}" in page.words
    assert "pixels, from 0.1 to 0.5" in page.words
    assert "<i>" not in text


def test_the_page_refers_to_nothing_outside_itself_and_has_no_script(folder: RunFolder) -> None:
    write_solutions(folder.path / "solutions.jsonl", solutions(4))
    text = write_report(folder).read_text()
    assert not re.search(r"https?:|url\(|@import|//", text)
    elements = Page(text).elements
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object"}
    assert not [attributes for _, attributes in elements if {"src", "href", "xlink:href", "srcset"} & attributes.keys()]


def test_every_picture_says_what_it_shows(folder: RunFolder) -> None:
    write_solutions(folder.path / "solutions.jsonl", solutions(4))
    page = Page(write_report(folder).read_text())
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    shown = [attributes for attributes in pictures if attributes.get("aria-hidden") != "true"]
    assert all(attributes["role"] == "img" for attributes in shown)
    assert len(shown) == len([tag for tag, _ in page.elements if tag == "title"]) - 1


def test_the_page_of_an_evaluated_run_has_scores_and_tasks(folder: RunFolder) -> None:
    folder.write_config(TrainConfig(dataset="some tasks", seed=12321))
    made = [*solutions(9), solution("<b>bold</b>", np.array([[3]]), None)]
    cases = [(each.source, each.answer) for each in made]
    evaluation = compare("other tasks", "eval", cases, {"<u>agent</u>": [each.attempts for each in made]})
    write_evaluation(folder.path / "evaluation.json", evaluation)
    write_solutions(folder.path / "solutions.jsonl", made)
    text = write_report(folder).read_text()
    page = Page(text)
    assert "on some tasks" in page.words and "12321" in page.words
    assert "On the eval tasks of other tasks. 9 of 10 test inputs have a known answer." in page.words
    assert "<u>agent</u>" in page.words and "1 (11.1%)" in page.words
    assert "larger (9 test inputs)" in page.words
    assert page.headings()[-3:] == ["Best", "Typical", "Worst"]
    assert "<b>bold</b>" in page.words and "<b>bold" not in text
    assert "draft 2" in page.words and "attempt 2" in page.words and "30 of 30 cells wrong" in page.words


def test_a_run_without_a_batch_has_a_page(tmp_path: Path) -> None:
    assert "No batch has been recorded yet." in Page(write_report(RunFolder(tmp_path)).read_text()).words


def test_the_command_writes_the_page_and_prints_its_path(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(folder.path)]) == 0
    assert capsys.readouterr().out == f"{folder.path / 'report.html'}\n"
    assert main(["report", str(folder.path), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == (folder.path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: RUN"),
        (("no/such/run",), "'no/such/run' is not a run folder: it should hold metrics.jsonl."),
        (("run", "--out", "no/such/page.html"), "cannot be written"),
    ],
)
def test_mistakes_are_explained_in_one_sentence(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    RunFolder(Path("run")).append_metrics(rows(1))
    assert main(["report", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count("\n") == 1


def test_a_curve_has_the_finite_values_of_the_rows_that_have_it() -> None:
    found = [{"batch": 1, "loss": 2.0}, {"batch": 2}, {"batch": 3, "loss": math.nan}, {"batch": 4, "loss": 1.0}]
    assert points(found, "loss") == [(1, 2.0), (4, 1.0)]
    assert draw_chart(CHARTS[0], [{"batch": 1, "efe": 1.0}, {"batch": 2, "loss": math.inf}]) is None


def test_a_long_curve_keeps_its_spikes() -> None:
    line = [(float(batch), 0.0) for batch in range(100_000)]
    line[54_321] = (54_321.0, 9.0)
    kept = thinned(line)
    assert (54_321.0, 9.0) in kept
    assert len(kept) <= 2 * FINEST
    assert kept == sorted(kept)


@pytest.mark.parametrize("values", [(0.0, 1.0), (-3e-4, 2e-3), (1.0, 410.0), (5.0, 5.0), (0.0, 0.0), (2.2, 7e30)])
def test_an_axis_has_a_few_round_marks_within_it(values: tuple[float, float]) -> None:
    marks = Axis(values, 50, 390).marks()
    assert 2 <= len(marks) <= 6
    assert all(50 <= place <= 390 for place, _ in marks)
    steps = {f"{float(after) - float(before):.0e}" for (_, before), (_, after) in itertools.pairwise(marks)}
    assert len(steps) == 1 and steps.pop()[0] in "125"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 18, 30])
def test_the_sheet_has_the_best_and_the_worst_and_none_twice(count: int) -> None:
    groups = chosen(solutions(count))
    names = [each.task.id for group in groups.values() for each in group]
    assert len(names) == len(set(names))
    assert len(names) == 3 * SHOWN or count < 3 * SHOWN
    assert groups["Best"][0].task.id == f"task{count - 1}"
    assert names[-1] == "task0"
    assert all(len(group) <= SHOWN for group in groups.values())


def test_an_exact_second_attempt_comes_before_a_better_first_one() -> None:
    answer, near, far = np.array([[1, 2]]), np.array([[1, 0]]), np.array([[0, 0]])
    exact = solution("exact", far, answer)
    exact = Solution(exact.task, 0, (), (far, answer))
    assert [each.task.id for each in chosen([solution("near", near, answer), exact])["Best"]] == ["exact"]


def test_the_drawing_of_a_grid_has_every_cell_in_its_colour_and_a_cross_on_the_wrong_ones() -> None:
    grid = np.random.default_rng(0).integers(0, 3, size=(7, 11))
    answer = grid.copy()
    answer[2, 5] = answer[6, 10] = 9
    drawing = draw_grid("attempt", grid, "", answer)
    painted = np.full(grid.shape, -1)
    for colour, path in drawing["cells"]:
        for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
            painted[int(y), int(x) : int(x) + int(length)] = colour
    assert (painted == grid).all()
    assert re.findall(r"M(\S+) ([\d.]+)l", drawing["crosses"]) == [("5.25", "2.25"), ("10.25", "6.25")]
    assert draw_grid("attempt", grid, "", answer[:5])["crosses"] == ""
