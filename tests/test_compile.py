"""`block_sparse_attention` inside `torch.compile`: one graph, the same numbers, no graph per length; and under CUDA-graph capture."""

import gc
import math

import pytest
import torch
from numerics import make_qkv
from torch._dynamo.testing import CompileCounterWithBackend

import hf_blocksparse as bs
from hf_blocksparse import capture
from hf_blocksparse.block_index import clear_cache

CPU = torch.device("cpu")
LAYOUT = bs.SinkWindow(sink=4, window=32)
PER_HEAD = bs.PerHead((bs.Dense(), LAYOUT, bs.Longformer(8), bs.SlidingWindow(5)))
# The first length is compiled as it is, the second one for all lengths.
LENGTHS = (70, 100, 130)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(length, *, kv_len=None, rows_outside_heads=False, dtype=torch.float32):
    qkv = make_qkv(
        2, 4, 2, length, length if kv_len is None else kv_len, 16, 24,
        dtype=dtype, device="cpu", rows_outside_heads=rows_outside_heads, seed=length,
    )  # fmt: skip
    return [tensor.requires_grad_() for tensor in qkv]


def results(function, leaves, options):
    """Output, LSE and the gradients of every leaf, of the tensors among `options` too."""
    torch.manual_seed(3)
    query, key, value = leaves
    out, lse = function(query, key, value, options)
    leaves = leaves + [
        option for option in options.values() if getattr(option, "requires_grad", False)
    ]
    finite_lse = torch.where(lse.isinf(), 0, lse)
    weights = [torch.randn(part.shape).to(part) for part in (out, lse)]
    return out, lse, *torch.autograd.grad((out, finite_lse), leaves, weights)


def check_same_as_eager(layout, backend, options_of=lambda length: {}, kinds=None, **fixed):
    """For several lengths; two graphs at most. `options_of(length)`: tensors that change with the length."""
    fixed = dict(impl="torch") | fixed

    def function(query, key, value, options):
        # Work around the operation, so that it stands in the middle of the graph.
        out, lse = bs.block_sparse_attention(
            query * 1.5, key, value, layout, return_lse=True, **fixed, **options
        )
        return out.tanh(), lse

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for length in LENGTHS:
        leaves = tensors(length, **(kinds or {}))
        options = options_of(length)
        expected = results(function, leaves, options)
        found = results(compiled, leaves, options)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, equal_nan=False)
            assert one.shape == other.shape and one.dtype == other.dtype
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_one_graph_for_all_lengths_with_the_numbers_of_eager(backend):
    check_same_as_eager(LAYOUT, backend, is_causal=True)


@pytest.mark.parametrize(
    "options",
    [
        dict(scale=-0.3, softcap=2.0, dropout_p=0.3, kinds=dict(rows_outside_heads=True)),
        dict(scale=0.0, layout="sink_window", kinds=dict(dtype=torch.bfloat16)),
        dict(layout=bs.BigBird(block_size=16), is_causal=False, kinds=dict(dtype=torch.float64)),
        dict(layout=PER_HEAD, kinds=dict(kv_len=300, rows_outside_heads=True)),
        dict(kinds=dict(kv_len=300), query_start=30),
    ],
    ids=str,
)
def test_every_option_is_the_same_compiled(options):
    check_same_as_eager(**(dict(layout=LAYOUT, backend="aot_eager", is_causal=True) | options))


def padded(length):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, : length // 4] = False
    mask[1, -5:] = False
    return dict(key_padding_mask=mask, sinks=torch.linspace(-1, 1, 4).requires_grad_())


def padded_with_holes(length):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, 50:60] = False
    return dict(key_padding_mask=mask)


def packed(length):
    return dict(document_ids=(torch.arange(length) // 37).expand(2, -1))


def masked(length):
    generator = torch.Generator().manual_seed(length)
    mask = torch.rand(4, length, length, generator=generator) < 0.5
    return dict(attn_mask=mask)


def sloped(length):
    return dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.0], requires_grad=True))


@pytest.mark.parametrize(
    "options_of", [padded, padded_with_holes, packed, masked, sloped], ids=lambda f: f.__name__
)
def test_tensors_beside_the_operands_are_arguments_of_the_operator(options_of):
    check_same_as_eager(LAYOUT, "aot_eager", options_of, is_causal=True)


def test_each_layout_has_a_graph_of_its_own_and_equal_ones_share_it():
    def function(query, key, value, layout):
        return bs.block_sparse_attention(query, key, value, layout, is_causal=True, impl="torch")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    leaves = tensors(100)
    for window in (3, 40, 3):
        layout = bs.SlidingWindow(window)
        torch.testing.assert_close(compiled(*leaves, layout), function(*leaves, layout))
    assert counter.frame_count == 2


def test_a_graph_keeps_its_layout():
    def forward():
        layout = bs.TensorLayout.from_tensor(torch.eye(8), 16)
        return torch.compile(
            lambda *qkv: bs.block_sparse_attention(*qkv, layout, impl="torch"),
            fullgraph=True,
            backend="aot_eager",
        )(*leaves)

    leaves = tensors(128)
    out = forward()
    torch._dynamo.reset()
    gc.collect()
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_gradients_nobody_wants_are_not_made():
    query, key, value = (leaf.detach() for leaf in tensors(64))
    value.requires_grad_()
    compiled = torch.compile(
        lambda *qkv: bs.block_sparse_attention(*qkv, LAYOUT, impl="torch"),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(query, key, value).sum().backward()
    expected = value.grad.clone()
    value.grad = None
    bs.block_sparse_attention(query, key, value, LAYOUT, impl="torch").sum().backward()
    torch.testing.assert_close(value.grad, expected)
    assert query.grad is None and key.grad is None


def test_autocast_does_not_round_the_scores():
    leaves = tensors(64)

    def function(*qkv):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return bs.block_sparse_attention(*qkv, LAYOUT, impl="torch")

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    exact = bs.block_sparse_attention(*leaves, LAYOUT, impl="torch")
    torch.testing.assert_close(compiled(*leaves), exact)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU")
def test_the_triton_kernels_run_from_the_operator(poisoned_memory):
    def function(query, key, value):
        return bs.block_sparse_attention(
            query, key, value, LAYOUT, is_causal=True, impl="triton", scale=-0.3, return_lse=True
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = tensors(40)
    for one, other in zip(
        results(lambda *args: compiled(*args[:3]), leaves, {}),
        results(lambda *args: function(*args[:3]), leaves, {}),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def operator_arguments(**changes):
    arguments = dict(
        zip(("query", "key", "value"), tensors(70), strict=True),
        sinks=torch.zeros(4, requires_grad=True),
        alibi_slopes=None,
        attn_mask=None,
        key_padding_mask=None,
        document_ids=None,
        sequence_table=None,
        sequence_facts=None,
        dropout_seed=None,
        layout=LAYOUT.digest,
        query_start=None,
        window_tokens=None,
        chunk_tokens=None,
        is_causal=True,
        dropout_p=0.0,
        scale=None,
        softcap=None,
        allow_empty_rows=False,
        impl="torch",
        slopes_need_grad=False,
    )
    return tuple((arguments | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(sinks=None, **padded_with_holes(70)),
        dict(document_ids=packed(70)["document_ids"].contiguous()),
    ],
    ids=["plain", "padded", "packed"],
)
def test_the_operator_keeps_torchs_contract(changes):
    torch.library.opcheck(
        torch.ops.hf_blocksparse.attention_forward.default, operator_arguments(**changes)
    )


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_a_buffer_with_a_new_mask_is_not_taken_for_the_old_one(name):
    # Inductor's kernels write into buffers that it uses again without counting their version, as writing through `.data` does.
    options_of = {"attn_mask": masked, "key_padding_mask": padded_with_holes}[name]
    first = options_of(70)[name]
    second = first.roll(7, -1)
    buffer = first.clone()
    forward = torch.ops.hf_blocksparse.attention_forward
    with torch.no_grad():
        forward(*operator_arguments(**{name: buffer}))
        buffer.data.copy_(second)
        out, _ = forward(*operator_arguments(**{name: buffer}))
        expected, _ = forward(*operator_arguments(**{name: second}))
    torch.testing.assert_close(out, expected)


def test_an_unknown_layout_is_named():
    with pytest.raises(
        RuntimeError, match="layout got the digest 'window-0', which no living layout has"
    ):
        torch.ops.hf_blocksparse.attention_forward(*operator_arguments(layout="window-0"))


def compile_call(layout=LAYOUT, *, fullgraph=True, length=100, kv_len=None, **options):
    def function(query, key, value, layout):
        return bs.block_sparse_attention(query, key, value, layout, impl="torch", **options)

    compiled = torch.compile(function, fullgraph=fullgraph, backend="aot_eager")
    return compiled(*tensors(length, kv_len=kv_len), layout)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(kv_len=50), ValueError, "query_start got -50"),
        (dict(attn_mask=torch.ones(100, 100)), TypeError, "attn_mask got dtype torch.float32"),
        (
            dict(layout=bs.TensorLayout.from_tensor(torch.ones(2, 2), 16)),
            ValueError,
            "layout got 2 x 2 entries of 16 tokens",
        ),
        (
            dict(layout=bs.TensorLayout.from_tensor(torch.zeros(7, 7), 16)),
            ValueError,
            "which leaves 100 queries without a key",
        ),
        (dict(layout=bs.PerLayer({0: LAYOUT})), TypeError, "layout got a PerLayer"),
    ],
    ids=["query_start", "mask", "long", "empty", "per layer"],
)
def test_what_the_operator_refuses_it_refuses_as_eager_does(options, error, message):
    with pytest.raises(error, match=message):
        compile_call(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(softcap=-1.0), ValueError, r"softcap got -1\.0; it must be positive"),
        (dict(scale=math.inf), ValueError, "scale got inf; it must be finite"),
        (dict(sinks=torch.zeros(3)), ValueError, "sinks got torch.float32 of shape"),
    ],
    ids=["softcap", "scale", "sinks"],
)
def test_what_the_trace_finds_wrong_keeps_its_message(options, error, message):
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        compile_call(**options)
    with pytest.raises(error, match=message):
        compile_call(fullgraph=False, **options)


BLOCKS = torch.ones(7, 7)


@pytest.mark.parametrize(
    "options",
    [
        dict(layout=BLOCKS, block_size=16),
        dict(layout="bigbird", block_size=16),
        dict(sequences=bs.Sequences.uniform(2, 100, 100, 0, CPU)),
    ],
    ids=["tensor", "preset", "sequences"],
)
def test_what_cannot_be_traced_says_so_and_runs_with_a_graph_break(options):
    message = "block_sparse_attention got a layout tensor, a preset with block_size, or a Sequences"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        compile_call(**options)
    options = dict(layout=LAYOUT) | options
    layout = options.pop("layout")
    expected = bs.block_sparse_attention(*tensors(100), layout, impl="torch", **options)
    torch.testing.assert_close(compile_call(layout, fullgraph=False, **options), expected)


def test_a_layout_made_inside_the_function_is_refused():
    def function(query, key, value):
        return bs.block_sparse_attention(query, key, value, LAYOUT | bs.Dense(), impl="torch")

    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="layout got a Dense made inside a function that"
    ):
        torch.compile(function, fullgraph=True, backend="eager")(*tensors(40))


def test_a_second_derivative_says_what_to_do():
    leaves = tensors(40)
    compiled = torch.compile(
        lambda *qkv: bs.block_sparse_attention(*qkv, LAYOUT, impl="torch"),
        fullgraph=True,
        backend="eager",
    )
    (gradient,) = torch.autograd.grad(compiled(*leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative in a compiled graph"):
        gradient.sum().backward()


@pytest.fixture
def capturing(monkeypatch):
    """A switch for what CUDA would say of the current stream."""
    state = dict(on=False)
    monkeypatch.setattr(capture, "is_capturing", lambda device: state["on"])
    clear_cache()
    yield state
    clear_cache()


def attend(length=48, **options):
    query, key, value = tensors(length)
    return bs.block_sparse_attention(query, key, value, LAYOUT, impl="torch", **options)


def test_a_capture_takes_an_index_from_the_cache_and_keeps_it(capturing):
    expected = attend()
    capturing["on"] = True
    torch.testing.assert_close(attend(), expected)
    capturing["on"] = False
    (index,) = (one for one in capture._kept if isinstance(one, bs.block_index.BlockIndex))
    assert any(isinstance(one, bs.Sequences) for one in capture._kept)
    for window in range(1, bs.block_index.CACHED_INDICES + 2):
        bs.block_sparse_attention(*tensors(1), bs.SlidingWindow(window), impl="torch")
    assert index not in bs.block_index.cached_indices(), "the cache still holds it"
    assert any(one is index for one in capture._kept)
    clear_cache()
    assert not capture._kept


def test_a_capture_does_not_build(capturing):
    capturing["on"] = True
    with pytest.raises(RuntimeError, match="before the table of sequences for these lengths was"):
        attend(49)
    capturing["on"] = False
    attend(50)
    clear_cache()
    capturing["on"] = True
    with pytest.raises(RuntimeError, match="before the block index of this layout was built; buil"):
        attend(50)


def test_a_capture_does_not_list_tiles(capturing):
    sequences = bs.Sequences.uniform(3, 7, 11, 4, CPU)
    capturing["on"] = True
    with pytest.raises(RuntimeError, match="before the list of tiles of these sequences was built"):
        sequences.q_items(16)


@pytest.mark.parametrize(
    "options",
    [
        dict(key_padding_mask=torch.ones(2, 48, dtype=torch.bool)),
        dict(document_ids=torch.zeros(2, 48, dtype=torch.long)),
    ],
    ids=["padding", "documents"],
)
def test_a_capture_refuses_what_decides_launches(capturing, options):
    attend(**options)
    capturing["on"] = True
    with pytest.raises(NotImplementedError, match="got a tensor while a CUDA graph is captured"):
        attend(**options)
