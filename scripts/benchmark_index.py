"""Time and size of a block index, up to a million tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_blocksparse import BigBird
from hf_blocksparse.block_index import clear_cache, get_index
from hf_blocksparse.sequences import Sequences


@dataclass(frozen=True)
class IndexMeasurement:
    """Building the index of causal BigBird (block 128), both directions, from nothing.

    Attributes:
        seconds: wall time; `num_tiles` and `index_bytes` are over all heads.
    """

    length_tokens: int
    heads: int
    seconds: float
    num_tiles: int
    index_bytes: int


def index_measurements(device: torch.device) -> list[IndexMeasurement]:
    """Time and size of an index up to a million tokens."""
    rows = []
    for length in (1 << 14, 1 << 17, 1 << 20):
        clear_cache()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        index = get_index(
            BigBird(128),
            Sequences.uniform(1, length, length, 0, device),
            is_causal=True,
            attn_mask=None,
            num_heads=16,
            tile_q=128,
            tile_kv=128,
            device=device,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        rows.append(IndexMeasurement(length, 16, seconds, index.num_tiles, index.num_bytes))
    clear_cache()
    return rows


def index_table(rows: Sequence[IndexMeasurement]) -> str:
    """One line per length."""
    lines = [
        f"{'BigBird index':>14}{'heads':>7}{'seconds':>9}{'tiles':>11}{'MiB':>8}{'bytes/tile':>12}"
    ]
    for row in rows:
        lines.append(
            f"{row.length_tokens:>14,}{row.heads:>7}{row.seconds:>9.3f}{row.num_tiles:>11,}"
            f"{row.index_bytes / 2**20:>8.2f}{row.index_bytes / row.num_tiles:>12.1f}"
        )
    return "\n".join(lines)
