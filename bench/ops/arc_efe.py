"""One puzzle, as the drop-in for ARC-EFE projects takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.ops.arc_efe_definition import all_at_once, cell_by_cell, definition
from bench.ops.entry import COMPILED, EAGER, Case, Inputs, Op, Peer, Run, Variant, empties, plain, size_of, valid_cells
from efe_kernels.arc_efe import EFELoss
from efe_kernels.common.library import triton_module

kernels: Any = triton_module("efe_kernels.arc_efe.kernels")
LOOP = "loop over cells"

PLAN = ("forward", "backward", "observation", "final")


def inputs_of(case: Case) -> Inputs:
    steps, height, width, outcomes = case.sizes
    shape = (steps, height, width, outcomes)
    module = EFELoss()
    module.prompt_preference_mapper.requires_grad_(False)  # the loss does not use it
    module.ensure_preference(height, width)
    target = torch.randint(outcomes, (height, width))
    module.update_target_preference([target], [(height, width)], 0.5)
    plan = {
        "forward": 2 * torch.randn(shape),
        "backward": 2 * torch.randn(shape),
        "observation": torch.randn(shape).softmax(-1),
        "final": torch.randn(shape[1:]),
    }
    inputs: Inputs = {name: value.requires_grad_() for name, value in plan.items()}
    inputs["prompt"] = torch.randn(256).requires_grad_()
    inputs["mask"] = valid_cells(case.workload, 1, height, width)[0].float() if case.workload == "ragged" else None
    return inputs | {"module": module, "target": target}


def kernel(case: Case, inputs: Inputs) -> tuple[Tensor]:
    forward, backward, observation, final, prompt, mask, module, target = inputs.values()
    plan = (forward, backward, forward, observation, final)
    return (module(*plan, target, case.sizes[0], prompt, mask)["total"],)


def defined(movement: Callable[[Tensor], Tensor]) -> Run:
    def run(case: Case, inputs: Inputs) -> tuple[Tensor]:
        forward, backward, observation, final, prompt, mask, module, target = inputs.values()
        plan = (forward, backward, observation, final)
        return (definition(module, *plan, target, case.sizes[0], prompt, mask, movement)["total"],)

    return run


def launch(begin: Callable[[str], None]) -> None:
    """All gradients, with a mask and without."""
    steps, height, width, outcomes = 5, 30, 30, 10
    for name, mask in ((None, None), ("forward of masked cells", torch.ones(height, width))):
        if name is not None:
            begin(name)
        plans = empties(4, steps, height, width, outcomes)
        preference = torch.empty(outcomes, height, width)
        found = kernels.arc_efe_forward(*plans, preference, mask)
        begin("backward" if name is None else "backward of masked cells")
        upstream = (found.risk, found.bidirectional, found.ambiguity, found.reversal, found.mean_logits)
        kernels.arc_efe_backward(*upstream, [True] * 5, *plans, preference, mask, found.turned)


def reads(inputs: Inputs) -> tuple[int, int]:
    floating = size_of(inputs, *PLAN, "prompt", "mask")
    return floating, floating


OP = Op(
    name="arc_efe",
    inputs=inputs_of,
    kernel=kernel,
    reference=defined(cell_by_cell),
    peers=plain(defined(all_at_once)) | {LOOP: Peer(defined(cell_by_cell), passes=("both",))},
    reads=reads,
    headline=(Case("arc_efe", "seed", (5, 30, 30, 10), opponents=(*COMPILED, LOOP)),),
    cases=(Case("arc_efe", "ragged", (5, 30, 30, 10), opponents=(*EAGER, LOOP)),),
    small=lambda sizes: (3, 5, 7, 10),
    triton=True,
    variants={"arc_efe": Variant((5, 30, 30, 10), launch)},
)
