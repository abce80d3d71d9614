"""Backward kernel for Hopper: the gradients of query, key and value in one pass over key tiles of 128 rows.

With P^T = exp2(S^T - log2_sum) and dS^T = P^T (dP^T - delta), where S^T = K Q^T and dP^T = V dO^T (`ops/triton/backward.py`), a step adds
P^T dO to dV, dS^T Q to dK and dS K to dQ: five products. A step is a tile of `STEP` query rows; a program walks its list of key tiles, and
for each one the query tiles that read it, of all query heads that share the key head. Four partitions of warps share a program:

- a *producer* of one warp, which has the TMA copy K, V, Q and dO into shared memory, and brings row terms and masks;
- two *consumers* of four warps, which own 64 key rows each: their dK and dV stay in registers over all steps of the key tile;
- an *adder* of one warp, which has the TMA add the parts of dQ to a float32 tensor in device memory.

dQ needs dS of both consumers. It is computed one step late, so that nobody waits for the other: columns or rows of it are divided.
The order in which parts of dQ meet in memory is not fixed, so its last bits differ from call to call; dK and dV are reproducible.

Steps are numbered through the whole program. What a barrier counts, who comes to it how often, and which number its waits name:

| barrier | comes | phase |
|---|---|---|
| `kv_filled` | the copies of K and V | the key tile's turn |
| `kv_free` | consumers, one each, when K was read and dV, which leaves through V's place, was copied out | turn |
| `query_filled[s]` | the copy of Q; the producer, when the row sums are there | use of slot `s = number % 2` |
| `grad_out_filled[s]` | the copy of dO; the producer, when deltas and mask are there | use of slot `s` |
| `free[s]` | consumers, one each, at the end of a step | use of slot `s` |
| `scores_filled[s]` | consumers, one each, when dS of the step is in shared memory | use of slot `s` |
| `scores_free[s]` | consumers, one each, when that step's dQ is computed | use of slot `s` |
| `sums_filled[c]` | consumer `c`, when its part of a step's dQ is in shared memory | number |
| `sums_free[c]` | the adder, when that part was copied out | number |

The last places of the `*_filled` barriers of copies are the producer's own: rows of tiles that straddle an end of the sequence are somebody
else's and may be NaN, so the producer waits for the copy itself and clears them before it comes to the barrier that consumers wait for.
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

from hf_blocksparse.ops.hopper.compat import reinterpret, tma_add, tma_load
from hf_blocksparse.ops.hopper.mask_bits import apply_mask, bits_between, read_mask
from hf_blocksparse.ops.hopper.tiles import (
    COLUMN_RECORD,
    HALF,
    clear_foreign_rows,
    entry_of,
    load_key_tile,
    load_steps_of_column,
    store_part,
    store_rows,
    straddles,
)

TILE = gl.constexpr(128)
SLOTS = gl.constexpr(2)  # for Q and dO, and for dS
PART_ROWS = gl.constexpr(128)  # of 32 numbers each: a 64 x 64 part of dQ in float32


@gluon.jit
def bring_mask(
    bank, mask_id, step_in_tile, q_begin, q_end, kv_begin, kv_end, slot, masks,
    STEP: gl.constexpr,
):  # fmt: skip
    """Words of the transposed bank for one step, all bits for -1, cleared outside the ranges of rows, which are counted in the tiles."""
    WORDS: gl.constexpr = STEP // 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, WORDS], [32, 1], [1, 1], [1, 0])
    words = gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT)), 0)
    own = bits_between(words, q_begin, q_end)
    for half in gl.static_range(2):
        keys = half * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
        is_own = (keys >= kv_begin) & (keys < kv_end)
        keys = gl.expand_dims(keys, 1)
        place = keys * (TILE // 32) + step_in_tile * WORDS + words
        packed = gl.load(
            bank + mask_id.to(gl.int64) * (TILE * (TILE // 32)) + place,
            mask=place + mask_id >= place,
            other=-1,
        )
        masks.index(slot * 2 + half).store(
            gl.where(gl.expand_dims(is_own, 1), packed & own, gl.zeros_like(packed))
        )


@gluon.jit
def producer(
    query_desc, key_desc, value_desc, grad_out_desc, log2_sums, deltas,
    records, offsets, indices, mask_ids, bank, num_heads, group_size, query_rows, key_rows,
    keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
    kv_filled, kv_free, query_filled, grad_out_filled, free,
    DIM: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    number = 0
    turn = 0
    num_cut_keys = 0
    num_cut_queries = 0
    tile_begin = gl.load(offsets + gl.program_id(0))
    tile_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(tile_begin, tile_end):
        of_tile = records + place * group_size * COLUMN_RECORD
        batch, kv_head, key_row, kv_begin, kv_end = load_key_tile(of_tile, group_size)
        is_cut = straddles(key_row, key_rows, kv_begin, kv_end, TILE)
        mbarrier.wait(kv_free, (turn & 1) ^ 1)
        target = kv_filled.index(gl.where(is_cut, 1, 0))
        mbarrier.expect(target, 2 * TILE * DIM * 2)
        for half in gl.static_range(2):
            where = [batch, kv_head, key_row + half * HALF, 0]
            tma_load(key_desc, where, target, keys.index(half))
            tma_load(value_desc, where, target, values.index(half))
        if is_cut:
            mbarrier.wait(kv_filled.index(1), num_cut_keys & 1)
            for half in gl.static_range(2):
                row = key_row + half * HALF
                clear_foreign_rows(keys, half, row, kv_begin, kv_end, HALF, DIM)
                clear_foreign_rows(values, half, row, kv_begin, kv_end, HALF, DIM)
            fence_async_shared()
            mbarrier.arrive(kv_filled.index(0))
            num_cut_keys += 1
        turn += 1
        for member in range(0, group_size):
            record = of_tile + member * COLUMN_RECORD
            head = gl.load(record + 1)
            query_shift = gl.load(record + 5)
            q_begin = gl.load(record + 6)
            q_end = gl.load(record + 7)
            (
                partial_first, num_partial, full_first, full_start,
                num_edges, num_masked, num_tiles, last_edge,
            ) = load_steps_of_column(record)  # fmt: skip
            terms = (batch * num_heads + head).to(gl.int64) * query_rows
            for walked in range(0, num_tiles):
                entry = entry_of(
                    walked, partial_first, num_partial, full_first, full_start, num_edges, last_edge
                )
                tile_row = gl.load(indices + entry) * TILE + query_shift
                mask_id = gl.load(mask_ids + entry)
                for step in range(0, TILE // STEP):
                    row = tile_row + step * STEP
                    rows = row + gl.arange(0, STEP, ROWS)
                    is_own = (rows >= q_begin) & (rows < q_end)
                    # Rows of nobody get p = 2^(s - inf) = 0.
                    log2_sum = gl.load(log2_sums + terms + rows, mask=is_own, other=float("inf"))
                    delta = gl.load(deltas + terms + rows, mask=is_own, other=0.0)
                    is_cut = straddles(row, query_rows, q_begin, q_end, STEP)
                    slot = number & 1
                    place_filled = gl.where(is_cut, SLOTS, slot)
                    where = [batch, head, row, 0]
                    mbarrier.wait(free.index(slot), ((number >> 1) & 1) ^ 1)
                    target = query_filled.index(place_filled)
                    mbarrier.expect(target, STEP * DIM * 2)
                    tma_load(query_desc, where, target, queries.index(slot))
                    target = grad_out_filled.index(place_filled)
                    mbarrier.expect(target, STEP * DIM * 2)
                    tma_load(grad_out_desc, where, target, grad_outs.index(slot))
                    sums_of_rows.index(slot).store(log2_sum)
                    mbarrier.arrive(query_filled.index(slot))
                    deltas_of_rows.index(slot).store(delta)
                    if walked < num_masked:
                        bring_mask(
                            bank, mask_id, step, q_begin - row, q_end - row,
                            kv_begin - key_row, kv_end - key_row, slot, masks, STEP,
                        )  # fmt: skip
                    if is_cut:
                        mbarrier.wait(query_filled.index(SLOTS), num_cut_queries & 1)
                        mbarrier.wait(grad_out_filled.index(SLOTS), num_cut_queries & 1)
                        clear_foreign_rows(queries, slot, row, q_begin, q_end, STEP, DIM)
                        clear_foreign_rows(grad_outs, slot, row, q_begin, q_end, STEP, DIM)
                        fence_async_shared()
                        mbarrier.arrive(query_filled.index(slot))
                        mbarrier.arrive(grad_out_filled.index(slot))
                        num_cut_queries += 1
                    mbarrier.arrive(grad_out_filled.index(slot))
                    number += 1


@gluon.jit
def adder(
    grad_query_desc, records, offsets, indices, num_heads, group_size,
    sums, sums_filled, sums_free,
    DIM: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Has the TMA add both consumers' parts of dQ, in the order of the steps."""
    PARTS: gl.constexpr = 2 * (DIM // 64)
    number = 0
    tile_begin = gl.load(offsets + gl.program_id(0))
    tile_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(tile_begin, tile_end):
        for member in range(0, group_size):
            record = records + (place * group_size + member) * COLUMN_RECORD
            head = gl.load(record + 1)
            first_slot = gl.load(record + 8)
            (
                partial_first, num_partial, full_first, full_start,
                num_edges, num_masked, num_tiles, last_edge,
            ) = load_steps_of_column(record)  # fmt: skip
            for walked in range(0, num_tiles):
                entry = entry_of(
                    walked, partial_first, num_partial, full_first, full_start, num_edges, last_edge
                )
                tile = first_slot + gl.load(indices + entry)
                for step in range(0, TILE // STEP):
                    part = (tile * num_heads + head) * PARTS + step * 2
                    for half in gl.static_range(2):
                        mbarrier.wait(sums_filled.index(half), number & 1)
                        # A step that stands for none has no slot, and the TMA takes no rows before a tensor's first.
                        if tile >= 0:
                            where = [(part + half) * PART_ROWS, 0]
                            tma_add(grad_query_desc, where, sums.index(half))
                    tma.store_wait(1)
                    mbarrier.arrive(sums_free.index(0))
                    tma.store_wait(0)
                    mbarrier.arrive(sums_free.index(1))
                    number += 1


@gluon.jit
def multiply_for_grad_query(
    grad_scores, keys, slot, no_sums,
    CONSUMER: gl.constexpr, DIM: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Starts the products of a consumer's part of dQ: 64 columns of 64 rows, or 64 rows of 64 columns."""
    DTYPE: gl.constexpr = keys.dtype
    SQUARE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ROW_PARTS: gl.constexpr = STEP // 64
    COLUMN_PARTS: gl.constexpr = DIM // 64
    row_part: gl.constexpr = CONSUMER if ROW_PARTS == 2 else 0
    column_part: gl.constexpr = CONSUMER if COLUMN_PARTS == 2 else 0
    scores = reinterpret(grad_scores, DTYPE, [4 * ROW_PARTS, 64, 64], SQUARE)
    squares = reinterpret(keys, DTYPE, [2 * COLUMN_PARTS, 64, 64], SQUARE)
    sums = warpgroup_mma(
        scores.index(slot * 2 * ROW_PARTS + row_part).permute([1, 0]),
        squares.index(column_part),
        no_sums,
        use_acc=False,
        is_async=True,
    )
    return warpgroup_mma(
        scores.index((slot * 2 + 1) * ROW_PARTS + row_part).permute([1, 0]),
        squares.index(COLUMN_PARTS + column_part),
        sums,
        is_async=True,
    )


@gluon.jit
def hand_over(grad_query, sums, filled, free, parity):
    """Leaves a consumer's part of dQ of a step of this parity to the adder.

    Its 64 x 64 numbers are put down in the order that gives every thread 16 bytes at a time and no conflicts: rows [warp 4, half 2,
    8 = high 4, low 2] and columns [8 = high 4, low 2, thread 4, 2] become [column high, half, warp, row high | row low, thread, column
    low, 2]. `query_sums.store_kernel` undoes it.
    """
    parts = gl.permute(gl.reshape(grad_query, [4, 2, 4, 2, 4, 2, 4, 2]), [4, 1, 0, 2, 3, 6, 5, 7])
    mbarrier.wait(free, parity ^ 1)
    sums.store(gl.reshape(parts, [PART_ROWS, 32]))
    fence_async_shared()
    mbarrier.arrive(filled)


@gluon.jit
def take_step(
    scores, grad_key, grad_value, number, first, last, score_scale,
    keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks, grad_scores, sums,
    query_filled, grad_out_filled, free, scores_filled, scores_free, sums_filled, sums_free,
    CONSUMER: gl.constexpr, MASKED: gl.constexpr,
    DIM: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Step `number` of the key tile's steps `[first, last)`, whose scores are there; returns those of the next one."""
    DTYPE: gl.constexpr = keys.dtype
    SCORES: gl.constexpr = scores.type.layout
    ACCUMULATOR: gl.constexpr = grad_key.type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACCUMULATOR, k_width=2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    no_scores = gl.zeros([HALF, STEP], gl.float32, SCORES)
    no_sums = gl.zeros([64, 64], gl.float32, SUMS)
    slot = number & 1
    parity = (number >> 1) & 1
    other = slot ^ 1
    # Always CONSUMER, which the compiler does not know: addresses known outside of the loop would fill registers until they spill.
    own = CONSUMER + (number >> 30)
    query = queries.index(slot).reshape([STEP, DIM])
    grad_out = grad_outs.index(slot).reshape([STEP, DIM])
    log2_sum = sums_of_rows.index(slot).load(COLUMNS)
    mbarrier.wait(grad_out_filled.index(slot), parity)
    grad_probabilities = warpgroup_mma(
        values.index(own).reshape([HALF, DIM]),
        grad_out.permute([1, 0]),
        no_scores,
        use_acc=False,
        is_async=True,
    )
    if MASKED:
        scores = apply_mask(scores, read_mask(masks.index(slot * 2 + CONSUMER), scores))
    probabilities = gl.exp2(scores * score_scale - gl.expand_dims(log2_sum, 0))
    weights = gl.convert_layout(probabilities.to(DTYPE), OPERAND)
    grad_value = warpgroup_mma(weights, grad_out, grad_value, is_async=True)
    grad_probabilities = warpgroup_mma_wait(1, deps=[grad_probabilities])
    delta = deltas_of_rows.index(slot).load(COLUMNS)
    grads = (probabilities * (grad_probabilities - gl.expand_dims(delta, 0))).to(DTYPE)
    mbarrier.wait(scores_free.index(slot), parity ^ 1)
    grad_scores.index(slot * 2 + CONSUMER).store(grads)
    fence_async_shared()
    mbarrier.arrive(scores_filled.index(slot))
    weights = gl.convert_layout(grads, OPERAND)

    # dQ of the step before. The first step has none: what it computes instead is left where it is.
    has_before = number > first
    mbarrier.wait(scores_filled.index(other), parity ^ other, pred=has_before)
    grad_query = multiply_for_grad_query(grad_scores, keys, other, no_sums, CONSUMER, DIM, STEP)
    grad_key = warpgroup_mma(weights, query, grad_key, is_async=True)
    grad_value = warpgroup_mma_wait(3, deps=[grad_value])
    # The last step repeats its own scores, which nobody reads.
    has_next = number + 1 < last
    mbarrier.wait(query_filled.index(other), parity ^ slot, pred=has_next)
    next_query = queries.index(gl.where(has_next, other, slot)).reshape([STEP, DIM])
    next_scores = warpgroup_mma(
        keys.index(own).reshape([HALF, DIM]),
        next_query.permute([1, 0]),
        no_scores,
        use_acc=False,
        is_async=True,
    )
    grad_query = warpgroup_mma_wait(2, deps=[grad_query])
    if has_before:
        mbarrier.arrive(scores_free.index(other))
        hand_over(
            grad_query, sums.index(CONSUMER), sums_filled.index(CONSUMER),
            sums_free.index(CONSUMER), other,
        )  # fmt: skip
    scores, grad_key, grad_value = warpgroup_mma_wait(0, deps=[next_scores, grad_key, grad_value])
    mbarrier.arrive(free.index(slot))
    return scores, grad_key, grad_value


@gluon.jit
def consumer(
    CONSUMER: gl.constexpr,
    grad_key_desc, grad_key, grad_key_strides, grad_value_desc, grad_value, grad_value_strides,
    key_parts, value_parts, records, offsets, scale, score_scale, group_size, key_rows,
    keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks, grad_scores, sums,
    kv_filled, kv_free, query_filled, grad_out_filled, free,
    scores_filled, scores_free, sums_filled, sums_free,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, STEP: gl.constexpr, IN_PARTS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = keys.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP, 16]
    )
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16]
    )
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    number = 0
    turn = 0
    tile_begin = gl.load(offsets + gl.program_id(0))
    tile_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(tile_begin, tile_end):
        of_tile = records + place * group_size * COLUMN_RECORD
        first = number
        last = first + gl.load(of_tile + 16) * (TILE // STEP)
        key_sum = gl.zeros([HALF, DIM], gl.float32, ACCUMULATOR)
        value_sum = gl.zeros([HALF, DIM], gl.float32, ACCUMULATOR)
        no_scores = gl.zeros([HALF, STEP], gl.float32, SCORES)
        slot = number & 1
        mbarrier.wait(kv_filled.index(0), turn & 1)
        mbarrier.wait(query_filled.index(slot), (number >> 1) & 1)
        scores = warpgroup_mma(
            keys.index(CONSUMER).reshape([HALF, DIM]),
            queries.index(slot).reshape([STEP, DIM]).permute([1, 0]),
            no_scores,
            use_acc=False,
            is_async=True,
        )
        scores = warpgroup_mma_wait(0, deps=[scores])
        for member in range(0, group_size):
            num_masked = gl.load(of_tile + member * COLUMN_RECORD + 14) * (TILE // STEP)
            num_steps = gl.load(of_tile + member * COLUMN_RECORD + 15) * (TILE // STEP)
            masked_end = number + num_masked
            member_end = number + num_steps
            for step in range(number, masked_end):
                scores, key_sum, value_sum = take_step(
                    scores, key_sum, value_sum, step, first, last, score_scale,
                    keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
                    grad_scores, sums, query_filled, grad_out_filled, free,
                    scores_filled, scores_free, sums_filled, sums_free,
                    CONSUMER, True, DIM, STEP,
                )  # fmt: skip
            for step in range(masked_end, member_end):
                scores, key_sum, value_sum = take_step(
                    scores, key_sum, value_sum, step, first, last, score_scale,
                    keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
                    grad_scores, sums, query_filled, grad_out_filled, free,
                    scores_filled, scores_free, sums_filled, sums_free,
                    CONSUMER, False, DIM, STEP,
                )  # fmt: skip
            number = member_end

        # dQ of the last step, while dV leaves through this consumer's part of V and dK after it.
        slot = (last - 1) & 1
        mbarrier.wait(scores_filled.index(slot), ((last - 1) >> 1) & 1)
        no_sums = gl.zeros([64, 64], gl.float32, SUMS)
        grad_query = multiply_for_grad_query(grad_scores, keys, slot, no_sums, CONSUMER, DIM, STEP)
        batch = gl.load(of_tile)
        kv_head = gl.load(of_tile + 1) // group_size
        row = gl.load(of_tile + 2) + CONSUMER * HALF
        kv_begin = gl.load(of_tile + 3)
        kv_end = gl.load(of_tile + 4)
        if IN_PARTS:
            # What is a part goes to its slot, and leaves no row for the stores below.
            part = gl.load(of_tile + 18)
            if part >= 0:
                store_part(value_parts, part, value_sum, CONSUMER, TILE)
                store_part(key_parts, part, key_sum, CONSUMER, TILE)
            kv_end = gl.where(part >= 0, kv_begin, kv_end)
        staging = values.index(CONSUMER)
        store_rows(
            grad_value_desc, grad_value,
            grad_value_strides[0], grad_value_strides[1], grad_value_strides[2],
            value_sum.to(DTYPE), staging, batch, kv_head, row, kv_begin, kv_end, key_rows,
            HEAD_DIM, DIM,
        )  # fmt: skip
        grad_query = warpgroup_mma_wait(0, deps=[grad_query])
        mbarrier.arrive(scores_free.index(slot))
        hand_over(
            grad_query, sums.index(CONSUMER), sums_filled.index(CONSUMER),
            sums_free.index(CONSUMER), slot,
        )  # fmt: skip
        tma.store_wait(0)
        store_rows(
            grad_key_desc, grad_key,
            grad_key_strides[0], grad_key_strides[1], grad_key_strides[2],
            (key_sum * scale).to(DTYPE), staging, batch, kv_head, row, kv_begin, kv_end, key_rows,
            HEAD_DIM, DIM,
        )  # fmt: skip
        tma.store_wait(0)
        mbarrier.arrive(kv_free)
        turn += 1


# One kernel for all lengths and numbers of heads, also where they are 1 or multiples of 16.
@gluon.jit(
    do_not_specialize=[
        "num_heads",
        "group_size",
        "query_rows",
        "key_rows",
        "grad_key_strides",
        "grad_value_strides",
    ]
)
def backward_kernel(
    query_desc,
    key_desc,
    value_desc,
    grad_out_desc,
    grad_query_desc,
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
    STEP: gl.constexpr,
    IN_PARTS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    OTHERS_REGISTERS: gl.constexpr,
):
    """Grid: (programs of the schedule,). Writes the rows of dK and dV that the tiles' sequences own, and adds to dQ / scale.

    `*_desc`: tensor descriptors of [batch, heads, rows, HEAD_DIM], in blocks of `STEP` rows (query, grad_out) or 64 (the others) and DIM
    columns; `grad_query_desc`: of float32 [parts * 128, 32], in parts of 128 rows, see `query_sums`; `grad_key`, `grad_value`,
    `*_strides`: the same outputs by pointer; `key_parts`, `value_parts`: float32 [slots, 128, DIM] for the sums of key tiles in parts,
    of which there are some if `IN_PARTS`; `log2_sums`, `deltas`: [batch, heads, rows]; `records`, `offsets`: `work.Schedule` of
    key tiles; `indices`, `mask_ids`: of the index's transpose; `bank`: `work.transposed_bank`; `query_rows`, `key_rows`: of the tensors.
    """
    DTYPE: gl.constexpr = query_desc.dtype
    SQUARE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN_ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    keys = gl.allocate_shared_memory(DTYPE, [2, 1, 1, HALF, DIM], key_desc.layout)
    values = gl.allocate_shared_memory(DTYPE, [2, 1, 1, HALF, DIM], value_desc.layout)
    queries = gl.allocate_shared_memory(DTYPE, [SLOTS, 1, 1, STEP, DIM], query_desc.layout)
    grad_outs = gl.allocate_shared_memory(DTYPE, [SLOTS, 1, 1, STEP, DIM], grad_out_desc.layout)
    grad_scores = gl.allocate_shared_memory(DTYPE, [4, HALF, STEP], SQUARE)
    sums = gl.allocate_shared_memory(gl.float32, [2, PART_ROWS, 32], grad_query_desc.layout)
    sums_of_rows = gl.allocate_shared_memory(gl.float32, [SLOTS, STEP], PLAIN)
    deltas_of_rows = gl.allocate_shared_memory(gl.float32, [SLOTS, STEP], PLAIN)
    masks = gl.allocate_shared_memory(gl.int32, [SLOTS * 2, HALF, STEP // 32], PLAIN_ROWS)
    kv_filled = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    kv_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    query_filled = gl.allocate_shared_memory(gl.int64, [SLOTS + 1, 1], BARRIER)
    grad_out_filled = gl.allocate_shared_memory(gl.int64, [SLOTS + 1, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    scores_filled = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    scores_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    sums_filled = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    sums_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(kv_free, count=2)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(query_filled.index(slot), count=2)
        mbarrier.init(grad_out_filled.index(slot), count=2)
        mbarrier.init(free.index(slot), count=2)
    mbarrier.init(query_filled.index(SLOTS), count=1)
    mbarrier.init(grad_out_filled.index(SLOTS), count=1)
    for slot in gl.static_range(2):
        mbarrier.init(kv_filled.index(slot), count=1)
        mbarrier.init(scores_filled.index(slot), count=2)
        mbarrier.init(scores_free.index(slot), count=2)
        mbarrier.init(sums_filled.index(slot), count=1)
        mbarrier.init(sums_free.index(slot), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (
                0, grad_key_desc, grad_key, grad_key_strides,
                grad_value_desc, grad_value, grad_value_strides, key_parts, value_parts,
                records, offsets, scale, score_scale, group_size, key_rows,
                keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
                grad_scores, sums, kv_filled, kv_free, query_filled, grad_out_filled, free,
                scores_filled, scores_free, sums_filled, sums_free,
                HEAD_DIM, DIM, STEP, IN_PARTS,
            )),
            (consumer, (
                1, grad_key_desc, grad_key, grad_key_strides,
                grad_value_desc, grad_value, grad_value_strides, key_parts, value_parts,
                records, offsets, scale, score_scale, group_size, key_rows,
                keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
                grad_scores, sums, kv_filled, kv_free, query_filled, grad_out_filled, free,
                scores_filled, scores_free, sums_filled, sums_free,
                HEAD_DIM, DIM, STEP, IN_PARTS,
            )),
            (producer, (
                query_desc, key_desc, value_desc, grad_out_desc, log2_sums, deltas,
                records, offsets, indices, mask_ids, bank,
                num_heads, group_size, query_rows, key_rows,
                keys, values, queries, grad_outs, sums_of_rows, deltas_of_rows, masks,
                kv_filled, kv_free, query_filled, grad_out_filled, free,
                DIM, STEP,
            )),
            (adder, (
                grad_query_desc, records, offsets, indices, num_heads, group_size,
                sums, sums_filled, sums_free, DIM, STEP,
            )),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, OTHERS_REGISTERS, OTHERS_REGISTERS],
    )  # fmt: skip
