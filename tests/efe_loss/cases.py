"""Inputs of the EFE loss for tests: every optional argument can be present or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efe_kernels import EFELossOutput, EFEWeights, efe_loss

# Every term weighs in, so that no gradient is hidden by a weight of 0.
WEIGHTS = EFEWeights(ambiguity=0.7)


@dataclass(frozen=True)
class Case:
    batch: int = 2
    steps: int = 5
    height: int = 4
    width: int = 5
    outcomes: int = 10
    prompt_dim: int = 16
    layout: str = "channel-first"
    backward: bool = False
    final: bool = False
    observation: bool = False
    prompt: bool = True
    projection: bool = True
    anchor: bool = True
    valid: bool = True
    preference_per_episode: bool = False
    seed: int = 1

    def plan(self, generator: torch.Generator) -> Tensor:
        """Logits [B, T, H, W, C] in the memory order of the layout."""
        b, t, h, w, c = self.batch, self.steps, self.height, self.width, self.outcomes
        if self.layout == "channel-first":
            return torch.randn(b, t, c, h, w, generator=generator).movedim(2, -1)
        if self.layout == "channel-last":
            return torch.randn(b, t, h, w, c, generator=generator)
        # Rows that do not follow each other and outcomes two elements apart.
        return torch.randn(b, t, h, w + 3, c, 2, generator=generator)[:, :, :, 1 : w + 1, :, 1]

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
        """Keyword arguments of `efe_loss`; floating-point ones are leaves that require a gradient."""
        generator = torch.Generator().manual_seed(self.seed)
        grid = (self.height, self.width, self.outcomes)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        found: dict[str, Any] = {"logits": self.plan(generator).to(dtype)}
        # Larger than the grid, so that the top-left part is read.
        larger = (self.height + 2, self.width + 1, self.outcomes)
        shape = (self.batch, *larger) if self.preference_per_episode else larger
        found["preference_logits"] = randn(*shape)
        if self.backward:
            found["backward_logits"] = self.plan(generator).to(dtype)
        if self.final:
            found["final_logits"] = randn(self.batch, *grid).to(dtype)
        if self.observation:
            found["observation_probs"] = torch.softmax(self.plan(generator), -1).to(dtype)
        if self.prompt:
            found["prompt"] = randn(self.batch, self.prompt_dim)
            if self.projection:
                found["projection"] = randn(self.outcomes, self.prompt_dim)
        if dtype == torch.float64:
            found = {name: tensor.double() for name, tensor in found.items()}
        found = {name: tensor.to(device).detach().requires_grad_() for name, tensor in found.items()}
        if self.anchor:
            anchor = torch.rand(*grid, generator=generator)
            anchor[0, 0] = 0  # a cell that has not been set
            anchor[..., -1] = 0  # an outcome that was never seen
            found["target_preference"] = anchor.to(device)
        if self.valid:
            found["valid"] = (torch.rand(self.batch, *grid[:2], generator=generator) > 0.3).to(device)
        target = torch.randint(0, self.outcomes, (self.batch, *grid[:2]), generator=generator)
        target[0, 0, 0] = -100
        found["target"] = target.to(device)
        return found


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs as float64 leaves on the CPU, where the reference serves them."""
    found = {}
    for name, value in inputs.items():
        copy = value.detach().cpu()
        if value.requires_grad:
            copy = copy.double().requires_grad_()
        found[name] = copy
    return found


def run(inputs: dict[str, Any], *, use_terms: bool = False, **settings: Any) -> tuple[EFELossOutput, dict[str, Tensor]]:
    """The loss per episode and the gradients for an upstream gradient that differs from episode to episode."""
    output = efe_loss(**inputs, **{"weights": WEIGHTS, "reduction": "none", **settings})
    upstream = torch.linspace(0.5, 2.0, output.total.shape[0], dtype=output.total.dtype, device=output.total.device)
    objective = (output.total * upstream).sum()
    if use_terms:
        objective = objective + sum(k * (term * upstream.flip(0)).sum() for k, term in enumerate(output.terms.values()))
    leaves = {name: value for name, value in inputs.items() if value.requires_grad}
    return output, dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))
