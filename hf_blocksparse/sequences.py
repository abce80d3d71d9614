"""Where the sequences lie in a batch: padding, packed documents, caches and decoding as one small device table."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from hf_blocksparse.capture import build_to_keep, check_not_capturing, keep_for_capture

BATCH, Q_ROW, Q_LEN, Q_POS, KV_ROW, KV_LEN, KV_POS = range(7)

# What a graph is told of a `Sequences` beside its table, see `Sequences.facts`.
NUM_FACTS = 9
KEY_START_FACT, HAS_MASK_FACT = 7, 8
REMEMBERED_FACTS = 64
_serials = itertools.count()
_of_serial: OrderedDict[int, Sequences] = OrderedDict()


@dataclass(frozen=True, eq=False)
class Sequences:
    """Runs of tokens that attend within themselves.

    Attributes:
        table: int32 `[num_sequences, 7]`: batch row; tensor row, count and position of the first query; tensor row, count and
            position of the first key. See docs/architecture.md.
        batch: batch rows of the tensors the table was made for.
        query_len: query rows of those tensors.
        kv_len: key rows of those tensors.
        query_end: no query has this position or a later one. A host number, an upper bound where the table lives on a device.
        key_end: the same for keys.
        covers_queries: every query row of the batch belongs to a sequence.
        covers_keys: every key row of the batch belongs to a sequence.
        is_uniform: the sequences differ in their batch row alone.
        query_begin: no query has an earlier position. A host number, a lower bound where the table lives on a device.
        is_transient: the table belongs to a compiled graph, which may write another into its memory after the call; nothing that
            was made of it is kept.
    """

    table: Tensor
    batch: int
    query_len: int
    kv_len: int
    query_end: int
    key_end: int
    covers_queries: bool
    covers_keys: bool
    is_uniform: bool = False
    query_begin: int = 0
    is_transient: bool = False
    _items: dict[tuple[bool, int], Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_sequences(self) -> int:
        return self.table.shape[0]

    def q_items(self, tile: int) -> Tensor:
        """Every query tile that holds a query: int32 `[num_items, 2]` of (sequence, tile in positions), (-1, 0) where unused.

        Late tiles come first: with causality they are the long ones, and a short tail ends a launch sooner.
        """
        return self._cached_items(True, tile)

    def kv_items(self, tile: int) -> Tensor:
        """The same for key tiles, early tiles first."""
        return self._cached_items(False, tile)

    def _cached_items(self, of_queries: bool, tile: int) -> Tensor:
        items = self._items.get((of_queries, tile))
        if items is None:
            device = self.table.device
            if self.is_transient:
                items = self._make_items(of_queries, tile)
            else:
                check_not_capturing(device, "the list of tiles of these sequences")
                items = build_to_keep(device, lambda: self._make_items(of_queries, tile))
            self._items[of_queries, tile] = items
        return items

    def facts(self, has_mask: bool = False, key_start: int = 0) -> Tensor:
        """What a compiled graph carries beside the table: int64 `[NUM_FACTS]` on the CPU, so that reading it waits for no device.

        A serial number, under which these sequences are found again while they are remembered; their number; `query_begin`,
        `query_end`, `key_end`, `covers_queries`, `covers_keys`; `key_start`, the place of the first key among all tokens so far; and
        `has_mask`: whether the mask that goes along is needed.
        """
        serial = next(_serials)
        _of_serial[serial] = self
        while len(_of_serial) > REMEMBERED_FACTS:
            _of_serial.popitem(last=False)
        bounds = (self.query_begin, self.query_end, self.key_end)
        covers = (self.covers_queries, self.covers_keys)
        facts = (serial, self.num_sequences, *bounds, *covers, key_start, has_mask)
        return torch.tensor(facts, dtype=torch.int64)

    @staticmethod
    def of_graph(
        table: Tensor, facts: Tensor | None, batch: int, query_len: int, kv_len: int
    ) -> tuple[Sequences, bool]:
        """Sequences from the tensors a graph carries, and whether the mask that goes along with them is needed.

        Args:
            table: their table, which may have more rows than sequences.
            facts: see `facts`; None where nothing but the table says where the sequences lie: a static cache.
        """
        if facts is None:
            sequences = Sequences(
                table,
                batch=batch,
                query_len=query_len,
                kv_len=kv_len,
                query_end=kv_len,
                key_end=kv_len,
                covers_queries=False,
                covers_keys=False,
                is_transient=True,
            )
            return sequences, True
        serial, count, begin, query_end, key_end, *covers, _, has_mask = facts.tolist()
        known = _of_serial.get(serial)
        if known is not None and known.table.device == table.device:
            return known, bool(has_mask)
        covers_queries, covers_keys = map(bool, covers)
        sequences = Sequences(
            table[:count],
            batch=batch,
            query_len=query_len,
            kv_len=kv_len,
            query_end=query_end,
            key_end=key_end,
            covers_queries=covers_queries,
            covers_keys=covers_keys,
            query_begin=begin,
            is_transient=True,
        )
        return sequences, bool(has_mask)

    @torch.inference_mode(False)  # the items outlive the call
    def _make_items(self, of_queries: bool, tile: int) -> Tensor:
        table = self.table.long()
        length, position = table[:, [Q_LEN, Q_POS] if of_queries else [KV_LEN, KV_POS]].unbind(1)
        first = position // tile
        count = torch.where(length > 0, (position + length - 1) // tile + 1 - first, 0)
        rows = self.batch * (self.query_len if of_queries else self.kv_len)
        # A sequence of n tokens touches at most (n - 1) // tile + 2 tiles, one fewer where it starts on a tile's edge.
        slots = rows // tile + 2 * self.num_sequences
        last = torch.cumsum(count, 0)
        slot = torch.arange(slots, device=table.device)
        sequence = torch.searchsorted(last, slot, right=True)
        used = sequence < self.num_sequences
        sequence = sequence.clamp(max=self.num_sequences - 1)
        number = first[sequence] + slot - (last - count)[sequence]
        items = torch.stack((torch.where(used, sequence, -1), torch.where(used, number, 0)), 1).to(
            torch.int32
        )
        if of_queries:
            items = items[torch.argsort(items[:, 1], descending=True, stable=True)]
        return items.contiguous()

    @staticmethod
    def uniform(
        batch: int, query_len: int, kv_len: int, query_start: int, device: torch.device
    ) -> Sequences:
        """Every batch row is one sequence; its first query has position `query_start`."""
        sequences = _uniform(batch, query_len, kv_len, query_start, device)
        keep_for_capture(device, sequences)
        return sequences

    @staticmethod
    def from_key_padding(key_padding_mask: Tensor, query_len: int, query_start: int) -> Sequences:
        """One sequence per batch row: from the first to the last key that may be read. No host synchronisation.

        Args:
            key_padding_mask: bool `[batch, kv_len]`, True where a key may be read.
            query_len: query rows of the tensor.
            query_start: the key row the first query row stands at. Query rows that stand at padding are padding; those past the
                last key row are not, unless the row's keys end in padding.
        """
        batch, kv_len = key_padding_mask.shape
        place = torch.arange(kv_len, device=key_padding_mask.device)
        first = torch.where(key_padding_mask, place, kv_len).amin(1)
        end = torch.where(key_padding_mask, place + 1, 0).amax(1)
        length = (end - first).clamp(min=0)
        first = torch.where(length > 0, first, 0)
        q_row = (first - query_start).clamp(0, query_len)
        q_end = torch.where(end == kv_len, query_len, (end - query_start).clamp(0, query_len))
        table = torch.stack(
            (
                torch.arange(batch, device=place.device),
                q_row,
                (q_end - q_row).clamp(min=0),
                query_start + q_row - first,
                first,
                length,
                torch.zeros_like(first),
            ),
            1,
        ).to(torch.int32)
        return Sequences(
            table,
            batch=batch,
            query_len=query_len,
            kv_len=kv_len,
            query_end=query_start + query_len,
            key_end=kv_len,
            covers_queries=False,
            covers_keys=False,
        )

    @staticmethod
    def from_document_ids(document_ids: Tensor) -> Sequences:
        """One sequence per run of equal ids.

        Args:
            document_ids: integers `[batch, length]`, equal within a document, negative for padding.
        """
        batch, length = document_ids.shape
        ids = document_ids.long()
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        row, start = starts.nonzero().unbind(1)
        end = torch.full_like(start, length)
        same_row = row[1:] == row[:-1]
        end[:-1] = torch.where(same_row, start[1:], length)
        document = ids[row, start]
        kept = document >= 0
        named = torch.stack((row, document), 1)[kept]
        if torch.unique(named, dim=0).shape[0] != named.shape[0]:
            raise ValueError(
                "document_ids got an id in two places of one batch row; a document must be one run of tokens; "
                "number the runs apart."
            )
        run_length = torch.where(kept, end - start, 0)
        zeros = torch.zeros_like(start)
        table = torch.stack((row, start, run_length, zeros, start, run_length, zeros), 1)
        covers = bool(kept.all())
        return Sequences(
            table.to(torch.int32),
            batch=batch,
            query_len=length,
            kv_len=length,
            query_end=length,
            key_end=length,
            covers_queries=covers,
            covers_keys=covers,
        )

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Sequences:
        """Documents packed in one batch row of `length` tokens: `cu_seqlens` holds their starts and the last one's end."""
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype.is_floating_point:
            raise ValueError(
                f"cu_seqlens got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; it must be a vector of at least two integers; "
                "give the documents' starts and the last one's end."
            )
        cu_seqlens = cu_seqlens.long()
        start, count = cu_seqlens[:-1], cu_seqlens.diff()
        if bool((count < 0).any() | (cu_seqlens[0] < 0) | (cu_seqlens[-1] > length)):
            raise ValueError(
                f"cu_seqlens got {cu_seqlens.tolist()} for {length} tokens; it must ascend from 0 or more to at most their number; "
                "give the documents' starts and the last one's end."
            )
        zeros = torch.zeros_like(start)
        table = torch.stack((zeros, start, count, zeros, start, count, zeros), 1)
        return Sequences(
            table.to(torch.int32),
            batch=1,
            query_len=length,
            kv_len=length,
            query_end=length,
            key_end=length,
            covers_queries=False,
            covers_keys=False,
        )


@lru_cache(maxsize=64)
def _uniform(
    batch: int, query_len: int, kv_len: int, query_start: int, device: torch.device
) -> Sequences:
    check_not_capturing(device, "the table of sequences for these lengths")
    return build_to_keep(
        device, lambda: _make_uniform(batch, query_len, kv_len, query_start, device)
    )


@torch.inference_mode(False)  # the table outlives the call
def _make_uniform(
    batch: int, query_len: int, kv_len: int, query_start: int, device: torch.device
) -> Sequences:
    rows = [[b, 0, query_len, query_start, 0, kv_len, 0] for b in range(batch)]
    # Decoding makes a table in every step: from pinned memory the copy does not wait for the device.
    on_host = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda")
    return Sequences(
        on_host.to(device, non_blocking=True).view(batch, 7),
        batch=batch,
        query_len=query_len,
        kv_len=kv_len,
        query_end=query_start + query_len,
        key_end=kv_len,
        covers_queries=True,
        covers_keys=True,
        is_uniform=True,
        query_begin=query_start,
    )


def mask_of_keys(attention_mask: Tensor, kv_len: int, kv_offset: int) -> Tensor:
    """The part of a 2-D mask that concerns the keys, bool (batch, 1, 1, kv_len); keys past its end are padding."""
    width = kv_offset + kv_len - attention_mask.shape[1]
    padded = torch.nn.functional.pad(attention_mask, (0, max(width, 0)))
    return padded[:, None, None, kv_offset : kv_offset + kv_len]


def table_of_padding(
    batch: int,
    query_len: int,
    kv_len: int,
    q_offset: int | Tensor,
    kv_offset: int,
    first: Tensor | None,
    last: Tensor | None,
    device: torch.device,
) -> Tensor:
    """The table of one sequence per batch row, without waiting for the device; also traced into graphs.

    Args:
        first, last: place of each row's first real token and of the one after its last; None where there is no padding.
    """
    offset = torch.as_tensor(q_offset, device=device).expand(batch)
    end = offset + query_len
    if first is None or last is None:
        first = torch.zeros_like(offset)
    else:
        end = torch.minimum(last, end)
    first_query = torch.maximum(first, offset)
    first_key = first.clamp(min=kv_offset)
    return torch.stack(
        (
            torch.arange(batch, device=device),
            first_query - offset,
            (end - first_query).clamp(min=0),
            first_query - first,
            first_key - kv_offset,
            (end.clamp(max=kv_offset + kv_len) - first_key).clamp(min=0),
            first_key - first,
        ),
        1,
    ).to(torch.int32)


def sequences_of_padding(
    batch: int,
    query_len: int,
    kv_len: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device,
) -> tuple[Sequences, bool, bool]:
    """One sequence per batch row, from its first to its last real token; whether padding lies between them; whether there is none.

    Query rows that stand at padding belong to no sequence. With a static cache the keys end where the queries do, before the tensor.

    Args:
        q_offset: place of the first query among all tokens so far; a tensor where only the device knows it.
        kv_offset: place of the first key.
        attention_mask: bool (batch, tokens so far), False for padding. Reading it waits for the device.
    """
    keys_end = kv_offset + kv_len
    queries_end = (
        None if isinstance(q_offset, Tensor) else q_offset + query_len
    )  # None: only the device knows
    first: Tensor | None = None
    last: Tensor | None = None
    has_holes = False
    query_begin = 0 if isinstance(q_offset, Tensor) else q_offset
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
            raise ValueError(
                f"attention_mask got shape {tuple(attention_mask.shape)}; it must be (batch, length) with batch {batch}; "
                "give one row per batch item."
            )
        length = attention_mask.shape[1]
        if queries_end is not None and length < queries_end:
            raise ValueError(
                f"attention_mask got {length} tokens; the queries end at token {queries_end}; "
                "append ones for the tokens in the cache and the new ones."
            )
        place = torch.arange(length, device=device)
        real = attention_mask.to(device)
        first = torch.where(real, place, length).amin(1)
        last = torch.where(real, place + 1, 0).amax(1)
        state = torch.stack(((real.sum(1) < last - first).any(), real.all(), first.amax())).tolist()
        has_holes = bool(state[0])
        query_begin = max(0, query_begin - state[2])
        if state[1]:
            first = last = None
    is_whole = first is None
    covers_keys = is_whole and queries_end == keys_end
    if covers_keys and not kv_offset and queries_end is not None:
        start = queries_end - query_len
        return Sequences.uniform(batch, query_len, kv_len, start, device), has_holes, True

    table = table_of_padding(batch, query_len, kv_len, q_offset, kv_offset, first, last, device)
    sequences = Sequences(
        table,
        batch=batch,
        query_len=query_len,
        kv_len=kv_len,
        query_end=keys_end if queries_end is None else queries_end,
        key_end=keys_end,
        covers_queries=is_whole,
        covers_keys=covers_keys,
        query_begin=query_begin,
    )
    return sequences, has_holes, is_whole
