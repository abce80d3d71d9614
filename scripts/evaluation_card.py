"""The model card of `evaluate.py` and `finetune.py`, from the record alone."""

import json
import statistics

from card_parts import (
    card_metadata,
    device_sentence,
    duration,
    markdown_table,
    model_sentence,
    quantity,
    source_sentences,
)
from evaluation_results import (
    DENSE,
    GIVEN,
    LAYOUT,
    PRETRAINED,
    SAME_BUDGET,
    EvaluationResults,
    LengthCost,
    QualityRow,
    kept_gain,
)
from sparsify_results import NONE

from hf_blocksparse.run_record import RunRecord, from_plain

GIB = 2**30


def weights_words(weights: str) -> str:
    return weights if weights in (PRETRAINED, GIVEN) else f"trained with {weights}"


def row_label(row: QualityRow, results: EvaluationResults) -> str:
    weights = "trained" if row.weights == row.attention else weights_words(row.weights)
    label = f"{row.attention}, {weights}"
    if row.read_tokens < results.context_tokens:
        label += f", cut to {row.read_tokens:,} tokens"
    return label


def headline_cut(results: EvaluationResults) -> int | None:
    """The longest short context that dense attention was cut to."""
    cuts = [
        row.read_tokens for row in results.qualities if row.read_tokens < results.context_tokens
    ]
    return max(cuts, default=None)


def quality_table(results: EvaluationResults) -> str:
    """Perplexity of every row, its difference to dense, and how much of the context's gain it keeps."""
    cut = headline_cut(results)
    rows = []
    for row in results.qualities:
        difference = "-"
        if row.difference is not None:
            difference = f"{row.difference.mean_nats:+.3f}"
            if row.difference.standard_error is not None:
                difference += f" ± {row.difference.standard_error:.3f}"
        whole = row.read_tokens == results.context_tokens
        kept = kept_gain(results, row, cut) if cut is not None and whole else None
        rows.append(
            (
                row_label(row, results),
                f"{results.attention(row.attention).density:.1%}",
                f"{row.perplexity.perplexity:.3f}",
                difference,
                "-" if kept is None else f"{kept:.0%}",
            )
        )
    return markdown_table(
        ("attention, weights", "density", "perplexity", "loss to dense, nats", "gain kept"), rows
    )


def position_table(results: EvaluationResults) -> str:
    """Perplexity by position in the window, of the rows that read whole windows."""
    rows = [row for row in results.qualities if row.read_tokens == results.context_tokens]
    buckets = rows[0].perplexity.buckets
    return markdown_table(
        ("tokens", *(f"{bucket.first_position:,}" for bucket in buckets)),
        [
            (
                row_label(row, results),
                *(f"{bucket.perplexity:.3f}" for bucket in row.perplexity.buckets),
            )
            for row in rows
        ],
    )


def probe_table(results: EvaluationResults) -> str:
    """The repeat probe by gap and needle recall by distance; empty where neither was run."""
    rows = [row for row in results.qualities if row.repeats or row.needle]
    if not rows:
        return ""
    header = ["attention, weights"]
    if rows[0].repeats:
        header += ["first reading"]
        header += [f"copy after {probe.gap_tokens:,}" for probe in rows[0].repeats]
    if rows[0].needle:
        header += [f"needle at {place.distance_tokens:,}" for place in rows[0].needle.distances]
        header += ["no needle"]
    cells = []
    for row in rows:
        line = [row_label(row, results)]
        if row.repeats:
            line += [f"{row.repeats[0].first_perplexity:.2f}"]
            line += [f"{probe.copy_perplexity:.2f}" for probe in row.repeats]
        if row.needle:
            count = row.needle.num_trials
            line += [f"{place.num_recalled}/{count}" for place in row.needle.distances]
            line += [f"{row.needle.control_recalled}/{count}"]
        cells.append(line)
    return markdown_table(header, cells)


def cost_table(results: EvaluationResults) -> str:
    """Time and memory at every length; ratios are against sdpa, what transformers takes by default."""
    sdpa = {
        (cost.tokens, cost.row.work): cost.row.cost.median_seconds
        for cost in results.costs
        if cost.row.attention == "sdpa" and cost.row.cost is not None
    }

    def cells(cost: LengthCost) -> tuple[str, ...]:
        row = cost.row
        if row.cost is None:
            return f"{cost.tokens:,}", row.attention, row.failure or "-", "-", "-", "-", "-"
        seconds = row.cost.median_seconds
        all_seconds = row.cost.seconds
        dense = sdpa.get((cost.tokens, row.work))
        return (
            f"{cost.tokens:,}",
            row.attention,
            duration(seconds),
            f"{duration(min(all_seconds))} to {duration(max(all_seconds))}"
            if len(all_seconds) > 1
            else "one call",
            f"{cost.tokens / seconds:,.0f}",
            "-" if dense is None else f"{dense / seconds:.2f}x",
            f"{row.cost.peak_bytes / GIB:.2f}",
        )

    return markdown_table(
        ("tokens", "attention", "time", "of the calls", "tokens/s", "sdpa time / this", "peak GiB"),
        [cells(cost) for cost in results.costs],
    )


def training_table(results: EvaluationResults) -> str:
    return markdown_table(
        ("attention", "steps", "tokens", "first loss", "last loss", "tokens/s", "peak GiB"),
        [
            (
                run.attention,
                f"{run.num_steps:,}",
                f"{run.num_steps * run.tokens_per_step:,}",
                f"{run.losses_nats[0]:.3f}",
                f"{statistics.fmean(run.losses_nats[-10:]):.3f}",
                f"{statistics.median(run.tokens_per_second):,.0f}",
                f"{max(run.peak_bytes) / GIB:.2f}",
            )
            for run in results.trainings
        ],
    )


def headline_rows(results: EvaluationResults) -> list[QualityRow]:
    """The rows with a layout that was asked for, in the weights the result is about."""
    layouts = [a.name for a in results.attentions if a.role == LAYOUT]
    trained = {run.attention for run in results.trainings}
    wanted = [(name, name if name in trained else GIVEN) for name in layouts]
    rows = [results.row(weights, name) for name, weights in wanted]
    return [row for row in rows if row is not None]


def metadata(results: EvaluationResults) -> str:
    """The YAML header that the hub reads."""
    tokens = f"last {results.scored_tokens} of {results.context_tokens} tokens"
    perplexities = [
        (f"perplexity with {row.attention}, {tokens}", row.perplexity.perplexity)
        for row in headline_rows(results)
    ]
    return card_metadata(results.name, results.model, results.text, perplexities)


def render_evaluation(record: RunRecord, record_path: str) -> str:
    """The whole card, as markdown with its YAML header."""
    results = from_plain(EvaluationResults, record.results)
    parts = [
        metadata(results),
        f"# {results.name}",
        _introduction(results),
        "![layout](figures/layout.png)",
        "## Quality",
        quality_table(results),
        _explain_quality(results),
        "![perplexity by position](figures/perplexity_by_position.png)",
        position_table(results),
    ]
    if probes := probe_table(results):
        parts += ["## What is still read", probes, _explain_probes(results)]
    parts += [
        "## Density, perplexity and time",
        "![frontier](figures/frontier.png)",
    ]
    if results.costs:
        parts += [
            "## Time and memory",
            cost_table(results),
            _explain_costs(record, results),
            "![time and memory against length](figures/cost_by_length.png)",
        ]
    if results.trainings:
        parts += [
            "## Training",
            training_table(results),
            _explain_training(record, results),
            "![training](figures/training.png)",
        ]
    making = (
        f"{device_sentence(record)} Computed in {record.arguments['dtype']} with float32 weights.",
        model_sentence(results.model),
        *source_sentences(record),
        f"Everything on this page comes from [{record_path}]({record_path}).",
    )
    parts += [
        "## How it was made",
        "\n".join(f"- {line}" for line in making),
        "<details><summary>Held-out documents</summary>",
        ", ".join(f"`{document}`" for document in results.text.held_out_documents),
        "</details>",
        "<details><summary>Arguments</summary>",
        f"```json\n{json.dumps(record.arguments, indent=2)}\n```",
        "</details>",
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(results: EvaluationResults) -> str:
    model = results.model
    base = model.name
    if model.base_model:
        base = f"[{model.base_model}](https://huggingface.co/{model.base_model})"
    layouts = [a for a in results.attentions if a.role == LAYOUT]
    kept = "; ".join(f"`{a.facts.description}` keeps {a.density:.1%}" for a in layouts if a.facts)
    text = (
        f"{base} with block-sparse attention. Of the causal coefficients at "
        f"{results.context_tokens:,} tokens {kept}."
    )
    if not results.trainings:
        return f"{text} Nothing was trained for this page."
    run = next(run for run in results.trainings if run.attention == layouts[0].name)
    return f"""{text} Fine-tuned with it for {quantity(run.num_steps, "step")},
{run.num_steps * run.tokens_per_step:,} tokens.

```python
import hf_blocksparse  # before loading: it makes the saved layout known to transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{results.name}")
```"""


def _explain_quality(results: EvaluationResults) -> str:
    first = results.qualities[0].perplexity
    cut = headline_cut(results)
    to_trained = "of trained weights to those trained with dense attention on the same text."
    if results.trainings and not any(run.attention == DENSE for run in results.trainings):
        to_trained = (
            "of trained weights to the pretrained ones with dense attention, as nothing was trained densely beside them: there it is "
            "what training gains and the layout costs, together."
        )
    sentences = [
        f"Perplexity of the last {results.scored_tokens:,} tokens of "
        f"{quantity(first.num_windows, 'window')} of {results.context_tokens:,} tokens "
        f"({first.buckets[-1].num_tokens:,} tokens scored), each from a document of its own; text: "
        f"{results.text.description}. All rows score the same tokens.",
        "*Density* is the share of the causal coefficients that is kept. *Loss to dense* is the mean "
        "difference in nats per token, with its standard error over windows, to dense attention with "
        f"the same weights, {to_trained}",
    ]
    windows = [a.name for a in results.attentions if a.role == SAME_BUDGET]
    if windows:
        sentences.append(
            f"A plain sliding window of the same budget ({', '.join(windows)}) is what a layout has to beat."
        )
    if cut is not None:
        sentences.append(
            f"*Gain kept*: dense attention loses less with the whole context than cut to {cut:,} tokens; "
            "this is the share of that difference a row keeps. Where the difference is small, the text "
            "needs no context and the share says little."
        )
    notes = [
        *results.model.notes,
        "The held-out text may be part of what the model was pretrained on.",
    ]
    if results.trainings:
        notes.append("Fine-tuning also adapts the weights to this kind of text.")
    if first.num_windows < 8:
        notes.append(
            f"{quantity(first.num_windows, 'window')} is little text: read small differences with care."
        )
    return "\n".join(sentences) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def _explain_probes(results: EvaluationResults) -> str:
    rows = [row for row in results.qualities if row.repeats or row.needle]
    sentences = []
    if rows[0].repeats:
        probe = rows[0].repeats[0]
        sentences.append(
            f"*Copy after* n: perplexity of {quantity(probe.num_passages, 'passage')} of "
            f"{probe.passage_tokens:,} tokens when they come again n tokens later, beside their first "
            "reading: a model that still reads the first predicts the copy almost perfectly."
        )
    if rows[0].needle:
        sentences.append(
            f"*Needle at* n: how many of {rows[0].needle.num_trials} random passkeys are recalled by "
            f"greedy decoding n tokens after they were told, in prompts of "
            f"{rows[0].needle.context_tokens:,} tokens; *no needle* asks where none was told. Where dense "
            "attention fails, the model cannot do it at that distance, and a layout proves nothing there."
        )
    return "\n".join(sentences)


def _explain_costs(record: RunRecord, results: EvaluationResults) -> str:
    works = sorted({cost.row.work for cost in results.costs})
    weights = record.arguments.get("cost_weights", "float32")
    kinds = sorted(
        {cost.row.cost.memory_kind for cost in results.costs if cost.row.cost is not None}
    )
    sentences = [
        f"The whole model, {', '.join(works)}, with {weights} weights; a step with gradient checkpointing and without the "
        "optimizer. Each row was measured in a process of its own.",
        f"Peak memory, weights included: {', '.join(kinds) or 'not measured'}.",
        "Baselines: `sdpa` is `torch.nn.functional.scaled_dot_product_attention` as transformers calls it "
        "by default, `eager` transformers' own matrix products, `flex_attention` torch's FlexAttention "
        "with the causal mask; with `none` no token reads another, which no layout can undercut. `sdpa` "
        "never holds all scores, so against it sparsity saves time, not memory; `eager` holds them all.",
    ]
    if lengths := _lengths_of_the_cpu(results):
        sentences.append(
            f"At {', '.join(f'{tokens:,}' for tokens in lengths)} tokens the model without attention took no less time than "
            "another one: the CPU, which issues the kernels, decides there, and no layout can save time."
        )
    return "\n".join(sentences)


def _lengths_of_the_cpu(results: EvaluationResults) -> list[int]:
    """Lengths at which `none` is not the fastest."""
    timed: dict[int, dict[str, float]] = {}
    for cost in results.costs:
        if cost.row.cost is not None:
            found = timed.setdefault(cost.tokens, {})
            found[cost.row.attention] = cost.row.cost.median_seconds
    return [
        tokens
        for tokens, found in timed.items()
        if NONE in found and found[NONE] > min(found.values())
    ]


def _explain_training(record: RunRecord, results: EvaluationResults) -> str:
    run, arguments = results.trainings[0], record.arguments
    how = "all weights"
    if run.trained_parameters < run.all_parameters:
        how = (
            f"LoRA of rank {arguments['lora_rank']}, {run.trained_parameters:,} of "
            f"{run.all_parameters:,} parameters"
        )
    sentences = [
        f"Trained {how}, with {arguments['optim']}, learning rate {arguments['learning_rate']:g} "
        f"({arguments['lr_scheduler_type']}, {arguments['warmup_steps']:g} warm-up), "
        f"{run.tokens_per_step:,} tokens a step on {quantity(run.num_processes, 'process')}; windows: "
        f"{arguments['packing']}; documents other than the held-out ones.",
        "All rows were trained on the same windows in the same order, from the same weights and seed. "
        "Last loss: mean of the last ten logged. Tokens/s: median, over all processes. Peak memory: "
        f"{run.memory_kind}, of the first process.",
    ]
    if resumed := [run.attention for run in results.trainings if run.resumed_at]:
        sentences.append(f"Interrupted and resumed from a checkpoint: {', '.join(resumed)}.")
    return "\n".join(sentences)
