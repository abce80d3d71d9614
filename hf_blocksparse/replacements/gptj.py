"""GPT-J: rotary positions in pairs of neighbours."""

from __future__ import annotations

from torch import Tensor
from transformers.models.gptj.modeling_gptj import GPTJAttention

from hf_blocksparse.replacements.base import ReplacedAttention


class BlockSparseGPTJAttention(ReplacedAttention, GPTJAttention):
    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        out = self.attend(
            query,
            key,
            value,
            attention_mask,
            scaling=self.head_dim**-0.5,
            dropout=self.attn_dropout.p,
        )
        return out.transpose(1, 2), None
