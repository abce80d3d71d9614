"""A training loss that never holds the logits of a whole sequence."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_blocksparse.evaluation import check_head, chunked_losses


def use_chunked_loss(model: PreTrainedModel, chunk_tokens: int) -> None:
    """Make `model(labels=...)` compute its loss over `chunk_tokens` positions at a time, in place.

    The logits of 131,072 tokens over a vocabulary of as many are 64 GiB in float32; a chunk of 1,024 is
    0.5 GiB. The loss is the model's own: the mean over labels that are not -100, or their sum over
    `num_items_in_batch`, as the Trainer asks for; the output holds the loss alone. It stays a call of
    the model itself, so wrappers that act on its forward (DDP, FSDP2, DeepSpeed, PEFT, mixed precision)
    still do. `shift_labels` name what each position predicts, as DeepSpeed gives them with a part of a
    sequence, whose last target is the next part's first token.
    Raises NotImplementedError where something follows the output embedding (a softcap, a scale).
    """
    # Not one token over and over: the embedding of padding is zero, and any softcap of zero is zero.
    with torch.no_grad():
        check_head(model, torch.arange(8, device=model.device)[None])

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        shift_labels: Tensor | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        inputs = {name: value for name, value in inputs.items() if value is not None}
        hidden = self.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        if shift_labels is None:
            hidden, targets = hidden[:, :-1], labels[:, 1:]
        else:
            targets = shift_labels
        losses = chunked_losses(
            self.get_output_embeddings(), hidden, targets, chunk_tokens=chunk_tokens
        )
        # A part of a sequence may have nothing to predict.
        count = (targets != -100).sum().clamp(min=1)
        count = count if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=losses.sum() / count)

    model.forward = MethodType(forward, model)
