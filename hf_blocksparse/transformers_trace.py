"""What `torch.compile` and `torch.export` see of the connection to transformers.

A trace holds tensors and plain values. A mask made in it is a `SequenceMask` of a table of sequences (or of nothing, where the queries
are the last tokens of one whole sequence), of what transformers says about the mask, and of the model's own mask for the layers that
keep their own attention. Where padding and documents lie is read by one operator in a graph, however many layers there are, when the
graph runs. What cannot be traced leaves the graph, with the same results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocksparse.attention import record_call
from hf_blocksparse.kept_keys import kept_keys
from hf_blocksparse.model_calls import (
    computes_own,
    own_attention,
    own_mask_of_graph,
    refuse_unknown,
    same_dtype,
    weights_are_collected,
)
from hf_blocksparse.model_layouts import has_own_layers, section_of, state_of
from hf_blocksparse.replacements import replaces_family
from hf_blocksparse.sequence_parallel import MASK_OF_PART
from hf_blocksparse.sequences import HAS_MASK_FACT, table_of_padding
from hf_blocksparse.transformers_masks import SequenceMask, mask_of_graph, predicate_of

_TORCH_SDPA = torch._C._nn.scaled_dot_product_attention
# transformers' implementations whose masks are no boolean tensors.
_WITH_MASKS_OF_THEIR_OWN = (
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)
# What an attention of ours takes from its keyword arguments.
_TAKEN = (
    "is_causal",
    "sliding_window",
    "softcap",
    "s_aux",
    "alibi_slopes",
    "return_lse",
    "output_attentions",  # False: weights are made outside of graphs
)


def traceable(attention: Callable, make_mask: Callable) -> tuple[Callable, Callable]:
    """The attention and the mask function for transformers: in a compiled graph where a trace can read the call, outside otherwise."""
    untraced_attention = torch.compiler.disable(
        attention,
        reason="block_sparse attention got what a compiled graph cannot hold: a 4-D mask tensor, a SparseCache, output_attentions, a part "
        "of the heads, or cu_seq_lens without position_ids and use_cache=False",
    )
    untraced_mask = torch.compiler.disable(
        make_mask,
        reason="block_sparse attention got packed documents beside an attention_mask, or a cache whose lengths are tensors, whose mask a "
        "trace cannot read, or is a model whose attention modules are replaced",
    )
    assemble = torch.compiler.allow_in_graph(mask_of_graph)
    is_replaced = torch.compiler.assume_constant_result(replaces_family)

    @functools.wraps(attention)
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if torch.compiler.is_compiling():
            if _is_readable(module, query, key, attention_mask, kwargs):
                return _attend(module, query, key, value, attention_mask, dropout, scaling, kwargs)
            _refuse_export()
        # Also where torch runs this frame without a trace, in which it would trace those below.
        return untraced_attention(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )

    @functools.wraps(make_mask)
    def mask(**arguments: Any) -> Tensor | None:
        if not torch.compiler.is_compiling():
            return untraced_mask(**arguments)  # see above
        # Replaced attention modules read masks in ways of their own.
        if is_replaced(getattr(arguments.get("config"), "model_type", None)):
            parts = None
        elif _needs_no_mask(**arguments):
            return None
        else:
            parts = _mask_parts(**arguments)
        if parts is not None:
            return assemble(*parts)
        _refuse_export()
        return untraced_mask(**arguments)

    return attend, mask


def _refuse_export() -> None:
    # torch.compile leaves the graph here; an exported program cannot. (torch 2.11 calls a trace with fullgraph=True an export, too.)
    if torch.compiler.is_exporting():
        raise NotImplementedError(
            "torch.export (or fullgraph=True) got a model with a 4-D mask tensor, output_attentions, packed documents beside an "
            "attention_mask, or a cache that only eager block_sparse attention can read; export the forward over input_ids and a 2-D "
            "attention_mask."
        )


def _needs_no_mask(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> bool:
    """Whether every attention of a model may be given None: whole sequences, nothing but causality, and no layer that wants its own mask.

    transformers lets masks be left out (`allow_is_causal_skip`) where the modules themselves say that they are causal.
    """
    from transformers.masking_utils import causal_mask_function

    section = None if config is None else section_of(config)
    return (
        mask_function is causal_mask_function
        and allow_is_causal_skip
        and attention_mask is None
        and not use_vmap
        and not isinstance(q_offset, Tensor)
        and q_offset == 0
        and kv_offset == 0
        and q_length == kv_length
        and (section is None or not has_own_layers(section))
    )


def _mask_parts(
    batch_size: int,
    q_length: int,
    kv_length: int | Tensor,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> tuple[Any, ...] | None:
    """The arguments of `mask_of_graph` for those of `make_mask`; None for what a trace cannot read."""
    from transformers.masking_utils import sdpa_mask

    device = torch.device(device)
    if isinstance(kv_length, Tensor) or isinstance(kv_offset, Tensor):
        return None
    predicate, documents, is_known = predicate_of(mask_function, use_vmap)
    if documents is not None and (attention_mask is not None or not is_known):
        return None
    offset = q_offset if isinstance(q_offset, Tensor) else None
    arguments = (
        dict(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            device=device,
        )
        | kwargs
    )
    facts = dense = None
    ends_with_keys = offset is None and q_offset + q_length == kv_offset + kv_length
    is_cross = is_known and not predicate.is_causal and offset is None and not ends_with_keys
    if documents is None and attention_mask is None and kv_offset == 0 and ends_with_keys:
        table = torch.zeros(0, 7, dtype=torch.int32, device=device)
    elif is_cross:
        table = torch.zeros(0, 7, dtype=torch.int32, device=device)
    elif documents is None and attention_mask is None and kv_offset == 0 and offset is not None:
        table = table_of_padding(
            batch_size, q_length, kv_length, offset, kv_offset, None, None, device
        )
    else:
        table, facts, holes = torch.ops.hf_blocksparse.describe_sequences(
            attention_mask,
            documents,
            offset,
            batch_size,
            q_length,
            kv_length,
            0 if offset is not None else q_offset,
            kv_offset,
            device,
        )
        if is_known and attention_mask is not None:
            dense = holes
        elif not is_known:
            # The facts say whether padding needs a mask; that of a function is always needed.
            facts = facts.clone()
            facts[HAS_MASK_FACT] = 1
    # Compilers drop it where no layer reads it.
    always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    own = sdpa_mask(**(arguments | always))
    if not is_known:
        dense = own
    return (
        batch_size,
        q_length,
        kv_length,
        table,
        facts,
        dense,
        own,
        predicate.is_causal,
        predicate.window_tokens,
        predicate.chunk_tokens,
        is_cross,
        documents is not None,
    )


def _is_readable(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether a trace can hold the call: all heads, and a mask it can take apart."""
    state = state_of(module)
    if state is None or state.problem is not None or state.query_heads != query.shape[1]:
        return False
    # Context parallelism puts a function of its own there, which the untraced function refuses.
    has_own_sdpa = nn.functional.scaled_dot_product_attention is not _TORCH_SDPA
    if has_own_sdpa or kept_keys(key) is not None or kwargs.get(MASK_OF_PART) is not None:
        return False
    if kwargs.get("output_attentions") or weights_are_collected():
        return False
    is_packed = isinstance(mask, SequenceMask) and mask.is_packed
    lengths = (kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"))
    if not is_packed and any(one is not None for one in lengths):
        return False
    if computes_own(state, kwargs):
        if not isinstance(mask, SequenceMask):
            return True
        return mask.own is not None and state.dense_implementation not in _WITH_MASKS_OF_THEIR_OWN
    if mask is None:
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return query.shape[2] == key.shape[2] or (is_causal and query.shape[2] == 1)
    if not isinstance(mask, SequenceMask) or mask.is_cross:
        return False
    if mask.is_causal and kwargs.get("is_causal") is False:
        return False
    batch, _, query_len, _ = query.shape
    return tuple(mask.shape) == (batch, 1, query_len, key.shape[2])


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The attention function where `_is_readable`, without what a trace cannot follow."""
    state = state_of(module)
    assert state is not None
    if computes_own(state, kwargs):
        own = own_mask_of_graph(state, query, mask) if isinstance(mask, SequenceMask) else mask
        function = own_attention(state)
        return function(module, query, key, value, own, dropout=dropout, scaling=scaling, **kwargs)
    assert state.layout is not None
    refuse_unknown(state, {name: kwargs[name] for name in kwargs if name not in _TAKEN})
    is_causal, window = kwargs.get("is_causal"), kwargs.get("sliding_window")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    chunk = table = facts = dense = None
    if isinstance(mask, SequenceMask):
        is_causal, window, chunk = mask.is_causal, mask.window_tokens, mask.chunk_tokens
        table, facts, dense = mask.table, mask.facts, mask.dense
        if table.shape[0] == 0:
            table = None
    query, key, value = same_dtype(module, query, key, value)
    out, lse = record_call(
        query,
        key,
        value,
        kwargs.get("s_aux"),
        kwargs.get("alibi_slopes"),
        state.layout,
        attn_mask=dense,
        sequence_table=table,
        sequence_facts=facts,
        window_tokens=window,
        chunk_tokens=chunk,
        is_causal=is_causal,
        dropout_p=dropout,
        scale=scaling,
        softcap=kwargs.get("softcap"),
        impl=state.impl,
    )
    return out.transpose(1, 2).contiguous(), lse if kwargs.get("return_lse") else None
