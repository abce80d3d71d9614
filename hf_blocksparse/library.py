"""The operation as torch.library operators, so that `torch.compile` keeps the graph whole.

`hf_blocksparse::attention_forward` and `hf_blocksparse::attention_backward` take tensors and plain values. A layout is named by its
digest and looked up when the operator runs, and so are the block index and the table of sequences: nothing of them is in the graph, so
lengths stay dynamic. `block_sparse_attention` calls them where it is traced, and its autograd function everywhere else.

Registered on import. See docs/architecture.md, "Operators".
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_blocksparse.attention import prepare, spec_of, within
from hf_blocksparse.capture import check_values_readable
from hf_blocksparse.layouts import Layout, layout_from_digest
from hf_blocksparse.ops.problem import Problem, empty_rows_like
from hf_blocksparse.sequences import NUM_FACTS, Sequences, mask_of_keys, sequences_of_padding

_OPTIONS = (
    "Tensor? attn_mask, Tensor? key_padding_mask, Tensor? document_ids, Tensor? sequence_table, Tensor? sequence_facts, "
    "Tensor? dropout_seed, str layout, SymInt? query_start, int? window_tokens, int? chunk_tokens, bool is_causal, float dropout_p, "
    "float? scale, float? softcap, bool allow_empty_rows, str impl, bool slopes_need_grad"
)
# query, key, value, sinks and alibi_slopes have gradients; masks, documents, sequences and the seed have none.
_NUM_WITH_GRADIENT, _NUM_TENSORS = 5, 11
_FACTS = 9

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
# A replayed CUDA graph runs no Python, which is what reads facts.
_TAGS_OF_FACTS = (*_TAGS, torch.Tag.cudagraph_unsafe)

_library = torch.library.Library("hf_blocksparse", "DEF")
for overload, tags in (("", _TAGS), (".with_facts", _TAGS_OF_FACTS)):
    _library.define(
        f"attention_forward{overload}(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? alibi_slopes, {_OPTIONS}) "
        "-> (Tensor, Tensor)",
        tags=tags,
    )
    _library.define(
        f"attention_backward{overload}(Tensor? grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? sinks, "
        "Tensor? alibi_slopes, Tensor out, Tensor lse, "
        f"{_OPTIONS}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        tags=tags,
    )
_library.define(
    "describe_sequences(Tensor? attention_mask, Tensor? document_ids, Tensor? offset, SymInt batch, SymInt query_len, SymInt kv_len, "
    "SymInt q_offset, SymInt kv_offset, Device device) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)


@cache
def _layout_of(digest: str) -> Layout:
    # A graph that was traced with a layout keeps it, like any other constant.
    return layout_from_digest(digest)


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
    sequence_table: Tensor | None,
    sequence_facts: Tensor | None,
    dropout_seed: Tensor | None,
    layout: str,
    query_start: int | None,
    window_tokens: int | None,
    chunk_tokens: int | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    softcap: float | None,
    allow_empty_rows: bool,
    impl: str,
    slopes_need_grad: bool,
) -> tuple[ModuleType, Problem]:
    sequences = None
    if sequence_facts is not None:
        check_values_readable(query.device, "sequence_facts")
    if sequence_table is not None:
        sequences, has_mask = Sequences.of_graph(
            sequence_table, sequence_facts, query.shape[0], query.shape[2], key.shape[2]
        )
        attn_mask = attn_mask if has_mask else None
    # Compiled code writes new values into old buffers without counting versions, so an index of a mask is not found again by the tensor.
    return prepare(
        spec_of("query", query),
        spec_of("key", key),
        spec_of("value", value),
        None if sinks is None else spec_of("sinks", sinks),
        within(_layout_of(layout), window_tokens, chunk_tokens),
        is_causal=is_causal,
        attn_mask=None if attn_mask is None else attn_mask.detach(),
        key_padding_mask=None if key_padding_mask is None else key_padding_mask.detach(),
        document_ids=document_ids,
        sequences=sequences,
        query_start=query_start,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        scale=scale,
        enable_gqa=True,
        softcap=softcap,
        allow_empty_rows=allow_empty_rows,
        impl=impl,
        slopes_need_grad=slopes_need_grad,
    )


def _in_order_of(tensor: Tensor, example: Tensor) -> Tensor:
    """`tensor` with its axes in memory as the fake kernels promise, which implementations need not keep."""
    promised = empty_rows_like(example, tensor.shape[-1])
    return tensor if tensor.stride() == promised.stride() else promised.copy_(tensor)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    chosen, problem = _prepare(query, key, value, sinks, *options)
    with torch.autocast(query.device.type, enabled=False):
        out, lse = chosen.attention_forward(query, key, value, sinks, alibi_slopes, problem)
    return _in_order_of(out, query), lse


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return empty_rows_like(query, value.shape[-1]), query.new_empty(query.shape[:3], dtype=dtype)


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    *options_of_call, needed = options
    chosen, problem = _prepare(query, key, value, sinks, *options_of_call)
    with torch.autocast(query.device.type, enabled=False):
        gradients = chosen.attention_backward(
            grad_out, grad_lse, query, key, value, sinks, alibi_slopes, out, lse, problem, needed
        )
    results = [
        _in_order_of(gradient, tensor) if wanted else query.new_empty(0)
        for gradient, tensor, wanted in zip(gradients, (query, key, value), needed, strict=False)
    ]
    for gradient, wanted in zip(gradients[3:], needed[3:], strict=True):
        results.append(gradient.contiguous() if wanted else query.new_empty(0))
    return tuple(results)


def _fake_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    needed = options[-1]
    results = [
        empty_rows_like(tensor, tensor.shape[-1]) if wanted else query.new_empty(0)
        for tensor, wanted in zip((query, key, value), needed, strict=False)
    ]
    for tensor, wanted in zip((sinks, alibi_slopes), needed[3:], strict=True):
        shape, dtype = (tensor.shape, tensor.dtype) if wanted else ((0,), query.dtype)  # type: ignore[union-attr]
        results.append(query.new_empty(shape, dtype=dtype))
    return tuple(results)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output)
    ctx.plain = inputs[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    without = (None,) * (_NUM_TENSORS - _NUM_WITH_GRADIENT + len(ctx.plain))
    if grad_out is None and grad_lse is None:
        return (None,) * _NUM_WITH_GRADIENT + without
    *tensors, out, lse = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:_NUM_WITH_GRADIENT])
    operator = torch.ops.hf_blocksparse.attention_backward
    has_facts = tensors[_FACTS] is not None
    gradients = (operator.with_facts if has_facts else operator.default)(
        grad_out,
        grad_lse,
        *tensors[:_NUM_WITH_GRADIENT],
        out,
        lse,
        *tensors[_NUM_WITH_GRADIENT:],
        *ctx.plain,
        needed,
    )
    found = (one if wanted else None for one, wanted in zip(gradients, needed, strict=True))
    return *found, *without


def _refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "block_sparse_attention got a request for a second derivative in a compiled graph, whose operators have one derivative only; "
        "call it outside of torch.compile, with impl='torch'."
    )


def _describe(
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    offset: Tensor | None,
    batch: int,
    query_len: int,
    kv_len: int,
    q_offset: int,
    kv_offset: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the sequences of a model's call lie, as a graph carries it: table and facts (`Sequences.of_graph`), and a mask for holes.

    Args:
        attention_mask: bool (batch, tokens so far), False for padding.
        document_ids: integers (batch, query_len), equal within a packed document.
        offset: place of the first query, where only the device knows it; `q_offset` otherwise.
    """
    check_values_readable(device, "attention_mask")
    holes = torch.zeros(batch, 1, 1, 0, dtype=torch.bool, device=device)
    if document_ids is not None:
        sequences, has_holes = Sequences.from_document_ids(document_ids), False
        rows = batch * query_len
    else:
        place = q_offset if offset is None else offset
        sequences, has_holes, _ = sequences_of_padding(
            batch, query_len, kv_len, place, kv_offset, attention_mask, device
        )
        rows = batch
        if attention_mask is not None:
            holes = mask_of_keys(attention_mask, kv_len, kv_offset).to(device, copy=True)
    table = torch.zeros(rows, 7, dtype=torch.int32, device=device)
    table[: sequences.num_sequences] = sequences.table
    return table, sequences.facts(has_holes, kv_offset), holes


def _fake_describe(
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    offset: Tensor | None,
    batch: int,
    query_len: int,
    kv_len: int,
    q_offset: int,
    kv_offset: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = batch if document_ids is None else batch * query_len
    keys = 0 if attention_mask is None else kv_len
    return (
        torch.empty(rows, 7, dtype=torch.int32, device=device),
        torch.empty(NUM_FACTS, dtype=torch.int64, device="cpu"),
        torch.empty(batch, 1, 1, keys, dtype=torch.bool, device=device),
    )


_library.impl("describe_sequences", _describe, "CompositeExplicitAutograd")
torch.library.register_fake("hf_blocksparse::describe_sequences", _fake_describe, lib=_library)
for overload in ("", ".with_facts"):
    for name, run, fake in (
        ("attention_forward", _forward, _fake_forward),
        ("attention_backward", _backward, _fake_backward),
    ):
        _library.impl(f"{name}{overload}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hf_blocksparse::{name}{overload}", fake, lib=_library)
    torch.library.register_autograd(
        f"hf_blocksparse::attention_forward{overload}",
        _differentiate,
        setup_context=_save_for_backward,
        lib=_library,
    )
    torch.library.register_autograd(
        f"hf_blocksparse::attention_backward{overload}", _refuse_second_derivative, lib=_library
    )
