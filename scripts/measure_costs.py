"""Measure time and memory of the attentions on a record of evaluate.py or finetune.py, and add them to it.

    python scripts/measure_costs.py model_cards/NAME/results/evaluate.json --model runs/NAME/model \\
        --device cuda --dtype bfloat16 --cost_tokens 32768 131072 --cost_attentions sdpa layout none

Times need the machine to themselves, perplexity does not: with `--cost_repetitions 0` the other scripts
leave them to this one. A cost that is on the record already is replaced. Each is written as soon as it is
measured, and the card is made anew at the end. Device and packages must be those of the record.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from evaluate import check_costs, find_device, show
from evaluation_results import EvaluationResults, LengthCost
from help_text import HelpFormatter
from pretrained import find_model
from protocol import CostArguments, measure_costs
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, PreTrainedConfig

from hf_blocksparse import layout_from_dict
from hf_blocksparse.evaluation import prepare_fresh_processes
from hf_blocksparse.run_record import (
    RunRecord,
    describe_environment,
    from_plain,
    read_record,
    to_plain,
    write_record,
)


@dataclass
class MeasureArguments:
    """The record, the model it is of, and where that runs."""

    record: str = field(metadata={"help": "record of evaluate.py or finetune.py"})
    model: str = field(metadata={"help": "as given to the script that made the record"})
    device: str = field(
        default="cpu", metadata={"choices": ["cpu", "cuda"], "help": "where it runs"}
    )
    dtype: str = field(
        default="float32", metadata={"choices": ["float32", "bfloat16"], "help": "computed in"}
    )
    figures: bool = field(
        default=True, metadata={"help": "draw the figures; False leaves them to plot.py"}
    )


def check_record(record: RunRecord, costs: CostArguments, device: torch.device) -> None:
    """Refuse costs that could not stand beside what is on the record."""
    here = describe_environment(device)
    for key in ("device", "packages"):
        there, own = getattr(record.environment, key), getattr(here, key)
        if there != own:
            raise ValueError(
                f"record got results from {key} {there}, and this is {own}; a card tells of one; measure there, or make a new record here."
            )
    there = record.arguments.get("cost_weights")
    if costs.cost_repetitions < 1:
        raise ValueError("cost_repetitions got 0, which measures nothing; give 1 or more.")
    if record.results["costs"] and there != costs.cost_weights:
        raise ValueError(
            f"cost_weights got {costs.cost_weights}, but the costs on the record are of {there}; a card tells of one kind of "
            f"weights; give --cost_weights {there}."
        )


def check_model(config: PreTrainedConfig, results: EvaluationResults) -> None:
    """Refuse a model that is not the record's."""
    there = (results.model.num_layers, results.model.query_heads)
    own = (config.num_hidden_layers, config.num_attention_heads)
    if there != own:
        raise ValueError(
            f"model got one with {own[0]} layers of {own[1]} heads; the record is of {results.model.name}, {there[0]} of {there[1]}; "
            "give that one."
        )


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--record")
    parser = HfArgumentParser(
        (MeasureArguments, CostArguments), description=__doc__, formatter_class=HelpFormatter
    )
    arguments, costs = parser.parse_args_into_dataclasses(words)
    device, dtype = find_device(arguments.device), getattr(torch, arguments.dtype)
    path = Path(arguments.record)
    record = read_record(path)
    results = from_plain(EvaluationResults, record.results)
    costs.cost_tokens = costs.cost_tokens or [results.context_tokens]
    costs.check_costs()
    check_costs(costs, device)
    check_record(record, costs, device)
    prepare_fresh_processes()
    call = asdict(costs) | {
        "dtype": arguments.dtype,
        "git_commit": describe_environment(device).git_commit,
    }
    earlier = record.arguments.get("measured_costs", [])
    measured: list[tuple[int, str]] = []  # a run that is cut has not measured all that it was asked
    with tempfile.TemporaryDirectory() as temporary:
        source = find_model(arguments.model, Path(temporary), base_model=None, licence=None)
        config = AutoConfig.from_pretrained(source.path).get_text_config()
        check_model(config, results)
        with torch.device("meta"):
            costs.check_model_costs(AutoModelForCausalLM.from_config(config))
        attentions = {
            facts.name: (facts, facts.facts and layout_from_dict(facts.facts.layout))
            for facts in results.attentions
        }
        for cost in measure_costs(
            costs,
            source.path,
            attentions,
            torch.arange(config.vocab_size),
            score_tokens=results.scored_tokens,
            device=device,
            dtype=dtype,
        ):
            results = replace(results, costs=with_cost(results.costs, cost))
            measured.append((cost.tokens, cost.row.attention))
            changed = {
                "cost_weights": costs.cost_weights,
                "measured_costs": [*earlier, call | {"measured": measured}],
            }
            record = replace(
                record, arguments=record.arguments | changed, results=to_plain(results)
            )
            write_record(record, path)
    print(show(path, results, figures=arguments.figures))


def with_cost(costs: Sequence[LengthCost], cost: LengthCost) -> tuple[LengthCost, ...]:
    """`costs` with another one, by length, in place of the same."""

    def key(item: LengthCost) -> tuple[object, ...]:
        return item.tokens, item.row.attention, item.row.part, item.row.work

    others = [item for item in costs if key(item) != key(cost)]
    return tuple(sorted([*others, cost], key=lambda item: item.tokens))


if __name__ == "__main__":
    main()
