"""Every language model that transformers' auto classes know, tiny and random: does it compute what its layout says, or say why not?

A family is built from its default configuration with small sizes; what cannot be built so is recorded as that. A model that is patched
must compute with `Dense()` what it computed before, with a window what eager attention computes within it (a batch with padding), or, where
its eager attention takes no mask from transformers' mask functions, what does not depend on tokens out of reach; and unpatching must
bring back its logits bit for bit. Anything else has to be an error that says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import (
    VOCABULARY,
    eager_attention_within,
    make_batch,
    real_tokens,
    spread_weights,
)
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)

import hf_blocksparse as bs

MAPPINGS = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING, "masked": MODEL_FOR_MASKED_LM_MAPPING}
WINDOW = 8
LAYOUT = bs.SlidingWindow(WINDOW)
LENGTH = 96
LAYERS = (2, 4, 8)  # the fewest with which a mix of attention and other layers has attention
MOST_PARAMETERS = 20_000_000
# Of the largest logit: what rounding moves it by, and what it may at most move it by between transformers' own implementations.
TOLERANCE, JUDGED_BELOW = 5e-5, 2e-3

WORKS, REFUSED, NOT_BUILT, WRONG = "works", "refused", "not built", "wrong"

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


@dataclass(frozen=True)
class Verdict:
    """What became of a family, and why."""

    outcome: str
    reason: str = ""


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


def examine(kind: str, config_class: type, model_class: type[PreTrainedModel]) -> Verdict:
    """Build one family and judge it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failure = ""
        for layers in LAYERS:
            try:
                model = build(kind, config_class, model_class, layers)
                before = logits(model)
            except NotBuiltError as error:
                failure = str(error)
            # Whatever it is: the model does not run before it is patched either.
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            else:
                return judge(model, kind == "causal", before)
    return Verdict(NOT_BUILT, first_line(failure))


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


def judge(model: PreTrainedModel, is_causal: bool, before: list[Tensor]) -> Verdict:
    try:
        bs.patch_model(model, bs.Dense(), impl="torch")
        dense = logits(model)
        bs.unpatch_model(model)
        if not all(map(torch.equal, logits(model), before)):
            return Verdict(WRONG, "unpatching does not bring back the logits")
        bs.patch_model(model, LAYOUT, impl="torch")
        sparse = logits(model)
        bs.unpatch_model(model)
    except (NotImplementedError, ValueError) as error:
        return Verdict(REFUSED, first_line(str(error)))
    except Exception as error:
        return Verdict(WRONG, f"{type(error).__name__}: {first_line(str(error))}")
    eager = eager_logits(model, is_causal)
    noise = [TOLERANCE] * len(before)
    if eager is not None:
        # Recurrent layers make much of rounding, and carry on what eager attention makes of rows without a key: means.
        noise = [max(TOLERANCE, 5 * each) for each in distances(eager[0], before)]
    judged = [each < JUDGED_BELOW for each in noise]

    def is_far(actual: list[Tensor], expected: list[Tensor]) -> bool:
        far = zip(judged, distances(actual, expected), noise, strict=True)
        return any(is_judged and distance > bound for is_judged, distance, bound in far)

    if not any(judged):
        return Verdict(
            NOT_BUILT, "transformers' own attention implementations differ by more than rounding"
        )
    if is_far(dense, before):
        return Verdict(WRONG, "a dense layout changes the logits")
    if eager is None or not is_far(eager[1], eager[0]):
        return judge_by_reach(model, is_causal)
    if is_far(sparse, eager[1]):
        return Verdict(WRONG, "a window is not what eager attention computes within it")
    return Verdict(WORKS)


def eager_logits(
    model: PreTrainedModel, is_causal: bool
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Of eager attention, dense and within the window; None where there is no eager attention."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        dense = logits(model)
        with eager_attention_within(LAYOUT, is_causal=is_causal):
            return dense, logits(model)
    except Exception:
        return None
    finally:
        model.set_attn_implementation(before)


def judge_by_reach(model: PreTrainedModel, is_causal: bool) -> Verdict:
    """Tokens that no chain of windows leads to change nothing; the nearest ones do."""
    if model.config.get_text_config().num_hidden_layers > LAYERS[0]:
        return Verdict(
            NOT_BUILT, "layers that are not attention, and no eager attention to compare with"
        )
    batch = make_batch(LENGTH, padded=False)
    bs.patch_model(model, LAYOUT, impl="torch")
    before = torch.stack(logits(model, batch))
    changed = 10
    batch["input_ids"][:, changed] = VOCABULARY - 1 - batch["input_ids"][:, changed] // 2
    moved = (torch.stack(logits(model, batch)) - before).abs().amax((0, 2))
    bound = TOLERANCE * float(before.abs().max())
    if moved[changed : changed + WINDOW].max() <= bound:
        return Verdict(WRONG, "a changed token changes nothing")
    reach = changed + LAYERS[0] * WINDOW
    if moved[reach:].max() > bound or (is_causal and moved[:changed].max() > bound):
        return Verdict(WRONG, "a token out of reach matters")
    return Verdict(WORKS, "judged by what a changed token changes")


def distances(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    """By batch row: the largest difference, of the largest expected logit."""
    return [
        float((one - other).abs().max() / other.abs().max())
        for one, other in zip(actual, expected, strict=True)
    ]


def first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:240]
