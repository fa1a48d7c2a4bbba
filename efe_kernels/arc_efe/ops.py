"""The op torch.ops.efe.arc_efe_forward and its gradient: the terms that look at every cell of the plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efe_kernels.arc_efe import reference
from efe_kernels.arc_efe.reference import PlanTerms, wide_dtype
from efe_kernels.common.op import differentiable_op


def arc_efe_fake(forward_predictions: Tensor, *_: Any) -> PlanTerms:
    steps, height, width, outcomes = forward_predictions.shape
    new = forward_predictions.new_empty
    risk, bidirectional, ambiguity, reversal = (new(()) for _ in range(4))
    mean_logits = new(steps, outcomes, dtype=wide_dtype(forward_predictions.device))
    certainty, turned = new(height, width), new(steps, height, width)
    return PlanTerms(risk, bidirectional, ambiguity, reversal, mean_logits, certainty, turned)


def in_float32(*arguments: Any) -> bool:
    """By the preference: the gradient of the mean logits is in the wide dtype, and the state in any."""
    preference: Tensor = arguments[-3]  # of both ops
    return preference.dtype == torch.float32


arc_efe = differentiable_op(
    "arc_efe",
    forward=reference.arc_efe_forward,
    backward=reference.arc_efe_backward,
    wrt=("forward_predictions", "backward_predictions", "state_predictions", "observation_probs", "preference"),
    fake=arc_efe_fake,
    triton="efe_kernels.arc_efe.kernels",
    triton_takes=in_float32,
).titled("arc_efe.EFELoss")
