"""Attention modules with the arguments of xFormers' `BlockSparseAttention` and `MultiHeadDispatch`.

xFormers removed both in August 2024 (v0.0.28). Code written for them runs with the import changed. What differs from
the last releases that had them: any sequence length, queries and keys of different lengths, a mask per coefficient on
top of the layout (they had it until v0.0.10), and the computation stays in the dtype of its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hf_blocksparse.attention import Implementation, block_sparse_attention, resolve_layout
from hf_blocksparse.layouts import Layout

# A caller's mask -> (its version, the boolean mask). The same mask comes back at every step and in every layer; its
# values are read once, and the attention sees the same boolean tensor again.
_boolean_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _boolean_mask(mask: Tensor, name: str) -> Tensor:
    """`mask` as a boolean tensor, True where a key may be read; refuses values other than 0 and 1."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_inference():  # has no version
        return _read_mask(mask, name)
    version, boolean = _boolean_masks.get(mask, (None, None))
    if boolean is None or version != mask._version:
        boolean = _read_mask(mask, name)
        _boolean_masks[mask] = (mask._version, boolean)
    return boolean


def _read_mask(mask: Tensor, name: str) -> Tensor:
    boolean = mask == 1
    stray = ~(boolean | (mask == 0))
    if bool(stray.any()):
        raise ValueError(
            f"{name} got the value {mask[stray][0].item()}; it must hold 0 and 1 only, 1 where a key may be "
            f"read; convert an additive mask with `{name} == 0`."
        )
    if not bool(boolean.any()):
        raise ValueError(
            f"{name} got zeros only; 0 hides a key, so nothing would be read; convert an additive mask with "
            f"`{name} == 0`, or leave it out."
        )
    return boolean


class BlockSparseAttention(nn.Module):
    """Softmax attention over the blocks that a layout keeps, for queries, keys and values split into heads.

    Args:
        layout: a 0/1 tensor `[blocks, blocks]` or `[heads, blocks, blocks]` of any dtype on any device, 1 where a block
            of queries reads a block of keys; or a layout, or a preset's name.
        block_size: tokens per block, 16, 32, 64 or 128. None: 16 for a tensor, the layout's own otherwise.
        dropout: probability of dropping an attention weight in training.
        num_heads: query heads, checked against the layout and the call; None: not checked here.
        causal: a query reads no later key, also inside the blocks on the diagonal. False: the layout alone decides, so
            a lower triangular layout shows each query the later tokens of its own block (use `causal` or `att_mask`).
        impl: "auto", "triton" or "torch".

    Raises:
        ValueError: `dropout` outside [0, 1), `num_heads` that differs from the layout's, an unsupported block size, a
            layout tensor with values other than 0 and 1.
    """

    def __init__(
        self,
        layout: Tensor | Layout | str,
        block_size: int | None = None,
        dropout: float = 0.0,
        num_heads: int | None = None,
        causal: bool = False,
        impl: Implementation = "auto",
    ) -> None:
        super().__init__()
        _check_probability("dropout", dropout)
        if isinstance(layout, Tensor):
            block_size = 16 if block_size is None else block_size
            if (
                num_heads is not None
                and layout.dim() == 3
                and layout.shape[0] not in (1, num_heads)
            ):
                raise ValueError(
                    f"num_heads got {num_heads} for a layout of {layout.shape[0]} heads; they must be equal; "
                    "give one matrix for all heads or one per head."
                )
        self.layout = resolve_layout(layout, block_size)
        self.dropout = dropout
        self.num_heads = num_heads
        self.causal = causal
        self.impl = impl

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        att_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: `[batch, heads, query_len, head_dim]`, fp16, bf16 or fp32.
            k, v: `[batch, key_heads, key_len, head_dim]`; the key heads divide the heads, the queries are the last
                positions of the keys.
            att_mask: 0/1 of any dtype, 1 where a key may be read (as with torch's boolean masks, not added to the
                scores): `[query_len, key_len]`, `[heads, query_len, key_len]` or `[batch, heads, query_len, key_len]`
                with axes of size 1 broadcast. It narrows the layout.
            key_padding_mask: 0/1 of any dtype `[batch, key_len]`, 1 where a key may be read (the opposite of
                `torch.nn.MultiheadAttention`). Rows left without a key are 0.

        Returns:
            `[batch, heads, query_len, head_dim]` in the dtype of `q`.

        Raises:
            ValueError: a mask that is not 0/1 or has another shape; whatever `block_sparse_attention` refuses.
        """
        if self.num_heads is not None and q.shape[1] != self.num_heads:
            raise ValueError(
                f"q got {q.shape[1]} heads in shape {tuple(q.shape)}; num_heads is {self.num_heads}; "
                "split the embedding into that many heads."
            )
        if att_mask is not None:
            if att_mask.dim() not in (2, 3, 4) or att_mask.shape[-2:] != (q.shape[-2], k.shape[-2]):
                raise ValueError(
                    f"att_mask got shape {tuple(att_mask.shape)}; its last two axes must be the {q.shape[-2]} "
                    f"queries and {k.shape[-2]} keys, with axes for heads, or batch and heads, before them; "
                    "crop or reshape it."
                )
            att_mask = _boolean_mask(att_mask, "att_mask").to(q.device)
        if key_padding_mask is not None:
            key_padding_mask = _boolean_mask(key_padding_mask, "key_padding_mask").to(q.device)
        return block_sparse_attention(
            q,
            k,
            v,
            self.layout,
            is_causal=self.causal,
            attn_mask=att_mask,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"{self.layout}, dropout={self.dropout}, causal={self.causal}, impl={self.impl!r}"


class MultiHeadDispatch(nn.Module):
    """Multi-head attention: projections of query, key and value, an attention per head, a projection of the result.

    Parameters have the names they had in xFormers v0.0.12 to v0.0.27. Weights start as in
    `torch.nn.MultiheadAttention`: Xavier uniform for the input projections, biases 0.

    Args:
        dim_model: size of the embedding, a multiple of `num_heads`.
        num_heads: heads.
        attention: called as `attention(q, k, v, att_mask=..., key_padding_mask=...)` on `[batch, heads, len, head_dim]`,
            masks only where they are given.
        residual_dropout: probability of dropping an output in training.
        seq_len: the usual sequence length. Inputs may have any other; a fixed layout must reach this one.
        bias: whether the projections have biases.

    Raises:
        ValueError: sizes that do not divide, a `residual_dropout` outside [0, 1), an attention for another number of
            heads, a fixed layout shorter than `seq_len`.
    """

    def __init__(
        self,
        dim_model: int,
        num_heads: int,
        attention: nn.Module,
        residual_dropout: float = 0.0,
        seq_len: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim_model < 1 or dim_model % num_heads:
            raise ValueError(
                f"num_heads got {num_heads} for dim_model {dim_model}; it must divide dim_model; "
                "choose another number of heads."
            )
        _check_probability("residual_dropout", residual_dropout)
        if getattr(attention, "num_heads", None) not in (None, num_heads):
            raise ValueError(
                f"attention got num_heads {attention.num_heads}; this module has {num_heads} heads; "
                "build both with the same number."
            )
        layout = getattr(attention, "layout", None)
        if seq_len is not None and isinstance(layout, Layout):
            layout.check(num_heads, seq_len, seq_len)
        self.dim_model = dim_model
        self.num_heads = num_heads
        self.seq_len = seq_len
        self.attention = attention
        inputs = {
            name: nn.Linear(dim_model, dim_model, bias) for name in ("q_proj", "k_proj", "v_proj")
        }
        self.in_proj_container = nn.ModuleDict(inputs)
        self.resid_drop = nn.Dropout(residual_dropout)
        self.proj = nn.Linear(dim_model, dim_model, bias)
        for projection in inputs.values():
            nn.init.xavier_uniform_(projection.weight)
        if bias:
            for projection in (*inputs.values(), self.proj):
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        att_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Project, attend, project.

        Args:
            query: `[batch, query_len, dim_model]`.
            key, value: `[batch, key_len, dim_model]`; None: the query.
            att_mask, key_padding_mask: see `BlockSparseAttention.forward`.

        Returns:
            `[batch, query_len, dim_model]`.
        """
        key = query if key is None else key
        value = query if value is None else value
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 3 or tensor.shape[-1] != self.dim_model:
                raise ValueError(
                    f"{name} got shape {tuple(tensor.shape)}; it must be [batch, length, {self.dim_model}]; "
                    "reshape it, or build the module with another dim_model."
                )
        masks = {"att_mask": att_mask, "key_padding_mask": key_padding_mask}
        heads = self.attention(
            self._split_heads("q_proj", query),
            self._split_heads("k_proj", key),
            self._split_heads("v_proj", value),
            **{name: mask for name, mask in masks.items() if mask is not None},
        )
        return self.resid_drop(self.proj(heads.transpose(1, 2).flatten(2)))

    def _split_heads(self, projection: str, tensor: Tensor) -> Tensor:
        """`[batch, length, dim_model]` -> `[batch, heads, length, head_dim]`."""
        projected = self.in_proj_container[projection](tensor)
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"dim_model={self.dim_model}, num_heads={self.num_heads}, seq_len={self.seq_len}"


def _check_probability(name: str, probability: float) -> None:
    if not 0.0 <= probability < 1.0:
        raise ValueError(
            f"{name} got {probability}; it must be at least 0 and below 1; give the share to drop."
        )
