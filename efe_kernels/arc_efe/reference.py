"""The definition of the ARC-EFE loss's terms that look at every cell of the plan, and their gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from efe_kernels.common.clamp import clamp

EPS = 1e-8
# What masked cells are filled with: their logits, and their preference *probabilities*.
FILL = -1e9


class PlanTerms(NamedTuple):
    """Sums over the plan, scalars, and what else is asked of it."""

    risk: Tensor
    bidirectional: Tensor
    ambiguity: Tensor
    reversal: Tensor
    mean_logits: Tensor  # [T, C], of the forward plan, in the wide dtype
    certainty: Tensor  # [H, W], the mean over the steps of its largest probability, without gradient
    turned: Tensor  # [T, H, W], the reversal of each cell but for the confidence in it, without gradient


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it. Everything without a step dimension is so small that it is computed in it."""
    return torch.float32 if device.type == "mps" else torch.float64


def renormalizer(probs: Tensor, mask: Tensor | None) -> Tensor | None:
    """m / (Σ_c p·m + eps) for probs [C, ..., H, W]: what R multiplies them with. None without a mask."""
    return None if mask is None else mask / (probs.sum(0) * mask + EPS)


def renormalize(probs: Tensor, mask: Tensor | None) -> Tensor:
    """R p, for probs [C, ..., H, W]."""
    scale = renormalizer(probs, mask)
    return probs if scale is None else probs * scale


def renormalize_backward(grad: Tensor, kept: Tensor, scale: Tensor | None) -> Tensor:
    """R_c = a p_c with a = m / (m Σ p + eps), so dR_c/dp_k = a (δ_ck − R_c). From g, a (g − Σ_c g R)."""
    return grad if scale is None else (grad - (grad * kept).sum(0)) * scale


def movement_reversal(colours: Tensor, dtype: torch.dtype) -> Tensor:
    """‖mv_t + mv_{T−1−t}‖ for t ≤ T−2 and 0 for T−1, [T, H, W], from colours [T, H, W].

    mv_t is the mean offset (dy, dx) at which the 3x3 window around an interior cell, its centre included, has at step
    t+1 the colour that the cell has at step t. Zero where it does not have it, on the border and at t = T−1.
    """
    steps, height, width = colours.shape
    moves = torch.zeros(2, steps, height, width, dtype=dtype, device=colours.device)
    if steps > 1 and height > 2 and width > 2:
        window = colours[1:].unfold(1, 3, 1).unfold(2, 3, 1).movedim((3, 4), (0, 1))
        found = (window == colours[:-1, 1:-1, 1:-1]).to(dtype)
        rows, columns = found.sum(1), found.sum(0)
        offsets = torch.stack((rows[2] - rows[0], columns[2] - columns[0]))
        moves = F.pad(offsets / rows.sum(0).clamp_min(1), (1, 1, 1, 1, 0, 1))
    both = moves + moves.flip(1)
    both[:, -1] = 0
    return both.square().sum(0).sqrt()


class Plans(NamedTuple):
    """Both plans as one, [C, 2, T, H, W]: sums over C are sums of long rows."""

    logits: Tensor
    probs: Tensor
    clamped: Tensor
    middle: Tensor  # [C, T, H, W]
    surprise: Tensor  # log(p + eps)
    confidence: Tensor  # [T, H, W]


def plans_of(forward_predictions: Tensor, backward_predictions: Tensor, mask: Tensor | None) -> Plans:
    logits = torch.stack((forward_predictions.movedim(-1, 0), backward_predictions.movedim(-1, 0)), 1)
    if mask is not None:
        logits = logits.masked_fill(mask == 0, FILL)
    probs = logits.softmax(0)
    clamped = clamp(probs, EPS, 1)
    surprise = (probs + EPS).log()
    confidence = 1 / (1 - 0.5 * (probs * surprise).sum((0, 1)))
    return Plans(logits, probs, clamped, 0.5 * (clamped[:, 0] + clamped[:, 1]), surprise, confidence)


def arc_efe_forward(
    forward_predictions: Tensor,
    backward_predictions: Tensor,
    state_predictions: Tensor,
    observation_probs: Tensor,
    preference: Tensor,
    mask: Tensor | None,
) -> PlanTerms:
    """The terms of one plan in one dtype, float32 or float64.

    forward_predictions, backward_predictions: logits [T, H, W, C]; state_predictions: [T, H, W, C], not read;
    observation_probs: [T, H, W, C]; preference: R(clamp P), [C, H, W]; mask: [H, W], at least 0.
    """
    plans = plans_of(forward_predictions, backward_predictions, mask)
    kept, middle = renormalize(plans.clamped, mask), renormalize(plans.middle, mask)
    observed = clamp(observation_probs, EPS, 1)
    turned = movement_reversal(plans.logits[:, 0].detach().argmax(0), preference.dtype)
    if mask is not None:
        turned = turned * mask
    largest = plans.probs[:, 0].detach().amax(0)
    return PlanTerms(
        risk=-(preference * (kept[:, 0] + EPS).log().sum(1)).sum(),
        bidirectional=-0.5 * (kept.sum(1) * (middle + EPS).log()).sum(),
        ambiguity=-(observed * observed.log()).sum(),
        reversal=(turned * plans.confidence).sum(),
        mean_logits=plans.logits[:, 0].mean((2, 3), dtype=wide_dtype(preference.device)).T.contiguous(),
        # From the first one on, so that the mean of equal numbers is that number, which may be the threshold.
        certainty=largest[0] + (largest - largest[0]).mean(0),
        turned=turned,
    )


def arc_efe_backward(
    grad_risk: Tensor | None,
    grad_bidirectional: Tensor | None,
    grad_ambiguity: Tensor | None,
    grad_reversal: Tensor | None,
    grad_mean_logits: Tensor | None,
    needs: list[bool],
    forward_predictions: Tensor,
    backward_predictions: Tensor,
    state_predictions: Tensor,
    observation_probs: Tensor,
    preference: Tensor,
    mask: Tensor | None,
    turned: Tensor,
) -> list[Tensor]:
    """The gradients of the first five arguments that `needs` asks for.

    With g the upstream gradients, K = R(clamp p) and k = R(M):
    dK = −½ g_Bi log(k + eps), for the forward plan also − g_risk P / (K + eps); dk = −½ g_Bi Σ_plans K / (k + eps).
    conf = 1 / (1 − ½ Σ p log(p + eps)), so dp = ½ g_conf conf² (log(p + eps) + p / (p + eps)).
    Softmax: dx = p (g − Σ_c p g).
    """
    upstream = (grad_risk, grad_bidirectional, grad_ambiguity, grad_reversal)
    risk, bidirectional, ambiguity, reversal = (0.0 if grad is None else grad for grad in upstream)
    _, probs, clamped, middle, surprise, confidence = plans_of(forward_predictions, backward_predictions, mask)
    scale, middle_scale = renormalizer(clamped, mask), renormalizer(middle, mask)
    kept, middle = renormalize(clamped, mask), renormalize(middle, mask)
    gradients = []
    if needs[0] or needs[1]:
        shared = -0.5 * bidirectional * (middle + EPS).log()
        own = shared - (risk * preference).unsqueeze(1) / (kept[:, 0] + EPS)
        grad = renormalize_backward(torch.stack((own, shared), 1), kept, scale)
        grad_middle = renormalize_backward(kept.sum(1) / (middle + EPS), middle, middle_scale)
        # clamp is the identity on M, which is the mean of two numbers in [eps, 1].
        grad = (grad - 0.25 * bidirectional * grad_middle.unsqueeze(1)) * (clamped == probs)
        grad = grad + 0.5 * reversal * turned * confidence**2 * (surprise + probs / (probs + EPS))
        grad = probs * (grad - (grad * probs).sum(0))
        if grad_mean_logits is not None:
            grad_mean = (grad_mean_logits.T / turned[0].numel()).to(grad.dtype)[..., None, None]
            grad[:, 0] += grad_mean if mask is None else grad_mean * (mask != 0)
        plans = [plan.clone(memory_format=torch.contiguous_format) for plan in grad.movedim(0, -1)]
        gradients += [plan for plan, need in zip(plans, needs[:2], strict=True) if need]
    if needs[2]:
        gradients.append(torch.zeros_like(state_predictions))
    if needs[3]:
        observed = clamp(observation_probs, EPS, 1)
        gradients.append(-ambiguity * (observed.log() + 1) * (observed == observation_probs))
    if needs[4]:
        gradients.append(-risk * (kept[:, 0] + EPS).log().sum(1))
    return [gradient.contiguous() for gradient in gradients]
