"""Falcon: fused projections of grouped or single key heads; rotary positions, or ALiBi within the scale.

The model adds its ALiBi to the mask, and in eager attention a second time to the scores; what is computed here is its sdpa attention.
There the bias of position j is rounded to bfloat16, here only the slope is: they differ past position 256.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from hf_blocksparse.replacements.base import (
    ReplacedAttention,
    Setting,
    constant,
    geometric_slopes,
    refuse_padding_between_tokens,
)


@lru_cache(maxsize=64)
def _slopes(num_heads: int, scale: float, device: torch.device) -> Tensor:
    rounded = geometric_slopes(num_heads, torch.device("cpu")).bfloat16()
    return constant([slope * scale for slope in rounded.tolist()], device)


class BlockSparseFalconAttention(ReplacedAttention, FalconAttention):
    @classmethod
    def settings_around(cls, model: PreTrainedModel) -> list[Setting]:
        # With it, the model would write its bias into the mask.
        return [(model, "use_alibi", False)]

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        fused = self.query_key_value(hidden_states)
        query, key, value = (part.transpose(1, 2) for part in self._split_heads(fused))
        slopes = None
        if self.config.alibi:
            refuse_padding_between_tokens(attention_mask)
            slopes = _slopes(self.num_heads, self.inv_norm_factor, query.device)
        else:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out = self.attend(
            query,
            key,
            value,
            attention_mask,
            scaling=self.inv_norm_factor,
            dropout=self.attention_dropout.p if self.config.alibi else 0.0,
            alibi_slopes=slopes,
        )
        return self.dense(out.flatten(2)), None
