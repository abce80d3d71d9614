"""The package is light to import, and connects to transformers whenever that is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_model

from hf_blocksparse import SinkWindow
from hf_blocksparse.patch import patch_model

ROOT = Path(__file__).parent.parent

LOAD = """
model = AutoModelForCausalLM.from_pretrained({path!r})
assert model.config._attn_implementation == "block_sparse", model.config._attn_implementation
print([str(layer.self_attn._block_sparse.layout) for layer in model.model.layers])
"""


def fresh_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def sparse_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse")
    patch_model(make_model("llama", "sdpa"), SinkWindow(4, 16)).save_pretrained(path)
    return str(path)


LAYERS = "['SinkWindow(sink=4, window=16)', 'SinkWindow(sink=4, window=16)']\n"


def test_the_import_is_light_and_a_later_transformers_is_connected(sparse_checkpoint):
    made = fresh_python(
        "import sys, torch, hf_blocksparse\n"
        "for name in ('triton', 'transformers', 'matplotlib', 'torch._dynamo'):\n"
        "    assert name not in sys.modules, name\n"
        "assert not torch.cuda.is_initialized()\n"
        "waiting = [type(finder).__module__ for finder in sys.meta_path]\n"
        "assert 'hf_blocksparse.transformers_hook' in waiting\n"
        "from transformers import AutoModelForCausalLM\n"
        + LOAD.format(path=sparse_checkpoint)
        + "(left,) = [f for f in sys.meta_path if 'hf_blocksparse' in type(f).__module__]\n"
        "assert left.waiting == {'peft.config', 'peft.peft_model'}, left.waiting\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == LAYERS


@pytest.mark.parametrize("first", ["transformers", "transformers.modeling_utils"])
def test_a_transformers_that_was_there_first_is_connected(first, sparse_checkpoint):
    made = fresh_python(
        f"import {first}\nimport hf_blocksparse\nfrom transformers import AutoModelForCausalLM\n"
        + LOAD.format(path=sparse_checkpoint)
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == LAYERS


def test_without_the_import_a_sparse_checkpoint_fails_loudly(sparse_checkpoint):
    made = fresh_python(
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({sparse_checkpoint!r})",
    )
    assert made.returncode == 1
    assert (
        'ValueError: Specified `attn_implementation="block_sparse"` is not supported' in made.stderr
    )
