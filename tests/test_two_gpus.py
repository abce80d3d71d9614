"""A patched model on two GPUs of one process: `pytest -m gpu tests/test_two_gpus.py`. Training by two processes: tests/test_finetune.py."""

import pytest
import torch
from script_inputs import write_model
from transformers import AutoModelForCausalLM

from hf_blocksparse import BigBird, Dense, PerHead, SinkWindow, SlidingWindow, patch_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
LAYOUT = PerHead((SinkWindow(64, 192), BigBird(128, 1, 1, 1), SlidingWindow(200), Dense()))
SPLIT = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    "model.layers.0": 0,
    "model.layers.1": 1,
    "model.norm": 1,
    "lm_head": 1,
}
# Of the outputs' size, in a product of the same tensors on another GPU.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model that is saved with its layout, and whose weights let attention matter."""
    folder = tmp_path_factory.mktemp("models") / "sparse"
    write_model(folder, hidden_size=256, max_position_embeddings=1024, initializer_range=0.1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    patch_model(model, LAYOUT).save_pretrained(folder)
    return folder


def load(folder, dtype, device_map):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map)


def padded_batch():
    torch.manual_seed(1)
    mask = torch.ones(4, 700, dtype=torch.long)
    mask[1, :70] = 0
    return {"input_ids": torch.randint(3, 256, mask.shape), "attention_mask": mask}


def run(model, batch):
    """Logits of the real tokens and the gradient of every parameter, on the CPU."""
    batch = {name: tensor.to("cuda:0") for name, tensor in batch.items()}
    logits = model(**batch, use_cache=False).logits
    logits = logits[batch["attention_mask"].to(logits.device).bool()]
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view(logits.shape)
    (logits.float() * weights).mean().backward()
    gradients = [parameter.grad.cpu() for parameter in model.parameters()]
    return [logits.detach().cpu(), *gradients]


def assert_same(actual, expected, dtype):
    for one, other in zip(actual, expected, strict=True):
        error = (one.float() - other.float()).norm()
        assert error <= TOLERANCE[dtype] * other.float().norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layers_on_two_gpus_compute_what_one_gpu_does(folder, dtype):
    whole, split = (load(folder, dtype, device_map) for device_map in ({"": 0}, SPLIT))
    assert {parameter.device.index for parameter in split.parameters()} == {0, 1}
    batch = padded_batch()
    assert_same(run(split, batch), run(whole, batch), dtype)
    assert not torch.allclose(*(run(m, batch)[0] for m in (patch_model(whole, Dense()), split)))


def test_layers_on_two_gpus_generate_what_one_gpu_does(folder):
    batch = {name: tensor.to("cuda:0") for name, tensor in padded_batch().items()}
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    texts = [
        load(folder, torch.float32, device_map).generate(
            **batch, **options, cache_implementation=cache
        )
        for cache in (None, "static")
        for device_map in ({"": 0}, SPLIT)
    ]
    assert all(torch.equal(text, texts[0]) for text in texts)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_batch_on_two_gpus_computes_what_one_gpu_does(folder, dtype):
    """`nn.DataParallel`, which the Trainer uses where several GPUs are seen and nothing was launched: two threads, one model."""
    model, batch = load(folder, dtype, {"": 0}), padded_batch()
    expected = run(model, batch)
    model.zero_grad()
    assert_same(run(torch.nn.DataParallel(model, [0, 1]), batch), expected, dtype)
