"""The ARC-EFE drop-in against a loop over cells, forward and backward of one puzzle [5, 30, 30, 10] in float32.

OMP_NUM_THREADS=2 python -m pytest bench/test_arc_efe.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efe_kernels.arc_efe import EFELoss
from tests.arc_efe.definition import definition

STEPS, SIDE, COLORS = 5, 30, 10


class Puzzle:
    def __init__(self, masked: bool) -> None:
        torch.manual_seed(0)
        shape = (STEPS, SIDE, SIDE, COLORS)
        self.forward, self.backward, self.state = (2 * torch.randn(shape) for _ in range(3))
        self.observation = torch.randn(shape).softmax(-1)
        self.final = torch.randn(shape[1:])
        self.prompt = torch.randn(256)
        self.leaves = [self.forward, self.backward, self.observation, self.final, self.prompt]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.target = torch.randint(COLORS, (SIDE, SIDE))
        self.mask = (torch.rand(SIDE, SIDE) < 0.8).float() if masked else None
        self.module = EFELoss()
        self.module.ensure_preference(SIDE, SIDE)
        self.module.update_target_preference([self.target], [(SIDE, SIDE)], 0.5)

    def module_total(self) -> Tensor:
        plan = (self.forward, self.backward, self.state, self.observation, self.final)
        return self.module(*plan, self.target, STEPS, self.prompt, self.mask)["total"]

    def loop_total(self) -> Tensor:
        plan = (self.forward, self.backward, self.observation, self.final)
        return definition(self.module, *plan, self.target, STEPS, self.prompt, self.mask)["total"]

    def step(self, total: Callable[[], Tensor]) -> list[Tensor]:
        """The total and all gradients."""
        loss = total()
        return [loss.detach(), *torch.autograd.grad(loss, [*self.leaves, *self.module.parameters()])]


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("implementation", ["module", "loop"])
def test_arc_efe(benchmark: Any, implementation: str, masked: bool) -> None:
    puzzle = Puzzle(masked)
    for found, expected in zip(puzzle.step(puzzle.module_total), puzzle.step(puzzle.loop_total), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    total = puzzle.module_total if implementation == "module" else puzzle.loop_total
    benchmark.group = f"ARC-EFE [5, 30, 30, 10] forward + backward, {'mask' if masked else 'no mask'}"
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(puzzle.step, args=(total,), rounds=50 if implementation == "module" else 5, warmup_rounds=3)
