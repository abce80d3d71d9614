"""Tile sizes as data: what one kernel program computes per step, and with how many warps and pipeline stages.

Chosen by architecture, direction, head size, element size and the layout's grain. A tile as large as a block keeps
tile efficiency at one; larger blocks and token-exact layouts get the tiles that keep the tensor cores busiest. Blocks
below 64 get tiles of 64, each the union of its blocks, which compute faster than small tiles do; or, where those leave out
enough, tiles gathered from strips as wide as a block (see `GATHERED_RATE`) or tiles over one block (see `NARROW_RATES`).

The rows for sm_90 and head sizes 64 and 128 were picked from trials on an NVIDIA H200 with Triton 3.6, of which no record is
kept. The other rows fit shared memory and are not measured yet. `scripts/tune.py` measures rows against their neighbours on the GPU it
runs on, and prints them as they would stand here.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

Direction = Literal["forward", "grad_query", "grad_key_value"]

GATHERED_RATE = 0.75
"""Coefficients that a kernel computes from gathered strips in the time in which it computes one from a tile of the grid.

So strips are taken where their share of the tiles' coefficients is at most this. Trials on an NVIDIA H200, of which no record is kept, gave
0.76 to 0.79 forward and 0.86 to 0.89 backward (random 10 %, blocks of 32 and 16).
"""

FIXED_KEYS = 150
"""What a query tile costs besides, as keys of its rows that it would compute in that time: with short rows, most of what it costs.

Forward, in BigBird with 13 blocks of 16 in a row, an NVIDIA H200 gave about 160 for tiles of 16 and of 64 queries; 130 with 32.
"""

_NARROW_QUERIES = {64: {16: 0.45, 32: 0.55}, 128: {16: 0.32, 32: 0.48}}
NARROW_RATES: dict[Direction, dict[int, dict[int, float]]] = {
    "forward": _NARROW_QUERIES,
    "grad_query": _NARROW_QUERIES,  # equal, so that a call has one index for both
    "grad_key_value": {64: {16: 0.6, 32: 0.7}, 128: {16: 0.49, 32: 0.6}},
}
"""The same for tiles over one block, which hold nothing but what it keeps: query tiles as high as a block, or for dK and dV key tiles as
narrow as one.

By the largest padded head size and the block's size, for the sizes in `_NARROW`. An NVIDIA H200 gave, at random 10 %, 0.47, 0.69, 0.32 and
0.48 for queries in this order, and at 25 % 0.02 to 0.07 more. That of blocks of 32 and head size 64 is lower, so that three heads with one
layout are packed, though a place of four stays empty (`GATHERED_RATE` * 3 / 4), which is faster.
"""

SHARED_MEMORY_BYTES = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "small": 65536}
"""What one program may use, by family; `small` fits every other chip, AMD's among them."""

SMALLEST_STRIP = 16
"""Fewer rows make no product: strips at the ends of a sequence are multiplied one by one."""


@dataclass(frozen=True)
class TileSizes:
    """Rows of a query tile and of a key tile, and how the compiler spreads and pipelines the work.

    With a `strip` the tiles that a program walks (of keys; of queries in grad_key_value) are gathered from strips of so many rows, and
    the index is one of strips.
    """

    tile_q: int
    tile_kv: int
    num_warps: int
    num_stages: int
    strip: int = 0

    def index_shape(self, direction: Direction) -> tuple[int, int]:
        """Tile shape of the index that a kernel with these sizes walks."""
        if direction == "grad_key_value":
            return self.strip or self.tile_q, self.tile_kv
        return self.tile_q, self.strip or self.tile_kv


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

# With strips, {largest padded head size: (tile_q, tile_kv, num_warps, num_stages)}; elsewhere the sizes without them, and three stages
# where there is a pipeline: it loads the numbers of strips as long before their rows as these before their products, so that it takes
# two stages more for each tile it loads ahead. Run on an NVIDIA H200, but not compared with others: `scripts/tune.py` does.
_GATHERED: dict[tuple[str, Direction, int], dict[int, tuple[int, int, int, int]]] = {
    ("sm_90", "forward", _HALF): {64: (64, 64, 4, 3), 128: (64, 64, 4, 3)},
    ("sm_90", "grad_query", _HALF): {64: (64, 64, 4, 3), 128: (64, 64, 4, 3)},
    ("sm_90", "grad_key_value", _HALF): {64: (64, 64, 4, 3), 128: (64, 64, 4, 3)},
}

# With query tiles as high as a block or, for dK and dV, key tiles as narrow as one:
# {largest padded head size: {grain: (tile_q, tile_kv, num_warps, num_stages)}}. Of those in docs/tuning.md the fastest on an NVIDIA H200,
# or within 4 % of them and free of spills.
_NARROW: dict[tuple[str, Direction, int], dict[int, dict[int, tuple[int, int, int, int]]]] = {
    ("sm_90", "forward", _HALF): {
        64: {16: (16, 32, 1, 5), 32: (32, 32, 1, 3)},
        128: {16: (16, 64, 2, 3), 32: (32, 64, 2, 3)},
    },
    ("sm_90", "grad_query", _HALF): {
        64: {16: (16, 32, 1, 5), 32: (32, 32, 1, 5)},
        128: {16: (16, 64, 2, 3), 32: (32, 64, 2, 3)},
    },
    ("sm_90", "grad_key_value", _HALF): {
        64: {16: (64, 16, 1, 3), 32: (64, 32, 2, 3)},
        128: {16: (64, 16, 2, 3), 32: (128, 32, 4, 3)},
    },
}

# Any other chip, and every float32 kernel, whose products run on the ordinary cores: {largest padded head size: sizes}.
_SMALL_HALF = {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)}
_SMALL_FLOAT = {64: (32, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)}


def _size_class(head_dim: int, value_dim: int) -> int:
    return next(size for size in (64, 128, 256) if max(head_dim, value_dim) <= size)


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
    size = _size_class(head_dim, value_dim)
    grains = _TABLE.get((family, direction, element_bytes))
    if grains is not None:
        return TileSizes(*grains[size][64 if 1 < block_size <= 64 else 128])
    tile_q, tile_kv, num_warps, num_stages = (_SMALL_HALF if element_bytes == 2 else _SMALL_FLOAT)[
        size
    ]
    if direction == "grad_key_value":
        tile_q, tile_kv = tile_kv, tile_q
    return TileSizes(tile_q, tile_kv, num_warps, num_stages)


@cache
def gathered_tile_sizes(
    backend: str,
    capability: int,
    direction: Direction,
    head_dim: int,
    value_dim: int,
    element_bytes: int,
    block_size: int,
) -> TileSizes | None:
    """Sizes for the same kernel with tiles gathered from strips as wide as a block; None where a block is as wide as the tile.

    Arguments as of `tile_sizes`.
    """
    sizes = tile_sizes(
        backend, capability, direction, head_dim, value_dim, element_bytes, block_size
    )
    walked = 0 if direction == "grad_key_value" else 1
    if not SMALLEST_STRIP <= block_size < sizes.index_shape(direction)[walked]:
        return None
    known = _GATHERED.get((family_of(backend, capability), direction, element_bytes), {})
    size = _size_class(head_dim, value_dim)
    if size in known:
        sizes = TileSizes(*known[size])
    elif sizes.num_stages > 1:
        sizes = replace(sizes, num_stages=3)
    is_tile = sizes.index_shape(direction)[walked] == block_size
    return replace(sizes, strip=0 if is_tile else block_size)


@cache
def narrow_tile_sizes(
    backend: str,
    capability: int,
    direction: Direction,
    head_dim: int,
    value_dim: int,
    element_bytes: int,
    block_size: int,
) -> TileSizes | None:
    """Sizes for the same kernel with gathered tiles over one block, for dK and dV of keys; None where none are known to be worth it.

    Arguments as of `tile_sizes`.
    """
    known = _NARROW.get((family_of(backend, capability), direction, element_bytes), {})
    sizes = known.get(_size_class(head_dim, value_dim), {}).get(block_size)
    return None if sizes is None else TileSizes(*sizes, strip=block_size)


def narrow_rate(direction: Direction, head_dim: int, value_dim: int, block_size: int) -> float:
    """The rate in `NARROW_RATES` of sizes that `narrow_tile_sizes` knows."""
    return NARROW_RATES[direction][_size_class(head_dim, value_dim)][block_size]
