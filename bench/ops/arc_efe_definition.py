"""The ARC-EFE loss term by term, in plain PyTorch: what the kernels are held against, and what they are raced with.

It reads parameters from an `efe_kernels.arc_efe.EFELoss` and lets autograd find every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from efe_kernels.arc_efe import EFELoss

EPS = 1e-8
FILL = -1e9


def cell_by_cell(colours: Tensor) -> Tensor:
    """For each interior cell the mean offset, in its 3x3 window at step t+1, of its colour at step t; [T, H, W, 2]."""
    steps, height, width = colours.shape
    wide: dict[str, Any] = {"dtype": torch.float64, "device": colours.device}
    vectors = torch.zeros(steps, height, width, 2, **wide)
    offsets = torch.tensor([(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], **wide)
    for t in range(steps - 1):
        for h in range(1, height - 1):
            for w in range(1, width - 1):
                same = colours[t + 1, h - 1 : h + 2, w - 1 : w + 2].reshape(9) == colours[t, h, w]
                if same.any():
                    vectors[t, h, w] = offsets[same].mean(0)
    return vectors


def all_at_once(colours: Tensor) -> Tensor:
    """The same as one expression over all cells."""
    steps, height, width = colours.shape
    if steps == 1 or min(height, width) < 3:
        return torch.zeros(steps, height, width, 2, device=colours.device)
    window = colours[1:].unfold(1, 3, 1).unfold(2, 3, 1)  # [T-1, H-2, W-2, 3, 3]
    same = (window == colours[:-1, 1:-1, 1:-1, None, None]).float()
    rows, columns = same.sum(-1), same.sum(-2)
    offsets = torch.stack((rows[..., 2] - rows[..., 0], columns[..., 2] - columns[..., 0]), -1)
    return F.pad(offsets / rows.sum(-1).clamp_min(1)[..., None], (0, 0, 1, 1, 1, 1, 0, 1))


def renormalize(probs: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return probs
    kept = probs * mask[..., None]
    return kept / (kept.sum(-1, keepdim=True) + EPS)


def clamp(probs: Tensor) -> Tensor:
    """The gradient passes at both ends, where that of torch's own clamp is 1 or 0, by its release."""
    return torch.where((probs < EPS) | (probs > 1), probs.detach().clamp(EPS, 1), probs)


def entropy(probs: Tensor) -> Tensor:
    return -(probs * (probs + EPS).log()).sum(-1)


def cross_entropy(final: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return F.cross_entropy(final.flatten(0, 1), target.flatten())
    cells = mask != 0
    if not cells.any():
        return final[cells].sum()
    return F.cross_entropy(final[cells], target[cells])


def definition(
    module: EFELoss,
    forward: Tensor,
    backward: Tensor,
    observation: Tensor,
    final: Tensor,
    target: Tensor,
    episode_length: int,
    prompt: Tensor | None = None,
    mask: Tensor | None = None,
    movement: Callable[[Tensor], Tensor] = cell_by_cell,
) -> dict[str, Tensor]:
    steps, height, width, outcomes = forward.shape
    area, key = height * width, f"{height}x{width}"
    preference_logits = module.preference_embeddings[key]
    count = area if mask is None else float(mask.sum())
    cell_steps = max(steps * count, 1)

    if prompt is not None:
        scales = torch.sigmoid(F.pad(prompt, (0, max(outcomes - prompt.numel(), 0)))[:outcomes])
        preference_logits = preference_logits * scales
    preference = preference_logits.softmax(-1)
    if mask is not None:
        outside = (mask == 0)[..., None]
        forward, backward = forward.masked_fill(outside, FILL), backward.masked_fill(outside, FILL)
        preference = preference.masked_fill(outside, FILL)
    q, b = forward.softmax(-1), backward.softmax(-1)

    unsure = q.max(-1).values.mean(0) <= module.inference_first_threshold
    inside = torch.ones_like(unsure) if mask is None else mask > 0
    inference_risk = (unsure & inside).sum().to(q.dtype) / (inside.sum().to(q.dtype) + EPS)
    risk = -(renormalize(clamp(preference), mask) * (renormalize(clamp(q), mask) + EPS).log()).sum() / cell_steps
    risk = risk * (0.5 + 0.5 * (1 - inference_risk))
    observed = clamp(observation)
    ambiguity = -(observed * observed.log()).sum() / (area if mask is None else cell_steps)
    rho = area / module.max_grid_size**2
    step_penalty = module.lambda_step * episode_length * math.sqrt(rho) / (1 + 0.1 * math.log(1 + rho))
    grid_norm = module.lambda_grid_norm * abs(rho - 0.5) if rho < 0.1 or rho > 1 else 0.0

    middle = clamp(0.5 * (clamp(q) + clamp(b)))
    both = renormalize(clamp(q), mask) + renormalize(clamp(b), mask)
    divergence = -0.5 * (both * (renormalize(middle, mask) + EPS).log()).sum() / cell_steps
    vectors = movement(forward.argmax(-1)).to(q)
    confidence = 1 / (1 + (entropy(q) + entropy(b)) / 2)
    reversal = ((vectors + vectors.flip(0)).norm(dim=-1) * confidence)[: steps - 1]
    if mask is None:
        reversal = reversal.sum() / area
    else:
        reversal = (reversal * mask).sum() / (count + EPS)

    z_anchoring = q.new_zeros(())
    if key in module.target_preferences_dict:
        anchor = clamp(module.target_preferences_dict[key].to(q.dtype))
        z_anchoring = (anchor * ((anchor + EPS).log() - (clamp(preference) + EPS).log())).mean()
    prompt_consistency = q.new_zeros(())
    if prompt is not None:
        direction = prompt if prompt.numel() == outcomes else module.prompt_projector(prompt)
        mean = forward.mean((1, 2))
        norms = mean.norm(dim=-1).clamp_min(EPS) * direction.norm().clamp_min(EPS)
        prompt_consistency = -((mean @ direction) / norms).mean()

    grid_matching = cross_entropy(final, target, mask)
    losses = {
        "inference_risk": inference_risk,
        "risk": risk,
        "ambiguity": ambiguity,
        "efe": module.lambda_risk * risk + module.lambda_amb * ambiguity,
        "step_penalty": q.new_tensor(step_penalty),
        "grid_norm": q.new_tensor(grid_norm),
        "grid_matching": grid_matching,
        "consistency": module.lambda_cons * grid_matching,
        "bidirectional": module.lambda_bi * (0.7 * divergence + 0.3 * reversal),
        "z_anchoring": module.lambda_z * z_anchoring,
        "prompt_consistency": module.lambda_prompt * prompt_consistency,
    }
    parts = ("grid_matching", "efe", "step_penalty", "consistency", "bidirectional", "z_anchoring")
    losses["total"] = sum(losses[name] for name in (*parts, "prompt_consistency", "grid_norm"))
    return losses
