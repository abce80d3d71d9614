"""The benchmark without a GPU: a causal sliding window beside dense SDPA, each in a process of its own, and three of each."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from benchmark_cases import (
    DTYPES,
    TOLERANCES,
    Case,
    exact_answer,
    heads_of,
    make_inputs,
    relative_error,
)
from benchmark_index import IndexMeasurement
from torch import Tensor
from tqdm import tqdm

from hf_blocksparse import SlidingWindow, block_sparse_attention
from hf_blocksparse.evaluation import Cost, in_fresh_process, measure_cost

CPU_DENSITY = 0.1
# The resident set of one process moves by some MiB from run to run: the median of several is compared.
CPU_PROCESSES = 3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measurement:
    """One implementation on one layout; `failure` instead of numbers where it refused.

    Runs on GPUs recorded the same before they ran over grids (`benchmark_results.GridResults`), and are read with this.

    Attributes:
        median_ms, low_ms, high_ms: median, 20th and 80th percentile.
        useful_tflops: of kept coefficients, per second of the median.
        tile_efficiency: kept / computed coefficients, ours on a GPU only.
        index_ms: what building the index added to the first call, ours on a GPU only.
        peak_mib: memory that forward and backward together add.
        relative_error: the largest of output and gradients, against float32.
    """

    layout: str
    block_size: int
    density: float
    implementation: str
    direction: str
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    useful_tflops: float | None = None
    tile_efficiency: float | None = None
    index_ms: float | None = None
    peak_mib: float | None = None
    relative_error: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Results:
    measurements: tuple[Measurement, ...]
    index: tuple[IndexMeasurement, ...]


def cpu_window(length_tokens: int) -> int:
    """Tokens of the causal window that keeps CPU_DENSITY of the causal triangle."""
    return round(length_tokens * (1 - math.sqrt(1 - CPU_DENSITY)))


def cpu_case(length_tokens: int, **shape) -> Case:
    return Case(f"window{cpu_window(length_tokens)}", 1, length_tokens, **shape)


def cpu_attention(implementation: str, case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if implementation == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=case.heads != case.kv_heads
        )
    layout = SlidingWindow(cpu_window(case.length_tokens))
    return lambda q, k, v: block_sparse_attention(q, k, v, layout, is_causal=True, impl="torch")


def cpu_cost(implementation: str, direction: str, case: Case, repetitions: int) -> Cost:
    """Time and memory of one direction; the backward includes the forward's saved tensors, not its time."""
    leaves, grad_out = make_inputs(case, CPU)
    attend = cpu_attention(implementation, case)
    # A short call first loads the code that either implementation needs, which is no memory of the call itself.
    short = tuple(leaf[:, :, :256] for leaf in leaves)
    torch.autograd.grad(attend(*short).sum(), leaves)
    if direction == "forward":

        def function() -> None:
            with torch.no_grad():
                attend(*leaves)
    else:
        out = attend(*leaves)

        def function() -> None:
            torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    return measure_cost(function, device=CPU, repetitions=repetitions)


def cpu_error(case: Case) -> float:
    """Against the exact answer, at an eighth of the length, where that is cheap."""
    length = max(1, case.length_tokens // 8)
    short = replace(case, layout=f"window{cpu_window(length)}", length_tokens=length)
    leaves, grad_out = make_inputs(short, CPU)
    exact = exact_answer(short, SlidingWindow(cpu_window(length)), leaves, grad_out)
    out = cpu_attention("ours", short)(*leaves)
    actual = (out, *torch.autograd.grad(out, leaves, grad_out))
    return relative_error(
        [heads_of(short, exact, tensor) for tensor in actual],
        (exact.out, exact.grad_query, exact.grad_key, exact.grad_value),
    )


def cpu_measurements(case: Case, repetitions: int) -> list[Measurement]:
    """Causal sliding window against dense causal SDPA."""
    window, length = cpu_window(case.length_tokens), case.length_tokens
    kept = case.heads * sum(min(place + 1, window) for place in range(length))
    error = cpu_error(case)
    if not error <= TOLERANCES[DTYPES[case.dtype]]:
        raise AssertionError(f"ours errs by {error:.2e}")
    measurements = []
    cases = [(i, d) for d in ("forward", "backward") for i in ("ours", "sdpa")]
    for implementation, direction in tqdm(cases, desc="cases", unit="case"):
        costs = [
            in_fresh_process(cpu_cost, implementation, direction, case, repetitions)
            for _ in range(CPU_PROCESSES)
        ]
        times = sorted(1e3 * second for cost in costs for second in cost.seconds)
        low, *_, high = (
            statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 2
        )
        factor = 1.0 if direction == "forward" else 2.5
        flop = factor * 4.0 * case.head_dim * kept * case.batch
        measurements.append(
            Measurement(
                layout=case.layout,
                block_size=1,
                density=kept / case.possible,
                implementation=implementation,
                direction=direction,
                median_ms=statistics.median(times),
                low_ms=low,
                high_ms=high,
                useful_tflops=flop / statistics.median(times) / 1e9,
                peak_mib=statistics.median(cost.added_bytes for cost in costs) / 2**20,
                relative_error=error if implementation == "ours" else None,
            )
        )
    return measurements


def table(measurements: Sequence[Measurement]) -> str:
    """One line per measurement."""
    header = (
        f"{'layout':<10}{'block':>6}{'density':>9}  {'implementation':<15}{'direction':<10}{'median ms':>10}"
        f"{'spread':>20}{'TFLOP/s':>9}{'tile eff.':>10}{'index ms':>10}{'peak MiB':>10}"
    )
    lines = [header, "-" * len(header)]

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for m in measurements:
        start = f"{m.layout:<10}{m.block_size:>6}{m.density:>9.3f}  {m.implementation:<15}"
        if m.failure is not None:
            lines.append(f"{start}refused: {m.failure[:90]}")
            continue
        spread = f"{m.low_ms:.3f}-{m.high_ms:.3f}"
        lines.append(
            f"{start}{m.direction:<10}{m.median_ms:>10.3f}{spread:>20}{m.useful_tflops:>9.3g}"
            f"{cell(m.tile_efficiency, '.2f'):>10}{cell(m.index_ms, '.1f'):>10}{cell(m.peak_mib, '.0f'):>10}"
        )
    return "\n".join(lines)
