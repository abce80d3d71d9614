"""Backward kernel for Hopper in two passes, the one of dQ: query tiles of 64 rows. `key_pass_kernel` says what both have alike.

| barriers | slots | what goes through |
|---|---|---|
| `query`, `grad_out` | 1 each | Q and dO of the query tile; dQ leaves through the place of dO |
| `filled`, `free` | `STAGES` | K and V of each step, in turns |
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
from hf_blocksparse.ops.hopper.mask_bits import apply_mask, load_mask
from hf_blocksparse.ops.hopper.tiles import (
    RECORD,
    clear_foreign_rows,
    entry_of,
    load_query_tile,
    load_steps_of_row,
    store_rows,
    straddles,
)

TILE = gl.constexpr(64)


@gluon.jit
def load_rows(
    desc, batch, head, row, begin, end, num_rows, number, num_cut, ring, filled, free,
    DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Has the TMA fill a slot of the ring, rows outside `[begin, end)` cleared; returns how many slots had to be so far."""
    slot = number % STAGES
    is_cut = straddles(row, num_rows, begin, end, TILE)
    mbarrier.wait(free.index(slot), ((number // STAGES) & 1) ^ 1)
    target = filled.index(gl.where(is_cut, STAGES, slot))
    mbarrier.expect(target, TILE * DIM * 2)
    tma_load(desc, [batch, head, row, 0], target, ring.index(slot))
    if is_cut:
        mbarrier.wait(filled.index(STAGES), num_cut & 1)
        clear_foreign_rows(ring, slot, row, begin, end, TILE, DIM)
        fence_async_shared()
        mbarrier.arrive(filled.index(slot))
        num_cut += 1
    return num_cut


@gluon.jit
def query_pass_producer(
    query_desc, key_desc, value_desc, grad_out_desc, records, offsets, indices, group_size,
    key_rows, queries, grad_outs, ring,
    query_filled, query_free, grad_out_filled, grad_out_free, filled, free,
    DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    number = 0
    turn = 0
    num_cut = 0
    tile_begin = gl.load(offsets + gl.program_id(0))
    tile_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(tile_begin, tile_end):
        record = records + place * RECORD
        batch, head, query_row, _, _, key_shift, kv_begin, kv_end = load_query_tile(record)
        next_tile = gl.load(record + 11)
        (
            partial_first, num_partial, full_first, full_start,
            num_edges, num_masked, num_tiles, last_edge,
        ) = load_steps_of_row(record)  # fmt: skip
        kv_head = head // group_size
        where = [batch, head, query_row, 0]
        mbarrier.wait(query_free, (turn & 1) ^ 1)
        mbarrier.expect(query_filled, TILE * DIM * 2)
        tma_load(query_desc, where, query_filled, queries.index(0))
        for walked in range(0, num_tiles):
            row = next_tile * TILE + key_shift
            # The next tile's number is on its way while this one's slots are waited for.
            entry = entry_of(
                gl.minimum(walked + 1, num_tiles - 1),
                partial_first, num_partial, full_first, full_start, num_edges, last_edge,
            )  # fmt: skip
            next_tile = gl.load(indices + entry)
            num_cut = load_rows(
                key_desc, batch, kv_head, row, kv_begin, kv_end, key_rows, number, num_cut,
                ring, filled, free, DIM, STAGES,
            )  # fmt: skip
            if walked == 0:
                mbarrier.wait(grad_out_free, (turn & 1) ^ 1)
                mbarrier.expect(grad_out_filled, TILE * DIM * 2)
                tma_load(grad_out_desc, where, grad_out_filled, grad_outs.index(0))
            num_cut = load_rows(
                value_desc, batch, kv_head, row, kv_begin, kv_end, key_rows, number + 1, num_cut,
                ring, filled, free, DIM, STAGES,
            )  # fmt: skip
            number += 2
        turn += 1


@gluon.jit
def load_mask_of_step(
    step, partial_first, num_partial, full_first, full_start, num_edges, last_edge,
    indices, mask_ids, bank, key_shift, kv_begin, kv_end, scores,
):  # fmt: skip
    entry = entry_of(step, partial_first, num_partial, full_first, full_start, num_edges, last_edge)
    key_row = gl.load(indices + entry) * TILE + key_shift
    mask_id = gl.load(mask_ids + entry)
    return load_mask(bank, mask_id, 0, kv_begin - key_row, kv_end - key_row, scores, TILE)


@gluon.jit
def take_query_step(
    scores, mask, grad_query, query, grad_out, log2_sum, delta, number, has_next,
    score_scale, ring, filled, free,
    DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A step of the query tile, whose scores are there and whose K is in slot `number` of the ring; returns the next one's scores.

    `mask`: None where every coefficient is kept.
    """
    DTYPE: gl.constexpr = ring.dtype
    SCORES: gl.constexpr = scores.type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(
        operand_index=0, parent=grad_query.type.layout, k_width=2
    )
    no_scores = gl.zeros([TILE, TILE], gl.float32, SCORES)
    key_slot = number % STAGES
    value_slot = (number + 1) % STAGES
    mbarrier.wait(filled.index(value_slot), ((number + 1) // STAGES) & 1)
    grad_probabilities = warpgroup_mma(
        grad_out,
        ring.index(value_slot).reshape([TILE, DIM]).permute([1, 0]),
        no_scores,
        use_acc=False,
        is_async=True,
    )
    if mask is not None:
        scores = apply_mask(scores, mask)
    probabilities = gl.exp2(scores * score_scale - log2_sum)
    grad_probabilities = warpgroup_mma_wait(0, deps=[grad_probabilities])
    mbarrier.arrive(free.index(value_slot))
    grads = (probabilities * (grad_probabilities - delta)).to(DTYPE)
    weights = gl.convert_layout(grads, OPERAND)
    grad_query = warpgroup_mma(
        weights, ring.index(key_slot).reshape([TILE, DIM]), grad_query, is_async=True
    )
    # The last step repeats its own scores, which nobody reads.
    next_slot = gl.where(has_next, (number + 2) % STAGES, key_slot)
    mbarrier.wait(filled.index(next_slot), ((number + 2) // STAGES) & 1, pred=has_next)
    next_scores = warpgroup_mma(
        query,
        ring.index(next_slot).reshape([TILE, DIM]).permute([1, 0]),
        no_scores,
        use_acc=False,
        is_async=True,
    )
    grad_query = warpgroup_mma_wait(1, deps=[grad_query])
    mbarrier.arrive(free.index(key_slot))
    scores = warpgroup_mma_wait(0, deps=[next_scores])
    return scores, grad_query


@gluon.jit
def query_pass_consumer(
    grad_query_desc, grad_query, grad_query_strides, log2_sums, deltas,
    records, offsets, indices, mask_ids, bank, scale, score_scale, num_heads, query_rows,
    queries, grad_outs, ring,
    query_filled, query_free, grad_out_filled, grad_out_free, filled, free,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = ring.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16]
    )
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SCORES, k_width=2)
    number = 0
    turn = 0
    tile_begin = gl.load(offsets + gl.program_id(0))
    tile_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(tile_begin, tile_end):
        record = records + place * RECORD
        batch, head, row, q_begin, q_end, key_shift, kv_begin, kv_end = load_query_tile(record)
        (
            partial_first, num_partial, full_first, full_start,
            num_edges, num_masked, num_tiles, last_edge,
        ) = load_steps_of_row(record)  # fmt: skip
        rows = row + gl.arange(0, TILE, gl.SliceLayout(1, SCORES))
        is_own = (rows >= q_begin) & (rows < q_end)
        terms = (batch * num_heads + head).to(gl.int64) * query_rows
        # Rows of nobody get p = 2^(s - inf) = 0.
        log2_sum = gl.load(log2_sums + terms + rows, mask=is_own, other=float("inf"))
        delta = gl.load(deltas + terms + rows, mask=is_own, other=0.0)
        log2_sum = gl.expand_dims(log2_sum, 1)
        delta = gl.expand_dims(delta, 1)
        query_sum = gl.zeros([TILE, DIM], gl.float32, ACCUMULATOR)
        no_scores = gl.zeros([TILE, TILE], gl.float32, SCORES)
        next_mask = load_mask_of_step(
            0, partial_first, num_partial, full_first, full_start, num_edges, last_edge,
            indices, mask_ids, bank, key_shift, kv_begin, kv_end, no_scores,
        )  # fmt: skip
        query = queries.index(0).reshape([TILE, DIM])
        grad_out = grad_outs.index(0).reshape([TILE, DIM])
        slot = number % STAGES
        mbarrier.wait(query_filled, turn & 1)
        if IN_REGISTERS:
            query = query.load(OPERAND)
        mbarrier.wait(filled.index(slot), (number // STAGES) & 1)
        scores = warpgroup_mma(
            query,
            ring.index(slot).reshape([TILE, DIM]).permute([1, 0]),
            no_scores,
            use_acc=False,
            is_async=True,
        )
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.wait(grad_out_filled, turn & 1)
        if IN_REGISTERS:
            grad_out = grad_out.load(OPERAND)
        for step in range(0, num_masked):
            mask = next_mask
            # The next mask's words are on their way during this step.
            next_mask = load_mask_of_step(
                gl.minimum(step + 1, num_masked - 1),
                partial_first, num_partial, full_first, full_start, num_edges, last_edge,
                indices, mask_ids, bank, key_shift, kv_begin, kv_end, no_scores,
            )  # fmt: skip
            scores, query_sum = take_query_step(
                scores, mask, query_sum, query, grad_out, log2_sum, delta, number,
                step + 1 < num_tiles, score_scale, ring, filled, free, DIM, STAGES,
            )  # fmt: skip
            number += 2
        for step in range(num_masked, num_tiles):
            scores, query_sum = take_query_step(
                scores, None, query_sum, query, grad_out, log2_sum, delta, number,
                step + 1 < num_tiles, score_scale, ring, filled, free, DIM, STAGES,
            )  # fmt: skip
            number += 2
        mbarrier.arrive(query_free)
        store_rows(
            grad_query_desc, grad_query,
            grad_query_strides[0], grad_query_strides[1], grad_query_strides[2],
            (query_sum * scale).to(DTYPE), grad_outs.index(0),
            batch, head, row, q_begin, q_end, query_rows, HEAD_DIM, DIM,
        )  # fmt: skip
        tma.store_wait(0)
        mbarrier.arrive(grad_out_free)
        turn += 1


# One kernel for all lengths and numbers of heads, also where they are 1 or multiples of 16.
@gluon.jit(
    do_not_specialize=["grad_query_strides", "num_heads", "group_size", "query_rows", "key_rows"]
)
def query_pass_kernel(
    query_desc,
    key_desc,
    value_desc,
    grad_out_desc,
    grad_query_desc,
    grad_query,
    grad_query_strides,
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
    STAGES: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Grid: (programs of the schedule,). Writes the rows of dQ that the tiles' sequences own.

    Arguments as of `key_pass_kernel`, but `records` and `offsets` are those of `work.Schedule` and `indices`, `mask_ids` and `bank` of the
    index itself.
    """
    DTYPE: gl.constexpr = query_desc.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(DTYPE, [1, 1, 1, TILE, DIM], query_desc.layout)
    grad_outs = gl.allocate_shared_memory(DTYPE, [1, 1, 1, TILE, DIM], grad_out_desc.layout)
    ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, TILE, DIM], key_desc.layout)
    query_filled = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    query_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    grad_out_filled = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    grad_out_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(query_filled, count=1)
    mbarrier.init(query_free, count=1)
    mbarrier.init(grad_out_filled, count=1)
    mbarrier.init(grad_out_free, count=1)
    for slot in gl.static_range(STAGES + 1):
        mbarrier.init(filled.index(slot), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(free.index(slot), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (query_pass_consumer, (
                grad_query_desc, grad_query, grad_query_strides, log2_sums, deltas,
                records, offsets, indices, mask_ids, bank,
                scale, score_scale, num_heads, query_rows,
                queries, grad_outs, ring,
                query_filled, query_free, grad_out_filled, grad_out_free, filled, free,
                HEAD_DIM, DIM, STAGES, IN_REGISTERS,
            )),
            (query_pass_producer, (
                query_desc, key_desc, value_desc, grad_out_desc,
                records, offsets, indices, group_size, key_rows, queries, grad_outs, ring,
                query_filled, query_free, grad_out_filled, grad_out_free, filled, free,
                DIM, STAGES,
            )),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
