"""What the replacement classes share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_blocksparse.transformers_masks import SequenceMask

Setting = tuple[nn.Module, str, object]
"""A module, the name of an attribute of it, and the value it has while attention is replaced."""


class ReplacedAttention(nn.Module):
    """Mixed into a family's attention class, before it, to compute through transformers' attention interface."""

    _block_sparse: Any  # the LayerAttention that model_layouts hangs on each module with a layout

    @classmethod
    def settings_around(cls, model: PreTrainedModel) -> list[Setting]:
        """What must be different in the model around the replaced modules while they are replaced."""
        return []

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        dropout: float,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """Attention over the module's layout, [batch, query_len, query_heads, head_dim] of [batch, heads, length, head_dim]."""
        options = dict(scaling=scaling, dropout=dropout, alibi_slopes=alibi_slopes)
        return self._call_interface(query, key, value, attention_mask, options)[0]

    def attend_with_lse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        """The same, and the log-sum-exp of each row, [batch, query_heads, query_len]."""
        options = dict(scaling=scaling, dropout=dropout, return_lse=True)
        return self._call_interface(query, key, value, attention_mask, options)

    def _call_interface(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        implementation = self.config._attn_implementation
        if implementation != "block_sparse":
            raise NotImplementedError(
                f"attn_implementation got {implementation!r} in a {type(self).__name__}, which stands for the model's own; it must be "
                "'block_sparse'; call unpatch_model to have the model's own attention."
            )
        if not self.training:
            options["dropout"] = 0.0
        attention = ALL_ATTENTION_FUNCTIONS["block_sparse"]
        return attention(self, query, key, value, attention_mask, **options)


def cache_among(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache in a call's keyword arguments, whatever its name: transformers' `past_key_values` became `cache` with 5.24."""
    return next((value for value in arguments.values() if isinstance(value, Cache)), None)


def refuse_padding_between_tokens(attention_mask: Tensor | None) -> None:
    """For families whose ALiBi counts real tokens alone: positions count what lies between, too."""
    if isinstance(attention_mask, SequenceMask) and attention_mask.dense is not None:
        raise NotImplementedError(
            "attention_mask got padding between real tokens; this model's ALiBi counts real tokens alone, block_sparse attention counts "
            "positions; pad on the left (as generation needs it) or on the right."
        )


@lru_cache(maxsize=64)
def geometric_slopes(num_heads: int, device: torch.device) -> Tensor:
    """ALiBi slopes [num_heads], float32: `2 ** (-8 k / n)` for k = 1..n with the power of two n <= num_heads, then every other slope of 2n.

    The paper's (arXiv 2108.12409) and, for other numbers of heads, its authors' code.
    """
    power = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * (head + 1) / power for head in range(power)]
    exponents += [8 * (2 * head + 1) / (2 * power) for head in range(num_heads - power)]
    return constant([2.0**-exponent for exponent in exponents], device)


def constant(values: list[float], device: torch.device) -> Tensor:
    """float32; an ordinary tensor also in inference mode, as it is kept for later calls."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)
