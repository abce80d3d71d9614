"""Block-sparse attention in portable Triton: the implementation `impl="triton"`, and with `impl="auto"` that of a GPU.

With "auto" the kernels in `ops/hopper` take what they can on compute capability 9.0, but for few queries; these take everything else.

One program computes one tile of one head and walks the tiles its list names: query tiles in the forward kernel and for
dQ, key tiles for dK and dV. Few queries against many keys, as in decoding, have kernels of their own (`decode`), which split
the tiles of a query tile over several programs. Nothing is added atomically, so results are bitwise reproducible.

Triton is imported at the first call, not with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from hf_blocksparse.ops import hopper
from hf_blocksparse.ops.problem import Problem, TensorSpec
from hf_blocksparse.ops.triton.decode_sizes import has_few_queries
from hf_blocksparse.ops.triton.recordings import recorded
from hf_blocksparse.ops.triton.tile_sizes import backend_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
RECORDED_DTYPES = (torch.float16, torch.bfloat16)
"""Products of float32 also depend on what torch allows, and take longer than it takes to issue a call."""


@cache
def _launch() -> ModuleType:
    from hf_blocksparse.ops.triton import launch

    return launch


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def unsupported(
    query: TensorSpec, key: TensorSpec, value: TensorSpec, slopes_need_grad: bool = False
) -> list[str]:
    """Every reason why these kernels cannot run a call; empty if they can."""
    reasons = []
    device = query.device
    if not _has_triton():
        reasons.append("triton is not installed (needs >= 3.6)")
    elif device.type == "cpu" and not _launch().IS_INTERPRETED:
        reasons.append("device is cpu (needs cuda, or TRITON_INTERPRET=1 set before triton loads)")
    elif device.type == "cpu" and query.dtype == torch.bfloat16:
        reasons.append("dtype is bfloat16, whose products Triton's interpreter gets wrong")
    elif device.type not in ("cpu", "cuda"):
        reasons.append(f"device is {device.type} (needs cuda)")
    elif device.type == "cuda":
        backend, capability = backend_of(device)
        if backend == "cuda" and capability < 80:
            reasons.append(f"compute capability is {capability / 10} (needs >= 8.0)")
    if query.dtype not in DTYPES:
        reasons.append(f"dtype is {query.dtype} (needs float16, bfloat16 or float32)")
    for name, size in (("head_dim", query.shape[-1]), ("value_dim", value.shape[-1])):
        if size % 8 or not 16 <= size <= 256:
            reasons.append(f"{name} is {size} (needs a multiple of 8 from 16 to 256)")
    if slopes_need_grad:
        reasons.append(
            "alibi_slopes require a gradient (needs constant slopes: alibi_slopes.detach())"
        )
    return reasons


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; see docs/architecture.md, "Operation of an implementation".

    Args:
        query: [batch, query_heads, query_len, head_dim], float16, bfloat16 or float32.
        key, value: [batch, kv_heads, kv_len, head_dim] and [.., value_dim].
        sinks: [query_heads] or None.
        alibi_slopes: float32 [batch, query_heads] or None.
        problem: where the sequences lie and which tiles are kept.

    Returns:
        [batch, query_heads, query_len, value_dim] in query's dtype, and float32 [batch, query_heads, query_len].
    """
    query, scale = _with_positive_scale(query, problem.scale)
    query, key, value = map(_with_unit_stride, (query, key, value))
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return _run_forward(query, key, value, sinks, alibi_slopes, problem, scale)
    return _Attention.apply(query, key, value, sinks, alibi_slopes, problem, scale)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """`attention` without gradients."""
    query, scale = _with_positive_scale(query, problem.scale)
    query, key, value = map(_with_unit_stride, (query, key, value))
    return _run_forward(query, key, value, sinks, alibi_slopes, problem, scale)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
    """Gradients of query, key, value and sinks from what `attention_forward` was given and returned; None where not `needed`.

    None for the ALiBi slopes in any case, see `unsupported`.
    """
    query, scale = _with_positive_scale(query, problem.scale)
    query, key, value = map(_with_unit_stride, (query, key, value))
    grad_query, grad_key, grad_value, grad_sinks = _run_backward(
        grad_out, grad_lse, query, key, value, sinks, alibi_slopes, out, lse,
        problem, scale, needed,
    )  # fmt: skip
    if grad_query is not None:
        grad_query, _ = _with_positive_scale(grad_query, problem.scale)
    return grad_query, grad_key, grad_value, grad_sinks, None


def _with_positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels take maxima before they scale, so the sign goes into the query."""
    if scale > 0:
        return query, scale
    return (query * -1.0, -scale) if scale < 0 else (query * 0.0, 1.0)


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    problem: Problem,
    scale: float,
) -> tuple[Tensor, Tensor]:
    def run() -> tuple[Tensor, Tensor]:
        if has_few_queries(query.shape[2], key.shape[2], problem.dropout_p):
            return _launch().launch_decode(query, key, value, sinks, alibi_slopes, problem, scale)
        if hopper.takes_forward(query, key, value, sinks, alibi_slopes, problem):
            return hopper.forward(query, key, value, problem, scale)
        return _launch().launch_forward(query, key, value, sinks, alibi_slopes, problem, scale)

    if query.dtype not in RECORDED_DTYPES:
        return run()
    return recorded(problem.recordings, ("forward",), (query, key, value, sinks, alibi_slopes), run)


def _run_backward(
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
    scale: float,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    def run() -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        if hopper.takes_backward(query, key, value, sinks, alibi_slopes, problem):
            return *hopper.backward(
                grad_out, grad_lse, query, key, value, out, lse, problem, scale, needed
            ), None
        return _launch().launch_backward(
            grad_out, grad_lse, query, key, value, sinks, alibi_slopes, out, lse,
            problem, scale, needed,
        )  # fmt: skip

    if query.dtype not in RECORDED_DTYPES:
        return run()
    kind = ("backward", torch.are_deterministic_algorithms_enabled(), *needed)
    inputs = (grad_out, grad_lse, query, key, value, sinks, alibi_slopes, out, lse)
    return recorded(problem.recordings, kind, inputs, run)


class _Attention(Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, alibi_slopes, problem, scale):  # type: ignore[no-untyped-def]
        out, lse = _run_forward(query, key, value, sinks, alibi_slopes, problem, scale)
        ctx.save_for_backward(query, key, value, sinks, alibi_slopes, out, lse)
        ctx.problem = problem
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
        if grad_out is None and grad_lse is None:
            return (None,) * 7
        arguments = (
            grad_out, grad_lse, *ctx.saved_tensors, ctx.problem, ctx.scale, ctx.needs_input_grad,
        )  # fmt: skip
        # Gradients are recorded in a backward only where somebody wants the second derivative.
        if torch.is_grad_enabled():
            gradients = _AttentionBackward.apply(*arguments)
        else:
            gradients = _run_backward(*arguments)
        return *gradients, None, None, None


class _AttentionBackward(Function):
    """The first derivative as an operation of its own, so that asking for the second one says what to do."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, grad_out, grad_lse, query, key, value, sinks, alibi_slopes, out, lse,
        problem, scale, needed,
    ):  # fmt: skip
        return _run_backward(
            grad_out, grad_lse, query, key, value, sinks, alibi_slopes, out, lse,
            problem, scale, needed,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise NotImplementedError(
            "impl='triton' got a request for a second derivative; its backward kernels are not differentiable; "
            "use impl='torch'."
        )
