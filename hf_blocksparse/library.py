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

from hf_blocksparse.attention import prepare, spec_of
from hf_blocksparse.layouts import Layout, layout_from_digest
from hf_blocksparse.ops.problem import Problem, empty_rows_like

_OPTIONS = (
    "Tensor? attn_mask, Tensor? key_padding_mask, Tensor? document_ids, Tensor? dropout_seed, str layout, SymInt? query_start, "
    "bool is_causal, float dropout_p, float? scale, float? softcap, bool allow_empty_rows, str impl, bool slopes_need_grad"
)
# query, key, value, sinks and alibi_slopes have gradients; masks, documents and the seed have none.
_NUM_WITH_GRADIENT, _NUM_TENSORS = 5, 9

_library = torch.library.Library("hf_blocksparse", "DEF")
_library.define(
    f"attention_forward(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? alibi_slopes, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? sinks, "
    "Tensor? alibi_slopes, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
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
    dropout_seed: Tensor | None,
    layout: str,
    query_start: int | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    softcap: float | None,
    allow_empty_rows: bool,
    impl: str,
    slopes_need_grad: bool,
) -> tuple[ModuleType, Problem]:
    # Compiled code writes new values into old buffers without counting versions, so an index of a mask is not found again by the tensor.
    return prepare(
        spec_of("query", query),
        spec_of("key", key),
        spec_of("value", value),
        None if sinks is None else spec_of("sinks", sinks),
        _layout_of(layout),
        is_causal=is_causal,
        attn_mask=None if attn_mask is None else attn_mask.detach(),
        key_padding_mask=None if key_padding_mask is None else key_padding_mask.detach(),
        document_ids=document_ids,
        sequences=None,
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
    gradients = torch.ops.hf_blocksparse.attention_backward(
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


for name, run, fake in (
    ("attention_forward", _forward, _fake_forward),
    ("attention_backward", _backward, _fake_backward),
):
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_blocksparse::{name}", fake, lib=_library)
torch.library.register_autograd(
    "hf_blocksparse::attention_forward",
    _differentiate,
    setup_context=_save_for_backward,
    lib=_library,
)
torch.library.register_autograd(
    "hf_blocksparse::attention_backward", _refuse_second_derivative, lib=_library
)
