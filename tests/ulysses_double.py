"""A double of what hf_blocksparse uses of DeepSpeed's Ulysses, for machines without DeepSpeed: the same names, the same exchange.

`register_with_transformers` of DeepSpeed 0.19 replaces the attention function in transformers' table by one that drops the mask,
gathers `position_ids`, exchanges heads for tokens, calls the function that was there, and changes back.
"""

import sys
from types import ModuleType

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_to_all_single
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKAGE = "deepspeed.runtime.sequence_parallel"


def exchange(tensor):
    """[size, ...] -> [size, ...]: the entry for each process, for that of each process."""
    tensor = tensor.contiguous()
    return all_to_all_single(torch.empty_like(tensor), tensor)


def install() -> None:
    state, ulysses = ModuleType(f"{PACKAGE}.parallel_state_sp"), ModuleType(f"{PACKAGE}.ulysses_sp")
    state._SEQUENCE_PARALLEL_GROUP = None
    state.get_sequence_parallel_rank = dist.get_rank
    state.get_sequence_parallel_world_size = dist.get_world_size

    def release():
        state._SEQUENCE_PARALLEL_GROUP = None

    state._release_sequence_parallel_groups = release

    class UlyssesSPAttentionHF:
        @classmethod
        def register_with_transformers(cls, model, core_attn_implementation, **options):
            state._SEQUENCE_PARALLEL_GROUP = dist.group.WORLD
            core, size = ALL_ATTENTION_FUNCTIONS[core_attn_implementation], dist.get_world_size()

            def heads_for_tokens(tensor):
                if tensor.shape[1] < size:
                    tensor = tensor.repeat_interleave(size // tensor.shape[1], 1)
                batch, heads, length, dim = tensor.shape
                parts = tensor.view(batch, size, heads // size, length, dim).transpose(0, 1)
                return exchange(parts).movedim(0, 2).flatten(2, 3)

            def wrapper(module, query, key, value, attention_mask, *args, **kwargs):
                if not module.training:
                    return core(module, query, key, value, None, *args, **kwargs)
                parts = [torch.empty_like(kwargs["position_ids"]) for _ in range(size)]
                dist.all_gather(parts, kwargs["position_ids"])
                kwargs["position_ids"] = torch.cat(parts, 1)
                whole = map(heads_for_tokens, (query, key, value))
                out, weights = core(module, *whole, None, *args, **kwargs)
                batch, length, heads, dim = out.shape
                parts = out.view(batch, size, length // size, heads, dim).transpose(0, 1)
                return exchange(parts).movedim(0, 2).flatten(2, 3), weights

            wrapper.__module__ = ulysses.__name__
            ALL_ATTENTION_FUNCTIONS[core_attn_implementation] = wrapper

    ulysses.UlyssesSPAttentionHF = UlyssesSPAttentionHF
    for module in (state, ulysses):
        sys.modules[module.__name__] = module
