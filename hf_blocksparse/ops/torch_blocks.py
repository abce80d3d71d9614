"""Block-sparse attention in torch operations: the specification, and the path for CPUs.

One step handles the queries of one tile: it gathers the keys its list names, and nothing of size query_len x kv_len exists. The backward
recomputes each step from query, key and LSE, and is itself made of differentiable operations, so second derivatives work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_blocksparse.block_index import BlockIndex
from hf_blocksparse.ops.philox import dropout_keep
from hf_blocksparse.ops.problem import Problem, TensorSpec, empty_rows_like
from hf_blocksparse.sequences import BATCH, Q_LEN, Q_ROW, Sequences

# Small enough that the scores of a step stay in a CPU's cache.
TILE = 64
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unsupported(
    query: TensorSpec, key: TensorSpec, value: TensorSpec, slopes_need_grad: bool = False
) -> list[str]:
    """Every reason why this path cannot run the call."""
    if query.dtype not in DTYPES:
        return [f"dtype is {query.dtype} (needs one of {DTYPES})"]
    return []


@dataclass(frozen=True)
class _Step:
    """The queries of one tile, for the batch rows and heads that walk the same list.

    Attributes:
        batch, heads: slices of the query tensor.
        rows: slice of its rows.
        columns: slices of the key tensor's rows, in order.
        hidden: for each partial tile its place among the gathered columns, and bool `[rows, its columns]`, True where a coefficient
            is not kept.
        position_shift: what the difference of a query's and a key's position has beyond that of their rows.
    """

    batch: slice
    heads: slice
    rows: slice
    columns: list[slice]
    hidden: list[tuple[slice, Tensor]]
    position_shift: int


def _steps(index: BlockIndex, sequences: Sequences, num_heads: int) -> Iterator[_Step]:
    list_of = index.list_of.expand(sequences.num_sequences, num_heads).tolist()
    offsets = index.kv_offsets.tolist()
    table = sequences.table.tolist()
    everyone = slice(None)
    whole_batch = sequences.is_uniform and index.list_of.shape[0] == 1
    for number, line in enumerate(table):
        batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos = line
        if whole_batch and number > 0:
            return  # the first step of each tile served the whole batch
        batch_slice = everyone if whole_batch else slice(batch, batch + 1)
        lists = list_of[number]
        shared = len(set(lists)) == 1
        # The last tiles first: with causality they are the widest, and narrower ones fit in the memory they leave.
        for tile in reversed(range(q_pos // index.tile_q, -(-(q_pos + q_len) // index.tile_q))):
            first = max(tile * index.tile_q, q_pos)
            end = min((tile + 1) * index.tile_q, q_pos + q_len)
            for head, one in enumerate(lists[:1] if shared else lists):
                place_of_tile = tile - index.first_q_tile
                listed = slice(offsets[one][place_of_tile], offsets[one][place_of_tile + 1])
                mask_ids = index.kv_mask_ids[listed]
                rows_of_tile = slice(first - tile * index.tile_q, end - tile * index.tile_q)
                hidden_bits = ~index.bank_bits(mask_ids[mask_ids >= 0], rows_of_tile)
                # Partial tiles come last, in the order of their bits.
                num_full = mask_ids.numel() - hidden_bits.shape[0]
                indices = index.kv_indices[listed].tolist()
                entries = sorted(
                    (kv_tile, number - num_full) for number, kv_tile in enumerate(indices)
                )
                columns: list[slice] = []
                hidden: list[tuple[slice, Tensor]] = []
                gathered = 0
                for kv_tile, number in entries:
                    left = max(kv_tile * index.tile_kv, kv_pos)
                    right = min((kv_tile + 1) * index.tile_kv, kv_pos + kv_len)
                    if left >= right:
                        continue
                    place = slice(left - kv_pos + kv_row, right - kv_pos + kv_row)
                    if columns and columns[-1].stop == place.start:
                        columns[-1] = slice(columns[-1].start, place.stop)
                    else:
                        columns.append(place)
                    if number >= 0:
                        origin = kv_tile * index.tile_kv
                        part = hidden_bits[number, :, left - origin : right - origin]
                        hidden.append((slice(gathered, gathered + right - left), part))
                    gathered += right - left
                if not columns:
                    continue
                yield _Step(
                    batch_slice,
                    everyone if shared else slice(head, head + 1),
                    slice(first - q_pos + q_row, end - q_pos + q_row),
                    columns,
                    hidden,
                    (q_pos - q_row) - (kv_pos - kv_row),
                )


class _StepTensors:
    """The operands of one step. Query heads of one key head are stacked as rows, so keys are never repeated."""

    def __init__(
        self,
        step: _Step,
        group: int,
        problem: Problem,
        shape: torch.Size,
        alibi_slopes: Tensor | None,
    ):
        self.step = step
        self.group = group
        self.problem = problem
        self.shape = shape
        self.alibi_slopes = alibi_slopes
        if step.heads == slice(None):
            self.kv_heads = step.heads
            self.group_here = group
        else:
            kv_head = step.heads.start // group
            self.kv_heads = slice(kv_head, kv_head + 1)
            self.group_here = 1

    def rows_of(self, tensor: Tensor) -> Tensor:
        """`[batch, kv_heads, group * rows, ...]` of a tensor `[batch, query_heads, query_len, ...]`."""
        part = tensor[self.step.batch, self.step.heads, self.step.rows]
        return part.unflatten(1, (-1, self.group_here)).flatten(2, 3)

    def as_rows(self, part: Tensor) -> Tensor:
        """The inverse of `rows_of`."""
        return part.unflatten(2, (self.group_here, -1)).flatten(1, 2)

    def columns_of(self, tensor: Tensor) -> Tensor:
        parts = [tensor[self.step.batch, self.kv_heads, columns] for columns in self.step.columns]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def add_columns(self, total: Tensor, part: Tensor) -> None:
        start = 0
        for columns in self.step.columns:
            count = columns.stop - columns.start
            total[self.step.batch, self.kv_heads, columns] += part[:, :, start : start + count]
            start += count

    def add_rows(self, total: Tensor, part: Tensor) -> None:
        total[self.step.batch, self.step.heads, self.step.rows] += self.as_rows(part)

    def row_and_column_numbers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tensor rows of the queries, `[rows, 1]`, and of the gathered keys, `[columns]`."""
        rows = torch.arange(self.step.rows.start, self.step.rows.stop, device=device)
        columns = [torch.arange(c.start, c.stop, device=device) for c in self.step.columns]
        return rows[:, None], torch.cat(columns)

    def distances(self, like: Tensor) -> Tensor:
        """`|i - j|` of positions, `[group * rows, columns]`."""
        rows, columns = self.row_and_column_numbers(like.device)
        distances = (rows - columns + self.step.position_shift).abs()
        return distances.repeat(self.group_here, 1).to(like.dtype)

    def slopes_of_rows(self) -> Tensor:
        """The ALiBi slope of each row, `[batch, kv_heads, group * rows, 1]`."""
        assert self.alibi_slopes is not None
        return self.rows_of(self.alibi_slopes[..., None].expand(self.shape[:3]))[..., None]

    def scores(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores with -inf where a coefficient is not kept, and d(score) / d(scaled product) where there is a softcap."""
        scores = (rows * self.problem.scale) @ columns.transpose(-1, -2)
        cap_slope = None
        if self.problem.softcap is not None:
            scores = torch.tanh(scores / self.problem.softcap)
            cap_slope = 1 - scores * scores
            scores = self.problem.softcap * scores
        if self.alibi_slopes is not None:
            scores = scores - self.slopes_of_rows() * self.distances(scores)
        by_member = scores.unflatten(2, (self.group_here, -1))
        for columns, hidden in self.step.hidden:
            by_member[..., columns].masked_fill_(hidden, float("-inf"))
        return scores, cap_slope

    def dropout_factor(self, dtype: torch.dtype) -> Tensor | None:
        """What dropout multiplies the probabilities by."""
        problem = self.problem
        if not problem.dropout_p:
            return None
        assert problem.dropout_seed is not None
        device = problem.dropout_seed.device
        batch, heads = self.shape[:2]
        rows, columns = self.row_and_column_numbers(device)
        batch_head = torch.arange(batch * heads, device=device).view(batch, heads)
        batch_head = batch_head[self.step.batch, self.step.heads]
        keep = dropout_keep(
            int(problem.dropout_seed),
            problem.dropout_p,
            rows,
            columns,
            batch_head[:, :, None, None],
        )
        factor = keep.to(dtype) / (1 - problem.dropout_p)
        return factor.unflatten(1, (-1, self.group_here)).flatten(2, 3)


def _accumulator(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        problem: Problem,
    ) -> tuple[Tensor, Tensor]:
        out, lse = attention_forward(query, key, value, sinks, alibi_slopes, problem)
        ctx.save_for_backward(query, key, value, sinks, alibi_slopes, out, lse)
        ctx.problem = problem
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd runs this in the caller's autocast state, which would round the products.
        with torch.autocast(grads[0].device.type, enabled=False):
            gradients = attention_backward(
                *grads, *ctx.saved_tensors, ctx.problem, ctx.needs_input_grad
            )
        return *gradients, None


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """`attention` without gradients."""
    batch, heads, query_len, _ = query.shape
    group = heads // key.shape[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = empty_rows_like(query, value.shape[-1]).zero_()
    lse = torch.full((batch, heads, query_len), float("-inf"), dtype=dtype, device=query.device)
    if sinks is not None:
        for row in problem.sequences.table.tolist():
            rows = slice(row[Q_ROW], row[Q_ROW] + row[Q_LEN])
            lse[row[BATCH], :, rows] = sinks.to(dtype)[:, None]
    for step in _steps(problem.index_for(TILE, TILE, True), problem.sequences, heads):
        part = _StepTensors(step, group, problem, query.shape, alibi_slopes)
        scores, _ = part.scores(
            _accumulator(part.rows_of(query)), _accumulator(part.columns_of(key))
        )
        peak = scores.amax(-1, keepdim=True)
        base = part.rows_of(lse)[..., None]  # the sink, or -inf
        peak = torch.maximum(peak, base).clamp(min=torch.finfo(dtype).min)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True) + (base - peak).exp()
        factor = part.dropout_factor(dtype)
        if factor is not None:
            weights.mul_(factor)
        result = weights @ _accumulator(part.columns_of(value))
        result = result / torch.where(total > 0, total, 1)
        place = (step.batch, step.heads, step.rows)
        out[place] = part.as_rows(result).to(out.dtype)
        lse[place] = part.as_rows(peak + total.log())[..., 0]
    return out, lse


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, sinks and ALiBi slopes, in differentiable operations; all of them, whatever is `needed`."""
    heads = query.shape[1]
    group = heads // key.shape[1]
    dtype = lse.dtype
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    # d(loss)/d(score) = p * (d(loss)/d(p) - delta): the gradient of LSE enters as part of delta.
    delta = (_accumulator(grad_out) * _accumulator(out)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    finite_lse = torch.where(torch.isinf(lse), 0, lse)
    grad_query = torch.zeros(query.shape, dtype=dtype, device=query.device)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    grad_slopes = None if alibi_slopes is None else torch.zeros_like(alibi_slopes)
    for step in _steps(problem.index_for(TILE, TILE, True), problem.sequences, heads):
        part = _StepTensors(step, group, problem, query.shape, alibi_slopes)
        query_rows = _accumulator(part.rows_of(query))
        key_columns = _accumulator(part.columns_of(key))
        grad_rows = _accumulator(part.rows_of(grad_out))
        scores, cap_slope = part.scores(query_rows, key_columns)
        weights = torch.exp(scores - part.rows_of(finite_lse)[..., None])
        grad_weights = grad_rows @ _accumulator(part.columns_of(value)).transpose(-1, -2)
        factor = part.dropout_factor(dtype)
        dropped = weights
        if factor is not None:
            grad_weights = grad_weights * factor
            dropped = weights * factor
        part.add_columns(grad_value, dropped.transpose(-1, -2) @ grad_rows)
        grad_scores = weights * (grad_weights - part.rows_of(delta)[..., None])
        if grad_slopes is not None:
            by_row = (grad_scores * part.distances(grad_scores)).sum(-1)
            grad_slopes[step.batch, step.heads] -= part.as_rows(by_row).sum(-1)
        if cap_slope is not None:
            grad_scores = grad_scores * cap_slope
        part.add_rows(grad_query, grad_scores @ key_columns * problem.scale)
        part.add_columns(grad_key, grad_scores.transpose(-1, -2) @ (query_rows * problem.scale))
    grad_sinks = None
    if sinks is not None:
        share = torch.exp(sinks.to(dtype)[:, None] - lse).masked_fill(torch.isinf(lse), 0)
        grad_sinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    return (
        grad_query.to(query.dtype),
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
        grad_sinks,
        grad_slopes,
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """Output and LSE; see docs/architecture.md, "What is computed"."""
    return _Attention.apply(query, key, value, sinks, alibi_slopes, problem)
