"""The cells of the conformance matrix: every way of running works, or is refused with the reason that is written here."""

import re
from dataclasses import replace

import pytest
import torch
from conformance import run as conformance
from conformance import small_models
from conformance.matrix import ALL_FAMILIES, FEATURES, Run, judge, run_cell
from conformance.reasons import expected_cell
from conformance.small_models import NotBuiltError, families
from conformance.sweep import examine, families_alone
from conformance.verdict import NOT_BUILT, REFUSED, WORKS, WRONG, Verdict

from hf_blocksparse import Dense, SlidingWindow, transformers_hook
from hf_blocksparse.run_record import read_record, write_record
from hf_blocksparse.sequences import Sequences

# All features run for these in every test run, for the others with -m slow.
FAST = ("llama", "gemma3", "gpt2", "modernbert", "t5", "whisper")


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ALL_FAMILIES],
)
def test_cell(family, feature):
    outcome, reason = expected_cell(ALL_FAMILIES[family], FEATURES[feature])
    cell = run_cell(ALL_FAMILIES[family], FEATURES[feature])
    assert (cell.outcome, bool(re.search(reason, cell.reason))) == (outcome, True), cell


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_layout_matters(family):
    """Otherwise a cell would work without any attention."""
    family = ALL_FAMILIES[family]
    model = family.model()
    dense = FEATURES["whole"].run(Run(family, model, is_patched=False))["logits"]
    with judge(family, FEATURES["whole"], model):
        sparse = FEATURES["whole"].run(Run(family, model, is_patched=False))["logits"]
    assert (sparse - dense).abs().max() > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "bert", "vit"])
def test_a_patched_model_moves_to_the_gpu(family):
    assert run_cell(ALL_FAMILIES[family], FEATURES["moved"]).outcome == WORKS


def ignore_padding(mask):
    batch, _, query_len, kv_len = mask.shape
    start = kv_len - query_len
    mask._sequences = Sequences.uniform(batch, query_len, kv_len, start, mask.device)
    mask.dense = None


def ignore_window(mask):
    mask.window_tokens = None


def ignore_causality(mask):
    mask.is_causal = False


def count_from_the_first_row(mask):
    table = mask.sequences.table.clone()
    table[:, 3] = table[:, 1]
    table[:, 6] = table[:, 4]
    mask._sequences = Sequences(
        **{
            name: getattr(mask.sequences, name)
            for name in ("batch", "query_len", "kv_len", "query_end", "key_end")
        },
        table=table,
        covers_queries=False,
        covers_keys=False,
    )


@pytest.mark.parametrize(
    ("break_mask", "family", "features"),
    [
        (
            ignore_padding,
            "llama",
            ("left_padding", "packed_positions", "dynamic_cache", "beam_search"),
        ),
        (ignore_window, "gemma3", ("whole", "right_padding", "sliding_cache", "assisted")),
        (
            ignore_causality,
            "llama",
            ("whole", "right_padding", "checkpointing", "bfloat16", "autocast"),
        ),
        (
            count_from_the_first_row,
            "llama",
            (
                "left_padding",
                "packed_positions",
                "dynamic_cache",
                "static_cache",
                "chunked_prefill",
            ),
        ),
    ],
)
def test_the_matrix_notices_a_broken_mask(break_mask, family, features, monkeypatch):
    read_mask = transformers_hook._read_mask

    def broken(*arguments):
        mask = read_mask(*arguments)
        mask = mask.clone()
        break_mask(mask)
        return mask

    monkeypatch.setattr(transformers_hook, "_read_mask", broken)
    for feature in features:
        with pytest.raises(AssertionError):
            run_cell(ALL_FAMILIES[family], FEATURES[feature])


@pytest.mark.parametrize(
    ("broken", "features"),
    [
        (
            lambda layout, window, chunk: SlidingWindow(window or 200),
            ("whole", "prefill_chunk_size"),
        ),
        (lambda layout, window, chunk: layout, ("whole", "dynamic_cache", "offloaded")),
    ],
    ids=["the layout is ignored", "the window is ignored"],
)
def test_the_matrix_notices_a_broken_layout(broken, features, monkeypatch):
    monkeypatch.setattr(transformers_hook, "within", broken)
    for feature in features:
        with pytest.raises(AssertionError):
            run_cell(ALL_FAMILIES["gemma3"], FEATURES[feature])


def test_the_matrix_notices_gradients_alone(monkeypatch):
    """The outputs are right, the gradient of the values is not."""
    attend = transformers_hook.block_sparse_attention

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.view_as(value)

        @staticmethod
        def backward(ctx, gradient):
            return 1.01 * gradient

    monkeypatch.setattr(
        transformers_hook,
        "block_sparse_attention",
        lambda query, key, value, *rest, **options: attend(
            query, key, Doubled.apply(value), *rest, **options
        ),
    )
    for feature in (
        "whole",
        "left_padding",
        "packed_lengths",
        "checkpointing",
        "own_sliding_layers",
    ):
        with pytest.raises(AssertionError):
            run_cell(ALL_FAMILIES["gemma3"], FEATURES[feature])


THEIR_TESTS = """
import pytest, torch
from transformers import LlamaConfig, LlamaModel

MODEL = LlamaModel(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
IDS = torch.ones(1, 4, dtype=torch.long)


def test_both():
    assert MODEL.config._attn_implementation == "sdpa"
    MODEL(IDS)


def test_without_attention():
    pass


def test_theirs_alone():
    MODEL(IDS, position_bias=torch.zeros(1))


def test_neither():
    MODEL(torch.full_like(IDS, 9))


@pytest.mark.skip
def test_skipped():
    pass


def test_fsdp2_left_out():
    raise AssertionError
"""


@pytest.mark.slow
def test_their_tests_run_with_ours_and_again_with_theirs(tmp_path):
    folder = tmp_path / "tests" / "models" / "llama"
    folder.mkdir(parents=True)
    (folder / "test_modeling_llama.py").write_text(THEIR_TESTS)
    arguments = [
        "--transformers-tests",
        tmp_path,
        "--outcomes",
        tmp_path / "outcomes",
        "--families",
        "llama",
    ]
    arguments = [*map(str, arguments), "--output", str(tmp_path / "record.json")]
    with pytest.raises(ValueError, match="again got 'refused', but there is no record"):
        conformance.main(["suite", *arguments, "--again", "refused"])
    conformance.main(["suite", *arguments])
    record = read_record(tmp_path / "record.json")
    commit = record.environment.git_commit
    expected = {
        "passed": 2,
        "skipped": 1,
        "failed": 2,
        "through_our_attention": 1,
        "failed_with_both": 1,
        "theirs_only": {"test_theirs_alone": "relative position biases are refused"},
        "git_commit": commit,
    }
    assert record.results == {"llama": expected}

    # Other families and other reasons stay; what passes now is counted.
    other = expected | {"git_commit": "before"}
    write_record(
        replace(record, results={"llama": expected, "t5": other}), tmp_path / "record.json"
    )
    conformance.main(["suite", *arguments, "--again", "dropout"])
    assert read_record(tmp_path / "record.json").results == {"llama": expected, "t5": other}
    tests = folder / "test_modeling_llama.py"
    tests.write_text(tests.read_text().replace(", position_bias=torch.zeros(1)", ""))
    conformance.main(["suite", *arguments, "--again", "refused"])
    better = {"passed": 3, "failed": 1, "through_our_attention": 2, "theirs_only": {}}
    better["git_commit_again"] = commit
    results = read_record(tmp_path / "record.json").results
    assert results == {"llama": expected | better, "t5": other}


def test_a_record_holds_one_version_of_what_is_tested(tmp_path):
    record = read_record(conformance.RESULTS / "conformance_suite.json")
    packages = record.environment.packages | {"transformers": "5.0.0"}
    environment = replace(record.environment, packages=packages)
    write_record(replace(record, environment=environment), tmp_path / "record.json")
    arguments = ["--transformers-tests", str(tmp_path), "--output", str(tmp_path / "record.json")]
    with pytest.raises(ValueError, match="made with transformers 5.0.0, but .* another --output"):
        conformance.main(["suite", *arguments])


def test_the_page_is_made_of_the_records():
    suite, matrix, sweep = (
        read_record(conformance.RESULTS / f"conformance_{name}.json")
        for name in ("suite", "matrix", "sweep")
    )
    page = conformance.make_table(suite, matrix, sweep)
    assert conformance.TABLE.read_text(encoding="utf-8") == page
    outcomes = {verdict["outcome"] for made in sweep.results.values() for verdict in made.values()}
    assert outcomes == {WORKS, REFUSED, NOT_BUILT}
    assert set(matrix.results) == set(ALL_FAMILIES) and set(suite.results) <= set(
        conformance.SUITE_FAMILIES
    )
    for family, cells in matrix.results.items():
        assert set(cells) == set(FEATURES)
        for name, cell in cells.items():
            release = matrix.environment.packages["transformers"]
            outcome, reason = expected_cell(ALL_FAMILIES[family], FEATURES[name], release)
            assert cell["outcome"] == outcome and re.search(reason, cell["reason"]), (family, name)


# Through the interface; by a replaced module whose masks are its own; beside layers that are not attention; refused.
@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("granite", WORKS, ""),
        ("falcon", WORKS, "a changed token"),
        ("recurrent_gemma", WORKS, ""),
        ("rwkv", REFUSED, "do not go through transformers' attention interface"),
        ("reformer", NOT_BUILT, "axial_pos_embds"),
    ],
)
def test_sweep_of_a_family(name, outcome, reason):
    verdict = examine_causal(name)
    assert (verdict.outcome, bool(re.search(reason, verdict.reason))) == (outcome, True), verdict


@pytest.mark.parametrize("name", ["granite", "falcon"])
def test_sweep_notices_a_layout_that_is_ignored(name, monkeypatch):
    attend = transformers_hook.block_sparse_attention
    monkeypatch.setattr(
        transformers_hook,
        "block_sparse_attention",
        lambda *tensors, layout, **options: attend(*tensors, layout=Dense(), **options),
    )
    assert examine_causal(name).outcome == WRONG


def test_what_a_family_is_without_our_import(tmp_path, monkeypatch):
    """In a process that never sees it; what differs beside the import is wrong, not "not built"."""
    alone = families_alone(tmp_path, ["granite", "reformer"])
    assert set(alone) == {("causal", "granite"), ("causal", "reformer"), ("masked", "reformer")}
    logits, reason = alone["causal", "granite"], alone["causal", "reformer"]
    assert "axial_pos_embds" in reason
    assert examine_causal("granite", logits).outcome == WORKS
    assert examine_causal("reformer", reason).outcome == NOT_BUILT
    assert examine_causal("granite", reason) == Verdict(
        WRONG, f"built beside our import only; without it: {reason}"
    )
    moved = [row + 1e-2 for row in logits]
    assert examine_causal("granite", moved) == Verdict(WRONG, "our import changes the logits")

    def fail(*args):
        raise NotBuiltError("a fault of our import")

    monkeypatch.setattr(small_models, "build", fail)
    assert examine_causal("granite", logits) == Verdict(
        WRONG, "not built beside our import: a fault of our import"
    )


def examine_causal(wanted: str, alone: list[torch.Tensor] | str | None = None) -> Verdict:
    return next(
        examine(kind, config_class, model_class, alone)
        for kind, name, config_class, model_class in families()
        if (kind, name) == ("causal", wanted)
    )
