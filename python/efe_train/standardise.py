"""Features on one scale, by what they are over many queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEAST_VARIANCE = 1e-3
"""Added to the variance of a feature over queries, so that one that hardly varies is not blown up."""


class Standardise(nn.Module):
    """Each feature minus its mean over queries, divided by its deviation.

    The statistics are running ones, of what `observe` has been shown: what a query gives does not depend on its batch.
    """

    mean: Tensor
    variance: Tensor
    started: Tensor

    def __init__(self, width: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, features: Tensor) -> Tensor:
        """[N, E]"""
        return (features - self.mean) * (self.variance + LEAST_VARIANCE).rsqrt()

    @torch.no_grad()
    def observe(self, features: Tensor) -> None:
        """Count the features [N, E] of a batch. A query that comes alone, which has no variance, is not counted."""
        if len(features) < 2:
            return
        features = features.float()
        share = torch.where(self.started, self.momentum, 1.0)
        self.mean.lerp_(features.mean(0), share)
        self.variance.lerp_(features.var(0), share)
        self.started.fill_(True)
