"""What `finetune_encoder.py` records, and the model card made of it alone."""

import json
import math
import statistics
from dataclasses import dataclass

from card_parts import (
    card_metadata,
    device_sentence,
    markdown_table,
    model_sentence,
    quantity,
    source_sentences,
)
from evaluation_results import TrainingRun
from sparsify_results import LayoutFacts, ModelFacts, TextFacts

from hf_blocksparse.evaluation import NllDifference
from hf_blocksparse.run_record import RunRecord, from_plain

GIB = 2**30
DENSE, LAYOUT, CHUNKS = "dense", "layout", "chunks"
# Weights: with the new head at the old length; after its positions were extended; what was trained at the new length.
SHORT, EXTENDED = "short", "extended"


@dataclass(frozen=True)
class EncoderRow:
    """Some weights with some attention, on the held-out windows; every row is asked for the same hidden tokens.

    Attributes:
        weights: "short", "extended", or what they were trained with: "dense", "layout" or "chunks".
        attention: "dense", "layout", or "chunks": dense attention in pieces of the old length, each read alone.
        read_tokens: tokens read at a time.
        num_hidden: hidden tokens, over all windows.
        nll_nats: mean loss of a hidden token, in nats.
        accuracy: share of hidden tokens that are the model's first guess.
        window_nll_nats: mean loss of each window.
        difference: to the chunks, window by window: of weights trained at the new length to those trained in
            chunks, of the others to the short ones. None for these two.
    """

    weights: str
    attention: str
    read_tokens: int
    num_hidden: int
    nll_nats: float
    accuracy: float
    window_nll_nats: tuple[float, ...]
    difference: NllDifference | None


@dataclass(frozen=True)
class EncoderResults:
    """
    Attributes:
        context_tokens, short_tokens: tokens of a window and of a chunk, each with its first special token.
        hidden_share: of the tokens that are hidden.
        layout: its density is of the whole square; the plain window of the same budget is not measured here.
        head_training: at the old length, which gives the model its head.
        trainings: at the new length, alike, and of the chunks.
    """

    name: str
    context_tokens: int
    short_tokens: int
    hidden_share: float
    model: ModelFacts
    text: TextFacts
    layout: LayoutFacts
    rows: tuple[EncoderRow, ...]
    head_training: TrainingRun
    trainings: tuple[TrainingRun, ...]

    def row(self, weights: str, attention: str) -> EncoderRow:
        return next(
            row for row in self.rows if (row.weights, row.attention) == (weights, attention)
        )


def row_label(row: EncoderRow, results: EncoderResults) -> str:
    attention = {
        DENSE: "dense",
        LAYOUT: results.layout.description,
        CHUNKS: f"dense, in chunks of {row.read_tokens:,}",
    }[row.attention]
    weights = {SHORT: "with the new head", EXTENDED: "positions extended"}.get(
        row.weights, "trained"
    )
    return f"{attention}, {weights}"


def loss_table(results: EncoderResults) -> str:
    """Loss and accuracy at the hidden tokens, and the difference to dense attention in chunks."""
    cells = []
    for row in results.rows:
        difference = "-"
        if row.difference is not None:
            difference = f"{row.difference.mean_nats:+.3f}"
            if row.difference.standard_error is not None:
                difference += f" ± {row.difference.standard_error:.3f}"
        cells.append(
            (
                row_label(row, results),
                f"{row.nll_nats:.3f}",
                f"{row.accuracy:.1%}",
                difference,
            )
        )
    return markdown_table(("attention, weights", "loss, nats", "found", "difference, nats"), cells)


def training_table(results: EncoderResults) -> str:
    runs = ((f"head, {results.short_tokens:,} tokens", results.head_training),)
    runs += tuple((run.attention, run) for run in results.trainings)
    return markdown_table(
        ("trained", "steps", "tokens", "first loss", "last loss", "tokens/s", "peak GiB"),
        [
            (
                name,
                f"{run.num_steps:,}",
                f"{run.num_steps * run.tokens_per_step:,}",
                f"{run.losses_nats[0]:.3f}",
                f"{statistics.fmean(run.losses_nats[-10:]):.3f}",
                f"{statistics.median(run.tokens_per_second):,.0f}",
                f"{max(run.peak_bytes) / GIB:.2f}",
            )
            for name, run in runs
        ],
    )


def metadata(results: EncoderResults) -> str:
    """The YAML header that the hub reads."""
    row = results.row(LAYOUT, LAYOUT)
    of = f"of hidden tokens, windows of {results.context_tokens} tokens"
    perplexities = [(of, math.exp(row.nll_nats))]
    return card_metadata(results.name, results.model, results.text, perplexities, "fill-mask")


def render_encoder(record: RunRecord, record_path: str) -> str:
    """The whole card, as markdown with its YAML header."""
    results = from_plain(EncoderResults, record.results)
    model, first, arguments = results.model, results.rows[0], record.arguments
    base = model.name
    if model.base_model:
        base = f"[{model.base_model}](https://huggingface.co/{model.base_model})"
    run = next(run for run in results.trainings if run.attention not in (DENSE, CHUNKS))
    notes = (
        *model.notes,
        "The model came without a masked-token head; a new one was trained first, with all weights, at the old length.",
        "The held-out text may be part of what the model was pretrained on.",
    )
    making = (
        f"{device_sentence(record)} Computed in {arguments['dtype']} with float32 weights.",
        model_sentence(model),
        *source_sentences(record),
        f"Everything on this page comes from [{record_path}]({record_path}).",
    )
    parts = (
        metadata(results),
        f"# {results.name}",
        f"""{base}, an encoder of {results.short_tokens:,} tokens, made to read {results.context_tokens:,} by copies of its position
table and `{results.layout.description}`, which keeps {results.layout.density:.1%} of the coefficients at that length. Trained with it for
{quantity(run.num_steps, "step")}, {run.num_steps * run.tokens_per_step:,} tokens.

```python
import hf_blocksparse  # before loading: it makes the saved layout known to transformers
from transformers import AutoModelForMaskedLM

model = AutoModelForMaskedLM.from_pretrained("{results.name}")
```""",
        "## Quality",
        loss_table(results),
        f"""Loss at {first.num_hidden:,} hidden tokens, {results.hidden_share:.0%} of {quantity(len(first.window_nll_nats), "window")} of
{results.context_tokens:,} tokens, each from a document of its own; text: {results.text.description}. All rows are asked for the same
tokens; in chunks the same text is read {results.short_tokens:,} tokens at a time. *Found*: hidden tokens that are the first guess.
*Difference*: to the chunks, trained or not as the row is; mean over windows, with its standard error.""",
        "\n".join(f"- {note}" for note in notes),
        "## Training",
        training_table(results),
        f"""Trained all weights, with {arguments["optim"]}, learning rate {arguments["head_learning_rate"]:g} for the head
and {arguments["learning_rate"]:g} afterwards ({arguments["lr_scheduler_type"]}, {arguments["warmup_steps"]:g} warm-up).
Rows at the new length were trained on the same text with the same tokens hidden, from the same weights; the chunks
from those before the extension. Last loss: mean of the last ten logged. Tokens/s: median.
Peak memory: {run.memory_kind}.""",
        "## How it was made",
        "\n".join(f"- {line}" for line in making),
        "<details><summary>Held-out documents</summary>",
        ", ".join(f"`{document}`" for document in results.text.held_out_documents),
        "</details>",
        "<details><summary>Arguments</summary>",
        f"```json\n{json.dumps(arguments, indent=2)}\n```",
        "</details>",
    )
    return "\n\n".join(parts) + "\n"
