"""What a worker of the benchmark does: prepare one implementation on one case, judge it, then time it when it is its turn."""

import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from benchmark_cases import (
    DTYPES,
    TOLERANCES,
    Case,
    Exact,
    count_kept,
    exact_answer,
    exact_index,
    heads_of,
    kept_and_computed,
    make_inputs,
    make_layout,
    relative_error,
)
from benchmark_peers import Implementation, make_implementation
from benchmark_process import one_line
from torch import Tensor

from hf_blocksparse import Layout
from hf_blocksparse.block_index import cached_indices, clear_cache

FLUSH_BYTES = 256 << 20  # more than any L2 cache
WARM_UP = 0.2  # of the timed calls, before them
GRAPH_CALLS = 20  # of a captured graph of a few queries, at least
GRAPHS, CALLS = "graphs", "calls"  # how calls are timed


@dataclass(frozen=True)
class Direction:
    """What is known of one direction before it is timed, by GRAPHS or CALLS; `failure` instead where it does not run, or wrongly."""

    first_call_s: float | None = None
    relative_error: float | None = None
    peak_mib: float | None = None
    tile_efficiency: float | None = None
    index_ms: float | None = None
    launch_us: float | None = None
    estimate_ms: float | None = None
    timed_by: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Prepared:
    """`kept` coefficients over all heads of one batch row, of what this implementation computes or is credited with."""

    kept: int
    density: float
    directions: dict[str, Direction]


class Session:
    """One implementation on one case, in the worker."""

    def __init__(self, name: str, case: Case, device: torch.device):
        self.name, self.device = name, device
        self.case = replace(case, kv_heads=case.heads) if name == "ours_mha" else case
        self.leaves, self.grad_out = make_inputs(self.case, device)
        self.implementation: Implementation | None = None
        self.first_call_s: dict[str, float] = {}
        self.calls: dict[str, Callable[[], Any]] = {}
        self.timing = GRAPHS if device.type == "cuda" else CALLS
        self.calls_at_once = 1
        self.captured: list[tuple[Tensor, Tensor]] = []  # keys and values; a graph knows addresses

    def compile(self) -> None:
        """Make the first call of each direction; `prepare` says what is wrong where they fail."""
        try:
            self.implementation = make_implementation(self.name, self.case, self.device)
            self._move_heads()
            whole = {"forward": self._forward, "backward": self._train}
            for direction in self.case.directions:
                self.first_call_s[direction] = self._seconds(whole[direction])
        except Exception:
            traceback.print_exc()

    def prepare(self, timing: str = GRAPHS) -> Prepared:
        """Build, call, check, and measure everything but time; `timing`: GRAPHS or CALLS."""
        if timing == CALLS:
            self.timing = CALLS
        layout = make_layout(self.case)
        directions: dict[str, Direction] = {}
        try:
            self.leaves, self.grad_out = make_inputs(self.case, self.device)
            if self.implementation is None:
                self.implementation = make_implementation(self.name, self.case, self.device)
            layout = self.implementation.layout or layout
            exact = self._exact()
            self._move_heads()
            self.calls = self._first_calls(exact, directions)
        except Exception as error:  # whatever a peer raises is its result; its log has the trace
            traceback.print_exc()
            for direction in self.case.directions:
                if direction not in directions or directions[direction].failure is None:
                    directions[direction] = Direction(failure=one_line(error))
        # Raises if an error of the GPU has made this process useless.
        kept = count_kept(self.case, layout, self.device)
        return Prepared(kept, kept / self.case.possible, directions)

    def _exact(self) -> Exact | None:
        assert self.implementation is not None
        layout = self.implementation.layout
        if layout is None and self.case.layout in ("causal", "full"):
            layout = make_layout(self.case)
        if layout is None:
            return None
        return exact_answer(self.case, layout, self.leaves, self.grad_out)

    def _move_heads(self) -> None:
        assert self.implementation is not None
        if self.implementation.heads_outside:
            query, key, value = (
                leaf.detach().transpose(1, 2).contiguous().requires_grad_() for leaf in self.leaves
            )
            self.leaves = (query, key, value)
            self.grad_out = self.grad_out.transpose(1, 2).contiguous()

    def _attend(self) -> Tensor:
        assert self.implementation is not None
        return self.implementation.attend(*self.leaves)

    def _forward(self) -> Tensor:
        with torch.no_grad():
            return self._attend()

    def _train(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._attend(), self.leaves, self.grad_out)

    def _check(self, actual: Sequence[Tensor], names: Sequence[str], exact: Exact | None):
        if exact is None:
            return None
        assert self.implementation is not None
        if self.implementation.heads_outside:
            actual = [tensor.transpose(1, 2) for tensor in actual]
        chosen = [heads_of(self.case, exact, tensor) for tensor in actual]
        error = relative_error(chosen, [getattr(exact, name) for name in names])
        if not error <= TOLERANCES[DTYPES[self.case.dtype]]:
            raise ArithmeticError(f"wrong by {error:.2e} of the exact answer ({', '.join(names)})")
        return error

    def _first_calls(
        self, exact: Exact | None, directions: dict[str, Direction]
    ) -> dict[str, Callable[[], Any]]:
        """Fills in `directions`; returns the calls to be timed."""
        start = time.perf_counter()
        out = self._forward()
        self._wait()
        first = self.first_call_s.get("forward", time.perf_counter() - start)
        error = self._check([out], ["out"], exact)
        del out
        directions["forward"] = self._describe(self._forward, "forward", first, error)
        if "backward" in self.case.directions:
            try:
                directions["backward"] = self._first_backward(exact)
            except Exception as failure:
                # A peer without a backward still has a forward.
                traceback.print_exc()
                directions["backward"] = Direction(failure=one_line(failure))
        # Nothing is described from here on: that clears the cache of indices, whose lists the graphs read.
        return self._calls_to_time(directions)

    def _first_backward(self, exact: Exact | None) -> Direction:
        start = time.perf_counter()
        out = self._attend()
        gradients = torch.autograd.grad(out, self.leaves, self.grad_out, retain_graph=True)
        self._wait()
        first = self.first_call_s.get("backward", time.perf_counter() - start)
        names = ("out", "grad_query", "grad_key", "grad_value")
        error = self._check([out, *gradients], names, exact)
        del gradients, out
        return self._describe(self._train, "backward", first, error)

    def _calls_to_time(self, directions: dict[str, Direction]) -> dict[str, Callable[[], Any]]:
        """Of the directions that work. `directions` learns how each is timed, or why one is not after all."""
        if self.case.query_tokens is not None and self.timing == GRAPHS:
            replay = self._capture_many()
            directions["forward"] = replace(
                directions["forward"], estimate_ms=1e3 * self._seconds(replay), timed_by=GRAPHS
            )
            return {"forward": replay}
        calls: dict[str, Callable[[], Any]] = {}
        calls["forward"], timed_by = self._capture_if_possible(self._forward)
        directions["forward"] = replace(directions["forward"], timed_by=timed_by)
        if "backward" in directions and directions["backward"].failure is None:
            try:
                calls["backward"], timed_by = self._backward_alone()
                directions["backward"] = replace(directions["backward"], timed_by=timed_by)
            except Exception as failure:
                traceback.print_exc()
                directions["backward"] = Direction(failure=one_line(failure))
        return calls

    def _backward_alone(self) -> tuple[Callable[[], Any], str]:
        """Again and again on one forward, and how that is timed."""
        if self.timing == GRAPHS:
            # Autograd goes back to the stream of the forward, which therefore is the one that is captured.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                backward = self._backward_of_one_forward()
            replay, timed_by = self._capture_if_possible(backward, stream)
            if timed_by == GRAPHS:
                return replay, GRAPHS
        return self._backward_of_one_forward(), CALLS

    def _backward_of_one_forward(self) -> Callable[[], Any]:
        out = self._attend()

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, self.leaves, self.grad_out, retain_graph=True)

        return backward

    def _capture_if_possible(
        self, call: Callable[[], Any], stream: Any = None
    ) -> tuple[Callable[[], Any], str]:
        """A replay of the call, or the call itself where a graph cannot hold it, and how it is therefore timed."""
        if self.timing == CALLS:
            return call, CALLS
        with torch.cuda.stream(stream):
            answers = call()
            answers = [answers] if isinstance(answers, Tensor) else answers
            expected = [answer.detach().clone() for answer in answers]
        try:
            return self._capture(call, expected, stream), GRAPHS
        except Exception:  # whatever keeps a peer out of a graph; its log has the trace
            traceback.print_exc()
            return call, CALLS

    def _capture(
        self, call: Callable[[], Any], expected: Sequence[Tensor], stream: Any = None
    ) -> Callable[[], Any]:
        """A replay of the call captured in a CUDA graph. ArithmeticError where its answers are not the expected ones."""
        self._wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            answers = call()

        def replay() -> Any:
            graph.replay()
            return answers

        replay()
        found = [answers] if isinstance(answers, Tensor) else answers
        error = max(
            relative_error([answer], [exact.float()])
            for answer, exact in zip(found, expected, strict=True)
        )
        if not error <= TOLERANCES[DTYPES[self.case.dtype]]:
            raise ArithmeticError(f"wrong by {error:.2e} of its own answer in a CUDA graph")
        return replay

    @torch.no_grad()
    def _capture_many(self) -> Callable[[], Any]:
        """A replay of `calls_at_once` forward calls of a few queries.

        Each call has keys and values of its own, and together they read more than any L2 cache holds: as in a model, where other layers
        come in between, a call finds nothing of its cache there.
        """
        assert self.implementation is not None
        attend = self.implementation.attend
        query, key, value = (leaf.detach() for leaf in self.leaves)
        expected = attend(query, key, value)
        layout = self.implementation.layout or make_layout(self.case)
        rows = self.case.heads * self.case.num_queries
        share = count_kept(self.case, layout, self.device) / rows / self.case.length_tokens
        read_bytes = share * (key.nbytes + value.nbytes)
        calls = max(GRAPH_CALLS, math.ceil(FLUSH_BYTES / read_bytes))
        copies = [(key.clone(), value.clone()) for _ in range(calls)]
        replay = self._capture(
            lambda: [attend(query, *copy) for copy in copies], [expected] * calls
        )
        self.captured, self.calls_at_once = copies, calls
        return replay

    def _describe(
        self, call: Callable[[], Any], direction: str, first: float, error: float | None
    ) -> Direction:
        call()
        estimate = self._seconds(call)
        return Direction(
            first_call_s=first,
            relative_error=error,
            peak_mib=self._peak(call),
            tile_efficiency=self._tile_efficiency(direction),
            index_ms=self._index_ms(call) if self.name.startswith("ours") else None,
            launch_us=1e6 * self._issue_seconds(call, estimate),
            estimate_ms=1e3 * estimate,
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _seconds(self, call: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def _issue_seconds(self, call: Callable[[], Any], estimate: float) -> float:
        """CPU time to issue one call while the GPU has enough to do: the median of a few runs of calls without waiting."""
        calls = max(3, min(50, round(0.1 / max(estimate, 1e-6))))
        seconds = []
        for _ in range(3 if estimate < 0.02 else 1):
            self._wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds.append((time.perf_counter() - start) / calls)
            self._wait()
        return statistics.median(seconds)

    def _peak(self, call: Callable[[], Any]) -> float | None:
        if self.device.type != "cuda":
            return None
        self._wait()
        resting = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self._wait()
        return (torch.cuda.max_memory_allocated() - resting) / 2**20

    def _tile_efficiency(self, direction: str) -> float | None:
        """Of ours: over the indices that a call of this direction asks for. The library builds one index per tile shape.

        None for a few queries: their index serves the positions around them, too.
        """
        assert self.implementation is not None
        if self.case.query_tokens is not None:
            return None
        if self.name.startswith("ours"):
            clear_cache()
            if direction == "forward":
                self._forward()
            else:
                out = self._attend()
                clear_cache()
                torch.autograd.grad(out, self.leaves, self.grad_out)
            indices: Sequence = cached_indices()
        elif self.implementation.tile is not None:
            layout: Layout = self.implementation.layout  # type: ignore[assignment]
            indices = [exact_index(self.case, layout, self.implementation.tile, self.device)]
        else:
            return None
        counts = [kept_and_computed(index, self.case.heads) for index in indices]
        computed = sum(computed for _, computed in counts)
        return sum(kept for kept, _ in counts) / computed if computed else None

    def _index_ms(self, call: Callable[[], Any]) -> float:
        """How much longer a call takes when no index is known; the first build is not counted, it loads code."""
        cold, warm = [], []
        for _ in range(4):
            clear_cache()
            cold.append(self._seconds(call))
            warm.append(self._seconds(call))
        return 1e3 * (statistics.median(cold[1:]) - statistics.median(warm[1:]))

    def times(self, direction: str, estimate_ms: float, budget_ms: float) -> list[float]:
        """Milliseconds of each of some calls, about `budget_ms` in all.

        On a GPU between events, with the L2 cache flushed before, and by replays of a CUDA graph where the call could be captured: the
        CPU may need longer to issue a call than the GPU to run it. Of calls of a few queries a graph holds many, and each replay counts
        as its mean call.
        """
        call = self.calls[direction]
        number = max(2, min(1000, round(budget_ms / max(estimate_ms, 1e-3))))
        for _ in range(max(1, round(number * WARM_UP))):
            call()
        if self.device.type != "cuda":
            return [1e3 * self._seconds(call) for _ in range(number)]
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
        for start, end in events:
            flush.zero_()
            start.record()
            call()
            end.record()
        self._wait()
        return [start.elapsed_time(end) / self.calls_at_once for start, end in events]


def serve(connection: Connection, name: str, device_name: str) -> None:
    """Answer `("compile", case)`, `("prepare", case, timing)`, `("times", direction, estimate_ms, budget_ms)` and `("free",)` until the
    caller hangs up. A case may be compiled before it is prepared."""
    device = torch.device(device_name)
    session: Session | None = None
    while True:
        try:
            kind, *arguments = connection.recv()
        except EOFError:
            return
        try:
            value: Any = None
            if kind == "compile":
                session = Session(name, *arguments, device)
                session.compile()
            elif kind == "prepare":
                case, timing = arguments
                if session is None:
                    session = Session(name, case, device)
                value = session.prepare(timing)
            elif kind == "times":
                assert session is not None
                value = session.times(*arguments)
            else:
                session = None
                clear_cache()
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        except Exception as error:
            traceback.print_exc()
            connection.send((False, one_line(error)))
        else:
            connection.send((True, value))
