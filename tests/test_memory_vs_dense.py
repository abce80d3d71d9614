"""The comparison with torch.nn.MultiheadAttention: which forms compute causal attention, and that the script runs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from hf_blocksparse.run_record import from_plain, read_record

SCRIPT = Path(__file__).parents[1] / "scripts" / "memory_vs_dense.py"
SMALL = ["--device=cpu", "--batch-size=1", "--length-tokens=96", "--embedding-size=128"]
SMALL += ["--repetitions=2"]


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules[SCRIPT.stem] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules[SCRIPT.stem]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_all_forms_but_the_published_dense_one_compute_causal_attention(script, dropout):
    setting = script.resolve(script.parse_args([*SMALL, f"--dropout={dropout}"]))
    for form in script.FORMS:
        measured = script.measure_form(setting, form, "forward_backward")
        assert len(measured.cost.seconds) == 2
        if form == "dense_published":
            assert measured.max_difference > 0.1 * measured.output_magnitude
        else:
            assert measured.max_difference < 1e-5 * measured.output_magnitude


def test_main_prints_a_table_and_writes_the_record(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(script, "in_fresh_process", lambda function, *args: function(*args))
    path = tmp_path / "record.json"
    script.main([*SMALL, f"--output={path}"])

    record = read_record(path)
    results = from_plain(script.Results, record.results)
    assert record.arguments["dtype"] == "float32" and record.arguments["device"] == "cpu"
    assert [m.form for m in results.measurements] == 2 * list(script.FORMS)
    printed = capsys.readouterr().out
    assert all(printed.count(title) == 2 for title in script.FORMS.values())
    assert script.table(results) in printed


@pytest.mark.slow
def test_the_script_runs_each_form_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "record.json"
    subprocess.run([sys.executable, SCRIPT, *SMALL, f"--output={path}"], check=True)
    measurements = read_record(path).results["measurements"]
    assert all(m["cost"]["peak_bytes"] > m["cost"]["resting_bytes"] > 0 for m in measurements)
