"""What the benchmark measures: cases (a layout at a shape), the named grids of cases, inputs, and the exact answer.

The exact answer is softmax attention in float32 over the coefficients that the layout's rule calls visible; it owes nothing to the block
index or to any kernel. It walks key ranges of 512 tokens that can hold a kept coefficient, so a window at a million tokens is cheap.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from hf_blocksparse import (
    BigBird,
    Dense,
    Layout,
    Longformer,
    PerHead,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
)
from hf_blocksparse.block_index import BlockIndex, build_index
from hf_blocksparse.layouts import RuleContext
from hf_blocksparse.rules import CAUSAL, TileGrid

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Relative errors (norm of the difference / norm of the exact answer) above this mean a wrong answer, not rounding.
TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}
RANDOM_PERCENTAGES = (50, 25, 10, 5, 2)
TOKEN_EXACT = (
    "causal",
    "full",
    "window",
    "sink_window",
    "sink_window4k",
    "sink_window8k",
    "longformer",
)
BLOCK_EXACT = ("block_window", "bigbird") + tuple(
    f"{causal}random{percent}" for causal in ("", "causal_") for percent in RANDOM_PERCENTAGES
)
SHARED = ("group_random10",)
LAYOUTS = TOKEN_EXACT + BLOCK_EXACT + SHARED
NOT_CAUSAL = ("full", "longformer", *SHARED) + tuple(
    f"random{percent}" for percent in RANDOM_PERCENTAGES
)
SINK_TOKENS = 128
GLOBAL_TOKENS = 128
REFERENCE_TILE = 512

OURS, VARIANTS = "ours", ("ours_portable", "ours_mha", "ours_window", "ours_by_head")
SPARSE_PEERS = ("flex", "flex_autotune", "fa4", "fa4_window")
DENSE_PEERS = ("sdpa_flash", "sdpa_cudnn", "fa4_dense")
IMPLEMENTATIONS = (OURS, *VARIANTS, *SPARSE_PEERS, *DENSE_PEERS)
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """A layout at a shape; `kv_heads` divides `heads`. `block_size` is 1 where the layout is token-exact.

    With `query_tokens` only the last so many positions are queries, as in decoding with a cache of `length_tokens`, and there is no
    backward; None: all are.
    """

    layout: str
    block_size: int
    length_tokens: int = 16384
    head_dim: int = 128
    heads: int = 16
    kv_heads: int = 16
    batch: int = 1
    dtype: str = "bfloat16"
    seed: int = 0
    query_tokens: int | None = None

    def __str__(self) -> str:
        block = f" b{self.block_size}" if self.block_size > 1 else ""
        return f"{self.layout}{block} {self.shape}"

    @property
    def shape(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        queries = "" if self.query_tokens is None else f"Q{self.query_tokens} "
        return f"B{self.batch} {heads} {queries}S{self.length_tokens} D{self.head_dim} {self.dtype}"

    @property
    def num_queries(self) -> int:
        return self.length_tokens if self.query_tokens is None else self.query_tokens

    @property
    def first_query(self) -> int:
        """The position of the first query."""
        return self.length_tokens - self.num_queries

    @property
    def directions(self) -> tuple[str, ...]:
        """What is measured."""
        return DIRECTIONS if self.query_tokens is None else DIRECTIONS[:1]

    @property
    def is_causal(self) -> bool:
        return self.layout not in NOT_CAUSAL

    @property
    def possible(self) -> int:
        """Coefficients of dense attention of the same kind, over all heads of one batch row."""
        length, queries = self.length_tokens, self.num_queries
        if self.is_causal:
            return self.heads * (queries * (2 * length - queries + 1) // 2)
        return self.heads * queries * length


@lru_cache(maxsize=4)
def make_layout(case: Case) -> Layout:
    """The layout of a case; windows and budgets are an eighth of the length unless the name says otherwise.

    `block_window` is as wide as `window`, in whole blocks. Random layouts differ by head and keep the diagonal; `causal_random` keeps its
    share of the causal triangle, `group_random` is shared by the query heads of a key head.
    """
    name, block, length = case.layout, case.block_size, case.length_tokens
    if name in ("causal", "full"):
        return Dense()
    if name == "window":
        return SlidingWindow(length // 8)
    if name.startswith("sink_window"):
        budget = {"4k": 4096, "8k": 8192}.get(name.removeprefix("sink_window"), length // 8)
        return SinkWindow(min(SINK_TOKENS, budget // 2), budget - min(SINK_TOKENS, budget // 2))
    if name == "longformer":
        return Longformer(length // 8, GLOBAL_TOKENS)
    if name == "bigbird":
        return BigBird(block, window_blocks=3, global_blocks=2, random_blocks=3)
    if name == "block_window":
        return block_window(block, max(1, length // 8 // block))
    layout = random_layout(case)
    if name in SHARED:
        heads = (layout.for_heads(head, 1, case.heads) for head in range(case.heads))
        return PerHead(tuple(heads))
    return layout


def block_window(block_size: int, blocks: int) -> Layout:
    """With causality a query reads its own block and the `blocks - 1` before it."""
    return BigBird(block_size, window_blocks=2 * blocks - 1, global_blocks=0, random_blocks=0)


def random_layout(case: Case) -> Layout:
    """Lists of every head by itself, also where heads share a layout."""
    density = int(case.layout.rpartition("random")[2]) / 100
    group_size = case.heads // case.kv_heads if case.layout in SHARED else 1
    blocks = -(-case.length_tokens // case.block_size)
    generator = torch.Generator().manual_seed(case.seed)
    kept = torch.empty(case.heads // group_size, blocks, blocks, dtype=torch.bool)
    # One head at a time: the floats of all heads would be four times the layout.
    for matrix in kept:
        torch.lt(torch.rand(blocks, blocks, generator=generator), density, out=matrix)
        matrix.fill_diagonal_(True)
    if case.is_causal:
        kept.tril_()
    if group_size > 1:
        kept = kept.repeat_interleave(group_size, 0)
    return TensorLayout.from_tensor(kept, case.block_size)


def window_of_equal_tiles(case: Case) -> Layout:
    """A block-exact causal window with as many 128-tiles per row as the case's layout has in the mean."""
    index = exact_index(case, make_layout(case), 128, torch.device("cpu"))
    rows = index.num_lists * index.num_q_tiles
    return block_window(128, max(1, round(index.num_tiles / rows)))


def exact_index(case: Case, layout: Layout, tile: int, device: torch.device) -> BlockIndex:
    """The index of all positions for square tiles and exactly the case's length (the library's own call may round lengths up)."""
    return build_index(
        layout,
        is_causal=case.is_causal,
        num_heads=case.heads,
        query_end=case.length_tokens,
        key_end=case.length_tokens,
        tile_q=tile,
        tile_kv=tile,
        device=device,
    )


def kept_and_computed(index: BlockIndex, heads: int) -> tuple[int, int]:
    """Coefficients kept, and coefficients of the tiles that hold them, over all heads. Lengths must be whole tiles."""
    full = index.kv_mask_ids < 0
    in_mask = index.bank_bits().flatten(1).sum(1)
    area = index.tile_q * index.tile_kv
    kept = int(full.sum()) * area + int(in_mask[index.kv_mask_ids[~full].long()].sum())
    repeats = heads // index.num_lists
    return kept * repeats, index.num_tiles * area * repeats


def count_kept(case: Case, layout: Layout, device: torch.device) -> int:
    """Coefficients that the case's queries keep, over all heads: from an index, or for a few queries from the rule itself."""
    if case.query_tokens is None:
        tile = case.block_size if case.block_size > 1 else 128
        return kept_and_computed(exact_index(case, layout, tile, device), case.heads)[0]
    return sum(
        int(kept.sum())
        for head in range(case.heads)
        for _, _, kept in _kept_by_rows(case, layout, head, device)
    )


def make_inputs(case: Case, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Leaves query, key, value `[batch, heads, queries or length, head_dim]`, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(case.seed)

    def normal(heads: int, tokens: int) -> Tensor:
        shape = (case.batch, heads, tokens, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[case.dtype])

    query = normal(case.heads, case.num_queries)
    key, value = (normal(case.kv_heads, case.length_tokens) for _ in range(2))
    leaves = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    return leaves, normal(case.heads, case.num_queries)


@dataclass(frozen=True)
class Exact:
    """Output and gradients of batch row 0, float32 `[heads or kv heads, queries or length, head_dim]`, of the key heads `kv_heads`."""

    kv_heads: tuple[int, ...]
    out: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


@torch.no_grad()
def exact_answer(case: Case, layout: Layout, leaves: Sequence[Tensor], grad_out: Tensor) -> Exact:
    """Of the first and the last key head's groups, so that lists that differ by head are looked at."""
    kv_heads = tuple(sorted({0, case.kv_heads - 1}))
    group = case.heads // case.kv_heads
    outs, grad_queries, grad_keys, grad_values = [], [], [], []
    for kv_head in kv_heads:
        key, value = (leaf[0, kv_head].float() for leaf in leaves[1:])
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for head in range(kv_head * group, (kv_head + 1) * group):
            query, weights = leaves[0][0, head].float(), grad_out[0, head].float()
            out, grad_query = torch.empty_like(query), torch.empty_like(query)
            for positions, cols, kept in _kept_by_rows(case, layout, head, query.device):
                rows = positions - case.first_query
                scores = query[rows] @ key[cols].T * case.head_dim**-0.5
                probabilities = scores.masked_fill_(~kept, -math.inf).softmax(-1)
                out[rows] = probabilities @ value[cols]
                grad_value.index_add_(0, cols, probabilities.T @ weights[rows])
                grad_scores = weights[rows] @ value[cols].T
                grad_scores -= (out[rows] * weights[rows]).sum(-1, keepdim=True)
                grad_scores *= probabilities.mul_(case.head_dim**-0.5)
                grad_query[rows] = grad_scores @ key[cols]
                grad_key.index_add_(0, cols, grad_scores.T @ query[rows])
            outs.append(out)
            grad_queries.append(grad_query)
        grad_keys.append(grad_key)
        grad_values.append(grad_value)
    parts = (torch.stack(part) for part in (outs, grad_queries, grad_keys, grad_values))
    return Exact(kv_heads, *parts)


def _kept_by_rows(
    case: Case, layout: Layout, head: int, device: torch.device
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Positions of queries, a tile of them at a time, those of the keys in all tiles in which they may keep something, and what is kept."""
    length = case.length_tokens
    rule = layout.for_head(head).rule(RuleContext(case.is_causal, length, case.heads, device))
    if case.is_causal:
        rule = rule & CAUSAL
    tiles = -(-length // REFERENCE_TILE)
    first = case.first_query // REFERENCE_TILE
    grid = TileGrid(
        REFERENCE_TILE, REFERENCE_TILE, tiles - first, tiles, (head,), device, first_q_tile=first
    )
    codes = rule.enumerate(grid)
    number = torch.tensor(head, device=device)
    place = torch.arange(REFERENCE_TILE, device=device)
    for tile in range(first, tiles):
        chosen = codes[codes // tiles == tile - first] % tiles
        rows = tile * REFERENCE_TILE + place
        cols = (chosen.sort().values[:, None] * REFERENCE_TILE + place).flatten()
        rows, cols = rows[(rows >= case.first_query) & (rows < length)], cols[cols < length]
        kept = rule.visible(number, rows[:, None], cols[None])
        yield rows, cols, kept.expand(rows.numel(), cols.numel())


def relative_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest norm of a difference / norm of the exact tensor."""
    return max(
        float((a.detach().float() - b).norm() / b.norm())
        for a, b in zip(actual, exact, strict=True)
    )


def heads_of(case: Case, exact: Exact, tensor: Tensor) -> Tensor:
    """Of a `[batch, heads, ..]` tensor of query or key heads, those that `exact` holds."""
    group = tensor.shape[1] // case.kv_heads
    chosen = [kv * group + place for kv in exact.kv_heads for place in range(group)]
    return tensor[0, chosen]


# Grids: (case, implementations it is for).
Grid = list[tuple[Case, tuple[str, ...]]]
_FLEX = ("flex", "flex_autotune")
_DENSE = DENSE_PEERS


def _quick() -> Grid:
    """A look at everything in a few minutes; no autotuning."""
    case = partial(Case, length_tokens=8192)
    chosen = (OURS, "ours_window", "flex", "fa4", "fa4_window", *_DENSE)
    return [
        (case(layout, block), chosen)
        for layout, block in (
            ("causal", 1),
            ("full", 1),
            ("window", 1),
            ("sink_window", 1),
            ("bigbird", 128),
            ("random25", 128),
            ("random10", 64),
        )
    ]


def _bars() -> Grid:
    """The comparisons the kernels are held to: B1 H16 S16384 bfloat16, and what is said of other shapes. The telling ones come first."""
    sparse = (OURS, "ours_portable", *_FLEX, "fa4", "fa4_window")
    small = partial(Case, head_dim=64)
    grid: Grid = [
        (Case("bigbird", 128), (OURS, "ours_portable", "ours_window", "flex", "fa4")),
        (Case("random25", 128), sparse + _DENSE),
        (Case("random10", 128), sparse + _DENSE),
        (small("bigbird", 128), (OURS, "ours_portable", "ours_window", "flex", "fa4")),
        (small("random25", 128), (OURS, "ours_portable", "flex", "fa4")),
        (small("full", 1), (OURS, *_DENSE)),
        (small("causal", 1), (OURS, *_DENSE)),
        (Case("causal", 1), (OURS, "ours_portable", *_DENSE)),
        (Case("full", 1), (OURS, "ours_portable", *_DENSE)),
        (Case("window", 1), sparse + _DENSE),
        (Case("random25", 64), (OURS, "ours_portable", "flex_autotune", "fa4")),
        (Case("block_window", 64), (OURS, "ours_portable", "flex_autotune")),
    ]
    for layout, block in (("bigbird", 128), ("window", 1), ("random25", 128), ("bigbird", 64)):
        grid.append((Case(layout, block, kv_heads=4), (OURS, "ours_mha")))
    grid += _small_blocks()
    # The curves from which break-even densities are read.
    dense = ("sdpa_cudnn", "fa4_dense")
    grid += [(Case(f"random{percent}", 128), (OURS, *dense)) for percent in (50, 5, 2)]
    for percent in (50, 25, 10, 5, 2):
        names = (OURS, *(_DENSE if percent == 25 else dense))
        grid.append((Case(f"causal_random{percent}", 128), names))
    grid += _lengths()
    grid += [
        (Case("sink_window", 1), (OURS, "fa4")),
        (Case("longformer", 1), (OURS, "fa4")),
        (Case("random25", 128, dtype="float16"), (OURS, "fa4", "sdpa_cudnn")),
    ]
    return grid + _launch()


def _small_blocks() -> Grid:
    """Blocks of 32 and 16 beside 64: how much of the rate is left where they are scattered, and whether they cost a window anything."""
    blocks = (64, 32, 16)
    grid: Grid = []
    for head_dim in (128, 64):
        case = partial(Case, head_dim=head_dim)
        grid += [(case("random10", block), (OURS, "ours_portable")) for block in blocks]
        # What it brings that the heads of a group fill tiles together, beside a list for each head.
        for block in (32, 16):
            grid.append((case("group_random10", block, kv_heads=4), (OURS, "ours_by_head")))
    for layout in ("random25", "bigbird"):
        grid += [(Case(layout, block), (OURS, "ours_portable")) for block in (32, 16)]
    return grid + [(Case("block_window", block), (OURS,)) for block in blocks[1:]]


def _lengths() -> Grid:
    """A budget that stays while the length grows: 8,192 keys a query up to 131,072 tokens, 4,096 at a million."""
    grid: Grid = [
        (Case("sink_window8k", 1, length_tokens=length), (OURS,))
        for length in (16384, 32768, 65536, 131072)
    ]
    grid.append((Case("sink_window4k", 1, 1 << 20, 64, heads=8, kv_heads=8), (OURS,)))
    return grid


def _launch() -> Grid:
    """Short calls, whose time is the CPU's: what it takes to issue one."""
    return [
        (Case(layout, 1, length, 64), (OURS, "flex", *_DENSE))
        for length in (512, 1024, 2048)
        for layout in ("causal", "window")
    ]


def _full() -> Grid:
    """Every layout at every block size, then one thing changed at a time: length, head size, groups of heads, dtype.

    Random layouts longer than 16,384 tokens are measured with blocks of 64 and 128: with smaller ones nearly every tile is kept in part,
    and their masks alone would take gigabytes.
    """
    every = IMPLEMENTATIONS
    # Autotuning times every candidate on a dense mask, which takes minutes at these lengths.
    long = tuple(name for name in IMPLEMENTATIONS if name != "flex_autotune")
    grid: Grid = [(Case(layout, 1), every) for layout in TOKEN_EXACT if layout != "sink_window4k"]
    grid += [(Case(layout, block), every) for block in (128, 64, 32, 16) for layout in BLOCK_EXACT]
    few = [("causal", 1), ("full", 1), ("window", 1), ("sink_window", 1), ("longformer", 1)]
    few += [("bigbird", 128), ("random10", 128)]
    for length in (2048, 4096, 8192, 32768, 65536, 131072):
        chosen = every if length <= 32768 else long
        for layout, block in [*few, ("bigbird", 64), ("random10", 64)]:
            grid.append((Case(layout, block, length_tokens=length), chosen))
    for change in ({"head_dim": 64}, {"kv_heads": 4}, {"dtype": "float16"}):
        for layout, block in [*few, ("random25", 64)]:
            grid.append((replace(Case(layout, block), **change), every))
    return grid


def _decode() -> Grid:
    """One query and its cache: beside SDPA over all of it, and how little a bounded layout minds its length."""
    grid: Grid = []
    for shape, lengths in (
        (partial(Case, heads=32, kv_heads=8), (4096, 16384, 65536)),
        (partial(Case, heads=9, kv_heads=3, head_dim=64), (4096, 65536)),
    ):
        for layout in ("sink_window4k", "causal"):
            for length in lengths:
                case = shape(layout, 1, length_tokens=length, query_tokens=1)
                grid.append((case, (OURS, "sdpa_flash")))
    return grid


GRIDS: dict[str, Callable[[], Grid]] = {
    "quick": _quick,
    "bars": _bars,
    "small_blocks": _small_blocks,
    "full": _full,
    "decode": _decode,
    "lengths": _lengths,
    "launch": _launch,
}


def applies(implementation: str, case: Case) -> bool:
    """Whether an implementation has something of its own to show on a case.

    With `query_tokens`: the peers' lists of tiles are of all positions, and SDPA aligns its causal mask to the first key, so it takes one
    query alone, which needs no mask.
    """
    if case.query_tokens is not None:
        is_sdpa = implementation in ("sdpa_flash", "sdpa_cudnn") and case.query_tokens == 1
        return is_sdpa or implementation in (OURS, "ours_portable")
    if implementation == "ours_mha":
        return case.kv_heads < case.heads
    if implementation == "ours_window":
        return case.layout == "bigbird"
    if implementation == "ours_by_head":
        return case.layout in SHARED
    if implementation == "fa4":
        return case.layout not in ("causal", "full")
    if implementation == "fa4_window":
        return case.layout == "window"
    return True
