"""One of two processes whose model FSDP2 shards, for tests/test_finetune.py: gradients of the chunked loss beside those of a whole model.

    torchrun --standalone --nproc_per_node 2 tests/sharded_loss.py

The first process prints a JSON line per case. Sharding on CPU processes is torch's alone: accelerate, which the recipes go through,
shards over GPUs only.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from chunked_loss import use_chunked_loss

from hf_blocksparse import SlidingWindow, evaluation, patch_model

VOCABULARY, LENGTH, CHUNK = 96, 40, 16
# Whether the output embedding is the input's; whether it is sharded by itself, not with the rest of the model.
CASES = {"tied": (True, False), "untied": (False, False), "by itself": (False, True)}


def make_model(is_tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=is_tied, initializer_range=0.2,
    )  # fmt: skip
    model = patch_model(LlamaForCausalLM(config), SlidingWindow(20))
    use_chunked_loss(model, CHUNK)
    return model


def compare(name: str, rank: int) -> dict[str, object]:
    is_tied, by_itself = CASES[name]
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    whole, sharded = make_model(is_tied), make_model(is_tied)
    sum(whole(input_ids=row[None], labels=row[None]).loss / 2 for row in tokens).backward()
    mesh = init_device_mesh("cpu", (2,))
    for part in (*sharded.model.layers, *([sharded.lm_head] if by_itself else []), sharded):
        fully_shard(part, mesh=mesh)
    row = tokens[rank : rank + 1]
    for _ in range(2):  # weights are gathered anew in the second step
        sharded.zero_grad()
        sharded(input_ids=row, labels=row).loss.backward()
    errors = []
    for there, here in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert isinstance(there.grad, DTensor)
        difference = there.grad.full_tensor() - here.grad
        errors.append((difference.norm() / here.grad.norm()).item())
    return {"case": name, "bare": evaluation._is_bare(sharded.lm_head), "error": max(errors)}


def main() -> None:
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    for name in CASES:
        record = compare(name, rank)
        if rank == 0:
            print(json.dumps(record), flush=True)
    dist.barrier()
    sys.stdout.flush()
    # Threads of torch's may outlive Python's end of a process that sharded on CPUs, and abort it.
    os._exit(0)


if __name__ == "__main__":
    main()
