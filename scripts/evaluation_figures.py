"""The figures of `evaluate.py` and `finetune.py`, from their results alone; `plot.py` draws them."""

from pathlib import Path
from typing import Any

from evaluation_card import row_label
from evaluation_results import DENSE, GIVEN, LAYOUT, PRETRAINED, SAME_BUDGET, EvaluationResults


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_perplexity(results: EvaluationResults, path: Path) -> None:
    """Perplexity by position, of every row that read whole windows; a point stands at its bucket's end."""
    figure = new_figure(7.2, 5.4)
    axes = figure.add_subplot()
    for row in results.qualities:
        if row.read_tokens < results.context_tokens:
            continue
        role = results.attention(row.attention).role
        axes.plot(
            [bucket.end_position for bucket in row.perplexity.buckets],
            [bucket.perplexity for bucket in row.perplexity.buckets],
            label=row_label(row, results),
            marker="o",
            markersize=3,
            linestyle={DENSE: "--", SAME_BUDGET: ":"}.get(role, "-"),
        )
    axes.set(xlabel="position in the window, tokens", ylabel="perplexity", yscale="log")
    for numbered in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        numbered("{x:g}")
    # Below the axes, where it hides no curve.
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    save(figure, path)


def seconds_at_longest(results: EvaluationResults) -> dict[str, float]:
    """Seconds of each attention at the greatest length, where it ran; dense attention is sdpa's."""
    longest = max((cost.tokens for cost in results.costs), default=0)
    timed = {
        cost.row.attention: cost.row.cost.median_seconds
        for cost in results.costs
        if cost.tokens == longest and cost.row.cost is not None
    }
    return timed | {DENSE: timed["sdpa"]} if "sdpa" in timed else timed


def draw_frontier(results: EvaluationResults, path: Path) -> None:
    """Perplexity against density and, where it was measured, against the time of the longest length."""
    timed = seconds_at_longest(results)
    whole = [row for row in results.qualities if row.read_tokens == results.context_tokens]
    # Weights trained with one attention and measured with another belong to neither point.
    rows = [row for row in whole if row.weights in (row.attention, PRETRAINED, GIVEN)]
    figure = new_figure(10.4 if timed else 6.4, 5.2)
    charts = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    marks = {DENSE: "s", SAME_BUDGET: "x", LAYOUT: "o"}
    for number, row in enumerate(rows):
        attention = results.attention(row.attention)
        places = [(charts[0], attention.density * 100)]
        if row.attention in timed:
            places.append((charts[1], timed[row.attention]))
        for chart, x in places:
            chart.plot(
                x,
                row.perplexity.perplexity,
                linestyle="",
                marker=marks[attention.role],
                color=f"C{number % 10}",
                # Rows whose weights were trained here stand out.
                markersize=6 if row.weights == PRETRAINED else 9,
                label=row_label(row, results),
            )
    charts[0].set(xlabel="density, % of the causal coefficients", ylabel="perplexity")
    charts[0].set_xlim(0, 105)
    figure.legend(*charts[0].get_legend_handles_labels(), loc="outside lower center", fontsize=7)
    if timed:
        tokens = max(cost.tokens for cost in results.costs)
        work = results.costs[0].row.work
        charts[1].set(xlabel=f"seconds at {tokens:,} tokens, {work}")
        charts[1].set_xlim(0, 1.05 * charts[1].dataLim.x1)
    save(figure, path)


def draw_costs(results: EvaluationResults, path: Path) -> None:
    """Time and peak memory against length, one line per attention."""
    from matplotlib.ticker import LogLocator

    figure = new_figure(10.4, 4.2)
    time, memory = figure.subplots(1, 2)
    for name in dict.fromkeys(cost.row.attention for cost in results.costs):
        points = sorted(
            (cost.tokens, cost.row.cost)
            for cost in results.costs
            if cost.row.attention == name and cost.row.cost is not None
        )
        tokens = [length for length, _ in points]
        time.plot(tokens, [cost.median_seconds for _, cost in points], marker="o", label=name)
        memory.plot(tokens, [cost.peak_bytes / 2**30 for _, cost in points], marker="o", label=name)
    work = results.costs[0].row.work
    time.set(xlabel="tokens", ylabel=f"seconds, {work}")
    memory.set(xlabel="tokens", ylabel="peak memory, GiB")
    lengths = sorted({cost.tokens for cost in results.costs})
    for axes in (time, memory):
        if len(lengths) > 1:
            axes.set(xscale="log", yscale="log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_yticks([], minor=True)
        else:  # a logarithmic scale would blow small differences up
            axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.set_xticks([], minor=True)
        axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    # Below the axes, where it hides no point.
    figure.legend(
        *time.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7
    )
    save(figure, path)


def draw_training(results: EvaluationResults, path: Path) -> None:
    """Training loss against tokens, one line per attention."""
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    for run in results.trainings:
        tokens = [step * run.tokens_per_step / 1e6 for step in run.logged_steps]
        axes.plot(tokens, run.losses_nats, label=run.attention, linewidth=1)
    axes.set(xlabel="million tokens", ylabel="training loss, nats")
    axes.legend(fontsize=7)
    save(figure, path)


def draw_evaluation(results: EvaluationResults, folder: Path) -> list[Path]:
    """Every figure these results have something to show for, into `folder`."""
    drawings = {"perplexity_by_position": draw_perplexity, "frontier": draw_frontier}
    if results.costs:
        drawings["cost_by_length"] = draw_costs
    if results.trainings:
        drawings["training"] = draw_training
    paths = [folder / f"{name}.png" for name in drawings]
    for draw, path in zip(drawings.values(), paths, strict=True):
        draw(results, path)
    return paths
