"""The predicates over token positions that every layout is made of.

A rule answers, for head `h`, query position `i` and key position `j`, whether the coefficient is kept. It also answers for whole
tiles, by interval arithmetic, so that an index is built in time and memory proportional to the tiles it keeps and a tile's
coefficients are looked at only where the tile is partial:

- `visible`: the truth, coefficient by coefficient;
- `enumerate`: tile codes that contain every tile with a kept coefficient (a superset, without duplicates);
- `bounds`: per tile, whether some coefficient may be kept and whether every one surely is;
- `keys`: integers per tile; tiles of equal keys have equal content, so masks are evaluated once per distinct key.

`readable_from` says which keys a cache has to keep.

All arithmetic is on int64 tensors of positions; a rule never holds a length of its own except where its layout is a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

# Larger than any position, small enough that sums of a few stay far from int64's end.
UNBOUNDED = 1 << 40

# `start <= position < stop`, ascending, neither empty nor touching; a stop of UNBOUNDED or more means no end.
Intervals = tuple[tuple[int, int], ...]
EVERY_POSITION: Intervals = ((0, UNBOUNDED),)


def join_intervals(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """The positions in any of `intervals`, which may overlap and come in any order."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if start >= stop:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return tuple(joined)


def common_intervals(first: Intervals, second: Intervals) -> Intervals:
    """The positions in both."""
    return join_intervals(
        (max(start, other_start), min(stop, other_stop))
        for start, stop in first
        for other_start, other_stop in second
    )


@dataclass(frozen=True)
class TileGrid:
    """All tiles of one shape over `num_q_tiles x num_kv_tiles`, once for each entry of `heads`.

    Query tiles count from `first_q_tile`, so that a grid may hold the rows of a few queries alone. A tile's code is
    `(slot * num_q_tiles + q) * num_kv_tiles + kv`, slot being the place of its head in `heads`.
    """

    tile_q: int
    tile_kv: int
    num_q_tiles: int
    num_kv_tiles: int
    heads: tuple[int, ...]
    device: torch.device
    first_q_tile: int = 0

    @property
    def first_row(self) -> int:
        """The query position that the grid begins at."""
        return self.first_q_tile * self.tile_q

    def arange(self, end: int) -> Tensor:
        return torch.arange(end, dtype=torch.int64, device=self.device)

    def expand_rows(self, start: Tensor, stop: Tensor) -> Tensor:
        """Codes of key tiles `start[q] <= kv < stop[q]` of every query tile q, for every head."""
        start = start.clamp(0, self.num_kv_tiles)
        counts = (stop.clamp(0, self.num_kv_tiles) - start).clamp(min=0)
        query = torch.repeat_interleave(self.arange(self.num_q_tiles), counts)
        first = torch.cumsum(counts, 0) - counts
        key = start[query] + self.arange(query.numel()) - first[query]
        return self.for_all_heads(query * self.num_kv_tiles + key)

    def for_all_heads(self, codes: Tensor) -> Tensor:
        """The codes of the first head's tiles, repeated for every head."""
        if len(self.heads) == 1:
            return codes
        stride = self.num_q_tiles * self.num_kv_tiles
        return (self.arange(len(self.heads))[:, None] * stride + codes).reshape(-1)

    def tiles(self, codes: Tensor) -> Tiles:
        """The tiles of int64 `codes` [num_tiles]."""
        heads = torch.tensor(self.heads, dtype=torch.int64, device=self.device)
        row_codes = codes // self.num_kv_tiles
        slot = row_codes // self.num_q_tiles
        return Tiles(
            self, slot, heads[slot], row_codes % self.num_q_tiles, codes % self.num_kv_tiles
        )


@dataclass(frozen=True)
class Tiles:
    """Some tiles of a grid: int64 vectors of one length.

    Attributes:
        slot: place of the head in `grid.heads`.
        head: its number.
        q, kv: query tile, counted from the grid's first one, and key tile.
        row_start, row_last, col_start, col_last: first and last position of a tile's queries and keys.
    """

    grid: TileGrid
    slot: Tensor
    head: Tensor
    q: Tensor
    kv: Tensor

    @cached_property
    def row_start(self) -> Tensor:
        return self.grid.first_row + self.q * self.grid.tile_q

    @cached_property
    def col_start(self) -> Tensor:
        return self.kv * self.grid.tile_kv

    @cached_property
    def row_last(self) -> Tensor:
        return self.row_start + self.grid.tile_q - 1

    @cached_property
    def col_last(self) -> Tensor:
        return self.col_start + self.grid.tile_kv - 1

    def select(self, chosen: Tensor) -> Tiles:
        return Tiles(
            self.grid, self.slot[chosen], self.head[chosen], self.q[chosen], self.kv[chosen]
        )


class Rule(ABC):
    """Which coefficients are kept, as a boolean expression over positions; what it says of tiles lets an index leave tiles out unread."""

    varies_by_head = False

    @abstractmethod
    def visible(self, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        """Whether coefficients are kept; the arguments broadcast against each other."""

    @abstractmethod
    def enumerate(self, grid: TileGrid) -> Tensor:
        """Codes of a duplicate-free superset of the tiles with a kept coefficient."""

    @abstractmethod
    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """`(some, every)`: False in `some` means surely empty, True in `every` means surely full."""

    @abstractmethod
    def _partial_keys(self, tiles: Tiles) -> list[Tensor]:
        """Integers per tile; where all are equal, so is the content. Only those of partial tiles matter."""

    def keys(self, tiles: Tiles) -> list[Tensor]:
        """Integers per tile; where all are equal, so is the content."""
        some, every = self.bounds(tiles)
        partial = some & ~every
        # Wherever a tile is surely full or empty, its place does not matter.
        keys = [torch.where(partial, key, 0) for key in self._partial_keys(tiles)]
        return [some.long() + every.long(), *keys]

    def readable_from(self, position: int) -> Intervals:
        """Positions that hold every key which a query at `position` or later may read, whatever the length.

        A superset: a rule without the structure to say it answers with every position.
        """
        return EVERY_POSITION

    def __and__(self, other: Rule) -> Rule:
        return All((self, other))

    def __or__(self, other: Rule) -> Rule:
        return AnyOf((self, other))


class IntervalRule(Rule):
    """A rule whose kept columns, over a range of rows, lie in one interval."""

    @abstractmethod
    def columns(self, row_start: Tensor, row_last: Tensor) -> tuple[Tensor, Tensor]:
        """First and last column (inclusive) that any row of the range may keep."""

    def readable_from(self, position: int) -> Intervals:
        first, last = self.columns(
            torch.tensor(position, device="cpu"), torch.tensor(UNBOUNDED, device="cpu")
        )
        return join_intervals([(max(0, int(first)), int(last) + 1)])

    def enumerate(self, grid: TileGrid) -> Tensor:
        return grid.expand_rows(*self._tile_range(grid))

    def _tile_range(self, grid: TileGrid) -> tuple[Tensor, Tensor]:
        row_start = grid.first_row + grid.arange(grid.num_q_tiles) * grid.tile_q
        first, last = self.columns(row_start, row_start + grid.tile_q - 1)
        return first // grid.tile_kv, last // grid.tile_kv + 1


@dataclass(frozen=True)
class Band(IntervalRule):
    """`low <= row - col <= high`, in units of `unit` tokens: `low <= row // unit - col // unit <= high`."""

    low: int = -UNBOUNDED
    high: int = UNBOUNDED
    unit: int = 1

    def visible(self, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        difference = row // self.unit - col // self.unit
        return (difference >= self.low) & (difference <= self.high)

    def columns(self, row_start: Tensor, row_last: Tensor) -> tuple[Tensor, Tensor]:
        first = (row_start // self.unit - self.high) * self.unit
        last = (row_last // self.unit - self.low + 1) * self.unit - 1
        return first, last

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        smallest = tiles.row_start // self.unit - tiles.col_last // self.unit
        largest = tiles.row_last // self.unit - tiles.col_start // self.unit
        some = (largest >= self.low) & (smallest <= self.high)
        every = (smallest >= self.low) & (largest <= self.high)
        return some, every

    def _partial_keys(self, tiles: Tiles) -> list[Tensor]:
        # Content depends on the difference of the units the tile starts in and on where in the unit it starts.
        keys = [tiles.row_start // self.unit - tiles.col_start // self.unit]
        if tiles.grid.tile_q % self.unit:
            keys.append(tiles.row_start % self.unit)
        if tiles.grid.tile_kv % self.unit:
            keys.append(tiles.col_start % self.unit)
        return keys


@dataclass(frozen=True)
class Columns(IntervalRule):
    """`start <= col < stop`."""

    start: int
    stop: int

    def visible(self, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        kept = (col >= self.start) & (col < self.stop)
        return kept.expand(torch.broadcast_shapes(kept.shape, row.shape))

    def columns(self, row_start: Tensor, row_last: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(row_start, self.start), torch.full_like(row_start, self.stop - 1)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        some = (tiles.col_last >= self.start) & (tiles.col_start < self.stop)
        every = (tiles.col_start >= self.start) & (tiles.col_last < self.stop)
        return some, every

    def _partial_keys(self, tiles: Tiles) -> list[Tensor]:
        return [tiles.col_start]


@dataclass(frozen=True)
class Rows(IntervalRule):
    """`start <= row < stop`."""

    start: int
    stop: int

    def visible(self, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        kept = (row >= self.start) & (row < self.stop)
        return kept.expand(torch.broadcast_shapes(kept.shape, col.shape))

    def columns(self, row_start: Tensor, row_last: Tensor) -> tuple[Tensor, Tensor]:
        inside = (row_last >= self.start) & (row_start < self.stop)
        return torch.zeros_like(row_start), torch.where(inside, UNBOUNDED, -1)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        some = (tiles.row_last >= self.start) & (tiles.row_start < self.stop)
        every = (tiles.row_start >= self.start) & (tiles.row_last < self.stop)
        return some, every

    def _partial_keys(self, tiles: Tiles) -> list[Tensor]:
        return [tiles.row_start]


def _blocks_per_tile(tile: int, block_size: int) -> int:
    return max(1, tile // block_size)


def _block_pattern_keys(rule: Rule, tiles: Tiles, block_size: int) -> list[Tensor]:
    """The kept blocks of each tile as bits, for rules that are constant on blocks."""
    rows = _blocks_per_tile(tiles.grid.tile_q, block_size)
    cols = _blocks_per_tile(tiles.grid.tile_kv, block_size)
    row = tiles.row_start[:, None] + tiles.grid.arange(rows) * block_size
    col = tiles.col_start[:, None] + tiles.grid.arange(cols) * block_size
    kept = rule.visible(tiles.head[:, None, None], row[:, :, None], col[:, None, :])
    weights = 1 << tiles.grid.arange(cols)
    return list((kept * weights).sum(-1).unbind(1))


class Table(Rule):
    """`table[head, row // block_size, col // block_size]`, for calls whose positions lie inside the table.

    Tiles may reach past its ends, where no position exists. What lies there counts as kept, by `bounds` and `visible` alike, so that
    a tile at an end is as full as one before it and both may share a mask.

    Args:
        table: bool `[1 or heads, rows, cols]`, on the device the index is built on.
        block_size: tokens per entry and axis; 1 for a per-coefficient mask.
        first_row: position of the first row; not 0 only with `block_size=1`.
    """

    def __init__(self, table: Tensor, block_size: int, first_row: int = 0):
        self.table = table
        self.block_size = block_size
        self.first_row = first_row
        self.varies_by_head = table.shape[0] > 1
        self._pooled: dict[TileGrid, tuple[Tensor, Tensor]] = {}

    def _head(self, head: Tensor) -> Tensor:
        return head if self.varies_by_head else torch.zeros_like(head)

    def visible(self, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        row, col = (row - self.first_row) // self.block_size, col // self.block_size
        num_rows, num_cols = self.table.shape[1:]
        outside = (row < 0) | (row >= num_rows) | (col >= num_cols)
        row, col = row.clamp(0, num_rows - 1), col.clamp(max=num_cols - 1)
        return self.table[self._head(head), row, col] | outside

    def pooled(self, grid: TileGrid) -> tuple[Tensor, Tensor]:
        """`(some, every)` of each tile, `[1 or heads, num_q_tiles, num_kv_tiles]`."""
        if grid not in self._pooled:
            some = every = self.table
            for axis, start, tile, count in (
                (1, grid.first_row - self.first_row, grid.tile_q, grid.num_q_tiles),
                (2, 0, grid.tile_kv, grid.num_kv_tiles),
            ):
                some = _pool(some, axis, start, tile, count, self.block_size, torch.any, False)
                every = _pool(every, axis, start, tile, count, self.block_size, torch.all, True)
            self._pooled[grid] = (some, every & some)
        return self._pooled[grid]

    def enumerate(self, grid: TileGrid) -> Tensor:
        some = self.pooled(grid)[0]
        chosen = some[list(grid.heads)] if self.varies_by_head else some[:1]
        codes = chosen.flatten().nonzero().squeeze(1)
        return codes if self.varies_by_head else grid.for_all_heads(codes)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        some, every = self.pooled(tiles.grid)
        place = (self._head(tiles.head), tiles.q, tiles.kv)
        return some[place], every[place]

    def keys(self, tiles: Tiles) -> list[Tensor]:
        some, every = self.bounds(tiles)
        # A tile that reaches past an end is not empty there, where `some` does not look.
        end_row, end_col = (size * self.block_size for size in self.table.shape[1:])
        reaches_past = (
            (tiles.row_start < self.first_row)
            | (tiles.row_last >= self.first_row + end_row)
            | (tiles.col_last >= end_col)
        )
        matters = ~every & (some | reaches_past)
        keys = [torch.where(matters, key, 0) for key in self._partial_keys(tiles)]
        return [2 * every.long() + matters.long(), *keys]

    def _partial_keys(self, tiles: Tiles) -> list[Tensor]:
        if self.block_size == 1:
            return [tiles.grid.arange(tiles.q.numel())]
        return _block_pattern_keys(self, tiles, self.block_size)


def _pool(
    table: Tensor,
    axis: int,
    start: int,
    tile: int,
    count: int,
    block_size: int,
    reduce_axis,
    outside,
):
    """One axis of a block table at tile grain, `count` tiles from token `start` on; `outside` stands for entries past the table's ends."""
    if tile >= block_size:
        per_tile = tile // block_size
        first, total, size = start // block_size, count * per_tile, table.shape[axis]
        before = min(max(-first, 0), total)
        first = min(max(first, 0), size)
        table = table.narrow(axis, first, min(total - before, size - first))
        padding = [0, 0] * (table.dim() - axis)
        padding[-2:] = [before, total - before - table.shape[axis]]
        table = torch.nn.functional.pad(table, padding, value=outside)
        return reduce_axis(table.unflatten(axis, (count, per_tile)), dim=axis + 1)
    block = (start + torch.arange(count, device=table.device) * tile) // block_size
    inside = block < table.shape[axis]
    taken = table.index_select(axis, block.clamp(max=table.shape[axis] - 1))
    shape = [1] * table.dim()
    shape[axis] = count
    return torch.where(inside.view(shape), taken, outside)


class RandomBlocks(Rule):
    """`count` blocks per block row and head, drawn without replacement among the blocks outside window and global columns.

    The draw depends on (seed, layer, head, block row) alone: equal in training and evaluation, on every rank and after reload.
    With causality it draws among the earlier blocks, so the rows of a shorter sequence are those of a longer one; without,
    among all `num_blocks` of the sequence.
    """

    varies_by_head = True

    def __init__(
        self,
        block_size: int,
        count: int,
        *,
        half_window: int,
        num_global: int,
        seed: int,
        layer: int,
        is_causal: bool,
        num_blocks: int,
        num_heads: int,
        device: torch.device,
        first_head: int = 0,
    ):
        self.block_size = block_size
        row = torch.arange(num_blocks, device=device)
        head = first_head + torch.arange(num_heads, device=device)[:, None]
        # The free columns are [num_global, window_first) and, without causality, (window_last, num_blocks).
        window_first = (row - half_window).clamp(min=num_global)
        window_last = (row + half_window).clamp(min=num_global - 1, max=num_blocks - 1)
        free_before = window_first - num_global
        free_after = torch.zeros_like(row) if is_causal else num_blocks - 1 - window_last
        num_free = free_before + free_after  # [num_blocks]

        picks: list[Tensor] = []
        for draw in range(count):
            remaining = (num_free - draw).clamp(min=0)
            place = _hash(seed, layer, head, row, draw) % remaining.clamp(
                min=1
            )  # [heads, num_blocks]
            # The place counts only what is left: step over the earlier picks in ascending order.
            for earlier in torch.stack(picks).sort(0).values if picks else ():
                place = place + (place >= earlier)
            picks.append(torch.where(remaining > 0, place, UNBOUNDED))
        chosen = torch.stack(picks, -1)  # [heads, num_blocks, count]
        is_before = chosen < free_before[:, None]
        column = torch.where(
            is_before, chosen + num_global, chosen - free_before[:, None] + window_last[:, None] + 1
        )
        self.picks = torch.where(chosen >= UNBOUNDED, -1, column)

    def _picks_of_rows(self, head: Tensor, row: Tensor) -> Tensor:
        block_row = (row // self.block_size).clamp(max=self.picks.shape[1] - 1)
        return self.picks[head, block_row]

    def visible(self, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        # Picks are gathered at the row's own shape, then compared with the columns: no [rows, cols, count] tensor of positions.
        head, row = torch.broadcast_tensors(head, row)
        picks = self._picks_of_rows(head, row)
        block_col = col // self.block_size
        return reduce(torch.logical_or, (pick == block_col for pick in picks.unbind(-1)))

    def _matches(self, tiles: Tiles) -> Tensor:
        rows = _blocks_per_tile(tiles.grid.tile_q, self.block_size)
        row = tiles.row_start[:, None] + tiles.grid.arange(rows) * self.block_size
        first = self._picks_of_rows(tiles.head[:, None], row) * self.block_size
        overlap = (first >= 0) & (first <= tiles.col_last[:, None, None])
        overlap &= first + self.block_size > tiles.col_start[:, None, None]
        return overlap.flatten(1).sum(1)

    def enumerate(self, grid: TileGrid) -> Tensor:
        rows = grid.num_q_tiles * _blocks_per_tile(grid.tile_q, self.block_size)
        row = grid.first_row + grid.arange(rows) * max(1, min(grid.tile_q, self.block_size))
        heads = torch.tensor(grid.heads, dtype=torch.int64, device=grid.device)
        picks = self._picks_of_rows(heads[:, None], row[None])  # [slots, rows, count]
        per_block = _blocks_per_tile(self.block_size, grid.tile_kv)
        tile = picks[..., None] * self.block_size // grid.tile_kv + grid.arange(per_block)
        line = grid.arange(len(grid.heads))[:, None] * grid.num_q_tiles
        line = line + row // grid.tile_q - grid.first_q_tile
        codes = line[:, :, None, None] * grid.num_kv_tiles + tile
        kept = (picks >= 0)[..., None] & (tile < grid.num_kv_tiles)
        return torch.unique(codes[kept])

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        matches = self._matches(tiles)
        blocks = _blocks_per_tile(tiles.grid.tile_q, self.block_size) * _blocks_per_tile(
            tiles.grid.tile_kv, self.block_size
        )
        return matches > 0, matches == blocks

    def _partial_keys(self, tiles: Tiles) -> list[Tensor]:
        return _block_pattern_keys(self, tiles, self.block_size)


def _hash(*values: int | Tensor) -> Tensor:
    """A 31-bit hash of broadcastable non-negative integers, the same on every device."""
    mask = 0x7FFFFFFF
    state: int | Tensor = 0x3C6EF372
    for value in values:
        state = (state * 31 + value) & mask
        for shift, factor in ((16, 0x045D9F3B), (15, 0x2C1B3C6D), (16, 0x119DE1F3)):
            state = ((state ^ (state >> shift)) * factor) & mask
    assert isinstance(state, Tensor)
    return state ^ (state >> 16)


class _Combination(Rule):
    def __init__(self, rules: Seq[Rule]):
        flat: list[Rule] = []
        for rule in rules:
            flat.extend(rule.rules if type(rule) is type(self) else (rule,))
        self.rules = tuple(flat)
        self.varies_by_head = any(rule.varies_by_head for rule in self.rules)

    def _partial_keys(self, tiles: Tiles) -> list[Tensor]:
        return [key for rule in self.rules for key in rule.keys(tiles)]


class AnyOf(_Combination):
    """Union: kept where any of the rules keeps."""

    def readable_from(self, position: int) -> Intervals:
        return join_intervals(
            interval for rule in self.rules for interval in rule.readable_from(position)
        )

    def visible(self, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return reduce(torch.logical_or, (rule.visible(head, row, col) for rule in self.rules))

    def enumerate(self, grid: TileGrid) -> Tensor:
        return torch.unique(torch.cat([rule.enumerate(grid) for rule in self.rules]))

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        some, every = zip(*(rule.bounds(tiles) for rule in self.rules), strict=True)
        return reduce(torch.logical_or, some), reduce(torch.logical_or, every)


class All(_Combination):
    """Intersection: kept where all of the rules keep."""

    def readable_from(self, position: int) -> Intervals:
        return reduce(common_intervals, (rule.readable_from(position) for rule in self.rules))

    def visible(self, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return reduce(torch.logical_and, (rule.visible(head, row, col) for rule in self.rules))

    def enumerate(self, grid: TileGrid) -> Tensor:
        # Interval rules intersect exactly and cheaply; among the rest the shortest list will do, `bounds` sorts out the tiles.
        intervals = [rule for rule in self.rules if isinstance(rule, IntervalRule)]
        others = [rule.enumerate(grid) for rule in self.rules if not isinstance(rule, IntervalRule)]
        if others and not intervals:
            return min(others, key=Tensor.numel)
        ranges = [rule._tile_range(grid) for rule in intervals]
        start = reduce(torch.maximum, (first for first, _ in ranges))
        stop = reduce(torch.minimum, (last for _, last in ranges))
        if others:
            length = (stop.clamp(max=grid.num_kv_tiles) - start.clamp(min=0)).clamp(min=0)
            shortest = min(others, key=Tensor.numel)
            if shortest.numel() <= int(length.sum()) * len(grid.heads):
                return shortest
        return grid.expand_rows(start, stop)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        some, every = zip(*(rule.bounds(tiles) for rule in self.rules), strict=True)
        return reduce(torch.logical_and, some), reduce(torch.logical_and, every)


CAUSAL = Band(low=0)


def distinct(keys: Seq[Tensor]) -> tuple[Tensor, Tensor]:
    """Number rows of equal keys: `(representative, number)`, a row index per distinct row and each row's number."""
    number = torch.zeros_like(keys[0])
    for key in keys:
        values, inverse = torch.unique(key, return_inverse=True)
        number = torch.unique(number * values.numel() + inverse, return_inverse=True)[1]
    count = int(number.max()) + 1 if number.numel() else 0
    representative = torch.zeros(count, dtype=torch.int64, device=number.device)
    representative[number] = torch.arange(number.numel(), device=number.device)
    return representative, number
