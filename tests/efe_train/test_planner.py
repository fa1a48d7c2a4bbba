from __future__ import annotations

import torch

from efe_train.config import NUM_COLORS, PLANNING_STEPS, PROMPT_DIM
from efe_train.data import Example, collate
from efe_train.planner import Planner


def test_the_plan_has_the_memory_order_of_the_fast_path(examples: list[Example]) -> None:
    batch = collate([example.query for example in examples])
    logits = Planner()(batch.views, batch.valid, torch.randn(len(examples), PROMPT_DIM))
    height, width = batch.valid.shape[1:]
    assert logits.shape == (len(examples), PLANNING_STEPS, height, width, NUM_COLORS)
    assert logits.permute(0, 1, 4, 2, 3).is_contiguous()


def test_the_plan_of_a_grid_does_not_depend_on_the_padding_around_it(examples: list[Example]) -> None:
    planner = Planner().double()
    queries = [example.query for example in examples]
    prompt = torch.randn(len(queries), PROMPT_DIM, dtype=torch.float64)
    together = collate(queries)
    padded = planner(together.views, together.valid, prompt)
    for row, query in enumerate(queries):
        alone = collate([query])
        expected = planner(alone.views, alone.valid, prompt[row : row + 1])[0]
        height, width = query.size
        # float64 convolutions that add the same terms and some zeros in another order
        torch.testing.assert_close(padded[row, :, :height, :width], expected, rtol=0, atol=1e-12)


def test_prompt_and_input_steer_every_step_from_the_start(examples: list[Example]) -> None:
    planner = Planner()
    batch = collate([examples[0].query])
    prompt = torch.randn(1, PROMPT_DIM, requires_grad=True)
    logits = planner(batch.views, batch.valid, prompt)
    for step in range(PLANNING_STEPS):
        (gradient,) = torch.autograd.grad(logits[:, step].square().sum(), prompt, retain_graph=True)
        assert gradient.norm() > 0
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in planner.parameters())
    recoloured = batch.views.clone()
    recoloured[..., 0, 0] = (recoloured[..., 0, 0] + 1) % NUM_COLORS
    assert not torch.equal(planner(recoloured, batch.valid, prompt), logits)
