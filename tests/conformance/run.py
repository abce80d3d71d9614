"""Which transformers models run with block-sparse attention, and how: three runs and the page made of their records.

    python tests/conformance/run.py suite --transformers-tests ~/transformers --families llama bert
    python tests/conformance/run.py matrix
    python tests/conformance/run.py sweep
    python tests/conformance/run.py table

`suite` runs transformers' own model tests with our attention (dense layout) in the place of "sdpa", and those that do not pass again with
theirs; families that are not named keep their place in its record. With `--again PATTERN` it runs once more, with ours, the tests that
passed with theirs alone for such a reason. It needs the tests/ and utils/ folders of transformers' repository at the installed version,
and its src/transformers (a link to the installed package will do). `matrix` runs tiny models with a sparse layout against eager
attention, see matrix.py; `sweep` does so once for every language model there is, see sweep.py. Each writes a record to docs/results;
`table` writes docs/conformance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from conformance.verdict import (  # noqa: E402
    NOT_APPLICABLE,
    NOT_BUILT,
    REFUSED,
    WORKS,
    WRONG,
    first_line,
)

from hf_blocksparse.run_record import (  # noqa: E402
    Environment,
    RunRecord,
    describe_environment,
    read_record,
    write_record,
)

RESULTS = ROOT / "docs" / "results"
TABLE = ROOT / "docs" / "conformance.md"

# Families of transformers, and what they are called in its tests/models.
SUITE_FAMILIES = (
    "llama qwen2 qwen3 qwen3_next mistral mixtral gemma2 gemma3 phi3 gpt2 gpt_neox olmo olmo2 cohere2 gpt_oss smollm3 deepseek_v2 "
    "deepseek_v3 bert roberta modernbert t5 vit whisper llava"
).split()
# Their attention has what ours does not compute, and dense layers are handed over to it.
HANDED_OVER = ("t5",)
# These start processes of their own, which do not know the plugin.
DESELECTED = "not fsdp2 and not tensor_parallel and not tp_"

# Errors of transformers' tests with ours, and what they mean.
EXPLANATIONS = (
    (r"passes \['position_bias'\]", "relative position biases are refused"),
    (
        r"torch\.compiler\.disable",
        "`torch.compile(fullgraph=True)`: the graph breaks at the attention",
    ),
    (
        r"attention_mask got torch\.\w+ entries that are neither 0 nor -inf",
        "additive masks are refused",
    ),
    (r"never makes the weights", "`output_attentions` is refused"),
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    suite = commands.add_parser("suite", help="transformers' own tests")
    suite.add_argument(
        "--transformers-tests", type=Path, required=True, help="folder that holds tests/"
    )
    suite.add_argument(
        "--tests-from",
        default="the installed version",
        help="release or commit of the tests, for the page",
    )
    suite.add_argument("--families", nargs="+", default=SUITE_FAMILIES, metavar="FAMILY")
    suite.add_argument("--seconds-per-family", type=int, default=1200)
    suite.add_argument(
        "--outcomes",
        type=Path,
        default=ROOT / "build" / "conformance",
        help="folder of the outcomes by test; families whose outcomes are there are not run again",
    )
    suite.add_argument(
        "--again",
        metavar="PATTERN",
        help="run only the tests of the record that passed with theirs alone, for a reason that has this regular expression",
    )
    suite.add_argument("--output", type=Path, default=RESULTS / "conformance_suite.json")
    matrix = commands.add_parser("matrix", help="our own matrix")
    matrix.add_argument("--families", nargs="+", default=None, metavar="FAMILY")
    matrix.add_argument("--output", type=Path, default=RESULTS / "conformance_matrix.json")
    sweep = commands.add_parser("sweep", help="every language model, once")
    sweep.add_argument("--families", nargs="+", default=None, metavar="FAMILY")
    sweep.add_argument("--output", type=Path, default=RESULTS / "conformance_sweep.json")
    table = commands.add_parser("table", help="the page of the records")
    table.add_argument("--output", type=Path, default=TABLE)
    return parser.parse_args(argv)


def _pytest(
    args: argparse.Namespace, attention: str, family: str, tests: Sequence[str], outcomes: Path
) -> bool:
    """Run tests of transformers in a process of their own; whether they came to an end within the time."""
    listed = outcomes.with_suffix(".args")
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("\n".join(tests) + "\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "--tb=short",
    ]
    command += [
        "-p",
        "conformance.plugin",
        "--attention",
        attention,
        "--outcomes",
        str(outcomes.resolve()),
        "--impl",
        "auto" if family in HANDED_OVER else "torch",
    ]
    command += ["-k", DESELECTED, f"@{listed.resolve()}"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    with outcomes.with_suffix(".log").open("w") as log:
        try:
            subprocess.run(
                command,
                cwd=args.transformers_tests,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=args.seconds_per_family,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return outcomes.exists()


def _test_file(family: str) -> str:
    return f"tests/models/{family}/test_modeling_{family}.py"


def run_family(args: argparse.Namespace, family: str) -> dict[str, Any] | None:
    """The summary of one family, or None without outcomes; `FAMILY.{ours,theirs}.json` stay in the folder of outcomes."""
    ours, theirs = (
        args.outcomes / f"{family}.{attention}.json" for attention in ("ours", "theirs")
    )
    started = time.perf_counter()
    if not ours.exists() and not _pytest(args, "ours", family, [_test_file(family)], ours):
        print(f"{family}: no outcomes, see {ours.with_suffix('.log')}", flush=True)
        return None
    again = [
        test for test, made in json.loads(ours.read_text()).items() if made["outcome"] != "passed"
    ]
    if not theirs.exists() and not _pytest(args, "theirs", family, again, theirs):
        print(f"{family}: no outcomes, see {theirs.with_suffix('.log')}", flush=True)
        return None
    summary = summarise(args.outcomes, family)
    print(
        f"{family}: {summary['passed']} passed, {len(summary['theirs_only'])} with theirs only "
        f"({time.perf_counter() - started:.0f} s)",
        flush=True,
    )
    return summary


def run_again(args: argparse.Namespace, family: str, known: dict[str, Any]) -> dict[str, Any]:
    """The summary of one family after the tests that `--again` names."""
    tests = [name for name, reason in known["theirs_only"].items() if re.search(args.again, reason)]
    outcomes = args.outcomes / f"{family}.again.json"
    outcomes.unlink(missing_ok=True)
    if not tests or not _pytest(
        args, "ours", family, [f"{_test_file(family)}::{test}" for test in tests], outcomes
    ):
        print(f"{family}: {len(tests)} tests, nothing changed", flush=True)
        return known
    summary = known | {"theirs_only": dict(known["theirs_only"])}
    for test, made in json.loads(outcomes.read_text()).items():
        name = test.split("::", 1)[1]
        if made["outcome"] == "passed":
            del summary["theirs_only"][name]
            summary["passed"] += 1
            summary["failed"] -= 1
            summary["through_our_attention"] += bool(made["calls"])
        else:
            summary["theirs_only"][name] = explain(made["error"] or made["outcome"])
    left = len(summary["theirs_only"]) - len(known["theirs_only"]) + len(tests)
    print(f"{family}: {len(tests)} tests, {left} still with theirs only", flush=True)
    return summary


def summarise(folder: Path, family: str) -> dict[str, Any]:
    """Counts of one family's outcomes, and every test that passes with theirs only, with its reason."""
    ours, theirs = (
        json.loads((folder / f"{family}.{attention}.json").read_text())
        for attention in ("ours", "theirs")
    )
    counts = Counter(made["outcome"] for made in ours.values())
    theirs_only = {}
    for test, made in ours.items():
        if made["outcome"] != "passed" and theirs.get(test, {}).get("outcome") == "passed":
            theirs_only[test.split("::", 1)[1]] = explain(made["error"] or made["outcome"])
    return {
        "passed": counts["passed"],
        "skipped": counts["skipped"],
        "failed": counts["failed"],
        "through_our_attention": sum(
            bool(made["calls"]) for made in ours.values() if made["outcome"] == "passed"
        ),
        "failed_with_both": counts["failed"] - len([test for test in theirs_only]),
        "theirs_only": theirs_only,
    }


def explain(error: str) -> str:
    for pattern, reason in EXPLANATIONS:
        if re.search(pattern, error):
            return reason
    return first_line(error)


def _record(
    args: argparse.Namespace, environment: Environment, started: float, results: dict[str, Any]
) -> RunRecord:
    # Paths say nothing about the run.
    arguments = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    return RunRecord(
        version=1,
        script="tests/conformance/run.py",
        arguments=arguments,
        seed=0,
        environment=environment,
        timings_seconds={"all": time.perf_counter() - started},
        results=results,
    )


def run_suite(args: argparse.Namespace) -> None:
    environment, started = describe_environment(torch.device("cpu")), time.perf_counter()
    made: dict[str, Any] = {}
    if args.output.exists():
        before = read_record(args.output)
        check_versions(before.environment, environment, args.output)
        made = before.results
    elif args.again:
        raise ValueError(
            f"again got {args.again!r}, but there is no record {args.output}; it holds the tests to run; run the suite without "
            "--again first."
        )
    for family in args.families:
        if not args.again:
            summary = run_family(args, family)
        else:
            summary = run_again(args, family, made[family]) if family in made else None
        if summary is None or summary is made.get(family):
            continue
        # The families of one record may come from several runs.
        key = "git_commit_again" if args.again else "git_commit"
        made[family] = summary | {key: environment.git_commit}
        results = {family: made[family] for family in SUITE_FAMILIES if family in made}
        write_record(_record(args, environment, started, results), args.output)


def check_versions(before: Environment, now: Environment, path: Path) -> None:
    """Refuse a record of other versions of what is tested."""
    for package in ("transformers", "torch"):
        if before.packages[package] != now.packages[package]:
            raise ValueError(
                f"output got {path}, made with {package} {before.packages[package]}, but {now.packages[package]} is installed; one "
                "record holds one version; give another --output."
            )


def run_matrix(args: argparse.Namespace) -> None:
    from conformance.matrix import ALL_FAMILIES, FEATURES, run_cell

    environment, started = describe_environment(torch.device("cpu")), time.perf_counter()
    results: dict[str, dict[str, dict[str, str]]] = {}
    for family in args.families or ALL_FAMILIES:
        cells = {
            name: run_cell(ALL_FAMILIES[family], feature) for name, feature in FEATURES.items()
        }
        results[family] = {name: asdict(cell) for name, cell in cells.items()}
        print(f"{family}: {dict(Counter(cell.outcome for cell in cells.values()))}", flush=True)
    write_record(_record(args, environment, started, results), args.output)


def run_sweep(args: argparse.Namespace) -> None:
    from conformance.small_models import families
    from conformance.sweep import examine, families_alone
    from tqdm import tqdm
    from transformers.utils import logging

    # What families say of sizes they were not made for is theirs to say.
    logging.set_verbosity(logging.CRITICAL)
    environment, started = describe_environment(torch.device("cpu")), time.perf_counter()
    results: dict[str, dict[str, dict[str, str]]] = {}
    chosen = [each for each in families() if not args.families or each[1] in args.families]
    with tempfile.TemporaryDirectory() as folder:
        alone = families_alone(Path(folder), args.families)
    for kind, name, config_class, model_class in tqdm(chosen, unit="family"):
        verdict = examine(kind, config_class, model_class, alone[kind, name])
        results.setdefault(kind, {})[name] = asdict(verdict)
        if verdict.outcome == WRONG:
            tqdm.write(f"{kind} {name}: {verdict.reason}")
    write_record(_record(args, environment, started, results), args.output)


def make_table(suite: RunRecord, matrix: RunRecord, sweep: RunRecord) -> str:
    """docs/conformance.md."""
    from conformance.matrix import FEATURES

    lines = [
        "# Conformance",
        "",
        "Made by `python tests/conformance/run.py table` from `docs/results/conformance_{suite,matrix,sweep}.json`; not edited by hand.",
        "",
        "## transformers' own tests",
        "",
        f"{_versions(suite)}, CPU, tests of {suite.arguments['tests_from']}. Our attention (a dense layout, `impl=torch`) stands in the "
        "place of `sdpa` (as the default where a model does not support `sdpa`); a test counts as theirs alone if it passes with "
        f"transformers' attention and not with ours. With `impl=auto`, as users have it: {', '.join(HANDED_OVER)}, whose position bias "
        "exists in transformers' own attention alone, to which dense layers are handed over. Left out: tests that start processes of "
        "their own (FSDP, tensor parallelism), those marked slow, and those that need a GPU or a hub.",
        "",
        "| family | passed with ours | of them through our attention | failed with both | passed with theirs alone | reasons |",
        "|---|---|---|---|---|---|",
    ]
    for family, made in suite.results.items():
        reasons = Counter(made["theirs_only"].values())
        text = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common()) or "-"
        lines.append(
            f"| {family} | {made['passed']} | {made['through_our_attention']} | {made['failed_with_both']} | "
            f"{len(made['theirs_only'])} | {_escape(text)} |"
        )
    if left := [family for family in SUITE_FAMILIES if family not in suite.results]:
        lines += ["", f"Not run yet: {', '.join(left)}."]
    lines += [
        "",
        "## Ways of running, with a sparse layout",
        "",
        f"{_versions(matrix)}, CPU. Tiny random models, another layout in every head, against transformers' eager attention with the "
        "layout as a mask: outputs, and gradients of every parameter. **yes**: the same. **no**: refused with a message. "
        "**-**: the model has no such thing, or transformers itself cannot do it. Numbers point to the reasons below. "
        "`tests/test_conformance.py` holds every cell.",
        "",
    ]
    reasons_seen: list[str] = []
    families = list(matrix.results)
    lines.append(f"| | {' | '.join(families)} |")
    lines.append("|---" * (len(families) + 1) + "|")
    for name, feature in FEATURES.items():
        cells = []
        for family in families:
            cell = matrix.results[family][name]
            mark = {WORKS: "yes", REFUSED: "no", NOT_APPLICABLE: "-"}[cell["outcome"]]
            if cell["reason"] and not cell["reason"].endswith(" model"):
                reason = _escape(
                    re.sub(r"\b(encoder|decoder|model)[\w.]*\.\d[\w.]*", "LAYER", cell["reason"])
                )
                if reason not in reasons_seen:
                    reasons_seen.append(reason)
                mark += f" {reasons_seen.index(reason) + 1}"
            cells.append(mark)
        lines.append(f"| {feature.title} | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons_seen, 1)]
    return "\n".join([*lines, "", *_sweep_section(sweep)]) + "\n"


# Reasons of many families in the sweep, and what they mean.
REASONS_OF_MANY = (
    (r"cannot be patched as a whole", "attention modules of their own"),
    (
        r"are cross-attention",
        "a decoder's cross-attention has no layout: choose its self-attention layers by `layers=range(n)`",
    ),
    (r"has no attention module", "no attention at all"),
    (r"parameters with small sizes", "large in spite of it"),
)


def _sweep_section(sweep: RunRecord) -> list[str]:
    """What becomes of every language model: those that work by name, the others with the reason."""
    lines = [
        "## Every language model",
        "",
        f"{_versions(sweep)}, CPU. Every causal and masked language model of transformers' auto classes, tiny and random, patched as a "
        "whole: with `Dense()` its logits have to be its own, with a window those of eager attention within it (where it has none that "
        "reads transformers' masks, tokens out of reach must not matter), and unpatching has to bring back its logits bit for bit. Each is "
        "built in a process without this package, too: what is not built there is counted so, and what is has to compute the same.",
    ]
    for kind, made in sweep.results.items():
        works = [name for name, verdict in made.items() if verdict["outcome"] == WORKS]
        lines += [
            "",
            f"**{kind.capitalize()}**: {len(works)} of {len(made)} work: {', '.join(works)}.",
        ]
        for outcome, title in ((REFUSED, "refused"), (NOT_BUILT, "not built with small sizes")):
            by_reason: dict[str, list[str]] = {}
            for name, verdict in made.items():
                if verdict["outcome"] == outcome:
                    by_reason.setdefault(_reason_of_many(verdict["reason"]), []).append(name)
            if by_reason:
                lines += ["", f"| {kind}, {title} | reason |", "|---|---|"]
                lines += [
                    f"| {', '.join(names)} | {_escape(why)} |" for why, names in by_reason.items()
                ]
    return lines


def _reason_of_many(reason: str) -> str:
    return next((short for pattern, short in REASONS_OF_MANY if re.search(pattern, reason)), reason)


def _versions(record: RunRecord) -> str:
    packages = record.environment.packages
    return f"transformers {packages['transformers']}, torch {packages['torch']}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.command == "suite":
        run_suite(args)
    elif args.command == "matrix":
        run_matrix(args)
    elif args.command == "sweep":
        run_sweep(args)
    else:
        records = (
            read_record(RESULTS / f"conformance_{name}.json")
            for name in ("suite", "matrix", "sweep")
        )
        args.output.write_text(make_table(*records), encoding="utf-8")


if __name__ == "__main__":
    main()
