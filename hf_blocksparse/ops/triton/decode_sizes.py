"""When the decode kernels run, their tile sizes as data, and into how many programs a row is split.

The sizes fit shared memory and leave several steps of loads in flight. On an NVIDIA H200 those of head size 128 read 3.7 TB/s from a
cache of 65,536 tokens; they were not compared with others, which `scripts/tune.py --kernels decode` does.
"""

from dataclasses import dataclass
from functools import cache

import torch

from hf_blocksparse.ops.triton.tile_sizes import family_of

MAX_QUERIES = 64
MIN_KEYS_PER_QUERY = 4
PROGRAMS_PER_PROCESSOR = 2
MAX_SPLITS = 128
INTERPRETED_PROCESSORS = 4


def has_few_queries(query_len: int, kv_len: int, dropout_p: float) -> bool:
    """Whether the decode kernels run a call; they know no dropout."""
    return query_len <= MAX_QUERIES and query_len * MIN_KEYS_PER_QUERY <= kv_len and not dropout_p


@dataclass(frozen=True)
class DecodeSizes:
    """Tiles of the index, rows of a program's product (a power of two, at least 16), and how the compiler pipelines the loads."""

    tile_q: int
    tile_kv: int
    max_rows: int
    num_warps: int
    num_stages: int


# {largest padded head size: (tile_kv, max_rows, num_warps, num_stages)}. Of the stages, the chain from an entry of the list to its
# mask's bits takes all but two, which are the keys' and values'.
_HALF = {64: (64, 64, 4, 5), 128: (64, 64, 4, 5), 256: (32, 32, 4, 5)}
_SMALL_HALF = {64: (32, 32, 4, 5), 128: (32, 32, 4, 4), 256: (16, 16, 4, 4)}
_FLOAT = {64: (32, 16, 4, 4), 128: (16, 16, 4, 4), 256: (16, 16, 4, 1)}
_TILE_Q = 64


@cache
def decode_sizes(
    backend: str,
    capability: int,
    head_dim: int,
    value_dim: int,
    element_bytes: int,
    block_size: int,
) -> DecodeSizes:
    """Sizes for a device and a call; the arguments are those of `tile_sizes`.

    Tiles are no larger than the layout's blocks: what a tile holds beside them would be read for nothing.
    """
    family = family_of(backend, capability)
    grain = _TILE_Q if block_size == 1 else max(16, block_size)
    if family == "interpreter":
        return DecodeSizes(min(_TILE_Q, grain), min(32, grain), 32, 4, 1)
    size = next(size for size in (64, 128, 256) if max(head_dim, value_dim) <= size)
    half = _SMALL_HALF if family == "small" else _HALF
    tile_kv, max_rows, num_warps, num_stages = (half if element_bytes == 2 else _FLOAT)[size]
    return DecodeSizes(min(_TILE_Q, grain), min(tile_kv, grain), max_rows, num_warps, num_stages)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number for the interpreter, so that tests get more than one split."""
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_splits(num_programs: int, longest_row: int, device: torch.device) -> int:
    """Programs per row where `num_programs` rows are to be computed, the longest of `longest_row` tiles."""
    wanted = PROGRAMS_PER_PROCESSOR * processors(device)
    return max(1, min(wanted // num_programs, longest_row, MAX_SPLITS))
