from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from efe_train.config import NUM_COLORS, PLANNING_STEPS, PROMPT_DIM
from efe_train.data import Example, Observation, collate
from efe_train.lookup import KEPT, STATISTICS
from efe_train.planner import FLOOR, GIST, Planner, Recall
from efe_train.views import OUTSIDE, WATCHED
from tests.efe_train.conftest import stirred


@pytest.fixture
def planner() -> Planner:
    torch.manual_seed(0)
    return stirred(Planner())


@pytest.fixture
def seen(examples: list[Example]) -> Observation:
    return collate([example.query for example in examples]).observation


@pytest.fixture
def prompt(examples: list[Example]) -> Tensor:
    return torch.randn(len(examples), PROMPT_DIM, generator=torch.Generator().manual_seed(0))


def test_the_plan_has_the_memory_order_of_the_fast_path(planner: Planner, seen: Observation, prompt: Tensor) -> None:
    logits = planner(seen, prompt)
    height, width = seen.valid.shape[1:]
    assert logits.shape == (len(prompt), PLANNING_STEPS, height, width, NUM_COLORS)
    assert logits.permute(0, 1, 4, 2, 3).is_contiguous()


def test_the_plan_of_a_grid_does_not_depend_on_the_padding_around_it(
    planner: Planner, seen: Observation, prompt: Tensor, examples: list[Example]
) -> None:
    padded = planner(seen, prompt)
    for row, example in enumerate(examples):
        alone = planner(collate([example.query]).observation, prompt[row : row + 1])[0]
        height, width = example.query.size
        # float32 sums of the same terms and some zeros in another order, through six steps
        torch.testing.assert_close(padded[row, :, :height, :width], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, PLANNING_STEPS, 2 * PLANNING_STEPS])
def test_an_untrained_plan_is_what_the_look_up_says_after_any_number_of_steps(
    steps: int, seen: Observation, prompt: Tensor
) -> None:
    untrained = balanced(0.0, 0.0, 0.0)
    logits = untrained(seen, prompt, steps)
    first = (Recall()(seen, torch.zeros(len(prompt), GIST)) + FLOOR).log().movedim(1, -1)
    assert logits.shape[1] == steps
    torch.testing.assert_close(logits, first[:, None].expand_as(logits))


def balanced(*weights: float) -> Planner:
    """An untrained planner to which every prompt says how to weigh first draft, corrections and input."""
    planner = Planner()
    with torch.no_grad():
        planner.balance.weight.zero_()
        planner.balance.bias.copy_(torch.tensor(weights))
    return planner


def test_a_prompt_weighs_the_look_up_the_corrections_and_the_input(seen: Observation, prompt: Tensor) -> None:
    plain = balanced(0.0, 0.0, 0.0)(seen, prompt)[:, -1]
    surer = balanced(math.log(3), 0.0, 0.0)(seen, prompt)[:, -1]
    torch.testing.assert_close(surer, 3 * plain)
    kept = balanced(0.0, 0.0, 100.0)(seen, prompt)[:, -1].argmax(-1)
    assert torch.equal(kept[seen.valid], seen.views[:, 0][seen.valid])
    assert not torch.equal(plain.argmax(-1)[seen.valid], seen.views[:, 0][seen.valid])
    bold = balanced(0.0, math.log(3), 0.0)
    with torch.no_grad():
        bold.head.bias[4] = 2.0
    torch.testing.assert_close((bold(seen, prompt)[:, -1] - plain)[..., 4], torch.full(plain.shape[:-1], 6.0))


def test_a_plan_goes_on_for_more_steps_than_it_was_trained_with(
    planner: Planner, seen: Observation, prompt: Tensor
) -> None:
    usual, longer = planner(seen, prompt), planner(seen, prompt, 2 * PLANNING_STEPS)
    assert torch.equal(longer[:, :PLANNING_STEPS], usual)
    assert longer.isfinite().all()
    drafts = longer.unbind(1)
    assert all(not torch.equal(one, other) for one, other in pairwise(drafts))


def test_prompt_and_input_steer_every_step(planner: Planner, seen: Observation, prompt: Tensor) -> None:
    prompt.requires_grad_()
    logits = planner(seen, prompt)
    for step in range(PLANNING_STEPS):
        (gradient,) = torch.autograd.grad(logits[:, step].square().sum(), prompt, retain_graph=True)
        assert gradient.norm() > 0
    logits.square().sum().backward()
    silent = [name for name, each in planner.named_parameters() if each.grad is None or each.grad.norm() == 0]
    assert silent == []
    recoloured = seen.views.clone()
    recoloured[..., 0, 0] = (recoloured[..., 0, 0] + 1) % NUM_COLORS
    assert not torch.equal(planner(seen._replace(views=recoloured), prompt), logits)


def test_without_the_look_up_the_demonstrations_make_no_difference(seen: Observation, prompt: Tensor) -> None:
    torch.manual_seed(0)
    planner = stirred(Planner(look_up=False))
    silent = seen._replace(counts=torch.zeros_like(seen.counts), statistics=torch.zeros_like(seen.statistics))
    assert seen.counts.any()
    assert torch.equal(planner(seen, prompt), planner(silent, prompt))
    # Untrained, it copies.
    copies = Planner(look_up=False)(seen, prompt)[:, -1].argmax(-1)
    assert torch.equal(copies[seen.valid], seen.views[:, 0][seen.valid])


def one_cell(colour: int, tables: dict[int, tuple[int, list[float]]]) -> Observation:
    """A query of one cell. tables: for each place in the look-up, the colour that it names and its statistics."""
    counts, statistics = torch.zeros(1, KEPT, NUM_COLORS, 1, 1), torch.zeros(1, KEPT, STATISTICS)
    for place, (named, figures) in tables.items():
        counts[0, place, named] = 5
        statistics[0, place] = torch.tensor(figures)
    views = torch.full((1, len(WATCHED), 1, 1), OUTSIDE)
    views[:, 0] = colour
    valid, numbers = torch.ones(1, 1, 1, dtype=torch.bool), torch.zeros(1, KEPT, dtype=torch.long)
    return Observation(valid, views, counts, numbers, statistics)


RELIABLE = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
DOUBTFUL = [0.8, 0.3, 0.2, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(("tables", "colour"), [
    ({0: (3, RELIABLE), 1: (7, DOUBTFUL)}, 3),
    ({0: (3, DOUBTFUL), 1: (7, RELIABLE)}, 7),
    # Two tables that are wrong together do not outvote one that is right.
    ({0: (3, DOUBTFUL), 1: (3, DOUBTFUL), 2: (7, RELIABLE)}, 7),
    ({4: (6, DOUBTFUL)}, 6),
    ({}, 2),
])  # fmt: skip
def test_recall_prefers_the_reliable_table_and_where_none_knows_the_colour_stays(
    tables: dict[int, tuple[int, list[float]]], colour: int
) -> None:
    torch.manual_seed(0)
    probabilities = Recall()(one_cell(2, tables), torch.randn(1, GIST))
    assert probabilities.argmax(1).item() == colour
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-6)
    assert probabilities[0, colour].item() > 0.99


def test_a_pattern_that_was_seen_often_counts_for_more() -> None:
    seen = one_cell(2, {0: (3, DOUBTFUL), 1: (7, DOUBTFUL)})
    seen.counts[0, 0, 3], seen.counts[0, 1, 7] = 1, 200
    probabilities = Recall()(seen, torch.zeros(1, GIST))
    assert probabilities[0, 7] > probabilities[0, 3] > 0.1


def test_training_can_come_to_trust_one_kind_of_table_more_than_its_reliability_says() -> None:
    recall = Recall()
    seen = one_cell(2, {0: (3, RELIABLE), 1: (7, DOUBTFUL)})
    seen.tables[0, 0], seen.tables[0, 1] = 4, 9
    with torch.no_grad():
        recall.table.weight[9] = 2
    assert recall(seen, torch.zeros(1, GIST)).argmax(1).item() == 7
