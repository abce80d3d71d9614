"""The kernels for Hopper compile without such a GPU, fit into its shared memory and keep their products asynchronous."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_blocksparse.ops.triton.tile_sizes import SHARED_MEMORY_BYTES

SHARING = ("small_forward", "key_pass", "query_pass")  # two programs of them on a multiprocessor
RESERVED_BYTES = 1024  # of shared memory, by each program
SCRIPT = Path(__file__).with_name("compile_hopper_kernels.py")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(SCRIPT.parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_variant_compiles(records):
    for kernel in ("forward", "backward", *SHARING):
        variants = {(r["head_dim"], r["dtype"]) for r in records if r["kernel"] == kernel}
        assert {head_dim for head_dim, _ in variants} == {64, 96, 128}
        assert {dtype for _, dtype in variants} == {"torch.bfloat16", "torch.float16"}
    assert {r["head_dim"] for r in records if "parts" in r["kernel"]} == {64, 128}


def test_a_program_fits_into_shared_memory(records):
    for record in records:
        assert record["shared"] <= SHARED_MEMORY_BYTES["sm_90"], record
        if record["kernel"] in SHARING:
            of_two = 2 * (record["shared"] + RESERVED_BYTES)
            assert of_two <= SHARED_MEMORY_BYTES["sm_90"] + RESERVED_BYTES, record


def test_writes_are_ordered_before_the_arrival_that_announces_them(records):
    """compute-sanitizer's racecheck cannot judge this (`test_sanitizer.py`)."""
    for record in records:
        number, unordered = record["arrivals"]
        assert number > 0 == unordered, record


def test_parameters_are_laid_out_as_the_kernel_declares_them(records):
    for record in records:
        assert record["laid_out"] == record["declared"], record


def test_products_run_asynchronously(records):
    """ptxas says C7512 or C7514 where it waits for every product of tensor cores by itself."""
    for record in records:
        assert record["serialized"] == [], record


def test_loops_of_full_tiles_hardly_spill_registers(records):
    """Of both consumers, or where there is one, of its loops without and with masks. What is spilled once per tile does no harm.

    In the backward kernel, tiles of head size 64 alone take 224 of a thread's 240 registers, so addresses are spilled there.
    """
    for record in records:
        allowed = 0
        if record["kernel"].startswith("backward"):
            allowed = 2 if record["head_dim"] > 64 else 40
        elif record["kernel"] in SHARING:
            without_masks, _ = record["spills_in_full_loops"]
            assert without_masks == 0, record
            allowed = 2
        assert all(spills <= allowed for spills in record["spills_in_full_loops"]), record
