"""What the benchmark of a GPU records, and what follows from a record alone: tables, ratios, break-even densities."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmark_cases import (
    DENSE_PEERS,
    DIRECTIONS,
    OURS,
    RANDOM_PERCENTAGES,
    SPARSE_PEERS,
    Case,
)
from benchmark_index import IndexMeasurement

from hf_blocksparse.run_record import RunRecord, from_plain


@dataclass(frozen=True)
class Row:
    """One implementation on one case in one direction; `failure` instead of numbers where it did not run.

    Attributes:
        density: of what this row computed; `ours_window` computes a layout of its own.
        round_ms: median of each round; rounds of all implementations of a case alternate.
        median_ms, low_ms, high_ms: of all calls: median, 20th and 80th percentile. The backward is timed alone. Calls of a few queries
            (`Case.query_tokens`) are timed on a GPU by replays of a CUDA graph of 20 or more, each on keys and values of its own; a
            replay's mean call counts as one.
        timed_by: "graphs", replays of a CUDA graph, which holds one call but for a few queries, or "calls", as fast as the CPU issues
            them.
        useful_tflops: 4 * head_dim operations per kept coefficient forward, 2.5 times as many backward, per second of the median. Dense
            implementations are credited with the coefficients of the layout only.
        launch_us: what the CPU needs to issue one call, without waiting for the GPU: a forward without gradients, or forward and backward.
            Never of a graph.
        peak_mib: memory above the inputs: a forward without gradients, or forward and backward.
        tile_efficiency: kept / computed coefficients, where the tiles are known and all positions are queries.
        index_ms: what building the index adds to the first call; ours only.
        relative_error: of the output, or the largest of the gradients', against float32; dense implementations of sparse layouts have none.
        first_call_s: the first call, compilation included, beside those of the others.
    """

    implementation: str
    direction: str
    density: float
    round_ms: tuple[float, ...] = ()
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    useful_tflops: float | None = None
    launch_us: float | None = None
    peak_mib: float | None = None
    tile_efficiency: float | None = None
    index_ms: float | None = None
    relative_error: float | None = None
    first_call_s: float | None = None
    timed_by: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """One case.

    Attributes:
        density: coefficients kept / coefficients of dense attention of the same kind (square, or causal triangle; of the queries' rows).
        seconds: wall time of the case.
    """

    case: Case
    is_causal: bool
    density: float
    seconds: float
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class GridResults:
    """A run over a grid.

    Attributes:
        index: building an index, apart from the cases.
        absent: implementations that are not installed, and why.
        libraries: versions of what torch was built with.
    """

    cases: tuple[CaseResult, ...]
    index: tuple[IndexMeasurement, ...]
    absent: dict[str, str]
    libraries: dict[str, str]


def grid_results(record: RunRecord) -> GridResults:
    """The results of a GPU run of `benchmark.py`; ValueError where the record is another one."""
    if record.script != "benchmark.py" or record.arguments.get("device") == "cpu":
        raise ValueError(
            f"record got one of {record.script} on {record.environment.device}; it must be of benchmark.py over a grid; "
            "run scripts/benchmark.py --grid quick."
        )
    return from_plain(GridResults, record.results)


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def case_table(results: Sequence[CaseResult]) -> str:
    """One line per implementation and direction, under a line per case."""
    header = (
        f"{'implementation':<15}{'direction':<10}{'median ms':>10}{'spread':>18}{'TFLOP/s':>9}{'launch us':>10}"
        f"{'peak MiB':>10}{'tile eff.':>10}{'index ms':>9}{'error':>9}{'timed by':>10}"
    )
    lines = [header, "-" * len(header)]
    for result in results:
        kind = "causal triangle" if result.is_causal else "square"
        rows = "" if result.case.query_tokens is None else "queries' rows of the "
        lines.append(f"{result.case}: {result.density:.2%} of the {rows}{kind}")
        for row in result.rows:
            start = f"{row.implementation:<15}{row.direction:<10}"
            if row.failure is not None:
                lines.append(f"{start}failed: {row.failure[:100]}")
                continue
            spread = f"{_milliseconds(row.low_ms)}-{_milliseconds(row.high_ms)}"
            lines.append(
                f"{start}{_milliseconds(row.median_ms):>10}{spread:>18}{row.useful_tflops:>9.3g}{_cell(row.launch_us, '.0f'):>10}"
                f"{_cell(row.peak_mib, '.0f'):>10}{_cell(row.tile_efficiency, '.2f'):>10}{_cell(row.index_ms, '.2f'):>9}"
                f"{_cell(row.relative_error, '.1e'):>9}{row.timed_by or '':>10}".rstrip()
            )
    return "\n".join(lines)


def rate_table(results: Sequence[CaseResult], implementations: Sequence[str]) -> str:
    """Useful TFLOP/s of some implementations, a line per case and direction; empty where one did not take part or failed."""
    header = f"{'':<50}{'kept':>7}  {'direction':<10}" + "".join(
        f"{name:>15}" for name in implementations
    )
    lines = [header, "-" * len(header)]
    for result in results:
        for direction in DIRECTIONS:
            rows = [row_of(result, name, direction) for name in implementations]
            if not any(rows):
                continue
            cells = "".join(
                f"{_cell(row.useful_tflops if row else None, '.3g'):>15}" for row in rows
            )
            lines.append(f"{result.case!s:<50}{result.density:>7.1%}  {direction:<10}{cells}")
    return "\n".join(lines)


class Ratio(NamedTuple):
    """How many times as fast as a peer ours is: the median over rounds, and the least and the largest round."""

    median: float
    low: float
    high: float


def ratio(ours: Row, peer: Row) -> Ratio:
    """Round by round, so that what drifts between rounds cancels.

    Of times; but of useful rates where the two computed different layouts.
    """
    credit = ours.density / peer.density
    ratios = [
        credit * theirs / own for own, theirs in zip(ours.round_ms, peer.round_ms, strict=True)
    ]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def row_of(result: CaseResult, implementation: str, direction: str) -> Row | None:
    """The row, if it was measured."""
    for row in result.rows:
        if (row.implementation, row.direction) == (implementation, direction):
            return None if row.failure is not None else row
    return None


def ratio_table(results: Sequence[CaseResult]) -> str:
    """How many times as fast ours is as each of the others, where both ran."""
    header = f"{'case':<52}{'direction':<10}{'ours against':<15}{'times as fast':>14}{'rounds':>16}"
    lines = [header, "-" * len(header)]
    for result in results:
        for direction in DIRECTIONS:
            ours = row_of(result, OURS, direction)
            for row in result.rows:
                peer = row_of(result, row.implementation, direction)
                if ours is None or peer is None or row.implementation == OURS:
                    continue
                if row.direction == direction:
                    found = ratio(ours, peer)
                    rounds = f"{found.low:.3f}-{found.high:.3f}"
                    lines.append(
                        f"{str(result.case):<52}{direction:<10}{row.implementation:<15}{found.median:>14.3f}{rounds:>16}"
                    )
    return "\n".join(lines)


@dataclass(frozen=True)
class BreakEven:
    """The density below which a sparse implementation is faster than a dense one, on random layouts.

    Attributes:
        shape, block_size, is_causal: of the layouts.
        density: interpolated; None where the sparse one is faster at every density measured, or not even at the least.
        least, most: the densities measured.
        is_always_ahead: the sparse one is faster at all of them.
    """

    shape: str
    block_size: int
    is_causal: bool
    implementation: str
    dense: str
    direction: str
    density: float | None
    least: float
    most: float
    is_always_ahead: bool


def crossing(points: Iterable[tuple[float, float]]) -> float | None:
    """Where `sparse time / dense time` first reaches 1, of points (density, that ratio), linear between them.

    None where it never does, or does at the least density already.
    """
    ordered = sorted(points)
    for (left, below), (right, above) in zip(ordered, ordered[1:], strict=False):
        if below < 1 <= above:
            return left + (right - left) * (1 - below) / (above - below)
        if below >= 1:
            return None
    return None


def random_family(results: Sequence[CaseResult]) -> dict[tuple[str, int, bool], list[CaseResult]]:
    """Random layouts by (shape, block size, causal), ascending in density; the dense layout of that kind is their end."""
    families: dict[tuple[str, int, bool], list[CaseResult]] = {}
    for result in results:
        case = result.case
        if case.layout in {f"{c}random{p}" for c in ("", "causal_") for p in RANDOM_PERCENTAGES}:
            key = (case.shape, case.block_size, result.is_causal)
            families.setdefault(key, []).append(result)
    for (shape, _, is_causal), members in families.items():
        members += [
            result
            for result in results
            if result.case.layout == ("causal" if is_causal else "full")
            and result.case.shape == shape
        ]
        members.sort(key=lambda result: result.density)
    return families


def break_evens(results: Sequence[CaseResult]) -> list[BreakEven]:
    """Of every sparse implementation against every dense one, where two densities or more were measured of both."""
    found = []
    for (shape, block_size, is_causal), members in random_family(results).items():
        for name in (OURS, *SPARSE_PEERS):
            for dense in DENSE_PEERS:
                for direction in DIRECTIONS:
                    points = []
                    for result in members:
                        sparse_row = row_of(result, name, direction)
                        dense_row = row_of(result, dense, direction)
                        if sparse_row is not None and dense_row is not None:
                            points.append((result.density, 1 / ratio(sparse_row, dense_row).median))
                    if len(points) > 1:
                        densities = [density for density, _ in points]
                        found.append(
                            BreakEven(
                                shape,
                                block_size,
                                is_causal,
                                name,
                                dense,
                                direction,
                                crossing(points),
                                min(densities),
                                max(densities),
                                all(value < 1 for _, value in points),
                            )
                        )
    return found


def break_even_table(results: Sequence[CaseResult]) -> str:
    """One line per sparse and dense implementation, direction and family of random layouts."""
    header = (
        f"{'random layouts at':<36}{'block':>6}{'kind':>8}  {'sparse':<14}{'dense':<11}{'direction':<10}"
        f"{'sparse is faster':<30}"
    )
    lines = [header, "-" * len(header)]
    for found in break_evens(results):
        if found.density is not None:
            answer = f"below {found.density:.1%}"
        elif found.is_always_ahead:
            answer = f"at all measured ({found.least:.1%}-{found.most:.1%})"
        else:
            answer = f"not even at {found.least:.1%}"
        kind = "causal" if found.is_causal else "square"
        lines.append(
            f"{found.shape:<36}{found.block_size:>6}{kind:>8}  {found.implementation:<14}{found.dense:<11}"
            f"{found.direction:<10}{answer:<30}".rstrip()
        )
    return "\n".join(lines)
