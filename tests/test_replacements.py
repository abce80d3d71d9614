"""Families outside transformers' attention interface: a replaced class computes what the family's own does, within the layout."""

import copy
import io
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from test_patch import LOGITS, assert_same, run
from tiny_models import HEADS, VOCABULARY, eager_attention_within, make_batch, real_tokens
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BigBirdConfig,
    BigBirdForCausalLM,
    BigBirdForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LongformerConfig,
    LongformerForMaskedLM,
    MptConfig,
    MptForCausalLM,
    StaticCache,
    XLNetConfig,
    XLNetModel,
)
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    sdpa_mask,
)
from transformers.models.big_bird import modeling_big_bird

from hf_blocksparse import (
    BlockDiagonal,
    Dense,
    PerLayer,
    SinkWindow,
    SlidingWindow,
    native_layout,
)
from hf_blocksparse.model_layouts import attention_modules, state_of
from hf_blocksparse.patch import patch_model, unpatch_model
from hf_blocksparse.replacements import is_replaced

_TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_GPT = dict(_TOKENS, n_positions=256, n_embd=32, n_layer=2, n_head=HEADS, rotary_dim=4)
_FALCON = dict(
    _TOKENS,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    max_position_embeddings=256,
)
FAMILIES = {
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(**_TOKENS, hidden_size=32, n_layer=2, n_head=HEADS)
    ),
    "bloom, six heads": lambda: BloomForCausalLM(
        BloomConfig(**_TOKENS, hidden_size=48, n_layer=2, n_head=6)
    ),
    "falcon, rotary, one key head": lambda: FalconForCausalLM(FalconConfig(**_FALCON)),
    "falcon, rotary, grouped": lambda: FalconForCausalLM(
        FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "falcon, alibi": lambda: FalconForCausalLM(
        FalconConfig(
            **_FALCON, alibi=True, multi_query=False, parallel_attn=False, attention_dropout=0.0
        )
    ),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**_GPT)),
    "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**_GPT, n_ctx=256)),
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            **_TOKENS,
            hidden_size=32,
            num_layers=2,
            num_heads=HEADS,
            max_position_embeddings=256,
            attention_types=[[["global", "local"], 1]],
            window_size=9,
        )
    ),
    "mpt": lambda: MptForCausalLM(
        MptConfig(**_TOKENS, d_model=32, n_layers=2, n_heads=HEADS, max_seq_len=256)
    ),
    "mpt, six heads, clipped": lambda: MptForCausalLM(
        MptConfig(
            **_TOKENS,
            d_model=48,
            n_layers=2,
            n_heads=6,
            max_seq_len=256,
            attn_config={"clip_qkv": 1.0},
        )
    ),
}
FOUR_HEADS = [name for name in FAMILIES if "six" not in name]
# Their ALiBi counts the real tokens alone.
COUNTING_TOKENS = ["bloom", "falcon, alibi"]
SPARSE = SinkWindow(sink=3, window=6) | BlockDiagonal(10)


def make_model(family):
    """A seeded model in evaluation mode whose weights are spread out, with the family's own attention."""
    torch.manual_seed(0)
    return spread_out(FAMILIES[family]())


def spread_out(model):
    torch.manual_seed(0)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@contextmanager
def own_attention_within(layout):
    """The family's own attention with its mask intersected with `layout`, also where it asks for a mask of booleans."""
    with eager_attention_within(layout, is_causal=True):
        as_floats = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
        AttentionMaskInterface.register("sdpa", lambda *a, **kw: as_floats(*a, **kw) == 0)
        try:
            yield
        finally:
            AttentionMaskInterface.register("sdpa", sdpa_mask)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_layout_is_the_model_itself(family, padded):
    model = make_model(family)
    batch = make_batch(padded=padded)
    expected = run(model, batch)
    assert_same(run(patch_model(model, Dense()), batch), expected)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FOUR_HEADS)
def test_sparse_layout_is_the_model_with_its_mask(family, padded):
    model = make_model(family)
    batch = make_batch(padded=padded)
    dense = run(model, batch)
    with own_attention_within(SPARSE):
        expected = run(model, batch)
    assert (expected[0] - dense[0]).abs().max() > 0.1
    assert_same(run(patch_model(model, SPARSE), batch), expected)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic cache", "static cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_with_a_dense_layout_is_the_model_itself(family, static):
    model = make_model(family)
    batch = make_batch(14)
    batch["attention_mask"][1] = 1
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(**batch, **options)
    if static:
        options |= dict(cache_implementation="static", disable_compile=True)
    assert torch.equal(patch_model(model, Dense()).generate(**batch, **options), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FOUR_HEADS)
def test_decoding_step_by_step_is_prefill(family, cache):
    model = patch_model(make_model(family), SPARSE)
    batch = make_batch(24)
    batch["attention_mask"][1] = 1
    whole = model(**batch).logits
    kept = None if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    parts = []
    for start, stop in [(0, 11), (11, 16), *((place, place + 1) for place in range(16, 24))]:
        made = model(
            input_ids=batch["input_ids"][:, start:stop],
            attention_mask=batch["attention_mask"][:, :stop],
            past_key_values=kept,
            use_cache=True,
        )
        kept = made.past_key_values
        parts.append(made.logits)
    real = real_tokens(batch)
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], **LOGITS)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatching_is_bit_exact(family):
    model = make_model(family)
    batch = make_batch()
    config, state = copy.deepcopy(model.config.to_dict()), list(model.state_dict())
    before = {path: (type(module), dict(module.__dict__)) for path, module in model.named_modules()}
    logits = model(**batch).logits
    patch_model(model, SlidingWindow(3))
    assert not torch.equal(model(**batch).logits, logits)
    assert list(model.state_dict()) == state
    other = copy.deepcopy(model)
    patch_model(model, SinkWindow(1, 2))
    for one in (unpatch_model(model), unpatch_model(other)):
        assert one.config.to_dict() == config
        assert torch.equal(one(**batch).logits, logits)
        for path, module in one.named_modules():
            assert (type(module), set(module.__dict__)) == (before[path][0], set(before[path][1]))
            assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(
        module.__dict__.get("use_alibi") == before[path][1].get("use_alibi")
        for path, module in model.named_modules()
    )


@pytest.mark.parametrize("family", FOUR_HEADS)
def test_a_saved_model_loads_sparse_again(family, tmp_path):
    model = make_model(family)
    batch = make_batch()
    dense = model(**batch).logits
    model.save_pretrained(tmp_path / "dense")
    sparse = patch_model(model, SPARSE)(**batch).logits
    model.save_pretrained(tmp_path / "0")
    for generation in (0, 1):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(generation))
        assert type(loaded) is type(model)
        assert torch.equal(loaded(**batch).logits, sparse)
        loaded.save_pretrained(tmp_path / str(generation + 1))
    flagged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", block_sparse=SPARSE)
    assert torch.equal(flagged(**batch).logits, sparse)
    own = unpatch_model(loaded)(**batch).logits
    torch.testing.assert_close(own[real_tokens(batch)], dense[real_tokens(batch)], **LOGITS)


@pytest.mark.parametrize("family", ["bloom", "falcon, alibi", "gptj"])
def test_training_with_checkpointing_and_after_inference(family):
    model = patch_model(make_model(family), SPARSE)
    batch = make_batch()
    with torch.inference_mode():
        logits = model(**batch).logits
    expected = run(model, batch)
    assert torch.equal(expected[0], logits[real_tokens(batch)])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "hidden_dropout"):
            module.hidden_dropout = 0.0
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model, batch, use_cache=False), expected)


@pytest.mark.parametrize("family", ["bloom", "falcon, alibi", "gptj", "gpt_neo", "mpt"])
def test_dropout_of_the_weights_is_drawn_in_training_only(family):
    model = patch_model(make_model(family), Dense())
    for module in attention_modules(model).values():
        if family == "mpt":
            module.attn_dropout_p = 0.5
        else:
            name = "attn_dropout" if hasattr(module, "attn_dropout") else "attention_dropout"
            if isinstance(part := getattr(module, name), torch.nn.Dropout):
                part.p = 0.5
            else:  # GPT-J's from transformers 5.24 on
                setattr(module, name, 0.5)
    batch = make_batch(padded=False)
    expected = model(**batch).logits
    assert torch.equal(model(**batch).logits, expected)
    for module in attention_modules(model).values():
        module.training = True
    assert not torch.allclose(model(**batch).logits, expected, atol=0.01)


@pytest.mark.parametrize("family", ["bloom", "gptj"])
def test_a_module_that_accelerate_hooked_is_replaced_too(family):
    model, plain = make_model(family), patch_model(make_model(family), SPARSE)
    batch = make_batch()
    logits, expected = model(**batch).logits, plain(**batch).logits
    for module in attention_modules(model).values():
        add_hook_to_module(module, ModelHook())
    assert torch.equal(patch_model(model, SPARSE)(**batch).logits, expected)
    assert torch.equal(unpatch_model(model)(**batch).logits, logits)


def test_a_patched_model_can_be_pickled():
    model = patch_model(make_model("gptj"), SPARSE)
    batch = make_batch()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", COUNTING_TOKENS)
def test_padding_between_tokens_is_refused_where_alibi_counts_tokens(family):
    model = patch_model(make_model(family), SPARSE)
    batch = make_batch()
    batch["attention_mask"][0, 15:19] = 0
    with pytest.raises(
        NotImplementedError, match="padding between real tokens; .* pad on the left"
    ):
        model(**batch)


@pytest.mark.parametrize("family", ["mpt", "gptj", "falcon, rotary, grouped"])
def test_padding_between_tokens_is_exact_elsewhere(family):
    model = make_model(family)
    batch = make_batch()
    batch["attention_mask"][0, 15:19] = 0
    expected = run(model, batch)
    assert_same(run(patch_model(model, Dense()), batch), expected)


@pytest.mark.parametrize("family", ["bloom", "mpt", "gpt_neo"])
def test_weights_are_refused(family):
    model = patch_model(make_model(family), Dense())
    with pytest.raises(NotImplementedError, match="never makes the weights; look at them in the"):
        model(**make_batch(), output_attentions=True)
    model = make_model(family)
    model.config.output_attentions = True
    patch_model(model, Dense())
    with pytest.raises(NotImplementedError, match="never makes the weights; look at them in the"):
        model(**make_batch())


@pytest.mark.parametrize("family", ["bloom", "mpt", "gpt_neo"])
def test_packed_documents_are_refused_where_the_model_drops_what_says_so(family, tmp_path):
    model, batch = patch_model(make_model(family), SPARSE), make_batch(padded=False)
    lengths = torch.tensor([0, 13, 40], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q got packed documents in .*drops"):
        model(**batch, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_k got packed documents"):
        model.base_model(**batch, cu_seq_lens_k=lengths)
    positions = torch.cat([torch.arange(13), torch.arange(27)])[None].expand(3, -1)
    if family != "gpt_neo":
        with pytest.raises(NotImplementedError, match="whose forward does not take it and would"):
            model(**batch, position_ids=positions)
    else:
        packed = model(**batch, position_ids=positions, use_cache=False).logits
        parts = [model(part).logits for part in batch["input_ids"].split([13, 27], 1)]
        torch.testing.assert_close(packed, torch.cat(parts, 1), **LOGITS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q got packed documents in .*drops"):
        loaded(**batch, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
    for one in (model, loaded):
        unpatch_model(one)
        assert not any(module._forward_pre_hooks for module in one.modules())


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["bloom", "mpt", "gptj", "falcon, rotary, grouped"])
def test_a_compiled_model_is_itself(family, padded):
    model, batch = patch_model(make_model(family), SPARSE), make_batch(padded=padded)
    real, compiled = real_tokens(batch), torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(**batch).logits[real]
        torch.testing.assert_close(compiled(**batch).logits[real], expected, **LOGITS)


def test_a_layer_cannot_keep_its_own_attention(tmp_path):
    model = make_model("bloom")
    config = model.config.to_dict()
    with pytest.raises(ValueError, match="layout leaves transformer.h.1.self_attention its own at"):
        patch_model(model, {0: SPARSE})
    assert model.config.to_dict() == config
    assert not any(is_replaced(module) for module in model.modules())
    batch = make_batch()
    patch_model(model, {0: SPARSE, 1: Dense()})
    assert [state_of(module).layout for module in attention_modules(model).values()] == [
        SPARSE,
        Dense(),
    ]
    model(**batch)
    make_model("bloom").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, block_sparse={0: SPARSE})
    with pytest.raises(ValueError, match="layout leaves .*self_attention its own attention"):
        loaded(**batch)


def test_another_implementation_asks_for_unpatching():
    model = patch_model(make_model("bloom"), SPARSE)
    model.config._attn_implementation = "eager"
    with pytest.raises(NotImplementedError, match="got 'eager' .* call unpatch_model"):
        model(**make_batch())


def test_a_mask_tensor_beside_windows_of_the_model_is_refused():
    model = patch_model(make_model("gpt_neo"), SPARSE)
    batch = make_batch(padded=False)
    mask = torch.ones(3, 1, 40, 40).tril().bool()
    with pytest.raises(NotImplementedError, match="whose layers have windows of their own"):
        model(**batch, attention_mask=mask)


_SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
_ENCODER = dict(
    _TOKENS,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    intermediate_size=48,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=512,
)


def longformer(window=(8, 16)):
    torch.manual_seed(0)
    return spread_out(
        LongformerForMaskedLM(LongformerConfig(**_ENCODER, attention_window=list(window)))
    )


def big_bird(attention_type="block_sparse"):
    torch.manual_seed(0)
    config = BigBirdConfig(
        **_ENCODER, attention_type=attention_type, block_size=16, num_random_blocks=2
    )
    return spread_out(BigBirdForMaskedLM(config))


def global_tokens(batch):
    """Another number of them in each row, none in the last."""
    mask = torch.zeros_like(batch["input_ids"])
    mask[0, [9, 20]] = 1
    mask[1, [0, 1, 5, 30]] = 1
    return batch | {"global_attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("with_global", [False, True], ids=["local", "global"])
def test_a_longformer_is_itself_with_its_windows(with_global, padded):
    model = longformer()
    batch = make_batch(47, padded=padded)
    if with_global:
        batch = global_tokens(batch)
    expected = run(model, batch)
    layout = native_layout(model.config)
    assert layout == PerLayer({0: SlidingWindow(5), 1: SlidingWindow(9)})
    assert_same(run(patch_model(model, layout), batch), expected)


@pytest.mark.parametrize("with_global", [False, True], ids=["local", "global"])
def test_a_longformer_takes_other_layouts(with_global):
    model, other = longformer(), longformer((4, 4))
    batch = make_batch(47)
    if with_global:
        batch = global_tokens(batch)
    assert_same(run(patch_model(model, SlidingWindow(3)), batch), run(other, batch))
    wide = run(longformer((96, 96)), batch)
    assert_same(run(patch_model(model, Dense()), batch), wide)
    patch_model(model, SinkWindow(1, 4))
    if with_global:
        with pytest.raises(NotImplementedError, match="beside them it must be a SlidingWindow"):
            model(**batch)
    else:
        assert not torch.equal(model(**batch).logits[real_tokens(batch)], wide[0])


def test_a_longformer_drops_weights_in_training():
    model = patch_model(longformer(), native_layout(longformer().config))
    batch = global_tokens(make_batch(47))
    expected = model(**batch).logits
    for module in attention_modules(model).values():
        module.dropout = 0.5
    assert torch.equal(model(**batch).logits, expected)
    for module in attention_modules(model).values():
        module.training = True
    assert not torch.allclose(model(**batch).logits, expected, atol=0.01)


@pytest.mark.parametrize("length", [256, 250, 144])
def test_a_big_bird_in_training_is_itself_with_its_blocks(length):
    model = big_bird().train()
    batch = make_batch(length)
    batch["attention_mask"][0] = 1  # its blocks count from the tensor's start
    state = np.random.get_state()[1].copy()
    layout = native_layout(model.config, length)
    assert (np.random.get_state()[1] == state).all()
    first, second = dict(layout.layers).values()
    # So short an input has no room for random blocks, and the family reads all of it.
    assert first == second == Dense() if length == 144 else first != second
    expected = run(model, batch)
    assert_same(run(patch_model(model, layout), batch), expected)
    assert model.bert.attention_type == "original_full"
    assert_same(run(unpatch_model(model), batch), expected)


def test_a_big_bird_counts_blocks_twice_where_it_warns():
    config = BigBirdConfig(**_ENCODER | {"max_position_embeddings": 4096}, block_size=64)
    with pytest.warns(UserWarning, match="length got 1024, where .* counts them twice in its soft"):
        layout = native_layout(config, 1024)
    assert dict(layout.layers)[0].block_size == 64


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("attention_type", ["original_full", "block_sparse"])
def test_a_big_bird_takes_any_layout(attention_type, padded):
    batch = make_batch(padded=padded)
    full = big_bird("original_full")
    for layout in (Dense(), SPARSE):
        with eager_attention_within(layout, is_causal=False):
            expected = run(full, batch)
        model = patch_model(big_bird(attention_type), layout)
        assert_same(run(model, batch), expected)
        # Its own attention would have switched to the full one for so short an input.
        assert unpatch_model(model).bert.attention_type == attention_type


@pytest.mark.skipif(
    not hasattr(modeling_big_bird, "create_causal_mask"),
    reason="BigBird is not causal in this version of transformers, not as a decoder either",
)
def test_a_big_bird_decodes_from_a_cache_before_it_was_ever_called():
    def decoder(attention_type):
        torch.manual_seed(0)
        config = BigBirdConfig(
            **_ENCODER, attention_type=attention_type, block_size=16, is_decoder=True
        )
        return spread_out(BigBirdForCausalLM(config))

    batch, options = make_batch(14, padded=False), dict(max_new_tokens=8, do_sample=False)
    options |= dict(eos_token_id=None, pad_token_id=0)
    expected = patch_model(decoder("original_full"), SPARSE).generate(**batch, **options)
    for use_cache in (True, False):
        model = patch_model(decoder("block_sparse"), SPARSE)
        assert torch.equal(model.generate(**batch, **options, use_cache=use_cache), expected)


@pytest.mark.parametrize("make", [longformer, big_bird])
def test_sparse_encoders_are_saved_and_undone(make, tmp_path):
    model = make()
    batch = make_batch(250)
    batch["attention_mask"][0] = 1
    logits = model(**batch).logits
    layout = native_layout(model.config, 250)
    sparse = patch_model(model, layout)(**batch).logits
    model.save_pretrained(tmp_path / "0")
    for generation in (0, 1):
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / str(generation))
        assert torch.equal(loaded(**batch).logits, sparse)
        loaded.save_pretrained(tmp_path / str(generation + 1))
    for one in (model, loaded):
        assert torch.equal(unpatch_model(one)(**batch).logits, logits)
        assert not any(is_replaced(module) for module in one.modules())


def test_cross_attention_beside_replaced_layers_is_refused():
    config = BigBirdConfig(
        **_ENCODER, attention_type="original_full", is_decoder=True, add_cross_attention=True
    )
    model = BigBirdForCausalLM(config)
    with pytest.raises(ValueError, match="layout leaves .*crossattention.self its own attention"):
        patch_model(model, Dense())
    patch_model(model, dict.fromkeys(attention_modules(model), Dense()))
    with pytest.raises(NotImplementedError, match="its cross-attention does not go through"):
        model(**make_batch(10, padded=False), encoder_hidden_states=torch.randn(3, 5, 32))


def test_native_layouts_that_cannot_be_made_say_why():
    with pytest.raises(NotImplementedError, match="family 'gptj', which has no layout of its own"):
        native_layout(GPTJConfig())
    with pytest.raises(ValueError, match="length got None for a BigBird model"):
        native_layout(BigBirdConfig())


@pytest.mark.parametrize(
    ("make", "modules"),
    [
        (
            lambda: DebertaV2Model(
                DebertaV2Config(**_SMALL, intermediate_size=32, relative_attention=True)
            ),
            r"encoder.layer.0.attention \(DebertaV2Attention\) does",
        ),
        (
            lambda: XLNetModel(
                XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=32)
            ),
            r"layer.0.rel_attn \(XLNetRelativeAttention\), layer.1.rel_attn .* do",
        ),
    ],
    ids=["deberta", "xlnet"],
)
def test_families_with_relative_positions_are_refused(make, modules):
    with pytest.raises(NotImplementedError, match=f"cannot be patched as a whole: {modules} not"):
        patch_model(make(), SlidingWindow(4))
