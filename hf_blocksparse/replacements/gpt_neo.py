"""GPT-Neo: scores without a scale; every other layer reads a window of its own, which the layout is intersected with."""

from __future__ import annotations

from torch import Tensor
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from hf_blocksparse.replacements.base import ReplacedAttention
from hf_blocksparse.transformers_masks import SequenceMask


class BlockSparseGPTNeoSelfAttention(ReplacedAttention, GPTNeoSelfAttention):
    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        if self.attention_type == "local":
            if not isinstance(attention_mask, SequenceMask):
                raise NotImplementedError(
                    f"attention_mask got {type(attention_mask).__name__} in a GPT-Neo model, whose layers have windows of their own; it "
                    "must be 2-D, (batch, length); give one row per batch item."
                )
            attention_mask = attention_mask.moved(attention_mask.device)
            attention_mask.window_tokens = self.config.window_size
        out = self.attend(
            query, key, value, attention_mask, scaling=1.0, dropout=self.attn_dropout.p
        )
        return out.transpose(1, 2), None
