"""Time and peak memory of block-sparse causal attention beside `torch.nn.MultiheadAttention`, same weights, same input.

    python scripts/memory_vs_dense.py
    python scripts/memory_vs_dense.py --device cpu --batch-size 1 --length-tokens 512 --embedding-size 256 --repetitions 3

The setting is that of xFormers' page on BlockSparseAttention: batch 2, 2048 tokens, embedding 1024, 8 heads, causal layout of 32-blocks,
float16 (float32 on a CPU, where float16 is slow). That page compared with `MultiheadAttention` given a 0/1 float mask, which torch adds
to the scores, so that nothing is masked, and with the attention weights returned (need_weights=True). That form is measured as it
was published, and beside it the two forms that compute causal attention; the column "max difference" tells which ones do.

Every form runs in a process of its own, dropout is the same in all, and peak memory includes weights and input. The GPU column is
what torch's allocator handed out, the CPU column the resident set of the process, Python and torch included.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_blocksparse import BlockSparseAttention, MultiHeadDispatch
from hf_blocksparse.attention import Implementation
from hf_blocksparse.evaluation import Cost, in_fresh_process, measure_cost
from hf_blocksparse.run_record import (
    FORMAT_VERSION,
    RunRecord,
    describe_environment,
    to_plain,
    write_record,
)

FORMS = {
    "sparse_causal": "block-sparse, causal=True",
    "sparse_mask": "block-sparse, 0/1 att_mask (as published)",
    "dense_published": "MultiheadAttention, 0/1 mask added, weights returned (as published)",
    "dense_mask": "MultiheadAttention, boolean mask, need_weights=False",
    "dense_causal": "MultiheadAttention, is_causal=True, need_weights=False",
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    device: str
    dtype: str
    batch_size: int
    length_tokens: int
    embedding_size: int
    num_heads: int
    block_size: int
    dropout: float
    impl: Implementation
    warmup: int
    repetitions: int
    seed: int


@dataclass(frozen=True)
class Measurement:
    """One form in one direction.

    Attributes:
        form: key of `FORMS`.
        direction: "forward" or "forward_backward".
        max_difference: largest difference of the output, without dropout, from that of the form dense_causal.
        output_magnitude: largest absolute output of dense_causal, to judge the difference by.
    """

    form: str
    direction: str
    max_difference: float
    output_magnitude: float
    cost: Cost


@dataclass(frozen=True)
class Results:
    measurements: tuple[Measurement, ...]


def build_sparse(setting: Setting, *, causal: bool) -> MultiHeadDispatch:
    blocks = -(-setting.length_tokens // setting.block_size)
    torch.manual_seed(setting.seed)
    attention = BlockSparseAttention(
        layout=torch.tril(torch.ones([setting.num_heads, blocks, blocks])),
        block_size=setting.block_size,
        dropout=setting.dropout,
        num_heads=setting.num_heads,
        causal=causal,
        impl=setting.impl,
    )
    module = MultiHeadDispatch(
        seq_len=setting.length_tokens,
        dim_model=setting.embedding_size,
        residual_dropout=0.0,  # torch's module has none
        num_heads=setting.num_heads,
        attention=attention,
    )
    return module.to(setting.device, DTYPES[setting.dtype])


def build_dense(setting: Setting) -> nn.MultiheadAttention:
    """torch's module with the weights of `build_sparse`."""
    source = build_sparse(setting, causal=True).state_dict()
    module = nn.MultiheadAttention(
        setting.embedding_size,
        setting.num_heads,
        dropout=setting.dropout,
        batch_first=True,
        device=setting.device,
        dtype=DTYPES[setting.dtype],
    )
    inputs = ("q_proj", "k_proj", "v_proj")
    with torch.no_grad():
        for kind in ("weight", "bias"):
            parts = [source[f"in_proj_container.{name}.{kind}"] for name in inputs]
            getattr(module, f"in_proj_{kind}").copy_(torch.cat(parts))
            getattr(module.out_proj, kind).copy_(source[f"proj.{kind}"])
    return module


def build_form(setting: Setting, form: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The module of a form, and its call from the hidden states to the output."""
    if form == "sparse_causal":
        sparse = build_sparse(setting, causal=True)
        return sparse, lambda hidden: sparse(query=hidden, key=hidden, value=hidden)

    square = (setting.length_tokens, setting.length_tokens)
    if form in ("sparse_mask", "dense_published"):
        lower = torch.tril(torch.ones(square, dtype=DTYPES[setting.dtype], device=setting.device))
        if form == "sparse_mask":
            sparse = build_sparse(setting, causal=False)
            return sparse, lambda hidden: sparse(
                query=hidden, key=hidden, value=hidden, att_mask=lower
            )
        dense = build_dense(setting)
        return dense, lambda hidden: dense(hidden, hidden, hidden, attn_mask=lower)[0]

    dense = build_dense(setting)
    future = torch.ones(square, dtype=torch.bool, device=setting.device).triu(1)
    return dense, lambda hidden: dense(
        hidden,
        hidden,
        hidden,
        attn_mask=future,
        need_weights=False,
        is_causal=form == "dense_causal",
    )[0]


def measure_form(setting: Setting, form: str, direction: str) -> Measurement:
    """Measure one form; to be called in a fresh process."""
    device = torch.device(setting.device)
    module, call = build_form(setting, form)
    generator = torch.Generator(device).manual_seed(setting.seed)
    shape = (setting.batch_size, setting.length_tokens, setting.embedding_size)
    hidden = torch.randn(
        shape, generator=generator, device=device, dtype=DTYPES[setting.dtype]
    ).requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            call(hidden)

    def forward_backward() -> None:
        module.zero_grad(set_to_none=True)
        hidden.grad = None
        result = call(hidden)
        result.backward(hidden.detach())

    cost = measure_cost(
        forward if direction == "forward" else forward_backward,
        device=device,
        repetitions=setting.repetitions,
        warmup=setting.warmup,
    )
    # Not with eval(): there torch's module takes a fused path of its own.
    exact = replace(setting, dropout=0.0)
    with torch.no_grad():
        result, expected = (
            build_form(exact, name)[1](hidden).double() for name in (form, "dense_causal")
        )
    return Measurement(
        form=form,
        direction=direction,
        max_difference=(result - expected).abs().max().item(),
        output_magnitude=expected.abs().max().item(),
        cost=cost,
    )


def table(results: Results) -> str:
    """The measurements as text, one line per form and direction."""
    lines = []
    for direction, title in (("forward", "forward"), ("forward_backward", "forward + backward")):
        rows = [m for m in results.measurements if m.direction == direction]
        memory = "RSS" if rows[0].cost.memory_kind == "process resident set" else "allocated"
        lines.append(
            f"{title:<68} {'median ms':>9} {'min ms':>8} {'max ms':>8} {'peak ' + memory:>14} "
            f"{'added':>10} {'max difference':>14}"
        )
        for row in rows:
            cost = row.cost
            lines.append(
                f"{FORMS[row.form]:<68} {cost.median_seconds * 1e3:9.3f} {min(cost.seconds) * 1e3:8.3f} "
                f"{max(cost.seconds) * 1e3:8.3f} {cost.peak_bytes / MIB:10.1f} MiB {cost.added_bytes / MIB:6.1f} MiB "
                f"{row.max_difference:14.2e}"
            )
        lines.append("")
    lines.append(
        "added: peak minus what lay there before the first call. max difference: of the output, from causal attention by torch "
        f"(outputs reach {results.measurements[0].output_magnitude:.2f})."
    )
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: float16 on cuda, else float32",
    )
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length-tokens", type=int, default=2048)
    parser.add_argument("--embedding-size", type=int, default=1024)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="on the attention weights, in all forms"
    )
    parser.add_argument("--impl", choices=get_args(Implementation), default="auto")
    parser.add_argument("--warmup", type=int, default=None, help="default: 10 on cuda, 1 on cpu")
    parser.add_argument(
        "--repetitions", type=int, default=None, help="default: 100 on cuda, 7 on cpu"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/memory_vs_dense.json"))
    return parser.parse_args(argv)


def resolve(arguments: argparse.Namespace) -> Setting:
    """Replace every `auto` by what it stands for on this machine."""
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = "float16" if on_gpu else "float32"
    default_warmup, default_repetitions = (10, 100) if on_gpu else (1, 7)
    return Setting(
        device=device,
        dtype=dtype,
        batch_size=arguments.batch_size,
        length_tokens=arguments.length_tokens,
        embedding_size=arguments.embedding_size,
        num_heads=arguments.num_heads,
        block_size=arguments.block_size,
        dropout=arguments.dropout,
        impl=arguments.impl,
        warmup=default_warmup if arguments.warmup is None else arguments.warmup,
        repetitions=default_repetitions if arguments.repetitions is None else arguments.repetitions,
        seed=arguments.seed,
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_args(argv)
    setting = resolve(arguments)
    environment = describe_environment(torch.device(setting.device))
    start = time.perf_counter()
    cases = [(form, direction) for direction in ("forward", "forward_backward") for form in FORMS]
    measurements = tuple(
        in_fresh_process(measure_form, setting, form, direction)
        for form, direction in tqdm(cases, desc="forms", unit="form")
    )
    results = Results(measurements)
    record = RunRecord(
        version=FORMAT_VERSION,
        script=Path(__file__).name,
        arguments=asdict(setting),
        seed=setting.seed,
        environment=environment,
        timings_seconds={"measurements": time.perf_counter() - start},
        results=to_plain(results),
    )
    write_record(record, arguments.output)
    print(
        f"{environment.device} ({environment.processor}, {environment.cpu_threads} threads), "
        f"{setting.dtype}, batch {setting.batch_size}, {setting.length_tokens} tokens, embedding {setting.embedding_size}, "
        f"{setting.num_heads} heads, blocks of {setting.block_size}, {setting.repetitions} repetitions\n"
    )
    print(table(results))
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
