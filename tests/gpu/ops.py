"""Every differentiable op as a function of CUDA inputs, for tests that treat all ops alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import efe_kernels
from tests.efe_loss.cases import WEIGHTS, Case

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """make: inputs on a device, those that get a gradient require it. run: the results."""

    make: Callable[[str], Inputs]
    run: Callable[..., tuple[Tensor, ...]]


def leaf(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device).requires_grad_()


def trajectories(device: str) -> Inputs:
    shape = (37, 70)
    return {
        "reward": torch.randn(shape, device=device),
        "value": leaf(*shape, device=device),
        "next_value": leaf(*shape, device=device),
        "terminated": torch.rand(shape, device=device) < 0.1,
        "truncated": torch.rand(shape, device=device) < 0.1,
    }


def policy_loss_inputs(device: str) -> Inputs:
    names = ("log_prob", "value", "entropy")
    constants = ("advantage", "value_target", "old_log_prob")
    found = {name: leaf(5000, device=device) for name in names}
    return found | {name: torch.randn(5000, device=device) for name in constants}


def reward_inputs(device: str) -> Inputs:
    return {
        "before": torch.randn(5, 7, 9, 10, device=device),
        "after": torch.randn(5, 7, 9, 10, device=device),
        "target": torch.randint(0, 10, (5, 7, 9), device=device),
        "valid": torch.rand(5, 7, 9, device=device) < 0.8,
    }


def refinement_inputs(device: str) -> Inputs:
    return {
        "prompt": leaf(33, 100, device=device),
        "mean": leaf(33, 101, device=device),
        "log_std": leaf(33, 101, device=device),
        "noise": torch.randn(33, 101, device=device),
    }


def pool_inputs(device: str) -> Inputs:
    return {"hidden": leaf(7, 65, 130, device=device), "mask": torch.rand(7, 65, device=device) < 0.6}


def plan_inputs(device: str, **present: Any) -> Inputs:
    """Other values at every call, unlike those of the case."""
    inputs = Case(height=13, width=11, **present).inputs(device=device)
    with torch.no_grad():
        inputs["logits"].add_(torch.randn_like(inputs["logits"]))
    return inputs


def plan_loss(**inputs: Any) -> tuple[Tensor, ...]:
    return (efe_kernels.efe_loss(**inputs, weights=WEIGHTS, reduction="none").total,)


def promised_loss(scale: float) -> Callable[..., tuple[Tensor, ...]]:
    """The mean loss with a promised upstream gradient. The one that `upstream_of` hands a scalar is 0.5."""

    def run(**inputs: Any) -> tuple[Tensor, ...]:
        promise = torch.full((), scale, device=inputs["logits"].device)
        return (efe_kernels.efe_loss(**inputs, weights=WEIGHTS, grad_scale=promise).total,)

    return run


OPS = {
    "efe_loss": Op(plan_inputs, plan_loss),
    "efe_loss, everything": Op(
        lambda device: plan_inputs(device, backward=True, final=True, observation=True), plan_loss
    ),
    "efe_loss, promise kept": Op(lambda device: plan_inputs(device, projection=False), promised_loss(0.5)),
    "efe_loss, promise broken": Op(lambda device: plan_inputs(device, projection=False), promised_loss(3.0)),
    "grid_reward": Op(reward_inputs, lambda **inputs: (efe_kernels.grid_reward(**inputs).reward,)),
    "rl_advantage": Op(
        lambda device: {"reward": torch.randn(96, device=device), "value": leaf(96, device=device)},
        lambda **inputs: (efe_kernels.rl_advantage(**inputs, whiten=True, group_size=8),),
    ),
    "gae": Op(trajectories, lambda **inputs: efe_kernels.gae(**inputs)),
    "vtrace": Op(
        lambda device: trajectories(device) | {"log_ratio": torch.randn(37, 70, device=device)},
        lambda **inputs: efe_kernels.vtrace(**inputs),
    ),
    "policy_gradient_loss": Op(
        policy_loss_inputs, lambda **inputs: (efe_kernels.policy_gradient_loss(**inputs).total,)
    ),
    "masked_mean_pool": Op(pool_inputs, lambda **inputs: (efe_kernels.masked_mean_pool(**inputs),)),
    "refine_prompt": Op(refinement_inputs, lambda **inputs: tuple(efe_kernels.refine_prompt(**inputs))),
    "squashed_log_prob": Op(
        lambda device: {name: leaf(33, 101, device=device) for name in ("action", "mean", "log_std")},
        lambda **inputs: efe_kernels.squashed_log_prob(**inputs),
    ),
}


def leaves_of(inputs: Inputs) -> list[Tensor]:
    return [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]


def upstream_of(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        torch.linspace(0.5, 2.0, result.numel(), device=result.device).to(result.dtype).view(result.shape)
        for result in results
    ]


def step(op: Op, inputs: Inputs, upstream: list[Tensor] | None = None) -> list[Tensor]:
    """Results and gradients."""
    results = op.run(**inputs)
    leaves = leaves_of(inputs)
    upstream = upstream_of(results) if upstream is None else upstream
    gradients = torch.autograd.grad(results, leaves, upstream) if leaves else ()
    return [*(result.detach() for result in results), *gradients]


def in_double(inputs: Inputs) -> Inputs:
    """The same inputs as float64 leaves on the CPU."""
    found = {}
    for name, value in inputs.items():
        copy = value.detach().cpu() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor) and value.is_floating_point():
            copy = copy.double().requires_grad_(value.requires_grad)
        found[name] = copy
    return found
