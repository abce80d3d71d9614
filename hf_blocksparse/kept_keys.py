"""Exact attention over the keys that a freeing cache still holds.

*Columns* count the tokens of a batch row from 0, padding included, so all rows of a batch share them. A cache that frees keys holds
some intervals of columns, laid one after the other in its tensors; a `KeptKeys` on the key tensor says which. Attention is computed for
each interval at its true positions, and the parts are joined through their log-sum-exp.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_blocksparse.attention import block_sparse_attention
from hf_blocksparse.layouts import Layout
from hf_blocksparse.rules import Intervals, common_intervals, join_intervals
from hf_blocksparse.sequences import KV_LEN, KV_POS, KV_ROW, Sequences
from hf_blocksparse.transformers_masks import SequenceMask

_ATTRIBUTE = "_block_sparse_kept"


class FreeingLayer(Protocol):
    """What `KeptKeys` asks of the cache layer that its keys come from."""

    def check_reader(self, module: nn.Module, path: str) -> None:
        """Raise NotImplementedError unless `module` is the one whose layout decides what is freed."""

    def free(self, layout: Layout, first_columns: tuple[int, ...]) -> None:
        """Free what `layout` lets no later query read, in batch rows whose first tokens stand at `first_columns`."""


@dataclass(frozen=True)
class KeptKeys:
    """Which keys a tensor holds.

    Attributes:
        columns: its rows, in order.
        seen: tokens so far, those of this call included: one more than the last column.
        mask_start, mask_len: the columns that the mask of this call was made for, as the cache told transformers.
        layer: the cache layer; weak, as it holds the tensor that carries this.
    """

    columns: Intervals
    seen: int
    mask_start: int
    mask_len: int
    layer: weakref.ref[FreeingLayer]

    def put_on(self, key: Tensor) -> None:
        """Leave this on the keys that a cache returns, where the attention function finds it."""
        setattr(key, _ATTRIBUTE, self)

    def attend(
        self,
        module: nn.Module,
        path: str,
        tensors: tuple[Tensor, Tensor, Tensor],
        mask: SequenceMask,
        sequences: Sequences,
        *,
        layout: Layout,
        sinks: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """`block_sparse_attention(*tensors, return_lse=True, ...)` as if every key were there; then what can be freed is freed.

        Raises:
            NotImplementedError: `module` is not the cache layer's own, or the batch is packed.
            ValueError: a key that may be read was freed, because the layout, the window or the padding changed since.
        """
        layer = self.layer()
        assert layer is not None
        layer.check_reader(module, path)
        batch, _, query_len, _ = tensors[0].shape
        if sequences is not mask.sequences or sequences.num_sequences != batch:
            raise NotImplementedError(
                f"{path} got packed documents and a SparseCache, which holds one sequence per batch row; "
                "run packed documents with use_cache=False."
            )
        if mask.key_start != self.mask_start:
            raise NotImplementedError(
                f"attention_mask of {path} starts at token {mask.key_start}, but the cache holds its keys from token {self.mask_start} "
                "on; give the model a 2-D attention_mask, or use transformers' DynamicCache."
            )
        first_columns = _first_columns(mask)
        self._check(path, layout, query_len, first_columns)
        parts, dense = self._parts(mask)
        results = [
            block_sparse_attention(
                *tensors,
                layout,
                attn_mask=dense,
                sequences=part,
                sinks=sinks if number == 0 else None,  # a sink logit belongs to the softmax once
                return_lse=True,
                **options,
            )
            for number, part in enumerate(parts)
        ]
        joined = results[0] if len(results) == 1 else join_parts(results)
        layer.free(layout, first_columns)
        return joined

    def _check(
        self, path: str, layout: Layout, query_len: int, first_columns: tuple[int, ...]
    ) -> None:
        needed = columns_to_keep(layout, self.seen - query_len, first_columns)[0]
        held = common_intervals(needed, self.columns)
        if held != needed:
            raise ValueError(
                f"past_key_values of {path} freed keys that this call may read: it needs columns {needed} and has {held}; the layout, "
                "the model's window or the padding in attention_mask changed since they were freed; keep them as they were, or call "
                "reset() and start again."
            )

    def _parts(self, mask: SequenceMask) -> tuple[list[Sequences], Tensor | None]:
        """The sequences of each interval of columns, and the mask's dense part at the columns held."""
        if self.columns == ((self.mask_start, self.mask_start + self.mask_len),):
            return [mask.sequences], mask.dense
        if self.columns not in mask.derived:
            held = sum(stop - start for start, stop in self.columns)
            parts, row = [], 0
            for start, stop in self.columns:
                parts.append(_part(mask, start, stop, row, held))
                row += stop - start
            mask.derived[self.columns] = parts, _dense_at(mask, self.columns)
        return mask.derived[self.columns]


def kept_keys(key: Tensor) -> KeptKeys | None:
    """What a freeing cache says about its key tensor; None for the keys of any other cache."""
    return getattr(key, _ATTRIBUTE, None)


def join_parts(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from that over each.

    Args:
        parts: outputs (batch, heads, query_len, value_dim) and log-sum-exps (batch, heads, query_len); 0 and -inf where a query reads
            nothing of the set.

    Returns:
        the same two for the union.
    """
    outs, lses = zip(*parts, strict=True)
    most = torch.stack(lses).amax(0).clamp(min=torch.finfo(lses[0].dtype).min).detach()
    weights = [(lse - most).exp() for lse in lses]
    total = sum(weights[1:], weights[0])
    # The largest weight is 1; only where a query reads nothing at all is the total less: 0. (`clamp` has no gradient at its bound.)
    divisor = torch.where(total > 0, total, 1.0)
    joined = sum(weight[..., None] * out for weight, out in zip(weights, outs, strict=True))
    lse = torch.where(total > 0, most + divisor.log(), float("-inf"))
    return (joined / divisor[..., None]).to(outs[0].dtype), lse


@lru_cache(maxsize=256)
def columns_to_keep(
    layout: Layout, column: int, first_columns: tuple[int, ...]
) -> tuple[Intervals, Intervals]:
    """Columns before `column` that a query at `column` or later may read, and those worth keeping for them.

    Args:
        layout: of the layer, within the model's own window.
        column: of the next query.
        first_columns: of the first token of each batch row. Rows without a token so far may begin anywhere from `column` on.

    Returns:
        (what is needed, what to keep): the second holds the first, in no more intervals than one row alone has, as every interval costs
        an attention of its own. With the sinks of rows that are padded differently, it keeps the columns between them.
    """
    by_row: list[Intervals] = []
    for first in sorted({min(first, column) for first in first_columns}):
        readable = layout.readable_from(column - first)
        moved = tuple((start + first, stop + first) for start, stop in readable)
        by_row.append(common_intervals(moved, ((0, column),)))
    needed = join_intervals(interval for row in by_row for interval in row)
    return needed, join_intervals(_hulls(by_row))


def _hulls(by_row: list[Intervals]) -> Iterator[tuple[int, int]]:
    """From the first to the last column of the rows' first intervals, of their second ones, and so on."""
    for number in range(max(map(len, by_row))):
        same = [row[number] for row in by_row if number < len(row)]
        yield min(start for start, _ in same), max(stop for _, stop in same)


def _first_columns(mask: SequenceMask) -> tuple[int, ...]:
    """The column of the first token of each batch row. With padding, read from the device once for all layers."""
    if mask.covers_batch:
        return (0,) * mask.shape[0]
    if "first_columns" not in mask.derived:
        table = mask.sequences.table
        first = table[:, KV_ROW] - table[:, KV_POS] + mask.key_start
        mask.derived["first_columns"] = tuple(first.tolist())
    return mask.derived["first_columns"]


def _part(mask: SequenceMask, start: int, stop: int, row: int, kv_len: int) -> Sequences:
    """The mask's sequences where of all keys only columns `start` to `stop` exist, in tensor rows from `row` on."""
    table = mask.sequences.table.clone()
    first = table[:, KV_ROW] + mask.key_start
    left = first.clamp(start, stop)
    right = (first + table[:, KV_LEN]).clamp(start, stop)
    table[:, KV_POS] = (table[:, KV_POS] + left - first).clamp(min=0)
    table[:, KV_ROW] = left - start + row
    table[:, KV_LEN] = right - left
    return replace(mask.sequences, table=table, kv_len=kv_len, covers_keys=False, _items={})


@torch.inference_mode(False)  # an index is kept for ordinary tensors only
def _dense_at(mask: SequenceMask, columns: Intervals) -> Tensor | None:
    if mask.dense is None:
        return None
    place = torch.cat(
        [torch.arange(start, stop, device=mask.device) for start, stop in columns]
    ).sub(mask.key_start)
    width = mask.shape[3]
    inside = (place >= 0) & (place < width)
    dense = mask.dense.expand(*mask.dense.shape[:-1], width)
    return dense[..., place.clamp(0, width - 1)] & inside
