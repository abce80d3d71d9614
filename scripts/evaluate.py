"""Measure a model with any layouts, beside dense attention: perplexity, probes, time, memory.

    python scripts/evaluate.py --model runs/NAME/model --layouts sink_window:sink=64,window=960 bigbird
    python scripts/evaluate.py --context-tokens 512 --windows 1 --cost-repetitions 1 \\
        --layouts sink_window:sink=16,window=48 sink_window:sink=16,window=112   # a minute on a CPU

On a GPU: `--device cuda --dtype bfloat16`, and `--cost-tokens 8192 32768 131072` for time and memory
against length. A sparse model is measured with its own layout if none is named. Every layout is
measured beside dense attention, a plain sliding window of the same budget and dense attention that is
cut to short contexts, on the same held-out tokens: see protocol.py. Writes the record, figures (the
frontier of density, perplexity and time among them) and a card to `model_cards/NAME`.
"""

import gc
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from attention_cost import FORWARD_AND_BACKWARD
from corpus import Windows, cut_windows, load_corpus
from evaluation_card import cost_table, quality_table
from evaluation_results import DENSE, GIVEN, EvaluationResults, LengthCost
from help_text import HelpFormatter
from layout_argument import LAYOUT_HELP, read_layout
from plot import draw_figures
from pretrained import (
    ModelSource,
    extend_source,
    find_model,
    load_model,
    load_tokenizer,
    public_name,
)
from protocol import (
    CostArguments,
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
from sparsify_results import ModelFacts, TextFacts
from transformers import HfArgumentParser, PreTrainedModel
from write_model_card import write_model_card

from hf_blocksparse import Layout
from hf_blocksparse.run_record import (
    FORMAT_VERSION,
    Environment,
    RunRecord,
    describe_environment,
    to_plain,
    write_record,
)

REPOSITORY = Path(__file__).resolve().parents[1]
# Begins the name of a file that other processes may see for a moment.
PROBE = ".can-be-written-"


@dataclass
class EvaluateArguments:
    """What is measured, where, and what becomes of it."""

    layouts: list[str] | None = field(
        default=None,
        metadata={"help": f"each {LAYOUT_HELP}; default: the model's own"},
    )
    name: str | None = field(default=None, metadata={"help": "of the result; default: the model's"})
    device: str = field(
        default="cpu", metadata={"choices": ["cpu", "cuda"], "help": "where it runs"}
    )
    dtype: str = field(
        default="float32",
        metadata={"choices": ["float32", "bfloat16"], "help": "computed in; weights stay float32"},
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads"})
    seed: int = field(default=0, metadata={"help": "of the passkeys"})
    cards: str = field(
        default=str(REPOSITORY / "model_cards"), metadata={"help": "folder of results"}
    )
    figures: bool = field(
        default=True, metadata={"help": "draw the figures; False leaves them to plot.py"}
    )


def own_layout(model: PreTrainedModel) -> Layout | None:
    """The layout that a sparse checkpoint was saved with."""
    section = getattr(model.config, "block_sparse", None)
    return None if section is None else read_layout(section)


def check_costs(protocol: CostArguments, device: torch.device) -> None:
    """Refuse what no device of this kind can run."""
    if (
        device.type == "cpu"
        and protocol.cost_repetitions
        and protocol.cost_work == FORWARD_AND_BACKWARD
        and "flex_attention" in protocol.cost_attentions
    ):
        raise ValueError(
            "cost_attentions got flex_attention on a CPU, where it has no backward; leave it out, or "
            "measure cost_work forward."
        )


def check_context(context_tokens: int, facts: ModelFacts) -> None:
    if 0 < facts.max_positions < context_tokens:
        raise ValueError(
            f"context_tokens got {context_tokens}, but {facts.name} has {facts.max_positions} positions; "
            "the context must lie within them; shorten it, or extend them with "
            f"--max_position_embeddings {context_tokens}."
        )


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that results could not be written to in the end."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    try:
        # Rights alone do not tell: an administrator has them all, also where nothing can be written.
        with tempfile.TemporaryFile(dir=existing, prefix=PROBE):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} got {folder}, but {existing} is not a folder that can be written to ({error.strerror}); results go there; "
            "give another."
        ) from error


def check_name(name: str) -> str:
    """Refuse the name of a result that is not one of a folder."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(
            f"name got {name!r}; it is that of a folder among the cards, so it has no slashes; correct it, and give the place as cards."
        )
    return name


def find_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device got {name}, but torch {torch.__version__} finds no GPU here; leave it out to run on the CPU, or install "
            "torch for CUDA."
        )
    return torch.device(name)


@torch.no_grad()
def check_is_causal(model: PreTrainedModel) -> None:
    """Raise where a token reads later ones: what predicts the next token could see it."""
    tokens = torch.arange(3, 11, device=model.device)[None]
    others = tokens.clone()
    others[0, -1] = 3
    logits = [model(input_ids=ids, use_cache=False).logits[0].float() for ids in (tokens, others)]
    *earlier, last = (logits[0] - logits[1]).abs().amax(1).tolist()
    if max(earlier) > 1e-3 * last:
        raise ValueError(
            f"model got a {type(model).__name__}, in which a token reads later ones; it must be a causal language model; choose another, "
            "or train an encoder with finetune_encoder.py."
        )


def text_facts(corpus: Any, held_out: Windows, training: Windows) -> TextFacts:
    return TextFacts(
        corpus=corpus.name,
        description=corpus.description,
        held_out_documents=held_out.documents,
        held_out_sha256=held_out.sha256,
        training_documents=training.documents,
        training_sha256=training.sha256,
    )


def read_text(text: TextArguments) -> Any:
    return load_corpus(
        text.dataset,
        text_column=text.text_column,
        max_documents=text.max_documents,
        config=text.dataset_config,
        split=text.dataset_split,
        join_folders=text.join_folders,
    )


def find_source(arguments: ModelArguments, folder: Path) -> ModelSource:
    if arguments.rope_scaling is not None and arguments.max_position_embeddings is None:
        raise ValueError(
            f"rope_scaling got {arguments.rope_scaling!r} without max_position_embeddings; it says how positions are extended; give the "
            "new limit, too."
        )
    source = find_model(
        arguments.model,
        folder,
        base_model=arguments.base_model,
        licence=arguments.licence,
    )
    if arguments.max_position_embeddings is None:
        return source
    return extend_source(
        source, folder / "extended", arguments.max_position_embeddings, arguments.rope_scaling
    )


def recorded_arguments(*groups: Any, **changed: Any) -> dict[str, Any]:
    """The arguments as resolved. Folders are those of one machine; what they held is recorded by digest."""
    recorded: dict[str, Any] = {}
    for group in groups:
        recorded |= group if isinstance(group, dict) else asdict(group)
    for key in ("model", "dataset"):
        recorded[key] = public_name(recorded[key])
    return {
        key: value for key, value in (recorded | changed).items() if key not in ("cards", "figures")
    }


def publish(
    results: EvaluationResults,
    *,
    script: str,
    arguments: dict[str, Any],
    seed: int,
    environment: Environment,
    phases: Phases,
    cards: Path,
    figures: bool,
    with_card: bool = True,
) -> Path:
    """Write the record, and with a card figures (if wanted) and tables on the screen, too. Returns the path of card or record."""
    record = cards / results.name / "results" / f"{Path(script).stem}.json"
    write_record(
        RunRecord(
            version=FORMAT_VERSION,
            script=Path(script).name,
            arguments=arguments,
            seed=seed,
            environment=environment,
            timings_seconds=phases.seconds,
            results=to_plain(results),
        ),
        record,
    )
    if not with_card:
        return record
    card = show(record, results, figures=figures)
    print(f"{sum(phases.seconds.values()):.0f} s in all; {card}")
    return card


def show(record: Path, results: EvaluationResults, *, figures: bool) -> Path:
    """The figures (if wanted) and the card of a record, whose path is returned, and tables on the screen."""
    missing = None if figures else "not wanted"
    if figures and importlib.util.find_spec("matplotlib") is None:
        missing = "matplotlib is not installed"
    if missing is None:
        draw_figures(record)
    else:
        print(f"no figures, {missing}; from the record: python scripts/plot.py {record}")
    card = write_model_card(record)
    print(f"\n{quality_table(results)}\n")
    if results.costs:
        print(f"{cost_table(results)}\n")
    return card


def main(argv: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser(
        (ModelArguments, TextArguments, ProtocolArguments, EvaluateArguments),
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    model_arguments, text, protocol, arguments = parser.parse_args_into_dataclasses(
        None if argv is None else list(argv)
    )
    device, dtype = find_device(arguments.device), getattr(torch, arguments.dtype)
    protocol.resolve(text.context_tokens)
    check_costs(protocol, device)
    check_folder("cards", Path(arguments.cards))
    layouts = [read_layout(value) for value in arguments.layouts or ()]
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"threads got {arguments.threads}; it must be at least 1; raise it.")
        torch.set_num_threads(arguments.threads)
    name = check_name(arguments.name or public_name(model_arguments.model).split("/")[-1])
    environment = describe_environment(device)
    phases = Phases()
    with tempfile.TemporaryDirectory() as temporary:
        with phases("load the model"):
            source = find_source(model_arguments, Path(temporary))
            model = load_model(source.path, device, attn_implementation=None)
            tokenizer = load_tokenizer(source.path)
            own = own_layout(model)
            if not layouts and own is not None:
                layouts = [own]
            if not layouts:
                raise ValueError(
                    f"layouts got nothing, and {name} has no layout of its own; at least one is measured "
                    "beside dense attention; name one, such as sink_window:sink=64,window=960."
                )
            set_attention(model, None)
            facts = model_facts(model, source)
            check_context(text.context_tokens, facts)
            check_is_causal(model)
            protocol.check_model(model, tokenizer, text.context_tokens)
            attentions = attentions_side_by_side(layouts, facts, text.context_tokens)
            for _, layout in attentions.values():
                set_attention(model, layout)
        with phases("read the text"):
            corpus = read_text(text)
            held_out, training = cut_windows(
                corpus,
                tokenizer,
                window_tokens=text.context_tokens,
                num_held_out=protocol.windows,
                num_training=0,
                seed=arguments.seed,
            )
        measurements = Measurements(protocol, held_out, tokenizer, dtype, arguments.seed)
        with phases("measure quality"):
            dense = measurements.add_dense(model, weights=GIVEN, baseline=None)
            for attention, (_, layout) in attentions.items():
                if attention != DENSE:
                    set_attention(model, layout)
                    measurements.add(model, weights=GIVEN, attention=attention, baseline=dense)
        del model
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
                    text=text_facts(corpus, held_out, training),
                    attentions=tuple(facts for facts, _ in attentions.values()),
                    qualities=tuple(measurements.rows),
                    costs=tuple(costs),
                    trainings=(),
                ),
                script=__file__,
                arguments=recorded_arguments(
                    model_arguments,
                    text,
                    protocol,
                    arguments,
                    layouts=[json.dumps(layout.to_dict()) for layout in layouts],
                    name=name,
                ),
                seed=arguments.seed,
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
