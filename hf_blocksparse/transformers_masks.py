"""What a transformers model asks of its attention mask, carried without a `length x length` tensor.

transformers describes a mask by nested functions of `(batch, head, q_index, kv_index)` and asks the registered mask function to
turn them into whatever the attention function reads. `make_mask` recognises causal, bidirectional, sliding-window, chunked,
padded and packed masks and returns a `SequenceMask`: the table of sequences and a few plain values. Anything else is evaluated
into a dense boolean mask: exact, at the price of `batch x query_len x kv_len` bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_blocksparse.sequences import Sequences

_MASKING = "transformers.masking_utils"


class SequenceMask(Tensor):
    """A 4-D boolean mask `(batch, 1, query_len, kv_len)` without storage.

    It is a tensor because transformers, accelerate and `generate` pass masks around as tensors: they move them between devices,
    copy them and read their shape. Any other operation raises.

    Attributes:
        sequences: where the sequences lie in the batch.
        is_causal: a query reads no later position.
        window_tokens: `|i - j| < window_tokens`, or None.
        chunk_tokens: `i // chunk_tokens == j // chunk_tokens`, or None.
        dense: bool, broadcastable to (batch, heads, query_len, kv_len), on top of all the others, or None.
        covers_batch: neither padding nor documents: every batch row is one sequence.
        is_cross: queries and keys are not the same tokens.
        derived: what layers worked out from this mask for each other.
    """

    sequences: Sequences
    is_causal: bool
    window_tokens: int | None
    chunk_tokens: int | None
    dense: Tensor | None
    covers_batch: bool
    is_cross: bool
    derived: dict[Any, Any]
    _arguments: dict[str, Any] | None
    _own_masks: dict[str, Tensor | None]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        batch: int,
        query_len: int,
        kv_len: int,
        sequences: Sequences,
        *,
        is_causal: bool = False,
        window_tokens: int | None = None,
        chunk_tokens: int | None = None,
        dense: Tensor | None = None,
        covers_batch: bool = False,
        is_cross: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> SequenceMask:
        mask = torch.Tensor._make_wrapper_subclass(
            cls,
            (batch, 1, query_len, kv_len),
            dtype=torch.bool,
            device=sequences.table.device,
        )
        mask.sequences = sequences
        mask.is_causal = is_causal
        mask.window_tokens = window_tokens
        mask.chunk_tokens = chunk_tokens
        mask.dense = dense
        mask.covers_batch = covers_batch
        mask.is_cross = is_cross
        mask.derived = {}
        mask._arguments = arguments
        mask._own_masks = {}
        return mask

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"SequenceMask(shape={tuple(self.shape)}, sequences={self.sequences.num_sequences}, "
            f"is_causal={self.is_causal}, window_tokens={self.window_tokens}, "
            f"chunk_tokens={self.chunk_tokens}, dense={self.dense is not None})"
        )

    @property
    def key_start(self) -> int:
        """Place of the first key among all tokens so far: not 0 where the cache of the model's own window dropped some."""
        return 0 if self._arguments is None else self._arguments["kv_offset"]

    @property
    def has_padding(self) -> bool:
        """Whether the 2-D mask that this one was made from hides tokens."""
        given = None if self._arguments is None else self._arguments["attention_mask"]
        return given is not None and not bool(given.all())

    def own_mask(self, implementation: str) -> Tensor | None:
        """The mask that transformers' own `implementation` would have been given, made once for all layers that want it."""
        if implementation not in self._own_masks:
            from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

            self._own_masks[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
                **self._arguments  # type: ignore[arg-type]  # make_mask always gives them
            )
        mask = self._own_masks[implementation]
        return mask if mask is None else mask.to(self.device)

    def moved(self, device: torch.device) -> SequenceMask:
        """A copy on `device`."""
        sequences, dense = self.sequences, self.dense
        if device != self.device:
            sequences = replace(sequences, table=sequences.table.to(device), _items={})
            dense = None if dense is None else dense.to(device)
        batch, _, query_len, kv_len = self.shape
        copy = SequenceMask(
            batch,
            query_len,
            kv_len,
            sequences,
            is_causal=self.is_causal,
            window_tokens=self.window_tokens,
            chunk_tokens=self.chunk_tokens,
            dense=dense,
            covers_batch=self.covers_batch,
            is_cross=self.is_cross,
            arguments=self._arguments,
        )
        copy._own_masks = self._own_masks
        return copy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.clone.default, aten.detach.default, aten.alias.default):
            return args[0].moved(args[0].device)
        if func is aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
            return args[0].moved(kwargs.get("device") or args[0].device)
        if func is aten._has_compatible_shallow_copy_type.default:
            return False
        raise NotImplementedError(
            f"attention_mask got the operation {func}; block_sparse attention passes its mask as a description without entries, "
            "which can be copied and moved only; give the model its own 4-D boolean attention_mask, or use "
            "attn_implementation='sdpa' for this model."
        )


@dataclass(frozen=True)
class _Predicate:
    """A recognised mask function, as a conjunction."""

    is_causal: bool = False
    lookback_tokens: int | None = None  # kv > q - lookback
    reach_tokens: int | None = None  # |q - kv| <= reach
    chunk_tokens: int | None = None
    documents: Tensor | None = None  # [batch, length]

    def joined(self, other: _Predicate) -> _Predicate | None:
        def smaller(left: int | None, right: int | None) -> int | None:
            return min((size for size in (left, right) if size is not None), default=None)

        for name in ("chunk_tokens", "documents"):
            if getattr(self, name) is not None and getattr(other, name) is not None:
                return None
        return _Predicate(
            self.is_causal or other.is_causal,
            smaller(self.lookback_tokens, other.lookback_tokens),
            smaller(self.reach_tokens, other.reach_tokens),
            self.chunk_tokens or other.chunk_tokens,
            self.documents if other.documents is None else other.documents,
        )

    @property
    def is_representable(self) -> bool:
        # A look-back without causality is one-sided; packed chunks are counted from different origins in different releases.
        one_sided = self.lookback_tokens is not None and not self.is_causal
        return not one_sided and (self.chunk_tokens is None or self.documents is None)

    @property
    def window_tokens(self) -> int | None:
        sizes = []
        if self.lookback_tokens is not None:
            sizes.append(self.lookback_tokens)
        if self.reach_tokens is not None:
            sizes.append(self.reach_tokens + 1)
        return min(sizes, default=None)


def _parts(mask_function: object) -> tuple[str, dict[str, Any]] | None:
    """The name of the transformers function that made `mask_function`, and what it holds; None where another did."""
    if getattr(mask_function, "__module__", None) != _MASKING:
        return None
    code = getattr(mask_function, "__code__", None)
    if code is None:
        return None
    cells = getattr(mask_function, "__closure__", None) or ()
    held = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
    return mask_function.__qualname__.partition(".")[0], held


def _recognise(mask_function: Callable) -> _Predicate | None:
    """The predicate that `mask_function` computes, or None where its structure is not one of transformers' own."""
    if (parts := _parts(mask_function)) is None:
        return None
    name, held = parts
    match name:
        case "causal_mask_function":
            return _Predicate(is_causal=True)
        case "bidirectional_mask_function":
            return _Predicate()
        case "sliding_window_overlay":
            return _Predicate(lookback_tokens=held["sliding_window"])
        case "sliding_window_bidirectional_overlay":
            return _Predicate(reach_tokens=held["sliding_window"])
        case "chunked_overlay":
            return _Predicate(chunk_tokens=held["chunk_size"])
        case "packed_sequence_mask_function":
            return _Predicate(documents=held["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":
            # Positions count from each document's start, which moves neither causality nor windows.
            return _recognise(held["mask_function"])
        case "and_masks":
            whole: _Predicate | None = _Predicate()
            for part in held["mask_functions"]:
                predicate = _recognise(part)
                whole = None if whole is None or predicate is None else whole.joined(predicate)
            return whole
    return None


def _documents(mask_function: object) -> Tensor | None:
    """The packed documents named somewhere in `mask_function`, int `[batch, length]`, whatever else it does; None without any."""
    if (parts := _parts(mask_function)) is None:
        return None
    name, held = parts
    match name:
        case "packed_sequence_mask_function":
            return held["packed_sequence_mask"]
        case "and_masks" | "or_masks":
            found = (_documents(part) for part in held["mask_functions"])
            return next((documents for documents in found if documents is not None), None)
    return None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int | Tensor,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> SequenceMask:
    """The mask function registered with transformers: the arguments of `sdpa_mask`, a `SequenceMask` instead of its tensor.

    Longformer reads its padding from the entries of its mask, and gets them; its replaced attention makes a `SequenceMask` of that.

    Args:
        q_offset, kv_offset: place of the first query and of the first key among all tokens so far.
        attention_mask: bool `[batch, tokens so far]`, False for padding.
        use_vmap: the model's user added mask functions, so nothing is assumed about them.
    """
    device = torch.device(device)
    # Assisted decoding leaves tensors in the counts of a sliding-window cache (seen in transformers 5.17).
    kv_length, kv_offset = int(kv_length), int(kv_offset)
    if getattr(kwargs.get("config"), "model_type", None) == "longformer":
        from transformers.masking_utils import eager_mask

        return eager_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    if isinstance(q_offset, Tensor):
        # The cache counts on in place, before the last layer reads the mask.
        q_offset = q_offset.clone()
    arguments = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    predicate = None if use_vmap or mask_function is None else _recognise(mask_function)
    documents = _documents(mask_function)
    is_known = predicate is not None and predicate.is_representable
    if documents is not None and attention_mask is not None:
        documents = documents.masked_fill(~attention_mask.to(documents.device), -1)
        is_known = False
    if not is_known:
        predicate = _Predicate(is_causal=predicate is not None and predicate.is_causal)
    assert predicate is not None
    is_cross = (
        is_known
        and not predicate.is_causal
        and isinstance(q_offset, int)
        and q_offset + q_length != kv_offset + kv_length
    )
    dense = None
    covers_batch = False
    if documents is not None:
        documents = documents.to(device)
        sequences = Sequences.from_document_ids(documents)
    elif is_cross:
        sequences = Sequences.uniform(batch_size, q_length, kv_length, 0, device)
        dense = None if attention_mask is None else attention_mask[:, None, None, :kv_length]
    else:
        sequences, has_holes, covers_batch = _sequences_of_padding(
            batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device
        )
        if has_holes and is_known:
            assert attention_mask is not None
            width = kv_offset + kv_length - attention_mask.shape[1]
            padded = torch.nn.functional.pad(attention_mask, (0, max(width, 0)))
            dense = padded[:, None, None, kv_offset : kv_offset + kv_length]
    if not is_known:
        dense = _evaluate(arguments)
        if documents is not None:
            _refuse_reading_across(documents, dense)
    if dense is not None and dense.is_inference():
        with torch.inference_mode(False):
            dense = (
                dense.clone()
            )  # an index is kept for ordinary tensors only, and every layer asks for it
    return SequenceMask(
        batch_size,
        q_length,
        kv_length,
        sequences,
        is_causal=predicate.is_causal,
        window_tokens=predicate.window_tokens,
        chunk_tokens=predicate.chunk_tokens,
        dense=dense,
        covers_batch=covers_batch and dense is None,
        is_cross=is_cross,
        arguments=arguments,
    )


def _refuse_reading_across(documents: Tensor, allowed: Tensor) -> None:
    query, key = documents[:, None, :, None], documents[:, None, None, :]
    if bool((allowed & (query != key) & (query >= 0)).any()):
        raise NotImplementedError(
            "attention_mask got packed documents and a mask function that lets them read each other; a layout has no meaning between "
            "two documents; give the documents one by one, or leave that mask function out."
        )


def _evaluate(arguments: dict[str, Any]) -> Tensor:
    from transformers.masking_utils import sdpa_mask

    always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(**(arguments | always))
    assert mask is not None
    return mask


def _sequences_of_padding(
    batch: int,
    query_len: int,
    kv_len: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device,
) -> tuple[Sequences, bool, bool]:
    """One sequence per batch row, from its first to its last real token; whether padding lies between them; whether there is none.

    Query rows that stand at padding belong to no sequence. With a static cache the keys end where the queries do, before the tensor.
    """
    keys_end = kv_offset + kv_len
    queries_end = (
        None if isinstance(q_offset, Tensor) else q_offset + query_len
    )  # None: only the device knows
    first: Tensor | None = None
    last: Tensor | None = None
    has_holes = False
    query_begin = 0 if isinstance(q_offset, Tensor) else q_offset
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
            raise ValueError(
                f"attention_mask got shape {tuple(attention_mask.shape)}; it must be (batch, length) with batch {batch}; "
                "give one row per batch item."
            )
        length = attention_mask.shape[1]
        if queries_end is not None and length < queries_end:
            raise ValueError(
                f"attention_mask got {length} tokens; the queries end at token {queries_end}; "
                "append ones for the tokens in the cache and the new ones."
            )
        place = torch.arange(length, device=device)
        real = attention_mask.to(device)
        first = torch.where(real, place, length).amin(1)
        last = torch.where(real, place + 1, 0).amax(1)
        state = torch.stack(((real.sum(1) < last - first).any(), real.all(), first.amax())).tolist()
        has_holes = bool(state[0])
        query_begin = max(0, query_begin - state[2])
        if state[1]:
            first = last = None
    is_whole = first is None
    covers_keys = is_whole and queries_end == keys_end
    if covers_keys and not kv_offset and queries_end is not None:
        start = queries_end - query_len
        return Sequences.uniform(batch, query_len, kv_len, start, device), has_holes, True

    offset = torch.as_tensor(q_offset, device=device).expand(batch)
    end = offset + query_len
    if first is None or last is None:
        first = torch.zeros_like(offset)
    else:
        end = torch.minimum(last, end)
    first_query = torch.maximum(first, offset)
    first_key = first.clamp(min=kv_offset)
    table = torch.stack(
        (
            torch.arange(batch, device=device),
            first_query - offset,
            (end - first_query).clamp(min=0),
            first_query - first,
            first_key - kv_offset,
            (end.clamp(max=keys_end) - first_key).clamp(min=0),
            first_key - first,
        ),
        1,
    ).to(torch.int32)
    sequences = Sequences(
        table,
        batch=batch,
        query_len=query_len,
        kv_len=kv_len,
        query_end=keys_end if queries_end is None else queries_end,
        key_end=keys_end,
        covers_queries=is_whole,
        covers_keys=covers_keys,
        query_begin=query_begin,
    )
    return sequences, has_holes, is_whole


_mask_of_tensor: WeakIdKeyDictionary = WeakIdKeyDictionary()


def mask_from_tensor(
    attention_mask: Tensor, batch: int, query_len: int, kv_len: int
) -> SequenceMask:
    """The mask a user or a model gave as a 4-D tensor: bool (True may be read) or float (0 may be read, -inf may not).

    It is exact and dense. Positions start at the first token that reads or is read; the keys end where the queries do.

    Raises:
        ValueError: a float mask holds anything but 0 and -inf (or its dtype's lowest number), or the shape does not fit.
    """
    has_version = not attention_mask.is_inference()  # without one, a change would go unseen
    known = _mask_of_tensor.get(attention_mask) if has_version else None
    if known is not None and known[0] == attention_mask._version:
        return known[1]
    shape = tuple(attention_mask.shape)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[2:] != (query_len, kv_len):
        raise ValueError(
            f"attention_mask got shape {shape}; it must be ({batch}, 1 or heads, {query_len}, {kv_len}), or 2-D "
            "where the model builds its own mask; reshape it."
        )
    if query_len != kv_len:
        raise NotImplementedError(
            f"attention_mask got a tensor of {query_len} queries and {kv_len} keys; it does not say where among the keys the queries "
            "stand, which a layout needs; give a 2-D attention_mask (the model builds the rest), or run without a cache."
        )
    if attention_mask.dtype == torch.bool:
        dense = (
            attention_mask.data
        )  # not the tensor itself: a value that holds its key would never be freed
    else:
        dense = attention_mask == 0
        lowest = torch.finfo(attention_mask.dtype).min
        if not bool((dense | (attention_mask <= lowest)).all()):
            raise ValueError(
                f"attention_mask got {attention_mask.dtype} entries that are neither 0 nor -inf; block_sparse attention adds no bias "
                "to its scores; give a boolean mask (True may be read), or use attn_implementation='sdpa'."
            )
    is_used = (dense.any(3) | dense.any(2)).any(1)
    place = torch.arange(kv_len, device=dense.device)
    first = torch.where(is_used, place, kv_len).amin(1).expand(batch)
    length = kv_len - first
    zeros = torch.zeros_like(first)
    rows = torch.arange(batch, device=dense.device)
    table = torch.stack((rows, first, length, zeros, first, length, zeros), 1).to(torch.int32)
    sequences = Sequences(
        table,
        batch=batch,
        query_len=query_len,
        kv_len=kv_len,
        query_end=query_len,
        key_end=kv_len,
        covers_queries=False,
        covers_keys=False,
    )
    mask = SequenceMask(batch, query_len, kv_len, sequences, dense=dense)
    if has_version:
        _mask_of_tensor[attention_mask] = (attention_mask._version, mask)
    return mask
