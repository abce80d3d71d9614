"""Block-sparse attention for pretrained Hugging Face models.

    import hf_blocksparse as bs

    bs.patch_model(model, bs.SinkWindow(sink=64, window=4096))

Importing this package loads neither Triton nor transformers and asks for no GPU; a model saved with a layout is sparse again when
transformers loads it after this import.
"""

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

register_when_imported()
