"""A layout survives saving and loading, switches a dense checkpoint by itself, and is never dropped in silence."""

import hashlib
import json
import pickle
import shutil
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import save_file
from test_patch import bart, llava
from tiny_models import make_batch, make_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

import hf_blocksparse
from hf_blocksparse import (
    BigBird,
    Dense,
    MaskLayout,
    PerHead,
    PerLayer,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
)
from hf_blocksparse.model_layouts import read_section, state_of, write_section
from hf_blocksparse.patch import patch_model, unpatch_model

torch.manual_seed(0)
LAYOUTS = {
    "rule": SinkWindow(2, 6),
    "random": BigBird(block_size=16, window_blocks=1, global_blocks=0, random_blocks=1),
    "tensor": TensorLayout.from_tensor((torch.rand(4, 4, 4) > 0.5) | torch.eye(4).bool(), 16),
    "mask": MaskLayout.from_tensor((torch.rand(48, 48) > 0.5) | torch.eye(48).bool()),
    "per head": PerHead((Dense(), SlidingWindow(3), SlidingWindow(5) | SinkWindow(1, 2), Dense())),
    "by number": PerLayer({1: SlidingWindow(3)}),
    "by path": {"model.layers.0.self_attn": SlidingWindow(3)},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_two_generations_of_saving_and_loading(layout, tmp_path):
    model = patch_model(make_model("llama", "sdpa"), layout)
    batch = make_batch()
    expected = model(**batch).logits
    section = model.config.block_sparse
    for generation in ("first", "second", "third"):
        model.save_pretrained(tmp_path / generation)
        saved = json.loads((tmp_path / generation / "config.json").read_text())
        assert saved["attn_implementation"] == "block_sparse"
        assert saved["block_sparse"] == section
        assert not (tmp_path / generation / "generation_config.json").read_text().count("sparse")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / generation)
        assert model.config._attn_implementation == "block_sparse"
        assert model.config.block_sparse == section
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "bert"])
def test_other_families_and_other_heads(family, tmp_path):
    model = patch_model(make_model(family), {0: SlidingWindow(3)})
    model.save_pretrained(tmp_path)
    batch = make_batch()
    loaded = type(model).from_pretrained(tmp_path)
    # Loaded models keep transformers' default attention in the other layers, the patched one kept eager attention.
    torch.testing.assert_close(
        loaded(**batch).logits[batch["attention_mask"].bool()],
        model(**batch).logits[batch["attention_mask"].bool()],
        atol=5e-5,
        rtol=1e-5,
    )
    base = AutoModel.from_pretrained(tmp_path)
    assert [state.layout for state in states(base)] == [SlidingWindow(3), None]
    assert [state.layout for state in states(loaded)] == [SlidingWindow(3), None]


def states(model):
    return [state for module in model.modules() if (state := state_of(module))]


def test_a_path_is_the_same_with_and_without_a_head(tmp_path):
    model = patch_model(make_model("llama"), {"model.layers.1.self_attn": SlidingWindow(3)})
    assert list(model.config.block_sparse["layouts"]) == ["layers.1.self_attn"]
    model.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForCausalLM):
        assert [state.layout for state in states(auto.from_pretrained(tmp_path))] == [
            None,
            SlidingWindow(3),
        ]


def test_a_loaded_model_can_be_made_dense(tmp_path):
    dense = make_model("llama", "sdpa")
    batch = make_batch()
    expected = dense(**batch).logits
    dense.save_pretrained(tmp_path / "dense")
    patch_model(dense, SlidingWindow(3)).save_pretrained(tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(unpatch_model(model)(**batch).logits, expected)
    assert model.config._attn_implementation == "sdpa"
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config
    assert model.config.to_diff_dict() == reference.to_diff_dict()
    model.save_pretrained(tmp_path / "again")
    files = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "again")
    ]
    assert files[0] == files[1]


def test_a_loaded_model_can_be_patched_again(tmp_path):
    patch_model(make_model("llama", "sdpa"), SlidingWindow(3)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    patch_model(model, {0: SinkWindow(1, 2)})
    assert [state.layout for state in states(model)] == [SinkWindow(1, 2), None]
    assert unpatch_model(model).config._attn_implementation == "sdpa"
    assert model.config.block_sparse is None


@pytest.fixture
def dense_checkpoint(tmp_path):
    path = tmp_path / "dense"
    make_model("llama", "sdpa").save_pretrained(path)
    return path


def sparse_logits(layout):
    return patch_model(make_model("llama", "sdpa"), layout)(**make_batch()).logits


@pytest.mark.parametrize(
    "value",
    [
        SlidingWindow(3),
        SlidingWindow(3).to_dict(),
        {"version": 1, "layouts": {"*": SlidingWindow(3).to_dict()}},
        {0: SlidingWindow(3), "layers.1": SlidingWindow(3)},
    ],
    ids=["layout", "layout's dict", "section", "by layer"],
)
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, LlamaForCausalLM])
def test_a_dense_checkpoint_becomes_sparse_by_the_flag(auto, value, dense_checkpoint, tmp_path):
    expected = sparse_logits(SlidingWindow(3))
    model = auto.from_pretrained(dense_checkpoint, block_sparse=value)
    assert torch.equal(model(**make_batch()).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**make_batch()).logits, expected)


def test_a_configuration_that_carries_the_section(dense_checkpoint):
    config = AutoConfig.from_pretrained(dense_checkpoint)
    assert config.block_sparse is None
    config.block_sparse = SlidingWindow(3)
    loaded = AutoModelForCausalLM.from_pretrained(dense_checkpoint, config=config)
    assert torch.equal(loaded(**make_batch()).logits, sparse_logits(SlidingWindow(3)))
    for make in (AutoModelForCausalLM.from_config, LlamaForCausalLM):
        assert [state.layout for state in states(make(config))] == [SlidingWindow(3)] * 2

    # The configuration of a model that was built dense.
    config = AutoModelForCausalLM.from_pretrained(dense_checkpoint).config
    assert config._attn_implementation == "sdpa"
    config.block_sparse = "sink_window"
    assert len(states(AutoModelForCausalLM.from_config(config))) == 2
    del config.block_sparse
    assert not states(AutoModelForCausalLM.from_config(config))
    config = LlamaConfig(hidden_size=32, num_hidden_layers=1, block_sparse=Dense())
    assert config.block_sparse == {
        "version": 1,
        "library_version": hf_blocksparse.__version__,
        "min_library_version": "0.1.0",
        "layouts": {"*": Dense().to_dict()},
    }


def test_an_explicit_implementation_wins_and_warns(dense_checkpoint, tmp_path):
    batch = make_batch()
    dense = make_model("llama", "sdpa")(**batch).logits
    patch_model(make_model("llama", "sdpa"), SlidingWindow(3)).save_pretrained(tmp_path / "sparse")
    explicit = dict(attn_implementation="sdpa")
    for path, options in (
        (tmp_path / "sparse", explicit),
        (dense_checkpoint, explicit | {"block_sparse": SlidingWindow(3)}),
    ):
        for auto in (AutoModelForCausalLM, LlamaForCausalLM):
            with pytest.warns(UserWarning, match="'sdpa' was asked for, so the model runs dense"):
                model = auto.from_pretrained(path, **options)
            assert torch.equal(model(**batch).logits, dense)
    # A run-time wish: what is saved is sparse again.
    model.save_pretrained(tmp_path / "again")
    assert states(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


def test_dense_models_are_left_alone(dense_checkpoint):
    saved = json.loads((dense_checkpoint / "config.json").read_text())
    assert "block_sparse" not in saved and "attn_implementation" not in saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(dense_checkpoint)
    assert model.config._attn_implementation == "sdpa" and not states(model)
    with pytest.raises(
        ValueError, match="'block_sparse' for LlamaForCausalLM, whose configuration"
    ):
        AutoModelForCausalLM.from_pretrained(dense_checkpoint, attn_implementation="block_sparse")


def test_parts_of_a_multimodal_model(tmp_path):
    model = llava()
    inputs = {"input_ids": torch.tensor([[5, 6, *range(6, 36)]])}
    patch_model(model.model.language_model, SlidingWindow(3))
    expected = model(**inputs).logits
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation)
        saved = json.loads((tmp_path / generation / "config.json").read_text())
        assert saved["attn_implementation"] == {"text_config": "block_sparse"}
        assert "block_sparse" not in saved and "block_sparse" not in saved["vision_config"]
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / generation)
        assert torch.equal(model(**inputs).logits, expected)
        assert [state.path.split(".")[1] for state in states(model)] == ["language_model"] * 2
    assert model.config.vision_config._attn_implementation == "sdpa"
    dense = unpatch_model(model)(**inputs).logits
    assert not torch.equal(dense, expected) and torch.equal(dense, llava()(**inputs).logits)

    model.save_pretrained(tmp_path / "dense")
    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "dense", block_sparse=SlidingWindow(3)
    )
    assert len(states(model)) == 3
    model.save_pretrained(tmp_path / "whole")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert len(states(model)) == 3
    assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(
        ValueError, match=r"config.block_sparse got the layers \['0'\] for LlavaConfig"
    ):
        model.config.block_sparse = {0: Dense()}


def test_an_encoder_and_decoder(tmp_path):
    model = bart()
    batch = make_batch(30)
    batch["decoder_input_ids"] = make_batch(20, padded=False)["input_ids"]
    names = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]
    patch_model(model, {name: SlidingWindow(4) for name in names})
    expected = model(**batch).logits
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation)
        model = type(model).from_pretrained(tmp_path / generation)
        assert torch.equal(model(**batch).logits, expected)
        assert [state.layout for state in states(model)] == [
            SlidingWindow(4),
            SlidingWindow(4),
            None,
        ]


def save_with_section(path, section):
    make_model("llama").save_pretrained(path)
    saved = json.loads((path / "config.json").read_text())
    saved["block_sparse"] = section
    saved["attn_implementation"] = "block_sparse"
    (path / "config.json").write_text(json.dumps(saved))


STORED = SlidingWindow(3).to_dict()


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        (
            {"version": 0, "layouts": {"*": STORED}},
            ValueError,
            "version got 0; it must be a positive",
        ),
        ({"layouts": {"*": STORED}}, ValueError, "version got None"),
        ({"version": 1}, ValueError, "layouts got None; it must be a dict of at least one layer"),
        ({"version": 1, "layouts": {}}, ValueError, "layouts got {}"),
        (
            {"version": 1, "layouts": {"*": 7}},
            TypeError,
            "layouts got 7; every value must be a stored",
        ),
        (
            {"version": 1, "layouts": {"*": {"kind": "windw"}}},
            ValueError,
            "layout got kind 'windw'",
        ),
        (
            {"version": 1, "layouts": {"*": STORED | {"version": 9}}},
            ValueError,
            "layout got version 9",
        ),
        (
            {"version": 1, "layouts": {"*": STORED | {"stride": 2}}},
            ValueError,
            r"layout got the keys \['stride'\] for kind 'sliding_window'",
        ),
        ({"version": 1, "layouts": {"*": STORED, "0": STORED}}, ValueError, "stands alone"),
        (["*"], TypeError, "layout got list; it must be a layout"),
    ],
)
def test_wrong_sections_are_refused(section, error, message, tmp_path):
    save_with_section(tmp_path, section)
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


NEWER = {"version": 2, "library_version": "9.9.1", "min_library_version": "0.1.0"}


def test_unknown_keys_of_a_newer_release_warn(tmp_path):
    section = NEWER | {"layouts": {"*": STORED}, "notes": {"*": 1}}
    save_with_section(tmp_path, section)
    with pytest.warns(UserWarning, match=r"hf-blocksparse 9.9.1 and has the keys \['notes'\]"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = patch_model(make_model("llama", "sdpa"), SlidingWindow(3))
    assert torch.equal(model(**make_batch()).logits, expected(**make_batch()).logits)
    assert model.config.block_sparse == expected.config.block_sparse
    save_with_section(tmp_path, NEWER | {"layouts": {"*": STORED}})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            NEWER | {"min_library_version": "9.9.0", "layouts": {"*": {"kind": "spiral"}}},
            "min_library_version got '9.9.0'; hf-blocksparse .* cannot compute",
        ),
        (
            {"version": 1, "min_library_version": "0.10.0", "layouts": {"*": STORED}},
            "min_library_version got '0.10.0'; .* upgrade: pip install 'hf-blocksparse>=0.10.0'",
        ),
        (NEWER | {"layouts": {"*": {"kind": "spiral"}}}, "layout got kind 'spiral'"),
        (NEWER | {"layouts": {"*": STORED | {"turns": 2}}}, r"the keys \['turns'\] for kind"),
        ({"version": 2, "layouts": {"*": STORED}}, "version 2 without min_library_version"),
        (NEWER | {"min_library_version": 3, "layouts": {"*": STORED}}, "got 3; it must be a rel"),
        (
            {"version": 1, "layouts": {"*": STORED}, "notes": {"*": 1}},
            r"unknown keys \['notes'\]; version 1 knows",
        ),
    ],
    ids=["newer", "newer minor", "kind", "field", "no minimum", "no release", "this version"],
)
def test_sections_that_cannot_be_computed_are_refused(section, message, tmp_path):
    save_with_section(tmp_path, section)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_section_needs_the_release_of_its_newest_layout(monkeypatch):
    monkeypatch.setattr(SinkWindow, "since", "0.1.7")
    mixed = {0: SlidingWindow(3), 1: PerHead((Dense(), SlidingWindow(4) | SinkWindow(1, 2)))}
    assert write_section(mixed)["min_library_version"] == "0.1.7"
    assert write_section({0: SlidingWindow(3)})["min_library_version"] == "0.1.0"
    with pytest.raises(ValueError, match="min_library_version got '0.1.7'"):
        read_section(write_section(mixed))


def test_the_version_is_the_project_s():
    with open(Path(__file__).parents[1] / "pyproject.toml", "rb") as file:
        assert tomllib.load(file)["project"]["version"] == hf_blocksparse.__version__


torch.manual_seed(2)
LARGE = TensorLayout.from_tensor((torch.rand(4, 256, 256) > 0.5) | torch.eye(256).bool(), 16)
LARGE_MASK = MaskLayout.from_tensor((torch.rand(640, 640) > 0.5) | torch.eye(640).bool())
TENSORS = "block_sparse_layouts.safetensors"


@pytest.fixture
def large_checkpoint(tmp_path):
    layout = {0: LARGE | SlidingWindow(3), 1: PerHead((LARGE_MASK, Dense(), LARGE_MASK, Dense()))}
    path = tmp_path / "large"
    patch_model(make_model("llama", "sdpa"), layout).save_pretrained(path)
    return path


def test_large_tensors_travel_beside_the_configuration(large_checkpoint, tmp_path):
    text = (large_checkpoint / "config.json").read_text()
    first = json.loads(text)["block_sparse"]["layouts"]["0"]["layouts"][0]
    second = json.loads(text)["block_sparse"]["layouts"]["1"]["layouts"]
    assert len(text) < 8_000 and second[0] == second[2]
    assert (first["shape"], first["block_size"]) == ([4, 256, 256], 16)
    with safe_open(large_checkpoint / TENSORS, framework="pt") as file:
        assert sorted(file.keys()) == sorted({first["data"]["tensor"], second[0]["data"]["tensor"]})
        bits = file.get_tensor(first["data"]["tensor"])
    assert first["data"]["file"] == TENSORS
    assert first["data"]["sha256"] == hashlib.sha256(bits.numpy().tobytes()).hexdigest()
    assert torch.equal(
        (bits[:, None] >> torch.arange(8) & 1).bool().view(4, 256, 256), LARGE.table()
    )

    batch, path = make_batch(), large_checkpoint
    for generation in ("second", "third"):
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
        layouts = [state.layout for state in states(model)]
        assert layouts == [LARGE | SlidingWindow(3), PerHead((LARGE_MASK, Dense()) * 2)]
        path = tmp_path / generation
        model.save_pretrained(path)
        assert (path / "config.json").read_text() == text
        assert (path / TENSORS).read_bytes() == (large_checkpoint / TENSORS).read_bytes()
        # In memory, and in any other file, the section is whole.
        assert "sha256" not in model.config.to_json_string()
    model.config.to_json_file(tmp_path / "whole.json")
    assert LlamaConfig.from_json_file(tmp_path / "whole.json").block_sparse == (
        model.config.block_sparse
    )
    dense = make_model("llama", "sdpa")(**batch).logits
    assert not torch.equal(model(**batch).logits, dense)
    # A later save in the same folder leaves nothing behind.
    patch_model(model, SlidingWindow(3)).save_pretrained(path)
    assert not (path / TENSORS).exists() and states(AutoModelForCausalLM.from_pretrained(path))


def test_every_way_to_load_large_tensors(large_checkpoint):
    sections = [
        AutoConfig.from_pretrained(large_checkpoint).block_sparse,
        LlamaConfig.from_pretrained(large_checkpoint / "config.json").block_sparse,
        LlamaForCausalLM.from_pretrained(large_checkpoint).config.block_sparse,
        AutoModel.from_pretrained(large_checkpoint.parent, subfolder="large").config.block_sparse,
    ]
    assert all(section == sections[0] for section in sections)
    with pytest.raises(ValueError, match="TensorLayout: data got .* stands in a file of its own"):
        LlamaConfig.from_json_file(large_checkpoint / "config.json")


def test_a_multimodal_model_writes_one_file(tmp_path):
    model = llava()
    patch_model(model, LARGE_MASK).save_pretrained(tmp_path)
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        assert len(file.keys()) == 1
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert [state.layout for state in states(loaded)] == [LARGE_MASK] * 3


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_from_the_cache_of_the_hub(large_checkpoint, tmp_path, no_network):
    """What the hub's client leaves in its cache, and then no network."""
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--someone--sparse"
    shutil.copytree(large_checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    options = dict(cache_dir=tmp_path / "cache", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained("someone/sparse", **options)
    assert states(model)[0].layout == LARGE | SlidingWindow(3)
    (repository / "snapshots" / commit / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=f"of {TENSORS}, which is missing"):
        AutoModelForCausalLM.from_pretrained("someone/sparse", **options)


@pytest.mark.parametrize("what", ["model", "config", "method"])
def test_what_is_pushed_is_complete(what, large_checkpoint, tmp_path, monkeypatch, no_network):
    pushed = {}

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            pushed[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id)
    )
    model = AutoModelForCausalLM.from_pretrained(large_checkpoint)
    if what == "method":
        model.push_to_hub("someone/sparse")
    else:
        part = model if what == "model" else model.config
        part.save_pretrained(str(tmp_path / "out"), push_to_hub=True, repo_id="someone/sparse")
    assert {"config.json", TENSORS} <= set(pushed)
    assert pushed[TENSORS] == (large_checkpoint / TENSORS).read_bytes()


def test_nothing_is_unpickled(large_checkpoint, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert states(AutoModelForCausalLM.from_pretrained(large_checkpoint, trust_remote_code=False))


def test_damaged_tensors_are_refused(large_checkpoint):
    config, file = large_checkpoint / "config.json", large_checkpoint / TENSORS
    text, content = config.read_text(), file.read_bytes()
    data = json.loads(text)["block_sparse"]["layouts"]["0"]["layouts"][0]["data"]
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}

    def refused(message):
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(large_checkpoint)
        config.write_text(text)
        file.write_bytes(content)

    changed = tensors[data["tensor"]].clone()
    changed[5] ^= 1
    save_file(tensors | {data["tensor"]: changed}, file)
    refused("with sha256 .* was saved; the file is damaged")
    save_file({"other": changed}, file)
    refused("which cannot be read .*; both files must come from one save")
    file.write_bytes(b"not tensors")
    refused("which cannot be read")
    config.write_text(text.replace(f'"{TENSORS}"', '"../elsewhere.safetensors"'))
    refused("with the name of a safetensors file beside it")
    config.write_text(text.replace('"sha256"', '"md5"'))
    refused("it must hold")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"5": STORED}, "layout names layer 5, but LlamaForCausalLM has attention layers 0..1"),
        ({"layers.9.self_attn": STORED}, "layout names module 'layers.9.self_attn', but Llama"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers, message, tmp_path):
    save_with_section(tmp_path, {"version": 1, "layouts": layers})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        model(**make_batch())


def test_the_flag_does_not_run_dense_in_silence_where_it_cannot_reach():
    config = DebertaV2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    config.block_sparse = SlidingWindow(3)
    with pytest.raises(
        NotImplementedError, match="cannot be patched as a whole: encoder.layer.0.attention"
    ):
        DebertaV2Model(config)
