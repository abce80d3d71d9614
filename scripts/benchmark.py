"""Time of block-sparse attention beside torch's dense attention and compiled FlexAttention, forward and backward apart.

    python scripts/benchmark.py --device cuda
    python scripts/benchmark.py --device cpu

On a GPU every layout and block size runs through ours, SDPA (FlashAttention and cuDNN, dense) and compiled FlexAttention with the same
mask; `--max-autotune` adds FlexAttention's autotuned form. Before anything is timed, one head of every sparse implementation is compared
with dense attention in float32, output and gradients. On a CPU it is a causal sliding window of 10 % density beside dense SDPA, each in a
process of its own, and three of each.

TFLOP/s are *useful* ones: 4 * head_dim operations per kept coefficient forward, 2.5 times as many backward, the same count for dense
baselines, which compute more than that. Times are medians, the spread is the 20th to the 80th percentile; the backward is timed alone.
Every run begins with building the index of BigBird at up to 1,048,576 tokens.
Tile efficiency is kept / computed coefficients of our forward kernel. Peak memory is what forward and backward add to the inputs.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from hf_blocksparse import (
    BigBird,
    Dense,
    Layout,
    SlidingWindow,
    TensorLayout,
    block_sparse_attention,
)
from hf_blocksparse.block_index import BlockIndex, clear_cache, get_index
from hf_blocksparse.evaluation import Cost, in_fresh_process, measure_cost
from hf_blocksparse.ops.triton.tile_sizes import tile_sizes
from hf_blocksparse.run_record import (
    FORMAT_VERSION,
    RunRecord,
    describe_environment,
    to_plain,
    write_record,
)
from hf_blocksparse.sequences import Sequences

LAYOUTS = ("causal", "window", "bigbird", "random25", "random10")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Relative errors (norm of the difference / norm of the reference) above this mean a wrong answer, not rounding.
TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}
CPU_DENSITY = 0.1
# The resident set of one process moves by some MiB from run to run: the median of several is compared.
CPU_PROCESSES = 3

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """Shape of all measurements of a run. `kv_heads` divides `heads`."""

    device: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    length_tokens: int
    head_dim: int
    repetition_ms: int
    seed: int


@dataclass(frozen=True)
class Measurement:
    """One implementation on one layout; `failure` instead of numbers where it refused.

    Attributes:
        median_ms, low_ms, high_ms: median, 20th and 80th percentile.
        useful_tflops: of kept coefficients, per second of the median.
        tile_efficiency: kept / computed coefficients, ours only.
        index_ms: building the index of forward and backward once, ours only; FlexAttention: its block mask.
        peak_mib: memory that forward and backward together add.
        relative_error: the largest of output and gradients, against float32.
    """

    layout: str
    block_size: int
    density: float
    implementation: str
    direction: str
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    useful_tflops: float | None = None
    tile_efficiency: float | None = None
    index_ms: float | None = None
    peak_mib: float | None = None
    relative_error: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class IndexMeasurement:
    """Building the index of causal BigBird (block 128), both directions, from nothing.

    Attributes:
        seconds: wall time; `num_tiles` and `index_bytes` are over all heads.
    """

    length_tokens: int
    heads: int
    seconds: float
    num_tiles: int
    index_bytes: int


@dataclass(frozen=True)
class Results:
    measurements: tuple[Measurement, ...]
    index: tuple[IndexMeasurement, ...]


def make_layout(name: str, block_size: int, setting: Setting) -> tuple[Layout, bool]:
    """The layout and whether it is causal; random layouts differ by head and keep the diagonal."""
    if name == "causal":
        return Dense(), True
    if name == "window":
        return SlidingWindow(setting.length_tokens // 8), True
    if name == "bigbird":
        return BigBird(block_size), True
    blocks = math.ceil(setting.length_tokens / block_size)
    density = {"random25": 0.25, "random10": 0.1}[name]
    generator = torch.Generator().manual_seed(setting.seed)
    kept = torch.rand(setting.heads, blocks, blocks, generator=generator) < density
    return TensorLayout.from_tensor(kept | torch.eye(blocks, dtype=torch.bool), block_size), False


def index_of(
    layout: Layout, is_causal: bool, setting: Setting, tile_q: int, tile_kv: int
) -> BlockIndex:
    device = torch.device(setting.device)
    length = setting.length_tokens
    return get_index(
        layout,
        Sequences.uniform(setting.batch, length, length, 0, device),
        is_causal=is_causal,
        attn_mask=None,
        num_heads=setting.heads,
        tile_q=tile_q,
        tile_kv=tile_kv,
        device=device,
    )


def kept_and_computed(index: BlockIndex, setting: Setting) -> tuple[int, int]:
    """Coefficients kept, and coefficients of the tiles that hold them, over all heads. Lengths must be whole tiles."""
    full = (index.kv_mask_ids < 0).long()
    in_mask = index.bank_bits().flatten(1).sum(1)
    area = index.tile_q * index.tile_kv
    kept = int(full.sum()) * area + int(in_mask[index.kv_mask_ids[full == 0].long()].sum())
    repeats = setting.heads // index.num_lists
    return kept * repeats, index.num_tiles * area * repeats


def block_matrices(
    layout: Layout, is_causal: bool, setting: Setting, block_size: int
) -> tuple[Tensor, Tensor]:
    """Blocks kept in part, and in full, read from our index: bool `[heads, blocks, blocks]`."""
    index = index_of(layout, is_causal, setting, block_size, block_size)
    shape = (index.num_lists, index.num_q_tiles, index.num_kv_tiles)
    counts = index.kv_offsets.diff(dim=1).flatten().long()
    line = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    matrices = []
    for chosen in (index.kv_mask_ids >= 0, index.kv_mask_ids < 0):
        matrix = torch.zeros(shape, dtype=torch.bool, device=counts.device).flatten(0, 1)
        matrix[line[chosen], index.kv_indices[chosen].long()] = True
        matrices.append(matrix.view(shape)[index.list_of[0].long().expand(setting.heads)])
    return matrices[0], matrices[1]


def mask_function(name: str, layout: Layout, block_size: int, setting: Setting) -> Callable:
    """The kept coefficients as a function of (batch, head, query, key) tensors, as FlexAttention wants them."""
    if name == "causal":
        return lambda b, h, q, kv: q >= kv
    if name == "window":
        window = setting.length_tokens // 8
        return lambda b, h, q, kv: (q >= kv) & (q - kv < window)
    # BigBird's random blocks are those of the causal rule.
    partial, full = block_matrices(layout, name == "bigbird", setting, block_size)
    matrix = partial | full
    if name == "bigbird":
        return lambda b, h, q, kv: matrix[h, q // block_size, kv // block_size] & (q >= kv)
    return lambda b, h, q, kv: matrix[h, q // block_size, kv // block_size]


def flex_attention(
    mask: Callable,
    layout: Layout,
    is_causal: bool,
    setting: Setting,
    block_size: int,
    autotune: bool,
) -> Attend:
    """FlexAttention compiled for one mask. Its sparse blocks are as large as ours, at least 64.

    The block mask is assembled from our index, because `create_block_mask` looks at every coefficient.
    """
    from torch._functorch import config
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    # The backward is run again and again on one forward.
    config.donated_buffer = False
    torch._dynamo.reset()
    grain = max(64, block_size)
    lists = []
    for matrix in block_matrices(layout, is_causal, setting, grain):
        order = torch.argsort(matrix.int(), dim=-1, descending=True, stable=True)
        lists += [matrix.sum(-1).int()[None], order.int()[None].contiguous()]
    block_mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=grain, mask_mod=mask)
    compiled = torch.compile(
        flex_attention, mode="max-autotune-no-cudagraphs" if autotune else None
    )
    gqa = setting.heads != setting.kv_heads
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)


def sdpa(backend: SDPBackend, is_causal: bool) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=is_causal, enable_gqa=query.shape[1] != key.shape[1]
            )

    return attend


def make_inputs(setting: Setting) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Leaves query, key, value, and the gradient of the output."""
    generator = torch.Generator(setting.device).manual_seed(setting.seed)

    def normal(heads: int) -> Tensor:
        return torch.randn(
            (setting.batch, heads, setting.length_tokens, setting.head_dim),
            generator=generator,
            device=setting.device,
            dtype=DTYPES[setting.dtype],
        )

    leaves = tuple(
        normal(heads).requires_grad_()
        for heads in (setting.heads, setting.kv_heads, setting.kv_heads)
    )
    return leaves, normal(setting.heads)


def relative_error(attend: Attend, mask: Callable, setting: Setting) -> float:
    """The largest relative error of output, dQ, dK and dV of one batch row and the first key head's group."""
    leaves, grad_out = make_inputs(setting)
    ours = (out := attend(*leaves)), *torch.autograd.grad(out, leaves, grad_out)
    group = setting.heads // setting.kv_heads
    place = torch.arange(setting.length_tokens, device=setting.device)
    zero = torch.zeros((), dtype=torch.long, device=setting.device)
    query, key, value = (
        leaf[0, :count].detach().float().requires_grad_()
        for leaf, count in zip(leaves, (group, 1, 1), strict=True)
    )
    parts = []
    for head in range(group):
        scores = query[head] @ key[0].T * setting.head_dim**-0.5
        kept = mask(zero, zero + head, place[:, None], place[None, :])
        parts.append(scores.masked_fill(~kept, -math.inf).softmax(-1) @ value[0])
    exact_out = torch.stack(parts)
    weights = grad_out[0, :group].float()
    exact = exact_out, *torch.autograd.grad(exact_out, (query, key, value), weights)
    return max(
        float((a[0, : b.shape[0]].detach().float() - b.detach()).norm() / b.detach().norm())
        for a, b in zip(ours, exact, strict=True)
    )


def time_on_gpu(function: Callable[[], Any], setting: Setting) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in milliseconds; the L2 cache is flushed between calls."""
    from triton.testing import do_bench

    times = do_bench(function, warmup=50, rep=setting.repetition_ms, return_mode="all")
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), low, high


def measure_on_gpu(
    attend: Attend, setting: Setting, useful_flop: float, **known: Any
) -> list[Measurement]:
    """Forward and backward of one implementation."""
    leaves, grad_out = make_inputs(setting)
    torch.cuda.synchronize()
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attend(*leaves)
    torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    torch.cuda.synchronize()
    peak_mib = (torch.cuda.max_memory_allocated() - resting) / 2**20
    with torch.no_grad():
        forward = time_on_gpu(lambda: attend(*leaves), setting)
    backward = time_on_gpu(
        lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True), setting
    )
    return [
        Measurement(
            **known,
            direction=direction,
            median_ms=times[0],
            low_ms=times[1],
            high_ms=times[2],
            useful_tflops=factor * useful_flop / times[0] / 1e9,
            peak_mib=peak_mib,
        )
        for direction, times, factor in (("forward", forward, 1.0), ("backward", backward, 2.5))
    ]


def seconds_of(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def index_milliseconds(attend: Attend, setting: Setting) -> float:
    """How much longer forward and backward take when the index is not known yet."""
    leaves, grad_out = make_inputs(setting)

    def both() -> None:
        torch.autograd.grad(attend(*leaves), leaves, grad_out)

    both()
    warm = seconds_of(both)
    clear_cache()
    return 1e3 * (seconds_of(both) - warm)


def gpu_measurements(
    setting: Setting, name: str, block_size: int, implementations: Sequence[str], bar: tqdm
) -> list[Measurement]:
    """All implementations on one layout."""
    layout, is_causal = make_layout(name, block_size, setting)
    capability = torch.cuda.get_device_capability()
    dtype = DTYPES[setting.dtype]
    sizes = tile_sizes(
        "cuda" if torch.version.hip is None else "hip",
        10 * capability[0] + capability[1],
        "forward",
        setting.head_dim,
        setting.head_dim,
        dtype.itemsize,
        layout.grain,
    )
    index = index_of(layout, is_causal, setting, sizes.tile_q, sizes.tile_kv)
    kept, computed = kept_and_computed(index, setting)
    length = setting.length_tokens
    possible = setting.heads * (length * (length + 1) // 2 if is_causal else length * length)
    useful_flop = 4.0 * setting.head_dim * kept * setting.batch
    mask = mask_function(name, layout, block_size, setting)
    measurements = []
    for implementation in implementations:
        bar.set_postfix_str(f"{name}, block {block_size}, {implementation}")
        known: dict[str, Any] = dict(
            layout=name,
            block_size=block_size,
            density=kept / possible,
            implementation=implementation,
        )
        try:
            if implementation == "ours":

                def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                    return block_sparse_attention(query, key, value, layout, is_causal=is_causal)

                known["index_ms"] = index_milliseconds(attend, setting)
                known["tile_efficiency"] = kept / computed
            elif implementation.startswith("flex"):
                attend = flex_attention(
                    mask, layout, is_causal, setting, block_size, "autotune" in implementation
                )
            else:
                backend = {
                    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
                    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
                }[implementation]
                attend = sdpa(backend, is_causal)
            if not implementation.startswith("sdpa") or name == "causal":
                error = relative_error(attend, mask, setting)
                if not error <= TOLERANCES[dtype]:
                    raise AssertionError(
                        f"{implementation} on {name}, block {block_size}, errs by {error:.2e}"
                    )
                known["relative_error"] = error
            measurements += measure_on_gpu(attend, setting, useful_flop, **known)
        except (RuntimeError, NotImplementedError) as refusal:
            # A peer that cannot run this case is a result; ours has to run.
            if implementation == "ours":
                raise
            failure = f"{type(refusal).__name__}: {str(refusal).strip().splitlines()[0][:200]}"
            measurements.append(Measurement(**known, direction="both", failure=failure))
        torch.cuda.empty_cache()
        bar.update()
    return measurements


def cpu_window(setting: Setting) -> int:
    """Tokens of the causal window that keeps CPU_DENSITY of the causal triangle."""
    return round(setting.length_tokens * (1 - math.sqrt(1 - CPU_DENSITY)))


def cpu_attention(implementation: str, setting: Setting) -> Attend:
    if implementation == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    layout = SlidingWindow(cpu_window(setting))
    return lambda q, k, v: block_sparse_attention(q, k, v, layout, is_causal=True, impl="torch")


def cpu_cost(implementation: str, direction: str, setting: Setting, repetitions: int) -> Cost:
    """Time and memory of one direction; the backward includes the forward's saved tensors, not its time."""
    leaves, grad_out = make_inputs(setting)
    attend = cpu_attention(implementation, setting)
    # A short call first loads the code that either implementation needs, which is no memory of the call itself.
    short = tuple(leaf[:, :, :256] for leaf in leaves)
    torch.autograd.grad(attend(*short).sum(), leaves)
    if direction == "forward":

        def function() -> None:
            with torch.no_grad():
                attend(*leaves)
    else:
        out = attend(*leaves)

        def function() -> None:
            torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    return measure_cost(function, device=torch.device("cpu"), repetitions=repetitions)


def cpu_error(setting: Setting) -> float:
    """Against dense attention with the same mask, at an eighth of the length, where that is cheap."""
    short = Setting(**{**asdict(setting), "length_tokens": max(1, setting.length_tokens // 8)})
    window = cpu_window(short)
    return relative_error(
        cpu_attention("ours", short), lambda b, h, q, kv: (q >= kv) & (q - kv < window), short
    )


def cpu_measurements(setting: Setting, repetitions: int) -> list[Measurement]:
    """Causal sliding window against dense causal SDPA."""
    window, length = cpu_window(setting), setting.length_tokens
    kept = setting.heads * sum(min(place + 1, window) for place in range(length))
    density = kept / (setting.heads * length * (length + 1) // 2)
    error = cpu_error(setting)
    if not error <= TOLERANCES[DTYPES[setting.dtype]]:
        raise AssertionError(f"ours errs by {error:.2e}")
    measurements = []
    cases = [(i, d) for d in ("forward", "backward") for i in ("ours", "sdpa")]
    for implementation, direction in tqdm(cases, desc="cases", unit="case"):
        costs = [
            in_fresh_process(cpu_cost, implementation, direction, setting, repetitions)
            for _ in range(CPU_PROCESSES)
        ]
        times = sorted(1e3 * second for cost in costs for second in cost.seconds)
        low, *_, high = (
            statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 2
        )
        factor = 1.0 if direction == "forward" else 2.5
        flop = factor * 4.0 * setting.head_dim * kept * setting.batch
        measurements.append(
            Measurement(
                layout=f"window{window}",
                block_size=1,
                density=density,
                implementation=implementation,
                direction=direction,
                median_ms=statistics.median(times),
                low_ms=low,
                high_ms=high,
                useful_tflops=flop / statistics.median(times) / 1e9,
                peak_mib=statistics.median(cost.added_bytes for cost in costs) / 2**20,
                relative_error=error if implementation == "ours" else None,
            )
        )
    return measurements


def index_measurements(setting: Setting) -> list[IndexMeasurement]:
    """Time and size of an index up to a million tokens."""
    rows = []
    for length in (1 << 14, 1 << 17, 1 << 20):
        clear_cache()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        long = replace(setting, batch=1, heads=16, length_tokens=length)
        index = index_of(BigBird(128), True, long, 128, 128)
        if setting.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        rows.append(IndexMeasurement(length, 16, seconds, index.num_tiles, index.num_bytes))
    clear_cache()
    return rows


def index_table(rows: Sequence[IndexMeasurement]) -> str:
    """One line per length."""
    lines = [
        f"{'BigBird index':>14}{'heads':>7}{'seconds':>9}{'tiles':>11}{'MiB':>8}{'bytes/tile':>12}"
    ]
    for row in rows:
        lines.append(
            f"{row.length_tokens:>14,}{row.heads:>7}{row.seconds:>9.3f}{row.num_tiles:>11,}"
            f"{row.index_bytes / 2**20:>8.2f}{row.index_bytes / row.num_tiles:>12.1f}"
        )
    return "\n".join(lines)


def table(measurements: Sequence[Measurement]) -> str:
    """One line per measurement."""
    header = (
        f"{'layout':<10}{'block':>6}{'density':>9}  {'implementation':<15}{'direction':<10}{'median ms':>10}"
        f"{'spread':>20}{'TFLOP/s':>9}{'tile eff.':>10}{'index ms':>10}{'peak MiB':>10}"
    )
    lines = [header, "-" * len(header)]

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for m in measurements:
        start = f"{m.layout:<10}{m.block_size:>6}{m.density:>9.3f}  {m.implementation:<15}"
        if m.failure is not None:
            lines.append(f"{start}refused: {m.failure[:90]}")
            continue
        spread = f"{m.low_ms:.3f}-{m.high_ms:.3f}"
        lines.append(
            f"{start}{m.direction:<10}{m.median_ms:>10.3f}{spread:>20}{m.useful_tflops:>9.3g}"
            f"{cell(m.tile_efficiency, '.2f'):>10}{cell(m.index_ms, '.1f'):>10}{cell(m.peak_mib, '.0f'):>10}"
        )
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, help="default: 16 on cuda, 8 on cpu")
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument(
        "--length-tokens",
        type=int,
        help="a multiple of 128; default: 16384 on cuda, 8192 on cpu",
    )
    parser.add_argument("--head-dim", type=int, help="default: 128 on cuda, 64 on cpu")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="cuda only")
    parser.add_argument(
        "--block-sizes",
        nargs="+",
        type=int,
        choices=(16, 32, 64, 128),
        default=(128, 64, 32, 16),
        help="cuda only; causal and window know no blocks and run once",
    )
    parser.add_argument(
        "--max-autotune",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also FlexAttention, autotuned (minutes per layout)",
    )
    parser.add_argument(
        "--baselines", action=argparse.BooleanOptionalAction, default=True, help="cuda only"
    )
    parser.add_argument(
        "--index-only",
        action="store_true",
        help="time the index alone, which every run begins with",
    )
    parser.add_argument("--repetition-ms", type=int, default=200, help="per measurement, cuda only")
    parser.add_argument("--repetitions", type=int, default=5, help="per measurement, cpu only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark.json"))
    arguments = parser.parse_args(argv)
    on_gpu = arguments.device == "cuda"
    for name, on_cuda, on_cpu in (
        ("dtype", "bfloat16", "float32"),
        ("heads", 16, 8),
        ("length_tokens", 16384, 8192),
        ("head_dim", 128, 64),
    ):
        if getattr(arguments, name) is None:
            setattr(arguments, name, on_cuda if on_gpu else on_cpu)
    if arguments.kv_heads is None:
        arguments.kv_heads = arguments.heads
    if arguments.length_tokens % 128:
        parser.error(
            f"--length-tokens got {arguments.length_tokens}; it must be a multiple of 128, so that every tile is whole; "
            f"use {-(-arguments.length_tokens // 128) * 128}."
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_args(argv)
    setting = Setting(
        device=arguments.device,
        dtype=arguments.dtype,
        batch=arguments.batch,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        length_tokens=arguments.length_tokens,
        head_dim=arguments.head_dim,
        repetition_ms=arguments.repetition_ms,
        seed=arguments.seed,
    )
    environment = describe_environment(torch.device(setting.device))
    start = time.perf_counter()
    measurements: list[Measurement] = []
    index = index_measurements(setting)
    print(index_table(index), flush=True)

    def write() -> None:
        record = RunRecord(
            version=FORMAT_VERSION,
            script=Path(__file__).name,
            arguments=to_plain(
                {name: v.name if isinstance(v, Path) else v for name, v in vars(arguments).items()}
            ),
            seed=setting.seed,
            environment=environment,
            timings_seconds={"measurements": time.perf_counter() - start},
            results=to_plain(Results(tuple(measurements), tuple(index))),
        )
        write_record(record, arguments.output)

    if arguments.index_only:
        write()
        return
    if setting.device == "cpu":
        measurements = cpu_measurements(setting, arguments.repetitions)
        write()
    else:
        implementations = ["ours"]
        if arguments.baselines:
            implementations += ["sdpa_flash", "sdpa_cudnn", "flex"]
        if arguments.max_autotune:
            implementations.append("flex_autotune")
        cases = [
            (name, block_size)
            for block_size in arguments.block_sizes
            for name in arguments.layouts
            if block_size == arguments.block_sizes[0] or name not in ("causal", "window")
        ]
        with tqdm(total=len(cases) * len(implementations), desc="cases", unit="case") as bar:
            for name, block_size in cases:
                measurements += gpu_measurements(setting, name, block_size, implementations, bar)
                write()  # what is measured stays, if a later case is cut off
    print(
        f"{environment.device} ({environment.processor}, {environment.cpu_threads} threads), "
        f"B{setting.batch} H{setting.heads}/{setting.kv_heads} S{setting.length_tokens} D{setting.head_dim} {setting.dtype}"
    )
    print(table(measurements))
    print(f"Written to {arguments.output}.")


if __name__ == "__main__":
    main()
