"""What the model cards of all scripts have in common."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from sparsify_results import ModelFacts, TextFacts

from hf_blocksparse.run_record import RunRecord


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as text, too: columns padded, all but the first to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def join(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join(
        "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"
        for column, width in enumerate(widths)
    )
    return "\n".join([join(header), rule + "|", *map(join, rows)])


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"


def card_metadata(
    name: str,
    model: ModelFacts,
    text: TextFacts,
    perplexities: Sequence[tuple[str, float]],
    task: str = "text-generation",
) -> str:
    """The YAML header that the hub reads; `perplexities`: what each is of, and its value."""
    data = ModelCardData(
        model_name=name,
        base_model=model.base_model,
        license=model.licence,
        library_name="transformers",
        pipeline_tag=task,
        tags=["hf-blocksparse", "block-sparse-attention", "long-context"],
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=text.corpus,
                dataset_name=text.description,
                metric_type="perplexity",
                metric_name=metric_name,
                metric_value=round(perplexity, 4),
            )
            for metric_name, perplexity in perplexities
        ],
    )
    return f"---\n{data.to_yaml()}\n---"


def quantity(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def device_sentence(record: RunRecord) -> str:
    environment = record.environment
    device = environment.device
    if device == "cpu":
        device = f"CPU, {environment.processor}, {environment.cpu_threads} threads"
    return f"Device: {device}."


def model_sentence(model: ModelFacts) -> str:
    return (
        f"Model: {model.num_parameters / 1e6:.1f} million parameters, {model.num_layers} layers, "
        f"{model.query_heads} query and {model.kv_heads} key heads of {model.head_dim}."
    )


def source_sentences(record: RunRecord) -> tuple[str, str]:
    """Seed and versions; commit, start and duration."""
    environment = record.environment
    commit = environment.git_commit or "not from a git checkout"
    changed = ", with local changes" if environment.git_changed else ""
    versions = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    return (
        f"Seed {record.seed}. Python {environment.python}, {versions}.",
        f"Source: {commit}{changed}. Started {environment.started_at}, took "
        f"{sum(record.timings_seconds.values()):.0f} s.",
    )


def check_card_record(record_path: Path, record: RunRecord, scripts: Sequence[str]) -> None:
    """Refuse a record that no card or figures belong to.

    Raises:
        ValueError: none of `scripts` made the record, or it lies elsewhere, where it would change another's files.
    """
    if record.script not in scripts:
        raise ValueError(
            f"record got {record_path}, which {record.script} wrote; it must be one of {', '.join(scripts)}; give such a record."
        )
    folder = record_path.resolve().parent
    if folder.name != "results":
        raise ValueError(
            f"record got {record_path} in the folder {folder.name!r}; a card is written beside the folder results that holds its record; "
            "move it to NAME/results."
        )
