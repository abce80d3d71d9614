"""What an implementation of block-sparse attention is given besides its tensors."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_blocksparse.block_index import BlockIndex, Strips
from hf_blocksparse.sequences import Sequences


class TensorSpec(NamedTuple):
    """All of a tensor that decides how a call runs. Checks read nothing else, so calls with equal ones are checked once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class IndexFor(Protocol):
    """The block index of a call for a tile shape, built on first use and cached.

    With `of_queries_alone` it may begin at a later query tile than the first, its `first_q_tile`, and costs no more than the tiles that
    the rows near the call's queries keep. With `strips` it is one of those where some of them suit the layout better.
    """

    def __call__(
        self,
        tile_q: int,
        tile_kv: int,
        of_queries_alone: bool = False,
        strips: tuple[Strips, ...] = (),
        /,
    ) -> BlockIndex: ...


@dataclass(frozen=True, eq=False)
class Problem:
    """One attention call, already checked and resolved.

    Attributes:
        index_for: the block index for a tile shape, see `IndexFor`.
        sequences: where the sequences lie in the batch, on the tensors' device.
        block_size: grain of the layout in tokens (1 where it is token-exact); a hint for choosing tiles.
        scale: factor on the scores.
        softcap: scores become `softcap * tanh(score / softcap)`; None for none.
        dropout_p: probability of dropping a coefficient.
        dropout_seed: int64 scalar tensor on the tensors' device, None without dropout.
        portable: only kernels that run on every GPU may be chosen.
        recordings: what an implementation keeps for the next call of the same problem.
    """

    index_for: IndexFor
    sequences: Sequences
    block_size: int
    scale: float
    softcap: float | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    portable: bool = False
    recordings: dict[Any, Any] = field(default_factory=dict, repr=False)


def empty_rows_like(tensor: Tensor, last_size: int) -> Tensor:
    """Uninitialised, of `tensor`'s shape but for the last axis, and with heads inside or outside rows as there."""
    batch, heads, rows, _ = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty(batch, rows, heads, last_size).transpose(1, 2)
    return tensor.new_empty(batch, heads, rows, last_size)
