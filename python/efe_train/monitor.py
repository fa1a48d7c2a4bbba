"""Watches the metrics of a run and explains what looks wrong."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from efe_train.metrics import METRICS, Row

WINDOW = 100
"""Batches over which Qwen must have got a gradient, and over which the loss must have fallen."""

LEAST_FALL = 0.001
"""Share by which the mean of a window must lie below that of the window before."""

SKIPPED_STEPS = 25
"""GradScaler halves its scale at each overflow: 65536 is below 1 after 17 in a row, so this many are too many."""


@dataclass(frozen=True)
class RedFlag:
    """What was seen at a batch and what to check. A fatal one stops the training."""

    batch: int
    message: str
    fatal: bool = False


class Monitor:
    """Feed it the metrics of every batch in order.

    loss_scaling: whether a GradScaler is at work, which makes a gradient overflow now and then and skips that step.
    reads: whether the agent has Qwen's prompts, so that Qwen gets a gradient.
    """

    def __init__(self, *, loss_scaling: bool = False, reads: bool = True) -> None:
        self.loss_scaling = loss_scaling
        self.reads = reads
        self.losses: deque[float] = deque(maxlen=2 * WINDOW)
        self.without_qwen = 0
        self.overflows = 0
        self.next_trend = 2 * WINDOW
        self.gains: deque[float] = deque(maxlen=WINDOW)

    def observe(self, row: Row) -> list[RedFlag]:
        flags = [self.not_finite(row), self.no_qwen_gradient(row), self.no_progress(row), self.only_copies(row)]
        return [flag for flag in flags if flag is not None]

    def not_finite(self, row: Row) -> RedFlag | None:
        batch = int(row["batch"])
        gradient_failed = not math.isfinite(row["grad_norm"])
        self.overflows = self.overflows + 1 if gradient_failed else 0
        for name, cause in ((metric.name, metric.check) for metric in METRICS if metric.check):
            tolerated = name == "grad_norm" and self.loss_scaling and self.overflows < SKIPPED_STEPS
            if not math.isfinite(row[name]) and not tolerated:
                return RedFlag(batch, f"{name} is {row[name]} at batch {batch}. Check {cause}.", fatal=True)
        return None

    def no_qwen_gradient(self, row: Row) -> RedFlag | None:
        # In the closing phase of a run the policy alone learns.
        if row["agent_lr"] == 0 or not self.reads:
            return None
        self.without_qwen = 0 if row["qwen_grad"] > 0 and row["refresh"] else self.without_qwen + 1
        if self.without_qwen == 0 or self.without_qwen % WINDOW:
            return None
        batch = int(row["batch"])
        return RedFlag(
            batch,
            f"Qwen_grad was 0 over {self.without_qwen} batches up to batch {batch}. Check that --prompt_refresh is "
            f"below {WINDOW}, that Qwen's parameters require gradients and stand in the optimizer, and that the prompt "
            "reaches the planner and the loss without detach().",
        )

    def no_progress(self, row: Row) -> RedFlag | None:
        """Looks at the EFE itself, not at the loss, whose weight on it changes after the first epoch."""
        if row["agent_lr"] == 0:
            return None
        self.losses.append(row["efe"])
        batch = int(row["batch"])
        if batch < self.next_trend or len(self.losses) < 2 * WINDOW:
            return None
        self.next_trend = batch + WINDOW
        values = list(self.losses)
        before, now = sum(values[:WINDOW]) / WINDOW, sum(values[WINDOW:]) / WINDOW
        if before - now >= LEAST_FALL * abs(before):
            return None
        return RedFlag(
            batch,
            f"The loss is {'rising' if now > before else 'flat'}: its EFE was {before:.4f} in the {WINDOW} batches "
            f"before the last {WINDOW} and is {now:.4f} now (batch {batch}). Check the learning rates (--agent_lr, "
            "--qwen_lr): too high makes it rise, too low makes it flat; or the run has learned what it can.",
        )

    def only_copies(self, row: Row) -> RedFlag | None:
        """Of the window before, from the second one on: in the first one the agent may still be learning to copy."""
        self.gains.append(row["acc_after"] - row["acc_copying"])
        batch = int(row["batch"])
        if batch % WINDOW or batch == WINDOW or sum(self.gains) > 0:
            return None
        return RedFlag(
            batch,
            f"The agent is no better than copying its input: over the {WINDOW} batches up to batch {batch} it gets "
            f"{-sum(self.gains) / len(self.gains):.4f} fewer cells right. Check that the demonstrations say something "
            "(--without look_up leaves them out), and the learning rate (--agent_lr).",
        )
