"""The EFE loss in plain PyTorch: the definition that every kernel is measured against.

Everything here is per episode and differentiable by autograd. Arithmetic is float32, float64 for float64 logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from efe_kernels.common.library import accumulate_dtype

TERMS = ("risk", "ambiguity", "consistency", "agreement", "anchor", "prompt", "step")

# A logit of -inf means probability 0. This finite stand-in gives the same probability and keeps 0 * log 0 at 0.
LOWEST_LOGIT = -1e30
# The mean logits that the prompt term reads are clamped to this range.
PROMPT_LOGIT_RANGE = 1e4
TARGET_PREFERENCE_FLOOR = 1e-8
# A direction shorter than this is none: its cosine and the gradient of it are 0.
SHORTEST_DIRECTION = 1e-8


def counted_cells(target: Tensor, valid: Tensor | None, ignore_index: int) -> Tensor:
    """[B, H, W] bool: the cells that count."""
    counted = target != ignore_index
    return counted if valid is None else counted & valid


def check_target_range(target: Tensor, counted: Tensor, num_outcomes: int) -> None:
    """Raises for a target outside [0, num_outcomes) in a cell that counts. Reads the tensor, so only for the CPU."""
    wrong = counted & ((target < 0) | (target >= num_outcomes))
    if bool(wrong.any()):
        value = int(target[wrong][0])
        raise ValueError(f"target must be in [0, {num_outcomes}) or ignore_index where a cell counts, it was {value}.")


def mean_over_cells(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of values [B, ..., H, W] over the counted cells [B, H, W] and whatever lies between; [B]."""
    weight = counted.reshape(counted.shape[:1] + (1,) * (values.dim() - 3) + counted.shape[1:])
    steps = values.shape[1:-2].numel()
    total = torch.where(weight, values, 0).flatten(1).sum(1)
    return total / (steps * counted.flatten(1).sum(1).clamp_min(1))


def log_preference(preference_logits: Tensor, prompt: Tensor | None) -> Tensor:
    """log c, [B or 1, H, W, C], from preference logits [H, W, C] or [B, H, W, C] and a prompt [B, D]."""
    outcomes = preference_logits.shape[-1]
    logits = preference_logits.clamp_min(LOWEST_LOGIT)
    if prompt is not None:
        logits = logits * torch.sigmoid(prompt[:, None, None, :outcomes])
    elif logits.dim() == 3:
        logits = logits[None]
    return F.log_softmax(logits, -1)


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (kl_divergence(log_p, log_mean) + kl_divergence(log_q, log_mean))


def observation_entropy(observation_probs: Tensor) -> Tensor:
    """H(p) of probabilities; the logarithm is clamped at the smallest normal number, so its gradient stays finite."""
    log_p = observation_probs.clamp_min(torch.finfo(observation_probs.dtype).tiny).log()
    return -(observation_probs * log_p).sum(-1)


def anchor_divergence(log_c: Tensor, target_preference: Tensor) -> Tensor:
    """KL(c || target preference) per cell; 0 in cells whose target preference has not been set."""
    is_set = target_preference.sum(-1) != 0
    divergence = kl_divergence(log_c, target_preference.clamp_min(TARGET_PREFERENCE_FLOOR).log())
    return torch.where(is_set, divergence, 0)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine over the last dimension; 0 with gradient 0 where either vector has no direction."""
    squares = (x * x).sum(-1), (y * y).sum(-1)
    defined = (squares[0] > SHORTEST_DIRECTION**2) & (squares[1] > SHORTEST_DIRECTION**2)
    norm = (torch.where(defined, squares[0], 1) * torch.where(defined, squares[1], 1)).sqrt()
    return torch.where(defined, (x * y).sum(-1) / norm, 0)


def prompt_agreement(logits: Tensor, counted: Tensor, direction: Tensor) -> Tensor:
    """Mean over steps of cos(z_t, direction) for logits [B, T, H, W, C] and direction = W e [B, C]; [B]."""
    clamped = logits.clamp(-PROMPT_LOGIT_RANGE, PROMPT_LOGIT_RANGE)
    centered = clamped - clamped.mean(-1, keepdim=True)
    cells = counted.flatten(1).sum(1).clamp_min(1)
    z = torch.where(counted[:, None, ..., None], centered, 0).sum((2, 3)) / cells[:, None, None]
    return cosine(z, direction[:, None]).mean(1)


def efe_loss(
    logits: Tensor,
    backward_logits: Tensor | None,
    final_logits: Tensor | None,
    observation_probs: Tensor | None,
    target: Tensor,
    preference_logits: Tensor,
    prompt: Tensor | None,
    projection: Tensor | None,
    target_preference: Tensor | None,
    valid: Tensor | None,
    weights: list[float],
    hard_cell: bool,
    hard_cell_min_ratio: float,
    max_cells: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total [B], terms [B, 7] in the order of TERMS, mask ratio [B] and hard-cell scale [B].

    Shapes: logits, backward_logits and observation_probs [B, T, H, W, C]; final_logits [B, H, W, C]; target and valid
    [B, H, W]; preference_logits [H, W, C] or [B, H, W, C]; prompt [B, D]; projection [C, D]; target_preference [H, W, C].
    """
    dtype = accumulate_dtype(logits)
    counted = counted_cells(target, valid, ignore_index)
    final_logits = logits[:, -1] if final_logits is None else final_logits

    def read(values: Tensor) -> Tensor:
        # What lies under a cell that does not count is never looked at, and gets a gradient of exactly 0.
        cells = counted[:, None, ..., None] if values.dim() == 5 else counted[..., None]
        return torch.where(cells, values.to(dtype), 0)

    forward = read(logits)
    log_q = F.log_softmax(forward.clamp_min(LOWEST_LOGIT), -1)
    if backward_logits is None:
        log_r = log_q.flip(1)
    else:
        log_r = F.log_softmax(read(backward_logits).clamp_min(LOWEST_LOGIT), -1)
    log_c = log_preference(preference_logits.to(dtype), None if prompt is None else prompt.to(dtype))
    cell_target = torch.where(counted, target, 0).long()
    final = read(final_logits)

    zero = log_q.new_zeros(logits.shape[0])
    if observation_probs is None:
        ambiguity = entropy(log_q)
    else:
        ambiguity = observation_entropy(read(observation_probs))
    anchor, prompt_term = zero, zero
    if target_preference is not None:
        divergence = anchor_divergence(log_c, target_preference.to(dtype))
        anchor = mean_over_cells(divergence.expand(counted.shape), counted)
    if prompt is not None and projection is not None:
        prompt_term = -prompt_agreement(forward, counted, prompt.to(dtype) @ projection.to(dtype).T)
    cells = counted.flatten(1).sum(1)
    terms = torch.stack(
        [
            mean_over_cells(kl_divergence(log_q, log_c[:, None]), counted),
            mean_over_cells(ambiguity, counted),
            mean_over_cells(F.cross_entropy(final.movedim(-1, 1), cell_target, reduction="none"), counted),
            mean_over_cells(jensen_shannon(log_q, log_r), counted),
            anchor,
            prompt_term,
            (logits.shape[1] / max_cells) * cells.to(dtype),
        ],
        1,
    )
    wrong = counted & (final.argmax(-1) != cell_target)
    mask_ratio = wrong.flatten(1).sum(1).to(dtype) / cells.clamp_min(1)
    scale = torch.ones_like(mask_ratio)
    if hard_cell:
        scale = torch.where(mask_ratio < hard_cell_min_ratio, scale, 0.5 + 0.5 * mask_ratio)
    total = scale * sum((w * terms[:, k] for k, w in enumerate(weights) if w != 0), zero)
    return total, terms, mask_ratio, scale
