"""CodeGen: GPT-J with fused projections. Queries and keys may come in float32, and are cast to the dtype of the weights."""

from __future__ import annotations

from torch import Tensor
from transformers.models.codegen.modeling_codegen import CodeGenAttention

from hf_blocksparse.replacements.base import ReplacedAttention


class BlockSparseCodeGenAttention(ReplacedAttention, CodeGenAttention):
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
