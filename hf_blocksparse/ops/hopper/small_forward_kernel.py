"""Forward kernel for Hopper where blocks are too small for tiles of 128: query tiles of 64 rows, which take two key tiles a step.

Two programs share a multiprocessor, so that one has its products on the tensor cores while the other computes probabilities. Each walks
its list of tiles with two partitions of warps:

- a *producer* of one warp, which has the TMA copy Q and pairs of K or V tiles into shared memory;
- a *consumer* of four warps, which does everything else.

A product of 64 x 128 scores keeps the tensor cores twice as busy as one of 64 x 64 would, which reads as much of Q for half the work. So
a step gathers the next two tiles of a list, wherever they lie: a slot of 128 rows is filled by copies of 64 x 64 squares, whose order in
it is that of a tile of 128 rows.

The entries of a list are those with a mask, then those without, and where their number is odd, one that stands for no tile goes before
them all: steps with a mask come first, the first of them peeled off. The half that stands for nothing repeats its neighbour, masked.

K and V pairs take turns in one ring of `STAGES` slots: K of the first step, then K of each next step and V of the one before it. Barriers
as in `forward_kernel`; the last place of `filled` is the producer's own: V rows outside the sequence are somebody else's and may be NaN,
so it waits for such a copy itself and clears them before the consumer comes. Arithmetic as in `ops/triton/forward.py`.
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

from hf_blocksparse.ops.hopper.compat import reinterpret, tma_load
from hf_blocksparse.ops.hopper.forward_kernel import FLOOR, LN_2, own_sums, update
from hf_blocksparse.ops.hopper.mask_bits import apply_mask, load_mask, side_by_side
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
PAIR = gl.constexpr(128)  # key rows of a step


@gluon.jit
def pair_of(
    step, partial_first, num_partial, full_first, full_start, num_edges, num_tiles, last_edge
):
    """The two entries of a step."""
    place = 2 * step - (num_tiles & 1)
    first = entry_of(
        gl.maximum(place, 0),
        partial_first, num_partial, full_first, full_start, num_edges, last_edge,
    )  # fmt: skip
    second = entry_of(
        place + 1, partial_first, num_partial, full_first, full_start, num_edges, last_edge
    )
    return first, second


@gluon.jit
def load_pair(
    desc, batch, head, first_row, second_row, slot, squares, barrier, PANELS: gl.constexpr
):
    """Has the TMA copy two tiles of rows into a slot: their left columns one below the other, then their right ones."""
    mbarrier.expect(barrier, PANELS * 2 * TILE * TILE * 2)
    for panel in gl.static_range(PANELS):
        square = (slot * PANELS + panel) * 2
        tma_load(desc, [batch, head, first_row, panel * TILE], barrier, squares.index(square))
        tma_load(desc, [batch, head, second_row, panel * TILE], barrier, squares.index(square + 1))


@gluon.jit
def load_keys(
    desc, batch, head, first_row, second_row, number, squares, filled, free,
    PANELS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    slot = number % STAGES
    mbarrier.wait(free.index(slot), ((number // STAGES) & 1) ^ 1)
    load_pair(desc, batch, head, first_row, second_row, slot, squares, filled.index(slot), PANELS)


@gluon.jit
def load_values(
    desc, batch, head, first_row, second_row, begin, end, num_rows, number, num_cut,
    ring, squares, filled, free,
    PANELS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `load_keys`, rows outside `[begin, end)` cleared; returns how many pairs had to be so far."""
    slot = number % STAGES
    is_cut = straddles(first_row, num_rows, begin, end, TILE)
    is_cut = is_cut | straddles(second_row, num_rows, begin, end, TILE)
    mbarrier.wait(free.index(slot), ((number // STAGES) & 1) ^ 1)
    barrier = filled.index(gl.where(is_cut, STAGES, slot))
    load_pair(desc, batch, head, first_row, second_row, slot, squares, barrier, PANELS)
    if is_cut:
        SQUARE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        tiles = reinterpret(ring, ring.dtype, [STAGES * PANELS * 2, TILE, TILE], SQUARE)
        mbarrier.wait(filled.index(STAGES), num_cut & 1)
        for panel in gl.static_range(PANELS):
            square = (slot * PANELS + panel) * 2
            clear_foreign_rows(tiles, square, first_row, begin, end, TILE, TILE)
            clear_foreign_rows(tiles, square + 1, second_row, begin, end, TILE, TILE)
        fence_async_shared()
        mbarrier.arrive(filled.index(slot))
        num_cut += 1
    return num_cut


@gluon.jit
def producer(
    query_desc, key_desc, value_desc, records, offsets, indices, group_size, key_rows,
    queries, ring, query_filled, query_free, filled, free,
    DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PANELS: gl.constexpr = DIM // 64
    squares = reinterpret(
        ring, ring.dtype, [STAGES * PANELS * 2, 1, 1, TILE, TILE], key_desc.layout
    )
    number = 0
    turn = 0
    num_cut = 0
    tile_begin = gl.load(offsets + gl.program_id(0))
    tile_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(tile_begin, tile_end):
        record = records + place * RECORD
        batch, head, query_row, _, _, key_shift, kv_begin, kv_end = load_query_tile(record)
        (
            partial_first, num_partial, full_first, full_start,
            num_edges, num_masked, num_tiles, last_edge,
        ) = load_steps_of_row(record)  # fmt: skip
        num_steps = (num_tiles + 1) // 2
        kv_head = head // group_size
        first, second = pair_of(
            0, partial_first, num_partial, full_first, full_start, num_edges, num_tiles, last_edge
        )
        first_row = gl.load(indices + first) * TILE + key_shift
        second_row = gl.load(indices + second) * TILE + key_shift
        load_keys(
            key_desc, batch, kv_head, first_row, second_row, number, squares, filled, free,
            PANELS, STAGES,
        )  # fmt: skip
        mbarrier.wait(query_free, (turn & 1) ^ 1)
        mbarrier.expect(query_filled, TILE * DIM * 2)
        tma_load(query_desc, [batch, head, query_row, 0], query_filled, queries.index(0))
        turn += 1
        number += 1
        # The numbers of the next tiles are on their way while the last ones' slots are waited for.
        first, second = pair_of(
            gl.minimum(1, num_steps - 1),
            partial_first, num_partial, full_first, full_start, num_edges, num_tiles, last_edge,
        )  # fmt: skip
        next_first = gl.load(indices + first)
        next_second = gl.load(indices + second)
        for step in range(1, num_steps):
            last_first_row = first_row
            last_second_row = second_row
            first_row = next_first * TILE + key_shift
            second_row = next_second * TILE + key_shift
            first, second = pair_of(
                gl.minimum(step + 1, num_steps - 1),
                partial_first, num_partial, full_first, full_start, num_edges, num_tiles, last_edge,
            )  # fmt: skip
            next_first = gl.load(indices + first)
            next_second = gl.load(indices + second)
            load_keys(
                key_desc, batch, kv_head, first_row, second_row, number, squares, filled, free,
                PANELS, STAGES,
            )  # fmt: skip
            num_cut = load_values(
                value_desc, batch, kv_head, last_first_row, last_second_row,
                kv_begin, kv_end, key_rows, number + 1, num_cut, ring, squares, filled, free,
                PANELS, STAGES,
            )  # fmt: skip
            number += 2
        num_cut = load_values(
            value_desc, batch, kv_head, first_row, second_row,
            kv_begin, kv_end, key_rows, number, num_cut, ring, squares, filled, free,
            PANELS, STAGES,
        )  # fmt: skip
        number += 1


@gluon.jit
def load_mask_of_pair(
    step, partial_first, num_partial, full_first, full_start, num_edges, num_tiles, last_edge,
    indices, mask_ids, bank, key_shift, kv_begin, kv_end, scores,
):  # fmt: skip
    first, second = pair_of(
        step, partial_first, num_partial, full_first, full_start, num_edges, num_tiles, last_edge
    )
    first_row = gl.load(indices + first) * TILE + key_shift
    second_row = gl.load(indices + second) * TILE + key_shift
    # The half that stands for no tile ends where it begins.
    first_end = gl.where(2 * step < (num_tiles & 1), kv_begin, kv_end)
    return load_mask(
        bank,
        side_by_side(gl.load(mask_ids + first), gl.load(mask_ids + second), scores),
        0,
        side_by_side(kv_begin - first_row, kv_begin - second_row, scores),
        side_by_side(first_end - first_row, kv_end - second_row, scores),
        scores,
        TILE,
    )


@gluon.jit
def consumer(
    out_desc, out, out_strides, lse, records, offsets, indices, mask_ids, bank,
    score_scale, num_heads, query_rows,
    queries, ring, query_filled, query_free, filled, free,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, Q_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = ring.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PAIR, 16]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16]
    )
    PROBABILITIES: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    number = 0
    turn = 0
    tile_begin = gl.load(offsets + gl.program_id(0))
    tile_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(tile_begin, tile_end):
        record = records + place * RECORD
        batch, head, query_row, q_begin, q_end, key_shift, kv_begin, kv_end = load_query_tile(
            record
        )
        (
            partial_first, num_partial, full_first, full_start,
            num_edges, num_masked, num_tiles, last_edge,
        ) = load_steps_of_row(record)  # fmt: skip
        num_steps = (num_tiles + 1) // 2
        num_masked = (num_masked + (num_tiles & 1) + 1) // 2
        accumulator = gl.zeros([TILE, DIM], gl.float32, OUT)
        no_scores = gl.zeros([TILE, PAIR], gl.float32, SCORES)
        query_buffer = queries.index(0).reshape([TILE, DIM])
        slot = number % STAGES

        # The first step: there is no accumulator yet, and no maximum.
        mbarrier.wait(query_filled, turn & 1)
        query = query_buffer
        if Q_IN_REGISTERS:
            query = query_buffer.load(
                gl.DotOperandLayout(operand_index=0, parent=SCORES, k_width=2)
            )
        mbarrier.wait(filled.index(slot), (number // STAGES) & 1)
        scores = warpgroup_mma(
            query, ring.index(slot).permute([1, 0]), no_scores, use_acc=False, is_async=True
        )
        mask = load_mask_of_pair(
            0, partial_first, num_partial, full_first, full_start, num_edges, num_tiles, last_edge,
            indices, mask_ids, bank, key_shift, kv_begin, kv_end, no_scores,
        )  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(free.index(slot))
        if num_masked > 0:
            scores = apply_mask(scores, mask)
        running_max = gl.maximum(gl.max(scores, 1) * score_scale, FLOOR)
        probabilities = gl.exp2(scores * score_scale - gl.expand_dims(running_max, 1))
        running_sums = own_sums(probabilities)
        weights = gl.convert_layout(probabilities.to(DTYPE), PROBABILITIES)
        number += 1

        for step in range(1, num_masked):
            slot = number % STAGES
            value_slot = (number + 1) % STAGES
            mbarrier.wait(filled.index(slot), (number // STAGES) & 1)
            scores = warpgroup_mma(
                query, ring.index(slot).permute([1, 0]), no_scores, use_acc=False, is_async=True
            )
            mbarrier.wait(filled.index(value_slot), ((number + 1) // STAGES) & 1)
            accumulator = warpgroup_mma(weights, ring.index(value_slot), accumulator, is_async=True)
            mask = load_mask_of_pair(
                step,
                partial_first, num_partial, full_first, full_start, num_edges, num_tiles, last_edge,
                indices, mask_ids, bank, key_shift, kv_begin, kv_end, no_scores,
            )  # fmt: skip
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(free.index(slot))
            scores = apply_mask(scores, mask)
            probabilities, shrink, running_max, running_sums = update(
                scores, running_max, running_sums, score_scale, None
            )
            weights = gl.convert_layout(probabilities.to(DTYPE), PROBABILITIES)
            accumulator, weights, running_max, running_sums, shrink = warpgroup_mma_wait(
                0, deps=[accumulator, weights, running_max, running_sums, shrink]
            )
            mbarrier.arrive(free.index(value_slot))
            accumulator = accumulator * gl.expand_dims(gl.convert_layout(shrink, OUT_ROWS), 1)
            number += 2

        # The same without a mask. Where no step had one, the first one was peeled off nevertheless.
        for _ in range(gl.maximum(num_masked, 1), num_steps):
            slot = number % STAGES
            value_slot = (number + 1) % STAGES
            mbarrier.wait(filled.index(slot), (number // STAGES) & 1)
            scores = warpgroup_mma(
                query, ring.index(slot).permute([1, 0]), no_scores, use_acc=False, is_async=True
            )
            mbarrier.wait(filled.index(value_slot), ((number + 1) // STAGES) & 1)
            accumulator = warpgroup_mma(weights, ring.index(value_slot), accumulator, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(free.index(slot))
            probabilities, shrink, running_max, running_sums = update(
                scores, running_max, running_sums, score_scale, None
            )
            weights = gl.convert_layout(probabilities.to(DTYPE), PROBABILITIES)
            accumulator, weights, running_max, running_sums, shrink = warpgroup_mma_wait(
                0, deps=[accumulator, weights, running_max, running_sums, shrink]
            )
            mbarrier.arrive(free.index(value_slot))
            accumulator = accumulator * gl.expand_dims(gl.convert_layout(shrink, OUT_ROWS), 1)
            number += 2

        value_slot = number % STAGES
        mbarrier.wait(filled.index(value_slot), (number // STAGES) & 1)
        accumulator = warpgroup_mma(weights, ring.index(value_slot), accumulator, is_async=True)
        number += 1
        turn += 1
        total = gl.convert_layout(gl.sum(running_sums, 1), ROWS)
        is_empty = total == 0.0
        divisor = gl.where(is_empty, 1.0, total)
        row_lse = (running_max + gl.log2(divisor)) * LN_2
        rows = query_row + gl.arange(0, TILE, ROWS)
        gl.store(
            lse + (batch * num_heads + head).to(gl.int64) * query_rows + rows,
            gl.where(is_empty, -float("inf"), row_lse),
            mask=(rows >= q_begin) & (rows < q_end),
        )
        factor = gl.convert_layout(1.0 / divisor, OUT_ROWS)
        accumulator = warpgroup_mma_wait(0, deps=[accumulator])
        mbarrier.arrive(free.index(value_slot))
        # The output leaves through the query's place.
        store_rows(
            out_desc, out, out_strides[0], out_strides[1], out_strides[2],
            (accumulator * gl.expand_dims(factor, 1)).to(DTYPE), queries.index(0),
            batch, head, query_row, q_begin, q_end, query_rows, HEAD_DIM, DIM,
        )  # fmt: skip
        tma.store_wait(0)
        mbarrier.arrive(query_free)


# One kernel for all lengths and numbers of heads, also where they are 1 or multiples of 16.
@gluon.jit(do_not_specialize=["out_strides", "num_heads", "group_size", "query_rows", "key_rows"])
def small_forward_kernel(
    query_desc,
    key_desc,
    value_desc,
    out_desc,
    out,
    out_strides,
    lse,
    records,
    offsets,
    indices,
    mask_ids,
    bank,
    score_scale,
    num_heads,
    group_size,
    query_rows,
    key_rows,
    HEAD_DIM: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Grid: (programs of the schedule,). Writes the rows of `out` and `lse` that the tiles' sequences own.

    `*_desc`: tensor descriptors of [batch, heads, rows, HEAD_DIM], in blocks of 64 rows and DIM columns (query, out) or 64 (key, value);
    `out`, `out_strides`: the same output by pointer; `lse`: [batch, heads, rows]; `records`, `offsets`: `work.Schedule`;
    `indices`, `mask_ids`, `bank`: of the block index; `query_rows`, `key_rows`: of the tensors.
    """
    DTYPE: gl.constexpr = query_desc.dtype
    queries = gl.allocate_shared_memory(DTYPE, [1, 1, 1, TILE, DIM], query_desc.layout)
    ring = gl.allocate_shared_memory(DTYPE, [STAGES, PAIR, DIM], gl.NVMMASharedLayout(128, 16, 2))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    query_filled = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    query_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(query_filled, count=1)
    mbarrier.init(query_free, count=1)
    for slot in gl.static_range(STAGES + 1):
        mbarrier.init(filled.index(slot), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(free.index(slot), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (
                out_desc, out, out_strides, lse, records, offsets, indices, mask_ids, bank,
                score_scale, num_heads, query_rows,
                queries, ring, query_filled, query_free, filled, free,
                HEAD_DIM, DIM, STAGES, Q_IN_REGISTERS,
            )),
            (producer, (
                query_desc, key_desc, value_desc, records, offsets, indices, group_size, key_rows,
                queries, ring, query_filled, query_free, filled, free,
                DIM, STAGES,
            )),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
