"""Adapters know the layouts of their base: saved beside them, checked on loading, kept by merging."""

import json

import pytest
import torch
from packaging.version import Version
from test_imports import fresh_python
from test_patch import llava
from test_saving import LARGE, states
from tiny_models import make_batch, make_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_blocksparse import (
    BigBird,
    SlidingWindow,
    extend_positions,
    norm_and_embedding_options,
    patch_model,
    patch_model_for_adapter,
    unpatch_model,
)

peft = pytest.importorskip("peft")

WINDOW = SlidingWindow(5)
FILE = "block_sparse_adapter.json"


def lora(**options):
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)


def trained(model, rate=0.5):
    """An adapter that changes the logits."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(2):
        batch = make_batch(padded=False)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model):
    return model(**make_batch(padded=False)).logits


def base(layout=WINDOW):
    model = make_model("llama", "sdpa")
    return model if layout is None else patch_model(model, layout)


@pytest.fixture
def adapter(tmp_path):
    """The directory of a trained adapter, and the logits of the model it was saved from."""
    model = trained(peft.get_peft_model(base(), lora()))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert not torch.equal(expected, logits(base()))
    return tmp_path / "adapter", expected


def test_saved_beside_and_loaded_onto_a_patched_base(adapter):
    folder, expected = adapter
    written = json.loads((folder / FILE).read_text())
    assert written["sections"] == {"": base().config.block_sparse}
    assert written["positions"]["max_position_embeddings"] == 256
    assert "block_sparse" not in (folder / "adapter_config.json").read_text()
    loaded = peft.PeftModel.from_pretrained(base(), folder)
    assert torch.equal(logits(loaded), expected)
    assert [state.layout for state in states(loaded)] == [WINDOW, WINDOW]

    other = base(None)
    assert patch_model_for_adapter(other, folder) is other
    loaded = peft.PeftModel.from_pretrained(other, folder)
    assert torch.equal(logits(loaded), expected)
    loaded.load_adapter(folder, "second")
    unpatch_model(loaded.get_base_model())
    assert not torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("layout", [None, SlidingWindow(6), {0: WINDOW}], ids=str)
def test_another_base_is_refused_and_left_alone(layout, adapter):
    folder, _ = adapter
    model = base(layout)
    names = [name for name, _ in model.named_modules()]
    if layout is None:
        message = (
            "trained with block-sparse layouts, for a LlamaForCausalLM that is dense; .* first"
        )
    elif isinstance(layout, dict):
        message = r"trained with SlidingWindow\(window=5\) in model.layers.1.self_attn, for .* None"
    else:
        message = (
            r"in model.layers.0.self_attn, for a LlamaForCausalLM with SlidingWindow\(window=6"
        )
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(model, folder)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(folder))
    assert [name for name, _ in model.named_modules()] == names
    with_another = peft.get_peft_model(model, lora())
    with pytest.raises(ValueError, match=message):
        with_another.load_adapter(folder, "second")


def test_loading_by_the_adapter_s_directory(tmp_path):
    """transformers loads the base that the adapter names, dense or sparse as that was saved."""
    base().save_pretrained(tmp_path / "sparse")
    base(None).save_pretrained(tmp_path / "dense")
    expected = {}
    for name in ("sparse", "dense"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        model = model if name == "sparse" else patch_model(model, WINDOW)
        model = trained(peft.get_peft_model(model, lora(task_type="CAUSAL_LM")))
        model.save_pretrained(tmp_path / f"on_{name}")
        expected[name] = logits(model)
    for load in (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        loaded = load.from_pretrained(tmp_path / "on_sparse")
        assert torch.equal(logits(loaded), expected["sparse"])
        with pytest.raises(ValueError, match="for a LlamaForCausalLM that is dense"):
            load.from_pretrained(tmp_path / "on_dense")
        loaded = load.from_pretrained(tmp_path / "on_dense", block_sparse=WINDOW)
        assert torch.equal(logits(loaded), expected["dense"])


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers asks for peft {MIN_PEFT_VERSION}",
)
def test_adapters_that_transformers_itself_adds(tmp_path):
    model = base()
    model.add_adapter(lora())
    expected = logits(trained(model))
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).is_file() and not (tmp_path / "config.json").exists()
    again = base()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), expected)


def test_named_adapters_large_tensors_and_stale_files(tmp_path):
    model = peft.get_peft_model(base(LARGE), lora())
    model.add_adapter("second", lora())
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        assert len((folder / FILE).read_text()) < 4_000
        assert (folder / "block_sparse_adapter_layouts.safetensors").is_file()
        peft.PeftModel.from_pretrained(base(LARGE), folder)
        with pytest.raises(ValueError, match="for a LlamaForCausalLM with SlidingWindow"):
            peft.PeftModel.from_pretrained(base(), folder)
        restored = patch_model_for_adapter(base(None), folder)
        assert [state.layout for state in states(restored)] == [LARGE, LARGE]
    # Adapters of a dense base have nothing to say, and run on any.
    peft.get_peft_model(base(None), lora()).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("block_sparse*")) == []
    peft.PeftModel.from_pretrained(base(), tmp_path)
    with pytest.raises(ValueError, match=f"has no {FILE}; its base had no layouts"):
        patch_model_for_adapter(base(), tmp_path)


def test_random_layouts_and_parts_of_a_model(tmp_path):
    drawn = BigBird(block_size=16, window_blocks=1, global_blocks=0, random_blocks=1)
    peft.get_peft_model(base(drawn), lora()).save_pretrained(tmp_path / "random")
    peft.PeftModel.from_pretrained(base(drawn), tmp_path / "random")

    def part(layout):
        model = llava()
        patch_model(model.model.language_model, layout)
        return model

    peft.get_peft_model(part(WINDOW), lora()).save_pretrained(tmp_path / "part")
    assert list(json.loads((tmp_path / "part" / FILE).read_text())["sections"]) == ["text_config"]
    peft.PeftModel.from_pretrained(part(WINDOW), tmp_path / "part")
    with pytest.raises(ValueError, match="with SlidingWindow"):
        peft.PeftModel.from_pretrained(part(SlidingWindow(6)), tmp_path / "part")
    restored = patch_model_for_adapter(llava(), tmp_path / "part")
    assert restored.config.text_config.block_sparse and not restored.config.block_sparse


def test_other_positions_warn(tmp_path):
    model = extend_positions(base(), 1024)
    peft.get_peft_model(model, lora()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was trained with the positions .* extend_positions"):
        peft.PeftModel.from_pretrained(base(), tmp_path)


def test_damaged_files_are_refused(adapter):
    folder, _ = adapter
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at"):
        peft.PeftModel.from_pretrained(base(), folder / "missing")
    for text in ("{", "[]", '{"sections": {}}', '{"sections": 1, "positions": {}}'):
        (folder / FILE).write_text(text)
        with pytest.raises(ValueError, match=f"whose {FILE} cannot be read"):
            peft.PeftModel.from_pretrained(base(), folder)
    section = base().config.block_sparse | {"layouts": {"9": WINDOW.to_dict()}}
    (folder / FILE).write_text(json.dumps({"sections": {"": section}, "positions": {}}))
    with pytest.raises(ValueError, match="do not fit a LlamaForCausalLM: layout names layer 9"):
        peft.PeftModel.from_pretrained(base(), folder)


def test_merging_keeps_the_layouts(tmp_path):
    model = trained(peft.get_peft_model(base(), lora()))
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert [state.layout for state in states(merged)] == [WINDOW, WINDOW]
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(merged)) and len(states(loaded)) == 2


def test_patching_after_wrapping():
    before = trained(peft.get_peft_model(base(), lora()))
    after = peft.get_peft_model(base(None), lora())
    after.load_state_dict(before.state_dict())
    patch_model(after.get_base_model(), WINDOW)
    assert torch.equal(logits(after.eval()), logits(before))


NORMS = ["input_layernorm", "norm", "post_attention_layernorm"]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["embed_tokens", *NORMS]),
        ("gemma3", None),
        ("gpt2", ["lm_head", "ln_1", "ln_2", "ln_f", "wpe", "wte"]),
        ("opt", None),
    ],
)
def test_norms_and_embeddings_train_in_full(family, names, tmp_path):
    model = make_model(family)
    wanted = {
        name
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or "Norm" in type(module).__name__
        for name, _ in module.named_parameters(prefix=path, recurse=False)
    }
    options = norm_and_embedding_options(model)
    assert names is None or sorted(options["modules_to_save"]) == names
    assert len(options["modules_to_save"]) < 12
    target = {"gpt2": "c_attn"}.get(family, "q_proj")
    config = peft.LoraConfig(target_modules=[target], fan_in_fan_out=family == "gpt2", **options)
    wrapped = peft.get_peft_model(model, config)
    trained_names = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }
    assert trained_names - {"lm_head.weight"} == wanted
    with pytest.raises(ValueError, match="with PEFT modules in it"):
        norm_and_embedding_options(wrapped)

    is_tied = model.config.tie_word_embeddings
    assert bool(options.get("ensure_weight_tying")) == is_tied
    expected = logits(trained(wrapped, rate=0.01))
    merged = wrapped.merge_and_unload()
    shared = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert shared == is_tied
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)


def test_shared_weights_that_peft_would_part_are_refused():
    with pytest.raises(NotImplementedError, match="cls.predictions.decoder shares the weights of"):
        norm_and_embedding_options(make_model("bert"))
    # Without a head there is nothing to part.
    names = norm_and_embedding_options(make_model("bert").bert)["modules_to_save"]
    assert sorted(names) == [
        "LayerNorm",
        "position_embeddings",
        "token_type_embeddings",
        "word_embeddings",
    ]


def test_a_name_that_would_match_more_is_written_in_full():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    model.add_module("11", torch.nn.Linear(2, 2))
    model.add_module("norm", torch.nn.LayerNorm(2))
    model.add_module("unnorm", torch.nn.LayerNorm(2, elementwise_affine=False))
    assert norm_and_embedding_options(model) == {"modules_to_save": ["1", "norm"]}
    with pytest.raises(ValueError, match="without normalisations and embeddings that have weights"):
        norm_and_embedding_options(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("is_tied", [True, False])
def test_trained_embeddings_survive_saving_and_merging(is_tied, tmp_path):
    def fresh():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=is_tied,
        )
        return patch_model(LlamaForCausalLM(config).eval(), WINDOW)

    start = fresh()
    model = peft.get_peft_model(start, lora(**norm_and_embedding_options(start)))
    expected = logits(trained(model))
    before = fresh().model.embed_tokens.weight
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(merged.model.embed_tokens.weight, before)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == is_tied
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged)) and len(states(again)) == 2


def test_peft_imported_first(adapter):
    folder, _ = adapter
    base(None).save_pretrained(folder.parent / "dense")
    made = fresh_python(
        "import sys, peft, hf_blocksparse\nfrom transformers import AutoModelForCausalLM\n"
        "assert not [f for f in sys.meta_path if 'hf_blocksparse' in type(f).__module__]\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder.parent / 'dense')!r})\n"
        f"peft.PeftModel.from_pretrained(model, {str(folder)!r})"
    )
    assert "ValueError: adapter got" in made.stderr and "that is dense" in made.stderr
