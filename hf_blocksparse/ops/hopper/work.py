"""Who computes which tile - query tiles in the forward kernel, key tiles in the backward one - as lists made on the device.

Tiles of one head follow each other, so that what they read stays in the L2 cache; inside a head the long ones come first. Tiles that take
a good part of a multiprocessor's share go before all others, whatever their head: one of them at the end would keep everybody waiting.
Key tiles much longer than a share are walked in parts (`ops/triton/column_parts.py`), each by a multiprocessor of its own; of rows
nothing is read back to the host, of columns whether any is as long as that.

Each tile goes to the multiprocessor with the least work so far. On an NVIDIA H200 lists of key tiles were as fast as a program for each
of them, and with BigBird's long and short columns 1.03 (head size 128) to 1.14 times (64) as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_blocksparse.capture import build_to_keep, check_not_capturing, is_capturing
from hf_blocksparse.ops.triton.column_parts import (
    Parts,
    Schedules,
    SplitColumns,
    count_parts,
    cut,
    split_columns,
)
from hf_blocksparse.ops.triton.column_parts import known as _known
from hf_blocksparse.ops.triton.decode_sizes import processors as _multiprocessors
from hf_blocksparse.ops.triton.launch import tile_lists
from hf_blocksparse.ops.triton.tiles import clip_entries, load_list, load_sequence
from hf_blocksparse.sequences import Q_LEN, Q_POS

if TYPE_CHECKING:
    from hf_blocksparse.block_index import BlockIndex
    from hf_blocksparse.sequences import Sequences

TILE = 128
RECORD = 16
"""Integers per record: batch, head, tensor row of the tile's first query, begin and end of the sequence's query rows, what to add to a
key's position for its row, begin and end of the sequence's key rows, first partial entry, number of them, first full entry that needs no
mask, key tile of the first step, whether the full entry before those needs a mask, number of steps with a mask, number of steps, mask of
the first step (-1: none)."""
STEPS = 14

COLUMN_RECORD = 20
"""Integers per key tile and query head that reads it: batch, query head, tensor row of the tile's first key, begin and end of the
sequence's key rows, what to add to a query's position for its row, begin and end of the sequence's query rows, slot of query tile 0 in the
sums of dQ, first partial entry, number of them, first full entry that needs no mask, whether the full entry before those needs one, number
of full entries that do, number of query tiles with a mask, number of query tiles, the same of all heads of the group together, the full
entry at the sequence's end, slot for the sums of dK and dV (-1: they are all of them)."""
(
    COLUMN_KV_ROW,
    COLUMN_KV_BEGIN,
    COLUMN_KV_END,
    COLUMN_Q_BEGIN,
    COLUMN_Q_END,
    COLUMN_FIRST_SLOT,
    COLUMN_PARTIAL,
    COLUMN_NUM_PARTIAL,
    COLUMN_FULL,
    COLUMN_FULL_START,
    COLUMN_NUM_EDGES,
    COLUMN_NUM_MASKED,
    COLUMN_TILES,
    COLUMN_GROUP_TILES,
    COLUMN_LAST_EDGE,
    COLUMN_SLOT,
) = 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18

# Tiles are dealt out to one multiprocessor in so many at a time, so that one with a long tile is left in peace meanwhile.
DEALT_TO = 4
# A tile is long if this many of its kind fill a multiprocessor's share.
LONG = 4
# What a tile costs beside its steps, in steps.
TILE_OVERHEAD = 1
# Rows that `rows_kept` takes together: those of one warp.
GROUP = 16
# So many programs with tiles of 64 share a multiprocessor.
PROGRAMS_OF_SMALL_TILES = 2


@dataclass(frozen=True)
class Schedule:
    """`records`: int32 `[num_tiles, RECORD]`; multiprocessor `i` computes those from `offsets[i]` to `offsets[i + 1]`."""

    records: Tensor
    offsets: Tensor

    @property
    def num_programs(self) -> int:
        return self.offsets.numel() - 1


@dataclass(frozen=True)
class ColumnSchedule:
    """Of the backward kernel and the key pass. `records`: int32 `[num_tiles, group_size, COLUMN_RECORD]`; program `i` computes the tiles,
    or parts of them, from `offsets[i]` to `offsets[i + 1]`. Query tile `t` of sequence `s` is added up in slot `first_slots[s] + t` of
    `num_slots`. `split`: the tiles in parts, None where there are none.
    """

    records: Tensor
    offsets: Tensor
    first_slots: Tensor
    num_slots: int
    split: SplitColumns | None

    @property
    def num_programs(self) -> int:
        return self.offsets.numel() - 1


@triton.jit
def describe_kernel(
    records,
    items,
    table,
    lists,
    NUM_FIELDS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    """Grid: (items, heads). Writes the record of one tile; its number of steps is 0 for an unused item.

    A tile without a key gets one step, in which every key is masked: no kernel then needs a path of its own for it.
    """
    item = tl.program_id(0)
    head = tl.program_id(1)
    record = records + (item * tl.num_programs(1) + head).to(tl.int64) * NUM_FIELDS
    sequence = tl.load(items + 2 * item)
    if sequence < 0:
        tl.store(record + 14, 0)
        return
    tile = tl.load(items + 2 * item + 1)
    batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos = load_sequence(table, sequence)
    begin, partial_begin, end = load_list(lists, sequence, head, tile)
    full_first, full_last, full_start, full_stop = clip_entries(
        lists.indices, begin, partial_begin, kv_pos, kv_pos + kv_len, TILE_KV
    )
    partial_first, partial_last, partial_start, partial_stop = clip_entries(
        lists.indices, partial_begin, end, kv_pos, kv_pos + kv_len, TILE_KV
    )
    partial_first -= partial_start
    num_partial = partial_last + partial_stop - partial_first
    num_masked = num_partial + full_start + full_stop
    num_full = tl.maximum(full_last - full_first, 0)
    is_empty = num_masked + num_full == 0
    # The step of an empty tile takes entry 0 for a mask, and no key row is the sequence's.
    full_first = tl.where(is_empty, 0, full_first)
    num_masked = tl.where(is_empty, 1, num_masked)
    # The steps with a mask: the partial entries, then the full ones at the sequence's start and end.
    first_masked = tl.where(full_start > 0, full_first - 1, full_last)
    first_masked = tl.where(num_partial > 0, partial_first, first_masked)
    first = tl.where(is_empty, 0, tl.where(num_masked > 0, first_masked, full_first))
    tl.store(record, batch)
    tl.store(record + 1, head)
    tl.store(record + 2, tile * TILE_Q - q_pos + q_row)
    tl.store(record + 3, q_row)
    tl.store(record + 4, q_row + q_len)
    tl.store(record + 5, kv_row - kv_pos)
    tl.store(record + 6, tl.where(is_empty, 0, kv_row))
    tl.store(record + 7, tl.where(is_empty, 0, kv_row + kv_len))
    tl.store(record + 8, partial_first)
    tl.store(record + 9, num_partial)
    tl.store(record + 10, full_first)
    tl.store(record + 11, tl.load(lists.indices + first))
    tl.store(record + 12, full_start)
    tl.store(record + 13, num_masked)
    tl.store(record + 14, num_masked + num_full)
    tl.store(record + 15, tl.load(lists.mask_ids + first))


@triton.jit
def describe_columns_kernel(
    records,
    items,
    table,
    lists,
    first_slots,
    NUM_FIELDS: tl.constexpr,
    TILE_SIZE: tl.constexpr,
):
    """Grid: (key items, query heads). Writes the record of one key tile and query head; no query tiles for an unused item."""
    item = tl.program_id(0)
    head = tl.program_id(1)
    record = records + (item * tl.num_programs(1) + head).to(tl.int64) * NUM_FIELDS
    sequence = tl.load(items + 2 * item)
    if sequence < 0:
        tl.store(record + 15, -1)
        return
    tile = tl.load(items + 2 * item + 1)
    batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos = load_sequence(table, sequence)
    begin, partial_begin, end = load_list(lists, sequence, head, tile)
    full_first, full_last, full_start, full_stop = clip_entries(
        lists.indices, begin, partial_begin, q_pos, q_pos + q_len, TILE_SIZE
    )
    partial_first, partial_last, partial_start, partial_stop = clip_entries(
        lists.indices, partial_begin, end, q_pos, q_pos + q_len, TILE_SIZE
    )
    partial_first -= partial_start
    num_partial = partial_last + partial_stop - partial_first
    num_edges = full_start + full_stop
    num_tiles = num_partial + num_edges + tl.maximum(full_last - full_first, 0)
    # Where the sequence ends inside the key tile, every query tile needs a mask.
    is_cut = (tile * TILE_SIZE < kv_pos) | ((tile + 1) * TILE_SIZE > kv_pos + kv_len)
    tl.store(record, batch)
    tl.store(record + 1, head)
    tl.store(record + 2, tile * TILE_SIZE - kv_pos + kv_row)
    tl.store(record + 3, kv_row)
    tl.store(record + 4, kv_row + kv_len)
    tl.store(record + 5, q_row - q_pos)
    tl.store(record + 6, q_row)
    tl.store(record + 7, q_row + q_len)
    tl.store(record + 8, tl.load(first_slots + sequence))
    tl.store(record + 9, partial_first)
    tl.store(record + 10, num_partial)
    tl.store(record + 11, full_first)
    tl.store(record + 12, full_start)
    tl.store(record + 13, num_edges)
    tl.store(record + 14, tl.where(is_cut, num_tiles, num_partial + num_edges))
    tl.store(record + 15, num_tiles)
    tl.store(record + 17, full_last)
    tl.store(record + 18, -1)


@triton.jit
def transpose_bank_kernel(bank, transposed, TILE_SIZE: tl.constexpr):
    """Grid: (masks,). Words of 32 queries per key, from words of 32 keys per query."""
    WORDS: tl.constexpr = TILE_SIZE // 32
    words = tl.arange(0, WORDS)
    bits = tl.arange(0, 32)
    base = tl.program_id(0).to(tl.int64) * (TILE_SIZE * WORDS)
    for word in tl.range(0, WORDS):
        queries = word * 32 + bits
        packed = tl.load(bank + base + queries[:, None] * WORDS + words[None, :])
        kept = (packed[:, :, None] >> bits[None, None, :]) & 1
        turned = tl.sum(kept << bits[:, None, None], 0)
        keys = words[:, None] * 32 + bits[None, :]
        tl.store(transposed + base + keys * WORDS + word, turned)


@triton.jit
def assign_kernel(costs, owners, num_tiles, num_programs, chunk, NUM_SLOTS: tl.constexpr):
    """Grid: (1,). Deals tiles out in their order, `chunk <= num_programs` at a time to as many owners with the least work so far."""
    slots = tl.arange(0, NUM_SLOTS)
    # A load with its owner's number in the low digits: sorting keeps them together.
    loads = slots + ((slots >= num_programs).to(tl.int64) << 60)
    for first in range(0, num_tiles, chunk):
        loads = tl.sort(loads)
        is_dealt = (slots < chunk) & (first + slots < num_tiles)
        cost = tl.load(costs + first + slots, mask=is_dealt, other=0)
        tl.store(owners + first + slots, loads % NUM_SLOTS, mask=is_dealt)
        loads += cost * NUM_SLOTS


_schedules: Schedules = WeakKeyDictionary()
_column_schedules: Schedules = WeakKeyDictionary()
_transposed_banks: WeakKeyDictionary[BlockIndex, Tensor] = WeakKeyDictionary()
_rows_kept: WeakKeyDictionary[BlockIndex, Tensor] = WeakKeyDictionary()


def schedule_for(index: BlockIndex, sequences: Sequences, heads: int) -> Schedule:
    """The schedule of a call with `heads` query heads, made at its first use and kept as long as index and sequences live."""
    known = _known(_schedules, index, sequences)
    if heads not in known:
        known[heads] = build_to_keep(
            index.bank.device,
            lambda: make_schedule(index, sequences, heads, _num_programs(index)),
        )
    return known[heads]


def column_schedule_for(
    index: BlockIndex, sequences: Sequences, heads: int, kv_heads: int
) -> ColumnSchedule:
    """The same for the backward kernel and the key pass."""
    known = _known(_column_schedules, index, sequences)
    if (heads, kv_heads) not in known:
        known[heads, kv_heads] = build_to_keep(
            index.bank.device,
            lambda: make_column_schedule(index, sequences, heads, kv_heads, _num_programs(index)),
        )
    return known[heads, kv_heads]


def _num_programs(index: BlockIndex) -> int:
    number = _multiprocessors(index.bank.device)
    return number if index.tile_q == TILE else PROGRAMS_OF_SMALL_TILES * number


def _order(
    group: Tensor, steps: Tensor, costs: Tensor, num_groups: int, num_programs: int
) -> Tensor:
    """Long tiles, then group by group from 1 on, the longer ones first, then tiles without a cost."""
    group = torch.where(costs * (LONG * num_programs) > costs.sum(), 0, group)
    group = torch.where(costs > 0, group, 1 + num_groups)
    return torch.argsort(group * (steps.max() + 1) + steps.max() - steps, stable=True)


def _deal_out(costs: Tensor, num_programs: int) -> tuple[Tensor, Tensor]:
    """Lists for `num_programs`, fewer where there are fewer tiles: the tiles, list by list, and where each list begins and ends.

    `costs`: of the tiles in the order in which they are dealt out, 0 for those that belong to no list.
    """
    num_tiles = costs.shape[0]
    num_lists = min(num_programs, num_tiles)
    owners = torch.empty_like(costs)
    assign_kernel[(1,)](
        costs,
        owners,
        num_tiles,
        num_lists,
        max(1, num_lists // DEALT_TO),
        NUM_SLOTS=triton.next_power_of_2(num_programs),
    )
    owners = torch.where(costs > 0, owners, num_lists)
    owners, by_owner = torch.sort(owners, stable=True)
    bounds = torch.arange(num_lists + 1, device=costs.device)
    return by_owner, torch.searchsorted(owners, bounds).to(torch.int32)


@torch.inference_mode(False)  # a schedule outlives the call
def make_schedule(
    index: BlockIndex, sequences: Sequences, heads: int, num_programs: int
) -> Schedule:
    """Lists for `num_programs`, fewer where there are fewer tiles. `index` is not empty."""
    if not sequences.is_transient:
        check_not_capturing(index.bank.device, "the schedule of these sequences")
    items = sequences.q_items(index.tile_q)
    num_items = items.shape[0]
    records = items.new_empty(num_items * heads, RECORD)
    describe_kernel[(num_items, heads)](
        records, items, sequences.table, tile_lists(index)[0],
        NUM_FIELDS=RECORD, TILE_Q=index.tile_q, TILE_KV=index.tile_kv,
    )  # fmt: skip
    steps = records[:, STEPS].long()
    overhead = TILE_OVERHEAD * index.tile_q // index.tile_kv  # in strips, where there are those
    costs = torch.where(steps > 0, steps + overhead, 0)
    group = 1 + records[:, 0] * heads + records[:, 1]
    order = _order(group, steps, costs, sequences.batch * heads, num_programs)
    by_owner, offsets = _deal_out(costs[order], num_programs)
    return Schedule(records[order[by_owner]].contiguous(), offsets)


@torch.inference_mode(False)
def make_column_schedule(
    index: BlockIndex,
    sequences: Sequences,
    heads: int,
    kv_heads: int,
    num_programs: int,
) -> ColumnSchedule:
    """Lists of key tiles; otherwise as `make_schedule`."""
    if not sequences.is_transient:
        check_not_capturing(index.bank.device, "the schedule of these sequences")
    tile = index.tile_kv
    items = sequences.kv_items(tile)
    num_items = items.shape[0]
    first_slots = _first_slots(sequences, tile)
    lists = tile_lists(index)[1]
    records = items.new_zeros(num_items * kv_heads, heads // kv_heads, COLUMN_RECORD)
    describe_columns_kernel[(num_items, heads)](
        records, items, sequences.table, lists, first_slots,
        NUM_FIELDS=COLUMN_RECORD, TILE_SIZE=tile,
    )  # fmt: skip
    is_used = records[:, 0, COLUMN_TILES] >= 0
    steps = records[:, :, COLUMN_TILES].sum(1)
    _give_empty_tiles_a_step(records, is_used & (steps == 0), lists.indices[0])
    steps = records[:, :, COLUMN_TILES].sum(1).long().clamp(min=0)
    split = None
    # Parts are counted on the host, which a capture does not wait for.
    num_parts = None if is_capturing(steps.device) else count_parts(steps, num_programs)
    if num_parts is not None:
        columns = records[:, 0, [0, 1, COLUMN_KV_ROW, COLUMN_KV_BEGIN, COLUMN_KV_END]]
        columns[:, 1] //= heads // kv_heads
        split = split_columns(columns, num_parts)
        parts = cut(steps, num_parts)
        records, is_used = _in_parts(records, parts), is_used[parts.column]
        steps = parts.end - parts.begin
    records[:, :, COLUMN_GROUP_TILES] = steps[:, None].int()
    costs = torch.where(is_used, steps + TILE_OVERHEAD, 0)
    group = 1 + records[:, 0, 0] * kv_heads + records[:, 0, 1] // (heads // kv_heads)
    order = _order(group, steps, costs, sequences.batch * kv_heads, num_programs)
    by_owner, offsets = _deal_out(costs[order], num_programs)
    return ColumnSchedule(
        records[order[by_owner]],
        offsets,
        first_slots,
        sequences.q_items(tile).shape[0],
        split,
    )


def _in_parts(records: Tensor, parts: Parts) -> Tensor:
    """The records of parts, from those of whole columns."""
    whole = records[parts.column]
    records = whole.clone()
    tiles = whole[:, :, COLUMN_TILES].long().clamp(min=0)
    first = tiles.cumsum(1) - tiles  # the heads of a group are walked one after the other
    begin = (parts.begin[:, None] - first).clamp(min=0).minimum(tiles).int()
    end = (parts.end[:, None] - first).clamp(min=0).minimum(tiles).int()
    num_partial = whole[:, :, COLUMN_NUM_PARTIAL]
    num_start = whole[:, :, COLUMN_FULL_START]
    num_edges = whole[:, :, COLUMN_NUM_EDGES]
    num_masked = whole[:, :, COLUMN_NUM_MASKED]

    def within(count: Tensor, before: Tensor | int) -> tuple[Tensor, Tensor]:
        """Of a run of `count` steps after `before` others: how many lie before the part, and how many in it."""
        skipped = (begin - before).clamp(min=0).minimum(count)
        return skipped, (end - before).clamp(min=0).minimum(count) - skipped

    skipped, partial_left = within(num_partial, 0)
    records[:, :, COLUMN_PARTIAL] += skipped
    records[:, :, COLUMN_NUM_PARTIAL] = partial_left
    records[:, :, COLUMN_FULL_START] = within(num_start, num_partial)[1]
    records[:, :, COLUMN_NUM_EDGES] = within(num_edges, num_partial)[1]
    records[:, :, COLUMN_FULL] += (begin - num_partial - num_edges).clamp(min=0)
    records[:, :, COLUMN_NUM_MASKED] = within(num_masked, 0)[1]
    records[:, :, COLUMN_TILES] = end - begin
    records[:, :, COLUMN_SLOT] = parts.slot[:, None].int()
    return records


def _first_slots(sequences: Sequences, tile: int) -> Tensor:
    """Per sequence: where its query tile 0 would lie, if the tiles that hold its queries follow those of the sequence before."""
    length, position = sequences.table[:, Q_LEN], sequences.table[:, Q_POS]
    first = position // tile
    count = torch.where(length > 0, (position + length - 1) // tile + 1 - first, 0)
    return (count.cumsum(0) - count - first).to(torch.int32)


def _give_empty_tiles_a_step(records: Tensor, is_empty: Tensor, query_tile: Tensor) -> None:
    """Key tiles that nobody reads get a step in which every query is masked: the kernel then needs no path of its own for them.

    The step takes entry 0 for a mask, no query row is the sequence's, and its slot is -1, which gets nothing added.
    """
    for field, value in (
        (COLUMN_Q_BEGIN, 0),
        (COLUMN_Q_END, 0),
        (COLUMN_FIRST_SLOT, -1 - query_tile),
        (COLUMN_PARTIAL, 0),
        (COLUMN_NUM_PARTIAL, 1),
        (COLUMN_NUM_MASKED, 1),
        (COLUMN_TILES, 1),
    ):
        records[:, 0, field] = torch.where(is_empty, value, records[:, 0, field])


def transposed_bank(index: BlockIndex) -> Tensor:
    """The bank of `index` with words along the queries: bit `c % 32` of word `c // 32` of row `r` is coefficient `(c, r)`."""
    return _of_masks(
        index,
        "the transposed masks of this layout",
        _transposed_banks,
        lambda: _transpose(index.bank, index.tile_q),
    )


def rows_kept(index: BlockIndex) -> Tensor:
    """Of each mask of an index of strips of 32 keys, int32: bit `g` is set where the query rows of group `g` keep the whole strip, if all
    others keep none of it. Other masks have all bits set and one more."""
    return _of_masks(index, "the masks of this layout", _rows_kept, lambda: _find_rows_kept(index))


def _of_masks(
    index: BlockIndex,
    what: str,
    known: WeakKeyDictionary[BlockIndex, Tensor],
    make: Callable[[], Tensor],
) -> Tensor:
    """What `known` has of an index' masks, made at its first use; `what` names it where a CUDA graph is captured."""
    found = known.get(index)
    if found is None:
        check_not_capturing(index.bank.device, what)
        found = known[index] = build_to_keep(index.bank.device, make)
    return found


@torch.inference_mode(False)
def _find_rows_kept(index: BlockIndex) -> Tensor:
    groups = index.tile_q // GROUP
    words = index.bank.view(-1, groups, GROUP)
    keeps, drops = (words == -1).all(2), (words == 0).all(2)
    bits = 1 << torch.arange(groups, dtype=torch.int32, device=words.device)
    kept = (keeps * bits).sum(1)
    return torch.where((keeps | drops).all(1), kept, (2 << groups) - 1).int()


@torch.inference_mode(False)
def _transpose(bank: Tensor, tile: int) -> Tensor:
    transposed = torch.empty_like(bank)
    if bank.shape[0]:
        transpose_bank_kernel[(bank.shape[0],)](bank, transposed, TILE_SIZE=tile)
    return transposed
