"""Forward kernel for Hopper: output and log-sum-exp of query tiles of 128 rows.

Three partitions of warps share one program, one of which runs on each multiprocessor and walks its list of tiles:

- a *producer* of one warp, which has the tensor memory accelerator (TMA) copy Q, K and V tiles into shared memory;
- two *consumers* of four warps, which own 64 query rows each and do everything else.

The producer goes through exactly the steps that the consumers go through. K and V tiles go through rings of `STAGES` slots with two
barriers each: *filled* (by the producer's bytes) and *free* (by both consumers). Step `n` of a program uses slot `n % STAGES`; a wait
for use `n // STAGES` of a slot names that number's parity. Q has two slots per consumer; its output leaves through the slot its query came
in, which is therefore free when the next tile has begun and the copy has been read out.

A consumer starts the product of the next scores together with that of the last probabilities, and takes turns with the other one:
while one has its products on the tensor cores, the other computes probabilities. The compiler would wait for the product of the last
probabilities before it computes the next ones; with `OVERLAPS_VALUES` it comes to a barrier in between, a wait that is over at once, past
which it moves neither.

The steps of a tile are those with a mask, the first of them peeled off, then those without. A mask has a word of bits per query and 32
keys, -1 for a full tile at an end of the sequence; keys outside the sequence are cleared from the words. Such keys' values are somebody
else's and may be NaN, so they are cleared in shared memory as well. Arithmetic as in `ops/triton/forward.py`.
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

from hf_blocksparse.ops.hopper.compat import (
    pair_barrier_arrive,
    pair_barrier_sync,
    partition_barrier,
    tma_load,
)
from hf_blocksparse.ops.hopper.mask_bits import apply_mask, load_mask
from hf_blocksparse.ops.hopper.tiles import (
    HALF,
    RECORD,
    load_query_tile,
    load_steps_of_row,
    masked_entry,
    store_rows,
)

TILE = gl.constexpr(128)
Q_SLOTS = gl.constexpr(2)
FLOOR = gl.constexpr(
    -3.0e38
)  # of the running maximum: rows that have met no key never see inf - inf
LN_2 = gl.constexpr(0.6931471805599453)


def some_by_polynomial(count: int) -> str:
    """Instructions for `2^x` of eight numbers `x <= 0`, `count` of them by a polynomial on the units that multiply and add.

    The units for `2^x` compute 16 numbers a clock, which at head size 64 takes as long as the products. With `n = round(x)`, which adding
    and taking away 1.5 * 2^23 gives, `2^x = 2^n * 2^(x - n)`; `n` is added to the exponent's bits, and the polynomial on [-1/2, 1/2] is the
    one of degree 4 with the least relative error, 2.7e-6 ("FlashAttention-4" does the same). Below -126 the result is 2^-126.
    """
    lines = [".reg .f32 x, n, p; .reg .b32 m, q;"]
    for number in range(8):
        result, given = f"${number}", f"${number + 8}"
        if number % 2 or number >= 2 * count:
            lines.append(f"ex2.approx.ftz.f32 {result}, {given};")
            continue
        lines += [
            f"max.ftz.f32 x, {given}, 0fC2FC0000;",
            "add.rn.ftz.f32 n, x, 0f4B400000;",
            "sub.rn.ftz.f32 p, n, 0f4B400000;",
            "sub.rn.ftz.f32 x, x, p;",
            "fma.rn.ftz.f32 p, x, 0f3C1CCBEB, 0f3D650A20;",
            "fma.rn.ftz.f32 p, p, x, 0f3E76036D;",
            "fma.rn.ftz.f32 p, p, x, 0f3F31706E;",
            "fma.rn.ftz.f32 p, p, x, 0f3F7FFFF4;",
            "mov.b32 m, n;",
            "mov.b32 q, p;",
            "shl.b32 m, m, 23;",
            "add.s32 q, q, m;",
            f"mov.b32 {result}, q;",
        ]
    return "{" + " ".join(lines) + "}"


@gluon.jit
def load_key_value(
    key_desc, value_desc, batch, head, row, number, keys, values,
    key_filled, key_free, value_filled, value_free,
    DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Has the TMA fill the slots of step `number` of the program."""
    slot = number % STAGES
    parity = ((number // STAGES) & 1) ^ 1
    mbarrier.wait(key_free.index(slot), parity)
    mbarrier.expect(key_filled.index(slot), TILE * DIM * 2)
    tma_load(key_desc, [batch, head, row, 0], key_filled.index(slot), keys.index(slot))
    mbarrier.wait(value_free.index(slot), parity)
    mbarrier.expect(value_filled.index(slot), TILE * DIM * 2)
    tma_load(value_desc, [batch, head, row, 0], value_filled.index(slot), values.index(slot))


@gluon.jit
def producer(
    query_desc, key_desc, value_desc, records, offsets, indices, group_size,
    queries, keys, values,
    query_filled, query_free, key_filled, key_free, value_filled, value_free,
    DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    number = 0
    turn = 0
    tile_begin = gl.load(offsets + gl.program_id(0))
    tile_end = gl.load(offsets + gl.program_id(0) + 1)
    for place in range(tile_begin, tile_end):
        record = records + place * RECORD
        batch, head, query_row, _, _, key_shift, _, _ = load_query_tile(record)
        tile = gl.load(record + 11)
        (
            partial_first, num_partial, full_first, full_start,
            num_edges, num_masked, num_tiles, full_last,
        ) = load_steps_of_row(record)  # fmt: skip
        for half in gl.static_range(2):
            slot = (turn % Q_SLOTS) * 2 + half
            mbarrier.wait(query_free.index(slot), ((turn // Q_SLOTS) & 1) ^ 1)
            mbarrier.expect(query_filled.index(slot), HALF * DIM * 2)
            tma_load(
                query_desc,
                [batch, head, query_row + half * HALF, 0],
                query_filled.index(slot),
                queries.index(slot),
            )
        turn += 1
        kv_head = head // group_size
        # The number of the next tile is on its way while the last one's slots are waited for.
        for step in range(1, num_masked + 1):
            entry = masked_entry(
                step, partial_first, num_partial, full_first, full_start, full_last
            )
            entry = gl.where(step < num_masked, entry, full_first)
            next_tile = gl.load(
                indices + entry, mask=(step < num_masked) | (full_first < full_last), other=0
            )
            load_key_value(
                key_desc, value_desc, batch, kv_head, tile * TILE + key_shift,
                number, keys, values, key_filled, key_free, value_filled, value_free, DIM, STAGES,
            )  # fmt: skip
            tile = next_tile
            number += 1
        for entry in range(full_first, full_last):
            next_tile = gl.load(indices + gl.minimum(entry + 1, full_last - 1))
            load_key_value(
                key_desc, value_desc, batch, kv_head, tile * TILE + key_shift,
                number, keys, values, key_filled, key_free, value_filled, value_free, DIM, STAGES,
            )  # fmt: skip
            tile = next_tile
            number += 1


@gluon.jit
def own_sums(probabilities):
    """Sums of each row over a thread's own columns: [rows, 128] -> [rows, 4], a column per thread that shares the row."""
    ROWS: gl.constexpr = probabilities.shape[0]
    COLUMNS: gl.constexpr = probabilities.shape[1]
    return gl.sum(gl.sum(gl.reshape(probabilities, [ROWS, COLUMNS // 8, 4, 2]), 3), 1)


@gluon.jit
def exp2(x, POLYNOMIALS: gl.constexpr):
    """`2^x` for `x <= 0`; with `POLYNOMIALS`, of `some_by_polynomial`, at least 2^-126."""
    if POLYNOMIALS is None:
        return gl.exp2(x)
    else:
        return gl.inline_asm_elementwise(
            POLYNOMIALS, "=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,f,f,f,f", [x],
            dtype=gl.float32, is_pure=True, pack=8,
        )  # fmt: skip


@gluon.jit
def update(scores, running_max, running_sums, score_scale, POLYNOMIALS: gl.constexpr):
    """Probabilities, what earlier ones shrink by, and the next maximum and sums."""
    new_max = gl.maximum(running_max, gl.max(scores, 1) * score_scale)
    probabilities = exp2(scores * score_scale - gl.expand_dims(new_max, 1), POLYNOMIALS)
    shrink = gl.exp2(running_max - new_max)
    sums = own_sums(probabilities)
    shrink_sums = gl.convert_layout(shrink, gl.SliceLayout(1, sums.type.layout))
    return probabilities, shrink, new_max, running_sums * gl.expand_dims(shrink_sums, 1) + sums


@gluon.jit
def clear_foreign_values(
    values, filled, parity, key_row, key_rows, kv_begin, kv_end, CONSUMER: gl.constexpr
):
    """Zeros the rows of a value tile that exist and lie outside the sequence. Each consumer does one half of them."""
    if (kv_begin > gl.maximum(key_row, 0)) | (kv_end < gl.minimum(key_row + TILE, key_rows)):
        ROWS: gl.constexpr = 32
        DIM: gl.constexpr = values.shape[1]
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        mbarrier.wait(filled, parity)
        for part in gl.static_range(HALF // ROWS):
            place = values.slice(CONSUMER * HALF + part * ROWS, ROWS)
            row = key_row + CONSUMER * HALF + part * ROWS + rows
            is_own = gl.expand_dims((row >= kv_begin) & (row < kv_end), 1)
            tile = place.load(LAYOUT)
            place.store(gl.where(is_own, tile, gl.zeros_like(tile)))
        fence_async_shared()
        partition_barrier()
        pair_barrier_sync("11")


@gluon.jit
def consumer(
    CONSUMER: gl.constexpr,
    out_desc, out, out_batch_stride, out_head_stride, out_row_stride, lse,
    records, offsets, indices, mask_ids, bank,
    score_scale, num_heads, query_rows, key_rows,
    queries, keys, values,
    query_filled, query_free, key_filled, key_free, value_filled, value_free,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, OVERLAPS_VALUES: gl.constexpr, POLYNOMIALS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = out_desc.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16]
    )
    PROBABILITIES: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    MY_TURN: gl.constexpr = "9" if CONSUMER == 0 else "10"
    OTHERS_TURN: gl.constexpr = "10" if CONSUMER == 0 else "9"
    number = 0
    turn = 0
    tile_begin = gl.load(offsets + gl.program_id(0))
    tile_end = gl.load(offsets + gl.program_id(0) + 1)
    if CONSUMER == 1:
        pair_barrier_arrive(OTHERS_TURN)
    for place in range(tile_begin, tile_end):
        record = records + place * RECORD
        batch, head, tile_row, q_begin, q_end, key_shift, kv_begin, kv_end = load_query_tile(record)
        query_row = tile_row + CONSUMER * HALF
        first_tile = gl.load(record + 11)
        first_mask = gl.load(record + 15)
        (
            partial_first, num_partial, full_first, full_start,
            num_edges, num_masked, num_tiles, full_last,
        ) = load_steps_of_row(record)  # fmt: skip
        accumulator = gl.zeros([HALF, DIM], gl.float32, OUT)
        no_scores = gl.zeros([HALF, TILE], gl.float32, SCORES)
        query_slot = (turn % Q_SLOTS) * 2 + CONSUMER
        query_buffer = queries.index(query_slot).reshape([HALF, DIM])
        slot = number % STAGES
        parity = (number // STAGES) & 1

        # The first step: there is no accumulator yet, and no maximum.
        mbarrier.wait(query_filled.index(query_slot), (turn // Q_SLOTS) & 1)
        query = query_buffer
        if Q_IN_REGISTERS:
            query = query_buffer.load(
                gl.DotOperandLayout(operand_index=0, parent=SCORES, k_width=2)
            )
        mbarrier.wait(key_filled.index(slot), parity)
        pair_barrier_sync(MY_TURN)
        key_tile = keys.index(slot).reshape([TILE, DIM]).permute([1, 0])
        scores = warpgroup_mma(query, key_tile, no_scores, use_acc=False, is_async=True)
        pair_barrier_arrive(OTHERS_TURN)
        # The output of the tile before has left its slot for queries.
        tma.store_wait(0)
        mbarrier.arrive(
            query_free.index(((turn + Q_SLOTS - 1) % Q_SLOTS) * 2 + CONSUMER), pred=turn > 0
        )
        key_row = first_tile * TILE + key_shift
        mask = load_mask(
            bank, first_mask, CONSUMER * HALF, kv_begin - key_row, kv_end - key_row, no_scores, TILE
        )
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(key_free.index(slot))
        if num_masked > 0:
            scores = apply_mask(scores, mask)
            clear_foreign_values(
                values.index(slot).reshape([TILE, DIM]), value_filled.index(slot), parity,
                key_row, key_rows, kv_begin, kv_end, CONSUMER,
            )  # fmt: skip
        running_max = gl.maximum(gl.max(scores, 1) * score_scale, FLOOR)
        probabilities = gl.exp2(scores * score_scale - gl.expand_dims(running_max, 1))
        running_sums = own_sums(probabilities)
        weights = gl.convert_layout(probabilities.to(DTYPE), PROBABILITIES)

        for step in range(1, num_masked):
            last_slot = slot
            last_parity = parity
            number += 1
            slot = number % STAGES
            parity = (number // STAGES) & 1
            entry = masked_entry(
                step, partial_first, num_partial, full_first, full_start, full_last
            )
            mask_id = gl.load(mask_ids + entry)
            key_row = gl.load(indices + entry) * TILE + key_shift
            mbarrier.wait(key_filled.index(slot), parity)
            pair_barrier_sync(MY_TURN)
            key_tile = keys.index(slot).reshape([TILE, DIM]).permute([1, 0])
            scores = warpgroup_mma(query, key_tile, no_scores, use_acc=False, is_async=True)
            mbarrier.wait(value_filled.index(last_slot), last_parity)
            accumulator = warpgroup_mma(
                weights, values.index(last_slot).reshape([TILE, DIM]), accumulator, is_async=True
            )
            pair_barrier_arrive(OTHERS_TURN)
            mask = load_mask(
                bank,
                mask_id,
                CONSUMER * HALF,
                kv_begin - key_row,
                kv_end - key_row,
                no_scores,
                TILE,
            )
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(key_free.index(slot))
            scores = apply_mask(scores, mask)
            probabilities, shrink, running_max, running_sums = update(
                scores, running_max, running_sums, score_scale, None
            )
            weights = gl.convert_layout(probabilities.to(DTYPE), PROBABILITIES)
            if OVERLAPS_VALUES:
                mbarrier.wait(value_filled.index(last_slot), last_parity)
            accumulator, weights, running_max, running_sums, shrink = warpgroup_mma_wait(
                0, deps=[accumulator, weights, running_max, running_sums, shrink]
            )
            mbarrier.arrive(value_free.index(last_slot))
            accumulator = accumulator * gl.expand_dims(gl.convert_layout(shrink, OUT_ROWS), 1)
            clear_foreign_values(
                values.index(slot).reshape([TILE, DIM]), value_filled.index(slot), parity,
                key_row, key_rows, kv_begin, kv_end, CONSUMER,
            )  # fmt: skip

        # The same without a mask. Where no step had one, the first full one was peeled off.
        for _ in range(full_first + gl.where(num_masked > 0, 0, 1), full_last):
            last_slot = slot
            last_parity = parity
            number += 1
            slot = number % STAGES
            parity = (number // STAGES) & 1
            mbarrier.wait(key_filled.index(slot), parity)
            pair_barrier_sync(MY_TURN)
            key_tile = keys.index(slot).reshape([TILE, DIM]).permute([1, 0])
            scores = warpgroup_mma(query, key_tile, no_scores, use_acc=False, is_async=True)
            mbarrier.wait(value_filled.index(last_slot), last_parity)
            accumulator = warpgroup_mma(
                weights, values.index(last_slot).reshape([TILE, DIM]), accumulator, is_async=True
            )
            pair_barrier_arrive(OTHERS_TURN)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(key_free.index(slot))
            probabilities, shrink, running_max, running_sums = update(
                scores, running_max, running_sums, score_scale, POLYNOMIALS
            )
            weights = gl.convert_layout(probabilities.to(DTYPE), PROBABILITIES)
            if OVERLAPS_VALUES:
                mbarrier.wait(value_filled.index(last_slot), last_parity)
            accumulator, weights, running_max, running_sums, shrink = warpgroup_mma_wait(
                0, deps=[accumulator, weights, running_max, running_sums, shrink]
            )
            mbarrier.arrive(value_free.index(last_slot))
            accumulator = accumulator * gl.expand_dims(gl.convert_layout(shrink, OUT_ROWS), 1)

        mbarrier.wait(value_filled.index(slot), parity)
        accumulator = warpgroup_mma(
            weights, values.index(slot).reshape([TILE, DIM]), accumulator, is_async=True
        )
        number += 1
        turn += 1
        total = gl.convert_layout(gl.sum(running_sums, 1), ROWS)
        is_empty = total == 0.0
        divisor = gl.where(is_empty, 1.0, total)
        row_lse = (running_max + gl.log2(divisor)) * LN_2
        rows = query_row + gl.arange(0, HALF, ROWS)
        gl.store(
            lse + (batch * num_heads + head).to(gl.int64) * query_rows + rows,
            gl.where(is_empty, -float("inf"), row_lse),
            mask=(rows >= q_begin) & (rows < q_end),
        )
        factor = gl.convert_layout(1.0 / divisor, OUT_ROWS)
        accumulator = warpgroup_mma_wait(0, deps=[accumulator])
        mbarrier.arrive(value_free.index(slot))
        result = (accumulator * gl.expand_dims(factor, 1)).to(DTYPE)
        store_rows(
            out_desc, out, out_batch_stride, out_head_stride, out_row_stride,
            result, queries.index(query_slot),
            batch, head, query_row, q_begin, q_end, query_rows, HEAD_DIM, DIM,
        )  # fmt: skip
    tma.store_wait(0)
    if CONSUMER == 0:
        pair_barrier_sync(MY_TURN)


# One kernel for all lengths and numbers of heads, also where they are 1 or multiples of 16.
@gluon.jit(do_not_specialize=["num_heads", "group_size", "query_rows", "key_rows"])
def forward_kernel(
    query_desc,
    key_desc,
    value_desc,
    out_desc,
    out,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
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
    OVERLAPS_VALUES: gl.constexpr,
    POLYNOMIALS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Grid: (programs of the schedule,). Writes the rows of `out` and `lse` that the tiles' sequences own.

    `*_desc`: tensor descriptors of [batch, heads, rows, HEAD_DIM], in blocks of 64 rows (query, out) or 128 (key, value) and DIM columns;
    `out`, `out_*_stride`: the same output by pointer; `lse`: [batch, heads, rows]; `records`, `offsets`: `work.Schedule`;
    `indices`, `mask_ids`, `bank`: of the block index; `query_rows`, `key_rows`: of the tensors.
    """
    DTYPE: gl.constexpr = query_desc.dtype
    queries = gl.allocate_shared_memory(DTYPE, [Q_SLOTS * 2, 1, 1, HALF, DIM], query_desc.layout)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, TILE, DIM], key_desc.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, TILE, DIM], value_desc.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    query_filled = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * 2, 1], BARRIER)
    query_free = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * 2, 1], BARRIER)
    key_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for slot in gl.static_range(Q_SLOTS * 2):
        mbarrier.init(query_filled.index(slot), count=1)
        mbarrier.init(query_free.index(slot), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(key_filled.index(slot), count=1)
        mbarrier.init(value_filled.index(slot), count=1)
        mbarrier.init(key_free.index(slot), count=2)
        mbarrier.init(value_free.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (
                0, out_desc, out, out_batch_stride, out_head_stride, out_row_stride, lse,
                records, offsets, indices, mask_ids, bank,
                score_scale, num_heads, query_rows, key_rows, queries, keys, values,
                query_filled, query_free, key_filled, key_free, value_filled, value_free,
                HEAD_DIM, DIM, STAGES, Q_IN_REGISTERS, OVERLAPS_VALUES, POLYNOMIALS,
            )),
            (consumer, (
                1, out_desc, out, out_batch_stride, out_head_stride, out_row_stride, lse,
                records, offsets, indices, mask_ids, bank,
                score_scale, num_heads, query_rows, key_rows, queries, keys, values,
                query_filled, query_free, key_filled, key_free, value_filled, value_free,
                HEAD_DIM, DIM, STAGES, Q_IN_REGISTERS, OVERLAPS_VALUES, POLYNOMIALS,
            )),
            (producer, (
                query_desc, key_desc, value_desc, records, offsets, indices, group_size,
                queries, keys, values,
                query_filled, query_free, key_filled, key_free, value_filled, value_free,
                DIM, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
