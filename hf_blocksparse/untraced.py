"""The way out of a graph for calls that torch.compile cannot put into one.

Imported where it is needed, while tracing: `torch.compiler.disable` loads the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(
    reason="block_sparse_attention got a layout tensor, a preset with block_size, or a Sequences; a compiled graph holds tensors, plain "
    "values, and layouts by name only; make the layout outside of the compiled function (TensorLayout.from_tensor), and pass "
    "key_padding_mask or document_ids instead of sequences."
)
def run_outside_of_graphs(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, with a break of the graph around it; with fullgraph=True the compiler raises this reason."""
    return function(*args, **kwargs)
