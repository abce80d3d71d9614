"""Write the model card of a run from its record alone.

python scripts/write_model_card.py model_cards/NAME/results/finetune.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from attention_cost import FORWARD, FORWARD_AND_BACKWARD, WHOLE_MODEL
from card_parts import (
    card_metadata,
    check_card_record,
    device_sentence,
    duration,
    markdown_table,
    model_sentence,
    quantity,
    source_sentences,
)
from encoder_results import render_encoder
from evaluation_card import render_evaluation
from sparsify_results import CostRow, Quality, SparsifyResults

from hf_blocksparse.run_record import RunRecord, from_plain, read_record


def quality_table(results: SparsifyResults) -> str:
    """Perplexity of every row, its difference to dense, and the repeat probe."""
    rows = []
    for row in results.qualities:
        difference = "-"
        if row.difference is not None:
            difference = f"{row.difference.mean_nats:+.3f}"
            if row.difference.standard_error is not None:
                difference += f" ± {row.difference.standard_error:.3f}"
        probe = "-"
        if row.probe is not None:
            probe = f"{row.probe.first_perplexity:.2f} / {row.probe.copy_perplexity:.2f}"
        rows.append((row.label, f"{row.perplexity.perplexity:.3f}", difference, probe))
    return markdown_table(
        ("attention", "perplexity", "loss to dense, nats", "repeat: first / copy"), rows
    )


def position_table(results: SparsifyResults) -> str:
    """Perplexity by position in the window, of the rows that scored the same positions as dense."""

    def positions(row: Quality) -> list[tuple[int, int]]:
        return [(bucket.first_position, bucket.end_position) for bucket in row.perplexity.buckets]

    spans = positions(results.qualities[0])
    return markdown_table(
        ("tokens", *(f"{first:,} to {end - 1:,}" for first, end in spans)),
        [
            (row.label, *(f"{bucket.perplexity:.3f}" for bucket in row.perplexity.buckets))
            for row in results.qualities
            if positions(row) == spans
        ],
    )


def cost_table(results: SparsifyResults) -> str:
    """Time and memory; speed-ups are against sdpa, the attention transformers takes by default."""
    sdpa = {
        (row.part, row.work): row.cost.median_seconds
        for row in results.costs
        if row.attention == "sdpa" and row.cost is not None
    }
    rows = [_cost_cells(row, sdpa.get((row.part, row.work))) for row in results.costs]
    return markdown_table(
        ("measured", "attention", "time", "sdpa time / this", "added memory, MiB"), rows
    )


def _cost_cells(row: CostRow, sdpa_seconds: float | None) -> tuple[str, ...]:
    measured = f"{row.part}, {row.work}"
    if row.cost is None:
        return measured, row.attention, row.failure or "-", "-", "-"
    seconds = row.cost.median_seconds
    return (
        measured,
        row.attention,
        duration(seconds),
        "-" if sdpa_seconds is None else f"{sdpa_seconds / seconds:.2f}x",
        f"{row.cost.added_bytes / 2**20:,.0f}",
    )


def metadata(results: SparsifyResults) -> str:
    """The YAML header that the hub reads."""
    of = f"perplexity, last {results.scored_tokens} of {results.context_tokens} tokens"
    label = results.trainings[-1].label + TUNED
    perplexities = [
        (of, row.perplexity.perplexity) for row in results.qualities if row.label == label
    ]
    return card_metadata(results.name, results.model, results.text, perplexities)


TUNED = ", fine-tuned"
EVALUATION_SCRIPTS = ("evaluate.py", "finetune.py")
CARD_SCRIPTS = (*EVALUATION_SCRIPTS, "finetune_encoder.py", "sparsify.py")


def render(record: RunRecord, record_path: str) -> str:
    """The whole card, as markdown with its YAML header."""
    if record.script in EVALUATION_SCRIPTS:
        return render_evaluation(record, record_path)
    if record.script == "finetune_encoder.py":
        return render_encoder(record, record_path)
    results = from_plain(SparsifyResults, record.results)
    model, layout = results.model, results.layout
    training = results.trainings[-1]
    trained_tokens = len(training.losses_nats) * training.tokens_per_step
    base = f"[{model.base_model}](https://huggingface.co/{model.base_model})"
    return f"""{metadata(results)}

# {results.name}

{base if model.base_model else model.name} with block-sparse attention, `{layout.description}`.
It keeps {layout.density:.1%} of the causal coefficients at {results.context_tokens:,} tokens.
Fine-tuned for {quantity(len(training.losses_nats), "step")}, {trained_tokens:,} tokens.

![layout](figures/layout.png)

```python
import hf_blocksparse  # before loading: it makes the saved layout known to transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{results.name}")
```

## Quality

{quality_table(results)}

{_explain_quality(results)}

## Time and memory

{cost_table(results)}

{_explain_costs(results)}

## How it was made

{_explain_making(record, results)}
- Everything on this page comes from [{record_path}]({record_path}).

<details><summary>Held-out documents</summary>

{", ".join(f"`{document}`" for document in results.text.held_out_documents)}

</details>

<details><summary>Arguments</summary>

```json
{json.dumps(record.arguments, indent=2)}
```

</details>
"""


def _explain_quality(results: SparsifyResults) -> str:
    dense = results.qualities[0]
    count = dense.perplexity.num_windows
    probe = dense.probe
    assert probe is not None
    notes = [
        *results.model.notes,
        "The held-out text may be part of what the model was pretrained on.",
        "Fine-tuning also adapts the weights to this kind of text; the last row shows the same "
        "weights with dense attention.",
    ]
    if count < 8:
        notes.append(
            f"{quantity(count, 'window')} is little text: read small differences with care."
        )
    by_position = ""
    if len(dense.perplexity.buckets) > 1:
        by_position = f"\n\nPerplexity by position in the window:\n\n{position_table(results)}"
    return f"""Perplexity of the last {results.scored_tokens:,} tokens of {quantity(count, "window")} of
{results.context_tokens:,} tokens ({dense.perplexity.buckets[-1].num_tokens:,} tokens scored), each
from a document of its own; text: {results.text.description}. All rows score the same tokens.
*Loss to dense* is the mean difference to the first row in nats per token, with its standard error
over windows. The window of the same budget keeps {results.layout.window_density:.1%}.
*Repeat* is the perplexity of {quantity(probe.num_passages, "passage")} of
{probe.passage_tokens:,} tokens, and of a copy {probe.gap_tokens:,} tokens later: a model that still
reads the passage predicts the copy almost perfectly.{by_position}

""" + "\n".join(f"- {note}" for note in notes)


def _explain_costs(results: SparsifyResults) -> str:
    works = {row.work for row in results.costs if row.part == WHOLE_MODEL}
    sentences = []
    if FORWARD in works:
        sentences.append(f"The whole model scores one window of {results.context_tokens:,} tokens.")
    if FORWARD_AND_BACKWARD in works:
        sentences.append(
            f"The whole model makes one training step on {results.context_tokens:,} tokens, with "
            "gradient checkpointing, without the optimizer."
        )
    kinds = sorted({row.cost.memory_kind for row in results.costs if row.cost is not None})
    return "\n".join(
        (
            *sentences,
            "*Attention alone* is that of one layer.",
            "Each row was measured in a process of its own.",
            f"Added memory is the peak during that work less what was there before "
            f"({', '.join(kinds)}).",
            "Baselines: `sdpa` is `torch.nn.functional.scaled_dot_product_attention` as "
            "transformers calls it by default;",
            "`eager` is transformers' own matrix products. `sdpa` never holds all scores, so "
            "against it sparsity saves time, not memory;",
            "`eager` holds them all.",
        )
    )


def _explain_making(record: RunRecord, results: SparsifyResults) -> str:
    model, training = results.model, results.trainings[-1]
    lines = (
        f"{device_sentence(record)} Computed in {record.arguments['dtype']} with float32 weights.",
        model_sentence(model),
        f"Training: AdamW, learning rate {record.arguments['learning_rate']:g} falling to 0, "
        f"{training.tokens_per_step:,} tokens a step, loss {training.losses_nats[0]:.3f} to "
        f"{training.losses_nats[-1]:.3f} nats, on documents other than the held-out ones.",
        f"Saved and loaded again through AutoModel: the loss changed by "
        f"{results.reload.nll_change_nats:.1e} nats.",
        *source_sentences(record),
    )
    return "\n".join(f"- {line}" for line in lines)


def write_model_card(record_path: Path) -> Path:
    """Write README.md beside the `results` folder that holds the record."""
    record = read_record(record_path)
    check_card_record(record_path, record, CARD_SCRIPTS)
    card = record_path.parent.parent / "README.md"
    relative = record_path.relative_to(card.parent).as_posix()
    card.write_text(render(record, relative), encoding="utf-8")
    return card


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="the JSON that one of the scripts wrote")
    print(write_model_card(parser.parse_args(argv).record))


if __name__ == "__main__":
    main()
