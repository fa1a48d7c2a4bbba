from __future__ import annotations

import torch

from efe_train.standardise import LEAST_VARIANCE, Standardise


def test_the_first_queries_are_standardised_by_themselves() -> None:
    standardise = Standardise(3)
    features = torch.randn(40, 3) * torch.tensor([0.01, 1.0, 5.0]) + torch.tensor([7.0, 0.0, -3.0])
    found = standardise(features)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    # The first feature's variance of 1e-4 is raised to one that does not blow up what never varies.
    raised = (1 + LEAST_VARIANCE / 1e-4) ** -0.5
    torch.testing.assert_close(found.std(0), torch.tensor([raised, 1.0, 1.0]), rtol=0, atol=0.03)


def test_the_statistics_follow_the_queries_slowly() -> None:
    standardise = Standardise(1, momentum=0.25)
    first, second = torch.tensor([[1.0], [3.0]]), torch.tensor([[9.0], [17.0]])
    standardise(first)
    assert (standardise.mean.item(), standardise.variance.item()) == (2, 2)
    found = standardise(second)
    assert (standardise.mean.item(), standardise.variance.item()) == (0.75 * 2 + 0.25 * 13, 0.75 * 2 + 0.25 * 32)
    torch.testing.assert_close(found, (second - 4.75) / (9.5 + LEAST_VARIANCE) ** 0.5)


def test_a_query_alone_and_evaluation_leave_the_statistics_as_they_are() -> None:
    standardise = Standardise(2)
    features = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert torch.equal(standardise(features[:1]), features[:1] * torch.tensor(1 + LEAST_VARIANCE).rsqrt())
    expected = standardise(features)
    state = {name: tensor.clone() for name, tensor in standardise.state_dict().items()}
    assert torch.equal(standardise(features[:1]), expected[:1])
    standardise.eval()
    assert torch.equal(standardise(features), expected)
    standardise(features + 100)
    assert all(torch.equal(tensor, state[name]) for name, tensor in standardise.state_dict().items())
