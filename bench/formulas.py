"""The policy losses of other libraries, written out in plain PyTorch, and `policy_gradient_loss` with their settings.

    python -m bench.formulas        a table: library, name there, arguments here, largest deviation

Read in TRL's GRPOTrainer, in `core_algos.py` of verl and in `grpo_loss.py` of Liger; their later releases may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import efe_kernels

ANSWERS, LENGTH = 12, 40
MOST = 64  # tokens that an answer may have, whatever the longest one has
SEEDS = 5
LOW, HIGH, BETA, DUAL, VALUE_CLIP = 0.2, 0.28, 0.04, 3.0, 0.2

Tensors = dict[str, Tensor]
LEAVES = ("log_prob", "value", "entropy")
TOKENS = ("log_prob", "advantage", "old_log_prob", "mask")


@dataclass(frozen=True)
class Formula:
    """One loss of a library.

    arguments: of policy_gradient_loss, beside the tensors, as a reader would type them.
    tensors: what of the answers it is given.
    """

    library: str
    name: str
    theirs: Callable[[Tensors], Tensor]
    arguments: str
    tensors: tuple[str, ...] = TOKENS

    def ours(self, answers: Tensors) -> Tensor:
        settings: dict[str, Any] = eval(f"dict({self.arguments})", {"R": ANSWERS, "M": MOST})
        return efe_kernels.policy_gradient_loss(**{name: answers[name] for name in self.tensors}, **settings).total


def answers_of(seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensors:
    """Random answers of other lengths, [R, L], with an advantage for each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    log_prob, value = normal(ANSWERS, LENGTH) - 1, normal(ANSWERS, LENGTH)
    lengths = torch.randint(1, LENGTH + 1, (ANSWERS, 1), generator=generator)
    found = {
        "log_prob": log_prob,
        "old_log_prob": log_prob + 0.5 * normal(ANSWERS, LENGTH),
        "ref_log_prob": log_prob + 0.5 * normal(ANSWERS, LENGTH),
        "advantage": normal(ANSWERS),
        "value": value,
        "old_value": value + 0.3 * normal(ANSWERS, LENGTH),
        "value_target": normal(ANSWERS, LENGTH),
        "entropy": normal(ANSWERS, LENGTH).abs(),
    }
    mask = {"mask": (torch.arange(LENGTH) < lengths).to(device)}
    return {name: tensor.to(device, dtype) for name, tensor in found.items()} | mask


def clipped(ratio: Tensor, advantage: Tensor, high: float = LOW, dual_clip: float | None = None) -> Tensor:
    """The loss of each element."""
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - LOW, 1 + high))
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def ratio_of(answers: Tensors) -> Tensor:
    return (answers["log_prob"] - answers["old_log_prob"]).exp()


def sequence_ratio_of(answers: Tensors) -> Tensor:
    """[R, 1]"""
    mask = answers["mask"]
    log_ratio = (answers["log_prob"] - answers["old_log_prob"]) * mask
    return (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()


def k3(answers: Tensors) -> Tensor:
    away = answers["ref_log_prob"] - answers["log_prob"]
    return away.exp() - away - 1


def over_tokens(each: Tensor, mask: Tensor) -> Tensor:
    return (each * mask).sum() / mask.sum()


def over_answers(each: Tensor, mask: Tensor) -> Tensor:
    return ((each * mask).sum(1) / mask.sum(1)).mean()


def over_answers_of_sums(each: Tensor, mask: Tensor) -> Tensor:
    return (each * mask).sum(1).mean()


def over_constant(each: Tensor, mask: Tensor) -> Tensor:
    return (each * mask).sum() / (ANSWERS * MOST)


def grpo(
    over: Callable[[Tensor, Tensor], Tensor], *, high: float = LOW, beta: float = 0.0, delta: float | None = None,
    ratio_of: Callable[[Tensors], Tensor] = ratio_of,
) -> Callable[[Tensors], Tensor]:  # fmt: skip
    """As TRL has it, and Liger after it. delta: the upper limit of the ratio that is not clipped."""

    def loss(answers: Tensors) -> Tensor:
        advantage, ratio = answers["advantage"][:, None], ratio_of(answers)
        free = ratio if delta is None else ratio.clamp(max=delta)
        each = -torch.minimum(free * advantage, ratio.clamp(1 - LOW, 1 + high) * advantage)
        if beta:
            each = each + beta * k3(answers)
        return over(each, answers["mask"])

    return loss


def verl(over: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensors], Tensor]:
    """`compute_policy_loss`, whose dual clip is 3 by default."""

    def loss(answers: Tensors) -> Tensor:
        each = clipped(ratio_of(answers), answers["advantage"][:, None], HIGH, DUAL)
        return over(each, answers["mask"])

    return loss


def verl_gspo(answers: Tensors) -> Tensor:
    """Each token's ratio has the value of the sequence's and the gradient of the token's own log-probability."""
    log_prob = answers["log_prob"]
    ratio = (sequence_ratio_of(answers).log().detach() + log_prob - log_prob.detach()).exp()
    return over_answers(clipped(ratio, answers["advantage"][:, None]), answers["mask"])


def verl_actor(answers: Tensors) -> Tensor:
    """The loss of an actor step with entropy and KL: `entropy_coeff`, `kl_loss_coef`, `low_var_kl`."""
    mask = answers["mask"]
    policy = over_tokens(clipped(ratio_of(answers), answers["advantage"][:, None], dual_clip=DUAL), mask)
    return policy - 0.01 * over_tokens(answers["entropy"], mask) + 0.001 * over_tokens(k3(answers), mask)


def verl_critic(answers: Tensors) -> Tensor:
    """`compute_value_loss`, beside the policy loss."""
    value, old, target = answers["value"], answers["old_value"], answers["value_target"]
    held = torch.clamp(value, old - VALUE_CLIP, old + VALUE_CLIP)
    each = torch.maximum((value - target).square(), (held - target).square())
    policy = clipped(ratio_of(answers), answers["advantage"][:, None], dual_clip=DUAL)
    return over_tokens(policy, answers["mask"]) + 0.5 * over_tokens(each, answers["mask"])


WITH_REFERENCE = (*TOKENS, "ref_log_prob")
FORMULAS = (
    Formula("TRL", 'loss_type="grpo"', grpo(over_answers), 'aggregation="sequence_mean"'),
    Formula("TRL", 'loss_type="bnpo"', grpo(over_tokens), ""),
    Formula("TRL", 'loss_type="dapo", epsilon_high=0.28', grpo(over_tokens, high=HIGH), "clip_high=0.28"),
    Formula("TRL", 'loss_type="dr_grpo"', grpo(over_constant), 'aggregation="constant", normalizer=R * M'),
    Formula(
        "TRL", 'loss_type="grpo", beta=0.04', grpo(over_answers, beta=BETA),
        'aggregation="sequence_mean", kl_coef=0.04', WITH_REFERENCE,
    ),
    Formula("TRL", "delta=3.0", grpo(over_tokens, delta=DUAL), "dual_clip=3.0"),
    Formula(
        "TRL", 'importance_sampling_level="sequence", loss_type="grpo"',
        grpo(over_answers, ratio_of=sequence_ratio_of), 'level="sequence", aggregation="sequence_mean"',
    ),
    Formula(
        "TRL", 'importance_sampling_level="sequence", beta=0.04',
        grpo(over_tokens, beta=BETA, ratio_of=sequence_ratio_of), 'level="sequence", kl_coef=0.04', WITH_REFERENCE,
    ),
    Formula("verl", '"vanilla", "token-mean"', verl(over_tokens), "clip_high=0.28, dual_clip=3.0"),
    Formula(
        "verl", '"vanilla", "seq-mean-token-mean"', verl(over_answers),
        'clip_high=0.28, dual_clip=3.0, aggregation="sequence_mean"',
    ),
    Formula(
        "verl", '"vanilla", "seq-mean-token-sum"', verl(over_answers_of_sums),
        'clip_high=0.28, dual_clip=3.0, aggregation="constant", normalizer=R',
    ),
    Formula("verl", '"gspo"', verl_gspo, 'level="sequence", aggregation="sequence_mean"'),
    Formula(
        "verl", "entropy_coeff=0.01, kl_loss_coef=0.001", verl_actor, "dual_clip=3.0, kl_coef=0.001",
        (*WITH_REFERENCE, "entropy"),
    ),
    Formula(
        "verl", "cliprange_value=0.2", verl_critic, "dual_clip=3.0, value_clip=0.2, value_coef=0.5",
        (*TOKENS, "value", "value_target", "old_value"),
    ),
    Formula(
        "Liger", 'loss_type="dapo", beta=0.04', grpo(over_tokens, beta=BETA), "kl_coef=0.04", WITH_REFERENCE,
    ),
    Formula(
        "Liger", 'loss_type="dr_grpo", beta=0.04', grpo(over_constant, beta=BETA),
        'aggregation="constant", normalizer=R * M, kl_coef=0.04', WITH_REFERENCE,
    ),
)  # fmt: skip


def deviations(formula: Formula, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[float]:
    """Of the loss, relative to it where it is above 1, and of an entry of a gradient relative to the largest one."""
    answers = answers_of(seed, dtype, device)
    leaves = [answers[name].requires_grad_() for name in LEAVES if name in formula.tensors]
    losses = [loss(answers) for loss in (formula.ours, formula.theirs)]
    ours, theirs = (torch.autograd.grad(loss, leaves) for loss in losses)
    mine, other = (float(loss.detach()) for loss in losses)
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    apart = max(float((one - two).abs().max()) for one, two in zip(ours, theirs, strict=True))
    return [abs(mine - other) / max(abs(other), 1), apart / largest]


def table() -> str:
    lines = ["| library | name there | arguments here | loss | gradient |", "|---|---|---|---|---|"]
    for formula in FORMULAS:
        found = zip(*[deviations(formula, seed) for seed in range(SEEDS)], strict=True)
        largest = " | ".join(f"{max(each):.0e}" for each in found)
        arguments = f"`{formula.arguments}`" if formula.arguments else "the defaults"
        lines.append(f"| {formula.library} | `{formula.name}` | {arguments} | {largest} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
