"""Backward kernels: dQ and the per-row terms by rows, then dK/dV by columns, both without atomics.

Scores are in units of log2 (see `tiles`). With probabilities recomputed from the log-sum-exp, `keep` and `c` the mask
and the factor of dropout, and `slope = 1 - tanh^2` with a softcap, 1 without ("FlashAttention-2", arXiv 2307.08691,
algorithm 2):

    p_ij    = 2^(s_ij - log2(e) * lse_i)
    delta_i = <dO_i, O_i> - dLSE_i
    dS_ij   = p_ij * (c * keep_ij * <dO_i, v_j> - delta_i) * slope_ij
    dQ_i    = scale * sum_j dS_ij k_j
    dK_j    = scale * sum_i dS_ij q_i
    dV_j    = c * sum_i keep_ij p_ij dO_i

ALiBi changes `s_ij` by what does not depend on q and k, and so changes p alone.

dK and dV work on the transposed tile `S^T = K Q^T`, so that P^T and dS^T enter their products as they are.
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
    load_row_values,
    load_rows_between,
    load_rows_where,
    load_sequence,
    load_strip_bits,
    load_strips,
    row_pointers,
    rows_of_strips,
    store_rows_between,
    store_rows_where,
    subtract_alibi,
    tanh,
)


@triton.jit
def row_terms(out_tile, grad_out_tile, row_lse, row_grad_lse):
    """`log2(e) * lse` and `delta` of each row. Rows without keys get +inf and 0: with `p = 2^(s - inf) = 0` they add nothing anywhere."""
    delta = tl.sum(out_tile.to(tl.float32) * grad_out_tile.to(tl.float32), 1) - row_grad_lse
    is_empty = row_lse == float("-inf")
    log2_sum = tl.where(is_empty, float("inf"), row_lse * 1.4426950408889634)
    return log2_sum, tl.where(is_empty, 0.0, delta)


@triton.jit
def accumulate_grad_query(
    grad_query,
    query_tile,
    grad_out_tile,
    log2_sum,
    delta,
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
    """Adds one key tile's part of dQ / scale. `kept`: bool [tile_q, tile_kv], or None where every coefficient is."""
    raw = tl.dot(query_tile, key_tile.T, input_precision=INPUT_PRECISION)
    if softcap_scale is not None:
        raw = tanh(raw * softcap_scale)
    biased = raw
    if alibi_slope is not None:
        biased = subtract_alibi(
            raw, alibi_slope, query_rows[:, None], key_rows[None, :], position_shift
        )
    probabilities = tl.exp2(biased * score_scale - log2_sum[:, None])
    if kept is not None:
        probabilities = tl.where(kept, probabilities, 0.0)
    grad_probabilities = tl.dot(grad_out_tile, value_tile.T, input_precision=INPUT_PRECISION)
    if dropout is not None:
        keeps = dropout_keeps(dropout, query_rows[:, None], key_rows[None, :], batch_head)
        grad_probabilities = tl.where(keeps, grad_probabilities * dropout.keep_scale, 0.0)
    grad_scores = probabilities * (grad_probabilities - delta[:, None])
    if softcap_scale is not None:
        grad_scores *= 1.0 - raw * raw
    return add_product(grad_query, grad_scores.to(key_tile.dtype), key_tile, INPUT_PRECISION)


@triton.jit
def grad_query_kernel(
    query,
    key,
    value,
    out,
    grad_out,
    lse,
    grad_lse,
    log2_sums,
    deltas,
    key_descriptor,
    value_descriptor,
    grad_query,
    items,
    table,
    lists,
    scale,
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
    """Grid: (items, query heads). Writes the rows of `grad_query`, `log2_sums` and `deltas` that the item's sequence owns.

    Arguments as in `forward_kernel`; `scale` is the factor of the scores in natural units, the pointer of `grad_lse` may be None.
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
    kv_shift = kv_row - kv_pos
    position_shift = q_pos - q_row + kv_shift
    alibi_slope = None
    if alibi_slopes is not None:
        alibi_slope = tl.load(alibi_slopes + batch_head)

    places = tl.arange(0, TILE_Q) % QUERIES
    query_rows = tile * QUERIES - q_pos + q_row + places
    owned = (query_rows >= q_row) & (query_rows < q_row + q_len) & has_head
    query_tile = load_rows_where(query, batch, heads, query_rows, owned, HEAD_DIM, HEAD_DIM_PADDED)
    grad_out_tile = load_rows_where(
        grad_out, batch, heads, query_rows, owned, VALUE_DIM, VALUE_DIM_PADDED
    )
    out_tile = load_rows_where(out, batch, heads, query_rows, owned, VALUE_DIM, VALUE_DIM_PADDED)
    row_lse = tl.load(row_pointers(lse, batch, heads) + query_rows, mask=owned, other=float("-inf"))
    row_grad_lse = tl.zeros([TILE_Q], tl.float32)
    if grad_lse.pointer is not None:
        pointers = (
            row_pointers(grad_lse, batch, heads) + query_rows.to(tl.int64) * grad_lse.strides[2]
        )
        row_grad_lse = tl.load(pointers, mask=owned, other=0.0)
    log2_sum, delta = row_terms(out_tile, grad_out_tile, row_lse, row_grad_lse)
    tl.store(row_pointers(log2_sums, batch, heads) + query_rows, log2_sum, mask=owned)
    tl.store(row_pointers(deltas, batch, heads) + query_rows, delta, mask=owned)
    accumulator = tl.zeros([TILE_Q, HEAD_DIM_PADDED], tl.float32)

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
            accumulator = accumulate_grad_query(
                accumulator, query_tile, grad_out_tile, log2_sum, delta, key_tile, value_tile, None,
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
            accumulator = accumulate_grad_query(
                accumulator, query_tile, grad_out_tile, log2_sum, delta, key_tile, value_tile, kept,
                query_rows, key_rows, batch_head, score_scale, softcap_scale, alibi_slope, position_shift,
                dropout, INPUT_PRECISION,
            )  # fmt: skip
    else:
        STRIPS: tl.constexpr = TILE_KV // STRIP
        num_full = full_last - full_first
        num_strips = num_full + partial_last - partial_first
        num_whole = 0
        # A strip that serves one block of queries is nearly always full. So is one of packed heads, which was no faster here.
        if TILE_Q <= STRIP:
            num_whole = num_full // STRIPS * STRIPS
            for place in tl.range(0, num_whole, STRIPS):
                strips = tl.load(lists.indices + full_first + place + tl.arange(0, STRIPS))
                key_rows = rows_of_strips(strips, kv_shift, STRIP, TILE_KV)
                key_tile, value_tile = load_both_at(
                    key, value, batch, kv_head, key_rows,
                    HEAD_DIM, HEAD_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED,
                )  # fmt: skip
                accumulator = accumulate_grad_query(
                    accumulator, query_tile, grad_out_tile, log2_sum, delta, key_tile, value_tile, None,
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
            accumulator = accumulate_grad_query(
                accumulator, query_tile, grad_out_tile, log2_sum, delta, key_tile, value_tile, kept,
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
        accumulator = accumulate_grad_query(
            accumulator, query_tile, grad_out_tile, log2_sum, delta, key_tile, value_tile, kept,
            query_rows, key_rows, batch_head, score_scale, softcap_scale, alibi_slope, position_shift,
            dropout, INPUT_PRECISION,
        )  # fmt: skip

    store_rows_where(
        grad_query, accumulator * scale, batch, heads, query_rows, owned, HEAD_DIM, HEAD_DIM_PADDED
    )


@triton.jit
def accumulate_grad_key_value(
    grad_key,
    grad_value,
    key_tile,
    value_tile,
    query_tile,
    grad_out_tile,
    log2_sum,
    delta,
    kept,
    key_rows,
    query_rows,
    batch_head,
    score_scale,
    softcap_scale,
    alibi_slope,
    position_shift,
    dropout,
    INPUT_PRECISION: tl.constexpr,
):
    """Adds one query tile's part of dK / scale and dV / c. `kept`: bool [tile_kv, tile_q], or None."""
    raw = tl.dot(key_tile, query_tile.T, input_precision=INPUT_PRECISION)
    if softcap_scale is not None:
        raw = tanh(raw * softcap_scale)
    biased = raw
    if alibi_slope is not None:
        biased = subtract_alibi(
            raw, alibi_slope, query_rows[None, :], key_rows[:, None], position_shift
        )
    probabilities = tl.exp2(biased * score_scale - log2_sum[None, :])
    if kept is not None:
        probabilities = tl.where(kept, probabilities, 0.0)
    dropped = probabilities
    if dropout is not None:
        keeps = dropout_keeps(dropout, query_rows[None, :], key_rows[:, None], batch_head)
        dropped = tl.where(keeps, probabilities, 0.0)
    # dV comes before dP, so that fewer products are alive at a time: registers decide the speed here.
    grad_value = add_product(
        grad_value, dropped.to(grad_out_tile.dtype), grad_out_tile, INPUT_PRECISION
    )
    grad_probabilities = tl.dot(value_tile, grad_out_tile.T, input_precision=INPUT_PRECISION)
    if dropout is not None:
        grad_probabilities = tl.where(keeps, grad_probabilities * dropout.keep_scale, 0.0)
    grad_scores = probabilities * (grad_probabilities - delta[None, :])
    if softcap_scale is not None:
        grad_scores *= 1.0 - raw * raw
    grad_key = add_product(grad_key, grad_scores.to(query_tile.dtype), query_tile, INPUT_PRECISION)
    return grad_key, grad_value


@triton.jit
def entries_of_part(first, count, walked, part_begin, part_end):
    """Which of the `count` entries from `first` on are steps `[part_begin, part_end)`, where `walked` steps come before them."""
    begin = tl.minimum(tl.maximum(part_begin - walked, 0), count)
    end = tl.minimum(tl.maximum(part_end - walked, 0), count)
    return first + begin, first + end


@triton.jit
def store_part(parts, slot, values, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Stores [ROWS, DIM] values into slot `slot` of the contiguous `parts`."""
    place = tl.arange(0, ROWS)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(parts + slot.to(tl.int64) * (ROWS * DIM) + place, values)


@triton.jit
def grad_key_value_kernel(
    query,
    key,
    value,
    grad_out,
    log2_sums,
    deltas,
    query_descriptor,
    grad_out_descriptor,
    grad_key,
    grad_value,
    items,
    table,
    lists,
    scale,
    score_scale,
    softcap_scale,
    alibi_slopes,
    dropout,
    group_size,
    num_kv_heads,
    programs,
    key_parts,
    value_parts,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Grid: (items, key heads). Writes the rows of `grad_key` and `grad_value` that the item's sequence owns.

    `items`: `Sequences.kv_items`; `lists`: TileLists of the key tiles. One program sums over the query heads of its
    group, each with its own list.

    With `programs`, of `ColumnParts`, the grid is (programs,). One with a slot leaves its sums there, in `key_parts` and `value_parts`
    [slots, TILE_KV, padded dim], and writes nothing else.
    """
    if programs is None:
        item = items + tl.program_id(0) * 2
        kv_head = tl.program_id(1)
    else:
        program = programs + tl.program_id(0) * 5
        item = items + tl.load(program) * 2
        kv_head = tl.load(program + 1)
        part_begin = tl.load(program + 2)
        part_end = tl.load(program + 3)
        part_slot = tl.load(program + 4)
        walked = part_begin * 0
    num_query_heads = num_kv_heads * group_size
    sequence = tl.load(item)
    if sequence < 0:
        return
    tile = tl.load(item + 1)
    batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos = load_sequence(table, sequence)
    q_end = q_row + q_len
    q_shift = q_row - q_pos
    position_shift = kv_row - kv_pos - q_shift

    first_key_row = tile * TILE_KV - kv_pos + kv_row
    key_rows = first_key_row + tl.arange(0, TILE_KV)
    key_tile = load_rows_between(
        key, batch, kv_head, first_key_row, kv_row, kv_row + kv_len,
        TILE_KV, HEAD_DIM, HEAD_DIM_PADDED,
    )  # fmt: skip
    value_tile = load_rows_between(
        value, batch, kv_head, first_key_row, kv_row, kv_row + kv_len,
        TILE_KV, VALUE_DIM, VALUE_DIM_PADDED,
    )  # fmt: skip
    key_sum = tl.zeros([TILE_KV, HEAD_DIM_PADDED], tl.float32)
    value_sum = tl.zeros([TILE_KV, VALUE_DIM_PADDED], tl.float32)

    for member in range(group_size):
        head = kv_head * group_size + member
        begin, partial_begin, end = load_list(lists, sequence, head, tile)
        batch_head = batch * num_query_heads + head
        alibi_slope = None
        if alibi_slopes is not None:
            alibi_slope = tl.load(alibi_slopes + batch_head)

        WIDTH: tl.constexpr = STRIP if STRIP > 0 else TILE_Q
        full_first, full_last, full_start, full_stop = clip_entries(
            lists.indices, begin, partial_begin, q_pos, q_pos + q_len, WIDTH
        )
        partial_first, partial_last, partial_start, partial_stop = clip_entries(
            lists.indices, partial_begin, end, q_pos, q_pos + q_len, WIDTH
        )
        if STRIP == 0:
            first, last = full_first, full_last
            if programs is not None:
                first, last = entries_of_part(
                    full_first, full_last - full_first, walked, part_begin, part_end
                )
                walked += full_last - full_first
            for entry in tl.range(first, last):
                first_query_row = tl.load(lists.indices + entry) * TILE_Q + q_shift
                query_rows = first_query_row + tl.arange(0, TILE_Q)
                query_tile, grad_out_tile = load_both(
                    query, query_descriptor, grad_out, grad_out_descriptor, batch, head, first_query_row,
                    TILE_Q, HEAD_DIM, HEAD_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED,
                )  # fmt: skip
                log2_sum = load_row_values(log2_sums, batch, head, first_query_row, TILE_Q)
                delta = load_row_values(deltas, batch, head, first_query_row, TILE_Q)
                key_sum, value_sum = accumulate_grad_key_value(
                    key_sum, value_sum, key_tile, value_tile, query_tile, grad_out_tile,
                    log2_sum, delta, None, key_rows, query_rows, batch_head,
                    score_scale, softcap_scale, alibi_slope, position_shift, dropout, INPUT_PRECISION,
                )  # fmt: skip

            first, last = partial_first, partial_last
            if programs is not None:
                first, last = entries_of_part(
                    partial_first, partial_last - partial_first, walked, part_begin, part_end
                )
                walked += partial_last - partial_first
            for entry in tl.range(first, last):
                first_query_row = tl.load(lists.indices + entry) * TILE_Q + q_shift
                query_rows = first_query_row + tl.arange(0, TILE_Q)
                kept = load_bits(lists.bank, tl.load(lists.mask_ids + entry), TILE_Q, TILE_KV, True)
                query_tile, grad_out_tile = load_both(
                    query, query_descriptor, grad_out, grad_out_descriptor, batch, head, first_query_row,
                    TILE_Q, HEAD_DIM, HEAD_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED,
                )  # fmt: skip
                log2_sum = load_row_values(log2_sums, batch, head, first_query_row, TILE_Q)
                delta = load_row_values(deltas, batch, head, first_query_row, TILE_Q)
                key_sum, value_sum = accumulate_grad_key_value(
                    key_sum, value_sum, key_tile, value_tile, query_tile, grad_out_tile,
                    log2_sum, delta, kept, key_rows, query_rows, batch_head,
                    score_scale, softcap_scale, alibi_slope, position_shift, dropout, INPUT_PRECISION,
                )  # fmt: skip
        else:
            STRIPS: tl.constexpr = TILE_Q // STRIP
            num_full = full_last - full_first
            num_strips = num_full + partial_last - partial_first
            first, last = 0, num_strips
            if programs is not None:
                num_steps = (num_strips + STRIPS - 1) // STRIPS
                first, last = entries_of_part(0, num_steps, walked, part_begin, part_end)
                first, last = first * STRIPS, tl.minimum(last * STRIPS, num_strips)
                walked += num_steps
            num_whole = first
            if TILE_KV <= STRIP:  # a strip that serves one block of keys is nearly always full
                num_whole = tl.maximum(first, tl.minimum(last, num_full // STRIPS * STRIPS))
                for place in tl.range(first, num_whole, STRIPS):
                    strips = tl.load(lists.indices + full_first + place + tl.arange(0, STRIPS))
                    query_rows = rows_of_strips(strips, q_shift, STRIP, TILE_Q)
                    query_tile, grad_out_tile = load_both_at(
                        query, grad_out, batch, head, query_rows,
                        HEAD_DIM, HEAD_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED,
                    )  # fmt: skip
                    log2_sum = tl.load(row_pointers(log2_sums, batch, head) + query_rows)
                    delta = tl.load(row_pointers(deltas, batch, head) + query_rows)
                    key_sum, value_sum = accumulate_grad_key_value(
                        key_sum, value_sum, key_tile, value_tile, query_tile, grad_out_tile,
                        log2_sum, delta, None, key_rows, query_rows, batch_head,
                        score_scale, softcap_scale, alibi_slope, position_shift, dropout, INPUT_PRECISION,
                    )  # fmt: skip
            for place in tl.range(num_whole, last, STRIPS):
                strips, mask_ids, exist = load_strips(
                    lists, place, full_first, num_full, partial_first, num_strips, STRIPS
                )
                kept = load_strip_bits(lists.bank, mask_ids, exist, TILE_Q, TILE_KV, STRIP, True)
                query_rows = rows_of_strips(strips, q_shift, STRIP, TILE_Q)
                query_tile, grad_out_tile = load_both_at(
                    query, grad_out, batch, head, query_rows,
                    HEAD_DIM, HEAD_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED,
                )  # fmt: skip
                log2_sum = tl.load(row_pointers(log2_sums, batch, head) + query_rows)
                delta = tl.load(row_pointers(deltas, batch, head) + query_rows)
                key_sum, value_sum = accumulate_grad_key_value(
                    key_sum, value_sum, key_tile, value_tile, query_tile, grad_out_tile,
                    log2_sum, delta, kept, key_rows, query_rows, batch_head,
                    score_scale, softcap_scale, alibi_slope, position_shift, dropout, INPUT_PRECISION,
                )  # fmt: skip

        num_edges = full_start + full_stop + partial_start + partial_stop
        first, last = 0, num_edges
        if programs is not None:
            first, last = entries_of_part(0, num_edges, walked, part_begin, part_end)
            walked += num_edges
        for edge in tl.range(first, last, num_stages=1):
            entry = edge_entry(
                edge, full_first, full_last, full_start, full_stop,
                partial_first, partial_last, partial_start,
            )  # fmt: skip
            first_query_row = tl.load(lists.indices + entry) * WIDTH + q_shift
            query_rows = first_query_row + tl.arange(0, WIDTH)
            owned = (query_rows >= q_row) & (query_rows < q_end)
            kept = load_bits(lists.bank, tl.load(lists.mask_ids + entry), WIDTH, TILE_KV, True)
            query_tile = load_rows_between(
                query, batch, head, first_query_row, q_row, q_end, WIDTH, HEAD_DIM, HEAD_DIM_PADDED
            )
            grad_out_tile = load_rows_between(
                grad_out, batch, head, first_query_row, q_row, q_end,
                WIDTH, VALUE_DIM, VALUE_DIM_PADDED,
            )  # fmt: skip
            # Rows of nobody get p = 2^(s - inf) = 0.
            log2_sum = tl.load(
                row_pointers(log2_sums, batch, head) + query_rows, mask=owned, other=float("inf")
            )
            delta = tl.load(row_pointers(deltas, batch, head) + query_rows, mask=owned, other=0.0)
            key_sum, value_sum = accumulate_grad_key_value(
                key_sum, value_sum, key_tile, value_tile, query_tile, grad_out_tile,
                log2_sum, delta, kept, key_rows, query_rows, batch_head,
                score_scale, softcap_scale, alibi_slope, position_shift, dropout, INPUT_PRECISION,
            )  # fmt: skip

    if programs is not None:
        if part_slot >= 0:
            store_part(key_parts, part_slot, key_sum, TILE_KV, HEAD_DIM_PADDED)
            store_part(value_parts, part_slot, value_sum, TILE_KV, VALUE_DIM_PADDED)
        kv_len = tl.where(part_slot >= 0, 0, kv_len)  # of a part no row is stored below
    store_rows_between(
        grad_key, key_sum * scale, batch, kv_head, first_key_row, kv_row, kv_row + kv_len,
        TILE_KV, HEAD_DIM, HEAD_DIM_PADDED,
    )  # fmt: skip
    if dropout is not None:
        value_sum *= dropout.keep_scale
    store_rows_between(
        grad_value, value_sum, batch, kv_head, first_key_row, kv_row, kv_row + kv_len,
        TILE_KV, VALUE_DIM, VALUE_DIM_PADDED,
    )  # fmt: skip
