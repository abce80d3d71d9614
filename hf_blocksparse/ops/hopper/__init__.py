"""Block-sparse attention on Hopper: kernels in Gluon for compute capability 9.0, where a call's dtype, sizes and strides suit them.

Beside `ops/triton`, whose kernels are the portable ones and the judge of these: same index, same sequences, same results. What is not
here - softcap, sinks, ALiBi, dropout, float32, values of another size than the queries, head sizes above 128, tensors the TMA cannot
address - is theirs.

Triton is imported at the first call, not with this module.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_blocksparse.ops.problem import Problem, empty_rows_like

DTYPES = (torch.float16, torch.bfloat16)
TILE = 128
LOG2_E = 1.4426950408889634
ALIGNMENT_BYTES = 16
"""Of the address and of every stride but the last one's: what the TMA can address."""


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def _tma_strides(tensor: Tensor) -> tuple[int, ...] | None:
    """Strides for a tensor descriptor; None if the TMA cannot address the tensor."""
    from hf_blocksparse.ops.triton.launch import descriptor_strides

    if tensor.data_ptr() % ALIGNMENT_BYTES or tensor.stride(-1) != 1:
        return None
    return descriptor_strides(
        "cuda", 90, tuple(tensor.shape), tensor.stride(), tensor.element_size()
    )


def takes_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    problem: Problem,
) -> bool:
    """Whether a call that `ops/triton` can run is better run by `forward`."""
    # Smaller blocks would fill the tiles of their unions badly.
    suits_tiles = problem.block_size == 1 or problem.block_size % TILE == 0
    return (
        suits_tiles
        and not problem.portable
        and not unsupported_forward(query, key, value, sinks, problem, alibi_slopes)
    )


def unsupported_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    problem: Problem,
    alibi_slopes: Tensor | None = None,
) -> list[str]:
    """Every reason why the forward kernel cannot run a call that `ops/triton` can; empty if it can."""
    if query.device.type != "cuda" or not _is_hopper(query.device):
        return ["the device is not of compute capability 9.0"]
    reasons = []
    if query.dtype not in DTYPES:
        reasons.append(f"dtype is {query.dtype} (needs float16 or bfloat16)")
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if head_dim % 8 or not 32 < head_dim <= 128:
        reasons.append(f"head_dim is {head_dim} (needs a multiple of 8 from 40 to 128)")
    if value_dim != head_dim:
        reasons.append(f"value_dim is {value_dim} (needs head_dim, {head_dim})")
    if problem.softcap is not None:
        reasons.append("there is a softcap")
    if sinks is not None:
        reasons.append("there are sinks")
    if alibi_slopes is not None:
        reasons.append("there are ALiBi slopes")
    if problem.dropout_p:
        reasons.append("there is dropout")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if _tma_strides(tensor) is None:
            reasons.append(
                f"{name} has strides {tensor.stride()} or an address that are no multiples of {ALIGNMENT_BYTES} bytes"
            )
    return reasons


def forward(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, without gradients; `scale` is positive and `unsupported_forward` is empty.

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
    index = problem.index_for(TILE, TILE)
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
        )
    return out, lse


def forward_constants(head_dim: int) -> dict[str, Any]:
    """What the forward kernel is compiled for besides the types of its arguments."""
    # Queries of 64 columns fit into the consumers' registers beside everything else, those of 128 do not.
    is_small = head_dim <= 64
    return dict(
        HEAD_DIM=head_dim,
        DIM=64 if is_small else 128,
        STAGES=4 if is_small else 2,
        Q_IN_REGISTERS=is_small,
        CONSUMER_REGISTERS=240,
        PRODUCER_REGISTERS=24,
    )


def _descriptor(tensor: Tensor, rows: int) -> Any:
    """A descriptor of blocks of `rows` rows of one head; columns past the head size read as zero and are not written."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, 64 if tensor.shape[-1] <= 64 else 128]
    strides = _tma_strides(tensor)
    assert strides is not None
    return TensorDescriptor(
        tensor, list(tensor.shape), list(strides), block, _layout(rows, block[-1], tensor.dtype)
    )


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    element = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], element)
