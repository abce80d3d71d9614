"""Longformer checkpoints read as ours: a layout instead of the window, and their global attention beside it.

Tokens with global attention are read by all, and read all through projections of their own. The window's attention and that over the
global keys outside it are put together by their log-sum-exp; the rows of global tokens are a small dense attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LongformerConfig
from transformers.masking_utils import bidirectional_mask_function
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from hf_blocksparse.layouts import Dense, PerLayer, SlidingWindow
from hf_blocksparse.replacements.base import ReplacedAttention
from hf_blocksparse.transformers_masks import SequenceMask, make_mask

# All layers of a model are given the same tensor.
_mask_of_padding: WeakIdKeyDictionary = WeakIdKeyDictionary()


class BlockSparseLongformerSelfAttention(ReplacedAttention, LongformerSelfAttention):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor]:
        """[batch, length, hidden] of the same; the masks are bool [batch, length], True at padding and at global tokens."""
        mask = _mask(is_index_masked)
        query, key, value = (
            self._heads(projection, hidden_states)
            for projection in (self.query, self.key, self.value)
        )
        options = dict(scaling=self.head_dim**-0.5, dropout=self.dropout)
        if not is_global_attn:
            return (self.attend(query, key, value, mask, **options).flatten(2),)
        window = self._window()
        out, lse = self.attend_with_lse(query, key, value, mask, **options)
        batch, place = is_index_global_attn.nonzero(as_tuple=True)
        number = (is_index_global_attn.cumsum(1) - 1)[batch, place]
        count = int(number.max()) + 1
        # The global tokens of each batch row, and which of these slots are used.
        tokens = place.new_zeros(len(hidden_states), count)
        tokens[batch, number] = place
        used = torch.zeros_like(tokens, dtype=torch.bool)
        used[batch, number] = True

        rows = torch.arange(hidden_states.shape[1], device=tokens.device)[:, None]
        outside = used[:, None] & ((rows - tokens[:, None]).abs() >= window)
        dropout = self.dropout if self.training else 0.0
        out = self._with_global_keys(query, key, value, out, lse, tokens, outside, dropout)
        out = out * ~is_index_masked[:, :, None, None]
        global_out = self._global_rows(hidden_states, tokens, is_index_masked, dropout)
        out = out.index_put((batch, place), global_out[batch, number].to(out.dtype))
        return (out.flatten(2),)

    def _heads(self, projection: nn.Linear, hidden_states: Tensor) -> Tensor:
        return projection(hidden_states).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _window(self) -> int:
        """Keys at this distance and beyond are outside the layout."""
        layout = self._block_sparse.layout
        if isinstance(layout, SlidingWindow):
            return layout.window
        if isinstance(layout, Dense):
            return torch.iinfo(torch.int64).max
        raise NotImplementedError(
            f"global_attention_mask got global tokens in a Longformer layer with {layout!r}; beside them it must be a SlidingWindow or "
            "Dense; use one of these, or a layout with global tokens instead of the mask."
        )

    def _with_global_keys(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        tokens: Tensor,
        outside: Tensor,
        dropout: float,
    ) -> Tensor:
        """Attention `out` [batch, length, heads, head_dim] with `lse` [batch, heads, length], after reading `tokens` where `outside`, too.

        A row of padding that nothing was read in gives 0.
        """
        places = tokens[:, None, :, None].expand(-1, self.num_heads, -1, self.head_dim)
        key, value = key.gather(2, places), value.gather(2, places)
        scores = (query @ key.transpose(-1, -2)).to(lse.dtype) * self.head_dim**-0.5
        scores = scores.masked_fill(~outside[:, None], float("-inf"))
        lse = lse[..., None]
        peak = torch.maximum(lse, scores.amax(-1, keepdim=True)).detach()
        peak = peak.clamp(min=torch.finfo(peak.dtype).min)
        share, weights = torch.exp(lse - peak), torch.exp(scores - peak)
        total = share + weights.sum(-1, keepdim=True)
        total = torch.where(total > 0, total, 1.0)
        share, weights = (share / total).to(out.dtype), (weights / total).to(value.dtype)
        read = nn.functional.dropout(weights, dropout) @ value
        return out * share.transpose(1, 2) + read.transpose(1, 2)

    def _global_rows(
        self, hidden_states: Tensor, tokens: Tensor, is_padding: Tensor, dropout: float
    ) -> Tensor:
        """What the global tokens read, [batch, tokens, heads, head_dim]."""
        chosen = hidden_states.gather(1, tokens[..., None].expand(-1, -1, hidden_states.shape[2]))
        out = nn.functional.scaled_dot_product_attention(
            self._heads(self.query_global, chosen),
            self._heads(self.key_global, hidden_states),
            self._heads(self.value_global, hidden_states),
            attn_mask=~is_padding[:, None, None, :],
            dropout_p=dropout,
        )
        return out.transpose(1, 2)


def _mask(is_padding: Tensor) -> SequenceMask:
    known = _mask_of_padding.get(is_padding)
    if known is None:
        batch, length = is_padding.shape
        known = _mask_of_padding[is_padding] = make_mask(
            batch,
            length,
            length,
            mask_function=bidirectional_mask_function,
            attention_mask=~is_padding,
            device=is_padding.device,
        )
    return known


def native_layout(config: LongformerConfig, length: int | None) -> PerLayer:
    windows = config.attention_window
    if isinstance(windows, int):
        windows = [windows] * config.num_hidden_layers
    return PerLayer({layer: SlidingWindow(size // 2 + 1) for layer, size in enumerate(windows)})
