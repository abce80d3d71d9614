"""What stands before and after the backward kernel: its row terms, and the float32 sums that dQ is added up in.

Every query tile of every sequence has a place of its own in the sums, so no sequence adds to another's rows. A tile is stored as parts of
64 x 64 numbers, in the order of `backward_kernel.hand_over`; part `2 * s + c` is what consumer `c` computed of the tile's step `s`.
"""

import triton
import triton.language as tl

from hf_blocksparse.ops.triton.backward import row_terms
from hf_blocksparse.ops.triton.tiles import load_rows_between, load_sequence, row_pointers

TILE = tl.constexpr(128)
PART = tl.constexpr(64)


@triton.jit
def prepare_kernel(
    out,
    grad_out,
    lse,
    grad_lse,
    log2_sums,
    deltas,
    sums,
    items,
    table,
    first_slots,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Grid: (query items, query heads). Zeros `sums`, and writes the row terms of the rows that the item's sequence owns.

    The pointer of `grad_lse` may be None, and `sums` with `first_slots` where nobody adds to them.
    """
    item = items + tl.program_id(0) * 2
    head = tl.program_id(1)
    sequence = tl.load(item)
    if sequence < 0:
        return
    tile = tl.load(item + 1)
    if sums is not None:
        slot = tl.load(first_slots + sequence) + tile
        place = (slot.to(tl.int64) * tl.num_programs(1) + head) * (TILE * DIM)
        tl.store(sums + place + tl.arange(0, TILE * DIM), tl.zeros([TILE * DIM], tl.float32))
    batch, q_row, q_len, q_pos, _, _, _ = load_sequence(table, sequence)
    first_row = tile * TILE - q_pos + q_row
    rows = first_row + tl.arange(0, TILE)
    is_own = (rows >= q_row) & (rows < q_row + q_len)
    out_tile = load_rows_between(
        out, batch, head, first_row, q_row, q_row + q_len, TILE, HEAD_DIM, DIM
    )
    grad_tile = load_rows_between(
        grad_out, batch, head, first_row, q_row, q_row + q_len, TILE, HEAD_DIM, DIM
    )
    row_lse = tl.load(row_pointers(lse, batch, head) + rows, mask=is_own, other=float("-inf"))
    row_grad_lse = tl.zeros([TILE], tl.float32)
    if grad_lse.pointer is not None:
        places = rows.to(tl.int64) * grad_lse.strides[2]
        row_grad_lse = tl.load(row_pointers(grad_lse, batch, head) + places, mask=is_own, other=0.0)
    log2_sum, delta = row_terms(out_tile, grad_tile, row_lse, row_grad_lse)
    tl.store(row_pointers(log2_sums, batch, head) + rows, log2_sum, mask=is_own)
    tl.store(row_pointers(deltas, batch, head) + rows, delta, mask=is_own)


@triton.jit
def store_kernel(
    sums,
    grad_query,
    items,
    table,
    first_slots,
    scale,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Grid: (query items, query heads). Writes `scale * sums` to the rows of `grad_query` that the item's sequence owns."""
    item = items + tl.program_id(0) * 2
    head = tl.program_id(1)
    sequence = tl.load(item)
    if sequence < 0:
        return
    tile = tl.load(item + 1)
    slot = tl.load(first_slots + sequence) + tile
    place = (slot.to(tl.int64) * tl.num_programs(1) + head) * (TILE * DIM)
    batch, q_row, q_len, q_pos, _, _, _ = load_sequence(table, sequence)
    first_row = tile * TILE - q_pos + q_row
    rows = tl.arange(0, PART)
    dims = tl.arange(0, PART)
    COLUMN_PARTS: tl.constexpr = DIM // PART
    for row_part in tl.static_range(2):
        own = first_row + row_part * PART + rows
        is_own = (own >= q_row) & (own < q_row + q_len)
        for column_part in tl.static_range(COLUMN_PARTS):
            part = place + (row_part * COLUMN_PARTS + column_part) * (PART * PART)
            stored = tl.load(sums + part + tl.arange(0, PART * PART))
            # [column high, half, warp, row high, row low, thread, column low, 2] becomes
            # [warp, half, row high, row low | column high, column low, thread, 2].
            parts = tl.reshape(stored, [4, 2, 4, 4, 2, 4, 2, 2])
            parts = tl.permute(parts, [2, 1, 3, 4, 0, 6, 5, 7])
            columns = column_part * PART + dims
            pointers = (
                row_pointers(grad_query, batch, head)
                + own.to(tl.int64)[:, None] * grad_query.strides[2]
                + columns[None, :]
            )
            tl.store(
                pointers,
                (tl.reshape(parts, [PART, PART]) * scale).to(grad_query.pointer.dtype.element_ty),
                mask=is_own[:, None] & (columns < HEAD_DIM)[None, :],
            )
