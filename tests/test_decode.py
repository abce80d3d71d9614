"""Few queries against many keys: the decode kernels against dense attention in float64, and what a step of decoding costs."""

import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import Results, assert_close_to_reference, dense_attention, make_qkv, torch_attention
from torch.utils._python_dispatch import TorchDispatchMode

from hf_blocksparse import (
    BigBird,
    BlockDiagonal,
    Dense,
    Layout,
    Longformer,
    MaskLayout,
    PerHead,
    Sequences,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
    block_index,
    block_sparse_attention,
)
from hf_blocksparse.block_index import clear_cache, get_index
from hf_blocksparse.ops.triton import decode_sizes, launch
from hf_blocksparse.ops.triton.decode_sizes import DecodeSizes

HAS_GPU = torch.cuda.is_available()
INTERPRETED = pytest.param(
    "cpu", marks=pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here; run with -m gpu")
)
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = [INTERPRETED, ON_GPU]
CPU = torch.device("cpu")


@pytest.fixture
def decoded(monkeypatch):
    """Counts the calls that the decode kernels ran."""
    calls = Counter()
    run = launch.launch_decode

    def counted(*arguments):
        calls["decode"] += 1
        return run(*arguments)

    monkeypatch.setattr(launch, "launch_decode", counted)
    return calls


@dataclass(frozen=True)
class Decode:
    """One call. `real`: (first, end) of the keys of each batch row that are not padding."""

    layout: Layout
    query_len: int
    kv_len: int
    is_causal: bool = True
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    mask_density: float | None = None
    real: tuple[tuple[int, int], ...] | None = None
    holes: bool = False
    query_start: int | None = None
    rows_outside_heads: bool = False


def check(case: Decode, device: str) -> None:
    """Compares with float64; keys and queries of padding are NaN, which must not show anywhere."""
    query, key, value = make_qkv(
        case.batch, case.heads, case.kv_heads, case.query_len, case.kv_len, case.head_dim,
        case.value_dim, dtype=case.dtype, device=device, rows_outside_heads=case.rows_outside_heads,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.heads, case.query_len, case.kv_len)
    start = case.kv_len - case.query_len if case.query_start is None else case.query_start
    sinks = torch.randn(case.heads, generator=generator).to(device) if case.sinks else None
    slopes = torch.rand(case.batch, case.heads, generator=generator) if case.alibi else None
    attn_mask = None
    if case.mask_density is not None:
        attn_mask = torch.rand(shape, generator=generator) < case.mask_density

    mask = torch.zeros(shape, dtype=torch.bool)
    padding = torch.zeros(case.batch, case.kv_len, dtype=torch.bool)
    nobody = torch.zeros(shape[:3], dtype=torch.bool)
    for row, (first, end) in enumerate(case.real or ((0, case.kv_len),) * case.batch):
        options = dict(is_causal=case.is_causal, num_heads=case.heads, query_start=0)
        whole = case.layout.to_mask(max(end, start + case.query_len) - first, **options)
        for number in range(case.query_len):
            position = start + number - first
            if position < 0 or (start + number >= end and end < case.kv_len):
                nobody[row, :, number] = True
            else:
                mask[row, :, number, first:end] = whole[:, position, : end - first]
        padding[row, first:end] = True
    hidden = ~padding
    if case.holes:
        padding &= torch.rand(padding.shape, generator=generator) < 0.8
        # What is real is seen by its first and last token.
        for row, (first, end) in enumerate(case.real):
            padding[row, [first, end - 1]] = True
        mask &= padding[:, None, None]
    if attn_mask is not None:
        mask &= attn_mask
    bias = None
    if slopes is not None:
        distance = (start + torch.arange(case.query_len))[:, None] - torch.arange(case.kv_len)
        bias = (-slopes.double()[..., None, None] * distance.abs()).to(device)

    call = dict(
        is_causal=case.is_causal,
        attn_mask=None if attn_mask is None else attn_mask.to(device),
        key_padding_mask=None if case.real is None else padding.to(device),
        query_start=case.query_start,
        scale=case.scale,
        softcap=case.softcap,
        sinks=sinks,
        alibi_slopes=None if slopes is None else slopes.to(device),
        allow_empty_rows=True,
        return_lse=True,
        impl="triton",
    )
    hidden = hidden[:, None, :, None].to(device)
    rows = nobody[..., None].to(device)
    out, lse = block_sparse_attention(
        query.masked_fill(rows, math.nan),
        key.masked_fill(hidden, math.nan),
        value.masked_fill(hidden, math.nan),
        case.layout,
        **call,
    )
    theirs = dict(scale=case.scale, softcap=case.softcap, sinks=sinks, bias=bias)
    mask, nobody = mask.to(device), nobody.to(device)
    exact = dense_attention(query.double(), key.double(), value.double(), mask, **theirs)
    other, _ = torch_attention(query, key, value, mask, **theirs)
    # A row of nobody has no sink either.
    exact = exact[0], exact[1].masked_fill(nobody, -math.inf)
    none = (None,) * 3
    assert_close_to_reference(
        Results(out, lse, *none), Results(*exact, *none), Results(other, None, *none)
    )


def random_tensor(heads: int, blocks: int, block_size: int, kept: float = 0.4) -> TensorLayout:
    generator = torch.Generator().manual_seed(heads + blocks)
    return TensorLayout.from_tensor(
        torch.rand(heads, blocks, blocks, generator=generator) < kept, block_size
    )


WINDOW = SlidingWindow(40)
SINK = SinkWindow(4, 90)
SHARED_IN_PAIRS = PerHead((Dense(), Dense(), WINDOW, WINDOW))

CASES = {
    "one query": Decode(SINK, 1, 300),
    "one query of a dense layout": Decode(Dense(), 1, 333, heads=4, kv_heads=2),
    "one query that reads both ways": Decode(SINK, 1, 200, is_causal=False),
    "few queries": Decode(SINK, 3, 200, heads=4, kv_heads=1),
    "few queries that read both ways": Decode(Longformer(60), 5, 200, is_causal=False),
    "queries over the edge of a tile": Decode(WINDOW, 7, 132, heads=6, kv_heads=2),
    "64 queries": Decode(WINDOW, 64, 300, heads=4, kv_heads=2),
    "groups of three": Decode(SINK, 2, 150, heads=6, kv_heads=2),
    "a group larger than a product": Decode(SINK, 1, 100, heads=40, kv_heads=1),
    "queries before the end of the keys": Decode(WINDOW, 2, 300, query_start=100),
    "random blocks of all heads": Decode(random_tensor(1, 10, 32), 2, 300, heads=4, kv_heads=2),
    "random blocks by head": Decode(random_tensor(4, 20, 16), 2, 300, heads=4, kv_heads=2),
    "a layout for two heads of four": Decode(SHARED_IN_PAIRS, 1, 200, heads=4, kv_heads=1),
    "bigbird": Decode(BigBird(32), 2, 270, heads=4, kv_heads=2),
    "mask layout": Decode(MaskLayout.from_tensor(torch.eye(200).roll(-9, 1)), 3, 200),
    "rows without keys": Decode(random_tensor(2, 5, 64, 0.1), 4, 300, sinks=True),
    "value size of its own": Decode(SINK, 1, 150, head_dim=40, value_dim=24),
    "softcap, sinks, ALiBi": Decode(
        SINK, 2, 150, batch=2, heads=4, kv_heads=2, softcap=2.0, sinks=True, alibi=True
    ),
    "negative scale": Decode(SINK, 1, 150, scale=-0.3),
    "attn_mask": Decode(SINK, 3, 200, batch=2, heads=4, kv_heads=2, mask_density=0.5),
    "padding": Decode(SINK, 1, 150, batch=3, real=((40, 150), (0, 150), (149, 150)), sinks=True),
    "padding on both sides": Decode(
        SINK, 5, 150, batch=3, heads=4, kv_heads=2, real=((40, 148), (0, 150), (20, 100))
    ),
    "padding with holes": Decode(SINK, 2, 200, batch=2, real=((40, 200), (0, 200)), holes=True),
    "rows outside heads": Decode(SINK, 2, 150, batch=2, heads=4, rows_outside_heads=True),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_decode_matches_dense_attention(name, device, poisoned_memory, decoded):
    clear_cache()
    check(CASES[name], device)
    assert decoded["decode"] == 1


@pytest.mark.parametrize("name", ["few queries", "softcap, sinks, ALiBi", "padding"])
@pytest.mark.parametrize("device", DEVICES)
def test_decode_matches_dense_attention_in_float16(name, device, poisoned_memory, decoded):
    check(replace(CASES[name], dtype=torch.float16), device)
    assert decoded["decode"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_decode_on_tensor_cores(name, dtype, poisoned_memory, decoded):
    check(replace(CASES[name], dtype=dtype), "cuda")
    assert decoded["decode"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "layout", [Dense(), SinkWindow(64, 960), BigBird(16), BigBird(128)], ids=repr
)
def test_decode_at_every_head_size(layout, dtype, head_dim, decoded):
    for query_len, kv_heads in ((1, 2), (1, 8), (5, 1)):
        check(
            Decode(
                layout,
                query_len,
                5000,
                heads=8,
                kv_heads=kv_heads,
                head_dim=head_dim,
                value_dim=head_dim,
                dtype=dtype,
            ),
            "cuda",
        )
    assert decoded["decode"] == 3


@settings(max_examples=12, deadline=None)
@given(
    st.data(),
    st.sampled_from((1, 1, 2, 5, 17)),
    st.integers(1, 220),
    st.booleans(),
    st.sampled_from(((2, 1), (4, 2), (3, 3), (7, 1))),
)
@pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here; test_decode_of_random_calls runs")
def test_random_decode_matches_dense_attention(data, query_len, kv_len, is_causal, heads):
    check(random_case(data.draw, query_len, max(kv_len, 4 * query_len), is_causal, heads), "cpu")


@pytest.mark.gpu
@settings(max_examples=400, deadline=None)
@given(
    st.data(),
    st.integers(1, 64),
    st.integers(1, 3000),
    st.booleans(),
    st.sampled_from(((2, 1), (4, 2), (3, 3), (7, 1), (32, 8), (71, 1))),
)
def test_decode_of_random_calls(data, query_len, kv_len, is_causal, heads):
    case = random_case(data.draw, query_len, max(kv_len, 4 * query_len), is_causal, heads)
    dtype = data.draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    head_dim = data.draw(st.sampled_from((16, 64, 96, 128)))
    check(replace(case, dtype=dtype, head_dim=head_dim, value_dim=head_dim), "cuda")


def random_case(draw, query_len, kv_len, is_causal, heads) -> Decode:
    size = draw(st.sampled_from((16, 32, 64, 128)))
    layout = draw(
        st.one_of(
            st.just(Dense()),
            st.builds(SlidingWindow, st.integers(1, 300)),
            st.builds(SinkWindow, st.integers(1, 70), st.integers(1, 150)),
            st.builds(BlockDiagonal, st.integers(1, 200)),
            st.just(BigBird(size)),
            st.just(random_tensor(1, -(-kv_len // size), size)),
            st.just(random_tensor(heads[0], -(-kv_len // size), size)),
        )
    )
    batch = draw(st.integers(1, 2))
    real = None
    if draw(st.booleans()):
        firsts = draw(st.lists(st.integers(0, kv_len - 1), min_size=batch, max_size=batch))
        real = tuple((first, draw(st.integers(first + 1, kv_len))) for first in firsts)
    return Decode(
        layout,
        query_len,
        kv_len,
        is_causal,
        batch,
        *heads,
        sinks=draw(st.booleans()),
        mask_density=draw(st.sampled_from((None, None, 0.3))),
        real=real,
        holes=real is not None and draw(st.booleans()),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_results_do_not_depend_on_sizes_and_splits(device, monkeypatch, poisoned_memory):
    for splits, tile_q, tile_kv, max_rows in ((1, 16, 64, 16), (3, 128, 16, 64), (20, 32, 32, 16)):
        sizes = DecodeSizes(tile_q, tile_kv, max_rows, num_warps=4, num_stages=2)
        monkeypatch.setattr(launch, "decode_sizes", lambda *_, sizes=sizes: sizes)
        monkeypatch.setattr(launch, "num_splits", lambda *_, splits=splits: splits)
        check(CASES["padding on both sides"], device)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_nobody_do_not_depend_on_what_memory_held(device, monkeypatch):
    """No split writes them: sums that happen to be positive there must not count."""
    allocate = torch.Tensor.new_empty

    def ones(*arguments, **options):
        return allocate(*arguments, **options).fill_(1)

    monkeypatch.setattr(torch.Tensor, "new_empty", ones)
    for splits in (1, 2):
        monkeypatch.setattr(launch, "num_splits", lambda *_, splits=splits: splits)
        check(replace(CASES["padding on both sides"], heads=2), device)


@pytest.mark.gpu
def test_a_captured_step_replays_with_other_numbers():
    def step(seed: int):
        return make_qkv(2, 8, 2, 1, 3000, 64, 64, dtype=torch.bfloat16, device="cuda", seed=seed)

    def attend(query, key, value):
        return block_sparse_attention(query, key, value, SinkWindow(64, 960), is_causal=True)

    held, other = step(0), step(1)
    expected = attend(*other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*held)
    for tensor, new in zip(held, other, strict=True):
        tensor.copy_(new)
    graph.replay()
    assert torch.equal(out, expected)
    clear_cache()


def sequences_of(table, batch, query_len, kv_len, device) -> Sequences:
    return Sequences(
        torch.tensor(table, dtype=torch.int32, device=device),
        batch=batch,
        query_len=query_len,
        kv_len=kv_len,
        query_end=max(row[3] + row[2] for row in table),
        key_end=max(row[6] + row[5] for row in table),
        covers_queries=False,
        covers_keys=False,
        query_begin=min(row[3] for row in table if row[2]),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_several_sequences_in_a_batch_row(is_causal, device, poisoned_memory, decoded):
    """Documents of a batch with keys of their own, also ones whose first keys are gone, a part of whose keys lie elsewhere, or empty."""
    table = [
        # batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos
        [0, 0, 1, 99, 0, 100, 0],
        [0, 1, 3, 150, 100, 60, 93],
        [0, 4, 0, 7, 160, 0, 0],
        [1, 2, 2, 140, 30, 142, 0],
        [1, 0, 2, 70, 172, 20, 11],
    ]
    layout = SinkWindow(20, 60)
    sequences = sequences_of(table, 2, 6, 200, device)
    query, key, value = make_qkv(2, 4, 2, 6, 200, 16, 16, dtype=torch.float32, device=device)
    out, lse = block_sparse_attention(
        query, key, value, layout, is_causal=is_causal, sequences=sequences, return_lse=True,
        allow_empty_rows=True, impl="triton",
    )  # fmt: skip
    assert decoded["decode"] == 1
    expected, expected_lse = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    whole = layout.to_mask(300, is_causal=is_causal)[0].to(device)
    for batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos in table:
        if q_len:
            rows, cols = slice(q_row, q_row + q_len), slice(kv_row, kv_row + kv_len)
            mask = whole[q_pos : q_pos + q_len, kv_pos : kv_pos + kv_len]
            part, part_lse = dense_attention(
                query[batch : batch + 1, :, rows], key[batch : batch + 1, :, cols],
                value[batch : batch + 1, :, cols], mask.expand(1, 4, -1, -1),
            )  # fmt: skip
            expected[batch, :, rows], expected_lse[batch, :, rows] = part[0], part_lse[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_few_queries(device, decoded):
    """The ordinary backward takes what the decode kernels return."""
    leaves = [
        tensor.requires_grad_()
        for tensor in make_qkv(1, 4, 2, 3, 130, 16, 24, dtype=torch.float32, device=device)
    ]

    def gradients(impl):
        out, lse = block_sparse_attention(
            *leaves, SINK, is_causal=True, return_lse=True, sinks=torch.ones(4, device=device),
            impl=impl,
        )  # fmt: skip
        return torch.autograd.grad(out.square().sum() + lse.sum(), leaves)

    for ours, theirs in zip(gradients("triton"), gradients("torch"), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert decoded["decode"] == 1


@pytest.mark.parametrize("device", DEVICES)
def test_other_calls_go_to_the_ordinary_kernels(device, decoded):
    query, key, value = make_qkv(1, 2, 2, 1, 130, 16, 16, dtype=torch.float32, device=device)

    def attend(impl):
        torch.manual_seed(0)
        return block_sparse_attention(query, key, value, WINDOW, dropout_p=0.5, impl=impl)

    torch.testing.assert_close(attend("triton"), attend("torch"))
    assert not decoded
    assert not decode_sizes.has_few_queries(65, 10_000, 0.0)
    assert not decode_sizes.has_few_queries(64, 200, 0.0)
    assert decode_sizes.has_few_queries(64, 256, 0.0)


def test_splits_fill_the_device_and_no_more(monkeypatch):
    monkeypatch.setattr(decode_sizes, "processors", lambda device: 132)
    assert decode_sizes.num_splits(8, 66, CPU) == 33
    assert decode_sizes.num_splits(8, 10, CPU) == 10
    assert decode_sizes.num_splits(1, 10_000, CPU) == decode_sizes.MAX_SPLITS
    assert decode_sizes.num_splits(1000, 10_000, CPU) == 1


def builds_of(monkeypatch) -> list[int]:
    """A list that gets the number of tiles of each index that is built from now on."""
    clear_cache()
    built: list[int] = []
    build = block_index._build

    def counted(*arguments):
        index = build(*arguments)
        built.append(index.num_tiles)
        return index

    monkeypatch.setattr(block_index, "_build", counted)
    return built


@pytest.mark.parametrize("is_causal", [True, False])
def test_steps_cost_no_more_with_a_longer_cache(is_causal, monkeypatch):
    """Builds, their size and the tiles of a step, over 3,000 steps of one query from two lengths on."""
    layout = SinkWindow(128, 3968)

    built = builds_of(monkeypatch)

    def steps_from(length: int) -> tuple[list[int], set[int]]:
        visited: set[int] = set()
        built.clear()

        def attention(query, key, value, sinks, slopes, problem, scale):
            index = problem.index_for(64, 64, True)
            tile = problem.sequences.query_begin // 64 - index.first_q_tile
            visited.add(int(index.kv_offsets[0, tile : tile + 2].diff()))
            return query, query

        monkeypatch.setattr(launch, "launch_decode", attention)
        one = torch.zeros(1, 1, 1, 16)
        for kv_len in range(length, length + 3000, 7):
            key = one.expand(1, 1, kv_len, 16)
            block_sparse_attention(one, key, key, layout, is_causal=is_causal, impl="triton")
        return list(built), visited

    short, long = steps_from(4224), steps_from(1 << 16)
    assert short == long
    sizes, visited = long
    assert len(sizes) <= 4, "an index serves 1,024 positions"
    assert max(sizes) <= 16 * max(visited) and max(visited) <= 4096 // 64 + 2


@pytest.mark.parametrize("layout", [SinkWindow(16, 240), SlidingWindow(100)], ids=repr)
def test_torch_operations_of_a_step_do_not_grow_with_the_cache(layout):
    class Operations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.largest = self.count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.count += 1
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.untyped_storage().nbytes())
            return result

    def step(kv_len: int) -> tuple[int, int]:
        query, key = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16).expand(1, 2, kv_len, 16)
        block_sparse_attention(query, key, key, layout, is_causal=True, impl="torch")  # builds
        with Operations() as seen:
            block_sparse_attention(query, key, key, layout, is_causal=True, impl="torch")
        return seen.count, seen.largest

    clear_cache()
    assert step(1500) == step(100_000 // 64 * 64 + 1500 % 64)


def test_a_masked_step_builds_no_more_than_its_rows(monkeypatch):
    """An `attn_mask` and holes in the padding are indexed anew in each step, by the rows they have."""
    built = builds_of(monkeypatch)
    query, key = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16).expand(1, 1, 40_000, 16)
    mask = torch.arange(40_000)[None, :] % 3 > 0
    for options in (dict(attn_mask=mask), dict(key_padding_mask=mask)):
        built.clear()
        block_sparse_attention(
            query, key, key, SINK, is_causal=True, impl="torch", **options, allow_empty_rows=True
        )
        assert built[-1] <= 4


def test_equal_kernels_serve_a_growing_cache():
    """What a compiled variant is looked up by does not change with every token."""

    def kind(kv_len: int):
        key = torch.zeros(1, 2, kv_len, 16).transpose(1, 2).contiguous().transpose(1, 2)
        rows = launch._rows(torch.zeros(1, 2, kv_len, 16))
        return launch._kind_of(rows), launch._kind_of(launch._rows(key)), launch._kind_of(kv_len)

    assert len({kind(length) for length in range(17, 32)}) == 1
    assert launch._kind_of(1) != launch._kind_of(2) != launch._kind_of(32)
    assert launch._kind_of(2) != launch._kind_of(2**31)


def test_the_index_of_a_few_queries():
    clear_cache()
    options = dict(
        is_causal=True, attn_mask=None, num_heads=1, tile_q=64, tile_kv=64, device=CPU,
    )  # fmt: skip

    def at(position: int, **changes):
        sequences = Sequences.uniform(1, 1, position + 1, position, CPU)
        return get_index(SINK, sequences, **options | dict(of_queries_alone=True) | changes)

    first = at(50_000)
    assert first.first_q_tile == 50_000 // 1024 * 16 and first.num_q_tiles == 16
    assert all(at(position) is first for position in range(49_152, 50_176, 100))
    assert at(50_176) is not first
    whole = at(50_000, of_queries_alone=False)
    assert whole.first_q_tile == 0
    prompt = Sequences.uniform(1, 700, 1000, 300, CPU)
    assert get_index(SINK, prompt, **options, of_queries_alone=True).first_q_tile == 0


@pytest.mark.parametrize("cache", ["dynamic", "static", "sparse"])
@pytest.mark.parametrize("pad", [0, 3])
def test_generation_builds_one_index_for_its_steps(cache, pad, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_blocksparse import SparseCache, patch_model

    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, vocab_size=40, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    patch_model(model, SinkWindow(2, 20))
    tokens = torch.arange(1, 41)[None].repeat(2, 1) % 39 + 1
    mask = torch.ones_like(tokens)
    mask[1, :pad] = 0
    built = builds_of(monkeypatch)
    options = dict(do_sample=False, max_new_tokens=30, min_new_tokens=30)
    if cache == "static":
        options |= dict(cache_implementation="static", disable_compile=True)
    elif cache == "sparse":
        options["past_key_values"] = SparseCache(model)
    model.generate(tokens, attention_mask=mask, **options)
    assert len(built) <= 2, "one for the prompt, one for all steps"
