"""scripts/convert.py writes what loads sparse and long, and refuses what cannot work before it writes anything."""

import json
import os

import convert
import pretrained
import pytest
import torch
from layout_argument import read_layout
from test_scripts import byte_tokenizer
from tiny_models import make_batch, make_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from hf_blocksparse import (
    BigBird,
    Dense,
    PerLayer,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
    extend_positions,
    patch_model,
)

WINDOW = "sliding_window:window=9"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny-llama"
    make_model("llama", "sdpa").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_layout_and_positions(source, tmp_path, capsys):
    folder = tmp_path / "new" / "long"
    limit = "--max-position-embeddings=1024"
    convert.main(
        [f"--model={source}", f"--layout={WINDOW}", limit, f"--output={folder}"]
        + ["--rope-scaling=linear"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = patch_model(make_model("llama", "sdpa"), SlidingWindow(9))
    extend_positions(expected, 1024, method="linear")
    assert torch.equal(model(**make_batch(300)).logits, expected(**make_batch(300)).logits)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 1024
    shown = capsys.readouterr().out
    assert "no tokenizer" not in shown and "LlamaForCausalLM of tiny-llama in" in shown
    assert "SlidingWindow(window=9)" in shown and "256 before, 1024 now" in shown


def test_what_is_known_of_a_model_stays_with_it(source, tmp_path):
    """Cards made from a converted model say what they would say of its source."""
    folder = tmp_path / "long"
    convert.main([f"--model={source}", "--max-position-embeddings=1024", f"--output={folder}"])
    found = pretrained.find_model(str(folder), tmp_path)
    assert (found.name, found.path) == ("tiny-llama", str(folder))
    assert found.base_model is None and found.licence is None
    (note,) = found.notes
    assert note.startswith("Positions were extended from 256 to 1,024 (default method)")
    again = tmp_path / "again"
    convert.main([f"--model={folder}", f"--layout={WINDOW}", f"--output={again}"])
    found = pretrained.find_model(str(again), tmp_path, base_model="o/m", licence="mit")
    assert (found.base_model, found.licence, found.notes) == ("o/m", "mit", (note,))
    assert str(tmp_path) not in (again / pretrained.SOURCE_FILE).read_text()


def test_an_encoder_keeps_its_head_and_needs_no_tokenizer(tmp_path, capsys):
    make_model("bert", "sdpa").save_pretrained(tmp_path / "bert")
    options = ["--max-position-embeddings=512", f"--output={tmp_path / 'long'}"]
    convert.main([f"--model={tmp_path / 'bert'}", *options])
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "long")
    assert model.config.block_sparse is None
    expected = extend_positions(make_model("bert", "sdpa"), 512)
    assert torch.equal(model(**make_batch(300)).logits, expected(**make_batch(300)).logits)
    assert "no tokenizer: there was none" in capsys.readouterr().out


@pytest.mark.parametrize("choice", [["--layers", "1"], ["--dense-every=2"]])
def test_some_layers(choice, source, tmp_path):
    convert.main([f"--model={source}", f"--layout={WINDOW}", f"--output={tmp_path / 'a'}", *choice])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    layer = "1" if "1" in choice else "0"
    assert config["block_sparse"]["layouts"] == {layer: SlidingWindow(9).to_dict()}


def test_a_sparse_checkpoint_gets_the_new_layout(source, tmp_path):
    for name, layout in (("first", WINDOW), ("second", "sink_window:sink=2,window=7")):
        before = source if name == "first" else tmp_path / "first"
        convert.main([f"--model={before}", f"--layout={layout}", f"--output={tmp_path / name}"])
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["block_sparse"]["layouts"] == {"*": SinkWindow(2, 7).to_dict()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "layout, max_position_embeddings got none; there is nothing"),
        (["--rope-scaling=yarn", f"--layout={WINDOW}"], "rope_scaling got 'yarn' without"),
        (["--dense-every=2", "--max-position-embeddings=512"], "dense_every got None, 2 without"),
        ([f"--layout={WINDOW}", "--layers=full"], "layers got 'full', but LlamaForCausalLM has no"),
        ([f"--layout={WINDOW}", "--layers", "0", "5"], "layers got 5, but LlamaForCausalLM has"),
        (["--layout=windw"], "layout got the name 'windw'"),
        (["--layout={window"], "which is not JSON"),
        (["--layout=missing.json"], "'missing.json', which is not a file"),
        (["--layout=sliding_window:width=9"], r"the keys \['width'\] for kind 'sliding_window'"),
        (['--layout={"layouts": {"9": {"kind": "dense"}}, "version": 1}'], "layout names layer 9"),
        (["--max-position-embeddings=64"], "got 64 for LlamaForCausalLM with 256"),
        (["--max-position-embeddings=512", "--rope-scaling=tile"], "which has rotary embeddings"),
    ],
)
def test_refused_before_anything_is_written(arguments, message, source, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert.main([f"--model={source}", f"--output={tmp_path / 'out'}", *arguments])
    assert not (tmp_path / "out").exists()


def test_layouts_that_do_not_fit_are_refused_before_the_model_is_loaded(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    for tensor, message in (
        (torch.ones(3, 16, 16), "layout got 3 heads in TensorLayout"),
        (torch.ones(8, 8), "reach 128 query and 128 key positions; this call has 256 and 256"),
    ):
        (tmp_path / "layout.json").write_text(
            json.dumps(TensorLayout.from_tensor(tensor, 16).to_dict())
        )
        with pytest.raises(ValueError, match=message):
            convert.main(
                [f"--model={source}", f"--layout={tmp_path / 'layout.json'}"]
                + [f"--output={tmp_path / 'out'}"]
            )
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_written(source, tmp_path, monkeypatch):
    def refused(folder):
        with pytest.raises(ValueError) as caught:
            convert.main([f"--model={source}", f"--layout={WINDOW}", f"--output={folder}"])
        return str(caught.value)

    (tmp_path / "file").write_text("")
    assert "which is a file" in refused(tmp_path / "file")
    assert "which is not empty; nothing is overwritten" in refused(tmp_path)
    assert f"but {tmp_path / 'file'} cannot be written" in refused(tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"but {tmp_path} cannot be written" in refused(tmp_path / "locked")
    monkeypatch.undo()
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    assert "0 MiB left; the weights need" in refused(tmp_path / "full")


def test_layouts_of_the_command_line(tmp_path):
    mixed = PerLayer({0: Dense(), 1: SinkWindow(4, 28)})
    for text, layout in (
        ("bigbird", BigBird()),
        ("sink_window:sink=4, window=28", SinkWindow(4, 28)),
        (json.dumps(mixed.to_dict()), mixed),
        ('{"version": 1, "layouts": {"*": {"kind": "dense"}}}', Dense()),
    ):
        assert read_layout(text) == layout
    section = patch_model(make_model("llama"), {1: SlidingWindow(5)}).config.block_sparse
    (tmp_path / "section.json").write_text(json.dumps(section))
    assert read_layout(str(tmp_path / "section.json")) == PerLayer({1: SlidingWindow(5)})
    # JSON sorts the numbers of layers as text, 0, 1, 10, 2, where a model is saved: the layout is the same.
    many = PerLayer({layer: SlidingWindow(3 + layer) for layer in range(12) if layer != 5})
    section = {"version": 1, "layouts": {str(key): value.to_dict() for key, value in many.layers}}
    assert read_layout(json.dumps(section, sort_keys=True)) == many
    with pytest.raises(TypeError, match=r"layout got \[1\]; a stored layout must be a dict"):
        (tmp_path / "list.json").write_text("[1]")
        read_layout(str(tmp_path / "list.json"))
