"""Measurements agree with the plain computation; bad input is refused; records survive the file."""

import dataclasses
import gc
import importlib.metadata
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_blocksparse.evaluation import (
    Cost,
    PositionBucket,
    chunked_losses,
    in_fresh_process,
    measure_cost,
    needle_recall,
    next_token_losses,
    nll_difference,
    perplexity,
    repeat_probe,
)
from hf_blocksparse.run_record import (
    FORMAT_VERSION,
    RunRecord,
    describe_environment,
    from_plain,
    read_record,
    to_plain,
    write_record,
)

CPU = torch.device("cpu")
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double()


@pytest.fixture
def windows():
    return torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))


def plain_losses(model, tokens):
    logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1024])
def test_chunked_losses_and_gradients_are_those_of_the_whole_logits(model, windows, chunk_tokens):
    plain = plain_losses(model, windows)
    plain.mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    chunked = next_token_losses(model, windows, chunk_tokens=chunk_tokens)
    # The loss is float32 whatever the model's dtype.
    torch.testing.assert_close(chunked.double(), plain, rtol=1e-5, atol=1e-6)
    chunked.mean().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_perplexity_by_position(model, windows):
    result = perplexity(model, windows, edges=(5, 20, 30), progress=False)
    losses = plain_losses(model, windows).detach()
    spans = [(5, 20), (20, 30), (30, 40)]
    assert [(b.first_position, b.end_position) for b in result.buckets] == spans
    for bucket, (first, end) in zip(result.buckets, spans, strict=True):
        scored = losses[:, first - 1 : end - 1]
        assert bucket.num_tokens == scored.numel()
        assert bucket.nll_nats == pytest.approx(scored.mean().item(), rel=1e-5)
    assert result.perplexity == pytest.approx(losses[:, 29:].mean().exp().item(), rel=1e-5)
    assert result.window_nll_nats == pytest.approx(losses[:, 29:].mean(1).tolist(), rel=1e-5)


def test_perplexity_leaves_the_model_in_its_mode(model, windows):
    for mode in (True, False):
        model.train(mode)
        perplexity(model, windows[:1], progress=False)
        assert model.training is mode


def test_nll_difference_is_paired(model, windows):
    baseline = perplexity(model, windows, edges=(20,), progress=False)
    shifts = (0.1, 0.2, 0.6)
    changed = dataclasses.replace(
        baseline,
        window_nll_nats=tuple(
            nll + shift for nll, shift in zip(baseline.window_nll_nats, shifts, strict=True)
        ),
    )
    difference = nll_difference(changed, baseline)
    assert difference.mean_nats == pytest.approx(0.3)
    assert difference.standard_error == pytest.approx(math.sqrt(0.14 / 2 / 3))
    shorter = perplexity(model, windows[:, 10:], edges=(10,), progress=False)
    expected = [math.log(shorter.perplexity) - math.log(baseline.perplexity)]
    assert [nll_difference(shorter, baseline).mean_nats] == pytest.approx(expected)
    single = perplexity(model, windows[:1], edges=(20,), progress=False)
    assert nll_difference(single, single).standard_error is None
    with pytest.raises(ValueError, match="changed got .* a paired difference needs the same token"):
        nll_difference(single, baseline)


def test_repeat_probe_scores_passage_and_copy(model, windows):
    passages, fillers = windows[:, :12], windows[:, 12:30]
    result = repeat_probe(model, passages, fillers, progress=False)
    losses = plain_losses(model, torch.cat((passages, fillers, passages), 1)).detach()
    assert (result.num_passages, result.passage_tokens, result.gap_tokens) == (3, 12, 18)
    first, copy = losses[:, :11].mean().exp().item(), losses[:, 30:].mean().exp().item()
    assert losses[:, 30:].shape[1] == 11
    assert result.first_perplexity == pytest.approx(first, rel=1e-5)
    assert result.copy_perplexity == pytest.approx(copy, rel=1e-5)


class WrappedLinear(nn.Linear):
    """A head that is more than its matrix product, for all that the loss knows."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_losses_do_not_depend_on_what_the_head_is(dtype, bias, autocast):
    """Gradients of a plain linear head, made by hand, beside those of autograd."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 23, 16, dtype=dtype)
    targets = torch.randint(50, (2, 23))
    targets[:, ::4] = -100
    factors = torch.rand(2, 23)
    plain, wrapped = nn.Linear(16, 50, bias, dtype=dtype), WrappedLinear(16, 50, bias, dtype=dtype)
    wrapped.load_state_dict(plain.state_dict())
    found = []
    for head in (plain, wrapped):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = chunked_losses(head, leaf[:, :-1], targets[:, 1:], chunk_tokens=5)
        (losses * factors[:, 1:]).sum().backward()
        found.append([losses, leaf.grad, *(parameter.grad for parameter in head.parameters())])
    assert type(found[0][0].grad_fn) is not type(found[1][0].grad_fn)
    close = 1e-6 if dtype == torch.float32 and not autocast else 2e-2
    torch.testing.assert_close(found[0], found[1], rtol=close, atol=close)
    assert found[0][0].dtype == torch.float32 and (found[0][0][targets[:, 1:] == -100] == 0).all()


def test_a_frozen_head_gets_no_gradient():
    head = nn.Linear(16, 50).requires_grad_(False)
    hidden = torch.randn(1, 9, 16, requires_grad=True)
    chunked_losses(head, hidden, torch.randint(50, (1, 9)), chunk_tokens=4).sum().backward()
    assert head.weight.grad is None and hidden.grad.abs().sum() > 0


def test_hooks_of_the_head_are_called():
    head, seen = nn.Linear(16, 50), []
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    chunked_losses(head, torch.randn(1, 9, 16), torch.randint(50, (1, 9)), chunk_tokens=4)
    assert seen == [(1, 4, 50), (1, 4, 50), (1, 1, 50)]


def test_chunked_losses_skip_targets_of_minus_100(model, windows):
    hidden = model.model(windows).last_hidden_state[:, :-1]
    targets = windows[:, 1:].clone()
    targets[:, ::3] = -100
    losses = chunked_losses(model.lm_head, hidden, targets, chunk_tokens=5)
    expected = plain_losses(model, windows).masked_fill(targets == -100, 0)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


class Reader(torch.nn.Module):
    """A language model that answers with what stood after the last place where its last five tokens stood before, within
    `reach` tokens; so it knows a passkey exactly as far as it reads.
    """

    class Body(torch.nn.Module):
        def __init__(self, reach):
            super().__init__()
            self.reach = reach

        def forward(self, input_ids, use_cache=False):
            (ids,) = input_ids.tolist()
            hidden = torch.zeros(1, len(ids), 256)
            places: dict = {}
            for end in range(5, len(ids) + 1):
                last = tuple(ids[end - 5 : end])
                if end - places.get(last, -self.reach) < self.reach:
                    hidden[0, end - 1, ids[places[last]]] = 9.0
                places[last] = end
            return type("Output", (), {"last_hidden_state": hidden, "logits": hidden})

    def __init__(self, reach):
        super().__init__()
        self.base_model = self.Body(reach)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache=False):
        return self.base_model(input_ids)

    def get_output_embeddings(self):
        return torch.nn.Identity()


class Bytes:
    def __call__(self, text, **options):
        return type("Encoding", (), {"input_ids": list(text.encode())})


def test_needle_is_recalled_as_far_as_the_model_reads():
    haystacks = torch.arange(128, 228).repeat(3)[None].repeat(4, 1)
    haystacks[:, 100:200] = torch.arange(227, 127, -1)
    haystacks[:, 200:] = torch.arange(128, 228).roll(50)
    results = needle_recall(
        Reader(reach=120), Bytes(), haystacks, distances=(0, 10, 80), progress=False
    )
    assert (results.num_trials, results.context_tokens) == (4, 300)
    near, close, far = results.distances
    assert (near.distance_tokens, close.distance_tokens, far.distance_tokens) == (0, 10, 80)
    assert near.num_recalled == close.num_recalled == 4
    assert far.num_recalled == results.control_recalled == 0
    assert near.answer_nll_nats < 1 < far.answer_nll_nats


def test_needle_control_and_prompts_differ_in_the_statement_alone(model):
    seen = []
    model.model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["input_ids"][0]), with_kwargs=True
    )
    haystack = torch.randint(97, (1, 120), generator=torch.Generator().manual_seed(2))

    class Small(Bytes):
        def __call__(self, text, **options):
            return type("Encoding", (), {"input_ids": [byte % 97 for byte in text.encode()]})

    needle_recall(model, Small(), haystack, distances=(7,), progress=False)
    control, prompt = seen[-2:]
    assert len(control) == len(prompt) == 120
    question = len("\nWhat is the pass key? The pass key is 12345")
    assert torch.equal(control[: 120 - question], haystack[0, : 120 - question])
    differing = (control != prompt).nonzero().flatten()
    assert differing.max() < 120 - question - 7
    statement = len("\nThe pass key is 12345. Remember it: 12345 is the pass key.\n")
    assert differing.min() >= 120 - question - 7 - statement


def test_needle_distances_that_do_not_fit_are_refused(model, windows):
    with pytest.raises(
        ValueError, match=r"distances got \(900,\) in prompts of 1000 tokens; .* 0..895"
    ):
        needle_recall(model, Bytes(), torch.zeros(1, 1000, dtype=torch.int64), distances=(900,))


def test_a_softcap_after_the_output_embedding_is_refused(windows):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.01))
    with pytest.raises(NotImplementedError, match="model got Gemma2ForCausalLM, whose logits are"):
        perplexity(model, windows, progress=False)


def test_a_model_without_output_embedding_is_refused(model, windows):
    with pytest.raises(ValueError, match="model got LlamaModel; perplexity needs a model with an"):
        perplexity(model.model, windows, progress=False)


@pytest.mark.parametrize("edges", [(), (0,), (5, 5), (7, 3), (40,)])
def test_edges_outside_the_window_are_refused(model, windows, edges):
    with pytest.raises(ValueError, match="edges got .* strictly ascending positions in 1..39"):
        perplexity(model, windows, edges=edges, progress=False)


def test_windows_of_another_form_are_refused(model, windows):
    for wrong in (windows[0], windows.float(), windows[:0]):
        with pytest.raises(ValueError, match="windows got shape .* non-empty int64 tensor"):
            perplexity(model, wrong, progress=False)
    with pytest.raises(ValueError, match="fillers got shape .* one filler for each passage"):
        repeat_probe(model, windows, windows[:1], progress=False)
    with pytest.raises(ValueError, match="passages got 1 tokens each"):
        repeat_probe(model, windows[:, :1], windows, progress=False)
    with pytest.raises(ValueError, match="first_target got 0 for windows of 40 tokens"):
        next_token_losses(model, windows, first_target=0)


def process_number():
    return os.getpid()


def fail_in_process():
    raise ValueError("from the other side")


def cost_of_filling(num_floats):
    """Peak memory of a tensor that is freed again, in a process of its own."""
    return measure_cost(lambda: torch.ones(num_floats), device=CPU, repetitions=2)


def test_fresh_process_returns_results_and_raises_errors():
    assert in_fresh_process(process_number) != os.getpid()
    with pytest.raises(ValueError, match="from the other side"):
        in_fresh_process(fail_in_process)


def test_peak_memory_on_the_cpu_is_what_was_allocated():
    mebibyte = 2**20
    ballast = torch.ones(128 * mebibyte)  # A parent's memory must not count for the child.
    small, large = (in_fresh_process(cost_of_filling, n * mebibyte // 4) for n in (16, 256))
    del ballast
    assert small.memory_kind == large.memory_kind == "process resident set"
    assert len(large.seconds) == 2 and min(large.seconds) > 0
    assert 250 * mebibyte < large.added_bytes < 290 * mebibyte
    assert small.added_bytes < 50 * mebibyte


def test_garbage_is_collected_between_timed_calls_alone():
    collecting_in_calls, collections = [], []

    def note(phase, info):
        if phase == "start":
            collections.append(info["generation"])

    assert gc.isenabled()
    gc.callbacks.append(note)
    try:
        measure_cost(lambda: collecting_in_calls.append(gc.isenabled()), device=CPU, repetitions=3)
        with pytest.raises(ZeroDivisionError):
            measure_cost(lambda: 1 / 0, device=CPU)
    finally:
        gc.callbacks.remove(note)
    assert collecting_in_calls == [False] * 4 and collections.count(2) >= 4
    assert gc.isenabled()


def test_measure_cost_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="repetitions got 0"):
        measure_cost(list, device=CPU, repetitions=0)
    with pytest.raises(NotImplementedError, match="device got meta; memory is measured on cpu and"):
        measure_cost(list, device=torch.device("meta"))


@pytest.fixture
def record():
    cost = Cost(seconds=(1.0, 3.0, 2.0), resting_bytes=1, peak_bytes=5, memory_kind="cuda")
    return RunRecord(
        version=FORMAT_VERSION,
        script="test.py",
        arguments={"layout": {"kind": "dense"}, "steps": 3, "model": None},
        seed=7,
        environment=describe_environment(CPU),
        timings_seconds={"load": 1.5},
        results={"cost": to_plain(cost)},
    )


def test_record_survives_the_file(record, tmp_path):
    path = tmp_path / "new folder" / "run.json"
    write_record(record, path)
    assert read_record(path) == record
    cost = from_plain(Cost, read_record(path).results["cost"])
    assert cost.seconds == (1.0, 3.0, 2.0)
    assert (cost.median_seconds, cost.added_bytes) == (2.0, 4)


def test_environment_names_what_a_reader_needs(record):
    environment = record.environment
    assert environment.device == "cpu" and environment.device_memory_bytes > 2**28
    assert environment.packages["torch"] == importlib.metadata.version("torch")
    assert environment.git_commit is None or len(environment.git_commit) == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "7"}, r"record got '7' at .*run.json.seed; it must be of type int"),
        ({"seed": True}, "record got True at .*seed; it must be of type int"),
        ({"version": 99}, "with version 99; this release reads version 1"),
        ({"extra": 1}, r"record got \['extra'\] at .* an object with only the keys"),
        ({"timings_seconds": {"load": "1"}}, "record got '1' at .*timings_seconds.load"),
        ({"environment": []}, "record got .* at .*environment; it must be an object"),
        ({"script": None}, "record got None at .*script; it must be of type str"),
    ],
)
def test_reading_is_strict(record, tmp_path, change, message):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_plain(record) | change))
    with pytest.raises(ValueError, match=message):
        read_record(path)


def test_missing_keys_and_broken_files_are_refused(record, tmp_path):
    path = tmp_path / "run.json"
    plain = to_plain(record)
    del plain["seed"]
    path.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"an object with the keys \['seed'\], too"):
        read_record(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="which is not JSON"):
        read_record(path)


def test_records_hold_finite_numbers_and_plain_values_only():
    with pytest.raises(ValueError, match="value got nan; a record holds finite numbers"):
        to_plain(PositionBucket(1, 2, 1, math.nan))
    with pytest.raises(TypeError, match="value got a Tensor"):
        to_plain({"loss": torch.ones(1)})
    with pytest.raises(TypeError, match=r"value got the keys \[3\]; JSON keys must be strings"):
        to_plain({3: "layer"})
