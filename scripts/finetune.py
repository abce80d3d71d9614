"""Fine-tune a pretrained causal model with a block-sparse layout at a long context, and prove the result.

    python scripts/finetune.py scripts/recipes/smollm2-32k-sink-window.json --output_dir runs/smollm2-32k
    python scripts/finetune.py --output_dir runs/small --context_tokens 512 --windows 1 --max_steps 2 \\
        --layout sink_window:sink=16,window=112 --compare dense window --cost_repetitions 1   # on a CPU
    accelerate launch --config_file scripts/accelerate/fsdp2.yaml scripts/finetune.py RECIPE ...
    accelerate launch --config_file scripts/accelerate/zero3.yaml scripts/finetune.py RECIPE ... \\
        --sequence_parallel_size 2                                # one sequence on two GPUs

Trains with the Trainer of transformers, whose arguments are taken, too, then measures by the protocol of
protocol.py: the pretrained and the trained weights, with dense attention, with the layout, with a plain
sliding window of the same budget and with dense attention cut to short contexts, on the same held-out
tokens; repeat probe, needle recall; time and memory beside dense attention. `--compare dense window`
trains these alike: the same windows in the same order, the same steps and seed. A first argument that
ends in .json holds arguments; later ones win.

Writes trained models to `OUTPUT_DIR/{layout,dense,window}/model`, and record, figures and card to
`model_cards/NAME`. An interrupted run goes on with `--resume`, from its last checkpoint, to the same
weights; so does one that was stopped while it measured.
"""

import copy
import gc
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedSequenceParallelConfig
from chunked_loss import use_chunked_loss
from corpus import JOINED, ONE_DOCUMENT, SEPARATE, Windows, cut_windows
from evaluate import (
    PROBE,
    REPOSITORY,
    check_context,
    check_costs,
    check_folder,
    check_is_causal,
    check_name,
    find_source,
    own_layout,
    publish,
    read_text,
    recorded_arguments,
    text_facts,
)
from evaluation_results import (
    DENSE,
    PRETRAINED,
    SAME_BUDGET,
    AttentionFacts,
    EvaluationResults,
    LengthCost,
    TrainingRun,
)
from evaluation_results import LAYOUT as LAYOUT_ROLE
from help_text import HelpFormatter
from layout_argument import LAYOUT_HELP, read_layout
from pretrained import load_model, load_tokenizer
from protocol import (
    Measurements,
    ModelArguments,
    Phases,
    ProtocolArguments,
    TextArguments,
    attentions_side_by_side,
    model_facts,
    publish_around_costs,
    set_attention,
)
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ProgressCallback
from transformers.utils import is_liger_kernel_available

from hf_blocksparse import Layout, norm_and_embedding_options
from hf_blocksparse.evaluation import peak_memory
from hf_blocksparse.run_record import describe_environment, from_plain, to_plain

# What is trained, and the folder of each in the output.
LAYOUT, WINDOW = "layout", "window"
DEFAULT_LAYOUT = "sink_window:sink=64,window=960"
MANIFEST, FINISHED = "run.json", "training.json"
GIB = 2**30

# Of the Trainer's arguments, those that decide the result; kept in the record.
DECISIVE = (
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_kwargs",
    "optim_args",
    "neftune_noise_alpha",
    "bf16",
    "seed",
    "use_liger_kernel",
)


@dataclass
class FinetuneArguments:
    """What is trained, how its text is laid out, and what becomes of it."""

    layout: str | None = field(
        default=None,
        metadata={"help": f"{LAYOUT_HELP}; default: the model's own, or {DEFAULT_LAYOUT}"},
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "also trained, alike: dense, window", "choices": [DENSE, WINDOW]},
    )
    packing: str = field(
        default=ONE_DOCUMENT,
        metadata={
            "help": "how training windows are filled: one document each; documents joined; documents joined "
            "but each read alone",
            "choices": [ONE_DOCUMENT, JOINED, SEPARATE],
        },
    )
    loss_chunk_tokens: int = field(
        default=1024,
        metadata={"help": "positions whose logits exist at once; 0: the model's own loss, on all"},
    )
    lora_rank: int = field(default=0, metadata={"help": "rank of LoRA; 0: all weights are trained"})
    lora_alpha: float | None = field(default=None, metadata={"help": "default: twice the rank"})
    lora_dropout: float = field(default=0.0)
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        metadata={"help": "names of linear modules, or all-linear"},
    )
    lora_norms_and_embeddings: bool = field(
        default=False,
        metadata={"help": "with LoRA: these are trained in full (LongLoRA, arXiv 2309.12307)"},
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={"help": "processes that share each window, under DeepSpeed; divides the heads"},
    )
    resume: bool = field(default=False, metadata={"help": "go on with the run in output_dir"})
    measure: bool = field(default=True, metadata={"help": "measure after training"})
    name: str | None = field(
        default=None, metadata={"help": "of the result; default: output_dir's"}
    )
    cards: str = field(
        default=str(REPOSITORY / "model_cards"), metadata={"help": "folder of results"}
    )
    figures: bool = field(
        default=True, metadata={"help": "draw the figures; False leaves them to plot.py"}
    )


@dataclass
class TrainerArguments(TrainingArguments):
    """The Trainer's arguments, with other defaults."""

    max_steps: int = field(default=200, metadata={"help": "optimizer steps"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "windows on a device"})
    learning_rate: float = field(default=1e-4, metadata={"help": "highest learning rate"})
    warmup_steps: float = field(default=10, metadata={"help": "steps of linear warm-up"})
    logging_steps: float = field(default=1, metadata={"help": "steps between two logged losses"})
    save_steps: float = field(default=100, metadata={"help": "steps between two checkpoints"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints kept"})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "recompute activations"})

    @property
    def n_gpu(self) -> int:
        """A process trains on one GPU; with all that it sees, the Trainer would give each a window and count one."""
        return min(super().n_gpu, 1)


def read_object(name: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file that the argument `name` led to."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} got {path}, which cannot be read ({error}); it must be a file with a JSON object; correct or mend it."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{name} got {path}, which holds a {type(found).__name__}; it must hold a JSON object, of names and values; correct or mend it."
        )
    return found


def parse_arguments(
    argv: Sequence[str],
) -> tuple[ModelArguments, TextArguments, ProtocolArguments, FinetuneArguments, TrainerArguments]:
    """From the command line; a first argument that ends in .json names a file of arguments."""
    argv = list(argv)
    if argv and argv[0].endswith(".json"):
        recipe = read_object("recipe", Path(argv[0]))
        words: list[str] = []
        for name, value in recipe.items():
            words.append(f"--{name}")
            words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
        argv = words + argv[1:]
    parser = HfArgumentParser(
        (ModelArguments, TextArguments, ProtocolArguments, FinetuneArguments, TrainerArguments),
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    return parser.parse_args_into_dataclasses(argv)


def check_training(training: TrainerArguments) -> None:
    """Refuse what the Trainer would take, or find out about when it has begun."""
    counts = ("per_device_train_batch_size", "gradient_accumulation_steps")
    for key in counts:
        if getattr(training, key) < 1:
            raise ValueError(
                f"{key} got {getattr(training, key)}; it must be at least 1; raise it."
            )
    ranges: dict[str, tuple[bool, str]] = {
        "learning_rate": (0 < training.learning_rate < math.inf, "a number above 0"),
        "weight_decay": (0 <= training.weight_decay < math.inf, "0 or more"),
        "max_grad_norm": (0 <= training.max_grad_norm, "0, which clips nothing, or more"),
        "adam_beta1": (0 <= training.adam_beta1 < 1, "from 0 to below 1"),
        "adam_beta2": (0 <= training.adam_beta2 < 1, "from 0 to below 1"),
        "adam_epsilon": (0 < training.adam_epsilon < math.inf, "above 0"),
        "seed": (0 <= training.seed < 2**32, "from 0 to below 2 ** 32"),
    }
    for key, (fits, rule) in ranges.items():
        if not fits:
            raise ValueError(f"{key} got {getattr(training, key)}; it must be {rule}; change it.")
    unfit = {
        "auto_find_batch_size": "the windows of a step are counted, and cut, beforehand",
        "label_smoothing_factor": "losses are those of the text, before and after",
        "load_best_model_at_end": "nothing is measured while it trains, so no step is known to be best",
        "fp16": "results are measured in float32 or bfloat16",
    }
    for key, reason in unfit.items():
        if getattr(training, key):
            raise ValueError(f"{key} got {getattr(training, key)}; {reason}; leave it out.")
    if training.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy got {training.eval_strategy}; measuring comes after training, on all rows "
            "alike; leave it out."
        )
    if training.save_strategy == "best":
        raise ValueError(
            "save_strategy got best; nothing is measured while it trains, so no step is known to be best; give steps."
        )


def check_arguments(arguments: FinetuneArguments, training: TrainerArguments) -> None:
    """What can be told before anything is loaded."""
    if training.output_dir is None:
        raise ValueError(
            "output_dir got nothing; checkpoints and models must go somewhere; give --output_dir."
        )
    if training.max_steps < 1:
        raise ValueError(
            f"max_steps got {training.max_steps}; every row is trained for that many steps, so it must be "
            "1 or more; give --max_steps."
        )
    check_training(training)
    if training.resume_from_checkpoint:
        raise ValueError(
            f"resume_from_checkpoint got {training.resume_from_checkpoint!r}; a run has checkpoints of "
            "each attention it trains, and goes on from its own; give --resume instead."
        )
    if training.use_liger_kernel and arguments.loss_chunk_tokens:
        raise ValueError(
            f"use_liger_kernel got True with loss_chunk_tokens {arguments.loss_chunk_tokens}; only one of "
            "them can compute the loss; give --loss_chunk_tokens 0."
        )
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError(
            "use_liger_kernel got True, but the package liger-kernel is not installed; it computes the loss; run: pip install liger-kernel"
        )
    if arguments.loss_chunk_tokens < 0 or arguments.lora_rank < 0:
        raise ValueError(
            f"loss_chunk_tokens and lora_rank got {arguments.loss_chunk_tokens} and {arguments.lora_rank}; both must be 0, which does "
            "without, or more; raise them."
        )
    plain = FinetuneArguments()
    for key in ("lora_norms_and_embeddings", "lora_alpha", "lora_dropout", "lora_targets"):
        if getattr(arguments, key) != getattr(plain, key) and not arguments.lora_rank:
            raise ValueError(
                f"{key} got {getattr(arguments, key)} without LoRA, where all weights are trained; it needs a "
                "rank; give --lora_rank or leave it out."
            )
    if not 0 <= arguments.lora_dropout < 1:
        raise ValueError(
            f"lora_dropout got {arguments.lora_dropout}; it must be from 0 to below 1; change it."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and training.device.type == "cpu":
        raise ValueError(
            "distributed_type got FSDP on a cpu; accelerate shards weights over GPUs alone, and would give every process the whole "
            "model; launch with --config_file scripts/accelerate/ddp.yaml or zero3.yaml."
        )
    folder = Path(training.output_dir)
    check_folder("output_dir", folder)
    check_folder("cards", Path(arguments.cards))
    if arguments.resume and not (folder / MANIFEST).exists():
        raise ValueError(
            f"resume got {folder}, which holds no {MANIFEST}; only a run of this script can go on; leave "
            "--resume out to start one."
        )
    found = [path for path in folder.glob("*") if not path.name.startswith(PROBE)]
    if not arguments.resume and found:
        raise ValueError(
            f"output_dir got {folder}, which is not empty; a new run needs a folder of its own; give "
            "another, or --resume to go on with the run in it."
        )


def share_sequences(
    arguments: FinetuneArguments, training: TrainerArguments, context_tokens: int
) -> None:
    """Have every window split over `sequence_parallel_size` processes by DeepSpeed's Ulysses."""
    size = arguments.sequence_parallel_size
    if size == 1:
        return
    if training.deepspeed_plugin is None or size < 1 or training.world_size % size:
        raise ValueError(
            f"sequence_parallel_size got {size} with {training.world_size} processes "
            f"{'without' if training.deepspeed_plugin is None else 'of'} DeepSpeed; it needs DeepSpeed, and "
            "must divide their number; launch with --config_file scripts/accelerate/zero3.yaml."
        )
    if context_tokens % size:
        raise ValueError(
            f"context_tokens got {context_tokens}, which {size} processes cannot share evenly; it must be a "
            f"multiple of sequence_parallel_size; give {context_tokens // size * size}."
        )
    if arguments.compare:
        raise ValueError(
            f"compare got {arguments.compare} with sequence_parallel_size {size}; DeepSpeed shares the "
            "sequences of one model in a process; leave it out, and train the others in runs of their own."
        )
    import deepspeed

    deepspeed.init_distributed()  # accelerate has done so, but on GPUs alone
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True)
    # Its constructor knows the names of transformers' own attention alone.
    handler.sp_attn_implementation = "block_sparse"
    training.parallelism_config = ParallelismConfig(
        sp_size=size, dp_replicate_size=training.world_size // size, sp_handler=handler
    )


def check_space(
    folder: Path,
    *,
    parameters: int,
    trained: int,
    num_runs: int,
    checkpoints: int,
    deepspeed: bool = False,
) -> None:
    """Refuse a disk without room for the models and for the checkpoints of the run in progress.

    Weights are float32; a checkpoint also holds AdamW's two moments, and DeepSpeed's the weights a second
    time. Runs that are finished keep their `checkpoints`.
    """
    weights = parameters if trained == parameters else trained
    checkpoint = 4 * weights + (12 if deepspeed else 8) * trained
    needed = num_runs * (4 * parameters + checkpoints * checkpoint)
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"output_dir got {folder}, whose disk has {free / GIB:.2f} GiB free; the models and checkpoints "
            f"of this run need up to {needed / GIB:.2f} GiB; free some, train fewer rows, or give another "
            "folder."
        )


def count_checkpoints(training: TrainerArguments) -> int:
    """The most that lie on the disk at once: one more is written before an old one goes."""
    if training.save_strategy == "no":
        return 0
    steps = training.save_steps if training.save_strategy == "steps" else training.max_steps
    steps = max(1, math.ceil(steps * training.max_steps)) if 0 < steps < 1 else steps
    written = math.ceil(training.max_steps / steps) if steps > 0 else 1
    limit = training.save_total_limit
    return written if limit is None or limit < 1 else min(written, limit + 1)


def check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse to go on with a run that was made otherwise."""

    def flat(values: dict[str, Any]) -> dict[str, Any]:
        groups = {key: values.get(key, {}) for key in ("lora", "trainer")}
        return {**values, **groups["lora"], **groups["trainer"], **dict.fromkeys(groups)}

    before, manifest = flat(read_object("resume", path)), flat(manifest)
    changed = [
        f"{key} {manifest.get(key)!r} (there: {before.get(key)!r})"
        for key in sorted(before.keys() | manifest.keys())
        if before.get(key) != manifest.get(key)
    ]
    if changed:
        raise ValueError(
            f"resume got {path.parent} with {'; '.join(changed)}; its checkpoints must come from a run with "
            "equal arguments; give those, or another output_dir for a new run."
        )


@torch.no_grad()
def check_documents_are_separate(model: PreTrainedModel) -> None:
    """Raise where a token reads another document, although positions begin anew: some models tell nobody, or have layers that carry on."""
    tokens, positions = torch.arange(3, 11)[None], torch.arange(8)[None] % 4
    others = tokens.flip(1).where(torch.arange(8) < 4, tokens)
    logits = [
        model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
        for ids in (tokens, others)
    ]
    changed, kept = (logits[0] - logits[1]).abs().amax(1).split(4)
    if kept.max() > 1e-3 * changed.max():
        raise ValueError(
            f"packing got 'separate' for a {type(model).__name__}, in which a token reads other documents of its window, too: it does not "
            "tell its attention where positions begin anew, or has layers that carry on; use 'one-document' or 'joined', or another model."
        )


def check_is_sparse(name: str, density: float, context_tokens: int) -> None:
    """Refuse a layout that drops nothing at the context."""
    if density == 1:
        raise ValueError(
            f"layout got {name}, which keeps all there is within {context_tokens} tokens; there is nothing to gain or to compare; give "
            "a narrower one, or a longer context."
        )


class WindowDataset(Dataset):
    """Training windows with labels: the first token of a document has nothing to be predicted from.

    Positions are given where documents are separate, or where the processes that share a window need them.
    """

    def __init__(self, windows: Windows, *, with_positions: bool = False):
        self.windows = windows
        self.with_positions = with_positions

    def __len__(self) -> int:
        return len(self.windows.tokens)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens = self.windows.tokens[number]
        labels = tokens.clone()
        labels[0] = -100
        if self.windows.positions is not None:
            positions = self.windows.positions[number]
        elif self.with_positions:
            positions = torch.arange(len(tokens))
        else:
            return {"input_ids": tokens, "labels": labels}
        labels[positions == 0] = -100
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}


class StepClock(TrainerCallback):
    """Seconds of the steps since the last log, and a mark in the log where a run was taken up again."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0
        self.steps = 0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            state.log_history.append({"resumed": True, "step": state.global_step})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += self._now() - self.start
        self.steps += 1
        # Whatever is logged between, the last step is: the record counts the steps by it.
        control.should_log |= state.global_step >= state.max_steps

    def take(self) -> tuple[float, int]:
        taken = self.seconds, self.steps
        self.seconds, self.steps = 0.0, 0
        return taken


class Progress(ProgressCallback):
    """A bar with the last loss, tokens per second and peak memory instead of a line for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:,.0f} tokens/s, "
                f"{logs['peak_memory_bytes'] / GIB:.1f} GiB"
            )


class FinetuneTrainer(Trainer):
    """Logs tokens per second and peak memory beside the loss."""

    def __init__(self, *args: Any, tokens_per_step: int, **options: Any):
        super().__init__(*args, **options)
        self.args.logging_nan_inf_filter = False  # it would show another loss instead
        self.tokens_per_step = tokens_per_step
        self.clock = StepClock(self.args.device)
        self.add_callback(self.clock)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress())

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise ValueError(
                    f"loss got {logs['loss']} at step {self.state.global_step}; no training comes back from there; lower --learning_rate "
                    "or --max_grad_norm, lengthen --warmup_steps, and see whether the weights themselves are numbers."
                )
            seconds, steps = self.clock.take()
            logs["tokens_per_second"] = steps * self.tokens_per_step / seconds
            logs["peak_memory_bytes"] = peak_memory(self.args.device)[0]
        super().log(logs, *args, **options)


def add_lora(model: PreTrainedModel, arguments: FinetuneArguments) -> nn.Module:
    """LoRA, with norms and embeddings trained in full where asked for."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ValueError(
            f"lora_rank got {arguments.lora_rank}, but the package peft is not installed; it makes the "
            'adapters; run: pip install "hf-blocksparse[peft]"'
        ) from error
    targets: list[str] | str = arguments.lora_targets
    if targets == ["all-linear"]:
        targets = "all-linear"
    also = norm_and_embedding_options(model) if arguments.lora_norms_and_embeddings else {}
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank
        if arguments.lora_alpha is None
        else arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        **also,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linear = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        raise ValueError(
            f"lora_targets got {arguments.lora_targets} for a {type(model).__name__} ({error}); they must name linear modules; it has "
            f"{sorted(linear)}, or give all-linear."
        ) from error


def merge_adapter(path: str, layout: Layout | None, adapter: Path, folder: Path) -> None:
    """Write the pretrained model at `path` with the adapter merged into its weights."""
    from peft import PeftModel

    model = load_model(path, torch.device("cpu"))
    set_attention(model, layout)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(folder)


def training_run(
    log_history: Sequence[dict[str, Any]],
    *,
    attention: str,
    device: torch.device,
    tokens_per_step: int,
    num_processes: int,
    trained: int,
    parameters: int,
) -> TrainingRun:
    logged = [entry for entry in log_history if "loss" in entry]
    return TrainingRun(
        attention=attention,
        logged_steps=tuple(entry["step"] for entry in logged),
        losses_nats=tuple(entry["loss"] for entry in logged),
        tokens_per_second=tuple(entry["tokens_per_second"] for entry in logged),
        peak_bytes=tuple(entry["peak_memory_bytes"] for entry in logged),
        memory_kind=peak_memory(device)[1],
        tokens_per_step=tokens_per_step,
        num_processes=num_processes,
        trained_parameters=trained,
        all_parameters=parameters,
        resumed_at=tuple(entry["step"] for entry in log_history if entry.get("resumed")),
    )


def train_one(
    arguments: FinetuneArguments,
    training: TrainerArguments,
    *,
    folder: Path,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    attention: str,
    layout: Layout | None,
    windows: Windows,
    tokens_per_step: int,
) -> TrainingRun:
    """Train from the weights at `path` with one attention, or go on with it; the model goes to `folder/model`."""
    finished = folder / FINISHED
    if finished.exists():
        return from_plain(TrainingRun, json.loads(finished.read_text(encoding="utf-8")))
    device = training.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    base = load_model(path, torch.device("cpu"))
    use_cache = base.config.use_cache
    set_attention(base, layout)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    if arguments.loss_chunk_tokens:
        use_chunked_loss(base, arguments.loss_chunk_tokens)
    torch.manual_seed(training.seed)
    model = add_lora(base, arguments) if arguments.lora_rank else base
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = copy.copy(training)
    own.output_dir = str(folder)
    checkpoint = last_checkpoint(folder)
    shares = arguments.sequence_parallel_size > 1
    dataset: Dataset = WindowDataset(windows, with_positions=shares)
    if shares and checkpoint is not None:
        # DeepSpeed's loader cannot be told to skip what was read before.
        own.ignore_data_skip = True
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        read = state["global_step"] * tokens_per_step // windows.tokens.shape[1]
        dataset = Subset(dataset, range(read, len(windows.tokens)))
    trainer = FinetuneTrainer(
        model=model,
        args=own,
        train_dataset=dataset,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        tokens_per_step=tokens_per_step,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    base.config.use_cache = use_cache
    model_folder = folder / "model"
    saved = folder / "adapter" if arguments.lora_rank else model_folder
    trainer.save_model(str(saved))
    unset_hf_deepspeed_config()  # the Trainer set it
    run = training_run(
        trainer.state.log_history,
        attention=attention,
        device=device,
        tokens_per_step=tokens_per_step,
        num_processes=training.world_size,
        trained=trained,
        parameters=parameters,
    )
    if trainer.is_world_process_zero():
        (saved / "training_args.bin").unlink()
        if arguments.lora_rank:
            merge_adapter(path, layout, saved, model_folder)
            tokenizer.save_pretrained(model_folder)
        finished.write_text(json.dumps(to_plain(run), indent=2) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state()  # under DeepSpeed the next Trainer cannot be made beside this one's
    return run


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; its state is written last."""
    written = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
    return (
        str(max(written, key=lambda path: int(path.name.rpartition("-")[2]))) if written else None
    )


def load_trained(folder: Path, layout: Layout | None, device: torch.device) -> PreTrainedModel:
    """Load a trained model as any user would, and see that it has its attention by itself."""
    model = load_model(str(folder), device, attn_implementation=None)
    if own_layout(model) != layout:
        raise RuntimeError(
            f"folder got {folder}, which loads with the layout {own_layout(model)!r}; it was saved with "
            f"{layout!r}; report this as a bug."
        )
    return model


def measure_rows(
    measurements: Measurements,
    path: str,
    output: Path,
    trained: Sequence[tuple[str, str, Layout | None]],
    attentions: dict[str, tuple[AttentionFacts, Layout | None]],
    device: torch.device,
) -> None:
    """The pretrained weights with every attention, then every trained model with its own.

    Args:
        trained: folder, attention and layout of each, dense first.
    """
    model = load_model(path, device)
    baseline = measurements.add_dense(model, weights=PRETRAINED, baseline=None)
    for name, (_, layout) in attentions.items():
        if layout is not None:
            set_attention(model, layout)
            measurements.add(model, weights=PRETRAINED, attention=name, baseline=baseline)
    for folder, name, layout in trained:
        model = load_trained(output / folder / "model", layout, device)
        if layout is None:
            baseline = measurements.add_dense(model, weights=DENSE, baseline=None)
            continue
        measurements.add(model, weights=name, attention=name, baseline=baseline)
        if folder == LAYOUT:
            set_attention(model, None)
            measurements.add(model, weights=name, attention=DENSE, baseline=baseline, probe=False)


def main(argv: Sequence[str] | None = None) -> None:
    model_arguments, text, protocol, arguments, training = parse_arguments(
        sys.argv[1:] if argv is None else argv
    )
    check_arguments(arguments, training)
    # With it, loading would shard the weights; every process checks them whole, and only then are they sharded.
    unset_hf_deepspeed_config()
    share_sequences(arguments, training, text.context_tokens)
    protocol.resolve(text.context_tokens)
    device, is_first = training.device, training.process_index == 0
    if arguments.measure:
        check_costs(protocol, device)
    layout = None if arguments.layout is None else read_layout(arguments.layout)
    training.train_sampling_strategy = "sequential"
    training.remove_unused_columns = False
    if training.gradient_checkpointing_kwargs is None:
        training.gradient_checkpointing_kwargs = {"use_reentrant": False}
    output = Path(training.output_dir)
    name = check_name(arguments.name or output.resolve().name)
    windows_per_step = (
        training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * (training.world_size // arguments.sequence_parallel_size)
    )
    environment = describe_environment(device)
    phases = Phases(quiet=not is_first)
    with tempfile.TemporaryDirectory() as temporary:
        with phases("load the model"):
            source = find_source(model_arguments, Path(temporary))
            tokenizer = load_tokenizer(source.path)
            model = load_model(source.path, torch.device("cpu"), attn_implementation=None)
            layout = layout or own_layout(model) or read_layout(DEFAULT_LAYOUT)
            set_attention(model, None)
            facts = model_facts(model, source)
            check_context(text.context_tokens, facts)
            check_is_causal(model)
            if arguments.measure:
                protocol.check_model(model, tokenizer, text.context_tokens)
            attentions = attentions_side_by_side([layout], facts, text.context_tokens)
            roles = {LAYOUT_ROLE} | {
                {WINDOW: SAME_BUDGET}.get(row, row) for row in arguments.compare
            }
            for compared, each in attentions.values():
                set_attention(model, each)
                if arguments.packing == SEPARATE and compared.role in roles:
                    check_documents_are_separate(model)
            for name_of_row, (compared, _) in attentions.items():
                if compared.role == LAYOUT_ROLE:
                    check_is_sparse(name_of_row, compared.density, text.context_tokens)
            if arguments.loss_chunk_tokens:
                use_chunked_loss(model, arguments.loss_chunk_tokens)
            trained_share = 1.0
            if arguments.lora_rank:
                adapted = add_lora(model, arguments)
                trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
                trained_share = trainable / facts.num_parameters
                del adapted
            del model
        with phases("read the text"):
            corpus = read_text(text)
            held_out, windows = cut_windows(
                corpus,
                tokenizer,
                window_tokens=text.context_tokens,
                num_held_out=protocol.windows if arguments.measure else 0,
                num_training=training.max_steps * windows_per_step,
                seed=training.seed,
                packing=arguments.packing,
                progress=is_first,
            )
        # The order is that of the rows; the first layout named is the one asked for.
        budget = next((key for key, (a, _) in attentions.items() if a.role == SAME_BUDGET), None)
        chosen = next(key for key, (a, _) in attentions.items() if a.role == LAYOUT_ROLE)
        named = {DENSE: DENSE, WINDOW: budget, LAYOUT: chosen}
        if budget is None and WINDOW in arguments.compare:
            raise ValueError(
                f"compare got window, but the layout {chosen} is the plain window of its own budget; there "
                "is no other to compare with; leave it out."
            )
        folders = [folder for folder in (DENSE, WINDOW) if folder in arguments.compare] + [LAYOUT]
        plan = [(folder, named[folder], attentions[named[folder]][1]) for folder in folders]
        manifest = to_plain(
            {
                "model": source.name,
                "positions": facts.max_positions,
                "layout": layout.to_dict(),
                "compare": folders,
                "context_tokens": text.context_tokens,
                "training_sha256": windows.sha256,
                "packing": arguments.packing,
                "windows_per_step": windows_per_step,
                "loss_chunk_tokens": arguments.loss_chunk_tokens,
                "lora": {
                    key: value
                    for key, value in asdict(arguments).items()
                    if key.startswith("lora_")
                },
                "trainer": {key: training.to_dict()[key] for key in DECISIVE},
            }
        )
        if arguments.resume:
            check_manifest(output / MANIFEST, manifest)
        else:
            check_space(
                output,
                parameters=facts.num_parameters,
                trained=int(trained_share * facts.num_parameters),
                num_runs=len(plan),
                checkpoints=count_checkpoints(training),
                deepspeed=training.deepspeed_plugin is not None,
            )
            # Every process has checked that the folder is empty before the first one writes to it.
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            if is_first:
                output.mkdir(parents=True, exist_ok=True)
                (output / MANIFEST).write_text(
                    json.dumps(manifest, indent=2) + "\n", encoding="utf-8"
                )

        runs = []
        for folder, attention, each in plan:
            with phases(f"train with {attention}"):
                runs.append(
                    train_one(
                        arguments,
                        training,
                        folder=output / folder,
                        path=source.path,
                        tokenizer=tokenizer,
                        attention=attention,
                        layout=each,
                        windows=windows,
                        tokens_per_step=windows_per_step * text.context_tokens,
                    )
                )
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if not is_first or not arguments.measure:
            return
        dtype = torch.bfloat16 if training.bf16 else torch.float32
        measurements = Measurements(protocol, held_out, tokenizer, dtype, training.seed)
        with phases("measure quality"):
            measure_rows(measurements, source.path, output, plan, attentions, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

        def publish_with(costs: Sequence[LengthCost], *, with_card: bool) -> None:
            publish(
                EvaluationResults(
                    name=name,
                    context_tokens=text.context_tokens,
                    scored_tokens=protocol.score_tokens,
                    model=facts,
                    text=text_facts(corpus, held_out, windows),
                    attentions=tuple(facts for facts, _ in attentions.values()),
                    qualities=tuple(measurements.rows),
                    costs=tuple(costs),
                    trainings=tuple(runs),
                ),
                script=__file__,
                arguments=recorded_arguments(
                    model_arguments,
                    text,
                    protocol,
                    arguments,
                    manifest["trainer"],
                    layout=layout.to_dict(),
                    dtype=str(dtype).removeprefix("torch."),
                    num_processes=training.world_size,
                    name=name,
                ),
                seed=training.seed,
                environment=environment,
                phases=phases,
                cards=Path(arguments.cards),
                figures=arguments.figures,
                with_card=with_card,
            )

        publish_around_costs(
            publish_with, phases, protocol, source.path, attentions, held_out.tokens.flatten(),
            device=device, dtype=dtype,
        )  # fmt: skip


if __name__ == "__main__":
    main()
