"""An encoder made to read longer texts, end to end on a tiny random model, and what it is made of."""

import math
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from script_inputs import byte_tokenizer, write_text
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertModel

from hf_blocksparse import Longformer
from hf_blocksparse.run_record import from_plain, read_record

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import finetune_encoder as script  # noqa: E402
import masked_head  # noqa: E402
import write_model_card  # noqa: E402
from encoder_results import EncoderResults  # noqa: E402
from evaluate import own_layout  # noqa: E402

LAYOUT = Longformer(window=32, global_tokens=1)
WORDS = dict(mask=7, vocabulary=200)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """An encoder of 64 positions without a head, as sentence encoders are published."""
    folder = tmp_path_factory.mktemp("models") / "encoder"
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "mask_token": "[MASK]"})
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


def run(model_folder, tmp_path, *options, **changed):
    values = {
        "model": model_folder,
        "dataset": write_text(tmp_path / "text"),
        "context_tokens": 256,
        "layout": "longformer:window=32",
        "windows": 2,
        "head_steps": 3,
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "output_dir": tmp_path / "run",
        "cards": tmp_path / "cards",
        "use_cpu": True,
        "report_to": "none",
    }
    arguments = [f"--{key}={value}" for key, value in (values | changed).items()]
    script.main([*arguments, *options])
    return tmp_path / "cards" / "run" / "results" / "finetune_encoder.json"


@pytest.fixture(scope="module")
def record(model_folder, tmp_path_factory):
    return run(model_folder, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def results(record):
    return from_plain(EncoderResults, read_record(record).results)


def test_rows_ask_for_the_same_hidden_tokens(results):
    rows = [(row.weights, row.attention, row.read_tokens) for row in results.rows]
    assert rows == [
        ("short", "chunks", 64),
        ("extended", "dense", 253),
        ("extended", "layout", 253),
        ("chunks", "chunks", 64),
        ("layout", "layout", 253),
        ("dense", "dense", 253),
    ]
    assert len({row.num_hidden for row in results.rows}) == 1
    assert results.context_tokens == 1 + 4 * 63
    assert 0.1 < results.rows[0].num_hidden / (2 * 252) < 0.2
    chunks, sparse = results.row("chunks", "chunks"), results.row("layout", "layout")
    assert results.rows[0].difference is None and chunks.difference is None
    expected = [a - b for a, b in zip(sparse.window_nll_nats, chunks.window_nll_nats, strict=True)]
    assert sparse.difference.mean_nats == pytest.approx(sum(expected) / 2)
    assert results.layout.density == pytest.approx(LAYOUT.density(253), abs=1e-9)


def test_all_are_trained_on_the_same_tokens(results):
    assert [run.attention for run in results.trainings] == [
        "chunks",
        "longformer:window=32",
        "dense",
    ]
    assert [run.tokens_per_step for run in results.trainings] == [256, 253, 253]
    assert [run.num_steps for run in results.trainings] == [2, 2, 2]
    assert results.head_training.num_steps == 3
    assert not set(results.text.training_documents) & set(results.text.held_out_documents)


def test_saved_models_have_their_layout_and_length(record, results):
    output = record.parents[3] / "run"
    model = AutoModelForMaskedLM.from_pretrained(output / "layout")
    assert own_layout(model) == LAYOUT
    assert model.config.max_position_embeddings == 256
    assert own_layout(AutoModelForMaskedLM.from_pretrained(output / "dense")) is None
    assert AutoTokenizer.from_pretrained(output / "extended").model_max_length == 256
    table = AutoModelForMaskedLM.from_pretrained(output / "extended").bert.embeddings
    rows = table.position_embeddings.weight
    assert torch.equal(rows[:64], rows[64:128])
    # Trained on from it, and changed.
    assert not torch.equal(rows, model.bert.embeddings.position_embeddings.weight)


def test_measured_loss_is_the_models(record, results):
    """The first row by hand: chunks of the first held-out window through the saved model."""
    output = record.parents[3] / "run"
    model = AutoModelForMaskedLM.from_pretrained(output / "short").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "extended")
    text = (record.parents[3] / "text" / results.text.held_out_documents[0]).read_text()
    tokens = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids[1:253]] * 2)
    # The choice of hidden tokens is drawn for all windows at once.
    hidden = script.hide_tokens(
        tokens, 0.15, mask=tokenizer.mask_token_id, vocabulary=len(tokenizer), seed=42, always=True
    )
    inputs, labels = hidden.inputs[0].view(4, 63), hidden.labels[0].view(4, 63)
    front = torch.full((4, 1), tokenizer.cls_token_id)
    with torch.no_grad():
        logits = model(input_ids=torch.cat((front, inputs), 1)).logits[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert results.rows[0].window_nll_nats[0] == pytest.approx(loss, rel=1e-4)


def test_card_is_made_from_the_record_alone(record, results, tmp_path):
    copy = tmp_path / "card" / "results" / record.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(record.read_bytes())
    write_model_card.main([str(copy)])
    content = (tmp_path / "card" / "README.md").read_text()
    assert content == (record.parents[1] / "README.md").read_text()
    card = ModelCard(content, ignore_metadata_errors=False)
    (evaluation,) = card.data.eval_results
    loss = results.row("layout", "layout").nll_nats
    assert evaluation.metric_value == pytest.approx(math.exp(loss), abs=1e-4)
    assert "dense, in chunks of 64, trained" in content
    assert str(record.parents[3]) not in content + record.read_text()


def test_hidden_tokens():
    tokens = torch.randint(20, 200, (40, 500), generator=torch.Generator().manual_seed(1))
    measured = script.hide_tokens(tokens, 0.15, seed=3, always=True, **WORDS)
    chosen = measured.labels != -100
    assert 0.14 < chosen.float().mean() < 0.16
    assert torch.equal(measured.labels[chosen], tokens[chosen])
    assert (measured.inputs[chosen] == 7).all()
    assert torch.equal(measured.inputs[~chosen], tokens[~chosen])
    trained = script.hide_tokens(tokens, 0.15, seed=3, always=False, **WORDS)
    assert torch.equal(trained.labels, measured.labels)
    assert torch.equal(trained.inputs[~chosen], tokens[~chosen])
    masked = (trained.inputs[chosen] == 7).float().mean()
    kept = (trained.inputs[chosen] == tokens[chosen]).float().mean()
    assert 0.77 < masked < 0.83 and 0.08 < kept < 0.12
    other = script.hide_tokens(tokens, 0.15, seed=4, always=True, **WORDS)
    assert not torch.equal(other.labels, measured.labels)


def test_rows_of_chunks_and_of_windows_hold_the_same():
    hidden = script.HiddenTokens(torch.arange(24).view(2, 12), torch.arange(24).view(2, 12) - 100)
    chunks = hidden.rows(99, 4)
    assert chunks.inputs.shape == (6, 5)
    assert (chunks.inputs[:, 0] == 99).all() and (chunks.labels[:, 0] == -100).all()
    assert torch.equal(chunks.inputs[:, 1:].reshape(2, 12), hidden.inputs)
    assert torch.equal(hidden.rows(99, 12).labels[:, 1:], hidden.labels)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_share": 0}, "hidden_share got 0.0"),
        ({"head_steps": 0}, "head_steps got 0"),
        ({"context_tokens": 100}, "context_tokens got 100 with chunks of 64"),
        ({"head_learning_rate": "nan"}, "head_learning_rate got nan"),
        ({"short_tokens": 1}, "short_tokens got 1; a chunk holds"),
        ({"short_tokens": 0}, "short_tokens got 0"),
        ({"eval_strategy": "steps"}, "eval_strategy got"),
        ({"layout": "longformer:window=900"}, "window=900, which keeps all there is within 253"),
        ({"learning_rate": -1}, "learning_rate got -1.0"),
        ({"name": "a/b"}, "name got 'a/b'"),
        ({"windows": 9}, "windows got 9, but of the 12 documents"),
        ({"layout": '{"kind":"per_layer"}'}, "per_layer"),
    ],
)
def test_bad_arguments_are_refused_before_training(model_folder, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        run(model_folder, tmp_path, **changed)
    assert not (tmp_path / "run").exists()


def test_output_in_use_is_refused(model_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note").write_text("mine")
    with pytest.raises(ValueError, match="output_dir got .* which is not empty"):
        run(model_folder, tmp_path)


def test_model_without_a_mask_token_is_refused(model_folder, tmp_path):
    folder = tmp_path / "model"
    BertModel.from_pretrained(model_folder).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="model got .* with cls_token None and mask_token None"):
        run(folder, tmp_path)


def head_training(model, texts, *, steps, graph=False):
    settings = masked_head.HeadTraining(
        steps=steps,
        rows=4,
        learning_rate=1e-2,
        hidden_share=0.2,
        adam_betas=(0.9, 0.98),
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=0,
    )
    options = dict(first=2, mask=7, dtype=torch.float32, name="head", graph=graph)
    return masked_head.train_head(model, texts, settings, **options)


def small_encoder(model_folder, device="cpu"):
    torch.manual_seed(0)
    return script.load_encoder(str(model_folder), torch.device(device))


def test_the_body_rests_while_the_head_begins(model_folder):
    model = small_encoder(model_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = head_training(model, torch.randint(20, 200, (6, 63)), steps=1)
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert "cls.predictions.transform.dense.weight" in changed
    assert not any(name.startswith("bert.") for name in changed)
    assert run.logged_steps == (1,) and run.tokens_per_step == 4 * 64
    assert run.losses_nats[0] == pytest.approx(math.log(model.config.vocab_size), abs=0.2)
    assert model.config._attn_implementation == "sdpa"
    assert (
        not model.bert._forward_hooks and model.bert.embeddings.word_embeddings.weight.grad is None
    )


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)  # on a GPU as a graph
def test_a_head_learns_what_is_hidden(model_folder, device):
    """Texts of one token each: the others tell the hidden one."""
    model = small_encoder(model_folder, device)
    texts = torch.tensor([20, 33])[:, None].expand(-1, 31).contiguous()
    run = head_training(model, texts, steps=100, graph=device == "cuda")
    assert run.logged_steps == (50, 100)
    assert run.losses_nats[0] > 1 and run.losses_nats[1] < 0.1
    model.eval()
    shown = torch.full((1, 32), 33, device=device)
    shown[0, 0], shown[0, 5] = 2, 7
    assert model(input_ids=shown).logits[0, 5].argmax() == 33
