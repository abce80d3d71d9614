"""Sequences shared by processes: each has a part of the tokens, and in attention a part of the heads."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_models import HEADS, make_model
from ulysses_worker import CASES

from hf_blocksparse import BigBird, PerHead, SinkWindow, SlidingWindow, patch_model
from hf_blocksparse.transformers_hook import block_sparse_attention_forward

WORKER = Path(__file__).parent / "ulysses_worker.py"
ENGINES = ["double", "deepspeed.runtime.sequence_parallel"]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_compute_what_one_does(engine, tmp_path):
    """Logits and gradients of every case of ulysses_worker.py, and what it sees refused."""
    if engine != "double" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), engine, str(rank), "2", str(tmp_path)],
            env=os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [*CASES, "refusals"]


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if not hasattr(case[1], "layers")]
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_layout_of_some_heads_is_cut_from_that_of_all(name, is_causal):
    layout = CASES[name][1].for_layer(3)
    whole = layout.to_mask(96, is_causal=is_causal, num_heads=HEADS)
    for first, count in ((0, 2), (2, 2), (1, 1), (0, 4)):
        part = layout.for_heads(first, count, HEADS)
        mask = part.to_mask(96, is_causal=is_causal, num_heads=count)
        assert torch.equal(mask, whole[first : first + count])
    # A part of a part, too.
    again = layout.for_heads(1, 3, HEADS).for_heads(2, 1, 3)
    assert torch.equal(again.to_mask(96, is_causal=is_causal, num_heads=1), whole[3:])


def attention_of(layout, heads):
    """An attention call of a patched model with some of its heads only."""
    model = patch_model(make_model("llama"), layout)
    torch.manual_seed(4)
    query, key, value = (torch.randn(1, count, 64, 8) for count in (HEADS, 2, 2))
    groups = slice(heads.start // 2, -(-heads.stop // 2))
    module = model.model.layers[0].self_attn
    tensors = (query[:, heads], key[:, groups], value[:, groups])
    return block_sparse_attention_forward(module, *tensors, None, is_causal=True)[0]


def test_tensor_parallelism_takes_layouts_that_are_the_same_for_all_heads():
    alternating = PerHead((SinkWindow(2, 9), SlidingWindow(5)) * 2)
    for layout in (SinkWindow(2, 9), BigBird(16, random_blocks=0), alternating):
        whole = attention_of(layout, slice(0, 4))
        for part in (slice(0, 2), slice(2, 4)):
            torch.testing.assert_close(attention_of(layout, part), whole[:, :, part])
    for layout in (BigBird(16), PerHead((SinkWindow(2, 9), *[SlidingWindow(5)] * 3))):
        with pytest.raises(
            NotImplementedError, match="got 2 of its 4 query heads, as under tensor"
        ):
            attention_of(layout, slice(0, 2))
