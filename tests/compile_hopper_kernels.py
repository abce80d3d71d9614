"""Compiles the kernels for Hopper, with or without such a GPU.

    python tests/compile_hopper_kernels.py

prints one JSON line per variant: the shared memory of one program, the sizes of its parameters as the package lays them out and as the PTX
declares them, what ptxas says of products that it puts one after the other, arrivals at barriers, bytes of spilled registers, how many
loads and stores of them stand in the loops of full tiles, and products whose addresses nothing sets.
A program of its own because it replaces Triton's driver.
"""

import json
import re
import subprocess
import tempfile
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import triton
from parameter_sizes import sizes_in_ptx, sizes_laid_out
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import MockTensor

from hf_blocksparse.ops import hopper
from hf_blocksparse.ops.hopper.backward_kernel import backward_kernel
from hf_blocksparse.ops.hopper.forward_kernel import forward_kernel
from hf_blocksparse.ops.hopper.key_pass_kernel import key_pass_kernel
from hf_blocksparse.ops.hopper.query_pass_kernel import query_pass_kernel
from hf_blocksparse.ops.hopper.small_forward_kernel import small_forward_kernel

CAPABILITY = 90
PARTS_OF_TWO_PRODUCTS = 12  # instructions, at head size 64
VARIANTS = (
    ("forward", 64, torch.bfloat16),
    ("forward", 96, torch.float16),
    ("forward", 128, torch.bfloat16),
    ("forward", 128, torch.float16),
    ("backward", 64, torch.bfloat16),
    ("backward", 96, torch.float16),
    ("backward", 128, torch.bfloat16),
    ("backward in parts", 64, torch.bfloat16),
    ("backward in parts", 128, torch.bfloat16),
    *(
        (kernel, head_dim, dtype)
        for kernel in (
            "small_forward",
            "small_forward of strips",
            "key_pass",
            "query_pass",
        )
        for head_dim, dtype in ((64, torch.bfloat16), (96, torch.float16), (128, torch.bfloat16))
    ),
)


class Driver:
    """As much of a driver as compiling takes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def pointer(dtype: torch.dtype) -> MockTensor:
    return MockTensor(dtype, [1 << 20])


def descriptor(
    rows: int, head_dim: int, dtype: torch.dtype, columns: int | None = None
) -> TensorDescriptor:
    shape = [2, 4, 1000, head_dim]
    columns = columns or hopper._padded(head_dim)
    strides = [4 * 1000 * head_dim, head_dim, 4 * head_dim, 1]
    layout = hopper._layout(rows, columns, dtype)
    return TensorDescriptor(MockTensor(dtype, shape), shape, strides, [1, 1, rows, columns], layout)


def compile_forward(head_dim: int, dtype: torch.dtype) -> Any:
    int_pointer = pointer(torch.int32)
    return forward_kernel.warmup(
        descriptor(hopper.TILE // 2, head_dim, dtype),
        descriptor(hopper.TILE, head_dim, dtype),
        descriptor(hopper.TILE, head_dim, dtype),
        descriptor(hopper.TILE // 2, head_dim, dtype),
        pointer(dtype),
        4 * 1000 * head_dim,
        head_dim,
        4 * head_dim,
        pointer(torch.float32),
        int_pointer,
        int_pointer,
        int_pointer,
        int_pointer,
        int_pointer,
        0.1,
        4,
        2,
        1000,
        1000,
        grid=(1,),
        num_warps=4,
        enable_fp_fusion=True,
        **hopper.forward_constants(head_dim),
    )


def compile_backward(head_dim: int, dtype: torch.dtype, in_parts: bool = False) -> Any:
    int_pointer = pointer(torch.int32)
    float_pointer = pointer(torch.float32)
    constants = hopper.backward_constants(head_dim, in_parts)
    rows = descriptor(constants["STEP"], head_dim, dtype)
    half = descriptor(hopper.TILE // 2, head_dim, dtype)
    sums = MockTensor(torch.float32, [1 << 10, 32])
    strides = (4 * 1000 * head_dim, head_dim, 4 * head_dim)
    return backward_kernel.warmup(
        rows,
        half,
        half,
        rows,
        TensorDescriptor(sums, [1 << 10, 32], [32, 1], [128, 32], hopper._sums_layout()),
        half,
        half,
        pointer(dtype),
        strides,
        pointer(dtype),
        strides,
        float_pointer,
        float_pointer,
        float_pointer,
        float_pointer,
        int_pointer,
        int_pointer,
        int_pointer,
        int_pointer,
        int_pointer,
        0.1,
        0.1,
        4,
        2,
        1000,
        1000,
        grid=(1,),
        num_warps=4,
        enable_fp_fusion=True,
        **constants,
    )


def strides_of(head_dim: int) -> tuple[int, int, int]:
    return 4 * 1000 * head_dim, head_dim, 4 * head_dim


def compile_small_forward(head_dim: int, dtype: torch.dtype, strip: int = hopper.SMALL_TILE) -> Any:
    int_pointer = pointer(torch.int32)
    rows = descriptor(hopper.SMALL_TILE, head_dim, dtype)
    squares = descriptor(strip, head_dim, dtype, hopper.SMALL_TILE)
    return small_forward_kernel.warmup(
        rows,
        squares,
        squares,
        rows,
        pointer(dtype),
        strides_of(head_dim),
        int_pointer,
        pointer(torch.float32),
        *(int_pointer,) * 5,
        0.1,
        4,
        2,
        1000,
        1000,
        grid=(1,),
        enable_fp_fusion=True,
        **hopper.SMALL_OPTIONS,
        **hopper.small_forward_constants(head_dim, strip),
    )


def compile_key_pass(head_dim: int, dtype: torch.dtype) -> Any:
    int_pointer, float_pointer = pointer(torch.int32), pointer(torch.float32)
    rows = descriptor(hopper.SMALL_TILE, head_dim, dtype)
    return key_pass_kernel.warmup(
        *(rows,) * 6,
        pointer(dtype),
        strides_of(head_dim),
        pointer(dtype),
        strides_of(head_dim),
        *(float_pointer,) * 4,
        *(int_pointer,) * 5,
        0.1,
        0.1,
        4,
        2,
        1000,
        1000,
        grid=(1,),
        enable_fp_fusion=True,
        **hopper.SMALL_OPTIONS,
        **hopper.key_pass_constants(head_dim),
    )


def compile_query_pass(head_dim: int, dtype: torch.dtype) -> Any:
    int_pointer, float_pointer = pointer(torch.int32), pointer(torch.float32)
    rows = descriptor(hopper.SMALL_TILE, head_dim, dtype)
    return query_pass_kernel.warmup(
        *(rows,) * 5,
        pointer(dtype),
        strides_of(head_dim),
        *(float_pointer,) * 2,
        *(int_pointer,) * 5,
        0.1,
        0.1,
        4,
        2,
        1000,
        1000,
        grid=(1,),
        enable_fp_fusion=True,
        **hopper.SMALL_OPTIONS,
        **hopper.query_pass_constants(head_dim),
    )


COMPILERS = {
    "forward": compile_forward,
    "backward": partial(compile_backward, in_parts=False),
    "backward in parts": partial(compile_backward, in_parts=True),
    "small_forward": compile_small_forward,
    "small_forward of strips": partial(compile_small_forward, strip=hopper.STRIP),
    "key_pass": compile_key_pass,
    "query_pass": compile_query_pass,
}


def ptxas_report(log: str) -> tuple[list[str], int]:
    """Its warnings that products do not run side by side, and the bytes of registers it spills."""
    serialized = [line for line in log.splitlines() if "C7512" in line or "C7514" in line]
    spilled = re.findall(r"(\d+) bytes spill stores", log)
    assert spilled, log
    return serialized, sum(map(int, spilled))


def arrivals(ptx: str) -> tuple[int, int]:
    """Arrivals at barriers in shared memory, and those of them without a barrier of the arriving thread's own warps right before.

    One thread arrives for all, and what the others have written and read must be ordered before it. Arrivals that announce bytes say
    nothing of either.
    """
    is_ordered, number, unordered = False, 0, 0
    for line in ptx.splitlines():
        if "bar.sync" in line or "bar.warp.sync" in line:
            is_ordered = True
        elif line.startswith("$") or re.search(r"\b(st\.shared|ld\.shared|ldmatrix)\b", line):
            is_ordered = False
        elif "mbarrier.arrive.shared" in line:
            number += 1
            unordered += not is_ordered
    return number, unordered


def parse(sass: str) -> tuple[list[str], dict[str, int]]:
    """Instructions, and the numbers of those that labels stand before."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    return code, labels


def spills_in_full_loops(sass: str) -> list[int]:
    """Loads and stores of local memory in each consumer's loop of full tiles: the shortest two around two products or more."""
    code, labels = parse(sass)
    loops = []
    for end, instruction in enumerate(code):
        branch = re.search(r"BRA.*`\((\.L_x?_?\w+)\)", instruction)
        body = code[labels.get(branch[1], end) : end] if branch else []
        if sum("HGMMA" in line for line in body) >= PARTS_OF_TWO_PRODUCTS:
            loops.append(body)
    loops.sort(key=len)
    return [sum("LDL" in line or "STL" in line for line in body) for body in loops[:2]]


def products_without_addresses(sass: str) -> list[str]:
    """Products of tensor cores that some way through the program reaches before their descriptors' uniform registers are set.

    ptxas has put such a register's instruction into a block that is jumped past. What is computed from an unset register counts as unset.
    """
    code, labels = parse(sass)
    code = [re.sub(r"^@!?U?P\w+\s+", "@ ", instruction) for instruction in code]
    is_set: list[set[int] | None] = [None] * len(code)
    is_set[0] = set()
    to_do = [0]
    while to_do:
        place = to_do.pop()
        before, instruction = is_set[place], code[place]
        assert before is not None
        after = before
        if written := re.match(r"(?:@ )?(\S+) (?:U?P\w+, )*UR(\d+)\b(.*)", instruction):
            first = int(written[2])
            width = 2 if ".64" in written[1] or "WIDE" in written[1] else 1
            results = set(range(first, first + width))
            sources = {int(number) for number in re.findall(r"\bUR(\d+)", written[3])}
            after = before | results if sources <= before else before - results
        for successor in successors(code, labels, place):
            known = is_set[successor]
            met = after if known is None else known & after
            if met != known:
                is_set[successor] = met
                to_do.append(successor)
    return [
        instruction
        for instruction, known in zip(code, is_set, strict=True)
        if known is not None and not descriptors_of(instruction) <= known
    ]


def successors(code: list[str], labels: dict[str, int], place: int) -> list[int]:
    """Where the program may go after an instruction."""
    instruction = code[place]
    targets = [labels[name] for name in re.findall(r"\.L_x?_?\w+", instruction) if name in labels]
    goes_on = not re.match(r"(BRA|BRX|EXIT)\b", instruction)
    return [target for target in [*targets, *[place + 1] * goes_on] if target < len(code)]


def descriptors_of(instruction: str) -> set[int]:
    """The uniform registers of a product's descriptors: two of two registers, the second alone where the first operand is in registers."""
    used = re.search(r"HGMMA\S* R\d+, (R\d+, )?gdesc\[UR(\d+)\]", instruction)
    if not used:
        return set()
    first = int(used[2])
    return set(range(first + 2 if used[1] else first, first + 4))


def disassemble(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    triton.knobs.nvidia.dump_ptxas_log = True
    for kernel, head_dim, dtype in VARIANTS:
        with redirect_stdout(StringIO()) as log:
            compiled = COMPILERS[kernel](head_dim, dtype)
        serialized, spilled = ptxas_report(log.getvalue())
        sass = disassemble(compiled.asm["cubin"])
        record = {
            "kernel": kernel,
            "head_dim": head_dim,
            "dtype": str(dtype),
            "shared": compiled.metadata.shared,
            "laid_out": sizes_laid_out(compiled),
            "declared": sizes_in_ptx(compiled),
            "serialized": serialized,
            "arrivals": arrivals(compiled.asm["ptx"]),
            "spilled_bytes": spilled,
            "spills_in_full_loops": spills_in_full_loops(sass),
            "without_addresses": products_without_addresses(sass),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
