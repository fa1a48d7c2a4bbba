"""The op torch.ops.efe.arc_efe_forward and its gradient: the terms that look at every cell of the plan."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efe_kernels.arc_efe import reference
from efe_kernels.arc_efe.reference import PlanTerms, wide_dtype
from efe_kernels.common.op import differentiable_op


def arc_efe_fake(forward_predictions: Tensor, *_: Any) -> PlanTerms:
    steps, height, width, outcomes = forward_predictions.shape
    scalars = [forward_predictions.new_empty(()) for _ in range(5)]
    mean_logits = forward_predictions.new_empty(steps, outcomes, dtype=wide_dtype(forward_predictions.device))
    return PlanTerms(*scalars, mean_logits, forward_predictions.new_empty(steps, height, width))


arc_efe = differentiable_op(
    "arc_efe",
    forward=reference.arc_efe_forward,
    backward=reference.arc_efe_backward,
    wrt=("forward_predictions", "backward_predictions", "state_predictions", "observation_probs", "preference"),
    fake=arc_efe_fake,
    triton="efe_kernels.arc_efe.kernels",
).titled("arc_efe.EFELoss")
