"""One of the processes that share sequences in tests/test_sequence_parallel.py.

    python tests/ulysses_worker.py ENGINE RANK SIZE FOLDER

Runs every case with the sequence split over SIZE processes, compares with the whole sequence in one, and writes the names of the
cases that held to FOLDER/RANK.json.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import FAMILIES, HEADS, VOCABULARY, assert_same, spread_weights
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_blocksparse import (
    BigBird,
    Dense,
    Longformer,
    MaskLayout,
    PerHead,
    PerLayer,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
    patch_model,
)

LENGTH = 96
PACKED = torch.cat([torch.arange(30), torch.arange(41), torch.arange(25)])


def tensor(rows, size):
    torch.manual_seed(3)
    kept = torch.rand(HEADS, rows, rows) < 0.5
    return (kept | torch.eye(rows, dtype=torch.bool)).to(torch.uint8)


BY_HEAD = PerHead((SinkWindow(3, 12), BigBird(16, 1, 0, 1), SlidingWindow(9), Dense()))
CASES = {
    "llama window": ("llama", SinkWindow(4, 12), None),
    "llama per head": ("llama", BY_HEAD, None),
    "llama random": ("llama", BigBird(16, 1, 1, 1), None),
    "llama tensor": ("llama", TensorLayout.from_tensor(tensor(6, 16), 16) & Longformer(50), None),
    "llama mask": ("llama", MaskLayout.from_tensor(tensor(LENGTH, 1)) | SlidingWindow(2), None),
    "llama packed": ("llama", BY_HEAD, PACKED),
    "one key head": ("llama_mqa", BY_HEAD, None),
    "mistral, its own window": ("mistral", SinkWindow(4, 7), None),
    "gpt-oss, one layer its own": ("gpt_oss", PerLayer({1: BY_HEAD}), None),
    "mistral packed": ("mistral", BY_HEAD, PACKED),
    "gemma2": ("gemma2", BY_HEAD, None),
}


def make(family):
    torch.manual_seed(0)
    if family == "llama_mqa":
        config = FAMILIES["llama"]().config.to_dict() | {"num_key_value_heads": 1}
        return spread_weights(LlamaForCausalLM(LlamaConfig(**config)).train())
    return spread_weights(FAMILIES[family]().train())


class SharedSequence:
    """A model whose sequences are split over all processes."""

    def __init__(self, engine, model):
        self.model = model
        self.state = importlib.import_module(f"{engine}.parallel_state_sp")
        ulysses = importlib.import_module(f"{engine}.ulysses_sp")
        ulysses.UlyssesSPAttentionHF.register_with_transformers(
            model,
            core_attn_implementation="block_sparse",
            sequence_parallel_size=dist.get_world_size(),
            micro_batch_size=2,
            disable_in_eval=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        del ALL_ATTENTION_FUNCTIONS["block_sparse"]
        self.state._release_sequence_parallel_groups()

    def part(self, tensor):
        return tensor.chunk(dist.get_world_size(), 1)[dist.get_rank()]

    def __call__(self, **inputs):
        inputs = {name: self.part(value) for name, value in inputs.items()}
        return self.model(**inputs, use_cache=False)


def batch(positions):
    torch.manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    positions = torch.arange(LENGTH) if positions is None else positions
    return {"input_ids": input_ids, "position_ids": positions.expand(2, -1)}


def gradients_of(model, logits, weights):
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_case(engine, family, layout, positions):
    model = patch_model(make(family), layout)
    inputs = batch(positions)
    torch.manual_seed(2)
    weights = torch.randn(2, LENGTH, VOCABULARY)
    whole = model(**inputs, use_cache=False).logits
    expected = (whole.detach(), gradients_of(model, whole, weights))
    with SharedSequence(engine, model) as shared:
        logits = shared(**inputs).logits
        gradients = gradients_of(model, logits, shared.part(weights))
        for gradient in gradients.values():
            dist.all_reduce(gradient)
        assert_same((logits.detach(), gradients), (shared.part(expected[0]), expected[1]))
        model.eval()  # in evaluation every process has whole sequences
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :7] = 0
        padded = model(inputs["input_ids"], attention_mask=mask).logits
    torch.testing.assert_close(padded, model(inputs["input_ids"], attention_mask=mask).logits)


def check_refusals(engine):
    model = patch_model(make("llama"), SinkWindow(4, 12))
    inputs = batch(None)
    ones = torch.ones_like(inputs["input_ids"])
    padded = ones.clone()
    padded[:, [3, -3]] = 0
    with SharedSequence(engine, model) as shared:
        shared(**inputs, attention_mask=ones)
        with pytest.raises(
            NotImplementedError, match="attention_mask got padding in .* pack docum"
        ):
            shared(**inputs, attention_mask=padded)
        length = LENGTH // dist.get_world_size()
        inputs = {name: shared.part(value) for name, value in inputs.items()}
        with pytest.raises(NotImplementedError, match="got a mask tensor under sequence paralleli"):
            model(**inputs, attention_mask=torch.ones(2, 1, length, length, dtype=torch.bool))
        with pytest.raises(NotImplementedError, match="output_attentions got True in .* own heads"):
            model(**inputs, output_attentions=True)


def main() -> None:
    engine, rank, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    if engine == "double":
        import ulysses_double

        ulysses_double.install()
        engine = ulysses_double.PACKAGE
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    if engine == "deepspeed.runtime.sequence_parallel" and sys.argv[1] != "double":
        import deepspeed

        deepspeed.init_distributed("gloo")
    held = []
    for name, case in CASES.items():
        check_case(engine, *case)
        held.append(name)
    check_refusals(engine)
    held.append("refusals")
    (folder / f"{rank}.json").write_text(json.dumps(held))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
