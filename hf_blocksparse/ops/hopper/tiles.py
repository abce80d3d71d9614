"""Parts the kernels share: what a record says, which entries of lists a tile's steps are, rows of tiles in shared and device memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from hf_blocksparse.ops.hopper import work
from hf_blocksparse.ops.hopper.compat import reinterpret, tma_store

HALF = gl.constexpr(64)  # rows of one consumer
RECORD = gl.constexpr(work.RECORD)
COLUMN_RECORD = gl.constexpr(work.COLUMN_RECORD)


@gluon.jit
def load_query_tile(record):
    """Whose a query tile is and where: batch, head, its first row, the sequence's query rows, what to add to a key's position for its
    row, the sequence's key rows; see `work.RECORD`."""
    batch = gl.load(record)
    head = gl.load(record + 1)
    query_row = gl.load(record + 2)
    q_begin = gl.load(record + 3)
    q_end = gl.load(record + 4)
    key_shift = gl.load(record + 5)
    kv_begin = gl.load(record + 6)
    kv_end = gl.load(record + 7)
    return batch, head, query_row, q_begin, q_end, key_shift, kv_begin, kv_end


@gluon.jit
def load_key_tile(record, group_size):
    """Whose a key tile is and where: batch, key head, its first row, the sequence's key rows; see `work.COLUMN_RECORD`."""
    batch = gl.load(record)
    kv_head = gl.load(record + 1) // group_size
    key_row = gl.load(record + 2)
    kv_begin = gl.load(record + 3)
    kv_end = gl.load(record + 4)
    return batch, kv_head, key_row, kv_begin, kv_end


@gluon.jit
def load_steps_of_row(record):
    """Where a query tile's key tiles lie in the lists; see `work.RECORD`. What `load_steps_of_column` gives of a key tile."""
    partial_first = gl.load(record + 8)
    num_partial = gl.load(record + 9)
    full_first = gl.load(record + 10)
    full_start = gl.load(record + 12)
    num_masked = gl.load(record + 13)
    num_tiles = gl.load(record + 14)
    last_edge = full_first + num_tiles - num_masked
    return (
        partial_first,
        num_partial,
        full_first,
        full_start,
        num_masked - num_partial,
        num_masked,
        num_tiles,
        last_edge,
    )


@gluon.jit
def load_steps_of_column(record):
    """Where a key tile's query tiles lie in the lists; see `work.COLUMN_RECORD`."""
    partial_first = gl.load(record + 9)
    num_partial = gl.load(record + 10)
    full_first = gl.load(record + 11)
    full_start = gl.load(record + 12)
    num_edges = gl.load(record + 13)
    num_masked = gl.load(record + 14)
    num_tiles = gl.load(record + 15)
    last_edge = gl.load(record + 17)
    return (
        partial_first,
        num_partial,
        full_first,
        full_start,
        num_edges,
        num_masked,
        num_tiles,
        last_edge,
    )


@gluon.jit
def masked_entry(place, partial_first, num_partial, full_first, full_start, last_edge):
    """The entry of a list at `place`, which needs a mask: partial ones, then full ones at the sequence's start and end."""
    edge = gl.where(place - num_partial < full_start, full_first - 1, last_edge)
    return gl.where(place < num_partial, partial_first + place, edge)


@gluon.jit
def entry_of(place, partial_first, num_partial, full_first, full_start, num_edges, last_edge):
    """The entry of a list at `place`: those of `masked_entry`, then the other full ones."""
    first_full = num_partial + num_edges
    edge = gl.where(place - num_partial < full_start, full_first - 1, last_edge)
    entry = gl.where(place < first_full, edge, full_first + place - first_full)
    return gl.where(place < num_partial, partial_first + place, entry)


@gluon.jit
def straddles(row, num_rows, begin, end, ROWS: gl.constexpr):
    """Whether some of the rows from `row` on exist and lie outside `[begin, end)`."""
    return (begin > gl.maximum(row, 0)) | (end < gl.minimum(row + ROWS, num_rows))


@gluon.jit
def clear_foreign_rows(ring, slot, first_row, begin, end, ROWS: gl.constexpr, DIM: gl.constexpr):
    """Zeros the rows outside `[begin, end)` of the tile [ROWS, DIM] in slot `slot`, whose first row is `first_row`."""
    # Eight rows of 64 columns are what the swizzle of such tiles repeats after.
    ATOM: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    NUM_ATOMS: gl.constexpr = ROWS // 8 * (DIM // 64)
    atoms = reinterpret(ring, ring.dtype, [ring.shape[0] * NUM_ATOMS, 8, 64], ATOM)
    for atom in range(0, NUM_ATOMS):
        rows = first_row + atom % (ROWS // 8) * 8 + gl.arange(0, 8, gl.SliceLayout(1, LAYOUT))
        is_own = gl.expand_dims((rows >= begin) & (rows < end), 1)
        place = atoms.index(slot * NUM_ATOMS + atom)
        tile = place.load(LAYOUT)
        place.store(gl.where(is_own, tile, gl.zeros_like(tile)))


@gluon.jit
def store_rows(
    desc, pointer, batch_stride, head_stride, row_stride, result, staging,
    batch, head, row, begin, end, num_rows,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """Stores [64, DIM] rows from `row` on, those inside `[begin, end)` only. The copy out of `staging` may go on after this."""
    # Rows past the tensor's end are left out by the TMA; rows of another sequence, by hand.
    if (row >= begin) & ((row + HALF <= end) | (end == num_rows)):
        staging.reshape([HALF, DIM]).store(result)
        fence_async_shared()
        tma_store(desc, [batch, head, row, 0], staging)
    else:
        LAYOUT: gl.constexpr = result.type.layout
        rows = row + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
        dims = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
        pointers = (
            pointer
            + batch.to(gl.int64) * batch_stride
            + head.to(gl.int64) * head_stride
            + gl.expand_dims(rows.to(gl.int64) * row_stride, 1)
            + gl.expand_dims(dims, 0)
        )
        is_own = (rows >= begin) & (rows < end)
        gl.store(
            pointers,
            result,
            mask=gl.expand_dims(is_own, 1) & gl.expand_dims(dims < HEAD_DIM, 0),
        )


@gluon.jit
def store_part(parts, slot, sums, CONSUMER: gl.constexpr, TILE_SIZE: gl.constexpr):
    """Stores a consumer's rows [64, DIM] of a key tile into slot `slot` of the contiguous `parts` [slots, TILE_SIZE, DIM]."""
    LAYOUT: gl.constexpr = sums.type.layout
    DIM: gl.constexpr = sums.shape[1]
    rows = CONSUMER * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
    place = gl.expand_dims(rows * DIM, 1) + gl.expand_dims(dims, 0)
    gl.store(parts + slot.to(gl.int64) * (TILE_SIZE * DIM) + place, sums)
