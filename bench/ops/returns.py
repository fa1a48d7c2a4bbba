"""gae and vtrace, two settings of one pair of kernels, and td_lambda."""

from __future__ import annotations

from collections.abc import Callable
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
    FORWARD,
    Case,
    Example,
    Inputs,
    Op,
    Peer,
    Results,
    Sizes,
    Variant,
    empties,
    flags,
    plain,
    size_of,
)
from efe_kernels.common.library import triton_module
from efe_kernels.returns import reference as trace_reference
from efe_kernels.returns.functional import counted
from efe_kernels.returns.reference import Ends, Settings, TDLambdaSettings, Transitions

kernels: Any = triton_module("efe_kernels.returns.kernels")
td_lambda_kernels: Any = triton_module("efe_kernels.returns.td_lambda_kernels")
GAMMA, LAM = 0.99, 0.95
AGAINST_TORCHRL = ("eager", "torchrl")
PER_STEP = "per step"
"""Terms of a case: gamma and lam of each step, and padding."""


def gae_inputs(case: Case) -> Inputs:
    """[B, T], or views of what lies in memory as [T, B]."""
    return ends_and_values(case) | factors(case)


def factors(case: Case) -> Inputs:
    if case.terms != PER_STEP:
        return {}
    batch, steps = case.sizes
    return {
        "gamma": (0.9 + 0.1 * torch.rand(steps)).expand(case.sizes),
        "lam": 0.9 + 0.1 * torch.rand(batch, 1),
        "mask": torch.arange(steps) < torch.randint(1, steps + 1, (batch, 1)),
    }


def ends_and_values(case: Case) -> Inputs:
    return {
        "reward": random(case),
        "value": random(case).requires_grad_(),
        "next_value": random(case).requires_grad_(),
        "terminated": random(case) < -1.6,  # one step in twenty
        "truncated": flags(case, 0.05),
    }


def random(case: Case) -> Tensor:
    sizes = case.sizes[::-1] if case.layout == "time-major" else case.sizes
    stored = torch.randn(sizes, dtype=DTYPES[case.dtype])
    return stored.t() if case.layout == "time-major" else stored


def vtrace_inputs(case: Case) -> Inputs:
    inputs = gae_inputs(case) | {"log_ratio": random(case)}
    with torch.no_grad():
        inputs["log_ratio"].mul_(0.5)
        # torchrl takes the value of the next step where the trace goes on, and next_value only where it stops.
        inputs["next_value"][:, :-1] = inputs["value"][:, 1:]
    return inputs


def gae(_: Case, inputs: Inputs) -> Results:
    return efe_kernels.gae(**{"gamma": GAMMA, "lam": LAM, **inputs})


def vtrace(_: Case, inputs: Inputs) -> Results:
    return efe_kernels.vtrace(**{"gamma": GAMMA, **inputs})


def definition(settings: Settings, _: Case, inputs: Inputs) -> Results:
    truncated, *values, log_ratio, gammas, lams = without_padding(inputs, "log_ratio", "gamma", "lam")
    transitions = Transitions(inputs["terminated"], truncated, log_ratio, gammas, lams)
    return trace_reference.trace_forward(*values, transitions, settings)


def without_padding(inputs: Inputs, *names: str) -> tuple[Any, ...]:
    """truncated, value where there is one, next_value, reward and what is named."""
    values = [name for name in ("value", "next_value", "reward") if name in inputs]
    return counted(inputs.get("mask"), -1, inputs["truncated"], *[inputs.get(name) for name in (*values, *names)])


def row_gae(_: Case, inputs: Inputs) -> Results:
    from bench.triton_baselines import row_gae

    return row_gae(inputs, GAMMA, LAM)


def launch(steps: int, time_major: bool, begin: Callable[[str], None]) -> None:
    """Of both ops."""

    def new(count: int, dtype: torch.dtype) -> list[Tensor]:
        if time_major:
            return [tensor.T for tensor in empties(count, steps, 4096, dtype=dtype)]
        return empties(count, 4096, steps, dtype=dtype)

    terminated, truncated = new(2, torch.bool)
    gae = (Transitions(terminated, None, None), Settings(0.99, 0.95, 1.0, 1.0, 1.0))
    value, next_value, reward, grad = new(4, torch.float32)
    begin("gae forward")
    kernels.trace_forward(value, next_value, reward, *gae)
    begin("gae backward")
    kernels.trace_backward(grad, None, [True, False, False], *gae)
    value, next_value, reward, grad, grad_target, log_ratio = new(6, torch.bfloat16)
    vtrace = (Transitions(terminated, truncated, log_ratio), Settings(0.99, 1.0, 1.0, 1.0, 1.0))
    begin("vtrace forward")
    kernels.trace_forward(value, next_value, reward, *vtrace)
    begin("vtrace backward")
    kernels.trace_backward(grad, grad_target, [True, True, True], *vtrace)


def per_step_launch(steps: int, begin: Callable[[str], None]) -> None:
    """Of both ops, with a gamma of each step and a lam of each environment."""
    terminated, truncated = empties(2, 4096, steps, dtype=torch.bool)
    gammas, lams = torch.empty(steps).expand(4096, steps), torch.empty(4096, 1).expand(4096, steps)
    settings = Settings(1.0, 1.0, 1.0, 1.0, 1.0)
    value, next_value, reward, grad, log_ratio = empties(5, 4096, steps)
    begin("gae forward")
    gae = Transitions(terminated, truncated, None, gammas, lams)
    kernels.trace_forward(value, next_value, reward, gae, settings)
    begin("gae backward")
    kernels.trace_backward(grad, grad, [True, True, True], gae, settings)
    begin("vtrace forward")
    vtrace = Transitions(terminated, truncated, log_ratio, gammas, lams)
    kernels.trace_forward(value, next_value, reward, vtrace, settings)
    begin("vtrace backward")
    kernels.trace_backward(grad, grad, [True, True, True], vtrace, settings)


def variant(steps: int, time_major: bool = False) -> Variant:
    return Variant((4096, steps), partial(launch, steps, time_major))


def few_rows(sizes: Sizes) -> Sizes:
    """The length, which chooses the kernel, stays."""
    return 3, sizes[-1]


def chunk_trips(launch: Any) -> tuple[int, ...]:
    return (launch.constant("CHUNKS"),)


def cases(op: str) -> tuple[Case, ...]:
    return (
        Case(op, "seed", (1, 128), opponents=AGAINST_TORCHRL),
        Case(op, "train", (64, 128), opponents=AGAINST_TORCHRL),
        Case(op, "ragged", (33, 77), opponents=AGAINST_TORCHRL),
        Case(op, "throughput", (4096, 128), layout="time-major"),
        *(Case(op, "train", (64, 128), dtype) for dtype in ("bf16", "fp16")),
    )


GAE = Op(
    name="gae",
    inputs=gae_inputs,
    kernel=gae,
    reference=partial(definition, Settings(GAMMA, LAM, 1.0, 1.0, 1.0)),
    peers={
        **plain(lambda _, inputs: by_hand.gae(inputs, GAMMA, LAM), compiled=FORWARD),
        "torchrl": Peer(lambda _, inputs: baselines.torchrl_gae(inputs, GAMMA, LAM), FORWARD, module="torchrl"),
        "torchrl's loop": Peer(
            lambda _, inputs: baselines.torchrl_gae_loop(inputs, GAMMA, LAM), FORWARD, module="torchrl"
        ),
        "thread per row": Peer(row_gae, FORWARD, gpu=True, triton=True),
    },
    reads=lambda inputs: (size_of(inputs), size_of(inputs, "terminated", "truncated")),
    headline=(
        Case("gae", "throughput", (4096, 128), opponents=(*COMPILED, "torchrl", "torchrl's loop", "thread per row")),
    ),
    cases=cases("gae"),
    examples=(
        Example(Case("gae", "scattered", (37, 70))),
        Example(Case("gae", "scattered", (37, 70), terms=PER_STEP)),
    ),
    small=few_rows,
    triton=True,
    variants={
        "gae and vtrace serial": variant(8),
        "gae and vtrace serial longest": variant(32),
        "gae and vtrace serial time-major": variant(32, time_major=True),
        "gae and vtrace scan shortest": variant(33),
        "gae and vtrace scan": variant(1500),
        "gae and vtrace scan time-major": variant(1500, time_major=True),
        "gae and vtrace serial per step": Variant((4096, 32), partial(per_step_launch, 32)),
        "gae and vtrace scan per step": Variant((4096, 1500), partial(per_step_launch, 1500)),
    },
    loops={"trace_scan_kernel": chunk_trips, "trace_scan_backward_kernel": chunk_trips},
    swept=True,
    trace=True,
)
# Its kernels, and so its variants, are those of gae.
VTRACE = Op(
    name="vtrace",
    inputs=vtrace_inputs,
    kernel=vtrace,
    reference=partial(definition, Settings(GAMMA, 1.0, 1.0, 1.0, 1.0)),
    peers={
        **plain(lambda _, inputs: by_hand.vtrace(inputs, GAMMA), compiled=FORWARD),
        "torchrl": Peer(lambda _, inputs: baselines.torchrl_vtrace(inputs, GAMMA), FORWARD, module="torchrl"),
    },
    reads=lambda inputs: (size_of(inputs), size_of(inputs, "terminated", "truncated", "log_ratio")),
    cases=(Case("vtrace", "throughput", (4096, 128), opponents=(*COMPILED, "torchrl")), *cases("vtrace")),
    examples=(
        Example(Case("vtrace", "scattered", (37, 70))),
        Example(Case("vtrace", "scattered", (37, 70), terms=PER_STEP)),
    ),
    small=few_rows,
    triton=True,
    swept=True,
    trace=True,
)


def td_lambda_inputs(case: Case) -> Inputs:
    inputs = gae_inputs(case)
    del inputs["value"]
    return inputs


def td_lambda(_: Case, inputs: Inputs) -> Results:
    return (efe_kernels.td_lambda(**{"gamma": GAMMA, "lam": LAM, **inputs}),)


def td_lambda_definition(_: Case, inputs: Inputs) -> Results:
    truncated, *values, gammas, lams = without_padding(inputs, "gamma", "lam")
    ends = Ends(inputs["terminated"], truncated, gammas, lams)
    return (trace_reference.td_lambda_forward(*values, ends, TDLambdaSettings(GAMMA, LAM, 1.0)),)


def td_lambda_launch(steps: int, per_step: bool, begin: Callable[[str], None]) -> None:
    next_value, reward, grad = empties(3, 4096, steps)
    ends, settings = Ends(*empties(2, 4096, steps, dtype=torch.bool)), TDLambdaSettings(GAMMA, LAM, 1.0)
    if per_step:
        ends = ends._replace(gammas=torch.empty(steps).expand(4096, steps), lams=torch.empty(4096, steps))
    td_lambda_kernels.td_lambda_forward(next_value, reward, ends, settings)
    begin("backward")
    td_lambda_kernels.td_lambda_backward(grad, [True, per_step], ends, settings)


TD_LAMBDA = Op(
    name="td_lambda",
    inputs=td_lambda_inputs,
    kernel=td_lambda,
    reference=td_lambda_definition,
    peers={
        **plain(lambda _, inputs: by_hand.td_lambda(inputs, GAMMA, LAM), td_lambda_definition, compiled=FORWARD),
        "torchrl": Peer(lambda _, inputs: baselines.torchrl_td_lambda(inputs, GAMMA, LAM), FORWARD, module="torchrl"),
    },
    reads=lambda inputs: (size_of(inputs), size_of(inputs, "terminated", "truncated")),
    cases=(Case("td_lambda", "throughput", (4096, 128), opponents=(*COMPILED, "torchrl")), *cases("td_lambda")),
    examples=(
        Example(Case("td_lambda", "scattered", (37, 70))),
        Example(Case("td_lambda", "scattered", (37, 70), terms=PER_STEP)),
    ),
    small=few_rows,
    triton=True,
    variants={
        "td_lambda serial": Variant((4096, 32), partial(td_lambda_launch, 32, False)),
        "td_lambda scan": Variant((4096, 1500), partial(td_lambda_launch, 1500, False)),
        "td_lambda scan per step": Variant((4096, 1500), partial(td_lambda_launch, 1500, True)),
    },
    loops={"td_lambda_scan_kernel": chunk_trips, "td_lambda_scan_backward_kernel": chunk_trips},
    swept=True,
    trace=True,
)
