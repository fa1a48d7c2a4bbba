"""What a run keeps, when it ends, and that it is the same run in parts and compiled."""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn

from efe_train.__main__ import main
from efe_train.folder import RunFolder
from efe_train.held_out import HeldOut
from tests.efe_train.test_cli import checkpoint, complaint, metrics, saved, train

HELD_OUT = ("--validation", "0.25")
"""One of four tasks: nine queries are left, two batches an epoch."""


def scored_as(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Let the held-out tasks be solved so well after each epoch, and no better afterwards."""
    found = iter(scores)
    monkeypatch.setattr(HeldOut, "validate", lambda *_: {"val_exact": next(found, 0.0), "val_pixels": 0.5})


def test_the_last_checkpoints_are_kept_and_the_best_and_each_can_be_evaluated(
    arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    scored_as(monkeypatch, 0.1, 0.4, 0.2)
    assert train(arc_folder, out, *HELD_OUT, "--epochs", "5", "--save_every", "1", "--keep", "3") == 0
    assert saved(out) == ["batch-000004", "batch-000008", "batch-000009", "batch-000010"]
    best = out / "checkpoints" / "batch-000004"
    assert RunFolder(out, chosen=best).read_checkpoint()["scores"] == [0.4, 0.5]
    submissions = []
    for each in (out, best):
        assert main(["evaluate", "--checkpoint", str(each), "--out", str(tmp_path / each.name)]) == 0
        submissions.append(json.loads((tmp_path / each.name / "solutions.jsonl").read_text().splitlines()[0]))
    assert submissions[0]["evaluation"] != submissions[1]["evaluation"]
    assert "is one checkpoint of a run" in complaint(capsys, "--resume", "--out", str(best))


def test_a_run_that_gets_no_better_ends_early(
    arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    scored_as(monkeypatch, 0.1, 0.4, 0.3, 0.4)
    assert train(arc_folder, out, *HELD_OUT, "--epochs", "9", "--patience", "2") == 0
    assert "solved no better for 2 epochs" in capsys.readouterr().out
    assert len(metrics(out)) == checkpoint(out)["batches_done"] == 8
    assert saved(out) == ["batch-000004", "batch-000008"]
    assert "has ended by --patience" in complaint(capsys, "--resume", "--out", str(out))
    # It has known of the best when it was resumed.
    assert main(["--resume", "--out", str(out), "--patience", "3"]) == 0
    assert len(metrics(out)) == 10


def test_a_batch_in_parts_is_the_same_batch(arc_folder: Path, tmp_path: Path) -> None:
    arguments = ("--epochs", "4", "--prompt_refresh", "3", "--max_batches", "7")
    assert train(arc_folder, tmp_path / "whole", *arguments) == 0
    assert train(arc_folder, tmp_path / "parts", *arguments, "--accumulate", "4") == 0
    for whole, parts in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        # Sums in another order, and what Adam makes of it in a few steps.
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert parts["qwen_grad"] == pytest.approx(whole["qwen_grad"], rel=1e-3)


@pytest.mark.slow
def test_a_compiled_run_trains_as_another_one(
    arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as by --compile, but not handed to a C++ compiler, which would take minutes."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    arguments = ("--epochs", "3", "--prompt_refresh", "2", "--max_batches", "4")
    assert train(arc_folder, tmp_path / "eager", *arguments) == 0
    torch._dynamo.reset()
    assert train(arc_folder, tmp_path / "compiled", *arguments, "--compile") == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for eager, compiled in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        # Sums over more padding, in another order.
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4)
        assert compiled["qwen_grad"] == pytest.approx(eager["qwen_grad"], rel=1e-3)
