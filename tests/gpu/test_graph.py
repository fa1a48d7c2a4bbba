"""A training step recorded as a CUDA graph trains as the step itself does."""

from __future__ import annotations

import torch

from tests.examples.test_examples import example


def test_a_replayed_step_leaves_the_weights_that_the_step_leaves() -> None:
    module = example("cuda_graph")
    torch.manual_seed(0)
    batches = [module.new_inputs(module.BATCH, torch.device("cuda")) for _ in range(5)]
    torch.manual_seed(1)
    plain = module.Trainer(batches[0])
    torch.manual_seed(1)
    recorded = module.Trainer(module.Inputs(*(value.clone() for value in batches[0])))
    for _ in range(module.WARM_UP):
        plain.step()
    replay = module.recorded(recorded.step)
    for batch in batches[1:]:
        plain.load(batch)
        recorded.load(batch)
        expected, found = plain.step(), replay()
        # cuBLAS may choose other kernels under capture: a rounding of each of a few hundred addends.
        torch.testing.assert_close(found.loss, expected.loss, rtol=2**-24 * 1024, atol=0)
    for one, other in zip(recorded.learned, plain.learned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
