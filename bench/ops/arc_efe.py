"""One puzzle, as the drop-in for ARC-EFE projects takes it."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.ops.arc_efe_definition import definition
from bench.ops.entry import Case, Inputs, Op, Peer, size_of, valid_cells
from efe_kernels.arc_efe import EFELoss

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


def loop(case: Case, inputs: Inputs) -> tuple[Tensor]:
    forward, backward, observation, final, prompt, mask, module, target = inputs.values()
    with forward.device:  # where the definition makes its own tensors
        plan = (forward, backward, observation, final)
        return (definition(module, *plan, target, case.sizes[0], prompt, mask)["total"],)


def reads(inputs: Inputs) -> tuple[int, int]:
    floating = size_of(inputs, *PLAN, "prompt", "mask")
    return floating, floating


OP = Op(
    name="arc_efe",
    inputs=inputs_of,
    kernel=kernel,
    reference=loop,
    peers={"loop over cells": Peer(loop, passes=("both",))},
    reads=reads,
    headline=(Case("arc_efe", "seed", (5, 30, 30, 10), opponents=("loop over cells",)),),
    cases=(Case("arc_efe", "ragged", (5, 30, 30, 10), opponents=("loop over cells",)),),
    small=lambda sizes: (3, 5, 7, 10),
)
