from __future__ import annotations

from efe_train.console import bar_text, closing_table, log_line
from efe_train.metrics import METRICS


def row_of(**values: float) -> dict[str, float]:
    return dict.fromkeys((metric.name for metric in METRICS), 0.5) | values


def test_the_log_line_is_the_documented_one() -> None:
    row = {"batch": 50, "reward": 0.0003, "loss": 2.89, "qwen_grad": 5.67e-05, "mask_ratio": 0.72}
    expected = "[Batch   50] Reward:  0.0003 | Loss:  2.8900 | Qwen_grad: 5.67e-05 | Mask_ratio: 0.7200"
    assert log_line(row) == expected


def test_the_progress_bar_shows_the_watched_values() -> None:
    row = row_of(agent_lr=2e-3, qwen_lr=1e-3)
    assert bar_text(row) == "loss=0.5 mask=0.5 reward=0.5 Qwen_grad=0.5 queries/s=0.5 lr=0.002/0.001"


def test_the_closing_table_compares_the_first_batches_with_the_last() -> None:
    rows = [row_of(loss=4.0 - 0.03 * n, acc_after=0.01 * n, refresh=n % 10 == 0) for n in range(100)]
    rows[0]["qwen_grad"] = 0.0
    table = closing_table(rows, 12.0)
    # means of n = 0..19 and 80..99
    (loss,) = [line.split() for line in table.splitlines() if line.startswith("Loss")]
    assert loss == ["Loss", "3.7150", "1.3150", "0.354"]
    (after,) = [line.split() for line in table.splitlines() if line.startswith("Accuracy after")]
    assert after == ["Accuracy", "after", "0.0950", "0.8950", "9.421"]
    assert "above 0 at 9 of 10 refreshes, from 0.00e+00 to 5.00e-01" in table
    assert "100 batches" in table and "12 s" in table


def test_a_run_shorter_than_the_edges_has_a_table_too() -> None:
    assert "first 1" in closing_table([row_of(refresh=True)], 1.0)
