"""Forward kernel for Hopper where blocks are too small for tiles of 128: query tiles of 64 rows, which gather 128 keys a step.

Two programs share a multiprocessor, so that one has its products on the tensor cores while the other computes probabilities. Each walks
its list of tiles with two partitions of warps:

- a *producer* of one warp, which has the TMA copy Q and the parts of K or V that a step takes into shared memory;
- a *consumer* of four warps, which does everything else.

A product of 64 x 128 scores keeps the tensor cores twice as busy as one of 64 x 64 would, which reads as much of Q for half the work. So
a step gathers the next two tiles of a list, wherever they lie, or the next four strips of 32 keys: a slot of 128 rows is filled by
copies of so many rows and 64 columns, whose order in it is that of a tile of 128 rows.

The entries of a list are those with a mask, then those without, and where they do not fill the steps, some that stand for no tile go before
them all: steps with a mask come first, the first of them peeled off. Parts that stand for nothing repeat their neighbour, masked.

Nearly every strip has a mask, but one that keeps or drops all of it for each block of queries. The producer looks that up
(`work.rows_kept`) and notes it in shared memory beside the keys, a bit for the 16 rows of each of the consumer's warps, so that a step
costs the consumer one instruction per score instead of several; masks of other kinds are read where a strip has one. So strips have one
loop for all steps.

K and V take turns in one ring of `STAGES` slots: K of the first step, then K of each next step and V of the one before it. Barriers
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

from hf_blocksparse.ops.hopper import work
from hf_blocksparse.ops.hopper.compat import partition_barrier, reinterpret, tma_load
from hf_blocksparse.ops.hopper.forward_kernel import FLOOR, LN_2, own_sums, update
from hf_blocksparse.ops.hopper.mask_bits import apply_mask, for_threads, load_words, word_numbers
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
STEP = gl.constexpr(128)  # key rows of a step
GROUP = gl.constexpr(work.GROUP)  # query rows of one warp


@gluon.jit
def entries_of(step, parts, steps_of_row, PARTS: gl.constexpr):
    """The entries of the parts of a step, whose numbers `parts` are, and which of them stand for a tile."""
    (
        partial_first, num_partial, full_first, full_start,
        num_edges, _, num_tiles, last_edge,
    ) = steps_of_row  # fmt: skip
    place = PARTS * step - (-num_tiles & (PARTS - 1)) + parts
    entries = entry_of(
        gl.maximum(place, 0),
        partial_first, num_partial, full_first, full_start, num_edges, last_edge,
    )  # fmt: skip
    return entries, place >= 0


@gluon.jit
def number_at(numbers, place: gl.constexpr):
    """One of some numbers that every thread holds all of."""
    places = gl.arange(0, numbers.shape[0], numbers.type.layout)
    return gl.sum(gl.where(places == place, numbers, 0), 0)


@gluon.jit
def load_parts(
    desc, batch, head, rows, slot, squares, barrier,
    PANELS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Has the TMA copy parts of rows into a slot: the left columns of all of them one below the other, then their right ones."""
    mbarrier.expect(barrier, PANELS * STEP * 64 * 2)
    for part in gl.static_range(PARTS):
        row = number_at(rows, part)
        for panel in gl.static_range(PANELS):
            square = (slot * PANELS + panel) * PARTS + part
            tma_load(desc, [batch, head, row, panel * 64], barrier, squares.index(square))


@gluon.jit
def note_strips(notes, slot, rows, masks, are_tiles, rows_kept, kv_begin, kv_end):
    """Notes for a step's strips: of each in turn four bits that say which groups of query rows keep it, and whether one of the strips needs
    its mask.

    `rows`: of the strips' first keys; `masks`: their numbers, -1 for all of a strip; `rows_kept`: see `work.rows_kept`.
    """
    PARTS: gl.constexpr = rows.shape[0]
    GROUPS: gl.constexpr = TILE // GROUP
    ALL: gl.constexpr = (1 << GROUPS) - 1
    kept = gl.load(rows_kept + masks, mask=masks >= 0, other=ALL)
    is_cut = (rows < kv_begin) | (rows + STEP // PARTS > kv_end)
    needs_mask = are_tiles & (is_cut | (kept > ALL))
    parts = gl.arange(0, PARTS, rows.type.layout)
    bits = gl.where(are_tiles, kept & ALL, 0) << (GROUPS * parts)
    places = gl.arange(0, 2, gl.BlockedLayout([2], [32], [1], [0]))
    notes.index(slot).store(
        gl.where(places == 0, gl.sum(bits, 0), gl.max(needs_mask.to(gl.int32), 0))
    )
    partition_barrier()


@gluon.jit
def load_keys(
    desc, batch, head, rows, masks, are_tiles, rows_kept, kv_begin, kv_end, number, squares, notes, filled, free,
    PANELS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    slot = number % STAGES
    mbarrier.wait(free.index(slot), ((number // STAGES) & 1) ^ 1)
    if PARTS > 2:
        note_strips(notes, slot, rows, masks, are_tiles, rows_kept, kv_begin, kv_end)
    load_parts(desc, batch, head, rows, slot, squares, filled.index(slot), PANELS, PARTS)


@gluon.jit
def load_values(
    desc, batch, head, rows, begin, end, num_rows, number, num_cut, ring, squares, filled, free,
    PANELS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `load_keys`, rows outside `[begin, end)` cleared; returns how many steps had to be so far."""
    STRIP: gl.constexpr = STEP // PARTS
    slot = number % STAGES
    is_cut = gl.max(straddles(rows, num_rows, begin, end, STRIP).to(gl.int32), 0) > 0
    mbarrier.wait(free.index(slot), ((number // STAGES) & 1) ^ 1)
    barrier = filled.index(gl.where(is_cut, STAGES, slot))
    load_parts(desc, batch, head, rows, slot, squares, barrier, PANELS, PARTS)
    if is_cut:
        SQUARE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        tiles = reinterpret(ring, ring.dtype, [STAGES * PANELS * PARTS, STRIP, 64], SQUARE)
        mbarrier.wait(filled.index(STAGES), num_cut & 1)
        for part in gl.static_range(PARTS):
            row = number_at(rows, part)
            for panel in gl.static_range(PANELS):
                square = (slot * PANELS + panel) * PARTS + part
                clear_foreign_rows(tiles, square, row, begin, end, STRIP, 64)
        fence_async_shared()
        mbarrier.arrive(filled.index(slot))
        num_cut += 1
    return num_cut


@gluon.jit
def producer(
    query_desc, key_desc, value_desc, records, offsets, indices, mask_ids, rows_kept, group_size, key_rows,
    queries, ring, notes, query_filled, query_free, filled, free,
    DIM: gl.constexpr, STRIP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PANELS: gl.constexpr = DIM // 64
    PARTS: gl.constexpr = STEP // STRIP
    LAYOUT: gl.constexpr = gl.BlockedLayout([PARTS], [32], [1], [0])
    parts = gl.arange(0, PARTS, LAYOUT)
    squares = reinterpret(
        ring, ring.dtype, [STAGES * PANELS * PARTS, 1, 1, STRIP, 64], key_desc.layout
    )
    number = 0
    turn = 0
    num_cut = 0
    tile_begin = gl.load(offsets + gl.program_id(0))
    tile_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(tile_begin, tile_end):
        record = records + place * RECORD
        batch, head, query_row, _, _, key_shift, kv_begin, kv_end = load_query_tile(record)
        steps_of_row = load_steps_of_row(record)
        _, _, _, _, _, _, num_tiles, _ = steps_of_row
        num_steps = (num_tiles + PARTS - 1) // PARTS
        kv_head = head // group_size
        entries, are_tiles = entries_of(0, parts, steps_of_row, PARTS)
        rows = gl.load(indices + entries) * STRIP + key_shift
        load_keys(
            key_desc, batch, kv_head, rows, gl.load(mask_ids + entries), are_tiles, rows_kept, kv_begin, kv_end,
            number, squares, notes, filled, free, PANELS, PARTS, STAGES,
        )  # fmt: skip
        mbarrier.wait(query_free, (turn & 1) ^ 1)
        mbarrier.expect(query_filled, TILE * DIM * 2)
        tma_load(query_desc, [batch, head, query_row, 0], query_filled, queries.index(0))
        turn += 1
        number += 1
        # The numbers of the next tiles are on their way while the last ones' slots are waited for.
        entries, are_tiles = entries_of(gl.minimum(1, num_steps - 1), parts, steps_of_row, PARTS)
        next_tiles = gl.load(indices + entries)
        next_masks = gl.load(mask_ids + entries)
        for step in range(1, num_steps):
            last_rows = rows
            rows = next_tiles * STRIP + key_shift
            masks = next_masks
            entries, are_tiles = entries_of(
                gl.minimum(step + 1, num_steps - 1), parts, steps_of_row, PARTS
            )
            next_tiles = gl.load(indices + entries)
            next_masks = gl.load(mask_ids + entries)
            load_keys(
                key_desc, batch, kv_head, rows, masks, parts >= 0, rows_kept, kv_begin, kv_end,
                number, squares, notes, filled, free, PANELS, PARTS, STAGES,
            )  # fmt: skip
            num_cut = load_values(
                value_desc, batch, kv_head, last_rows, kv_begin, kv_end, key_rows,
                number + 1, num_cut, ring, squares, filled, free, PANELS, PARTS, STAGES,
            )  # fmt: skip
            number += 2
        num_cut = load_values(
            value_desc, batch, kv_head, rows, kv_begin, kv_end, key_rows,
            number, num_cut, ring, squares, filled, free, PANELS, PARTS, STAGES,
        )  # fmt: skip
        number += 1


@gluon.jit
def load_mask_of_step(
    step, steps_of_row, indices, mask_ids, bank, key_shift, kv_begin, kv_end, scores,
    STRIP: gl.constexpr,
):  # fmt: skip
    WORDS: gl.constexpr = STRIP // 32
    numbers = word_numbers(scores)
    entries, are_tiles = entries_of(step, numbers // WORDS, steps_of_row, STEP // STRIP)
    rows = gl.load(indices + entries) * STRIP + key_shift
    words = load_words(
        bank, gl.load(mask_ids + entries), 0, numbers % WORDS,
        kv_begin - rows, gl.where(are_tiles, kv_end, kv_begin) - rows, scores, TILE, WORDS,
    )  # fmt: skip
    return for_threads(words, scores)


@gluon.jit
def mask_strips(
    scores, note, step, steps_of_row, indices, mask_ids, bank, key_shift, kv_begin, kv_end,
    STRIP: gl.constexpr,
):  # fmt: skip
    """`scores` of what a step's strips keep, -inf elsewhere; `note`: of `note_strips`."""
    if number_at(note, 1) > 0:
        mask = load_mask_of_step(
            step, steps_of_row, indices, mask_ids, bank, key_shift, kv_begin, kv_end, scores, STRIP
        )
        scores = apply_mask(scores, mask)
    ROWS: gl.constexpr = scores.shape[0]
    PARTS: gl.constexpr = STEP // STRIP
    parts = gl.reshape(scores, [ROWS, PARTS, STRIP])
    LAYOUT: gl.constexpr = gl.SliceLayout(2, parts.type.layout)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    numbers = gl.arange(0, PARTS, gl.SliceLayout(0, LAYOUT))
    of_rows = number_at(note, 0) >> (rows // GROUP)
    bits = 1 << (TILE // GROUP * numbers)
    is_kept = (gl.expand_dims(of_rows, 1) & gl.expand_dims(bits, 0)) != 0
    parts = gl.where(gl.expand_dims(is_kept, 2), parts, -float("inf"))
    return gl.convert_layout(gl.reshape(parts, [ROWS, STEP]), scores.type.layout)


@gluon.jit
def consumer(
    out_desc, out, out_strides, lse, records, offsets, indices, mask_ids, bank,
    score_scale, num_heads, query_rows,
    queries, ring, notes, query_filled, query_free, filled, free,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, STRIP: gl.constexpr, STAGES: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = ring.dtype
    PARTS: gl.constexpr = STEP // STRIP
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP, 16]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16]
    )
    PROBABILITIES: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    NOTE: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    number = 0
    turn = 0
    tile_begin = gl.load(offsets + gl.program_id(0))
    tile_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(tile_begin, tile_end):
        record = records + place * RECORD
        batch, head, query_row, q_begin, q_end, key_shift, kv_begin, kv_end = load_query_tile(
            record
        )
        steps_of_row = load_steps_of_row(record)
        _, _, _, _, _, num_masked, num_tiles, _ = steps_of_row
        num_steps = (num_tiles + PARTS - 1) // PARTS
        num_masked = (num_masked + (-num_tiles & (PARTS - 1)) + PARTS - 1) // PARTS
        accumulator = gl.zeros([TILE, DIM], gl.float32, OUT)
        no_scores = gl.zeros([TILE, STEP], gl.float32, SCORES)
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
        if STRIP == TILE:
            mask = load_mask_of_step(
                0, steps_of_row,
                indices, mask_ids, bank, key_shift, kv_begin, kv_end, no_scores, STRIP,
            )  # fmt: skip
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(free.index(slot))
            if num_masked > 0:
                scores = apply_mask(scores, mask)
        else:
            note = notes.index(slot).load(NOTE)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(free.index(slot))
            scores = mask_strips(
                scores, note, 0, steps_of_row,
                indices, mask_ids, bank, key_shift, kv_begin, kv_end, STRIP,
            )  # fmt: skip
        running_max = gl.maximum(gl.max(scores, 1) * score_scale, FLOOR)
        probabilities = gl.exp2(scores * score_scale - gl.expand_dims(running_max, 1))
        running_sums = own_sums(probabilities)
        weights = gl.convert_layout(probabilities.to(DTYPE), PROBABILITIES)
        number += 1

        if STRIP == TILE:
            for step in range(1, num_masked):
                slot = number % STAGES
                value_slot = (number + 1) % STAGES
                mbarrier.wait(filled.index(slot), (number // STAGES) & 1)
                scores = warpgroup_mma(
                    query, ring.index(slot).permute([1, 0]), no_scores, use_acc=False, is_async=True
                )
                mbarrier.wait(filled.index(value_slot), ((number + 1) // STAGES) & 1)
                accumulator = warpgroup_mma(
                    weights, ring.index(value_slot), accumulator, is_async=True
                )
                mask = load_mask_of_step(
                    step, steps_of_row,
                    indices, mask_ids, bank, key_shift, kv_begin, kv_end, no_scores, STRIP,
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

        # The same without a mask. Where no step had one, the first one was peeled off nevertheless. Steps of strips are all here.
        first_full = 1
        if STRIP == TILE:
            first_full = gl.maximum(num_masked, 1)
        for step in range(first_full, num_steps):
            slot = number % STAGES
            value_slot = (number + 1) % STAGES
            mbarrier.wait(filled.index(slot), (number // STAGES) & 1)
            scores = warpgroup_mma(
                query, ring.index(slot).permute([1, 0]), no_scores, use_acc=False, is_async=True
            )
            mbarrier.wait(filled.index(value_slot), ((number + 1) // STAGES) & 1)
            accumulator = warpgroup_mma(weights, ring.index(value_slot), accumulator, is_async=True)
            if STRIP < TILE:
                note = notes.index(slot).load(NOTE)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(free.index(slot))
            if STRIP < TILE:
                scores = mask_strips(
                    scores, note, step, steps_of_row,
                    indices, mask_ids, bank, key_shift, kv_begin, kv_end, STRIP,
                )  # fmt: skip
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
    rows_kept,
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
    STRIP: gl.constexpr,
    STAGES: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Grid: (programs of the schedule,). Writes the rows of `out` and `lse` that the tiles' sequences own.

    `*_desc`: tensor descriptors of [batch, heads, rows, HEAD_DIM], in blocks of 64 rows and DIM columns (query, out) or of STRIP rows and
    64 columns (key, value); `out`, `out_strides`: the same output by pointer; `rows_kept`: of `work`, read where STRIP < 64; `lse`:
    [batch, heads, rows]; `records`, `offsets`: `work.Schedule`; `indices`, `mask_ids`, `bank`: of the block index; `query_rows`,
    `key_rows`: of the tensors.
    """
    DTYPE: gl.constexpr = query_desc.dtype
    queries = gl.allocate_shared_memory(DTYPE, [1, 1, 1, TILE, DIM], query_desc.layout)
    ring = gl.allocate_shared_memory(DTYPE, [STAGES, STEP, DIM], gl.NVMMASharedLayout(128, 16, 2))
    notes = gl.allocate_shared_memory(
        gl.int32, [STAGES, 2], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
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
                queries, ring, notes, query_filled, query_free, filled, free,
                HEAD_DIM, DIM, STRIP, STAGES, Q_IN_REGISTERS,
            )),
            (producer, (
                query_desc, key_desc, value_desc, records, offsets, indices, mask_ids, rows_kept,
                group_size, key_rows,
                queries, ring, notes, query_filled, query_free, filled, free,
                DIM, STRIP, STAGES,
            )),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
