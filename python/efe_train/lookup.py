"""What the demonstrations say about each cell of the output: patterns of the inputs, and the colours found there.

A table maps a key, which sums up what is seen at a cell of the output (a patch of the input around it, the next colours
in four directions, the size of the object, ...), to the outcomes that the demonstrations have where the key is the
same. Outcomes are colours, ranks of colours by how common they are in the input, or views of the input that show the
answer's colour. How far a table can be relied on is found by leaving out one demonstration at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, reduce
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from efe_train.config import NUM_COLORS
from efe_train.measures import Size, shape
from efe_train.objects import Shapes, scrambled
from efe_train.tasks import Grid, Pair
from efe_train.views import ORIENTATIONS, OUTSIDE, Element, Scene, oriented

Keys = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int32]

KEPT = 8
"""Tables that a query keeps: those that can be relied on most and that say different things about it."""

STATISTICS = 6
"""Numbers that say how far a table can be relied on."""

MULTIPLIERS = np.random.default_rng(0).integers(1, 2**63, size=64) | 1


def key(*planes: Grid) -> Grid:
    """One number for each cell that tells the values of all planes there. planes: [2, H, W] or [H, W] each."""
    return reduce(np.add, (plane * multiplier for plane, multiplier in zip(planes, MULTIPLIERS, strict=False)))


@cache
def patch_weights(radius: int, orientations: int) -> npt.NDArray[np.float64]:
    """[orientations, cells of the square]. Sums of these times colours are below 2**53: floats hold them exactly."""
    side = 2 * radius + 1
    weights = np.random.default_rng(radius).integers(2**44, size=(side, side)).astype(np.float64)
    return np.stack([oriented(weights, number).ravel() for number in range(orientations)])


def patch(planes: Grid, radius: int, *, any_orientation: bool = False) -> Grid:
    """A key of the square around each cell; with any_orientation the same for all eight orientations of it."""
    count, height, width = planes.shape
    side = 2 * radius + 1
    padded = np.full((count, height + side - 1, width + side - 1), float(OUTSIDE))
    padded[:, radius : radius + height, radius : radius + width] = planes
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (1, 2)).reshape(-1, side * side)
    sums = patch_weights(radius, ORIENTATIONS if any_orientation else 1) @ windows.T
    return sums.min(0).astype(np.int64).reshape(planes.shape)


def object_keys(colour: Grid, shapes: Shapes) -> dict[str, Grid]:
    return {
        "size": key(colour, shapes.size),
        "edge": key(colour, shapes.touches, shapes.solid),
        "extreme": key(colour, shapes.largest, shapes.smallest),
        "alike": key(colour, shapes.alike),
        "place": key(colour, shapes.row, shapes.column, shapes.height, shapes.width),
    }


def scene_keys(scene: Scene, names: Grid) -> dict[str, Grid]:
    """The keys [2, H, W] of a scene, from what is simple to what is particular. names: [2, 11], two ways to call each
    colour.
    """

    def named(views: Grid) -> Grid:
        return np.moveaxis(names[:, views], 0, -3)

    colour, tiles, rays = named(scene.scaled), named(scene.tiles), named(scene.rays)
    rows, columns = np.indices(scene.size)
    to_edge = np.minimum(np.minimum(rows, rows[::-1]), np.minimum(columns, columns[:, ::-1]))
    keys = {
        "everywhere": np.zeros_like(colour),
        "colour": key(colour),
        "tiles": key(colour, *tiles),
        "tile": patch(tiles[0], 1),
        "tile, turned": patch(tiles[0], 1, any_orientation=True),
        "mirrors": key(colour, *named(scene.mirrors)),
        "across": key(colour, rays[0], rays[4]),
        "down": key(colour, rays[2], rays[6]),
        "rays": key(colour, *rays[::2]),
        "rays, turned": key(colour, *np.sort(rays[::2], 0)),
        "eight rays": key(colour, *rays),
        "edge": key(colour, to_edge),
        "halves": key(colour, rows % 2, columns % 2),
        "thirds": key(colour, rows % 3, columns % 3),
        "patch 1": patch(colour, 1),
        "patch 1, turned": patch(colour, 1, any_orientation=True),
        "patch 2, turned": patch(colour, 2, any_orientation=True),
        "patch 3, turned": patch(colour, 3, any_orientation=True),
    }
    for name, shapes in (("shape", scene.shapes), ("thing", scene.things)):
        keys |= {f"{name} {measure}": found for measure, found in object_keys(colour, shapes).items()}
    for name, views in (("crop", scene.crops), ("fall", scene.falls)):
        keys |= {f"{name} {number}": key(view) for number, view in enumerate(named(views))}
    return keys


def is_view(name: str) -> bool:
    """Whether a key is the colour of one view: the tables of colours go without such keys."""
    return name.startswith(("crop", "fall"))


VIEW_TABLES = ("everywhere", "colour", "tiles", "eight rays", "shape edge", "shape extreme", "patch 1")
"""Keys of the tables whose outcomes are views; the other tables have too many cells to a key to need them."""


class Cells:
    """What the tables see of one input grid; N are the cells of the output.

    views: [N, V]. by_colour, by_rank, for_views: keys [K, N] of the tables whose outcomes are colours, ranks and views.
    code_of: [10], the rank of a colour by how common it is in the input, or 10 + the colour where the input lacks it.
    colour_of: [20], the colour of such a code, OUTSIDE where the input has fewer colours.
    """

    def __init__(self, source: Grid, size: Size) -> None:
        scene = Scene(source, size)
        counts = np.bincount(source.ravel(), minlength=NUM_COLORS)
        order = np.argsort(-counts, kind="stable")
        colours = np.arange(OUTSIDE + 1)
        rank = np.append(np.argsort(order, kind="stable"), OUTSIDE)
        keys = scene_keys(scene, np.stack([colours, rank]))
        by_colour, by_rank = distinct([*keys.values()])
        self.views = scene.views.reshape(-1, size[0] * size[1]).T
        self.by_colour = by_colour[[not is_view(name) for name in keys]]
        self.by_rank = by_rank
        self.for_views = by_rank[[name in VIEW_TABLES for name in keys]]
        self.code_of = np.where(counts > 0, rank[:NUM_COLORS], NUM_COLORS + colours[:NUM_COLORS])
        self.colour_of = np.concatenate([np.where(counts[order] > 0, order, OUTSIDE), colours[:NUM_COLORS]])


def distinct(keys: Sequence[Grid]) -> Keys:
    """[2, K, N], no key of one table the same as that of another. keys: [2, H, W] each."""
    tables = np.stack(keys, 1).reshape(2, len(keys), -1)
    return scrambled(tables ^ MULTIPLIERS[-len(keys) :, None])


def cells_of(grid: Grid, size: Size) -> Cells:
    """Kept, since the grids of a task are asked for by each query of it."""
    return known_cells(grid.astype(np.uint8).tobytes(), shape(grid), size)


@lru_cache(maxsize=64)
def known_cells(colours: bytes, sides: Size, size: Size) -> Cells:
    return Cells(np.frombuffer(colours, dtype=np.uint8).astype(np.int64).reshape(sides), size)


class Found(NamedTuple):
    """What tables of one kind say, each for itself.

    outcomes: [K, N, O], how often each outcome was found where the key is that of the query's cell.
    right: [K, M], which cells of the demonstrations a table gets right when it has not seen that demonstration.
    """

    outcomes: Counts
    right: npt.NDArray[np.bool_]


class Shown(NamedTuple):
    """The M cells of all demonstrations, then the N cells of the query.

    cells: of each demonstration and of the query. owner: [M + N], which of them. answer: [M], the output's colour.
    """

    cells: list[Cells]
    owner: Grid
    answer: Grid


def consult(keys: Sequence[Keys], shown: Shown, flags: Counts, meaning: Grid) -> Found:
    """keys: [K, cells] of each demonstration and of the query. flags: [M, O], which outcomes the answer is. meaning:
    [M, O], the colour that each outcome stands for.
    """
    # The cells of one key and one owner are a group, which learns from the other groups of its key, not from itself:
    # a demonstration is left out of what is said about it, and the query, which has no answer, adds nothing.
    shift, answered = np.uint64(len(keys).bit_length()), len(flags)
    codes = (np.concatenate(keys, 1) << shift) | shown.owner.astype(np.uint64)
    order = codes.argsort(axis=None)
    ordered = codes.ravel()[order]
    groups = starts(ordered)
    entries = starts(ordered[groups] >> shift)
    unanswered = np.zeros((codes.shape[1] - answered, flags.shape[1]), dtype=np.int32)
    own = np.add.reduceat(np.concatenate([flags, unanswered])[order % codes.shape[1]], groups)
    others = spread(np.add.reduceat(own, entries), entries, len(own)) - own
    group = np.empty_like(order)
    group[order] = spread(np.arange(len(groups)), groups, len(order))
    shown_to, asking = np.split(group.reshape(codes.shape), [answered], 1)
    best = meaning[np.arange(answered), others.argmax(1)[shown_to]]
    return Found(others[asking], (best == shown.answer) & (others.max(1) > 0)[shown_to])


def starts(ordered: npt.NDArray[Element]) -> npt.NDArray[np.intp]:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def spread(values: npt.NDArray[Element], first: npt.NDArray[np.intp], end: int) -> npt.NDArray[Element]:
    """The value of each run at all its places. first: where the runs begin. end: where the last one ends."""
    return np.repeat(values, np.diff(first, append=end), 0)


def colour_tables(shown: Shown) -> Found:
    present, code = np.unique(shown.answer, return_inverse=True)
    flags = np.eye(len(present), dtype=np.int32)[code]
    found = consult([cells.by_colour for cells in shown.cells], shown, flags, np.broadcast_to(present, flags.shape))
    return found._replace(outcomes=as_colours(found.outcomes, present))


def rank_tables(shown: Shown) -> Found:
    owner = shown.owner[: len(shown.answer)]
    codes = np.stack([cells.code_of for cells in shown.cells])[owner, shown.answer]
    present, code = np.unique(codes, return_inverse=True)
    flags = np.eye(len(present), dtype=np.int32)[code]
    meaning = np.stack([cells.colour_of[present] for cells in shown.cells])
    found = consult([cells.by_rank for cells in shown.cells], shown, flags, meaning[owner])
    return found._replace(outcomes=as_colours(found.outcomes, meaning[-1]))


def view_tables(shown: Shown) -> Found:
    *demonstrations, query = (cells.views for cells in shown.cells)
    views = np.concatenate(demonstrations)
    flags = (views == shown.answer[:, None]).astype(np.int32)
    found = consult([cells.for_views for cells in shown.cells], shown, flags, views)
    # Many views show the colour of one answer: the one that does most often stands for all.
    best = found.outcomes.argmax(-1)[..., None]
    most = np.take_along_axis(found.outcomes, best, -1)
    return found._replace(outcomes=as_colours(most, query[np.arange(len(query))[:, None], best]))


def as_colours(outcomes: Counts, meaning: Grid) -> Counts:
    """Counts [K, N, 10] of colours from those of outcomes [K, N, O]. meaning: [O] or [K, N, O], colours or OUTSIDE."""
    counts = np.zeros((*outcomes.shape[:2], NUM_COLORS + 1), dtype=np.int32)
    table, cell = np.ix_(*map(np.arange, outcomes.shape[:2]))
    for outcome in range(outcomes.shape[-1]):
        counts[table, cell, meaning[..., outcome]] += outcomes[..., outcome]
    return counts[..., :NUM_COLORS]


@dataclass(frozen=True, eq=False)
class Lookup:
    """What the most reliable tables say about a query, the best one first; empty rows where there are fewer.

    counts: [KEPT, 10, H, W] uint8, how often each colour was found, at most 255.
    tables: [KEPT] int64, their numbers in `table_names`, and the next one in empty rows.
    statistics: [KEPT, STATISTICS] float32:
        the share of a demonstration's cells that a table gets right without having seen that demonstration, on average,
        the share of demonstrations that it gets right in full,
        the share right of the cells that differ from the scaled input (of all cells where none does),
        the share of the query's cells that it says something about,
        1 where there were two demonstrations or more to tell,
        and the logarithm of how many tables say the same about the query, over 3.
    """

    counts: npt.NDArray[np.uint8]
    tables: npt.NDArray[np.int64]
    statistics: npt.NDArray[np.float32]


@cache
def table_names() -> list[str]:
    """The tables in their order: the key, and what the outcomes are."""
    keys = scene_keys(Scene(np.zeros((1, 1), dtype=np.int64), (1, 1)), np.zeros((2, OUTSIDE + 1), dtype=np.int64))
    colours, ranks, views = (name for name in keys if not is_view(name)), keys, (n for n in keys if n in VIEW_TABLES)
    named = (("colours", colours), ("ranks", ranks), ("views", views))
    return [f"{name}: {outcomes}" for outcomes, names in named for name in names]


def look_up(demonstrations: Sequence[Pair], source: Grid, size: Size) -> Lookup:
    """What the demonstrations say about an input grid's output of a size [H, W]."""
    counts = np.zeros((KEPT, NUM_COLORS, *size), dtype=np.uint8)
    tables = np.full(KEPT, len(table_names()))
    statistics = np.zeros((KEPT, STATISTICS), dtype=np.float32)
    if demonstrations:
        answers = [pair.output.ravel() for pair in demonstrations]
        cells = [cells_of(pair.input, shape(pair.output)) for pair in demonstrations] + [cells_of(source, size)]
        owner = np.repeat(np.arange(len(cells)), [len(each.views) for each in cells])
        shown = Shown(cells, owner, np.concatenate(answers))
        found = [consulted(shown) for consulted in (colour_tables, rank_tables, view_tables)]
        outcomes = np.concatenate([each.outcomes for each in found])
        told = reliability(np.concatenate([each.right for each in found]), outcomes, shown)
        kept = most_reliable(outcomes, told)
        rows, alike = (np.array([*numbers], dtype=np.int64) for numbers in (kept, kept.values()))
        counts[: len(kept)] = np.minimum(outcomes[rows], 255).transpose(0, 2, 1).reshape(len(kept), NUM_COLORS, *size)
        tables[: len(kept)] = rows
        statistics[: len(kept)] = np.column_stack([told[rows], np.log(alike) / 3])
    return Lookup(counts, tables, statistics)


def reliability(right: npt.NDArray[np.bool_], outcomes: Counts, shown: Shown) -> npt.NDArray[np.float32]:
    """[K, STATISTICS] of each table."""
    cells, owner = shown.cells[:-1], shown.owner[: len(shown.answer)]
    share = np.add.reduceat(right, starts(owner), axis=1, dtype=np.float64) / np.bincount(owner)
    differs = np.concatenate([each.views[:, 0] for each in cells]) != shown.answer
    changed = right[:, differs].mean(1) if differs.any() else share.mean(1)
    covered = outcomes.any(-1).mean(1)
    told = np.full(len(right), float(len(cells) > 1))
    return np.stack([share.mean(1), (share == 1).mean(1), changed, covered, told], 1).astype(np.float32)


def most_reliable(outcomes: Counts, told: npt.NDArray[np.float32]) -> dict[int, int]:
    """The tables to keep, the best one first, each for all that say the same of the query, and how many these are."""
    worth = told[:, :4] @ np.array([1, 1, 0.3, 0.1])
    says = np.where(outcomes.any(-1), outcomes.argmax(-1), OUTSIDE).astype(np.uint8)
    first: dict[bytes, int] = {}
    alike: Counter[int] = Counter()
    for table in np.argsort(-worth, kind="stable").tolist():
        if says[table].min() < OUTSIDE:
            alike[first.setdefault(says[table].tobytes(), table)] += 1
    return {table: alike[table] for table in [*first.values()][:KEPT]}
