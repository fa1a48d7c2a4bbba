"""How a call of each public function is drawn."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

import efe_kernels
from bench.ops.arc_efe_definition import definition as arc_efe_definition
from efe_kernels import EFELoss, EFEWeights, RewardWeights, arc_efe
from tests.fuzz.draw import Draw, Parameter
from tests.fuzz.oracle import Function

SCALES = (1.0, 0.0, -2.5, 1, 1e-30, 1e30)
IGNORED = -100


def leading(draw: Draw) -> str:
    """The letters of a shape of any rank, time at any place. The definition loops over time."""
    draw.size("T", most=draw.choice((70, 70, 70, 70, 70, 70, 70, 600)))
    letters = draw.choice(("", "B", "A B")).split()
    rank = len(letters) + 1
    place = draw.choice(range(rank)) if draw.rarely() else rank - 1
    draw.parameters["time_dim"] = Parameter("count", low=-rank, high=rank - 1)
    if place < rank - 1 or draw.rarely():
        draw.arguments["time_dim"] = draw.choice((place, place - rank))
    return " ".join([*letters[:place], "T", *letters[place:]])


def ends(draw: Draw, dims: str) -> None:
    draw.mask("terminated", dims, any_dtype=True)
    draw.mask("truncated", dims, optional=True, any_dtype=True)
    draw.mask("mask", dims, optional=True)


def gae(draw: Draw) -> None:
    dims = leading(draw)
    for name in ("reward", "value", "next_value"):
        draw.floating(name, dims)
    ends(draw, dims)
    draw.factor("gamma", (0.9, 0.0, 1.0, 1, 1e-10), dims)
    draw.factor("lam", (0.5, 0.0, 1.0, 0, 1e-10), dims)
    draw.number("reward_scale", SCALES)


def vtrace(draw: Draw) -> None:
    dims = leading(draw)
    # Below -80 the ratio is 0 in float32 or so small that infinity times it depends on how 0 is approached.
    draw.floating("log_ratio", dims, change=lambda values: torch.where(values < -80, -math.inf, values))
    for name in ("reward", "value", "next_value"):
        draw.floating(name, dims)
    ends(draw, dims)
    draw.factor("gamma", (0.9, 0.0, 1.0, 1), dims)
    draw.factor("lam", (0.5, 0.0, 1.0, 0), dims)
    for name in ("rho_clip", "c_clip"):
        draw.number(name, (2.0, 0.0, math.inf, 1e-30, 1e30), 0, finite=False)
    draw.number("reward_scale", SCALES)


def td_lambda(draw: Draw) -> None:
    dims = leading(draw)
    for name in ("reward", "next_value"):
        draw.floating(name, dims)
    ends(draw, dims)
    draw.factor("gamma", (0.9, 0.0, 1.0, 1, 1e-10), dims)
    draw.factor("lam", (0.5, 0.0, 1.0, 0, 1e-10), dims)
    draw.number("reward_scale", SCALES)


def next_values(draw: Draw) -> None:
    dims = leading(draw)
    draw.floating("value", dims)
    draw.floating("last_value", " ".join(letter for letter in dims.split() if letter != "T"))
    ends(draw, dims)
    draw.floating("final_value", dims, optional=True)


def define_next_values(
    value: Tensor, last_value: Tensor, terminated: Tensor, truncated: Tensor | None, final_value: Tensor | None,
    mask: Tensor | None, time_dim: int = -1,
) -> Tensor:  # fmt: skip
    """Step by step."""
    following, steps = [], value.shape[time_dim]
    counts = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
    for t in range(steps):
        found = last_value
        if t < steps - 1:
            later = counts.movedim(time_dim, -1)[..., t + 1 :].any(-1)
            found = torch.where(later, value.select(time_dim, t + 1), last_value)
        if truncated is not None:
            final = torch.zeros_like(found) if final_value is None else final_value.select(time_dim, t)
            found = torch.where(truncated.select(time_dim, t) != 0, final, found)
        nothing = (terminated.select(time_dim, t) != 0) | ~counts.select(time_dim, t)
        following.append(torch.where(nothing, torch.zeros_like(found), found))
    dtypes = [tensor.dtype for tensor in (value, last_value, final_value) if tensor is not None]
    return (torch.stack(following, time_dim) if steps else value).to(functools.reduce(torch.promote_types, dtypes))


def probabilities(dim: int) -> Callable[[Tensor], Tensor]:
    """None of them is 0: at 0 an entropy has no derivative."""
    return lambda values: values.clamp(-3, 3).softmax(dim)


def rollout_states(draw: Draw) -> None:
    draw.size("S", least=1, most=17)
    draw.floating("initial", draw.choice(("S", "B S", "A B S")), change=probabilities(-1))
    del draw.parameters["initial"]  # two dimensions more are no fault
    draw.floating("transition", "S S U", shape=(draw.sizes["S"], draw.sizes["S"], draw.size("U", least=1, most=17)),
                  change=probabilities(0))  # fmt: skip
    draw.size("T", most=7)
    draw.integers("policies", "P T", 0, draw.sizes["U"], shape=(draw.size("P", most=17), draw.sizes["T"]))


def define_rollout(initial: Tensor, transition: Tensor, policies: Tensor) -> Tensor:
    """Policy by policy."""
    initial, transition = (x.to(torch.promote_types(initial.dtype, transition.dtype)) for x in (initial, transition))
    found = initial.new_empty(*initial.shape[:-1], *policies.shape, initial.shape[-1])
    rows = []
    for policy in policies.long().tolist():
        states, steps = initial, []
        for action in policy:
            states = (transition[:, :, action] * states[..., None, :]).sum(-1)
            steps.append(states)
        rows.append(torch.stack(steps, -2) if steps else found[..., 0, :, :])
    return torch.stack(rows, -3) if rows else found


def policy_efe(draw: Draw) -> None:
    draw.size("S", least=1, most=17)
    draw.size("T", most=7)
    draw.size("P", most=17)
    draw.floating("state_probs", draw.choice(("P T S", "B P T S")), change=probabilities(-1))
    del draw.parameters["state_probs"]  # two dimensions more are no fault
    for place in range(draw.choice((1, 1, 2))):
        draw.size(f"O{place}", least=1, most=17)
        draw.floating(f"likelihood{place}", f"O{place} S", change=probabilities(0))
        draw.floating(f"preference_logits{place}", draw.choice((f"O{place}", f"T O{place}")), change=logits)
    for name in ("likelihood", "preference_logits"):
        draw.arguments[name] = None  # named in errors


def by_modality(likelihood: None, preference_logits: None, **arguments: Any) -> tuple[Any, list[Any], list[Any]]:
    likelihoods, preferences = (
        [value for name, value in arguments.items() if name.startswith(kind)]
        for kind in ("likelihood", "preference_logits")
    )
    return arguments["state_probs"], likelihoods, preferences


def call_policy_efe(**arguments: Any) -> Any:
    return efe_kernels.policy_efe(*by_modality(**arguments))


def define_policy_efe(**arguments: Any) -> dict[str, Tensor]:
    """Over the joint outcomes, with every part as it is defined."""
    state_probs, likelihoods, preferences = by_modality(**arguments)
    dtypes = (tensor.dtype for tensor in (state_probs, *likelihoods, *preferences))
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    states, steps = state_probs.to(dtype), state_probs.shape[-2]
    given = torch.ones(states.shape[-1], 1, dtype=dtype)  # p(o | s), [S, O]
    utility = torch.zeros(states.shape[:-2], dtype=dtype)
    for likelihood, logits in zip(likelihoods, preferences, strict=True):
        one, log_c = likelihood.to(dtype).T, logits.to(dtype).log_softmax(-1).expand(steps, -1)
        utility = utility + ((states[..., None] * one).sum(-2) * log_c).sum((-2, -1))
        given = (given[:, :, None] * one[:, None]).flatten(1)
    observed = (states[..., None] * given).sum(-2)  # [..., P, T, O]
    risk = (observed * observed.log()).sum((-2, -1)) - utility
    ambiguity = -(states * (given * given.log()).sum(-1)).sum((-2, -1))
    gain = (states[..., None] * given * (given.log() - observed.log()[..., None, :])).sum((-3, -2, -1))
    return {"efe": risk + ambiguity, "risk": risk, "ambiguity": ambiguity, "information_gain": gain, "utility": utility}


def rl_advantage(draw: Draw) -> None:
    dims = draw.choice(("", "B", "B G", "A B G"))
    for name in ("reward", "value"):
        draw.floating(name, dims)
    draw.mask("mask", dims, optional=True)
    draw.number("reward_scale", SCALES)
    draw.other("normalize", ("tanh", "clamp", None))
    draw.arguments["whiten"] = draw.choice((False, True, "center"))
    if draw.arguments["whiten"]:
        numel = draw.arguments["reward"].numel()
        divisors = [size for size in (1, 2, 3, 7, 16, 64, *([numel] if numel else [])) if numel % size == 0]
        draw.count("group_size", divisors, low=1, optional=True)


def policy_gradient_loss(draw: Draw) -> None:
    rows, length = draw.choice((("", "B"), ("", ""), ("B", " T"), ("A B", " T")))
    dims = rows + length
    draw.floating("log_prob", dims)
    draw.sizes["1"] = 1
    by_row = rows != "" and draw.often()
    draw.floating("advantage", draw.choice((rows, f"{rows} 1")) if by_row else dims)
    clips = (0.2, 1.0, 1e-6, 3.5, math.inf)
    if draw.often():
        for name in ("value", "value_target"):
            draw.floating(name, dims)
        if draw.rarely():
            draw.floating("old_value", dims)
            draw.number("value_clip", clips, 0, above=True, finite=False, optional=True)
            draw.arguments.setdefault("value_clip", 0.2)
    draw.floating("entropy", dims, optional=True)
    draw.floating("ref_log_prob", dims, optional=True)
    if draw.arguments["ref_log_prob"] is not None:
        draw.number("kl_coef", SCALES)
    draw.mask("mask", dims, optional=True)
    sequences = by_row and draw.rarely()
    draw.floating("old_log_prob", dims, optional=not sequences)
    draw.number("clip", clips, 0, above=True, finite=False)
    draw.number("clip_high", clips, 0, above=True, finite=False, optional=True)
    draw.number("dual_clip", (3.0, 1.5, math.inf), 1, above=True, finite=False, optional=True)
    draw.number("value_coef", SCALES)
    draw.number("entropy_coef", SCALES)
    draw.arguments["level"] = "sequence" if sequences else "token"
    draw.other("aggregation", ("mean", "sequence_mean"))
    if draw.rarely():
        draw.arguments["aggregation"] = "constant"
        draw.number("normalizer", (40.0, 1e-3), 0, above=True)
        draw.arguments.setdefault("normalizer", 7.0)


def masked_mean_pool(draw: Draw) -> None:
    draw.batched = draw.often()
    # A sum of numbers close to the largest would overflow or not by the order in which they are added.
    draw.floating("hidden", "N? L E", change=lambda values: within(values, 1e34))
    draw.mask("mask", "N? L", any_dtype=True)


def policy(draw: Draw, anchor: str) -> None:
    """mean and log_std beside what is named."""
    draw.batched = draw.often()
    draw.size("B")
    draw.size("D", least=1)
    draw.sizes["D+1"] = draw.sizes["D"] + 1
    draw.floating(anchor, "B? D" if anchor == "prompt" else "B? D+1")
    draw.floating("mean", "B? D+1")
    draw.floating("log_std", draw.choice(("D+1", "B? D+1")), change=lambda values: values.clamp(-1e30, 1e30))


def refine_prompt(draw: Draw) -> None:
    policy(draw, "prompt")
    # Times a standard deviation that a kernel takes for 0.
    draw.floating("noise", "B? D+1", optional=True, change=lambda values: within(values, 1e30))
    if draw.arguments["noise"] is None:
        draw.count("seed", (0, 1, 2**63 - 1), low=0, optional=True)
    draw.number("delta_scale", (0.5, 1e-30, 1e30, 1), 0, above=True)


def squashed_log_prob(draw: Draw) -> None:
    policy(draw, "action")
    draw.number("delta_scale", (0.5, 1e-30, 1e30, 1), 0, above=True)


def plan(draw: Draw, most: int = 37) -> tuple[int, int, int]:
    """The sizes of a plan; H, W and C."""
    draw.size("T", least=1, most=9)
    outcomes = draw.size("C", least=2, most=70)
    return draw.size("H", least=1, most=most), draw.size("W", least=1, most=most), outcomes


def within(values: Tensor, limit: float) -> Tensor:
    return torch.where(values.isfinite(), values.clamp(-limit, limit), values)


def logits(values: Tensor) -> Tensor:
    """No further apart than 1e30, from where on efe_loss takes a logit for that much below the largest."""
    return within(values, 4e29)


def softmaxed(values: Tensor) -> Tensor:
    return values.softmax(-1)


def without_nan(values: Tensor) -> Tensor:
    """Of a prompt: NaN among its first C entries makes its own gradient NaN even where no cell counts."""
    return torch.where(values.isnan(), 0, values)


def one_hots(values: Tensor) -> Tensor:
    """A running mean of targets: as random values are not negative, with cells that have not been set."""
    return torch.where(values.sum(-1, keepdim=True) < -1, 0, values.abs())


def efe_inputs(draw: Draw, learned: bool = True) -> tuple[int, int, int]:
    """What efe_loss and its module take alike. learned: with what the module owns."""
    draw.batched = draw.often()
    height, width, outcomes = plan(draw)
    draw.size("B", most=9)
    draw.floating("logits", "B? T H W C", change=logits)
    draw.integers("target", "B? H W", 0, outcomes, ignored=IGNORED)
    draw.floating("backward_logits", "B? T H W C", optional=True, change=logits)
    draw.floating("final_logits", "B? H W C", optional=True, change=logits)
    draw.floating("observation_probs", "B? T H W C", optional=True, change=softmaxed)
    draw.mask("valid", "B? H W", optional=True)
    draw.flag("hard_cell")
    draw.number("hard_cell_min_ratio", (0.5, 0.0, 1.0, -1.0, 2.0))
    draw.other("reduction", ("mean", "sum", "none"))
    draw.other(
        "weights", (EFEWeights(ambiguity=0.7), EFEWeights(0, 0, 0, 0, 0, 0, 0), EFEWeights(risk=-1.0, prompt=30))
    )
    return height, width, outcomes


def efe_loss(draw: Draw) -> None:
    height, width, outcomes = efe_inputs(draw)
    draw.sizes["D"] = outcomes + draw.choice((0, 1, 6, 90))
    covered = (height + draw.choice((0, 0, 1)), width + draw.choice((0, 0, 3)), outcomes)
    each = draw.batched and draw.rarely()
    # Letters of their own: each may be larger than the grid.
    dims, shape = ("B? P Q C", (draw.sizes["B"], *covered)) if each else ("P Q C", covered)
    draw.floating("preference_logits", dims, shape=shape, change=logits)
    draw.floating("prompt", "B? D", optional=True, change=without_nan)
    draw.floating("projection", "C D", optional=True)
    draw.floating("target_preference", "R S C", shape=covered, optional=True, grad=False, change=one_hots)
    draw.count("max_cells", (900, 1, 2**40), low=1)


MODULE_SETTINGS = ("hard_cell", "hard_cell_min_ratio", "reduction", "weights")


def efe_module(draw: Draw) -> None:
    height, width, outcomes = efe_inputs(draw)
    draw.sizes["D"] = outcomes + draw.choice((0, 1, 6, 90))
    draw.sizes["max"] = max(height, width) + draw.choice((0, 0, 1))
    draw.floating("preference_logits", "max max C", change=logits)
    draw.floating("projection", "C D")
    draw.floating("target_preference", "max max C", grad=False, change=one_hots)
    for name in ("preference_logits", "projection", "target_preference"):
        del draw.parameters[name]
    draw.floating("prompt", "B? D", optional=True, change=without_nan)


def call_efe_module(**arguments: Any) -> Any:
    state = {name: arguments.pop(name) for name in ("preference_logits", "projection", "target_preference")}
    settings = {name: arguments.pop(name) for name in MODULE_SETTINGS if name in arguments}
    size, _, outcomes = state["preference_logits"].shape
    module = EFELoss(size, outcomes, state["projection"].shape[1], **settings)
    plan = (arguments.pop("logits"), arguments.pop("target"))
    return functional_call(module, state, plan, arguments)


LAMBDAS = ("lambda_risk", "lambda_amb", "lambda_step", "lambda_cons", "lambda_bi", "lambda_z", "lambda_prompt",
           "lambda_grid_norm")  # fmt: skip


def arc_efe_loss(draw: Draw) -> None:
    plan(draw, most=17)
    draw.sizes["D"] = draw.choice((draw.sizes["C"], 7, 256))
    draw.sizes["max"] = draw.choice((30, 1, 5))
    for name in ("forward_predictions", "backward_predictions", "state_predictions"):
        draw.floating(name, "T H W C")
    draw.floating("observation_probs", "T H W C", change=softmaxed)
    draw.floating("final_prediction", "H W C")
    draw.integers("target_outcome", "H W", 0, draw.sizes["C"])
    draw.arguments["episode_length"] = draw.choice((5, 0, 1.5, np.float32(3), torch.tensor(2)))
    draw.floating("prompt_embedding", draw.choice(("D", "C")), optional=True)
    draw.mask("grid_mask", "H W", optional=True, any_dtype=True)
    for name in LAMBDAS:
        draw.number(name, SCALES[:4])
    draw.arguments |= {
        "state": draw.seed(),
        "anchored": draw.often(),
        "prompt_dim": draw.sizes["D"],
        "max_grid_size": draw.sizes["max"],
    }


def arc_efe_module(arguments: dict[str, Any]) -> Any:
    """The module in the dtype of the arithmetic, and what it is called with."""
    given = dict(arguments)
    forward = given["forward_predictions"]
    settings = {name: given.pop(name) for name in (*LAMBDAS, "prompt_dim", "max_grid_size") if name in given}
    torch.default_generator.manual_seed(given.pop("state"))
    anchored = given.pop("anchored")
    outcomes = forward.shape[-1] if isinstance(forward, Tensor) and forward.dim() == 4 else 3
    module = arc_efe.EFELoss(num_colors=outcomes, **settings)
    if isinstance(forward, Tensor) and forward.dim() == 4:
        _, height, width, _ = forward.shape
        module.ensure_preference(height, width)
        if anchored:
            module.update_target_preference([torch.randint(outcomes, (height, width))], [(height, width)])
        if forward.dtype == torch.float64:
            module.double()
        module.to(forward.device)
    return module, given


def call_arc_efe(**arguments: Any) -> Any:
    module, given = arc_efe_module(arguments)
    return module(**given)


def define_arc_efe(**arguments: Any) -> Any:
    module, given = arc_efe_module(arguments)
    forward = given["forward_predictions"]
    dtype = torch.float64 if forward.dtype == torch.float64 else torch.float32
    floating = {
        name: value.to(dtype)
        for name, value in given.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    plan = [floating[f"{name}_predictions"] for name in ("forward", "backward")]
    mask = given.get("grid_mask")
    return arc_efe_definition(
        module, *plan, floating["observation_probs"], floating["final_prediction"], given["target_outcome"].long(),
        float(given["episode_length"]), floating.get("prompt_embedding"), None if mask is None else mask.to(dtype),
    )  # fmt: skip


def grid_reward(draw: Draw) -> None:
    draw.batched = draw.often()
    colours = draw.arguments["num_colors"] = draw.choice((10, 1, 2, 33, 300))
    draw.size("B", most=9)
    draw.size("H", least=1, most=37)
    draw.size("W", least=1, most=37)
    draw.integers("target", "B? H W", 0, colours, ignored=IGNORED)
    for name in ("before", "after"):
        height, width = (draw.sizes[letter] if draw.often() else draw.choice((1, 2, 5, 13, 31)) for letter in "HW")
        shape = (*draw.shape("B?"), height, width)
        if draw.often() and math.prod(shape) * colours <= 40000:
            draw.floating(name, "", shape=(*shape, colours))
        else:
            draw.integers(name, "", 0, colours, shape=shape)
    draw.mask("valid", "B? H W", optional=True)
    if draw.rarely():
        draw.integers("source", "", 0, colours, shape=(*draw.shape("B?"), *draw.choice(((1, 1), (3, 5), (17, 2)))))
        draw.arguments["inverse"] = draw.choice((torch.t, torch.zero_, torch.Tensor.short, lambda grid: grid[:1]))
    draw.other("weights", (RewardWeights(0, 0, 0, 0), RewardWeights(1, -2, 0.5, 1e30)))


def update_target_preference(draw: Draw) -> None:
    """Of EFELoss."""
    draw.batched = draw.often()
    height, width, outcomes = plan(draw)
    draw.size("B", most=9)
    draw.sizes["max"] = max(height, width) + draw.choice((0, 0, 1))
    draw.integers("target", "B? H W", 0, outcomes, ignored=IGNORED)
    draw.mask("valid", "B? H W", optional=True)
    draw.arguments["success_rate"] = draw.choice((0.5, 0.0, 1, torch.tensor(0.25)))
    draw.floating("running", "max max C", grad=False, change=one_hots)
    del draw.parameters["running"]


def call_update(running: Tensor, target: Any, valid: Any, success_rate: Any) -> Tensor:
    size, _, outcomes = running.shape
    module = EFELoss(size, outcomes, outcomes).to(running)
    module.target_preference.copy_(running)
    module.update_target_preference(target, valid, success_rate)
    return module.target_preference


def define_update(running: Tensor, target: Tensor, valid: Tensor | None, success_rate: Any) -> Tensor:
    """Cell by cell."""
    moved = running.clone()
    target = target.long() if target.dim() == 3 else target.long()[None]
    for h in range(target.shape[1]):
        for w in range(target.shape[2]):
            colours = [
                int(grid[h, w]) for b, grid in enumerate(target)
                if int(grid[h, w]) != IGNORED and (valid is None or bool(valid.view(target.shape)[b, h, w]))
            ]  # fmt: skip
            if colours:
                mean = torch.eye(running.shape[-1], dtype=torch.float64)[colours].mean(0)
                old = running[h, w].double()
                moved[h, w] = (old + (0.05 + 0.15 * float(success_rate)) * (mean - old)).to(running.dtype)
    return moved


# Each with the strategy that draws its arguments.
FUNCTIONS: dict[str, tuple[Function, Callable[[Draw], Any]]] = {
    function.name: (function, arguments)
    for function, arguments in (
        (Function("efe_loss", efe_kernels.efe_loss, addends=16, loss=True, governs="logits"), efe_loss),
        (Function("EFELoss", call_efe_module, addends=16, loss=True, governs="logits"), efe_module),
        (Function("EFELoss.update_target_preference", call_update, define_update), update_target_preference),
        (
            Function(
                "arc_efe.EFELoss", call_arc_efe, define_arc_efe, addends=16, loss=True, governs="forward_predictions"
            ),
            arc_efe_loss,
        ),
        (Function("grid_reward", efe_kernels.grid_reward, addends=1), grid_reward),
        (Function("rl_advantage", efe_kernels.rl_advantage, constants=("reward",), addends=1), rl_advantage),
        (Function("gae", efe_kernels.gae), gae),
        (Function("vtrace", efe_kernels.vtrace, constants=("log_ratio",)), vtrace),
        (Function("td_lambda", efe_kernels.td_lambda), td_lambda),
        (Function("next_values", efe_kernels.next_values, define_next_values), next_values),
        (Function("rollout_states", efe_kernels.rollout_states, define_rollout, plain=True), rollout_states),
        (Function("policy_efe", call_policy_efe, define_policy_efe, addends=64, plain=True), policy_efe),
        (
            Function(
                "policy_gradient_loss", efe_kernels.policy_gradient_loss,
                constants=("advantage", "value_target", "old_log_prob", "old_value", "ref_log_prob"), addends=1,
                loss=True,
            ),
            policy_gradient_loss,
        ),
        (Function("masked_mean_pool", efe_kernels.masked_mean_pool), masked_mean_pool),
        (Function("refine_prompt", efe_kernels.refine_prompt, constants=("noise",), addends=16), refine_prompt),
        (Function("squashed_log_prob", efe_kernels.squashed_log_prob, addends=16), squashed_log_prob),
    )
}  # fmt: skip
