"""Time of block-sparse attention beside the best kernels there are, forward and backward apart.

    python scripts/benchmark.py --grid quick        a few minutes on one GPU
    python scripts/benchmark.py --grid bars         the comparisons the kernels are held to
    python scripts/benchmark.py --grid small_blocks blocks of 32 and 16 beside 64, scattered and in windows
    python scripts/benchmark.py --grid full         every layout, block size, length, head size and dtype: hours
    python scripts/benchmark.py --grid decode       one query and a cache of 4,096 to 65,536 tokens, beside SDPA
    python scripts/benchmark.py --grid lengths      a window of 8,192 tokens up to 131,072 of them, one of 4,096 at a million
    python scripts/benchmark.py --grid launch       512 to 2,048 tokens: what the CPU needs to issue a call, beside SDPA and FlexAttention
    python scripts/benchmark.py --device cpu

On a GPU every case (a layout at a shape) runs through ours, SDPA (FlashAttention and cuDNN, dense), compiled FlexAttention (default and
max-autotune) and, where flash-attn-4 is installed, FlashAttention-4 (block-sparse, dense, and its own sliding window). Options such as
`--layouts` narrow a grid. Each implementation lives in a process of its own, so that a peer that crashes or compiles forever becomes a
recorded failure; what it printed is in the `.logs` folder beside the record.

Before anything is timed, output and gradients of every implementation that computes the case's layout are compared with exact attention in
float32. Then the implementations take turns, round by round, so that drift of the clock meets them all; ratios are formed within rounds.
TFLOP/s are *useful* ones: 4 * head_dim operations per kept coefficient forward, 2.5 times as many backward, the same count for dense
baselines, which compute more than that. `benchmark_results.py` says what each number is. Results are written after every case, and
`--resume` goes on where a run was cut off. `scripts/plot.py` draws a record.

A short call takes the GPU less time than the CPU to issue it. So on a GPU every call that can be captured into a CUDA graph is timed by
replays of it, ours and everybody else's alike, and what the CPU needs to issue a call outside of a graph is measured apart; the record says
of each row how it was timed. `--timing calls` times calls as they are issued. A call of one query, which has no backward, is timed by a
graph of 20 such calls or more, each on a cache of its own; there an implementation that cannot be captured is a recorded failure.

`ours_portable` is ours with the kernels for any GPU (where `ours` may take those for Hopper), `ours_window` ours on a block-exact window
with as many tiles per row (what a scattered layout costs), `ours_mha` ours with a key head for each query head (what GQA costs),
`ours_by_head` ours with a list for each head where heads share a layout (what it is worth that they fill tiles together). On a CPU
it is a causal sliding window of 10 % density beside dense SDPA, each in a process of its own, and three of each. Every run begins with
building the index of BigBird at up to 1,048,576 tokens.
"""

import argparse
import contextlib
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from benchmark_cases import (
    DTYPES,
    GRIDS,
    IMPLEMENTATIONS,
    LAYOUTS,
    OURS,
    Case,
    Grid,
    applies,
)
from benchmark_cpu import Results, cpu_case, cpu_measurements, table
from benchmark_index import index_measurements, index_table
from benchmark_process import Worker, WorkerFailure
from benchmark_results import (
    CaseResult,
    GridResults,
    Row,
    break_even_table,
    case_table,
    grid_results,
    ratio_table,
)
from benchmark_worker import CALLS, GRAPHS, Prepared, serve
from tqdm import tqdm

from hf_blocksparse.run_record import (
    FORMAT_VERSION,
    Environment,
    RunRecord,
    describe_environment,
    read_record,
    to_plain,
    write_record,
)

NARROWING = {
    "layouts": "layout",
    "block_sizes": "block_size",
    "lengths": "length_tokens",
    "head_dims": "head_dim",
    "kv_heads": "kv_heads",
    "dtypes": "dtype",
}


def absent_implementations() -> dict[str, str]:
    """What is not installed, and why it is left out."""
    try:
        found = importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        found = False
    if found:
        return {}
    reason = "flash_attn.cute is not installed (pip install flash-attn-4)"
    return {name: reason for name in IMPLEMENTATIONS if name.startswith("fa4")}


def narrowed(grid: Grid, arguments: argparse.Namespace, absent: dict[str, str]) -> Grid:
    """The cases the options leave, with the implementations that apply to each."""
    kept = []
    for case, names in grid:
        if all(
            getattr(arguments, option) is None or getattr(case, field) in getattr(arguments, option)
            for option, field in NARROWING.items()
        ):
            chosen = tuple(
                name
                for name in names
                if name in arguments.implementations and name not in absent and applies(name, case)
            )
            if chosen:
                kept.append((replace(case, seed=arguments.seed), chosen))
    return kept


def measure_case(
    case: Case,
    names: Sequence[str],
    workers: dict[str, Worker],
    arguments: argparse.Namespace,
    say: Callable[[str], None],
) -> CaseResult:
    """All implementations on one case: prepared one after another, then timed in turns."""
    start = time.perf_counter()
    prepared: dict[str, Prepared] = {}
    failures: dict[tuple[str, str], str] = {}
    say(f"{case}: compiling")
    compile_together(case, names, workers, arguments.limit_s)
    for name in names:
        say(f"{case}: preparing {name}")
        try:
            message = ("prepare", case, arguments.timing)
            prepared[name] = workers[name].ask(message, arguments.limit_s)
        except WorkerFailure as failure:
            failures |= {(name, direction): str(failure) for direction in case.directions}
        else:
            failures |= {
                (name, direction): facts.failure
                for direction, facts in prepared[name].directions.items()
                if facts.failure is not None
            }
    turns = [(n, d) for d in case.directions for n in names if (n, d) not in failures]
    times: dict[tuple[str, str], list[list[float]]] = {turn: [] for turn in turns}
    order = random.Random(case.seed)
    for number in range(arguments.rounds):
        say(f"{case}: round {number + 1} of {arguments.rounds}")
        order.shuffle(turns)
        for name, direction in turns:
            if (name, direction) in failures:
                continue
            estimate = prepared[name].directions[direction].estimate_ms
            question = ("times", direction, estimate, arguments.round_ms)
            try:
                times[name, direction].append(workers[name].ask(question, arguments.limit_s))
            except WorkerFailure as failure:
                failures |= {(name, other): str(failure) for other in case.directions}
    rows = []
    for name in names:
        for direction in case.directions:
            if (name, direction) in failures:
                density = prepared[name].density if name in prepared else 0.0
                failure = failures[name, direction]
                rows.append(Row(name, direction, density, failure=failure))
            else:
                rows.append(row(case, name, direction, prepared[name], times[name, direction]))
        if workers[name].process is None:
            workers[name].start()  # ready by the next case
            continue
        try:
            workers[name].ask(("free",), arguments.limit_s)
        except WorkerFailure as failure:
            say(f"{name}: {failure}")
    density = case_density(names, prepared)
    return CaseResult(case, case.is_causal, density, time.perf_counter() - start, tuple(rows))


def compile_together(
    case: Case, names: Sequence[str], workers: dict[str, Worker], limit_s: float
) -> None:
    """First calls of all implementations at once, but for the one that times its candidates, which needs the GPU for itself."""
    together = [name for name in names if name != "flex_autotune"]

    def compile_one(name: str) -> None:
        # Whatever goes wrong here goes wrong in "prepare" again, which records it.
        with contextlib.suppress(WorkerFailure):
            workers[name].ask(("compile", case), limit_s)

    with ThreadPoolExecutor(max(1, len(together))) as pool:
        list(pool.map(compile_one, together))


def case_density(names: Sequence[str], prepared: dict[str, Prepared]) -> float:
    """Of the case's own layout, which all but `ours_window` compute or are credited with; 0 where all failed."""
    return next((prepared[n].density for n in names if n in prepared and n != "ours_window"), 0.0)


def row(
    case: Case, name: str, direction: str, prepared: Prepared, times: Sequence[Sequence[float]]
) -> Row:
    facts = prepared.directions[direction]
    every = sorted(value for part in times for value in part)
    low, *_, high = statistics.quantiles(every, n=5, method="inclusive")
    median = statistics.median(every)
    factor = 1.0 if direction == "forward" else 2.5
    flop = factor * 4.0 * case.head_dim * prepared.kept * case.batch
    return Row(
        implementation=name,
        direction=direction,
        density=prepared.density,
        round_ms=tuple(statistics.median(part) for part in times),
        median_ms=median,
        low_ms=low,
        high_ms=high,
        useful_tflops=flop / median / 1e9,
        launch_us=facts.launch_us,
        peak_mib=facts.peak_mib,
        tile_efficiency=facts.tile_efficiency,
        index_ms=facts.index_ms,
        relative_error=facts.relative_error,
        first_call_s=facts.first_call_s,
        timed_by=facts.timed_by,
    )


def resumed_cases(path: Path, environment: Environment) -> list[CaseResult]:
    """What an earlier run measured in the same environment."""
    record = read_record(path)
    for field in ("device", "packages", "git_commit", "git_changed"):
        then, now = getattr(record.environment, field), getattr(environment, field)
        if then != now:
            raise SystemExit(
                f"--resume got {path} with {field} {then!r}; this run has {now!r}; numbers of one record must be of one environment; "
                "measure anew into another file."
            )
    return list(grid_results(record).cases)


def measure_grid(
    grid: Grid,
    arguments: argparse.Namespace,
    device: torch.device,
    known: Sequence[CaseResult],
    save: Callable[[Sequence[CaseResult]], None],
) -> list[CaseResult]:
    """Every case of the grid that is not known yet; `save` is called after each."""
    results = list(known)
    measured = {result.case for result in known}
    grid = [(case, names) for case, names in grid if case not in measured]
    logs = arguments.output.with_suffix(".logs")
    names = dict.fromkeys(name for _, chosen in grid for name in chosen)
    workers = {name: Worker(serve, name, str(device), log=logs / f"{name}.log") for name in names}
    try:
        for worker in workers.values():
            worker.start()
        with tqdm(grid, desc="cases", unit="case") as bar:
            for case, chosen in bar:
                results.append(measure_case(case, chosen, workers, arguments, bar.set_postfix_str))
                save(results)
                tqdm.write(case_table(results[-1:]).split("\n", 2)[2])
    finally:
        for worker in workers.values():
            worker.stop()
    return results


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--index-only", action="store_true", help="time the index alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark.json"))
    cuda = parser.add_argument_group("on a GPU")
    cuda.add_argument("--grid", choices=GRIDS, default="quick")
    cuda.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="only these of the grid")
    cuda.add_argument("--block-sizes", nargs="+", type=int, help="only these (1: token-exact)")
    cuda.add_argument("--lengths", nargs="+", type=int, help="only these, in tokens")
    cuda.add_argument("--head-dims", nargs="+", type=int, help="only these")
    cuda.add_argument("--kv-heads", nargs="+", type=int, help="only these")
    cuda.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these")
    cuda.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS
    )
    cuda.add_argument("--rounds", type=int, default=5)
    cuda.add_argument("--round-ms", type=float, default=100.0, help="per implementation and round")
    cuda.add_argument(
        "--timing",
        choices=(GRAPHS, CALLS),
        default=GRAPHS,
        help="replays of CUDA graphs where a call can be captured (default), or calls as the CPU issues them",
    )
    cuda.add_argument(
        "--limit-s", type=float, default=300.0, help="per case and implementation, with compiling"
    )
    cuda.add_argument("--resume", action="store_true", help="keep the cases --output holds already")
    cpu = parser.add_argument_group("on a CPU")
    cpu.add_argument("--heads", type=int, default=8)
    cpu.add_argument("--head-dim", type=int, default=64)
    cpu.add_argument("--length-tokens", type=int, default=8192)
    cpu.add_argument("--repetitions", type=int, default=5, help="in each process")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.repetitions < 1 or not arguments.round_ms > 0:
        parser.error(
            f"--rounds, --repetitions and --round-ms got {arguments.rounds}, {arguments.repetitions} and {arguments.round_ms}; "
            "they must be positive."
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_args(argv)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    absent = absent_implementations() if on_gpu else {}
    grid = narrowed(GRIDS[arguments.grid](), arguments, absent) if on_gpu else []
    if on_gpu and not grid:
        raise SystemExit(
            f"--grid {arguments.grid} has no case that the other options leave; leave some of them out, or take --grid full."
        )
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device got cuda; torch sees no GPU; use --device cpu.")
    environment = describe_environment(device)
    known: list[CaseResult] = []
    if on_gpu and arguments.resume and arguments.output.exists():
        known = resumed_cases(arguments.output, environment)
    start = time.perf_counter()
    index = tuple(index_measurements(device))
    print(index_table(index), flush=True)

    def write(results: Results | GridResults) -> None:
        record = RunRecord(
            version=FORMAT_VERSION,
            script=Path(__file__).name,
            arguments=to_plain(
                {name: v.name if isinstance(v, Path) else v for name, v in vars(arguments).items()}
            ),
            seed=arguments.seed,
            environment=environment,
            timings_seconds={"measurements": time.perf_counter() - start},
            results=to_plain(results),
        )
        write_record(record, arguments.output)

    if not on_gpu:
        shape = {"heads": arguments.heads, "kv_heads": arguments.heads, "dtype": "float32"}
        case = cpu_case(
            arguments.length_tokens, head_dim=arguments.head_dim, seed=arguments.seed, **shape
        )
        measurements = []
        if not arguments.index_only:
            measurements = cpu_measurements(case, arguments.repetitions)
        write(Results(tuple(measurements), index))
        print(
            f"{environment.device} ({environment.processor}, {environment.cpu_threads} threads), {case.shape}"
        )
        print(table(measurements))
        print(f"Written to {arguments.output}.")
        return

    libraries = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}

    def save(cases: Sequence[CaseResult]) -> None:
        write(GridResults(tuple(cases), index, absent, libraries))

    save(known)
    results = known
    if not arguments.index_only:
        results = measure_grid(grid, arguments, device, known, save)
    print(f"{environment.device}, torch {torch.__version__}")
    for name, reason in absent.items():
        print(f"{name} is left out: {reason}")
    for text in (case_table(results), ratio_table(results), break_even_table(results)):
        print(f"\n{text}")
    print(f"\nWritten to {arguments.output}.")
    failed = [
        f"{result.case}, {row.direction}: {row.failure}"
        for result in results
        for row in result.rows
        if row.implementation.startswith(OURS) and row.failure is not None
    ]
    if failed:
        raise SystemExit("ours failed on " + "; ".join(failed))


if __name__ == "__main__":
    main()
