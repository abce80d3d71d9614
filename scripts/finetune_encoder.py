"""Make an encoder read longer texts, as Longformer was made from RoBERTa, and measure what came of it.

    python scripts/finetune_encoder.py --output_dir runs/encoder --model FOLDER --dataset texts --context_tokens 4096
    python scripts/finetune_encoder.py --output_dir runs/small --model FOLDER --context_tokens 1024 --windows 1 \\
        --head_steps 2 --max_steps 2 --per_device_train_batch_size 1                        # on a CPU

A masked-token head is trained at the model's own length first (masked_head.py), with all its weights, as
most encoders come without one. Then the position table is continued by copies of itself (arXiv 2004.05150)
and dense attention replaced by the layout. Three are trained alike: dense attention at the old length, which
reads the same text in chunks, the layout at the new one, and dense attention there. All rows are asked for
the same hidden tokens, before and after.

Writes models to `OUTPUT_DIR/{short,extended,chunks,layout,dense}`, record and card to `model_cards/NAME`; the
record also whenever another row was measured.
"""

import copy
import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from attention_cost import autocast
from corpus import cut_windows
from encoder_results import (
    CHUNKS,
    DENSE,
    EXTENDED,
    LAYOUT,
    SHORT,
    EncoderResults,
    EncoderRow,
    loss_table,
)
from evaluate import (
    REPOSITORY,
    check_folder,
    check_name,
    own_layout,
    read_text,
    recorded_arguments,
    text_facts,
)
from evaluation_results import TrainingRun
from finetune import (
    DECISIVE,
    FinetuneTrainer,
    TrainerArguments,
    check_is_sparse,
    check_training,
    training_run,
)
from help_text import HelpFormatter
from layout_argument import LAYOUT_HELP, read_layout
from masked_head import HeadTraining, train_head
from pretrained import ModelSource, find_model, load_tokenizer, with_extension_note, write_source
from protocol import Phases, TextArguments, layout_name, model_facts, set_attention
from sparsify_results import LayoutFacts
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForMaskedLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)
from write_model_card import write_model_card

from hf_blocksparse import Layout, PerHead, PerLayer, extend_positions
from hf_blocksparse.evaluation import NllDifference
from hf_blocksparse.positions import position_limit
from hf_blocksparse.run_record import (
    FORMAT_VERSION,
    RunRecord,
    describe_environment,
    to_plain,
    write_record,
)


@dataclass
class EncoderArguments:
    """The model, its layout, the hidden tokens and the training of the head."""

    model: str = field(metadata={"help": "an encoder with a position table: a folder or a hub id"})
    base_model: str | None = field(
        default=None, metadata={"help": "hub id of what a local model holds, for the card"}
    )
    licence: str | None = field(
        default=None, metadata={"help": "SPDX identifier of a local model, for the card"}
    )
    layout: str = field(
        default="longformer:window=512,global_tokens=1", metadata={"help": LAYOUT_HELP}
    )
    short_tokens: int | None = field(
        default=None, metadata={"help": "of a chunk; default: the model's own positions"}
    )
    hidden_share: float = field(default=0.15, metadata={"help": "of the tokens that are hidden"})
    windows: int = field(
        default=16, metadata={"help": "held-out windows, each from a document of its own"}
    )
    head_steps: int = field(default=4000, metadata={"help": "steps at the old length"})
    head_rows: int = field(default=32, metadata={"help": "chunks in each of them"})
    head_graph: bool = field(
        default=True, metadata={"help": "on a GPU, replay them as a CUDA graph"}
    )
    head_learning_rate: float = field(
        default=5e-4, metadata={"help": "highest learning rate at the old length"}
    )
    name: str | None = field(
        default=None, metadata={"help": "of the result; default: output_dir's"}
    )
    cards: str = field(
        default=str(REPOSITORY / "model_cards"), metadata={"help": "folder of results"}
    )


def check_arguments(
    arguments: EncoderArguments, training: TrainerArguments, context_tokens: int
) -> Layout:
    """What can be told before anything is loaded."""
    if training.output_dir is None:
        raise ValueError("output_dir got nothing; the models must go somewhere; give --output_dir.")
    folder = Path(training.output_dir)
    check_folder("output_dir", folder)
    check_folder("cards", Path(arguments.cards))
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir got {folder}, which is not empty; a run needs a folder of its own; give another."
        )
    if training.world_size > 1 or training.resume_from_checkpoint:
        raise ValueError(
            f"output_dir got {folder} with {training.world_size} processes and resume_from_checkpoint "
            f"{training.resume_from_checkpoint!r}; this script runs in one process from the start; leave both out."
        )
    if not 0 < arguments.hidden_share < 1:
        raise ValueError(
            f"hidden_share got {arguments.hidden_share}; it must lie between 0 and 1; 0.15 is usual."
        )
    check_training(training)
    counts = {
        "windows": arguments.windows,
        "head_steps": arguments.head_steps,
        "head_rows": arguments.head_rows,
        "max_steps": training.max_steps,
    }
    for key, count in counts.items():
        if count < 1:
            raise ValueError(f"{key} got {count}; it must be at least 1; raise it.")
    if not 0 < arguments.head_learning_rate < math.inf:
        raise ValueError(
            f"head_learning_rate got {arguments.head_learning_rate}; it must be a number above 0; change it."
        )
    if arguments.short_tokens is not None and arguments.short_tokens < 2:
        raise ValueError(
            f"short_tokens got {arguments.short_tokens}; a chunk holds the tokenizer's first token and text, so it must be at "
            "least 2; raise it."
        )
    layout = read_layout(arguments.layout)
    if isinstance(layout, PerLayer | PerHead):
        raise ValueError(
            f"layout got {layout!r:.80}; an encoder gets one layout for all layers and heads here; name a plain one."
        )
    return layout


def chunks_in(context_tokens: int, short_tokens: int) -> int:
    """Chunks of a window: both begin with the tokenizer's first token, so a chunk has one token less of text."""
    chunks = (context_tokens - 1) // (short_tokens - 1)
    if chunks < 2:
        raise ValueError(
            f"context_tokens got {context_tokens} with chunks of {short_tokens}; a window must hold two chunks or more; raise it, or lower "
            "short_tokens."
        )
    return chunks


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What the tokenizer puts before every text."""
    number = (
        tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    )
    if number is None or tokenizer.mask_token_id is None:
        raise ValueError(
            f"model got {type(tokenizer).__name__} with cls_token {tokenizer.cls_token!r} and mask_token {tokenizer.mask_token!r}; an "
            "encoder's tokenizer has both; choose another model."
        )
    return number


@dataclass(frozen=True)
class HiddenTokens:
    """Text with hidden tokens, without the special token in front.

    Attributes:
        inputs: int64 `[windows, tokens]`, what is read.
        labels: int64 like `inputs`: what was there, -100 where nothing is asked.
    """

    inputs: Tensor
    labels: Tensor

    def rows(self, first: int, tokens: int) -> "HiddenTokens":
        """The same in rows of `tokens`, each after the token `first`."""
        inputs, labels = (part.reshape(-1, tokens) for part in (self.inputs, self.labels))
        front = inputs.new_full((len(inputs), 1), first)
        nothing = torch.full_like(front, -100)
        return HiddenTokens(torch.cat((front, inputs), 1), torch.cat((nothing, labels), 1))


def hide_tokens(
    tokens: Tensor, share: float, *, mask: int, vocabulary: int, seed: int, always: bool
) -> HiddenTokens:
    """Choose a `share` of `tokens` at random.

    Args:
        always: each chosen one is replaced by `mask`, as it is measured; otherwise, as BERT is trained
            (arXiv 1810.04805), 8 of 10, and one by any token, and one stays.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens.shape, generator=generator) < share
    labels = torch.where(chosen, tokens, -100)
    fate = torch.rand(tokens.shape, generator=generator)
    random = torch.randint(vocabulary, tokens.shape, generator=generator)
    inputs = torch.where(chosen & ((fate < 0.8) | always), mask, tokens)
    if not always:
        inputs = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), random, inputs)
    return HiddenTokens(inputs, labels)


class HiddenDataset(Dataset):
    """Training rows in their order."""

    def __init__(self, hidden: HiddenTokens):
        self.hidden = hidden

    def __len__(self) -> int:
        return len(self.hidden.inputs)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.hidden.inputs[number], "labels": self.hidden.labels[number]}


def load_encoder(path: str, device: torch.device) -> PreTrainedModel:
    return AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32).to(device)


def train(
    training: TrainerArguments,
    *,
    path: str,
    folder: Path,
    layout: Layout | None,
    name: str,
    rows: HiddenTokens,
    rows_per_step: int,
    steps: int,
) -> TrainingRun:
    """Train from the weights at `path`; the model goes to `folder`."""
    device = training.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(training.seed)
    model = load_encoder(path, torch.device("cpu"))
    set_attention(model, layout)
    own = copy.copy(training)
    own.output_dir, own.max_steps = str(folder), steps
    own.per_device_train_batch_size = rows_per_step
    trainer = FinetuneTrainer(
        model=model,
        args=own,
        train_dataset=HiddenDataset(rows),
        data_collator=default_data_collator,
        tokens_per_step=rows_per_step * rows.inputs.shape[1],
    )
    trainer.train()
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    run = training_run(
        trainer.state.log_history,
        attention=name,
        device=device,
        tokens_per_step=rows_per_step * rows.inputs.shape[1],
        num_processes=1,
        trained=parameters,
        parameters=parameters,
    )
    trainer.accelerator.free_memory()
    del trainer, model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return run


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    rows: HiddenTokens,
    *,
    rows_per_window: int,
    weights: str,
    attention: str,
    baseline: EncoderRow | None,
    dtype: torch.dtype,
) -> EncoderRow:
    """Loss and accuracy at the hidden tokens, a window at a time."""
    model.eval()
    losses, found = [], 0
    windows = zip(
        rows.inputs.split(rows_per_window), rows.labels.split(rows_per_window), strict=True
    )
    bar = tqdm(
        windows, desc=f"  {attention}, weights {weights}", total=len(rows.inputs) // rows_per_window
    )
    for inputs, labels in bar:
        labels = labels.to(model.device)
        with autocast(model.device, dtype):
            logits = model(input_ids=inputs.to(model.device)).logits
        asked = labels != -100
        logits = logits[asked].float()
        losses.append(cross_entropy(logits, labels[asked], reduction="none").double().cpu())
        found += int((logits.argmax(-1) == labels[asked]).sum())
    means = tuple(each.mean().item() for each in losses)
    count = sum(len(each) for each in losses)
    return EncoderRow(
        weights=weights,
        attention=attention,
        read_tokens=rows.inputs.shape[1],
        num_hidden=count,
        nll_nats=torch.cat(losses).mean().item(),
        accuracy=found / count,
        window_nll_nats=means,
        difference=None if baseline is None else paired(means, baseline.window_nll_nats),
    )


def paired(changed: Sequence[float], baseline: Sequence[float]) -> NllDifference:
    """Mean difference of the windows' losses, with its standard error."""
    differences = torch.tensor(changed, dtype=torch.float64)
    differences = differences - torch.tensor(baseline, dtype=torch.float64)
    count = len(differences)
    error = (differences.std() / count**0.5).item() if count > 1 else None
    return NllDifference(differences.mean().item(), error)


def extend(source: ModelSource, trained: Path, folder: Path, limit: int) -> ModelSource:
    """The model in `trained` with `limit` positions, written to `folder`."""
    model = load_encoder(str(trained), torch.device("cpu"))
    tokenizer = load_tokenizer(source.path)
    before = position_limit(model.config)
    extend_positions(model, limit, tokenizer=tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return with_extension_note(source, before, position_limit(model.config), None)


def main(argv: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser(
        (TextArguments, EncoderArguments, TrainerArguments),
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    text, arguments, training = parser.parse_args_into_dataclasses(
        sys.argv[1:] if argv is None else list(argv)
    )
    layout = check_arguments(arguments, training, text.context_tokens)
    training.train_sampling_strategy = "sequential"
    training.remove_unused_columns = False
    training.save_strategy = "no"
    device, output = training.device, Path(training.output_dir)
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    name = check_name(arguments.name or output.resolve().name)
    environment = describe_environment(device)
    phases = Phases()
    with phases("load the model"):
        source = find_model(
            arguments.model, output, base_model=arguments.base_model, licence=arguments.licence
        )
        tokenizer = load_tokenizer(source.path)
        first = first_token(tokenizer)
        model = load_encoder(source.path, torch.device("cpu"))
        facts = model_facts(model, source)
        reserved = facts.max_positions - tokenizer.model_max_length
        short = arguments.short_tokens or min(facts.max_positions, tokenizer.model_max_length)
        chunks = chunks_in(text.context_tokens, short)
        context = 1 + chunks * (short - 1)
        set_attention(model, layout)
        description = LayoutFacts(
            layout=layout.to_dict(),
            description=repr(layout),
            density=layout.density(context, num_heads=facts.query_heads),
            window_tokens=0,
            window_density=0.0,
        )
        check_is_sparse(layout_name(layout), description.density, context)
        vocabulary = model.config.vocab_size
        del model
    batch = training.per_device_train_batch_size
    with phases("read the text"):
        corpus = read_text(text)
        # One token more, so that what the tokenizer may put in front of a window can be left out.
        held_out, windows = cut_windows(
            corpus,
            tokenizer,
            window_tokens=context,
            num_held_out=arguments.windows,
            num_training=training.max_steps * batch * training.gradient_accumulation_steps,
            seed=training.seed,
        )
        words = dict(mask=tokenizer.mask_token_id, vocabulary=vocabulary)
        share, seed = arguments.hidden_share, training.seed
        asked = hide_tokens(held_out.tokens[:, 1:], share, seed=seed, always=True, **words)
        shown = hide_tokens(windows.tokens[:, 1:], share, seed=seed + 1, always=False, **words)
    long_asked, short_asked = asked.rows(first, context - 1), asked.rows(first, short - 1)
    long_rows, short_rows = (
        dict(rows=shown.rows(first, tokens - 1), rows_per_step=rows)
        for tokens, rows in ((context, batch), (short, batch * chunks))
    )
    with phases("train the head"):
        torch.manual_seed(training.seed)  # a new head is drawn at loading
        model = load_encoder(source.path, device)
        head_training = train_head(
            model,
            windows.tokens[:, 1:].reshape(-1, short - 1),
            HeadTraining(
                steps=arguments.head_steps,
                rows=arguments.head_rows,
                learning_rate=arguments.head_learning_rate,
                hidden_share=share,
                adam_betas=(training.adam_beta1, training.adam_beta2),
                adam_epsilon=training.adam_epsilon,
                weight_decay=training.weight_decay,
                max_grad_norm=training.max_grad_norm,
                seed=training.seed,
            ),
            first=first,
            mask=tokenizer.mask_token_id,
            dtype=dtype,
            name=SHORT,
            graph=arguments.head_graph and device.type == "cuda",
        )
        model.save_pretrained(output / SHORT)
        del model
    with phases("extend the positions"):
        source = extend(source, output / SHORT, output / EXTENDED, text.context_tokens + reserved)
    trainings: list[TrainingRun] = []
    measured: list[EncoderRow] = []
    record = Path(arguments.cards) / name / "results" / f"{Path(__file__).stem}.json"

    def add(weights: str, attention: str, baseline: EncoderRow | None) -> EncoderRow:
        with phases("measure"):
            model = load_encoder(str(output / weights), device)
            if weights == EXTENDED and attention == LAYOUT:
                set_attention(model, layout)
            expected = layout if attention == LAYOUT else None
            if own_layout(model) != expected:
                raise RuntimeError(
                    f"folder got {output / weights}, which loads with the layout {own_layout(model)!r}; it was saved with {expected!r}; "
                    "report this as a bug."
                )
            cut = attention == CHUNKS
            row = measure(
                model,
                short_asked if cut else long_asked,
                rows_per_window=chunks if cut else 1,
                weights=weights,
                attention=attention,
                baseline=baseline,
                dtype=dtype,
            )
        measured.append(row)
        results = EncoderResults(
            name=name,
            context_tokens=context,
            short_tokens=short,
            hidden_share=arguments.hidden_share,
            model=replace(facts, notes=source.notes),
            text=text_facts(corpus, held_out, windows),
            layout=description,
            rows=tuple(measured),
            head_training=head_training,
            trainings=tuple(trainings),
        )
        write_record(
            RunRecord(
                version=FORMAT_VERSION,
                script=Path(__file__).name,
                arguments=recorded_arguments(
                    text,
                    arguments,
                    {key: training.to_dict()[key] for key in DECISIVE},
                    layout=layout.to_dict(),
                    dtype=str(dtype).removeprefix("torch."),
                    name=name,
                ),
                seed=training.seed,
                environment=environment,
                timings_seconds=phases.seconds,
                results=to_plain(results),
            ),
            record,
        )
        print(f"{loss_table(results)}\n", flush=True)
        return row

    before = add(SHORT, CHUNKS, None)
    add(EXTENDED, DENSE, before)
    add(EXTENDED, LAYOUT, before)
    trained = None
    for folder, each, own, rows in (
        (CHUNKS, None, SHORT, short_rows),
        (LAYOUT, layout, EXTENDED, long_rows),
        (DENSE, None, EXTENDED, long_rows),
    ):
        with phases(f"train with {folder}"):
            trainings.append(
                train(
                    training,
                    path=str(output / own),
                    folder=output / folder,
                    layout=each,
                    name=layout_name(layout) if folder == LAYOUT else folder,
                    steps=training.max_steps,
                    **rows,
                )
            )
        row = add(folder, folder, trained)
        trained = trained or row
        write_source(source, output / folder)
    write_source(source, output / EXTENDED)
    card = write_model_card(record)
    print(f"{sum(phases.seconds.values()):.0f} s in all; {card}")


if __name__ == "__main__":
    main()
