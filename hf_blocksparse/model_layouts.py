"""Which layout each attention module of a transformers model has.

The model's configuration is the one truth: its section `block_sparse` maps layers to layouts,

    {"version": 1, "layouts": {"*": {"kind": "sink_window", ...}}, ...}                     every attention layer
    {"version": 1, "layouts": {"0": {...}, "encoder.layers.3.self_attn": {...}}, ...}       these; the others stay dense

with the release that wrote it (`library_version`) and the oldest one that computes all of it (`min_library_version`),
and it stands in the configuration its attention modules belong to: the text part's in a multimodal model. Keys are layer numbers,
or module paths (without the base model's prefix) where numbers are ambiguous. This module reads and writes the section, finds the
attention modules, and hangs a `LayerAttention` on each.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_blocksparse.attention import resolve_layout
from hf_blocksparse.layouts import KINDS, Dense, Layout, PerLayer, layout_from_dict
from hf_blocksparse.replacements import (
    has_replacement,
    install,
    reaches_interface,
    uninstall,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

IMPLEMENTATION = "block_sparse"
SECTION = "block_sparse"
SECTION_VERSION = 1
ALL_LAYERS = "*"

STATE_ATTRIBUTE = "_block_sparse"
UNDO_ATTRIBUTE = "_block_sparse_undo"
DENSE_ATTRIBUTE = "_block_sparse_dense_implementation"
_CROSS_ATTENTION_PATH = re.compile(r"cross|encoder_attn|enc_?dec_?attention", re.IGNORECASE)
_ATTENTION_CLASS = re.compile(r"Attention(?!Mask)|Attn")

LayerKey = int | str


@dataclass
class LayerAttention:
    """What one attention module computes.

    Attributes:
        path: of the module in its model.
        layout: None where the layer keeps its own dense attention.
        dense_implementation: transformers' name of that dense attention.
        impl: implementation of `block_sparse_attention`; a wish for this run, never saved.
        problem: why this module must not run; raised on its first call.
        calls: how often the attention function was reached.
        query_heads: of the module in all processes, None where it does not say.
        interface, eager_attention: where the module's own forward finds its attention function, and its "eager" one; None where the
            module does not ask transformers' attention interface by itself.
    """

    path: str
    layout: Layout | None
    dense_implementation: str
    impl: str = "auto"
    problem: str | None = None
    calls: int = 0
    query_heads: int | None = None
    interface: Any = None
    eager_attention: Any = None


def config_of(module: nn.Module) -> Any:
    """The configuration an attention module or a model reads."""
    return module.config


def config_around(model: nn.Module, path: str) -> Any:
    """The configuration of the module at `path`, or of the innermost one around it that has one."""
    names = path.split(".")
    around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    return [module.config for module in around if hasattr(module, "config")][-1]


def state_of(module: nn.Module) -> LayerAttention | None:
    """What `attach` left on an attention module; None where nothing is attached."""
    return module.__dict__.get(STATE_ATTRIBUTE)


def layouts_by_layer(value: object, block_size: int | None = None) -> dict[LayerKey, Layout]:
    """Layouts by layer from anything a user may give; the key `"*"` means every attention layer.

    Args:
        value: a layout, a preset's name, a 0/1 tensor, a `PerLayer`, a dict `{layer number or module path: any of these}`, a
            layout's `to_dict()`, or a whole section.
        block_size: tokens per block, for tensors and block-exact presets.
    """
    if isinstance(value, PerLayer):
        value = dict(value.layers)
    if isinstance(value, Mapping):
        if "kind" in value:
            return layouts_by_layer(layout_from_dict(value))
        if "layouts" in value or "version" in value:
            return read_section(value)
        if not value:
            raise ValueError(
                "layout got an empty dict; it must name at least one layer; for example {0: SlidingWindow(1024)}."
            )
        by_layer: dict[LayerKey, Layout] = {}
        for key, layout in value.items():
            if isinstance(key, bool) or not isinstance(key, int | str):
                raise TypeError(
                    f"layout got the key {key!r}; a key must be a layer number or a module path; use one of them."
                )
            layouts = layouts_by_layer(layout, block_size)
            if set(layouts) != {ALL_LAYERS}:
                raise TypeError(
                    f"layout got layouts by layer for layer {key!r}; a layer has one layout; give it alone."
                )
            number = int(key) if isinstance(key, str) and key.isdecimal() else key
            if number in by_layer:
                raise ValueError(
                    f"layout got layer {number} twice, as number and as string; a layer may be named once; drop one."
                )
            by_layer[number] = layouts[ALL_LAYERS]
        if ALL_LAYERS in by_layer and len(by_layer) > 1:
            raise ValueError(
                f"layout got {ALL_LAYERS!r} beside {sorted(map(str, by_layer))}; {ALL_LAYERS!r} means every layer and stands alone; "
                "name the layers one by one."
            )
        return by_layer
    if isinstance(value, Layout | str | Tensor):
        return {ALL_LAYERS: resolve_layout(value, block_size)}
    raise TypeError(
        f"layout got {type(value).__name__}; it must be a layout, a preset's name, a 0/1 tensor, or a dict of these by layer; "
        "for example SinkWindow(sink=64, window=1024)."
    )


def write_section(layouts: Mapping[LayerKey, Layout]) -> dict[str, Any]:
    """The section that stands for `layouts`: JSON-ready, the same after a round trip."""
    stored = {str(key): layout.to_dict() for key, layout in layouts.items()}
    return {
        "version": SECTION_VERSION,
        "library_version": _installed_version(),
        "min_library_version": max(_since(stored), key=_release),
        "layouts": stored,
    }


def _installed_version() -> str:
    import hf_blocksparse  # which imports this module

    return hf_blocksparse.__version__


def _since(value: object) -> Iterator[str]:
    """The release of every layout in JSON data."""
    if isinstance(value, Mapping):
        if "kind" in value:
            yield KINDS[value["kind"]].since
        value = list(value.values())
    if isinstance(value, list):
        for child in value:
            yield from _since(child)


def _release(version: object) -> tuple[int, ...]:
    """The numbers of a release, in order; ValueError where it is none."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version) if isinstance(version, str) else None
    if found is None:
        raise ValueError(
            f"config.{SECTION}: min_library_version got {version!r}; it must be a release such as '0.1.0'; correct it."
        )
    return tuple(int(number or 0) for number in found.groups())


def read_section(section: object) -> dict[LayerKey, Layout]:
    """Layouts by layer from a section.

    Unknown keys of a newer section are passed over with a warning, as they cannot change what is computed: a section that this release
    cannot compute says so in `min_library_version`. In a section of this version they raise, as do wrong values, unknown layouts and a
    `min_library_version` that is not installed.
    """
    if not isinstance(section, Mapping):
        raise TypeError(
            f"config.{SECTION} got {type(section).__name__}; it must be a dict with 'version' and 'layouts'; "
            "write it with patch_model, or assign a layout to config.block_sparse."
        )
    version = section.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(
            f"config.{SECTION}: version got {version!r}; it must be a positive integer; this release writes {SECTION_VERSION}."
        )
    needed = section.get("min_library_version")
    if needed is None and version > SECTION_VERSION:
        raise ValueError(
            f"config.{SECTION} got version {version} without min_library_version; a section newer than {SECTION_VERSION} must say which "
            "release it needs; correct it."
        )
    if needed is not None and _release(needed) > _release(_installed_version()):
        raise ValueError(
            f"config.{SECTION}: min_library_version got {needed!r}; hf-blocksparse {_installed_version()} cannot compute these layouts; "
            f"upgrade: pip install 'hf-blocksparse>={needed}'."
        )
    known = {"version", "library_version", "min_library_version", "layouts"}
    if unknown := sorted(map(str, set(section) - known)):
        if version == SECTION_VERSION:
            raise ValueError(
                f"config.{SECTION} got the unknown keys {unknown}; version {version} knows {sorted(known)}; correct or drop them."
            )
        warnings.warn(
            f"config.{SECTION} was written by hf-blocksparse {section.get('library_version')} and has the keys {unknown}, which "
            f"{_installed_version()} does not know; they do not change what is computed, and are lost when the model is saved again; "
            "upgrade hf-blocksparse to keep them.",
            stacklevel=2,
        )
    layouts = section.get("layouts")
    if not isinstance(layouts, Mapping) or not layouts:
        raise ValueError(
            f"config.{SECTION}: layouts got {layouts!r}; it must be a dict of at least one layer; "
            f"for example {{'{ALL_LAYERS}': SlidingWindow(1024).to_dict()}}."
        )
    wrong = [value for value in layouts.values() if not isinstance(value, Mapping)]
    if wrong:
        raise TypeError(
            f"config.{SECTION}: layouts got {wrong[0]!r}; every value must be a stored layout; write it with to_dict()."
        )
    return layouts_by_layer({key: layout_from_dict(value) for key, value in layouts.items()})


def section_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The layouts' section of a configuration; None without one. Not of a configuration around it."""
    return config.__dict__.get(SECTION)


def has_own_layers(section: Mapping[str, Any]) -> bool:
    """Whether a layer may compute by its model's own attention: it has no layout, or one that leaves nothing out."""
    kinds = {layout["kind"] for layout in section["layouts"].values()}
    return ALL_LAYERS not in section["layouts"] or Dense.kind in kinds


def registered_configs(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """`config` and the sub-configurations that are saved with it, with their dotted names; outermost first."""
    seen: list[PreTrainedConfig] = []

    def walk(name: str, current: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
        if any(current is other for other in seen):
            return
        seen.append(current)
        yield name, current
        for key in current.sub_configs:
            child = getattr(current, key, None)
            if child is not None:
                yield from walk(f"{name}.{key}" if name else key, child)

    yield from walk("", config)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose forward asks transformers' attention interface, or can be replaced by one that does, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if reaches_interface(type(module)) or has_replacement(module)
    }


def unreachable_attention_modules(model: nn.Module) -> list[str]:
    """Attention modules that compute on their own, as `path (class)`: outermost ones with parameters and a telling class name."""
    found: list[str] = []
    reached = list(attention_modules(model))
    inside: list[str] = []
    for path, module in model.named_modules():
        if not path or not _ATTENTION_CLASS.search(type(module).__name__):
            continue
        if next(module.parameters(), None) is None or any(
            path.startswith(f"{outer}.") for outer in inside
        ):
            continue
        if not any(
            f"{one}.".startswith(f"{path}.") or path.startswith(f"{one}.") for one in reached
        ):
            inside.append(path)
            found.append(f"{path} ({type(module).__name__})")
    return found


def check_reachable(model: nn.Module) -> None:
    """Raise NotImplementedError where attention modules compute on their own: a layout for all layers would miss them."""
    if missed := unreachable_attention_modules(model):
        raise NotImplementedError(
            f"{type(model).__name__} cannot be patched as a whole: {', '.join(missed[:4])}{' ...' if len(missed) > 4 else ''} "
            f"{'does' if len(missed) == 1 else 'do'} not go through transformers' attention interface, so a layout would not reach "
            "them; choose another model, or name the layers that do with a PerLayer layout."
        )


def is_cross_attention(path: str, module: nn.Module) -> bool:
    """Whether the module says so, or its path or class is named so: families have no common mark."""
    last_names = ".".join(path.split(".")[-2:])
    return bool(getattr(module, "is_cross_attention", False)) or bool(
        _CROSS_ATTENTION_PATH.search(last_names) or "CrossAttention" in type(module).__name__
    )


def layer_number(path: str) -> int | None:
    """The first number in a module path: the layer it belongs to."""
    return next((int(name) for name in path.split(".") if name.isdecimal()), None)


def layer_layout(path: str, layout: Layout) -> Layout:
    """The layout of the layer at `path`: random layouts draw anew in every layer."""
    return layout.for_layer(layer_number(path) or 0)


def num_query_heads(module: nn.Module) -> int | None:
    """The query heads of an attention module, under the names that families give them; None where none is known."""
    config = getattr(module, "config", None)
    for owner, name in (
        (module, "num_heads"),
        (module, "num_attention_heads"),
        (module, "n_heads"),
        (config, "num_attention_heads"),
    ):
        value = getattr(owner, name, None)
        if isinstance(value, int):
            return value
    return None


def path_from_base(model: nn.Module, path: str) -> str:
    """A path as seen from the base model, so that a head on top of it changes no name."""
    prefix = getattr(model, "base_model_prefix", "")
    return path.removeprefix(f"{prefix}.") if prefix else path


def assign_layouts(
    owner: nn.Module, paths: list[str], layouts: Mapping[LayerKey, Layout]
) -> tuple[dict[str, tuple[LayerKey, Layout]], list[str]]:
    """Resolve layer keys among the attention modules at `paths`, relative to `owner`.

    Returns:
        path -> (key, layout as given), and what could not be resolved, in words.
    """
    assigned: dict[str, tuple[LayerKey, Layout]] = {}
    problems: list[str] = []
    numbers = {path: layer_number(path) for path in paths}
    crossing = [path for path in paths if is_cross_attention(path, owner.get_submodule(path))]

    def assign(path: str, key: LayerKey, layout: Layout) -> None:
        if path in crossing and layout != Dense():
            problems.append(
                f"layout names {path}, a cross-attention, where a layout has no meaning"
            )
            return
        if path in assigned:
            problems.append(f"layout names the attention module {path} twice")
            return
        assigned[path] = (key, layout)

    for key, layout in layouts.items():
        if key == ALL_LAYERS:
            if crossing and layout != Dense():
                problems.append(
                    f"layout covers all layers, but {crossing} are cross-attention, where a layout has no meaning; choose the "
                    f"self-attention layers, as patch_model(..., layers=range({1 + max(filter(None, numbers.values()), default=0)})) does, "
                    "or name them one by one"
                )
            for path in paths:
                if path not in crossing:
                    assign(path, key, layout)
            continue
        if isinstance(key, int):
            matches = [path for path in paths if numbers[path] == key]
            known = sorted({number for number in numbers.values() if number is not None})
            what = f"layer {key}"
            has = f"attention layers {_spans(known)}" if known else "no numbered attention layers"
        else:
            named = path_from_base(owner, key)
            relative = {path: path_from_base(owner, path) for path in paths}
            matches = [path for path in paths if relative[path] == named] or [
                path for path in paths if relative[path].startswith(f"{named}.")
            ]
            what = f"module {key!r}"
            has = f"attention modules such as {paths[0]!r}" if paths else "no attention modules"
        if not matches:
            problems.append(f"layout names {what}, but {type(owner).__name__} has {has}")
        elif len(matches) > 1:
            problems.append(
                f"layout names {what}, which is ambiguous in {type(owner).__name__}: it may be {matches}; use the module path"
            )
        else:
            assign(matches[0], key, layout)
    left = [
        path
        for path in paths
        if path not in assigned and has_replacement(owner.get_submodule(path))
    ]
    if assigned and left:
        problems.append(
            f"layout leaves {left[0]} its own attention, which does not go through transformers' attention interface and cannot stay "
            "beside block-sparse layers; name every layer, with Dense() where all keys are to be read"
        )
    return assigned, problems


def choose_layers(
    model: nn.Module,
    layouts: Mapping[LayerKey, Layout],
    layers: str | Iterable[int] | None,
    dense_every: int | None,
) -> dict[LayerKey, Layout]:
    """The layout of all layers, for some of them: by type or number, and without every `dense_every`-th of these.

    Cross-attention is never chosen. A replaced family, whose own attention cannot stay, has `Dense` in the layers left out.
    """
    if set(layouts) != {ALL_LAYERS}:
        raise TypeError(
            f"layout got layouts by layer ({sorted(map(str, layouts))}) beside layers or dense_every, which choose layers themselves; "
            "give one layout, or leave them out."
        )
    if dense_every is not None and (
        not isinstance(dense_every, int) or isinstance(dense_every, bool) or dense_every < 2
    ):
        raise ValueError(
            f"dense_every got {dense_every!r}; it must be an integer of at least 2: of so many layers one keeps its own attention; "
            "leave it out to keep none."
        )
    layout = layouts[ALL_LAYERS]
    modules = attention_modules(model)
    paths = [path for path, module in modules.items() if not is_cross_attention(path, module)]
    numbers = {path: layer_number(path) for path in paths}
    chosen = paths
    if isinstance(layers, str):
        types = {path: layer_type(model, path) for path in paths}
        chosen = [path for path in paths if types[path] == layers]
        if not chosen:
            known = sorted({kind for kind in types.values() if kind})
            raise ValueError(
                f"layers got {layers!r}, but {type(model).__name__} has "
                + (f"attention layers of the types {known}" if known else "no layer_types")
                + "; it must be one of a model's layer_types, or layer numbers; correct it."
            )
    elif layers is not None:
        wanted = _layer_numbers(layers)
        known_numbers = sorted({number for number in numbers.values() if number is not None})
        if missing := [number for number in wanted if number not in known_numbers]:
            has = f"attention layers {_spans(known_numbers)}" if known_numbers else "none"
            raise ValueError(
                f"layers got {missing[0]}, but {type(model).__name__} has {has}; it must be layer numbers; correct it."
            )
        chosen = [path for path in paths if numbers[path] in wanted]
    if dense_every is not None:
        # Counted in each stack of layers (an encoder's, a decoder's), among those that were chosen.
        stacks: dict[str, list[str]] = {}
        for path in chosen:
            stacks.setdefault(re.sub(r"\d+", "#", path, count=1), []).append(path)
        sparse = [
            path
            for stack in stacks.values()
            for place, path in enumerate(stack, 1)
            if place % dense_every
        ]
        if sparse == chosen:
            raise ValueError(
                f"dense_every got {dense_every} for at most {max(map(len, stacks.values()))} layers in a row, of which none would keep its "
                "own attention; it must be at most their number; lower it, or leave it out."
            )
        chosen = sparse
    by_layer: dict[LayerKey, Layout] = {}
    all_numbers = [layer_number(path) for path in modules]
    for path in paths:
        number = numbers[path]
        key: LayerKey = path if number is None or all_numbers.count(number) > 1 else number
        if path in chosen:
            by_layer[key] = layout
        elif has_replacement(modules[path]):
            by_layer[key] = Dense()
    return by_layer


def layer_type(model: nn.Module, path: str) -> str | None:
    """What the configuration's `layer_types` calls the layer of the module at `path`."""
    types, number = getattr(config_around(model, path), "layer_types", None), layer_number(path)
    return types[number] if types and number is not None and number < len(types) else None


def _layer_numbers(layers: Iterable[int]) -> list[int]:
    try:
        numbers = list(layers)
    except TypeError:
        numbers = [layers]  # type: ignore[list-item]
    wrong = [n for n in numbers if not isinstance(n, int) or isinstance(n, bool)]
    if wrong or not numbers or isinstance(layers, int):
        raise TypeError(
            f"layers got {layers!r}; it must be one of a model's layer_types, or layer numbers; for example 'full_attention', or "
            "range(0, 30, 2)."
        )
    return numbers


def _spans(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return str(numbers)


@dataclass
class ConfigOwner:
    """A configuration that is saved, the outermost model that reads it, and the attention modules that belong to it."""

    config: PreTrainedConfig
    model: PreTrainedModel
    prefix: str
    paths: list[str]  # relative to `model`

    def full_path(self, path: str) -> str:
        """The path from the whole model of a module at `path` under this configuration."""
        return f"{self.prefix}.{path}" if self.prefix else path


def config_owners(model: PreTrainedModel) -> list[ConfigOwner]:
    """Every attention module of `model` under the innermost saved configuration around it; outermost configurations first."""
    from transformers import PreTrainedModel

    models = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    ]
    owners = []
    for _, config in registered_configs(model.config):
        for path, module in models:
            if module.config is config:
                owners.append(ConfigOwner(config, module, path, []))
                break
    for path in attention_modules(model):
        inner = max(
            (one for one in owners if not one.prefix or path.startswith(f"{one.prefix}.")),
            key=lambda one: len(one.prefix),
        )
        inner.paths.append(path.removeprefix(f"{inner.prefix}.") if inner.prefix else path)
    return [owner for owner in owners if owner.paths]


def attach(module: nn.Module, state: LayerAttention) -> None:
    """Give `module` its layout and watch its first forward."""
    detach(module)
    state.query_heads = num_query_heads(module)
    # A release may keep an interface of its own beside a model.
    names = inspect.unwrap(type(module).forward).__globals__
    state.interface = names.get("ALL_ATTENTION_FUNCTIONS")
    state.eager_attention = names.get("eager_attention_forward")
    setattr(module, STATE_ATTRIBUTE, state)
    module.register_forward_hook(_verify_first_forward, with_kwargs=True)


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    module.__dict__.pop(STATE_ATTRIBUTE, None)
    stop_watching(module)


def stop_watching(module: nn.Module) -> None:
    """Take away what `attach` watches the first forward with."""
    hooks = module._forward_hooks
    for number in [key for key, hook in hooks.items() if hook is _verify_first_forward]:
        del hooks[number]
        module._forward_hooks_with_kwargs.pop(number, None)


def _verify_first_forward(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], output: object
) -> None:
    """After a patched module's first forward: was the attention function reached, and was it self-attention?"""
    if torch.compiler.is_compiling():
        return
    state = state_of(module)
    stop_watching(module)
    if state is None:
        return
    if not state.calls:
        raise RuntimeError(
            f"{state.path} ({type(module).__name__}) got a layout, but its forward never reached the attention function, so it ran "
            "dense; this class cannot be patched; leave this layer out with a PerLayer layout."
        )
    for name in ("key_value_states", "encoder_hidden_states"):
        if state.layout not in (None, Dense()) and kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{state.path} got {name}: it is a cross-attention, and a layout has no meaning between two sequences; "
                "leave this layer out with a PerLayer layout."
            )


def attach_from_config(model: PreTrainedModel) -> None:
    """Hang the layouts that the configuration carries on a model that was just built.

    Called for every model in the making, inner ones first, so the outermost has the last word; what cannot be resolved is raised
    by the first forward.
    """
    from transformers import PreTrainedModel

    sections = [section_of(config) for _, config in registered_configs(model.config)]
    if not any(sections):
        return
    found = attention_modules(model)
    covers_all = any(section and ALL_LAYERS in section["layouts"] for section in sections)
    if covers_all or not found:
        check_reachable(model)
    for owner in config_owners(model):
        section = section_of(owner.config)
        if section is None or owner.config._attn_implementation != IMPLEMENTATION:
            continue
        assigned, problems = assign_layouts(owner.model, owner.paths, read_section(section))
        for path in owner.paths:
            full_path = owner.full_path(path)
            module = found[full_path]
            attach(
                module,
                LayerAttention(
                    full_path,
                    layer_layout(path, assigned[path][1]) if path in assigned else None,
                    _dense_implementation(model, config_around(model, full_path)),
                    problem="; ".join(problems) or None,
                ),
            )
    install(model, [path for path, module in found.items() if state_of(module)])
    undo = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and DENSE_ATTRIBUTE in module.__dict__:
            undo.append((module.config, module.__dict__[DENSE_ATTRIBUTE], None))
    undo += [
        (config, config._attn_implementation, None)
        for _, config in registered_configs(model.config)
        if section_of(config) and all(config is not known for known, _, _ in undo)
    ]
    model.__dict__[UNDO_ATTRIBUTE] = undo


def _dense_implementation(model: nn.Module, config: PreTrainedConfig) -> str:
    """What `config` would have chosen without its section, as found when its model was built."""
    for module in model.modules():
        if getattr(module, "config", None) is config and DENSE_ATTRIBUTE in module.__dict__:
            return module.__dict__[DENSE_ATTRIBUTE]
    return "sdpa"


def undo_records(model: nn.Module) -> list[tuple[PreTrainedConfig, str | None, dict | None]]:
    """What the configurations under `model` were before: (configuration, implementation, section)."""
    return [
        record for module in model.modules() for record in module.__dict__.get(UNDO_ATTRIBUTE, ())
    ]


def is_part_of_patched(model: nn.Module) -> bool:
    """Whether layouts hang on modules of `model` that only a model around it can take off."""
    return not undo_records(model) and any(state_of(module) for module in model.modules())


def restore(model: nn.Module) -> None:
    """Take every layout off `model` and give its configurations back what they were."""
    for config, implementation, section in undo_records(model):
        config._attn_implementation_internal = implementation
        if section is None:
            config.__dict__.pop(SECTION, None)
        else:
            config.__dict__[SECTION] = section
    uninstall(model)
    for module in model.modules():
        detach(module)
        module.__dict__.pop(UNDO_ATTRIBUTE, None)
        module.__dict__.pop(DENSE_ATTRIBUTE, None)
