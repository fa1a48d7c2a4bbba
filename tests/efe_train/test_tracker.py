from __future__ import annotations

import contextlib
import io
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efe_train.config import TrainConfig, UserError
from efe_train.folder import RunFolder
from efe_train.picture import Picture
from efe_train.tracker import Tracker, start_tracker

pytest.importorskip("accelerate")

ROWS = [{"batch": 1, "queries": 3, "loss": 2.5, "val_exact": 0.25}, {"batch": 2, "queries": 3, "loss": 1.5}]
NAME = "task1/test/0"


def image() -> Picture:
    """Red above, blue below; wider than high."""
    found = np.zeros((8, 24, 3), np.uint8)
    found[:4, :, 0] = found[4:, :, 2] = 255
    return found


def started(tmp_path: Path, log_with: str, **settings: Any) -> Tracker:
    folder = RunFolder(tmp_path / "a run")
    folder.path.mkdir(exist_ok=True)
    tracker = start_tracker(TrainConfig(device="cpu", log_with=log_with, **settings), folder)
    assert tracker is not None
    return tracker


def log_run(tracker: Tracker) -> None:
    for row in ROWS:
        tracker.log(row, step=int(row["batch"]))
    tracker.log_plans({NAME: image()}, step=2)
    tracker.end()


def assert_shows_image(file: Path | io.BytesIO) -> None:
    found = pytest.importorskip("PIL.Image").open(file).convert("RGB")
    assert np.array_equal(np.asarray(found), image())


def test_a_run_without_a_tracker_has_none(tmp_path: Path) -> None:
    assert start_tracker(TrainConfig(), RunFolder(tmp_path)) is None


def test_tensorboard_gets_scalars_and_pictures(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_run(started(tmp_path, "tensorboard"))
    events = reader.EventAccumulator(str(tmp_path / "a run" / "efe-train"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "val_exact"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    (shown,) = events.Images(f"plans/{NAME}")
    assert shown.step == 2
    assert_shows_image(io.BytesIO(shown.encoded_image_string))


def test_trackio_gets_scalars_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which trackio reads when it is imported
    pytest.importorskip("trackio")
    log_run(started(tmp_path, "trackio"))
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "efe-train.db")) as database:
        logged = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {(run, step) for run, step, _ in logged} == {("a run", 1), ("a run", 2)}
    values = [json.loads(metrics) for *_, metrics in logged]
    assert values[:2] == [{"loss": 2.5, "val_exact": 0.25}, {"loss": 1.5}]
    assert values[2].keys() == {f"plans/{NAME}"}
    (shown,) = (tmp_path / "trackio").rglob("*.png")
    assert_shows_image(shown)


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """wandb where nobody has logged in."""
    module = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    yield module
    module.teardown()  # it would keep the settings of the first test


def test_wandb_gets_scalars_and_pictures_offline(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = started(tmp_path, "wandb", seed=7)
    run = tracker.accelerator.trackers[0].tracker
    for row in ROWS:
        tracker.log(row, step=int(row["batch"]))
    tracker.log_plans({NAME: image()}, step=3)  # with which step 2 is complete
    assert (run.project, run.name, run.config["seed"]) == ("efe-train", "a run", 7)
    assert [run.summary.get(name) for name in ("loss", "val_exact", "queries")] == [1.5, 0.25, None]
    tracker.end()
    (shown,) = (tmp_path / "a run" / "wandb").glob("offline-run-*/files/media/**/*.png")
    assert_shows_image(shown)


def test_wandb_without_a_key_is_explained(wandb: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--log_with wandb cannot begin \(.*\): run `wandb login`, or set WANDB_MODE="):
        started(tmp_path, "wandb")


def test_a_tracker_has_nobody_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(*arguments: Any, **settings: Any) -> None:
        asked.append("Your key? ")
        input(asked[0])

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", ask)
    terminal = io.StringIO("a line that is meant for something else\n")
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(UserError, match="--log_with wandb cannot begin"):
        start_tracker(TrainConfig(log_with="wandb"), RunFolder(tmp_path))
    assert asked and sys.stdin is terminal and terminal.tell() == 0
