"""What patching costs where attention is short: the forward of a small model, unpatched, with a dense layout and with a sparse one.

    python scripts/patching_overhead.py
    python scripts/patching_overhead.py --device cpu --hidden-size 64 --num-layers 2 --num-heads 4 --num-kv-heads 2 --rounds 3 --calls 2

The model is SmolLM2-135M's architecture with random weights, in evaluation mode without gradients and without a cache: at 512 tokens a
forward takes a GPU less time than Python takes to start it, so what patching adds there is time on the CPU. Rounds of calls of each form
take turns in one process. Two times are measured: that of a call (from its start until the device is done, over the calls of a round)
and what the calling thread computed meanwhile.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from hf_blocksparse import Dense, SinkWindow, patch_model
from hf_blocksparse.run_record import (
    FORMAT_VERSION,
    Environment,
    RunRecord,
    describe_environment,
    to_plain,
    write_record,
)

FORMS = {
    "sdpa": "unpatched, SDPA",
    "dense": "patched, Dense()",
    "dense_kernels": "patched, Dense(), kernels of this package",
    "sparse": "patched, SinkWindow(sink=64, window=128)",
}


VOCAB_SIZE = 49152
LONGEST_TOKENS = 8192


@dataclass(frozen=True)
class Measurement:
    """One form.

    Attributes:
        form: key of `FORMS`.
        call_seconds: of a forward, one number per round.
        thread_seconds: of the CPU in the calling thread, per forward, one number per round.
        call_ratio, thread_ratio: median over the rounds of a round's time to that of "sdpa" in the same round.
        max_difference: of the logits, from those of "sdpa".
    """

    form: str
    call_seconds: tuple[float, ...]
    thread_seconds: tuple[float, ...]
    call_ratio: float
    thread_ratio: float
    max_difference: float


@dataclass(frozen=True)
class Results:
    measurements: tuple[Measurement, ...]


def small_model(arguments: argparse.Namespace, vocab_size: int = VOCAB_SIZE) -> LlamaForCausalLM:
    """SmolLM2-135M's architecture, or one of the sizes named, with random weights and SDPA."""
    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 8 // 3,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        num_key_value_heads=arguments.num_kv_heads,
        max_position_embeddings=LONGEST_TOKENS,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    return LlamaForCausalLM(config).to(arguments.device, dtype)


def build_models(arguments: argparse.Namespace) -> dict[str, LlamaForCausalLM]:
    model = small_model(arguments).eval()
    models = {form: copy.deepcopy(model) for form in FORMS}
    kernels = "triton" if arguments.device == "cuda" else "torch"
    patch_model(models["dense"], Dense())
    patch_model(models["dense_kernels"], Dense(), impl=kernels)
    patch_model(models["sparse"], SinkWindow(sink=64, window=128))
    return models


def time_calls(call: Callable[[], object], calls: int, device: str) -> tuple[float, float]:
    """Seconds per call, and seconds of this thread's CPU per call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start, thread_start = time.perf_counter(), time.thread_time()
    for _ in range(calls):
        call()
    thread_seconds = time.thread_time() - thread_start
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls, thread_seconds / calls


def take_turns(
    forms: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int,
    device: str,
    description: str = "rounds",
) -> dict[str, list[tuple[float, float]]]:
    """`time_calls` of each form in each round; every form goes first in its turn."""
    seconds: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
    names = list(forms)
    for number in tqdm(range(rounds), desc=description, unit="round"):
        turn = number % len(names)
        for form in names[turn:] + names[:turn]:
            seconds[form].append(time_calls(forms[form], calls, device))
    return seconds


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> Results:
    models = build_models(arguments)
    shape = (arguments.batch_size, arguments.length_tokens)
    tokens = torch.randint(0, VOCAB_SIZE, shape, device=arguments.device)

    def call(model: LlamaForCausalLM) -> torch.Tensor:
        return model(tokens, use_cache=False).logits

    calls = {form: partial(call, model) for form, model in models.items()}
    expected = calls["sdpa"]().float()
    differences = {form: (calls[form]().float() - expected).abs().max().item() for form in FORMS}
    for form in FORMS:
        time_calls(calls[form], arguments.calls, arguments.device)
    seconds = take_turns(calls, arguments.rounds, arguments.calls, arguments.device)
    measurements = []
    for form, pairs in seconds.items():
        ratios = [
            [one / base for one, base in zip(pair, pair_of_sdpa, strict=True)]
            for pair, pair_of_sdpa in zip(pairs, seconds["sdpa"], strict=True)
        ]
        call_seconds, thread_seconds = zip(*pairs, strict=True)
        call_ratio, thread_ratio = map(statistics.median, zip(*ratios, strict=True))
        measurements.append(
            Measurement(
                form, call_seconds, thread_seconds, call_ratio, thread_ratio, differences[form]
            )
        )
    return Results(tuple(measurements))


def table(results: Results) -> str:
    """One line per form."""
    lines = [
        f"{'':<44}{'ms a call':>11}{'ratio':>8}{'CPU ms':>9}{'ratio':>8}{'max difference':>16}"
    ]
    for row in results.measurements:
        lines.append(
            f"{FORMS[row.form]:<44}{statistics.median(row.call_seconds) * 1e3:>11.3f}{row.call_ratio:>8.3f}"
            f"{statistics.median(row.thread_seconds) * 1e3:>9.3f}{row.thread_ratio:>8.3f}{row.max_difference:>16.2e}"
        )
    return "\n".join(lines)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes of `small_model`, SmolLM2-135M's by default."""
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--num-layers", type=int, default=30)
    parser.add_argument("--num-heads", type=int, default=9)
    parser.add_argument("--num-kv-heads", type=int, default=3)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length-tokens", type=int, default=512)
    add_model_arguments(parser)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=10, help="per form and round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/patching_overhead.json"))
    arguments = parser.parse_args(argv)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def write_results(
    script: str,
    arguments: argparse.Namespace,
    environment: Environment,
    start: float,
    results: object,
) -> None:
    """Write the record of a run of `script` that began at `start`, of `time.perf_counter`."""
    record = RunRecord(
        version=FORMAT_VERSION,
        script=Path(script).name,
        arguments={name: value for name, value in vars(arguments).items() if name != "output"},
        seed=arguments.seed,
        environment=environment,
        timings_seconds={"measurements": time.perf_counter() - start},
        results=to_plain(results),
    )
    write_record(record, arguments.output)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_args(argv)
    environment = describe_environment(torch.device(arguments.device))
    start = time.perf_counter()
    results = measure(arguments)
    write_results(__file__, arguments, environment, start, results)
    print(table(results))
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
