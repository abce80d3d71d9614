"""Adapters of PEFT on models with layouts.

An adapter is trained for the attention its base had, but PEFT saves nothing of the base. So a directory that gets an
`adapter_config.json` also gets `ADAPTER_FILE`: the layouts of the base, and its positions. Loading the adapter onto a base with other
layouts, or none, raises. Both follow from PEFT's and transformers' own functions, once `hf_blocksparse` is imported.
"""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_blocksparse.layout_files import find_beside, move_tables_out, read_tables, write_tables
from hf_blocksparse.layouts import Layout
from hf_blocksparse.model_layouts import (
    assign_layouts,
    attention_modules,
    config_owners,
    layer_layout,
    read_section,
    registered_configs,
    section_of,
    state_of,
)
from hf_blocksparse.patch import patch_model
from hf_blocksparse.transformers_hook import also_register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILE = "block_sparse_adapter.json"
ADAPTER_TENSORS_FILE = "block_sparse_adapter_layouts.safetensors"
_POSITIONS = ("max_position_embeddings", "rope_parameters")

_saved_base: ContextVar[Any] = ContextVar("saved_base", default=None)


def norm_and_embedding_options(model: nn.Module) -> dict[str, Any]:
    """Options of `peft.LoraConfig` that also train normalisations and embeddings, as LongLoRA does (arXiv 2309.12307, section 3.3).

        LoraConfig(target_modules=["q_proj", "v_proj"], **norm_and_embedding_options(model))

    They are trained in full and saved with the adapter, which grows by the embedding table. There plain LoRA falls behind full
    fine-tuning at long contexts.

    Args:
        model: any transformers model, before PEFT wraps it.

    Returns:
        `modules_to_save`: names of every normalisation with weights and of every `nn.Embedding` (tokens, positions, token types), as
        short as PEFT's matching by ending allows; and `ensure_weight_tying` where the output layer shares the token embeddings, so that
        it goes on sharing them.

    Raises:
        ValueError: the model has none, or PEFT wrapped it already.
        NotImplementedError: the output layer shares the token embeddings under names that PEFT does not keep together (BERT's).
    """
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    modules = dict(model.named_modules())
    if any(type(module).__module__.startswith("peft.") for module in modules.values()):
        raise ValueError(
            f"model got a {type(model).__name__} with PEFT modules in it; the options belong to the configuration that makes them; "
            "call this on the base model before."
        )
    wanted = [
        path
        for path, module in modules.items()
        if path
        and (isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower())
        and any(True for _ in module.parameters(recurse=False))
    ]
    if not wanted:
        raise ValueError(
            f"model got a {type(model).__name__} without normalisations and embeddings that have weights; there is nothing to add; "
            "leave these options out."
        )
    names = dict.fromkeys(_shortest_ending(path, wanted, modules) for path in wanted)
    options: dict[str, Any] = {"modules_to_save": list(names)}
    paths = {id(module): path for path, module in modules.items()}
    tokens, output = (
        getattr(model, getter, lambda: None)()
        for getter in ("get_input_embeddings", "get_output_embeddings")
    )
    if tokens is None or output is None or output.weight is not tokens.weight:
        return options
    options["ensure_weight_tying"] = True
    output_name = paths[id(output)].rpartition(".")[2]
    if paths[id(tokens)].rpartition(".")[2] not in EMBEDDING_LAYER_NAMES:
        # PEFT looks for these names alone before it ties; it drops the output layer from the list again.
        if output_name not in EMBEDDING_LAYER_NAMES:
            raise NotImplementedError(
                f"model got a {type(model).__name__}, whose output layer {paths[id(output)]} shares the weights of "
                f"{paths[id(tokens)]}; PEFT keeps that for layers named {EMBEDDING_LAYER_NAMES} alone, and otherwise they would part; "
                "list modules_to_save by hand, without the token embeddings."
            )
        options["modules_to_save"].append(output_name)
    return options


def _shortest_ending(path: str, wanted: list[str], modules: Mapping[str, nn.Module]) -> str:
    """The last name of `path` if every module that ends with it is wanted; PEFT compares no more than endings."""
    name = path.rpartition(".")[2]
    return name if all(other in wanted for other in modules if other.endswith(name)) else path


def patch_model_for_adapter(
    model: PreTrainedModel, adapter: str | Path, **hub_options: Any
) -> PreTrainedModel:
    """Give `model` the layouts that the base of a saved adapter had, in place, so that the adapter can be loaded onto it.

    Args:
        model: the base, as `patch_model` takes it.
        adapter: the adapter's directory, or its id on the hub.
        hub_options: `revision`, `subfolder`, `token`, `cache_dir` and the like, as for loading the adapter.

    Returns:
        `model`.

    Raises:
        ValueError: the adapter was saved from a base without layouts, or they do not fit `model`.
    """
    written = _read(str(adapter), hub_options)
    if written is None:
        raise ValueError(
            f"adapter got {str(adapter)!r}, which has no {ADAPTER_FILE}; its base had no layouts, or was saved without hf_blocksparse; "
            "call patch_model with the layout you know it had."
        )
    names = {id(config): name for name, config in registered_configs(model.config)}
    for owner in config_owners(model):
        section = written["sections"].get(names[id(owner.config)])
        if section is not None:
            patch_model(owner.model, read_section(section))
    return model


def _sections(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """The sections of a model's configurations by their dotted names, "" for the outermost."""
    found = ((name, section_of(config)) for name, config in registered_configs(model.config))
    return {name: section for name, section in found if section is not None}


def _positions(model: PreTrainedModel) -> dict[str, Any]:
    text = model.config.get_text_config()
    found = {name: getattr(text, name, None) for name in _POSITIONS}
    return json.loads(json.dumps({name: value for name, value in found.items() if value}))


def _write(model: PreTrainedModel, folder: Path) -> None:
    """Write what the base is beside an adapter of it, or remove what an earlier adapter left there."""
    tensors: dict[str, Tensor] = {}
    sections = move_tables_out(_sections(model), tensors, ADAPTER_TENSORS_FILE)
    write_tables(tensors, folder / ADAPTER_TENSORS_FILE)
    if not sections:
        (folder / ADAPTER_FILE).unlink(missing_ok=True)
        return
    text = json.dumps({"sections": sections, "positions": _positions(model)}, indent=2)
    (folder / ADAPTER_FILE).write_text(text + "\n", encoding="utf-8")


def _read(adapter: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is known of an adapter's base, None where nothing was saved."""
    find = find_beside(adapter, options)
    path = find(ADAPTER_FILE)
    if path is None:
        return None
    try:
        written = json.loads(Path(path).read_text(encoding="utf-8"))
        sections = written["sections"]
        if not isinstance(sections, Mapping) or not isinstance(written["positions"], Mapping):
            raise TypeError("sections and positions must be dicts")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"adapter got {adapter!r}, whose {ADAPTER_FILE} cannot be read ({error}); it must be what saving wrote; copy it again."
        ) from error
    return read_tables(written, find)


def _check(model: Any, adapter: Any, options: Mapping[str, Any]) -> None:
    """Raise where an adapter does not belong to the layouts of `model`; warn where it does not to its positions."""
    if adapter is None or not hasattr(getattr(model, "config", None), "sub_configs"):
        return
    written = _read(str(adapter), options)
    if written is None:
        return
    name = type(model).__name__
    expected = _layouts_of(model, written["sections"], str(adapter))
    modules = attention_modules(model).items()
    states = {path: state for path, module in modules if (state := state_of(module)) is not None}
    found = {path: state.layout for path, state in states.items() if state.layout is not None}
    remedy = f"call patch_model_for_adapter(model, {str(adapter)!r}) first; unpatch_model makes it dense again afterwards."
    if not found:
        raise ValueError(
            f"adapter got {str(adapter)!r}, which was trained with block-sparse layouts, for a {name} that is dense; an adapter belongs "
            f"to the attention of its base; {remedy}"
        )
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise ValueError(
                f"adapter got {str(adapter)!r}, which was trained with {expected.get(path)!r} in {path}, for a {name} with "
                f"{found.get(path)!r} there (None is the layer's own attention); an adapter belongs to the layouts of its base; {remedy}"
            )
    if written["positions"] != _positions(model):
        warnings.warn(
            f"adapter {str(adapter)!r} was trained with the positions {written['positions']}, the {name} has {_positions(model)}; if the "
            "base was extended then, call extend_positions on it before loading the adapter.",
            stacklevel=3,
        )


def _layouts_of(
    model: PreTrainedModel, sections: Mapping[str, Any], adapter: str
) -> dict[str, Layout]:
    """The layout of every attention module that has one by these sections."""
    layouts: dict[str, Layout] = {}
    names = {id(config): name for name, config in registered_configs(model.config)}
    for owner in config_owners(model):
        section = sections.get(names[id(owner.config)])
        if section is None:
            continue
        assigned, problems = assign_layouts(owner.model, owner.paths, read_section(section))
        if problems:
            raise ValueError(
                f"adapter got {adapter!r}, whose layouts do not fit a {type(model).__name__}: {'; '.join(problems)}; an adapter belongs to "
                "its base; load that."
            )
        for path, (_, layout) in assigned.items():
            layouts[owner.full_path(path)] = layer_layout(path, layout)
    return layouts


@contextlib.contextmanager
def _saving_adapters_of(model: Any) -> Iterator[None]:
    """Inside, an adapter's configuration that is saved belongs to this base."""
    token = _saved_base.set(model)
    try:
        yield
    finally:
        _saved_base.reset(token)


def _register_peft_config(module: ModuleType) -> None:
    """Write what the base is whenever an adapter's configuration is written."""
    base = module.PeftConfigMixin
    save_pretrained = base.save_pretrained

    @functools.wraps(save_pretrained)
    def save_pretrained_with_layouts(self: Any, save_directory: str, **kwargs: Any) -> None:
        save_pretrained(self, save_directory, **kwargs)
        model = _saved_base.get()
        if hasattr(getattr(model, "config", None), "sub_configs"):
            _write(model, Path(save_directory))

    base.save_pretrained = save_pretrained_with_layouts


def _register_peft_model(module: ModuleType) -> None:
    """Know the base of every adapter that PEFT saves, check that of every one it loads."""
    base = module.PeftModel
    save_pretrained, load_adapter = base.save_pretrained, base.load_adapter
    from_pretrained = base.from_pretrained

    @functools.wraps(save_pretrained)
    def save_pretrained_of_base(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _saving_adapters_of(self.get_base_model()):
            return save_pretrained(self, *args, **kwargs)

    @functools.wraps(load_adapter)
    def load_adapter_checked(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        _check(self.get_base_model(), model_id, kwargs)
        return load_adapter(self, model_id, *args, **kwargs)

    @functools.wraps(from_pretrained.__func__)
    def from_pretrained_checked(
        cls: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # load_adapter checks it, too, but by then the base is wrapped.
        _check(model, model_id, kwargs)
        return from_pretrained.__func__(cls, model, model_id, *args, **kwargs)

    base.save_pretrained = save_pretrained_of_base
    base.load_adapter = load_adapter_checked
    base.from_pretrained = classmethod(from_pretrained_checked)


def _register_modeling(module: ModuleType) -> None:
    """The same where transformers itself saves and loads adapters."""
    base = module.PreTrainedModel
    save_pretrained, load_adapter = base.save_pretrained, base.load_adapter

    @functools.wraps(save_pretrained)
    def save_pretrained_of_base(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _saving_adapters_of(self):
            return save_pretrained(self, *args, **kwargs)

    @functools.wraps(load_adapter)
    def load_adapter_checked(
        self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        config = kwargs.get("load_config")
        adapter = peft_model_id or getattr(config, "pretrained_model_name_or_path", None)
        options = dict(getattr(config, "download_kwargs", None) or {}) | kwargs
        _check(self, adapter, options | (kwargs.get("adapter_kwargs") or {}))
        return load_adapter(self, peft_model_id, *args, **kwargs)

    base.save_pretrained = save_pretrained_of_base
    base.load_adapter = load_adapter_checked


also_register("transformers.modeling_utils", _register_modeling)
also_register("peft.config", _register_peft_config)
also_register("peft.peft_model", _register_peft_model)
