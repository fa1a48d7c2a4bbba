"""The held-out tasks of a run: how well they are solved while it trains, and when that was last better."""

from __future__ import annotations

from collections.abc import Sequence

from efe_train.agent import Agent
from efe_train.data import evaluation_queries
from efe_train.metrics import Row
from efe_train.picture import Picture, plan_pictures
from efe_train.scores import score
from efe_train.tasks import Grid, Task


class HeldOut:
    """Scores after each epoch. `scores` are those of the last batch, exact and pixels, where it was scored."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.cases = [case for task in tasks for case in task.tests]
        self.queries = [query for task in tasks for query in evaluation_queries(task)]
        self.plans: list[Grid] = []
        self.scores: list[float] | None = None
        self.best: list[float] | None = None
        self.epochs_since_best = 0

    def validate(self, agent: Agent, batch_size: int) -> dict[str, float]:
        """The val_ metrics, where there are such tasks and their answers are known."""
        self.plans = agent.predict(self.queries, batch_size)
        result = score(self.cases, [(grid, grid) for grid in self.plans])
        if not result.test_inputs:
            return {}
        found = (result.pixel_accuracy, result.changed_accuracy, result.exact_matches / result.test_inputs)
        named = zip(("val_pixels", "val_changed", "val_exact"), found, strict=True)
        return {name: value for name, value in named if value is not None}

    def note(self, row: Row) -> None:
        """Take the metrics of the next batch."""
        self.scores = [row["val_exact"], row.get("val_pixels", 0.0)] if "val_exact" in row else None
        if self.scores is not None:
            better = self.best is None or self.scores > self.best
            self.best = self.scores if better else self.best
            self.epochs_since_best = 0 if better else self.epochs_since_best + 1

    @property
    def is_best(self) -> bool:
        """Whether the last batch was scored, and better than any before."""
        return self.scores is not None and self.epochs_since_best == 0

    def is_over(self, patience: int | None) -> bool:
        """Whether so many epochs have brought nothing better."""
        return patience is not None and self.epochs_since_best >= patience

    def pictures(self) -> dict[str, Picture]:
        """Of a few plans that were scored last, beside their answers."""
        return plan_pictures(self.queries, self.plans, [answer for _, answer in self.cases])
