"""The script that measures training steps at short lengths, on a model of two layers."""

import pytest
import short_steps
import torch
from short_steps import COMPUTES_SDPA, FORMS, LAYOUTS, Measurement, Results

from hf_blocksparse.run_record import from_plain, read_record

SMALL = (
    "--device=cpu", "--num-layers=2", "--hidden-size=32", "--num-heads=4", "--num-kv-heads=2",
    "--vocab-size=100", "--rounds=2", "--steps=1",
)  # fmt: skip
ON_A_CPU = [form for form in FORMS if form != "flex_attention"]  # it has no backward there


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_every_form_is_measured_and_compared(checkpointing, tmp_path, capsys):
    output = tmp_path / "steps.json"
    more = ["--gradient-checkpointing"] if checkpointing else []
    lengths = ["--lengths", "20", "33"]
    short_steps.main([*SMALL, *more, *lengths, "--forms", *ON_A_CPU, f"--output={output}"])
    record = read_record(output)
    assert record.arguments["gradient_checkpointing"] is checkpointing
    rows = from_plain(Results, record.results).measurements
    assert [(row.length_tokens, row.form) for row in rows] == [
        (length, form) for length in (20, 33) for form in ON_A_CPU
    ]
    for row in rows:
        assert len(row.step_seconds) == len(row.thread_seconds) == 2
        assert min(row.step_seconds) > 0
        if row.form in COMPUTES_SDPA:
            assert row.relative_error < 1e-4, row
        else:
            assert row.relative_error is None, row
    assert all(FORMS[form] in capsys.readouterr().out for form in ON_A_CPU[:1])


def test_a_run_that_is_cut_short_keeps_the_lengths_it_has(tmp_path, monkeypatch):
    def stop_at_33(models, tokens, arguments):
        if tokens.shape[1] == 33:
            raise KeyboardInterrupt
        return measure_length(models, tokens, arguments)

    measure_length = short_steps.measure_length
    monkeypatch.setattr(short_steps, "measure_length", stop_at_33)
    output = tmp_path / "steps.json"
    options = [*SMALL, "--lengths", "20", "33", "--forms", "sdpa", "sparse", f"--output={output}"]
    with pytest.raises(KeyboardInterrupt):
        short_steps.main(options)
    rows = from_plain(Results, read_record(output).results).measurements
    assert [(row.length_tokens, row.form) for row in rows] == [(20, "sdpa"), (20, "sparse")]


def test_the_models_compute_what_their_form_says():
    arguments = short_steps.parse_args([*SMALL, "--forms", *ON_A_CPU])
    models = short_steps.build_models(arguments)
    tokens = torch.randint(0, 100, (1, 400))
    gradients = {form: short_steps.train_step(model, tokens) for form, model in models.items()}
    for form in ("sparse", "none"):
        assert not torch.allclose(gradients[form], gradients["sdpa"], rtol=1e-2)
    assert all(model.get_input_embeddings().weight.grad is None for model in models.values())
    assert LAYOUTS["dense_kernels"].window >= short_steps.LONGEST_TOKENS


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--forms", "sparse"], "compared with 'sdpa'"), (["--lengths", "9000"], "8192 positions")],
)
def test_what_cannot_be_measured_is_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        short_steps.parse_args(options)
    assert message in capsys.readouterr().err


def test_the_table_has_a_line_per_row():
    row = Measurement("sparse", 512, (0.02, 0.04, 0.03), (0.01, 0.01, 0.02), 0.95, None)
    *_, line = short_steps.table(Results((row,))).splitlines()
    assert line.split() == ["512", "patched,", "SinkWindow(sink=64,", "window=256)", "30.00", "0.950", "10.00"]  # fmt: skip
