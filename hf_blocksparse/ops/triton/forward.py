"""Forward kernel: output and log-sum-exp of one query tile of one head.

With scores in units of log2 (see `tiles`), a row is walked once with a running maximum `m`, as in "FlashAttention"
(arXiv 2205.14135, algorithm 1) and "Online normalizer calculation for softmax" (arXiv 1805.02867):

    m'   = max(m, max_j s_ij)          p_ij = 2^(s_ij - m')
    sum' = sum * 2^(m - m') + sum_j p_ij
    out' = out * 2^(m - m') + sum_j dropout(p_ij) v_j

and at the end `out / sum` and `lse = ln(2) * (m + log2(sum))`. A sink logit is a key with no value: it starts the row.
"""

import triton
import triton.language as tl

from hf_blocksparse.ops.triton.tiles import (
    add_product,
    clip_entries,
    dropout_keeps,
    edge_entry,
    heads_of_rows,
    load_bits,
    load_both,
    load_both_at,
    load_list,
    load_row_bits,
    load_rows_between,
    load_rows_where,
    load_sequence,
    load_strip_bits,
    load_strips,
    row_pointers,
    rows_of_strips,
    store_rows_where,
    subtract_alibi,
    tanh,
)


@triton.jit
def accumulate_keys(
    accumulator,
    running_max,
    running_sum,
    query_tile,
    key_tile,
    value_tile,
    kept,
    query_rows,
    key_rows,
    batch_head,
    score_scale,
    softcap_scale,
    alibi_slope,
    position_shift,
    dropout,
    INPUT_PRECISION: tl.constexpr,
):
    """One step of the recurrence. `kept`: bool [tile_q, tile_kv], or None where every coefficient is."""
    raw = tl.dot(query_tile, key_tile.T, input_precision=INPUT_PRECISION)
    if softcap_scale is not None:
        raw = tanh(raw * softcap_scale)
    if alibi_slope is not None:
        raw = subtract_alibi(
            raw, alibi_slope, query_rows[:, None], key_rows[None, :], position_shift
        )
    if kept is not None:
        raw = tl.where(kept, raw, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(raw, 1) * score_scale)
    probabilities = tl.exp2(raw * score_scale - new_max[:, None])
    shrink = tl.exp2(running_max - new_max)
    running_sum = running_sum * shrink + tl.sum(probabilities, 1)
    if dropout is not None:
        keeps = dropout_keeps(dropout, query_rows[:, None], key_rows[None, :], batch_head)
        probabilities = tl.where(keeps, probabilities, 0.0)
    accumulator = add_product(
        accumulator * shrink[:, None],
        probabilities.to(value_tile.dtype),
        value_tile,
        INPUT_PRECISION,
    )
    return accumulator, new_max, running_sum


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    key_descriptor,
    value_descriptor,
    sinks,
    out,
    lse,
    items,
    table,
    lists,
    score_scale,
    softcap_scale,
    alibi_slopes,
    dropout,
    group_size,
    heads_per_list,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    STRIP: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Grid: (items, query heads). Writes the rows of `out` and `lse` that the item's sequence owns.

    With `MEMBERS` > 1, which takes strips, the grid is (items, packs of heads), see `heads_of_rows`, and items and lists are of tiles
    of `TILE_Q // MEMBERS` queries.

    `query`, `key`, `value`, `out`, `lse`: StridedRows; `key_descriptor`, `value_descriptor`: their tensor descriptors or None;
    `items`: `Sequences.q_items`; `table`: `Sequences.table`;
    `lists`: TileLists of the query tiles; `alibi_slopes`: [batch, query heads], see `tiles`;
    `sinks`, `softcap_scale`, `alibi_slopes`, `dropout`: None where unused.
    """
    QUERIES: tl.constexpr = TILE_Q // MEMBERS
    item = items + tl.program_id(0) * 2
    num_heads, first_head, heads, has_head = heads_of_rows(heads_per_list, TILE_Q, MEMBERS)
    sequence = tl.load(item)
    if sequence < 0:
        return
    tile = tl.load(item + 1)
    batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos = load_sequence(table, sequence)
    begin, partial_begin, end = load_list(lists, sequence, first_head, tile)
    batch_head = batch * num_heads + heads
    if MEMBERS > 1:
        batch_head = batch_head[:, None]
    kv_head = first_head // group_size
    kv_end = kv_row + kv_len
    kv_shift = kv_row - kv_pos  # from positions to rows
    position_shift = q_pos - q_row + kv_shift
    alibi_slope = None
    if alibi_slopes is not None:
        alibi_slope = tl.load(alibi_slopes + batch_head)

    places = tl.arange(0, TILE_Q) % QUERIES
    query_rows = tile * QUERIES - q_pos + q_row + places
    owned = (query_rows >= q_row) & (query_rows < q_row + q_len) & has_head
    query_tile = load_rows_where(query, batch, heads, query_rows, owned, HEAD_DIM, HEAD_DIM_PADDED)

    accumulator = tl.zeros([TILE_Q, VALUE_DIM_PADDED], tl.float32)
    # A finite floor for the maximum: rows that have met no key yet never see inf - inf.
    if sinks is not None:
        sink = tl.load(sinks + heads).to(tl.float32) * 1.4426950408889634
        floor = tl.maximum(sink, -3.0e38)
        running_max = tl.zeros([TILE_Q], tl.float32) + floor
        running_sum = tl.zeros([TILE_Q], tl.float32) + tl.exp2(sink - floor)
    else:
        running_max = tl.full([TILE_Q], -3.0e38, tl.float32)
        running_sum = tl.zeros([TILE_Q], tl.float32)

    WIDTH: tl.constexpr = STRIP if STRIP > 0 else TILE_KV
    full_first, full_last, full_start, full_stop = clip_entries(
        lists.indices, begin, partial_begin, kv_pos, kv_pos + kv_len, WIDTH
    )
    partial_first, partial_last, partial_start, partial_stop = clip_entries(
        lists.indices, partial_begin, end, kv_pos, kv_pos + kv_len, WIDTH
    )
    if STRIP == 0:
        for entry in tl.range(full_first, full_last):
            first_key_row = tl.load(lists.indices + entry) * TILE_KV + kv_shift
            key_rows = first_key_row + tl.arange(0, TILE_KV)
            key_tile, value_tile = load_both(
                key, key_descriptor, value, value_descriptor, batch, kv_head, first_key_row,
                TILE_KV, HEAD_DIM, HEAD_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED,
            )  # fmt: skip
            accumulator, running_max, running_sum = accumulate_keys(
                accumulator, running_max, running_sum, query_tile, key_tile, value_tile, None,
                query_rows, key_rows, batch_head, score_scale, softcap_scale, alibi_slope, position_shift,
                dropout, INPUT_PRECISION,
            )  # fmt: skip

        for entry in tl.range(partial_first, partial_last):
            first_key_row = tl.load(lists.indices + entry) * TILE_KV + kv_shift
            key_rows = first_key_row + tl.arange(0, TILE_KV)
            kept = load_bits(lists.bank, tl.load(lists.mask_ids + entry), TILE_Q, TILE_KV, False)
            key_tile, value_tile = load_both(
                key, key_descriptor, value, value_descriptor, batch, kv_head, first_key_row,
                TILE_KV, HEAD_DIM, HEAD_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED,
            )  # fmt: skip
            accumulator, running_max, running_sum = accumulate_keys(
                accumulator, running_max, running_sum, query_tile, key_tile, value_tile, kept,
                query_rows, key_rows, batch_head, score_scale, softcap_scale, alibi_slope, position_shift,
                dropout, INPUT_PRECISION,
            )  # fmt: skip
    else:
        STRIPS: tl.constexpr = TILE_KV // STRIP
        num_full = full_last - full_first
        num_strips = num_full + partial_last - partial_first
        num_whole = 0
        # A strip that serves one block of queries is nearly always full.
        if MEMBERS > 1 or QUERIES <= STRIP:
            num_whole = num_full // STRIPS * STRIPS
            for place in tl.range(0, num_whole, STRIPS):
                strips = tl.load(lists.indices + full_first + place + tl.arange(0, STRIPS))
                key_rows = rows_of_strips(strips, kv_shift, STRIP, TILE_KV)
                key_tile, value_tile = load_both_at(
                    key, value, batch, kv_head, key_rows,
                    HEAD_DIM, HEAD_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED,
                )  # fmt: skip
                accumulator, running_max, running_sum = accumulate_keys(
                    accumulator, running_max, running_sum, query_tile, key_tile, value_tile, None,
                    query_rows, key_rows, batch_head, score_scale, softcap_scale, alibi_slope,
                    position_shift, dropout, INPUT_PRECISION,
                )  # fmt: skip
        for place in tl.range(num_whole, num_strips, STRIPS):
            strips, mask_ids, exist = load_strips(
                lists, place, full_first, num_full, partial_first, num_strips, STRIPS
            )
            kept = load_strip_bits(
                lists.bank, mask_ids, exist, TILE_Q, TILE_KV, STRIP, False, MEMBERS
            )
            key_rows = rows_of_strips(strips, kv_shift, STRIP, TILE_KV)
            key_tile, value_tile = load_both_at(
                key, value, batch, kv_head, key_rows,
                HEAD_DIM, HEAD_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED,
            )  # fmt: skip
            accumulator, running_max, running_sum = accumulate_keys(
                accumulator, running_max, running_sum, query_tile, key_tile, value_tile, kept,
                query_rows, key_rows, batch_head, score_scale, softcap_scale, alibi_slope, position_shift,
                dropout, INPUT_PRECISION,
            )  # fmt: skip

    num_edges = full_start + full_stop + partial_start + partial_stop
    for edge in tl.range(0, num_edges, num_stages=1):
        entry = edge_entry(
            edge, full_first, full_last, full_start, full_stop,
            partial_first, partial_last, partial_start,
        )  # fmt: skip
        first_key_row = tl.load(lists.indices + entry) * WIDTH + kv_shift
        key_rows = first_key_row + tl.arange(0, WIDTH)
        mask_id = tl.load(lists.mask_ids + entry)
        kept = load_row_bits(lists.bank, mask_id, places, owned, QUERIES, WIDTH)
        kept = kept & ((key_rows >= kv_row) & (key_rows < kv_end))[None, :]
        key_tile = load_rows_between(
            key, batch, kv_head, first_key_row, kv_row, kv_end, WIDTH, HEAD_DIM, HEAD_DIM_PADDED
        )
        value_tile = load_rows_between(
            value,
            batch,
            kv_head,
            first_key_row,
            kv_row,
            kv_end,
            WIDTH,
            VALUE_DIM,
            VALUE_DIM_PADDED,
        )
        accumulator, running_max, running_sum = accumulate_keys(
            accumulator, running_max, running_sum, query_tile, key_tile, value_tile, kept,
            query_rows, key_rows, batch_head, score_scale, softcap_scale, alibi_slope, position_shift,
            dropout, INPUT_PRECISION,
        )  # fmt: skip

    is_empty = running_sum == 0.0
    divisor = tl.where(is_empty, 1.0, running_sum)
    row_lse = (running_max + tl.log2(divisor)) * 0.6931471805599453
    row_lse = tl.where(is_empty, float("-inf"), row_lse)
    if dropout is not None:
        divisor = divisor / dropout.keep_scale
    values = accumulator / divisor[:, None]
    store_rows_where(out, values, batch, heads, query_rows, owned, VALUE_DIM, VALUE_DIM_PADDED)
    tl.store(row_pointers(lse, batch, heads) + query_rows, row_lse, mask=owned)
