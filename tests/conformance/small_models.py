"""Every language model that transformers' auto classes know, tiny and random, as transformers alone makes and runs it.

    python tests/conformance/small_models.py FOLDER [--families NAME ...]

writes what each family computes, or why it is not built, in a process that never imports `hf_blocksparse`: what the sweep finds beside
that import has to be the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from conformance.verdict import described, first_line  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import VOCABULARY, make_batch, real_tokens, spread_weights  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)

MAPPINGS = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING, "masked": MODEL_FOR_MASKED_LM_MAPPING}
LENGTH = 96
LAYERS = (2, 4, 8)  # the fewest with which a mix of attention and other layers has attention
MOST_PARAMETERS = 20_000_000

SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    n_embd=64,
    n_head=4,
    n_positions=256,
    n_inner=96,
    d_model=64,
    num_heads=4,
    n_heads=4,
    ffn_dim=96,
    d_ff=96,
    d_kv=16,
    embedding_size=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
    rotary_dim=8,
    # Every token goes to every expert: rounding in attention must not choose others.
    num_experts=2,
    num_local_experts=2,
    n_routed_experts=2,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=VOCABULARY,
)
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
NO_DROPOUT = (
    "dropout attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop activation_dropout hidden_dropout_prob "
    "attention_probs_dropout_prob"
).split()

OF_FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
}


class NotBuiltError(Exception):
    """The family needs more than small sizes to be built and run."""


def families() -> Iterator[tuple[str, str, type, type[PreTrainedModel]]]:
    """(kind, model type, configuration class, model class) of every family."""
    for kind, mapping in MAPPINGS.items():
        for config_class in mapping:
            model_class = mapping[config_class]
            if isinstance(model_class, tuple):
                model_class = model_class[0]
            yield kind, config_class.model_type, config_class, model_class


def build(
    kind: str, config_class: type, model_class: type[PreTrainedModel], layers: int
) -> PreTrainedModel:
    sizes = dict(SMALL, **dict.fromkeys(LAYER_COUNTS, layers), **dict.fromkeys(NO_DROPOUT, 0.0))
    if kind == "causal":
        sizes["is_decoder"] = True
    if hasattr(config_class, "qk_rope_head_dim"):
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= OF_FAMILIES.get(config_class.model_type, {})
    config = configure(config_class, sizes)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise NotBuiltError(f"{count:,} parameters with small sizes")
    torch.manual_seed(0)
    model = spread_weights(model_class(config).eval())
    if model.get_input_embeddings().weight.shape[0] < VOCABULARY:
        raise NotBuiltError("a vocabulary of its own")
    return model


def configure(config_class: type, sizes: dict[str, Any]) -> Any:
    """A configuration of these sizes, without those that it refuses by name."""
    sizes = dict(sizes)
    while True:
        try:
            return config_class(**sizes)
        except Exception as error:
            refused = [name for name in sizes if name in str(error)]
            if not refused:
                raise NotBuiltError(f"{type(error).__name__}: {error}") from error
            for name in refused:
                del sizes[name]


@torch.no_grad()
def logits(model: PreTrainedModel, batch: dict[str, Tensor] | None = None) -> list[Tensor]:
    """By batch row, at its real tokens; the first row is padded left, the second right."""
    batch = make_batch(LENGTH) if batch is None else batch
    made, real = model(**batch).logits, real_tokens(batch)
    if made.shape[:2] != real.shape:
        raise NotBuiltError(f"logits of shape {tuple(made.shape)} for {tuple(real.shape)} tokens")
    rows = [row[is_real] for row, is_real in zip(made, real, strict=True)]
    if not all(row.isfinite().all() for row in rows):
        raise NotBuiltError("logits that are not finite")
    return rows


def make(
    kind: str, config_class: type, model_class: type[PreTrainedModel]
) -> tuple[PreTrainedModel, list[Tensor]]:
    """A family with as few layers as it runs with, and its logits. Raises NotBuiltError where it does with none of `LAYERS`."""
    failure = ""
    for layers in LAYERS:
        try:
            model = build(kind, config_class, model_class, layers)
            return model, logits(model)
        except NotBuiltError as error:
            failure = str(error)
        # Whatever it is: the model does not run.
        except Exception as error:
            failure = described(error)
    raise NotBuiltError(first_line(failure))


# By kind and name: the logits of each row, or why a family is not built.
Alone = dict[tuple[str, ...], list[Tensor] | str]


def read_alone(folder: Path) -> Alone:
    """What this script wrote to `folder`."""
    failures: dict[str, str] = json.loads((folder / "failures.json").read_text())
    rows: dict[str, list[Tensor]] = {}
    for name, row in sorted(load_file(folder / "logits.safetensors").items()):
        rows.setdefault(name.rpartition("/")[0], []).append(row)
    return {tuple(key.split("/")): made for key, made in (failures | rows).items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--families", nargs="+", default=None, metavar="NAME")
    args = parser.parse_args(argv)
    from transformers.utils import logging

    # What families say of sizes they were not made for is theirs to say.
    logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    failures: dict[str, str] = {}
    rows: dict[str, Tensor] = {}
    for kind, name, config_class, model_class in families():
        if args.families and name not in args.families:
            continue
        try:
            _, made = make(kind, config_class, model_class)
        except NotBuiltError as error:
            failures[f"{kind}/{name}"] = str(error)
        else:
            rows |= {f"{kind}/{name}/{place}": row.clone() for place, row in enumerate(made)}
    if "hf_blocksparse" in sys.modules:
        raise RuntimeError("hf_blocksparse was imported, whose absence is what this is for.")
    save_file(rows, args.folder / "logits.safetensors")
    (args.folder / "failures.json").write_text(json.dumps(failures))


if __name__ == "__main__":
    main()
