"""MPT: fused and clipped projections, ALiBi with slopes of its own."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.models.mpt.modeling_mpt import MptAttention

from hf_blocksparse.replacements.base import ReplacedAttention, cache_among, constant

# transformers' model takes its function's default, whatever the configuration says.
_BIAS_MAX = 8


@lru_cache(maxsize=64)
def _slopes(num_heads: int, device: torch.device) -> Tensor:
    power = 1 << (num_heads - 1).bit_length()
    slopes = [2.0 ** (-_BIAS_MAX * (head + 1) / power) for head in range(power)]
    if power != num_heads:
        slopes = (slopes[1::2] + slopes[::2])[:num_heads]
    return constant(slopes, device)


class BlockSparseMptAttention(ReplacedAttention, MptAttention):
    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        fused = self.Wqkv(hidden_states)
        if self.clip_qkv:
            fused = fused.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (
            part.unflatten(2, (self.n_heads, self.head_dim)).transpose(1, 2)
            for part in fused.chunk(3, 2)
        )
        if (cache := cache_among(kwargs)) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        out = self.attend(
            query,
            key,
            value,
            attention_mask,
            scaling=self.softmax_scale,
            dropout=self.attn_dropout_p,
            alibi_slopes=_slopes(self.n_heads, query.device),
        )
        return self.out_proj(out.flatten(2)), None
