from __future__ import annotations

from pathlib import Path

import pytest
import torch

from efe_train.config import TrainConfig, UserError
from efe_train.report import RunFolder, closing_table, log_line


def test_the_log_line_is_the_documented_one() -> None:
    row = {"batch": 50, "reward": 0.0003, "loss": 2.89, "qwen_grad": 5.67e-05, "mask_ratio": 0.72}
    expected = "[Batch   50] Reward:  0.0003 | Loss:  2.8900 | Qwen_grad: 5.67e-05 | Mask_ratio: 0.7200"
    assert log_line(row) == expected


def test_the_closing_table_compares_the_first_batches_with_the_last() -> None:
    rows = [
        {"loss": 4.0 - 0.03 * n, "efe": 2.0, "mask_ratio": 1.0, "reward": 0.0, "refresh": n % 10 == 0, "qwen_grad": 0.5}
        for n in range(100)
    ]
    rows[0]["qwen_grad"] = 0.0
    table = closing_table(rows, 12.0)
    # means of n = 0..19 and 80..99
    (loss,) = [line.split() for line in table.splitlines() if line.startswith("Loss")]
    assert loss == ["Loss", "3.7150", "1.3150", "0.354"]
    assert "above 0 at 9 of 10 refreshes, from 0.00e+00 to 5.00e-01" in table
    assert "100 batches" in table and "12 s" in table


def test_a_run_shorter_than_the_edges_has_a_table_too() -> None:
    row = {"loss": 1.0, "efe": 2.0, "mask_ratio": 0.0, "reward": 0.0, "refresh": True, "qwen_grad": 0.5}
    assert "first 1" in closing_table([row], 1.0)


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
