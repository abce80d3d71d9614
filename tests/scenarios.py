"""One call of the kernels, described as a value, and its comparison with dense attention in float64."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from numerics import (
    Deviation,
    Inputs,
    Results,
    assert_within_bounds,
    dense_attention,
    deviations,
    make_qkv,
    torch_attention,
)
from torch import Tensor

from hf_blocksparse import Layout, block_sparse_attention
from hf_blocksparse.attention import Implementation
from hf_blocksparse.ops.philox import dropout_keep

DROPOUT_SEED = 3
OTHER_ORDERS = 2


@dataclass(frozen=True)
class Scenario:
    """One call. `runs`: (batch row, start, end) of its sequences, where they are not whole batch rows."""

    layout: Layout
    query_len: int
    kv_len: int | None = None
    is_causal: bool = True
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int | None = None
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: Literal["by head", "by batch row and head"] | None = None
    dropout_p: float = 0.0
    grad_lse: bool = False
    mask_density: float | None = None
    mask_by_head: bool = True
    padding: bool = False
    runs: tuple[tuple[int, int, int], ...] | None = None
    rows_outside_heads: bool = False
    seed: int = 0

    def inputs(self, device: str) -> Inputs:
        kv_len = self.kv_len or self.query_len
        value_dim = self.value_dim or self.head_dim
        query, key, value = make_qkv(
            self.batch,
            self.heads,
            self.kv_heads,
            self.query_len,
            kv_len,
            self.head_dim,
            value_dim,
            dtype=self.dtype,
            device=device,
            rows_outside_heads=self.rows_outside_heads,
            seed=self.seed,
        )
        generator = torch.Generator().manual_seed(1 + self.seed)
        shape = (self.batch, self.heads, self.query_len)
        grad_out = torch.randn(*shape, value_dim, generator=generator).to(query)
        grad_lse = torch.randn(shape, generator=generator).to(device) if self.grad_lse else None
        sinks = torch.randn(self.heads, generator=generator).to(device) if self.sinks else None
        return Inputs(query, key, value, grad_out, grad_lse, sinks)

    def attn_mask(self) -> torch.Tensor | None:
        if self.mask_density is None:
            return None
        heads = self.heads if self.mask_by_head else 1
        shape = (self.batch, heads, self.query_len, self.kv_len or self.query_len)
        return (
            torch.rand(shape, generator=torch.Generator().manual_seed(2 + self.seed))
            < self.mask_density
        )

    def mask(self) -> torch.Tensor:
        """Every coefficient that is kept, bool [batch, heads, query_len, kv_len]."""
        kv_len = self.kv_len or self.query_len
        shape = (self.batch, self.heads, self.query_len, kv_len)
        options = dict(is_causal=self.is_causal, num_heads=self.heads)
        if self.runs is None:
            mask = self.layout.to_mask(self.query_len, kv_len, **options).expand(shape)
        else:
            mask = torch.zeros(shape, dtype=torch.bool)
            for batch, start, end in self.runs:
                part = self.layout.to_mask(end - start, **options)
                mask[batch, :, start:end, start:end] = part
        attn_mask = self.attn_mask()
        return mask if attn_mask is None else mask & attn_mask

    def alibi_slopes(self) -> torch.Tensor | None:
        if self.alibi is None:
            return None
        shape = (self.heads,) if self.alibi == "by head" else (self.batch, self.heads)
        return torch.rand(shape, generator=torch.Generator().manual_seed(5 + self.seed)) * 0.5

    def bias(self) -> torch.Tensor | None:
        """ALiBi written out, float64 [batch, heads, query_len, kv_len]. Sequences move positions, but no distance."""
        slopes = self.alibi_slopes()
        if slopes is None:
            return None
        kv_len = self.kv_len or self.query_len
        query = torch.arange(kv_len - self.query_len, kv_len)[:, None]
        distance = (query - torch.arange(kv_len)).abs().double()
        return -slopes.double().expand(self.batch, self.heads)[..., None, None] * distance

    def where(self, device: str) -> dict[str, torch.Tensor]:
        """The sequences as an argument of `block_sparse_attention`."""
        if self.runs is None:
            return {}
        ids = torch.full((self.batch, self.query_len), -1)
        for number, (batch, start, end) in enumerate(self.runs):
            ids[batch, start:end] = number
        if self.padding:
            return {"key_padding_mask": (ids >= 0).to(device)}
        return {"document_ids": ids.to(device)}

    def nobody(self, device: str) -> torch.Tensor:
        """Rows of queries that belong to no sequence, bool [batch, heads, query_len]."""
        shape = (self.batch, self.heads, self.query_len)
        nobody = torch.full(shape, self.runs is not None, device=device)
        for batch, start, end in self.runs or ():
            nobody[batch, :, start:end] = False
        return nobody


def results_of_kernels(
    scenario: Scenario, inputs: Inputs, impl: Implementation = "triton", calls: int = 1
) -> Results:
    """What the kernels make of `scenario.inputs(device)`; NaN in rows that belong to no sequence must not show anywhere.

    The last of so many `calls`: a repeated one is issued in another way.
    """
    device = str(inputs.query.device)
    attn_mask, slopes = scenario.attn_mask(), scenario.alibi_slopes()
    nobody = scenario.nobody(device)

    def attend(query, key, value, sinks):
        rows = nobody[..., None]
        group = query.shape[1] // key.shape[1]
        return block_sparse_attention(
            query.masked_fill(rows, math.nan),
            key.masked_fill(rows[:, ::group], math.nan) if rows.any() else key,
            value.masked_fill(rows[:, ::group], math.nan) if rows.any() else value,
            scenario.layout,
            is_causal=scenario.is_causal,
            attn_mask=None if attn_mask is None else attn_mask.to(device),
            dropout_p=scenario.dropout_p,
            scale=scenario.scale,
            softcap=scenario.softcap,
            sinks=sinks,
            alibi_slopes=None if slopes is None else slopes.to(device),
            allow_empty_rows=True,
            return_lse=True,
            impl=impl,
            **scenario.where(device),
        )

    for _ in range(calls):
        torch.manual_seed(DROPOUT_SEED)
        results = inputs.results(attend)
    return results


def check(
    scenario: Scenario, device: str, impl: Implementation = "triton", calls: int = 1
) -> dict[str, Deviation]:
    """Compares the kernels, called so often, with float64.

    Returns how far each result is from the exact one; AssertionError where that is too far.
    """
    inputs = scenario.inputs(device)
    got = results_of_kernels(scenario, inputs, impl, calls)
    mask, nobody, bias = scenario.mask().to(device), scenario.nobody(device), scenario.bias()
    bias = None if bias is None else bias.to(device)
    factor = None
    if scenario.dropout_p:
        torch.manual_seed(DROPOUT_SEED)
        seed = int(torch.randint(1 << 62, (), dtype=torch.int64, device=device))
        batch, heads, rows, cols = mask.shape
        keep = dropout_keep(
            seed,
            scenario.dropout_p,
            torch.arange(rows, device=device)[:, None],
            torch.arange(cols, device=device),
            torch.arange(batch * heads, device=device).view(batch, heads, 1, 1),
        )
        factor = keep / (1 - scenario.dropout_p)

    def theirs(attend, rows=slice(None), cols=slice(None)):
        """`attend` on the queries and keys in another order; results are in theirs."""

        def reordered(of_scores):
            return None if of_scores is None else of_scores[:, :, rows][..., cols]

        def attend_without_padding(query, key, value, sinks):
            options = dict(scale=scenario.scale, softcap=scenario.softcap, sinks=sinks)
            options |= dict(factor=reordered(factor), bias=reordered(bias))
            out, lse = attend(
                query[:, :, rows], key[:, :, cols], value[:, :, cols], reordered(mask), **options
            )
            if isinstance(rows, Tensor):
                out = out[:, :, rows.argsort()]
                lse = None if lse is None else lse[:, :, rows.argsort()]
            # A row of nobody has no sink either.
            return out, None if lse is None else lse.masked_fill(nobody, -math.inf)

        return attend_without_padding

    exact = inputs.to(torch.float64).results(theirs(dense_attention))
    # torch's attention knows no LSE: it is asked where nothing flows back from there.
    other = torch_attention if inputs.grad_lse is None else dense_attention
    torchs = [inputs.results(theirs(other))]
    if scenario.dtype == torch.float32:
        # A few roundings are all there is, and which of them meet is chance: torch's error is the largest over some orders of its sums.
        generator = torch.Generator().manual_seed(scenario.seed)
        for _ in range(OTHER_ORDERS):
            rows, cols = (torch.randperm(size, generator=generator) for size in mask.shape[2:])
            torchs.append(inputs.results(theirs(other, rows.to(device), cols.to(device))))
    found = deviations(
        got,
        exact,
        torchs,
        has_dropout=scenario.dropout_p > 0,
        cancelling=inputs.largest_score_term(scenario.scale),
    )
    assert_within_bounds(found)
    return found
