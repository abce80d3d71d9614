"""An extended model equals one loaded from a configuration with those positions, and what cannot be extended is refused."""

import copy
import json

import pytest
import torch
from test_patch import llava
from test_scripts import byte_tokenizer
from tiny_models import VOCABULARY, make_model, real_tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    MptConfig,
    MptForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from hf_blocksparse import SlidingWindow, extend_positions, patch_model
from hf_blocksparse.model_layouts import state_of
from hf_blocksparse.positions import ROPE_OPTIONS, position_limit

LENGTH = 300  # beyond the 256 positions of the tiny models


def batch(length=LENGTH, padded=False):
    torch.manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (2, length))
    if not padded:
        return {"input_ids": input_ids}
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, -20:], attention_mask[0, -20:] = 0, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def scaled(method, factor, limit=256, **theta):
    parameters = theta | {"rope_type": method, "factor": factor}
    if method in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = limit
    if method == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return parameters


def loaded_with(model, folder, **changes):
    """`model` saved, its config.json edited by hand, and loaded."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return type(model).from_pretrained(folder, attn_implementation="sdpa")


# GPT-NeoX rotates two dimensions here, on which dynamic and llama3 have no effect.
ROPE = [(family, method) for family in ("llama", "olmo2") for method in (*ROPE_OPTIONS, "none")]
ROPE += [("gpt_neox", method) for method in ("linear", "yarn", "none")]


@pytest.mark.parametrize(("family", "method"), ROPE)
def test_rope_equals_a_model_loaded_from_the_parameters(family, method, tmp_path):
    model = make_model(family, "sdpa")
    theta = {
        key: value for key, value in model.config.rope_parameters.items() if key != "rope_type"
    }
    changes = {"max_position_embeddings": 256 if method == "dynamic" else 1024}
    if method != "none":
        changes["rope_parameters"] = scaled(method, 4.0, **theta)
    reference = loaded_with(copy.deepcopy(model), tmp_path / "edited", **changes)
    before = model(**batch()).logits

    assert extend_positions(model, 1024, method=method) is model
    expected = reference(**batch()).logits
    assert torch.equal(model(**batch()).logits, expected)
    assert torch.equal(expected, before) == (method == "none")
    assert position_limit(model.config) == 1024
    assert model.config.max_position_embeddings == changes["max_position_embeddings"]
    if method != "none":
        assert model.config.rope_parameters == changes["rope_parameters"]
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / generation)
        assert torch.equal(model(**batch()).logits, expected)


def test_yarn_is_the_default_with_the_settings_measured_for_smollm2():
    model = make_model("llama")
    model.config.rope_parameters["rope_theta"] = 100000.0
    model.config.max_position_embeddings = 8192
    extend_positions(model, 32768)
    assert model.config.max_position_embeddings == 32768
    assert model.config.rope_parameters == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    }


@pytest.mark.parametrize("family", ["gemma3", "modernbert"])
def test_parameters_by_layer_type(family, tmp_path):
    model = make_model(family, "sdpa")
    rope = copy.deepcopy(model.config.rope_parameters)
    wanted = copy.deepcopy(rope)
    wanted["full_attention"] = scaled(
        "yarn", 4.0, rope_theta=rope["full_attention"]["rope_theta"]
    ) | {"beta_fast": 16}
    reference = loaded_with(
        copy.deepcopy(model), tmp_path, rope_parameters=wanted, max_position_embeddings=1024
    )
    extend_positions(model, 1024, rope_options={"beta_fast": 16})
    assert model.config.rope_parameters == wanted
    assert torch.equal(model(**batch()).logits, reference(**batch()).logits)

    every = make_model(family, "sdpa")
    extend_positions(every, 1024, method="linear", layer_types=list(rope))
    assert {one["factor"] for one in every.config.rope_parameters.values()} == {4.0}
    with pytest.raises(ValueError, match="layer_types got .'conv'.; it must name some of"):
        extend_positions(make_model(family), 1024, layer_types=["conv"])


def test_scaling_of_the_attention_itself_follows():
    """DeepSeek's attention modules multiply their scale by a function of the factor."""
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    before = model.model.layers[0].self_attn.scaling
    options = {"mscale": 1.0, "mscale_all_dim": 1.0}
    extend_positions(model, 1024, rope_options=options)
    fresh = DeepseekV3ForCausalLM(copy.deepcopy(model.config)).eval()
    assert model.model.layers[0].self_attn.scaling == fresh.model.layers[0].self_attn.scaling
    assert model.model.layers[0].self_attn.scaling > before
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(**batch()).logits, fresh(**batch()).logits)


@pytest.mark.parametrize("method", ROPE_OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_two_extensions_equal_one(family, method):
    once, twice = make_model(family, "sdpa"), make_model(family, "sdpa")
    extend_positions(once, 1280, method=method)
    extend_positions(twice, 768, method=method)
    twice(**batch(700))  # dynamic scaling remembers the longest input
    extend_positions(twice, 1280, method=method)
    assert once.config.to_dict() == twice.config.to_dict()
    for length in (LENGTH, 600, 100):
        assert torch.equal(once(**batch(length)).logits, twice(**batch(length)).logits)
    config = copy.deepcopy(twice.config)
    buffers = dict(twice.named_buffers())
    extend_positions(twice, 1280, method=method)
    assert twice.config.to_dict() == config.to_dict()
    assert all(buffer is buffers[name] for name, buffer in twice.named_buffers())
    if method == "yarn" and family == "llama":
        with pytest.raises(
            ValueError, match="rope_options got .* which has 1280 positions already"
        ):
            extend_positions(twice, 1280, rope_options={"beta_fast": 16})
    other = "linear" if method != "linear" else "yarn"
    for limit in (1280, 2048):
        with pytest.raises(ValueError, match=f"are {method!r} already; two scalings cannot be"):
            extend_positions(twice, limit, method=other)


def test_a_module_with_a_configuration_of_its_own():
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(model.config)
    extend_positions(model, 1024)
    assert attention.config is not model.config
    assert attention.config.rope_parameters == model.config.rope_parameters
    assert attention.config.max_position_embeddings == 1024


def test_loaded_in_bfloat16_with_frequencies_in_float32(tmp_path):
    extend_positions(make_model("llama"), 1024).save_pretrained(tmp_path / "extended")
    make_model("llama").save_pretrained(tmp_path / "plain")
    loaded, extended = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        for name in ("extended", "plain")
    )
    extend_positions(extended, 1024)
    assert extended.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(loaded(**batch()).logits, extended(**batch()).logits)


def tables(model):
    return {
        "gpt2": lambda: model.transformer.wpe,
        "bert": lambda: model.bert.embeddings.position_embeddings,
        "roberta": lambda: model.roberta.embeddings.position_embeddings,
        "opt": lambda: model.model.decoder.embed_positions,
    }[model.config.model_type]()


# Rows before the first position, and rows beyond the configuration's limit.
TABLES = {"gpt2": (0, 0), "bert": (0, 0), "roberta": (1, 0), "opt": (2, 2)}


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("method", ["tile", "interpolate"])
def test_tables(family, method, tmp_path):
    model = make_model(family, "sdpa")
    reserved, extra = TABLES[family]
    old = tables(model).weight.detach().clone()
    assert len(old) == 256 + extra
    head, rows = old[:reserved], old[reserved:].double()
    short = batch(100)
    before = model(**short).logits
    tokenizer = byte_tokenizer()

    extend_positions(model, 1000, method=method, tokenizer=tokenizer)
    new, count = tables(model).weight, 1000 + extra - reserved
    assert tables(model).num_embeddings == len(new) == count + reserved
    assert model.config.max_position_embeddings == 1000
    assert torch.equal(new[:reserved], head)
    if method == "tile":
        wanted = rows.repeat(4, 1)[:count]
        assert torch.equal(new[reserved:], wanted.float())
        assert torch.equal(model(**short).logits, before)
    else:
        place = torch.arange(count).double() * (len(rows) - 1) / (count - 1)
        near = (1 - (place[:, None] - torch.arange(len(rows))).abs()).clamp(min=0)
        torch.testing.assert_close(new[reserved:].double(), near @ rows, atol=1e-6, rtol=0)
        assert torch.equal(new[[reserved, -1]], old[[reserved, -1]])
        assert not torch.allclose(model(**short).logits, before)

    tokens = 1000 + extra - reserved
    assert tokenizer.model_max_length == tokens
    expected = model(**batch(tokens)).logits
    with pytest.raises((IndexError, RuntimeError)):
        model(**batch(tokens + 1))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="sdpa")
    assert torch.equal(loaded(**batch(tokens)).logits, expected)
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == tokens

    # The present limit: only the tokenizer is told.
    again, weight = byte_tokenizer(), tables(model).weight
    extend_positions(model, 1000, method=method, tokenizer=again)
    assert tables(model).weight is weight and again.model_max_length == tokens
    if method == "tile":
        extend_positions(model, 1500)
        assert torch.equal(tables(model).weight[reserved:][:count], new[reserved:])


def test_new_rows_train_and_frozen_tables_stay_frozen():
    model = make_model("gpt2")
    extend_positions(model, 512)
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert model.transformer.wpe.weight.grad[290].any()
    assert not model.transformer.wpe.weight.grad[310].any()
    model.requires_grad_(False)
    extend_positions(model, 600)
    assert not model.transformer.wpe.weight.requires_grad


def test_encoder_and_decoder_tables():
    size = dict(d_model=32, encoder_layers=1, decoder_layers=1)
    config = BartConfig(vocab_size=VOCABULARY, max_position_embeddings=256, **size)
    model = BartForConditionalGeneration(config).eval()
    extend_positions(model, 512)
    ids = batch(400)["input_ids"]
    assert model(input_ids=ids, decoder_input_ids=ids).logits.shape[1] == 400
    for part in (model.model.encoder, model.model.decoder):
        weight = part.embed_positions.weight
        assert len(weight) == 514 and torch.equal(weight[2:258], weight[258:514])


def test_computed_sinusoids_are_made_longer():
    config = GPTJConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=256, rotary_dim=4
    )
    model = GPTJForCausalLM(config).eval()
    extend_positions(model, 512, method="none")
    longer = GPTJForCausalLM(copy.deepcopy(model.config)).eval()
    assert longer.config.n_positions == 512
    longer.load_state_dict(model.state_dict())
    assert torch.equal(model(**batch(500)).logits, longer(**batch(500)).logits)


def test_the_text_part_of_a_multimodal_model():
    model = llava()
    vision = model.config.vision_config.to_dict()
    limit = model.config.text_config.max_position_embeddings
    extend_positions(model, 4 * limit)
    assert model.config.text_config.rope_parameters["factor"] == 4.0
    assert model.model.language_model.rotary_emb.attention_scaling > 1
    assert model.config.vision_config.to_dict() == vision


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_before_or_after_patching(family):
    layout = SlidingWindow(9)
    before = patch_model(extend_positions(make_model(family, "sdpa"), 512), layout)
    after = extend_positions(patch_model(make_model(family, "sdpa"), layout), 512)
    data = batch(padded=True)
    real = real_tokens(data)
    assert torch.equal(before(**data).logits[real], after(**data).logits[real])
    assert after.config.block_sparse == before.config.block_sparse
    assert sum(state_of(module) is not None for module in after.modules()) == 2


def test_nothing_else_is_touched():
    model = make_model("llama", "sdpa")
    parameters = {name: (value, value.clone()) for name, value in model.named_parameters()}
    rotary, state = model.model.rotary_emb, torch.get_rng_state()
    extend_positions(model, 1024)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert model.model.rotary_emb is rotary
    for name, value in model.named_parameters():
        assert value is parameters[name][0] and torch.equal(value, parameters[name][1])
    assert model.config._attn_implementation == "sdpa"


def yarn_with_factor():
    model = make_model("llama")
    extend_positions(model, 512, rope_options={"attention_factor": 1.25})
    return model


def phi3_longrope():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=256,
            original_max_position_embeddings=64,
            pad_token_id=0,
            rope_parameters=rope | {"rope_theta": 1e4},
        )
    )


SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
SMALL |= dict(num_attention_heads=4)
REFUSED = {
    "shrinking": ("llama", 128, {}, ValueError, "got 128 for LlamaForCausalLM with 256; it must"),
    "no number": ("llama", 512.0, {}, ValueError, "max_position_embeddings got 512.0 for Llama"),
    "no method": ("llama", 512, {"method": "ntk"}, ValueError, "method got 'ntk'; it must be one"),
    "table of RoPE": ("llama", 512, {"method": "tile"}, ValueError, "which has rotary embeddings"),
    "RoPE of a table": ("bert", 512, {"method": "yarn"}, ValueError, "no rope_parameters in its"),
    "table without rows": ("bert", 512, {"method": "none"}, ValueError, "new positions need rows"),
    "options of a table": ("gpt2", 512, {"rope_options": {"a": 1}}, ValueError, "leave them out"),
    "wrong option": ("llama", 512, {"rope_options": {"beta": 1}}, ValueError, "got ..beta.. for"),
    "flat layer types": ("llama", 512, {"layer_types": ["x"]}, ValueError, "share one set of RoPE"),
    "not a tokenizer": ("llama", 512, {"tokenizer": "t"}, TypeError, "tokenizer got str; it must"),
    "set factor": (yarn_with_factor, 1024, {}, ValueError, "attention_factor 1.25, which was set"),
    "longrope": (phi3_longrope, 512, {}, ValueError, "are 'longrope' already; two scalings"),
    "only longrope": (
        "phi3",
        512,
        {},
        NotImplementedError,
        "must be one of ..longrope.., got yarn",
    ),
    "limit of longrope": (
        phi3_longrope,
        512,
        {"method": "none"},
        ValueError,
        r"whose RoPE \('longrope'\) is computed from its limit",
    ),
    "limit of dynamic": (
        lambda: extend_positions(make_model("llama"), 512, method="dynamic"),
        1024,
        {"method": "none"},
        ValueError,
        r"whose RoPE \('dynamic'\) is computed from its limit",
    ),
    "ALiBi": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)),
        4096,
        {},
        ValueError,
        "ALiBi biases; .* nothing to extend; use it at any length as it is",
    ),
    "ALiBi up to a length": (
        lambda: MptForCausalLM(MptConfig(vocab_size=97, d_model=32, n_layers=1, n_heads=4)),
        4096,
        {},
        ValueError,
        "ALiBi biases; .* set config.max_seq_len",
    ),
    "T5": (
        lambda: T5EncoderModel(T5Config(vocab_size=97, d_model=32, d_ff=48, num_layers=1)),
        4096,
        {},
        NotImplementedError,
        r"relative biases \(encoder.block.0.layer.0.SelfAttention\)",
    ),
    "DeBERTa": (
        lambda: DebertaV2ForMaskedLM(
            DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p"])
        ),
        4096,
        {},
        NotImplementedError,
        "relative biases",
    ),
    "sinusoids": (
        lambda: PegasusForConditionalGeneration(
            PegasusConfig(vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1)
        ),
        4096,
        {},
        NotImplementedError,
        "fixed sinusoidal table model.encoder.embed_positions.weight",
    ),
    "sinusoids in a table": (
        lambda: DistilBertForMaskedLM(
            DistilBertConfig(
                vocab_size=97, dim=32, n_layers=1, n_heads=4, sinusoidal_pos_embds=True
            )
        ),
        4096,
        {},
        NotImplementedError,
        "fixed sinusoidal table distilbert",
    ),
    "no limit": (
        lambda: ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)),
        4096,
        {},
        NotImplementedError,
        "whose configuration has no max_position_embeddings",
    ),
    "no table": (
        lambda: GPTJForCausalLM(
            GPTJConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=256, rotary_dim=4)
        ),
        512,
        {},
        NotImplementedError,
        "which has no learned table of its positions; .* method='none'",
    ),
}


@pytest.mark.parametrize(
    ("make", "limit", "options", "error", "message"), REFUSED.values(), ids=REFUSED
)
def test_refused_and_unchanged(make, limit, options, error, message):
    model = make_model(make) if isinstance(make, str) else make()
    config = copy.deepcopy(model.config.to_dict())
    tensors = {name: value for name, value in model.state_dict(keep_vars=True).items()}
    with pytest.raises(error, match=message):
        extend_positions(model, limit, **options)
    assert model.config.to_dict() == config
    left = model.state_dict(keep_vars=True)
    assert all(left[name] is value for name, value in tensors.items())


def test_wrapped_models_and_tables_are_refused():
    with pytest.raises(TypeError, match="model got Linear; it must be a transformers PreTrained"):
        extend_positions(torch.nn.Linear(2, 2), 512)
    model = make_model("gpt2")
    model.transformer.wpe = torch.nn.Sequential(model.transformer.wpe)
    with pytest.raises(NotImplementedError, match="wpe is not the Embedding .* before that"):
        extend_positions(model, 512)
    model = make_model("gpt2")
    model.transformer.wpe.weight = torch.nn.Parameter(torch.zeros(128, 32))
    with pytest.raises(NotImplementedError, match=r"shape \(128, 32\) on cpu, not \(256, 32\)"):
        extend_positions(model, 512)


def test_a_yarn_configuration_that_keeps_the_old_limit():
    """Qwen2.5's way: max_position_embeddings stays, the factor says how far it reaches."""
    config = LlamaConfig(
        **SMALL,
        max_position_embeddings=256,
        rope_parameters=scaled("yarn", 4.0, rope_theta=1e4),
    )
    assert position_limit(config) == 1024
    assert position_limit(AutoConfig.for_model("vit")) is None
