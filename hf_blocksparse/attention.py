"""`block_sparse_attention`: checks a call, resolves its layout, chooses the implementation."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, Literal, overload
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_blocksparse.block_index import BlockIndex, Strips, get_index
from hf_blocksparse.capture import check_values_readable, keep_for_capture
from hf_blocksparse.layouts import (
    BlockDiagonal,
    Layout,
    SlidingWindow,
    TensorLayout,
    check_block_size,
    layout_from_name,
)
from hf_blocksparse.ops.problem import Problem, TensorSpec
from hf_blocksparse.sequences import KV_LEN, Q_POS, Sequences

Implementation = Literal["auto", "triton", "torch"]
IMPLEMENTATIONS = ("auto", "triton", "torch")

REMEMBERED_CALLS = 128

# A tensor given as layout again and again is packed once, for as long as it lives and does not change.
_layout_of_tensor: WeakIdKeyDictionary = WeakIdKeyDictionary()


def resolve_layout(layout: Layout | str | Tensor, block_size: int | None = None) -> Layout:
    """The layout meant by a layout, a preset's name or a 0/1 tensor of blocks."""
    if isinstance(layout, Layout):
        if block_size is not None and block_size != layout.grain:
            raise ValueError(
                f"block_size got {block_size} beside {layout!r}, whose own is {layout.grain}; block_size belongs to tensors and "
                "preset names; leave it out."
            )
        return layout
    if isinstance(layout, str):
        return layout_from_name(layout, block_size)
    if isinstance(layout, Tensor):
        if block_size is None:
            raise ValueError(
                f"block_size got None for a layout tensor of shape {tuple(layout.shape)}; a tensor needs the size of its blocks; "
                "give block_size=16, 32, 64 or 128."
            )
        check_block_size(block_size, "TensorLayout")
        if layout.is_inference():  # has no version, so a change would go unseen
            return TensorLayout.from_tensor(layout, block_size)
        known = _layout_of_tensor.setdefault(layout, {})
        key = (layout._version, block_size)
        if key not in known:
            known.clear()
            known[key] = TensorLayout.from_tensor(layout, block_size)
        return known[key]
    raise TypeError(
        f"layout got {type(layout).__name__}; it must be a layout, a preset's name or a 0/1 tensor; "
        "for example SinkWindow(sink=64, window=1024)."
    )


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    if not isinstance(tensor, Tensor):
        _check_is_tensor(name, tensor)
    return TensorSpec(tensor.shape, tensor.dtype, tensor.device)


def _check_is_tensor(name: str, value: object, device: torch.device | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} got {type(value).__name__}; it must be a tensor; convert it with torch.as_tensor."
        )
    if device is not None and value.device != device:
        raise ValueError(
            f"{name} is on {value.device}; it must be on the device of query, {device}; move it with .to(query.device)."
        )


def _check_tensors(query: TensorSpec, key: TensorSpec, value: TensorSpec, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.device.type == "meta":
            raise NotImplementedError(
                f"{name} is on the meta device; attention needs numbers; move it to a CPU or a GPU."
            )
        if len(tensor.shape) != 4:
            raise ValueError(
                f"{name} got shape {tuple(tensor.shape)}; it must be (batch, heads, length, head_dim); reshape it."
            )
        if not tensor.dtype.is_floating_point or tensor.dtype not in (
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
        ):
            raise TypeError(
                f"{name} got dtype {tensor.dtype}; it must be float16, bfloat16, float32 or float64; convert it with .to()."
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} got {tensor.dtype} on {tensor.device}; query is {query.dtype} on {query.device} and all three must agree; "
                "convert with .to(query)."
            )
        if 0 in tensor.shape:
            raise ValueError(
                f"{name} got shape {tuple(tensor.shape)}; no axis may be empty; skip the call for empty batches."
            )
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"query, key, value got shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; batch must agree in all, "
            "heads and length in key and value; check how they were split into heads."
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"key got head_dim {key.shape[-1]}; query has {query.shape[-1]} and they must agree; only value may have its own."
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads or (heads != kv_heads and not enable_gqa):
        raise ValueError(
            f"key got {kv_heads} heads for {heads} query heads; kv_heads must divide query_heads "
            "(and equal them with enable_gqa=False); check the number of heads."
        )


def _check_call(
    query: TensorSpec,
    key: TensorSpec,
    value: TensorSpec,
    sinks: TensorSpec | None,
    *,
    enable_gqa: bool,
    dropout_p: float,
    scale: float | None,
    softcap: float | None,
) -> None:
    """Everything that can be said against a call without its masks, sequences and layout."""
    _check_tensors(query, key, value, enable_gqa)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p got {dropout_p}; it must be in [0, 1); 0.0 turns dropout off.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap got {softcap}; it must be positive; None turns it off.")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale got {scale}; it must be finite; None means head_dim ** -0.5.")
    if sinks is not None:
        heads = query.shape[1]
        if sinks.device != query.device:
            raise ValueError(
                f"sinks is on {sinks.device}; it must be on the device of query, {query.device}; move it with .to(query.device)."
            )
        if tuple(sinks.shape) != (heads,) or not sinks.dtype.is_floating_point:
            raise ValueError(
                f"sinks got {sinks.dtype} of shape {tuple(sinks.shape)}; it must be floating point of shape (query_heads,) = ({heads},); "
                "give one logit per query head."
            )


def _resolve_mask(attn_mask: Tensor, query: TensorSpec, kv_len: int) -> Tensor:
    """A view of the caller's mask with four axes."""
    _check_is_tensor("attn_mask", attn_mask, query.device)
    if attn_mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask got dtype {attn_mask.dtype}; it must be bool, True where a key may be read (additive masks are not supported); "
            "convert a 0/1 mask with .bool(), a 0/-inf mask with (mask == 0)."
        )
    target = (query.shape[0], query.shape[1], query.shape[2], kv_len)
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if attn_mask.dim() > 4 or any(
        size not in (1, goal) for size, goal in zip(shape, target, strict=True)
    ):
        raise ValueError(
            f"attn_mask got shape {tuple(attn_mask.shape)}; it must broadcast to (batch, heads, query_len, kv_len) = {target}; reshape it."
        )
    return attn_mask.view(shape).expand(shape[0], shape[1], target[2], target[3])


def _resolve_slopes(alibi_slopes: Tensor, query: Tensor) -> Tensor:
    """[batch, query_heads] of the accumulator's dtype."""
    _check_is_tensor("alibi_slopes", alibi_slopes, query.device)
    batch, heads = query.shape[:2]
    shape = tuple(alibi_slopes.shape)
    if shape not in ((heads,), (batch, heads)) or not alibi_slopes.dtype.is_floating_point:
        raise ValueError(
            f"alibi_slopes got {alibi_slopes.dtype} of shape {shape}; it must be floating point of shape (query_heads,) = ({heads},) or "
            f"(batch, query_heads) = {(batch, heads)}; give one slope per query head."
        )
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return alibi_slopes.to(dtype).expand(batch, heads)


def _resolve_sequences(
    query: TensorSpec,
    kv_len: int,
    query_start: int | None,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
    sequences: Sequences | None,
) -> tuple[Sequences, Tensor | None]:
    """Where the sequences lie, and a mask for holes in the padding, which a table of runs cannot hold."""
    batch, _, query_len, _ = query.shape
    given = {
        "key_padding_mask": key_padding_mask,
        "document_ids": document_ids,
        "sequences": sequences,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            f"{' and '.join(names)} got values together; they say the same thing; give one (negative document_ids are padding)."
        )
    if query_start is not None and (document_ids is not None or sequences is not None):
        raise ValueError(
            f"query_start got {query_start} beside {names[0]}, which says where the queries stand; give one; leave query_start out."
        )
    if sequences is not None:
        _check_sequences(sequences, query, kv_len)
        return sequences, None
    if query_start is None:
        query_start = kv_len - query_len
    if not isinstance(query_start, int):
        raise TypeError(
            f"query_start got {query_start!r}; it must be an integer; give the position of the first query."
        )
    if query_start < 0:
        raise ValueError(
            f"query_start got {query_start} (by default kv_len - query_len = {kv_len} - {query_len}); it must not be negative; "
            "give query_start=0 if queries and keys both start at position 0."
        )
    if document_ids is not None:
        _check_is_tensor("document_ids", document_ids)
        if tuple(document_ids.shape) != (batch, query_len) or query_len != kv_len:
            raise ValueError(
                f"document_ids got shape {tuple(document_ids.shape)} for query_len {query_len} and kv_len {kv_len}; it must be "
                "(batch, length) with query_len == kv_len; packed documents have no cache."
            )
        if document_ids.dtype.is_floating_point or document_ids.dtype == torch.bool:
            raise TypeError(
                f"document_ids got dtype {document_ids.dtype}; it must be an integer type; number the documents from 0."
            )
        check_values_readable(query.device, "document_ids")
        return Sequences.from_document_ids(document_ids.to(query.device)), None
    if key_padding_mask is not None:
        _check_is_tensor("key_padding_mask", key_padding_mask)
        if tuple(key_padding_mask.shape) != (batch, kv_len) or key_padding_mask.dtype != torch.bool:
            raise ValueError(
                f"key_padding_mask got {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}; it must be bool of shape "
                f"(batch, kv_len) = {(batch, kv_len)}, True where a key may be read; convert it with .bool()."
            )
        check_values_readable(query.device, "key_padding_mask")
        key_padding_mask = key_padding_mask.to(query.device)
        resolved = Sequences.from_key_padding(key_padding_mask, query_len, query_start)
        has_holes = key_padding_mask.sum() != resolved.table[:, KV_LEN].sum()
        facts = torch.stack((has_holes, resolved.table[:, Q_POS].amin())).tolist()
        holes = key_padding_mask[:, None, None, :] if facts[0] else None
        return replace(resolved, query_begin=max(0, facts[1])), holes
    return Sequences.uniform(batch, query_len, kv_len, query_start, query.device), None


def _check_sequences(sequences: Sequences, query: TensorSpec, kv_len: int) -> None:
    if not isinstance(sequences, Sequences):
        raise TypeError(
            f"sequences got {type(sequences).__name__}; it must be a Sequences; make one with Sequences.from_document_ids."
        )
    made_for = (sequences.batch, sequences.query_len, sequences.kv_len)
    here = (query.shape[0], query.shape[2], kv_len)
    if made_for != here:
        raise ValueError(
            f"sequences got a table made for (batch, query_len, kv_len) = {made_for}; this call has {here}; make one for these tensors."
        )
    _check_is_tensor("sequences.table", sequences.table, query.device)


def _version_of(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def choose_implementation(
    impl: str, query: TensorSpec, key: TensorSpec, value: TensorSpec, slopes_need_grad: bool
) -> ModuleType:
    """The module that runs a call with such tensors; NotImplementedError, with the reasons, where a named one cannot."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"impl got {impl!r}; it must be one of {IMPLEMENTATIONS}; 'auto' takes Triton on a GPU and torch elsewhere."
        )
    from hf_blocksparse.ops import torch_blocks

    if impl == "torch" or (impl == "auto" and query.device.type == "cpu"):
        chosen: ModuleType = torch_blocks
        reasons = torch_blocks.unsupported(query, key, value, slopes_need_grad)
    else:
        from hf_blocksparse.ops import triton as chosen

        reasons = chosen.unsupported(query, key, value, slopes_need_grad)
        if reasons and impl == "auto":
            _say_once(f"block_sparse_attention runs in torch operations: {'; '.join(reasons)}.")
            return torch_blocks
    if reasons:
        other = "torch" if impl == "triton" else "triton"
        raise NotImplementedError(
            f"impl={impl!r} cannot run: {'; '.join(reasons)}; change the input or use impl={other!r}."
        )
    return chosen


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout | str | Tensor,
    *,
    block_size: int | None = ...,
    is_causal: bool = ...,
    attn_mask: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    document_ids: Tensor | None = ...,
    sequences: Sequences | None = ...,
    query_start: int | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    allow_empty_rows: bool = ...,
    return_lse: Literal[False] = ...,
    impl: Implementation = ...,
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout | str | Tensor,
    *,
    block_size: int | None = ...,
    is_causal: bool = ...,
    attn_mask: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    document_ids: Tensor | None = ...,
    sequences: Sequences | None = ...,
    query_start: int | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    allow_empty_rows: bool = ...,
    return_lse: Literal[True],
    impl: Implementation = ...,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout | str | Tensor,
    *,
    block_size: int | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    sequences: Sequences | None = None,
    query_start: int | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    allow_empty_rows: bool = False,
    return_lse: bool = False,
    impl: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each query reads only the keys that `layout` keeps.

    What is computed is the layout intersected with causality, `attn_mask`, padding and documents. Layouts are evaluated in positions
    of the *sequence*: windows, sinks and block grids start anew in each document, and outputs do not depend on padding.

    Args:
        query: (batch, query_heads, query_len, head_dim), float16, bfloat16 or float32 (float64 in torch operations).
        key: (batch, kv_heads, kv_len, head_dim); kv_heads divides query_heads, and keys are never repeated in memory (GQA, MQA).
        value: (batch, kv_heads, kv_len, value_dim).
        layout: a layout, a preset's name, or a 0/1 tensor `[blocks, blocks]` or `[heads, blocks, blocks]` of any dtype on any device.
        block_size: tokens per block of a layout tensor or of a block-exact preset.
        is_causal: a query reads no later position. Queries end where the keys end (see `query_start`), unlike torch's
            `scaled_dot_product_attention`, which aligns both at their start.
        attn_mask: bool, broadcastable to (batch, query_heads, query_len, kv_len), True where a key may be read. Its partial tiles
            cost memory, and the index is built again for each new tensor. It must not be changed behind torch's back.
        key_padding_mask: bool (batch, kv_len), True where a key may be read. Query rows at padding are padding: their output is 0.
        document_ids: integers (batch, length), equal within a packed document, negative for padding.
        sequences: a ready table of sequences, instead of the three above.
        query_start: position of the first query; `kv_len - query_len` by default.
        dropout_p: probability of dropping a coefficient after the softmax, drawn from the device's torch generator.
        scale: factor on the scores, `head_dim ** -0.5` by default.
        enable_gqa: False refuses fewer key heads than query heads.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: (query_heads,) logits that take part in the softmax without a value (gpt-oss).
        alibi_slopes: (query_heads,) or (batch, query_heads), floating point: scores become `score - slope * |i - j|` for the positions
            i of the query and j of the key in their sequence ("Train Short, Test Long", arXiv 2108.12409), after the softcap. Holes in
            `key_padding_mask` count as positions.
        allow_empty_rows: accept a layout that leaves queries without a key: output 0, LSE -inf, zero gradients. Padding and
            `attn_mask` may always do that.
        return_lse: also return the log-sum-exp of each row's kept scores, float32 (batch, query_heads, query_len), natural logarithm.
        impl: "triton", "torch" or "auto" (Triton on a GPU, on Hopper its own kernels where they can run the call; torch elsewhere).
            A named one never falls back; "triton" are the portable kernels on any GPU.

    Returns:
        (batch, query_heads, query_len, value_dim) in query's dtype, accumulated in float32; with `return_lse` also the LSE. Gradients
        flow to query, key, value, sinks, and back from the LSE; to alibi_slopes, and second derivatives, with impl="torch" only.

    Under torch.compile the call is one operator of the graph, and lengths are dynamic. Layouts must be made outside of the compiled
    function; layout tensors and `sequences` break the graph; an index of `attn_mask` is built in each call, forward and backward.

    Raises:
        ValueError, TypeError: an argument is wrong; the message says which, why and what to do.
        NotImplementedError: the implementation asked for cannot run the call.
        RuntimeError: a mask was changed in place between forward and backward, or a CUDA graph is being captured and an index not cached.
    """
    is_traced = torch.compiler.is_compiling()
    if is_traced and (sequences is not None or not _has_name(layout, block_size)):
        from hf_blocksparse.untraced import run_outside_of_graphs

        return run_outside_of_graphs(
            block_sparse_attention,
            query,
            key,
            value,
            layout,
            block_size=block_size,
            is_causal=is_causal,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            document_ids=document_ids,
            sequences=sequences,
            query_start=query_start,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=enable_gqa,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            allow_empty_rows=allow_empty_rows,
            return_lse=return_lse,
            impl=impl,
        )
    specs = (
        spec_of("query", query),
        spec_of("key", key),
        spec_of("value", value),
        None if sinks is None else spec_of("sinks", sinks),
    )
    resolved = resolve_layout(layout, block_size)
    slopes_need_grad = False
    if alibi_slopes is not None:
        alibi_slopes = _resolve_slopes(alibi_slopes, query)
        slopes_need_grad = alibi_slopes.requires_grad and torch.is_grad_enabled()
    if is_traced:
        _check_call(
            *specs, enable_gqa=enable_gqa, dropout_p=dropout_p, scale=scale, softcap=softcap
        )
        out, lse = record_call(
            query,
            key,
            value,
            sinks,
            alibi_slopes,
            resolved,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            document_ids=document_ids,
            query_start=query_start,
            is_causal=is_causal,
            dropout_p=dropout_p,
            scale=scale,
            softcap=softcap,
            allow_empty_rows=allow_empty_rows,
            impl=impl,
        )
        return (out, lse) if return_lse else out
    chosen, problem = prepare(
        *specs,
        resolved,
        is_causal=is_causal,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        document_ids=document_ids,
        sequences=sequences,
        query_start=query_start,
        dropout_p=dropout_p,
        dropout_seed=_draw_seed(dropout_p, query.device),
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
        allow_empty_rows=allow_empty_rows,
        impl=impl,
        slopes_need_grad=slopes_need_grad,
    )
    if torch.is_autocast_enabled(query.device.type):
        # It would round the scores to its dtype; accumulation is in float32.
        with torch.autocast(query.device.type, enabled=False):
            out, lse = chosen.attention(query, key, value, sinks, alibi_slopes, problem)
    else:
        out, lse = chosen.attention(query, key, value, sinks, alibi_slopes, problem)
    return (out, lse) if return_lse else out


def record_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    layout: Layout,
    *,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    softcap: float | None,
    impl: str,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    sequence_table: Tensor | None = None,
    sequence_facts: Tensor | None = None,
    query_start: int | None = None,
    window_tokens: int | None = None,
    chunk_tokens: int | None = None,
    allow_empty_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a traced call: one node of the graph, registered by hf_blocksparse.library, which runs what an eager call does.

    What `block_sparse_attention` has no argument for is how a graph holds sequences (`Sequences.of_graph`) and the window and chunks
    of a model, within which the layout is taken: no layout can be made while tracing.
    """
    operator = torch.ops.hf_blocksparse.attention_forward
    # What a CUDA graph may hold, and what reads numbers of the host in every call.
    overload = operator.default if sequence_facts is None else operator.with_facts
    return overload(
        query,
        key,
        value,
        sinks,
        alibi_slopes,
        attn_mask,
        key_padding_mask,
        document_ids,
        sequence_table,
        sequence_facts,
        _draw_seed(dropout_p, query.device),
        layout.digest,
        query_start,
        window_tokens,
        chunk_tokens,
        is_causal,
        dropout_p,
        scale,
        softcap,
        allow_empty_rows,
        impl,
        alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled(),
    )


@lru_cache(maxsize=1024)
def within(layout: Layout, window_tokens: int | None, chunk_tokens: int | None) -> Layout:
    """The layout within a model's own window, `|i - j| < window_tokens`, and chunks of tokens."""
    if window_tokens is not None:
        layout = layout & SlidingWindow(window_tokens)
    if chunk_tokens is not None:
        layout = layout & BlockDiagonal(chunk_tokens)
    return layout


def _has_name(layout: object, block_size: int | None) -> bool:
    """Whether a compiled graph can name the layout; others would have to be made, and their tensor read, while tracing."""
    return isinstance(layout, Layout) or (isinstance(layout, str) and block_size is None)


def _draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    if not dropout_p:
        return None
    return torch.randint(1 << 62, (), dtype=torch.int64, device=device)


def prepare(
    query: TensorSpec,
    key: TensorSpec,
    value: TensorSpec,
    sinks: TensorSpec | None,
    layout: Layout,
    *,
    is_causal: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
    sequences: Sequences | None,
    query_start: int | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None,
    allow_empty_rows: bool,
    impl: str,
    slopes_need_grad: bool,
) -> tuple[ModuleType, Problem]:
    """The implementation of a call of `block_sparse_attention` and what it is given, after all checks."""
    scale = None if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    values = (
        query, key, value, sinks, layout, is_causal, sequences, query_start, dropout_p, scale,
        enable_gqa, softcap, allow_empty_rows, impl, slopes_need_grad,
    )  # fmt: skip
    is_known = (
        attn_mask is None
        and key_padding_mask is None
        and document_ids is None
        and dropout_seed is None
        and not (isinstance(sequences, Sequences) and sequences.is_transient)
    )
    if not is_known:
        return _prepare(*values, attn_mask, key_padding_mask, document_ids, dropout_seed)
    chosen, problem = _prepare_known(*values)
    keep_for_capture(query.device, problem.sequences)
    return chosen, problem


def _prepare(
    query: TensorSpec,
    key: TensorSpec,
    value: TensorSpec,
    sinks: TensorSpec | None,
    layout: Layout,
    is_causal: bool,
    sequences: Sequences | None,
    query_start: int | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None,
    allow_empty_rows: bool,
    impl: str,
    slopes_need_grad: bool,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    dropout_seed: Tensor | None = None,
) -> tuple[ModuleType, Problem]:
    _check_call(
        query,
        key,
        value,
        sinks,
        enable_gqa=enable_gqa,
        dropout_p=dropout_p,
        scale=scale,
        softcap=softcap,
    )
    chosen = choose_implementation(impl, query, key, value, slopes_need_grad)
    return chosen, make_problem(
        query,
        key,
        layout,
        is_causal=is_causal,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        document_ids=document_ids,
        sequences=sequences,
        query_start=query_start,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        scale=scale,
        softcap=softcap,
        allow_empty_rows=allow_empty_rows,
        portable=impl != "auto",
    )


# Where nothing but the operands is a tensor: checks in Python take longer than a short attention.
_prepare_known = lru_cache(maxsize=REMEMBERED_CALLS)(_prepare)


def make_problem(
    query: TensorSpec,
    key: TensorSpec,
    layout: Layout,
    *,
    is_causal: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
    sequences: Sequences | None,
    query_start: int | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    scale: float | None,
    softcap: float | None,
    allow_empty_rows: bool,
    portable: bool,
) -> Problem:
    """What an implementation is given for a call of `block_sparse_attention`, whose arguments these are."""
    device, heads, kv_len = query.device, query.shape[1], key.shape[2]
    mask = None if attn_mask is None else _resolve_mask(attn_mask, query, kv_len)
    where, holes = _resolve_sequences(
        query, kv_len, query_start, key_padding_mask, document_ids, sequences
    )
    mask_owner = attn_mask
    if holes is not None:
        holes = holes.expand(-1, -1, query.shape[2], -1)
        # Two masks make a new tensor, which no later call can name: its index is not kept.
        mask, mask_owner = (holes, key_padding_mask) if mask is None else (mask & holes, None)
    layout.check(heads, where.query_end, where.key_end)
    # The backward builds its index from the mask again.
    mask_owner = mask if mask_owner is None else mask_owner
    mask_version = _version_of(mask_owner)
    # A single query at the last key reads no later one, so causality hides nothing and gives an index that serves later steps, too.
    is_last = where.is_uniform and query.shape[2] == 1 and where.query_end == where.key_end
    hides_later = is_causal or (is_last and not layout.depends_on_length(False))
    # Without a mask an index of this problem is right for as long as somebody keeps it.
    known: dict[tuple[int, int, bool, tuple[Strips, ...]], ReferenceType[BlockIndex]] = {}

    def index_for(
        tile_q: int, tile_kv: int, of_queries_alone: bool = False, strips: tuple[Strips, ...] = ()
    ) -> BlockIndex:
        asked = tile_q, tile_kv, of_queries_alone, strips
        index = known[asked]() if asked in known else None
        if index is None:
            index = find_index(*asked)
            if mask is None:
                known[asked] = ref(index)
        keep_for_capture(device, index)
        return index

    def find_index(
        tile_q: int, tile_kv: int, of_queries_alone: bool, strips: tuple[Strips, ...]
    ) -> BlockIndex:
        options: dict[str, Any] = dict(
            is_causal=hides_later,
            num_heads=heads,
            tile_q=tile_q,
            tile_kv=tile_kv,
            device=device,
            of_queries_alone=of_queries_alone,
            strips=strips,
        )
        index = get_index(layout, where, attn_mask=None, **options)
        if not allow_empty_rows and index.empty_rows.numel():
            _check_rows(index, where, layout, is_causal)
        if mask is None:
            return index
        if _version_of(mask_owner) != mask_version:
            name = "attn_mask" if mask_owner is attn_mask else "key_padding_mask"
            raise RuntimeError(
                f"{name} got changed in place between forward and backward; the gradients need it as it was; "
                f"change a copy, or pass {name}.clone()."
            )
        return get_index(layout, where, attn_mask=mask, mask_owner=mask_owner, **options)

    return Problem(
        index_for=index_for,
        sequences=where,
        block_size=layout.grain,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        portable=portable,
    )


def _check_rows(index: BlockIndex, where: Sequences, layout: Layout, is_causal: bool) -> None:
    empty = index.empty_rows
    empty = empty[(empty >= where.query_begin) & (empty < where.query_end)]
    if empty.numel():
        raise ValueError(
            f"layout got {layout!r}, which leaves {empty.numel()} queries without a key (first: position {int(empty[0])}"
            f"{', with causality' if is_causal else ''}); every query needs one; keep the diagonal, for example "
            "`layout | SlidingWindow(1)`, or pass allow_empty_rows=True for outputs of 0."
        )
