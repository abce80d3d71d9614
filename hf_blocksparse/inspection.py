"""What a layout costs and looks like at a length: density, tile efficiency, index size, a picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_blocksparse.block_index import BlockIndex, build_index
from hf_blocksparse.layouts import Layout

SHADES = " ░▒▓█"


@dataclass(frozen=True)
class LayoutReport:
    """A layout at one length, over all heads.

    Attributes:
        kept: coefficients kept.
        dense: coefficients of dense attention of the same kind (square, or causal triangle).
        computed: coefficients of the tiles a kernel computes.
        num_tiles: tiles, over the distinct lists of the heads.
        index_bytes: size of the block index.
    """

    kept: int
    dense: int
    computed: int
    num_tiles: int
    index_bytes: int

    @property
    def density(self) -> float:
        return self.kept / self.dense

    @property
    def tile_efficiency(self) -> float:
        return self.kept / self.computed if self.computed else 1.0


def inspect_layout(
    layout: Layout, length: int, *, is_causal: bool = False, num_heads: int = 1, tile: int = 128
) -> LayoutReport:
    """Count what `layout` keeps and computes at `length` tokens with square tiles of `tile`; builds the index on the CPU."""
    if num_heads < 1:
        raise ValueError(f"num_heads got {num_heads}; it must be at least 1; give the query heads.")
    index = _index(layout, length, is_causal, num_heads, tile)
    return _report(index, list(range(num_heads)), length, is_causal)


def _report(index: BlockIndex, heads: list[int], length: int, is_causal: bool) -> LayoutReport:
    """The report over some of the heads that `index` was built for."""
    kept = _kept_of_tiles(index, length)
    tiles_of_list = (index.kv_offsets[:, -1] - index.kv_offsets[:, 0]).long()
    kept_of_list = torch.stack(
        [
            kept[start:end].sum()
            for start, end in zip(
                index.kv_offsets[:, 0].tolist(), index.kv_offsets[:, -1].tolist(), strict=True
            )
        ]
    )
    lists = (
        index.list_of[0].long().expand(max(heads) + 1 if index.list_of.shape[1] == 1 else -1)[heads]
    )
    dense = length * (length + 1) // 2 if is_causal else length * length
    return LayoutReport(
        kept=int(kept_of_list[lists].sum()),
        dense=dense * len(heads),
        computed=int(tiles_of_list[lists].sum()) * index.tile_q * index.tile_kv,
        num_tiles=index.num_tiles,
        index_bytes=index.num_bytes,
    )


def kept_fractions(
    layout: Layout, length: int, *, is_causal: bool = False, head: int = 0, max_cells: int = 64
) -> Tensor:
    """The kept fraction of each cell of a grid over the score matrix, float32 `[cells, cells]`, cells at most `max_cells`.

    A cell is a power of two of tokens wide, at least 16; fractions count only coefficients within `length`.
    """
    if max_cells < 1:
        raise ValueError(
            f"max_cells got {max_cells}; it must be at least 1 (two characters of a picture's width each); give more."
        )
    cell = 16
    while -(-length // cell) > max_cells:
        cell *= 2
    num_heads = _heads_around(layout, head)
    index = _index(layout, length, is_causal, num_heads, cell)
    one = int(index.list_of[0].expand(num_heads)[head])
    cells = -(-length // cell)
    sizes = torch.full((cells,), cell)
    sizes[-1] = length - (cells - 1) * cell
    fractions = torch.zeros(cells, cells)
    offsets = index.kv_offsets[one, : cells + 1].long()
    kept = _kept_of_tiles(index, length)[offsets[0] : offsets[-1]]
    rows = torch.repeat_interleave(torch.arange(cells), offsets.diff())
    cols = index.kv_indices[offsets[0] : offsets[-1]].long()
    fractions[rows, cols] = kept.float() / (sizes[rows] * sizes[cols])
    return fractions


def picture(
    layout: Layout, length: int, *, is_causal: bool = False, head: int = 0, width: int = 48
) -> str:
    """The layout as text: rows are queries, columns are keys, darker cells keep more."""
    fractions = kept_fractions(layout, length, is_causal=is_causal, head=head, max_cells=width // 2)
    lines = [
        "".join(SHADES[_shade(value)] * 2 for value in line).rstrip() for line in fractions.tolist()
    ]
    return "\n".join((describe(layout, length, is_causal=is_causal, head=head), *lines))


def describe(layout: Layout, length: int, *, is_causal: bool = False, head: int = 0) -> str:
    """One line: the layout, the length, the density and the tile efficiency."""
    index = _index(layout, length, is_causal, _heads_around(layout, head), 128)
    report = _report(index, [head], length, is_causal)
    kind = "causal triangle" if is_causal else "square"
    return (
        f"{layout.for_head(head)!r} at {length:,} tokens: density {report.density:.1%} of the {kind}, "
        f"tile efficiency {report.tile_efficiency:.0%} with 128 x 128 tiles"
    )


def _heads_around(layout: Layout, head: int) -> int:
    """Heads to build an index for, so that it holds `head`."""
    if not 0 <= head < (layout.fixed_heads or head + 1):
        raise ValueError(
            f"head got {head} for {layout!r}; it must be a query head, counted from 0; give one that the layout has."
        )
    return layout.fixed_heads or head + 1


def _shade(fraction: float) -> int:
    if fraction <= 0:
        return 0
    return len(SHADES) - 1 if fraction >= 1 else 1 + int(fraction * (len(SHADES) - 2))


def _index(layout: Layout, length: int, is_causal: bool, num_heads: int, tile: int) -> BlockIndex:
    if length < 1:
        raise ValueError(
            f"length got {length}; it must be at least 1; give the tokens of a sequence."
        )
    layout.check(num_heads, length, length)
    return build_index(
        layout,
        is_causal=is_causal,
        num_heads=num_heads,
        query_end=length,
        key_end=length,
        tile_q=tile,
        tile_kv=tile,
        device=torch.device("cpu"),
    )


def _kept_of_tiles(index: BlockIndex, length: int) -> Tensor:
    """Coefficients kept within `length` of every entry of the index, int64."""
    counts = index.kv_offsets.diff(dim=1).flatten().long()
    line = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    row_start = line % index.num_q_tiles * index.tile_q
    col_start = index.kv_indices.long() * index.tile_kv
    rows = (length - row_start).clamp(max=index.tile_q)
    cols = (length - col_start).clamp(max=index.tile_kv)
    kept = rows * cols
    partial = index.kv_mask_ids >= 0
    if partial.any():
        bits = index.bank_bits()
        # Prefix sums over rows and columns: what a mask keeps of its first r rows and c columns.
        prefix = torch.nn.functional.pad(bits.long().cumsum(1).cumsum(2), (1, 0, 1, 0))
        kept[partial] = prefix[index.kv_mask_ids[partial].long(), rows[partial], cols[partial]]
    return kept
