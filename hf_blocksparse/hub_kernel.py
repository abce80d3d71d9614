"""This package as a hub kernel: what transformers looks for in one, where `attn_implementation="<org>/<repo>"` names it.

`scripts/build_hub_kernel.py` writes the kernel's folder, whose modules pass these names on. transformers takes `flash_attn_forward` of
a kernel that also has `supports_flash_attn` for its attention function. Loading the kernel imports this package, so that a model is
then as if it had been loaded after `import hf_blocksparse`: its layouts come from the section `block_sparse` of its configuration.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_blocksparse.model_layouts import IMPLEMENTATION

supports_flash_attn = True


def flash_attn_forward(
    module: nn.Module, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function `block_sparse`, in the signature of transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION](module, *args, **kwargs)


def names_this_package(implementation: str | None) -> bool:
    """Whether transformers has loaded this package as the kernel `implementation`."""
    from transformers.modeling_utils import AttentionInterface

    return AttentionInterface._global_mapping.get(implementation) is flash_attn_forward
