"""Parts the kernels share: arguments, work items, lists, tile loads, mask bits, dropout, softcap, ALiBi.

Kernels work on scores in units of log2: `raw = <q, k>` (or `tanh(softcap_scale * raw)` with a softcap), the score is
`score_scale * raw` with log2(e) folded into `score_scale` on the host, so that probabilities are powers of two.
ALiBi slopes come divided by `score_scale`: with them the score is `score_scale * (raw - slope * |i - j|)`.

Three kinds of tiles meet in a row of the block index, and each has its own loop:

- *full* tiles wholly inside the sequence: no mask;
- *partial* tiles wholly inside the sequence: bits of the bank;
- *edges*, at most four: the first and last of both lists when they straddle an end of the sequence. Their rows
  outside the sequence belong to somebody else: they are not read, and masked.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class StridedRows(NamedTuple):
    """A tensor [batch, heads, rows, dim] or [batch, heads, rows].

    `strides` are those of batch, head and row, in elements; that of `dim` is 1.
    """

    pointer: Any
    strides: tuple[Any, Any, Any]


class TileLists(NamedTuple):
    """One direction of a block index: the lists of one axis' tiles along the other axis."""

    list_of: Any
    sequence_stride: Any
    head_stride: Any
    offsets: Any
    num_full: Any
    indices: Any
    mask_ids: Any
    bank: Any
    num_tiles: Any


class Dropout(NamedTuple):
    """`seed`: pointer to int64; `threshold`: round(p * 2**32) as the int32 with the same bits; `keep_scale`: 1 / (1 - p)."""

    seed: Any
    threshold: Any
    keep_scale: Any


@triton.jit
def load_sequence(table, sequence):
    """The row of the sequence table: batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos."""
    row = table + sequence * 7
    batch = tl.load(row)
    q_row = tl.load(row + 1)
    q_len = tl.load(row + 2)
    q_pos = tl.load(row + 3)
    kv_row = tl.load(row + 4)
    kv_len = tl.load(row + 5)
    kv_pos = tl.load(row + 6)
    return batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos


@triton.jit
def load_list(lists, sequence, head, tile):
    """Where the list of `tile` lies: begin of the full entries, begin of the partial ones, end."""
    number = tl.load(
        lists.list_of + sequence * lists.sequence_stride + head * lists.head_stride
    ).to(tl.int64)
    offset = lists.offsets + number * (lists.num_tiles + 1) + tile
    begin = tl.load(offset)
    end = tl.load(offset + 1)
    partial_begin = begin + tl.load(lists.num_full + number * lists.num_tiles + tile)
    return begin, partial_begin, end


@triton.jit
def heads_of_rows(heads_per_list, TILE_Q: tl.constexpr, MEMBERS: tl.constexpr):
    """The heads of a program's query tile, of a grid whose second axis counts packs of heads.

    A pack is a run of at most `MEMBERS` heads among `heads_per_list` that share a list and a key head. Row `r` of the tile is query
    `r % (TILE_Q // MEMBERS)` of the index' tile in head `r // (TILE_Q // MEMBERS)` of the pack.

    Returns: the number of heads in all; the first head; the head of each row, a scalar where it is one for all, with the last one
    repeated where the pack is not full; which rows have a head of their own.
    """
    if MEMBERS == 1:
        head = tl.program_id(1)
        return tl.num_programs(1), head, head, tl.full([TILE_Q], True, tl.int1)
    else:
        packs_per_list = (heads_per_list + MEMBERS - 1) // MEMBERS
        first_member = tl.program_id(1) % packs_per_list * MEMBERS
        first_of_list = tl.program_id(1) // packs_per_list * heads_per_list
        members = first_member + tl.arange(0, TILE_Q) // (TILE_Q // MEMBERS)
        heads = first_of_list + tl.minimum(members, heads_per_list - 1)
        num_heads = tl.num_programs(1) // packs_per_list * heads_per_list
        return num_heads, first_of_list + first_member, heads, members < heads_per_list


@triton.jit
def search_between(indices, begin, end, smallest, largest, bound):
    """The first entry of the ascending `indices[begin:end]` that is at least `bound`; `end` if none is.

    Without a step of the search where `smallest` and `largest`, no greater and no less than all of them, settle it.
    """
    low = tl.where(largest < bound, end, begin)
    high = tl.where(smallest >= bound, low, end)
    while low < high:
        middle = (low + high) // 2
        if tl.load(indices + middle) < bound:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def first_at_least(indices, begin, end, bound):
    """The first entry of the ascending `indices[begin:end]` that is at least `bound`; `end` if none is."""
    smallest = tl.load(indices + begin, mask=begin < end, other=0)
    largest = tl.load(indices + end - 1, mask=begin < end, other=0)
    return search_between(indices, begin, end, smallest, largest, bound)


@triton.jit
def clip_entries(indices, begin, end, start, stop, TILE: tl.constexpr):
    """Clips the ascending `indices[begin:end]` to the positions `[start, stop)`.

    Returns the entries `[inside_begin, inside_end)` wholly inside, and how many entries, 0 or 1, straddle the start
    (entry `inside_begin - 1`) and the stop (entry `inside_end`).
    """
    # A program begins with this and waits for its loads. Those of the two ends, at once, settle the common case, in which nothing is
    # clipped, without a search or another load.
    smallest = tl.load(indices + begin, mask=begin < end, other=0)
    largest = tl.load(indices + end - 1, mask=begin < end, other=0)
    first = search_between(indices, begin, end, smallest, largest, start // TILE)
    stop_tile = (stop + TILE - 1) // TILE
    last = search_between(indices, first, end, smallest, largest, stop_tile)
    is_any = first < last
    first_tile = tl.load(indices + first, mask=is_any & (first > begin), other=smallest)
    last_tile = tl.load(indices + last - 1, mask=is_any & (last < end), other=largest)
    cuts_start = tl.where(is_any & (first_tile * TILE < start), 1, 0)
    inside_begin = first + cuts_start
    cuts_stop = tl.where((inside_begin < last) & ((last_tile + 1) * TILE > stop), 1, 0)
    # A tile can straddle both ends of a short sequence: it counts once, as one that straddles the start.
    return inside_begin, last - cuts_stop, cuts_start, cuts_stop


@triton.jit
def edge_entry(
    edge, full_begin, full_end, full_start, full_stop, partial_begin, partial_end, partial_start
):
    """The entry of the edge with number `edge`: full at the start, full at the stop, partial at the start, at the stop."""
    entry = tl.where(edge < full_start + full_stop + partial_start, partial_begin - 1, partial_end)
    entry = tl.where(edge < full_start + full_stop, full_end, entry)
    return tl.where(edge < full_start, full_begin - 1, entry)


@triton.jit
def load_strips(
    lists, place, full_first, num_full, partial_first, num_strips, STRIPS: tl.constexpr
):
    """Numbers and mask ids [STRIPS] of the strips from `place` on, full ones before partial ones, and which of them there are.

    Past the end of the list the last strip is repeated.
    """
    places = place + tl.arange(0, STRIPS)
    entries = tl.minimum(places, num_strips - 1)
    entries += tl.where(entries < num_full, full_first, partial_first - num_full)
    return tl.load(lists.indices + entries), tl.load(lists.mask_ids + entries), places < num_strips


@triton.jit
def rows_of_strips(strips, shift, STRIP: tl.constexpr, TILE: tl.constexpr):
    """Tensor rows [TILE] of strips; `shift` leads from positions to rows."""
    rows = strips[:, None] * STRIP + tl.arange(0, STRIP)[None, :]
    return rows.reshape([TILE]) + shift


@triton.jit
def row_pointers(tensor, batch, head):
    """Pointer to row 0 of one head."""
    return (
        tensor.pointer
        + batch.to(tl.int64) * tensor.strides[0]
        + head.to(tl.int64) * tensor.strides[1]
    )


@triton.jit
def load_rows(
    tensor,
    descriptor,
    batch,
    head,
    first_row,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """[TILE, DIM_PADDED] rows from `first_row` on, all of which exist; zero past DIM.

    `descriptor`: a tensor descriptor of blocks [1, 1, TILE, DIM_PADDED], or None to read by pointers. Descriptors are arguments of
    their own because Triton 3.6 cannot launch a kernel with one inside a tuple.
    """
    if descriptor is not None:
        return descriptor.load([batch, head, first_row, 0]).reshape([TILE, DIM_PADDED])
    else:
        rows = (first_row + tl.arange(0, TILE)).to(tl.int64)
        dims = tl.arange(0, DIM_PADDED)
        pointers = (
            row_pointers(tensor, batch, head) + rows[:, None] * tensor.strides[2] + dims[None, :]
        )
        if DIM == DIM_PADDED:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=dims[None, :] < DIM, other=0.0)


@triton.jit
def load_both(
    first, first_descriptor, second, second_descriptor, batch, head, first_row,
    TILE: tl.constexpr,
    FIRST_DIM: tl.constexpr, FIRST_DIM_PADDED: tl.constexpr,
    SECOND_DIM: tl.constexpr, SECOND_DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """`load_rows` of two tensors: keys and values, or queries and what the gradient of their output is."""
    return (
        load_rows(first, first_descriptor, batch, head, first_row, TILE, FIRST_DIM, FIRST_DIM_PADDED),
        load_rows(second, second_descriptor, batch, head, first_row, TILE, SECOND_DIM, SECOND_DIM_PADDED),
    )  # fmt: skip


@triton.jit
def load_row_values(tensor, batch, head, first_row, TILE: tl.constexpr):
    """[TILE] values of a tensor [batch, heads, rows], all of whose rows exist."""
    return tl.load(row_pointers(tensor, batch, head) + first_row + tl.arange(0, TILE))


@triton.jit
def load_rows_between(
    tensor,
    batch,
    head,
    first_row,
    row_begin,
    row_end,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """[TILE, DIM_PADDED] rows from `first_row` on; zero outside `[row_begin, row_end)` and past DIM."""
    rows = first_row + tl.arange(0, TILE)
    is_row = (rows >= row_begin) & (rows < row_end)
    return load_rows_where(tensor, batch, head, rows, is_row, DIM, DIM_PADDED)


@triton.jit
def load_rows_where(
    tensor, batch, heads, rows, is_row, DIM: tl.constexpr, DIM_PADDED: tl.constexpr
):
    """The given rows of one head, or each of a head of its own, [number of rows, DIM_PADDED]; zero where not `is_row` and past DIM."""
    dims = tl.arange(0, DIM_PADDED)
    places = row_pointers(tensor, batch, heads) + rows.to(tl.int64) * tensor.strides[2]
    mask = is_row[:, None] & (dims < DIM)[None, :]
    return tl.load(places[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def load_rows_at(tensor, batch, head, rows, DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    """The given rows, all of which exist, [number of rows, DIM_PADDED]; zero past DIM."""
    dims = tl.arange(0, DIM_PADDED)
    first = row_pointers(tensor, batch, head) + dims[None, :]
    pointers = first + rows.to(tl.int64)[:, None] * tensor.strides[2]
    if DIM == DIM_PADDED:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=dims[None, :] < DIM, other=0.0)


@triton.jit
def load_both_at(
    first, second, batch, head, rows,
    FIRST_DIM: tl.constexpr, FIRST_DIM_PADDED: tl.constexpr,
    SECOND_DIM: tl.constexpr, SECOND_DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """`load_rows_at` of two tensors, as `load_both`."""
    return (
        load_rows_at(first, batch, head, rows, FIRST_DIM, FIRST_DIM_PADDED),
        load_rows_at(second, batch, head, rows, SECOND_DIM, SECOND_DIM_PADDED),
    )


@triton.jit
def store_rows_between(
    tensor,
    values,
    batch,
    head,
    first_row,
    row_begin,
    row_end,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """Stores [TILE, DIM_PADDED] rows from `first_row` on, those inside `[row_begin, row_end)` only."""
    rows = first_row + tl.arange(0, TILE)
    is_row = (rows >= row_begin) & (rows < row_end)
    store_rows_where(tensor, values, batch, head, rows, is_row, DIM, DIM_PADDED)


@triton.jit
def store_rows_where(
    tensor, values, batch, heads, rows, is_row, DIM: tl.constexpr, DIM_PADDED: tl.constexpr
):
    """Stores the given rows of one head, or each of a head of its own, where `is_row`."""
    dims = tl.arange(0, DIM_PADDED)
    places = row_pointers(tensor, batch, heads) + rows.to(tl.int64) * tensor.strides[2]
    mask = is_row[:, None] & (dims < DIM)[None, :]
    tl.store(places[:, None] + dims[None, :], values.to(tensor.pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_bits(bank, mask_id, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which coefficients bank entry `mask_id` keeps, all for -1: bool [TILE_Q, TILE_KV], or its transpose.

    Words are loaded by query row alone and spread over the keys in registers.
    """
    WIDTH: tl.constexpr = 32 if TILE_KV >= 32 else TILE_KV
    WORDS: tl.constexpr = TILE_KV // WIDTH
    queries = tl.arange(0, TILE_Q)
    words = tl.arange(0, WORDS)
    bits = tl.arange(0, WIDTH)
    entry = bank + mask_id.to(tl.int64) * (TILE_Q * WORDS)
    if TRANSPOSED:
        place = words[:, None] + queries[None, :] * WORDS
        packed = tl.load(entry + place, mask=(place + mask_id) >= place, other=-1)
        kept = (packed[:, None, :] >> bits[None, :, None]).reshape([TILE_KV, TILE_Q])
    else:
        place = queries[:, None] * WORDS + words[None, :]
        packed = tl.load(entry + place, mask=(place + mask_id) >= place, other=-1)
        kept = (packed[:, :, None] >> bits[None, None, :]).reshape([TILE_Q, TILE_KV])
    return (kept & 1) != 0


@triton.jit
def load_row_bits(bank, mask_id, rows, is_row, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr):
    """Which coefficients bank entry `mask_id` keeps in some `rows` of it, all for -1: bool [rows, TILE_KV], False where not `is_row`."""
    WIDTH: tl.constexpr = 32 if TILE_KV >= 32 else TILE_KV
    WORDS: tl.constexpr = TILE_KV // WIDTH
    place = rows[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    entry = bank + mask_id.to(tl.int64) * (TILE_Q * WORDS)
    packed = tl.load(entry + place, mask=is_row[:, None] & ((place + mask_id) >= place), other=-1)
    packed = tl.where(is_row[:, None], packed, 0)
    kept = packed[:, :, None] >> tl.arange(0, WIDTH)[None, None, :]
    return (kept.reshape([rows.shape[0], TILE_KV]) & 1) != 0


@triton.jit
def load_strip_bits(
    bank,
    mask_ids,
    exist,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    STRIP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MEMBERS: tl.constexpr = 1,
):
    """`load_bits` of a tile gathered from strips: of keys, [TILE_Q, TILE_KV], or of queries and then transposed.

    A full strip (-1) keeps all, one that does not exist nothing. `MEMBERS`: heads in the rows, which repeat a mask's, see `heads_of_rows`.
    """
    all_bits = tl.where(exist & (mask_ids < 0), -1, 0)
    has_bits = exist & (mask_ids >= 0)
    if TRANSPOSED:
        WIDTH: tl.constexpr = 32 if TILE_KV >= 32 else TILE_KV
        WORDS: tl.constexpr = TILE_KV // WIDTH
        words = tl.arange(0, WORDS)
        row = mask_ids.to(tl.int64)[:, None] * STRIP + tl.arange(0, STRIP)[None, :]
        pointers = bank + row[None, :, :] * WORDS + words[:, None, None]
        packed = tl.load(pointers, mask=has_bits[None, :, None], other=0)
        packed = (packed | all_bits[None, :, None]).reshape([WORDS, TILE_Q])
        kept = (packed[:, None, :] >> tl.arange(0, WIDTH)[None, :, None]).reshape([TILE_KV, TILE_Q])
    else:
        QUERIES: tl.constexpr = TILE_Q // MEMBERS
        queries = tl.arange(0, TILE_Q) % QUERIES
        pointers = bank + mask_ids.to(tl.int64)[None, :] * QUERIES + queries[:, None]
        packed = tl.load(pointers, mask=has_bits[None, :], other=0) | all_bits[None, :]
        kept = (packed[:, :, None] >> tl.arange(0, STRIP)[None, None, :]).reshape([TILE_Q, TILE_KV])
    return (kept & 1) != 0


@triton.jit
def subtract_alibi(raw, slope, query_rows, key_rows, position_shift):
    """`raw - slope * |i - j|`, for tensor rows that broadcast to the tile's shape.

    `position_shift`: what the difference of a query's and a key's position has beyond that of their rows.
    """
    distance = tl.abs(query_rows - key_rows + position_shift)
    return raw - slope * distance.to(tl.float32)


@triton.jit
def dropout_keeps(dropout, query_rows, key_rows, batch_head):
    """Which coefficients dropout keeps, for tensor rows that broadcast to the tile's shape.

    Philox4x32-10 with counter (query row, key row, batch * heads + head, 0): the same bits in every kernel, whatever
    its tiles. `batch_head`: a scalar, or one per query.
    """
    query_rows, key_rows = tl.broadcast(query_rows, key_rows)
    word, _, _, _ = tl.philox(tl.load(dropout.seed), query_rows, key_rows, batch_head, 0)
    return word >= tl.full([], dropout.threshold, tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def add_product(total, left, right, INPUT_PRECISION: tl.constexpr):
    """`total + left @ right`, the accumulator's next value.

    In IEEE float32 the product is summed on its own before it is added: a single chain over thousands of rows would lose several
    times as much to rounding.
    """
    if left.dtype == tl.float32 and INPUT_PRECISION == "ieee":
        # With the last argument set, the compiler does not fold the addition back into the product. It has no other effect here.
        product = tl.dot(left, right, input_precision=INPUT_PRECISION, max_num_imprecise_acc=1)
        return total + product
    else:
        return tl.dot(left, right, total, input_precision=INPUT_PRECISION)


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32, within about two rounding units everywhere.

    `(1 - e) / (1 + e)` with `e = exp(-2 |x|)` cancels near 0; there a polynomial fitted by least squares takes over.
    """
    magnitude = tl.abs(x)
    decay = tl.exp2(magnitude * -2.8853900817779268)  # 2 * log2(e)
    far = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = -0.0058939453 * square + 0.0207946177
    series = series * square - 0.053783293
    series = series * square + 0.133319153
    series = series * square - 0.333332975
    near = x + x * (square * series)
    return tl.where(magnitude < 0.6, near, tl.where(x < 0, -far, far))
