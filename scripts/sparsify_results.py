"""What `sparsify.py` records; the model card and the figures are made from this alone."""

from dataclasses import dataclass
from typing import Any

from hf_blocksparse.evaluation import Cost, NllDifference, Perplexity, RepeatProbe

NONE = "none"  # the attention of a `CostRow` of a model in which no token reads another


@dataclass(frozen=True)
class ModelFacts:
    """The model that was measured; `max_positions` is 0 where it has no limit."""

    name: str
    base_model: str | None
    licence: str | None
    notes: tuple[str, ...]
    num_parameters: int
    num_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int


@dataclass(frozen=True)
class TextFacts:
    corpus: str
    description: str
    held_out_documents: tuple[str, ...]
    held_out_sha256: str
    training_documents: tuple[str, ...]
    training_sha256: str


@dataclass(frozen=True)
class LayoutFacts:
    """The layout at the context of the run.

    Attributes:
        layout: as in the model's configuration.
        description: its `repr`; where heads differ, how many have which.
        density: coefficients kept / coefficients of the causal triangle, mean over layers.
        window_tokens: the plain sliding window of the same budget: the smallest one that keeps at
            least as many coefficients.
        window_density: that window's density.
    """

    layout: dict[str, Any]
    description: str
    density: float
    window_tokens: int
    window_density: float


@dataclass(frozen=True)
class Quality:
    """One row: some weights with some attention.

    Attributes:
        label: what a reader calls the row.
        perplexity: on the held-out windows, or on the end of them where `label` says "cut".
        difference: to the pretrained dense row, window by window, on the same scored tokens.
        probe: the repeat probe, where it was run.
    """

    label: str
    perplexity: Perplexity
    difference: NllDifference | None
    probe: RepeatProbe | None


@dataclass(frozen=True)
class CostRow:
    """Time and memory of one attention, in a process of its own.

    Attributes:
        part: "attention alone" (one layer) or "whole model".
        work: "forward" or "forward and backward".
        cost: None where the process did not finish, for the reason in `failure`.
    """

    attention: str
    part: str
    work: str
    cost: Cost | None
    failure: str | None


@dataclass(frozen=True)
class Training:
    """One fine-tuning: mean loss of each step's windows before its update, and its wall time."""

    label: str
    losses_nats: tuple[float, ...]
    step_seconds: tuple[float, ...]
    tokens_per_step: int


@dataclass(frozen=True)
class Reload:
    """The saved model, loaded by AutoModel: its loss minus that before saving, in nats."""

    folder: str
    layout: dict[str, Any]
    nll_change_nats: float


@dataclass(frozen=True)
class SparsifyResults:
    name: str
    context_tokens: int
    scored_tokens: int
    model: ModelFacts
    text: TextFacts
    layout: LayoutFacts
    qualities: tuple[Quality, ...]
    costs: tuple[CostRow, ...]
    trainings: tuple[Training, ...]
    reload: Reload
