"""What the demonstrations of a task and an input grid show: facts for prompt and policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from efe_train.config import MAX_GRID_SIZE, NUM_COLORS
from efe_train.tasks import Grid, Pair


@dataclass(frozen=True)
class Facts:
    """What demonstrations and input show, each about 0 to 1: the features of the policy and the words of the rule."""

    same_size: float  # share of demonstrations whose output has the input's size
    constant_size: float  # 1 where all outputs have one size
    height_ratio: float  # log2 of output height over input height, over 5
    width_ratio: float
    changed: float  # share of cells that change, where the size stays
    new_colours: float  # share of the ten colours that only outputs have
    lost_colours: float  # share of the ten colours that only inputs have
    recoloured: float  # share of demonstrations that replace each colour by one colour
    mirrored_across: float  # share of outputs that equal their left-right mirror image
    mirrored_down: float
    demonstrations: float  # how many, over 10
    source_cells: float  # cells of the input grid, over 900
    output_cells: float  # cells of the inferred output size, over 900
    source_colours: float  # colours of the input grid, over 10
    source_background: float  # share of its most frequent colour

    def vector(self) -> list[float]:
        return list(vars(self).values())


NUM_FEATURES = len(Facts.__dataclass_fields__)


def observe(demonstrations: Sequence[Pair], source: Grid, size: tuple[int, int]) -> Facts:
    """Facts of a query. `size` is the inferred output size."""

    def share(flags: Sequence[bool]) -> float:
        return float(np.mean(flags)) if len(flags) else 0.0

    def mean_log_ratio(axis: int) -> float:
        logs = [np.log2(pair.output.shape[axis] / pair.input.shape[axis]) for pair in demonstrations]
        return float(np.mean(logs)) / 5 if logs else 0.0

    same = [pair for pair in demonstrations if pair.input.shape == pair.output.shape]
    before = {int(colour) for pair in demonstrations for colour in np.unique(pair.input)}
    after = {int(colour) for pair in demonstrations for colour in np.unique(pair.output)}
    outputs = [pair.output for pair in demonstrations]
    counts = np.bincount(source.ravel(), minlength=NUM_COLORS)
    return Facts(
        same_size=len(same) / len(demonstrations) if demonstrations else 0.0,
        constant_size=float(len({output.shape for output in outputs}) == 1),
        height_ratio=mean_log_ratio(0),
        width_ratio=mean_log_ratio(1),
        changed=float(np.mean([np.mean(pair.input != pair.output) for pair in same])) if same else 0.0,
        new_colours=len(after - before) / NUM_COLORS,
        lost_colours=len(before - after) / NUM_COLORS,
        recoloured=sum(is_recolouring(pair) for pair in same) / len(demonstrations) if demonstrations else 0.0,
        mirrored_across=share([bool((output == output[:, ::-1]).all()) for output in outputs]),
        mirrored_down=share([bool((output == output[::-1]).all()) for output in outputs]),
        demonstrations=len(demonstrations) / 10,
        source_cells=source.size / MAX_GRID_SIZE**2,
        output_cells=size[0] * size[1] / MAX_GRID_SIZE**2,
        source_colours=int(np.count_nonzero(counts)) / NUM_COLORS,
        source_background=float(counts.max() / source.size),
    )


def is_recolouring(pair: Pair) -> bool:
    """Whether the output replaces each colour of the input by one colour. Both have the same size."""
    return len(np.unique(pair.input * NUM_COLORS + pair.output)) == len(np.unique(pair.input))
