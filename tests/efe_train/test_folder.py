from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from efe_train.config import TrainConfig, UserError
from efe_train.folder import RunFolder


def test_metrics_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics([{"batch": n, "loss": n / 3} for n in range(1, 8)])
    kept = folder.cut_metrics(5)
    assert kept == folder.read_metrics() == [{"batch": n, "loss": n / 3} for n in range(1, 6)]


def state(value: float, scores: list[float] | None = None) -> dict[str, Any]:
    return {"value": torch.tensor(value), "scores": scores, "qwen": []}


def test_the_checkpoint_only_changes_when_a_candidate_is_accepted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_candidate(state(1))
    folder.accept_candidate(1, keep=2)
    folder.write_candidate(state(2))
    assert folder.read_checkpoint()["value"] == 1
    folder.drop_candidate()
    assert sorted(file.name for file in folder.checkpoints.iterdir()) == ["batch-000001"]


def test_the_last_checkpoints_stay_and_the_best(tmp_path: Path) -> None:
    """By the share of test inputs that are solved, and where that is the same, of pixels."""
    folder = RunFolder(tmp_path)
    for batch, scores in enumerate([None, [0.1, 0.9], [0.2, 0.5], [0.2, 0.7], [0.2, 0.6], None, None]):
        folder.write_candidate(state(batch, scores))
        folder.accept_candidate(batch, keep=2)
    assert [file.name for file in folder.saved()] == ["batch-000003", "batch-000005", "batch-000006"]
    assert folder.read_checkpoint()["value"] == 6
    assert RunFolder.find(str(folder.saved()[0]), holding=[]).read_checkpoint()["value"] == 3


def test_the_configuration_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = TrainConfig(epochs=3, qwen_lr=0.25, out="here")
    RunFolder(tmp_path).write_config(config)
    assert RunFolder(tmp_path).read_config() == config
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        RunFolder(tmp_path).read_config()
