"""DeepSpeed's sequence parallelism: each process holds a part of the sequence, and in attention all of it for a part of the heads.

DeepSpeed puts a function before ours that exchanges heads for tokens, calls ours, and changes back ("DeepSpeed Ulysses", arXiv
2309.14509; "Arctic Long Sequence Training", arXiv 2506.13996). What it leaves to the attention it calls is here:

- it drops the mask, which describes this process's part alone: a function before DeepSpeed's hands the mask on, and together with the
  positions of all tokens it says what the mask of the whole sequence is;
- what differs by head (a layout, sinks, slopes) is cut to the heads of this process.

Tensor parallelism gives a process a part of the heads, too, but nothing says which: there a layout must be the same for all of them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from hf_blocksparse.layouts import Layout
from hf_blocksparse.model_layouts import IMPLEMENTATION, LayerAttention
from hf_blocksparse.sequences import Sequences
from hf_blocksparse.transformers_masks import SequenceMask

_DEEPSPEED = "deepspeed.runtime.sequence_parallel"
# The keyword under which a mask passes DeepSpeed's function.
MASK_OF_PART = "block_sparse_mask_of_part"
_WHOLE = "whole mask"


@dataclass(frozen=True)
class Heads:
    """The query heads `first` to `first + count - 1` of `total`, of the tokens of several processes if they share a sequence."""

    first: int
    count: int
    total: int
    shares_sequence: bool

    def layout(self, layout: Layout) -> Layout:
        layout.check(self.total, 1, 1)
        return _layout_of_heads(layout, self)

    def values(self, values: Tensor | None) -> Tensor | None:
        """These heads' entries of `[..., total]`."""
        if values is None or values.shape[-1] == self.count:
            return values
        return values[..., self.first : self.first + self.count]


@functools.lru_cache(maxsize=1024)
def _layout_of_heads(layout: Layout, heads: Heads) -> Layout:
    return layout.for_heads(heads.first, heads.count, heads.total)


@functools.lru_cache(maxsize=1024)
def _differs_by_part(layout: Layout, count: int, total: int) -> bool:
    parts = {layout.for_heads(first, count, total) for first in range(0, total, count)}
    return len(parts) > 1


def _rank_and_size() -> tuple[int, int] | None:
    """This process's place among those that share a sequence, and their number; None where none do."""
    state: Any = sys.modules.get(f"{_DEEPSPEED}.parallel_state_sp")
    if state is None or state._SEQUENCE_PARALLEL_GROUP is None or not dist.is_initialized():
        return None
    return state.get_sequence_parallel_rank(), state.get_sequence_parallel_world_size()


def hand_masks_on() -> None:
    """See to it that DeepSpeed's function, once it stands before ours, passes the masks that it drops.

    Called whenever a mask is made, as DeepSpeed does not say when it takes its place.
    """
    if _rank_and_size() is None:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    wrapper: Callable = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
    if wrapper.__module__ != f"{_DEEPSPEED}.ulysses_sp":
        return

    @functools.wraps(wrapper)
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        kwargs[MASK_OF_PART] = attention_mask
        return wrapper(module, query, key, value, None, *args, **kwargs)

    attention.__module__ = __name__
    ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = attention


def heads_of_call(state: LayerAttention, query: Tensor) -> Heads | None:
    """Which heads of a module a call has; None where it has all, or keeps the module's own attention of its part.

    Raises:
        NotImplementedError: the call has a part of the heads, the layout is not the same for all parts, and nothing says which it is.
    """
    count, total = query.shape[1], state.query_heads
    if count == total:
        return None
    path, layout, place = state.path, state.layout, _rank_and_size()
    if place is not None:
        rank, size = place
        if total != count * size:
            raise NotImplementedError(
                f"{path} got {count} query heads in each of {size} processes that share a sequence, but has "
                f"{'an unknown number' if total is None else total} in all; which heads these are cannot be told; "
                "train this model without sequence parallelism."
            )
        return Heads(rank * count, count, total, shares_sequence=True)
    if total is None or layout is None or total % count:
        return None
    if _differs_by_part(layout, count, total):
        raise NotImplementedError(
            f"{path} got {count} of its {total} query heads, as under tensor parallelism, and a layout that differs by head; nothing "
            "says which heads these are; use one layout for all heads (and BigBird without random blocks), or shard the batch, the "
            "weights or the sequence instead."
        )
    return Heads(0, count, total, shares_sequence=False)


def mask_of_all(path: str, query: Tensor, kwargs: dict[str, Any]) -> SequenceMask:
    """The mask of a whole sequence, of which each process made one for its part.

    Args:
        query: (batch, heads of this process, tokens of all, head_dim).
        kwargs: of the attention call: the mask of this process's part, which is taken out, and the positions of all tokens.

    Raises:
        NotImplementedError: the part's mask is not the same rule everywhere: padding, a tensor, a function of the model's own.
    """
    batch, _, length, _ = query.shape
    mask = kwargs.pop(MASK_OF_PART, None)
    position_ids = kwargs.get("position_ids")
    if not isinstance(mask, SequenceMask):
        what = "no mask" if mask is None else "a mask tensor"
        raise NotImplementedError(
            f"{path} got {what} under sequence parallelism, where a mask of one process's tokens says nothing of the others'; let "
            "the model make its masks (pass no 4-D attention_mask), or train it without sequence parallelism."
        )
    mask = mask.read_back()
    if mask.has_padding:
        raise NotImplementedError(
            f"attention_mask got padding in {path} under sequence parallelism, which tells the processes the positions of all tokens and "
            "nothing else; pack documents (position_ids that begin anew) instead of padding them."
        )
    if mask.dense is not None or mask.chunk_tokens is not None:
        raise NotImplementedError(
            f"attention_mask got {'chunks' if mask.dense is None else 'a mask function that is not known'} in {path} under sequence "
            "parallelism, where the mask of all tokens is known for causal and bidirectional attention, windows and packed documents; "
            "train this model without sequence parallelism."
        )
    if position_ids is None or tuple(position_ids.shape) not in ((batch, length), (1, length)):
        got = None if position_ids is None else tuple(position_ids.shape)
        raise NotImplementedError(
            f"position_ids got {got} in {path} under sequence parallelism; it must be (batch, tokens) = {(batch, length)}, as it alone "
            "says where documents begin; train this model without sequence parallelism."
        )
    if _WHOLE not in mask.derived:
        mask.derived[_WHOLE] = _mask_of_all(mask, position_ids.expand(batch, length))
    return mask.derived[_WHOLE]


def _mask_of_all(mask: SequenceMask, position_ids: Tensor) -> SequenceMask:
    batch, length = position_ids.shape
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    is_packed = bool(begins.any())
    if is_packed:
        documents = position_ids.new_zeros(batch, length)
        documents[:, 1:] = begins.cumsum(1)
        sequences = Sequences.from_document_ids(documents)
    else:
        sequences = Sequences.uniform(batch, length, length, 0, position_ids.device)
    return SequenceMask(
        batch,
        length,
        length,
        sequences,
        is_causal=mask.is_causal,
        window_tokens=mask.window_tokens,
        covers_batch=not is_packed,
    )
