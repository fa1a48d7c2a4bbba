"""The module that an ARC-EFE project's `EFELoss` is replaced by."""

from __future__ import annotations

import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efe_kernels.arc_efe.ops import arc_efe
from efe_kernels.arc_efe.reference import EPS, FILL, PlanTerms, renormalize, wide_dtype
from efe_kernels.common import checks
from efe_kernels.common.clamp import clamp
from efe_kernels.common.library import accumulate_dtype

IGNORE_INDEX = -100
INITIAL_PREFERENCE_STD = 0.01
MAPPER_WIDTH = 128
TOTAL = (
    "efe",
    "step_penalty",
    "grid_norm",
    "grid_matching",
    "consistency",
    "bidirectional",
    "z_anchoring",
    "prompt_consistency",
)


def height_and_width(size: Any) -> tuple[int, int]:
    """An entry of grid_sizes, of ints or of integer tensors."""
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError) as error:
        raise TypeError(f"grid_sizes must hold pairs (H, W) of integers, it held {size!r}.") from error
    return height, width


def mean_cross_entropy(final: Tensor, target: Tensor, outside: Tensor | None) -> Tensor:
    """Mean CE of final [H, W, C] against target [H, W] over the cells that are not outside; 0 where there is none."""
    target = target.long()
    if outside is not None:
        target = target.masked_fill(outside, IGNORE_INDEX)
        final = final.masked_fill(outside[..., None], 0)
    final = final.to(wide_dtype(final.device)).flatten(0, 1)
    total = F.cross_entropy(final, target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (target != IGNORE_INDEX).sum().clamp_min(1)


class EFELoss(nn.Module):
    """The loss of an ARC-EFE project, number for number. One puzzle per call.

    Where it departs from the Expected Free Energy, on purpose, because its users have tuned their weights to it:

    - `risk` is the cross-entropy −Σ P log q of the preference P and the plan, not the divergence KL(q ‖ P). The more
      cells are unsure (`inference_risk` is their share), the less it counts, down to half.
    - `bidirectional` is the Jensen-Shannon divergence of the two plans without its entropy terms, so it is not 0 for
      equal plans; 0.3 of it is about colours that move, and its only gradient is that of the confidence in them.
    - The cross-entropy of the final grid counts twice: `grid_matching` and `consistency` are the same number, up to
      lambda_cons, and `total` has both.
    - `ambiguity` sums over all cells, masked ones too. It is divided by T·N with a mask, by H·W without.
    - `z_anchoring` is a mean over H·W·C, masked cells included.
    - With masked cells, `prompt_consistency` hardly depends on the plan: the fill of −1e9 drowns its mean logits.

    `efe_kernels.EFELoss` is the equation, for batches, and has none of these.

    Args:
        lambda_risk .. lambda_grid_norm: weights of efe's two terms, step_penalty, consistency, bidirectional,
            z_anchoring, prompt_consistency and grid_norm.
        max_grid_size: side of the grid by whose area step_penalty and grid_norm measure a grid.
        num_colors: number of outcomes C.
        prompt_dim: dimension D of prompts.

    Attributes:
        preference_embeddings: ParameterDict "HxW" -> preference logits [H, W, C]. An entry is drawn from N(0, 0.01²)
            when its size is first met, by a call or by `ensure_preference`, or created by `load_state_dict`. An
            optimizer trains only what exists when it is made: call `ensure_preference` for every size before. A
            training call that makes one warns.
        prompt_projector: Linear D -> C.
        inference_first_threshold: a cell whose largest probability, averaged over the steps, is not above it counts in
            inference_risk.
        target_preferences_dict: dict "HxW" -> running preference [H, W, C], see `update_target_preference`. It follows
            the module's device and dtype. It is not in `state_dict`, whose keys are those of an ARC-EFE project; to
            resume with it, save it beside.
        ema_success_rate: buffer, the running mean of the success rates with the decay ema_decay.

    For the keys and the order of an ARC-EFE project's checkpoints, and for the random numbers that are drawn after the
    constructor, there are also target_preferences_initialized, prompt_preference_mapper and grid_match_history, which
    the loss does not use. DistributedDataParallel needs find_unused_parameters=True because of them, as it does there.
    """

    target_preferences_initialized: Tensor
    ema_success_rate: Tensor

    def __init__(
        self,
        lambda_risk: float = 1.0,
        lambda_amb: float = 0.0,
        lambda_step: float = 0.1,
        lambda_cons: float = 1.0,
        lambda_bi: float = 0.5,
        lambda_z: float = 0.2,
        lambda_prompt: float = 0.3,
        lambda_grid_norm: float = 0.1,
        max_grid_size: int = 30,
        num_colors: int = 10,
        prompt_dim: int = 256,
    ) -> None:
        super().__init__()
        max_grid_size = checks.integer("max_grid_size", max_grid_size, low=1)
        num_colors = checks.integer("num_colors", num_colors, low=1)
        prompt_dim = checks.integer("prompt_dim", prompt_dim, low=1)
        self.lambda_risk = checks.number("lambda_risk", lambda_risk)
        self.lambda_amb = checks.number("lambda_amb", lambda_amb)
        self.lambda_step = checks.number("lambda_step", lambda_step)
        self.lambda_cons = checks.number("lambda_cons", lambda_cons)
        self.lambda_bi = checks.number("lambda_bi", lambda_bi)
        self.lambda_z = checks.number("lambda_z", lambda_z)
        self.lambda_prompt = checks.number("lambda_prompt", lambda_prompt)
        self.lambda_grid_norm = checks.number("lambda_grid_norm", lambda_grid_norm)
        self.max_grid_size = max_grid_size
        self.num_colors = num_colors
        self.prompt_dim = prompt_dim
        self.preference_embeddings = nn.ParameterDict()
        self.prompt_projector = nn.Linear(prompt_dim, num_colors)
        self.prompt_preference_mapper = nn.Sequential(
            nn.Linear(prompt_dim, MAPPER_WIDTH), nn.ReLU(), nn.Linear(MAPPER_WIDTH, MAPPER_WIDTH), nn.ReLU()
        )
        self.register_buffer("target_preferences_initialized", torch.tensor(False))
        self.register_buffer("ema_success_rate", torch.tensor(0.5))
        self.ema_decay = 0.99
        self.inference_first_threshold = 0.7
        self.target_preferences_dict: dict[str, Tensor] = {}
        self.grid_match_history: dict[str, Any] = {}

    def ensure_preference(self, height: int, width: int) -> nn.Parameter:
        """The preference logits [height, width, C] of that grid size, made now if there are none yet."""
        height, width = checks.integer("height", height, low=1), checks.integer("width", width, low=1)
        key = f"{height}x{width}"
        if key not in self.preference_embeddings:
            weight = self.prompt_projector.weight
            with torch.inference_mode(False):
                values = torch.randn(height, width, self.num_colors, dtype=weight.dtype, device=weight.device)
                self.preference_embeddings[key] = nn.Parameter(INITIAL_PREFERENCE_STD * values)
        return self.preference_embeddings[key]

    @torch.no_grad()
    def update_target_preference(
        self,
        successful_outcomes: Sequence[Tensor],
        grid_sizes: Sequence[tuple[int, int]],
        success_rate: float = 0.5,
    ) -> None:
        """Move the running preference of each size toward the mean of the one-hots of its outcomes.

        Each size moves once, by the factor 0.05 + 0.15 * success_rate; the first mean of a size is taken as it is.
        Probabilities are kept at or above 1e-8. ema_success_rate moves by 1 - ema_decay toward success_rate. Without
        outcomes nothing changes, and neither does it where a call is refused.

        Args:
            successful_outcomes: grids [H, W] of integers in [0, C).
            grid_sizes: their (H, W); of a grid that is larger, because it is padded, the top-left part is read.
            success_rate: in [0, 1].

        Raises:
            TypeError: for an outcome that is not of integers: in an ARC-EFE project it counts as a grid of nothing.
            ValueError: for lists of unequal length, which there change nothing, and for a wrong shape, colour or rate.
        """
        if isinstance(success_rate, Tensor) and success_rate.dim() == 0:
            success_rate = success_rate.item()
        success_rate = checks.number("success_rate", success_rate, 0, 1)
        for name, given in (("successful_outcomes", successful_outcomes), ("grid_sizes", grid_sizes)):
            if not isinstance(given, Sequence | Tensor):
                raise TypeError(f"{name} must be a list, it was {type(given).__name__}.")
        if len(successful_outcomes) != len(grid_sizes):
            raise ValueError(
                f"grid_sizes must have one (H, W) for each of the {len(successful_outcomes)} successful_outcomes, "
                f"it had {len(grid_sizes)}."
            )
        one_hots: dict[str, list[Tensor]] = {}
        for outcome, size in zip(successful_outcomes, grid_sizes, strict=True):
            height, width = height_and_width(size)
            one_hots.setdefault(f"{height}x{width}", []).append(self._one_hot(outcome, (height, width)))
        if not one_hots:
            return
        for key, found in one_hots.items():
            mean = torch.stack(found).mean(0).clamp_min(EPS)
            running = self.target_preferences_dict.get(key)
            if running is not None:
                running = running.to(mean)
                mean = running + (0.05 + 0.15 * success_rate) * (mean - running)
            self.target_preferences_dict[key] = mean
        self.ema_success_rate.mul_(self.ema_decay).add_((1 - self.ema_decay) * success_rate)

    def _one_hot(self, outcome: Tensor, size: tuple[int, int]) -> Tensor:
        """The one-hot [H, W, C] of the top-left part of a grid."""
        weight = self.prompt_projector.weight
        try:
            grid = torch.as_tensor(outcome, device=weight.device)
        except (TypeError, ValueError, RuntimeError) as error:
            found = type(outcome).__name__
            raise TypeError(f"successful_outcomes must hold grids of integers, it held {found}: {error}.") from error
        checks.check_integer("successful_outcomes", grid)
        grid = grid[: size[0], : size[1]].long()
        checks.Sizes("successful_outcomes", grid, "H W", H=size[0], W=size[1])
        outside = (grid < 0) | (grid >= self.num_colors)
        if grid.device.type == "cpu" and outside.any():
            raise ValueError(
                f"successful_outcomes must hold colours in [0, {self.num_colors}), it held {int(grid[outside][0])}."
            )
        # As a comparison, so that elsewhere, where looking would cost a synchronisation, such a colour is in no bin.
        return (grid[..., None] == torch.arange(self.num_colors, device=grid.device)).to(accumulate_dtype(weight))

    def forward(
        self,
        forward_predictions: Tensor,
        backward_predictions: Tensor,
        state_predictions: Tensor,
        observation_probs: Tensor,
        final_prediction: Tensor,
        target_outcome: Tensor,
        episode_length: float | Tensor,
        prompt_embedding: Tensor | None = None,
        grid_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of one plan, and every term of it.

        float16 and bfloat16 plans are computed in float32, also under autocast, and give float32 losses; others give
        losses of their own dtype. Each gradient is in the dtype of its input.

        Args:
            forward_predictions, backward_predictions: logits [T, H, W, C].
            state_predictions: [T, H, W, C]. The loss does not depend on them: their gradient is 0.
            observation_probs: probabilities [T, H, W, C].
            final_prediction: logits [H, W, C].
            target_outcome: integers [H, W] in [0, C) where the mask is not 0.
            episode_length: number of steps that step_penalty charges, a number or a 0-d tensor.
            prompt_embedding: [D], or [C], which is not projected. Its first C entries scale the preference.
            grid_mask: [H, W], 0 for cells that do not count, else 1.

        Returns:
            Scalars, each to be minimised: inference_risk (which has no gradient), risk and ambiguity without their
            lambda; efe, step_penalty, grid_norm, grid_matching, consistency, bidirectional, z_anchoring and
            prompt_consistency with it; total, the sum of these eight.
        """
        steps, height, width = self._check(
            forward_predictions,
            backward_predictions,
            state_predictions,
            observation_probs,
            final_prediction,
            target_outcome,
            prompt_embedding,
            grid_mask,
        )
        dtype = accumulate_dtype(forward_predictions)
        if isinstance(episode_length, Tensor):
            episode_length = episode_length.to(dtype)
        else:
            episode_length = checks.number("episode_length", episode_length)
        mask = None if grid_mask is None else grid_mask.detach().to(dtype)
        outside = None if mask is None else mask == 0
        wide = wide_dtype(forward_predictions.device)
        area = torch.full((), height * width, dtype=dtype, device=forward_predictions.device)
        count = area if mask is None else mask.sum()
        cell_steps = (steps * count).clamp_min(1)
        prompt = None if prompt_embedding is None else prompt_embedding.to(wide)
        preference = self._preference(height, width, prompt, outside)
        plan = PlanTerms(
            *arc_efe(
                forward_predictions.to(dtype),
                backward_predictions.to(dtype),
                state_predictions,
                observation_probs.to(dtype),
                renormalize(preference, mask).to(dtype),
                mask,
            )
        )
        unsure, cells = plan.certainty <= self.inference_first_threshold, area
        if mask is not None:
            inside = mask > 0
            unsure, cells = unsure & inside, inside.sum(dtype=dtype)
        inference_risk = unsure.sum(dtype=dtype) / (cells + EPS)
        risk = plan.risk * (1 - 0.5 * inference_risk) / cell_steps
        ambiguity = plan.ambiguity / (area if mask is None else cell_steps)
        reversal = plan.reversal / (area if mask is None else count + EPS)
        matching = mean_cross_entropy(final_prediction, target_outcome, outside).to(dtype)

        rho = height * width / self.max_grid_size**2
        step_penalty = math.sqrt(rho) / (1 + 0.1 * math.log1p(rho)) * episode_length
        grid_norm = abs(rho - 0.5) if rho < 0.1 or rho > 1 else 0.0
        losses = {
            "inference_risk": inference_risk,
            "risk": risk,
            "ambiguity": ambiguity,
            "efe": self.lambda_risk * risk + self.lambda_amb * ambiguity,
            "step_penalty": torch.ones_like(area) * (self.lambda_step * step_penalty),
            "grid_norm": torch.ones_like(area) * (self.lambda_grid_norm * grid_norm),
            "grid_matching": matching,
            "consistency": self.lambda_cons * matching,
            "bidirectional": self.lambda_bi * (0.7 * plan.bidirectional / cell_steps + 0.3 * reversal),
            "z_anchoring": self.lambda_z * self._anchoring(preference).to(dtype),
            "prompt_consistency": -self.lambda_prompt * self._prompt_cosine(plan.mean_logits, prompt).to(dtype),
        }
        losses["total"] = torch.stack([value for name, value in losses.items() if name in TOTAL]).sum()
        return losses

    def _check(
        self,
        forward_predictions: Tensor,
        backward_predictions: Tensor,
        state_predictions: Tensor,
        observation_probs: Tensor,
        final_prediction: Tensor,
        target_outcome: Tensor,
        prompt_embedding: Tensor | None,
        grid_mask: Tensor | None,
    ) -> tuple[int, int, int]:
        """Raises for a wrong dtype, shape or device; returns T, H, W."""
        floating = checks.check_floating
        floating("forward_predictions", forward_predictions)
        sizes = checks.Sizes("forward_predictions", forward_predictions, "T H W C", C=self.num_colors)
        sizes.check("backward_predictions", backward_predictions, "T H W C", floating)
        sizes.check("state_predictions", state_predictions, "T H W C", floating)
        sizes.check("observation_probs", observation_probs, "T H W C", floating)
        sizes.check("final_prediction", final_prediction, "H W C", floating)
        sizes.check("target_outcome", target_outcome, "H W", checks.check_integer)
        if prompt_embedding is not None:
            floating("prompt_embedding", prompt_embedding)
            if tuple(prompt_embedding.shape) not in ((self.prompt_dim,), (self.num_colors,)):
                raise ValueError(
                    f"prompt_embedding must have the shape [{self.prompt_dim}] or [{self.num_colors}], "
                    f"it was {list(prompt_embedding.shape)}."
                )
        sizes.check_optional("prompt_embedding", prompt_embedding, "D", floating)
        sizes.check_optional("grid_mask", grid_mask, "H W", checks.check_real)
        weight = self.prompt_projector.weight
        checks.check_device("the parameters of EFELoss", weight, "forward_predictions", forward_predictions.device)
        steps, height, width = forward_predictions.shape[:3]
        if steps < 1 or height * width < 1:
            shape = list(forward_predictions.shape)
            raise ValueError(f"forward_predictions must have at least 1 step and 1 cell, its shape was {shape}.")
        return steps, height, width

    def _preference(self, height: int, width: int, prompt: Tensor | None, outside: Tensor | None) -> Tensor:
        """clamp P, [C, H, W]."""
        key = f"{height}x{width}"
        if key not in self.preference_embeddings and self.training and torch.is_grad_enabled():
            told = (
                f"efe_kernels.arc_efe.EFELoss: this call makes the preference of {key} cells, which an optimizer or a "
                f"DistributedDataParallel made before does not know and so never trains; call ensure_preference("
                f"{height}, {width}), and so for every other size, before they are made."
            )
            if torch.compiler.is_compiling():
                raise RuntimeError(told)
            warnings.warn(told, stacklevel=5)  # of who called the module
        logits = self.ensure_preference(height, width).movedim(-1, 0)
        logits = logits.to(wide_dtype(logits.device))
        if prompt is not None:
            scales = F.pad(prompt, (0, max(self.num_colors - prompt.numel(), 0)))[: self.num_colors].sigmoid()
            logits = logits * scales[:, None, None]
        probs = logits.softmax(0)
        if outside is not None:
            probs = probs.masked_fill(outside, FILL)
        return clamp(probs, EPS, 1)

    def _anchoring(self, preference: Tensor) -> Tensor:
        """Mean of Ĉ (log Ĉ − log P) over H·W·C for clamp P [C, H, W]; 0 where there is no Ĉ for that size."""
        outcomes, height, width = preference.shape
        running = self.target_preferences_dict.get(f"{height}x{width}")
        if running is None:
            return preference.new_zeros(())
        checks.Sizes(f"target_preferences_dict['{height}x{width}']", running, "H W C", H=height, W=width, C=outcomes)
        anchor = running.detach().to(preference).clamp(EPS, 1).movedim(-1, 0)
        return (anchor * ((anchor + EPS).log() - (preference + EPS).log())).mean()

    def _prompt_cosine(self, mean_logits: Tensor, prompt: Tensor | None) -> Tensor:
        """Mean over the steps of the cosine of mean_logits [T, C] and the projected prompt; 0 without one."""
        if prompt is None:
            return mean_logits.new_zeros(())
        direction = prompt
        if prompt.numel() != self.num_colors:
            weight, bias = self.prompt_projector.weight, self.prompt_projector.bias
            direction = F.linear(direction, weight.to(direction), bias.to(direction))
        return F.cosine_similarity(mean_logits, direction[None], eps=EPS).mean()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EFELoss:
        super()._apply(fn, recurse)
        for key, running in self.target_preferences_dict.items():
            self.target_preferences_dict[key] = fn(running)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        start = re.escape(f"{prefix}preference_embeddings.")
        for key in state_dict:
            size = re.fullmatch(start + r"(\d+)x(\d+)", key)
            if size is not None:
                self.ensure_preference(int(size[1]), int(size[2]))
        super()._load_from_state_dict(state_dict, prefix, *args)
