"""BigBird checkpoints read as ours: their full attention, or instead of their block-sparse one a layout's.

A replaced model never switches to full attention on short inputs, and takes inputs that are no multiple of its block size as they are
where the family's own pads them.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BigBirdConfig, PreTrainedModel
from transformers.models.big_bird.modeling_big_bird import (
    BigBirdBlockSparseAttention,
    BigBirdSelfAttention,
)

from hf_blocksparse.layouts import Dense, Layout, PerLayer, TensorLayout
from hf_blocksparse.replacements.base import ReplacedAttention, Setting, cache_among

# Lengths for which the family draws from plans made for its longest input.
_PLANNED_LENGTHS = (1024, 3072, 4096)


class _BigBirdAttention(ReplacedAttention):
    @classmethod
    def settings_around(cls, model: PreTrainedModel) -> list[Setting]:
        # The models make an ordinary mask for full attention, and masks of blocks for their block-sparse one.
        return [
            (module, "attention_type", "original_full")
            for module in model.modules()
            if "attention_type" in module.__dict__
        ]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if encoder_hidden_states is not None:
            raise NotImplementedError(
                "encoder_hidden_states got a value in a BigBird model with block-sparse layers; its cross-attention does not go through "
                "transformers' attention interface and cannot stay beside them; use the model without a layout."
            )
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, self.attention_head_size)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        if (cache := cache_among(kwargs)) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        # The family's block-sparse attention drops no weights.
        dropout = getattr(self, "dropout", None)
        out = self.attend(
            query,
            key,
            value,
            attention_mask,
            scaling=self.attention_head_size**-0.5,
            dropout=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
        )
        return out.flatten(2), None


class BlockSparseBigBirdSelfAttention(_BigBirdAttention, BigBirdSelfAttention):
    pass


class BlockSparseBigBirdBlockSparseAttention(_BigBirdAttention, BigBirdBlockSparseAttention):
    @property
    def layer_idx(self) -> int:
        """Place in a cache, which the family's own block-sparse attention never uses."""
        return self.seed


def native_layout(config: BigBirdConfig, length: int | None) -> PerLayer:
    if length is None:
        raise ValueError(
            "length got None for a BigBird model, whose last block is global and whose random blocks depend on the length; it must be the "
            "number of tokens; give the length of the inputs."
        )
    layers = range(config.num_hidden_layers)
    if config.attention_type != "block_sparse" or length <= config.block_size * (
        5 + 2 * config.num_random_blocks
    ):
        return PerLayer({layer: Dense() for layer in layers})
    made = [_layout_of_layer(config, length, layer) for layer in layers]
    twice = sum(count for _, count in made)
    if twice:
        warnings.warn(
            f"length got {length}, where {twice} of the random blocks that BigBird draws are kept anyway; it counts them twice in its "
            "softmax, block-sparse attention once.",
            stacklevel=3,
        )
    return PerLayer({layer: layout for layer, (layout, _) in enumerate(made)})


def _layout_of_layer(config: BigBirdConfig, length: int, layer: int) -> tuple[Layout, int]:
    """The layout, and how many of its random blocks are kept for another reason, too."""
    blocks = -(-length // config.block_size)
    place = torch.arange(blocks)
    kept = (place[:, None] - place).abs() <= 1
    kept[[0, -1]] = True
    kept[:, [0, -1]] = True
    kept = kept.repeat(config.num_attention_heads, 1, 1)
    drawn = _random_blocks(config, blocks * config.block_size, layer)
    inner = kept[:, 1:-1]
    twice = int(inner.gather(2, drawn).sum())
    inner.scatter_(2, drawn, True)
    return TensorLayout.from_tensor(kept, config.block_size), twice


def _random_blocks(config: BigBirdConfig, length: int, layer: int) -> Tensor:
    """The blocks that the family draws in training, [heads, inner block rows, random blocks]."""
    with torch.device("meta"):
        drawing = BigBirdBlockSparseAttention(config, seed=layer).train()
    heads, size, count = config.num_attention_heads, config.block_size, config.num_random_blocks
    state = np.random.get_state()
    np.random.seed(layer)
    try:
        if length in _PLANNED_LENGTHS:
            longest = config.max_position_embeddings
            drawn = [
                drawing._bigbird_block_rand_mask(
                    longest, longest, size, size, count, last_idx=1024
                )[: length // size - 2]
                for _ in range(heads)
            ]
        else:
            ends, counts = drawing._get_rand_attn_plan(length, size, count)
            drawn = drawing._bigbird_block_rand_mask_with_head(
                length, length, size, size, heads, ends, counts
            )
    finally:
        np.random.set_state(state)
    return torch.from_numpy(np.stack(drawn)).long()
