"""Launches the kernels of the EFE loss: what they are specialised on, how their work is cut up, what they write.

What follows from the shapes, strides and dtypes of the inputs is found out once and kept, because at small batches the
host's time is all that counts.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from efe_kernels.common.launch import PreparedLaunch, cdiv, kept, next_power_of_2, signature
from efe_kernels.common.triton import APPROXIMATE, launch_guard
from efe_kernels.efe_loss import cells, kernels, reduction
from efe_kernels.efe_loss.cells import Array, Shape
from efe_kernels.efe_loss.kernels import Upstream, Weights
from efe_kernels.efe_loss.reference import DIFFERENTIABLE, TERMS, Inputs, Outputs, Settings, saved_width

# One multiply-add keeps x log2(e) - top exact for logits of 1e4. Up to 3.9, which announces another one for 3.10, it is
# Triton's default.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
LANES = (32 if torch.version.hip is None else 64) * OPTIONS["num_warps"]
# Registers of a lane at most in the backward of the prompt term over a 16-bit channel-first plan: on an H200 room for
# more warps is worth 11 % there, more than what is spilled costs. The other walks are slower with a limit.
BACKWARD_REGISTERS = 128
# Chunks of episodes in backward: so many that the last programs of a launch leave few multiprocessors idle, so few that
# their partial sums of the gradient of a shared preference cost about 1 %.
MAX_CHUNKS = 512
# Batches from this one on read what all episodes share from a copy with the cells of an outcome side by side.
MANY_EPISODES = 512
# Cells of a shared preference, and columns of the projection, whose gradients one program finishes.
CELL_BLOCK, D_BLOCK = 32, 8
# Tuples of the kernels, which hold whatever Triton traces.
Arrays: Any = cells.Inputs
Gradients: Any = kernels.Gradients
# A letter for each dimension; those of the preference where there is one for each episode.
DIMS = Arrays("BTHWC", "BTHWC", "BHWC", "BTHWC", "BHWC", "BD", "CD", "BHW", "HWC", "BHW", None)


class Layout:
    """Strides of the inputs, what is present, and the sizes: everything the kernels are specialised on."""

    def __init__(self, inputs: Inputs) -> None:
        logits = inputs.logits
        self.batch, self.steps, height, width, self.outcomes = logits.shape
        self.cells = height * width
        self.prompt_dim = 0 if inputs.prompt is None else inputs.prompt.shape[1]
        self.saved = saved_width(inputs)
        self.has_direction = inputs.prompt is not None and inputs.projection is not None
        self.shared_preference = inputs.preference_logits.dim() == 3
        separate = inputs.backward_logits is not None
        # Neighbouring cells of one outcome lie side by side only channel-first: there a lane takes two of them at once,
        # where they fit into one register. In the backward of the prompt term too few registers are left for two.
        half = logits.itemsize == 2
        cells_per_lane = 2 if logits.stride(3) == 1 and half else 1
        self.tile = self.tile_of(cells_per_lane)
        self.tiles = cdiv(self.cells, self.tile)
        self.backward_tile = self.tile_of(1 if self.has_direction else cells_per_lane)
        self.backward_tiles = cdiv(self.cells, self.backward_tile)
        limited = self.has_direction and cells_per_lane == 2 and APPROXIMATE
        self.backward_options = {"maxnreg": BACKWARD_REGISTERS} if limited else {}
        self.preference_programs = cdiv(self.cells, CELL_BLOCK) * self.outcomes
        self.projection_programs = cdiv(self.prompt_dim, D_BLOCK) * self.outcomes
        preference = "HWC" if self.shared_preference else "BHWC"
        self.dims = DIMS._replace(
            preference_logits=preference, projection=DIMS.projection if self.has_direction else None
        )
        alone = int(not separate and self.steps % 2 == 1)
        pairs = self.steps if separate else (self.steps + 1) // 2
        sizes = (self.steps, self.cells, width, self.outcomes, self.prompt_dim, pairs, alone, self.saved, APPROXIMATE)
        self.shape = Shape(*constants((*sizes, self.pack_of(self.tile))))
        self.backward_shape = Shape(*constants((*sizes, self.pack_of(self.backward_tile))))
        self.forms = tuple(map(form_of, self.seen(inputs), self.dims))
        self.gradient_forms = tuple(map(form_of, map(gradient_on_meta, inputs[:DIFFERENTIABLE]), self.dims))
        self.launches: dict[Hashable, PreparedLaunch] = {}

    def tile_of(self, cells_per_lane: int) -> int:
        return min(LANES * cells_per_lane, next_power_of_2(self.cells))

    def pack_of(self, tile: int) -> int:
        """See Shape. A program is one warp, and tiles are powers of two."""
        pack = tile // LANES
        return pack if APPROXIMATE and pack in (1, 2) else 0

    def arrays(self, inputs: Inputs, ignore_index: int) -> Any:
        """The inputs as the kernels see them."""
        return Arrays(*map(array, self.seen(inputs), self.forms), tl.constexpr(ignore_index))

    def seen(self, inputs: Inputs) -> Inputs:
        """The inputs in the dtypes and in the memory order in which the kernels read them."""
        anchor = inputs.target_preference
        return inputs._replace(
            valid=None if inputs.valid is None else inputs.valid.view(torch.uint8),
            preference_logits=self.by_outcome(inputs.preference_logits),
            target_preference=None if anchor is None else self.by_outcome(anchor),
        )

    def by_outcome(self, grid: Tensor) -> Tensor:
        """[H, W, C] with the cells of an outcome side by side, where many episodes read it: a warp then asks for a few
        lines of the cache and not for as many as it has cells."""
        if grid.dim() != 3 or self.batch < MANY_EPISODES:
            return grid
        return grid.movedim(-1, 0).contiguous().movedim(0, -1)

    def launch(self, function: Any, grid: tuple[int, ...], key: Hashable, **block: Any) -> PreparedLaunch:
        """The launch of `function` on this layout. key: what of its arguments it is specialised on beside the inputs.
        block: its remaining constants, and options of Triton."""
        place = (function.__name__, key)  # Triton hashes the function itself by its source
        return kept(self.launches, place, lambda: PreparedLaunch(function, grid, {**OPTIONS, **block}))


def constants(values: tuple[Any, ...]) -> tuple[tl.constexpr, ...]:
    return tuple([tl.constexpr(value) for value in values])


Form = tuple[tl.constexpr, ...]
"""The constants of an Array."""


def form_of(tensor: Tensor | None, dims: str | None) -> Form | None:
    """dims: a letter for each dimension; None where the kernels are not to see the tensor."""
    if tensor is None or dims is None:
        return None
    shape, strides = tensor.shape, tensor.stride()
    found = dict(zip(dims.lower(), strides, strict=True))
    halves = tensor.itemsize == 2 and tensor.data_ptr() % 16 == 0
    words = halves and dims[-1] == "C" and strides[-1] == 1 and shape[-1] % 2 == 0
    words = words and all(stride % 2 == 0 for stride in strides[:-1])
    return constants((*[found.get(letter, 0) for letter in Array._fields[1:-1]], words))


def array(tensor: Any, form: Form | None) -> Array | None:
    """A tensor as the kernels see it; None where there is none, or none to be seen."""
    return None if tensor is None or form is None else Array(tensor, *form)


def gradient_on_meta(tensor: Tensor | None) -> Tensor | None:
    """Of the form that the gradient of this tensor has."""
    return None if tensor is None else torch.empty_like(tensor, device="meta")


@functools.lru_cache(4096)
def form_of_total(strides: tuple[int, ...]) -> Form | None:
    """Of the gradient that arrives at the total, 0-d where it is reduced."""
    return form_of(torch.empty_strided((1,) * len(strides), strides, device="meta"), "B" * len(strides))


LAYOUTS: dict[Hashable, Layout] = {}


def layout_of(inputs: Inputs) -> Layout:
    """The one of inputs that look the same, so that their launches are prepared once."""
    key = tuple([signature(tensor) for tensor in inputs])
    return kept(LAYOUTS, key, lambda: Layout(inputs))


class Forward:
    """One problem and what its forward writes, all float32."""

    def __init__(self, inputs: Inputs, settings: Settings) -> None:
        self.layout = layout = layout_of(inputs)
        self.arrays = layout.arrays(inputs, settings.ignore_index)
        self.settings = settings
        self.shape = layout.shape
        self.weights = Weights(*settings.weights)
        device = inputs.logits.device

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        batch, tiles = layout.batch, layout.tiles
        # The total of a single episode is reduced already. It is no view: its owner may change it in place.
        total = new() if batch == 1 and settings.reduction != "none" else new(batch)
        self.outputs = Outputs(total, new(batch, len(TERMS)), new(batch), new(batch), new(batch, layout.saved))
        self.sums = new(batch, tiles, kernels.NUM_SUMS.value)
        self.direction = new(batch, tiles, layout.steps, layout.outcomes) if layout.has_direction else None

    def visit_cells(self) -> None:
        layout, key = self.layout, self.settings.ignore_index
        grid = (layout.batch * layout.tiles,)
        launch = layout.launch(kernels.efe_loss_forward_kernel, grid, key, TILE=layout.tile, TILES=layout.tiles)
        launch(self.arrays, self.sums, self.direction, self.shape)

    def finish_episodes(self) -> None:
        """From the sums over the cells to the terms and the total of each episode."""
        layout, settings = self.layout, self.settings
        launch = layout.launch(
            reduction.efe_loss_episode_kernel,
            (layout.batch,),
            (settings.hard_cell, self.outputs.total.dim()),
            HARD_CELL=settings.hard_cell,
            TILES=layout.tiles,
            C_BLOCK=next_power_of_2(layout.outcomes),
            D_BLOCK=128,
            TILE_BLOCK=min(16, next_power_of_2(layout.tiles)),
        )
        launch(
            self.sums, self.direction, self.arrays.prompt, self.arrays.projection, self.outputs, self.weights,
            settings.hard_cell_min_ratio, float(settings.max_cells), self.shape,
        )  # fmt: skip

    def results(self) -> Outputs:
        outputs = self.outputs
        return outputs if outputs.total.dim() == 0 else outputs._replace(total=self.settings.reduce(outputs.total))


class Backward:
    """The gradients asked for, each in its input's dtype and memory order, and the partial sums of some of them."""

    def __init__(self, inputs: Inputs, needs: list[bool]) -> None:
        self.layout = layout = layout_of(inputs)
        self.needs = tuple(needs)
        wanted = zip(inputs[: len(needs)], needs, strict=True)
        self.each = [torch.empty_like(tensor) if tensor is not None and need else None for tensor, need in wanted]
        *_, preference, prompt, projection = self.each
        device = inputs.logits.device

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        # The gradient of a preference that is shared is a sum over episodes; of the prompt, over cells.
        shared = preference is not None and layout.shared_preference
        arrays: list[Any] = [*map(array, self.each, layout.gradient_forms)]
        self.episodes = next_power_of_2(cdiv(max(layout.batch, 1), MAX_CHUNKS)) if shared else 1
        self.chunks = cdiv(layout.batch, self.episodes)
        partial = new(self.chunks, layout.outcomes, layout.cells) if shared else None
        scales = None if prompt is None else new(layout.batch, layout.backward_tiles, layout.outcomes)
        self.written = Gradients(*arrays, partial, scales, tl.constexpr(layout.shared_preference))
        if projection is not None and not layout.has_direction:
            projection.zero_()

    def run(self, inputs: Inputs, settings: Settings, upstream: Upstream) -> list[Tensor]:
        """`upstream` as in the kernel."""
        found = [gradient for gradient in self.each if gradient is not None]
        if self.layout.batch > 0:
            arrays = self.layout.arrays(inputs, settings.ignore_index)
            share = settings.share(self.layout.batch)
            weights = Weights(*[share * weight for weight in settings.weights])
            with launch_guard(inputs.logits):
                self.visit_cells(arrays, settings.ignore_index, upstream, weights)
                self.finish_gradients(arrays, upstream, weights)
        else:
            for gradient in found:  # those of what all episodes share are not empty
                gradient.zero_()
        return found

    def visit_cells(self, arrays: Any, ignore_index: int, upstream: Upstream, weights: Weights) -> None:
        """Writes the gradients that cells have of their own."""
        layout = self.layout
        launch = layout.launch(
            kernels.efe_loss_backward_kernel,
            (layout.backward_tiles * self.chunks,),
            (ignore_index, signature_of(upstream), self.needs),
            EPISODES=self.episodes,
            TILE=layout.backward_tile,
            TILES=layout.backward_tiles,
            **layout.backward_options,
        )
        launch(arrays, upstream, self.written, weights, layout.batch, layout.backward_shape)

    def finish_gradients(self, arrays: Any, upstream: Upstream, weights: Weights) -> None:
        """From partial sums to the gradients of a shared preference, of the prompt and of the projection."""
        layout, written = self.layout, self.written
        preference = written.preference_logits if layout.shared_preference else None
        shared = Gradients(None, None, None, None, preference, *written[5:])
        programs = (
            0 if preference is None else layout.preference_programs,
            0 if written.projection is None else layout.projection_programs,
            0 if written.prompt is None else layout.batch,
        )
        if not any(programs):
            return
        launch = layout.launch(
            reduction.efe_loss_gradients_kernel,
            (sum(programs),),
            (signature_of(upstream), self.needs),
            PREFERENCE_PROGRAMS=programs[0],
            PROJECTION_PROGRAMS=programs[1],
            TILES=layout.backward_tiles,
            CELL_BLOCK=CELL_BLOCK,
            CHUNK_BLOCK=16,
            D_BLOCK=D_BLOCK,
            EPISODE_BLOCK=32 if layout.batch <= 32 else 512,
            PROMPT_BLOCK=128,
            num_warps=4,
        )
        prompt, projection = arrays.prompt, arrays.projection
        launch(prompt, projection, upstream, shared, weights.prompt, layout.batch, self.chunks, layout.shape)


def signature_of(upstream: Upstream) -> Hashable:
    total, *tensors = upstream
    return tuple([signature(tensor) for tensor in (None if total is None else total.ptr, *tensors)])


def efe_loss_forward(inputs: Inputs, settings: Settings) -> Outputs:
    """See the reference."""
    forward = Forward(inputs, settings)
    if forward.layout.batch > 0:
        with launch_guard(inputs.logits):
            forward.visit_cells()
            forward.finish_episodes()
    return forward.results()


def efe_loss_backward(
    grad_total: Tensor | None,
    grad_terms: Tensor | None,
    inputs: Inputs,
    settings: Settings,
    hard_cell_scale: Tensor,
    saved: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """See the reference."""
    grad_terms = None if grad_terms is None else grad_terms.contiguous()
    form = None if grad_total is None else form_of_total(grad_total.stride())
    upstream = Upstream(array(grad_total, form), grad_terms, hard_cell_scale, saved)
    return Backward(inputs, needs).run(inputs, settings, upstream)
