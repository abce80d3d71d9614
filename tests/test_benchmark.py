"""The benchmark gives its peers the mask it claims, judges them by the truth, survives them, and writes what it measured."""

import argparse
import contextlib
import gc
import json
import os
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import bad_worker
import benchmark
import benchmark_cases
import benchmark_cpu
import benchmark_peers
import benchmark_results
import plot
from benchmark_cases import GRIDS, IMPLEMENTATIONS, Case
from benchmark_process import Worker, WorkerFailure
from benchmark_results import CaseResult, GridResults, Row
from benchmark_worker import CALLS, GRAPHS, Session

from hf_blocksparse.block_index import clear_cache
from hf_blocksparse.evaluation import in_fresh_process, measure_cost
from hf_blocksparse.run_record import read_record, to_plain, write_record

CPU = torch.device("cpu")
SMALL = Case("causal", 1, 256, 16, heads=2, kv_heads=2, dtype="float32")


def small(layout, block_size=1, **changes):
    return replace(SMALL, layout=layout, block_size=block_size, **changes)


CASES = [small(name) for name in benchmark_cases.TOKEN_EXACT if not name.endswith("k")]
CASES += [small(name, block) for block in (16, 128) for name in ("block_window", "bigbird")]
CASES += [small(name, block) for block in (32, 64) for name in ("random50", "causal_random25")]
CASES += [small("window", length_tokens=512), small("longformer", length_tokens=512)]


def dense_mask(case):
    return benchmark_cases.make_layout(case).to_mask(
        case.length_tokens, is_causal=case.is_causal, num_heads=case.heads
    )


def dense_of_lists(lists, transposed, case, tile, mask):
    """What a peer computes: full tiles whole, partial ones where its mask says so."""
    length = case.length_tokens
    dense = torch.zeros(case.heads, length, length, dtype=torch.bool)
    place = torch.arange(tile)
    for kind in ("partial", "full"):
        counts = getattr(lists, f"{kind}_counts")[0].expand(case.heads, -1)
        indices = getattr(lists, f"{kind}_indices")[0].expand(case.heads, -1, -1)
        for head in range(case.heads):
            for line, count in enumerate(counts[head].tolist()):
                listed = indices[head, line, :count].tolist()
                assert listed == sorted(set(listed))
                for other in listed:
                    row, col = (other, line) if transposed else (line, other)
                    rows, cols = row * tile + place, col * tile + place
                    kept = torch.ones(tile, tile, dtype=torch.bool)
                    if kind == "partial":
                        kept = mask(torch.tensor(0), torch.tensor(head), rows[:, None], cols)
                    window = dense[head, rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
                    assert not window.any()
                    window.copy_(kept)
    return dense


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_peers_get_the_layouts_mask(case, tile):
    if case.block_size > tile:
        return
    layout, expected = benchmark_cases.make_layout(case), dense_mask(case)
    index = benchmark_cases.exact_index(case, layout, tile, CPU)
    mask = benchmark_peers.position_mask(case, layout, tile, CPU)
    for transposed in (False, True):
        for is_compact in (False, True):
            lists = benchmark_peers.tile_lists(index, transposed=transposed, is_compact=is_compact)
            if mask is None:
                assert not lists.partial_counts.any()
            assert dense_of_lists(lists, transposed, case, tile, mask).equal(expected)
    kept, computed = benchmark_cases.kept_and_computed(index, case.heads)
    assert kept == expected.sum() <= computed


def test_flex_block_mask_is_what_torch_would_derive():
    case = small("bigbird", 16, length_tokens=512)
    mask = benchmark_peers.flex_block_mask(case, benchmark_cases.make_layout(case), CPU)
    same = type(mask).from_kv_blocks(
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        BLOCK_SIZE=64,
        mask_mod=mask.mask_mod,
    )
    blocks = dense_mask(case).view(2, 8, 64, 8, 64).any(-1).any(2)
    assert mask.to_dense()[0].bool().equal(blocks)
    assert mask.shape == same.shape
    for kind in ("", "full_"):
        counts, indices = f"{kind}q_num_blocks", f"{kind}q_indices"
        assert getattr(mask, counts).equal(getattr(same, counts))
        valid = torch.arange(8) < getattr(mask, counts)[..., None]
        ours, theirs = getattr(mask, indices), getattr(same, indices)
        assert ours.shape == theirs.shape and ours[valid].equal(theirs[valid])


@pytest.fixture
def cute_masks(monkeypatch):
    """The masks for FlashAttention-4 with CuTe's vectors of one element played by tensors."""
    cutlass = types.ModuleType("cutlass")
    cutlass.cute = types.ModuleType("cutlass.cute")
    cutlass.Int32, cutlass.cute.jit = torch.int32, lambda function: function
    flash = {name: types.ModuleType(name) for name in ("flash_attn", "flash_attn.cute")}
    flash["flash_attn"].cute = flash["flash_attn.cute"]
    flash["flash_attn.cute"].utils = types.SimpleNamespace(
        scalar_to_ssa=lambda value, dtype: torch.as_tensor(value, dtype=dtype).reshape(1)
    )
    for name, module in {"cutlass": cutlass, "cutlass.cute": cutlass.cute, **flash}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "benchmark_cute_masks", raising=False)
    yield
    sys.modules.pop("benchmark_cute_masks", None)


@pytest.mark.parametrize("case", [case for case in CASES if case.layout != "full"], ids=str)
def test_masks_for_flash_attention_4_agree_with_the_layout(case, cute_masks):
    if not benchmark_cases.applies("fa4", case):
        return
    tile = 128 if case.block_size in (1, 128) else 64
    layout, expected = benchmark_cases.make_layout(case), dense_mask(case)
    mask, tensors = benchmark_peers.cute_mask(case, layout, tile, CPU)
    index = benchmark_cases.exact_index(case, layout, tile, CPU)
    if mask is None:
        assert (index.kv_mask_ids < 0).all()
        return
    lists = benchmark_peers.tile_lists(index)
    if tensors is None:

        def of_tiles(batch, head, q, kv):
            return mask(batch, head, q, kv, None, None)

        assert dense_of_lists(lists, False, case, tile, of_tiles).equal(expected)
        return
    # Reads its table at one coefficient at a time.
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        head = int(torch.randint(2, (), generator=generator))
        counts = lists.partial_counts[0].expand(2, -1)[head]
        line = int(torch.multinomial(counts.float(), 1, generator=generator))
        which = int(torch.randint(int(counts[line]), (), generator=generator))
        col = int(lists.partial_indices[0].expand(2, -1, -1)[head, line, which])
        q, kv = (int(torch.randint(tile, (), generator=generator)) for _ in range(2))
        q, kv = line * tile + q, col * tile + kv
        vectors = (torch.tensor([n], dtype=torch.int32) for n in (0, head, q, kv))
        assert bool(mask(*vectors, None, tensors)) == bool(expected[head, q, kv])


@pytest.mark.parametrize(
    "case",
    [
        small("window", length_tokens=1152),
        small("bigbird", 16, length_tokens=640, heads=4),
        small("causal_random25", 32, length_tokens=640, kv_heads=1),
        small("longformer", length_tokens=640, batch=2),
        small("group_random10", 32, length_tokens=640, heads=4, kv_heads=2),
    ],
    ids=str,
)
def test_exact_answer_is_dense_attention_with_the_mask(case):
    leaves, grad_out = benchmark_cases.make_inputs(case, CPU)
    exact = benchmark_cases.exact_answer(case, benchmark_cases.make_layout(case), leaves, grad_out)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = torch.nn.functional.scaled_dot_product_attention(
        *doubles, attn_mask=dense_mask(case), enable_gqa=True
    )
    gradients = torch.autograd.grad(out, doubles, grad_out.double())
    for name, tensor in zip(
        ("out", "grad_query", "grad_key", "grad_value"), (out, *gradients), strict=True
    ):
        chosen = benchmark_cases.heads_of(case, exact, tensor)
        torch.testing.assert_close(getattr(exact, name).double(), chosen, atol=1e-4, rtol=1e-3)


FEW = [
    small("causal", query_tokens=1),
    small("window", length_tokens=1152, query_tokens=140, kv_heads=1),
    small("sink_window4k", length_tokens=5000, query_tokens=3, head_dim=8),
    small("full", length_tokens=600, query_tokens=100),
    small("causal_random25", 32, length_tokens=640, query_tokens=1),
]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_few_queries_are_the_last_rows(case):
    layout = benchmark_cases.make_layout(case)
    length, queries = case.length_tokens, case.query_tokens
    mask = layout.to_mask(queries, length, is_causal=case.is_causal, num_heads=case.heads)
    assert benchmark_cases.count_kept(case, layout, CPU) == mask.sum()
    dense = benchmark_cases.Dense().to_mask(queries, length, is_causal=case.is_causal)
    assert case.possible == case.heads * dense.sum()
    leaves, grad_out = benchmark_cases.make_inputs(case, CPU)
    query, key, value = (leaf.detach() for leaf in leaves)
    assert query.shape == grad_out.shape == (1, case.heads, queries, case.head_dim)
    assert key.shape == value.shape == (1, case.kv_heads, length, case.head_dim)
    exact = benchmark_cases.exact_answer(case, layout, leaves, grad_out)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, enable_gqa=True
    )
    chosen = benchmark_cases.heads_of(case, exact, out)
    torch.testing.assert_close(exact.out.double(), chosen, atol=1e-4, rtol=1e-3)


def test_who_takes_a_few_queries():
    one, three = (small("causal", query_tokens=queries) for queries in (1, 3))
    takers = {name for name in IMPLEMENTATIONS if benchmark_cases.applies(name, one)}
    assert takers == {"ours", "ours_portable", "sdpa_flash", "sdpa_cudnn"}
    takers = {name for name in IMPLEMENTATIONS if benchmark_cases.applies(name, three)}
    assert takers == {"ours", "ours_portable"}
    with pytest.raises(NotImplementedError, match="name got 'sdpa_flash' for causal .* Q3 S256"):
        benchmark_peers.make_implementation("sdpa_flash", three, CPU)


class EagerGraph:
    """Of a CUDA graph what a CPU can play: the capture runs, and each replay puts `replayed` times its answers into their place."""

    replayed = 1.0
    refuses = False

    def __init__(self):
        self.outs, self.replays = [], 0

    def __enter__(self):
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    def __exit__(self, *_):
        pass

    def replay(self):
        self.replays += 1
        for out, answer in self.outs:
            out.copy_(self.replayed * answer)


def prepared_in_a_graph(monkeypatch):
    """A session whose calls are captured, its graph, the keys of the captured calls, and what `prepare` said."""
    case = small("sink_window4k", length_tokens=512, query_tokens=1)
    graph, keys = EagerGraph(), []
    right = benchmark_peers.make_implementation("ours", case, CPU)
    capturing = []

    def attend(query, key, value):
        out = right.attend(query, key, value)
        if capturing:
            keys.append(key)
            graph.outs.append((out, out.clone()))
            out.fill_(torch.nan)  # a capture computes nothing
        return out

    @contextlib.contextmanager
    def capture(graph, stream=None):
        with graph:
            capturing.append(True)
            yield
            capturing.clear()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr("benchmark_worker.FLUSH_BYTES", 30 * 2 * 2 * 512 * 16 * 4)
    implementation = replace(right, attend=attend)
    monkeypatch.setattr("benchmark_worker.make_implementation", lambda *_: implementation)
    session = Session("ours", case, CPU)
    assert session.timing == CALLS
    session.timing = GRAPHS
    return session, graph, keys, session.prepare()


def test_a_few_queries_are_timed_by_replays_of_a_graph(monkeypatch):
    session, graph, keys, prepared = prepared_in_a_graph(monkeypatch)
    facts = prepared.directions
    assert facts.keys() == {"forward"} and facts["forward"].failure is None
    assert session.calls.keys() == {"forward"} and session.calls_at_once == len(keys) == 30
    assert len({key.data_ptr() for key in keys}) == 30
    before = graph.replays
    session.times("forward", 1.0, 2.0)
    assert graph.replays == before + 3  # one to warm up


def test_what_a_graph_cannot_capture_or_gets_wrong_is_a_failure(monkeypatch):
    monkeypatch.setattr(EagerGraph, "replayed", 1.5)
    *_, prepared = prepared_in_a_graph(monkeypatch)
    assert "wrong by 5.00e-01 of its own answer" in prepared.directions["forward"].failure
    monkeypatch.setattr(EagerGraph, "refuses", True)
    session, *_, prepared = prepared_in_a_graph(monkeypatch)
    assert "not permitted when stream is capturing" in prepared.directions["forward"].failure
    assert not session.calls


@pytest.fixture
def eager_graphs(monkeypatch):
    """CUDA graphs, streams and captures as a CPU can play them; the graphs made."""
    graphs = []

    class Graph(EagerGraph):
        def __init__(self):
            super().__init__()
            graphs.append(self)

    @contextlib.contextmanager
    def capture(graph, stream=None):
        with graph:
            yield

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return graphs


def prepared_by_graphs():
    session = Session("ours", small("causal"), CPU)
    session.timing = GRAPHS
    facts = session.prepare().directions
    assert [facts[direction].failure for direction in ("forward", "backward")] == [None, None]
    return session, {direction: facts[direction].timed_by for direction in facts}


def test_both_directions_are_timed_by_replays_of_graphs(eager_graphs):
    session, timed_by = prepared_by_graphs()
    assert timed_by == {"forward": GRAPHS, "backward": GRAPHS}
    assert len(eager_graphs) == 2
    for graph, direction in zip(eager_graphs, ("forward", "backward"), strict=True):
        before = graph.replays
        assert len(session.times(direction, 1.0, 2.0)) == 2
        assert graph.replays == before + 3  # one to warm up


def test_no_list_is_freed_that_a_graph_reads(eager_graphs, monkeypatch):
    """Clearing the cache of indices frees lists whose addresses captured graphs have."""
    graphs_at_clearing = []

    def clear():
        graphs_at_clearing.append(len(eager_graphs))
        clear_cache()

    monkeypatch.setattr("benchmark_worker.clear_cache", clear)
    session, _ = prepared_by_graphs()
    session.times("forward", 1.0, 2.0)
    session.times("backward", 1.0, 2.0)
    assert set(graphs_at_clearing) == {0} and len(eager_graphs) == 2


def test_what_cannot_be_captured_is_timed_by_calls(eager_graphs, monkeypatch):
    monkeypatch.setattr(EagerGraph, "refuses", True)
    session, timed_by = prepared_by_graphs()
    assert timed_by == {"forward": CALLS, "backward": CALLS}
    assert len(session.times("backward", 1.0, 2.0)) == 2


def test_whoever_asks_for_calls_gets_calls(eager_graphs):
    session = Session("ours", small("causal"), CPU)
    session.timing = GRAPHS
    facts = session.prepare(CALLS).directions
    assert {each.timed_by for each in facts.values()} == {CALLS} and not eager_graphs


@pytest.fixture
def own_sdpa_kernels():
    """An implementation chooses torch's kernels for its whole process, which a test shares with others."""
    kernels = ("flash", "mem_efficient", "math", "cudnn")
    cuda = torch.backends.cuda
    before = {name: getattr(cuda, f"{name}_sdp_enabled")() for name in kernels}
    yield
    for name, is_enabled in before.items():
        getattr(cuda, f"enable_{name}_sdp")(is_enabled)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ours", "sdpa_flash"])
def test_a_gpu_replays_calls_of_one_query(name, own_sdpa_kernels):
    case = Case("sink_window4k", 1, 8192, heads=8, kv_heads=2, query_tokens=1)
    session = Session(name, case, torch.device("cuda"))
    session.compile()
    facts = session.prepare().directions["forward"]
    assert facts.failure is None
    # 4,096 keys and values of two heads are 4 MiB.
    assert session.calls_at_once == 64
    times = session.times("forward", facts.estimate_ms, 20.0)
    # Of one call, where the estimate is of a replay.
    assert 0 < sorted(times)[len(times) // 2] * 64 < 2 * facts.estimate_ms


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ours", "ours_portable", "sdpa_flash"])
def test_a_gpu_replays_both_directions(name, own_sdpa_kernels):
    case = Case("causal", 1, 2048, 64, heads=4, kv_heads=4)
    session = Session(name, case, torch.device("cuda"))
    for direction, facts in session.prepare().directions.items():
        assert facts.failure is None and facts.timed_by == GRAPHS
        times = session.times(direction, facts.estimate_ms, 10.0)
        assert 0 < sorted(times)[len(times) // 2] < 2 * facts.estimate_ms
    gc.collect()
    torch.cuda.empty_cache()  # what was freed meanwhile is no memory any more
    replayed = session.calls["forward"]()
    torch.testing.assert_close(replayed, session._forward(), atol=0, rtol=0)


@pytest.mark.gpu
def test_a_gpu_call_that_builds_cannot_be_captured(monkeypatch):
    case = Case("causal", 1, 1024, heads=2, kv_heads=2, query_tokens=1)
    device = torch.device("cuda")
    right = benchmark_peers.make_implementation("ours", case, device)

    def attend(query, key, value):
        clear_cache()
        return right.attend(query, key, value)

    building = replace(right, attend=attend)
    monkeypatch.setattr("benchmark_worker.make_implementation", lambda *_: building)
    facts = Session("ours", case, device).prepare().directions["forward"]
    assert "got captured into a CUDA graph before" in facts.failure


def _make_long_random_layout(block_size):
    case = Case("random10", block_size, length_tokens=131072)
    return measure_cost(lambda: benchmark_cases.random_layout(case), device=CPU, warmup=0)


def test_a_long_random_layout_needs_no_gigabytes():
    assert in_fresh_process(_make_long_random_layout, 128).added_bytes < 400 << 20


def test_grids_hold_cases_that_can_run():
    for make in GRIDS.values():
        grid = make()
        assert len({case for case, _ in grid}) == len(grid)
        for case, names in grid:
            assert case.heads % case.kv_heads == 0 and case.length_tokens % 128 == 0
            assert set(names) <= set(IMPLEMENTATIONS) and "ours" in names
            if case.query_tokens is not None:
                assert 1 <= case.query_tokens <= case.length_tokens
                assert all(benchmark_cases.applies(name, case) for name in names)
            assert (case.block_size == 1) == (case.layout in benchmark_cases.TOKEN_EXACT)
            if "random" in case.layout and case.length_tokens > 16384:
                assert case.block_size >= 64


def test_options_narrow_a_grid():
    arguments = benchmark.parse_args(
        ["--grid=full", "--layouts", "window", "random10", "--lengths", "2048", "--seed=3"]
    )
    absent = {"fa4": "not installed"}
    grid = benchmark.narrowed(GRIDS["full"](), arguments, absent)
    assert {(case.layout, case.block_size) for case, _ in grid} == {
        ("window", 1),
        ("random10", 128),
        ("random10", 64),
    }
    for case, names in grid:
        assert case.seed == 3 and case.length_tokens == 2048
        assert "fa4" not in names and "ours_mha" not in names
        assert ("fa4_window" in names) == (case.layout == "window")


def test_the_grid_of_decoding():
    arguments = benchmark.parse_args(["--grid", "decode", "--device", "cuda"])
    grid = benchmark.narrowed(GRIDS[arguments.grid](), arguments, {})
    assert {names for _, names in grid} == {("ours", "sdpa_flash")}
    assert {case.query_tokens for case, _ in grid} == {1}
    lengths = {}
    for case, _ in grid:
        key = (case.layout, case.heads, case.kv_heads, case.head_dim)
        lengths.setdefault(key, []).append(case.length_tokens)
    for layout in ("sink_window4k", "causal"):
        assert lengths.pop((layout, 32, 8, 128)) == [4096, 16384, 65536]
        assert lengths.pop((layout, 9, 3, 64)) == [4096, 65536]
    assert not lengths


def test_heads_of_a_group_share_lists_or_have_the_same_by_themselves():
    case = small("group_random10", 16, length_tokens=512, heads=4, kv_heads=2)
    shared = benchmark_cases.make_layout(case)
    by_head = benchmark_peers.make_implementation("ours_by_head", case, CPU).layout
    indices = [benchmark_cases.exact_index(case, each, 16, CPU) for each in (shared, by_head)]
    assert [index.num_lists for index in indices] == [2, 4]
    assert [index.heads_per_list for index in indices] == [2, 1]
    dense = [each.to_mask(512, num_heads=4) for each in (shared, by_head)]
    assert dense[0].equal(dense[1]) and not dense[0][0].equal(dense[0][2])
    kept = [benchmark_cases.count_kept(case, each, CPU) for each in (shared, by_head)]
    assert kept[0] == kept[1] == dense[0].sum()


def test_the_grids_of_lengths_and_of_launches_are_part_of_the_bars():
    bars = dict(GRIDS["bars"]())
    lengths, launches = dict(GRIDS["lengths"]()), dict(GRIDS["launch"]())
    assert lengths.items() | launches.items() <= bars.items()
    assert {case.length_tokens for case in launches} == {512, 1024, 2048}
    assert max(case.length_tokens for case in lengths) == 1 << 20
    for names in launches.values():
        assert {"ours", "flex", "sdpa_flash"} <= set(names)


def test_options_that_leave_nothing_or_no_gpu_say_so(monkeypatch):
    with pytest.raises(SystemExit, match="has no case that the other options leave"):
        benchmark.main(["--grid=quick", "--layouts", "longformer"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no GPU; use --device cpu"):
        benchmark.main(["--grid=quick"])


def test_a_window_of_equal_tiles_has_as_many():
    case = Case("bigbird", 64, length_tokens=8192)
    window = benchmark_cases.window_of_equal_tiles(case)
    tiles = [
        benchmark_cases.exact_index(case, layout, 128, CPU).num_tiles / lists
        for layout, lists in ((benchmark_cases.make_layout(case), 16), (window, 1))
    ]
    assert tiles[1] == pytest.approx(tiles[0], rel=0.1)


def result(layout, density, times, *, block_size=128):
    """A case whose rounds took `times[implementation]` milliseconds."""
    rows = tuple(
        Row(name, "forward", density, round_ms=rounds, median_ms=rounds[0], low_ms=0.5, high_ms=9.0)
        for name, rounds in times.items()
    )
    case = Case(layout, block_size)
    return CaseResult(case, case.is_causal, density, 1.0, rows)


def test_break_even_lies_where_the_ratio_of_times_crosses_one():
    assert benchmark_results.crossing([(0.5, 1.5), (0.1, 0.5), (0.3, 0.9)]) == pytest.approx(
        0.3 + 0.2 * 0.1 / 0.6
    )
    assert benchmark_results.crossing([(0.1, 0.2), (0.5, 0.9)]) is None
    assert benchmark_results.crossing([(0.1, 1.2), (0.5, 2.0)]) is None
    # The second round is twice as slow for both: within rounds, nothing changed.
    results = [
        result("random10", 0.1, {"ours": (2.0, 4.0), "sdpa_flash": (8.0, 16.0)}),
        result("random50", 0.5, {"ours": (10.0, 20.0), "sdpa_flash": (8.0, 16.0)}),
        result("full", 1.0, {"ours": (20.0, 40.0), "sdpa_flash": (8.0, 16.0)}, block_size=1),
        result("random25", 0.25, {"ours": (1.0, 1.0)}, block_size=64),
    ]
    (found,) = benchmark_results.break_evens(results)
    assert (found.implementation, found.dense, found.direction) == ("ours", "sdpa_flash", "forward")
    assert found.density == pytest.approx(0.1 + 0.4 * (1 - 0.25) / (1.25 - 0.25))
    assert (found.least, found.most) == (0.1, 1.0)
    table = benchmark_results.break_even_table(results)
    assert "below 40.0%" in table
    slower = [
        replace(r, rows=(r.rows[0], replace(r.rows[1], round_ms=(0.1, 0.1)))) for r in results[:2]
    ]
    assert "not even at 10.0%" in benchmark_results.break_even_table(slower)
    faster = [
        replace(r, rows=(r.rows[0], replace(r.rows[1], round_ms=(99.0, 99.0)))) for r in results[:2]
    ]
    assert "at all measured (10.0%-50.0%)" in benchmark_results.break_even_table(faster)


def test_ratios_are_of_rounds_and_of_useful_work():
    own = Row("ours", "forward", 0.1, round_ms=(1.0, 2.0, 4.0))
    peer = replace(own, implementation="flex", round_ms=(2.0, 6.0, 4.0))
    assert benchmark_results.ratio(own, peer) == (2.0, 1.0, 3.0)
    half = replace(peer, implementation="ours_window", density=0.05)
    assert benchmark_results.ratio(own, half) == (4.0, 2.0, 6.0)


def test_a_worker_that_hangs_crashes_or_raises_is_a_failure_and_starts_anew(tmp_path):
    worker = Worker(bad_worker.serve, log=tmp_path / "logs" / "bad.log")
    try:
        first = worker.ask(("well",), 10)
        with pytest.raises(WorkerFailure, match="no answer to 'hang' within 0 s"):
            worker.ask(("hang",), 0.2)
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        second = worker.ask(("well",), 10)
        assert second != first and worker.ask(("well",), 10) == second
        with pytest.raises(WorkerFailure, match="its process ended with exit code -6"):
            worker.ask(("crash",), 10)
        with pytest.raises(WorkerFailure, match="ValueError: no"):
            worker.ask(("raise",), 10)
    finally:
        worker.stop()


def test_a_wrong_answer_is_a_failure_of_both_directions(monkeypatch):
    case = small("window")
    right = benchmark_peers.make_implementation("ours", case, CPU)

    def prepare(attend):
        wrong = replace(right, attend=attend)
        monkeypatch.setattr("benchmark_worker.make_implementation", lambda *_: wrong)
        return Session("ours", case, CPU).prepare().directions

    facts = prepare(right.attend)
    assert all(facts[d].failure is None and facts[d].relative_error < 1e-4 for d in facts)
    facts = prepare(lambda q, k, v: 1.01 * right.attend(q, k, v))
    assert all("wrong by 1.0" in facts[d].failure for d in ("forward", "backward"))

    def without_gradient_of_value(q, k, v):
        return right.attend(q, k, 0.5 * v + 0.5 * v.detach())

    facts = prepare(without_gradient_of_value)
    assert facts["forward"].failure is None
    assert "wrong by 5.0" in facts["backward"].failure


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn-4 is installed")
def test_what_cannot_be_imported_is_a_failure():
    facts = Session("fa4_dense", small("full"), CPU).prepare().directions
    assert facts["forward"].failure.startswith("ModuleNotFoundError: No module named 'flash_attn'")
    assert "pip install flash-attn-4" in benchmark.absent_implementations()["fa4"]


DECODED = [
    small(layout, length_tokens=8192, kv_heads=1, query_tokens=1)
    for layout in ("sink_window4k", "causal")
]


@pytest.fixture(scope="module")
def grid_record(tmp_path_factory):
    """A run over a small grid, on a CPU: the way of a GPU run but for the clock."""
    output = tmp_path_factory.mktemp("runs") / "benchmark.json"
    arguments = argparse.Namespace(
        output=output, rounds=2, round_ms=5.0, limit_s=60.0, timing=GRAPHS
    )
    names = ("ours", "sdpa_flash", "sdpa_cudnn")
    cases = (small("random50", 16), small("random10", 16), small("full"), small("bigbird", 16))
    grid = [(case, names) for case in cases[:3]] + [(cases[3], ("ours", "ours_window"))]
    grid += [(case, ("ours", "sdpa_flash")) for case in DECODED]
    written = []

    def save(results):
        written.append(len(results))

    results = benchmark.measure_grid(grid, arguments, CPU, [], save)
    assert written == [1, 2, 3, 4, 5, 6]
    # What is known is not measured again.
    assert benchmark.measure_grid(grid, arguments, CPU, results, save) == results
    assert written == [1, 2, 3, 4, 5, 6]
    record = benchmark.RunRecord(
        1,
        "benchmark.py",
        {"device": "cuda"},
        0,
        benchmark.describe_environment(CPU),
        {},
        to_plain(GridResults(tuple(results), (), {"flex": "left out"}, {})),
    )
    write_record(record, output)
    return output


def test_a_grid_run_writes_what_it_measured(grid_record):
    results = benchmark_results.grid_results(read_record(grid_record)).cases
    by_case = {r.case.layout: r for r in results}
    assert by_case["random10"].density == pytest.approx(
        dense_mask(by_case["random10"].case).float().mean()
    )
    for measured in results:
        for direction in measured.case.directions:
            ours = benchmark_results.row_of(measured, "ours", direction)
            assert len(ours.round_ms) == 2 and ours.low_ms <= ours.median_ms <= ours.high_ms
            assert ours.relative_error < 1e-4 and ours.launch_us > 0 and ours.first_call_s > 0
            assert ours.density == measured.density
            factor = 1.0 if direction == "forward" else 2.5
            flop = factor * 4 * 16 * measured.density * measured.case.possible
            assert ours.useful_tflops == pytest.approx(flop / ours.median_ms / 1e9)
    full = {(r.implementation, r.direction): r for r in by_case["full"].rows}
    assert full["sdpa_flash", "forward"].relative_error < 1e-4
    sparse = {(r.implementation, r.direction): r for r in by_case["random10"].rows}
    assert sparse["sdpa_flash", "forward"].relative_error is None  # computes another thing
    assert sparse["ours", "forward"].tile_efficiency <= 1.0
    assert sparse["sdpa_cudnn", "backward"].failure.startswith("RuntimeError")
    other = benchmark_results.row_of(by_case["bigbird"], "ours_window", "forward")
    assert other.density != by_case["bigbird"].density


def test_a_grid_run_measures_the_forward_of_one_query(grid_record):
    results = benchmark_results.grid_results(read_record(grid_record)).cases
    sparse, dense = (r for r in results if r.case.query_tokens is not None)
    assert [sparse.case, dense.case] == DECODED
    assert (sparse.density, dense.density) == (0.5, 1.0)
    for measured in (sparse, dense):
        rows = {(row.implementation, row.direction): row for row in measured.rows}
        assert rows.keys() == {("ours", "forward"), ("sdpa_flash", "forward")}
        ours, peer = rows.values()
        assert ours.relative_error < 1e-4 and ours.launch_us > 0 and len(peer.round_ms) == 2
        kept = 2 * (4096 if measured is sparse else 8192)
        assert ours.useful_tflops == pytest.approx(4 * 16 * kept / ours.median_ms / 1e9)
        assert (peer.relative_error is None) == (measured is sparse)
    lines = benchmark_results.case_table([sparse]).splitlines()[2:]
    assert len(lines) == 3 and "50.00% of the queries' rows of the causal triangle" in lines[0]
    assert "sink_window4k B1 H2/1 Q1 S8192" in benchmark_results.ratio_table([sparse])


def test_times_of_microseconds_keep_their_digits():
    row = Row("ours", "forward", 1.0, median_ms=0.01293, low_ms=0.012, high_ms=0.5, useful_tflops=1)
    (line,) = benchmark_results.case_table(
        [CaseResult(SMALL, True, 1.0, 1.0, (row,))]
    ).splitlines()[3:]
    assert " 0.0129 " in line and "0.0120-0.500" in line


def test_tables_and_figures_come_from_the_record_alone(grid_record):
    cases = benchmark_results.grid_results(read_record(grid_record)).cases
    table = benchmark_results.case_table(cases)
    assert "random10 b16 B1 H2 S256 D16 float32" in table and "failed: RuntimeError" in table
    ratios = benchmark_results.ratio_table(cases)
    assert ratios.count("sdpa_flash") == 8 and ratios.count("ours_window") == 2
    assert benchmark_results.break_even_table(cases).count("sdpa_flash") == 2
    (figure,) = plot.draw_figures(grid_record)
    assert figure.name == "benchmark_B1_H2_S256_D16_float32_b16_square.png"
    assert figure.stat().st_size > 10_000


def test_resuming_keeps_the_cases_of_the_same_environment_only(grid_record):
    environment = read_record(grid_record).environment
    assert len(benchmark.resumed_cases(grid_record, environment)) == 6
    other = replace(environment, packages=environment.packages | {"torch": "0.1"})
    with pytest.raises(SystemExit, match="packages .*numbers of one record"):
        benchmark.resumed_cases(grid_record, other)


def test_cpu_run_writes_times_of_both_directions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_cpu, "CPU_PROCESSES", 1)
    output = tmp_path / "benchmark.json"
    benchmark.main(
        ["--device", "cpu", "--length-tokens", "256", "--heads", "2", "--repetitions", "2"]
        + ["--output", str(output)]
    )
    record = json.loads(output.read_text())
    rows = {(m["implementation"], m["direction"]): m for m in record["results"]["measurements"]}
    assert rows.keys() == {(i, d) for i in ("ours", "sdpa") for d in ("forward", "backward")}
    assert all(row["median_ms"] > 0 and row["peak_mib"] >= 0 for row in rows.values())
    assert rows["ours", "forward"]["relative_error"] < 1e-4
    lengths = [row["length_tokens"] for row in record["results"]["index"]]
    assert lengths == [1 << 14, 1 << 17, 1 << 20]
    per_tile = [row["index_bytes"] / row["num_tiles"] for row in record["results"]["index"]]
    assert max(per_tile) < 1.2 * min(per_tile)  # memory is linear in the tiles kept
    assert "sdpa" in capsys.readouterr().out
    with pytest.raises(ValueError, match="it must be of benchmark.py over a grid"):
        benchmark_results.grid_results(read_record(output))
