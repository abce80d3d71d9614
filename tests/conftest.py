"""Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before anything imports Triton."""

import os
import sys

import numerics
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side: threads of several of them would only wait for each other.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


# Files that take longest, first, so that no process waits for another's at the end: two compile, the others compute.
LONGEST = (
    "test_triton_compile.py",
    "test_hopper_compile.py",
    "test_finetune.py",
    "test_triton_kernels.py",
    "test_compiled_models.py",
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def exact_products():
    """The interpreter's products are numpy's, whose last bits depend on the processor's BLAS; here they are rounded once, from float64.

    What is left to judge in the interpreter is what the kernels do with products. On a GPU they are the tensor cores'.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Uninitialised floating point tensors hold NaN, so that an output nobody wrote cannot pass."""
    numerics.poison_memory(monkeypatch)


@pytest.fixture(autouse=True)
def calls_are_forgotten():
    """Equal calls are checked once and their launches kept: what a test replaces must not be passed by for what an earlier one did."""
    attention = sys.modules.get("hf_blocksparse.attention")
    if attention is not None:
        attention._prepare_known.cache_clear()
