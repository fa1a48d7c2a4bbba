"""Launches the kernels of the EFE loss: what they are specialised on, how their work is cut up, what they write.

What follows from the shapes, strides and dtypes of the inputs is found out once and kept, because at small batches the
host's time is all that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from efe_kernels.common.launch import PreparedLaunch, signature
from efe_kernels.common.triton import APPROXIMATE, launch_guard
from efe_kernels.efe_loss.kernels import (
    NUM_SUMS,
    NUM_TERMS,
    efe_loss_backward_kernel,
    efe_loss_episode_kernel,
    efe_loss_forward_kernel,
    efe_loss_shared_gradients_kernel,
    efe_loss_survey_kernel,
)
from efe_kernels.efe_loss.reference import TERMS, Inputs, Outputs, Settings, residual_width

# One multiply-add keeps x log2(e) - top exact for logits of 1e4. Up to 3.9, which announces another one for 3.10, it is
# Triton's default.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
LANES = (32 if torch.version.hip is None else 64) * OPTIONS["num_warps"]
# Chunks of episodes in backward: enough programs for any GPU, few enough that their partial sums cost about 1 %.
MAX_CHUNKS = 128
# Cells of a shared preference, and columns of the projection, whose gradients one program finishes.
CELL_BLOCK, D_BLOCK = 32, 16
DIRECTION = TERMS.index("prompt")


class Layout:
    """Strides of the inputs, what is present, and the sizes: everything the kernels are specialised on."""

    def __init__(self, inputs: Inputs) -> None:
        logits, preference_logits = inputs.logits, inputs.preference_logits
        self.batch, self.steps, height, width, self.outcomes = logits.shape
        self.cells = height * width
        self.prompt_dim = 0 if inputs.prompt is None else inputs.prompt.shape[1]
        self.residual = residual_width(inputs)
        self.has_direction = inputs.prompt is not None and inputs.projection is not None
        self.shared_preference = preference_logits.dim() == 3
        separate = inputs.backward_logits is not None
        # Neighbouring cells of one outcome lie side by side only channel-first: there a lane takes two of them at once.
        # In the backward of the prompt term two do not fit into its registers.
        cells_per_lane = 2 if logits.stride(3) == 1 else 1
        self.tile = self.tile_of(cells_per_lane)
        self.tiles = triton.cdiv(self.cells, self.tile)
        self.backward_tile = self.tile_of(1 if self.has_direction else cells_per_lane)
        self.backward_tiles = triton.cdiv(self.cells, self.backward_tile)
        self.preference_programs = triton.cdiv(self.cells, CELL_BLOCK) * self.outcomes
        self.projection_programs = triton.cdiv(self.prompt_dim, D_BLOCK) * self.outcomes
        self.episodes = triton.next_power_of_2(triton.cdiv(max(self.batch, 1), MAX_CHUNKS))
        self.chunks = triton.cdiv(self.batch, self.episodes)
        preference = preference_logits.stride()
        self.constants: dict[str, Any] = {
            "LOGITS": logits.stride(),
            "BACKWARD": strides(inputs.backward_logits),
            "FINAL": one_step(inputs.final_logits),
            "OBSERVATION": strides(inputs.observation_probs),
            "PREFERENCE": (0, *preference) if self.shared_preference else preference,
            "PROMPT": strides(inputs.prompt),
            "PROJECTION": strides(inputs.projection),
            "TARGET": inputs.target.stride(),
            "TARGET_PREFERENCE": strides(inputs.target_preference),
            "VALID": strides(inputs.valid),
            "HAS_BACKWARD": separate,
            "HAS_FINAL": inputs.final_logits is not None,
            "HAS_OBSERVATION": inputs.observation_probs is not None,
            "HAS_PROMPT": inputs.prompt is not None,
            "HAS_DIRECTION": self.has_direction,
            "HAS_ANCHOR": inputs.target_preference is not None,
            "HAS_VALID": inputs.valid is not None,
            "SHARED_PREFERENCE": self.shared_preference,
            "T": self.steps,
            "CELLS": self.cells,
            "WIDTH": width,
            "C": self.outcomes,
            "D": self.prompt_dim,
            "PAIRS": self.steps if separate else (self.steps + 1) // 2,
            "ALONE": int(not separate and self.steps % 2 == 1),
            "TILE": self.tile,
            "TILES": self.tiles,
            "EPISODES": self.episodes,
            "RESIDUAL": self.residual,
            "APPROX": APPROXIMATE,
        }
        self.launches: dict[Hashable, PreparedLaunch] = {}

    def tile_of(self, cells_per_lane: int) -> int:
        return min(LANES * cells_per_lane, triton.next_power_of_2(self.cells))

    def launch(
        self, function: Any, grid: tuple[int, ...], key: Hashable, constants: Callable[[], dict[str, Any]]
    ) -> PreparedLaunch:
        """The launch of `function` on this layout. `key` tells its other constants apart."""
        place = (function.__name__, key)  # Triton hashes the function itself by its source
        found = self.launches.get(place)
        if found is None:
            known = {name: value for name, value in self.constants.items() if name in function.arg_names}
            found = self.launches[place] = PreparedLaunch(function, grid, {**known, **OPTIONS, **constants()})
        return found


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0,) if tensor is None else tensor.stride()


def one_step(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of [B, H, W, C] as those of a plan [B, 1, H, W, C]."""
    if tensor is None:
        return (0,)
    batch, *cell = tensor.stride()
    return (batch, 0, *cell)


LAYOUTS: dict[Hashable, Layout] = {}
MAX_LAYOUTS = 4096


def layout_of(inputs: Inputs) -> Layout:
    """The one of inputs that look the same, so that their launches are prepared once."""
    key = tuple([signature(tensor) for tensor in inputs])
    layout = LAYOUTS.get(key)
    if layout is None:
        if len(LAYOUTS) == MAX_LAYOUTS:
            LAYOUTS.clear()
        layout = LAYOUTS[key] = Layout(inputs)
    return layout


def read_pointers(inputs: Inputs) -> list[Tensor]:
    """What the kernels read, in their order. For what is absent the logits stand in, which they then do not touch."""
    valid = None if inputs.valid is None else inputs.valid.view(torch.uint8)
    found = (*inputs[:6], inputs.target, inputs.target_preference, valid)
    return [inputs.logits if tensor is None else tensor for tensor in found]


def efe_loss_forward(inputs: Inputs, settings: Settings) -> Outputs:
    """Total [B], terms [B, 7], mask ratio [B], hard-cell scale [B] and residual, all float32."""
    layout = layout_of(inputs)
    outputs = new_outputs(inputs, layout)
    sums, direction = new_sums(inputs, layout)
    if layout.batch > 0:
        with launch_guard(inputs.logits):
            launch = layout.launch(
                efe_loss_forward_kernel,
                (layout.batch * layout.tiles,),
                settings.ignore_index,
                lambda: {"IGNORE_INDEX": settings.ignore_index},
            )
            launch(*read_pointers(inputs), sums, direction)
            launch_episodes(layout, inputs, settings, sums, direction, outputs)
    return outputs


def new_outputs(inputs: Inputs, layout: Layout) -> Outputs:
    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=inputs.logits.device)

    batch = layout.batch
    return new(batch), new(batch, NUM_TERMS.value), new(batch), new(batch), new(batch, layout.residual)


def new_sums(inputs: Inputs, layout: Layout) -> tuple[Tensor, Tensor]:
    """Sums [B, TILES, NUM_SUMS] and directions [B, TILES, T, C]; without a prompt term the sums stand in for these."""
    shape = (layout.batch, layout.tiles, NUM_SUMS.value)
    sums = torch.empty(shape, dtype=torch.float32, device=inputs.logits.device)
    if not layout.has_direction:
        return sums, sums
    return sums, sums.new_empty(layout.batch, layout.tiles, layout.steps, layout.outcomes)


def launch_episodes(
    layout: Layout, inputs: Inputs, settings: Settings, sums: Tensor, direction: Tensor, outputs: Outputs
) -> None:
    """From the sums over the cells to the terms and the total of each episode."""
    prompt, projection = (inputs.prompt, inputs.projection) if layout.has_direction else (sums, sums)
    launch = layout.launch(
        efe_loss_episode_kernel,
        (layout.batch,),
        settings.hard_cell,
        lambda: {
            "HARD_CELL": settings.hard_cell,
            "C_BLOCK": triton.next_power_of_2(layout.outcomes),
            "D_BLOCK": 128,
            "TILE_BLOCK": min(16, triton.next_power_of_2(layout.tiles)),
        },
    )
    launch(
        sums, direction, prompt, projection, *outputs, *settings.weights, settings.hard_cell_min_ratio,
        float(settings.max_cells),
    )  # fmt: skip


class Gradients:
    """The gradients asked for, each in its input's dtype and memory order, and the partial sums of some of them."""

    def __init__(self, layout: Layout, inputs: Inputs, needs: list[bool]) -> None:
        self.layout = layout
        self.needs = tuple(needs)
        wanted = zip(inputs[: len(needs)], needs, strict=True)
        self.each = [torch.empty_like(tensor) if tensor is not None and need else None for tensor, need in wanted]
        *_, need_preference, need_prompt, _need_projection = needs
        device = inputs.logits.device
        # The gradient of a preference that is shared is a sum over episodes; of the prompt, over cells.
        self.partial = self.scales = None
        if need_preference and layout.shared_preference:
            shape = (layout.chunks, layout.outcomes, layout.cells)
            self.partial = torch.empty(shape, dtype=torch.float32, device=device)
        if need_prompt:
            shape = (layout.batch, layout.backward_tiles, layout.outcomes)
            self.scales = torch.empty(shape, dtype=torch.float32, device=device)

    def found(self) -> list[Tensor]:
        return [gradient for gradient in self.each if gradient is not None]


@dataclass(frozen=True)
class Upstream:
    """What backward is given, and what it takes over from forward."""

    grad_total: Tensor | None  # [B]
    grad_terms: Tensor | None  # [B, NUM_TERMS]
    hard_cell_scale: Tensor  # [B]
    residual: Tensor  # [B, RESIDUAL]

    def signature(self) -> Hashable:
        return tuple([signature(tensor) for tensor in vars(self).values()])

    def constants(self) -> dict[str, Any]:
        return {
            "GRAD_TOTAL": strides(self.grad_total),
            "HAS_TOTAL": self.grad_total is not None,
            "HAS_TERMS": self.grad_terms is not None,
        }


def efe_loss_backward(inputs: Inputs, settings: Settings, upstream: Upstream, needs: list[bool]) -> list[Tensor]:
    """The gradients asked for in `needs`, in the order of the inputs, each in its input's dtype."""
    layout = layout_of(inputs)
    gradients = Gradients(layout, inputs, needs)
    launch_backward(layout, inputs, settings, upstream, gradients)
    launch_shared_gradients(layout, inputs, settings, upstream, gradients)
    return gradients.found()


def takes_promise(inputs: Inputs) -> bool:
    """Whether one read of the logits can give loss and gradients.

    Not with the prompt term, whose gradient in any cell depends on the sum over all of them.
    """
    return inputs.prompt is None or inputs.projection is None


def efe_loss_promised_forward(
    promise: Tensor, inputs: Inputs, settings: Settings, needs: list[bool]
) -> tuple[Outputs, Gradients]:
    """What `efe_loss_forward` gives, and the gradients for the upstream gradient `promise` [] of every episode's total.

    The hard-cell scale must be known before the first gradient is written, so a survey of the final step comes first.
    """
    layout = layout_of(inputs)
    outputs = new_outputs(inputs, layout)
    gradients = Gradients(layout, inputs, needs)
    *_, hard_cell_scale, residual = outputs
    sums, direction = new_sums(inputs, layout)
    if layout.batch > 0:
        with launch_guard(inputs.logits):
            launch_survey(layout, inputs, settings, sums)
            launch_episodes(layout, inputs, settings, sums, direction, outputs)
            upstream = Upstream(promise.expand(layout.batch), None, hard_cell_scale, residual)
            launch_backward(layout, inputs, settings, upstream, gradients, sums=sums)
            launch_episodes(layout, inputs, settings, sums, direction, outputs)
    return outputs, gradients


def efe_loss_promised_backward(
    inputs: Inputs, settings: Settings, upstream: Upstream, promise: Tensor, gradients: Gradients
) -> list[Tensor]:
    """What `efe_loss_backward` gives, from the gradients that the forward has left where the promise was kept."""
    layout = layout_of(inputs)
    if layout is not gradients.layout:  # a hook on saved tensors has laid them out anew
        return efe_loss_backward(inputs, settings, upstream, list(gradients.needs))
    launch_backward(layout, inputs, settings, upstream, gradients, promise=promise)
    launch_shared_gradients(layout, inputs, settings, upstream, gradients)
    return gradients.found()


def launch_survey(layout: Layout, inputs: Inputs, settings: Settings, sums: Tensor) -> None:
    *_, target, _target_preference, valid = read_pointers(inputs)
    final = inputs.logits[:, -1] if inputs.final_logits is None else inputs.final_logits
    launch = layout.launch(
        efe_loss_survey_kernel,
        (layout.batch * layout.tiles,),
        (settings.ignore_index, signature(final)),
        lambda: {"IGNORE_INDEX": settings.ignore_index, "FINAL": one_step(final)},
    )
    launch(final, target, valid, sums)


def launch_backward(
    layout: Layout,
    inputs: Inputs,
    settings: Settings,
    upstream: Upstream,
    gradients: Gradients,
    *,
    sums: Tensor | None = None,
    promise: Tensor | None = None,
) -> None:
    """Writes the gradients, and the sums of the loss where they are given. `promise` as in the kernel."""
    if layout.batch == 0:
        return
    *plans, preference, _prompt, _projection = gradients.each

    def constants() -> dict[str, Any]:
        grad_logits, grad_backward, grad_final, grad_observation = plans
        names = ("LOGITS", "BACKWARD", "FINAL", "OBSERVATION", "PREFERENCE", "SCALES")
        needs = zip(names, gradients.needs, strict=False)
        return {
            "IGNORE_INDEX": settings.ignore_index,
            "GRAD_LOGITS": strides(grad_logits),
            "GRAD_BACKWARD": strides(grad_backward),
            "GRAD_FINAL": one_step(grad_final),
            "GRAD_OBSERVATION": strides(grad_observation),
            "GRAD_PREFERENCE": (0,) if layout.shared_preference else one_step(preference),
            "TILE": layout.backward_tile,
            "LOSS": sums is not None,
            "PROMISED": promise is not None,
            **upstream.constants(),
            **{f"NEED_{name}": need for name, need in needs},
        }

    key = (settings.ignore_index, upstream.signature(), gradients.needs, sums is None, signature(promise))
    partial = gradients.partial if layout.shared_preference else preference
    # For an absent tensor the residual stands in, which the kernel then never touches.
    residual = upstream.residual
    written = [residual if grad is None else grad for grad in (*plans, partial, gradients.scales, sums)]
    with launch_guard(inputs.logits):
        launch = layout.launch(efe_loss_backward_kernel, (layout.backward_tiles, layout.chunks), key, constants)
        launch(
            residual if upstream.grad_total is None else upstream.grad_total,
            residual if promise is None else promise,
            residual if upstream.grad_terms is None else upstream.grad_terms,
            *read_pointers(inputs), upstream.hard_cell_scale, residual, *written, *settings.weights[:-1], layout.batch,
        )  # fmt: skip


def launch_shared_gradients(
    layout: Layout, inputs: Inputs, settings: Settings, upstream: Upstream, gradients: Gradients
) -> None:
    """From partial sums to the gradients of a shared preference, of the prompt and of the projection."""
    *_, preference, prompt, projection = gradients.each
    preference = preference if layout.shared_preference else None
    if layout.batch == 0:
        for shared in (preference, projection):
            if shared is not None:
                shared.zero_()
        return
    if preference is None and prompt is None and projection is None:
        return
    programs = (
        0 if preference is None else layout.preference_programs,
        0 if projection is None else layout.projection_programs,
        0 if prompt is None else layout.batch,
    )

    def constants() -> dict[str, Any]:
        return {
            "GRAD_PREFERENCE": strides(preference),
            "GRAD_PROMPT": strides(prompt),
            "GRAD_PROJECTION": strides(projection),
            "NEED_PROMPT": prompt is not None,
            "PREFERENCE_PROGRAMS": programs[0],
            "PROJECTION_PROGRAMS": programs[1],
            "CELL_BLOCK": CELL_BLOCK,
            "CHUNK_BLOCK": 16,
            "D_BLOCK": D_BLOCK,
            "EPISODE_BLOCK": 32 if layout.batch <= 32 else 256,
            "PROMPT_BLOCK": 128,
            "TILES": layout.backward_tiles,
            "num_warps": 4,
            **upstream.constants(),
        }

    residual = upstream.residual
    tensors = (
        upstream.grad_total, upstream.grad_terms, inputs.prompt, inputs.projection, upstream.hard_cell_scale, residual,
        gradients.partial, gradients.scales, preference, prompt, projection,
    )  # fmt: skip
    key = (upstream.signature(), gradients.needs)
    with launch_guard(inputs.logits):
        launch = layout.launch(efe_loss_shared_gradients_kernel, (sum(programs),), key, constants)
        launch(
            *[residual if tensor is None else tensor for tensor in tensors], settings.weights[DIRECTION],
            layout.batch, layout.chunks,
        )  # fmt: skip
