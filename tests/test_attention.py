"""`block_sparse_attention` in torch operations equals dense attention with the layout as a mask, in every use it offers."""

import math

import pytest
import torch
import torch.nn.functional as F
from numerics import dense_attention
from torch import Tensor

from hf_blocksparse import (
    BigBird,
    BlockDiagonal,
    Dense,
    Longformer,
    PerHead,
    PerLayer,
    Sequences,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
    attention,
    block_index,
    block_sparse_attention,
    layout_to_mask,
)
from hf_blocksparse.ops.philox import dropout_keep, philox

BATCH, HEADS, KV_HEADS = 2, 4, 2
BLOCKS = torch.rand(HEADS, 20, 20, generator=torch.Generator().manual_seed(0)) > 0.5
LAYOUTS = [
    Dense(),
    SinkWindow(5, 30),
    BigBird(16),
    TensorLayout.from_tensor(BLOCKS, 16) | SlidingWindow(1),
    PerHead((Dense(), SlidingWindow(9), BigBird(32), Longformer(8))),
]


def make_inputs(query_len=100, kv_len=None, head_dim=24, value_dim=16, dtype=torch.float64):
    kv_len = query_len if kv_len is None else kv_len
    shapes = (
        (BATCH, HEADS, query_len, head_dim),
        (BATCH, KV_HEADS, kv_len, head_dim),
        (BATCH, KV_HEADS, kv_len, value_dim),
    )
    generator = torch.Generator().manual_seed(query_len + kv_len)
    return tuple(
        torch.randn(shape, dtype=dtype, generator=generator, requires_grad=True) for shape in shapes
    )


def assert_same(inputs, ours, expected):
    """Outputs, LSE and the gradients of a loss that uses both."""
    (out, lse), (dense_out, dense_lse) = ours, expected
    torch.testing.assert_close(out, dense_out)
    torch.testing.assert_close(lse, dense_lse)
    weight, lse_weight = torch.randn_like(out), torch.randn_like(lse)
    grads = [
        torch.autograd.grad(
            (a * weight).sum() + (torch.where(b.isinf(), 0, b) * lse_weight).sum(), inputs
        )
        for a, b in ((out, lse), (dense_out, dense_lse))
    ]
    for ours_grad, dense_grad in zip(*grads, strict=True):
        torch.testing.assert_close(ours_grad, dense_grad)


def layout_mask(layout, query_len, kv_len, is_causal) -> Tensor:
    mask = layout.to_mask(query_len, kv_len, is_causal=is_causal, num_heads=HEADS)
    return mask.expand(BATCH, HEADS, query_len, kv_len)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(100, 100), (1, 1), (1, 130), (37, 150)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_equals_dense_attention(layout, lengths, is_causal):
    inputs = make_inputs(*lengths)
    options = dict(scale=0.3, softcap=2.0)
    ours = block_sparse_attention(*inputs, layout, is_causal=is_causal, return_lse=True, **options)
    mask = layout_mask(layout, *lengths, is_causal)
    assert_same(inputs, ours, dense_attention(*inputs, mask, **options))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_attn_mask_on_top_of_the_layout(layout):
    inputs = make_inputs()
    for shape in ((100, 100), (BATCH, 1, 100, 100), (1, HEADS, 1, 100), (BATCH, HEADS, 100, 100)):
        attn_mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
        ours = block_sparse_attention(
            *inputs, layout, is_causal=True, attn_mask=attn_mask, return_lse=True
        )
        mask = layout_mask(layout, 100, 100, True) & attn_mask
        assert_same(inputs, ours, dense_attention(*inputs, mask))


def positions_mask(layout, runs, length, is_causal) -> Tensor:
    """The layout in the positions of each run `(batch, start, end)`."""
    mask = torch.zeros(BATCH, HEADS, length, length, dtype=torch.bool)
    for batch, start, end in runs:
        part = layout.to_mask(end - start, is_causal=is_causal, num_heads=HEADS)
        mask[batch, :, start:end, start:end] = part
    return mask


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_padding_on_both_sides(layout, is_causal):
    inputs = make_inputs()
    padding = torch.ones(BATCH, 100, dtype=torch.bool)
    padding[0, :30] = False
    padding[1, 77:] = False
    ours = block_sparse_attention(
        *inputs, layout, is_causal=is_causal, key_padding_mask=padding, return_lse=True
    )
    mask = positions_mask(layout, [(0, 30, 100), (1, 0, 77)], 100, is_causal)
    assert_same(inputs, ours, dense_attention(*inputs, mask))
    assert (ours[0][0, :, :30] == 0).all() and ours[1][0, :, :30].isneginf().all()


def test_padding_with_holes_is_exact():
    inputs = make_inputs()
    padding = torch.ones(BATCH, 100, dtype=torch.bool)
    padding[0, 40:43] = False
    ours = block_sparse_attention(
        *inputs, SinkWindow(5, 30), is_causal=True, key_padding_mask=padding, return_lse=True
    )
    mask = layout_mask(SinkWindow(5, 30), 100, 100, True) & padding[:, None, None]
    assert_same(inputs, ours, dense_attention(*inputs, mask))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_packed_documents_never_see_each_other(layout, is_causal):
    inputs = make_inputs()
    ids = torch.zeros(BATCH, 100, dtype=torch.int64)
    ids[0, 33:] = 1
    ids[1, :10] = -1
    ids[1, 50:60] = 7
    ids[1, 60:] = 3
    runs = [(0, 0, 33), (0, 33, 100), (1, 10, 50), (1, 50, 60), (1, 60, 100)]
    ours = block_sparse_attention(
        *inputs, layout, is_causal=is_causal, document_ids=ids, return_lse=True
    )
    mask = positions_mask(layout, runs, 100, is_causal)
    assert_same(inputs, ours, dense_attention(*inputs, mask))


def test_cu_seqlens_are_documents():
    query, key, value = (tensor[:1] for tensor in make_inputs())
    starts = torch.tensor([0, 20, 21, 100])
    sequences = Sequences.from_cu_seqlens(starts, 100)
    ids = torch.repeat_interleave(torch.arange(3), starts.diff())[None]
    layout = SinkWindow(3, 8)
    assert torch.equal(
        block_sparse_attention(query, key, value, layout, is_causal=True, sequences=sequences),
        block_sparse_attention(query, key, value, layout, is_causal=True, document_ids=ids),
    )


def test_keys_dropped_from_a_cache_keep_positions():
    """A sliding cache holds the last keys only: the sequence's first key has a position of its own."""
    query, key, value = make_inputs(100)
    layout = SlidingWindow(20)
    whole = block_sparse_attention(query, key, value, layout, is_causal=True)
    table = [[batch, 0, 1, 99, 0, 25, 75] for batch in range(BATCH)]
    sequences = Sequences(
        torch.tensor(table, dtype=torch.int32),
        batch=BATCH,
        query_len=1,
        kv_len=25,
        query_end=100,
        key_end=100,
        covers_queries=True,
        covers_keys=True,
    )
    last = block_sparse_attention(
        query[:, :, -1:],
        key[:, :, 75:],
        value[:, :, 75:],
        layout,
        is_causal=True,
        sequences=sequences,
    )
    torch.testing.assert_close(last, whole[:, :, -1:])


def test_prefill_then_decode_equals_one_prefill():
    query, key, value = make_inputs(90)
    for layout in LAYOUTS:
        whole = block_sparse_attention(query, key, value, layout, is_causal=True)
        pieces = []
        for start, end in ((0, 50), (50, 83), (83, 84), (84, 85), (85, 90)):
            part = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
            pieces.append(block_sparse_attention(*part, layout, is_causal=True))
        torch.testing.assert_close(torch.cat(pieces, 2), whole)


def test_sinks_take_part_in_the_softmax():
    inputs = make_inputs()
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    mask = layout_mask(SlidingWindow(9), 100, 100, True)
    ours = block_sparse_attention(
        *inputs, SlidingWindow(9), is_causal=True, sinks=sinks, return_lse=True
    )
    assert_same((*inputs, sinks), ours, dense_attention(*inputs, mask, sinks=sinks))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(HEADS,), (BATCH, HEADS)], ids=str)
def test_alibi_slopes_bias_by_distance(shape, is_causal):
    inputs = make_inputs(60, 100)
    slopes = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    distance = (torch.arange(40, 100)[:, None] - torch.arange(100)).abs()
    for layout in (SinkWindow(5, 30), PerHead((Dense(), SlidingWindow(9), BigBird(32), Dense()))):
        mask = layout_mask(layout, 60, 100, is_causal)
        bias = -slopes.expand(BATCH, HEADS)[..., None, None] * distance
        options = dict(is_causal=is_causal, softcap=3.0, alibi_slopes=slopes, return_lse=True)
        ours = block_sparse_attention(*inputs, layout, **options)
        expected = dense_attention(*inputs, mask, softcap=3.0, bias=bias)
        assert_same((*inputs, slopes), ours, expected)


def test_alibi_slopes_count_positions_of_the_sequence():
    """Padding and packed documents change no output: what differs between their tokens is where they stand in the tensor."""
    query, key, value = make_inputs(100)
    options = dict(is_causal=True, alibi_slopes=torch.tensor([0.5, 0.1, 0.9, 0.3]))
    alone = block_sparse_attention(
        query[:, :, 30:90], key[:, :, 30:90], value[:, :, 30:90], SinkWindow(5, 30), **options
    )
    ids = torch.full((BATCH, 100), -1)
    ids[:, 3:30], ids[:, 30:90] = 0, 1
    padding = ids == 1
    for where in (dict(document_ids=ids), dict(key_padding_mask=padding)):
        out = block_sparse_attention(query, key, value, SinkWindow(5, 30), **where, **options)
        torch.testing.assert_close(out[:, :, 30:90], alone)


def test_rows_without_keys_give_zero():
    query, key, value = make_inputs()
    blocks = torch.eye(7)
    blocks[2, 2] = 0
    inputs = (query, key, value)
    options = dict(block_size=16, allow_empty_rows=True, return_lse=True)
    out, lse = block_sparse_attention(*inputs, blocks, **options)
    assert (out[:, :, 32:48] == 0).all() and lse[:, :, 32:48].isneginf().all()
    grads = torch.autograd.grad(out.sum() + torch.where(lse.isinf(), 0, lse).sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, 32:48] == 0).all() and (grads[1][:, :, 32:48] == 0).all()
    sinks = torch.randn(HEADS, dtype=torch.float64)
    out, lse = block_sparse_attention(*inputs, blocks, sinks=sinks, **options)
    assert (out[:, :, 32:48] == 0).all()
    assert torch.equal(lse[:, :, 40], sinks.expand(BATCH, HEADS))


def test_second_derivatives():
    query, key, value = (
        torch.randn(1, heads, 20, 8, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)
    )
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)

    def attend(query, key, value, sinks, slopes):
        options = dict(softcap=3.0, sinks=sinks, alibi_slopes=slopes, return_lse=True)
        return block_sparse_attention(
            query, key, value, SinkWindow(2, 5), is_causal=True, **options
        )

    assert torch.autograd.gradcheck(attend, (query, key, value, sinks, slopes))
    assert torch.autograd.gradgradcheck(attend, (query, key, value, sinks, slopes))


def test_perturbing_unlisted_and_future_keys_changes_nothing():
    query, key, value = make_inputs()
    layout = SinkWindow(4, 10)
    before = block_sparse_attention(query, key, value, layout, is_causal=True)
    with torch.no_grad():
        key[:, :, 40] += 5
        value[:, :, 40] -= 5
    after = block_sparse_attention(query, key, value, layout, is_causal=True)
    same = (before == after).all(-1).all(0).all(0)
    assert same[:40].all() and same[50:].all() and not same[40:50].any()


def test_half_precision_errs_no_more_than_sdpa():
    query, key, value = (tensor.detach() for tensor in make_inputs(200, head_dim=64))
    mask = layout_mask(SinkWindow(5, 30), 200, 200, True)
    exact, _ = dense_attention(query, key, value, mask)
    for dtype in (torch.float16, torch.bfloat16):
        half = [tensor.to(dtype) for tensor in (query, key, value)]
        ours = block_sparse_attention(*half, SinkWindow(5, 30), is_causal=True)
        torchs = F.scaled_dot_product_attention(*half, attn_mask=mask, enable_gqa=True)
        assert ours.dtype == dtype
        bound = 2 * (torchs.double() - exact).abs().max() + torch.finfo(dtype).eps
        assert (ours.double() - exact).abs().max() <= bound


def test_dropout_is_the_same_in_both_directions():
    inputs = make_inputs(70)
    layout, dropout_p = SinkWindow(5, 30), 0.3
    torch.manual_seed(11)
    ours = block_sparse_attention(
        *inputs, layout, is_causal=True, dropout_p=dropout_p, return_lse=True
    )
    torch.manual_seed(11)
    seed = int(torch.randint(1 << 62, ()))
    place = torch.arange(70)
    head = torch.arange(BATCH * HEADS).view(BATCH, HEADS, 1, 1)
    keep = dropout_keep(seed, dropout_p, place[:, None], place, head)
    mask = layout_mask(layout, 70, 70, True)
    assert_same(inputs, ours, dense_attention(*inputs, mask, factor=keep / (1 - dropout_p)))


def test_dropout_statistics():
    place = torch.arange(256)
    keep = dropout_keep(1234, 0.25, place[:, None], place, torch.arange(8)[:, None, None]).double()
    assert keep.mean() == pytest.approx(0.75, abs=0.003)
    assert keep.mean((0, 1)).std() < 0.02 and keep.mean((0, 2)).std() < 0.02
    centred = keep - keep.mean()
    for shift in (1, 2, 3):
        for axis in (0, 1, 2):
            correlation = (centred * centred.roll(shift, axis)).mean() / keep.var()
            assert abs(correlation) < 0.01


def test_philox_known_answers():
    """Random123's published vectors for Philox4x32-10, first output word."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert int(philox(0, zero, zero, zero)) == 0x6627E8D5
    # The fourth counter word is always 0 here, so the other published vectors do not apply.
    assert int(philox(0, ones, zero, zero)) != int(philox(0, zero, ones, zero))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_layout_tensors_of_any_dtype(dtype):
    query, key, value = make_inputs()
    blocks = torch.tril(torch.ones(7, 7)).to(dtype)
    ours = block_sparse_attention(query, key, value, blocks, block_size=16)
    mask = layout_to_mask(blocks, 16, 100, 100).expand(BATCH, HEADS, 100, 100)
    torch.testing.assert_close(ours, dense_attention(query, key, value, mask)[0])


def test_bidirectional_random_layout_in_a_padded_batch_uses_each_length():
    layout = BigBird(16, random_blocks=2)
    inputs = make_inputs(200)
    padding = torch.ones(BATCH, 200, dtype=torch.bool)
    padding[0, 120:] = False
    ours = block_sparse_attention(*inputs, layout, key_padding_mask=padding, return_lse=True)
    mask = positions_mask(layout, [(0, 0, 120), (1, 0, 200)], 200, False)
    assert_same(inputs, ours, dense_attention(*inputs, mask))


def bad_call(**changes):
    query, key, value = (tensor.detach().float() for tensor in make_inputs(64))
    arguments = dict(query=query, key=key, value=value, layout=Dense())
    arguments |= {
        name: change(arguments) if callable(change) else change for name, change in changes.items()
    }
    return block_sparse_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(query=torch.ones(2, 64, 24)), r"query got shape \(2, 64, 24\); it must be \(batch, heads, length, head_dim\)"),
        (dict(key=torch.ones(2, 3, 64, 24), value=torch.ones(2, 3, 64, 24)), r"key got 3 heads for 4 query heads; kv_heads must divide"),
        (dict(enable_gqa=False), r"key got 2 heads for 4 query heads"),
        (dict(key=torch.ones(2, 2, 64, 16)), r"key got head_dim 16; query has 24 and they must agree"),
        (dict(value=torch.ones(2, 2, 63, 24)), r"query, key, value got shapes .* batch must agree"),
        (dict(key=torch.ones(2, 2, 64, 24).double()), r"key got torch.float64 on cpu; query is torch.float32"),
        (dict(query=torch.ones(2, 4, 0, 24)), r"query got shape \(2, 4, 0, 24\); no axis may be empty"),
        (dict(key=torch.ones(2, 2, 30, 24), value=torch.ones(2, 2, 30, 24)), r"query_start got -34 .*give query_start=0"),
        (dict(dropout_p=1.0), r"dropout_p got 1.0; it must be in \[0, 1\)"),
        (dict(softcap=0.0), r"softcap got 0.0; it must be positive"),
        (dict(sinks=torch.ones(3)), r"sinks got torch.float32 of shape \(3,\); .* of shape \(query_heads,\) = \(4,\)"),
        (dict(sinks=torch.ones(4, dtype=torch.int64)), r"sinks got torch.int64 of shape \(4,\); it must be floating point"),
        (dict(sinks=torch.ones(4, device="meta")), r"sinks is on meta; it must be on the device of query, cpu; move it"),
        (dict(alibi_slopes=torch.ones(3)), r"alibi_slopes got torch.float32 of shape \(3,\); .*\(batch, query_heads\) = \(2, 4\)"),
        (dict(alibi_slopes=torch.ones(1, 4)), r"alibi_slopes got torch.float32 of shape \(1, 4\); .* give one slope per query head"),
        (dict(alibi_slopes=torch.ones(4, dtype=torch.int64)), r"alibi_slopes got torch.int64 of shape \(4,\); it must be floating point"),
        (dict(alibi_slopes=torch.ones(4, device="meta")), r"alibi_slopes is on meta; it must be on the device of query, cpu; move it"),
        (dict(scale=float("nan")), r"scale got nan; it must be finite"),
        (dict(attn_mask=torch.ones(64, 64, dtype=torch.bool, device="meta")), r"attn_mask is on meta; it must be on the device of query"),
        (dict(sequences=Sequences.uniform(3, 64, 64, 0, torch.device("cpu"))),
         r"sequences got a table made for \(batch, query_len, kv_len\) = \(3, 64, 64\); this call has \(2, 64, 64\); make one"),
        (dict(sequences=Sequences.uniform(2, 64, 64, 0, torch.device("cpu")), query_start=7),
         r"query_start got 7 beside sequences, which says where the queries stand; give one"),
        (dict(document_ids=torch.zeros(2, 64, dtype=torch.int64), query_start=7), r"query_start got 7 beside document_ids"),
        (dict(attn_mask=torch.ones(3, 64, 64, dtype=torch.bool)), r"attn_mask got shape \(3, 64, 64\); it must broadcast"),
        (dict(key_padding_mask=torch.ones(2, 64)), r"key_padding_mask got torch.float32 of shape \(2, 64\); it must be bool"),
        (dict(document_ids=torch.ones(2, 32, dtype=torch.int64)), r"document_ids got shape \(2, 32\)"),
        (dict(document_ids=torch.tensor([[0] * 20 + [1] * 20 + [0] * 24] * 2)), r"document_ids got an id in two places"),
        (dict(document_ids=torch.zeros(2, 64, dtype=torch.int64), key_padding_mask=torch.ones(2, 64).bool()),
         r"key_padding_mask and document_ids got values together"),
        (dict(layout=torch.tril(torch.ones(2, 2)), block_size=16), r"layout got 2 x 2 entries of 16 tokens.*this call has 64 and 64"),
        (dict(layout=torch.ones(3, 4, 4), block_size=16), r"layout got 3 heads in TensorLayout.*the query has 4 heads"),
        (dict(layout=BLOCKS[:3, :4, :4], block_size=16), r"layout got 3 heads in TensorLayout.*the query has 4 heads"),
        (dict(layout=PerHead((Dense(),))), r"PerHead with 1 layouts; the query has 4 heads"),
        (dict(layout=1 - torch.eye(4), block_size=16, is_causal=True),
         r"leaves 16 queries without a key \(first: position 0, with causality\).*allow_empty_rows=True"),
        (dict(layout=BlockDiagonal(16) & SlidingWindow(4), impl="cuda"),
         r"impl got 'cuda'; it must be one of \('auto', 'triton', 'torch'\)"),
        (dict(layout="bigbirb"), r"layout got the name 'bigbirb'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        bad_call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(query=torch.ones(2, 4, 64, 24, dtype=torch.int64)), r"query got dtype torch.int64; it must be float16"),
        (dict(query=None), r"query got NoneType; it must be a tensor; convert it"),
        (dict(attn_mask=[[True]]), r"attn_mask got list; it must be a tensor"),
        (dict(key_padding_mask=[[True]]), r"key_padding_mask got list; it must be a tensor"),
        (dict(document_ids=[[0]]), r"document_ids got list; it must be a tensor"),
        (dict(sinks=[0.0] * 4), r"sinks got list; it must be a tensor"),
        (dict(alibi_slopes=[0.5] * 4), r"alibi_slopes got list; it must be a tensor"),
        (dict(sequences=torch.zeros(1, 7)), r"sequences got Tensor; it must be a Sequences; make one"),
        (dict(query_start=1.5), r"query_start got 1.5; it must be an integer"),
        (dict(attn_mask=torch.ones(64, 64)), r"attn_mask got dtype torch.float32; it must be bool.*convert a 0/1 mask with .bool\(\)"),
        (dict(document_ids=torch.ones(2, 64)), r"document_ids got dtype torch.float32; it must be an integer type"),
        (dict(layout=PerLayer({0: Dense()})), r"layout got a PerLayer; one attention call needs the layout of one layer"),
        (dict(layout=[1]), r"layout got list; it must be a layout"),
    ],
)  # fmt: skip
def test_wrong_types_are_refused_with_the_remedy(changes, message):
    with pytest.raises(TypeError, match=message):
        bad_call(**changes)


def test_a_longer_sequence_than_the_layout_raises_in_the_middle_of_a_generation():
    blocks = torch.tril(torch.ones(4, 4))
    query, key, value = make_inputs(1, 64)
    block_sparse_attention(query, key, value, blocks, block_size=16, is_causal=True)
    query, key, value = make_inputs(1, 65)
    with pytest.raises(ValueError, match="layout got 4 x 4 entries of 16 tokens"):
        block_sparse_attention(query, key, value, blocks, block_size=16, is_causal=True)


def test_padding_rows_have_no_sink_and_finite_gradients():
    inputs = make_inputs()
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    padding = torch.ones(BATCH, 100, dtype=torch.bool)
    padding[0, :30] = False
    out, lse = block_sparse_attention(
        *inputs,
        SlidingWindow(9),
        is_causal=True,
        sinks=sinks,
        key_padding_mask=padding,
        return_lse=True,
    )
    assert lse[0, :, :30].isneginf().all() and (out[0, :, :30] == 0).all()
    loss = out.square().sum() + torch.where(lse.isinf(), 0, lse).sum()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (*inputs, sinks)))


def test_inference_mode_does_not_spoil_later_training():
    block_index.clear_cache()
    inputs = make_inputs(77)
    with torch.inference_mode():
        mask, blocks = torch.rand(77, 77) > 0.3, torch.tril(torch.ones(5, 5))
        for _ in range(2):
            block_sparse_attention(*inputs, SinkWindow(3, 9), is_causal=True)
            block_sparse_attention(*inputs, blocks, block_size=16, attn_mask=mask)
    out = block_sparse_attention(*inputs, SinkWindow(3, 9), is_causal=True)
    grads = torch.autograd.grad(out.sum(), inputs, create_graph=True)
    torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)


def test_meta_tensors_are_refused_with_the_remedy():
    query, key, value = (tensor.to("meta") for tensor in make_inputs(64))
    with pytest.raises(
        NotImplementedError, match="query is on the meta device; .*move it to a CPU"
    ):
        block_sparse_attention(query, key, value, Dense())


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_a_mask_changed_between_forward_and_backward_is_refused(name):
    inputs = make_inputs()
    mask = torch.ones(100, 100) if name == "attn_mask" else torch.ones(BATCH, 100)
    mask = mask.bool()
    mask[:, 5] = False
    out = block_sparse_attention(*inputs, Dense(), **{name: mask})
    mask.fill_(True)
    with pytest.raises(
        RuntimeError, match=f"{name} got changed in place between .*pass {name}.clone"
    ):
        out.sum().backward()


def test_autocast_does_not_round_the_scores():
    inputs = make_inputs(dtype=torch.float32)
    expected = block_sparse_attention(*inputs, SlidingWindow(50), return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = block_sparse_attention(*inputs, SlidingWindow(50), return_lse=True)
        grads = torch.autograd.grad(ours[0].square().sum(), inputs)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    expected_grads = torch.autograd.grad(expected[0].square().sum(), inputs)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)


def test_a_padding_mask_that_hides_nothing_changes_nothing():
    """Also for queries past the last key, which stand at no padding."""
    query, _, _ = make_inputs(100)
    _, key, value = make_inputs(60)
    nothing = torch.ones(BATCH, 60, dtype=torch.bool)
    expected = block_sparse_attention(query, key, value, Dense(), query_start=0)
    ours = block_sparse_attention(
        query, key, value, Dense(), query_start=0, key_padding_mask=nothing
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 50, 90], r"cu_seqlens got \[0, 50, 90\] for 70 tokens; it must ascend .*at most their number; give"),
        ([0, 50, 20], r"cu_seqlens got \[0, 50, 20\] for 70 tokens; it must ascend"),
        ([0], r"cu_seqlens got torch.int64 of shape \(1,\); it must be a vector of at least two integers; give"),
    ],
)  # fmt: skip
def test_wrong_cu_seqlens_are_refused_with_the_remedy(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        Sequences.from_cu_seqlens(torch.tensor(cu_seqlens), 70)


def test_a_mask_that_hides_little_keeps_every_row():
    """Whole tiles are kept, and the last ones end before their tile does; they share the mask of causality."""
    inputs = make_inputs(100)
    mask = torch.ones(100, 100, dtype=torch.bool)
    mask[99, 0] = False
    ours = block_sparse_attention(*inputs, Dense(), is_causal=True, attn_mask=mask, return_lse=True)
    expected = dense_attention(*inputs, mask.tril().expand(BATCH, HEADS, 100, 100))
    assert_same(inputs, ours, expected)


def test_a_call_like_an_earlier_one_is_not_checked_again_and_means_the_same():
    layout = SlidingWindow(37)
    scale = torch.tensor(0.5)

    def attend(**options):
        torch.manual_seed(0)
        tensors = (torch.randn(1, 2, 100, 16) for _ in range(3))
        return block_sparse_attention(*tensors, layout, is_causal=True, **options)

    expected = attend(scale=0.5)
    known = attention._prepare_known.cache_info()
    assert torch.equal(attend(scale=scale), expected)
    assert attention._prepare_known.cache_info().hits == known.hits + 1
    scale.fill_(0.25)
    assert torch.equal(attend(scale=scale), attend(scale=0.25))
    block_index.clear_cache()
    assert torch.equal(attend(scale=0.5), expected)
    assert len(block_index.cached_indices()) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="scale got inf"):
            attend(scale=math.inf)
