"""The kernels compile for GPUs that need not be here, and one program fits into their shared memory."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_blocksparse.ops.triton.tile_sizes import SHARED_MEMORY_BYTES

SCRIPT = Path(__file__).with_name("compile_kernels.py")
LIMITS = {name: SHARED_MEMORY_BYTES[name] for name in ("sm_80", "sm_90", "sm_100")} | {
    "gfx942": SHARED_MEMORY_BYTES["small"]
}
TENSOR_MEMORY_COLUMNS = 512
NARROW_SPILLED_BYTES = {False: 128, True: 400}
"""At most, of a thread over narrow tiles, by whether the kernel has every feature: an eighth and two fifths of its registers."""


@pytest.fixture(scope="module")
def compilations(request, tmp_path_factory):
    """Runs `compile_kernels.py` for each target that a selected test names, as many at a time as there are cores, with an empty cache."""
    targets = [
        item.callspec.params["target"]
        for item in request.session.items
        if item.path == request.path and "target" in item.fixturenames
    ]
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(SCRIPT.parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    )

    def compile_for(target: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(SCRIPT), target]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    targets = list(dict.fromkeys(targets))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield dict(zip(targets, pool.map(compile_for, targets), strict=True))


@pytest.mark.parametrize("target", LIMITS)
def test_kernels_compile_and_fit(compilations, target):
    done = compilations[target]
    assert done.returncode == 0, done.stderr[-4000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["kernel"] for record in records} == {
        "forward",
        "grad_query",
        "grad_key_value",
        "add_parts",
        "decode",
        "combine",
    }
    for record in records:
        assert record["shared"] <= LIMITS[target], record
        assert (record.get("tensor_memory") or 0) <= TENSOR_MEMORY_COLUMNS, record
        assert record.get("laid_out") == record.get("declared"), record
        assert ("declared" in record) == target.startswith("sm_")


@pytest.mark.parametrize("target", ["sm_90"])
def test_kernels_over_narrow_tiles_hardly_spill_registers(compilations, target):
    done = compilations[target]
    assert done.returncode == 0, done.stderr[-4000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    narrow = [
        r
        for r in records
        if r["case"]["narrow"] and r["kernel"] in ("forward", "grad_query", "grad_key_value")
    ]
    sizes = {(r["kernel"], r["case"]["head_dim"], r["case"]["block_size"]) for r in narrow}
    assert len(sizes) == 12  # every row of the table
    for record in narrow:
        allowed = NARROW_SPILLED_BYTES[record["case"]["features"]]
        assert record["spilled_bytes"] <= allowed, record
