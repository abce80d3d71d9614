"""Tile sizes as data: what one kernel program computes per step, and with how many warps and pipeline stages.

Chosen by architecture, direction, head size, element size and the layout's grain. A tile as large as a block keeps
tile efficiency at one; larger blocks and token-exact layouts get the tiles that keep the tensor cores busiest. Blocks
below 64 get tiles of 64, whose unions run faster than small tiles would, but for the sparsest random layouts.

The rows for sm_90 and head sizes 64 and 128 were picked from trials on an NVIDIA H200 with Triton 3.6, of which no record is
kept: run scripts/benchmark.py to judge them. The other rows fit shared memory and are not measured yet.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

Direction = Literal["forward", "grad_query", "grad_key_value"]

SHARED_MEMORY_BYTES = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "small": 65536}
"""What one program may use, by family; `small` fits every other chip, AMD's among them."""


@dataclass(frozen=True)
class TileSizes:
    """Rows of a query tile and of a key tile, and how the compiler spreads and pipelines the work."""

    tile_q: int
    tile_kv: int
    num_warps: int
    num_stages: int


@cache
def backend_of(device: torch.device) -> tuple[str, int]:
    """The backend and capability under which the tables know a device."""
    if device.type == "cpu":
        return "cpu", 0
    if torch.version.hip is not None:
        return "hip", 0
    major, minor = torch.cuda.get_device_capability(device)
    return "cuda", 10 * major + minor


def family_of(backend: str, capability: int) -> str:
    """The row of the tables for a backend (`cuda`, `hip`, `cpu`) and a compute capability such as 90."""
    if backend == "cpu":
        return "interpreter"
    if backend == "cuda":
        if capability in (80, 87):
            return "sm_80"
        if capability == 90:
            return "sm_90"
        if 100 <= capability < 120:
            return "sm_100"
    return "small"


# (family, direction, element bytes): {largest padded head size: {grain: (tile_q, tile_kv, num_warps, num_stages)}}
_HALF = 2
_TABLE: dict[tuple[str, Direction, int], dict[int, dict[int, tuple[int, int, int, int]]]] = {
    ("sm_90", "forward", _HALF): {
        64: {128: (128, 128, 4, 3), 64: (64, 64, 4, 3)},
        128: {128: (128, 128, 8, 3), 64: (64, 64, 4, 3)},
        256: {128: (128, 64, 8, 2), 64: (64, 64, 4, 2)},
    },
    ("sm_90", "grad_query", _HALF): {
        64: {128: (128, 64, 4, 3), 64: (64, 64, 4, 3)},
        128: {128: (64, 64, 4, 3), 64: (64, 64, 4, 3)},
        256: {128: (64, 64, 8, 2), 64: (64, 64, 8, 2)},
    },
    ("sm_90", "grad_key_value", _HALF): {
        64: {128: (64, 64, 4, 2), 64: (64, 64, 4, 2)},
        128: {128: (64, 64, 4, 3), 64: (64, 64, 4, 3)},
        256: {128: (64, 64, 8, 2), 64: (64, 64, 8, 2)},
    },
    ("sm_80", "forward", _HALF): {
        64: {128: (128, 64, 4, 3), 64: (64, 64, 4, 3)},
        128: {128: (128, 64, 8, 3), 64: (64, 64, 4, 2)},
        256: {128: (64, 32, 4, 2), 64: (64, 32, 4, 2)},
    },
    ("sm_80", "grad_query", _HALF): {
        64: {128: (128, 64, 8, 3), 64: (64, 64, 4, 3)},
        128: {128: (64, 64, 4, 2), 64: (64, 64, 4, 2)},
        256: {128: (32, 32, 4, 1), 64: (32, 32, 4, 1)},
    },
    ("sm_80", "grad_key_value", _HALF): {
        64: {128: (64, 128, 8, 3), 64: (64, 64, 4, 3)},
        128: {128: (64, 64, 4, 2), 64: (64, 64, 4, 2)},
        256: {128: (32, 32, 4, 1), 64: (32, 32, 4, 1)},
    },
    ("sm_100", "forward", _HALF): {
        64: {128: (128, 128, 8, 2), 64: (64, 64, 4, 2)},
        128: {128: (128, 64, 8, 2), 64: (64, 64, 4, 2)},
        256: {128: (64, 64, 4, 2), 64: (64, 64, 4, 2)},
    },
    ("sm_100", "grad_query", _HALF): {
        64: {128: (128, 64, 8, 2), 64: (64, 64, 4, 2)},
        128: {128: (128, 64, 8, 2), 64: (64, 64, 4, 2)},
        256: {128: (64, 32, 4, 1), 64: (64, 32, 4, 1)},
    },
    ("sm_100", "grad_key_value", _HALF): {
        64: {128: (64, 128, 8, 2), 64: (64, 64, 4, 2)},
        128: {128: (64, 64, 4, 2), 64: (64, 64, 4, 2)},
        256: {128: (32, 32, 4, 1), 64: (32, 32, 4, 1)},
    },
}

# Any other chip, and every float32 kernel, whose products run on the ordinary cores: {largest padded head size: sizes}.
_SMALL_HALF = {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)}
_SMALL_FLOAT = {64: (32, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)}


@cache
def tile_sizes(
    backend: str,
    capability: int,
    direction: Direction,
    head_dim: int,
    value_dim: int,
    element_bytes: int,
    block_size: int,
) -> TileSizes:
    """Tile sizes for one kernel.

    Args:
        backend: `cuda`, `hip`, or `cpu` for the interpreter.
        capability: 10 * major + minor on `cuda`, ignored elsewhere.
        direction: which kernel.
        head_dim, value_dim: of query and key, and of value.
        element_bytes: of the tensors' dtype.
        block_size: grain of the layout in tokens; 1 for token-exact layouts.
    """
    family = family_of(backend, capability)
    if family == "interpreter":
        return TileSizes(64, 64, 4, 1) if block_size in (1, 64, 128) else TileSizes(32, 32, 4, 1)
    size = next(size for size in (64, 128, 256) if max(head_dim, value_dim) <= size)
    grains = _TABLE.get((family, direction, element_bytes))
    if grains is not None:
        return TileSizes(*grains[size][64 if 1 < block_size <= 64 else 128])
    tile_q, tile_kv, num_warps, num_stages = (_SMALL_HALF if element_bytes == 2 else _SMALL_FLOAT)[
        size
    ]
    if direction == "grad_key_value":
        tile_q, tile_kv = tile_kv, tile_q
    return TileSizes(tile_q, tile_kv, num_warps, num_stages)
