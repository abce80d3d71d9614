"""The connection to transformers: the attention function `block_sparse`, its mask function, and the configuration flag.

`register_when_imported` costs nothing until transformers is imported. From then on

- models whose configuration says `block_sparse` compute `layout & the model's own mask` in the modules that have a layout, and what
  transformers itself would compute in the others;
- a configuration takes a layout (`config.block_sparse = SlidingWindow(1024)`, `from_pretrained(path, block_sparse=...)`), keeps
  it through saving and loading, and a checkpoint that carries one says so (`"attn_implementation": "block_sparse"`), so that it
  fails loudly where this package is not imported.

All knowledge of transformers' internals is here, in `transformers_masks` and in `model_layouts`.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocksparse.attention import block_sparse_attention, within
from hf_blocksparse.hub_kernel import names_this_package
from hf_blocksparse.kept_keys import KeptKeys, kept_keys
from hf_blocksparse.layout_files import (
    find_beside,
    read_tables,
    refers_to_tables,
    tables_beside,
)
from hf_blocksparse.layouts import Dense
from hf_blocksparse.model_calls import (
    computes_own,
    own_attention,
    own_mask_of_graph,
    refuse_unknown,
    same_dtype,
    weights_are_collected,
)
from hf_blocksparse.model_layouts import (
    ALL_LAYERS,
    DENSE_ATTRIBUTE,
    IMPLEMENTATION,
    SECTION,
    LayerAttention,
    attach_from_config,
    has_own_layers,
    layouts_by_layer,
    registered_configs,
    section_of,
    state_of,
    write_section,
)
from hf_blocksparse.replacements import admit_implementation
from hf_blocksparse.sequence_parallel import (
    MASK_OF_PART,
    hand_masks_on,
    heads_of_call,
    mask_of_all,
)
from hf_blocksparse.sequences import Sequences
from hf_blocksparse.transformers_masks import (
    SequenceMask,
    make_mask,
    mask_from_tensor,
    name_mask_functions,
)
from hf_blocksparse.transformers_trace import traceable


def block_sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: attention over `layout & the model's own mask`.

    Args:
        module: an attention module that `patch_model` or a configuration gave a layout.
        query: (batch, query_heads, query_len, head_dim), rotated.
        key, value: (batch, kv_heads, kv_len, head_dim), with the cache, not repeated.
        attention_mask: what the mask function made, a 4-D tensor of the user's, or None.
        dropout: probability of dropping a coefficient.
        scaling: factor on the scores.
        kwargs: `is_causal`, `sliding_window`, `softcap`, `s_aux` (sink logits), `alibi_slopes` and `cu_seq_lens_q`, `cu_seq_lens_k` are
            honoured (the window and `is_causal` where there is no mask, as a mask already holds them); those known to change nothing are
            ignored.

    Returns:
        (batch, query_len, query_heads, value_dim), contiguous; and None, or with `return_lse` the log-sum-exp of each row, (batch,
        query_heads, query_len), or with `output_attentions` the weights, (batch, query_heads, query_len, kv_len), at the price of
        `kv_len / value_dim` further attentions: those that the values were multiplied with, so with sink logits a row has a sum below 1.

    Raises:
        ValueError, NotImplementedError: the model asks for something that would not be honoured.
    """
    state = state_of(module)
    if state is None:
        raise RuntimeError(
            f"{type(module).__name__} runs with attn_implementation={IMPLEMENTATION!r} but has no layout; use patch_model on the whole "
            "model, or load it with block_sparse=<layout>."
        )
    if state.problem:
        raise ValueError(f"config.{SECTION}: {state.problem}.")
    state.calls += 1
    layout = state.layout
    heads = heads_of_call(state, query)
    shares_sequence = heads is not None and heads.shares_sequence
    if shares_sequence:
        attention_mask = mask_of_all(state.path, query, kwargs)
        # transformers' own attention would have neither this mask nor the sinks of these heads.
        layout = Dense() if layout is None else layout
    if heads is not None:
        layout = heads.layout(layout)
    attention_mask = kwargs.pop(MASK_OF_PART, attention_mask)
    kept = kept_keys(key)
    if layout is None and kept is not None:
        raise NotImplementedError(
            f"{state.path} has no layout and reads keys from a SparseCache layer, which frees them by another's; "
            "use transformers' DynamicCache."
        )
    # For packed documents the model's own attention takes a mask per coefficient, and ours none.
    is_packed = isinstance(attention_mask, SequenceMask) and attention_mask.is_packed
    num_tokens = None if is_packed else max(query.shape[2], key.shape[2])
    if kept is None and heads is None and computes_own(state, kwargs, num_tokens):
        if layout is not None:
            _refuse_context_parallel(state)
        if layout is None or "position_bias" in kwargs or not weights_are_collected():
            options = {"dropout": dropout, "scaling": scaling, **kwargs}
            return _own_attention(module, state, (query, key, value, attention_mask), options)
    is_causal = kwargs.pop("is_causal", None)
    window = kwargs.pop("sliding_window", None)
    softcap = kwargs.pop("softcap", None)
    sinks = kwargs.pop("s_aux", None)
    alibi_slopes = kwargs.pop("alibi_slopes", None)
    return_lse = kwargs.pop("return_lse", False)
    output_attentions = kwargs.pop("output_attentions", None)
    cu_seqlens = (kwargs.pop("cu_seq_lens_q", None), kwargs.pop("cu_seq_lens_k", None))
    refuse_unknown(state, kwargs)
    _refuse_context_parallel(state)
    mask = _read_mask(module, state, query, key, kept, attention_mask, is_causal, window)
    if mask.is_causal and is_causal is False:
        raise ValueError(
            f"is_causal got False in {state.path}, whose attention_mask is causal; one of them is wrong; set config.is_causal=False "
            "for bidirectional attention."
        )
    sequences = mask.sequences
    if any(lengths is not None for lengths in cu_seqlens):
        sequences = _packed_sequences(state, mask, query, cu_seqlens)
    query, key, value = same_dtype(module, query, key, value)
    wants_weights = output_attentions or weights_are_collected()
    if shares_sequence:
        if wants_weights:
            raise NotImplementedError(
                f"output_attentions got True in {state.path} under sequence parallelism, where each process has the weights of its own "
                "heads; leave output_attentions out."
            )
        sinks, alibi_slopes = heads.values(sinks), heads.values(alibi_slopes)
    options: dict[str, Any] = dict(
        layout=within(layout, mask.window_tokens, mask.chunk_tokens),
        is_causal=mask.is_causal,
        dropout_p=dropout,
        scale=scaling,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        impl=state.impl,
    )
    if kept is not None:
        if wants_weights:
            raise NotImplementedError(
                f"output_attentions got True in {state.path} with a SparseCache, which no longer holds every key that a weight belongs "
                "to; use transformers' DynamicCache."
            )
        tensors = (query, key, value)
        out, lse = kept.attend(module, state.path, tensors, mask, sequences, **options)
        return out.transpose(1, 2).contiguous(), lse if return_lse else None
    attend = functools.partial(
        block_sparse_attention, attn_mask=mask.dense, sequences=sequences, **options
    )
    out, lse = attend(query, key, value, return_lse=True)
    out = out.transpose(1, 2).contiguous()
    if not wants_weights:
        return out, lse if return_lse else None
    if return_lse:
        raise NotImplementedError(
            f"output_attentions got True in {state.path}, whose attention is made of several parts; their weights are not put together; "
            "leave output_attentions out."
        )
    if dropout:
        raise NotImplementedError(
            f"output_attentions got True in {state.path} with dropout {dropout}; the weights are made apart from the output, without "
            "its dropout; call model.eval(), or use attn_implementation='eager'."
        )
    return out, _weights(attend, query, key, value)


def _weights(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What each query reads of each key, [batch, heads, query_len, kv_len]: attention over unit vectors instead of values."""
    kv_len, width = value.shape[2:]
    columns = []
    for start in range(0, kv_len, width):
        units = value.new_zeros(value.shape)
        units[:, :, start : start + width] = torch.eye(
            width, dtype=value.dtype, device=value.device
        )[: kv_len - start]
        columns.append(attend(query, key, units))
    return torch.cat(columns, 3)[..., :kv_len]


def _refuse_context_parallel(state: LayerAttention) -> None:
    # It replaces torch's function and hands every rank a shard of the sequence, which no other attention can know.
    owner = nn.functional.scaled_dot_product_attention.__module__ or ""
    if owner.startswith("torch.distributed.tensor.experimental"):
        raise NotImplementedError(
            f"{state.path} runs under torch's context parallelism, where each rank holds a part of the sequence; block_sparse attention "
            "needs all of it; shard the batch, the weights or the heads instead."
        )


def _read_mask(
    module: nn.Module,
    state: LayerAttention,
    query: Tensor,
    key: Tensor,
    kept: KeptKeys | None,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    window: int | None,
) -> SequenceMask:
    batch, _, query_len, _ = query.shape
    kv_len = key.shape[2] if kept is None else kept.mask_len
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # A single query stands at the last key, where causality hides nothing.
        if query_len != kv_len and not (causal and query_len == 1):
            raise NotImplementedError(
                f"attention_mask got None in {state.path} for {query_len} queries and {kv_len} keys; it is a cross-attention, or nothing "
                "says where the queries stand; leave this layer out with a PerLayer layout, or pass a 2-D attention_mask to the model."
            )
        sequences = Sequences.uniform(batch, query_len, kv_len, kv_len - query_len, query.device)
        return SequenceMask(
            batch,
            query_len,
            kv_len,
            sequences,
            is_causal=causal,
            window_tokens=window,
            covers_batch=True,
        )
    if not isinstance(attention_mask, SequenceMask):
        return mask_from_tensor(attention_mask, batch, query_len, kv_len)
    if tuple(attention_mask.shape) != (batch, 1, query_len, kv_len):
        raise ValueError(
            f"attention_mask of {state.path} was made for (batch, query_len, kv_len) = "
            f"{(attention_mask.shape[0], *attention_mask.shape[2:])}, but the attention has {(batch, query_len, kv_len)}; the model "
            "builds its mask, or a cache gives its keys, in a way block_sparse attention does not know; use a cache of transformers, or "
            "leave this layer out with a PerLayer layout."
        )
    if attention_mask.is_cross and state.layout is not None:
        raise NotImplementedError(
            f"{state.path} got {query_len} queries and {kv_len} keys without causality: it is a cross-attention, and a layout has no "
            "meaning between two sequences; leave this layer out with a PerLayer layout."
        )
    attention_mask = attention_mask.read_back()
    is_here = attention_mask.device == query.device
    return attention_mask if is_here else attention_mask.moved(query.device)


def _packed_sequences(
    state: LayerAttention,
    mask: SequenceMask,
    query: Tensor,
    cu_seqlens: tuple[Tensor | None, Tensor | None],
) -> Sequences:
    """Documents named by `cu_seq_lens`, where the mask does not name them already."""
    queries, keys = cu_seqlens
    batch, _, query_len, kv_len = mask.shape
    if not mask.covers_batch:
        return mask.sequences
    if queries is None or keys is None or batch != 1 or query_len != kv_len:
        raise NotImplementedError(
            f"cu_seq_lens_q, cu_seq_lens_k in {state.path} got a batch of {batch} with {query_len} queries and {kv_len} keys; packed "
            "documents need both, one batch row, and no cache; pass position_ids or a 2-D attention_mask instead."
        )
    if queries is not keys and not torch.equal(queries, keys):
        raise NotImplementedError(
            f"cu_seq_lens_q and cu_seq_lens_k differ in {state.path}; every packed document must have as many queries as keys; "
            "pass the same lengths."
        )
    return Sequences.from_cu_seqlens(queries.to(query.device), query_len)


def _own_attention(
    module: nn.Module,
    state: LayerAttention,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the module would compute without us, with the mask it would have been given."""
    query, key, value, mask = tensors
    if isinstance(mask, SequenceMask):
        if mask.is_of_graph:
            mask = own_mask_of_graph(state, query, mask)
        else:
            mask = mask.own_mask(state.dense_implementation)
        mask = mask if mask is None else mask.to(query.device)
    return own_attention(state)(module, query, key, value, mask, **options)


def check_config_value(value: object) -> dict[str, Any] | None:
    """The section for anything a user may assign to `config.block_sparse`."""
    return None if value is None else write_section(layouts_by_layer(value))


def _store(config: Any, value: object, *, switch: bool) -> None:
    """Put a section into `config`, and into its sub-configurations where it means every layer."""
    section = check_config_value(value)
    configs = [config]
    if section is not None and config.sub_configs:
        if ALL_LAYERS not in section["layouts"]:
            raise ValueError(
                f"config.{SECTION} got the layers {sorted(section['layouts'])} for {type(config).__name__}, which has parts of its own "
                f"({sorted(config.sub_configs)}); layers belong to one part; assign it there, for example "
                f"config.{sorted(config.sub_configs)[0]}.{SECTION} = ..."
            )
        configs = [part for _, part in registered_configs(config)]
    for part in configs:
        if section is None:
            part.__dict__.pop(SECTION, None)
            if part.__dict__.get("_attn_implementation_internal") == IMPLEMENTATION:
                part._attn_implementation_internal = None
            continue
        part.__dict__[SECTION] = section
        # An implementation found by an earlier model must not outweigh a layout assigned after it.
        if switch and part.__dict__.get("_attn_implementation_internal") is not None:
            part._attn_implementation_internal = IMPLEMENTATION


def _register_configuration(module: ModuleType) -> None:
    base = module.PreTrainedConfig
    if isinstance(base.__dict__.get(SECTION), property):
        return

    def get_section(self: Any) -> dict[str, Any] | None:
        """Layouts by layer, as `hf_blocksparse.patch_model` writes them; assign a layout to make the model sparse."""
        return section_of(self)

    def set_section(self: Any, value: object) -> None:
        _store(self, value, switch=True)

    def delete_section(self: Any) -> None:
        _store(self, None, switch=True)

    post_init, from_dict, to_diff_dict = base.__post_init__, base.from_dict, base.to_diff_dict
    get_config_dict, to_json_file = base.get_config_dict, base.to_json_file

    @functools.wraps(post_init)
    def post_init_with_section(self: Any, *args: Any, **kwargs: Any) -> None:
        section = kwargs.pop(SECTION, None)
        post_init(self, *args, **kwargs)
        if section is not None:
            # As it was saved: the parts of a composite configuration carry their own.
            self.__dict__[SECTION] = check_config_value(section)

    @functools.wraps(from_dict.__func__)
    def from_dict_with_section(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        given = SECTION in kwargs
        value = kwargs.pop(SECTION, None)
        made = from_dict.__func__(cls, config_dict, **kwargs)
        if given:
            _store(made[0] if isinstance(made, tuple) else made, value, switch=False)
        return made

    @functools.wraps(to_diff_dict)
    def to_diff_dict_with_implementation(self: Any) -> dict[str, Any]:
        saved = to_diff_dict(self)
        implementation = _saved_implementation(self)
        if implementation is not None:
            saved["attn_implementation"] = implementation
        return saved

    @functools.wraps(get_config_dict.__func__)
    def get_config_dict_with_tables(cls: Any, source: Any, **kwargs: Any) -> Any:
        config_dict, unused = get_config_dict.__func__(cls, source, **kwargs)
        if refers_to_tables(config_dict):
            config_dict = read_tables(config_dict, find_beside(str(source), kwargs))
        return config_dict, unused

    @functools.wraps(to_json_file)
    def to_json_file_with_tables(self: Any, json_file_path: Any, use_diff: bool = True) -> None:
        path = Path(json_file_path)
        if path.name != module.CONFIG_NAME:
            # A file of its own is whole.
            to_json_file(self, json_file_path, use_diff)
            return
        parts = [vars(part) for _, part in registered_configs(self)]
        with tables_beside(parts, SECTION, path.parent):
            to_json_file(self, json_file_path, use_diff)

    base.__post_init__ = post_init_with_section
    base.get_config_dict = classmethod(get_config_dict_with_tables)
    base.to_json_file = to_json_file_with_tables
    base.from_dict = classmethod(from_dict_with_section)
    base.to_diff_dict = to_diff_dict_with_implementation
    setattr(base, SECTION, property(get_section, set_section, delete_section))


def _saved_implementation(config: Any) -> str | dict[str, Any] | None:
    """The implementation to write beside a section: a name, or names by part; None where nothing is sparse."""
    parts = {}
    for key in config.sub_configs:
        part = getattr(config, key, None)
        implementation = None if part is None else _saved_implementation(part)
        if implementation is not None:
            parts[key] = implementation
    own = IMPLEMENTATION if section_of(config) else None
    if not parts:
        return own
    return parts if own is None else {"": own, **parts}


def _make_mask(**arguments: Any) -> Tensor | None:
    hand_masks_on()
    mask = make_mask(**arguments)
    section = section_of(arguments["config"]) if "config" in arguments else None
    if section is not None and isinstance(mask, SequenceMask):
        mask.wants_own = has_own_layers(section)
    return mask


def _register_modeling(module: ModuleType) -> None:
    from transformers.masking_utils import AttentionMaskInterface

    base = module.PreTrainedModel
    if IMPLEMENTATION in module.AttentionInterface._global_mapping:
        return
    attention, mask = traceable(block_sparse_attention_forward, _make_mask)
    module.AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)
    check, post_init = base._check_and_adjust_attn_implementation, base.post_init

    @functools.wraps(check)
    def check_with_section(
        self: Any,
        attn_implementation: str | None,
        is_init_check: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> str:
        section = section_of(self.config)
        by_section = is_init_check and attn_implementation is None and section is not None
        if not by_section and attn_implementation != IMPLEMENTATION:
            chosen = check(self, attn_implementation, is_init_check, *args, **kwargs)
            # Of "paged|block_sparse" transformers drops the prefix.
            if chosen == IMPLEMENTATION:
                return check_with_section(self, chosen, is_init_check, *args, **kwargs)
            if not names_this_package(chosen):
                if section is not None:
                    warnings.warn(
                        f"attn_implementation={attn_implementation!r} was asked for, so the model runs dense although its configuration "
                        "carries block-sparse layouts; leave attn_implementation out to use them.",
                        stacklevel=2,
                    )
                return chosen
            section = _read_again(self.config)
        if section is None:
            if is_init_check and any(
                section_of(part) for _, part in registered_configs(self.config)
            ):
                # Only parts of the model have layouts.
                return check(self, None, is_init_check, *args, **kwargs)
            raise ValueError(
                f"attn_implementation got {IMPLEMENTATION!r} for {type(self).__name__}, whose configuration has no layouts; "
                "use patch_model(model, layout), or load with block_sparse=<layout>."
            )
        if is_init_check:
            dense = check(self, None, True, *args, **kwargs)
            self.__dict__[DENSE_ATTRIBUTE] = dense
            admit_implementation(type(self), IMPLEMENTATION)
        elif state_missing(self):
            raise ValueError(
                f"attn_implementation got {IMPLEMENTATION!r} for a {type(self).__name__} that was built dense; its layers have no "
                "layouts; use patch_model(model, layout)."
            )
        return IMPLEMENTATION

    @functools.wraps(post_init)
    def post_init_with_layouts(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = post_init(self, *args, **kwargs)
        chosen = self.config._attn_implementation
        if names_this_package(chosen):
            # This package came with the kernel that the check of this very model loaded: do now what it would have done.
            self.config._attn_implementation_internal = check_with_section(self, chosen, True)
        attach_from_config(self)
        return result

    base._check_and_adjust_attn_implementation = check_with_section
    base.post_init = post_init_with_layouts


def _read_again(config: Any) -> dict[str, Any] | None:
    """The section of a configuration that may be older than this import, when nothing looked at what was written there."""
    for _, part in registered_configs(config):
        given = section_of(part)
        if given is not None and "layouts" not in given:
            part.__dict__[SECTION] = check_config_value(given)
    return section_of(config)


def state_missing(model: nn.Module) -> bool:
    """Whether no module of `model` has a layout attached."""
    return not any(state_of(module) for module in model.modules())


_REGISTRATIONS: dict[str, list[Callable[[ModuleType], None]]] = {
    "transformers.configuration_utils": [_register_configuration],
    "transformers.masking_utils": [name_mask_functions],
    "transformers.modeling_utils": [_register_modeling],
}
_REGISTERED = "_block_sparse_registered"


def also_register(name: str, register: Callable[[ModuleType], None]) -> None:
    """Have `register(module)` called, too, when the module `name` is imported."""
    _REGISTRATIONS.setdefault(name, []).append(register)


def _register(module: ModuleType) -> None:
    if _REGISTERED not in module.__dict__:
        module.__dict__[_REGISTERED] = True
        for register in _REGISTRATIONS[module.__name__]:
            register(module)


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules we wait for as Python would, and runs their registration after they are executed."""

    def __init__(self, waiting: set[str]):
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        self.waiting.remove(fullname)
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Connect to transformers now if it is loaded, otherwise as soon as it is. Loads nothing itself; may be called again."""
    waiting = set()
    for name in _REGISTRATIONS:
        module = sys.modules.get(name)
        if module is None:
            waiting.add(name)
        else:
            _register(module)
    known = [finder for finder in sys.meta_path if isinstance(finder, _RegisterAfterImport)]
    for finder in known:
        waiting -= finder.waiting
    if waiting:
        sys.meta_path.insert(0, _RegisterAfterImport(waiting))
