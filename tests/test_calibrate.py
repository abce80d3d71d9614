"""Heads that keep full attention: their shares, their choice, and the layout and record that come of it."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from script_inputs import byte_tokenizer, write_model, write_text
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hf_blocksparse import Dense, PerHead, PerLayer, SinkWindow, patch_model
from hf_blocksparse.evaluation import next_token_losses
from hf_blocksparse.run_record import from_plain, read_record

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import calibrate  # noqa: E402
import protocol  # noqa: E402
from layout_argument import read_layout  # noqa: E402

NARROW = SinkWindow(2, 6)


def loud_model(seed=0):
    """Weights so large that full and narrow attention differ."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3))


def judge(model, windows, **options):
    options = dict(kind="text", first_target=40, kv_heads=2, dtype=torch.float32) | options
    return calibrate.judge_heads(model, NARROW, windows, **options)


def test_shares_add_up_and_ends_are_the_models():
    model, windows = loud_model(5), torch.randint(0, 256, (2, 160))
    judged = judge(model, windows, path_points=48)
    with torch.no_grad():
        full = next_token_losses(model, windows, first_target=40).mean().item()
        patch_model(model, NARROW)
        narrow = next_token_losses(model, windows, first_target=40).mean().item()
    assert judged.full_nll_nats == pytest.approx(full, abs=1e-4)
    assert judged.narrow_nll_nats == pytest.approx(narrow, abs=1e-4)
    assert narrow > full
    # The integral of the gradient along the way is the difference of its ends.
    assert math.fsum(sum(judged.shares, ())) == pytest.approx(1, abs=0.1)


def test_a_head_that_full_attention_does_not_change_has_no_share():
    model, windows = loud_model(5), torch.randint(0, 256, (2, 160))
    with torch.no_grad():
        # Its queries read all keys alike, and all values are equal.
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight[16:] = 0
    shares = judge(model, windows, path_points=2).shares
    assert shares[1][1] == 0
    assert min(abs(shares[0][0]), abs(shares[0][1]), abs(shares[1][0])) > 1e-3


def test_attention_is_the_models_own_again_afterwards():
    model, windows = loud_model(), torch.randint(0, 256, (1, 64))
    before = model.config._attn_implementation
    gates = torch.zeros(2, 2)
    with calibrate.gated_attention(model, NARROW, gates):
        assert model.config._attn_implementation == calibrate.GATED
        narrow = model(windows).logits
        gates.fill_(1)
        full = model(windows).logits
    assert model.config._attn_implementation == before
    torch.testing.assert_close(model(windows).logits, full, atol=1e-3, rtol=1e-3)
    assert (narrow - full).abs().max() > 0.1


def test_what_is_more_than_plain_causal_attention_is_refused():
    config = dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=16)
    model = MistralForCausalLM(MistralConfig(**config, **heads))
    with pytest.raises(NotImplementedError, match="model got sliding_window=16 in its attention"):
        judge(model, torch.randint(0, 256, (1, 64)), path_points=1)


def shares_of(text, copies, *, loses=1.0):
    return [
        calibrate.HeadShares("text", 1.0, 2.0, text),
        calibrate.HeadShares("copies", 1.0, 1.0 + loses, copies),
    ]


def test_both_kinds_of_text_rank_heads_where_they_gain():
    text, copies = ((0.5, 0.1), (0.3, 0.1)), ((0.0, 0.9), (0.1, 0.0))
    assert calibrate.rank_heads(shares_of(text, copies)) == [(0, 1), (0, 0), (1, 0), (1, 1)]
    without_copies = calibrate.rank_heads(shares_of(text, copies, loses=-0.1))
    assert without_copies == [(0, 0), (1, 0), (0, 1), (1, 1)]
    with pytest.raises(ValueError, match="narrow got a layout that loses nothing"):
        calibrate.rank_heads(shares_of(text, copies, loses=0)[1:])


def test_the_layout_has_the_density_asked_for():
    narrow = SinkWindow(4, 28)
    density = narrow.density(256, is_causal=True, num_heads=4)
    count = calibrate.count_full(0.62, density, 6)
    full = [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (0, 0)][:count]
    assert count == 3
    layout = calibrate.layout_with_full_heads(narrow, full, num_layers=3, kv_heads=2, query_heads=4)
    assert layout == PerLayer({0: PerHead((narrow, narrow, Dense(), Dense())), 2: narrow})
    facts = protocol.describe_layout(layout, 3, 4, 256)
    assert facts.density == pytest.approx(0.5 + 0.5 * density, abs=1e-6)
    assert facts.density <= 0.62
    assert facts.description == (
        "SinkWindow(sink=4, window=28) in 6 of 12 heads, Dense() in 6 of 12 heads"
    )
    for wrong in (density, 1.0):
        with pytest.raises(ValueError, match="density got .* must lie between"):
            calibrate.count_full(wrong, density, 6)


def test_a_layout_file_and_its_record(tmp_path):
    folder, texts = tmp_path / "model", write_text(tmp_path / "texts")
    loud_model(0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    output = tmp_path / "new" / "heads.json"
    arguments = [f"--model={folder}", f"--dataset={texts}", "--context_tokens=160"]
    arguments += [f"--narrow={json.dumps(NARROW.to_dict())}", "--density=0.6", "--windows=2"]
    arguments += ["--path_points=2", "--copy_tokens=20", "--gap_tokens=30", f"--output={output}"]
    calibrate.main(arguments)
    layout = read_layout(str(output))
    model = patch_model(AutoModelForCausalLM.from_pretrained(folder), layout)
    assert model(torch.randint(0, 256, (1, 100))).logits.isfinite().all()
    record = output.with_suffix(".record.json")
    results = from_plain(calibrate.CalibrationResults, read_record(record).results)
    assert results.layout == layout.to_dict()
    assert results.density == pytest.approx(
        protocol.describe_layout(layout, 2, 4, 160).density, abs=1e-6
    )
    assert [each.kind for each in results.judged_by] == ["text", "copies"]
    assert str(tmp_path) not in record.read_text()
    with pytest.raises(ValueError, match="output got .*; it must be a new file"):
        calibrate.main(arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--output=heads.txt"], "output got heads.txt; it must be a new file that ends in .json"),
        (["--windows=1"], "windows and path_points got 1 and 4"),
        (["--gap_tokens=200"], "copy_tokens and gap_tokens got 5 and 200"),
        (["--narrow=windw"], "layout got the name 'windw'"),
        (["--context_tokens=512"], "context_tokens got 512, but tiny has 256 positions"),
        (["--output=/proc/heads.json"], "output got /proc, but /proc is not a folder that can be"),
        (["--density=0.1"], "density got 0.1; it must lie between"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, changed, message):
    model, texts = write_model(tmp_path / "tiny"), write_text(tmp_path / "texts")
    arguments = [f"--model={model}", f"--dataset={texts}", "--context_tokens=160"]
    arguments += ["--narrow=sink_window:sink=4,window=28", f"--output={tmp_path / 'heads.json'}"]
    with pytest.raises(ValueError, match=message):
        calibrate.main([*arguments, *changed])
