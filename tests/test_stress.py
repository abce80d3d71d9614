"""The stress program itself, on a CPU: that its calls are what they say, and that a miss is seen and can be made again."""

import math

import pytest
import scenarios
import stress_kernels
import torch
from stress_kernels import FAMILIES, draw, main

from hf_blocksparse.run_record import from_plain, read_record

SMALL = ["--device", "cpu", "--longest", "65", "--families", "2"]


def test_a_call_follows_from_its_number():
    for implementation in FAMILIES:
        for number in range(40):
            families = FAMILIES[implementation]
            scenario = draw(implementation, number, len(families), 900)
            assert scenario == draw(implementation, number, len(families), 900)
            assert scenario.head_dim == families[number % len(families)].head_dim
            assert scenario.layout.grain == families[number % len(families)].grain
            assert scenario.mask().shape[-2:] == (scenario.query_len, scenario.kv_len)


def test_a_run_is_recorded(tmp_path):
    path = tmp_path / "record.json"
    assert main([*SMALL, "--cases", "2", "--processes", "2", "--output", str(path)]) == 0
    record = read_record(path)
    results = from_plain(stress_kernels.StressResults, record.results)
    assert results.cases == {"auto": 2, "triton": 2} and not results.misses
    for kernel in results.kernels.values():
        assert 0 < kernel.worst_ratio <= 1 and kernel.cases <= 2
    assert {"auto: triton grad_query_kernel", "triton: triton forward_kernel"} <= set(
        results.kernels
    )


def test_a_miss_is_seen_and_names_its_command(monkeypatch):
    """In this process, so that the kernels' answer can be spoiled."""
    answers = []

    class Answers:
        put = staticmethod(answers.append)

    def spoiled(scenario, inputs, impl, calls):
        results = as_ever(scenario, inputs, impl)
        results.grad_key.view(-1)[0] += 1.0
        return results

    as_ever = scenarios.results_of_kernels
    monkeypatch.setattr(scenarios, "results_of_kernels", spoiled)
    arguments = stress_kernels.parse_args(
        [*SMALL, "--implementations", "triton", "--first", "2", "--cases", "1"]
    )
    threads = torch.get_num_threads()
    try:
        stress_kernels.work(0, arguments, math.inf, Answers)
    finally:
        torch.set_num_threads(threads)
    start, done, end = answers
    assert start == (0, "start", "triton", 2) and end == (0, "end")
    tally = stress_kernels.Tally(arguments)
    tally.add(*done[2:])
    (miss,) = tally.results().misses
    assert "grad_key errs by 1.0" in miss.message
    assert miss.command == (
        "python tests/stress_kernels.py --implementations triton --first 2 --cases 1 --families 2 --longest 65 --device cpu"
    )


@pytest.mark.parametrize(
    ("option", "value"), [("--families", "15"), ("--cases", "0"), ("--processes", "0")]
)
def test_options_out_of_range_are_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        main([option, value])
    assert f"{option} got {value}; it must be at least 1" in capsys.readouterr().err
