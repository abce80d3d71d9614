"""Training steps of a small model at short lengths, where the CPU decides: ours beside SDPA, FlexAttention and no attention at all.

    python scripts/short_steps.py
    python scripts/short_steps.py --device cpu --lengths 64 --num-layers 2 --rounds 2 --steps 1

The model is SmolLM2-135M's architecture with random weights (bfloat16 on a GPU). A step is forward, loss and backward of one window,
without an optimizer, which is the same for all. Rounds of steps of each form take turns in one process, each form first in its turn; the
gradient of the input embedding is compared with SDPA's before time is taken.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from attention_cost import no_attention
from patching_overhead import (
    LONGEST_TOKENS,
    VOCAB_SIZE,
    add_model_arguments,
    small_model,
    take_turns,
    time_calls,
    write_results,
)
from sparsify_results import NONE
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM

from hf_blocksparse import Dense, Layout, SinkWindow, SlidingWindow, patch_model
from hf_blocksparse.evaluation import next_token_losses
from hf_blocksparse.run_record import describe_environment

BASE = "sdpa"
# A layout that keeps all is handed over to the model's own attention, unless an implementation is named.
LAYOUTS: dict[str, Layout] = {
    "dense": Dense(),
    "dense_kernels": SlidingWindow(LONGEST_TOKENS),
    "sparse": SinkWindow(sink=64, window=256),
}
FORMS = {
    BASE: "unpatched, SDPA",
    "dense": "patched, Dense()",
    "dense_kernels": "patched, all keys, kernels of this package",
    "sparse": "patched, SinkWindow(sink=64, window=256)",
    "flex_attention": "unpatched, FlexAttention",
    NONE: "without attention",
}
COMPUTES_SDPA = (BASE, "dense", "dense_kernels", "flex_attention")


@dataclass(frozen=True)
class Measurement:
    """One form at one length.

    Attributes:
        form: key of `FORMS`.
        length_tokens: of the window.
        step_seconds: of a step, from its start until the device is done, one number per round.
        thread_seconds: of the CPU in the calling thread, per step, one number per round; autograd's thread is not counted.
        step_ratio: median over the rounds of a round's time to that of SDPA in the same round.
        relative_error: of the gradient of the input embedding, from SDPA's, Frobenius norm; None where another function is computed.
    """

    form: str
    length_tokens: int
    step_seconds: tuple[float, ...]
    thread_seconds: tuple[float, ...]
    step_ratio: float
    relative_error: float | None


@dataclass(frozen=True)
class Results:
    measurements: tuple[Measurement, ...]


def build_models(arguments: argparse.Namespace) -> dict[str, LlamaForCausalLM]:
    model = small_model(arguments, arguments.vocab_size).train()
    AttentionInterface.register(no_attention.__name__, no_attention)
    AttentionMaskInterface.register(no_attention.__name__, lambda *sizes, **options: None)
    models = {form: copy.deepcopy(model) for form in arguments.forms}
    for form, one in models.items():
        if form in LAYOUTS:
            kernels = "triton" if arguments.device == "cuda" else "torch"
            patch_model(one, LAYOUTS[form], impl="auto" if form == "dense" else kernels)
        elif form != BASE:
            one.set_attn_implementation(no_attention.__name__ if form == NONE else form)
        if arguments.gradient_checkpointing:
            one.gradient_checkpointing_enable({"use_reentrant": False})
    return models


def train_step(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Gradient of the input embedding; all gradients are dropped again."""
    next_token_losses(model, tokens).mean().backward()
    gradient = model.get_input_embeddings().weight.grad
    model.zero_grad(set_to_none=True)
    return gradient


def measure_length(
    models: dict[str, LlamaForCausalLM], tokens: Tensor, arguments: argparse.Namespace
) -> list[Measurement]:
    steps: dict[str, Callable[[], Tensor]] = {
        form: partial(train_step, model, tokens) for form, model in models.items()
    }
    expected = steps[BASE]().float()
    errors: dict[str, float | None] = {}
    for form, step in steps.items():
        is_same = form in COMPUTES_SDPA
        found = step().float()
        errors[form] = ((found - expected).norm() / expected.norm()).item() if is_same else None
    # What is done the first times: compiling, indices, recordings.
    for step in steps.values():
        time_calls(step, max(3, arguments.steps), arguments.device)
    seconds = take_turns(
        steps,
        arguments.rounds,
        arguments.steps,
        arguments.device,
        f"rounds of {tokens.shape[1]} tokens",
    )
    base = [step_seconds for step_seconds, _ in seconds[BASE]]
    measurements = []
    for form, pairs in seconds.items():
        step_seconds, thread_seconds = zip(*pairs, strict=True)
        ratios = [one / other for one, other in zip(step_seconds, base, strict=True)]
        measurements.append(
            Measurement(
                form,
                tokens.shape[1],
                step_seconds,
                thread_seconds,
                statistics.median(ratios),
                errors[form],
            )
        )
    return measurements


def measure(arguments: argparse.Namespace) -> Iterator[Results]:
    """Results of the lengths so far, after each."""
    models = build_models(arguments)
    measurements: list[Measurement] = []
    for length in arguments.lengths:
        tokens = torch.randint(0, arguments.vocab_size, (1, length), device=arguments.device)
        measurements += measure_length(models, tokens, arguments)
        yield Results(tuple(measurements))


def table(results: Results) -> str:
    """One line per length and form."""
    lines = [f"{'tokens':>6}  {'':<44}{'ms a step':>11}{'ratio':>8}{'CPU ms':>9}{'error':>10}"]
    for row in results.measurements:
        error = "" if row.relative_error is None else f"{row.relative_error:.1e}"
        lines.append(
            f"{row.length_tokens:>6}  {FORMS[row.form]:<44}{statistics.median(row.step_seconds) * 1e3:>11.2f}{row.step_ratio:>8.3f}"
            f"{statistics.median(row.thread_seconds) * 1e3:>9.2f}{error:>10}"
        )
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--forms", choices=tuple(FORMS), nargs="+", default=list(FORMS))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    add_model_arguments(parser)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=1, help="per form and round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/short_steps.json"))
    arguments = parser.parse_args(argv)
    if BASE not in arguments.forms:
        parser.error(f"--forms got {arguments.forms}; all are compared with {BASE!r}; name it, too")
    if max(arguments.lengths) > LONGEST_TOKENS:
        parser.error(
            f"--lengths got {arguments.lengths}; the model has {LONGEST_TOKENS} positions; stay below"
        )
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_args(argv)
    environment = describe_environment(torch.device(arguments.device))
    start = time.perf_counter()
    # Written after each length, so that a run that is cut short keeps what it has.
    for results in measure(arguments):
        write_results(__file__, arguments, environment, start, results)
    print(table(results))
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
