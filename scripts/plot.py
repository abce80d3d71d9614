"""Draw the figures of a run from its record: the layout, and perplexity where it has rows to show.

    python scripts/plot.py model_cards/NAME/results/sparsify.json

Needs matplotlib: pip install "hf-blocksparse[plots]".
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from sparsify_results import SparsifyResults
from torch import Tensor

from hf_blocksparse import Layout, PerLayer, layout_from_dict
from hf_blocksparse.run_record import from_plain, read_record

PIXELS = 256


def pool_layout(layout: Layout, length: int, *, num_heads: int, pixels: int = PIXELS) -> Tensor:
    """Share of causal coefficients kept, float32 `[pixels, pixels]`, at most one pixel per token.

    Shares are of a pixel's coefficients at or below the diagonal, mean over heads; pixels wholly
    above it are NaN. Masks are made for one row of pixels at a time.
    """
    pixels = min(pixels, length)
    edges = [length * i // pixels for i in range(pixels + 1)]
    columns = torch.tensor(edges)
    shares = torch.full((pixels, pixels), torch.nan)
    for row, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        mask = layout.to_mask(
            end - start, length, is_causal=True, num_heads=num_heads, query_start=start
        )
        kept = mask.float().mean(0).sum(0)
        causal = (torch.arange(start, end)[:, None] >= torch.arange(length)).sum(0)
        kept_before, causal_before = (
            torch.cat((torch.zeros(1, dtype=torch.float64), count.double().cumsum(0)))
            for count in (kept, causal)
        )
        shares[row] = (kept_before[columns].diff() / causal_before[columns].diff()).float()
    return shares


def draw_layout(results: SparsifyResults, path: Path) -> None:
    """A picture of the layout at the context of the run; of the first layer named where they
    differ.
    """
    from matplotlib.figure import Figure

    layout = layout_from_dict(results.layout.layout)
    title = results.layout.description
    if isinstance(layout, PerLayer):
        key, layout = layout.layers[0]
        title = f"layer {key}: {layout!r}"
    shares = pool_layout(
        layout.for_layer(0), results.context_tokens, num_heads=results.model.query_heads
    )
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    extent = (0, results.context_tokens, results.context_tokens, 0)
    image = axes.imshow(
        shares.numpy(), extent=extent, cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set(xlabel="key position", ylabel="query position")
    axes.set_title(
        f"{title}\nkeeps {results.layout.density:.1%} of the causal coefficients", fontsize=9
    )
    figure.colorbar(image, label="share kept")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_figures(record: Path) -> Path:
    """Draw the figures of the record at `results/` of a card into its `figures/`."""
    results = from_plain(SparsifyResults, read_record(record).results)
    path = record.parent.parent / "figures" / "layout.png"
    draw_layout(results, path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="the JSON that sparsify.py wrote")
    print(draw_figures(parser.parse_args(argv).record))


if __name__ == "__main__":
    main()
