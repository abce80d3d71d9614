"""Kernels for few queries against many keys, as in decoding: the key tiles of a row are split over programs, then combined.

A row of one query is as long as any other, but there are too few of them to fill a GPU, and each key is used once. So

- the tiles that a query tile keeps are dealt out to several programs, and each leaves what the recurrence of `forward` holds at the
  end of its share: maximum, sum and weighted values, in float32 ("Flash-Decoding for long-context inference", Dao et al. 2023);
- the query heads that read one key head by one list are the rows of one product, so keys are read once for all of them;
- a second kernel rescales the shares to their common maximum and divides, which is what one program alone would have done.

Every tile is loaded by pointers, within the sequence's ends, and masked by its bits (all of them for a full tile): reading keys is what
takes the time here, not arithmetic.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hf_blocksparse.ops.triton.forward import accumulate_keys
from hf_blocksparse.ops.triton.tiles import (
    first_at_least,
    load_list,
    load_row_bits,
    load_rows_between,
    load_rows_where,
    load_sequence,
    row_pointers,
    store_rows_where,
)


class Partials(NamedTuple):
    """What the splits leave of each row, contiguous float32.

    `outputs`: [splits, batch * heads * query_len, value_dim]; `maxima`, `sums`: [splits, batch * heads * query_len].

    Where a sum is 0 the row met no key, and the other two may hold anything.
    """

    outputs: Any
    maxima: Any
    sums: Any


@triton.jit
def start_row(sinks, heads, is_row, is_first):
    """Running maximum and sum before the first key: of the sink logit in the first split, of nothing in the others.

    The maximum has a finite floor: rows that have met no key yet never see inf - inf.
    """
    if sinks is None:
        return tl.full(is_row.shape, -3.0e38, tl.float32), tl.zeros(is_row.shape, tl.float32)
    else:
        sink = tl.load(sinks + heads, mask=is_row, other=float("-inf")).to(tl.float32)
        sink = tl.where(is_first, sink * 1.4426950408889634, float("-inf"))
        floor = tl.maximum(sink, -3.0e38)
        return floor, tl.exp2(sink - floor)


@triton.jit
def log_sum(running_max, running_sum):
    """Natural log-sum-exp, and what to divide by: 1 in rows that met nothing."""
    is_empty = running_sum == 0.0
    divisor = tl.where(is_empty, 1.0, running_sum)
    lse = (running_max + tl.log2(divisor)) * 0.6931471805599453
    return tl.where(is_empty, float("-inf"), lse), divisor


@triton.jit(do_not_specialize=["first_tile", "num_slots", "chunks_per_tile", "heads_per_list"])
def decode_kernel(
    query,
    key,
    value,
    sinks,
    out,
    lse,
    partials,
    table,
    lists,
    first_tile,
    num_slots,
    chunks_per_tile,
    heads_per_list,
    num_heads,
    num_rows,
    query_len,
    score_scale,
    softcap_scale,
    alibi_slopes,
    group_size,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    QUERIES: tl.constexpr,
    MEMBERS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Grid: (sequences * num_slots, packs of heads, splits). Writes `partials`, or `out` and `lse` where those are None.

    A slot is a chunk of at most `QUERIES` queries within one query tile: `chunks_per_tile` slots for each tile that a sequence's queries
    may touch. A pack is a run of at most `MEMBERS` heads among `heads_per_list` that share a list and a key head. Row `r` of a program's
    tiles is query `r % QUERIES` of the chunk in head `r // QUERIES` of the pack.

    `query`, `key`, `value`, `out`, `lse`: StridedRows; `partials`: Partials or None; `table`: `Sequences.table`; `lists`: TileLists of
    the query tiles from `first_tile` on; `alibi_slopes`: [batch, query heads], see `tiles`;
    `sinks`, `softcap_scale`, `alibi_slopes`: None where unused.
    """
    ROWS: tl.constexpr = QUERIES * MEMBERS
    sequence = tl.program_id(0) // num_slots
    slot = tl.program_id(0) % num_slots
    batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos = load_sequence(table, sequence)
    tile = q_pos // TILE_Q + slot // chunks_per_tile
    begin_position = tl.maximum(tile * TILE_Q, q_pos) + slot % chunks_per_tile * QUERIES
    end_position = tl.minimum((tile + 1) * TILE_Q, q_pos + q_len)
    if begin_position >= end_position:
        return
    packs_per_list = (heads_per_list + MEMBERS - 1) // MEMBERS
    first_member = tl.program_id(1) % packs_per_list * MEMBERS
    first_head = tl.program_id(1) // packs_per_list * heads_per_list + first_member
    split = tl.program_id(2)
    kv_head = first_head // group_size
    kv_end = kv_row + kv_len
    kv_shift = kv_row - kv_pos  # from positions to rows

    rows = tl.arange(0, ROWS)
    positions = begin_position + rows % QUERIES
    is_row = (positions < end_position) & (first_member + rows // QUERIES < heads_per_list)
    heads = first_head + rows // QUERIES
    query_rows = positions - q_pos + q_row
    tile_rows = positions - tile * TILE_Q
    query_tile = load_rows_where(query, batch, heads, query_rows, is_row, HEAD_DIM, HEAD_DIM_PADDED)
    alibi_slope = None
    if alibi_slopes is not None:
        alibi_slope = tl.load(alibi_slopes + batch * num_heads + heads, mask=is_row, other=0.0)
        alibi_slope = alibi_slope[:, None]
    running_max, running_sum = start_row(sinks, heads, is_row, split == 0)
    accumulator = tl.zeros([ROWS, VALUE_DIM_PADDED], tl.float32)

    # Entries of the list within the sequence's keys: full ones, then partial ones. Each split takes as many as the others.
    begin, partial_begin, end = load_list(lists, sequence, first_head, tile - first_tile)
    first_key_tile = kv_pos // TILE_KV
    end_key_tile = (kv_pos + kv_len + TILE_KV - 1) // TILE_KV
    full_first = first_at_least(lists.indices, begin, partial_begin, first_key_tile)
    full_last = first_at_least(lists.indices, full_first, partial_begin, end_key_tile)
    partial_first = first_at_least(lists.indices, partial_begin, end, first_key_tile)
    partial_last = first_at_least(lists.indices, partial_first, end, end_key_tile)
    num_full = full_last - full_first
    num_entries = num_full + partial_last - partial_first
    share = (num_entries + tl.num_programs(2) - 1) // tl.num_programs(2)
    for number in tl.range(split * share, tl.minimum((split + 1) * share, num_entries)):
        entry = number + tl.where(number < num_full, full_first, partial_first - num_full)
        first_key_row = tl.load(lists.indices + entry) * TILE_KV + kv_shift
        mask_id = tl.load(lists.mask_ids + entry)
        key_rows = first_key_row + tl.arange(0, TILE_KV)
        kept = load_row_bits(lists.bank, mask_id, tile_rows, is_row, TILE_Q, TILE_KV)
        kept = kept & ((key_rows >= kv_row) & (key_rows < kv_end))[None, :]
        key_tile = load_rows_between(
            key, batch, kv_head, first_key_row, kv_row, kv_end, TILE_KV, HEAD_DIM, HEAD_DIM_PADDED
        )
        value_tile = load_rows_between(
            value,
            batch,
            kv_head,
            first_key_row,
            kv_row,
            kv_end,
            TILE_KV,
            VALUE_DIM,
            VALUE_DIM_PADDED,
        )
        accumulator, running_max, running_sum = accumulate_keys(
            accumulator, running_max, running_sum, query_tile, key_tile, value_tile, kept,
            query_rows, key_rows, 0, score_scale, softcap_scale, alibi_slope,
            q_pos - q_row + kv_shift, None, INPUT_PRECISION,
        )  # fmt: skip

    if partials is None:
        row_lse, divisor = log_sum(running_max, running_sum)
        values = accumulator / divisor[:, None]
        store_rows_where(out, values, batch, heads, query_rows, is_row, VALUE_DIM, VALUE_DIM_PADDED)
        tl.store(row_pointers(lse, batch, heads) + query_rows, row_lse, mask=is_row)
    else:
        value_dims = tl.arange(0, VALUE_DIM_PADDED)
        stored = is_row[:, None] & (value_dims < VALUE_DIM)[None, :]
        # Rows of all batch rows and heads, once for each split.
        place = (batch * num_heads + heads) * query_len + query_rows + split.to(tl.int64) * num_rows
        tl.store(partials.maxima + place, running_max, mask=is_row)
        tl.store(partials.sums + place, running_sum, mask=is_row)
        tl.store(
            partials.outputs + place[:, None] * VALUE_DIM + value_dims[None, :],
            accumulator,
            mask=stored,
        )


@triton.jit
def combine_kernel(
    partials,
    out,
    lse,
    num_splits,
    num_rows,
    num_heads,
    query_len,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
):
    """Grid: (num_rows,), the rows of all batch rows and heads. Writes every row of `out` and `lse` (StridedRows) from Partials."""
    row = tl.program_id(0)
    dims = tl.arange(0, VALUE_DIM_PADDED)
    accumulator = tl.zeros([VALUE_DIM_PADDED], tl.float32)
    running_max = -3.0e38
    running_sum = 0.0
    for first_split in tl.range(0, num_splits, SPLITS_AT_ONCE):
        splits = first_split + tl.arange(0, SPLITS_AT_ONCE)
        places = row + splits.to(tl.int64) * num_rows
        exists = splits < num_splits
        sums = tl.load(partials.sums + places, mask=exists, other=0.0)
        maxima = tl.load(partials.maxima + places, mask=exists, other=0.0)
        values = tl.load(
            partials.outputs + places[:, None] * VALUE_DIM + dims[None, :],
            mask=exists[:, None] & (dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        # Nobody wrote the other two where a row belongs to no sequence.
        has_key = sums > 0.0
        maxima = tl.where(has_key, maxima, -3.0e38)
        values = tl.where(has_key[:, None], values, 0.0)
        new_max = tl.maximum(running_max, tl.max(maxima, 0))
        weights = tl.where(has_key, tl.exp2(maxima - new_max), 0.0)
        shrink = tl.exp2(running_max - new_max)
        running_sum = running_sum * shrink + tl.sum(weights * sums, 0)
        accumulator = accumulator * shrink + tl.sum(weights[:, None] * values, 0)
        running_max = new_max

    row_lse, divisor = log_sum(running_max, running_sum)
    query_row = row % query_len
    head = row // query_len % num_heads
    batch = row // query_len // num_heads
    tl.store(
        row_pointers(out, batch, head) + query_row.to(tl.int64) * out.strides[2] + dims,
        (accumulator / divisor).to(out.pointer.dtype.element_ty),
        mask=dims < VALUE_DIM,
    )
    tl.store(row_pointers(lse, batch, head) + query_row, row_lse)
