"""Evaluation and fine-tuning, end to end on a tiny random model and local text, and what they are made of."""

import copy
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from script_inputs import byte_tokenizer, write_model, write_text
from tiny_models import FAMILIES, make_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
)

from hf_blocksparse import (
    BigBird,
    Dense,
    PerHead,
    PerLayer,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
    patch_model,
    unpatch_model,
)
from hf_blocksparse.run_record import from_plain, read_record, write_record

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import attention_cost  # noqa: E402
import calibrate  # noqa: E402
import corpus  # noqa: E402
import evaluate  # noqa: E402
import evaluation_card  # noqa: E402
import evaluation_figures  # noqa: E402
import finetune  # noqa: E402
import finetune_encoder  # noqa: E402
import layout_argument  # noqa: E402
import measure_costs  # noqa: E402
import plot  # noqa: E402
import pretrained  # noqa: E402
import protocol  # noqa: E402
import write_model_card  # noqa: E402
from chunked_loss import use_chunked_loss  # noqa: E402
from evaluation_results import EvaluationResults, kept_gain  # noqa: E402

CPU = torch.device("cpu")
SHARDED_LOSS = Path(__file__).with_name("sharded_loss.py")
LAYOUT = "sink_window:sink=4,window=28"
SMALL = [
    "--context-tokens=160",
    "--score-tokens=32",
    "--bucket-tokens=64",
    "--cut-tokens",
    "40",
    "64",
]
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


def test_figures_may_be_left_to_plot(evaluation, tmp_path, capsys):
    record = read_record(evaluation)
    card = evaluate.publish(
        results_of(evaluation),
        script=record.script,
        arguments=record.arguments,
        seed=record.seed,
        environment=record.environment,
        phases=protocol.Phases(quiet=True),
        cards=tmp_path,
        figures=False,
    )
    assert card == tmp_path / "two" / "README.md" and card.exists()
    assert not (tmp_path / "two" / "figures").exists()
    assert (
        "no figures, not wanted; from the record: python scripts/plot.py" in capsys.readouterr().out
    )


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


def test_the_frontier_is_drawn_at_the_longest_length_alone(evaluation):
    results = results_of(evaluation)
    seconds = evaluation_figures.seconds_at_longest(results)
    at_300 = {c.row.attention: c.row.cost.median_seconds for c in results.costs if c.tokens == 300}
    assert seconds == at_300 | {"dense": at_300["sdpa"]}
    without_memory = replace(results.costs[-1].row, cost=None, failure="out of GPU memory")
    results = replace(
        results, costs=(*results.costs[:-1], replace(results.costs[-1], row=without_memory))
    )
    assert without_memory.attention not in evaluation_figures.seconds_at_longest(results)
    assert "out of GPU memory" in evaluation_card.cost_table(results)


def test_a_card_tells_the_spread_of_times_and_where_the_cpu_decides(evaluation):
    results = results_of(evaluation)

    def timed(seconds):
        """The results with these seconds at 64 and 300 tokens."""
        costs = tuple(
            replace(cost, row=replace(cost.row, cost=replace(cost.row.cost, seconds=calls)))
            for cost in results.costs
            for calls in [seconds[cost.tokens].get(cost.row.attention, (9.0,))]
        )
        return replace(results, costs=costs)

    record = read_record(evaluation)
    seconds = {64: {"none": (0.2, 0.4, 0.3), "sdpa": (0.29,)}, 300: {"none": (0.2,), "sdpa": (1,)}}
    table = evaluation_card.cost_table(timed(seconds))
    first = next(line for line in table.splitlines() if line.startswith("| 64"))
    assert [cell.strip() for cell in first.split("|")][1:5] == [
        "64", "none", "300 ms", "200 ms to 400 ms",
    ]  # fmt: skip
    assert "one call" in table
    explained = evaluation_card._explain_costs(record, timed(seconds))
    assert "At 64 tokens the model without attention took no less time" in explained
    seconds[64]["none"] = (0.1,)
    assert "the CPU" not in evaluation_card._explain_costs(record, timed(seconds))


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
    assert layout_argument.read_layout(text) == layout
    assert layout_argument.read_layout(protocol.layout_name(layout)) == layout


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


def test_costs_are_on_record_as_soon_as_they_are_measured(evaluation, monkeypatch):
    """A run that is ended while a cost is measured keeps those before it."""
    costs = results_of(evaluation).costs
    published = []

    def measured(*arguments, **options):
        yield costs[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(protocol, "measure_costs", measured)
    with pytest.raises(KeyboardInterrupt):
        protocol.publish_around_costs(
            lambda costs, *, with_card: published.append((tuple(costs), with_card)),
            protocol.Phases(quiet=True),
            protocol.ProtocolArguments(),
            "",
            {},
            None,
            device=CPU,
            dtype=torch.float32,
        )
    assert published == [((), True), (costs[:1], False)]


def test_costs_are_added_to_a_record(evaluation, model_folder, tmp_path):
    """Others stay, the same is replaced, and the card shows them all."""
    record = tmp_path / "two" / "results" / "evaluate.json"
    record.parent.mkdir(parents=True)
    record.write_bytes(evaluation.read_bytes())
    words = [str(record), f"--model={model_folder}", "--cost_repetitions=1", "--figures=False"]
    measure_costs.main([*words, "--cost_tokens", "64", "96", "--cost_attentions", "layout"])
    before, after = results_of(evaluation), results_of(record)

    def measured(results):
        return {(cost.tokens, cost.row.attention): cost.row.cost for cost in results.costs}

    old, new = measured(before), measured(after)
    layouts = {facts.name for facts in before.attentions if facts.role == "layout"}
    assert len(layouts) == 2
    assert new.keys() - old.keys() == {(96, name) for name in layouts}
    assert {key for key in old if new[key] != old[key]} == {(64, name) for name in layouts}
    assert [cost.tokens for cost in after.costs] == sorted(cost.tokens for cost in after.costs)
    assert replace(after, costs=before.costs) == before
    assert re.search(r"\| 96 +\|", (tmp_path / "two" / "README.md").read_text())
    (call,) = read_record(record).arguments["measured_costs"]
    assert call["cost_tokens"] == [64, 96] and call["dtype"] == "float32"
    assert {tuple(row) for row in call["measured"]} == {
        (tokens, name) for tokens in (64, 96) for name in layouts
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cost_weights=bfloat16"], "cost_weights got bfloat16, but the costs on the record are of float32"),
        (["--cost_attentions=fast"], r"cost_attentions got \['fast'\]"),
        (["--cost_repetitions=0"], "cost_repetitions got 0"),
    ],
)  # fmt: skip
def test_costs_that_do_not_fit_a_record_are_refused(evaluation, model_folder, words, message):
    before = evaluation.read_bytes()
    with pytest.raises(ValueError, match=message):
        measure_costs.main([str(evaluation), f"--model={model_folder}", *words])
    assert evaluation.read_bytes() == before


def test_costs_of_another_machine_or_model_are_refused(
    evaluation, model_folder, tmp_path, monkeypatch
):
    here = measure_costs.describe_environment(CPU)
    with monkeypatch.context() as patch:
        elsewhere = replace(here, device="NVIDIA H200")
        patch.setattr(measure_costs, "describe_environment", lambda device: elsewhere)
        with pytest.raises(ValueError, match="record got results from device cpu"):
            measure_costs.main([str(evaluation), f"--model={model_folder}"])
    bloom = tmp_path / "bloom"
    BloomForCausalLM(SMALL_BLOOM).save_pretrained(bloom)
    with pytest.raises(ValueError, match=r"cost_attentions got \['sdpa'\] for a BloomForCausalLM"):
        measure_costs.main([str(evaluation), f"--model={bloom}"])
    other = tmp_path / "other"
    write_model(other, num_hidden_layers=1)
    with pytest.raises(
        ValueError, match="model got one with 1 layers of 4 heads; the record is of"
    ):
        measure_costs.main([str(evaluation), f"--model={other}"])


def test_costs_are_those_of_the_weights_asked_for(model_folder, monkeypatch):
    seen = []

    def cost_of(function, **options):
        function()
        model = function.__closure__[function.__code__.co_freevars.index("model")].cell_contents
        seen.append({parameter.dtype for parameter in model.parameters()})
        return "measured"

    monkeypatch.setattr(attention_cost, "measure_cost", cost_of)
    for weights in (torch.float32, torch.bfloat16):
        attention_cost.whole_model(
            "sdpa",
            None,
            path=str(model_folder),
            tokens=[list(range(64))],
            work=attention_cost.FORWARD_AND_BACKWARD,
            first_target=1,
            device=CPU,
            dtype=torch.bfloat16,
            repetitions=1,
            warmup=0,
            weights=weights,
        )
    assert seen == [{torch.float32}, {torch.bfloat16}]


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
        ({"windows": 0}, "windows and bucket_tokens got 0"),
        ({"probe_passage_tokens": 1}, "probe_passage_tokens got 1; it must be at least 2"),
        ({"cost_repetitions": -1}, "cost_repetitions got -1; it must be 0"),
        ({"cost_tokens": [1]}, r"cost_tokens got \[1\]; each must be at least 2"),
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


STEPS = ["--max_steps=4", "--save_steps=2", "--warmup_steps=0", "--disable_tqdm=True"]
TRAINING = [*STEPS, "--learning_rate=1e-2", "--use_cpu", f"--layout={LAYOUT}"]
UNMEASURED = ["--measure=False"]


@pytest.fixture(scope="module")
def inputs(model_folder, text_folder):
    return [*SMALL, *TRAINING, f"--model={model_folder}", f"--dataset={text_folder}"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, inputs):
    """A whole run, with dense and window trained alike."""
    folder = tmp_path_factory.mktemp("tuned")
    places = [f"--output_dir={folder / 'run'}", f"--cards={folder / 'cards'}"]
    costs = ["--cost_repetitions=1", "--cost_tokens", "160"]
    finetune.main([*inputs, *places, *costs, "--compare", "dense", "window"])
    return folder


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def losses(folder):
    return json.loads((folder / "training.json").read_text())["losses_nats"]


def test_fine_tuning_measures_every_row_before_and_after(tuned):
    record = read_record(tuned / "cards" / "run" / "results" / "finetune.json")
    results = from_plain(EvaluationResults, record.results)
    dense, layout, window = (a.name for a in results.attentions)
    assert [(row.weights, row.attention, row.read_tokens) for row in results.qualities] == [
        ("pretrained", dense, 160),
        ("pretrained", dense, 40),
        ("pretrained", dense, 64),
        ("pretrained", layout, 160),
        ("pretrained", window, 160),
        (dense, dense, 160),
        (dense, dense, 40),
        (dense, dense, 64),
        (window, window, 160),
        (layout, layout, 160),
        (layout, dense, 160),
    ]
    assert len({row.perplexity.buckets[-1].num_tokens for row in results.qualities}) == 1
    nll = {
        (row.weights, row.attention): row.perplexity.buckets[-1].nll_nats
        for row in results.qualities
        if row.read_tokens == 160
    }
    for name in (dense, layout, window):
        assert nll[name, name] < nll["pretrained", name] - 1
    trained = results.row(layout, layout)
    assert trained.difference.mean_nats == pytest.approx(nll[layout, layout] - nll[dense, dense])
    assert trained.needle is not None and len(trained.repeats) == 2
    assert [run.attention for run in results.trainings] == [dense, window, layout]
    for run in results.trainings:
        assert run.logged_steps == (1, 2, 3, 4) and run.tokens_per_step == 160
        assert run.losses_nats[-1] < run.losses_nats[0]
        assert min(run.tokens_per_second) > 0 and min(run.peak_bytes) > 0
        assert run.trained_parameters == run.all_parameters and run.resumed_at == ()
    assert not set(results.text.held_out_documents) & set(results.text.training_documents)
    assert record.arguments["optim"] and record.arguments["layout"] == SinkWindow(4, 28).to_dict()
    assert [cost.row.attention for cost in results.costs] == ["sdpa", layout]
    assert str(tuned) not in (tuned / "cards" / "run" / "results" / "finetune.json").read_text()


def test_fine_tuned_model_is_sparse_by_itself_and_trained(tuned, model_folder):
    model = AutoModelForCausalLM.from_pretrained(tuned / "run" / "layout" / "model")
    assert evaluate.own_layout(model) == SinkWindow(4, 28)
    assert model.config.use_cache
    tokens = torch.arange(128)[None]
    with torch.no_grad():
        sparse = model(tokens).logits
        dense = unpatch_model(model)(tokens).logits
    torch.testing.assert_close(sparse[:, :32], dense[:, :32], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse[:, 40:], dense[:, 40:], rtol=1e-4, atol=1e-5)
    compared = AutoModelForCausalLM.from_pretrained(tuned / "run" / "dense" / "model")
    assert evaluate.own_layout(compared) is None
    window = AutoModelForCausalLM.from_pretrained(tuned / "run" / "window" / "model")
    assert isinstance(evaluate.own_layout(window), SlidingWindow)
    assert AutoTokenizer.from_pretrained(tuned / "run" / "layout" / "model")("ab").input_ids


def test_fine_tuning_card_is_made_from_the_record_alone_and_the_hub_can_read_it(tuned, tmp_path):
    record = tuned / "cards" / "run" / "results" / "finetune.json"
    copy = tmp_path / "run" / "results" / "finetune.json"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(record.read_bytes())
    content = write_model_card.write_model_card(copy).read_text()
    assert content == (record.parent.parent / "README.md").read_text()
    results = results_of(copy)
    card = ModelCard(content, ignore_metadata_errors=False)
    (evaluation,) = card.data.eval_results
    layout = results.attentions[1].name
    trained = results.row(layout, layout)
    assert evaluation.metric_value == pytest.approx(trained.perplexity.perplexity, abs=1e-4)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert evaluation_card.training_table(results) in content
    figures = plot.draw_figures(copy)
    assert [figure.stem for figure in figures][-1] == "training"
    assert all(f"figures/{figure.name}" in content for figure in figures)
    for figure in figures:
        assert figure.stat().st_size > 5000


class Stop(Exception):
    pass


def test_an_interrupted_run_resumes_to_the_same_weights_bit_for_bit(
    tuned, inputs, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    arguments = [*inputs, f"--output_dir={out}", *UNMEASURED]
    plain_log = finetune.FinetuneTrainer.log

    def stop_at_3(self, logs, *args, **options):
        if self.state.global_step == 3 and "loss" in logs:
            raise Stop
        plain_log(self, logs, *args, **options)

    monkeypatch.setattr(finetune.FinetuneTrainer, "log", stop_at_3)
    with pytest.raises(Stop):
        finetune.main(arguments)
    assert not (out / "layout" / "training.json").exists()
    monkeypatch.setattr(finetune.FinetuneTrainer, "log", plain_log)
    # A checkpoint whose writing was cut short, too.
    (out / "layout" / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="output_dir got .*, which is not empty; .* --resume"):
        finetune.main(arguments)
    finetune.main([*arguments, "--resume"])
    whole = tuned / "run" / "layout"
    assert losses(out / "layout") == losses(whole)
    assert weights(out / "layout") == weights(whole)
    run = json.loads((out / "layout" / "training.json").read_text())
    assert (run["logged_steps"], run["resumed_at"]) == ([1, 2, 3, 4], [2])

    # What is finished is not trained again.
    monkeypatch.setattr(finetune.FinetuneTrainer, "train", None)
    finetune.main([*arguments, "--resume"])
    for change, message in (
        (f"--layout={LAYOUT[:-1]}4", "resume got .* with layout {.*'window': 24} .*there: .*28"),
        ("--learning_rate=2e-2", r"resume got .* with learning_rate 0.02 \(there: 0.01\); its"),
        ("--lora_rank=2", r"resume got .* with lora_rank 2 \(there: 0\); its checkpoints"),
        ("--seed=1", r"resume got .* with seed 1 \(there: 42\); training_sha256"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune.main([*arguments, "--resume", change])
    with pytest.raises(ValueError, match="resume got .*other, which holds no run.json"):
        finetune.main([*inputs, f"--output_dir={tmp_path / 'other'}", "--resume"])


@pytest.mark.parametrize(("also", "tied"), [(False, False), (True, True), (True, False)])
def test_lora_is_merged_into_what_is_saved(inputs, tmp_path, also, tied):
    source = write_model(tmp_path / "source", tie_word_embeddings=tied)
    arguments = [*inputs, f"--model={source}", f"--output_dir={tmp_path / 'run'}", *UNMEASURED]
    arguments += ["--lora_rank=4", "--max_steps=2", f"--lora_norms_and_embeddings={also}"]
    finetune.main(arguments)
    folder = tmp_path / "run" / "layout"
    run = json.loads((folder / "training.json").read_text())
    assert run["losses_nats"][1] < run["losses_nats"][0]
    assert run["trained_parameters"] < run["all_parameters"] / 2
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (source, folder / "model")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj"}
    if also:
        kinds |= {"input_layernorm", "post_attention_layernorm", "norm", "embed_tokens"}
        kinds |= {"lm_head"} if tied else set()
    assert {name.split(".")[-2] for name in changed} == kinds
    # The merged weights are those that were trained.
    from peft import PeftModel

    base = pretrained.load_model(str(source), CPU)
    patch_model(base, SinkWindow(4, 28))
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokens = torch.arange(128)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            merged(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-5
        )


def test_what_is_compared_sees_the_same_text_in_the_same_order(tuned):
    # Untrained attention hardly matters to the loss, so on the same text the three have about the same.
    first = [losses(tuned / "run" / folder)[0] for folder in ("dense", "window", "layout")]
    assert max(first) - min(first) < 0.05


@pytest.mark.parametrize("chunk_tokens", [7, 1024])
@pytest.mark.parametrize("count", [None, 50])
def test_chunked_loss_is_the_models_own(model_folder, chunk_tokens, count):
    tokens = torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, ::5] = -100
    found = []
    for chunked in (False, True):
        model = pretrained.load_model(str(model_folder), CPU)
        if chunked:
            use_chunked_loss(model, chunk_tokens)
            largest = []
            model.lm_head.register_forward_hook(
                lambda module, args, output, largest=largest: largest.append(output.shape[1])
            )
        loss = model(input_ids=tokens, labels=labels, num_items_in_batch=count).loss
        loss.backward()
        found.append((loss, [parameter.grad for parameter in model.parameters()]))
    assert max(largest) == min(chunk_tokens, 47)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_chunked_loss_refuses_what_follows_the_output_embedding():
    model = FAMILIES["gemma2"]()
    model.lm_head.weight.data *= 100
    with pytest.raises(
        NotImplementedError, match="model got Gemma2ForCausalLM, whose logits are not"
    ):
        use_chunked_loss(model, 8)


def pack(text_folder, packing, num_training=5, window_tokens=64, tokenizer=None):
    _, windows = corpus.cut_windows(
        corpus.load_corpus(str(text_folder)),
        tokenizer or byte_tokenizer(),
        window_tokens=window_tokens,
        num_held_out=2,
        num_training=num_training,
        seed=0,
        packing=packing,
        progress=False,
    )
    return windows


def test_packed_windows_hold_whole_documents_one_after_the_other(text_folder):
    joined, separate = (pack(text_folder, name) for name in ("joined", "separate"))
    assert torch.equal(joined.tokens, separate.tokens) and joined.positions is None
    text = byte_tokenizer().decode(joined.tokens.flatten())
    expected = "".join((text_folder / name).read_text() for name in joined.documents)
    assert text == expected[: 5 * 64]
    assert not {"03.txt", "07.txt", "11.txt"} & set(joined.documents)
    many = pack(text_folder, "separate", num_training=200, window_tokens=300)
    assert "short.txt" in many.documents and len(many.documents) > 10
    length = {name: len((text_folder / name).read_text()) for name in set(many.documents)}
    place, expected_positions = 0, []
    for name in many.documents:
        expected_positions += [(place + i, i) for i in range(length[name])]
        place += length[name]
    positions = many.positions.flatten()
    for at, inside in expected_positions[: 200 * 300]:
        in_window = at % 300
        assert positions[at] == min(inside, in_window)


def test_packed_documents_end_with_the_end_token(text_folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    windows = pack(text_folder, "separate", num_training=40, tokenizer=tokenizer)
    ends = (windows.tokens.flatten() == tokenizer.eos_token_id).nonzero().flatten()
    assert len(ends) == len(windows.documents) - 1
    assert (windows.positions.flatten()[ends + 1] == 0).all()


@pytest.mark.parametrize("layout", [None, SinkWindow(4, 20)])
def test_separate_documents_do_not_read_one_another(model_folder, text_folder, layout):
    windows = pack(text_folder, "separate", num_training=40, window_tokens=128)
    number = next(n for n in range(40) if (windows.positions[n][1:] == 0).sum() == 1)
    item = finetune.WindowDataset(windows)[number]
    start = int((item["position_ids"][1:] == 0).nonzero()) + 1
    assert item["labels"][0] == item["labels"][start] == -100
    assert (item["labels"] != -100).sum() == 128 - (item["position_ids"] == 0).sum()
    model = pretrained.load_model(str(model_folder), CPU)
    protocol.set_attention(model, layout)
    use_chunked_loss(model, 1024)
    hidden = []
    model.model.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    for shift in (0, 1):
        tokens = item["input_ids"].clone()
        tokens[:start] = (tokens[:start] + shift) % 256
        model(
            input_ids=tokens[None],
            labels=item["labels"][None],
            position_ids=item["position_ids"][None],
        )
    torch.testing.assert_close(hidden[0][:, start:], hidden[1][:, start:])
    assert not torch.allclose(hidden[0][:, :start], hidden[1][:, :start])


def test_packed_training_runs(inputs, tmp_path):
    arguments = [*inputs, *UNMEASURED, "--max_steps=2", "--packing=separate"]
    arguments += ["--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"]
    finetune.main([*arguments, f"--output_dir={tmp_path / 'run'}"])
    run = json.loads((tmp_path / "run" / "layout" / "training.json").read_text())
    assert run["tokens_per_step"] == 4 * 160
    # An untrained model knows nothing: the loss is that of guessing, so its mean is over tokens.
    assert run["losses_nats"][0] == pytest.approx(math.log(256), abs=0.1)


def test_positions_are_extended_before_training(inputs, tmp_path):
    arguments = [*inputs, *UNMEASURED, "--max_steps=1", "--context_tokens=300"]
    arguments += ["--max_position_embeddings=512", "--windows=1", "--rope_scaling=yarn"]
    finetune.main([*arguments, f"--output_dir={tmp_path / 'run'}"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "layout" / "model")
    assert model.config.max_position_embeddings == 512
    assert model.config.rope_parameters["rope_type"] == "yarn"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "layout" / "model")
    assert tokenizer.model_max_length == 512


def test_loss_is_a_mean_over_tokens_however_a_step_is_split(inputs, tmp_path):
    found = []
    for batch, parts in ((1, 4), (4, 1)):
        out = tmp_path / f"{batch}"
        arguments = [*inputs, *UNMEASURED, "--max_steps=2", "--packing=separate"]
        arguments += [f"--per_device_train_batch_size={batch}"]
        finetune.main([*arguments, f"--gradient_accumulation_steps={parts}", f"--output_dir={out}"])
        found.append(losses(out / "layout"))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_hub_dataset_is_streamed(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return iter([{"body": "one"}, {"body": "two"}, {"body": "three"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = protocol.TextArguments(
        dataset="some/set",
        dataset_config="en",
        dataset_split="test",
        text_column="body",
        max_documents=2,
    )
    read = evaluate.read_text(arguments)
    assert calls == [(("some/set", "en"), {"split": "test", "streaming": True})]
    assert [document.text for document in read.documents] == ["one", "two"]
    assert read.description == "hub dataset some/set (en), first 2 documents of its test split"


def test_a_recipe_gives_arguments_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps({"context_tokens": 64, "compare": ["dense", "window"], "learning_rate": 3e-4})
    )
    _, text, _, arguments, training = finetune.parse_arguments(
        [str(recipe), "--context_tokens=96", f"--output_dir={tmp_path}", "--use_cpu"]
    )
    assert (text.context_tokens, arguments.compare) == (96, ["dense", "window"])
    assert training.learning_rate == 3e-4


def test_a_process_trains_on_one_gpu_of_those_it_sees(tmp_path):
    *_, training = finetune.parse_arguments([f"--output_dir={tmp_path}", "--use_cpu"])
    training._n_gpu = 8  # what the Trainer finds where nothing was launched
    assert (training.n_gpu, training.train_batch_size) == (1, 1)


@pytest.mark.parametrize("recipe", sorted((ROOT / "scripts" / "recipes").glob("*.json")))
def test_recipes_are_whole(recipe, tmp_path):
    _, text, measured, arguments, training = finetune.parse_arguments(
        [str(recipe), f"--output_dir={tmp_path}", "--use_cpu"]
    )
    finetune.check_arguments(arguments, training)
    measured.resolve(text.context_tokens)
    layout = layout_argument.read_layout(arguments.layout)
    facts = protocol.describe_layout(layout, 30, 9, text.context_tokens)
    assert facts.density <= 0.25
    given = json.loads(recipe.read_text())
    assert training.learning_rate == given["learning_rate"]
    assert training.max_steps == given["max_steps"]
    assert arguments.compare == given.get("compare", [])


CONFIGS = ROOT / "scripts" / "accelerate"


def launch(arguments, config, *options):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    script = str(ROOT / "scripts" / "finetune.py")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    if "--use_cpu" in arguments:
        environment["DS_ACCELERATOR"] = "cpu"
    return subprocess.Popen([*command, *options, script, *arguments], env=environment)


def on_cpu(tmp_path, name):
    """The configuration `name` of scripts/accelerate, on CPU processes."""
    config = tmp_path / name
    config.write_text((CONFIGS / name).read_text() + "use_cpu: true\n")
    return config


def train_twice(arguments, tmp_path, config, port, shared_by=1):
    """The folders of a run of two processes, and of one process that does the same."""
    split, one = tmp_path / "split", tmp_path / "one"
    there = [*arguments, f"--sequence_parallel_size={shared_by}", f"--output_dir={split}"]
    running = launch(there, config, "--main_process_port", str(port))
    steps = f"--gradient_accumulation_steps={2 // shared_by}"
    finetune.main([*arguments, steps, f"--output_dir={one}"])
    assert running.wait(timeout=240) == 0
    return split / "layout", one / "layout"


def check_split_run(folder, expected, **facts):
    """A run of several processes is that of one, and its model is whole."""
    assert losses(folder) == pytest.approx(losses(expected), abs=1e-5)
    run = json.loads((folder / "training.json").read_text())
    assert {key: run[key] for key in facts} == facts
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert evaluate.own_layout(model) == SinkWindow(4, 28)
    trained = AutoModelForCausalLM.from_pretrained(expected / "model").state_dict()
    for key, weight in model.state_dict().items():
        # AdamW's steps are of the size of the learning rate, however small a gradient is.
        torch.testing.assert_close(weight, trained[key], atol=1e-3, rtol=1e-3)


def resume(folder, arguments, config, *options):
    """Take the run up again from its first checkpoint."""
    for name in ("checkpoint-4", "model"):
        shutil.rmtree(folder / name)
    (folder / "training.json").unlink()
    assert launch([*arguments, "--resume"], config, *options).wait(timeout=240) == 0
    assert json.loads((folder / "training.json").read_text())["resumed_at"] == [2]


def check_resumed(folder, arguments, config, *options):
    """The run, cut back to its first checkpoint, ends with the same weights bit for bit."""
    before = weights(folder)
    resume(folder, arguments, config, *options)
    assert weights(folder) == before


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "opt", "gpt_oss", "qwen3_next"])
def test_separate_documents_are_refused_where_they_are_read_across(family):
    model = make_model(family, "eager")
    for patched in (model, patch_model(copy.deepcopy(model), SinkWindow(2, 5))):
        if family in ("llama", "gemma3", "mixtral"):
            finetune.check_documents_are_separate(patched)
        else:
            with pytest.raises(ValueError, match="packing got 'separate' for a .* another model"):
                finetune.check_documents_are_separate(patched)


def test_data_parallel_training_is_that_of_one_process(inputs, tmp_path):
    config = on_cpu(tmp_path, "ddp.yaml")
    folders = train_twice([*inputs, *UNMEASURED], tmp_path, config, 29571)
    check_split_run(*folders, num_processes=2, tokens_per_step=320)


@pytest.mark.slow
@pytest.mark.parametrize("also", [True, False])
def test_data_parallel_adapters_are_those_of_one_process(inputs, tmp_path, also):
    arguments = [*inputs, *UNMEASURED, "--lora_rank=4", f"--lora_norms_and_embeddings={also}"]
    split, one = train_twice(arguments, tmp_path, on_cpu(tmp_path, "ddp.yaml"), 29577 + also)
    check_split_run(split, one, num_processes=2, tokens_per_step=320)
    trained = [
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (split, one)
    ]
    assert trained[0].keys() == trained[1].keys() != set()
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("num_machines", [1, 2])
def test_data_parallel_training_is_that_of_one_process_under_launchers(
    inputs, tmp_path, num_machines
):
    """Two CPU processes under one launcher, and resumed, or under two, as on two machines."""
    config = on_cpu(tmp_path, "ddp.yaml")
    split, one = tmp_path / "split", tmp_path / "one"
    arguments = [*inputs, *UNMEASURED, "--save_total_limit=2"]
    options = [["--main_process_port", "29573"]]
    if num_machines == 2:
        both = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
        options = [[*options[0], *both, "--machine_rank", rank] for rank in "01"]
    running = [launch([*arguments, f"--output_dir={split}"], config, *words) for words in options]
    assert [process.wait(timeout=240) for process in running] == [0] * num_machines
    finetune.main([*arguments, "--gradient_accumulation_steps=2", f"--output_dir={one}"])
    check_split_run(split / "layout", one / "layout", num_processes=2, tokens_per_step=320)
    if num_machines == 1:
        check_resumed(split / "layout", [*arguments, f"--output_dir={split}"], config, *options[0])


def test_weights_that_would_not_be_sharded_are_refused(inputs, tmp_path, monkeypatch):
    """accelerate leaves FSDP aside on CPU processes, in silence."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="distributed_type got FSDP on a cpu; .* zero3.yaml"):
        finetune.main([*inputs, f"--output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shared_by", [1, 2])
def test_deepspeed_training_is_that_of_one_process(inputs, tmp_path, shared_by):
    """ZeRO-3 with the configuration of scripts/accelerate on two CPU processes, each with its windows or both with the same."""
    pytest.importorskip("deepspeed")
    config, arguments = on_cpu(tmp_path, "zero3.yaml"), [*inputs, *UNMEASURED]
    arguments += ["--save_total_limit=2", *(["--compare", "dense"] if shared_by == 1 else [])]
    split, one = train_twice(arguments, tmp_path, config, 29575, shared_by)
    check_split_run(split, one, num_processes=2, tokens_per_step=320 // shared_by)
    if shared_by == 1:
        dense = [losses(folder.parent / "dense") for folder in (split, one)]
        assert dense[0] == pytest.approx(dense[1], abs=1e-5)
    arguments += [f"--sequence_parallel_size={shared_by}", f"--output_dir={split.parent}"]
    check_resumed(split, arguments, config, "--main_process_port", "29575")


BY_HEAD = (SinkWindow(64, 192), BigBird(128, 1, 1, 1), SlidingWindow(200), Dense())
# The first loss (nats), the later ones, and the share of each weight's change. With the heads' layouts in another order the first
# loss is off by 0.3. In bfloat16 the steps depend on rounding, most of all where DeepSpeed rounds the weights.
TOLERANCES = {"float32": (5e-4, 5e-4, 0.05), "bfloat16": (1e-2, 0.1, 0.5)}


def test_the_loss_of_weights_that_fsdp2_shards_has_the_gradients_of_whole_ones():
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SHARDED_LOSS)]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {each["case"]: each["bare"] for each in found} == {
        "tied": True, "untied": True, "by itself": False,
    }  # fmt: skip
    assert all(each["error"] < 2e-6 for each in found), found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "shared_by"), [("ddp", 1), ("fsdp2", 1), ("zero3", 1), ("zero3", 2)]
)
def test_training_on_two_gpus_is_that_of_one(tmp_path, name, shared_by, dtype):
    """Another layout in every head, and weights with which attention matters; loaded again; taken up again."""
    if name == "zero3":
        pytest.importorskip("deepspeed")
    compare_two_devices_with_one(tmp_path, CONFIGS / f"{name}.yaml", shared_by, dtype)


def compare_two_devices_with_one(tmp_path, config, shared_by, dtype, *options):
    # ZeRO-3 shards weights of 100,000 numbers and more.
    sizes = dict(hidden_size=512, head_dim=64, max_position_embeddings=1024)
    source = write_model(tmp_path / "source", **sizes, initializer_range=0.1)
    text = write_text(tmp_path / "text", words=300)
    layouts = {"by_head": PerHead(BY_HEAD), "swapped": PerHead(BY_HEAD[1::-1] + BY_HEAD[:1:-1])}
    for name, layout in layouts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(layout.to_dict()))
    arguments = [*STEPS, *UNMEASURED, *options, "--save_total_limit=2", "--learning_rate=1e-3"]
    arguments += [f"--model={source}", f"--dataset={text}", "--context_tokens=1024"]
    arguments += [f"--bf16={dtype == 'bfloat16'}", f"--layout={tmp_path / 'by_head.json'}"]
    # Such tests may run side by side.
    port = 29580 + 6 * (dtype == "float32") + 3 * shared_by
    port += ["ddp", "fsdp2", "zero3"].index(config.stem)
    split, one = train_twice(arguments, tmp_path, config, port, shared_by)
    first, later, share = TOLERANCES[dtype]
    assert losses(split)[0] == pytest.approx(losses(one)[0], abs=first)
    assert losses(split) == pytest.approx(losses(one), abs=later)
    run = json.loads((split / "training.json").read_text())
    assert (run["num_processes"], run["tokens_per_step"]) == (2, 2048 // shared_by)
    before, there, here = map(
        AutoModelForCausalLM.from_pretrained, (source, split / "model", one / "model")
    )
    assert evaluate.own_layout(there) == layouts["by_head"]
    for key, weight in here.state_dict().items():
        change, saved = weight - before.state_dict()[key], there.state_dict()[key]
        rounding = torch.finfo(saved.dtype).eps / 2 * weight.norm()
        assert (saved.float() - weight).norm() < share * change.norm() + rounding, key

    # The heads' layouts matter.
    order = [f"--gradient_accumulation_steps={2 // shared_by}", "--max_steps=1"]
    order += [f"--layout={tmp_path / 'swapped.json'}", f"--output_dir={tmp_path / 'swapped'}"]
    finetune.main([*arguments, *order])
    assert abs(losses(tmp_path / "swapped" / "layout")[0] - losses(one)[0]) > 5 * first

    arguments += [f"--sequence_parallel_size={shared_by}", f"--output_dir={split.parent}"]
    whole = losses(split)
    resume(split, arguments, config, "--main_process_port", str(port))
    assert losses(split) == pytest.approx(whole, abs=later)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("one_gpu", "NO"),
        ("ddp", "MULTI_GPU"),
        ("fsdp2", "FSDP"),
        ("zero3", "DEEPSPEED"),
    ],
)
def test_accelerate_reads_the_configurations(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.num_processes == (1 if kind == "NO" else 2)
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == 3
    assert sorted(path.stem for path in CONFIGS.iterdir()) == ["ddp", "fsdp2", "one_gpu", "zero3"]


@pytest.mark.parametrize(
    ("size", "changes", "context", "message"),
    [
        (
            2,
            {"deepspeed_plugin": None},
            160,
            "sequence_parallel_size got 2 with 4 processes without",
        ),
        (3, {}, 160, "sequence_parallel_size got 3 with 4 processes of DeepSpeed"),
        (0, {}, 160, "sequence_parallel_size got 0"),
        (4, {}, 161, "context_tokens got 161, which 4 processes cannot share .* give 160"),
        (2, {"compare": ["dense"]}, 160, r"compare got \['dense'\] with sequence_parallel_size 2"),
    ],
)
def test_sequences_that_cannot_be_shared_are_refused(size, changes, context, message):
    arguments = SimpleNamespace(
        sequence_parallel_size=size, compare=changes.get("compare", []), packing="joined"
    )
    training = SimpleNamespace(**{"world_size": 4, "deepspeed_plugin": object()} | changes)
    with pytest.raises(ValueError, match=message):
        finetune.share_sequences(arguments, training, context)


def test_chunked_loss_of_parts_is_that_of_the_whole(model_folder):
    model = pretrained.load_model(str(model_folder), CPU)
    use_chunked_loss(model, 7)
    tokens = torch.arange(40)[None] * 3
    whole = model(input_ids=tokens, labels=tokens)
    targets = torch.nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:]
    shifted = model(input_ids=tokens, labels=targets, shift_labels=targets)
    torch.testing.assert_close(whole.loss, shifted.loss)
    nothing = torch.full_like(targets, -100)
    assert model(input_ids=tokens, labels=nothing, shift_labels=nothing).loss == 0


TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def test_every_command_of_the_tutorial_runs(model_folder, text_folder, tmp_path, monkeypatch):
    """The commands as they stand, with a tiny model, its text and its sizes after their arguments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    measured = ["--context_tokens=160", "--score_tokens=32", "--probe_passage_tokens=24"]
    measured += ["--probe_gap_tokens", "96", "--needle_distances", "0", "16", "--windows=2"]
    measured += ["--cost_tokens", "160", "--cost_attentions", "sdpa", "layout"]
    small = [*measured, f"--model={model_folder}", f"--dataset={text_folder}"]
    trained = ["--use_cpu", "--disable_tqdm=True", "--max_steps=3", "--save_steps=3"]
    large = [f"--layout={LAYOUT}", "--bf16=False", "--max_position_embeddings=256"]
    large += ["--bucket_tokens=80", "--cards=cards"]
    scripts = {
        "evaluate": (evaluate, small),
        "measure_costs": (measure_costs, [f"--model={model_folder}", "--cost_tokens=96"]),
        "finetune": (finetune, [*small, *trained]),
        "write_model_card": (write_model_card, []),
        "plot": (plot, []),
    }
    ran = []
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", TUTORIAL, re.DOTALL | re.MULTILINE)
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "docs/tutorial.md", "exec"), {})
            ran.append(language)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            python, script, *arguments = shlex.split(line)
            assert (python, Path(script).parent) == ("python", Path("scripts"))
            module, added = scripts[Path(script).stem]
            module.main([*arguments, *added, *(large if "recipes" in line else [])])
            ran.append(Path(script).stem)
    scripts_in_order = [
        "evaluate",
        "measure_costs",
        "finetune",
        "finetune",
        "write_model_card",
        "plot",
    ]
    assert ran == ["python", *scripts_in_order, "python", "finetune"]
    card = tmp_path / "runs" / "tutorial" / "cards" / "tutorial"
    assert ModelCard((card / "README.md").read_text(), ignore_metadata_errors=False).data.tags
    assert results_of(card / "results" / "finetune.json").trainings[-1].num_steps == 3
    assert (tmp_path / "cards" / "smollm2-32k" / "README.md").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--context_tokens=512"],
            "context_tokens got 512, but tiny has 256 positions; .*--max_position_embeddings 512",
        ),
        (["--text_column=body", "--dataset={rows}"], "text_column got 'body' for rows.jsonl"),
        (["--dataset={short}"], "windows got 2, but of the 0 documents with 160 tokens or more"),
        (["--layout={small}"], "128"),
        (["--layout={layers}"], "layer 7"),
        (["--max_steps=0"], "max_steps got 0"),
        (
            ["--output_dir={short}"],
            "output_dir got .*short.txt, but .* is not a folder that can be",
        ),
        (
            ["--cards={short}/cards"],
            "cards got .*cards, but .*short.txt is not a folder that can be",
        ),
        (["--resume_from_checkpoint=x"], "resume_from_checkpoint got 'x'"),
        (["--eval_strategy=steps", "--eval_steps=1"], "eval_strategy got"),
        (["--use_liger_kernel"], "use_liger_kernel got True with loss_chunk_tokens 1024"),
        (["--lora_norms_and_embeddings"], "lora_norms_and_embeddings got True without LoRA"),
        (["--layout=sliding_window:window=32", "--compare", "window"], "compare got window, but"),
        (["--layout=sliding_window:window=200"], "window=200, which keeps all there is within 160"),
        (["--learning_rate=-1"], "learning_rate got -1.0; it must be a number above 0"),
        (["--learning_rate=nan"], "learning_rate got nan"),
        (["--adam_beta2=1"], "adam_beta2 got 1.0; it must be from 0 to below 1"),
        (["--seed=-1"], "seed got -1"),
        (["--per_device_train_batch_size=0"], "per_device_train_batch_size got 0"),
        (["--gradient_accumulation_steps=-2"], "gradient_accumulation_steps got -2"),
        (["--auto_find_batch_size"], "auto_find_batch_size got True"),
        (["--label_smoothing_factor=0.1"], "label_smoothing_factor got 0.1"),
        (["--fp16"], "fp16 got True; results are measured in"),
        (["--save_strategy=best"], "save_strategy got best"),
        (["--loss_chunk_tokens=-1"], "loss_chunk_tokens and lora_rank got -1 and 0"),
        (["--lora_rank=-1"], "loss_chunk_tokens and lora_rank got 1024 and -1"),
        (["--lora_alpha=3"], "lora_alpha got 3.0 without LoRA"),
        (["--lora_rank=4", "--lora_dropout=2"], "lora_dropout got 2.0"),
        (
            ["--lora_rank=4", "--lora_targets", "c_attn"],
            r"lora_targets got \['c_attn'\] for a Llama.* it has \['down_proj', .* all-linear",
        ),
        (["--rope_scaling=linear"], "rope_scaling got 'linear' without max_position_embeddings"),
        (["--needle_distances", "150"], r"distances got \(150,\) in prompts of 160 tokens"),
        (["--name=a/b"], "name got 'a/b'; it is that of a folder"),
        (["--name=.."], "name got '..'"),
        (["--model=/no/folder"], "model got '/no/folder', which is no file or folder here"),
        (["--model={folder}"], "model got .*, a folder without config.json"),
        (["--base_model=not an id"], "base_model got 'not an id'; the hub takes"),
        (["--licence=Apache 2"], "licence got 'Apache 2'; the hub takes"),
        (["--dataset="], "dataset got ''"),
        (["--output_dir=/proc/x"], "output_dir got /proc/x, but /proc is not a folder that can be"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(inputs, tmp_path, changes, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "some"}))
    (tmp_path / "short.txt").write_text("too short")
    small = TensorLayout.from_tensor(torch.ones(8, 8).tril(), 16)
    (tmp_path / "small.json").write_text(json.dumps(small.to_dict()))
    (tmp_path / "layers.json").write_text(json.dumps(PerLayer({7: SlidingWindow(9)}).to_dict()))
    places = {
        "rows": tmp_path / "rows.jsonl",
        "short": tmp_path / "short.txt",
        "small": tmp_path / "small.json",
        "layers": tmp_path / "layers.json",
        "folder": tmp_path,
    }
    changes = [change.format(**places) for change in changes]
    with pytest.raises(ValueError, match=message):
        finetune.main([*inputs, f"--output_dir={tmp_path / 'run'}", *changes])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which cannot be read .*No such file"),
        ("{oops", "which cannot be read .*Expecting property name"),
        ("[1]", "which holds a list; it must hold a JSON object"),
    ],
)
def test_recipes_and_runs_that_cannot_be_read_are_refused(inputs, tmp_path, content, message):
    recipe, run = tmp_path / "recipe.json", tmp_path / "run"
    if content is not None:
        recipe.write_text(content)
        run.mkdir()
        (run / "run.json").write_text(content)
    with pytest.raises(ValueError, match=f"recipe got {recipe}, {message}"):
        finetune.main([str(recipe), *inputs])
    if content is not None:
        with pytest.raises(ValueError, match=f"resume got {run / 'run.json'}, {message}"):
            finetune.main([*inputs, *UNMEASURED, f"--output_dir={run}", "--resume"])


def test_what_a_resumed_run_has_changed_is_named_alone(tmp_path):
    manifest = {"layout": 1, "trainer": {"seed": 0, "learning_rate": 1.0}, "lora": {"lora_rank": 0}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(manifest))
    finetune.check_manifest(path, manifest)
    changed = manifest | {"trainer": {"seed": 0, "learning_rate": 2.0}}
    with pytest.raises(ValueError, match=r"with learning_rate 2.0 \(there: 1.0\); its checkpoints"):
        finetune.check_manifest(path, changed)


def test_a_layout_left_out_is_the_models_own(inputs, tmp_path, model_folder):
    own = SinkWindow(sink=2, window=9)
    model = patch_model(AutoModelForCausalLM.from_pretrained(model_folder), own)
    model.save_pretrained(tmp_path / "sparse")
    byte_tokenizer().save_pretrained(tmp_path / "sparse")
    arguments = [word for word in inputs if not word.startswith("--layout")]
    sparse = [f"--model={tmp_path / 'sparse'}", f"--output_dir={tmp_path / 'run'}"]
    finetune.main([*arguments, *UNMEASURED, *sparse, "--max_steps=1"])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "layout" / "model")
    assert evaluate.own_layout(trained) == own
    with pytest.raises(ValueError, match="layout got sink_window:sink=64,window=960, which keeps"):
        finetune.main([*arguments, f"--output_dir={tmp_path / 'other'}"])


@pytest.mark.parametrize("words", [["--logging_steps=3"], ["--logging_strategy=no"]])
def test_every_step_is_on_record_whatever_is_logged(inputs, tmp_path, words):
    finetune.main([*inputs, *UNMEASURED, f"--output_dir={tmp_path / 'run'}", *words])
    run = json.loads((tmp_path / "run" / "layout" / "training.json").read_text())
    assert run["logged_steps"][-1] == 4
    assert len(run["losses_nats"]) == len(run["logged_steps"])


def test_a_loss_that_is_no_number_ends_the_run(inputs, tmp_path):
    """The Trainer would log another loss in its place, and go on."""
    lost = ["--learning_rate=1e9", "--max_grad_norm=0"]
    with pytest.raises(ValueError, match="loss got nan at step 3; .* lower --learning_rate"):
        finetune.main([*inputs, *UNMEASURED, f"--output_dir={tmp_path / 'run'}", *lost])
    assert not (tmp_path / "run" / "layout" / "model").exists()


SMALL_BLOOM = BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=4)


@pytest.mark.parametrize(
    "make", [lambda: make_model("gemma2", "eager"), lambda: BloomForCausalLM(SMALL_BLOOM)]
)
def test_models_without_sdpa_are_loaded_with_eager_attention(tmp_path, make):
    model, folder = make(), tmp_path / "model"
    model.save_pretrained(folder)
    assert pretrained.load_model(str(folder), CPU).config._attn_implementation == "eager"
    patch_model(model, SinkWindow(2, 5)).save_pretrained(folder)
    again = pretrained.load_model(str(folder), CPU)
    assert again.config._attn_implementation == "eager" and evaluate.own_layout(again) is None
    costs = protocol.CostArguments(cost_tokens=[16], cost_attentions=["sdpa"])
    with pytest.raises(ValueError, match=r"cost_attentions got \['sdpa'\] for a .* name eager"):
        costs.check_model_costs(again)


def test_a_model_without_sdpa_is_trained_and_measured(inputs, tmp_path):
    folder = tmp_path / "bloom"
    BloomForCausalLM(SMALL_BLOOM).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    places = [f"--model={folder}", f"--output_dir={tmp_path / 'run'}", f"--cards={tmp_path}"]
    costs = ["--cost_attentions", "eager", "layout", "--cost_tokens", "64", "--cost_repetitions=1"]
    finetune.main([*inputs, *places, *costs, "--max_steps=1", "--name=card", "--figures=False"])
    results = results_of(tmp_path / "card" / "results" / "finetune.json")
    assert [cost.row.attention for cost in results.costs] == ["eager", LAYOUT]
    assert all(cost.row.cost for cost in results.costs)
    dense, layout = results.row("pretrained", "dense"), results.row("pretrained", LAYOUT)
    assert dense.perplexity != layout.perplexity


def test_costs_beyond_a_table_of_positions_are_refused(model_folder):
    costs = protocol.CostArguments(cost_tokens=[16, 100_000])
    costs.check_model_costs(pretrained.load_model(str(model_folder), CPU))
    with pytest.raises(ValueError, match="cost_tokens got 100000, but OPTForCausalLM has a table"):
        costs.check_model_costs(make_model("opt", "sdpa"))


def test_models_that_are_not_causal_are_refused():
    evaluate.check_is_causal(make_model("llama", "sdpa"))
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertLMHeadModel(BertConfig(vocab_size=64, **sizes)).eval()
    with pytest.raises(
        ValueError, match="model got a BertLMHeadModel, in which a token reads later"
    ):
        evaluate.check_is_causal(model)


def test_weights_that_are_no_numbers_are_refused(model_folder):
    model = pretrained.load_model(str(model_folder), CPU)
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="model got LlamaForCausalLM with logits that are not num"):
        use_chunked_loss(model, 8)


def test_separate_documents_are_refused_before_anything_is_written(inputs, tmp_path):
    folder = tmp_path / "opt"
    sizes = dict(hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    config = OPTConfig(vocab_size=256, word_embed_proj_dim=32, max_position_embeddings=256, **sizes)
    OPTForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    separate = [f"--model={folder}", "--packing=separate", f"--output_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="packing got 'separate' for a OPTForCausalLM"):
        finetune.main([*inputs, *UNMEASURED, *separate])
    assert not (tmp_path / "run").exists()


def test_devices_and_threads_that_are_not_there_are_refused(model_folder, text_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [*SMALL, f"--model={model_folder}", f"--dataset={text_folder}"]
    with pytest.raises(ValueError, match="device got cuda, but torch .* finds no GPU here"):
        evaluate.main([*words, "--device=cuda"])
    with pytest.raises(ValueError, match="threads got 0; it must be at least 1"):
        evaluate.main([*words, "--threads=0"])


@pytest.mark.parametrize("script", [calibrate, evaluate, finetune, finetune_encoder, measure_costs])
def test_help_shows_commands_as_they_are_typed(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert f"\n    python scripts/{Path(script.__file__).name} " in text
    assert "(default: cpu)" in text or "(default: 42)" in text
    assert "(default: None)" not in text


def test_a_card_says_what_trained_weights_are_compared_with(tuned):
    results = results_of(tuned / "cards" / "run" / "results" / "finetune.json")
    alone = replace(results, trainings=results.trainings[-1:])
    assert "to those trained with dense" in evaluation_card._explain_quality(results)
    assert "as nothing was trained densely beside" in evaluation_card._explain_quality(alone)


def test_a_disk_without_room_is_refused(inputs, tmp_path, monkeypatch):
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(finetune.shutil, "disk_usage", lambda path: full)
    with pytest.raises(
        ValueError, match="output_dir got .*run, whose disk has 0.00 GiB free; .* need"
    ):
        finetune.main([*inputs, f"--output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_the_space_asked_for_suffices(tuned, monkeypatch):
    def refuse(free):
        monkeypatch.setattr(
            finetune.shutil, "disk_usage", lambda path: type("U", (), {"free": free})
        )
        finetune.check_space(
            tuned, parameters=parameters, trained=parameters, num_runs=3, checkpoints=2
        )

    model = AutoModelForCausalLM.from_pretrained(tuned / "run" / "layout" / "model")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    written = sum(file.stat().st_size for file in (tuned / "run").rglob("*.safetensors"))
    written += sum(file.stat().st_size for file in (tuned / "run").rglob("optimizer.pt"))
    with pytest.raises(ValueError):
        refuse(written)
    refuse(8 * written)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--max_steps=10", "--save_steps=3"], 2),
        (["--max_steps=3", "--save_steps=3"], 1),
        (["--max_steps=10", "--save_steps=3", "--save_total_limit=3"], 4),
        (["--max_steps=10", "--save_steps=3", "--save_total_limit=0"], 4),
        (["--max_steps=10", "--save_steps=0.25", "--save_total_limit=9"], 4),
        (["--max_steps=10", "--save_strategy=no"], 0),
        (["--max_steps=10", "--save_strategy=epoch"], 1),
    ],
)
def test_the_space_asked_for_is_that_of_all_checkpoints_kept(tmp_path, words, count):
    training = finetune.parse_arguments([f"--output_dir={tmp_path / 'run'}", "--use_cpu", *words])
    assert finetune.count_checkpoints(training[-1]) == count


def test_a_card_tells_of_windows_that_a_model_has_itself():
    """A layout stays within them, so its density is not all that is left out."""
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    assert protocol.window_notes(LlamaConfig(**sizes)) == ()
    (note,) = protocol.window_notes(MistralConfig(**sizes, sliding_window=8))
    assert note.startswith("3 of 3 layers have a window")
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    (note,) = protocol.window_notes(Gemma2Config(**sizes, layer_types=kinds))
    assert note.startswith("2 of 3 layers have a window")


@pytest.mark.parametrize("make", [write_model_card.write_model_card, plot.draw_figures])
def test_records_that_no_card_belongs_to_are_refused(evaluation, tmp_path, make):
    """One that lay in the root of the repository would have its README replaced."""
    stray = tmp_path / "elsewhere" / "evaluate.json"
    stray.parent.mkdir()
    stray.write_bytes(evaluation.read_bytes())
    with pytest.raises(ValueError, match="record got .* in the folder 'elsewhere'; a card is"):
        make(stray)
    other = tmp_path / "results" / "heads.record.json"
    other.parent.mkdir()
    write_record(replace(read_record(evaluation), script="calibrate.py"), other)
    with pytest.raises(
        ValueError, match="record got .*, which calibrate.py wrote; it must be one of"
    ):
        make(other)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [stray.name, other.name]


def test_a_folder_in_use_is_told_from_one_another_process_looks_at(inputs, tmp_path):
    arguments = [*inputs, *UNMEASURED, "--max_steps=1"]
    folders = tmp_path / "used", tmp_path / "looked at"
    for folder, name in zip(folders, (".hidden", f"{evaluate.PROBE}x"), strict=True):
        folder.mkdir()
        (folder / name).touch()
    with pytest.raises(ValueError, match="output_dir got .*used, which is not empty"):
        finetune.main([*arguments, f"--output_dir={folders[0]}"])
    finetune.main([*arguments, f"--output_dir={folders[1]}"])


def test_missing_liger_is_named(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "is_liger_kernel_available", lambda: False)
    words = ["--use_liger_kernel", "--loss_chunk_tokens=0", f"--output_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="use_liger_kernel got True, but the package liger-kernel"):
        finetune.main([*inputs, *words])
    assert not (tmp_path / "run").exists()


def test_missing_peft_is_named(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="lora_rank got 4, but the package peft is not installed"):
        finetune.main([*inputs, f"--output_dir={tmp_path / 'run'}", "--lora_rank=4"])
