"""Grids as pictures, for trackers that show the plans of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from efe_train.data import Query
from efe_train.tasks import COLOURS, Grid

Picture = npt.NDArray[np.uint8]
"""[H, W, 3]: red, green and blue."""

PALETTE: Picture = np.array([list(bytes.fromhex(colour[1:])) for colour in COLOURS], np.uint8)

PAPER, LINE = 255, 85
"""The grey between grids, and that between cells."""


def picture(grids: Sequence[Grid], scale: int = 8) -> Picture:
    """The grids side by side, their tops on one line, a cell's width apart.

    scale: pixels of a cell's side, one of which is the line that parts it from the next.
    """
    drawn = [draw(grid, scale) for grid in grids]
    height = max(map(len, drawn))
    columns = [np.pad(each, ((0, height - len(each)), (0, scale), (0, 0)), constant_values=PAPER) for each in drawn]
    return np.concatenate(columns, axis=1)[:, :-scale]


def draw(grid: Grid, scale: int) -> Picture:
    """One grid [h, w] as a picture [h * scale, w * scale, 3]."""
    cells: Picture = PALETTE[grid].repeat(scale, axis=0).repeat(scale, axis=1)
    cells[scale - 1 :: scale] = LINE
    cells[:, scale - 1 :: scale] = LINE
    return cells


def plan_pictures(
    queries: Sequence[Query], plans: Sequence[Grid], answers: Sequence[Grid | None], count: int = 4
) -> dict[str, Picture]:
    """Input, plan and, where it is known, answer of the first few queries, by the queries' keys."""
    first = list(zip(queries, plans, answers, strict=True))[:count]
    return {
        query.key: picture([query.source, plan, *([] if answer is None else [answer])]) for query, plan, answer in first
    }
