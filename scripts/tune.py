"""Which tile sizes, warps and stages of the portable kernels are fastest on this GPU.

    python scripts/tune.py --output runs/tune.json
    python scripts/tune.py --kernels forward --head-dims 64 --processes 8
    TRITON_INTERPRET=1 python scripts/tune.py --device cpu --length-tokens 256 --limit-candidates 1

For each kernel, head size and grain of the layout, every candidate is run on two layouts and compared with exact attention before it is
timed; one whose answer is wrong, or which the GPU has no room for (it says itself what memory a program may use), is recorded as a failure.
Then the candidates take turns, round by round. What is timed is all of the direction: the forward, or the backward with the other kernel's
sizes as they are in the table. The record holds every candidate's times, and the table's own row among them; at the end come the rows of
the tables in `ops/triton/tile_sizes.py` and `ops/triton/decode_sizes.py` as they would be. Nothing is changed by itself: a row that wins
by less than the rounds differ is not worth it.

With `--processes` candidates are compiled in so many processes beforehand. `--resume` keeps what `--output` holds; with `--seconds` nothing
is begun later.
"""

import argparse
import contextlib
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_cases import (
    DTYPES,
    TOLERANCES,
    Case,
    exact_answer,
    heads_of,
    make_inputs,
    make_layout,
    relative_error,
)
from benchmark_process import one_line
from tqdm import tqdm

from hf_blocksparse import attention
from hf_blocksparse.block_index import clear_cache
from hf_blocksparse.ops.problem import Problem
from hf_blocksparse.ops.triton.decode_sizes import DecodeSizes
from hf_blocksparse.ops.triton.tile_sizes import TileSizes
from hf_blocksparse.run_record import (
    FORMAT_VERSION,
    RunRecord,
    describe_environment,
    from_plain,
    read_record,
    to_plain,
    write_record,
)

DIRECTIONS = ("forward", "grad_query", "grad_key_value")
KERNELS = (*DIRECTIONS, "decode", *(f"gathered_{direction}" for direction in DIRECTIONS))
GRAINS = (
    128,
    64,
)  # the columns of the table: blocks of 128 and token-exact layouts, smaller blocks
COMPILE_LENGTH = 2048  # as many tiles as make the compiler see what it sees at longer lengths
FLUSH_BYTES = 256 << 20
GRAPH_CALLS = 20

# (tile_q, tile_kv, num_warps, num_stages); of keys and queries exchanged for grad_key_value.
LARGE = ((128, 128, 8, 3), (128, 128, 8, 2), (128, 128, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3))
SMALL = ((64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 3))
# (tile_kv, max_rows, num_warps, num_stages)
DECODE = (
    (64, 64, 4, 5),
    (64, 16, 4, 5),
    (64, 64, 4, 3),
    (128, 64, 4, 4),
    (32, 64, 4, 5),
    (64, 64, 8, 5),
)


@dataclass(frozen=True)
class Setting:
    """One row of a table: a kernel, a head size, a dtype, and the largest block of the layouts it is for."""

    kernel: str
    head_dim: int
    dtype: str
    grain: int

    def __str__(self) -> str:
        return f"{self.kernel} D{self.head_dim} {self.dtype} blocks of {self.grain}"


@dataclass(frozen=True)
class Candidate:
    """`sizes`: as in the table. `median_ms`: by case, in their order; `failure` instead where it does not run, or wrongly."""

    sizes: tuple[int, ...]
    is_in_table: bool
    median_ms: tuple[float, ...] = ()
    low_ms: tuple[float, ...] = ()
    high_ms: tuple[float, ...] = ()
    relative_error: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Tuned:
    """`cases`: what was timed; `best`: the sizes with the least geometric mean of the cases' times, None where all failed."""

    setting: Setting
    cases: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    best: tuple[int, ...] | None


@dataclass(frozen=True)
class TuneResults:
    """`shared_memory_bytes`: what one program may use on this GPU."""

    shared_memory_bytes: int
    tuned: tuple[Tuned, ...]


def direction_of(kernel: str) -> str:
    return kernel.removeprefix("gathered_")


def cases_of(setting: Setting, length: int) -> tuple[Case, ...]:
    shape = dict(head_dim=setting.head_dim, dtype=setting.dtype, heads=16, kv_heads=16)
    if setting.kernel == "decode":
        shape |= dict(heads=32, kv_heads=8, query_tokens=1)
        return (Case("sink_window4k", 1, length, **shape), Case("causal", 1, length, **shape))
    case = partial(Case, length_tokens=length, **shape)
    if setting.kernel.startswith("gathered"):
        return (case("random10", 32), case("random10", 16))
    if setting.grain == 128:
        return (case("random25", 128), case("window", 1))
    return (case("random25", 64), case("block_window", 64))


def candidates_of(setting: Setting) -> list[tuple[int, ...]]:
    """Sizes worth trying; those of the table are among them."""
    if setting.kernel == "decode":
        found = list(DECODE)
    elif setting.grain == 128 and not setting.kernel.startswith("gathered"):
        found = [*LARGE, *SMALL]
    else:
        found = [s for s in SMALL if s[:2] == (64, 64)] + [(64, 128, 4, 3), (64, 64, 4, 4)]
        if not setting.kernel.startswith("gathered"):
            found = [s for s in found if s[:2] == (64, 64)]  # no larger than the blocks
    if direction_of(setting.kernel) == "grad_key_value":
        found = [(kv, q, warps, stages) for q, kv, warps, stages in found]
    return list(dict.fromkeys([table_row(setting), *found]))


def facts_of(setting: Setting, device: torch.device, block_size: int) -> tuple[Any, ...]:
    from hf_blocksparse.ops.triton.tile_sizes import backend_of

    element_bytes = DTYPES[setting.dtype].itemsize
    return (*backend_of(device), setting.head_dim, setting.head_dim, element_bytes, block_size)


def table_row(setting: Setting, device: torch.device | None = None) -> tuple[int, ...]:
    """What the table says now."""
    from hf_blocksparse.ops.triton.decode_sizes import decode_sizes
    from hf_blocksparse.ops.triton.tile_sizes import gathered_tile_sizes, tile_sizes

    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if setting.kernel == "decode":
        sizes: Any = decode_sizes(*facts_of(setting, device, 1))
        return sizes.tile_kv, sizes.max_rows, sizes.num_warps, sizes.num_stages
    gathered = setting.kernel.startswith("gathered")
    backend, capability, *rest = facts_of(setting, device, 32 if gathered else setting.grain)
    choose = gathered_tile_sizes if gathered else tile_sizes
    direction = direction_of(setting.kernel)
    sizes = choose(backend, capability, direction, *rest)
    if sizes is None:  # tiles are as small as the blocks there
        sizes = tile_sizes(backend, capability, direction, *rest)
    return sizes.tile_q, sizes.tile_kv, sizes.num_warps, sizes.num_stages


@contextlib.contextmanager
def chosen(setting: Setting, sizes: Sequence[int]) -> Iterator[None]:
    """The kernel of the setting gets these sizes; the others what their tables say."""
    from hf_blocksparse.ops.triton import launch

    names = ("tile_sizes", "gathered_tile_sizes", "narrow_tile_sizes", "decode_sizes")
    as_ever = {name: getattr(launch, name) for name in names}
    gathered = setting.kernel.startswith("gathered")

    def tiles(backend, capability, direction, *rest):  # type: ignore[no-untyped-def]
        if direction != direction_of(setting.kernel) or gathered:
            return as_ever["tile_sizes"](backend, capability, direction, *rest)
        return TileSizes(*sizes)

    def gathered_tiles(backend, capability, direction, *rest):  # type: ignore[no-untyped-def]
        if direction != direction_of(setting.kernel):
            return as_ever["gathered_tile_sizes"](backend, capability, direction, *rest)
        return TileSizes(*sizes, strip=rest[-1]) if gathered else None

    if setting.kernel == "decode":
        launch.decode_sizes = lambda *_: DecodeSizes(64, *sizes)
    else:
        launch.tile_sizes, launch.gathered_tile_sizes = tiles, gathered_tiles
        launch.narrow_tile_sizes = lambda *_: None  # which small blocks would take instead
    try:
        yield
    finally:
        for name, function in as_ever.items():
            setattr(launch, name, function)


class Session:
    """One case: its tensors, and the calls that are timed."""

    def __init__(self, setting: Setting, case: Case, device: torch.device):
        self.setting, self.case, self.device = setting, case, device
        leaves, self.grad_out = make_inputs(case, device)
        self.tensors = tuple(leaf.detach() for leaf in leaves)
        self.problem = self._problem()
        self.exact = exact_answer(case, make_layout(case), self.tensors, self.grad_out)
        with torch.no_grad():
            self.out, self.lse = self._forward()

    def _problem(self) -> Problem:
        specs = [attention.spec_of("tensor", tensor) for tensor in self.tensors]
        return attention.make_problem(
            specs[0], specs[1], make_layout(self.case), is_causal=self.case.is_causal, attn_mask=None,
            key_padding_mask=None, document_ids=None, sequences=None, query_start=None, dropout_p=0.0,
            dropout_seed=None, scale=None, softcap=None, allow_empty_rows=False, portable=True,
        )  # fmt: skip

    def _forward(self, *keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from hf_blocksparse.ops.triton import launch

        start = launch.launch_decode if self.setting.kernel == "decode" else launch.launch_forward
        key, value = keys or self.tensors[1:]
        return start(self.tensors[0], key, value, None, None, self.problem, self.problem.scale)

    def _backward(self) -> tuple[torch.Tensor, ...]:
        from hf_blocksparse.ops.triton import launch

        grads = launch.launch_backward(
            self.grad_out, None, *self.tensors, None, None, self.out, self.lse, self.problem,
            self.problem.scale, (True, True, True, False),
        )  # fmt: skip
        return grads[:3]

    def call(self) -> Any:
        return self._backward() if "grad" in self.setting.kernel else self._forward()

    def error(self) -> float:
        """Of the call, against exact attention; ArithmeticError where that is more than rounding."""
        if "grad" in self.setting.kernel:
            results, names = self._backward(), ("grad_query", "grad_key", "grad_value")
        else:
            results, names = self._forward()[:1], ("out",)
        error = relative_error(
            [heads_of(self.case, self.exact, result) for result in results],
            [getattr(self.exact, name) for name in names],
        )
        if not error <= TOLERANCES[DTYPES[self.case.dtype]]:
            raise ArithmeticError(f"wrong by {error:.2e} of the exact answer")
        return error

    def timer(self) -> Callable[[], float]:
        """Measures one call, in milliseconds; of decoding a replay of many, each on keys of its own, as the CPU needs longer for one."""
        if self.device.type != "cuda":
            return self._seconds
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run, count = self.call, 1
        if self.setting.kernel == "decode":
            count = max(GRAPH_CALLS, FLUSH_BYTES // (2 * self.tensors[1].nbytes))
            keys = [tuple(t.clone() for t in self.tensors[1:]) for _ in range(count)]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outs = [self._forward(*pair) for pair in keys]

            def run() -> Any:
                graph.replay()
                return keys, outs

        def measure() -> float:
            flush.zero_()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / count

        return measure

    def _seconds(self) -> float:
        start = time.perf_counter()
        self.call()
        return 1e3 * (time.perf_counter() - start)


def compile_one(setting: Setting, sizes: tuple[int, ...], device: str) -> None:
    """In a process of its own, for the compiler's cache; what fails here fails again where it is recorded."""
    with contextlib.suppress(Exception):
        for case in cases_of(setting, COMPILE_LENGTH):
            with chosen(setting, sizes):
                Session(setting, case, torch.device(device)).call()


def tune(setting: Setting, arguments: argparse.Namespace) -> Tuned:
    device = torch.device(arguments.device)
    cases = cases_of(setting, arguments.length_tokens)
    sessions = [Session(setting, case, device) for case in cases]
    tried = candidates_of(setting)[: arguments.limit_candidates]
    errors: dict[tuple[int, ...], float] = {}
    failures: dict[tuple[int, ...], str] = {}
    timers: dict[tuple[int, ...], list[Callable[[], float]]] = {}
    for sizes in tried:
        try:
            with chosen(setting, sizes):
                errors[sizes] = max(session.error() for session in sessions)
                timers[sizes] = [session.timer() for session in sessions]
        except Exception as error:  # whatever the compiler raises is the candidate's result
            failures[sizes] = one_line(error)
    times: dict[tuple[tuple[int, ...], int], list[float]] = {}
    order = random.Random(0)
    for number in range(arguments.rounds + 1):
        turns = [(sizes, place) for sizes in timers for place in range(len(cases))]
        order.shuffle(turns)
        for sizes, place in turns:
            with chosen(setting, sizes):
                measured = timers[sizes][place]()
            if number:  # the first round warms up
                times.setdefault((sizes, place), []).append(measured)
    clear_cache()
    found = []
    for sizes in tried:
        facts = sizes, sizes == table_row(setting, device)
        if sizes in failures:
            found.append(Candidate(*facts, failure=failures[sizes]))
            continue
        parts = [sorted(times[sizes, place]) for place in range(len(cases))]
        found.append(
            Candidate(
                *facts,
                tuple(statistics.median(part) for part in parts),
                tuple(part[0] for part in parts),
                tuple(part[-1] for part in parts),
                errors[sizes],
            )
        )
    ran = [candidate for candidate in found if candidate.failure is None]
    best = min(ran, key=lambda c: statistics.geometric_mean(c.median_ms)).sizes if ran else None
    return Tuned(setting, tuple(map(str, cases)), tuple(found), best)


def table(tuned: Sequence[Tuned]) -> str:
    """Every candidate, the best of each setting marked, and beside the table's how much faster that is."""
    lines = []
    for one in tuned:
        lines.append(f"{one.setting}: {' | '.join(one.cases)}")
        mean = {
            c.sizes: statistics.geometric_mean(c.median_ms)
            for c in one.candidates
            if c.failure is None
        }
        for candidate in one.candidates:
            mark = "best" if candidate.sizes == one.best else ""
            where = "table" if candidate.is_in_table else ""
            start = f"  {candidate.sizes!s:<20}{where:<6}{mark:<5}"
            if candidate.failure is not None:
                lines.append(f"{start}failed: {candidate.failure[:90]}")
                continue
            assert one.best is not None
            times = "".join(f"{value:>10.4f}" for value in candidate.median_ms)
            lines.append(f"{start}{times}{mean[candidate.sizes] / mean[one.best]:>8.3f}x the best")
    return "\n".join(lines)


def table_rows(tuned: Sequence[Tuned]) -> str:
    """The best sizes as the tables hold them: by kernel and dtype, head sizes, and grains where there are several."""
    rows: dict[tuple[str, str], dict[int, dict[int, tuple[int, ...]]]] = {}
    for one in tuned:
        if one.best is not None:
            setting = one.setting
            sizes = rows.setdefault((setting.kernel, setting.dtype), {})
            sizes.setdefault(setting.head_dim, {})[setting.grain] = one.best
    lines = []
    for (kernel, dtype), sizes in rows.items():
        lines.append(f"{kernel} {dtype}:")
        for head_dim, by_grain in sizes.items():
            is_in_grains = kernel in DIRECTIONS
            lines.append(f"    {head_dim}: {by_grain if is_in_grains else by_grain[GRAINS[0]]},")
    return "\n".join(lines)


def settings_of(arguments: argparse.Namespace) -> list[Setting]:
    return [
        Setting(kernel, head_dim, dtype, grain)
        for dtype in arguments.dtypes
        for kernel in arguments.kernels
        for head_dim in arguments.head_dims
        for grain in (GRAINS if kernel in DIRECTIONS else GRAINS[:1])
    ]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--length-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--limit-candidates", type=int, help="only the first so many")
    parser.add_argument("--processes", type=int, default=0, help="that compile beforehand")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no kernel later")
    parser.add_argument("--output", type=Path, default=Path("runs/tune.json"))
    parser.add_argument("--resume", action="store_true", help="keep what --output holds already")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds got {arguments.rounds}; it must be at least 1.")
    return arguments


def compile_together(settings: Sequence[Setting], arguments: argparse.Namespace) -> None:
    jobs = [
        (s, sizes) for s in settings for sizes in candidates_of(s)[: arguments.limit_candidates]
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context) as pool:
        futures = [pool.submit(compile_one, *job, arguments.device) for job in jobs]
        for future in tqdm(futures, desc="compiling", unit="candidate"):
            future.result()


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_args(argv)
    device = torch.device(arguments.device)
    environment = describe_environment(device)
    start = time.perf_counter()
    tuned: list[Tuned] = []
    if arguments.resume and arguments.output.exists():
        record = read_record(arguments.output)
        if record.environment.device != environment.device:
            raise SystemExit(
                f"--resume got {arguments.output} of {record.environment.device}; this is {environment.device}; tune into another file."
            )
        tuned = list(from_plain(TuneResults, record.results).tuned)
    known = {one.setting for one in tuned}
    settings = [setting for setting in settings_of(arguments) if setting not in known]
    if arguments.processes:
        compile_together(settings, arguments)
    shared = 0
    if device.type == "cuda":
        shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    for setting in tqdm(settings, desc="kernels", unit="kernel"):
        if time.perf_counter() - start > arguments.seconds:
            break
        tuned.append(tune(setting, arguments))
        tqdm.write(table(tuned[-1:]))
        plain = {k: v.name if isinstance(v, Path) else v for k, v in vars(arguments).items()}
        if plain["seconds"] == float("inf"):
            plain["seconds"] = None
        record = RunRecord(
            version=FORMAT_VERSION,
            script=Path(__file__).name,
            arguments=to_plain(plain),
            seed=0,
            environment=environment,
            timings_seconds={"tuning": time.perf_counter() - start},
            results=to_plain(TuneResults(shared, tuple(tuned))),
        )
        write_record(record, arguments.output)
    print(table_rows(tuned))


if __name__ == "__main__":
    main()
