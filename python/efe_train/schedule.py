"""What changes over a run: the weight of the loss, and the learning rates."""

from __future__ import annotations

import math

from efe_train.config import TrainConfig

POLICY_RATES = (0.2, 2.0)
"""Learning rates of the policy over the full one of the planner: while the planner moves, and in the closing phase.

What is learned of a planner that moves is soon out of date.
"""


def epoch_weight(epoch: int) -> float:
    return 0.6 if epoch == 0 else 0.3


def rate_factor(
    done: int, batches: int, schedule: str = TrainConfig.schedule, warmup: int = TrainConfig.warmup
) -> float:
    """What the rates of planner, loss and Qwen are multiplied by after `done` of `batches`; 0 after the last one.

    They rise over `warmup` batches: at the full rate, the first steps would spoil what the look-up says.
    """
    if done >= batches:
        return 0.0
    rising = min(1.0, (done + 1) / warmup) if warmup else 1.0
    return rising * (0.5 * (1 + math.cos(math.pi * done / batches)) if schedule == "cosine" else 1.0)
