"""What a run says: to a tracker, in log lines and the progress bar, and in the table at its end."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from efe_train.config import TrainConfig, UserError
from efe_train.folder import RunFolder
from efe_train.metrics import LOG_LINE, METRICS, Row

EDGE = 20
"""Batches at the beginning and at the end of a run whose means the closing table compares."""


def check_tracker(name: str | None) -> None:
    for package in ("accelerate", name) if name is not None else ():
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--log_with {name} needs the package {package}, which is not installed: pip install {package}"
            )


def start_tracker(config: TrainConfig, folder: RunFolder) -> Any | None:
    """The Accelerator whose tracker logs the run, or None."""
    if config.log_with is None:
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=config.log_with, project_dir=folder.path, cpu=config.device == "cpu")
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    accelerator.init_trackers("efe-train", config=settings)
    return accelerator


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
