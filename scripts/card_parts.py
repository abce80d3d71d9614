"""What the model cards of all scripts have in common."""

from collections.abc import Sequence

from sparsify_results import ModelFacts

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
