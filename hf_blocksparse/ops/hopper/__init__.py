"""Block-sparse attention on Hopper: kernels in Gluon for compute capability 9.0, where a call's dtype, sizes and strides suit them.

Beside `ops/triton`, whose kernels are the portable ones and the judge of these: same index, same sequences, same results. What is not
here - softcap, sinks, ALiBi, dropout, float32, values of another size than the queries, head sizes above 128, tensors the TMA cannot
address - is theirs.

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

DTYPES = (torch.float16, torch.bfloat16)
TILE = 128
LOG2_E = 1.4426950408889634
PORTABLE_TILE = 64
PORTABLE_RATE, GATHERED_RATE = 0.7, 0.5
"""Coefficients that the portable kernels compute while these compute one: in tiles of 64, or in ones gathered from strips."""
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
        and _index_of(problem).tile_q == TILE
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
        and _index_of(problem).tile_q == TILE
    )


def _index_of(problem: Problem) -> BlockIndex:
    """The index for these kernels' tiles, or one of the portable kernels' where small blocks fill those so much better that they win."""
    block_size = problem.block_size
    if block_size == 1 or block_size % TILE == 0:
        return problem.index_for(TILE, TILE)
    rate = PORTABLE_RATE if block_size >= PORTABLE_TILE else GATHERED_RATE
    portable = Strips(PORTABLE_TILE, min(block_size, PORTABLE_TILE), rate)
    return problem.index_for(TILE, TILE, False, portable)


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
    """Every reason why the forward kernel cannot run a call that `ops/triton` can; empty if it can."""
    return _unsupported(query, key, value, sinks, problem, alibi_slopes)


def unsupported_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    problem: Problem,
    alibi_slopes: Tensor | None = None,
) -> tuple[str, ...]:
    """Every reason why the backward kernel cannot run a call that `ops/triton` can; empty if it can."""
    reasons = _unsupported(query, key, value, sinks, problem, alibi_slopes)
    if torch.are_deterministic_algorithms_enabled():
        reasons += (
            "deterministic algorithms are asked for, and the order of its sums for dQ varies",
        )
    return reasons


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
    from hf_blocksparse.ops.hopper.forward_kernel import forward_kernel
    from hf_blocksparse.ops.hopper.work import schedule_for
    from hf_blocksparse.ops.triton.launch import current_device, launch

    batch, heads, query_len, head_dim = query.shape
    index = _index_of(problem)
    out = empty_rows_like(query, head_dim)
    lse = query.new_empty(batch, heads, query_len, dtype=torch.float32)
    if not problem.sequences.covers_queries or not index.num_tiles:
        out.zero_()
        lse.fill_(float("-inf"))
    if not index.num_tiles:
        return out, lse
    with current_device(query.device):
        schedule = schedule_for(index, problem.sequences, heads)
        launch(
            forward_kernel,
            (schedule.num_programs, 1, 1),
            (
                _descriptor(query, TILE // 2),
                _descriptor(key, TILE),
                _descriptor(value, TILE),
                _descriptor(out, TILE // 2),
                out,
                *out.stride()[:3],
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
            ),
            forward_constants(head_dim),
            dict(num_warps=4),
            (query.dtype, *out.stride()[:3]),
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
        differ from call to call.
    """
    from hf_blocksparse.ops.hopper.backward_kernel import backward_kernel
    from hf_blocksparse.ops.hopper.query_sums import prepare_kernel, store_kernel
    from hf_blocksparse.ops.hopper.work import column_schedule_for, transposed_bank
    from hf_blocksparse.ops.triton.launch import current_device, launch, launch_add_parts
    from hf_blocksparse.ops.triton.tiles import StridedRows

    if not any(needed[:3]):
        return None, None, None
    batch, heads, query_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    sequences = problem.sequences
    index = _index_of(problem)
    grads = [empty_rows_like(tensor, head_dim) for tensor in (query, key, value)]
    grad_query, grad_key, grad_value = grads
    if not sequences.covers_queries or not index.num_tiles:
        grad_query.zero_()
    if not sequences.covers_keys or not index.num_tiles:
        grad_key.zero_()
        grad_value.zero_()
    if index.num_tiles:
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        elif _strides_for_tma(_operand(grad_out), grad_out.element_size()) is None:
            grad_out = grad_out.clone(memory_format=torch.contiguous_format)
        dim = _padded(head_dim)
        with current_device(query.device):
            schedule = column_schedule_for(index, sequences, heads, kv_heads)
            split = schedule.split
            constants = backward_constants(head_dim, split is not None)
            log2_sums = query.new_empty(batch, heads, query_len, dtype=torch.float32)
            deltas = torch.empty_like(log2_sums)
            sums = query.new_empty(
                schedule.num_slots * heads * (TILE * dim // 32), 32, dtype=torch.float32
            )
            key_parts = value_parts = sums  # not used
            if split is not None:
                rows = split.num_slots, TILE, dim
                key_parts, value_parts = query.new_empty(2, *rows, dtype=torch.float32)
            items = sequences.q_items(TILE)
            grid = (items.shape[0], heads, 1)
            log2_sum_rows, delta_rows, out_rows, grad_out_rows, lse_rows = (
                StridedRows(tensor, tensor.stride()[:3])
                for tensor in (log2_sums, deltas, out, grad_out, lse)
            )
            grad_lse_rows = StridedRows(None, (0, 0, 0))
            if grad_lse is not None:
                grad_lse_rows = StridedRows(grad_lse, grad_lse.stride()[:3])
            dims = dict(HEAD_DIM=head_dim, DIM=dim)
            launch(
                prepare_kernel,
                grid,
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
                    schedule.first_slots,
                ),
                dims,
                dict(num_warps=8),
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
            launch(
                store_kernel,
                grid,
                (
                    sums,
                    StridedRows(grad_query, grad_query.stride()[:3]),
                    items,
                    sequences.table,
                    schedule.first_slots,
                    scale,
                ),
                dims,
                dict(num_warps=4),
            )
    grad_query, grad_key, grad_value = (
        grad if flag else None for grad, flag in zip(grads, needed, strict=False)
    )
    return grad_query, grad_key, grad_value


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


def _padded(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 128


def _descriptor(tensor: Tensor, rows: int) -> Any:
    """A descriptor of blocks of `rows` rows of one head; columns past the head size read as zero and are not written."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from hf_blocksparse.ops.triton.launch import descriptor_of

    strides = _strides_for_tma(_operand(tensor), tensor.element_size())
    assert strides is not None
    columns = _padded(tensor.shape[-1])
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
