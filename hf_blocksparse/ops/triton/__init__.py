"""Block-sparse attention in portable Triton: the implementation `impl="triton"`.

One program computes one tile of one head and walks the tiles its list names: query tiles in the forward kernel and for
dQ, key tiles for dK and dV. Nothing is added atomically, so results are bitwise reproducible.

Triton is imported at the first call, not with this module.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from hf_blocksparse.ops.problem import Problem
from hf_blocksparse.ops.triton.tile_sizes import Direction, TileSizes, tile_sizes

if TYPE_CHECKING:
    from hf_blocksparse.block_index import BlockIndex
    from hf_blocksparse.ops.triton.tiles import Dropout, StridedRows, TileLists

LOG2_E = 1.4426950408889634
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROW_TERMS_TILE = 64


@cache
def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _interprets() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1: kernels then run on CPU tensors, slowly."""
    from triton.runtime.interpreter import InterpretedFunction

    from hf_blocksparse.ops.triton.forward import forward_kernel

    return isinstance(forward_kernel, InterpretedFunction)


@cache
def _device_capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _backend(device: torch.device) -> tuple[str, int]:
    """The name and capability under which `tile_sizes` knows a device."""
    if device.type == "cpu":
        return "cpu", 0
    if torch.version.hip is not None:
        return "hip", 0
    return "cuda", _device_capability(device)


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Every reason why these kernels cannot run a call; empty if they can."""
    reasons = []
    device = query.device
    if _triton_version() is None:
        reasons.append("triton is not installed (needs >= 3.6)")
    elif device.type == "cpu" and not _interprets():
        reasons.append("device is cpu (needs cuda, or TRITON_INTERPRET=1 set before triton loads)")
    elif device.type == "cpu" and query.dtype == torch.bfloat16:
        reasons.append("dtype is bfloat16, whose products Triton's interpreter gets wrong")
    elif device.type not in ("cpu", "cuda"):
        reasons.append(f"device is {device.type} (needs cuda)")
    elif device.type == "cuda" and torch.version.hip is None and _device_capability(device) < 80:
        reasons.append(f"compute capability is {_device_capability(device) / 10} (needs >= 8.0)")
    if query.dtype not in DTYPES:
        reasons.append(f"dtype is {query.dtype} (needs float16, bfloat16 or float32)")
    for name, size in (("head_dim", query.shape[-1]), ("value_dim", value.shape[-1])):
        if size % 8 or not 16 <= size <= 256:
            reasons.append(f"{name} is {size} (needs a multiple of 8 from 16 to 256)")
    return reasons


def attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; see docs/architecture.md, "Operation of an implementation".

    Args:
        query: [batch, query_heads, query_len, head_dim], float16, bfloat16 or float32.
        key, value: [batch, kv_heads, kv_len, head_dim] and [.., value_dim].
        sinks: [query_heads] or None.
        problem: where the sequences lie and which tiles are kept.

    Returns:
        [batch, query_heads, query_len, value_dim] in query's dtype, and float32 [batch, query_heads, query_len].
    """
    scale = problem.scale
    if scale <= 0:
        # The kernels take maxima before they scale, so the sign goes into the query.
        query, scale = query * (-1.0 if scale < 0 else 0.0), (-scale if scale < 0 else 1.0)
    query, key, value = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)
    )
    return _Attention.apply(query, key, value, sinks, problem, scale)


class _Attention(Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, problem, scale):  # type: ignore[no-untyped-def]
        out, lse = _launch_forward(query, key, value, sinks, problem, scale)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.problem = problem
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
        if grad_out is None and grad_lse is None:
            return (None,) * 6
        gradients = _AttentionBackward.apply(
            grad_out, grad_lse, *ctx.saved_tensors, ctx.problem, ctx.scale, ctx.needs_input_grad
        )
        return *gradients, None, None


class _AttentionBackward(Function):
    """The first derivative as an operation of its own, so that asking for the second one says what to do."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, grad_out, grad_lse, query, key, value, sinks, out, lse, problem, scale, needed
    ):
        return _launch_backward(
            grad_out, grad_lse, query, key, value, sinks, out, lse, problem, scale, needed
        )

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise NotImplementedError(
            "impl='triton' got a request for a second derivative; its backward kernels are not differentiable; "
            "use impl='torch'."
        )


def _launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    problem: Problem,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from hf_blocksparse.ops.triton.forward import forward_kernel

    batch, heads, query_len, _ = query.shape
    sizes = _sizes(query, value, problem, "forward")
    index = problem.index_for(sizes.tile_q, sizes.tile_kv)
    items = problem.sequences.q_items(sizes.tile_q)
    out = _empty_rows_like(query, value.shape[-1])
    lse = torch.empty(batch, heads, query_len, dtype=torch.float32, device=query.device)
    if not problem.sequences.covers_queries:
        out.zero_()
        lse.fill_(float("-inf"))
    score_scale, softcap_scale = _score_scales(scale, problem.softcap)
    with torch.cuda.device_of(query):
        forward_kernel[(items.shape[0], heads)](
            _rows(query),
            _rows(key),
            _rows(value),
            _descriptor(key, sizes.tile_kv),
            _descriptor(value, sizes.tile_kv),
            sinks,
            _rows(out),
            _rows(lse),
            items,
            problem.sequences.table,
            _query_lists(index),
            score_scale,
            softcap_scale,
            _dropout(problem),
            heads // key.shape[1],
            **_constants(query, value, sizes),
        )
    return out, lse


def _launch_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    scale: float,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    from hf_blocksparse.ops.triton.backward import (
        grad_key_value_kernel,
        grad_query_kernel,
        row_terms_kernel,
    )
    from hf_blocksparse.ops.triton.tiles import StridedRows

    batch, heads, query_len, _ = query.shape
    kv_heads = key.shape[1]
    sequences = problem.sequences
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    log2_sums, deltas = torch.empty_like(lse), torch.empty_like(lse)
    score_scale, softcap_scale = _score_scales(scale, problem.softcap)
    dropout = _dropout(problem)
    grad_query = grad_key = grad_value = grad_sinks = None
    with torch.cuda.device_of(query):
        row_terms_kernel[(-(-query_len // ROW_TERMS_TILE), heads, batch)](
            _rows(out),
            _rows(grad_out),
            _rows(lse),
            StridedRows(None, (0, 0, 0)) if grad_lse is None else _rows(grad_lse),
            _rows(log2_sums),
            _rows(deltas),
            query_len,
            VALUE_DIM=value.shape[-1],
            VALUE_DIM_PADDED=_padded(value.shape[-1]),
            TILE=ROW_TERMS_TILE,
            enable_fp_fusion=True,
        )
        if needed[0]:
            sizes = _sizes(query, value, problem, "grad_query")
            items = sequences.q_items(sizes.tile_q)
            grad_query = _empty_rows_like(query, query.shape[-1])
            if not sequences.covers_queries:
                grad_query.zero_()
            grad_query_kernel[(items.shape[0], heads)](
                _rows(query),
                _rows(key),
                _rows(value),
                _rows(grad_out),
                _rows(log2_sums),
                _rows(deltas),
                _descriptor(key, sizes.tile_kv),
                _descriptor(value, sizes.tile_kv),
                _rows(grad_query),
                items,
                sequences.table,
                _query_lists(problem.index_for(sizes.tile_q, sizes.tile_kv)),
                scale,
                score_scale,
                softcap_scale,
                dropout,
                heads // kv_heads,
                **_constants(query, value, sizes),
            )
        if needed[1] or needed[2]:
            sizes = _sizes(query, value, problem, "grad_key_value")
            items = sequences.kv_items(sizes.tile_kv)
            grad_key = _empty_rows_like(key, key.shape[-1])
            grad_value = _empty_rows_like(value, value.shape[-1])
            if not sequences.covers_keys:
                grad_key.zero_()
                grad_value.zero_()
            grad_key_value_kernel[(items.shape[0], kv_heads)](
                _rows(query),
                _rows(key),
                _rows(value),
                _rows(grad_out),
                _rows(log2_sums),
                _rows(deltas),
                _descriptor(query, sizes.tile_q),
                _descriptor(grad_out, sizes.tile_q),
                _rows(grad_key),
                _rows(grad_value),
                items,
                sequences.table,
                _key_lists(problem.index_for(sizes.tile_q, sizes.tile_kv)),
                scale,
                score_scale,
                softcap_scale,
                dropout,
                heads // kv_heads,
                **_constants(query, value, sizes),
            )
    if sinks is not None and needed[3]:
        # p of the sink itself is exp(sink - lse), and its value is 0. Rows of no sequence have +inf here.
        sink_share = torch.exp2(sinks.detach().float()[:, None] * LOG2_E - log2_sums)
        grad_sinks = -(sink_share * deltas).sum((0, 2), dtype=torch.float64).to(sinks.dtype)
    return grad_query, grad_key, grad_value, grad_sinks


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _sizes(query: Tensor, value: Tensor, problem: Problem, direction: Direction) -> TileSizes:
    return tile_sizes(
        *_backend(query.device),
        direction,
        query.shape[-1],
        value.shape[-1],
        query.element_size(),
        problem.block_size,
    )


def _constants(query: Tensor, value: Tensor, sizes: TileSizes) -> dict[str, Any]:
    # Answers for torch's old and new ways of allowing TF32 alike.
    uses_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return dict(
        HEAD_DIM=query.shape[-1],
        HEAD_DIM_PADDED=_padded(query.shape[-1]),
        VALUE_DIM=value.shape[-1],
        VALUE_DIM_PADDED=_padded(value.shape[-1]),
        TILE_Q=sizes.tile_q,
        TILE_KV=sizes.tile_kv,
        INPUT_PRECISION="tf32" if uses_tf32 and query.dtype == torch.float32 else "ieee",
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        enable_fp_fusion=True,  # Triton's default changes between releases
    )


def _score_scales(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Factors after and before the tanh, in units of log2."""
    if softcap is None:
        return scale * LOG2_E, None
    return softcap * LOG2_E, scale / softcap


def _dropout(problem: Problem) -> Dropout | None:
    from hf_blocksparse.ops.triton.tiles import Dropout

    if not problem.dropout_p:
        return None
    threshold = round(problem.dropout_p * 2**32)
    signed = threshold - 2**32 if threshold >= 2**31 else threshold
    return Dropout(problem.dropout_seed, signed, 1.0 / (1.0 - problem.dropout_p))


def _empty_rows_like(tensor: Tensor, last_size: int) -> Tensor:
    """Uninitialised, of `tensor`'s shape but for the last axis, and with heads inside or outside rows as there."""
    batch, heads, rows, _ = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty(batch, rows, heads, last_size).transpose(1, 2)
    return tensor.new_empty(batch, heads, rows, last_size)


def _rows(tensor: Tensor) -> StridedRows:
    """A tensor as a kernel argument."""
    from hf_blocksparse.ops.triton.tiles import StridedRows

    return StridedRows(tensor, tensor.stride()[:3])


def _descriptor(tensor: Tensor, tile: int) -> Any:
    """A tensor descriptor of blocks of `tile` rows of one head, None where hardware or alignment forbid it."""
    backend, capability = _backend(tensor.device)
    if backend == "hip" or (backend == "cuda" and capability < 90):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    granule = 16 // tensor.element_size()
    # The stride of an axis of one element is never used, and may be anything.
    strides = [
        stride if size > 1 else granule
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ][:-1]
    if tensor.data_ptr() % 16 or any(stride % granule or stride <= 0 for stride in strides):
        return None
    block = [1, 1, tile, _padded(tensor.shape[-1])]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], block)


def _query_lists(index: BlockIndex) -> TileLists:
    return _lists(index, index.kv_offsets, index.kv_num_full, index.kv_indices, index.kv_mask_ids)


def _key_lists(index: BlockIndex) -> TileLists:
    return _lists(index, index.q_offsets, index.q_num_full, index.q_indices, index.q_mask_ids)


def _lists(
    index: BlockIndex, offsets: Tensor, num_full: Tensor, indices: Tensor, mask_ids: Tensor
) -> TileLists:
    from hf_blocksparse.ops.triton.tiles import TileLists

    sequence_stride, head_stride = (
        0 if size == 1 else stride
        for size, stride in zip(index.list_of.shape, index.list_of.stride(), strict=True)
    )
    return TileLists(
        list_of=index.list_of,
        sequence_stride=sequence_stride,
        head_stride=head_stride,
        offsets=offsets,
        num_full=num_full,
        indices=indices,
        mask_ids=mask_ids,
        bank=index.bank,
        num_tiles=num_full.shape[1],
    )
