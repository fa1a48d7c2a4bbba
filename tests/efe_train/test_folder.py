from __future__ import annotations

from pathlib import Path

import pytest
import torch

from efe_train.config import TrainConfig, UserError
from efe_train.folder import RunFolder


def test_metrics_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics([{"batch": n, "loss": n / 3} for n in range(1, 8)])
    kept = folder.cut_metrics(5)
    assert kept == folder.read_metrics() == [{"batch": n, "loss": n / 3} for n in range(1, 6)]


def test_the_checkpoint_only_changes_when_a_candidate_is_accepted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_candidate({"value": torch.tensor(1.0)})
    folder.accept_candidate()
    folder.write_candidate({"value": torch.tensor(2.0)})
    assert folder.read_checkpoint()["value"] == 1
    folder.drop_candidate()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt"]


def test_the_configuration_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = TrainConfig(epochs=3, qwen_lr=0.25, out="here")
    RunFolder(tmp_path).write_config(config)
    assert RunFolder(tmp_path).read_config() == config
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        RunFolder(tmp_path).read_config()
