"""Random calls of the kernels against dense attention in float64, thousands of them.

    python tests/stress_kernels.py --processes 14 --seconds 100 --output runs/stress_kernels.json
    python tests/stress_kernels.py --device cpu --families 3 --cases 6

Layouts, lengths, groups of heads, masks, documents, padding, dtypes, head sizes and every option, in forward and backward: output,
log-sum-exp and all gradients, by the rule in `numerics.deviations`. With `auto` the kernels for Hopper take what they can (on such a GPU),
with `triton` the portable ones run alone. A call follows from the implementation and its number: what a miss prints makes it again.

Of four calls one is made once, one twice, one three and one four times, the last being compared: repeated calls are issued in another
way.

A family fixes what kernels are compiled for, and a process takes whole families, so that compiling does not take all the time. On a CPU
kernels run in Triton's interpreter, which knows no bfloat16: those families are float16 there.
"""

import argparse
import multiprocessing
import os
import queue
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import poison_memory
from scenarios import Scenario, check
from tqdm import tqdm

from hf_blocksparse import (
    BigBird,
    BlockDiagonal,
    Dense,
    Layout,
    Longformer,
    PerHead,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
)
from hf_blocksparse.block_index import clear_cache
from hf_blocksparse.run_record import (
    FORMAT_VERSION,
    RunRecord,
    describe_environment,
    to_plain,
    write_record,
)

# A family has lengths of one kind: kernels are compiled apart for strides that are multiples of 16, and for lists of one tile.
LENGTHS = ((129, 200, 257, 300, 385, 500, 641, 900), (192, 320, 512, 896), (17, 63, 65, 100, 127))
FEW_QUERIES = (1, 3, 33)
LONGEST = 900
GRACE_S = 60.0  # for the case that is running at the end of the time, with compiling
OF_FORWARD = ("out", "lse")


@dataclass(frozen=True)
class Family:
    """What kernels are compiled for. `grain`: of the layouts, in tokens; `per_head`: whether heads have layouts of their own.

    Families of float32 have nothing that SDPA has not, and are compared with SDPA itself: torch's separate functions, of which a
    written-out formula is made, take more exact exponentials than any fused kernel.
    """

    dtype: str
    head_dim: int
    heads: int
    kv_heads: int
    grain: int = 1
    value_dim: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: Any = None
    dropout_p: float = 0.0
    scale: float | None = None
    per_head: bool = False


FAMILIES = {
    "auto": (
        Family("bfloat16", 128, 4, 4),
        Family("bfloat16", 64, 9, 3, per_head=True),
        Family("float16", 64, 4, 1, 128),
        Family("bfloat16", 128, 8, 2, 128, per_head=True),
        Family("float16", 128, 2, 2, 64, per_head=True),
        Family("bfloat16", 96, 4, 2),
        Family("float16", 40, 2, 1),
        Family("bfloat16", 64, 6, 2, 64),
        Family("bfloat16", 80, 3, 3, 32, per_head=True),
        Family("float16", 112, 4, 1, 128, scale=0.5),
        Family("bfloat16", 128, 4, 1, 16),
        Family("float16", 128, 4, 2, per_head=True),
    ),
    "triton": (
        Family("bfloat16", 128, 4, 4, per_head=True),
        Family("float32", 64, 4, 2),
        Family("float16", 64, 4, 1, 128, sinks=True),
        Family("bfloat16", 64, 4, 2, 16, per_head=True),
        Family("float16", 128, 2, 2, 32, softcap=2.0),
        Family("bfloat16", 80, 6, 2, 64, value_dim=64, per_head=True),
        Family("bfloat16", 64, 4, 2, dropout_p=0.6, sinks=True, softcap=3.0, alibi="by head"),
        Family("float16", 40, 3, 3, value_dim=24, dropout_p=0.3, per_head=True),
        Family("float32", 16, 2, 1, 16, per_head=True),
        Family("bfloat16", 256, 2, 1, softcap=5.0),
        Family("float16", 96, 4, 4, alibi="by batch row and head", scale=-0.2, per_head=True),
        Family("float32", 128, 2, 2, 64),
    ),
}


def draw_layout(choose: random.Random, family: Family, longest: int) -> Layout:
    if family.grain == 1:
        window = choose.choice((1, 7, 64, 100, 129, 300))
        simple = [
            Dense(),
            SlidingWindow(window),
            SinkWindow(choose.choice((1, 4, 64, 130)), window),
            Longformer(max(2, window), choose.choice((0, 5, 70))),
            BlockDiagonal(choose.choice((50, 128))),
        ]
        if family.per_head:
            return PerHead(tuple(choose.choice(simple) for _ in range(family.heads)))
        return choose.choice(simple)
    blocks = -(-longest // family.grain)
    generator = torch.Generator().manual_seed(choose.getrandbits(30))
    heads = family.heads if family.per_head else 1
    kept = torch.rand(heads, blocks, blocks, generator=generator) < choose.choice((0.02, 0.2, 0.6))
    return choose.choice(
        (
            TensorLayout.from_tensor(kept, family.grain),
            TensorLayout.from_tensor(kept, family.grain) | SlidingWindow(family.grain),
            BigBird(family.grain, random_blocks=3 if family.per_head else 0),
        )
    )


def draw_runs(choose: random.Random, batch: int, length: int, is_padding: bool) -> tuple:
    """Sequences `(batch row, start, end)`: one a row with padding at its ends, or several packed ones."""
    runs = []
    for row in range(batch):
        count = 2 if is_padding else choose.randint(2, 6)
        cuts = sorted(choose.sample(range(length + 1), min(count, length + 1)))
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            if is_padding or choose.random() < 0.8:
                runs.append((row, start, end))
    return tuple(runs)


def draw(implementation: str, number: int, num_families: int, longest: int) -> Scenario:
    """Call `number`; those that leave the same remainder by `num_families` are of one family."""
    place = number % num_families
    family = FAMILIES[implementation][place]
    lengths = [n for n in LENGTHS[place % len(LENGTHS)] if n <= longest] or [longest]
    choose = random.Random(f"{implementation} {number}")
    batch = 1 + place % 2
    kv_len = choose.choice(lengths)
    query_len, runs, is_padding = kv_len, None, False
    kind = choose.random()
    if kind < 0.2:
        query_len = min(kv_len, FEW_QUERIES[place // 2 % len(FEW_QUERIES)])
    elif kind < 0.3:
        query_len = choose.choice(lengths[: 1 + lengths.index(kv_len)])
    elif kind < 0.6:
        is_padding = kind < 0.4
        runs = draw_runs(choose, batch, kv_len, is_padding) or None
    return Scenario(
        draw_layout(choose, family, kv_len),
        query_len,
        kv_len,
        is_causal=choose.random() < 0.6,
        batch=batch,
        heads=family.heads,
        kv_heads=family.kv_heads,
        head_dim=family.head_dim,
        value_dim=family.value_dim,
        dtype=getattr(torch, family.dtype),
        scale=family.scale,
        softcap=family.softcap,
        sinks=family.sinks,
        alibi=family.alibi,
        dropout_p=family.dropout_p,
        grad_lse=family.dtype != "float32" and choose.random() < 0.5,
        mask_density=choose.choice((0.05, 0.5, 0.95)) if choose.random() < 0.1 else None,
        padding=is_padding and runs is not None,
        runs=runs,
        rows_outside_heads=place % 4 != 0,
        seed=number,
    )


@dataclass(frozen=True)
class KernelResults:
    """Of one kernel: how many calls it took part in, and the largest error / bound among the results of its direction."""

    cases: int
    worst_ratio: float
    worst_case: int
    worst_result: str


@dataclass(frozen=True)
class Miss:
    implementation: str
    number: int
    message: str
    command: str


@dataclass(frozen=True)
class StressResults:
    """`cases`: by implementation; `kernels`: by implementation and kernel."""

    cases: dict[str, int]
    kernels: dict[str, KernelResults]
    misses: tuple[Miss, ...]


@dataclass
class Launches:
    """Names of the kernels launched by the running case, by direction."""

    forward: set[str] = field(default_factory=set)
    backward: set[str] = field(default_factory=set)
    is_backward: bool = False

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        from hf_blocksparse.ops import triton as triton_ops
        from hf_blocksparse.ops.triton import launch

        launch_as_ever, backward_as_ever = launch.launch, triton_ops._run_backward

        def launch_and_note(kernel, *arguments, **options):
            names = self.backward if self.is_backward else self.forward
            names.add(f"{kernel.fn.__module__.split('.')[2]} {kernel.fn.__name__}")
            return launch_as_ever(kernel, *arguments, **options)

        def run_backward(*arguments):
            self.is_backward = True
            try:
                return backward_as_ever(*arguments)
            finally:
                self.is_backward = False

        patch.setattr(launch, "launch", launch_and_note)
        patch.setattr(triton_ops, "_run_backward", run_backward)


def numbers_of(process: int, arguments: argparse.Namespace):
    """The calls of one process, `(implementation, number)`, in turns through its families."""
    for number in range(arguments.first, arguments.first + arguments.cases):
        for place, implementation in enumerate(arguments.implementations):
            family = number % arguments.families
            if (place * arguments.families + family) % arguments.processes == process:
                yield implementation, number


def work(process: int, arguments: argparse.Namespace, deadline: float, answers: Any) -> None:
    """Run this process's share; `answers` gets (process, "start", implementation, number) and the outcome of each."""
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        poison_memory(patch)
        for implementation, number in numbers_of(process, arguments):
            if time.time() > deadline:
                break
            answers.put((process, "start", implementation, number))
            scenario = draw(implementation, number, arguments.families, arguments.longest)
            if arguments.device == "cpu" and scenario.dtype == torch.bfloat16:
                scenario = replace(scenario, dtype=torch.float16)
            launches = Launches()
            with patch.context() as watching:
                launches.watch(watching)
                try:
                    # On a CPU "auto" would be the torch path.
                    named = "triton" if arguments.device == "cpu" else implementation
                    calls = 1 + number // arguments.families % arguments.calls
                    found = check(scenario, arguments.device, named, calls=calls)
                    ratios = {name: deviation.ratio for name, deviation in found.items()}
                    outcome: Any = (ratios, launches.forward, launches.backward)
                except Exception as error:
                    outcome = f"{type(error).__name__}: {error} in {scenario}"
                    traceback.print_exc()
            answers.put((process, "done", implementation, number, outcome))
            clear_cache()
    answers.put((process, "end"))


class Tally:
    """Outcomes as they come in."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.cases = dict.fromkeys(arguments.implementations, 0)
        self.count: Counter[str] = Counter()
        self.worst: dict[str, tuple[float, int, str]] = {}
        self.misses: list[Miss] = []

    def add(self, implementation: str, number: int, outcome: Any) -> None:
        self.cases[implementation] += 1
        if isinstance(outcome, str):
            self.miss(implementation, number, outcome)
            return
        ratios, forward, backward = outcome
        for names, is_forward in ((forward, True), (backward, False)):
            mine = {n: ratio for n, ratio in ratios.items() if (n in OF_FORWARD) == is_forward}
            result = max(mine, key=lambda name: mine[name])
            for name in names:
                key = f"{implementation}: {name}"
                self.count[key] += 1
                if key not in self.worst or mine[result] > self.worst[key][0]:
                    self.worst[key] = (mine[result], number, result)

    def miss(self, implementation: str, number: int, message: str) -> None:
        most = len(FAMILIES["auto"])
        options = {"families": most, "longest": LONGEST, "device": "cuda", "calls": 4}
        chosen = [f"--{k} {v}" for k in options if (v := getattr(self.arguments, k)) != options[k]]
        command = (
            f"python tests/stress_kernels.py --implementations {implementation} --first {number} "
            + " ".join(["--cases 1", *chosen])
        )
        self.misses.append(Miss(implementation, number, message, command))
        tqdm.write(f"MISS: {command}\n    {message}")

    def results(self) -> StressResults:
        kernels = {
            key: KernelResults(self.count[key], *self.worst[key]) for key in sorted(self.count)
        }
        return StressResults(self.cases, kernels, tuple(self.misses))


def run(arguments: argparse.Namespace) -> StressResults:
    """All processes, to the end of their calls or of the time."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    deadline = time.time() + arguments.seconds
    processes = [
        context.Process(target=work, args=(number, arguments, deadline, answers), daemon=True)
        for number in range(arguments.processes)
    ]
    for process in processes:
        process.start()
    tally = Tally(arguments)
    running: dict[int, tuple[str, int] | None] = dict.fromkeys(range(len(processes)))
    total = arguments.cases * len(arguments.implementations)
    with tqdm(total=total, unit="call", mininterval=2.0) as bar:
        while running:
            try:
                number, kind, *rest = answers.get(timeout=1.0)
            except queue.Empty:
                number, kind, rest = -1, "", []
            if kind == "start":
                running[number] = (rest[0], rest[1])
            elif kind == "done":
                tally.add(*rest)
                running[number] = None
                bar.update()
            elif kind == "end":
                del running[number]
            elif time.time() > deadline + GRACE_S:
                for number, case in running.items():
                    processes[number].kill()
                    if case is not None:
                        tally.miss(*case, f"no answer {GRACE_S:.0f} s after the end of the time")
                running = {}
            else:
                for number in [n for n in running if not processes[n].is_alive()]:
                    # What it said before it ended may still be under way.
                    if answers.empty():
                        case, code = running.pop(number), processes[number].exitcode
                        if case is not None:
                            tally.miss(*case, f"the process ended with exit code {code}")
    return tally.results()


def table(results: StressResults) -> str:
    header = f"{'kernel':<44}{'calls':>7}{'worst error / bound':>21}  of"
    lines = [header, "-" * len(header)]
    for name, kernel in results.kernels.items():
        lines.append(
            f"{name:<44}{kernel.cases:>7}{kernel.worst_ratio:>21.3f}  {kernel.worst_result}, call {kernel.worst_case}"
        )
    calls = ", ".join(f"{count} with {name}" for name, count in results.cases.items())
    return "\n".join([*lines, f"calls: {calls}; misses: {len(results.misses)}"])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--implementations", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES)
    )
    most = len(FAMILIES["auto"])
    parser.add_argument("--families", type=int, default=most, help="the first so many of each")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--cases", type=int, default=100_000, help="calls of each implementation")
    parser.add_argument(
        "--calls", type=int, default=4, help="of the same, at most; the last counts"
    )
    parser.add_argument("--seconds", type=float, default=100.0, help="begin no call later")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--longest", type=int, default=LONGEST, help="in tokens")
    parser.add_argument("--output", type=Path, help="the record of the run")
    arguments = parser.parse_args(argv)
    for name, most_allowed in (
        ("families", most),
        ("cases", None),
        ("processes", None),
        ("calls", None),
    ):
        value = getattr(arguments, name)
        if value < 1 or (most_allowed is not None and value > most_allowed):
            allowed = "at least 1" + (f" and at most {most_allowed}" if most_allowed else "")
            parser.error(f"--{name} got {value}; it must be {allowed}.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The number of misses."""
    arguments = parse_args(argv)
    start = time.perf_counter()
    environment = describe_environment(torch.device(arguments.device))
    results = run(arguments)
    print(table(results))
    if arguments.output is not None:
        plain = {k: v.name if isinstance(v, Path) else v for k, v in vars(arguments).items()}
        record = RunRecord(
            version=FORMAT_VERSION,
            script=Path(__file__).name,
            arguments=to_plain(plain),
            seed=arguments.first,
            environment=environment,
            timings_seconds={"stress": time.perf_counter() - start},
            results=to_plain(results),
        )
        write_record(record, arguments.output)
    return len(results.misses)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
