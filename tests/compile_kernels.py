"""Compiles the kernels for a GPU that need not be here, with the tile sizes that GPU would get.

    python tests/compile_kernels.py sm_90

prints one JSON line per kernel: its case, tile sizes, the shared memory of one program and, on NVIDIA chips, the tensor memory, the bytes
of registers that a thread spills (null where the compiler's cache had the kernel) and the sizes of its parameters as the package lays them
out and as the PTX declares them.
A program of its own because Triton decides at import whether it interprets or compiles.
"""

import json
import re
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

import triton
from parameter_sizes import sizes_in_ptx, sizes_laid_out
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_blocksparse.ops.triton.backward import grad_key_value_kernel, grad_query_kernel
from hf_blocksparse.ops.triton.column_parts import ROWS_AT_ONCE, add_parts_kernel
from hf_blocksparse.ops.triton.decode import Partials, combine_kernel, decode_kernel
from hf_blocksparse.ops.triton.decode_sizes import DecodeSizes, decode_sizes
from hf_blocksparse.ops.triton.forward import forward_kernel
from hf_blocksparse.ops.triton.launch import SPLITS_AT_ONCE
from hf_blocksparse.ops.triton.tile_sizes import (
    TileSizes,
    gathered_tile_sizes,
    narrow_tile_sizes,
    tile_sizes,
)
from hf_blocksparse.ops.triton.tiles import Dropout, StridedRows, TileLists

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "forward": forward_kernel,
    "grad_query": grad_query_kernel,
    "grad_key_value": grad_key_value_kernel,
}
ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Case:
    """What differs between compilations of one kernel."""

    dtype: str
    head_dim: int
    block_size: int
    value_dim: int | None = None
    features: bool = False  # softcap, ALiBi, dropout and sinks
    aligned: bool = True  # as tensor descriptors need it
    group_size: int = 4
    gathered: bool = False  # from strips
    members: int = 1  # heads whose rows fill a query tile
    narrow: bool = False  # from strips, for one block of queries or, for dK and dV, of keys
    in_parts: bool = False  # some key tiles in several programs


# Every head size, dtype and family of tiles, features on and off, at least once; not their product.
CASES = (
    Case("bf16", 128, 128, group_size=1),
    Case("bf16", 64, 1, in_parts=True),
    Case("fp16", 80, 32, value_dim=64, features=True),
    Case("bf16", 256, 64, aligned=False, in_parts=True),
    Case("fp32", 64, 16, features=True),
    Case("bf16", 128, 16, gathered=True, in_parts=True),
    Case("bf16", 128, 16, gathered=True, members=4),
    Case("bf16", 128, 16, narrow=True, in_parts=True),
    Case("bf16", 128, 32, narrow=True),
    Case("bf16", 64, 16, narrow=True),
    Case("fp16", 64, 32, narrow=True, features=True),
    Case("fp16", 256, 16, gathered=True, members=2, features=True),
)


# Queries, and whether their rows are split over programs.
DECODES = ((1, True), (64, False))


class Constant:
    """A value that is known when the kernel is compiled."""

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(frozen=True)
class Argument:
    """A run-time argument: its type, and whether it is a multiple of 16."""

    type: str
    divisible: bool = False


INT = Argument("i32")
FLOAT = Argument("fp32")


def padded(size: int) -> int:
    return triton.next_power_of_2(size)


def pointer(dtype: str) -> Argument:
    return Argument(f"*{dtype}", divisible=True)


def rows(case: Case, dtype: str) -> StridedRows:
    stride = Argument("i32", divisible=case.aligned)
    return StridedRows(pointer(dtype), (stride, stride, stride))


def row_values() -> StridedRows:
    return StridedRows(pointer("fp32"), (INT, INT, Constant(1)))


def descriptor(dtype: str, tile: int | None, dim: int) -> Argument | Constant:
    if tile is None:
        return Constant(None)
    return Argument(f"tensordesc<{dtype}[1,1,{tile},{padded(dim)}]>")


def tile_lists() -> TileLists:
    index = pointer("i32")
    return TileLists(index, INT, INT, index, index, index, index, index, INT)


def kernel_arguments(name: str, case: Case, sizes: TileSizes, descriptors: bool) -> dict[str, Any]:
    """Arguments of `KERNELS[name]` by parameter, as the launcher makes them."""
    value_dim = case.value_dim or case.head_dim
    stationary_is_query = name != "grad_key_value"
    tile = sizes.tile_kv if stationary_is_query else sizes.tile_q
    streamed = tile if descriptors and case.aligned and not sizes.strip else None
    int_pointer = pointer("i32")
    none = Constant(None)
    lse = row_values()
    arguments: dict[str, Any] = {
        "query": rows(case, case.dtype),
        "key": rows(case, case.dtype),
        "value": rows(case, case.dtype),
        "items": int_pointer,
        "table": int_pointer,
        "lists": tile_lists(),
        "score_scale": FLOAT,
        "softcap_scale": FLOAT if case.features else none,
        "alibi_slopes": pointer("fp32") if case.features else none,
        "dropout": Dropout(pointer("i64"), INT, FLOAT) if case.features else none,
        "group_size": Constant(1) if case.group_size == 1 else INT,
        "HEAD_DIM": Constant(case.head_dim),
        "HEAD_DIM_PADDED": Constant(padded(case.head_dim)),
        "VALUE_DIM": Constant(value_dim),
        "VALUE_DIM_PADDED": Constant(padded(value_dim)),
        "TILE_Q": Constant(sizes.tile_q),
        "TILE_KV": Constant(sizes.tile_kv),
        "INPUT_PRECISION": Constant("ieee"),
        "STRIP": Constant(sizes.strip),
    }
    streamed_names = ("key", "value") if stationary_is_query else ("query", "grad_out")
    for tensor, dim in zip(streamed_names, (case.head_dim, value_dim), strict=True):
        arguments[f"{tensor}_descriptor"] = descriptor(case.dtype, streamed, dim)
    if stationary_is_query:
        arguments["heads_per_list"] = INT if case.members > 1 else Constant(1)
        arguments["MEMBERS"] = Constant(case.members)
    if name == "forward":
        arguments["sinks"] = pointer("fp32") if case.features else none
        arguments["out"] = rows(case, case.dtype)
        arguments["lse"] = lse
        return arguments
    arguments["grad_out"] = rows(case, case.dtype)
    arguments["log2_sums"] = arguments["deltas"] = row_values()
    arguments["scale"] = FLOAT
    if name == "grad_query":
        arguments["out"] = rows(case, case.dtype)
        arguments["lse"] = lse
        arguments["grad_lse"] = (
            row_values() if case.features else StridedRows(none, (Constant(0),) * 3)
        )
        arguments["grad_query"] = rows(case, case.dtype)
    else:
        arguments["grad_key"] = rows(case, case.dtype)
        arguments["grad_value"] = rows(case, case.dtype)
        arguments["num_kv_heads"] = INT
        arguments["programs"] = int_pointer if case.in_parts else none
        parts = pointer("fp32") if case.in_parts else none
        arguments["key_parts"] = arguments["value_parts"] = parts
    return arguments


def compile_kernel(
    kernel: Any, arguments: dict[str, Any], target: GPUTarget, options: dict[str, Any]
) -> Any:
    """Compiles `kernel` for arguments described by Argument, Constant and named tuples of them."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def signature(argument: Any, path: tuple[int, ...]) -> Any:
        if isinstance(argument, tuple):
            parts = [signature(part, (*path, place)) for place, part in enumerate(argument)]
            return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
        if isinstance(argument, Constant):
            constants[path] = argument.value
            return "constexpr"
        if argument.divisible:
            attributes[path] = [["tt.divisibility", 16]]
        return argument.type

    ordered = {
        name: signature(arguments[name], (place,)) for place, name in enumerate(kernel.arg_names)
    }
    with redirect_stdout(StringIO()) as log:
        compiled = triton.compile(
            ASTSource(kernel, ordered, constants, attributes), target=target, options=options
        )
    compiled.ptxas_log = log.getvalue()
    return compiled


def partials() -> Partials:
    return Partials(pointer("fp32"), pointer("fp32"), Argument("*fp32"))


def compile_decode(
    target: GPUTarget, case: Case, sizes: DecodeSizes, queries: int, is_split: bool
) -> Any:
    value_dim = case.value_dim or case.head_dim
    none = Constant(None)
    members = min(padded(case.group_size), sizes.max_rows)
    arguments = {
        "query": rows(case, case.dtype),
        "key": rows(case, case.dtype),
        "value": rows(case, case.dtype),
        "sinks": pointer("fp32") if case.features else none,
        "out": rows(case, case.dtype),
        "lse": row_values(),
        "partials": partials() if is_split else none,
        "table": pointer("i32"),
        "lists": tile_lists(),
        "first_tile": INT,
        "num_slots": INT,
        "chunks_per_tile": INT,
        "heads_per_list": INT,
        "num_heads": INT,
        "num_rows": INT,
        "query_len": Constant(1) if queries == 1 else INT,
        "score_scale": FLOAT,
        "softcap_scale": FLOAT if case.features else none,
        "alibi_slopes": pointer("fp32") if case.features else none,
        "group_size": Constant(1) if case.group_size == 1 else INT,
        "HEAD_DIM": Constant(case.head_dim),
        "HEAD_DIM_PADDED": Constant(padded(case.head_dim)),
        "VALUE_DIM": Constant(value_dim),
        "VALUE_DIM_PADDED": Constant(padded(value_dim)),
        "TILE_Q": Constant(sizes.tile_q),
        "TILE_KV": Constant(sizes.tile_kv),
        "QUERIES": Constant(max(16 // members, min(queries, sizes.max_rows // members))),
        "MEMBERS": Constant(members),
        "INPUT_PRECISION": Constant("ieee"),
    }
    options = {
        "num_warps": sizes.num_warps,
        "num_stages": sizes.num_stages,
        "enable_fp_fusion": True,
    }
    return compile_kernel(decode_kernel, arguments, target, options)


def compile_combine(target: GPUTarget, case: Case) -> Any:
    value_dim = case.value_dim or case.head_dim
    arguments = {
        "partials": partials(),
        "out": rows(case, case.dtype),
        "lse": row_values(),
        "num_splits": INT,
        "num_rows": INT,
        "num_heads": INT,
        "query_len": INT,
        "VALUE_DIM": Constant(value_dim),
        "VALUE_DIM_PADDED": Constant(padded(value_dim)),
        "SPLITS_AT_ONCE": Constant(SPLITS_AT_ONCE),
    }
    return compile_kernel(combine_kernel, arguments, target, {"enable_fp_fusion": True})


def compile_add_parts(target: GPUTarget, case: Case, sizes: TileSizes) -> Any:
    value_dim = case.value_dim or case.head_dim
    arguments = {
        "key_parts": pointer("fp32"),
        "value_parts": pointer("fp32"),
        "grad_key": rows(case, case.dtype),
        "grad_value": rows(case, case.dtype),
        "table": pointer("i32"),
        "key_scale": FLOAT,
        "value_scale": FLOAT,
        "HEAD_DIM": Constant(case.head_dim),
        "HEAD_DIM_PADDED": Constant(padded(case.head_dim)),
        "VALUE_DIM": Constant(value_dim),
        "VALUE_DIM_PADDED": Constant(padded(value_dim)),
        "TILE_KV": Constant(sizes.tile_kv),
        "ROWS": Constant(ROWS_AT_ONCE),
    }
    return compile_kernel(add_parts_kernel, arguments, target, {"enable_fp_fusion": True})


def print_record(
    kernel: str, case: Case, sizes: TileSizes | DecodeSizes, compiled: Any, **more: Any
) -> None:
    spilled = re.findall(r"(\d+) bytes spill stores", compiled.ptxas_log)
    record = {
        "kernel": kernel,
        "case": asdict(case) | more,
        "sizes": asdict(sizes),
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None),
        "spilled_bytes": sum(map(int, spilled)) if spilled else None,
    }
    if compiled.metadata.target.backend == "cuda":
        record |= {"laid_out": sizes_laid_out(compiled), "declared": sizes_in_ptx(compiled)}
    print(json.dumps(record), flush=True)


def main(name: str) -> None:
    triton.knobs.nvidia.dump_ptxas_log = True
    target = TARGETS[name]
    has_descriptors = target.backend == "cuda" and target.arch >= 90
    capability = target.arch if target.backend == "cuda" else 0
    for number, case in enumerate(CASES):
        sizes = decode_sizes(
            target.backend,
            capability,
            case.head_dim,
            case.value_dim or case.head_dim,
            ELEMENT_BYTES[case.dtype],
            case.block_size,
        )
        # A row split over programs and a whole one, in turn; the first case has both.
        for queries, is_split in DECODES if number == 0 else DECODES[number % 2 :][:1]:
            compiled = compile_decode(target, case, sizes, queries, is_split)
            print_record("decode", case, sizes, compiled, queries=queries, is_split=is_split)
        if case.head_dim in (128, 256):
            print_record("combine", case, sizes, compile_combine(target, case))
        for kernel_name, kernel in KERNELS.items():
            choose = gathered_tile_sizes if case.gathered else tile_sizes
            choose = narrow_tile_sizes if case.narrow else choose
            sizes = choose(
                target.backend,
                capability,
                kernel_name,
                case.head_dim,
                case.value_dim or case.head_dim,
                ELEMENT_BYTES[case.dtype],
                case.block_size,
            )
            if sizes is None:  # tiles are no larger than blocks there, or not known to be worth it
                continue
            arguments = kernel_arguments(kernel_name, case, sizes, has_descriptors)
            options = {
                "num_warps": sizes.num_warps,
                "num_stages": sizes.num_stages,
                "enable_fp_fusion": True,
            }
            print_record(
                kernel_name, case, sizes, compile_kernel(kernel, arguments, target, options)
            )
            if kernel_name == "grad_key_value" and case.in_parts:
                print_record("add_parts", case, sizes, compile_add_parts(target, case, sizes))


if __name__ == "__main__":
    main(sys.argv[1])
