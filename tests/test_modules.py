"""The successors of xFormers' modules: its example, its meaning of masks, and what they refuse."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_blocksparse import BlockSparseAttention, MultiHeadDispatch, layout_to_mask, mask_to_layout
from hf_blocksparse.layouts import SlidingWindow

HEADS, HEAD_DIM, BLOCK_SIZE = 4, 16, 16
EMBEDDING = HEADS * HEAD_DIM


def causal_layout(num_blocks: int) -> Tensor:
    return torch.tril(torch.ones(HEADS, num_blocks, num_blocks))


def causal_mask(length: int) -> Tensor:
    return torch.tril(torch.ones(length, length))


def make_qkv(query_len: int, key_len: int, batch: int = 2, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(query_len + 1000 * key_len)
    lengths = (query_len, key_len, key_len)
    return [
        torch.randn(
            batch, HEADS, length, HEAD_DIM, dtype=dtype, generator=generator
        ).requires_grad_()
        for length in lengths
    ]


def make_dispatch(attention: nn.Module, **options) -> MultiHeadDispatch:
    torch.manual_seed(0)
    return MultiHeadDispatch(
        dim_model=EMBEDDING, num_heads=HEADS, attention=attention, **options
    ).double()


def as_torch_attention(dispatch: MultiHeadDispatch) -> nn.MultiheadAttention:
    """torch's module with the same weights."""
    reference = nn.MultiheadAttention(
        dispatch.dim_model, dispatch.num_heads, batch_first=True, dtype=torch.float64
    )
    inputs = [dispatch.in_proj_container[name] for name in ("q_proj", "k_proj", "v_proj")]
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([projection.weight for projection in inputs]))
        reference.in_proj_bias.copy_(torch.cat([projection.bias for projection in inputs]))
    reference.out_proj.load_state_dict(dispatch.proj.state_dict())
    return reference


@pytest.mark.gpu
def test_the_published_example_runs_with_only_the_import_changed():
    # The tutorial "Using BlockSparseAttention" of xFormers v0.0.2 to v0.0.10.
    BATCH = 2
    HEADS = 8
    SEQ = 2048
    EMB = 1024
    BLOCK_SIZE = 32
    DROPOUT = 0.1
    dtype = torch.float16

    causal_mask = torch.tril(torch.ones((SEQ, SEQ), device=torch.device("cuda"), dtype=dtype))

    blocks = SEQ // BLOCK_SIZE
    causal_layout = torch.tril(torch.ones([HEADS, blocks, blocks]))

    attention = BlockSparseAttention(
        layout=causal_layout, block_size=BLOCK_SIZE, dropout=DROPOUT, num_heads=HEADS
    )

    multi_head = (
        MultiHeadDispatch(
            seq_len=SEQ,
            dim_model=EMB,
            residual_dropout=DROPOUT,
            num_heads=HEADS,
            attention=attention,
        )
        .cuda()
        .half()
    )

    query = torch.randn(
        (BATCH, SEQ, EMB), requires_grad=True, device=torch.device("cuda"), dtype=dtype
    )

    att_val = multi_head(query=query, key=query, value=query, att_mask=causal_mask)

    assert att_val.shape == (BATCH, SEQ, EMB) and att_val.dtype == dtype
    att_val.float().square().mean().backward()
    assert query.grad.isfinite().all() and query.grad.abs().max() > 0

    multi_head.eval()
    before = multi_head(query=query, key=query, value=query, att_mask=causal_mask)
    changed = query.detach().clone()
    changed[:, 1000:] += 1
    after = multi_head(query=changed, key=changed, value=changed, att_mask=causal_mask)
    assert torch.equal(before[:, :1000], after[:, :1000])
    assert not torch.equal(before[:, 1000:], after[:, 1000:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_published_example_in_small_on_a_cpu(dtype):
    length, embedding, block_size, dropout = 256, 128, 32, 0.1
    blocks = length // block_size
    attention = BlockSparseAttention(
        layout=torch.tril(torch.ones([HEADS, blocks, blocks])),
        block_size=block_size,
        dropout=dropout,
        num_heads=HEADS,
    )
    multi_head = MultiHeadDispatch(
        seq_len=length,
        dim_model=embedding,
        residual_dropout=dropout,
        num_heads=HEADS,
        attention=attention,
    ).to(dtype)
    mask = torch.tril(torch.ones((length, length), dtype=dtype))
    query = torch.randn((2, length, embedding), requires_grad=True, dtype=dtype)

    result = multi_head(query=query, key=query, value=query, att_mask=mask)

    assert result.shape == query.shape and result.dtype == dtype
    result.float().square().mean().backward()
    assert query.grad.isfinite().all() and query.grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in multi_head.parameters())


@pytest.mark.parametrize("length", [1, 37, 64])
@pytest.mark.parametrize("causality", ["mask", "argument"])
def test_causal_layout_equals_torch_multihead_attention(length, causality):
    attention = BlockSparseAttention(
        causal_layout(4), BLOCK_SIZE, num_heads=HEADS, causal=causality == "argument"
    )
    dispatch = make_dispatch(attention, seq_len=64)
    reference = as_torch_attention(dispatch)
    hidden = torch.randn(2, length, EMBEDDING, dtype=torch.float64)
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))

    mask = causal_mask(length) if causality == "mask" else None
    result = dispatch(ours, att_mask=mask)
    forbidden = causal_mask(length) == 0
    expected, _ = reference(theirs, theirs, theirs, attn_mask=forbidden, need_weights=False)

    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)
    result.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.cat([p.weight.grad for p in dispatch.in_proj_container.values()]),
        reference.in_proj_weight.grad,
        rtol=1e-9,
        atol=1e-9,
    )


def test_layout_per_head_without_a_mask_is_block_exact():
    layout = torch.rand(HEADS, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    layout |= torch.eye(4, dtype=torch.bool)
    attention = BlockSparseAttention(layout, BLOCK_SIZE, num_heads=HEADS)
    query, key, value = make_qkv(64, 64)

    expected = F.scaled_dot_product_attention(query, key, value, layout_to_mask(layout, BLOCK_SIZE))

    torch.testing.assert_close(attention(query, key, value), expected, rtol=1e-9, atol=1e-10)


def test_max_pooled_layout_and_the_mask_it_came_from_give_the_mask():
    distance = torch.arange(80)[:, None] - torch.arange(80)[None, :]
    mask = (distance % 7 == 0) & (distance >= 0)
    attention = BlockSparseAttention(mask_to_layout(mask, BLOCK_SIZE), BLOCK_SIZE)
    query, key, value = make_qkv(80, 80)

    expected = F.scaled_dot_product_attention(query, key, value, mask)

    torch.testing.assert_close(
        attention(query, key, value, att_mask=mask.float()), expected, rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64],
)
@pytest.mark.parametrize("shape", [(48, 48), (HEADS, 48, 48), (2, 1, 48, 48), (2, HEADS, 48, 48)])
def test_zero_one_masks_of_any_dtype_and_shape_mask(dtype, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask |= torch.eye(48, dtype=torch.bool)
    attention = BlockSparseAttention(torch.ones(3, 3), BLOCK_SIZE)
    query, key, value = make_qkv(48, 48)

    expected = F.scaled_dot_product_attention(query, key, value, mask)

    torch.testing.assert_close(
        attention(query, key, value, att_mask=mask.to(dtype)), expected, rtol=1e-9, atol=1e-10
    )


def test_a_mask_changed_in_place_is_read_again():
    attention = BlockSparseAttention(torch.ones(2, 2), BLOCK_SIZE)
    query, key, value = make_qkv(32, 32)
    mask = torch.ones(32, 32)
    unmasked = attention(query, key, value, att_mask=mask)
    mask.tril_()
    masked = attention(query, key, value, att_mask=mask)

    assert not torch.equal(masked, unmasked)
    torch.testing.assert_close(masked, attention(query, key, value, att_mask=causal_mask(32)))
    mask[0, 0] = 0.5
    with pytest.raises(ValueError, match="att_mask got the value 0.5; it must hold 0 and 1 only"):
        attention(query, key, value, att_mask=mask)


def test_masks_made_in_inference_mode_are_read():
    attention = BlockSparseAttention(torch.ones(2, 2), BLOCK_SIZE)
    query, key, value = make_qkv(32, 32)
    expected = attention(query, key, value, att_mask=causal_mask(32)).detach()
    with torch.inference_mode():
        result = attention(query, key, value, att_mask=causal_mask(32))
    torch.testing.assert_close(result, expected)


def test_padded_keys_do_not_matter():
    attention = BlockSparseAttention(torch.ones(3, 3), BLOCK_SIZE)
    query, key, value = (tensor.detach() for tensor in make_qkv(48, 48))
    padding = torch.ones(2, 48)
    padding[1, 30:] = 0

    before = attention(query, key, value, key_padding_mask=padding)
    key[1, :, 30:] += 1
    value[1, :, 30:] += 1
    after = attention(query, key, value, key_padding_mask=padding)

    assert torch.equal(before, after)
    expected = F.scaled_dot_product_attention(query[1, :, :30], key[1, :, :30], value[1, :, :30])
    torch.testing.assert_close(after[1, :, :30], expected, rtol=1e-9, atol=1e-10)


def test_fewer_queries_than_keys_are_the_last_rows():
    attention = BlockSparseAttention(causal_layout(4), BLOCK_SIZE, num_heads=HEADS, causal=True)
    query, key, value = make_qkv(64, 64)
    everything = attention(query, key, value)
    torch.testing.assert_close(attention(query[:, :, 50:], key, value), everything[:, :, 50:])


def test_attention_dropout_acts_in_training_only_and_keeps_the_mean():
    attention = BlockSparseAttention(torch.ones(2, 2), BLOCK_SIZE, dropout=0.25)
    # Scores of zero and values of one: an output is the share of the weights kept / (1 - dropout).
    query, key, value = torch.zeros(3, 8, HEADS, 32, HEAD_DIM).unbind()
    value = value + 1

    torch.manual_seed(0)
    dropped = attention(query, key, value)
    again = attention(query, key, value)

    assert not torch.equal(dropped, again)
    kept = dropped[..., 0] * 32 * 0.75
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    count = kept.numel() * 32
    standard_error = (0.25 * 0.75 / count) ** 0.5
    assert abs(kept.sum().item() / count - 0.75) < 5 * standard_error
    torch.testing.assert_close(attention.eval()(query, key, value), torch.ones_like(value))


def test_residual_dropout_acts_on_the_output_in_training_only():
    dispatch = make_dispatch(
        BlockSparseAttention(torch.ones(2, 2), BLOCK_SIZE), residual_dropout=0.5
    )
    hidden = torch.randn(4, 32, EMBEDDING, dtype=torch.float64)
    dropped = dispatch(hidden)
    kept = dispatch.eval()(hidden)

    is_zero = dropped == 0
    count = is_zero.numel()
    assert abs(is_zero.double().mean().item() - 0.5) < 5 * (0.25 / count) ** 0.5
    torch.testing.assert_close(dropped[~is_zero], 2 * kept[~is_zero])


@pytest.mark.parametrize("layout", ["sliding_window", SlidingWindow(8), torch.ones(2, 2)])
def test_layouts_presets_and_tensors_are_accepted(layout):
    attention = BlockSparseAttention(layout, causal=True)
    query, key, value = make_qkv(32, 32)
    mask = attention.layout.to_mask(32, is_causal=True)
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(attention(query, key, value), expected, rtol=1e-9, atol=1e-10)


def test_key_and_value_default_to_the_query():
    dispatch = make_dispatch(BlockSparseAttention(torch.ones(2, 2), BLOCK_SIZE))
    hidden = torch.randn(1, 20, EMBEDDING, dtype=torch.float64)
    assert torch.equal(dispatch(hidden), dispatch(query=hidden, key=hidden, value=hidden))


def test_another_attention_module_can_be_dispatched():
    class Plain(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    dispatch = make_dispatch(Plain())
    hidden = torch.randn(1, 20, EMBEDDING, dtype=torch.float64)
    expected, _ = as_torch_attention(dispatch)(hidden, hidden, hidden, need_weights=False)
    torch.testing.assert_close(dispatch(hidden), expected, rtol=1e-9, atol=1e-10)


def test_parameters_have_xformers_names_and_start_like_torch():
    dispatch = make_dispatch(BlockSparseAttention(torch.ones(2, 2)))
    names = {f"in_proj_container.{p}_proj.{w}" for p in "qkv" for w in ("weight", "bias")}
    assert set(dispatch.state_dict()) == names | {"proj.weight", "proj.bias"}
    bound = (6 / (2 * EMBEDDING)) ** 0.5
    for projection in dispatch.in_proj_container.values():
        assert 0.9 * bound < projection.weight.abs().max() <= bound
    assert all(p.abs().max() == 0 for name, p in dispatch.named_parameters() if "bias" in name)
    without = MultiHeadDispatch(
        EMBEDDING, HEADS, BlockSparseAttention(torch.ones(2, 2)), bias=False
    )
    assert not [name for name in without.state_dict() if "bias" in name]


def test_modules_copy_and_pickle_after_use():
    dispatch = make_dispatch(BlockSparseAttention(causal_layout(2), BLOCK_SIZE, num_heads=HEADS))
    hidden = torch.randn(1, 32, EMBEDDING, dtype=torch.float64)
    result = dispatch(hidden, att_mask=causal_mask(32))
    for twin in (copy.deepcopy(dispatch), pickle.loads(pickle.dumps(dispatch))):
        assert torch.equal(twin(hidden, att_mask=causal_mask(32)), result)


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        (
            "att_mask",
            torch.zeros(32, 32).masked_fill(causal_mask(32) == 0, float("-inf")),
            "att_mask got the value -inf; it must hold 0 and 1 only, .* convert an additive mask "
            "with `att_mask == 0`",
        ),
        (
            "att_mask",
            torch.full((32, 32), float("nan")),
            "att_mask got the value nan; it must hold",
        ),
        ("att_mask", torch.zeros(32, 32), "att_mask got zeros only; 0 hides a key"),
        ("att_mask", causal_mask(31), r"att_mask got shape \(31, 31\); its last two axes must be"),
        ("att_mask", torch.ones(32), r"att_mask got shape \(32,\); its last two axes must be"),
        ("key_padding_mask", torch.full((2, 32), 2), "key_padding_mask got the value 2; it must"),
        ("key_padding_mask", torch.zeros(2, 32), "key_padding_mask got zeros only; 0 hides a key"),
    ],
)
def test_masks_that_do_not_mask_are_refused(name, mask, message):
    attention = BlockSparseAttention(torch.ones(2, 2), BLOCK_SIZE)
    with pytest.raises(ValueError, match=message):
        attention(*make_qkv(32, 32), **{name: mask})


def build_attention(**options):
    return BlockSparseAttention(**{"layout": torch.ones(HEADS, 2, 2), **options})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_attention(block_size=24), "block_size got 24; it must be one of"),
        (lambda: build_attention(dropout=1.0), "dropout got 1.0; it must be at least 0 and below"),
        (
            lambda: build_attention(num_heads=3),
            "num_heads got 3 for a layout of 4 heads; they must be equal",
        ),
        (
            lambda: build_attention(layout=torch.full((2, 2), 0.5)),
            "tensor got the value 0.5; it must hold 0 and 1 only",
        ),
        (
            lambda: build_attention(layout=SlidingWindow(8), block_size=64),
            "block_size got 64 beside SlidingWindow",
        ),
        (
            lambda: MultiHeadDispatch(30, HEADS, nn.Identity()),
            "num_heads got 4 for dim_model 30; it must divide dim_model",
        ),
        (
            lambda: MultiHeadDispatch(EMBEDDING, 0, nn.Identity()),
            "num_heads got 0 for dim_model 64; it must divide dim_model",
        ),
        (
            lambda: MultiHeadDispatch(EMBEDDING, HEADS, nn.Identity(), residual_dropout=-0.1),
            "residual_dropout got -0.1; it must be at least 0",
        ),
        (
            lambda: MultiHeadDispatch(EMBEDDING, 8, build_attention(num_heads=HEADS)),
            "attention got num_heads 4; this module has 8 heads",
        ),
        (
            lambda: MultiHeadDispatch(EMBEDDING, HEADS, build_attention(), seq_len=33),
            "which reach 32 query and 32 key positions; this call has 33 and 33",
        ),
    ],
)
def test_wrong_arguments_are_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_inputs_are_refused_at_the_call():
    attention = build_attention(num_heads=HEADS)
    with pytest.raises(ValueError, match=r"q got 2 heads in shape .* num_heads is 4; split"):
        attention(*(tensor[:, :2] for tensor in make_qkv(32, 32)))
    with pytest.raises(ValueError, match="which reach 32 query and 32 key positions"):
        attention(*make_qkv(33, 33))
    with pytest.raises(
        ValueError, match=r"key got shape \(1, 20, 63\); it must be \[batch, length"
    ):
        make_dispatch(attention)(
            torch.zeros(1, 20, EMBEDDING, dtype=torch.float64), key=torch.zeros(1, 20, 63)
        )
