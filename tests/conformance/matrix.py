"""Tiny models of many families, run in many ways with a sparse layout, against transformers' eager attention with the layout as a mask.

`run_cell(family, feature)` says of one family and one way of running it: it works (logits, and gradients of every parameter where there
are any, are those of the judge), it is refused with a message, or it does not apply because transformers itself cannot do it. Anything
else, a silent difference above all, raises AssertionError.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import accelerate
import torch
from conformance.verdict import NOT_APPLICABLE, REFUSED, WORKS, Verdict, described
from tiny_models import (
    BIDIRECTIONAL,
    FAMILIES,
    HEADS,
    VOCABULARY,
    assert_same,
    eager_attention_within,
    make_model,
    spread_weights,
)
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DataCollatorWithFlattening,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_blocksparse import BlockDiagonal, PerHead, SinkWindow, SlidingWindow
from hf_blocksparse.model_layouts import attention_modules, is_cross_attention, state_of
from hf_blocksparse.patch import patch_model

# Other keys in every head, so that heads in the wrong order show, too.
LAYOUT = PerHead(
    (
        SinkWindow(sink=3, window=6) | BlockDiagonal(10),
        SlidingWindow(5),
        SinkWindow(sink=1, window=8),
        BlockDiagonal(7) | SlidingWindow(3),
    )
)
IMAGE_TOKEN = 90
IMAGE_PLACES = range(9, 13)


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, what it reads, and which of its attention modules get the layout."""

    name: str
    build: Callable[[], PreTrainedModel]
    kind: str  # "decoder", "encoder", "vision", "audio" or "vision-language"
    patched: Callable[[str], bool] = lambda path: True

    @property
    def generates(self) -> bool:
        return self.kind in ("decoder", "vision-language")

    @property
    def is_causal(self) -> bool:
        # The image tokens of Gemma 3 read each other both ways.
        return self.generates and self.name != "gemma3_vision"

    @property
    def reads_text(self) -> bool:
        return self.kind in ("decoder", "encoder", "vision-language")

    def model(self) -> PreTrainedModel:
        if self.name in FAMILIES:
            return make_model(self.name)
        torch.manual_seed(0)
        model = spread_weights(self.build().eval())
        model.set_attn_implementation("eager")
        return model

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """The attention modules that get the layout."""
        return {
            path: module
            for path, module in attention_modules(model).items()
            if self.patched(path) and not is_cross_attention(path, module)
        }

    def patch(
        self, model: PreTrainedModel, kept: Callable[[nn.Module], bool] = lambda module: False
    ) -> None:
        layers = {path: LAYOUT for path, module in self.layers(model).items() if not kept(module)}
        everything = len(layers) == len(attention_modules(model))
        patch_model(model, LAYOUT if everything else layers)

    def inputs(self, rows: int, length: int, *, images: bool = True) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        if self.kind == "vision":
            return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)}
        if self.kind == "audio":
            return {
                "input_features": torch.randn(rows, 8, 80, generator=generator),
                "decoder_input_ids": torch.randint(3, IMAGE_TOKEN, (rows, 9), generator=generator),
            }
        ids = torch.randint(3, IMAGE_TOKEN, (rows, length), generator=generator)
        if self.kind != "vision-language" or not images:
            return {"input_ids": ids}
        ids[:, IMAGE_PLACES] = IMAGE_TOKEN
        pixels = torch.randn(rows, 3, 32, 32, generator=generator)
        inputs = {"input_ids": ids, "pixel_values": pixels}
        if self.name == "gemma3_vision":
            inputs["token_type_ids"] = (ids == IMAGE_TOKEN).long()
        return inputs


_LAYERS = dict(hidden_size=32, intermediate_size=48, num_attention_heads=HEADS, num_hidden_layers=2)
_TEXT = dict(
    _LAYERS,
    vocab_size=VOCABULARY,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
)
_VISION = dict(_LAYERS, image_size=32)


def _in_language_model(path: str) -> bool:
    return "language_model" in path


def _families() -> Iterator[Family]:
    for name, build in FAMILIES.items():
        yield Family(name, build, "encoder" if name in BIDIRECTIONAL else "decoder")
    yield Family(
        "t5",
        lambda: T5EncoderModel(
            T5Config(
                vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=HEADS
            )
        ),
        "encoder",
    )
    yield Family(
        "vit", lambda: ViTForImageClassification(ViTConfig(**_VISION, patch_size=4)), "vision"
    )
    yield Family(
        "whisper",
        lambda: WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=VOCABULARY,
                num_mel_bins=8,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=HEADS,
                decoder_attention_heads=HEADS,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_source_positions=40,
                max_target_positions=32,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        "audio",
        patched=lambda path: "encoder.layers" in path,
    )
    yield Family(
        "llava",
        lambda: LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=LlamaConfig(**_TEXT),
                vision_config=CLIPVisionConfig(**_VISION, patch_size=16),
                image_token_index=IMAGE_TOKEN,
            )
        ),
        "vision-language",
        patched=_in_language_model,
    )
    yield Family(
        "gemma3_vision",
        lambda: Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=dict(
                    _TEXT,
                    head_dim=16,
                    sliding_window=9,
                    layer_types=["sliding_attention", "full_attention"],
                ),
                vision_config=dict(_VISION, patch_size=8, vision_use_head=False),
                mm_tokens_per_image=4,
                image_token_index=IMAGE_TOKEN,
                boi_token_index=91,
                eoi_token_index=92,
            )
        ),
        "vision-language",
        patched=_in_language_model,
    )


ALL_FAMILIES = {family.name: family for family in _families()}


class NotApplicable(Exception):
    """A way of running that this family does not have."""


@dataclass(frozen=True)
class Run:
    """One model, to be run one way. `is_patched` is False for the judge's own run."""

    family: Family
    model: PreTrainedModel
    is_patched: bool

    def text(self, length: int = 40, left: int = 0, right: int = 0) -> dict[str, Tensor]:
        """Two rows of text: the first with padding on either side, the second whole."""
        batch = self.family.inputs(2, length)
        if left or right:
            mask = torch.ones_like(batch["input_ids"])
            mask[0, :left] = 0
            mask[0, length - right :] = 0
            batch["attention_mask"] = mask
        return batch

    def logits(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        """The outputs at the real tokens, flattened."""
        made = self.model(**batch, **options)
        logits = made.logits if "logits" in made else made.last_hidden_state
        mask = batch.get("attention_mask")
        return logits.flatten(0, -2) if mask is None else logits[mask.bool()]

    def packed_positions(self) -> Tensor:
        # RoBERTa counts from the token after the padding token.
        return _PACKED_POSITIONS + (1 if self.family.name == "roberta" else 0)

    def takes(self, argument: str) -> bool:
        return argument in inspect.signature(self.model.forward).parameters


Outcome = dict[str, Tensor]


@dataclass(frozen=True)
class Feature:
    """One way of running a model.

    Attributes:
        title: what the table says.
        run: computes it, for the patched model and for the judge.
        reference: what it must be equal to, computed by the judge; None: `run` itself.
        kinds: of families that can be run this way.
        judge_can: False where eager attention does not know this way of running, so only `reference` says what is right.
        low_precision: the outputs are rounded: the error against `reference` in float32 counts, beside the judge's own.
        keeps_sliding: layers with windows or chunks of their own keep transformers' attention.
        positions: of the tokens, where documents are packed.
    """

    name: str
    title: str
    run: Callable[[Run], Outcome]
    reference: Callable[[Run], Outcome] | None = None
    kinds: tuple[str, ...] = ("decoder", "vision-language")
    judge_can: bool = True
    low_precision: bool = False
    keeps_sliding: bool = False
    positions: Tensor | None = field(default=None, hash=False)


TEXT_KINDS = ("decoder", "encoder", "vision-language")
ALL_KINDS = (*TEXT_KINDS, "vision", "audio")


def _with_gradients(run: Run, logits: Tensor) -> Outcome:
    run.model.zero_grad()
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(logits.shape, generator=generator)
    (logits.float() * weights).sum().backward()
    gradients = {
        f"gradient of {name}": parameter.grad.clone()
        for name, parameter in run.model.named_parameters()
        if parameter.grad is not None
    }
    return {"logits": logits.detach(), **gradients}


def _whole(run: Run) -> Outcome:
    return _with_gradients(run, run.logits(run.family.inputs(2, 40)))


def _left_padded(run: Run) -> Outcome:
    return _with_gradients(run, run.logits(run.text(left=7)))


def _right_padded(run: Run) -> Outcome:
    return _with_gradients(run, run.logits(run.text(right=9)))


_DOCUMENTS = (13, 4, 23)
_PACKED_POSITIONS = torch.cat([torch.arange(length) for length in _DOCUMENTS])[None]


def _packed_ids(run: Run) -> Tensor:
    return run.family.inputs(1, sum(_DOCUMENTS), images=False)["input_ids"]


def _packed_by_positions(run: Run) -> Outcome:
    if not run.takes("position_ids"):
        raise NotApplicable("the model takes no position_ids")
    options = {"use_cache": False} if run.family.generates else {}
    batch = {"input_ids": _packed_ids(run), "position_ids": run.packed_positions()}
    return _with_gradients(run, run.logits(batch, **options))


def _packed_by_lengths(run: Run) -> Outcome:
    parameters = inspect.signature(run.model.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise NotApplicable("the model passes no cu_seq_lens to its attention")
    if "linear_attention" in (getattr(run.model.config, "layer_types", None) or ()):
        raise NotApplicable("linear attention reads across documents")
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=False)
    documents = [{"input_ids": part[0].tolist()} for part in _packed_ids(run).split(_DOCUMENTS, 1)]
    batch = dict(collate(documents))
    del batch["labels"]
    if run.takes("position_ids"):
        batch["position_ids"] = run.packed_positions()
    # With a cache, transformers does not look for documents in position_ids: only the lengths tell.
    options = {"use_cache": True} if run.family.generates else {}
    return _with_gradients(run, run.logits(batch, **options))


def _documents_apart(run: Run) -> Outcome:
    parts = _packed_ids(run).split(_DOCUMENTS, 1)
    return _with_gradients(run, torch.cat([run.logits({"input_ids": part}) for part in parts]))


_PREFILL = 16
_DECODED = 28


def _decode_inputs(run: Run) -> dict[str, Tensor]:
    batch = run.text(_DECODED, left=5)
    if run.takes("position_ids"):
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


@torch.no_grad()
def _step_by_step(run: Run, cache: Any, *chunks: int) -> Outcome:
    """Prefill, further chunks, then token by token."""
    batch = _decode_inputs(run)
    edges = [0, _PREFILL, *chunks]
    edges += range(edges[-1] + 1, _DECODED + 1)
    parts = []
    for start, stop in zip(edges, edges[1:], strict=False):
        inputs = {
            name: value[:, start:stop]
            for name, value in batch.items()
            if name in ("input_ids", "position_ids", "token_type_ids")
        }
        if start == 0 and "pixel_values" in batch:
            inputs["pixel_values"] = batch["pixel_values"]
        made = run.model(
            **inputs,
            attention_mask=batch["attention_mask"][:, :stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = made.past_key_values
        parts.append(made.logits)
    return {"logits": torch.cat(parts, 1)[batch["attention_mask"].bool()]}


@torch.no_grad()
def _at_once(run: Run) -> Outcome:
    return {"logits": run.logits(_decode_inputs(run))}


def _dynamic_cache(run: Run) -> Outcome:
    return _step_by_step(run, None)


def _static_cache(run: Run) -> Outcome:
    cache = StaticCache(config=run.model.config, max_cache_len=32)
    return _step_by_step(run, cache)


def _sliding_cache(run: Run) -> Outcome:
    cache = DynamicCache(config=run.model.config)
    if not any(cache.is_sliding):
        raise NotApplicable("the model has no sliding windows")
    return _step_by_step(run, cache)


def _chunked_prefill(run: Run) -> Outcome:
    return _step_by_step(run, None, 19, 24)


_GREEDY = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)


def _generate(run: Run, batch: dict[str, Tensor], **options: Any) -> Outcome:
    made = run.model.generate(
        **batch, **_GREEDY | options, return_dict_in_generate=True, output_logits=True
    )
    outcome = {"tokens": made.sequences}
    if options.get("num_beams", 1) > 1:
        outcome["scores"] = made.sequences_scores
    else:
        outcome["logits"] = torch.stack(made.logits, 1)
    return outcome


def _generation(run: Run) -> Outcome:
    return _generate(run, run.text(18, left=5))


def _generation_in_chunks(run: Run) -> Outcome:
    return _generate(run, run.text(18, left=5), prefill_chunk_size=5)


def _beam_search(run: Run) -> Outcome:
    return _generate(run, run.text(18, left=5), num_beams=3)


def _prompt(run: Run) -> dict[str, Tensor]:
    batch = run.family.inputs(1, 18)
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def _assisted(run: Run) -> Outcome:
    # The same weights without a layout: it guesses right now and then.
    assistant = run.family.model()
    assistant.set_attn_implementation("sdpa" if assistant._supports_sdpa else "eager")
    return _generate(run, _prompt(run), assistant_model=assistant)


def _not_assisted(run: Run) -> Outcome:
    return _generate(run, _prompt(run))


def _attentions(run: Run) -> Outcome:
    made = run.model(**run.family.inputs(2, 40), output_attentions=True)
    weights = made.get("attentions") or made.get("encoder_attentions") or ()
    return {f"attentions of layer {number}": layer for number, layer in enumerate(weights)}


def _training(run: Run, **checkpointing: bool) -> Outcome:
    model = run.model.train()
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    batch = run.text(left=7) if run.family.reads_text else run.family.inputs(2, 40)
    options = {"use_cache": False} if run.family.generates else {}
    return _with_gradients(run, run.logits(batch, **options))


def _checkpointing(run: Run) -> Outcome:
    return _training(run, use_reentrant=False)


def _reentrant_checkpointing(run: Run) -> Outcome:
    return _training(run, use_reentrant=True)


def _any_batch(run: Run) -> dict[str, Tensor]:
    return run.text(left=7) if run.family.reads_text else run.family.inputs(2, 40)


def _cast(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in batch.items()
    }


def _bfloat16(run: Run) -> Outcome:
    run.model.to(torch.bfloat16)
    return _with_gradients(run, run.logits(_cast(_any_batch(run), torch.bfloat16)))


def _autocast(run: Run) -> Outcome:
    with torch.autocast("cpu", torch.bfloat16):
        logits = run.logits(_any_batch(run))
    return _with_gradients(run, logits)


def _rounded_weights(run: Run) -> Outcome:
    run.model.to(torch.bfloat16).to(torch.float32)
    batch = _cast(_cast(_any_batch(run), torch.bfloat16), torch.float32)
    return _with_gradients(run, run.logits(batch))


def _padded_or_whole(run: Run) -> Outcome:
    return _with_gradients(run, run.logits(_any_batch(run)))


def _own_sliding_layers(run: Run) -> Outcome:
    modules = run.family.layers(run.model).values()
    kinds = {_slides(module) for module in modules}
    if kinds != {True, False}:
        raise NotApplicable("the model does not mix sliding (or chunked) and full layers")
    if run.is_patched:
        for module in modules:
            state = state_of(module)
            assert state is not None and (state.layout is None) == _slides(module), state
    decoded = _step_by_step(run, None) if run.family.generates else {}
    whole = _left_padded(run)
    return whole | {f"decoded {name}": value for name, value in decoded.items()}


def _slides(module: nn.Module) -> bool:
    """Whether the layer has a window or chunks of its own, by its entry in `config.layer_types`."""
    types = getattr(module.config, "layer_types", None)
    number = getattr(module, "layer_idx", None)
    return bool(
        types and number is not None and types[number] in ("sliding_attention", "chunked_attention")
    )


def _moved(run: Run) -> Outcome:
    """A copy on the GPU; without one in float64, where transformers' experts allow it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_experts = any("Expert" in type(module).__name__ for module in run.model.modules())
    dtype = torch.float32 if has_experts or device == "cuda" else torch.float64
    model = copy.deepcopy(run.model).to(device, dtype)
    moved = Run(run.family, model, run.is_patched)
    # Whole: eager attention gives NaN for rows of padding in float64.
    inputs = _cast(run.family.inputs(2, 40), dtype)
    batch = {name: value.to(device) for name, value in inputs.items()}
    outcome = moved.logits(batch)
    return {"logits": outcome.detach().cpu()}


@torch.no_grad()
def _offloaded(run: Run) -> Outcome:
    """accelerate's hooks bring the weights of each layer, and send it its arguments."""
    accelerate.cpu_offload(run.model, execution_device=torch.device("cpu"))
    return {"logits": run.logits(_any_batch(run))}


@torch.no_grad()
def _logits_only(run: Run) -> Outcome:
    return {"logits": run.logits(_any_batch(run))}


FEATURES = {
    feature.name: feature
    for feature in (
        Feature("whole", "no padding", _whole, kinds=ALL_KINDS),
        Feature("left_padding", "left padding", _left_padded, kinds=TEXT_KINDS),
        Feature("right_padding", "right padding", _right_padded, kinds=TEXT_KINDS),
        Feature(
            "packed_positions",
            "packed documents, `position_ids`",
            _packed_by_positions,
            _documents_apart,
            kinds=TEXT_KINDS,
            positions=_PACKED_POSITIONS,
        ),
        Feature(
            "packed_lengths",
            "packed documents, `cu_seq_lens`",
            _packed_by_lengths,
            _documents_apart,
            kinds=TEXT_KINDS,
            judge_can=False,
        ),
        Feature("dynamic_cache", "decoding, dynamic cache", _dynamic_cache, _at_once),
        Feature("static_cache", "decoding, static cache", _static_cache, _at_once),
        Feature("sliding_cache", "decoding, sliding-window cache", _sliding_cache, _at_once),
        Feature("chunked_prefill", "prefill in chunks", _chunked_prefill, _at_once),
        Feature(
            "prefill_chunk_size",
            "`generate(prefill_chunk_size)`",
            _generation_in_chunks,
            _generation,
        ),
        Feature("beam_search", "beam search", _beam_search),
        Feature("assisted", "assisted decoding", _assisted, _not_assisted),
        Feature("output_attentions", "`output_attentions`", _attentions, kinds=ALL_KINDS),
        Feature(
            "checkpointing", "gradient checkpointing", _checkpointing, _training, kinds=ALL_KINDS
        ),
        Feature(
            "reentrant_checkpointing",
            "gradient checkpointing, reentrant",
            _reentrant_checkpointing,
            _training,
            kinds=ALL_KINDS,
        ),
        Feature(
            "bfloat16", "bfloat16", _bfloat16, _rounded_weights, kinds=ALL_KINDS, low_precision=True
        ),
        Feature(
            "autocast",
            "autocast to bfloat16",
            _autocast,
            _padded_or_whole,
            kinds=ALL_KINDS,
            low_precision=True,
        ),
        Feature(
            "own_sliding_layers",
            "layout on the full layers alone",
            _own_sliding_layers,
            kinds=TEXT_KINDS,
            keeps_sliding=True,
        ),
        Feature(
            "moved", "copied and moved (on a CPU: cast) after patching", _moved, kinds=ALL_KINDS
        ),
        Feature("offloaded", "offloaded by accelerate", _offloaded, _logits_only, kinds=ALL_KINDS),
    )
}


@contextmanager
def judge(
    family: Family, feature: Feature, model: PreTrainedModel, packed: bool = False
) -> Iterator[None]:
    """`model` computes eager attention within the layout; `packed` where the batch holds documents."""
    if not family.reads_text:
        for module in family.layers(model).values():
            module.reads_within_layout = True
    with eager_attention_within(
        LAYOUT,
        is_causal=family.is_causal,
        positions=feature.positions if packed else None,
        by_module=not family.reads_text,
        keeps_sliding=feature.keeps_sliding,
    ):
        yield


# What transformers raises where it cannot run a model some way.
_THEIR_ERRORS = (
    NotImplementedError,
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    KeyError,
    IndexError,
)


def run_cell(family: Family, feature: Feature) -> Verdict:
    """Run one family one way; AssertionError where the numbers are not the judge's."""
    if family.kind not in feature.kinds:
        return Verdict(NOT_APPLICABLE, f"{family.kind} model")
    reference = feature.reference or feature.run
    judge_model = family.model()
    with judge(family, feature, judge_model, packed=feature.positions is not None):
        try:
            own = feature.run(Run(family, judge_model, is_patched=False))
        except NotApplicable as reason:
            return Verdict(NOT_APPLICABLE, str(reason))
        except _THEIR_ERRORS as error:
            return Verdict(NOT_APPLICABLE, f"transformers: {described(error)}")
    judge_model = family.model()
    with judge(family, feature, judge_model):
        expected = reference(Run(family, judge_model, is_patched=False))
    if feature.judge_can and not feature.low_precision:
        try:
            _compare(own, expected)
        except AssertionError:
            return Verdict(
                NOT_APPLICABLE,
                "transformers' eager attention is not equal to the reference either",
            )
    model = family.model()
    try:
        family.patch(model, kept=_slides if feature.keeps_sliding else lambda module: False)
        actual = feature.run(Run(family, model, is_patched=True))
    except (NotImplementedError, ValueError) as error:
        return Verdict(REFUSED, described(error))
    if feature.low_precision:
        _compare_errors(actual, own, expected)
    else:
        _compare(actual, expected)
    return Verdict(WORKS)


def _compare(actual: Outcome, expected: Outcome) -> None:
    prefix = "gradient of "
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    gradients = [
        {
            name.removeprefix(prefix): value
            for name, value in outcome.items()
            if name.startswith(prefix)
        }
        for outcome in (actual, expected)
    ]
    for name, value in expected.items():
        if not name.startswith(prefix):
            assert_same((actual[name], gradients[0]), (value, gradients[1]))


def _compare_errors(actual: Outcome, own: Outcome, exact: Outcome) -> None:
    """Rounding may cost us at most twice what it costs transformers' eager attention: in the outputs, and over all gradients."""
    assert actual.keys() == exact.keys()

    def error(outcome: Outcome, gradients: bool) -> float:
        squares = 0.0
        for name, value in exact.items():
            if name.startswith("gradient of ") == gradients:
                squares += float((outcome[name].float() - value).square().sum())
        return squares**0.5

    for gradients in (False, True):
        ours, theirs = error(actual, gradients), error(own, gradients)
        assert ours <= 2 * theirs, (gradients, ours, theirs)
