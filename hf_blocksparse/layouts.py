"""Layouts: which queries read which keys.

A layout is a frozen, hashable value without lengths, tensors or devices; it survives JSON and gives a rule for any length. It carries
no causality: what is computed is the layout intersected with the model's own mask. *Token-exact* layouts mean tokens (a window of 1000
is 1000 tokens); *block-exact* ones keep whole blocks of `block_size` tokens.

    layout = SinkWindow(sink=64, window=4096) | BigBird(block_size=64)
    layout.density(32_768, is_causal=True)
    print(layout.picture(8192, is_causal=True))
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hf_blocksparse.rules import (
    CAUSAL,
    EVERY_POSITION,
    AnyOf,
    Band,
    Columns,
    Intervals,
    RandomBlocks,
    Rows,
    Rule,
    Table,
    common_intervals,
    join_intervals,
)

BLOCK_SIZES = (16, 32, 64, 128)
FORMAT_VERSION = 1


@dataclass(frozen=True)
class RuleContext:
    """What a layout may depend on besides positions.

    Attributes:
        is_causal: whether the model's mask is causal.
        length: positions of the sequence, `query_start + query_len` or the keys, whichever is more.
        num_heads: query heads.
        device: where the index is built.
    """

    is_causal: bool
    length: int
    num_heads: int
    device: torch.device


def _check_count(owner: object, name: str, least: int) -> None:
    value = getattr(owner, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{type(owner).__name__}: {name} got {value!r}; it must be an integer of at least {least}; "
            f"give {name}={max(least, 1)} or more."
        )


def check_block_size(block_size: object, owner: str) -> None:
    """Raises ValueError, in the name of `owner`, where `block_size` is none of `BLOCK_SIZES`."""
    # A float or a tensor may equal a size, but is none.
    if not isinstance(block_size, int) or block_size not in BLOCK_SIZES:
        raise ValueError(
            f"{owner}: block_size got {block_size!r}; it must be one of {BLOCK_SIZES}; "
            "choose 128 for speed, smaller for a finer pattern."
        )


# Equal layouts have equal digests; the first one made stands for all of them, and lives as long as any of them does.
_layout_of_digest: WeakValueDictionary[str, Layout] = WeakValueDictionary()


class Layout:
    """Base of all layouts. Combine with `|` (union) and `&` (intersection).

    Class attributes:
        kind: the name in JSON.
        since: the release that first computes it with all its fields; a checkpoint says which release it needs.

    `digest` names the layout where only a string can stand, in compiled graphs: equal for equal layouts, the same in every process.
    Subclasses that define `__post_init__` end it with `super().__post_init__()`, which computes it.
    """

    kind: ClassVar[str]
    since: ClassVar[str] = "0.1.0"
    digest: str

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"layout got a {type(self).__name__} made inside a function that torch.compile traces; a compiled graph holds a "
                "layout by name only; make it outside of the function."
            )
        values = [_named(getattr(self, field.name)) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        digest = hashlib.sha256(repr((self.kind, values)).encode()).hexdigest()
        object.__setattr__(self, "digest", f"{self.kind}-{digest[:32]}")
        first = _layout_of_digest.setdefault(self.digest, self)
        if first is not self:
            object.__setattr__(self, "_first", first)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_first"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        Layout.__post_init__(self)  # a copy is a layout of its own

    @property
    def grain(self) -> int:
        """Tokens per side of the blocks the layout is made of; 1 where it is token-exact."""
        return 1

    @property
    def fixed_heads(self) -> int | None:
        """The number of query heads the layout is made for, None where any will do."""
        return None

    def rule(self, context: RuleContext) -> Rule:
        """The predicate the layout means for one call, without causality."""
        raise NotImplementedError

    def for_head(self, head: int) -> Layout:
        """The layout of one query head, free of `PerHead`."""
        return self

    def for_heads(self, first: int, count: int, num_heads: int) -> Layout:
        """The layout of the heads `first` to `first + count - 1` of `num_heads`, for a call that has these alone."""
        return self

    def for_layer(self, layer: int) -> Layout:
        """The layout of one layer; random layouts draw anew in every layer."""
        return self

    def depends_on_length(self, is_causal: bool) -> bool:
        """Whether a row's keys change with the length of the sequence."""
        return False

    def keeps_all(self, num_tokens: int) -> bool:
        """Whether no two tokens less than `num_tokens` apart are kept from each other, wherever they stand. False may say that it is not
        known without an index."""
        return False

    def readable_from(self, position: int) -> Intervals:
        """Intervals `(start, stop)` of positions that hold every key which a query at `position` or later may read in any head.

        Together they may be too much, never too little: what they leave out, a cache whose next query stands at `position` can free.
        Layouts that cannot say (tensors, random blocks) answer with every position.
        """
        return self.rule(RuleContext(True, 0, 1, torch.device("cpu"))).readable_from(position)

    def check(self, num_heads: int, query_end: int, key_end: int) -> None:
        """Raise ValueError where the layout cannot serve `num_heads` heads or positions up to these ends."""

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: `version`, `kind` and the layout's fields."""
        return {"version": FORMAT_VERSION, "kind": self.kind, **self._fields()}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Layout:
        return cls(**fields)

    def __or__(self, other: Layout) -> Union:
        return Union((self, other))

    def __and__(self, other: Layout) -> Intersection:
        return Intersection((self, other))

    def to_mask(
        self,
        query_len: int,
        kv_len: int | None = None,
        *,
        is_causal: bool = False,
        num_heads: int = 1,
        query_start: int | None = None,
    ) -> Tensor:
        """The dense mask, bool `[num_heads, query_len, kv_len]`, True where a coefficient is kept. For tests and small lengths."""
        kv_len = query_len if kv_len is None else kv_len
        query_start = kv_len - query_len if query_start is None else query_start
        device = torch.device("cpu")
        length = max(query_start + query_len, kv_len)
        self.check(num_heads, query_start + query_len, kv_len)
        row = torch.arange(query_start, query_start + query_len)[:, None]
        col = torch.arange(kv_len)[None, :]
        masks = []
        for head in range(num_heads):
            rule = self.for_head(head).rule(RuleContext(is_causal, length, num_heads, device))
            if is_causal:
                rule = rule & CAUSAL
            masks.append(rule.visible(torch.tensor(head), row, col).expand(query_len, kv_len))
        return torch.stack(masks)

    def density(self, length: int, *, is_causal: bool = False, num_heads: int = 1) -> float:
        """Coefficients kept / coefficients of dense attention of the same kind (square, or causal triangle)."""
        from hf_blocksparse.inspection import inspect_layout

        return inspect_layout(self, length, is_causal=is_causal, num_heads=num_heads).density

    def picture(
        self, length: int, *, is_causal: bool = False, head: int = 0, width: int = 48
    ) -> str:
        """A picture for the terminal, `width` characters wide, with a line that says what it shows and the density."""
        from hf_blocksparse.inspection import picture

        return picture(self, length, is_causal=is_causal, head=head, width=width)


def _named(value: object) -> object:
    """A field's value with digests instead of what is large or has no text of its own."""
    if isinstance(value, Layout):
        return value.digest
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return tuple(map(_named, value)) if isinstance(value, tuple) else value


def layout_from_digest(digest: str) -> Layout:
    """The living layout of this digest. RuntimeError if there is none, as in a process that did not make it."""
    layout = _layout_of_digest.get(digest)
    if layout is None:
        raise RuntimeError(
            f"layout got the digest {digest!r}, which no living layout has; a compiled graph holds its layouts by name only; "
            "make the layout before the graph runs, and keep it."
        )
    return layout


@dataclass(frozen=True)
class Dense(Layout):
    """Every key."""

    kind: ClassVar[str] = "dense"

    def keeps_all(self, num_tokens: int) -> bool:
        return True

    def rule(self, context: RuleContext) -> Rule:
        return Band()


@dataclass(frozen=True)
class SlidingWindow(Layout):
    """`|i - j| < window`, in tokens: with causality the query itself and the `window - 1` tokens before it, as in transformers."""

    window: int
    kind: ClassVar[str] = "sliding_window"

    def __post_init__(self) -> None:
        _check_count(self, "window", 1)
        super().__post_init__()

    def keeps_all(self, num_tokens: int) -> bool:
        return num_tokens <= self.window

    def rule(self, context: RuleContext) -> Rule:
        return Band(1 - self.window, self.window - 1)


@dataclass(frozen=True)
class SinkWindow(Layout):
    """The first `sink` tokens and a sliding window of `window` tokens (StreamingLLM, arXiv 2309.17453), at true positions."""

    sink: int
    window: int
    kind: ClassVar[str] = "sink_window"

    def __post_init__(self) -> None:
        _check_count(self, "sink", 1)
        _check_count(self, "window", 1)
        super().__post_init__()

    def keeps_all(self, num_tokens: int) -> bool:
        return num_tokens <= self.window

    def rule(self, context: RuleContext) -> Rule:
        return Columns(0, self.sink) | Band(1 - self.window, self.window - 1)


@dataclass(frozen=True)
class Longformer(Layout):
    """A window of `window // 2` tokens to each side, and the first `global_tokens` tokens both ways (arXiv 2004.05150).

    The paper's separate projections for global tokens are weights of a model, not part of a layout.
    """

    window: int
    global_tokens: int = 1
    kind: ClassVar[str] = "longformer"

    def __post_init__(self) -> None:
        _check_count(self, "window", 2)
        _check_count(self, "global_tokens", 0)
        super().__post_init__()

    def keeps_all(self, num_tokens: int) -> bool:
        return num_tokens <= self.window // 2 + 1

    def rule(self, context: RuleContext) -> Rule:
        half = self.window // 2
        band = Band(-half, half)
        if not self.global_tokens:
            return band
        return band | Columns(0, self.global_tokens) | Rows(0, self.global_tokens)


@dataclass(frozen=True)
class BlockDiagonal(Layout):
    """Chunks of `chunk` tokens that attend within themselves: `i // chunk == j // chunk`."""

    chunk: int
    kind: ClassVar[str] = "block_diagonal"

    def __post_init__(self) -> None:
        _check_count(self, "chunk", 1)
        super().__post_init__()

    def rule(self, context: RuleContext) -> Rule:
        return Band(0, 0, unit=self.chunk)


@dataclass(frozen=True)
class BigBird(Layout):
    """BigBird's ITC form (arXiv 2007.14062), block-exact: window, global and random blocks.

    Args:
        block_size: tokens per block.
        window_blocks: width of the window, `window_blocks // 2` blocks to each side of the query's own.
        global_blocks: first blocks, read by all and reading all.
        random_blocks: blocks per block row and head, drawn among those not kept yet; with causality among the earlier ones.
        seed: of the draw, which is the same in training and evaluation, on every rank and after reload.
        layer: set by `for_layer`, so that layers draw differently.
    """

    block_size: int = 64
    window_blocks: int = 3
    global_blocks: int = 2
    random_blocks: int = 3
    seed: int = 0
    layer: int = 0
    kind: ClassVar[str] = "bigbird"
    first_head: ClassVar[int] = 0  # of the model's, that a call's first head is

    def __post_init__(self) -> None:
        check_block_size(self.block_size, "BigBird")
        _check_count(self, "window_blocks", 1)
        for name in ("global_blocks", "random_blocks", "seed", "layer"):
            _check_count(self, name, 0)
        super().__post_init__()

    @property
    def grain(self) -> int:
        return self.block_size

    def for_heads(self, first: int, count: int, num_heads: int) -> Layout:
        if not self.random_blocks:
            return self
        fields = self._fields() | {"first_head": self.first_head + first}
        return _BigBirdOfHeads(**fields)

    def for_layer(self, layer: int) -> Layout:
        return dataclasses.replace(self, layer=layer)

    def depends_on_length(self, is_causal: bool) -> bool:
        return not is_causal and self.random_blocks > 0

    def readable_from(self, position: int) -> Intervals:
        return EVERY_POSITION if self.random_blocks else super().readable_from(position)

    def rule(self, context: RuleContext) -> Rule:
        half = self.window_blocks // 2
        rules: list[Rule] = [Band(-half, half, unit=self.block_size)]
        if self.global_blocks:
            edge = self.global_blocks * self.block_size
            rules += [Columns(0, edge), Rows(0, edge)]
        if self.random_blocks:
            rules.append(
                RandomBlocks(
                    self.block_size,
                    self.random_blocks,
                    half_window=half,
                    num_global=self.global_blocks,
                    seed=self.seed,
                    layer=self.layer,
                    is_causal=context.is_causal,
                    num_blocks=max(1, -(-context.length // self.block_size)),
                    num_heads=context.num_heads,
                    device=context.device,
                    first_head=self.first_head,
                )
            )
        return AnyOf(rules)


@dataclass(frozen=True)
class _BigBirdOfHeads(BigBird):
    """BigBird in a call that has some of a model's heads: they draw as they do among all. Never saved."""

    first_head: int = 0  # type: ignore[misc]  # the base's is constant
    kind: ClassVar[str] = "bigbird_of_heads"


@dataclass(frozen=True)
class _TableLayout(Layout):
    """A fixed 0/1 array `shape = (1 or heads, rows, cols)`, one entry per `block_size x block_size` coefficients."""

    shape: tuple[int, int, int]
    data: bytes  # rows of bits, zlib-compressed

    def __post_init__(self) -> None:
        shape = tuple(self.shape)
        object.__setattr__(self, "shape", shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(
                f"{type(self).__name__}: shape got {shape}; it must be (heads, rows, cols), all positive; "
                "build the layout with from_tensor."
            )
        try:
            size = len(zlib.decompress(self.data))
        except zlib.error as error:
            raise ValueError(
                f"{type(self).__name__}: data got {len(self.data)} bytes that do not decompress ({error}); "
                "it must be zlib-compressed bits; build the layout with from_tensor."
            ) from error
        if size != -(-shape[0] * shape[1] * shape[2] // 8):
            raise ValueError(
                f"{type(self).__name__}: data got {size} bytes of bits; shape {shape} needs "
                f"{-(-shape[0] * shape[1] * shape[2] // 8)}; build the layout with from_tensor."
            )
        super().__post_init__()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.shape, self.data, self.grain))

    def __getstate__(self) -> dict[str, Any]:
        # Python salts hashes in each process, so the kept one must not travel.
        return {name: value for name, value in super().__getstate__().items() if name != "_hash"}

    def __repr__(self) -> str:
        heads, rows, cols = self.shape
        kept = self.table().float().mean().item()
        return f"{type(self).__name__}(heads={heads}, rows={rows}, cols={cols}, block_size={self.grain}, kept={kept:.2%})"

    def table(self, device: torch.device | None = None) -> Tensor:
        """The entries, bool `[1 or heads, rows, cols]`."""
        packed = torch.frombuffer(bytearray(zlib.decompress(self.data)), dtype=torch.uint8)
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        count = self.shape[0] * self.shape[1] * self.shape[2]
        return bits.flatten()[:count].bool().view(self.shape).to(device or "cpu")

    @staticmethod
    def _pack(tensor: Tensor, owner: str, entry: str) -> tuple[tuple[int, int, int], bytes]:
        if tensor.dim() not in (2, 3):
            raise ValueError(
                f"{owner}: tensor got shape {tuple(tensor.shape)}; it must be [{entry}, {entry}] or "
                f"[heads, {entry}, {entry}]; reshape it."
            )
        if not tensor.numel():
            raise ValueError(
                f"{owner}: tensor got shape {tuple(tensor.shape)}; it must not be empty; give at least one entry."
            )
        tensor = tensor.detach().cpu()
        kept = tensor != 0
        if not torch.equal(kept.to(tensor.dtype), tensor):
            stray = tensor[(tensor != 0) & (tensor != 1)].flatten()[0].item()
            raise ValueError(
                f"{owner}: tensor got the value {stray}; it must hold 0 and 1 only; "
                "convert it, for example `tensor > threshold`."
            )
        kept = kept if kept.dim() == 3 else kept[None]
        bits = torch.nn.functional.pad(kept.flatten().to(torch.uint8), (0, -kept.numel() % 8))
        packed = (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)
        shape = (kept.shape[0], kept.shape[1], kept.shape[2])
        return shape, zlib.compress(packed.numpy().tobytes(), 6)

    @property
    def fixed_heads(self) -> int | None:
        return self.shape[0] if self.shape[0] > 1 else None

    def rule(self, context: RuleContext) -> Rule:
        table = self.table(context.device)
        # Heads that keep the same share one list, which is walked for all of them at once.
        return Table(table[:1] if bool((table == table[:1]).all()) else table, self.grain)

    def for_heads(self, first: int, count: int, num_heads: int) -> Layout:
        if self.fixed_heads is None:
            return self
        shape, data = self._pack(self.table()[first : first + count], "layout", "entries")
        return dataclasses.replace(self, shape=shape, data=data)

    def readable_from(self, position: int) -> Intervals:
        return EVERY_POSITION

    def check(self, num_heads: int, query_end: int, key_end: int) -> None:
        heads, rows, cols = self.shape
        if heads not in (1, num_heads):
            raise ValueError(
                f"layout got {heads} heads in {self!r}; the query has {num_heads} heads; "
                "give one matrix for all heads or one per query head."
            )
        if query_end > rows * self.grain or key_end > cols * self.grain:
            raise ValueError(
                f"layout got {rows} x {cols} entries of {self.grain} tokens, which reach {rows * self.grain} query and "
                f"{cols * self.grain} key positions; this call has {query_end} and {key_end}; "
                "give a larger tensor, a rule (for example SinkWindow), or query_start=0 if the queries start a sequence of their own."
            )

    def _fields(self) -> dict[str, Any]:
        fields = super()._fields()
        return fields | {
            "shape": list(self.shape),
            "data": base64.b64encode(self.data).decode("ascii"),
        }

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Layout:
        fields = dict(fields)
        if "shape" in fields:
            fields["shape"] = tuple(fields["shape"])
        if isinstance(fields.get("data"), Mapping):
            raise ValueError(
                f"{cls.__name__}: data got {dict(fields['data'])!r}, which stands in a file of its own; only from_pretrained and "
                "hf_blocksparse's own readers look there; load the configuration with from_pretrained."
            )
        if "data" in fields:
            try:
                fields["data"] = base64.b64decode(fields["data"])
            except binascii.Error as error:
                raise ValueError(
                    f"{cls.__name__}: data got {fields['data']!r:.40}, which is not base64 ({error}); it must be what to_dict() wrote; "
                    "write it again."
                ) from error
        return cls(**fields)


@dataclass(frozen=True, repr=False)
class TensorLayout(_TableLayout):
    """A fixed block matrix: `[blocks, blocks]` for all heads or `[heads, blocks, blocks]`. Build it with `from_tensor`.

    For a shorter length it is cropped top-left; a longer length raises.
    """

    block_size: int
    kind: ClassVar[str] = "tensor"
    __hash__ = _TableLayout.__hash__

    def __post_init__(self) -> None:
        check_block_size(self.block_size, "TensorLayout")
        super().__post_init__()

    @property
    def grain(self) -> int:
        return self.block_size

    @classmethod
    def from_tensor(cls, tensor: Tensor, block_size: int) -> TensorLayout:
        """From a 0/1 tensor of any dtype on any device."""
        shape, data = cls._pack(tensor, "TensorLayout", "blocks")
        return cls(shape, data, block_size)


@dataclass(frozen=True, repr=False)
class MaskLayout(_TableLayout):
    """Any per-coefficient mask, exact: `[query_len, kv_len]` or `[heads, query_len, kv_len]`. Build it with `from_tensor`.

    Rows are query positions. For a shorter length it is cropped top-left; a longer length raises.
    """

    kind: ClassVar[str] = "mask"
    __hash__ = _TableLayout.__hash__

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> MaskLayout:
        """From a 0/1 tensor of any dtype on any device; 1 keeps the coefficient."""
        return cls(*cls._pack(tensor, "MaskLayout", "tokens"))


@dataclass(frozen=True)
class _Composite(Layout):
    layouts: tuple[Layout, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layouts", tuple(self.layouts))
        if not self.layouts:
            raise ValueError(
                f"{type(self).__name__}: layouts got none; it needs at least one; give a tuple of layouts."
            )
        for layout in self.layouts:
            if not isinstance(layout, Layout) or isinstance(layout, PerLayer):
                raise TypeError(
                    f"{type(self).__name__}: layouts got {layout!r}; every entry must be a layout of one layer; "
                    "wrap tensors with TensorLayout.from_tensor and put PerLayer outermost."
                )
        super().__post_init__()

    @property
    def grain(self) -> int:
        return min((layout.grain for layout in self.layouts if layout.grain > 1), default=1)

    @property
    def fixed_heads(self) -> int | None:
        return next((n for n in (part.fixed_heads for part in self.layouts) if n), None)

    def _map(self, change: Callable[[Layout], Layout]) -> Layout:
        return dataclasses.replace(self, layouts=tuple(change(layout) for layout in self.layouts))

    def for_head(self, head: int) -> Layout:
        return self._map(lambda layout: layout.for_head(head))

    def for_heads(self, first: int, count: int, num_heads: int) -> Layout:
        return self._map(lambda layout: layout.for_heads(first, count, num_heads))

    def for_layer(self, layer: int) -> Layout:
        return self._map(lambda layout: layout.for_layer(layer))

    def depends_on_length(self, is_causal: bool) -> bool:
        return any(layout.depends_on_length(is_causal) for layout in self.layouts)

    def readable_from(self, position: int) -> Intervals:
        return join_intervals(
            interval for layout in self.layouts for interval in layout.readable_from(position)
        )

    def check(self, num_heads: int, query_end: int, key_end: int) -> None:
        for layout in self.layouts:
            layout.check(num_heads, query_end, key_end)

    def _fields(self) -> dict[str, Any]:
        return {"layouts": [layout.to_dict() for layout in self.layouts]}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Layout:
        if "layouts" in fields:
            fields = fields | {"layouts": tuple(map(layout_from_dict, fields["layouts"]))}
        return cls(**fields)


@dataclass(frozen=True)
class Union(_Composite):
    """Kept where any of `layouts` keeps."""

    kind: ClassVar[str] = "union"

    def keeps_all(self, num_tokens: int) -> bool:
        return any(layout.keeps_all(num_tokens) for layout in self.layouts)

    def rule(self, context: RuleContext) -> Rule:
        return reduce(Rule.__or__, (layout.rule(context) for layout in self.layouts))


@dataclass(frozen=True)
class Intersection(_Composite):
    """Kept where all of `layouts` keep."""

    kind: ClassVar[str] = "intersection"

    def keeps_all(self, num_tokens: int) -> bool:
        return all(layout.keeps_all(num_tokens) for layout in self.layouts)

    def rule(self, context: RuleContext) -> Rule:
        return reduce(Rule.__and__, (layout.rule(context) for layout in self.layouts))

    def readable_from(self, position: int) -> Intervals:
        return reduce(common_intervals, (part.readable_from(position) for part in self.layouts))


@dataclass(frozen=True)
class PerHead(_Composite):
    """One layout per query head, in order."""

    kind: ClassVar[str] = "per_head"

    def keeps_all(self, num_tokens: int) -> bool:
        return all(layout.keeps_all(num_tokens) for layout in self.layouts)

    @property
    def fixed_heads(self) -> int | None:
        return len(self.layouts)

    def for_head(self, head: int) -> Layout:
        return self.layouts[head].for_head(head)

    def for_heads(self, first: int, count: int, num_heads: int) -> Layout:
        chosen = self.layouts[first : first + count]
        return PerHead(tuple(layout.for_heads(first, count, num_heads) for layout in chosen))

    def check(self, num_heads: int, query_end: int, key_end: int) -> None:
        if len(self.layouts) != num_heads:
            raise ValueError(
                f"layout got PerHead with {len(self.layouts)} layouts; the query has {num_heads} heads; "
                "give one layout per query head."
            )
        super().check(num_heads, query_end, key_end)


@dataclass(frozen=True)
class PerLayer(Layout):
    """Layouts by layer, for `patch_model`: `PerLayer({0: Dense(), 5: SinkWindow(64, 1024)})`.

    Keys are layer numbers, or module paths where numbers are ambiguous. Layers not named keep the model's own attention. `layers` holds
    the numbers in their order, then the paths.
    """

    layers: tuple[tuple[int | str, Layout], ...]
    kind: ClassVar[str] = "per_layer"

    def __init__(self, layers: Mapping[int | str, Layout] | Iterable[tuple[int | str, Layout]]):
        items = tuple(layers.items() if isinstance(layers, Mapping) else layers)
        for key, layout in items:
            if not isinstance(key, int | str) or isinstance(key, bool):
                raise TypeError(
                    f"PerLayer: layers got the key {key!r}; a key must be a layer number or a module path; use one of them."
                )
            if not isinstance(layout, Layout) or isinstance(layout, PerLayer):
                raise TypeError(
                    f"PerLayer: layers got {layout!r} for {key!r}; a value must be a layout of one layer; "
                    "wrap tensors with TensorLayout.from_tensor."
                )
        if len({key for key, _ in items}) != len(items):
            raise ValueError(
                f"PerLayer: layers got {[key for key, _ in items]}; a layer may be named once; drop the repeated keys."
            )
        # One order, so that equality does not depend on which layer was named first: JSON sorts keys as text.
        items = tuple(sorted(items, key=lambda item: (isinstance(item[0], str), item[0])))
        object.__setattr__(self, "layers", items)
        self.__post_init__()

    def rule(self, context: RuleContext) -> Rule:
        raise TypeError(
            "layout got a PerLayer; one attention call needs the layout of one layer; pick it from `layers` or use patch_model."
        )

    def check(self, num_heads: int, query_end: int, key_end: int) -> None:
        self.rule(RuleContext(False, 0, num_heads, torch.device("cpu")))

    def _fields(self) -> dict[str, Any]:
        return {"layers": [[key, layout.to_dict()] for key, layout in self.layers]}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Layout:
        if "layers" in fields:
            if any(len(entry) != 2 for entry in fields["layers"]):
                raise ValueError(
                    f"PerLayer: layers got {fields['layers']!r:.60}; it must be pairs of a layer and a layout; write it with to_dict()."
                )
            layers = [(key, layout_from_dict(value)) for key, value in fields["layers"]]
            fields = fields | {"layers": layers}
        return cls(**fields)


KINDS: dict[str, type[Layout]] = {
    layout.kind: layout
    for layout in (
        Dense,
        SlidingWindow,
        SinkWindow,
        Longformer,
        BlockDiagonal,
        BigBird,
        TensorLayout,
        MaskLayout,
        Union,
        Intersection,
        PerHead,
        PerLayer,
    )
}

PRESETS: dict[str, Layout] = {
    "dense": Dense(),
    "sliding_window": SlidingWindow(window=1024),
    "sink_window": SinkWindow(sink=64, window=1024),
    "longformer": Longformer(window=512),
    "block_diagonal": BlockDiagonal(chunk=1024),
    "bigbird": BigBird(),
}


def layout_from_dict(section: Mapping[str, Any]) -> Layout:
    """The layout that `to_dict` described. Unknown kinds, keys and versions raise ValueError."""
    if not isinstance(section, Mapping):
        raise TypeError(
            f"layout got {section!r}; a stored layout must be a dict with 'kind'; write it with to_dict()."
        )
    fields = dict(section)
    version = fields.pop("version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"layout got version {version!r}; this release reads version {FORMAT_VERSION}; upgrade hf-blocksparse."
        )
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"layout got kind {kind!r}; it must be one of {sorted(KINDS)}; "
            "correct it, or upgrade hf-blocksparse if a newer release wrote it."
        )
    cls = KINDS[kind]
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"layout got the keys {unknown} for kind {kind!r}; it knows {sorted(known)}; "
            "correct them, or upgrade hf-blocksparse if a newer release wrote them."
        )
    try:
        return cls._from_fields(fields)
    except TypeError as error:
        raise ValueError(
            f"layout got {sorted(fields)} for kind {kind!r}, which does not suffice ({error}); "
            f"it needs {sorted(known)}; add what is missing."
        ) from error


def layout_from_name(name: str, block_size: int | None = None) -> Layout:
    """A preset by name; `block_size` applies to block-exact presets only."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(
            f"layout got the name {name!r}; it must be one of {sorted(PRESETS)}; use a name or a layout object."
        )
    layout = PRESETS[name]
    if block_size is None:
        return layout
    if not isinstance(layout, BigBird):
        raise ValueError(
            f"block_size got {block_size} for the token-exact preset {name!r}; it belongs to block-exact layouts; leave it out."
        )
    return dataclasses.replace(layout, block_size=block_size)


def mask_to_layout(mask: Tensor, block_size: int) -> Tensor:
    """Max-pool a per-coefficient mask to a block layout.

    Args:
        mask: `[..., query_len, kv_len]`, any dtype, non-zero keeps. A ragged last block counts as a block.
        block_size: tokens per block.

    Returns:
        int64 `[..., query_blocks, kv_blocks]`, 1 where any coefficient of the block is kept.
    """
    check_block_size(block_size, "mask_to_layout")
    if mask.dim() < 2:
        raise ValueError(
            f"mask got shape {tuple(mask.shape)}; it must be [..., query_len, kv_len]; add the missing axes."
        )
    rows, cols = mask.shape[-2:]
    kept = torch.nn.functional.pad(mask != 0, (0, -cols % block_size, 0, -rows % block_size))
    kept = kept.unflatten(-1, (-1, block_size)).any(-1).unflatten(-2, (-1, block_size)).any(-2)
    return kept.to(torch.int64)


def layout_to_mask(
    layout: Tensor, block_size: int, query_len: int | None = None, kv_len: int | None = None
) -> Tensor:
    """The per-coefficient mask of a block layout, the inverse of `mask_to_layout` on whole blocks.

    Args:
        layout: `[..., query_blocks, kv_blocks]`, non-zero keeps.
        block_size: tokens per block.
        query_len, kv_len: crop to these lengths; all of the blocks where None.

    Returns:
        bool `[..., query_len, kv_len]`.
    """
    check_block_size(block_size, "layout_to_mask")
    if layout.dim() < 2:
        raise ValueError(
            f"layout got shape {tuple(layout.shape)}; it must be [..., query_blocks, kv_blocks]; add the missing axes."
        )
    mask = (layout != 0).repeat_interleave(block_size, -1).repeat_interleave(block_size, -2)
    rows = mask.shape[-2] if query_len is None else query_len
    cols = mask.shape[-1] if kv_len is None else kv_len
    if not (0 <= rows <= mask.shape[-2] and 0 <= cols <= mask.shape[-1]):
        raise ValueError(
            f"query_len, kv_len got {rows}, {cols}; the layout reaches {mask.shape[-2]}, {mask.shape[-1]}; crop to 0 up to that."
        )
    return mask[..., :rows, :cols]
