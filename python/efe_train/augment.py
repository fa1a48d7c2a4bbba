"""Other views of the same task: eight orientations and permuted colours, the same for all that belongs to a query."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from efe_train.config import NUM_COLORS
from efe_train.lookup import Lookup
from efe_train.tasks import Grid
from efe_train.views import ORIENTATIONS, OUTSIDE, WATCHED, Planes, oriented

KEEP_BLACK = 0.8
"""Share of the permutations that leave colour 0, ARC's background as a rule, in its place."""


@dataclass(frozen=True, eq=False)
class Augmentation:
    """orientation: 0 to 7, as `views.oriented` takes it. colours: [11], what becomes of each colour; OUTSIDE stays."""

    orientation: int
    colours: Grid

    @classmethod
    def drawn(cls, generator: np.random.Generator) -> Augmentation:
        orientation, fixed = int(generator.integers(ORIENTATIONS)), int(generator.random() < KEEP_BLACK)
        moved = fixed + generator.permutation(NUM_COLORS - fixed)
        return cls(orientation, np.concatenate([np.arange(fixed), moved, [OUTSIDE]]))

    @classmethod
    def turned(cls, orientation: int) -> Augmentation:
        """Without a change of colours."""
        return cls(orientation, np.arange(OUTSIDE + 1))

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[::-1] if self.orientation % 2 != self.orientation // 4 else size

    def grid(self, grid: Grid) -> Grid:
        return np.ascontiguousarray(oriented(self.colours[grid], self.orientation))

    def restored(self, planes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Planes [C, H, W], one per colour, of an augmented query as they are for the query itself."""
        turned = np.swapaxes(planes, -2, -1) if self.orientation >= 4 else planes
        return np.rot90(turned, -(self.orientation % 4), (-2, -1))[self.colours[:NUM_COLORS]]

    def views(self, views: npt.NDArray[np.integer]) -> Planes:
        """The views [V, H, W] of the augmented input, from those of the input."""
        return oriented(self.colours[views][sources(self.orientation)], self.orientation)

    def lookup(self, lookup: Lookup) -> Lookup:
        counts = np.empty_like(lookup.counts)
        counts[:, self.colours[:NUM_COLORS]] = lookup.counts
        return Lookup(oriented(counts, self.orientation), lookup.tables, lookup.statistics)


@cache
def sources(orientation: int) -> list[int]:
    """For each of WATCHED the number of the view that becomes it: a quarter turn takes what is below to the right."""

    def turned(kind: str, down: int, across: int) -> tuple[str, int, int]:
        for _ in range(orientation % 4):
            down, across = -across, down
        if orientation >= 4:
            down, across = across, down
        return (kind, abs(down), abs(across)) if kind == "mirror" else (kind, down, across)

    becomes = [turned(*view) for view in WATCHED]
    return [becomes.index(view) for view in WATCHED]


AS_IT_IS = Augmentation.turned(0)
