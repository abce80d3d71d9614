"""The comparison with torch.nn.MultiheadAttention: which forms compute causal attention, and that the script runs."""

import subprocess
import sys
from pathlib import Path

import memory_vs_dense
import pytest

from hf_blocksparse.run_record import from_plain, read_record

SCRIPT = Path(__file__).parents[1] / "scripts" / "memory_vs_dense.py"
SMALL = ["--device=cpu", "--batch-size=1", "--length-tokens=96", "--embedding-size=128"]
SMALL += ["--repetitions=2"]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_all_forms_but_the_published_dense_one_compute_causal_attention(dropout):
    setting = memory_vs_dense.resolve(memory_vs_dense.parse_args([*SMALL, f"--dropout={dropout}"]))
    for form in memory_vs_dense.FORMS:
        measured = memory_vs_dense.measure_form(setting, form, "forward_backward")
        assert len(measured.cost.seconds) == 2
        if form == "dense_published":
            assert measured.max_difference > 0.1 * measured.output_magnitude
        else:
            assert measured.max_difference < 1e-5 * measured.output_magnitude


def test_main_prints_a_table_and_writes_the_record(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        memory_vs_dense, "in_fresh_process", lambda function, *args: function(*args)
    )
    path = tmp_path / "record.json"
    memory_vs_dense.main([*SMALL, f"--output={path}"])

    record = read_record(path)
    results = from_plain(memory_vs_dense.Results, record.results)
    assert record.arguments["dtype"] == "float32" and record.arguments["device"] == "cpu"
    assert [m.form for m in results.measurements] == 2 * list(memory_vs_dense.FORMS)
    printed = capsys.readouterr().out
    assert all(printed.count(title) == 2 for title in memory_vs_dense.FORMS.values())
    assert memory_vs_dense.table(results) in printed


@pytest.mark.slow
def test_the_script_runs_each_form_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "record.json"
    subprocess.run([sys.executable, SCRIPT, *SMALL, f"--output={path}"], check=True)
    measurements = read_record(path).results["measurements"]
    assert all(m["cost"]["peak_bytes"] > m["cost"]["resting_bytes"] > 0 for m in measurements)
