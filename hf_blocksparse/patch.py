"""`patch_model` and `unpatch_model`: put block-sparse attention into a transformers model, and take it out again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_blocksparse.attention import IMPLEMENTATIONS
from hf_blocksparse.layouts import Layout
from hf_blocksparse.model_layouts import (
    ALL_LAYERS,
    IMPLEMENTATION,
    SECTION,
    UNDO_ATTRIBUTE,
    LayerAttention,
    LayerKey,
    assign_layouts,
    attach,
    attention_modules,
    check_reachable,
    choose_layers,
    config_around,
    config_owners,
    is_part_of_patched,
    layer_layout,
    layouts_by_layer,
    num_query_heads,
    path_from_base,
    restore,
    undo_records,
    write_section,
)
from hf_blocksparse.replacements import install
from hf_blocksparse.transformers_hook import register_when_imported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Implementations that a layer without a layout can keep while its neighbours are sparse.
_KEPT_IMPLEMENTATIONS = ("sdpa", "eager")


def patch_model(
    model: PreTrainedModel,
    layout: Layout | str | Tensor | Mapping[int | str, Any],
    *,
    layers: str | Iterable[int] | None = None,
    dense_every: int | None = None,
    impl: str = "auto",
    block_size: int | None = None,
) -> PreTrainedModel:
    """Give the attention layers of a transformers model block-sparse attention, in place.

    What is computed is the layout within the model's own mask: causality, its windows and chunks, padding, packed documents. The
    layouts are written to `config.block_sparse`, so they are saved with the model and loaded by `AutoModel` once `hf_blocksparse`
    is imported. A model that is patched already gets the new layouts instead; `unpatch_model` then still restores the original.

    Args:
        model: a `transformers.PreTrainedModel`, or a part of one with a configuration of its own.
        layout: a layout, a preset's name or a 0/1 tensor for every attention layer; or a `PerLayer` or a dict from layer number or
            module path to one of these. Layers not named keep the model's own attention exactly, with its own window.
        layers: which layers have `layout`: a name of the model's `layer_types` ("full_attention" leaves sliding layers as they are),
            or layer numbers. All by default.
        dense_every: of each so many of these layers the last keeps the model's own attention, as Gemma 3 (6) and Cohere 2 (4) do with
            their windows.
        impl: "auto", "triton" or "torch", as in `block_sparse_attention`. A wish for this run: it is not saved.
        block_size: tokens per block of tensors and block-exact presets.

    Returns:
        `model`.

    Raises:
        ValueError: a layer or a type of layers does not exist or is ambiguous, `dense_every` would leave no layer out, a layout is made
            for another number of heads, or `model` is a part of a model that is patched already.
        NotImplementedError: attention modules of the model do not go through transformers' attention interface.
    """
    register_when_imported()
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model got {type(model).__name__}; it must be a transformers PreTrainedModel; pass the model inside a wrapper, for example "
            "peft_model.get_base_model()."
        )
    if is_part_of_patched(model):
        raise ValueError(
            f"model got a {type(model).__name__} that was patched as a part of a larger model, which could then no longer be unpatched; "
            "the same model must be patched again; call patch_model on that one, or unpatch_model it first."
        )
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"impl got {impl!r}; it must be one of {IMPLEMENTATIONS}; 'auto' takes Triton on a GPU and torch elsewhere."
        )
    layouts = layouts_by_layer(layout, block_size)
    modules = attention_modules(model)
    if ALL_LAYERS in layouts or not modules:
        check_reachable(model)
    if not modules:
        raise NotImplementedError(
            f"{type(model).__name__} has no attention module that goes through transformers' attention interface; "
            "choose another model."
        )
    if layers is not None or dense_every is not None:
        layouts = choose_layers(model, layouts, layers, dense_every)
    assigned, problems = assign_layouts(model, list(modules), layouts)
    if problems:
        raise ValueError(f"{'; '.join(problems)}.")
    for path, (_, chosen) in assigned.items():
        heads = num_query_heads(modules[path])
        if heads is not None:
            chosen.check(heads, 1, 1)
    restore(model)
    _switch(model, assigned, impl)
    if logger.isEnabledFor(logging.INFO):
        logger.info(_report(model, assigned))
    return model


def _switch(
    model: PreTrainedModel, assigned: dict[str, tuple[LayerKey, Layout]], impl: str
) -> None:
    """Hang the layouts on the modules and write them into the configurations the modules belong to."""
    modules = attention_modules(model)
    configs: list[Any] = []
    sections: list[tuple[Any, dict[LayerKey, Layout]]] = []
    for owner in config_owners(model):
        section: dict[LayerKey, Layout] = {}
        for path in owner.paths:
            full_path = owner.full_path(path)
            if full_path not in assigned:
                continue
            key, layout = assigned[full_path]
            is_path = isinstance(key, str) and key != ALL_LAYERS
            section[path_from_base(owner.model, path) if is_path else key] = layout
            configs += _configs_around(owner.model, path)
        if section:
            sections.append((owner.config, section))
    configs = [
        config
        for place, config in enumerate(configs)
        if not any(config is known for known in configs[:place])
    ]
    kept = {
        path: config_around(model, path)._attn_implementation
        for path in modules
        if any(config_around(model, path) is config for config in configs)
    }
    left = [path for path in kept if path not in assigned]
    if wrong := [path for path in left if kept[path] not in _KEPT_IMPLEMENTATIONS]:
        raise NotImplementedError(
            f"layout leaves {wrong[0]} its own attention {kept[wrong[0]]!r}; beside sparse layers only {_KEPT_IMPLEMENTATIONS} can stay; "
            "call model.set_attn_implementation('sdpa') before patching, or name every layer."
        )
    model.__dict__[UNDO_ATTRIBUTE] = [
        (config, config._attn_implementation, config.__dict__.get(SECTION)) for config in configs
    ]
    for config in configs:
        config._attn_implementation_internal = IMPLEMENTATION
    for config, section in sections:
        config.__dict__[SECTION] = write_section(section)
    for path, dense in kept.items():
        own = layer_layout(path, assigned[path][1]) if path in assigned else None
        attach(modules[path], LayerAttention(path, own, dense, impl))
    install(model, kept)


def _configs_around(owner: nn.Module, path: str) -> list[Any]:
    """The configurations that the attention module at `path` and the models around it read, `owner`'s first."""
    from transformers import PreTrainedModel

    names = path.split(".")
    around = [owner.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
    configs = [module.config for module in around if isinstance(module, PreTrainedModel)]
    return [*configs, config_around(owner, path)]


def _report(model: PreTrainedModel, assigned: dict[str, tuple[LayerKey, Layout]]) -> str:
    """One line: which layers have which layout, their density at the model's length, and how many were left dense."""
    modules = attention_modules(model)
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    parts = []
    for layout in dict.fromkeys(layout for _, layout in assigned.values()):
        paths = [path for path, (_, given) in assigned.items() if given == layout]
        text = f"{len(paths)} with {layout!r}"
        heads = num_query_heads(modules[paths[0]]) or 1
        if isinstance(length, int) and _reaches(layout, heads, length):
            is_causal = bool(getattr(modules[paths[0]], "is_causal", True))
            density = layout.density(length, is_causal=is_causal, num_heads=heads)
            text += f" (density {density:.1%} at {length} tokens)"
        parts.append(text)
    left = len(modules) - len(assigned)
    layers = f"{len(modules)} attention layers"
    return f"{type(model).__name__}: {layers}, {', '.join(parts)}, {left} left dense."


def _reaches(layout: Layout, heads: int, length: int) -> bool:
    try:
        layout.check(heads, length, length)
    except ValueError:  # a tensor made for a shorter length
        return False
    return True


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `patch_model`, or the loading of a sparse checkpoint: the model and its configuration are as before.

    Returns:
        `model`, dense again: the same logits bit for bit, and no section in the configuration.

    Raises:
        ValueError: `model` has no block-sparse layers, or was patched as a part of a larger model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model got {type(model).__name__}; it must be a model that patch_model changed; pass that."
        )
    if not undo_records(model):
        raise ValueError(
            f"model got a {type(model).__name__} that "
            + (
                "was patched as a part of a larger model; call unpatch_model on that one."
                if is_part_of_patched(model)
                else "has no block-sparse layers; there is nothing to undo; call patch_model first."
            )
        )
    restore(model)
    return model
