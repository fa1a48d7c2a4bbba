from __future__ import annotations

import torch

from efe_train.standardise import LEAST_VARIANCE, Standardise


def test_the_first_queries_are_standardised_by_themselves() -> None:
    standardise = Standardise(3)
    features = torch.randn(40, 3) * torch.tensor([0.01, 1.0, 5.0]) + torch.tensor([7.0, 0.0, -3.0])
    standardise.observe(features)
    found = standardise(features)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    # The first feature's variance of 1e-4 is raised to one that does not blow up what never varies.
    raised = (1 + LEAST_VARIANCE / 1e-4) ** -0.5
    torch.testing.assert_close(found.std(0), torch.tensor([raised, 1.0, 1.0]), rtol=0, atol=0.03)


def test_the_statistics_follow_what_is_observed_slowly_and_what_is_asked_does_not_move_them() -> None:
    standardise = Standardise(1, momentum=0.25)
    first, second = torch.tensor([[1.0], [3.0]]), torch.tensor([[9.0], [17.0]])
    standardise.observe(first)
    assert (standardise.mean.item(), standardise.variance.item()) == (2, 2)
    torch.testing.assert_close(standardise(second), (second - 2) / (2 + LEAST_VARIANCE) ** 0.5)
    assert (standardise.mean.item(), standardise.variance.item()) == (2, 2)
    standardise.observe(second)
    assert (standardise.mean.item(), standardise.variance.item()) == (0.75 * 2 + 0.25 * 13, 0.75 * 2 + 0.25 * 32)


def test_a_query_alone_says_nothing_of_a_scale() -> None:
    standardise = Standardise(2)
    alone = torch.tensor([[1.0, 2.0]])
    standardise.observe(alone)
    assert torch.equal(standardise(alone), alone * torch.tensor(1 + LEAST_VARIANCE).rsqrt())
