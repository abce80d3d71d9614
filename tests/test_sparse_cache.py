"""The freeing cache: what it holds suffices exactly, and does not grow."""

import copy
import gc
import math
import weakref

import pytest
import test_replacements
import torch
from tiny_models import FAMILIES, HEADS, VOCABULARY, eager_attention_within, make_batch, make_model
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import hf_blocksparse
from hf_blocksparse import (
    BigBird,
    BlockDiagonal,
    Dense,
    PerHead,
    PerLayer,
    SinkWindow,
    SlidingWindow,
    SparseCache,
    block_sparse_attention,
    patch_model,
    unpatch_model,
)
from hf_blocksparse.kept_keys import columns_to_keep, join_parts, kept_keys
from hf_blocksparse.sparse_cache import SparseCacheLayer

# As in test_patch: logits are of order 5, a wrong mask moves them by more than 0.1.
LOGITS = dict(atol=5e-5, rtol=1e-5)
SINKS = SinkWindow(sink=3, window=6)
PER_HEAD = PerHead((SINKS, SlidingWindow(9), BlockDiagonal(7), SinkWindow(1, 2)))


def left_padded_batch(length=24):
    batch = make_batch(length)
    batch["attention_mask"][:] = 1
    batch["attention_mask"][0, :13] = 0
    batch["attention_mask"][1, :2] = 0
    return batch


def sparse_model(family="llama", layout=SINKS):
    make = make_model if family in FAMILIES else test_replacements.make_model
    return patch_model(make(family), layout)


def generate(model, batch, cache, new_tokens=30, **options):
    torch.manual_seed(5)
    lengths = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    outputs = dict(return_dict_in_generate=True, output_logits=True)
    return model.generate(**batch, past_key_values=cache, **lengths, **outputs, **options)


def assert_same_generation(model, batch, assistance=None, **options):
    cache = SparseCache(model)
    expected = generate(model, batch, DynamicCache(config=model.config), **options)
    actual = generate(model, batch, cache, **options, **assistance or {})
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), **LOGITS)
    return cache


def logits_by_parts(model, batch, cache, sizes):
    """Logits of a text that is given in parts of these sizes."""
    parts, start = [], 0
    for size in sizes:
        stop = start + size
        inputs = {"input_ids": batch["input_ids"][:, start:stop]}
        if "attention_mask" in batch:
            mask = batch["attention_mask"][:, :stop]
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            inputs |= {"attention_mask": mask, "position_ids": positions[:, start:]}
        parts.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
        start = stop
    return torch.cat(parts, 1)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "family, layout",
    [
        ("llama", SINKS),
        ("llama", SlidingWindow(5)),
        ("llama", PER_HEAD),
        ("llama", SINKS | BlockDiagonal(10)),
        ("gpt2", SinkWindow(3, 20) & BlockDiagonal(16)),
        ("gemma2", SINKS),
        ("gemma3", PerLayer({0: SINKS, 1: BlockDiagonal(10)})),
        ("gemma3", PerLayer({1: SINKS})),
        ("gpt_oss", SINKS),  # learned sink logits
        ("llama4", SINKS),  # the model's own chunks
        ("bloom", SINKS),  # ALiBi, in a class of ours
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_generation_is_that_of_a_cache_that_keeps_all(family, layout, padded):
    batch = left_padded_batch() if padded else make_batch(24, padded=False)
    cache = assert_same_generation(sparse_model(family, layout), batch)
    assert cache.num_bytes < 0.8 * cache.full_bytes


def test_logits_are_those_of_eager_attention_with_the_layout_as_mask():
    batch = left_padded_batch(40)
    model = make_model("llama")
    with eager_attention_within(SINKS, is_causal=True), torch.no_grad():
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        expected = model(**batch, position_ids=positions).logits
    patch_model(model, SINKS)
    with torch.no_grad():
        actual = logits_by_parts(model, batch, SparseCache(model), [20, 1, 7, *[1] * 12])
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], **LOGITS)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", ["whole", "padded", "holes"])
def test_any_parts_of_a_text_are_the_whole(kind, family, mode):
    batch = make_batch(60, padded=False) if kind == "whole" else left_padded_batch(60)
    if kind == "holes":
        batch["attention_mask"][1, 20:23] = 0
    model = sparse_model(family)
    # With parts of 5, the first two hold nothing of the first row.
    sizes = [*[5] * 6, 11, 1, 1, 1, 16]
    with mode():
        expected = logits_by_parts(model, batch, DynamicCache(config=model.config), sizes)
        actual = logits_by_parts(model, batch, cache := SparseCache(model), sizes)
    torch.testing.assert_close(actual, expected, **LOGITS)
    assert cache.get_seq_length() == 60


def test_prefill_in_chunks_by_generate():
    model = sparse_model()
    assert_same_generation(model, left_padded_batch(), prefill_chunk_size=7)


def test_sampling_is_the_same():
    assert_same_generation(sparse_model(), make_batch(24, padded=False), do_sample=True)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_beams_are_reordered(padded):
    batch = left_padded_batch() if padded else make_batch(24, padded=False)
    assert_same_generation(sparse_model(), batch, num_beams=3, new_tokens=15)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_assisted_decoding_rolls_back_and_frees_afterwards(family):
    model = sparse_model(family)
    text = make_batch(12, padded=False)["input_ids"][:1].repeat(1, 3)
    assistance = dict(prompt_lookup_num_tokens=4)
    cache = assert_same_generation(model, {"input_ids": text}, assistance)
    assert all(layer.columns[-1][1] - layer.columns[-1][0] <= 14 for layer in cache.layers)


def test_held_bytes_stay_constant_while_decoding():
    model = sparse_model(layout=PerLayer({0: SinkWindow(4, 16), 1: SlidingWindow(16)}))
    cache = SparseCache(model)
    row_bytes = 2 * 2 * 8 * 4  # keys and values, two heads of eight float32 numbers
    sizes = []
    with torch.no_grad():
        model(torch.randint(3, VOCABULARY, (1, 150)), past_key_values=cache)
        # The prompt itself is freed at once: what no later query reads, and no more.
        assert cache.num_bytes == (4 + 15 + 15) * row_bytes
        for _ in range(60):
            model(torch.randint(3, VOCABULARY, (1, 1)), past_key_values=cache)
            sizes.append(cache.num_bytes)
    assert set(sizes) == {(4 + 15 + 15) * row_bytes}
    assert cache.full_bytes == 210 * 2 * row_bytes
    assert repr(cache) == (
        "SparseCache(2 of 2 layers sparse, 210 tokens: 0.00 MiB held of 0.05 MiB for all keys (8.1%))"
    )


def test_held_bytes_at_64k_tokens_are_those_at_4k():
    layout = SinkWindow(sink=64, window=4096)
    model = sparse_model(layout=layout)
    cache = SparseCache(model)
    layer, reader = cache.layers[0], model.model.layers[0].self_attn
    held = {}
    for tokens in [4096, *[1] * 100, 4096 - 100, *[8192] * 7]:
        layer.update(torch.zeros(1, 1, tokens, 8), torch.zeros(1, 1, tokens, 8))
        layer.check_reader(reader, "self_attn")
        layer.free(layout, (0,))
        held[layer.get_seq_length()] = cache.num_bytes
    assert held[4096] == cache.full_bytes / 16
    assert max(held.values()) <= 1.05 * held[4096]


def test_held_bytes_of_a_chunk_return_to_nothing():
    model = sparse_model(layout=BlockDiagonal(20))
    cache = SparseCache(model)
    held = []
    with torch.no_grad():
        for _ in range(60):
            model(torch.tensor([[5]]), past_key_values=cache)
            held.append(sum(stop - start for start, stop in cache.layers[0].live))
    assert held == [(number + 1) % 20 for number in range(60)]


@pytest.mark.parametrize("layout", [Dense(), BigBird(16), PerHead((Dense(), *[SINKS] * 3))])
def test_layouts_that_cannot_say_keep_all(layout):
    model = sparse_model(layout=layout)
    cache = assert_same_generation(model, make_batch(24, padded=False))
    assert cache.num_bytes == cache.full_bytes


def test_layers_without_a_layout_get_transformers_own_cache():
    model = sparse_model("gemma3", PerLayer({1: SINKS}))
    assert [type(layer) for layer in SparseCache(model).layers] == [
        DynamicSlidingWindowLayer,
        SparseCacheLayer,
    ]
    model = sparse_model("gemma3", PerLayer({0: SINKS}))
    cache = assert_same_generation(model, left_padded_batch())
    assert [type(layer) for layer in cache.layers] == [SparseCacheLayer, DynamicLayer]
    assert cache.is_sliding == [True, False]


def test_sinks_of_rows_with_different_padding_stay_one_interval():
    # Rows begin at 0, 2 and 13; the third is alone in reading columns 13 to 15, and 5 to 12 stay so that there are two intervals.
    assert columns_to_keep(SINKS, 40, (0, 2, 13)) == (
        ((0, 5), (13, 16), (35, 40)),
        ((0, 16), (35, 40)),
    )
    # A row without a token so far says nothing about the columns there are.
    assert columns_to_keep(SINKS, 40, (0, 40)) == columns_to_keep(SINKS, 40, (0,))


def test_parts_join_to_attention_over_all_keys():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, HEADS, 30, 16).unbind()
    query.requires_grad_()
    layout = SlidingWindow(4)
    options = dict(is_causal=True, return_lse=True, allow_empty_rows=True)
    expected = block_sparse_attention(query, key, value, layout, **options)
    first = torch.arange(30) < 11
    parts = [
        block_sparse_attention(query, key, value, layout, attn_mask=mask.expand(30, 30), **options)
        for mask in (first, ~first)
    ]
    assert torch.isinf(parts[0][1][:, :, 20:]).all()
    actual = join_parts(parts)
    torch.testing.assert_close(actual, expected)
    weights = [torch.randn_like(tensor) for tensor in expected]
    gradients = [torch.autograd.grad(result, query, weights)[0] for result in (actual, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_query_that_reads_nothing_gives_zero():
    lse = torch.tensor([[[1.0, float("-inf")]]], requires_grad=True)
    outs = [torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)]
    out, joined = join_parts([(out, lse) for out in outs])
    assert out[0, 0].tolist() == [[0.5] * 4, [0.0] * 4]
    torch.testing.assert_close(joined[0, 0], torch.tensor([1 + math.log(2), float("-inf")]))
    (out.sum() + joined[0, 0, 0]).backward()
    assert lse.grad.isfinite().all()


def test_gradients_flow_through_what_is_held():
    model, batch = sparse_model(), make_batch(40, padded=False)
    gradients = []
    for cache in (DynamicCache(config=model.config), SparseCache(model)):
        model.zero_grad()
        logits_by_parts(model, batch, cache, [25, 15]).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm()


def test_a_copy_goes_on_by_itself_and_a_reset_starts_anew():
    model, batch = sparse_model(), make_batch(40, padded=False)
    prompt, rest = [{"input_ids": part} for part in batch["input_ids"].split([30, 10], 1)]
    cache = SparseCache(model)
    with torch.no_grad():
        expected = logits_by_parts(model, batch, DynamicCache(config=model.config), [30, 10])
        model(**prompt, past_key_values=cache)
        before = cache.num_bytes
        for _ in range(2):
            out = model(**rest, past_key_values=copy.deepcopy(cache)).logits
            torch.testing.assert_close(out, expected[:, 30:], **LOGITS)
        assert (cache.get_seq_length(), cache.num_bytes) == (30, before)
        cache.reset()
        assert (cache.get_seq_length(), cache.num_bytes, cache.full_bytes) == (0, 0, 0)
        out = logits_by_parts(model, batch, cache, [30, 10])
        torch.testing.assert_close(out, expected, **LOGITS)


def test_rows_can_be_repeated_and_selected():
    model, batch = sparse_model(), left_padded_batch(40)
    with torch.no_grad():
        expected = logits_by_parts(model, batch, DynamicCache(config=model.config), [30, 10])
        cache = SparseCache(model)
        logits_by_parts(model, batch, cache, [30])
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 2]))
        row = torch.tensor([2, 0, 1])
        mask = batch["attention_mask"][row]
        out = model(
            input_ids=batch["input_ids"][row, 30:],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1)[:, 30:],
            past_key_values=cache,
        ).logits
    torch.testing.assert_close(out, expected[row, 30:], **LOGITS)


def prefilled(model, length=40):
    cache = SparseCache(model)
    tokens = make_batch(length, padded=False)["input_ids"]
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    return cache, tokens


def test_cropping_is_exact_or_refused():
    model = sparse_model(layout=PerLayer({0: Dense(), 1: SINKS}))
    cache, tokens = prefilled(model)
    with pytest.raises(ValueError, match=r"crop got -2; the tokens from 38 on would read keys"):
        cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [40, 40]
    with pytest.raises(ValueError, match=r"tokens_to_remove got 3; it must not be positive"):
        cache.crop(3)
    cache.activate_past_recording()
    with torch.no_grad():
        expected = model(tokens[:, :5], past_key_values=cache).logits
        cache.crop(-5)
        assert cache.get_seq_length() == 40
        again = model(tokens[:, :5], past_key_values=cache).logits
        cache.crop(-4)
        rest = model(tokens[:, 1:5], past_key_values=cache).logits
    torch.testing.assert_close(again, expected, **LOGITS)
    torch.testing.assert_close(rest, expected[:, 1:], **LOGITS)
    # Before anything is freed, any number of tokens can go.
    cache, tokens = prefilled(model, 6)
    cache.crop(-6)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens, past_key_values=cache).logits, model(tokens).logits, **LOGITS
        )


def test_layouts_and_padding_must_stay_as_they_were():
    model = sparse_model()
    cache, tokens = prefilled(model)
    padded = torch.ones(3, 41, dtype=torch.long)
    padded[1, :10] = 0
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"freed keys that this call may read.*reset\(\)"),
    ):
        model(tokens[:, :1], attention_mask=padded, past_key_values=cache)
    cache, tokens = prefilled(model)
    patch_model(model, SinkWindow(3, 12))
    with torch.no_grad(), pytest.raises(ValueError, match="freed keys that this call may read"):
        model(tokens[:, :1], past_key_values=cache)
    cache, tokens = prefilled(model)
    patch_model(model, SinkWindow(2, 6))
    with torch.no_grad():
        model(tokens[:, :1], past_key_values=cache)


def test_a_compiled_model_reads_it_outside_of_its_graphs():
    model = sparse_model()
    tokens = make_batch(40)["input_ids"][:1]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    found, expected = [], []
    with torch.no_grad():
        for one, logits in ((compiled, found), (model, expected)):
            cache = SparseCache(model)
            for part in tokens.split([30, 9, 1], 1):
                logits.append(one(input_ids=part, past_key_values=cache).logits)
    torch.testing.assert_close(found, expected, **LOGITS)


def test_a_cache_serves_its_own_model_alone():
    model = sparse_model()
    cache, tokens = prefilled(model)
    other = copy.deepcopy(model)
    with pytest.raises(NotImplementedError, match="made from this model"):
        other(tokens[:, :1], past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"whose last keys model.layers.0.self_attn never read"):
        model(tokens[:, :1], past_key_values=cache)

    cache, tokens = prefilled(model)
    unpatch_model(model)
    with pytest.raises(ValueError, match="model that is no longer block-sparse"):
        model(tokens[:, :1], past_key_values=cache)
    patch_model(model, SINKS)
    cache, tokens = prefilled(model)
    with pytest.warns(UserWarning, match="runs dense"):
        model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="model that is no longer block-sparse"):
        model(tokens[:, :1], past_key_values=cache)


def test_keys_of_another_layer_are_refused():
    model = sparse_model(layout=PerLayer({0: SINKS}))
    cache = SparseCache(model)
    cache.layers[1] = cache.layers[0]
    tokens = torch.full((1, 4), 5)
    with pytest.raises(NotImplementedError, match="self_attn has no layout and reads keys from"):
        model(tokens, past_key_values=cache)


def test_weights_are_refused():
    model = sparse_model()
    cache, tokens = prefilled(model)
    with pytest.raises(NotImplementedError, match="output_attentions got True .* a SparseCache"):
        model(tokens[:, :1], past_key_values=cache, output_attentions=True)


def test_packed_documents_are_refused():
    model = sparse_model()
    cu_seqlens = torch.tensor([0, 10, 24], dtype=torch.int32)
    flash = dict(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens)
    with pytest.raises(NotImplementedError, match="packed documents and a SparseCache"):
        model(torch.full((1, 24), 5), past_key_values=SparseCache(model), **flash)


def test_models_without_a_use_for_it_are_refused():
    with pytest.raises(ValueError, match=r"no layer with a cache has a layout.*patch_model"):
        SparseCache(make_model("llama"))
    with pytest.raises(TypeError, match="model got LlamaConfig"):
        SparseCache(make_model("llama").config)
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1)
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=VOCABULARY, encoder_attention_heads=2, **sizes)
    )
    with pytest.raises(NotImplementedError, match="an encoder-decoder.*EncoderDecoderCache"):
        SparseCache(bart)


def test_nothing_holds_the_freed_memory():
    model = sparse_model(layout=SinkWindow(3, 30))
    cache, tokens = prefilled(model)
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4
    gc.disable()
    try:
        with torch.no_grad():
            model(tokens[:, :1], past_key_values=cache)
        # One row of 33 waits for the next call, so these are the keys that attention read.
        assert kept_keys(cache.layers[0].keys) is not None
        held = weakref.ref(cache.layers[0].keys)
        del cache
        assert held() is None  # without the help of the collector
    finally:
        gc.enable()


def test_the_name_is_there_without_loading_transformers():
    assert hf_blocksparse.SparseCache is SparseCache
    with pytest.raises(AttributeError, match="no attribute 'Sparse'"):
        hf_blocksparse.Sparse  # noqa: B018
