"""What eager and traced attention calls of a model share: the layers that compute by the model's own attention, and a few checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocksparse.layouts import Dense
from hf_blocksparse.model_layouts import LayerAttention, config_of
from hf_blocksparse.transformers_masks import SequenceMask

# Arguments of transformers' attention functions that do not change what attention computes.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "deterministic",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "shift_labels",
        "use_cache",
    }
)
# What "sdpa" does not compute, and block-sparse attention does.
_OURS_ALONE = frozenset(
    {
        "softcap",
        "s_aux",
        "alibi_slopes",
        "return_lse",
        "output_attentions",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
    }
)


def computes_own(
    state: LayerAttention, kwargs: Mapping[str, Any], num_tokens: int | None = None
) -> bool:
    """Whether a layer computes by its model's own attention.

    It does without a layout; and with one that keeps all of `num_tokens` tokens where `impl="auto"` may choose and the model's own is a
    fast one, as there is nothing to leave out and a short attention takes less time to compute than to start; and with a `Dense` one
    and relative position biases, which block-sparse attention has not.

    Args:
        num_tokens: queries or keys of the call, whichever are more; None where only a `Dense` layout counts as one that keeps all, as in
            a graph, which would be compiled for some lengths alone.
    """
    layout = state.layout
    if layout is None:
        return True
    if state.impl != "auto" or state.interface is None:
        return False
    if not isinstance(layout, Dense) and (num_tokens is None or not layout.keeps_all(num_tokens)):
        return False
    if kwargs.get("position_bias") is not None:
        return isinstance(layout, Dense)
    if state.dense_implementation == "eager":
        return False
    for name, value in kwargs.items():
        if name in _OURS_ALONE and value is not None and value is not False:
            return False
    return True


def own_attention(state: LayerAttention) -> Callable:
    """The function that the module's own forward would find."""
    return state.interface.get_interface(state.dense_implementation, state.eager_attention)


def own_mask_of_graph(state: LayerAttention, query: Tensor, mask: SequenceMask) -> Tensor:
    """What the model's own attention would have been given, of a mask in a graph that has it."""
    own = mask.own
    if own is None:
        raise NotImplementedError(
            f"{state.path} computes by the model's own attention {state.dense_implementation!r} and got a mask that a compiled graph made "
            "without one for it; compile the whole model, or give every layer a layout."
        )
    if state.dense_implementation != "eager":
        return own
    lowest = torch.finfo(query.dtype).min
    return torch.where(own, torch.zeros((), dtype=query.dtype, device=own.device), lowest)


def weights_are_collected() -> bool:
    """Whether a model gathers its layers' weights, which it may do without telling the layers."""
    from transformers.utils.output_capturing import _active_collector

    # A layer compiled alone cannot ask the model around it, and gives no weights.
    if torch.compiler.is_compiling() and not _active_collector.compiling:
        return False
    collected = _active_collector.get()
    return collected is not None and any(key.endswith("attentions") for key in collected)


def refuse_unknown(state: LayerAttention, kwargs: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for arguments of an attention call that would not be honoured."""
    asked = [
        name for name, value in kwargs.items() if value is not None and name not in _WITHOUT_EFFECT
    ]
    if asked:
        raise NotImplementedError(
            f"{state.path} passes {sorted(asked)} to its attention, which block_sparse attention does not compute; "
            "leave this layer out with a PerLayer layout, or use attn_implementation='sdpa'."
        )


def same_dtype(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype for all three, as transformers chooses it: autocast's, or the one the weights have."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        target = torch.get_autocast_dtype(device_type)
    elif query.dtype == key.dtype == value.dtype:
        return query, key, value
    elif hasattr(config_of(module), "_is_quantized"):
        target = config_of(module).dtype
    else:
        linear = (part for part in module.modules() if isinstance(part, nn.Linear))
        target = next((part.weight.dtype for part in linear), value.dtype)
    return query.to(target), key.to(target), value.to(target)
