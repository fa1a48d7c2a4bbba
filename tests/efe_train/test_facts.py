from __future__ import annotations

from efe_train.data import collate, evaluation_queries
from efe_train.facts import NUM_FEATURES
from efe_train.tasks import load_tasks


def test_features_tell_tasks_apart_and_stay_small() -> None:
    tasks = load_tasks("arc-agi-1", "eval")
    batch = collate([query for task in tasks for query in evaluation_queries(task)])
    assert batch.features.shape == (419, NUM_FEATURES)
    assert batch.features.isfinite().all()
    assert batch.features.abs().max() <= 1.5
    assert (batch.features.std(0) > 0).all()
