"""`SparseCache`: a transformers cache that frees the keys which no later query can read.

Each attention call tells its cache layer what it read by: the layout within the model's own window, and where the batch rows begin. The
layer keeps what that layout may still read from the next position on, and nothing is freed by anyone who does not know. So a model that
never reaches our attention function keeps every key.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from hf_blocksparse.kept_keys import KeptKeys, columns_to_keep
from hf_blocksparse.layouts import Layout
from hf_blocksparse.model_layouts import IMPLEMENTATION, config_of, state_of
from hf_blocksparse.rules import Intervals, common_intervals, join_intervals

# Rows that can be freed wait for the next call, which copies the tensor anyway, unless they are more than this part of the rest.
_WAITING = 1 / 32


class SparseCache(Cache):
    """A cache for `generate` and forward calls that keeps only keys which the layouts of the model can still read.

        cache = SparseCache(model)
        model.generate(**inputs, past_key_values=cache)
        print(cache)

    Outputs are those of `DynamicCache`. Layers with a layout keep what it reads, within the model's own window: `SlidingWindow` its last
    `window - 1` tokens, `SinkWindow` its sinks as well, `BlockDiagonal` the current chunk, unions and intersections what follows; tensors,
    masks and random blocks keep everything. Layers without a layout get transformers' own cache layers. Left padding is honoured: what
    is kept is counted from each row's first token, and with sinks the columns between the first tokens of different rows stay, too.

    Args:
        model: a model with block-sparse layers (`patch_model`, or loaded with its layouts). The cache serves this model alone.

    Raises:
        TypeError, ValueError: `model` is not a transformers model, or no layer of it has a layout.
        NotImplementedError: an encoder-decoder, or cache layers that several attention modules share.
    """

    def __init__(self, model: nn.Module):
        config = getattr(model, "config", None)
        if not isinstance(model, nn.Module) or not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"model got {type(model).__name__}; it must be a transformers model with block-sparse layers; pass the model itself."
            )
        if config.is_encoder_decoder:
            raise NotImplementedError(
                f"model got {type(model).__name__}, an encoder-decoder, whose decoder reads two caches; SparseCache is for decoders; "
                "use transformers' EncoderDecoderCache."
            )
        config = config.get_text_config(decoder=True)
        layers = DynamicCache(config=config).layers
        readers: dict[int, nn.Module] = {}
        for path, module in model.named_modules():
            state = state_of(module)
            number = getattr(module, "layer_idx", None)
            if (
                state is None
                or state.layout is None
                or getattr(module, "config", None) is not config
            ):
                continue
            if not isinstance(number, int) or not 0 <= number < len(layers):
                continue
            if number in readers:
                raise NotImplementedError(
                    f"model got {type(model).__name__}, where {path} and another attention module share the cache layer {number}; "
                    "SparseCache needs one layout per cache layer; use transformers' DynamicCache."
                )
            readers[number] = module
        if not readers:
            raise ValueError(
                f"model got {type(model).__name__}, in which no layer with a cache has a layout, so no key can be freed; call "
                "patch_model(model, layout) first, or use transformers' DynamicCache."
            )
        for number, module in readers.items():
            # Layers that hold more than keys and values (linear attention, indexers) stay as they are, and keep every key.
            own: Any = layers[number]
            if type(own) is DynamicLayer:
                layers[number] = SparseCacheLayer(module)
            elif type(own) is DynamicSlidingWindowLayer:
                layers[number] = SparseCacheLayer(module, own.sliding_window)
        super().__init__(layers=layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(_num_bytes(layer) for layer in self.layers)

    @property
    def full_bytes(self) -> int:
        """Bytes that the keys and values of all tokens so far would take in the same layers."""
        return sum(_full_bytes(layer) for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens in all layers, or raise ValueError where one of them has freed what that needs."""
        for layer in self.layers:
            if isinstance(layer, SparseCacheLayer):
                layer.left_after(tokens_to_remove)
        super().crop(tokens_to_remove)

    def __repr__(self) -> str:
        sparse = sum(isinstance(layer, SparseCacheLayer) for layer in self.layers)
        text = f"SparseCache({sparse} of {len(self.layers)} layers sparse"
        if full := self.full_bytes:
            held = self.num_bytes
            text += (
                f", {self.get_seq_length():,} tokens: {held / 2**20:,.2f} MiB held of {full / 2**20:,.2f} MiB for all keys "
                f"({held / full:.1%})"
            )
        return text + ")"


class SparseCacheLayer(DynamicLayer):
    """The keys and values of one layer that its layout can still read.

    To transformers it looks like its own layer of the same kind: masks are made for every token so far, or for the model's own window.

    Attributes:
        keys, values: (batch, kv_heads, rows, head_dim), or None.
        columns: the intervals of columns they hold, one after the other; see `kept_keys`.
        live: what of them the next call can read. The rest goes when it comes.
        cumulative_length: tokens so far.
        record_past: free nothing before the next `crop`, for assisted decoding.
    """

    is_croppable = True

    def __init__(self, module: nn.Module, sliding_window: int | None = None):
        super().__init__()
        self.is_sliding = sliding_window is not None
        self.sliding_window = sliding_window
        self.record_past = False
        self._module = weakref.ref(module)
        self._forget()

    def _forget(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0
        self.columns: Intervals = ()
        self.live: Intervals = ()
        self._read_by: tuple[Layout, tuple[int, ...]] | None = None
        self._is_unread = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens; returns all rows held, the keys with their `KeptKeys`."""
        self._check_model()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        mask_len, mask_start = self.get_mask_sizes(new)
        keys, values = self._with_live(key_states, value_states)
        end = self.cumulative_length + new
        self.columns = self.live = join_intervals((*self.live, (self.cumulative_length, end)))
        self.cumulative_length = end
        self._is_unread = True
        KeptKeys(self.columns, end, mask_start, mask_len, weakref.ref(self)).put_on(keys)
        self.keys, self.values = keys, values
        return keys, values

    def _with_live(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The live rows and these after them, copied, so that nothing holds on to the rest."""
        assert self.keys is not None and self.values is not None
        rows, row = [], 0
        for start, stop in self.columns:
            for left, right in common_intervals(self.live, ((start, stop),)):
                rows.append(slice(row + left - start, row + right - start))
            row += stop - start
        keys = torch.cat((*(self.keys[:, :, part] for part in rows), key_states), 2)
        values = torch.cat((*(self.values[:, :, part] for part in rows), value_states), 2)
        return keys, values

    def _check_model(self) -> None:
        module = self._module()
        state = None if module is None else state_of(module)
        if (
            module is None
            or state is None
            or config_of(module)._attn_implementation != IMPLEMENTATION
        ):
            raise ValueError(
                "past_key_values got a SparseCache of a model that is no longer block-sparse; its layouts decide what is kept; make a "
                "SparseCache after patch_model, or use transformers' DynamicCache."
            )
        if self._is_unread:
            raise RuntimeError(
                f"past_key_values got a SparseCache whose last keys {state.path} never read; it serves the model it was made "
                "from, and no call that failed; make another SparseCache(model), or call reset() and start again."
            )

    def check_reader(self, module: nn.Module, path: str) -> None:
        """See `kept_keys.FreeingLayer`."""
        own = self._module()
        if module is not own:
            named = None if own is None else state_of(own)
            raise NotImplementedError(
                f"{path} reads the keys of {named.path if named else 'another layer'} from a SparseCache, which frees them by that "
                "layer's layout; use transformers' DynamicCache, or a SparseCache made from this model."
            )

    def free(self, layout: Layout, first_columns: tuple[int, ...]) -> None:
        """See `kept_keys.FreeingLayer`."""
        self._is_unread = False
        self._read_by = (layout, first_columns)
        if not self.record_past:
            self._free()

    def _free(self) -> None:
        if self._read_by is None:
            return
        layout, first_columns = self._read_by
        keep = columns_to_keep(layout, self.cumulative_length, first_columns)[1]
        self.live = common_intervals(self.columns, keep)
        live, held = _count(self.live), _count(self.columns)
        if held - live > live * _WAITING:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = self._with_live(self.keys[:, :, :0], self.values[:, :, :0])
            self.columns = self.live

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: every token so far, or what the model's own window can reach."""
        length, start = self.cumulative_length, 0
        if self.sliding_window is not None:
            start = max(length - self.sliding_window + 1, 0)
        return length - start + query_length, start

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Free nothing before `crop` has said which tokens stay."""
        self.record_past = True

    def left_after(self, tokens_to_remove: int) -> tuple[int, Intervals]:
        """The tokens that `crop` leaves, and the columns held of them. Raises where that would not do."""
        tokens_to_remove = int(tokens_to_remove)  # some releases hand over a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove got {tokens_to_remove}; it must not be positive: -n removes the last n tokens; "
                "give get_seq_length() minus the length to keep, with a minus sign."
            )
        end = max(self.cumulative_length + tokens_to_remove, 0)
        columns = common_intervals(self.columns, ((0, end),))
        if self._read_by is not None:
            layout, first_columns = self._read_by
            needed = columns_to_keep(layout, end, first_columns)[0]
            if common_intervals(needed, columns) != needed:
                raise ValueError(
                    f"crop got {tokens_to_remove}; the tokens from {end} on would read keys of columns {needed}, and the cache holds "
                    f"{columns}, as it has freed the rest; call activate_past_recording() before the tokens that may be removed, or use "
                    "transformers' DynamicCache."
                )
        return end, columns

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: the queries that come again may read keys that were freed, or the number is positive.
        """
        self.cumulative_length, self.live = self.left_after(tokens_to_remove)
        self._free()

    def reset(self) -> None:
        self._forget()


def _count(columns: Intervals) -> int:
    return sum(stop - start for start, stop in columns)


def _tensors(layer: Any) -> list[Tensor]:
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return [tensor for tensor in held if isinstance(tensor, Tensor) and tensor.dim() == 4]


def _num_bytes(layer: Any) -> int:
    """What the storage takes: transformers' sliding layers hold views of more."""
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(layer))


def _full_bytes(layer: Any) -> int:
    return sum(
        tensor.shape[0]
        * tensor.shape[1]
        * layer.get_seq_length()
        * tensor.shape[3]
        * tensor.element_size()
        for tensor in _tensors(layer)
    )
