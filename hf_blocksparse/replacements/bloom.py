"""Bloom: fused projections, ALiBi."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Cache
from transformers.models.bloom.modeling_bloom import BloomAttention

from hf_blocksparse.replacements.base import (
    ReplacedAttention,
    geometric_slopes,
    refuse_padding_between_tokens,
)


class BlockSparseBloomAttention(ReplacedAttention, BloomAttention):
    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        refuse_padding_between_tokens(attention_mask)
        out = self.attend(
            query,
            key,
            value,
            attention_mask,
            scaling=self.inv_norm_factor,
            dropout=self.attention_dropout.p,
            alibi_slopes=geometric_slopes(self.num_heads, query.device),
        )
        out = nn.functional.dropout(self.dense(out.flatten(2)), self.hidden_dropout, self.training)
        return residual + out, None
