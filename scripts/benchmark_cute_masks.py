"""The masks of partial tiles in CuTe's language, for FlashAttention-4. Importing this needs flash-attn-4.

FlashAttention-4 calls `mask(batch, head, query, key, lengths, tensors)` for each coefficient of a partial tile, with positions as vectors
of one element; True keeps it. Factories bind the numbers of a layout, which become constants of the kernel.
"""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


@cute.jit
def causal(batch, head, query, key, lengths, tensors):
    return key <= query


def causal_window(before: int) -> Callable:
    @cute.jit
    def mask(batch, head, query, key, lengths, tensors):
        reach = utils.scalar_to_ssa(before, cutlass.Int32)
        return (key <= query) & (query - key <= reach)

    return mask


def causal_sink_window(before: int, sink: int) -> Callable:
    @cute.jit
    def mask(batch, head, query, key, lengths, tensors):
        reach = utils.scalar_to_ssa(before, cutlass.Int32)
        first = utils.scalar_to_ssa(sink, cutlass.Int32)
        return (key <= query) & ((query - key <= reach) | (key < first))

    return mask


def longformer(before: int, both: int) -> Callable:
    @cute.jit
    def mask(batch, head, query, key, lengths, tensors):
        reach = utils.scalar_to_ssa(before, cutlass.Int32)
        first = utils.scalar_to_ssa(both, cutlass.Int32)
        near = (query - key <= reach) & (key - query <= reach)
        return near | (key < first) | (query < first)

    return mask


def table(block_size: int) -> Callable:
    """`tensors[0]` is int32 `[heads, blocks, blocks]`, 1 where a block is kept."""

    @cute.jit
    def mask(batch, head, query, key, lengths, tensors):
        size = utils.scalar_to_ssa(block_size, cutlass.Int32)
        row, col = query // size, key // size
        found = utils.scalar_to_ssa(tensors[0][head[0], row[0], col[0]], cutlass.Int32)
        return found == utils.scalar_to_ssa(1, cutlass.Int32)

    return mask


def causal_table(block_size: int) -> Callable:
    """`table` within the causal triangle."""

    @cute.jit
    def mask(batch, head, query, key, lengths, tensors):
        size = utils.scalar_to_ssa(block_size, cutlass.Int32)
        row, col = query // size, key // size
        found = utils.scalar_to_ssa(tensors[0][head[0], row[0], col[0]], cutlass.Int32)
        return (found == utils.scalar_to_ssa(1, cutlass.Int32)) & (key <= query)

    return mask
