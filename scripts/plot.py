"""Draw the figures of a run from its record alone.

    python scripts/plot.py model_cards/NAME/results/sparsify.json    the layout, into the card's figures/
    python scripts/plot.py model_cards/NAME/results/finetune.json    also perplexity by position, the frontier of density, perplexity and
                                                                     time, time and memory against length, the training curve
    python scripts/plot.py runs/benchmark.json                       density against time, beside the record

Needs matplotlib: pip install "hf-blocksparse[plots]".
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmark_cases import DENSE_PEERS, OURS
from benchmark_results import (
    DIRECTIONS,
    CaseResult,
    break_evens,
    grid_results,
    random_family,
    row_of,
)
from card_parts import check_card_record
from evaluation_figures import draw_evaluation
from evaluation_results import LAYOUT, EvaluationResults
from sparsify_results import LayoutFacts, ModelFacts, SparsifyResults
from torch import Tensor

from hf_blocksparse import Dense, Layout, PerLayer, layout_from_dict
from hf_blocksparse.inspection import kept_fractions
from hf_blocksparse.run_record import from_plain, read_record

CELLS = 256


def pool_layout(layout: Layout, length: int, *, num_heads: int, max_cells: int = CELLS) -> Tensor:
    """Share of causal coefficients kept, float32 `[cells, cells]`, cells as those of `kept_fractions`.

    Shares are of a cell's coefficients at or below the diagonal, mean over heads; cells wholly
    above it are NaN.
    """

    def fractions(of: Layout, head: int) -> Tensor:
        return kept_fractions(of, length, is_causal=True, head=head, max_cells=max_cells)

    kept = torch.stack([fractions(layout, head) for head in range(num_heads)]).mean(0)
    return kept / fractions(Dense(), 0)


def pool_layers(layout: Layout, length: int, *, num_layers: int, num_heads: int) -> Tensor:
    """`pool_layout` of the first layer; where layers are named one by one, the mean over all of them."""
    if not isinstance(layout, PerLayer):
        return pool_layout(layout.for_layer(0), length, num_heads=num_heads)
    named = dict(layout.layers)
    # A layer that is not named has the model's own attention.
    counts = Counter(
        named[layer].for_layer(layer) if layer in named else Dense() for layer in range(num_layers)
    )
    sums = [
        pool_layout(each, length, num_heads=num_heads) * count for each, count in counts.items()
    ]
    return torch.stack(sums).sum(0) / num_layers


def draw_layout(facts: LayoutFacts, model: ModelFacts, context_tokens: int, path: Path) -> None:
    """A picture of the layout at the context of the run, see `pool_layers`."""
    from matplotlib.figure import Figure

    layout = layout_from_dict(facts.layout)
    shares = pool_layers(
        layout, context_tokens, num_layers=model.num_layers, num_heads=model.query_heads
    )
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    extent = (0, context_tokens, context_tokens, 0)
    image = axes.imshow(
        shares.numpy(), extent=extent, cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set(xlabel="key position", ylabel="query position")
    description = facts.description.replace("heads, ", "heads,\n")
    mean = f", mean of {model.num_layers} layers" if isinstance(layout, PerLayer) else ""
    axes.set_title(
        f"{description}\nkeeps {facts.density:.1%} of the causal coefficients{mean}", fontsize=9
    )
    figure.colorbar(image, label="share kept")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_densities(results: Sequence[CaseResult], stem: Path) -> list[Path]:
    """Time against density, one figure for each shape, block size and kind, named after `stem`.

    Random layouts make the curves, other layouts of the shape stand as single points. Dense baselines are level lines; where ours crosses
    one, its break-even density is marked.
    """
    from matplotlib.figure import Figure

    paths = []
    for (shape, block_size, is_causal), members in random_family(results).items():
        singles = [
            result
            for result in results
            if result not in members
            and result.case.shape == shape
            and result.case.block_size in (1, block_size)
            and result.is_causal == is_causal
        ]
        crossings = [
            found
            for found in break_evens(results)
            if (found.shape, found.block_size, found.is_causal, found.implementation)
            == (shape, block_size, is_causal, OURS)
        ]
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        kind = "causal triangle" if is_causal else "square"
        figure.suptitle(f"Random blocks of {block_size}, {shape}")
        for axes, direction in zip(figure.subplots(1, 2), DIRECTIONS, strict=True):
            names = dict.fromkeys(row.implementation for result in members for row in result.rows)
            for color, name in enumerate(names):
                points = [
                    (result.density, row.median_ms, row.low_ms, row.high_ms)
                    for result in members
                    if (row := row_of(result, name, direction)) is not None
                ]
                if not points:
                    continue
                densities, medians, lows, highs = zip(*points, strict=True)
                style = "--" if name in DENSE_PEERS else "o-"
                axes.plot(densities, medians, style, color=f"C{color}", label=name, markersize=4)
                axes.fill_between(densities, lows, highs, color=f"C{color}", alpha=0.2)
            for result in singles:
                row = row_of(result, OURS, direction)
                if row is not None:
                    axes.plot(result.density, row.median_ms, "kx")
                    axes.annotate(
                        result.case.layout, (result.density, row.median_ms), fontsize=7, rotation=20
                    )
            for found in crossings:
                if found.direction == direction and found.density is not None:
                    axes.axvline(found.density, color="grey", linestyle=":")
                    axes.annotate(
                        f"{found.dense} {found.density:.0%}",
                        (found.density, 0.02),
                        xycoords=("data", "axes fraction"),
                        rotation=90,
                        fontsize=7,
                    )
            axes.set(xscale="log", yscale="log", title=direction)
            axes.set(xlabel=f"coefficients kept / {kind}", ylabel="ms (median, 20-80 %)")
            axes.legend(fontsize=7)
        name = shape.replace(" ", "_").replace("/", "-")
        path = stem.with_name(
            f"{stem.name}_{name}_b{block_size}_{'causal' if is_causal else 'square'}.png"
        )
        figure.savefig(path, dpi=150)
        paths.append(path)
    return paths


def draw_figures(path: Path) -> list[Path]:
    """Draw what the record at `path` has to show: of a card's `results/` into its `figures/`, of a benchmark beside it."""
    record = read_record(path)
    if record.script == "benchmark.py":
        return draw_densities(grid_results(record).cases, path.with_suffix(""))
    check_card_record(path, record, ("benchmark.py", "evaluate.py", "finetune.py", "sparsify.py"))
    folder = path.parent.parent / "figures"
    layout = folder / "layout.png"
    if record.script == "sparsify.py":
        sparsified = from_plain(SparsifyResults, record.results)
        draw_layout(sparsified.layout, sparsified.model, sparsified.context_tokens, layout)
        return [layout]
    results = from_plain(EvaluationResults, record.results)
    facts = next(a.facts for a in results.attentions if a.role == LAYOUT)
    assert facts is not None
    draw_layout(facts, results.model, results.context_tokens, layout)
    return [layout, *draw_evaluation(results, folder)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="the JSON that a script wrote")
    figures = draw_figures(parser.parse_args(argv).record)
    print("\n".join(map(str, figures)) or "Nothing to draw: no random layouts in this record.")


if __name__ == "__main__":
    main()
