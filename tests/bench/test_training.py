from __future__ import annotations

from bench.training import make


def test_what_is_timed_is_a_step_that_trains() -> None:
    trainer, share = make(batch_size=4, device="cpu", precision="fp32", side=5)
    assert [part.batch.valid.shape for part in share.parts] == [(4, 5, 5)]
    metrics = trainer.step(share, 0)
    assert trainer.batches_done == 1
    assert metrics["grad_norm"].isfinite() and metrics["grad_norm"] > 0
