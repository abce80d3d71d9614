"""Tiny seeded transformers models, and the judge of their sparse attention: transformers' own eager path with a dense mask."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from hf_blocksparse import Layout

VOCABULARY = 97
HEADS = 4

_HEADS = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GROUPED = dict(_HEADS, num_key_value_heads=2)
_WIDE = dict(_GROUPED, head_dim=16)
_MIXED = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_GROUPED, use_sliding_window=True, sliding_window=11, max_window_layers=1)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_WIDE, sliding_window=9)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_WIDE, sliding_window=9, query_pre_attn_scalar=24, attn_logit_softcapping=5.0
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_WIDE, sliding_window=9, layer_types=_MIXED)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=HEADS,
            n_positions=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_HEADS)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            max_position_embeddings=256,
        )
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**_HEADS)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**_HEADS)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **_WIDE,
            num_local_experts=3,
            num_experts_per_tok=2,
            sliding_window=9,
            layer_types=_MIXED,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_GROUPED, sliding_window=9)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_GROUPED)),
    "cohere2": lambda: Cohere2ForCausalLM(
        Cohere2Config(**_GROUPED, sliding_window=9, layer_types=_MIXED, logit_scale=1.0)
    ),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(
            **_HEADS,
            local_attention=10,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **_WIDE,
            intermediate_size_mlp=48,
            num_local_experts=2,
            attention_chunk_size=16,
            layer_types=["chunked_attention", "full_attention"],
        )
    ),
}
BIDIRECTIONAL = {"bert", "roberta", "modernbert"}


def make_model(family: str, implementation: str = "eager") -> PreTrainedModel:
    """A seeded model in evaluation mode whose weights are spread out, so that a wrong mask shows in the logits."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.set_attn_implementation(implementation)
    return model


def make_batch(length: int = 40, padded: bool = True) -> dict[str, Tensor]:
    """Three rows: padded left, padded right, whole."""
    torch.manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (3, length))
    if not padded:
        return {"input_ids": input_ids}
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :7] = 0
    attention_mask[1, -9:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()


@contextmanager
def eager_attention_within(
    layout: Layout, *, is_causal: bool, positions: Tensor | None = None
) -> Iterator[None]:
    """transformers' eager masks, intersected with `layout` evaluated at the position of each token in its sequence.

    Args:
        layout: free of `PerLayer`.
        is_causal: no token reads a later one; layouts may differ with it.
        positions: [batch, length], for packed documents; counted from the first real token otherwise.
    """
    table = layout.to_mask(128, is_causal=is_causal, num_heads=HEADS)

    def mask_within(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, **kwargs):
        allowed = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )
        query = (torch.arange(q_length) + q_offset).expand(batch_size, -1)
        key = (torch.arange(kv_length) + kv_offset).expand(batch_size, -1)
        if positions is not None:
            query, key = positions, positions
        elif kwargs.get("attention_mask") is not None:
            anchor = kwargs["attention_mask"].int().argmax(1, keepdim=True)
            query, key = query - anchor, key - anchor
        real = (query >= 0)[:, None, :, None] & (key >= 0)[:, None, None, :]
        kept = table[:, query.clamp(min=0)[:, :, None], key.clamp(min=0)[:, None, :]]
        allowed = allowed & real & kept.transpose(0, 1)
        dtype = kwargs.get("dtype", torch.float32)
        return torch.where(allowed, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)

    AttentionMaskInterface.register("eager", mask_within)
    try:
        yield
    finally:
        AttentionMaskInterface.register("eager", eager_mask)
