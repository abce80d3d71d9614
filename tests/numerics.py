"""The judge of the kernels: dense attention with an explicit mask, in float64 and in the dtype under test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

# Of the largest score's size, or of one: sums of float32 products, and a hardware exponential.
LSE_TOLERANCE = 1e-5
# What float32 sums over terms of size one leave where the exact result cancels to zero (one key: every score's gradient does).
CANCELLATION = 8 * torch.finfo(torch.float32).eps


@dataclass
class Results:
    """What attention returns and the gradients of a loss, all in the dtype they were computed in."""

    out: Tensor
    lse: Tensor | None
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor
    grad_sinks: Tensor | None = None


@dataclass
class Inputs:
    """Leaves of a loss `<out, grad_out> + <lse, grad_lse>`; rows without keys take no part in the second term."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None = None
    sinks: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(
            **{
                field.name: None if tensor is None else tensor.detach().to(dtype)
                for field in fields(self)
                for tensor in [getattr(self, field.name)]
            }
        )

    def largest_score_term(self, scale: float | None) -> float:
        """The largest product in a gradient: <grad_out, value>, from which <grad_out, out> is taken, times scale and key or query."""
        scale = self.query.shape[-1] ** -0.5 if scale is None else abs(scale)
        value = self.value.float().repeat_interleave(self.query.shape[1] // self.value.shape[1], 1)
        product = (self.grad_out.float() @ value.transpose(-1, -2)).abs().max()
        return float(product * scale * max(self.key.abs().max(), self.query.abs().max()))

    def results(self, attend) -> Results:
        """`attend(query, key, value, sinks) -> (out, lse or None)`, and the gradients of the loss."""
        leaves = [self.query, self.key, self.value] + ([] if self.sinks is None else [self.sinks])
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out, lse = attend(*leaves[:3], None if self.sinks is None else leaves[3])
        outputs, weights = [out], [self.grad_out.to(out.dtype)]
        if self.grad_lse is not None:
            outputs.append(torch.where(lse.isinf(), 0.0, lse))
            weights.append(self.grad_lse.to(lse.dtype))
        grads = torch.autograd.grad(outputs, leaves, weights)
        return Results(out.detach(), None if lse is None else lse.detach(), *grads)


def make_qkv(
    batch: int,
    heads: int,
    kv_heads: int,
    query_len: int,
    kv_len: int,
    head_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype,
    device: str,
    rows_outside_heads: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal query, key and value; with `rows_outside_heads` they are transposed views, as models make them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(num_heads: int, length: int, dim: int) -> Tensor:
        tensor = torch.randn(batch, num_heads, length, dim, generator=generator)
        tensor = tensor.to(device=device, dtype=dtype)
        return tensor.transpose(1, 2).contiguous().transpose(1, 2) if rows_outside_heads else tensor

    return (
        normal(heads, query_len, head_dim),
        normal(kv_heads, kv_len, head_dim),
        normal(kv_heads, kv_len, value_dim),
    )


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    factor: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the inputs' dtype.

    `mask`: bool, `factor`: of dropout, `bias`: added to the scores after the softcap, all [batch, heads, query, key].
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None])
    if sinks is not None:
        weights = weights[..., :-1]
    if factor is not None:
        weights = weights * factor.to(weights.dtype)
    return weights @ value, lse


def torch_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options) -> tuple:
    """torch's own attention in the inputs' dtype: SDPA, or its formula written out for what SDPA does not offer."""
    options = {name: option for name, option in options.items() if option is not None}
    # SDPA is not asked for scales that are not positive; whether its fused kernels get those right has not been checked.
    if options.keys() - {"scale"} or options.get("scale", 1) <= 0:
        return dense_attention(query, key, value, mask, **options)
    # As users call it, so that it picks the kernel they get: no mask where nothing is hidden, keys repeated for GQA.
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    if mask.all():
        return F.scaled_dot_product_attention(query, key, value, **options), None
    # SDPA is asked for no row without a key: all keys instead, and a weight of zero.
    has_key = mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask | ~has_key, **options)
    return out * has_key, None


@dataclass(frozen=True)
class Deviation:
    """The largest error of one result against float64, where it is, and what it may be."""

    error: float
    bound: float
    place: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """Error / bound; more than one is a miss."""
        return self.error / self.bound if self.error else 0.0


def deviations(
    ours: Results,
    reference: Results,
    torchs: Sequence[Results],
    has_dropout: bool = False,
    cancelling: float = 1.0,
) -> dict[str, Deviation]:
    """By result. Against float64, ours may err twice as much as torch does in the same dtype, plus one rounding unit of the largest value.

    `torchs`: one or more results of torch for the same call; the one that errs most counts. `cancelling`: size of the terms whose sums
    may cancel in a gradient (`Inputs.largest_score_term`).

    The LSE has an absolute bound of its own. Infinities must agree, a NaN is an infinite error. With dropout the unit is one of terms of
    size one, where the largest value is smaller: fused kernels take <grad_out, out> with the output that they returned, rounded. The
    formula that stands in for SDPA there does not, and leaves a row of one key a gradient of exactly 0.
    """
    found = {}
    for name in ("out", "grad_query", "grad_key", "grad_value", "grad_sinks"):
        got, exact = getattr(ours, name), getattr(reference, name)
        if exact is None:
            continue
        assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, not {exact.shape}"
        unit = torch.finfo(got.dtype).eps * exact.abs().max()
        if got.dtype != torch.float32:
            rest = CANCELLATION * max(1.0, cancelling)
            unit = unit.clamp(min=torch.finfo(got.dtype).eps if has_dropout else rest)
        errors = [(getattr(other, name).double() - exact).abs().max() for other in torchs]
        bound = 2 * torch.stack(errors).max() + unit
        assert bound.isfinite(), f"torch's own {name} is not finite"
        found[name] = _deviation((got.double() - exact).abs(), float(bound))
    assert torch.equal(ours.lse.isneginf(), reference.lse.isneginf()), "rows without keys differ"
    finite = ~reference.lse.isneginf()
    if finite.any():
        error = torch.where(finite, ours.lse.double() - reference.lse, 0.0).abs()
        largest = float(reference.lse[finite].abs().max())
        found["lse"] = _deviation(error, LSE_TOLERANCE * max(1.0, largest))
    return found


def _deviation(error: Tensor, bound: float) -> Deviation:
    error = error.nan_to_num(nan=math.inf)
    worst = error.argmax()
    place = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
    return Deviation(float(error.flatten()[worst]), bound, place)


def assert_within_bounds(found: dict[str, Deviation]) -> None:
    for name, deviation in found.items():
        assert deviation.error <= deviation.bound, (
            f"{name} errs by {deviation.error:.3e} at {deviation.place}, the bound is {deviation.bound:.3e}"
        )


def assert_close_to_reference(ours: Results, reference: Results, torchs: Results) -> None:
    """`deviations` within their bounds."""
    assert_within_bounds(deviations(ours, reference, [torchs]))


def poison_memory(patch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating point tensors hold NaN, so that an output nobody wrote cannot pass."""

    def poisoning(allocate):
        def allocate_and_fill(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.dtype.is_floating_point:
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return allocate_and_fill

    patch.setattr(torch, "empty", poisoning(torch.empty))
    patch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    patch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))
