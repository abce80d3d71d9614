"""The benchmark gives its peers the mask it claims, and writes what it measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import benchmark

SETTING = benchmark.Setting("cpu", "float32", 1, 2, 2, 256, 32, 10, 0)


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("name", benchmark.LAYOUTS)
def test_peers_get_the_layouts_mask(name, block_size):
    layout, is_causal = benchmark.make_layout(name, block_size, SETTING)
    expected = layout.to_mask(256, is_causal=is_causal, num_heads=2)
    mask = benchmark.mask_function(name, layout, block_size, SETTING)
    place = torch.arange(256)
    for head in range(2):
        kept = mask(torch.tensor(0), torch.tensor(head), place[:, None], place[None])
        assert torch.equal(kept.expand(256, 256), expected[head])
    partial, full = benchmark.block_matrices(layout, is_causal, SETTING, 64)
    blocks = expected.view(2, 4, 64, 4, 64)
    assert torch.equal(full, blocks.all(-1).all(2))
    assert torch.equal(partial | full, blocks.any(-1).any(2))


def test_cpu_run_writes_times_of_both_directions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "CPU_PROCESSES", 1)
    output = tmp_path / "benchmark.json"
    benchmark.main(
        ["--device", "cpu", "--length-tokens", "256", "--heads", "2", "--repetitions", "2"]
        + ["--output", str(output)]
    )
    record = json.loads(output.read_text())
    rows = {(m["implementation"], m["direction"]): m for m in record["results"]["measurements"]}
    assert rows.keys() == {(i, d) for i in ("ours", "sdpa") for d in ("forward", "backward")}
    assert all(row["median_ms"] > 0 and row["peak_mib"] >= 0 for row in rows.values())
    assert rows["ours", "forward"]["relative_error"] < 1e-4
    lengths = [row["length_tokens"] for row in record["results"]["index"]]
    assert lengths == [1 << 14, 1 << 17, 1 << 20]
    per_tile = [row["index_bytes"] / row["num_tiles"] for row in record["results"]["index"]]
    assert max(per_tile) < 1.2 * min(per_tile)  # memory is linear in the tiles kept
    assert "sdpa" in capsys.readouterr().out
