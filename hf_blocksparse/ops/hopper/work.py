"""Who computes which query tile: one list of tiles per multiprocessor, made on the device.

Tiles of one head follow each other, so that its keys and values stay in the L2 cache; inside a head the long ones come first,
and each goes to the multiprocessor with the least work so far. Tiles that take a good part of a multiprocessor's share go before all
others, whatever their head: one of them at the end would keep everybody waiting. Nothing is read back to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_blocksparse.capture import check_not_capturing
from hf_blocksparse.ops.triton.launch import tile_lists
from hf_blocksparse.ops.triton.tiles import clip_entries, load_list, load_sequence

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

# Tiles are dealt out to one multiprocessor in so many at a time, so that one with a long tile is left in peace meanwhile.
DEALT_TO = 4
# A tile is long if this many of its kind fill a multiprocessor's share.
LONG = 4
# What a tile costs beside its steps, in steps.
TILE_OVERHEAD = 1


@dataclass(frozen=True)
class Schedule:
    """`records`: int32 `[num_tiles, RECORD]`; multiprocessor `i` computes those from `offsets[i]` to `offsets[i + 1]`."""

    records: Tensor
    offsets: Tensor

    @property
    def num_programs(self) -> int:
        return self.offsets.numel() - 1


@triton.jit
def describe_kernel(
    records, items, table, lists, NUM_FIELDS: tl.constexpr, TILE_SIZE: tl.constexpr
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
        lists.indices, begin, partial_begin, kv_pos, kv_pos + kv_len, TILE_SIZE
    )
    partial_first, partial_last, partial_start, partial_stop = clip_entries(
        lists.indices, partial_begin, end, kv_pos, kv_pos + kv_len, TILE_SIZE
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
    tl.store(record + 2, tile * TILE_SIZE - q_pos + q_row)
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


_schedules: WeakKeyDictionary[BlockIndex, WeakKeyDictionary[Sequences, dict[int, Schedule]]] = (
    WeakKeyDictionary()
)


def schedule_for(index: BlockIndex, sequences: Sequences, heads: int) -> Schedule:
    """The schedule of a call with `heads` query heads, made at its first use and kept as long as index and sequences live."""
    of_index = _schedules.setdefault(index, WeakKeyDictionary())
    of_sequences = of_index.setdefault(sequences, {})
    if heads not in of_sequences:
        of_sequences[heads] = make_schedule(
            index, sequences, heads, _multiprocessors(index.bank.device)
        )
    return of_sequences[heads]


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@torch.inference_mode(False)  # a schedule outlives the call
def make_schedule(
    index: BlockIndex, sequences: Sequences, heads: int, num_multiprocessors: int
) -> Schedule:
    """Lists for `num_multiprocessors`, fewer where there are fewer tiles. `index` has tiles of `TILE x TILE` and is not empty."""
    check_not_capturing(index.bank.device, "the schedule of these sequences")
    items = sequences.q_items(TILE)
    num_items = items.shape[0]
    records = items.new_empty(num_items * heads, RECORD)
    describe_kernel[(num_items, heads)](
        records, items, sequences.table, tile_lists(index)[0], NUM_FIELDS=RECORD, TILE_SIZE=TILE
    )
    num_tiles = records.shape[0]
    num_programs = min(num_multiprocessors, num_tiles)
    steps = records[:, STEPS].long()
    is_used = steps > 0
    costs = torch.where(is_used, steps + TILE_OVERHEAD, 0)
    group = 1 + records[:, 0] * heads + records[:, 1]
    group = torch.where(costs * (LONG * num_programs) > costs.sum(), 0, group)
    group = torch.where(is_used, group, 1 + sequences.batch * heads)
    most = index.num_kv_tiles + 1
    order = torch.argsort(group * (most + 1) + most - steps, stable=True)
    owners = torch.empty_like(costs)
    assign_kernel[(1,)](
        costs[order],
        owners,
        num_tiles,
        num_programs,
        max(1, num_programs // DEALT_TO),
        NUM_SLOTS=triton.next_power_of_2(num_multiprocessors),
    )
    owners = torch.where(is_used[order], owners, num_programs)
    owners, by_owner = torch.sort(owners, stable=True)
    bounds = torch.arange(num_programs + 1, device=items.device)
    return Schedule(
        records[order[by_owner]].contiguous(),
        torch.searchsorted(owners, bounds).to(torch.int32),
    )
