"""Choose the key-value heads that keep full attention; all others get a narrow layout. Writes a layout file.

    python scripts/calibrate.py --context_tokens 32768 --max_position_embeddings 32768 --dataset texts \\
        --density 0.25 --device cuda --dtype bfloat16 --output runs/heads.json
    python scripts/finetune.py --layout runs/heads.json ...

A few heads of a pretrained model do nearly all of its reading over long distances (retrieval heads, arXiv
2404.15574; DuoAttention, arXiv 2410.10819). They are found by a gate between full and narrow attention on
every key-value head and the loss's gradient by it, averaged along the way from all narrow to all full
(integrated gradients, arXiv 1703.01365), on training windows: of their ordinary loss, and of that of a passage
which is repeated after other text. Both count alike, each as a share of what full attention gains in all.
No weight is changed. Beside the layout goes a record with every head's share.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from attention_cost import autocast
from corpus import cut_windows
from evaluate import (
    check_context,
    check_folder,
    check_is_causal,
    find_device,
    find_source,
    read_text,
    recorded_arguments,
)
from help_text import HelpFormatter
from layout_argument import LAYOUT_HELP, read_layout
from pretrained import load_model, load_tokenizer
from protocol import ModelArguments, Phases, TextArguments, model_facts
from sparsify_results import ModelFacts
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    HfArgumentParser,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_blocksparse import Dense, Layout, PerHead, PerLayer, block_sparse_attention
from hf_blocksparse.evaluation import check_head, next_token_losses
from hf_blocksparse.run_record import (
    FORMAT_VERSION,
    RunRecord,
    describe_environment,
    to_plain,
    write_record,
)

GATED = "calibration_gates"
TEXT, COPIES = "text", "copies"


@dataclass
class CalibrateArguments:
    """What the heads get, what they are judged by, and what is written."""

    output: str = field(metadata={"help": "layout file to write, .json; the record goes beside it"})
    narrow: str = field(
        default="sink_window:sink=64,window=1024",
        metadata={"help": f"layout of the heads that are not chosen: {LAYOUT_HELP}"},
    )
    density: float = field(
        default=0.25, metadata={"help": "of the whole model at the context, at most"}
    )
    windows: int = field(default=4, metadata={"help": "training windows read"})
    path_points: int = field(
        default=4, metadata={"help": "gates at which the gradient is taken, between 0 and 1"}
    )
    copy_tokens: int | None = field(
        default=None, metadata={"help": "of the repeated passage; default: 1/32 of the context"}
    )
    gap_tokens: int | None = field(
        default=None, metadata={"help": "between passage and copy; default: 1/8 of the context"}
    )
    device: str = field(
        default="cpu", metadata={"choices": ["cpu", "cuda"], "help": "where it runs"}
    )
    dtype: str = field(
        default="float32",
        metadata={"choices": ["float32", "bfloat16"], "help": "computed in; weights stay float32"},
    )
    seed: int = field(default=0, metadata={"help": "of the choice of windows"})


@dataclass(frozen=True)
class HeadShares:
    """What full attention gains over the narrow layout on one kind of text, and which heads bring it.

    Attributes:
        kind: "text" or "copies".
        full_nll_nats, narrow_nll_nats: mean loss with full and with narrow attention in every head.
        shares: `[layer][key-value head]`, of the gain; they add up to about 1.
    """

    kind: str
    full_nll_nats: float
    narrow_nll_nats: float
    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class CalibrationResults:
    """The choice, and what it was made by.

    Attributes:
        full_heads: (layer, key-value head) of those that keep full attention, best first.
        density: of the whole model at the context.
        training_sha256: digest of the windows read.
    """

    model: ModelFacts
    context_tokens: int
    narrow: dict[str, Any]
    layout: dict[str, Any]
    density: float
    full_heads: tuple[tuple[int, int], ...]
    judged_by: tuple[HeadShares, ...]
    corpus: str
    training_documents: tuple[str, ...]
    training_sha256: str


@contextmanager
def gated_attention(model: PreTrainedModel, narrow: Layout, gates: Tensor) -> Iterator[None]:
    """Inside, head g of layer l computes `narrow + gates[l, g] * (full - narrow)`; gates `[layers, key-value heads]`."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
            if options.get(name) is not None:
                raise NotImplementedError(
                    f"model got {name}={options[name]!r:.60} in its attention; heads are chosen for plain causal attention only; "
                    "choose another model, or a layout by hand."
                )
        device = query.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        full = sdpa_attention_forward(
            module, query, key, value, None, scaling=scaling, is_causal=True
        )[0]
        sparse = block_sparse_attention(
            query, key, value, narrow, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
        gate = gates[module.layer_idx].repeat_interleave(query.shape[1] // key.shape[1])
        return (sparse + gate[:, None] * (full - sparse)).to(value.dtype), None

    before = model.config._attn_implementation
    AttentionInterface.register(GATED, attend)
    AttentionMaskInterface.register(GATED, lambda *sizes, **options: None)
    model.set_attn_implementation(GATED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def judge_heads(
    model: PreTrainedModel,
    narrow: Layout,
    windows: Tensor,
    *,
    kind: str,
    first_target: int,
    kv_heads: int,
    path_points: int,
    dtype: torch.dtype,
) -> HeadShares:
    """Share of every key-value head in what full attention gains on `windows` from `first_target` on."""
    device = next(model.parameters()).device
    num_layers = model.config.get_text_config().num_hidden_layers
    gates = torch.zeros(num_layers, kv_heads, device=device).requires_grad_()
    model.requires_grad_(False)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    gains = torch.zeros_like(gates, dtype=torch.float64)
    ends = dict.fromkeys((0.0, 1.0), 0.0)
    points = [(number + 0.5) / path_points for number in range(path_points)]
    bar = tqdm(total=len(windows) * (path_points + 2), desc=f"  {kind}", unit="pass")
    with gated_attention(model, narrow, gates):
        for window in windows:
            tokens = window[None].to(device)
            for point in (*ends, *points):
                with torch.no_grad():
                    gates.fill_(point)
                with torch.set_grad_enabled(point not in ends), autocast(device, dtype):
                    loss = next_token_losses(model, tokens, first_target=first_target).mean()
                if point in ends:
                    ends[point] += loss.item() / len(windows)
                else:
                    gains -= torch.autograd.grad(loss, gates)[0].double()
                bar.update()
    bar.close()
    gains /= path_points * len(windows)
    gain = ends[0.0] - ends[1.0]
    if gain > 0:
        gains /= gain
    return HeadShares(kind, ends[1.0], ends[0.0], tuple(map(tuple, gains.tolist())))


def rank_heads(judged: Sequence[HeadShares]) -> list[tuple[int, int]]:
    """All (layer, key-value head), the one with the highest sum of shares first."""
    counted = [each for each in judged if each.narrow_nll_nats > each.full_nll_nats]
    if not counted:
        raise ValueError(
            "narrow got a layout that loses nothing against full attention on this text; there is nothing to choose heads by; take a "
            "narrower layout, a longer context or text that needs it."
        )
    total = torch.tensor([each.shares for each in counted]).sum(0)
    order = total.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(number, total.shape[1]) for number in order]


def count_full(density: float, narrow_density: float, num_heads: int) -> int:
    """How many of `num_heads` may be full so that the mean stays at or below `density`."""
    if not narrow_density < density < 1:
        raise ValueError(
            f"density got {density}; it must lie between that of the narrow layout at this context, {narrow_density:.4f}, and 1; change it "
            "or the narrow layout."
        )
    return math.floor((density - narrow_density) / (1 - narrow_density) * num_heads + 1e-9)


def layout_with_full_heads(
    narrow: Layout,
    full: Sequence[tuple[int, int]],
    *,
    num_layers: int,
    kv_heads: int,
    query_heads: int,
) -> PerLayer:
    """`narrow` but for the query heads of the key-value heads in `full`; a layer that is full in all keeps the model's own attention."""
    layers: dict[int | str, Layout] = {}
    for layer in range(num_layers):
        is_full = [(layer, head) in full for head in range(kv_heads)]
        if not any(is_full):
            layers[layer] = narrow
        elif not all(is_full):
            group = query_heads // kv_heads
            layers[layer] = PerHead(
                tuple(Dense() if each else narrow for each in is_full for _ in range(group))
            )
    return PerLayer(layers)


def copies_of(windows: Tensor, copy_tokens: int, gap_tokens: int) -> Tensor:
    """[passage][other text][passage]: the passage starts a window, the text between is another window's."""
    passages = windows[:, :copy_tokens]
    between = windows.roll(1, 0)[:, copy_tokens : copy_tokens + gap_tokens]
    return torch.cat((passages, between, passages), 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser(
        (ModelArguments, TextArguments, CalibrateArguments),
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    model_arguments, text, arguments = parser.parse_args_into_dataclasses(
        None if argv is None else list(argv)
    )
    output, context = Path(arguments.output), text.context_tokens
    copy = context // 32 if arguments.copy_tokens is None else arguments.copy_tokens
    gap = context // 8 if arguments.gap_tokens is None else arguments.gap_tokens
    if output.suffix != ".json" or output.exists():
        raise ValueError(
            f"output got {output}; it must be a new file that ends in .json; choose another."
        )
    check_folder("output", output.parent)
    if arguments.windows < 2 or arguments.path_points < 1:
        raise ValueError(
            f"windows and path_points got {arguments.windows} and {arguments.path_points}; "
            "they must be at least 2 and 1; raise them."
        )
    if copy < 2 or gap < 1 or copy + gap > context:
        raise ValueError(
            f"copy_tokens and gap_tokens got {copy} and {gap}; passage (2 or more) and gap (1 or more) must fit into the "
            f"{context} tokens of a window; change them."
        )
    device, dtype = find_device(arguments.device), getattr(torch, arguments.dtype)
    narrow = read_layout(arguments.narrow)
    if isinstance(narrow, PerLayer | PerHead):
        raise ValueError(
            f"narrow got {narrow!r:.80}; heads are chosen one by one, so it must be one layout for all; name a plain one."
        )
    environment = describe_environment(device)
    phases = Phases()
    with tempfile.TemporaryDirectory() as temporary:
        with phases("load the model"):
            source = find_source(model_arguments, Path(temporary))
            model = load_model(source.path, device)
            tokenizer = load_tokenizer(source.path)
            facts = model_facts(model, source)
            check_context(context, facts)
            check_is_causal(model)
            with torch.no_grad():
                check_head(model, torch.arange(8, device=device)[None])
            narrow_density = narrow.density(context, is_causal=True, num_heads=facts.query_heads)
            num_full = count_full(
                arguments.density, narrow_density, facts.num_layers * facts.kv_heads
            )
        with phases("read the text"):
            corpus = read_text(text)
            _, windows = cut_windows(
                corpus,
                tokenizer,
                window_tokens=context,
                num_held_out=0,
                num_training=arguments.windows,
                seed=arguments.seed,
            )
        judged = []
        for kind, tokens, first in (
            (TEXT, windows.tokens, context // 4),
            (COPIES, copies_of(windows.tokens, copy, gap), copy + gap + 1),
        ):
            with phases(f"judge heads by {kind}"):
                judged.append(
                    judge_heads(
                        model,
                        narrow,
                        tokens,
                        kind=kind,
                        first_target=first,
                        kv_heads=facts.kv_heads,
                        path_points=arguments.path_points,
                        dtype=dtype,
                    )
                )
    full = rank_heads(judged)[:num_full]
    layout = layout_with_full_heads(
        narrow,
        full,
        num_layers=facts.num_layers,
        kv_heads=facts.kv_heads,
        query_heads=facts.query_heads,
    )
    share_full = num_full / (facts.num_layers * facts.kv_heads)
    results = CalibrationResults(
        model=facts,
        context_tokens=context,
        narrow=narrow.to_dict(),
        layout=layout.to_dict(),
        density=share_full + (1 - share_full) * narrow_density,
        full_heads=tuple(full),
        judged_by=tuple(judged),
        corpus=corpus.name,
        training_documents=windows.documents,
        training_sha256=windows.sha256,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(layout.to_dict()) + "\n", encoding="utf-8")
    record = output.with_suffix(".record.json")
    write_record(
        RunRecord(
            version=FORMAT_VERSION,
            script=Path(__file__).name,
            arguments=recorded_arguments(model_arguments, text, arguments, output=output.name),
            seed=arguments.seed,
            environment=environment,
            timings_seconds=phases.seconds,
            results=to_plain(results),
        ),
        record,
    )
    for each in judged:
        kept = sum(each.shares[layer][head] for layer, head in full)
        print(
            f"{each.kind}: loss {each.full_nll_nats:.4f} full, {each.narrow_nll_nats:.4f} narrow; "
            f"the chosen heads have {kept:.0%} of the gain"
        )
    print(f"full heads (layer, key-value head): {sorted(full)}")
    print(f"density {results.density:.4f} at {context:,} tokens; {output}, {record}")


if __name__ == "__main__":
    main()
