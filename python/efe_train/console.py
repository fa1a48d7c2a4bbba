"""What a run says: in log lines and the progress bar, and in the table at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from efe_train.metrics import LOG_LINE, METRICS, Row

EDGE = 20
"""Batches at the beginning and at the end of a run whose means the closing table compares."""


def log_line(row: Row) -> str:
    return LOG_LINE.format_map(row)


def bar_text(row: Row) -> str:
    """What the progress bar shows behind the count of batches."""
    shown = [f"{metric.bar}={row[metric.name]:.3g}" for metric in METRICS if metric.bar]
    return " ".join([*shown, f"lr={row['agent_lr']:g}/{row['qwen_lr']:g}"])


def closing_table(rows: Sequence[Row], seconds: float) -> str:
    """First against last batches, and how Qwen fared. rows: metrics of every batch of the run."""
    edge = max(1, min(EDGE, len(rows) // 2))
    first, last = rows[:edge], rows[-edge:]
    lines = [f"{'mean over batches':20s} {f'first {edge}':>12s} {f'last {edge}':>12s} {'last / first':>13s}"]
    for metric in METRICS:
        if metric.closing:
            begin, end = (math.fsum(row[metric.name] for row in part) / edge for part in (first, last))
            ratio = f"{end / begin:13.3f}" if begin > 0 and not metric.signed else ""
            lines.append(f"{metric.closing:20s} {begin:12.4f} {end:12.4f} {ratio}".rstrip())
    refreshes = [row["qwen_grad"] for row in rows if row["refresh"]]
    above = sum(value > 0 for value in refreshes)
    extremes = f", from {min(refreshes):.2e} to {max(refreshes):.2e}" if refreshes else ""
    lines.append(f"Qwen_grad above 0 at {above} of {len(refreshes)} refreshes{extremes}")
    lines.append(f"{len(rows)} batches in all; this command took {seconds:.0f} s")
    width = max(map(len, lines))
    return "\n".join(["-" * width, *lines, "-" * width])
