"""Rule -> block index: the lists of tiles a kernel walks, in both directions, and the bank of masks for the partial ones.

The idea in four lines, for one list (one head) and query tile `a`:

    entries = range(kv_offsets[l, a], kv_offsets[l, a + 1])
    for n, e in enumerate(entries):
        mask = all_true if n < kv_num_full[l, a] else bits(bank[kv_mask_ids[e]])
        dense[l, rows(a), cols(kv_indices[e])] = mask

Building costs time and memory in proportion to the tiles kept: rules enumerate their tiles by interval arithmetic, only partial tiles
are looked at, and only one of those that must have equal content.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_blocksparse.capture import build_to_keep, check_not_capturing, forget_captures
from hf_blocksparse.layouts import Layout, RuleContext
from hf_blocksparse.rules import CAUSAL, Rule, Table, TileGrid, distinct
from hf_blocksparse.sequences import BATCH, KV_LEN, KV_POS, KV_ROW, Q_LEN, Q_POS, Q_ROW, Sequences

CACHED_INDICES = 128
CACHED_BYTES = 2 << 30
CACHED_INDICES_PER_MASK = 16
COUNTED_LAYOUTS = 16
# Positions per index of a few queries: decoding builds one in so many tokens, of the tiles that their rows keep.
QUERY_SPAN = 1024
# Coefficients evaluated at a time while the bank is filled.
CHUNK = 1 << 24


@dataclass(frozen=True, eq=False, repr=False)
class BlockIndex:
    """Tile lists for one tile shape; see docs/architecture.md for every field's meaning. All tensors are int32."""

    tile_q: int
    tile_kv: int
    list_of: Tensor
    kv_offsets: Tensor
    kv_num_full: Tensor
    kv_indices: Tensor
    kv_mask_ids: Tensor
    q_offsets: Tensor
    q_num_full: Tensor
    q_indices: Tensor
    q_mask_ids: Tensor
    bank: Tensor
    empty_rows: Tensor  # positions of queries without a key in some list, on the host, ascending
    first_q_tile: int  # earlier query tiles have no lists here
    longest_row: int  # key tiles of the longest list
    heads_per_list: int  # runs of so many query heads share a list; 0 where all do

    @property
    def num_lists(self) -> int:
        return self.kv_num_full.shape[0]

    @property
    def num_q_tiles(self) -> int:
        return self.kv_num_full.shape[1]

    @property
    def num_kv_tiles(self) -> int:
        return self.q_num_full.shape[1]

    @property
    def num_tiles(self) -> int:
        """Tiles kept, over all lists."""
        return self.kv_indices.numel()

    @property
    def num_bytes(self) -> int:
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def __repr__(self) -> str:
        partial = self.num_tiles - int(self.kv_num_full.sum())
        return (
            f"BlockIndex(tile={self.tile_q}x{self.tile_kv}, lists={self.num_lists}, "
            f"grid={self.num_q_tiles}x{self.num_kv_tiles}, "
            + (f"first_q_tile={self.first_q_tile}, " if self.first_q_tile else "")
            + f"tiles={self.num_tiles} ({partial} partial), "
            f"masks={self.bank.shape[0]}, {self.num_bytes / 2**20:.2f} MiB)"
        )

    def bank_bits(self, masks: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """The bank unpacked, or some `rows` of some `masks` of it: bool `[num_masks, tile_q, tile_kv]`."""
        words = (self.bank if masks is None else self.bank[masks])[:, rows]
        bits = torch.arange(min(32, self.tile_kv), dtype=torch.int32, device=words.device)
        return (words[..., None] >> bits & 1).bool().flatten(-2)

    def to_dense(self, query_len: int, kv_len: int) -> Tensor:
        """The dense mask of each list, bool `[num_lists, query_len, kv_len]`. For tests and pictures."""
        dense = self._entries_to_dense(
            self.kv_offsets, self.kv_indices, self.kv_mask_ids, self.kv_num_full, transposed=False
        )
        return dense[:, :query_len, :kv_len]

    def transpose_to_dense(self, query_len: int, kv_len: int) -> Tensor:
        """The same mask, read from the transposed lists."""
        dense = self._entries_to_dense(
            self.q_offsets, self.q_indices, self.q_mask_ids, self.q_num_full, transposed=True
        )
        return dense[:, :query_len, :kv_len]

    def _entries_to_dense(
        self, offsets, indices, mask_ids, num_full, *, transposed: bool
    ) -> Tensor:
        num_q_tiles = self.first_q_tile + self.num_q_tiles
        rows, cols = num_q_tiles * self.tile_q, self.num_kv_tiles * self.tile_kv
        dense = torch.zeros(self.num_lists, rows, cols, dtype=torch.bool)
        bits = self.bank_bits().cpu()
        for number, line in enumerate(offsets.tolist()):
            for tile, (start, end) in enumerate(zip(line[:-1], line[1:], strict=True)):
                for place in range(start, end):
                    other = int(indices[place])
                    q, kv = (other, tile) if transposed else (self.first_q_tile + tile, other)
                    mask_id = int(mask_ids[place])
                    if (mask_id < 0) != (place - start < int(num_full[number, tile])):
                        raise AssertionError("full tiles must come first and have no mask")
                    window = dense[
                        number,
                        q * self.tile_q : (q + 1) * self.tile_q,
                        kv * self.tile_kv : (kv + 1) * self.tile_kv,
                    ]
                    if bool(window.any()):
                        raise AssertionError("a tile is listed twice")
                    window.copy_(torch.ones_like(window) if mask_id < 0 else bits[mask_id])
        return dense


class Strips(NamedTuple):
    """Narrow tiles, several of which a kernel gathers into one: the alternative to tiles that are as large as the kernel's.

    A tile of small blocks holds their union. Strips as wide as a block leave out what none of the tile's blocks keeps, and cost the
    kernel's gathering: they pay on scattered blocks and not on a window. An index that is offered strips is built of them where they
    hold at most `max_share` of the coefficients that the tiles would, of several kinds of those furthest below theirs; its own tile shape
    says which they are. To both, `per_query` coefficients are added for every query of a list: what beginning and ending a row costs, which
    weighs on short ones.

    With a `group_size`, of so many heads that read the same keys those that share a list fill the rows of a tile together, each with fewer
    queries: with one block of them no row of the tile computes what it does not keep. Such strips are `tile_q / members` queries high,
    where `members`, a power of two, is how many heads' rows make a tile. There are none of that kind where no heads share a list.
    """

    tile_q: int
    tile_kv: int
    max_share: float
    group_size: int = 1
    per_query: int = 0

    def shape(self, heads_per_list: int) -> tuple[int, int, float] | None:
        """Their shape where runs of `heads_per_list` heads share a list, and the rows that a tile has for each that is there."""
        shared = math.gcd(self.group_size, heads_per_list)
        # Fewer queries than a block would load its keys more often for the same rows.
        most = max(1, self.tile_q // self.tile_kv)
        members = min(1 << (shared - 1).bit_length(), most)
        if members == 1 < self.group_size:
            return None
        return self.tile_q // members, self.tile_kv, members * -(-shared // members) / shared


@dataclass(frozen=True)
class _ListGroup:
    """Lists that share a rule: one per head of `heads`, or one for them all."""

    rule: Rule
    heads: tuple[int, ...]


# Cached indices outlive the call: tensors made in inference mode could not take part in a later backward.
@torch.inference_mode(False)
def _build(
    groups: Seq[_ListGroup],
    list_of: Tensor,
    tile_q: int,
    tile_kv: int,
    strips: tuple[Strips, ...],
    query_begin: int,
    query_end: int,
    key_end: int,
    device: torch.device,
    counts: dict[tuple[int, int], int] | None = None,
) -> BlockIndex:
    """`counts`: what tiles of a shape compute in all, where that is known; more is added."""
    check_not_capturing(device, "the block index of this layout")
    if strips:
        counts = {} if counts is None else counts

        def computed(*shape: int) -> int:
            if shape not in counts:
                counts[shape] = _computed(groups, *shape, query_begin, query_end, key_end, device)
            return counts[shape]

        least: float = computed(tile_q, tile_kv)
        queries = (query_end - query_begin) * sum(len(group.heads) for group in groups)
        for kind in strips:
            shape = kind.shape(_heads_per_list(list_of))
            if shape is None:
                continue
            strip_q, strip_kv, rows = shape
            fixed = kind.per_query * queries
            in_strips = rows * (computed(strip_q, strip_kv) + fixed)
            if in_strips <= kind.max_share * (least + fixed):
                least = in_strips / kind.max_share - fixed
                tile_q, tile_kv = strip_q, strip_kv
    first_q = query_begin // tile_q
    num_q, num_kv = -(-query_end // tile_q) - first_q, -(-key_end // tile_kv)
    parts: list[tuple[Tensor, Tensor]] = []
    bank_parts: list[Tensor] = []
    first_list = num_masks = 0
    for group in groups:
        grid = TileGrid(tile_q, tile_kv, num_q, num_kv, group.heads, device, first_q)
        codes, mask_ids, bank = _tiles_of_rule(group.rule, grid)
        parts.append(
            (
                codes + first_list * num_q * num_kv,
                torch.where(mask_ids < 0, mask_ids, mask_ids + num_masks),
            )
        )
        bank_parts.append(bank)
        first_list += len(group.heads)
        num_masks += bank.shape[0]
    codes = torch.cat([codes for codes, _ in parts])
    mask_ids = torch.cat([mask_ids for _, mask_ids in parts])
    bank = torch.cat(bank_parts)

    row, kv = codes // num_kv, codes % num_kv
    number, q = row // num_q, row % num_q
    is_partial = (mask_ids >= 0).long()
    kv_side = _lists(number, q, kv, is_partial, mask_ids, first_list, num_q, num_kv)
    q_offsets, q_num_full, q_indices, q_mask_ids = _lists(
        number, kv, q, is_partial, mask_ids, first_list, num_kv, num_q
    )
    empty_rows = _empty_rows(
        number, q, kv, mask_ids, bank, first_list, num_q, query_end - first_q * tile_q, key_end
    )
    return BlockIndex(
        tile_q,
        tile_kv,
        list_of.to(device=device, dtype=torch.int32),
        *kv_side,
        q_offsets,
        q_num_full,
        q_indices + first_q,
        q_mask_ids,
        _pack_bits(bank),
        empty_rows + first_q * tile_q,
        first_q,
        int(torch.bincount(row).max()) if row.numel() else 0,
        _heads_per_list(list_of),
    )


def _heads_per_list(list_of: Tensor) -> int:
    """The size of the longest runs into which all heads divide and which have one list each, 0 (divisible by any size) for one list.

    `list_of`: on the host, [sequences, heads or 1].
    """
    heads = list_of.shape[1]
    if heads == 1:
        return 0
    sizes = (size for size in range(heads, 0, -1) if heads % size == 0)
    runs = ((size, list_of.unflatten(1, (-1, size))) for size in sizes)
    return next(size for size, run in runs if torch.equal(run, run[..., :1].expand_as(run)))


def _computed(
    groups: Seq[_ListGroup],
    tile_q: int,
    tile_kv: int,
    query_begin: int,
    query_end: int,
    key_end: int,
    device: torch.device,
) -> int:
    """Coefficients that the tiles of all lists hold."""
    first_q = query_begin // tile_q
    num_q, num_kv = -(-query_end // tile_q) - first_q, -(-key_end // tile_kv)
    num_tiles = 0
    for group in groups:
        grid = TileGrid(tile_q, tile_kv, num_q, num_kv, group.heads, device, first_q)
        num_tiles += _candidates(group.rule, grid)[0].numel()
    return num_tiles * tile_q * tile_kv


def _candidates(rule: Rule, grid: TileGrid) -> tuple[Tensor, Tensor]:
    """Codes of the tiles that may keep a coefficient, and which of them surely keep every one."""
    codes = rule.enumerate(grid)
    some, every = rule.bounds(grid.tiles(codes))
    return codes[some], every[some]


def _tiles_of_rule(rule: Rule, grid: TileGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the kept tiles, their mask numbers (-1: full) and the masks, bool `[num_masks, tile_q, tile_kv]`."""
    codes, every = _candidates(rule, grid)
    mask_ids = torch.full_like(codes, -1)
    partial = grid.tiles(codes[~every])
    representative, number = distinct(rule.keys(partial))
    masks = _evaluate(rule, partial.select(representative))
    # Bounds are allowed to be unsure: a tile may turn out full, or empty after all.
    flat = masks.flatten(1)
    is_full, is_empty = flat.all(1), ~flat.any(1)
    in_bank = ~(is_full | is_empty)
    bank_number = torch.cumsum(in_bank, 0) - 1
    place = torch.where(is_full, -1, torch.where(is_empty, -2, bank_number))
    mask_ids[~every] = place[number]
    kept = mask_ids != -2
    return codes[kept], mask_ids[kept], masks[in_bank]


def _evaluate(rule: Rule, tiles) -> Tensor:
    grid = tiles.grid
    masks = torch.empty(
        tiles.q.numel(), grid.tile_q, grid.tile_kv, dtype=torch.bool, device=grid.device
    )
    step = max(1, CHUNK // (grid.tile_q * grid.tile_kv))
    for start in range(0, tiles.q.numel(), step):
        part = slice(start, start + step)
        row = tiles.row_start[part, None, None] + grid.arange(grid.tile_q)[None, :, None]
        col = tiles.col_start[part, None, None] + grid.arange(grid.tile_kv)[None, None, :]
        masks[part] = rule.visible(tiles.head[part, None, None], row, col)
    return masks


def _lists(number, major, minor, is_partial, mask_ids, num_lists, num_major, num_minor):
    """Offsets, full counts, indices and mask numbers of the lists that run along `minor`."""
    line = number * num_major + major
    order = torch.argsort((line * 2 + is_partial) * num_minor + minor)
    counts = torch.bincount(line, minlength=num_lists * num_major)
    ends = torch.cat((counts.new_zeros(1), torch.cumsum(counts, 0)))
    starts = torch.arange(num_lists, device=line.device)[:, None] * num_major
    offsets = ends[starts + torch.arange(num_major + 1, device=line.device)]
    partial_counts = torch.bincount(line[is_partial.bool()], minlength=num_lists * num_major)
    num_full = (counts - partial_counts).view(num_lists, num_major)
    return tuple(t.to(torch.int32) for t in (offsets, num_full, minor[order], mask_ids[order]))


def _pack_bits(masks: Tensor) -> Tensor:
    count, tile_q, tile_kv = masks.shape
    width = min(32, tile_kv)
    weights = 1 << torch.arange(width, device=masks.device)
    step = max(1, CHUNK // (tile_q * tile_kv))
    packed = torch.empty(
        count, tile_q, max(1, tile_kv // 32), dtype=torch.int32, device=masks.device
    )
    for start in range(0, count, step):
        words = (masks[start : start + step].unflatten(-1, (-1, width)) * weights).sum(-1)
        # Two's complement by hand: the top bit of a word is the sign of an int32.
        packed[start : start + step] = torch.where(words >= 1 << 31, words - (1 << 32), words).to(
            torch.int32
        )
    return packed


def _empty_rows(number, q, kv, mask_ids, bank, num_lists, num_q, query_end, key_end) -> Tensor:
    """Rows before `query_end`, counted from the first tile's, that some list leaves without a key before `key_end`."""
    tile_q, tile_kv = bank.shape[1:]
    line = number * num_q + q
    full = mask_ids < 0
    has_full = torch.bincount(line[full], minlength=num_lists * num_q) > 0
    has_key = torch.zeros(num_lists * num_q, tile_q, dtype=torch.int32, device=line.device)
    last_tile = (key_end - 1) // tile_kv
    for chosen, masks in (
        (~full & (kv < last_tile), bank),
        (~full & (kv == last_tile), bank[..., : key_end - last_tile * tile_kv]),
    ):
        rows_of_mask = masks.any(-1).to(torch.int32)
        has_key.index_add_(0, line[chosen], rows_of_mask[mask_ids[chosen]])
    empty = ~(has_full[:, None] | (has_key > 0))
    empty = empty.view(num_lists, num_q * tile_q)[:, :query_end].any(0)
    return empty.nonzero().squeeze(1).cpu()


def _groups_by_head(
    layout: Layout, context: RuleContext, extra: Rule | None
) -> tuple[list[_ListGroup], list[int]]:
    """Groups of equal lists over the query heads, and the list number of each head."""
    heads_of: dict[Layout, list[int]] = {}
    for head in range(context.num_heads):
        heads_of.setdefault(layout.for_head(head), []).append(head)
    groups: list[_ListGroup] = []
    list_of = [0] * context.num_heads
    first = 0
    for part, heads in heads_of.items():
        rule = part.rule(context)
        if context.is_causal:
            rule = rule & CAUSAL
        if extra is not None:
            rule = rule & extra
        listed = tuple(heads) if rule.varies_by_head else (heads[0],)
        for place, head in enumerate(heads):
            list_of[head] = first + (place if rule.varies_by_head else 0)
        groups.append(_ListGroup(rule, listed))
        first += len(listed)
    return groups, list_of


def build_index(
    layout: Layout,
    *,
    is_causal: bool,
    num_heads: int,
    query_end: int,
    key_end: int,
    tile_q: int,
    tile_kv: int,
    device: torch.device,
    query_begin: int = 0,
    strips: tuple[Strips, ...] = (),
) -> BlockIndex:
    """The index of `layout` (intersected with causality) for queries of `[query_begin, query_end)` and keys up to `key_end`."""
    context = RuleContext(is_causal, max(query_end, key_end), num_heads, device)
    groups, list_of = _groups_by_head(layout, context, None)
    numbers = torch.tensor([list_of[:1] if len(set(list_of)) == 1 else list_of])
    span = query_begin, query_end, key_end
    counts = _counts_of(layout, is_causal, num_heads, *span, device) if strips else None
    return _build(groups, numbers, tile_q, tile_kv, strips, *span, device, counts)


@lru_cache(maxsize=COUNTED_LAYOUTS)
def _counts_of(
    layout: Layout,
    is_causal: bool,
    num_heads: int,
    query_begin: int,
    query_end: int,
    key_end: int,
    device: torch.device,
) -> dict[tuple[int, int], int]:
    """What tiles compute of these rows, by their shape: every kernel of a call weighs strips, many of them of the same shapes.

    Empty at first: what is counted is added by whoever counts it, and kept as long as this is.
    """
    return {}


def build_index_per_sequence(
    layout: Layout,
    sequences: Sequences,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    num_heads: int,
    tile_q: int,
    tile_kv: int,
    device: torch.device,
    query_begin: int = 0,
    strips: tuple[Strips, ...] = (),
) -> BlockIndex:
    """The index where lists differ between sequences: the layout depends on their length, or there is an `attn_mask`.

    Reads the table of sequences on the host. `attn_mask` is bool `[batch or 1, heads or 1, query rows, key rows]`.
    """
    groups: list[_ListGroup] = []
    numbers: list[list[int]] = []
    known: dict[object, tuple[int, list[int]]] = {}
    for line in sequences.table.tolist():
        length = max(line[Q_POS] + line[Q_LEN], line[KV_POS] + line[KV_LEN], 1)
        if attn_mask is None:
            key: object = length
        elif attn_mask.shape[0] == 1:
            key = tuple(line[1:])
        else:
            key = tuple(line)
        if key not in known:
            first_row = query_begin // tile_q * tile_q
            extra = None if attn_mask is None else _mask_rule(attn_mask, line, first_row)
            context = RuleContext(is_causal, length, num_heads, device)
            added, list_of = _groups_by_head(layout, context, extra)
            known[key] = (sum(len(group.heads) for group in groups), list_of)
            groups += added
        first, list_of = known[key]
        numbers.append([first + number for number in list_of])
    return _build(
        groups,
        torch.tensor(numbers).view(-1, num_heads),
        tile_q,
        tile_kv,
        strips,
        query_begin,
        sequences.query_end,
        sequences.key_end,
        device,
    )


def _mask_rule(attn_mask: Tensor, line: list[int], first_row: int) -> Table:
    """A caller's mask in the positions of one sequence, queries from `first_row` on."""
    part = attn_mask[
        line[BATCH] if attn_mask.shape[0] > 1 else 0,
        :,
        line[Q_ROW] : line[Q_ROW] + line[Q_LEN],
        line[KV_ROW] : line[KV_ROW] + line[KV_LEN],
    ]
    rows_before = max(line[Q_POS] - first_row, 0)  # a sequence without queries may stand anywhere
    part = torch.nn.functional.pad(part, (line[KV_POS], 0, rows_before, 0))
    if not part.numel():
        part = part.new_zeros(part.shape[0], max(1, part.shape[1]), max(1, part.shape[2]))
    return Table(part, 1, first_row)


class _IndexCache:
    """Least recently used indices, bounded in number and bytes."""

    def __init__(self) -> None:
        self.entries: OrderedDict[object, BlockIndex] = OrderedDict()
        self.num_bytes = 0
        self.lock = threading.Lock()  # the autograd engine and data parallelism call from threads

    def get(self, key: object, build) -> BlockIndex:
        with self.lock:
            index = self.entries.get(key)
            if index is not None:
                self.entries.move_to_end(key)
                return index
        index = build()
        with self.lock:
            # Another thread may have built the same meanwhile; the first stays.
            if key in self.entries:
                return self.entries[key]
            self.entries[key] = index
            self.num_bytes += index.num_bytes
            while len(self.entries) > 1 and (
                len(self.entries) > CACHED_INDICES or self.num_bytes > CACHED_BYTES
            ):
                self.num_bytes -= self.entries.popitem(last=False)[1].num_bytes
        return index

    def clear(self) -> None:
        with self.lock:
            self.entries.clear()
            self.num_bytes = 0


_cache = _IndexCache()
# Indices of a caller's mask live as long as the tensor does.
_cache_of_mask: WeakIdKeyDictionary = WeakIdKeyDictionary()


def cached_indices() -> tuple[BlockIndex, ...]:
    """The indices in the cache, but for those of a caller's mask: which tile shapes the calls since `clear_cache` asked for."""
    with _cache.lock:
        return tuple(_cache.entries.values())


def clear_cache() -> None:
    """Forget all cached indices and free their memory. CUDA graphs captured before must not be replayed after."""
    _cache.clear()
    _cache_of_mask.clear()
    _counts_of.cache_clear()
    forget_captures()


def _round_up(length: int, tile: int) -> int:
    """To the tile, and for long lengths to an eighth of a power of two, so that decoding rarely needs a new index."""
    step = max(tile, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def get_index(
    layout: Layout,
    sequences: Sequences,
    *,
    is_causal: bool,
    attn_mask: Tensor | None,
    mask_owner: Tensor | None = None,
    num_heads: int,
    tile_q: int,
    tile_kv: int,
    device: torch.device,
    of_queries_alone: bool = False,
    strips: tuple[Strips, ...] = (),
) -> BlockIndex:
    """The index for a call, from the cache where it is known; with `strips` it is built of one kind of those or of tiles, see `Strips`.

    With `of_queries_alone` it may leave out the query tiles before `sequences.query_begin`, and does where queries are few: what a
    decoding step costs is then that of the tiles its rows keep, at any length, and with causality one index serves `QUERY_SPAN` steps.

    The key holds everything the index depends on: layout, causality, heads, tile shape, strips, lengths in tiles, device. A caller's
    mask is keyed by the identity and version of `mask_owner`, the tensor that `attn_mask` is a view of, so it must not be changed in ways
    torch does not count (through `.data` or numpy).
    """
    query_end, key_end = sequences.query_end, sequences.key_end
    are_few = of_queries_alone and 2 * (query_end - sequences.query_begin) < query_end
    query_begin = sequences.query_begin // tile_q * tile_q if are_few else 0
    options: dict[str, Any] = dict(
        is_causal=is_causal,
        num_heads=num_heads,
        tile_q=tile_q,
        tile_kv=tile_kv,
        device=device,
        query_begin=query_begin,
        strips=strips,
    )
    if attn_mask is not None:
        owner = attn_mask if mask_owner is None else mask_owner
        if owner.is_inference():  # has no version, so a change would go unseen
            return build_index_per_sequence(layout, sequences, attn_mask, **options)
        indices = _cache_of_mask.setdefault(owner, {})
        key = (owner._version, layout, *options.values(), sequences)
        if key not in indices:
            if len(indices) >= CACHED_INDICES_PER_MASK:
                indices.clear()
            indices[key] = build_index_per_sequence(layout, sequences, attn_mask, **options)
        return indices[key]
    if layout.depends_on_length(is_causal) and not sequences.is_uniform:
        if sequences.is_transient:
            return build_index_per_sequence(layout, sequences, None, **options)
        key = (layout, *options.values(), sequences)
        return _cache.get(
            key,
            lambda: build_to_keep(
                device, lambda: build_index_per_sequence(layout, sequences, None, **options)
            ),
        )
    # With causality a row's list does not change with the length, so one index serves the lengths below its own.
    if is_causal and are_few and query_end <= key_end:
        options["query_begin"] = query_begin // QUERY_SPAN * QUERY_SPAN
        query_end = key_end = -(-query_end // QUERY_SPAN) * QUERY_SPAN
    elif is_causal and query_end <= key_end:
        query_end, key_end = _round_up(query_end, tile_q), _round_up(key_end, tile_kv)
    key = (layout, *options.values(), query_end, key_end)

    def build() -> BlockIndex:
        index = build_to_keep(
            device,
            lambda: build_index(layout, query_end=query_end, key_end=key_end, **options),
        )
        if not strips:
            return index
        # Who asks for the chosen shape by itself gets the same tensors.
        chosen = dict(options, tile_q=index.tile_q, tile_kv=index.tile_kv, strips=())
        return _cache.get((layout, *chosen.values(), query_end, key_end), lambda: index)

    return _cache.get(key, build)
