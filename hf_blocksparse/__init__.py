"""Block-sparse attention for pretrained Hugging Face models.

    import hf_blocksparse as bs

    bs.patch_model(model, bs.SinkWindow(sink=64, window=4096))

Importing this package loads neither Triton nor transformers and asks for no GPU; a model saved with a layout is sparse again when
transformers loads it after this import.
"""

from typing import TYPE_CHECKING, Any

from hf_blocksparse import library as library  # registers the operators that torch.compile sees
from hf_blocksparse.adapters import norm_and_embedding_options, patch_model_for_adapter
from hf_blocksparse.attention import block_sparse_attention
from hf_blocksparse.layouts import (
    BigBird,
    BlockDiagonal,
    Dense,
    Intersection,
    Layout,
    Longformer,
    MaskLayout,
    PerHead,
    PerLayer,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
    Union,
    layout_from_dict,
    layout_from_name,
    layout_to_mask,
    mask_to_layout,
)
from hf_blocksparse.modules import BlockSparseAttention, MultiHeadDispatch
from hf_blocksparse.patch import patch_model, unpatch_model
from hf_blocksparse.positions import extend_positions
from hf_blocksparse.replacements import native_layout
from hf_blocksparse.sequences import Sequences
from hf_blocksparse.transformers_hook import register_when_imported

if TYPE_CHECKING:
    from hf_blocksparse.sparse_cache import SparseCache

__version__ = "0.1.0"

__all__ = [
    "BigBird",
    "BlockDiagonal",
    "BlockSparseAttention",
    "Dense",
    "Intersection",
    "Layout",
    "Longformer",
    "MaskLayout",
    "MultiHeadDispatch",
    "PerHead",
    "PerLayer",
    "Sequences",
    "SinkWindow",
    "SlidingWindow",
    "SparseCache",
    "TensorLayout",
    "Union",
    "block_sparse_attention",
    "extend_positions",
    "layout_from_dict",
    "layout_from_name",
    "layout_to_mask",
    "mask_to_layout",
    "native_layout",
    "norm_and_embedding_options",
    "patch_model",
    "patch_model_for_adapter",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    if name == "SparseCache":  # a class of transformers, which this package does not load unasked
        from hf_blocksparse.sparse_cache import SparseCache

        return SparseCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_when_imported()
