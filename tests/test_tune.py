"""The tuning script on a CPU: candidates are what runs, are judged before they are timed, and the record says so."""

from dataclasses import replace

import pytest
import torch
import tune
from tune import KERNELS, Setting, candidates_of, chosen, main

from hf_blocksparse.ops.triton import launch
from hf_blocksparse.ops.triton.tile_sizes import TileSizes
from hf_blocksparse.run_record import from_plain, read_record

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are interpreted, where there is no GPU"
)
TINY = ["--device", "cpu", "--dtypes", "float32", "--head-dims", "16", "--rounds", "1"]


@pytest.fixture
def one_small_case(monkeypatch):
    """Two heads of what the script runs sixteen of; a budget that fits."""

    def small(setting, length):
        cases = as_ever(setting, length)
        return tuple(replace(case, heads=2, kv_heads=1) for case in cases[:1])

    as_ever = tune.cases_of
    monkeypatch.setattr(tune, "cases_of", small)


@pytest.mark.parametrize("kernel", ["forward", "decode", "gathered_grad_key_value"])
def test_one_candidate_of_a_kernel(kernel, tmp_path, one_small_case, capsys):
    path = tmp_path / "tune.json"
    length = "4608" if kernel == "decode" else "256"
    options = ["--kernels", kernel, "--length-tokens", length, "--limit-candidates", "1"]
    main([*TINY, *options, "--output", str(path)])
    results = from_plain(tune.TuneResults, read_record(path).results)
    for tuned in results.tuned:
        (candidate,) = tuned.candidates
        assert candidate.is_in_table and candidate.sizes == tuned.best and not candidate.failure
        assert candidate.relative_error < 1e-4 and candidate.median_ms[0] > 0
    assert f"{kernel} float32:" in capsys.readouterr().out
    main([*TINY, *options, "--output", str(path), "--resume"])
    assert from_plain(tune.TuneResults, read_record(path).results) == results


def test_a_wrong_candidate_is_a_failure(one_small_case, monkeypatch):
    monkeypatch.setattr(tune, "relative_error", lambda *_: 0.5)
    arguments = tune.parse_args([*TINY, "--length-tokens", "256", "--limit-candidates", "1"])
    tuned = tune.tune(Setting("forward", 16, "float32", 64), arguments)
    assert tuned.best is None
    assert "wrong by 5.00e-01 of the exact answer" in tuned.candidates[0].failure
    assert "failed: ArithmeticError" in tune.table([tuned])


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_chosen_sizes_are_those_of_one_kernel(kernel):
    setting = Setting(kernel, 64, "bfloat16", 64)
    before = launch.tile_sizes, launch.gathered_tile_sizes, launch.decode_sizes
    facts = ("cuda", 90, tune.direction_of(kernel), 64, 64, 2, 32)
    with chosen(setting, (64, 32, 4, 1)):
        if kernel == "decode":
            sizes = launch.decode_sizes("cuda", 90, 64, 64, 2, 32)
            assert (sizes.tile_kv, sizes.max_rows) == (64, 32)
        elif kernel.startswith("gathered"):
            assert launch.gathered_tile_sizes(*facts) == TileSizes(64, 32, 4, 1, strip=32)
            assert launch.tile_sizes(*facts) == before[0](*facts)
            assert launch.narrow_tile_sizes(*facts) is None
        else:
            assert launch.tile_sizes(*facts) == TileSizes(64, 32, 4, 1)
            assert launch.gathered_tile_sizes(*facts) is None
    assert before == (launch.tile_sizes, launch.gathered_tile_sizes, launch.decode_sizes)


def test_candidates_hold_the_tables_own_row_once():
    for kernel in KERNELS:
        for grain in tune.GRAINS:
            setting = Setting(kernel, 64, "bfloat16", grain)
            candidates = candidates_of(setting)
            assert candidates[0] == tune.table_row(setting)
            assert len(set(candidates)) == len(candidates) > 2
