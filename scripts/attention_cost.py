"""Time and memory of attention, alone and in a model; each function is run in a fresh process."""

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from typing import Any

import torch
from evaluation_results import DENSE
from pretrained import load_model
from sparsify_results import NONE, CostRow
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_blocksparse import PerLayer, block_sparse_attention, layout_from_dict, patch_model
from hf_blocksparse.evaluation import Cost, in_fresh_process, measure_cost, next_token_losses

ALONE, WHOLE_MODEL = "attention alone", "whole model"
FORWARD, FORWARD_AND_BACKWARD = "forward", "forward and backward"
# transformers' own attention functions, and a model that has none: no layout can be faster.
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", NONE)


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Mixed precision in `dtype` over float32 weights; nothing where dtype is float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def cost_row(attention: str, part: str, work: str, measure: Callable[[], Cost]) -> CostRow:
    """What `measure` (picklable) returns in a process of its own; a lack of memory there is a result, too."""
    cost, failure = None, None
    try:
        cost = in_fresh_process(measure)
    except torch.OutOfMemoryError:
        failure = "out of GPU memory"
    except BrokenProcessPool:
        failure = "ended by the system, most likely for memory"
    return CostRow(attention, part, work, cost, failure)


def no_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **options: Any
) -> tuple[Tensor, None]:
    """Each token's own value, in transformers' signature; queries and keys get their (zero) gradients,
    so that all of a training step but the attention is computed.
    """
    groups = query.shape[1] // key.shape[1]
    unused = query.sum(-1, keepdim=True) + key.repeat_interleave(groups, 1).sum(-1, keepdim=True)
    out = value.repeat_interleave(groups, 1) + 0 * unused
    return out.transpose(1, 2).to(value.dtype), None


class HeadGroups(nn.Module):
    """What transformers' attention functions read from an attention module."""

    def __init__(self, num_groups: int):
        super().__init__()
        self.num_key_value_groups = num_groups
        self.is_causal = True


def attention_function(
    implementation: str,
    layout: dict[str, Any] | None,
    *,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    context_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], tuple[Tensor, ...]]:
    """One causal attention on random inputs, batch 1, that returns the gradients of query, key, value.

    Args:
        implementation: "eager" or "sdpa", transformers' own functions on the inputs its models give
            them; "block_sparse" with `layout` (of a `PerLayer`, the first one).
    """
    generator = torch.Generator(device).manual_seed(0)
    query, grad, key, value = (
        torch.randn(
            (1, heads, context_tokens, head_dim), generator=generator, device=device, dtype=dtype
        )
        for heads in (query_heads, query_heads, kv_heads, kv_heads)
    )
    inputs = tuple(tensor.requires_grad_() for tensor in (query, key, value))
    scale = head_dim**-0.5
    if layout is not None:
        sparse = layout_from_dict(layout)
        if isinstance(sparse, PerLayer):
            sparse = sparse.layers[0][1]
        sparse = sparse.for_layer(0)

        def attend() -> Tensor:
            return block_sparse_attention(
                query, key, value, sparse, is_causal=True, scale=scale, enable_gqa=True
            )
    else:
        module, mask = HeadGroups(query_heads // kv_heads), None
        if implementation == "eager":
            mask = torch.full(
                (1, 1, context_tokens, context_tokens),
                torch.finfo(dtype).min,
                device=device,
                dtype=dtype,
            ).triu_(1)
        dense = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward}[implementation]

        def attend() -> Tensor:
            return dense(module, query, key, value, mask, scaling=scale)[0].transpose(1, 2)

    return lambda: torch.autograd.grad(attend(), inputs, grad)


def attention_alone(
    implementation: str,
    layout: dict[str, Any] | None,
    *,
    device: torch.device,
    repetitions: int,
    **shapes: Any,
) -> Cost:
    """Cost of `attention_function`, forward and backward."""
    function = attention_function(implementation, layout, device=device, **shapes)
    return measure_cost(function, device=device, repetitions=repetitions)


def whole_model(
    implementation: str,
    layout: dict[str, Any] | None,
    *,
    path: str,
    tokens: list[list[int]],
    work: str,
    first_target: int,
    device: torch.device,
    dtype: torch.dtype,
    repetitions: int,
    warmup: int,
    weights: torch.dtype = torch.float32,
) -> Cost:
    """Score windows ("forward"), or one training step without its optimizer, with the gradient
    checkpointing of the fine-tuning ("forward and backward").

    Args:
        implementation: one of `IMPLEMENTATIONS`, or "block_sparse" with `layout`.
        dtype: what is computed in, by autocast where the weights are float32.
        weights: dtype of the weights.
    """
    if implementation == NONE:
        implementation = no_attention.__name__
        AttentionInterface.register(implementation, no_attention)
        AttentionMaskInterface.register(implementation, lambda *sizes, **options: None)
    model = load_model(
        path, device, attn_implementation=DENSE if layout is not None else implementation
    )
    model.to(weights)
    if layout is not None:
        patch_model(model, layout_from_dict(layout))
    # Nothing is cast where the weights have the dtype already.
    autocast_dtype = dtype if weights == torch.float32 else torch.float32
    windows = torch.tensor(tokens, device=device)

    def score() -> None:
        with torch.no_grad(), autocast(device, autocast_dtype):
            next_token_losses(model, windows, first_target=first_target)

    def step() -> None:
        with autocast(device, autocast_dtype):
            loss = next_token_losses(model, windows).mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    if work == FORWARD_AND_BACKWARD:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return measure_cost(
        step if work == FORWARD_AND_BACKWARD else score,
        device=device,
        repetitions=repetitions,
        warmup=warmup,
    )
