"""Tensors of more than 2^31 elements, whose offsets no 32-bit number holds (`-m gpu`)."""

import pytest
import torch

from hf_blocksparse import SinkWindow, block_sparse_attention

LENGTH, HEADS, HEAD_DIM = 1_048_700, 16, 128
NEEDED_BYTES = 50 << 30
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def enough_memory():
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED_BYTES:
        pytest.skip(f"{free >> 30} GiB of GPU memory are free (needs {NEEDED_BYTES >> 30})")
    yield
    torch.cuda.empty_cache()


def make_tensor(heads_outside_rows: bool, seed: int) -> torch.Tensor:
    shape = (1, HEADS, LENGTH) if heads_outside_rows else (1, LENGTH, HEADS)
    generator = torch.Generator("cuda").manual_seed(seed)
    options = dict(generator=generator, device="cuda", dtype=torch.bfloat16)
    tensor = torch.randn(*shape, HEAD_DIM, **options)
    return tensor if heads_outside_rows else tensor.transpose(1, 2)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("heads_outside_rows", [True, False], ids=["BHSD", "BSHD"])
def test_the_last_head_is_what_it_is_alone(impl, heads_outside_rows):
    tensors = [make_tensor(heads_outside_rows, seed) for seed in range(4)]
    assert tensors[0].numel() > 2**31

    def results(query, key, value, grad_out):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        layout = SinkWindow(4, 100)
        options = dict(is_causal=True, return_lse=True, impl=impl)
        out, lse = block_sparse_attention(*leaves, layout, **options)
        grads = torch.autograd.grad(out, leaves, grad_out)
        return [tensor[:, -1:].clone() for tensor in (out.detach(), lse.detach(), *grads)]

    alone = results(*(tensor[:, -1:].clone() for tensor in tensors))
    names = ("out", "lse", "grad_query", "grad_key", "grad_value")
    for name, got, expected in zip(names, results(*tensors), alone, strict=True):
        if name in ("out", "lse"):
            assert torch.equal(got, expected), name
        else:  # sums in no fixed order, or in one that depends on how many heads share the GPU
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("heads_outside_rows", [True, False], ids=["BHSD", "BSHD"])
def test_the_last_head_of_a_long_cache_is_what_it_is_alone(heads_outside_rows):
    key, value = (make_tensor(heads_outside_rows, seed) for seed in range(2))
    query = torch.randn(1, HEADS, 3, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def attend(*tensors):
        return block_sparse_attention(*tensors, SinkWindow(4, 5000), is_causal=True)

    alone = attend(*(tensor[:, -1:].clone() for tensor in (query, key, value)))
    # More programs share a row where there are fewer of them, so sums are in another order.
    torch.testing.assert_close(attend(query, key, value)[:, -1:], alone, rtol=2e-2, atol=2e-3)
