"""Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before anything imports Triton."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side: threads of several of them would only wait for each other.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Uninitialised floating point tensors hold NaN, so that an output nobody wrote cannot pass."""

    def poisoning(allocate):
        def allocate_and_fill(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.dtype.is_floating_point:
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return allocate_and_fill

    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))
