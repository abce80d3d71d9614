"""Backward kernel for Hopper in two passes, the one of dK and dV: key tiles of 64 rows. `query_pass_kernel` has the other pass, dQ.

For layouts that leave much of `backward_kernel`'s tiles empty, and where results must be bitwise reproducible: nothing is added
atomically. The price is that scores and dP are computed twice, seven products for five. Formulas as in `ops/triton/backward.py`; this pass
works on transposed tiles, S^T = K Q^T.

Two programs share a multiprocessor, so that one has its products on the tensor cores while the other computes. Each walks its list of tiles
with two partitions of warps: a *producer* of one warp, which has the TMA copy rows into shared memory and clears those of other sequences
(which may be NaN), and a *consumer* of four warps. A step is one tile of the other axis; the scores of the next step are started before the
last products of a step are waited for.

Barriers come in pairs, *filled* (by the copy, or by the producer where it has more to do) and *free* (by the consumer):

| barriers | slots | what goes through |
|---|---|---|
| `kv` | 1 | K and V of the key tile; dK and dV leave through their places |
| `query`, `grad_out` | `SLOTS` each | Q with the row sums, dO with deltas and mask; the producer comes to *filled* as well |

The last place of a *filled* barrier is the producer's own, for the copies whose rows it has to clear before the consumer comes.

A key tile that many queries read, of all heads that share the key head, would hold its program up long after the others: such tiles
are walked in parts (`ops/triton/column_parts.py`), which leave float32 sums.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_blocksparse.ops.hopper.compat import tma_load
from hf_blocksparse.ops.hopper.mask_bits import apply_mask, bits_between, read_mask
from hf_blocksparse.ops.hopper.tiles import (
    COLUMN_RECORD,
    clear_foreign_rows,
    entry_of,
    load_key_tile,
    load_steps_of_column,
    store_part,
    store_rows,
    straddles,
)

TILE = gl.constexpr(64)
WORDS = gl.constexpr(2)  # of a row of a mask


@gluon.jit
def bring_mask(bank, mask_id, q_begin, q_end, kv_begin, kv_end, words):
    """Puts a mask of the transposed bank into `words` [64, 2], all bits for -1, cleared outside the ranges of rows, which are counted in
    the tiles."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, WORDS], [32, 1], [1, 1], [1, 0])
    keys = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    numbers = gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT)), 0)
    is_own = gl.expand_dims((keys >= kv_begin) & (keys < kv_end), 1)
    place = gl.expand_dims(keys, 1) * WORDS + numbers
    packed = gl.load(
        bank + mask_id.to(gl.int64) * (TILE * WORDS) + place,
        mask=place + mask_id >= place,
        other=-1,
    )
    packed = packed & bits_between(numbers, q_begin, q_end)
    words.store(gl.where(is_own, packed, gl.zeros_like(packed)))


@gluon.jit
def key_pass_producer(
    query_desc, key_desc, value_desc, grad_out_desc, log2_sums, deltas,
    records, offsets, indices, mask_ids, bank, num_heads, group_size, query_rows, key_rows,
    keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
    kv_filled, kv_free, query_filled, query_free, grad_out_filled, grad_out_free,
    DIM: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    number = 0
    turn = 0
    num_cut_keys = 0
    num_cut_queries = 0
    part_begin = gl.load(offsets + gl.program_id(0))
    part_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(part_begin, part_end):
        of_part = records + place * group_size * COLUMN_RECORD
        batch, kv_head, key_row, kv_begin, kv_end = load_key_tile(of_part, group_size)
        is_cut = straddles(key_row, key_rows, kv_begin, kv_end, TILE)
        mbarrier.wait(kv_free, (turn & 1) ^ 1)
        target = kv_filled.index(gl.where(is_cut, 1, 0))
        mbarrier.expect(target, 2 * TILE * DIM * 2)
        tma_load(key_desc, [batch, kv_head, key_row, 0], target, keys.index(0))
        tma_load(value_desc, [batch, kv_head, key_row, 0], target, values.index(0))
        if is_cut:
            mbarrier.wait(kv_filled.index(1), num_cut_keys & 1)
            clear_foreign_rows(keys, 0, key_row, kv_begin, kv_end, TILE, DIM)
            clear_foreign_rows(values, 0, key_row, kv_begin, kv_end, TILE, DIM)
            fence_async_shared()
            mbarrier.arrive(kv_filled.index(0))
            num_cut_keys += 1
        turn += 1
        for member in range(0, group_size):
            record = of_part + member * COLUMN_RECORD
            head = gl.load(record + 1)
            query_shift = gl.load(record + 5)
            q_begin = gl.load(record + 6)
            q_end = gl.load(record + 7)
            (
                partial_first, num_partial, full_first, full_start,
                num_edges, num_masked, num_tiles, last_edge,
            ) = load_steps_of_column(record)  # fmt: skip
            terms = (batch * num_heads + head).to(gl.int64) * query_rows
            entry = entry_of(
                0, partial_first, num_partial, full_first, full_start, num_edges, last_edge
            )
            next_tile = gl.load(indices + entry, mask=num_tiles > 0, other=0)
            next_mask_id = gl.load(mask_ids + entry, mask=num_tiles > 0, other=0)
            for walked in range(0, num_tiles):
                row = next_tile * TILE + query_shift
                mask_id = next_mask_id
                # The next tile's number is on its way while this one's slots are waited for.
                entry = entry_of(
                    gl.minimum(walked + 1, num_tiles - 1),
                    partial_first, num_partial, full_first, full_start, num_edges, last_edge,
                )  # fmt: skip
                next_tile = gl.load(indices + entry)
                next_mask_id = gl.load(mask_ids + entry)
                rows = row + gl.arange(0, TILE, ROWS)
                is_own = (rows >= q_begin) & (rows < q_end)
                # Rows of nobody get p = 2^(s - inf) = 0.
                log2_sum = gl.load(log2_sums + terms + rows, mask=is_own, other=float("inf"))
                delta = gl.load(deltas + terms + rows, mask=is_own, other=0.0)
                is_cut = straddles(row, query_rows, q_begin, q_end, TILE)
                slot = number % SLOTS
                parity = ((number // SLOTS) & 1) ^ 1
                place_filled = gl.where(is_cut, SLOTS, slot)
                where = [batch, head, row, 0]
                mbarrier.wait(query_free.index(slot), parity)
                mbarrier.expect(query_filled.index(place_filled), TILE * DIM * 2)
                tma_load(query_desc, where, query_filled.index(place_filled), queries.index(slot))
                sums_of_rows.index(slot).store(log2_sum)
                mbarrier.arrive(query_filled.index(slot))
                mbarrier.wait(grad_out_free.index(slot), parity)
                mbarrier.expect(grad_out_filled.index(place_filled), TILE * DIM * 2)
                tma_load(
                    grad_out_desc, where, grad_out_filled.index(place_filled), grad_outs.index(slot)
                )
                deltas_of_rows.index(slot).store(delta)
                if walked < num_masked:
                    bring_mask(
                        bank, mask_id, q_begin - row, q_end - row,
                        kv_begin - key_row, kv_end - key_row, masks.index(slot),
                    )  # fmt: skip
                if is_cut:
                    mbarrier.wait(query_filled.index(SLOTS), num_cut_queries & 1)
                    mbarrier.wait(grad_out_filled.index(SLOTS), num_cut_queries & 1)
                    clear_foreign_rows(queries, slot, row, q_begin, q_end, TILE, DIM)
                    clear_foreign_rows(grad_outs, slot, row, q_begin, q_end, TILE, DIM)
                    fence_async_shared()
                    mbarrier.arrive(query_filled.index(slot))
                    mbarrier.arrive(grad_out_filled.index(slot))
                    num_cut_queries += 1
                mbarrier.arrive(grad_out_filled.index(slot))
                number += 1


@gluon.jit
def take_key_step(
    scores, grad_key, grad_value, number, last, score_scale,
    keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
    query_filled, query_free, grad_out_filled, grad_out_free,
    MASKED: gl.constexpr, DIM: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Step `number` of the part, whose scores are there and whose last step is before `last`; returns those of the next one."""
    DTYPE: gl.constexpr = keys.dtype
    SCORES: gl.constexpr = scores.type.layout
    ACCUMULATOR: gl.constexpr = grad_key.type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACCUMULATOR, k_width=2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    no_scores = gl.zeros([TILE, TILE], gl.float32, SCORES)
    slot = number % SLOTS
    # Always 0, which the compiler does not know: addresses known outside of the loop would fill registers until they spill.
    own = number >> 30
    query = queries.index(slot).reshape([TILE, DIM])
    grad_out = grad_outs.index(slot).reshape([TILE, DIM])
    mbarrier.wait(grad_out_filled.index(slot), (number // SLOTS) & 1)
    grad_probabilities = warpgroup_mma(
        values.index(own).reshape([TILE, DIM]),
        grad_out.permute([1, 0]),
        no_scores,
        use_acc=False,
        is_async=True,
    )
    if MASKED:
        scores = apply_mask(scores, read_mask(masks.index(slot), scores))
    log2_sum = sums_of_rows.index(slot).load(COLUMNS)
    probabilities = gl.exp2(scores * score_scale - gl.expand_dims(log2_sum, 0))
    weights = gl.convert_layout(probabilities.to(DTYPE), OPERAND)
    grad_value = warpgroup_mma(weights, grad_out, grad_value, is_async=True)
    grad_probabilities = warpgroup_mma_wait(1, deps=[grad_probabilities])
    delta = deltas_of_rows.index(slot).load(COLUMNS)
    grads = probabilities * (grad_probabilities - gl.expand_dims(delta, 0))
    weights = gl.convert_layout(grads.to(DTYPE), OPERAND)
    grad_key = warpgroup_mma(weights, query, grad_key, is_async=True)
    grad_value = warpgroup_mma_wait(1, deps=[grad_value])
    mbarrier.arrive(grad_out_free.index(slot))
    # The last step repeats its own scores, which nobody reads.
    has_next = number + 1 < last
    next_slot = gl.where(has_next, (number + 1) % SLOTS, slot)
    mbarrier.wait(query_filled.index(next_slot), ((number + 1) // SLOTS) & 1, pred=has_next)
    next_scores = warpgroup_mma(
        keys.index(own).reshape([TILE, DIM]),
        queries.index(next_slot).reshape([TILE, DIM]).permute([1, 0]),
        no_scores,
        use_acc=False,
        is_async=True,
    )
    grad_key = warpgroup_mma_wait(1, deps=[grad_key])
    mbarrier.arrive(query_free.index(slot))
    scores = warpgroup_mma_wait(0, deps=[next_scores])
    return scores, grad_key, grad_value


@gluon.jit
def key_pass_consumer(
    grad_key_desc, grad_key, grad_key_strides, grad_value_desc, grad_value, grad_value_strides,
    key_parts, value_parts, records, offsets, scale, score_scale, group_size, key_rows,
    keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
    kv_filled, kv_free, query_filled, query_free, grad_out_filled, grad_out_free,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = keys.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16]
    )
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16]
    )
    number = 0
    turn = 0
    part_begin = gl.load(offsets + gl.program_id(0))
    part_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(part_begin, part_end):
        of_part = records + place * group_size * COLUMN_RECORD
        last = number + gl.load(of_part + 16)
        key_sum = gl.zeros([TILE, DIM], gl.float32, ACCUMULATOR)
        value_sum = gl.zeros([TILE, DIM], gl.float32, ACCUMULATOR)
        no_scores = gl.zeros([TILE, TILE], gl.float32, SCORES)
        slot = number % SLOTS
        mbarrier.wait(kv_filled.index(0), turn & 1)
        mbarrier.wait(query_filled.index(slot), (number // SLOTS) & 1)
        scores = warpgroup_mma(
            keys.index(0).reshape([TILE, DIM]),
            queries.index(slot).reshape([TILE, DIM]).permute([1, 0]),
            no_scores,
            use_acc=False,
            is_async=True,
        )
        scores = warpgroup_mma_wait(0, deps=[scores])
        for member in range(0, group_size):
            masked_end = number + gl.load(of_part + member * COLUMN_RECORD + 14)
            member_end = number + gl.load(of_part + member * COLUMN_RECORD + 15)
            for step in range(number, masked_end):
                scores, key_sum, value_sum = take_key_step(
                    scores, key_sum, value_sum, step, last, score_scale,
                    keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
                    query_filled, query_free, grad_out_filled, grad_out_free,
                    True, DIM, SLOTS,
                )  # fmt: skip
            for step in range(masked_end, member_end):
                scores, key_sum, value_sum = take_key_step(
                    scores, key_sum, value_sum, step, last, score_scale,
                    keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
                    query_filled, query_free, grad_out_filled, grad_out_free,
                    False, DIM, SLOTS,
                )  # fmt: skip
            number = member_end

        batch, kv_head, row, kv_begin, kv_end = load_key_tile(of_part, group_size)
        part = gl.load(of_part + 18)
        if part >= 0:
            store_part(value_parts, part, value_sum, 0, TILE)
            store_part(key_parts, part, key_sum, 0, TILE)
        else:
            store_rows(
                grad_value_desc, grad_value,
                grad_value_strides[0], grad_value_strides[1], grad_value_strides[2],
                value_sum.to(DTYPE), values.index(0), batch, kv_head, row, kv_begin, kv_end,
                key_rows, HEAD_DIM, DIM,
            )  # fmt: skip
            store_rows(
                grad_key_desc, grad_key,
                grad_key_strides[0], grad_key_strides[1], grad_key_strides[2],
                (key_sum * scale).to(DTYPE), keys.index(0), batch, kv_head, row, kv_begin, kv_end,
                key_rows, HEAD_DIM, DIM,
            )  # fmt: skip
        tma.store_wait(0)
        mbarrier.arrive(kv_free)
        turn += 1


# One kernel for all lengths and numbers of heads, also where they are 1 or multiples of 16.
@gluon.jit(
    do_not_specialize=[
        "grad_key_strides",
        "grad_value_strides",
        "num_heads",
        "group_size",
        "query_rows",
        "key_rows",
    ]
)
def key_pass_kernel(
    query_desc,
    key_desc,
    value_desc,
    grad_out_desc,
    grad_key_desc,
    grad_value_desc,
    grad_key,
    grad_key_strides,
    grad_value,
    grad_value_strides,
    key_parts,
    value_parts,
    log2_sums,
    deltas,
    records,
    offsets,
    indices,
    mask_ids,
    bank,
    scale,
    score_scale,
    num_heads,
    group_size,
    query_rows,
    key_rows,
    HEAD_DIM: gl.constexpr,
    DIM: gl.constexpr,
    SLOTS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Grid: (programs of the schedule,). Writes the rows of dK and dV that the tiles' sequences own, and the sums of tiles in parts.

    `*_desc`: tensor descriptors of [batch, heads, rows, HEAD_DIM], in blocks of 64 rows and DIM columns; `grad_key`, `grad_value`,
    `*_strides`: the same outputs by pointer; `key_parts`, `value_parts`: float32 [slots, 64, DIM], dK / scale and dV; `log2_sums`,
    `deltas`: [batch, heads, rows]; `records`, `offsets`: `work.ColumnSchedule`; `indices`, `mask_ids`: of the index's transpose; `bank`:
    `work.transposed_bank`; `query_rows`, `key_rows`: of the tensors.
    """
    DTYPE: gl.constexpr = query_desc.dtype
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN_ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    keys = gl.allocate_shared_memory(DTYPE, [1, 1, 1, TILE, DIM], key_desc.layout)
    values = gl.allocate_shared_memory(DTYPE, [1, 1, 1, TILE, DIM], value_desc.layout)
    queries = gl.allocate_shared_memory(DTYPE, [SLOTS, 1, 1, TILE, DIM], query_desc.layout)
    grad_outs = gl.allocate_shared_memory(DTYPE, [SLOTS, 1, 1, TILE, DIM], grad_out_desc.layout)
    sums_of_rows = gl.allocate_shared_memory(gl.float32, [SLOTS, TILE], PLAIN)
    deltas_of_rows = gl.allocate_shared_memory(gl.float32, [SLOTS, TILE], PLAIN)
    masks = gl.allocate_shared_memory(gl.int32, [SLOTS, TILE, WORDS], PLAIN_ROWS)
    kv_filled = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    kv_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    query_filled = gl.allocate_shared_memory(gl.int64, [SLOTS + 1, 1], BARRIER)
    query_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    grad_out_filled = gl.allocate_shared_memory(gl.int64, [SLOTS + 1, 1], BARRIER)
    grad_out_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    mbarrier.init(kv_filled.index(0), count=1)
    mbarrier.init(kv_filled.index(1), count=1)
    mbarrier.init(kv_free, count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(query_filled.index(slot), count=2)
        mbarrier.init(query_free.index(slot), count=1)
        mbarrier.init(grad_out_filled.index(slot), count=2)
        mbarrier.init(grad_out_free.index(slot), count=1)
    mbarrier.init(query_filled.index(SLOTS), count=1)
    mbarrier.init(grad_out_filled.index(SLOTS), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (key_pass_consumer, (
                grad_key_desc, grad_key, grad_key_strides,
                grad_value_desc, grad_value, grad_value_strides,
                key_parts, value_parts, records, offsets, scale, score_scale, group_size, key_rows,
                keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
                kv_filled, kv_free, query_filled, query_free, grad_out_filled, grad_out_free,
                HEAD_DIM, DIM, SLOTS,
            )),
            (key_pass_producer, (
                query_desc, key_desc, value_desc, grad_out_desc, log2_sums, deltas,
                records, offsets, indices, mask_ids, bank,
                num_heads, group_size, query_rows, key_rows,
                keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
                kv_filled, kv_free, query_filled, query_free, grad_out_filled, grad_out_free,
                DIM, SLOTS,
            )),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
