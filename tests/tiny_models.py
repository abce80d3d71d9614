"""Tiny seeded transformers models, and the judge of their sparse attention: transformers' own eager path with a dense mask."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
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
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

if TYPE_CHECKING:
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
# Every token goes to every expert: rounding in attention must not choose others.
_EXPERTS = dict(num_local_experts=2, num_experts_per_tok=2)
# Queries and keys of 12 + 4, values of 8.
_LATENT = dict(
    _HEADS,
    num_key_value_heads=HEADS,
    moe_intermediate_size=24,
    num_experts_per_tok=2,
    n_routed_experts=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=4,
    v_head_dim=8,
)

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_GROUPED, use_sliding_window=True, sliding_window=11, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**_WIDE, use_sliding_window=True, sliding_window=9, layer_types=_MIXED)
    ),
    "qwen3_next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **_WIDE,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            num_experts=2,
            num_experts_per_tok=2,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**_GROUPED, no_rope_layers=[1, 0])),
    "deepseek_v2": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**_LATENT)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**_LATENT)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_GROUPED, **_EXPERTS, sliding_window=9)),
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
            **_EXPERTS,
            sliding_window=9,
            layer_types=_MIXED,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_GROUPED, sliding_window=9)),
    "olmo": lambda: OlmoForCausalLM(OlmoConfig(**_GROUPED)),
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
            **_EXPERTS,
            intermediate_size_mlp=48,
            attention_chunk_size=16,
            layer_types=["chunked_attention", "full_attention"],
        )
    ),
}
BIDIRECTIONAL = {"bert", "roberta", "modernbert"}


def spread_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Spread the weights out, so that a wrong mask shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_model(family: str, implementation: str = "eager") -> PreTrainedModel:
    """A seeded model in evaluation mode."""
    torch.manual_seed(0)
    model = spread_weights(FAMILIES[family]().eval())
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


def _is_local(mask_function: object) -> bool:
    """Whether transformers' mask function has a window or chunks anywhere inside."""
    # Here, as models are also made where hf_blocksparse must not be imported.
    from hf_blocksparse.transformers_masks import NamedMaskFunction

    if isinstance(mask_function, tuple):
        return any(map(_is_local, mask_function))
    if not isinstance(mask_function, NamedMaskFunction):
        return False
    if mask_function.maker.startswith(("sliding_window", "chunked_overlay")):
        return True
    return _is_local(mask_function.arguments)


@contextmanager
def eager_attention_within(
    layout: "Layout",
    *,
    is_causal: bool,
    positions: Tensor | None = None,
    by_module: bool = False,
    keeps_sliding: bool = False,
) -> Iterator[None]:
    """transformers' eager attention, intersected with `layout` evaluated at the position of each token in its sequence.

    Args:
        layout: free of `PerLayer`.
        is_causal: no token reads a later one; layouts may differ with it.
        positions: [batch, length], for packed documents; counted from the first real token otherwise.
        by_module: change no mask, but the attention of the modules with the attribute `reads_within_layout`, whose positions are rows.
        keeps_sliding: masks with a window or chunks of their own are left alone.
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
        if not (keeps_sliding and _is_local(kwargs["mask_function"])):
            device = allowed.device
            query = (torch.arange(q_length, device=device) + q_offset).expand(batch_size, -1)
            key = (torch.arange(kv_length, device=device) + kv_offset).expand(batch_size, -1)
            if positions is not None:
                query = key = positions.to(device)
            elif kwargs.get("attention_mask") is not None:
                anchor = kwargs["attention_mask"].int().argmax(1, keepdim=True)
                query, key = query - anchor, key - anchor
            real = (query >= 0)[:, None, :, None] & (key >= 0)[:, None, None, :]
            rows, columns = query.clamp(min=0)[:, :, None], key.clamp(min=0)[:, None, :]
            kept = table.to(device)[:, rows, columns]
            allowed = allowed & real & kept.transpose(0, 1)
        dtype = kwargs.get("dtype", torch.float32)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )

    def attention_within(module, query, key, value, attention_mask, **kwargs):
        if getattr(module, "reads_within_layout", False):
            assert attention_mask is None or (attention_mask == 0).all()
            kept = table.to(query.device)[:, : query.shape[2], : key.shape[2]]
            attention_mask = query.new_zeros(kept.shape).masked_fill(~kept, float("-inf"))[None]
        own = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
        return own(module, query, key, value, attention_mask, **kwargs)

    if by_module:
        AttentionInterface.register("eager", attention_within)
    else:
        AttentionMaskInterface.register("eager", mask_within)
    try:
        yield
    finally:
        AttentionMaskInterface.register("eager", eager_mask)
        AttentionInterface._global_mapping.pop("eager", None)


# Logits are of order 5 and a wrong mask moves them by more than 0.1; fp32 rounding through two layers stays below this.
LOGITS = dict(atol=5e-5, rtol=1e-5)


def run(model, batch, **kwargs):
    """Logits at the real tokens, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(**batch, **kwargs).logits[real_tokens(batch)]
    torch.manual_seed(2)
    (logits * torch.randn_like(logits)).sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return logits.detach(), gradients


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], **LOGITS)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # A key's bias moves all scores of a row alike: its true gradient is 0, and its size that of rounding in its weight's.
        weight = expected[1].get(name.removesuffix("bias") + "weight", gradient)
        error = (actual[1][name] - gradient).norm()
        assert error <= 1e-4 * max(gradient.norm(), weight.norm()), (name, float(error))
