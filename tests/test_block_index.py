"""The block index covers exactly what the layout keeps, in both directions, and costs what is kept."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blocksparse import block_index
from hf_blocksparse.block_index import Strips, build_index, build_index_per_sequence, get_index
from hf_blocksparse.layouts import (
    BigBird,
    BlockDiagonal,
    Dense,
    Intersection,
    Longformer,
    MaskLayout,
    PerHead,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
    Union,
)
from hf_blocksparse.sequences import Sequences

CPU = torch.device("cpu")
NUM_HEADS = 3
LONGEST = 300


def random_tensor(seed: int, *shape: int) -> torch.Tensor:
    """Half kept, nearly all kept (some tiles whole), few kept, in turn."""
    threshold = (0.5, 0.002, 0.98)[seed % 3]
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > threshold


simple_layouts = st.one_of(
    st.just(Dense()),
    st.builds(SlidingWindow, st.integers(1, 2 * LONGEST)),
    st.builds(SinkWindow, st.integers(1, 70), st.integers(1, 150)),
    st.builds(Longformer, st.integers(2, 150), st.integers(0, 80)),
    st.builds(BlockDiagonal, st.integers(1, 200)),
    st.builds(
        BigBird,
        st.sampled_from((16, 32, 64, 128)),
        st.integers(1, 5),
        st.integers(0, 3),
        st.integers(0, 4),
        st.integers(0, 9),
    ),
    st.builds(
        lambda seed, heads, size: TensorLayout.from_tensor(
            random_tensor(seed, heads, LONGEST // size + 1, LONGEST // size + 1), size
        ),
        st.integers(0, 9),
        st.sampled_from((1, NUM_HEADS)),
        st.sampled_from((16, 32, 64, 128)),
    ),
    st.builds(
        lambda seed: MaskLayout.from_tensor(random_tensor(seed, LONGEST, LONGEST)),
        st.integers(0, 9),
    ),
)
pairs = st.tuples(simple_layouts, simple_layouts)
layouts = st.one_of(
    simple_layouts,
    pairs.map(Union),
    pairs.map(Intersection),
    st.tuples(simple_layouts, simple_layouts, simple_layouts).map(PerHead),
)
tiles = st.sampled_from(((16, 16), (64, 64), (128, 128), (128, 64), (32, 128), (16, 128)))


@settings(max_examples=150, deadline=None)
@given(layouts, st.booleans(), tiles, st.integers(1, LONGEST), st.integers(1, LONGEST))
def test_both_directions_cover_exactly_the_dense_mask(layout, is_causal, tile, query_end, key_end):
    # The rule is resolved for the longer side, as in a call.
    expected = layout.to_mask(
        query_end, key_end, is_causal=is_causal, num_heads=NUM_HEADS, query_start=0
    )
    index = build_index(
        layout,
        is_causal=is_causal,
        num_heads=NUM_HEADS,
        query_end=query_end,
        key_end=key_end,
        tile_q=tile[0],
        tile_kv=tile[1],
        device=CPU,
    )
    lists = index.list_of[0].long().expand(NUM_HEADS)
    assert torch.equal(index.to_dense(query_end, key_end)[lists], expected)
    assert torch.equal(index.transpose_to_dense(query_end, key_end)[lists], expected)
    empty = (~expected.any(-1)).any(0).nonzero().squeeze(1)
    assert torch.equal(index.empty_rows, empty)


@settings(max_examples=100, deadline=None)
@given(layouts, st.booleans(), tiles, st.integers(0, LONGEST - 1), st.integers(1, LONGEST))
def test_the_index_of_later_queries_has_their_rows_of_the_whole(
    layout, is_causal, tile, query_begin, key_end
):
    options = dict(
        is_causal=is_causal,
        num_heads=NUM_HEADS,
        query_end=LONGEST,
        key_end=key_end,
        tile_q=tile[0],
        tile_kv=tile[1],
        device=CPU,
    )
    whole = build_index(layout, **options)
    part = build_index(layout, **options, query_begin=query_begin)
    first_row = query_begin // tile[0] * tile[0]
    assert part.first_q_tile * tile[0] == first_row
    assert torch.equal(part.list_of, whole.list_of) and part.heads_per_list == whole.heads_per_list
    for expected, rows in (
        (whole.to_dense(LONGEST, key_end), part.to_dense(LONGEST, key_end)),
        (whole.transpose_to_dense(LONGEST, key_end), part.transpose_to_dense(LONGEST, key_end)),
    ):
        assert torch.equal(rows[:, first_row:], expected[:, first_row:])
        assert not rows[:, :first_row].any()
    assert torch.equal(part.empty_rows, whole.empty_rows[whole.empty_rows >= first_row])
    assert part.longest_row == part.kv_offsets.diff(dim=1).max() <= whole.longest_row


@pytest.mark.parametrize("query_begin", [0, 70, 130])
def test_the_index_of_a_mask_of_later_queries(query_begin):
    """Rows of the mask are those of the query tensor; where its sequences stand, other ones may begin earlier."""
    table = torch.tensor([[0, 0, 9, 141, 0, 150, 0], [1, 2, 5, 130, 10, 120, 15]])
    sequences = Sequences(table, 2, 9, 150, 150, 150, False, False, query_begin=query_begin)
    mask = random_tensor(0, 2, 1, 9, 150)
    index = build_index_per_sequence(
        SlidingWindow(90), sequences, mask, is_causal=True, num_heads=1, tile_q=32, tile_kv=64,
        device=CPU, query_begin=query_begin,
    )  # fmt: skip
    dense = index.to_dense(150, 150)
    window = SlidingWindow(90).to_mask(150, is_causal=True)[0]
    for number, (batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos) in enumerate(table.tolist()):
        rows, cols = slice(q_pos, q_pos + q_len), slice(kv_pos, kv_pos + kv_len)
        expected = mask[batch, 0, q_row : q_row + q_len, kv_row : kv_row + kv_len]
        ours = dense[index.list_of[number, 0]]
        assert torch.equal(ours[rows, cols], expected & window[rows, cols])


@pytest.mark.parametrize(
    ("layout", "heads_per_list"),
    [
        (Dense(), 0),
        (BigBird(16), 1),
        (PerHead((Dense(),) * 4 + (SlidingWindow(9),) * 4), 4),
        (PerHead((Dense(),) * 3 + (SlidingWindow(9),) * 5), 1),
        (PerHead((Dense(),) * 2 + (SlidingWindow(9),) * 6), 2),
    ],
    ids=["one list", "by head", "two halves", "three and five", "two and six"],
)
def test_runs_of_heads_that_share_a_list(layout, heads_per_list):
    index = build_index(
        layout, is_causal=True, num_heads=8, query_end=400, key_end=400, tile_q=64, tile_kv=64,
        device=CPU,
    )  # fmt: skip
    assert index.heads_per_list == heads_per_list


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize(
    "layout",
    [
        MaskLayout.from_tensor(torch.ones(LONGEST, LONGEST)),
        MaskLayout.from_tensor(torch.ones(LONGEST, LONGEST)) & SlidingWindow(90),
        TensorLayout.from_tensor(torch.ones(19, 19), 16),
    ],
    ids=repr,
)
def test_tables_without_gaps_that_end_inside_a_tile(layout, tile):
    """The last tile of the diagonal has the mask of the first, whose rows do not end."""
    index = build_index(
        layout,
        is_causal=True,
        num_heads=1,
        query_end=LONGEST,
        key_end=LONGEST,
        tile_q=tile,
        tile_kv=tile,
        device=CPU,
    )
    expected = layout.to_mask(LONGEST, is_causal=True)
    assert torch.equal(index.to_dense(LONGEST, LONGEST), expected)
    assert torch.equal(index.transpose_to_dense(LONGEST, LONGEST), expected)


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
@pytest.mark.parametrize(
    "table",
    [
        TensorLayout.from_tensor(torch.eye(19).flip(0).tril(-3), 16),
        MaskLayout.from_tensor(torch.eye(LONGEST).flip(0).tril(-40)),
    ],
    ids=repr,
)
def test_a_table_united_with_a_window_that_ends_inside_a_tile(table, tile):
    """The diagonal's tiles keep nothing of the table; the last of them reaches past its end, and must not lend them its mask."""
    layout = table | SlidingWindow(20)
    index = build_index(
        layout,
        is_causal=True,
        num_heads=1,
        query_end=LONGEST,
        key_end=LONGEST,
        tile_q=tile,
        tile_kv=tile,
        device=CPU,
    )
    expected = layout.to_mask(LONGEST, is_causal=True)
    assert torch.equal(index.to_dense(LONGEST, LONGEST), expected)
    assert torch.equal(index.transpose_to_dense(LONGEST, LONGEST), expected)


@settings(max_examples=60, deadline=None)
@given(layouts, st.booleans(), tiles, st.integers(0, 9))
def test_lists_are_sorted_and_full_tiles_first(layout, is_causal, tile, seed):
    index = build_index(
        layout,
        is_causal=is_causal,
        num_heads=NUM_HEADS,
        query_end=LONGEST,
        key_end=LONGEST,
        tile_q=tile[0],
        tile_kv=tile[1],
        device=CPU,
    )
    for offsets, num_full, indices, mask_ids in (
        (index.kv_offsets, index.kv_num_full, index.kv_indices, index.kv_mask_ids),
        (index.q_offsets, index.q_num_full, index.q_indices, index.q_mask_ids),
    ):
        for line, full_line in zip(offsets.tolist(), num_full.tolist(), strict=True):
            for start, end, full in zip(line[:-1], line[1:], full_line, strict=True):
                split = start + full
                assert (mask_ids[start:split] == -1).all() and (mask_ids[split:end] >= 0).all()
                for part in (indices[start:split], indices[split:end]):
                    assert (part.diff() > 0).all()
    bits = index.bank_bits().flatten(1)
    assert bits.any(1).all() and not bits.all(1).any()


def build(layout, length, tile=128, is_causal=True, num_heads=1):
    return build_index(
        layout,
        is_causal=is_causal,
        num_heads=num_heads,
        query_end=length,
        key_end=length,
        tile_q=tile,
        tile_kv=tile,
        device=CPU,
    )


@pytest.mark.parametrize(
    ("layout", "masks"),
    [(Dense(), 1), (SlidingWindow(1000), 3), (SinkWindow(64, 1000), 6), (BigBird(128), 1)],
    ids=repr,
)
def test_equal_masks_are_stored_once_at_any_length(layout, masks):
    assert build(layout, 4096).bank.shape[0] <= masks
    assert build(layout, 4096).bank.shape == build(layout, 16384).bank.shape


def test_memory_is_linear_in_kept_tiles():
    short, long = build(SinkWindow(64, 1024), 1 << 14), build(SinkWindow(64, 1024), 1 << 17)
    assert long.num_tiles == pytest.approx(8 * short.num_tiles, rel=0.05)
    assert long.bank.shape == short.bank.shape
    fixed = 4 * short.bank.numel()
    assert long.num_bytes - fixed == pytest.approx(8 * (short.num_bytes - fixed), rel=0.05)


def test_bigbird_at_a_million_tokens_builds_in_seconds():
    start = time.perf_counter()
    index = build(BigBird(128), 1 << 20, num_heads=16)
    assert time.perf_counter() - start < 30
    assert index.num_lists == 16
    assert index.num_tiles < 16 * 8192 * 8
    assert index.num_bytes < 32 * 2**20


def test_a_mask_costs_only_its_partial_tiles():
    mask = torch.zeros(1024, 1024, dtype=torch.bool)
    mask[:128] = True
    mask[500, 700] = True
    index = build(MaskLayout.from_tensor(mask), 1024, is_causal=False)
    assert index.num_tiles == 9 and index.bank.shape[0] == 1


def test_heads_of_equal_layouts_share_a_list():
    layout = PerHead((Dense(), SlidingWindow(9), Dense(), SlidingWindow(9)))
    index = build(layout, 512, num_heads=4)
    assert index.num_lists == 2
    assert index.list_of.tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("per_query", [0, 40])
@pytest.mark.parametrize("strips", [(64, 16), (16, 64)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_strips_are_taken_up_to_their_share_of_the_coefficients(strips, is_causal, per_query):
    """The share is counted by hand; of a window it is nearly one."""
    length = 256
    layout = TensorLayout.from_tensor(
        random_tensor(2, NUM_HEADS, 16, 16) | torch.eye(16).bool(), 16
    )
    options = dict(
        is_causal=is_causal, num_heads=NUM_HEADS, query_end=length, key_end=length,
        tile_q=64, tile_kv=64, device=CPU,
    )  # fmt: skip
    mask = layout.to_mask(length, is_causal=is_causal, num_heads=NUM_HEADS)

    def computed(tile_q, tile_kv):
        tiles = mask.unflatten(2, (-1, tile_kv)).unflatten(1, (-1, tile_q))
        return int(tiles.any(4).any(2).sum()) * tile_q * tile_kv + per_query * NUM_HEADS * length

    share = computed(*strips) / computed(64, 64)
    assert share < 0.9
    for max_share, tile in ((share + 1e-6, strips), (share - 1e-6, (64, 64))):
        kind = Strips(*strips, max_share, per_query=per_query)
        index = build_index(layout, strips=(kind,), **options)
        assert (index.tile_q, index.tile_kv) == tile
        assert torch.equal(index.to_dense(length, length), mask)
        assert torch.equal(index.transpose_to_dense(length, length), mask)
    window = build_index(SlidingWindow(200), strips=(Strips(*strips, 0.7),), **options)
    assert (window.tile_q, window.tile_kv) == (64, 64)


def test_tiles_of_a_shape_are_counted_once_for_all_kernels(monkeypatch):
    counted = []

    def count(groups, tile_q, tile_kv, *span_and_device):
        counted.append((tile_q, tile_kv))
        return computed(groups, tile_q, tile_kv, *span_and_device)

    computed = block_index._computed
    monkeypatch.setattr(block_index, "_computed", count)
    block_index.clear_cache()
    layout = TensorLayout.from_tensor(random_tensor(2, NUM_HEADS, 16, 16), 16)
    where = Sequences.uniform(1, 256, 256, 0, CPU)

    def choose(tile, *shapes, is_causal=False):
        strips = tuple(Strips(*shape, 0.7) for shape in shapes)
        return get_index(
            layout, where, is_causal=is_causal, attn_mask=None, num_heads=NUM_HEADS,
            tile_q=tile, tile_kv=tile, device=CPU, strips=strips,
        )  # fmt: skip

    choose(64, (64, 16), (16, 16))
    choose(32, (64, 16), (16, 16))
    assert counted == [(64, 64), (64, 16), (16, 16), (32, 32)]
    choose(64, (16, 16), is_causal=True)
    block_index.clear_cache()
    choose(64, (16, 16))
    assert counted[4:] == 2 * [(64, 64), (16, 16)]


@pytest.mark.parametrize(
    "tile_kv, group_size, heads_per_list, expected",
    [
        (16, 4, 0, (16, 16, 1.0)),
        (32, 4, 4, (32, 32, 1.0)),
        (16, 8, 8, (16, 16, 1.0)),
        (16, 4, 6, (32, 16, 1.0)),
        (16, 3, 3, (16, 16, 4 / 3)),
        (32, 3, 0, (32, 32, 4 / 3)),
        (16, 4, 1, None),
        (16, 1, 0, (64, 16, 1.0)),
        (64, 4, 0, None),
    ],
)
def test_heads_that_share_a_list_fill_strips_together(
    tile_kv, group_size, heads_per_list, expected
):
    """Shapes, and rows of tiles for one that is there: three heads fill four places, or two and two."""
    assert Strips(64, tile_kv, 0.7, group_size).shape(heads_per_list) == expected


def test_packed_strips_are_taken_where_they_compute_the_least():
    length, heads = 256, 6
    options = dict(
        is_causal=False, num_heads=heads, query_end=length, key_end=length,
        tile_q=64, tile_kv=64, device=CPU,
    )  # fmt: skip
    scattered = TensorLayout.from_tensor(random_tensor(3, 16, 16) | torch.eye(16).bool(), 16)
    # Runs of four equal block rows, which strips of 64 queries hold without a loss; three heads would fill three of four places.
    striped = TensorLayout.from_tensor(random_tensor(3, 4, 16).repeat_interleave(4, 0), 16)
    for layout, group_size, shape in (
        (scattered, 3, (16, 16)),
        (scattered, 1, (64, 16)),
        (striped, 3, (64, 16)),
        (striped, 2, (32, 16)),
    ):
        strips = (Strips(64, 16, 1.0), Strips(64, 16, 1.0, group_size))
        index = build_index(layout, strips=strips, **options)
        assert (index.tile_q, index.tile_kv) == shape
        mask = layout.to_mask(length, num_heads=heads)[: index.num_lists]
        assert torch.equal(index.to_dense(length, length), mask)


def get(layout, sequences, **changes):
    options = dict(
        is_causal=True,
        attn_mask=None,
        num_heads=2,
        tile_q=64,
        tile_kv=64,
        device=CPU,
    )
    return get_index(layout, sequences, **(options | changes))


def test_cache_hits_equal_calls_and_no_others():
    block_index.clear_cache()
    uniform = Sequences.uniform(2, 256, 256, 0, CPU)
    first = get(SlidingWindow(9), uniform)
    assert get(SlidingWindow(9), uniform) is first
    # Decoding: one index serves the following lengths.
    assert get(SlidingWindow(9), Sequences.uniform(1, 1, 250, 249, CPU)) is first
    assert get(SlidingWindow(10), uniform) is not first
    assert get(SlidingWindow(9), uniform, is_causal=False) is not first
    assert get(SlidingWindow(9), uniform, tile_q=128) is not first
    assert get(SlidingWindow(9), uniform, num_heads=4) is not first
    assert get(SlidingWindow(9), Sequences.uniform(1, 1000, 1000, 0, CPU)) is not first


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(block_index, "CACHED_INDICES", 3)
    block_index.clear_cache()
    uniform = Sequences.uniform(1, 64, 64, 0, CPU)
    kept = [get(SlidingWindow(window), uniform) for window in range(1, 7)]
    assert len(block_index._cache.entries) == 3
    assert get(SlidingWindow(6), uniform) is kept[-1]
    assert block_index._cache.num_bytes == sum(
        index.num_bytes for index in block_index._cache.entries.values()
    )


def test_threads_that_build_the_same_count_it_once():
    cache = block_index._IndexCache()
    built = build_index(Dense(), is_causal=True, num_heads=1, query_end=64, key_end=64,
                        tile_q=64, tile_kv=64, device=CPU)  # fmt: skip
    both_build = threading.Barrier(2)

    def build():
        both_build.wait(timeout=10)
        return built

    threads = [threading.Thread(target=cache.get, args=("key", build)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.num_bytes == built.num_bytes


def test_a_mask_is_known_by_identity_and_version():
    uniform = Sequences.uniform(1, 64, 64, 0, CPU)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    first = get(Dense(), uniform, attn_mask=mask)
    assert get(Dense(), uniform, attn_mask=mask) is first
    mask[0, 0, 5, 3] = False
    changed = get(Dense(), uniform, attn_mask=mask)
    assert not changed.to_dense(64, 64)[0, 5, 3]
    assert first.to_dense(64, 64)[0, 5, 3]


def test_lists_per_sequence_where_the_layout_depends_on_the_length():
    layout = BigBird(16)
    ids = torch.tensor([[0] * 100 + [1] * 60 + [2] * 100 + [-1] * 40])
    sequences = Sequences.from_document_ids(ids)
    index = build_index_per_sequence(
        layout,
        sequences,
        None,
        is_causal=False,
        num_heads=2,
        tile_q=64,
        tile_kv=64,
        device=CPU,
    )
    lists = index.list_of.tolist()
    assert lists[0] == lists[2] and lists[0] != lists[1]  # equal lengths share
    for number, length in ((0, 100), (1, 60)):
        expected = layout.to_mask(length, num_heads=2)
        assert torch.equal(index.to_dense(length, length)[lists[number]], expected)


def test_repr_tells_size():
    text = repr(build(SlidingWindow(100), 1024))
    assert text.startswith("BlockIndex(tile=128x128, lists=1, grid=8x8, tiles=15 (15 partial)")


def test_equal_heads_of_a_tensor_share_a_list():
    blocks = torch.tril(torch.ones(4, 4)).expand(3, 4, 4)
    layout = TensorLayout.from_tensor(blocks, 128)
    assert layout.fixed_heads == 3
    assert build(layout, 512, num_heads=3).num_lists == 1
