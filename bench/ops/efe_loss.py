"""The EFE loss: all its terms as `EFELoss` uses them, those of a plan alone, or a single one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import efe_kernels
from bench import baselines
from bench import plain as by_hand
from bench.ops.entry import (
    COMPILED,
    DTYPES,
    EAGER,
    REFERENCE,
    Case,
    Example,
    Inputs,
    Op,
    Peer,
    Variant,
    everything_twice,
    laid_out,
    plain,
    valid_cells,
)
from efe_kernels import EFEWeights
from efe_kernels.common.library import triton_module
from efe_kernels.efe_loss import reference as efe_reference

launchers: Any = triton_module("efe_kernels.efe_loss.launch")
FIRST, LAST = "channel-first", "channel-last"
GRIDS = ("prompt", "projection", "target_preference")


@dataclass(frozen=True)
class Terms:
    """Which terms of the loss a case has.

    optional: the optional inputs that are there. learned: gradients go to all inputs, else to the logits only.
    awkward: a prompt whose width no tile divides, a preference larger than the grid, cells without a target and
        without a target preference.
    """

    weights: EFEWeights
    optional: tuple[str, ...] = ("valid",)
    learned: bool = False
    hard_cell: bool = True
    reduction: str = "mean"
    awkward: bool = False


# Every term weighs in, so that no gradient is hidden by a weight of 0.
EVERY = EFEWeights(ambiguity=0.7)
PLANS = ("backward_logits", "final_logits", "observation_probs")
TERMS = {
    "all": Terms(EFEWeights(), ("valid", *GRIDS), learned=True),
    "core": Terms(EFEWeights(anchor=0, prompt=0, step=0)),
    # Single ones, for the opponents that know only that.
    "risk": Terms(EFEWeights(consistency=0, agreement=0, anchor=0, prompt=0, step=0), (), hard_cell=False),
    "agreement": Terms(
        EFEWeights(risk=0, consistency=0, agreement=1, anchor=0, prompt=0, step=0), PLANS[:1], hard_cell=False
    ),
    "consistency": Terms(
        EFEWeights(risk=0, consistency=1, agreement=0, anchor=0, prompt=0, step=0), (), hard_cell=False
    ),
    "per episode": Terms(EVERY, ("valid", *GRIDS), learned=True, reduction="none", awkward=True),
    "every input": Terms(EVERY, ("valid", *GRIDS, *PLANS), learned=True, reduction="none", awkward=True),
    "no direction": Terms(EVERY, ("valid", "prompt", "target_preference"), learned=True, awkward=True),
}


def inputs_of(case: Case) -> Inputs:
    batch, steps, height, width, outcomes = case.sizes
    terms, dtype = TERMS[case.terms], DTYPES[case.dtype]
    grid = (height, width, outcomes)
    covered, prompt_dim = ((height + 2, width + 1, outcomes), 100) if terms.awkward else (grid, 256)

    def random_plan() -> Tensor:
        return laid_out(case.layout, batch, steps, *grid).to(dtype)

    inputs: Inputs = {
        "logits": random_plan(),
        "target": torch.randint(0, outcomes, (batch, height, width)),
        "preference_logits": torch.randn(covered),
    }
    made: dict[str, Callable[[], Tensor]] = {
        "valid": lambda: valid_cells(case.workload, batch, height, width),
        "backward_logits": random_plan,
        "final_logits": lambda: torch.randn(batch, *grid).to(dtype),
        "observation_probs": lambda: random_plan().softmax(-1),
        "prompt": lambda: torch.randn(batch, prompt_dim),
        "projection": lambda: torch.randn(outcomes, prompt_dim),
        "target_preference": lambda: torch.rand(grid),
    }
    inputs |= {name: make() if name in terms.optional else None for name, make in made.items()}
    if terms.awkward:
        inputs["target"][0, 0, 0] = -100
        inputs["target_preference"][0, 0] = 0  # a cell that has not been set
        inputs["target_preference"][..., -1] = 0  # an outcome that was never seen
    for name in efe_reference.Inputs._fields[: efe_reference.DIFFERENTIABLE] if terms.learned else ("logits",):
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    return inputs


def kernel(case: Case, inputs: Inputs) -> tuple[Tensor]:
    terms = TERMS[case.terms]
    settings: dict[str, Any] = {"hard_cell": terms.hard_cell, "reduction": terms.reduction}
    return (efe_kernels.efe_loss(**inputs, weights=terms.weights, **settings).total,)


def reference(case: Case, inputs: Inputs) -> tuple[Tensor]:
    terms = TERMS[case.terms]
    weights = [getattr(terms.weights, name) for name in efe_reference.TERMS]
    settings = efe_reference.Settings(weights, terms.hard_cell, 0.0, 900, -100, terms.reduction)
    height, width = case.sizes[2:4]
    covered = inputs["preference_logits"][:height, :width]
    total, *_ = efe_reference.efe_loss(efe_reference.Inputs(**{**inputs, "preference_logits": covered}), settings)
    return (total,)


def written_for_speed(case: Case, inputs: Inputs) -> tuple[Tensor]:
    terms = TERMS[case.terms]
    return by_hand.efe_loss(inputs, terms.weights, terms.hard_cell)


def padded_tile(case: Case, inputs: Inputs) -> tuple[Tensor]:
    from bench.triton_baselines import padded_tile_loss

    return padded_tile_loss(inputs, TERMS[case.terms].weights)


def liger(case: Case, inputs: Inputs) -> tuple[Tensor]:
    if case.terms == "consistency":
        return baselines.liger_cross_entropy(inputs)
    return baselines.liger_divergence(inputs, {"risk": 1.0, "agreement": 0.5}[case.terms])


def plan(batch: int) -> tuple[int, ...]:
    return batch, 5, 30, 30, 10


def empty_plan(dtype: torch.dtype, layout: str) -> Tensor:
    if layout == FIRST:
        return torch.empty(4096, 5, 10, 30, 30, dtype=dtype).movedim(2, -1)
    return torch.empty(4096, 5, 30, 30, 10, dtype=dtype)


def launch(
    dtype: torch.dtype, layout: str, prompt_dim: int, separate: bool, everything: bool, begin: Callable[[str], None],
) -> None:  # fmt: skip
    """prompt_dim 0: without a prompt."""
    logits = empty_plan(dtype, layout)
    batch, _, height, width, outcomes = logits.shape

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    inputs = efe_reference.Inputs(
        logits,
        empty_plan(dtype, layout) if separate else None,
        logits[:, -1] if everything else None,
        empty_plan(dtype, layout) if everything else None,
        new(height, width, outcomes),
        new(batch, prompt_dim) if prompt_dim else None,
        new(outcomes, prompt_dim) if prompt_dim else None,
        new(batch, height, width, dtype=torch.int64),
        new(height, width, outcomes) if prompt_dim else None,
        new(batch, height, width, dtype=torch.bool),
    )
    settings = efe_reference.Settings([1.0, 0.0, 2.0, 0.5, 0.2, 0.3, 0.1], True, 0.0, 900, -100, "mean")
    needs = [tensor is not None for tensor in inputs[: efe_reference.DIFFERENTIABLE]]
    grad = new()
    outputs = launchers.efe_loss_forward(inputs, settings)
    begin("backward")
    launchers.efe_loss_backward(grad, None, inputs, settings, *outputs[-2:], needs)


def variant(
    dtype: torch.dtype,
    layout: str,
    prompt_dim: int = 0,
    separate: bool = False,
    everything: bool = False,
) -> Variant:
    return Variant(plan(4096), partial(launch, dtype, layout, prompt_dim, separate, everything))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
VARIANTS = {
    "efe_loss bf16 channel-first": variant(BF16, FIRST),
    "efe_loss bf16 channel-first prompt": variant(BF16, FIRST, 256),
    "efe_loss bf16 channel-last": variant(BF16, LAST),
    "efe_loss bf16 channel-last prompt": variant(BF16, LAST, 256),
    "efe_loss fp32 channel-first prompt": variant(FP32, FIRST, 256),
    "efe_loss fp32 channel-last prompt": variant(FP32, LAST, 256),
    "efe_loss fp16 channel-first two plans": variant(FP16, FIRST, 256, separate=True),
    "efe_loss fp32 channel-first everything": variant(FP32, FIRST, 256, separate=True, everything=True),
}


def walk_trips(launch: Any) -> tuple[int, ...]:
    return (launch.constant("PAIRS") - launch.constant("ALONE") - 2,)


def backward_trips(launch: Any) -> tuple[int, ...]:
    probabilities = launch.arguments["gradients"].observation_probs
    return *walk_trips(launch), launch.constant("T") if probabilities else 1, launch.constant("EPISODES")


def episode_trips(launch: Any) -> tuple[int, ...]:
    at = launch.constant
    tiles = -(-at("TILES") // at("TILE_BLOCK"))
    return (tiles, -(-at("D") // at("D_BLOCK")), tiles, at("T")) if launch.arguments["projection"] else (tiles,)


HEADLINE = (
    Case("efe_loss", "train", plan(64), layout=FIRST, terms="all", opponents=(*COMPILED, REFERENCE)),
    Case("efe_loss", "train", plan(64), layout=FIRST, terms="core", opponents=(*COMPILED, REFERENCE, "padded tile")),
    Case("efe_loss", "throughput", plan(4096), "bf16", FIRST, "core", (*COMPILED, "padded tile"), True),
    Case("efe_loss", "throughput", plan(4096), "bf16", FIRST, "all", COMPILED, True),
    Case("efe_loss", "throughput", plan(4096), "bf16", LAST, "core", ("padded tile",), True),
)
# In every dtype and layout, term by term against Liger-Kernel, and over B.
CASES = (
    Case("efe_loss", "seed", plan(1), layout=FIRST, terms="all", opponents=COMPILED),
    Case("efe_loss", "ragged", (33, 5, 29, 23, 10), layout=FIRST, terms="all"),
    Case("efe_loss", "train", plan(64), layout=LAST, terms="all"),
    Case("efe_loss", "train", plan(64), "bf16", FIRST, "all"),
    Case("efe_loss", "train", plan(64), "fp16", FIRST, "all"),
    *(Case("efe_loss", "train", plan(64), layout=LAST, terms=term, opponents=("eager", "Liger"))
      for term in ("risk", "agreement", "consistency")),
    *(Case("efe_loss", "throughput", plan(4096), dtype, layout, "all", (), True)
      for dtype in DTYPES for layout in (FIRST, LAST) if (dtype, layout) != ("bf16", FIRST)),
    *(Case("efe_loss", "sweep", plan(batch), "bf16", FIRST, "all", EAGER, True) for batch in (4, 16, 256, 1024)),
)  # fmt: skip


def example(terms: str) -> Example:
    return Example(Case("efe_loss", "scattered", (2, 5, 13, 11, 10), layout=FIRST, terms=terms))


OP = Op(
    name="efe_loss",
    inputs=inputs_of,
    kernel=kernel,
    reference=reference,
    peers={
        **plain(written_for_speed, reference),
        "padded tile": Peer(padded_tile, gpu=True, triton=True),
        "Liger": Peer(liger, gpu=True, module="liger_kernel"),
    },
    reads=everything_twice,
    headline=HEADLINE,
    cases=CASES,
    examples=tuple(map(example, ("per episode", "every input", "no direction"))),
    small=lambda sizes: (2, 3, 5, 7, 10),
    triton=True,
    variants=VARIANTS,
    loops={
        "efe_loss_forward_kernel": walk_trips,
        "efe_loss_backward_kernel": backward_trips,
        "efe_loss_episode_kernel": episode_trips,
    },
    host=(Case("efe_loss", "seed", plan(1), layout=FIRST, terms="core"),),
)
