"""A patched model computes the layout within its own mask: against transformers' eager attention with a dense mask."""

import copy
import functools
import importlib.util
import inspect
import io
import logging
import math
import re

import pytest
import torch
from tiny_models import (
    BIDIRECTIONAL,
    FAMILIES,
    HEADS,
    LOGITS,
    VOCABULARY,
    assert_same,
    eager_attention_within,
    make_batch,
    make_model,
    real_tokens,
    run,
    spread_weights,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    Cache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaModel,
    QuantizedCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer, QuantizedLayer
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_blocksparse import (
    BigBird,
    BlockDiagonal,
    Dense,
    Longformer,
    PerHead,
    PerLayer,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
    transformers_hook,
)
from hf_blocksparse.model_layouts import LayerAttention, attach, state_of
from hf_blocksparse.patch import patch_model, unpatch_model
from hf_blocksparse.transformers_hook import block_sparse_attention_forward
from hf_blocksparse.transformers_masks import make_mask


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_layout_is_the_dense_model(family, padded):
    model = make_model(family)
    batch = make_batch(padded=padded)
    expected = run(model, batch)
    assert_same(run(patch_model(model, Dense()), batch), expected)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_layout_is_eager_attention_with_its_mask(family, padded):
    layout = SinkWindow(sink=3, window=6) | BlockDiagonal(10)
    model = make_model(family)
    batch = make_batch(padded=padded)
    dense = run(model, batch)
    with eager_attention_within(layout, is_causal=family not in BIDIRECTIONAL):
        expected = run(model, batch)
    assert (expected[0] - dense[0]).abs().max() > 0.1
    assert_same(run(patch_model(model, layout), batch), expected)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(
    "layout",
    [
        Longformer(window=8, global_tokens=2),
        BigBird(block_size=16, window_blocks=1, global_blocks=1, random_blocks=0),
        PerHead((SlidingWindow(4), Dense(), SinkWindow(1, 7), BlockDiagonal(9))),
        TensorLayout.from_tensor(torch.eye(8) + torch.eye(8).roll(1, 1), 16),
    ],
    ids=lambda layout: layout.kind,
)
def test_other_layouts(family, layout):
    model = make_model(family)
    batch = make_batch()
    with eager_attention_within(layout, is_causal=family not in BIDIRECTIONAL):
        expected = run(model, batch)
    assert_same(run(patch_model(model, layout), batch), expected)


def test_random_layouts_draw_anew_in_every_layer():
    layout = BigBird(block_size=16, window_blocks=1, global_blocks=0, random_blocks=2)
    model = patch_model(make_model("llama"), layout)
    assert [state_of(layer.self_attn).layout.layer for layer in model.model.layers] == [0, 1]
    assert model.config.block_sparse["layouts"]["*"]["layer"] == 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "bert"])
def test_outputs_do_not_depend_on_padding(family):
    layout = SinkWindow(sink=2, window=5) | BlockDiagonal(8)
    model = patch_model(make_model(family), layout)
    ids = make_batch(30, padded=False)["input_ids"][:1]
    alone = model(input_ids=ids).logits
    for left, right in ((5, 0), (0, 6), (3, 4)):
        padded = nn.functional.pad(ids, (left, right), value=7)
        mask = nn.functional.pad(torch.ones_like(ids), (left, right))
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=padded, attention_mask=mask, position_ids=position_ids).logits
        torch.testing.assert_close(logits[:, left : left + 30], alone, **LOGITS)


def test_rows_of_padding_give_zero_and_holes_are_exact():
    layout = SinkWindow(sink=3, window=6)
    model = make_model("llama")
    batch = make_batch()
    batch["attention_mask"][0, 15:19] = 0
    with eager_attention_within(layout, is_causal=True):
        expected = run(model, batch)
    patch_model(model, layout)
    assert_same(run(model, batch), expected)

    outputs = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: outputs.append(args[0])
    )
    batch["attention_mask"][1] = 0
    logits = model(**batch).logits
    hook.remove()
    assert logits.isfinite().all()
    assert (outputs[0][1] == 0).all() and (outputs[0][0, :7] == 0).all()
    assert (outputs[0][0, 7:15] != 0).any(-1).all()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "phi3"])
def test_packed_documents_are_separate(family):
    layout = SinkWindow(sink=2, window=5)
    model = make_model(family)
    lengths = (13, 4, 23)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = make_batch(40, padded=False)["input_ids"][:1]
    batch = {"input_ids": ids}
    packed = dict(position_ids=position_ids, use_cache=False)
    with eager_attention_within(layout, is_causal=True, positions=position_ids):
        expected = run(model, batch, **packed)
    patch_model(model, layout)
    assert_same(run(model, batch, **packed), expected)
    parts = [model(input_ids=part).logits for part in ids.split(lengths, 1)]
    torch.testing.assert_close(torch.cat(parts, 1)[0], expected[0], **LOGITS)


def test_packed_documents_by_cumulative_lengths():
    model = patch_model(make_model("llama"), SinkWindow(sink=2, window=5))
    lengths = (13, 4, 23)
    ids = make_batch(40, padded=False)["input_ids"][:1]
    edges = torch.tensor([0, 13, 17, 40], dtype=torch.int32)
    flash = dict(cu_seq_lens_q=edges, cu_seq_lens_k=edges, max_length_q=23, max_length_k=23)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    expected = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, 1)], 1)
    for use_cache in (False, True):
        logits = model(
            input_ids=ids, position_ids=position_ids, use_cache=use_cache, **flash
        ).logits
        torch.testing.assert_close(logits, expected, **LOGITS)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q and cu_seq_lens_k differ"):
        model(input_ids=ids, **flash | {"cu_seq_lens_k": edges.clone() // 2})
    with pytest.raises(NotImplementedError, match="need both, one batch row, and no cache"):
        model(input_ids=ids.repeat(2, 1), **flash)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic cache", "static cache"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_greedy_generation_with_a_dense_layout_is_the_dense_model(family, static):
    model = make_model(family)
    batch = make_batch(14)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    if static:
        options |= dict(cache_implementation="static", disable_compile=True)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][1] = 1
    expected = model.generate(**batch, **options)
    assert torch.equal(patch_model(model, Dense()).generate(**batch, **options), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_decoding_step_by_step_is_prefill(family, cache):
    model = patch_model(make_model(family), SinkWindow(sink=2, window=5) | BlockDiagonal(8))
    batch = make_batch(28)
    batch["attention_mask"][1] = 1
    position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    whole = model(**batch, position_ids=position_ids).logits
    kept = None if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    parts = []
    # Prefill, a chunk on top of it, then token by token.
    for start, stop in [(0, 11), (11, 16), *((place, place + 1) for place in range(16, 28))]:
        made = model(
            input_ids=batch["input_ids"][:, start:stop],
            attention_mask=batch["attention_mask"][:, :stop],
            position_ids=position_ids[:, start:stop],
            past_key_values=kept,
            use_cache=True,
        )
        kept = made.past_key_values
        parts.append(made.logits)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], **LOGITS)


class RoundedLayer(QuantizedLayer):
    """A quantized cache layer without a backend's package: numbers to the next eighth, as int8."""

    def _quantize(self, tensor, axis):
        return (tensor * 8).round().clamp(-127, 127).to(torch.int8), tensor.dtype

    def _dequantize(self, quantized):
        return quantized[0].to(quantized[1]) / 8


def quantized_by(backend, options, model):
    return QuantizedCache(backend, model.config, **options)


def has_package(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # nor what it is a part of
        return False


def quantized_caches():
    def grouped(model):
        count = model.config.num_hidden_layers
        return Cache(layers=[RoundedLayer(residual_length=4) for _ in range(count)])

    caches = {"grouped": grouped}
    if "fp8" in inspect.getsource(QuantizedCache):  # from transformers 5.23 on
        caches["fp8"] = lambda model: QuantizedCache("fp8", model.config)
    for name, package, axis in (("quanto", "optimum.quanto", 0), ("hqq", "hqq", 1)):
        if has_package(package):  # neither is part of the tests' environment
            options = dict(nbits=4, axis_key=axis, axis_value=axis, q_group_size=8)
            options["residual_length"] = 4
            caches[name] = functools.partial(quantized_by, name, options)
    return caches


@pytest.mark.parametrize("cache", quantized_caches())
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoding_from_a_quantized_cache_is_eager_attention_from_it(family, cache):
    layout = PerHead((SinkWindow(2, 5), BlockDiagonal(8), SlidingWindow(7), Dense()))
    batch = make_batch(24)
    # A group of theirs may hold keys of padding, which eager attention makes up: they change how the others are rounded.
    batch["attention_mask"][slice(None) if cache in ("quanto", "hqq") else 1] = 1
    position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def decode(model):
        kept, parts = quantized_caches()[cache](model), []
        for start, stop in [(0, 11), (11, 16), *((place, place + 1) for place in range(16, 24))]:
            made = model(
                input_ids=batch["input_ids"][:, start:stop],
                attention_mask=batch["attention_mask"][:, :stop],
                position_ids=position_ids[:, start:stop],
                past_key_values=kept,
            )
            parts.append(made.logits)
        return torch.cat(parts, 1)[batch["attention_mask"].bool()]

    model = make_model(family)
    with torch.no_grad(), eager_attention_within(layout, is_causal=True):
        expected = decode(model)
    with torch.no_grad():
        whole = patch_model(model, layout)(**batch, position_ids=position_ids).logits
        actual = decode(model)
    torch.testing.assert_close(actual, expected, **LOGITS)
    # The cache did round.
    assert (actual - whole[batch["attention_mask"].bool()]).abs().max() > 1e-3


def test_sparse_generation_is_the_same_with_both_caches():
    model = patch_model(make_model("gemma3"), SinkWindow(sink=2, window=5))
    batch = make_batch(14)
    batch["attention_mask"][1] = 1
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    dynamic = model.generate(**batch, **options)
    static = model.generate(**batch, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = patch_model(make_model("gemma2"), SinkWindow(sink=2, window=5))
    batch = make_batch()
    model.train()
    expected = run(model, batch, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = run(model, batch, use_cache=False)
    assert torch.equal(actual[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(actual[1][name], gradient), name


def test_dropout_is_drawn_in_training_only():
    model = make_model("llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    patch_model(model, Dense())
    batch = make_batch(padded=False)
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    torch.manual_seed(0)
    first, second = model(**batch).logits, model(**batch).logits
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(model(**batch).logits, first)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_unpatching_is_bit_exact(implementation, padded):
    model = make_model("gemma3", implementation)
    batch = make_batch(padded=padded)
    config, logits = copy.deepcopy(model.config.to_dict()), model(**batch).logits
    patch_model(model, SlidingWindow(3))
    assert model.config._attn_implementation == "block_sparse"
    assert not torch.equal(model(**batch).logits, logits)
    patch_model(
        model, {1: SinkWindow(1, 2)}
    )  # a second patch replaces the first, and undoing both is one step
    assert [state_of(layer.self_attn).layout for layer in model.model.layers] == [
        None,
        SinkWindow(1, 2),
    ]
    assert unpatch_model(model) is model
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**batch).logits, logits)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_copy_of_a_patched_model_is_a_model_of_its_own():
    model = make_model("llama", "sdpa")
    batch = make_batch()
    dense = model(**batch).logits
    patch_model(model, SlidingWindow(3))
    sparse = model(**batch).logits
    other = copy.deepcopy(model)
    unpatch_model(model)
    assert torch.equal(model(**batch).logits, dense)
    assert torch.equal(other(**batch).logits, sparse)
    assert torch.equal(unpatch_model(other)(**batch).logits, dense)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_not_named_keep_their_own_attention(family, padded, implementation):
    model = make_model(family, implementation)
    batch = make_batch(padded=padded)
    attention = model.model.layers[0].self_attn
    seen = []
    hook = attention.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    dense = model(**batch).logits
    patch_model(model, PerLayer({1: SlidingWindow(3)}))
    sparse = model(**batch).logits
    hook.remove()
    assert torch.equal(seen[0], seen[1])
    assert (sparse - dense).abs().max() > 0.1
    both = patch_model(model, PerLayer({0: Dense(), 1: SlidingWindow(3)}))(**batch).logits
    real = real_tokens(batch)
    torch.testing.assert_close(both[real], sparse[real], **LOGITS)


def test_layers_not_named_keep_their_own_attention_in_generation():
    model = make_model("gemma3", "sdpa")
    batch = make_batch(14)
    batch["attention_mask"][1] = 1
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    static = dict(cache_implementation="static", disable_compile=True)
    expected = model.generate(**batch, **options)
    for layer in (0, 1):
        patch_model(model, {layer: Dense()})
        assert torch.equal(model.generate(**batch, **options), expected)
        assert torch.equal(model.generate(**batch, **options, **static), expected)


def layouts_in(model):
    """Which attention modules have a layout of their own."""
    states = {path: state_of(module) for path, module in model.named_modules()}
    return {path: state.layout for path, state in states.items() if state and state.layout}


def deep(family, **options):
    torch.manual_seed(0)
    config = FAMILIES[family]().config
    values = config.to_dict() | {"num_hidden_layers": 8, "layer_types": None} | options
    return type(FAMILIES[family]())(type(config)(**values)).eval()


@pytest.mark.parametrize(
    ("family", "options", "chosen", "has"),
    [
        ("llama", dict(dense_every=4), {}, [0, 1, 2, 4, 5, 6]),
        ("llama", dict(layers=range(1, 8, 3)), {}, [1, 4, 7]),
        ("llama", dict(layers=[6, 2, 4], dense_every=2), {}, [2, 6]),
        ("gemma3", dict(layers="full_attention"), {"sliding_window_pattern": 4}, [3, 7]),
        ("gemma3", dict(layers="sliding_attention"), {}, [0, 1, 2, 3, 4, 6, 7]),
        ("gemma3", dict(layers="sliding_attention", dense_every=3), {}, [0, 1, 3, 4, 7]),
    ],
)
def test_layers_are_chosen_by_number_type_and_turn(family, options, chosen, has):
    model = deep(family, **chosen)
    batch = make_batch()
    dense = model(**batch).logits
    patch_model(model, SinkWindow(1, 4), **options)
    assert layouts_in(model) == {f"model.layers.{n}.self_attn": SinkWindow(1, 4) for n in has}
    # What is saved names the layers, and is the same as naming them.
    assert sorted(map(int, model.config.block_sparse["layouts"])) == has
    sparse = model(**batch).logits
    named = patch_model(deep(family, **chosen), {n: SinkWindow(1, 4) for n in has})
    assert torch.equal(named(**batch).logits, sparse)
    assert torch.equal(unpatch_model(model)(**batch).logits, dense)


def test_layers_are_counted_in_each_stack_and_cross_attention_is_left():
    model = patch_model(bart(layers=3), SlidingWindow(4), dense_every=2)
    stacks, numbers = ("encoder", "decoder"), (0, 2)
    names = {f"model.{stack}.layers.{number}.self_attn" for stack in stacks for number in numbers}
    assert set(layouts_in(model)) == names
    # Only the text part has such layers.
    model = llava()
    model.config.text_config.layer_types = ["full_attention"] * 2
    patch_model(model, SlidingWindow(4), layers="full_attention", dense_every=2)
    assert set(layouts_in(model)) == {"model.language_model.layers.0.self_attn"}


def test_replaced_families_read_every_key_in_the_layers_left_out():
    torch.manual_seed(0)
    model = BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=4, n_head=HEADS)
    ).eval()
    batch = make_batch()
    patch_model(model, SlidingWindow(3), dense_every=2)
    found = [state_of(block.self_attention).layout for block in model.transformer.h]
    assert found == [SlidingWindow(3), Dense()] * 2
    logits = model(**batch).logits
    layouts = {0: SlidingWindow(3), 1: Dense(), 2: SlidingWindow(3), 3: Dense()}
    assert torch.equal(patch_model(model, layouts)(**batch).logits, logits)


@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest"])
def test_a_mask_given_as_a_tensor_is_exact(kind):
    layout = SlidingWindow(9)
    model = make_model("llama")
    batch = make_batch(padded=False)
    length = batch["input_ids"].shape[1]
    allowed = torch.ones(length, length).tril().bool()
    allowed[:, :12] = True  # a prefix that reads itself both ways
    allowed = allowed.expand(3, 1, -1, -1).clone()
    allowed[1, :, 20:, 4] = False

    def as_float(mask, lowest):
        return torch.zeros(mask.shape).masked_fill(~mask, lowest)

    kept = allowed & layout.to_mask(length)
    expected = model(**batch, attention_mask=as_float(kept, -math.inf)).logits
    given = {
        "bool": allowed,
        "-inf": as_float(allowed, -math.inf),
        "lowest": as_float(allowed, torch.finfo(torch.float32).min),
    }[kind]
    patch_model(model, layout)
    torch.testing.assert_close(model(**batch, attention_mask=given).logits, expected, **LOGITS)
    with pytest.raises(ValueError, match="neither 0 nor -inf"):
        model(**batch, attention_mask=torch.full((3, 1, length, length), -0.5))


def test_mixed_dtypes_are_cast_as_transformers_casts_them():
    """The Trainer's bf16 hands over float32 queries and keys beside bfloat16 values."""
    model = patch_model(make_model("llama"), SinkWindow(2, 5))
    batch = make_batch()
    whole = model(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**batch).logits
    real = real_tokens(batch)
    assert (logits - whole)[real].abs().mean() < 0.05 * whole[real].abs().mean()

    module = model.model.layers[0].self_attn.bfloat16()
    query, key = torch.randn(1, HEADS, 8, 8), torch.randn(1, 2, 8, 8)
    value = torch.randn(1, 2, 8, 8, dtype=torch.bfloat16)
    out, weights = block_sparse_attention_forward(module, query, key, value, None)
    assert out.dtype == torch.bfloat16 and weights is None
    assert out.shape == (1, 8, HEADS, 8) and out.is_contiguous()


def test_inference_mode_is_the_same_and_leaves_nothing_behind():
    model = patch_model(make_model("llama"), SinkWindow(2, 5))
    whole, holes = make_batch(), make_batch()
    holes["attention_mask"][0, 15:19] = 0
    length = whole["input_ids"].shape[1]
    given = {"input_ids": whole["input_ids"]}
    for batch in (whole, holes, given):
        with torch.inference_mode():
            if batch is given:
                given["attention_mask"] = torch.ones(3, 1, length, length).tril().bool()
            logits = model(**batch).logits
        if batch is given:
            given["attention_mask"] = given["attention_mask"].clone()
        expected = model(**batch).logits
        expected.sum().backward()
        assert torch.equal(logits, expected)


def test_the_model_can_be_compiled():
    model = patch_model(make_model("gemma2"), SinkWindow(2, 5))
    batch = make_batch()
    expected = model(**batch).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, expected, **LOGITS)


def test_a_compiled_model_is_one_graph_for_all_lengths_and_trains_as_eager():
    model = patch_model(make_model("llama"), SinkWindow(2, 5))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (20, 31, 47):
        tokens = torch.randint(5, 50, (2, length))
        found = []
        for one in (model, compiled):
            model.zero_grad()
            logits = one(input_ids=tokens).logits
            logits.square().mean().backward()
            found.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        for ours, eager in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager, **LOGITS)
    assert counter.frame_count == 2


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_compiled_model_keeps_the_causality_of_every_layer(is_causal):
    model = make_model("llama", "eager")
    model.config.is_causal = is_causal
    patch_model(model, {1: SinkWindow(2, 5)} if is_causal else SinkWindow(2, 5))
    tokens = torch.randint(5, 50, (2, 30))
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager")(input_ids=tokens).logits
    torch.testing.assert_close(found, model(input_ids=tokens).logits, **LOGITS)


class LogitsOf(nn.Module):
    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask=attention_mask, **self.options).logits


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_the_model_at_other_lengths(strict):
    model = LogitsOf(patch_model(make_model("llama", "sdpa"), SinkWindow(4, 16)))
    tokens = make_batch(48, padded=False)["input_ids"]
    lengths = ({1: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (tokens,), strict=strict, dynamic_shapes=lengths)
    called = [str(node.target) for node in exported.graph.nodes]
    assert called.count("hf_blocksparse.attention_forward.default") == 2
    stored = io.BytesIO()
    torch.export.save(exported, stored)
    stored.seek(0)
    for program in (exported, torch.export.load(stored)):
        for batch in (tokens, make_batch(75, padded=False)["input_ids"]):
            torch.testing.assert_close(program.module()(batch), model(batch), **LOGITS)


@pytest.mark.parametrize("what", ["padding", "no cache", "window", "dense layer"])
def test_an_exported_model_holds_masks(what):
    layout = {0: SlidingWindow(5)} if what == "dense layer" else SlidingWindow(5)
    model = patch_model(make_model("mistral" if what == "window" else "llama", "sdpa"), layout)
    options = {"use_cache": False} if what == "no cache" else {}
    batch = make_batch(24, padded=what == "padding")
    inputs, real = tuple(batch.values()), real_tokens(batch)
    exported = torch.export.export(LogitsOf(model, **options), inputs, strict=False)
    found = exported.module()(*inputs)[real]
    torch.testing.assert_close(found, model(**batch).logits[real], **LOGITS)


@pytest.mark.parametrize("strict", [False, True])
def test_what_an_export_cannot_hold_is_refused(strict):
    model = patch_model(make_model("llama", "sdpa"), SlidingWindow(5))
    inputs = tuple(make_batch(24, padded=False).values())
    model(
        *inputs, output_attentions=True
    )  # transformers takes a lock for the first, which Dynamo cannot
    # Dynamo wraps what the traced code raises.
    error = Exception if strict else NotImplementedError
    refusal = r"torch.export \(or fullgraph=True\) got a model with a 4-D mask tensor, output_att"
    with pytest.raises(error, match=refusal):
        torch.export.export(LogitsOf(model, output_attentions=True), inputs, strict=strict)


def test_patching_says_what_it_did(caplog):
    model = make_model("llama")
    short = TensorLayout.from_tensor(torch.eye(2), 16)
    with caplog.at_level(logging.INFO, logger="hf_blocksparse.patch"):
        patch_model(model, {1: SlidingWindow(64)})
        patch_model(model, short)
    assert [record.message for record in caplog.records] == [
        "LlamaForCausalLM: 2 attention layers, 1 with SlidingWindow(window=64) (density 43.7% at "
        "256 tokens), 1 left dense.",
        f"LlamaForCausalLM: 2 attention layers, 2 with {short!r}, 0 left dense.",
    ]


def test_everything_a_layout_may_be_given_as():
    model = make_model("llama")
    tensor = torch.ones(8, 8).tril()
    section = patch_model(model, SlidingWindow(64)).config.block_sparse
    named = {"model.layers.0.self_attn": SlidingWindow(64), "layers.1": SlidingWindow(64)}
    for layout, states in (
        ("sink_window", [SinkWindow(64, 1024)] * 2),
        (section, [SlidingWindow(64)] * 2),
        (SlidingWindow(64).to_dict(), [SlidingWindow(64)] * 2),
        (PerLayer({0: SlidingWindow(64)}), [SlidingWindow(64), None]),
        ({"1": "dense"}, [None, Dense()]),
        (named, [SlidingWindow(64)] * 2),
    ):
        patch_model(model, layout)
        assert [state_of(layer.self_attn).layout for layer in model.model.layers] == states
    patch_model(model, {0: tensor}, block_size=16)
    assert state_of(model.model.layers[0].self_attn).layout == TensorLayout.from_tensor(tensor, 16)


def llava():
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    text = dict(vision, num_hidden_layers=2, num_key_value_heads=2, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=dict(
                vision,
                model_type="clip_vision_model",
                image_size=16,
                patch_size=8,
                projection_dim=32,
            ),
            text_config=dict(text, model_type="llama", max_position_embeddings=256),
            image_token_index=90,
        )
    ).eval()


def test_the_text_part_of_a_multimodal_model():
    model = llava()
    inputs = {
        "input_ids": torch.tensor([[5, 90, 90, 90, 90, *range(6, 36)]]),
        "pixel_values": torch.randn(1, 3, 16, 16),
    }
    # The image tokens come from the layer before the last: all but the class token.
    dense = model(**inputs).logits
    patch_model(model.model.language_model, SinkWindow(1, 5))
    sparse = model(**inputs).logits
    assert (sparse - dense).abs().max() > 1e-4
    vision, text = model.config.vision_config, model.config.text_config
    assert vision._attn_implementation == "sdpa" and text._attn_implementation == "block_sparse"
    assert torch.equal(unpatch_model(model)(**inputs).logits, dense)

    layers = {
        path: SinkWindow(1, 5)
        for path, module in model.named_modules()
        if path.endswith("self_attn") and "language_model" in path
    }
    assert torch.equal(patch_model(model, layers)(**inputs).logits, sparse)
    assert sorted(text.block_sparse["layouts"]) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert vision.block_sparse is None and model.config.block_sparse is None
    with pytest.raises(ValueError, match="layout names layer 0, which is ambiguous"):
        patch_model(model, {0: Dense()})
    patch_model(model, Dense())
    assert set(vision.block_sparse["layouts"]) == set(text.block_sparse["layouts"]) == {"*"}
    torch.testing.assert_close(model(**inputs).logits, dense, **LOGITS)
    unpatch_model(model)
    assert torch.equal(model(**inputs).logits, dense)


def bart(layers=1):
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=128,
        )
    ).eval()


def test_an_encoder_and_decoder_keep_their_cross_attention():
    model = bart()
    batch = make_batch(30)
    batch["decoder_input_ids"] = make_batch(20, padded=False)["input_ids"]
    dense = model(**batch).logits
    with pytest.raises(
        ValueError, match=r"cross-attention, where .* as patch_.*layers=range\(\d\)"
    ):
        patch_model(model, SlidingWindow(4))
    with pytest.raises(ValueError, match="layer 0, which is ambiguous in BartForConditionalGen"):
        patch_model(model, {0: SlidingWindow(4)})
    with pytest.raises(ValueError, match="encoder_attn, a cross-attention"):
        patch_model(model, {"decoder.layers.0.encoder_attn": SlidingWindow(4)})
    torch.testing.assert_close(patch_model(model, Dense())(**batch).logits, dense, **LOGITS)
    names = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]
    patch_model(model, {name: SlidingWindow(4) for name in names})
    assert sorted(model.config.block_sparse["layouts"]) == sorted(names)
    assert (model(**batch).logits - dense).abs().max() > 1e-4
    state = state_of(model.model.decoder.layers[0].encoder_attn)
    assert state.layout is None and state.calls == 1
    assert torch.equal(unpatch_model(model)(**batch).logits, dense)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_encoder_and_decoder_generate(num_beams):
    model = bart()
    batch = make_batch(20)
    options = dict(max_new_tokens=10, min_length=11, do_sample=False, num_beams=num_beams)
    expected = model.generate(**batch, **options)
    names = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]
    patch_model(model, {name: SlidingWindow(64) for name in names})
    assert torch.equal(model.generate(**batch, **options), expected)


def test_image_tokens_that_read_each_other_both_ways():
    """Gemma 3 adds a mask function of its own, which is evaluated into a dense mask."""
    layers = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=dict(
                layers,
                vocab_size=VOCABULARY,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=256,
                sliding_window=9,
                layer_types=["sliding_attention", "full_attention"],
                pad_token_id=0,
            ),
            vision_config=dict(layers, image_size=32, patch_size=8, vision_use_head=False),
            mm_tokens_per_image=4,
            image_token_index=90,
            boi_token_index=91,
            eoi_token_index=92,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 91, 90, 90, 90, 90, 92, *range(7, 37)]])
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        token_type_ids=(ids == 90).long(),
        pixel_values=torch.randn(1, 3, 32, 32),
    )
    # The vision part is patched, too: a window as wide as the image is dense there.
    for layout in (Dense(), SlidingWindow(20)):
        with eager_attention_within(layout, is_causal=False):
            expected = model(**inputs).logits
        patch_model(model, layout)
        torch.testing.assert_close(model(**inputs).logits, expected, **LOGITS)
        unpatch_model(model)
    causal = model(**inputs | {"token_type_ids": torch.zeros_like(ids)}).logits
    assert (causal - expected).abs().max() > 0.1


def t5():
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return spread_weights(T5ForConditionalGeneration(config).eval())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_position_biases_are_computed_by_the_models_own_attention(implementation):
    model = t5()
    model.set_attn_implementation(implementation)
    batch = make_batch(20) | {"decoder_input_ids": make_batch(12, padded=False)["input_ids"]}
    expected = model(**batch).logits
    assert torch.equal(patch_model(model, Dense())(**batch).logits, expected)


@pytest.mark.parametrize(("layout", "impl"), [(SlidingWindow(4), "auto"), (Dense(), "torch")])
def test_position_biases_are_refused_by_our_kernels(layout, impl):
    model = patch_model(t5(), {"encoder.block.0.layer.0.SelfAttention": layout}, impl=impl)
    batch = make_batch(10, padded=False)
    with pytest.raises(NotImplementedError, match=r"passes \['position_bias'\] to its attention"):
        model(**batch, decoder_input_ids=batch["input_ids"])


@pytest.fixture
def without_ours(monkeypatch):
    """Our attention raises, so that what runs is the model's own."""

    def refuse(*args, **kwargs):
        raise AssertionError("block-sparse attention was called")

    monkeypatch.setattr(transformers_hook, "block_sparse_attention", refuse)


WAYS_TO_RUN = {
    "whole": lambda batch: batch,
    "padded": lambda batch: batch | {"attention_mask": make_batch(40)["attention_mask"]},
    "packed": lambda batch: (
        batch | {"position_ids": torch.arange(40).remainder(11).expand(3, -1), "use_cache": False}
    ),
}


@pytest.mark.parametrize("way", WAYS_TO_RUN)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "bert"])
def test_a_dense_layout_is_the_models_own_attention(family, way, without_ours):
    if family == "bert" and way == "packed":
        pytest.skip("encoders take no packed documents by position_ids")
    batch = WAYS_TO_RUN[way](make_batch(40, padded=False))
    model = make_model(family, "sdpa")
    logits, gradients = run(model, batch)
    patch_model(model, Dense())
    found, found_gradients = run(model, batch)
    assert torch.equal(found, logits)
    assert all(torch.equal(found_gradients[name], one) for name, one in gradients.items())


def test_a_dense_layout_takes_any_4d_mask_that_the_model_takes(without_ours):
    model = make_model("llama", "sdpa")
    tokens = make_batch(40, padded=False)["input_ids"]
    bias = torch.randn(3, 1, 40, 40)
    expected = model(tokens, attention_mask=bias).logits
    assert torch.equal(patch_model(model, Dense())(tokens, attention_mask=bias).logits, expected)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic cache", "static cache"])
def test_a_dense_layout_generates_by_the_models_own_attention(static, without_ours):
    batch = WAYS_TO_RUN["padded"](make_batch(40, padded=False))
    batch["attention_mask"] = batch["attention_mask"].flip(1)  # padding on the left
    options = dict(max_new_tokens=8, do_sample=False, output_scores=True)
    options |= dict(return_dict_in_generate=True)
    if static:
        options |= dict(cache_implementation="static", disable_compile=True)
    model = make_model("llama", "sdpa")
    expected = model.generate(**batch, **options).scores
    found = patch_model(model, Dense()).generate(**batch, **options).scores
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("family", "implementation", "layout", "impl"),
    [
        ("llama", "sdpa", Dense(), "torch"),
        ("llama", "eager", Dense(), "auto"),
        ("llama", "sdpa", SlidingWindow(11), "auto"),
        ("llama", "sdpa", PerHead((Dense(), Dense(), SlidingWindow(12), Longformer(20))), "auto"),
        ("llama", "sdpa", SlidingWindow(64), "torch"),
        ("gpt_oss", "eager", Dense(), "auto"),
    ],
    ids=["named", "own is eager", "sparse", "sparse in one head", "all kept, named", "sinks"],
)
def test_other_layers_compute_by_ours(family, implementation, layout, impl, without_ours):
    model = patch_model(make_model(family, implementation), layout, impl=impl)
    with pytest.raises(AssertionError, match="block-sparse attention was called"):
        model(**make_batch(12))


@pytest.mark.parametrize(
    "layout",
    [
        SlidingWindow(40),
        SinkWindow(2, 40) & Longformer(78),
        PerHead((Dense(), SinkWindow(1, 40), BigBird(16) | SlidingWindow(64), Longformer(78, 0))),
    ],
    ids=repr,
)
@pytest.mark.parametrize("way", ["whole", "padded"])
def test_a_layout_that_keeps_all_of_a_call_is_the_models_own_attention(layout, way, without_ours):
    model = make_model("llama", "sdpa")
    batch = WAYS_TO_RUN[way](make_batch(40, padded=way == "padded"))
    expected = model(**batch).logits
    patch_model(model, layout)
    assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(AssertionError, match="block-sparse attention was called"):
        model(**make_batch(41, padded=False))


def test_packed_documents_stay_with_ours_where_a_layout_keeps_all(without_ours):
    batch = WAYS_TO_RUN["packed"](make_batch(40, padded=False))
    model = patch_model(make_model("llama", "sdpa"), SlidingWindow(64))
    with pytest.raises(AssertionError, match="block-sparse attention was called"):
        model(**batch)


def test_generation_goes_past_what_a_layout_keeps_whole():
    """The first steps compute by the model's own attention, the later ones by ours."""
    layout, tokens = SinkWindow(2, 12), make_batch(9, padded=False)["input_ids"]
    model = make_model("llama", "sdpa")
    options = dict(max_new_tokens=8, do_sample=False, output_logits=True)
    made = patch_model(model, layout).generate(tokens, return_dict_in_generate=True, **options)
    with eager_attention_within(layout, is_causal=True):
        expected = make_model("llama", "eager")(made.sequences[:, :-1]).logits[:, 8:]
    torch.testing.assert_close(torch.stack(made.logits, 1), expected, **LOGITS)


def test_a_dense_layout_honours_what_sdpa_does_not():
    """Documents by cu_seq_lens, and weights."""
    model = patch_model(make_model("llama", "sdpa"), Dense())
    tokens = make_batch(24, padded=False)["input_ids"][:1]
    starts = torch.tensor([0, 10, 24], dtype=torch.int32)
    packed = model(tokens, cu_seq_lens_q=starts, cu_seq_lens_k=starts, use_cache=False).logits
    apart = [model(part).logits for part in (tokens[:, :10], tokens[:, 10:])]
    torch.testing.assert_close(packed, torch.cat(apart, 1), **LOGITS)
    weights = model(tokens, output_attentions=True).attentions
    torch.testing.assert_close(weights[0].sum(3), torch.ones(1, 4, 24))


def test_an_attention_that_never_reaches_the_function_is_noticed():
    model = make_model("llama")

    class Shortcut(type(model.model.layers[0].self_attn)):
        def forward(self, hidden_states, **kwargs):
            if kwargs:
                return self.o_proj(self.q_proj(hidden_states)), None
            # Named so that the module looks routed.
            return ALL_ATTENTION_FUNCTIONS.get_interface("eager", None)

    model.model.layers[1].self_attn.__class__ = Shortcut
    patch_model(model, SlidingWindow(4))
    with pytest.raises(
        RuntimeError, match=r"layers.1.self_attn \(Shortcut\) got a layout, but its"
    ):
        model(**make_batch())


class Names(nn.Module):
    """Stands for an attention module with a layout."""

    def __init__(self, layout=None, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        attach(self, LayerAttention("layers.0.attn", layout or SlidingWindow(4), "sdpa"))


def qkv(query_len=6, kv_len=6):
    return (
        torch.randn(1, 4, query_len, 16),
        torch.randn(1, 2, kv_len, 16),
        torch.randn(1, 2, kv_len, 16),
    )


def test_without_a_mask_the_module_says_whether_it_is_causal():
    def reference(query, key, value, is_causal, window):
        i, j = torch.arange(6)[:, None], torch.arange(6)[None, :]
        kept = ((i - j).abs() < window) & ((j <= i) | (not is_causal))
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=kept, enable_gqa=True
        ).transpose(1, 2)

    tensors = qkv()
    for module, kwargs, is_causal, window in (
        (Names(), {}, True, 4),
        (Names(is_causal=False), {}, False, 4),
        (Names(is_causal=False), {"is_causal": True}, True, 4),
        (Names(is_causal=True), {"is_causal": False}, False, 4),
        (Names(), {"sliding_window": 2}, True, 2),
        (Names(is_causal=False), {"sliding_window": 3}, False, 3),
    ):
        out, _ = block_sparse_attention_forward(module, *tensors, None, **kwargs)
        torch.testing.assert_close(out, reference(*tensors, is_causal, window))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"output_attentions": True, "dropout": 0.1},
            NotImplementedError,
            "output_attentions got True in layers.0",
        ),
        ({"head_mask": torch.ones(4)}, NotImplementedError, r"passes \['head_mask'\]"),
        ({"position_bias": torch.ones(1)}, NotImplementedError, r"passes \['position_bias'\]"),
        ({"cache": object()}, NotImplementedError, r"passes \['cache'\]"),
        ({"softcap": -1.0}, ValueError, "softcap got -1.0"),
    ],
)
def test_what_is_not_honoured_is_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        block_sparse_attention_forward(Names(), *qkv(), None, **kwargs)
    harmless = {name: None for name in kwargs if name != "dropout"} | {
        "use_cache": True,
        "position_ids": torch.ones(1),
    }
    block_sparse_attention_forward(Names(), *qkv(), None, **harmless)


def test_queries_without_a_known_place_are_refused():
    with pytest.raises(
        NotImplementedError, match="attention_mask got None .* 3 queries and 6 keys"
    ):
        block_sparse_attention_forward(Names(), *qkv(3), None)
    with pytest.raises(
        NotImplementedError, match="attention_mask got None .* 1 queries and 6 keys"
    ):
        block_sparse_attention_forward(Names(is_causal=False), *qkv(1), None)
    block_sparse_attention_forward(Names(), *qkv(1), None)


def test_masks_of_other_tokens_are_refused():
    mask = make_mask(1, 5, 5, mask_function=causal_mask_function)
    with pytest.raises(
        ValueError, match=r"was made for .* \(1, 5, 5\), but the attention has \(1, 6, 6\)"
    ):
        block_sparse_attention_forward(Names(), *qkv(), mask)
    mask = make_mask(1, 3, 6, mask_function=bidirectional_mask_function)
    with pytest.raises(NotImplementedError, match="3 queries and 6 keys without causality"):
        block_sparse_attention_forward(Names(), *qkv(3), mask)

    class Cross(Names):
        def forward(self, hidden_states, encoder_hidden_states=None):
            return block_sparse_attention_forward(self, *qkv(), None)[0]

    Cross()(1)
    with pytest.raises(NotImplementedError, match="got encoder_hidden_states: it is a cross-att"):
        Cross()(1, encoder_hidden_states=1)


def test_context_parallelism_is_refused():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        buffer = torch.zeros(1, 6)
        with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[1]):
            with pytest.raises(NotImplementedError, match="each rank holds a part of the sequence"):
                block_sparse_attention_forward(Names(), *qkv(), None)
    finally:
        torch.distributed.destroy_process_group()
    block_sparse_attention_forward(Names(), *qkv(), None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_attentions_are_those_within_the_layout(family):
    """GPT-2 and OPT gather the weights without telling their attention."""
    layout = SinkWindow(2, 5)
    model = make_model(family)
    batch = make_batch(padded=False)
    with eager_attention_within(layout, is_causal=family not in BIDIRECTIONAL):
        expected = model(**batch, output_attentions=True)
    patch_model(model, layout)
    assert not model(**batch, output_hidden_states=True).get("attentions")
    actual = model(**batch, output_attentions=True)
    torch.testing.assert_close(actual.logits, expected.logits, **LOGITS)
    assert len(actual.attentions) == 2
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, **LOGITS)
    for module in model.modules():
        if hasattr(module, "attention_dropout") or isinstance(module, nn.Dropout):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "attention_dropout", 0.5)
        if family == "opt" and state_of(module):
            module.dropout = 0.5
    with pytest.raises(NotImplementedError, match="output_attentions got True in .* dropout 0.5"):
        model.train()(**batch, output_attentions=True)


def test_labels_on_their_way_to_the_loss_are_let_through():
    model = patch_model(make_model("llama"), SlidingWindow(4))
    ids = make_batch(padded=False)["input_ids"]
    shifted = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted).loss, loss)


def test_is_causal_false_makes_a_decoder_bidirectional():
    layout = SinkWindow(1, 4)
    model = make_model("llama")
    with eager_attention_within(layout, is_causal=False):
        expected = run(model, make_batch(), is_causal=False)
    patch_model(model, layout)
    assert_same(run(model, make_batch(), is_causal=False), expected)
    mask = make_mask(1, 6, 6, mask_function=causal_mask_function)
    with pytest.raises(ValueError, match="is_causal got False .* attention_mask is causal"):
        block_sparse_attention_forward(Names(), *qkv(), mask, is_causal=False)


@pytest.mark.parametrize(
    ("layout", "options", "error", "message"),
    [
        (
            {2: Dense()},
            {},
            ValueError,
            "layout names layer 2, but LlamaForCausalLM has attention layers 0..1",
        ),
        ({-1: Dense()}, {}, ValueError, "layout names layer -1, but LlamaForCausalLM has"),
        (
            {"model.layers.7.self_attn": Dense()},
            {},
            ValueError,
            r"layout names module 'model.layers.7.self_attn', but LlamaForCausalLM has attention modules such as",
        ),
        ({"model": Dense()}, {}, ValueError, "layout names module 'model', "),
        (
            {0: Dense(), "layers.0": Dense()},
            {},
            ValueError,
            "names the attention module model.layers.0.self_attn twice",
        ),
        ({0: Dense(), "0": Dense()}, {}, ValueError, "layer 0 twice, as number and as string"),
        ({"*": Dense(), 0: Dense()}, {}, ValueError, r"'\*' means every layer and stands alone"),
        ({}, {}, ValueError, "layout got an empty dict"),
        ({1.5: Dense()}, {}, TypeError, "layout got the key 1.5"),
        ({0: {0: Dense()}}, {}, TypeError, "layout got layouts by layer for layer 0"),
        (5, {}, TypeError, "layout got int; it must be a layout, a preset's name"),
        ("bigbrid", {}, ValueError, "layout got the name 'bigbrid'"),
        (torch.ones(2, 2), {}, ValueError, "block_size got None for a layout tensor"),
        (Dense(), {"block_size": 64}, ValueError, "block_size got 64 beside Dense"),
        (Dense(), {"impl": "cuda"}, ValueError, "impl got 'cuda'"),
        (PerHead((Dense(),) * 3), {}, ValueError, "PerHead with 3 layouts; the query has 4 heads"),
        (
            TensorLayout.from_tensor(torch.rand(3, 4, 4) > 0.5, 16),
            {},
            ValueError,
            "3 heads in .*; the query has 4 heads",
        ),
        (Dense(), {"layers": [0, 2]}, ValueError, "layers got 2, but Llama.* layers 0..1"),
        (Dense(), {"layers": [-1]}, ValueError, "layers got -1, but Llama"),
        (Dense(), {"layers": []}, TypeError, r"layers got \[\]; it must be one of"),
        (Dense(), {"layers": 3}, TypeError, "layers got 3; it must be one of"),
        (Dense(), {"layers": [True]}, TypeError, r"layers got \[True\]"),
        (Dense(), {"layers": "sliding_attention"}, ValueError, "Llama.* has no layer_types"),
        (Dense(), {"dense_every": 1}, ValueError, "dense_every got 1; it must be an integer of at"),
        (Dense(), {"dense_every": 2.0}, ValueError, "dense_every got 2.0"),
        (Dense(), {"dense_every": 3}, ValueError, "dense_every got 3 for at most 2 layers in a"),
        (Dense(), {"layers": [1], "dense_every": 2}, ValueError, "dense_every got 2 for at most 1"),
        ({0: Dense()}, {"dense_every": 2}, TypeError, "layout got layouts by layer"),
        (PerLayer({0: Dense()}), {"layers": [1]}, TypeError, "layout got layouts by layer"),
    ],
)
def test_wrong_layouts_are_refused_and_change_nothing(layout, options, error, message):
    model = make_model("llama")
    before = model.config.to_dict()
    with pytest.raises(error, match=message):
        patch_model(model, layout, **options)
    assert model.config.to_dict() == before and model.config._attn_implementation == "eager"


def test_a_type_of_layers_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"types \['full_attention', 'sliding_attention'\]"):
        patch_model(make_model("gemma3"), SlidingWindow(4), layers="global_attention")


def test_a_patched_model_gets_the_new_layouts_and_unpatching_restores_the_first():
    model, batch = make_model("llama", "sdpa"), make_batch()
    dense = model(**batch).logits
    patch_model(patch_model(model, BigBird(16)), {1: SlidingWindow(3)}, impl="torch")
    only = patch_model(make_model("llama", "sdpa"), {1: SlidingWindow(3)})
    assert model.config.block_sparse == only.config.block_sparse
    assert torch.equal(model(**batch).logits, only(**batch).logits)
    assert state_of(model.model.layers[0].self_attn).layout is None
    # A layout that cannot be given leaves the last one.
    with pytest.raises(ValueError, match="layout names layer 9"):
        patch_model(model, {9: Dense()})
    assert torch.equal(model(**batch).logits, only(**batch).logits)
    assert torch.equal(unpatch_model(model)(**batch).logits, dense)


class KeepsEight(DynamicLayer):
    """A cache layer that says nothing of the keys it drops."""

    def update(self, *args, **kwargs):
        return tuple(states[:, :, -8:] for states in super().update(*args, **kwargs))


def test_caches_that_do_not_say_which_keys_they_give_are_refused():
    model = patch_model(make_model("llama"), SinkWindow(2, 5))
    batch = make_batch(14)
    with pytest.raises(ValueError, match=r"\(3, 14, 14\), but .* has \(3, 14, 8\).* a cache gives"):
        model(**batch, past_key_values=Cache(layers=[KeepsEight(), KeepsEight()]))
    options = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # transformers' own words: its paged cache has implementations of its own.
    with pytest.raises(ValueError, match=r"block_sparse\S* is not supported"):
        model.generate_batch(inputs=[[5, 6, 7]], generation_config=options)


def test_the_prefix_of_paged_attention_is_refused_or_means_the_same(recwarn):
    model = patch_model(make_model("llama"), SinkWindow(2, 5))
    tokens = make_batch(24, padded=False)["input_ids"]
    expected = model(tokens).logits
    try:
        model.set_attn_implementation("paged|block_sparse")
    except (
        ValueError
    ) as refusal:  # by older releases, which know the prefix for their own implementations alone
        assert "paged|block_sparse" in str(refusal)
    assert not [warning for warning in recwarn if "runs dense" in str(warning.message)]
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize(
    "shape", [(24,), (3,), (3, 1, 24), (3, 24, 24), (3, 1, 1, 24, 24), (2, 24)]
)
def test_masks_of_an_unexpected_rank_are_refused(shape):
    model = patch_model(make_model("llama"), SinkWindow(2, 5))
    tokens = make_batch(24, padded=False)["input_ids"]
    message = f"attention_mask got shape {re.escape(str(shape))}; it must be .batch, length. with"
    with pytest.raises(ValueError, match=message):
        model(tokens, attention_mask=torch.ones(shape, dtype=torch.long))
    for four in ((3, 24, 1, 24), (2, 1, 24, 24), (3, 1, 24, 23)):
        with pytest.raises(
            ValueError, match="attention_mask got shape .* it must be .3, 1 or heads"
        ):
            model(tokens, attention_mask=torch.ones(four, dtype=torch.bool))


def test_a_4d_mask_of_another_dtype_is_refused():
    model = patch_model(make_model("llama"), SinkWindow(2, 5))
    tokens = make_batch(24, padded=False)["input_ids"]
    with pytest.raises(TypeError, match="attention_mask got torch.int64 in 4 dim.*it must be bool"):
        model(tokens, attention_mask=torch.ones(3, 1, 24, 24, dtype=torch.long))


def test_a_part_of_a_patched_model_cannot_be_patched_again():
    model, batch = make_model("llama", "sdpa"), make_batch()
    dense = model(**batch).logits
    patch_model(model.model, SlidingWindow(3))
    sparse = patch_model(model, SinkWindow(2, 5))(**batch).logits
    assert torch.equal(unpatch_model(model)(**batch).logits, dense)
    patch_model(model, SinkWindow(2, 5))
    for change in (lambda: patch_model(model.model, Dense()), lambda: unpatch_model(model.model)):
        with pytest.raises(ValueError, match="LlamaModel that was patched as a part of a larger"):
            change()
    assert torch.equal(model(**batch).logits, sparse)
    assert torch.equal(unpatch_model(model)(**batch).logits, dense)


def test_wrong_models_are_refused():
    with pytest.raises(
        TypeError, match="model got Linear; it must be a transformers PreTrainedModel"
    ):
        patch_model(nn.Linear(2, 2), Dense())
    model = make_model("llama")
    mamba = MambaModel(MambaConfig(vocab_size=9, hidden_size=8, state_size=4, num_hidden_layers=1))
    with pytest.raises(
        NotImplementedError, match="MambaModel has no attention module that goes through"
    ):
        patch_model(mamba, Dense(), dense_every=2)
    with pytest.raises(
        TypeError, match="model got str; it must be a model that patch_model changed"
    ):
        unpatch_model("llama")
    with pytest.raises(ValueError, match="has no block-sparse layers; there is nothing to undo"):
        unpatch_model(model)
    patch_model(model, Dense())
    with pytest.raises(ValueError, match="was patched as a part of a larger model"):
        unpatch_model(model.model)


def test_a_layout_too_short_raises_also_in_the_middle_of_a_generation():
    model = patch_model(make_model("llama"), torch.ones(1, 1), block_size=16)
    ids = make_batch(14, padded=False)["input_ids"]
    with pytest.raises(ValueError, match="1 x 1 entries of 16 tokens"):
        model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)


def test_only_transformers_own_dense_attention_stays_beside_sparse_layers():
    model = make_model("llama", "flex_attention")
    with pytest.raises(NotImplementedError, match="its own attention 'flex_attention'"):
        patch_model(model, {0: Dense()})
    patch_model(model, Dense())
    assert unpatch_model(model).config._attn_implementation == "flex_attention"


def test_a_module_without_a_layout_is_refused():
    model = make_model("llama")
    with pytest.raises(ValueError, match="whose configuration has no layouts; use patch_model"):
        model.set_attn_implementation("block_sparse")
    patch_model(model.model, Dense())
    model.model.layers[0].self_attn.__dict__.pop("_block_sparse")
    with pytest.raises(RuntimeError, match="LlamaAttention runs with .* but has no layout"):
        model(**make_batch())


def test_another_implementation_can_be_chosen_for_a_while():
    model = make_model("llama", "sdpa")
    batch = make_batch()
    dense = model(**batch).logits
    sparse = patch_model(model, SlidingWindow(3))(**batch).logits
    with pytest.warns(UserWarning, match="attn_implementation='sdpa' was asked for"):
        model.set_attn_implementation("sdpa")
    assert torch.equal(model(**batch).logits, dense)
    model.set_attn_implementation("block_sparse")
    assert torch.equal(model(**batch).logits, sparse)
