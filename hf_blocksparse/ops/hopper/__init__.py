"""Block-sparse attention on Hopper: kernels in Gluon for compute capability 9.0, where a call's dtype, sizes and strides suit them.

Beside `ops/triton`, whose kernels are the portable ones and the judge of these: same index, same sequences, same results. What is not
here - softcap, sinks, ALiBi, dropout, float32, values of another size than the queries, head sizes above 128, tensors the TMA cannot
address - is theirs.

There are kernels with tiles of 128, and kernels with tiles of 64 for layouts that would leave much of those empty, or where results must
be reproducible.

Triton is imported at the first call, not with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_blocksparse.block_index import BlockIndex, Strips
from hf_blocksparse.ops.problem import Problem, empty_rows_like
from hf_blocksparse.ops.triton.tile_sizes import (
    FIXED_KEYS,
    GATHERED_RATE,
    Direction,
    narrow_rate,
    narrow_tile_sizes,
)
from hf_blocksparse.sequences import Sequences

DTYPES = (torch.float16, torch.bfloat16)
TILE, SMALL_TILE, STRIP = 128, 64, 32
LOG2_E = 1.4426950408889634
SMALL_RATE = 0.85
"""Coefficients that the kernels with tiles of 64 compute while those with tiles of 128 compute one.

On an NVIDIA H200 it is 0.76 to 0.89 forward and 0.98 to 1.07 backward for windows of 128 to 1,024 tokens, 0.87 to 0.91 and 0.84 to 0.90 for
blocks of 64 and 128, 1.07 and 0.72 where every tile has a mask."""
STRIP_RATE = 0.9
"""The same for strips of `STRIP` keys, which one of these kernels gathers, forward, beside tiles of 128.

On an NVIDIA H200 it is 1.3 to 1.4 where every tile of 128 has a mask, and 0.8 for windows, whose tiles have none and whose strips hold 0.95
of them."""
GATHERED_FORWARD_RATE = 0.7
GATHERED_BACKWARD_RATES = {TILE: {64: 0.6, 128: 0.5}, SMALL_TILE: {64: 0.7, 128: 0.6}}
"""Coefficients that the portable kernels compute in tiles gathered from strips while these compute one in tiles of 128; backward, by head
size (at most 64 or 128), also while these compute one in tiles of 64.

On an NVIDIA H200, random layouts of blocks of 32 and 16: 0.67 to 0.75 forward and 0.44 to 0.50 backward; 0.61 to 0.70 in both. At head
size 64 their narrow tiles, which come at `narrow_rate` beside gathered ones, stand for 0.58 to 0.63 backward. BigBird with blocks of 32,
backward, head sizes 64 and 128: 0.64 and 0.47 to 0.52; 0.73 and 0.53 to 0.61. (The forward has strips of its own for blocks of 32.)"""
PACKED_FORWARD_RATE, PACKED_BACKWARD_RATE = 0.7, 0.27
"""The same beside tiles of 128, where the heads of a group fill the portable kernels' tiles together.

Quotients of rates on an NVIDIA H200, random layouts of blocks of 16 and 32 that 4 heads share (docs/tuning.md): 0.67 to 0.87 and, at head
size 128, 0.26 to 0.33. The backward's is lower because dK and dV are summed over the heads of a group, in key tiles as narrow as a block.
Where results must be reproducible it stands beside tiles of 64, too, where it could be higher."""
SMALL_OPTIONS = {"num_warps": 4, "maxnreg": 128}
"""Of kernels with tiles of 64: so many registers leave room for two programs on a multiprocessor."""
ALIGNMENT_BYTES = 16
"""Of the address and of every stride but the last one's: what the TMA can address."""


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def takes_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    problem: Problem,
) -> bool:
    """Whether a call that `ops/triton` can run is better run by `forward`."""
    return (
        not problem.portable
        and not unsupported_forward(query, key, value, sinks, problem, alibi_slopes)
        and _is_of_these_kernels(
            _index_of_forward(problem, query.shape[3], query.shape[1] // key.shape[1]),
            narrowest=STRIP,
        )
    )


def takes_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    problem: Problem,
) -> bool:
    """Whether a call that `ops/triton` can run is better run by `backward`."""
    return (
        not problem.portable
        and not unsupported_backward(query, key, value, sinks, problem, alibi_slopes)
        and _is_of_these_kernels(
            _index_of_backward(problem, query.shape[3], query.shape[1] // key.shape[1]),
            narrowest=SMALL_TILE,
        )
    )


def _is_of_these_kernels(index: BlockIndex, narrowest: int) -> bool:
    return index.tile_q >= SMALL_TILE and index.tile_kv >= narrowest


def _index_of_tiles(problem: Problem, largest: int, strips: tuple[Strips, ...] = ()) -> BlockIndex:
    """The index for tiles of 64 or 128, whichever these kernels are faster with, or for `strips`.

    `largest`: side of the tiles that may be chosen.
    """
    if largest > SMALL_TILE and problem.block_size % TILE:
        strips = (Strips(SMALL_TILE, SMALL_TILE, SMALL_RATE), *strips)
    return problem.index_for(largest, largest, False, strips)


@cache
def _portable_strips(
    direction: Direction, head_dim: int, block_size: int, rate: float
) -> tuple[Strips, ...]:
    """What the portable kernels would take for blocks below 64; `rate`: of their gathered tiles."""
    strips = (Strips(SMALL_TILE, block_size, rate, per_query=FIXED_KEYS),)
    narrow = narrow_tile_sizes(
        "cuda", 90, direction, head_dim, head_dim, DTYPES[0].itemsize, block_size
    )
    if narrow is None:
        return strips
    relative = narrow_rate(direction, head_dim, head_dim, block_size) / GATHERED_RATE
    kind = Strips(*narrow.index_shape(direction), rate * relative, per_query=FIXED_KEYS)
    return (*strips, kind)


def _packed_strips(block_size: int, group_size: int, rate: float) -> tuple[Strips, ...]:
    """The same where the heads of a group fill tiles together."""
    if group_size == 1:
        return ()
    return (Strips(SMALL_TILE, block_size, rate, group_size, per_query=FIXED_KEYS),)


def _index_of_forward(problem: Problem, head_dim: int, group_size: int) -> BlockIndex:
    """The index of the faster kernels: for tiles of 64 or 128, or for strips, of these kernels (`STRIP`) or the portable ones.

    Tiles of 64 are always among the choices: the portable kernels, which have such tiles, too, and slower ones, would not take the strips
    that lose against them. (At about 1,000 tokens a few such calls are left to them still.)

    `group_size`: query heads per key head, which fill the portable kernels' tiles together where they share lists.
    """
    block_size = problem.block_size
    if not 1 < block_size < SMALL_TILE:
        return _index_of_tiles(problem, TILE)
    if block_size == STRIP:
        strips: tuple[Strips, ...] = (Strips(SMALL_TILE, STRIP, STRIP_RATE),)
    else:
        strips = _portable_strips("forward", head_dim, block_size, GATHERED_FORWARD_RATE)
    packed = _packed_strips(block_size, group_size, PACKED_FORWARD_RATE)
    return _index_of_tiles(problem, TILE, strips + packed)


def _index_of_backward(problem: Problem, head_dim: int, group_size: int) -> BlockIndex:
    """The same for the backward, which has strips in the portable kernels alone.

    Tiles of 128 have their parts of dQ added up in no fixed order; the kernels with tiles of 64 are reproducible.
    """
    largest = SMALL_TILE if torch.are_deterministic_algorithms_enabled() else TILE
    block_size = problem.block_size
    if not 1 < block_size < SMALL_TILE:
        return _index_of_tiles(problem, largest)
    rate = GATHERED_BACKWARD_RATES[largest][64 if head_dim <= 64 else 128]
    strips = _portable_strips("grad_query", head_dim, block_size, rate)
    packed = _packed_strips(block_size, group_size, PACKED_BACKWARD_RATE)
    return _index_of_tiles(problem, largest, strips + packed)


class Operand(NamedTuple):
    """All of a tensor that decides whether the kernels can run a call."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    misalignment: int  # of the address, in bytes


def _operand(tensor: Tensor) -> Operand:
    return Operand(tensor.shape, tensor.stride(), tensor.data_ptr() % ALIGNMENT_BYTES)


@lru_cache(maxsize=1024)
def _strides_for_tma(operand: Operand, itemsize: int) -> tuple[int, ...] | None:
    """Strides for a tensor descriptor; None if the TMA cannot address the tensor."""
    from hf_blocksparse.ops.triton.launch import descriptor_strides

    if operand.misalignment or operand.strides[-1] != 1:
        return None
    return descriptor_strides("cuda", 90, operand.shape, operand.strides, itemsize)


def _unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    problem: Problem,
    alibi_slopes: Tensor | None,
) -> tuple[str, ...]:
    if query.device.type != "cuda" or not _is_hopper(query.device):
        return ("the device is not of compute capability 9.0",)
    absent = {
        "a softcap": problem.softcap is None,
        "sinks": sinks is None,
        "ALiBi slopes": alibi_slopes is None,
        "dropout": not problem.dropout_p,
    }
    return _reasons_against(
        query.dtype,
        _operand(query),
        _operand(key),
        _operand(value),
        tuple(name for name, is_absent in absent.items() if not is_absent),
    )


@lru_cache(maxsize=1024)
def _reasons_against(
    dtype: torch.dtype, query: Operand, key: Operand, value: Operand, features: tuple[str, ...]
) -> tuple[str, ...]:
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"dtype is {dtype} (needs float16 or bfloat16)")
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if head_dim % 8 or not 32 < head_dim <= 128:
        reasons.append(f"head_dim is {head_dim} (needs a multiple of 8 from 40 to 128)")
    if value_dim != head_dim:
        reasons.append(f"value_dim is {value_dim} (needs head_dim, {head_dim})")
    reasons += [f"there are {name}" if name[-1] == "s" else f"there is {name}" for name in features]
    for name, operand in (("query", query), ("key", key), ("value", value)):
        if _strides_for_tma(operand, dtype.itemsize) is None:
            reasons.append(
                f"{name} has strides {operand.strides} or an address that are no multiples of {ALIGNMENT_BYTES} bytes"
            )
    return tuple(reasons)


def unsupported_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    problem: Problem,
    alibi_slopes: Tensor | None = None,
) -> tuple[str, ...]:
    """Every reason why the forward kernels cannot run a call that `ops/triton` can; empty if they can."""
    return _unsupported(query, key, value, sinks, problem, alibi_slopes)


def unsupported_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    problem: Problem,
    alibi_slopes: Tensor | None = None,
) -> tuple[str, ...]:
    """Every reason why the backward kernels cannot run a call that `ops/triton` can; empty if they can."""
    return _unsupported(query, key, value, sinks, problem, alibi_slopes)


def forward(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, without gradients; `scale` is positive and `takes_forward` says yes.

    Args:
        query: [batch, query_heads, query_len, head_dim], float16 or bfloat16.
        key, value: [batch, kv_heads, kv_len, head_dim].
        problem: where the sequences lie and which tiles are kept.
        scale: factor on the scores.

    Returns:
        [batch, query_heads, query_len, head_dim] in query's dtype and order of axes in memory, and float32
        [batch, query_heads, query_len].
    """
    from hf_blocksparse.ops.hopper.work import rows_kept, schedule_for
    from hf_blocksparse.ops.triton.launch import current_device, launch

    batch, heads, query_len, head_dim = query.shape
    index = _index_of_forward(problem, head_dim, heads // key.shape[1])
    out = empty_rows_like(query, head_dim)
    lse = query.new_empty(batch, heads, query_len, dtype=torch.float32)
    if not problem.sequences.covers_queries or not index.num_tiles:
        out.zero_()
        lse.fill_(float("-inf"))
    if not index.num_tiles:
        return out, lse
    with current_device(query.device):
        schedule = schedule_for(index, problem.sequences, heads)
        out_strides = out.stride()[:3]
        rest = (
            lse,
            schedule.records,
            schedule.offsets,
            index.kv_indices,
            index.kv_mask_ids,
            index.bank,
            scale * LOG2_E,
            heads,
            heads // key.shape[1],
            query_len,
            key.shape[2],
        )
        if index.tile_q == SMALL_TILE:
            from hf_blocksparse.ops.hopper.small_forward_kernel import small_forward_kernel

            # Tiles of 64 do not read it.
            kept = rows_kept(index) if index.tile_kv == STRIP else index.bank
            launch(
                small_forward_kernel,
                (schedule.num_programs, 1, 1),
                (
                    _descriptor(query, SMALL_TILE),
                    _descriptor(key, index.tile_kv, SMALL_TILE),
                    _descriptor(value, index.tile_kv, SMALL_TILE),
                    _descriptor(out, SMALL_TILE),
                    out,
                    out_strides,
                    kept,
                    *rest,
                ),
                small_forward_constants(head_dim, index.tile_kv),
                SMALL_OPTIONS,
                (query.dtype, out_strides),
            )
            return out, lse
        from hf_blocksparse.ops.hopper.forward_kernel import forward_kernel

        launch(
            forward_kernel,
            (schedule.num_programs, 1, 1),
            (
                _descriptor(query, TILE // 2),
                _descriptor(key, TILE),
                _descriptor(value, TILE),
                _descriptor(out, TILE // 2),
                out,
                *out_strides,
                *rest,
            ),
            forward_constants(head_dim),
            dict(num_warps=4),
            (query.dtype, *out_strides),
        )
    return out, lse


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    scale: float,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value; `scale` is positive and `takes_backward` says yes.

    Args:
        grad_out: of `out`, which has its shape, or None for zeros.
        grad_lse: float32 [batch, query_heads, query_len] or None for zeros.
        query, key, value, problem, scale: what `forward` was given.
        out, lse: what it returned.
        needed: one flag per gradient.

    Returns:
        What `needed` names, each in its input's dtype and order of axes in memory, None elsewhere. The last bits of the gradient of query
        differ from call to call, but for layouts that take tiles of 64 and where torch's deterministic algorithms are on.
    """
    if not any(needed[:3]):
        return None, None, None
    sequences = problem.sequences
    index = _index_of_backward(problem, query.shape[3], query.shape[1] // key.shape[1])
    grads = [empty_rows_like(tensor, query.shape[3]) for tensor in (query, key, value)]
    grad_query, grad_key, grad_value = grads
    if not sequences.covers_queries or not index.num_tiles:
        grad_query.zero_()
    if not sequences.covers_keys or not index.num_tiles:
        grad_key.zero_()
        grad_value.zero_()
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif _strides_for_tma(_operand(grad_out), grad_out.element_size()) is None:
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    if index.num_tiles and index.tile_q == SMALL_TILE:
        _run_two_passes(
            grad_out, grad_lse, query, key, value, out, lse, sequences, index, scale, needed,
            grad_query, grad_key, grad_value,
        )  # fmt: skip
    elif index.num_tiles:
        _run_one_pass(
            grad_out, grad_lse, query, key, value, out, lse, sequences, index, scale,
            grad_query, grad_key, grad_value,
        )  # fmt: skip
    grad_query, grad_key, grad_value = (
        grad if flag else None for grad, flag in zip(grads, needed, strict=False)
    )
    return grad_query, grad_key, grad_value


def _prepare_rows(
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    sequences: Sequences,
    sums: Tensor | None = None,
    first_slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row terms of the backward kernels: log-sum-exps in base 2 and deltas, float32 [batch, query_heads, query_len].

    Args:
        sums: where dQ is added up, from slot `first_slots[sequence]` on; zeroed here. None for the two passes.
    """
    from hf_blocksparse.ops.hopper.query_sums import prepare_kernel
    from hf_blocksparse.ops.triton.launch import launch
    from hf_blocksparse.ops.triton.tiles import StridedRows

    heads, head_dim = out.shape[1], out.shape[3]
    log2_sums = out.new_empty(out.shape[:3], dtype=torch.float32)
    deltas = torch.empty_like(log2_sums)
    items = sequences.q_items(TILE)
    log2_sum_rows, delta_rows, out_rows, grad_out_rows, lse_rows = (
        StridedRows(tensor, tensor.stride()[:3])
        for tensor in (log2_sums, deltas, out, grad_out, lse)
    )
    grad_lse_rows = StridedRows(None, (0, 0, 0))
    if grad_lse is not None:
        grad_lse_rows = StridedRows(grad_lse, grad_lse.stride()[:3])
    launch(
        prepare_kernel,
        (items.shape[0], heads, 1),
        (
            out_rows,
            grad_out_rows,
            lse_rows,
            grad_lse_rows,
            log2_sum_rows,
            delta_rows,
            sums,
            items,
            sequences.table,
            first_slots,
        ),
        dict(HEAD_DIM=head_dim, DIM=_padded(head_dim)),
        dict(num_warps=8),
    )
    return log2_sums, deltas


def _run_one_pass(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    index: BlockIndex,
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Writes all three gradients, of the rows that the sequences own, with tiles of 128."""
    from hf_blocksparse.ops.hopper.backward_kernel import backward_kernel
    from hf_blocksparse.ops.hopper.query_sums import store_kernel
    from hf_blocksparse.ops.hopper.work import column_schedule_for, transposed_bank
    from hf_blocksparse.ops.triton.launch import current_device, launch, launch_add_parts
    from hf_blocksparse.ops.triton.tiles import StridedRows

    heads, query_len, head_dim = query.shape[1:]
    kv_heads, kv_len = key.shape[1:3]
    dim = _padded(head_dim)
    with current_device(query.device):
        schedule = column_schedule_for(index, sequences, heads, kv_heads)
        split = schedule.split
        constants = backward_constants(head_dim, split is not None)
        sums = query.new_empty(
            schedule.num_slots * heads * (TILE * dim // 32), 32, dtype=torch.float32
        )
        key_parts = value_parts = sums  # not used
        if split is not None:
            rows = split.num_slots, TILE, dim
            key_parts, value_parts = query.new_empty(2, *rows, dtype=torch.float32)
        log2_sums, deltas = _prepare_rows(
            out, grad_out, lse, grad_lse, sequences, sums, schedule.first_slots
        )
        launch(
            backward_kernel,
            (schedule.num_programs, 1, 1),
            (
                _descriptor(query, constants["STEP"]),
                _descriptor(key, TILE // 2),
                _descriptor(value, TILE // 2),
                _descriptor(grad_out, constants["STEP"]),
                _sums_descriptor(sums),
                _descriptor(grad_key, TILE // 2),
                _descriptor(grad_value, TILE // 2),
                grad_key,
                grad_key.stride()[:3],
                grad_value,
                grad_value.stride()[:3],
                key_parts,
                value_parts,
                log2_sums,
                deltas,
                schedule.records,
                schedule.offsets,
                index.q_indices,
                index.q_mask_ids,
                transposed_bank(index),
                scale,
                scale * LOG2_E,
                heads,
                heads // kv_heads,
                query_len,
                kv_len,
            ),
            constants,
            dict(num_warps=4),
            (query.dtype, grad_key.stride()[:3], grad_value.stride()[:3]),
        )
        if split is not None:
            launch_add_parts(split, key_parts, value_parts, grad_key, grad_value, scale, 1.0)
        items = sequences.q_items(TILE)
        launch(
            store_kernel,
            (items.shape[0], heads, 1),
            (
                sums,
                StridedRows(grad_query, grad_query.stride()[:3]),
                items,
                sequences.table,
                schedule.first_slots,
                scale,
            ),
            dict(HEAD_DIM=head_dim, DIM=dim),
            dict(num_warps=4),
        )


def _run_two_passes(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    index: BlockIndex,
    scale: float,
    needed: Sequence[bool],
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Writes the gradients that `needed` names, of the rows that the sequences own, with tiles of 64."""
    from hf_blocksparse.ops.hopper.key_pass_kernel import key_pass_kernel
    from hf_blocksparse.ops.hopper.query_pass_kernel import query_pass_kernel
    from hf_blocksparse.ops.hopper.work import column_schedule_for, schedule_for, transposed_bank
    from hf_blocksparse.ops.triton.launch import current_device, launch, launch_add_parts

    heads, query_len, head_dim = query.shape[1:]
    kv_heads, kv_len = key.shape[1:3]
    dim = _padded(head_dim)
    counts = (heads, heads // kv_heads, query_len, kv_len)
    with current_device(query.device):
        log2_sums, deltas = _prepare_rows(out, grad_out, lse, grad_lse, sequences)
        inputs = (
            _descriptor(query, SMALL_TILE),
            _descriptor(key, SMALL_TILE),
            _descriptor(value, SMALL_TILE),
            _descriptor(grad_out, SMALL_TILE),
        )
        if needed[1] or needed[2]:
            columns = column_schedule_for(index, sequences, heads, kv_heads)
            split = columns.split
            key_parts = value_parts = log2_sums  # not used
            if split is not None:
                slots = split.num_slots, SMALL_TILE, dim
                key_parts, value_parts = query.new_empty(2, *slots, dtype=torch.float32)
            key_strides, value_strides = grad_key.stride()[:3], grad_value.stride()[:3]
            launch(
                key_pass_kernel,
                (columns.num_programs, 1, 1),
                (
                    *inputs,
                    _descriptor(grad_key, SMALL_TILE),
                    _descriptor(grad_value, SMALL_TILE),
                    grad_key,
                    key_strides,
                    grad_value,
                    value_strides,
                    key_parts,
                    value_parts,
                    log2_sums,
                    deltas,
                    columns.records,
                    columns.offsets,
                    index.q_indices,
                    index.q_mask_ids,
                    transposed_bank(index),
                    scale,
                    scale * LOG2_E,
                    *counts,
                ),
                key_pass_constants(head_dim),
                SMALL_OPTIONS,
                (query.dtype, key_strides, value_strides),
            )
            if split is not None:
                launch_add_parts(split, key_parts, value_parts, grad_key, grad_value, scale, 1.0)
        if needed[0]:
            rows = schedule_for(index, sequences, heads)
            query_strides = grad_query.stride()[:3]
            launch(
                query_pass_kernel,
                (rows.num_programs, 1, 1),
                (
                    *inputs,
                    _descriptor(grad_query, SMALL_TILE),
                    grad_query,
                    query_strides,
                    log2_sums,
                    deltas,
                    rows.records,
                    rows.offsets,
                    index.kv_indices,
                    index.kv_mask_ids,
                    index.bank,
                    scale,
                    scale * LOG2_E,
                    *counts,
                ),
                query_pass_constants(head_dim),
                SMALL_OPTIONS,
                (query.dtype, query_strides),
            )


@cache
def forward_constants(head_dim: int) -> dict[str, Any]:
    """What the forward kernel is compiled for besides the types of its arguments."""
    from hf_blocksparse.ops.hopper.forward_kernel import some_by_polynomial

    # Queries of 64 columns fit into the consumers' registers beside everything else, those of 128 do not. There the exponentials take as
    # long as the products, so they are what is sped up; with 128 columns the products decide, and waiting later for them was slower.
    is_small = head_dim <= 64
    return dict(
        HEAD_DIM=head_dim,
        DIM=_padded(head_dim),
        STAGES=4 if is_small else 2,
        Q_IN_REGISTERS=is_small,
        OVERLAPS_VALUES=is_small,
        POLYNOMIALS=some_by_polynomial(1) if is_small else None,
        CONSUMER_REGISTERS=240,
        PRODUCER_REGISTERS=24,
    )


@cache
def backward_constants(head_dim: int, in_parts: bool) -> dict[str, Any]:
    """What the backward kernel is compiled for besides the types of its arguments; `in_parts`: whether key tiles are split."""
    is_small = head_dim <= 64
    return dict(
        HEAD_DIM=head_dim,
        DIM=_padded(head_dim),
        STEP=128 if is_small else 64,  # query rows of a step
        IN_PARTS=in_parts,
        CONSUMER_REGISTERS=240,
        OTHERS_REGISTERS=24,
    )


@cache
def small_forward_constants(head_dim: int, strip: int) -> dict[str, Any]:
    """What the forward kernel with tiles of 64 is compiled for besides the types of its arguments; `strip`: keys of a part of a step."""
    is_small = head_dim <= 64
    return dict(
        HEAD_DIM=head_dim,
        DIM=_padded(head_dim),
        STRIP=strip,
        STAGES=6 if is_small else 3,
        Q_IN_REGISTERS=is_small,
        PRODUCER_REGISTERS=24,
    )


@cache
def key_pass_constants(head_dim: int) -> dict[str, Any]:
    """What the kernel of dK and dV with tiles of 64 is compiled for besides the types of its arguments."""
    return dict(
        HEAD_DIM=head_dim,
        DIM=_padded(head_dim),
        SLOTS=4 if head_dim <= 64 else 2,
        PRODUCER_REGISTERS=24,
    )


@cache
def query_pass_constants(head_dim: int) -> dict[str, Any]:
    """What the kernel of dQ with tiles of 64 is compiled for besides the types of its arguments."""
    is_small = head_dim <= 64
    return dict(
        HEAD_DIM=head_dim,
        DIM=_padded(head_dim),
        STAGES=10 if is_small else 5,
        IN_REGISTERS=is_small,
        PRODUCER_REGISTERS=24,
    )


def _padded(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 128


def _descriptor(tensor: Tensor, rows: int, columns: int | None = None) -> Any:
    """A descriptor of blocks of `rows` rows of one head and `columns` columns, or all of them; columns past the head size read as zero
    and are not written."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from hf_blocksparse.ops.triton.launch import descriptor_of

    strides = _strides_for_tma(_operand(tensor), tensor.element_size())
    assert strides is not None
    columns = columns or _padded(tensor.shape[-1])
    layout = _layout(rows, columns, tensor.dtype)
    return descriptor_of(TensorDescriptor, tensor, strides, (1, 1, rows, columns), layout)


def _sums_descriptor(sums: Tensor) -> Any:
    """A descriptor of the parts that dQ is added up in: 64 x 64 numbers as 128 rows of 32."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from hf_blocksparse.ops.triton.launch import descriptor_of

    return descriptor_of(TensorDescriptor, sums, (32, 1), (128, 32), _sums_layout())


@cache
def _sums_layout() -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([128, 32], gl.float32)


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    element = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], element)
