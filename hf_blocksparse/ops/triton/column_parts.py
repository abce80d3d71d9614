"""Long columns of the backward in parts: key tiles that so many query rows read that one program would keep all others waiting.

A *column* is a key tile of one key head with all query tiles that read it, in all query heads of its group: with global tokens every
query tile, four times as many as in a row where four query heads share a key head. A column longer than a program's share of all
steps, or for the portable kernel nearly as long, is cut into parts. Programs leave the float32 sums of their parts in slots of their
own, and `add_parts_kernel` adds those up, in the order of the parts, so that dK and dV stay bitwise reproducible. Their last bits depend
on where a column is cut: on all columns of the call together and on the number of multiprocessors.

Parts are made with the first call of an index and kept with it, which waits for the device once. Where no column is long there are no
parts, no slots and no second kernel. Slots take at most `1 / PART` tiles of dK and dV per program: 33 MiB in float32 for 132 programs with
tiles of 128 rows and heads of 128, at any length; of the portable kernel, whose columns are cut sooner, a third more.

Rows are not split. A row is read by one head, so that with two global tiles of queries (BigBird in both directions) its length passes the
share of one of 132 multiprocessors only where query heads times batch rows are fewer than about 13, at any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_blocksparse.capture import build_to_keep, check_not_capturing, is_capturing
from hf_blocksparse.ops.triton.decode_sizes import processors
from hf_blocksparse.ops.triton.tiles import (
    clip_entries,
    load_list,
    load_sequence,
    store_rows_between,
)

if TYPE_CHECKING:
    from hf_blocksparse.block_index import BlockIndex
    from hf_blocksparse.sequences import Sequences

LONG = 5, 4
"""A column is long if it has more than this part of a program's share of all steps."""
LONG_IN_GRID = 3, 4
"""The same for the portable kernel, which begins whole columns head by head: the last head's, when others are nearly done."""
PART = 1, 2
"""Of a program's share: about what a part has, at least 3/8. Such parts are dealt out evenly, and there are few of them to add up."""
SHORTEST_PART = 16
"""Steps of a part at least."""
SHORT = 6
"""A column of up to so many shortest parts stays whole: it takes no longer than the CPU does to issue a backward, which another kernel
and its tensors make longer."""
PROGRAMS_PER_MULTIPROCESSOR = 2
"""Programs of four warps or more of the portable kernel that a multiprocessor runs at a time; with one or two warps it runs four times or
twice as many."""
ROWS_AT_ONCE = 16

Schedules = WeakKeyDictionary["BlockIndex", WeakKeyDictionary["Sequences", dict[Any, Any]]]
_column_parts: Schedules = WeakKeyDictionary()


def known(schedules: Schedules, index: BlockIndex, sequences: Sequences) -> dict[Any, Any]:
    """What is kept as long as index and sequences live."""
    return schedules.setdefault(index, WeakKeyDictionary()).setdefault(sequences, {})


@dataclass(frozen=True)
class Parts:
    """Columns in parts, those of a column one after the other. All int64 `[num_parts]`.

    `column`: number of the column; `begin`, `end`: its steps that the part takes, counted over the heads of the group one after the other;
    `slot`: where its sums go, -1 where the part is a whole column.
    """

    column: Tensor
    begin: Tensor
    end: Tensor
    slot: Tensor


@dataclass(frozen=True)
class SplitColumns:
    """The columns that are added up from parts. `table`: int32 `[num_columns, 7]`: batch, key head, tensor row of the tile's first key,
    begin and end of the sequence's key rows, first slot, number of slots. `num_slots`: of all of them.
    """

    table: Tensor
    num_slots: int


@dataclass(frozen=True)
class ColumnParts:
    """`programs`: int32 `[num_programs, 5]`, one program of `grad_key_value_kernel` each: item, key head, first step, end of the steps,
    slot. Those with a slot come first, then whole columns, head by head.
    """

    programs: Tensor
    split: SplitColumns


def count_parts(steps: Tensor, num_programs: int, long: tuple[int, int] = LONG) -> Tensor | None:
    """How many parts to cut each column into, 1 where it stays whole; None where all do, which waits for the device.

    Args:
        steps: int64 [num_columns].
        num_programs: how many run at a time.
        long: numerator and denominator of the part of a share past which a column is cut.
    """
    total = steps.sum()
    part = (total * PART[0] // (PART[1] * num_programs)).clamp(min=SHORTEST_PART)
    is_long = steps * (long[1] * num_programs) > total * long[0]
    is_long &= steps > SHORT * SHORTEST_PART
    num_parts = torch.where(is_long, (steps // part).clamp(min=2), 1)
    return num_parts if bool(is_long.any()) else None


def cut(steps: Tensor, num_parts: Tensor) -> Parts:
    """Each column of `steps` in `num_parts` parts, which differ by one step at most; columns of 0 parts are left out."""
    column = torch.repeat_interleave(num_parts)
    number = torch.arange(column.numel(), device=steps.device)
    number -= (num_parts.cumsum(0) - num_parts)[column]
    steps, num_parts = steps[column], num_parts[column]
    begin, end = steps * number // num_parts, steps * (number + 1) // num_parts
    is_part = num_parts > 1
    slot = torch.where(is_part, is_part.cumsum(0) - 1, -1)
    return Parts(column, begin, end, slot)


def split_columns(columns: Tensor, num_parts: Tensor) -> SplitColumns:
    """`columns`: int [num_columns, 5], the first fields of the table for all columns."""
    is_split = num_parts > 1
    slots = num_parts[is_split]
    ends = slots.cumsum(0)
    table = torch.cat((columns[is_split], (ends - slots)[:, None], slots[:, None]), 1)
    return SplitColumns(table.to(torch.int32), int(ends[-1]))


@triton.jit
def count_steps_kernel(
    steps,
    items,
    table,
    lists,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Grid: (key items, query heads). Writes `steps` [items, heads]: query tiles that read the key tile, -1 for an unused item.

    `WIDTH`: queries of an entry; `AT_ONCE`: entries that a step gathers, but for those at an end of the sequence.
    """
    item = tl.program_id(0)
    head = tl.program_id(1)
    place = steps + item.to(tl.int64) * tl.num_programs(1) + head
    sequence = tl.load(items + 2 * item)
    if sequence < 0:
        tl.store(place, -1)
        return
    _, _, q_len, q_pos, _, _, _ = load_sequence(table, sequence)
    begin, partial_begin, end = load_list(lists, sequence, head, tl.load(items + 2 * item + 1))
    full_first, full_last, full_start, full_stop = clip_entries(
        lists.indices, begin, partial_begin, q_pos, q_pos + q_len, WIDTH
    )
    partial_first, partial_last, partial_start, partial_stop = clip_entries(
        lists.indices, partial_begin, end, q_pos, q_pos + q_len, WIDTH
    )
    num_inside = full_last - full_first + partial_last - partial_first
    num_edges = full_start + full_stop + partial_start + partial_stop
    tl.store(place, (num_inside + AT_ONCE - 1) // AT_ONCE + num_edges)


@triton.jit
def add_parts_kernel(
    key_parts,
    value_parts,
    grad_key,
    grad_value,
    table,
    key_scale,
    value_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    TILE_KV: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (columns of the table, TILE_KV // ROWS). Writes the rows of `grad_key` and `grad_value` of columns that were split.

    `key_parts`, `value_parts`: float32 [slots, TILE_KV, padded dim]; `table`: `SplitColumns.table`; `*_scale`: factors of the sums.
    """
    column = table + tl.program_id(0) * 7
    batch = tl.load(column)
    kv_head = tl.load(column + 1)
    row_in_tile = tl.program_id(1) * ROWS
    first_row = tl.load(column + 2) + row_in_tile
    begin = tl.load(column + 3)
    end = tl.load(column + 4)
    first_slot = tl.load(column + 5).to(tl.int64)
    num_slots = tl.load(column + 6)
    rows = row_in_tile + tl.arange(0, ROWS)[:, None]
    key_parts += first_slot * (TILE_KV * HEAD_DIM_PADDED)
    value_parts += first_slot * (TILE_KV * VALUE_DIM_PADDED)
    key_place = rows * HEAD_DIM_PADDED + tl.arange(0, HEAD_DIM_PADDED)[None, :]
    value_place = rows * VALUE_DIM_PADDED + tl.arange(0, VALUE_DIM_PADDED)[None, :]
    key_sum = tl.zeros([ROWS, HEAD_DIM_PADDED], tl.float32)
    value_sum = tl.zeros([ROWS, VALUE_DIM_PADDED], tl.float32)
    for number in tl.range(0, num_slots):
        key_sum += tl.load(key_parts + number * (TILE_KV * HEAD_DIM_PADDED) + key_place)
        value_sum += tl.load(value_parts + number * (TILE_KV * VALUE_DIM_PADDED) + value_place)
    store_rows_between(
        grad_key, key_sum * key_scale, batch, kv_head, first_row, begin, end,
        ROWS, HEAD_DIM, HEAD_DIM_PADDED,
    )  # fmt: skip
    store_rows_between(
        grad_value, value_sum * value_scale, batch, kv_head, first_row, begin, end,
        ROWS, VALUE_DIM, VALUE_DIM_PADDED,
    )  # fmt: skip


def column_parts_for(
    index: BlockIndex,
    sequences: Sequences,
    lists: Any,
    heads: int,
    kv_heads: int,
    tile_q: int,
    tile_kv: int,
    num_warps: int,
) -> ColumnParts | None:
    """The parts of a call's columns, made at its first use and kept as long as index and sequences live; None where no column is long.

    Args:
        index: lists of query tiles, or of strips of them.
        sequences: of the call.
        lists: TileLists of the key tiles.
        heads, kv_heads: of query and key.
        tile_q, tile_kv, num_warps: tile sizes and warps of the kernel.
    """
    if heads // kv_heads * index.num_q_tiles <= SHORT * SHORTEST_PART:
        return None
    kept = known(_column_parts, index, sequences)
    columns = heads, kv_heads, tile_q, tile_kv
    case = *columns, num_warps
    if case not in kept:
        device = index.bank.device
        programs = PROGRAMS_PER_MULTIPROCESSOR * max(1, 4 // num_warps) * processors(device)
        kept[case] = build_to_keep(
            device, lambda: make_column_parts(index, sequences, lists, *columns, programs)
        )
    return kept[case]


@torch.inference_mode(False)  # parts outlive the call
def make_column_parts(
    index: BlockIndex,
    sequences: Sequences,
    lists: Any,
    heads: int,
    kv_heads: int,
    tile_q: int,
    tile_kv: int,
    num_programs: int,
) -> ColumnParts | None:
    """Parts for `num_programs` that run at a time. They are counted on the host, so in a capture transient sequences have none."""
    device = index.bank.device
    if sequences.is_transient and is_capturing(device):
        return None
    check_not_capturing(device, "the list of these key tiles")
    items = sequences.kv_items(tile_kv)
    num_items = items.shape[0]
    steps = items.new_empty(num_items, heads)
    count_steps_kernel[(num_items, heads)](
        steps, items, sequences.table, lists, WIDTH=index.tile_q, AT_ONCE=tile_q // index.tile_q
    )
    # Head by head, as the grid without parts is.
    steps = steps.long().unflatten(1, (kv_heads, -1)).sum(2).T.flatten()
    is_used = steps >= 0
    steps = steps.clamp(min=0)
    num_parts = count_parts(steps, num_programs, LONG_IN_GRID)
    if num_parts is None:
        return None
    num_parts = torch.where(is_used, num_parts, 0)
    parts = cut(steps, num_parts)
    order = torch.argsort((parts.slot < 0).int(), stable=True)
    column = torch.arange(num_items * kv_heads, device=steps.device)
    head, item = column // num_items, column % num_items
    sequence, tile = items[item].long().unbind(1)
    batch, _, _, _, kv_row, kv_len, kv_pos = sequences.table[sequence.clamp(min=0)].unbind(1)
    columns = torch.stack(
        (batch, head, tile * tile_kv - kv_pos + kv_row, kv_row, kv_row + kv_len), 1
    )
    programs = torch.stack(
        (item[parts.column], head[parts.column], parts.begin, parts.end, parts.slot), 1
    )
    return ColumnParts(programs[order].to(torch.int32), split_columns(columns, num_parts))
