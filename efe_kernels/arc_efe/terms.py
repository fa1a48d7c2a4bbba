"""The terms of the ARC-EFE loss that look at every cell of the plan."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from efe_kernels.common.clamp import clamp
from efe_kernels.common.op import first_order, spread

EPS = 1e-8
# What masked cells are filled with: their logits, and their preference *probabilities*.
FILL = -1e9
IGNORE_INDEX = -100


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it. Everything without a step dimension is so small that it is computed in it."""
    return torch.float32 if device.type == "mps" else torch.float64


def renormalizer(probs: Tensor, mask: Tensor | None) -> Tensor | None:
    """m / (Σ_c p·m + eps) for probs [C, ..., H, W]: what R multiplies them with. None without a mask."""
    return None if mask is None else mask / (probs.sum(0) * mask + EPS)


def renormalize(probs: Tensor, scale: Tensor | None) -> Tensor:
    return probs if scale is None else probs * scale


def renormalize_backward_(grad: Tensor, kept: Tensor, scale: Tensor | None) -> Tensor:
    """R_c = a p_c with a = m / (m Σ p + eps), so dR_c/dp_k = a (δ_ck − R_c). Overwrites grad g with a (g − Σ_c g R)."""
    return grad if scale is None else grad.sub_((grad * kept).sum(0)).mul_(scale)


def inside_clamp(clamped: Tensor, values: Tensor) -> Tensor:
    """1 where clamp passes a gradient, else 0. As floats: into bool, a comparison takes the CPU three times as long."""
    return torch.eq(clamped, values, out=torch.empty_like(values))


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
        moves = F.pad(offsets / rows.sum(0).clamp_min_(1), (1, 1, 1, 1, 0, 1))
    both = moves + moves.flip(1)
    both[:, -1] = 0
    return both.square_().sum(0).sqrt_()


class PlanTerms(torch.autograd.Function):
    """What the loss needs of the plan, in few passes and with the gradient in closed form.

    Forward and backward logits are one channel-first tensor [C, 2, T, H, W] inside: sums over C are sums of long rows.
    """

    @staticmethod
    def plain(
        forward: Tensor, backward: Tensor, state: Tensor, observation: Tensor, preference: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What `forward` gives, differentiable by autograd."""
        logits = torch.stack((forward.movedim(-1, 0), backward.movedim(-1, 0)), 1)
        if mask is not None:
            logits = logits.masked_fill(mask == 0, FILL)
        probs = logits.softmax(0)
        clamped = clamp(probs, EPS, 1)
        middle = 0.5 * (clamped[:, 0] + clamped[:, 1])
        kept, middle = (renormalize(p, renormalizer(p, mask)) for p in (clamped, middle))
        observed = clamp(observation, EPS, 1)
        return (
            -(preference * (kept[:, 0] + EPS).log().sum(1)).sum(),
            -0.5 * (kept.sum(1) * (middle + EPS).log()).sum(),
            -(observed * observed.log()).sum(),
            1 / (1 - 0.5 * (probs * (probs + EPS).log()).sum((0, 1))),
            logits[:, 0].mean((2, 3), dtype=wide_dtype(logits.device)).T,
            probs[:, 0].amax(0).detach(),
            logits[:, 0].argmax(0),
        )

    @staticmethod
    def forward(
        ctx: Any,
        forward: Tensor,  # [T, H, W, C]
        backward: Tensor,  # [T, H, W, C]
        state: Tensor,  # [T, H, W, C], not read
        observation: Tensor,  # [T, H, W, C]
        preference: Tensor,  # [C, H, W], R(clamp P)
        mask: Tensor | None,  # [H, W], in the dtype of the plans
    ) -> tuple[Tensor, ...]:
        """The sums of risk, Bi and ambiguity, conf [T, H, W] and the mean logits [T, C].

        Also, without gradient, max_c q and argmax_c q, both [T, H, W].
        """
        logits = torch.stack((forward.movedim(-1, 0), backward.movedim(-1, 0)), 1)
        if mask is not None:
            logits.masked_fill_(mask == 0, FILL)
        probs = logits.softmax(0)
        mean_logits = logits[:, 0].mean((2, 3), dtype=wide_dtype(logits.device)).T

        clamped = probs.clamp(EPS, 1)
        scale = renormalizer(clamped, mask)
        kept = renormalize(clamped, scale)
        log_kept = (kept[:, 0] + EPS).log_().sum(1)
        risk = -(preference * log_kept).sum()

        middle = (clamped[:, 0] + clamped[:, 1]).mul_(0.5)
        middle_scale = renormalizer(middle, mask)
        middle = renormalize(middle, middle_scale)
        log_middle = (middle + EPS).log_()
        bidirectional = -0.5 * (kept.sum(1) * log_middle).sum()

        log_probs = (probs + EPS).log_()
        conf = 1 / (1 - 0.5 * (probs * log_probs).sum((0, 1)))

        observed = observation.clamp(EPS, 1)
        log_observed = observed.log()
        ambiguity = -(observed * log_observed).sum()

        # Through max: on the CPU argmax over a leading dimension takes ten times as long.
        largest, colours = probs[:, 0].amax(0), logits[:, 0].max(0).indices
        ctx.mark_non_differentiable(largest, colours)
        inputs = (forward, backward, state, observation, preference, mask)
        results = (probs, clamped, kept, scale, log_kept, middle, middle_scale, log_middle, log_probs, conf)
        ctx.save_for_backward(*inputs, *results, observed, log_observed)
        return risk, bidirectional, ambiguity, conf, mean_logits, largest, colours

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:5])
        found = first_order("arc_efe.EFELoss", plan_gradients, needs, *upstream[:5], *ctx.saved_tensors)
        return *spread(found, needs), None


def plan_gradients(
    needs: list[bool],
    risk: Tensor,
    bidirectional: Tensor,
    ambiguity: Tensor,
    conf: Tensor,
    mean_logits: Tensor,
    *saved: Tensor,
) -> list[Tensor]:
    """The needed gradients of PlanTerms' first five arguments, from those of its first five results.

    With g the upstream gradients, K = R(clamp p) and k = R(M):
    dK = −½ g_Bi log(k + eps), for the forward plan also − g_risk P / (K + eps); dk = −½ g_Bi Σ_plans K / (k + eps).
    conf = 1 / (1 − ½ Σ p log(p + eps)), so dp = ½ g_conf conf² (log(p + eps) + p / (p + eps)).
    Softmax: dx = p (g − Σ_c p g).
    """
    _, _, state, observation, preference, mask, *results, observed, log_observed = saved
    probs, clamped, kept, scale, log_kept, middle, middle_scale, log_middle, log_probs, certainty = results
    gradients = []
    if needs[0] or needs[1]:
        shared = log_middle * (-0.5 * bidirectional)
        own = torch.addcdiv(shared, (-risk * preference).unsqueeze(1), kept[:, 0] + EPS)
        grad = renormalize_backward_(torch.stack((own, shared), 1), kept, scale)
        grad_middle = renormalize_backward_(kept.sum(1).div_(middle + EPS), middle, middle_scale)
        # clamp is the identity on M, which is the mean of two numbers in [eps, 1].
        grad.addcmul_(grad_middle.unsqueeze(1), -0.25 * bidirectional).mul_(inside_clamp(clamped, probs))
        grad.addcmul_(torch.addcdiv(log_probs, probs, probs + EPS), 0.5 * conf * certainty**2)
        grad.sub_((grad * probs).sum(0)).mul_(probs)
        grad_mean = (mean_logits.T / probs.shape[-2:].numel()).to(probs.dtype)[..., None, None]
        grad[:, 0] += grad_mean if mask is None else grad_mean * (mask != 0)
        gradients += [plan for plan, needed in zip(grad.movedim(0, -1), needs[:2], strict=True) if needed]
    if needs[2]:
        gradients.append(torch.zeros_like(state))
    if needs[3]:
        gradients.append((log_observed + 1).mul_(-ambiguity).mul_(inside_clamp(observed, observation)))
    if needs[4]:
        gradients.append(-risk * log_kept)
    return gradients


def mean_cross_entropy(final: Tensor, target: Tensor, outside: Tensor | None) -> Tensor:
    """Mean CE of final [H, W, C] against target [H, W] over the cells that are not outside; 0 where there is none."""
    target = target.long()
    if outside is not None:
        target = target.masked_fill(outside, IGNORE_INDEX)
        final = final.masked_fill(outside[..., None], 0)
    final = final.to(wide_dtype(final.device)).flatten(0, 1)
    total = F.cross_entropy(final, target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (target != IGNORE_INDEX).sum().clamp_min(1)
