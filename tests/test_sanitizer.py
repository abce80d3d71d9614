"""compute-sanitizer finds nothing in the kernels, and finds what is planted. On a GPU, where the tool is installed (`-m gpu`)."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("sanitized_kernels.py")
TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)
HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
PORTABLE = {
    "forward_kernel",
    "decode_kernel",
    "combine_kernel",
    "grad_query_kernel",
    "grad_key_value_kernel",
    "count_steps_kernel",
    "add_parts_kernel",
}
HOPPER = {
    "describe_kernel",
    "describe_columns_kernel",
    "assign_kernel",
    "transpose_bank_kernel",
    "forward_kernel",
    "small_forward_kernel",
    "prepare_kernel",
    "backward_kernel",
    "store_kernel",
    "key_pass_kernel",
    "query_pass_kernel",
    "add_parts_kernel",
}
needs_hopper = pytest.mark.skipif(not HAS_HOPPER, reason="needs compute capability 9.0")
pytestmark = pytest.mark.gpu


def sanitized(tool: str, part: str) -> tuple[str, int]:
    """What the tool says of a part of the program, and the number of errors or hazards in its summary."""
    if TOOL is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    # Every tensor is an allocation of its own, or reads past one would end in the next.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = (TOOL, "--tool", tool, sys.executable, str(PROGRAM), part)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer says that it does not support this device")
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", said)
    assert summary, said[-4000:]
    return said, int(summary[1])


@cache
def finds_what_is_planted(tool: str) -> bool:
    said, errors = sanitized(tool, "planted")
    planted = {"memcheck": "planted_overrun_kernel", "racecheck": "planted_race_kernel"}[tool]
    return errors > 0 and planted in said


@cache
def finds_hazards_where_none_are(tool: str) -> bool:
    _, errors = sanitized(tool, "ordered")
    return errors > 0


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    ("part", "kernels"),
    [("portable", PORTABLE), pytest.param("hopper", HOPPER, marks=needs_hopper)],
    ids=["portable", "hopper"],
)
def test_the_kernels_are_clean(part, kernels, tool):
    assert finds_what_is_planted(tool)
    if part == "hopper" and finds_hazards_where_none_are(tool):
        assert tool == "racecheck"
        pytest.skip(
            "racecheck finds hazards in a kernel without any, which its warps' barriers order: it cannot judge the kernels for Hopper"
        )
    said, errors = sanitized(tool, part)
    assert errors == 0, said[:4000]
    launched = json.loads(re.findall(r"^\{.*\}$", said, re.MULTILINE)[-1])
    assert kernels <= launched.keys(), launched
