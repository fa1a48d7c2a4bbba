"""What is measured: a table of cases, and for each op how its inputs are made and who computes on them.

A case is one op on one named workload: `seed` is a single episode, `train` a batch of 64, `throughput` one of 4096,
`ragged` has sizes that divide by nothing and cells or steps that do not count, `update` is a buffer of 256 rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import efe_kernels
from bench import baselines
from efe_kernels import EFEWeights
from efe_kernels.advantage import reference as advantage_reference
from efe_kernels.arc_efe import EFELoss
from efe_kernels.common.library import accumulate_dtype
from efe_kernels.efe_loss import reference as efe_reference
from efe_kernels.policy_loss import reference as policy_reference
from efe_kernels.prompt import reference as prompt_reference
from efe_kernels.returns import reference as trace_reference
from efe_kernels.reward import reference as reward_reference
from tests.arc_efe.definition import definition as arc_definition

Inputs = dict[str, Any]
Implementation = Callable[[Inputs], tuple[Tensor, ...]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GAMMA, LAM, DELTA_SCALE = 0.99, 0.95, 0.2
PASSES = ("forward", "backward", "both")
# Opponents that have no gradient or whose gradient nobody takes, and those too slow to be timed three times.
ONLY = {
    ("gae", "torchrl"): ("forward",),
    ("gae", "compile"): ("forward",),
    ("gae", "thread per row"): ("forward",),
    ("vtrace", "torchrl"): ("forward",),
    ("vtrace", "compile"): ("forward",),
    ("arc_efe", "loop over cells"): ("both",),
}
NEED_GPU = ("padded tile", "thread per row", "Liger")
EAGER = ("eager",)
COMPILED = ("eager", "compile")


@dataclass(frozen=True)
class Case:
    """sizes: B and what follows it, as the op's shapes name them. opponents: implementations beside the kernel."""

    op: str
    workload: str
    sizes: tuple[int, ...]
    dtype: str = "fp32"
    layout: str = ""
    terms: str = ""
    opponents: tuple[str, ...] = EAGER
    gpu_only: bool = False

    @property
    def name(self) -> str:
        details = (self.op, self.terms, self.workload, "x".join(map(str, self.sizes)), self.dtype, self.layout)
        return " ".join(detail for detail in details if detail)

    def passes(self, implementation: str) -> tuple[str, ...]:
        return ("forward",) if self.op == "grid_reward" else ONLY.get((self.op, implementation), PASSES)

    def problem(self, device: str) -> Problem:
        torch.manual_seed(0)
        with torch.device(device):
            return OPS[self.op](self)


@dataclass(frozen=True)
class Problem:
    """One case's inputs, and what computes on them.

    reference: the definition, in whatever dtype its inputs have. implementations: by name; "kernel" is ours.
    forward_reads, backward_reads: the least bytes of inputs that each pass must read.
    """

    inputs: Inputs
    reference: Implementation
    implementations: dict[str, Implementation]
    forward_reads: int
    backward_reads: int
    leaves: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaves", leaves_of(self.inputs))


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    """What a gradient is asked for: inputs that require one, and parameters of modules among the inputs."""
    found = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    for value in inputs.values():
        if isinstance(value, nn.Module):
            found |= {name: parameter for name, parameter in value.named_parameters() if parameter.requires_grad}
    return found


def size_of(inputs: Inputs, *names: str) -> int:
    """Bytes of the named inputs, of all tensors without names."""
    tensors = (inputs[name] for name in names or inputs)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def laid_out(layout: str, *shape: int) -> Tensor:
    """Random [..., H, W, C] in the memory order of the layout."""
    *outer, height, width, outcomes = shape
    if layout == "channel-first":
        return torch.randn(*outer, outcomes, height, width).movedim(-3, -1)
    return torch.randn(shape)


def valid_cells(workload: str, batch: int, height: int, width: int) -> Tensor:
    """bool [B, H, W]: all, and on the ragged workload a top-left rectangle of its own for each episode."""
    if workload != "ragged":
        return torch.ones(batch, height, width, dtype=torch.bool)
    heights = torch.randint(1, height + 1, (batch, 1, 1))
    widths = torch.randint(1, width + 1, (batch, 1, 1))
    return (torch.arange(height)[:, None] < heights) & (torch.arange(width) < widths)


WEIGHTS = {
    "all": EFEWeights(),
    "core": EFEWeights(anchor=0, prompt=0, step=0),
    "risk": EFEWeights(consistency=0, agreement=0, anchor=0, prompt=0, step=0),
    "agreement": EFEWeights(risk=0, consistency=0, agreement=1, anchor=0, prompt=0, step=0),
    "consistency": EFEWeights(risk=0, consistency=1, agreement=0, anchor=0, prompt=0, step=0),
}
"""Which terms of the EFE loss a case has: all as `EFELoss` uses them, the three of a plan alone (`core`, gradient to
the logits only), or a single one, for the opponents that know only that."""


def efe_loss(case: Case) -> Problem:
    batch, steps, height, width, outcomes = case.sizes
    dtype = DTYPES[case.dtype]
    weights = WEIGHTS[case.terms]
    single = case.terms not in ("all", "core")
    grid = (height, width, outcomes)
    inputs: Inputs = {
        "logits": laid_out(case.layout, batch, steps, *grid).to(dtype).requires_grad_(),
        "target": torch.randint(0, outcomes, (batch, height, width)),
        "preference_logits": torch.randn(grid).requires_grad_(case.terms == "all"),
        "valid": None if single else valid_cells(case.workload, batch, height, width),
        "backward_logits": laid_out(case.layout, batch, steps, *grid).to(dtype) if case.terms == "agreement" else None,
        "final_logits": None,
        "observation_probs": None,
        "prompt": None,
        "projection": None,
        "target_preference": None,
    }
    if case.terms == "all":
        inputs["prompt"] = torch.randn(batch, 256).requires_grad_()
        inputs["projection"] = torch.randn(outcomes, 256).requires_grad_()
        inputs["target_preference"] = torch.rand(grid)
    names = ("risk", "ambiguity", "consistency", "agreement", "anchor", "prompt", "step")
    settings = ([getattr(weights, name) for name in names], not single, 0.0, 900, -100)

    def kernel(found: Inputs, **more: Any) -> tuple[Tensor]:
        arguments = {**found, **more}
        return (efe_kernels.efe_loss(**arguments, weights=weights, hard_cell=not single).total,)

    def promised(found: Inputs) -> tuple[Tensor]:
        return kernel(found, grad_scale=torch.full((), UPSTREAM, device=found["logits"].device))

    def reference(found: Inputs) -> tuple[Tensor]:
        total, *_ = efe_reference.efe_loss(efe_reference.Inputs(**found), efe_reference.Settings(*settings))
        return (total.mean(),)

    peers = {
        "risk": lambda x: baselines.liger_divergence(x, 1.0),
        "agreement": lambda x: baselines.liger_divergence(x, 0.5),
    }
    reads = size_of(inputs)
    return Problem(
        inputs,
        reference,
        {
            "kernel": kernel,
            "kernel, grad_scale": promised,
            "eager": reference,
            "padded tile": lambda found: baselines.padded_tile_loss(found, weights),
            "Liger": peers.get(case.terms, baselines.liger_cross_entropy),
        },
        forward_reads=reads,
        backward_reads=reads,
    )


UPSTREAM = 1024.0
"""The gradient that arrives at a loss: a loss scale, without which fp16 gradients of a mean are flushed to zero."""


def arc_efe(case: Case) -> Problem:
    """One puzzle, as the drop-in for ARC-EFE projects takes it."""
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
    inputs["module"] = module

    def kernel(found: Inputs) -> tuple[Tensor]:
        forward, backward, observation, final, prompt, mask, module = found.values()
        plan = (forward, backward, forward, observation, final)
        return (module(*plan, target, steps, prompt, mask)["total"],)

    def loop(found: Inputs) -> tuple[Tensor]:
        forward, backward, observation, final, prompt, mask, module = found.values()
        with forward.device:  # where the definition makes its own tensors
            plan = (forward, backward, observation, final)
            return (arc_definition(module, *plan, target, steps, prompt, mask)["total"],)

    reads = size_of(inputs)
    return Problem(inputs, loop, {"kernel": kernel, "loop over cells": loop}, reads, reads)


def grid_reward(case: Case) -> Problem:
    batch, height, width, outcomes = case.sizes
    inputs: Inputs = {
        "before": laid_out(case.layout, batch, height, width, outcomes).to(DTYPES[case.dtype]),
        "after": laid_out(case.layout, batch, height, width, outcomes).to(DTYPES[case.dtype]),
        "target": torch.randint(0, outcomes, (batch, height, width)),
        "valid": valid_cells(case.workload, batch, height, width),
    }

    def kernel(found: Inputs) -> tuple[Tensor]:
        return (efe_kernels.grid_reward(**found).reward,)

    def reference(found: Inputs) -> tuple[Tensor]:
        found_before, found_after, target, valid = found.values()
        table = reward_reference.grid_reward(
            found_before, found_after, target, valid, None, [1.0, 0.5, 0.5, 0.5], outcomes
        )
        return (table[0],)

    return Problem(inputs, reference, {"kernel": kernel, "eager": reference}, size_of(inputs), 0)


def rl_advantage(case: Case) -> Problem:
    """Whitened in groups, which are the last of the sizes; one episode alone has nothing to be whitened with."""
    group = case.sizes[-1] if case.sizes[-1] > 1 else None
    dtype = DTYPES[case.dtype]
    inputs: Inputs = {
        "reward": torch.randn(case.sizes, dtype=dtype),
        "value": torch.randn(case.sizes, dtype=dtype).requires_grad_(),
        "mask": flags(case, 0.8),
    }

    def kernel(found: Inputs) -> tuple[Tensor]:
        return (efe_kernels.rl_advantage(**found, whiten=group is not None, group_size=group),)

    def reference(found: Inputs) -> tuple[Tensor]:
        reward, value, mask = found["reward"], found["value"], found["mask"]
        advantage = advantage_reference.plain_advantage(reward, value, mask, 5.0, "tanh")
        if group is not None:
            groups = advantage.view(-1, group)
            members = None if mask is None else mask.view(-1, group)
            statistics = advantage_reference.group_statistics(groups, members)
            advantage = advantage_reference.whiten(groups, members, statistics).view(case.sizes)
        return (advantage.to(reward.dtype),)

    reads = size_of(inputs)
    return Problem(inputs, reference, {"kernel": kernel, "eager": reference}, reads, reads)


def flags(case: Case, share: float) -> Tensor | None:
    """bool of the case's sizes, true for that share of them, on the ragged workload; None on every other."""
    return torch.rand(case.sizes) < share if case.workload == "ragged" else None


def trace_inputs(case: Case, *more: str) -> Inputs:
    """[B, T], or views of what lies in memory as [T, B]. more: further inputs, which get no gradient."""

    def random() -> Tensor:
        sizes = case.sizes[::-1] if case.layout == "time-major" else case.sizes
        stored = torch.randn(sizes, dtype=DTYPES[case.dtype])
        return stored.t() if case.layout == "time-major" else stored

    inputs: Inputs = {
        "reward": random(),
        "value": random().requires_grad_(),
        "next_value": random().requires_grad_(),
        "terminated": random() < -1.6,  # one step in twenty
        "truncated": flags(case, 0.05),
    }
    return inputs | {name: random() for name in more}


def trace_definition(found: Inputs, settings: trace_reference.Settings) -> tuple[Tensor, ...]:
    transitions = trace_reference.Transitions(found["terminated"], found["truncated"], found.get("log_ratio"))
    return trace_reference.trace_forward(found["value"], found["next_value"], found["reward"], transitions, settings)


def gae(case: Case) -> Problem:
    inputs = trace_inputs(case)

    def kernel(found: Inputs) -> tuple[Tensor, ...]:
        return efe_kernels.gae(**found, gamma=GAMMA, lam=LAM)

    def reference(found: Inputs) -> tuple[Tensor, ...]:
        return trace_definition(found, trace_reference.Settings(GAMMA, LAM, 1.0, 1.0, 1.0))

    implementations: dict[str, Implementation] = {
        "kernel": kernel,
        "eager": lambda found: baselines.loop_gae(found, GAMMA, LAM),
        "torchrl": lambda found: baselines.torchrl_gae(found, GAMMA, LAM),
        "thread per row": lambda found: baselines.row_gae(found, GAMMA, LAM),
    }
    constants = size_of(inputs, "terminated", "truncated")
    return Problem(inputs, reference, implementations, size_of(inputs), constants)


def vtrace(case: Case) -> Problem:
    inputs = trace_inputs(case, "log_ratio")
    with torch.no_grad():
        inputs["log_ratio"].mul_(0.5)
        # torchrl takes the value of the next step where the trace goes on, and next_value only where it stops.
        inputs["next_value"][:, :-1] = inputs["value"][:, 1:]

    def kernel(found: Inputs) -> tuple[Tensor, ...]:
        return efe_kernels.vtrace(**found, gamma=GAMMA)

    def reference(found: Inputs) -> tuple[Tensor, ...]:
        return trace_definition(found, trace_reference.Settings(GAMMA, 1.0, 1.0, 1.0, 1.0))

    implementations: dict[str, Implementation] = {
        "kernel": kernel,
        "eager": lambda found: baselines.loop_vtrace(found, GAMMA),
        "torchrl": lambda found: baselines.torchrl_vtrace(found, GAMMA),
    }
    constants = size_of(inputs, "terminated", "truncated", "log_ratio")
    return Problem(inputs, reference, implementations, size_of(inputs), constants)


def policy_gradient_loss(case: Case) -> Problem:
    names = ("log_prob", "value", "entropy", "advantage", "value_target", "old_log_prob")
    inputs: Inputs = {name: torch.randn(case.sizes, dtype=DTYPES[case.dtype]) for name in names}
    inputs["old_log_prob"].mul_(0.2).add_(inputs["log_prob"])
    for name in names[:3]:
        inputs[name].requires_grad_()
    inputs["mask"] = flags(case, 0.8)

    def kernel(found: Inputs) -> tuple[Tensor]:
        return (efe_kernels.policy_gradient_loss(**found).total,)

    def reference(found: Inputs) -> tuple[Tensor]:
        inputs = policy_reference.Inputs(**{name: found[name] for name in policy_reference.Inputs._fields})
        settings = policy_reference.Settings(0.2, 0.5, 0.01)
        total, *_ = policy_reference.policy_gradient_loss_forward(found["entropy"], inputs, settings)
        return (total,)

    saved = size_of(inputs, *(name for name in inputs if name != "entropy"))
    return Problem(inputs, reference, {"kernel": kernel, "eager": reference}, size_of(inputs), saved)


def masked_mean_pool(case: Case) -> Problem:
    """Half of the tokens count on the train workload, a length of its own for each row on the ragged one."""
    rows, length, _ = case.sizes
    hidden = torch.randn(case.sizes, dtype=DTYPES[case.dtype]).requires_grad_()
    lengths = (
        torch.randint(1, length + 1, (rows, 1)) if case.workload == "ragged" else torch.full((rows, 1), length // 2)
    )
    inputs: Inputs = {"hidden": hidden, "mask": torch.arange(length) < lengths}

    def kernel(found: Inputs) -> tuple[Tensor]:
        return (efe_kernels.masked_mean_pool(**found),)

    def reference(found: Inputs) -> tuple[Tensor]:
        return (prompt_reference.masked_mean_pool(**found),)

    tokens = int(inputs["mask"].sum())
    reads = size_of(inputs, "hidden") * tokens // (rows * length) + size_of(inputs, "mask")
    implementations: dict[str, Implementation] = {
        "kernel": kernel,
        "eager": reference,
        "sum over mask": baselines.naive_mean_pool,
    }
    return Problem(inputs, reference, implementations, reads, size_of(inputs, "mask"))


def refine_inputs(case: Case) -> Inputs:
    batch, width = case.sizes
    dtype = DTYPES[case.dtype]
    return {
        "prompt": torch.randn(batch, width, dtype=dtype).requires_grad_(),
        "mean": torch.randn(batch, width + 1, dtype=dtype).requires_grad_(),
        "log_std": (0.1 * torch.randn(batch, width + 1, dtype=dtype)).requires_grad_(),
        "noise": torch.randn(batch, width + 1, dtype=dtype),
    }


def wide(tensors: Iterable[Tensor]) -> list[Tensor]:
    """In the dtype of the arithmetic, which the reference of the prompt ops leaves to its caller."""
    return [tensor.to(accumulate_dtype(tensor)) for tensor in tensors]


def refine_prompt(case: Case) -> Problem:
    inputs = refine_inputs(case)

    def kernel(found: Inputs) -> tuple[Tensor, ...]:
        refined = efe_kernels.refine_prompt(**found, delta_scale=DELTA_SCALE)
        return refined.prompt, refined.log_prob, refined.entropy

    def reference(found: Inputs) -> tuple[Tensor, ...]:
        prompt, *policy = found.values()
        mean, log_std, noise = wide(policy)
        refined, _, log_prob, entropy = prompt_reference.refine_prompt(prompt, mean, log_std, noise, DELTA_SCALE)
        return refined, log_prob, entropy

    backward_reads = size_of(inputs, "mean", "log_std", "noise")
    return Problem(inputs, reference, {"kernel": kernel, "eager": reference}, size_of(inputs), backward_reads)


def squashed_log_prob(case: Case) -> Problem:
    inputs = refine_inputs(case)
    del inputs["prompt"]
    inputs = {"action": inputs.pop("noise"), **inputs}

    def kernel(found: Inputs) -> tuple[Tensor, ...]:
        return efe_kernels.squashed_log_prob(**found, delta_scale=DELTA_SCALE)

    def reference(found: Inputs) -> tuple[Tensor, ...]:
        action, mean, log_std = wide(found.values())
        return prompt_reference.squashed_log_prob(action, mean, log_std, DELTA_SCALE)

    reads = size_of(inputs)
    return Problem(inputs, reference, {"kernel": kernel, "eager": reference}, reads, reads)


def refine_and_score(case: Case) -> Problem:
    """A refined prompt, and the log-probability and entropy of the action taken, as `policy.update` evaluates them."""
    inputs = refine_inputs(case)

    def kernel(found: Inputs) -> tuple[Tensor, ...]:
        refined = efe_kernels.refine_prompt(**found, delta_scale=DELTA_SCALE)
        policy = (found["mean"], found["log_std"])
        return refined.prompt, *efe_kernels.squashed_log_prob(refined.action.detach(), *policy, delta_scale=DELTA_SCALE)

    def reference(found: Inputs) -> tuple[Tensor, ...]:
        prompt, *policy = found.values()
        mean, log_std, noise = wide(policy)
        refined, action, _, _ = prompt_reference.refine_prompt(prompt, mean, log_std, noise, DELTA_SCALE)
        return refined, *prompt_reference.squashed_log_prob(action.detach(), mean, log_std, DELTA_SCALE)

    # The action goes out of the one op and into the other.
    action = 2 * size_of(inputs, "noise")
    reads = size_of(inputs) + action + size_of(inputs, "mean", "log_std")
    backward_reads = action + 2 * size_of(inputs, "mean", "log_std") + size_of(inputs, "noise")
    return Problem(inputs, reference, {"kernel": kernel, "eager": reference}, reads, backward_reads)


OPS: dict[str, Callable[[Case], Problem]] = {
    function.__name__: function
    for function in (
        efe_loss, arc_efe, grid_reward, rl_advantage, gae, vtrace, policy_gradient_loss, masked_mean_pool,
        refine_prompt, squashed_log_prob, refine_and_score,
    )
}  # fmt: skip


def plan(batch: int) -> tuple[int, ...]:
    return batch, 5, 30, 30, 10


def headline() -> list[Case]:
    """What the goals are set on, and the batches of a whole training run: first, in case the time runs out."""
    first, last = "channel-first", "channel-last"
    # Only without a prompt term can one pass do it all.
    known, padded = "kernel, grad_scale", "padded tile"
    return [
        Case("efe_loss", "train", plan(64), layout=first, terms="all", opponents=COMPILED),
        Case("efe_loss", "train", plan(64), layout=first, terms="core", opponents=(*COMPILED, padded)),
        Case("gae", "throughput", (4096, 128), opponents=(*COMPILED, "torchrl", "thread per row")),
        Case("policy_gradient_loss", "throughput", (4096 * 128,), opponents=COMPILED),
        Case("refine_and_score", "update", (256, 256), opponents=COMPILED),
        Case("masked_mean_pool", "train", (64, 512, 1024), opponents=(*COMPILED, "sum over mask")),
        Case("arc_efe", "seed", plan(1)[1:], opponents=("loop over cells",)),
        Case("efe_loss", "throughput", plan(4096), "bf16", first, "core", (known, *COMPILED, padded), True),
        Case("efe_loss", "throughput", plan(4096), "bf16", first, "all", COMPILED, True),
        Case("efe_loss", "throughput", plan(4096), "bf16", last, "core", (known, padded), True),
    ]


def loss_cases() -> list[Case]:
    """The EFE loss in every dtype and layout, term by term against Liger-Kernel, and over B."""
    first, last = "channel-first", "channel-last"
    return [
        Case("efe_loss", "seed", plan(1), layout=first, terms="all", opponents=COMPILED),
        Case("efe_loss", "ragged", (33, 5, 29, 23, 10), layout=first, terms="all"),
        Case("efe_loss", "train", plan(64), layout=last, terms="all"),
        Case("efe_loss", "train", plan(64), "bf16", first, "all"),
        Case("efe_loss", "train", plan(64), "fp16", first, "all"),
        *(Case("efe_loss", "train", plan(64), layout=last, terms=term, opponents=("eager", "Liger"))
          for term in ("risk", "agreement", "consistency")),
        *(Case("efe_loss", "throughput", plan(4096), dtype, layout, "all", (), True)
          for dtype in DTYPES for layout in (first, last) if (dtype, layout) != ("bf16", first)),
        *(Case("efe_loss", "sweep", plan(batch), "bf16", first, "all", EAGER, True) for batch in (4, 16, 256, 1024)),
        Case("arc_efe", "ragged", plan(1)[1:], opponents=("loop over cells",)),
    ]  # fmt: skip


def reward_and_advantage_cases() -> list[Case]:
    against_torchrl = ("eager", "torchrl")
    cases = [
        Case("vtrace", "throughput", (4096, 128), opponents=(*COMPILED, "torchrl")),
        *(Case("grid_reward", workload, (batch, 30, 30, 10), "fp32", "channel-first", "", opponents, batch > 64)
          for workload, batch, opponents in (("seed", 1, EAGER), ("train", 64, COMPILED), ("throughput", 4096, EAGER))),
        Case("grid_reward", "train", (64, 30, 30, 10), layout="channel-last"),
        Case("grid_reward", "ragged", (33, 29, 23, 10), layout="channel-last"),
    ]  # fmt: skip
    for op in ("gae", "vtrace"):
        cases += [
            Case(op, "seed", (1, 128), opponents=against_torchrl),
            Case(op, "train", (64, 128), opponents=against_torchrl),
            Case(op, "ragged", (33, 77), opponents=against_torchrl),
            Case(op, "throughput", (4096, 128), layout="time-major"),
        ]
    for workload, batch in (("seed", 1), ("train", 64), ("ragged", 33)):
        cases += [Case("rl_advantage", workload, (batch,)), Case("policy_gradient_loss", workload, (batch,))]
    cases.append(Case("rl_advantage", "throughput", (4096,), opponents=COMPILED))
    for dtype in ("bf16", "fp16"):
        cases += [Case(op, "train", (64, 128), dtype) for op in ("gae", "vtrace")]
        cases += [Case(op, "train", (64,), dtype) for op in ("rl_advantage", "policy_gradient_loss")]
        cases.append(Case("grid_reward", "train", (64, 30, 30, 10), dtype, "channel-first"))
    return cases


def prompt_cases() -> list[Case]:
    ops = ("refine_prompt", "squashed_log_prob")
    pool = ("eager", "sum over mask")
    cases = [Case(op, "update", (256, 256), opponents=COMPILED) for op in ops]
    for workload, batch in (("seed", 1), ("train", 64), ("throughput", 4096), ("ragged", 33)):
        cases += [Case(op, workload, (batch, 243 if workload == "ragged" else 256)) for op in ops]
    cases += [Case(op, "train", (64, 256), dtype) for dtype in ("bf16", "fp16") for op in ops]
    return [
        *cases,
        Case("masked_mean_pool", "seed", (1, 512, 1024), opponents=pool),
        Case("masked_mean_pool", "ragged", (33, 509, 1019), opponents=pool),
        *(Case("masked_mean_pool", "train", (64, 512, 1024), dtype, opponents=pool) for dtype in ("bf16", "fp16")),
        Case("masked_mean_pool", "throughput", (4096, 128, 1024), "bf16", opponents=pool, gpu_only=True),
    ]


CASES = headline() + loss_cases() + reward_and_advantage_cases() + prompt_cases()
assert len({case.name for case in CASES}) == len(CASES)
