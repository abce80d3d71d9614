"""What a transformers model asks of its attention mask, carried without a `length x length` tensor.

transformers describes a mask by nested functions of `(batch, head, q_index, kv_index)` and asks the registered mask function to
turn them into whatever the attention function reads. `make_mask` recognises causal, bidirectional, sliding-window, chunked,
padded and packed masks and returns a `SequenceMask`: the table of sequences and a few plain values. Anything else is evaluated
into a dense boolean mask: exact, at the price of `batch x query_len x kv_len` bytes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_blocksparse.sequences import (
    KEY_START_FACT,
    Sequences,
    mask_of_keys,
    sequences_of_padding,
)


class SequenceMask(Tensor):
    """A 4-D boolean mask `(batch, 1, query_len, kv_len)` without storage.

    It is a tensor because transformers, accelerate and `generate` pass masks around as tensors: they move them between devices,
    copy them and read their shape, and `torch.compile` takes them apart into `table`, `facts`, `dense` and `own`. Any other
    operation raises.

    Attributes:
        sequences: where the sequences lie in the batch.
        is_causal: a query reads no later position.
        window_tokens: `|i - j| < window_tokens`, or None.
        chunk_tokens: `i // chunk_tokens == j // chunk_tokens`, or None.
        dense: bool, broadcastable to (batch, heads, query_len, kv_len), on top of all the others, or None.
        covers_batch: neither padding nor documents: every batch row is one sequence.
        is_cross: queries and keys are not the same tokens.
        wants_own: a layer may ask for the model's own mask.
        derived: what layers worked out from this mask for each other.
    """

    _sequences: Sequences | None
    _table: Tensor | None
    _facts: Tensor | None
    _own: Tensor | None
    _key_start: int
    _has_padding: bool
    is_causal: bool
    window_tokens: int | None
    chunk_tokens: int | None
    dense: Tensor | None
    covers_batch: bool
    is_cross: bool
    is_packed: bool
    wants_own: bool
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
        sequences: Sequences | None,
        *,
        is_causal: bool = False,
        window_tokens: int | None = None,
        chunk_tokens: int | None = None,
        dense: Tensor | None = None,
        covers_batch: bool = False,
        is_cross: bool = False,
        is_packed: bool = False,
        arguments: dict[str, Any] | None = None,
        table: Tensor | None = None,
        facts: Tensor | None = None,
        own: Tensor | None = None,
    ) -> SequenceMask:
        if table is None:
            assert sequences is not None
            table = sequences.table
        mask = torch.Tensor._make_wrapper_subclass(
            cls,
            (batch, 1, query_len, kv_len),
            dtype=torch.bool,
            device=table.device,
        )
        mask._sequences = sequences
        mask._table = table if sequences is None else None
        mask._facts = facts
        mask._own = own
        mask.is_causal = is_causal
        mask.window_tokens = window_tokens
        mask.chunk_tokens = chunk_tokens
        mask.dense = dense
        mask.covers_batch = covers_batch
        mask.is_cross = is_cross
        mask.is_packed = is_packed
        mask.wants_own = False
        mask._key_start = 0
        mask._has_padding = False
        mask.derived = {}
        mask._arguments = arguments
        mask._own_masks = {}
        return mask

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"SequenceMask(shape={tuple(self.shape)}, sequences={self.table.shape[0]}, "
            f"is_causal={self.is_causal}, window_tokens={self.window_tokens}, "
            f"chunk_tokens={self.chunk_tokens}, dense={self.dense is not None})"
        )

    @property
    def sequences(self) -> Sequences:
        """Where the sequences lie in the batch. Of a mask that a graph made, `read_back` has them."""
        assert self._sequences is not None
        return self._sequences

    @property
    def is_of_graph(self) -> bool:
        """Whether a graph made this mask, so that all there is are `table`, `facts`, `dense` and `own`."""
        return self._sequences is None

    def read_back(self) -> SequenceMask:
        """A mask that a graph made, as `make_mask` would have made it outside; any other as it is."""
        if not self.is_of_graph:
            return self
        if "read back" not in self.derived:
            assert self._table is not None
            batch, _, query_len, kv_len = self.shape
            if self._table.shape[0]:
                sequences, has_mask = Sequences.of_graph(
                    self._table, self._facts, batch, query_len, kv_len
                )
            else:
                start = kv_len - query_len
                sequences = Sequences.uniform(batch, query_len, kv_len, start, self._table.device)
                has_mask = True
            dense = self.dense if has_mask else None
            mask = SequenceMask(
                batch,
                query_len,
                kv_len,
                sequences,
                is_causal=self.is_causal,
                window_tokens=self.window_tokens,
                chunk_tokens=self.chunk_tokens,
                dense=dense,
                covers_batch=sequences.is_uniform and dense is None and not self.is_cross,
                is_cross=self.is_cross,
                is_packed=self.is_packed,
            )
            mask._key_start = 0 if self._facts is None else int(self._facts[KEY_START_FACT])
            mask._has_padding = not (mask.covers_batch or self.is_packed)
            self.derived["read back"] = mask
        return self.derived["read back"]

    @property
    @torch._disable_dynamo  # a graph reads it from the object, and must not be compiled of it
    def table(self) -> Tensor:
        """How a graph holds the sequences: the table of `Sequences`; without rows where the queries are the last of one whole sequence."""
        self._prepare_for_graph()
        assert self._table is not None
        return self._table

    @property
    @torch._disable_dynamo  # a graph reads it from the object, and must not be compiled of it
    def facts(self) -> Tensor | None:
        """What the host knows beside the table, see `Sequences.facts`; None where nothing is needed."""
        self._prepare_for_graph()
        return self._facts

    @property
    @torch._disable_dynamo  # a graph reads it from the object, and must not be compiled of it
    def own(self) -> Tensor | None:
        """All of the model's own mask, bool (batch, 1, query_len, kv_len), for layers of its own attention; None without any."""
        self._prepare_for_graph()
        return self._own

    def _prepare_for_graph(self) -> None:
        if self._table is not None:
            return
        sequences, arguments = self.sequences, self._arguments or {}
        _, _, query_len, kv_len = self.shape
        # A step's numbers must not be constants of the graph, or every step would be compiled.
        is_static = isinstance(arguments.get("q_offset"), Tensor) and not self.key_start
        is_last = sequences.is_uniform and sequences.query_begin == kv_len - query_len
        self._table = sequences.table[:0] if is_last else sequences.table
        if not is_last and (not is_static or self.dense is not None):
            self._facts = sequences.facts(self.dense is not None, self.key_start)
        if self.wants_own:
            self._own = _evaluate(arguments)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        self._prepare_for_graph()
        names = ("table", "facts", "dense", "own")
        description = (
            self.is_causal,
            self.window_tokens,
            self.chunk_tokens,
            self.is_cross,
            self.is_packed,
        )
        return [name for name in names if getattr(self, name) is not None], description

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], description: Any, size: Any, stride: Any
    ) -> SequenceMask:
        batch, _, query_len, kv_len = size
        return mask_of_graph(
            batch,
            query_len,
            kv_len,
            inner["table"],
            inner.get("facts"),
            inner.get("dense"),
            inner.get("own"),
            *description,
        )

    @property
    def key_start(self) -> int:
        """Place of the first key among all tokens so far: not 0 where the cache of the model's own window dropped some."""
        return self._key_start if self._arguments is None else self._arguments["kv_offset"]

    @property
    def has_padding(self) -> bool:
        """Whether the 2-D mask that this one was made from hides tokens."""
        if self._arguments is None:
            return self._has_padding
        given = self._arguments["attention_mask"]
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
        if self._sequences is None:
            assert self._table is not None
            batch, _, query_len, kv_len = self.shape
            return mask_of_graph(
                batch,
                query_len,
                kv_len,
                self._table.to(device),
                self._facts,
                None if self.dense is None else self.dense.to(device),
                None if self._own is None else self._own.to(device),
                self.is_causal,
                self.window_tokens,
                self.chunk_tokens,
                self.is_cross,
                self.is_packed,
            )
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
            is_packed=self.is_packed,
            arguments=self._arguments,
        )
        copy.wants_own = self.wants_own
        copy._key_start = self._key_start
        copy._has_padding = self._has_padding
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


def mask_of_graph(
    batch: int,
    query_len: int,
    kv_len: int,
    table: Tensor,
    facts: Tensor | None,
    dense: Tensor | None,
    own: Tensor | None,
    is_causal: bool,
    window_tokens: int | None,
    chunk_tokens: int | None,
    is_cross: bool,
    is_packed: bool,
) -> SequenceMask:
    """A mask of what a graph holds of it. A node of the graph while `torch.compile` traces, see `transformers_trace`."""
    return SequenceMask(
        batch,
        query_len,
        kv_len,
        None,
        is_causal=is_causal,
        window_tokens=window_tokens,
        chunk_tokens=chunk_tokens,
        dense=dense,
        is_cross=is_cross,
        is_packed=is_packed,
        table=table,
        facts=facts,
        own=own,
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
        has_both = self.documents is not None and other.documents is not None
        if has_both or (self.chunk_tokens is not None and other.chunk_tokens is not None):
            return None
        return _Predicate(
            self.is_causal or other.is_causal,
            _smaller(self.lookback_tokens, other.lookback_tokens),
            _smaller(self.reach_tokens, other.reach_tokens),
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
        reach = None if self.reach_tokens is None else self.reach_tokens + 1
        return _smaller(self.lookback_tokens, reach)


def _smaller(left: int | None, right: int | None) -> int | None:
    if left is None or right is None:
        return right if left is None else left
    return min(left, right)


# transformers' functions that make mask functions out of others, or of numbers and tensors.
_MAKERS = (
    "and_masks",
    "or_masks",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "chunked_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
)


class NamedMaskFunction:
    """A mask function of transformers that says which function made it, and of what; it computes what that one's computes.

    Left in closures, both could be read from Python's function objects, but not while `torch.compile` traces.
    """

    def __init__(self, function: Callable, maker: str, arguments: tuple[Any, ...]):
        self.function = function
        self.maker = maker
        self.arguments = arguments
        # torch 2.11's vmap asks for it, in a trace that could not give it the `repr`.
        self.__name__ = maker

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.function(batch_idx, head_idx, q_idx, kv_idx)


def _naming(make: Callable, name: str) -> Callable:
    @functools.wraps(make)
    def make_named(*arguments: Any, **others: Any) -> Callable:
        function = make(*arguments, **others)
        return function if others else NamedMaskFunction(function, name, arguments)

    return make_named


def name_mask_functions(masking: ModuleType) -> None:
    """Have transformers' mask functions say what they are: in its module, and wherever its models imported the makers by name."""
    for name in _MAKERS:
        make = masking.__dict__.get(name)
        if make is None:
            continue
        named = _naming(make, name)
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("transformers."):
                if module.__dict__.get(name) is make:
                    setattr(module, name, named)


def _recognise(mask_function: Callable) -> _Predicate | None:
    """The predicate that `mask_function` computes, or None where its structure is not one of transformers' own."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function is causal_mask_function:
        return _Predicate(is_causal=True)
    if mask_function is bidirectional_mask_function:
        return _Predicate()
    if not isinstance(mask_function, NamedMaskFunction):
        return None
    maker, arguments = mask_function.maker, mask_function.arguments
    if maker == "sliding_window_overlay":
        return _Predicate(lookback_tokens=arguments[0])
    if maker == "sliding_window_bidirectional_overlay":
        return _Predicate(reach_tokens=arguments[0])
    if maker == "chunked_overlay":
        return _Predicate(chunk_tokens=arguments[0])
    if maker == "packed_sequence_mask_function":
        return _Predicate(documents=arguments[0])
    if maker == "remap_positions_for_packed_sequence":
        # Positions count from each document's start, which moves neither causality nor windows.
        return _recognise(arguments[0])
    if maker == "and_masks":
        whole: _Predicate | None = _Predicate()
        for part in arguments:
            predicate = _recognise(part)
            whole = None if whole is None or predicate is None else whole.joined(predicate)
        return whole
    return None


def _documents(mask_function: object) -> Tensor | None:
    """The packed documents named somewhere in `mask_function`, int `[batch, length]`, whatever else it does; None without any."""
    if not isinstance(mask_function, NamedMaskFunction):
        return None
    if mask_function.maker == "packed_sequence_mask_function":
        return mask_function.arguments[0]
    if mask_function.maker in ("and_masks", "or_masks"):
        for part in mask_function.arguments:
            documents = _documents(part)
            if documents is not None:
                return documents
    return None


def predicate_of(
    mask_function: Callable | None, use_vmap: bool
) -> tuple[_Predicate, Tensor | None, bool]:
    """What is known of a mask function: its predicate, its documents, and whether the predicate is all of it. Also traced into graphs."""
    predicate = None if use_vmap or mask_function is None else _recognise(mask_function)
    documents = _documents(mask_function)
    if predicate is not None and predicate.is_representable:
        return predicate, documents, True
    return _Predicate(predicate is not None and predicate.is_causal), documents, False


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
    predicate, documents, is_known = predicate_of(mask_function, use_vmap)
    if documents is not None and attention_mask is not None:
        documents = documents.masked_fill(~attention_mask.to(documents.device), -1)
        predicate, is_known = _Predicate(is_causal=predicate.is_causal), False
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
        sequences, has_holes, covers_batch = sequences_of_padding(
            batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device
        )
        if has_holes and is_known:
            assert attention_mask is not None
            dense = mask_of_keys(attention_mask, kv_length, kv_offset)
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
        is_packed=documents is not None,
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


_mask_of_tensor: WeakIdKeyDictionary = WeakIdKeyDictionary()


def mask_from_tensor(
    attention_mask: Tensor, batch: int, query_len: int, kv_len: int
) -> SequenceMask:
    """The mask a user or a model gave as a 4-D tensor: bool (True may be read) or float (0 may be read, -inf may not).

    It is exact and dense. Positions start at the first token that reads or is read; the keys end where the queries do.

    Raises:
        TypeError: neither bool nor float.
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
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise TypeError(
            f"attention_mask got {attention_mask.dtype} in 4 dimensions; it must be bool (True may be read), or float (0 may be read, -inf "
            "may not); give attention_mask.bool()."
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
