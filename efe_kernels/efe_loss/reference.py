"""The EFE loss in plain PyTorch: the definition that every kernel is measured against.

Everything here is per episode but the reduction of the total. Arithmetic is float32, float64 for float64 logits.
`efe_loss` is differentiable by autograd; `efe_loss_backward` writes the same gradient out, because an op may run where
autograd is out of reach.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from efe_kernels.common.clamp import clamp
from efe_kernels.common.library import accumulate_dtype

DIFFERENTIABLE = 7  # of the fields of Inputs
REDUCTIONS = ("mean", "sum", "none")
TERMS = ("risk", "ambiguity", "consistency", "agreement", "anchor", "prompt", "step")

# A logit of -inf means probability 0. This finite stand-in gives the same probability and keeps 0 * log 0 at 0.
LOWEST_LOGIT = -1e30
# The mean logits that the prompt term reads are clamped to this range.
PROMPT_LOGIT_RANGE = 9984.0  # about 1e4, and a number in every dtype, so that 16-bit logits are clamped exactly
TARGET_PREFERENCE_FLOOR = 1e-8
# A direction shorter than this is none: its cosine and the gradient of it are 0.
SHORTEST_DIRECTION = 1e-8


class Inputs(NamedTuple):
    """The tensors of the loss. The first ones, DIFFERENTIABLE of them, are what a gradient can be asked for."""

    logits: Tensor  # [B, T, H, W, C]
    backward_logits: Tensor | None  # [B, T, H, W, C]
    final_logits: Tensor | None  # [B, H, W, C]
    observation_probs: Tensor | None  # [B, T, H, W, C]
    preference_logits: Tensor  # [H, W, C] or [B, H, W, C]
    prompt: Tensor | None  # [B, D]
    projection: Tensor | None  # [C, D]
    target: Tensor  # [B, H, W]
    target_preference: Tensor | None  # [H, W, C]
    valid: Tensor | None  # [B, H, W]


class Settings(NamedTuple):
    weights: list[float]  # in the order of TERMS
    hard_cell: bool
    hard_cell_min_ratio: float
    max_cells: int
    ignore_index: int
    reduction: str  # of the total over B: one of REDUCTIONS

    def reduce(self, total: Tensor) -> Tensor:
        """total [B] as the op gives it."""
        if self.reduction == "none":
            return total
        return total.mean() if self.reduction == "mean" and total.shape[0] > 0 else total.sum()

    def share(self, batch: int) -> float:
        """d result / d total of one episode."""
        return 1 / batch if self.reduction == "mean" and batch > 0 else 1.0


class Outputs(NamedTuple):
    """What the op gives."""

    total: Tensor  # [B], or 0-d where it is reduced
    terms: Tensor  # [B, 7] in the order of TERMS
    mask_ratio: Tensor  # [B]
    hard_cell_scale: Tensor  # [B]
    saved: Tensor  # [B, saved_width], for backward; the reference computes everything again and leaves it at zero


def saved_width(inputs: Inputs) -> int:
    """Columns of `saved`: the cell count, then what the prompt term needs again (see kernels.py)."""
    steps, outcomes = inputs.logits.shape[1], inputs.logits.shape[-1]
    return 1 if inputs.prompt is None or inputs.projection is None else 1 + (steps + 1) * outcomes


def counted_cells(target: Tensor, valid: Tensor | None, ignore_index: int) -> Tensor:
    """[B, H, W] bool: the cells that count."""
    counted = target.long() != ignore_index
    return counted if valid is None else counted & valid


def check_target_range(target: Tensor, counted: Tensor, num_outcomes: int) -> None:
    """Raises for a target outside [0, num_outcomes) in a cell that counts. Reads the tensor, so only for the CPU."""
    # As int64: in a narrow dtype num_outcomes itself would wrap around.
    wrong = counted & ((target.long() < 0) | (target.long() >= num_outcomes))
    if bool(wrong.any()):
        value = int(target[wrong][0])
        raise ValueError(f"target must be in [0, {num_outcomes}) or ignore_index where a cell counts, it was {value}.")


def read(values: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """values [B, H, W, C] or [B, T, H, W, C] in the dtype of the arithmetic.

    What lies under a cell that does not count is never looked at, and gets a gradient of exactly 0.
    """
    cells = counted[:, None, ..., None] if values.dim() == 5 else counted[..., None]
    return torch.where(cells, values.to(dtype), 0)


def log_softmax(logits: Tensor) -> Tensor:
    """A row of -inf alone has no distribution and gives NaN, as torch's own softmax does."""
    return F.log_softmax((logits - logits.amax(-1, keepdim=True)).clamp_min(LOWEST_LOGIT), -1)


def mean_over_cells(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of values [B, ..., H, W] over the counted cells [B, H, W] and whatever lies between; [B]."""
    weight = counted.reshape(counted.shape[:1] + (1,) * (values.dim() - 3) + counted.shape[1:])
    steps = values.shape[1:-2].numel()
    total = torch.where(weight, values, 0).flatten(1).sum(1)
    return total / (steps * counted.flatten(1).sum(1).clamp_min(1))


def log_preference(preference_logits: Tensor, prompt: Tensor | None) -> Tensor:
    """log c, [B or 1, H, W, C], from preference logits [H, W, C] or [B, H, W, C] and a prompt [B, D]."""
    logits = clamp(preference_logits, LOWEST_LOGIT)
    if prompt is not None:
        logits = logits * preference_scales(prompt, logits.shape[-1])
    elif logits.dim() == 3:
        logits = logits[None]
    return F.log_softmax(logits, -1)


def preference_scales(prompt: Tensor, outcomes: int) -> Tensor:
    """sigmoid(prompt[:C]) as [B, 1, 1, C]."""
    return torch.sigmoid(prompt[:, None, None, :outcomes])


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (kl_divergence(log_p, log_mean) + kl_divergence(log_q, log_mean))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of [B, H, W, C] and [B, H, W]. A target out of range gives NaN, and an impossible one infinity."""
    outcomes = logits.shape[-1]
    loss = -F.log_softmax(logits, -1).gather(-1, target.clamp(0, outcomes - 1)[..., None])[..., 0]
    return torch.where((target >= 0) & (target < outcomes), loss, math.nan)


def observation_entropy(observation_probs: Tensor) -> Tensor:
    """H(p) of probabilities; the logarithm is clamped at the smallest normal number, so its gradient stays finite."""
    log_p = clamp(observation_probs, torch.finfo(observation_probs.dtype).tiny).log()
    return -(observation_probs * log_p).sum(-1)


def anchor_divergence(log_c: Tensor, target_preference: Tensor) -> Tensor:
    """KL(c || target preference) per cell; 0 in cells whose target preference has not been set."""
    is_set = target_preference.sum(-1) != 0
    divergence = kl_divergence(log_c, target_preference.clamp_min(TARGET_PREFERENCE_FLOOR).log())
    return torch.where(is_set, divergence, 0)


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over its length, along the last dimension, and one over that length; both 0 where x has no direction."""
    size = x.detach().abs().amax(-1, keepdim=True).clamp_min(1)
    x = x / size  # so that no square overflows
    square = (x * x).sum(-1, keepdim=True)
    defined = square > SHORTEST_DIRECTION**2
    inverse = torch.where(defined, torch.where(defined, square, 1).rsqrt(), 0)
    return x * inverse, inverse / size


def without_direction(z: Tensor, u: Tensor) -> Tensor:
    """Where one of the two is too short to have a direction: the cosine is 0, whatever the other one holds."""
    short = [(x * x).sum(-1, keepdim=True) <= SHORTEST_DIRECTION**2 for x in (z, u)]
    return short[0] | short[1]


def project(vectors: Tensor, matrix: Tensor) -> Tensor:
    """vectors [B, D] times matrix [C, D] transposed, without the half precision that autocast gives to a matmul."""
    return (vectors[:, None] * matrix).sum(-1)


def plan_direction(logits: Tensor, counted: Tensor) -> Tensor:
    """z [B, T, C]: mean over the counted cells of the logits, clamped and centred over the outcomes."""
    clamped = clamp(logits, -PROMPT_LOGIT_RANGE, PROMPT_LOGIT_RANGE)
    centred = clamped - clamped.mean(-1, keepdim=True)
    cells = counted.flatten(1).sum(1).clamp_min(1)
    return torch.where(counted[:, None, ..., None], centred, 0).sum((2, 3)) / cells[:, None, None]


def efe_loss(inputs: Inputs, settings: Settings) -> Outputs:
    """The loss of each episode, and of all."""
    logits, preference_logits, target_preference = inputs.logits, inputs.preference_logits, inputs.target_preference
    backward_logits, observation_probs = inputs.backward_logits, inputs.observation_probs
    prompt, projection = inputs.prompt, inputs.projection
    dtype = accumulate_dtype(logits)
    counted = counted_cells(inputs.target, inputs.valid, settings.ignore_index)
    final_logits = logits[:, -1] if inputs.final_logits is None else inputs.final_logits

    forward = read(logits, counted, dtype)
    log_q = log_softmax(forward)
    log_r = log_q.flip(1) if backward_logits is None else log_softmax(read(backward_logits, counted, dtype))
    preference = torch.where(counted[..., None], preference_logits.to(dtype), 0)
    log_c = log_preference(preference, None if prompt is None else prompt.to(dtype))
    cell_target = torch.where(counted, inputs.target, 0).long()
    final = read(final_logits, counted, dtype)

    zero = log_q.new_zeros(logits.shape[0])
    if observation_probs is None:
        ambiguity = entropy(log_q)
    else:
        ambiguity = observation_entropy(read(observation_probs, counted, dtype))
    anchor, prompt_term = zero, zero
    if target_preference is not None:
        divergence = anchor_divergence(log_c, target_preference.to(dtype))
        anchor = mean_over_cells(divergence.expand(counted.shape), counted)
    if prompt is not None and projection is not None:
        z, u = plan_direction(forward, counted), project(prompt.to(dtype), projection.to(dtype))[:, None]
        product = (unit(z)[0] * unit(u)[0]).sum(-1, keepdim=True)
        prompt_term = -torch.where(without_direction(z, u), 0, product)[..., 0].mean(1)
    cells = counted.flatten(1).sum(1)
    terms = torch.stack(
        [
            mean_over_cells(kl_divergence(log_q, log_c[:, None]), counted),
            mean_over_cells(ambiguity, counted),
            mean_over_cells(cross_entropy(final, cell_target), counted),
            # Rounding can take a divergence of 0 below it.
            mean_over_cells(jensen_shannon(log_q, log_r), counted).clamp_min(0),
            anchor,
            prompt_term,
            (logits.shape[1] / settings.max_cells) * cells.to(dtype),
        ],
        1,
    )
    # NaN is never the largest, as in the kernels.
    wrong = counted & (torch.where(final.isnan(), -torch.inf, final).argmax(-1) != cell_target)
    mask_ratio = wrong.flatten(1).sum(1).to(dtype) / cells.clamp_min(1)
    scale = torch.ones_like(mask_ratio)
    if settings.hard_cell:
        scale = torch.where(mask_ratio < settings.hard_cell_min_ratio, scale, 0.5 + 0.5 * mask_ratio)
    total = scale * sum((w * terms[:, k] for k, w in enumerate(settings.weights) if w != 0), zero)
    saved = zero.new_zeros(logits.shape[0], saved_width(inputs))
    return Outputs(settings.reduce(total), terms, mask_ratio, scale, saved)


def through_softmax(log_p: Tensor, f: Tensor) -> Tensor:
    """p (f - sum p f): the gradient with respect to the logits of p of a sum over outcomes p f(p) with f + p f' ~ f."""
    p = log_p.exp()
    return p * (f - (p * f).sum(-1, keepdim=True))


def direction_gradients(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of -mean_t cos(z_t, u) with respect to z [B, T, C] and u [B, C]."""
    z_unit, z_inverse = unit(z)
    u_unit, u_inverse = unit(u[:, None])
    cosine = (z_unit * u_unit).sum(-1, keepdim=True)
    none = without_direction(z, u[:, None])
    grad_z = -(u_unit - cosine * z_unit) * z_inverse / z.shape[1]
    grad_u = -(z_unit - cosine * u_unit) * u_inverse / z.shape[1]
    return torch.where(none, 0, grad_z), torch.where(none, 0, grad_u).sum(1)


def efe_loss_backward(
    grad_total: Tensor | None, grad_terms: Tensor | None, inputs: Inputs, settings: Settings, hard_cell_scale: Tensor
) -> dict[str, Tensor]:
    """Gradients of the floating-point inputs by name, in the dtype of the arithmetic. Derivation: kernels.py."""
    logits, preference_logits, target_preference = inputs.logits, inputs.preference_logits, inputs.target_preference
    backward_logits, observation_probs = inputs.backward_logits, inputs.observation_probs
    prompt, projection, final_logits = inputs.prompt, inputs.projection, inputs.final_logits
    dtype = accumulate_dtype(logits)
    counted = counted_cells(inputs.target, inputs.valid, settings.ignore_index)
    steps, outcomes = logits.shape[1], logits.shape[-1]
    if grad_total is not None:
        grad_total = grad_total * settings.share(logits.shape[0])
    upstream = [
        upstream_of_term(grad_total, grad_terms, hard_cell_scale, term, weight)[:, None, None, None]
        for term, weight in enumerate(settings.weights)
    ]
    share = (counted.to(dtype) / counted.flatten(1).sum(1).clamp_min(1)[:, None, None])[..., None]
    risk, ambiguity, consistency, agreement, anchor, direction, _ = (share * grad for grad in upstream)
    risk, ambiguity, agreement = (grad[:, None] / steps for grad in (risk, ambiguity, agreement))

    forward = read(logits, counted, dtype)
    log_q = log_softmax(forward)
    log_r = log_q.flip(1) if backward_logits is None else log_softmax(read(backward_logits, counted, dtype))
    log_sum = torch.logaddexp(log_q, log_r)
    prompt = None if prompt is None else prompt.to(dtype)
    preference = torch.where(counted[..., None], preference_logits.to(dtype), 0)
    log_c = log_preference(preference, prompt)
    found: dict[str, Tensor] = {}

    # A plan read backwards meets each step twice: as q and as r.
    f = risk * (log_q - log_c[:, None]) + agreement * (0.5 if backward_logits is not None else 1.0) * (log_q - log_sum)
    if observation_probs is None:
        f = f - ambiguity * log_q
    found["logits"] = through_softmax(log_q, f)
    if backward_logits is not None:
        found["backward_logits"] = through_softmax(log_r, 0.5 * agreement * (log_r - log_sum))
    if observation_probs is not None:
        probs = read(observation_probs, counted, dtype)
        tiny = torch.finfo(dtype).tiny
        found["observation_probs"] = -ambiguity * (probs.clamp_min(tiny).log() + (probs >= tiny))
    final = read(logits[:, -1] if final_logits is None else final_logits, counted, dtype)
    one_hot = torch.where(counted, inputs.target, 0)[..., None] == torch.arange(outcomes, device=logits.device)
    grad_final = consistency * (torch.softmax(final, -1) - one_hot.to(dtype))
    if final_logits is None:
        found["logits"][:, -1] += grad_final
    else:
        found["final_logits"] = grad_final

    grad_c = steps * risk[:, 0] * log_c.exp() - (risk * log_q.exp()).sum(1)
    if target_preference is not None:
        reference = target_preference.to(dtype)
        f = log_c - reference.clamp_min(TARGET_PREFERENCE_FLOOR).log()
        grad_c = grad_c + anchor * torch.where((reference.sum(-1) != 0)[..., None], through_softmax(log_c, f), 0)
    grad_c = read(grad_c, counted, dtype)
    found["preference_logits"] = grad_c
    if prompt is not None:
        scales = preference_scales(prompt, outcomes)
        grad_scales = (grad_c * preference.clamp_min(LOWEST_LOGIT)).sum((1, 2))
        found["prompt"] = torch.zeros_like(prompt)
        found["prompt"][:, :outcomes] = grad_scales * (scales * (1 - scales))[:, 0, 0]
        found["preference_logits"] = read(grad_c * scales, counted, dtype)
    if preference_logits.dim() == 3:
        found["preference_logits"] = found["preference_logits"].sum(0)
    if prompt is not None and projection is not None:
        projection = projection.to(dtype)
        grad_z, grad_u = direction_gradients(plan_direction(forward, counted), project(prompt, projection))
        grad_z = (grad_z - grad_z.mean(-1, keepdim=True))[:, :, None, None]
        unclamped = forward.abs() <= PROMPT_LOGIT_RANGE
        found["logits"] += torch.where(unclamped, direction[:, None] * grad_z, 0)
        grad_u = upstream[5][:, 0, 0] * grad_u
        found["prompt"] += project(grad_u, projection.T)
        found["projection"] = project(grad_u.T, prompt.T)
    elif projection is not None:
        # Whoever trains on several devices waits for the gradient of every parameter, also of one that is not read.
        found["projection"] = torch.zeros_like(projection)
    # A share of 0 does not make 0 of what is not finite.
    cells = ("logits", "backward_logits", "final_logits", "observation_probs")
    return found | {name: read(found[name], counted, dtype) for name in cells if name in found}


def upstream_of_term(
    grad_total: Tensor | None, grad_terms: Tensor | None, hard_cell_scale: Tensor, term: int, weight: float
) -> Tensor:
    """d loss / d term [B]: through the total and directly."""
    grad = torch.zeros_like(hard_cell_scale)
    if grad_total is not None and weight != 0:
        grad = grad + weight * hard_cell_scale * grad_total
    if grad_terms is not None:
        grad = grad + grad_terms[:, term]
    return grad
