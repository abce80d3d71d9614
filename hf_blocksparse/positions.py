"""`extend_positions`: let a pretrained model read more tokens than its position encoding was made for.

What an extension changes is not listed model by model. It is *whatever differs between a model built from the old configuration and one
built from the new*: frequencies and factors of rotary embeddings, rows of position tables, index buffers, lengths that modules keep.
Both are built without weights, compared, and the differences are carried over to the live model, so that it equals a model loaded from
the new configuration by construction; a difference that is not understood is refused before anything is changed.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_blocksparse.model_layouts import SECTION, registered_configs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# The settings of each scaling beside its factor, as transformers' `rope_parameters` names them.
ROPE_OPTIONS: dict[str, frozenset[str]] = {
    "linear": frozenset(),
    "dynamic": frozenset(),
    "yarn": frozenset(
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    ),
    "llama3": frozenset(("low_freq_factor", "high_freq_factor")),
}
TABLE_METHODS = ("tile", "interpolate")
METHODS = (*ROPE_OPTIONS, *TABLE_METHODS, "none")

# Their frequencies do not depend on `max_position_embeddings`, so the limit alone can be raised.
_FREE_OF_LIMIT = ("default", "linear", "yarn", "llama3", "proportional", "axial")
_LOCAL_LAYERS = ("sliding_attention", "chunked_attention")
_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, Tensor)


def position_limit(config: PreTrainedConfig) -> int | None:
    """Positions that a model with this configuration is made for, None where the configuration does not say.

    `max_position_embeddings`, times the factor of "dynamic" scaling, which transformers counts from the unscaled limit; and at least
    the scaled length of YaRN, where a configuration keeps the unscaled one in `max_position_embeddings`.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    scaled = [limit]
    for parameters in _rope_sets(text).values():
        kind, factor = parameters.get("rope_type", "default"), parameters.get("factor") or 1.0
        if kind == "dynamic":
            scaled.append(round(limit * factor))
        elif kind == "yarn":
            scaled.append(round(parameters.get("original_max_position_embeddings", 0) * factor))
    return max(scaled)


def extend_positions(
    model: PreTrainedModel,
    max_position_embeddings: int,
    *,
    method: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layer_types: Collection[str] | None = None,
    rope_options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Raise the number of positions of a transformers model, in place; saving and loading keep it.

    No weights are trained here: perplexity beyond the old limit is the method's, and fine-tuning at the new length improves it. Extend
    before making an optimizer, adapters or shards: position tables become new parameters. A model with layouts (`patch_model`) may be
    extended before or after patching.

    Args:
        model: with rotary embeddings (RoPE) or learned absolute position tables.
        max_position_embeddings: the new limit, in the sense of the configuration's value of that name. For RoPE, BERT, GPT-2 and OPT it
            is the number of tokens; RoBERTa and its descendants count the rows before the first position too (514 for 512 tokens).
        method: for RoPE one of transformers' scalings, by `new limit / old limit`:

            - "yarn" (the default; arXiv 2309.00071), "linear" (position interpolation, arXiv 2306.15595), "llama3";
            - "dynamic" (NTK-aware, growing with the input): transformers counts from the unscaled `max_position_embeddings`, so the
              configuration keeps that number and the limit is that times the factor (`position_limit`);
            - "none": RAISE THE LIMIT ONLY. Nothing is scaled; positions beyond the old limit are ones that the model has never seen,
              and plain RoPE breaks there until it is trained at the new length.

            For tables "tile" (the default: copies of the table one after another, as the Longformer and BigBird converters make; the
            first positions stay as they are) or "interpolate" (linear between rows, so all positions are squeezed). Rows reserved
            for padding stay in front.
        tokenizer: gets `model_max_length`, the tokens that can be read.
        layer_types: which of the per-layer-type RoPE parameters (Gemma 3, ModernBERT) are scaled; None: all but sliding and chunked
            attention, whose windows never reach beyond the old limit. Models with one set for all layers scale that one.
        rope_options: further settings of the scaling, for example `{"beta_fast": 16}` for yarn.

    Returns:
        `model`. The present limit again changes nothing; a second extension multiplies the factor, so two extensions by RoPE equal one
        to the final length, and "tile" repeats the table as it then is.

    Raises:
        TypeError, ValueError: not a transformers model, a limit below the present one, a method that does not fit the model, a model
            that is scaled in another way already, ALiBi (which has no limit to raise).
        NotImplementedError: relative position biases (T5, DeBERTa), fixed sinusoidal tables, wrapped or sharded tables, and any model
            in which something else depends on the limit.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model got {type(model).__name__}; it must be a transformers PreTrainedModel; pass the model inside a wrapper, for example "
            "peft_model.get_base_model(), before adapters are added."
        )
    if method is not None and method not in METHODS:
        raise ValueError(
            f"method got {method!r}; it must be one of {METHODS}; None takes yarn for RoPE and tile for position tables."
        )
    if tokenizer is not None and not hasattr(tokenizer, "model_max_length"):
        raise TypeError(
            f"tokenizer got {type(tokenizer).__name__}; it must be a transformers tokenizer, which has model_max_length; "
            "leave it out if the model has none."
        )
    limit = _checked_limit(model, max_position_embeddings)
    text = model.config.get_text_config()
    method, uses_rope = _checked_method(model, method)
    if method not in ROPE_OPTIONS and (layer_types is not None or rope_options):
        raise ValueError(
            f"layer_types, rope_options got {layer_types!r}, {rope_options!r} with method {method!r}; they belong to the scalings of RoPE, "
            f"{tuple(ROPE_OPTIONS)}; leave them out."
        )
    # transformers counts dynamic scaling from the unscaled limit, which therefore stays.
    changes: dict[str, Any] = (
        {} if method == "dynamic" else {"max_position_embeddings": max_position_embeddings}
    )
    if method in ROPE_OPTIONS:
        changes["rope_parameters"] = _scaled_parameters(
            text, method, max_position_embeddings, limit, layer_types, dict(rope_options or {})
        )
    if rope_options and max_position_embeddings == limit:
        if changes["rope_parameters"] != text.rope_parameters:
            raise ValueError(
                f"rope_options got {dict(rope_options)} for {type(model).__name__}, which has {limit} positions already; they are set when "
                "positions are extended; start from the model before that."
            )
    if max_position_embeddings > limit:
        plan = _make_plan(model, changes, method)
        plan.apply()
        reserved = plan.reserved_positions
    else:
        # Tables show themselves, and what they reserve, by growing.
        probe = {"max_position_embeddings": limit + 1}
        reserved = 0 if uses_rope else _make_plan(model, probe, method).reserved_positions
    tokens = max_position_embeddings - reserved
    if tokenizer is not None:
        tokenizer.model_max_length = tokens
    logger.info(
        "%s: %d positions, from %d by %s; reads %d tokens.",
        type(model).__name__,
        max_position_embeddings,
        limit,
        method,
        tokens,
    )
    return model


def _checked_limit(model: PreTrainedModel, wanted: object) -> int:
    """The present limit, if `wanted` may follow it."""
    name, text = type(model).__name__, model.config.get_text_config()
    if getattr(text, "alibi", None) is True or text.model_type in ("bloom", "mpt"):
        if text.model_type != "mpt" or text.attn_config.alibi:
            remedy = (
                "set config.max_seq_len, up to which its biases are built"
                if hasattr(text, "max_seq_len")
                else "use it at any length as it is"
            )
            raise ValueError(
                f"model got a {name}, whose positions are ALiBi biases; these have neither a table nor a scale, so there is nothing to "
                f"extend; {remedy}."
            )
    relative = [
        path for path, module in model.named_modules() if hasattr(module, "relative_attention_bias")
    ]
    if relative or getattr(text, "relative_attention", False):
        where = f" ({relative[0]})" if relative else ""
        raise NotImplementedError(
            f"model got a {name}, whose positions are relative biases{where}; these are learned by distance and have no limit that could "
            "be raised; train it on longer inputs as it is."
        )
    limit = position_limit(model.config)
    if limit is None:
        raise NotImplementedError(
            f"model got a {name}, whose configuration has no max_position_embeddings; only RoPE and learned tables of that length can be "
            "extended; choose another model."
        )
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < limit:
        raise ValueError(
            f"max_position_embeddings got {wanted!r} for {name} with {limit}; it must be an integer of at least that, as positions "
            "are never taken away; raise it, or truncate the inputs instead."
        )
    return limit


def _checked_method(model: PreTrainedModel, method: str | None) -> tuple[str, bool]:
    """The method to use, and whether the model has RoPE."""
    uses_rope = bool(_rope_sets(model.config.get_text_config()))
    if method is None:
        method = "yarn" if uses_rope else "tile"
    fitting = (*ROPE_OPTIONS, "none") if uses_rope else (*TABLE_METHODS, "none")
    if method not in fitting:
        kind = "rotary embeddings" if uses_rope else "no rope_parameters in its configuration"
        raise ValueError(
            f"method got {method!r} for {type(model).__name__}, which has {kind}; it must be one of {fitting}; use one of them."
        )
    return method, uses_rope


def _rope_sets(config: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """RoPE parameters by layer type, under None where all layers share one set; empty without RoPE."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    if nested:
        return {str(key): dict(value) for key, value in nested.items()}
    return {None: dict(parameters)} if parameters else {}


def _scaled_parameters(
    config: PreTrainedConfig,
    method: str,
    wanted: int,
    limit: int,
    layer_types: Collection[str] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """`rope_parameters` scaled from the present `limit` to `wanted` positions."""
    sets = _rope_sets(config)
    if unknown := sorted(set(options) - ROPE_OPTIONS[method]):
        raise ValueError(
            f"rope_options got {unknown} for method {method!r}; it takes {sorted(ROPE_OPTIONS[method])}; correct them."
        )
    if None in sets:
        if layer_types is not None:
            raise ValueError(
                f"layer_types got {list(layer_types)} for a configuration whose layers share one set of RoPE parameters; "
                "all of them are scaled; leave it out."
            )
        return _scaled_set(sets[None], "rope_parameters", method, wanted, limit, options)
    chosen = [name for name in sets if name not in _LOCAL_LAYERS]
    if layer_types is not None:
        chosen = list(layer_types)
    if not chosen or not set(chosen) <= set(sets):
        raise ValueError(
            f"layer_types got {layer_types!r}; it must name some of {sorted(map(str, sets))}, which have RoPE parameters of their own; "
            "None means all but sliding and chunked attention."
        )
    scaled = copy.deepcopy(dict(config.rope_parameters))
    for name in chosen:
        where = f"rope_parameters[{name!r}]"
        scaled[str(name)] = _scaled_set(sets[name], where, method, wanted, limit, options)
    return scaled


def _scaled_set(
    parameters: dict[str, Any],
    where: str,
    method: str,
    wanted: int,
    limit: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    before = parameters.get("rope_type", "default")
    if before not in ("default", method):
        raise ValueError(
            f"method got {method!r} for a model whose {where} are {before!r} already; two scalings cannot be combined; "
            + (f"use method={before!r}." if before in ROPE_OPTIONS else "choose another model.")
        )
    is_set = parameters.get("attention_factor") is not None
    if is_set and wanted != limit and "attention_factor" not in options:
        raise ValueError(
            f"{where} got attention_factor {parameters['attention_factor']}, which was set for its present factor; a new factor needs a "
            "new one; give it in rope_options, None for the paper's."
        )
    scaled = {key: value for key, value in parameters.items() if key != "type"}
    scaled["rope_type"] = method
    scaled["factor"] = (parameters.get("factor") or 1.0) * wanted / limit
    if method in ("yarn", "llama3"):
        known = parameters.get("original_max_position_embeddings")
        scaled["original_max_position_embeddings"] = limit if before == "default" else known
    if method == "llama3":
        scaled = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | scaled
    return {key: value for key, value in (scaled | options).items() if value is not None}


@contextlib.contextmanager
def _without_weights(dtype: torch.dtype) -> Iterator[None]:
    """Modules are built with parameters on the meta device and real buffers, drawing no random numbers that count."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    default = torch.get_default_dtype()
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        init_empty_weights(include_buffers=False),
        no_init_weights(),
    ):
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def _skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """What `type(model)` is with `config`, without weights. `config` is its own and loses its layouts."""
    for _, part in registered_configs(config):
        part.__dict__.pop(SECTION, None)
        part._attn_implementation_internal = None
    try:
        for _, part in registered_configs(config):
            if hasattr(part, "validate"):
                part.validate()  # as saving does
        with _without_weights(model.dtype):
            return type(model)(config)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise NotImplementedError(
            f"model got a {type(model).__name__}, which cannot be built from a configuration with "
            f"{config.get_text_config().max_position_embeddings} positions ({type(error).__name__}: {reason}); positions are extended only "
            "where a new model shows what changes; choose another method or model."
        ) from error


@dataclass
class _Plan:
    """What turns the live model into the one its new configuration describes.

    Attributes:
        model: the live model.
        tables: new weights by parameter path.
        buffers: new buffers by path, and whether they are saved.
        attributes: new plain attributes by module path.
        configs: configurations with their changed values.
        rotary: paths of rotary embeddings, which forget what they computed for earlier inputs.
        reserved_positions: positions in the configuration's limit that no token has.
    """

    model: PreTrainedModel
    tables: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, tuple[Tensor, bool]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    configs: list[tuple[PreTrainedConfig, dict[str, Any]]] = field(default_factory=list)
    rotary: list[str] = field(default_factory=list)
    reserved_positions: int = 0

    def apply(self) -> None:
        for path in self.rotary:
            module = self.model.get_submodule(path)
            for name in set(vars(module)) - _MODULE_ATTRIBUTES - set(self.attributes[path]):
                if isinstance(getattr(module, name), Tensor):
                    delattr(module, name)
        for path, (buffer, is_saved) in self.buffers.items():
            owner, name = _owner(self.model, path)
            before = owner._buffers.get(name)
            device = self.model.device if before is None else before.device
            owner.register_buffer(name, buffer.to(device), persistent=is_saved)
        made: dict[int, nn.Parameter] = {}
        for path, weight in self.tables.items():
            owner, name = _owner(self.model, path)
            before = owner.get_parameter(name)
            if id(before) not in made:
                made[id(before)] = nn.Parameter(weight, requires_grad=before.requires_grad)
            setattr(owner, name, made[id(before)])
        for path, values in self.attributes.items():
            for name, value in values.items():
                setattr(self.model.get_submodule(path), name, value)
        for config, values in self.configs:
            for name, value in values.items():
                setattr(config, name, copy.deepcopy(value))


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _make_plan(model: PreTrainedModel, changes: dict[str, Any], method: str) -> _Plan:
    """Compare models of the old and the new configuration; raises where a difference is not understood."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    old, new = _skeleton(model, copy.deepcopy(model.config)), _skeleton(model, config)
    plan = _Plan(model)
    for (_, part), (_, before), (_, after) in zip(
        *map(registered_configs, (model.config, old.config, new.config)), strict=True
    ):
        plan.configs.append((part, _changed_values(before, after)))
    live = dict(model.named_modules(remove_duplicate=False))
    modules, new_modules = dict(old.named_modules()), dict(new.named_modules())
    if {path: type(module) for path, module in modules.items()} != {
        path: type(module) for path, module in new_modules.items()
    }:
        raise NotImplementedError(
            f"model got a {type(model).__name__}, which has other modules with another number of positions; such a change cannot be made "
            "to trained weights; choose another model."
        )
    for path, before in modules.items():
        after = new_modules[path]
        found = _compare(before, after)
        module = live.get(path)
        if found.weights and type(module) is not type(after):
            raise NotImplementedError(
                f"model got a {type(model).__name__} whose {path} is not the {type(after).__name__} that its configuration makes; it was "
                "wrapped or replaced; extend positions before that."
            )
        if module is None:
            continue
        for name in found.parameters:
            parameter = f"{path}.{name}"
            plan.tables[parameter], plan.reserved_positions = _extended_table(
                module,
                name,
                before,
                after,
                parameter,
                changes["max_position_embeddings"],
                method,
                is_computed=bool(getattr(config.get_text_config(), "sinusoidal_pos_embds", False)),
            )
        for name in found.buffers:
            is_saved = name not in after._non_persistent_buffers_set
            plan.buffers[f"{path}.{name}"] = (after._buffers[name], is_saved)
        if found.attributes:
            plan.attributes[path] = {name: getattr(after, name) for name in found.attributes}
        if hasattr(after, "rope_type"):
            plan.rotary.append(path)
        if hasattr(getattr(after, "config", None), "sub_configs"):
            # Some modules keep a copy of the model's configuration.
            plan.configs.append((module.config, _changed_values(before.config, after.config)))
    _check_effect(model, plan, old, new, method)
    return plan


def _changed_values(before: PreTrainedConfig, after: PreTrainedConfig) -> dict[str, Any]:
    old = vars(before)
    return {
        name: value
        for name, value in vars(after).items()
        if _is_plain(value) and not _same(old.get(name), value)
    }


@dataclass
class _Differences:
    parameters: list[str]
    buffers: list[str]
    attributes: list[str]

    @property
    def weights(self) -> bool:
        return bool(self.parameters or self.buffers)


def _compare(before: nn.Module, after: nn.Module) -> _Differences:
    """What differs in the module itself. A rotary embedding is taken whole: it changes while it runs."""
    is_rotary = hasattr(after, "rope_type")
    old_shapes = {name: value.shape for name, value in before.named_parameters(recurse=False)}
    parameters = [
        name
        for name, value in after.named_parameters(recurse=False)
        if value.shape != old_shapes[name]
    ]
    buffers = [
        name
        for name, value in after._buffers.items()
        if value is not None and (is_rotary or not _same(before._buffers.get(name), value))
    ]
    attributes = [
        name
        for name, value in vars(after).items()
        if name not in _MODULE_ATTRIBUTES
        and _is_plain(value)
        and (is_rotary or not _same(vars(before).get(name), value))
    ]
    return _Differences(parameters, buffers, attributes)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Tensor) or isinstance(other, Tensor) or type(one) is not type(other):
        return False
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one == other


def _extended_table(
    module: nn.Module,
    name: str,
    before: nn.Module,
    after: nn.Module,
    path: str,
    limit: int,
    method: str,
    is_computed: bool,
) -> tuple[Tensor, int]:
    """The rows of a position table for the new limit, and how many positions in that limit no token has."""
    old, new, weight = before._parameters[name], after._parameters[name], module._parameters[name]
    assert old is not None and new is not None and weight is not None
    offset = getattr(module, "offset", None)
    padding = getattr(module, "padding_idx", None)
    reserved = offset if isinstance(offset, int) else 0 if padding is None else padding + 1
    extra = new.shape[0] - limit
    if not (isinstance(module, nn.Embedding) and extra in (0, reserved)):
        raise NotImplementedError(
            f"model has {path} of shape {tuple(old.shape)}, which becomes {tuple(new.shape)} with {limit} positions; only tables with one "
            "row per position are extended; choose another model."
        )
    if is_computed or "sinusoid" in type(module).__name__.lower() or not new.requires_grad:
        raise NotImplementedError(
            f"model has the fixed sinusoidal table {path}; its rows are computed, neither tiled nor interpolated; choose another model."
        )
    if method == "none":
        raise ValueError(
            f"method got 'none' for a model with the position table {path}; new positions need rows; use one of {TABLE_METHODS}."
        )
    if weight.shape != old.shape or weight.is_meta:
        raise NotImplementedError(
            f"model has {path} of shape {tuple(weight.shape)} on {weight.device}, not {tuple(old.shape)} with values; it is sharded or "
            "offloaded; extend positions before that."
        )
    rows, count = weight.detach()[reserved:], new.shape[0] - reserved
    extend = _tiled if method == "tile" else _interpolated
    return torch.cat((weight.detach()[:reserved], extend(rows, count))), reserved - extra


def _tiled(rows: Tensor, count: int) -> Tensor:
    """Row `p` is row `p % len(rows)`."""
    return rows[torch.arange(count, device=rows.device) % len(rows)]


def _interpolated(rows: Tensor, count: int) -> Tensor:
    """Row `p` lies linearly between the rows around `p * (len(rows) - 1) / (count - 1)`: both ends stay."""
    place = torch.arange(count, dtype=torch.float64, device=rows.device)
    place = place * (len(rows) - 1) / (count - 1)
    lower = place.floor().long().clamp(max=len(rows) - 2) if len(rows) > 1 else place.long()
    weight = (place - lower)[:, None].float()
    upper = (lower + 1).clamp(max=len(rows) - 1)
    return torch.lerp(rows[lower].float(), rows[upper].float(), weight).to(rows.dtype)


def _check_effect(
    model: PreTrainedModel, plan: _Plan, old: PreTrainedModel, new: PreTrainedModel, method: str
) -> None:
    """A scaling must reach the frequencies, a table method a table; "none" must leave both."""
    name = type(model).__name__
    types = [
        one.get("rope_type", "default")
        for one in _rope_sets(model.config.get_text_config()).values()
    ]
    rescaled = [
        path
        for path in plan.rotary
        if not _same(_frequencies(old.get_submodule(path)), _frequencies(new.get_submodule(path)))
    ]
    if method in TABLE_METHODS and not plan.tables:
        raise NotImplementedError(
            f"method got {method!r} for {name}, which has no learned table of its positions; there are no rows to extend; use "
            "method='none' to raise the limit alone."
        )
    if method == "none":
        bound = [one for one in types if one not in _FREE_OF_LIMIT]
        if bound or rescaled:
            raise ValueError(
                f"method got 'none' for {name}, whose RoPE ({', '.join(map(repr, bound or types))}) is computed from its limit; raising "
                "that alone would change it; use the scaling it has, if that can be extended."
            )
        if not plan.buffers and not plan.rotary:
            raise NotImplementedError(
                f"model got a {name}, in which no position encoding depends on max_position_embeddings; there is nothing to extend; use "
                "it as it is."
            )
    if method in ROPE_OPTIONS and not (plan.rotary if method == "dynamic" else rescaled):
        raise NotImplementedError(
            f"method got {method!r} for {name}, whose rotary embedding computes the same with it; it does not read "
            "rope_parameters, or its few frequencies are beyond that scaling; use another method, or 'none' to raise the limit alone."
        )


def _frequencies(rotary: nn.Module) -> dict[str, Any]:
    """What a rotary embedding computes with at first: buffers, and the factors on their cosines."""
    factors = {name: value for name, value in vars(rotary).items() if isinstance(value, float)}
    return dict(rotary._buffers) | factors
