"""Evaluation and fine-tuning, end to end on a tiny random model and local text, and what they are made of."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from script_inputs import byte_tokenizer, write_model, write_text

from hf_blocksparse import BigBird, PerLayer, SinkWindow, SlidingWindow, patch_model
from hf_blocksparse.run_record import from_plain, read_record

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import attention_cost  # noqa: E402
import evaluate  # noqa: E402
import evaluation_card  # noqa: E402
import plot  # noqa: E402
import pretrained  # noqa: E402
import protocol  # noqa: E402
import write_model_card  # noqa: E402
from evaluation_results import EvaluationResults, kept_gain  # noqa: E402

CPU = torch.device("cpu")
LAYOUT = "sink_window:sink=4,window=28"
SMALL = ["--context-tokens=160", "--score-tokens=32", "--bucket-tokens=64", "--cut-tokens", "40", "64"]
SMALL += ["--windows=2", "--probe-passages=1", "--probe-passage-tokens=24"]
SMALL += ["--probe-gap-tokens", "0", "96", "--needle-trials=1", "--needle-distances", "0", "16"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """Costs are measured in this process; test_scripts.py measures them in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cost, "in_fresh_process", lambda measure: measure())
        yield


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, model_folder, text_folder):
    """The record of one evaluation of two layouts."""
    cards = tmp_path_factory.mktemp("cards")
    inputs = [f"--model={model_folder}", f"--dataset={text_folder}", f"--cards={cards}"]
    costs = ["--cost-tokens", "64", "300", "--cost-attentions", "none", "sdpa", "layout"]
    layouts = ["--layouts", LAYOUT, "bigbird:block_size=16,random_blocks=1"]
    evaluate.main([*SMALL, *inputs, *costs, "--cost-repetitions=1", *layouts, "--name=two"])
    return cards / "two" / "results" / "evaluate.json"


def results_of(path):
    return from_plain(EvaluationResults, read_record(path).results)


def test_evaluation_measures_every_attention_on_the_same_tokens(evaluation, model_folder):
    results = results_of(evaluation)
    assert [(a.name, a.role) for a in results.attentions][:2] == [
        ("dense", "dense"),
        (LAYOUT, "layout"),
    ]
    assert [a.role for a in results.attentions] == ["dense", *["layout"] * 2, *["same budget"] * 2]
    assert results.attentions[1].facts.layout == SinkWindow(4, 28).to_dict()
    for layout, window in zip(results.attentions[1:3], results.attentions[3:], strict=True):
        assert window.name == f"sliding_window:window={layout.facts.window_tokens}"
        assert layout.density <= window.density < layout.density + 0.02
    assert [(row.attention, row.read_tokens) for row in results.qualities] == [
        ("dense", 160),
        ("dense", 40),
        ("dense", 64),
        *((a.name, 160) for a in results.attentions[1:]),
    ]
    assert {row.perplexity.buckets[-1].num_tokens for row in results.qualities} == {64}
    assert results.qualities[0].difference is None
    assert all(row.difference for row in results.qualities[1:])
    for row in results.qualities:
        whole = row.read_tokens == 160
        assert [probe.gap_tokens for probe in row.repeats] == ([0, 96] if whole else [])
        assert (row.needle is not None) == whole
        if whole:
            spans = [(b.first_position, b.end_position) for b in row.perplexity.buckets]
            assert spans == [(1, 64), (64, 128), (128, 160)]
            assert [d.distance_tokens for d in row.needle.distances] == [0, 16]
    assert [(cost.tokens, cost.row.attention) for cost in results.costs] == [
        (tokens, name)
        for tokens in (64, 300)
        for name in ("none", "sdpa", *(a.name for a in results.attentions[1:3]))
    ]
    assert all(cost.row.cost.median_seconds > 0 for cost in results.costs)
    # Nothing of this machine's folders is published.
    assert str(model_folder.parent) not in evaluation.read_text()


def test_evaluation_card_and_figures_are_made_from_the_record_alone(evaluation, tmp_path, capsys):
    copy = tmp_path / "card" / "results" / "evaluate.json"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(evaluation.read_bytes())
    write_model_card.main([str(copy)])
    content = (tmp_path / "card" / "README.md").read_text()
    assert content == (evaluation.parent.parent / "README.md").read_text()
    capsys.readouterr()
    plot.main([str(copy)])
    figures = [Path(line) for line in capsys.readouterr().out.split()]
    names = ["layout", "perplexity_by_position", "frontier", "cost_by_length"]
    assert [figure.stem for figure in figures] == names
    for figure in figures:
        assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 5000
        assert f"figures/{figure.name}" in content
    results = results_of(copy)
    card = ModelCard(content, ignore_metadata_errors=False)
    assert [e.metric_value for e in card.data.eval_results] == [
        pytest.approx(row.perplexity.perplexity, abs=1e-4) for row in results.qualities[3:5]
    ]
    for table in (
        evaluation_card.quality_table(results),
        evaluation_card.position_table(results),
        evaluation_card.probe_table(results),
        evaluation_card.cost_table(results),
    ):
        assert table in content
    assert "Nothing was trained" in content


def test_a_sparse_checkpoint_is_measured_with_its_own_layout(model_folder, text_folder, tmp_path):
    model = pretrained.load_model(str(model_folder), CPU)
    patch_model(model, {1: SlidingWindow(24)})
    model.save_pretrained(tmp_path / "sparse")
    byte_tokenizer().save_pretrained(tmp_path / "sparse")
    only = ["--probe-passages=0", "--needle-trials=0", "--cost-repetitions=0"]
    inputs = [f"--model={tmp_path / 'sparse'}", f"--dataset={text_folder}", f"--cards={tmp_path}"]
    evaluate.main([*SMALL, *only, *inputs])
    results = results_of(tmp_path / "sparse" / "results" / "evaluate.json")
    facts = results.attentions[1].facts
    assert facts.layout == PerLayer({1: SlidingWindow(24)}).to_dict()
    assert results.costs == () and results.qualities[0].needle is None
    dense, sparse = results.row("given", "dense"), results.row("given", "per_layer")
    assert dense.perplexity.window_nll_nats != sparse.perplexity.window_nll_nats
    with pytest.raises(ValueError, match="layouts got nothing, and tiny has no layout of its own"):
        evaluate.main([*SMALL, f"--model={model_folder}", f"--dataset={text_folder}"])


def test_kept_gain_is_the_share_of_what_dense_gains_from_its_context(evaluation):
    results = results_of(evaluation)

    def losses(**nats):
        rows = []
        for row in results.qualities:
            wanted = nats.get(f"dense_{row.read_tokens}" if row.attention == "dense" else "layout")
            last = replace(row.perplexity.buckets[-1], nll_nats=wanted)
            rows.append(replace(row, perplexity=replace(row.perplexity, buckets=(last,))))
        return replace(results, qualities=tuple(rows))

    made = losses(dense_160=2.0, dense_40=3.0, dense_64=2.5, layout=2.1)
    row = made.row("given", LAYOUT)
    assert kept_gain(made, row, 64) == pytest.approx(0.8)
    assert kept_gain(made, row, 40) == pytest.approx(0.9)
    assert kept_gain(made, row, 41) is None
    useless = losses(dense_160=2.0, dense_40=2.0, dense_64=1.9, layout=2.1)
    assert kept_gain(useless, useless.row("given", LAYOUT), 40) is None
    assert "80%" in evaluation_card.quality_table(made)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("sink_window:sink=64,window=960", SinkWindow(64, 960)),
        ("bigbird: block_size=32, seed=3", BigBird(block_size=32, seed=3)),
        ("bigbird", BigBird()),
        ('{"kind": "sliding_window", "window": 7}', SlidingWindow(7)),
        ({"kind": "sliding_window", "window": 7}, SlidingWindow(7)),
    ],
)
def test_layouts_are_read_from_a_command_line(text, layout):
    assert protocol.read_layout(text) == layout
    assert protocol.read_layout(protocol.layout_name(layout)) == layout


def test_layouts_are_read_from_files(tmp_path):
    layout = PerLayer({0: SlidingWindow(5), 1: SinkWindow(1, 2)})
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(layout.to_dict()))
    assert protocol.read_layout(str(path)) == layout
    with pytest.raises(ValueError, match="layout got .*other.json', which is no file"):
        protocol.read_layout(str(tmp_path / "other.json"))
    for wrong in ("sink_window:sink", "sink_window:sink=a"):
        with pytest.raises(ValueError, match="which is not JSON"):
            protocol.read_layout(wrong)


def test_layouts_of_one_name_are_told_apart(model_folder):
    facts = protocol.model_facts(
        pretrained.load_model(str(model_folder), CPU),
        pretrained.ModelSource("tiny", "", None, None, ()),
    )
    first, second = PerLayer({0: SlidingWindow(5)}), PerLayer({1: SlidingWindow(9)})
    found = protocol.attentions_side_by_side([first, second, SlidingWindow(20)], facts, 64)
    assert [layout for _, layout in found.values()][1:4] == [first, second, SlidingWindow(20)]
    assert [name for name in found][1:4] == ["per_layer", "per_layer 2", "sliding_window:window=20"]
    # A plain window is its own window of the same budget.
    assert len(found) == 6


def test_without_attention_no_token_reads_another(model_folder):
    cost = attention_cost.whole_model(
        "none",
        None,
        path=str(model_folder),
        tokens=[list(range(64))],
        work=attention_cost.FORWARD_AND_BACKWARD,
        first_target=1,
        device=CPU,
        dtype=torch.float32,
        repetitions=1,
        warmup=0,
    )
    assert cost.median_seconds > 0
    model = pretrained.load_model(str(model_folder), CPU, attn_implementation="no_attention")
    tokens = torch.arange(32)[None]
    expected = model(tokens).logits
    changed = model(tokens.roll(-1, 1)).logits
    torch.testing.assert_close(changed[:, :-1], expected[:, 1:])
    expected.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_tokens": 160}, "score_tokens got 160 of 160 tokens"),
        ({"cut_tokens": [32]}, r"cut_tokens got \[32\]; each must lie between the 32 scored"),
        ({"probe_gap_tokens": [0, 200]}, r"probe_gap_tokens got \[0, 200\], which with two"),
        ({"needle_trials": 3}, "needle_trials got 3 of 2 windows"),
        ({"probe_passages": 3}, "probe_passages got 3 of 2 windows"),
        ({"windows": 0}, "windows, bucket_tokens and cost_tokens got 0"),
        ({"cost_attentions": ["fast"]}, r"cost_attentions got \['fast'\]; it must be among"),
    ],
)
def test_bad_protocols_are_refused(change, message):
    arguments = protocol.ProtocolArguments(**dict(windows=2, score_tokens=32) | change)
    with pytest.raises(ValueError, match=message):
        arguments.resolve(160)


def test_what_a_protocol_leaves_out_follows_from_the_context():
    arguments = protocol.ProtocolArguments()
    arguments.resolve(32768)
    assert (arguments.score_tokens, arguments.cut_tokens) == (1024, [1152, 2048])
    assert arguments.probe_gap_tokens == [2048, 8192, 30720]
    assert arguments.needle_distances == [0, 2048, 8192, 16384, 24576]
    assert arguments.cost_tokens == [32768]


def test_flex_attention_has_no_backward_on_a_cpu():
    arguments = protocol.ProtocolArguments(cost_attentions=["flex_attention"])
    with pytest.raises(ValueError, match="cost_attentions got flex_attention on a CPU"):
        evaluate.check_costs(arguments, CPU)
