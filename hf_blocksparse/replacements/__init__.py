"""Attention classes for families of transformers whose own do not go through its attention interface.

A replacement is a subclass of the family's attention module that computes its scores, softmax and sum through the interface; projections,
rotations and the cache stay the family's. `install` gives single instances their replacement by changing their class, so weights, names
and checkpoints stay as they are, and `uninstall` changes it back.

This module names the classes without importing transformers; each family's file is imported where a model of that family is patched.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from importlib import import_module
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_blocksparse.layouts import PerLayer
    from hf_blocksparse.replacements.base import ReplacedAttention

_MODELS = "transformers.models"
_FILE_OF = {
    f"{_MODELS}.big_bird.modeling_big_bird.BigBirdBlockSparseAttention": "big_bird",
    f"{_MODELS}.big_bird.modeling_big_bird.BigBirdSelfAttention": "big_bird",
    f"{_MODELS}.bloom.modeling_bloom.BloomAttention": "bloom",
    f"{_MODELS}.codegen.modeling_codegen.CodeGenAttention": "codegen",
    f"{_MODELS}.falcon.modeling_falcon.FalconAttention": "falcon",
    f"{_MODELS}.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": "gpt_neo",
    f"{_MODELS}.gptj.modeling_gptj.GPTJAttention": "gptj",
    f"{_MODELS}.longformer.modeling_longformer.LongformerSelfAttention": "longformer",
    f"{_MODELS}.mpt.modeling_mpt.MptAttention": "mpt",
}
_NATIVE = {"big_bird": "big_bird", "longformer": "longformer"}
_UNDO_ATTRIBUTE = "_block_sparse_replaced"


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def is_replaced(module: nn.Module) -> bool:
    """Whether `module` is of a replacement's class."""
    return type(module).__module__.startswith(f"{__name__}.")


def reaches_interface(kind: type[nn.Module]) -> bool:
    """Whether the forward of a module class itself asks transformers' attention interface."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(code.co_names)


def has_replacement(module: nn.Module) -> bool:
    """Whether `module` is of a class that needs its replacement, or is one already.

    GPT-J and CodeGen go through the interface themselves from transformers 5.24 on.
    """
    kind = type(module)
    return is_replaced(module) or (_name_of(kind) in _FILE_OF and not reaches_interface(kind))


def replaces_family(model_type: str | None) -> bool:
    """Whether attention modules of a family, whose model exists, need replacements."""
    paths = [path for path, file in _FILE_OF.items() if file == model_type]
    for module, _, kind in (path.rpartition(".") for path in paths):
        if not reaches_interface(getattr(sys.modules[module], kind)):
            return True
    return False


def _replacement(kind: type) -> type[ReplacedAttention]:
    file = import_module(f"{__name__}.{_FILE_OF[_name_of(kind)]}")
    return getattr(file, f"BlockSparse{kind.__qualname__}")


def admit_implementation(model_class: type, name: str) -> None:
    """Let a family build its layers while its configuration says `name`: some choose a class by that name."""
    known = {path.rpartition(".")[0] for path in _FILE_OF}
    for kind in model_class.__mro__:
        if kind.__module__ not in known:
            continue
        for attribute, classes in vars(sys.modules[kind.__module__]).items():
            if attribute.endswith("_ATTENTION_CLASSES"):
                classes.setdefault(name, classes["eager"])


def install(model: nn.Module, paths: Iterable[str]) -> None:
    """Give the attention modules at `paths` that have a replacement theirs."""
    for path in paths:
        module = model.get_submodule(path)
        if not has_replacement(module):
            continue
        models = _models_around(model, path)
        for one in models:
            _watch(one)
        if is_replaced(module):  # by a model inside this one
            continue
        around = models[-1]
        replacement = _replacement(type(module))
        if not hasattr(module, "config"):
            _set(module, "config", around.config)
        for owner, name, value in replacement.settings_around(around):
            _set(owner, name, value)
        _undo_of(module)["class"] = type(module)
        _become(module, replacement)


def uninstall(model: nn.Module) -> None:
    """Undo `install` everywhere in `model`."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for number in [key for key, hook in hooks.items() if hook in _WATCHING]:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
        undo = module.__dict__.pop(_UNDO_ATTRIBUTE, None)
        if undo is None:
            continue
        for name in undo["added"]:
            module.__dict__.pop(name)
        module.__dict__.update(undo["changed"])
        if "class" in undo:
            _become(module, undo["class"])


def native_layout(config: PreTrainedConfig, length: int | None = None) -> PerLayer:
    """The layout that a family of sparse models has of its own, for `patch_model(model, native_layout(model.config, ...))`.

    - Longformer: a window in each layer, exact. Global attention stays an argument of the model, `global_attention_mask`, and is exact.
    - BigBird: for inputs padded to `length` tokens, the blocks it keeps in training, with the random blocks it draws there: a window of
      three blocks, the first and the last one global, random ones. Exact where no random block falls on another kept one, which the
      family would count twice in its softmax; and not what it computes in evaluation, where all its random blocks fall on the first
      block. Blocks count from the first real token: pad on the right.

    Args:
        config: of the model.
        length: of the inputs, in tokens; needed for BigBird.

    Raises:
        NotImplementedError: the family has no layout of its own that is known here.
    """
    file = _NATIVE.get(config.model_type)
    if file is None:
        raise NotImplementedError(
            f"config got the family {config.model_type!r}, which has no layout of its own; it must be one of {sorted(_NATIVE)}; "
            "choose a layout, for example SinkWindow(sink=64, window=1024)."
        )
    return import_module(f"{__name__}.{file}").native_layout(config, length)


def _models_around(model: nn.Module, path: str) -> list[PreTrainedModel]:
    """The transformers models that hold the module at `path`, the innermost last."""
    from transformers import PreTrainedModel

    names = path.split(".")
    around = (model.get_submodule(".".join(names[:depth])) for depth in range(len(names)))
    return [module for module in around if isinstance(module, PreTrainedModel)]


def _undo_of(module: nn.Module) -> dict[str, Any]:
    return module.__dict__.setdefault(_UNDO_ATTRIBUTE, {"added": set(), "changed": {}})


def _set(module: nn.Module, name: str, value: object) -> None:
    undo = _undo_of(module)
    if name not in module.__dict__:
        undo["added"].add(name)
    elif name not in undo["added"]:
        undo["changed"].setdefault(name, module.__dict__[name])
    module.__dict__[name] = value


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    if "_old_forward" in module.__dict__:
        # accelerate keeps the forward that its hooks surround, bound to the class of that time.
        module.__dict__["_old_forward"] = MethodType(kind.forward, module)


def _watch(model: PreTrainedModel) -> None:
    """Refuse calls of `model` with arguments that it drops on the way to its replaced attention."""
    hooks = [_refuse_weights, _refuse_lengths]
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        hooks.append(_refuse_positions)
    for hook in hooks:
        if hook not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(hook, with_kwargs=True)


def _refuse_weights(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    wanted = kwargs.get("output_attentions")
    if module.config.output_attentions if wanted is None else wanted:
        raise NotImplementedError(
            f"output_attentions got True in {type(module).__name__}, whose attention is replaced by a block-sparse one that never makes "
            "the weights; look at them in the model before patch_model, or after unpatch_model."
        )


def _refuse_lengths(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name} got packed documents in {type(module).__name__}, which drops it before its attention, so that they would read "
                "each other; this family has to be told of documents in another way; give them one by one, or padded."
            )


def _refuse_positions(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get("position_ids") is not None:
        raise NotImplementedError(
            f"position_ids got a tensor in {type(module).__name__}, whose forward does not take it and would drop it; positions of this "
            "family follow from attention_mask; leave it out, and give packed documents one by one, or padded."
        )


_WATCHING = (_refuse_weights, _refuse_lengths, _refuse_positions)
